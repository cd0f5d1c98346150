"""Proves on a machine with CUDA: what tests/test_device.py proves over a runtime of ours."""

import pytest
import safetensors.torch
import torch

import stx_patch

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
MIB = 1 << 20


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "model.safetensors"
    tensors = {f"small.{n}": torch.rand(n % 50, 7) for n in range(2000)}
    tensors |= {"large": torch.rand(96 * MIB // 4), "half": torch.rand(4099, 33).half()}
    tensors |= {"ints": torch.arange(1 << 16), "flags": torch.rand(999) > 0.5}
    safetensors.torch.save_file(tensors, path)
    return path


@pytest.mark.parametrize("device", ["cuda", "cuda:0", 0])
def test_load_file_is_stocks(model, device):
    expected = safetensors.torch.load_file(model, device=device)
    with stx_patch.patched() as report:
        found = safetensors.torch.load_file(model, device=device)
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert tensor.device == expected[name].device and tensor.dtype == expected[name].dtype
        assert torch.equal(tensor, expected[name]), name
    assert report.fallbacks == {} and report.tensors_native == len(expected)
    assert report.loads_pageable == 0


def test_on_a_stream_of_the_callers(model):
    """Memory that a queued kernel still writes to is not filled before; what follows sees it."""
    expected = safetensors.torch.load_file(model)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            noise = torch.full((96 * MIB // 4,), 7.0, device="cuda")
            torch.cuda._sleep(1_000_000_000)
            noise.mul_(1.01)
            del noise  # the allocator gives it to the load
            found = stx_patch.load_file(model, device="cuda")
            doubled = found["large"] * 2
            assert torch.equal(doubled.cpu(), expected["large"] * 2)


def test_handle_slices_and_stream(model):
    expected = safetensors.torch.load_file(model)
    with stx_patch.safe_open(model, device="cuda") as handle:
        assert torch.equal(handle.get_slice("half")[5:9, 1:3].cpu(), expected["half"][5:9, 1:3])
        assert torch.equal(handle.get_tensor("flags").cpu(), expected["flags"])
        for name, tensor in handle.tensors():
            assert tensor.is_cuda and torch.equal(tensor.cpu(), expected[name]), name


def test_conversion_needs_the_result_and_one_window(model):
    expected = safetensors.torch.load_file(model)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    found = stx_patch.load_file(model, device="cuda", dtype=torch.bfloat16)
    peak = torch.cuda.max_memory_allocated() - before
    assert peak <= sum(tensor.nbytes for tensor in found.values()) + 66 * MIB
    for name, tensor in expected.items():
        wanted = tensor.bfloat16() if tensor.is_floating_point() else tensor
        assert torch.equal(found[name].cpu(), wanted), name


def test_from_pretrained(tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=512, hidden_size=256, intermediate_size=512, num_hidden_layers=4,
        num_attention_heads=8, num_key_value_heads=4,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    for dtype in (torch.float32, torch.bfloat16):
        plain = LlamaForCausalLM.from_pretrained(tmp_path, device_map="cuda", dtype=dtype)
        with stx_patch.patched() as report:
            ours = LlamaForCausalLM.from_pretrained(tmp_path, device_map="cuda", dtype=dtype)
        for left, right in zip(ours.parameters(), plain.parameters(), strict=True):
            assert left.device == right.device and torch.equal(left, right)
        assert report.bytes_to_device > 0
