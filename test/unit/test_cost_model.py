"""Cost model and profile files: formulas against a hand-made model, files that are refused."""

import json
import math

import msgspec
import pytest
from figures_of_models import LLAMA2_7B
from hypothesis import given
from hypothesis import strategies as st

from sglang_adrenaline.cost_model import CostModel
from sglang_adrenaline.errors import ConfigError
from sglang_adrenaline.figures import model_from_config
from sglang_adrenaline.profile_data import datasheet_profile, encode_profile, load_profile, write_whole

H100 = CostModel(datasheet_profile("NVIDIA H100 80GB HBM3", LLAMA2_7B))


def test_model_sizes_are_those_of_llama2_7b():
    assert LLAMA2_7B.kv_token_bytes == 524_288
    assert LLAMA2_7B.linear_parameters == pytest.approx(6.61e9, rel=0.001)  # 6.74e9 less the embedding table


def test_datasheet_reproduces_what_was_measured_on_an_h100():
    """Figures of two H100 with SGLang 0.5.17: 110,893 tokens of KV, 4.5 ms of weights, 14 ms of attention."""
    assert H100.pool_tokens() == pytest.approx(110_893, rel=0.02)
    assert H100.linear_s(108) == pytest.approx(4.5e-3, rel=0.1)
    assert H100.step_s(108, 108 * 768) - H100.linear_s(108) == pytest.approx(14e-3, rel=0.1)


@given(st.integers(1, 4000), st.integers(1, 500), st.integers(0, 10**6), st.integers(0, 10**6))
def test_step_time_grows_with_rows_and_tokens(rows, more, local, remote):
    def step(rows, local, remote):
        return H100.step_s(rows, local, [(remote, H100.attention_rate, H100.round_trip_s(rows))])

    base = step(rows, local, remote)
    assert step(rows + more, local, remote) >= base
    assert step(rows, local + more, remote) >= base
    assert step(rows, local, remote + more) >= base


def test_remote_time_below_local_time_costs_the_overhead_only():
    hidden = H100.step_s(100, 50_000, [(20_000, H100.attention_rate, H100.round_trip_s(50))])
    assert hidden - H100.step_s(100, 50_000) == pytest.approx(H100.overhead_s)


def test_linear_between_points_interpolates_and_extrapolates():
    points = {point.rows: point.seconds for point in H100.profile.linear}
    fixed = H100.profile.step_fixed_s
    assert H100.linear_s(512) == fixed + points[512]
    assert H100.linear_s(768) == pytest.approx(fixed + (points[512] + points[1024]) / 2)
    assert H100.linear_s(4096) == pytest.approx(fixed + points[2048] * 2)
    assert H100.linear_s(0) == 0


def test_rows_max_is_where_the_data_sheet_turns_compute_bound():
    # bytes / bandwidth = 2 * parameters * rows / flops, with the efficiencies of either
    assert H100.rows_max() == pytest.approx(989e12 * 0.55 / (3.35e12 * 0.89), abs=1)


def test_rows_within_is_the_largest_batch_within_the_objective():
    rows = H100.rows_within(0.020, 768, 10**9)
    assert H100.step_s(rows, rows * 768) <= 0.020 < H100.step_s(rows + 1, (rows + 1) * 768)
    assert H100.rows_within(None, 1024, 110_893) == 108
    assert H100.rows_within(1e-6, 768, 10**9) == 0


def test_profile_written_is_read_again(tmp_path):
    path = tmp_path / "profile.json"
    write_whole(str(path), encode_profile(H100.profile))
    assert load_profile(str(path), device="H100", model=LLAMA2_7B) == H100.profile
    assert [file.name for file in tmp_path.iterdir()] == ["profile.json"]


