"""The factor and the sweep against linear algebra from scratch, in float64."""

from itertools import accumulate

import pytest
import torch
from helpers import ar_inputs, random_weight
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from optimum_sparse.core import (
    NM,
    NotPositiveDefinite,
    Pattern,
    Unstructured,
    column_sweep,
    inverse_factor,
    sweep_block,
)


def gram_of(x: Tensor) -> Tensor:
    x = x.double()
    return x.T @ x / len(x)


@pytest.mark.parametrize("damping", [0.0, 0.01, 1.0])
def test_factor_is_upper_and_gives_the_inverse(damping: float):
    gram = gram_of(ar_inputs(200, 24))
    factor = inverse_factor(gram, damping)
    damped = gram + damping * gram.diagonal().mean() * torch.eye(24, dtype=torch.float64)
    assert torch.equal(factor, factor.triu())
    assert (factor.diagonal() > 0).all()
    torch.testing.assert_close(factor.T @ factor @ damped, torch.eye(24, dtype=torch.float64), rtol=0, atol=1e-9)


def test_row_of_the_factor_is_the_elimination_after_all_columns_before_it():
    gram = gram_of(ar_inputs(200, 10))
    factor = inverse_factor(gram, 0.0)
    for j in range(10):
        remaining = torch.linalg.inv(gram[j:, j:])
        torch.testing.assert_close(factor[j, j] ** 2, remaining[0, 0], rtol=1e-9, atol=0)
        torch.testing.assert_close(factor[j, j:] / factor[j, j], remaining[0] / remaining[0, 0], rtol=1e-7, atol=1e-9)


def test_dead_input_is_independent_of_the_rest():
    x = ar_inputs(100, 8)
    x[:, [2, 7]] = 0
    live = [0, 1, 3, 4, 5, 6]
    gram = gram_of(x)
    factor = inverse_factor(gram, 0.0)
    assert torch.isfinite(factor).all()
    inverse = factor.T @ factor
    torch.testing.assert_close(inverse[live][:, live], torch.linalg.inv(gram[live][:, live]), rtol=1e-8, atol=1e-8)
    assert not inverse[2, live].any()
    assert not inverse[7, live].any()


def test_inverse_factor_does_not_modify_the_gram():
    gram = gram_of(ar_inputs(50, 6))
    gram[:, 1] = gram[1] = 0
    before = gram.clone()
    inverse_factor(gram, 0.01)
    assert torch.equal(gram, before)


def test_fewer_tokens_than_inputs_need_damping():
    gram = gram_of(ar_inputs(6, 48)).float()
    with pytest.raises(NotPositiveDefinite, match=r"damping=0: damping=0\.01 works, .* more calibration tokens"):
        inverse_factor(gram, 0.0)
    factor = inverse_factor(gram, 0.01).double()
    damped = gram.double() + 0.01 * gram.diagonal().mean() * torch.eye(48, dtype=torch.float64)
    torch.testing.assert_close(factor.T @ factor @ damped, torch.eye(48, dtype=torch.float64), rtol=0, atol=1e-3)


@pytest.mark.parametrize(("outer", "works"), [(1.05, "0.1"), (1.5, "1"), (3.0, "10"), (50.0, "100")])
def test_a_matrix_that_is_not_positive_definite_raises_a_value_error_with_the_damping_that_works(outer, works):
    """[[1, c], [c, 1]] is positive definite from a damping of c - 1 on."""
    gram = torch.tensor([[1.0, outer], [outer, 1.0]])
    with pytest.raises(ValueError, match=rf"not positive definite with damping=0\.01: damping={works} works"):
        inverse_factor(gram, 0.01)
    assert torch.isfinite(inverse_factor(gram, float(works))).all()
    with pytest.raises(NotPositiveDefinite):
        inverse_factor(gram, float(works) / 10)


def test_a_matrix_that_no_damping_mends_says_so():
    with pytest.raises(NotPositiveDefinite, match="no damping up to 10000 works"):
        inverse_factor(torch.tensor([[1.0, 1e6], [1e6, 1.0]]), 0.01)


def sweep_given_mask(weight: Tensor, keep: Tensor, factor: Tensor, block_size: int) -> Tensor:
    """What `column_sweep` does around `sweep_block`, for a mask [out, in] that is there before."""
    columns, keep = weight.T.clone(), keep.T.contiguous()
    for start in range(0, len(columns), block_size):
        block = slice(start, start + block_size)
        errors = sweep_block(columns[block], keep[block], factor[block, block], 0, 0)
        columns[start + block_size :] -= factor[block, start + block_size :].T @ errors
    return (columns * keep).T


