# SPDX-License-Identifier: Apache-2.0
"""What went wrong, as one line for people: what it was about, and what to do."""

from __future__ import annotations

import difflib
import os
import re
import sys
from collections.abc import Iterable

from . import _files, _stock
from ._cli_text import printable

_STOCK_MISSING = re.compile(r"No such file or directory: (.+)", re.DOTALL)
_ANY_FILE = "*.safetensors"  # what stx_patch._files calls missing in a folder without any


class CliError(Exception):
    """A command cannot do what it was asked; the text is for people."""


def is_for_people(error: Exception) -> bool:
    """Whether `error` says something about the user's files or wishes, and not about our code."""
    expected = (CliError, OSError, ValueError, TypeError, MemoryError, ImportError)
    return isinstance(error, expected) or is_format_error(error)


def is_format_error(error: Exception) -> bool:
    """Whether `error` is safetensors' own, which does not say of which file it speaks."""
    core = _stock.namespace_of("safetensors._safetensors_rust")  # nobody raised it without
    return isinstance(error, core.get("SafetensorError", ()))


def message_of(error: Exception) -> str:
    """One line that says what went wrong."""
    text = str(error)
    path = _missing_path(error)
    if path is not None:
        text = _explain_missing(path)
    elif isinstance(error, OSError) and error.strerror:
        name = "" if error.filename is None else f"{os.fsdecode(error.filename)}: "
        text = name + error.strerror
    elif isinstance(error, MemoryError) and not text:
        text = "not enough memory"
    lines = (line.strip() for line in (text or type(error).__name__).splitlines())
    return printable(" ".join(filter(None, lines)))


def complain(text: str, kind: str = "error") -> None:
    """Say it on stderr, if there is one."""
    if sys.stderr is not None:
        sys.stderr.write(f"stx-patch: {kind}: {text}\n")


def near(name: str, names: Iterable[str]) -> list[str]:
    """Up to three of `names` that look like `name`, best first."""
    return difflib.get_close_matches(name, names, n=3, cutoff=0.6)


def _missing_path(error: Exception) -> str | None:
    """The path of a file that is not there; some of these errors have it only in their text."""
    if not isinstance(error, FileNotFoundError):
        return None
    if error.filename is not None:
        return os.fsdecode(error.filename)
    found = _STOCK_MISSING.fullmatch(str(error))
    return None if found is None else found[1]


def _explain_missing(path: str) -> str:
    folder, name = os.path.split(path)
    if os.path.lexists(path):  # safetensors says so of whatever it cannot open
        return _explain_unopened(path)
    try:
        entries = sorted(os.listdir(folder or "."))
    except OSError:
        return f"no such file: {path}" + (f", for there is no folder {folder}" if folder else "")
    if name == _ANY_FILE and any(entry.endswith(".safetensors") for entry in entries):
        return f"no such file: {path}; give the folder {folder or '.'} for all in it"
    if name in _listed_in(folder or "."):
        return f"no such file: {path}, which an index there lists: was everything downloaded?"
    if name == _ANY_FILE:
        below = [entry for entry in entries if _holds_any(os.path.join(folder, entry))]
        hint = f"; there are some in {', '.join(below[:5])}" if below else ""
        return f"no safetensors files in the folder {folder or '.'}{hint}"
    found = near(name, entries)
    hint = f"; did you mean {' or '.join(os.path.join(folder, one) for one in found)}?"
    return f"no such file: {path}" + (hint if found else "")


def _explain_unopened(path: str) -> str:
    try:
        with open(path, "rb"):
            return f"{path} could not be opened; now it can"
    except FileNotFoundError:
        return f"{path} is a link to {os.path.realpath(path)}, which is not there"
    except OSError as error:
        return f"{path}: {error.strerror}"


def _listed_in(folder: str) -> set[str]:
    """The files that a folder's index speaks of."""
    try:
        index = _files.index_in(folder)
        return set() if index is None else set(_files.read_index(index).values())
    except (OSError, ValueError):
        return set()


def _holds_any(folder: str) -> bool:
    try:
        return any(entry.endswith(".safetensors") for entry in os.listdir(folder))
    except OSError:
        return False
