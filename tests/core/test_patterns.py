"""Exact counts, the right winners, ties by index."""

import pytest
import torch
from helpers import random_weight
from hypothesis import given, settings
from hypothesis import strategies as st

from optimum_sparse.core import (
    NM,
    Unstructured,
    exactly,
    keep_mask,
    keep_top,
    parse_pattern,
    patterns_of,
    violation,
)
from optimum_sparse.core.patterns import KNOWN


NM_PATTERNS = [NM(2, 4), NM(1, 4), NM(3, 4), NM(3, 5), NM(2, 6), NM(4, 8), NM(16, 32)]


def groups_of(matrix: torch.Tensor, group: int) -> list[torch.Tensor]:
    """Every run of `group` columns of every row, cut by hand."""
    rows, width = matrix.shape
    return [matrix[row, start : start + group] for row in range(rows) for start in range(0, width, group)]


@pytest.mark.parametrize("pattern", NM_PATTERNS, ids=str)
@pytest.mark.parametrize("rows", [1, 3])
def test_nm_keeps_the_best_n_of_every_group_of_a_row(pattern: NM, rows: int):
    score = random_weight(rows, 5 * pattern.group)
    keep = keep_mask(score, pattern)
    for values, kept in zip(groups_of(score, pattern.group), groups_of(keep, pattern.group), strict=True):
        best = sorted(range(pattern.group), key=lambda column: -values[column])[: pattern.kept]
        assert kept.nonzero().flatten().tolist() == sorted(best)


@pytest.mark.parametrize("sparsity", [0, 0.1, 1 / 3, 0.5, 0.66, 0.7, 0.9, 0.999])
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (5, 130), (16, 257)])
def test_unstructured_removes_exactly_the_rounded_share_and_the_smallest_scores(shape: tuple, sparsity: float):
    score = random_weight(*shape)
    keep = keep_mask(score, Unstructured(sparsity))
    removed = round(sparsity * score.numel())
    assert int((~keep).sum()) == removed
    smallest = score.flatten().argsort()[:removed]
    assert not keep.flatten()[smallest].any()


def test_sparsity_zero_removes_nothing_even_if_all_scores_are_zero():
    assert keep_mask(torch.zeros(3, 5), Unstructured(0)).all()


def test_unstructured_compares_over_the_whole_matrix():
    score = torch.tensor([[9.0, 8.0, 7.0, 6.0], [1.0, 2.0, 3.0, 4.0]])
    assert keep_mask(score, Unstructured(0.5)).tolist() == [[True] * 4, [False] * 4]


