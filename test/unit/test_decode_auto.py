"""Ratio auto in decode: decisions from numbers, who takes decode's memory, what measured steps tell the policy."""

from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace

import msgspec
import pytest
from figures_of_models import LLAMA2_7B
from hypothesis import given
from hypothesis import strategies as st

from sglang_adrenaline import policy
from sglang_adrenaline.cost_model import CostModel
from sglang_adrenaline.decode.auto import Admission, Here, LoadDecider, There, most_utilisation
from sglang_adrenaline.decode.by_load import prefill_now
from sglang_adrenaline.decode.memory import ConstantReserve, Promised
from sglang_adrenaline.decode.offload import Offload
from sglang_adrenaline.decode.prefixes import BLOCK_TOKENS, KeptPrefixes, block_names
from sglang_adrenaline.decode.step_times import (
    OBSERVE_STEPS,
    PREDICT_EVERY,
    LinkTotals,
    Predicted,
    RemotePart,
    StepTimes,
    Window,
)
from sglang_adrenaline.messages import Stats
from sglang_adrenaline.policy import PrefillLoad
from sglang_adrenaline.policy.sm_share import MARGIN, predicted_ttft_s
from sglang_adrenaline.profile_data import datasheet_profile

COST = CostModel(datasheet_profile("H200", LLAMA2_7B))
RESERVE = 512
LIMIT = 1024
"""Of answers; a constant reserve does not look at it."""
POOL = 216_000
IDLE_PREFILL = There(
    pool_tokens=POOL, pinned_tokens=0, read_tokens=0, lanes=256, lanes_in_use=0, prefill_load=0.0, lasting_load=0.0
)


def decider(**settings) -> LoadDecider:
    slo_ttft_s = settings.pop("slo_ttft_s", None)
    rules = policy.LoadSettings(max_rows=COST.rows_max(), **settings)
    return LoadDecider(COST, rules, Admission(), slo_ttft_s=slo_ttft_s)


def here(*, rows: int, used: int, pool: int = POOL) -> Here:
    """Requests with a row that take `used` tokens, all of them answers as far as attention goes."""
    reserve = ConstantReserve(RESERVE, lambda: rows)
    return Here(pool_tokens=pool, unclaimed_tokens=pool - used, kept_free=reserve, answer_tokens=used, rows=rows)


def there(**changes) -> dict[str, There]:
    """`prefill_load` alone: it has lasted."""
    changes.setdefault("lasting_load", changes.get("prefill_load", 0.0))
    return {"a": replace(IDLE_PREFILL, **changes)}


def prompt(length: int, **known: int) -> policy.Request:
    return policy.Request(prompt_len=length, **known)


BUSY = here(rows=150, used=120_000)
"""Room for one more prompt."""
FULL = here(rows=190, used=118_200)
"""520 tokens are left: for a remote prompt's reserve only."""


def test_decide_busy_decode_and_idle_prefill_offloads_the_whole_prompt():
    auto = decider()
    decision = auto.decide("r", prompt(512), LIMIT, "a", BUSY, there())
    assert decision == policy.Decision(512, policy.Reason.HIDDEN)
    assert auto.decisions == {"hidden": 1} and auto.admission.waiting == {"r": Promised(0, LIMIT)}


def test_decide_idle_decode_keeps_a_short_prompt():
    decision = decider().decide("r", prompt(512), LIMIT, "a", here(rows=0, used=0), there())
    assert decision is not None and decision.split == 0


def test_decide_full_decode_offloads_what_would_not_fit():
    auto = decider()
    decision = auto.decide("r", prompt(512), LIMIT, "a", FULL, there())
    assert decision is not None and decision.split == 512
    assert auto.state.pressed


