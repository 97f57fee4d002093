"""Tensors only: patterns, input statistics, the column sweep. Knows neither modules nor models."""

from .least_squares import polish
from .patterns import (
    NM,
    Pattern,
    Unstructured,
    exactly,
    keep_mask,
    keep_top,
    parse_pattern,
    patterns_of,
    violation,
)
from .statistics import SAMPLE_TOKENS, CrossStats, InputStats, Needs
from .sweep import NotPositiveDefinite, Solved, column_sweep, inverse_factor, sweep_block


__all__ = [
    "NM",
    "SAMPLE_TOKENS",
    "CrossStats",
    "InputStats",
    "Needs",
    "NotPositiveDefinite",
    "Pattern",
    "Solved",
    "Unstructured",
    "column_sweep",
    "exactly",
    "inverse_factor",
    "keep_mask",
    "keep_top",
    "parse_pattern",
    "patterns_of",
    "polish",
    "sweep_block",
    "violation",
]
