"""The only loop over decoder blocks.

Per block: its inputs go through it to collect statistics, its linears are solved, stage by stage if asked to, and the
same inputs go through the pruned block to become the inputs of the next one. At any time there are the activations of
one block boundary (of two paths, if the dense one is followed), the statistics of one stage (of part of it, if it has
too many experts), and one fp32 matrix being solved.
"""

import contextlib
import copy
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from .. import ranks
from ..core import SAMPLE_TOKENS, Needs, NotPositiveDefinite, Solved, violation
from ..kernels.precision import fast_forward, full_fp32
from ..methods import Method
from ..report import LayerReport
from .observe import Evidence, Layouts, collect, token_weights
from .parts import Block, Calls, Linear, Sensitivity, Tensors, all_finite, check_finite, dense_weights, not_finite
from .reconstruct import Reconstruction, reconstruct


STATISTICS = 2**32  # bytes at a time: 128 Gram matrices of 2,880 inputs


@dataclass(frozen=True)
class Objective:
    """What the linears are asked for. By default each is to give its dense output on the inputs that it gets.

    Attributes:
        staged: collect statistics again after each group of linears with the same input (q, k, v | o | gate, up |
            down), so that each is fitted to what the pruned ones before it give ("true sequential").
        input_shift: in [0, 1]; how far to move the target from the dense weights' output on the pruned path towards
            their output on the dense path. Of an expert, only for tokens that both paths route to it.
        residual_shift: in [0, 1]; likewise how much a linear whose output is added to the residual stream is to
            repair of what that has lost so far.
        damping: of the least squares problems that these shifts are, relative to the mean of the diagonal.
        sensitivity: weighs tokens, and the rows of unstructured layers, by what the likelihood feels of them.
    """

    staged: bool = False
    input_shift: float = 0.0
    residual_shift: float = 0.0
    damping: float = 0.01
    sensitivity: Sensitivity | None = None

    @property
    def needs_dense_path(self) -> bool:
        return self.input_shift > 0 or self.residual_shift > 0


@torch.no_grad()
def prune_blocks(
    blocks: Sequence[Block],
    calls: Calls | None,
    method: Method,
    onload: Callable[[nn.Module], AbstractContextManager] = contextlib.nullcontext,
    *,
    objective: Objective = Objective(),
    reconstruction: Reconstruction | None = None,
    description: str = "Pruning",
    start: int = 0,
    finished: Callable[[int, list[LayerReport]], None] | None = None,
) -> list[LayerReport]:
    """Prune all linears of all blocks in place, in order.

    Of several processes (`ranks`) each brings calls of its own for the same blocks, and solves a part of the linears
    of each stage; all end with the same blocks and reports.

    Args:
        blocks: the model's decoder blocks, all of them, in order.
        calls: recorded inputs; None for methods that need none. Used up.
        method: solves each linear.
        onload: context that makes a block's weights present and keeps what was written to them.
        objective: what each linear is asked for.
        reconstruction: train each block's kept weights when its linears are solved.
        start: the first block to prune; `calls` hold its inputs.
        finished: called with the number and the reports of each block when it is done, while its weights are present
            and `calls` hold the inputs of the next one: to keep what a later run with `start` needs.

    Returns:
        The reports of the blocks from `start` on.

    Raises:
        ValueError: inputs that are not finite, or a Gram matrix that has no factor, naming the layer.
    """
    if calls is None and (method.needs > Needs.NOTHING or reconstruction is not None):
        raise ValueError(f"{type(method).__name__} needs calibration inputs, and there are none.")
    if objective.needs_dense_path and method.needs < Needs.GRAM:
        name = type(method).__name__
        raise ValueError(f"input_shift and residual_shift need a method that sees Gram matrices, not {name}.")
    follow = calls is not None and (objective.needs_dense_path or reconstruction is not None)
    if calls is not None and follow and calls.dense_hidden is None:
        calls.dense_hidden = copy.copy(calls.hidden)
    dense_hidden = calls.dense_hidden if calls is not None and follow else None
    layouts = Layouts()
    reports: list[LayerReport] = []
    try:
        progress = ranks.progress(
            blocks[start:],
            desc=description,
            unit="block",
            initial=start,
            total=len(blocks),
            leave=None,  # it stays, unless it is inside another bar
        )
        for index, block in enumerate(progress, start):
            with onload(block.module):
                check_finite(block.module, block.name)
                dense = [linear.weight.data for linear in block.linears]
                found, keeps = _prune_block(block, index, calls, layouts, method, objective, dense)
                reports += found
                if calls is not None:
                    if dense_hidden is not None and (reconstruction is not None or index + 1 < len(blocks)):
                        with dense_weights(block.linears, dense):
                            _advance(block, index, calls, dense_hidden)
                    if dense_hidden is not None and reconstruction is not None and keeps:
                        weights = token_weights([block], objective.sensitivity, calls)
                        losses = reconstruct(block, index, calls, dense_hidden, keeps, weights, reconstruction)
                        progress.set_postfix_str("block error {:.4f} -> {:.4f}".format(*losses))
                        for report in found:
                            if report.skipped is None:
                                report.block_error = list(losses)
                    if index + 1 < len(blocks):
                        _advance(block, index, calls, calls.hidden)
                    for used in filter(None, (calls, calls.parts)):
                        used.arguments[index] = []
                if reconstruction is not None and reconstruction.arguments is not None:
                    reconstruction.arguments[index] = []
                if finished is not None:
                    finished(index, found)
                del dense, keeps  # or they would be there beside the next block
    except BaseException:
        if finished is None and any(report.skipped is None for report in reports):
            warnings.warn("pruning stopped half-way, and the model is a mixture now: load it again.", stacklevel=2)
        raise
    return reports


