"""Pictures of what was measured, with matplotlib (the extra `plots`). Colours are told apart by the colour-blind."""

import math
from os import PathLike
from typing import Any

from ..report import kind_of
from .sensitivity import LossIncrease
from .sweep import SweepResult


COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")  # Okabe and Ito
MARKS = ("s", "D", "P", "X", "^", "v")
NAMES = {"perplexity": "perplexity (lower is better)"}
DECADE = 10  # values further apart than this are drawn on a log axis


def plot_sweep(result: SweepResult, path: str | PathLike, metric: str | None = None) -> None:
    """Quality against sparsity: a line per label, N:M patterns as marks of its colour, the dense model across.

    Args:
        path: of a picture; .png, .svg or .pdf.
        metric: None: the first that was measured.

    Raises:
        ImportError: matplotlib is missing, naming the extra.
        ValueError: no such metric.
    """
    metric = metric or result.metrics[0]
    if metric not in result.dense:
        raise ValueError(f"metric={metric!r}: was not measured; these were: {', '.join(result.dense)}.")
    figure, axes = _figure(7.2, 4.6)
    dense = result.dense[metric]
    axes.axhline(dense, color="#555555", linestyle=(0, (4, 3)), linewidth=1.2, label=f"dense, {dense:.4g}", zorder=1)
    patterns = [pattern for pattern in result.patterns if ":" in pattern]
    labels = list(dict.fromkeys(point.label for point in result.points))
    for number, label in enumerate(labels):
        colour = COLOURS[number % len(COLOURS)]
        points = [point for point in result.points if point.label == label]
        line = sorted((point.sparsity, point.measured[metric]) for point in points if point.pattern not in patterns)
        axes.plot(*zip(*line or [(math.nan, math.nan)], strict=True), "o-", color=colour, markersize=4, label=label)
        for point in points:
            if point.pattern in patterns:
                mark = MARKS[patterns.index(point.pattern) % len(MARKS)]
                place = (point.sparsity, point.measured[metric])
                axes.plot(*place, mark, color=colour, markersize=9, markeredgecolor="white", zorder=3)
    for number, pattern in enumerate(patterns):
        axes.plot([], [], MARKS[number % len(MARKS)], color="#555555", markersize=9, label=pattern)
    values = [dense, *(point.measured[metric] for point in result.points)]
    if min(values) > 0 and max(values) > DECADE * min(values):
        _log(axes.yaxis, axes.set_yscale)
    axes.xaxis.set_major_locator(_ticker().MaxNLocator(steps=[1, 2, 5, 10]))  # whole percents
    axes.xaxis.set_major_formatter(_ticker().PercentFormatter(1, decimals=0))
    axes.set_xlabel("weights removed from the decoder blocks' linear layers")
    axes.set_ylabel(NAMES.get(metric, metric.replace("_", " ")))
    axes.set_title(result.about["model"], loc="left", fontweight="bold")
    axes.grid(True, which="major", color="#DDDDDD", linewidth=0.7)
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    _save(figure, path)


def plot_sensitivity(result: LossIncrease, path: str | PathLike, pattern: str | None = None) -> None:
    """A heat map over depth (columns) and projection (rows), the block as a whole below; experts are summed.

    Colours are logarithmic. What measured as no loss or as a gain has the lowest one.

    Args:
        pattern: None: the last that was measured.

    Raises:
        ImportError: matplotlib is missing, naming the extra.
        ValueError: no such pattern, or none of its losses is above 0.
    """
    pattern = pattern or result.patterns[-1]
    if pattern not in result.patterns:
        raise ValueError(f"pattern={pattern!r}: was not measured; these were: {', '.join(result.patterns)}.")
    place = result.patterns.index(pattern)
    whole = "whole block"
    cells: dict[tuple[str, int], float] = {}
    for column, (block, values) in enumerate(result.blocks.items()):
        cells[whole, column] = values[place]
        for name, losses in result.layers.items():
            if f".{block}." in f".{name}":
                local = name.rpartition(f"{block}.")[2]
                row = kind_of(local)
                cells[row, column] = cells.get((row, column), 0.0) + losses[place]
    positive = [value for value in cells.values() if 0 < value < math.inf]
    if not positive:
        raise ValueError(f"no loss under {pattern} is above 0: there is nothing to see.")
    rows = [*dict.fromkeys(row for row, _ in cells if row != whole), whole]
    lowest = max(min(positive), max(positive) / 1e4)
    grid = [[max(cells.get((row, column), math.nan), lowest) for column in range(len(result.blocks))] for row in rows]
    figure, axes = _figure(max(5.0, 1.9 + 0.27 * len(result.blocks)), 1.4 + 0.34 * len(rows))
    image = axes.imshow(grid, cmap="viridis", aspect="auto", norm=_colors().LogNorm(lowest, max(positive)))
    axes.set_yticks(range(len(rows)), rows)
    axes.axhline(len(rows) - 1.5, color="white", linewidth=3)
    axes.xaxis.set_major_locator(_ticker().MaxNLocator(integer=True))
    axes.set_xlabel("decoder block")
    axes.set_title(f"loss increase when only this is pruned: {pattern}, by {result.by}", loc="left", fontsize=10)
    gains = len(positive) < len(cells)
    figure.colorbar(image, ax=axes, label="nats per token" + (" (darkest: no loss)" if gains else ""), pad=0.01)
    _save(figure, path)


def _figure(width: float, height: float) -> tuple[Any, Any]:
    """(figure, axes) without the state that pyplot keeps, and without a window."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("drawing needs matplotlib: pip install 'optimum-sparse[plots]'.") from error
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots()
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _ticker() -> Any:
    from matplotlib import ticker

    return ticker


def _colors() -> Any:
    from matplotlib import colors

    return colors


def _log(axis: Any, set_scale: Any) -> None:
    """Logarithmic, with plain numbers (20, 50, 100) and not with powers of ten."""
    set_scale("log")
    axis.set_major_locator(_ticker().LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(_ticker().FuncFormatter(lambda value, _: f"{value:,.10g}"))
    axis.set_minor_formatter(_ticker().NullFormatter())


def _save(figure: Any, path: str | PathLike) -> None:
    figure.savefig(path, dpi=140)