def changed(**fields):
    return json.dumps(json.loads(encode_profile(H100.profile)) | fields)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "truncated"),
        ("{", "truncated"),
        ("[]", "object"),
        ("\xff", "profile"),
        (changed(version=2), "version"),
        (changed(surplus=1), "surplus"),
        (changed(attention_bytes_s=-1), "attention_bytes_s"),
        (changed(attention_bytes_s="fast"), "attention_bytes_s"),
        (changed(linear=[]), "linear"),
        (changed(linear=[{"rows": 2, "seconds": 1.0}, {"rows": 1, "seconds": 1.0}]), "rising"),
        (changed(linear=[{"rows": 2, "seconds": math.inf}] * 2), "profile"),
    ],
)
def test_profile_that_is_none_is_refused_in_one_line(tmp_path, content, said):
    path = tmp_path / "profile.json"
    path.write_text(content, encoding="latin-1")
    with pytest.raises(ConfigError, match=said) as caught:
        load_profile(str(path))
    assert "\n" not in str(caught.value)


def test_profile_of_another_device_or_model_or_missing_is_refused(tmp_path):
    path = tmp_path / "profile.json"
    path.write_bytes(encode_profile(H100.profile))
    with pytest.raises(ConfigError, match="profile of 'H100', this device is 'NVIDIA H200'"):
        load_profile(str(path), device="NVIDIA H200")
    with pytest.raises(ConfigError, match="another shape"):
        load_profile(str(path), model=msgspec.structs.replace(LLAMA2_7B, num_layers=2))
    with pytest.raises(ConfigError, match="cannot read"):
        load_profile(str(tmp_path / "none.json"))


def test_write_whole_where_it_cannot_leaves_nothing(tmp_path):
    with pytest.raises(ConfigError, match="cannot write"):
        write_whole(str(tmp_path / "none" / "file"), b"x")
    (tmp_path / "taken").mkdir()
    with pytest.raises(ConfigError, match="cannot write"):
        write_whole(str(tmp_path / "taken"), b"x")
    assert [file.name for file in tmp_path.iterdir()] == ["taken"]


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (None, "No such file"),
        ("{", "no model shape"),
        ("[]", "no model shape"),
        ({"hidden_size": 1}, "num_attention_heads"),
        ({"num_attention_heads": 0}, "num_hidden_layers"),
        ({"experts": 8}, "dense"),
    ],
)
def test_model_config_that_does_not_do_is_refused_in_one_line(tmp_path, config, said):
    path = tmp_path / "config.json"
    shape = {
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "hidden_size": 64,
        "intermediate_size": 128,
        "vocab_size": 100,
    }
    if isinstance(config, dict):
        config = json.dumps(shape | {"num_local_experts": 8} if "experts" in config else config)
    if config is not None:
        path.write_text(config)
    with pytest.raises(ConfigError, match=said) as caught:
        model_from_config(str(tmp_path if config is not None else path))
    assert "\n" not in str(caught.value)


def test_unknown_device_is_refused():
    with pytest.raises(ConfigError, match="no data sheet"):
        datasheet_profile("Abacus", LLAMA2_7B)
    with pytest.raises(ConfigError, match="divided"):
        datasheet_profile("H100", LLAMA2_7B, tp_size=5)


def test_life_of_a_request_is_that_many_steps_of_the_batch_that_will_be():
    """Ten decode; of five that wait and this one as many join as fit into what is free."""
    batch = {"rows": 10, "local_tokens": 8_000, "waiting": 5, "growth_tokens": 64, "pace": 0.5}
    joins_nobody = H100.life_s(100, 500, free_tokens=500, **batch)
    assert joins_nobody == pytest.approx(100 * H100.step_s(10, 8_000 / 0.5))
    two_join = H100.life_s(100, 500, free_tokens=1_200, **batch)
    assert two_join == pytest.approx(100 * H100.step_s(12, (8_000 + 2 * 550) / 0.5))
    all_join = H100.life_s(100, 500, free_tokens=10**6, **batch)
    assert all_join == pytest.approx(100 * H100.step_s(16, (8_000 + 6 * 550) / 0.5))
    assert H100.life_s(100, 500, free_tokens=-5, **batch) == joins_nobody
