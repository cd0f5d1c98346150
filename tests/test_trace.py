"""Proves: a trace holds what loads did: every read, hand-over and failure, in the format that
Chrome's viewers take; blocks and processes each have their own; it never makes a load fail."""

import json
import os
import sys
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import safetensors
import safetensors.numpy
import safetensors.torch
import torch
from device_helpers import FakeCuda, fake_library, set_faults
from helpers import in_a_child
from patch_helpers import (
    drop_from_cache,
    leaves_stock,  # noqa: F401
    run_python,
    settle,
)

import stx_patch
from stx_patch import _C, StxWarning, _device, _native, _trace, filters

MIB = 1 << 20
RECORDS = 65536  # of the core's ring


@pytest.fixture(autouse=True)
def nothing_is_left():
    """No recording outlives its block."""
    yield
    left = list(_trace._recordings)
    _trace._recordings.clear()
    _C.trace_stop()
    assert left == []


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two files of four layers of 1 MiB."""
    folder = tmp_path_factory.mktemp("model")
    for number in range(2):
        tensors = {
            f"model.layers.{layer}.weight.{number}": torch.full((MIB // 4,), float(layer))
            for layer in range(4)
        }
        safetensors.torch.save_file(tensors, folder / f"part-{number}.safetensors")
    return folder


@pytest.fixture
def one(folder):
    return folder / "part-0.safetensors"


class Loaded:
    """A trace file, valid as a whole.

    Attributes:
        events: what happened, in the order of the file.
        names: thread or lane -> its name.
        others: what else the file says.
    """

    def __init__(self, path):
        whole = json.loads(path.read_text())
        assert whole.keys() == {"traceEvents", "displayTimeUnit", "otherData"}
        self.others = whole["otherData"]
        self.events = [event for event in whole["traceEvents"] if event["ph"] != "M"]
        named = [event for event in whole["traceEvents"] if event["name"] == "thread_name"]
        self.names = {event["tid"]: event["args"]["name"] for event in named}
        for event in whole["traceEvents"]:
            check_fields(event)
        check_nesting(self.events, self.names)
        assert {event["tid"] for event in self.events} <= self.names.keys()

    def of(self, name):
        """The arguments of all events of a name."""
        return [event["args"] for event in self.events if event["name"] == name]

    def sum(self, argument, *names):
        found = (e for e in self.events if not names or e["name"] in names)
        return sum(event["args"].get(argument, 0) for event in found)

    def files(self, name):
        return {os.path.basename(arguments.get("file", "")) for arguments in self.of(name)}


def check_fields(event):
    """What Chrome's format asks of an event."""
    assert isinstance(event["name"], str) and event["name"]
    assert type(event["pid"]) is int and type(event["tid"]) is int
    assert isinstance(event["args"], dict)
    if event["ph"] == "M":
        assert event["name"] in ("process_name", "thread_name", "thread_sort_index")
        return
    assert event["cat"] == "stx_patch" and event["ts"] > 0
    if event["ph"] == "i":
        assert event["s"] == "t" and "dur" not in event
    else:
        assert event["ph"] == "X" and event["dur"] >= 0


def check_nesting(events, names):
    """Within a thread each event is inside another one or behind it; on a lane it is behind."""
    rows = {}
    for event in events:
        if event["ph"] == "X":
            rows.setdefault(event["tid"], []).append(event)
    for row, inside in rows.items():
        stack = []
        is_lane = row >= _trace._LANES
        assert is_lane == names[row].startswith(("read ", "device copy "))
        for event in sorted(inside, key=lambda event: (event["ts"], -event["dur"])):
            begin, end = event["ts"], event["ts"] + event["dur"]
            while stack and stack[-1] <= begin + 1e-3:  # a nanosecond, and how floats round
                stack.pop()
            assert not stack or (not is_lane and end <= stack[-1] + 1e-3), (names[row], event)
            stack.append(end)


# --- what loads did ---


