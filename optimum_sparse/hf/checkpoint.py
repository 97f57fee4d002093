"""What is read from and written to files: reports beside checkpoints, what a checkpoint holds, dense export."""

import contextlib
import copy
import json
import logging
import math
import os
import re
import shutil
import tempfile
import weakref
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from safetensors import SafetensorError, safe_open
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming, dot_natural_key, rename_source_key

from ..config import QUANT_METHOD, SparsityConfig
from ..formats import bitmask, legacy
from ..report import PruningReport
from .blocks import Plan, make_plan, module_names


logger = logging.getLogger(__name__)

REPORT_FILE = "sparsity_report.json"


def read_report(directory: Path) -> PruningReport | None:
    """The report beside a checkpoint; None if there is none or it is not one."""
    try:
        report = PruningReport.from_dict(read_json(directory / REPORT_FILE))
        sum(math.prod(map(int, layer.shape)) * layer.sparsity for layer in report.layers)
        str(report)  # raises for values of other types
        return report
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def write_report(directory: str | os.PathLike, report: PruningReport) -> None:
    """Write the report beside a checkpoint: whole or not at all."""
    with atomically(Path(directory) / REPORT_FILE) as temporary:
        temporary.write_text(report.to_json(), encoding="utf-8")


@contextlib.contextmanager
def atomically(path: Path) -> Iterator[Path]:
    """A file to write, which is at `path`, and safe from a crash, once the context ends without an error.

    Raises:
        OSError: it could not be written; what was at `path` still is.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with writing(path):
            yield temporary
        sync(temporary)
        os.replace(temporary, path)
        sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Raises an OSError that names the file for what is raised when a disk is full, by safetensors and torch too."""
    try:
        yield
    except (SafetensorError, RuntimeError, OSError) as error:
        if isinstance(error, OSError) and error.filename:
            raise
        free = shutil.disk_usage(path if path.exists() else path.parent).free
        if isinstance(error, OSError) and error.errno:
            raise OSError(error.errno, f"{error.strerror}, {free:,} bytes are free", str(path)) from error
        raise OSError(f"{path} could not be written, where {free:,} bytes are free: {error}") from error


def sync(path: Path) -> None:
    """A file's content, or which files a folder holds, are on the disk when this returns (but on Windows)."""
    if os.name == "nt":  # which syncs no folders, and only files that are open for writing
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def new_directory(output: str | os.PathLike) -> Iterator[Path]:
    """A directory to fill, whose content is that of `output` once the context ends without an error; else it vanishes.

    To be entered before long work: what is wrong with `output` shows at once.

    Raises:
        FileExistsError: `output` exists and is not an empty folder.
    """
    target = Path(output)
    check_new(target)
    exists = target.exists()
    inside = target if exists else target.parent  # an existing folder may be a mount or a link, and stays
    inside.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=inside))
    try:
        yield temporary
        temporary.chmod(0o755)
        if exists:
            for path in sorted(temporary.iterdir(), key=lambda path: path.name == "config.json"):  # the config last
                os.replace(path, target / path.name)
            temporary.rmdir()
        else:
            os.replace(temporary, target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def check_new(output: Path, besides: str = "") -> None:
    """Raise FileExistsError unless `output` can be made: it is nothing, or a folder with nothing but `besides`."""
    if output.is_symlink() and not output.exists():
        raise FileExistsError(
            f"output {str(output)!r} is a link to nothing: make what it points to, or choose another."
        )
    if output.exists() and (not output.is_dir() or any(path.name != besides for path in output.iterdir())):
        raise FileExistsError(
            f"output {str(output)!r} exists and is not an empty folder: choose another, or remove it."
        )
    check_folder(output)


def check_folder(output: str | os.PathLike) -> None:
    """Raise OSError unless files can be written to the folder `output`, or it can be made."""
    path = Path(output).absolute()
    part = next(part for part in (path, *path.parents) if part.exists())
    if not part.is_dir():
        raise NotADirectoryError(f"output {str(output)!r}: {part} is a file; choose another.")
    if not os.access(part, os.W_OK | os.X_OK):
        raise PermissionError(f"output {str(output)!r}: {part} cannot be written to; choose another.")


def check_size(max_shard_size: int | str) -> None:
    """Raise ValueError unless it is one: `save_pretrained` would find out when the work is done."""
    known = isinstance(max_shard_size, str) and re.fullmatch(r"(\d*\.)?\d+ *[KMGT]B", max_shard_size.strip().upper())
    if not known and (not isinstance(max_shard_size, int) or max_shard_size < 1):
        raise ValueError(f"max_shard_size={max_shard_size!r}: must be a size such as '5GB' or '500MB', or bytes.")


def export_dense(source: str, output: str | os.PathLike, **loading: Any) -> None:
    """Write a sparse checkpoint as an ordinary dense one, zeros in place, which loads without this package.

    `loading`: arguments of `from_pretrained`, such as trust_remote_code.
    """
    read_config(source, **loading)
    with new_directory(output) as directory:
        model = load_model(source, dtype="auto", **loading)
        model.dequantize()
        model.save_pretrained(directory)
        copy_tokenizer(source, directory, **loading)


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises OSError, or ValueError that names the file."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, and must hold a JSON object: {{...}}.")
    return content


