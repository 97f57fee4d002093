"""Methods against exact counts, brute force, and what they must beat."""

from itertools import accumulate, product

import pytest
import torch
from helpers import ar_inputs, output_error, random_weight, stats_of
from torch import Tensor

from optimum_sparse.core import NM, InputStats, Needs, NotPositiveDefinite, Pattern, Unstructured
from optimum_sparse.methods import METHODS, Admm, Magnitude, Polished, Rose, SparseGPT, Wanda
from optimum_sparse.methods.wanda import _kept_by_row


ALWAYS = Rose(threshold=0.0)  # reorders every layer that has two unequal blocks
ALL = [Magnitude(), Wanda(), SparseGPT(), Rose(), ALWAYS, Admm(), Polished(SparseGPT())]
NM_PATTERNS = [NM(2, 4), NM(1, 4), NM(3, 5), NM(2, 6), NM(16, 32)]


def name(method) -> str:
    inner = f"({name(method.method)})" if isinstance(method, Polished) else ""
    return f"{type(method).__name__}{inner}" + "-always" * (method == ALWAYS)


def row_errors(weight: Tensor, pruned: Tensor, x: Tensor) -> Tensor:
    """Sum over tokens of (x (pruned - weight)^T)^2 in float64, one number per row."""
    return (x.double() @ (pruned.double() - weight.double()).T).square().sum(0)


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
    tolerance = 2e-3 if isinstance(method, Admm) else 0  # it solves for what it was given
    torch.testing.assert_close(solved.weight, weight, rtol=0, atol=tolerance)


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


def test_names_in_a_config_are_these_five():
    assert {key: method().needs for key, method in METHODS.items()} == {
        "magnitude": Needs.NOTHING,
        "wanda": Needs.DIAGONAL,
        "sparsegpt": Needs.GRAM,
        "rose": Needs.GRAM,
        "admm": Needs.GRAM,
    }


@pytest.mark.parametrize("pattern", [NM(2, 4), NM(4, 8), Unstructured(0.5), Unstructured(0.7)], ids=str)
@pytest.mark.parametrize("seed", [0, 1])
def test_on_correlated_inputs_each_method_beats_the_one_before(pattern: Pattern, seed: int):
    x, unseen = ar_inputs(1600, 256, seed).split(800)
    weight = random_weight(64, 256, seed)
    for tokens in (x, unseen):
        magnitude, wanda, sparsegpt, polished, admm = (
            output_error(weight, method.solve(weight, stats_of(x), pattern).weight, tokens)
            for method in (Magnitude(), Wanda(), SparseGPT(), Polished(SparseGPT()), Admm())
        )
        assert wanda < 0.7 * magnitude
        assert sparsegpt < 0.7 * wanda
        assert polished < 0.7 * sparsegpt
        assert admm < 0.95 * polished


@pytest.mark.parametrize("method", [SparseGPT(), Rose(threshold=1.0), Admm(), Polished(SparseGPT())], ids=name)
@pytest.mark.parametrize("pattern", NM_PATTERNS, ids=str)
def test_scaled_rows_give_scaled_nm_solutions(method, pattern: Pattern):
    """Bit for bit under powers of two: rows do not compete. (In Rose they do for its order, which it keeps here.)"""
    x, weight = ar_inputs(300, 3 * pattern.group), random_weight(6, 3 * pattern.group)
    scale = torch.tensor([1, 2.0**12, 2.0**-12, 8, 0.5, 2.0**-3])[:, None]
    solved = method.solve(weight, stats_of(x), pattern)
    scaled = method.solve(weight * scale, stats_of(x), pattern)
    assert torch.equal(scaled.keep, solved.keep)
    assert torch.equal(scaled.weight, solved.weight * scale)


@pytest.mark.parametrize("method", ALL, ids=name)
@pytest.mark.parametrize("pattern", [NM(2, 4), Unstructured(0.6)], ids=str)
def test_a_scaled_weight_gives_a_scaled_solution(method, pattern: Pattern):
    x, weight = ar_inputs(300, 260), random_weight(6, 260)
    solved, scaled = (method.solve(weight * scale, stats_of(x), pattern) for scale in (1, 2.0**-9))
    assert torch.equal(scaled.keep, solved.keep)
    assert torch.equal(scaled.weight, solved.weight * 2.0**-9)


