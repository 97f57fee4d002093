"""What a pruning method is."""

from typing import Protocol

from torch import Tensor

from ..core import InputStats, Needs, Pattern, Solved


class Method(Protocol):
    """One layer at a time: a weight, what is known of its inputs, a pattern in; the pruned weight out.

    Any object with these two members can be passed to the Pruner.
    """

    @property
    def needs(self) -> Needs:
        """What `solve` reads from its statistics."""
        ...

    def solve(self, weight: Tensor, stats: InputStats | None, pattern: Pattern) -> Solved:
        """Prune weight, fp32 [out, in]; `stats` is None when the method needs nothing. Inputs are not modified."""
        ...
