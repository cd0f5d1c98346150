# SPDX-License-Identifier: Apache-2.0
"""`python -m stx_patch`: the command line where `stx-patch` is not on the path."""

import sys

from ._cli import main

if __name__ == "__main__":
    sys.exit(main())
