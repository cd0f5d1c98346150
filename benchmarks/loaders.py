# SPDX-License-Identifier: Apache-2.0
"""One adapter for each loader: the loader as its own documentation has it called, on the CPU.

An adapter gives (name, tensor) pairs. `prepare` is done once, before any timing (formats of one's
own are converted there); `start` in each process, before timing: imports and patches. Peers are in
`.peers/site` (`tools/setup.sh with-peers`), last on the path, so that they replace nothing.
"""

from __future__ import annotations

import importlib
import itertools
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from make_data import sync
from system import version_of

PEERS = Path(__file__).resolve().parent.parent / ".peers" / "site"

Pairs = Iterable[tuple[str, Any]]
Wanted = frozenset[str] | None  # None is everything


def find_peers() -> None:
    """Peers can be imported from here on."""
    if str(PEERS) not in sys.path:
        sys.path.append(str(PEERS))


def peer(module: str) -> Any:
    """A module of a peer; ImportError says why it could not be installed, if that is it."""
    try:
        return importlib.import_module(module)
    except ImportError:
        package = module.partition(".")[0].replace("_", "-")
        failed = PEERS.parent / "failed" / package
        if failed.exists():
            raise ImportError(f"not installed: {failed.read_text().strip()}") from None
        raise


class Loader:
    """One loader. `streams`: the load is done while the pairs are consumed, so that "to return" is
    no figure. `owned`: the tensors are in memory of their own, not in the page cache."""

    name = ""
    package = "safetensors"
    is_peer = False
    streams = False
    owned = False

    def __init__(self, options: dict[str, str] | None = None) -> None:
        self.options = options or {}

    def version(self) -> str | None:
        """Of its package."""
        return version_of(self.package)

    def file_of(self, path: Path) -> Path:
        """The file it reads in place of a safetensors file."""
        return path

    def prepare(self, path: Path) -> None:
        """Make that file, if it is not there."""

    def start(self, wanted: Wanted) -> None:
        """Import, patch: what a program does before it loads."""

    def load(self, paths: list[Path], wanted: Wanted) -> Pairs:
        """The load to be timed, of files as `file_of` names them."""
        raise NotImplementedError

    def check(self) -> str | None:
        """What was wrong with the loads of this process, though they succeeded."""
        return None


def _merge(loaded: Iterable[dict[str, Any]]) -> Pairs:
    every = list(loaded)
    return itertools.chain.from_iterable(tensors.items() for tensors in every)


class Stock(Loader):
    """safetensors.torch.load_file; name by name where only some are wanted."""

    name = "stock"
    backend = "mmap"

    def start(self, wanted: Wanted) -> None:
        import safetensors.torch  # noqa: F401

    def load(self, paths: list[Path], wanted: Wanted) -> Pairs:
        import safetensors.torch

        if wanted is None:
            load: Any = safetensors.torch.load_file
            return _merge(load(path, backend=self.backend) for path in paths)
        return _merge(self._some(path, wanted) for path in paths)

    def _some(self, path: Path, wanted: frozenset[str]) -> dict[str, Any]:
        import safetensors

        opened: Any = safetensors.safe_open
        with opened(path, framework="pt", backend=self.backend) as file:
            return {name: file.get_tensor(name) for name in file.offset_keys() if name in wanted}


class StockPread(Stock):
    """The same with backend="pread"."""

    name = "stock pread"
    backend = "pread"
    owned = True


class Ours(Loader):
    """The same safetensors.torch.load_file, after stx_patch.patch(filter)."""

    name = "ours"
    package = "stx-patch"
    backend = "mmap"

    def start(self, wanted: Wanted) -> None:
        import safetensors.torch  # noqa: F401

        import stx_patch

        patch: Any = stx_patch.patch
        patch(wanted, **self.options)

    def load(self, paths: list[Path], wanted: Wanted) -> Pairs:
        import safetensors.torch

        load: Any = safetensors.torch.load_file
        return _merge(load(path, backend=self.backend) for path in paths)

    def check(self) -> str | None:
        import stx_patch

        stats = stx_patch.stats()
        if stats.fallbacks or not stats.tensors_native:
            return f"not loaded natively: {stats.fallbacks}"
        return None


class OursPread(Ours):
    """The same with backend="pread"."""

    name = "ours pread"
    backend = "pread"
    owned = True


class OursTensors(Ours):
    """safe_open(path).tensors(): one tensor after the other, bounded memory."""

    name = "ours tensors()"
    streams = True
    owned = True

    def load(self, paths: list[Path], wanted: Wanted) -> Iterator[tuple[str, Any]]:
        import stx_patch

        opened: Any = stx_patch.safe_open
        for path in paths:
            with opened(path, framework="pt") as file:
                yield from file.tensors()


class TorchLoad(Loader):
    """torch.load(mmap=True) of the same tensors, saved by torch.save beforehand."""

    name = "torch.load(mmap)"
    package = "torch"

    def file_of(self, path: Path) -> Path:
        return path.with_suffix(".pt")

    def prepare(self, path: Path) -> None:
        import torch
        from safetensors.torch import load_file

        if not self.file_of(path).exists():
            partial = path.with_suffix(".pt-partial")
            torch.save(load_file(path), partial)
            sync(partial)
            partial.rename(self.file_of(path))

    def load(self, paths: list[Path], wanted: Wanted) -> Pairs:
        import torch

        pairs = _merge(torch.load(path, mmap=True, weights_only=True) for path in paths)
        return pairs if wanted is None else [pair for pair in pairs if pair[0] in wanted]


