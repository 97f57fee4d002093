"""What tests of several rooms share: inputs as real layers have them, and the one error that counts."""

import importlib.util
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from optimum_sparse.core import InputStats, Needs


def ar_inputs(tokens: int, width: int, seed: int = 0, correlation: float = 0.9) -> Tensor:
    """fp32 [tokens, width]: neighbouring columns are correlated, and columns differ in size by up to 30 times.

    Correlation is what SparseGPT can use and Wanda cannot; size is what Wanda can use and magnitude cannot.
    """
    generator = torch.Generator().manual_seed(seed)
    size = torch.exp(torch.empty(width, dtype=torch.float64).uniform_(-1.7, 1.7, generator=generator))
    noise = torch.randn(tokens, width, generator=generator, dtype=torch.float64)
    x = noise.clone()
    for column in range(1, width):
        x[:, column] = correlation * x[:, column - 1] + (1 - correlation**2) ** 0.5 * noise[:, column]
    return (x * size).float()


def random_weight(rows: int, width: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(1000 + seed))


def stats_of(x: Tensor, needs: Needs = Needs.GRAM) -> InputStats:
    stats = InputStats(x.shape[-1], needs)
    stats.update(x)
    return stats


def output_error(weight: Tensor, pruned: Tensor, x: Tensor) -> float:
    """|x (pruned - weight)^T|^2 / |x weight^T|^2 in float64, from the outputs themselves."""
    weight, pruned, x = weight.double(), pruned.double(), x.double()
    return ((x @ (pruned - weight).T).square().sum() / (x @ weight.T).square().sum()).item()


def load_example(name: str) -> ModuleType:
    """examples/<name>.py as a module."""
    path = Path(__file__).parents[1] / "examples" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
