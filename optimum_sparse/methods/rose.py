"""ROSE: SparseGPT with the columns reordered where their losses are uneven. arXiv 2603.05878, section 3.

Early columns of the sweep are compensated by all columns after them, late ones by few. So what will lose most goes
first. Most layers lose evenly, and keep their order; it is mostly o_proj that does not.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..core import NM, InputStats, Needs, Pattern, Solved, column_sweep, inverse_factor, keep_mask


@dataclass(frozen=True)
class Rose:
    """Pre-prune by Wanda's score; reorder columns inside blocks, then blocks, by what pre-pruning lost; sweep; undo.

    For N:M the unit that moves is the group, whole, so that groups survive on the way back.

    Attributes:
        damping, block_size: as in SparseGPT.
        threshold: a layer is reordered if the relative range (max - min) / max of its block losses is above this.
    """

    damping: float = 0.01
    block_size: int = 128
    threshold: float = 0.5
    needs = Needs.GRAM

    def solve(self, weight: Tensor, stats: InputStats, pattern: Pattern) -> Solved:
        if isinstance(pattern, NM):
            pattern.check_width(weight.shape[1])
        weight = weight.masked_fill(stats.mean_square == 0, 0)
        order, widths = self._order(weight, stats.mean_square, pattern)
        if order is None:
            return column_sweep(weight, stats.inverse_factor(self.damping), pattern, block_size=self.block_size)
        factor = inverse_factor(stats.gram[order][:, order], self.damping)
        solved = column_sweep(weight[:, order], factor, pattern, block_size=self.block_size, widths=widths)
        back = order.argsort()
        return Solved(solved.weight[:, back].contiguous(), solved.keep[:, back].contiguous(), "reordered")

    def _order(self, weight: Tensor, mean_square: Tensor, pattern: Pattern) -> tuple[Tensor | None, list[int] | None]:
        """(columns in the order of the sweep int64 [in], widths of its blocks); (None, None) to leave the layer be."""
        score = weight.abs() * mean_square.sqrt()
        unit = pattern.group if isinstance(pattern, NM) else self.block_size
        parts = [_lost(part, pattern) for part in score.split(unit, dim=1)]
        losses = torch.stack([part.mean() for part in parts])  # a mean, since the last block may be narrower
        if losses.max() - losses.min() <= self.threshold * losses.max():
            return None, None
        blocks = losses.argsort(descending=True, stable=True).tolist()
        columns = torch.arange(weight.shape[1], device=weight.device).split(unit)
        if isinstance(pattern, NM):
            return torch.cat([columns[block] for block in blocks]), None
        inside = [columns[block][parts[block].argsort(descending=True, stable=True)] for block in blocks]
        return torch.cat(inside), [len(columns[block]) for block in blocks]


def _lost(score: Tensor, pattern: Pattern) -> Tensor:
    """What pre-pruning the columns of score [out, n] takes from each of them: fp32 [n]."""
    return score.masked_fill(keep_mask(score, pattern), 0).sum(0)
