"""Proves: what `backend="pread"` gives is stock's in every respect that a caller can see, natively
and with every engine: values, memory, slices, errors, descriptors; and that it reads what is asked
for and nothing else, gives memory back, and ends cleanly when it is interrupted."""

import contextlib
import copy
import gc
import json
import os
import pickle
import random
import resource
import signal
import struct
import threading
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from helpers import DTYPE_BITS, STOCK, facts, in_a_child, outcome, seen
from patch_helpers import (
    drop_from_cache,
    leaves_stock,  # noqa: F401
    open_descriptors,
    run_python,
)
from torch._subclasses import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import stx_patch

KIB, MIB = 1 << 10, 1 << 20
PAGE_BYTES = resource.getpagesize()
SHAPES = [(), (0,), (3, 0, 2), (1,), (8,), (2, 3, 4), (5, 1, 8), (1, 1, 2), (16, 8)]
ENGINES = ["uring", "threads"]
engines = pytest.mark.parametrize("engine", ENGINES)
direct = pytest.mark.parametrize("direct_io", ["on", "off"])
OUR_OPENER = stx_patch.safe_open


def write(path, entries, shift=0):
    """A file of (name, dtype, shape) in this order, of bytes that do not repeat; the data begins
    `shift` bytes beyond a multiple of 8."""
    header, at = {}, 0
    for name, dtype, shape in entries:
        size_bytes = int(np.prod(shape, dtype=object)) * DTYPE_BITS[dtype] // 8
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + size_bytes]}
        at += size_bytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8 + shift)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.write(np.random.default_rng(at).bytes(at))
        file.flush()
        os.fsync(file.fileno())
    return path


def ours(path, **keywords):
    """A handle of ours, which the test fails without."""
    before = stx_patch.stats()
    handle = OUR_OPENER(path, backend="pread", **keywords)
    made = stx_patch.stats() - before
    assert (made.opens, made.fallbacks) == (1, {}), "not native"
    return handle


def stocks(path):
    return STOCK.safe_open(path, "pt", backend="pread")


