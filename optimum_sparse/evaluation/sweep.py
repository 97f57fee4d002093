"""Quality against sparsity: many recipes on one model that is loaded once, each from the dense weights.

    points = grid(["wanda", "sparsegpt"], sparsities=[0.3, 0.5, 0.7], patterns=["2:4"], dataset="c4")
    print(sweep(model, points, evaluate, "results", tokenizer=tokenizer))

`evaluate(model)` is whatever there is to know of a model, as {name: number}; "<name>_stderr" is its standard error.
"""

import contextlib
import csv
import hashlib
import io
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from ..config import RECIPES, SparsityConfig, describe_dataset
from ..core import NM, parse_pattern
from ..hf.blocks import find_blocks, make_plan
from ..hf.checkpoint import atomically, check_folder, read_json
from ..hf.journal import differences
from ..hf.placement import execution_device, onload
from ..hf.prune import prune_model
from ..methods import METHODS
from ..report import aligned
from ..version import __version__


Evaluate = Callable[[PreTrainedModel], dict[str, float]]
RESULTS, TABLE = "sweep.json", "sweep.csv"


@dataclass(frozen=True)
class Point:
    """What one recipe cost.

    Attributes:
        label: what its line is called: the method or recipe, mostly.
        pattern: as a string: "2:4", or "unstructured 0.5".
        sparsity: share of zeros in all pruned matrices together.
        measured: what `evaluate` returned.
        error: mean over layers of their relative output error; None for magnitude, which sees no data.
        seconds: for pruning and for evaluation. Phases that points have in common count for the first of them.
        recipe: the fields of its SparsityConfig.
    """

    label: str
    pattern: str
    sparsity: float
    measured: dict[str, float]
    error: float | None
    seconds: dict[str, float]
    recipe: dict[str, Any]


