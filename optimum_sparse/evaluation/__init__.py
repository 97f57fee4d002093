"""What pruning cost, and what it brought: measured."""

from .perplexity import Perplexity, perplexity
from .plots import plot_sensitivity, plot_sweep
from .sensitivity import LossIncrease, check_allocation, measure_sensitivity
from .speed import Speed, measure_speed
from .sweep import Point, SweepResult, grid, sweep
from .tasks import TaskScore, score_tasks


__all__ = [
    "LossIncrease",
    "Perplexity",
    "Point",
    "Speed",
    "SweepResult",
    "TaskScore",
    "check_allocation",
    "grid",
    "measure_sensitivity",
    "measure_speed",
    "perplexity",
    "plot_sensitivity",
    "plot_sweep",
    "score_tasks",
    "sweep",
]
