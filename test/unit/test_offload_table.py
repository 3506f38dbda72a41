"""The table of remote prefixes and the plan of a step."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from sglang_adrenaline.decode.table import NO_LINK, OffloadTable

PREFIXES = st.dictionaries(
    st.integers(0, 20).map(str),
    st.tuples(st.integers(1, 5000), st.sampled_from([NO_LINK, 3, 7]), st.integers(0, 127)),
)


@given(PREFIXES, st.lists(st.integers(0, 25).map(str), unique=True))
def test_plan_names_each_remote_row_once_under_its_link(prefixes, rids):
    table = OffloadTable()
    for rid, (length, link, lane) in prefixes.items():
        table.set(rid, length=length, link=link, lane=lane)
    remote = [rid for rid in rids if rid in prefixes]
    assert table.any_remote(rids) == bool(remote)
    plan = table.plan(rids)
    if not remote:
        assert plan is None
        return
    assert plan is not None
    assert plan.starts.dtype == torch.int64
    assert plan.starts.tolist() == [prefixes[rid][0] if rid in prefixes else 0 for rid in rids]
    assert [part.link for part in plan.parts] == sorted({prefixes[rid][1] for rid in remote} - {NO_LINK})
    named = [(row, part.link, lane) for part in plan.parts for row, lane in zip(part.rows, part.lanes, strict=True)]
    expected = [
        (row, prefixes[rid][1], prefixes[rid][2])
        for row, rid in enumerate(rids)
        if rid in prefixes and prefixes[rid][1] != NO_LINK
    ]
    assert sorted(named) == expected


def test_disconnected_request_keeps_its_start_and_has_no_part():
    table = OffloadTable()
    table.set("a", length=5, link=1, lane=2)
    table.set("b", length=7, link=1, lane=3)
    table.disconnect("a")
    plan = table.plan(["a", "b", "c"])
    assert plan is not None
    assert plan.starts.tolist() == [5, 7, 0]
    assert [(part.rows, part.lanes) for part in plan.parts] == [((1,), (3,))]


def test_cleared_request_is_local_and_clearing_or_disconnecting_strangers_is_harmless():
    table = OffloadTable()
    table.set("a", length=5, link=1, lane=2)
    table.clear("a")
    table.clear("a")
    table.disconnect("stranger")
    assert len(table) == 0
    assert table.plan(["a"]) is None
