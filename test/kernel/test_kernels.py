"""Each kernel against its torch reference, over shapes, dtypes, lanes and rows. One process, one GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from loopback import Loopback, finishes, index

from sglang_adrenaline import kernels
from sglang_adrenaline.attention.merge import merge_rows_
from sglang_adrenaline.channel.ipc_words import EndpointError

POISON = -77.0
SHAPES = [(8, 64), (32, 128), (5, 128), (3, 256), (40, 128)]
DTYPES = [torch.bfloat16, torch.float16]


@pytest.fixture
def loop() -> Iterator[Callable[..., Loopback]]:
    made: list[Loopback] = []

    def make(**kwargs: object) -> Loopback:
        made.append(Loopback(**kwargs))
        return made[-1]

    yield make
    for each in made:
        each.close()


def random_rows(num: int, channel: Loopback) -> torch.Tensor:
    """[num, heads, head_dim], a slice of a wider tensor: rows are not adjacent."""
    wide = torch.randn(num, channel.num_heads * 3, channel.head_dim, device="cuda").to(channel.dtype)
    return wide[:, channel.num_heads : 2 * channel.num_heads]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "head_dim"), SHAPES)
@pytest.mark.parametrize(("batch", "sent"), [(1, 1), (7, 3), (64, 64), (200, 33)])
def test_put_queries_rows_land_at_their_lanes(loop, dtype, heads, head_dim, batch, sent):
    channel = loop(lanes=100, num_heads=heads, head_dim=head_dim, dtype=dtype)
    channel.q.fill_(POISON)
    q = random_rows(batch, channel)
    rows, lanes = torch.randperm(batch)[:sent], torch.randperm(100)[:sent]
    for layer in (0, 1):
        kernels.put_queries(channel.decode.words, q * (layer + 1), index(rows), index(lanes), layer)
    torch.cuda.synchronize()
    for layer in (0, 1):
        expected = torch.full_like(channel.q[0], POISON)
        expected[lanes] = (q * (layer + 1))[rows]
        assert torch.equal(channel.q[layer], expected)
    assert channel.q_flag.item() == 1 * channel.num_layers + 1
    assert channel.words(channel.decode) == {
        "step": 1, "open": 1, "launches": 0, "error": 0, "arrivals": 0, "wait_ns": 0, "waits": 0, "work_ns": 0,
        "joins": 0
    }  # fmt: skip


def test_put_queries_skips_negative_and_foreign_indices(loop):
    channel = loop(lanes=4)
    channel.q.fill_(POISON)
    q = random_rows(3, channel)
    rows, lanes = index([-1, 1, 2, 3, 0, 0]), index([0, -1, 4, 1, 1 << 30, 2])
    kernels.put_queries(channel.decode.words, q, rows, lanes, 0)
    torch.cuda.synchronize()
    expected = torch.full_like(channel.q[0], POISON)
    expected[2] = q[0]
    assert torch.equal(channel.q[0], expected)
    assert channel.q_flag.item() == channel.num_layers


def test_put_queries_strided_heads_are_sent_in_place(loop):
    channel = loop()
    q = random_rows(8, channel)
    assert not q.is_contiguous()
    kernels.put_queries(channel.decode.words, q, index(range(8)), index(range(8)), 0)
    torch.cuda.synchronize()
    assert torch.equal(channel.q[0], q)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "head_dim"), SHAPES)
@pytest.mark.parametrize("num", [0, 1, 9, 100])
def test_put_answers_o_and_lse_land_at_their_lanes(loop, dtype, heads, head_dim, num):
    channel = loop(lanes=100, num_heads=heads, head_dim=head_dim, dtype=dtype)
    kernels.put_queries(channel.decode.words, random_rows(1, channel), index([0]), index([0]), 0)
    torch.cuda.synchronize()
    kernels.wait_step(channel.executor.words)
    channel.o.fill_(POISON)
    channel.lse.fill_(POISON)
    o, lse = random_rows(num, channel), torch.randn(num, heads, device="cuda")
    lanes = torch.randperm(100)[:num]
    kernels.put_answers(channel.executor.words, o, lse, 0)
    kernels.put_answers(channel.executor.words, o, lse, 1, index(lanes))
    torch.cuda.synchronize()
    for parity, where in ((0, torch.arange(num)), (1, lanes)):
        expected_o, expected_lse = torch.full_like(channel.o[0], POISON), torch.full_like(channel.lse[0], POISON)
        expected_o[where], expected_lse[where] = o, lse
        assert torch.equal(channel.o[parity], expected_o)
        assert torch.equal(channel.lse[parity], expected_lse)
    assert channel.o_flag.item() == channel.num_layers + 1


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "head_dim"), SHAPES)
@pytest.mark.parametrize(("batch", "merged"), [(1, 1), (7, 3), (64, 64), (200, 33)])
def test_wait_and_merge_equals_torch_reference(loop, dtype, heads, head_dim, batch, merged):
    channel = loop(lanes=100, num_heads=heads, head_dim=head_dim, dtype=dtype)
    rows, lanes = torch.randperm(batch)[:merged], torch.randperm(100)[:merged]
    o, lse = random_rows(batch, channel), torch.randn(batch, heads, device="cuda") * 4
    channel.o.copy_(torch.randn_like(channel.o, dtype=torch.float32))
    channel.lse.copy_(torch.randn_like(channel.lse) * 4)
    lse[rows[0]] = -torch.inf  # nothing attended locally
    if merged > 1:
        channel.lse[1, lanes[-1], 0] = -torch.inf  # nothing attended remotely
    expected_o, expected_lse = o.clone(), lse.clone()
    merge_rows_(expected_o, expected_lse, channel.o[1, lanes], channel.lse[1, lanes], rows.cuda())
    kernels.put_queries(channel.decode.words, o, index([0]), index([0]), 0)
    channel.o_flag.fill_(channel.num_layers + 1)
    torch.cuda.synchronize()
    kernels.wait_and_merge_(channel.decode.words, o, lse, index(rows), index(lanes), 1)
    torch.cuda.synchronize()
    untouched = torch.ones(batch, dtype=torch.bool)
    untouched[rows] = False
    assert torch.equal(o[untouched], expected_o[untouched])
    torch.testing.assert_close(o, expected_o)
    torch.testing.assert_close(lse, expected_lse, rtol=1e-5, atol=1e-5)


def test_wait_and_merge_empty_answer_leaves_the_row_whatever_o_holds(loop):
    channel = loop()
    o, lse = random_rows(2, channel), torch.randn(2, channel.num_heads, device="cuda")
    before = o.clone(), lse.clone()
    channel.o.fill_(torch.nan)
    channel.lse.fill_(-torch.inf)
    kernels.put_queries(channel.decode.words, o, index([0]), index([0]), 0)
    channel.o_flag.fill_(channel.num_layers)
    torch.cuda.synchronize()
    kernels.wait_and_merge_(channel.decode.words, o, lse, index([0, 1]), index([3, 5]), 0)
    torch.cuda.synchronize()
    assert torch.equal(o, before[0]) and torch.equal(lse, before[1])


def test_kernels_unbound_endpoint_do_nothing(loop):
    channel = loop(bound=False)
    o, lse = random_rows(2, channel), torch.zeros(2, channel.num_heads, device="cuda")
    before = o.clone()
    kernels.warm_up(channel.decode.words)
    kernels.put_queries(channel.decode.words, o, index([0]), index([0]), 0)
    kernels.wait_and_merge_(channel.decode.words, o, lse, index([0]), index([0]), 0)
    assert finishes(torch.cuda.current_stream(), 1.0)
    assert torch.equal(o, before)
    assert channel.q_flag.item() == 0 and not channel.decode.words.any()


def test_put_queries_rows_of_another_size_fail_the_endpoint_and_write_nothing(loop):
    channel = loop(num_heads=8)
    channel.q.fill_(POISON)
    q = torch.randn(4, 16, channel.head_dim, device="cuda").to(channel.dtype)
    kernels.put_queries(channel.decode.words, q, index(range(4)), index(range(4)), 0)
    torch.cuda.synchronize()
    assert (channel.q == POISON).all() and channel.q_flag.item() == 0
    assert channel.decode_host.status.error == EndpointError.SHAPE


def test_wrappers_bad_arguments_raise(loop):
    channel = loop()
    words, one = channel.decode.words, index([0])
    q = random_rows(2, channel)
    lse = torch.zeros(2, channel.num_heads, device="cuda")
    bad: list[Callable[[], None]] = [
        lambda: kernels.put_queries(words, q.float(), one, one, 0),
        lambda: kernels.put_queries(words, q.transpose(1, 2), one, one, 0),
        lambda: kernels.put_queries(words, q, one, index([0, 1]), 0),
        lambda: kernels.put_queries(words, q, one.long(), one, 0),
        lambda: kernels.put_queries(words, q, one, one.cpu(), 0),
        lambda: kernels.put_queries(words, q, one, one, -1),
        lambda: kernels.put_queries(words[:16], q, one, one, 0),
        lambda: kernels.put_queries(words.repeat(33), q, one, one, 0),
        lambda: kernels.put_answers(words.repeat(2), q, lse, 0),
        lambda: kernels.wait_step(words.repeat(2)),
        lambda: kernels.put_queries(words, q.cpu(), one, one, 0),
        lambda: kernels.put_queries(words, q.flatten()[1 : 1 + 8 * 128].view(1, 8, 128), one, one, 0),
        lambda: kernels.put_answers(words, q, lse.double(), 0),
        lambda: kernels.put_answers(words, q, lse[:1], 0),
        lambda: kernels.wait_and_merge_(words, q, lse.t(), one, one, 0),
        lambda: kernels.wait_and_merge_(words, q[..., :96].contiguous(), lse, one, one, 0),
        lambda: kernels.wait_layer(words, 1 << 20),
    ]
    for call in bad:
        with pytest.raises(ValueError, match=r"\w"):
            call()
    torch.cuda.synchronize()
    assert channel.words(channel.decode)["step"] == 0
