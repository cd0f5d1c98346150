"""Proves: a file that is opened again costs no second parse, and a file that has changed, however
alike it looks, is read as it is now."""

import os
import threading

import pytest
import torch
from helpers import STOCK, facts, in_a_child, ours, write_raw
from patch_helpers import leaves_stock  # noqa: F401

import stx_patch
from stx_patch import filters


def entry(begin, end):
    return {"dtype": "U8", "shape": [end - begin], "data_offsets": [begin, end]}


def write_two(path, first, second):
    """A file of two tensors of 4 and 6 bytes; the same size whichever comes first."""
    sizes = {"a": 4, "b": 6}
    header = {
        first: entry(0, sizes[first]),
        second: entry(sizes[first], sizes[first] + sizes[second]),
    }
    write_raw(path, header, bytes(range(10)))


def reopened(path, times=3, **keywords):
    """Handles of as many openings; how many did without a parse."""
    before = stx_patch.stats()
    handles = [ours(path, **keywords) for _ in range(times)]
    return handles, (stx_patch.stats() - before).headers_reused


def test_from_the_third_opening_on_the_header_is_there(sample):
    handles, reused = reopened(sample, 5)
    assert reused in (3, 4, 5), "an earlier test may have opened the file"
    with STOCK.safe_open(sample, "pt") as stock:
        for handle in handles:
            assert handle.keys() == stock.keys()
            assert handle.offset_keys() == stock.offset_keys()
            assert handle.metadata() == stock.metadata()
            for name in handle.offset_keys():
                assert facts(handle.get_tensor(name)) == facts(stock.get_tensor(name))


def test_tensors_of_two_handles_share_nothing(sample):
    handles, _ = reopened(sample)
    first, second = (handle.get_tensors() for handle in handles[1:])
    for name, tensor in first.items():
        assert tensor.numel() == 0 or tensor.data_ptr() != second[name].data_ptr()


@pytest.mark.parametrize("backend", ["mmap", "pread"])
def test_a_file_rewritten_in_place(tmp_path, backend):
    """Other offsets, and all that the file system tells is as before."""
    path = tmp_path / "f"
    write_two(path, "a", "b")
    handles, reused = reopened(path, backend=backend)
    assert reused >= 1
    assert handles[2].get_tensor("a").tolist() == [0, 1, 2, 3]
    del handles
    before = path.stat()
    other = tmp_path / "other"
    write_two(other, "b", "a")
    with path.open("rb+") as file:
        file.write(other.read_bytes())
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    after = path.stat()
    assert (after.st_ino, after.st_size, after.st_mtime_ns) == (
        before.st_ino,
        before.st_size,
        before.st_mtime_ns,
    )
    for _ in range(3):
        handle = ours(path, backend=backend)
        assert handle.offset_keys() == ["b", "a"]
        assert handle.get_tensor("a").tolist() == [6, 7, 8, 9]
        assert handle.get_tensor("b").tolist() == [0, 1, 2, 3, 4, 5]


def test_a_file_made_anew_under_the_same_name(tmp_path):
    path = tmp_path / "f"
    for number in range(20):
        first, second = ("a", "b") if number % 2 == 0 else ("b", "a")
        path.unlink(missing_ok=True)
        write_two(path, first, second)
        for _ in range(3):
            assert ours(path).offset_keys() == [first, second]


def test_a_file_that_became_damaged_is_refused(tmp_path):
    path = tmp_path / "f"
    write_two(path, "a", "b")
    reopened(path)
    content = path.read_bytes()
    path.write_bytes(content.replace(b"U8", b"U9", 1))
    with pytest.raises(stx_patch._stock.SafetensorError):
        stx_patch.safe_open(path)
    path.write_bytes(content[:-1])
    with pytest.raises(stx_patch._stock.SafetensorError):
        stx_patch.safe_open(path)


