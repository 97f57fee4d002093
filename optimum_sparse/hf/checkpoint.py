"""The only file input and output: reports beside checkpoints, what a checkpoint holds, dense export."""

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from ..config import QUANT_METHOD, SparsityConfig
from ..formats import FORMATS
from ..report import PruningReport
from .blocks import make_plan


REPORT_FILE = "sparsity_report.json"


def read_report(directory: Path) -> PruningReport | None:
    """The report beside a checkpoint; None if there is none or it is not one."""
    try:
        return PruningReport.from_dict(json.loads((directory / REPORT_FILE).read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def write_report(directory: str | os.PathLike, report: PruningReport) -> None:
    """Write the report beside a checkpoint: whole or not at all."""
    path = Path(directory) / REPORT_FILE
    temporary = path.with_suffix(".tmp")
    temporary.write_text(report.to_json(), encoding="utf-8")
    os.replace(temporary, path)


@contextlib.contextmanager
def new_directory(output: str | os.PathLike) -> Iterator[Path]:
    """A directory to fill, which becomes `output` when the context ends without an error, and vanishes otherwise."""
    target = Path(output)
    check_output(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        yield temporary
        temporary.chmod(0o755)
        if target.exists():
            target.rmdir()
        os.replace(temporary, target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def check_output(output: str | os.PathLike) -> None:
    """Raise FileExistsError unless `output` can become a new checkpoint; to be called before any work is done."""
    target = Path(output)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise FileExistsError(
            f"output {str(target)!r} exists and is not an empty folder: choose another, or remove it."
        )


def export_dense(source: str, output: str | os.PathLike) -> None:
    """Write a sparse checkpoint as an ordinary dense one, zeros in place, which loads without this package."""
    config = AutoConfig.from_pretrained(source)
    stored = getattr(config, "quantization_config", None)
    if not isinstance(stored, dict) or stored.get("quant_method") != QUANT_METHOD:
        raise ValueError(f"{source!r} is not a sparse checkpoint: its config.json has no quantization_config of ours.")
    with new_directory(output) as directory:
        model = AutoModelForCausalLM.from_pretrained(source, dtype="auto")
        model.dequantize()
        model.save_pretrained(directory)
        copy_tokenizer(source, directory)


def copy_tokenizer(source: str, directory: str | os.PathLike) -> None:
    """Save the tokenizer of `source` beside a checkpoint, if it has one."""
    with contextlib.suppress(OSError, ValueError):
        AutoTokenizer.from_pretrained(source).save_pretrained(directory)


@dataclass
class CheckpointInfo:
    """What a checkpoint on disk holds, from its headers alone.

    Attributes:
        matrices: {module: (pattern, [out, in], bytes on disk, bytes if it were dense)} of the compressed ones.
        other_bytes: everything else: embeddings, norms, dense layers.
    """

    config: SparsityConfig
    matrices: dict[str, tuple[str, list[int], int, int]]
    other_bytes: int

    def __str__(self) -> str:
        lines = [f"method {self.config.method}, pattern {self.config.pattern}, format {self.config.format}"]
        by_pattern: dict[str, list[tuple[str, list[int], int, int]]] = {}
        for matrix in self.matrices.values():
            by_pattern.setdefault(matrix[0], []).append(matrix)
        for pattern, members in by_pattern.items():
            stored, dense = sum(m[2] for m in members), sum(m[3] for m in members)
            lines.append(
                f"{len(members)} matrices at {pattern}: {stored / 1e6:,.1f} MB on disk, {dense / 1e6:,.1f} MB dense "
                f"({stored / dense:.4f})"
            )
        stored = sum(m[2] for m in self.matrices.values()) + self.other_bytes
        dense = sum(m[3] for m in self.matrices.values()) + self.other_bytes
        lines.append(f"everything else: {self.other_bytes / 1e6:,.1f} MB")
        lines.append(f"in all {stored / 1e6:,.1f} MB, {dense / 1e6:,.1f} MB dense ({stored / dense:.4f})")
        return "\n".join(lines)


def inspect(source: str) -> CheckpointInfo:
    """Read the headers of a local sparse checkpoint and check every stored shape against its config.

    Raises:
        ValueError: not a sparse checkpoint, or tensors that are missing or of another shape.
    """
    config = AutoConfig.from_pretrained(source)
    stored = getattr(config, "quantization_config", None)
    if not isinstance(stored, dict) or stored.get("quant_method") != QUANT_METHOD:
        raise ValueError(f"{source!r} is not a sparse checkpoint: its config.json has no quantization_config of ours.")
    sparsity = SparsityConfig.from_dict(stored)
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    headers = _headers(Path(source))
    sizes = {name: size for name, (_, size) in headers.items()}
    matrices = {}
    for name, linear in make_plan(model, sparsity, strict=False).linears.items():
        layout = FORMATS[sparsity.format].layout(linear.shape, linear.pattern)
        for key, (shape, _) in layout.items():
            found = headers.get(f"{name}.{key}")
            if found is None or tuple(found[0]) != shape:
                raise ValueError(
                    f"{name}.{key} must have shape {list(shape)} in a {linear.pattern} checkpoint, the file has "
                    f"{found[0] if found else 'nothing'}."
                )
        values = headers[f"{name}.weight"]
        item = values[1] // max(torch.Size(values[0]).numel(), 1)
        on_disk = sum(sizes.pop(f"{name}.{key}") for key in layout)
        matrices[name] = (str(linear.pattern), list(linear.shape), on_disk, linear.shape[0] * linear.shape[1] * item)
    return CheckpointInfo(sparsity, matrices, sum(sizes.values()))


def _headers(directory: Path) -> dict[str, tuple[list[int], int]]:
    """{tensor name: (shape, bytes)} of all safetensors files of a checkpoint."""
    files = sorted(directory.glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(f"{str(directory)!r} holds no .safetensors files.")
    headers = {}
    for file in files:
        with safe_open(file, "pt") as stored:
            for name in stored.keys():  # noqa: SIM118 - not a dict
                part = stored.get_slice(name)
                shape = part.get_shape()
                headers[name] = (shape, torch.Size(shape).numel() * _BYTES[part.get_dtype()])
    return headers


_BYTES = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "BF16": 2, "F16": 2, "I16": 2, "U8": 1, "I8": 1, "BOOL": 1}
