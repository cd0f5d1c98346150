# SPDX-License-Identifier: Apache-2.0
"""The warnings of this package. Its errors are the classes that stock users already catch."""


class StxWarning(UserWarning):
    """Something works, but not as fast or not as natively as it could."""


class StxFilterWarning(StxWarning):
    """A filter kept nothing of a set that was asked for as a whole."""
