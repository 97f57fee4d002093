"""The disk format: its bits, its bytes, and round trips of everything."""

import numpy as np
import pytest
import torch
from helpers import random_weight
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from optimum_sparse.core import NM, Pattern, Unstructured, keep_mask
from optimum_sparse.formats import bitmask
from optimum_sparse.kernels import cpu


DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def sparse_matrix(rows: int, width: int, pattern: Pattern, dtype: torch.dtype, seed: int, zeros: float = 0) -> Tensor:
    """Random weights under the pattern; `zeros` of those that may stay are zero as well."""
    weight = random_weight(rows, width, seed)
    weight = weight * keep_mask(weight.abs(), pattern)
    generator = torch.Generator().manual_seed(seed)
    return weight.masked_fill(torch.rand(rows, width, generator=generator) < zeros, 0).to(dtype)


@st.composite
def matrices(draw) -> tuple[Tensor, Pattern]:
    rows = draw(st.integers(1, 7))
    if draw(st.booleans()):
        group = draw(st.integers(2, 33))
        pattern: Pattern = NM(draw(st.integers(1, group - 1)), group)
        width = group * draw(st.integers(1, 5))
    else:
        pattern = Unstructured(draw(st.floats(0, 1, exclude_max=True)))
        width = draw(st.integers(1, 70))
    zeros = draw(st.sampled_from([0.0, 0.3, 0.9, 1.0]))
    return sparse_matrix(rows, width, pattern, draw(st.sampled_from(DTYPES)), draw(st.integers(0, 99)), zeros), pattern