@dataclass(frozen=True)
class SweepResult:
    """All points that were measured, in the order in which they were.

    Attributes:
        about: all that the numbers depend on, besides the recipes.
        dense: what `evaluate` returned for the dense model.
    """

    about: dict[str, Any]
    dense: dict[str, float]
    points: list[Point]

    @property
    def metrics(self) -> list[str]:
        """What `evaluate` returned, without standard errors."""
        return [name for name in self.dense if not name.endswith("_stderr")]

    @property
    def patterns(self) -> list[str]:
        """Those of all points: unstructured by sparsity, then N:M by sparsity, coarse ones first."""

        def place(name: str) -> tuple[bool, float, int]:
            kind, _, sparsity = name.partition(" ")
            pattern = parse_pattern(kind, float(sparsity) if sparsity else None)
            return isinstance(pattern, NM), pattern.sparsity, getattr(pattern, "group", 0)

        return sorted({point.pattern for point in self.points}, key=place)

    @classmethod
    def load(cls, folder: str | PathLike) -> "SweepResult":
        """What `sweep` has written so far.

        Raises:
            OSError: there is nothing.
            ValueError: something else has that name.
        """
        content = read_json(Path(folder) / RESULTS)
        try:
            return cls(content["about"], content["dense"], [Point(**point) for point in content["points"]])
        except (KeyError, TypeError) as error:
            raise ValueError(
                f"{Path(folder) / RESULTS} is no file of a sweep's results ({error!r}): remove it, or choose another "
                "output folder."
            ) from error

    def save(self, folder: str | PathLike) -> None:
        """Write sweep.json and sweep.csv: each whole or not at all."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        with atomically(Path(folder) / RESULTS) as temporary:
            temporary.write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")
        with atomically(Path(folder) / TABLE) as temporary:
            temporary.write_text(self.to_csv(), encoding="utf-8")

    def to_csv(self) -> str:
        """One row per point; the dense model is the first."""
        rows: list[dict[str, Any]] = [{"label": "dense", "pattern": "dense", "sparsity": 0.0, **self.dense}]
        for point in self.points:
            row = {"label": point.label, "pattern": point.pattern, "sparsity": point.sparsity, **point.measured}
            seconds = {f"{phase}_seconds": value for phase, value in point.seconds.items()}
            rows.append(row | {"layer_error": point.error} | seconds)
        text = io.StringIO()
        writer = csv.DictWriter(text, list(dict.fromkeys(name for row in rows for name in row)))
        writer.writeheader()
        writer.writerows(rows)
        return text.getvalue()

    def __str__(self) -> str:
        """A table for every metric: a row per label, a column per pattern."""
        patterns = self.patterns
        names = [pattern.removeprefix("unstructured ") for pattern in patterns]
        tables = []
        for metric in self.metrics:
            found = {(point.label, point.pattern): f"{point.measured[metric]:.4g}" for point in self.points}
            rows = [(metric, *names)]
            for label in dict.fromkeys(point.label for point in self.points):
                rows.append((label, *(found.get((label, pattern), "-") for pattern in patterns)))
            tables.append("\n".join([f"dense: {metric} {self.dense[metric]:.4g}", *aligned(rows)]))
        return "\n\n".join(tables)


def grid(
    methods: Sequence[str], sparsities: Sequence[float] = (), patterns: Sequence[str] = (), **options: Any
) -> list[tuple[str, SparsityConfig]]:
    """(label, config) of every method at every unstructured sparsity and every N:M pattern.

    Args:
        methods: each what `SparsityConfig(method=)` or `SparsityConfig.recipe()` takes: "sparsegpt", "best".
        options: further fields of SparsityConfig, for all.

    Raises:
        ValueError: no such method or recipe; nothing to measure; an option that is one of these; a config that is not
            valid.
    """
    if taken := options.keys() & {"method", "pattern", "sparsity"}:
        given = ", ".join(sorted(taken))
        raise ValueError(f"{given}: differs from point to point, so give methods, sparsities and patterns.")
    for method in methods:
        if method not in METHODS and method not in RECIPES:
            raise ValueError(f"{method!r} is no method ({', '.join(METHODS)}) and no recipe ({', '.join(RECIPES)}).")
    shapes: list[dict[str, Any]] = [{"pattern": "unstructured", "sparsity": sparsity} for sparsity in sparsities]
    shapes += [{"pattern": pattern} for pattern in patterns]
    if not methods or not shapes:
        raise ValueError("nothing to measure: give methods, and sparsities such as 0.5 or patterns such as '2:4'.")
    return [
        (
            method,
            SparsityConfig.recipe(method, **shape, **options)
            if method in RECIPES
            else SparsityConfig.from_dict({"method": method, **shape, **options}),
        )
        for method in methods
        for shape in shapes
    ]


def sweep(
    model: PreTrainedModel,
    points: Sequence[tuple[str, SparsityConfig]],
    evaluate: Evaluate,
    output: str | PathLike | None = None,
    *,
    tokenizer: Any = None,
    settings: dict[str, Any] | None = None,
) -> SweepResult:
    """Prune the dense `model` with each config in turn, and evaluate it each time. It is dense again in the end.

    On the model's device there is never more than one copy of it: the dense weights of its blocks are kept in host
    memory, where those of a model on the CPU are anyway. Calibration tokens and the likelihood's sensitivity are
    computed once for all points that ask for the same.

    Args:
        points: (label, config), `grid(...)` mostly.
        output: a folder; sweep.json and sweep.csv there are written anew after each point. Points that are in it
            already are not measured again, so a sweep that was interrupted goes on, and can get further points.
        settings: JSON; what else the numbers depend on: of `evaluate`, say. Kept in the file, and compared.

    Raises:
        ValueError: before any work: a config that does not fit the model; `output` with results of another model,
            other settings or another recipe under the same label, naming the difference.
    """
    if output is not None:
        check_folder(output)
    for _, config in points:
        make_plan(model, config)
    _, blocks = find_blocks(model, points[0][1].block_name if points else None)
    dense = _copy(blocks)
    about = _about(model, dense, settings)
    result = SweepResult(about, {}, [])
    if output is not None and (Path(output) / RESULTS).exists():
        result = SweepResult.load(output)
        _check_same(f"{output} holds results that differ from this sweep", result.about, about)
    done = {(point.label, point.pattern): point.recipe for point in result.points}
    left = []
    for label, config in points:
        key, recipe = (label, str(parse_pattern(config.pattern, config.sparsity))), _recipe(config)
        if key in done:
            _check_same(f"{label} at {key[1]} was measured with another recipe", done[key], recipe)
        else:
            done[key] = recipe
            left.append((*key, config))
    kept = _Shared()
    with tqdm(total=len(left) + (not result.dense), desc="Sweep", unit="point", smoothing=0) as progress:
        if not result.dense:
            result.dense.update(evaluate(model))
            _save(result, output)
            progress.update()
        for label, pattern, config in left:
            progress.set_postfix_str(f"{label} {pattern}")
            with _restoring(blocks, dense):
                result.points.append(_measure(model, label, pattern, config, evaluate, tokenizer, kept))
            _save(result, output)
            progress.update()
    return result


def _save(result: SweepResult, output: str | PathLike | None) -> None:
    if output is not None:
        result.save(output)


def _measure(
    model: PreTrainedModel,
    label: str,
    pattern: str,
    config: SparsityConfig,
    evaluate: Evaluate,
    tokenizer: Any,
    kept: "_Shared",
) -> Point:
    started = time.perf_counter()
    _, report = prune_model(model, config, tokenizer=tokenizer, kept=kept.of(config))
    pruned = time.perf_counter()
    measured = evaluate(model)
    seconds = {"pruning": pruned - started, "evaluation": time.perf_counter() - pruned}
    sizes = [layer.shape[0] * layer.shape[1] for layer in report.pruned]
    zeros = sum(layer.sparsity * size for layer, size in zip(report.pruned, sizes, strict=True))
    errors = [layer.error for layer in report.pruned if layer.error is not None]
    error = sum(errors) / len(errors) if errors else None
    return Point(label, pattern, zeros / sum(sizes), measured, error, seconds, _recipe(config))


class _Shared:
    """Results of the phases before pruning, for all configs that have the same ones."""

    def __init__(self) -> None:
        self._found: dict[str, Any] = {}

    def of(self, config: SparsityConfig) -> Callable[[str, Callable[[], Any]], Any]:
        data = [describe_dataset(config.dataset), config.num_samples, config.sequence_length, config.batch_size]
        data += [config.seed]
        linears = [config.targets, config.ignore, config.layers, config.block_name]
        asked = {"tokens": data, "sensitivity": [data, linears]}  # allocations have a target of their own

        def kept(name: str, compute: Callable[[], Any]) -> Any:
            if name not in asked:
                return compute()
            key = json.dumps([name, asked[name]])
            if key not in self._found:
                self._found[key] = compute()
            return self._found[key]

        return kept


@contextlib.contextmanager
def _restoring(blocks: nn.ModuleList, dense: list[dict[str, Tensor]]) -> Iterator[None]:
    """After it the blocks hold their dense weights again. Pruning replaces a parameter's memory, never its values."""
    try:
        yield
    finally:
        for block, weights in zip(blocks, dense, strict=True):
            with onload(block):
                for name, parameter in block.named_parameters():
                    parameter.data = weights[name].to(parameter.device)


