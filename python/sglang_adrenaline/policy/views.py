"""What the decision by load looks at: the request, the decode instance, the prefill instances, the settings.

Sizes are KV tokens of one rank, rates KV tokens that attention reads per second on one rank (over all layers), times
seconds. Every rank has to be handed the same values.
"""

from __future__ import annotations

import msgspec

from sglang_adrenaline.policy.prefill_load import load_over


class Request(msgspec.Struct, frozen=True, kw_only=True):
    """A request about to be admitted."""

    prompt_len: int
    wish: int | None = None
    """Its own split: None leaves it to us, `wish.WHOLE_PROMPT` or a number of tokens otherwise."""
    shared_tokens: int = 0
    """Leading prompt tokens that other requests of this decode instance already keep pinned on the prefill instance."""
    cached_tokens: int = 0
    """Leading prompt tokens in the prefill instance's radix tree, pinned or not; at least `shared_tokens`."""
    coming: int = 1
    """Requests, this one included, that are expected to be decided soon and to share these `cached_tokens`."""
    local_cached_tokens: int = 0
    """Leading prompt tokens in the decode instance's own radix tree."""


class DecodeView(msgspec.Struct, frozen=True, kw_only=True):
    """The deciding decode instance."""

    pool_tokens: int
    free_tokens: int
    """Neither used nor promised; what the radix tree could evict counts as free."""
    local_tokens: int
    """Tokens of all admitted requests that are attended to here in a step: suffixes and local prompts."""
    rows: int
    """Admitted requests."""
    computing: int | None = None
    """Of them, those whose prompts are being computed, or are yet to be; None: not known."""
    attention_rate: float
    expected_tokens: int | None = None
    """`local_tokens` as they will be on the mean while a new request runs (local prompts and half an output for every
    row): in a batch whose requests began together the suffixes are all short at first. None: as they are now."""
    duty: float = 1.0
    """Share of the admitted requests that decode at a time, 0..1: a step reads so much of what they all have."""
    linear_s: float = 0.0
    """Time of a step at `rows` without attention."""
    linear_row_s: float = 0.0
    """What one more row adds to it."""
    under_s: float = 0.0
    """Of a step, under which remote attention hides beside local attention: the work of all layers where a batch runs
    as two halves in turn (`attention/halves.py`), else nothing."""
    waiting: int = 0
    """Further requests that wait for their turn; as large as this one, for all that is known."""
    growth_tokens: int = 0
    """Room that admission asks for beside the prompt."""
    kept_tokens: int = 0
    """Of the pool, kept free for answers of admitted requests and this one: no step reads anything there."""
    life_s: float = 0.0
    """How long requests decode, on the mean."""


class PrefillView(msgspec.Struct, frozen=True, kw_only=True):
    """One prefill instance as this decode instance sees it."""

    pool_tokens: int
    pinned_tokens: int
    """Pinned or reserved for all decode instances, each slot once."""
    read_tokens: int
    """Tokens that its executor reads in a step of each of its decode instances, together; what rows share, once."""
    lanes_free: int
    attention_rate: float
    """Of the executor on its share of the device."""
    round_trip_s: float = 0.0
    """Per step: what all layers' round trips take when the executor has nothing to read."""
    overhead_s: float = 0.0
    """Per step: what offloading costs even when it is wholly hidden (put and merge of every layer)."""
    cache_reserve_tokens: int = 0
    """Head-room left to prefill's own work and cache."""
    prefill_load: float = 0.0
    """Where executor and prefill share all SMs: prefill work that arrives per second, in seconds of the device alone,
    over `prefill_load.BRISK_S`. 0 where they do not (then `sm_share` has seen to it)."""
    lasting_load: float | None = None
    """The same over LASTING_S; None: as `prefill_load`."""
    bounds: bool = False
    """Its prompts are what requests wait for, and will be for longer: see `prefill_load.bounded_by_prefill`."""

    def load_over(self, life_s: float) -> float:
        """Prefill's load as it counts for requests that decode for so long."""
        lasting = self.prefill_load if self.lasting_load is None else self.lasting_load
        return load_over(life_s, self.prefill_load, lasting)


class LoadSettings(msgspec.Struct, frozen=True, kw_only=True):
    """Set at start. SLOs in seconds, None: no such objective."""

    page_size: int = 1
    min_tokens: int = 16
    """Shorter prompts stay local."""
    max_pinned_fraction: float = 0.9
    split_tokens: int = 1024
    """A prompt is split only if both parts have as many; else it is whole here or whole there."""
    max_rows: int = 1 << 30
    """B_max: offloading does not enlarge a batch beyond it."""
    slo_tpot_s: float | None = None
    hidden_cost: float = 0.1
    """What work costs that hides under other work, as share of its time: it hides on the mean, not in every step."""
    reuse_reserve: float = 0.25
    """Share of the hidden room that is kept for requests with a reused prefix while all requests have one."""
    reuse_weight: float = 0.05
    """Weight of the newest request in the running share of reused prompt tokens."""
    prefill_utilisation: float = 0.85
    """Prefill may be kept busy up to this share of the time that executors leave it; less for an objective of TTFT. The
    rest goes to what is not in its load: a prefill server that always has prompts waiting reports 0.7 to 0.8 on a CPU
    (docs/measurements.md)."""
    occupied: float = 0.8
    """Of decode's memory, less what is kept for answers to grow, what requests hold on the mean while others wait for
    it (docs/scheduling.md)."""
    relief: float = 0.1
    """Memory pressure is over once a request fits with this share of the pool to spare."""
    wait_low: float = 0.01
    wait_high: float = 0.05
    """Exposed wait as share of a step: below the one there is room for more, above the other it is too much."""
    patience: int = 3
    """So many observations in a row have to agree before anything is changed."""


def pin_room(peer: PrefillView, settings: LoadSettings) -> int:
    """Tokens that may still be pinned on a prefill instance: under the cap, and with its own head-room left alone."""
    cap = min(int(settings.max_pinned_fraction * peer.pool_tokens), peer.pool_tokens - peer.cache_reserve_tokens)
    return max(cap - peer.pinned_tokens, 0)
