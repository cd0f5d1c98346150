"""Proves: in uncommon surroundings (names that others have wrapped, other frameworks, a directory
that was changed, a collection at a bad moment) filters hold and what differs from stock is said."""

import json
import os
import pickle
import threading

import numpy as np
import pytest
import safetensors
import safetensors.numpy
import safetensors.torch
import torch
from helpers import ours, outcome, to_bytes, write_raw
from patch_helpers import STOCK, leaves_stock, run_python  # noqa: F401
from torch.utils.flop_counter import FlopCounterMode

import stx_patch
from stx_patch import _stats

LEFT_OUT = "left out by tensor_filter"


def doubled(path):
    """The same file with its first entry twice, which only stock takes."""
    content = path.read_bytes()
    size_bytes = int.from_bytes(content[:8], "little")
    entry = b'"a":' + json.dumps(json.loads(content[8 : 8 + size_bytes])["a"]).encode()
    header = content[8 : 8 + size_bytes].rstrip()[:-1] + b"," + entry + b"}"
    other = path.with_name("double.safetensors")
    other.write_bytes(len(header).to_bytes(8, "little") + header + content[8 + size_bytes :])
    return other


def same(path):
    return path


# Who serves a call: (the file, arguments, keywords, how many files are opened natively).
SERVERS = {
    "np": (same, ("np",), {}, 0),
    "refused": (doubled, (), {}, 0),
    "refused pread": (doubled, ("pt",), {"backend": "pread"}, 0),
    "pread": (same, ("pt",), {"backend": "pread"}, 1),
}


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "two.safetensors"
    safetensors.torch.save_file({"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(4)}, path)
    return path


# --- names that somebody has wrapped before ---


def test_a_class_that_was_wrapped_before_stays_and_the_rest_is_patched(path):
    run_python(
        """
        import functools, pickle, sys
        import safetensors.torch
        genuine = [safetensors.safe_open]
        @functools.wraps(genuine[0])
        def wrapper(*arguments, **keywords):
            return genuine[0](*arguments, **keywords)
        safetensors.safe_open = wrapper
        import stx_patch.auto
        path = sys.argv[1]
        assert stx_patch.is_patched() and safetensors.safe_open is wrapper
        assert type(wrapper(path, "pt")) is genuine[0]
        stx_patch.patch("a")
        assert list(safetensors.torch.load_file(path)) == ["a"]
        assert safetensors.torch.safe_open(path, "pt").keys() == ["a"]
        assert stx_patch.safe_open(path).keys() == ["a"]
        assert isinstance(wrapper(path, "pt"), safetensors.torch.safe_open)
        assert stx_patch.stats().opens == 3 and stx_patch.stats().fallbacks == {}
        stx_patch.unpatch()
        assert safetensors.safe_open is wrapper
        assert safetensors.torch.safe_open is genuine[0]
        """,
        path,
    )


@pytest.mark.parametrize("theirs", ["unittest.mock.Mock()", "lambda *arguments: {}", "len"])
def test_functions_that_were_replaced_before_stay(path, theirs):
    run_python(
        f"""
        import sys, unittest.mock
        import safetensors.torch, safetensors.numpy
        genuine = safetensors.torch.load_file, safetensors.torch.load, safetensors.numpy.load
        theirs = {theirs}
        safetensors.torch.load_file = safetensors.torch.load = safetensors.numpy.load = theirs
        import stx_patch
        def hold():
            names = safetensors.torch.load_file, safetensors.torch.load, safetensors.numpy.load
            return names == (theirs, theirs, theirs)
        for _ in range(2):
            with stx_patch.patched("a"):
                assert hold()
            assert hold()
        # Once they are stock's again, they are patched as ever.
        safetensors.torch.load_file, safetensors.torch.load, safetensors.numpy.load = genuine
        with stx_patch.patched("a") as report:
            assert list(safetensors.torch.load_file(sys.argv[1])) == ["a"]
            data = open(sys.argv[1], "rb").read()
            assert list(safetensors.torch.load(data)) == ["a"]
            assert list(safetensors.numpy.load(data)) == ["a"]
        assert report.opens == 1 and report.fallbacks == {{"load(bytes)": 1}}
        assert safetensors.torch.load_file is genuine[0]
        assert safetensors.numpy.load is genuine[2]
        """,
        path,
    )


# --- load(bytes) ---


def test_numpy_from_bytes_is_filtered_and_counted(path):
    data = path.read_bytes()
    stock = safetensors.numpy.load
    expected = stock(data)
    with stx_patch.patched("a") as report:
        assert safetensors.numpy.load is not stock
        loaded = safetensors.numpy.load(data)
        assert list(loaded) == ["a"] and np.array_equal(loaded["a"], expected["a"])
        assert list(safetensors.numpy.load(data=data)) == ["a"]
        assert pickle.loads(pickle.dumps(safetensors.numpy.load)) is safetensors.numpy.load
    assert report.fallbacks == {"load(bytes)": 2} and report.tensors_stock == 2
    assert safetensors.numpy.load is stock
    with stx_patch.patched() as report:
        assert sorted(safetensors.numpy.load(data)) == ["a", "b"]
        assert outcome(safetensors.numpy.load, data[:-1]) == outcome(stock, data[:-1])
        assert outcome(safetensors.numpy.load) == outcome(stock)
    assert report.fallbacks == {"load(bytes)": 1}


@pytest.mark.parametrize("imported", ["before", "after"])
@pytest.mark.parametrize("home", ["flax", "tensorflow", "mlx", "paddle", "numpy"])
def test_every_framework_from_bytes_is_filtered_and_counted_once(path, home, imported):
    """Stands for the frameworks themselves: their modules of safetensors are the real ones."""
    run_python(
        """
        import importlib, sys, unittest.mock
        path, home, imported = sys.argv[1:]
        for name in ("jax", "jax.numpy", "tensorflow", "mlx", "mlx.core", "paddle"):
            sys.modules[name] = unittest.mock.MagicMock()
        sys.modules["paddle"].__version__ = "3.2.0"
        import stx_patch
        if imported == "before":
            importlib.import_module("safetensors." + home)
        stx_patch.patch("a")
        module = importlib.import_module("safetensors." + home)
        data = open(path, "rb").read()
        assert list(module.load(data)) == ["a"]
        assert stx_patch.stats().fallbacks == {"load(bytes)": 1}, stx_patch.stats()
        assert stx_patch.stats().tensors_stock == 1
        stx_patch.unpatch()
        assert sorted(module.load(data)) == ["a", "b"]
        assert module.load.__code__.co_filename == module.__file__
        """,
        path,
        home,
        imported,
    )


def test_deserialize_stays_stocks(path):
    with stx_patch.patched("a") as report:
        assert sorted(name for name, _ in safetensors.deserialize(path.read_bytes())) == ["a", "b"]
    assert report.fallbacks == {}


def test_bytes_with_fields_as_an_array_are_taken_under_a_filter(tmp_path):
    """Stock reads an entry so, too; the fields' order is its own."""
    header = b'{"b":["U8",[4],[2,6]],"a":{"data_offsets":[0,2],"dtype":"U8","shape":[2,1]}}'
    data = write_raw(tmp_path / "odd.safetensors", header, b"123456").read_bytes()
    keys = []
    with stx_patch.patched(lambda key: keys.append(key) or key == "b"):
        loaded = safetensors.torch.load(data)
    assert list(loaded) == ["b"]
    assert loaded["b"].tolist() == STOCK.load(data)["b"].tolist() == list(b"3456")
    facts = [(str(key), key.dtype, key.shape, key.nbytes) for key in keys]
    assert facts == [("a", "U8", (2, 1), 2), ("b", "U8", (4,), 4)]


# --- stx_patch.safe_open where stock serves ---


@pytest.mark.parametrize("tensor_filter", [None, "*", "a"])
@pytest.mark.parametrize("server", SERVERS)
def test_the_public_handle_has_its_methods_whoever_serves(path, server, tensor_filter):
    native = ours(path, tensor_filter=tensor_filter)
    other, arguments, keywords, opens = SERVERS[server]
    stx_patch.reset_stats()
    handle = stx_patch.safe_open(other(path), *arguments, tensor_filter=tensor_filter, **keywords)
    assert stx_patch.stats().opens == opens
    assert isinstance(handle, STOCK.safe_open) and isinstance(handle, stx_patch.safe_open)
    assert handle.keys() == native.keys() and handle.offset_keys() == native.offset_keys()
    for name in native.keys():  # noqa: SIM118
        for method in ("get_dtype", "get_shape", "nbytes"):
            assert getattr(handle, method)(name) == getattr(native, method)(name)
    assert handle.total_tensor_size == native.total_tensor_size
    assert list(handle.get_tensors()) == native.offset_keys()


def test_a_patched_name_gives_stocks_own_handle_where_stock_serves(path):
    with stx_patch.patched():
        assert type(safetensors.safe_open(path, "np")) is STOCK.safe_open


def test_the_public_handle_has_its_methods_without_the_extension(path):
    run_python(
        """
        import sys
        sys.modules["stx_patch._C"] = None
        import stx_patch
        handle = stx_patch.safe_open(sys.argv[1])
        assert handle.get_shape("a") == [2, 3] and handle.nbytes("a") == 24
        assert handle.total_tensor_size == 40
        """,
        path,
    )


# --- a collection, or a signal, while the counters are read ---


def test_counting_while_the_counters_are_read_does_not_wait_for_itself():
    done = threading.Event()

    def count():
        with _stats._lock:  # as a finaliser finds it that runs while `stats()` allocates
            stx_patch.stats()
            _stats.count_fallback("test")
            _stats.count_stock_tensors(0)
        done.set()

    threading.Thread(target=count, daemon=True).start()
    waited = done.wait(10)
    if not waited:
        _stats._renew_lock()  # for the tests that follow
    assert waited, "the thread waits for itself"


def test_a_block_abandoned_in_a_cycle_ends_in_any_collection():
    run_python(
        """
        import gc, stx_patch
        class Holder:
            pass
        def abandon():
            holder = Holder()
            holder.block, holder.itself = stx_patch.patched(), holder
            holder.block.__enter__()
        gc.disable()
        for round in range(300):
            gc.collect()
            abandon()
            gc.set_threshold(1 + round % 60)
            gc.enable()
            stx_patch.stats()
            gc.disable()
        gc.collect()
        assert not stx_patch.is_patched()
        """,
        timeout=60,
    )


# --- a handle that needs stock later ---


def test_another_directory_does_no_harm_to_a_relative_path(path, monkeypatch):
    monkeypatch.chdir(path.parent)
    handle = ours(path.name)
    monkeypatch.chdir("/")
    with FlopCounterMode(display=False):
        assert handle.get_tensor("a").tolist() == [[0, 1, 2], [3, 4, 5]]
        assert handle.get_slice("a")[1:].tolist() == [[3, 4, 5]]
        assert handle.get_tensors()["b"].tolist() == [1] * 4


def test_a_link_on_the_way_up_is_followed(path, monkeypatch):
    """`link/../two` is beside what the link points to, not beside the link."""
    below = path.parent / "elsewhere" / "below"
    below.mkdir(parents=True)
    path.rename(below.parent / path.name)
    (path.parent / "link").symlink_to(below)
    monkeypatch.chdir(path.parent)
    handle = ours(f"link/../{path.name}")
    with FlopCounterMode(display=False):
        assert to_bytes(handle.get_tensor("b")) == to_bytes(torch.ones(4))


def test_a_directory_that_is_gone_is_refused_as_stock_does(tmp_path, monkeypatch):
    folder = tmp_path / "gone"
    folder.mkdir()
    monkeypatch.chdir(folder)
    folder.rmdir()
    for name in ("missing.safetensors", ""):
        expected = outcome(STOCK.safe_open, name, "pt")
        assert expected[0] == "error"
        assert outcome(stx_patch.safe_open, name, "pt") == expected


@pytest.mark.parametrize("change", [os.unlink, lambda path: os.utime(path, (1, 1))])
def test_a_file_that_is_gone_has_changed(path, change):
    handle = ours(path)
    change(path)
    with FlopCounterMode(display=False):
        for use in (lambda: handle.get_tensor("a"), lambda: handle.get_slice("a")[1:]):
            with pytest.raises(
                safetensors.SafetensorError, match="has changed since it was opened"
            ):
                use()
    assert handle.get_tensor("b").tolist() == [1] * 4  # natively, as before


# --- isinstance ---


def test_what_says_it_is_of_stocks_class_is_an_instance():
    class Proxy:
        """Stands before a handle and says so, as mocks and lazy objects do."""

        def __init__(self, claim):
            self.claim = claim

        @property
        def __class__(self):
            return self.claim()

    def fail():
        raise AttributeError

    assert isinstance(Proxy(lambda: STOCK.safe_open), stx_patch.safe_open)
    with stx_patch.patched():
        opener = safetensors.safe_open
        assert isinstance(Proxy(lambda: STOCK.safe_open), opener)
        assert isinstance(Proxy(lambda: opener), opener)
        for claim in (lambda: int, lambda: 3, fail):
            assert not isinstance(Proxy(claim), opener)
            assert not isinstance(Proxy(claim), STOCK.safe_open)


# --- reports ---


def test_the_report_of_a_block_that_raised_stands_still_while_switched_off(path, monkeypatch):
    monkeypatch.setenv("STX_PATCH", "0")
    with pytest.raises(ZeroDivisionError), stx_patch.patched() as report:
        stx_patch.load_file(path)
        raise ZeroDivisionError
    stx_patch.load_file(path)
    assert report.opens == 1


# --- stock's handle behind a filter ---


def test_a_filtered_handle_names_itself_as_stocks_does(path):
    handle = stx_patch.safe_open(path, "np", tensor_filter="a")
    stock = STOCK.safe_open(path, "pt")
    assert repr(handle).startswith("<builtins.safe_open object at 0x")
    for use in (len, iter, lambda handle: handle["a"], lambda handle: handle < handle):
        assert outcome(use, handle) == outcome(use, stock)


@pytest.mark.parametrize("server", SERVERS)
def test_a_closed_handle_says_so_for_a_name_left_out_too(path, server):
    other, arguments, keywords, _ = SERVERS[server]
    handle = stx_patch.safe_open(other(path), *arguments, tensor_filter="a", **keywords)
    uses = [handle.get_tensor, handle.get_slice]
    for use in uses:
        with pytest.raises(safetensors.SafetensorError, match=LEFT_OUT):
            use("b")
    handle.__exit__(None, None, None)
    for use in uses:
        for name in ("a", "b", "missing"):
            with pytest.raises(safetensors.SafetensorError, match="File is closed"):
                use(name)


def test_our_function_under_stocks_name_does_not_call_itself(sample):
    """Bound by hand, before stock's own was ever looked at; what we leave to stock is served."""
    safetensors.torch.save_file({"a": torch.ones(2)}, sample)
    run_python(
        """
        import sys
        import safetensors.torch
        import stx_patch

        safetensors.torch.load_file = stx_patch.load_file
        for path in sys.argv[1:]:
            for keywords in ({}, {"backend": "pread"}):
                tensors = safetensors.torch.load_file(path, **keywords)
                assert tensors["a"].tolist() == [1, 1], tensors
        assert stx_patch.stats().opens == 2
        assert stx_patch.stats().fallbacks == {"file refused (format)": 2}
        """,
        sample,
        doubled(sample),
    )


def test_bytes_with_a_dtype_as_a_map_are_taken_under_a_filter():
    header = b'{"a":{"dtype":{"F32":null},"shape":[1],"data_offsets":[0,4]}}'
    data = len(header).to_bytes(8, "little") + header + b"abcd"
    assert list(safetensors.torch.load(data)) == ["a"]
    with stx_patch.patched(tensor_filter=lambda key: key.dtype == "F32"):
        assert list(safetensors.torch.load(data)) == ["a"]
