"""The column sweep of one block on CUDA as a single Triton kernel: `core.sweep.sweep_block` without its many launches.

The sweep is sequential along the columns, but every row of the weight is swept by itself: all that rows share is the
factor U. So each program takes a slab of a few rows through all columns of the block, one panel of columns after the
other:

1. The panel is loaded and pays for everything before it at once: W[panel] -= U[:first, panel]^T E[:first], a matrix
   product in true fp32. E, the errors of the columns before, is read back from the output: this program wrote it.
2. Inside the panel, in registers, one column after the other: the error of column j, (w_j - q_j) / U_jj, times row j
   of U is subtracted from the columns right of j. N:M decides a group on arriving at its first column; a panel holds
   whole groups.
3. The panel and its errors are stored.

The reference needs several launches per column for this; here it is one per block. Step 2, a chain of dependent
operations, takes most of the time, so it is unrolled: all column numbers in it are constants.
"""

import importlib.util

import torch
from torch import Tensor

from ..core.sweep import sweep_block_reference


HAS_TRITON = importlib.util.find_spec("triton") is not None
if HAS_TRITON:
    import triton
    import triton.language as tl

GROUPS = (0, 1, 2, 4, 8, 16, 32)  # 0: a given mask. Tiles have power-of-two shapes, and groups must divide a panel
ROWS = 16  # of a slab: few, so that a layer of 1,536 rows is work for a hundred multiprocessors
WARPS = 4
DEPTH = 32  # columns of E per step of the product in 1


def sweep_block_cuda(columns: Tensor, keep: Tensor, factor: Tensor, kept: int, group: int) -> Tensor:
    """`sweep_block` on CUDA: the kernel where it can, the reference otherwise."""
    if not kernel_takes(columns, factor, group):
        return sweep_block_reference(columns, keep, factor, kept, group)
    with torch.cuda.device(columns.device):  # Triton launches on the current device
        return sweep_block_triton(columns, keep, factor, kept, group)


torch.library.impl("optimum_sparse::sweep_block", "CUDA", sweep_block_cuda)


def kernel_takes(columns: Tensor, factor: Tensor, group: int) -> bool:
    """Whether the kernel can sweep the block `columns` [n, out] in groups of `group`, 0 for a given mask."""
    return (
        HAS_TRITON
        and columns.dtype == factor.dtype == torch.float32
        and columns.numel() > 0
        and group in GROUPS
        and (group == 0 or columns.shape[0] % group == 0)
    )


def sweep_block_triton(columns: Tensor, keep: Tensor, factor: Tensor, kept: int, group: int) -> Tensor:
    """`sweep_block` by the kernel, on tensors of any strides for which `kernel_takes` holds."""
    n, rows = columns.shape
    errors = torch.empty(n, rows, dtype=torch.float32, device=columns.device)
    flags = keep.view(torch.uint8)  # for Triton, a pointer to bool is one to single bits
    _sweep_kernel[(triton.cdiv(rows, ROWS),)](
        columns, flags, factor, errors, n, rows,
        *columns.stride(), *flags.stride(), *factor.stride(), errors.stride(0),
        KEPT=kept, GROUP=group, PANEL=max(16, group), DEPTH=DEPTH, ROWS=ROWS, num_warps=WARPS,
    )  # fmt: skip
    return errors


if HAS_TRITON:

    @triton.jit
    def _sweep_kernel(
        columns: tl.tensor,
        keep: tl.tensor,
        factor: tl.tensor,
        errors: tl.tensor,
        n: int,
        rows: int,
        columns_column: int,
        columns_row: int,
        keep_column: int,
        keep_row: int,
        factor_row: int,
        factor_column: int,
        errors_column: int,
        KEPT: tl.constexpr,  # noqa: N803
        GROUP: tl.constexpr,  # noqa: N803
        PANEL: tl.constexpr,  # noqa: N803
        DEPTH: tl.constexpr,  # noqa: N803
        ROWS: tl.constexpr,  # noqa: N803
    ) -> None:
        """Tiles are [ROWS, columns]; `a_b` is the stride of tensor a from one b to the next."""
        slab = tl.program_id(0).to(tl.int64) * ROWS  # 64 bits: a matrix may have more elements than 32 can count
        columns += slab * columns_row
        keep += slab * keep_row
        errors += slab
        row = tl.arange(0, ROWS)[:, None]
        column = tl.arange(0, PANEL)[None, :]
        depth = tl.arange(0, DEPTH)
        for first in range(0, n, PANEL):
            at = first + column
            valid = (at < n) & (row < rows - slab)
            columns_at = columns + row * columns_row + at * columns_column
            keep_at = keep + row * keep_row + at * keep_column
            # What is outside gets weights of 0 and a scale of 1: harmless, and no NaN.
            weight = tl.load(columns_at, mask=valid, other=0.0)
            scale = tl.load(factor + at * (factor_row + factor_column), mask=at < n, other=1.0)
            for start in range(0, first, DEPTH):
                before = start + depth
                error = tl.load(
                    errors + row + before[None, :] * errors_column,
                    mask=(before < first)[None, :] & (row < rows - slab),
                    other=0.0,
                )
                above = tl.load(
                    factor + before[:, None] * factor_row + at * factor_column,
                    mask=(before < first)[:, None] & (at < n),
                    other=0.0,
                )
                weight -= tl.dot(error, above, input_precision="ieee")
            if GROUP == 0:
                kept = tl.load(keep_at, mask=valid, other=1) != 0
            else:
                kept = tl.full([ROWS, PANEL], 1, tl.int1)

            for j in tl.static_range(PANEL):
                if GROUP > 0:
                    place = tl.arange(0, GROUP)
                    if j % GROUP == 0:
                        # Tiles have no slices: all groups of the panel are ranked, the one that begins here is taken.
                        score = weight / scale
                        score = tl.reshape(score * score, [ROWS, PANEL // GROUP, GROUP])
                        mine, other = score[:, :, :, None], score[:, :, None, :]
                        lower = (place[None, :] < place[:, None])[None, None, :, :]
                        beaten = (other > mine) | ((other == mine) & lower)  # as keep_top: ties go to the lower index
                        rank = tl.reshape(tl.sum(beaten.to(tl.int32), 3), [ROWS, PANEL])
                        kept = tl.where(column // GROUP == j // GROUP, rank < KEPT, kept)
                lost = tl.sum(tl.where((column == j) & (kept == 0), weight, 0.0), 1)[:, None]
                diagonal = tl.load(factor + (first + j) * (factor_row + factor_column), mask=first + j < n, other=1.0)
                right = tl.load(
                    factor + (first + j) * factor_row + at * factor_column, mask=(column > j) & (at < n), other=0.0
                )
                weight -= lost / diagonal * right

            tl.store(columns_at, weight, mask=valid)
            # No weight has changed since its own turn, so this is the error that was subtracted.
            tl.store(errors + row + at * errors_column, tl.where(kept, 0.0, weight / scale), mask=valid)
            if GROUP > 0:
                tl.store(keep_at, kept.to(tl.uint8), mask=valid)
            tl.debug_barrier()  # other threads of this program read these errors
