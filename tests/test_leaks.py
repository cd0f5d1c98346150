"""Proves: descriptors, mappings, threads, memory: flat over 10,000 loads, failed ones too."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
from helpers import write_raw

SCRIPT = Path(__file__).with_name("leak_scenarios.py")
FLAT = [
    "load_file", "load_file_and_write", "open_and_drop", "every_method", "abandoned_slices",
    "views_outlive", "iterators", "left_by_exception", "dropped_after_close", "failed_open",
    "failed_load", "failed_half_way", "missing_file", "wrong_calls", "raising_filter",
    "raising_late", "raising_by_stock", "callable_filter", "globs", "names", "combined_filter",
    "strict_filter", "empty_filter", "missing_tensor", "closed_handle", "blocks",
    "patch_and_unpatch", "cycle", "tensor_by_stock", "file_by_stock", "other_backend",
    "owned_load", "owned_load_fails", "owned_slices", "owned_handles_abandoned",
    "owned_by_engines", "owned_by_engines_fails",
    "other_framework", "load_bytes", "threads", "dropped_by_another_thread", "forked",
]  # fmt: skip
LEAKING = {
    "leaking_descriptors": "descriptors",
    "leaking_threads": "threads",
    "leaking_handles": "mappings",
    "leaking_pages": "resident_bytes",
    "leaking_objects": "python_blocks",
    "leaking_bytes": "heap_bytes",
}

# What may come and go in a process that leaks nothing.
SLACK_MAPPINGS = 4
SLACK_RESIDENT_BYTES = 1 << 20
SLACK_HEAP_BYTES_PER_CALL = 16  # malloc's smallest block is larger

# Stock itself leaks two small Python objects for each handle it made a tensor from.
OPENS_STOCK = {"tensor_by_stock"}


@pytest.fixture(scope="module")
def grown(tmp_path_factory):
    """Scenario -> what its process holds more at the end than after the warm-up."""
    folder = tmp_path_factory.mktemp("leaks")
    good, bad = folder / "good.safetensors", folder / "bad.safetensors"
    tensors = {
        "matrix": torch.arange(24, dtype=torch.float32).reshape(4, 6),
        "vector": torch.arange(7, dtype=torch.int64),
        "scalar": torch.tensor(1.5),
        "empty": torch.zeros(0, 3),
        "cube": torch.arange(60, dtype=torch.bfloat16).reshape(3, 4, 5),
        "large": torch.zeros(3000),
        "nibbles": torch.zeros(4, 2, dtype=torch.uint8).view(torch.float4_e2m1fn_x2),
    }
    safetensors.torch.save_file(tensors, good, {"format": "pt"})
    bad.write_bytes(good.read_bytes()[:-1])
    entry = '"dtype":"U8","shape":[1],"data_offsets":[0,1]'
    double = write_raw(
        folder / "double", b'{"v":{' + entry.encode() + b'},"v":{' + entry.encode() + b"}}", b"x"
    )
    half = write_raw(
        folder / "half",
        {
            "a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]},
            "b": {"dtype": "F6_E2M3", "shape": [4], "data_offsets": [1, 4]},
        },
        b"abcd",
    )
    done = subprocess.run(
        [sys.executable, SCRIPT, good, bad, double, half],
        capture_output=True,
        text=True,
        timeout=250,
        env={**os.environ, "MALLOC_ARENA_MAX": "1"},  # else threads add one when they collide
    )
    lines = map(json.loads, done.stdout.splitlines())
    return {line["name"]: line for line in lines}, done.stderr


def check_flat(found):
    assert found["descriptors"] == 0
    assert found["threads"] == 0
    assert found["mappings"] <= SLACK_MAPPINGS
    assert found["resident_bytes"] <= SLACK_RESIDENT_BYTES
    assert found["heap_bytes"] < SLACK_HEAP_BYTES_PER_CALL * found["repeats"]
    assert found["python_blocks"] < found["repeats"] or found["name"] in OPENS_STOCK


@pytest.mark.parametrize("name", FLAT)
def test_nothing_grows(grown, name):
    found, errors = grown
    assert name in found, errors
    check_flat(found[name])


@pytest.mark.parametrize(("name", "what"), LEAKING.items())
def test_a_leak_would_show(grown, name, what):
    """The measurement sees one of each, or 24 bytes of the heap, left behind per call."""
    found = grown[0][name]
    if what == "heap_bytes" and found[what] == 0:
        return  # this libc does not tell what its heap holds
    assert found[what] >= found["repeats"]
    with pytest.raises(AssertionError):
        check_flat(found)


def test_every_scenario_is_checked(grown):
    assert sorted(grown[0]) == sorted([*FLAT, *LEAKING]), grown[1]
