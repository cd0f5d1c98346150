"""Proves: the source keeps the project's style: layers, lengths, names, banned calls, silence."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from stx_patch._native import core as _C

ROOT = Path(__file__).resolve().parent.parent
CSRC = sorted((ROOT / "csrc").iterdir())
C_FILES = [path for path in CSRC if path.suffix in (".c", ".h", ".cpp")]
PYTHON = sorted((ROOT / "stx_patch").glob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("*.py")) + sorted((ROOT / "tests").rglob("*.[ch]"))

LINES_MAX, FUNCTION_MAX, COLUMNS_MAX = 400, 70, 100
# Files, and functions as "file:function", that are longer: their size today. They may shrink, not
# grow; what has become short enough leaves this table.
LONG_FILES: dict[str, int] = {}
LONG_FUNCTIONS: dict[str, int] = {}

# Arrows point down: a file includes only files of a lower layer, or of its own.
LAYERS = [
    ("err", "checked", "array", "memory", "dtype", "thread", "copy", "trace"),
    ("json", "json_simdjson", "header", "header_cache"),
    ("plan", "match", "order", "follow", "overlap"),
    ("file", "mapping", "residency", "readahead", "source", "arena"),
    ("engine", "engine_uring", "engine_threads"),
    ("load", "owned", "stream"),
    ("device", "device_cpu", "device_cuda", "staging", "transfer"),
    ("py_state", "py_err", "py_args", "py_names", "py_modes"),
    ("py_tensor", "py_filter", "py_keeps"),
    (
        "py_slice",
        "py_handle",
        "py_load",
        "py_open",
        "py_plan",
        "py_ahead",
        "py_owned",
        "py_stream",
        "py_bytes",
        "py_header",
        "py_overlap",
        "py_patience",
        "py_device",
        "py_read",
        "py_trace",
    ),
    ("py_module",),
]
LAYER_OF = {stem: number for number, stems in enumerate(LAYERS) for stem in stems}

# Who may include what from outside.
ONLY = {
    "Python.h": lambda stem: stem.startswith("py_"),
    "ATen/": lambda stem: stem == "py_tensor",
    "simdjson.h": lambda stem: stem == "json_simdjson",
    "liburing.h": lambda stem: stem == "engine_uring",
    "cuda": lambda stem: stem == "device_cuda",
    "cufile": lambda stem: stem == "engine_gds",
}
# The names that the extension may show to the process it is loaded into.
EXPORTED = {"PyInit__C"}

BANNED = {
    "strcpy": "memcpy",
    "strcat": "memcpy",
    "sprintf": "snprintf",
    "gets": "stx_file_read",
    "atoi": "a loop with overflow checks",
    "alloca": "malloc",
    "printf": "stx_err_set",
    "fprintf": "stx_err_set",
    "puts": "stx_err_set",
    "exit": "a status",
    "abort": "a status",
}


def c_ids(path):
    return path.name


def without_comments(text):
    text = re.sub(r"/\*.*?\*/", lambda match: "\n" * match[0].count("\n"), text, flags=re.S)
    return re.sub(r'"(\\.|[^"\\\n])*"', '""', text)


def includes(path):
    return re.findall(r'^#include ["<]([^">]+)[">]', path.read_text(), flags=re.M)


@pytest.mark.parametrize("path", C_FILES, ids=c_ids)
def test_a_c_file_begins_with_what_it_is(path):
    lines = path.read_text().splitlines()
    assert lines[0] == "/* SPDX-License-Identifier: Apache-2.0"
    end = next(number for number, line in enumerate(lines) if "*/" in line)
    assert end >= 3, "the top comment says what the file is and what it guarantees"


@pytest.mark.parametrize("path", C_FILES, ids=c_ids)
def test_includes_point_down(path):
    assert path.stem in LAYER_OF, "name the layer of a new file in LAYERS"
    for name in includes(path):
        if (ROOT / "csrc" / name).exists():
            assert LAYER_OF[Path(name).stem] <= LAYER_OF[path.stem], f"{path.name} -> {name}"
        for outside, allowed in ONLY.items():
            if name.startswith(outside):
                assert allowed(path.stem), f"{path.name} includes {name}"


@pytest.mark.parametrize("path", [p for p in C_FILES if p.suffix == ".c"], ids=c_ids)
def test_a_c_file_includes_its_own_header_first(path):
    header = path.with_suffix(".h")
    if header.exists():
        assert includes(path)[0] == header.name


@pytest.mark.parametrize("path", C_FILES, ids=c_ids)
def test_banned_calls(path):
    text = without_comments(path.read_text())
    for name, better in BANNED.items():
        assert not re.search(rf"(?<![\w.>]){name}\s*\(", text), f"{name}: use {better}"
    assert not re.search(r"\b(FIXME|TODO|XXX)\b", path.read_text())


@pytest.mark.parametrize("path", [p for p in C_FILES if p.suffix != ".cpp"], ids=c_ids)
def test_extern_names_begin_with_stx(path):
    """What a header declares and what a file defines, unless it is static."""
    text = without_comments(path.read_text())
    declared = r"^(?!static|typedef|#)(?:[A-Za-z]\w*[ *]+)+?\**(\w+)(?:\(|\[.*\] =| = )"
    for name in re.findall(declared, text, flags=re.M):
        assert name.startswith("stx_") or name in EXPORTED, name


def test_nothing_else_is_exported():
    """Two extensions in one process share all exported names."""
    if _C is None:
        pytest.skip("no extension here")
    done = subprocess.run(
        ["nm", "--dynamic", "--defined-only", _C.__file__], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert {line.split()[-1] for line in done.stdout.splitlines()} == EXPORTED


@pytest.mark.parametrize("path", C_FILES + PYTHON, ids=c_ids)
def test_files_stay_short(path):
    count = len(path.read_text().splitlines())
    assert count <= LONG_FILES.get(path.name, LINES_MAX)
    assert path.name not in LONG_FILES or count == LONG_FILES[path.name], "tighten LONG_FILES"


@pytest.mark.parametrize("path", C_FILES + PYTHON + TESTS, ids=c_ids)
def test_lines_stay_short(path):
    for number, line in enumerate(path.read_text().splitlines(), 1):
        assert len(line) <= COLUMNS_MAX, f"{path.name}:{number}"


def c_functions(text):
    """(name, lines) of each function: up to the `}` in the first column, where clang-format has it.

    A signature begins in the first column, may go on over indented lines, and ends in `) {`.
    """
    name, start, is_open = "", 0, False
    for number, line in enumerate(text.splitlines(), 1):
        if not is_open and re.match(r"[A-Za-z]", line):
            called = re.search(r"(\w+)\(", line)
            name, start = called[1] if called else "", number
        if not is_open and name and line.endswith(") {"):
            is_open = True
        if is_open and line == "}":
            yield name, number - start + 1
            is_open = False


def python_functions(text):
    """(name, lines) of each function."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield node.name, (node.end_lineno or node.lineno) - node.lineno + 1