def test_a_filtered_load_of_two_files_by_an_engine(folder, tmp_path):
    trace = tmp_path / "trace.json"
    with stx_patch.patched(trace=trace) as report:
        tensors = stx_patch.load_file(
            folder, tensor_filter=filters.layers(0, 2), backend="pread", engine="threads"
        )
    found = Loaded(trace)
    assert len(tensors) == 4 and found.others["lost_records"] == 0
    both = {"part-0.safetensors", "part-1.safetensors"}
    for name in ("open", "filter", "plan", "cache", "load", "engine", "read", "tensors"):
        assert found.files(name) == both, name
    assert all(f["kept"] == 2 and f["skipped"] == 2 for f in found.of("filter"))
    assert all(f["bytes_kept"] == f["bytes_skipped"] == 2 * MIB for f in found.of("filter"))
    assert {read["engine"] for read in found.of("read")} == {"threads"}
    assert found.sum("bytes_read") == report.bytes_read
    assert found.sum("bytes_kept", "plan") == report.bytes_kept
    assert len(found.of("read")) + found.sum("requests", "open") == report.requests
    assert found.sum("tensors", "tensors") == report.tensors_native == 4
    assert {cache["state"] for cache in found.of("cache")} <= {"warm", "cold", "unknown"}
    assert [load["way"] for load in found.of("load")] == ["owned", "owned"]


def test_a_mapped_load(one, tmp_path):
    trace = tmp_path / "trace.json"
    with stx_patch.patched("*.weight.0", trace=str(trace)) as report:
        assert len(safetensors.torch.load_file(one)) == 4
        with safetensors.safe_open(one, "pt") as handle:
            for name in handle.keys():  # noqa: SIM118
                handle.get_tensor(name)
        settle()
    found = Loaded(trace)
    assert [load["way"] for load in found.of("load")] == ["mapped"]
    assert len(found.of("open")) == 2 and len(found.of("tensors")) == 1
    assert found.sum("bytes_read") == report.bytes_read
    assert found.others["versions"]["torch"] == torch.__version__
    assert found.others["options"]["engine"] == "auto"


def test_what_helpers_read_ahead(tmp_path):
    path, trace = tmp_path / "cold.safetensors", tmp_path / "trace.json"
    safetensors.torch.save_file({f"w.{n}": torch.ones(MIB) for n in range(8)}, path)
    assert drop_from_cache(path)
    with stx_patch.patched(trace=trace) as report:
        tensors = safetensors.torch.load_file(path)  # kept: helpers leave with the last tensor
        settle()
    found = Loaded(trace)
    assert len(tensors) == 8 and "cold" in [cache["state"] for cache in found.of("cache")]
    assert found.sum("bytes_read", "read ahead") >= 32 * MIB
    assert found.sum("bytes_read") == report.bytes_read
    threads = {event["tid"] for event in found.events if event["name"] == "read ahead"}
    assert {found.names[thread] for thread in threads} == {"read-ahead helper"}
    assert threading.get_native_id() in found.names


def test_a_stream(one, tmp_path):
    trace = tmp_path / "trace.json"
    with stx_patch.patched(trace=trace) as report:
        with safetensors.safe_open(one, "pt", backend="pread") as handle:
            assert len(list(handle.tensors())) == 4
    found = Loaded(trace)
    assert "tensors" in [wait["for"] for wait in found.of("wait")]
    (engine,) = (event for event in found.events if event["name"] == "engine")
    assert found.names[engine["tid"]] == "reader of tensors()"
    assert found.sum("bytes_read") == report.bytes_read


