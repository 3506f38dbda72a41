"""Placement of servers on GPUs."""

from __future__ import annotations

import socket

import pytest

from sglang_adrenaline.launcher import gpus, options


@pytest.mark.parametrize(
    ("files", "environment", "expected"),
    [
        ([], {}, 0),
        (["nvidia0", "nvidia1", "nvidiactl", "nvidia-uvm"], {}, 2),
        (["nvidia0", "nvidia1"], {"CUDA_VISIBLE_DEVICES": "1"}, 1),
        (["nvidia0"], {"CUDA_VISIBLE_DEVICES": ""}, 0),
        (["nvidia0"], {"CUDA_VISIBLE_DEVICES": "-1"}, 0),
    ],
)
def test_visible_gpus(tmp_path, files, environment, expected):
    for name in files:
        (tmp_path / name).touch()
    assert gpus.visible_gpus(environment, tmp_path) == expected


def test_mps_is_seen_by_its_daemons_socket(tmp_path):
    environment = {"CUDA_MPS_PIPE_DIRECTORY": str(tmp_path)}
    assert not gpus.has_mps(environment)
    (tmp_path / "control").touch()
    assert not gpus.has_mps(environment)
    (tmp_path / "control").unlink()
    with socket.socket(socket.AF_UNIX) as daemon:
        daemon.bind(str(tmp_path / "control"))
        assert gpus.has_mps(environment)


def test_servers_get_gpus_of_their_own_while_there_are_enough():
    assert gpus.placements(2, [1, 1]) == [["--base-gpu-id", "0"], ["--base-gpu-id", "1"]]
    assert gpus.placements(4, [2, 2]) == [["--base-gpu-id", "0"], ["--base-gpu-id", "2"]]


def test_servers_share_one_gpu_where_there_are_too_few():
    shared = ["--base-gpu-id", "0", "--mem-fraction-static", "0.425"]
    assert gpus.placements(1, [1, 1]) == [shared, shared]


def test_servers_are_spread_where_there_are_too_few_gpus_for_all():
    def shared(gpu: int, fraction: str) -> list[str]:
        return ["--base-gpu-id", str(gpu), "--mem-fraction-static", fraction]

    two_each = [shared(0, "0.425"), shared(1, "0.425"), shared(0, "0.425"), shared(1, "0.425")]
    assert gpus.placements(2, [1] * 4) == two_each
    assert gpus.placements(2, [1] * 3) == [shared(0, "0.425"), shared(1, "0.850"), shared(0, "0.425")]
    assert gpus.placements(2, [2, 2]) == [shared(0, "0.425"), shared(0, "0.425")]
    assert gpus.placements(5, [2] * 3) == [shared(0, "0.425"), shared(2, "0.850"), shared(0, "0.425")]


def test_without_gpus_nothing_is_placed():
    assert gpus.placements(0, [1, 1]) == [[], []]


def test_what_the_user_gives_goes_before_a_placement():
    placement = ["--base-gpu-id", "0", "--mem-fraction-static", "0.425"]
    assert gpus.without_given(placement, ["--mem-fraction-static=0.3"]) == ["--base-gpu-id", "0"]
    assert gpus.without_given(placement, ["--base-gpu-id", "3"]) == ["--mem-fraction-static", "0.425"]


def test_plan_places_both_servers_and_leaves_given_flags_alone(monkeypatch):
    monkeypatch.setattr(gpus, "visible_gpus", lambda: 2)
    ports = ["--port", "41200", "--prefill-port", "41201", "--decode-port", "41202"]
    plan = options.parse([*ports, "--decode-args", "--base-gpu-id 5"])
    prefill, decode = plan.servers
    assert prefill.argv[prefill.argv.index("--base-gpu-id") + 1] == "0"
    assert decode.argv.count("--base-gpu-id") == 1
    assert decode.argv[decode.argv.index("--base-gpu-id") + 1] == "5"
