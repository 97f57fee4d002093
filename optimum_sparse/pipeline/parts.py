"""What a model is to the loop: blocks, the matrices in them, and what the blocks are called with."""

import contextlib
import copy
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from .. import ranks
from ..core import Pattern


T = TypeVar("T")
Arguments = list[list[tuple[tuple, dict[str, Any]]]]

logger = logging.getLogger(__name__)


def all_finite(x: Tensor) -> bool:
    """No NaN and no infinity: both survive minimum and maximum, which take a thirtieth of the time of `isfinite`."""
    if x.is_complex():
        x = torch.view_as_real(x)
    elif x.is_floating_point() and x.itemsize == 1:
        x = x.float()
    return bool(torch.stack(x.aminmax()).isfinite().all())


def check_finite(module: nn.Module, name: str = "") -> None:
    """Raise ValueError if a parameter holds NaN or infinity. Those that are offloaded are passed over."""
    for path, parameter in module.named_parameters(name):
        if not parameter.is_meta and parameter.numel() and not all_finite(parameter.detach()):
            raise ValueError(f"{path} holds NaN or infinity: the checkpoint is damaged.")


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
        if not all_finite(stored):
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


class Parts:
    """Batches in parts of `size` sequences, cut when they are used: the whole may be more than the memory holds."""

    def __init__(self, batches: Tensors, size: int):
        self._batches, self.size = batches, size
        self._places = [
            (batch, slice(first, first + size)) for batch, x in enumerate(batches) for first in range(0, len(x), size)
        ]

    def __len__(self) -> int:
        return len(self._places)

    def __iter__(self) -> Iterator[Tensor]:
        return map(self.__getitem__, range(len(self)))

    def __getitem__(self, part: int, /) -> Tensor:
        batch, rows = self._places[part]
        return self._batches[batch][rows]

    def of(self, batch: int) -> list[int]:
        """The numbers of a batch's parts, in order."""
        return [part for part, (number, _) in enumerate(self._places) if number == batch]

    def __setitem__(self, part: int, x: Tensor, /) -> None:
        raise TypeError("parts of batches are only read.")


SMALLER = (
    "set a smaller batch_size= or a shorter sequence_length=, or leave blocks in host memory (device_map='auto') or "
    "on disk (prune_to_disk) until they are used."
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device, or the host, had not as much memory as was asked for."""
    on_cpu = isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)  # PyTorch has no type for it
    return on_cpu or isinstance(error, torch.OutOfMemoryError | MemoryError)


def not_finite(what: str, dtype: torch.dtype) -> str:
    """The message for activations that are not."""
    advice = " Load it in bfloat16 or float32." if dtype == torch.float16 else ""
    return (
        f"{what} hold NaN or infinity: a weight of the checkpoint does, or the model does not run in its dtype "
        f"({dtype}) on this data.{advice}"
    )


@dataclass
class Calls:
    """What the blocks are called with, recorded once from the model itself.

    Attributes:
        hidden: for each batch the input [batch, tokens, hidden] of the next block to run.
        arguments: [block][batch] -> (further positional arguments, keyword arguments) of that block.
        keep: for each batch the bool [batch, tokens] of tokens that are not padding, or None if all are real.
        share_state: blocks get the same mutable object (keys and values of other blocks, say).
        dense_hidden: what `hidden` would be if no block had been pruned; None until that is followed.
        record: `arguments` for batches of at most so many sequences; None: batches stay as they are.
        parts: the same inputs in the smaller batches that fit into memory; None until it ran out.
    """

    hidden: Tensors
    arguments: Arguments
    keep: list[Tensor | None] = field(default_factory=list)
    share_state: bool = False
    dense_hidden: Tensors | None = None
    record: Callable[[int], Arguments] | None = None
    parts: "Calls | None" = None

    def run(self, block: Callable, index: int, batch: int, hidden: Tensor | None = None) -> Tensor:
        """The output of block number `index` on one batch, or on other inputs in place of the batch's own."""
        args, kwargs = self.arguments[index][batch]
        output = block(self.hidden[batch] if hidden is None else hidden, *args, **kwargs)
        return output[0] if isinstance(output, tuple) else output

    def copy(self) -> "Calls":
        """For another run from the same inputs: `prune_blocks` uses its calls up."""
        return Calls(copy.copy(self.hidden), list(self.arguments), self.keep, self.share_state, record=self.record)

    def within_memory(self, work: Callable[["Calls"], T]) -> T:
        """`work` on these calls; once it runs out of memory, again on `parts`, in batches of half the size.

        Raises:
            torch.OutOfMemoryError: a single sequence does not fit, batches cannot be divided, or there are several
                processes.
        """
        while True:
            try:
                return work(self.parts or self)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                failed = error.with_traceback(None)  # its frames hold the tensors that are too many
            self._halve(failed)

    def _halve(self, error: RuntimeError | MemoryError) -> None:
        size = self.divided or max(len(x) for x in self.hidden)
        if size == 1:
            raise torch.OutOfMemoryError(f"a single sequence does not fit into memory: {SMALLER}") from error
        if ranks.world() > 1:  # they would wait for this one, which repeats what they have done together
            raise torch.OutOfMemoryError(
                f"{size} sequences at a time do not fit into memory, and one of {ranks.world()} processes cannot go "
                f"on with fewer by itself: set batch_size={size // 2}, or {SMALLER}"
            ) from error
        if self.record is None or self.share_state or self.hidden[0].dim() != 3:
            raise torch.OutOfMemoryError(
                f"{size} sequences at a time do not fit into memory, and what this model's blocks are called with "
                f"cannot be divided half-way: set batch_size={size // 2}, or {SMALLER}"
            ) from error
        half = (size + 1) // 2
        logger.warning("out of memory with %d sequences at a time: going on with %d.", size, half)
        torch.cuda.empty_cache()
        self.divide(half)

    @property
    def divided(self) -> int | None:
        """How many sequences at most `parts` have at a time."""
        hidden = None if self.parts is None else self.parts.hidden
        return hidden.size if isinstance(hidden, Parts) else None

    def divide(self, size: int) -> None:
        """Make `parts` of at most so many sequences. Needs `record`."""
        assert self.record is not None
        self.parts = None  # or its arguments would be there beside the new ones
        keep = [
            part
            for mask, hidden in zip(self.keep, self.hidden, strict=True)
            for part in ([None] * -(-len(hidden) // size) if mask is None else mask.split(size))
        ]
        dense = None if self.dense_hidden is None else Parts(self.dense_hidden, size)
        self.parts = Calls(Parts(self.hidden, size), self.record(size), keep, dense_hidden=dense)

    def outputs(self, block: Callable, index: int, batch: int, hidden: Tensor) -> Tensor:
        """As `run`, within memory."""

        def run(calls: Calls) -> Tensor:
            if not isinstance(calls.hidden, Parts):  # not halved
                return calls.run(block, index, batch, hidden)
            numbers = calls.hidden.of(batch)
            rows = [len(calls.hidden[number]) for number in numbers]
            parts = zip(numbers, hidden.split(rows), strict=True)
            return torch.cat([calls.run(block, index, number, part) for number, part in parts])

        return self.within_memory(run)

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
