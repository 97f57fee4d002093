"""The disk format `bitmask`: kept values in column order, and one bit per weight that says where they belong.

    dense row     [ .5   0   0  -2 | 0   1  .3   0 ]          2:4, bf16: 16 bytes
    weight        [ .5  -2   1  .3 ]                          8 bytes
    weight_mask   [ 0b01101001 ]                              1 byte; bit c % 8 of byte c // 8 is column c, 1 = kept

    name         dtype          shape
    weight       the model's    N:M: [out, in * N / M]; unstructured: [kept], row by row
    weight_mask  uint8          [out, ceil(in / 8)], unused bits of the last byte are 0
    weight_rows  int64          [out + 1], unstructured only: where each row begins in `weight`

At 50 % in a 16-bit dtype every pattern takes 0.5625 of the dense bytes. Zeros that a pattern would allow to be
non-zero are stored as kept values (lowest columns first), so a matrix has exactly one encoding and shapes follow from
the pattern. The values keep the name `weight`, with another shape, on purpose: a reader that does not know the format
fails on the shape; under any other name it would go on with random numbers. Each matrix of a fused expert is one of
its own here (`nn.experts` says under which names).
"""

import math
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from ..core import NM, Pattern, Unstructured, keep_mask, violation


SUFFIXES = ("weight_rows", "weight_mask", "weight")
CHUNK = 2**20  # weights whose values are moved at a time on a CPU: their indices stay in its cache
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # numpy knows no bfloat16