def load_config(source: str | os.PathLike, **hub: Any) -> PreTrainedConfig:
    """The config of a causal language model.

    Raises:
        OSError: no such folder, and no id on the hub.
        ValueError: a model of another kind.
    """
    if not Path(source).exists():
        try:
            validate_repo_id(str(source))
        except HFValidationError:
            raise FileNotFoundError(
                f"{str(source)!r}: there is no such folder, and it is no id on the hub, such as 'org/model'."
            ) from None
    try:
        config = AutoConfig.from_pretrained(source, **hub)
    except (OSError, ValueError, ImportError):
        raise
    except Exception as error:  # of many kinds, for values that make no sense
        raise ValueError(f"the config.json of {str(source)!r} is not valid: {error}") from error
    own_code = getattr(config, "auto_map", None) or {}
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING and "AutoModelForCausalLM" not in own_code:
        raise ValueError(
            f"{str(source)!r} has model_type {config.model_type!r}, which is no causal language model: only what "
            "AutoModelForCausalLM loads can be pruned."
        )
    return config


def load_model(source: str | os.PathLike, **loading: Any) -> PreTrainedModel:
    """A causal language model, by AutoModelForCausalLM with these arguments, all of it from the checkpoint.

    What accelerate leaves on disk, and transformers computes with in another form than it stores, is in a temporary
    folder for as long as the model is there.

    Raises:
        OSError: no model there, or one that lacks weights (which transformers would fill with random numbers).
        ValueError: weights of other shapes than the config says.
    """
    folder = None
    if isinstance(loading.get("device_map"), str) and "offload_folder" not in loading:
        folder = tempfile.TemporaryDirectory(prefix="offloaded-")
        loading["offload_folder"] = folder.name
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(source, output_loading_info=True, **loading)
    except RuntimeError as error:
        if "ignore_mismatched_sizes" not in str(error):
            raise
        # transformers has logged which
        raise ValueError(f"the weights of {str(source)!r} do not fit its config.json: {error}") from error
    model, found = loaded
    if folder is not None:
        weakref.finalize(model, folder.cleanup)
    missing = sorted(found["missing_keys"])
    if missing:
        raise OSError(
            f"the checkpoint {str(source)!r} lacks {len(missing)} weights, and random numbers would take their place: "
            f"{', '.join(missing[:4])}. It is not complete, or not of a causal language model. (A model in memory is "
            "taken as it is.)"
        )
    return model


def read_config(source: str, **loading: Any) -> tuple[PreTrainedConfig, SparsityConfig]:
    """The config of a sparse checkpoint, and the recipe in it. Raises ValueError for any other checkpoint."""
    config = load_config(source, **loading)
    stored = getattr(config, "quantization_config", None)
    if not isinstance(stored, dict) or stored.get("quant_method") != QUANT_METHOD:
        raise ValueError(
            f"{source!r} is not a sparse checkpoint: its config.json has no quantization_config with "
            f"quant_method={QUANT_METHOD!r}."
        )
    return config, SparsityConfig.from_dict(stored)