def test_a_stream_that_is_ended_early(tmp_path):
    """Its window is full: the reader waits for room, until it is told to stop."""
    path, trace = tmp_path / "large.safetensors", tmp_path / "trace.json"
    safetensors.torch.save_file({f"w.{n}": torch.ones(MIB // 4) for n in range(32)}, path)
    with stx_patch.patched(trace=trace, inflight_bytes=MIB):
        with safetensors.safe_open(path, "pt", backend="pread") as handle:
            tensors = handle.tensors()
            next(tensors)
            while not any(event[-1].get("for") == "room" for event in _C.trace_events(0)[0]):
                pass
            tensors.close()
    found = Loaded(trace)
    (engine,) = found.of("engine")
    assert "room" in [wait["for"] for wait in found.of("wait")]
    assert engine["cancelled"] == 1 and engine["failed"] == 0 and engine["bytes"] < 16 * MIB


def test_single_tensors_and_rows_that_are_read(one, tmp_path):
    trace = tmp_path / "trace.json"
    with stx_patch.patched(trace=trace) as report:
        with safetensors.safe_open(one, "pt", backend="pread") as handle:
            name = handle.keys()[0]
            handle.get_tensor(name)
            handle.get_slice(name)[10:20]
    found = Loaded(trace)
    assert {"plain"} <= {read["engine"] for read in found.of("read")}
    assert 40 in [read["bytes_read"] for read in found.of("read")]
    assert found.sum("bytes_read") == report.bytes_read


def test_loads_of_many_threads(folder, tmp_path):
    trace = tmp_path / "trace.json"
    paths = [folder / f"part-{n % 2}.safetensors" for n in range(16)]
    with stx_patch.patched(trace=trace) as report, ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda path: safetensors.torch.load_file(path, backend="pread"), paths))
    found = Loaded(trace)
    assert len(found.of("load")) == 16 and found.sum("bytes_read") == report.bytes_read


def test_bytes(one, tmp_path):
    trace = tmp_path / "trace.json"
    with stx_patch.patched(trace=trace):
        safetensors.torch.load(one.read_bytes())
    (load,) = Loaded(trace).of("load")
    assert load["way"] == "bytes" and load["bytes"] == one.stat().st_size


def test_copies_to_a_device(one, tmp_path, monkeypatch):
    trace = tmp_path / "trace.json"
    fake_library()
    monkeypatch.setattr(_device, "cuda", FakeCuda())
    set_faults()
    try:
        with stx_patch.patched(trace=trace) as report:
            safetensors.torch.load_file(one, device="cuda:0")
    finally:
        set_faults(delay_us="0")
    found = Loaded(trace)
    assert report.bytes_to_device == 4 * MIB
    for name in ("copy", "device copy"):
        assert found.sum("bytes", name) == report.bytes_to_device
        assert {copy["device"] for copy in found.of(name)} == {"cuda"}
    assert "device" in [wait["for"] for wait in found.of("wait")]
    assert [load["way"] for load in found.of("load")] == ["device"]
    assert found.sum("bytes_read") == report.bytes_read


def test_a_device_that_fails(one, tmp_path, monkeypatch):
    trace = tmp_path / "trace.json"
    fake_library()
    monkeypatch.setattr(_device, "cuda", FakeCuda())
    set_faults(fail_all="cudaMemcpyAsync")
    try:
        with stx_patch.patched(trace=trace), pytest.raises(RuntimeError, match="CUDA error"):
            safetensors.torch.load_file(one, device="cuda:0")
    finally:
        set_faults(delay_us="0")
    found = Loaded(trace)
    (error,) = found.of("error")
    assert error["kind"] == "device" and "cudaMemcpyAsync" in error["message"]
    assert [load["failed"] for load in found.of("load")] == [1]


# --- what went wrong, or elsewhere ---


def test_hand_overs_and_their_reasons(one, tmp_path):
    trace = tmp_path / "trace.json"
    with stx_patch.patched(trace=trace) as report:
        safetensors.safe_open(one, "np").keys()
        safetensors.safe_open(one, "np").keys()
        with pytest.raises(Exception):  # noqa: B017, it is stock's own
            safetensors.safe_open(one, "\udc80")
        with pytest.raises(FileNotFoundError):
            safetensors.safe_open(tmp_path / "missing", "pt")
    found = Loaded(trace)
    reasons = [arguments.get("reason") for arguments in found.of("to stock")]
    assert reasons == ["framework np", "framework np", "file refused (io)"]
    assert sum(report.fallbacks.values()) == 4  # one of them has a name that is no text
    (error,) = found.of("error")
    assert error["kind"] == "io" and error["file"] == str(tmp_path / "missing")
    assert error["errno"] == 2 and "No such file" in error["message"]


def test_a_file_that_is_refused(tmp_path):
    trace, path = tmp_path / "trace.json", tmp_path / "bad.safetensors"
    path.write_bytes(b"\x08\0\0\0\0\0\0\0notjson!")
    with stx_patch.patched(trace=trace), pytest.raises(safetensors.SafetensorError):
        safetensors.torch.load_file(path)
    (error,) = Loaded(trace).of("error")
    assert error["kind"] == "format" and error["file"] == str(path)


def test_a_file_that_was_cut(tmp_path):
    trace, path = tmp_path / "trace.json", tmp_path / "cut.safetensors"
    safetensors.torch.save_file({f"w.{n}": torch.ones(MIB) for n in range(4)}, path)
    with stx_patch.patched(trace=trace) as report:
        with safetensors.safe_open(path, "pt", backend="pread") as handle:
            os.truncate(path, 5 * MIB)
            with pytest.raises(safetensors.SafetensorError):
                handle.get_tensors()
    found = Loaded(trace)
    (error,) = found.of("error")
    assert error["kind"] == "io" and error["offset"] >= 5 * MIB and "truncated" in error["message"]
    assert [load["failed"] for load in found.of("load")] == [1]
    assert [engine["failed"] for engine in found.of("engine")] == [1]
    assert found.sum("bytes_read") == report.bytes_read


def test_a_load_that_was_stopped(one, tmp_path):
    trace = tmp_path / "trace.json"

    def stop(done_bytes, total_bytes):
        raise KeyboardInterrupt

    with stx_patch.patched(trace=trace, progress=stop), pytest.raises(KeyboardInterrupt):
        safetensors.torch.load_file(one, backend="pread")
    found = Loaded(trace)
    assert [load["failed"] for load in found.of("load")] == [1]
    assert found.others["options"]["progress"] == "callable"


def test_no_more_than_the_ring_holds(tmp_path):
    trace = tmp_path / "trace.json"
    with stx_patch.patched(trace=trace):
        for number in range(RECORDS + 500):
            _C.trace_fallback("the first" if number < 500 else "the others")
    found = Loaded(trace)
    assert found.others["lost_records"] == 500
    assert [each["reason"] for each in found.of("to stock")] == ["the others"] * RECORDS


def test_a_trace_holds_no_contents(tmp_path):
    trace, path = tmp_path / "trace.json", tmp_path / "secret.safetensors"
    secret = b"what nobody is to know, sixty-four bytes of it, and no byte more"
    safetensors.torch.save_file({"s": torch.frombuffer(bytearray(secret), dtype=torch.uint8)}, path)
    with stx_patch.patched(trace=trace):
        safetensors.torch.load_file(path, backend="pread")
        safetensors.torch.load(path.read_bytes())
    assert b"nobody" not in trace.read_bytes() and b"secret.safetensors" in trace.read_bytes()


# --- blocks ---


def test_a_block_within_another(folder, tmp_path):
    outer, inner = tmp_path / "outer.json", tmp_path / "inner.json"
    first, second, third = "part-0.safetensors", "part-1.safetensors", "missing"
    with stx_patch.patched(trace=outer):
        safetensors.torch.load_file(folder / first)
        with stx_patch.patched(trace=inner):
            safetensors.torch.load_file(folder / second)
        assert inner.exists() and not outer.exists()
        with pytest.raises(FileNotFoundError):
            safetensors.torch.load_file(folder / third)
    inside, whole = Loaded(inner), Loaded(outer)
    assert inside.files("open") == {second} and inside.of("error") == []
    assert whole.files("open") == {first, second} and len(whole.of("error")) == 1
    times = [event["ts"] for event in whole.events]
    assert {event["ts"] for event in inside.events} <= set(times)


def test_blocks_that_overlap(folder, tmp_path):
    """As those of two threads may."""
    left, right = tmp_path / "left.json", tmp_path / "right.json"
    first, second = stx_patch.patched(trace=left), stx_patch.patched(trace=right)
    first.__enter__()
    safetensors.torch.load_file(folder / "part-0.safetensors")
    second.__enter__()
    first.__exit__(None, None, None)
    safetensors.torch.load_file(folder / "part-1.safetensors")
    second.__exit__(None, None, None)
    assert Loaded(left).files("open") == {"part-0.safetensors"}
    assert Loaded(right).files("open") == {"part-1.safetensors"}


def test_a_block_that_raises_is_written(one, tmp_path):
    trace = tmp_path / "trace.json"
    with pytest.raises(ZeroDivisionError), stx_patch.patched(trace=trace):
        safetensors.torch.load_file(one)
        _ = 1 / 0
    assert len(Loaded(trace).of("open")) == 1


def test_a_program_without_arguments(one, tmp_path, monkeypatch):
    """As embedded interpreters have it."""
    monkeypatch.setattr(sys, "argv", [])
    with stx_patch.patched(trace=tmp_path / "t.json"):
        stx_patch.load_file(one)
    assert json.loads((tmp_path / "t.json").read_text())["traceEvents"]


def test_another_block_ends_where_one_begins(one, tmp_path, monkeypatch):
    """A finaliser may end it in the middle of that: the recorder goes on."""
    first = stx_patch.patched(trace=tmp_path / "first.json")
    first.__enter__()
    make = _trace.Recording

    def end_the_other(*arguments):
        recording = make(*arguments)
        first.__exit__(None, None, None)
        return recording

    monkeypatch.setattr(_trace, "Recording", end_the_other)
    with stx_patch.patched(trace=tmp_path / "second.json"):
        monkeypatch.undo()
        stx_patch.load_file(one)
    events = json.loads((tmp_path / "second.json").read_text())["traceEvents"]
    assert "open" in {event["name"] for event in events}


def test_a_block_replaces_its_file(one, tmp_path, monkeypatch):
    trace = tmp_path / "trace.json"
    trace.write_text("of before")
    monkeypatch.chdir(tmp_path)
    with stx_patch.patched(trace="trace.json"):
        monkeypatch.chdir(one.parent)
        safetensors.torch.load_file(one)
    assert len(Loaded(trace).of("open")) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["trace.json"]


def test_nothing_is_recorded_without_a_block(one, tmp_path):
    safetensors.torch.load_file(one)
    with stx_patch.patched(trace=tmp_path / "trace.json"):
        pass
    assert Loaded(tmp_path / "trace.json").events == []
    with stx_patch.patched():
        safetensors.torch.load_file(one)
    assert _C.trace_events(0)[0] == []


def test_what_is_no_path(tmp_path):
    with pytest.raises(TypeError, match="trace must be"), stx_patch.patched(trace=b"bytes"):
        pass
    with pytest.raises(TypeError), stx_patch.patched(trace=7):
        pass
    with pytest.raises(TypeError, match="trace"):
        stx_patch.patch(trace=tmp_path / "trace.json")
    assert not stx_patch.is_patched()


# --- files that cannot be written ---


def test_one_warning_where_it_cannot_be_written(one, tmp_path):
    with pytest.warns(StxWarning, match=r"no trace is written to .*/missing/trace.json") as caught:
        with stx_patch.patched(trace=tmp_path / "missing" / "trace.json"):
            assert len(safetensors.torch.load_file(one)) == 4
    assert len(caught) == 1 and caught[0].filename == __file__
    with pytest.warns(StxWarning, match="no trace is written"):
        with stx_patch.patched(trace=tmp_path):
            pass
    with pytest.warns(StxWarning, match="no trace is written"):
        with stx_patch.patched(trace="a\0b"):
            pass
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk(one, tmp_path):
    """A limit on the size of files stops writing in the middle."""
    run_python(
        """
        import resource, sys, warnings
        import stx_patch
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            with stx_patch.patched(trace=sys.argv[2]):
                tensors = stx_patch.load_file(sys.argv[1])
                resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
        assert len(tensors) == 4
        (warning,) = caught
        assert warning.category is stx_patch.StxWarning and "File too large" in str(warning.message)
        """,
        one,
        tmp_path / "trace.json",
    )
    assert list(tmp_path.iterdir()) == []


def test_without_the_core_nothing_is_recorded(one, tmp_path, monkeypatch):
    monkeypatch.setattr(_native, "core", None)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with stx_patch.patched(trace=tmp_path / "trace.json"):
            assert len(safetensors.torch.load_file(one)) == 4
    assert any("no trace is written" in str(warning.message) for warning in caught)
    assert list(tmp_path.iterdir()) == []


# --- processes ---

LOAD = """
import sys
import stx_patch
assert len(stx_patch.load_file(sys.argv[1])) == 4
"""


def traced(path):
    return {"STX_PATCH_TRACE": str(path)}


def test_a_process_whose_environment_says_so(one, tmp_path):
    trace = tmp_path / "trace.json"
    run_python(LOAD, one, env=traced(trace))
    assert len(Loaded(trace).of("open")) == 1
    first = trace.read_bytes()
    run_python(LOAD, one, env=traced(trace))  # never in the place of another's
    assert trace.read_bytes() == first
    (other,) = set(tmp_path.iterdir()) - {trace}
    assert other.name.startswith("trace.") and other.suffix == ".json"
    (process,) = {event["pid"] for event in Loaded(other).events}
    assert other.name == f"trace.{process}.json"


def test_a_process_that_is_patched(one, tmp_path):
    code = """
    import sys
    import stx_patch.auto
    import safetensors.torch
    safetensors.torch.load_file(sys.argv[1])
    with stx_patch.patched(trace=sys.argv[2]):
        safetensors.torch.load_file(sys.argv[1], backend="pread")
    """
    whole, block = tmp_path / "whole", tmp_path / "block.json"
    run_python(code, one, block, env=traced(whole))
    assert [load["way"] for load in Loaded(whole).of("load")] == ["mapped", "owned"]
    assert [load["way"] for load in Loaded(block).of("load")] == ["owned"]


def test_a_process_that_opens_nothing_writes_nothing(tmp_path):
    code = "import stx_patch.auto, stx_patch._trace as t\nassert t._process is not None"
    run_python(code, env=traced(tmp_path / "trace.json"))
    code = "import stx_patch, stx_patch._trace as t\nassert t._process is None"
    run_python(code, env=traced(tmp_path / "trace.json"))
    off = {"STX_PATCH": "0", **traced(tmp_path / "trace.json")}
    run_python("import stx_patch.auto, stx_patch._trace as t\nassert t._process is None", env=off)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("target", ["", "missing/trace.json"])
def test_a_process_that_cannot_write(one, tmp_path, target):
    shown = "lambda message, category, *_: print(category.__name__, message)"
    code = f"import warnings\nwarnings.showwarning = {shown}\n{LOAD}"
    path = tmp_path / target
    said = run_python(code, one, env=traced(path), expect_output=None)
    assert said.startswith(f"StxWarning no trace is written to {path}:") and said.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_child_has_its_own_file(one, tmp_path):
    """Forked, or made by multiprocessing, which ends its children without atexit."""
    trace = tmp_path / "trace.json"
    code = """
    import multiprocessing, os, sys
    import stx_patch
    def load():
        assert len(stx_patch.load_file(sys.argv[1], backend="pread")) == 4
    stx_patch.load_file(sys.argv[1])
    process = multiprocessing.get_context("fork").Process(target=load)
    process.start()
    process.join()
    assert process.exitcode == 0
    child = os.fork()
    if child == 0:
        load()
        sys.exit(0)
    assert os.waitpid(child, 0)[1] == 0
    print(process.pid, child)
    """
    printed = run_python(code, one, env=traced(trace), expect_output=None)
    children = [f"trace.{pid}.json" for pid in printed.split()]
    assert {path.name for path in tmp_path.iterdir()} == {"trace.json", *children}
    assert [load["way"] for load in Loaded(trace).of("load")] == ["mapped"]
    for child in children:
        found = Loaded(tmp_path / child)
        assert [load["way"] for load in found.of("load")] == ["owned"]
        assert len({event["pid"] for event in found.events}) == 1


def test_a_child_of_a_block_writes_nothing(one, tmp_path):
    trace, late = tmp_path / "trace.json", tmp_path / "late.json"
    block = stx_patch.patched(trace=trace)
    block.__enter__()
    safetensors.torch.load_file(one)

    def leave():
        safetensors.torch.load_file(one)
        block.__exit__(None, None, None)
        assert not trace.exists()
        with stx_patch.patched(trace=late):
            safetensors.torch.load_file(one)

    assert in_a_child(leave) == 0
    assert len(Loaded(late).of("open")) == 1
    block.__exit__(None, None, None)
    assert len(Loaded(trace).of("open")) == 1
