# Sourced on a GPU host without network, from the repository's root: `source scripts/gpu/setup.sh`.
#
# Unpacks what the host lacks to run SGLang 0.5.17 and sets the environment for our servers, tests and benchmarks. What
# is there already from an earlier call on the same machine is kept. Expects in .carry/ (see build.sh beside this):
#   site.tar.xz   SGLang and its dependencies, FlashInfer kernels compiled ahead
#   more/         more kernels: more/aot (FlashInfer), more/tvm-ffi (SGLang's own)
#   kernels/      ours
# and, optionally, in .carry-nixl/ the wheels of NIXL for stock PD, in .carry-fa3/ FlashAttention 3 (trim_fa3.py).

ADRENALINE_SITE=${ADRENALINE_SITE:-/tmp/site}

_setup_unpack() {
  local begin=$SECONDS
  if [[ ! -e $ADRENALINE_SITE/.complete ]]; then
    [[ -f .carry/site.tar.xz ]] || { echo "setup: .carry/site.tar.xz is missing" >&2; return 1; }
    rm -rf "$ADRENALINE_SITE" && mkdir -p "$ADRENALINE_SITE" || return 1
    tar xJf .carry/site.tar.xz -C "$ADRENALINE_SITE" || return 1
    # The archive holds no bytecode: once here, on all cores, instead of in each of the first server's processes.
    python3 -m compileall -q -j 0 "$ADRENALINE_SITE" >/dev/null 2>&1
    touch "$ADRENALINE_SITE/.complete"
    echo "setup: unpacked in $((SECONDS - begin)) s"
  fi
  if [[ -d .carry/more/aot ]]; then
    mkdir -p "$ADRENALINE_SITE/flashinfer/data/aot"
    cp -r .carry/more/aot/. "$ADRENALINE_SITE/flashinfer/data/aot/"
  fi
  if [[ -d .carry/more/tvm-ffi ]]; then
    mkdir -p "$ADRENALINE_SITE/.tvm-ffi" && cp -r .carry/more/tvm-ffi/. "$ADRENALINE_SITE/.tvm-ffi/"
  fi
  if [[ -d .carry/kernels ]]; then # a later call on the same machine may carry something else
    mkdir -p "$ADRENALINE_SITE/.kernels" && cp .carry/kernels/*.so "$ADRENALINE_SITE/.kernels/"
  fi
  if compgen -G '.carry-nixl/nixl*.whl' >/dev/null && [[ ! -e $ADRENALINE_SITE/.nixl ]]; then
    local wheel
    for wheel in .carry-nixl/*.whl; do python3 -m zipfile -e "$wheel" "$ADRENALINE_SITE" || return 1; done
    touch "$ADRENALINE_SITE/.nixl"
    echo "setup: NIXL unpacked"
  fi
  if [[ -f .carry-fa3/flash_ops.tar.xz && ! -e $ADRENALINE_SITE/sgl_kernel/flash_ops.abi3.so ]]; then
    tar xJf .carry-fa3/flash_ops.tar.xz -C "$ADRENALINE_SITE/sgl_kernel" || return 1
    echo "setup: FlashAttention 3 unpacked"
  fi
}

# SGLang finds plugins by the entry points of installed distributions; the repository is not installed, so its
# metadata is written beside the packages.
_setup_entry_points() {
  python3 - "$ADRENALINE_SITE" <<'PYTHON'
import pathlib, re, sys, tomllib

project = tomllib.loads(pathlib.Path("pyproject.toml").read_text())["project"]
text = pathlib.Path("python/sglang_adrenaline/__init__.py").read_text()
version = re.search(r'__version__ = "([^"]+)"', text).group(1)
site = pathlib.Path(sys.argv[1])
for old in site.glob("sglang_adrenaline-*.dist-info"):
    for file in old.iterdir():
        file.unlink()
    old.rmdir()
info = site / f"sglang_adrenaline-{version}.dist-info"
info.mkdir()
(info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {version}\n")
lines = []
for group, points in project["entry-points"].items():
    lines += [f"[{group}]", *(f"{name} = {target}" for name, target in points.items()), ""]
(info / "entry_points.txt").write_text("\n".join(lines))
PYTHON
}

_setup_check() {
  python3 - <<'PYTHON'
from importlib.metadata import entry_points, version

import torch
import sglang_adrenaline

for group in ("sglang.srt.plugins", "sglang.srt.platforms"):
    assert "adrenaline" in entry_points(group=group).names, f"our entry point in {group} was not found"
names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
versions = ", ".join(f"{name} {version(name)}" for name in ("sglang", "flashinfer-python", "apache-tvm-ffi"))
print(f"setup: {versions}, torch {torch.__version__}, {names}, {sglang_adrenaline.__file__}")
PYTHON
}

_setup() {
  _setup_unpack && _setup_entry_points || return 1
  export PYTHONPATH="$PWD/python:$ADRENALINE_SITE"
  export HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1 PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false
  export SGLANG_PLUGINS=adrenaline TVM_FFI_CACHE_DIR="$ADRENALINE_SITE/.tvm-ffi"
  [[ -d $ADRENALINE_SITE/.kernels ]] && export SGLANG_ADRENALINE_KERNELS="$ADRENALINE_SITE/.kernels"
  _setup_check
}

_setup
