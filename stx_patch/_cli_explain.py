# SPDX-License-Identifier: Apache-2.0
"""`stx-patch explain`: what loading files would read, and who would serve them."""

from __future__ import annotations

import argparse
import json
from typing import Any

from ._cli_filters import add_filters, check_asked, filter_of, nothing_kept
from ._cli_options import add_options, options_of
from ._cli_text import printable, write
from ._headers import names_in, naming_bad_files

_EXAMPLES = """\
examples:
  stx-patch explain model.safetensors
  stx-patch explain llama/ --layers 0:2 --prefix model.embed_tokens
  stx-patch explain llama/ --backend pread --engine threads
  stx-patch explain llama/ --device cuda:0 --json
"""
_SUMS = (
    "native", "tensors_kept", "tensors_skipped", "bytes_kept", "bytes_skipped", "reads",
    "bytes_expected",
)  # fmt: skip


def add_to(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "explain",
        help="what loading them would read, without loading",
        description="Say what load_file would do with files: what is kept, what is read, and\n"
        "whether it is served natively. Headers are read, and nothing else.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "source", nargs="+", help="a file, a folder, or a model.safetensors.index.json"
    )
    parser.add_argument("--json", action="store_true", help="everything, for programs")
    parser.add_argument("--backend", choices=("mmap", "pread"), default="mmap")
    parser.add_argument("--device", default="cpu", help="cpu, cuda:1, 1, ...")
    add_options(parser, "As keywords of load_file.")
    add_filters(parser)
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    from ._explain import explain

    sources: list[str] = arguments.source
    options: dict[str, Any] = options_of(arguments)
    device = arguments.device
    with naming_bad_files(sources):
        told = explain(
            sources[0] if len(sources) == 1 else sources,
            filter_of(arguments),
            int(device) if device.isdecimal() else device,
            backend=arguments.backend,
            **options,
        )
    if told.tensors_skipped:
        names = names_in(sources)
        if not told.tensors_kept:
            raise nothing_kept(arguments, names)
        check_asked(arguments, names)
    if arguments.json:
        sums = {name: getattr(told, name) for name in _SUMS}
        write(json.dumps({**told.as_dict(), **sums}))
    else:
        write("\n".join(map(printable, str(told).split("\n"))))
    return 0
