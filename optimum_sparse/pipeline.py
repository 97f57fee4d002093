"""The only loop over decoder blocks.

Per block: its inputs go through it once to collect statistics, its linears are solved, and the same inputs go through
the pruned block to become the inputs of the next one. At any time there are the activations of one block boundary,
the statistics of one block, and one fp32 matrix being solved.
"""

import contextlib
import time
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from .core import InputStats, Needs, NotPositiveDefinite, Pattern
from .kernels.cpu import fast_forward
from .methods import Method
from .report import LayerReport


@dataclass(frozen=True)
class Linear:
    """One matrix to prune: a module whose `weight` is [out, in], or [in, out] if `transposed` (Conv1D)."""

    name: str
    module: Any  # nn.Linear or Conv1D
    pattern: Pattern
    transposed: bool = False

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        rows, columns = self.module.weight.shape
        return (columns, rows) if self.transposed else (rows, columns)

    def read(self) -> Tensor:
        """The weight as fp32 [out, in]."""
        weight = self.module.weight.detach()
        return (weight.T if self.transposed else weight).float()

    def write(self, weight: Tensor) -> None:
        """Replace the weight by [out, in] in the parameter's dtype.

        The parameter object stays (tied weights stay tied); its memory is replaced and not written to, since it may
        be a file mapped into memory.
        """
        parameter = self.module.weight
        stored = (weight.T if self.transposed else weight).to(parameter.dtype).contiguous()
        if not torch.isfinite(stored).all():
            raise ValueError(
                f"pruned weights of {self.name} do not fit {parameter.dtype}: load the model in bfloat16."
            )
        parameter.data = stored


@dataclass(frozen=True)
class Block:
    """A decoder block and its matrices to prune."""

    name: str
    module: nn.Module
    linears: list[Linear]


@dataclass
class Calls:
    """What the blocks are called with, recorded once from the model itself.

    Attributes:
        hidden: for each batch the input [batch, tokens, hidden] of the next block to run.
        arguments: [block][batch] -> (further positional arguments, keyword arguments) of that block.
        keep: for each batch the bool [batch, tokens] of tokens that are not padding, or None if all are real.
    """

    hidden: list[Tensor]
    arguments: list[list[tuple[tuple, dict[str, Any]]]]
    keep: list[Tensor | None] = field(default_factory=list)

    def run(self, block: nn.Module, index: int, batch: int) -> Tensor:
        """The output of block number `index` on one batch."""
        args, kwargs = self.arguments[index][batch]
        output = block(self.hidden[batch], *args, **kwargs)
        return output[0] if isinstance(output, tuple) else output


@torch.no_grad()
def prune_blocks(
    blocks: Sequence[Block],
    calls: Calls | None,
    method: Method,
    onload: Callable[[nn.Module], AbstractContextManager] = contextlib.nullcontext,
) -> list[LayerReport]:
    """Prune all linears of all blocks in place, in order.

    Args:
        blocks: the model's decoder blocks, all of them, in order.
        calls: recorded inputs; None for methods that need none. Used up.
        method: solves each linear.
        onload: context that makes a block's weights present and keeps what was written to them.

    Raises:
        ValueError: inputs that are not finite, or a Gram matrix that has no factor, naming the layer.
    """
    if calls is None and method.needs > Needs.NOTHING:
        raise ValueError(f"{type(method).__name__} needs calibration inputs, and there are none.")
    reports: list[LayerReport] = []
    try:
        for index, block in enumerate(tqdm(blocks, desc="Pruning", unit="block")):
            with onload(block.module):
                reports += _prune_block(block, index, calls, method)
                if calls is not None and index + 1 < len(blocks):
                    with fast_forward(calls.hidden[0]):
                        for batch in range(len(calls.hidden)):
                            calls.hidden[batch] = calls.run(block.module, index, batch)
                    calls.arguments[index] = []
    except BaseException:
        if any(report.skipped is None for report in reports):
            warnings.warn("pruning stopped half-way, and the model is a mixture now: load it again.", stacklevel=2)
        raise
    return reports