def _advance(block: Block, index: int, calls: Calls, hidden: Tensors) -> None:
    """The block's outputs in place of its inputs `hidden`, for every batch."""
    with fast_forward(hidden[0], block.module):
        for batch, x in enumerate(hidden):
            hidden[batch] = calls.outputs(block.module, index, batch, x)


def _prune_block(
    block: Block,
    index: int,
    calls: Calls | None,
    layouts: Layouts,
    method: Method,
    objective: Objective,
    dense: list[Tensor],
) -> tuple[list[LayerReport], dict[str, Tensor]]:
    """Reports in the order of block.linears, and by name the masks of what was pruned."""
    reports: dict[str, LayerReport] = {}
    keeps: dict[str, Tensor] = {}

    def solve(part: list[tuple[Linear, Evidence | None]]) -> None:
        linears = [linear for linear, _ in part]
        owners = ranks.spread([sum(linear.shape) * linear.shape[1] ** 2 for linear in linears])  # a factor, a sweep
        own: dict[str, tuple[LayerReport, Tensor | None]] = {}
        for owner in owners:
            linear, evidence = part.pop(0)  # what was solved is given up
            if owner == ranks.rank():
                with full_fp32(linear.weight.device.type):  # not as a caller's autocast would have it
                    own[linear.name] = _prune_linear(linear, evidence, method, objective)
        told = ranks.gathered({name: (report, keep is not None) for name, (report, keep) in own.items()})
        for linear, owner in zip(linears, owners, strict=True):
            reports[linear.name], pruned = told[owner][linear.name]
            if pruned:
                weight = linear.weight.data
                keep = own[linear.name][1] if owner == ranks.rank() else None
                if keep is None:
                    keep = torch.empty(linear.shape, dtype=torch.bool, device=weight.device)
                linear.weight.data, keeps[linear.name] = ranks.sent(owner, weight, keep)

    if calls is None or method.needs is Needs.NOTHING:
        solve([(linear, None) for linear in block.linears])
    elif block.linears:
        with fast_forward(calls.hidden[0], block.module):
            layout = calls.within_memory(partial(layouts.find, block, index))

        def evidence_of(groups: list[list[Linear]], calls: Calls) -> list[Evidence]:
            hidden = calls.dense_hidden if objective.needs_dense_path else None
            path = None if hidden is None else (dense, hidden)
            sensitivity = objective.sensitivity
            return collect(groups, layout, block, index, calls, method.needs, dense=path, sensitivity=sensitivity)

        for stage in layout.stages() if objective.staged else [layout.groups]:
            before = [linear.weight.data for linear in block.linears]
            for groups in _parts(stage, method.needs):
                with fast_forward(calls.hidden[0], block.module), dense_weights(block.linears, before):
                    evidence = calls.within_memory(partial(evidence_of, groups))
                part: list[tuple[Linear, Evidence | None]] = [
                    (linear, found) for group, found in zip(groups, evidence, strict=True) for linear in group
                ]
                del evidence
                solve(part)
    return [reports[linear.name] for linear in block.linears], keeps


