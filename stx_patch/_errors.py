# SPDX-License-Identifier: Apache-2.0
"""The warnings of this package. Its errors are the classes that stock users already catch."""

from __future__ import annotations

import sys
import warnings

_OURS = ("stx_patch", "contextlib")  # a block's function is entered through contextlib


class StxWarning(UserWarning):
    """Something works, but not as fast or not as natively as it could."""


class StxFilterWarning(StxWarning):
    """A filter kept nothing of a set that was asked for as a whole."""


class StxExtractWarning(StxWarning):
    """Prefixes that match nothing of a model that is extracted."""


def warn(text: str, category: type[StxWarning]) -> None:
    """Warn at the line outside this package that led here."""
    level = 1
    frame = sys._getframe(0)
    while frame.f_back is not None and _is_ours(frame.f_globals.get("__name__", "")):
        frame = frame.f_back
        level += 1
    warnings.warn(text, category, stacklevel=level)


def _is_ours(module_name: str) -> bool:
    return module_name.partition(".")[0] in _OURS
