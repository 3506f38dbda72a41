"""The command line of the launcher: our flags are parsed here, all others pass through to SGLang as they are."""

from __future__ import annotations

import argparse
import os
import shlex
from collections.abc import Sequence
from dataclasses import dataclass

from sglang_adrenaline import config
from sglang_adrenaline.cli import OneLineParser
from sglang_adrenaline.errors import ConfigError
from sglang_adrenaline.launcher import gpus
from sglang_adrenaline.launcher.ports import check_free, choose_bootstrap_port, control_port, port_number

PROG = "python -m sglang_adrenaline.launch_server"
DEFAULT_BOOTSTRAP_PORT = 8998

_DESCRIPTION = """\
SGLang with attention offloading: the prompt's KV stays on the prefill server, whose attention executor answers the
decode server layer by layer.

Without --disaggregation-mode, one command starts prefill servers, decode servers (one each, or --num-prefill and
--num-decode) and a router on this host, waits until a local request and offloaded ones gave tokens, starts a server
again that ends, and stops all of them together. With --disaggregation-mode
prefill or decode it starts only that server, in this process (for hosts of their own; --port and --host are then that
server's).

Any argument of SGLang's server (python -m sglang.launch_server --help) may be given as well and reaches both servers.
Without --model-path a small demo model is served.
"""

_EPILOG = """\
examples:
  python -m sglang_adrenaline.launch_server
  python -m sglang_adrenaline.launch_server --model-path /models/llama --adrenaline-offload-ratio 0.5 --log-level debug
  python -m sglang_adrenaline.launch_server --decode-args "--max-running-requests 64"
  python -m sglang_adrenaline.launch_server --num-prefill 2 --num-decode 2
  python -m sglang_adrenaline.launch_server --disaggregation-mode prefill --model-path /models/llama \\
      --port 30100 --adrenaline-key-file /etc/adrenaline.key
"""