def layout(shape: tuple[int, int], pattern: Pattern) -> dict[str, tuple[tuple[int, ...], torch.dtype | None]]:
    """{name: (shape, dtype)} of the tensors that hold a matrix of `shape` (out, in); dtype None is the model's own."""
    out_features, in_features = shape
    tensors: dict[str, tuple[tuple[int, ...], torch.dtype | None]] = {
        "weight_mask": ((out_features, -(-in_features // 8)), torch.uint8)
    }
    if isinstance(pattern, Unstructured):
        tensors["weight"] = ((pattern.kept(out_features * in_features),), None)
        tensors["weight_rows"] = ((out_features + 1,), torch.int64)
    else:
        pattern.check_width(in_features)
        tensors["weight"] = ((out_features, in_features // pattern.group * pattern.kept), None)
    return tensors


def nbytes(shape: tuple[int, int], pattern: Pattern, itemsize: int) -> int:
    """What a matrix (out, in) takes on disk, its values having `itemsize` bytes."""
    tensors = layout(shape, pattern).values()
    return sum(math.prod(size) * (itemsize if dtype is None else dtype.itemsize) for size, dtype in tensors)


def encode(weight: Tensor, pattern: Pattern) -> dict[str, Tensor]:
    """A dense matrix [out, in] that follows `pattern`, compressed, on its own device.

    Raises:
        ValueError: the matrix has more non-zeros than the pattern allows.
    """
    problem = violation(weight, pattern)
    if problem is not None:
        raise ValueError(
            f"cannot be stored as {pattern}: {problem}. The weights changed after pruning: prune the model again, or "
            "call model.dequantize() to save it dense. Training keeps zeros whose gradients are masked: "
            "w.register_hook(lambda g, w=w: g * (w != 0)) for each pruned w."
        )
    keep = weight != 0
    kept = (
        pattern.kept(weight.numel())
        if isinstance(pattern, Unstructured)
        else weight.numel() // pattern.group * pattern.kept
    )
    if int(keep.count_nonzero()) < kept:  # else no zero is kept, and nothing has to be chosen
        keep = keep_mask(keep.to(torch.uint8), pattern)
    mask = pack_bits(keep)
    if weight.device.type == "cpu":
        values = weight.new_empty(kept)
        target, source = _as_numpy(values), _as_numpy(weight)
        for rows_here, places, here in _kept(mask, weight.shape[1]):
            np.take(source[rows_here].reshape(-1), places, out=target[here], mode="clip")  # "raise" would copy `out`
    else:
        values = weight[keep]
    if isinstance(pattern, NM):
        return {"weight": values.reshape(len(weight), -1), "weight_mask": mask}
    rows = torch.zeros(len(weight) + 1, dtype=torch.int64, device=weight.device)
    rows[1:] = keep.sum(1).cumsum(0)
    return {"weight": values, "weight_mask": mask, "weight_rows": rows}


def decode(tensors: dict[str, Tensor], shape: tuple[int, int], pattern: Pattern) -> Tensor:
    """The dense matrix [out, in], after `validate`."""
    validate(tensors, shape, pattern)
    return decode_valid(tensors, shape)


def decode_valid(tensors: dict[str, Tensor], shape: tuple[int, int]) -> Tensor:
    """The dense matrix [out, in] of tensors that are known to be valid."""
    values, mask = tensors["weight"], tensors["weight_mask"]
    if values.device.type == "cpu":
        dense = values.new_zeros(shape)
        target, source = _as_numpy(dense), _as_numpy(values).reshape(-1)
        for rows, places, here in _kept(mask, shape[1]):
            target[rows].reshape(-1)[places] = source[here]
        return dense
    keep = unpack_bits(mask, shape[1])
    return torch.zeros(shape, dtype=values.dtype, device=values.device).masked_scatter_(keep, values)


def validate(tensors: dict[str, Tensor], shape: tuple[int, int], pattern: Pattern) -> None:
    """Raise ValueError, saying what is wrong, unless `tensors` hold exactly one matrix of `shape` and `pattern`."""
    wanted = layout(shape, pattern)
    if set(tensors) != set(wanted):
        missing, extra = sorted(set(wanted) - set(tensors)), sorted(set(tensors) - set(wanted))
        raise ValueError(f"a {pattern} matrix is stored as {sorted(wanted)}: missing {missing}, unexpected {extra}.")
    for name, (size, dtype) in wanted.items():
        tensor = tensors[name]
        if tuple(tensor.shape) != size:
            raise ValueError(
                f"{name} has shape {list(tensor.shape)}, a {pattern} matrix {list(shape)} has {list(size)}."
            )
        if tensor.dtype != dtype if dtype is not None else not tensor.is_floating_point():
            raise ValueError(f"{name} has dtype {tensor.dtype}, must be {dtype or 'a floating-point type'}.")
    mask, in_features = tensors["weight_mask"], shape[1]
    if in_features % 8 and (mask[:, -1] >> in_features % 8).any():
        raise ValueError(f"weight_mask has bits set beyond column {in_features}: the file is damaged.")
    if isinstance(pattern, NM) and 8 % pattern.group == 0 and in_features % 8 == 0:  # each byte that occurs, once
        occurring = torch.bincount(mask.flatten(), minlength=256).nonzero().to(torch.uint8)
        keep = unpack_bits(occurring, 8)
    else:
        keep = unpack_bits(mask, in_features)
    if isinstance(pattern, NM):
        counts = keep.reshape(-1, pattern.group).sum(1, dtype=torch.int16)
        if (counts != pattern.kept).any():
            raise ValueError(
                f"weight_mask keeps between {int(counts.min())} and {int(counts.max())} of {pattern.group} columns, "
                f"must keep {pattern.kept}: the file is damaged or its pattern is not {pattern}."
            )
        return
    rows = torch.zeros_like(tensors["weight_rows"])
    rows[1:] = keep.sum(1).cumsum(0)
    if not torch.equal(rows, tensors["weight_rows"]) or int(rows[-1]) != len(tensors["weight"]):
        raise ValueError(
            f"weight_mask keeps {int(rows[-1])} values, weight holds {len(tensors['weight'])}, and weight_rows must "
            "count them row by row: the file is damaged."
        )


def _as_numpy(x: Tensor) -> np.ndarray:
    """The same memory, bits as integers."""
    return x.detach().view(_INTEGERS[x.element_size()]).numpy()


def _kept(mask: Tensor, columns: int) -> Iterator[tuple[slice, np.ndarray, slice]]:
    """For some rows at a time: these rows, where in them the kept weights are, and where in `weight` their values."""
    height, first = max(1, CHUNK // max(columns, 1)), 0
    for begin in range(0, len(mask), height):
        rows = slice(begin, begin + height)
        places = np.flatnonzero(unpack_bits(mask[rows], columns).numpy())
        yield rows, places, slice(first, first + len(places))
        first += len(places)


def pack_bits(keep: Tensor) -> Tensor:
    """bool [out, in] -> uint8 [out, ceil(in / 8)], little-endian bits."""
    if keep.device.type == "cpu":
        return torch.from_numpy(np.packbits(keep.numpy(), axis=1, bitorder="little"))
    padded = torch.nn.functional.pad(keep.to(torch.uint8), (0, -keep.shape[1] % 8))
    powers = 2 ** torch.arange(8, dtype=torch.uint8, device=keep.device)
    return (padded.reshape(len(keep), -1, 8) * powers).sum(-1, dtype=torch.uint8)


def unpack_bits(packed: Tensor, columns: int) -> Tensor:
    """uint8 [out, ceil(columns / 8)] -> bool [out, columns]."""
    if packed.device.type == "cpu":
        unpacked = np.unpackbits(packed.numpy(), axis=1, count=columns, bitorder="little")
        return torch.from_numpy(unpacked).view(torch.bool)
    shifts = torch.arange(8, dtype=torch.uint8, device=packed.device)
    bits = (packed[..., None] >> shifts) & 1
    return bits.flatten(1)[:, :columns].bool()
