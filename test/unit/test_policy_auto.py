"""The decision by load: caps, bounds, monotonicity, hysteresis, and independence of order and rank."""

import itertools
import math

import msgspec
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from sglang_adrenaline import policy
from sglang_adrenaline.policy.pace import FASTEST, SLOWEST, Pace
from sglang_adrenaline.policy.views import pin_room

tokens = st.integers(0, 200_000)
rates = st.floats(1e5, 1e8)
overheads = st.floats(0, 2e-3)

requests = st.integers(1, 40_000).flatmap(
    lambda n: st.builds(
        lambda shared, cached, local, coming: policy.Request(
            prompt_len=n,
            shared_tokens=min(shared, cached),
            cached_tokens=max(shared, cached),
            local_cached_tokens=local,
            coming=coming,
        ),
        shared=st.integers(0, n),
        cached=st.integers(0, n),
        local=st.integers(0, n),
        coming=st.integers(1, 50),
    )
)
decodes = st.builds(
    lambda pool, free, **rest: policy.DecodeView(pool_tokens=pool, free_tokens=min(free, pool), **rest),
    pool=st.integers(1_000, 200_000),
    free=tokens,
    local_tokens=tokens,
    rows=st.integers(0, 500),
    computing=st.none() | st.integers(0, 3),
    attention_rate=rates,
    linear_s=st.floats(0, 0.05),
    linear_row_s=st.floats(0, 1e-4),
    growth_tokens=st.integers(0, 2_000),
    kept_tokens=tokens,
    life_s=st.floats(0, 20),
)
peers = st.builds(
    policy.PrefillView,
    pool_tokens=st.integers(1_000, 200_000),
    pinned_tokens=tokens,
    read_tokens=tokens,
    lanes_free=st.integers(0, 3),
    attention_rate=rates,
    round_trip_s=overheads,
    overhead_s=overheads,
    cache_reserve_tokens=st.integers(0, 20_000),
    prefill_load=st.floats(0, 1.5),
    lasting_load=st.none() | st.floats(0, 1.5),
)
fleets = st.dictionaries(st.sampled_from("abcd"), peers, min_size=1).filter(lambda fleet: "a" in fleet)
paces = st.builds(Pace, predicted_s=st.floats(0, 1), took_s=st.floats(0, 1))
states = st.builds(
    policy.LoadState,
    pressed=st.booleans(),
    reuse=st.floats(0, 1),
    local_pace=paces,
    paces=st.dictionaries(st.sampled_from("abcd"), paces),
    work_paces=st.dictionaries(st.sampled_from("abcd"), paces),
    trips=st.dictionaries(st.sampled_from("abcd"), st.floats(-2e-3, 5e-3)),
    rates=st.dictionaries(st.sampled_from("abcd"), st.floats(0.25, 2)),
    extra_s=st.floats(-0.01, 0.05),
)
settings = st.builds(
    policy.LoadSettings,
    page_size=st.sampled_from([1, 16, 64]),
    min_tokens=st.integers(1, 100),
    max_pinned_fraction=st.floats(0.05, 1),
    split_tokens=st.integers(1, 4_000),
    max_rows=st.integers(1, 600),
    slo_tpot_s=st.none() | st.floats(1e-3, 0.2),
)
IDLE = {"a": policy.PrefillView(pool_tokens=100_000, pinned_tokens=0, read_tokens=0, lanes_free=9, attention_rate=6e6)}
BUSY = policy.DecodeView(
    pool_tokens=100_000, free_tokens=50_000, local_tokens=50_000, rows=80, attention_rate=6e6, linear_s=0.0045
)


def split(state, request, decode, fleet, rules):
    return policy.decide_by_load(state, request, "a", decode, fleet, rules)[0].split


@given(states, requests, decodes, fleets, settings)
def test_decide_anything_stays_within_prompt_and_caps(state, request, decode, fleet, rules):
    decision, after = policy.decide_by_load(state, request, "a", decode, fleet, rules)
    peer = fleet["a"]
    assert 0 <= decision.split <= request.prompt_len and decision.split % rules.page_size == 0
    new = decision.split - min(request.shared_tokens, decision.split)
    assert new <= pin_room(peer, rules)
    if decision.split:
        assert peer.lanes_free > 0 and request.prompt_len >= rules.min_tokens
        assert peer.pinned_tokens + new <= max(rules.max_pinned_fraction * peer.pool_tokens, peer.pinned_tokens)
    assert 0 <= after.reuse <= 1


