"""A file that lists a router's servers, read again whenever it changes: how servers join and leave at run time.

# role   URL                      bootstrap port
prefill  http://10.0.0.1:30100    8998
decode   http://10.0.0.2:30200
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
from pathlib import Path

from sglang_adrenaline.errors import ConfigError
from sglang_adrenaline.launcher.ports import port_number
from sglang_adrenaline.router.servers import Fleet, Server, make_server

logger = logging.getLogger(__name__)

LOOK_S = 1.0
SETTLE_S = 0.2
"""A changed file is read once it has been left alone for this long: half-written ones are no lists of servers."""


def read_servers(path: Path) -> tuple[list[Server], list[Server]]:
    """(prefill, decode), each possibly empty. Raises ConfigError naming the line that is wrong."""
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"servers file {path} cannot be read: {error}") from None
    prefill: list[Server] = []
    decode: list[Server] = []
    for number, line in enumerate(lines, 1):
        words = line.partition("#")[0].split()
        try:
            match words:
                case []:
                    continue
                case ["prefill", url, port]:
                    prefill.append(make_server(url, port_number(port)))
                case ["decode", url]:
                    decode.append(make_server(url))
                case _:
                    raise ConfigError("expected `prefill URL BOOTSTRAP_PORT` or `decode URL`")
        except (ConfigError, argparse.ArgumentTypeError) as error:
            raise ConfigError(f"servers file {path}, line {number}: {error}") from None
    return prefill, decode


async def follow(path: Path, fleet: Fleet) -> None:
    """Give the fleet what the file says, again after each change. A file that is wrong changes nothing. Never ends."""
    seen: object = None
    while True:
        now = _version(path)
        if now != seen:
            await asyncio.sleep(SETTLE_S)
            if _version(path) != now:
                continue
            seen = now
            try:
                fleet.replace(*read_servers(path))
            except ConfigError as error:
                logger.error("%s; the servers stay as they were", error)
        await asyncio.sleep(LOOK_S)


def _version(path: Path) -> object:
    """Differs once the file was changed or replaced; None while there is none."""
    try:
        stat = os.stat(path)
    except OSError:
        return None
    return stat.st_mtime_ns, stat.st_size, stat.st_ino
