# SPDX-License-Identifier: Apache-2.0
"""Text for people: sizes, counts, tables, and names that cannot drive a terminal."""

from __future__ import annotations

import sys
from collections.abc import Sequence


def size_text(size_bytes: int) -> str:
    """Decimal units, as file managers and disks have them."""
    if size_bytes < 1000:
        return count_text(size_bytes, "byte")
    for unit in ("kB", "MB", "GB"):
        size = size_bytes / 10 ** {"kB": 3, "MB": 6, "GB": 9}[unit]
        if size < 999.95 or unit == "GB":
            break
    return f"{size:,.1f} {unit}"


def count_text(count: int | None, what: str) -> str:
    """A count with what is counted: "1 tensor", "2,000 tensors"."""
    return f"{count:,} {what}{'' if count == 1 else 's'}"


def printable(text: str) -> str:
    """`text` with an escape in place of each character that is not to be seen: a name may hold line
    ends, terminal codes, or bytes that are no UTF-8."""
    if text.isprintable():
        return text
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode() for char in text
    )


def table(rows: Sequence[Sequence[str]], align: str) -> str:
    """Columns two spaces apart. `align` has "<" or ">" for each of them."""
    if not rows:
        return ""
    widths = [max(1, *map(len, column)) for column in zip(*rows, strict=True)]
    pattern = "  ".join(f"{{:{side}{width}}}" for side, width in zip(align, widths, strict=True))
    return "\n".join([pattern.format(*row).rstrip() for row in rows])


def write(text: str) -> None:
    """Print lines on stdout, with escapes for what its encoding does not have."""
    if sys.stdout is None:  # the program was started without
        return
    try:
        sys.stdout.write(text + "\n")
    except UnicodeEncodeError:
        encoding = sys.stdout.encoding
        sys.stdout.write(text.encode(encoding, "backslashreplace").decode(encoding) + "\n")