def equal(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(
        left[name].dtype == right[name].dtype and torch.equal(left[name], right[name]) for name in left
    )


@settings(max_examples=150, deadline=None)
@given(case=matrices())
def test_round_trip(case: tuple[Tensor, Pattern]):
    weight, pattern = case
    before = weight.clone()
    tensors = bitmask.encode(weight, pattern)
    assert torch.equal(weight, before), "the argument is not modified"
    bitmask.validate(tensors, tuple(weight.shape), pattern)
    dense = bitmask.decode(tensors, tuple(weight.shape), pattern)
    assert dense.dtype == weight.dtype
    assert torch.equal(dense, weight)
    assert equal(bitmask.encode(dense, pattern), tensors), "a matrix has exactly one encoding"


@pytest.mark.parametrize("pattern", [NM(2, 4), Unstructured(0.5)], ids=str)
@pytest.mark.parametrize("zeros", [0, 0.001, 0.9])
@pytest.mark.parametrize("shape", [(1024, 1024), (1025, 1024), (2 * 1048 + 1, 1000), (3, 2**20 + 8)], ids=str)
def test_more_weights_than_are_moved_at_a_time(
    shape: tuple[int, int], zeros: float, pattern: Pattern, monkeypatch: pytest.MonkeyPatch
):
    """On two threads. The last part is full, one row, what is left; or a row is more than a part."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert shape[0] * shape[1] >= bitmask.CHUNK
    weight = sparse_matrix(*shape, pattern, torch.bfloat16, 0, zeros)
    keep = keep_mask((weight != 0).to(torch.uint8), pattern)
    tensors = bitmask.encode(weight, pattern)
    assert torch.equal(bitmask.unpack_bits(tensors["weight_mask"], shape[1]), keep)
    assert torch.equal(tensors["weight"].flatten(), weight[keep])
    if "weight_rows" in tensors:
        assert tensors["weight_rows"].diff().tolist() == keep.sum(1).tolist()
    assert torch.equal(bitmask.decode(tensors, shape, pattern), weight)


@settings(max_examples=60, deadline=None)
@given(case=matrices())
def test_layout_tells_shapes_and_dtypes_from_the_pattern_alone(case: tuple[Tensor, Pattern]):
    weight, pattern = case
    tensors, layout = bitmask.encode(weight, pattern), bitmask.layout(tuple(weight.shape), pattern)
    assert {name: (tuple(t.shape), t.dtype) for name, t in tensors.items()} == {
        name: (shape, dtype or weight.dtype) for name, (shape, dtype) in layout.items()
    }


@settings(max_examples=60, deadline=None)
@given(rows=st.integers(1, 5), columns=st.integers(1, 40), seed=st.integers(0, 99))
def test_every_bit_is_where_the_format_says(rows: int, columns: int, seed: int):
    """Bit c % 8 of byte c // 8 is column c; unused bits are 0."""
    keep = torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed)) < 0.5
    packed = bitmask.pack_bits(keep)
    expected = [[0] * -(-columns // 8) for _ in range(rows)]
    for row, column in keep.nonzero().tolist():
        expected[row][column // 8] |= 1 << column % 8
    assert packed.dtype == torch.uint8
    assert packed.tolist() == expected
    assert torch.equal(bitmask.unpack_bits(packed, columns), keep)


def test_the_example_of_the_docstring():
    row = torch.tensor([[0.5, 0, 0, -2, 0, 1, 0.3, 0]], dtype=torch.bfloat16)
    tensors = bitmask.encode(row, NM(2, 4))
    assert torch.equal(tensors["weight"], torch.tensor([[0.5, -2, 1, 0.3]], dtype=torch.bfloat16))
    assert tensors["weight_mask"].tolist() == [[0b01101001]]
    assert set(tensors) == {"weight", "weight_mask"}


def test_unstructured_rows_point_to_the_first_value_of_each_row():
    weight = torch.tensor([[0.0, 3, 0, 1], [0, 0, 0, 0], [5, 0, 0, 2]])
    tensors = bitmask.encode(weight, Unstructured(2 / 3))
    assert tensors["weight"].tolist() == [3, 1, 5, 2]
    assert tensors["weight_rows"].tolist() == [0, 2, 2, 4]
    assert tensors["weight_mask"].tolist() == [[0b1010], [0], [0b1001]]


def test_zeros_that_may_be_non_zero_are_stored_lowest_columns_first():
    tensors = bitmask.encode(torch.tensor([[0.0, 0, 0, 7, 0, 0, 0, 0]]), NM(2, 4))
    assert tensors["weight"].tolist() == [[0, 7, 0, 0]]
    assert tensors["weight_mask"].tolist() == [[0b00111001]]
    tensors = bitmask.encode(torch.tensor([[0.0, 0], [0, 7]]), Unstructured(0.5))
    assert tensors["weight"].tolist() == [0, 7]
    assert tensors["weight_mask"].tolist() == [[0b01], [0b10]]


@pytest.mark.parametrize("pattern", [NM(1, 2), NM(2, 4), NM(4, 8), NM(16, 32)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_kept_in_16_bits_takes_nine_sixteenths_of_the_bytes(pattern: NM, dtype: torch.dtype):
    weight = sparse_matrix(6, 64, pattern, dtype, 0)
    assert sum(tensor.nbytes for tensor in bitmask.encode(weight, pattern).values()) == 0.5625 * weight.nbytes


def test_unstructured_half_takes_the_same_bytes_but_for_row_pointers():
    weight = sparse_matrix(6, 64, Unstructured(0.5), torch.bfloat16, 0)
    tensors = bitmask.encode(weight, Unstructured(0.5))
    assert tensors["weight"].nbytes + tensors["weight_mask"].nbytes == 0.5625 * weight.nbytes
    assert tensors["weight_rows"].nbytes == 8 * 7


@pytest.mark.parametrize("pattern", [NM(2, 4), NM(1, 4), NM(3, 5), Unstructured(0.5)], ids=str)
def test_one_non_zero_too_many_is_refused(pattern: Pattern):
    weight = sparse_matrix(3, 40, pattern, torch.float32, 0)
    bitmask.encode(weight, pattern)
    weight[tuple((weight == 0).nonzero()[-1])] = 1e-30
    with pytest.raises(ValueError, match=rf"cannot be stored as {pattern}: .*(non-zeros|not zero).*dequantize"):
        bitmask.encode(weight, pattern)


def test_nm_refuses_a_width_that_is_no_multiple_of_the_group():
    """Four rows of 6 are six groups of 4: counted over row ends, they would look fine."""
    for call in (
        lambda: bitmask.encode(torch.zeros(4, 6), NM(2, 4)),
        lambda: bitmask.layout((4, 6), NM(2, 4)),
        lambda: bitmask.decode(
            {"weight": torch.ones(4, 2), "weight_mask": torch.full((4, 1), 0b100001, dtype=torch.uint8)},
            (4, 6),
            NM(2, 4),
        ),
    ):
        with pytest.raises(ValueError, match=r"2:4 .*got 6"):
            call()


@pytest.mark.parametrize("level", range(len(cpu.LEVELS)), ids=cpu.LEVELS.__getitem__)
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_kernels_do_what_their_references_do(dtype: torch.dtype, level: int, monkeypatch: pytest.MonkeyPatch):
    if cpu.library() is None or level > cpu.best_level():
        pytest.skip("the CPU kernels were not built, or for more than this CPU")
    monkeypatch.setattr(cpu, "best_level", lambda: level)

    def equal_bits(left: Tensor, right: Tensor) -> bool:
        return torch.equal(left.view(torch.uint8), right.view(torch.uint8))

    for rows, columns in ((5, 1), (3, 7), (1, 8), (9, 61), (37, 64), (2, 200), (70, 328)):
        weight = random_weight(rows, columns).masked_fill(random_weight(rows, columns, seed=1) < 0, 0.0)
        weight[0, 0], weight[-1, -1] = -0.0, float("nan")
        weight = weight.to(dtype)
        mask, none = bitmask.nonzeros(weight, columns)
        assert torch.equal(mask, bitmask.nonzeros_reference(weight, columns)[0])
        assert not len(none)  # there are zeros
        assert torch.equal(bitmask.unpack_bits(mask, columns), weight.float() != 0)
        starts = torch.cat([torch.zeros(1), (weight.float() != 0).sum(1).cumsum(0)]).long()
        values = bitmask.take_kept(weight, mask, starts)
        assert torch.equal(
            values.view(torch.uint8), bitmask.take_kept_reference(weight, mask, starts).view(torch.uint8)
        )
        dense = bitmask.put_kept(values, mask, columns)
        assert equal_bits(dense, bitmask.put_kept_reference(values, mask, columns))


@pytest.mark.parametrize("level", range(len(cpu.LEVELS)), ids=cpu.LEVELS.__getitem__)
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.bfloat16, torch.float32], ids=str)
def test_values_come_with_the_mask_where_rows_have_equally_many(
    dtype: torch.dtype, level: int, monkeypatch: pytest.MonkeyPatch
):
    if cpu.library() is None or level > cpu.best_level():
        pytest.skip("the CPU kernels were not built, or for more than this CPU")
    monkeypatch.setattr(cpu, "best_level", lambda: level)
    for rows, columns, kept in ((1, 8, 8), (9, 64, 1), (37, 100, 50), (70, 328, 164), (300, 96, 90)):
        keep = torch.rand(rows, columns, generator=torch.Generator().manual_seed(rows)).argsort(1) < kept
        weight = (random_weight(rows, columns).abs() + 1).where(keep, 0.0).to(dtype)
        mask, values = bitmask.nonzeros(weight, kept)
        assert torch.equal(bitmask.unpack_bits(mask, columns), keep)
        assert torch.equal(values.view(torch.uint8), weight[keep].view(torch.uint8))
        for other in (kept - 1, kept + 1, 0):
            assert not len(bitmask.nonzeros(weight, other)[1])
        weight[rows // 2, keep[rows // 2].nonzero()[-1]] = -0.0
        assert not len(bitmask.nonzeros(weight, kept)[1])


@pytest.mark.parametrize("level", range(len(cpu.LEVELS)), ids=cpu.LEVELS.__getitem__)
@pytest.mark.parametrize("density", [0.02, 0.5, 1.0])
def test_kept_values_end_where_they_should(level: int, density: float):
    """Stores of whole vectors must not reach what other threads write, nor what is behind the last row."""
    found = cpu.library()
    if found is None or level > cpu.best_level():
        pytest.skip("the CPU kernels were not built, or for more than this CPU")
    for columns in (32, 64, 96, 100, 256):
        keep = torch.rand(1, columns, generator=torch.Generator().manual_seed(columns)) < density
        weight, mask = torch.arange(1, columns + 1, dtype=torch.int16)[None], bitmask.pack_bits(keep)
        starts, values = bitmask.row_starts(mask), torch.full((columns + 64,), -1, dtype=torch.int16)
        count = int(starts[-1])
        pointers = weight.data_ptr(), mask.data_ptr(), starts.data_ptr()
        found.optimum_sparse_cpu_take_kept(2, *pointers, 1, columns, level, values.data_ptr())
        assert torch.equal(values[:count], weight[keep])
        assert (values[count:] == -1).all()


@pytest.mark.parametrize("numpy", [1, 2])
def test_bits_are_counted(numpy: int, monkeypatch: pytest.MonkeyPatch):
    if numpy == 1:
        monkeypatch.delattr(np, "bitwise_count", raising=False)
    for columns in (1, 8, 12, 16, 24, 40, 64, 200, 520):
        keep = random_weight(5, columns) > 0
        starts = bitmask.row_starts(bitmask.pack_bits(keep))
        assert starts.dtype == torch.int64
        assert starts.tolist() == [0, *keep.sum(1).cumsum(0).tolist()]


def test_special_values_survive():
    weight = torch.tensor([[float("inf"), float("-inf"), 0, 0, 1e-45, 0, 0, -3e38]])
    assert torch.equal(bitmask.decode(bitmask.encode(weight, NM(2, 4)), (1, 8), NM(2, 4)), weight)


@settings(max_examples=60, deadline=None)
@given(case=matrices())
def test_size_is_known_from_the_pattern(case: tuple[Tensor, Pattern]):
    weight, pattern = case
    tensors = bitmask.encode(weight, pattern)
    expected = sum(tensor.nbytes for tensor in tensors.values())
    assert bitmask.nbytes(tuple(weight.shape), pattern, weight.element_size()) == expected
