"""The one column sweep that every second-order method uses (optimal brain surgeon, column by column).

SparseGPT, Frantar and Alistarh 2023, arXiv 2301.00774, section 3 and algorithm 1. Letters as in the paper, but for the
factor: with G = mean x x^T + damping, the paper's `Cholesky(H^-1)^T` is `U` here, upper, G^-1 = U^T U.
"""

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from .patterns import NM, Pattern, keep_top


class Solved(NamedTuple):
    """A pruned matrix: `weight` fp32 [out, in], exactly 0 wherever `keep` (bool [out, in]) is False.

    `note` is what the method wants the report to say of this layer.
    """

    weight: Tensor
    keep: Tensor
    note: str = ""


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
            f"the Gram matrix of the inputs is not positive definite with damping={damping:g}: "
            f"{_remedy(reversed_gram, mean, damping)} or use more calibration tokens."
        )
    upper = lower.flip(0, 1)
    _invert_upper(upper)
    return upper


def _invert_upper(matrix: Tensor) -> None:
    """Invert an upper triangular matrix [n, n] in place, by halves: mostly matrix products, and half of the work that
    solving for the identity is."""
    n = len(matrix)
    if n <= 512:
        identity = torch.eye(n, dtype=matrix.dtype, device=matrix.device)
        matrix.copy_(torch.linalg.solve_triangular(matrix, identity, upper=True))
        return
    half = n // 2
    _invert_upper(matrix[:half, :half])
    _invert_upper(matrix[half:, half:])
    matrix[:half, half:] = -(matrix[:half, :half] @ matrix[:half, half:] @ matrix[half:, half:])


def _remedy(matrix: Tensor, mean: Tensor, damping: float) -> str:
    """The least of 10, 100 ... times `damping` (of 0.001, if it is less) with which `matrix` has a factor."""
    first = max(damping, 1e-3)
    for larger in (first * 10**power for power in range(1, 7)):
        damped = matrix.clone()
        damped.diagonal().add_((larger - damping) * mean)
        if not torch.linalg.cholesky_ex(damped)[1]:
            return f"damping={larger:g} works, set that"
    return f"no damping up to {larger:g} works, so look for inputs of extreme size,"


@torch.no_grad()
def column_sweep(
    weight: Tensor,
    factor: Tensor,
    pattern: Pattern,
    *,
    block_size: int = 128,
    widths: Sequence[int] | None = None,
) -> Solved:
    """Go through the columns from left to right; each removed weight is compensated by all columns after it.

    A weight's score is w^2 / U_jj^2, the loss of removing it alone, from weights that already carry all compensation
    so far. N:M masks are chosen per row and group as the sweep reaches the group; unstructured masks per block,
    jointly over all rows (section 3.3 of the paper).

    Columns are updated lazily, by halves: when the left half of a range of blocks is swept, one matrix product updates
    the right half with all errors of the left, and so in each half. Every pair of blocks meets once, most of them in
    deep products, which are fast. Ranges are of 2^k blocks, but for the last right halves, which may lack some.

    Args:
        weight: fp32 [out, in].
        factor: `inverse_factor` of the inputs, fp32 [in, in].
        block_size: columns of a block; N:M rounds it to whole groups.
        widths: of the blocks, if they are not all `block_size` wide.
    """
    columns = weight.T.contiguous().clone()  # [in, out]: a column of the weight is one contiguous row
    width, rows = columns.shape
    kept, group = (pattern.kept, pattern.group) if isinstance(pattern, NM) else (0, 0)
    if isinstance(pattern, NM):
        pattern.check_width(width)
        block_size = max(block_size // group, 1) * group
    if widths is None:
        widths = [min(block_size, width - start) for start in range(0, width, block_size)]
    bounds, masks, errors = [0, *accumulate(widths)], [], []
    # A GPU is through with a block as soon as Python: hence few calls.
    blocks = zip(columns.split(widths), factor.diagonal()[:, None].split(widths), strict=True)
    for number, (block, scale) in enumerate(blocks, 1):
        start, stop = bounds[number - 1], bounds[number]
        if isinstance(pattern, NM):
            keep = torch.empty_like(block, dtype=torch.bool)
        else:
            count = pattern.kept(rows * stop) - pattern.kept(rows * start)  # exact over the whole matrix
            keep = keep_top((block / scale).square_().view(1, -1), count).view_as(block)
        masks.append(keep)
        errors.append(sweep_block(block, keep, factor[start:stop, start:stop], kept, group))
        half = number & -number  # blocks in the left half that ends here: the largest power of 2 that divides `number`
        first, end = bounds[number - half], bounds[min(number + half, len(widths))]
        if stop < end:
            left = errors[-1] if half == 1 else torch.cat(errors[-half:])
            columns[stop:end].addmm_(factor[first:stop, stop:end].T, left, alpha=-1)
            del left  # as large as half of the matrix
    del errors
    keep = torch.cat([columns[:0].bool(), *masks])  # there may be no block
    columns *= keep
    return Solved(columns.T.contiguous(), keep.T.contiguous())


def sweep_block_reference(columns: Tensor, keep: Tensor, factor: Tensor, kept: int, group: int) -> Tensor:
    """Sweep the columns of one block in place: what `sweep_block` does where `kernels` has nothing faster.

    Rank-one updates are made inside panels of about 16 columns only, and one matrix product per panel.

    Args:
        columns: fp32 [n, out], one contiguous row per column of the weight.
        keep: bool [n, out]; given, or written if `group` is not 0: then `kept` of every `group` columns stay.
        factor: the block of U on the diagonal, fp32 [n, n].

    Returns:
        (w - q) / U_jj of every weight, fp32 [n, out]: what the columns after the block are to be updated with.
    """
    n = len(columns)
    errors = torch.empty_like(columns)
    scale = factor.diagonal()[:, None]
    panel = (
        group if group >= 16 else 16 // max(group, 1) * max(group, 1)
    )  # a group is chosen when all of it is up to date
    panel = 16 if panel == n else panel
    for first in range(0, n, panel):
        last = min(first + panel, n)
        columns[first:last] -= factor[:first, first:last].T @ errors[:first]
        for j in range(first, last):
            if group and j % group == 0:
                chosen = slice(j, j + group)
                keep[chosen] = keep_top((columns[chosen] / scale[chosen]).square().T, kept).T
            torch.div(columns[j], scale[j], out=errors[j]).masked_fill_(keep[j], 0)
            if j + 1 < last:
                columns[j + 1 : last] -= factor[j, j + 1 : last, None] * errors[j]
    return errors


# Not by `custom_op`, whose every call takes 25 us more of Python: as long as what it does.
_LIBRARY = torch.library.Library("optimum_sparse", "FRAGMENT")
_LIBRARY.define("sweep_block(Tensor(a!) columns, Tensor(b!) keep, Tensor factor, int kept, int group) -> Tensor")
_LIBRARY.impl("sweep_block", sweep_block_reference, "CompositeExplicitAutograd")
sweep_block = torch.ops.optimum_sparse.sweep_block.default
