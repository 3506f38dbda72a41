"""Prefill servers that come back as another process, or not at all: what decode forgets, and what it keeps."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from sglang_adrenaline.decode.restarts import RestartedPrefill

ADDRESS = ("127.0.0.1", 8998)
KEY = "127.0.0.1:8998"


class Manager:
    """The part of SGLang's KV manager that is asked."""

    def __init__(self) -> None:
        self.prefill_info_table: dict[str, Any] = {KEY: object()}
        self.failed: list[str] = []

    def _handle_node_failure(self, address: str) -> None:
        self.prefill_info_table.pop(address)
        self.failed.append(address)


@pytest.fixture
def manager() -> Manager:
    return Manager()


@pytest.fixture
def restarted(manager: Manager) -> RestartedPrefill:
    queue = SimpleNamespace(kv_manager=manager)
    return RestartedPrefill(SimpleNamespace(disagg_decode_prealloc_queue=queue))


def test_another_instance_at_the_address_begins_anew(manager, restarted):
    restarted.lost(ADDRESS, "a")
    restarted.welcomed(ADDRESS, "b")
    assert manager.failed == [KEY]
    restarted.welcomed(ADDRESS, "b")
    assert manager.failed == [KEY], "once"


def test_the_same_instance_that_comes_back_changes_nothing(manager, restarted):
    restarted.welcomed(ADDRESS, "a")
    restarted.lost(ADDRESS, "a")
    restarted.welcomed(ADDRESS, "a")
    assert manager.failed == []


def test_what_was_learned_of_the_new_process_is_kept(manager, restarted):
    """SGLang's heartbeats missed the server in time, and a request has come to the new one since."""
    restarted.lost(ADDRESS, "a")
    manager.prefill_info_table[KEY] = object()
    restarted.welcomed(ADDRESS, "b")
    assert manager.failed == []


def test_what_sglang_dropped_itself_needs_nothing(manager, restarted):
    restarted.lost(ADDRESS, "a")
    del manager.prefill_info_table[KEY]
    restarted.welcomed(ADDRESS, "b")
    assert manager.failed == []
