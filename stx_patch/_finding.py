# SPDX-License-Identifier: Apache-2.0
"""What `stx-patch doctor` says of one thing."""

from __future__ import annotations

from typing import NamedTuple

OK, NOTE, PROBLEM = "ok", "note", "problem"


class Finding(NamedTuple):
    """One thing that was looked at.

    Attributes:
        name: of the thing.
        state: OK, NOTE (loads are right, and may be slower or otherwise than one thinks) or
            PROBLEM (what this package is for does not happen).
        seen: what was found, as a sentence.
        advice: what to do, or None.
    """

    name: str
    state: str
    seen: str
    advice: str | None = None


def worse(first: str, second: str) -> str:
    """The state that weighs more."""
    return max(first, second, key=(OK, NOTE, PROBLEM).index)