@pytest.mark.parametrize("changes", [{"pinned_tokens": 200_000}, {"lanes_in_use": 256}], ids=["pool", "lanes"])
def test_decide_full_prefill_keeps_the_request_here(changes):
    auto = decider()
    assert auto.decide("r", prompt(512), LIMIT, "a", BUSY, there(**changes)) == policy.Decision(0, policy.Reason.CAP)
    assert auto.admission.waiting == {"r": Promised(512, LIMIT)}


def test_decide_both_full_waits_and_leaves_no_trace():
    auto = decider()
    before = auto.state
    assert auto.decide("r", prompt(512), LIMIT, "a", FULL, there(lanes_in_use=256)) is None
    assert (auto.state, auto.decisions, auto.admission.waiting) == (before, {}, {})


def test_decide_no_request_on_decode_is_never_held():
    """What does not even fit into an empty pool is for SGLang's own admission to answer."""
    small = here(rows=0, used=0, pool=400)
    assert decider().decide("r", prompt(600), LIMIT, "a", small, {}) == policy.Decision(0, policy.Reason.NO_PEER)


def test_decide_busy_prefill_is_left_alone():
    decision = decider().decide("r", prompt(512), LIMIT, "a", BUSY, there(prefill_load=1.05))
    assert decision is not None and decision.split == 0


def test_decide_load_of_prefill_does_not_matter_where_the_executor_has_sms_of_its_own():
    decision = decider().decide("r", prompt(512), LIMIT, "a", BUSY, there(prefill_load=1.05, executor_share=0.36))
    assert decision is not None and decision.split == 512


@pytest.mark.parametrize(("output", "split"), [(20, 0), (LIMIT, 512)])
def test_decide_a_burst_of_prompts_counts_for_requests_that_do_not_outlive_it(output, split):
    auto = decider()
    auto.answered(output)
    burst = there(prefill_load=1.05, lasting_load=0.1)
    assert auto.decide("r", prompt(512), LIMIT, "a", BUSY, burst).split == split
    shifted = there(prefill_load=0.1, lasting_load=1.05)
    assert auto.decide("s", prompt(512), LIMIT, "a", BUSY, shifted).split == 512 - split


def test_decide_ttft_objective_leaves_prefill_more_of_its_time():
    busy = there(prefill_load=0.5)
    loose, strict = decider(slo_ttft_s=5.0), decider(slo_ttft_s=0.02)
    assert loose.decide("r", prompt(512), LIMIT, "a", BUSY, busy).split == 512
    assert strict.decide("r", prompt(512), LIMIT, "a", BUSY, busy).split == 0


def test_decide_unreported_instance_keeps_the_request_local():
    assert decider().decide("r", prompt(512), LIMIT, "a", BUSY, {}) == policy.Decision(0, policy.Reason.NO_PEER)


@given(
    prompts=st.lists(st.integers(1, 3_000), min_size=1, max_size=40),
    rows=st.integers(1, 200),
    used=st.integers(0, POOL),
    pinned=st.integers(0, POOL),
)
def test_decide_requests_decided_without_a_row_never_promise_more_than_the_budget(prompts, rows, used, pinned):
    auto, now, peers = decider(), here(rows=rows, used=used), there(pinned_tokens=pinned)
    for number, length in enumerate(prompts):
        if auto.decide(str(number), prompt(length), LIMIT, "a", now, peers) is None:
            break
    waiting = auto.admission.waiting
    budget = now.unclaimed_tokens - RESERVE * rows
    assert sum(one.tokens for one in waiting.values()) + RESERVE * len(waiting) <= max(budget, 0)
    assert sum(auto.decisions.values()) == len(waiting)


@given(st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from(["decided", "placed", "gone"]), st.integers(0, 99))))
def test_admission_any_order_of_events_counts_each_request_once(events):
    admission, known = Admission(), {}
    for rid, event, tokens in events:
        if event == "gone":
            admission.gone(rid)
            known.pop(rid, None)
        else:
            admission.placed(rid, tokens) if event == "placed" else admission.decided(rid, tokens, LIMIT)
            known[rid] = tokens
            if event == "placed":
                assert rid not in admission.waiting
    assert admission.prompt_tokens == sum(known.values())
    for rid in "abc":
        admission.gone(rid)
    assert admission.prompt_tokens == 0 and not admission.waiting