@given(states, requests, decodes, fleets, settings)
def test_decide_hidden_split_is_never_what_the_step_waits_for(state, request, decode, fleet, rules):
    decision, _ = policy.decide_by_load(state, request, "a", decode, fleet, rules)
    if decision.reason is not policy.Reason.HIDDEN:
        return

    def time_of(name, read):
        rate = fleet[name].attention_rate * state.rate_of(name)
        return state.trip_s(name, fleet[name].round_trip_s) + (fleet[name].read_tokens + read) / rate

    local_rate = decode.attention_rate * state.local_pace.rate
    peer_rate = fleet["a"].attention_rate * state.rate_of("a")
    others = [time_of(name, 0) for name in fleet if name != "a" and fleet[name].read_tokens]

    def hides(count):
        """With so many that share what is cached, which the executor reads once."""
        new = decision.split - request.shared_tokens + (count - 1) * max(decision.split - request.cached_tokens, 0)
        if new / peer_rate < 0.1 * count * request.prompt_len / local_rate:  # no time worth mentioning
            return True
        # One with too little that is new to be split may be waited for, if not as long as local attention with all of
        # it would take.
        short = request.prompt_len - request.shared_tokens < 2 * rules.split_tokens
        stays = request.prompt_len if short else request.prompt_len - decision.split
        local = (decode.local_tokens + count * stays) / local_rate
        slack = (count + 1) / fleet["a"].attention_rate / min(state.rate_of("a"), 1) + 1e-9
        return time_of("a", new) <= max([local, *others]) + slack

    assert hides(1) or hides(request.coming)


@given(states, requests, decodes, fleets, settings)
def test_decide_waits_only_for_prefixes_of_its_own(state, request, decode, fleet, rules):
    """What it waits for ends by itself, so nothing waits for ever."""
    decision, _ = policy.decide_by_load(state, request, "a", decode, fleet, rules)
    if decision.reason is policy.Reason.WAIT:
        assert decision.split == 0 and decode.rows > 0 and fleet["a"].read_tokens > 0
        nothing = {name: msgspec.structs.replace(view, read_tokens=0) for name, view in fleet.items()}
        free, _ = policy.decide_by_load(state, request, "a", decode, nothing, rules)
        assert free.reason is not policy.Reason.WAIT


def test_decide_full_prefill_is_waited_for_by_a_batch_of_cheap_rows_only():
    """340 rows whose prompts are all remote: one with its prompt here costs a step three times what a row does."""
    replace, request = msgspec.structs.replace, policy.Request(prompt_len=512)
    full = replace(IDLE["a"], pool_tokens=190_000, pinned_tokens=174_000, read_tokens=174_000, attention_rate=12e6)
    cheap = replace(
        BUSY, rows=340, local_tokens=87_000, linear_s=0.009, linear_row_s=25e-6, under_s=0.011, growth_tokens=512
    )

    def reason(decode, peer):
        return policy.decide_by_load(policy.LoadState(), request, "a", decode, {"a": peer}, policy.LoadSettings())[
            0
        ].reason

    assert reason(cheap, full) is policy.Reason.WAIT
    assert reason(replace(cheap, local_tokens=340 * 768), full) is policy.Reason.CAP, "its rows are as dear as this one"
    assert reason(replace(cheap, rows=0), full) is policy.Reason.CAP
    slow = replace(full, attention_rate=4e6)
    assert reason(cheap, slow) is policy.Reason.CAP, "decode waits for the executor anyway"


@given(states, requests, decodes, fleets, settings)
def test_decide_every_dict_order_decides_alike(state, request, decode, fleet, rules):
    backwards = dict(reversed(fleet.items()))
    mirrored = msgspec.structs.replace(
        state,
        **{name: dict(reversed(getattr(state, name).items())) for name in ("rates", "paces", "trips")},
    )
    assert policy.decide_by_load(state, request, "a", decode, fleet, rules) == policy.decide_by_load(
        mirrored, request, "a", decode, backwards, rules
    )


@given(states, requests, decodes, fleets, settings, tokens)
def test_decide_more_free_memory_on_decode_never_offloads_more(state, request, decode, fleet, rules, more):
    roomier = msgspec.structs.replace(decode, free_tokens=min(decode.free_tokens + more, decode.pool_tokens))
    assert split(state, request, roomier, fleet, rules) <= split(state, request, decode, fleet, rules)


@given(states, requests, decodes, fleets, settings, tokens)
def test_decide_more_memory_kept_for_answers_never_offloads_less(state, request, decode, fleet, rules, more):
    keeps = msgspec.structs.replace(decode, kept_tokens=decode.kept_tokens + more)
    assert split(state, request, keeps, fleet, rules) >= split(state, request, decode, fleet, rules)


@given(states, requests, decodes, fleets, settings, tokens)
def test_decide_more_free_memory_on_prefill_never_offloads_less(state, request, decode, fleet, rules, freed):
    peer = fleet["a"]
    emptier = msgspec.structs.replace(peer, pinned_tokens=max(peer.pinned_tokens - freed, 0))
    assert split(state, request, decode, fleet | {"a": emptier}, rules) >= split(state, request, decode, fleet, rules)


