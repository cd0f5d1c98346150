"""Proves: tensors own exactly their storage, behave as torch's own, and outlive everything."""

import copy
import gc
import os
import pickle

import pytest
import safetensors.torch
import torch
from helpers import DTYPE_BITS, STOCK, ours, write_raw

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
    import subprocess
    import sys

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
        "handle = core.open(sys.argv[1], None, Origin())\n"
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
