"""Options of the extension: parsed once, frozen, handed to every process.

The launcher parses `--adrenaline-*` flags into an `AdrenalineConfig` and puts it, as JSON, into the environment
variable `SGLANG_ADRENALINE_CONFIG`, which SGLang's spawned processes inherit. Without that variable the plugin
registers nothing.
"""

from __future__ import annotations

import argparse
import math
import os
import re
from typing import Literal

import msgspec

from sglang_adrenaline.errors import ConfigError

CONFIG_ENV = "SGLANG_ADRENALINE_CONFIG"
HOST_SERVERS_ENV = "SGLANG_ADRENALINE_HOST_SERVERS"
"""How many servers the launcher starts on this host; they share its memory."""

Role = Literal["prefill", "decode"]
ChannelKind = Literal["auto", "shm", "ipc", "zmq"]
ANY_PORT = range(1)
"""Port 0: whichever is free."""

OBJECTIVES = {
    "ttft": "mean time to first token for which prefill keeps enough of its GPU",
    "tpot": "the batch is not enlarged by offloading if steps would take longer",
}
"""By name, what `--adrenaline-slo-{name}-ms` asks of ratio auto."""
_LANES = {"cpu": 128, "cuda": 256}


class AdrenalineConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What one prefill or decode server needs to know. All times in seconds."""

    role: Role
    offload_ratio: float | Literal["auto"] = "auto"
    """Share of prompt tokens left on the prefill side, 0..1, spread over requests. auto: decided by load."""
    slo_ttft_ms: float | None = None
    """auto leaves prefill the time that it needs for this mean time to first token. Milliseconds."""
    slo_tpot_ms: float | None = None
    """auto offloads no request that would make a step longer than this. Milliseconds."""
    profile: str | None = None
    """auto reckons with this profile of the machine; None: with its data sheet."""
    min_offload_tokens: int = 16
    """Prompts shorter than this stay local unless a request asks otherwise."""
    max_pinned_fraction: float = 0.9
    """Prefill refuses to pin more than this share of its KV pool."""
    admission: Literal["forecast", "reserve"] = "forecast"
    """How decode keeps room for answers to come: what all will need at most, or SGLang's constant for each."""
    channel: ChannelKind = "auto"
    channel_ports: str = "0"
    """FIRST-LAST or one port: where prefill listens for channels between hosts; 0: any free port."""
    halves_from: int = 192
    """On GPUs, decode batches of at least so many rows run as two halves in turn; 0: never."""
    decode_attention: Literal["auto", "flashinfer", "own"] = "auto"
    """Whose kernel attends to what decode holds itself, in CUDA graphs; auto: by the model's heads."""
    lanes: int | None = None
    """Offloaded requests that one decode instance can have on one prefill instance at a time; None: `lanes_for`."""
    executor_sms: int | Literal["auto"] = "auto"
    """SMs of the prefill GPU that prefill leaves alone while prefixes are offloaded; 0: none; auto: by its load."""
    key_file: str | None = None
    """File with the shared secret of the deployment; None disables offloading to other processes' servers."""
    control_port_offset: int = 1000
    """Control port of a prefill rank = its bootstrap port + this + its TP rank."""
    control_host: str = "127.0.0.1"
    """Interface that the prefill server's control port and its channels between hosts bind to."""
    wait_timeout: float = 8.0
    """Longest time a decode step waits for the executor before its offloaded rows are failed."""
    heartbeat_interval: float = 0.5
    heartbeat_timeout: float = 5.0
    """A peer that was silent for this long is taken for dead."""

    def __post_init__(self) -> None:
        _require(
            self.offload_ratio == "auto" or 0.0 <= self.offload_ratio <= 1.0,
            "adrenaline-offload-ratio",
            self.offload_ratio,
            "a number in 0..1, or auto",
        )
        for name, slo_ms in self.objectives_ms.items():
            _require(0.0 < slo_ms < math.inf, f"adrenaline-slo-{name}-ms", slo_ms, "a number of milliseconds > 0")
        _require(
            0.0 < self.max_pinned_fraction <= 1.0,
            "adrenaline-max-pinned-fraction",
            self.max_pinned_fraction,
            "a number in (0, 1]",
        )
        _require(
            _port_range(self.channel_ports) is not None,
            "adrenaline-channel-ports",
            self.channel_ports,
            "a port, or FIRST-LAST, in 1..65535",
        )
        _require(self.halves_from >= 0, "adrenaline-halves-from", self.halves_from, "a whole number >= 0")
        _require(self.min_offload_tokens >= 1, "adrenaline-min-offload-tokens", self.min_offload_tokens, ">= 1")
        _require(
            self.lanes is None or 1 <= self.lanes <= 4096, "adrenaline-lanes", self.lanes, "a whole number in 1..4096"
        )
        _require(
            self.executor_sms == "auto" or self.executor_sms >= 0,
            "adrenaline-executor-sms",
            self.executor_sms,
            "a whole number >= 0, or auto",
        )
        _require(self.wait_timeout > 0, "adrenaline-wait-timeout", self.wait_timeout, "a number of seconds > 0")
        _require(
            self.heartbeat_timeout > self.heartbeat_interval > 0,
            "adrenaline-heartbeat-timeout",
            self.heartbeat_timeout,
            "more seconds than the heartbeat interval",
        )

    def lanes_for(self, device_type: str) -> int:
        """The number of lanes that a server on this type of device offers or asks for."""
        return self.lanes if self.lanes is not None else _LANES.get(device_type, _LANES["cpu"])

    @property
    def objectives_ms(self) -> dict[str, float]:
        """Those that were given, by their names in OBJECTIVES."""
        all_ms = {name: getattr(self, f"slo_{name}_ms") for name in OBJECTIVES}
        return {name: slo_ms for name, slo_ms in all_ms.items() if slo_ms is not None}

    def objective_s(self, name: str) -> float | None:
        """One of OBJECTIVES; None if it was not given."""
        slo_ms = self.objectives_ms.get(name)
        return slo_ms / 1e3 if slo_ms is not None else None

    @property
    def channel_port_range(self) -> range:
        ports = _port_range(self.channel_ports)
        assert ports is not None
        return ports

    def to_json(self) -> str:
        return msgspec.json.encode(self).decode()

    @staticmethod
    def from_json(text: str) -> AdrenalineConfig:
        """Raises ConfigError on anything that is not a valid configuration."""
        try:
            return msgspec.json.decode(text.encode(), type=AdrenalineConfig)
        except msgspec.MsgspecError as error:
            raise ConfigError(f"{CONFIG_ENV} is not a valid configuration: {error}") from None

    @staticmethod
    def from_env() -> AdrenalineConfig | None:
        """The configuration of this process tree, or None where offloading was not asked for."""
        text = os.environ.get(CONFIG_ENV)
        return AdrenalineConfig.from_json(text) if text else None