@given(states, requests, decodes, fleets, settings)
def test_decide_shared_prefix_never_offloads_less_than_a_fresh_one(state, request, decode, fleet, rules):
    fresh = msgspec.structs.replace(request, shared_tokens=0, cached_tokens=0, coming=1)
    assert split(state, request, decode, fleet, rules) >= split(state, fresh, decode, fleet, rules)


def test_decide_what_the_executor_reads_anyway_takes_no_time_there():
    """The executor reads for longer than attention here takes: nothing more hides, but what is read already does.
    Without room here a prompt goes there whole where a step then takes little longer, as it does for what is new."""
    replace, rules = msgspec.structs.replace, policy.LoadSettings()
    fleet = {"a": replace(IDLE["a"], read_tokens=60_000, pinned_tokens=60_000)}

    def decided(decode, shared):
        request = policy.Request(prompt_len=4096, shared_tokens=shared, cached_tokens=shared)
        return policy.decide_by_load(policy.LoadState(), request, "a", decode, fleet, rules)[0]

    assert decided(BUSY, 0) == policy.Decision(0, policy.Reason.LEVEL)
    assert decided(BUSY, 2000) == policy.Decision(2000, policy.Reason.HIDDEN)
    assert decided(BUSY, 3600) == policy.Decision(3072, policy.Reason.HIDDEN), "the rest is worth attending to here"
    assert decided(BUSY, 3776) == policy.Decision(4096, policy.Reason.HIDDEN), "320 * 1.1 < 0.1 * 4096"
    full = replace(BUSY, free_tokens=10, linear_s=0.02, linear_row_s=1e-5)
    assert decided(full, 0).reason is policy.Reason.OVERFLOW
    assert decided(full, 0).split == pytest.approx(2190, abs=1), "0.03 s * 81 / 80, less what is read in 0.02 and 0.01"
    assert decided(full, 2000) == policy.Decision(4096, policy.Reason.OVERFLOW)


def test_decide_first_of_many_that_share_a_prefix_is_decided_with_those_to_come():
    """One prefix of 1,000 tokens is read there, as much as hides. A second one would stay here for its first request,
    and its other five read it once there instead of five times here."""
    fleet = {"a": msgspec.structs.replace(IDLE["a"], read_tokens=1_000)}
    decode = msgspec.structs.replace(BUSY, local_tokens=800)

    def decided(coming, cached=1_000, length=1_050):
        request = policy.Request(prompt_len=length, cached_tokens=cached, coming=coming)
        state, rules = policy.LoadState(), policy.LoadSettings()
        return policy.decide_by_load(state, request, "a", decode, fleet, rules)[0]

    assert decided(1) == policy.Decision(0, policy.Reason.LEVEL)
    assert decided(6) == policy.Decision(1_050, policy.Reason.HIDDEN), "1,000 + 1,000 + 6 * 50 < 800 + 6 * 1,050"
    assert decided(6, cached=0).reason is policy.Reason.LEVEL, "they share nothing"

    def split(coming, cached):
        return pytest.approx(decided(coming, cached, length=16_000).split, abs=1)

    assert split(6, 4_000) == 9_650, "800 + 6 * 6,350 here, 1,000 + 4,000 + 6 * 5,650 there"
    assert split(3, 16_000) == 11_950, "800 + 3 * 4,050 here, 1,000 + 11,950 there"


@given(st.lists(st.tuples(requests, decodes, fleets), max_size=20), settings)
def test_decide_same_sequence_decides_alike_on_every_rank(sequence, rules):
    def run():
        state, taken = policy.LoadState(), []
        for request, decode, fleet in sequence:
            decision, state = policy.decide_by_load(state, request, "a", decode, fleet, rules)
            taken.append(decision)
        return taken, state

    assert run() == run()


@given(states, decodes, fleets, settings, st.integers(-1, 40_000))
def test_decide_wish_is_taken_and_leaves_the_state_alone(state, decode, fleet, rules, wish):
    request = policy.Request(prompt_len=1000, wish=min(wish, 1000))
    decision, after = policy.decide_by_load(state, request, "a", decode, fleet, rules)
    whole = 1000 if request.wish == policy.WHOLE_PROMPT else request.wish
    assert decision.split == whole - whole % rules.page_size and after == state


def test_decide_unknown_instance_keeps_the_request_local():
    decision, _ = policy.decide_by_load(
        policy.LoadState(), policy.Request(prompt_len=500), "gone", BUSY, IDLE, policy.LoadSettings()
    )
    assert decision == policy.Decision(0, policy.Reason.NO_PEER)


def test_decide_equal_instances_end_up_balanced():
    """Ten thousand tokens in prompts of 500 over two equal bandwidths: half of them here, half there."""
    state, local, remote = policy.LoadState(), 0, 0
    for _ in range(20):
        decode = msgspec.structs.replace(BUSY, local_tokens=local, rows=1)
        fleet = {"a": msgspec.structs.replace(IDLE["a"], read_tokens=remote, pinned_tokens=remote)}
        decision, state = policy.decide_by_load(
            state, policy.Request(prompt_len=500), "a", decode, fleet, policy.LoadSettings()
        )
        remote += decision.split
        local += 500 - decision.split
    assert abs(local - remote) <= 500