def _copy(blocks: nn.ModuleList) -> list[dict[str, Tensor]]:
    """The parameters of every block in host memory; those that are there already are not copied."""
    copies = []
    for block in blocks:
        with onload(block, keep=False):
            copies.append({name: parameter.data.cpu() for name, parameter in block.named_parameters()})
    return copies


def _about(model: PreTrainedModel, dense: list[dict[str, Tensor]], settings: dict[str, Any] | None) -> dict[str, Any]:
    """All that the numbers depend on, but the recipes. Some values of every matrix stand for the weights."""
    digest = hashlib.sha256()
    for weights in dense:
        for name, tensor in weights.items():
            digest.update(f"{name} {list(tensor.shape)}".encode())
            digest.update(tensor.flatten()[:: max(1, tensor.numel() // 64)].float().numpy().tobytes())
    config = json.loads(model.config.to_json_string(use_diff=False))
    config.pop("_name_or_path", None)  # weights may be moved
    about = {
        "model": Path(model.name_or_path or type(model).__name__).name,
        "config": config,
        "weights": digest.hexdigest()[:16],
        "dtype": str(model.dtype),
        "device": execution_device(model.get_input_embeddings()).type,
        "settings": settings or {},
        "versions": {
            "optimum_sparse": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }
    return json.loads(json.dumps(about, default=str))


def _recipe(config: SparsityConfig) -> dict[str, Any]:
    """As a results file holds it."""
    return json.loads(json.dumps(config.to_dict() | {"allocated": {}}))


def _check_same(what: str, before: Any, now: Any) -> None:
    found = list(differences(before, now))
    if found:
        raise ValueError(f"{what}: {'; '.join(found[:4])}. Repeat it as it was, or choose another output folder.")
