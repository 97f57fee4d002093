"""From one checkpoint on disk to another, and what other formats would take: one matrix in memory at a time."""

import contextlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping

from ..config import QUANT_METHOD, SparsityConfig
from ..core import NM, Pattern, Unstructured, exactly, patterns_of
from ..formats import bitmask, csr, legacy
from ..pipeline import Linear
from ..report import LayerReport, PruningReport, aligned, kind_of
from .blocks import Plan, full_name, make_plan
from .checkpoint import (
    CheckpointInfo,
    inspect,
    legacy_format,
    load_config,
    name_shards,
    names_in_model,
    new_directory,
    read_config,
    read_headers,
    read_json,
    weight_files,
    write_report,
    writing,
)


Part = tuple[dict[str, Tensor], dict[str, str]]  # tensors by name, and metadata of theirs
SHARD = 2**30  # bytes: what is collected in memory before it is written, and so the size of files


class Stored(NamedTuple):
    """One tensor of a checkpoint, decoded.

    Attributes:
        name: on disk, if it were dense.
        tensor: [out, in] if `linear` is not None.
        linear: of a decoder block, whose weight this is.
        pattern: in which this package stored it; None if it did not.
        compressed: whether it was, in whatever format.
    """

    name: str
    tensor: Tensor
    linear: Linear | None
    pattern: Pattern | None
    compressed: bool


@dataclass(frozen=True)
class Checkpoint:
    """A folder with a model in .safetensors files.

    Attributes:
        content: config.json.
        legacy: the one of `formats.legacy` that it is stored in, if it is.
        info: of a checkpoint in this package's format: its recipe, and what its headers say.
        model: its skeleton, on meta.
        plan: all linears of the decoder blocks.
    """

    folder: Path
    content: dict[str, Any]
    legacy: str | None
    info: CheckpointInfo | None
    model: PreTrainedModel
    plan: Plan

    @classmethod
    def open(cls, source: str | os.PathLike, **loading: Any) -> "Checkpoint":
        """`loading`: arguments of `from_pretrained`, such as trust_remote_code.

        Raises:
            ValueError: a checkpoint of this package that does not hold what its config says.
            OSError: no folder with a model, or a file that cannot be read.
        """
        folder = Path(source)
        if not (folder / "config.json").is_file():
            raise FileNotFoundError(
                f"{str(source)!r} is no folder with a config.json. One on the hub has to be downloaded first: "
                "hf download ID --local-dir FOLDER."
            )
        content = read_json(folder / "config.json")
        config = load_config(folder, **loading)
        stored = content.get("quantization_config")
        ours = isinstance(stored, dict) and stored.get("quant_method") == QUANT_METHOD
        info = inspect(str(folder), **loading) if ours else None
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, **loading)
        everything = SparsityConfig(
            method="magnitude", pattern="unstructured", block_name=None if info is None else info.config.block_name
        )
        return cls(folder, content, legacy_format(content), info, model, make_plan(model, everything, strict=False))

    def tensors(self) -> Iterator[Stored]:
        """All tensors, file by file.

        Raises:
            ValueError: a matrix that cannot be decoded, naming it.
        """
        files = weight_files(self.folder)
        places = {name: file for file in files for name in read_headers([file])}
        groups: dict[str, dict[str, str]] = {}
        for name in places:
            group, key = self._group(name)
            groups.setdefault(group, {})[key] = name
        known = names_in_model(self.model, get_model_conversion_mapping(self.model), groups)
        shapes = {name: tensor.shape for name, tensor in self.model.state_dict().items()}
        linears = self.plan.linears
        pruned = {} if self.info is None else make_plan(self.model, self.info.config, strict=False).linears
        with contextlib.ExitStack() as stack:
            opened = {file: stack.enter_context(safe_open(file, "pt")) for file in files}
            for group, names in tqdm(groups.items(), desc="Reading", unit="tensor", leave=False):
                module = known.get(group, group).removesuffix(".weight")
                linear, ours = linears.get(module), pruned.get(module)
                tensors = {key: opened[places[name]].get_tensor(name) for key, name in names.items()}
                try:
                    tensor = self._decode(tensors, ours)
                    wanted = shapes.get(known.get(group, ""), tensor.shape)
                    as_stored = "compressed" in tensors or (linear is not None and ours is None)
                    if as_stored and tensor.shape != wanted:
                        raise ValueError(f"shape is {list(tensor.shape)}, the model's weight has {list(wanted)}.")
                except ValueError as error:
                    raise ValueError(f"{group.removesuffix('.weight')}: {error}") from error
                if linear is not None and linear.transposed and ours is None:
                    tensor = tensor.T
                compressed = ours is not None or "compressed" in tensors
                yield Stored(group, tensor, linear, None if ours is None else ours.pattern, compressed)

    def _group(self, name: str) -> tuple[str, str]:
        """The tensor that this one is a part of, as `Stored.name`, and which part."""
        owner, _, key = name.rpartition(".")
        if self.legacy is not None and key in legacy.TENSORS[self.legacy]:
            return f"{owner.removesuffix('.weight')}.weight", key
        if self.info is not None and key in bitmask.SUFFIXES:
            return f"{owner}.weight", key
        return name, "weight"

    def _decode(self, tensors: dict[str, Tensor], ours: Linear | None) -> Tensor:
        if ours is not None:
            return bitmask.decode(tensors, ours.shape, ours.pattern)
        if self.legacy is not None and set(tensors) != {"weight"}:
            return legacy.decode(tensors, self.legacy)
        return tensors["weight"]


