"""What a pruning method is."""

from typing import Any, Protocol

from torch import Tensor

from ..core import Needs, Pattern, Solved


class Method(Protocol):
    """One layer at a time: a weight, what is known of its inputs, a pattern in; the pruned weight out.

    Any object with these two members can be passed to the Pruner.
    """

    @property
    def needs(self) -> Needs:
        """What `solve` reads from its statistics."""
        ...

    def solve(self, weight: Tensor, stats: Any, pattern: Pattern) -> Solved:
        """Prune weight, fp32 [out, in], and modify neither argument.

        `stats` is an InputStats of at least `needs`, or None if that is Needs.NOTHING.
        """
        ...
