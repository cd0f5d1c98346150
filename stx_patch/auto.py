# SPDX-License-Identifier: Apache-2.0
"""`import stx_patch.auto` patches the process: the only import of this package with an effect.

Filter and options are those of the environment (STX_PATCH_FILTER, STX_PATCH_ENGINE and so on).
"""

from ._patch import patch

patch()
