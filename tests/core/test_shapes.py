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

from optimum_sparse.core import NM, Pattern, Unstructured, column_sweep, inverse_factor, keep_mask, keep_top
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
def shaped_sweep(
    weight: Float[Tensor, "out in"], factor: Float[Tensor, "in in"], every: int
) -> tuple[Float[Tensor, "out in"], Bool[Tensor, "out in"]]:
    @shaped
    def choose(score: Float[Tensor, "out n"], first: int) -> Bool[Tensor, "out n"]:
        return keep_top(score, score.shape[1] // 2)

    return tuple(column_sweep(weight, factor, choose, decide_every=every, block_size=4 * every))


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
@given(rows=sizes, width=st.integers(1, 40), every=st.sampled_from([1, 2, 4, 8]))
def test_sweep(rows: int, width: int, every: int):
    x = torch.randn(8, width)
    factor = shaped_inverse_factor(x.T @ x / 8, 0.1)
    shaped_sweep(torch.randn(rows, width), factor, every)


def test_the_checks_check():
    """Were the decorator switched off, every test of this file would pass."""

    @shaped
    def wrong(score: Float[Tensor, "out in"]) -> Bool[Tensor, "out in"]:
        return keep_top(score, 1)[:, 1:]

    with pytest.raises((jaxtyping.TypeCheckError, TypeError)):
        wrong(torch.ones(2, 3))
