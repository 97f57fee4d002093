"""What is on disk: a dense matrix to named tensors and back. `FORMATS` is all that a checkpoint can name.

`slots` is another order of the same values, which only memory ever sees.
"""

from . import bitmask, slots


FORMATS = {"bitmask": bitmask}

__all__ = ["FORMATS", "bitmask", "slots"]
