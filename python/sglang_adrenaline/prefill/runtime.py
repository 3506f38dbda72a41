"""What the prefill server adds to SGLang's scheduler: pins, executors and the server end of the control plane.

Lives in the prefill scheduler's process. Offers and ends are handled in the control thread, so that an offer is
answered while a long prompt is being computed; the radix tree is touched by the scheduler thread alone, and by those of
all tensor-parallel ranks alike: what a rank may evict decides which prompts it computes next.
"""

from __future__ import annotations

import logging
import sys
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from sglang_adrenaline import auto_cost, compat, messages
from sglang_adrenaline.channel import opening
from sglang_adrenaline.channel.base import ChannelShape
from sglang_adrenaline.channel.calls import calls_of
from sglang_adrenaline.config import AdrenalineConfig
from sglang_adrenaline.control import ControlServer
from sglang_adrenaline.cost_model import CostModel
from sglang_adrenaline.errors import ChannelError, ConfigError
from sglang_adrenaline.keys import load_key_file
from sglang_adrenaline.model_shape import host_id, local_model_shape
from sglang_adrenaline.prefill import agreement
from sglang_adrenaline.prefill.executor import AttentionExecutor, LayerKV, ThreadExecutor
from sglang_adrenaline.prefill.load_meter import LoadMeter
from sglang_adrenaline.prefill.pins import NackReason, Pin, PinTable
from sglang_adrenaline.prefill.share_control import ShareControl, points_at

if TYPE_CHECKING:
    from sglang_adrenaline.prefill.gpu_sharing import GpuSharing

logger = logging.getLogger(__name__)

STATS_INTERVAL_S = 1.0
UNKNOWN_TOKEN_S = 1e-4
"""For a prompt's token where the cost model does not know the model, until it has been measured."""
SWITCH_INTERVAL_S = 1e-4


@dataclass
class Session:
    """One decode instance from its HELLO to its loss. `key` names it in the pin table and never repeats."""

    key: str
    peer: str
    executor: AttentionExecutor
    lanes: int


