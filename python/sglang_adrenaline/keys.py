"""The secret that the servers of one deployment share, and the CURVE keys derived from it.

Whoever has the file is a peer: both key pairs follow from the secret, so each side knows the other's public key in
advance and pins it. Nothing secret is ever sent.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import secrets
import stat
from dataclasses import dataclass, field

import zmq
from zmq.utils import z85

from sglang_adrenaline.errors import ConfigError

MIN_SECRET_BYTES = 32

_MAX_FILE_BYTES = 4096
_FORBIDDEN_MODE = stat.S_IWGRP | stat.S_IXGRP | stat.S_IRWXO
_HINT = "make one with: python -c \"from sglang_adrenaline.keys import create_key_file; create_key_file('FILE')\""


@dataclass(frozen=True)
class CurvePair:
    """One role's CURVE keys, as Z85 text of 40 characters."""

    public: bytes
    secret: bytes = field(repr=False)


@dataclass(frozen=True)
class ControlKeys:
    """Keys of the control plane: prefill is the server, decode the client."""

    server: CurvePair
    client: CurvePair


def create_key_file(path: str | os.PathLike[str]) -> None:
    """Write a new random secret to `path`, mode 0600. Raises ConfigError if the file exists or cannot be written."""
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except FileExistsError:
        raise ConfigError(f"key file {path} exists already and is not overwritten") from None
    except OSError as error:
        raise ConfigError(f"cannot create key file {path}: {error.strerror}") from None
    try:
        with os.fdopen(fd, "w") as file:
            file.write(secrets.token_hex(MIN_SECRET_BYTES) + "\n")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        with contextlib.suppress(OSError):
            os.unlink(path)
        raise ConfigError(f"cannot write key file {path}: {error.strerror}") from None


def load_key_file(path: str | os.PathLike[str]) -> ControlKeys:
    """Read a secret (at least MIN_SECRET_BYTES, as hex) and derive the keys. Raises ConfigError with one line."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        with os.fdopen(fd, "rb") as file:
            status = os.fstat(fd)
            if not stat.S_ISREG(status.st_mode):
                raise ConfigError(f"key file {path} is not a regular file")
            content = file.read(_MAX_FILE_BYTES + 1)
    except FileNotFoundError:
        raise ConfigError(f"key file {path} does not exist; {_HINT}") from None
    except OSError as error:
        raise ConfigError(f"cannot read key file {path}: {error.strerror}") from None
    if status.st_mode & _FORBIDDEN_MODE:
        mode = stat.S_IMODE(status.st_mode)
        raise ConfigError(f"key file {path} is open to other users (mode {mode:04o}); fix it with: chmod 600 {path}")
    text = content.strip()
    if len(content) > _MAX_FILE_BYTES or not re.fullmatch(rb"(?:[0-9a-fA-F]{2})*", text):
        raise ConfigError(f"key file {path} must contain hexadecimal digits only; {_HINT}")
    secret = bytes.fromhex(text.decode("ascii"))
    if len(secret) < MIN_SECRET_BYTES:
        raise ConfigError(f"key file {path} holds {len(secret)} bytes, at least {MIN_SECRET_BYTES} are needed; {_HINT}")
    return derive_keys(secret)


def derive_keys(secret: bytes) -> ControlKeys:
    """The same keys for the same secret, everywhere."""
    return ControlKeys(server=_pair(secret, b"adrenaline-srv"), client=_pair(secret, b"adrenaline-cli"))


def _pair(secret: bytes, role: bytes) -> CurvePair:
    private = z85.encode(hashlib.blake2b(secret, digest_size=32, person=role).digest())
    return CurvePair(public=zmq.curve_public(private), secret=private)
