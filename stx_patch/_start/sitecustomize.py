# SPDX-License-Identifier: Apache-2.0
"""What the processes of `stx-patch run` find first: this folder is in their PYTHONPATH.

It patches, leaves `sys.path`, and gives way to the sitecustomize that is found without it, if any.
Other interpreters may see it, too, of any version and without stx_patch: they notice nothing.
"""

import os
import sys

_folder = os.path.dirname(os.path.abspath(__file__))
sys.path[:] = [path for path in sys.path if os.path.abspath(path) != _folder]
sys.path_importer_cache.pop(_folder, None)

_is_ours = sys.prefix == os.environ.get("STX_PATCH_RUN_PREFIX")  # may not have us on its path
if _is_ours:
    sys.path.append(os.path.dirname(os.path.dirname(_folder)))
try:
    import stx_patch._autopatch
except Exception:  # of an older version, or another package of this name
    pass
else:
    try:
        stx_patch._autopatch.activate()
    except Exception:  # told, and what stands behind us is run all the same
        sys.excepthook(*sys.exc_info())
finally:
    if _is_ours:
        sys.path.pop()

# `import` hands out what then stands there; an ImportError with this name says that there is none.
del sys.modules[__name__]
__import__(__name__)
