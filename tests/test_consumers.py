"""Real libraries load the same with us as without us, down to strides, ties and what they save, and
natively: also where stock can open no file and torch can map none."""

import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from consumers import (
    accelerate_models,
    diffusers_models,
    peft_models,
    safetensors_users,
    sentence_transformers_models,
    timm_models,
    transformers_models,
)
from consumers.harness import MODES
from patch_helpers import clean_environment

LIMIT_SECONDS = 290
CONSUMERS = {
    "safetensors_users": safetensors_users,
    "accelerate_models": accelerate_models,
    "diffusers_models": diffusers_models,
    "peft_models": peft_models,
    "transformers_models": transformers_models,
    "sentence_transformers_models": sentence_transformers_models,
    "timm_models": timm_models,
}
SCENARIOS = [
    (name, scenario) for name, module in CONSUMERS.items() for scenario in module.SCENARIOS
]


@pytest.fixture(scope="module")
def results_of():
    """What a consumer's modes returned: a function of its name. Each consumer runs once."""
    folders = []

    @functools.cache
    def run(consumer):
        folder = Path(tempfile.mkdtemp(prefix="stx-consumers-"))
        folders.append(folder)
        environment = clean_environment()
        environment["HF_HOME"] = str(folder / "cache")
        process = subprocess.Popen(
            [sys.executable, "-m", f"consumers.{consumer}", str(folder / "run")],
            cwd=Path(__file__).parent,
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        try:
            _, said = process.communicate(timeout=LIMIT_SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # its forks, too
            _, said = process.communicate()
            said += f"\n{consumer} took more than {LIMIT_SECONDS} s"
        if process.returncode != 0:
            return said  # each test says so, none runs it again
        return {
            path.stem: json.loads(path.read_text())
            for path in (folder / "run" / "results").glob("*.json")
        }

    def results(consumer):
        found = run(consumer)
        assert isinstance(found, dict), found
        return found

    yield results
    for folder in folders:
        shutil.rmtree(folder)


def expected_fallbacks(consumer, scenario):
    return getattr(CONSUMERS[consumer], "EXPECTED_FALLBACKS", {}).get(scenario, {})


def differences(expected, found, place=""):
    """Where two results differ, as readable lines."""
    if isinstance(expected, dict) and isinstance(found, dict):
        lines = []
        for name in sorted(expected.keys() | found.keys()):
            if name in expected and name in found:
                lines += differences(expected[name], found[name], f"{place}/{name}")
            else:
                lines.append(f"{place}/{name}: only {'with' if name in found else 'without'} us")
        return lines
    return [] if expected == found else [f"{place}: {expected!r} without us, {found!r} with us"]


@pytest.mark.parametrize(("consumer", "scenario"), SCENARIOS)
def test_the_scenario_works_without_us(results_of, consumer, scenario):
    outcome = results_of(consumer)["stock"][scenario]
    assert "error" not in outcome, outcome["error"]
    assert outcome["opens"] == outcome["tensors_native"] == outcome["tensors_stock"] == 0
    assert outcome["fallbacks"] == {}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("consumer", "scenario"), SCENARIOS)
def test_it_is_the_same_with_us(results_of, consumer, scenario, mode):
    declared = expected_fallbacks(consumer, scenario)
    results = results_of(consumer)
    if mode.startswith("poisoned") and declared:
        assert scenario not in results[mode]  # stock has to serve it
        return
    outcome = results[mode][scenario]
    assert "error" not in outcome, outcome["error"]
    assert differences(results["stock"][scenario]["result"], outcome["result"]) == []
    assert outcome["said"] == results["stock"][scenario]["said"]
    assert outcome["fallbacks"] == declared
    if not declared:
        assert outcome["opens"] + outcome["tensors_native"] > 0 and outcome["tensors_stock"] == 0
    assert outcome["keys_skipped"] == 0


@pytest.mark.parametrize("scenario", transformers_models.FILTERED)
def test_transformers_reports_a_layer_that_a_filter_left_out(results_of, scenario):
    results = results_of("transformers_models")
    outcome = results["filtered"][scenario]
    assert "error" not in outcome, outcome["error"]
    assert outcome["fallbacks"] == {} and outcome["keys_skipped"] > 0
    found = outcome["result"]
    whole = results["stock"]["llama_one_file"]["result"]
    layer = [name for name in whole["tensors"] if name.startswith("model.layers.1.")]
    assert layer and outcome["keys_skipped"] == len(layer)
    assert found["loading"] == {"missing_keys": sorted(layer)}
    assert found["tensors"].keys() == whole["tensors"].keys()
    for name, tensor in found["tensors"].items():
        same_bytes = tensor["bytes"] == whole["tensors"][name]["bytes"]
        if name not in layer:
            assert tensor == whole["tensors"][name], name
        elif "norm" not in name:  # whose weights are ones in the file too
            assert not same_bytes, name  # initialised anew


def test_what_is_checked_is_what_is_meant(results_of):
    """The comparison is not blind: ties, casts and sharding show in it."""
    stock = results_of("transformers_models")["stock"]
    tied = stock["llama_tied"]["result"]["tensors"]
    assert tied["lm_head.weight"]["tied_to"] == "model.embed_tokens.weight"
    untied = stock["llama_one_file"]["result"]["tensors"]
    assert untied["lm_head.weight"]["tied_to"] == "lm_head.weight"
    assert untied["lm_head.weight"]["dtype"] == "torch.float32"
    cast = stock["llama_cast"]["result"]["tensors"]
    assert cast["lm_head.weight"]["dtype"] == "torch.bfloat16"
    on_disk = stock["llama_on_disk"]["result"]["tensors"]
    assert on_disk["model.layers.1.mlp.up_proj.weight"]["device"] == "meta"
    whole, sharded = stock["llama_one_file"]["result"], stock["llama_sharded"]["result"]
    assert whole["tensors"] == sharded["tensors"] and whole["forward"] == sharded["forward"]
    assert whole["forward"] != stock["llama_cast"]["result"]["forward"]
    ranks, undivided = stock["tensor_parallel"]["result"]
    projections = [rank["tensors"]["model.layers.0.mlp.up_proj.weight"] for rank in ranks]
    assert projections[0]["bytes"] != projections[1]["bytes"]
    name = "model.layers.0.mlp.up_proj.weight"
    assert [part["shape"] for part in projections] == [[24, 32]] * 2
    assert undivided["tensors"][name]["shape"] == [48, 32]
    assert any("torch_dtype" in line for line in stock["llama_by_an_old_keyword"]["said"])
    assert stock["llama_with_new_head"]["result"]["loading"]["missing_keys"] == ["score.weight"]
    assert differences({"a": 1}, {"a": 2}) and differences({"a": 1}, {}) and differences([1], [2])