def test_decide_single_long_prompt_is_split_where_both_sides_take_equally_long():
    decode = msgspec.structs.replace(BUSY, local_tokens=0, rows=0)
    assert split(policy.LoadState(), policy.Request(prompt_len=8192), decode, IDLE, policy.LoadSettings()) == 4096


def test_decide_other_instance_sets_the_level_fills_up_to_it():
    fleet = IDLE | {"b": msgspec.structs.replace(IDLE["a"], read_tokens=30_000)}
    decode = msgspec.structs.replace(BUSY, local_tokens=1_000)
    decision, _ = policy.decide_by_load(
        policy.LoadState(), policy.Request(prompt_len=20_000), "a", decode, fleet, policy.LoadSettings()
    )
    assert decision == policy.Decision(20_000, policy.Reason.HIDDEN)


def test_decide_full_decode_memory_overflows_until_the_slo():
    full = msgspec.structs.replace(BUSY, free_tokens=100, local_tokens=60_000, linear_s=0.03)
    fleet = {"a": msgspec.structs.replace(IDLE["a"], read_tokens=60_000, pinned_tokens=60_000)}
    request = policy.Request(prompt_len=700)

    def at(rules):
        return policy.decide_by_load(policy.LoadState(), request, "a", full, fleet, rules)[0]

    assert at(policy.LoadSettings()) == policy.Decision(700, policy.Reason.OVERFLOW)
    assert at(policy.LoadSettings(slo_tpot_s=0.04)).split == 0
    assert at(policy.LoadSettings(max_rows=80)).split == 0


def test_decide_full_decode_memory_where_remote_reads_cost_more_than_rows_save_waits():
    full = msgspec.structs.replace(BUSY, free_tokens=100, local_tokens=60_000, linear_s=0.0045)
    fleet = {"a": msgspec.structs.replace(IDLE["a"], read_tokens=60_000, pinned_tokens=60_000)}
    decision, _ = policy.decide_by_load(
        policy.LoadState(), policy.Request(prompt_len=700), "a", full, fleet, policy.LoadSettings()
    )
    assert decision == policy.Decision(0, policy.Reason.LEVEL)


def test_decide_no_room_here_and_an_idle_prefill_is_not_left_idle():
    """Though by its load of late prefill has little time to spare."""
    full = msgspec.structs.replace(BUSY, free_tokens=100, local_tokens=60_000, linear_s=0.03)
    request = policy.Request(prompt_len=700)

    def at(load, **changed):
        fleet = {"a": msgspec.structs.replace(IDLE["a"], read_tokens=60_000, prefill_load=load)}
        decode = msgspec.structs.replace(full, **changed)
        return policy.decide_by_load(policy.LoadState(), request, "a", decode, fleet, policy.LoadSettings())[0]

    assert at(0.8, computing=0) == policy.Decision(700, policy.Reason.OVERFLOW)
    assert at(0.8, computing=1).split == 0, "prefill has something to do"
    assert at(0.8).split == 0, "it may have"
    assert at(1.1, computing=0).split == 0, "it does not keep up"


def test_decide_full_decode_memory_of_which_less_is_read_overflows_sooner():
    full = msgspec.structs.replace(BUSY, free_tokens=100, local_tokens=60_000, linear_s=0.014)
    fleet = {"a": msgspec.structs.replace(IDLE["a"], read_tokens=60_000, pinned_tokens=60_000)}
    keeps = msgspec.structs.replace(full, kept_tokens=30_000)
    request = policy.Request(prompt_len=700)

    def reason(decode, occupied):
        rules = policy.LoadSettings(occupied=occupied)
        return policy.decide_by_load(policy.LoadState(), request, "a", decode, fleet, rules)[0].reason

    assert [reason(full, 1.0), reason(keeps, 1.0)] == [policy.Reason.LEVEL, policy.Reason.OVERFLOW]
    assert reason(full, 0.7) is policy.Reason.OVERFLOW


def test_decide_prompt_longer_than_decode_memory_stays_remote_as_far_as_needed():
    decode = msgspec.structs.replace(BUSY, pool_tokens=4_000, free_tokens=4_000, local_tokens=0, rows=0)
    decision, _ = policy.decide_by_load(
        policy.LoadState(), policy.Request(prompt_len=10_000), "a", decode, IDLE, policy.LoadSettings()
    )
    assert decision.reason is policy.Reason.TOO_LONG and 10_000 - decision.split <= 4_000


