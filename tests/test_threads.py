"""Proves: handles may be used from many threads, closed meanwhile, and carried over a fork."""

import os
import threading

import pytest
import torch
from helpers import STOCK, ours

import stx_patch


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


def test_a_filter_that_closes_and_loads(sample):
    """A filter is called while nothing is half-made: it may load the same file itself."""

    def keep(key):
        check(stx_patch.load_file(sample))
        return key == "vector"

    assert list(stx_patch.load_file(sample, tensor_filter=keep)) == ["vector"]


def test_a_fork_reads_on(sample):
    handle = ours(sample)
    tensor = handle.get_tensor("matrix")
    child = os.fork()
    if child == 0:
        status = 1
        try:
            check(handle.get_tensors())
            check(stx_patch.load_file(sample))
            tensor.zero_()
            status = 0
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert torch.equal(tensor.flatten(), torch.arange(24.0))
    check(handle.get_tensors())


@pytest.mark.parametrize("count", [1, 8])
def test_counters_add_up_over_threads(sample, count):
    before = stx_patch.stats()
    run_threads(count, lambda number: [stx_patch.load_file(sample) for _ in range(50)])
    made = stx_patch.stats() - before
    assert made.opens == 50 * count and made.tensors_native == 250 * count
