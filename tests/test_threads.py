"""Proves: handles may be used from many threads, closed meanwhile, and carried over a fork."""

import gc
import subprocess
import sys
import threading

import pytest
import torch
from helpers import STOCK, in_a_child, ours, outcome

import stx_patch
from stx_patch import _patch, _stats


def run_threads(count, work):
    failures = []

    def guarded(number):
        try:
            work(number)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=guarded, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    assert failures == []


def check(tensors):
    assert tensors["matrix"].flatten().tolist() == list(range(24))
    assert tensors["vector"].tolist() == list(range(7))


def test_many_threads_open_and_load(sample):
    def work(number):
        for _ in range(200):
            check(stx_patch.load_file(sample))
            with stx_patch.safe_open(sample) as handle:
                assert len(handle.keys()) == 5
                handle.get_slice("cube")[number % 3].sum()

    run_threads(8, work)


def test_one_handle_in_many_threads(sample):
    handle = ours(sample)

    def work(number):
        for _ in range(500):
            check({name: handle.get_tensor(name) for name in handle.keys()})  # noqa: SIM118
            assert handle.get_slice("matrix")[number % 4, 0] == 6 * (number % 4)

    run_threads(8, work)


def test_closing_while_others_read(sample):
    """Each call gives right values or says that the file is closed."""
    for _ in range(100):
        handle = ours(sample)
        start = threading.Barrier(5)

        def work(number, handle=handle, start=start):
            start.wait()
            if number == 0:
                handle.__exit__(None, None, None)
                return
            try:
                for _ in range(20):
                    check(handle.get_tensors())
                    handle.keys()
                    handle.get_slice("cube")[0].sum()
            except STOCK.SafetensorError as error:
                assert str(error) == "File is closed"

        run_threads(5, work)


METHODS = {
    "keys": lambda h: h.keys() == sorted(h.keys()),
    "offset_keys": lambda h: len(h.offset_keys()) == 5,
    "metadata": lambda h: h.metadata() == {"format": "pt"},
    "get_tensor": lambda h: h.get_tensor("vector").tolist() == list(range(7)),
    "get_tensors": lambda h: check(h.get_tensors()) is None,
    "get_slice": lambda h: h.get_slice("cube").get_shape() == [3, 4, 5],
    "get_shape": lambda h: h.get_shape("cube") == [3, 4, 5],
    "get_dtype": lambda h: h.get_dtype("cube") == "BF16",
}


@pytest.mark.parametrize("method", METHODS)
def test_closing_from_within_a_method(sample, method):
    """A collection inside a method runs a finaliser that closes the handle."""
    thresholds = gc.get_threshold()
    gc.freeze()  # collections look at what is made here only
    for threshold in range(1, 40):
        handle = ours(sample)
        ring = [Closing(handle)]
        ring.append(ring)
        del ring
        gc.set_threshold(threshold, 1, 1)
        try:
            assert METHODS[method](handle)
        except STOCK.SafetensorError as error:
            assert str(error) == "File is closed"
        finally:
            gc.set_threshold(*thresholds)
        gc.collect()
        with pytest.raises(STOCK.SafetensorError, match="File is closed"):
            handle.keys()
    gc.unfreeze()


class Closing:
    """Closes a handle when it is collected."""

    def __init__(self, handle):
        self.handle = handle

    def __del__(self):
        self.handle.__exit__(None, None, None)


def test_an_index_that_drops_what_it_indexes(sample):
    """A slice is used while the last names of handle and slice go away."""

    class Dropping:
        def __index__(self):
            held.clear()
            gc.collect()
            return 1

    held = [ours(sample)]
    held.append(held[0].get_slice("matrix"))
    assert held[1][Dropping()].tolist() == [6, 7, 8, 9, 10, 11]


