"""The simulator: closed forms against step-by-step sums, nothing lost, known extremes, refusals, the policy at work."""

import json

import pytest
from figures_of_models import LLAMA2_7B
from hypothesis import example, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from sglang_adrenaline import policy
from sglang_adrenaline.cost_model import CostModel
from sglang_adrenaline.profile_data import datasheet_profile
from sglang_adrenaline.simulate import trace
from sglang_adrenaline.simulate.__main__ import main
from sglang_adrenaline.simulate.decode import DecodeRules
from sglang_adrenaline.simulate.fleet import AggregatedFleet, DisaggregatedFleet, Shape
from sglang_adrenaline.simulate.prefill import Prefill
from sglang_adrenaline.simulate.steps import run_time, steps_until

CONFIG = {
    "num_hidden_layers": 32,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_attention_heads": 32,
    "vocab_size": 32000,
}
COST = CostModel(datasheet_profile("H100", LLAMA2_7B))

runs = {
    "rows": st.integers(1, 300),
    "local": st.integers(0, 10**5),
    "a": st.floats(1e-8, 1e-5),
    "remote": st.floats(0, 0.05),
    "fixed": st.floats(1e-4, 0.05),
}


def by_steps(steps, rows, local, a, remote, fixed):
    attention = [(local + step * rows) * a for step in range(steps)]
    exposed = sum(max(remote - own, 0) for own in attention)
    return steps * fixed + sum(attention) + exposed, exposed


@given(steps=st.integers(0, 300), **runs)
def test_run_time_equals_the_sum_over_its_steps(steps, **run):
    assert run_time(steps, **run) == pytest.approx(by_steps(steps, **run), rel=1e-9, abs=1e-12)


@given(seconds=st.floats(0, 5), **runs)
@example(seconds=1.0, rows=1, local=0, a=1e-8, remote=0.05, fixed=0.05)
def test_steps_until_is_the_first_boundary_not_before(seconds, **run):
    steps = steps_until(seconds, **run)
    assert run_time(steps, **run)[0] >= seconds * (1 - 1e-6)
    assert steps == 1 or run_time(steps - 1, **run)[0] <= seconds * (1 + 1e-6)


