"""Least squares on a fixed support: the best kept weights for a given mask."""

import torch
from torch import Tensor


def polish(weight: Tensor, keep: Tensor, target: Tensor, gram: Tensor, damping: float, iterations: int) -> Tensor:
    """Minimize tr((Q - target) G (Q - target)^T) over Q that is 0 outside `keep`, by conjugate gradients.

    All rows at once, each its own problem, preconditioned by the diagonal of G (ALPS, arXiv 2406.07831, section 3.3).

    Args:
        weight: where to begin, fp32 [out, in]; not modified.
        keep: bool [out, in].
        target: fp32 [out, in].
        gram: symmetric positive semi-definite fp32 [in, in]; weights of inputs with G_jj = 0 do not change.
        damping: pulls towards the target, relative to the mean of the diagonal.

    Returns:
        fp32 [out, in]; the undamped error of no row is above what it was.
    """
    tiny, eps = torch.finfo(weight.dtype).tiny, torch.finfo(weight.dtype).eps
    diagonal = gram.diagonal()
    live = diagonal > 0
    ridge = damping * diagonal.sum() / live.sum().clamp(min=1)
    support = keep & live
    inverse = support / (diagonal + ridge).clamp(min=tiny)

    def error(q: Tensor) -> Tensor:
        return (((target - q) @ gram) * (target - q)).sum(1, keepdim=True)

    x = weight * keep
    before = error(x)
    residual = ((target - x) @ gram + ridge * (target - x)) * support
    direction = residual * inverse
    power = (residual * direction).sum(1, keepdim=True)
    converged = eps**2 * power
    for _ in range(iterations):
        image = (direction @ gram + ridge * direction) * support
        curvature = (direction * image).sum(1, keepdim=True)
        # No step where what is left, or the curvature of a singular G, is rounding.
        flat = 10 * eps * (direction.square() * diagonal).sum(1, keepdim=True)
        length = torch.where((power > converged) & (curvature > flat), power / curvature.clamp(min=tiny), 0)
        x = x + length * direction
        residual = residual - length * image
        step = residual * inverse
        previous, power = power, (residual * step).sum(1, keepdim=True)
        direction = step + power / previous.clamp(min=tiny) * direction
    return torch.where(error(x).abs() <= before, x, weight * keep)  # false for what is not finite, too
