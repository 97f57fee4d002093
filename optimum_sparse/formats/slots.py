"""The layout of the CUDA kernels, in memory only: room for a fixed number of values in each 32 columns.

A kernel that knows where each word's values lie need not add up what comes before. N:M patterns whose groups fill
words evenly lie so on disk: `even_slots`. Others, unstructured above all, are moved by `pack`: the first half of a
word's slots are the first values of its first 24 columns, the second half the last values of its last 24 (kernels find
them by the exponent of a float, which holds 24 bits); what is in neither goes to a list. With 16 slots or more that is
what is between the first and the last values of all. A value may be in both halves. Slots that are left over have what
is in the word's last column (in the first half) or in its first: a kernel that writes a word out walks it from both
ends, writes there when it finds no value any more, and need not ask. One that only adds up multiplies what is left
over by zero: an infinite weight may make NaN of its row. At 50 %, with 16 slots, that is 1.30 bytes per weight instead
of 1.13.

    name      dtype        shape
    values    the model's  [out, in / 32, slots]: three dimensions, which values on disk never have
    overflow  int32        [entries + 4]: column << 16 | the value's 16 bits, row by row in column order, and zeros
    starts    int32        [out / 8, in / 128 + 1, 8], rounded up: where the entries of each 128 columns of a row
                           begin, and where those of the row end
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ..core import NM, Pattern
from .bitmask import unpack_bits


SLOTS = (4, 8, 12, 16, 20, 24, 28, 32)  # that kernels take
# What `pack` chooses, as measured on an H200 with 30 to 90 % zeros. 12, 20 and 28 slots take more and smaller loads,
# and the next of these is faster at one token. An entry of the list has 4 bytes, and takes as long as ENTRY bytes of
# slots.
PACKED, ENTRY = (4, 8, 16, 24, 32), 7
NEAR = 24  # columns of a word that each half of its slots can have values of
ROWS, SPAN = 8, 128  # of which kernels read the starts at a time
MOST_COLUMNS = 2**16  # what 16 bits can number
MOST_ENTRIES = 2**31 - 2**13  # and 31 bits, a row's steps beyond the end included
CHUNK = 2**23  # weights that are moved at a time: what the indices of this take is some hundred MB


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


def starts_shape(out_features: int, in_features: int) -> tuple[int, int, int]:
    return -(-out_features // ROWS), -(-in_features // SPAN) + 1, ROWS


def pack(values: Tensor, mask: Tensor, in_features: int) -> Slots:
    """Move values in column order, which `bitmask` has with their mask [out, in / 8], to slots.

    Raises:
        ValueError: 32 does not divide the inputs, there are more than 65,536, values do not have 16 bits, or almost
            2^31 of them have no slot.
    """
    if in_features % 32 or in_features > MOST_COLUMNS or values.element_size() != 2:
        raise ValueError(
            f"{in_features} inputs of {values.dtype}: must be at most {MOST_COLUMNS}, a multiple of 32, of 16 bits."
        )
    slots = _best_slots(mask, in_features)
    packed = values.new_zeros(len(mask), in_features // 32, slots)
    overflow, counts = [], []
    for rows, here, where in _moves(values.reshape(-1), mask, in_features, slots):
        words = packed[rows].view(-1, slots)
        for column, part in zip((31, 0), words.split(slots // 2, 1), strict=True):
            there = where.column % 32 == column
            part[where.word[there]] = here[there, None]
        for slot in (where.first, where.last):
            fits = slot >= 0
            words[where.word[fits], slot[fits]] = here[fits]
        bits = here[where.overflow].view(torch.int16).int() & 0xFFFF
        overflow.append(where.column[where.overflow].int() << 16 | bits)
        counts.append(where.counts)
    overflow.append(packed.new_zeros(4, dtype=torch.int32))
    if sum(map(len, overflow)) > MOST_ENTRIES:
        raise ValueError(f"{sum(map(len, overflow)):,} values have no slot: must be at most {MOST_ENTRIES:,}.")
    groups, spans, _ = starts_shape(len(mask), in_features)
    each = F.pad(torch.cat(counts), (0, 1, 0, -len(mask) % ROWS))  # [row, span], and none after the last
    ends = each.view(-1).cumsum(0, dtype=torch.int32).view_as(each)
    starts = (ends - each).view(groups, ROWS, spans).transpose(1, 2).contiguous()
    return Slots(packed, torch.cat(overflow), starts)


def unpack(packed: Slots, mask: Tensor, in_features: int, count: int) -> Tensor:
    """The `count` values in column order again."""
    slots = packed.values.shape[2]
    values = packed.values.new_empty(count)
    first = 0
    for rows, here, where in _moves(values, mask, in_features, slots):
        slot = torch.maximum(where.first, where.last).clamp(min=0)
        here.copy_(packed.values[rows].view(-1, slots)[where.word, slot])
        extra = packed.overflow[first : first + int(where.overflow.sum())]
        here[where.overflow] = extra.to(torch.int16).view(values.dtype)  # the low half
        first += len(extra)
    return values


class _Where(NamedTuple):
    """For the values of some rows: their columns, their words, their slots in either half (-1: none), and whether they
    have neither; and how many such there are in each span of a row."""

    column: Tensor
    word: Tensor
    first: Tensor
    last: Tensor
    overflow: Tensor
    counts: Tensor


def _moves(values: Tensor, mask: Tensor, in_features: int, slots: int) -> Iterator[tuple[slice, Tensor, _Where]]:
    """Some rows at a time, their values, and where these belong."""
    first, height = 0, max(1, CHUNK // in_features)
    for begin in range(0, len(mask), height):
        rows = slice(begin, begin + height)
        keep = unpack_bits(mask[rows], in_features)
        counts = keep.view(-1, 32).sum(1)
        index = keep.view(-1).nonzero()[:, 0]
        word, rank, ends = index // 32, torch.arange(len(index), device=mask.device), counts.cumsum(0)
        before, after = rank - (ends - counts)[word], ends[word] - 1 - rank  # how many values of the word
        inside, half = index % 32, slots // 2
        in_first, in_last = (before < half) & (inside < NEAR), (after < half) & (inside >= 32 - NEAR)
        overflow, spans = ~(in_first | in_last), -(-in_features // SPAN)
        span = index // in_features * spans + index % in_features // SPAN
        extra = span[overflow].bincount(minlength=len(keep) * spans).view(-1, spans).int()
        slot = torch.where(in_first, before, -1), torch.where(in_last, slots - 1 - after, -1)
        here = values[first : first + len(index)]
        yield rows, here, _Where(index % in_features, word, *slot, overflow, extra)
        first += len(index)


def _best_slots(mask: Tensor, in_features: int) -> int:
    """The number of slots that takes the least time to read."""
    costs = torch.tensor([2 * slots * mask.shape[0] * (in_features // 32) for slots in PACKED], device=mask.device)
    for rows in mask.split(max(1, CHUNK // in_features)):
        keep = unpack_bits(rows, in_features).view(-1, 32)
        most, first, last = keep.sum(1), keep[:, :NEAR].sum(1), keep[:, -NEAR:].sum(1)
        for i, slots in enumerate(PACKED):
            fits = first.clamp(max=slots // 2) + last.clamp(max=slots // 2)
            costs[i] += ENTRY * (most - fits).clamp(min=0).sum()
    return PACKED[int(costs.argmin())]
