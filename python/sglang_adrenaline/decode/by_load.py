"""Ratio auto between SGLang's scheduler, links and `auto.LoadDecider`: gathers the figures, keeps the order of turns.

Scheduler thread. Nothing is read from SGLang while every request behind the one whose turn it is waits.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

from sglang_adrenaline import auto_cost, compat, policy
from sglang_adrenaline.config import AdrenalineConfig
from sglang_adrenaline.decode.auto import Admission, Here, LoadDecider, There
from sglang_adrenaline.decode.links import Address, Link, Peer
from sglang_adrenaline.decode.memory import KeptFree
from sglang_adrenaline.decode.offload import Offload, OffloadState
from sglang_adrenaline.decode.prefixes import BLOCK_TOKENS, KeptPrefixes, block_names
from sglang_adrenaline.decode.step_times import LinkTotals, StepTimes

TURNS = 8
"""Requests that are decided in one scheduler loop, at most: admitting one takes about a millisecond, for which the next
step must not have to wait when many answers end together."""


def make_decider(
    config: AdrenalineConfig, scheduler: Any, admission: Admission, page_size: int, halves_from: int
) -> LoadDecider:
    """halves_from: rows of a batch that runs as two halves, 0 = none does.

    Raises ConfigError on a profile of another device or model.
    """
    model = auto_cost.served_model(compat.model_config(scheduler))
    cost = auto_cost.for_server(config, model, compat.device_name(scheduler))
    settings = policy.LoadSettings(
        page_size=page_size,
        min_tokens=config.min_offload_tokens,
        max_pinned_fraction=config.max_pinned_fraction,
        max_rows=cost.rows_max(),
        slo_tpot_s=config.objective_s("tpot"),
    )
    return LoadDecider(
        cost,
        settings,
        admission,
        halves_from=halves_from,
        slo_ttft_s=config.objective_s("ttft"),
    )


@dataclass
class UnderWay:
    """Prompts that prefill instances compute, or are to compute, for this decode instance."""

    prompts: Counter[Address] = field(default_factory=Counter)
    held_tokens: int = 0
    """Of decode's pool."""

    def add(self, address: Address, local_tokens: int) -> None:
        self.prompts[address] += 1
        self.held_tokens += local_tokens


