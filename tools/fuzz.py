#!/usr/bin/env python3
"""Builds and runs the libFuzzer target of the header parser, under ASan and UBSan.

    tools/fuzz.py [seconds]      60 where none are given; exit status 1 on a finding

Starts from the inputs kept in tests/fuzz/corpus/ and adds what it finds new to .fuzz/corpus/, which
stays on the machine; `--merge` then brings the kept ones up to date with the smallest set that
covers the same. A finding is left in .fuzz/ and told by libFuzzer with its bytes. tests/test_c.py
runs the kept inputs without libFuzzer.
"""

import argparse
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
WORK = ROOT / ".fuzz"
KEPT = ROOT / "tests" / "fuzz" / "corpus"
SOURCES = ("err", "dtype", "header", "plan")
SANITIZE = ("-fsanitize=fuzzer,address,undefined", "-fno-sanitize-recover=all", "-g", "-O1")
PIECE_BYTES = 96  # tiny: see tests/fuzz/fuzz_header.c
TOKENS = (
    '"dtype"', '"shape"', '"data_offsets"', '"__metadata__"', '"F4"', '"F32"', '"U8"', '"BOOL"',
    '"F6_E2M3"', '"C64"', '},"', '":{"', "[0,0]", "[0,1]", "[]", "18446744073709551615",
    "18446744073709551616", "-0", "1e308", "null", "true", "\\\\u0000", "\\\\ud83d", "{}",
)  # fmt: skip


def build() -> Path:
    """Compile the target; returns the program."""
    if shutil.which("clang++") is None:
        sys.exit("fuzz: clang not found: apt-get install clang libclang-rt-dev")
    WORK.mkdir(exist_ok=True)
    program = WORK / "fuzz_header"
    common = [*SANITIZE, "-UNDEBUG", f"-DSTX_JSON_PIECE_BYTES={PIECE_BYTES}", f"-I{ROOT / 'csrc'}"]
    objects = []
    files = [ROOT / "csrc" / f"{name}.c" for name in SOURCES]
    for source in (*files, ROOT / "csrc" / "json_simdjson.cpp", ROOT / "tests/fuzz/fuzz_header.c"):
        target = WORK / f"{source.stem}.o"
        if source.suffix == ".cpp":
            language = ["clang++", "-std=c++17", "-fno-exceptions", "-fno-rtti"]
        else:
            language = ["clang", "-std=c11", "-D_GNU_SOURCE"]
        subprocess.run([*language, *common, "-c", source, "-o", target], check=True)
        objects.append(target)
    link = ["clang++", *SANITIZE, *objects, "-lsimdjson", "-o", program]
    subprocess.run(link, check=True)
    return program


def fuzz(program: Path, seconds: int) -> int:
    grown = WORK / "corpus"
    grown.mkdir(exist_ok=True)
    dictionary = WORK / "tokens.dict"
    escaped = (token.replace('"', '\\"') for token in TOKENS)
    dictionary.write_text("".join(f'"{token}"\n' for token in escaped))
    command = [
        program, grown, KEPT, f"-dict={dictionary}", f"-max_total_time={seconds}", "-max_len=4096",
        "-timeout=10", "-rss_limit_mb=2048", "-print_final_stats=1", "-verbosity=1",
        f"-artifact_prefix={WORK}/",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    lines = done.stderr.splitlines()
    if done.returncode != 0:
        print("\n".join(lines[-60:]))
        print("fuzz: FOUND something")
        return 1
    for line in lines:
        if line.startswith(("stat::number_of_executed_units", "stat::new_units_added", "Done ")):
            print(f"fuzz: {line}")
    return 0


def merge(program: Path) -> None:
    smallest = WORK / "merged"
    shutil.rmtree(smallest, ignore_errors=True)
    smallest.mkdir()
    folders = [smallest, KEPT, WORK / "corpus"]
    subprocess.run([program, "-merge=1", *folders], check=True, capture_output=True)
    for old in KEPT.iterdir():
        old.unlink()
    for found in smallest.iterdir():
        shutil.copy(found, KEPT / found.name)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("seconds", nargs="?", type=int, default=60)
    parser.add_argument("--merge", action="store_true", help="bring the kept inputs up to date")
    arguments = parser.parse_args()
    program = build()
    status = fuzz(program, arguments.seconds)
    if status == 0 and arguments.merge:
        merge(program)
    return status


if __name__ == "__main__":
    sys.exit(main())