def all_facts(tensors):
    return {name: facts(tensor) for name, tensor in tensors.items()}


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """About 40 MiB: tensors of odd sizes at odd places, small ones and empty ones between them."""
    entries = [
        ("a", "U8", [5 * MIB + 1]), ("b", "BF16", [3, 5]), ("c", "F32", [0, 4]),
        ("d", "I8", [13 * MIB + 4095]), ("e", "F64", []), ("f", "F32", [1024, 3000]),
        ("g", "U8", [PAGE_BYTES]), ("h", "U8", [1]), ("i", "F8_E4M3", [2 * MIB, 3]),
        ("j", "BOOL", [7]), ("k", "I64", [3, 123_457]), ("l", "I16", [MIB // 2 + 3]),
        ("m", "U8", [0]),
    ]  # fmt: skip
    return write(tmp_path_factory.mktemp("owned") / "large.safetensors", entries, shift=5)


@pytest.fixture(scope="module")
def large_facts(large):
    return all_facts(STOCK.load_file(large, backend="pread"))


@pytest.fixture(scope="module")
def four_parts(tmp_path_factory):
    """Four tensors of 16 MiB."""
    entries = [(name, "U8", [16 * MIB]) for name in "abcd"]
    return write(tmp_path_factory.mktemp("owned") / "parts.safetensors", entries)


# --- the same values ---


@pytest.mark.parametrize("shift", [0, 1, 3, 7])
@pytest.mark.parametrize("order", ["up", "down"])
def test_every_dtype_in_many_shapes(tmp_path, shift, order):
    dtypes = [dtype for dtype in DTYPE_BITS if DTYPE_BITS[dtype] >= 8]
    entries = [(f"{d}{list(shape)}", d, list(shape)) for d in dtypes for shape in SHAPES]
    path = write(tmp_path / "f", entries if order == "up" else entries[::-1], shift)
    with stocks(path) as handle:
        expected = all_facts(handle.get_tensors())
        by_slice = {
            name: seen(outcome(lambda n=name: handle.get_slice(n)[...])) for name in expected
        }
    before = stx_patch.stats()
    assert all_facts(stx_patch.load_file(path, backend="pread")) == expected
    handle = ours(path)
    assert all_facts({name: handle.get_tensor(name) for name in expected}) == expected
    assert list(handle.get_tensors()) == handle.offset_keys()
    made = stx_patch.stats() - before
    assert made.fallbacks == {} and made.tensors_native == 3 * len(entries)
    for name in expected:
        assert seen(outcome(lambda name=name: handle.get_slice(name)[...])) == by_slice[name], name


@engines
@direct
def test_a_large_file_by_every_engine(large, large_facts, poisoned, engine, direct_io):
    how = {"engine": engine, "direct_io": direct_io}
    before = stx_patch.stats()
    assert all_facts(stx_patch.load_file(large, backend="pread", **how)) == large_facts
    made = stx_patch.stats() - before
    assert made.engine == engine and made.fallbacks == {} and made.tensors_stock == 0
    assert (made.loads_direct, made.loads_buffered) == ((1, 0) if direct_io == "on" else (0, 1))
    assert made.engine_reason == (None if direct_io == "on" else "direct_io is off")
    assert made.seconds["read"] > 0 and made.files_warm + made.files_unknown == 1
    handle = ours(large, **how)
    for name, expected in large_facts.items():
        assert facts(handle.get_tensor(name)) == expected, name
    assert all_facts(handle.get_tensors()) == large_facts


def test_a_cold_file_is_read_past_the_page_cache(large, large_facts):
    assert drop_from_cache(large)
    before = stx_patch.stats()
    assert all_facts(stx_patch.load_file(large, backend="pread")) == large_facts
    made = stx_patch.stats() - before
    if made.files_unknown == 0:
        assert (made.files_cold, made.loads_direct, made.engine_reason) == (1, 1, None)


@pytest.mark.parametrize(
    "size_bytes", [MIB - 1, MIB, MIB + 1, 4 * MIB - 1, 4 * MIB, 4 * MIB + 4097]
)
@direct
def test_sizes_at_the_limits_of_requests(tmp_path, size_bytes, direct_io):
    entries = [("x", "U8", [3]), ("y", "U8", [size_bytes]), ("z", "U8", [5])]
    for shift in (0, 1):
        path = write(tmp_path / "f", entries, shift)
        expected = all_facts(STOCK.load_file(path, backend="pread"))
        for engine in ENGINES:
            how = {"engine": engine, "direct_io": direct_io}
            assert all_facts(stx_patch.load_file(path, backend="pread", **how)) == expected
            assert facts(ours(path, **how).get_tensor("y")) == expected["y"]


def test_nothing_is_stocks(sample, large, poisoned):
    """Also of slices, while the patch is in force and without."""
    handle = ours(sample)
    assert handle.get_slice("matrix")[1:3, 2].tolist() == [8, 14]
    assert len(handle.get_tensors()) == len(stx_patch.load_file(sample, backend="pread")) == 5
    assert ours(large).get_slice("f")[5:7].shape == (2, 3000)


def test_load_model_as_stock(sample):
    def load(**keywords):
        model = torch.nn.Module()
        model.register_buffer("matrix", torch.zeros(4, 6))
        model.register_buffer("more", torch.zeros(1))
        answer = safetensors.torch.load_model(model, sample, backend="pread", **keywords)
        return answer, {name: facts(tensor) for name, tensor in model.state_dict().items()}

    for keywords in ({"strict": False}, {"strict": True}, {"strict": False, "device": "cpu"}):
        expected = outcome(load, **keywords)
        with stx_patch.patched() as report:
            assert outcome(load, **keywords) == expected
        assert report.opens == 1 and report.fallbacks == {}
    assert expected[0] == "value"


@pytest.mark.parametrize("use", ["model", "assign", "save", "resize", "pickle", "copy", "share"])
def test_tensors_may_be_used_as_stocks(sample, tmp_path, use):
    def save_and_load(tensors):
        torch.save(tensors, tmp_path / "saved")
        assert (tmp_path / "saved").stat().st_size < 20_000  # no neighbour's bytes
        return torch.load(tmp_path / "saved")

    def assign(tensors):
        linear = torch.nn.Linear(6, 4, bias=False)
        linear.load_state_dict({"weight": tensors["matrix"]}, assign=True)
        safetensors.torch.save_model(linear, str(tmp_path / "saved"))
        return STOCK.load_file(tmp_path / "saved")

    uses = {
        "model": lambda tensors: {"sum": (tensors["matrix"] @ tensors["matrix"].T).sum()},
        "assign": assign,
        "save": save_and_load,
        "resize": lambda tensors: {"a": tensors["vector"].resize_(20)},
        "pickle": lambda tensors: pickle.loads(pickle.dumps(tensors)),
        "copy": copy.deepcopy,
        "share": lambda tensors: {"a": tensors["cube"].share_memory_()},
    }
    found, expected = (
        outcome(lambda load=load: all_facts(uses[use](load(sample, backend="pread"))))
        for load in (stx_patch.load_file, STOCK.load_file)
    )
    assert found == expected


# --- slices ---


class Two:
    def __index__(self):
        return 2


INDEXES = [
    0, 1, -1, 3, -4, -5, 4, 99, -99, 2**31, 2**40, -(2**70), True, False, None, ..., (), [], [0],
    [[0]], (0, 0), (0, 0, 0), (0, 0, 0, 0), (-1, -1), (3, 5), (-5, 0), (0, -7), (0, 6),
    slice(None), slice(1, 3), slice(0, 2), slice(0, 3, 2), slice(None, None, 2), slice(1, None, 99),
    slice(5, 2), slice(2, 1), slice(1, 1), slice(0, 0), slice(4, 4), slice(0, 4), slice(0, 5),
    slice(0, 99), slice(99, None), slice(99, 100), slice(-1, None), slice(-2, -1), slice(None, -1),
    slice(None, None, -1), slice(None, None, 0), slice(None, None, 2**40), slice(0, 2**64),
    slice("a"), slice(0.5, 1), slice(Two(), None), slice(True, 3), slice(np.int64(1), 3),
    slice(None, None, True), (slice(0, 2), 1), (1, slice(1, 3)),
    (slice(None), slice(None, None, 3)), (slice(None),) * 9, (slice(1, 2), slice(3, 3)),
    (..., 0), (0, ...),
    (..., ...), (..., slice(0, 2)), (slice(0, 2), ..., slice(0, 2)), (slice(None), None), (0, None),
    (0, [1]), ([0, 1],), np.int64(1), np.uint8(2), np.bool_(True), np.float32(1), np.array(1),
    np.array([0, 1]), (np.int32(1), 0), torch.tensor(1), torch.tensor([1]), torch.tensor(True),
    Two(), (Two(), 1), "a", b"a", 1.5, {}, range(2), object, (1, "a"), (slice(1, 3), 99), ((0,),),
]  # fmt: skip


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    entries = [
        ("matrix", "F32", [4, 6]), ("cube", "BF16", [3, 4, 5]), ("vector", "I64", [7]),
        ("scalar", "F16", []), ("none", "F32", [0, 3]), ("inner none", "F32", [3, 0]),
        ("bytes", "U8", [4, 1]), ("flags", "BOOL", [5]), ("eight", "F8_E5M2", [2, 2]),
        ("unsigned", "U64", [4, 3]), ("complex", "C64", [4, 2]), ("one", "I8", [1, 1, 1, 1, 1]),
    ]  # fmt: skip
    return write(tmp_path_factory.mktemp("owned") / "small.safetensors", entries, shift=3)


def both_slices(path, index, name):
    found, expected = (
        seen(outcome(lambda handle=handle: handle.get_slice(name)[index]))
        for handle in (ours(path), stocks(path))
    )
    return found, expected


@pytest.mark.parametrize("index", INDEXES, ids=lambda index: ascii(index)[:40])
def test_slices_as_stock(small, index):
    """In value, dtype, shape, strides, memory, or in the error's class and text."""
    for name in ours(small).keys():  # noqa: SIM118
        found, expected = both_slices(small, index, name)
        assert found == expected, name


def test_slices_at_random_as_stock(small):
    generator = random.Random(5)

    def part(extent):
        kind = generator.random()
        if kind < 0.35:
            return generator.randint(-extent - 1, extent)
        start, stop = sorted(generator.randint(0, extent + (kind > 0.95)) for _ in range(2))
        step = generator.choice([None, 1, 1, 2, 3, 7])
        return slice(generator.choice([None, start]), generator.choice([None, stop]), step)

    shapes = {name: ours(small).get_shape(name) for name in ours(small).keys()}  # noqa: SIM118
    natively = 0
    for _ in range(3000):
        name = generator.choice(list(shapes))
        parts = [part(extent) for extent in shapes[name]]
        parts = parts[: generator.randint(0, len(parts))]
        if generator.random() < 0.2:
            parts.insert(generator.randint(0, len(parts)), ...)
        index = parts[0] if len(parts) == 1 and generator.random() < 0.5 else tuple(parts)
        before = stx_patch.stats()
        found, expected = both_slices(small, index, name)
        assert found == expected, (name, index)
        natively += (stx_patch.stats() - before).fallbacks == {}
        if shapes[name] and all(shapes[name]) and expected[0] == "tensor":
            assert (stx_patch.stats() - before).fallbacks == {}, (name, index)
    assert natively > 1500


def test_ordinary_slices_are_ours_and_odd_ones_are_stocks(small):
    handle = ours(small)
    entry = handle.get_slice("matrix")
    for index in (0, -1, ..., (), slice(1, 3), (slice(None), 2), (..., slice(0, 4, 3)), (1, 2)):
        before = stx_patch.stats()
        assert isinstance(entry[index], torch.Tensor)
        assert (stx_patch.stats() - before).fallbacks == {}, index
    for index in (99, "a", [], None, slice(-1, None), np.int64(1)):
        before = stx_patch.stats()
        outcome(entry.__getitem__, index)
        assert (stx_patch.stats() - before).fallbacks == {"slice": 1}, index


def test_rows_of_a_slice_as_stock(small):
    """Iteration ends as stock's does: with an error, at the first row that is not there."""

    def rows(handle, name):
        return [facts(row) for row in handle.get_slice(name)]

    for name in ours(small).keys():  # noqa: SIM118
        assert outcome(rows, ours(small), name) == outcome(rows, stocks(small), name), name


def test_a_slice_tells_shape_and_dtype_as_stock(small):
    for name in stocks(small).keys():  # noqa: SIM118
        found, expected = (handle.get_slice(name) for handle in (ours(small), stocks(small)))
        assert found.get_shape() == expected.get_shape()
        assert found.get_dtype() == expected.get_dtype()


def asked_bytes(use):
    """What `use` asks the system for."""
    before = stx_patch.stats()
    use()
    return (stx_patch.stats() - before).bytes_read


def test_slices_read_their_rows(large):
    """f has rows of 12,000 bytes, k of 987,656."""
    handle = ours(large)
    entry, long = handle.get_slice("f"), handle.get_slice("k")
    for index, rows in (
        (0, 1), (-1, 1), (slice(10, 20), 10), ((slice(10, 20), slice(0, 5)), 10), ((3, 7), 1),
        (slice(1, 1), 0), (slice(100, 200, 10), 100), ((5, ...), 1), (..., 1024),
        ((slice(None), 0), 1024),
    ):  # fmt: skip
        assert asked_bytes(lambda index=index: entry[index]) == rows * 12_000, index
    assert asked_bytes(lambda: long[2]) == 987_656
    assert asked_bytes(lambda: handle.get_slice("i")[MIB : MIB + 5]) == 15
    assert asked_bytes(lambda: (entry.get_shape(), handle.get_slice("a"))) == 0


# --- memory ---


@engines
@direct
def test_no_tensor_shares_memory(large, large_facts, engine, direct_io):
    """Each is filled with its own bytes; none shows in another, nor in the file."""
    content = large.read_bytes()
    handle = ours(large, engine=engine, direct_io=direct_io)
    held = [handle.get_tensors(), handle.get_tensors(), {"a": handle.get_tensor("a")}]
    held += [{"a": handle.get_tensor("a")}, {"f": handle.get_slice("f")[...]}]
    held += [{"f": handle.get_slice("f")[2:4]}, {"f": handle.get_slice("f")[2:4]}]
    tensors = [tensor for group in held for tensor in group.values()]
    for number, tensor in enumerate(tensors):
        as_bytes(tensor).fill_(number + 1)
    for number, tensor in enumerate(tensors):
        assert bool((as_bytes(tensor) == number + 1).all())
    assert large.read_bytes() == content
    assert facts(handle.get_tensor("a")) == large_facts["a"]


def as_bytes(tensor):
    return torch.tensor([], dtype=torch.uint8).set_(tensor.untyped_storage())


@direct
@pytest.mark.parametrize("seed", range(3))
def test_dropping_tensors_leaves_the_others_alone(large, large_facts, direct_io, seed):
    """Neighbours share pages at their ends; giving one's memory back does not touch the others."""
    names = list(large_facts)
    random.Random(seed).shuffle(names)
    tensors = stx_patch.load_file(large, backend="pread", direct_io=direct_io)
    for name in names:
        del tensors[name]
        assert all_facts(tensors) == {other: large_facts[other] for other in tensors}


def anonymous_bytes():
    gc.collect()
    (line,) = [
        line for line in Path("/proc/self/status").read_text().splitlines() if "RssAnon" in line
    ]
    return int(line.split()[1]) * KIB


@direct
def test_dropping_tensors_returns_their_memory(four_parts, direct_io):
    stx_patch.load_file(four_parts, backend="pread", direct_io=direct_io)
    before = anonymous_bytes()
    tensors = stx_patch.load_file(four_parts, backend="pread", direct_io=direct_io)
    for left in (4, 3, 2, 1, 0):
        held = (anonymous_bytes() - before) / MIB
        assert abs(held - 16 * left) < 5, (left, held)
        if left:
            del tensors["bdac"[left - 1]]
    handle = ours(four_parts, direct_io=direct_io)
    part = handle.get_slice("b")[: 8 * MIB]
    assert abs((anonymous_bytes() - before) / MIB - 8) < 5
    tensor = handle.get_tensor("c")
    assert abs((anonymous_bytes() - before) / MIB - 24) < 5
    del part, tensor
    assert abs(anonymous_bytes() - before) / MIB < 5


def test_a_view_keeps_its_tensor_and_that_alone(four_parts):
    before = anonymous_bytes()
    view = stx_patch.load_file(four_parts, backend="pread")["c"][5:9]
    assert view.tolist() == list(four_parts.read_bytes()[-32 * MIB + 5 : -32 * MIB + 9])
    assert abs((anonymous_bytes() - before) / MIB - 16) < 5


@pytest.mark.parametrize("end", ["close", "drop", "unpatch", "delete", "truncate", "overwrite"])
def test_tensors_outlive_everything(large, tmp_path, end):
    path = tmp_path / "copy"
    path.write_bytes(large.read_bytes())
    expected = all_facts(STOCK.load_file(path, backend="pread"))
    stx_patch.patch()
    handle = safetensors.safe_open(path, "pt", backend="pread")
    tensors, one, entry = handle.get_tensors(), handle.get_tensor("d"), handle.get_slice("b")
    if end == "close":
        handle.__exit__(None, None, None)
    elif end == "drop":
        del handle
        gc.collect()
    elif end == "delete":
        path.unlink()
    elif end == "truncate":
        os.truncate(path, 0)
    elif end == "overwrite":
        with path.open("rb+") as file:
            file.write(bytes(path.stat().st_size))
    stx_patch.unpatch()
    assert all_facts(tensors) == expected and facts(one) == expected["d"]
    if end not in ("truncate", "overwrite"):
        assert facts(entry[...]) == expected["b"]
    one += 1


# --- what is read ---


def test_small_loads_read_exactly_what_is_kept(small):
    """But gaps of less than a page, which are cheaper to read than to leave out."""
    handle = ours(small)
    total_bytes = handle.total_tensor_size
    assert asked_bytes(handle.get_tensors) == total_bytes
    for name in handle.keys():  # noqa: SIM118
        assert asked_bytes(lambda name=name: handle.get_tensor(name)) == handle.nbytes(name)
    for kept, over_bytes in ((["matrix", "vector"], 120), (["one"], 0), (["scalar", "none"], 0)):
        handle = ours(small, tensor_filter=kept)
        before = stx_patch.stats()
        handle.get_tensors()
        made = stx_patch.stats() - before
        assert made.bytes_read == handle.total_tensor_size + over_bytes
        assert (made.bytes_over_read, made.requests) == (over_bytes, 1)
    with pytest.warns(stx_patch.StxFilterWarning):
        handle = ours(small, tensor_filter=[])
    assert asked_bytes(handle.get_tensors) == 0


FILTERS = {
    "one": ["d"],
    "apart": ["a", "f", "k"],
    "small ones": ["b", "e", "h", "j"],
    "ends": ["a", "m", "l"],
    "callable": lambda key: key.nbytes > MIB and key.dtype != "U8",
    "all": "*",
}


@engines
@direct
@pytest.mark.parametrize("name", FILTERS)
def test_what_is_left_out_is_not_asked_for(large, large_facts, poisoned, name, engine, direct_io):
    how = {"engine": engine, "direct_io": direct_io, "tensor_filter": FILTERS[name]}
    handle = ours(large, **how)
    before = stx_patch.stats()
    tensors = handle.get_tensors()
    made = stx_patch.stats() - before
    assert all_facts(tensors) == {name: large_facts[name] for name in tensors} and tensors
    kept_bytes = sum(tensor.nbytes for tensor in tensors.values())
    assert handle.total_tensor_size == made.bytes_wanted == kept_bytes
    assert kept_bytes <= made.bytes_read <= kept_bytes + len(tensors) * 3 * PAGE_BYTES
    assert made.bytes_over_read == made.bytes_read - kept_bytes
    for missing in large_facts.keys() - tensors.keys():
        for use in (handle.get_tensor, handle.get_slice):
            with pytest.raises(safetensors.SafetensorError, match="left out by tensor_filter"):
                use(missing)
    loaded = stx_patch.load_file(large, backend="pread", **how)
    assert list(loaded) == list(tensors) and all_facts(loaded) == all_facts(tensors)


def test_opening_reads_the_header_and_nothing_else(large):
    before = stx_patch.stats()
    handle = ours(large)
    handle.keys(), handle.metadata(), handle.get_slice("a"), handle.total_tensor_size
    made = stx_patch.stats() - before
    assert made.bytes_read < MIB and made.tensors_native == 0
    assert made.loads_direct == made.loads_buffered == 0


# --- descriptors ---


def test_one_descriptor_while_handle_or_slices_live(sample):
    ours(sample).get_tensors()  # what is set up once, is
    gc.collect()
    before = open_descriptors()

    def held():
        gc.collect()
        return len(open_descriptors()) - len(before)

    handle = ours(sample)
    assert held() == 1
    (descriptor,) = set(open_descriptors()) - set(before)
    assert not os.get_inheritable(int(descriptor))
    tensors = handle.get_tensors()
    first, second = handle.get_slice("matrix"), handle.get_slice("cube")
    row = first[0]
    assert held() == 1
    with handle:
        pass
    assert held() == 1 and first[1].tolist() == [6, 7, 8, 9, 10, 11]
    del handle, first
    assert held() == 1 and second[0].shape == (4, 5)
    del second
    assert held() == 0
    assert row.tolist() == [0, 1, 2, 3, 4, 5] and len(tensors) == 5
    handle = ours(sample)
    del handle
    assert held() == 0


def test_descriptors_as_stocks(sample):
    """The same number at each step."""

    def steps(opener):
        gc.collect()
        before = len(open_descriptors())
        counts = []

        def count():
            gc.collect()
            counts.append(len(open_descriptors()) - before)

        handles = [opener(sample) for _ in range(3)]
        count()
        entry = handles[0].get_slice("matrix")
        handles[0].__exit__(None, None, None)
        count()
        handles[1].__exit__(None, None, None)
        count()
        del handles
        count()
        del entry
        count()
        return counts

    assert steps(ours) == steps(stocks) == [3, 3, 2, 1, 0]


@direct
def test_none_is_left_open_by_loads_of_any_kind(large, direct_io):
    before = open_descriptors()
    for engine in ENGINES:
        how = {"engine": engine, "direct_io": direct_io, "backend": "pread"}
        tensors = stx_patch.load_file(large, **how)
        assert open_descriptors() == before
    del tensors
    with pytest.raises(safetensors.SafetensorError):
        stx_patch.load_file(large, tensor_filter={"nothing"}, strict_filter=True, backend="pread")
    with pytest.raises(ZeroDivisionError):
        stx_patch.load_file(large, tensor_filter=lambda key: 1 / 0, backend="pread")
    assert open_descriptors() == before


@pytest.mark.parametrize("left", [1, 2, 3, 4])
def test_few_descriptors_left(large, large_facts, left):
    """One is enough: without more there is no ring and no direct read."""
    stx_patch.load_file(large, backend="pread")

    def work():
        resource.setrlimit(resource.RLIMIT_NOFILE, (128, 128))
        taken = []
        with contextlib.suppress(OSError):
            while True:
                taken.append(os.dup(0))
        for descriptor in taken[:left]:
            os.close(descriptor)
        assert all_facts(stx_patch.load_file(large, backend="pread", direct_io="on")) == large_facts
        assert stx_patch.stats().fallbacks == {}

    stx_patch.reset_stats()
    assert in_a_child(work) == 0


# --- errors ---


def errors_of(opener, path, cut):
    """What every way of reading answers once the open file was cut."""
    os.truncate(path, path.stat().st_size)
    handle = opener(path)
    size_bytes = path.stat().st_size
    entries = {name: handle.get_slice(name) for name in handle.offset_keys()}
    content = path.read_bytes()
    os.truncate(path, min(cut, size_bytes))
    found = {"all": outcome(lambda: all_facts(handle.get_tensors()))}
    for name, entry in entries.items():
        found[name] = seen(outcome(handle.get_tensor, name))
        if all(entry.get_shape()) and entry.get_shape():  # else it is stock's to say what is wrong
            found["slice of " + name] = seen(outcome(lambda entry=entry: entry[:]))
    path.write_bytes(content)
    return found


@pytest.mark.parametrize("cut", [0, 20, 3000, 3 * MIB, 5 * MIB + 4096, 19 * MIB + 77, -1, -2 * MIB])
@pytest.mark.parametrize("which", ["small", "large"])
def test_a_file_that_is_cut_while_it_is_open_as_stock(request, tmp_path, which, cut):
    path = tmp_path / "cut"
    path.write_bytes(request.getfixturevalue(which).read_bytes())
    size_bytes = path.stat().st_size
    cut = max(size_bytes + cut, 0) if cut < 0 else min(cut, size_bytes - 1)
    expected = errors_of(stocks, path, cut)
    assert "failed to fill whole buffer" in str(expected)
    for engine in ENGINES:
        for direct_io in ("on", "off"):

            def open_ours(path, engine=engine, direct_io=direct_io):
                return ours(path, engine=engine, direct_io=direct_io)

            found = errors_of(open_ours, path, cut)
            assert found == expected, (engine, direct_io)


@engines
@direct
def test_which_tensor_is_named_does_not_depend_on_luck(tmp_path, engine, direct_io):
    """Of many that cannot be read, and are being read at once, the first, as stock does."""
    path = write(tmp_path / "cut", [(f"t{i}", "U8", [300_000]) for i in range(64)])
    size_bytes = path.stat().st_size
    for cut_bytes in [5 * MIB + 77, 5 * MIB, 10_000, 200_000, size_bytes - 1] * 4:
        handle = ours(path, engine=engine, direct_io=direct_io)
        stock = stocks(path)
        os.truncate(path, cut_bytes)
        expected = outcome(stock.get_tensors)
        found = outcome(handle.get_tensors)
        os.truncate(path, size_bytes)  # zeros behind the header do not matter
        assert found == expected and found[0] == "error", cut_bytes


def same_error(path):
    expected = outcome(stocks, path)
    assert expected[0] == "error"
    with stx_patch.patched():
        for load in (
            lambda: safetensors.safe_open(path, "pt", backend="pread"),
            lambda: safetensors.torch.load_file(path, backend="pread"),
        ):
            assert outcome(load) == expected
        for load in (stx_patch.safe_open, stx_patch.load_file):
            if not os.path.isdir(path):  # which is many files, for ours
                assert outcome(load, path, backend="pread") == expected
    return expected


def test_what_cannot_be_opened_as_stock(sample, tmp_path):
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    cut = tmp_path / "cut"
    cut.write_bytes(sample.read_bytes()[:-1])
    empty = tmp_path / "empty"
    empty.touch()
    for path in (tmp_path / "missing", tmp_path, loop, cut, empty, sample / "below", "", "\0"):
        same_error(path)


def test_a_forbidden_file_as_stock(sample):
    sample.chmod(0)

    def work():
        if os.geteuid() == 0:
            os.seteuid(65534)
        same_error(sample)

    for folder in (sample.parent, sample.parent.parent, sample.parent.parent.parent):
        folder.chmod(0o755)
    assert in_a_child(work) == 0


def test_a_closed_handle_as_stock(sample):
    def uses(handle):
        handle.__exit__(None, None, None)
        return [
            outcome(use)
            for use in (
                handle.keys, handle.metadata, handle.offset_keys, handle.get_tensors,
                lambda: handle.get_tensor("matrix"), lambda: handle.get_slice("matrix"),
                lambda: handle.get_tensor("missing"),
            )
        ]  # fmt: skip

    assert uses(ours(sample)) == uses(stocks(sample))


def test_a_missing_tensor_as_stock(sample):
    for handle_of in (ours, stocks):
        handle = handle_of(sample)
        for use in (handle.get_tensor, handle.get_slice):
            with pytest.raises(safetensors.SafetensorError) as caught:
                use("missing")
            assert str(caught.value) == "File does not contain tensor missing"


LITTLE_MEMORY = """
    import os, resource, sys
    import safetensors, stx_patch
    from pathlib import Path
    path, small = sys.argv[1:]
    handle = stx_patch.safe_open(path, backend="pread")
    entry = handle.get_slice("big one")
    stx_patch.load_file(small, backend="pread")

    def held():
        return sorted(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))

    before = held()
    used_bytes = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used_bytes + (100 << 20), -1))
    for use in (
        lambda: handle.get_tensor("big one"),
        handle.get_tensors,
        lambda: entry[:],
        lambda: stx_patch.load_file(path, backend="pread"),
        lambda: stx_patch.load_file(path, backend="pread", engine="threads"),
    ):
        try:
            use()
        except MemoryError as error:
            print(error)
        else:
            print("nothing was raised")
    assert held() == before, (held(), before)
    assert entry[:5].tolist() == [0] * 5
    assert handle.get_tensor("small one").tolist() == [0] * 7
    assert len(stx_patch.load_file(small, backend="pread")) == 5
    """


def test_too_little_memory(tmp_path, sample):
    """MemoryError with the file's name, nothing left behind, and what fits goes on."""
    size_bytes = 600 * MIB
    header = {
        "big one": {"dtype": "U8", "shape": [size_bytes], "data_offsets": [0, size_bytes]},
        "small one": {"dtype": "U8", "shape": [7], "data_offsets": [size_bytes, size_bytes + 7]},
    }
    text = json.dumps(header).encode()
    path = tmp_path / "huge"
    path.write_bytes(struct.pack("<Q", len(text)) + text)
    os.truncate(path, 8 + len(text) + size_bytes + 7)  # one hole
    printed = run_python(LITTLE_MEMORY, path, sample, expect_output=None).split("\n")[:-1]
    assert len(printed) == 5 and "nothing was raised" not in printed
    assert all("no memory for" in line for line in printed), printed
    assert all(str(path) in line for line in printed[:2] + printed[3:])  # a slice knows no path


# --- what torch has set, and dtypes it knows in part ---


MODES = {
    "meta": lambda: torch.device("meta"),
    "cpu": lambda: torch.device("cpu"),
    "inference": torch.inference_mode,
    "no grad": torch.no_grad,
    "fake": FakeTensorMode,
    "flops": lambda: FlopCounterMode(display=False),
}


def under_mode(opener, path, mode):
    """Everything that can be had of a handle that was opened before a mode was set."""
    handle = opener(path)
    found = {}
    with MODES[mode]():
        found["opened"] = outcome(lambda: opener(path).keys())
        found["all"] = outcome(handle.get_tensors)
        for name in handle.keys():  # noqa: SIM118
            entry = handle.get_slice(name)
            found[name] = outcome(handle.get_tensor, name)
            for index in (..., 0, slice(0, 1), slice(1, 1), "a"):
                found[name, str(index)] = outcome(lambda entry=entry, index=index: entry[index])
    if found["all"][0] == "value":
        found.update({("all", name): ("value", t) for name, t in found.pop("all")[1].items()})
    return {name: described(result) for name, result in found.items()}


def described(result):
    if result[0] == "value" and type(result[1]) is not torch.Tensor:
        return str(type(result[1]))  # a fake tensor
    return seen(result)


@pytest.mark.parametrize("mode", MODES)
def test_modes_as_stock(small, mode):
    assert under_mode(ours, small, mode) == under_mode(stocks, small, mode)


@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_a_default_device_as_stock(small, device):
    torch.set_default_device(device)
    try:
        found, expected = (under_mode(opener, small, "cpu") for opener in (ours, stocks))
        loaded, stock = (
            all_facts(load(small, backend="pread"))
            for load in (stx_patch.load_file, STOCK.load_file)
        )
    finally:
        torch.set_default_device(None)
    assert found == expected and loaded == stock


def test_a_default_dtype_changes_nothing(small):
    torch.set_default_dtype(torch.float64)
    try:
        found = all_facts(stx_patch.load_file(small, backend="pread"))
    finally:
        torch.set_default_dtype(torch.float32)
    assert found == all_facts(STOCK.load_file(small, backend="pread"))


@pytest.mark.parametrize("dtype", ["F4", "F6_E2M3", "F6_E3M2"])
@pytest.mark.parametrize("shape", [[2, 8], [8], [0, 4], [4, 3, 2]])
def test_narrow_dtypes_as_stock(tmp_path, dtype, shape):
    path = write(tmp_path / "f", [("a", "U8", [3]), ("b", dtype, shape), ("c", "F32", [2])])
    found, expected = (
        {
            "all": outcome(lambda handle=handle: all_facts(handle.get_tensors())),
            "one": seen(outcome(handle.get_tensor, "b")),
            "other": seen(outcome(handle.get_tensor, "c")),
            "shape": outcome(handle.get_slice("b").get_shape),
            **{
                str(index): seen(outcome(lambda h=handle, index=index: h.get_slice("b")[index]))
                for index in (..., 0, slice(0, 1), slice(0, 2), (..., 0), -1, "a")
            },
        }
        for handle in (ours(path), stocks(path))
    )
    assert found == expected
    kept = stx_patch.load_file(path, backend="pread", tensor_filter=["a", "c"])
    assert list(kept) == ["a", "c"]  # what cannot be made is not asked for


# --- interruption ---


INTERRUPTED = """
    import gc, os, signal, sys, threading, time
    import stx_patch
    from pathlib import Path
    path, engine, direct_io = sys.argv[1:]
    how = dict(backend="pread", engine=engine, direct_io=direct_io, inflight_bytes=1)
    total_bytes = os.stat(path).st_size

    def held():
        gc.collect()
        status = Path("/proc/self/status").read_text()
        anonymous = int(status.split("RssAnon:")[1].split()[0]) >> 10
        return sorted(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task")), anonymous

    stx_patch.load_file(path, tensor_filter="a", **how)
    before = held()
    done = threading.Event()

    def interrupt(delay, begun_bytes):
        time.sleep(delay)
        os.kill(os.getpid(), signal.SIGINT)

    met = 0
    for attempt in range(40):
        stx_patch.reset_stats()
        thread = threading.Thread(target=interrupt, args=(0.002 + attempt * 0.003, 0))
        try:
            thread.start()
            stx_patch.load_file(path, **how)
            thread.join()  # too late: the load was over
        except KeyboardInterrupt:
            thread.join()
            stats = stx_patch.stats()
            if 2_000_000 < stats.bytes_read < total_bytes - 2_000_000:
                met += 1
                assert stats.tensors_native == 0 and stats.fallbacks == {}, stats
        now = held()
        assert now[0] == before[0] and now[1] == before[1], (now, before)
        assert now[2] < before[2] + 20, (now, before)
        if met == 3:
            break
    print(met)

    # A handler that does not raise does no harm, one that raises something else is heard.
    calls = []
    signal.signal(signal.SIGALRM, lambda number, frame: calls.append(number))
    signal.setitimer(signal.ITIMER_REAL, 0.005, 0.005)
    assert len(stx_patch.load_file(path, **how)) == 4
    signal.setitimer(signal.ITIMER_REAL, 0)  # the next handler is not for setting it
    print(len(calls) > 0)

    def fail(number, frame):
        signal.setitimer(signal.ITIMER_REAL, 0)
        raise ZeroDivisionError("from a handler")

    signal.signal(signal.SIGALRM, fail)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.005, 0.005)
        stx_patch.load_file(path, **how)
    except ZeroDivisionError as error:
        print(error)
    """


@pytest.fixture(scope="module")
def much(tmp_path_factory):
    """256 MiB."""
    entries = [(name, "U8", [64 * MIB]) for name in "abcd"]
    path = write(tmp_path_factory.mktemp("owned") / "much.safetensors", entries)
    yield path
    path.unlink()


@engines
@direct
def test_interruption(much, engine, direct_io):
    """Ctrl-C in the middle: KeyboardInterrupt, and nothing is left of the load."""
    drop_from_cache(much)
    printed = run_python(INTERRUPTED, much, engine, direct_io, expect_output=None).split("\n")
    assert printed == ["3", "True", "from a handler", ""]


# --- forks and threads ---


def test_a_fork_between_open_and_read(large, large_facts):
    """The child has the descriptor too, and reads natively by whatever engine."""
    handle, entry = ours(large), ours(large).get_slice("b")
    warmed = ours(large, engine="uring", direct_io="on")
    tensors = warmed.get_tensors()  # a ring was there, in the parent

    def work():
        for one in (handle, warmed):
            assert all_facts(one.get_tensors()) == large_facts
            assert facts(one.get_tensor("a")) == large_facts["a"]
        assert facts(entry[...]) == large_facts["b"]
        assert all_facts(tensors) == large_facts
        tensors["a"][:10].zero_()  # not so much that torch would start threads in a child
        handle.__exit__(None, None, None)
        assert stx_patch.stats().fallbacks == {}

    stx_patch.reset_stats()
    for _ in range(2):
        assert in_a_child(work) == 0
    assert all_facts(tensors) == large_facts
    assert all_facts(handle.get_tensors()) == large_facts and facts(entry[...]) == large_facts["b"]


def test_a_fork_while_another_thread_reads(large, large_facts):
    stop = threading.Event()

    def read():
        while not stop.is_set():
            stx_patch.load_file(large, backend="pread", direct_io="on")

    thread = threading.Thread(target=read)
    thread.start()

    def work():
        assert all_facts(stx_patch.load_file(large, backend="pread")) == large_facts

    try:
        for _ in range(5):
            assert in_a_child(work) == 0
    finally:
        stop.set()
        thread.join(60)


def test_one_handle_of_many_threads(large, large_facts):
    """Closed while they read: each has the right bytes, or the error of a closed handle."""
    wrong = []

    def read(handle, engine):
        try:
            while True:
                for name in ("a", "b", "f", "k"):
                    if facts(handle.get_tensor(name)) != large_facts[name]:
                        wrong.append(name)
                if facts(handle.get_slice("b")[...]) != large_facts["b"]:
                    wrong.append("slice")
                if len(handle.get_tensors()) != len(large_facts):
                    wrong.append("all")
        except safetensors.SafetensorError as error:
            if str(error) != "File is closed":
                wrong.append(str(error))
        except BaseException as error:
            wrong.append(repr(error))

    before = open_descriptors()
    for engine in ENGINES:
        handle = ours(large, engine=engine)
        threads = [threading.Thread(target=read, args=(handle, engine)) for _ in range(4)]
        for thread in threads:
            thread.start()
        threads[0].join(0.5)
        handle.__exit__(None, None, None)
        for thread in threads:
            thread.join(60)
        assert wrong == []
        assert open_descriptors() == before


def test_a_load_leaves_other_threads_running(four_parts):
    """It does not hold the interpreter's lock while it reads."""
    drop_from_cache(four_parts)
    beats, stop = [], threading.Event()

    def beat():
        while not stop.wait(0.0005):
            beats.append(None)

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        for _ in range(5):
            drop_from_cache(four_parts)
            before = len(beats)
            stx_patch.load_file(four_parts, backend="pread", direct_io="on")
            if len(beats) - before >= 3:
                break
        else:
            raise AssertionError("no other thread ran")
    finally:
        stop.set()
        thread.join(60)


# --- without io_uring ---

FORBID_URING = """
    import ctypes, struct, sys
    import stx_patch, safetensors
    libc = ctypes.CDLL(None, use_errno=True)
    load, equal, allow, refuse = 0x20, 0x15, 0x7FFF0000, 0x50000 | 1  # EPERM
    steps = [(load, 0, 0, 0), (equal, 0, 1, 425), (6, 0, 0, refuse), (6, 0, 0, allow)]
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *step) for step in steps))
    program = ctypes.create_string_buffer(struct.pack("HxxxxxxP", 4, ctypes.addressof(code)))
    assert libc.prctl(38, 1, 0, 0, 0) == 0 and libc.prctl(22, 2, program) == 0
    path = sys.argv[1]
    assert len(stx_patch.load_file(path, backend="pread", direct_io="on")) == 13
    stats = stx_patch.stats()
    assert stats.engine == "threads" and stats.loads_direct == 1, stats
    assert stats.engine_reason == "io_uring: Operation not permitted", stats
    assert len(stx_patch.load_file(path, backend="pread", direct_io="off")) == 13
    reason = "io_uring: Operation not permitted; direct_io is off"
    assert stx_patch.stats().engine_reason == reason, stx_patch.stats()
    for engine in ("uring", "threads"):  # a wish is no reason to fail
        stx_patch.reset_stats()
        how = dict(backend="pread", engine=engine, direct_io="on")
        assert len(stx_patch.load_file(path, **how)) == 13
        stats = stx_patch.stats()
        assert (stats.engine, stats.loads_direct) == ("threads", 1)
        assert stats.engine_reason == "io_uring: Operation not permitted", stats
    """


def test_where_the_system_forbids_io_uring(large):
    """Docker's default profile does. Threads read instead, and stats() say why."""
    run_python(FORBID_URING, large)


# --- nothing is left ---

FLAT = """
    import gc, os, sys
    import safetensors, stx_patch
    from pathlib import Path
    large, cut, engine, direct_io = sys.argv[1:]
    how = dict(backend="pread", engine=engine, direct_io=direct_io)

    def once():
        stx_patch.load_file(large, tensor_filter=lambda key: key.nbytes > 1 << 20, **how)
        handle = stx_patch.safe_open(large, **how)
        handle.get_tensor("l"), handle.get_tensor("b"), handle.get_slice("f")[3:5, 1]
        handle = stx_patch.safe_open(cut, **how)
        os.truncate(cut, size_bytes // 2)
        for use in (handle.get_tensors, lambda: handle.get_slice("l")[0]):
            try:
                use()
            except safetensors.SafetensorError:
                pass
        os.truncate(cut, size_bytes)

    def held():
        gc.collect()
        status = Path("/proc/self/status").read_text()
        return {
            "descriptors": len(os.listdir("/proc/self/fd")),
            "threads": len(os.listdir("/proc/self/task")),
            "mappings": Path("/proc/self/maps").read_text().count("\\n"),
            "anonymous": int(status.split("RssAnon:")[1].split()[0]) >> 10,
        }

    size_bytes = os.stat(cut).st_size
    for _ in range(5):
        once()
    before = held()
    for _ in range(30):
        once()
    after = held()
    assert after["descriptors"] == before["descriptors"], (before, after)
    assert after["threads"] == before["threads"], (before, after)
    assert after["mappings"] <= before["mappings"] + 4, (before, after)
    assert after["anonymous"] <= before["anonymous"] + 6, (before, after)
    """


@engines
@direct
def test_nothing_is_left_of_many_loads(large, tmp_path, engine, direct_io):
    cut = tmp_path / "cut"
    cut.write_bytes(large.read_bytes())
    run_python(FLAT, large, cut, engine, direct_io)


def test_signals_do_not_reach_the_threads_that_read(four_parts):
    """They are the interpreter's thread's: a signal in the middle of a load is handled there."""
    calls = []
    handler = signal.signal(
        signal.SIGALRM, lambda number, frame: calls.append(threading.get_ident())
    )
    signal.setitimer(signal.ITIMER_REAL, 0.001, 0.001)
    try:
        for engine in ENGINES:
            stx_patch.load_file(four_parts, backend="pread", engine=engine, direct_io="on")
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
    assert set(calls) == {threading.get_ident()}
