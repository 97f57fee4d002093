"""ADMM for the mask, conjugate gradients for the weights: ALPS. Meng et al. 2024, arXiv 2406.07831, section 3.

Letters as in the paper where it has them: W^ is the target, B the dense iterate, Z its projection onto the pattern, V
the multipliers, H the Gram matrix (`G` in the rest of this package). Weights are [out, in] here, the paper's are
transposed.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..core import InputStats, Needs, Pattern, Solved, keep_mask, polish


@dataclass(frozen=True)
class Admm:
    """Alternate between least squares near Z and projection onto the pattern, with growing penalty rho.

    H is scaled to a unit diagonal first (section 3.4), so that magnitudes of its weights are their scores.

    Attributes:
        damping: added to the scaled diagonal, whose mean is 1.
        iterations: at most; most layers settle earlier.
        polish: conjugate gradient steps on the final support.
    """

    damping: float = 0.01
    iterations: int = 300
    polish: int = 10
    needs = Needs.GRAM

    def solve(self, weight: Tensor, stats: InputStats, pattern: Pattern) -> Solved:
        d, gram, eigenvalues, q = stats.cached("admm", lambda: _decompose(stats))
        eigenvalues = eigenvalues + self.damping
        live = stats.mean_square > 0
        target = weight * live * d
        image = target @ gram + self.damping * target
        z, v = target, torch.zeros_like(target)
        keep = keep_mask(z.abs(), pattern)
        kept = max(int(keep.sum()), 1)
        rho = 0.1
        done = 0
        while done < self.iterations:
            inverse = (q / (eigenvalues + rho)) @ q.T
            for _ in range(min(3, self.iterations - done)):
                b = (image - v + rho * z) @ inverse
                projected = b + v / rho
                now = keep_mask(projected.abs(), pattern)
                z = projected * now
                v = v + rho * (b - z)
                done += 1
            changed = int((now ^ keep).sum()) / kept
            keep = now
            if changed == 0 or (done >= 30 and changed < 3e-4):
                break
            rho *= 1.3 if changed > 0.1 else 1.2 if changed > 0.005 else 1.1
        z = polish(z * live, keep, target, gram, self.damping, self.polish)
        return Solved(z / d, keep, f"{done} iterations")


def _decompose(stats: InputStats) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(d [in], D^-1 H D^-1 [in, in], its eigenvalues [in], its eigenvectors [in, in]) with D = diag(d)."""
    d = stats.mean_square.sqrt()
    d = d.where(d > 0, 1)
    gram = stats.gram / (d[:, None] * d)
    eigenvalues, q = torch.linalg.eigh(gram)
    return d, gram, eigenvalues.clamp(min=0), q
