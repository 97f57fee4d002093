"""Sharing: the model card beside a checkpoint, and the upload of both to the Hub."""

import contextlib
import logging
import math
import os
import re
import tempfile
from collections.abc import Collection, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any, cast

import torch
import transformers
import yaml
from huggingface_hub import (
    CommitInfo,
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    ModelCard,
    ModelCardData,
    constants,
    get_token,
)
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError, OfflineModeIsEnabled
from huggingface_hub.utils import validate_repo_id
from transformers import PreTrainedModel

from ..calibration import is_file_name
from ..config import IN_MEMORY, PAPER, SECOND_ORDER, SparsityConfig
from ..core import Needs
from ..formats import bitmask
from ..report import PruningReport
from ..version import __version__
from .checkpoint import Header, atomically, read_headers
from .quantizer import load_tokenizer


logger = logging.getLogger(__name__)

CARD_FILE = constants.REPOCARD_NAME
BEGIN = "<!-- optimum-sparse: begin; written anew with every save, so your own text belongs outside -->"
END = "<!-- optimum-sparse: end -->"
_PART = re.compile(r"<!-- optimum-sparse: begin\b.*?<!-- optimum-sparse: end -->", re.DOTALL)
_HERE = "folder-or-id-of-this-model"  # in the card, until it is known
_PATTERN_TAG = re.compile(r"\d+:\d+|unstructured")
_WEIGHTS = re.compile(r"model(-\d+-of-\d+)?\.safetensors|model\.safetensors\.index\.json")
_WRITTEN_BY_PRUNING = ("allocated", "format", "format_version", "quant_method", "run_compressed")


def write_card(directory: str | os.PathLike, model: PreTrainedModel, report: PruningReport) -> None:
    """Write README.md beside a saved checkpoint of `model`, from its config and report.

    Of a README.md that is there already, only the part between the marks `BEGIN` and `END` is replaced, and tags that
    are missing are added; without marks it stays as it is.
    """
    directory = Path(directory)
    try:
        headers = read_headers(sorted(directory.glob("model*.safetensors")))
    except OSError as error:  # another file in this folder: what was saved now is whole
        logger.warning("%s", error)
        headers = {}
    config = cast(SparsityConfig, model.hf_quantizer.quantization_config)
    card = make_card(config, report, headers, model.model_tags or ())
    existing = _read(directory / CARD_FILE)
    merged = merge(existing, card)
    if existing is not None and _PART.search(existing) is None:
        logger.warning("%s is left as it is: it has no part between %s and %s.", directory / CARD_FILE, BEGIN, END)
    elif merged != existing:
        with atomically(directory / CARD_FILE) as temporary:
            temporary.write_text(merged, encoding="utf-8", newline="")


