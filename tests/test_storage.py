"""Proves: tensors own exactly their storage, behave as torch's own, and outlive everything."""

import copy
import gc
import os
import pickle
import re
import subprocess
import sys
import weakref

import numpy as np
import pytest
import safetensors.torch
import torch
from helpers import DTYPE_BITS, STOCK, facts, ours, outcome, write_raw

import stx_patch


def mapped_lines(path):
    with open("/proc/self/maps") as maps:
        return [line for line in maps if line.rstrip().endswith(str(path))]


def test_each_tensor_is_complete(sample):
    tensors = stx_patch.load_file(sample)
    assert type(tensors) is dict
    for tensor in tensors.values():
        assert tensor.untyped_storage().nbytes() == tensor.nbytes
        assert tensor.storage_offset() == 0 and tensor.is_contiguous()
        assert not tensor.untyped_storage().resizable()
        assert not tensor.is_shared() and not tensor.requires_grad
        assert type(tensor) is torch.Tensor
        assert safetensors.torch._is_complete(tensor) or tensor.numel() == 0
    shared = safetensors.torch._find_shared_tensors(tensors)
    assert all(len(names) == 1 for names in shared)


def test_one_name_is_one_memory_and_two_handles_are_two(sample):
    handle, other = ours(sample), ours(sample)
    first, second = handle.get_tensor("matrix"), handle.get_tensor("matrix")
    view = handle.get_slice("matrix")[1:]
    assert first.data_ptr() == second.data_ptr() == view.data_ptr() - first[0].nbytes
    first.fill_(5)
    assert second[2, 2] == 5 and view[0, 0] == 5
    assert other.get_tensor("matrix")[0, 1] == 1
    assert other.get_tensor("matrix").data_ptr() != first.data_ptr()


def test_writes_never_reach_the_file(sample):
    before = sample.read_bytes()
    for tensor in stx_patch.load_file(sample).values():
        tensor.zero_()
    assert sample.read_bytes() == before
    assert ours(sample).get_tensor("vector").tolist() == list(range(7))


@pytest.mark.parametrize("end", ["close", "drop", "unpatch", "delete", "replace"])
def test_tensors_outlive_everything(sample, end):
    stx_patch.patch()
    handle = safetensors.safe_open(sample, framework="pt")
    tensor, slice_ = handle.get_tensor("matrix"), handle.get_slice("vector")
    if end == "close":
        handle.__exit__(None, None, None)
    elif end == "drop":
        del handle
        gc.collect()
    elif end == "delete":
        sample.unlink()
    elif end == "replace":
        other = sample.with_name("other")
        safetensors.torch.save_file({"matrix": torch.full((4, 6), -1.0)}, other)
        os.replace(other, sample)
    stx_patch.unpatch()
    assert tensor.flatten().tolist() == list(range(24))
    assert slice_[:].tolist() == list(range(7))
    tensor += 1
    assert tensor[0, 0] == 1


def test_a_replaced_file_is_not_mixed_up(sample):
    """What only stock serves is refused once the file at that path is another one."""
    header = {"a": {"dtype": "F6_E2M3", "shape": [4], "data_offsets": [0, 3]}}
    write_raw(sample, header, b"abc")
    handle = ours(sample)
    other = write_raw(sample.with_name("other"), header, b"xyz")
    os.replace(other, sample)
    with pytest.raises(STOCK.SafetensorError, match="has changed since it was opened"):
        handle.get_tensor("a")


def test_the_mapping_goes_with_its_last_user(sample):
    handle = ours(sample)
    tensor, slice_ = handle.get_tensor("matrix"), handle.get_slice("cube")
    view = tensor[1:3]
    assert len(mapped_lines(sample)) == 1
    del handle, tensor, slice_
    assert len(mapped_lines(sample)) == 1
    assert view.tolist() == [[6, 7, 8, 9, 10, 11], [12, 13, 14, 15, 16, 17]]
    del view
    assert mapped_lines(sample) == []


def test_an_empty_tensor_keeps_nothing(sample):
    empty = ours(sample).get_tensor("empty")
    assert empty.shape == (0, 3) and mapped_lines(sample) == []