@pytest.mark.parametrize("pattern", [NM(2, 4), NM(3, 5), Unstructured(0.5), Unstructured(0.35)], ids=str)
def test_ties_go_to_the_lower_index_and_counts_stay_exact(pattern):
    keep = keep_mask(torch.ones(2, 20), pattern)
    if isinstance(pattern, NM):
        row = ([True] * pattern.kept + [False] * (pattern.group - pattern.kept)) * (20 // pattern.group)
        assert keep.tolist() == [row, row]
    else:
        kept = 40 - round(pattern.sparsity * 40)
        assert keep.flatten().tolist() == [True] * kept + [False] * (40 - kept)


@given(
    scores=st.lists(st.integers(-2, 2), min_size=1, max_size=24),
    data=st.data(),
)
def test_keep_top_equals_a_stable_sort(scores: list[int], data: st.DataObject):
    """Few distinct values: nearly every draw has ties at the threshold."""
    kept = data.draw(st.integers(0, len(scores)))
    winners = sorted(range(len(scores)), key=lambda index: (-scores[index], index))[:kept]
    expected = [index in winners for index in range(len(scores))]
    score = torch.tensor([scores], dtype=torch.float32)
    assert keep_top(score, kept)[0].tolist() == expected
    assert keep_top(score, torch.tensor([[kept]]))[0].tolist() == expected


@pytest.mark.parametrize(("kept", "n"), [(1, 2), (1, 4), (2, 4), (3, 4), (3, 5), (4, 8)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8])
def test_keep_top_of_very_many_short_rows_equals_a_stable_sort(kept: int, n: int, dtype: torch.dtype):
    """With ties, and more rows than are taken at a time."""
    score = torch.randint(0, 5, (2**16 + 3, n), generator=torch.Generator().manual_seed(0)).to(dtype)
    best = score.argsort(dim=1, descending=True, stable=True)[:, :kept]
    assert torch.equal(keep_top(score, kept), torch.zeros(score.shape, dtype=torch.bool).scatter_(1, best, True))


def test_keep_top_takes_a_number_for_each_row():
    kept = torch.tensor([[0], [1], [6], [3]])
    keep = keep_top(random_weight(4, 6), kept)
    assert keep.sum(1).tolist() == [0, 1, 6, 3]


def test_keep_mask_does_not_modify_the_score():
    score = random_weight(4, 8)
    before = score.clone()
    keep_mask(score, NM(2, 4))
    keep_mask(score, Unstructured(0.5))
    assert torch.equal(score, before)


@pytest.mark.parametrize("width", [6, 2, 129])
def test_nm_refuses_a_width_that_is_no_multiple_although_the_matrix_size_is_one(width: int):
    with pytest.raises(ValueError, match=rf"2:4 .*got {width}"):
        keep_mask(torch.ones(4, width), NM(2, 4))
    with pytest.raises(ValueError, match=rf"2:4 .*got {width}"):
        violation(torch.zeros(4, width), NM(2, 4))


@pytest.mark.parametrize("pattern", [*NM_PATTERNS, Unstructured(0), Unstructured(0.3), Unstructured(0.5)], ids=str)
def test_violation_accepts_what_keep_mask_makes_and_names_one_weight_too_many(pattern):
    weight = random_weight(3, 480)
    keep = keep_mask(weight.abs(), pattern)
    assert violation(weight * keep, pattern) is None
    assert violation(torch.zeros_like(weight), pattern) is None, "fewer non-zeros than allowed are fine"
    if keep.all():
        return
    keep[tuple((~keep).nonzero()[-1])] = True
    assert violation(weight * keep, pattern) is not None
    assert violation(torch.full_like(weight, torch.nan), pattern) == "it holds NaN", "of training that diverged, say"


@pytest.mark.parametrize(
    ("text", "sparsity", "expected"),
    [
        ("2:4", None, NM(2, 4)),
        ("2:4", 0.5, NM(2, 4)),
        ("1:4", 0.75, NM(1, 4)),
        ("2:3", 1 / 3, NM(2, 3)),
        ("unstructured", None, Unstructured(0.5)),
        ("unstructured", 0, Unstructured(0)),
        ("unstructured", 0.7, Unstructured(0.7)),
    ],
)
def test_parse_pattern(text: str, sparsity: float | None, expected):
    assert parse_pattern(text, sparsity) == expected


@pytest.mark.parametrize("pattern", NM_PATTERNS, ids=str)
def test_text_of_an_nm_pattern_names_it(pattern: NM):
    assert parse_pattern(str(pattern)) == pattern
    assert pattern.sparsity == pytest.approx(1 - pattern.kept / pattern.group)


@given(weights=st.integers(0, 10**6), sparsity=st.floats(0, 1, exclude_max=True))
def test_kept_is_within_half_a_weight_of_the_asked_share(weights: int, sparsity: float):
    kept = Unstructured(sparsity).kept(weights)
    assert 0 <= kept <= weights
    assert abs((weights - kept) - sparsity * weights) <= 0.5 + 1e-6


@pytest.mark.parametrize(
    ("pattern", "follows"),
    [
        (NM(1, 4), ["1:4", "1:2", "2:4", "4:8", "8:16", "16:32"]),
        (NM(1, 2), ["1:2", "2:4", "4:8", "8:16", "16:32"]),
        (NM(4, 8), ["4:8", "8:16", "16:32"]),
        (NM(3, 4), []),
        (Unstructured(0.5), []),
        (Unstructured(0.0), []),
    ],
    ids=str,
)
def test_which_patterns_a_matrix_follows(pattern, follows):
    weight = random_weight(8, 64)
    weight = weight * keep_mask(weight.abs(), pattern)
    assert [str(found) for found in patterns_of(weight)] == follows
    assert patterns_of(weight[:, :60]) == [
        p for p in KNOWN if 60 % p.group == 0 and violation(weight[:, :60], p) is None
    ]


@settings(max_examples=60, deadline=None)
@given(rows=st.integers(1, 9), columns=st.integers(1, 50), zeros=st.floats(0, 1))
def test_exactly_leaves_no_room(rows, columns, zeros):
    weight = torch.ones(rows * columns)
    weight[: round(zeros * rows * columns)] = 0
    kept = exactly(weight.view(rows, columns)).kept(rows * columns)
    assert kept == max(1, int(weight.count_nonzero()))
