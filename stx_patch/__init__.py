# SPDX-License-Identifier: Apache-2.0
"""Makes every PyTorch program that reads safetensors start faster and read only what it needs.

    import stx_patch

    stx_patch.patch()                     # process-wide, undone by stx_patch.unpatch()

    with stx_patch.patched(tensor_filter=lambda name: name.startswith("model.layers.0.")):
        model = AutoModelForCausalLM.from_pretrained(path)

Importing this package does nothing else: torch and safetensors are imported when they are needed.
"""

from __future__ import annotations

TYPE_CHECKING = False  # as in typing, which is not imported for it: this runs at start-up
if TYPE_CHECKING:
    from typing import Any

    from . import filters as filters
    from ._errors import StxExtractWarning as StxExtractWarning
    from ._errors import StxFilterWarning as StxFilterWarning
    from ._errors import StxWarning as StxWarning
    from ._explain import Explanation as Explanation
    from ._explain import explain as explain
    from ._extract import ExtractResult as ExtractResult
    from ._extract import ExtractStream as ExtractStream
    from ._extract import extract as extract
    from ._extract import extract_stream as extract_stream
    from ._extract import merge as merge
    from ._filter import TensorKey as TensorKey
    from ._load import load_file as load_file
    from ._options import Options as Options
    from ._patch import is_patched as is_patched
    from ._patch import patch as patch
    from ._patch import patched as patched
    from ._patch import unpatch as unpatch
    from ._safe_open import SafeOpen as safe_open
    from ._stats import Stats as Stats
    from ._stats import reset_stats as reset_stats
    from ._stats import stats as stats

__version__ = "0.1.0"

__all__ = [
    "Explanation",
    "ExtractResult",
    "ExtractStream",
    "Options",
    "Stats",
    "StxExtractWarning",
    "StxFilterWarning",
    "StxWarning",
    "TensorKey",
    "explain",
    "extract",
    "extract_stream",
    "filters",
    "is_patched",
    "load_file",
    "merge",
    "patch",
    "patched",
    "reset_stats",
    "safe_open",
    "stats",
    "unpatch",
]


# Where what this package has is made. Nothing is imported before it is asked for: programs import
# this package that read no file, and each Python that is started with STX_PATCH=1 does.
_HOMES = {
    "ExtractResult": "_extract",
    "ExtractStream": "_extract",
    "Explanation": "_explain",
    "Options": "_options",
    "Stats": "_stats",
    "StxExtractWarning": "_errors",
    "StxFilterWarning": "_errors",
    "StxWarning": "_errors",
    "TensorKey": "_filter",
    "explain": "_explain",
    "extract": "_extract",
    "extract_stream": "_extract",
    "filters": "filters",
    "is_patched": "_patch",
    "load_file": "_load",
    "merge": "_extract",
    "patch": "_patch",
    "patched": "_patch",
    "reset_stats": "_stats",
    "safe_open": "_safe_open",
    "stats": "_stats",
    "unpatch": "_patch",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    from . import _autopatch

    home = import_module(f"{__name__}.{_HOMES[name]}")
    if name == "filters":
        return home
    _autopatch.settle()
    value: Any = home.public_safe_open() if name == "safe_open" else getattr(home, name)
    globals()[name] = value
    return value
