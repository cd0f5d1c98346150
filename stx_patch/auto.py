# SPDX-License-Identifier: Apache-2.0
"""`import stx_patch.auto` patches the process: the only import of this package with an effect."""

from ._patch import patch

patch()
