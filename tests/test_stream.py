"""Proves: `tensors()` hands out stock's tensors one after the other in bounded memory, each in
memory of its own, and ends cleanly wherever its consumer, its handle, its file or a signal does."""

import contextlib
import gc
import os
import random
import resource
import signal
import sys
import threading
import time
import weakref
from pathlib import Path

import pytest
import safetensors.torch
import torch
from helpers import DTYPE_BITS, STOCK, facts, in_a_child, outcome, seen, write_raw
from patch_helpers import (
    drop_from_cache,
    leaves_stock,  # noqa: F401
    open_descriptors,
    run_python,
)
from test_owned import as_bytes, write
from test_threads import run_threads
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import stx_patch

KIB, MIB = 1 << 10, 1 << 20
SHAPES = [(), (0,), (3, 0, 2), (1,), (8,), (2, 3, 4), (5, 1, 8), (1, 1, 2), (16, 8)]
OUR_OPENER = stx_patch.safe_open
both = pytest.mark.parametrize("backend", ["mmap", "pread"])
engines = pytest.mark.parametrize("engine", ["uring", "threads"])
direct = pytest.mark.parametrize("direct_io", ["on", "off"])
ways = pytest.mark.parametrize("engine, direct_io", [("uring", "on"), ("threads", "off")])


def ours(path, backend="mmap", **keywords):
    """A handle of ours, which the test fails without."""
    before = stx_patch.stats()
    handle = OUR_OPENER(path, backend=backend, **keywords)
    made = stx_patch.stats() - before
    assert (made.opens, made.fallbacks) == (1, {}), "not native"
    return handle


def stock_pairs(path):
    """What stock gives in memory of its own, in file order."""
    with STOCK.safe_open(path, "pt", backend="pread") as handle:
        return [(name, facts(handle.get_tensor(name))) for name in handle.offset_keys()]


def check_as_stock(path, backend, pairs):
    """Stock's tensors in our handle's order, which is stock's too, but among empty ones at one
    place: their order is by chance there."""
    expected = dict(stock_pairs(path))
    assert dict(pairs) == expected
    assert [name for name, _ in pairs] == ours(path, backend).offset_keys()
    filled = [name for name in expected if expected[name]["bytes"]]
    assert [name for name, found in pairs if found["bytes"]] == filled


def pairs_of(stream):
    """What is left in a stream, each tensor dropped before the next comes."""
    return [(name, facts(tensor)) for name, tensor in stream]


def held():
    """Threads and descriptors of this process."""
    gc.collect()
    return len(os.listdir("/proc/self/task")), open_descriptors()


def is_back_to(before):
    """Whether no more is held than was; a thread that has ended may be listed for a moment."""
    for _ in range(200):
        threads, descriptors = held()
        if threads <= before[0] and descriptors == before[1]:
            return True
        time.sleep(0.01)
    return False


def memory(name="RssAnon"):
    (line,) = [li for li in Path("/proc/self/status").read_text().splitlines() if name + ":" in li]
    return int(line.split()[1]) * KIB


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("stream")


@pytest.fixture(scope="module")
def mixed(folder):
    """About 60 MiB: tensors of odd sizes at odd places, small ones and empty ones between them."""
    generator = random.Random(4)
    entries = [("first none", "F32", [0, 4])]
    for number in range(120):
        kind = number % 6
        size = generator.randint(1, MIB) if kind < 3 else generator.randint(0, 5000)
        entries.append((f"t{number}", ["U8", "I8", "BOOL"][kind % 3], [size]))
    entries += [("large", "BF16", [1024, 3001]), ("scalar", "F64", []), ("last none", "U8", [0])]
    return write(folder / "mixed", entries, shift=5)


@pytest.fixture(scope="module")
def mixed_pairs(mixed):
    return stock_pairs(mixed)


@pytest.fixture(scope="module")
def wide(folder):
    """400 MiB: larger than the window; tensors of 10 MiB, and one of 40."""
    entries = [(f"t{number:02}", "U8", [10 * MIB]) for number in range(18)]
    entries += [("large", "U8", [40 * MIB])]
    entries += [(f"u{number:02}", "U8", [10 * MIB]) for number in range(18)]
    path = folder / "wide"
    yield write(path, entries)
    path.unlink()


# --- the same tensors ---


@both
@pytest.mark.parametrize("shift", [0, 1, 3, 7])
def test_every_dtype_in_many_shapes(tmp_path, backend, shift):
    dtypes = [dtype for dtype in DTYPE_BITS if DTYPE_BITS[dtype] >= 8]
    entries = [(f"{d}{list(shape)}", d, list(shape)) for d in dtypes for shape in SHAPES]
    random.Random(shift).shuffle(entries)
    path = write(tmp_path / "f", entries, shift)
    before = stx_patch.stats()
    pairs = pairs_of(ours(path, backend).tensors())
    made = stx_patch.stats() - before
    assert made.fallbacks == {} and made.tensors_native == len(entries)
    check_as_stock(path, backend, pairs)


