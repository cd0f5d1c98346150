# SPDX-License-Identifier: Apache-2.0
"""What this machine offers to a load, and what could be changed: one finding for each thing.

Only what was read or tried is said. What cannot be found out, as in a container without /sys, is
said to be unknown, and is no problem.
"""

from __future__ import annotations

import importlib.metadata
import os
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from . import _doctor_machine, _environment, _machine, _native, _options
from ._cli_text import count_text
from ._finding import NOTE, OK, PROBLEM, Finding, worse

_SAFETENSORS_MIN = (0, 6)
_TORCH_MIN = (2, 4)
_LIBRARIES = (
    "accelerate", "diffusers", "huggingface-hub", "numpy", "peft", "sentence-transformers",
    "sglang", "timm", "tqdm", "transformers", "vllm",
)  # fmt: skip
_CUFILE_PACKAGES = ("nvidia-cufile", "nvidia-cufile-cu12", "nvidia-cufile-cu13")


def examine(path: str, root: Path = Path("/")) -> list[Finding]:
    """All findings. `path` is a file or folder of the models that are to be loaded.

    Raises:
        OSError: there is no such path.
    """
    device = os.stat(path).st_dev
    torch, torch_error = _import_torch()
    return [
        check_core(_native.core, _native.import_error),
        check_safetensors(_version_of),
        check_torch(torch, torch_error),
        check_cuda(root, torch, _native.core),
        check_storage(root, _find_library, _version_of),
        _doctor_machine.check_uring(root, _native.core),
        _doctor_machine.check_direct(_machine.try_direct_read(path)),
        _doctor_machine.check_file_system(_machine.find_mount(root, path)),
        _doctor_machine.check_read_ahead(_machine.read_ahead(root, device)),
        _doctor_machine.check_huge_pages(_machine.huge_pages(root)),
        _doctor_machine.check_page_cache(
            _machine.kernel_release(root), _machine.try_cachestat(), _machine.can_populate()
        ),
        _doctor_machine.check_residency(path),
        _doctor_machine.check_memory(_machine.memory(root)),
        _doctor_machine.check_locked(),
        check_libraries(_version_of),
        check_variables(os.environ),
    ]


# --- ourselves, and what we serve ---


def check_core(core: Any, import_error: str | None) -> Finding:
    """Our version, and the native core."""
    from . import __version__

    if core is not None:
        return Finding("stx_patch", OK, f"{__version__}, with its native core")
    return Finding(
        "stx_patch",
        PROBLEM,
        f"{__version__}, without its native core ({import_error}): everything goes to safetensors",
        "build it here, from its source: pip install --no-build-isolation .",
    )


def check_safetensors(version_of: Callable[[str], str | None]) -> Finding:
    """The package that we take the place of."""
    version = version_of("safetensors")
    if version is None:
        return Finding("safetensors", PROBLEM, "not installed", "pip install 'safetensors>=0.6'")
    if _machine.version_numbers(version) < _SAFETENSORS_MIN:
        return Finding(
            "safetensors", PROBLEM, f"{version}: too old", "pip install 'safetensors>=0.6'"
        )
    return Finding("safetensors", OK, version)


def check_torch(torch: Any, error: str | None) -> Finding:
    """PyTorch, whose tensors are served natively."""
    if torch is None:
        return Finding(
            "torch",
            PROBLEM,
            f"cannot be imported ({error}): everything goes to safetensors",
            "install PyTorch 2.4 or newer, as https://pytorch.org says for this machine",
        )
    version = str(torch.__version__)
    if _machine.version_numbers(version) < _TORCH_MIN:
        return Finding("torch", PROBLEM, f"{version}: too old", "install PyTorch 2.4 or newer")
    return Finding("torch", OK, version)


def check_cuda(root: Path, torch: Any, core: Any) -> Finding:
    """Whether loads to a device are ours."""
    if torch is None:
        return Finding("CUDA", NOTE, "unknown without torch")
    kind = "ROCm" if torch.version.hip else "CUDA"
    built = torch.version.hip or torch.version.cuda
    driver = _machine.read_text(root / "proc/driver/nvidia/version")
    if built is None:
        if driver is None:
            return Finding("CUDA", OK, "torch is built without it, and no NVIDIA driver is loaded")
        return Finding(
            "CUDA",
            NOTE,
            "an NVIDIA driver is loaded, but torch is built without CUDA",
            "install a build of PyTorch for CUDA",
        )
    devices, complaint = _list_devices(torch)
    if not devices:
        seen = f"torch is built for {kind} {built}, but finds no device"
        if complaint is not None:
            seen += f" ({complaint})"
        advice = None if driver is None else "look at the driver: nvidia-smi"
        return Finding("CUDA", NOTE, seen, advice)
    seen = f"torch is built for {kind} {built}; {count_text(len(devices), 'device')}:"
    seen += f" {', '.join(devices)}"
    if core is None:
        return Finding("CUDA", NOTE, f"{seen}; no native core to load to them")
    if not core.device_runtime():
        return Finding(
            "CUDA",
            PROBLEM,
            f"{seen}; its runtime is not mapped as a shared library that the core knows: loads to"
            " them go to safetensors",
            "use a build of PyTorch from https://pytorch.org",
        )
    return Finding("CUDA", OK, f"{seen}; the core has bound its runtime")


