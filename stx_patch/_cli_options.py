# SPDX-License-Identifier: Apache-2.0
"""The options that say how files are read, for the commands that read tensors.

Their values are what keywords and variables take (stx_patch.Options), which also checks them.
"""

from __future__ import annotations

import argparse

_TEXTS = {
    "engine": "auto, uring or threads: what reads into owned memory",
    "read_ahead": "auto, off or a size: how far a mapped file is read ahead",
    "inflight_bytes": "auto or a size such as 64MiB: how much is being read at a time",
    "direct_io": "auto, on or off: whether reads go past the page cache",
    "staging_bytes": "auto or a size: pinned memory of loads to a CUDA device",
}


def add_options(parser: argparse.ArgumentParser, description: str) -> None:
    """Add the options; `options_of` gives what is said."""
    group = parser.add_argument_group("options of reading", description)
    for name, text in _TEXTS.items():
        group.add_argument(f"--{name.replace('_', '-')}", metavar="VALUE", help=text)


def options_of(arguments: argparse.Namespace) -> dict[str, str]:
    """The options that are given, by their names as keywords."""
    values = {name: getattr(arguments, name) for name in _TEXTS}
    return {name: value for name, value in values.items() if value is not None}
