# SPDX-License-Identifier: Apache-2.0
"""How files are read: the options of `patch()`, `safe_open` and `load_file`, and their variables.

A keyword counts before the patch entry's option, that before the environment, that before the
default. Nothing here changes what is loaded, only how.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Mapping
from typing import Any

from . import _progress

_ENGINES = ("auto", "uring", "threads")
_DIRECT_IO = ("auto", "on", "off")
_UNITS = {
    "": 1, "b": 1, "k": 1 << 10, "kib": 1 << 10, "m": 1 << 20, "mib": 1 << 20, "g": 1 << 30,
    "gib": 1 << 30, "kb": 10**3, "mb": 10**6, "gb": 10**9,
}  # fmt: skip
_SIZE = re.compile(r"\s*([0-9]{1,30})\s*([A-Za-z]*)\s*\Z")
_MAX_BYTES = (1 << 63) - 1
_STAGING_BYTES = 64 << 20

Size = int | str


def _check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if not isinstance(value, str):
        raise TypeError(f"{name} must be one of {choices}, not {type(value).__name__}")
    if value not in choices:
        raise ValueError(f"{name} must be one of {choices}, not {value!r}")


def _size(name: str, value: object, words: tuple[str, ...]) -> int | str:
    if isinstance(value, str):
        if value in words:
            return value
        matched = _SIZE.match(value)
        if matched is None or matched[2].lower() not in _UNITS:
            others = f" or one of {words}" if words else ', such as "5GB"'
            raise ValueError(f"{name} must be a number of bytes{others}, not {value!r}")
        value = int(matched[1]) * _UNITS[matched[2].lower()]
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} must be an int or a str, not {type(value).__name__}")
    if not 0 <= value <= _MAX_BYTES:
        raise ValueError(f"{name} must be from 0 to {_MAX_BYTES}, not {value}")
    return value


def size_of(name: str, value: object) -> int:
    """A number of bytes, or text such as "5GB"; TypeError or ValueError, naming it, otherwise."""
    return int(_size(name, value, ()))


def _progress_target(value: object) -> Any:
    """The value as it is, or as the text of a variable means it."""
    if isinstance(value, bool) or callable(value):
        return value
    if value is None:
        return False
    if not isinstance(value, str):
        raise TypeError(
            f'progress must be a bool, "force" or a callable, not {type(value).__name__}'
        )
    words = {"0": False, "false": False, "1": True, "true": True, "force": "force"}
    if value.lower() not in words:
        raise ValueError(f'progress must be a bool, "force" or a callable, not {value!r}')
    return words[value.lower()]


@dataclasses.dataclass(frozen=True)
class Options:
    """How files are read. Sizes are bytes: an int, or text such as "512MiB".

    Attributes:
        engine: what reads into memory of our own (`backend="pread"`, `tensors()`): "uring",
            "threads", or "auto", the best that is to be had.
        read_ahead: how far to read ahead of the consumer of a mapped file that is not in the page
            cache: "off", bytes, or "auto", at most a quarter of the memory that is available.
        inflight_bytes: how much is being read at a time into memory of our own: bytes, or "auto",
            16 MiB and more where that is faster.
        direct_io: whether reads into memory of our own go past the page cache: "on" (where the file
            system can), "off", or "auto", unless the file is in the page cache already.
        progress: for loads that wait (`backend="pread"`, `tensors()`): True for a bar, if stderr is
            a terminal, "force" for a bar anyway, or a callable that is given (done_bytes,
            total_bytes) about twenty times a second; what it raises ends the load.
        staging_bytes: how much pinned memory loads to a CUDA device go through; the first of a
            process to a device says. Bytes, or "auto", 64 MiB.

    Raises:
        TypeError, ValueError: a value that is none of these.
    """

    engine: str = "auto"
    read_ahead: Size = "auto"
    inflight_bytes: Size = "auto"
    direct_io: str = "auto"
    progress: _progress.Target = False
    staging_bytes: Size = "auto"

    def __post_init__(self) -> None:
        _check_choice("engine", self.engine, _ENGINES)
        _check_choice("direct_io", self.direct_io, _DIRECT_IO)
        object.__setattr__(
            self, "read_ahead", _size("read_ahead", self.read_ahead, ("auto", "off"))
        )
        inflight = _size("inflight_bytes", self.inflight_bytes, ("auto",))
        if inflight == 0:
            raise ValueError("inflight_bytes must be more than 0")
        object.__setattr__(self, "inflight_bytes", inflight)
        object.__setattr__(self, "progress", _progress_target(self.progress))
        staging = _size("staging_bytes", self.staging_bytes, ("auto",))
        object.__setattr__(self, "staging_bytes", staging)

    @property
    def core(self) -> tuple[int, int, int, int]:
        """As the core takes them: engine, read-ahead bytes, bytes in flight, direct I/O.

        Progress is the origin's (stx_patch._origin).
        """
        ahead = {"auto": -1, "off": 0}.get(str(self.read_ahead), self.read_ahead)
        inflight = 0 if self.inflight_bytes == "auto" else self.inflight_bytes
        direct = _DIRECT_IO.index(self.direct_io)
        return _ENGINES.index(self.engine), int(ahead), int(inflight), direct

    @property
    def staging(self) -> int:
        """`staging_bytes` as a number."""
        return _STAGING_BYTES if self.staging_bytes == "auto" else int(self.staging_bytes)


NAMES = tuple(field.name for field in dataclasses.fields(Options))
VARIABLES = {name: "STX_PATCH_" + name.upper() for name in NAMES}
DEFAULT = Options()


def from_environment(keywords: Mapping[str, Any]) -> Options:
    """The options of `keywords`, and of the environment for those that are not given.

    Raises:
        TypeError: a keyword that is no option, or a value of the wrong type.
        ValueError: a wrong value; the variable is named where it came from one.
    """
    unknown = keywords.keys() - set(NAMES)
    if unknown:
        raise TypeError(f"got an unexpected keyword argument {sorted(unknown)[0]!r}")
    given = dict(keywords)
    for name in NAMES:
        text = None if name in given else of_variable(name)
        if text is not None:
            given[name] = text
    return Options(**given) if given else DEFAULT


def of_variable(name: str) -> str | None:
    """What an option's variable says; None where it says nothing. ValueError names the variable."""
    variable = VARIABLES[name]
    text = os.environ.get(variable, "").strip()
    try:
        if text:
            Options(**{name: text})
    except ValueError as error:
        raise ValueError(f"{variable}: {error}") from None
    return text or None


def with_keywords(options: Options, keywords: Mapping[str, Any]) -> Options:
    """`options`, but as `keywords` have it where they say something."""
    return dataclasses.replace(options, **keywords) if keywords else options
