#!/usr/bin/env python3
"""Others' own tests, run with and without the patch in force: the outcomes must be the same.

    tools/upstream.py fetch   at set-up: get sources and second version, once, into .upstream/
    tools/upstream.py run     offline: run them, print the counts; exit status 1 on a difference

safetensors' tests, of two versions, and what transformers asks of every model about saving and
loading (tests/upstream/modeling_suite.py gives it three tiny ones). They come from the source
distribution of each; nothing of them is kept in the repository. pip asks a source distribution's
build backend for its metadata before it hands the file over. safetensors' is maturin, which would
want Rust, so a throw-away environment gets a stand-in that answers this one question. The version
of safetensors that .venv does not hold is put into a folder of its own and comes first on the path.

Run by .venv's interpreter.
"""

import argparse
import collections
import dataclasses
import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
KEPT = ROOT / ".upstream"
SUITE = ROOT / "tests" / "upstream"


@dataclasses.dataclass(frozen=True)
class Suite:
    """One package's tests.

    Attributes:
        package, version: whose.
        tests: what pytest is given, relative to `folder`.
        folder: inside the source distribution.
        least: how many have to pass at least; `served`: of them, how many on files of ours. Fewer:
            the suite is not what it was, and proves less than is claimed here.
    """

    package: str
    version: str
    folder: str
    tests: tuple[str, ...]
    least: int
    served: int = 1

    def __str__(self) -> str:
        return f"{self.package} {self.version}"

    @property
    def archive(self) -> Path:
        return KEPT / f"{self.package}-{self.version}.tar.gz"

    @property
    def overlay(self) -> Path | None:
        """The folder that holds this version, or None where .venv itself does."""
        installed = importlib.metadata.version(self.package) == self.version
        return None if installed else KEPT / f"site-{self.version}"


MODULES = (
    "test_simple", "test_pt_comparison", "test_pt_model", "test_pread_backend",
    "test_multithreaded", "test_handle",
)  # fmt: skip
SUITES = [
    Suite(
        "safetensors", version, "bindings/python", tuple(f"tests/{name}.py" for name in MODULES), 60
    )
    for version in ("0.8.0", "0.9.0rc1")
] + [
    Suite(
        "transformers", importlib.metadata.version("transformers"), ".",
        ("modeling_suite.py",), 60, served=30,
    )
]  # fmt: skip

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


def say(text: str) -> None:
    print(f"upstream: {text}", flush=True)


# --- fetch ---


def fetch() -> None:
    KEPT.mkdir(exist_ok=True)
    for suite in SUITES:
        if not suite.archive.exists():
            say(f"fetching the source distribution of {suite}")
            fetch_source(suite)
        if suite.overlay is not None and not suite.overlay.exists():
            say(f"installing {suite} into a folder of its own")
            fetch_package(suite, suite.overlay)


def pip(python: Path | str, *arguments: Path | str) -> None:
    quiet = ("-q", "--disable-pip-version-check", "--no-input")
    subprocess.run([python, "-m", "pip", *arguments, *quiet], check=True)


def fetch_source(suite: Suite) -> None:
    with tempfile.TemporaryDirectory() as folder:
        python = Path(sys.executable)
        if suite.package == "safetensors":
            subprocess.run([sys.executable, "-m", "venv", folder], check=True)
            site = next(Path(folder, "lib").glob("python*/site-packages"))
            (site / "maturin.py").write_text(MATURIN.replace("{version}", suite.version))
            python = Path(folder, "bin", "python")
        pip(
            python, "download", "--no-build-isolation", "--no-deps",
            "--no-binary", suite.package, "-d", folder, f"{suite.package}=={suite.version}",
        )  # fmt: skip
        place(Path(folder, suite.archive.name), suite.archive)


def fetch_package(suite: Suite, target: Path) -> None:
    wanted = f"{suite.package}=={suite.version}"
    with tempfile.TemporaryDirectory(dir=KEPT) as folder:
        package = Path(folder, "site")
        pip(sys.executable, "install", "--no-deps", "--target", package, wanted)
        place(package, target)


