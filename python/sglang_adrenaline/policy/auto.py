"""Offloads by load (`--adrenaline-offload-ratio auto`): where to split a prompt so that remote time hides under local.

In a step, attention over the suffixes here and over the prefixes of each prefill instance i run at the same time:

    t_local = local / rate_d            t_i = round_trip_i + remote_i / rate_i

where remote_i has what rows share once, as executors read it, and t_local, where a batch runs as two halves, the work
of all layers on top. The step waits for the slowest of them, the water level. C2, the bandwidth condition: a prompt of
n tokens may leave P on instance i as long as t_i stays under the level, which is raised by the n - P that stay here:

    P <= (level of the other instances - round_trip_i) * rate_i - remote_i
    or P <= ((local + n) / rate_d - round_trip_i - remote_i / rate_i) / (1 / rate_i + 1 / rate_d)
    or P <= what of it is read there for other rows anyway, which remote_i leaves out above

A prompt with too little that is new there to be split goes where the step is shorter with it: there, if t_i with all of
it stays under what the level would be with all of it here. So does one of which next to nothing is new there, though it
be what the step waits for: attention to all of it here would hide on the mean, but not in every step. With c for what
hidden work costs, as share of its time:

    (1 + c) * new / rate_i < c * n / rate_d

Where m requests are to come whose prompts begin alike, they are looked at together, too: there the executor reads what
they share once, here each row reads its own. Alone, the first of them would stay here for what the others do not add.

Rates are the profile's as measured steps correct them (`feedback.py`).

C1, the memory condition: P fits under the cap on pinned tokens. A request that finds no room here, or takes what those
behind it need, makes one wait. It goes remote beyond the hidden part, within C1, if that gains throughput, as long as
the batch stays under B_max and the step within the TPOT SLO. It gains where a step's fixed time is spread over more
rows by more than remote reads add: with `used` tokens of decode memory in use, a share of all but what is kept free for
answers to grow (the next prompt seldom fits to a token), a batch takes fixed / rows + remote tokens of a row / rate_i
per token, and moving one token out makes room for 1 / used more of the batch, so it pays where

    1 / rate_i < fixed / used

Requests whose prompts are being computed hold memory, too, but steps read nothing of theirs: of `used` and of what
requests have in all, steps read the share `duty`.

Where C1 is what keeps a prompt from going remote, it stays here only if that does not make tokens dearer, else it waits
until prefixes of ours end: a local row adds its whole prompt to every step, and in a batch of cheaper rows each token
would take longer with it than without,

    step(rows + 1) / (rows + 1) > step(rows) / rows

C3, where executor and prefill share all SMs: the part of a step's time in which the executor has the device is missing
to prefill, so it takes no more than keeps prefill's queue from growing, 1 - load / utilisation. A request that finds no
room here while prefill has no prompt of ours to compute and keeps up is not held to that: it would leave prefill idle.
Where prefill is what bounds a deployment nothing is offloaded, however the SMs are shared.

Whole prompts are preferred to split ones: a whole remote prompt needs no transfer, a local one no round trip.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Mapping

import msgspec

from sglang_adrenaline.policy.pace import Pace
from sglang_adrenaline.policy.views import DecodeView, LoadSettings, PrefillView, Request, pin_room
from sglang_adrenaline.policy.wish import page_floor, wished_split


class Reason(enum.StrEnum):
    """Why a request was decided as it was; metric labels."""

    WISH = "wish"
    SHORT = "short"
    NO_PEER = "no_peer"
    NOT_WORTH = "not_worth"
    HIDDEN = "hidden"
    OVERFLOW = "overflow"
    TOO_LONG = "too_long"
    LEVEL = "level"
    PREFILL = "prefill"
    CAP = "cap"
    WAIT = "wait"
    """Not decided yet: to be asked again when a prefix has ended."""


class Decision(msgspec.Struct, frozen=True):
    """split: tokens that stay remote, whole pages, 0..prompt_len. reason: what allowed or, at 0, forbade it."""

    split: int
    reason: Reason


class LoadState(msgspec.Struct, frozen=True):
    """What decisions and observations carry on."""

    pressed: bool = False
    """Requests that wait do not all fit into decode's memory, or did not of late."""
    reuse: float = 0.0
    """Running share of prompt tokens that were already on the prefill side."""
    limited: bool = False
    """The last request that the water level decided about stayed local for it."""
    local_pace: Pace = Pace()
    """Attention here."""
    paces: Mapping[str, Pace] = {}
    """Per prefill instance whose executor reports how fast it is."""
    work_paces: Mapping[str, Pace] = {}
    """The same, of the time in which the executor had the device: what it takes from prefill where they share it."""
    trips: Mapping[str, float] = {}
    """Per prefill instance: seconds a step that round trips take beyond what its view says; negative: less."""
    rates: Mapping[str, float] = {}
    """Per prefill instance without a pace: its executor's rate as share of what its view says, guessed from waits."""
    votes: Mapping[str, int] = {}
    """Likewise: observations in a row that asked for more (positive) or less (negative)."""
    extra_s: float = 0.0
    """What a step takes beyond its prediction; negative: less."""

    def rate_of(self, name: str) -> float:
        """A prefill instance's executor's rate as share of what its view says."""
        pace = self.paces.get(name)
        return pace.rate if pace is not None else self.rates.get(name, 1.0)

    def work_rate_of(self, name: str) -> float:
        """The rate at which its executor reads while it has the device, likewise; 1 where that is not measured."""
        return self.work_paces.get(name, Pace()).rate

    def trip_s(self, name: str, told_s: float) -> float:
        """Its round trips a step; `told_s`: by its view."""
        return max(told_s + self.trips.get(name, 0.0), 0.0)


