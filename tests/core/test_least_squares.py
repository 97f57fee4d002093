"""Conjugate gradients against least squares on the activations themselves, in float64."""

from itertools import pairwise

import pytest
import torch
from helpers import ar_inputs, random_weight
from torch import Tensor

from optimum_sparse.core import NM, Unstructured, keep_mask, polish


def gram_of(x: Tensor) -> Tensor:
    return x.T @ x / len(x)


def row_errors(weight: Tensor, target: Tensor, x: Tensor) -> Tensor:
    """Mean of (x (weight - target)^T)^2 over tokens in float64, one number per row."""
    return (x.double() @ (weight.double() - target.double()).T).square().mean(0)


def least_squares(keep: Tensor, target: Tensor, x: Tensor, damping: float = 0.0) -> Tensor:
    """Row by row on its kept columns; damping as further tokens, which ask for the target itself."""
    x, target = x.double(), target.double()
    power = x.square().mean(0)
    ridge = damping * power.sum() / max(int((power > 0).sum()), 1)
    tokens = torch.cat([x, (ridge * len(x)).sqrt() * torch.eye(x.shape[1], dtype=torch.float64)])
    best = torch.zeros_like(target)
    for row, kept in enumerate(keep):
        best[row, kept] = torch.linalg.lstsq(tokens[:, kept], tokens @ target[row]).solution
    return best


def masks(rows: int, width: int, seed: int = 0) -> Tensor:
    """Every row another number of kept weights, from none in the first to all in the last."""
    order = random_weight(rows, width, seed + 50).argsort(dim=1).argsort(dim=1)
    return order < torch.linspace(0, width, rows).round().int()[:, None]


@pytest.mark.parametrize("damping", [0.0, 0.01, 1.0])
@pytest.mark.parametrize("start", ["projection", "zeros", "random"])
def test_equals_least_squares_on_the_kept_columns(damping: float, start: str):
    """From anywhere. Where damping pulls a row above the error it began with, the row stays as it was."""
    x, target, keep = ar_inputs(200, 24).double(), random_weight(9, 24).double(), masks(9, 24)
    weight = {"projection": target, "zeros": target * 0, "random": random_weight(9, 24, seed=1).double()}[start] * keep
    polished = polish(weight, keep, target, gram_of(x), damping, 60)
    best = least_squares(keep, target, x, damping)
    better = row_errors(best, target, x) <= row_errors(weight, target, x)
    assert better.sum() >= 8
    torch.testing.assert_close(polished[better], best[better], rtol=1e-6, atol=1e-8)
    assert torch.equal(polished[~better], weight[~better])


@pytest.mark.parametrize("width", [5, 64, 130])
@pytest.mark.parametrize("pattern", [NM(1, 5), Unstructured(0.5), Unstructured(0.9)], ids=str)
def test_fp32_comes_as_near_as_fp32_can_and_stays_there(width: int, pattern):
    """Many more iterations than are needed do no harm."""
    if isinstance(pattern, NM):
        width -= width % pattern.group
    x, target = ar_inputs(400, width), random_weight(12, width)
    keep = keep_mask(target.abs(), pattern)
    best = least_squares(keep, target, x, 0.01)
    for iterations in (100, 400):
        polished = polish(target * keep, keep, target, gram_of(x), 0.01, iterations)
        assert polished.dtype == torch.float32
        power = row_errors(target * 0, target, x)
        assert (row_errors(polished, best, x) <= 1e-6 * power).all()


def test_as_many_iterations_as_kept_weights_are_enough_and_each_one_helps():
    """What tells conjugate gradients from steepest descent."""
    x, target = ar_inputs(300, 12).double(), random_weight(20, 12).double()
    keep = keep_mask(target.abs(), NM(1, 2))
    best = row_errors(least_squares(keep, target, x), target, x)
    errors = [row_errors(polish(target * keep, keep, target, gram_of(x), 0.0, n), target, x) for n in range(7)]
    for before, after in pairwise(errors[:4]):
        assert (after < before).all()
    assert (errors[5] > best * (1 + 1e-6)).any()
    torch.testing.assert_close(errors[6], best, rtol=1e-8, atol=0)


HARD = {
    "correlated": lambda: ar_inputs(300, 48, correlation=0.99),
    "fewer tokens than inputs": lambda: ar_inputs(9, 48),
    "one token": lambda: ar_inputs(1, 48),
    "dead inputs": lambda: ar_inputs(300, 48) * (torch.arange(48) % 3 > 0),
    "all dead": lambda: torch.zeros(20, 48),
    "equal columns": lambda: ar_inputs(300, 1).expand(-1, 48).contiguous(),
    "tiny": lambda: ar_inputs(30, 48) * 1e-10,
    "huge": lambda: ar_inputs(30, 48) * 1e10,
    "uneven": lambda: ar_inputs(300, 48) * torch.logspace(-4, 4, 48),
}


