# SPDX-License-Identifier: Apache-2.0
"""The patch of processes that nobody can edit: STX_PATCH=1 in the environment, and `activate()`.

It is called by the start-up hook (`stx-patch autopatch`), by the processes of `stx-patch run` and,
as an entry point, by vLLM and sglang in each of their processes. Where safetensors is not imported
yet it leaves a finder that waits for that: an interpreter that loads nothing pays next to nothing.
Whoever uses this package before that finds the patch in force (`settle`).
"""

from __future__ import annotations

import _thread
import os
import sys

from . import _environment

TYPE_CHECKING = False  # as in typing, which is not imported for it
if TYPE_CHECKING:
    from collections.abc import Sequence
    from importlib.machinery import ModuleSpec
    from types import ModuleType

    from . import _filter, _options

_activated = False
_reports = False  # to `stx-patch run`
_lock = _thread.RLock()  # that of threading, which is not imported for it
_is_settling = False


def _renew_lock() -> None:
    """In a forked child: the thread that may have held it is not there."""
    global _lock, _is_settling
    _lock, _is_settling = _thread.RLock(), False


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_lock)


def activate() -> None:
    """Patch this process if STX_PATCH=1 says so: now, or when it imports safetensors.

    Filter and options are those of the environment. Once in a process, never against a `patch()`
    or `unpatch()` of the program, and below its blocks. Nothing that is wrong with a variable is
    raised here: a wrong option is warned about and left at its default; with a wrong
    STX_PATCH_FILTER each file that is opened raises a ValueError that names it, since neither all
    tensors nor none are what was asked for.
    """
    global _activated, _reports
    if _activated or not _environment.switch():
        return
    _activated = True
    if os.environ.get(_environment.RUN):
        from . import _run_report

        _run_report.watch(os.environ[_environment.RUN])
        _reports = True
    sys.meta_path.insert(0, _waiting)
    if "safetensors" in sys.modules or "stx_patch._patch" in sys.modules:
        settle()


def settle() -> None:
    """Put in force what waits for safetensors, if anything does: it waits until that is done, and
    whoever looks meanwhile waits, too."""
    global _is_settling
    if not _is_waiting():
        return
    with _lock:
        if _is_settling or not _is_waiting():  # it is asked for by what it imports; it is done
            return
        _is_settling = True
        try:
            problems = _patch_now()
        finally:
            _is_settling = False
        sys.meta_path.remove(_waiting)
    _warn_of(problems)


def forget() -> None:
    """Do not patch this process, and undo it if that is done (something has imported safetensors):
    the command line looks at files as they are."""
    with _lock:
        if _is_waiting():
            sys.meta_path.remove(_waiting)
        elif _activated:
            from . import _patch

            _patch.take_back()


def _is_waiting() -> bool:
    return _waiting in (sys.meta_path or ())  # None while the interpreter exits


class _Waiting:
    """A finder that finds nothing by itself, but patches before safetensors is looked for."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != "safetensors":
            return None
        settle()
        if _is_waiting():  # while it settles
            return None
        for finder in list(
            sys.meta_path or ()
        ):  # it is not the list that importlib walks over any more
            find = getattr(finder, "find_spec", None)
            spec: ModuleSpec | None = None if find is None else find(fullname, path, target)
            if spec is not None:
                return spec
        return None


_waiting = _Waiting()


def _patch_now() -> list[str]:
    """What is wrong with the options: a warning may be an error, and is for when it is done."""
    from . import _patch

    problems: list[str] = []
    if _environment.switch():
        options, wrong = _known_options()
        if _patch.put_in_force(_patch.Entry(_rule(), options), said=False):
            problems = wrong
    if _reports:
        from . import _run_report

        _run_report.follow(_patch)
    return problems


def _rule() -> _filter.Rule | None:
    try:
        return _environment.filter_rule()
    except ValueError as error:
        text = str(error)

    def refuse(key: _filter.TensorKey) -> bool:
        raise ValueError(text)

    return ("call", refuse)


def _known_options() -> tuple[_options.Options, list[str]]:
    """The options of the environment without those that are wrong there, and what is wrong."""
    from . import _options

    given, problems = {}, []
    for name in _options.NAMES:
        try:
            text = _options.of_variable(name)
        except ValueError as error:
            problems.append(str(error))
        else:
            if text is not None:
                given[name] = text
    return _options.Options(**given), problems


def _warn_of(problems: list[str]) -> None:
    from ._errors import StxWarning, warn

    for problem in problems:
        warn(f"{problem}; its default holds", StxWarning)
