"""What the decode server adds to SGLang's scheduler: which requests are offloaded, to where, and how each of them ends.

Lives in the decode scheduler's process. Messages of prefill instances arrive in control threads, which only change the
word of an `Offload`; everything that touches requests, rows or pools happens in the scheduler thread, and from what all
tensor-parallel ranks agreed on.
"""

from __future__ import annotations

import logging
import time
import uuid
from collections import Counter
from typing import TYPE_CHECKING, Any

from sglang_adrenaline import auto_cost, compat, messages, policy
from sglang_adrenaline.channel.base import ChannelShape, ChannelSpec, DecodeEnd
from sglang_adrenaline.channel.calls import calls_of
from sglang_adrenaline.channel.opening import open_decode_end
from sglang_adrenaline.config import AdrenalineConfig
from sglang_adrenaline.decode import agreement
from sglang_adrenaline.decode.auto import Admission
from sglang_adrenaline.decode.by_load import ByLoad, make_decider
from sglang_adrenaline.decode.forecast import MemoryForecast
from sglang_adrenaline.decode.links import Address, Link, LinkIndex, Peer
from sglang_adrenaline.decode.memory import ConstantReserve
from sglang_adrenaline.decode.offload import Offload, OffloadState, Word
from sglang_adrenaline.decode.peers import Peers
from sglang_adrenaline.decode.restarts import RestartedPrefill
from sglang_adrenaline.decode.table import OffloadTable
from sglang_adrenaline.errors import PeerLostError
from sglang_adrenaline.keys import load_key_file
from sglang_adrenaline.model_shape import host_id, local_model_shape

if TYPE_CHECKING:  # needs CUDA's libraries
    from sglang_adrenaline.channel.ipc_endpoint import IpcEndpoints

logger = logging.getLogger(__name__)

CONNECT_WAIT_S = 2.0
"""How long the first requests of a new prefill instance wait for its control plane before they are served locally."""
FORCED_CONNECT_WAIT_S = 10.0
"""The same for a request that names its split."""
OFFER_WAIT_S = 5.0
MAX_UNPLACED = 32
"""Offers that may be out for requests without a row in decode's pool. Prefill keeps room for an accepted prompt, so
those that would wait long for decode's memory are offered when their turn comes, not when they arrive. With ratio auto,
requests that were decided to be local count as well."""
READY_WAIT_S = 10.0
"""Between the arrival of the transfer and the word that the prefix is pinned."""


