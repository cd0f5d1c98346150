# SPDX-License-Identifier: Apache-2.0
"""Makes every PyTorch program that reads safetensors start faster and read only what it needs.

    import stx_patch

    stx_patch.patch()                     # process-wide, undone by stx_patch.unpatch()

    with stx_patch.patched(tensor_filter=lambda name: name.startswith("model.layers.0.")):
        model = AutoModelForCausalLM.from_pretrained(path)

Importing this package does nothing else: torch and safetensors are imported when they are needed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from . import filters
from ._errors import StxExtractWarning, StxFilterWarning, StxWarning
from ._filter import TensorKey
from ._options import Options
from ._patch import is_patched, patch, patched, unpatch
from ._stats import Stats, reset_stats, stats

if TYPE_CHECKING:
    from ._explain import Explanation as Explanation
    from ._explain import explain as explain
    from ._extract import ExtractResult as ExtractResult
    from ._extract import ExtractStream as ExtractStream
    from ._extract import extract as extract
    from ._extract import extract_stream as extract_stream
    from ._extract import merge as merge
    from ._load import load_file as load_file
    from ._safe_open import SafeOpen as safe_open

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


def __getattr__(name: str) -> Any:
    """Make what needs safetensors when it is first asked for."""
    if name == "safe_open":
        from ._safe_open import public_safe_open

        value: Any = public_safe_open()
    elif name == "load_file":
        from ._load import load_file as value
    elif name in ("explain", "Explanation"):
        from . import _explain

        value = getattr(_explain, name)
    elif name in ("ExtractResult", "ExtractStream", "extract", "extract_stream", "merge"):
        from . import _extract

        value = getattr(_extract, name)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value
