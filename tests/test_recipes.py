"""Proves: the recipes of docs/FILTERS.md keep what they say, and read no more than that."""

import json
import os
import re
from pathlib import Path

import pytest
import safetensors.torch
import torch
from patch_helpers import PageCache, drop_from_cache, settle

import stx_patch
from stx_patch import filters

ROOT = Path(__file__).resolve().parent.parent
RECIPES = dict(
    re.findall(
        r"```python recipe (\w+)\n(.*?)```", (ROOT / "docs" / "FILTERS.md").read_text(), re.DOTALL
    )
)
LAYERS, DRAFT_LAYERS, EXPERTS, RANKS, RANK = 4, 1, 8, 4, 1
KIB = 1 << 10
WEIGHT_BYTES = 256 * KIB


def names():
    """Of a multimodal mixture of experts with a draft layer and an adapter, in file order."""
    yield from ("model.embed_tokens.weight", "model.visual.patch.weight")
    yield from ("model.vision_tower.0.weight", "model.multi_modal_projector.weight")
    for layer in range(LAYERS + DRAFT_LAYERS):
        prefix = f"model.layers.{layer}"
        yield f"{prefix}.self_attn.q_proj.weight"
        yield f"{prefix}.self_attn.q_proj.lora_A.default.weight"
        yield f"{prefix}.self_attn.q_proj.lora_B.default.weight"
        yield f"{prefix}.mlp.shared_experts.up_proj.weight"
        for expert in range(EXPERTS):
            yield f"{prefix}.mlp.experts.{expert}.up_proj.weight"
            yield f"{prefix}.mlp.experts.{expert}.up_proj.weight_scale"
    yield from ("model.norm.weight", "lm_head.weight")


def is_scale(name):
    return name.endswith("_scale")


def expert_of(name):
    found = re.search(r"\.experts\.(\d+)\.", name)
    return int(found[1]) if found else None


def layer_of(name):
    found = re.search(r"\.layers\.(\d+)\.", name)
    return int(found[1]) if found else None


EXPECTED = {
    "stage": lambda name: layer_of(name) in (0, 1) or "embed_tokens" in name,
    "experts": lambda name: expert_of(name) in (None, 2, 3) or is_scale(name),
    "draft": lambda name: layer_of(name) == LAYERS or "embed" in name or "lm_head" in name,
    "lora": lambda name: "lora" in name,
    "text": lambda name: "visual" not in name and "vision" not in name and "multi" not in name,
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A folder of three shards with an index; name -> path."""
    folder = tmp_path_factory.mktemp("checkpoint")
    everything = list(names())
    weight_map = {}
    for shard in range(3):
        part = everything[shard * len(everything) // 3 : (shard + 1) * len(everything) // 3]
        file = f"model-{shard}.safetensors"
        tensors = {
            name: torch.full((16 if is_scale(name) else WEIGHT_BYTES,), len(name)).byte()
            for name in part
        }
        safetensors.torch.save_file(tensors, folder / file)
        weight_map.update(dict.fromkeys(part, file))
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    return folder, {name: folder / file for name, file in weight_map.items()}


def test_there_is_a_test_for_each_recipe():
    assert RECIPES.keys() == EXPECTED.keys()


def run(recipe, folder):
    given = {
        "stx_patch": stx_patch,
        "filters": filters,
        "model": folder,
        "rank": RANK,
        "ranks": RANKS,
        "experts": EXPERTS,
        "layers": LAYERS,
        "draft_layers": DRAFT_LAYERS,
    }
    exec(RECIPES[recipe], given)
    return given["tensors"]


@pytest.mark.parametrize("recipe", EXPECTED)
def test_a_recipe_keeps_what_it_says(checkpoint, recipe):
    folder, places = checkpoint
    tensors = run(recipe, folder)
    assert set(tensors) == {name for name in places if EXPECTED[recipe](name)}
    for name, tensor in tensors.items():
        assert bool((tensor == len(name)).all())


@pytest.mark.parametrize("recipe", EXPECTED)
def test_a_recipe_reads_what_it_keeps(checkpoint, recipe):
    """Into a page cache that holds nothing of the files: what is there afterwards was read."""
    folder, places = checkpoint
    paths = sorted(set(places.values()))
    for path in paths:
        drop_from_cache(path)
    tensors = run(recipe, folder)
    settle()
    kept_bytes = sum(tensor.nbytes for tensor in tensors.values())
    resident = 0
    for path in paths:
        cache = PageCache(path)
        resident += cache.resident_bytes(0, os.path.getsize(path))
        cache.close()
    # Whole pages, and the headers' first 64 KiB.
    rounding = len(tensors) * 8 * KIB + len(paths) * 80 * KIB
    assert 0.9 * kept_bytes <= resident <= kept_bytes + rounding
