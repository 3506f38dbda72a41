"""Compile, on a machine without a GPU, the kernels of SGLang and FlashInfer that a server would compile at first use.

    python scripts/gpu/compile_kernels.py OUT

OUT/tvm-ffi holds SGLang's own small kernels in the layout of its cache (`TVM_FFI_CACHE_DIR`), OUT/aot the FlashInfer
modules in the layout of `flashinfer/data/aot`, both for sm_90a. Without them each first use costs 10 to 60 s of GPU
time. What is there already is not compiled again. One that fails is named and left out: the server compiles it then.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ARCH = (9, 0)


@dataclass(frozen=True)
class Shape:
    """What SGLang's kernels are specialised for: KV heads of one rank and head size."""

    kv_heads: int
    head_dim: int

    @property
    def kv_row_bytes(self) -> int:
        return 2 * self.kv_heads * self.head_dim


SHAPES = (
    Shape(32, 128),  # Llama-2-7B
    Shape(8, 128),  # Llama-3.1-8B
    Shape(16, 128),  # Llama-2-7B, TP 2
    Shape(4, 128),  # Llama-3.1-8B, TP 2
    Shape(8, 64),  # test/gpu, MHA
    Shape(2, 64),  # test/gpu, GQA
    Shape(3, 64),  # SmolLM2-135M
)


def link_paths(folder: Path) -> None:
    """An empty stand-in for the driver's library, which is not there without a GPU, and pip's CUDA headers."""
    (folder / "empty.c").write_text("")
    stub = ["cc", "-shared", "-Wl,-soname,libcuda.so.1", "-o", str(folder / "libcuda.so"), str(folder / "empty.c")]
    subprocess.run(stub, check=True)
    home = os.environ.setdefault("CUDA_HOME", "/usr/local/cuda")
    os.environ["LIBRARY_PATH"] = f"{folder}:{home}/lib64"
    import nvidia

    headers = folder / "include"
    headers.mkdir()
    for root in nvidia.__path__:
        for name in ("curand*.h", "cublas*.h"):
            for header in Path(root).glob(f"cu13/include/{name}"):
                (headers / header.name).symlink_to(header)
    os.environ["CPATH"] = str(headers)


def sglang_kernels() -> Iterator[tuple[str, Callable[[], Any]]]:
    import torch
    from sglang.kernels.ops.activation import activation
    from sglang.kernels.ops.attention import clamp_position, rope
    from sglang.kernels.ops.kvcache import kvcache
    from sglang.kernels.ops.layernorm import norm

    bf16 = torch.bfloat16
    for dtype in (torch.int64, torch.int32):
        yield f"clamp_position {dtype}", lambda dtype=dtype: clamp_position._jit_clamp_position_module(dtype)
    yield "activation", lambda: activation.activation_module(bf16)
    yield "fused_add_rmsnorm", lambda: norm._jit_fused_add_rmsnorm_module(bf16, False)
    for size in sorted({shape.head_dim for shape in SHAPES}):
        yield f"rope {size}", lambda size=size: rope._jit_fused_rope_module(True, size, bf16, bf16)
    for row in sorted({shape.kv_row_bytes for shape in SHAPES}):
        yield f"store_cache {row}", lambda row=row: kvcache._jit_kvcache_module(row, row)


def flashinfer_modules() -> Iterator[Any]:
    """SGLang's ragged prefill takes FlashAttention 3 on Hopper for head sizes 64 and 128; the rest is fa2."""
    import torch
    from flashinfer.jit.attention import gen_batch_decode_module, gen_batch_prefill_module
    from flashinfer.jit.cascade import gen_cascade_module
    from flashinfer.jit.norm import gen_norm_module
    from flashinfer.jit.page import gen_page_module
    from flashinfer.jit.sampling import gen_sampling_module

    kinds = (torch.bfloat16, torch.bfloat16, torch.bfloat16, torch.int32)
    yield from (gen_cascade_module(), gen_page_module(), gen_sampling_module(), gen_norm_module())
    for size in (128, 64):
        yield gen_batch_decode_module(*kinds, size, size, 0, False, False)
        for backend in ("fa2", "fa3"):
            yield gen_batch_prefill_module(backend, *kinds, size, size, 0, False, False, False)


def compile_sglang(cache: Path) -> None:
    os.environ["TVM_FFI_CACHE_DIR"] = str(cache)
    from sglang.kernels.jit.utils.arch import override_jit_cuda_arch

    with override_jit_cuda_arch(*ARCH):
        for name, build in sglang_kernels():
            attempt(f"sglang {name}", build)
    for leftover in [*cache.glob("*/*.o"), *cache.glob("*/lock")]:
        leftover.unlink()


def compile_flashinfer(aot: Path, have: Path | None) -> None:
    """`have`: a folder of modules NAME.so compiled before, taken over as they are."""
    for module in flashinfer_modules():
        target = aot / module.name / f"{module.name}.so"
        ready = have / target.name if have is not None else target
        if target.exists():
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        if ready.exists():
            shutil.copy(ready, target)
        elif attempt(f"flashinfer {module.name}", lambda module=module: module.build(verbose=False)):
            shutil.copy(module.jit_library_path, target)
            subprocess.run(["strip", "--strip-unneeded", str(target)], check=False)


def attempt(name: str, build: Callable[[], Any]) -> bool:
    try:
        build()
    except Exception as error:
        print(f"not compiled: {name}: {str(error)[-600:]}", flush=True)
        return False
    print(f"compiled: {name}", flush=True)
    return True


def main(argv: list[str]) -> int:
    if not 1 <= len(argv) <= 2:
        print(__doc__, file=sys.stderr)
        return 2
    out = Path(argv[0]).resolve()
    have = Path(argv[1]).resolve() if len(argv) == 2 else None
    out.mkdir(parents=True, exist_ok=True)
    os.environ["FLASHINFER_WORKSPACE_BASE"] = str(out / "work")
    os.environ["FLASHINFER_CUDA_ARCH_LIST"] = f"{ARCH[0]}.{ARCH[1]}a"
    os.environ.setdefault("MAX_JOBS", str(os.cpu_count()))
    with tempfile.TemporaryDirectory() as folder:
        link_paths(Path(folder))
        compile_sglang(out / "tvm-ffi")
        compile_flashinfer(out / "aot", have)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
