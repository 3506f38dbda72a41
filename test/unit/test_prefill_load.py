"""Prefill's load: what the simulator and the measured figure share, and how the latter learns what prompts cost."""

from __future__ import annotations

import math

import pytest
from figures_of_models import LLAMA2_7B
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_adrenaline.cost_model import WHOLE_DEVICE, CostModel
from sglang_adrenaline.policy.prefill_load import BRISK_S, LASTING_S, LIVES, PATIENCE_S, ArrivedWork, load_over
from sglang_adrenaline.prefill.load_meter import LoadMeter
from sglang_adrenaline.profile_data import datasheet_profile
from sglang_adrenaline.simulate.prefill import Prefill
from sglang_adrenaline.simulate.trace import Req

LOOP_S = 0.05
REPORT_S = 1.0


class Server:
    """Prefill that computes one prompt after another, `slow` times as slowly as the meter expects, with its meter."""

    def __init__(self, expected_s, slow: float = 1.0) -> None:
        self.meter = LoadMeter(expected_s)
        self.now = 0.0
        self._expected_s, self._slow = expected_s, slow
        self._queue: list[int] = []
        self._left_s = 0.0
        self._reported = 0.0
        self._worked_s = 0.0

    def submit(self, tokens: int) -> None:
        self._queue.append(tokens)

    def loop(self, *, alone: bool = True, speed: float = 1.0) -> None:
        """speed: of prefill beside whatever else uses the device; 1 if it is alone."""
        self.now += LOOP_S
        budget_s = LOOP_S * speed
        while self._queue and budget_s > 0.0:
            self._left_s = self._left_s or self._slow * self._expected_s(self._queue[0], 0)
            done_s = min(self._left_s, budget_s)
            budget_s -= done_s
            self._left_s -= done_s
            self._worked_s += done_s / speed
            if self._left_s <= 1e-12:
                self._left_s = 0.0
                self.meter.computed(self._queue.pop(0), 0)
        self.meter.ran(self.now, self._worked_s, busy=True, alone=alone)
        if self.now - self._reported >= REPORT_S - 1e-9:
            self._reported = self.now
            begun = [(tokens, 0) for tokens in self._queue[: 1 if self._left_s else 0]]
            self.meter.report(self.now, begun=begun, waiting=self._queue[len(begun) :])


def by_token(new: int, cached: int) -> float:
    return new * 1e-3


def as_reported(rate: float, window_s: float) -> float:
    """So much work a second: a report counts all that came since the last one as if it had come just now."""
    late = REPORT_S / window_s
    return rate * late / -math.expm1(-late)


def drive(server: Server, seconds: float, work_s: float, tokens: int = 100, **loop: object) -> None:
    """So much work a second, in prompts of so many tokens."""
    each_s = tokens * 1e-3 * server._slow
    due = 0.0
    for _ in range(round(seconds / LOOP_S)):
        due += work_s * LOOP_S / each_s
        while due >= 1.0:
            server.submit(tokens)
            due -= 1.0
        server.loop(**loop)


@given(
    st.lists(st.tuples(st.floats(0, 30), st.floats(-5, 20), st.floats(0, 60))),
    st.sampled_from([BRISK_S, LASTING_S]),
)
def test_arrived_work_is_never_negative_and_grows_with_what_waits(events, window_s):
    work, now = ArrivedWork(window_s), 0.0
    for pause, work_s, wait_s in events:
        now += pause
        work.add(now, work_s)
        load = work.load(now, wait_s)
        assert load >= 0.0
        assert work.load(now, wait_s + 1.0) >= load >= work.load(now + 1.0, wait_s)
        assert work.load(now, min(wait_s, PATIENCE_S)) == work.load(now, 0.0)


@settings(max_examples=30, deadline=None)
@given(st.floats(0.05, 3.0), st.floats(0.3, 5.0))
def test_steady_work_is_its_own_load_also_where_prefill_cannot_keep_up(rate, slow):
    """Beyond 1 by as much as comes; what has waited longer than PATIENCE_S is on top."""
    server = Server(by_token, slow)
    drive(server, 60.0, 0.9, tokens=20)
    drive(server, 60.0, rate, tokens=20)
    overdue_s = max(60.0 * max(rate - 1.0, 0.0) - PATIENCE_S, 0.0)
    for load, window_s in ((server.meter.load, BRISK_S), (server.meter.lasting_load, LASTING_S)):
        assert load == pytest.approx(as_reported(rate, window_s) + overdue_s / window_s, rel=0.1, abs=0.02)


@settings(max_examples=30, deadline=None)
@given(st.floats(0.2, 5.0))
def test_slowness_is_learned_and_kept_while_the_device_is_shared(slow):
    server = Server(by_token, slow)
    drive(server, 40.0, 0.6)
    assert server.meter.slowness == pytest.approx(slow, rel=0.1)
    drive(server, 40.0, 0.6, alone=False, speed=0.7)
    assert server.meter.slowness == pytest.approx(slow, rel=0.1), "prefill's time beside the executor is not its work"
    assert server.meter.load == pytest.approx(0.6, rel=0.2)


