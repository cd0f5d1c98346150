"""The counters tell what was served natively, what went to stock and why, and what a filter kept;
reports of blocks count their block, and stand still after it."""

import dataclasses
import gc
import os
import pickle
import threading

import pytest
import safetensors
import safetensors.numpy
import safetensors.torch
from patch_helpers import (
    STOCK,
    drop_from_cache,
    floats,
    leaves_stock,  # noqa: F401
    settle,
    write_raw,
)

import stx_patch
from stx_patch import Stats

ENTRIES = [
    ("w.0", "F32", (3,), floats(1, 2, 3)),
    ("w.1", "F32", (1, 2), floats(4, 5)),
    ("empty", "U8", (0, 4), b""),
    ("byte", "U8", (), b"\1"),
]
ORDER = [name for name, _, _, _ in ENTRIES]
TOTAL_BYTES = sum(len(data) for _, _, _, data in ENTRIES)

# Two of one name, which our core leaves to stock.
TWICE = b'"v":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}'
REFUSED = "file refused (format)"

# What adds up; the rest are dicts and what was found last.
COUNTERS = [
    field.name
    for field in dataclasses.fields(Stats)
    if field.name not in ("fallbacks", "seconds", "engine", "engine_reason")
]
PHASES = {"header", "filter", "plan", "read", "wrap"}


@pytest.fixture(autouse=True)
def from_zero():
    stx_patch.reset_stats()


@pytest.fixture
def path(tmp_path):
    return write_raw(tmp_path / "counted.safetensors", ENTRIES, metadata={"a": "b"})


@pytest.fixture
def double(tmp_path):
    """A file that only stock serves."""
    header = b"{" + TWICE + b"," + TWICE + b"}"
    path = tmp_path / "double.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + b"x")
    return path


def changes(stats):
    """The counters that are not zero, without those of the page cache, of requests and of time, and
    without what was found last."""
    left_out = {
        "seconds",
        "engine",
        "engine_reason",
        "files_cold",
        "files_warm",
        "files_unknown",
        "bytes_read",
        "requests",
        "bytes_over_read",
    }
    return {
        name: value for name, value in stats.as_dict().items() if value and name not in left_out
    }


# --- what it is ---


def test_stats_is_a_frozen_dataclass():
    stats = stx_patch.stats()
    assert type(stats) is Stats and dataclasses.is_dataclass(stats)
    with pytest.raises(dataclasses.FrozenInstanceError):
        stats.opens = 1
    with pytest.raises(dataclasses.FrozenInstanceError):
        stats.something = 1
    assert stats == stx_patch.stats()
    assert pickle.loads(pickle.dumps(stats)) == stats
    assert "opens=0" in repr(stats)


def test_as_dict_has_every_counter(path):
    with stx_patch.patched():
        safetensors.torch.load_file(path)
    stats = stx_patch.stats()
    assert stats.as_dict() == dataclasses.asdict(stats) == vars(stats)
    assert list(stats.as_dict()) == [field.name for field in dataclasses.fields(Stats)]
    for name in COUNTERS:
        assert type(stats.as_dict()[name]) is int, name
    assert set(stats.seconds) == PHASES
    assert all(type(value) is float and value >= 0 for value in stats.seconds.values())
    stats.as_dict()["fallbacks"]["made up"] = 1
    stats.fallbacks["made up"] = 1
    assert stx_patch.stats().fallbacks == {}


def test_a_copy_does_not_move(path):
    before = stx_patch.stats()
    with stx_patch.patched():
        safetensors.torch.load_file(path)
    assert before.opens == 0 and before.seconds["header"] == 0
    assert stx_patch.stats().opens == 1


def test_everything_starts_at_zero():
    assert changes(stx_patch.stats()) == {}
    stats = stx_patch.stats().as_dict()
    assert stats.pop("fallbacks") == {}
    seconds = stats.pop("seconds")
    assert set(seconds) == PHASES and set(seconds.values()) == {0.0}
    stats.pop("engine"), stats.pop("engine_reason")  # of the last load, whenever that was
    assert set(stats.values()) == {0}


# --- native loads ---


