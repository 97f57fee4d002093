"""What pruning cost, and what it brought: measured."""

from .perplexity import Perplexity, perplexity
from .plots import plot_sweep
from .speed import Speed, measure_speed
from .sweep import Point, SweepResult, grid, sweep


__all__ = [
    "Perplexity",
    "Point",
    "Speed",
    "SweepResult",
    "grid",
    "measure_speed",
    "perplexity",
    "plot_sweep",
    "sweep",
]
