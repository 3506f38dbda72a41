"""Rooms of parallel samples: distinct, equal on both servers, within range."""

from hypothesis import given
from hypothesis import strategies as st

from sglang_adrenaline.frontend import RoomSplitter
from sglang_adrenaline.router.servers import MAX_ROOM

requests_with_samples = st.lists(
    st.tuples(st.integers(0, MAX_ROOM - 1), st.integers(2, 5)), max_size=8, unique_by=lambda request: request[0]
)


@given(requests_with_samples)
def test_next_room_all_sends_have_distinct_rooms_equal_on_both_sides(requests):
    prefill, decode = RoomSplitter(), RoomSplitter()
    sent = [[side.next_room(room, n) for room, n in requests for _ in range(n + 1)] for side in (prefill, decode)]
    assert sent[0] == sent[1]
    assert len(set(sent[0])) == len(sent[0])
    assert all(0 <= room < 2**63 for room in sent[0])


def test_next_room_interleaved_requests_are_counted_apart():
    rooms, apart = RoomSplitter(), RoomSplitter()
    mixed = [rooms.next_room(room, 2) for room in (10, 20, 10, 20, 10, 20)]
    assert mixed[0::2] == [apart.next_room(10, 2) for _ in range(3)]
    assert mixed[1::2] == [apart.next_room(20, 2) for _ in range(3)]
    assert rooms.next_room(10, 2) == 10, "after n + 1 sends the room is new again"


def test_next_room_aborted_requests_are_forgotten():
    rooms = RoomSplitter()
    for room in range(RoomSplitter.LIMIT + 100):
        rooms.next_room(room, 2)
    assert rooms.next_room(0, 2) == 0, "forgotten: counted from the start"
    assert rooms.next_room(RoomSplitter.LIMIT + 99, 2) != RoomSplitter.LIMIT + 99, "remembered"