def test_a_native_load_file(path):
    with stx_patch.patched():
        tensors = safetensors.torch.load_file(path)
    assert changes(stx_patch.stats()) == {
        "opens": 1,
        "tensors_native": len(ENTRIES),
        "keys_kept": len(ENTRIES),
        "bytes_kept": TOTAL_BYTES,
        "bytes_wanted": TOTAL_BYTES,
    }
    stats = stx_patch.stats()
    assert stats.bytes_read == path.stat().st_size  # the header's read takes all of a small file
    assert stats.requests == 1
    assert (stats.files_cold, stats.files_warm + stats.files_unknown) == (0, 1)
    assert stats.seconds["header"] > 0 and stats.seconds["wrap"] > 0
    assert len(tensors) == len(ENTRIES)


def test_a_native_handle_counts_what_is_made(path):
    with stx_patch.patched():
        handle = safetensors.safe_open(path, "pt")
        opened = {"opens": 1, "keys_kept": 4, "bytes_kept": TOTAL_BYTES}
        handle.keys(), handle.offset_keys(), handle.metadata()
        handle.get_slice("w.0").get_shape()
        assert changes(stx_patch.stats()) == opened
        handle.get_tensor("w.0")
        assert changes(stx_patch.stats()) == {**opened, "tensors_native": 1, "bytes_wanted": 12}
        handle.get_tensor("w.0")  # again is made again
        handle.get_tensor("empty")
        assert changes(stx_patch.stats()) == {**opened, "tensors_native": 3, "bytes_wanted": 24}
        handle.get_slice("w.1")[0]
        stats = stx_patch.stats()
        assert stats.tensors_native == 4 and stats.fallbacks == {}
        with pytest.raises(safetensors.SafetensorError):
            handle.get_tensor("missing")
        assert stx_patch.stats().tensors_native == 4
    # A handle of a block that has ended is counted on.
    handle.get_tensor("byte")
    assert stx_patch.stats().tensors_native == 5


def test_our_own_functions_are_counted_without_a_patch(path):
    stx_patch.load_file(path)
    stx_patch.safe_open(path).get_tensors()
    stats = stx_patch.stats()
    assert (stats.opens, stats.tensors_native, stats.fallbacks) == (2, 8, {})


def test_stock_without_a_patch_is_not_counted(path):
    safetensors.torch.load_file(path)
    safetensors.safe_open(path, "pt").get_tensors()
    safetensors.torch.load(path.read_bytes())
    assert changes(stx_patch.stats()) == {}


def test_what_a_filter_kept_and_skipped(path):
    with stx_patch.patched("w.*"):
        safetensors.torch.load_file(path)
    assert changes(stx_patch.stats()) == {
        "opens": 1,
        "tensors_native": 2,
        "keys_kept": 2,
        "keys_skipped": 2,
        "bytes_kept": 20,
        "bytes_skipped": 1,
        "bytes_wanted": 20,
    }
    assert stx_patch.stats().seconds["filter"] > 0
    with stx_patch.patched([]):
        safetensors.torch.load_file(path)
    stats = stx_patch.stats()
    assert (stats.keys_kept, stats.keys_skipped) == (2, 6)
    assert (stats.bytes_kept, stats.bytes_skipped) == (20, 1 + TOTAL_BYTES)


def test_a_filtered_file_is_found_cold_or_warm(tmp_path):
    part = 1 << 20
    entries = [("w", "U8", (part,), bytes(part)), ("x", "U8", (part,), bytes(part))]
    path = write_raw(tmp_path / "large.safetensors", entries)
    path.read_bytes()
    stx_patch.load_file(path, tensor_filter={"w"})
    stats = stx_patch.stats()
    if stats.files_unknown == 1:
        assert not tells_residency()
        return
    assert (stats.files_cold, stats.files_warm) == (0, 1)
    if drop_from_cache(path):
        tensors = stx_patch.load_file(path, tensor_filter={"w"})
        settle()
        stats = stx_patch.stats()
        assert (stats.files_cold, stats.files_warm) == (1, 1)
        assert part <= stats.bytes_read <= 1.2 * part
        del tensors  # nobody is read for who has nothing


