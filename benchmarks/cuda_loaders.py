# SPDX-License-Identifier: Apache-2.0
"""One adapter for each loader: a file's tensors on a device, as a dict, as its own documentation
has it called.

`start` is done in each process before timing: imports and patches. Peers are found as loaders.py
finds them. Nothing is asked of torch before `start`: one of them brings another safetensors.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from loaders import find_peers, peer
from system import version_of

Tensors = dict[str, Any]


class DeviceLoader:
    """One loader of a process.

    Attributes:
        device: "cuda:0", or "cpu" in a dry run.
        dtype: what tensors are converted to, or None.
        next_safetensors: folder of the safetensors that comes next, or None.
    """

    package = "safetensors"

    def __init__(self, device: str, dtype: Any = None, next_safetensors: str | None = None) -> None:
        self.device = device
        self.dtype = dtype
        self.next_safetensors = next_safetensors

    def version(self) -> str | None:
        """Of its package."""
        return version_of(self.package)

    def start(self) -> None:
        """What a program does before it loads."""
        import safetensors.torch  # noqa: F401

    def load(self, path: Path) -> Tensors:
        """The load to be timed."""
        raise NotImplementedError

    def release(self) -> None:
        """Give back what a load keeps beside its tensors."""

    def reset(self) -> None:
        """What is checked begins here."""

    def check(self, kept_bytes: int) -> str | None:
        """What was wrong with the load since `reset`, though it succeeded."""
        return None

    def notes(self) -> dict[str, Any]:
        """How it was loaded, as far as the loader tells."""
        return {}


class Stock(DeviceLoader):
    """safetensors.torch.load_file(path, device)."""

    def load(self, path: Path) -> Tensors:
        import safetensors.torch

        tensors = safetensors.torch.load_file(path, device=self.device)
        if self.dtype is not None:
            for name in tensors:  # one by one, so that not everything is there twice
                tensors[name] = tensors[name].to(self.dtype)
        return tensors


class StockPrefetch(DeviceLoader):
    """safe_open(path).prefetch(plan) of the safetensors that comes next, everything planned."""

    def start(self) -> None:
        if self.next_safetensors is None:
            raise SystemExit("not there: see --next-safetensors")
        if "safetensors" in sys.modules:
            raise SystemExit("another safetensors was imported before")
        sys.path.insert(0, self.next_safetensors)
        import safetensors

        if Path(safetensors.__file__).parent.parent != Path(self.next_safetensors):
            raise SystemExit(f"no safetensors in {self.next_safetensors}")

    def version(self) -> str | None:
        import safetensors

        return str(safetensors.__version__)

    def load(self, path: Path) -> Tensors:
        import safetensors

        opened: Any = safetensors.safe_open
        with opened(path, framework="pt", device=self.device) as file:
            plan = dict.fromkeys(file.offset_keys())
            with file.prefetch(plan) as prefetched:
                return dict(prefetched)


class Ours(DeviceLoader):
    """stx_patch.load_file(path, device), with dtype= where tensors are converted."""

    package = "stx-patch"

    def start(self) -> None:
        import safetensors.torch  # noqa: F401

        import stx_patch  # noqa: F401

    def version(self) -> str | None:
        import stx_patch

        return stx_patch.__version__

    def load(self, path: Path) -> Tensors:
        import stx_patch

        if self.dtype is None:
            return stx_patch.load_file(path, device=self.device)
        return stx_patch.load_file(path, device=self.device, dtype=self.dtype)

    def reset(self) -> None:
        import stx_patch

        stx_patch.reset_stats()

    def check(self, kept_bytes: int) -> str | None:
        return not_native(self.device, kept_bytes)

    def notes(self) -> dict[str, Any]:
        import stx_patch

        stats = stx_patch.stats().as_dict()
        names = ("engine", "engine_reason", "loads_direct", "loads_buffered", "loads_pageable")
        return {name: stats[name] for name in names if stats[name]}


class OursPatched(Ours):
    """The same safetensors.torch.load_file as stock's, after stx_patch.patch()."""

    def start(self) -> None:
        import safetensors.torch  # noqa: F401

        import stx_patch

        stx_patch.patch()

    def load(self, path: Path) -> Tensors:
        import safetensors.torch

        return safetensors.torch.load_file(path, device=self.device)


class OursTensors(Ours):
    """stx_patch.safe_open(path, device).tensors(), all kept."""

    def load(self, path: Path) -> Tensors:
        import stx_patch

        opened: Any = stx_patch.safe_open
        with opened(path, framework="pt", device=self.device) as file:
            return dict(file.tensors())


class FastSafetensors(DeviceLoader):
    """fastsafetensors without GPUDirect: SafeTensorsFileLoader."""

    package = "fastsafetensors"
    held: tuple[Any, ...] = ()

    def start(self) -> None:
        find_peers()
        peer("fastsafetensors")

    def load(self, path: Path) -> Tensors:
        module = peer("fastsafetensors")
        loader = module.SafeTensorsFileLoader(pg=None, device=self.device, nogds=True)
        loader.add_filenames({0: [str(path)]})
        buffers = loader.copy_files_to_device()
        self.held = (buffers, loader)
        return {name: buffers.get_tensor(name) for name in loader.get_keys()}

    def release(self) -> None:
        for each in self.held:
            each.close()
        self.held = ()


class InstantTensor(DeviceLoader):
    """instanttensor: one pass of tensors(), which by default are copies that last."""

    package = "instanttensor"

    def start(self) -> None:
        find_peers()
        peer("instanttensor")

    def load(self, path: Path) -> Tensors:
        with peer("instanttensor").safe_open([str(path)], "pt", self.device) as file:
            return dict(file.tensors())


LOADERS: dict[str, type[DeviceLoader]] = {
    "stock": Stock,
    "stock prefetch": StockPrefetch,
    "ours": Ours,
    "ours patched": OursPatched,
    "ours tensors()": OursTensors,
    "fastsafetensors": FastSafetensors,
    "instanttensor": InstantTensor,
}


def not_native(device: str, kept_bytes: int) -> str | None:
    """Why what this process loaded since its counters were reset was not loaded by us."""
    import stx_patch

    stats = stx_patch.stats()
    if stats.fallbacks or not stats.tensors_native:
        return f"not loaded natively: {stats.fallbacks or 'no tensor of ours'}"
    if device != "cpu" and stats.bytes_to_device < kept_bytes:
        return f"only {stats.bytes_to_device} of {kept_bytes} bytes went to the device by us"
    return None
