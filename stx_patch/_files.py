# SPDX-License-Identifier: Apache-2.0
"""Which files a call means: a list of paths, a folder, or the index of a sharded model."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Union

Source = Union[str, "os.PathLike[str]", "Sequence[str | os.PathLike[str]]"]


class Files:
    """Which files a call means, and what an index says about them.

    Attributes:
        paths: in the order in which they are read.
        index: tensor name -> path's key in `listed`, or None where there is no index.
        listed: what an index calls a file -> its path.
        index_path: the index, or None.
    """

    __slots__ = ("index", "index_path", "listed", "paths")

    def __init__(
        self,
        paths: list[str],
        index: dict[str, str] | None = None,
        listed: dict[str, str] | None = None,
        index_path: str | None = None,
    ) -> None:
        self.paths = paths
        self.listed = listed or {}
        self.index = index
        self.index_path = index_path

    def path_of(self, name: str) -> str | None:
        """Where the index says that a tensor lies; None if it says nothing."""
        file = None if self.index is None else self.index.get(name)
        return None if file is None else self.listed[file]


def find_files(filename: Any) -> Files | None:
    """The files of a list, a folder or an index; None for anything else, a single file.

    Raises:
        FileNotFoundError: a folder without safetensors files.
        TypeError: a list of something that is no path.
        ValueError: an empty list, a path twice, a file that is no index, a folder of several.
    """
    if isinstance(filename, (list, tuple)):
        return _of_list(filename)
    try:
        path = os.fspath(filename)
    except Exception:  # it is asked again where it is a single file, and stock says what is wrong
        return None
    if not isinstance(path, str):
        return None
    if path.endswith(".json"):
        return _of_index(path)
    return _of_folder(path) if os.path.isdir(path) else None


def _of_list(filenames: Sequence[Any]) -> Files:
    paths = []
    for filename in filenames:
        path = os.fspath(filename)
        if not isinstance(path, str):
            raise TypeError(f"a list of files holds paths, not {type(path).__name__}")
        paths.append(path)
    if not paths:
        raise ValueError("an empty list of files")
    if len(set(paths)) != len(paths):
        twice = next(path for path in paths if paths.count(path) > 1)
        raise ValueError(f"{twice} is twice in a list of files")
    return Files(paths)


def _of_index(path: str) -> Files:
    folder = os.path.dirname(path)
    index = read_index(path)
    if not index:
        raise ValueError(f"{path} lists no tensors")
    listed = {file: os.path.join(folder, file) for file in set(index.values())}
    return Files(
        sorted(listed.values(), key=lambda path: (natural(path), path)), index, listed, path
    )


def index_in(path: str) -> str | None:
    """The index that speaks for a folder, or None; ValueError if there are several."""
    indexes = sorted(Path(path).glob("*.safetensors.index.json"))
    usual = [index for index in indexes if index.name == "model.safetensors.index.json"]
    if usual or len(indexes) == 1:
        return str((usual or indexes)[0])
    if indexes:
        raise ValueError(f"{path} holds several indexes: give the path of one of them")
    return None


def _of_folder(path: str) -> Files:
    index = index_in(path)
    if index is not None:
        return _of_index(index)
    found = Path(path).glob("*.safetensors")
    paths = [str(file) for file in found if not file.name.startswith(".")]
    if not paths:
        raise FileNotFoundError(f"No such file or directory: {os.path.join(path, '*.safetensors')}")
    return Files(sorted(paths, key=lambda path: (natural(path), path)))


def natural(path: str) -> list[tuple[int, int, str]]:
    """Numbers by value, so that 2 comes before 10."""
    parts = re.split(r"([0-9]+)", path)
    return [(1, int(part), "") if part.isdecimal() else (0, 0, part) for part in parts]


def read_index(path: str | os.PathLike[str]) -> dict[str, str]:
    """Tensor name -> the name of its file, as the index has them.

    Raises OSError if the file cannot be read, ValueError if it is no index, naming it.
    """
    try:
        index = json.loads(Path(path).read_bytes())
        weight_map = index["weight_map"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{os.fspath(path)} is no index of safetensors files: {error!r}") from None
    if not isinstance(weight_map, dict) or not set(map(type, weight_map.values())) <= {str}:
        raise ValueError(f"{os.fspath(path)} is no index: its weight_map maps names to files")
    return weight_map
