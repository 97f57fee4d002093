"""What is on disk: a dense matrix to named tensors and back. `FORMATS` is all that a checkpoint can name.

`slots` is another order of the same values, which only memory ever sees. `legacy` is read, and `csr` written, where
checkpoints are converted.
"""

from . import bitmask, csr, legacy, slots


FORMATS = {"bitmask": bitmask}

__all__ = ["FORMATS", "bitmask", "csr", "legacy", "slots"]