def test_no_descriptor_stays_open(sample):
    before = len(os.listdir("/proc/self/fd"))
    handles = [ours(sample) for _ in range(100)]
    tensors = [handle.get_tensor("matrix") for handle in handles]
    assert len(os.listdir("/proc/self/fd")) == before
    assert len(tensors) == 100


def test_saving_copying_and_pickling(sample, tmp_path):
    tensors = stx_patch.load_file(sample)
    torch.save(tensors, tmp_path / "saved.pt")
    safetensors.torch.save_file(tensors, tmp_path / "again", {"format": "pt"})
    assert (tmp_path / "again").read_bytes() == sample.read_bytes()
    for again in (
        torch.load(tmp_path / "saved.pt"),
        copy.deepcopy(tensors),
        pickle.loads(pickle.dumps(tensors)),
        STOCK.load_file(tmp_path / "again"),
    ):
        assert all(torch.equal(tensors[name], again[name]) for name in tensors)


def as_text(value):
    """A repr without addresses."""
    return re.sub("0x[0-9a-f]+", "0x", repr(value))


# What callers do to a tensor or ask of it.
USES = {
    "grow": lambda t: t.resize_(10_000),
    "shrink": lambda t: t.resize_(1).shape,
    "resize storage": lambda t: t.untyped_storage().resize_(4),
    "share memory": lambda t: (t.is_shared(), t.share_memory_().add_(1).sum(), t.is_shared()),
    "numpy": lambda t: (str(t.numpy().flags), t.numpy().strides),
    "array": lambda t: np.asarray(t).sum(),
    "file name": lambda t: t.untyped_storage().filename,
    "pinned": lambda t: (t.is_pinned(), t.untyped_storage().is_pinned()),
    "nature": lambda t: (
        t._is_view(), t._base is None, t.is_leaf, t._version, t.grad_fn, t.layout, t.is_conj(),
        t.is_neg(), t.names, t.__dict__, t.is_contiguous(memory_format=torch.contiguous_format),
    ),
    "version": lambda t: t.add_(1)._version,
    "print": repr,
    "storage": lambda t: (type(t.untyped_storage()), t.untyped_storage().device, t.storage_type()),
    "part of storage": lambda t: t.untyped_storage()[0:4].nbytes(),
    "storage as list": lambda t: t.untyped_storage().tolist()[:8],
    "fill storage": lambda t: t.untyped_storage().fill_(1).tolist()[:3],
    "clone storage": lambda t: t.untyped_storage().clone().resizable(),
    "requires_grad": lambda t: t.requires_grad_().is_leaf,
    "parameter": lambda t: torch.nn.Parameter(t).is_leaf,
    "set_": lambda t: t.set_().shape,
    "set data": lambda t: setattr(t, "data", torch.zeros(3)),
    "set data of another": lambda t: setattr(torch.zeros(3), "data", t),
    "unsqueeze_": lambda t: t.unsqueeze_(0).stride(),
    "dlpack": lambda t: (t.__dlpack_device__(), torch.from_dlpack(t).data_ptr() == t.data_ptr()),
    "clone": lambda t: facts(t.clone()),
    "detach": lambda t: facts(t.detach()),
    "lazy clone": lambda t: facts(torch._lazy_clone(t)),
    "to": lambda t: facts(t.to(torch.float64)),
    "to cpu": lambda t: t.cpu() is t,
    "copy": lambda t: copy.copy(t).data_ptr() == t.data_ptr(),
    "deepcopy": lambda t: facts(copy.deepcopy(t)),
    "pickle": lambda t: facts(pickle.loads(pickle.dumps(t))),
    "size of pickle": lambda t: len(pickle.dumps(t)),
    "strided beyond": lambda t: t.as_strided((10_000,), (1,), 0),
    "bytes": lambda t: facts(t.view(torch.uint8)),
    "swap": lambda t: torch.utils.swap_tensors(t, torch.zeros(2)),
    "weakref": lambda t: weakref.ref(t)() is t,
}  # fmt: skip


