"""Methods against exact counts, brute force, and what they must beat."""

import pytest
import torch
from helpers import ar_inputs, output_error, random_weight, stats_of
from torch import Tensor

from optimum_sparse.core import NM, InputStats, Needs, NotPositiveDefinite, Pattern, Unstructured
from optimum_sparse.methods import METHODS, Magnitude, SparseGPT, Wanda


ALL = [Magnitude(), Wanda(), SparseGPT()]
NM_PATTERNS = [NM(2, 4), NM(1, 4), NM(3, 5), NM(2, 6), NM(16, 32)]


def name(method) -> str:
    return type(method).__name__


# ---- every method


@pytest.mark.parametrize("method", ALL, ids=name)
@pytest.mark.parametrize("pattern", NM_PATTERNS, ids=str)
@pytest.mark.parametrize("groups", [1, 9, 41])
def test_nm_is_exact_in_every_group_of_every_row(method, pattern: NM, groups: int):
    """Per row: a group is consecutive input columns of one row, never rows of one column."""
    width = groups * pattern.group
    solved = method.solve(random_weight(6, width), stats_of(ar_inputs(64, width)), pattern)
    for row in range(6):
        for start in range(0, width, pattern.group):
            assert int(solved.keep[row, start : start + pattern.group].sum()) == pattern.kept
    assert not solved.weight[~solved.keep].any()


@pytest.mark.parametrize("method", ALL, ids=name)
@pytest.mark.parametrize("sparsity", [0, 0.1, 0.5, 0.615, 0.7, 0.95])
@pytest.mark.parametrize(("rows", "width"), [(1, 5), (7, 100), (5, 128), (3, 300), (8, 515)])
def test_unstructured_is_exact_at_any_width(method, sparsity: float, rows: int, width: int):
    solved = method.solve(random_weight(rows, width), stats_of(ar_inputs(64, width)), Unstructured(sparsity))
    assert int((~solved.keep).sum()) == round(sparsity * rows * width)
    assert not solved.weight[~solved.keep].any()


@pytest.mark.parametrize("method", ALL, ids=name)
def test_sparsity_zero_returns_the_weight(method):
    weight = random_weight(4, 150)
    solved = method.solve(weight, stats_of(ar_inputs(64, 150)), Unstructured(0))
    assert solved.keep.all()
    assert torch.equal(solved.weight, weight)


@pytest.mark.parametrize("method", ALL, ids=name)
@pytest.mark.parametrize("pattern", [NM(2, 4), Unstructured(0.5)], ids=str)
def test_arguments_are_not_modified(method, pattern: Pattern):
    x = ar_inputs(64, 136)
    x[:, 3] = 0
    weight, stats = random_weight(4, 136), stats_of(x)
    before = weight.clone(), stats.gram
    method.solve(weight, stats, pattern)
    assert torch.equal(weight, before[0])
    assert torch.equal(stats.gram, before[1])


@pytest.mark.parametrize("method", ALL, ids=name)
def test_nm_refuses_a_width_that_is_no_multiple(method):
    with pytest.raises(ValueError, match="got 6"):
        method.solve(random_weight(4, 6), stats_of(ar_inputs(20, 6)), NM(2, 4))


def test_names_in_a_config_are_these_three():
    assert {key: method().needs for key, method in METHODS.items()} == {
        "magnitude": Needs.NOTHING,
        "wanda": Needs.DIAGONAL,
        "sparsegpt": Needs.GRAM,
    }


@pytest.mark.parametrize("pattern", [NM(2, 4), NM(4, 8), Unstructured(0.5), Unstructured(0.7)], ids=str)
@pytest.mark.parametrize("seed", [0, 1])
def test_on_correlated_inputs_sparsegpt_beats_wanda_beats_magnitude(pattern: Pattern, seed: int):
    x, unseen = ar_inputs(1600, 256, seed).split(800)
    weight = random_weight(64, 256, seed)
    magnitude, wanda, sparsegpt = (
        output_error(weight, method.solve(weight, stats_of(x), pattern).weight, unseen) for method in ALL
    )
    print("ERR", pattern, seed, sparsegpt, wanda, magnitude)
    assert sparsegpt < 0.7 * wanda
    assert wanda < 0.7 * magnitude


# ---- magnitude, Wanda


@pytest.mark.parametrize("sparsity", [0.2, 0.5, 0.9])
def test_magnitude_keeps_no_weight_smaller_than_one_it_removes(sparsity: float):
    weight = random_weight(9, 131)
    solved = Magnitude().solve(weight, None, Unstructured(sparsity))
    assert weight[solved.keep].abs().min() >= weight[~solved.keep].abs().max()
    assert torch.equal(solved.weight[solved.keep], weight[solved.keep])


