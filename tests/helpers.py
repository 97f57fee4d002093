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


def legacy_tensors(weight: Tensor, format: str, shape_as_column: bool = False) -> dict[str, Tensor]:
    """What compressed-tensors wrote for a matrix [out, in] (or a vector), by plain loops over its weights."""
    rows = weight.tolist() if weight.dim() == 2 else [weight.tolist()]
    values, masks, offsets = [], [], []
    for row in rows:
        offsets.append(len(values))
        kept = [column for column, value in enumerate(row) if value != 0]
        if format == "sparse-24-bitmask":
            kept = []
            for start in range(0, len(row), 4):
                order = sorted(range(start, start + 4), key=lambda column: -abs(row[column]))
                kept += sorted(order[:2])
        values += [row[column] for column in kept]
        masks.append([sum(1 << c % 8 for c in kept if c // 8 == byte) for byte in range(-(-len(row) // 8))])
    compressed = torch.tensor(values, dtype=torch.float64).to(weight.dtype)
    tensors = {
        "compressed": compressed.view(len(rows), -1) if format == "sparse-24-bitmask" else compressed,
        "bitmask": torch.tensor(masks, dtype=torch.uint8),
        "shape": torch.tensor(list(weight.shape)),
    }
    if shape_as_column:
        tensors["shape"] = tensors["shape"].view(-1, 1)
    if format == "sparse-bitmask":
        tensors["row_offsets"] = torch.tensor(offsets)
    return tensors
