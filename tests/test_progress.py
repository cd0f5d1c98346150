"""Proves: progress is shown where a load waits, of all files of a load as one, and never otherwise;
what a callback raises ends the load cleanly."""

import gc
import io
import os
import sys
import time

import pytest
import safetensors.torch
import torch
from helpers import ours
from patch_helpers import leaves_stock, open_descriptors, run_python  # noqa: F401

import stx_patch

MIB = 1 << 20


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """60 MiB in six tensors."""
    path = tmp_path_factory.mktemp("progress") / "large.safetensors"
    tensors = {f"t{n}": torch.full((10 * MIB,), n).byte() for n in range(6)}
    safetensors.torch.save_file(tensors, path)
    return path


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    for shard in range(3):
        tensors = {f"s{shard}.t{n}": torch.full((5 * MIB,), n).byte() for n in range(3)}
        safetensors.torch.save_file(tensors, folder / f"{shard}.safetensors")
    return folder


def check_calls(calls, total_bytes):
    """From a beginning to the end, never back, and the end once."""
    done = [done_bytes for done_bytes, _ in calls]
    assert {total for _, total in calls} == {total_bytes}
    assert done == sorted(done) and done[-1] == total_bytes and done.count(total_bytes) == 1


def record(calls):
    return lambda done_bytes, total_bytes: calls.append((done_bytes, total_bytes))


# --- a callable ---


@pytest.mark.parametrize("direct_io", ["on", "off"])
def test_a_load_that_waits_tells_a_callable(large, direct_io):
    calls = []
    options = {"direct_io": direct_io, "inflight_bytes": "1MiB", "progress": record(calls)}
    tensors = stx_patch.load_file(large, backend="pread", **options)
    assert len(tensors) == 6
    check_calls(calls, 60 * MIB)


@pytest.mark.parametrize("backend", ["mmap", "pread"])
def test_a_stream_tells_what_it_has_handed_out(large, backend):
    calls, taken_bytes = [], 0
    handle = ours(large, backend=backend, inflight_bytes="4MiB", progress=record(calls))
    for _name, tensor in handle.tensors():
        assert calls[-1][0] <= taken_bytes
        taken_bytes += tensor.nbytes
    check_calls(calls, 60 * MIB)
    list(handle.tensors())
    assert calls[-1] == (60 * MIB, 60 * MIB)


def test_a_slow_stream_tells_where_it_is(large):
    calls = []
    handle = ours(large, inflight_bytes="1MiB", progress=record(calls))
    for _pair in handle.tensors():
        time.sleep(0.06)
    check_calls(calls, 60 * MIB)
    assert len(calls) >= 5


def test_a_fast_one_is_not_held_up_by_telling(large):
    calls = []
    start = time.monotonic()
    for _pair in ours(large, inflight_bytes=4096, progress=record(calls)).tensors():
        pass
    assert len(calls) <= 3 + (time.monotonic() - start) * 20


def test_two_streams_of_the_same_files(shards):
    calls = []
    handle = stx_patch.safe_open(shards, progress=record(calls))
    streams = [handle.tensors(), handle.tensors()]
    for _ in range(9):
        for stream in streams:
            next(stream)
    assert [list(stream) for stream in streams] == [[], []]
    assert {total for _, total in calls} == {45 * MIB}


def test_stop_iteration_does_not_end_a_stream_in_silence(large, shards):
    def refuse(done_bytes, total_bytes):
        raise StopIteration

    for source in (large, shards):
        with pytest.raises(RuntimeError, match="StopIteration"):
            list(stx_patch.safe_open(source, progress=refuse).tensors())


def test_a_collection_in_the_middle_of_a_bar(large, bars, monkeypatch):
    """It may end another iteration over the same files."""
    monkeypatch.setattr(sys, "stderr", Terminal())
    handle = ours(large, progress=True, inflight_bytes="1MiB")
    other = handle.tensors()
    next(other)

    class Closing:
        def __del__(self):
            other.close()

    cycle = [Closing()]
    cycle.append(cycle)
    del cycle
    import tqdm.auto

    update = tqdm.auto.tqdm.update

    def collecting(self, n=1):
        gc.collect()
        return update(self, n)

    monkeypatch.setattr(tqdm.auto.tqdm, "update", collecting)
    assert len(list(handle.tensors())) == 6


def test_only_what_is_kept_counts(large):
    calls = []
    options = {"tensor_filter": ["t1", "t4"], "progress": record(calls)}
    stx_patch.load_file(large, backend="pread", **options)
    check_calls(calls, 20 * MIB)