def make_card(
    config: SparsityConfig, report: PruningReport, headers: dict[str, Header], tags: Collection[str] = ()
) -> str:
    """A whole model card: metadata, and the generated part between its marks.

    Args:
        config: as it is stored.
        headers: of the checkpoint's files. If they hold another number of compressed matrices than the report, the
            card says nothing of sizes.
        tags: further ones.
    """
    base_model = _checked_id(report.base_model)
    method = report.method if report.method.isidentifier() else "a method of its author's own"
    data = ModelCardData(
        base_model=base_model,
        library_name="transformers",
        tags=list(dict.fromkeys(["sparse", "optimum-sparse", config.pattern, *tags])),
    )
    base = f"`{base_model}`" if base_model else "A dense model"
    weights = sum(layer.shape[0] * layer.shape[1] for layer in report.pruned)
    zeros = sum(layer.sparsity * layer.shape[0] * layer.shape[1] for layer in report.pruned)
    pattern = config.pattern if config.sparsity is None else f"{config.pattern} {config.sparsity:g}"
    parts = [
        f"# {base_model or 'Sparse model'}, {pattern}",
        f"{base}, pruned by {method} to {pattern} with optimum-sparse: {zeros / max(weights, 1):.1%} of the "
        f"{weights:,} weights in {len(report.pruned)} matrices of its decoder blocks are zero, and not stored. "
        "Embeddings, norms and head are dense.",
        "## Load",
        _code(
            "python",
            "import optimum_sparse  # needed: without it, transformers cannot read this checkpoint",
            "from transformers import AutoModelForCausalLM",
            "",
            f'model = AutoModelForCausalLM.from_pretrained("{_HERE}")  # dense weights, zeros in place',
            f'model = AutoModelForCausalLM.from_pretrained("{_HERE}", run_compressed=True)  # compressed in memory',
        ),
        "For vLLM, and whatever else does not know optimum-sparse, write an ordinary dense checkpoint:",
        _code("bash", f"optimum-cli sparse export {_HERE} --output dense"),
        "## How it was made",
        _code("python", *_recipe(config, report.method, base_model or "folder-or-id-of-the-dense-model")),
        f"optimum-sparse {__version__}, torch {torch.__version__}, transformers {transformers.__version__}.",
        *_quality(report),
        *_sizes(report, headers),
        "## Layers",
        _code("", report.summary(seconds=False).replace("`", "'")),
        "`sparsity_report.json` has the same for every single matrix.",
    ]
    body = "\n\n".join([BEGIN, *(part.replace("<!--", "<!- -") for part in parts), END])
    return f"---\n{data.to_yaml()}\n---\n\n{body}\n"


def merge(existing: str | None, card: str) -> str:
    """`existing`, a user's card, with the generated part of `card` in place of its own, and the tags that it lacks.

    Without an existing card: `card`. An existing one without a generated part: as it is.
    """
    part = _PART.search(card)
    if existing is None or part is None or _PART.search(existing) is None:
        return card if existing is None else existing
    merged = _PART.sub(lambda _: part[0], existing, count=1)
    try:
        mine, new = ModelCard(merged), ModelCard(card)
    except (ValueError, yaml.YAMLError) as error:
        logger.warning("the metadata of this model card is left as it is, since it cannot be read: %s", error)
        return merged
    tags = [mine.data.tags] if isinstance(mine.data.tags, str) else mine.data.tags or []
    kept = [tag for tag in tags if not _PATTERN_TAG.fullmatch(str(tag)) or tag in new.data.tags]
    wanted = kept + [tag for tag in new.data.tags if tag not in kept]
    missing = [name for name in ("base_model", "library_name") if mine.data.get(name) is None and new.data.get(name)]
    if wanted == tags and not missing:
        return merged
    mine.data.tags = wanted
    for name in missing:
        mine.data[name] = new.data[name]
    return str(mine)


def _recipe(config: SparsityConfig, method: str, source: str) -> list[str]:
    """Lines of Python that prune the same model in the same way."""
    default = SparsityConfig()
    built_in = config.build_method()
    own = method != type(built_in).__name__
    in_memory = config.dataset.startswith(IN_MEMORY)
    usual = SECOND_ORDER if built_in.needs is Needs.GRAM and not own else PAPER
    left_out = {*_WRITTEN_BY_PRUNING, *(["method"] if own else []), *(["dataset"] if in_memory else [])}
    arguments = []
    for field in fields(SparsityConfig):
        value = getattr(config, field.name)
        if field.name == "dataset" and is_file_name(value):
            value = Path(value).name  # config.json says where it lay, as it was given
        said = field.name in ("method", "pattern") or value != usual.get(field.name, getattr(default, field.name))
        if said and field.name not in left_out:
            arguments.append(f"{field.name}={value!r}")
    lines = ["from optimum_sparse import Pruner, SparsityConfig", ""]
    given = ""
    if in_memory:
        lines.append(f"data = ...  # {' '.join(config.dataset.split())}")
        given += ", dataset=data"
    if own:
        name = f", {method}" if method.isidentifier() else ""
        lines.append(f"method = ...  # an object of its author's own{name}")
        given += ", method=method"
    lines.append(f"config = SparsityConfig({', '.join(arguments)})")
    pruning = f'prune(config{given}).save_pretrained("out")' if given else 'prune_to_disk(config, "out")'
    return [*lines, f"Pruner.from_pretrained({source!r}).{pruning}"]


