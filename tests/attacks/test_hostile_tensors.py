"""Damaged or hostile tensors: every one is refused by a ValueError that says what is wrong, before values are read."""

import re

import pytest
import torch
from helpers import random_weight
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from optimum_sparse.core import NM, Pattern, Unstructured, keep_mask
from optimum_sparse.formats import bitmask
from optimum_sparse.nn import SparseLinear


SHAPE = (6, 20)  # 20 columns: four unused bits in the last byte of each row
HALF, NM24 = Unstructured(0.5), NM(2, 4)


def valid(pattern: Pattern) -> dict[str, Tensor]:
    weight = random_weight(*SHAPE)
    return bitmask.encode(weight * keep_mask(weight.abs(), pattern), pattern)


def refused(tensors: dict[str, Tensor], pattern: Pattern, text: str) -> None:
    for check in (bitmask.validate, bitmask.decode):
        with pytest.raises(ValueError, match=text):
            check(tensors, SHAPE, pattern)


CASES = [(pattern, name) for pattern in (NM24, HALF) for name in sorted(bitmask.layout(SHAPE, pattern))]
each_tensor = pytest.mark.parametrize(("pattern", "name"), CASES, ids=[f"{p}-{n}" for p, n in CASES])


@pytest.mark.parametrize("pattern", [NM24, HALF], ids=str)
def test_the_undamaged_ones_are_accepted(pattern: Pattern):
    bitmask.validate(valid(pattern), SHAPE, pattern)


# ---- names, shapes, dtypes


@each_tensor
def test_missing(pattern: Pattern, name: str):
    tensors = valid(pattern)
    del tensors[name]
    refused(tensors, pattern, rf"missing \['{name}'\]")


@pytest.mark.parametrize("pattern", [NM24, HALF], ids=str)
def test_unexpected_name(pattern: Pattern):
    refused(valid(pattern) | {"weight_code": torch.zeros(1)}, pattern, r"unexpected \['weight_code'\]")


def test_no_tensor_at_all():
    refused({}, NM24, r"missing \['weight', 'weight_mask'\]")


@each_tensor
@pytest.mark.parametrize(
    "reshape",
    [
        lambda t: t[:-1],
        lambda t: torch.cat([t, t[-1:]]),
        lambda t: t.flatten() if t.dim() > 1 else t[None],
        lambda t: t[..., None],
        lambda t: t.T if t.dim() > 1 else t[:0],
        lambda t: t[:0],
        lambda t: t.sum(),
    ],
    ids=["truncated", "longer", "flat", "one-more-dimension", "transposed", "empty", "scalar"],
)
def test_wrong_shape(pattern: Pattern, name: str, reshape):
    tensors = valid(pattern)
    right = list(tensors[name].shape)
    tensors[name] = reshape(tensors[name]).to(tensors[name].dtype)
    assert list(tensors[name].shape) != right
    refused(tensors, pattern, re.escape(f"{name} has shape {list(tensors[name].shape)}, a {pattern} matrix"))


@each_tensor
@pytest.mark.parametrize("dtype", [torch.int8, torch.int32, torch.bool, torch.complex64])
def test_wrong_dtype(pattern: Pattern, name: str, dtype: torch.dtype):
    tensors = valid(pattern)
    tensors[name] = tensors[name].to(dtype)
    refused(tensors, pattern, rf"^{name} has dtype {dtype}, must be")


@pytest.mark.parametrize(("name", "dtype"), [("weight_mask", torch.float32), ("weight_rows", torch.float64)])
def test_numbers_that_must_be_integers(name: str, dtype: torch.dtype):
    tensors = valid(HALF)
    tensors[name] = tensors[name].to(dtype)
    refused(tensors, HALF, rf"^{name} has dtype {dtype}")


# ---- the mask