@pytest.mark.parametrize("inputs", HARD)
@pytest.mark.parametrize("damping", [1e-3, 0.01, 10.0])
@pytest.mark.parametrize("iterations", [0, 1, 2, 10, 100])
def test_no_row_is_worse_than_before_and_zeros_stay_zero(inputs: str, damping: float, iterations: int):
    """From the projection of the target and from a better start. Rows that keep everything are optimal already."""
    x, target, keep = HARD[inputs](), random_weight(8, 48), masks(8, 48)
    power = row_errors(target * 0, target, x)
    for weight in (target * keep, least_squares(keep, target, x, 1e-6).float() * keep):
        polished = polish(weight, keep, target, gram_of(x), damping, iterations)
        assert torch.isfinite(polished).all()
        assert not polished[~keep].any()
        assert (row_errors(polished, target, x) <= row_errors(weight, target, x) + 1e-6 * power).all()
        if iterations == 0:
            assert torch.equal(polished, weight)
    assert torch.equal(polish(target * keep, keep, target, gram_of(x), damping, iterations)[-1], target[-1])


@pytest.mark.parametrize(("seed", "scale"), [(4, 1e-3), (34, 1e-2), (52, 1e-2), (5, 1.0)])
def test_without_damping_more_iterations_never_lose_what_fewer_gained(seed: int, scale: float):
    """Fewer tokens than inputs: a step along a direction without curvature is as long as rounding makes it."""
    x, target = ar_inputs(4, 64, seed, correlation=0.99) * scale, random_weight(8, 64, seed)
    keep = keep_mask(target.abs(), Unstructured(0.5))
    power = row_errors(target * 0, target, x)
    polished = [polish(target * keep, keep, target, gram_of(x), 0.0, iterations) for iterations in (0, 3, 10, 50)]
    for before, after in pairwise(row_errors(one, target, x) for one in polished):
        assert (after <= before + 1e-4 * power).all()


def test_a_weight_outside_the_mask_counts_as_zero():
    x, target, keep = ar_inputs(100, 16), random_weight(6, 16), masks(6, 16)
    expected = polish(target * keep, keep, target, gram_of(x), 0.01, 5)
    assert torch.equal(polish(target, keep, target, gram_of(x), 0.01, 5), expected)
    assert torch.equal(polish(target, keep, target, gram_of(x), 0.01, 0), target * keep)


def test_weights_of_dead_inputs_do_not_change_and_the_rest_is_as_if_they_were_not_there():
    x, target, keep = ar_inputs(200, 24).double(), random_weight(7, 24).double(), masks(7, 24)
    dead = torch.arange(24) % 4 == 1
    x[:, dead] = 0
    start = random_weight(7, 24, seed=1).double() * keep
    polished = polish(start, keep, target, gram_of(x), 0.01, 40)
    assert torch.equal(polished[:, dead], start[:, dead])
    without = [start[:, ~dead], keep[:, ~dead], target[:, ~dead], gram_of(x[:, ~dead])]
    torch.testing.assert_close(polished[:, ~dead], polish(*without, 0.01, 40), rtol=1e-9, atol=1e-9)


def test_more_damping_ends_nearer_to_the_target_and_infinite_damping_on_it():
    x, target, keep = ar_inputs(200, 24).double(), random_weight(7, 24).double(), masks(7, 24)
    distances = [
        ((polish(target * keep, keep, target, gram_of(x), damping, 60) - target) * keep).norm().item()
        for damping in (0, 0.01, 0.1, 1, 10, 1e9)
    ]
    assert distances == sorted(distances, reverse=True)
    assert distances[0] > 10 * distances[-2] > 1e4 * distances[-1]


def test_damping_is_relative_to_the_mean_power_of_live_inputs():
    x, target, keep = ar_inputs(200, 24).double(), random_weight(7, 24).double(), masks(7, 24)
    polished = polish(target * keep, keep, target, gram_of(x), 0.1, 60)
    torch.testing.assert_close(polish(target * keep, keep, target, gram_of(x * 64), 0.1, 60), polished)
    padded = [torch.cat([matrix, matrix * 0], 1) for matrix in (target * keep, keep, target, x)]
    torch.testing.assert_close(polish(*padded[:3], gram_of(padded[3]), 0.1, 60)[:, :24], polished)


def test_rows_are_problems_of_their_own():
    """Bit for bit under powers of two: a row that is done, or huge, changes nothing in the others."""
    x, target, keep = ar_inputs(200, 24), random_weight(7, 24), masks(7, 24)
    scale = torch.tensor([1, 2.0**30, 2.0**-20, 4, 1, 0, 2])[:, None]
    polished = polish(target * keep, keep, target, gram_of(x), 0.01, 20)
    assert torch.equal(polish(scale * target * keep, keep, scale * target, gram_of(x), 0.01, 20), scale * polished)


def test_arguments_are_not_modified():
    x = ar_inputs(100, 16)
    x[:, 3] = 0
    arguments = random_weight(6, 16), masks(6, 16), random_weight(6, 16, seed=1), gram_of(x)
    before = [argument.clone() for argument in arguments]
    polish(*arguments, 0.01, 5)
    assert all(map(torch.equal, arguments, before))