def _port_range(text: str) -> range | None:
    """None unless `text` is a port, two with the first not behind the last, or 0."""
    if text == "0":
        return ANY_PORT
    ends = re.fullmatch(r"(\d{1,5})(?:-(\d{1,5}))?", text, re.ASCII)
    if ends is None:
        return None
    first, last = int(ends[1]), int(ends[2] or ends[1])
    return range(first, last + 1) if 1 <= first <= last <= 65_535 else None


def _require(ok: bool, name: str, value: object, expected: str) -> None:
    if not ok:
        raise ConfigError(f"--{name} must be {expected}, not {value!r}")


def add_cli_args(parser: argparse.ArgumentParser) -> None:
    """Add the `--adrenaline-*` flags. Their destinations are the field names of `AdrenalineConfig`."""
    group = parser.add_argument_group("attention offloading")
    group.add_argument(
        "--adrenaline-offload-ratio",
        dest="offload_ratio",
        type=_ratio,
        default="auto",
        metavar="R",
        help="share of prompt tokens whose KV stays on the prefill server, 0..1, spread over requests; auto (default): "
        "decided by load for each request when decode could take it in, so that attention over remote prompts "
        "takes no longer than over local ones, and beyond that where decode's memory is full and a larger batch pays",
    )
    for name, meaning in OBJECTIVES.items():
        group.add_argument(
            f"--adrenaline-slo-{name}-ms",
            dest=f"slo_{name}_ms",
            type=float,
            default=None,
            metavar="MS",
            help=f"ratio auto: {meaning} (default: no objective)",
        )
    group.add_argument(
        "--adrenaline-profile",
        dest="profile",
        default=None,
        metavar="FILE",
        help="ratio auto: what python -m sglang_adrenaline.profile measured on this machine with this model (default: "
        "data sheets)",
    )
    group.add_argument(
        "--adrenaline-min-offload-tokens",
        dest="min_offload_tokens",
        type=int,
        default=16,
        metavar="N",
        help="prompts shorter than this are never offloaded unless the request asks for it (default 16)",
    )
    group.add_argument(
        "--adrenaline-max-pinned-fraction",
        dest="max_pinned_fraction",
        type=float,
        default=0.9,
        metavar="F",
        help="most of the prefill KV pool that offloaded requests may pin (default 0.9)",
    )
    group.add_argument(
        "--adrenaline-admission",
        dest="admission",
        choices=("forecast", "reserve"),
        default="forecast",
        help="how decode keeps room for answers to come: forecast (default): what all running requests will need at "
        "most before those that end give theirs back, by max_new_tokens and the lengths of recent answers; reserve: "
        "SGLang's --num-reserved-decode-tokens for each running request",
    )
    group.add_argument(
        "--adrenaline-channel",
        dest="channel",
        choices=("auto", "shm", "ipc", "zmq"),
        default="auto",
        help="data plane between decode and the attention executor, prefill's choice (default auto: on GPUs ipc, which "
        "is CUDA IPC; on CPUs shm, shared memory, to servers of this host, and zmq, encrypted TCP, to others)",
    )
    group.add_argument(
        "--adrenaline-channel-ports",
        dest="channel_ports",
        default="0",
        metavar="FIRST-LAST",
        help="ports of the prefill server for channel zmq, one for each decode rank (default: any free ones)",
    )
    group.add_argument(
        "--adrenaline-lanes",
        dest="lanes",
        type=int,
        default=None,
        metavar="N",
        help="most offloaded requests of one decode server on one prefill server (default 256 on GPUs, 128 on CPUs)",
    )
    group.add_argument(
        "--adrenaline-executor-sms",
        dest="executor_sms",
        type=_sms,
        default="auto",
        metavar="N",
        help="SMs of the prefill GPU that prefill leaves to the attention executor while prompts are offloaded, "
        "rounded up to what the GPU can set apart; the executor uses the others, too, while they are idle; 0: prefill "
        "always uses all (default auto: up to 60 %% of them, by prefill's load)",
    )
    group.add_argument(
        "--adrenaline-halves-from",
        dest="halves_from",
        type=int,
        default=192,
        metavar="N",
        help="on GPUs decode batches of at least N rows run as two halves in turn, so that remote attention over one "
        "half takes place beside all of decode's work on the other (default 192; 0: never)",
    )
    group.add_argument(
        "--adrenaline-decode-attention",
        dest="decode_attention",
        choices=("auto", "flashinfer", "own"),
        default="auto",
        help="decode's attention over what it holds itself, on GPUs in CUDA graphs: FlashInfer's kernel, or our own "
        "(default auto: our own where several query heads share a KV head, which it reads faster)",
    )
    group.add_argument(
        "--adrenaline-key-file",
        dest="key_file",
        metavar="FILE",
        help="file with the secret that prefill and decode servers share (the launcher makes one by itself)",
    )
    group.add_argument(
        "--adrenaline-control-host",
        dest="control_host",
        default="127.0.0.1",
        metavar="ADDR",
        help="address the prefill server's control port and zmq channels bind to (default 127.0.0.1: this host only)",
    )
    group.add_argument(
        "--adrenaline-control-port-offset",
        dest="control_port_offset",
        type=int,
        default=1000,
        metavar="N",
        help="control port = bootstrap port + N + TP rank; equal on all servers (default 1000)",
    )
    group.add_argument(
        "--adrenaline-wait-timeout",
        dest="wait_timeout",
        type=float,
        default=8.0,
        metavar="S",
        help="longest wait of a decode step for the executor before its offloaded requests fail (default 8)",
    )


def _ratio(text: str) -> float | Literal["auto"]:
    try:
        return "auto" if text == "auto" else float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a number in 0..1, or auto, not {text!r}") from None


def _sms(text: str) -> int | Literal["auto"]:
    return "auto" if text == "auto" else int(text)


def config_from_args(args: argparse.Namespace, role: Role) -> AdrenalineConfig:
    """Build the configuration of one server from parsed flags. Raises ConfigError."""
    fields = {name: getattr(args, name) for name in AdrenalineConfig.__struct_fields__ if hasattr(args, name)}
    return AdrenalineConfig(**(fields | {"role": role}))
