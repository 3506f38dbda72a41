"""Registered regions: what is accepted, how a table is shown to another process, what the copy kernel does with it."""

import itertools
import os
import pathlib
import struct
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_adrenaline.transfer import regions
from sglang_adrenaline.transfer.process_vm import Session
from sglang_adrenaline.transfer.published import PublishedSession, TableReader, TableWriter
from sglang_adrenaline.transfer.regions import HOST, Allocation, Region, RegionIndex, Regions

SPACE = 120


@st.composite
def tables(draw) -> Regions:
    """Allocations side by side in a small address space, with regions that touch, overlap, nest or leave gaps."""
    cuts = sorted(draw(st.sets(st.integers(0, SPACE), min_size=2, max_size=6)))
    allocations = tuple(Allocation(a, b - a, b"%d" % a) for a, b in itertools.pairwise(cuts))
    found = []
    for number, held in enumerate(allocations):
        kind = draw(st.sampled_from([number, HOST]))
        for _ in range(draw(st.integers(0, 4))):
            start = draw(st.integers(held.base, held.base + held.num_bytes - 1))
            size = draw(st.integers(1, held.base + held.num_bytes - start))
            found.append(Region(start, size, kind))
    return Regions(allocations, tuple(found))


@settings(max_examples=300, deadline=None)
@given(
    table=tables(),
    requests=st.lists(st.tuples(st.integers(-5, SPACE + 5), st.integers(-2, 40)), min_size=1, max_size=30),
)
def test_locate_accepts_exactly_what_is_wholly_registered_in_one_allocation(table, requests):
    index = RegionIndex.of(regions.decode(regions.encode(table)))
    registered: dict[int, set[int]] = {}
    for region in table.regions:
        registered.setdefault(region.allocation, set()).update(range(region.address, region.address + region.num_bytes))
    good = []
    for address, length in requests:
        wanted = set(range(address, address + length))
        owners = [key for key, there in registered.items() if wanted and wanted <= there]
        arrays = np.array([address]), np.array([length])
        if owners:
            assert index.locate(*arrays, "x").tolist() == owners
            good.append((address, length, owners[0]))
        else:
            with pytest.raises(ValueError, match="not in registered memory"):
                index.locate(*arrays, "x")
    if good:
        columns = [np.array(column) for column in zip(*good, strict=True)]
        assert index.locate(columns[0], columns[1], "x").tolist() == columns[2].tolist()
    if len(good) < len(requests):
        with pytest.raises(ValueError):
            index.locate(*(np.array(column) for column in zip(*requests, strict=True)), "x")


@pytest.mark.parametrize(
    ("address", "length"), [(2**62, 64), (2**63 - 1, 2**63 - 1), (-(2**63), 64), (4096, 2**63 - 1)]
)
def test_locate_of_a_sum_beyond_int64_refuses(address, length):
    index = RegionIndex.of(Regions((Allocation(4096, 4096),), (Region(4096, 4096, 0),)))
    with pytest.raises(ValueError):
        index.locate(np.array([address]), np.array([length]), "x")


@pytest.mark.parametrize(
    "table",
    [
        Regions((), (Region(0, 8, 0),)),
        Regions((Allocation(64, 64),), (Region(0, 65, 0),)),
        Regions((Allocation(64, 64),), (Region(100, 64, 0),)),
        Regions((), (Region(10, 0, HOST),)),
        Regions((), (Region(-1, 8, HOST),)),
        Regions((), (Region(2**62, 8, HOST),)),
    ],
)
def test_decode_of_a_table_that_contradicts_itself_raises(table):
    with pytest.raises(ValueError):
        regions.decode(regions.encode(table))


def test_published_table_is_read_and_its_changes_are_seen():
    writer = TableWriter()
    session = PublishedSession.parse(str(writer.session))
    assert session == writer.session and str(session).rsplit(":", 1)[1] == str(os.getpid())
    reader = TableReader(session)
    generation, table = reader.read()
    assert table == Regions() and generation == reader.generation()
    longer = Regions((Allocation(1 << 46, 1 << 30, b"h" * 64),), (Region(1 << 46, 1 << 20, 0),) * 100)
    for new in (longer, Regions()):
        writer.write(new)
        assert reader.generation() != generation
        generation, table = reader.read()
        assert table == new
    reader.close()
    writer.close()


@pytest.mark.parametrize("text", ["", "m:1:2", "m:1:x:00:2", "m:1:3:" + "0" * 31 + ":2", "m:1:-1:" + "0" * 32 + ":2"])
def test_published_session_parse_garbage_raises(text):
    with pytest.raises(ValueError):
        PublishedSession.parse(text)


def test_table_of_another_token_or_another_file_is_refused():
    writer = TableWriter()
    right = writer.session
    with pytest.raises(ValueError, match="another"):
        TableReader(PublishedSession(right.process, right.fd, "0" * 32))
    zero = os.open("/dev/zero", os.O_RDONLY)
    with pytest.raises(ValueError):
        TableReader(PublishedSession(Session.of_this_process(), zero, right.token))
    os.close(zero)
    writer.close()
    with pytest.raises((OSError, ValueError)):
        TableReader(right)


def test_table_whose_writer_died_half_way_raises_after_a_bounded_wait():
    writer = TableWriter()
    reader = TableReader(writer.session)
    os.pwrite(writer.session.fd, struct.pack("=Q", 7), 24)
    with pytest.raises(ValueError, match="half-written"):
        reader.read()
    reader.close()
    writer.close()


def test_copy_kernel_interpreted_on_cpu_memory_copies_exactly_the_pieces():
    """The kernel itself, run by Triton's interpreter, on scattered slots, odd sizes and several bases."""
    script = pathlib.Path(__file__).with_name("copy_kernel_on_cpu.py")
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    subprocess.run([sys.executable, str(script)], env=environment, check=True, timeout=280)


def test_copy_kernel_compiled_for_a_gpu_moves_16_bytes_a_thread():
    """Triton falls back to narrow accesses without a word if it loses track of the alignment."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from sglang_adrenaline.transfer import copy_kernel

    arguments = copy_kernel.launch_arguments(wide=True)
    source = ASTSource(
        fn=copy_kernel.copy_pieces_kernel,
        signature={
            "bases": "*i64",
            "pieces": "*i64",
            "num_bases": "i32",
            "num_pieces": "i32",
            "wide": "constexpr",
            "block": "constexpr",
        },
        constexprs={(4,): arguments["wide"], (5,): arguments["block"]},
        attrs={(0,): [["tt.divisibility", 16]], (1,): [["tt.divisibility", 16]]},
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": arguments["num_warps"]})
    assert "ld.global.v2.b64" in compiled.asm["ptx"] and "st.global.v2.b64" in compiled.asm["ptx"]
    assert compiled.asm["cubin"]
