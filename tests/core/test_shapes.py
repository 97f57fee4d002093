# ruff: noqa: F722 (shape annotations are not names)
"""The shapes that docstrings promise, checked at run time over random sizes."""

import jaxtyping
import pytest
import torch
from beartype import beartype
from hypothesis import given, settings
from hypothesis import strategies as st
from jaxtyping import Bool, Float, Int64, UInt8, jaxtyped
from torch import Tensor

from optimum_sparse.core import (
    NM,
    CrossStats,
    Pattern,
    Unstructured,
    column_sweep,
    inverse_factor,
    keep_mask,
    keep_top,
    polish,
    sweep_block,
)
from optimum_sparse.formats import bitmask


shaped = jaxtyped(typechecker=beartype)


@shaped
def shaped_keep_mask(score: Float[Tensor, "out in"], pattern: Pattern) -> Bool[Tensor, "out in"]:
    return keep_mask(score, pattern)


@shaped
def shaped_keep_top(score: Float[Tensor, "*rows n"], kept: int | Int64[Tensor, "*rows 1"]) -> Bool[Tensor, "*rows n"]:
    return keep_top(score, kept)


@shaped
def shaped_inverse_factor(gram: Float[Tensor, "in in"], damping: float) -> Float[Tensor, "in in"]:
    return inverse_factor(gram, damping)


@shaped
def shaped_sweep_block(
    columns: Float[Tensor, "n out"], keep: Bool[Tensor, "n out"], factor: Float[Tensor, "n n"], kept: int, group: int
) -> Float[Tensor, "n out"]:
    return sweep_block(columns, keep, factor, kept, group)


@shaped
def shaped_sweep(
    weight: Float[Tensor, "out in"],
    factor: Float[Tensor, "in in"],
    pattern: Pattern,
    block_size: int,
    widths: list[int] | None,
) -> tuple[Float[Tensor, "out in"], Bool[Tensor, "out in"]]:
    return tuple(column_sweep(weight, factor, pattern, block_size=block_size, widths=widths))[:2]


@shaped
def shaped_polish(
    weight: Float[Tensor, "out in"],
    keep: Bool[Tensor, "out in"],
    target: Float[Tensor, "out in"],
    gram: Float[Tensor, "in in"],
) -> Float[Tensor, "out in"]:
    return polish(weight, keep, target, gram, 0.01, 3)


@shaped
def shaped_cross(
    y: Float[Tensor, "tokens outputs"], x: Float[Tensor, "tokens inputs"], token_weight: Float[Tensor, " tokens"]
) -> Float[Tensor, "outputs inputs"]:
    stats = CrossStats(y.shape[1], x.shape[1])
    stats.update(y, x, token_weight)
    return stats.mean


@shaped
def shaped_encode_nm(
    weight: Float[Tensor, "out in"], pattern: NM, kept: int, bytes_: int
) -> tuple[Float[Tensor, "out {kept}"], UInt8[Tensor, "out {bytes_}"]]:
    tensors = bitmask.encode(weight, pattern)
    return tensors["weight"], tensors["weight_mask"]


@shaped
def shaped_encode_unstructured(
    weight: Float[Tensor, "out in"], pattern: Unstructured, kept: int, bytes_: int
) -> tuple[Float[Tensor, " {kept}"], UInt8[Tensor, "out {bytes_}"], Int64[Tensor, " out+1"]]:
    tensors = bitmask.encode(weight, pattern)
    return tensors["weight"], tensors["weight_mask"], tensors["weight_rows"]


@shaped
def shaped_decode(tensors: dict, weight: Float[Tensor, "out in"], pattern: Pattern) -> Float[Tensor, "out in"]:
    return bitmask.decode(tensors, tuple(weight.shape), pattern)


few = settings(max_examples=25, deadline=None)
sizes = st.integers(1, 6)


@few
@given(rows=sizes, groups=sizes, group=st.integers(2, 9), data=st.data())
def test_nm(rows: int, groups: int, group: int, data: st.DataObject):
    pattern = NM(data.draw(st.integers(1, group - 1)), group)
    weight = torch.randn(rows, groups * group)
    weight = weight * shaped_keep_mask(weight.abs(), pattern)
    shaped_encode_nm(weight, pattern, groups * pattern.kept, -(-groups * group // 8))
    shaped_decode(bitmask.encode(weight, pattern), weight, pattern)


@few
@given(rows=sizes, width=st.integers(1, 40), sparsity=st.floats(0, 1, exclude_max=True))
def test_unstructured(rows: int, width: int, sparsity: float):
    pattern = Unstructured(sparsity)
    weight = torch.randn(rows, width)
    weight = weight * shaped_keep_mask(weight.abs(), pattern)
    shaped_encode_unstructured(weight, pattern, pattern.kept(rows * width), -(-width // 8))
    shaped_decode(bitmask.encode(weight, pattern), weight, pattern)


@few
@given(shape=st.lists(sizes, min_size=1, max_size=3), data=st.data())
def test_keep_top(shape: list[int], data: st.DataObject):
    kept = data.draw(st.integers(0, shape[-1]))
    shaped_keep_top(torch.randn(shape), kept)
    shaped_keep_top(torch.randn(shape), torch.full((*shape[:-1], 1), kept))


@few
@given(rows=sizes, widths=st.lists(st.integers(1, 20), min_size=1, max_size=4), sparsity=st.floats(0, 0.99))
def test_unstructured_sweep(rows: int, widths: list[int], sparsity: float):
    width = sum(widths)
    x = torch.randn(8, width)
    gram = x.T @ x / 8
    factor = shaped_inverse_factor(gram, 0.1)
    weight = torch.randn(rows, width)
    shaped_sweep(weight, factor, Unstructured(sparsity), 16, None)
    solved, keep = shaped_sweep(weight, factor, Unstructured(sparsity), 16, widths)
    shaped_polish(solved, keep, weight, gram)
    shaped_sweep_block(weight.T.contiguous(), keep.T.contiguous(), factor, 0, 0)


@few
@given(rows=sizes, groups=sizes, group=st.integers(2, 20), data=st.data())
def test_nm_sweep(rows: int, groups: int, group: int, data: st.DataObject):
    pattern = NM(data.draw(st.integers(1, group - 1)), group)
    width = groups * group
    x = torch.randn(8, width)
    factor = shaped_inverse_factor(x.T @ x / 8, 0.1)
    weight = torch.randn(rows, width)
    shaped_sweep(weight, factor, pattern, data.draw(st.integers(1, 40)), None)
    keep = torch.empty(width, rows, dtype=torch.bool)
    shaped_sweep_block(weight.T.contiguous(), keep, factor, pattern.kept, group)


@few
@given(tokens=sizes, outputs=sizes, inputs=sizes)
def test_cross_stats(tokens: int, outputs: int, inputs: int):
    shaped_cross(torch.randn(tokens, outputs), torch.randn(tokens, inputs), torch.rand(tokens))


def test_the_checks_check():
    """Were the decorator switched off, every test of this file would pass."""

    @shaped
    def wrong(score: Float[Tensor, "out in"]) -> Bool[Tensor, "out in"]:
        return keep_top(score, 1)[:, 1:]

    with pytest.raises((jaxtyping.TypeCheckError, TypeError)):
        wrong(torch.ones(2, 3))