def decide_by_load(
    state: LoadState,
    request: Request,
    target: str,
    decode: DecodeView,
    prefill: Mapping[str, PrefillView],
    settings: LoadSettings,
) -> tuple[Decision, LoadState]:
    """Decide about a request whose prompt is computed by the prefill instance `target`, when it is to be admitted.

    `prefill`: all instances on which this decode instance has or could have prefixes. Answers at once; holds a request
    back (WAIT) only for prefixes of this instance's running requests. A local one waits for memory as in stock SGLang.
    """
    length, page = request.prompt_len, settings.page_size
    if request.wish is not None:
        return Decision(wished_split(length, request.wish, page), Reason.WISH), state
    reused = max(request.shared_tokens, request.cached_tokens) / length if length else 0.0
    work_rate = prefill[target].attention_rate * state.work_rate_of(target) if target in prefill else 0.0
    decode, prefill = _as_measured(state, decode, prefill)
    pressed = _pressed(state.pressed, request, decode, settings)
    reuse = state.reuse + settings.reuse_weight * (reused - state.reuse)
    limited = state.limited
    peer = prefill.get(target)
    if peer is None:
        decision = Decision(0, Reason.NO_PEER)
    elif length < settings.min_tokens:
        decision = Decision(0, Reason.SHORT)
    else:
        spare = _spare(state, request, decode, peer, work_rate, settings)
        level = _hidden(request, target, decode, prefill, settings)
        hidden = min(level, spare)
        if reused < 0.5:
            hidden *= 1.0 - settings.reuse_reserve * state.reuse
        overflow = 0.0
        if pressed:
            limit = math.inf if _starves(request, decode, peer, settings) else spare
            overflow = min(_overflow(state, request, decode, peer, settings), limit)
        decision = _decide(request, hidden, overflow, decode, peer, settings)
        if decision.reason is Reason.CAP and peer.read_tokens and _dilutes(state, request, decode, prefill):
            decision = Decision(0, Reason.WAIT)
        if level <= spare and decision.reason in (Reason.LEVEL, Reason.HIDDEN):
            limited = decision.reason is Reason.LEVEL
        elif decision.reason is Reason.LEVEL:
            decision = Decision(0, Reason.PREFILL)
    return decision, msgspec.structs.replace(state, pressed=pressed, reuse=reuse, limited=limited)


def _as_measured(
    state: LoadState, decode: DecodeView, prefill: Mapping[str, PrefillView]
) -> tuple[DecodeView, dict[str, PrefillView]]:
    """The views with the rates and round trips that measured steps have told."""
    replace = msgspec.structs.replace
    peers = {
        name: replace(
            view,
            attention_rate=view.attention_rate * state.rate_of(name),
            round_trip_s=state.trip_s(name, view.round_trip_s),
        )
        for name, view in prefill.items()
    }
    return replace(decode, attention_rate=decode.attention_rate * state.local_pace.rate), peers