def test_answered_lengths_raise_what_local_attention_is_expected_to_read():
    """A young batch of equal answers: what it will read decides, so more is offloaded than by what it reads now."""
    young, fleet = here(rows=100, used=10_000), there(read_tokens=30_000, lanes_in_use=80)
    fresh, experienced = decider(), decider()
    for _ in range(20):
        experienced.answered(512)
    for auto in (fresh, experienced):
        for number in range(100):
            auto.admission.placed(f"old{number}", 100)
    assert fresh.decide("r", prompt(512), LIMIT, "a", young, fleet).split == 0
    assert experienced.decide("r", prompt(512), LIMIT, "a", young, fleet).split == 512


def test_observe_long_waits_slow_the_executors_rate_down():
    auto, reading = decider(), there(read_tokens=200_000, lanes_in_use=100)
    before = auto.predict(150, 120_000, reading)
    part = before.remote["a"]
    remote_s, trip_s = part.attention_s, part.round_trip_s
    for _ in range(auto.settings.patience):
        slow = policy.Observation(
            peer="a",
            steps=100,
            step_s=before.step_s * 2,
            predicted_step_s=before.step_s,
            exposed_wait_s=2 * remote_s,
            local_s=before.local_s,
            remote_s=remote_s,
            round_trip_s=trip_s,
        )
        auto.observe(Window(100, [slow]))
    assert auto.state.rates["a"] < 1.0 and auto.state.extra_s > 0.0
    assert auto.predict(150, 120_000, reading).step_s > before.step_s


def test_decide_prompt_in_decodes_own_tree_needs_no_room_there():
    """Its prefix is locked by running requests, so only the rest takes slots."""
    busy_prefill = there(prefill_load=1.05)
    almost = here(rows=190, used=117_000)
    assert decider().decide("r", prompt(5000), LIMIT, "a", almost, busy_prefill) is None
    auto = decider()
    decision = auto.decide("r", prompt(5000, local_cached_tokens=4096), LIMIT, "a", almost, busy_prefill)
    assert decision is not None and decision.split == 0
    assert auto.admission.waiting == {"r": Promised(904, LIMIT)}


def test_decide_prompts_that_share_slots_are_attended_to_by_each_row():
    """Ten running requests over one prompt: little memory, much to read, so the next one goes remote."""
    auto = decider()
    for number in range(100):
        auto.admission.decided(f"old{number}", 4096, LIMIT, cached_tokens=4000)
        auto.admission.placed(f"old{number}", 4096)
    assert auto.admission.prompt_tokens == 409_600
    shared = here(rows=100, used=20_000)
    assert auto.decide("r", prompt(4096, local_cached_tokens=4000), LIMIT, "a", shared, there()).split == 4096


def test_decide_pinned_prefix_takes_no_second_room_at_prefill():
    """The cap is all but reached: a fresh prompt stays here, one whose beginning is pinned there already does not."""
    full = there(pinned_tokens=194_200)
    assert decider().decide("r", prompt(4096), LIMIT, "a", BUSY, full).split == 0
    assert (
        decider().decide("r", prompt(4096, shared_tokens=4032, cached_tokens=4032), LIMIT, "a", BUSY, full).split
        == 4096
    )


