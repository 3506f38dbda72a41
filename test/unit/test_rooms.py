"""Rooms of parallel samples: distinct, equal on both servers, within range."""

from types import SimpleNamespace

from hypothesis import given
from hypothesis import strategies as st

from sglang_adrenaline.rooms import MAX_OPEN, SampleRooms
from sglang_adrenaline.router.servers import MAX_ROOM


def send(rooms: SampleRooms, room: int | None, n: int) -> int | None:
    tokenized = SimpleNamespace(bootstrap_room=room, sampling_params=SimpleNamespace(n=n))
    rooms.assign(None, tokenized)
    return tokenized.bootstrap_room


@given(st.lists(st.tuples(st.integers(0, MAX_ROOM - 1), st.integers(1, 5)), max_size=8, unique_by=lambda t: t[0]))
def test_assign_all_sends_have_distinct_rooms_equal_on_both_sides(requests):
    prefill, decode = SampleRooms(), SampleRooms()
    sent = [
        [send(side, room, n) for room, n in requests for _ in range(n + 1 if n > 1 else 1)]
        for side in (prefill, decode)
    ]
    assert sent[0] == sent[1]
    assert len(set(sent[0])) == len(sent[0])
    assert all(0 <= room < 2**63 for room in sent[0])


def test_assign_interleaved_requests_are_counted_apart():
    rooms = SampleRooms()
    assert [send(rooms, room, 2) & 0xFF for room in (1, 2, 1, 2, 1, 2)] == [1, 2, 1, 2, 1, 2]
    assert send(rooms, 1, 2) == 1, "after n + 1 sends the room is new again"


def test_assign_single_sample_keeps_its_room():
    rooms = SampleRooms()
    assert [send(rooms, 7, 1), send(rooms, 7, 1), send(rooms, None, 3)] == [7, 7, None]


def test_assign_aborted_requests_are_forgotten():
    rooms = SampleRooms()
    for room in range(MAX_OPEN + 100):
        send(rooms, room, 2)
    assert len(rooms._sent) == MAX_OPEN