@given(states, requests, decodes, fleets, settings, st.floats(0, 1), st.floats(0, 1))
def test_decide_busier_prefill_never_offloads_more(state, request, decode, fleet, rules, more, longer):
    before = fleet["a"]
    lasting = None if before.lasting_load is None else before.lasting_load + longer
    busier = msgspec.structs.replace(before, prefill_load=before.prefill_load + more, lasting_load=lasting)
    assert split(state, request, decode, fleet | {"a": busier}, rules) <= split(state, request, decode, fleet, rules)


@given(states, requests, decodes, fleets, settings, st.floats(1, 8))
def test_decide_executor_that_takes_more_of_the_device_never_gets_more(state, request, decode, fleet, rules, times):
    pace = state.work_paces.get("a", Pace(0.01, 0.01))
    slower = Pace(pace.predicted_s, pace.took_s * times)
    more = msgspec.structs.replace(state, work_paces={**state.work_paces, "a": slower})
    assert split(more, request, decode, fleet, rules) <= split(state, request, decode, fleet, rules)


def test_decide_executor_is_charged_for_the_time_in_which_it_had_the_device():
    """Prefill leaves it half of the time. It takes long for want of the device, or because it needs it for long."""
    request, rules = policy.Request(prompt_len=900), policy.LoadSettings()
    fleet = {"a": msgspec.structs.replace(IDLE["a"], prefill_load=0.5, read_tokens=20_000)}
    half = {"a": Pace(0.01, 0.02)}
    waits = policy.LoadState(paces=half)
    works = policy.LoadState(paces=half, work_paces=half)
    assert split(waits, request, BUSY, fleet, rules) == 900
    decision, _ = policy.decide_by_load(works, request, "a", BUSY, fleet, rules)
    assert decision == policy.Decision(0, policy.Reason.PREFILL)


def test_decide_prefill_with_all_its_time_needed_is_left_alone():
    request, rules = policy.Request(prompt_len=900), policy.LoadSettings()
    busy = {"a": msgspec.structs.replace(IDLE["a"], prefill_load=1.05)}
    assert split(policy.LoadState(), request, BUSY, IDLE, rules) == 900
    decision, _ = policy.decide_by_load(policy.LoadState(), request, "a", BUSY, busy, rules)
    assert decision == policy.Decision(0, policy.Reason.PREFILL)


def test_decide_pressure_comes_and_goes_with_hysteresis():
    request, rules = policy.Request(prompt_len=1_000), policy.LoadSettings(relief=0.1)
    pressed = []
    state = policy.LoadState()
    for free in (5_000, 900, 5_000, 900, 10_900, 11_100, 5_000):
        decode = msgspec.structs.replace(BUSY, free_tokens=free)
        _, state = policy.decide_by_load(state, request, "a", decode, IDLE, rules)
        pressed.append(state.pressed)
    assert pressed == [False, True, True, True, True, False, False]


def test_decide_those_who_wait_behind_a_request_press_as_well():
    request, rules = policy.Request(prompt_len=1_000), policy.LoadSettings(relief=0.1)
    for waiting, pressed in ((3, False), (5, True)):
        decode = msgspec.structs.replace(BUSY, free_tokens=5_000, waiting=waiting)
        _, state = policy.decide_by_load(policy.LoadState(), request, "a", decode, IDLE, rules)
        assert state.pressed is pressed


def test_decide_reused_prefixes_keep_room_from_fresh_ones():
    state, rules = policy.LoadState(reuse=1.0), policy.LoadSettings(reuse_reserve=0.25)
    fleet = {"a": msgspec.structs.replace(IDLE["a"], read_tokens=49_900, pinned_tokens=49_900)}
    fresh = policy.Request(prompt_len=900)
    reused = policy.Request(prompt_len=900, cached_tokens=800)
    assert split(policy.LoadState(), fresh, BUSY, fleet, rules) == 900
    assert split(state, fresh, BUSY, fleet, rules) == 0
    assert split(state, reused, BUSY, fleet, rules) == 900


@given(states, requests, decodes, fleets, settings, st.floats(1, 4))
def test_decide_slower_attention_here_or_faster_there_never_offloads_less(state, request, decode, fleet, rules, factor):
    """As long as decode's memory is not what decides."""
    assume(request.prompt_len + decode.growth_tokens <= decode.pool_tokens)
    state = msgspec.structs.replace(state, pressed=False)
    decode = msgspec.structs.replace(decode, free_tokens=decode.pool_tokens)
    before = split(state, request, decode, fleet, rules)
    slower = msgspec.structs.replace(decode, attention_rate=decode.attention_rate / factor)
    faster = fleet | {"a": msgspec.structs.replace(fleet["a"], attention_rate=fleet["a"].attention_rate * factor)}
    assert split(state, request, slower, fleet, rules) >= before
    assert split(state, request, decode, faster, rules) >= before


