"""The Triton kernel of `sweep_block` on whole SparseGPT layers, against the reference on the same device."""

import pytest
import real_layers
import torch
from helpers import ar_inputs, random_weight, stats_of
from torch import Tensor

from optimum_sparse.core import NM, InputStats, Needs, Pattern, Solved, Unstructured, column_sweep, sweep_block
from optimum_sparse.core import sweep as core_sweep
from optimum_sparse.core.sweep import sweep_block_reference
from optimum_sparse.kernels import sweep


pytestmark = pytest.mark.gpu
PATTERNS = [NM(2, 4), NM(4, 8), NM(8, 16), NM(16, 32), NM(1, 4), NM(3, 4), Unstructured(0.5), Unstructured(0.7)]
_stats: dict[int, InputStats] = {}


def stats_for(width: int) -> InputStats:
    """Of correlated inputs, on the device; computed once per width."""
    if width not in _stats:
        stats = InputStats(width, Needs.GRAM, "cuda")
        stats.update(ar_inputs(2 * width, width).cuda())
        _stats[width] = stats
    return _stats[width]


def both(
    weight: Tensor, factor: Tensor, pattern: Pattern, monkeypatch: pytest.MonkeyPatch, block_size: int = 128
) -> tuple[Solved, Solved, int]:
    """The layer by the op and by the reference, and how many blocks the kernel has swept."""
    blocks = []
    launch = sweep.sweep_block_triton
    with monkeypatch.context() as patch:
        patch.setattr(sweep, "sweep_block_triton", lambda *args: (blocks.append(args[0].shape), launch(*args))[1])
        solved = column_sweep(weight, factor, pattern, block_size=block_size)
    with monkeypatch.context() as patch:
        patch.setattr(core_sweep, "sweep_block", sweep_block_reference)
        expected = column_sweep(weight, factor, pattern, block_size=block_size)
    return solved, expected, len(blocks)


def assert_same_layer(solved: Solved, expected: Solved, weight: Tensor, stats: InputStats) -> None:
    assert solved.weight.isfinite().all()
    assert torch.equal(solved.weight != 0, solved.keep)
    assert int(solved.keep.sum()) == int(expected.keep.sum())
    assert (solved.keep == expected.keep).float().mean() >= 0.999
    loss, expected_loss = stats.relative_error(weight, solved.weight), stats.relative_error(weight, expected.weight)
    assert loss == pytest.approx(expected_loss, rel=1e-3)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("shape", [(1536, 576), (576, 1536), (4096, 4096), (333, 1000)], ids=str)
def test_a_layer_by_the_kernel_equals_one_by_the_reference(
    shape: tuple[int, int], pattern: Pattern, monkeypatch: pytest.MonkeyPatch
):
    rows, width = shape
    if isinstance(pattern, NM) and width % pattern.group:
        width -= width % pattern.group
    weight, stats = random_weight(rows, width).cuda(), stats_for(width)
    solved, expected, blocks = both(weight, stats.inverse_factor(0.01), pattern, monkeypatch)
    assert blocks == -(-width // 128)
    assert_same_layer(solved, expected, weight, stats)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_layers_of_a_real_model(pattern: Pattern, monkeypatch: pytest.MonkeyPatch):
    for name, weight, gram in real_layers.real_layers():
        on_device = weight.cuda(), gram.cuda()
        real_layers.assert_as_the_reference(name, *on_device, pattern, sweep.sweep_block_triton, monkeypatch)


@pytest.mark.parametrize("pattern", [NM(2, 4), NM(16, 32), Unstructured(0.5)], ids=str)
@pytest.mark.parametrize("block_size", [32, 256, 1536])
def test_other_block_sizes(block_size: int, pattern: Pattern, monkeypatch: pytest.MonkeyPatch):
    weight, stats = random_weight(576, 1536).cuda(), stats_for(1536)
    solved, expected, blocks = both(weight, stats.inverse_factor(0.01), pattern, monkeypatch, block_size)
    assert blocks == 1536 // block_size
    assert_same_layer(solved, expected, weight, stats)


@pytest.mark.parametrize("pattern", [NM(3, 6), NM(32, 64)], ids=str)
def test_patterns_the_kernel_does_not_take_fall_back(pattern: NM, monkeypatch: pytest.MonkeyPatch):
    weight, stats = random_weight(1536, 576).cuda(), stats_for(576)
    solved, expected, blocks = both(weight, stats.inverse_factor(0.01), pattern, monkeypatch)
    assert blocks == 0
    assert torch.equal(solved.keep, expected.keep)
    assert torch.equal(solved.weight, expected.weight)


@pytest.mark.parametrize("n", [1, 5, 17, 37, 128, 250])
@pytest.mark.parametrize("rows", [1, 17, 1000])
@pytest.mark.parametrize("transposed", [False, True])
def test_given_masks_strided_views_and_any_number_of_columns(n: int, rows: int, transposed: bool):
    generator = torch.Generator("cuda").manual_seed(0)
    factor = stats_of(ar_inputs(4 * n + 64, n)).inverse_factor(0.01).cuda()
    shape = (n + 5, rows + 3)
    around = torch.randn(shape[::-1] if transposed else shape, generator=generator, device="cuda")
    around, factor = (around.T, factor.T.contiguous().T) if transposed else (around, factor)
    inside = (slice(2, n + 2), slice(1, rows + 1))
    columns, keep = around[inside], (torch.rand(shape, generator=generator, device="cuda") < 0.5)[inside]
    untouched, expected_columns = around.clone(), columns.clone()
    expected = sweep_block_reference(expected_columns, keep.clone(), factor, 0, 0)
    for _ in range(20):  # a missing barrier would not show every time
        around.copy_(untouched)
        errors = sweep_block(columns, keep, factor, 0, 0)
        torch.testing.assert_close(errors, expected, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(columns, expected_columns, rtol=1e-3, atol=1e-4)
    around[inside] = untouched[inside]
    assert torch.equal(around, untouched)


@pytest.mark.parametrize("pattern", [NM(2, 4), NM(16, 32), Unstructured(0.5)], ids=str)
def test_the_same_layer_twice_gives_the_same_bits(pattern: Pattern):
    weight, factor = random_weight(1536, 576).cuda(), stats_for(576).inverse_factor(0.01)
    first = column_sweep(weight, factor, pattern)
    for _ in range(10):
        again = column_sweep(weight, factor, pattern)
        assert torch.equal(again.keep, first.keep)
        assert torch.equal(again.weight, first.weight)


@pytest.mark.parametrize("group", [2, 4, 8, 16, 32])
def test_ties_go_to_the_lower_index(group: int):
    columns = torch.randint(0, 3, (128, 100), generator=torch.Generator().manual_seed(0)).float().cuda()
    keep, expected_keep = torch.empty_like(columns, dtype=torch.bool), torch.empty_like(columns, dtype=torch.bool)
    factor = torch.eye(128, device="cuda")
    sweep_block_reference(columns.clone(), expected_keep, factor, group // 2, group)
    sweep_block(columns, keep, factor, group // 2, group)
    assert torch.equal(keep, expected_keep)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_on_a_device_that_is_not_the_current_one():
    weight, factor = random_weight(100, 576), stats_for(576).inverse_factor(0.01)
    first = column_sweep(weight.to("cuda:0"), factor.to("cuda:0"), NM(2, 4))
    second = column_sweep(weight.to("cuda:1"), factor.to("cuda:1"), NM(2, 4))
    assert torch.equal(first.weight.cpu(), second.weight.cpu())
