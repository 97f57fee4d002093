"""Compressed sparse rows, as `torch.sparse_csr_tensor` takes them: for other software, not for loading.

    name                 dtype          shape
    weight               the model's    [kept], the non-zeros row by row
    weight_crow_indices  int32          [out + 1], where each row begins in `weight`
    weight_col_indices   int32          [kept], the column of each value

A column index takes twice the bytes of a 16-bit value: at half the weights this is 1.5 times the dense bytes, and it
is smaller than dense only beyond two thirds zeros, smaller than `bitmask` only beyond 31/32. The values have the name
`weight`, so that a reader that does not know the format fails on the shape. (out, in) is in the model's config.
"""

import torch
from torch import Tensor


def encode(weight: Tensor) -> dict[str, Tensor]:
    """A dense matrix [out, in]; zeros are left out. From 2**31 weights on, indices are int64."""
    nonzero = weight != 0
    kind = torch.int32 if weight.numel() < 2**31 else torch.int64
    crow = torch.zeros(len(weight) + 1, dtype=kind, device=weight.device)
    crow[1:] = nonzero.sum(1).cumsum(0)
    return {
        "weight": weight[nonzero],
        "weight_crow_indices": crow,
        "weight_col_indices": nonzero.nonzero()[:, 1].to(kind),
    }


def decode(tensors: dict[str, Tensor], shape: tuple[int, int]) -> Tensor:
    """The sparse CSR tensor (out, in), with PyTorch's own check of its indices. `.to_dense()` is the matrix."""
    indices = tensors["weight_crow_indices"], tensors["weight_col_indices"]
    return torch.sparse_csr_tensor(*indices, tensors["weight"], shape, check_invariants=True)


def nbytes(shape: tuple[int, int], kept: int, itemsize: int) -> int:
    """Of a matrix with `kept` non-zeros of `itemsize` bytes, with int32 indices."""
    return kept * (itemsize + 4) + 4 * (shape[0] + 1)
