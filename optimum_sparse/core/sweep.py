"""The one column sweep that every second-order method uses (optimal brain surgeon, column by column).

SparseGPT, Frantar and Alistarh 2023, arXiv 2301.00774, section 3 and algorithm 1. Letters as in the paper, but for the
factor: with G = mean x x^T + damping, the paper's `Cholesky(H^-1)^T` is `U` here, upper, G^-1 = U^T U.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Solved(NamedTuple):
    """A pruned matrix: `weight` fp32 [out, in], exactly 0 wherever `keep` (bool [out, in]) is False."""

    weight: Tensor
    keep: Tensor


class NotPositiveDefinite(ValueError):
    """The damped Gram matrix has no Cholesky factor."""


def inverse_factor(gram: Tensor, damping: float) -> Tensor:
    """Upper triangular U with (G + damping * mean(diag G) * I)^-1 = U^T U.

    Row j of U, from column j on and over U_jj, is the elimination of column j after all columns before it are gone.
    One Cholesky factorization of the reversed matrix and one triangular inverse: G = V V^T with V upper, U = V^-1.
    Dead inputs (G_jj = 0) get the mean of the live ones on the diagonal, which makes them independent of the rest. The
    paper sets them to 1; here G is a mean per token and small, and ones would inflate the damping of everything else.

    Args:
        gram: fp32 [in, in], symmetric positive semi-definite.
        damping: relative to the mean of the diagonal; 0.01 in the paper.

    Raises:
        NotPositiveDefinite: nothing is put in the factor's place.
    """
    diagonal = gram.diagonal()
    live = diagonal != 0
    mean = diagonal.sum() / live.sum().clamp(min=1)
    mean = torch.where(live.any(), mean, torch.ones_like(mean))
    reversed_gram = gram.flip(0, 1)
    reversed_gram.diagonal().copy_((torch.where(live, diagonal, mean) + damping * mean).flip(0))
    lower, failed = torch.linalg.cholesky_ex(reversed_gram)
    if failed:
        raise NotPositiveDefinite(
            f"the Gram matrix of the inputs is not positive definite with damping={damping:g}: raise the damping "
            f"(say, to {max(10 * damping, 0.01):g}) or use more calibration tokens."
        )
    identity = torch.eye(gram.shape[0], dtype=gram.dtype, device=gram.device)
    return torch.linalg.solve_triangular(lower.flip(0, 1), identity, upper=True)


def column_sweep(
    weight: Tensor,
    factor: Tensor,
    choose: Callable[[Tensor, int], Tensor],
    *,
    decide_every: int,
    block_size: int = 128,
) -> Solved:
    """Go through the columns from left to right; each removed weight is compensated by all columns after it.

    The mask of `decide_every` columns is chosen when the sweep reaches them, from weights that already carry all
    compensation so far: the score is w^2 / U_jj^2, the loss of removing that weight alone.

    Columns are updated lazily on two levels: one matrix product per block for everything after it, one per panel of
    about 16 columns inside a block, and rank-one updates only inside a panel.

    Args:
        weight: fp32 [out, in].
        factor: `inverse_factor` of the inputs, fp32 [in, in].
        choose: (score [out, n], first column) -> keep bool [out, n].
        decide_every: n above; divides block_size.
        block_size: columns between two full updates.
    """
    if block_size % decide_every:
        raise ValueError(f"block_size={block_size} must be a multiple of decide_every={decide_every}.")
    panel = decide_every if decide_every >= 16 else 16 // decide_every * decide_every
    if panel == block_size:
        panel = 16
    columns = weight.T.contiguous().clone()  # [in, out]: a column of the weight is one contiguous row
    keep = torch.empty_like(columns, dtype=torch.bool)
    width = len(columns)
    scale = factor.diagonal()[:, None]
    for start in range(0, width, block_size):
        stop = min(start + block_size, width)
        errors = torch.empty_like(columns[start:stop])  # (w - q) / U_jj
        for first in range(start, stop, panel):
            last = min(first + panel, stop)
            columns[first:last] -= factor[start:first, first:last].T @ errors[: first - start]
            for j in range(first, last):
                if j % decide_every == 0:
                    chosen = slice(j, min(j + decide_every, stop))
                    keep[chosen] = choose((columns[chosen] / scale[chosen]).square().T, j).T
                error = errors[j - start]
                torch.div(columns[j], scale[j], out=error).masked_fill_(keep[j], 0)
                if j + 1 < last:
                    columns[j + 1 : last] -= factor[j, j + 1 : last, None] * error
        columns[stop:] -= factor[start:stop, stop:].T @ errors
    columns *= keep
    return Solved(columns.T.contiguous(), keep.T.contiguous())