def _make_parser() -> OneLineParser:
    parser = OneLineParser(
        prog=PROG,
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    config.add_cli_args(parser)
    return parser


def launcher_parser() -> argparse.ArgumentParser:
    parser = _make_parser()
    model = parser.add_argument_group("model")
    model.add_argument(
        "--model-path", "--model", metavar="PATH", help="model folder or Hugging Face name (default: demo)"
    )
    group = parser.add_argument_group("deployment on one host")
    group.add_argument("--host", default="127.0.0.1", help="address router and servers listen on (default 127.0.0.1)")
    group.add_argument("--port", type=port_number, default=30000, help="router, for clients (default 30000)")
    group.add_argument(
        "--prefill-port",
        type=port_number,
        default=30100,
        help="first prefill server, the others follow (default 30100)",
    )
    group.add_argument(
        "--decode-port", type=port_number, default=30200, help="first decode server, the others follow (default 30200)"
    )
    group.add_argument(
        "--bootstrap-port",
        "--disaggregation-bootstrap-port",
        type=port_number,
        help="where the first prefill server meets decode servers, the others follow (default: free ones from 8998 on)",
    )
    group.add_argument("--num-prefill", type=int, default=1, metavar="N", help="prefill servers (default 1)")
    group.add_argument("--num-decode", type=int, default=1, metavar="M", help="decode servers (default 1)")
    group.add_argument("--prefill-args", type=shlex.split, default=[], metavar='"..."', help="more for prefill servers")
    group.add_argument("--decode-args", type=shlex.split, default=[], metavar='"..."', help="more for decode servers")
    group.add_argument("--log-dir", metavar="DIR", help="folder for the servers' logs (default: a fresh temporary one)")
    group.add_argument(
        "--startup-timeout", type=float, default=1800.0, metavar="S", help="give up if not ready by then (default 1800)"
    )
    group.add_argument(
        "--max-restarts",
        type=int,
        default=3,
        metavar="N",
        help="how often in a row, without ten minutes of service in between, a server that ended is started again; "
        "everything stops once a role has no server left (default 3; 0: never)",
    )
    group.add_argument(
        "--disaggregation-mode", choices=("prefill", "decode"), help="start only this server, in this process"
    )
    return parser


@dataclass(frozen=True)
class ServerPlan:
    """One prefill or decode server that the launcher starts."""

    role: config.Role
    index: int
    port: int
    bootstrap_port: int
    argv: tuple[str, ...]
    """Arguments after `python -m sglang_adrenaline.launch_server`, key file and model path excepted."""

    @property
    def name(self) -> str:
        return f"{self.role}-{self.index}"

    @property
    def ranks(self) -> int:
        return _tensor_parallel(list(self.argv))

    @property
    def gpus(self) -> range:
        """By number, where there are any."""
        text = _value_of(list(self.argv), "--base-gpu-id") or "0"
        first = int(text) if text.isdigit() else 0
        return range(first, first + self.ranks)


@dataclass(frozen=True)
class Plan:
    """All that one launch does, settled before anything is started."""

    host: str
    port: int
    model_path: str | None
    """None: the demo model, unless SGLang's own --config may name one (`names_model_elsewhere`)."""
    names_model_elsewhere: bool
    key_file: str | None
    log_dir: str | None
    startup_timeout: float
    max_restarts: int
    """Of one server in a row."""
    api_key: str | None
    servers: tuple[ServerPlan, ...]
    gpus_are_shared: bool = False
    """A prefill and a decode server have a GPU between them."""

    def of_role(self, role: config.Role) -> tuple[ServerPlan, ...]:
        return tuple(s for s in self.servers if s.role == role)


def role_of(argv: list[str]) -> config.Role | None:
    """Value of --disaggregation-mode. Raises ConfigError if it is neither prefill nor decode."""
    parser = OneLineParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--disaggregation-mode", choices=("prefill", "decode"))
    return parser.parse_known_args(argv)[0].disaggregation_mode


def split_server_argv(argv: list[str], role: config.Role) -> tuple[config.AdrenalineConfig, list[str]]:
    """Separate our flags from SGLang's for a single server. Raises ConfigError."""
    parser = OneLineParser(add_help=False, allow_abbrev=False)
    config.add_cli_args(parser)
    args, rest = parser.parse_known_args(argv)
    return config.config_from_args(args, role), rest


def parse(argv: list[str]) -> Plan:
    """The plan of a whole deployment. Checks values and ports; starts nothing. Raises ConfigError."""
    args, passed = launcher_parser().parse_known_args(_join_quoted(argv))
    if args.num_prefill < 1 or args.num_decode < 1:
        raise ConfigError("--num-prefill and --num-decode must be at least 1")
    if args.max_restarts < 0:
        raise ConfigError(f"--max-restarts must be at least 0, not {args.max_restarts}")
    if args.startup_timeout <= 0:
        raise ConfigError(f"--startup-timeout must be a number of seconds > 0, not {args.startup_timeout}")
    config.config_from_args(args, "prefill")  # values out of range are found here, not by a child a minute later
    servers = _servers(args, passed)
    return Plan(
        host=args.host,
        port=args.port,
        model_path=args.model_path,
        names_model_elsewhere=_value_of(passed, "--config") is not None,
        key_file=args.key_file,
        log_dir=args.log_dir,
        startup_timeout=args.startup_timeout,
        max_restarts=args.max_restarts,
        api_key=_value_of(passed, "--api-key"),
        servers=servers,
        gpus_are_shared=gpus.visible_gpus() > 0 and _overlap(servers),
    )


def threads_per_rank(num_ranks: int) -> int:
    """Cores of this machine shared out evenly over the ranks of all servers, at least one each."""
    return max(1, len(os.sched_getaffinity(0)) // num_ranks)


def _tensor_parallel(argv: list[str]) -> int:
    """Ranks of a server with these arguments; 1 where SGLang will find fault with the number."""
    text = _value_of(argv, "--tp-size") or _value_of(argv, "--tp") or _value_of(argv, "--tensor-parallel-size") or "1"
    return max(1, int(text)) if text.isdigit() else 1


def _servers(args: argparse.Namespace, passed: list[str]) -> tuple[ServerPlan, ...]:
    """Prefill servers first. Raises ConfigError on ports that cannot be had."""
    ranks = _tensor_parallel(passed)
    bootstrap_ports = _bootstrap_ports(args, ranks)
    roles: list[tuple[config.Role, int, int, list[str]]] = [
        *(("prefill", index, args.prefill_port, args.prefill_args) for index in range(args.num_prefill)),
        *(("decode", index, args.decode_port, args.decode_args) for index in range(args.num_decode)),
    ]
    placements = gpus.placements(gpus.visible_gpus(), [ranks] * len(roles))
    common = [*_adrenaline_argv(args), *passed]
    servers = []
    for (role, index, first_port, extra), placement in zip(roles, placements, strict=True):
        bootstrap_port = bootstrap_ports[index if role == "prefill" else 0]  # a decode server learns it from requests
        argv = _server_argv(args.host, role, first_port + index, bootstrap_port)
        argv += [*gpus.without_given(placement, [*passed, *extra]), *common, *extra]
        servers.append(ServerPlan(role, index, first_port + index, bootstrap_port, tuple(argv)))
    return tuple(servers)


def _overlap(servers: Sequence[ServerPlan]) -> bool:
    """Whether a prefill and a decode server use the same GPU."""
    used = {role: {gpu for s in servers if s.role == role for gpu in s.gpus} for role in ("prefill", "decode")}
    return not used["prefill"].isdisjoint(used["decode"])


def _bootstrap_ports(args: argparse.Namespace, ranks: int) -> list[int]:
    """One for each prefill server, after all ports were found to be distinct and free."""
    named = [("--port", args.port)]
    for role, first, count in (
        ("prefill", args.prefill_port, args.num_prefill),
        ("decode", args.decode_port, args.num_decode),
    ):
        named += [(_ordinal(f"--{role}-port", index), first + index) for index in range(count)]
    chosen: list[int] = []
    if args.bootstrap_port is not None:
        # Control ports are numbered by rank from bootstrap port + offset on, hence the gaps.
        chosen = [args.bootstrap_port + index * ranks for index in range(args.num_prefill)]
        for index, port in enumerate(chosen):
            named.append((_ordinal("--bootstrap-port", index), port))
            for rank in range(ranks):
                control = control_port(port, args.control_port_offset, rank)
                named.append((_ordinal("control port (--bootstrap-port + offset)", index * ranks + rank), control))
    check_free(args.host, named)
    taken = {port for _, port in named}
    while len(chosen) < args.num_prefill:
        port = choose_bootstrap_port(args.host, DEFAULT_BOOTSTRAP_PORT, args.control_port_offset, taken, ranks)
        taken |= {port, *(control_port(port, args.control_port_offset, rank) for rank in range(ranks))}
        chosen.append(port)
    return chosen


def _ordinal(what: str, index: int) -> str:
    return f"{what} + {index}" if index else what


def _server_argv(host: str, role: str, port: int, bootstrap_port: int) -> list[str]:
    return [
        *("--disaggregation-mode", role, "--host", host, "--port", str(port)),
        *("--disaggregation-bootstrap-port", str(bootstrap_port)),
    ]


def _adrenaline_argv(args: argparse.Namespace) -> list[str]:
    """Our own flags again, as the children shall get them. The key file is added at start."""
    parser = argparse.ArgumentParser(add_help=False)
    config.add_cli_args(parser)
    given = [(action, getattr(args, action.dest)) for action in parser._actions if action.dest != "key_file"]
    return [text for action, value in given if value is not None for text in (action.option_strings[0], str(value))]


def _join_quoted(argv: list[str]) -> list[str]:
    """Glue --prefill-args and its value with `=`, because argparse takes a value that starts with a dash for a flag."""
    joined: list[str] = []
    for text in argv:
        if joined and joined[-1] in ("--prefill-args", "--decode-args"):
            joined[-1] += f"={text}"
        else:
            joined.append(text)
    return joined


def _value_of(argv: list[str], flag: str) -> str | None:
    parser = OneLineParser(add_help=False, allow_abbrev=False)
    parser.add_argument(flag, dest="value")
    return parser.parse_known_args(argv)[0].value