def convert(
    source: str | os.PathLike, output: str | os.PathLike, dense: bool = False, **loading: Any
) -> PruningReport:
    """Write a checkpoint of `formats.legacy` in this package's format, or dense, to the new folder `output`.

    Every weight stays as it is, to the bit; the folder's other files are copied. Matrices outside the decoder blocks,
    and experts that transformers joins, are stored dense, and named in the report.

    Raises:
        FileExistsError: `output` exists and is not an empty folder.
        ValueError: another kind of checkpoint, one that is quantized as well, or damaged.
    """
    checkpoint = Checkpoint.open(source, **loading)
    if checkpoint.legacy is None:
        raise ValueError(
            f"{str(source)!r} is in none of the formats that are converted, {sorted(legacy.TENSORS)}: its config.json "
            "names none in a sparsity_config."
        )
    for key in ("quantization_config", "compression_config"):
        stored_as = checkpoint.content.get(key)
        if isinstance(stored_as, dict) and stored_as.get("config_groups"):
            raise ValueError(
                f"{str(source)!r} is quantized on top of its sparsity ({key} has config_groups), which is not read."
            )
    report = PruningReport(method=f"converted from {checkpoint.legacy}")
    patterns: dict[str, Pattern | None] = {}  # of all linears; None: stored dense

    def parts() -> Iterator[Part]:
        for stored in checkpoint.tensors():
            name, weight, linear, _, compressed = stored
            pattern = _pattern(weight, checkpoint.legacy) if linear is not None and compressed and not dense else None
            if linear is not None:
                patterns[linear.name] = pattern
            layer = LayerReport(name.removesuffix(".weight"), list(weight.shape), sparsity=_sparsity(weight))
            if pattern is not None:
                layer.pattern = str(pattern)
            elif not compressed:
                layer.skipped = "it was dense"
            elif dense:
                layer.skipped = "as asked for"
            elif linear is None:
                layer.skipped = "not a linear of a decoder block"
            else:
                layer.skipped = "compressed, it would take more bytes"
            if compressed or linear is not None:
                report.layers.append(layer)
            yield (_as_it_was(stored) if pattern is None else _named(name, bitmask.encode(weight, pattern))), {}

    with new_directory(output) as directory:
        _write(directory, parts(), checkpoint.model)
        if not any(layer.skipped != "it was dense" for layer in report.layers):
            raise ValueError(
                f"{str(source)!r} has no tensor whose name ends in .compressed, which {checkpoint.legacy} has."
            )
        if not dense and not any(patterns.values()):
            raise ValueError(
                f"no linear of a decoder block of {str(source)!r} is sparse: write it dense, with --dense."
            )
        config = None if dense else _recipe(checkpoint, patterns)
        _copy_rest(checkpoint, directory, config)
        if config is not None:
            write_report(directory, report)
            inspect(str(directory), **loading)  # what a reader will check
    return report


