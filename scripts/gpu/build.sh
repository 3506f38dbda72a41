#!/usr/bin/env bash
# Fill .carry/ (and .carry-nixl/, .carry-fa3/) with what scripts/gpu/setup.sh needs on an offline GPU host. No GPU needed.
#
#   scripts/gpu/build.sh PYTHON KIT
#     PYTHON  of an environment with sglang==0.5.17 and this package
#     KIT     folder that holds site.tar.xz, an archive of the packages that the host lacks
#
# All that travels in one call must stay under 64 MiB: the kit takes about 50 MB of it, NIXL 59 MB by itself,
# FlashAttention 3 10 MB: those in a later call on the same machine.
set -euo pipefail
cd "$(dirname "$0")/../.."
python=${1:?usage: build.sh PYTHON KIT}; kit=${2:?usage: build.sh PYTHON KIT}
mkdir -p .carry/kernels .carry/more .carry-nixl .carry-fa3
cp "$kit/site.tar.xz" .carry/
"$python" -m sglang_adrenaline.kernels --arch 90a --out .carry/kernels
built="$kit/cache/flashinfer/built" # of the same sources
"$python" scripts/gpu/compile_kernels.py "$kit/more" "$built"
for part in aot tvm-ffi; do rm -rf ".carry/more/$part"; cp -r "$kit/more/$part" ".carry/more/$part"; done
# What the archive has already need not travel twice.
tar tJf .carry/site.tar.xz | sed -n 's#^\./flashinfer/data/aot/\([^/]*\)/.*\.so$#\1#p' |
  while read -r module; do rm -rf ".carry/more/aot/$module"; done
for pin in nixl-cu13==1.5.1 nixl==1.5.1; do
  ls .carry-nixl | grep -q "^$(tr - _ <<<"${pin/==/-}" | sed 's/_1\.5\.1/-1.5.1/')-" ||
    "$python" -m pip download -q --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
      --platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 -d .carry-nixl "$pin"
done
"$python" scripts/gpu/trim_fa3.py .carry-fa3/flash_ops.tar.xz
du -sh .carry .carry-nixl .carry-fa3
