# SPDX-License-Identifier: Apache-2.0
"""`extract()` and `merge()`: a part of a model, or several files, as a minimal safetensors file.

Which tensors, of which files, and how they are spread over the files that are written; those are
written by stx_patch._writer. No tensor is made: torch is not imported.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import functools
import json
import os
import shutil
import stat
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from . import _files, _filter, _layout, _options, _progress, _writer
from ._selection import Selection, make_rule, path_of

_BLOCK_BYTES = 1 << 20  # of a stream
_INDEX = "model.safetensors.index.json"
_MODEL_FILES = (".safetensors", ".safetensors.index.json")


@dataclasses.dataclass(frozen=True)
class ExtractResult:
    """What was written.

    Attributes:
        paths: the files; the index of several comes last.
        tensors, size_bytes: the tensors in them, and their sizes.
        tensors_total, total_bytes: those of the files that were read.
    """

    paths: tuple[str, ...]
    tensors: int
    tensors_total: int
    size_bytes: int
    total_bytes: int


def extract(
    source: _files.Source,
    target: str | os.PathLike[str],
    *,
    tensor_filter: _filter.TensorFilter = None,
    names: Iterable[str] | None = None,
    prefixes: Iterable[str] | None = None,
    overwrite: bool = False,
    check: bool = False,
    max_shard_size: int | str | None = None,
    progress: _progress.Target = False,
) -> ExtractResult:
    """Write the tensors that are kept, and `__metadata__`, as a safetensors file of their own.

    Only what is kept is read, and it is not held in memory. The same call writes the same bytes.
    Under the target's name there is the whole file or nothing new, at any time.

    Args:
        source: path of a file, a list of them, a folder or an index.
        target: path of the file to write; with `max_shard_size` of a folder, new or empty.
        tensor_filter: what is kept, as for `load_file`; None keeps everything. The filter of
            `patch()`, if one is in force, also counts.
        names: instead of it, exact names, all of which have to be there.
        prefixes: instead of it, what the names begin with: "model.layers.1" means
            "model.layers.1." and never layer 10. Where none of them matches anything the whole
            model is written, with a warning.
        overwrite: whether a target that exists is replaced: a file, a link itself and not what it
            leads to, a folder that holds a model and nothing else.
        check: compare every tensor with its source, byte by byte, once it is written. That the
            header is as it should be is always looked at, with safetensors.
        max_shard_size: bytes, or text such as "5GB": write a folder with files of tensors of at
            most so much together (but whole ones), and an index if there are several.
        progress: as for `load_file`.

    Raises:
        FileExistsError: the target exists, or is a folder with something else in it.
        ValueError: the filter keeps nothing, the target is one of the sources, or the arguments
            contradict each other.
        SafetensorError: names that are missing, a file that is none, or one that was changed
            meanwhile. Nothing is written.
        OSError: what reading or writing says, such as a full disk; it names the file.
    """
    rule, asked = make_rule(tensor_filter, names, prefixes)
    with Selection([source], rule, asked) as selection:
        return _write(selection, target, overwrite, check, max_shard_size, progress)


def merge(
    sources: Sequence[str | os.PathLike[str]],
    target: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    check: bool = False,
    max_shard_size: int | str | None = None,
    progress: _progress.Target = False,
) -> ExtractResult:
    """Write the tensors of several files, folders or indexes as one safetensors file.

    `__metadata__` is theirs in one; where two say something else, the first one's word counts. The
    filter of `patch()`, if one is in force, counts.

    Args, Raises: as `extract`; SafetensorError if two files have a tensor of the same name.
    """
    if isinstance(sources, (str, bytes, os.PathLike)):
        raise TypeError("merge takes a list of files; one folder or index is for extract")
    with Selection(list(sources), None, "tensor_filter") as selection:
        return _write(selection, target, overwrite, check, max_shard_size, progress)


class ExtractStream:
    """The bytes of the file that `extract` would write, to be sent somewhere else.

    Iterating gives blocks of bytes, and may be done again until it is closed.

    Attributes:
        size_bytes: of the whole file.
        tensors: how many it has.
    """

    def __init__(self, selection: Selection, layout: _layout.Layout, block_bytes: int) -> None:
        self._selection = selection
        self._layout = layout
        self._block_bytes = block_bytes
        self.size_bytes = layout.size_bytes
        self.tensors = len(layout.pieces)

    def __iter__(self) -> Iterator[bytes]:
        layout, block_bytes = self._layout, self._block_bytes
        self._check_open()
        for at in range(0, len(layout.header), block_bytes):
            yield layout.header[at : at + block_bytes]
        for source, begin, end in layout.runs():
            while begin < end:
                self._check_open()
                part = _writer.read_part(source, begin, min(end - begin, block_bytes))
                begin += len(part)
                yield part
        self._check_open()
        for header in self._selection.headers:
            header.check_unchanged()

    def _check_open(self) -> None:
        if self._selection.is_closed:
            raise ValueError("the stream is closed")

    def close(self) -> None:
        """Close the files it reads. Twice is fine."""
        self._selection.close()

    def __enter__(self) -> ExtractStream:
        return self

    def __exit__(self, *exc_info: Any) -> None:
        self.close()


def extract_stream(
    source: _files.Source,
    *,
    tensor_filter: _filter.TensorFilter = None,
    names: Iterable[str] | None = None,
    prefixes: Iterable[str] | None = None,
    block_bytes: int = _BLOCK_BYTES,
) -> ExtractStream:
    """The file that `extract` would write, as blocks of at most `block_bytes` and a known total.

    Args, Raises: as `extract`. A file that is changed meanwhile raises SafetensorError out of the
        iteration, at its end at the latest: what was sent is of no use then.
    """
    if block_bytes < 1:
        raise ValueError(f"block_bytes must be at least 1, not {block_bytes}")
    rule, asked = make_rule(tensor_filter, names, prefixes)
    selection = Selection([source], rule, asked)
    try:
        layout = _layout.Layout(selection.pieces(), selection.metadata())
        return ExtractStream(selection, layout, block_bytes)
    except BaseException:
        selection.close()
        raise


# --- what is written ---


def _write(
    selection: Selection,
    target: str | os.PathLike[str],
    overwrite: bool,
    check: bool,
    max_shard_size: int | str | None,
    progress: _progress.Target,
) -> ExtractResult:
    # Not normalised: what ".." means behind a link only the system knows.
    path = os.path.join(os.getcwd(), path_of("a target", target))
    shown = _progress.make_progress(_options.Options(progress=progress).progress, "Extracting")
    pieces, metadata = list(selection.pieces()), selection.metadata()
    total_tensors, total_bytes = selection.total()
    size_bytes = sum(piece.nbytes for piece in pieces)
    with _reporting(shown, size_bytes) as report:
        if max_shard_size is None:
            _check_target(path, selection, overwrite)
            _write_file(
                _writer.Draft(path), _layout.Layout(pieces, metadata), overwrite, check, report
            )
            paths = [path]
        else:
            limit_bytes = _options.size_of("max_shard_size", max_shard_size)
            if limit_bytes == 0:
                raise ValueError("max_shard_size must be more than 0")
            path = path.rstrip("/") or "/"
            _check_folder(path, selection, overwrite)
            shards = _spread(pieces, limit_bytes)
            paths = _write_folder(path, shards, metadata, overwrite, check, report)
    return ExtractResult(tuple(paths), len(pieces), total_tensors, size_bytes, total_bytes)


def _write_file(
    draft: _writer.Draft,
    content: _layout.Layout | bytes,
    overwrite: bool = False,
    check: bool = False,
    report: _writer.Progress | None = None,
) -> None:
    try:
        draft.open()
        if isinstance(content, bytes):
            draft.write(content)
        else:
            draft.fill(content, check, report)
        draft.publish(overwrite)
    finally:
        draft.discard()


def _write_folder(
    folder: str,
    shards: dict[str, list[_layout.Piece]],
    metadata: dict[str, str] | None,
    overwrite: bool,
    check: bool,
    report: _writer.Progress | None,
) -> list[str]:
    """The paths of what it holds. It is made under a temporary name: whoever loads a folder without
    an index takes what there is, so there must be none with some of the files."""
    made = _writer.temporary_path(folder)
    done_bytes = 0
    contents: dict[str, _layout.Layout | bytes] = {}
    for name, pieces in shards.items():
        contents[name] = _layout.Layout(pieces, metadata)
    if len(shards) > 1:
        contents[_INDEX] = _make_index(shards)
    try:
        with _writer.naming(folder):
            os.mkdir(made)
        for name, content in contents.items():
            told = None if report is None else functools.partial(_add, report, done_bytes)
            draft = _writer.Draft(os.path.join(folder, name), made)
            _write_file(draft, content, check=check, report=told)
            done_bytes += 0 if isinstance(content, bytes) else content.data_bytes
        _writer.publish_folder(made, folder, overwrite)
    except BaseException:
        shutil.rmtree(made, ignore_errors=True)
        raise
    return [os.path.join(folder, name) for name in contents]


def _add(report: _writer.Progress, before_bytes: int, done_bytes: int) -> None:
    report(before_bytes + done_bytes)


@contextlib.contextmanager
def _reporting(
    shown: _progress.Progress | None, total_bytes: int
) -> Iterator[_writer.Progress | None]:
    """What is told how many bytes are done; or None."""
    if shown is None:
        yield None
        return
    part = shown.part()
    try:
        yield lambda done_bytes: part.report(done_bytes, total_bytes)
    finally:
        part.stop()


def _spread(pieces: list[_layout.Piece], limit_bytes: int) -> dict[str, list[_layout.Piece]]:
    """File name -> tensors of at most `limit_bytes` together, in the order of the source."""
    shards: list[list[_layout.Piece]] = [[]]
    filled_bytes = 0
    for piece in pieces:
        if shards[-1] and filled_bytes + piece.nbytes > limit_bytes:
            shards.append([])
            filled_bytes = 0
        shards[-1].append(piece)
        filled_bytes += piece.nbytes
    if len(shards) == 1:
        return {"model.safetensors": shards[0]}
    count = len(shards)
    return {f"model-{i + 1:05}-of-{count:05}.safetensors": shards[i] for i in range(count)}


def _make_index(shards: dict[str, list[_layout.Piece]]) -> bytes:
    weight_map = {piece.entry[0]: name for name, shard in shards.items() for piece in shard}
    total_bytes = sum(piece.nbytes for shard in shards.values() for piece in shard)
    told = {
        "metadata": {"total_size": total_bytes},
        "weight_map": dict(sorted(weight_map.items())),
    }
    return json.dumps(told, ensure_ascii=False, indent=2).encode() + b"\n"


def _check_target(target: str, selection: Selection, overwrite: bool) -> None:
    for path in selection.paths:
        if _writer.is_same_file(target, path):
            raise ValueError(f"{target} is what is read: give another target")
    if os.path.isdir(target) or not os.path.basename(target):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), target)
    try:
        mode = os.lstat(target).st_mode
    except FileNotFoundError:
        return
    if not overwrite:
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), target)
    if not stat.S_ISREG(mode) and not stat.S_ISLNK(mode):
        raise FileExistsError(errno.EEXIST, "is no file that could be replaced", target)


def _check_folder(folder: str, selection: Selection, overwrite: bool) -> None:
    """It is new or empty or, to overwrite, holds a model and nothing else."""
    for path in selection.paths:
        if _writer.is_same_file(folder, os.path.dirname(path) or "."):
            raise ValueError(f"{folder} is the folder of what is read: give another target")
    try:
        mode = os.lstat(folder).st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISDIR(mode):
        raise FileExistsError(errno.EEXIST, "is no folder", folder)
    names = os.listdir(folder)
    if names and not overwrite:
        raise FileExistsError(errno.EEXIST, "is a folder that is not empty", folder)
    others = [name for name in names if not name.endswith(_MODEL_FILES)]
    if others:
        what = f"holds {min(others)}, which is no part of a model that could be replaced"
        raise FileExistsError(errno.EEXIST, what, folder)
