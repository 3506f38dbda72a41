"""The host's part of channel `ipc`, which needs no GPU: segment, words, shapes, watchdog."""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys
import threading
import time

import msgspec
import pytest

from sglang_adrenaline import kernels
from sglang_adrenaline.channel import ipc_segment as seg
from sglang_adrenaline.channel import ipc_words
from sglang_adrenaline.channel.base import ChannelShape
from sglang_adrenaline.channel.ipc_end import check_shape
from sglang_adrenaline.channel.ipc_segment import Announced
from sglang_adrenaline.channel.ipc_watchdog import StepClock, Watchdog
from sglang_adrenaline.channel.memfd import WatchedProcess
from sglang_adrenaline.errors import ChannelError

SHAPE = ChannelShape(lanes=5, num_layers=2, num_qo_heads=4, head_dim=64, v_head_dim=64, dtype="float16")


def test_announced_step_is_read_by_the_other_mapping():
    prefill, spec = seg.create(SHAPE)
    decode = seg.open_(spec)
    for step in range(1, 3 * seg.RING):
        announced = Announced(tuple(range(step % 5 + 1)), (None, 0, 1)[step % 3])
        assert prefill.announced(step) is None
        decode.announce(step, announced)
        assert prefill.announced(step) == announced


def test_announced_overrun_raises():
    prefill, spec = seg.create(SHAPE)
    decode = seg.open_(spec)
    for step in range(1, seg.RING + 2):
        decode.announce(step, Announced((0,)))
    with pytest.raises(ChannelError, match="looks for step 1"):
        prefill.announced(1)
    assert prefill.announced(2) == Announced((0,))


def test_wait_bell_ends_with_the_announcement():
    prefill, spec = seg.create(SHAPE)
    decode = seg.open_(spec)
    threading.Timer(0.05, decode.announce, (1, Announced((3,)))).start()
    began = time.monotonic()
    while prefill.announced(1) is None and time.monotonic() - began < 5.0:
        prefill.wait_bell(1, 5.0)
    assert prefill.announced(1) == Announced((3,)) and time.monotonic() - began < 2.0
    prefill.wait_bell(1, 5.0)
    assert time.monotonic() - began < 2.0, "a step that is there must not be waited for"


def test_claim_hands_over_the_handle_and_keeps_others_out():
    prefill, spec = seg.create(SHAPE)
    prefill.write_handle(seg.EXECUTOR_HANDLE, bytes(range(64)))
    decode = seg.open_(spec)
    assert decode.read_handle(seg.EXECUTOR_HANDLE) == bytes(range(64))
    assert not prefill.decode_is_there()
    decode.claim(bytes(64))
    assert prefill.decode_is_there() and not prefill.peer_died()
    with pytest.raises(ChannelError, match=f"in use by process {os.getpid()}"):
        seg.open_(spec)


def test_abort_carries_its_reason():
    prefill, spec = seg.create(SHAPE)
    decode = seg.open_(spec)
    assert prefill.aborted(seg.DECODE_ABORT) is None
    decode.abort(seg.DECODE_ABORT, "ü" * 300)
    reason = prefill.aborted(seg.DECODE_ABORT)
    assert reason is not None and reason.startswith("ü" * 124)
    assert prefill.aborted(seg.EXECUTOR_ABORT) is None


def test_open_foreign_segment_is_refused():
    _prefill, spec = seg.create(SHAPE)
    with pytest.raises(ChannelError, match="another channel"):
        seg.open_(msgspec.structs.replace(spec, token="0" * 32))
    with pytest.raises(ChannelError, match="bytes, a channel"):
        seg.open_(msgspec.structs.replace(spec, shape=msgspec.structs.replace(SHAPE, lanes=4000)))


def test_layout_names_every_word_once():
    words = ipc_words.layout().split()
    assert len(words) == len(set(words)) == 24 + 4 + 8 + 1
    assert ipc_words.ENDPOINT_WORDS == 32
    assert ipc_words.Endpoint.step.offset == 128


@pytest.mark.parametrize("change", [{"dtype": "float32"}, {"v_head_dim": 80}, {"head_dim": 60}])
def test_check_shape_refuses_what_the_kernels_cannot_do(change):
    check_shape(SHAPE)
    with pytest.raises(ChannelError):
        check_shape(msgspec.structs.replace(SHAPE, **change))


@pytest.mark.parametrize("arch", ["9", "sm90", "90aa", "", "9.0"])
def test_kernels_arch_malformed_is_refused(arch):
    with pytest.raises(ChannelError, match="--arch"):
        kernels._dotted(arch)


def test_kernels_arch_is_dotted():
    assert [kernels._dotted(arch) for arch in ("90a", "80", "120a")] == ["9.0a", "8.0", "12.0a"]


class FakeEnd:
    """What the watchdog needs of an end, with its answers written down."""

    name = "fake"

    def __init__(self) -> None:
        self.troubles: list[str | None] = []
        self.reasons: list[str] = []
        self.log: list[str] = []

    def trouble(self) -> str | None:
        return self.troubles.pop(0) if self.troubles else None

    def abort(self, reason: str) -> None:
        self.reasons.append(reason)

    def release_steps(self) -> list:
        tries = iter([False, False, True])
        return [lambda: self.log.append("drain") or next(tries), lambda: self.log.append("free") or True]


def test_watchdog_aborts_once_and_releases_in_order():
    end = FakeEnd()
    end.troubles = [None, "gone", "gone again"]
    watchdog = Watchdog(end)
    watchdog.start()
    time.sleep(0.4)
    assert end.reasons == ["gone"] and end.log == []
    watchdog.release()
    assert watchdog.join(2.0)
    assert end.log == ["drain", "drain", "drain", "free"]


def test_step_clock_counts_only_while_a_step_is_open():
    clock = StepClock()
    assert clock.late_s(1, 0) == 0.0
    time.sleep(0.02)
    assert clock.late_s(1, 0) >= 0.02
    assert clock.late_s(2, 1) == 0.0
    time.sleep(0.02)
    assert clock.late_s(2, 2) == 0.0


def test_watched_process_may_be_asked_by_many_threads_at_once():
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    watched = WatchedProcess(child.pid)
    wrong: list[object] = []

    def ask() -> None:
        try:
            wrong.extend(answer for answer in (watched.has_ended() for _ in range(2000)) if answer)
        except Exception as error:
            wrong.append(error)

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert not wrong
    child.kill()
    child.wait(10)
    assert watched.has_ended()


def test_kernel_sources_lie_in_the_package_which_a_wheel_is_made_of():
    package = pathlib.Path(kernels.__file__).parent
    assert (package / "flashinfer_ext" / "csrc" / "put.cu").is_file()
    assert kernels.source_folder().samefile(package / "flashinfer_ext")
