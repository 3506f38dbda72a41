"""CUDA kernels of channel `ipc` and its executor: finds or compiles `flashinfer_ext/`, calls it by checked wrappers.

The library is taken from the folder named by SGLANG_ADRENALINE_KERNELS if that is set, else compiled at first use
for the GPU at hand (nvcc and ninja needed, about half a minute, then cached). On a machine without a GPU

    python -m sglang_adrenaline.kernels --arch 90a --out DIR

makes the library for such a folder. All wrappers work on the current stream of the endpoint's device, allocate
nothing, wait for nothing and can be captured in CUDA graphs. What they need to know of the channel they read from the
endpoint when they run (`channel/ipc_words.py`), so a graph may be older than the channel it serves.
"""

from __future__ import annotations

import argparse
import functools
import os
import pathlib
import re
import shutil
from typing import TYPE_CHECKING, Any

from sglang_adrenaline.channel import ipc_words
from sglang_adrenaline.errors import ChannelError

if TYPE_CHECKING:
    from torch import Tensor

KERNELS_ENV = "SGLANG_ADRENALINE_KERNELS"
LIBRARY = "sglang_adrenaline_kernels.so"
HEAD_DIMS = (64, 128, 256)
ATTEND_COLUMNS = 16
"""Most query heads that a piece of `attend` has, all its lanes together: kAttendColumns."""

_ARCH_ENV = "TVM_FFI_CUDA_ARCH_LIST"
_SOURCES = ("put.cu", "wait.cu", "merge.cu", "attend.cu")


def put_queries(endpoints: Tensor, q: Tensor, rows: Tensor, places: Tensor, layer: int) -> None:
    """Store rows of q at their places in the executors' buffers, then raise the flags. Layer 0 begins a step.

    endpoints  [links * ENDPOINT_WORDS]          int64, CUDA; the places' links, or one endpoint with lanes as places
    q          [batch, num_qo_heads, head_dim]   fp16/bf16; heads of a row dense, rows at any stride, 16-byte aligned
    rows       [n]                               int32, row of q; negative or beyond the batch = skip
    places     [n]                               int32, distinct; negative or beyond links or lanes = skip

    A link takes part in the step if layer 0 had a row for it, and is left alone otherwise, as it is while its endpoint
    is unbound or failed. Raises ValueError on shape, dtype, device or alignment; a row of another size than the
    channel's fails its endpoint. Source: csrc/put.cu.
    """
    module().put_queries(endpoints, q, rows, places, layer)


def put_answers(endpoint: Tensor, o: Tensor, lse: Tensor, layer: int, lanes: Tensor | None = None) -> None:
    """Store o and lse at their lanes of decode's buffers, then raise its flag.

    o      [n, num_qo_heads, head_dim]  fp16/bf16; row i answers lane i, or lanes[i]
    lse    [n, num_qo_heads]            float32, base 2; -inf = empty
    lanes  [n]                          int32 or None; negative or beyond the channel's lanes = skip

    Does nothing unless a step is open. Otherwise as `put_queries`. Source: csrc/put.cu.
    """
    module().put_answers(endpoint, o, lse, lanes, layer)


def wait_step(endpoint: Tensor) -> None:
    """Hold the stream until decode begins its next step, and open it; no step within the limit leaves it closed.

    While no step is open the endpoint's other kernels do nothing. Source: csrc/wait.cu.
    """
    module().wait_step(endpoint)


def wait_layer(endpoint: Tensor, layer: int) -> None:
    """Hold the stream until the peer's call (open step, layer) is there; fails the endpoint at the wait limit.

    Source: csrc/wait.cu.
    """
    module().wait_layer(endpoint, layer)


def wait_and_merge_(endpoints: Tensor, o: Tensor, lse: Tensor, rows: Tensor, places: Tensor, layer: int) -> None:
    """Wait for the executors' answers and merge them into `rows` of (o, lse), in place.

    o       [batch, num_qo_heads, head_dim]  fp16/bf16, head_dim 64, 128 or 256; strides as for `put_queries`
    lse     [batch, num_qo_heads]            float32, base 2, contiguous
    rows    [n]                              int32, distinct; negative or beyond the batch = skip
    places  [n]                              int32; as for `put_queries`

    A row waits for its own link, the kernel for all that take part in the step. Rows stay as they are where the answer
    is empty (lse -inf) and where the wait fails. Otherwise as `put_queries`. Source: csrc/merge.cu; reference:
    attention.merge.merge_rows_.
    """
    module().wait_and_merge(endpoints, o, lse, rows, places, layer)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    slots: Tensor,
    plan: Tensor,
    partial_o: Tensor,
    partial_lse: Tensor,
    tickets: Tensor,
    sm_scale: float,
    sms: int,
) -> None:
    """Attention of one query a lane over slots of the KV pool, as planned; what lanes share is read once.

    q, o         [lanes, num_qo_heads, head_dim]   fp16/bf16, contiguous, head_dim 64, 128 or 256
    k, v         [num_slots, kv_heads, head_dim]   q's dtype; heads of a slot dense, slots at any stride
    lse          [lanes, num_qo_heads]             float32, base 2
    slots, plan  [n]                               int32: those of `lane_plan.make_plan`'s runs, and its words
    partial_o    [rows, num_qo_heads, head_dim]    float32; partial_lse [rows, num_qo_heads] likewise
    tickets      [2]                               int32, zero, and zero again when the kernel ends
    sms          SMs to work on: as many blocks as fit there; they fit others, too

    Lanes of no piece keep o and lse. At most ATTEND_COLUMNS query heads for each KV head. What the plan says is not
    checked. Raises ValueError on shape, dtype, device or alignment. Source: csrc/attend.cu; reference:
    attention.ragged.attend.
    """
    module().attend(q, k, v, o, lse, slots, plan, partial_o, partial_lse, tickets, sm_scale, sms)


