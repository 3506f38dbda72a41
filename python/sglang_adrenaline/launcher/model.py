"""Cheap checks of the model path, before a server spends half a minute on imports to find the same."""

from __future__ import annotations

import json
from pathlib import Path

from sglang_adrenaline.errors import ConfigError


def check_model_path(model_path: str) -> None:
    """Raise ConfigError if `model_path` names a folder that holds no model. Names of remote models pass."""
    path = Path(model_path).expanduser()
    if not path.exists():
        if model_path.startswith(("/", ".", "~")) or model_path.count("/") > 1:
            raise ConfigError(f"--model-path {model_path}: no such folder")
        return
    if path.is_file():
        return  # a single-file format; SGLang judges it
    config = path / "config.json"
    try:
        content = json.loads(config.read_text())
    except FileNotFoundError:
        raise ConfigError(f"--model-path {model_path}: no config.json in this folder") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"--model-path {model_path}: config.json cannot be read: {error}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"--model-path {model_path}: config.json holds no object")
