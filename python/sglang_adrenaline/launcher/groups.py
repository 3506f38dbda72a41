"""Process groups of children: who is in them, what shared memory they hold, and their end.

Reads /proc only. Used by the launcher and by its guard.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path

_SHM_PREFIX = "/dev/shm/"


def kill(group: int) -> None:
    """SIGKILL to all of `group`; no error if it is empty."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, signal.SIGKILL)


def is_empty(group: int) -> bool:
    """Whether no process of `group` is left, zombies (which hold no resources) aside."""
    return not any(True for _ in members({group}))


def members(groups: Collection[int]) -> Iterator[int]:
    """Process ids of all living members."""
    for entry in os.scandir("/proc"):
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                stat = Path(entry.path, "stat").read_text()
                # The second field is the command in brackets, which may hold anything.
                state, _, group = stat[stat.rindex(")") + 2 :].split()[:3]
                if state != "Z" and int(group) in groups:
                    yield int(entry.name)


def shared_memory(groups: Collection[int]) -> set[str]:
    """Files of /dev/shm that members of `groups` have mapped, or that carry the process id of one in their name.

    By name: joblib, for one, tries out a semaphore, unmaps it, and leaves its removal to an orderly exit.
    """
    pids = {str(pid) for pid in members(groups)}
    named = {entry.path for entry in os.scandir(_SHM_PREFIX) if pids & set(re.split("[-_.]", entry.name))}
    return named | {path for pid in pids for path in _mapped(pid)}


def remove_shared_memory(paths: Iterable[str]) -> None:
    """Unlink what nobody has mapped any more. SGLang, for one, never unlinks its load statistics."""
    left = {path for path in paths if os.path.exists(path)}
    if left:
        left -= {path for entry in os.scandir("/proc") if entry.name.isdigit() for path in _mapped(entry.name)}
    for path in left:
        with contextlib.suppress(OSError):
            os.unlink(path)


def _mapped(pid: str) -> Iterator[str]:
    with contextlib.suppress(OSError), open(f"/proc/{pid}/maps") as maps:
        for line in maps:
            _, found, name = line.rstrip("\n").partition(_SHM_PREFIX)
            if found and not name.endswith(" (deleted)"):
                yield _SHM_PREFIX + name
