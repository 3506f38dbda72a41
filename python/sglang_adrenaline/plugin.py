"""Entry point of SGLang's plugin group: puts the hooks of this process in place.

SGLang calls `register` early in the main process of a server and in each scheduler process. Without the configuration
in the environment nothing is touched. Failures end the process with one line, since SGLang would log them and go on.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any, NoReturn

from sglang_adrenaline import compat, hooks
from sglang_adrenaline.config import AdrenalineConfig, Role
from sglang_adrenaline.errors import AdrenalineError
from sglang_adrenaline.refusals import check_sglang_version

TRANSFER_ENV = "SGLANG_ADRENALINE_TRANSFER"
"""`local` makes the transfer backend of that name known to a server that has no other part of the extension."""
METRICS_INTERVAL_S = 1.0
NAP_S = 0.001
GPU_NAP_S = 5e-5


def register() -> None:
    try:
        config = AdrenalineConfig.from_env()
        if config is None and os.environ.get(TRANSFER_ENV) != "local":
            return
        check_sglang_version()
        _register_transfer()
        if config is None:
            return
        if multiprocessing.parent_process() is None:
            _register_frontend(config)
        else:
            _register_scheduler(config)
    except AdrenalineError as error:
        _fail(error)


def _fail(error: Exception) -> NoReturn:
    _say(error)
    raise SystemExit(1)


def _fail_at_once(error: Exception) -> NoReturn:
    """In a scheduler whose threads run: they would keep an interpreter that exits alive, and its server waiting."""
    _say(error)
    os._exit(1)


def _say(error: Exception) -> None:
    print(f"sglang_adrenaline: error: {error}", file=sys.stderr, flush=True)


def _register_transfer() -> None:
    from sglang_adrenaline.transfer import local

    local.register_local_backend()
    hooks.register(hooks.hooks_for("transfer"), SimpleNamespace(get_kv_class=local.get_kv_class_around))


def _register_frontend(config: AdrenalineConfig) -> None:
    from sglang_adrenaline.frontend import FrontendHandlers, add_status_route

    # The scheduler's touch points are looked at here already: one line now is better than a dead child later.
    hooks.probe(hooks.hooks_for("frontend", "transfer", "scheduler", config.role))
    hooks.register(hooks.hooks_for("frontend"), FrontendHandlers())
    add_status_route()


def _register_scheduler(config: AdrenalineConfig) -> None:
    handlers, runtime = _role_handlers(config)
    rows = hooks.hooks_for("scheduler", config.role)
    shared = SchedulerHandlers(config.role, runtime, verify=partial(hooks.verify, rows))
    handlers.attach, handlers.add_status = shared.attach, shared.add_status
    pump = handlers.pump

    def pump_and_publish(scheduler: Any, *args: Any, **kwargs: Any) -> None:
        pump(scheduler, *args, **kwargs)
        shared.publish()
        shared.rest(scheduler)

    handlers.pump = pump_and_publish
    hooks.register(rows, handlers)


def _role_handlers(config: AdrenalineConfig) -> tuple[Any, Any]:
    if config.role == "prefill":
        from sglang.srt.managers import io_struct

        from sglang_adrenaline.prefill.handlers import PrefillHandlers
        from sglang_adrenaline.prefill.runtime import PrefillRuntime

        prefill = PrefillHandlers(PrefillRuntime(config))
        updates = {
            "update_weights_from_disk": io_struct.UpdateWeightFromDiskReqOutput,
            "update_weights_from_distributed": io_struct.UpdateWeightsFromDistributedReqOutput,
            "update_weights_from_tensor": io_struct.UpdateWeightsFromTensorReqOutput,
            "update_weights_from_ipc": io_struct.UpdateWeightsFromIPCReqOutput,
        }
        methods = {name: prefill.refuse_update(output) for name, output in updates.items()}
        public = {
            name: getattr(prefill, name)
            for name in ("place_batch", "await_stream", "send_kv_chunk", "pump", "flush_cache", "release_memory")
        }
        return SimpleNamespace(**public, **methods), prefill.runtime

    from sglang.srt.disaggregation import decode as sglang_decode

    from sglang_adrenaline.attention.registry import register_backends
    from sglang_adrenaline.decode.handlers import DecodeHandlers
    from sglang_adrenaline.decode.prealloc import make_prealloc_queue
    from sglang_adrenaline.decode.runtime import DecodeRuntime

    runtime = DecodeRuntime(config)
    decode = DecodeHandlers(runtime)
    register_backends(runtime)
    names = ("pump", "graph_runner", "check_step", "commit_transfer", "release_kv_cache", "release_req", "copy_suffix")
    queue = make_prealloc_queue(sglang_decode.DecodePreallocQueue, runtime)
    return SimpleNamespace(prealloc_queue=queue, **{name: getattr(decode, name) for name in names}), runtime


class SchedulerHandlers:
    """Hook handlers that both roles share."""

    def __init__(self, role: Role, runtime: Any, verify: Callable[[], None]) -> None:
        self._role = role
        self._runtime = runtime
        self._verify = verify
        self._metrics: Any = None
        self._published = 0.0

    def attach(self, result: None, scheduler: Any) -> None:
        try:
            self._verify()
            self._runtime.attach_scheduler(scheduler)
        except AdrenalineError as error:
            _fail_at_once(error)
        if compat.publishes_metrics(scheduler):
            from sglang_adrenaline.metrics import StatusMetrics

            self._metrics = StatusMetrics(self._role)

    def add_status(self, result: Any, scheduler: Any, recv_req: Any) -> None:
        result.internal_state["adrenaline"] = self._runtime.status()

    def rest(self, scheduler: Any) -> None:
        """Do not spin where the core, or the interpreter's lock, is needed for something that is awaited.

        On a CPU the other server computes it on the same cores. On a GPU the executor's thread launches it.
        """
        if compat.is_cpu(scheduler):
            if compat.waits_for_peer(scheduler):
                time.sleep(NAP_S)
        elif self._role == "prefill" and self._runtime.serves_decode and compat.has_nothing_to_run(scheduler):
            time.sleep(GPU_NAP_S)

    def publish(self) -> None:
        """Metrics, now and then; called once a scheduler loop."""
        now = time.monotonic()
        if self._metrics is not None and now - self._published >= METRICS_INTERVAL_S:
            from sglang_adrenaline.metrics import publish_status

            self._published = now
            publish_status(self._metrics, self._runtime.status())