def legacy_format(content: dict[str, Any]) -> str | None:
    """Which of `formats.legacy` a checkpoint with this config.json is stored in; None: none of them."""
    for place in (content.get("quantization_config"), content.get("compression_config"), content):
        sparsity = place.get("sparsity_config") if isinstance(place, dict) else None
        name = sparsity.get("format") if isinstance(sparsity, dict) else None
        if isinstance(name, str) and name in legacy.TENSORS:
            return name
    return None


def find_tokenizer(source: str, **loading: Any) -> Any:
    """The tokenizer of `source`; None, after a line in the log that says why, if it has none that can be loaded."""
    try:
        return AutoTokenizer.from_pretrained(source, **loading)
    # No files; files that it cannot read; no package that it needs; no vocabulary.
    except (OSError, ValueError, ImportError, TypeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        logger.warning("%s has no tokenizer that can be loaded: %s", source, reason)
        return None


def copy_tokenizer(source: str, directory: str | os.PathLike, **loading: Any) -> None:
    """Save the tokenizer of `source` beside a checkpoint, if it has one."""
    tokenizer = find_tokenizer(source, **loading)
    if tokenizer is not None:
        tokenizer.save_pretrained(directory)


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
        families: dict[str, list[tuple[str, list[int], int, int]]] = {}
        for matrix in self.matrices.values():  # unstructured sparsities may all differ
            families.setdefault(matrix[0].split()[0], []).append(matrix)
        for family, members in families.items():
            patterns = {matrix[0] for matrix in members}
            shares = [float(pattern.split()[-1]) for pattern in patterns if len(patterns) > 1]
            pattern = f"{family} {min(shares):.2f}-{max(shares):.2f}" if shares else patterns.pop()
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


def inspect(source: str, **loading: Any) -> CheckpointInfo:
    """Read the headers of a local sparse checkpoint and check every stored shape against its config.

    Raises:
        ValueError: not a sparse checkpoint, or tensors that are missing or of another shape.
    """
    config, sparsity = read_config(source, **loading)
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, **loading)
    headers = read_headers(weight_files(Path(source)))
    plan = make_plan(model, sparsity, strict=False)
    stored = stored_matrices(model, get_model_conversion_mapping(model), headers)
    check_stored(stored, plan)
    matrices = {}
    for name, linear in plan.linears.items():
        values = stored[name]["weight"]
        dense = linear.shape[0] * linear.shape[1] * values.bytes // max(math.prod(values.shape), 1)
        on_disk = sum(header.bytes for header in stored[name].values())
        matrices[name] = (str(linear.pattern), list(linear.shape), on_disk, dense)
    other = sum(header.bytes for header in headers.values()) - sum(matrix[2] for matrix in matrices.values())
    return CheckpointInfo(sparsity, matrices, other)


class Header(NamedTuple):
    """What a safetensors file says of one tensor; `dtype` as it is called there ("F32", "U8")."""

    shape: tuple[int, ...]
    dtype: str
    bytes: int


