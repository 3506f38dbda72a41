"""The table of touch points: every target is there in this SGLang, and the docs say what the table says."""

import inspect
import subprocess
import sys
from pathlib import Path

import pytest

from sglang_adrenaline import hooks
from sglang_adrenaline.errors import HookError

ROOT = Path(__file__).parents[2]


def test_probe_every_target_exists_with_the_parameters_we_use():
    hooks.probe(hooks.HOOKS)


@pytest.mark.parametrize(
    ("target", "needs", "words"),
    [
        ("managers.scheduler.Scheduler.no_such_method", (), "no_such_method"),
        ("no.such.module.thing", (), "no sglang.srt.no.such.module.thing"),
        ("mem_cache.common.release_kv_cache", ("no_such_parameter",), "no_such_parameter"),
    ],
)
def test_probe_missing_target_or_parameter_is_one_line(target, needs, words):
    with pytest.raises(HookError, match=words) as caught:
        hooks.probe([hooks.Hook("decode", target, "before", "x", needs, "a test")])
    assert "\n" not in str(caught.value)


def test_verify_nothing_applied_names_every_target():
    """In this process no hook was applied: the plugin is inert without its configuration."""
    rows = hooks.hooks_for("prefill", "decode", "scheduler", "frontend")
    with pytest.raises(HookError) as caught:
        hooks.verify(rows)
    assert all(row.target in str(caught.value) for row in rows)


REGISTER = """
import os, sys
os.environ["SGLANG_PLUGINS"] = "adrenaline"
os.environ.pop("SGLANG_ADRENALINE_CONFIG", None)
if len(sys.argv) > 1:
    from sglang_adrenaline.config import AdrenalineConfig
    os.environ["SGLANG_ADRENALINE_CONFIG"] = AdrenalineConfig(role=sys.argv[1]).to_json()
from sglang.srt.plugins import load_plugins
from sglang_adrenaline import hooks, plugin
if len(sys.argv) > 2:  # as SGLang's scheduler process is: a child of multiprocessing
    plugin.multiprocessing.parent_process = lambda: object()
load_plugins()
for row in hooks.HOOKS:
    print(row.where, row.target, hooks._is_applied(row))
"""


@pytest.mark.parametrize(
    ("arguments", "places"),
    [
        ((), set()),
        (("prefill",), {"frontend", "transfer"}),
        (("prefill", "scheduler"), {"scheduler", "transfer", "prefill"}),
        (("decode", "scheduler"), {"scheduler", "transfer", "decode"}),
    ],
)
def test_register_in_each_process_applies_its_rows_and_no_other(arguments, places):
    command = [sys.executable, "-W", "ignore", "-c", REGISTER, *arguments]
    output = subprocess.run(command, capture_output=True, text=True, timeout=280, check=True).stdout
    lines = [line.split() for line in output.splitlines() if line.endswith(("True", "False"))]
    assert len(lines) == len(hooks.HOOKS), output
    for where, target, applied in lines:
        assert (applied == "True") == (where in places), (where, target, applied)


ATTACH = """
import threading
from sglang_adrenaline.errors import HookError
from sglang_adrenaline.plugin import SchedulerHandlers
threading.Thread(target=threading.Event().wait).start()
def verify():
    raise HookError("not in place")
SchedulerHandlers("decode", None, verify).attach(None, None)
"""


def test_scheduler_that_cannot_be_attached_to_ends_with_one_line_though_its_threads_run():
    """SGLang's never end by themselves, and its server waits for the process."""
    command = [sys.executable, "-W", "ignore", "-c", ATTACH]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert (ended.returncode, ended.stderr) == (1, "sglang_adrenaline: error: not in place\n")


def test_touch_points_doc_is_what_the_table_says():
    assert (ROOT / "docs" / "touch-points.md").read_text() == hooks.as_markdown()


def test_only_hooks_py_uses_sglangs_hook_registry():
    """One table: nothing else patches SGLang."""
    users = [p for p in (ROOT / "python").rglob("*.py") if "HookRegistry" in p.read_text() and p.name != "hooks.py"]
    assert users == [], users
    assert "HookRegistry" in inspect.getsource(hooks)
