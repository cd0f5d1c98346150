# SPDX-License-Identifier: Apache-2.0
"""Puts our functions in the place of stock's in a running process, and takes them out again.

What is in force is a list of entries, one of `patch()` and one of each `patched()` block; the
youngest counts, whole. The first entry installs, the last one's removal restores.

Installing sweeps the namespaces of all imported modules, the *homes* safetensors, safetensors.torch
and those of the other frameworks among them, for names that are bound to an original, by identity.
Every change goes on one undo stack; undoing walks back and restores only what is still ours, and
gives modules that were imported meanwhile the originals. A home that is not imported yet is bound
when it is: a hook waits for it, nothing is imported for its sake.
"""

from __future__ import annotations

import importlib.abc
import os
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from . import _environment, _filter, _native, _options, _stats, _stock, _trace
from ._errors import StxWarning, warn


class Entry:
    """One active patch: what `patch()` or a block asked for."""

    __slots__ = ("options", "rule")

    def __init__(self, rule: _filter.Rule | None, options: _options.Options) -> None:
        self.rule = rule
        self.options = options


_lock = threading.RLock()


def _renew_lock() -> None:
    """In a forked child: the thread that may have held it is not there."""
    global _lock
    _lock = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_lock)

_entries: tuple[Entry, ...] = ()  # replaced, never changed: readers take no lock
_process_entry: Entry | None = None
_is_said = False  # by the program: patch() or unpatch(), whose word holds against STX_PATCH=1
_undo: list[tuple[dict[str, Any], str, Any, Any]] = []
_bound: set[str] = set()  # homes whose names have been replaced
_warned = False


def current() -> Entry | None:
    """The entry in force, or None. Any thread."""
    entries = _entries
    return entries[-1] if entries else None


def patch(tensor_filter: _filter.TensorFilter = None, **options: Any) -> None:
    """Serve safetensors in this process natively, wherever its functions are bound.

    For applications: a library should call `stx_patch.safe_open` and `load_file` itself. Calling it
    again replaces filter and options. Does nothing while the environment says STX_PATCH=0.

    Args:
        tensor_filter: which tensors exist for every file opened from now on: a callable asked about
            each TensorKey, a glob or a list of globs, a set of names, or a `filters` object. None
            is what STX_PATCH_FILTER says, else everything. A name left out does not exist for the
            caller.
        **options: how files are read: the fields of `stx_patch.Options`. What is not given comes
            from the environment as it is now (STX_PATCH_ENGINE and so on).

    Raises:
        TypeError: `tensor_filter` is none of these, or a keyword is no option.
        ValueError: an option's value, or that of a variable.
    """
    rule = _filter.make_rule(tensor_filter)
    if not _is_disabled():  # before the variables are looked at: it has to work whatever they say
        put_in_force(_make_entry(rule, options))


def put_in_force(entry: Entry, said: bool = True) -> bool:
    """Make `entry` that of `patch()`. Not `said` by the program: unless it has said anything
    itself, and below its blocks. Whether it is done."""
    global _entries, _process_entry, _is_said
    _warn_once_without_extension()
    _trace.look_at_environment()
    with _lock:
        before = _entries
        if not said and (_is_said or _process_entry is not None):
            return False
        if _process_entry in before:
            _entries = tuple(entry if old is _process_entry else old for old in before)
        else:
            _entries = (*before, entry) if said else (entry, *before)
        try:
            _install(again=True)
        except BaseException:
            _put_back(before)
            raise
        _process_entry, _is_said = entry, said
        return True


def unpatch() -> None:
    """Undo `patch()`. Running `patched()` blocks stay in force. Harmless without a patch."""
    global _process_entry, _is_said
    with _lock:
        _is_said = True
        if _process_entry is not None:
            _remove(_process_entry)
            _process_entry = None


def take_back() -> None:
    """Undo what is in force without a word of the program, for good."""
    with _lock:
        if not _is_said:
            unpatch()


@contextmanager
def patched(
    tensor_filter: _filter.TensorFilter = None, *, trace: _trace.Path | None = None, **options: Any
) -> Iterator[_stats.Report]:
    """`patch()` for a block; yields the block's live `Stats`.

    The patch holds for the process, all threads included, until the block ends. What is in force
    when a file is opened holds for that handle.

    Args:
        tensor_filter, **options: as of `patch()`.
        trace: a file that is written when the block ends, in the place of one that is there: what
            loads of this process did meanwhile, for ui.perfetto.dev or chrome://tracing
            (docs/USAGE.md). Where it cannot be written, a StxWarning says so.
    """
    global _entries
    rule = _filter.make_rule(tensor_filter)
    report = _stats.Report()
    if _is_disabled():
        try:
            yield report
        finally:
            report._finish()
        return
    entry = _make_entry(rule, options)
    _warn_once_without_extension()
    _trace.look_at_environment()
    recording = None
    try:
        if trace is not None:
            recording = _trace.start(trace, entry.options)
        with _lock:
            _entries = (*_entries, entry)
            _install()
        yield report
    finally:
        try:
            report._finish()
            with _lock:
                _remove(entry)
        finally:
            if recording is not None:
                _trace.finish(recording)


def is_patched() -> bool:
    """Whether any patch is in force."""
    return current() is not None


