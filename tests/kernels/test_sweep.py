"""The CUDA kernel of `sweep_block`, run on the CPU by Triton's interpreter: the same source, the same arithmetic.

The interpreter must be asked for before the kernel is defined, so those tests run in a process of their own, which
`test_the_kernel_in_tritons_interpreter` starts. It needs triton and numpy < 2.4.
"""

import os
import subprocess
import sys

import numpy
import pytest
import real_layers
import torch
from helpers import ar_inputs, random_weight, stats_of
from torch import Tensor

from optimum_sparse.core import NM, Pattern, Unstructured, column_sweep, keep_top
from optimum_sparse.core import sweep as core_sweep
from optimum_sparse.core.sweep import sweep_block_reference
from optimum_sparse.kernels import sweep


INTERPRETED = sweep.HAS_TRITON and os.environ.get("TRITON_INTERPRET") == "1"
interpreter = pytest.mark.skipif(
    not INTERPRETED, reason="needs TRITON_INTERPRET=1: test_the_kernel_in_tritons_interpreter runs it"
)


def block(n: int, rows: int, *, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """columns [n, rows], a random keep bool [n, rows], factor [n, n] of correlated inputs."""
    factor = stats_of(ar_inputs(4 * n + 64, n, seed)).inverse_factor(0.01)
    keep = torch.rand(n, rows, generator=torch.Generator().manual_seed(seed)) < 0.5
    return random_weight(rows, n, seed).T.contiguous(), keep, factor


def assert_as_the_reference(columns: Tensor, keep: Tensor, factor: Tensor, kept: int, group: int) -> None:
    expected_columns, expected_keep = columns.clone(), keep.clone()
    expected = sweep_block_reference(expected_columns, expected_keep, factor, kept, group)
    before = factor.clone()
    errors = sweep.sweep_block_triton(columns, keep, factor, kept, group)
    assert errors.shape == columns.shape
    assert torch.equal(factor, before)
    assert (keep == expected_keep).float().mean() > 0.999
    if group:
        counts = keep.T.reshape(keep.shape[1], -1, group).sum(-1)
        assert (counts == kept).all()
    same = (keep == expected_keep).all(0)  # another choice changes all that follows in its row
    assert same.float().mean() > 0.9
    torch.testing.assert_close(columns[:, same], expected_columns[:, same], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(errors[:, same], expected[:, same], rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(INTERPRETED, reason="this is the interpreter's process")
@pytest.mark.skipif(not sweep.HAS_TRITON, reason="triton is not installed (CPU builds of PyTorch come without)")
@pytest.mark.skipif(
    tuple(int(part) for part in numpy.__version__.split(".")[:2]) >= (2, 4), reason="the interpreter needs numpy < 2.4"
)
def test_the_kernel_in_tritons_interpreter():
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    done = subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@interpreter
@pytest.mark.parametrize(
    ("kept", "group"), [(1, 1), (1, 2), (2, 4), (1, 4), (3, 4), (4, 8), (8, 16), (16, 32), (5, 32)]
)
@pytest.mark.parametrize("n", [32, 128])
def test_groups(n: int, kept: int, group: int):
    assert_as_the_reference(*block(n, 2 * sweep.ROWS), kept, group)


@interpreter
@pytest.mark.parametrize("n", [1, 5, 16, 17, 37, 128, 250, 300])
def test_given_masks_and_any_number_of_columns(n: int):
    assert_as_the_reference(*block(n, 20), 0, 0)


@interpreter
@pytest.mark.parametrize(
    ("n", "kept", "group"), [(4, 2, 4), (12, 2, 4), (20, 1, 4), (56, 4, 8), (96, 16, 32), (300, 2, 4)]
)
def test_groups_and_a_last_panel_that_is_not_full(n: int, kept: int, group: int):
    assert_as_the_reference(*block(n, 20), kept, group)


@interpreter
@pytest.mark.parametrize("rows", [1, 15, 16, 17, 33])
@pytest.mark.parametrize(("kept", "group"), [(0, 0), (2, 4)])
def test_rows_that_do_not_fill_the_slabs(rows: int, kept: int, group: int):
    assert_as_the_reference(*block(48, rows), kept, group)


@interpreter
@pytest.mark.parametrize("by_columns", [False, True], ids=["rows of a larger tensor", "transposed"])
@pytest.mark.parametrize(("kept", "group"), [(0, 0), (2, 4), (16, 32)])
def test_strided_views_and_nothing_outside_is_touched(kept: int, group: int, by_columns: bool):
    n, rows = 64, 20
    columns, keep, factor = block(n, rows)

    def inside(tensor: Tensor, fill: float) -> tuple[Tensor, Tensor]:
        """A larger tensor, and the view of it that holds `tensor`."""
        if by_columns:
            tensor = tensor.T
        around = torch.full((tensor.shape[0] + 7, tensor.shape[1] + 5), fill, dtype=tensor.dtype)
        view = around[3:-4, 2:-3]
        view.copy_(tensor)
        return around, view.T if by_columns else view

    around = [inside(columns, 9.0), inside(keep, True), inside(factor, torch.nan)]
    assert_as_the_reference(*(view for _, view in around), kept, group)
    for whole, view in around:
        outside = whole.clone()
        (outside.T if by_columns else outside).as_strided(
            view.shape, view.stride(), view.storage_offset()
        ).fill_(whole[0, 0])  # fmt: skip
        torch.testing.assert_close(outside, torch.full_like(whole, whole[0, 0]), equal_nan=True)


@interpreter
@pytest.mark.parametrize("group", [2, 4, 8, 16, 32])
def test_ties_go_to_the_lower_index(group: int):
    columns, keep, factor = torch.ones(64, 17), torch.empty(64, 17, dtype=torch.bool), torch.eye(64)
    columns[:, 1] = torch.randint(0, 3, (64,), generator=torch.Generator().manual_seed(0))
    score = columns.square().T.reshape(17, -1, group)
    sweep.sweep_block_triton(columns, keep, factor, group // 2, group)
    assert torch.equal(keep.T.reshape(17, -1, group), keep_top(score, group // 2))


@interpreter
@pytest.mark.parametrize("pattern", [NM(2, 4), NM(16, 32), Unstructured(0.5), Unstructured(0.7)], ids=str)
def test_a_whole_layer(pattern: Pattern, monkeypatch: pytest.MonkeyPatch):
    """Several blocks, the last one smaller."""
    weight, stats = random_weight(40, 320), stats_of(ar_inputs(2000, 320))
    factor = stats.inverse_factor(0.01)
    expected = column_sweep(weight, factor, pattern)
    monkeypatch.setattr(core_sweep, "sweep_block", sweep.sweep_block_triton)
    solved = column_sweep(weight, factor, pattern)
    assert solved.keep.sum() == expected.keep.sum()
    assert (solved.keep == expected.keep).float().mean() > 0.999
    assert stats.relative_error(weight, solved.weight) == pytest.approx(
        stats.relative_error(weight, expected.weight), rel=1e-3
    )


@interpreter
@pytest.mark.parametrize("pattern", [NM(2, 4), NM(16, 32), Unstructured(0.5)], ids=str)
def test_some_rows_of_layers_of_a_real_model(pattern: Pattern, monkeypatch: pytest.MonkeyPatch):
    for name, weight, gram in real_layers.real_layers():
        rows = weight[:: len(weight) // 20].contiguous()
        real_layers.assert_as_the_reference(name, rows, gram, pattern, sweep.sweep_block_triton, monkeypatch)


@pytest.mark.parametrize(
    ("kept", "group", "n", "dtype"),
    [(3, 6, 36, torch.float32), (32, 64, 64, torch.float32), (2, 4, 32, torch.float64), (0, 0, 32, torch.float64)],
    ids=["3:6", "32:64", "2:4 float64", "given mask float64"],
)
def test_what_the_kernel_does_not_take_goes_to_the_reference(
    kept: int, group: int, n: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(sweep, "HAS_TRITON", True)
    monkeypatch.setattr(sweep, "sweep_block_triton", lambda *_: pytest.fail("the kernel was called"))
    columns, keep, factor = block(n, 5)
    columns, factor = columns.to(dtype), factor.to(dtype)
    expected_columns, expected_keep = columns.clone(), keep.clone()
    expected = sweep_block_reference(expected_columns, expected_keep, factor, kept, group)
    assert torch.equal(sweep.sweep_block_cuda(columns, keep, factor, kept, group), expected)
    assert torch.equal(columns, expected_columns)
    assert torch.equal(keep, expected_keep)


def test_without_triton_the_reference_is_called(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sweep, "HAS_TRITON", False)
    columns, keep, factor = block(32, 5)
    expected = sweep_block_reference(columns.clone(), keep.clone(), factor, 2, 4)
    assert torch.equal(sweep.sweep_block_cuda(columns, keep, factor, 2, 4), expected)


@pytest.mark.parametrize(
    ("group", "n", "rows", "taken"),
    [(0, 128, 8, True), (0, 37, 8, True), (4, 128, 8, True), (32, 256, 8, True), (1, 3, 8, True), (4, 30, 8, False),
     (6, 36, 8, False), (64, 128, 8, False), (0, 0, 8, False), (0, 128, 0, False)],
)  # fmt: skip
def test_what_the_kernel_takes(group: int, n: int, rows: int, taken: bool, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sweep, "HAS_TRITON", True)
    assert sweep.kernel_takes(torch.empty(n, rows), torch.empty(n, n), group) is taken


def test_importing_the_kernels_registers_one_for_cuda():
    assert torch._C._dispatch_has_kernel_for_dispatch_key("optimum_sparse::sweep_block", "CUDA")


def test_the_module_imports_without_triton():
    """In a process that cannot find it, whether it is installed or not."""
    code = (
        "import importlib.util as u; find = u.find_spec;"
        "u.find_spec = lambda name, *a: None if name == 'triton' else find(name, *a);"
        "from optimum_sparse.kernels import sweep; assert not sweep.HAS_TRITON"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