def test_decide_short_prompt_goes_where_the_step_is_shorter_with_it():
    """Three small prompts and an executor that is three times as fast: one more of them would take longer there."""
    state, places = policy.LoadState(), []
    local = remote = 0
    for _ in range(4):
        decode = msgspec.structs.replace(BUSY, local_tokens=local, rows=1, attention_rate=2e6)
        fleet = {"a": msgspec.structs.replace(IDLE["a"], read_tokens=remote, pinned_tokens=remote)}
        decision, state = policy.decide_by_load(
            state, policy.Request(prompt_len=500), "a", decode, fleet, policy.LoadSettings()
        )
        places.append(decision.split)
        remote += decision.split
        local += 500 - decision.split
    assert places == [500, 500, 0, 500]


measurements = st.tuples(st.floats(1e-5, 0.1), st.floats(1e-5, 0.1))


@given(st.lists(measurements, min_size=1, max_size=30))
def test_pace_lies_between_the_single_measurements(measured):
    pace = Pace()
    for predicted_s, took_s in measured:
        pace = pace.add(predicted_s, took_s)
    single = [Pace().add(*one).rate for one in measured]
    assert SLOWEST <= min(single) - 1e-9 <= pace.rate <= max(single) + 1e-9 <= FASTEST + 1e-9 or min(single) == SLOWEST


@given(st.lists(measurements, max_size=9), measurements, st.floats(1, 10))
def test_pace_slower_measurement_never_makes_it_faster(before, last, factor):
    pace = Pace()
    for one in before:
        pace = pace.add(*one)
    predicted_s, took_s = last
    assert pace.add(predicted_s, took_s * factor).rate <= pace.add(predicted_s, took_s).rate


def test_pace_without_measurements_is_as_predicted():
    assert Pace().rate == 1.0
    assert Pace().add(0.0, 0.01) == Pace().add(0.01, 0.0) == Pace()


STEP_S, LOCAL_S = 0.02, 0.01


def seen(exposed, peer="a", remote_s=LOCAL_S):
    return policy.Observation(
        peer=peer,
        steps=50,
        step_s=STEP_S,
        predicted_step_s=STEP_S,
        exposed_wait_s=exposed,
        local_s=LOCAL_S,
        remote_s=remote_s,
    )


def run_observations(waits, limited=True, remote_s=LOCAL_S):
    current = policy.LoadState(limited=limited)
    for wait in waits:
        current = policy.observe(current, seen(wait * STEP_S, remote_s=remote_s), policy.LoadSettings())
    return current.rates.get("a", 1.0)


def test_observe_waits_inside_the_dead_band_change_nothing():
    assert run_observations([0.02, 0.04, 0.03] * 10) == 1.0


def test_observe_noise_around_the_band_does_not_flap():
    assert run_observations([0.2, 0.0] * 20) == 1.0
    assert run_observations([0.2, 0.2, 0.03, 0.0, 0.0] * 10) == 1.0


@given(st.floats(0.3, 1.9), st.floats(1.2, 3.0))
def test_observe_waits_tell_the_true_rate(true_rate, overload):
    """An instance with more to read than hides is found out, whatever it was taken for."""
    remote_s = true_rate * LOCAL_S * overload
    exposed = remote_s / true_rate - LOCAL_S
    current, rules = policy.LoadState(), policy.LoadSettings()
    for _ in range(60):
        current = policy.observe(current, seen(exposed, remote_s=remote_s), rules)
    assert abs(current.rates.get("a", 1.0) / true_rate - 1) < 0.06


def test_observe_idle_time_raises_the_rate_within_bounds_while_requests_are_limited():
    assert run_observations([0.0] * 2) == 1.0
    assert run_observations([0.0] * 3) == 1.1
    assert run_observations([0.0] * 300) == 2.0
    assert run_observations([0.0] * 300, limited=False) == 1.0


def test_observe_hidden_part_that_should_have_shown_raises_the_rate():
    """Taken to be too slow: what was read without a wait is a lower bound."""
    assert 1.0 < run_observations([0.0] * 30, limited=False, remote_s=1.5 * LOCAL_S) <= 1.5


def test_observe_waits_that_were_agreed_to_change_nothing():
    """Beyond what hides, because decode's memory is full or requests asked for it: no news about the rate."""
    assert run_observations([0.5] * 10, remote_s=2 * LOCAL_S) == 1.0


def test_observe_longer_steps_than_predicted_count_as_fixed_time():
    state = policy.LoadState()
    for _ in range(60):
        longer = msgspec.structs.replace(seen(0.0), step_s=STEP_S + 0.008)
        state = policy.observe(state, longer, policy.LoadSettings())
    assert abs(state.extra_s - 0.008) < 1e-4


