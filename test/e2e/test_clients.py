"""The clients that people use, against our router with offloading on: openai, SGLang's frontend, SGLang's benchmark."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import openai
import pytest
from conftest import DEMO_CHATS, DEMO_TOKENS
from servers import Group, wait_until

pytestmark = [pytest.mark.servers, pytest.mark.timeout(900)]

COLOUR_SCHEMA = {
    "type": "object",
    "properties": {
        "colour": {"type": "string", "enum": ["red", "green", "blue"]},
        "share": {"type": "integer", "minimum": 0, "maximum": 99},
    },
    "required": ["colour", "share"],
    "additionalProperties": False,
}

WEATHER_TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a town",
        "strict": True,
        "parameters": {
            "type": "object",
            "properties": {"town": {"type": "string", "enum": ["Paris", "Rome"]}},
            "required": ["town"],
            "additionalProperties": False,
        },
    },
}


def split(remote_prefix_len: int) -> dict:
    return {"custom_params": {"adrenaline": {"remote_prefix_len": remote_prefix_len}}}


def client_of(group: Group) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{group.url}/v1", api_key="none", timeout=120, max_retries=0)


@pytest.fixture
def client(demo) -> openai.OpenAI:
    return client_of(demo)


@pytest.fixture
def offloads(request):
    """Fails the test if the server it uses did not offload a request meanwhile."""
    group: Group = request.getfixturevalue("demo" if "demo" in request.fixturenames else "deployment")
    before = group.status()["offloaded_total"]
    yield
    wait_until(lambda: group.status()["offloaded_total"] > before, 15, "a request was offloaded")


def test_openai_models_lists_the_model(client):
    assert len(client.models.list().data) == 1


@pytest.mark.parametrize("remote", [-1, 0, 10])
@pytest.mark.parametrize("index", range(len(DEMO_CHATS)))
def test_openai_chat_equals_stock(client, demo_reference, index, remote):
    reply = client.chat.completions.create(
        model="any",
        messages=[{"role": "user", "content": DEMO_CHATS[index]}],
        max_tokens=DEMO_TOKENS,
        temperature=0,
        extra_body=split(remote),
    )
    assert reply.choices[0].message.content == demo_reference[index]
    assert reply.usage is not None and 0 < reply.usage.completion_tokens <= DEMO_TOKENS


def test_openai_chat_streaming_equals_stock(client, demo_reference, offloads):
    stream = client.chat.completions.create(
        model="any",
        messages=[{"role": "user", "content": DEMO_CHATS[1]}],
        max_tokens=DEMO_TOKENS,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
        extra_body=split(-1),
    )
    chunks = list(stream)
    pieces = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    assert len(pieces) > 5
    assert "".join(pieces) == demo_reference[1]
    assert chunks[-1].usage is not None and chunks[-1].usage.completion_tokens > 0


def test_openai_conversation_goes_on_from_its_cached_prefix(client, offloads):
    """Three turns: each prompt holds the one before it, so all but its end is in the prefill server's cache."""
    messages: list = []
    cached = []
    for text in ("My name is Ada.", "I live in Rome.", "What is my name?"):
        messages.append({"role": "user", "content": text})
        reply = client.chat.completions.create(
            model="any", messages=messages, max_tokens=16, temperature=0, extra_body=split(-1)
        )
        messages.append({"role": "assistant", "content": reply.choices[0].message.content})
        assert messages[-1]["content"]
        cached.append(reply.usage.prompt_tokens)
    assert cached == sorted(cached)


def test_openai_completions_with_logprobs_and_n(client, offloads):
    reply = client.completions.create(
        model="any",
        prompt="The capital of France is",
        max_tokens=8,
        temperature=0,
        n=2,
        logprobs=2,
        extra_body=split(-1),
    )
    assert len(reply.choices) == 2
    assert reply.choices[0].text == reply.choices[1].text != ""
    for choice in reply.choices:
        assert choice.logprobs is not None and choice.logprobs.token_logprobs is not None
        assert len(choice.logprobs.token_logprobs) == 8
        assert all(value <= 0 for value in choice.logprobs.token_logprobs)


@pytest.mark.parametrize("remote", [-1, 0])
def test_openai_json_schema_gives_valid_json(client, remote):
    reply = client.chat.completions.create(
        model="any",
        messages=[{"role": "user", "content": "Which colour is the sky, and how much of it?"}],
        max_tokens=64,
        temperature=0,
        response_format={"type": "json_schema", "json_schema": {"name": "colour", "schema": COLOUR_SCHEMA}},
        extra_body=split(remote),
    )
    value = json.loads(reply.choices[0].message.content or "")
    assert value["colour"] in ("red", "green", "blue") and 0 <= value["share"] <= 99