def _decide(
    request: Request, hidden: float, overflow: float, decode: DecodeView, peer: PrefillView, settings: LoadSettings
) -> Decision:
    """hidden, overflow: tokens that either rule allows; the caps come on top."""
    length = request.prompt_len
    room = min(length, pin_room(peer, settings) + request.shared_tokens) if peer.lanes_free > 0 else 0
    all_of_it = page_floor(room, settings.page_size)
    too_much = length + decode.growth_tokens - decode.pool_tokens
    if 0 < too_much <= all_of_it:
        return Decision(all_of_it, Reason.TOO_LONG)
    if overflow <= 0.0 and not _worth(request, decode, peer):
        return Decision(0, Reason.NOT_WORTH)
    if split := _split(min(room, max(hidden, overflow)), length, settings):
        return Decision(split, Reason.HIDDEN if split <= hidden else Reason.OVERFLOW)
    return Decision(0, Reason.CAP if room <= hidden else Reason.LEVEL)


def _pressed(before: bool, request: Request, decode: DecodeView, settings: LoadSettings) -> bool:
    """With hysteresis: begins when not all that wait would fit, ends when they fit with room to spare."""
    each = request.prompt_len - request.local_cached_tokens + decode.growth_tokens
    spare = decode.free_tokens - (1 + decode.waiting) * each
    return spare < (settings.relief * decode.pool_tokens if before else 0)


def _hidden(
    request: Request,
    target: str,
    decode: DecodeView,
    prefill: Mapping[str, PrefillView],
    settings: LoadSettings,
) -> float:
    """Tokens of this prompt that instance `target` can take without becoming what the step waits for.

    Of a prompt with too little that is new there to be split: all, where that is better than none. What is read there
    anyway the step waits for or not, whoever else shares it. Alone, or with those to come that begin like it.
    """
    others = 0.0
    for name, view in prefill.items():
        if name != target and view.read_tokens:
            others = max(others, view.round_trip_s + view.read_tokens / view.attention_rate)
    return max(_hidden_of(count, request, others, decode, prefill[target], settings) for count in {1, request.coming})


def _hidden_of(
    count: int, request: Request, others_s: float, decode: DecodeView, peer: PrefillView, settings: LoadSettings
) -> float:
    """The same of each of `count` requests like this one, which share `cached_tokens`; others_s: of other instances."""
    length, cached = request.prompt_len, request.cached_tokens
    rate, local_rate = peer.attention_rate, decode.attention_rate
    remote = _read_besides(request, peer)
    local = decode.local_tokens if decode.expected_tokens is None else decode.expected_tokens
    local_s = (local + count * length) / local_rate + decode.under_s
    new = length - request.shared_tokens
    if new < 2 * settings.split_tokens:
        of_the_others = (count - 1) * (length - cached)
        whole = (max(others_s, local_s) - peer.round_trip_s) * rate - remote - of_the_others
        if whole > length:
            return whole
        cost = settings.hidden_cost
        if (1.0 + cost) * (new + of_the_others) / rate < cost * count * length / local_rate:
            return length
    fill = (others_s - peer.round_trip_s) * rate - remote
    if fill > cached:
        fill = cached + (fill - cached) / count
    ahead_s = local_s - peer.round_trip_s - remote / rate
    balance = ahead_s / (1.0 / rate + count / local_rate)
    if balance > cached:
        balance = (ahead_s + (count - 1) * cached / rate) / (count / rate + count / local_rate)
    return max(fill, balance, request.shared_tokens)


def _read_besides(request: Request, peer: PrefillView) -> int:
    """Tokens the executor reads in a step besides this request's: what it reads for others anyway costs no more."""
    return peer.read_tokens - request.shared_tokens


