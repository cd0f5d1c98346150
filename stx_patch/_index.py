# SPDX-License-Identifier: Apache-2.0
"""Reads a `model.safetensors.index.json`: which tensor lies in which file of a sharded model."""

from __future__ import annotations

import json
import os
from pathlib import Path


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