def requests_of(lengths, blocks=False):
    return [
        trace.Req(at, prompt, output, tuple(range(prompt // 512)) if blocks else ()) for at, prompt, output in lengths
    ]


def fleet_of(offload, *, pool=20_000, prefills=1, decodes=1, groups=1, cost=COST, **changes):
    shape = Shape(prefills=prefills, decodes=decodes, groups=groups, pool_tokens=pool)
    if offload == "dp":
        return AggregatedFleet(shape, cost)
    rules = {"reserve_tokens": changes.pop("reserve_tokens", 64), "at_arrival": changes.pop("at_arrival", False)}
    return DisaggregatedFleet(
        shape, cost, DecodeRules(offload=offload, settings=policy.LoadSettings(**changes), lanes=256, **rules)
    )


loads = st.lists(st.tuples(st.floats(0, 3), st.integers(1, 6_000), st.integers(1, 700)), min_size=1, max_size=60).map(
    sorted
)


@hypothesis_settings(deadline=None)
@given(
    loads,
    st.sampled_from([None, "dp", "auto", 0.0, 0.7, 1.0]),
    st.sampled_from([(1, 1, 1), (2, 2, 1), (2, 1, 2)]),
    st.booleans(),
    st.booleans(),
)
def test_fleet_any_load_finishes_every_request_and_leaves_nothing(lengths, offload, xpyd, blocks, arrival):
    prefills, decodes, groups = xpyd
    fleet = fleet_of(offload, prefills=prefills, decodes=decodes, groups=groups, at_arrival=arrival)
    requests = requests_of(lengths, blocks)
    fleet.run(requests)
    for request in requests:
        assert request.arrival < request.first <= request.finish and request.produced == request.output
    for instance in fleet.instances():
        assert (instance.used, instance.outstanding, instance.batch.rows, instance.batch.local) == (0, 0, 0, 0)
        assert not instance.waiting
    for prefills_of, decodes_of in getattr(fleet, "groups", []):
        for prefill in prefills_of:
            assert (prefill.pinned, prefill.kept, prefill.reading) == (0, 0, 0)
            assert (prefill.lanes_in_use, prefill.cache.pins.keepers) == (0, {})
        for decode in decodes_of:
            assert (decode.active, decode.coming_local, decode.local_prompts, decode.remote_rows) == (0, 0, 0, 0)
            assert not any(decode.under_way.values()) and decode.under_way_tokens == 0


@pytest.mark.parametrize("prefills", [1, 2])
def test_auto_takes_requests_in_as_far_ahead_of_prefill_as_the_runtime_does(prefills, monkeypatch):
    pool, ahead = 4096, []

    def record(self, request, now):
        others = [r for r in requests if r is not request and r.split >= 0 and r.first < 0]
        held = sum(other.prompt - other.split for other in others)
        ahead.append((sum(other.prefill == self.index for other in others), held))
        return submit(self, request, now)

    submit = Prefill.submit
    monkeypatch.setattr(Prefill, "submit", record)
    requests = trace.fixed_lengths(40, None, 512, 64, 0)
    fleet_of("auto", pool=pool, prefills=prefills).run(requests)
    assert len(ahead) == 40 and max(count for count, _ in ahead) >= 1
    assert not any(policy.has_enough(count, held, pool) for count, held in ahead)


def test_fleet_single_request_takes_what_the_cost_model_says():
    request = trace.Req(0.0, 1000, 11)
    fleet_of(None).run([request])
    prefill = COST.profile.prefill_fixed_s + COST.prefill_s(1000)
    assert request.first == pytest.approx(prefill + COST.transfer_s(1000))
    steps = sum(COST.step_s(1, 1001 + step) for step in range(10))
    assert request.finish - request.first == pytest.approx(steps)


def test_fleet_whole_prompt_remote_is_not_transferred_and_read_by_the_executor():
    request = trace.Req(0.0, 1000, 11)
    fleet_of(1.0).run([request])
    assert request.split == 1000
    assert request.first == pytest.approx(COST.profile.prefill_fixed_s + COST.prefill_s(1000))
    remote = (1000, COST.attention_rate, COST.round_trip_s(1))
    assert request.finish - request.first == pytest.approx(10 * COST.step_s(1, 1, [remote]))


def throughput(offload, requests, pool=110_893):
    fleet = fleet_of(offload, pool=pool, reserve_tokens=512)
    fleet.run(requests)
    return sum(r.output for r in requests) / max(r.finish for r in requests)


def test_policy_auto_is_near_the_best_fixed_ratio_and_far_above_stock():
    """Saturated, 512 tokens in and out, on figures of H100s: the workload of the paper's claim."""

    def run(offload):
        return throughput(offload, trace.fixed_lengths(1500, None, 512, 512, 0))

    best = max(run(ratio / 20) for ratio in range(21))
    auto = run("auto")
    assert auto >= 0.97 * best
    assert auto >= 1.45 * run(None)


def test_policy_auto_leaves_a_deployment_alone_that_prefill_bounds():
    def run(offload):
        return throughput(offload, trace.fixed_lengths(400, None, 4096, 256, 0), pool=400_000)

    assert run("auto") >= 0.97 * run(None)
    assert run(1.0) < 0.95 * run(None)


def test_policy_feedback_lessens_what_a_slow_executor_costs(monkeypatch):
    """The executor reaches half of what the policy is told; its reports say so."""

    def waited(monkeypatch=None):
        shape = Shape(prefills=1, decodes=1, pool_tokens=110_893, rate_error=0.5)
        fleet = DisaggregatedFleet(shape, COST, DecodeRules(offload="auto", settings=policy.LoadSettings(), lanes=256))
        if monkeypatch is not None:
            monkeypatch.setattr(policy, "observe", lambda state, *_: state)
        fleet.run(trace.sharegpt_like(3000, 30.0, 0))
        decode = fleet.instances()[0]
        return decode.batch.exposed_s / decode.batch.busy_s, decode.state.rate_of("0")

    with_feedback, rate = waited()
    without, unchanged = waited(monkeypatch)
    assert unchanged == 1.0 and 0.45 < rate < 0.55
    assert with_feedback < 0.75 * without


@pytest.mark.parametrize("offload", ["dp", None, "auto"])
def test_fleet_with_concurrency_has_never_more_requests_under_way(offload):
    requests = requests_of([(0.0, 500 + 10 * index, 1 + index) for index in range(40)])
    fleet_of(offload).run(requests, concurrency=5)
    for request in requests:
        under_way = sum(r.arrival <= request.arrival < r.finish for r in requests)
        assert request.finish > 0 and under_way <= 5
    assert max(r.arrival for r in requests) > 0


def test_shared_prefixes_are_pinned_once():
    requests = [trace.Req(0.0, 5000, 50, tuple(range(9))) for _ in range(40)]
    fleet = fleet_of(1.0, pool=20_000, reserve_tokens=64)
    most = 0
    original = fleet.groups[0][0][0].pin

    def pin(*args):
        nonlocal most
        original(*args)
        most = max(most, fleet.groups[0][0][0].pinned)

    fleet.groups[0][0][0].pin = pin
    fleet.run(requests)
    # 9 blocks once, and what each request has beyond its last whole block
    assert sum(request.split == 5000 for request in requests) > 10
    assert 9 * 512 < most <= 9 * 512 + 40 * (5000 - 9 * 512)


MOONCAKE = [
    {"timestamp": 0, "input_length": 1200, "output_length": 20, "hash_ids": [1, 2, 3]},
    {"timestamp": 1500.5, "input_length": 1300, "output_length": 30, "hash_ids": [1, 2, 4]},
]


@pytest.fixture
def model(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(CONFIG))
    return str(path)


def write_trace(tmp_path, lines):
    path = tmp_path / "trace.jsonl"
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return str(path)


def test_mooncake_trace_is_read_copied_and_scaled(tmp_path):
    path = write_trace(tmp_path, MOONCAKE)
    requests = trace.load_mooncake(path, copies=2, time_scale=0.5)
    assert [(r.arrival, r.prompt, r.output) for r in requests] == [(0, 1200, 20)] * 2 + [(0.75025, 1300, 30)] * 2
    first, second, *_ = requests
    assert not set(first.blocks) & set(second.blocks)
    assert set(first.blocks) & set(requests[2].blocks)


def test_main_writes_table_json_and_plot(tmp_path, model, capsys):
    out = tmp_path / "out"
    arguments = ["--trace", write_trace(tmp_path, MOONCAKE), "--model-path", model, "--out", str(out)]
    assert main([*arguments, "--slo-ttft-ms", "2000", "--slo-tpot-ms", "25"]) == 0
    printed = capsys.readouterr().out
    assert "nothing measured" in printed and all(name in printed for name in ("pd", "dp", "adrenaline auto"))
    results = json.loads((out / "simulation.json").read_text())["results"]
    assert [result["system"] for result in results] == ["pd", "dp", "adrenaline auto"]
    assert all(result["requests"] == 2 and result["within_slo"] == 1 for result in results)
    assert (out / "simulation.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(file.name for file in out.iterdir()) == ["simulation.json", "simulation.png"]


def test_main_same_seed_gives_the_same_figures(model, capsys):
    def run():
        assert main(["--model-path", model, "--requests", "200", "--rate", "30", "--systems", "adrenaline"]) == 0
        return capsys.readouterr().out.splitlines()[-1].rsplit("|", 2)[0]  # but for the CPU time

    assert run() == run()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--requests", "0"], "not in 1"),
        (["--requests", "many"], "no number"),
        (["--rate", "nan"], "not in"),
        (["--surplus"], "--surplus"),
        (["--systems", "pd,pp"], "'pp' is none of"),
        (["--offload-ratio", "auto,1.5"], "not in 0..1"),
        (["--slo-tpot-ms", "1"], "a step of a single request takes"),
        (["--device", "Abacus"], "no data sheet"),
        (["--profile", "none.json"], "cannot read profile"),
        (["--trace", "none.jsonl"], "cannot read trace"),
        (["--pool-tokens", "1000"], "does not fit"),
        (["--tp", "5"], "divided"),
        (["--executor-share", "auto"], "needs --rate"),
        (["--rate", "2", "--concurrency", "2"], "exclude each other"),
        (["--trace", "fixed", "--input-len", "500000"], "no request"),
    ],
)
def test_main_what_cannot_be_simulated_gets_one_line_and_leaves_nothing(tmp_path, model, capsys, arguments, said):
    out = tmp_path / "out"
    assert main(["--model-path", model, "--out", str(out), *arguments]) == 1
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
    assert not out.exists()


@pytest.mark.parametrize(
    "line",
    [
        "{",
        "[]",
        "nonsense",
        {"timestamp": 0, "input_length": 0, "output_length": 5},
        {"timestamp": -1, "input_length": 5, "output_length": 5},
        {"timestamp": 0, "input_length": 5},
        {"timestamp": 0, "input_length": "5", "output_length": 5},
        {"timestamp": 0, "input_length": 5, "output_length": 5, "hash_ids": ["a"]},
    ],
)
def test_main_bad_trace_line_is_named(tmp_path, model, capsys, line):
    path = write_trace(tmp_path, [MOONCAKE[0], line])
    assert main(["--model-path", model, "--trace", path]) == 1
    error = capsys.readouterr().err
    assert "line 2" in error and error.count("\n") == 1


def test_main_empty_trace_is_refused(tmp_path, model, capsys):
    assert main(["--model-path", model, "--trace", write_trace(tmp_path, [""])]) == 1
    assert "no requests" in capsys.readouterr().err