def export_csr(source: str | os.PathLike, output: str | os.PathLike, **loading: Any) -> "CheckpointSurvey":
    """Write the matrices of a sparse checkpoint as `formats.csr`, all else as it is, to the new folder `output`.

    The files' metadata hold the shapes as well: `<module>.weight_shape`, "[out, in]".

    Returns:
        What the sparse matrices take in this and other formats.

    Raises:
        FileExistsError: `output` exists and is not an empty folder.
        ValueError: not a sparse checkpoint of this package.
    """
    read_config(str(source), **loading)
    checkpoint = Checkpoint.open(source, **loading)
    found = CheckpointSurvey(checkpoint)

    def parts() -> Iterator[Part]:
        for stored in checkpoint.tensors():
            if stored.pattern is None:
                yield _as_it_was(stored), {}
            else:
                found.add(stored)
                shape = {f"{stored.name}_shape": json.dumps(list(stored.tensor.shape))}
                yield _named(stored.name, csr.encode(stored.tensor)), shape

    with new_directory(output) as directory:
        _write(directory, parts(), checkpoint.model)
        _copy_rest(checkpoint, directory, None)
    return found


def survey(source: str | os.PathLike, **loading: Any) -> "CheckpointSurvey":
    """Read every weight of a folder, sparse (legacy formats included) or dense, and say what it follows and takes."""
    found = CheckpointSurvey(Checkpoint.open(source, **loading))
    for stored in found.source.tensors():
        found.add(stored)
    return found


