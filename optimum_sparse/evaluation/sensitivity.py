"""What the model loses when only one of its matrices, or one of its blocks, is pruned.

By "error": from one calibration pass and one backward pass, as allocation="error" measures it; an estimate. By
"perplexity": each is pruned alone, the model evaluated, and the dense weight put back; slow, and exact on that text,
which has to be long: a matrix costs thousandths of a nat, which a few hundred tokens do not show.
"""

import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from os import PathLike
from pathlib import Path

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from ..allocation import measure_losses, minimize_loss
from ..config import SparsityConfig
from ..core import NM, InputStats, Pattern, Solved, Unstructured
from ..hf.blocks import full_name, make_plan, record_calls
from ..hf.checkpoint import atomically
from ..hf.prune import evaluating, token_batches
from ..hf.sensitivity import fisher
from ..methods import Method
from ..pipeline import Linear, prune_blocks
from ..report import aligned


logger = logging.getLogger(__name__)

LEAST = 1e-7  # nats: a loss measured as nothing, or as a gain, is noise


@dataclass(frozen=True)
class LossIncrease:
    """Loss increases in nats per token, for each pattern.

    Attributes:
        by: "error" or "perplexity".
        patterns: as strings: "2:4", "unstructured 0.5".
        layers: by a matrix's full name.
        blocks: by the block's name; by "error" the sum over its matrices, by "perplexity" measured.
        sizes: weights of each matrix.
    """

    by: str
    patterns: list[str]
    layers: dict[str, list[float]]
    blocks: dict[str, list[float]]
    sizes: dict[str, int]

    def allocation(self, sparsity: float) -> dict[str, float]:
        """For SparsityConfig(allocation=): the sparsities that lose least in sum, with this share removed in all.

        Raises:
            ValueError: fewer than two unstructured sparsities were measured, or `sparsity` is not between them.
        """
        curve = {float(name.split()[1]): place for place, name in enumerate(self.patterns) if ":" not in name}
        known = sorted(curve)
        check_allocation(known, sparsity)
        gains = sum(values[curve[known[-1]]] <= 0 for values in self.layers.values())
        if gains > len(self.layers) / 10:
            logger.warning(
                "%d of %d matrices cost nothing at a sparsity of %g, or less: such losses cannot be told from noise, "
                "nor can this allocation. Evaluate on more text, or measure by error.",
                gains,
                len(self.layers),
                known[-1],
            )
        losses = [[max(values[curve[s]], LEAST) for s in known] for values in self.layers.values()]
        sizes = [self.sizes[name] for name in self.layers]
        return dict(zip(self.layers, minimize_loss(known, losses, sizes, sparsity), strict=True))

    def save(self, path: str | PathLike) -> None:
        with atomically(Path(path)) as temporary:
            temporary.write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | PathLike) -> "LossIncrease":
        return cls(**json.loads(Path(path).read_text(encoding="utf-8")))

    def __str__(self) -> str:
        """A table: blocks in order, then matrices, most sensitive first under the last pattern."""
        layers = sorted(self.layers.items(), key=lambda item: -item[1][-1])
        rows = [("loss increase, nats per token", *self.patterns)]
        rows += [(name, *(f"{value:.5f}" for value in values)) for name, values in [*self.blocks.items(), *layers]]
        return "\n".join(aligned(rows))


def check_allocation(known: Sequence[float], sparsity: float) -> None:
    """Raise ValueError unless losses at the sparsities `known` are enough to allocate this one."""
    Unstructured(sparsity)
    if len(known) < 2 or not min(known) <= sparsity <= max(known):
        raise ValueError(
            f"an allocation of {sparsity:g} needs losses at two unstructured sparsities or more, below and above it, "
            f"such as {max(sparsity - 0.2, 0):.2g} and {min(sparsity + 0.2, 0.95):.2g}; "
            f"there are {', '.join(f'{s:g}' for s in sorted(known)) or 'none'}."
        )