@both
@engines
@direct
def test_a_file_of_many_pieces(mixed, mixed_pairs, poisoned, backend, engine, direct_io):
    how = {"engine": engine, "direct_io": direct_io}
    for inflight_bytes in ("auto", "1MiB", 4096, 1):
        handle = ours(mixed, backend, inflight_bytes=inflight_bytes, **how)
        before = stx_patch.stats()
        assert pairs_of(handle.tensors()) == mixed_pairs
        assert dict(pairs_of(handle.tensors())) == dict(mixed_pairs), "again"
        made = stx_patch.stats() - before
        assert made.fallbacks == {} and made.tensors_stock == 0
        assert made.tensors_native == 2 * len(mixed_pairs)


@both
def test_what_was_done_is_counted(mixed, mixed_pairs, backend):
    total_bytes = sum(len(found["bytes"]) for _, found in mixed_pairs)
    handle = ours(mixed, backend, engine="threads", direct_io="off")
    for _ in range(20):
        before = stx_patch.stats()
        for _pair in handle.tensors():
            pass
        made = stx_patch.stats() - before
        assert made.bytes_wanted == total_bytes
        assert total_bytes <= made.bytes_read <= total_bytes + 60 * 8192 and made.requests > 1
        assert (made.engine, made.loads_buffered, made.loads_direct) == ("threads", 1, 0)


@both
def test_what_was_read_before_it_was_stopped_is_counted(wide, backend):
    handle = ours(wide, backend)
    before = stx_patch.stats()
    stream = handle.tensors()
    next(stream)
    stream.close()
    made = stx_patch.stats() - before
    assert 10 * MIB <= made.bytes_read <= 200 * MIB


@both
def test_a_cold_file(mixed, mixed_pairs, backend):
    if drop_from_cache(mixed):
        before = stx_patch.stats()
        assert pairs_of(ours(mixed, backend).tensors()) == mixed_pairs
        assert (stx_patch.stats() - before).loads_direct == 1


FILTERS = {
    "one": ["large"],
    "glob": "t1*",
    "callable": lambda key: key.nbytes > 1000 and key.dtype != "U8",
    "small": lambda key: key.nbytes < 100,
    "ends": ["first none", "last none"],
    "second half": lambda key: not key.startswith("t") or int(key[1:]) > 60,
}


@both
@pytest.mark.parametrize("name", FILTERS)
def test_the_filter_holds(mixed, mixed_pairs, poisoned, backend, name):
    handle = ours(mixed, backend, tensor_filter=FILTERS[name], inflight_bytes="1MiB")
    kept = set(handle.offset_keys())
    assert 0 < len(kept) < len(mixed_pairs)
    before = stx_patch.stats()
    assert pairs_of(handle.tensors()) == [pair for pair in mixed_pairs if pair[0] in kept]
    kept_bytes = handle.total_tensor_size
    assert (stx_patch.stats() - before).bytes_read <= kept_bytes + len(kept) * 3 * 4096


@both
@pytest.mark.parametrize(
    "entries",
    [
        [],
        [("a", "F32", [0])],
        [("a", "F32", [0, 3]), ("b", "BF16", [2, 0]), ("c", "I8", [0])],
        [("a", "F32", [])],
        [("a", "F32", [0]), ("b", "U8", [])],
    ],
    ids=len,
)
def test_next_to_nothing(tmp_path, backend, entries):
    path = write(tmp_path / "f", entries)
    handle = ours(path, backend)
    check_as_stock(path, backend, pairs_of(handle.tensors()))
    stream = handle.tensors()
    assert iter(stream) is stream
    assert len(list(stream)) == len(entries) and list(stream) == [] and next(stream, 7) == 7
    with pytest.warns(stx_patch.StxFilterWarning) if entries else contextlib.nullcontext():
        assert list(ours(path, backend, tensor_filter=[]).tensors()) == []


@both
def test_four_bits_as_stock_maps_them(tmp_path, backend):
    entries = [("a", "U8", [3]), ("x", "F4", [4, 4]), ("y", "F4", [3, 2]), ("z", "F32", [2])]
    path = write(tmp_path / "f", entries)
    with STOCK.safe_open(path, "pt") as handle:
        expected = [(name, facts(handle.get_tensor(name))) for name, _, _ in entries]
    assert pairs_of(ours(path, backend).tensors()) == expected


@both
@pytest.mark.parametrize("dtype", ["F6_E2M3", "F6_E3M2", "F4"])
def test_what_stock_cannot_make_raises_in_its_words(tmp_path, backend, dtype):
    shape = [3] if dtype == "F4" else [4]
    entries = [("a", "U8", [5]), ("x", dtype, shape if dtype != "F4" else [2, 1]), ("z", "U8", [3])]
    path = write(tmp_path / "f", entries)
    stream = ours(path, backend).tensors()
    assert next(stream)[0] == "a"
    with STOCK.safe_open(path, "pt", backend=backend) as handle:
        expected = seen(outcome(handle.get_tensor, "x"))
    assert expected[0] == "error"
    assert outcome(next, stream) == expected
    assert list(stream) == []


