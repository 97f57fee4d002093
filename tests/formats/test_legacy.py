"""Formats of compressed-tensors: what plain loops write is read to the bit; anything else is refused."""

import pytest
import torch
from helpers import legacy_tensors, random_weight
from hypothesis import given, settings
from hypothesis import strategies as st

from optimum_sparse.core import NM, keep_mask
from optimum_sparse.formats import legacy


DTYPES = [torch.float32, torch.bfloat16, torch.float16]
MATRICES = {
    "rows": st.integers(1, 5),
    "zeros": st.sampled_from([0.0, 0.5, 1.0]),
    "dtype": st.sampled_from(DTYPES),
    "column": st.booleans(),
}


@settings(max_examples=60, deadline=None)
@given(columns=st.integers(1, 40), **MATRICES)
def test_sparse_bitmask(rows, columns, zeros, dtype, column):
    weight = random_weight(rows, columns).to(dtype)
    weight[torch.rand(weight.shape, generator=torch.Generator().manual_seed(columns)) < zeros] = 0
    for matrix in (weight, weight[0]):  # norms were stored like this too
        decoded = legacy.decode(legacy_tensors(matrix, "sparse-bitmask", column), "sparse-bitmask")
        assert decoded.dtype == dtype
        assert torch.equal(decoded, matrix)


@settings(max_examples=60, deadline=None)
@given(groups=st.integers(1, 9), **MATRICES)
def test_sparse_24_bitmask(rows, groups, zeros, dtype, column):
    """Zeros beyond the pattern are among the values."""
    weight = random_weight(rows, 4 * groups)
    weight = (weight * keep_mask(weight.abs(), NM(2, 4))).to(dtype)
    weight[torch.rand(weight.shape, generator=torch.Generator().manual_seed(groups)) < zeros] = 0
    decoded = legacy.decode(legacy_tensors(weight, "sparse-24-bitmask", column), "sparse-24-bitmask")
    assert decoded.dtype == dtype
    assert torch.equal(decoded, weight)


def test_a_matrix_written_out():
    """[0, 3, 0, 4 | 5, 0, 0, 6] and [7, 0, 8, 0 | 0, 0, 9, 1], bit by bit: as compressed-tensors 0.14.0.1 writes it
    (and 0.7.1, where it has the format)."""
    tensors = {
        "compressed": torch.tensor([[3.0, 4, 5, 6], [7, 8, 9, 1]]),
        "bitmask": torch.tensor([[0b10011010], [0b11000101]], dtype=torch.uint8),
        "shape": torch.tensor([[2], [8]]),
    }
    expected = torch.tensor([[0.0, 3, 0, 4, 5, 0, 0, 6], [7, 0, 8, 0, 0, 0, 9, 1]])
    assert torch.equal(legacy.decode(tensors, "sparse-24-bitmask"), expected)
    flat = {
        "compressed": tensors["compressed"].flatten(),
        "bitmask": tensors["bitmask"],
        "shape": torch.tensor([2, 8]),
        "row_offsets": torch.tensor([0, 4]),
    }
    assert torch.equal(legacy.decode(flat, "sparse-bitmask"), expected)


def bits(row, column, tensors):
    changed = tensors["bitmask"].clone()
    changed[row, column // 8] ^= 1 << column % 8
    return {"bitmask": changed}


@pytest.mark.parametrize(
    ("format", "change", "message"),
    [
        ("sparse-24-bitmask", lambda t: {"shape": None}, r"missing \['shape'\]"),
        ("sparse-bitmask", lambda t: {"row_offsets": None}, r"missing \['row_offsets'\]"),
        ("sparse-24-bitmask", lambda t: {"more": t["shape"]}, r"unexpected \['more'\]"),
        ("sparse-24-bitmask", lambda t: {"compressed": t["compressed"].to(torch.int8)}, "torch.int8: .*quantized"),
        (
            "sparse-24-bitmask",
            lambda t: {"compressed": t["compressed"].to(torch.float8_e4m3fn)},
            "float8_e4m3fn: .*quantized",
        ),
        ("sparse-24-bitmask", lambda t: {"shape": torch.tensor([4, -12])}, r"\[4, -12\], must be two positive"),
        ("sparse-24-bitmask", lambda t: {"shape": torch.tensor([4.0, 12])}, "positive integers"),
        ("sparse-24-bitmask", lambda t: {"shape": torch.tensor([1, 4, 12])}, "positive integers"),
        ("sparse-24-bitmask", lambda t: {"shape": torch.tensor([2**40, 2**40])}, "bitmask is"),
        ("sparse-bitmask", lambda t: {"bitmask": t["bitmask"].int()}, "torch.int32, a matrix"),
        ("sparse-bitmask", lambda t: {"compressed": t["compressed"][1:]}, "compressed holds 23"),
        ("sparse-bitmask", lambda t: {"row_offsets": t["row_offsets"] + 1}, "row_offsets do not count"),
        ("sparse-bitmask", lambda t: {"row_offsets": t["row_offsets"][1:]}, "row_offsets do not count"),
        ("sparse-24-bitmask", lambda t: bits(3, 12, t), "beyond column 12"),
    ],
)
def test_malformed(format, change, message):
    weight = random_weight(4, 12)
    tensors = legacy_tensors(weight * keep_mask(weight.abs(), NM(2, 4)), format)
    changed = tensors | change(tensors)
    with pytest.raises(ValueError, match=message):
        legacy.decode({name: tensor for name, tensor in changed.items() if tensor is not None}, format)


def test_three_of_four_with_the_right_total():
    mask = torch.tensor([[0b00010111]], dtype=torch.uint8)
    tensors = {"compressed": torch.ones(1, 4), "bitmask": mask, "shape": torch.tensor([1, 8])}
    with pytest.raises(ValueError, match="two of every four"):
        legacy.decode(tensors, "sparse-24-bitmask")
