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
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from . import _files, _filter, _options, _progress, _writer
from ._selection import Selection, make_rule, single_path

_BLOCK_BYTES = 1 << 20  # of a stream
_INDEX = "model.safetensors.index.json"


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
        target: path of the file to write; with `max_shard_size` of a folder.
        tensor_filter: what is kept, as for `load_file`; None keeps everything. The filter of
            `patch()`, if one is in force, also counts.
        names: instead of it, exact names, all of which have to be there.
        prefixes: instead of it, what the names begin with: "model.layers.1" means
            "model.layers.1." and never layer 10. Where none of them matches anything the whole
            model is written, with a warning.
        overwrite: whether a target that exists is replaced.
        check: compare every tensor with its source, byte by byte, once it is written. That the
            header is as it should be is always looked at, with safetensors.
        max_shard_size: bytes, or text such as "5GB": write a folder with files of at most so much
            (but whole tensors), and an index if there are several.
        progress: as for `load_file`.

    Raises:
        FileExistsError: the target exists.
        ValueError: the filter keeps nothing, the target is one of the sources, or the arguments
            contradict each other.
        SafetensorError: names that are missing, a file that is none, or one that was changed
            meanwhile. Nothing is written.
        OSError: what reading or writing says, such as a full disk; it names the file.
    """
    rule, asked = make_rule(tensor_filter, names, prefixes)
    with Selection(source, rule, asked) as selection:
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

    `__metadata__` is theirs in one; where two say something else, the first one's word counts.

    Args, Raises: as `extract`; SafetensorError if two files have a tensor of the same name.
    """
    if isinstance(sources, (str, bytes, os.PathLike)):
        raise TypeError("merge takes a list of files; one folder or index is for extract")
    paths: list[str] = []
    for source in sources:
        files = _files.find_files(source)
        paths += [os.fspath(source)] if files is None else files.paths
    return extract(
        paths,
        target,
        overwrite=overwrite,
        check=check,
        max_shard_size=max_shard_size,
        progress=progress,
    )


class ExtractStream:
    """The bytes of the file that `extract` would write, to be sent somewhere else.

    Iterating gives blocks of bytes, and may be done again until it is closed.

    Attributes:
        size_bytes: of the whole file.
        tensors: how many it has.
    """

    def __init__(self, selection: Selection, layout: _writer.Layout, block_bytes: int) -> None:
        self._selection = selection
        self._layout = layout
        self._block_bytes = block_bytes
        self.size_bytes = layout.size_bytes
        self.tensors = len(layout.pieces)

    def __iter__(self) -> Iterator[bytes]:
        layout, block_bytes = self._layout, self._block_bytes
        for at in range(0, len(layout.header), block_bytes):
            yield layout.header[at : at + block_bytes]
        for source, begin, end in layout.runs():
            while begin < end:
                if source.fd < 0:
                    raise ValueError("the stream is closed")
                part = _writer.read_part(source, begin, min(end - begin, block_bytes))
                begin += len(part)
                yield part
        for header in self._selection.headers:
            header.check_unchanged()

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
    selection = Selection(source, rule, asked)
    try:
        layout = _writer.Layout(selection.pieces(), selection.metadata())
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
    path = os.path.abspath(single_path(target))
    shown = _progress.make_progress(_options.Options(progress=progress).progress, "Extracting")
    pieces, metadata = list(selection.pieces()), selection.metadata()
    total_tensors, total_bytes = selection.total()
    size_bytes = sum(piece.nbytes for piece in pieces)
    index = None
    if max_shard_size is None:
        layouts = {path: _writer.Layout(pieces, metadata)}
    else:
        limit_bytes = _options.size_of("max_shard_size", max_shard_size)
        layouts, index = _spread(path, pieces, metadata, limit_bytes)
    targets = [*layouts, *([] if index is None else [index[0]])]
    _check_targets(targets, selection, overwrite)
    with contextlib.ExitStack() as stack:
        if max_shard_size is not None:
            stack.enter_context(_folder(path, targets))
        report = stack.enter_context(_reporting(shown, size_bytes))
        _write_all(layouts, index, overwrite, check, report)
    return ExtractResult(tuple(targets), len(pieces), total_tensors, size_bytes, total_bytes)


