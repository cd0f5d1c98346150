"""Proves: what is read of files that are not in the page cache: exactly what is kept or asked for,
in every pattern that consumers load with, beside them, and nothing is left behind."""

import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import safetensors
import safetensors.torch
import torch
from patch_helpers import (
    PageCache,
    drop_from_cache,
    leaves_stock,  # noqa: F401
    mappings_of,
    open_descriptors,
    run_python,
    settle,
)

import stx_patch

MIB = 1 << 20
COUNT = 24
PAGES = 8192  # what rounding to pages may add to a tensor


def name_of(index):
    return f"model.layers.{index}.weight"


@pytest.fixture
def cold(tmp_path):
    """A file of 24 tensors of 2 MiB, named by layer, not in the page cache."""
    return make_cold(tmp_path / "cold.safetensors")


def make_cold(path, elements=MIB // 2):
    tensors = {name_of(i): torch.full((elements,), float(i)) for i in range(COUNT)}
    safetensors.torch.save_file(tensors, path)
    assert drop_from_cache(path)
    return path


def right(tensors):
    return all(t.min() == t.max() == int(name.split(".")[2]) for name, t in tensors.items())


def resident_bytes(path):
    cache = PageCache(path)
    try:
        return cache.resident_bytes(0, path.stat().st_size)
    finally:
        cache.close()


@pytest.fixture
def counted():
    stx_patch.reset_stats()
    with stx_patch.patched() as report:
        yield report


# --- patterns of loading ---


def test_load_file(cold, counted):
    tensors = safetensors.torch.load_file(cold)
    settle()
    assert right(tensors) and counted.files_cold == 1
    assert counted.bytes_read <= cold.stat().st_size + 65536


def test_one_tensor_and_no_more(cold, counted):
    handle = safetensors.safe_open(cold, "pt")
    tensor = handle.get_tensor(name_of(7))
    assert right({name_of(7): tensor})
    settle()
    assert 2 * MIB <= counted.bytes_read <= 2 * MIB + 65536 + PAGES
    assert resident_bytes(cold) <= 2 * MIB + 65536 + 4 * PAGES
    assert counted.files_cold == 0  # nobody asked about the file as a whole


@pytest.mark.parametrize("order", ["keys", "offset_keys"])
def test_get_tensor_in_order(cold, counted, order):
    with safetensors.safe_open(cold, "pt") as handle:
        names = getattr(handle, order)()
        tensors = {name: handle.get_tensor(name) for name in names}
    settle()
    assert right(tensors) and len(tensors) == COUNT and counted.files_cold == 1
    assert counted.bytes_read <= cold.stat().st_size + 65536 + COUNT * PAGES


def natural(name):
    return int(name.split(".")[2])


def test_all_slices_first_then_four_threads_in_natural_order(cold, counted):
    handle = safetensors.safe_open(cold, "pt")
    slices = {name: handle.get_slice(name) for name in handle.keys()}  # noqa: SIM118
    settle()
    assert counted.bytes_read <= 65536
    with ThreadPoolExecutor(4) as pool:
        names = sorted(slices, key=natural)
        tensors = dict(zip(names, pool.map(lambda name: slices[name][...], names), strict=True))
    settle()
    assert right(tensors) and counted.files_cold == 1
    assert counted.bytes_read <= cold.stat().st_size + 65536 + COUNT * PAGES


def test_eight_shards_by_eight_threads(tmp_path, counted):
    paths = [make_cold(tmp_path / f"shard-{i}.safetensors", MIB // 8) for i in range(8)]
    with ThreadPoolExecutor(8) as pool:
        loaded = list(pool.map(safetensors.torch.load_file, paths))
    settle()
    assert all(map(right, loaded)) and counted.files_cold == 8
    assert counted.bytes_read <= sum(path.stat().st_size + 65536 for path in paths)


def test_a_consumer_that_skips_is_not_read_ahead_of(cold, counted):
    """Every sixth tensor, without telling us by a filter."""
    with safetensors.safe_open(cold, "pt") as handle:
        wanted = handle.offset_keys()[::6]
        tensors = {name: handle.get_tensor(name) for name in wanted}
    settle()
    assert right(tensors)
    # A short run may be taken for an order once; then it costs a few tensors, never the file.
    assert counted.bytes_read <= cold.stat().st_size * 0.6


def test_a_part_of_each_slice(cold, counted):
    """Tensor-parallel ranks read their rows alone."""
    with safetensors.safe_open(cold, "pt") as handle:
        parts = [handle.get_slice(name)[: MIB // 8] for name in handle.keys()]  # noqa: SIM118
    settle()
    assert [int(part[0]) for part in parts] == [
        natural(name) for name in sorted(map(name_of, range(COUNT)))
    ]
    assert counted.bytes_read <= COUNT * (MIB // 2 + PAGES) + 65536


def test_a_filter_that_keeps_a_quarter(cold):
    kept = {name_of(i) for i in range(0, COUNT, 4)}
    with stx_patch.patched(kept) as report:
        tensors = safetensors.torch.load_file(cold)
        assert right(tensors)
        settle()
    assert report.bytes_read <= len(kept) * (2 * MIB + PAGES) + 65536
    assert resident_bytes(cold) <= 1.1 * len(kept) * 2 * MIB


# --- options ---


def test_read_ahead_off_asks_for_nothing(cold):
    with stx_patch.patched(read_ahead="off") as report:
        tensors = safetensors.torch.load_file(cold)
        settle()
        assert report.bytes_read <= 65536 and report.files_cold == 0
        assert right(tensors)


def test_read_ahead_is_bounded(cold):
    with stx_patch.patched(read_ahead="8MiB") as report:
        tensors = safetensors.torch.load_file(cold)
        settle()
        assert 8 * MIB <= report.bytes_read <= 16 * MIB + 65536
        assert right(tensors)


def test_what_is_warm_is_not_asked_for(cold, counted):
    cold.read_bytes()
    assert right(safetensors.torch.load_file(cold))
    with safetensors.safe_open(cold, "pt") as handle:
        assert right({name: handle.get_tensor(name) for name in handle.keys()})  # noqa: SIM118
    settle()
    assert counted.bytes_read <= 2 * 65536 and counted.files_warm == 2


# --- nothing is left ---


def test_ten_thousand_files_opened_for_one_tensor_each(tmp_path, counted):
    paths = []
    for i in range(100):
        path = tmp_path / f"{i}.safetensors"
        safetensors.torch.save_file({k: torch.full((65536,), float(i)) for k in "abc"}, path)
        assert drop_from_cache(path)
        paths.append(path)
    before = open_descriptors(), threading.active_count(), threads_of_process()
    for turn in range(100):
        for i, path in enumerate(paths):
            tensor = safetensors.safe_open(path, "pt").get_tensor("b")
            if turn == 0:
                assert tensor.sum() == 65536 * i
    del tensor
    settle()
    assert (open_descriptors(), threading.active_count(), threads_of_process()) == before
    assert sum(mappings_of(path) for path in paths) == 0
    assert counted.opens == 10_000
    kept_bytes = 100 * (4 * 65536 + PAGES)
    headers_bytes = 10_000 * 65536
    assert counted.bytes_read <= kept_bytes + headers_bytes
    for path in paths:
        assert resident_bytes(path) <= 4 * 65536 + 65536 + PAGES


def threads_of_process():
    return len(os.listdir("/proc/self/task"))


def test_helpers_leave_when_nothing_is_to_do(cold, counted):
    before = threads_of_process()
    tensors = safetensors.torch.load_file(cold)
    settle()
    for _ in range(200):
        if threads_of_process() <= before:
            break
        time.sleep(0.02)
    assert threads_of_process() <= before
    assert right(tensors)


def test_a_dropped_load_is_unmapped(cold, counted):
    for _ in range(20):
        drop_from_cache(cold)
        safetensors.torch.load_file(cold)
    settle()
    for _ in range(100):
        if mappings_of(cold) == 0:
            break
        time.sleep(0.02)
    assert mappings_of(cold) == 0


def test_a_fork_in_the_middle(cold):
    run_python(
        """
        import os, sys, torch, safetensors.torch, stx_patch
        torch.set_num_threads(1)
        stx_patch.patch()
        tensors = safetensors.torch.load_file(sys.argv[1])
        pid = os.fork()
        for name, tensor in tensors.items():
            assert (tensor == int(name.split(".")[2])).all()
        again = safetensors.torch.load_file(sys.argv[1])
        for name, tensor in again.items():
            assert (tensor == int(name.split(".")[2])).all()
        if pid == 0:
            os._exit(0)
        assert os.waitpid(pid, 0)[1] == 0
        """,
        str(cold),
    )


def test_a_fork_in_the_middle_of_a_stream(cold):
    """Parent and child both go on, each by itself."""
    run_python(
        """
        import os, sys, torch, stx_patch
        torch.set_num_threads(1)
        handle = stx_patch.safe_open(sys.argv[1])
        stream = handle.tensors()
        first = next(stream)
        pid = os.fork()
        rest = [first, *stream]
        assert [name for name, _ in rest] == handle.offset_keys()
        for name, tensor in rest:
            assert (tensor == int(name.split(".")[2])).all()
        if pid == 0:
            os._exit(0)
        assert os.waitpid(pid, 0)[1] == 0
        """,
        str(cold),
    )


def test_the_end_of_the_interpreter_in_the_middle(cold):
    run_python(
        """
        import sys, safetensors.torch, stx_patch
        stx_patch.patch()
        tensors = safetensors.torch.load_file(sys.argv[1])
        """,
        str(cold),
    )


# --- places ---


def test_a_file_of_somebody_else_is_unknown(cold):
    """The system does not tell what it has of it: taken for cold, and right."""
    folder = cold.parent
    while folder != folder.parent and os.stat(folder).st_uid == os.geteuid():
        os.chmod(folder, 0o755)
        folder = folder.parent
    cold.chmod(0o644)
    if os.geteuid() != 0:  # then every file of ours is ours: nothing to prove
        return
    run_python(
        """
        import os, sys, torch, safetensors.torch, stx_patch
        torch.set_num_threads(1)
        safetensors.torch.load(safetensors.torch.save({"a": torch.ones(1)}))
        stx_patch.patch()
        safetensors.safe_open
        os.setgid(65534), os.setuid(65534)
        tensors = safetensors.torch.load_file(sys.argv[1])
        assert all((t == int(n.split(".")[2])).all() for n, t in tensors.items())
        found = stx_patch.stats()
        assert (found.files_unknown, found.files_cold, found.files_warm) == (1, 0, 0), found
        owned = safetensors.torch.load_file(sys.argv[1], backend="pread")
        assert all((t == int(n.split(".")[2])).all() for n, t in owned.items())
        """,
        str(cold),
    )


LOAD_ALL = """
import sys, torch, safetensors.torch, stx_patch
path = sys.argv[1]
for backend in ("mmap", "pread"):
    for options in ({}, {"direct_io": "on"}, {"engine": "threads"}):
        with stx_patch.patched(**options) as report:
            tensors = safetensors.torch.load_file(path, backend=backend)
            assert all((t == int(n.split(".")[2])).all() for n, t in tensors.items())
            with stx_patch.safe_open(path, backend=backend) as handle:
                for n, t in handle.tensors():
                    assert (t == int(n.split(".")[2])).all()
            assert report.fallbacks == {}, report
"""

MOUNTS = {
    "tmpfs": "mount -t tmpfs none {m} && cp {f} {m}/file",
    "read-only": "mount -t tmpfs none {m} && cp {f} {m}/file && mount -o remount,ro {m}",
    "overlay": "mkdir {d}/l {d}/u {d}/w && cp {f} {d}/l/file && "
    "mount -t overlay none -o lowerdir={d}/l,upperdir={d}/u,workdir={d}/w {m} || "
    # a folder that is an overlay itself cannot hold one's upper layer
    "(mount -t tmpfs none {d} && mkdir {d}/l {d}/u {d}/w {d}/m && cp {f} {d}/l/file && "
    "mount -t overlay none -o lowerdir={d}/l,upperdir={d}/u,workdir={d}/w {m})",
}


@pytest.mark.parametrize("kind", MOUNTS)
def test_kinds_of_file_systems(cold, tmp_path_factory, kind):
    place, folder = tmp_path_factory.mktemp("mount"), tmp_path_factory.mktemp("layers")
    if subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode != 0:
        place = cold.parent  # mounts are not allowed here: on what there is
        (place / "file").write_bytes(cold.read_bytes())
        mount = "true"
    else:
        mount = MOUNTS[kind].format(m=place, d=folder, f=cold)
    script = folder.with_name(folder.name + ".py")
    script.write_text(LOAD_ALL)
    command = f"{mount} && exec {sys.executable} {script} {place}/file"
    isolated = ["unshare", "-m"] if mount != "true" else []
    done = subprocess.run([*isolated, "sh", "-c", command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# --- little of everything ---


def test_no_memory_may_be_locked_and_few_descriptors_are_left(tmp_path):
    """100 shards under a limit of 64 descriptors, by each way of reading."""
    for i in range(100):
        path = tmp_path / f"{i}.safetensors"
        safetensors.torch.save_file({name_of(i): torch.full((MIB // 2,), float(i))}, path)
        drop_from_cache(path)
    run_python(
        """
        import resource, sys, torch, safetensors, safetensors.torch, stx_patch
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (0, 0))
        resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
        stx_patch.patch(direct_io="on")
        held = []
        for i in range(100):
            path = f"{sys.argv[1]}/{i}.safetensors"
            handle = safetensors.safe_open(path, "pt")  # mapped: no descriptor stays
            held.append((handle, safetensors.torch.load_file(path, backend="pread")))
            held.append((None, dict(stx_patch.safe_open(path).tensors())))
            held.append((None, handle.get_tensors()))
        for _, tensors in held:
            for name, tensor in tensors.items():
                assert (tensor == int(name.split(".")[2])).all()
        assert stx_patch.stats().fallbacks == {}
        """,
        str(tmp_path),
    )