@pytest.mark.parametrize("remote", [-1, 0])
def test_openai_tool_call_is_returned_as_such(deployment, remote):
    """The tiny model's template has tools; with a required one, the grammar makes any model call it."""
    reply = client_of(deployment).chat.completions.create(
        model="any",
        messages=[{"role": "user", "content": "Weather, please."}],
        tools=[WEATHER_TOOL],
        tool_choice="required",
        max_tokens=400,
        temperature=0,
        extra_body=split(remote),
    )
    calls = reply.choices[0].message.tool_calls
    assert calls
    assert calls[0].function.name == "weather"
    assert json.loads(calls[0].function.arguments)["town"] in ("Paris", "Rome")


@pytest.mark.parametrize("wish", [-2, 1_000_000, 1.5, "all", True, [1]])
def test_openai_bad_split_is_a_400_that_says_why(client, demo_reference, wish):
    with pytest.raises(openai.BadRequestError, match="remote_prefix_len"):
        client.chat.completions.create(
            model="any",
            messages=[{"role": "user", "content": "Hello"}],
            max_tokens=4,
            extra_body={"custom_params": {"adrenaline": {"remote_prefix_len": wish}}},
        )
    after = client.chat.completions.create(
        model="any",
        messages=[{"role": "user", "content": DEMO_CHATS[0]}],
        max_tokens=DEMO_TOKENS,
        temperature=0,
        extra_body=split(-1),
    )
    assert after.choices[0].message.content == demo_reference[0]


@pytest.fixture
def sgl(demo):
    """SGLang's frontend language, its default backend being our router."""
    import sglang

    sglang.set_default_backend(sglang.RuntimeEndpoint(demo.url))
    yield sglang
    sglang.set_default_backend(None)


def test_frontend_gen_and_select(sgl, offloads):
    @sgl.function
    def program(s, country):
        s += sgl.user(f"What is the capital of {country}?")
        s += sgl.assistant("The capital is" + sgl.gen("free", max_tokens=8, temperature=0))
        s += sgl.user("Which one of the two is it?")
        s += sgl.assistant(sgl.select("choice", ["Paris", "xqzzv kjw"]))

    states = [program.run(country=country) for country in ("France", "France")]
    for state in states:
        state.sync()
        assert state["free"].strip()
        assert state["choice"] == "Paris"
    assert states[0]["free"] == states[1]["free"]


def test_frontend_fork_over_a_shared_prefix(sgl, offloads):
    topics = ("apples", "rivers", "stars")

    @sgl.function
    def program(s):
        s += "Here is a list of facts that everybody knows, one about each thing. " * 6
        forks = s.fork(len(topics))
        for fork, topic in zip(forks, topics, strict=True):
            fork += f"About {topic}:" + sgl.gen("fact", max_tokens=12, temperature=0)
        for fork, topic in zip(forks, topics, strict=True):
            s += f"\n{topic}:" + fork["fact"]
        s += "\nTo sum up:" + sgl.gen("sum", max_tokens=8, temperature=0)

    state = program.run()
    state.sync()
    assert all(f"\n{topic}:" in state.text() for topic in topics)
    assert state["sum"]


@pytest.mark.parametrize(
    "dataset",
    [
        ("random-ids", "--random-input-len", "96", "--random-output-len", "16", "--random-range-ratio", "0.5"),
        (
            *("generated-shared-prefix", "--gsp-num-groups", "3", "--gsp-prompts-per-group", "4"),
            *("--gsp-system-prompt-len", "64", "--gsp-question-len", "24", "--gsp-output-len", "12"),
        ),
    ],
    ids=lambda dataset: dataset[0],
)
def test_sglang_benchmark_completes(deployment, offloads, tiny_model, tmp_path, dataset):
    output = tmp_path / "result.jsonl"
    name, *options = dataset
    command = [sys.executable, "-m", "sglang.benchmark.serving", "--backend", "sglang", "--base-url", deployment.url]
    command += ["--model", str(tiny_model), "--tokenizer", str(tiny_model), "--dataset-name", name, *options]
    command += ["--num-prompts", "12", "--max-concurrency", "6", "--disable-tqdm", "--output-file", str(output)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=tmp_path)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    result = json.loads(Path(output).read_text().splitlines()[-1])
    assert result["completed"] == 12
    assert result["total_output_tokens"] > 12 * 4
