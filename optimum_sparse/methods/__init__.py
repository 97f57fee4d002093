"""Pruning methods, each beside its paper. `METHODS` is all that a config can name."""

from .admm import Admm
from .base import Method
from .magnitude import Magnitude
from .polished import Polished
from .rose import Rose
from .sparsegpt import SparseGPT
from .wanda import Wanda


METHODS: dict[str, type] = {
    "magnitude": Magnitude,
    "wanda": Wanda,
    "sparsegpt": SparseGPT,
    "rose": Rose,
    "admm": Admm,
}

__all__ = ["METHODS", "Admm", "Magnitude", "Method", "Polished", "Rose", "SparseGPT", "Wanda"]
