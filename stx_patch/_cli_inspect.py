# SPDX-License-Identifier: Apache-2.0
"""`stx-patch inspect`: what is in files, from their headers alone."""

from __future__ import annotations

import argparse
import json
import math
import os
from collections.abc import Iterable
from typing import Any

from . import _filter
from ._cli_filters import add_filters, check_asked, filter_of, nothing_kept
from ._cli_text import count_text, printable, size_text, table, write
from ._headers import Header, Headers, Tensor, names_in, no_collections, read_headers
from ._tree import Row, Tree, View

_METADATA_MAX = 80  # characters of a value; --json has all

_EXAMPLES = """\
examples:
  stx-patch inspect model.safetensors
  stx-patch inspect llama/ --depth 2                         a folder, down to two levels
  stx-patch inspect llama/ --sort size | head                the largest first
  stx-patch inspect llama/ --layers 0:1 --all                every tensor of one layer
  stx-patch inspect a.safetensors b.safetensors              several files as one
  stx-patch inspect llama/ --json | jq -r '.tensors[].name'
"""


def add_to(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "inspect",
        help="what is in files: a tree of modules and tensors",
        description="Show the tensors of files as a tree, with dtypes, shapes and sizes. Numbered\n"
        "siblings that look the same are one line: `layers.0-31 (32x)`. Only headers are read.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "source", nargs="+", help="a file, a folder, or a model.safetensors.index.json"
    )
    parser.add_argument("--json", action="store_true", help="everything, for programs")
    parser.add_argument("--all", action="store_true", help="do not fold what looks the same")
    parser.add_argument("--depth", type=_depth, metavar="N", help="fold what lies below N levels")
    parser.add_argument(
        "--sort", choices=("name", "size", "file"), default="name", help="order of siblings"
    )
    add_filters(parser)
    parser.set_defaults(run=_run)


def _depth(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is no number of levels")
    return int(text)


def _run(arguments: argparse.Namespace) -> int:
    rule = _filter.make_rule(filter_of(arguments))
    headers = read_headers(arguments.source, rule)
    with no_collections():
        kept = headers.tensors if rule is None else _keep(headers, rule)
        if rule is not None:
            names = names_in(arguments.source)
            if not kept:
                raise nothing_kept(arguments, names)
            check_asked(arguments, names)
        if arguments.json:
            write(_json(headers, kept))
        else:
            view = View(arguments.depth, arguments.sort, not arguments.all)
            write(_text(headers, kept, view))
    return 0


def _keep(headers: Headers, rule: _filter.Rule) -> list[Tensor]:
    def key(tensor: Tensor) -> _filter.TensorKey:
        size_bytes = tensor.end_bytes - tensor.begin_bytes
        path = headers.files[tensor.file].path
        return _filter.TensorKey(tensor.name, tensor.dtype, tuple(tensor.shape), size_bytes, path)

    return [tensor for tensor in headers.tensors if _filter.matches(rule, key(tensor))]


# --- for people ---


def _text(headers: Headers, kept: list[Tensor], view: View) -> str:
    total_bytes = sum(tensor.end_bytes - tensor.begin_bytes for tensor in kept)
    names = [printable(os.path.basename(header.path)) for header in headers.files]
    lines: list[tuple[str, ...]] = [("name", "tensors", "dtype", "shape", "size", "share", "file")]
    lines += [_line(row, total_bytes, names) for row in Tree(kept).rows(view)]
    align = "<><<>><"
    if len(names) == 1:
        lines = [line[:-1] for line in lines]
        align = align[:-1]
    parts = [table(lines, align)] if kept else []
    parts += _metadata_lines(headers.metadata)
    parts += [f"note: {printable(note)}" for note in headers.notes]
    parts.append(_totals_line(headers, kept, total_bytes))
    return "\n".join(parts)


def _line(row: Row, total_bytes: int, names: list[str]) -> tuple[str, ...]:
    share = row.size_bytes / total_bytes if total_bytes else 0
    return (
        "  " * row.depth + printable(row.label),
        f"{row.tensors:,}",
        ",".join(row.dtypes),
        "" if row.shape is None else str(row.shape),
        size_text(row.size_bytes),
        f"{share:.1%}",
        names[row.files[0]] if len(row.files) == 1 else count_text(len(row.files), "file"),
    )


def _metadata_lines(metadata: dict[str, str]) -> list[str]:
    lines = []
    for name, value in sorted(metadata.items()):
        shown = value if len(value) <= _METADATA_MAX else value[: _METADATA_MAX - 3] + "..."
        lines.append(f"metadata: {printable(name)} = {printable(shown)}")
    return lines


def _totals_line(headers: Headers, kept: list[Tensor], total_bytes: int) -> str:
    of_all = f" of {headers.tensors_total:,}" if len(kept) != headers.tensors_total else ""
    dtypes = _count_dtypes(kept)
    return ", ".join(
        [
            count_text(len(kept), "tensor") + of_all,
            size_text(total_bytes),
            count_text(_count_parameters(kept), "parameter"),
            *(f"{dtype} {size_text(sums['bytes'])}" for dtype, sums in dtypes.items()),
            count_text(len(headers.files), "file"),
        ]
    )


def _count_parameters(tensors: Iterable[Tensor]) -> int:
    return sum(math.prod(tensor.shape) for tensor in tensors)


def _count_dtypes(tensors: Iterable[Tensor]) -> dict[str, dict[str, int]]:
    """Dtype -> tensors and bytes, most bytes first."""
    counts: dict[str, list[int]] = {}
    for tensor in tensors:
        sums = counts.setdefault(tensor.dtype, [0, 0])
        sums[0] += 1
        sums[1] += tensor.end_bytes - tensor.begin_bytes
    by_size = sorted(counts.items(), key=lambda item: -item[1][1])
    return {dtype: {"tensors": sums[0], "bytes": sums[1]} for dtype, sums in by_size}


# --- for programs ---


def _json(headers: Headers, kept: list[Tensor]) -> str:
    """Offsets are those in the file, from its first byte."""
    paths = [header.path for header in headers.files]
    tensors = [
        {
            "name": name,
            "dtype": dtype,
            "shape": shape,
            "bytes": end_bytes - begin_bytes,
            "file": paths[file],
            "offsets": [begin_bytes, end_bytes],
        }
        for name, dtype, shape, begin_bytes, end_bytes, file in kept
    ]
    document = {
        "files": [_file_json(header) for header in headers.files],
        "metadata": headers.metadata,
        "tensors": tensors,
        "totals": {
            "tensors": len(kept),
            "bytes": sum(tensor.end_bytes - tensor.begin_bytes for tensor in kept),
            "parameters": _count_parameters(kept),
            "dtypes": _count_dtypes(kept),
            "files": len(paths),
        },
        "notes": headers.notes,
    }
    return json.dumps(document)


def _file_json(header: Header) -> dict[str, Any]:
    return {
        "path": header.path,
        "bytes": header.size_bytes,
        "header_bytes": header.data_begin_bytes,
        "metadata": header.metadata,
        "tensors": len(header.tensors),
    }
