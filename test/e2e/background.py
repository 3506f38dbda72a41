"""A client in the background, for tests that do something to the servers while it waits, and how such clients end."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import requests
from cases import prompt
from compare import with_split
from servers import Group, ServerError, wait_until


@dataclass
class Client:
    """One request in a thread of its own; `ended` is the time of `time.monotonic` when its answer was complete."""

    url: str
    split: int
    tokens: int
    seed: int
    prompt_len: int = 120
    timeout_s: float = 120
    status: int = 0
    text: str = ""
    ended: float = 0.0
    thread: threading.Thread = field(init=False)

    def __post_init__(self) -> None:
        self.thread = threading.Thread(target=self._ask, daemon=True)
        self.thread.start()

    def _ask(self) -> None:
        sampling = {"temperature": 0, "max_new_tokens": self.tokens, "ignore_eos": True}
        payload = with_split({"input_ids": prompt(self.seed, self.prompt_len), "sampling_params": sampling}, self.split)
        try:
            reply = requests.post(f"{self.url}/generate", json=payload, timeout=self.timeout_s)
            self.status, self.text = reply.status_code, reply.text
        except requests.RequestException as error:
            self.status, self.text = -1, repr(error)
        self.ended = time.monotonic()


def expect_lost(clients: Sequence[Client], died: float, bound_s: float) -> None:
    """Each ends within `bound_s` of the death of the prefill server (`time.monotonic`), with that for a reason."""
    for client in clients:
        client.thread.join(max(0.1, died + bound_s + 5 - time.monotonic()))
        assert client.ended and client.ended - died < bound_s, client
        assert client.status >= 500 and "held the prompt's KV and was lost" in client.text, client.text


def expect_answered(clients: Sequence[Client], timeout_s: float) -> None:
    """`timeout_s`: for each, from now on."""
    for client in clients:
        client.thread.join(timeout_s)
        assert client.status == 200, client.text


def wait_until_offloading_works(group: Group, timeout_s: float = 60) -> None:
    """A server that came back, or can be reached again, is used again without a restart of the others."""

    def total() -> int:
        return int(group.status("decode")["totals"]["offloaded"])

    def works() -> bool:
        before = total()
        client = Client(group.url, split=-1, tokens=3, seed=9)
        client.thread.join(30)
        if client.status != 200:
            return False
        # Served locally it would be, too; and what ended is counted a moment after its answer.
        with contextlib.suppress(ServerError):
            wait_until(lambda: total() > before, 1, "it is counted as offloaded")
        return total() == before + 1

    wait_until(works, timeout_s, "an offloaded request is served again")
