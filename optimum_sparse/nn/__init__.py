"""Modules: where a format meets a kernel."""

from .experts import Experts, matrix_names
from .linear import SparseLinear


__all__ = ["Experts", "SparseLinear", "matrix_names"]
