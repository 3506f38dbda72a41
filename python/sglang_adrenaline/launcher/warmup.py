"""The proof that a deployment works: tokens of a local request, and of one that each decode server offloads.

The local request goes through the router. The others go to their servers directly, so that each pair has its turn:
that also makes the pairs' connections, which otherwise the first requests of users would wait for. Pairs without a
server in common are taken at once: as many rounds as there are servers of the more numerous role.
"""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from sglang_adrenaline.launcher.stages import StartFailed
from sglang_adrenaline.router.servers import Pair, Server

REQUEST_TIMEOUT_S = 120.0
STATUS_TIMEOUT_S = 10.0
NUM_TOKENS = 4
WHOLE_PROMPT = -1

Progress = Callable[[str, str], None]


def run(
    router_url: str, prefill: Sequence[Server], decode: Sequence[Server], api_key: str | None, progress: Progress
) -> None:
    """Raises StartFailed with the reason if a request fails, or if a decode server cannot offload to any other."""
    started = time.monotonic()
    counted = [_counts(server, api_key)[0] for server in decode]
    body = _body(remote_prefix_len=0, first_id=10)
    tokens = _num_tokens(lambda: call(f"{router_url}/generate", api_key, body, REQUEST_TIMEOUT_S), "local request")
    _wait_counted(lambda: any(_counts(s, api_key)[0] > n for s, n in zip(decode, counted, strict=True)), "local")
    progress("warm-up", f"local request: {tokens} tokens in {time.monotonic() - started:.1f} s")
    offloads: dict[str, bool] = {server.url: False for server in decode}
    pool = ThreadPoolExecutor(max_workers=2 * len(decode))
    try:
        for number, pairs in enumerate(rounds(prefill, decode)):
            asked = [(pair, pool.submit(_warm_up_pair, pool, pair, number, api_key)) for pair in pairs]
            for pair, answer in asked:
                text, offloaded = answer.result()
                offloads[pair.decode.url] |= offloaded
                named = f" ({pair.decode.url} to {pair.prefill.url})" if len(prefill) * len(decode) > 1 else ""
                progress("warm-up", f"offloaded request: {text}{named}")
    finally:
        pool.shutdown(wait=False, cancel_futures=True)  # what still runs after a failure ends with the servers
    for url, works in offloads.items():
        if not works:
            raise StartFailed(f"requests of the warm-up were answered, but {url} offloaded none of them")


def rounds(prefill: Sequence[Server], decode: Sequence[Server]) -> Iterator[list[Pair]]:
    """All pairs once, those of one round without a server in common."""
    few, many = sorted((prefill, decode), key=len)
    for shift in range(len(many)):
        paired = [(one, many[(index + shift) % len(many)]) for index, one in enumerate(few)]
        yield [Pair(*pair) if few is prefill else Pair(*pair[::-1]) for pair in paired]


def _warm_up_pair(pool: ThreadPoolExecutor, pair: Pair, number: int, api_key: str | None) -> tuple[str, bool]:
    """(what became of it, whether the prefix stayed on the prefill server)."""
    started = time.monotonic()
    before = _counts(pair.decode, api_key)
    body = _body(remote_prefix_len=WHOLE_PROMPT, first_id=40 + number % 64) | pair.bootstrap_fields()
    # The two halves of one request, as the router sends them.
    half = pool.submit(call, f"{pair.prefill.url}/generate", api_key, body, REQUEST_TIMEOUT_S)
    tokens = _num_tokens(
        lambda: call(f"{pair.decode.url}/generate", api_key, body, REQUEST_TIMEOUT_S),
        f"offloaded request from {pair.decode.url} to {pair.prefill.url}",
        also=half.exception,
    )
    _wait_counted(lambda: sum(_counts(pair.decode, api_key)) > sum(before), "offloaded")
    if _counts(pair.decode, api_key)[1] == before[1]:
        return f"stayed local, {_refusal(pair, api_key)}", False
    return f"{tokens} tokens in {time.monotonic() - started:.1f} s", True


def _body(remote_prefix_len: int, first_id: int) -> dict[str, Any]:
    """Prompts with different first ids are no prefix-cache hits of each other. Small ids exist in every vocabulary."""
    return {
        "input_ids": list(range(first_id, first_id + 30)),
        "sampling_params": {
            "max_new_tokens": NUM_TOKENS,
            "temperature": 0,
            "ignore_eos": True,
            "custom_params": {"adrenaline": {"remote_prefix_len": remote_prefix_len}},
        },
    }


def _num_tokens(ask: Callable[[], Any], what: str, also: Callable[[], BaseException | None] = lambda: None) -> int:
    """Number of tokens that came back. `also`: why another part of the request failed, if it did."""
    try:
        answer = ask()
        tokens = int(answer["meta_info"]["completion_tokens"])
        if (error := also()) is not None:
            raise error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StartFailed(f"the {what} of the warm-up failed: {_reason(error)}") from None
    if tokens < 1:
        raise StartFailed(f"the {what} of the warm-up gave no token: {answer['meta_info']}")
    return tokens


def _wait_counted(counted: Callable[[], bool], kind: str) -> None:
    """The answer may reach us before the scheduler's counters are published."""
    deadline = time.monotonic() + STATUS_TIMEOUT_S
    while not counted():
        if time.monotonic() > deadline:
            raise StartFailed(f"the {kind} request of the warm-up was answered, but decode did not count it as such")
        time.sleep(0.1)


def _counts(server: Server, api_key: str | None) -> tuple[int, int]:
    """How many (local, offloaded) requests a decode server has answered."""
    totals = _status(server, api_key)["totals"]
    return int(totals["local"]), int(totals["offloaded"])


def _refusal(pair: Pair, api_key: str | None) -> str:
    """Why a request of this pair was not offloaded, as far as decode's status tells."""
    address = f"{pair.prefill.host.strip('[]')}:{pair.prefill.bootstrap_port}"
    peers = [peer for peer in _status(pair.decode, api_key)["peers"] if peer["address"] == address]
    return next((peer["refused"] for peer in peers if peer["refused"]), "see the log of the decode server")


def _status(server: Server, api_key: str | None) -> dict[str, Any]:
    try:
        status: dict[str, Any] = call(f"{server.url}/adrenaline/status", api_key, None, STATUS_TIMEOUT_S)
        return status
    except (OSError, ValueError) as error:
        raise StartFailed(f"{server.url}/adrenaline/status does not answer as it should: {_reason(error)}") from None


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
