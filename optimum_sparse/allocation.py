"""How much each layer gives up: sparsities of its own for every matrix, or denser patterns for some, in one budget.

What a layer would lose is measured by a method that prunes nothing: `prune_blocks` walks over the dense model with it.
"""

import contextlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

from . import ranks
from .config import DENSE, SparsityConfig, matches
from .core import NM, InputStats, Needs, Pattern, Solved, Unstructured, column_sweep, parse_pattern
from .pipeline import Block, Calls, Objective, Sensitivity, prune_blocks


LOWEST, HIGHEST = 0.0, 0.99  # sparsity of a matrix
Onload = Callable[[nn.Module], AbstractContextManager]
BAND = 0.2  # how far allocation="error" may go from the target


class ErrorCurves:
    """What every matrix loses under each of several patterns: the squared output error of one SparseGPT sweep.

    A method that keeps everything, and notes the losses (JSON) in the report, which knows the names. Rows arrive
    scaled by what the likelihood feels of them, if that is known.
    """

    needs = Needs.GRAM

    def __init__(self, patterns: Sequence[Pattern], damping: float, block_size: int):
        self.patterns = patterns
        self.damping = damping
        self.block_size = block_size

    def solve(self, weight: Tensor, stats: InputStats, pattern: Pattern) -> Solved:
        target = weight.masked_fill(stats.mean_square == 0, 0)
        factor = stats.inverse_factor(self.damping)
        losses = []
        for candidate in self.patterns:
            if isinstance(candidate, NM) and weight.shape[1] % candidate.group:
                losses.append(math.inf)  # not for this one
                continue
            error = column_sweep(target, factor, candidate, block_size=self.block_size).weight - target
            losses.append(((error @ stats.gram) * error).sum().item())
        return Solved(weight, torch.ones_like(weight, dtype=torch.bool), json.dumps(losses))


class OutlierRatios:
    """Share of a block's Wanda scores above `multiple` times their mean: OWL, Yin et al. 2023, arXiv 2310.05175.

    A method that keeps everything.

    Attributes:
        ratios: of every block in order; 0 for one without matrices.
    """

    needs = Needs.DIAGONAL

    def __init__(self, multiple: float = 5.0):
        self.ratios: list[float] = []
        self._multiple = multiple
        self._scores: list[Tensor] = []

    def solve(self, weight: Tensor, stats: InputStats, pattern: Pattern) -> Solved:
        self._scores.append((weight.abs() * stats.mean_square.sqrt()).flatten())
        return Solved(weight, torch.ones_like(weight, dtype=torch.bool))

    def end_block(self) -> None:
        scores = torch.cat(self._scores) if self._scores else torch.zeros(0)

        def total(own: float) -> float:
            """Over all processes: each has the scores of the linears that it was given to solve."""
            return sum(ranks.gathered(own))

        count = max(total(len(scores)), 1)
        mean = torch.tensor(total(scores.sum().item())) / count
        above = total((scores > self._multiple * mean).float().sum().item())
        self.ratios.append((torch.tensor(above) / count).item())
        self._scores = []


def owl(ratios: Sequence[float], sizes: Sequence[int], target: float, spread: float = 0.08) -> list[float]:
    """The sparsity of each block from its outlier ratio (section 4 there): within 2 * `spread` of one another, and
    around the target in the mean.

    Args:
        sizes: weights of each block.
    """
    d = torch.tensor(ratios, dtype=torch.float64)
    r = (d - d.min()) / (d.max() - d.min()).clamp(min=1e-12) * 2 * spread
    return meet_target((1 - target - r.mean() + r).mul(-1).add(1).tolist(), sizes, target)


def minimize_loss(
    grid: Sequence[float], losses: Sequence[Sequence[float]], sizes: Sequence[int], target: float
) -> list[float]:
    """The sparsities that lose least in sum: one multiplier, the price of a weight, for all matrices.

    Losses between the grid's points are interpolated in their logarithm.

    Args:
        grid: rising sparsities, at which losses[matrix] were measured.
        sizes: weights of each matrix.
        target: share of all weights to remove.
    """
    known = torch.tensor(grid, dtype=torch.float64)
    fine = torch.linspace(grid[0], grid[-1], 2001, dtype=torch.float64)
    right = torch.searchsorted(known, fine).clamp(1, len(grid) - 1)
    part = (fine - known[right - 1]) / (known[right] - known[right - 1])
    loss = torch.tensor(losses, dtype=torch.float64)
    log_loss = (loss / loss.max()).clamp(min=1e-300).log()
    loss = torch.lerp(log_loss[:, right - 1], log_loss[:, right], part).exp()
    size = torch.tensor(sizes, dtype=torch.float64)[:, None] / max(sizes)

    def choice(log_price: float) -> Tensor:
        return fine[(loss - math.exp(log_price) * size * fine).argmin(1)]

    low, high = -700.0, 700.0
    for _ in range(100):
        middle = (low + high) / 2
        removed = (choice(middle) * size[:, 0]).sum() / size.sum()
        low, high = (middle, high) if removed < target else (low, middle)
    return meet_target(choice(high).tolist(), sizes, target, grid[0], grid[-1])