def _write_all(
    layouts: dict[str, _writer.Layout],
    index: tuple[str, bytes] | None,
    overwrite: bool,
    check: bool,
    report: Callable[[int, int], None] | None,
) -> None:
    """All of them are on the disk before the first one has its name."""
    drafts: list[_writer.Draft] = []
    done_bytes = 0
    try:
        for path, layout in layouts.items():
            drafts.append(_writer.Draft(path))
            told = None if report is None else functools.partial(report, done_bytes)
            drafts[-1].fill(layout, check, told)
            done_bytes += layout.data_bytes
        if index is not None:
            drafts.append(_writer.Draft(index[0]))
            drafts[-1].write(index[1])
        for draft in drafts:
            draft.publish(overwrite)
    finally:
        for draft in drafts:
            draft.discard()


@contextlib.contextmanager
def _reporting(
    shown: _progress.Progress | None, total_bytes: int
) -> Iterator[Callable[[int, int], None] | None]:
    """What is called with the bytes of the files before, and of this one; or None."""
    if shown is None:
        yield None
        return
    part = shown.part()
    try:
        yield lambda before_bytes, done_bytes: part.report(before_bytes + done_bytes, total_bytes)
    finally:
        part.stop()


def _spread(
    folder: str,
    pieces: list[_writer.Piece],
    metadata: dict[str, str] | None,
    limit_bytes: int,
) -> tuple[dict[str, _writer.Layout], tuple[str, bytes] | None]:
    """Files of at most `limit_bytes`, in the order of the source, and the index of several."""
    shards: list[list[_writer.Piece]] = [[]]
    filled_bytes = 0
    for piece in pieces:
        if shards[-1] and filled_bytes + piece.nbytes > limit_bytes:
            shards.append([])
            filled_bytes = 0
        shards[-1].append(piece)
        filled_bytes += piece.nbytes
    if len(shards) == 1:
        return {
            os.path.join(folder, "model.safetensors"): _writer.Layout(shards[0], metadata)
        }, None
    names = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    weight_map = {
        piece.entry[0]: name for name, shard in zip(names, shards, strict=True) for piece in shard
    }
    told = {
        "metadata": {"total_size": sum(piece.nbytes for piece in pieces)},
        "weight_map": dict(sorted(weight_map.items())),
    }
    layouts = {
        os.path.join(folder, name): _writer.Layout(shard, metadata)
        for name, shard in zip(names, shards, strict=True)
    }
    text = json.dumps(told, ensure_ascii=False, indent=2).encode() + b"\n"
    return layouts, (os.path.join(folder, _INDEX), text)


def _check_targets(targets: list[str], selection: Selection, overwrite: bool) -> None:
    for target in targets:
        for header in selection.headers:
            if _writer.is_same_file(target, header):
                raise ValueError(f"{target} is what is read: give another target")
        if os.path.isdir(target):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), target)
        if os.path.lexists(target) and not overwrite:
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), target)


@contextlib.contextmanager
def _folder(folder: str, targets: list[str]) -> Iterator[None]:
    """A folder in which no other model is; gone again if nothing came of it."""
    is_new = not os.path.lexists(folder)
    if is_new:
        os.mkdir(folder)
    ours = {os.path.basename(target) for target in targets}
    for name in sorted(os.listdir(folder)):
        is_model = name.endswith((".safetensors", ".safetensors.index.json"))
        if is_model and not name.startswith(".") and name not in ours:
            raise FileExistsError(
                errno.EEXIST, "a file of another model is there", os.path.join(folder, name)
            )
    try:
        yield
    except BaseException:
        if is_new:
            with contextlib.suppress(OSError):  # something is in it
                os.rmdir(folder)
        raise
