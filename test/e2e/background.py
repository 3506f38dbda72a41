"""A client in the background, for tests that do something to the servers while it waits for its answer."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field

import requests
from cases import prompt
from compare import with_split


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
