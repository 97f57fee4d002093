"""Magnitude pruning: keep the largest |W|. Needs no data."""

from dataclasses import dataclass

from torch import Tensor

from ..core import InputStats, Needs, Pattern, Solved, keep_mask


@dataclass(frozen=True)
class Magnitude:
    """Unstructured weights compete over the whole matrix (Han et al. 2015, arXiv 1506.02626)."""

    needs = Needs.NOTHING

    def solve(self, weight: Tensor, stats: InputStats | None, pattern: Pattern) -> Solved:
        keep = keep_mask(weight.abs(), pattern)
        return Solved(weight * keep, keep)