class PrefillRuntime:
    """One a prefill scheduler process. Also the handler of its ControlServer (control thread)."""

    def __init__(self, config: AdrenalineConfig) -> None:
        self.config = config
        self.instance = uuid.uuid4().hex
        self.offloaded_total = 0
        self.unpinned_total = 0
        self.control: ControlServer | None = None
        self.pins: PinTable | None = None
        self.gpu: GpuSharing | None = None
        """Where executor and prefill share one."""
        self._share_control: ShareControl | None = None
        """Chooses among the shares of `gpu`."""
        self._scheduler: Any = None
        self._sessions: dict[str, Session] = {}
        """By peer, the ones that are connected."""
        self._executors: dict[str, Session] = {}
        """By session key, until nothing of the session is held any more."""
        self._num_sessions = 0
        self._steps_gone = 0
        self._plans_gone = 0
        self._waited_gone_s = 0.0
        self._lock = threading.Lock()
        self._stats_at = 0.0

    # ---- start (scheduler thread) -----------------------------------------------------------------------------------

    def attach_scheduler(self, scheduler: Any) -> None:
        """Raises ConfigError where the control port is taken, or the key file or the channel is not usable."""
        self._scheduler = scheduler
        self._shape = local_model_shape(scheduler)
        self._device = compat.device(scheduler)
        opening.check_kind(self.config.channel, self._device.type)
        self._lanes = self.config.lanes_for(self._device.type)
        cost = self._cost_model()
        self._load = LoadMeter(cost.prefill_s if cost is not None else lambda new, cached: new * UNKNOWN_TOKEN_S)
        self._share_gpu(cost)
        self._ranks = compat.ranks(scheduler)
        self._pool = compat.pool_shape(scheduler)
        self._layers = [
            LayerKV(k, v, sm_scale, cap)
            for (k, v), sm_scale, cap in zip(
                compat.kv_buffers(scheduler), self._shape.sm_scales, self._shape.logit_caps, strict=True
            )
        ]
        self.pins = PinTable(
            pool_tokens=self._pool.tokens, num_slots=self._pool.num_slots, max_fraction=self.config.max_pinned_fraction
        )
        # After each wake-up an executor must get the GIL from this thread, which otherwise keeps it for up to 5 ms.
        sys.setswitchinterval(SWITCH_INTERVAL_S)
        if self.config.key_file is None:
            logger.warning("no --adrenaline-key-file: no decode server can offload to this one")
            return
        self._warm_up()
        self.control = ControlServer(
            self.config.control_host,
            compat.bootstrap_port(scheduler) + self.config.control_port_offset + self._ranks.tp_rank,
            load_key_file(self.config.key_file),
            handler=self,
            heartbeat_interval=self.config.heartbeat_interval,
            heartbeat_timeout=self.config.heartbeat_timeout,
        )

    def _cost_model(self) -> CostModel | None:
        """None for a model that it does not know. Raises ConfigError."""
        try:
            model = auto_cost.served_model(compat.model_config(self._scheduler))
        except ConfigError as error:
            logger.warning("a prompt's time is guessed, and no share of a GPU follows the load: %s", error)
            return None
        return auto_cost.for_server(self.config, model, compat.device_name(self._scheduler))

    def _share_gpu(self, cost: CostModel | None) -> None:
        """Raises ConfigError."""
        sms = self.config.executor_sms
        if self._device.type == "cuda":
            from sglang_adrenaline.prefill.gpu_sharing import GpuSharing

            self.gpu = GpuSharing(self._scheduler, self._device.index, None if sms == "auto" else sms)
            if cost is not None and len(self.gpu.shares) > 1:
                points = points_at(cost, self.gpu.shares)
                self._share_control = ShareControl(points, self.config.objective_s("ttft"))
        elif sms != "auto" and sms > 0:
            raise ConfigError("--adrenaline-executor-sms needs a GPU")

    def _warm_up(self) -> None:
        """Raises ConfigError on a model that the executor cannot serve."""
        if self._device.type != "cuda":
            return
        from sglang_adrenaline.prefill import gpu_executor

        begun = time.monotonic()
        try:
            gpu_executor.warm_up(self._layers, lanes=self._lanes, num_qo_heads=self._shape.num_qo_heads)
        except (ChannelError, ValueError) as error:
            raise ConfigError(f"attention cannot be offloaded to this server: {error}") from None
        logger.info("kernels of the attention executor are loaded after %.1f s", time.monotonic() - begun)

    # ---- control thread ---------------------------------------------------------------------------------------------

    def on_hello(self, peer: str, hello: messages.Hello) -> messages.Welcome | messages.Refuse:
        reason = self._refusal(hello)
        if reason:
            logger.warning("refused decode instance %s: %s", peer[:8], reason)
            return messages.Refuse(messages.clip(reason))
        assert self.pins is not None
        lanes = min(hello.lanes_wanted, self._lanes)
        shape = ChannelShape(
            lanes=lanes,
            num_layers=calls_of(self._shape.num_layers, self._device.type),
            num_qo_heads=self._shape.num_qo_heads,
            head_dim=self._shape.head_dim,
            v_head_dim=self._shape.v_head_dim,
            dtype=self._shape.dtype,
        )
        try:
            kind = opening.choose_kind(self.config.channel, self._device.type, same_host=hello.host_id == host_id())
            end = opening.create_executor_end(
                kind,
                shape,
                device=self._device.index,
                wait_timeout=self.config.wait_timeout,
                peer=f"decode {peer[:8]}",
                host=self.config.control_host,
                ports=self.config.channel_port_range,
            )
        except (ChannelError, OSError) as error:
            return messages.Refuse(messages.clip(f"no channel: {error}"))
        with self._lock:
            self._num_sessions += 1
            key = f"{peer}#{self._num_sessions}"
            executor = self._make_executor(end, key[:8], partial(self._executor_failed, peer, key))
            session = Session(key, peer, executor, lanes)
            self._sessions[peer] = session
            self._executors[key] = session
            self.pins.peer_joined(key, lanes)
        logger.info("decode instance %s may offload, %d lanes, channel %s", peer[:8], lanes, kind)
        return messages.Welcome(instance=self.instance, channel=end.spec)

    def _make_executor(self, end: Any, name: str, on_failure: Callable[[str], None]) -> AttentionExecutor:
        if self._device.type == "cpu":
            return ThreadExecutor(end, self._layers, name, on_failure)
        from sglang_adrenaline.prefill.gpu_executor import GpuExecutor

        # Also where prefill leaves SMs to it, the executor's stream is not confined to them: it takes what is idle.
        return GpuExecutor(end, self._layers, name, on_failure)

    def _refusal(self, hello: messages.Hello) -> str | None:
        if hello.sglang_version != version("sglang"):
            return f"SGLang {hello.sglang_version} on decode, {version('sglang')} on prefill"
        ours = self._ranks
        if (hello.tp_rank, hello.tp_size) != (ours.tp_rank, ours.tp_size):
            return f"TP rank {hello.tp_rank} of {hello.tp_size} on decode, {ours.tp_rank} of {ours.tp_size} on prefill"
        if hello.page_size != self._pool.page_size:
            return f"page size {hello.page_size}, not {self._pool.page_size}"
        difference = self._shape.difference(hello.model)
        return f"another model: {difference}" if difference else None

    def on_message(self, peer: str, message: Any) -> None:
        session = self._sessions.get(peer)
        if session is None or self.pins is None:
            return
        match message:
            case messages.Offer(room=room):
                reason = self.pins.offer(
                    session.key, room, message.remote_prefix_len, message.prompt_len, message.prompt_digest
                )
                if reason is None:
                    self._send(peer, messages.Accept(room))
                else:
                    self._send(peer, messages.Nack(room=room, reason=reason.value, detail=self._detail(reason)))
            case messages.End(room=room, last_step=last_step):
                if not self.pins.end(session.key, room, last_step):
                    logger.debug("END for room %d, which decode instance %s does not hold", room, peer[:8])

    def _detail(self, reason: NackReason) -> str:
        assert self.pins is not None
        counts = self.pins.counts()
        return (
            f"{counts.pinned_tokens} + {counts.reserved_tokens} of {self._pool.tokens} tokens pinned or promised"
            if reason is NackReason.POOL_FULL
            else ""
        )

    def on_peer_lost(self, peer: str, reason: str) -> None:
        with self._lock:
            session = self._sessions.pop(peer, None)
        if session is None:
            return
        session.executor.stop(reason)
        assert self.pins is not None
        held = self.pins.peer_left(session.key)
        logger.warning("decode instance %s is gone (%s): %d offloaded requests end", peer[:8], reason, held)

    def _executor_failed(self, peer: str, key: str, reason: str) -> None:
        """Executor thread. The decode instance is told to go; it comes back with a HELLO and gets a new executor."""
        with self._lock:  # not before the session that failed is there
            session = self._sessions.get(peer)
        if session is not None and session.key == key:
            self._dismiss(peer, reason)

    def _dismiss(self, peer: str, reason: str) -> None:
        self._send(peer, messages.Bye(messages.clip(reason)))
        self.on_peer_lost(peer, reason)

    def _send(self, peer: str, message: Any) -> None:
        assert self.control is not None
        self.control.send(peer, message)

    # ---- scheduler thread -------------------------------------------------------------------------------------------

    def before_last_chunk(self, req: Any) -> None:
        """The prompt is computed and in the radix tree; its last KV chunk is about to be sent.

        Decode sees the transfer succeed only after this, so it never meets a request that the executor does not know.
        """
        new_tokens = compat.new_prompt_tokens(req)
        alone_s = self._load.computed(new_tokens, compat.cached_prompt_tokens(req))
        if self._share_control is not None:
            self._share_control.computed(alone_s)
        room = compat.room(req)
        if self.pins is None or room is None:
            return
        claim = self.pins.claim(room, partial(compat.prompt_digest, req))
        length = agreement.agreed_length(self._ranks, claim)
        locked = compat.lock_prefix(self._scheduler, req, length) if length else None
        if claim is None:
            return
        peer = claim.peer.partition("#")[0]
        if locked is None:
            if self.pins.refuse(claim, NackReason.NOT_CACHED):
                detail = "the prompt's KV is not in the radix cache" if length else "another rank does not hold it"
                self._send(peer, messages.Nack(room=room, reason=NackReason.NOT_CACHED.value, detail=detail))
            return
        slots, lock = locked
        on_host = slots.cpu().numpy()
        self.pins.pin(claim, on_host, lock)
        self._executors[claim.peer].executor.attach(claim.lane, slots, on_host)
        self.offloaded_total += 1
        self._send(peer, messages.Ready(room=room, lane=claim.lane))

    def pump(self) -> None:
        """Once a scheduler loop: unlock what ended, drop what is empty, tell the decode side how full the pool is."""
        if self.pins is None:
            return
        over = agreement.ended_everywhere(self._ranks, self.pins, lambda key: self._executors[key].executor.steps_done)
        for pin in self.pins.collect(over):
            self._unpin(pin)
        for key, session in list(self._executors.items()):
            if self._sessions.get(session.peer) is not session and self.pins.forget_peer(key):
                self._steps_gone += session.executor.steps_done
                self._plans_gone += session.executor.plans
                self._waited_gone_s += session.executor.waited_s
                del self._executors[key]
        now = time.monotonic()
        self._measure_load(now)
        if now - self._stats_at > STATS_INTERVAL_S:
            self._stats_at = now
            self._report_load(now)
            for session in list(self._sessions.values()):
                self._send(session.peer, self._stats(session))

    def _measure_load(self, now: float) -> None:
        """On a CPU the executor's thread may have this thread's core, and the clock stands; a GPU's own time is not
        known here, so it is asked only while the executor has nothing to do."""
        on_cpu = self._device.type == "cpu"
        worked_s = time.thread_time() if on_cpu else now
        alone = on_cpu or not self.keeps_prefixes
        # With overlap scheduling a batch is run, which is all on a CPU, before the results of the last are looked at.
        ahead = on_cpu and compat.overlaps(self._scheduler)
        self._load.ran(now, worked_s, busy=compat.runs_prompts(self._scheduler), alone=alone, ahead=ahead)

    def _report_load(self, now: float) -> None:
        begun = [
            (compat.new_prompt_tokens(req), compat.cached_prompt_tokens(req))
            for req in compat.begun_prompts(self._scheduler)
        ]
        self._load.report(now, begun=begun, waiting=map(compat.prompt_len, compat.waiting_prompts(self._scheduler)))

    def _unpin(self, pin: Pin) -> None:
        assert self.pins is not None
        self._executors[pin.peer].executor.detach(pin.lane)
        compat.unlock_prefix(self._scheduler, pin.handle)
        self.pins.release_lane(pin)
        self.unpinned_total += 1

    def _stats(self, session: Session) -> messages.Stats:
        assert self.pins is not None
        counts = self.pins.counts()
        return messages.Stats(
            pool_tokens=self._pool.tokens,
            free_tokens=compat.pool_free_tokens(self._scheduler),
            pinned_tokens=counts.pinned_tokens,
            pinned_requests=counts.pinned_requests,
            lanes=session.lanes,
            lanes_in_use=self.pins.lanes_in_use(session.key),
            steps=session.executor.steps_done,
            prefill_load=self._load.load,
            lasting_load=self._load.lasting_load,
            executor_share=self.executor_share,
            busy_s=session.executor.busy_s,
            worked_s=session.executor.worked_s,
            read_tokens=session.executor.read_tokens,
        )

    @property
    def serves_decode(self) -> bool:
        """Whether an executor may have something to do."""
        return bool(self._sessions)

    @property
    def executor_share(self) -> float:
        """Of the GPU's SMs, that prefill stays off while it keeps prefixes; 0 = none. Scheduler thread."""
        if self._share_control is not None:
            return self._share_control.share(time.monotonic(), self._load.lasting_load)
        shares = self.gpu.shares if self.gpu is not None else ()
        return max(shares, default=0.0)

    @property
    def keeps_prefixes(self) -> bool:
        """Whether a decode step may come that attends to something here."""
        return self.pins is not None and self.pins.counts().pinned_requests > 0

    def holds_pins(self) -> str:
        """What stands in the way of clearing the pool, for the user; empty if nothing does."""
        self.pump()
        if self.pins is None:
            return ""
        counts = self.pins.counts()
        if counts.pinned_requests == 0:
            return ""
        return f"{counts.pinned_tokens} tokens are pinned by {counts.pinned_requests} offloaded requests"

    def revoke_pins(self, why: str) -> None:
        """Give up every pin at once; its requests end with an error on the decode side."""
        if self.pins is None:
            return
        for session in list(self._executors.values()):
            self._send(session.peer, messages.Bye(messages.clip(why)))
            with self._lock:
                self._sessions.pop(session.peer, None)
            session.executor.stop(why)  # also where the control thread is at it: nothing reads KV after this
            self.pins.peer_left(session.key)
        self.pump()

    def status(self) -> dict[str, Any]:
        """What `GET /adrenaline/status` shows. Scheduler thread."""
        assert self.pins is not None
        counts = self.pins.counts()
        executors = [session.executor for session in self._executors.values()]
        return {
            "role": "prefill",
            "instance": self.instance,
            "peers": [
                {
                    "role": "decode",
                    "instance": peer,
                    "connected": True,
                    "lanes": session.lanes,
                    "lanes_in_use": self.pins.lanes_in_use(session.key),
                    "steps": session.executor.steps_done,
                }
                for peer, session in list(self._sessions.items())
            ],
            "running": {"reserved": counts.reserved_requests, "offloaded": counts.pinned_requests},
            "tokens": {
                "pinned": counts.pinned_tokens,
                "reserved": counts.reserved_tokens,
                "free": compat.pool_free_tokens(self._scheduler),
                "locked": compat.pool_locked_tokens(self._scheduler),
                "pool": self._pool.tokens,
            },
            "pinned_tokens": counts.pinned_tokens,
            "lanes_in_use": counts.lanes_in_use,
            "steps": self._steps_gone + sum(executor.steps_done for executor in executors),
            "plans": self._plans_gone + sum(executor.plans for executor in executors),
            "launch_lag_us": round(1e6 * max((executor.launch_lag_s for executor in executors), default=0.0), 1),
            "late_launches": sum(executor.late_launches for executor in executors),
            "executor_wait_ms_total": round(
                1e3 * (self._waited_gone_s + sum(executor.waited_s for executor in executors)), 3
            ),
            "totals": {"offloaded": self.offloaded_total, "unpinned": self.unpinned_total},
            "offloaded_total": self.offloaded_total,
            "nacks": dict(self.pins.nacks),
            "prefill_load": round(self._load.load, 3),
            "executor_share": round(self.executor_share, 3),
            "exposed_wait_ms_total": 0.0,
        }

    def close(self) -> None:
        if self.control is not None:
            self.control.close()
        for session in list(self._sessions.values()):
            session.executor.stop("prefill server stops")
