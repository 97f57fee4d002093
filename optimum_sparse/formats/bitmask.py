"""The disk format `bitmask`: kept values in column order, and one bit per weight that says where they belong.

    dense row     [ .5   0   0  -2 | 0   1  .3   0 ]          2:4, bf16: 16 bytes
    weight        [ .5  -2   1  .3 ]                          8 bytes
    weight_mask   [ 0b01101001 ]                              1 byte; bit c % 8 of byte c // 8 is column c, 1 = kept

    name         dtype          shape
    weight       the model's    N:M: [out, in * N / M]; unstructured: [kept], row by row
    weight_mask  uint8          [out, ceil(in / 8)], unused bits of the last byte are 0
    weight_rows  int64          [out + 1], unstructured only: where each row begins in `weight`

At 50 % in a 16-bit dtype every pattern takes 0.5625 of the dense bytes (unstructured: and 8 a row). Zeros that a
pattern would allow to be non-zero are stored as kept values (lowest columns first), so a matrix has exactly one
encoding and shapes follow from the pattern. The values keep the name `weight`, with another shape, on purpose: a
reader that does not know the format fails on the shape; under any other name it would go on with random numbers. Each
matrix of a fused expert is one of its own here (`nn.experts` says under which names).
"""

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from ..core import NM, Pattern, Unstructured, keep_top, violation


