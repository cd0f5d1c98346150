"""Proves: on generated files, every method of our handle answers as stock's does."""

import json
import math
import random
import struct
from operator import getitem

import pytest
import safetensors.torch
import torch
from helpers import DTYPE_BITS, STOCK, facts, ours, outcome, seen, write_raw
from hypothesis import given, settings
from hypothesis import strategies as st

import stx_patch

NAMES = st.one_of(
    st.text(st.characters(codec="utf-8"), max_size=12),
    st.sampled_from(["", "a\0b", "__metadata_", "é.ü", "layers.0.w", 'q"uote', "new\nline", "🦙"]),
).filter(lambda name: name != "__metadata__")
TEXTS = st.text(st.characters(codec="utf-8"), max_size=6)
INDEXES = [slice(None), ..., (), 0, -1, None, slice(1, 3), (slice(None), 0), [0], [], "text"]
SHAPES = [(), (1,), (0,), (8,), (2, 4), (4, 0, 2), (1, 1, 8), (3, 5, 8), (0, 0), (2, 3, 2, 4)]


def size_bits(dtype, shape):
    return DTYPE_BITS[dtype] * math.prod(shape)


@st.composite
def files(draw):
    """(header bytes, data bytes) of a valid file, written in any order."""
    entries, at = {}, 0
    for name in draw(st.lists(NAMES, max_size=7, unique=True)):
        dtype = draw(st.sampled_from(sorted(DTYPE_BITS)))
        shape = draw(st.lists(st.sampled_from([0, 1, 1, 2, 2, 3, 4, 7]), max_size=4))
        if size_bits(dtype, shape) % 8:
            shape.append(draw(st.sampled_from([4, 8])))
        size_bytes = size_bits(dtype, shape) // 8
        entry = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + size_bytes]}
        entries[name] = dict(draw(st.permutations(list(entry.items()))))
        at += size_bytes
    header = dict(draw(st.permutations(list(entries.items()))))
    metadata = draw(st.none() | st.dictionaries(TEXTS, TEXTS, max_size=4))
    if metadata is not None:
        is_first = draw(st.booleans())
        meta = {"__metadata__": metadata}
        header = {**meta, **header} if is_first else {**header, **meta}
    text = json.dumps(header, ensure_ascii=draw(st.booleans()), indent=draw(st.none() | st.just(1)))
    padding = " " * draw(st.integers(0, 9))  # so the data begin at any alignment
    data = random.Random(draw(st.integers(0, 2**16))).randbytes(at)
    return (text + padding).encode(), data


def begins(header, names):
    """Offsets in the order of names: equal where only empty tensors changed places."""
    return [tuple(header[name]["data_offsets"]) for name in names]


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tmp_path_factory.mktemp("parity") / "file.safetensors"


@settings(max_examples=500, deadline=None, derandomize=True)
@given(file=files())
def test_every_method_answers_as_stock(path, file):
    header = json.loads(file[0])
    write_raw(path, *file)
    stock, own = STOCK.safe_open(path, "pt"), ours(path, "pt")
    assert own.keys() == stock.keys()
    assert begins(header, own.offset_keys()) == begins(header, stock.offset_keys())
    assert sorted(own.offset_keys()) == own.keys()
    assert own.metadata() == stock.metadata()
    for name in stock.keys():  # noqa: SIM118
        assert seen(outcome(own.get_tensor, name)) == seen(outcome(stock.get_tensor, name))
        mine, theirs = own.get_slice(name), stock.get_slice(name)
        assert mine.get_shape() == theirs.get_shape() == own.get_shape(name)
        assert mine.get_dtype() == theirs.get_dtype() == own.get_dtype(name)
        begin, end = header[name]["data_offsets"]
        assert own.nbytes(name) == end - begin
        for index in INDEXES:
            assert seen(outcome(getitem, mine, index)) == seen(outcome(getitem, theirs, index))
    assert own.total_tensor_size == len(file[1])
    for missing in ("", "missing", "__metadata__", "a\0"):
        if missing not in header or missing == "__metadata__":
            assert outcome(own.get_tensor, missing) == outcome(stock.get_tensor, missing)
            assert outcome(own.get_slice, missing) == outcome(stock.get_slice, missing)
    check_whole(header, stock, outcome(own.get_tensors), outcome(stock.get_tensors))


