# SPDX-License-Identifier: Apache-2.0
"""What a file that is written is made of: its header, and the tensors of other files in order.

Nothing is read or written here.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from typing import Any

from . import _dtype, _header

_ALIGN_BYTES = 8
_HEADER_BYTES_MAX = 100_000_000  # the format's limit
_RANKS = {dtype: rank for rank, dtype in enumerate(_dtype.BITS)}


class Piece:
    """A tensor and the file it is in.

    Attributes:
        source: its file.
        entry: it in that file's header.
    """

    __slots__ = ("entry", "source")

    def __init__(self, source: _header.Header, entry: _header.Entry) -> None:
        self.source = source
        self.entry = entry

    @property
    def nbytes(self) -> int:
        return self.entry[4] - self.entry[3]


class Layout:
    """What a file is made of: the header's bytes, then tensors in safetensors' own order, which
    aligns them and depends on nothing but their dtypes and names.

    Attributes:
        header: length and JSON, padded.
        pieces: the tensors.
        data_bytes: their sizes.
    """

    __slots__ = ("data_bytes", "header", "pieces")

    def __init__(self, pieces: Iterable[Piece], metadata: dict[str, str] | None) -> None:
        """ValueError if the header would be longer than the format allows."""
        self.pieces = sorted(pieces, key=_place_in_order)
        header: dict[str, Any] = {} if metadata is None else {"__metadata__": metadata}
        end = 0
        for piece in self.pieces:
            name, dtype, shape = piece.entry[:3]
            begin, end = end, end + piece.nbytes
            header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
        self.data_bytes = end
        text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
        text += b" " * (-len(text) % _ALIGN_BYTES)
        if len(text) > _HEADER_BYTES_MAX:
            raise ValueError(
                f"{len(self.pieces):,} tensors need a header of {len(text):,} bytes, and a file may"
                f" have one of {_HEADER_BYTES_MAX:,}: write several (max_shard_size=)"
            )
        self.header = len(text).to_bytes(_header.PREFIX_BYTES, "little") + text

    @property
    def size_bytes(self) -> int:
        """Of the file."""
        return len(self.header) + self.data_bytes

    def runs(self) -> Iterator[tuple[_header.Header, int, int]]:
        """(file, begin, end) of what follows the header, neighbours in one."""
        source, begin, end = None, 0, 0
        for piece in self.pieces:
            if piece.source is source and piece.entry[3] == end:
                end = piece.entry[4]
                continue
            if source is not None and begin != end:
                yield source, begin, end
            source, (begin, end) = piece.source, piece.entry[3:]
        if source is not None and begin != end:
            yield source, begin, end


def _place_in_order(piece: Piece) -> tuple[int, str]:
    name, dtype = piece.entry[:2]
    return -_RANKS.get(dtype, -1), name  # one that only a newer safetensors knows comes last
