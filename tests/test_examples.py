"""Proves: the examples of README.md, docs/USAGE.md and docs/EXTRACT.md run as they stand, and print
what they show.

The recipes of docs/FILTERS.md have tests of their own (test_recipes.py).
"""

import contextlib
import doctest
import os
import re
import sys
from pathlib import Path

import pytest
import safetensors
import safetensors.torch
import torch
from patch_helpers import drop_from_cache, leaves_stock  # noqa: F401

import stx_patch
from stx_patch import filters

ROOT = Path(__file__).resolve().parent.parent
LAYER = 1 << 20  # elements of four bytes


def blocks(document):
    """(line, text) of each Python example."""
    text = (ROOT / document).read_text()
    return [
        (text.count("\n", 0, found.start()) + 1, found[1])
        for found in re.finditer(r"```python\n(.*?)```", text, re.DOTALL)
    ]


EXAMPLES = [
    pytest.param(text, id=f"{Path(document).stem}-{line}")
    for document in ("README.md", "docs/USAGE.md", "docs/EXTRACT.md")
    for line, text in blocks(document)
]


def test_all_of_them_are_found():
    assert len(EXAMPLES) >= 8


@pytest.fixture
def world(tmp_path, monkeypatch):
    """What the examples take for granted: names, and files in the current folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    names = [f"model.layers.{number}.self_attn.q_proj.weight" for number in range(8)]
    tensors = {name: torch.full((LAYER,), float(n)) for n, name in enumerate(names)}
    safetensors.torch.save_file(tensors, "model.safetensors")
    model = save_sharded_model(tmp_path / "folder/of/a/model")
    os.symlink(model, tmp_path / "llama")
    os.symlink(model, tmp_path / "model")
    for file in model.iterdir():
        (tmp_path / "folder" / file.name).symlink_to(file)
    assert drop_from_cache(tmp_path / "model.safetensors")
    shown, sent = [], []
    namespace = {
        "stx_patch": stx_patch,
        "filters": filters,
        "torch": torch,
        "name": names[3],
        "path": "model.safetensors",
        "sent": sent,
        "send": sent.append,
        "send_header": lambda size_bytes: None,
        "show": lambda done_bytes, total_bytes: shown.append((done_bytes, total_bytes)),
    }
    return namespace, shown


def save_sharded_model(folder):
    from consumers.tiny import llama_config
    from transformers import LlamaForCausalLM

    LlamaForCausalLM(llama_config()).save_pretrained(folder, max_shard_size="20KB")
    return folder


@pytest.mark.parametrize("text", EXAMPLES)
def test_it_runs_as_it_stands(text, world):
    if "cuda" in text and ">>>" not in text and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    namespace, shown = world
    stx_patch.reset_stats()
    if "AutoModelForCausalLM" in text:
        from transformers import AutoModelForCausalLM

        namespace |= {"AutoModelForCausalLM": AutoModelForCausalLM, "path": "llama"}
    if "fallbacks" in text:
        hand_over()
    try:
        if ">>>" in text:
            run_dialogue(text, namespace)
        else:
            exec(compile(text, "example", "exec"), namespace)
        if "path, progress=show" in text:
            assert shown[-1] == (8 * LAYER * 4, 8 * LAYER * 4)
        if "extract_stream" in text:
            assert sum(map(len, namespace["sent"])) == namespace["stream"].size_bytes > 0
        if "AutoModelForCausalLM" in text:
            assert namespace["model"] is not None and stx_patch.stats().keys_skipped > 0
    finally:
        stx_patch.unpatch()
        if sys.modules.pop("stx_patch.auto", None):  # others look whether it was imported
            del stx_patch.auto


def hand_over():
    """The calls that the example's counters are about."""
    import safetensors.numpy

    stx_patch.patch()
    safetensors.safe_open("model.safetensors", "np")
    for _ in range(2):
        with contextlib.suppress(AssertionError, RuntimeError, safetensors.SafetensorError):
            safetensors.torch.load_file("model.safetensors", device="cuda:0")


def run_dialogue(text, namespace):
    text = re.sub("in the page cache now: .*", "in the page cache now: ...", text)  # the header's
    test = doctest.DocTestParser().get_doctest(text, namespace, "example", None, None)
    said = []
    runner = doctest.DocTestRunner(verbose=False, optionflags=doctest.ELLIPSIS)
    results = runner.run(test, out=said.append)
    assert results.attempted > 0 and results.failed == 0, "".join(said)
