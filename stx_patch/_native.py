# SPDX-License-Identifier: Apache-2.0
"""The C core, if this platform has it.

`core` is the module `stx_patch._C`, or None where the extension was not built; then everything goes
to stock and filters are held in Python.
"""

from __future__ import annotations

from typing import Any

core: Any = None
import_error: str | None = None
try:
    from . import _C

    core = _C
except ImportError as error:  # another platform: the pure Python half still works
    import_error = str(error)


def torch_is_ready() -> bool:
    """Whether torch can be imported. Imports it, as stock does when it opens for torch."""
    try:
        import torch  # noqa: F401
    except ImportError:
        return False
    return True
