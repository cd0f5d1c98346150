"""Proves: the C core by itself; each program of tests/c runs as one case, under ASan and UBSan, and
as another under TSan."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PROGRAMS = sorted((ROOT / "tests" / "c").glob("test_*.c"))
CORE = sorted(path for path in (ROOT / "csrc").glob("*.c") if not path.name.startswith("py_"))
WARNINGS = ["-Wall", "-Wextra", "-Wshadow", "-Wconversion", "-Werror"]
FUZZ = ROOT / "tests" / "fuzz"
SANITIZERS = ["address,undefined", "thread"]
WRAPPED = re.compile(r"\b__wrap_(\w+)")  # functions of the core that a program stands in for
SKIPPED = 77


def compile_with(compiler, *arguments):
    done = subprocess.run([compiler, *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def sanitize(sanitizer):
    return ["-g", "-O1", "-UNDEBUG", f"-fsanitize={sanitizer}", "-fno-sanitize-recover=all"]


@pytest.fixture(scope="session", params=SANITIZERS)
def core(request, tmp_path_factory):
    """A sanitizer, and the core under it: a static library, without the Python binding."""
    folder = tmp_path_factory.mktemp("core")
    flags = [*WARNINGS, *sanitize(request.param), "-I", ROOT / "csrc"]
    for source in CORE:
        target = folder / f"{source.stem}.o"
        compile_with("gcc", "-std=c11", "-D_GNU_SOURCE", *flags, "-c", source, "-o", target)
    source, target = ROOT / "csrc" / "json_simdjson.cpp", folder / "json_simdjson.o"
    cpp = ["-std=c++17", "-fno-exceptions", "-fno-rtti", *flags]
    compile_with("g++", *cpp, "-c", source, "-o", target)
    library = folder / "libcore.a"
    subprocess.run(["ar", "rcs", library, *sorted(folder.glob("*.o"))], check=True)
    return request.param, library


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda path: path.stem)
def test_program(core, tmp_path, program):
    sanitizer, _ = core
    binary = compile_program(core, tmp_path, program)
    environment = {"ASAN_OPTIONS": "detect_leaks=1"}
    if '"transferring.h"' in program.read_text():
        environment["STX_FAKE_CUDART"] = str(fake_runtime(sanitizer, tmp_path))
    if sanitizer == "thread":  # of this age it cannot live with the widest randomised addresses
        run("setarch", "-R", binary, **environment)
    else:
        run(binary, **environment)


def fake_runtime(sanitizer, folder):
    """The path of tests/c/fake_cudart.c as a library, for programs that ask for a device."""
    library = folder / "libfakecudart.so"
    flags = ["-std=c11", "-D_GNU_SOURCE", *WARNINGS, *sanitize(sanitizer), "-shared", "-fPIC"]
    source = ROOT / "tests" / "c" / "fake_cudart.c"
    compile_with("gcc", *flags, source, "-o", library, "-lpthread")
    return library


def compile_program(core, tmp_path, *sources):
    sanitizer, library = core
    binary = tmp_path / sources[0].stem
    flags = ["-std=c11", "-D_GNU_SOURCE", *WARNINGS, *sanitize(sanitizer)]
    folders = ["-I", ROOT / "csrc", "-I", ROOT / "tests" / "c"]
    wrapped = {name for path in sources for name in WRAPPED.findall(path.read_text())}
    libraries = [f"-Wl,--wrap={name}" for name in sorted(wrapped)]
    libraries += [library, "-luring", "-lsimdjson", "-lstdc++", "-lpthread"]
    compile_with("gcc", *flags, *folders, *sources, *libraries, "-o", binary)
    return binary


def test_what_fuzzing_kept(core, tmp_path):
    """Each kept input of the fuzzer goes through its target once."""
    inputs = sorted((FUZZ / "corpus").iterdir())
    assert len(inputs) >= 100
    binary = compile_program(core, tmp_path, FUZZ / "fuzz_header.c", FUZZ / "replay.c")
    run("setarch", "-R", binary, *inputs)


@pytest.mark.parametrize("program", ["test_engine", "test_load"])
def test_program_without_liburing(tmp_path, program):
    """A build with STX_URING=0 does everything with threads."""
    sources = [ROOT / "tests" / "c" / f"{program}.c", *(ROOT / "csrc").glob("engine*.c")]
    sources += [ROOT / "csrc" / f"{name}.c" for name in ("load", "thread", "trace", "err")]
    flags = ["-std=c11", "-D_GNU_SOURCE", "-DSTX_NO_URING", *WARNINGS, *sanitize(SANITIZERS[0])]
    folders = ["-I", ROOT / "csrc", "-I", ROOT / "tests" / "c"]
    compile_with("gcc", *flags, *folders, *sources, "-lpthread", "-o", tmp_path / program)
    run(tmp_path / program)


def run(*command, **environment):
    """Run a program: 0 passes, 77 skips, everything else fails."""
    done = subprocess.run(
        [*map(str, command)], capture_output=True, text=True, env={**os.environ, **environment}
    )
    if done.returncode == SKIPPED:
        pytest.skip(done.stderr.strip() or "the kernel lacks it")
    assert done.returncode == 0, done.stderr[-3000:]


def test_there_are_programs_and_a_compiler():
    assert len(PROGRAMS) >= 4 and shutil.which("gcc") and shutil.which("g++")