def check_whole(header, stock, found, expected):
    """A dict of all tensors is stock's, in the order of the file; or stock's error."""
    assert found[0] == expected[0]
    if found[0] == "error":
        # Which of several that torch cannot hold is met first is by chance where they are empty.
        names = stock.keys()
        assert found == expected or found in [outcome(stock.get_tensor, name) for name in names]
        return
    assert type(found[1]) is dict
    assert begins(header, found[1]) == begins(header, expected[1])
    mine, theirs = ({name: facts(t) for name, t in d[1].items()} for d in (found, expected))
    assert mine == theirs


@settings(max_examples=200, deadline=None, derandomize=True)
@given(file=files())
def test_load_file_answers_as_stock(path, file):
    header = json.loads(file[0])
    write_raw(path, *file)
    stock = STOCK.safe_open(path, "pt")
    expected = outcome(STOCK.load_file, path)
    with stx_patch.patched():
        found = outcome(safetensors.torch.load_file, path)
        check_whole(header, stock, found, expected)
        again = outcome(safetensors.torch.load_file, filename=str(path), device="cpu")
        check_whole(header, stock, again, expected)
    check_whole(header, stock, outcome(stx_patch.load_file, path), expected)


@pytest.mark.parametrize("dtype", DTYPE_BITS)
def test_every_dtype_and_bit_pattern(tmp_path, dtype):
    """All shapes of a dtype, over bytes that are no number, no truth value, or denormal."""
    data, entries = b"", {}
    for number, shape in enumerate(SHAPES):
        if size_bits(dtype, shape) % 8:
            continue
        size_bytes = size_bits(dtype, shape) // 8
        pattern = (
            random.Random(number).randbytes(size_bytes) if number % 2 else b"\xff" * size_bytes
        )
        offsets = [len(data), len(data) + size_bytes]
        entries[f"{number}"] = {"dtype": dtype, "shape": shape, "data_offsets": offsets}
        data += pattern
    file = write_raw(tmp_path / "f", entries, data)
    stock, own = STOCK.safe_open(file, "pt"), ours(file, "pt")
    for name in entries:
        assert seen(outcome(own.get_tensor, name)) == seen(outcome(stock.get_tensor, name))
        for index in INDEXES:
            mine, theirs = own.get_slice(name), stock.get_slice(name)
            assert seen(outcome(getitem, mine, index)) == seen(outcome(getitem, theirs, index))


SIZES = {
    "rank 8": [2] * 8,
    "rank 64": [1] * 63 + [3],
    "rank 65": [1] * 64 + [3],
    "rank 200": [3] + [1] * 199,
    "empty and wide": [0, 2**62],
    "empty and too wide": [0, 2**31, 2**31],
    "empty behind": [2**60, 0],
    "empty in the middle": [3, 0, 2**40],
}


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("dtype", ["U8", "F4", "BF16", "F6_E2M3"])
def test_odd_shapes(tmp_path, name, dtype):
    """Many dimensions, and dimensions that count although nothing is in them."""
    shape = [*SIZES[name], 8] if dtype.startswith("F4") else SIZES[name]
    if math.prod(shape) * 8 >= 2**64 or size_bits(dtype, shape) % 8:
        shape = [*shape, 8]
    size_bytes = size_bits(dtype, shape) // 8
    entries = {"t": {"dtype": dtype, "shape": shape, "data_offsets": [0, size_bytes]}}
    file = write_raw(tmp_path / "f", entries, bytes(range(256))[:size_bytes].ljust(size_bytes))
    expected = outcome(STOCK.safe_open, file, "pt")
    found = outcome(stx_patch.safe_open, file, "pt")
    if expected[0] == "error":
        assert found == expected
        return
    stock, own = expected[1], found[1]
    assert own.get_slice("t").get_shape() == stock.get_slice("t").get_shape() == shape
    assert seen(outcome(own.get_tensor, "t")) == seen(outcome(stock.get_tensor, "t"))
    for index in (..., 0, None):
        mine, theirs = own.get_slice("t"), stock.get_slice("t")
        assert seen(outcome(getitem, mine, index)) == seen(outcome(getitem, theirs, index))


