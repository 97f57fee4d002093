"""What a model is to the loop: blocks, the matrices in them, and what the blocks are called with."""

import contextlib
import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..core import Pattern


@dataclass(frozen=True)
class Linear:
    """One matrix to prune: a module whose `weight` is [out, in], or [in, out] if `transposed` (Conv1D).

    `expert`, if a router chooses the tokens that it is given, has `tokens` and `sees_all` of `nn.experts.Expert`.
    """

    name: str
    module: Any  # nn.Linear or Conv1D
    pattern: Pattern
    transposed: bool = False
    expert: Any = None

    @property
    def weight(self) -> nn.Parameter:
        return self.module.weight

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


class Tensors(Protocol):
    """For each batch a tensor: a list, or something that keeps them elsewhere than in memory."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Tensor]: ...

    def __getitem__(self, batch: int, /) -> Tensor: ...

    def __setitem__(self, batch: int, x: Tensor, /) -> None: ...


@dataclass
class Calls:
    """What the blocks are called with, recorded once from the model itself.

    Attributes:
        hidden: for each batch the input [batch, tokens, hidden] of the next block to run.
        arguments: [block][batch] -> (further positional arguments, keyword arguments) of that block.
        keep: for each batch the bool [batch, tokens] of tokens that are not padding, or None if all are real.
        share_state: blocks get the same mutable object (keys and values of other blocks, say).
        dense_hidden: what `hidden` would be if no block had been pruned; None until that is followed.
    """

    hidden: Tensors
    arguments: list[list[tuple[tuple, dict[str, Any]]]]
    keep: list[Tensor | None] = field(default_factory=list)
    share_state: bool = False
    dense_hidden: Tensors | None = None

    def run(self, block: Callable, index: int, batch: int, hidden: Tensor | None = None) -> Tensor:
        """The output of block number `index` on one batch, or on other inputs in place of the batch's own."""
        args, kwargs = self.arguments[index][batch]
        output = block(self.hidden[batch] if hidden is None else hidden, *args, **kwargs)
        return output[0] if isinstance(output, tuple) else output

    def copy(self) -> "Calls":
        """For another run from the same inputs: `prune_blocks` uses its calls up."""
        return Calls(copy.copy(self.hidden), list(self.arguments), self.keep, self.share_state)

    def real_tokens(self, x: Tensor, batch: int, name: str, which: Tensor | None = None) -> Tensor:
        """x [..., n] of one batch as [tokens, n], without padding.

        Args:
            which: int64, the batch's tokens that x holds; None: all of them.
        """
        rows = x.reshape(-1, x.shape[-1])
        keep = self.keep[batch] if self.keep else None
        if keep is None:
            return rows
        if which is not None:
            keep = keep.flatten()[which.to(keep.device)]
        if keep.numel() != len(rows):
            raise ValueError(
                f"{name} sees {len(rows)} tokens of a batch of {keep.numel()}, so its padding cannot be told apart: "
                "calibrate with sequences of equal length and no padding."
            )
        return rows[keep.reshape(-1).to(rows.device)]


@dataclass(frozen=True)
class Sensitivity:
    """How much the model's likelihood feels an error in an output y: means of squared gradients (Fisher information).

    Attributes:
        tokens: by the name of a linear or of a block, for each batch |dL/dy_t|^2 of its tokens, fp32 [batch * tokens].
        rows: by the name of a linear, the mean over tokens of (dL/dy_ti)^2, fp32 [out].
    """

    tokens: dict[str, list[Tensor]]
    rows: dict[str, Tensor]


@contextlib.contextmanager
def dense_weights(linears: list[Linear], dense: list[Tensor]) -> Iterator[None]:
    """The linears hold their dense weights (what `weight.data` was before they were pruned) inside."""
    pruned = [linear.weight.data for linear in linears]
    try:
        for linear, weight in zip(linears, dense, strict=True):
            linear.weight.data = weight
        yield
    finally:
        for linear, weight in zip(linears, pruned, strict=True):
            linear.weight.data = weight