class Recording(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


@both
@pytest.mark.parametrize("kind", [Recording, lambda: FlopCounterMode(display=False)])
def test_with_a_dispatch_mode_active_it_is_stocks(sample, backend, kind):
    expected = dict(stock_pairs(sample))
    with kind():
        found = [(name, tensor) for name, tensor in ours(sample, backend).tensors()]
    assert [name for name, _ in found] == list(expected)
    for name, tensor in found:
        assert facts(tensor)["bytes"] == expected[name]["bytes"]
        assert tensor.dtype == expected[name]["dtype"]


def test_a_dispatch_mode_in_the_middle(mixed, mixed_pairs):
    stream = ours(mixed).tensors()
    found = [next(stream) for _ in range(40)]
    with Recording():
        found += [next(stream) for _ in range(40)]
    found += list(stream)
    values = [(name, facts(tensor)["bytes"]) for name, tensor in found]
    assert values == [(name, expected["bytes"]) for name, expected in mixed_pairs]


@both
@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_in_modes_of_torch_as_stock(sample, backend, mode):
    with mode():
        assert pairs_of(ours(sample, backend).tensors()) == stock_pairs(sample)


# --- memory ---


@both
@direct
def test_each_tensor_owns_its_bytes_and_shares_none(mixed, backend, direct_io):
    content = mixed.read_bytes()
    handle = ours(mixed, backend, direct_io=direct_io)
    pairs = [*handle.tensors(), *handle.tensors()]
    for number, (_, tensor) in enumerate(pairs):
        assert tensor.untyped_storage().nbytes() == tensor.nbytes and tensor.storage_offset() == 0
        as_bytes(tensor).fill_(number % 251)
    for number, (_, tensor) in enumerate(pairs):
        assert bool((as_bytes(tensor) == number % 251).all())
    assert mixed.read_bytes() == content


@both
@direct
def test_writing_while_it_reads_on(mixed, mixed_pairs, backend, direct_io):
    """No read comes back to what was handed out, nor takes from it."""
    handle = ours(mixed, backend, direct_io=direct_io, inflight_bytes="1MiB")
    kept = []
    for (name, tensor), expected in zip(handle.tensors(), mixed_pairs, strict=True):
        assert (name, facts(tensor)) == expected
        as_bytes(tensor).fill_(90)
        kept.append(tensor)
    assert all(bool((as_bytes(tensor) == 90).all()) for tensor in kept)


@direct
@pytest.mark.parametrize("seed", range(3))
def test_dropping_some_leaves_the_others_alone(mixed, mixed_pairs, direct_io, seed):
    generator = random.Random(seed)
    kept = {}
    for name, tensor in ours(mixed, direct_io=direct_io, inflight_bytes="4MiB").tensors():
        if generator.random() < 0.4:
            kept[name] = tensor
    del tensor
    for name in random.Random(seed).sample(list(kept), len(kept)):
        del kept[name]
        for other in list(kept)[:: max(1, len(kept) // 3)]:
            assert facts(kept[other]) == dict(mixed_pairs)[other]


PEAK = """
    import sys, threading, time
    from pathlib import Path
    import torch
    torch.set_num_threads(1)
    import stx_patch

    path, backend, direct_io, inflight_bytes, pause = sys.argv[1:]

    def anonymous_bytes():
        text = Path("/proc/self/status").read_text()
        return int(text.split("RssAnon:")[1].split()[0]) * 1024

    handle = stx_patch.safe_open(
        path, backend=backend, direct_io=direct_io, inflight_bytes=inflight_bytes)
    stream = handle.tensors()
    stream.close()
    before, most, count, over = anonymous_bytes(), 0, 0, False

    def watch():
        global most
        while not over:
            most = max(most, anonymous_bytes())
            time.sleep(0.001)

    watcher = threading.Thread(target=watch)
    watcher.start()
    for name, tensor in handle.tensors():
        if float(pause) and count < 4:
            time.sleep(float(pause))
        assert tensor[0] >= 0 and tensor[-1] >= 0
        most = max(most, anonymous_bytes())
        count += 1
        del tensor
    over = True
    watcher.join()
    assert count == 37
    print(most - before)
"""


@pytest.mark.parametrize("inflight_bytes, window", [("auto", 128 * MIB), ("4MiB", 16 * MIB)])
@pytest.mark.parametrize("direct_io, pause", [("off", "0"), ("on", "0.1")])
def test_a_consumer_that_drops_each_holds_the_window(
    wide, inflight_bytes, window, direct_io, pause
):
    arguments = [wide, "mmap", direct_io, inflight_bytes, pause]
    most_bytes = int(run_python(PEAK, *arguments, expect_output=None))
    assert most_bytes <= window + 40 * MIB + 32 * MIB


@both
def test_a_consumer_that_keeps_all_holds_all(wide, backend):
    before = memory()
    kept = dict(ours(wide, backend).tensors())
    total_bytes = 400 * MIB
    assert total_bytes <= memory() - before <= total_bytes + 16 * MIB
    expected = 0
    for number, name in enumerate(list(kept)):
        expected += kept[name].nbytes
        del kept[name]
        if number % 6 == 0:
            assert abs(before + total_bytes - expected - memory()) < 16 * MIB
    assert memory() - before < 16 * MIB


@both
def test_small_tensors_far_apart_hold_the_window(tmp_path, backend):
    """As the scales of a quantised model lie; each takes a block of what is read."""
    header, at = {}, 0
    for number in range(20_000):
        for name, size in (("small", 4), ("large", 12 * KIB)):
            offsets = [at, at + size]
            header[f"{number}.{name}"] = {"dtype": "U8", "shape": [size], "data_offsets": offsets}
            at += size
    path = write_raw(tmp_path / "f", header)
    os.truncate(path, path.stat().st_size + at)
    handle = ours(path, backend, tensor_filter="*.small", inflight_bytes="4MiB")
    gc.collect()
    before, most, count = memory(), 0, 0
    for _name, tensor in handle.tensors():
        assert tensor.tolist() == [0, 0, 0, 0]
        count += 1
        if count % 500 == 1:
            most = max(most, memory() - before)
    assert count == 20_000 and most < 16 * MIB + 8 * MIB


def test_a_view_keeps_its_tensor_and_that_alone(wide):
    before = memory()
    for name, tensor in ours(wide).tensors():
        if name == "t03":
            view = tensor[7:12]
    del tensor
    assert abs(memory() - before - 10 * MIB) < 4 * MIB
    assert len(view.tolist()) == 5


@both
def test_tensors_outlive_everything(mixed, mixed_pairs, tmp_path, backend):
    path = tmp_path / "copy"
    path.write_bytes(mixed.read_bytes())
    handle = ours(path, backend)
    pairs = list(handle.tensors())
    handle.__exit__(None, None, None)
    with path.open("rb+") as file:
        file.write(bytes(path.stat().st_size))
    os.truncate(path, 0)
    del handle
    gc.collect()
    assert pairs_of(pairs) == mixed_pairs


# --- ends ---


def begun(path, backend="mmap", taken=3, **keywords):
    """A stream of which some were taken, and its handle."""
    handle = ours(path, backend, **keywords)
    stream = handle.tensors()
    for _ in range(taken):
        next(stream)
    return handle, stream


@pytest.fixture(scope="module")
def warm_engines(mixed):
    """What is set up once in a process, is."""
    for engine in ("uring", "threads"):
        pairs_of(ours(mixed, engine=engine).tensors())


STOPS = {
    "drop": lambda handle, stream: None,
    "close": lambda handle, stream: stream.close(),
    "close twice": lambda handle, stream: (stream.close(), stream.close()),
    "exception": lambda handle, stream: outcome(lambda: [1 / 0 for _ in stream]),
    "break": lambda handle, stream: next(iter(stream)),
    "leave handle": lambda handle, stream: handle.__exit__(None, None, None),
    "to the end": lambda handle, stream: list(stream),
}


@both
@ways
@pytest.mark.parametrize("stop", STOPS)
def test_stopped_early_nothing_is_left(wide, warm_engines, backend, engine, direct_io, stop):
    before = held()
    anonymous = memory()
    for taken in (0, 1, 5):
        handle, stream = begun(wide, backend, taken, engine=engine, direct_io=direct_io)
        assert len(os.listdir("/proc/self/task")) > before[0] or stop == "to the end"
        STOPS[stop](handle, stream)
        if stop in ("close", "close twice"):
            assert next(stream, None) is None and list(stream) == []
        del handle, stream
        assert is_back_to(before)
    assert memory() - anonymous < 32 * MIB


def test_closing_waits_for_nothing(wide):
    """A reader that waits for its consumer is woken."""
    for _ in range(5):
        _, stream = begun(wide, taken=1, inflight_bytes=4096)
        time.sleep(0.05)
        start = time.monotonic()
        stream.close()
        assert time.monotonic() - start < 0.5


@both
def test_abandoned_in_a_cycle(wide, warm_engines, backend):
    before = held()

    class Node:
        pass

    gc.disable()
    try:
        for _ in range(5):
            node = Node()
            handle, node.stream = begun(wide, backend, 2)
            node.handle, node.itself = handle, node
            gone = weakref.ref(node)
            del node, handle
            assert gone() is not None
            gc.collect()
            assert gone() is None and is_back_to(before)
    finally:
        gc.enable()


def test_abandoned_in_a_cycle_of_its_own_error(mixed):
    """The handle is cleared before its iterator is gone."""
    run_python(
        """
        import gc, sys
        import stx_patch
        def work():
            handle = stx_patch.safe_open(sys.argv[1])
            iterator = handle.tensors()
            next(iterator)
            try:
                raise ValueError
            except ValueError as error:
                kept = error
        for _ in range(20):
            work()
            gc.collect()
        """,
        mixed,
    )


@both
def test_abandoned_in_a_cycle_through_a_filter(wide, warm_engines, backend):
    """What the handle refers to may refer to the stream."""
    before = held()

    class Keep:
        def __call__(self, key):
            return True

    for _ in range(3):
        keep = Keep()
        handle, keep.stream = begun(wide, backend, 2, tensor_filter=keep)
        keep.handle = handle
        del keep, handle
        assert is_back_to(before)


def test_many_abandoned_at_once(mixed, warm_engines):
    before = held()
    streams = [begun(mixed, backend)[1] for backend in ("mmap", "pread") * 10]
    assert len(held()[1]) >= len(before[1]) + 20
    del streams
    assert is_back_to(before)


@both
def test_a_stream_keeps_its_file_and_not_its_handle(mixed, mixed_pairs, warm_engines, backend):
    before = held()
    handle, stream = begun(mixed, backend, 4)
    del handle
    gc.collect()
    assert pairs_of(stream) == mixed_pairs[4:]
    del stream
    assert is_back_to(before)


@pytest.mark.parametrize("end", ["exit", "collect"])
def test_the_interpreter_ends_in_the_middle(mixed, end):
    run_python(
        f"""
        import gc, sys
        import stx_patch
        stream = stx_patch.safe_open(sys.argv[1], inflight_bytes=4096).tensors()
        next(stream)
        if "{end}" == "collect":
            import builtins
            builtins.kept = [stream]
            builtins.kept.append(builtins.kept)
        """,
        mixed,
    )


# --- threads ---


@both
def test_continued_on_other_threads(mixed, mixed_pairs, backend):
    stream = ours(mixed, backend, inflight_bytes="1MiB").tensors()
    found = []

    def take():
        for _ in range(7):
            with contextlib.suppress(StopIteration):
                name, tensor = next(stream)
                found.append((name, facts(tensor)))

    while len(found) < len(mixed_pairs):
        thread = threading.Thread(target=take)
        thread.start()
        thread.join()
    assert found == mixed_pairs and list(stream) == []


@both
@pytest.mark.parametrize("interval", [1e-6, 0.005])
def test_advanced_by_several_at_once(mixed, mixed_pairs, backend, interval):
    """Each tensor goes to one of them, whole; who comes in between is told."""
    expected, usual = dict(mixed_pairs), sys.getswitchinterval()
    sys.setswitchinterval(interval)
    try:
        for _ in range(10):
            stream = ours(mixed, backend, inflight_bytes=4096).tensors()
            taken, told = [], []

            def work(number, stream=stream, taken=taken, told=told):
                while True:
                    try:
                        taken.append(next(stream))
                    except StopIteration:
                        return
                    except ValueError as error:
                        assert str(error) == "tensors() is being advanced by another thread"
                        told.append(number)

            run_threads(3, work)
            assert sorted(name for name, _ in taken) == sorted(expected)
            for name, tensor in taken[:: 1 + len(taken) // 20]:
                assert facts(tensor) == expected[name]
    finally:
        sys.setswitchinterval(usual)


def test_closing_while_another_advances(wide):
    """The one that waits goes on, and the other is told; or it is closed."""
    for _ in range(20):
        stream = ours(wide, inflight_bytes=4096).tensors()
        over = []

        def advance(_number, stream=stream, over=over):
            with contextlib.suppress(ValueError):
                for _name, tensor in stream:
                    assert tensor.numel() == tensor.nbytes
            over.append(True)

        def close(_number, stream=stream, over=over):
            while not over:
                with contextlib.suppress(ValueError):
                    stream.close()
                    return

        run_threads(2, lambda number, a=advance, c=close: (a, c)[number](number))


@both
def test_streams_beside_each_other(mixed, mixed_pairs, backend):
    handle = ours(mixed, backend, inflight_bytes="4MiB")
    shared = [handle.tensors() for _ in range(3)]
    for pairs in zip(*shared, mixed_pairs, strict=True):
        *found, expected = pairs
        assert all((name, facts(tensor)) == expected for name, tensor in found)

    def work(_number):
        assert pairs_of(handle.tensors()) == mixed_pairs

    run_threads(4, work)


# --- the handle and the file ---


@both
def test_a_closed_handle_ends_it(mixed, backend):
    for taken in (0, 1, 60):
        handle, stream = begun(mixed, backend, taken)
        handle.__exit__(None, None, None)
        with pytest.raises(safetensors.SafetensorError) as caught:
            next(stream)
        assert str(caught.value) == "File is closed"
        assert list(stream) == []
        with pytest.raises(safetensors.SafetensorError, match="File is closed"):
            handle.tensors()


@both
def test_a_handle_closed_by_another_thread(wide, backend):
    """Whoever waits for a tensor gets it, or the error; never something else."""
    for delay in (0, 0.001, 0.01, 0.03):
        handle = ours(wide, backend, inflight_bytes=4096)
        answers = []

        def read(handle=handle, answers=answers):
            try:
                for _name, tensor in handle.tensors():
                    answers.append(tensor.numel())
            except safetensors.SafetensorError as error:
                answers.append(str(error))

        def close(handle=handle, delay=delay):
            time.sleep(delay)
            handle.__exit__(None, None, None)

        run_threads(2, lambda number, r=read, c=close: (r, c)[number]())
        assert answers[-1] == "File is closed" or len(answers) == 37


def changed(path, how):
    """Do to a file what others may do while it is open."""
    size_bytes = path.stat().st_size
    if how == "deleted":
        path.unlink()
    elif how == "replaced":
        other = path.with_name("other")
        other.write_bytes(path.read_bytes()[: size_bytes // 2] + bytes(size_bytes // 2))
        os.replace(other, path)
    elif how == "cut":
        os.truncate(path, size_bytes // 2)
    elif how == "cut to nothing":
        os.truncate(path, 0)
    elif how == "longer":
        os.truncate(path, size_bytes + 1)
    elif how == "touched":
        os.utime(path, ns=(1, 1))
    elif how == "a folder":
        path.unlink()
        path.mkdir()


CHANGES = ["deleted", "replaced", "cut", "cut to nothing", "longer", "touched", "a folder"]


@pytest.fixture
def own_copy(mixed, tmp_path):
    path = tmp_path / "copy"
    path.write_bytes(mixed.read_bytes())
    return path


@both
@pytest.mark.parametrize("how", CHANGES)
def test_a_file_that_changed_before(own_copy, mixed_pairs, backend, how):
    """An error, or what was opened; never anything else. A mapped file is opened once more, so
    that it must be the same; a file that is read is open."""
    before = held()
    handle = ours(own_copy, backend)
    changed(own_copy, how)
    result = outcome(lambda tensors=handle.tensors: pairs_of(tensors()))
    if backend == "mmap":
        assert result[:2] == ("error", safetensors.SafetensorError) and str(own_copy) in result[2]
        assert how in ("deleted", "a folder") or result[2].endswith(
            "has changed since it was opened"
        )
    elif how.startswith("cut"):
        assert result[:2] == ("error", safetensors.SafetensorError)
        assert "failed to fill whole buffer" in result[2]
    else:
        assert result == ("value", mixed_pairs)
    del handle
    assert is_back_to(before)


@both
@direct
@pytest.mark.parametrize("how", CHANGES)
def test_a_file_that_changes_in_the_middle(own_copy, mixed_pairs, backend, direct_io, how):
    how_read = {"direct_io": direct_io, "inflight_bytes": 64 * KIB}
    _handle, stream = begun(own_copy, backend, 30, **how_read)
    changed(own_copy, how)
    found = []

    def take_all():
        for name, tensor in stream:
            found.append((name, facts(tensor)))

    result = outcome(take_all)
    assert found == mixed_pairs[30 : 30 + len(found)]
    if how.startswith("cut"):
        assert result[:2] == ("error", safetensors.SafetensorError) and len(found) < 90
        words = "Could not read tensor .* from file: failed to fill whole buffer"
        with pytest.raises(safetensors.SafetensorError, match=words):
            raise result[1](result[2])
    else:
        assert result == ("value", None) and len(found) == len(mixed_pairs) - 30
    assert list(stream) == []


@both
@engines
def test_the_tensor_that_is_missing_is_named(tmp_path, backend, engine):
    """The first that is not whole, as stock says it."""
    path = write(tmp_path / "f", [(f"t{i}", "U8", [300_000]) for i in range(64)])
    size_bytes = path.stat().st_size
    for cut_bytes in (5 * MIB + 77, 10_000, size_bytes - 1, 9 * MIB):
        handle, stock = (
            ours(path, backend, engine=engine),
            STOCK.safe_open(path, "pt", backend="pread"),
        )
        stream = handle.tensors()
        os.truncate(path, cut_bytes)
        expected = outcome(stock.get_tensors)
        result = outcome(lambda stream=stream: pairs_of(stream))
        os.truncate(path, size_bytes)
        # What had been read by then may be there.
        assert result == expected or (result[0] == "value" and cut_bytes > 0)
        os.utime(path)


# --- processes and signals ---


@both
@engines
@pytest.mark.parametrize("taken", [0, 60])
def test_a_fork_in_the_middle(mixed, mixed_pairs, warm_engines, backend, engine, taken):
    """The child goes on where it was, beside its parent, with a reader of its own."""
    torch.set_num_threads(1)
    handle, stream = begun(mixed, backend, taken, engine=engine, inflight_bytes="1MiB")

    def work():
        assert len(os.listdir("/proc/self/task")) == 1
        assert pairs_of(stream) == mixed_pairs[taken:]
        assert pairs_of(handle.tensors()) == mixed_pairs
        stream.close()

    child = os.fork()
    if child == 0:
        status = 1
        with contextlib.suppress(BaseException):
            signal.alarm(60)
            work()
            status = 0
        os._exit(status)
    assert pairs_of(stream) == mixed_pairs[taken:]
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@both
@pytest.mark.parametrize("end", ["drop", "close", "close handle", "exit"])
def test_a_forked_child_lets_go_of_it(mixed, mixed_pairs, backend, end):
    handle, stream = begun(mixed, backend, 5, inflight_bytes="1MiB")
    pairs = [next(stream)]

    def work():
        nonlocal handle, stream
        if end == "drop":
            del handle, stream
            gc.collect()
        elif end == "close":
            stream.close()
            assert list(stream) == []
        elif end == "close handle":
            handle.__exit__(None, None, None)
            with pytest.raises(safetensors.SafetensorError, match="File is closed"):
                next(stream)
        assert pairs_of(pairs) == mixed_pairs[5:6]

    assert in_a_child(work) == 0
    assert pairs_of(stream) == mixed_pairs[6:]


def test_a_forked_child_that_can_have_no_thread(mixed):
    """It is told so, and again, and ends."""
    _handle, stream = begun(mixed, taken=5, inflight_bytes="1MiB")

    def work():
        used_bytes = int(Path("/proc/self/statm").read_text().split()[0]) * 4096
        resource.setrlimit(resource.RLIMIT_AS, (used_bytes, used_bytes))
        for _ in range(3):
            with contextlib.suppress(OSError, MemoryError):
                for _pair in stream:
                    break

    assert in_a_child(work) == 0


def test_two_threads_of_a_forked_child(mixed, mixed_pairs):
    _handle, stream = begun(mixed, taken=5, inflight_bytes="1MiB")
    expected = dict(mixed_pairs)

    def work():
        taken = []

        def advance(_number):
            while True:
                with contextlib.suppress(ValueError):
                    try:
                        taken.append(next(stream))
                    except StopIteration:
                        return

        run_threads(2, advance)
        assert sorted(name for name, _ in taken) == sorted(list(expected)[5:])
        stream.close()
        for _ in range(200):
            if len(os.listdir("/proc/self/task")) == 1:
                break
            time.sleep(0.005)
        assert len(os.listdir("/proc/self/task")) == 1

    for _ in range(5):
        assert in_a_child(work) == 0


def test_a_program_that_is_started_gets_no_descriptor(mixed):
    for backend in ("mmap", "pread"):
        before = open_descriptors()
        _handle, _stream = begun(mixed, backend, inflight_bytes=4096)
        made = set(open_descriptors()) - set(before)
        assert made and not any(os.get_inheritable(int(descriptor)) for descriptor in made)


class Interrupted(Exception):
    pass


@both
@engines
def test_a_signal_in_the_middle(wide, warm_engines, backend, engine):
    """Its handler raises out of the loop, wherever that is; nothing is left."""
    before = held()

    def interrupt(number, frame):
        raise Interrupted

    usual = signal.signal(signal.SIGALRM, interrupt)
    try:
        for delay in (0.002, 0.01, 0.03, 0.05):
            handle = ours(wide, backend, engine=engine, direct_io="on")
            stream, _tensor = handle.tensors(), None
            signal.setitimer(signal.ITIMER_REAL, delay)
            try:
                while True:
                    for _name, _tensor in stream:
                        pass
                    stream = handle.tensors()
            except Interrupted:
                pass
            del handle, stream, _tensor
            assert is_back_to(before)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, usual)


def test_ctrl_c_in_the_middle(wide):
    run_python(
        """
        import os, signal, sys, threading, time
        import torch
        torch.set_num_threads(1)
        import stx_patch
        def interrupt():
            time.sleep(0.2)
            os.kill(os.getpid(), signal.SIGINT)
        handle = stx_patch.safe_open(sys.argv[1], direct_io="on", inflight_bytes="1MiB")
        names = []
        thread = threading.Thread(target=interrupt)
        try:
            thread.start()
            while True:
                for name, tensor in handle.tensors():
                    names.append(name)
        except KeyboardInterrupt:
            pass
        thread.join()
        del tensor
        assert names and len(os.listdir("/proc/self/task")) == 1
        assert [name for name, _ in handle.tensors()] == handle.offset_keys()
        """,
        wide,
    )


# --- what the system refuses ---


@pytest.mark.parametrize("backend, room", [("mmap", 0), ("pread", 4), ("mmap", 100)])
def test_too_little_memory(wide, backend, room):
    run_python(
        """
        import os, resource, sys, time
        from pathlib import Path
        import safetensors, torch
        torch.set_num_threads(1)
        import stx_patch
        path, backend, room = sys.argv[1:]
        handle = stx_patch.safe_open(path, backend=backend)
        for name, tensor in handle.tensors():
            break
        del tensor
        before = len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))
        used_bytes = int(Path("/proc/self/statm").read_text().split()[0]) * 4096
        resource.setrlimit(resource.RLIMIT_AS, (used_bytes + (int(room) << 20), -1))
        kept = []
        for _ in range(3):
            try:
                for name, tensor in handle.tensors():
                    assert tensor.nbytes == handle.nbytes(name)
                    kept.append(tensor)
            except MemoryError as error:
                pass
            except (OSError, safetensors.SafetensorError) as error:
                # Without room for a stack there is no thread, which is told by an errno.
                assert int(room) < 30 and "temporarily unavailable" in str(error), repr(error)
            else:
                raise AssertionError
            tensor = None
            kept.clear()
            for _ in range(200):  # a thread that has ended may be listed for a moment
                now = len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))
                if now == before:
                    break
                time.sleep(0.01)
            assert now == before, (now, before)
        resource.setrlimit(resource.RLIMIT_AS, (-1, -1))
        assert sum(tensor.nbytes for _, tensor in handle.tensors()) == 400 << 20
        """,
        wide,
        backend,
        room,
    )


@both
@pytest.mark.parametrize("left", [0, 1, 2, 3, 6])
def test_few_descriptors_left(mixed, mixed_pairs, warm_engines, backend, left):
    """One is enough: without more there is no ring and no direct read."""
    handle = ours(mixed, backend, direct_io="on")

    def work():
        resource.setrlimit(resource.RLIMIT_NOFILE, (128, 128))
        taken = []
        with contextlib.suppress(OSError):
            while True:
                taken.append(os.dup(0))
        for descriptor in taken[:left]:
            os.close(descriptor)
        result = outcome(lambda: pairs_of(handle.tensors()))
        if left == 0:
            assert result[0] == "error" and "Too many open files" in result[2]
        else:
            assert result == ("value", mixed_pairs)
        os.close(taken[-1])
        assert left or pairs_of(handle.tensors()) == mixed_pairs

    assert in_a_child(work) == 0


@ways
@pytest.mark.parametrize("limit", [1, 2, 3, 4])
def test_few_threads(mixed, mixed_pairs, warm_engines, engine, direct_io, limit):
    """Without any the consumer reads itself. Threads of the system's own count too."""
    handle = ours(mixed, "pread", engine=engine, direct_io=direct_io, inflight_bytes="1MiB")

    def work():
        if os.geteuid() == 0:
            os.setuid(65534)  # the limit does not hold for root
        resource.setrlimit(resource.RLIMIT_NPROC, (limit, limit))
        for _ in range(3):
            assert outcome(lambda: pairs_of(handle.tensors())) == ("value", mixed_pairs)

    assert in_a_child(work) == 0


@both
def test_many_files_one_after_the_other(tmp_path, backend):
    """As loaders of sharded checkpoints do, and with few descriptors."""
    for number in range(100):
        entries = [(f"{number}.{i}", "F32", [500 * i]) for i in range(4)]
        write(tmp_path / f"{number:03}.safetensors", entries)
    names = [path.name for path in sorted(tmp_path.iterdir())]
    assert len(names) == 100

    def work():
        resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
        before = held()
        kept = {}
        for name in names:
            handle = OUR_OPENER(tmp_path / name, backend=backend)
            kept.update(handle.tensors())
            del handle
        assert is_back_to(before)
        assert len(kept) == 400 and list(kept)[-1] == "99.3"
        for name in names[::13]:
            for key, expected in stock_pairs(tmp_path / name):
                assert facts(kept[key]) == expected

    assert in_a_child(work) == 0


@both
def test_many_open_at_once(mixed, mixed_pairs, backend):
    """Every stream has few threads and descriptors, so that a hundred fit."""
    handle = ours(mixed, backend, inflight_bytes=4096)
    streams = [handle.tensors() for _ in range(50)]
    for stream in streams:
        assert [next(stream)[0] for _ in range(3)] == [name for name, _ in mixed_pairs[:3]]
    assert pairs_of(streams[-1]) == mixed_pairs[3:]


def test_an_iterator_cannot_be_made_or_copied(mixed):
    stream = ours(mixed).tensors()
    kind = type(stream)
    for use in (kind, lambda: kind(1), lambda: type("Sub", (kind,), {})):
        with pytest.raises(TypeError):
            use()
    with pytest.raises(AttributeError):
        stream.other = 1
    assert not hasattr(stream, "__dict__")


@both
def test_a_stream_begun_in_the_loop_of_another(mixed, mixed_pairs, backend):
    handle = ours(mixed, backend, inflight_bytes="1MiB")
    found = []
    for name, _tensor in handle.tensors():
        if name == "large":
            found += pairs_of(handle.tensors())
            assert dict(mixed_pairs)[name] == facts(handle.get_tensor(name)) or backend == "mmap"
    assert found == mixed_pairs