def _make_entry(rule: _filter.Rule | None, options: dict[str, Any]) -> Entry:
    """What is not given comes from the environment."""
    rule = _environment.filter_rule() if rule is None else rule
    return Entry(rule, _options.from_environment(options))


def _is_disabled() -> bool:
    return _environment.switch() is False


def _warn_once_without_extension() -> None:
    global _warned
    if _native.core is None and not _warned:
        _warned = True
        warn(
            "stx_patch has no native core here, everything goes to safetensors itself "
            f"({_native.import_error})",
            StxWarning,
        )


def _remove(entry: Entry) -> None:
    global _entries
    _entries = tuple(other for other in _entries if other is not entry)
    if not _entries:
        _restore()


def _put_back(entries: tuple[Entry, ...]) -> None:
    """An installation failed half-way: what was in force before is in force again."""
    global _entries
    _entries = entries
    if not entries:
        _restore()


# --- installing and restoring ---


def _replacements() -> dict[str, list[tuple[Any, Any]]]:
    """The homes that are imported: module -> pairs of an original and ours."""
    from . import _load, _safe_open, _transformers

    homes: dict[str, list[tuple[Any, Any]]] = {}
    if _stock.is_executed("safetensors", "safe_open"):
        _stock.take()
        homes["safetensors"] = [(_stock.safe_open, _safe_open.stand_in())]
        if _stock.PySafeSlice is not None:
            homes["safetensors"].append((_stock.PySafeSlice, _safe_open.slice_stand_in()))
    for home in _stock.FRAMEWORKS:
        if _stock.is_executed(home, "load"):
            originals = _stock.known_functions(home, "load")
            homes[home] = [(original, _load.load_stand_in(home)) for original in originals]
    if _stock.TORCH in homes:
        originals = _stock.known_functions(_stock.TORCH, "load_file")
        homes[_stock.TORCH] += [(original, _load.load_file_stand_in()) for original in originals]
    materializers = _transformers.replacements()
    if materializers:
        homes[_transformers.HOME] = materializers
    return homes


def _install(again: bool = False) -> None:
    """Bind what is imported and not bound yet, everywhere.

    A home is swept for once, since whoever binds its names later binds ours, or `again` when a
    reload may have brought an original back. The hook waits for imports and reloads.
    """
    homes = _replacements()
    if again:
        _bound.clear()
    ours = {id(old): (old, new) for home in homes.keys() - _bound for old, new in homes[home]}
    if ours:
        _sweep(ours)
        _bound.update(homes)
    if _hook not in sys.meta_path:
        sys.meta_path.insert(0, _hook)


def _sweep(replacements: dict[int, tuple[Any, Any]]) -> None:
    """Replace every module-level name that is bound to one of the objects, told by its id.

    Only `__dict__` is read, past any `__getattr__` or `__getattribute__` of lazy modules: looking
    at a module must not make it import anything.
    """
    for module_name, module in list(sys.modules.items()):
        if _is_skipped(module_name):
            continue
        namespace = _stock.namespace(module)
        for name, value in list(namespace.items()):
            found = replacements.get(id(value))
            if found is not None and found[0] is value:
                _undo.append((namespace, name, *found))
                namespace[name] = found[1]


def _is_skipped(module_name: str) -> bool:
    """Our own modules, and the extension module that keeps stock reachable."""
    package = module_name.partition(".")[0]
    return package == "stx_patch" or module_name == "safetensors._safetensors_rust"


def _restore() -> None:
    """Walk the undo stack back; a name that somebody bound anew since is theirs.

    Modules that were imported meanwhile bound ours by themselves: they get the originals, too.
    """
    while _undo:
        namespace, name, old, new = _undo.pop()
        if namespace.get(name) is new:
            namespace[name] = old
    ours = {id(new): (new, old) for pairs in _replacements().values() for old, new in pairs}
    _sweep(ours)
    _undo.clear()
    _bound.clear()
    finders = sys.meta_path or []  # None while the interpreter exits
    if _hook in finders:
        finders.remove(_hook)


# --- homes that are imported later ---


class _ImportHook(importlib.abc.MetaPathFinder):
    """Lets the other finders find a home, and binds it right after it was executed."""

    _homes = frozenset(("safetensors", *_stock.FRAMEWORKS, "transformers.core_model_loading"))

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in self._homes:
            return None
        for finder in list(sys.meta_path):
            if finder is self or not hasattr(finder, "find_spec"):
                continue
            spec = finder.find_spec(fullname, path, target)
            if spec is not None:
                if spec.loader is not None:
                    spec.loader = _NotifyingLoader(spec.loader, _after_import)
                return spec
        return None


class _NotifyingLoader(importlib.abc.Loader):
    """The loader of one module, followed by a call."""

    def __init__(self, loader: Any, notify: Callable[[], None]) -> None:
        self._loader = loader
        self._notify = notify

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        module: ModuleType | None = self._loader.create_module(spec)
        return module

    def exec_module(self, module: ModuleType) -> None:
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader  # the module sees its real loader
        module.__loader__ = self._loader
        self._loader.exec_module(module)
        self._notify()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)


def _after_import() -> None:
    with _lock:
        if _entries:
            _install(again=True)


_hook = _ImportHook()
