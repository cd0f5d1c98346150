# SPDX-License-Identifier: Apache-2.0
"""`explain()`: what a load would do, without doing it.

It goes the way of a load up to the plan: header, filter, plan. No tensor's byte is read, and
nothing of it is counted in `stats()`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

from . import _files, _filter, _native, _options, _origin, _sharded, _stock
from ._cli_text import count_text, size_text
from ._request import Request, explain_refusal, fspath, is_cpu, refuse, stock_keywords

_HOW = {
    "nothing": "nothing is kept, nothing is read",
    "warm": "in the page cache: nothing is asked of the system",
    "dense": "all of it is read beside the consumer",
    "sparse": "exactly what is kept is read beside the consumer",
    "owned": "read into memory of its own before the load returns",
    "stock": "safetensors decides",
}
_SMALL = 1 << 20  # less than this is read without an engine
_RESIDENCIES = ("unknown", "cold", "warm")  # the core's enum stx_residency


@dataclasses.dataclass(frozen=True)
class Span:
    """A run of kept tensors of a file: offsets in the file, and how many tensors lie there."""

    begin_bytes: int
    end_bytes: int
    tensors: int


@dataclasses.dataclass(frozen=True)
class FileExplanation:
    """What a load would do with one file.

    Attributes:
        filename: the file.
        native: whether our core would serve it; `reason` says why not.
        policy: "nothing", "warm", "dense", "sparse", "owned" or
            "stock"; `str()` has a sentence for each.
        tensors_kept, tensors_skipped: header entries, by the filter's decision.
        bytes_kept, bytes_skipped: their sizes.
        tensors_by_stock: kept tensors that stock would make: all, where the file is stock's.
        spans: runs of kept tensors; empty where the file is stock's.
        reads: requests that read everything that is kept, the header's included.
        bytes_expected: their sizes. What the page cache holds of them costs no I/O.
        bytes_cached: what the page cache holds of the file now; 0 where the system does not tell.
        size_bytes: the file's size.
        residency: "warm", "cold" or "unknown": what the page cache holds of what is kept. Unknown
            is read as cold.
        engine: what would read into memory of our own ("owned"): "uring" or "threads".
        engine_reason: why not a better one, or not past the page cache; None if nothing is in the
            way.
    """

    filename: str
    native: bool
    reason: str | None
    policy: str
    tensors_kept: int
    tensors_skipped: int
    bytes_kept: int
    bytes_skipped: int
    tensors_by_stock: int
    spans: tuple[Span, ...]
    reads: int | None
    bytes_expected: int | None
    bytes_cached: int | None
    size_bytes: int | None
    residency: str | None = None
    engine: str | None = None
    engine_reason: str | None = None

    def __str__(self) -> str:
        served = "native" if self.native else f"by safetensors ({self.reason})"
        tensors = self.tensors_kept + self.tensors_skipped
        total_bytes = self.bytes_kept + self.bytes_skipped
        lines = [
            f"{self.filename}: {served}; {_HOW[self.policy]}",
            f"  kept     {_tensors(self.tensors_kept)} of {tensors:,},"
            f" {size_text(self.bytes_kept)} of {size_text(total_bytes)}",
            f"  skipped  {_tensors(self.tensors_skipped)}, {size_text(self.bytes_skipped)}",
        ]
        if self.native and self.tensors_by_stock:
            lines.append(
                f"  of these {_tensors(self.tensors_by_stock)} would be made by safetensors"
            )
        if self.bytes_expected is not None:
            lines.append(
                f"  to read  {size_text(self.bytes_expected)} with the header:"
                f" {count_text(self.reads, 'read')} of {count_text(len(self.spans), 'span')};"
                f" in the page cache now: {size_text(self.bytes_cached or 0)}"
            )
        if self.engine is not None:
            reason = f" ({self.engine_reason})" if self.engine_reason else ""
            lines.append(f"  engine   {self.engine}{reason}")
        return "\n".join(lines)


@dataclasses.dataclass(frozen=True)
class Explanation:
    """What a load would do: `files`, and sums over them. `str()` is for people."""

    files: tuple[FileExplanation, ...]

    @property
    def native(self) -> bool:
        """Whether our core would serve every file."""
        return all(file.native for file in self.files)

    @property
    def tensors_kept(self) -> int:
        return sum(file.tensors_kept for file in self.files)

    @property
    def tensors_skipped(self) -> int:
        return sum(file.tensors_skipped for file in self.files)

    @property
    def bytes_kept(self) -> int:
        return sum(file.bytes_kept for file in self.files)

    @property
    def bytes_skipped(self) -> int:
        return sum(file.bytes_skipped for file in self.files)

    @property
    def reads(self) -> int:
        """Requests of the native files."""
        return sum(file.reads or 0 for file in self.files)

    @property
    def bytes_expected(self) -> int:
        """What the native files' requests read."""
        return sum(file.bytes_expected or 0 for file in self.files)

    def as_dict(self) -> dict[str, Any]:
        """Everything as plain values."""
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        lines = [str(file) for file in self.files]
        if len(self.files) != 1:
            native = sum(file.native for file in self.files)
            lines.append(
                f"total: {count_text(len(self.files), 'file')}, {native} native;"
                f" {_tensors(self.tensors_kept)} kept, {size_text(self.bytes_kept)};"
                f" {size_text(self.bytes_expected)} to read in {count_text(self.reads, 'read')}"
            )
        return "\n".join(lines)


