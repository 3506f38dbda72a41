"""What the ranks of a decode server tell each other about their offloaded requests: one list of numbers a time.

Pure. All ranks have the same requests in the same order, since they come and go with SGLang's own, which are equal on
all ranks, and with agreed states. Of each number the lowest over all ranks is taken (`ranks.Ranks.lowest`): a word for
each request, then the split of each one whose split is open, which is the first rank's to decide.
"""

from __future__ import annotations

from collections.abc import Sequence

from sglang_adrenaline.decode.offload import Offload, Word

NOT_MINE = 2**62
"""In place of a split, from ranks that do not decide it."""
NO_SPLIT_YET = 0


def say(offloads: Sequence[Offload], *, decides: bool) -> list[int]:
    """What this rank has to say; `decides`: splits by load are decided here."""
    splits = [o.remote_prefix_len if decides else NOT_MINE for o in offloads if o.split_open]
    return [*(int(o.word) for o in offloads), *splits]


def hear(offloads: Sequence[Offload], lowest: Sequence[int]) -> None:
    """Take over what all ranks said; `offloads` as they were given to `say`, by this rank."""
    opened = [o for o in offloads if o.split_open]
    words, splits = lowest[: len(offloads)], lowest[len(offloads) :]
    for offload, word in zip(offloads, words, strict=True):
        offload.settle(Word(word))
    for offload, split in zip(opened, splits, strict=True):
        if split != NO_SPLIT_YET:
            offload.remote_prefix_len, offload.split_open = split, False
