"""SparseGPT: mask and update of the kept weights, column by column. Frantar and Alistarh 2023, arXiv 2301.00774."""

from dataclasses import dataclass

from torch import Tensor

from ..core import NM, InputStats, Needs, Pattern, Solved, column_sweep, keep_top


@dataclass(frozen=True)
class SparseGPT:
    """The sweep of `core.sweep` with the paper's adaptive mask selection.

    N:M masks are chosen per row and group as the sweep reaches the group; unstructured masks per block of columns,
    jointly over all rows (section 3.3 of the paper).

    Attributes:
        damping: added to the diagonal of the Gram matrix, relative to its mean.
        block_size: columns per lazy update, and per mask decision when unstructured.
    """

    damping: float = 0.01
    block_size: int = 128
    needs = Needs.GRAM

    def solve(self, weight: Tensor, stats: InputStats, pattern: Pattern) -> Solved:
        factor = stats.inverse_factor(self.damping)
        dead = stats.mean_square == 0
        weight = weight.masked_fill(dead, 0)
        if isinstance(pattern, NM):
            pattern.check_width(weight.shape[1])
            block = max(self.block_size // pattern.group, 1) * pattern.group
            return column_sweep(
                weight,
                factor,
                lambda score, _: keep_top(score, pattern.kept),
                decide_every=pattern.group,
                block_size=block,
            )

        def choose(score: Tensor, first: int) -> Tensor:
            rows, columns = score.shape
            kept = pattern.kept(rows * (first + columns)) - pattern.kept(rows * first)  # exact over the whole matrix
            return keep_top(score.reshape(1, -1), kept).reshape(score.shape)

        return column_sweep(weight, factor, choose, decide_every=self.block_size, block_size=self.block_size)
