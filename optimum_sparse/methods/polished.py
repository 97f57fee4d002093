"""Any method's mask, with the kept weights that fit the layer's output best."""

from dataclasses import dataclass

from torch import Tensor

from ..core import InputStats, Needs, Pattern, Solved, polish
from .base import Method


@dataclass(frozen=True)
class Polished:
    """Conjugate gradients on the support that `method` chose (ALPS, arXiv 2406.07831, section 3.3).

    The layer's output error never rises. A sweep leaves much to gain: it never revisits a column.
    """

    method: Method
    damping: float = 0.01
    iterations: int = 20
    needs = Needs.GRAM

    def solve(self, weight: Tensor, stats: InputStats, pattern: Pattern) -> Solved:
        solved = self.method.solve(weight, stats if self.method.needs > Needs.NOTHING else None, pattern)
        better = polish(solved.weight, solved.keep, weight, stats.gram, self.damping, self.iterations)
        return solved._replace(weight=better)