class DecodeRuntime:
    """One a decode scheduler process."""

    def __init__(self, config: AdrenalineConfig) -> None:
        self.config = config
        self.instance = uuid.uuid4().hex
        self.table = OffloadTable()
        self.endpoints: IpcEndpoints | None = None
        """On a GPU: where the kernels of the decode steps find their channels; made by the attention backend."""
        self.halves_from = 0
        """Rows of a batch that runs as two halves in turn; the attention backend of a GPU knows. 0: none does."""
        self.offloaded_total = 0
        self.local_total = 0
        self.failed_total = 0
        self.nacks: Counter[str] = Counter()
        self._scheduler: Any = None
        self._policy = policy.State()
        self._settings: policy.Settings | None = None
        self._keys = load_key_file(config.key_file) if config.key_file else None
        self._peers = Peers(self._connect)
        self._new_index = LinkIndex()
        self._offloads: dict[int, Offload] = {}
        """By room; every one that is not over."""
        self._admission = Admission()
        self._by_load: ByLoad | None = None
        """With ratio auto."""
        self.loops = 0
        """Of the scheduler, so far."""
        self.forecast: MemoryForecast | None = None
        """With admission by forecast."""

    # ---- start ------------------------------------------------------------------------------------------------------

    def attach_endpoints(self, endpoints: IpcEndpoints) -> IpcEndpoints:
        """Called when the attention backend of a GPU is built, before its graphs and before the scheduler exists."""
        self.endpoints = endpoints
        return endpoints

    def attach_scheduler(self, scheduler: Any) -> None:
        pool = compat.pool_shape(scheduler)
        self._scheduler = scheduler
        self._ranks = compat.ranks(scheduler)
        self._ratio = ratio = auto_cost.ratio_for(self.config, compat.model_config(scheduler))
        fixed = 0.0 if ratio == "auto" else ratio
        self._settings = policy.Settings(fixed, self.config.min_offload_tokens, pool.page_size)
        reserve = compat.reserved_decode_tokens(scheduler)
        if self.config.admission == "forecast":
            self.forecast = MemoryForecast(pool.tokens, reserve)
        if ratio == "auto" and self._ranks.is_first:
            decider = make_decider(self.config, scheduler, self._admission, pool.page_size, self.halves_from)
            kept_free = self.forecast or ConstantReserve(reserve, lambda: compat.num_admitted(scheduler))
            self._by_load = ByLoad(decider, scheduler, pool.tokens, kept_free)
        self._shape = local_model_shape(scheduler)
        self._pool = pool
        self._restarted = RestartedPrefill(scheduler)

    def _hello(self) -> messages.Hello:
        return messages.make_hello(
            instance=self.instance,
            model=self._shape,
            host_id=host_id(),
            tp_rank=self._ranks.tp_rank,
            tp_size=self._ranks.tp_size,
            page_size=self._pool.page_size,
            lanes_wanted=self.config.lanes_for(compat.device(self._scheduler).type),
        )

    def _open_channel(self, spec: ChannelSpec, peer: Peer) -> DecodeEnd:
        """Control thread. Raises ChannelError."""
        device = compat.device(self._scheduler)
        return open_decode_end(
            spec,
            device=device.index if device.type == "cuda" else None,
            endpoints=self.endpoints,
            wait_timeout=self.config.wait_timeout,
            expected=self._channel_shape(spec.shape.lanes),
            peer=peer.name,
            host=peer.address[0],
        )

    def _channel_shape(self, lanes: int) -> ChannelShape:
        """What a channel must look like; the number of lanes is prefill's choice."""
        shape = self._shape
        return ChannelShape(
            lanes=lanes,
            num_layers=calls_of(shape.num_layers, compat.device(self._scheduler).type),
            num_qo_heads=shape.num_qo_heads,
            head_dim=shape.head_dim,
            v_head_dim=shape.v_head_dim,
            dtype=shape.dtype,
        )

    # ---- a request's way to being remote (scheduler thread) ---------------------------------------------------------

    def consider(self, req: Any) -> Offload | None:
        """Decide about a new request; None means that it is local and stays so."""
        room, length = compat.room(req), compat.prompt_len(req)
        if compat.is_warmup(req) or room is None or not 0 <= room <= messages.MAX_ROOM:
            return None
        assert self._settings is not None
        try:
            wish = policy.requested_prefix_len(compat.custom_params(req), length)
        except ValueError:  # the front end let it pass, so the prompt was cut since: then for this prompt's whole
            wish = policy.WHOLE_PROMPT
        by_load = self._ratio == "auto" and wish is None
        remote, self._policy = policy.decide(self._policy, length, wish, self._settings)
        if (remote == 0 and not by_load) or room in self._offloads:
            self.local_total += 1
            return None
        offload = Offload(
            req=req,
            room=room,
            address=compat.bootstrap_address(req),
            remote_prefix_len=remote,
            prompt_len=length,
            created_at=time.monotonic(),
            forced=wish is not None,
            split_open=by_load,
        )
        if not self._peers.ask(offload.address, self._addresses_in_use):
            # Other ranks may have the peer: they have to hear that this one has not.
            self._decline(offload, "no_peer")
        self._offloads[room] = offload
        if not by_load:
            self.advance(offload)
        return offload

    def _addresses_in_use(self) -> set[Address]:
        return {offload.address for offload in self._offloads.values()}

    def _links_in_use(self) -> set[int]:
        return {offload.link.index for offload in self._offloads.values() if offload.link is not None}

    def _connect(self, address: Address) -> Peer | None:
        port = address[1] + self.config.control_port_offset + self._ranks.tp_rank
        if self._keys is None or not 0 < port < 65_536:
            return None
        return Peer(
            address,
            port,
            self.config,
            self._keys,
            hello=self._hello,
            open_channel=self._open_channel,
            new_index=self._new_index,
            on_message=self._on_message,
            on_lost=self._on_lost,
            restarted=self._restarted,
        )

    def advance(self, offload: Offload) -> None:
        """Called at every poll of the request while its transfer is being prepared or under way."""
        now = time.monotonic()
        if offload.to_be_offered:
            self._try_to_offer(offload, now)
        elif offload.word is Word.WAITING and now - offload.created_at > OFFER_WAIT_S:
            self._decline(offload, "no_answer")

    def _try_to_offer(self, offload: Offload, now: float) -> None:
        by_load = offload.split_open
        if by_load and (self._by_load is None or self._turns_over(self._by_load)):
            return  # its turn has not come, or the first rank has not said so yet
        peer = self._peers[offload.address]
        link = peer.link
        if link is not None and by_load:
            if peer.stats is not None or now > offload.created_at + CONNECT_WAIT_S:
                self._decide_by_load(offload, link)
        elif link is not None:
            if len(self._admission.waiting) < MAX_UNPLACED:
                self._offer(offload, link)
        elif peer.refused:
            self._decline(offload, "refused")
        elif now > (offload.created_at + FORCED_CONNECT_WAIT_S if offload.forced else peer.since + CONNECT_WAIT_S):
            self._decline(offload, "unreachable")

    def _turns_over(self, by_load: ByLoad) -> bool:
        """Whether no further request can be decided by load in this scheduler loop."""
        return by_load.turns_over or len(self._admission.waiting) >= MAX_UNPLACED

    def _decide_by_load(self, offload: Offload, link: Link) -> None:
        """Decide if it is the request's turn; those behind it are not looked at before it was decided."""
        assert self._by_load is not None
        decision = self._by_load.decide(offload, link, self._offloads.values(), self._peers)
        if decision is not None and decision.split:
            offload.remote_prefix_len = decision.split
            self._offer(offload, link)
        elif decision is not None:
            offload.decline()

    def _offer(self, offload: Offload, link: Link) -> None:
        offload.link = link
        offload.created_at = time.monotonic()
        self._peers.use(link)
        if self._by_load is not None:
            self._by_load.offered(offload, link)
        self._will_take(offload, offload.prompt_len - offload.remote_prefix_len)
        link.send(
            messages.Offer(
                room=offload.room,
                remote_prefix_len=offload.remote_prefix_len,
                prompt_len=offload.prompt_len,
                prompt_digest=compat.prompt_digest(offload.req),
            )
        )

    def _will_take(self, offload: Offload, local_tokens: int) -> None:
        req = offload.req
        self._admission.decided(compat.rid(req), local_tokens, compat.answer_limit(req))

    def _decline(self, offload: Offload, reason: str) -> None:
        """This rank cannot offload the request, unless an answer came at the last moment."""
        if offload.decline():
            self.nacks[reason] += 1

    def of(self, req: Any) -> Offload | None:
        """The offload of a request that is remote; None for local ones."""
        room = compat.room(req)
        offload = self._offloads.get(room) if room is not None else None
        return offload if offload is not None and offload.req is req and offload.is_remote else None

    def on_row(self, req: Any, own_tokens: int) -> None:
        """The request got its row of req_to_token; own_tokens: of its prompt, in slots that it got for itself."""
        if self.forecast is not None:
            self.forecast.placed(req, own_tokens)
        offload = self.of(req)
        local_tokens = compat.prompt_len(req) - (offload.remote_prefix_len if offload is not None else 0)
        self._admission.placed(compat.rid(req), local_tokens)
        if offload is None:
            self.table.clear(compat.rid(req))
            return
        link = offload.link
        assert link is not None
        offload.retracting = False  # if it was retracted, it is back
        # The lane is known at READY at the latest, before the request joins a batch.
        self.table.set(compat.rid(req), length=offload.remote_prefix_len, link=link.index, lane=max(offload.lane, 0))
        if offload.state is OffloadState.FAILED:
            self._fail_now(offload)

    def await_ready(self, offload: Offload) -> None:
        """The transfer is done, the word that the prefix is pinned is missing: it may not stay so for long."""
        now = time.monotonic()
        offload.transferred_at = offload.transferred_at or now
        if now - offload.transferred_at > READY_WAIT_S:
            offload.lose(f"prefill {offload.address[0]}:{offload.address[1]} did not pin the prompt's KV in time")

    def on_transferred(self, offload: Offload) -> None:
        """The request has all it needs to decode."""
        assert offload.link is not None
        rid = compat.rid(offload.req)
        self.table.set(rid, length=offload.remote_prefix_len, link=offload.link.index, lane=offload.lane)

    # ---- a request's end (scheduler thread) -------------------------------------------------------------------------

    def before_release(self, req: Any) -> None:
        """The request's row is about to be freed."""
        if self.forecast is not None:
            self.forecast.gone(req)
        offload = self.of(req)
        self.table.clear(compat.rid(req))
        self._admission.gone(compat.rid(req))
        if self._by_load is not None and compat.is_finished(req):
            self._by_load.decider.answered(compat.output_len(req))
        if offload is not None and not offload.retracting:
            self.end(offload)

    def end(self, offload: Offload) -> None:
        """The request is over: let prefill unpin. Idempotent."""
        self._admission.gone(compat.rid(offload.req))
        if self._offloads.get(offload.room) is not offload:
            return
        self._forget(offload)
        self._give_back(offload)
        if offload.state is OffloadState.FAILED:
            self.failed_total += 1
        elif offload.state is OffloadState.READY:
            self.offloaded_total += 1
        else:
            self.local_total += 1

    def _forget(self, offload: Offload) -> None:
        del self._offloads[offload.room]
        if self._by_load is not None:
            self._by_load.kept.drop(compat.rid(offload.req))

    def _give_back(self, offload: Offload) -> None:
        """Whatever our prefill rank keeps for the request; it does not mind if that is nothing."""
        if offload.link is not None:
            offload.link.send(messages.End(room=offload.room, last_step=offload.link.channel.steps))

    def retracting(self, req: Any) -> None:
        """The row is about to be released, but the request comes back for it: the prefix stays pinned."""
        offload = self.of(req)
        if offload is not None:
            offload.retracting = True

    def pump(self) -> None:
        """Once a scheduler loop, before the queues are looked at."""
        self.loops += 1
        if self.forecast is not None:
            self.forecast.new_loop()
        if compat.no_request_waits_for_a_row(self._scheduler):
            self._admission.nobody_waits()
        if self._by_load is not None:
            self._by_load.new_loop(self._offloads.values(), self._peers, self._peers.links)
        self._agree()
        for offload in list(self._offloads.values()):
            if offload.state is OffloadState.LOCAL:
                self._become_local(offload)
            elif offload.state is OffloadState.FAILED:
                self._fail_now(offload)
            elif offload.retracting and not compat.is_retracted_and_waiting(self._scheduler, offload.req):
                self.end(offload)  # aborted while it was retracted
        self._peers.tidy(self._addresses_in_use, self._links_in_use)

    def _agree(self) -> None:
        """Compare with the other ranks what became of each request. All ranks come here together."""
        offloads = list(self._offloads.values())
        said = agreement.say(offloads, decides=self._ranks.is_first)
        agreement.hear(offloads, self._ranks.lowest(said))

    def _become_local(self, offload: Offload) -> None:
        """Stock behaviour from here on. If the request has no row yet, it will take room for its whole prompt."""
        self.local_total += 1
        self._forget(offload)
        self._give_back(offload)
        if offload.word is not Word.NO:
            self.nacks["other_rank"] += 1
        rid = compat.rid(offload.req)
        if rid not in self._admission.waiting or offload.link is None:  # without an offer it was decided to be local
            return
        if self._by_load is not None:
            self._will_take(offload, offload.prompt_len)
        else:
            self._admission.gone(rid)  # local requests do not count here

    def _fail_now(self, offload: Offload) -> None:
        """Let a request whose prefix is gone end with the reason, wherever it is."""
        req = offload.req
        if compat.row(req) is not None:
            self.table.disconnect(compat.rid(req))
            compat.finish_with_error(req, offload.failure)
        elif offload.retracting:
            if compat.is_retracted_and_waiting(self._scheduler, req):
                compat.abort_retracted(self._scheduler, req, offload.failure)
            self.end(offload)

    # ---- steps (scheduler thread, inside the forward pass) ----------------------------------------------------------

    @property
    def halves_pay(self) -> bool:
        """Whether a batch that may run as two halves should."""
        return self._by_load is None or self._by_load.decider.halves_pay

    def link(self, index: int) -> Link:
        return self._peers.link(index)

    def step_failed(self, link: Link, reason: str) -> None:
        """This rank could not finish a step with this link: `after_step` ends what depends on it, on all ranks."""
        link.close(reason)
        if link.peer.link is link:  # else that session is over already, and the next one has nothing to do with this
            link.peer.client.reconnect(reason)
        self._on_lost(link, reason)

    def after_step(self) -> None:
        """A step with offloaded rows is complete on the device; its tokens are about to count on all ranks, or on none.

        On a GPU a step that could not be finished shows only now; on a CPU it showed in the forward pass.
        """
        for link in self._peers.links:
            if link.alive and link.channel.steps:
                try:
                    link.channel.check()
                except PeerLostError as error:
                    self.step_failed(link, str(error))
        self._agree()
        for offload in list(self._offloads.values()):
            if offload.state is OffloadState.FAILED:
                self._fail_now(offload)

    # ---- control threads --------------------------------------------------------------------------------------------

    def _on_message(self, link: Link, message: Any) -> None:
        offload = self._offloads.get(getattr(message, "room", -1))
        if offload is None or offload.link is not link:
            return
        match message:
            case messages.Accept():
                offload.accept()
            case messages.Ready(lane=lane):
                if lane >= link.lanes or any(o.lane == lane for o in self._offloads_of(link)):
                    offload.lose(f"{link.peer.name} gave it lane {lane}, which is not free")
                else:
                    offload.ready(lane)
            case messages.Nack(reason=reason, detail=detail):
                self.nacks[reason] += 1
                offload.lose(f"{link.peer.name} cannot keep the prompt's KV ({reason}): {detail}")

    def _offloads_of(self, link: Link) -> list[Offload]:
        return [offload for offload in list(self._offloads.values()) if offload.link is link]

    def _on_lost(self, link: Link, reason: str) -> None:
        for offload in self._offloads_of(link):
            offload.lose(f"{link.peer.name} held the prompt's KV and was lost: {reason}")

    # ---- reports ----------------------------------------------------------------------------------------------------

    def status(self) -> dict[str, Any]:
        """What `GET /adrenaline/status` shows. Scheduler thread."""
        steps, wait_s = self._peers.steps, self._peers.exposed_wait_s
        running = compat.running_requests(self._scheduler)
        remote = [offload for offload in self._offloads.values() if offload.is_remote]
        num_remote = sum(self.of(req) is not None for req in running)
        return {
            "role": "decode",
            "instance": self.instance,
            "offload_ratio": self._ratio,
            "peers": self._peers.status(),
            "running": {"local": len(running) - num_remote, "offloaded": num_remote},
            "tokens": {
                "remote": sum(offload.remote_prefix_len for offload in remote),
                "free": compat.pool_free_tokens(self._scheduler),
                "locked": compat.pool_locked_tokens(self._scheduler),
                "pool": self._pool.tokens,
            },
            "lanes_in_use": sum(offload.state is OffloadState.READY for offload in remote),
            "steps": steps,
            "totals": {"local": self.local_total, "offloaded": self.offloaded_total, "failed": self.failed_total},
            "local_total": self.local_total,
            "offloaded_total": self.offloaded_total,
            "failed_total": self.failed_total,
            "nacks": dict(self.nacks),
            "decisions": dict(self._by_load.decider.decisions) if self._by_load is not None else {},
            **(self._by_load.decider.status() if self._by_load is not None else {"pressed": False}),
            "exposed_wait_ms_total": round(wait_s * 1e3, 3),
            "exposed_wait_ms_per_step": round(wait_s * 1e3 / steps, 3) if steps else 0.0,
        }

    def close(self) -> None:
        self._peers.close()