def test_magnitude_breaks_ties_by_index():
    solved = Magnitude().solve(torch.tensor([[-1.0, 1.0, -1.0, 1.0]] * 2), None, NM(2, 4))
    assert solved.weight.tolist() == [[-1, 1, 0, 0]] * 2


@pytest.mark.parametrize("sparsity", [0, 0.3, 0.5, 0.615, 0.9])
def test_wanda_compares_within_a_row_and_rows_keep_equal_counts_up_to_one(sparsity: float):
    """Rows differ in size by 1000 times: compared over the matrix, the last would keep everything."""
    x, weight = ar_inputs(50, 33), random_weight(13, 33) * torch.logspace(-2, 1, 13)[:, None]
    solved = Wanda().solve(weight, stats_of(x, Needs.DIAGONAL), Unstructured(sparsity))
    counts = solved.keep.sum(1)
    assert int(counts.max() - counts.min()) <= 1
    assert int(counts.sum()) == 13 * 33 - round(sparsity * 13 * 33)
    score = weight.double().abs() * x.double().norm(dim=0)
    for row in range(13):
        best = score[row].argsort(descending=True)[: counts[row]]
        assert sorted(best.tolist()) == solved.keep[row].nonzero().flatten().tolist()
    assert torch.equal(solved.weight[solved.keep], weight[solved.keep])


def test_wanda_nm_keeps_the_largest_weight_times_input_norm():
    x, weight = ar_inputs(50, 40), random_weight(5, 40)
    keep = Wanda().solve(weight, stats_of(x, Needs.DIAGONAL), NM(2, 4)).keep
    score = (weight.double().abs() * x.double().norm(dim=0)).reshape(-1, 4)
    best = score.topk(2, dim=1).indices.sort(dim=1).values
    assert torch.equal(keep.reshape(-1, 4).nonzero()[:, 1].reshape(-1, 2), best)


# ---- SparseGPT


def brute_force_obs(weight: Tensor, x: Tensor, damping: float, group: int, keep_best) -> tuple[Tensor, Tensor]:
    """Sequential optimal brain surgeon, all in float64, every inverse from scratch.

    Left to right: with columns before j out of the game, removing w_j costs w_j^2 / [inv]_jj, where inv is the inverse
    of the Gram matrix of the columns from j on; the columns after j take over, delta_k = -w_j inv_jk / inv_jj.
    keep_best(score [out, group]) -> bool, asked at the first column of every group about the weights as they are then.
    """
    weight, x = weight.double().clone(), x.double()
    gram = x.T @ x / len(x)
    dead = gram.diagonal() == 0
    mean = gram.diagonal()[~dead].mean()  # a dead input says nothing of the scale of the others
    gram[dead, dead] = mean
    weight[:, dead] = 0
    gram += damping * mean * torch.eye(len(gram), dtype=torch.float64)
    width = len(gram)
    inverses = [torch.linalg.inv(gram[j:, j:]) for j in range(width)]
    price = torch.stack([inverse[0, 0] for inverse in inverses])
    keep = torch.zeros(weight.shape, dtype=torch.bool)
    for j in range(width):
        if j % group == 0:
            keep[:, j : j + group] = keep_best(weight[:, j : j + group] ** 2 / price[j : j + group])
        removed = weight[:, j] * ~keep[:, j]
        weight[:, j:] -= removed[:, None] * inverses[j][0] / price[j]
        weight[:, j] *= keep[:, j]
    return weight, keep


def best_per_row(kept: int):
    def keep_best(score: Tensor) -> Tensor:
        return torch.zeros(score.shape, dtype=torch.bool).scatter_(1, score.topk(kept, dim=1).indices, True)

    return keep_best


def best_of_all(sparsity: float):
    def keep_best(score: Tensor) -> Tensor:
        best = score.flatten().topk(score.numel() - round(sparsity * score.numel())).indices
        return torch.zeros(score.numel(), dtype=torch.bool).index_fill_(0, best, True).reshape(score.shape)

    return keep_best


