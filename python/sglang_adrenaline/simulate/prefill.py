"""A prefill instance: first come, first served; a prefix cache; pins and the executor's load."""

from __future__ import annotations

from collections import OrderedDict

from sglang_adrenaline.cost_model import WHOLE_DEVICE, CostModel
from sglang_adrenaline.policy.prefill_load import BRISK_S, LASTING_S, ArrivedWork
from sglang_adrenaline.policy.sharing import Sharing
from sglang_adrenaline.simulate.trace import BLOCK_TOKENS, Req

BATCH_TOKENS = 8192
"""SGLang's chunk of prefill: prompts up to so many tokens share a batch."""


class PrefixCache:
    """Blocks by how recently they were used; pinned ones stay."""

    __slots__ = ("_blocks", "pins")

    def __init__(self) -> None:
        self._blocks: OrderedDict[int, None] = OrderedDict()
        self.pins: Sharing[int] = Sharing()

    def match(self, blocks: tuple[int, ...]) -> int:
        """Leading tokens that are there; they count as used."""
        held, matched = self._blocks, 0
        for block in blocks:
            if block not in held:
                break
            held.move_to_end(block)
            matched += 1
        return matched * BLOCK_TOKENS

    def insert(self, blocks: tuple[int, ...], room_tokens: int) -> None:
        """Add a prompt's blocks, then forget the oldest unpinned ones beyond `room_tokens`."""
        held, pins = self._blocks, self.pins.keepers
        for block in blocks:
            held[block] = None
            held.move_to_end(block)
        tries = len(held) if len(held) * BLOCK_TOKENS > room_tokens else 0
        while tries and len(held) * BLOCK_TOKENS > room_tokens:
            block, _ = held.popitem(last=False)
            if block in pins:
                held[block] = None
            tries -= 1

    def pinned_prefix(self, blocks: tuple[int, ...]) -> int:
        """Leading tokens that some request keeps pinned."""
        return self.pins.leading(blocks) * BLOCK_TOKENS

    def expected_prefix(self, blocks: tuple[int, ...]) -> tuple[int, int]:
        """(leading tokens that are or usually are pinned by several, requests with as many that are expected)."""
        count, coming = self.pins.expected(blocks)
        return count * BLOCK_TOKENS, coming


class Prefill:
    """One prefill instance. `share`: the executor's part of the device, WHOLE_DEVICE for no partition."""

    def __init__(self, index: int, cost: CostModel, pool_tokens: int, share: float, rate_error: float = 1.0) -> None:
        self.index, self.cost, self.pool_tokens = index, cost, pool_tokens
        self.cache = PrefixCache()
        self.lanes_in_use = 0
        self.pinned = 0
        """Each slot once: what its executor will read in a step once all of these requests decode."""
        self.kept = 0
        """The same with shared slots once a request."""
        self.reading = 0
        """Of `kept`, what belongs to requests that decode now."""
        self.step_s = 0.0
        """Of a decode instance that it last heard of."""
        self.free_at = 0.0
        self.busy_s = 0.0
        self._batch_tokens = BATCH_TOKENS
        self._arrived = ArrivedWork(BRISK_S)
        self._arrived_lasting = ArrivedWork(LASTING_S)
        figures = cost.share_figures(share) if share != WHOLE_DEVICE else None
        self.told_rate = figures.attention_bytes_s / cost.kv_token_bytes if figures else cost.attention_rate
        self._rate_error = rate_error
        self._factor = figures.prefill_factor if figures else None

    def submit(self, request: Req, now: float) -> float:
        """Queue the prompt; returns when its KV and its first token are there."""
        cached = min(self.cache.match(request.blocks), request.prompt - 1)
        request.cached = cached
        new = request.prompt - cached
        service = self.cost.prefill_s(new, cached)
        if now >= self.free_at or self._batch_tokens + new > BATCH_TOKENS:
            service += self.cost.profile.prefill_fixed_s
            self._batch_tokens = 0
        self._batch_tokens += new
        self._arrived.add(now, service)
        self._arrived_lasting.add(now, service)
        service /= self._speed()
        start = max(now, self.free_at)
        self.free_at = start + service
        self.busy_s += service
        if request.blocks:
            unshared = self.pinned - len(self.cache.pins.keepers) * BLOCK_TOKENS
            self.cache.insert(request.blocks, self.pool_tokens - unshared)
        return self.free_at

    @property
    def divided(self) -> bool:
        """Whether some SMs are the executor's alone."""
        return self._factor is not None

    def loads(self, now: float) -> tuple[float, float]:
        """`PrefillView.prefill_load` and `lasting_load`: 0 with divided SMs."""
        if self.divided:
            return 0.0, 0.0
        wait_s, speed = self.free_at - now, self._speed()
        return self._arrived.load(now, wait_s, speed), self._arrived_lasting.load(now, wait_s, speed)

    def rate(self, now: float) -> float:
        """What the executor reaches: it has all SMs while prefill has no work. The policy is told `told_rate`."""
        return self._rate_error * (self.told_rate if now < self.free_at else self.cost.attention_rate)

    @property
    def read_tokens(self) -> float:
        """What the executor reads in a step now; the running requests are taken to share as all do."""
        return self.reading * self.pinned / self.kept if self.kept else 0.0

    def _speed(self) -> float:
        """Of prefill beside the executor, as share of what it reaches alone."""
        if not self.reading:
            return 1.0
        if self._factor is not None:
            return self._factor
        # No partition: the executor's kernels come first and take their time from prefill.
        duty = self.read_tokens / (self._rate_error * self.told_rate) / self.step_s if self.step_s else 0.0
        return max(1.0 - duty, 0.1)

    def pin(self, request: Req, tokens: int) -> None:
        """Keep the first `tokens` of a prompt; each shared block counts once."""
        pins, fresh = self.cache.pins, 0
        blocks = request.blocks[: tokens // BLOCK_TOKENS]
        for block in blocks:
            fresh += pins.keep(block)
        request.room = tokens - len(blocks) * BLOCK_TOKENS
        self.pinned += fresh * BLOCK_TOKENS + request.room
        self.kept += tokens
        self.lanes_in_use += 1

    def unpin(self, request: Req, tokens: int) -> None:
        pins, gone = self.cache.pins, 0
        for block in request.blocks[: tokens // BLOCK_TOKENS]:
            gone += pins.drop(block)
        self.pinned -= gone * BLOCK_TOKENS + request.room
        self.kept -= tokens
        self.lanes_in_use -= 1
