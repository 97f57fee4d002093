"""Modules: where a format meets a kernel."""

from .linear import SparseLinear


__all__ = ["SparseLinear"]