def _checked_id(name: str) -> str | None:
    """An id on the Hub; None for anything else: a report is data, and may come from anywhere."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    return name or None


def _quality(report: PruningReport) -> list[str]:
    if not report.quality:
        return []
    rows = ["| | dense | sparse | |", "|---|---|---|---|"]
    for found in report.quality:
        dense = "-" if found.dense is None else f"{found.dense:.4g}"
        error = "" if found.standard_error is None else f" ± {found.standard_error:.2g}"
        texts = (f"{found.metric}, {found.data}", found.note)
        what, note = (" ".join(re.sub("[|`]", "/", text).split()) for text in texts)
        rows.append(f"| {what} | {dense} | {found.value:.4g}{error} | {note} |")
    return ["## Quality", "\n".join(rows)]


def _sizes(report: PruningReport, headers: dict[str, Header]) -> list[str]:
    mark = ".weight_mask"
    matrices = [name.removesuffix(mark) for name in headers if name.endswith(mark)]
    if len(matrices) != len(report.pruned) or not matrices:
        logger.warning(
            "the model card says nothing of sizes: %d matrices in the files, %d in the report",
            len(matrices),
            len(report.pruned),
        )
        return []
    parts = [
        headers[f"{name}.{suffix}"]
        for name in matrices
        for suffix in bitmask.SUFFIXES
        if f"{name}.{suffix}" in headers
    ]
    stored, whole = (sum(header.bytes for header in found) for found in (parts, headers.values()))
    values = [headers[f"{name}.weight"] for name in matrices]
    bytes_each = sum(header.bytes for header in values) / max(sum(math.prod(header.shape) for header in values), 1)
    dense = round(bytes_each * sum(math.prod(layer.shape) for layer in report.pruned))
    rows = ["| | dense, bytes | here, bytes | |", "|---|---|---|---|"]
    for what, other in (("pruned matrices", 0), ("whole checkpoint", whole - stored)):
        before, now = dense + other, stored + other
        rows.append(f"| {what} | {before:,} | {now:,} | {now / max(before, 1):.4f} of dense |")
    return ["## Size", "\n".join(rows)]


def _code(language: str, *lines: str) -> str:
    return "\n".join([f"```{language}", *lines, "```"])


def _read(path: Path) -> str | None:
    """The text of a file, line ends as they are; None if there is none."""
    if not path.exists():
        return None
    with path.open(encoding="utf-8", newline="") as file:
        return file.read()


# ---- uploading


def check_access(repo_id: str, token: str | bool | None = None) -> None:
    """Raise ValueError or OSError, before any work, if nothing can be uploaded: a bad name, no token, no network."""
    validate_repo_id(repo_id)
    if token is False or (not isinstance(token, str) and get_token() is None):
        raise ValueError(
            f"nothing can be uploaded to {repo_id!r} without a token of the Hub, and none was found: run `hf auth "
            "login`, set HF_TOKEN, or pass token=. Tokens with write access are made at "
            f"{constants.ENDPOINT}/settings/tokens."
        )
    with _explained(repo_id):
        HfApi().whoami(token=token)


def push(
    folder: str | os.PathLike,
    repo_id: str,
    *,
    files: Collection[str] | None = None,
    unless_there: Collection[str] = (),
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str | None = None,
    commit_description: str | None = None,
) -> CommitInfo:
    """Upload a saved checkpoint in one commit, to a repository that is made if it does not exist.

    Of a model card that the repository has, only the generated part is replaced. Weights of an earlier model there, in
    files with other names, are deleted by the same commit: transformers might load them.

    Args:
        files: upload only these, named relative to `folder`. None: all that are not hidden.
        unless_there: leave these out if the repository has one of them.
        private, token, revision, create_pr, commit_message, commit_description: as in transformers' push_to_hub.

    Raises:
        ValueError: no valid name, or no token.
        OSError: the Hub cannot be reached, or refuses; says what to do.
    """
    folder = Path(folder)
    if files is None:
        found = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
        files = [path.as_posix() for path in found if not any(part.startswith(".") for part in path.parts)]
    check_access(repo_id, token)
    api = HfApi(library_name="optimum-sparse", library_version=__version__)
    with _explained(repo_id):
        repo_id = api.create_repo(repo_id, private=private, token=token, exist_ok=True).repo_id
        if revision is not None and not revision.startswith("refs/pr"):
            api.create_branch(repo_id, branch=revision, token=token, exist_ok=True)
        there = set(api.list_repo_files(repo_id, revision=revision, token=token))
        skipped = set(unless_there) if there.intersection(unless_there) else set()
        if skipped:
            logger.warning("%s has a tokenizer, which is left as it is.", repo_id)
        operations: list[Any] = [
            CommitOperationAdd(name, folder / name) for name in sorted({*files} - skipped - {CARD_FILE})
        ]
        operations += [
            CommitOperationDelete(name)
            for name in sorted(there)
            if _WEIGHTS.fullmatch(name) and not (folder / name).exists()
        ]
        card = _read(folder / CARD_FILE)
        if card is not None:
            existing = None
            if CARD_FILE in there:
                existing = _read(Path(api.hf_hub_download(repo_id, CARD_FILE, revision=revision, token=token)))
                if _PART.search(existing or "") is None:
                    logger.warning("the model card of %s is left as it is: it has no part between marks.", repo_id)
            text = merge(existing, card).replace(_HERE, repo_id)
            operations.append(CommitOperationAdd(CARD_FILE, text.encode()))
        return api.create_commit(
            repo_id,
            operations,
            commit_message=commit_message or "Upload sparse model",
            commit_description=commit_description,
            token=token,
            revision=revision,
            create_pr=create_pr,
        )


def push_model(
    model: PreTrainedModel,
    repo_id: str,
    *,
    tokenizer: Any = None,
    max_shard_size: int | str = "50GB",
    tags: str | list[str] | None = None,
    **options: Any,
) -> CommitInfo:
    """Save a sparse model to a temporary folder, compressed, with card and report, and `push` that.

    Args:
        tokenizer: None: the one beside the model that was pruned, unless the repository has one.
        options: of `push`.
    """
    check_access(repo_id, options.get("token"))
    if tags:
        model.add_model_tags(tags)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder, max_shard_size=max_shard_size)
        before = set(os.listdir(folder))
        found = tokenizer or load_tokenizer(model.config, token=options.get("token"))
        if found is not None:
            found.save_pretrained(folder)
        beside = {*os.listdir(folder)} - before if tokenizer is None else ()
        return push(folder, repo_id, unless_there=beside, **options)


@contextlib.contextmanager
def _explained(repo_id: str) -> Iterator[None]:
    """Raise OSError that says what to do for what huggingface_hub and its HTTP client raise."""
    try:
        yield
    except HfHubHTTPError as error:
        status = error.response.status_code
        advice = {
            401: f"the token is not valid: `hf auth login` stores another; see {constants.ENDPOINT}/settings/tokens",
            403: f"the token may not write to {repo_id!r}: use one with write access, or a name under your account",
        }.get(status, str(error))
        raise OSError(f"nothing was uploaded to {repo_id!r}: the Hub answers {status}: {advice}.") from error
    except OfflineModeIsEnabled as error:
        raise OSError(f"nothing was uploaded to {repo_id!r}: HF_HUB_OFFLINE is set; unset it.") from error
    except HTTPError as error:
        raise OSError(
            f"nothing was uploaded to {repo_id!r}: {constants.ENDPOINT} cannot be reached ({error}); check the "
            f"network, or HF_ENDPOINT."
        ) from error
