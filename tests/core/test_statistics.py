"""Statistics against float64 brute force."""

import pytest
import torch
from helpers import ar_inputs, output_error, random_weight, stats_of

from optimum_sparse.core import InputStats, Needs, inverse_factor
from optimum_sparse.core.statistics import SAMPLE_TOKENS


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width", [5, 300, 520])  # one tile; a tile and a rest; three tiles
def test_gram_equals_float64(dtype: torch.dtype, width: int):
    x = ar_inputs(90, width).to(dtype)
    stats = stats_of(x)
    exact = x.double().T @ x.double() / len(x)
    scale = exact.diagonal().sqrt()
    assert ((stats.gram - exact) / (scale[:, None] * scale)).abs().max() < 1e-5
    assert torch.equal(stats.gram, stats.gram.T)
    assert stats.tokens == 90


@pytest.mark.parametrize("needs", [Needs.DIAGONAL, Needs.GRAM])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mean_square_equals_float64(needs: Needs, dtype: torch.dtype):
    x = ar_inputs(90, 33).to(dtype)
    torch.testing.assert_close(stats_of(x, needs).mean_square.double(), x.double().square().mean(0), rtol=1e-5, atol=0)


@pytest.mark.parametrize("needs", [Needs.DIAGONAL, Needs.GRAM])
def test_batch_split_does_not_change_statistics(needs: Needs):
    x = ar_inputs(100, 40)
    whole, split = stats_of(x, needs), InputStats(40, needs)
    for part in x.split([1, 9, 0, 60, 30]):
        split.update(part)
    assert split.tokens == whole.tokens
    torch.testing.assert_close(split.mean_square, whole.mean_square, rtol=1e-5, atol=0)
    if needs is Needs.GRAM:
        torch.testing.assert_close(split.gram, whole.gram, rtol=1e-4, atol=1e-4)


def test_bf16_inputs_are_accumulated_in_fp32():
    """4096 equal tokens: a bf16 sum would stop growing at 256 and give a mean of a sixteenth."""
    stats = InputStats(4, Needs.GRAM)
    for _ in range(16):
        stats.update(torch.ones(256, 4, dtype=torch.bfloat16))
    assert torch.equal(stats.gram, torch.ones(4, 4))


@pytest.mark.parametrize("needs", [Needs.DIAGONAL, Needs.GRAM])
def test_update_does_not_modify_the_inputs(needs: Needs):
    x = ar_inputs(20, 8)
    before = x.clone()
    stats_of(x, needs)
    assert torch.equal(x, before)


def test_relative_error_with_a_gram_is_that_of_the_outputs():
    x, weight = ar_inputs(200, 32), random_weight(7, 32)
    pruned = weight.clone()
    pruned[:, ::3] = 0
    assert stats_of(x).relative_error(weight, pruned) == pytest.approx(output_error(weight, pruned, x), rel=1e-4)


def test_relative_error_with_a_diagonal_is_measured_on_the_first_tokens():
    x, weight = ar_inputs(SAMPLE_TOKENS + 500, 24), random_weight(5, 24)
    pruned = weight * (weight.abs() > 0.5)
    stats = InputStats(24, Needs.DIAGONAL)
    for part in x.split(300):
        stats.update(part)
    wanted = output_error(weight, pruned, x[:SAMPLE_TOKENS])
    assert stats.relative_error(weight, pruned) == pytest.approx(wanted, rel=1e-4)
    assert wanted != pytest.approx(output_error(weight, pruned, x), rel=1e-4)


def test_relative_error_of_columns_that_are_never_non_zero_together():
    x = torch.diag_embed(ar_inputs(1, 16)[0])
    weight = random_weight(5, 16)
    pruned = weight.clone()
    pruned[:, 4:9] = 0
    error = stats_of(x, Needs.DIAGONAL).relative_error(weight, pruned)
    assert error == pytest.approx(output_error(weight, pruned, x), rel=1e-4)


def test_relative_error_of_nothing_over_nothing_is_zero():
    assert stats_of(torch.zeros(3, 4)).relative_error(torch.ones(2, 4), torch.zeros(2, 4)) == 0


def test_inverse_factor_belongs_to_its_damping_and_to_the_tokens_seen_so_far():
    x = ar_inputs(60, 12)
    stats = stats_of(x)
    for damping in (0.01, 0.5, 0.01):
        assert torch.equal(stats.inverse_factor(damping), inverse_factor(stats.gram, damping))
    stats.update(ar_inputs(60, 12, seed=1))
    assert torch.equal(stats.inverse_factor(0.01), inverse_factor(stats.gram, 0.01))
