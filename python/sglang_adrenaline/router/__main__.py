"""`python -m sglang_adrenaline.router`: run the router by itself, in front of prefill and decode servers anywhere."""

from __future__ import annotations

import argparse
import logging
import resource
import sys
from pathlib import Path

from aiohttp import web

from sglang_adrenaline.cli import OneLineParser
from sglang_adrenaline.errors import AdrenalineError, ConfigError
from sglang_adrenaline.launcher.ports import check_free, port_number
from sglang_adrenaline.launcher.processes import ERROR_PREFIX, die_with_launcher
from sglang_adrenaline.router.app import Settings, create_app
from sglang_adrenaline.router.servers import make_server
from sglang_adrenaline.router.servers_file import read_servers

_MOST_FILES = 1 << 16
"""A request takes three connections; a usual soft limit of 1,024 files would end at 340 of them."""


def parse(argv: list[str]) -> tuple[str, int, Settings]:
    parser = OneLineParser(prog="python -m sglang_adrenaline.router", description=__doc__, allow_abbrev=False)
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default 127.0.0.1)")
    parser.add_argument("--port", type=port_number, default=30000, help="port to listen on (default 30000)")
    parser.add_argument(
        "--prefill",
        nargs=2,
        action="append",
        default=[],
        metavar=("URL", "BOOTSTRAP_PORT"),
        help="a prefill server; may be given more than once",
    )
    parser.add_argument(
        "--decode", action="append", default=[], metavar="URL", help="a decode server; may be given more than once"
    )
    parser.add_argument(
        "--servers-file",
        type=Path,
        metavar="FILE",
        help="instead of both: a file with a line `prefill URL BOOTSTRAP_PORT` or `decode URL` for each server, read "
        "again whenever it changes, so that servers can join and leave",
    )
    parser.add_argument(
        "--request-timeout", type=float, default=1800.0, metavar="S", help="longest life of a request (default 1800)"
    )
    args = parser.parse_args(argv)
    if args.servers_file is not None:
        if args.prefill or args.decode:
            raise ConfigError("give --servers-file or --prefill and --decode, not both")
        prefill, decode = read_servers(args.servers_file)  # now, so that a mistake is seen at once
    elif not (args.prefill and args.decode):
        raise ConfigError("give --prefill and --decode at least once each, or --servers-file")
    else:
        try:
            prefill = [make_server(url, port_number(port)) for url, port in args.prefill]
        except argparse.ArgumentTypeError as error:
            raise ConfigError(f"--prefill: {error}") from None
        decode = [make_server(url) for url in args.decode]
    check_free(args.host, [("--port", args.port)])
    return args.host, args.port, Settings(prefill, decode, args.request_timeout, args.servers_file)


def raise_file_limit() -> None:
    """As far as the hard limit allows."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = _MOST_FILES if hard == resource.RLIM_INFINITY else min(_MOST_FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def main(argv: list[str]) -> int:
    die_with_launcher()
    try:
        host, port, settings = parse(argv)
    except AdrenalineError as error:
        print(f"{ERROR_PREFIX}{error}", file=sys.stderr)
        return 1
    raise_file_limit()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
    # handler_cancellation: a client that leaves cancels its handler, which closes the connections to both servers.
    web.run_app(
        create_app(settings), host=host, port=port, handler_cancellation=True, shutdown_timeout=1.0, access_log=None
    )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
