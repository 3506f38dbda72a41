"""The comparison from start to end against stand-in servers: what is measured, kept and told when a system fails."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "benchmark"))


@pytest.fixture(scope="module")
def compare() -> ModuleType:
    """benchmark/compare.py, under a name of its own: test/e2e has a module `compare`."""
    spec = importlib.util.spec_from_file_location("benchmark_compare", ROOT / "benchmark" / "compare.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def stand_ins(compare, monkeypatch):
    """Deployments of two stand-in servers, in turn; those of the system `pd` do not start."""
    from servers import Group, Server, free_ports
    from systems import Deployment

    started: list[Server] = []

    def deploy(system, model, logs, gpus, args):
        logs.mkdir(parents=True)
        groups = []
        for name in ("one", "two"):
            port = free_ports(1)[0]
            command = [sys.executable, str(Path(__file__).with_name("stand_in_server.py")), str(port)]
            server = Server(name, command + (["exit"] if system.kind == "pd" else []), port, logs / f"{name}.log")
            started.append(server)
            groups.append(Group({name: server}, front=name))
        urls = [group.url for group in groups]
        return Deployment(groups, urls, dict(zip(("one", "two"), urls, strict=True)))

    monkeypatch.setattr(compare, "deploy", deploy)
    yield started
    for server in started:
        server.kill()


def arguments(out: Path, *systems: str) -> list[str]:
    return [
        *("--model-path", str(ROOT / "benchmark" / "models" / "llama2-7b"), "--num-gpus", "2", "--out", str(out)),
        *("--systems", *systems, "--budget", "60", "--start-timeout", "20"),
        *("--workload", "burst in=8 out=12 requests=6", "--workload", "saturated in=8 out=12 concurrency=4 seconds=2"),
    ]


def test_every_system_runs_every_workload(compare, stand_ins, tmp_path, capsys):
    assert compare.main(arguments(tmp_path, "dp2", "adrenaline:0.5")) == 0
    read = json.loads((tmp_path / "compare.json").read_text())
    assert len(read["runs"]) == 4
    for run in read["runs"]:
        summary = run["summary"]
        assert summary["failed"] == 0 and summary["output_tok_s"] > 0 and summary["tpot_mean_s"] > 0.004
    saturated = [run for run in read["runs"] if "open" in run["workload"]]
    assert all(run["servers"]["two"]["most_tokens"] == 123 for run in saturated)
    assert "adrenaline:0.5" in capsys.readouterr().out and (tmp_path / "compare.txt").exists()
    assert not any(server.alive() for server in stand_ins)


def test_system_that_does_not_start_is_told_and_the_next_one_runs(compare, stand_ins, tmp_path, capsys):
    assert compare.main(arguments(tmp_path, "pd", "dp2")) == 1
    read = json.loads((tmp_path / "compare.json").read_text())
    failed, done = (read["runs"][:2], read["runs"][2:])
    assert all(run["system"] == "pd" and "ended with code 1" in run["error"] for run in failed)
    assert all(run["system"] == "dp2" and run["summary"]["failed"] == 0 for run in done) and len(done) == 2
    captured = capsys.readouterr()
    assert "pd: " in captured.out and "no GPU memory left" in captured.err


def test_results_are_kept_when_the_time_is_up(compare, stand_ins, tmp_path):
    argv = [*arguments(tmp_path, "dp2"), "--budget", "31", "--workload", "single in=8 out=12 requests=2000"]
    assert compare.main([*argv, "--workload-timeout", "3"]) == 0
    runs = json.loads((tmp_path / "compare.json").read_text())["runs"]
    assert runs[-1]["summary"]["finished"] > 10 and "not finished" in runs[-1]["summary"]["first_error"]
