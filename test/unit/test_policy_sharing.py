"""Which beginnings of prompts are shared, and by how many at a time: against a model, and what is remembered."""

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from sglang_adrenaline.policy import Sharing

WAVE = 6


def wave(sharing: Sharing, blocks: str, size: int) -> list[tuple[int, int]]:
    """`size` requests with these blocks come, then all of them end; what was expected of each when it came."""
    expected = []
    for _ in range(size):
        expected.append(sharing.expected(blocks))
        for block in blocks:
            sharing.keep(block)
    for block in blocks * size:
        sharing.drop(block)
    return expected


@given(st.lists(st.tuples(st.booleans(), st.sampled_from("abcdef"))), st.integers(0, 3))
def test_sharing_keepers_are_counted_and_what_is_remembered_is_bounded(events, remembered):
    sharing, model, peak = Sharing(remembered), Counter(), Counter()
    for keeps, block in events:
        if keeps:
            assert sharing.keep(block) == (model[block] == 0)
            model[block] += 1
            peak[block] = max(peak[block], model[block])
        elif model[block]:
            model[block] -= 1
            assert sharing.drop(block) == (model[block] == 0)
        assert sharing.keepers == dict(+model)
        assert len(sharing._past) <= remembered and not set(sharing._past) & set(sharing.keepers)
    for block in "abcdef":
        count, coming = sharing.expected(block)
        assert sharing.leading(block) == bool(model[block])
        assert count >= bool(model[block])
        assert 1 <= coming <= max(peak[block] - model[block], 1)


def test_sharing_first_of_a_wave_expects_those_that_will_share_with_it():
    sharing: Sharing[str] = Sharing()
    assert wave(sharing, "abc", WAVE)[0] == (0, 1), "the first wave is not known to be one"
    for first, *_, last in (wave(sharing, "abc", WAVE) for _ in range(3)):
        assert first == (3, WAVE)
        assert last == (3, 1)
    assert sharing.expected("abx") == (2, WAVE)
    assert sharing.expected("xbc") == (0, 1)


def test_sharing_what_nobody_shares_any_more_is_forgotten():
    sharing: Sharing[str] = Sharing()
    wave(sharing, "abc", WAVE)
    alone = [wave(sharing, "abc", 1)[0] for _ in range(30)]
    counts = [coming for _, coming in alone]
    assert counts == sorted(counts, reverse=True)
    assert alone[-1] == (0, 1)


def test_sharing_a_long_kept_block_follows_how_many_keep_it_now():
    """One request that stays keeps the block known; others come and go, first many at a time, then one by one."""
    sharing: Sharing[str] = Sharing()
    sharing.keep("a")
    wave(sharing, "a", 20)
    assert sharing.expected("a") == (1, 20)
    for _ in range(60):
        wave(sharing, "a", 1)
    assert sharing.expected("a") == (1, 1)


def test_sharing_forgets_what_was_dropped_first():
    sharing: Sharing[str] = Sharing(remembered=2)
    for block in "abc":
        wave(sharing, block, 2)
    wave(sharing, "b", 2)
    wave(sharing, "d", 2)
    assert [sharing.expected(block) for block in "abcd"] == [(0, 1), (1, 2), (0, 1), (1, 2)]