def test_different_filters_of_one_header(tmp_path):
    path = tmp_path / "f"
    write_two(path, "a", "b")
    for _ in range(4):
        for keep, expected in [
            ({"a"}, ["a"]),
            ("b", ["b"]),
            (None, ["a", "b"]),
            (filters.none_of({"a"}), ["b"]),
            (lambda key: key.nbytes == 4, ["a"]),
            ({"a", "b"}, ["a", "b"]),
        ]:
            assert ours(path, tensor_filter=keep).offset_keys() == expected


def test_a_callable_is_asked_each_time(tmp_path):
    """What it answers may hang on more than the name."""
    path = tmp_path / "f"
    write_two(path, "a", "b")
    wanted, asked = {"a"}, []

    def keep(key):
        asked.append((str(key), key.filename))
        return key in wanted

    for number in range(1, 6):
        assert ours(path, tensor_filter=keep).offset_keys() == ["a"]
        assert len(asked) == 2 * number
    wanted.add("b")
    assert ours(path, tensor_filter=keep).offset_keys() == ["a", "b"]
    # Behind a glob that decides before it, it need not be asked.
    guarded = filters.all_of("a", keep)
    for _ in range(3):
        assert ours(path, tensor_filter=guarded).offset_keys() == ["a"]
    wanted.clear()
    handle = stx_patch.safe_open(path, tensor_filter=filters.any_of(guarded, "b"))
    assert handle.offset_keys() == ["b"]


def test_filters_in_force_are_told_apart(tmp_path):
    path = tmp_path / "f"
    write_two(path, "a", "b")
    for _ in range(3):
        for keep in ("a", "b"):
            with stx_patch.patched(tensor_filter=keep):
                import safetensors

                with safetensors.safe_open(path, "pt") as handle:
                    assert handle.keys() == [keep]


def test_many_files_in_turn(tmp_path):
    """More than are remembered."""
    for number in range(300):
        write_two(tmp_path / str(number), *("ab" if number % 2 else "ba"))
    for _ in range(3):
        for number in range(300):
            handle = ours(tmp_path / str(number))
            assert handle.offset_keys() == list("ab" if number % 2 else "ba")


def test_threads_that_reopen_while_the_file_changes(tmp_path):
    """Each sees the one or the other, whole."""
    path, other = tmp_path / "f", tmp_path / "other"
    write_two(path, "a", "b")
    over, failures = threading.Event(), []
    expected = {
        ("a", "b"): ([0, 1, 2, 3], [4, 5, 6, 7, 8, 9]),
        ("b", "a"): ([6, 7, 8, 9], [0, 1, 2, 3, 4, 5]),
    }

    def read():
        try:
            while not over.is_set():
                handle = stx_patch.safe_open(path)
                values = handle.get_tensor("a").tolist(), handle.get_tensor("b").tolist()
                assert values == expected[tuple(handle.offset_keys())]
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=read) for _ in range(4)]
    for thread in threads:
        thread.start()
    for number in range(200):
        write_two(other, *(("b", "a") if number % 2 == 0 else ("a", "b")))
        os.replace(other, path)
    over.set()
    for thread in threads:
        thread.join()
    assert failures == []


def test_a_forked_child_goes_on(sample):
    handles, _ = reopened(sample)

    def work():
        again, reused = reopened(sample)
        assert reused == 3
        assert again[0].keys() == handles[0].keys()

    assert in_a_child(work) == 0


def test_a_large_header_is_not_kept(tmp_path):
    """It would hold more memory than it saves time."""
    path = tmp_path / "f"
    names = [f"{'n' * 90}{number}" for number in range(60_000)]
    write_raw(path, {name: entry(i, i + 1) for i, name in enumerate(names)}, bytes(60_000))
    assert path.stat().st_size > 8 << 20
    _, reused = reopened(path)
    assert reused == 0


def test_tensors_outlive_the_header(tmp_path):
    path = tmp_path / "f"
    write_two(path, "a", "b")
    tensors = [reopened(path)[0][2].get_tensor("b") for _ in range(2)]
    for number in range(300):
        write_two(tmp_path / str(number), "b", "a")
        reopened(tmp_path / str(number))
    assert all(torch.equal(tensor, tensors[0]) for tensor in tensors)
    assert tensors[0].tolist() == [4, 5, 6, 7, 8, 9]
