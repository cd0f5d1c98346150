"""Proves: the loading loops of servers that are too large to be installed here give under the patch
what they give without it, natively, and with a filter read what they keep.

Each loop follows the function named at it, as to which calls it makes of safetensors, in which
order and from which threads.
"""

import concurrent.futures
import os
import re
import threading

import pytest
import safetensors
import safetensors.torch
import torch
from helpers import facts
from patch_helpers import PageCache, drop_from_cache, leaves_stock, settle  # noqa: F401

import stx_patch
from stx_patch import filters

KIB = 1 << 10
SHARDS, LAYERS, EXPERTS = 4, 8, 8
WEIGHT = (64, 1024)  # 256 KiB of float32


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """A mixture of experts, its layers over four files; each path."""
    folder = tmp_path_factory.mktemp("replay")
    generator = torch.Generator().manual_seed(1)
    paths = []
    for shard in range(SHARDS):
        tensors = {}
        for layer in range(shard * LAYERS // SHARDS, (shard + 1) * LAYERS // SHARDS):
            prefix = f"model.layers.{layer}"
            for part in ("q_proj", "o_proj"):
                tensors[f"{prefix}.self_attn.{part}.weight"] = torch.randn(
                    WEIGHT, generator=generator
                )
            for expert in range(EXPERTS):
                tensors[f"{prefix}.mlp.experts.{expert}.up_proj.weight"] = torch.randn(
                    WEIGHT, generator=generator
                )
            tensors[f"{prefix}.input_layernorm.weight"] = torch.ones(64).to(torch.bfloat16)
        path = folder / f"model-{shard + 1:05}-of-{SHARDS:05}.safetensors"
        safetensors.torch.save_file(tensors, path, {"format": "pt"})
        paths.append(str(path))
    return paths


def expert_of(name):
    found = re.search(r"\.experts\.(\d+)\.", name)
    return None if found is None else int(found[1])


class Model:
    """Parameters that exist, into which a loader copies, as servers have them."""

    def __init__(self, paths):
        self.parameters = {}
        for path in paths:
            for name, tensor in safetensors.torch.load_file(path).items():
                self.parameters[name] = torch.full_like(tensor, 7)

    def copy(self, name, tensor):
        self.parameters[name].copy_(tensor)


# --- vLLM 0.33, model_executor.model_loader.weight_utils ---


def vllm_default(paths, skip):
    """`safetensors_weights_iterator`: files in natural order, names as `keys()` has them."""
    for path in sorted(paths, key=lambda path: [int(n) for n in re.findall(r"\d+", path)]):
        with safetensors.safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                if skip(name):
                    continue
                yield name, file.get_tensor(name)


def vllm_eager(paths, skip):
    """The same with `safetensors_load_strategy="eager"`: the file's bytes through `load`."""
    for path in paths:
        with open(path, "rb") as file:
            tensors = safetensors.torch.load(file.read())
        for name, tensor in tensors.items():
            if not skip(name):
                yield name, tensor


def vllm_threads(paths, skip):
    """`multi_thread_safetensors_weights_iterator`: whole files in a pool, as they come."""
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        pending = [pool.submit(safetensors.torch.load_file, path, device="cpu") for path in paths]
        for future in concurrent.futures.as_completed(pending):
            tensors = future.result()
            for name in list(tensors):
                tensor = tensors.pop(name)
                if not skip(name):
                    yield name, tensor


# --- sglang 0.5.23, srt.model_loader.weight_utils ---


def sglang_window(paths, skip, window=3):
    """`buffered_multi_thread_safetensors_weights_iterator`: some files ahead, all names each."""

    def load(path):
        with safetensors.safe_open(path, framework="pt", device="cpu") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118

    with concurrent.futures.ThreadPoolExecutor(window) as pool:
        pending = [pool.submit(load, path) for path in paths[:window]]
        for number in range(len(paths)):
            tensors = pending.pop(0).result()
            if number + window < len(paths):
                pending.append(pool.submit(load, paths[number + window]))
            for name in sorted(tensors):
                if not skip(name):
                    yield name, tensors[name]


# --- ComfyUI 0.3.64, comfy.utils.load_torch_file ---


def comfyui(paths, skip):
    """One handle per file, each tensor by name, the metadata at the end."""
    for path in paths:
        found = {}
        with safetensors.safe_open(path, framework="pt", device="cpu") as file:
            for name in file.keys():  # noqa: SIM118
                found[name] = file.get_tensor(name)
            assert file.metadata() == {"format": "pt"}
        for name in list(found):
            tensor = found.pop(name)
            if not skip(name):
                yield name, tensor


LOOPS = [vllm_default, vllm_eager, vllm_threads, sglang_window, comfyui]
each_loop = pytest.mark.parametrize("loop", LOOPS, ids=lambda loop: loop.__name__)


def nothing(name):
    return False


def run(loop, paths, skip=nothing):
    """The names in the order in which they came, and all tensors, kept to the end."""
    pairs = list(loop(paths, skip))
    if loop in (vllm_threads, vllm_eager):  # as the pool has it; as stock's hash map has it
        pairs.sort(key=lambda pair: pair[0])
    return [name for name, _ in pairs], {name: facts(tensor) for name, tensor in pairs}


@each_loop
@pytest.mark.parametrize("cache", ["cold", "warm"])
def test_a_loop_gives_what_it_gives_without_the_patch(shards, loop, cache):
    expected = run(loop, shards)
    if cache == "cold":
        for path in shards:
            drop_from_cache(path)
    with stx_patch.patched() as report:
        found = run(loop, shards)
        assert report.fallbacks == {} and report.tensors_native == len(expected[0])
    assert found[0] == expected[0] and found[1].keys() == expected[1].keys()
    for name, seen in found[1].items():
        if loop is vllm_eager:  # stock's storage there is a bytearray's
            assert (seen["bytes"], seen["dtype"]) == (
                expected[1][name]["bytes"],
                expected[1][name]["dtype"],
            )
        else:
            assert seen == expected[1][name]


@each_loop
def test_skipping_other_experts_and_a_filter_are_the_same(shards, loop):
    def is_foreign(name):
        return expert_of(name) not in (None, 2, 3)

    expected = run(loop, shards, is_foreign)
    with stx_patch.patched(tensor_filter=filters.experts([2, 3])):
        assert run(loop, shards) == run(loop, shards, is_foreign)
        found = run(loop, shards)
    assert found[0] == expected[0]
    for name, seen in found[1].items():
        assert seen["bytes"] == expected[1][name]["bytes"]


@each_loop
def test_copied_into_a_model_by_thirty_two_threads(shards, loop):
    """As sglang does it: the threads touch the tensors, not the one that loaded them."""
    expected = {
        name: tensor
        for path in shards
        for name, tensor in safetensors.torch.load_file(path).items()
    }
    model = Model(shards)
    for path in shards:
        drop_from_cache(path)
    kept = []
    with stx_patch.patched(), concurrent.futures.ThreadPoolExecutor(32) as pool:
        pending = []
        for name, tensor in loop(shards, nothing):
            kept.append(tensor)
            pending.append(pool.submit(model.copy, name, tensor))
        for future in pending:
            future.result()
    assert len(kept) == len(expected)
    for name, tensor in expected.items():
        assert torch.equal(model.parameters[name], tensor)


@pytest.mark.parametrize("loop", [vllm_default, vllm_threads, sglang_window, comfyui])
def test_an_expert_filter_reads_what_it_keeps(shards, loop):
    for path in shards:
        drop_from_cache(path)
    model_bytes = sum(os.path.getsize(path) for path in shards)
    kept_bytes = 0
    with stx_patch.patched(tensor_filter=filters.experts([1, 6])):
        for _name, tensor in loop(shards, nothing):
            kept_bytes += tensor.nbytes
            tensor.sum()
    settle()
    resident_bytes = 0
    for path in shards:
        cache = PageCache(path)
        resident_bytes += cache.resident_bytes(0, os.path.getsize(path))
        cache.close()
    headers_bytes = len(shards) * 64 * KIB
    assert kept_bytes < 0.5 * model_bytes
    assert 0.9 * kept_bytes <= resident_bytes <= 1.05 * kept_bytes + headers_bytes


def test_threads_of_a_server_that_patches_late(shards):
    """A loop that is running when the patch comes, and when it goes."""
    expected = run(vllm_default, shards)
    go_on, begun, found = threading.Event(), threading.Event(), []

    def slow(name):
        begun.set()
        go_on.wait()
        return False

    thread = threading.Thread(target=lambda: found.append(run(vllm_default, shards, slow)))
    thread.start()
    begun.wait()
    with stx_patch.patched():
        go_on.set()
        thread.join()
    assert found == [expected]
