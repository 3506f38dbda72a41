"""Pack FlashAttention 3 as SGLang ships it, with only the kernels for heads of 128 in bf16 on Hopper.

    python scripts/gpu/trim_fa3.py OUT.tar.xz

Its library, over 1 GB, is too large to travel to an offline GPU host. Nearly all of it is kernels for other GPUs, other
types and head sizes: these become zeros, in place, which leaves about 10 MB once compressed. Calling one of them fails
there. Needs an environment with sglang; no GPU.
"""

from __future__ import annotations

import importlib.util
import mmap
import re
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

NAME = "flash_ops.abi3.so"
FATBIN_MAGIC, ELF_KIND, HOPPER = 0xBA55ED50, 2, 90
COMPRESSED = 0xA000
"""Flags of a compressed cubin (LZ4, zstd): none of those that are wanted is."""
WANTED = re.compile(rb"\.text\.[^\0]*(SA_EEELi128ENS_10bfloat16_tEf|FlashAttnFwdCombine|prepare_varlen_num_blocks)")
"""Mangled: a tile of 128 rows, heads of 128, queries and KV in bf16; joining of parts; the plan of a batch."""


def section(elf: mmap.mmap, name: bytes) -> tuple[int, int]:
    """Offset and size in the file. Raises ValueError if it has none of that name."""
    (headers,) = struct.unpack_from("<Q", elf, 0x28)
    count, names = struct.unpack_from("<HH", elf, 0x3C)
    all_of_them = [struct.unpack_from("<IIQQQQ", elf, headers + 64 * i) for i in range(count)]
    for name_at, _, _, _, offset, size in all_of_them:
        at = all_of_them[names][4] + name_at
        if elf[at : at + len(name) + 1] == name + b"\0":
            return offset, size
    raise ValueError(f"no section {name.decode()}")


def cubins(elf: mmap.mmap, begin: int, end: int) -> Iterator[tuple[int, int, bool]]:
    """Of each cubin in the section of fat binaries: offset, size, and whether it is to be kept."""
    at = begin
    while at < end:
        magic, _, header, size = struct.unpack_from("<IHHQ", elf, at)
        if magic != FATBIN_MAGIC:
            at += 8
            continue
        entry, at = at + header, at + header + size
        while entry < at:
            kind, _, header, size = struct.unpack_from("<HHIQ", elf, entry)
            (arch,) = struct.unpack_from("<I", elf, entry + 28)
            (flags,) = struct.unpack_from("<Q", elf, entry + 40)
            plain = kind == ELF_KIND and arch == HOPPER and not flags & COMPRESSED
            yield entry + header, size, plain and WANTED.search(elf, entry + header, entry + header + size) is not None
            entry += header + size


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    out = Path(sys.argv[1])
    spec = importlib.util.find_spec("sgl_kernel")
    if spec is None or not spec.submodule_search_locations:
        sys.exit("sgl_kernel is not installed")
    library = Path(spec.submodule_search_locations[0], NAME)
    with tempfile.TemporaryDirectory(dir=out.parent) as folder, library.open("rb") as file:
        elf = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        trimmed = Path(folder, NAME)
        kept = 0
        with trimmed.open("wb") as to:
            at, (begin, length) = 0, section(elf, b".nv_fatbin")
            for offset, size, keep in cubins(elf, begin, begin + length):
                kept += keep
                if not keep:
                    to.write(elf[at:offset])
                    to.seek(size, 1)  # a hole
                    at = offset + size
            to.write(elf[at:])
        subprocess.run(["tar", "-cJSf", str(out), "-C", folder, NAME], check=True)
    print(f"{out}: {out.stat().st_size / 2**20:.1f} MiB, {kept} cubins kept")


if __name__ == "__main__":
    main()
