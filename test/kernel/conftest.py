"""Fixtures of the kernel tests: they need an NVIDIA GPU and skip, with the reason, where there is none."""

from __future__ import annotations

import os
import pathlib

# Before CUDA starts: a kernel that is loaded at its first launch may have to wait for one that is waiting for it.
os.environ.setdefault("CUDA_MODULE_LOADING", "EAGER")

import pytest
import torch

HERE = pathlib.Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.gpu)
            if not torch.cuda.is_available():
                item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU, there is none"))