def measured(local_rate, remote_rate, remote_s=LOCAL_S, trip_s=0.0):
    """Of a step whose two parts ran side by side at such rates, as shares of the views'."""
    span_s, executor_s = LOCAL_S / local_rate, remote_s / remote_rate
    answer_s = max(span_s, trip_s + executor_s)
    return msgspec.structs.replace(
        seen(answer_s - span_s, remote_s=remote_s),
        round_trip_s=1e-4,
        local_span_s=span_s,
        answer_s=answer_s,
        executor_s=executor_s,
    )


measured_rates = st.floats(0.2, 4.0)


@given(measured_rates, measured_rates)
def test_observe_measured_rates_are_known_after_one_window(local_rate, remote_rate):
    state = policy.observe(policy.LoadState(), measured(local_rate, remote_rate), policy.LoadSettings())
    assert state.local_pace.rate == pytest.approx(local_rate)
    assert state.rate_of("a") == pytest.approx(remote_rate)
    assert not state.votes and not state.rates


@given(st.lists(st.tuples(st.floats(0.8, 1.2), st.floats(0.8, 1.2)), min_size=2, max_size=40))
def test_observe_noise_of_measurements_does_not_grow(noise):
    """Rates stay within the noise, whatever they are decided by: nothing is tried beyond what was measured."""
    state, rules = policy.LoadState(limited=True), policy.LoadSettings()
    for here, there in noise:
        state = policy.observe(state, measured(0.5 * here, 2.0 * there), rules)
        assert state.local_pace.rate + 1e-9 >= 0.4 and state.local_pace.rate <= 0.6 + 1e-9
        assert state.rate_of("a") + 1e-9 >= 1.6 and state.rate_of("a") <= 2.4 + 1e-9


@given(st.floats(0, 0.02), st.floats(0.25, 4.0))
def test_observe_waits_tell_round_trips_and_hidden_ones_do_not_lengthen_them(trip_s, remote_s):
    """True rates, other round trips than predicted."""
    state, rules = policy.LoadState(), policy.LoadSettings()
    one = measured(1.0, 1.0, remote_s * LOCAL_S, trip_s)
    for _ in range(30):
        state = policy.observe(state, one, rules)
    learnt = state.trip_s("a", one.round_trip_s)
    if one.exposed_wait_s > one.local_span_s * 1.001:
        assert learnt == pytest.approx(trip_s, abs=1e-6)
    elif one.exposed_wait_s:
        assert 0.0 <= learnt <= max(trip_s, one.round_trip_s) + 1e-9
    else:
        assert 0.0 <= learnt <= one.round_trip_s + 1e-9


def test_observe_a_short_round_trip_that_was_seen_once_is_not_believed_for_good():
    """One measurement in ten says that answers came at once; in the others a fifth of the time is waited."""
    state, rules = policy.LoadState(), policy.LoadSettings()
    usual, odd = measured(1.0, 1.0, LOCAL_S, trip_s=0.25 * LOCAL_S), measured(1.0, 1.0, LOCAL_S)
    for _ in range(4):
        for one in [odd] + [usual] * 9:
            state = policy.observe(state, one, rules)
    assert state.trip_s("a", usual.round_trip_s) > 0.15 * LOCAL_S


def test_observe_halves_what_hides_beside_local_attention_is_no_round_trip():
    """Remote attention takes three times as long as local attention and is hidden under the other half's work."""
    seen_in_halves = msgspec.structs.replace(
        measured(1.0, 1.0, 3 * LOCAL_S), exposed_wait_s=0.0, answer_s=LOCAL_S, under_s=2.5 * LOCAL_S, round_trip_s=1e-3
    )
    state = policy.observe(policy.LoadState(), seen_in_halves, policy.LoadSettings())
    assert state.local_pace.rate == state.rate_of("a") == 1.0
    assert state.trip_s("a", 1e-3) == pytest.approx(1e-3)


def test_observe_executor_that_reported_once_is_never_guessed_again():
    state = policy.observe(policy.LoadState(limited=True), measured(1.0, 1.5), policy.LoadSettings())
    for _ in range(9):
        state = policy.observe(state, seen(0.0), policy.LoadSettings())
    assert state.rate_of("a") == pytest.approx(1.5) and not state.votes


@given(measured_rates, measured_rates, st.lists(st.integers(1, 4000), min_size=1, max_size=20), st.floats(1, 2000))
def test_unobserved_rates_turn_back_alike_however_the_steps_are_cut(local_rate, remote_rate, windows, life_steps):
    known = policy.observe(policy.LoadState(), measured(local_rate, remote_rate), policy.LoadSettings())
    by_windows, at_once = known, policy.unobserved(known, sum(windows), life_steps, ())
    for steps in windows:
        later = policy.unobserved(by_windows, steps, life_steps, ())
        for rate, before in (
            (later.rate_of("a"), by_windows.rate_of("a")),
            (later.local_pace.rate, by_windows.local_pace.rate),
        ):
            assert abs(math.log(rate)) <= abs(math.log(before)) + 1e-9
        by_windows = later
    assert by_windows.rate_of("a") == pytest.approx(at_once.rate_of("a"))
    assert by_windows.local_pace.rate == pytest.approx(at_once.local_pace.rate)
    assert by_windows.trip_s("a", 1e-3) == pytest.approx(at_once.trip_s("a", 1e-3))


