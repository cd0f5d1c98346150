#!/usr/bin/env python3
"""clang-tidy over csrc/, as .clang-tidy asks; exit status 1 on a finding. Run by .venv's Python."""

import concurrent.futures
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def analyze(tool: str, includes: list[str], source: Path) -> str:
    """What the tool says about one file; empty if it has nothing to say."""
    if source.suffix == ".cpp":
        language = ["-std=c++17", "-fno-exceptions", "-fno-rtti"]
    else:
        language = ["-std=c11", "-D_GNU_SOURCE", "-DPy_LIMITED_API=0x030A0000"]
    done = subprocess.run(
        [tool, "--quiet", source, "--", *language, f"-I{ROOT / 'csrc'}", *includes],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    return done.stdout + done.stderr if done.returncode != 0 else ""


def main() -> int:
    tool = shutil.which("clang-tidy")
    spec = importlib.util.find_spec("torch")
    if tool is None or spec is None or not spec.submodule_search_locations:
        sys.exit("analyze: clang-tidy or torch not found: apt-get install clang-tidy, make test")
    torch = Path(spec.submodule_search_locations[0], "include")
    includes = [f"-isystem{sysconfig.get_path('include')}", f"-isystem{torch}"]
    sources = sorted([*ROOT.glob("csrc/*.c"), *ROOT.glob("csrc/*.cpp")])
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        found = list(pool.map(lambda source: analyze(tool, includes, source), sources))
    print("".join(found), end="")
    clean = sum(not text for text in found)
    print(f"analyze: {clean} of {len(sources)} files clean")
    return 0 if clean == len(sources) else 1


if __name__ == "__main__":
    sys.exit(main())