class FastSafetensors(Loader):
    """fastsafetensors without GPUDirect: SafeTensorsFileLoader, with its filter."""

    name = "fastsafetensors"
    package = "fastsafetensors"
    is_peer = True
    owned = True

    def start(self, wanted: Wanted) -> None:
        peer("fastsafetensors")

    def load(self, paths: list[Path], wanted: Wanted) -> Pairs:
        loader = peer("fastsafetensors").SafeTensorsFileLoader(pg=None, device="cpu", nogds=True)
        if wanted is not None:
            loader.set_tensor_filter(wanted.__contains__)
        loader.add_filenames({0: [str(path) for path in paths]})
        self.buffers = loader.copy_files_to_device()
        return [(name, self.buffers.get_tensor(name)) for name in loader.get_keys()]


class RunaiStreamer(Loader):
    """runai-model-streamer: SafetensorsStreamer, with its list of names."""

    name = "runai streamer"
    package = "runai-model-streamer"
    is_peer = True
    streams = True
    owned = True

    def start(self, wanted: Wanted) -> None:
        peer("runai_model_streamer")

    def load(self, paths: list[Path], wanted: Wanted) -> Iterator[tuple[str, Any]]:
        with peer("runai_model_streamer").SafetensorsStreamer() as streamer:
            streamer.stream_files([str(path) for path in paths], device="cpu", tensor_names=wanted)
            yield from streamer.get_tensors()


class FlashPack(Loader):
    """flashpack reads its own format: converted beforehand, not timed."""

    name = "flashpack"
    package = "flashpack"
    is_peer = True

    def file_of(self, path: Path) -> Path:
        return path.with_suffix(".flashpack")

    def prepare(self, path: Path) -> None:
        from safetensors.torch import load_file

        if not self.file_of(path).exists():
            partial = path.with_suffix(".partial-flashpack")
            peer("flashpack").pack_to_file(load_file(path), str(partial), target_dtype=None)
            sync(partial)
            partial.rename(self.file_of(path))

    def start(self, wanted: Wanted) -> None:
        peer("flashpack.deserialization")

    def load(self, paths: list[Path], wanted: Wanted) -> Pairs:
        module = peer("flashpack.deserialization")
        pairs = _merge(module.revert_from_file(str(path)) for path in paths)
        return pairs if wanted is None else [pair for pair in pairs if pair[0] in wanted]


class SafetensorsStreaming(Loader):
    """safetensors-streaming: its load_file; its safe_open where only some are wanted."""

    name = "safetensors-streaming"
    package = "safetensors-streaming"
    is_peer = True
    owned = True

    def start(self, wanted: Wanted) -> None:
        peer("safetensors_streaming").patch()

    def load(self, paths: list[Path], wanted: Wanted) -> Pairs:
        module = peer("safetensors_streaming")
        if wanted is None:
            return _merge(module.load_file(str(path)) for path in paths)
        pairs = []
        for path in paths:
            with module.safe_open(str(path)) as file:
                pairs += [(name, file.get_tensor(name)) for name in file.keys() if name in wanted]  # noqa: SIM118
        return pairs


class CatTensors(Stock):
    """cattensors.patch(), then what stock does; its stand-ins know no `backend`."""

    name = "cattensors"
    package = "cattensors"
    is_peer = True

    def start(self, wanted: Wanted) -> None:
        peer("cattensors").patch()

    def load(self, paths: list[Path], wanted: Wanted) -> Pairs:
        import safetensors.torch

        if wanted is None:
            return _merge(safetensors.torch.load_file(path) for path in paths)
        pairs = []
        opened: Any = safetensors.safe_open
        for path in paths:
            with opened(path, framework="pt") as file:
                pairs += [(name, file.get_tensor(name)) for name in file.keys() if name in wanted]  # noqa: SIM118
        return pairs


class InstantTensor(Loader):
    """instanttensor: one pass of tensors(); it wants a GPU."""

    name = "instanttensor"
    package = "instanttensor"
    is_peer = True
    streams = True
    owned = True

    def start(self, wanted: Wanted) -> None:
        peer("instanttensor")

    def load(self, paths: list[Path], wanted: Wanted) -> Iterator[tuple[str, Any]]:
        module = peer("instanttensor")
        names = None if wanted is None else sorted(wanted)
        how = {} if names is None else {"tensor_filter": names, "tensor_name_match_mode": "exact"}
        with module.safe_open([str(path) for path in paths], "pt", "cpu", **how) as file:
            yield from file.tensors()


LOADERS: dict[str, type[Loader]] = {
    loader.name: loader
    for loader in (
        Stock,
        StockPread,
        Ours,
        OursPread,
        OursTensors,
        TorchLoad,
        FastSafetensors,
        RunaiStreamer,
        FlashPack,
        SafetensorsStreaming,
        CatTensors,
        InstantTensor,
    )
}


def make(name: str, options: dict[str, str] | None = None) -> Loader:
    """A loader of LOADERS."""
    loader = LOADERS[name](options)
    if loader.is_peer:
        find_peers()
    return loader
