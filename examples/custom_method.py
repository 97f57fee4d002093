"""A pruning method of your own: any object with `needs` and `solve`.

python examples/custom_method.py MODEL OUTPUT
"""

import sys

from optimum_sparse import Pruner, SparsityConfig
from optimum_sparse.core import InputStats, Needs, Pattern, Solved, keep_mask


class Saliency:
    """Optimal brain surgeon's score w^2 / [G^-1]_jj, for all weights at once and without its update of the others."""

    needs = Needs.GRAM  # what `solve` may read from stats: NOTHING, DIAGONAL (mean_square), or GRAM (also gram)

    def solve(self, weight, stats: InputStats, pattern: Pattern) -> Solved:
        factor = stats.inverse_factor(damping=0.01)  # G^-1 = factor^T factor
        keep = keep_mask(weight.square() / factor.square().sum(0), pattern)  # bool [out, in], exact counts
        return Solved(weight * keep, keep)


def main(model: str, output: str, samples: int = 8, tokens: int = 128) -> None:
    config = SparsityConfig(
        pattern="2:4", dataset="self", num_samples=samples, sequence_length=tokens, refine="pcg"
    )  # pcg gives the kept weights the values that fit best
    pruner = Pruner.from_pretrained(model)
    pruner.prune(config, method=Saliency()).save_pretrained(output)
    print(pruner.report)


if __name__ == "__main__":
    main(*sys.argv[1:3])
