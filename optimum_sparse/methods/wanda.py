"""Wanda: keep the largest |W_ij| * |X_j|. Sun et al. 2023, arXiv 2306.11695, section 3."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..core import InputStats, Needs, Pattern, Solved, Unstructured, keep_mask, keep_top


@dataclass(frozen=True)
class Wanda:
    """Unstructured weights compete within their output row; kept weights are not changed.

    The paper's l2 norm of X_j is replaced by the root of the mean square: equal up to a constant.
    """

    needs = Needs.DIAGONAL

    def solve(self, weight: Tensor, stats: InputStats, pattern: Pattern) -> Solved:
        score = weight.abs() * stats.mean_square.sqrt()
        if isinstance(pattern, Unstructured):
            kept = _kept_by_row(pattern, *weight.shape)
            same = bool((kept == kept[0]).all())  # for which there are faster ways
            keep = keep_top(score, int(kept[0]) if same else kept.to(weight.device))
        else:
            keep = keep_mask(score, pattern)
        return Solved(weight * keep, keep)


def _kept_by_row(pattern: Unstructured, rows: int, width: int) -> Tensor:
    """int64 [rows, 1]: equal up to one, so that rounding leaves the exact number of weights in the matrix."""
    weights = torch.arange(rows + 1, device="cpu") * width
    removed = (pattern.sparsity * weights.double()).round()  # as Unstructured.kept rounds: half to even
    return (weights - removed.long()).diff()[:, None]