@pytest.mark.parametrize("name", USES)
def test_uses_of_a_tensor_as_of_stocks(sample, name):
    for tensor in ("matrix", "vector", "scalar", "empty", "cube"):
        found, expected = (
            outcome(lambda opener=opener, tensor=tensor: USES[name](opener(tensor)))
            for opener in (ours(sample).get_tensor, STOCK.safe_open(sample, "pt").get_tensor)
        )
        assert as_text(found) == as_text(expected), tensor


HOLDERS = {
    "view": lambda t: t[1:].T,
    "numpy": lambda t: t.numpy(),
    "storage": lambda t: t.untyped_storage(),
    "part of storage": lambda t: t.untyped_storage()[4:8],
    "dlpack": torch.from_dlpack,
    "capsule": lambda t: t.__dlpack__(),
    "parameter": torch.nn.Parameter,
    "module": lambda t: torch.nn.Linear(6, 4).load_state_dict(
        {"weight": t, "bias": torch.zeros(4)}, assign=True
    ) and t,
    "chunks": lambda t: t.chunk(2)[1],
    "graph": lambda t: (torch.ones(4, 6, requires_grad=True) * t),
    "memoryview": lambda t: memoryview(t.numpy()),
}  # fmt: skip


@pytest.mark.parametrize("name", HOLDERS)
def test_whatever_holds_memory_holds_the_mapping(sample, name):
    held = HOLDERS[name](ours(sample).get_tensor("matrix"))
    gc.collect()
    assert len(mapped_lines(sample)) == 1
    del held
    gc.collect()
    assert mapped_lines(sample) == []


def test_shared_memory_leaves_the_mapping(sample):
    tensor = ours(sample).get_tensor("matrix").share_memory_()
    assert mapped_lines(sample) == []
    assert tensor.flatten().tolist() == list(range(24))


def test_garbage_gives_up_its_mapping(sample):
    handle = ours(sample)
    ring = [handle, handle.get_tensor("matrix"), handle.get_slice("cube")]
    ring.append(ring)
    del handle, ring
    gc.collect()
    assert mapped_lines(sample) == []


def test_a_refused_or_filtered_out_file_stays_unmapped(sample, tmp_path):
    bad = tmp_path / "bad"
    bad.write_bytes(sample.read_bytes()[:-1])
    assert outcome(stx_patch.safe_open, bad)[0] == "error"

    def refuse(key):
        raise KeyError(key)

    with pytest.raises(KeyError):
        stx_patch.safe_open(sample, tensor_filter=refuse)
    gc.collect()
    assert mapped_lines(bad) == mapped_lines(sample) == []


def test_a_model_of_loaded_tensors_can_be_saved(sample, tmp_path):
    """Tensors adopted by a model are complete, so that every way to save it works."""
    model = torch.nn.Module()
    for name, tensor in stx_patch.load_file(sample).items():
        model.register_buffer(name, tensor)
    model.register_buffer("tied", model.matrix)
    safetensors.torch.save_model(model, tmp_path / "model")
    again = STOCK.load_file(tmp_path / "model")
    assert len(again) == 5 and torch.equal(again["vector"], model.vector)
    torch.save(model.matrix, tmp_path / "one.pt")
    assert (tmp_path / "one.pt").stat().st_size < 4000, "the whole file was saved with it"


def test_a_file_may_be_overwritten_by_saving_what_it_holds(sample):
    """save_file() writes beside the file and renames, while its tensors are still mapped."""
    tensors = stx_patch.load_file(sample)
    tensors["matrix"].add_(1)
    safetensors.torch.save_file(tensors, sample)
    again = stx_patch.load_file(sample)
    assert again["matrix"][3, 5] == 24 == tensors["matrix"][3, 5]
    assert again["vector"].tolist() == list(range(7))


def test_large_files_are_mapped_at_huge_pages(tmp_path):
    """Base and length as the kernel wants them, and no address space left behind."""
    path = tmp_path / "large"
    safetensors.torch.save_file({"t": torch.ones(3 << 20, dtype=torch.uint8)}, path)
    tensor = ours(path).get_tensor("t")
    (line,) = mapped_lines(path)
    begin, end = (int(part, 16) for part in line.split()[0].split("-"))
    assert begin % (2 << 20) == 0 and "rw-p" in line
    assert 0 <= end - begin - path.stat().st_size < 65536
    assert tensor.sum() == 3 << 20


