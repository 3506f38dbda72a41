"""Every unsupported model and flag is refused in one line that names it; the supported ones pass.

Uses SGLang's own argument parser and model configuration on folders that hold a config.json and no weights.
"""

from __future__ import annotations

import dataclasses
import json
import os
from importlib.metadata import version as installed_version
from pathlib import Path
from typing import Any

import pytest
from msgspec import structs

from sglang_adrenaline import auto_cost, cpu_info, refusals
from sglang_adrenaline.config import AdrenalineConfig
from sglang_adrenaline.errors import ConfigError
from sglang_adrenaline.figures import model_from_config
from sglang_adrenaline.profile_data import datasheet_profile, encode_profile

SMALL = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 1000,
    "max_position_embeddings": 512,
    "torch_dtype": "float32",
}
LLAMA = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", **SMALL}

MODELS: dict[str, tuple[dict[str, Any], str | None]] = {
    "llama": (LLAMA, None),
    "qwen3": ({**SMALL, "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "head_dim": 16}, None),
    "mistral without window": (
        {**SMALL, "architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": None},
        None,
    ),
    "deepseek": (
        {
            **SMALL,
            "architectures": ["DeepseekV2ForCausalLM"],
            "model_type": "deepseek_v2",
            "kv_lora_rank": 32,
            "q_lora_rank": 32,
            "qk_nope_head_dim": 16,
            "qk_rope_head_dim": 8,
            "v_head_dim": 16,
        },
        "MLA",
    ),
    "gemma2": (
        {
            **SMALL,
            "architectures": ["Gemma2ForCausalLM"],
            "model_type": "gemma2",
            "head_dim": 16,
            "sliding_window": 64,
        },
        "sliding-window",
    ),
    "gpt-oss": (
        {**SMALL, "architectures": ["GptOssForCausalLM"], "model_type": "gpt_oss", "head_dim": 16},
        "attention sinks",
    ),
    "falcon-h1": (
        {**SMALL, "architectures": ["FalconH1ForCausalLM"], "model_type": "falcon_h1", "head_dim": 16},
        "SSM",
    ),
    "qwen3-next": (
        {**SMALL, "architectures": ["Qwen3NextForCausalLM"], "model_type": "qwen3_next", "head_dim": 16},
        "SSM or linear-attention",
    ),
    "whisper": (
        {
            "architectures": ["WhisperForConditionalGeneration"],
            "model_type": "whisper",
            "d_model": 64,
            "vocab_size": 1000,
        },
        "encoder-decoder",
    ),
    "llava": (
        {
            "architectures": ["LlavaForConditionalGeneration"],
            "model_type": "llava",
            "text_config": {**LLAMA},
            "vision_config": {"model_type": "clip_vision_model"},
        },
        "multimodal",
    ),
    "embedding": ({**LLAMA, "architectures": ["LlamaEmbeddingModel"]}, "do not generate"),
}

FLAGS: dict[str, tuple[list[str], str]] = {
    "pp": (["--pp-size", "2"], "--pp-size"),
    "dp": (["--dp-size", "2"], "--dp-size"),
    "dp attention": (["--tp-size", "2", "--dp-size", "2", "--enable-dp-attention"], "--enable-dp-attention"),
    "nodes": (["--nnodes", "2", "--dist-init-addr", "127.0.0.1:2000"], "--nnodes"),
    "hicache": (["--enable-hierarchical-cache"], "--enable-hierarchical-cache"),
    "kv dtype": (["--kv-cache-dtype", "fp8_e5m2"], "--kv-cache-dtype fp8_e5m2"),
    "page size": (["--page-size", "16"], "--page-size"),
    "tokenizers": (["--tokenizer-worker-num", "2"], "--tokenizer-worker-num"),
    "backend": (["--attention-backend", "triton"], "attention backend 'triton'"),
}


@pytest.fixture(scope="module")
def sglang() -> Any:
    """SGLang's parser and model configuration, with the CPU platform in place as in a server."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SGLANG_PLUGINS", "adrenaline")
        patch.delenv("SGLANG_ADRENALINE_CONFIG", raising=False)
        from sglang.srt import server_args
        from sglang.srt.configs import model_config
        from sglang.srt.plugins import load_plugins

        from sglang_adrenaline.transfer.local import register_local_backend

        load_plugins()
        register_local_backend()

        class Access:
            @staticmethod
            def resolve(folder: Path, role: str, *argv: str) -> tuple[Any, Any]:
                common = ["--model-path", str(folder), "--disaggregation-mode", role, "--skip-tokenizer-init"]
                common += ["--disaggregation-transfer-backend", "local"]
                if role == "decode" and "--plain-decode" not in argv:
                    common.append("--disaggregation-decode-enable-radix-cache")
                args = server_args.prepare_server_args([*common, *(a for a in argv if a != "--plain-decode")])
                return args, model_config.ModelConfig.from_server_args(args)

            @staticmethod
            def model(folder: Path) -> Any:
                return model_config.ModelConfig(model_path=str(folder))

        yield Access


@pytest.fixture
def folder(tmp_path: Path) -> Any:
    def write(config: dict[str, Any]) -> Path:
        (tmp_path / "config.json").write_text(json.dumps(config))
        return tmp_path

    return write


def refusal(sglang: Any, folder: Path, role: str, *argv: str) -> str | None:
    """The line this server is refused with, or None; the CPU platform may be the first to object."""
    try:
        refusals.check(*sglang.resolve(folder, role, *argv), AdrenalineConfig(role=role))
    except ConfigError as error:
        assert "\n" not in str(error)
        return str(error)
    return None


@pytest.mark.parametrize("name", MODELS)
def test_check_model(name, sglang, folder):
    config, why = MODELS[name]
    model = sglang.model(folder(config))
    reasons = [text for rule, text in refusals.MODEL_RULES if rule(model)]
    if why is None:
        assert reasons == []
    else:
        assert any(why in reason for reason in reasons), reasons


@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_check_plain_server_passes(role, sglang, folder):
    assert refusal(sglang, folder(LLAMA), role) is None


@pytest.fixture
def own_environment(monkeypatch):
    """What the CPU platform sets for several ranks goes with the test."""
    for name in ("SGLANG_CPU_OMP_THREADS_BIND", "SGLANG_NCCL_SO_PATH"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_check_tensor_parallel_server_passes(role, sglang, folder, own_environment):
    assert refusal(sglang, folder(LLAMA), role, "--tp-size", "2") is None
    assert len(os.environ["SGLANG_CPU_OMP_THREADS_BIND"].split("|")) == 2


@pytest.mark.parametrize("name", FLAGS)
def test_check_flag(name, sglang, folder, own_environment):
    argv, why = FLAGS[name]
    told = refusal(sglang, folder(LLAMA), "prefill", *argv)
    assert told is not None and why in told


def test_check_prefill_without_radix_cache(sglang, folder):
    told = refusal(sglang, folder(LLAMA), "prefill", "--disable-radix-cache")
    assert told is not None and "--disable-radix-cache" in told


def test_check_decode_without_radix_cache(sglang, folder):
    told = refusal(sglang, folder(LLAMA), "decode", "--plain-decode")
    assert told is not None and "--disaggregation-decode-enable-radix-cache" in told


@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_check_channel_of_another_device(role, sglang, folder):
    server = sglang.resolve(folder(LLAMA), role)
    refusals.check(*server, AdrenalineConfig(role=role, channel="zmq"))
    with pytest.raises(ConfigError, match="--adrenaline-channel ipc does not work on device cpu, use auto or shm or"):
        refusals.check(*server, AdrenalineConfig(role=role, channel="ipc"))


def test_check_names_every_reason_at_once(sglang, folder):
    argv = ["--pp-size", "2", "--enable-hierarchical-cache", "--kv-cache-dtype", "fp8_e5m2"]
    told = refusal(sglang, folder(MODELS["gemma2"][0]), "prefill", *argv)
    for why in ("--pp-size", "--enable-hierarchical-cache", "--kv-cache-dtype", "sliding-window"):
        assert why in told


def test_rules_read_fields_that_this_sglang_has(sglang, folder):
    server_args, _ = sglang.resolve(folder(LLAMA), "prefill")
    assert not [text for rule, text in refusals.SERVER_RULES if rule(server_args)]
    fields = {field.name for field in dataclasses.fields(server_args)}
    for name in ("speculative_algorithm", "enable_hisparse", "enable_pdmux", "dllm_algorithm", "enable_dp_attention"):
        assert name in fields


def auto_refusal(sglang: Any, folder: Path, profile: Path | None = None) -> str | None:
    config = AdrenalineConfig(role="decode", offload_ratio="auto", profile=str(profile) if profile else None)
    try:
        refusals.check(*sglang.resolve(folder, "decode"), config)
    except ConfigError as error:
        assert "\n" not in str(error)
        return str(error)
    return None


def test_check_auto_ratio_profile_of_this_model_passes_and_others_are_refused(sglang, folder, tmp_path):
    served = folder(LLAMA)
    profile = tmp_path / "profile.json"
    assert auto_refusal(sglang, served) is None
    assert "cannot read profile" in (auto_refusal(sglang, served, profile) or "")
    profile.write_text("{}")
    assert "is not a profile" in (auto_refusal(sglang, served, profile) or "")
    here = cpu_info.device_name()
    for layers, device, why in (
        (4, here, None),
        (5, here, "another shape"),
        (4, "CPU Z, 3 cores", "of 'CPU Z, 3 cores'"),
    ):
        (tmp_path / "config.json").write_text(json.dumps({**LLAMA, "num_hidden_layers": layers}))
        model = model_from_config(str(tmp_path), bytes_each=4)
        profile.write_bytes(encode_profile(structs.replace(datasheet_profile("CPU", model), device=device)))
        told = auto_refusal(sglang, served, profile)
        assert told is None if why is None else why in (told or "")


@pytest.mark.parametrize(("objective", "possible_ms"), [("slo_tpot_ms", 1000.0), ("slo_ttft_ms", 1000.0)])
def test_check_impossible_objective_is_refused_in_one_line(sglang, folder, tmp_path, objective, possible_ms):
    served = sglang.resolve(folder(LLAMA), "decode")
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    profile = tmp_path / "profile.json"
    sheet = datasheet_profile("CPU", model_from_config(str(tmp_path), bytes_each=4))
    measured = structs.replace(sheet, device=cpu_info.device_name(), source="measured")
    profile.write_bytes(encode_profile(measured))
    for path in (None, str(profile)):
        refusals.check(*served, AdrenalineConfig(role="decode", profile=path, **{objective: possible_ms}))
        impossible = AdrenalineConfig(role="decode", profile=path, **{objective: 1e-3})
        with pytest.raises(ConfigError, match=r"--adrenaline-slo-t(tft|pot)-ms 0.001 cannot be met: [^\n]* ms$"):
            refusals.check(*served, impossible)


def test_ratio_auto_falls_back_to_a_fixed_one_for_models_without_a_cost_model(sglang, folder):
    experts = folder(
        {**LLAMA, "architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "num_local_experts": 4}
    )
    _, model_config = sglang.resolve(experts, "decode")
    auto_cost.check(AdrenalineConfig(role="decode"), model_config)
    assert auto_cost.ratio_for(AdrenalineConfig(role="decode"), model_config) == auto_cost.FALLBACK_RATIO
    with pytest.raises(ConfigError, match="mixtures of experts"):
        auto_cost.check(AdrenalineConfig(role="decode", slo_tpot_ms=50.0), model_config)
    assert auto_cost.ratio_for(AdrenalineConfig(role="decode", offload_ratio=0.3), model_config) == 0.3


def test_cost_model_for_server_unknown_gpu_goes_by_a_slow_one_and_a_foreign_profile_is_refused(tmp_path, caplog):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    model = model_from_config(str(tmp_path), bytes_each=4)
    plain = AdrenalineConfig(role="decode", offload_ratio="auto")
    with caplog.at_level("INFO"):
        assert auto_cost.for_server(plain, model, "Some GPU 3000").profile.device == auto_cost.UNKNOWN_GPU
    for text in ("Some GPU 3000", "data sheet of"):
        assert text in caplog.text
    with pytest.raises(ConfigError, match="cannot be met"):
        auto_cost.for_server(structs.replace(plain, slo_tpot_ms=1e-6), model, "Some GPU 3000")
    profile = tmp_path / "profile.json"
    profile.write_bytes(encode_profile(datasheet_profile("CPU", model)))
    given = AdrenalineConfig(role="decode", offload_ratio="auto", profile=str(profile))
    assert auto_cost.for_server(given, model, "CPU").profile.device == "CPU"
    with pytest.raises(ConfigError, match="is a profile of 'CPU'"):
        auto_cost.for_server(given, model, "NVIDIA H200")


def test_check_sglang_version_other_is_refused(monkeypatch):
    refusals.check_sglang_version()
    monkeypatch.setattr(refusals, "SUPPORTED_SGLANG", ("0.0.1",))
    with pytest.raises(
        ConfigError, match=rf"SGLang {installed_version('sglang')} is not supported; install sglang==0.0.1"
    ):
        refusals.check_sglang_version()