@given(
    st.lists(
        st.tuples(st.sampled_from("abc"), st.booleans(), st.integers(0, 1), st.integers(0, 400), st.integers(0, 400))
    )
)
def test_kept_prefixes_know_the_longest_common_beginning_in_whole_blocks(events):
    def ids(common: int, own: int, rid: str) -> list[int]:
        return [7] * common + [ord(rid)] * own

    kept, model = KeptPrefixes(), {}
    for rid, keeps, where, common, own in events:
        if keeps:
            kept.keep(rid, where, block_names(ids(common, own, rid)))
            model[rid] = (where, ids(common, own, rid))
        else:
            kept.drop(rid)
            model.pop(rid, None)
    asked = ids(300, 100, "a")
    for where in (0, 1):
        alike = [
            next((i for i, (x, y) in enumerate(zip(asked, prefix, strict=False)) if x != y), min(len(prefix), 400))
            for place, prefix in model.values()
            if place == where
        ]
        assert kept.leading(where, block_names(asked)) == max(alike, default=0) // BLOCK_TOKENS * BLOCK_TOKENS
        ends = {
            rid: [tuple(prefix[:end]) for end in range(BLOCK_TOKENS, len(prefix) + 1, BLOCK_TOKENS)]
            for rid, (place, prefix) in model.items()
            if place == where
        }
        saved = sum(map(len, ends.values())) - len({end for each in ends.values() for end in each})
        assert kept.shared_tokens([*ends, "nobody"]) == saved * BLOCK_TOKENS
    for rid in list(model):
        kept.drop(rid)
    assert not kept._sharing.keepers and not kept._by_request


def test_prefill_now_reads_what_requests_share_once():
    """Two on one prefix of 128 tokens, of which one has gone on, and one whose split was its own wish, on link 3."""
    kept, link = KeptPrefixes(), SimpleNamespace(index=3, lanes=8)
    stats = Stats(pool_tokens=POOL, free_tokens=0, pinned_tokens=500, pinned_requests=3, lanes=8, lanes_in_use=3)
    peers = [SimpleNamespace(name="a", stats_at=10.0, stats=stats, link=link)]

    def offload(rid: str, tokens: int, where: SimpleNamespace, ready_at: float = 5.0) -> Offload:
        one = Offload(SimpleNamespace(rid=rid), 0, ("", 0), tokens, tokens, 0.0, forced=False, link=where)
        one.ready_at = ready_at
        return one

    kept.keep("first", 3, block_names([7] * 200))
    kept.keep("second", 3, block_names([7] * 128))
    kept.keep("elsewhere", 4, block_names([7] * 128))
    ours = [offload("first", 200, link), offload("second", 150, link), offload("wish", 130, link)]
    other = offload("elsewhere", 128, SimpleNamespace(index=4, lanes=8))
    late = offload("late", 30, link, ready_at=11.0)
    ((name, now),) = prefill_now([*ours, late, other], peers, kept).items()
    assert (name, now.read_tokens, now.lanes_in_use) == ("a", 200 + (150 - 128) + 130 + 30, 4)
    assert now.pinned_tokens == 500 + 30
    kept.drop("first")
    assert prefill_now(ours[1:], peers, kept)["a"].read_tokens == 150 + 130
    grown = now.with_one_more(70)
    assert (grown.read_tokens, grown.pinned_tokens, grown.lanes_in_use) == (452, 600, 5)


@given(st.floats(1e-3, 1.0), st.floats(1e-3, 10.0))
def test_most_utilisation_is_where_the_predicted_ttft_meets_the_objective(service_s, slo_s):
    load = most_utilisation(service_s, slo_s)
    assert 0.0 <= load <= 1.0
    if 0.0 < load < 0.89:
        at = PrefillLoad(requests_s=load / service_s, prompt_s=0.5 * service_s)
        assert predicted_ttft_s(at, 0.5) == pytest.approx(MARGIN * slo_s, rel=1e-6)


