"""What the ranks of a prefill server compare before they touch their radix trees: all lock or unlock a prefix, or none.

Scheduler thread; every function is a collective of all ranks, at the same point of the same loop.
"""

from __future__ import annotations

from collections.abc import Callable

from sglang_adrenaline.prefill.pins import Pin, PinTable
from sglang_adrenaline.ranks import Ranks


def agreed_length(ranks: Ranks, claim: Pin | None) -> int | None:
    """Tokens to be locked for a prompt that all ranks have computed; 0: no rank has a reservation for it.

    None where reservations differ: a decode rank's word has not come yet, or ended the request already.
    """
    length = claim.remote_prefix_len if claim is not None else 0
    shortest, longest = ranks.lowest([length, -length])
    return length if shortest == -longest else None


def ended_everywhere(ranks: Ranks, pins: PinTable, steps_done: Callable[[str], int]) -> list[int]:
    """Pinned rooms that are over on all ranks. Which rooms are pinned is equal on all of them."""
    if ranks.tp_size == 1 and not pins.has_ending():
        return []
    rooms = pins.pinned_rooms()
    over = ranks.lowest([int(ended) for ended in pins.are_over(rooms, steps_done)])
    return [room for room, ended in zip(rooms, over, strict=True) if ended]
