"""Proves: on generated files, every method of our handle answers as stock's does."""

import json
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
    st.text(max_size=12).filter(lambda name: name.isprintable() or name == ""),
    st.sampled_from(["", "a\0b", "__metadata_", "é.ü", "layers.0.w", 'q"uote', "new\nline", "🦙"]),
)


@st.composite
def files(draw):
    """(header bytes, data bytes) of a valid file."""
    names = draw(st.lists(NAMES, max_size=6, unique=True))
    entries, at = {}, 0
    for name in names:
        if name == "__metadata__":
            continue
        dtype = draw(st.sampled_from(sorted(DTYPE_BITS)))
        shape = draw(st.lists(st.integers(0, 4), max_size=4))
        bits = DTYPE_BITS[dtype]
        for extent in shape:
            bits *= extent
        if bits % 8:
            shape, bits = [*shape, 8], bits * 8
        entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + bits // 8]}
        at += bits // 8
    order = list(entries)
    if draw(st.booleans()):
        order.reverse()
    header = {name: entries[name] for name in order}
    metadata = draw(st.none() | st.dictionaries(st.text(max_size=5), st.text(max_size=5)))
    if metadata is not None:
        header = {"__metadata__": metadata, **header}
    text = json.dumps(header, ensure_ascii=draw(st.booleans())).encode()
    text += b" " * draw(st.integers(0, 9))
    data = random.Random(draw(st.integers(0, 2**16))).randbytes(at)
    return text, data


def begins(header, names):
    """Offsets in the order of names: equal where only empty tensors changed places."""
    return [tuple(header[name]["data_offsets"]) for name in names]


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tmp_path_factory.mktemp("parity") / "file.safetensors"


@settings(max_examples=400, deadline=None, derandomize=True)
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
        for index in (slice(None), ..., 0, (slice(None), 0), slice(1, 3), -1, None):
            assert seen(outcome(getitem, mine, index)) == seen(outcome(getitem, theirs, index))
    assert own.total_tensor_size == len(file[1])
    check_get_tensors(own, stock)


def check_get_tensors(own, stock):
    mine, theirs = outcome(own.get_tensors), outcome(stock.get_tensors)
    assert mine[0] == theirs[0]
    if mine[0] == "error":
        assert mine == theirs
        return
    assert type(mine[1]) is dict
    assert {k: facts(v) for k, v in mine[1].items()} == {k: facts(v) for k, v in theirs[1].items()}


@settings(max_examples=150, deadline=None, derandomize=True)
@given(file=files())
def test_load_file_answers_as_stock(path, file):
    write_raw(path, *file)
    expected = outcome(STOCK.load_file, path)
    with stx_patch.patched():
        patched = outcome(safetensors.torch.load_file, path)
    for found in (patched, outcome(stx_patch.load_file, path)):
        assert found[0] == expected[0]
        if found[0] == "error":
            assert found[1:] == expected[1:]
            continue
        assert {k: facts(v) for k, v in found[1].items()} == {
            k: facts(v) for k, v in expected[1].items()
        }


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