def sweep_at_once(weight: Tensor, factor: Tensor, pattern: Pattern, widths: list[int]) -> tuple[Tensor, Tensor]:
    """(weight, keep): every removed weight is compensated in all later columns before anything else happens."""
    weight, keep = weight.clone(), torch.ones_like(weight, dtype=torch.bool)
    starts = dict(zip(accumulate([0, *widths[:-1]]), widths, strict=True))
    for j in range(weight.shape[1]):
        if j in starts:
            score = (weight[:, j : j + starts[j]] / factor.diagonal()[j : j + starts[j]]).square()
            if isinstance(pattern, Unstructured):
                score = score.reshape(1, -1)
            lowest = score.argsort(dim=1)[:, : round(pattern.sparsity * score.shape[1])]
            keep[:, j : j + starts[j]] = torch.ones_like(score).scatter_(1, lowest, 0).reshape(len(weight), -1).bool()
        error = weight[:, j] * ~keep[:, j] / factor[j, j]
        weight[:, j + 1 :] -= error[:, None] * factor[j, j + 1 :]
        weight[:, j] *= keep[:, j]
    return weight, keep


@pytest.mark.parametrize("pattern", [NM(2, 4), Unstructured(0.5)], ids=str)
@pytest.mark.parametrize("shape", [(3, 0), (0, 8), (3, 8)])
def test_a_matrix_of_nothing_and_one_that_is_trained(pattern: Pattern, shape: tuple[int, int]):
    solved = column_sweep(torch.randn(shape, requires_grad=True), torch.eye(shape[1]), pattern)
    assert solved.weight.shape == solved.keep.shape == shape
    assert not solved.weight.requires_grad


# ---- sweep_block