def _list_devices(torch: Any) -> tuple[list[str], str | None]:
    """Names, and what torch says where there are none."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            if not torch.cuda.is_available():
                said = [str(each.message).splitlines()[0] for each in caught]
                return [], said[0] if said else None
            count = torch.cuda.device_count()
            return [torch.cuda.get_device_name(number) for number in range(count)], None
        except (RuntimeError, AssertionError) as error:
            return [], str(error).splitlines()[0]


def check_storage(
    root: Path, find_library: Callable[[str], bool], version_of: Callable[[str], str | None]
) -> Finding:
    """GPUDirect Storage, which this version leaves alone."""
    packages = [name for name in _CUFILE_PACKAGES if version_of(name) is not None]
    library = "found" if find_library("cufile") else "not found"
    library += f" (and in the package {packages[0]})" if packages else ""
    is_loaded = _machine.has_module(root, "nvidia_fs")
    module = {None: "unknown", True: "loaded", False: "not loaded"}[is_loaded]
    seen = f"not used by this version; libcufile: {library}; kernel module nvidia_fs: {module}"
    return Finding("GPUDirect Storage", OK, seen)


def check_libraries(version_of: Callable[[str], str | None]) -> Finding:
    """What else is installed of the programs that read safetensors, without importing it."""
    versions = {name: version_of(name) for name in _LIBRARIES}
    there = [f"{name} {version}" for name, version in versions.items() if version is not None]
    return Finding("libraries", OK, ", ".join(there) or "none of those we know")


def check_variables(environ: Mapping[str, str]) -> Finding:
    """The variables that change what we do."""
    name = "variables"
    ours = sorted(key for key in environ if key == "STX_PATCH" or key.startswith("STX_PATCH_"))
    if not ours:
        return Finding(name, OK, "none of STX_PATCH* is set")
    options = {variable: option for option, variable in _options.VARIABLES.items()}
    seen, advice, state = [], [], OK
    for key in ours:
        text = environ[key].strip()
        seen.append(f"{key}={text}")
        if key == _environment.SWITCH and _environment.switch(environ) is False:
            state = worse(state, NOTE)
            seen[-1] += " (patch() does nothing)"
        elif key == _environment.SWITCH and text and _environment.switch(environ) is None:
            state = worse(state, NOTE)
            seen[-1] += " (says nothing)"
            advice.append(f"set {key} to 1 (on) or 0 (off)")
        elif key in options or key == _environment.FILTER:
            problem = _problem(options.get(key), text)
            if problem is not None:
                state = PROBLEM
                seen[-1] += f" ({problem})"
                advice.append(f"correct or unset {key}: what opens a file raises an error")
        elif key == _environment.TRACE:
            folder = os.path.dirname(os.path.abspath(text))
            if not os.access(folder, os.W_OK):
                state = worse(state, NOTE)
                seen[-1] += " (no file can be written there)"
                advice.append(f"make {folder} a folder that can be written to")
        elif key not in (_environment.SWITCH, _environment.RUN, _environment.RUN_PREFIX):
            state = worse(state, NOTE)
            seen[-1] += " (no variable of this version)"
            advice.append(f"unset {key}")
    return Finding(name, state, ", ".join(seen), "; ".join(advice) or None)


def _problem(option: str | None, text: str) -> str | None:
    """What is wrong with the value of an option's variable, or of the filter's."""
    try:
        if option is None:
            _environment.filter_rule({_environment.FILTER: text})
        else:
            _options.Options(**({option: text} if text else {}))
    except (ValueError, TypeError) as error:
        return str(error)
    return None


# --- how it is found out ---


def _import_torch() -> tuple[Any, str | None]:
    try:
        import torch
    except Exception as error:  # a broken installation raises anything
        return None, " ".join(str(error).split())
    return torch, None


def _version_of(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _find_library(name: str) -> bool:
    import ctypes.util

    return ctypes.util.find_library(name) is not None