def _prune_block(block: Block, index: int, calls: Calls | None, method: Method) -> list[LayerReport]:
    stats: dict[str, InputStats] = {}
    if calls is not None and block.linears:
        with fast_forward(calls.hidden[0]):
            stats = _collect(block, index, calls, method.needs)
    return [_prune_linear(linear, stats.pop(linear.name, None), method) for linear in block.linears]


def _prune_linear(linear: Linear, stats: InputStats | None, method: Method) -> LayerReport:
    started = time.perf_counter()
    weight = linear.read()
    report = LayerReport(linear.name, list(weight.shape))
    if not torch.isfinite(weight).all():
        raise ValueError(f"the weight of {linear.name} holds NaN or infinity: the checkpoint is damaged.")
    if method.needs > Needs.NOTHING:
        if stats is None or stats.tokens == 0:
            report.skipped = "no calibration token reached it"
            return report
        if not torch.isfinite(stats.mean_square).all():
            raise ValueError(
                f"the inputs of {linear.name} hold NaN or infinity: the model does not run in its dtype "
                f"({linear.module.weight.dtype}) on this data. Load it in bfloat16 or float32."
            )
    try:
        solved = method.solve(weight, stats, linear.pattern)
    except NotPositiveDefinite as error:
        raise NotPositiveDefinite(f"{linear.name}: {error}") from error
    linear.write(solved.weight)
    report.pattern = str(linear.pattern)
    report.sparsity = (solved.weight == 0).float().mean().item()
    report.seconds = time.perf_counter() - started
    if stats is not None:
        report.error = stats.relative_error(weight, solved.weight)
    return report


class _AllSeen(Exception):
    """Every linear of the block has its input: the rest of the forward pass is not needed."""


def _collect(block: Block, index: int, calls: Calls, needs: Needs) -> dict[str, InputStats]:
    """Input statistics of every linear of the block that a token reached; linears that share an input share them.

    A forward pass ends with the last linear that it reaches, unless the first batch showed that one is called twice.
    """
    stats: dict[str, InputStats] = {}
    called: Counter[str] = Counter()
    inputs: dict[str, tuple[Tensor, int]] = {}  # of the forward pass that is running
    keep: Tensor | None = None

    def hook(linear: Linear) -> Callable:
        def record(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            x = args[0] if args else next(iter(kwargs.values()))
            same = next((name for name, (y, version) in inputs.items() if y is x and version == x._version), None)
            if linear.name not in stats and same is not None:
                stats[linear.name] = stats[same]
            elif linear.name not in stats:
                stats[linear.name] = InputStats(x.shape[-1], needs, x.device)
            if same is None or stats[linear.name] is not stats[same]:
                stats[linear.name].update(_real_tokens(x, keep, linear.name))
            inputs[linear.name] = (x, x._version)
            called[linear.name] += 1
            if stop_early and len(inputs) == len(block.linears):
                raise _AllSeen

        return record

    handles = [linear.module.register_forward_pre_hook(hook(linear), with_kwargs=True) for linear in block.linears]
    stop_early = False
    try:
        for batch in range(len(calls.hidden)):
            stop_early = batch > 0 and all(count <= batch for count in called.values())
            inputs.clear()
            keep = calls.keep[batch] if calls.keep else None
            with contextlib.suppress(_AllSeen):
                calls.run(block.module, index, batch)
    finally:
        inputs.clear()
        for handle in handles:
            handle.remove()
    return stats


def _real_tokens(x: Tensor, keep: Tensor | None, name: str) -> Tensor:
    """x [..., in] as [tokens, in], without padding."""
    rows = x.reshape(-1, x.shape[-1])
    if keep is None:
        return rows
    if keep.numel() != len(rows):
        raise ValueError(
            f"{name} sees {len(rows)} tokens of a batch of {keep.numel()}, so its padding cannot be told apart: "
            "calibrate with sequences of equal length and no padding."
        )
    return rows[keep.reshape(-1).to(rows.device)]
