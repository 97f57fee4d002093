"""Pruning methods, each beside its paper. `METHODS` is all that a config can name."""

from .base import Method
from .magnitude import Magnitude
from .sparsegpt import SparseGPT
from .wanda import Wanda


METHODS: dict[str, type] = {"magnitude": Magnitude, "wanda": Wanda, "sparsegpt": SparseGPT}

__all__ = ["METHODS", "Magnitude", "Method", "SparseGPT", "Wanda"]