def attend_warps(head_dim: int, device: int) -> int:
    """Warps of `attend` that an SM of this GPU holds at a time."""
    return int(module().attend_warps(head_dim, device))


def warm_up(endpoints: Tensor) -> None:
    """Run every kernel once on unbound endpoints, where they do nothing.

    CUDA loads a kernel at its first launch, for which it may wait until the device is idle: while another kernel waits
    for a peer, that is late, and in one process that plays both ends it is a deadlock.
    """
    import torch

    device, one = endpoints.device, endpoints[: ipc_words.ENDPOINT_WORDS]
    index = torch.zeros(1, dtype=torch.int32, device=device)
    lse = torch.zeros(1, 1, device=device)
    for head_dim in HEAD_DIMS:
        for dtype in (torch.float16, torch.bfloat16):
            rows = torch.zeros(1, 1, head_dim, dtype=dtype, device=device)
            put_queries(endpoints, rows, index, index, 0)
            wait_and_merge_(endpoints, rows, lse, index, index, 0)
    put_answers(one, rows, lse, 0)
    wait_step(one)
    wait_layer(one, 1)


@functools.cache
def module() -> Any:
    """The loaded library. Raises ChannelError if there is none and it cannot be compiled, or it is another version."""
    try:
        import torch  # noqa: F401  the CUDA runtime that the library links to comes with it
        import tvm_ffi
    except ImportError as error:
        raise ChannelError(f"channel ipc needs torch and apache-tvm-ffi: {error}") from None
    folder = os.environ.get(KERNELS_ENV)
    if folder:
        path = pathlib.Path(folder) / LIBRARY
        if not path.is_file():
            raise ChannelError(f"{KERNELS_ENV}={folder}: no {LIBRARY} there")
    else:
        path = compile_library()
    loaded = tvm_ffi.load_module(str(path))
    found = loaded.layout()
    if found != f"{ipc_words.layout()}attend_columns:{ATTEND_COLUMNS} ":
        raise ChannelError(f"{path} is of another version of sglang_adrenaline; compile it again")
    return loaded


def compile_library(arch: str | None = None) -> pathlib.Path:
    """Compile for `arch` ("90a": sm_90a), or for the GPU at hand; nothing is done if the result is still good.

    Raises ChannelError with the end of the compiler's output.
    """
    import tvm_ffi.cpp

    sources = source_folder()
    previous = os.environ.get(_ARCH_ENV)
    try:
        if arch is not None:
            os.environ[_ARCH_ENV] = _dotted(arch)
        built = tvm_ffi.cpp.build(
            f"sglang_adrenaline_kernels{f'_sm_{arch}' if arch else ''}",
            cuda_files=[str(sources / "csrc" / name) for name in _SOURCES],
            extra_ldflags=[f"-L{folder}" for folder in _cuda_libraries()],
            extra_include_paths=[str(sources / "include"), str(sources / "csrc")],
            backend="cuda",
        )
    except (RuntimeError, OSError) as error:
        raise ChannelError(f"the CUDA kernels did not compile: {str(error)[-2000:]}") from None
    finally:
        os.environ.pop(_ARCH_ENV, None)
        if previous is not None:
            os.environ[_ARCH_ENV] = previous
    return pathlib.Path(built)


def _cuda_libraries() -> list[pathlib.Path]:
    """Where the linker may find libcudart, nvcc on the PATH being a link into the toolkit on some systems."""
    nvcc = shutil.which("nvcc")
    homes = [pathlib.Path("/usr/local/cuda")]
    if nvcc is not None:
        homes.insert(0, pathlib.Path(nvcc).resolve().parents[1])
    return [home / "lib64" for home in homes if (home / "lib64").is_dir()]


def _dotted(arch: str) -> str:
    """ "90a" as "9.0a". Raises ChannelError on anything else than digits and at most one letter."""
    match = re.fullmatch(r"(\d+)(\d[a-z]?)", arch)
    if match is None:
        raise ChannelError(f"--arch must be like 90a, not {arch!r}")
    return f"{match[1]}.{match[2]}"


def source_folder() -> pathlib.Path:
    """`flashinfer_ext/`, which lies in the package (in a checkout by a link). Raises ChannelError."""
    folder = pathlib.Path(__file__).resolve().parent / "flashinfer_ext"
    if not (folder / "csrc").is_dir():
        raise ChannelError("flashinfer_ext/ is missing from this installation")
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description="Compile the CUDA kernels ahead of time; needs nvcc, no GPU.")
    parser.add_argument("--arch", default="90a", help="compute capability without the point (default 90a)")
    parser.add_argument("--out", required=True, type=pathlib.Path, help=f"folder for {LIBRARY}")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    shutil.copy(compile_library(args.arch), args.out / LIBRARY)
    print(f"{args.out / LIBRARY}\nuse it with {KERNELS_ENV}={args.out}")


if __name__ == "__main__":
    main()
