# SPDX-License-Identifier: Apache-2.0
"""`stx-patch run`: an unmodified program, patched, with a table at its end.

It sets the environment and becomes `python script.py ...` by exec. So the program is what Python
makes of it, down to its pid, tracebacks, signals and exit status. It finds
`_start/sitecustomize.py` through PYTHONPATH, as the Pythons do that it starts; that activates the
patch, and what is done at the exit of each (stx_patch._run_report).
"""

from __future__ import annotations

import argparse
import json
import os
import re
import secrets
import shutil
import sys
import tempfile
from typing import Any

from . import _environment, _options
from ._cli_errors import CliError, complain
from ._cli_filters import add_filters, filter_of
from ._cli_options import add_options, options_of

_VALUE_MAX = 32 << 10  # bytes; Linux takes variables up to 128 KiB
_DESCRIPTION = f"""\
Run a Python program as `python SCRIPT ARG ...` or `python -m MODULE ARG ...` does, with its
safetensors files loaded through stx_patch, in its child processes, too. A table of what was loaded
comes at its end, on stderr. The exit status is the program's.

Where no option says which tensors, STX_PATCH_FILTER does:
{_environment.FILTER_HELP}"""
_EXAMPLES = """\
examples:
  stx-patch run generate.py --model llama/
  stx-patch run -m torch.distributed.run --nproc-per-node 2 train.py
  stx-patch run --layers 0:16 --prefix model.embed_tokens stage.py
  stx-patch run --json loaded.json $(which vllm) serve llama/
"""


def add_to(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `run`."""
    parser = commands.add_parser(
        "run",
        help="run an unmodified program patched",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="stx-patch run [option ...] (SCRIPT | -m MODULE) [ARG ...]",
    )
    parser.add_argument("--quiet", action="store_true", help="no table")
    parser.add_argument("--json", metavar="FILE", help="write all counters there, too")
    parser.add_argument("--trace", metavar="FILE", help="write what loads did, for ui.perfetto.dev")
    add_options(parser, "They take the place of STX_PATCH_ENGINE and so on.")
    add_filters(parser)
    parser.add_argument(
        "-m", dest="is_module", action="store_true", help="a module comes next, not a script"
    )
    parser.add_argument("program", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    parser.set_defaults(run=run, takes_rest=True)


def run(arguments: argparse.Namespace) -> int:
    """Become the program. Returns only by an exception."""
    program = _program_of(arguments)
    environment = dict(os.environ)
    folder = _choose_folder()
    try:
        if _environment.switch() is False:
            if not arguments.quiet:
                complain("STX_PATCH=0: the program runs without stx_patch", "note")
        else:
            _check_interpreter()
            environment.update(_variables_of(arguments, program, folder))
        os.execve(sys.executable, [sys.executable, *_python_options(), *program], environment)
    finally:  # it has not become the program
        shutil.rmtree(folder, ignore_errors=True)


def _python_options() -> list[str]:
    """What this Python was started with, up to what it runs."""
    options: list[str] = []
    words = iter(sys.orig_argv[1:])
    for word in words:
        if not word.startswith("-") or word in ("-", "--"):
            break
        letters, found, value = re.findall(r"(?s)^(-[^-cmWX]*)([cmWX]?)(.*)$", word)[0]
        if found in ("c", "m"):  # it may end a group, as in -Bm
            return [*options, letters] if letters != "-" else options
        options.append(word)
        if word == "--check-hash-based-pycs" or (found and not value):
            options.append(next(words))
    return options


def _choose_folder() -> str:
    """What its processes may leave is in there; "" where nothing can be left, as they then do."""
    try:
        parent = tempfile.gettempdir()
    except FileNotFoundError:
        return ""
    return os.path.join(parent, "stx-patch-run-" + secrets.token_hex(8))


def _program_of(arguments: argparse.Namespace) -> list[str]:
    """What Python is to be given: -m, module and arguments, or script and arguments."""
    program: list[str] = arguments.program
    if program[:1] == ["--"]:
        program = program[1:]
    if not program:
        raise CliError("which program? stx-patch run SCRIPT [ARG ...] or -m MODULE [ARG ...]")
    if arguments.is_module:
        return ["-m", *program]
    script = program[0]
    if not os.path.exists(script) and script != "-":
        command = shutil.which(script)
        hint = "" if command is None else f"; if you mean the command, give its path: {command}"
        raise CliError(f"no such file: {script}{hint}")
    if script.startswith("-") and script != "-":  # Python would take it for options
        return [os.path.join(os.curdir, script), *program[1:]]
    return program


def _check_interpreter() -> None:
    """The program is patched through its environment."""
    if sys.flags.ignore_environment or sys.flags.no_site or not sys.executable:
        raise CliError("run needs a Python that was started without -E, -I and -S")


def _variables_of(arguments: argparse.Namespace, program: list[str], folder: str) -> dict[str, str]:
    """What is set for the program. What is wrong with it is raised here, not in the program."""
    given = options_of(arguments)
    _options.from_environment(given)
    variables = {"STX_PATCH_" + name.upper(): value for name, value in given.items()}
    _check_writable("--json", arguments.json)
    _check_writable("--trace", arguments.trace)
    if arguments.trace is not None:
        variables[_environment.TRACE] = os.path.abspath(arguments.trace)
    tensor_filter = filter_of(arguments)
    if tensor_filter is None:
        _environment.filter_rule()
    else:
        variables[_environment.FILTER] = _write_down(tensor_filter, folder)
    start = os.path.join(os.path.dirname(os.path.abspath(__file__)), "_start")
    paths = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path != start]
    settings = {
        "pid": os.getpid(),
        "program": program,
        "folder": folder,
        "json": None if arguments.json is None else os.path.abspath(arguments.json),
        "quiet": arguments.quiet,
    }
    return {
        **variables,
        _environment.SWITCH: "1",
        _environment.RUN: json.dumps(settings),
        _environment.RUN_PREFIX: sys.prefix,
        "PYTHONPATH": os.pathsep.join([start, *paths] if paths != [""] else [start]),
    }


def _check_writable(option: str, path: str | None) -> None:
    """What a long run has counted is not to be lost at its end."""
    if path is None:
        return
    absolute = os.path.abspath(path)
    folder = os.path.dirname(absolute)
    if os.path.isdir(absolute):
        reason = "it is a folder"
    elif not os.path.isdir(folder):
        reason = f"there is no folder {folder}"
    elif not os.access(absolute if os.path.exists(absolute) else folder, os.W_OK):
        reason = "there is no right to"
    else:
        return
    raise CliError(f"cannot write {option} {path}: {reason}")


def _write_down(tensor_filter: Any, folder: str) -> str:
    """The filter as text, or where that is long, the text of a file."""
    text = _environment.filter_text(tensor_filter)
    if len(text) <= _VALUE_MAX:  # ASCII
        return text
    if not folder:
        raise CliError("so long a filter needs a folder for temporary files: set TMPDIR to one")
    os.makedirs(folder, 0o700)
    path = os.path.join(folder, "filter")
    with open(path, "x", encoding="utf-8") as file:
        file.write(text.partition(":")[2])
    return "file:" + path
