"""Offloaded models: bring one block's weights to the device that computes it, and keep what was written to them."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from accelerate.hooks import AlignDevicesHook, SequentialHook
from accelerate.utils import OffloadedWeightsLoader, PrefixedDataset, named_module_tensors, offload_weight
from torch import Tensor, nn


@contextlib.contextmanager
def onload(block: nn.Module, keep: bool = True) -> Iterator[None]:
    """Every offloaded weight of `block` is present inside; on leaving, the values then in place are offloaded again.

    CPU-offloaded weights are replaced in the map that accelerate reads from. Disk-offloaded ones are written to the
    offload folder; the files the model was loaded from are never touched, although accelerate's index may point into
    them. Without accelerate hooks nothing is done.

    Args:
        keep: False: what was written to offloaded weights is dropped on leaving.
    """
    offloaded = [(module, hook) for module in block.modules() if (hook := _offload_hook(module)) is not None]
    for module, hook in offloaded:
        hook.pre_forward(module)
        hook.offload = False  # the forward passes inside leave the weights where they are
    try:
        yield
    finally:
        for module, hook in offloaded:
            hook.offload = True
            if keep:
                for name, tensor in named_module_tensors(
                    module, include_buffers=hook.offload_buffers, recurse=hook.place_submodules
                ):
                    _store(hook.weights_map, name, tensor)
            hook.post_forward(module, None)


def _offload_hook(module: nn.Module) -> AlignDevicesHook | None:
    hook = getattr(module, "_hf_hook", None)
    for candidate in hook.hooks if isinstance(hook, SequentialHook) else (hook,):
        if isinstance(candidate, AlignDevicesHook) and candidate.offload:
            return candidate
    return None


def _store(weights: Any, name: str, tensor: Tensor) -> None:
    """Make weights[name] read as `tensor` from now on."""
    if isinstance(weights, PrefixedDataset):
        return _store(weights.dataset, weights.prefix + name, tensor)
    previous = weights[name]
    if torch.equal(previous.to(tensor.device), tensor):
        return None
    tensor = tensor.detach().to("cpu")
    if not isinstance(weights, OffloadedWeightsLoader):
        weights[name] = tensor
    elif name in weights.state_dict or weights.save_folder is None:
        weights.state_dict[name] = tensor
    else:
        offload_weight(tensor, name, weights.save_folder, index=weights.index)
    return None


def usable_device(name: str | int | torch.device) -> torch.device:
    """The device with this name, or the GPU with this number. Raises ValueError unless there is one here."""
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(
            f"there is no device {name!r} here: it must be 'cpu', or 'cuda' (or 'cuda:0') where PyTorch finds a GPU."
        ) from error
    return device


def execution_device(module: nn.Module) -> torch.device:
    """Where a module computes: where accelerate brings its weights if they are offloaded, else where they are."""
    hook = _offload_hook(module)
    if hook is None or hook.execution_device is None:
        return next(module.parameters()).device
    return torch.device(hook.execution_device)


def offloaded_weight(module: nn.Module, name: str) -> Tensor:
    """The value of a parameter that is offloaded (its own tensor is on the meta device)."""
    hook = _offload_hook(module)
    if hook is None:
        raise ValueError(f"a {type(module).__name__} has no data for {name!r}: it is on the meta device.")
    return hook.weights_map[name]