@pytest.mark.parametrize("pattern", [NM(2, 4), NM(1, 4), NM(3, 5), NM(4, 8), NM(2, 6)], ids=str)
@pytest.mark.parametrize("block_size", [1, 8, 128])
@pytest.mark.parametrize("damping", [0.01, 0.2])
def test_nm_equals_brute_force(pattern: NM, block_size: int, damping: float):
    width = 6 * pattern.group
    x, weight = ar_inputs(200, width), random_weight(5, width)
    solved = SparseGPT(damping, block_size).solve(weight, stats_of(x), pattern)
    expected, keep = brute_force_obs(weight, x, damping, pattern.group, best_per_row(pattern.kept))
    assert torch.equal(solved.keep, keep)
    torch.testing.assert_close(solved.weight.double(), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("sparsity", [0.25, 0.5, 0.75])
@pytest.mark.parametrize("block_size", [1, 4, 10, 40])
def test_unstructured_equals_brute_force(sparsity: float, block_size: int):
    """Eight rows, so that every block's share is a whole number of weights."""
    x, weight = ar_inputs(200, 40), random_weight(8, 40)
    solved = SparseGPT(0.01, block_size).solve(weight, stats_of(x), Unstructured(sparsity))
    expected, keep = brute_force_obs(weight, x, 0.01, block_size, best_of_all(sparsity))
    assert torch.equal(solved.keep, keep)
    torch.testing.assert_close(solved.weight.double(), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("pattern", [NM(2, 4), Unstructured(0.5)], ids=str)
def test_brute_force_with_dead_columns(pattern: Pattern):
    x, weight = ar_inputs(200, 24), random_weight(6, 24)
    dead = [0, 5, 6, 7, 23]
    x[:, dead] = 0
    solved = SparseGPT(block_size=4).solve(weight, stats_of(x), pattern)
    best = best_per_row(2) if isinstance(pattern, NM) else best_of_all(0.5)
    expected, keep = brute_force_obs(weight, x, 0.01, 4, best)
    live = [column for column in range(24) if column not in dead]
    torch.testing.assert_close(solved.weight.double(), expected, rtol=1e-3, atol=1e-3)
    assert torch.equal(solved.keep[:, live], keep[:, live])
    assert not solved.weight[:, dead].any()


@pytest.mark.parametrize("pattern", [NM(2, 4), Unstructured(0.5)], ids=str)
def test_the_scale_of_the_inputs_does_not_matter(pattern: Pattern):
    """Not even where some are dead: what stands in for them must have the scale of the others."""
    x, weight = ar_inputs(400, 64), random_weight(8, 64)
    x[:, ::5] = 0
    solved = [SparseGPT().solve(weight, stats_of(x * scale), pattern) for scale in (1, 2**-10)]
    assert torch.equal(solved[0].keep, solved[1].keep)
    torch.testing.assert_close(solved[0].weight, solved[1].weight)


@pytest.mark.parametrize("pattern", [NM(2, 4), Unstructured(0.7)], ids=str)
def test_inputs_that_are_all_zero_give_a_zero_weight(pattern: Pattern):
    solved = SparseGPT().solve(random_weight(3, 8), stats_of(torch.zeros(10, 8)), pattern)
    assert not solved.weight.any()


@pytest.mark.parametrize("pattern", [NM(2, 4), Unstructured(0.5)], ids=str)
def test_fewer_tokens_than_inputs(pattern: Pattern):
    x, weight = ar_inputs(20, 160), random_weight(12, 160)
    solved = SparseGPT(damping=0.01).solve(weight, stats_of(x), pattern)
    assert torch.isfinite(solved.weight).all()
    assert output_error(weight, solved.weight, x) < output_error(
        weight, Wanda().solve(weight, stats_of(x), pattern).weight, x
    )
    with pytest.raises(NotPositiveDefinite, match="damping=0"):
        SparseGPT(damping=0).solve(weight, stats_of(x), pattern)


@pytest.mark.parametrize("pattern", [NM(2, 4), NM(3, 5), NM(16, 32)], ids=str)
def test_block_size_does_not_change_nm(pattern: NM):
    """It only groups updates. Also a block that is no multiple of the group, or smaller than it."""
    x, weight = ar_inputs(600, 320), random_weight(8, 320)
    reference = SparseGPT(block_size=128).solve(weight, stats_of(x), pattern)
    for block_size in (1, 32, 50, 320, 1000):
        solved = SparseGPT(block_size=block_size).solve(weight, stats_of(x), pattern)
        same = (solved.keep == reference.keep).all(1)
        assert same.float().mean() >= 0.75, "rounding may turn a tie in a row, and all that follows in this row"
        torch.testing.assert_close(solved.weight[same], reference.weight[same], rtol=1e-2, atol=1e-3)


def test_a_factor_is_computed_once_for_layers_that_share_inputs(monkeypatch: pytest.MonkeyPatch):
    computed = []
    original = InputStats.gram.fget
    monkeypatch.setattr(InputStats, "gram", property(lambda self: computed.append(1) or original(self)))
    stats = stats_of(ar_inputs(50, 16))
    for seed in range(3):
        SparseGPT().solve(random_weight(4, 16, seed), stats, NM(2, 4))
    assert len(computed) == 1
