"""measure_speed times what it says, and does not print times of wrong results."""

import math

import pytest
import torch

from optimum_sparse.cli import main
from optimum_sparse.core import NM, Unstructured
from optimum_sparse.evaluation import measure_speed, speed
from optimum_sparse.kernels.linear import CPU_TOKENS_WIDE
from optimum_sparse.nn import SparseLinear


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(speed, "CACHE", 2**16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("pattern", [NM(2, 4), Unstructured(0.7)], ids=str)
def test_every_field(pattern, dtype):
    few, many = measure_speed((64, 128), [1, CPU_TOKENS_WIDE + 1], pattern, dtype, budget=0.01)
    for found, tokens in ((few, 1), (many, CPU_TOKENS_WIDE + 1)):
        assert (found.shape, found.tokens) == ((64, 128), tokens)
        times = [found.dense, found.sparse, found.dense_eager, found.sparse_eager, found.ceiling]
        assert all(math.isfinite(number) and number > 0 for number in times)
        assert 0 <= found.error < 0.01
        assert found.torch_sparse is None
    assert many.choice.backend != "cpu"


def test_wrong_results_are_not_timed(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(SparseLinear, "forward", lambda self, x: x.new_zeros(len(x), self.out_features))
    with pytest.raises(ArithmeticError, match="error 1, of the dense layer"):
        measure_speed((64, 128), [1], NM(2, 4), budget=0.01)


def test_what_is_not_written_shows(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(SparseLinear, "forward", lambda self, x: x.new_full((len(x), self.out_features), math.nan))
    with pytest.raises(ArithmeticError, match="error nan"):
        measure_speed((64, 128), [1], NM(2, 4), budget=0.01)


def test_command(capsys: pytest.CaptureFixture[str]):
    arguments = ["bench", "--pattern", "2:4", "--shapes", "32x64", "--tokens", "1", "8", "--device", "cpu"]
    assert main([*arguments, "--dtype", "float32"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("2:4, float32, ")
    assert [line.split("|")[1:3] for line in lines[3:]] == [[" 32 x 64 ", " 1 "], [" 32 x 64 ", " 8 "]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shapes", "4096"], "--shapes '4096': must be OUTxIN"),
        (["--shapes", "0x64"], "both must be from 1 up"),
        (["--tokens", "0"], "--tokens 0: must be from 1 up"),
        (["--pattern", "5:4"], "0 < N < M"),
        (["--shapes", "8x62"], "62"),
    ],
)
def test_bad_input_is_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]):
    assert main(["bench", "--device", "cpu", *arguments]) == 1
    assert message in capsys.readouterr().err
