"""Fixtures of the kernel tests: they need an NVIDIA GPU and skip, with the reason, where there is none."""

from __future__ import annotations

import contextlib
import pathlib
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
from decode_graph import Start

from sglang_adrenaline.channel import ipc

HERE = pathlib.Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.gpu)
            if not torch.cuda.is_available():
                item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU, there is none"))


@pytest.fixture(params=[0, 1], ids=["one-gpu", "two-gpus"])
def peer_gpu(request: pytest.FixtureRequest) -> int:
    """The other process's GPU; this one is on GPU 0."""
    if request.param >= torch.cuda.device_count():
        pytest.skip(f"needs {request.param + 1} GPUs")
    return request.param


@pytest.fixture
def start() -> Iterator[Start]:
    running: list[subprocess.Popen[str]] = []

    def run(*args: object) -> subprocess.Popen[str]:
        command = [sys.executable, str(HERE / "peer.py"), *map(str, args)]
        running.append(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
        return running[-1]

    yield run
    for process in running:
        with contextlib.suppress(subprocess.TimeoutExpired, BrokenPipeError):
            process.communicate(timeout=20.0)
        if process.poll() is None:
            process.kill()
            process.communicate(timeout=5.0)


@pytest.fixture
def opened() -> Iterator[list[ipc.IpcDecodeEnd | ipc.IpcExecutorEnd]]:
    """Ends that the test opened; closed after it."""
    ends: list[ipc.IpcDecodeEnd | ipc.IpcExecutorEnd] = []
    yield ends
    for end in ends:
        end.close(timeout_s=5.0)