def meet_target(
    sparsities: Sequence[float],
    sizes: Sequence[int],
    target: float,
    lowest: float = LOWEST,
    highest: float = HIGHEST,
) -> list[float]:
    """`sparsities` + one number, each kept within bounds, so that exactly `target` of all weights is removed.

    Raises:
        ValueError: the bounds do not allow it.
    """
    wanted = torch.tensor(sparsities, dtype=torch.float64)
    size = torch.tensor(sizes, dtype=torch.float64)
    if not lowest - 1e-9 <= target <= highest + 1e-9:
        raise ValueError(
            f"a sparsity of {target:g} of the layers to allocate cannot be met with each of them between {lowest:g} "
            f"and {highest:g}."
        )
    low, high = -1.0, 1.0
    for _ in range(100):
        middle = (low + high) / 2
        removed = ((wanted + middle).clamp(lowest, highest) * size).sum() / size.sum()
        low, high = (middle, high) if removed < target else (low, middle)
    return (wanted + high).clamp(lowest, highest).tolist()


def choose_denser(
    losses: Sequence[Sequence[float]], sizes: Sequence[int], budgets: Sequence[tuple[str, float]]
) -> dict[int, str]:
    """Which matrices take a denser pattern: those that lose most per weight without it.

    Args:
        losses: for each matrix, under the pattern of all, then under each pattern of `budgets` (0 if that is dense).
        sizes: weights of each matrix.
        budgets: (pattern, share of these weights that may take it), filled one after the other.

    Returns:
        matrix -> pattern.
    """
    chosen: dict[int, str] = {}
    for number, (pattern, share) in enumerate(budgets, 1):
        left = share * sum(sizes)
        gain = [(loss[0] - loss[number]) / size for loss, size in zip(losses, sizes, strict=True)]
        for matrix in sorted(range(len(sizes)), key=lambda matrix: -gain[matrix]):
            if matrix not in chosen and gain[matrix] > 0 and sizes[matrix] <= left:
                chosen[matrix] = pattern
                left -= sizes[matrix]
    return chosen


def by_name(rules: Mapping[str, float], names: Sequence[str], sizes: Sequence[int], target: float) -> list[float]:
    """Sparsities by name, and one for all other matrices so that the target is met.

    Raises:
        ValueError: a matrix that two names give different values, or a target that cannot be met.
    """
    found = [{sparsity for rule, sparsity in rules.items() if matches(rule, name)} for name in names]
    for name, values in zip(names, found, strict=True):
        if len(values) > 1:
            raise ValueError(
                f"allocation gives {name} different sparsities, {sorted(values)}: make one more specific."
            )
    total = sum(sizes)
    fixed = sum(min(values) * size for values, size in zip(found, sizes, strict=True) if values)
    free = sum(size for values, size in zip(found, sizes, strict=True) if not values)
    rest = (target * total - fixed) / max(free, 1)
    if (free and not LOWEST <= rest <= HIGHEST) or (not free and abs(fixed / total - target) > 1e-4):
        raise ValueError(
            f"allocation removes {fixed / total:.4f} of the weights by name, which leaves a sparsity of {rest:.4f} "
            f"for the other {free:,} of {total:,} weights to reach {target:g}: it must be between {LOWEST:g} and "
            f"{HIGHEST:g}."
        )
    return [min(values) if values else rest for values in found]


def allocate(
    config: SparsityConfig,
    blocks: Sequence[Block],
    calls: Calls | None,
    sensitivity: Sensitivity | None,
    onload: Onload,
    full_name: Callable[[str], str],
) -> dict[str, str | float]:
    """The sparsity or pattern of every matrix to which config.allocation or config.denser gives one of its own.

    Matrices that config.layers names are not touched, and do not count.

    Args:
        blocks: of the dense model.
        calls: not used up.
        full_name: how the config calls a module.

    Returns:
        a module's full name -> sparsity, pattern or "dense".
    """
    chosen = [
        Block(block.name, block.module, [part for part in block.linears if not config.overrides(full_name(part.name))])
        for block in blocks
    ]
    target = parse_pattern(config.pattern, config.sparsity).sparsity
    sizes = {linear.name: linear.weight.numel() for block in chosen for linear in block.linears}
    if target == 0 or not sizes:
        return {}
    if isinstance(config.allocation, dict):
        names = [full_name(name) for name in sizes]
        return dict(zip(names, by_name(config.allocation, names, [*sizes.values()], target), strict=True))
    assert calls is not None
    if config.allocation == "owl":
        found = _by_outliers(chosen, calls, onload, sizes, target)
    else:
        found = _by_error(config, chosen, calls, sensitivity, onload, sizes)
    return {full_name(name): value for name, value in found.items()}


