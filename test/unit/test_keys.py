"""The key file: created privately, refused with one line when it is not what it should be."""

from __future__ import annotations

import os
import stat

import pytest
import zmq

from sglang_adrenaline.errors import ConfigError
from sglang_adrenaline.keys import create_key_file, derive_keys, load_key_file


def test_created_file_is_private_and_loads_alike_twice(tmp_path):
    path = tmp_path / "key"
    create_key_file(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert load_key_file(path) == load_key_file(str(path))
    assert len(bytes.fromhex(path.read_text())) == 32


def test_created_files_differ(tmp_path):
    create_key_file(tmp_path / "a")
    create_key_file(tmp_path / "b")
    assert load_key_file(tmp_path / "a") != load_key_file(tmp_path / "b")


def test_create_ignores_a_lax_umask(tmp_path):
    old = os.umask(0)
    try:
        create_key_file(tmp_path / "key")
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "key").stat().st_mode) == 0o600


def test_create_overwrites_nothing(tmp_path):
    path = tmp_path / "key"
    path.write_text("precious")
    with pytest.raises(ConfigError, match="exists"):
        create_key_file(path)
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match="exists"):
        create_key_file(tmp_path / "link")
    assert path.read_text() == "precious" and not (tmp_path / "elsewhere").exists()


def test_create_in_missing_folder_is_config_error(tmp_path):
    with pytest.raises(ConfigError, match="cannot create"):
        create_key_file(tmp_path / "no" / "key")


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"", "holds 0 bytes"),
        (b"ab" * 31, "holds 31 bytes"),
        (b"abc" * 30 + b"d", "hexadecimal"),
        (b"zz" * 32, "hexadecimal"),
        (b"ab" * 16 + b"\n" + b"ab" * 16, "hexadecimal"),
        (bytes(range(256)), "hexadecimal"),
        (b"ab" * 4000, "hexadecimal"),
    ],
)
def test_bad_content_is_one_line(tmp_path, content, complaint):
    path = tmp_path / "key"
    path.write_bytes(content)
    path.chmod(0o600)
    with pytest.raises(ConfigError, match=complaint) as error:
        load_key_file(path)
    assert "\n" not in str(error.value) and str(path) in str(error.value)


@pytest.mark.parametrize(
    ("mode", "good"), [(0o600, True), (0o400, True), (0o440, True), (0o604, False), (0o620, False)]
)
def test_mode_decides(tmp_path, mode, good):
    path = tmp_path / "key"
    create_key_file(path)
    path.chmod(mode)
    if good:
        load_key_file(path)
    else:
        with pytest.raises(ConfigError, match="chmod 600"):
            load_key_file(path)


def test_missing_folder_and_fifo_are_one_line(tmp_path):
    with pytest.raises(ConfigError, match="does not exist"):
        load_key_file(tmp_path / "no")
    with pytest.raises(ConfigError, match="key file"):
        load_key_file(tmp_path)
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(ConfigError, match="regular file"):
        load_key_file(tmp_path / "fifo")


def test_keys_are_valid_distinct_and_hide_the_secret():
    keys = derive_keys(bytes(32))
    for pair in (keys.server, keys.client):
        assert zmq.curve_public(pair.secret) == pair.public
        assert pair.secret.decode() not in repr(keys)
    assert keys.server != keys.client
    assert derive_keys(bytes(31) + b"\x01").server != keys.server
    assert derive_keys(bytes(33)) != keys
