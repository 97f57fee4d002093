"""Block reconstruction: with the masks fixed, gradient descent on the kept weights towards the dense block's output.

Shin et al. 2024, arXiv 2406.15524, and EBFT, 2402.12419. The target is what the dense model's block gives on the dense
path, the input is what the pruned model's blocks before it give: so each block also repairs what those have lost.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.func import functional_call

from ..kernels.precision import fast_forward
from .parts import Block, Calls


@dataclass(frozen=True)
class Reconstruction:
    """How blocks are reconstructed. One step takes one batch of the calibration data.

    Attributes:
        learning_rate: of Adam, relative to the root mean square of each matrix's kept weights.
        passes: over the calibration data.
        samples: sequences to use, from the first on; None: all.
        seed: of the order of the batches.
    """

    learning_rate: float = 0.02
    passes: int = 5
    samples: int | None = None
    seed: int = 0


def reconstruct(
    block: Block,
    index: int,
    calls: Calls,
    targets: list[Tensor],
    keeps: dict[str, Tensor],
    token_weight: list[Tensor] | None,
    settings: Reconstruction,
) -> tuple[float, float]:
    """Train the kept weights of a pruned block, and its norms and biases, in place.

    Masters and Adam's moments are fp32, of this block only. If the loss does not fall, nothing is changed.

    Args:
        targets: for each batch the dense block's output [batch, tokens, hidden].
        keeps: by the linear's name, bool [out, in]. Linears that are not in it stay as they are.
        token_weight: for each batch fp32 [real tokens], with a mean of 1.

    Returns:
        mean |output - target|^2 / mean |target - input|^2 before and after.

    Raises:
        ValueError: the loss is not finite.
    """
    device = targets[0].device
    frozen = {name: parameter.detach() for name, parameter in block.module.named_parameters()}
    kept: dict[str, Tensor] = {}  # by the parameter's name
    for linear in block.linears:
        if linear.name in keeps:
            name = next(name for name, p in block.module.named_parameters() if p is linear.weight)
            kept[name] = keeps[linear.name].T if linear.transposed else keeps[linear.name]
    masters = {
        name: parameter.float().clone().requires_grad_()
        for name, parameter in frozen.items()
        if name in kept or (parameter.dim() == 1 and parameter.is_floating_point())
    }
    masks = calls.keep or [None] * len(targets)
    real = [None if mask is None else mask.flatten().to(device) for mask in masks]
    pairs = zip(calls.hidden, targets, strict=True)
    change = torch.stack([(y.float() - x.to(device).float()).square().mean() for x, y in pairs])
    scale = 1 / change.mean().clamp(min=torch.finfo(torch.float32).tiny)

    def loss(batch: int) -> Tensor:
        weights = frozen | {name: master.to(frozen[name].dtype) for name, master in masters.items()}

        def call(*args: object, **kwargs: object) -> Tensor:
            return functional_call(block.module, weights, args, kwargs)

        with fast_forward(calls.hidden[batch]):
            output = calls.run(call, index, batch)
        error = (output.float() - targets[batch].float()).square().mean(-1).flatten()  # [batch * tokens]
        mask = real[batch]
        if mask is not None:
            error = error[mask]
        if token_weight is not None:
            error = error * token_weight[batch].to(device)
        return error.mean() * scale

    def total() -> float:
        with torch.no_grad():
            return torch.stack([loss(batch) for batch in range(len(targets))]).mean().item()

    before = total()
    _train(loss, masters, kept, calls, settings, index)
    after = total()
    if not (math.isfinite(before) and math.isfinite(after)):
        raise ValueError(
            f"reconstruction of {block.name} went from a loss of {before:g} to {after:g}: lower "
            f"reconstruction_learning_rate={settings.learning_rate:g}, or load the model in bfloat16 or float32."
        )
    if after >= before:
        return before, before
    for name, parameter in block.module.named_parameters():
        if name in masters:
            parameter.data = masters[name].detach().to(parameter.dtype)
    return before, after


@torch.enable_grad()
def _train(
    loss: Callable[[int], Tensor],
    masters: dict[str, Tensor],
    kept: dict[str, Tensor],
    calls: Calls,
    settings: Reconstruction,
    index: int,
) -> None:
    """Adam with warm-up and cosine decay; removed weights have no gradient, and stay 0."""
    groups = []
    for name, master in masters.items():
        size = (kept[name].sum() if name in kept else torch.tensor(master.numel())).clamp(min=1)
        rms = (master.detach().square().sum() / size).sqrt().item()
        # Norms and biases move a third as fast: they are few, and each touches everything.
        groups.append({"params": [master], "lr": settings.learning_rate * rms * (1 if name in kept else 0.3)})
    samples, used = 0, 0
    for hidden in calls.hidden:
        if settings.samples is None or samples < settings.samples:
            samples, used = samples + len(hidden), used + 1
    steps = settings.passes * used
    warm_up = max(1, steps // 20)
    optimizer = torch.optim.Adam(
        groups, betas=(0.9, 0.95), eps=1e-10, fused=next(iter(masters.values())).is_cuda or None
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min(
            (step + 1) / warm_up, 0.5 + 0.5 * math.cos(math.pi * max(0, step - warm_up) / (steps - warm_up + 1))
        ),
    )
    generator = torch.Generator().manual_seed(settings.seed + index)
    for _ in range(settings.passes):
        for batch in torch.randperm(used, generator=generator).tolist():
            loss(batch).backward()
            for name, keep in kept.items():
                gradient = masters[name].grad
                if gradient is not None:
                    gradient.mul_(keep)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            schedule.step()
