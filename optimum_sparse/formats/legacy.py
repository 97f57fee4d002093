"""Formats of compressed-tensors that its current releases no longer read: read only, to be converted.

    name         dtype      sparse-24-bitmask    sparse-bitmask
    compressed   a float's  [out, in / 2]        [kept], row by row  the kept values in column order
    bitmask      uint8      [out, ceil(in / 8)]  the same            bit c % 8 of byte c // 8 is column c, 1 = kept
    shape        int64      [2, 1] or [2]        [2]                 (out, in)
    row_offsets  int64      -                    [out]               where each row begins in `compressed`

They lie under `<module>.` (releases from 0.8 on) or `<module>.weight.`. Some files hold vectors, norms above all, in
`sparse-bitmask`: without the first dimension. Kept are two of every four weights, or all that are not zero. Which
format it is, is said by `sparsity_config` in the checkpoint's config.
"""

import math

import torch
from torch import Tensor

from .bitmask import unpack_bits


TENSORS = {
    "sparse-24-bitmask": ("compressed", "bitmask", "shape"),
    "sparse-bitmask": ("compressed", "bitmask", "shape", "row_offsets"),
}


def decode(tensors: dict[str, Tensor], format: str) -> Tensor:
    """The dense matrix [out, in], or vector [n], of the dtype of the values.

    Args:
        tensors: by the names above.
        format: one of `TENSORS`.

    Raises:
        ValueError: tensors are missing, contradict one another, or hold integers or 8-bit floats (which are quantized
            weights, and nothing without their scales).
    """
    if set(tensors) != set(TENSORS[format]):
        missing, extra = sorted(set(TENSORS[format]) - set(tensors)), sorted(set(tensors) - set(TENSORS[format]))
        raise ValueError(f"{format} has {sorted(TENSORS[format])}: missing {missing}, unexpected {extra}.")
    values, mask = tensors["compressed"], tensors["bitmask"]
    if not values.is_floating_point() or values.element_size() == 1:
        raise ValueError(
            f"compressed has dtype {values.dtype}: these weights are quantized on top of their sparsity, which is not "
            "read; only 16-bit and wider floats are."
        )
    shape = tuple(tensors["shape"].flatten().tolist())
    if not 1 <= len(shape) <= 2 or not all(isinstance(size, int) and size > 0 for size in shape):
        raise ValueError(f"shape is {list(shape)}, must be two positive integers (one for a vector).")
    rows, columns = math.prod(shape[:-1]), shape[-1]
    if mask.dtype != torch.uint8 or mask.numel() != rows * -(-columns // 8):  # before anything of that size is made
        raise ValueError(
            f"bitmask is {list(mask.shape)} {mask.dtype}, a matrix {list(shape)} has "
            f"{[rows, -(-columns // 8)]} torch.uint8."
        )
    keep = unpack_bits(mask.reshape(rows, -1), -(-columns // 8) * 8)
    if keep[:, columns:].any():
        raise ValueError(f"bitmask has bits set beyond column {columns}: the file is damaged.")
    keep = keep[:, :columns]
    counts = keep.sum(1)
    if int(counts.sum()) != values.numel():
        raise ValueError(f"bitmask keeps {int(counts.sum())} values, compressed holds {values.numel()}.")
    if "row_offsets" in tensors:
        if not torch.equal(tensors["row_offsets"].flatten(), counts.cumsum(0) - counts):
            raise ValueError("row_offsets do not count what bitmask keeps in each row: the file is damaged.")
    elif keep.numel() % 4 or (keep.reshape(-1, 4).sum(1) != 2).any():
        raise ValueError("bitmask does not keep two of every four weights: the file is damaged.")
    return torch.zeros(rows, columns, dtype=values.dtype).masked_scatter_(keep, values).view(shape)
