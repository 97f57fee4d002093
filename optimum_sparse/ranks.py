"""Several processes prune one model: each has it, a share of the calibration data, and solves some layers.

The process group is the caller's, as `accelerate.PartialState()` sets it up. Statistics are sums over tokens, and so
are added up; a solved matrix is sent to the others, so that all end with the same model, to the bit. Without a process
group, or with one process in it, every function here gives back what it was given.

Processes meet in `gathered`, which `total` and `sent` begin with, and nowhere else: one that fails (`together`) says
so there, and the others fail as well instead of waiting. It cannot be nested: two answers would be one too many.
Objects go over the current CUDA device where NCCL is the backend, tensors over the device on which they are.
"""

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm.auto import tqdm


T = TypeVar("T")


class OtherProcessFailed(RuntimeError):
    """The error is another process's."""


class OtherProcessRefused(OtherProcessFailed, ValueError):
    """It is a ValueError there, and so one here."""


def rank() -> int:
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def world() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def progress(*args: Any, **options: Any) -> tqdm:
    """tqdm's bar, which the first process alone shows. It passes no `disable`, which would outweigh TQDM_DISABLE."""
    return tqdm(*args, **options | ({"disable": True} if rank() > 0 else {}))


@contextlib.contextmanager
def together() -> Iterator[None]:
    """All processes leave this in the same way: if one fails inside, all do.

    Raises:
        OtherProcessFailed: another one did, naming it and its error.
    """
    try:
        yield
        gathered(None)
    except OtherProcessFailed:
        raise
    except Exception as error:
        kind = OtherProcessRefused if isinstance(error, ValueError) else OtherProcessFailed
        _exchange((kind(f"{type(error).__name__}: {error}"), None))
        raise


def gathered(value: T) -> list[T]:
    """What each process passed, in their order."""
    answers = _exchange((None, value))
    for number, (error, _) in enumerate(answers):
        if error is not None:
            raise type(error)(f"process {number} of {world()} failed, and so this one ends: {error}")
    return [value for _, value in answers]


def _exchange(answer: tuple[OtherProcessFailed | None, Any]) -> list[tuple[OtherProcessFailed | None, Any]]:
    answers = [answer] * world()
    if world() > 1:
        dist.all_gather_object(answers, answer)
    return answers


def total(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Each tensor becomes the sum of what all processes have in its place."""
    if world() > 1:
        gathered(None)
        for tensor in tensors:
            dist.all_reduce(tensor)
    return tensors


def sent(source: int, *tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors of process `source`; those of the others say what shapes, dtypes and devices these have."""
    if world() == 1:
        return tensors
    gathered(None)
    if rank() == source:
        tensors = tuple(tensor.contiguous() for tensor in tensors)
    else:
        tensors = tuple(torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in tensors)
    for tensor in tensors:
        dist.broadcast(tensor.view(torch.uint8), source)  # bytes: not every backend knows every dtype
    return tensors


def joined(x: Tensor) -> Tensor:
    """x [n, ...] of all processes, one after the other; each may have another n."""
    return x if world() == 1 else torch.cat(gathered(x.cpu())).to(x.device)


def check_same(**values: Any) -> None:
    """Refuse values that differ between the processes.

    Raises:
        ValueError: on all of them, naming what differs and where.
    """
    first, *others = gathered(values)
    for number, other in enumerate(others, 1):
        different = [name for name in values if other[name] != first[name]]
        if different:
            raise ValueError(
                f"processes 0 and {number} of {world()} have different {' and '.join(different)}: give all of them "
                "the same config, weights and calibration data, unsplit; pruning itself splits the data over them."
            )


def check_devices(devices: Iterable[torch.device]) -> None:
    """Refuse a model that runs on other GPUs than the current one, over which this process meets the others.

    Raises:
        ValueError: naming them.
    """
    gpus = {device.index for device in devices if device.type == "cuda"} if world() > 1 else set()
    if gpus and gpus != {torch.cuda.current_device()}:
        raise ValueError(
            f"process {rank()} of {world()} has a model on GPU {', '.join(map(str, sorted(gpus)))}, and its own is "
            f"{torch.cuda.current_device()}: load all of the model there, with "
            "device_map={'': accelerate.PartialState().device}, or start one process."
        )


def share(batches: list[dict[str, Tensor]]) -> tuple[list[dict[str, Tensor]], int]:
    """This process's part of the batches, which are cut into smaller ones if there are too few.

    Returns:
        the batches, one at least, and how many sequences come before them.

    Raises:
        ValueError: fewer sequences than processes.
    """
    while len(batches) < world():
        halves = [
            dict(zip(batch, parts, strict=True))
            for batch in batches
            for parts in zip(*(tensor.chunk(2) for tensor in batch.values()), strict=True)
        ]
        if len(halves) == len(batches):
            raise ValueError(
                f"{len(batches)} calibration sequences for {world()} processes: each needs one at least. Set "
                f"num_samples={world()} or more, or start fewer processes."
            )
        batches = halves
    start, stop = (len(batches) * number // world() for number in (rank(), rank() + 1))
    return batches[start:stop], sum(len(batch["input_ids"]) for batch in batches[:start])


def spread(costs: Sequence[float]) -> list[int]:
    """Which process does what, largest first, so that all have about the same to do."""
    loads = [0.0] * world()
    chosen = [0] * len(costs)
    for item in sorted(range(len(costs)), key=lambda item: -costs[item]):
        chosen[item] = loads.index(min(loads))
        loads[chosen[item]] += costs[item]
    return chosen


def before(count: int) -> int:
    """The sum of `count` over the processes before this one."""
    return sum(gathered(count)[: rank()])
