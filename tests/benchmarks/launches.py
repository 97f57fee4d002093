"""Launches of the CUDA kernels that fit a shape and a number of tokens, timed: what `plan` chooses from.

    python tests/benchmarks/launches.py --pattern 16:32 --shapes 4096x4096 11008x4096 --tokens 1 4 8 16

Run by hand on a GPU, to choose for another one, or after a change of cuda.cu. Device time in CUDA graphs, weights
rotated past the cache, results against float64. `*` is what `plan` chooses.
"""

import argparse
import statistics
from collections.abc import Callable

import torch
from torch.nn import functional as F

from optimum_sparse.core import keep_mask, parse_pattern
from optimum_sparse.formats import bitmask, slots
from optimum_sparse.kernels import cuda


CACHE = 3 * 10**8  # bytes that a rotation goes through at least


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pattern", default="2:4")
    parser.add_argument("--sparsity", type=float)
    parser.add_argument("--shapes", nargs="+", default=["4096x4096", "11008x4096", "4096x11008"])
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 2, 4, 8, 16, 32, 64])
    parser.add_argument("--show", type=int, default=5, help="the fastest so many")
    args = parser.parse_args()
    pattern = parse_pattern(args.pattern, args.sparsity)
    print(f"{pattern}, bf16, {torch.cuda.get_device_name()}, torch {torch.__version__}; microseconds (dense / this)")
    for text in args.shapes:
        rows, columns = map(int, text.split("x"))
        weight = torch.randn(rows, columns, device="cuda")
        weight = (weight * keep_mask(weight.abs(), pattern)).bfloat16()
        first = compress(weight, pattern)
        copies = -(-CACHE // (rows * columns))
        dense = [weight.clone() for _ in range(copies)]
        packed = [clone(first) for _ in range(copies)]
        print(f"{text}: expand {time(lambda m: cuda.expand(m), packed):.1f}")
        for tokens in args.tokens:
            x = torch.randn(tokens, columns, device="cuda").bfloat16()
            exact = x.double() @ weight.double().T
            base = time(lambda w, x=x: F.linear(x, w), dense)
            chosen, found = cuda.plan(first.layout, tokens, 0), {}
            for launch in dict.fromkeys([*candidates(first.layout, tokens), *([chosen] if chosen else [])]):
                y = cuda.linear(launch, x, first, None)
                assert ((y.double() - exact).norm() / exact.norm()).item() < 4e-3, launch
                found[launch] = time(lambda m, x=x, launch=launch: cuda.linear(launch, x, m, None), packed)
            best = sorted(found, key=found.__getitem__)[: args.show]
            print(f"  {tokens} tokens, dense {base:.1f}")
            for launch in dict.fromkeys([*best, *([chosen] if chosen else [])]):
                mark = "*" if launch == chosen else " "
                us, grid = found[launch], f"{launch.grid} x {launch.threads}"
                if launch.cluster > 1:
                    grid += f" in clusters of {launch.cluster}"
                print(f"   {mark} {us:6.1f} ({base / us:.2f})  {launch.kernel} {grid}", flush=True)


def compress(weight: torch.Tensor, pattern) -> cuda.Matrix:
    found, (rows, columns) = bitmask.encode(weight, pattern), weight.shape
    values, mask, even = found["weight"], found["weight_mask"], slots.even_slots(pattern, columns)
    if even:
        pairs = even == 16 and pattern.group in (2, 4)
        return cuda.Matrix(values, mask, None, None, cuda.Layout(weight.dtype, rows, columns, even, pairs, False))
    packed = slots.pack(values, mask, columns)
    count = packed.values.shape[2]
    layout = cuda.Layout(weight.dtype, rows, columns, count, False, True)
    return cuda.Matrix(packed.values, mask, packed.overflow, packed.starts, layout)


def clone(matrix: cuda.Matrix) -> cuda.Matrix:
    return cuda.Matrix(*(None if part is None else part.clone() for part in matrix[:4]), matrix.layout)


def candidates(layout: cuda.Layout, tokens: int) -> list[cuda.Launch]:
    (processors, most_shared), launches = cuda._limits(0), []
    if tokens <= 4:
        launches.append(cuda.gather(layout, tokens, (processors, most_shared)))
    if tokens <= 64:
        launches += [cuda.multiply(layout, tokens, processors, warps) for warps in (8, 12, 16)]
        launches += [cuda.multiply(layout, tokens, 2 * processors, 8)]
    if torch.cuda.get_device_capability() >= cuda.HOPPER and tokens <= 64:
        launches += [cuda.multiply(layout, tokens, *how, cluster=2) for how in ((processors, 16), (2 * processors, 8))]
    if torch.cuda.get_device_capability() == cuda.HOPPER:
        for tile in (tile for tile in cuda.TILES if tile == 16 or tokens / 8 <= tile < 2 * tokens):
            sizes = [(2, 1, 1)]
            if tile <= 64:
                sizes += [(1, 2, 1), (2, 2, 1), (4, 1, 1)]
            if tile == 16:
                sizes.append((5, 1, 1))
            if tile > cuda.DIRECT and cuda._can_share_out(layout, 2, 2):
                sizes.append((2, 1, 2))
            for groups, blocks, cluster in sizes:
                launch = cuda.stream(layout, tokens, tile, processors, groups, blocks, cluster)
                if blocks * (launch.shared + cuda.RESERVED) <= most_shared + cuda.RESERVED:
                    launches.append(launch)
    return [launch for launch in launches if launch.shared <= most_shared]


def time(call: Callable, over: list) -> float:
    """Median microseconds per call in a CUDA graph of one call for each of `over`."""
    call(over[0])
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = [call(item) for item in over]
    taken = []
    for _ in range(8):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        taken.append(begin.elapsed_time(end) * 1e3 / len(kept))
    return statistics.median(taken[1:])


if __name__ == "__main__":
    main()
