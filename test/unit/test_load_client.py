"""The benchmark's client against a local server that streams as SGLang does (a stand-in for the network only)."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from aiohttp import web

# Behind everything else: test/e2e has a module `compare`, too.
sys.path.append(str(Path(__file__).resolve().parents[1] / "e2e"))
sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmark"))

from load_client import Load, Record
from workload import Workload, WorkloadError

GAP_S = 0.01


class Server:
    """Streams `max_new_tokens` tokens, two in the first event, `GAP_S` apart; remembers the bodies it got."""

    def __init__(self, misbehave: Callable[[int], str] = lambda number: "") -> None:
        self.bodies: list[dict] = []
        self.open = self.most_open = 0
        self._misbehave = misbehave

    async def generate(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.bodies.append(body)
        mood = self._misbehave(len(self.bodies) - 1)
        if mood == "refuse":
            return web.Response(status=503, text="no room")
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        self.open += 1
        self.most_open = max(self.most_open, self.open)
        try:
            tokens = body["sampling_params"]["max_new_tokens"]
            for count in range(min(2, tokens), tokens + 1):
                if mood == "break off" and count > 3:
                    return response
                finish = {"type": "abort", "message": "lost"} if mood == "abort" and count == tokens else None
                meta = {"id": "x", "finish_reason": finish, "completion_tokens": count, "prompt_tokens": 3}
                event = b"data: " + json.dumps({"output_ids": list(range(count)), "meta_info": meta}).encode() + b"\n\n"
                await response.write(event[:20])  # an event may come in pieces
                await response.write(event[20:])
                await asyncio.sleep(GAP_S)
            await response.write(b"data: [DONE]\n\n")
        finally:
            self.open -= 1
        return response


def drive(server: Server, workload: Workload, *, offload: bool = True, timeout_s: float = 20) -> list[Record]:
    async def run() -> list[Record]:
        app = web.Application()
        app.router.add_post("/generate", server.generate)
        runner = web.AppRunner(app)
        await runner.setup()
        try:
            site = web.TCPSite(runner, "127.0.0.1", 0)
            await site.start()
            port = runner.addresses[0][1]
            load = Load([f"http://127.0.0.1:{port}"], workload, vocab_size=1000, seed=1, offload=offload)
            return await load.run(timeout_s)
        finally:
            await runner.cleanup()

    return asyncio.run(run())


def test_burst_all_at_once_counts_every_token():
    server = Server()
    records = drive(server, Workload("burst", 7, 10, requests=12))
    assert server.most_open == 12
    assert all(record.finished and record.error is None for record in records)
    for record in records:
        times = [time for time, _ in record.events]
        assert record.events[0][1] >= 2 and record.events[-1][1] == 10
        assert times == sorted(times) and record.start < times[0] and times[-1] - record.start > 8 * GAP_S
    assert len({tuple(body["input_ids"]) for body in server.bodies}) == 12
    assert all(len(body["input_ids"]) == 7 and max(body["input_ids"]) < 900 for body in server.bodies)


def test_single_sends_one_after_the_other():
    server = Server()
    assert len(drive(server, Workload("single", 3, 4, requests=5))) == 5
    assert server.most_open == 1


def test_saturated_keeps_the_number_open_and_ends_in_time():
    server = Server()
    records = drive(server, Workload("saturated", 3, 10, concurrency=6, seconds=1.0))
    assert server.most_open == 6 and len(records) > 12
    assert all(record.error is None for record in records)
    assert 0 < sum(not record.finished for record in records) <= 6
    first = [body["sampling_params"]["max_new_tokens"] for body in server.bodies[:6]]
    assert len(set(first)) > 1, "first answers of one length end in waves"


def test_rate_spreads_arrivals_over_the_expected_time():
    records = drive(Server(), Workload("rate", 3, 2, rate=50.0, requests=50))
    span = records[-1].start - records[0].start
    assert 0.5 < span < 2.0
    assert all(record.finished for record in records)


@pytest.mark.parametrize(("ratio", "remote"), [(0.0, 0), (0.3, 3), (1.0, 10)])
def test_ratio_is_met_by_whole_prompts(ratio, remote):
    server = Server()
    drive(server, Workload("burst", 3, 2, requests=10, ratio=ratio))
    wishes = [b["sampling_params"]["custom_params"]["adrenaline"]["remote_prefix_len"] for b in server.bodies]
    assert wishes.count(-1) == remote and wishes.count(0) == 10 - remote


def test_spread_prompts_have_their_mean_and_differ():
    server = Server()
    drive(server, Workload("burst", 20, 1, requests=400, spread=1.0))
    lengths = [len(body["input_ids"]) for body in server.bodies]
    assert 1 <= min(lengths) < 5 and 40 < max(lengths) <= 160
    assert 15 < sum(lengths) / len(lengths) < 25


def test_ratio_is_not_told_to_stock_servers():
    server = Server()
    drive(server, Workload("burst", 3, 2, requests=2, ratio=0.5, stream=4), offload=False)
    assert all("custom_params" not in body["sampling_params"] for body in server.bodies)
    assert server.bodies[0]["sampling_params"]["stream_interval"] == 4


@pytest.mark.parametrize(
    ("mood", "words"), [("refuse", "503: no room"), ("abort", "abort"), ("break off", "3 tokens came instead of 8")]
)
def test_failure_of_one_request_is_told_and_the_others_go_on(mood, words):
    records = drive(Server(lambda number: mood if number == 1 else ""), Workload("burst", 3, 8, requests=4))
    failed = [record for record in records if record.error]
    assert len(failed) == 1 and words in failed[0].error
    assert sum(record.finished for record in records) == 3


def test_requests_that_take_too_long_are_failed():
    records = drive(Server(), Workload("burst", 3, 500, requests=2), timeout_s=0.5)
    assert [record.error for record in records] == ["not finished within 0 s"] * 2


def test_workload_text_is_parsed():
    workload = Workload.parse("rate in=4096 out=128 rate=2.5 requests=40 ratio=0.5 name=low")
    assert workload == Workload("rate", 4096, 128, requests=40, rate=2.5, ratio=0.5, name="low")
    assert Workload.parse("single requests=2").title == "512/512 one by one"
    assert Workload.parse("burst requests=2 spread=0.5").title == "512~0.5/512 2 at once"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "bursts requests=3",
        "burst",
        "burst requests=many",
        "burst requests=3 speed=4",
        "burst 3",
        "rate requests=3",
        "saturated concurrency=4",
        "burst requests=3 ratio=1.5",
        "burst requests=3 spread=-1",
        "burst requests=3 out=0",
    ],
)
def test_workload_text_that_makes_no_sense_is_refused(text):
    with pytest.raises(WorkloadError):
        Workload.parse(text)