def test_functions_are_found():
    """The parser above sees what it should, in a file of every kind of signature."""
    text = (ROOT / "csrc" / "err.c").read_text()
    assert dict(c_functions(text)).keys() == {
        "format_message",
        "stx_err_set",
        "stx_err_set_at",
        "stx_err_set_errno",
        "stx_err_name",
    }
    found = list(
        c_functions("static int\nf(int a,\n  int b) {\n  if (a) {\n  }\n}\nint g(void) {\n}\n")
    )
    assert found == [("f", 5), ("g", 2)]


@pytest.mark.parametrize("path", C_FILES + PYTHON, ids=c_ids)
def test_functions_stay_short(path):
    find = python_functions if path.suffix == ".py" else c_functions
    for name, count in find(path.read_text()):
        allowed = LONG_FUNCTIONS.get(f"{path.name}:{name}", FUNCTION_MAX)
        assert count <= allowed, f"{name} has {count} lines"


@pytest.mark.parametrize("path", PYTHON, ids=c_ids)
def test_python_modules_say_what_they_are(path):
    lines = path.read_text().splitlines()
    assert lines[0] == "# SPDX-License-Identifier: Apache-2.0"
    assert lines[1].startswith('"""')
    assert "print(" not in path.read_text()


@pytest.mark.parametrize("path", [p for p in TESTS if p.name.startswith("test_")], ids=c_ids)
def test_tests_say_what_they_prove(path):
    first = path.read_text()[:400]
    assert "Description:" in first if path.suffix == ".c" else first.startswith('"""')


def test_every_layer_has_its_files():
    """A file that went away leaves LAYERS too."""
    present = {path.stem for path in C_FILES}
    assert LAYER_OF.keys() <= present, LAYER_OF.keys() - present


def test_import_does_nothing():
    """No torch, no safetensors, no thread, no descriptor, no output."""
    script = """
import os, sys, warnings
warnings.simplefilter("error")
def held():
    return len(os.listdir("/proc/self/task")), len(os.listdir("/proc/self/fd"))
before, path, hooks = held(), list(sys.path), list(sys.meta_path)
import stx_patch
import stx_patch.filters, stx_patch._load, stx_patch._safe_open
assert held() == before and sys.path == path and sys.meta_path == hooks
assert not stx_patch.is_patched()
assert stx_patch.stats().opens == 0
stx_patch.patch()
stx_patch.unpatch()
assert not {"torch", "safetensors", "numpy"} & sys.modules.keys()
assert held() == before and sys.meta_path == hooks
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
