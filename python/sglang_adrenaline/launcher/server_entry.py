"""One prefill or decode server in this process: our configuration and checks, then SGLang's own server.

Everything up to the checks ends in one line (ConfigError); from `run_server` on SGLang is in charge.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Iterator
from typing import Any, NoReturn

from sglang_adrenaline import refusals
from sglang_adrenaline.config import CONFIG_ENV, AdrenalineConfig, Role
from sglang_adrenaline.cpu_info import has_accelerator
from sglang_adrenaline.errors import AdrenalineError, ConfigError
from sglang_adrenaline.launcher.model import check_model_path
from sglang_adrenaline.launcher.options import split_server_argv
from sglang_adrenaline.launcher.ports import check_free, control_port
from sglang_adrenaline.launcher.processes import die_with_launcher

LOADING_MARK = "sglang_adrenaline: checked, loading the model"
"""Printed between the checks and the start of SGLang's server; the launcher looks for it."""


_BACKEND_FLAGS = {"--attention-backend", "--decode-attention-backend", "--prefill-attention-backend"}


def run(argv: list[str], role: Role) -> None:
    """Serve until stopped. `argv` is the command line without the program. Raises ConfigError before any loading."""
    die_with_launcher()
    refusals.check_sglang_version()
    config, sglang_argv = split_server_argv(argv, role)
    if config.key_file is not None:
        from sglang_adrenaline.keys import load_key_file

        load_key_file(config.key_file)
    os.environ[CONFIG_ENV] = config.to_json()
    os.environ.setdefault("SGLANG_PLUGINS", "adrenaline")  # plugins of other packages stay out
    with one_line_errors():
        server_args, model_config = _resolve(_with_defaults(sglang_argv, role))
    refusals.check(server_args, model_config, config)
    _check_ports(server_args, config)
    print(f"{LOADING_MARK} {server_args.model_path}", file=sys.stderr, flush=True)
    _serve(server_args)


def _with_defaults(argv: list[str], role: Role) -> list[str]:
    """SGLang's arguments with what offloading needs and what the user left open."""
    given = {text.partition("=")[0] for text in argv}
    argv = list(argv)
    if not given & {"--model-path", "--model", "--config"}:
        from sglang_adrenaline.demo_model import ensure_demo_model

        argv += ["--model-path", str(ensure_demo_model())]
    for flag in ("--model-path", "--model"):
        if flag in argv[:-1]:
            check_model_path(argv[argv.index(flag) + 1])
    if "--disaggregation-transfer-backend" not in given:
        argv += ["--disaggregation-transfer-backend", "local"]
    if role == "decode" and "--disaggregation-decode-enable-radix-cache" not in given:
        # An offloaded request is represented as a hit in the decode server's radix cache.
        argv.append("--disaggregation-decode-enable-radix-cache")
    if role == "decode" and not given & _BACKEND_FLAGS and has_accelerator():
        argv += ["--attention-backend", refusals.DECODE_GPU_BACKENDS[0]]
    return argv


def _resolve(argv: list[str]) -> tuple[Any, Any]:
    """SGLang's resolved ServerArgs and the ModelConfig, without touching weights."""
    from sglang.srt.configs.model_config import ModelConfig
    from sglang.srt.plugins import load_plugins
    from sglang.srt.server_args import prepare_server_args

    load_plugins()
    server_args = prepare_server_args(argv)
    return server_args, ModelConfig.from_server_args(server_args)


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """Turn whatever SGLang says about bad arguments or an unreadable model into one ConfigError."""
    try:
        with _parsers_raise():
            yield
    except AdrenalineError:
        raise
    except Exception as error:
        raise ConfigError(_first_line(str(error)) or repr(error)) from error


@contextlib.contextmanager
def _parsers_raise() -> Iterator[None]:
    """For the time of the checks, no argparse parser prints its usage (SGLang's is 1,000 lines) and leaves."""
    parser_class: Any = argparse.ArgumentParser
    original = parser_class.error

    def error(parser: argparse.ArgumentParser, message: str) -> NoReturn:
        raise ConfigError(message)

    parser_class.error = error
    try:
        yield
    finally:
        parser_class.error = original


def _first_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[0] if lines else ""


def _check_ports(server_args: Any, config: AdrenalineConfig) -> None:
    check_free(server_args.host, [("--port", server_args.port)])
    if config.role == "prefill":
        bootstrap = server_args.disaggregation_bootstrap_port
        check_free(server_args.host, [("--disaggregation-bootstrap-port", bootstrap)])
        ranks = range(server_args.tp_size)
        control = [control_port(bootstrap, config.control_port_offset, rank) for rank in ranks]
        what = "control port (bootstrap port + offset + TP rank)"
        check_free(
            config.control_host, [(f"{what} of rank {rank}", port) for rank, port in zip(ranks, control, strict=True)]
        )


def _serve(server_args: Any) -> None:
    from sglang.launch_server import run_server
    from sglang.srt.utils import kill_process_tree

    try:
        run_server(server_args)
    finally:
        kill_process_tree(os.getpid(), include_parent=False)
