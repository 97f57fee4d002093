"""The seam: y = x W^T + b for a compressed W as one op, `optimum_sparse::linear`, and the choice of what runs it.

The op has a reference in plain PyTorch, which expands W and multiplies, for every device and dtype; a kernel where
`select` names one; a fake implementation for torch.compile; gradients for x and the bias, not for W. `expand`, the
dense W, is an op as well.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ..formats import bitmask
from . import cpu


CPU_TOKENS = 8  # up to here reading less memory wins, beyond it dense products do
SLAB = 2**20  # weights that are expanded at a time on the CPU: they stay in its cache


class Choice(NamedTuple):
    """What runs a layer on a number of tokens, and why."""

    backend: str
    reason: str


def select(device: torch.device, dtype: torch.dtype, tokens: int) -> Choice:
    """What multiplies x [tokens, in] by a compressed weight of this dtype."""
    if device.type != "cpu":
        return Choice("reference", f"there is no kernel for {device.type} yet")
    if dtype not in cpu.TYPES:
        return Choice("reference", f"the CPU kernel does not take {dtype}")
    if cpu.library() is None:
        return Choice("reference", "the CPU kernel was not built")
    if tokens > CPU_TOKENS:
        return Choice("expand", f"more than {CPU_TOKENS} tokens: dense products, of some expanded rows at a time")
    return Choice(
        "cpu", f"{cpu.LEVELS[cpu.best_level()]}, up to {CPU_TOKENS} tokens: reads the compressed weight alone"
    )


_LIBRARY = torch.library.Library("optimum_sparse", "FRAGMENT")
_MATRIX = "Tensor weight, Tensor weight_mask, Tensor? weight_rows, int in_features"
_LIBRARY.define(f"expand({_MATRIX}) -> Tensor")
_LIBRARY.define(f"linear(Tensor x, {_MATRIX}, Tensor? bias) -> Tensor")
expand = torch.ops.optimum_sparse.expand.default

linear = torch.ops.optimum_sparse.linear.default


def _expand_reference(weight: Tensor, weight_mask: Tensor, weight_rows: Tensor | None, in_features: int) -> Tensor:
    return bitmask.decode_valid({"weight": weight, "weight_mask": weight_mask}, (len(weight_mask), in_features))


def _expand_cpu(weight: Tensor, weight_mask: Tensor, weight_rows: Tensor | None, in_features: int) -> Tensor:
    if weight.dtype not in cpu.TYPES or cpu.library() is None:
        return _expand_reference(weight, weight_mask, weight_rows, in_features)
    return cpu.expand(weight, weight_mask, weight_rows, in_features, cpu.best_level())


def _expand_fake(weight: Tensor, weight_mask: Tensor, weight_rows: Tensor | None, in_features: int) -> Tensor:
    return weight.new_empty(weight_mask.shape[0], in_features)


def reference(
    x: Tensor, weight: Tensor, weight_mask: Tensor, weight_rows: Tensor | None, in_features: int, bias: Tensor | None
) -> Tensor:
    """x [..., in] -> [..., out], on any device."""
    _check(x, weight, weight_mask, weight_rows, in_features, bias)
    return F.linear(x, expand(weight, weight_mask, weight_rows, in_features), bias)


def _linear_cpu(
    x: Tensor, weight: Tensor, weight_mask: Tensor, weight_rows: Tensor | None, in_features: int, bias: Tensor | None
) -> Tensor:
    _check(x, weight, weight_mask, weight_rows, in_features, bias)
    if not weight_mask.numel():
        return reference(x, weight, weight_mask, weight_rows, in_features, bias)
    backend = select(x.device, weight.dtype, x.numel() // in_features).backend
    if backend == "cpu":
        y = cpu.linear(x.reshape(-1, in_features), weight, weight_mask, weight_rows, bias, cpu.best_level())
        return y.view(*x.shape[:-1], len(weight_mask))
    if backend == "reference":
        return reference(x, weight, weight_mask, weight_rows, in_features, bias)
    slab = max(1, SLAB // in_features)
    parts = []
    for first in range(0, len(weight_mask), slab):
        here = slice(first, first + slab)
        if weight_rows is None:
            dense = expand(weight[here], weight_mask[here], None, in_features)
        else:  # where rows begin is counted from the first of all
            dense = expand(weight, weight_mask[here], weight_rows[first : first + slab + 1], in_features)
        parts.append(F.linear(x, dense, None if bias is None else bias[here]))
    return parts[0] if len(parts) == 1 else torch.cat(parts, -1)


def _linear_fake(
    x: Tensor, weight: Tensor, weight_mask: Tensor, weight_rows: Tensor | None, in_features: int, bias: Tensor | None
) -> Tensor:
    _check(x, weight, weight_mask, weight_rows, in_features, bias)
    return x.new_empty(*x.shape[:-1], weight_mask.shape[0])


def _check(
    x: Tensor, weight: Tensor, weight_mask: Tensor, weight_rows: Tensor | None, in_features: int, bias: Tensor | None
) -> None:
    """Shapes and types. What the tensors hold is checked once, when they are loaded: bitmask.validate."""
    for name, tensor in (("weight_mask", weight_mask), ("weight_rows", weight_rows), ("bias", bias), ("x", x)):
        if tensor is not None and tensor.device != weight.device:
            raise ValueError(f"{name} is on {tensor.device}, the compressed weight on {weight.device}: move one.")
    for name, tensor in (("bias", bias), ("x", x)):
        if tensor is not None and tensor.dtype != weight.dtype:
            raise ValueError(f"{name} is {tensor.dtype}, the compressed weight {weight.dtype}: convert one.")
    if not x.dim() or x.shape[-1] != in_features:
        raise ValueError(f"x has shape {list(x.shape)}: its last dimension must be {in_features}, the layer's inputs.")
    rows = weight_mask.shape[0]
    if weight_mask.dtype != torch.uint8 or weight_mask.dim() != 2 or weight_mask.shape[1] != -(-in_features // 8):
        raise ValueError(f"weight_mask is {_describe(weight_mask)}: must be uint8 [out, {-(-in_features // 8)}].")
    if weight_rows is not None and (weight_rows.dtype != torch.int64 or weight_rows.shape != (rows + 1,)):
        raise ValueError(f"weight_rows is {_describe(weight_rows)}: must be int64 [{rows + 1}].")
    if bias is not None and bias.shape != (rows,):
        raise ValueError(f"bias has shape {list(bias.shape)}: must be [{rows}], the layer's outputs.")


def _describe(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def _save(ctx: Any, inputs: tuple, output: Tensor) -> None:
    _, weight, weight_mask, weight_rows, ctx.in_features, _ = inputs
    if weight.requires_grad:
        raise ValueError(
            "a compressed weight cannot be trained: load the model without run_compressed=True, or freeze it "
            "(weight.requires_grad_(False)) and train adapters."
        )
    ctx.save_for_backward(weight, weight_mask, weight_rows)


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    for_x, for_bias = ctx.needs_input_grad[0], ctx.needs_input_grad[5]
    return (
        gradient @ expand(*ctx.saved_tensors, ctx.in_features) if for_x else None,
        *(None, None, None, None),
        gradient.reshape(-1, gradient.shape[-1]).sum(0) if for_bias else None,
    )


_LIBRARY.impl("expand", _expand_reference, "CompositeExplicitAutograd")
_LIBRARY.impl("expand", _expand_cpu, "CPU")
_LIBRARY.impl("linear", reference, "CompositeExplicitAutograd")
_LIBRARY.impl("linear", _linear_cpu, "CPU")
torch.library.register_fake("optimum_sparse::expand", _expand_fake, lib=_LIBRARY)
torch.library.register_fake("optimum_sparse::linear", _linear_fake, lib=_LIBRARY)
torch.library.register_autograd("optimum_sparse::linear", _backward, setup_context=_save, lib=_LIBRARY)
