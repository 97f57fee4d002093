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

from .. import ranks
from ..kernels.precision import fast_forward
from .parts import Arguments, Block, Calls, Parts, Tensors


@dataclass(frozen=True)
class Reconstruction:
    """How blocks are reconstructed.

    Attributes:
        learning_rate: of Adam, relative to the root mean square of each matrix's kept weights.
        passes: over the calibration data.
        samples: sequences to use, from the first on; None: all.
        seed: of the order of the batches.
        batch_size: sequences per step.
        arguments: what the blocks are called with for batches of that size, as in Calls; used up.
    """

    learning_rate: float = 0.01
    passes: int = 8
    samples: int | None = None
    seed: int = 0
    batch_size: int | None = None
    arguments: Arguments | None = None


def reconstruct(
    block: Block,
    index: int,
    calls: Calls,
    targets: Tensors,
    keeps: dict[str, Tensor],
    token_weight: list[Tensor],
    settings: Reconstruction,
) -> tuple[float, float]:
    """Train the kept weights of a pruned block, and its norms and biases, in place.

    Masters and Adam's moments are fp32, of this block only. If the loss does not fall, nothing is changed.

    Several processes make the steps that one would make: whoever has a batch computes its gradient, for all. So
    training does not get faster, but neither does its result depend on how many there are.

    Args:
        targets: for each batch the dense block's output [batch, tokens, hidden].
        keeps: by the linear's name, bool [out, in]. Linears that are not in it stay as they are.
        token_weight: for each batch fp32 [batch * tokens]; 0 for padding.

    Returns:
        mean |output - target|^2 / mean |target - input|^2 before and after, tokens weighed in both.

    Raises:
        ValueError: the loss is not finite.
    """
    calls, targets, token_weight = _in_small_batches(calls, targets, token_weight, settings)
    parameters = dict(block.module.named_parameters())
    names = {id(parameter): name for name, parameter in parameters.items()}
    frozen = {name: parameter.detach() for name, parameter in parameters.items()}
    # A trained parameter is p * gain: p starts near 1, so that one learning rate suits all; gain is 0 where weights
    # were removed. Norms and biases move a third as fast: they are few, and each touches everything.
    gains: dict[str, Tensor] = {}
    still: set[int] = set()  # what belongs to linears that are not pruned
    for module in block.module.modules():
        if any(parameter.dim() > 1 for parameter in module.parameters(recurse=False)):
            still |= {id(parameter) for parameter in module.parameters(recurse=False)}
    for linear in block.linears:
        if linear.name in keeps:
            still -= {id(parameter) for parameter in linear.module.parameters()}
            keep = keeps[linear.name].T if linear.transposed else keeps[linear.name]
            weight = frozen[names[id(linear.weight)]].float()
            gains[names[id(linear.weight)]] = keep * (weight.square().sum() / keep.sum().clamp(min=1)).sqrt()
    for name, parameter in frozen.items():
        if parameter.dim() == 1 and parameter.is_floating_point() and id(parameters[name]) not in still:
            gains[name] = 0.3 * parameter.float().square().mean().sqrt()
    trained = {
        name: torch.where(gain != 0, frozen[name].float() / gain, 0).requires_grad_() for name, gain in gains.items()
    }

    def weights() -> dict[str, Tensor]:
        return {name: (p * gains[name]).to(frozen[name].dtype) for name, p in trained.items()}

    def weighed(x: Tensor, y: Tensor, batch: int) -> Tensor:
        """Sum over tokens of the mean squared difference, weighed; what is in padding does not matter."""
        weight = token_weight[batch].to(x.device)
        return (_squared(x, y).mean(-1).flatten().where(weight > 0, 0) * weight).sum()

    changes = [weighed(y, calls.hidden[batch].to(y.device), batch) for batch, y in enumerate(targets)]
    scale = 1 / ranks.joined(torch.stack(changes)).mean().clamp(min=torch.finfo(torch.float32).tiny)

    def loss(batch: int) -> Tensor:
        replaced = frozen | weights()

        def call(*args: object, **kwargs: object) -> Tensor:
            return functional_call(block.module, replaced, args, kwargs)

        with fast_forward(calls.hidden[batch]):
            output = calls.run(call, index, batch)
        return weighed(output, targets[batch], batch) * scale

    def total() -> float:
        with torch.no_grad():
            return ranks.joined(torch.stack([loss(batch) for batch in range(len(targets))])).mean().item()

    before = total()
    _train(loss, list(trained.values()), calls, settings, index)
    after = total()
    if not (math.isfinite(before) and math.isfinite(after)):
        raise ValueError(
            f"reconstruction of {block.name} went from a loss of {before:g} to {after:g}: lower "
            f"reconstruction_learning_rate={settings.learning_rate:g}, or load the model in bfloat16 or float32."
        )
    if after >= before:
        return before, before
    trained_weights = {name: value.detach() for name, value in weights().items()}
    for name, value in zip(trained_weights, ranks.sent(0, *trained_weights.values()), strict=True):
        parameters[name].data = value
    return before, after


def _in_small_batches(
    calls: Calls, targets: Tensors, token_weight: list[Tensor], settings: Reconstruction
) -> tuple[Calls, Tensors, list[Tensor]]:
    """The same data in batches of settings.batch_size, if that is given."""
    if settings.arguments is None or settings.batch_size is None:
        return calls, targets, token_weight
    size = settings.batch_size
    token_weight = [
        part.flatten()
        for weight, hidden in zip(token_weight, calls.hidden, strict=True)
        for part in weight.view(len(hidden), -1).split(size)
    ]
    return Calls(Parts(calls.hidden, size), settings.arguments), Parts(targets, size), token_weight


def _squared(x: Tensor, y: Tensor) -> Tensor:
    return (x.float() - y.float()).square()


@torch.enable_grad()
def _train(
    loss: Callable[[int], Tensor], trained: list[Tensor], calls: Calls, settings: Reconstruction, index: int
) -> None:
    """Adam with warm-up and cosine decay."""
    sizes = ranks.gathered([len(hidden) for hidden in calls.hidden])
    places = [(owner, batch) for owner, of_rank in enumerate(sizes) for batch in range(len(of_rank))]
    samples, used = 0, 0
    for owner, batch in places:
        if settings.samples is None or samples < settings.samples:
            samples, used = samples + sizes[owner][batch], used + 1
    steps = settings.passes * used
    warm_up = max(1, steps // 20)
    optimizer = torch.optim.Adam(trained, betas=(0.9, 0.95), eps=1e-10, fused=trained[0].is_cuda or None)
    generator = torch.Generator().manual_seed(settings.seed + index)
    step = 0
    for _ in range(settings.passes):
        for place in torch.randperm(used, generator=generator).tolist():
            owner, batch = places[place]
            decay = 0.5 + 0.5 * math.cos(math.pi * max(0, step - warm_up) / max(1, steps - warm_up))
            optimizer.param_groups[0]["lr"] = settings.learning_rate * min((step + 1) / warm_up, decay)
            if owner == ranks.rank():
                (loss(batch) * calls.hidden[batch].numel()).backward()  # a mean's gradients would vanish in fp16
            reached = ranks.gathered([p.grad is not None for p in trained])[owner]
            moved = [p for p, by_gradient in zip(trained, reached, strict=True) if by_gradient]
            gradients = ranks.sent(owner, *(p.detach() if p.grad is None else p.grad for p in moved))
            for p, gradient in zip(moved, gradients, strict=True):
                p.grad = gradient
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            step += 1