@pytest.mark.parametrize("skew", range(8))
def test_data_may_begin_anywhere(tmp_path, skew):
    """The data section, and so every tensor, at any alignment."""
    header = json.dumps(
        {
            "a": {"dtype": "U8", "shape": [3], "data_offsets": [0, 3]},
            "b": {"dtype": "F64", "shape": [2], "data_offsets": [3, 19]},
            "c": {"dtype": "BF16", "shape": [1, 5], "data_offsets": [19, 29]},
        }
    ).encode()
    file = write_raw(tmp_path / "f", header + b" " * skew, bytes(range(29)))
    stock, own = STOCK.safe_open(file, "pt"), ours(file, "pt")
    for name in "abc":
        assert facts(own.get_tensor(name)) == facts(stock.get_tensor(name))


def test_a_header_of_many_pieces(tmp_path):
    """A header far longer than what is parsed at once, with names that look like its borders."""
    count = 30_000
    entries = {
        f'x}},"{i}': {"dtype": "U8", "shape": [1], "data_offsets": [i, i + 1]} for i in range(count)
    }
    file = write_raw(tmp_path / "f", {"__metadata__": {"m": "},"}, **entries}, bytes(count))
    stock, own = STOCK.safe_open(file, "pt"), ours(file, "pt")
    assert own.keys() == stock.keys()
    assert own.offset_keys() == stock.offset_keys()
    assert own.metadata() == stock.metadata() == {"m": "},"}


def test_a_long_name_and_long_metadata(tmp_path):
    """One entry longer than a piece."""
    name = "n" * 300_000
    header = {
        "__metadata__": {"k": "v" * 400_000},
        name: {"dtype": "U8", "shape": [], "data_offsets": [0, 1]},
    }
    file = write_raw(tmp_path / "f", header, b"x")
    own = ours(file, "pt")
    assert own.keys() == [name] and own.metadata() == {"k": "v" * 400_000}
    assert own.get_tensor(name).item() == ord("x")


def test_context_and_closing_as_stock(sample):
    def use(opener):
        handle = opener(sample, "pt")
        slice_ = handle.get_slice("vector")
        with handle as entered:
            assert entered is handle
            assert handle.__enter__() is handle
        closed = [
            outcome(handle.keys), outcome(handle.offset_keys), outcome(handle.metadata),
            outcome(handle.get_tensors), outcome(handle.get_tensor, "vector"),
            outcome(handle.get_tensor, "none"), outcome(handle.get_slice, "vector"),
            outcome(lambda: handle.__enter__() is handle),
            outcome(handle.__exit__, None, None, None),
        ]  # fmt: skip
        return closed, slice_[2].item()

    assert use(ours) == use(STOCK.safe_open)
    with pytest.raises(ZeroDivisionError), ours(sample):
        raise ZeroDivisionError


def test_the_smallest_files(tmp_path):
    for header in (b"{}", b' {"__metadata__":{}} '):
        file = write_raw(tmp_path / "f", header)
        stock, own = STOCK.safe_open(file, "pt"), ours(file, "pt")
        assert own.keys() == stock.keys() == []
        assert own.get_tensors() == stock.get_tensors() == {}
        assert own.metadata() == stock.metadata()


def test_metadata_is_a_new_dict_each_time(sample):
    own = ours(sample)
    own.metadata().pop("format")
    assert own.metadata() == {"format": "pt"}


def test_large_sparse_offsets(tmp_path):
    """Tensors beyond 4 GiB of a file (with holes on disk, not in the format)."""
    size = (1 << 32) + 4096
    header = json.dumps(
        {
            "big": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]},
            "end": {"dtype": "I32", "shape": [2], "data_offsets": [size, size + 8]},
        }
    ).encode()
    file = tmp_path / "f"
    with open(file, "wb") as out:
        out.write(struct.pack("<Q", len(header)) + header)
        out.seek(8 + len(header) + size)
        out.write(struct.pack("<ii", 7, 8))
    own = ours(file)
    assert own.get_tensor("end").tolist() == [7, 8]
    assert own.get_slice("big")[-2:].tolist() == [0, 0]
    assert torch.equal(own.get_tensor("end"), STOCK.safe_open(file, "pt").get_tensor("end"))