def test_slices_in_many_threads(sample):
    handle = ours(sample)
    slices = {name: handle.get_slice(name) for name in ("matrix", "vector", "cube")}
    handle.__exit__(None, None, None)

    def work(number):
        for _ in range(300):
            assert slices["matrix"][number % 4].tolist() == list(
                range(6 * (number % 4), 6 * (number % 4) + 6)
            )
            assert slices["vector"][number % 7] == number % 7
            assert slices["cube"].get_shape() == [3, 4, 5]
            slices["cube"][number % 3, 1:, ::2].sum()

    run_threads(8, work)


def test_tensors_dropped_by_other_threads(sample):
    """The last user of a mapping may be any thread."""
    with open("/proc/self/maps") as maps:
        before = sum(str(sample) in line for line in maps)
    queues = [[] for _ in range(8)]

    def work(number):
        for _ in range(200):
            queues[(number + 1) % 8].append(stx_patch.load_file(sample))
            if queues[number]:
                check(queues[number].pop())

    run_threads(8, work)
    queues.clear()
    gc.collect()
    with open("/proc/self/maps") as maps:
        assert sum(str(sample) in line for line in maps) == before == 0


def test_the_first_use_in_many_threads_at_once(sample):
    """Eight threads meet in the imports of stx_patch, safetensors and torch, and in patch()."""
    script = """
import sys, threading
sys.setswitchinterval(1e-5)
barrier, done = threading.Barrier(8), []
def work(number):
    barrier.wait()
    import stx_patch
    if number % 2:
        stx_patch.patch()
    tensors = stx_patch.load_file(sys.argv[1])
    assert tensors["vector"].tolist() == list(range(7))
    done.append(number)
threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
assert sorted(done) == list(range(8)), done
import stx_patch
assert stx_patch.stats().opens == 8 and stx_patch.is_patched()
"""
    done = subprocess.run(
        [sys.executable, "-c", script, str(sample)], capture_output=True, text=True, timeout=100
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_a_filter_that_closes_and_loads(sample):
    """A filter is called while nothing is half-made: it may load the same file itself."""

    def keep(key):
        check(stx_patch.load_file(sample))
        return key == "vector"

    assert list(stx_patch.load_file(sample, tensor_filter=keep)) == ["vector"]


def test_a_fork_reads_on(sample):
    handle = ours(sample)
    tensor = handle.get_tensor("matrix")

    def work():
        check(handle.get_tensors())
        check(stx_patch.load_file(sample))
        tensor.zero_()

    assert in_a_child(work) == 0
    assert torch.equal(tensor.flatten(), torch.arange(24.0))
    check(handle.get_tensors())


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_fork_while_threads_load(sample):
    """The child has one thread and what the others held at that moment."""
    stop = threading.Event()

    def work():
        while not stop.is_set():
            check(stx_patch.load_file(sample))
            stx_patch.safe_open(sample, tensor_filter=lambda key: True).keys()
            outcome(stx_patch.safe_open, sample.with_name("missing"))

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(30):
            assert in_a_child(lambda: check(stx_patch.load_file(sample))) == 0
    finally:
        stop.set()
        for thread in threads:
            thread.join(60)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("module", [_stats, _patch], ids=lambda m: m.__name__)
def test_a_fork_while_another_thread_holds_a_lock(sample, module):
    """A worker forked at the wrong moment must not wait for a thread that it does not have."""
    held, go_on = threading.Event(), threading.Event()

    def hold():
        with module._lock:
            held.set()
            go_on.wait(60)

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait(60)

    def work():
        outcome(stx_patch.safe_open, sample.with_name("missing"))
        with stx_patch.patched() as report:
            check(stx_patch.load_file(sample))
        assert report.opens == 1

    try:
        assert in_a_child(work) == 0
    finally:
        go_on.set()
        thread.join(60)


@pytest.mark.parametrize("count", [1, 8])
def test_counters_add_up_over_threads(sample, count):
    before = stx_patch.stats()
    run_threads(count, lambda number: [stx_patch.load_file(sample) for _ in range(50)])
    made = stx_patch.stats() - before
    assert made.opens == 50 * count and made.tensors_native == 250 * count