def _spare(
    state: LoadState,
    request: Request,
    decode: DecodeView,
    peer: PrefillView,
    work_rate: float,
    settings: LoadSettings,
) -> float:
    """Tokens of this prompt that the executor can read in the time that prefill leaves it."""
    if peer.bounds:
        return 0.0
    load = peer.load_over(decode.life_s)
    if load <= 0.0:
        return math.inf
    part = max(1.0 - load / settings.prefill_utilisation, 0.0)
    attention_s = max(decode.local_tokens / decode.attention_rate, peer.read_tokens / peer.attention_rate)
    step_s = _fixed_s(state, decode.linear_s) + decode.duty * attention_s
    # By the time that it has the device: it reads slower than that where prefill takes its part of the time.
    return max(part * step_s * work_rate - decode.duty * _read_besides(request, peer), request.shared_tokens)


def _starves(request: Request, decode: DecodeView, peer: PrefillView, settings: LoadSettings) -> bool:
    """Whether prefill, which keeps up, has nothing to do until this request, which finds no room here, is admitted."""
    needed = request.prompt_len - request.local_cached_tokens + decode.growth_tokens
    keeps_up = peer.load_over(decode.life_s) < settings.prefill_utilisation and not peer.bounds
    return decode.computing == 0 and keeps_up and needed > decode.free_tokens


def _fixed_s(state: LoadState, linear_s: float) -> float:
    """Of a step without attention, as measured steps correct it."""
    return max(linear_s + state.extra_s, 0.0)


def _worth(request: Request, decode: DecodeView, peer: PrefillView) -> bool:
    """Whether a balanced split of all attention would save more than offloading costs; what is begun goes on longer."""
    total_s = (decode.local_tokens + request.prompt_len) / decode.attention_rate
    saved_s = total_s * peer.attention_rate / (peer.attention_rate + decode.attention_rate)
    return saved_s > (peer.overhead_s / 2 if peer.read_tokens else peer.overhead_s)


def _overflow(
    state: LoadState, request: Request, decode: DecodeView, peer: PrefillView, settings: LoadSettings
) -> float:
    """Tokens that a request may leave remote as one more row: within B_max, the SLO, and without loss of throughput."""
    duty, rate = decode.duty, peer.attention_rate
    fixed_s = _fixed_s(state, decode.linear_s) - decode.rows * decode.linear_row_s
    rows, read = duty * decode.rows, duty * peer.read_tokens
    used = settings.occupied * (decode.pool_tokens - decode.kept_tokens)
    if rows >= settings.max_rows or duty * used > fixed_s * rate:
        return 0.0
    linear_s = fixed_s + rows * decode.linear_row_s
    local_s = duty * decode.local_tokens / decode.attention_rate
    remote_s = peer.round_trip_s + read / rate if read else 0.0
    step_s = linear_s + max(local_s, remote_s)
    longest_s = step_s * (rows + 1) / rows if rows else math.inf
    if settings.slo_tpot_s is not None:
        longest_s = min(longest_s, settings.slo_tpot_s)
    attention_s = longest_s - linear_s - decode.linear_row_s
    if attention_s < local_s:
        return 0.0
    return max((attention_s - peer.round_trip_s) * rate - duty * _read_besides(request, peer), request.shared_tokens)


def _dilutes(state: LoadState, request: Request, decode: DecodeView, prefill: Mapping[str, PrefillView]) -> bool:
    """Whether one more local row makes each token of the batch take longer."""
    remote_s = max(view.round_trip_s + view.read_tokens / view.attention_rate for view in prefill.values())
    tokens = decode.local_tokens if decode.expected_tokens is None else decode.expected_tokens
    linear_s = _fixed_s(state, decode.linear_s)

    def step_s(more: int) -> float:
        local_s = (tokens + more * (request.prompt_len + decode.growth_tokens / 2)) / decode.attention_rate
        under_s = decode.under_s + (more * decode.linear_row_s if decode.under_s else 0.0)
        alone_s = linear_s + more * decode.linear_row_s - under_s
        return alone_s + max(local_s + under_s, remote_s)

    return decode.rows > 0 and step_s(1) / (decode.rows + 1) > step_s(0) / decode.rows


def _split(limit: float, length: int, settings: LoadSettings) -> int:
    """The largest split up to `limit` that is worth having: the whole prompt, or two parts that are both long."""
    if limit > length - 0.5:  # a balance that is a whole prompt up to rounding
        return page_floor(length, settings.page_size)
    split = page_floor(int(min(limit, length - settings.split_tokens)), settings.page_size)
    return split if split >= settings.split_tokens else 0