def _by_outliers(
    blocks: list[Block], calls: Calls, onload: Onload, sizes: dict[str, int], target: float
) -> dict[str, str | float]:
    method = OutlierRatios()

    @contextlib.contextmanager
    def counted(module: nn.Module) -> Iterator[None]:
        with onload(module):
            yield
        method.end_block()

    reports = prune_blocks(blocks, calls.copy(), method, counted, description="Measuring layers")
    reached = {report.name for report in reports if report.skipped is None}
    names = [[linear.name for linear in block.linears if linear.name in reached] for block in blocks]
    used = [(ratio, of_block) for ratio, of_block in zip(method.ratios, names, strict=True) if of_block]
    sparsities = owl([ratio for ratio, _ in used], [sum(sizes[name] for name in part) for _, part in used], target)
    return {name: sparsity for sparsity, (_, part) in zip(sparsities, used, strict=True) for name in part}


def _by_error(
    config: SparsityConfig,
    blocks: list[Block],
    calls: Calls,
    sensitivity: Sensitivity | None,
    onload: Onload,
    sizes: dict[str, int],
) -> dict[str, str | float]:
    pattern = parse_pattern(config.pattern, config.sparsity)
    target = pattern.sparsity
    budgets = sorted(config.denser.items(), key=lambda item: density(item[0]), reverse=True)
    sparse = [parse_pattern(name) for name, _ in budgets if name != DENSE]
    grid = torch.linspace(max(target - BAND, target / 4), min(target + BAND, (3 + target) / 4), 5).tolist()
    candidates = [pattern, *sparse] if budgets else [Unstructured(sparsity) for sparsity in grid]
    losses = measure_losses(candidates, config, blocks, calls, sensitivity, onload)
    weights = [sizes[name] for name in losses]
    if not budgets:
        return dict(zip(losses, minimize_loss(grid, [*losses.values()], weights, target), strict=True))
    nothing = [0.0] * (len(budgets) - len(sparse))  # what a dense matrix, which comes first, loses
    padded = [loss[:1] + nothing + loss[1:] for loss in losses.values()]
    names = list(losses)
    return {names[matrix]: name for matrix, name in choose_denser(padded, weights, budgets).items()}


def measure_losses(
    patterns: Sequence[Pattern],
    config: SparsityConfig,
    blocks: Sequence[Block],
    calls: Calls,
    sensitivity: Sensitivity | None,
    onload: Onload,
) -> dict[str, list[float]]:
    """What every matrix that is reached loses under each of the patterns, when only it is pruned.

    With `sensitivity`, mean over tokens of sum_i F_i d_i^2 for errors d of the output and squared gradients F of the
    likelihood; without, of sum_i d_i^2, an expert's as one over all tokens.

    Args:
        calls: not used up.
    """
    method = ErrorCurves(patterns, config.damping, config.block_size)
    objective = Objective(sensitivity=sensitivity)
    reports = prune_blocks(blocks, calls.copy(), method, onload, objective=objective, description="Measuring layers")
    losses = {report.name: json.loads(report.note) for report in reports if report.skipped is None}
    if sensitivity is not None:  # rows came scaled to a mean of 1 within each matrix
        scale = {name: rows.mean().item() for name, rows in sensitivity.rows.items()}
    else:  # a mean over an expert's own tokens is to become one over all, as those are
        tokens = sum(ranks.gathered(sum(hidden.shape[:2].numel() for hidden in calls.hidden)))
        scale = {report.name: report.routed / tokens for report in reports if report.routed is not None}
    return {name: [loss * scale.get(name, 1.0) for loss in of_layer] for name, of_layer in losses.items()}


def density(pattern: str) -> tuple[float, int]:
    """What patterns are sorted by: the share of weights that they keep, then the freedom to choose which."""
    if pattern == DENSE:
        return 1.0, 0
    parsed = parse_pattern(pattern)
    assert isinstance(parsed, NM)
    return parsed.kept / parsed.group, parsed.group
