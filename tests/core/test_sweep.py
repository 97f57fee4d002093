"""The factor and the sweep against linear algebra from scratch, in float64."""

import pytest
import torch
from helpers import ar_inputs, random_weight
from torch import Tensor

from optimum_sparse.core import NotPositiveDefinite, column_sweep, inverse_factor, keep_top


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
    with pytest.raises(NotPositiveDefinite, match=r"damping=0: raise the damping .*0\.01.* more calibration tokens"):
        inverse_factor(gram, 0.0)
    factor = inverse_factor(gram, 0.01).double()
    damped = gram.double() + 0.01 * gram.diagonal().mean() * torch.eye(48, dtype=torch.float64)
    torch.testing.assert_close(factor.T @ factor @ damped, torch.eye(48, dtype=torch.float64), rtol=0, atol=1e-3)


def test_a_matrix_that_is_not_positive_definite_raises_and_is_a_value_error():
    with pytest.raises(ValueError, match=r"not positive definite with damping=0\.01.*0\.1"):
        inverse_factor(torch.tensor([[1.0, 3.0], [3.0, 1.0]]), 0.01)


@pytest.mark.parametrize("column", [0, 1, 7, 8, 20, 38, 39])
@pytest.mark.parametrize("block_size", [8, 128])
def test_one_pruned_column_equals_least_squares(column: int, block_size: int):
    """From the activations themselves: no Gram matrix and no inverse in the reference."""
    x, weight = ar_inputs(300, 40).double(), random_weight(5, 40).double()

    def choose(score: Tensor, first: int) -> Tensor:
        keep = torch.ones_like(score, dtype=torch.bool)
        if first <= column < first + score.shape[1]:
            keep[:, column - first] = False
        return keep

    solved = column_sweep(weight, inverse_factor(gram_of(x), 0.0), choose, decide_every=4, block_size=block_size)
    expected = weight.clone()
    lost = x[:, column, None] * weight[:, column]
    expected[:, column + 1 :] += torch.linalg.lstsq(x[:, column + 1 :], lost).solution.T
    expected[:, column] = 0
    torch.testing.assert_close(solved.weight, expected, rtol=1e-7, atol=1e-8)
    assert (~solved.keep).nonzero()[:, 1].unique().tolist() == [column]


@pytest.mark.parametrize(
    ("decide_every", "block_size"), [(1, 4), (4, 4), (4, 128), (5, 125), (32, 32), (32, 128), (128, 128)]
)
@pytest.mark.parametrize("width", [3, 128, 150, 300])
def test_choose_is_asked_for_every_column_once_in_order(width: int, decide_every: int, block_size: int):
    weight, asked = random_weight(2, width), []

    def choose(score: Tensor, first: int) -> Tensor:
        asked.append((first, score.shape[1]))
        return keep_top(score, score.shape[1] // 2)

    solved = column_sweep(weight, torch.eye(width), choose, decide_every=decide_every, block_size=block_size)
    assert asked == [(first, min(decide_every, width - first)) for first in range(0, width, decide_every)]
    # Uncorrelated inputs of size one: nothing to compensate, and the score is the squared weight.
    assert torch.equal(solved.weight, weight * solved.keep)


@pytest.mark.parametrize(("decide_every", "block_size"), [(4, 12), (4, 16), (5, 35), (6, 24), (16, 48), (24, 48)])
def test_lazy_updates_equal_updates_of_every_column_at_once(decide_every: int, block_size: int):
    """Blocks and panels only save time: in float64, the same masks and weights as without them."""
    x, weight = ar_inputs(400, 240), random_weight(6, 240).double()
    factor = inverse_factor(gram_of(x), 0.01)

    current, keep = weight.clone(), torch.ones(6, 240, dtype=torch.bool)
    for j in range(240):
        if j % decide_every == 0:
            group = slice(j, j + decide_every)
            score = (current[:, group] / factor.diagonal()[group]).square()
            keep[:, group] = keep_top(score, decide_every // 2)
        error = current[:, j] * ~keep[:, j] / factor[j, j]
        current[:, j + 1 :] -= error[:, None] * factor[j, j + 1 :]
        current[:, j] *= keep[:, j]

    solved = column_sweep(
        weight,
        factor,
        lambda score, _: keep_top(score, decide_every // 2),
        decide_every=decide_every,
        block_size=block_size,
    )
    assert torch.equal(solved.keep, keep)
    torch.testing.assert_close(solved.weight, current, rtol=1e-9, atol=1e-9)


def test_removed_weights_are_exactly_zero_and_arguments_are_not_modified():
    weight, factor = random_weight(4, 32), inverse_factor(gram_of(ar_inputs(100, 32)), 0.01).float()
    before = weight.clone(), factor.clone()
    solved = column_sweep(weight, factor, lambda score, _: keep_top(score, 2), decide_every=4)
    assert torch.equal(solved.weight != 0, solved.keep)
    assert torch.equal(weight, before[0])
    assert torch.equal(factor, before[1])


def test_block_size_must_hold_whole_groups():
    with pytest.raises(ValueError, match=r"block_size=10 must be a multiple of decide_every=4"):
        column_sweep(torch.ones(1, 20), torch.eye(20), lambda score, _: score > 0, decide_every=4, block_size=10)
