"""SparseGPT: mask and update of the kept weights, column by column. Frantar and Alistarh 2023, arXiv 2301.00774."""

from dataclasses import dataclass

from torch import Tensor

from ..core import InputStats, Needs, Pattern, Solved, column_sweep


@dataclass(frozen=True)
class SparseGPT:
    """The sweep of `core.sweep`, in the order of the columns.

    Attributes:
        damping: added to the diagonal of the Gram matrix, relative to its mean.
        block_size: columns per lazy update, and per mask decision when unstructured.
    """

    damping: float = 0.01
    block_size: int = 128
    needs = Needs.GRAM

    def solve(self, weight: Tensor, stats: InputStats, pattern: Pattern) -> Solved:
        weight = weight.masked_fill(stats.mean_square == 0, 0)  # inputs that are always 0
        return column_sweep(weight, stats.inverse_factor(self.damping), pattern, block_size=self.block_size)
