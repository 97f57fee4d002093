"""Tensors only: patterns, input statistics, the column sweep. Knows neither modules nor models."""

from .patterns import NM, Pattern, Unstructured, keep_mask, keep_top, parse_pattern, violation
from .statistics import InputStats, Needs
from .sweep import NotPositiveDefinite, Solved, column_sweep, inverse_factor


__all__ = [
    "NM",
    "InputStats",
    "Needs",
    "NotPositiveDefinite",
    "Pattern",
    "Solved",
    "Unstructured",
    "column_sweep",
    "inverse_factor",
    "keep_mask",
    "keep_top",
    "parse_pattern",
    "violation",
]