def name_shards(directory: Path, shards: list[str], model: PreTrainedModel) -> None:
    """Give the complete files of a checkpoint the names, and the index, that transformers reads. Can be repeated after
    an interruption."""
    weights: dict[str, str] = {}
    size = 0
    for number, shard in enumerate(shards, 1):
        path = directory / f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        if (directory / shard).exists():  # a run may have ended in this loop, or after it
            os.replace(directory / shard, path)
        headers = read_headers([path])
        weights |= dict.fromkeys(headers, path.name)
        size += sum(header.bytes for header in headers.values())
    index = {"metadata": {"total_parameters": model.num_parameters(), "total_size": size}, "weight_map": weights}
    with atomically(directory / "model.safetensors.index.json") as temporary:
        temporary.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def weight_files(directory: Path) -> list[Path]:
    files = sorted(directory.glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(f"{str(directory)!r} holds no .safetensors files.")
    for index in directory.glob("*.safetensors.index.json"):
        missing = sorted({*read_json(index).get("weight_map", {}).values()} - {file.name for file in files})
        if missing:
            raise FileNotFoundError(f"{str(directory)!r} lacks {', '.join(missing[:4])}, which {index.name} names.")
    return files


def read_headers(files: Iterable[str | os.PathLike]) -> dict[str, Header]:
    """{tensor name on disk: header}. No tensor is read. Raises OSError, naming the file, for one that is damaged."""
    headers = {}
    for file in files:
        try:
            opened = safe_open(file, "pt")
        except (SafetensorError, OSError) as error:
            raise OSError(f"{file} cannot be read: {error}.") from error
        with opened as stored:
            for name in stored.keys():  # noqa: SIM118 - not a dict
                part = stored.get_slice(name)
                shape, dtype = tuple(part.get_shape()), part.get_dtype()
                bits = re.search(r"\d+", dtype)  # "BF16", "F8_E4M3"; "BOOL" takes a byte
                headers[name] = Header(shape, dtype, math.prod(shape) * (int(bits[0]) if bits else 8) // 8)
    return headers


def stored_matrices(
    model: PreTrainedModel, conversions: Iterable[Any], headers: dict[str, Header]
) -> dict[str, dict[str, Header]]:
    """{module: {"weight", "weight_mask", ...: header}}, by the modules' names in `model`, which may differ on disk.

    Args:
        conversions: transformers' conversions for this model and load; only renamings concern pruned weights.
    """
    weights = {}
    for name in headers:
        owner, _, key = name.rpartition(".")
        if key in bitmask.SUFFIXES:
            weights[name] = f"{owner}.weight"
    known = names_in_model(model, conversions, weights.values())
    stored: dict[str, dict[str, Header]] = {}
    for name, weight in weights.items():
        if weight in known:
            stored.setdefault(known[weight].removesuffix(".weight"), {})[name.rpartition(".")[2]] = headers[name]
    return stored


def names_in_model(model: PreTrainedModel, conversions: Iterable[Any], weights: Iterable[str]) -> dict[str, str]:
    """{name on disk: name in `model`} of those weights that it has, matrices of fused experts included."""
    renamings = [copy.deepcopy(c) for c in conversions if isinstance(c, WeightRenaming)]  # they note their use
    modules = dict(model.named_modules())
    names = model.state_dict() | {f"{name}.weight": name for name in module_names(model) if name not in modules}
    known = {}
    for weight in sorted(set(weights), key=dot_natural_key):  # in transformers' order: some renamings depend on it
        renamed, _ = rename_source_key(weight, renamings, [], model.base_model_prefix, names)
        if renamed in names:
            known[weight] = renamed
    return known


def check_stored(stored: dict[str, dict[str, Header]], plan: Plan) -> None:
    """Raise ValueError, naming the modules, unless exactly the plan's linears are compressed in a checkpoint, in full.

    transformers itself would log a tensor that is missing, go on, and put random numbers in its place.
    """
    problems = []
    linears = plan.linears
    wanted = {
        name: (bitmask.layout(part.shape, part.pattern), f"{part.pattern} matrix {list(part.shape)}")
        for name, part in linears.items()
    }
    for name, dense in plan.dense_experts.items():
        wanted[name] = {"weight": (tuple(dense.weight.shape), None)}, "dense matrix"
    for name, (layout, what) in wanted.items():
        found = stored.get(name, {})
        missing, extra = sorted(set(layout) - set(found)), sorted(set(found) - set(layout))
        if missing or extra:
            problems.append(f"{name} is stored as {sorted(layout)}: missing {missing}, unexpected {extra}")
        for key in sorted(set(layout) & set(found)):
            (shape, dtype), header = layout[key], found[key]
            if header.shape != shape:
                problems.append(f"{name}.{key} has shape {list(header.shape)}, a {what} has {list(shape)}")
            elif header.dtype not in _DTYPES[dtype]:
                problems.append(f"{name}.{key} has dtype {header.dtype}, must be {' or '.join(_DTYPES[dtype])}")
    for name, found in stored.items():
        extra = sorted(set(found) - {"weight"})
        if extra and name not in linears:
            problems.append(f"{name} is dense by the config, but there is {name}.{extra[0]}")
    if problems:
        raise ValueError(
            f"the checkpoint does not hold what its config says, {len(problems)} problems: {'; '.join(problems[:4])}."
        )


_DTYPES = {None: ("BF16", "F16", "F32", "F64"), torch.uint8: ("U8",), torch.int64: ("I64",)}