def test_a_process_may_end_with_everything_open(sample):
    """Handles, tensors and slices in globals and cycles, and threads inside an open.

    (A daemon thread inside torch aborts the process by itself, also without us.)
    """
    script = """
import gc, sys, threading, torch, safetensors.torch, stx_patch
stx_patch.patch()
handle = safetensors.safe_open(sys.argv[1], "pt")
tensors, slice_ = handle.get_tensors(), handle.get_slice("cube")
torch.kept = sys.kept = [handle, tensors, slice_, tensors["matrix"].numpy()]
ring = [safetensors.safe_open(sys.argv[1], "pt")]
ring.append(ring)
class Late:
    def __del__(self, handle=handle, load=stx_patch.load_file):
        handle.get_tensor("vector").sum()
late = Late()
def work(started):
    while True:
        safetensors.safe_open(sys.argv[1], "pt").keys()
        started.set()
for _ in range(3):
    started = threading.Event()
    threading.Thread(target=work, args=(started,), daemon=True).start()
    started.wait()
print("end")
"""
    done = subprocess.run(
        [sys.executable, "-c", script, str(sample)], capture_output=True, text=True, timeout=100
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "end\n", "")


@pytest.mark.parametrize("enabled", [True, False])
def test_collections_are_left_as_they_were(sample, tmp_path, enabled):
    """They wait while a dict is built, also one that fails half-way."""
    entries = {
        "a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]},
        "b": {"dtype": "F6_E2M3", "shape": [4], "data_offsets": [1, 4]},
    }
    failing = ours(write_raw(tmp_path / "f", entries, b"abcd"))
    if not enabled:
        gc.disable()
    try:
        ours(sample).get_tensors()
        assert gc.isenabled() == enabled
        with pytest.raises(STOCK.SafetensorError):
            failing.get_tensors()
        assert gc.isenabled() == enabled
    finally:
        gc.enable()


def test_tensors_work_with_autograd_and_in_place(sample):
    tensor = stx_patch.load_file(sample)["matrix"].requires_grad_()
    (tensor * 2).sum().backward()
    assert torch.equal(tensor.grad, torch.full((4, 6), 2.0))
    parameter = torch.nn.Parameter(stx_patch.load_file(sample)["matrix"])
    with torch.no_grad():
        parameter.add_(1)
    assert parameter[0, 0] == 1


def test_every_dtype_by_capsule_too(tmp_path):
    """Older torch takes a capsule instead of the table of C functions: the same tensors."""
    header, at = {}, 0
    for dtype, bits in DTYPE_BITS.items():
        if not dtype.startswith("F6"):
            header[dtype] = {"dtype": dtype, "shape": [2, 4], "data_offsets": [at, at + bits]}
            at += bits
            header[dtype + "0"] = {"dtype": dtype, "shape": [0, 2], "data_offsets": [at, at]}
    file = write_raw(tmp_path / "f", header, bytes(i % 251 for i in range(at)))
    script = (
        "import sys, torch\n"
        "real, torch.Tensor = torch.Tensor, type('Tensor', (), {})\n"
        "import stx_patch._C as core\n"
        "class Origin: identity = None\n"
        "handle = core.open(sys.argv[1], None, Origin(), (0, -1, 0, 0), False)\n"
        "torch.Tensor = real\n"
        "for name, tensor in handle.get_tensors().items():\n"
        "    data = b'' if tensor.numel() == 0 else bytes(tensor.view(torch.uint8).numpy())\n"
        "    print(name, tensor.dtype, tuple(tensor.shape), tensor.stride(), data.hex())\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(file)], capture_output=True, text=True, check=True
    )
    expected = []
    for name, tensor in ours(file).get_tensors().items():
        data = b"" if tensor.numel() == 0 else bytes(tensor.view(torch.uint8).numpy())
        shape, stride = tuple(tensor.shape), tensor.stride()
        expected.append(f"{name} {tensor.dtype} {shape} {stride} {data.hex()}")
    assert done.stdout.splitlines() == expected