SUFFIXES = ("weight_rows", "weight_mask", "weight")
CHUNK = 2**20  # weights whose values are moved at a time on a CPU: their indices stay in its cache
_SET_BITS = np.array([byte.bit_count() for byte in range(256)], dtype=np.uint8)
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
    rows, columns = weight.shape
    weight = weight.detach()
    if isinstance(pattern, NM):
        pattern.check_width(columns)
        mask, values = nonzeros(weight, columns // pattern.group * pattern.kept)
        least, most = _kept_in_groups(mask, columns, pattern.group)
        fits, full = most <= pattern.kept, least == pattern.kept
    else:
        mask, values = nonzeros(weight, 0)
        room, count = pattern.kept(weight.numel()), int(_set_bits(mask).sum())
        fits, full = count <= room, count == room
    if not fits:
        raise ValueError(
            f"cannot be stored as {pattern}: {violation(weight, pattern)}. The weights changed after pruning: prune "
            "the model again, or call model.dequantize() to save it dense. Training keeps zeros whose gradients are "
            "masked: w.register_hook(lambda g, w=w: g * (w != 0)) for each pruned w."
        )
    if not full:
        mask = pack_bits(_filled(unpack_bits(mask, columns), pattern))
    if not full or not len(values):
        starts = row_starts(mask)
        values = take_kept(weight, mask, starts)
    if isinstance(pattern, NM):
        return {"weight": values.reshape(rows, -1), "weight_mask": mask}
    return {"weight": values, "weight_mask": mask, "weight_rows": starts}


def decode(tensors: dict[str, Tensor], shape: tuple[int, int], pattern: Pattern) -> Tensor:
    """The dense matrix [out, in], after `validate`."""
    validate(tensors, shape, pattern)
    return put_kept(tensors["weight"], tensors["weight_mask"], shape[1])


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
    if isinstance(pattern, NM):
        least, most = _kept_in_groups(mask, in_features, pattern.group)
        if not least == most == pattern.kept:
            raise ValueError(
                f"weight_mask keeps between {least} and {most} of {pattern.group} columns, must keep {pattern.kept}: "
                f"the file is damaged or its pattern is not {pattern}."
            )
        return
    rows = row_starts(mask)
    if not torch.equal(rows, tensors["weight_rows"]) or int(rows[-1]) != len(tensors["weight"]):
        raise ValueError(
            f"weight_mask keeps {int(rows[-1])} values, weight holds {len(tensors['weight'])}, and weight_rows must "
            "count them row by row: the file is damaged."
        )


def _filled(keep: Tensor, pattern: Pattern) -> Tensor:
    """`keep`, and as many more as the pattern has room for, lowest columns first."""
    if isinstance(pattern, NM):
        groups = keep.view(-1, pattern.group)
        short = (groups.sum(1, dtype=torch.int16) < pattern.kept).nonzero()[:, 0]
        groups[short] = keep_top(groups[short].to(torch.uint8), pattern.kept)
        return keep
    room = pattern.kept(keep.numel()) - int(keep.count_nonzero())
    for part in keep.view(-1).split(CHUNK):
        free = (~part).nonzero()[:room, 0]
        part[free] = True
        room -= len(free)
        if room == 0:
            break
    return keep


def _kept_in_groups(mask: Tensor, columns: int, group: int) -> tuple[int, int]:
    """The least and the most that a group of columns keeps."""
    if 8 % group == 0 and columns % 8 == 0:  # each byte that occurs, once
        occurring = torch.bincount(mask.flatten(), minlength=256).nonzero().to(torch.uint8)
        counts = unpack_bits(occurring, 8).reshape(-1, group).sum(1)
    elif group % 8 == 0:
        counts = _set_bits(mask.reshape(-1, group // 8))
    else:
        counts = unpack_bits(mask, columns).reshape(-1, group).sum(1, dtype=torch.int16)
    return int(counts.min()), int(counts.max())


def row_starts(mask: Tensor) -> Tensor:
    """int64 [out + 1]: how many values come before each row."""
    starts = torch.zeros(len(mask) + 1, dtype=torch.int64, device=mask.device)
    starts[1:] = _set_bits(mask).cumsum(0, dtype=torch.int64)
    return starts


def _set_bits(mask: Tensor) -> Tensor:
    """How many bits of each row are 1."""
    if mask.device.type != "cpu":
        return unpack_bits(mask.reshape(-1, 1), 8).view(*mask.shape, 8).sum((1, 2))
    words = mask.contiguous().numpy().view(f"u{math.gcd(mask.shape[1], 8)}")  # of 1, 2, 4 or 8 bytes
    counts = np.bitwise_count(words) if hasattr(np, "bitwise_count") else _SET_BITS[words.view(np.uint8)]  # numpy 1
    return torch.from_numpy(counts[:, 0] if counts.shape[1] == 1 else counts.sum(1, dtype=np.int64))


def _as_numpy(x: Tensor) -> np.ndarray:
    """The same memory, bits as integers."""
    return x.detach().view(_INTEGERS[x.element_size()]).numpy()


def nonzeros_reference(weight: Tensor, kept: int) -> tuple[Tensor, Tensor]:
    """`pack_bits(weight != 0)`, and no values: what `nonzeros` does where `kernels` has nothing faster.

    A kernel takes the values as well, [out * kept], if each row has `kept` of them, for it then knows where they go.
    """
    none = weight.new_empty(0)
    if weight.device.type != "cpu":
        return pack_bits(weight != 0), none
    rows, columns = weight.shape
    mask = torch.empty(rows, -(-columns // 8), dtype=torch.uint8)
    target, source = mask.numpy(), _as_numpy(weight)

    def pack(some: slice) -> None:
        without_sign = source[some] << 1  # of 0 and -0 nothing is left
        target[some] = np.packbits(without_sign.astype(bool), axis=1, bitorder="little")

    _in_parts(pack, rows, columns)
    return mask, none


def take_kept_reference(weight: Tensor, mask: Tensor, starts: Tensor) -> Tensor:
    """The values [kept] of a dense weight that a mask keeps, of which `starts` [out + 1] are the `row_starts`."""
    if weight.device.type != "cpu":
        return weight[unpack_bits(mask, weight.shape[1])]
    values = weight.new_empty(int(starts[-1]))
    target, source = _as_numpy(values), _as_numpy(weight)

    def move(some: slice, places: np.ndarray, here: slice) -> None:
        np.take(source[some].reshape(-1), places, out=target[here], mode="clip")  # "raise" would copy `out`

    _for_kept(mask, starts, weight.shape[1], move)
    return values


def put_kept_reference(values: Tensor, mask: Tensor, in_features: int) -> Tensor:
    """And back: the dense weight [out, in]."""
    if values.device.type != "cpu":
        keep = unpack_bits(mask, in_features)
        return torch.zeros(keep.shape, dtype=values.dtype, device=values.device).masked_scatter_(keep, values)
    dense = values.new_zeros(len(mask), in_features)
    target, source = _as_numpy(dense), _as_numpy(values).reshape(-1)

    def move(some: slice, places: np.ndarray, here: slice) -> None:
        target[some].reshape(-1)[places] = source[here]

    _for_kept(mask, row_starts(mask), in_features, move)
    return dense


nonzeros = torch.library.custom_op("optimum_sparse::nonzeros", nonzeros_reference, mutates_args=())
take_kept = torch.library.custom_op("optimum_sparse::take_kept", take_kept_reference, mutates_args=())
put_kept = torch.library.custom_op("optimum_sparse::put_kept", put_kept_reference, mutates_args=())


def _for_kept(mask: Tensor, starts: Tensor, columns: int, move: Callable[[slice, np.ndarray, slice], None]) -> None:
    """`move(rows, places, here)` for some rows at a time: where in these rows, flattened, the kept weights are, and
    where in `weight` their values."""
    bits, first = mask.numpy(), starts.tolist()

    def part(some: slice) -> None:
        kept = np.unpackbits(bits[some], axis=1, count=columns, bitorder="little").view(bool)
        move(some, np.flatnonzero(kept), slice(first[some.start], first[some.stop]))

    _in_parts(part, len(mask), columns)


def _in_parts(work: Callable[[slice], None], rows: int, columns: int) -> None:
    """`work` on all rows, about CHUNK weights at a time, on as many threads as PyTorch uses: numpy lets them run."""
    height = max(1, CHUNK // max(columns, 1))
    parts = [slice(begin, min(begin + height, rows)) for begin in range(0, rows, height)]
    if len(parts) == 1 or torch.get_num_threads() == 1:
        for part in parts:
            work(part)
        return
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        list(pool.map(work, parts))  # raises what they raise


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