def tells_residency():
    """Whether the kernel has cachestat, which answers to whoever may write the file."""
    return tuple(map(int, os.uname().release.split("-")[0].split(".")[:2])) >= (6, 5)


# --- reads into memory of our own ---


def owned(path, **keywords):
    """What a load with backend="pread" adds."""
    before = stx_patch.stats()
    tensors = stx_patch.load_file(path, backend="pread", **keywords)
    return tensors, stx_patch.stats() - before


def test_a_small_load_into_memory_of_our_own(path):
    """It is counted like any other; no engine is worth its while."""
    tensors, made = owned(path)
    assert changes(made) == {
        "opens": 1,
        "tensors_native": len(ENTRIES),
        "keys_kept": len(ENTRIES),
        "bytes_kept": TOTAL_BYTES,
        "bytes_wanted": TOTAL_BYTES,
        "loads_buffered": 1,
    }
    assert made.seconds["read"] > 0 and made.seconds["wrap"] > 0
    # The header's read takes all of a small file; the tensors are read again into their memory.
    assert made.bytes_read == path.stat().st_size + TOTAL_BYTES and made.requests == 2
    assert made.bytes_over_read == 0
    assert len(tensors) == len(ENTRIES)


def test_handles_and_slices_into_memory_of_our_own(path):
    handle = stx_patch.safe_open(path, backend="pread")
    before = stx_patch.stats()
    handle.get_tensor("w.0")
    handle.get_tensor("w.0")
    made = stx_patch.stats() - before
    assert (made.tensors_native, made.bytes_wanted, made.bytes_read, made.requests) == (
        2,
        24,
        24,
        2,
    )
    assert made.loads_buffered == 2
    handle.get_slice("w.0")[1:]
    made = stx_patch.stats() - before
    assert (made.tensors_native, made.bytes_read, made.requests) == (3, 32, 3)
    assert made.fallbacks == {}


@pytest.mark.parametrize("engine", ["uring", "threads"])
def test_what_read_and_why_not_better(tmp_path, engine):
    size_bytes = 3 << 20
    path = write_raw(tmp_path / "large", [("w", "U8", (size_bytes,), bytes(size_bytes))])
    _, made = owned(path, engine=engine, direct_io="on")
    assert (made.engine, made.engine_reason) == (engine, None)
    assert (made.loads_direct, made.loads_buffered, made.retries) == (1, 0, 0)
    assert size_bytes <= made.bytes_read <= size_bytes + (1 << 20) and made.requests >= 4
    _, made = owned(path, engine=engine, direct_io="off")
    assert (made.engine, made.engine_reason) == (engine, "direct_io is off")
    assert (made.loads_direct, made.loads_buffered) == (0, 1)
    assert made.seconds["read"] > 0
    found, made = owned(path, engine=engine)
    if made.files_unknown:
        assert not tells_residency()
    else:
        assert made.engine_reason == "in the page cache" and made.files_warm == 1
        if drop_from_cache(path):
            _, made = owned(path, engine=engine)
            assert (made.files_cold, made.loads_direct, made.engine_reason) == (1, 1, None)
    # What was found last stays, through resets and loads that need no engine.
    stx_patch.reset_stats()
    assert stx_patch.stats().engine == engine
    with stx_patch.patched() as report:
        assert report.engine == engine
    del found


# --- hand-overs ---

FALLBACKS = {
    "framework np": lambda path: safetensors.safe_open(path, "np"),
    "framework numpy": lambda path: safetensors.safe_open(path, framework="numpy"),
    "device cuda:0": lambda path: safetensors.safe_open(path, "pt", device="cuda:0"),
    "device 0": lambda path: safetensors.safe_open(path, "pt", 0, backend="pread"),
    "load(bytes)": lambda path: safetensors.numpy.load(path.read_bytes()),
}


@pytest.mark.parametrize("reason", FALLBACKS)
def test_a_hand_over_is_counted_with_its_reason(path, reason):
    with stx_patch.patched() as report:
        FALLBACKS[reason](path)
        FALLBACKS[reason](path)
    assert report.fallbacks == {reason: 2}
    assert (report.opens, report.tensors_native, report.keys_kept) == (0, 0, 0)