@pytest.mark.parametrize("column", [0, 1, 7, 8, 15, 16, 20, 38, 39])
@pytest.mark.parametrize("block_size", [1, 8, 17, 40])
def test_one_pruned_column_equals_least_squares(column: int, block_size: int):
    """From the activations themselves: no Gram matrix and no inverse in the reference."""
    x, weight = ar_inputs(300, 40).double(), random_weight(5, 40).double()
    keep = torch.ones(5, 40, dtype=torch.bool)
    keep[:, column] = False
    swept = sweep_given_mask(weight, keep, inverse_factor(gram_of(x), 0.0), block_size)
    expected = weight.clone()
    lost = x[:, column, None] * weight[:, column]
    expected[:, column + 1 :] += torch.linalg.lstsq(x[:, column + 1 :], lost).solution.T
    expected[:, column] = 0
    torch.testing.assert_close(swept, expected, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("block_size", [1, 8, 17, 40])
def test_first_columns_pruned_one_by_one_equal_least_squares_of_all_at_once(block_size: int):
    """Another number of columns in every row: rows are problems of their own."""
    x, weight = ar_inputs(300, 40).double(), random_weight(5, 40).double()
    pruned = [0, 3, 16, 31, 40]
    keep = torch.arange(40) >= torch.tensor(pruned)[:, None]
    swept = sweep_given_mask(weight, keep, inverse_factor(gram_of(x), 0.0), block_size)
    for row, first in enumerate(pruned):
        expected = torch.zeros(40, dtype=torch.float64)
        if first < 40:
            expected[first:] = torch.linalg.lstsq(x[:, first:], x @ weight[row, :, None]).solution[:, 0]
        torch.testing.assert_close(swept[row], expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("n", [1, 2, 15, 16, 17, 32, 33, 50])
def test_errors_are_what_was_removed_over_the_factor_and_a_given_mask_stays(n: int):
    factor = inverse_factor(gram_of(ar_inputs(200, n)), 0.01)
    columns, keep = random_weight(n, 5).double(), random_weight(n, 5, seed=1) > 0
    before, given = columns.clone(), keep.clone()
    errors = sweep_block(columns, keep, factor, 0, 0)
    assert torch.equal(keep, given)
    assert torch.equal(errors != 0, ~keep)
    # Column j, when its turn comes, has all compensation by the columns before it: W - U_<j^T E.
    when_reached = before - factor.triu(1).T @ errors
    torch.testing.assert_close(errors, when_reached / factor.diagonal()[:, None] * ~keep, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(columns[keep], when_reached[keep], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("n", "group"), [(8, 0), (40, 0), (8, 4), (40, 5), (24, 24), (48, 24)])
def test_sweep_block_writes_only_what_it_says_it_writes(n: int, group: int):
    """The schema of the custom op: columns and keep, never the factor, and no output that is an input."""
    factor = inverse_factor(gram_of(ar_inputs(200, n)), 0.01).float()
    arguments = (random_weight(n, 3), random_weight(n, 3) > 0, factor, group // 2, group)
    torch.library.opcheck(sweep_block, arguments, test_utils=("test_schema",))


# ---- column_sweep


LAZY = [
    *[(NM(2, 4), block_size) for block_size in (1, 4, 10, 12, 16, 128, 1000)],
    *[(NM(1, 2), 2), (NM(3, 5), 35), (NM(3, 6), 24), (NM(3, 6), 100), (NM(4, 8), 40), (NM(5, 10), 7), (NM(1, 12), 12)],
    *[(NM(6, 12), 128), (NM(7, 15), 40), (NM(8, 16), 48), (NM(12, 24), 48), (NM(20, 40), 50), (NM(120, 240), 128)],
]


@pytest.mark.parametrize(("pattern", "block_size"), LAZY, ids=str)
def test_lazy_updates_of_nm_equal_updates_of_every_column_at_once(pattern: NM, block_size: int):
    """Blocks and panels only save time: in float64, the same masks and weights as without them."""
    weight, factor = random_weight(6, 240).double(), inverse_factor(gram_of(ar_inputs(400, 240)), 0.01)
    solved = column_sweep(weight, factor, pattern, block_size=block_size)
    expected, keep = sweep_at_once(weight, factor, pattern, [pattern.group] * (240 // pattern.group))
    assert torch.equal(solved.keep, keep)
    torch.testing.assert_close(solved.weight, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("sparsity", [0.25, 0.5, 0.875])
@pytest.mark.parametrize(
    ("block_size", "widths"),
    [
        (128, None),
        (16, None),
        (7, None),
        (1000, None),
        (128, [240]),
        (128, [1] * 240),
        (128, [1, 15, 16, 17, 50, 128, 13]),
        (4, [112, 128]),
    ],
    ids=lambda value: f"widths{len(value)}" if isinstance(value, list) else str(value),
)
def test_lazy_updates_of_unstructured_blocks_equal_updates_at_once(sparsity: float, block_size: int, widths):
    """Eight rows, so that every block's share is a whole number of weights. `widths` goes before `block_size`."""
    weight, factor = random_weight(8, 240).double(), inverse_factor(gram_of(ar_inputs(400, 240)), 0.01)
    pattern = Unstructured(sparsity)
    solved = column_sweep(weight, factor, pattern, block_size=block_size, widths=widths)
    equal = [len(part) for part in torch.arange(240).split(block_size)]
    expected, keep = sweep_at_once(weight, factor, pattern, widths or equal)
    assert torch.equal(solved.keep, keep)
    torch.testing.assert_close(solved.weight, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("blocks", range(1, 34))
def test_however_many_blocks_there_are_every_pair_of_them_meets_once(blocks: int):
    """Halves of ranges that are no powers of two, of blocks of all widths."""
    widths = [1 + 3 * number % 5 for number in range(blocks)]
    width, pattern = sum(widths), Unstructured(0.5)
    weight, factor = random_weight(8, width).double(), inverse_factor(gram_of(ar_inputs(400, width)), 0.01)
    solved = column_sweep(weight, factor, pattern, widths=widths)
    expected, keep = sweep_at_once(weight, factor, pattern, widths)
    assert torch.equal(solved.keep, keep)
    torch.testing.assert_close(solved.weight, expected, rtol=1e-9, atol=1e-9)


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 7),
    widths=st.lists(st.integers(1, 20), min_size=1, max_size=8),
    sparsity=st.floats(0, 1, exclude_max=True),
)
def test_unstructured_counts_are_exact_and_every_block_gives_its_share(rows: int, widths: list[int], sparsity: float):
    width = sum(widths)
    keep = column_sweep(random_weight(rows, width), torch.eye(width), Unstructured(sparsity), widths=widths).keep
    assert int((~keep).sum()) == round(sparsity * rows * width)
    for part in keep.split(widths, dim=1):
        assert abs(int((~part).sum()) - sparsity * part.numel()) <= 1 + 1e-6


@pytest.mark.parametrize("pattern", [NM(2, 4), NM(1, 3), NM(5, 12), Unstructured(0.5), Unstructured(0.75)], ids=str)
@pytest.mark.parametrize("widths", [None, [24, 120, 36, 60], [240]], ids=str)
def test_without_correlation_the_largest_weights_of_a_group_or_block_stay_as_they_are(pattern: Pattern, widths):
    """Inputs of size one: nothing to compensate, and the score is the squared weight."""
    weight = random_weight(4, 240)
    solved = column_sweep(weight, torch.eye(240), pattern, widths=widths)
    assert torch.equal(solved.weight, weight * solved.keep)
    chosen = [pattern.group] * (240 // pattern.group) if isinstance(pattern, NM) else widths or [128, 112]
    for values, kept in zip(weight.split(chosen, 1), solved.keep.split(chosen, 1), strict=True):
        for v, k in zip(values, kept, strict=True) if isinstance(pattern, NM) else [(values, kept)]:
            assert int(k.sum()) == round(k.numel() * (1 - pattern.sparsity))
            assert v[k].abs().min() > v[~k].abs().max()


@pytest.mark.parametrize("block_size", [1, 5, 128])
def test_ties_go_to_the_lower_column_and_later_ones_are_compared_after_compensation(block_size: int):
    """Column 4 must take over for column 2, its copy with the other sign, which leaves nothing of both."""
    weight = torch.ones(2, 8)
    factor = torch.eye(8)
    assert (
        column_sweep(weight, factor, NM(2, 4), block_size=block_size).keep.tolist()
        == [[True, True, False, False] * 2] * 2
    )
    factor[2, 4] = 1.0  # w_4 -= w_2
    solved = column_sweep(weight, factor, NM(2, 4), block_size=block_size)
    assert solved.weight.tolist() == [[1, 1, 0, 0, 0, 1, 1, 0]] * 2
    assert solved.keep.tolist() == [[True, True, False, False, False, True, True, False]] * 2


@pytest.mark.parametrize("pattern", [NM(2, 4), NM(3, 12), Unstructured(0.4)], ids=str)
def test_a_weight_of_zeros_keeps_exact_counts(pattern: Pattern):
    factor = inverse_factor(gram_of(ar_inputs(100, 36)), 0.01).float()
    solved = column_sweep(torch.zeros(5, 36), factor, pattern, block_size=7)
    assert not solved.weight.any()
    assert int((~solved.keep).sum()) == round(pattern.sparsity * 5 * 36)


@pytest.mark.parametrize("sparsity", [0.0, 0.999])
def test_all_or_nothing(sparsity: float):
    weight, factor = random_weight(3, 40), inverse_factor(gram_of(ar_inputs(100, 40)), 0.01).float()
    solved = column_sweep(weight, factor, Unstructured(sparsity), widths=[1, 20, 19])
    assert solved.keep.all() if sparsity == 0 else not solved.keep.any()
    assert torch.equal(solved.weight, weight * solved.keep)


@pytest.mark.parametrize("pattern", [NM(2, 4), NM(16, 32), Unstructured(0.5)], ids=str)
@pytest.mark.parametrize("order", ["C", "F"])
def test_removed_weights_are_exactly_zero_and_arguments_are_not_modified(pattern: Pattern, order: str):
    weight, factor = random_weight(4, 64), inverse_factor(gram_of(ar_inputs(100, 64)), 0.01).float()
    if order == "F":
        weight = weight.T.contiguous().T  # the sweep works on columns: here, on the weight's own memory
    before, widths = (weight.clone(), factor.clone()), [32, 32]
    solved = column_sweep(weight, factor, pattern, widths=widths)
    assert torch.equal(solved.weight != 0, solved.keep)
    assert solved.weight.is_contiguous()
    assert solved.keep.is_contiguous()
    assert torch.equal(weight, before[0])
    assert torch.equal(factor, before[1])
    assert widths == [32, 32]


@pytest.mark.parametrize("width", [6, 129])
def test_nm_refuses_a_width_that_is_no_multiple(width: int):
    with pytest.raises(ValueError, match=rf"2:4 .*got {width}"):
        column_sweep(torch.ones(4, width), torch.eye(width), NM(2, 4))