@pytest.mark.parametrize("method", ALL, ids=name)
@pytest.mark.parametrize("pattern", [NM(2, 4), Unstructured(0.5)], ids=str)
@pytest.mark.parametrize("tokens", [1, 20, 300])
def test_dead_inputs_and_few_tokens_give_exact_finite_solutions(method, pattern: Pattern, tokens: int):
    x, weight = ar_inputs(tokens, 160), random_weight(12, 160)
    x[:, ::7] = 0
    x[:, 128:148] = 0
    solved = method.solve(weight, stats_of(x), pattern)
    assert torch.isfinite(solved.weight).all()
    assert solved.weight.dtype == torch.float32
    assert int((~solved.keep).sum()) == 12 * 160 // 2
    assert not solved.weight[~solved.keep].any()
    if not isinstance(method, Magnitude | Wanda):
        tolerance = 1e-3 if isinstance(method, Admm) else 0
        assert solved.weight[:, ::7].abs().max() <= tolerance
    assert row_errors(weight, solved.weight, x).sum() < row_errors(weight, weight * 0, x).sum()


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


@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.5, 0.55, 0.7, 0.999])
def test_wanda_keeps_as_many_in_the_first_rows_as_the_pattern_says(sparsity: float):
    """To the weight, also where a half is rounded."""
    pattern = Unstructured(sparsity)
    for width in (1, 3, 7, 10, 4096):
        kept = _kept_by_row(pattern, 300, width).flatten().cumsum(0)
        assert kept.tolist() == [pattern.kept(row * width) for row in range(1, 301)]


def test_wanda_nm_keeps_the_largest_weight_times_input_norm():
    x, weight = ar_inputs(50, 40), random_weight(5, 40)
    keep = Wanda().solve(weight, stats_of(x, Needs.DIAGONAL), NM(2, 4)).keep
    score = (weight.double().abs() * x.double().norm(dim=0)).reshape(-1, 4)
    best = score.topk(2, dim=1).indices.sort(dim=1).values
    assert torch.equal(keep.reshape(-1, 4).nonzero()[:, 1].reshape(-1, 2), best)


# ---- SparseGPT


