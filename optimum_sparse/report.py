"""What pruning did to every layer, and what it left alone and why."""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any


def aligned(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """The lines of a table whose columns are as wide as their longest cells."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def kind_of(name: str) -> str:
    """The same for all matrices whose names differ in numbers alone: "model.layers.*.mlp.up_proj"."""
    return ".".join("*" if part.isdigit() else part for part in name.split("."))


@dataclass
class LayerReport:
    """One matrix.

    Attributes:
        name: the module's full name.
        shape: [out, in].
        pattern: what was asked for; None if it stayed dense.
        sparsity: share of exact zeros now.
        error: mean |wanted - given|^2 / mean |wanted|^2 of its output over calibration tokens, weighted as the method
            weighs them: all of them where it sees a Gram matrix, the first 2,048 for Wanda; None for magnitude, which
            sees no data. What is wanted is the dense weights' output, shifted as the config says.
        seconds: for solving this layer, statistics not included.
        note: what the method says of it: that ROSE reordered its columns, say.
        block_error: of the whole block, before and after reconstruction: mean |output - target|^2 relative to the mean
            change that the dense block makes, tokens weighed. `error` is from before it.
        routed: of a matrix of a fused expert: how many calibration tokens the router gave it. If these are fewer than
            it has inputs, it was solved with all tokens of its layer.
        skipped: why it stayed dense.
    """

    name: str
    shape: list[int]
    pattern: str | None = None
    sparsity: float = 0.0
    error: float | None = None
    seconds: float = 0.0
    note: str = ""
    block_error: list[float] | None = None
    routed: int | None = None
    skipped: str | None = None

    @property
    def too_few_routed(self) -> bool:
        """Whether all tokens of the layer stand for those that were routed to this expert."""
        return self.routed is not None and self.routed < self.shape[1]


@dataclass(frozen=True)
class Measurement:
    """How good the pruned model is at something, beside the dense one.

    Attributes:
        metric: "perplexity", say.
        data: what it was measured on.
        value: of the pruned model.
        standard_error: of `value`.
        dense: the same of the dense model.
        note: how it was measured.
    """

    metric: str
    data: str
    value: float
    standard_error: float | None = None
    dense: float | None = None
    note: str = ""

    def __post_init__(self) -> None:
        for name in ("metric", "data", "note"):
            if not isinstance(getattr(self, name), str):
                raise ValueError(f"{name}={getattr(self, name)!r}: must be a string.")
        for name in ("value", "standard_error", "dense"):
            number = getattr(self, name)
            if not isinstance(number, int | float) and (number is not None or name == "value"):
                raise ValueError(f"{name}={number!r}: must be a number.")


@dataclass
class PruningReport:
    """All matrices of the decoder blocks, in the order of the model.

    Attributes:
        seconds: the phases of the run.
        method: the class that solved the layers; a config cannot name one that was passed as an object.
        base_model: the id on the hub of what was pruned; empty if it came from a folder or from memory.
        quality: what was measured since; none of it by pruning. It stands in the model card.
    """

    layers: list[LayerReport] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    method: str = ""
    base_model: str = ""
    quality: list[Measurement] = field(default_factory=list)

    @property
    def pruned(self) -> list[LayerReport]:
        return [layer for layer in self.layers if layer.skipped is None]

    @property
    def skipped(self) -> list[LayerReport]:
        return [layer for layer in self.layers if layer.skipped is not None]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> "PruningReport":
        for name in ("method", "base_model"):
            if not isinstance(content.get(name, ""), str):
                raise ValueError(f"{name}={content[name]!r}: must be a string.")
        return cls(
            [LayerReport(**layer) for layer in content["layers"]],
            dict(content["seconds"]),
            content["method"],
            content.get("base_model", ""),
            [Measurement(**measured) for measured in content.get("quality", [])],
        )

    def measured(self, found: Measurement) -> None:
        """Add to `quality`, in place of an earlier measurement of the same in the same way."""
        same = (found.metric, found.data, found.note)
        self.quality = [other for other in self.quality if (other.metric, other.data, other.note) != same] + [found]

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=1) + "\n"

    def __str__(self) -> str:
        return self.summary()

    def summary(self, seconds: bool = True) -> str:
        """A short table: layers of the same kind in one line, whatever was left dense by name and reason."""
        groups: dict[tuple, list[LayerReport]] = {}
        for layer in self.pruned:
            kind = kind_of(layer.name)
            family = str(layer.pattern).split()[0]  # unstructured sparsities may all differ
            groups.setdefault((kind, tuple(layer.shape), family), []).append(layer)
        head = ("layers", "count", "shape", "pattern", "sparsity", "output error: mean", "worst", "seconds")
        rows: list[tuple[str, ...]] = [head]
        for (kind, shape, family), members in groups.items():
            patterns = {str(layer.pattern) for layer in members}
            shares = [layer.sparsity for layer in members]
            pattern = patterns.pop() if len(patterns) == 1 else f"{family} {min(shares):.2f}-{max(shares):.2f}"
            errors = [layer.error for layer in members if layer.error is not None]
            rows.append(
                (
                    kind,
                    str(len(members)),
                    "x".join(map(str, shape)),
                    pattern,
                    f"{sum(shares) / len(shares):.4f}",
                    f"{sum(errors) / len(errors):.4f}" if errors else "-",
                    f"{max(errors):.4f}" if errors else "-",
                    f"{sum(layer.seconds for layer in members):.1f}",
                )
            )
        if not seconds:
            rows = [row[:-1] for row in rows]
        lines = aligned(rows)
        reasons: dict[str, list[str]] = {}
        for layer in self.skipped:
            reasons.setdefault(f"left dense, {layer.skipped}", []).append(layer.name)
        for layer in self.pruned:
            if layer.too_few_routed:
                reasons.setdefault("fewer routed tokens than inputs, so all tokens of the layer were used", []).append(
                    layer.name
                )
        for reason, names in reasons.items():
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            lines.append(f"{reason}: {', '.join(names[:3])}{more}")
        remarks = Counter(layer.note for layer in self.pruned if layer.note)
        lines += [f"{remark}: {count} layers" for remark, count in remarks.most_common(4)]
        trained = [layer.block_error for layer in self.pruned if layer.block_error is not None]
        if trained:
            before, after = (sum(column) / len(trained) for column in zip(*trained, strict=True))
            lines.append(f"reconstruction: mean error of a block {before:.4f} -> {after:.4f}")
        if seconds and self.seconds:
            lines.append(
                f"{self.method}: " + ", ".join(f"{phase} {took:.1f} s" for phase, took in self.seconds.items())
            )
        return "\n".join(lines)