def test_kernels_compiled_for_a_first_short_prompt_teach_next_to_nothing():
    meter = LoadMeter(by_token)
    meter.ran(0.0, 0.0, busy=False, alone=True)
    meter.computed(4, 0)
    meter.ran(8.0, 8.0, busy=True, alone=True)
    meter.report(8.0, begun=[], waiting=[])
    assert 1.0 <= meter.slowness < 1.02
    assert meter.load < 0.01


@pytest.mark.parametrize("reports_every", [1, 2, 3])
def test_slowness_is_not_overrated_where_work_is_seen_a_batch_before_its_prompts_are_done(reports_every):
    """As in SGLang's loop: a batch runs, then the one before it is done; large and small batches take turns."""
    meter, slow, now, before = LoadMeter(by_token), 2.0, 0.0, 0
    for loop in range(200):
        tokens = (900, 100)[loop % 2]
        now += slow * by_token(tokens, 0)
        if before:
            meter.computed(before, 0)
        meter.ran(now, now, busy=True, alone=True, ahead=True)
        if loop % reports_every == 0:
            meter.report(now, begun=[], waiting=[])
        before = tokens
    assert meter.slowness == pytest.approx(slow, rel=0.1)


def test_an_idle_server_is_forgotten_to_have_been_busy_but_not_what_prompts_cost():
    server = Server(by_token, 3.0)
    drive(server, 40.0, 0.9)
    learned = server.meter.slowness
    drive(server, 8 * LASTING_S, 0.0)
    assert server.meter.load < 1e-2 and server.meter.lasting_load < 1e-2
    assert server.meter.slowness == pytest.approx(learned, rel=0.05)


@settings(max_examples=30, deadline=None)
@given(st.floats(0.3, 0.9), st.floats(0.2, 0.9))
def test_a_shift_shows_in_decisions_about_requests_before_it_shows_in_the_share(before, after):
    """Two windows after a shift its load is known to a seventh of what changed, give or take a prompt."""
    server, seconds = Server(by_token), 2 * BRISK_S
    drive(server, 60.0, before, tokens=20)
    drive(server, seconds, after, tokens=20)
    for load, window_s in ((server.meter.load, BRISK_S), (server.meter.lasting_load, LASTING_S)):
        now = after + (before - after) * math.exp(-seconds / window_s)
        assert load == pytest.approx(as_reported(now, window_s), abs=0.05)


@given(st.floats(0, 100), st.floats(0, 100), st.floats(0, 3), st.floats(0, 3))
def test_the_load_of_a_request_is_brisk_for_short_lives_and_lasting_for_long_ones(life_s, longer_s, brisk, lasting):
    load = load_over(life_s, brisk, lasting)
    assert min(brisk, lasting) - 1e-9 <= load <= max(brisk, lasting) + 1e-9
    assert load_over(min(life_s, BRISK_S / LIVES), brisk, lasting) == brisk
    assert load_over(max(life_s, LASTING_S / LIVES), brisk, lasting) == pytest.approx(lasting)
    assert abs(load_over(life_s + longer_s, brisk, lasting) - lasting) <= abs(load - lasting) + 1e-9


def test_prompts_that_leave_uncomputed_are_no_work():
    meter = LoadMeter(by_token)
    meter.report(1.0, begun=[], waiting=[1000] * 5)
    assert meter.load == pytest.approx((5.0 + 5.0 - PATIENCE_S) / BRISK_S)
    meter.report(1.5, begun=[], waiting=[])
    assert meter.load == 0.0


def test_waiting_prompts_are_taken_to_be_cached_as_others_were():
    meter = LoadMeter(by_token)
    for _ in range(100):
        meter.computed(100, 900)
    meter.report(0.0, begun=[], waiting=[])
    before = meter.load
    meter.report(0.0, begun=[], waiting=[1000] * 10)
    assert meter.load - before == pytest.approx(10 * 0.1 / BRISK_S, rel=0.05)


@settings(deadline=None)
@given(st.lists(st.tuples(st.floats(0.0, 3.0), st.integers(16, 12_000)), min_size=1, max_size=40))
def test_the_measured_figure_is_the_simulators(requests):
    """Same arrivals, same costs: they differ by a prompt (the one that is being computed) and a report's delay."""
    cost = CostModel(datasheet_profile("A100", LLAMA2_7B))
    simulated = Prefill(0, cost, 10**9, WHOLE_DEVICE)
    server = Server(lambda new, cached: cost.prefill_s(new, cached) + cost.profile.prefill_fixed_s)
    due = 0.0
    longest_s = 0.0
    for pause, tokens in requests:
        due += pause
        while server.now < due:
            server.loop()
        server.submit(tokens)
        simulated.submit(Req(server.now, tokens, 1), server.now)
        longest_s = max(longest_s, cost.prefill_s(tokens) + cost.profile.prefill_fixed_s)
    while server.now % REPORT_S > LOOP_S / 2:
        server.loop()
    bound = 3 * (longest_s + LOOP_S) / BRISK_S
    late = 1.0 - math.exp(-REPORT_S / BRISK_S)
    load, _ = simulated.loads(server.now)
    assert server.meter.load == pytest.approx(load, abs=bound + late * load)
