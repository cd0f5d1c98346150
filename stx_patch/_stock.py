# SPDX-License-Identifier: Apache-2.0
"""The originals: what safetensors itself provides, taken before anything is replaced.

Values are None until `take` ran. Callers read them as attributes of this module at call time.
Nothing here imports safetensors before it is needed.
"""

from __future__ import annotations

import importlib
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FunctionType
from typing import Any

safe_open: Any = None
SafetensorError: Any = None
PySafeSlice: Any = None  # exported by safetensors >= 0.9 only
parameters: frozenset[str] = frozenset()  # of safe_open

TORCH = "safetensors.torch"
FRAMEWORKS = (
    TORCH,
    "safetensors.numpy",
    "safetensors.flax",
    "safetensors.tensorflow",
    "safetensors.mlx",
    "safetensors.paddle",
)
_functions: dict[tuple[str, str], Any] = {}  # (home, name) -> the function

_bypass = threading.local()


def take() -> None:
    """Take the originals of `safetensors`, importing it. ImportError where it is missing.

    They are taken where they are defined: what `safetensors` itself has bound to their names may be
    somebody's wrapper.
    """
    global safe_open, SafetensorError, PySafeSlice, parameters
    if safe_open is not None:
        return
    import inspect

    module = _find("safetensors._safetensors_rust", "safe_open")
    parameters = frozenset(inspect.signature(module.safe_open).parameters)
    SafetensorError = module.SafetensorError
    PySafeSlice = getattr(module, "PySafeSlice", None)
    safe_open = module.safe_open


def function(home: str, name: str) -> Any:
    """The original of a function of one of FRAMEWORKS, importing that where it was not yet."""
    take()
    if (home, name) not in _functions:
        _functions[home, name] = getattr(_find(home, name), name)
    return _functions[home, name]


def known_functions(home: str, name: str) -> list[Any]:
    """The original of an executed home's function as it was taken and, after a reload, as it is
    now, which `function` gives from then on. What somebody else has put there is theirs."""
    known = function(home, name)
    present = namespace_of(home)[name]
    if _is_defined_in(present, home):
        _functions[home, name] = present
    return [found for found in (known, present) if _is_defined_in(found, home)]


def _is_defined_in(found: object, home: str) -> bool:
    return isinstance(found, FunctionType) and found.__globals__.get("__name__") == home


def _find(name: str, attribute: str) -> Any:
    """The module, imported if it is not executed yet.

    One that is executed is taken as it stands, also while its import is not quite over: waiting for
    another thread's import here, with our own lock held, could deadlock with its import hook.
    """
    if is_executed(name, attribute):
        return sys.modules[name]
    return importlib.import_module(name)


def is_executed(name: str, attribute: str) -> bool:
    """Whether a module is imported, at least as far as the definition of `attribute`."""
    return attribute in namespace_of(name)


def namespace_of(name: str) -> dict[str, Any]:
    """The namespace of an imported module; empty where it is not imported, or only lazily."""
    return namespace(sys.modules.get(name))


def namespace(module: object) -> dict[str, Any]:
    """The `__dict__` of whatever stands in `sys.modules`, past any `__getattr__` or
    `__getattribute__`: looking at a lazy module must not make it import anything."""
    try:
        found = object.__getattribute__(module, "__dict__")
    except Exception:  # odd objects may answer with anything
        return {}
    return found if isinstance(found, dict) else {}


@contextmanager
def bypass() -> Iterator[None]:
    """In this thread, calls of the stand-ins go to stock: stock's own functions look them up."""
    previous = is_bypassed()
    _bypass.active = True
    try:
        yield
    finally:
        _bypass.active = previous


def is_bypassed() -> bool:
    """Whether this thread is inside `bypass`."""
    return getattr(_bypass, "active", False)
