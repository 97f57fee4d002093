"""How fast a compressed layer is beside a dense one, on the machine that this runs on.

Weights are rotated, so that none is in a cache when its turn comes; dense and compressed take turns. Device time is
that of CUDA graphs, in which launches cost little; eager time is what a Python loop sees. On a CPU they are the same.
"""

import contextlib
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from ..core import NM, Pattern, keep_mask
from ..kernels.linear import Choice, select
from ..nn import SparseLinear


CACHE = 2**28  # bytes: more than any cache that weights could stay in, and so what a rotation goes through at least
Call = Callable[[], Tensor]


@dataclass(frozen=True)
class Speed:
    """One shape and number of tokens. Times are seconds per call, medians.

    Attributes:
        dense, sparse: device time of torch.nn.functional.linear, and of the compressed layer.
        dense_eager, sparse_eager: with what Python and launches cost.
        torch_sparse: device time of PyTorch's own 2:4, where that exists.
        ceiling: the compressed layer's bytes per second, relative to those of a copy of the same memory.
        error: |y - float64| / |float64| of the compressed layer; `dense_error` of the dense one.
        choice: what ran, and why.
    """

    shape: tuple[int, int]
    tokens: int
    dense: float
    sparse: float
    dense_eager: float
    sparse_eager: float
    torch_sparse: float | None
    ceiling: float
    error: float
    dense_error: float
    choice: Choice

    @property
    def ratio(self) -> float:
        return self.dense / self.sparse


@torch.no_grad()
def measure_speed(
    shape: tuple[int, int],
    tokens: Sequence[int],
    pattern: Pattern,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str = "cpu",
    *,
    budget: float = 0.3,
) -> list[Speed]:
    """A layer (out, in) with random weights that follow `pattern`, for each number of tokens.

    Args:
        budget: seconds to measure each of the two for, about.

    Raises:
        ArithmeticError: a result is further from float64 than twice the dense layer's and its dtype's precision.
    """
    device = torch.device(device)
    # CUDA graphs and events are those of the current device.
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        return _measure(shape, tokens, pattern, dtype, device, budget)


def _measure(
    shape: tuple[int, int],
    tokens: Sequence[int],
    pattern: Pattern,
    dtype: torch.dtype,
    device: torch.device,
    budget: float,
) -> list[Speed]:
    generator = torch.Generator(device).manual_seed(0)
    weight = torch.randn(shape, generator=generator, device=device)
    weight = (weight * keep_mask(weight.abs(), pattern)).to(dtype)
    first = SparseLinear.from_dense(weight, None, pattern)
    packed = sum(tensor.numel() * tensor.element_size() for tensor in first.compressed().values())
    copies = min(max(2, -(-CACHE // packed)), 200)  # layers that are tiny stay in the cache
    dense = [weight.clone() for _ in range(copies)]
    sparse = [SparseLinear.from_dense(weight, None, pattern) for _ in range(copies)]
    semi_structured = _semi_structured(dense, pattern)
    bandwidth = _copy_bandwidth(device, budget)
    found = []
    for count in tokens:
        x = torch.randn(count, shape[1], generator=generator, device=device).to(dtype)
        calls_dense: list[Call] = [partial(F.linear, x, w) for w in dense]
        calls_sparse: list[Call] = [partial(layer, x) for layer in sparse]
        exact = x.double() @ weight.double().T
        errors = [
            ((y.double() - exact).norm() / exact.norm()).item()
            for y in map(_poisoned, (calls_dense[0], calls_sparse[0]))
        ]
        if not errors[1] <= 2 * errors[0] + torch.finfo(dtype).eps:
            raise ArithmeticError(
                f"{shape}, {count} tokens: error {errors[1]:.2g}, of the dense layer {errors[0]:.2g}."
            )
        eager = _eager([calls_dense, calls_sparse], device, budget)
        times = eager if device.type != "cuda" else [_graph(calls, budget) for calls in (calls_dense, calls_sparse)]
        other = _graph([partial(F.linear, x, w) for w in semi_structured], budget) if semi_structured else None
        found.append(
            Speed(
                shape,
                count,
                dense=times[0],
                sparse=times[1],
                dense_eager=eager[0],
                sparse_eager=eager[1],
                torch_sparse=other,
                ceiling=packed / times[1] / bandwidth,
                error=errors[1],
                dense_error=errors[0],
                choice=select(device, dtype, pattern, shape, count),
            )
        )
    return found


def _poisoned(call: Call) -> Tensor:
    """The result of a call whose output most likely takes memory full of NaN: what is not written shows."""
    like = call()
    torch.full_like(like, float("nan"))
    del like
    return call()


def _eager(kinds: list[list[Call]], device: torch.device, budget: float) -> list[float]:
    """Median seconds per call of each kind, in rounds over all of its calls; kinds take turns."""
    times: list[list[float]] = [[] for _ in kinds]
    started = time.perf_counter()
    while len(times[0]) < 4 or time.perf_counter() - started < len(kinds) * budget:
        for calls, taken in zip(kinds, times, strict=True):
            _synchronize(device)
            begin = time.perf_counter()
            for call in calls:
                call()
            _synchronize(device)
            taken.append((time.perf_counter() - begin) / len(calls))
    return [statistics.median(taken[1:]) for taken in times]  # the first warms up


def _graph(calls: list[Call], budget: float) -> float:
    """Median seconds per call inside a CUDA graph of all of them."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for call in calls[:3]:
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = [call() for call in calls]
    times: list[float] = []
    graph.replay()
    started = time.perf_counter()
    while len(times) < 5 or time.perf_counter() - started < budget:
        before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        before.record()
        graph.replay()
        after.record()
        torch.cuda.synchronize()
        times.append(before.elapsed_time(after) / 1e3 / len(kept))
    return statistics.median(times)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _copy_bandwidth(device: torch.device, budget: float) -> float:
    """Bytes per second, read and written, of a large copy."""
    source = torch.ones(CACHE, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * CACHE / _eager([[lambda: target.copy_(source)]], device, budget)[0]


def _semi_structured(weights: list[Tensor], pattern: Pattern) -> list[Tensor]:
    """The weights as PyTorch's own 2:4 takes them; none where it does not."""
    if not weights[0].is_cuda or pattern != NM(2, 4):
        return []
    try:
        return [torch.sparse.to_sparse_semi_structured(weight) for weight in weights]
    except (RuntimeError, ValueError, NotImplementedError):
        return []