FAILING = {
    "missing": lambda path: safetensors.safe_open(str(path) + ".missing", "pt"),
    "folder": lambda path: safetensors.torch.load_file(path.parent),
    "framework": lambda path: safetensors.safe_open(path, "no such framework"),
    "device": lambda path: safetensors.torch.load_file(path, device="no such device"),
    "backend": lambda path: safetensors.torch.load_file(path, backend="no such backend"),
    "filename": lambda path: safetensors.torch.load_file(3),
    "keyword": lambda path: safetensors.safe_open(path, "pt", no_such_keyword=1),
    "nothing": lambda path: safetensors.safe_open(),
    "truncated": lambda path: safetensors.torch.load_file(truncate(path)),
}


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1])
    return path


@pytest.mark.parametrize("call", FAILING)
def test_a_call_that_fails_is_handed_over_once(path, call):
    with stx_patch.patched() as report, pytest.raises(Exception) as caught:
        FAILING[call](path)
    assert not isinstance(caught.value, AssertionError)
    assert sum(report.fallbacks.values()) == 1
    (reason,) = report.fallbacks
    assert isinstance(reason, str) and reason
    assert report.opens == report.tensors_native == report.tensors_stock == 0


def test_stocks_tensors_are_counted_where_we_pass_them_on(path, double):
    with stx_patch.patched() as report:
        safetensors.torch.load_file(double)
        assert report.tensors_stock == 1
        safetensors.torch.load_file(double, backend="pread")
        assert report.tensors_stock == 2
        safetensors.numpy.load(path.read_bytes())
        assert report.tensors_stock == 6
    with stx_patch.patched(["w.*", "v"]) as report:
        safetensors.torch.load_file(double, backend="pread")
        safetensors.numpy.load(path.read_bytes())
        safetensors.numpy.load_file(path)
        assert report.tensors_stock == 5
        handle = safetensors.safe_open(path, "np")
        handle.get_tensor("w.0")
        assert report.tensors_stock == 6
    assert report.tensors_native == 0
    # A filter in Python counts what it keeps like the core does.
    assert report.fallbacks == {REFUSED: 1, "load(bytes)": 1, "framework np": 2}


def test_a_tensor_that_only_stock_makes_is_counted(tmp_path):
    path = write_raw(
        tmp_path / "six.safetensors", [("six", "F6_E2M3", (4,), bytes(3)), ("u", "U8", (), b"\1")]
    )
    with stx_patch.patched() as report:
        handle = safetensors.safe_open(path, "pt")
        assert report.fallbacks == {} and report.opens == 1
        with pytest.raises((safetensors.SafetensorError, AttributeError)):
            handle.get_tensor("six")  # no dtype of torch's
        assert report.fallbacks == {"tensor": 1}
        handle.get_tensor("u")
    assert report.fallbacks == {"tensor": 1} and report.tensors_native == 1


def test_an_unknown_method_is_counted_with_its_name(path):
    with stx_patch.patched() as report:
        handle = safetensors.safe_open(path, "pt")
        assert not hasattr(handle, "no_such_method")
    assert report.fallbacks == {}


# --- reset_stats and reports ---


def test_reset_counts_from_here(path, double):
    with stx_patch.patched():
        safetensors.torch.load_file(path)
        safetensors.torch.load_file(double)
        stx_patch.reset_stats()
        assert changes(stx_patch.stats()) == {} and stx_patch.stats().fallbacks == {}
        safetensors.torch.load_file(path)
        stats = stx_patch.stats()
        assert (stats.opens, stats.fallbacks) == (1, {})
        safetensors.torch.load_file(double)
        assert stx_patch.stats().fallbacks == {REFUSED: 1}


def test_reset_does_not_touch_a_running_report(path):
    with stx_patch.patched() as report:
        safetensors.torch.load_file(path)
        stx_patch.reset_stats()
        assert report.opens == 1
        safetensors.torch.load_file(path)
        assert report.opens == 2 and stx_patch.stats().opens == 1
    stx_patch.reset_stats()
    assert report.opens == 2


