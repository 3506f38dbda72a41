"""Configuration: limits, flags, and the way through the environment."""

import argparse

import pytest

from sglang_adrenaline.config import CONFIG_ENV, AdrenalineConfig, add_cli_args, config_from_args
from sglang_adrenaline.errors import ConfigError


def parse(*argv: str) -> AdrenalineConfig:
    parser = argparse.ArgumentParser()
    add_cli_args(parser)
    return config_from_args(parser.parse_args(argv), "decode")


def test_flags_default_equal_the_fields_defaults():
    assert parse() == AdrenalineConfig(role="decode")


def test_flags_given_reach_their_fields():
    config = parse("--adrenaline-offload-ratio", "0.25", "--adrenaline-lanes", "3", "--adrenaline-key-file", "/k")
    assert (config.offload_ratio, config.lanes, config.key_file) == (0.25, 3, "/k")


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("offload-ratio", "-0.1"),
        ("offload-ratio", "1.01"),
        ("offload-ratio", "nan"),
        ("max-pinned-fraction", "0"),
        ("max-pinned-fraction", "2"),
        ("min-offload-tokens", "0"),
        ("lanes", "0"),
        ("lanes", "5000"),
        ("executor-sms", "-8"),
        ("channel-ports", ""),
        ("channel-ports", "0-9"),
        ("channel-ports", "9-8"),
        ("channel-ports", "65536"),
        ("channel-ports", "1,2"),
        ("wait-timeout", "0"),
        ("slo-ttft-ms", "0"),
        ("slo-tpot-ms", "-1"),
        ("slo-tpot-ms", "nan"),
        ("slo-ttft-ms", "inf"),
    ],
)
def test_flags_out_of_range_are_refused_by_name(flag, value):
    with pytest.raises(ConfigError, match=f"--adrenaline-{flag} must be"):
        parse(f"--adrenaline-{flag}", value)


def test_heartbeat_timeout_not_above_interval_is_refused():
    with pytest.raises(ConfigError, match="heartbeat"):
        AdrenalineConfig(role="prefill", heartbeat_interval=5.0)


def test_channel_ports_are_a_range():
    assert list(parse().channel_port_range) == [0]
    assert list(parse("--adrenaline-channel-ports", "40000").channel_port_range) == [40000]
    assert list(parse("--adrenaline-channel-ports", "40000-40002").channel_port_range) == [40000, 40001, 40002]


def test_from_env_gives_back_what_was_put_in(monkeypatch):
    config = AdrenalineConfig(role="prefill", offload_ratio=0.1, key_file="/some/key")
    monkeypatch.setenv(CONFIG_ENV, config.to_json())
    assert AdrenalineConfig.from_env() == config


def test_from_env_absent_or_empty_is_none(monkeypatch):
    monkeypatch.delenv(CONFIG_ENV, raising=False)
    assert AdrenalineConfig.from_env() is None
    monkeypatch.setenv(CONFIG_ENV, "")
    assert AdrenalineConfig.from_env() is None


@pytest.mark.parametrize(
    "text",
    ["{", "[]", "{}", '{"role":"router"}', '{"role":"decode","ratio":1}', '{"role":"decode","offload_ratio":2}'],
)
def test_from_json_invalid_is_refused(text):
    with pytest.raises(ConfigError):
        AdrenalineConfig.from_json(text)


def test_lanes_default_goes_by_the_device_and_a_number_for_all():
    assert parse().lanes_for("cpu") < parse().lanes_for("cuda")
    assert [parse("--adrenaline-lanes", "7").lanes_for(device) for device in ("cpu", "cuda")] == [7, 7]


@pytest.mark.parametrize(("text", "value"), [("auto", "auto"), ("0", 0), ("32", 32)])
def test_executor_sms_auto_or_a_number_survive_the_environment(text, value):
    assert AdrenalineConfig.from_json(parse("--adrenaline-executor-sms", text).to_json()).executor_sms == value


def test_executor_sms_that_are_no_number_are_refused():
    with pytest.raises(SystemExit):
        parse("--adrenaline-executor-sms", "some")
    with pytest.raises(ConfigError, match="executor_sms"):
        AdrenalineConfig.from_json('{"role": "prefill", "executor_sms": "some"}')


def test_offload_ratio_auto_and_its_flags_survive_the_environment():
    given = ("--adrenaline-slo-ttft-ms", "500", "--adrenaline-slo-tpot-ms", "25.5", "--adrenaline-profile", "p.json")
    config = AdrenalineConfig.from_json(parse("--adrenaline-offload-ratio", "auto", *given).to_json())
    assert config.offload_ratio == "auto"
    assert (config.slo_ttft_ms, config.slo_tpot_ms, config.profile) == (500.0, 25.5, "p.json")


def test_offload_ratio_that_is_no_number_is_refused():
    with pytest.raises(SystemExit):
        parse("--adrenaline-offload-ratio", "automatic")
    with pytest.raises(ConfigError, match="offload_ratio"):
        AdrenalineConfig.from_json('{"role": "decode", "offload_ratio": "automatic"}')
