"""Values move to slots and back, all of them, and lie where the format says."""

import pytest
import torch
from helpers import random_weight

from optimum_sparse.core import NM, Pattern, Unstructured, keep_mask
from optimum_sparse.formats import bitmask, slots


PATTERNS = [NM(3, 6), NM(1, 16), NM(31, 32), *map(Unstructured, (0, 0.3, 0.5, 0.6, 0.97))]


def stored(pattern: Pattern, shape: tuple[int, int] = (21, 2112), dtype: torch.dtype = torch.bfloat16) -> dict:
    weight = random_weight(*shape)
    return bitmask.encode((weight * keep_mask(weight.abs(), pattern)).to(dtype), pattern)


@pytest.mark.parametrize("chunk", [1, 5000, 2**24])
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_round_trip(pattern: Pattern, chunk: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(slots, "CHUNK", chunk)
    for dtype in (torch.bfloat16, torch.float16):
        found = stored(pattern, (21, 2112) if pattern != NM(1, 16) else (21, 2048), dtype)
        values, mask = found["weight"], found["weight_mask"]
        width = mask.shape[1] * 8
        packed = slots.pack(values, mask, width)
        assert torch.equal(slots.unpack(packed, mask, width, values.numel()), values.flatten())
        assert packed.starts[-1, -1, -1] == len(packed.overflow) - 4


@pytest.mark.parametrize("sparsity", [0.2, 0.5, 0.8])
def test_brute_force(sparsity: float):
    """Column by column, as the format's text says it."""
    found = stored(Unstructured(sparsity), (13, 2112))
    dense = bitmask.decode(found, (13, 2112), Unstructured(sparsity))
    packed = slots.pack(found["weight"], found["weight_mask"], 2112)
    half = packed.values.shape[2] // 2
    keep = bitmask.unpack_bits(found["weight_mask"], 2112)
    columns, values = [], []
    for row in range(16):
        for span in range(18):
            assert packed.starts[row // 8, span, row % 8] == len(columns)
            for word in range(4 * span, min(4 * span + 4, 66)) if row < 13 else ():
                here = [c for c in range(32 * word, 32 * word + 32) if keep[row, c]]
                first = [c for c in here if c % 32 < 24][:half]
                last = [c for c in reversed(here) if c % 32 >= 8][:half]
                for i in range(half):
                    assert packed.values[row, word, i] == dense[row, (first + [32 * word + 31] * half)[i]]
                    assert packed.values[row, word, -1 - i] == dense[row, (last + [32 * word] * half)[i]]
                others = sorted({*here} - {*first, *last})
                assert others == here[half:-half] or half < 8
                columns += others
                values += [dense[row, c] for c in others]
    assert [int(entry) >> 16 & 0xFFFF for entry in packed.overflow] == [*columns, 0, 0, 0, 0]
    assert torch.equal(packed.overflow[:-4].to(torch.int16).view(torch.bfloat16), torch.stack(values))


@pytest.mark.parametrize("sparsity", [0.3, 0.5, 0.6, 0.8, 0.97])
def test_no_other_number_of_slots_takes_less_to_read(sparsity: float, monkeypatch: pytest.MonkeyPatch):
    found = stored(Unstructured(sparsity), (64, 1024))

    def cost() -> int:
        packed = slots.pack(found["weight"], found["weight_mask"], 1024)
        return packed.values.numel() * 2 + packed.overflow.numel() * slots.ENTRY

    best = cost()
    for count in slots.PACKED:
        with monkeypatch.context() as patch:
            patch.setattr(slots, "PACKED", (count,))
            assert cost() >= best


def test_even_patterns_lie_as_on_disk():
    for pattern, count in ((NM(2, 4), 16), (NM(16, 32), 16), (NM(1, 4), 8), (NM(3, 4), 24), (NM(1, 8), 4)):
        assert slots.even_slots(pattern, 64) == count
        assert slots.even_slots(pattern, 72) == 0
    for pattern in (NM(3, 6), NM(1, 16), NM(32, 64), Unstructured(0.5)):
        assert slots.even_slots(pattern, 192) == 0


def test_what_cannot_be_packed_is_named(monkeypatch: pytest.MonkeyPatch):
    found = stored(Unstructured(0.5), (3, 40))
    with pytest.raises(ValueError, match=r"40 inputs of torch.bfloat16: must be at most 65536, a multiple of 32"):
        slots.pack(found["weight"], found["weight_mask"], 40)
    monkeypatch.setattr(slots, "MOST_ENTRIES", 100)
    found = stored(Unstructured(0.5), (64, 128))
    with pytest.raises(ValueError, match=r"values have no slot: must be at most 100\."):
        slots.pack(found["weight"], found["weight_mask"], 128)
    with pytest.raises(ValueError, match=r"64 inputs of torch.float32"):
        slots.pack(torch.zeros(3), torch.zeros(3, 8, dtype=torch.uint8), 64)