def test_a_report_is_live_and_then_stands_still(path, double):
    with stx_patch.patched("w.*") as report:
        assert report.opens == 0 and report.stats() == report.stats()
        safetensors.torch.load_file(path)
        assert (report.opens, report.keys_kept, report.keys_skipped) == (1, 2, 2)
        safetensors.torch.load_file(double)
        assert report.fallbacks == {REFUSED: 1}
        handle = safetensors.safe_open(path, "pt")
    frozen = report.stats()
    handle.get_tensor("w.0")
    stx_patch.load_file(path, backend="pread")
    with stx_patch.patched():
        safetensors.torch.load_file(path)
    assert report.stats() == frozen and type(frozen) is Stats
    assert report.as_dict() == frozen.as_dict()
    assert (report.opens, report.tensors_native) == (2, 2)
    for field in dataclasses.fields(Stats):
        assert getattr(report, field.name) == getattr(frozen, field.name)
    assert repr(report) == repr(frozen)


def test_a_report_has_what_stats_have_and_nothing_else():
    with stx_patch.patched() as report:
        with pytest.raises(AttributeError):
            _ = report.no_such_counter
        with pytest.raises(AttributeError):
            _ = report._no_such_attribute


def test_reports_of_nested_blocks(path):
    with stx_patch.patched() as outer:
        safetensors.torch.load_file(path)
        with stx_patch.patched("w.*") as inner:
            safetensors.torch.load_file(path)
            assert (outer.opens, inner.opens) == (2, 1)
        safetensors.torch.load_file(path)
        assert (outer.opens, inner.opens) == (3, 1)
    assert (outer.keys_kept, inner.keys_kept) == (10, 2)
    assert (outer.keys_skipped, inner.keys_skipped) == (2, 2)
    assert stx_patch.stats().opens == 3


def test_reports_of_overlapping_blocks(path):
    first, second = stx_patch.patched(), stx_patch.patched()
    first_report = first.__enter__()
    safetensors.torch.load_file(path)
    second_report = second.__enter__()
    safetensors.torch.load_file(path)
    first.__exit__(None, None, None)
    safetensors.torch.load_file(path)
    second.__exit__(None, None, None)
    stx_patch.load_file(path)
    assert (first_report.opens, second_report.opens) == (2, 2)
    assert stx_patch.stats().opens == 4


def test_a_report_counts_what_all_threads_do(path):
    with stx_patch.patched() as report:
        threads = [
            threading.Thread(
                target=lambda: [
                    (safetensors.torch.load_file(path), safetensors.safe_open(path, "np"))
                    for _ in range(25)
                ]
            )
            for _ in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    assert (report.opens, report.tensors_native) == (100, 400)
    assert report.fallbacks == {"framework np": 100}


def test_a_block_that_fails_has_a_report(path):
    with pytest.raises(ValueError), stx_patch.patched() as report:
        safetensors.torch.load_file(path)
        raise ValueError
    safetensors.torch.load_file(path)
    stx_patch.load_file(path)
    assert report.opens == 1


def test_counters_only_grow(path, double):
    before = stx_patch.stats()
    with stx_patch.patched("w.*"):
        for _ in range(3):
            safetensors.torch.load_file(path)
            safetensors.torch.load_file(path, backend="pread")
            safetensors.torch.load_file(double)
            now = stx_patch.stats()
            assert all(getattr(now, name) >= getattr(before, name) for name in COUNTERS)
            before = now
    gc.collect()
    after = stx_patch.stats()
    assert after == before  # freeing tensors counts nothing


def test_differences(path, double):
    safetensors.torch.load_file(path)
    zero = Stats()
    assert zero - zero == zero
    with stx_patch.patched():
        safetensors.torch.load_file(path)
        first = stx_patch.stats()
        safetensors.torch.load_file(double)
        second = stx_patch.stats()
    difference = second - first
    assert (difference.opens, difference.fallbacks) == (0, {REFUSED: 1})
    assert type(STOCK.safe_open(path, "pt")) is STOCK.safe_open