def test_step_times_report_each_link_once_a_window():
    times = StepTimes()

    def window(steps: int, wait_s: float) -> Sequence[policy.Observation]:
        for number in range(OBSERVE_STEPS):
            wanted = times.add(0.02)
            assert wanted == ((number + 1) % PREDICT_EVERY == 0)
            if wanted:
                times.predicted(Predicted(0.025, 0.01, {"a": RemotePart(8_000, 0.008, 0.001)}))
            links = [LinkTotals(3, "a", steps, wait_s), LinkTotals(4, "b", 0, 0.0)]
            over = times.window(links)
            assert (over is not None) == (number == OBSERVE_STEPS - 1)
        assert over is not None and over.steps == OBSERVE_STEPS
        return over.seen

    (first,) = window(80, 0.4)
    assert (first.peer, first.steps) == ("a", 80)
    assert (first.local_s, first.remote_s, first.round_trip_s) == pytest.approx((0.01, 0.008, 0.001))
    assert (first.step_s, first.predicted_step_s, first.exposed_wait_s) == pytest.approx((0.02, 0.025, 0.005))
    (second,) = window(180, 0.4)
    assert (second.steps, second.exposed_wait_s) == (100, 0.0)
    assert not window(180, 0.4)


def observed(times: StepTimes, parts: dict[str, RemotePart], totals: list[LinkTotals]) -> Sequence[policy.Observation]:
    """What one window of steps tells, in all of which `parts` took part."""
    for number in range(OBSERVE_STEPS):
        if times.add(0.02):
            times.predicted(Predicted(0.025, 0.01, parts))
        over = times.window(totals)
        assert (over is not None) == (number == OBSERVE_STEPS - 1)
    assert over is not None
    return over.seen


def test_step_times_tell_what_was_measured_here_and_there():
    times, parts = StepTimes(), {"a": RemotePart(8_000, 0.008, 0.001)}
    (first,) = observed(times, parts, [LinkTotals(3, "a", 10, 0.02, 0.1, 0.5, worked_s=0.25, read_tokens=100_000)])
    assert first.worked_s == pytest.approx(8_000 / 400_000)
    assert (first.local_span_s, first.answer_s, first.executor_s) == pytest.approx((0.01, 0.012, 8_000 / 200_000))
    # No report since: what the last one said still holds.
    (second,) = observed(times, parts, [LinkTotals(3, "a", 20, 0.02, 0.3, 0.5, worked_s=0.25, read_tokens=100_000)])
    assert second.worked_s == first.worked_s
    assert (second.local_span_s, second.answer_s, second.executor_s) == pytest.approx((0.02, 0.02, 8_000 / 200_000))
    # The next session of the same instance begins anew.
    (third,) = observed(times, parts, [LinkTotals(4, "a", 10, 0.0, 0.0)])
    assert (third.local_span_s, third.answer_s, third.executor_s, third.worked_s) == (0.0, 0.0, 0.0, 0.0)


def test_step_times_of_two_links_take_the_span_without_a_wait_for_local_attention():
    """Answers are taken one link after the other, so the second link's span has the first one's wait in it."""
    parts = {name: RemotePart(8_000, 0.008, 0.001) for name in "ab"}
    totals = [LinkTotals(0, "a", 10, 0.05, 0.1), LinkTotals(1, "b", 10, 0.01, 0.16)]
    first, second = observed(StepTimes(), parts, totals)
    assert first.local_span_s == second.local_span_s == pytest.approx(0.01)
    assert (first.answer_s, second.answer_s) == pytest.approx((0.015, 0.017))


def test_observe_executor_that_was_slow_once_is_tried_again():
    """Measured at a tenth of its speed it gets no prompt, and so is not measured: the next one goes there before long,
    and only after many requests."""
    auto, now = decider(split_tokens=20_000), here(rows=20, used=60_000)
    auto.answered(100)
    idle = there()

    def split(rid: str) -> int:
        decided = auto.decide(rid, prompt(20_000), LIMIT, "a", now, idle)
        auto.admission.gone(rid)
        return decided.split if decided is not None else 0

    assert split("before") == 20_000
    before = auto.predict(20, 60_000, there(read_tokens=100_000, lanes_in_use=100))
    part = before.remote["a"]
    slow = policy.Observation(
        peer="a",
        steps=OBSERVE_STEPS,
        step_s=before.step_s + 9 * part.attention_s,
        predicted_step_s=before.step_s,
        exposed_wait_s=9 * part.attention_s,
        local_s=before.local_s,
        remote_s=part.attention_s,
        round_trip_s=part.round_trip_s,
        local_span_s=before.local_s,
        answer_s=10 * part.attention_s,
        executor_s=10 * part.attention_s,
    )
    auto.observe(Window(OBSERVE_STEPS, [slow]))
    assert split("slow") == 0
    steps = 0
    while not split(f"after {steps}") and steps < 100 * 100:
        auto.observe(Window(OBSERVE_STEPS))
        steps += OBSERVE_STEPS
    assert 4 < steps / 100 < 40, "lives of a request"


