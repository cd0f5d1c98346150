# SPDX-License-Identifier: Apache-2.0
"""The patch of processes that nobody can edit: STX_PATCH=1 in the environment, and `activate()`.

It is called by the start-up hook (`stx-patch autopatch`), by the processes of `stx-patch run` and,
as an entry point, by vLLM and sglang in each of their processes. Where safetensors is not imported
yet it leaves a finder that waits for that: an interpreter that loads nothing pays next to nothing.
Whoever uses this package before that finds the patch in force (`settle`).
"""

from __future__ import annotations

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


def activate() -> None:
    """Patch this process if STX_PATCH=1 says so: now, or when it imports safetensors.

    Filter and options are those of the environment. Once in a process, and never over a patch that
    is in force. Nothing that is wrong with a variable is raised here: a wrong option is warned
    about and left at its default; with a wrong STX_PATCH_FILTER each file that is opened raises a
    ValueError that names it, since neither all tensors nor none are what was asked for.
    """
    global _activated, _reports
    if _activated or not _environment.switch():
        return
    _activated = True
    if os.environ.get(_environment.RUN):
        from . import _run_report

        _run_report.watch(os.environ[_environment.RUN])
        _reports = True
    if "safetensors" in sys.modules or "stx_patch._patch" in sys.modules:
        _patch_now()
    else:
        sys.meta_path.insert(0, _waiting)


def settle() -> None:
    """Put in force what waits for safetensors, if anything does."""
    if _waiting in sys.meta_path:
        sys.meta_path.remove(_waiting)
        _patch_now()


def forget() -> None:
    """Do not patch this process if it only waits for that: the command line looks at files as they
    are."""
    if _waiting in sys.meta_path:
        sys.meta_path.remove(_waiting)


class _Waiting:
    """A finder that finds nothing by itself, but patches before safetensors is looked for."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != "safetensors":
            return None
        settle()
        for finder in list(sys.meta_path):  # it is not the list that importlib walks over any more
            find = getattr(finder, "find_spec", None)
            spec: ModuleSpec | None = None if find is None else find(fullname, path, target)
            if spec is not None:
                return spec
        return None


_waiting = _Waiting()


def _patch_now() -> None:
    from . import _patch

    if _environment.switch() and not _patch.is_patched():
        _patch.put_in_force(_patch.Entry(_rule(), _known_options()), over=False)
    if _reports:
        from . import _run_report

        _run_report.follow(_patch)


def _rule() -> _filter.Rule | None:
    try:
        return _environment.filter_rule()
    except ValueError as error:
        text = str(error)

    def refuse(key: _filter.TensorKey) -> bool:
        raise ValueError(text)

    return ("call", refuse)


def _known_options() -> _options.Options:
    """The options of the environment, without those that are wrong there."""
    from . import _options
    from ._errors import StxWarning, warn

    given = {}
    for name in _options.NAMES:
        try:
            text = _options.of_variable(name)
        except ValueError as error:
            warn(f"{error}; its default holds", StxWarning)
        else:
            if text is not None:
                given[name] = text
    return _options.Options(**given)