class ByLoad:
    """One a decode scheduler with ratio auto."""

    def __init__(self, decider: LoadDecider, scheduler: Any, pool_tokens: int, kept_free: KeptFree) -> None:
        self.decider = decider
        self.turns_over = False
        """No further request can be decided in this scheduler loop: the one whose turn it is waits for memory."""
        self.kept = KeptPrefixes()
        self._scheduler = scheduler
        self._pool_tokens = pool_tokens
        self._kept_free = kept_free
        self._here: Here | None = None
        """As it is in this scheduler loop; None until it is asked for."""
        self._there: dict[str, There] | None = None
        """The same, with what was decided in this loop."""
        self._under_way: UnderWay | None = None
        """The same."""
        self._targets: dict[str, Address] = {}
        """Of requests that were decided and had no row yet when this loop's first was."""
        self._undecided = 0
        """Requests that are left to be decided in this loop or a later one."""
        self._turns = TURNS
        self._times = StepTimes()
        self._looped_at = 0.0

    def new_loop(self, offloads: Iterable[Offload], peers: Iterable[Peer], links: Iterable[Link]) -> None:
        """Before the queues are looked at. Tells the policy, now and then, how long steps took and waited."""
        self._here, self._there, self._under_way, self.turns_over, self._turns = None, None, None, False, TURNS
        now = time.monotonic()
        took, self._looped_at = now - self._looped_at, now
        if not compat.ran_decode_step(self._scheduler):
            return
        if self._times.add(took):
            running = compat.running_requests(self._scheduler)
            self.decider.stepped(len(running), compat.num_admitted(self._scheduler))
            reads = [offload for offload in offloads if offload.state is OffloadState.READY]
            tokens = sum(compat.prompt_len(req) + compat.output_len(req) for req in running)
            local = tokens - sum(offload.remote_prefix_len for offload in reads)
            there = prefill_now(reads, peers, self.kept)
            self._times.predicted(self.decider.predict(len(running), max(local, 0), there))
        window = self._times.window(_totals(link) for link in links if link.alive)
        if window is not None:
            self.decider.observe(window)

    def decide(
        self, offload: Offload, link: Link, offloads: Iterable[Offload], peers: Iterable[Peer]
    ) -> policy.Decision | None:
        """The split of a request whose turn it is; None, also for those behind it, while decode has no room for it, and
        None, also for those behind it with the same prefill instance, while that one has enough to compute."""
        admission, rid, address = self.decider.admission, compat.rid(offload.req), link.peer.address
        if self._under_way is None:
            self._under_way = self._prompts_under_way()
        if policy.has_enough(self._under_way.prompts[address], self._under_way.held_tokens, self._pool_tokens):
            return None
        if self._here is None:
            self._here = self._decode_now()
            self._undecided = sum(each.split_open for each in offloads)
        self._undecided -= 1
        names = _names(offload)
        cached, coming = self.kept.expected(link.index, names)
        request = policy.Request(
            prompt_len=offload.prompt_len,
            shared_tokens=self.kept.leading(link.index, names),
            cached_tokens=cached,
            coming=coming,
            local_cached_tokens=compat.locked_prefix_len(self._scheduler, offload.req),
        )
        if self._there is None:
            self._there = prefill_now([each for each in offloads if each.holds_prefix], peers, self.kept)
        limit = compat.answer_limit(offload.req)
        here = replace(self._here, undecided=self._undecided)
        decision = self.decider.decide(rid, request, limit, link.peer.name, here, self._there)
        if decision is not None:
            self._targets[rid] = address
            self._under_way.add(address, admission.prompt_of(rid))
        self._turns -= 1
        self.turns_over = decision is None or self._turns == 0
        return decision

    def offered(self, offload: Offload, link: Link) -> None:
        """The prefill instance was asked to keep the offload's prefix, by load or because the request wished so."""
        names, tokens, peer = _names(offload), offload.remote_prefix_len, link.peer.name
        offload.shared_tokens = min(self.kept.leading(link.index, names), tokens)
        self.kept.keep(compat.rid(offload.req), link.index, names[: tokens // BLOCK_TOKENS])
        if self._there is not None and peer in self._there:
            self._there[peer] = self._there[peer].with_one_more(tokens - offload.shared_tokens)

    def _prompts_under_way(self) -> UnderWay:
        admission, under_way = self.decider.admission, UnderWay()
        self._targets = {rid: address for rid, address in self._targets.items() if rid in admission.waiting}
        for rid, address in self._targets.items():
            under_way.add(address, admission.prompt_of(rid))
        for req in compat.requests_in_transfer(self._scheduler):
            under_way.add(compat.bootstrap_address(req), admission.prompt_of(compat.rid(req)))
        return under_way

    def _decode_now(self) -> Here:
        running = compat.running_requests(self._scheduler)
        return Here(
            pool_tokens=self._pool_tokens,
            unclaimed_tokens=compat.unclaimed_tokens(self._scheduler),
            kept_free=self._kept_free,
            answer_tokens=sum(map(compat.output_len, running)),
            rows=compat.num_admitted(self._scheduler),
            running=len(running),
        )


def _names(offload: Offload) -> list[int]:
    """Of the prompt's blocks; worked out once, since a request's turn may take many loops to come."""
    if offload.block_names is None:
        offload.block_names = block_names(compat.prompt_ids(offload.req))
    return offload.block_names


def _totals(link: Link) -> LinkTotals:
    channel, stats = link.channel, link.peer.stats
    return LinkTotals(
        link.index,
        link.peer.name,
        channel.steps,
        channel.exposed_wait_s,
        channel.local_span_s,
        stats.busy_s if stats is not None else 0.0,
        stats.worked_s if stats is not None else 0.0,
        stats.read_tokens if stats is not None else 0,
    )


def prefill_now(offloads: Iterable[Offload], peers: Iterable[Peer], kept: KeptPrefixes) -> dict[str, There]:
    """Connected prefill instances that have reported, with the prefixes of these offloads."""
    held: dict[int, list[Offload]] = {}
    for offload in offloads:
        if offload.link is not None:
            held.setdefault(offload.link.index, []).append(offload)
    there = {}
    for peer in peers:
        reported_at, stats, link = peer.stats_at, peer.stats, peer.link  # in this order: see Peer.on_message
        if link is None or stats is None:
            continue
        ours = held.get(link.index, [])
        # What was pinned before the report is in it, since both come from one thread; what ended since is left in.
        since = sum(
            o.remote_prefix_len - o.shared_tokens for o in ours if o.ready_at == 0.0 or o.ready_at > reported_at
        )
        there[peer.name] = There(
            pool_tokens=stats.pool_tokens,
            pinned_tokens=stats.pinned_tokens + since,
            read_tokens=sum(o.remote_prefix_len for o in ours) - kept.shared_tokens(compat.rid(o.req) for o in ours),
            lanes=link.lanes,
            lanes_in_use=len(ours),
            prefill_load=stats.prefill_load,
            lasting_load=stats.lasting_load,
            executor_share=stats.executor_share,
        )
    return there