def test_observe_measured_rates_change_decisions_and_predictions_after_one_window():
    """Local attention takes twice, the executor half of what data sheets say."""
    auto, reading = decider(), there(read_tokens=100_000, lanes_in_use=100)
    before = auto.predict(150, 120_000, reading)
    part = before.remote["a"]
    assert auto.decide("r", prompt(4096), LIMIT, "a", here(rows=150, used=95_000), reading).split == 0
    measured = policy.Observation(
        peer="a",
        steps=16,
        step_s=before.step_s + before.local_s,
        predicted_step_s=before.step_s,
        exposed_wait_s=0.0,
        local_s=before.local_s,
        remote_s=part.attention_s,
        round_trip_s=part.round_trip_s,
        local_span_s=2 * before.local_s,
        answer_s=2 * before.local_s,
        executor_s=part.attention_s / 2,
    )
    auto.observe(Window(16, [measured]))
    status = auto.status()
    assert (status["local_rate"], status["executor_rates"]["a"]) == (0.5, 2.0)
    after = auto.predict(150, 120_000, reading)
    assert after.step_s == pytest.approx(before.step_s + before.local_s)
    assert (after.local_s, after.remote) == (before.local_s, before.remote)
    assert auto.decide("s", prompt(4096), LIMIT, "a", here(rows=150, used=95_000), reading).split == 4096


def test_decide_prompts_are_computed_for_longer_than_decoded_stay_local_with_divided_sms():
    """As many prompts wait as keep prefill busy for half a minute, and decode could take them faster."""
    fleet = there(executor_share=0.36)
    queue = replace(here(rows=1, used=4_200), undecided=300, running=1)
    long = decider().decide("r", prompt(4096), 64, "a", queue, fleet)
    assert long == policy.Decision(0, policy.Reason.PREFILL)
    few = decider().decide("r", prompt(4096), 64, "a", replace(queue, undecided=20), fleet)
    assert few is not None and few.reason is not policy.Reason.PREFILL
    answers = decider().decide("r", prompt(512), 512, "a", queue, fleet)  # decoding them is what takes long
    assert answers is not None and answers.reason is not policy.Reason.PREFILL


def test_decide_prompts_that_are_still_computed_hold_memory_but_take_no_time_of_steps():
    """Decode is full of requests that wait for prefill: another one that takes no memory here lengthens no step."""

    def decided(running: int) -> policy.Decision | None:
        auto = decider()
        for _ in range(100):
            auto.stepped(running, 100)
        full = here(rows=100, used=POOL - 100 * RESERVE - 520)
        peers = there(read_tokens=168_000, lanes_in_use=100)
        return auto.decide("r", prompt(512), LIMIT, "a", full, peers)

    assert decided(100) is None
    assert decided(10) == policy.Decision(512, policy.Reason.OVERFLOW)


def test_settings_of_a_request_keep_everything_but_prefills_utilisation():
    auto = decider(slo_ttft_s=0.02, min_tokens=7)
    changed = auto._settings_for(512)
    assert changed.prefill_utilisation < auto.settings.prefill_utilisation
    assert msgspec.structs.replace(changed, prefill_utilisation=auto.settings.prefill_utilisation) == auto.settings
