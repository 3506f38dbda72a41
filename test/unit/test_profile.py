"""`python -m sglang_adrenaline.profile` on this CPU with a tiny model: what it writes, what it refuses."""

import json

import pytest

from sglang_adrenaline import profile
from sglang_adrenaline.errors import ConfigError
from sglang_adrenaline.profile_data import load_profile
from sglang_adrenaline.profiling.gpu import medians_of_overlap
from sglang_adrenaline.simulate.__main__ import main as simulate

TINY = {
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 256,
}


@pytest.fixture
def model(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(TINY))
    return str(path)


def test_profile_measures_this_cpu_and_the_simulator_reads_it(tmp_path, model, capsys):
    out = tmp_path / "cpu.json"
    arguments = ["--model-path", model, "--out", str(out), "--device", "cpu", "--dtype", "float32", "--threads", "1"]
    assert profile.main([*arguments, "--budget-s", "0.02", "--slo-tpot-ms", "100"]) == 0
    printed = capsys.readouterr().out
    assert "B_max" in printed and "B_TPOT" in printed
    measured = load_profile(str(out))
    assert measured.source == "measured" and measured.device.startswith("CPU") and measured.model.num_layers == 2
    assert measured.model.kv_token_bytes == 2 * 2 * 2 * 16 * 4
    by_rows = {point.rows: point.seconds for point in measured.linear}
    assert by_rows[64] > by_rows[1] / 2  # noise aside, more rows take longer
    assert 1e5 < measured.attention_bytes_s < 1e12
    assert all(1e-6 < trip.seconds < 1 for trip in measured.round_trip)
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["config.json", "cpu.json", "cpu.png"]
    assert simulate(["--profile", str(out), "--pool-tokens", "4000", "--requests", "20", "--concurrency", "4"]) == 0
    assert "4 at a time" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--out", "{tmp}/none/x.json"], "existing directory"),
        (["--out", "{tmp}/x.txt"], "must name a .json"),
        (["--model-path", "{tmp}/none"], "no model shape"),
        (["--budget-s", "0"], "not in"),
        (["--device", "tpu"], "invalid choice"),
        (["--threads", "x"], "no number"),
    ],
)
def test_profile_bad_option_gets_one_line_and_writes_nothing(tmp_path, model, capsys, arguments, said):
    default = ["--model-path", model, "--out", str(tmp_path / "x.json"), "--device", "cpu"]
    assert profile.main([*default, *(part.format(tmp=tmp_path) for part in arguments)]) == 1
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
    assert [file.name for file in tmp_path.iterdir()] == ["config.json"]


def test_side_by_side_counts_only_what_ran_while_both_did():
    executor = [(0.0, 1.0), (1.0, 2.0), (2.0, 4.0), (4.0, 6.0), (6.0, 6.5)]  # faster where prefill is not there
    prefill = [(1.5, 3.0), (3.0, 4.5), (4.5, 6.1)]
    assert medians_of_overlap(executor, prefill) == pytest.approx((2.0, 1.5))
    with pytest.raises(ConfigError, match="side by side"):
        medians_of_overlap([(0.0, 1.0), (1.0, 2.0)], [(3.0, 4.0), (4.0, 5.0)])