@settings(max_examples=60, deadline=None)
@given(pattern=st.sampled_from([NM24, NM(1, 4), NM(3, 5), HALF, Unstructured(0.3), Unstructured(0)]), data=st.data())
def test_any_flipped_bit_of_the_mask_is_found(pattern: Pattern, data: st.DataObject):
    tensors = valid(pattern)
    row, bit = data.draw(st.integers(0, SHAPE[0] - 1)), data.draw(st.integers(0, 23))
    tensors["weight_mask"][row, bit // 8] ^= 1 << bit % 8
    refused(tensors, pattern, "beyond column 20" if bit >= 20 else "the file is damaged")


@pytest.mark.parametrize("pattern", [NM24, HALF], ids=str)
@pytest.mark.parametrize("byte", [0, 255])
def test_mask_of_one_value(pattern: Pattern, byte: int):
    tensors = valid(pattern)
    tensors["weight_mask"] = torch.full_like(tensors["weight_mask"], byte)
    refused(tensors, pattern, "the file is damaged")


def test_right_count_in_the_row_but_not_in_its_groups():
    tensors = valid(NM24)
    row = torch.zeros(SHAPE, dtype=torch.bool)
    row[:, :10] = True
    tensors["weight_mask"] = bitmask.pack_bits(row)
    refused(tensors, NM24, "keeps between 0 and 4 of 4 columns, must keep 2")


def test_mask_with_rows_exchanged():
    """Unstructured: the total is right, the rows are not."""
    tensors = valid(HALF)
    counts = tensors["weight_rows"].diff()
    first, second = int(counts.argmin()), int(counts.argmax())
    assert counts[first] != counts[second]
    tensors["weight_mask"][[first, second]] = tensors["weight_mask"][[second, first]]
    refused(tensors, HALF, "row by row")


# ---- the row pointers


@settings(max_examples=60, deadline=None)
@given(
    row=st.integers(0, SHAPE[0]),
    value=st.one_of(st.integers(-3, 63), st.sampled_from([-(2**63), 2**63 - 1, 2**31, 2**32])),
)
def test_any_changed_row_pointer_is_found(row: int, value: int):
    tensors = valid(HALF)
    if tensors["weight_rows"][row] == value:
        return
    tensors["weight_rows"][row] = value
    refused(tensors, HALF, "weight_rows must count them row by row")


def test_rows_that_are_not_monotone():
    tensors = valid(HALF)
    tensors["weight_rows"][[2, 3]] = tensors["weight_rows"][[3, 2]]
    refused(tensors, HALF, "weight_rows must count them row by row")


# ---- the pattern of the config is not that of the file


@pytest.mark.parametrize(
    ("stored", "claimed", "text"),
    [
        (NM24, NM(1, 4), r"weight has shape \[6, 10\], a 1:4 matrix"),
        (NM24, NM(5, 10), "keeps between .* of 10 columns, must keep 5"),
        (NM(5, 10), NM24, "its pattern is not 2:4"),
        (NM24, HALF, r"missing \['weight_rows'\]"),
        (HALF, NM24, r"unexpected \['weight_rows'\]"),
        (HALF, Unstructured(0.6), r"weight has shape \[60\], .* has \[48\]"),
        (NM24, NM(2, 3), "2:3 .*got 20"),
    ],
    ids=lambda value: str(value) if isinstance(value, NM | Unstructured) else "",
)
def test_another_pattern(stored: Pattern, claimed: Pattern, text: str):
    tensors = valid(stored)
    if (stored, claimed) == (NM24, NM(5, 10)):  # 2:4 twice in ten columns can be 5:10 by chance
        tensors["weight_mask"][0] = bitmask.pack_bits(torch.tensor([[True, True, False, False] * 5]))[0]
    refused(tensors, claimed, text)


@pytest.mark.parametrize("shape", [(6, 24), (5, 20), (20, 6), (6, 16), (12, 20)])
def test_another_shape(shape: tuple[int, int]):
    for pattern in (NM(1, 2), HALF):
        with pytest.raises(ValueError, match=rf"has shape .*\[{shape[0]}, {shape[1]}\]"):
            bitmask.decode(valid(pattern), shape, pattern)


# ---- the module says the same


@pytest.mark.parametrize("pattern", [NM24, HALF], ids=str)
def test_sparse_linear_refuses_a_mask_that_was_loaded_into_it(pattern: Pattern):
    linear = SparseLinear(SHAPE[1], SHAPE[0], False, pattern)
    tensors = valid(pattern)
    tensors["weight_mask"][0, 2] |= 0x80
    with pytest.raises(ValueError, match="beyond column 20"):
        linear.load_state_dict(tensors)
    with pytest.raises(ValueError, match="beyond column 20"):
        linear.validate()