def place(made: Path, target: Path) -> None:
    """Move into .upstream/ in one step, so that what is there is whole."""
    if made.is_file():
        whole = target.with_suffix(".part")
        whole.write_bytes(made.read_bytes())
        made = whole
    made.rename(target)


# --- run ---


def run_suite(suite: Suite, patched: bool) -> dict[str, Any]:
    """The results of one run: a fresh copy of the tests, in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        with tarfile.open(suite.archive) as sources:
            if hasattr(tarfile, "data_filter"):  # Python 3.11.4
                sources.extraction_filter = tarfile.data_filter
            sources.extractall(folder)
        place_of_tests = Path(folder, f"{suite.package}-{suite.version}", suite.folder)
        for test in suite.tests:
            if not (place_of_tests / test).exists():
                shutil.copy(SUITE / test, place_of_tests)
        results = Path(folder, "results.json")
        done = subprocess.run(
            [
                sys.executable, "-m", "pytest", "-q", "-p", "stx_upstream_plugin", "-c", os.devnull,
                "-p", "no:cacheprovider", "--rootdir", ".", "--timeout", "300", *suite.tests,
            ],
            cwd=place_of_tests,
            env={
                **os.environ,
                "HF_HOME": str(Path(folder, "cache")),
                "HF_HUB_OFFLINE": "1",
                "PYTHONPATH": os.pathsep.join(str(part) for part in (suite.overlay, SUITE) if part),
                "STX_UPSTREAM_PACKAGE": suite.package,
                "STX_UPSTREAM_PATCHED": str(int(patched)),
                "STX_UPSTREAM_RESULTS": str(results),
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )  # fmt: skip
        if not results.exists():
            sys.exit(f"upstream: {suite}: the tests did not run\n{done.stdout[-3000:]}")
        found: dict[str, Any] = json.loads(results.read_text())
        return found | {"output": done.stdout}


def compare(suite: Suite, plain: dict[str, Any], patched: dict[str, Any]) -> list[str]:
    """What is wrong with a pair of runs, in sentences."""
    wrong = []
    for results in (plain, patched):
        if results["version"] != suite.version:
            wrong.append(f"{suite.package} {results['version']} was tested")
    if plain["patched"] or not patched["patched"] or not patched["tensors_native"]:
        wrong.append("the patch was in force in the wrong run, or served nothing")
    for test in sorted(plain["outcomes"].keys() | patched["outcomes"].keys()):
        before, after = (results["outcomes"].get(test, "absent") for results in (plain, patched))
        if before != after:
            wrong.append(f"{test}: {before} without the patch, {after} with it")
    if count(plain)["passed"] < suite.least:
        wrong.append(f"fewer than {suite.least} tests passed without the patch")
    if len(passed_natively(patched)) < suite.served:
        wrong.append(f"fewer than {suite.served} tests passed on files that we served")
    return wrong


def passed_natively(results: dict[str, Any]) -> list[str]:
    return [test for test in results["served"] if results["outcomes"][test] == "passed"]


def count(results: dict[str, Any]) -> collections.Counter[str]:
    return collections.Counter(results["outcomes"].values())


def summary(results: dict[str, Any]) -> str:
    return ", ".join(f"{number} {outcome}" for outcome, number in sorted(count(results).items()))


def run() -> int:
    begin = time.monotonic()
    status = 0
    for suite in SUITES:
        plain, patched = run_suite(suite, False), run_suite(suite, True)
        say(f"{suite}: {summary(plain)}; patched: {summary(patched)}")
        say(
            f"  patched: {patched['opens']} files and {patched['tensors_native']} tensors native, "
            f"in {len(passed_natively(patched))} tests that passed; to stock: "
            f"{patched['fallbacks']}"
        )
        wrong = compare(suite, plain, patched)
        for sentence in wrong:
            say(f"  {sentence}")
        if wrong:
            status = 1
            print(patched["output"][-5000:])
    say(f"{'the same' if status == 0 else 'DIFFERENT'} in {time.monotonic() - begin:.0f} s")
    return status


def is_fetched() -> bool:
    return all(
        suite.archive.exists() and (suite.overlay is None or suite.overlay.exists())
        for suite in SUITES
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
