"""The proof that a deployment works: a local and an offloaded request through the router both give tokens."""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from sglang_adrenaline.launcher.stages import StartFailed

REQUEST_TIMEOUT_S = 120.0
STATUS_TIMEOUT_S = 10.0
NUM_TOKENS = 4


@dataclass(frozen=True)
class WarmUp:
    """One request and how decode's status must show it."""

    name: str
    remote_prefix_len: int
    counter: str
    """Field of /adrenaline/status that counts requests of this kind."""
    input_ids: tuple[int, ...]


# Different prompts, so that neither is a prefix-cache hit of the other. Small ids exist in every vocabulary.
WARM_UPS = (
    WarmUp("local request", 0, "local_total", tuple(range(10, 40))),
    WarmUp("offloaded request", -1, "offloaded_total", tuple(range(40, 70))),
)


def run(router_url: str, decode_url: str, api_key: str | None, progress: Callable[[str, str], None]) -> None:
    """Send all warm-up requests one after the other. Raises StartFailed with the reason."""
    for warm_up in WARM_UPS:
        before = _counter(decode_url, warm_up.counter, api_key)
        started = time.monotonic()
        tokens = _generate(router_url, warm_up, api_key)
        _wait_counted(decode_url, warm_up, before, api_key)
        progress("warm-up", f"{warm_up.name}: {tokens} tokens in {time.monotonic() - started:.1f} s")


def _generate(router_url: str, warm_up: WarmUp, api_key: str | None) -> int:
    """Number of tokens that came back."""
    body = {
        "input_ids": warm_up.input_ids,
        "sampling_params": {
            "max_new_tokens": NUM_TOKENS,
            "temperature": 0,
            "ignore_eos": True,
            "custom_params": {"adrenaline": {"remote_prefix_len": warm_up.remote_prefix_len}},
        },
    }
    try:
        answer = call(f"{router_url}/generate", api_key, body, REQUEST_TIMEOUT_S)
        tokens = int(answer["meta_info"]["completion_tokens"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StartFailed(f"the {warm_up.name} of the warm-up failed: {_reason(error)}") from None
    if tokens < 1:
        raise StartFailed(f"the {warm_up.name} of the warm-up gave no token: {answer['meta_info']}")
    return tokens


def _wait_counted(decode_url: str, warm_up: WarmUp, before: int, api_key: str | None) -> None:
    """The answer may reach us before the scheduler's counters are published."""
    deadline = time.monotonic() + STATUS_TIMEOUT_S
    while _counter(decode_url, warm_up.counter, api_key) <= before:
        if time.monotonic() > deadline:
            raise StartFailed(f"the {warm_up.name} of the warm-up was answered, but decode did not count it as such")
        time.sleep(0.1)


def _counter(decode_url: str, name: str, api_key: str | None) -> int:
    try:
        return int(call(f"{decode_url}/adrenaline/status", api_key, None, STATUS_TIMEOUT_S)[name])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StartFailed(f"{decode_url}/adrenaline/status does not answer as it should: {_reason(error)}") from None


def call(url: str, api_key: str | None, body: Any, timeout_s: float) -> Any:
    """GET, or POST if there is a body; the JSON answer. Raises OSError (HTTPError included) or ValueError."""
    headers = {"Content-Type": "application/json"}
    if api_key is not None:
        headers["Authorization"] = f"Bearer {api_key}"
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data=data, headers=headers)
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # never by way of a proxy: it is this host
    with opener.open(request, timeout=timeout_s) as response:
        return json.load(response)


def _reason(error: Exception) -> str:
    if isinstance(error, urllib.error.HTTPError):
        return f"HTTP {error.code}: {error.read().decode(errors='replace')[:500]}"
    return f"{type(error).__name__}: {error}"
