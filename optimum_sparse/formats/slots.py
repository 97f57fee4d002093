"""The layout of the CUDA kernels, in memory only: room for a fixed number of values in each 32 columns.

A kernel that knows where each word's values lie need not add up what comes before. N:M patterns whose groups fill
words evenly lie so on disk: `even_slots`. Others, unstructured above all, are moved by `pack`: every word of the mask
gets a number of values, its last ones, after zeros if it has fewer; what it has more goes to a list. At 50 %, with 16
slots, that is 1.27 bytes per weight instead of 1.13, and still faster by half than a kernel that adds up.

    name      dtype        shape
    values    the model's  [out, in / 32, slots]: three dimensions, which values on disk never have
    overflow  int32        [entries]: column << 16 | the value's 16 bits, row by row in column order
    starts    int32        [out * ceil(in / 1024) + 1]: where the entries of each 1,024 columns of a row begin
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ..core import NM, Pattern
from .bitmask import unpack_bits


SLOTS = (4, 8, 12, 16, 20, 24, 28, 32)
STEP = 1024  # columns that share a start
MOST_COLUMNS = 2**16
CHUNK = 2**24  # weights that are moved at a time: what the indices of this take is some hundred MB


class Slots(NamedTuple):
    values: Tensor
    overflow: Tensor
    starts: Tensor


def even_slots(pattern: Pattern, in_features: int) -> int:
    """How many values every 32 columns have, where that is the same for all and one that kernels can take; else 0."""
    if isinstance(pattern, NM) and 32 % pattern.group == 0 and in_features % 32 == 0:
        slots = 32 // pattern.group * pattern.kept
        return slots if slots in SLOTS else 0
    return 0


def pack(values: Tensor, mask: Tensor, in_features: int) -> Slots:
    """Move values in column order, which `bitmask` has with their mask [out, in / 8], to slots.

    Raises:
        ValueError: 32 does not divide the inputs, there are more than 65,536, or values do not have 16 bits.
    """
    if in_features % 32 or in_features > MOST_COLUMNS or values.element_size() != 2:
        raise ValueError(
            f"{in_features} inputs of {values.dtype}: must be at most {MOST_COLUMNS}, a multiple of 32, of 16 bits."
        )
    slots = _best_slots(mask, in_features)
    packed = values.new_zeros(len(mask), in_features // 32, slots)
    overflow, starts = [], [torch.zeros(1, dtype=torch.int32, device=values.device)]
    for rows, here, where in _moves(values.reshape(-1), mask, in_features, slots):
        packed[rows].view(-1)[where.place[where.fits]] = here[where.fits]
        bits = here[~where.fits].view(torch.int16).int() & 0xFFFF
        overflow.append(where.column[~where.fits].int() << 16 | bits)
        starts.append(where.overflow_counts)
    return Slots(packed, torch.cat(overflow), torch.cat(starts).cumsum(0, dtype=torch.int32))


def unpack(packed: Slots, mask: Tensor, in_features: int, count: int) -> Tensor:
    """The `count` values in column order again."""
    slots = packed.values.shape[2]
    values = packed.values.new_empty(count)
    first = 0
    for rows, here, where in _moves(values, mask, in_features, slots):
        here[where.fits] = packed.values[rows].view(-1)[where.place[where.fits]]
        extra = packed.overflow[first : first + len(here) - int(where.fits.sum())]
        here[~where.fits] = extra.to(torch.int16).view(values.dtype)  # the low half
        first += len(extra)
    return values


class _Where(NamedTuple):
    """For the values of some rows: their columns, the index of the slots they have, if they have one."""

    column: Tensor
    place: Tensor
    fits: Tensor
    overflow_counts: Tensor  # per step


def _moves(values: Tensor, mask: Tensor, in_features: int, slots: int) -> Iterator[tuple[slice, Tensor, _Where]]:
    """Some rows at a time, their values, and where these belong."""
    first, height = 0, max(1, CHUNK // in_features)
    for begin in range(0, len(mask), height):
        rows = slice(begin, begin + height)
        keep = unpack_bits(mask[rows], in_features)
        counts = keep.view(-1, 32).sum(1)
        index = keep.view(-1).nonzero()[:, 0]
        word = index // 32
        ends = counts.cumsum(0)
        from_last = ends[word] - 1 - torch.arange(len(index), device=mask.device)
        over = (counts - slots).clamp(min=0).view(len(keep), -1)
        steps = F.pad(over, (0, -over.shape[1] % (STEP // 32))).view(-1, STEP // 32).sum(1).int()
        yield (
            rows,
            values[first : first + len(index)],
            _Where(index % in_features, (word + 1) * slots - 1 - from_last, from_last < slots, steps),
        )
        first += len(index)


def _best_slots(mask: Tensor, in_features: int) -> int:
    """The number of slots that takes the fewest bytes."""
    histogram = torch.zeros(33, dtype=torch.int64, device=mask.device)
    for rows in mask.split(max(1, CHUNK // in_features)):
        histogram += unpack_bits(rows, in_features).view(-1, 32).sum(1).bincount(minlength=33)
    counts = torch.arange(33, device=mask.device)
    sizes = [2 * slots * histogram.sum() + 4 * (histogram * (counts - slots).clamp(min=0)).sum() for slots in SLOTS]
    return SLOTS[int(torch.stack(sizes).argmin())]