def explain(
    filename: _files.Source,
    tensor_filter: _filter.TensorFilter = None,
    device: str | int = "cpu",
    *,
    framework: str = "pt",
    backend: str = "mmap",
    include_keys: Iterable[str] | None = None,
    **options: Any,
) -> Explanation:
    """Say what loading a file, or each of many files, would do; read headers and nothing else.

    Args:
        filename: path of a file, a list of them, a folder or an index, as for `load_file`.
        tensor_filter: as for `load_file`; the filter of `patch()`, if one is in force, also counts.
        device: as for `load_file`.
        framework: as for `safe_open`.
        backend: "mmap" or "pread".
        include_keys: exact names, instead of `tensor_filter`.
        **options: as for `load_file`.

    Raises:
        FileNotFoundError, OSError, SafetensorError: what loading the file raises.
        TypeError, ValueError: a filter that is none, or contradictory keywords.
    """
    _stock.take()
    if "strict_filter" in options:
        raise TypeError("explain() got an unexpected keyword argument 'strict_filter'")
    own: dict[str, Any] = {"tensor_filter": tensor_filter, "include_keys": include_keys, **options}
    request = Request(True, (), own)
    if own:
        raise TypeError(f"explain() got an unexpected keyword argument {next(iter(own))!r}")
    filenames: Any = filename if isinstance(filename, (list, tuple)) else [filename]
    files = None if isinstance(filename, (list, tuple)) else _files.find_files(filename)
    if files is not None:
        filenames = _sharded.choose_paths(files, request.rule)
    return Explanation(
        tuple(_explain_file(request, one, framework, device, backend) for one in filenames)
    )


def _explain_file(
    request: Request, filename: Any, framework: Any, device: Any, backend: Any
) -> FileExplanation:
    path = fspath(filename)
    reason = refuse({}, path, framework, device, backend)
    if reason is None:
        assert path is not None
        reads = backend == "pread" or not is_cpu(device)
        try:
            return _from_core(
                path, _native.core.explain(path, request.rule, reads), request.options, reads
            )
        except _native.core.Refused as refusal:
            reason = explain_refusal(path, refusal)
    return _by_stock(request, filename, framework, device, backend, reason)


def _from_core(
    path: str, told: dict[str, Any], options: _options.Options, reads: bool
) -> FileExplanation:
    skipped = told["tensors"] - told["tensors_kept"]
    data_bytes = told["data_bytes"]
    policy = "owned" if reads else "sparse" if skipped else "dense"
    residency = _RESIDENCIES[told["residency"]]
    if residency == "warm" and not reads:
        policy = "warm" if told["reads"] else "nothing"
    return FileExplanation(
        filename=path,
        native=True,
        reason=None,
        policy=policy,
        tensors_kept=told["tensors_kept"],
        tensors_skipped=skipped,
        bytes_kept=told["bytes_kept"],
        bytes_skipped=data_bytes - told["bytes_kept"],
        tensors_by_stock=told["tensors_foreign"],
        spans=tuple(Span(*span) for span in told["spans"]),
        reads=told["header_reads"] + told["reads"],
        bytes_expected=told["header_read_bytes"] + told["bytes_read"],
        bytes_cached=told["cached_bytes"],
        size_bytes=told["file_bytes"],
        residency=residency,
        **(_explain_engine(options, residency) if reads and told["bytes_kept"] >= _SMALL else {}),
    )


def _explain_engine(options: _options.Options, residency: str) -> dict[str, str | None]:
    """Which engine would read, and what keeps it from being a better one or from direct reads."""
    kind = options.core[0]
    engine = _native.core.probe_engine(kind)
    reasons = []
    if engine == "threads":
        asked = options.engine == "threads"
        reasons.append("asked for" if asked else _native.core.engine()[1])
    if options.direct_io == "off":
        reasons.append("direct_io is off")
    elif options.direct_io == "auto" and residency == "warm":
        reasons.append("in the page cache")
    return {"engine": engine, "engine_reason": "; ".join(filter(None, reasons)) or None}


def _by_stock(
    request: Request, filename: Any, framework: Any, device: Any, backend: Any, reason: str
) -> FileExplanation:
    """The same of a file that stock would serve, or stock's error for it."""
    with _stock.bypass():
        handle = _stock.safe_open(filename, **stock_keywords(framework, device, backend))
    path = fspath(filename)
    with handle:
        names = handle.keys()
        sizes = {name: _size_of(handle.get_slice(name)) for name in names}
        kept = names if request.rule is None else _origin.keep_names(handle, request.rule, path)
    kept_bytes = sum(sizes[name] for name in kept)
    return FileExplanation(
        filename=str(path),
        native=False,
        reason=reason,
        policy="stock",
        tensors_kept=len(kept),
        tensors_skipped=len(names) - len(kept),
        bytes_kept=kept_bytes,
        bytes_skipped=sum(sizes.values()) - kept_bytes,
        tensors_by_stock=len(kept),
        spans=(),
        reads=None,
        bytes_expected=None,
        bytes_cached=None,
        size_bytes=None,
    )


def _size_of(entry: Any) -> int:
    return _origin.count_bytes(entry.get_dtype(), entry.get_shape())


def _tensors(count: int) -> str:
    return count_text(count, "tensor")
