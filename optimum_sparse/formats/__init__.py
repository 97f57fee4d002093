"""What is on disk: a dense matrix to named tensors and back. `FORMATS` is all that a checkpoint can name."""

from . import bitmask


FORMATS = {"bitmask": bitmask}

__all__ = ["FORMATS", "bitmask"]
