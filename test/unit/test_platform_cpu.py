"""The CPU platform: when it serves, what it fills in, what it leaves alone."""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from sglang.srt.server_args import ServerArgs

from sglang_adrenaline import cpu_info, platform_cpu
from sglang_adrenaline.errors import ConfigError
from sglang_adrenaline.platform_cpu import AdrenalineCpuPlatform, choose_dtype, default_pool_tokens

pytestmark = pytest.mark.skipif(cpu_info.has_accelerator(), reason="the platform is inactive where a GPU is")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A folder with the configuration of a small Llama stored in bfloat16; defaults need no weights."""
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "torch_dtype": "bfloat16",
        "vocab_size": 1000,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch):
    for name in ("OMP_NUM_THREADS", "SGLANG_DISAGG_PREFILL_EARLY_SEND_CACHED_PREFIX", "SGLANG_USE_CPU_ENGINE"):
        # set, then delete: the platform writes them, and only what monkeypatch has seen is restored
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


def test_entry_point_leads_to_the_platform_class():
    (entry,) = importlib.metadata.entry_points(group="sglang.srt.platforms", name="adrenaline")
    assert entry.load()() == "sglang_adrenaline.platform_cpu:AdrenalineCpuPlatform"


def test_activate_declines_for_the_in_tree_cpu_engine(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SGLANG_USE_CPU_ENGINE", "1")
    assert platform_cpu.activate() is None


def test_activate_declines_on_an_accelerator_or_unknown_cpu_and_never_raises(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert platform_cpu.activate() is None

    def broken() -> bool:
        raise RuntimeError("driver too old")

    monkeypatch.setattr(torch.cuda, "is_available", broken)
    assert platform_cpu.activate() is None
    monkeypatch.undo()
    monkeypatch.setattr("platform.machine", lambda: "riscv64")
    assert platform_cpu.activate() is None


def test_defaults_are_filled_in_where_the_user_named_none(model: Path):
    args = ServerArgs(model_path=str(model), skip_tokenizer_init=True)
    assert args.device == "cpu"
    assert args.get_attention_backends() == ("torch_native", "torch_native")
    assert args.dtype == ("bfloat16" if cpu_info.has_bf16_arithmetic() else "float32")
    assert args.get_model_config().dtype == getattr(torch, args.dtype)
    assert args.page_size == 1
    assert args.sleep_on_idle
    assert 1024 <= args.max_total_tokens <= 65_536
    assert os.environ["OMP_NUM_THREADS"] == str(cpu_info.usable_cores())
    assert os.environ["SGLANG_DISAGG_PREFILL_EARLY_SEND_CACHED_PREFIX"] == "0"
    assert args.grammar_backend == "xgrammar"


def test_explicit_choices_win(model: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("SGLANG_DISAGG_PREFILL_EARLY_SEND_CACHED_PREFIX", "1")
    args = ServerArgs(
        model_path=str(model),
        skip_tokenizer_init=True,
        dtype="float16",
        max_total_tokens=777,
        max_running_requests=3,
        attention_backend="flex_attention",
    )
    assert (args.dtype, args.max_total_tokens, args.max_running_requests) == ("float16", 777, 3)
    assert args.attention_backend == "flex_attention"
    assert os.environ["OMP_NUM_THREADS"] == "1"
    assert os.environ["SGLANG_DISAGG_PREFILL_EARLY_SEND_CACHED_PREFIX"] == "1"


@pytest.mark.parametrize(("option", "value"), [("enable_torch_compile", True), ("page_size", 16)])
def test_options_that_cannot_work_are_refused_by_name(model: Path, option: str, value: object):
    with pytest.raises(ConfigError, match=f"--{option.replace('_', '-')}"):
        ServerArgs(model_path=str(model), skip_tokenizer_init=True, **{option: value})


def test_tensor_parallel_is_refused_where_upstream_has_no_all_reduce(model: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(cpu_info, "is_arm64", lambda: True)
    with pytest.raises(ConfigError, match="--tp-size"):
        ServerArgs(model_path=str(model), skip_tokenizer_init=True, tp_size=2)


@pytest.mark.parametrize(
    ("requested", "model_dtype", "arithmetic", "expected"),
    [
        ("auto", torch.bfloat16, True, "bfloat16"),
        ("auto", torch.bfloat16, False, "float32"),
        ("auto", torch.float16, True, "float32"),
        ("auto", torch.float32, True, "float32"),
        ("auto", None, True, "float32"),
        ("bfloat16", torch.float32, False, "bfloat16"),
        ("half", torch.bfloat16, True, "half"),
    ],
)
def test_choose_dtype(requested: str, model_dtype: object, arithmetic: bool, expected: str):
    assert choose_dtype(requested, model_dtype, arithmetic) == expected


@pytest.mark.parametrize(
    ("bytes_per_token", "available", "context", "expected"),
    [
        (1000, 5_000_000_000, 2048, 65_536),
        (1000, 5_000_000_000, 131_072, 524_288),
        (100_000, 5_000_000_000, 131_072, 10_000),
        (100_000, 1_000_000, 2048, 1024),
    ],
)
def test_default_pool_fits_the_memory(bytes_per_token: int, available: int, context: int, expected: int):
    assert default_pool_tokens(bytes_per_token, available, context) == expected


@pytest.mark.parametrize(("servers", "expected"), [(1, 8192), (2, 8192), (4, 4096), (8, 2048)])
def test_default_pools_of_many_servers_share_the_memory(servers: int, expected: int):
    assert default_pool_tokens(2**20, 40 * 2**30, 4096, servers) == expected


def test_usable_cores_follow_the_affinity_mask():
    one = subprocess.run(
        [sys.executable, "-c", "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))});"
         "from sglang_adrenaline.cpu_info import usable_cores; print(usable_cores())"],
        capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    assert one.stdout.strip() == "1"


@pytest.mark.parametrize(("text", "cores"), [("max 100000", None), ("150000 100000", 1.5), ("garbage", None)])
def test_cgroup_quota_is_read(tmp_path: Path, text: str, cores: float | None):
    (tmp_path / "cpu.max").write_text(text + "\n")
    assert cpu_info._cgroup_cores(str(tmp_path / "cpu.max")) == cores


def test_cpu_attention_is_registered_unless_someone_else_was_first(monkeypatch: pytest.MonkeyPatch):
    from sglang.srt.layers.attention import attention_registry
    from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS

    monkeypatch.setitem(ATTENTION_BACKENDS, "torch_native", attention_registry.create_torch_native_backend)
    monkeypatch.setenv(platform_cpu.ATTENTION_ENV, "upstream")
    AdrenalineCpuPlatform().init_backend()
    assert ATTENTION_BACKENDS["torch_native"] is attention_registry.create_torch_native_backend
    monkeypatch.setenv(platform_cpu.ATTENTION_ENV, "adrenaline")
    AdrenalineCpuPlatform().init_backend()
    assert ATTENTION_BACKENDS["torch_native"] is platform_cpu._create_attention

    def other(runner: object) -> None:
        return None

    ATTENTION_BACKENDS["torch_native"] = other
    AdrenalineCpuPlatform().init_backend()
    assert ATTENTION_BACKENDS["torch_native"] is other
    monkeypatch.setenv(platform_cpu.ATTENTION_ENV, "fast")
    with pytest.raises(ConfigError, match=platform_cpu.ATTENTION_ENV):
        AdrenalineCpuPlatform().init_backend()


def test_operators_for_arm_threads_are_defined_once_and_do_nothing():
    platform_cpu._define_arm_thread_ops()
    platform_cpu._define_arm_thread_ops()
    assert torch.ops.sgl_kernel.init_cpu_threads_env("0,1") is None
    assert torch.ops.sgl_kernel.initialize(1, 0) is None


def test_prompts_get_neighbouring_slots_though_single_ones_came_and_went():
    cls = AdrenalineCpuPlatform().get_paged_allocator_cls()
    allocator = cls(2048, page_size=1, dtype=torch.float32, device="cpu", kvcache=None, need_sort=True)
    prompts, answers = [], []
    for _ in range(3):  # as decode does: prompts, then a slot a row and step
        prompts.append(allocator.alloc(300))
        answers += [allocator.alloc(3) for _ in range(40)]
    allocator.free(prompts[0])
    for taken in answers[::2]:
        allocator.free(taken)
    again = allocator.alloc(290)
    assert torch.diff(again).eq(1).all()
    held = torch.cat([again, *prompts[1:], *answers[1::2]])
    free = torch.cat([allocator.free_pages, allocator.release_pages])
    assert sorted([*held.tolist(), *free.tolist()]) == list(range(1, 2049))
    assert allocator.alloc(len(free) + 1) is None
    assert allocator.available_size() == len(free)
    assert len(allocator.alloc(len(free))) == len(free)