def measure_sensitivity(
    model: PreTrainedModel,
    config: SparsityConfig,
    patterns: Sequence[Pattern],
    evaluate: Callable[[PreTrainedModel], float] | None = None,
    *,
    tokenizer: object = None,
) -> LossIncrease:
    """The loss increase of every matrix that `config` prunes, alone, under each of `patterns`. The model stays dense.

    Args:
        config: data, damping, which linears; for `evaluate` also the method. Its own pattern does not count.
        evaluate: mean negative log-likelihood per token, in nats: by perplexity. Matrices are solved on the dense
            model's inputs, all tokens alike, and kept in host memory until they are measured. None: by error, which
            is half of the squared error that the likelihood feels: what it loses to second order, taking errors of
            different outputs and tokens as independent. SparseGPT stands for all methods there.

    Raises:
        ValueError: no pattern, or one that does not fit.
    """
    if not patterns:
        raise ValueError("nothing to measure: give sparsities such as 0.5, or patterns such as '2:4'.")
    plan = make_plan(model, config)
    for pattern in patterns:
        if isinstance(pattern, NM):
            make_plan(model, replace(config, pattern=str(pattern), sparsity=None, allocation="uniform", denser={}))
    full = full_name(model)
    sizes = {full(name): linear.shape[0] * linear.shape[1] for name, linear in plan.linears.items()}
    onload = partial(plan.onload, keep=False)
    with evaluating(model):
        batches = token_batches(model, config, config.dataset, tokenizer)
        calls = record_calls(model, [block.module for block in plan.blocks], batches)
        if evaluate is None:
            felt = fisher(model, plan.blocks, batches, config.seed, plan.taken_apart)
            found = measure_losses(patterns, config, plan.blocks, calls, felt, onload)
            layers = {full(name): [value / 2 for value in values] for name, values in found.items()}
            blocks = {
                block.name: [
                    sum(layers[full(part.name)][place] for part in block.linears if full(part.name) in layers)
                    for place in range(len(patterns))
                ]
                for block in plan.blocks
            }
            return LossIncrease("error", [str(pattern) for pattern in patterns], layers, blocks, sizes)
        dense = evaluate(model)
        layers = {full(name): [] for name in plan.linears}
        blocks = {block.name: [] for block in plan.blocks}
        total = len(patterns) * (len(layers) + len(blocks))
        with tqdm(total=total, desc="Sensitivity", unit="evaluation") as progress:
            for pattern in patterns:
                alone = _Alone(config.build_method(), pattern)
                reports = prune_blocks(plan.blocks, calls.copy(), alone, onload, description="Solving layers")
                solved = {r.name: alone.weights[int(r.note)] for r in reports if r.skipped is None}
                for block in plan.blocks:
                    for linears in (*([linear] for linear in block.linears), block.linears):
                        with onload(block.module):
                            loss = _loss_with(model, linears, solved, evaluate)
                        progress.update()
                        if linears is block.linears:
                            blocks[block.name].append(loss - dense)
                        else:
                            layers[full(linears[0].name)].append(loss - dense)
    return LossIncrease("perplexity", [str(pattern) for pattern in patterns], layers, blocks, sizes)


class _Alone:
    """A method that keeps everything, and puts aside what another gives; its number there is the note."""

    def __init__(self, method: Method, pattern: Pattern):
        self.needs = method.needs
        self.weights: list[Tensor] = []
        self._method, self._pattern = method, pattern

    def solve(self, weight: Tensor, stats: InputStats, pattern: Pattern) -> Solved:
        self.weights.append(self._method.solve(weight, stats, self._pattern).weight.cpu())
        return Solved(weight, torch.ones_like(weight, dtype=torch.bool), str(len(self.weights) - 1))


def _loss_with(
    model: PreTrainedModel,
    linears: list[Linear],
    solved: dict[str, Tensor],
    evaluate: Callable[[PreTrainedModel], float],
) -> float:
    """The model's loss while these linears are pruned."""
    dense = [linear.weight.data for linear in linears]
    try:
        for linear in linears:
            if linear.name in solved:
                linear.write(solved[linear.name].to(linear.weight.device))
        return evaluate(model)
    finally:
        for linear, weight in zip(linears, dense, strict=True):
            linear.weight.data = weight