def _parts(stage: list[list[Linear]], needs: Needs) -> list[list[list[Linear]]]:
    """The groups of a stage, together as far as their statistics take less than STATISTICS."""
    parts: list[list[list[Linear]]] = [[]]
    total = 0
    for group in stage:
        width = group[0].shape[1]
        size = 4 * width * (width if needs is Needs.GRAM else SAMPLE_TOKENS)
        if total + size > STATISTICS and parts[-1]:
            parts.append([])
            total = 0
        parts[-1].append(group)
        total += size
    return parts


def _prune_linear(
    linear: Linear, evidence: Evidence | None, method: Method, objective: Objective
) -> tuple[LayerReport, Tensor | None]:
    """Solve one matrix and write it. The mask is None where it stays dense, to the bit."""
    started = time.perf_counter()
    weight = linear.read()
    stats = None if evidence is None else evidence.stats
    report = LayerReport(linear.name, list(weight.shape))
    if method.needs > Needs.NOTHING:
        if stats is None or stats.tokens == 0:
            report.skipped = "no calibration token reached it"
            return report, None
        if not all_finite(stats.mean_square):
            raise ValueError(not_finite(f"the inputs of {linear.name}", linear.weight.dtype))
    try:
        target = weight if evidence is None else _target(weight, linear.name, evidence, objective)
        solved = _solve(target, linear, stats, method, objective)
    except NotPositiveDefinite as error:
        raise NotPositiveDefinite(f"{linear.name}: {error}") from error
    keep = None if solved.keep.all() else solved.keep
    if keep is not None:
        problem = violation(solved.weight, linear.pattern)
        if problem is not None:
            raise ValueError(f"{type(method).__name__} did not keep to {linear.pattern} in {linear.name}: {problem}.")
        linear.write(solved.weight + 0.0)  # no -0.0: what is in memory is what is loaded from disk, to the bit
    report.pattern = str(linear.pattern)
    report.sparsity = 1 - int(solved.weight.count_nonzero()) / solved.weight.numel()
    report.seconds = time.perf_counter() - started
    report.note = solved.note
    if evidence is not None:
        report.routed = evidence.routed
    if stats is not None:
        report.error = stats.relative_error(target, solved.weight)
    return report, keep


def _target(weight: Tensor, name: str, evidence: Evidence, objective: Objective) -> Tensor:
    """The matrix that is to be pruned [out, in]: W + (a W E[(x_d - x) x^T] + b E[(r_d - r) x^T]) (G + damping)^-1.

    The least squares fit, from pruned inputs x, of the part of the dense path's output that a and b ask for.
    """
    pull = torch.zeros_like(weight)
    if objective.input_shift and evidence.shift is not None:
        pull += objective.input_shift * (weight @ evidence.shift.mean)
    if objective.residual_shift and name in evidence.residual:
        pull += objective.residual_shift * evidence.residual[name].mean
    if not pull.any():
        return weight
    factor = evidence.stats.inverse_factor(objective.damping)
    return weight + (pull @ factor.T) @ factor


def _solve(target: Tensor, linear: Linear, stats: object, method: Method, objective: Objective) -> Solved:
    """Rows of an unstructured layer compete for weights: those that the likelihood feels more are scaled up for it.

    Every method here is indifferent to the scale of a row but for this competition; N:M has none.
    """
    felt = None if objective.sensitivity is None else objective.sensitivity.rows.get(linear.name)
    if felt is None:
        return method.solve(target, stats, linear.pattern)
    felt = felt.to(target.device)
    scale = (felt / felt.mean().clamp(min=torch.finfo(felt.dtype).tiny)).clamp(min=1e-4).sqrt()[:, None]
    solved = method.solve(target * scale, stats, linear.pattern)
    return solved._replace(weight=solved.weight / scale)