def test_many_files_are_one_load(shards):
    for backend in ("pread", "mmap"):
        calls = []
        handle = stx_patch.safe_open(shards, backend=backend, progress=record(calls))
        if backend == "pread":
            handle.get_tensors()
            check_calls(calls, 45 * MIB)
            calls.clear()
        for _pair in handle.tensors():
            pass
        check_calls(calls, 45 * MIB)


def test_what_returns_at_once_tells_nobody(large, shards):
    calls = []
    stx_patch.load_file(large, progress=record(calls))
    handle = ours(large, backend="pread", progress=record(calls))
    handle.get_tensor("t1")
    handle.get_slice("t1")[:5]
    stx_patch.load_file(shards, progress=record(calls))
    assert calls == []


def test_a_patch_hands_it_to_every_load(large):
    calls = []
    with stx_patch.patched(progress=record(calls)):
        safetensors.torch.load_file(large, backend="pread")
        check_calls(calls, 60 * MIB)
        calls.clear()
        stx_patch.load_file(large, backend="pread", progress=False)
    assert calls == []


class Enough(Exception):
    pass


@pytest.mark.parametrize("at_bytes", [0, 1, 60 * MIB])
def test_what_a_callable_raises_ends_the_load(large, at_bytes):
    error, before = Enough("now"), open_descriptors()
    threads = len(os.listdir("/proc/self/task"))

    def refuse(done_bytes, total_bytes):
        if done_bytes >= at_bytes:
            raise error

    with pytest.raises(Enough) as caught:
        stx_patch.load_file(large, backend="pread", engine="threads", progress=refuse)
    assert caught.value is error
    handle = stx_patch.safe_open(large, engine="threads", progress=refuse)
    with pytest.raises(Enough), handle:
        for _pair in handle.tensors():
            pass
    assert open_descriptors() == before
    assert len(os.listdir("/proc/self/task")) <= threads + 1
    assert len(stx_patch.load_file(large, backend="pread")) == 6


def test_a_callable_may_load_something_itself(large):
    inner = []

    def nested(done_bytes, total_bytes):
        if not inner:
            inner.append(stx_patch.load_file(large, backend="pread"))

    assert len(stx_patch.load_file(large, backend="pread", progress=nested)) == 6
    assert len(inner[0]) == 6


# --- a bar ---


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def bars(monkeypatch):
    """What bars were made and how far they came; they show at once."""
    import tqdm.auto

    made = []

    class Bar(tqdm.auto.tqdm):
        def __init__(self, *arguments, **keywords):
            keywords.update(delay=0, file=sys.stderr, mininterval=0)
            super().__init__(*arguments, **keywords)
            made.append(self)

    monkeypatch.setattr(tqdm.auto, "tqdm", Bar)
    return made


def test_a_bar_on_a_terminal(large, bars, monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    stx_patch.load_file(large, backend="pread", progress=True)
    (bar,) = bars
    assert (bar.n, bar.total, bar.unit) == (60 * MIB, 60 * MIB, "B")
    assert "Loading safetensors" in terminal.getvalue()


def test_no_bar_without_a_terminal_unless_forced(large, bars, monkeypatch):
    for stream in (io.StringIO(), None):
        monkeypatch.setattr(sys, "stderr", stream)
        stx_patch.load_file(large, backend="pread", progress=True)
    assert bars == []
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    stx_patch.load_file(large, backend="pread", progress="force")
    assert len(bars) == 1


def test_a_bar_of_a_stream_that_is_left_is_closed(large, shards, bars, monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    for source in (large, shards):
        stream = stx_patch.safe_open(source, progress=True, inflight_bytes="1MiB").tensors()
        for _ in range(3):
            next(stream)
        assert bars[-1].disable is False
        stream.close()
        assert bars[-1].disable is True, "closed"


def test_one_bar_for_many_files(shards, bars, monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    stx_patch.load_file(shards, backend="pread", progress=True)
    (bar,) = bars
    assert (bar.n, bar.total) == (45 * MIB, 45 * MIB)


def test_the_variable(large):
    script = """
        import sys
        import tqdm.auto
        import stx_patch
        made = []
        class Bar(tqdm.auto.tqdm):
            def __init__(self, *arguments, **keywords):
                made.append(self)
                super().__init__(*arguments, **keywords)
        tqdm.auto.tqdm = Bar
        stx_patch.load_file(sys.argv[1], backend="pread", direct_io="off")
        assert len(made) == (sys.argv[2] == "force")
        """
    for value in ("0", "1", "force"):  # there is no terminal
        run_python(script, large, value, env={"STX_PATCH_PROGRESS": value}, expect_output=None)


@pytest.mark.parametrize("value", ["yes", 3, 1.5, b"1"])
def test_what_is_no_progress(large, value):
    with pytest.raises((TypeError, ValueError), match="progress must be"):
        stx_patch.load_file(large, progress=value)
