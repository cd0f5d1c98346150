# SPDX-License-Identifier: Apache-2.0
"""What STX_PATCH and STX_PATCH_FILTER say: the patch of programs that cannot be edited.

A filter is text here, so that it reaches processes that are started anew:

    model.layers.0.*, lm_head.*              globs
    call:package.module:function             a function, imported when the first file is opened
    json:{"any_of": [{"layers": [0, 2]}, "lm_head.*"]}
                                             a filter of stx_patch.filters with its arguments
    file:/path/of/a/file                     the same, without "json:", in a file

This module is imported while an interpreter starts, and so imports nothing before it is needed.
"""

from __future__ import annotations

import os

TYPE_CHECKING = False  # as in typing, which is not imported for it
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

    from . import _filter, filters

FILTER = "STX_PATCH_FILTER"
SWITCH = "STX_PATCH"
TRACE = "STX_PATCH_TRACE"  # a file for the flight recorder (stx_patch._trace)
RUN = "STX_PATCH_RUN"  # set by `stx-patch run` for its processes, with the next one
RUN_PREFIX = "STX_PATCH_RUN_PREFIX"

FILTER_HELP = """\
globs with commas between them, call:package.module:function, json:{"layers": [0, 2]} (a filter of
stx_patch.filters and its arguments), or file:/PATH (the same in a file); see docs/USAGE.md.
"""

_SWITCHES = {"1": True, "true": True, "0": False, "false": False}
_COMBINATIONS = ("all_of", "any_of", "none_of")


def switch(environ: Mapping[str, str] | None = None) -> bool | None:
    """Whether STX_PATCH turns the patch on or off; None where it says neither."""
    environ = os.environ if environ is None else environ
    return _SWITCHES.get(environ.get(SWITCH, "").strip().lower())


def filter_rule(environ: Mapping[str, str] | None = None) -> _filter.Rule | None:
    """The rule of STX_PATCH_FILTER; None where it says nothing.

    Raises:
        ValueError: it cannot be understood. The variable is named.
    """
    environ = os.environ if environ is None else environ
    text = environ.get(FILTER, "").strip()
    if not text:
        return None
    from ._filter import make_rule

    try:
        return make_rule(parse_filter(text))
    except Exception as error:  # whatever is wrong, it is wrong with the text
        raise ValueError(f"{FILTER}: {error}") from error


def parse_filter(text: str) -> Any:
    """The filter that a text describes (see above); an exception says what is wrong with it."""
    kind, _, rest = text.partition(":")
    if kind == "call":
        return _Function(rest.strip())
    if kind in ("json", "file"):
        import json

        if kind == "file":
            _check_path(rest.strip())
            with open(rest.strip(), encoding="utf-8") as file:
                rest = file.read()
        return _decode(json.loads(rest, object_pairs_hook=_without_repetition))
    globs = [pattern.strip() for pattern in text.split(",")]
    if "" in globs:
        raise ValueError(f"{text!r} has an empty pattern in it")
    _refuse_other_than_globs(text, globs)
    return globs


def _refuse_other_than_globs(text: str, globs: list[str]) -> None:
    """What is meant as something else would be globs that match nothing: all files look empty."""
    start = "".join(text.split())[:2]
    if start.startswith("{") or start in ("[{", '["'):
        raise ValueError(f"{text!r} is JSON: write json: before it")
    for pattern in globs:
        word, colon, _ = pattern.partition(":")
        if colon and word.strip().replace("_", "").isalpha():
            raise ValueError(
                f"{pattern!r} is no glob, and nothing else that is known here: json:, call: and "
                "file: begin the text, in small letters, and hold all of it; a name with a colon "
                f'is given as json:["{pattern}"]'
            )


def filter_text(tensor_filter: filters.Filter) -> str:
    """What `parse_filter` makes an equal filter of; TypeError where a callable is part of it."""
    import json

    return "json:" + json.dumps(_encode(tensor_filter), separators=(",", ":"))


class _Function:
    """A user's function as a filter. Its module is imported when the function is first asked: not
    while an interpreter starts, and not in processes that open no file."""

    __slots__ = ("_found", "_text")

    def __init__(self, text: str) -> None:
        module, _, function = text.partition(":")
        names = (*module.split("."), *function.split("."))
        if not all(name.isidentifier() for name in names):
            raise ValueError(f"{text!r} is no package.module:function")
        self._text = text
        self._found: Any = None

    def __call__(self, key: _filter.TensorKey) -> Any:
        if self._found is None:
            self._found = self._find()
        return self._found(key)

    def _find(self) -> Any:
        import importlib

        module, _, function = self._text.partition(":")
        try:
            found: Any = importlib.import_module(module)
            for name in function.split("."):
                found = getattr(found, name)
        except (ImportError, AttributeError) as error:
            raise ValueError(f"{FILTER}: there is no {self._text}: {error}") from error
        if not callable(found):
            raise ValueError(f"{FILTER}: {self._text} is no function")
        return found


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON: of two equal keys, json would silently keep the last."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError(f"{found!r} says something twice")
    return found


def _decode(value: Any) -> Any:
    """A filter of what JSON gives: a glob, a list of them, or {name of a filter: [arguments]}."""
    from . import filters

    if isinstance(value, (str, list)):
        return value
    if isinstance(value, dict) and len(value) == 1:
        ((name, arguments),) = value.items()
        if name in filters.__all__ and name != "Filter" and isinstance(arguments, list):
            if name in _COMBINATIONS:
                arguments = list(map(_decode, arguments))
            _check_types(name, arguments)
            return getattr(filters, name)(*arguments)
    raise ValueError(f'{value!r} is no glob, no list of globs and no {{"filter": [arguments]}}')


def _check_types(name: str, arguments: list[Any]) -> None:
    """Where JSON has what Python would take for something else."""
    if name == "names" and not all(isinstance(argument, list) for argument in arguments):
        raise ValueError("names takes a list of names")
    if name == "experts" and not all(isinstance(argument, bool) for argument in arguments[1:]):
        raise ValueError("experts takes a list of integers, and true or false")
    if name == "from_index":
        for path in arguments:
            _check_path(path)


def _check_path(path: Any) -> None:
    """The program may be in another folder when the path is looked at."""
    if not isinstance(path, str) or not os.path.isabs(path):
        raise ValueError(f"{path!r} is no absolute path")


def _encode(operand: Any) -> Any:
    """The inverse of `_decode`, for what a combination takes."""
    from . import filters

    if isinstance(operand, filters.Filter):
        name = type(operand).__name__
        encode = _encode if name in _COMBINATIONS else _plain
        return {name: [encode(argument) for argument in operand._operands]}
    if isinstance(operand, frozenset):
        return {"names": [_plain(operand)]}
    if not isinstance(operand, (str, tuple)):
        raise TypeError(f"a filter with {operand!r} in it cannot be written down")
    return operand


def _plain(argument: Any) -> Any:
    return sorted(argument) if isinstance(argument, frozenset) else argument
