"""What the column sweep of one layer costs on CUDA, by the Triton kernel and by the reference. Run by hand.

    python tests/benchmarks/sweep.py [--rows 16] [--warps 4] [--no-reference]

Prints milliseconds per layer (`column_sweep` with its matrix products and masks; the factor is given), the median of
five after a warm-up, and what of it is spent in `sweep_block`. --rows and --warps set the kernel's slab and its warps.
"""

import argparse
import statistics
from collections.abc import Callable

import torch
import triton

from optimum_sparse.core import Pattern, column_sweep, inverse_factor, parse_pattern
from optimum_sparse.core import sweep as core_sweep
from optimum_sparse.core.sweep import sweep_block, sweep_block_reference
from optimum_sparse.kernels import sweep


SHAPES = [(4096, 4096), (11008, 4096), (4096, 11008), (1536, 576)]
PATTERNS = ["2:4", "16:32", "unstructured"]


def milliseconds(run: Callable[[], object], repeats: int = 5) -> float:
    run()
    times = []
    for _ in range(repeats):
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop))
    return statistics.median(times)


def problem(rows: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight [rows, width] and the inverse factor of correlated inputs."""
    torch.manual_seed(0)
    mix = torch.eye(width, device="cuda") + 0.5 * torch.randn(width, width, device="cuda") / width**0.5
    x = torch.randn(2 * width, width, device="cuda") @ mix
    return torch.randn(rows, width, device="cuda"), inverse_factor(x.T @ x / len(x), 0.01)


def blocks_only(weight: torch.Tensor, factor: torch.Tensor, pattern: Pattern) -> Callable[[], None]:
    """All blocks of the layer, without what column_sweep does between them."""
    columns = weight.T.contiguous()
    keep = torch.rand_like(columns) < 0.5
    kept, group = getattr(pattern, "kept", 0), getattr(pattern, "group", 0)
    kept = kept if group else 0

    def run() -> None:
        for start in range(0, len(columns), 128):
            block = slice(start, start + 128)
            sweep_block(columns[block], keep[block], factor[block, block], kept, group)

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=sweep.ROWS)
    parser.add_argument("--warps", type=int, default=sweep.WARPS)
    parser.add_argument("--no-reference", action="store_true")
    args = parser.parse_args()
    sweep.ROWS, sweep.WARPS = args.rows, args.warps
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}, "
          f"{args.rows} rows, {args.warps} warps")  # fmt: skip
    print("| out x in | pattern | kernel ms | of it in sweep_block | reference ms | masks equal |")
    print("|---|---|---|---|---|---|")
    for rows, width in SHAPES:
        weight, factor = problem(rows, width)
        for text in PATTERNS:
            pattern = parse_pattern(text)
            kernel = milliseconds(lambda w=weight, p=pattern, f=factor: column_sweep(w, f, p))
            inside = milliseconds(blocks_only(weight, factor, pattern))
            reference, equal = "-", "-"
            if not args.no_reference:
                keep = column_sweep(weight, factor, pattern).keep
                core_sweep.sweep_block = sweep_block_reference
                try:
                    equal = f"{(column_sweep(weight, factor, pattern).keep == keep).float().mean().item():.5f}"
                    reference = f"{milliseconds(lambda w=weight, p=pattern, f=factor: column_sweep(w, f, p)):.1f}"
                finally:
                    core_sweep.sweep_block = sweep_block
            print(
                f"| {rows} x {width} | {pattern} | {kernel:.2f} | {inside:.2f} | {reference} | {equal} |", flush=True
            )


if __name__ == "__main__":
    main()