def brute_force_obs(
    weight: Tensor, x: Tensor, damping: float, group: int, keep_best, widths: list[int] | None = None
) -> tuple[Tensor, Tensor]:
    """Sequential optimal brain surgeon, all in float64, every inverse from scratch.

    Left to right: with columns before j out of the game, removing w_j costs w_j^2 / [inv]_jj, where inv is the inverse
    of the Gram matrix of the columns from j on; the columns after j take over, delta_k = -w_j inv_jk / inv_jj.
    keep_best(score [out, group]) -> bool, asked at the first column of every group about the weights as they are then.
    `widths` of the groups, if they are not all `group` wide.
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
    widths = widths or [len(part) for part in torch.arange(width).split(group)]
    ends = dict(zip(accumulate([0, *widths[:-1]]), accumulate(widths), strict=True))
    for j in range(width):
        if j in ends:
            keep[:, j : ends[j]] = keep_best(weight[:, j : ends[j]] ** 2 / price[j : ends[j]])
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


# ---- Rose


def columnar_inputs(tokens: int, width: int, large: int, factor: float = 10.0, seed: int = 0) -> Tensor:
    """Correlated, all of size one, but for the last `large`, which are `factor` times that."""
    x = ar_inputs(tokens, width, seed)
    x /= x.square().mean(0).sqrt()
    x[:, width - large :] *= factor
    return x


@pytest.mark.parametrize(
    ("pattern", "width", "large"),
    [
        (NM(2, 4), 256, 16),
        (NM(2, 4), 300, 8),
        (NM(4, 8), 256, 16),
        (Unstructured(0.5), 515, 16),
        (Unstructured(0.7), 515, 16),
        (Unstructured(0.5), 300, 32),
    ],
    ids=str,
)
@pytest.mark.parametrize("seed", [0, 1])
def test_rose_beats_sparsegpt_where_large_columns_come_last(pattern: Pattern, width: int, large: int, seed: int):
    """Last, they are compensated by nothing."""
    x, weight = columnar_inputs(800, width, large, seed=seed), random_weight(64, width, seed)
    rose, sparsegpt = (method.solve(weight, stats_of(x), pattern) for method in (Rose(), SparseGPT()))
    assert rose.note == "reordered"
    assert output_error(weight, rose.weight, x) < 0.9 * output_error(weight, sparsegpt.weight, x)


@pytest.mark.parametrize("pattern", [NM(2, 4), NM(4, 8), Unstructured(0.5), Unstructured(0.7)], ids=str)
@pytest.mark.parametrize("width", [64, 136, 256, 304, 520])
def test_rose_is_sparsegpt_on_even_layers(pattern: Pattern, width: int):
    """Bit for bit. A last block of a few columns is no reason to reorder."""
    stats, weight = stats_of(columnar_inputs(600, width, 0)), random_weight(256, width)
    rose, sparsegpt = (method.solve(weight, stats, pattern) for method in (Rose(), SparseGPT()))
    assert rose.note == ""
    assert torch.equal(rose.keep, sparsegpt.keep)
    assert torch.equal(rose.weight, sparsegpt.weight)


@pytest.mark.parametrize("pattern", [NM(2, 4), Unstructured(0.5)], ids=str)
def test_threshold_decides_between_sparsegpt_and_reordering(pattern: Pattern):
    """Nothing exceeds 1: not even where a block is dead, and the relative range of the losses is 1."""
    x, weight = columnar_inputs(300, 300, 40), random_weight(16, 300)
    x[:, :128] = 0
    reference = SparseGPT().solve(weight, stats_of(x), pattern)
    for threshold, fires in ((0.0, True), (0.3, True), (0.5, True), (0.999, True), (1.0, False)):
        solved = Rose(threshold=threshold).solve(weight, stats_of(x), pattern)
        assert solved.note == ("reordered" if fires else "")
        assert torch.equal(solved.weight, reference.weight) is not fires


@pytest.mark.parametrize("pattern", [NM(2, 4), Unstructured(0.5)], ids=str)
@pytest.mark.parametrize(("ratio", "fires"), [(0.55, False), (0.45, True)])
def test_threshold_is_the_relative_range_of_block_losses(pattern: Pattern, ratio: float, fires: bool):
    """Two kinds of blocks, equal but for their scale: (max - min) / max = 1 - ratio, against 0.5."""
    unit = torch.tensor([1.0, 0.2, 0.3, 2.0]).repeat(4, 32)
    weight = torch.cat([unit * ratio, unit, unit * ratio], 1)
    solved = Rose().solve(weight, stats_of(torch.eye(384)), pattern)
    assert solved.note == "reordered" * fires


@pytest.mark.parametrize(
    ("pattern", "width"),
    [(NM(2, 4), 300), (NM(3, 6), 240), (NM(16, 32), 160), (Unstructured(0.5), 300), (Unstructured(0.75), 129)],
    ids=str,
)
def test_rose_puts_every_column_back(pattern: Pattern, width: int):
    """Uncorrelated inputs: kept weights stay as they are, and what is compared with what depends on no order."""
    weight, stats = random_weight(8, width) * torch.linspace(0.1, 3, width), stats_of(torch.eye(width))
    solved = ALWAYS.solve(weight, stats, pattern)
    assert solved.note == "reordered"
    assert torch.equal(solved.weight, weight * solved.keep)
    assert torch.equal(solved.keep, SparseGPT().solve(weight, stats, pattern).keep)


def rose_order(weight: Tensor, x: Tensor, pattern: Pattern, block_size: int) -> tuple[Tensor, list[int]]:
    """(order of the columns, widths of the blocks in this order), from the paper, in float64."""
    score = weight.double().abs() * x.double().square().mean(0).sqrt()
    unit = pattern.group if isinstance(pattern, NM) else block_size
    blocks = []
    for start in range(0, weight.shape[1], unit):
        part = score[:, start : start + unit]
        rows = part if isinstance(pattern, NM) else part.reshape(1, -1)
        smallest = rows.argsort(dim=1)[:, : round(pattern.sparsity * rows.shape[1])]
        lost = torch.zeros_like(rows).scatter(1, smallest, rows.gather(1, smallest)).reshape(part.shape).sum(0)
        columns = list(range(start, start + part.shape[1]))
        if isinstance(pattern, Unstructured):
            columns.sort(key=lambda column, lost=lost, start=start: -lost[column - start].item())
        blocks.append((lost.mean().item(), columns))
    blocks.sort(key=lambda block: -block[0])
    return torch.tensor([column for _, columns in blocks for column in columns]), [len(b) for _, b in blocks]


@pytest.mark.parametrize(
    ("pattern", "width"),
    [(NM(2, 4), 48), (NM(3, 5), 40), (NM(2, 6), 36), (Unstructured(0.5), 43), (Unstructured(0.75), 48)],
    ids=str,
)
@pytest.mark.parametrize("seed", [0, 1])
def test_rose_equals_brute_force_in_its_order(pattern: Pattern, width: int, seed: int):
    """Eight rows, so that every block's share is a whole number. The last block, narrower or not, goes first."""
    x, weight = ar_inputs(300, width, seed), random_weight(8, width, seed)
    x[:, width // 8 * 8 - 8 * (width % 8 == 0) :] *= 5
    order, widths = rose_order(weight, x, pattern, 8)
    best = best_per_row(pattern.kept) if isinstance(pattern, NM) else best_of_all(pattern.sparsity)
    expected, keep = brute_force_obs(weight[:, order], x[:, order], 0.01, 8, best, widths)
    solved = Rose(0.01, 8, threshold=0.0).solve(weight, stats_of(x), pattern)
    assert order[0] > order[-1]
    assert torch.equal(solved.keep[:, order], keep)
    torch.testing.assert_close(solved.weight[:, order].double(), expected, rtol=1e-3, atol=1e-3)


# ---- Polished


@pytest.mark.parametrize("method", [Magnitude(), Wanda(), SparseGPT(), ALWAYS, Admm()], ids=name)
@pytest.mark.parametrize("pattern", [NM(2, 4), Unstructured(0.6)], ids=str)
@pytest.mark.parametrize("inputs", ["correlated", "few tokens", "dead"])
def test_polished_has_the_same_mask_and_no_row_with_a_larger_error(method, pattern: Pattern, inputs: str):
    x, weight = ar_inputs(20 if inputs == "few tokens" else 400, 160), random_weight(12, 160)
    if inputs == "dead":
        x[:, ::3] = 0
    stats = stats_of(x)
    rough, polished = (m.solve(weight, stats, pattern) for m in (method, Polished(method)))
    assert torch.equal(polished.keep, rough.keep)
    assert polished.note == rough.note
    assert not polished.weight[~rough.keep].any()
    before, after = row_errors(weight, rough.weight, x), row_errors(weight, polished.weight, x)
    assert (after <= before + 1e-6 * row_errors(weight, weight * 0, x)).all()
    if not isinstance(method, Admm):
        assert after.sum() < 0.9 * before.sum()


@pytest.mark.parametrize("method", [Magnitude(), Wanda(), SparseGPT(), ALWAYS], ids=name)
@pytest.mark.parametrize("pattern", [NM(2, 4), Unstructured(0.6)], ids=str)
def test_polished_with_enough_iterations_equals_least_squares_on_the_mask(method, pattern: Pattern):
    x, weight = ar_inputs(300, 32), random_weight(6, 32)
    solved = Polished(method, damping=0.0, iterations=60).solve(weight, stats_of(x), pattern)
    outputs = x.double() @ weight.double().T
    for row, kept in enumerate(solved.keep):
        left = x.double()[:, kept]
        best = (left @ torch.linalg.lstsq(left, outputs[:, row]).solution - outputs[:, row]).square().sum()
        error = row_errors(weight, solved.weight, x)[row]
        assert best * (1 - 1e-9) <= error <= best * 1.01 + 1e-6 * outputs[:, row].square().sum()


# ---- Admm


def smallest_error(weight: Tensor, x: Tensor, pattern: Pattern) -> float:
    """Over all masks: least squares for every subset of columns of every row, then the best split of the kept ones."""
    width, outputs, x = weight.shape[1], x.double() @ weight.double().T, x.double()
    best = {0: 0.0}  # number of kept weights so far -> smallest error so far
    for row in range(len(weight)):
        after: dict[int, float] = {}
        for mask in product([False, True], repeat=width):
            kept = torch.tensor(mask)
            if isinstance(pattern, NM) and (kept.reshape(-1, pattern.group).sum(1) != pattern.kept).any():
                continue
            y = outputs[:, row]
            error = (y - x[:, kept] @ torch.linalg.lstsq(x[:, kept], y).solution if any(mask) else y).square().sum()
            for count, so_far in best.items():
                total = count + sum(mask)
                after[total] = min(after.get(total, torch.inf), so_far + error.item())
        best = after
    return best[
        pattern.kept * weight.numel() // pattern.group if isinstance(pattern, NM) else pattern.kept(weight.numel())
    ]


@pytest.mark.parametrize(
    ("pattern", "rows", "width"),
    [(Unstructured(0.5), 1, 6), (NM(2, 4), 1, 8), (NM(3, 6), 2, 6), (Unstructured(0.6), 2, 5)],
    ids=str,
)
def test_admm_is_near_the_best_of_all_masks_and_never_below_it(pattern: Pattern, rows: int, width: int):
    ratios = []
    for seed in range(8):
        x, weight = ar_inputs(100, width, seed), random_weight(rows, width, seed)
        solved = Admm(damping=0.0, polish=20).solve(weight, stats_of(x), pattern)
        ratios.append(row_errors(weight, solved.weight, x).sum().item() / smallest_error(weight, x, pattern))
    assert min(ratios) > 1 - 1e-4
    assert max(ratios) < 3
    assert sum(ratios) / 8 < 1.3
    assert sorted(ratios)[2] < 1.001, "at least three of eight are the best there is"


@pytest.mark.parametrize("pattern", [NM(2, 4), NM(1, 4), NM(4, 8), Unstructured(0.5), Unstructured(0.8)], ids=str)
@pytest.mark.parametrize("tokens", [40, 600])
def test_admm_errs_less_than_sparsegpt_polished_in_the_mean_also_with_few_tokens(pattern: Pattern, tokens: int):
    errors = torch.zeros(2)
    for seed in range(4):
        x, weight = ar_inputs(tokens, 128, seed), random_weight(24, 128, seed)
        for index, method in enumerate((Admm(), Polished(SparseGPT()))):
            errors[index] += output_error(weight, method.solve(weight, stats_of(x), pattern).weight, x)
    assert errors[0] < errors[1]


@pytest.mark.parametrize("pattern", [NM(2, 4), NM(3, 5), Unstructured(0.5), Unstructured(0.8)], ids=str)
@pytest.mark.parametrize("base", [2.0, 3.0])
def test_admm_does_not_care_in_what_units_inputs_are_measured(pattern: Pattern, base: float):
    """x_j * c_j and W_j / c_j: the outputs are the same, so is the problem. Bit for bit under powers of two."""
    x, weight = ar_inputs(300, 40), random_weight(8, 40)
    scale = base ** (torch.arange(40) % 9 - 4)
    solved = Admm().solve(weight, stats_of(x), pattern)
    scaled = Admm().solve(weight / scale, stats_of(x * scale), pattern)
    assert torch.equal(scaled.keep, solved.keep)
    tolerance = 0 if base == 2 else 1e-3
    torch.testing.assert_close(scaled.weight * scale, solved.weight, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("pattern", [NM(2, 4), NM(4, 8), Unstructured(0.5), Unstructured(0.9)], ids=str)
def test_admm_on_uncorrelated_inputs_is_near_the_best_which_is_the_largest_weight_times_input_norm(pattern: Pattern):
    """Every weight is then a problem of its own: what is kept stays as it is, and the best mask is known."""
    size, weight = torch.linspace(0.1, 10, 120), random_weight(20, 120)
    solved = Admm().solve(weight, stats_of(torch.diag(size)), pattern)
    torch.testing.assert_close(solved.weight, weight * solved.keep, rtol=1e-4, atol=1e-5)
    best = Magnitude().solve(weight * size, None, pattern).keep
    error, least = ((weight * size)[~keep].double().square().sum() for keep in (solved.keep, best))
    assert least <= error < 1.02 * least


@pytest.mark.parametrize("pattern", [Unstructured(0.0), Unstructured(0.001)], ids=str)
@pytest.mark.parametrize("tokens", [10, 300])
def test_admm_that_may_keep_everything_returns_the_weight_but_for_dead_inputs(pattern: Pattern, tokens: int):
    x, weight = ar_inputs(tokens, 40), random_weight(6, 40)
    dead = torch.arange(40) % 5 == 2
    x[:, dead] = 0
    solved = Admm().solve(weight, stats_of(x), pattern)
    assert solved.keep.all()
    torch.testing.assert_close(solved.weight, weight * ~dead, rtol=0, atol=2e-3)


@pytest.mark.parametrize("tokens", [20, 300])
def test_admm_gives_dead_inputs_exactly_zero(tokens: int):
    x, weight = ar_inputs(tokens, 40), random_weight(6, 40)
    x[:, 2::5] = 0
    assert not Admm().solve(weight, stats_of(x), Unstructured(0.1)).weight[:, 2::5].any()


def test_admm_with_nothing_to_keep_or_nothing_but_zeros_gives_zeros():
    x, weight = ar_inputs(50, 12), random_weight(3, 12)
    assert not Admm().solve(weight, stats_of(x), Unstructured(0.99)).weight.any()
    assert not Admm().solve(weight * 0, stats_of(x), NM(2, 4)).weight.any()
    assert not Admm().solve(weight, stats_of(x * 0), NM(2, 4)).weight.any()


@pytest.mark.parametrize("pattern", [NM(2, 4), Unstructured(0.5)], ids=str)
def test_admm_of_no_iterations_is_polished_wanda_per_matrix(pattern: Pattern):
    """What it starts from: magnitudes of the scaled weights."""
    x, weight = ar_inputs(200, 24), random_weight(6, 24)
    solved = Admm(iterations=0).solve(weight, stats_of(x), pattern)
    assert solved.note == "0 iterations"
    assert torch.equal(solved.keep, Magnitude().solve(weight * x.square().mean(0).sqrt(), None, pattern).keep)
    rough = row_errors(weight, weight * solved.keep, x)
    assert (row_errors(weight, solved.weight, x) <= rough).all()


@pytest.mark.parametrize(
    "iterations",
    [1, 3, 4, 30],
)
def test_admm_makes_no_more_iterations_than_it_may(iterations: int):
    x, weight = ar_inputs(200, 64), random_weight(16, 64)
    note = Admm(iterations=iterations).solve(weight, stats_of(x), Unstructured(0.6)).note
    assert 0 < int(note.removesuffix(" iterations")) <= iterations


def test_admm_decomposes_once_for_layers_that_share_inputs(monkeypatch: pytest.MonkeyPatch):
    decomposed = []
    eigh = torch.linalg.eigh
    monkeypatch.setattr(torch.linalg, "eigh", lambda matrix: decomposed.append(1) or eigh(matrix))
    stats = stats_of(ar_inputs(50, 16))
    for seed in range(3):
        Admm().solve(random_weight(4, 16, seed), stats, NM(2, 4))
    assert len(decomposed) == 1
    stats.update(ar_inputs(50, 16, seed=1))
    Admm().solve(random_weight(4, 16), stats, NM(2, 4))
    assert len(decomposed) == 2