def test_unobserved_only_what_was_not_measured_is_forgotten():
    state, rules = policy.LoadState(), policy.LoadSettings()
    for name in "ab":
        state = policy.observe(state, msgspec.structs.replace(measured(0.5, 0.25), peer=name), rules)
    assert policy.unobserved(state, 50, 100.0, {"a", "b"}) == state
    later = policy.unobserved(state, 100_000, 100.0, {"a"})
    assert (later.rate_of("a"), later.local_pace, later.extra_s) == (0.25, state.local_pace, state.extra_s)
    assert later.rate_of("b") == pytest.approx(1.0)
    anew = policy.observe(later, msgspec.structs.replace(measured(0.5, 0.5), peer="b"), rules)
    assert anew.rate_of("b") == pytest.approx(0.5)


@given(st.permutations(["a", "b", "c"]))
def test_observe_peers_in_any_order_give_the_same_rates(order):
    def after(names):
        state = policy.LoadState()
        for _, name in itertools.product(range(3), names):
            state = policy.observe(state, seen(0.004, name), policy.LoadSettings())
        return state.rates

    assert after(order) == after(["a", "b", "c"])


def test_bounds_paper_formulas():
    peer = policy.PrefillView(
        pool_tokens=100_000, pinned_tokens=30_000, read_tokens=0, lanes_free=1, attention_rate=3e6
    )
    bounds = policy.offload_bounds(BUSY, [peer, peer], policy.LoadSettings(), rows_max=180, rows_slo=100)
    assert (bounds.memory, bounds.bandwidth, bounds.compute) == (1.8, 1.0, 0.8)
    assert (bounds.mem, bounds.bound) == (1.0, 0.8)


def test_output_lengths_alike_expect_half_an_output_and_varied_ones_what_is_there():
    alike = varied = policy.OutputLengths()
    assert alike.expected_tokens(1_000, 600, 9) == 1_000
    for _ in range(500):
        alike, varied = alike.add(512), varied.add(10).add(10).add(10).add(2_000)
    assert alike.expected_tokens(1_000, 600, 9) == 600 + 10 * 256
    assert varied.expected_tokens(1_000, 600, 9) == 1_000
    grown = policy.OutputLengths().add(32)  # outputs have become longer: no request has ended yet
    assert grown.expected_tokens(600 + 9 * 200, 600, 9) == 600 + 10 * 100


@given(st.lists(st.tuples(st.integers(0, 50), st.integers(0, 20)), max_size=60))
def test_duty_is_a_share_and_forgets(steps):
    duty = policy.Duty()
    for running, waiting in steps:
        duty = duty.add(running, running + waiting)
        assert 0.0 < duty.share <= 1.0
    for _ in range(100):
        duty = duty.add(3, 12)
    assert duty.share == pytest.approx(0.25, abs=1e-3)
    assert duty.add(0, 0) == duty.add(0, 7) == duty  # no step, no news


POINTS = [
    policy.SharePoint(executor_share=share, attention_rate=rate, prefill_factor=prefill)
    for share, rate, prefill in ((0.1, 2e6, 0.75), (0.25, 4e6, 0.625), (0.5, 5.5e6, 0.425), (1.0, 6e6, 0.125))
]


@given(st.floats(0, 50), st.floats(0.01, 0.99))
def test_choose_share_more_load_or_a_tighter_objective_never_takes_more(requests_s, fraction):
    def share(requests_s, slo):
        load = policy.PrefillLoad(requests_s=requests_s, prompt_s=512 / 40e3)
        return policy.choose_share(POINTS, load, slo).executor_share

    assert share(requests_s, 1.0) <= share(requests_s * fraction, 1.0)
    assert share(requests_s, fraction) <= share(requests_s, 1.0)


def test_choose_share_idle_takes_the_fastest_and_overload_the_smallest():
    assert policy.choose_share(POINTS, policy.PrefillLoad(requests_s=0, prompt_s=512 / 40e3), 1.0).executor_share == 1.0
    assert (
        policy.choose_share(POINTS, policy.PrefillLoad(requests_s=999, prompt_s=512 / 40e3), 1.0).executor_share == 0.1
    )


def test_choose_share_growing_needs_room_to_spare():
    # 0.5 carries up to about 29.8 requests/s of 512 tokens; at 28 it does, with a tenth more it would not.
    load = policy.PrefillLoad(requests_s=28, prompt_s=512 / 40e3)
    assert policy.choose_share(POINTS, load, 1.0, current=0.5).executor_share == 0.5
    assert policy.choose_share(POINTS, load, 1.0, current=0.25).executor_share == 0.25
