"""Statistics against float64 brute force."""

import pytest
import torch
from helpers import ar_inputs, output_error, random_weight, stats_of
from torch import Tensor

from optimum_sparse.core import CrossStats, InputStats, Needs, inverse_factor
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


# ---- token weights


def weighted(x: Tensor, token_weight: Tensor, needs: Needs = Needs.GRAM) -> InputStats:
    stats = InputStats(x.shape[1], needs)
    stats.update(x, token_weight)
    return stats


def assert_same_means(one: InputStats, other: InputStats, tolerance: float = 1e-5) -> None:
    scale = other.mean_square.sqrt()
    torch.testing.assert_close(one.mean_square, other.mean_square, rtol=tolerance, atol=0)
    if one.needs is Needs.GRAM:
        assert ((one.gram - other.gram) / (scale[:, None] * scale)).abs().max() < tolerance


@pytest.mark.parametrize("needs", [Needs.DIAGONAL, Needs.GRAM])
@pytest.mark.parametrize(
    ("dtype", "weights", "tolerance"),
    [
        (torch.float32, [0, 1, 2, 3, 7], 1e-5),
        (torch.bfloat16, [0, 1, 4, 16], 1e-5),  # their roots are powers of two: nothing is rounded
        (torch.bfloat16, [0, 1, 2, 3, 7], 1e-2),
    ],
    ids=str,
)
@pytest.mark.parametrize("width", [5, 300])
def test_integer_weights_equal_repeated_tokens(needs: Needs, dtype, weights: list[int], tolerance: float, width: int):
    x = ar_inputs(120, width).to(dtype)
    times = torch.tensor(weights).repeat(120)[:120]
    assert_same_means(weighted(x, times.float(), needs), stats_of(x.repeat_interleave(times, 0), needs), tolerance)


@pytest.mark.parametrize("needs", [Needs.DIAGONAL, Needs.GRAM])
def test_weight_zero_removes_a_token(needs: Needs):
    x = ar_inputs(60, 9)
    x[::4] *= 1e6
    token_weight = (torch.arange(60) % 4 > 0).float()
    assert_same_means(weighted(x, token_weight, needs), stats_of(x[token_weight > 0], needs))


@pytest.mark.parametrize("needs", [Needs.DIAGONAL, Needs.GRAM])
@pytest.mark.parametrize("scale", [1e-6, 0.3, 1000.0])
def test_only_the_ratios_of_token_weights_count(needs: Needs, scale: float):
    x, token_weight = ar_inputs(80, 30), torch.rand(80, generator=torch.Generator().manual_seed(0))
    assert_same_means(weighted(x, token_weight * scale, needs), weighted(x, token_weight, needs))


@pytest.mark.parametrize("needs", [Needs.DIAGONAL, Needs.GRAM])
def test_token_weights_of_several_updates_add_up_and_one_is_the_default(needs: Needs):
    x, token_weight = ar_inputs(100, 40), torch.rand(100, generator=torch.Generator().manual_seed(0)) * 3
    token_weight[70:] = 1
    stats = InputStats(40, needs)
    for start, stop in ((0, 1), (1, 45), (45, 70)):
        stats.update(x[start:stop], token_weight[start:stop])
    stats.update(x[70:])
    assert_same_means(stats, weighted(x, token_weight, needs))
    exact = (x.double().square() * token_weight.double()[:, None]).sum(0) / token_weight.double().sum()
    torch.testing.assert_close(stats.mean_square.double(), exact, rtol=1e-5, atol=0)


def test_relative_error_with_a_gram_weighs_tokens():
    x, weight = ar_inputs(200, 32), random_weight(7, 32)
    times = torch.arange(200) % 5 * (torch.arange(200) > 100)
    pruned = weight * (weight.abs() > 0.5)
    wanted = output_error(weight, pruned, x.repeat_interleave(times, 0))
    assert weighted(x, times.float()).relative_error(weight, pruned) == pytest.approx(wanted, rel=1e-4)
    assert wanted != pytest.approx(output_error(weight, pruned, x), rel=1e-3)


def test_update_does_not_modify_the_token_weights():
    x, token_weight = ar_inputs(20, 8), torch.rand(20)
    before = x.clone(), token_weight.clone()
    weighted(x, token_weight)
    CrossStats(8, 8).update(x, x, token_weight)
    assert torch.equal(x, before[0])
    assert torch.equal(token_weight, before[1])


# ---- what is kept until the next update


def test_cached_computes_once_for_each_key_and_forgets_at_the_next_update():
    stats, computed = stats_of(ar_inputs(30, 6)), []
    for _ in range(3):
        for key in ("one", ("one", 2)):
            assert stats.cached(key, lambda key=key: computed.append(key) or key) == key
    assert computed == ["one", ("one", 2)]
    stats.update(ar_inputs(1, 6))
    assert stats.cached("one", lambda: "new") == "new"


def test_gram_is_computed_once_and_again_after_an_update():
    x = ar_inputs(80, 12)
    stats = stats_of(x[:50])
    assert stats.gram is stats.gram
    stats.update(x[50:])
    assert_same_means(stats, stats_of(x))


# ---- CrossStats


@pytest.mark.parametrize(
    ("outputs_dtype", "inputs_dtype", "tolerance"),
    [
        (torch.float32, torch.float32, 1e-5),
        (torch.bfloat16, torch.bfloat16, 1e-5),
        (torch.float32, torch.bfloat16, 3e-3),  # outputs are rounded to the inputs' dtype
        (torch.bfloat16, torch.float32, 1e-5),
    ],
    ids=str,
)
@pytest.mark.parametrize("has_weights", [False, True])
@pytest.mark.parametrize(("outputs", "inputs"), [(3, 7), (300, 20), (20, 300)])
def test_cross_mean_equals_float64(
    outputs_dtype, inputs_dtype, tolerance, has_weights: bool, outputs: int, inputs: int
):
    x, y = ar_inputs(90, inputs).to(inputs_dtype), ar_inputs(90, outputs, seed=1).to(outputs_dtype)
    token_weight = torch.arange(90) % 5 + 0.5 if has_weights else torch.ones(90)
    stats = CrossStats(outputs, inputs)
    for start, stop in ((0, 1), (1, 60), (60, 60), (60, 90)):
        part = slice(start, stop)
        stats.update(y[part], x[part], token_weight[part] if has_weights else None)
    weight = token_weight.double()[:, None]
    exact = (y.double() * weight).T @ x.double() / weight.sum()
    scale = y.double().square().mean(0).sqrt()[:, None] * x.double().square().mean(0).sqrt()
    tolerance = max(tolerance, 3e-3 * (has_weights and outputs_dtype is torch.bfloat16))  # weights round outputs
    assert stats.mean.dtype == torch.float32
    assert ((stats.mean - exact) / scale).abs().max() < tolerance


def test_cross_mean_of_inputs_with_themselves_is_their_gram():
    x, token_weight = ar_inputs(90, 40), torch.rand(90, generator=torch.Generator().manual_seed(0))
    stats = CrossStats(40, 40)
    stats.update(x, x, token_weight)
    torch.testing.assert_close(stats.mean, weighted(x, token_weight).gram, rtol=1e-4, atol=1e-4)


def test_cross_mean_sums_bf16_in_fp32():
    """A bf16 sum would stop growing at 512."""
    stats = CrossStats(2, 3)
    for _ in range(300):
        stats.update(torch.ones(2, 2, dtype=torch.bfloat16), torch.ones(2, 3, dtype=torch.bfloat16))
    assert torch.equal(stats.mean, torch.ones(2, 3))