@dataclass(frozen=True)
class Matrix:
    """What was found of one matrix.

    Attributes:
        shape: (out, in); of experts that lie in one tensor, their rows one after the other.
        nonzeros: how many weights are not zero.
        patterns: those of `core.KNOWN` that it follows, and the one that it is stored in.
        stored: how this package stores it, or would.
    """

    name: str
    shape: tuple[int, int]
    dtype: torch.dtype
    nonzeros: int
    patterns: list[Pattern]
    stored: Pattern

    @property
    def sparsity(self) -> float:
        return 1 - self.nonzeros / (self.shape[0] * self.shape[1])

    @property
    def nbytes(self) -> dict[str, int]:
        """By format. The integers are not formats of this package: int8 with a 16-bit scale per row, int4 with one per
        128 columns of a row."""
        (rows, columns), itemsize = self.shape, self.dtype.itemsize
        weights = rows * columns
        mask = bitmask.nbytes(self.shape, self.stored, 0)
        kept = bitmask.nbytes(self.shape, self.stored, 1) - mask
        scales8, scales4 = 2 * rows, 2 * rows * -(-columns // 128)
        return {
            "dense": weights * itemsize,
            "bitmask": mask + kept * itemsize,
            "csr": csr.nbytes(self.shape, self.nonzeros, itemsize),
            "int8": weights + scales8,
            "int8 with bitmask": mask + kept + scales8,
            "int4": -(-weights // 2) + scales4,
            "int4 with bitmask": mask + -(-kept // 2) + scales4,
        }


@dataclass
class CheckpointSurvey:
    """What is in a checkpoint, weight by weight.

    Attributes:
        matrices: the weights of linears of decoder blocks, and of experts.
        other_bytes: everything else, which is the same in every format.
    """

    source: Checkpoint
    matrices: list[Matrix] = field(default_factory=list)
    other_bytes: int = 0

    @property
    def nbytes(self) -> dict[str, int]:
        """Of all matrices, by format."""
        sums: dict[str, int] = {}
        for matrix in self.matrices:
            for name, size in matrix.nbytes.items():
                sums[name] = sums.get(name, 0) + size
        return sums

    def add(self, stored: Stored) -> None:
        """Count one tensor in."""
        weight = _as_matrix(stored, self.source)
        if weight is None:
            self.other_bytes += stored.tensor.nbytes
            return
        patterns: list[Pattern] = [*patterns_of(weight)]
        if stored.pattern is not None and stored.pattern not in patterns:
            patterns.append(stored.pattern)
        self.matrices.append(
            Matrix(
                stored.name.removesuffix(".weight"),
                (weight.shape[0], weight.shape[1]),
                weight.dtype,
                int(weight.count_nonzero()),
                patterns,
                stored.pattern or _best(weight),
            )
        )

    def __str__(self) -> str:
        """Two tables: matrices of a kind in one line, and formats."""
        groups: dict[tuple, list[Matrix]] = {}
        for matrix in self.matrices:
            groups.setdefault((kind_of(matrix.name), matrix.shape), []).append(matrix)
        rows = [("matrices", "count", "shape", "zeros", "follow exactly")]
        for (kind, shape), members in groups.items():
            shares = [member.sparsity for member in members]
            shared = [pattern for pattern in members[0].patterns if all(pattern in m.patterns for m in members)]
            low, high = f"{min(shares):.4f}", f"{max(shares):.4f}"
            zeros = low if low == high else f"{low}-{high}"
            rows.append((kind, str(len(members)), f"{shape[0]}x{shape[1]}", zeros, _names(shared)))
        lines = aligned(rows)
        sizes = self.nbytes
        table = [("format", "MB", "of dense")]
        table += [(name, f"{size / 1e6:,.1f}", f"{size / sizes['dense']:.4f}") for name, size in sizes.items()]
        return "\n".join(
            [
                *lines,
                "",
                *aligned(table),
                f"and everything else, {self.other_bytes / 1e6:,.1f} MB in each. Integers with 16-bit scales, per row "
                "(int8) or per 128 columns (int4), are what other software would take.",
            ]
        )

    def per_matrix(self) -> str:
        """A line for each."""
        rows: list[tuple[str, ...]] = [("matrix", "shape", "zeros", "follows exactly", *self.nbytes)]
        for matrix in self.matrices:
            sizes = (f"{size:,}" for size in matrix.nbytes.values())
            shape = f"{matrix.shape[0]}x{matrix.shape[1]}"
            rows.append((matrix.name, shape, f"{matrix.sparsity:.4f}", _names(matrix.patterns), *sizes))
        return "\n".join(aligned(rows))


def _names(patterns: Iterable[Pattern]) -> str:
    return " ".join(str(pattern) if isinstance(pattern, NM) else "unstructured" for pattern in patterns) or "-"


def _as_matrix(stored: Stored, checkpoint: Checkpoint) -> Tensor | None:
    """[out, in], if this is a matrix that pruning is for."""
    tensor = stored.tensor
    if stored.linear is not None:
        return tensor
    owner, _, key = stored.name.rpartition(".")
    experts = checkpoint.plan.experts.get(owner)
    if experts is not None and key in experts.matrices and tensor.dim() == 3:
        return (tensor.mT if experts.fused.is_transposed else tensor).flatten(0, 1)
    part = f".{stored.name}"
    return tensor if ".experts." in part and key == "weight" and tensor.dim() == 2 else None


def _sparsity(weight: Tensor) -> float:
    return 1 - int(weight.count_nonzero()) / max(weight.numel(), 1)


def _best(weight: Tensor) -> Pattern:
    """How to store a matrix [out, in]: N:M where one holds that takes at most a tenth more values than there are
    non-zeros, since kernels are faster for it; else unstructured."""
    exact = exactly(weight)
    fitting = [p for p in patterns_of(weight) if p.kept / p.group <= 1.1 * (1 - exact.sparsity)]
    return fitting[0] if fitting else exact


def _pattern(weight: Tensor, name: str | None) -> Pattern | None:
    """In which to store what was stored in this legacy format; None: dense takes no more bytes."""
    pattern = NM(2, 4) if name == "sparse-24-bitmask" and weight.shape[1] % 4 == 0 else _best(weight)
    shape = weight.shape[0], weight.shape[1]
    return pattern if bitmask.nbytes(shape, pattern, weight.element_size()) < weight.nbytes else None


def _recipe(checkpoint: Checkpoint, patterns: dict[str, Pattern | None]) -> SparsityConfig:
    """A config that says what is stored. Its method is the one that gives this model again from its dense export."""
    full = full_name(checkpoint.model)
    chosen = {name: pattern for name, pattern in patterns.items() if pattern is not None}
    kinds = set(chosen.values())
    untouched = [name for name in checkpoint.plan.experts if not any(part.startswith(f"{name}.") for part in chosen)]
    ignore = [
        name
        for name in checkpoint.plan.linears
        if name not in chosen and not any(name.startswith(f"{experts}.") for experts in untouched)
    ]
    common = next(iter(kinds)) if len(kinds) == 1 else None
    zeros = [pattern.sparsity for pattern in chosen.values()]
    return SparsityConfig(
        method="magnitude",
        pattern=str(common) if isinstance(common, NM) else "unstructured",
        sparsity=None if isinstance(common, NM) else sum(zeros) / len(zeros),
        allocated={}
        if isinstance(common, NM)
        else {
            full(name): pattern.sparsity if isinstance(pattern, Unstructured) else str(pattern)
            for name, pattern in chosen.items()
        },
        ignore=[full(name) for name in (*untouched, *ignore)],
    )


def _as_it_was(stored: Stored) -> dict[str, Tensor]:
    """A tensor under its own name, a Conv1D's [in, out] again."""
    transposed = stored.linear is not None and stored.linear.transposed
    return {stored.name: stored.tensor.T if transposed else stored.tensor}


def _named(name: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors that stand for the weight with this name, by their full names."""
    return {f"{name.removesuffix('weight')}{key}": tensor for key, tensor in tensors.items()}


def _write(directory: Path, parts: Iterable[Part], model: PreTrainedModel) -> None:
    """Tensors and their metadata to files of about `SHARD` bytes."""
    shards: list[str] = []
    shard: dict[str, Tensor] = {}
    metadata: dict[str, str] = {}

    def flush() -> None:
        path = directory / f"part-{len(shards):05d}.safetensors"
        with writing(path):
            save_file(shard, path, {"format": "pt"} | metadata)
        shards.append(path.name)
        shard.clear()
        metadata.clear()

    for tensors, more in parts:
        shard |= {name: tensor.contiguous() for name, tensor in tensors.items()}
        metadata |= more
        if sum(tensor.nbytes for tensor in shard.values()) >= SHARD:
            flush()
    if shard:
        flush()
    name_shards(directory, shards, model)


def _copy_rest(checkpoint: Checkpoint, directory: Path, config: SparsityConfig | None) -> None:
    """config.json, with `config` for what it said of its weights, and all files of the folder that are not weights."""
    content = {
        key: value
        for key, value in checkpoint.content.items()
        if key not in ("quantization_config", "compression_config", "sparsity_config")
    }
    if config is not None:
        content["quantization_config"] = config.to_dict()
    (directory / "config.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    for path in sorted(checkpoint.folder.iterdir()):
        weights = path.suffix in (".safetensors", ".bin", ".pt", ".pth") or path.name.endswith(".index.json")
        if path.is_file() and not weights and not path.name.startswith(".") and not (directory / path.name).exists():
            shutil.copyfile(path, directory / path.name)
