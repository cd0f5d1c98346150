#!/usr/bin/env python3
"""safetensors' own tests, run with and without the patch in force: the outcomes must be the same.

    tools/upstream.py fetch   at set-up: get sources and second version, once, into .upstream/
    tools/upstream.py run     offline: run them, print the counts; exit status 1 on a difference

The tests come from the source distribution of each version; nothing of them is kept in the
repository. pip asks a source distribution's build backend for its metadata before it hands the file
over. That backend is maturin, which would want Rust, so a throw-away environment gets a stand-in
that answers this one question. The version that .venv does not hold is put into a folder of its own
and comes first on the path.

Run by .venv's interpreter.
"""

import argparse
import collections
import concurrent.futures
import importlib.metadata
import json
import os
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
KEPT = ROOT / ".upstream"
VERSIONS = ("0.8.0", "0.9.0rc1")
MODULES = (
    "test_simple", "test_pt_comparison", "test_pt_model", "test_pread_backend",
    "test_multithreaded", "test_handle",
)  # fmt: skip
LEAST_PASSED = 60  # fewer: the suite is not what it was, and proves less than is claimed here

MATURIN = """
import os


def get_requires_for_build_wheel(config_settings=None):
    return []


def prepare_metadata_for_build_wheel(folder, config_settings=None):
    name = "safetensors-{version}.dist-info"
    os.makedirs(os.path.join(folder, name))
    with open(os.path.join(folder, name, "METADATA"), "w") as file:
        file.write("Metadata-Version: 2.1\\nName: safetensors\\nVersion: {version}\\n")
    with open(os.path.join(folder, name, "WHEEL"), "w") as file:
        file.write("Wheel-Version: 1.0\\n")
    return name
"""


def archive(version: str) -> Path:
    return KEPT / f"safetensors-{version}.tar.gz"


def overlay(version: str) -> Path | None:
    """The folder that holds `version`, or None where .venv itself does."""
    installed = importlib.metadata.version("safetensors") == version
    return None if installed else KEPT / f"site-{version}"


def say(text: str) -> None:
    print(f"upstream: {text}", flush=True)


# --- fetch ---


def fetch() -> None:
    KEPT.mkdir(exist_ok=True)
    for version in VERSIONS:
        if not archive(version).exists():
            say(f"fetching the source distribution of safetensors {version}")
            fetch_source(version)
        folder = overlay(version)
        if folder is not None and not folder.exists():
            say(f"installing safetensors {version} into a folder of its own")
            fetch_package(version, folder)


def pip(python: Path | str, *arguments: Path | str) -> None:
    quiet = ("-q", "--disable-pip-version-check", "--no-input")
    subprocess.run([python, "-m", "pip", *arguments, *quiet], check=True)


def fetch_source(version: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        site = next(Path(folder, "lib").glob("python*/site-packages"))
        (site / "maturin.py").write_text(MATURIN.replace("{version}", version))
        pip(
            Path(folder, "bin", "python"), "download", "--no-build-isolation", "--no-deps",
            "--no-binary", "safetensors", "-d", folder, f"safetensors=={version}",
        )  # fmt: skip
        place(Path(folder, archive(version).name), archive(version))


def fetch_package(version: str, target: Path) -> None:
    with tempfile.TemporaryDirectory(dir=KEPT) as folder:
        package = Path(folder, "site")
        pip(sys.executable, "install", "--no-deps", "--target", package, f"safetensors=={version}")
        place(package, target)


def place(made: Path, target: Path) -> None:
    """Move into .upstream/ in one step, so that what is there is whole."""
    if made.is_file():
        whole = target.with_suffix(".part")
        whole.write_bytes(made.read_bytes())
        made = whole
    made.rename(target)


# --- run ---


def run_suite(version: str, patched: bool) -> dict[str, Any]:
    """The results of one run: a fresh copy of the tests, in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        with tarfile.open(archive(version)) as sources:
            if hasattr(tarfile, "data_filter"):  # Python 3.11.4
                sources.extraction_filter = tarfile.data_filter
            sources.extractall(folder)
        tests = Path(folder, f"safetensors-{version}", "bindings", "python")
        results = Path(folder, "results.json")
        path = [str(part) for part in (overlay(version), ROOT / "tests" / "upstream") if part]
        done = subprocess.run(
            [
                sys.executable, "-m", "pytest", "-q", "-p", "stx_upstream_plugin",
                "-p", "no:cacheprovider", "--timeout", "300",
                *(f"tests/{module}.py" for module in MODULES),
            ],
            cwd=tests,
            env={
                **os.environ,
                "PYTHONPATH": os.pathsep.join(path),
                "STX_UPSTREAM_PATCHED": str(int(patched)),
                "STX_UPSTREAM_RESULTS": str(results),
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )  # fmt: skip
        if not results.exists():
            sys.exit(f"upstream: {version}: the tests did not run\n{done.stdout[-3000:]}")
        found: dict[str, Any] = json.loads(results.read_text())
        return found | {"output": done.stdout}


def compare(version: str, plain: dict[str, Any], patched: dict[str, Any]) -> list[str]:
    """What is wrong with a pair of runs, in sentences."""
    wrong = []
    for results in (plain, patched):
        if results["version"] != version:
            wrong.append(f"safetensors {results['version']} was tested")
    if plain["patched"] or not patched["patched"] or not patched["tensors_native"]:
        wrong.append("the patch was in force in the wrong run, or served nothing")
    for test in sorted(plain["outcomes"].keys() | patched["outcomes"].keys()):
        before, after = (results["outcomes"].get(test, "absent") for results in (plain, patched))
        if before != after:
            wrong.append(f"{test}: {before} without the patch, {after} with it")
    if count(plain)["passed"] < LEAST_PASSED:
        wrong.append(f"fewer than {LEAST_PASSED} tests passed without the patch")
    return wrong


def count(results: dict[str, Any]) -> collections.Counter[str]:
    return collections.Counter(results["outcomes"].values())


def summary(results: dict[str, Any]) -> str:
    return ", ".join(f"{number} {outcome}" for outcome, number in sorted(count(results).items()))


def run() -> int:
    begin = time.monotonic()
    status = 0
    for version in VERSIONS:
        with concurrent.futures.ThreadPoolExecutor(2) as pool:
            plain, patched = pool.map(run_suite, (version, version), (False, True))
        say(f"safetensors {version}: {summary(plain)}; patched: {summary(patched)}")
        say(
            f"  patched: {patched['opens']} files and {patched['tensors_native']} tensors native; "
            f"to stock: {patched['fallbacks']}"
        )
        wrong = compare(version, plain, patched)
        for sentence in wrong:
            say(f"  {sentence}")
        if wrong:
            status = 1
            print(patched["output"][-5000:])
    say(f"{'the same' if status == 0 else 'DIFFERENT'} in {time.monotonic() - begin:.0f} s")
    return status


def is_fetched() -> bool:
    folders = [overlay(version) for version in VERSIONS]
    return all(archive(version).exists() for version in VERSIONS) and all(
        folder is None or folder.exists() for folder in folders
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("command", choices=("fetch", "run"))
    if parser.parse_args().command == "fetch":
        fetch()
        return 0
    if not is_fetched():
        sys.exit("upstream: nothing to run: tools/upstream.py fetch")
    return run()


if __name__ == "__main__":
    sys.exit(main())
