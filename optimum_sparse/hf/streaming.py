"""From disk to disk: a model that may be larger than the memory is loaded, pruned and saved one block at a time.

transformers puts the decoder blocks "on disk", which leaves them in the checkpoint's own files; these are only read.
The loop brings each in through `onload`, as it does for any offloaded model, and what comes out is a shard before the
block goes. `Journal` keeps what a later run needs to go on.
"""

import contextlib
import copy
import ctypes
import hashlib
import json
import logging
import os
import tempfile
import warnings
from collections.abc import Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from .. import ranks
from ..config import SparsityConfig
from ..pipeline import Block
from ..version import __version__
from .blocks import find_blocks, make_plan
from .checkpoint import load_config, load_model, name_shards, read_headers, read_json, sync, write_report, writing
from .hub import write_card
from .integration import HUB_ARGUMENTS
from .journal import Journal
from .placement import usable_device
from .prune import prune_model
from .quantizer import SparsityQuantizer, settle_names


logger = logging.getLogger(__name__)


def stream(
    source: str | os.PathLike,
    config: SparsityConfig,
    output: str | os.PathLike,
    *,
    tokenizer: Any = None,
    max_shard_size: int | str = "50GB",
    device_map: str | int | torch.device | None = None,
    **loading: Any,
) -> None:
    """Prune the model at `source`, an id or a path, to the new folder `output`; or go on where such a run has ended.

    The tensors are those that `prune_model` and `save_pretrained` give, to the bit, in one shard (or more) per block.
    In memory are embeddings, norms and head, one block, and hidden states up to a limit. Several processes (`ranks`)
    share the work as in `prune_model`: each has these, and the first one writes.

    Args:
        device_map: the device that computes; "auto": the GPU if there is one; None: the CPU.
        loading: further arguments of `from_pretrained`.

    Raises:
        FileExistsError: `output` exists and is not an empty folder.
        ValueError: an unfinished run there had another recipe or model, naming the differences.
        OSError: a file that cannot be read or written; finished blocks are kept, for the next run. Or another process
            is writing there.
    """
    with ranks.together():
        device = _device(device_map)
        hub = {name: loading[name] for name in HUB_ARGUMENTS if name in loading}
        model_config = loading.get("config") or load_config(source, **hub)
        settings = {name: value for name, value in loading.items() if name not in (*hub, "config")}
        settings |= {"max_shard_size": max_shard_size, "processes": ranks.world()}
        settings["device"] = str(device) if ranks.world() == 1 else device.type  # each process has a GPU of its own
        recipe = config.to_dict()
        if _is_file(config.dataset):
            recipe["dataset"] = os.path.abspath(config.dataset)  # whatever folder the command is repeated in
        manifest = {
            "recipe": recipe,
            "model": {
                "config": json.loads(model_config.to_json_string(use_diff=False)),
                "commit": getattr(model_config, "_commit_hash", None),  # on the hub; it is in no JSON
                "files": _files(source, hub),
            },
            "tokenizer": _digest_of_tokenizer(tokenizer),
            "data": _data_file(config.dataset),
            "settings": settings,
            "versions": {
                "optimum_sparse": __version__,
                "torch": torch.__version__,
                "transformers": transformers.__version__,
            },
        }
        manifest = json.loads(json.dumps(manifest, default=str))
        ranks.check_same(**manifest)
        journal = Journal(output, manifest)
    with contextlib.closing(journal):
        if not journal.complete:
            try:
                if journal.start and ranks.rank() == 0:
                    logger.warning(
                        "%s holds an unfinished run: going on from block %d.", journal.folder, journal.start
                    )
                with ranks.together():
                    offloaded = journal.scratch / "offload"
                    model = _load(source, model_config, config.block_name, str(device), offloaded, loading)
                _prune(model, config, tokenizer, journal, max_shard_size)
            except BaseException as error:
                remains = journal.fail(error)
                if remains is not None:
                    logger.warning(remains)
                raise
        journal.publish()


def _device(device_map: str | int | torch.device | None) -> torch.device:
    """Which is to compute; of several processes each has a GPU of its own."""
    if device_map == "auto":
        device_map = "cuda" if torch.cuda.is_available() else "cpu"
    device = usable_device("cpu" if device_map is None else device_map)
    if ranks.world() > 1 and device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())  # others may take "cuda" for the first one
    return device


def _files(source: str | os.PathLike, hub: dict[str, Any]) -> dict[str, str] | None:
    """What the weights in a folder are. On the hub, the commit says it."""
    folder = Path(source, hub.get("subfolder") or "")
    if not folder.is_dir():
        return None
    found = sorted(path for path in folder.iterdir() if path.suffix in (".safetensors", ".bin"))
    read_headers(path for path in found if path.suffix == ".safetensors")  # damaged ones show before any work
    for index in folder.glob("*.index.json"):
        content = read_json(index)
        files = content.get("weight_map") if isinstance(content.get("metadata"), dict) else None
        if not isinstance(files, dict) or not files or not all(isinstance(file, str) for file in files.values()):
            raise OSError(f"{index} is damaged: must hold metadata, and in weight_map the file of each weight.")
    return {path.name: _described(path) for path in found}


def _data_file(dataset: Any) -> str | None:
    """What the calibration data is, if it is a file."""
    return _described(Path(dataset)) if _is_file(dataset) else None


def _is_file(dataset: Any) -> bool:
    return isinstance(dataset, str) and Path(dataset).is_file()


def _described(path: Path, pieces: int = 64, piece: int = 4096) -> str:
    """A file's size, age and a digest of some of it: times can be set, and checkpoints of a model have equal sizes."""
    status = path.stat()
    digest = hashlib.sha256()
    with path.open("rb") as file:
        for number in range(pieces):
            file.seek(number * max(piece, (status.st_size - piece) // (pieces - 1)))
            digest.update(file.read(piece))
    changed = datetime.fromtimestamp(status.st_mtime, timezone.utc).isoformat()
    return f"{status.st_size} bytes of {changed}, {digest.hexdigest()[:16]}"


def _digest_of_tokenizer(tokenizer: Any) -> str | None:
    """Of all that decides which ids a text becomes, as far as the tokenizer shows it."""
    if tokenizer is None:
        return None
    content: Any = type(tokenizer).__name__
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        content = json.loads(backend.to_str())
        for set_by_calls in ("padding", "truncation"):
            content.pop(set_by_calls, None)
    elif hasattr(tokenizer, "get_vocab"):
        content = [content, sorted(tokenizer.get_vocab().items())]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def _load(
    source: str | os.PathLike,
    model_config: PreTrainedConfig,
    block_name: str | None,
    device: str,
    folder: Path,
    loading: dict[str, Any],
) -> PreTrainedModel:
    """The model with its decoder blocks left on disk and all else on `device`.

    `folder` gets those weights that transformers stores otherwise than it computes with them (experts, mostly).
    """
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(model_config, trust_remote_code=loading.get("trust_remote_code"))
    prefix, blocks = find_blocks(skeleton, block_name)
    places = {f"{prefix}.{number}": "disk" for number in range(len(blocks))}
    owner: nn.Module = skeleton
    path = ""
    for part in prefix.split("."):
        beside = [name for name, _ in (*owner.named_children(), *owner.named_parameters(recurse=False))]
        places |= {f"{path}{name}": device for name in beside if name != part}
        owner, path = getattr(owner, part), f"{path}{part}."
    with _quiet():
        return load_model(source, **loading, device_map=places, offload_folder=folder)


def _prune(
    model: PreTrainedModel, config: SparsityConfig, tokenizer: Any, journal: Journal, max_shard_size: int | str
) -> None:
    """Fill `journal.checkpoint`."""
    prefix, blocks = find_blocks(model, config.block_name)
    inside = tuple(f"{prefix}.{number}." for number in range(len(blocks)))
    settle_names(model, make_plan(model, config, strict=False))  # which one block alone does not show

    def save_block(block: Block, stored: SparsityConfig) -> list[str]:
        shards: list[str] = []
        if ranks.rank() == 0:
            alone = _only(model, block.name.split("."))
            stored.block_name = prefix  # a list of one block is harder to find
            SparsityQuantizer.attach(alone, stored, None, lambda name: name.startswith(f"{block.name}."))
            shards = _save_part(alone, journal, block.name, max_shard_size)
        _trim()
        return shards

    stored, report = prune_model(model, config, tokenizer=tokenizer, journal=journal, save_block=save_block)
    with ranks.together():
        if ranks.rank() > 0:
            return
        SparsityQuantizer.attach(model, stored, report, lambda name: not name.startswith(inside))
        shards = [*journal.shards, *_save_part(model, journal, "rest", max_shard_size)]
        if tokenizer is not None:
            tokenizer.save_pretrained(journal.checkpoint)
        name_shards(journal.checkpoint, shards, model)
        write_report(journal.checkpoint, report)
        write_card(journal.checkpoint, model, report)


def _only(module: Any, path: list[str]) -> Any:
    """The module as if its only block were that at `path`: transformers walks a whole model ten times to save it, and
    would once for each block. All but the modules on the path are the same objects."""
    if not path:
        return module
    child = _only(module.get_submodule(path[0]), path[1:])
    alone = copy.copy(module)
    alone._load_state_dict_pre_hooks = module._load_state_dict_pre_hooks.copy()
    alone._modules = ({} if isinstance(module, nn.ModuleList) else module._modules) | {path[0]: child}
    return alone


def _save_part(model: PreTrainedModel, journal: Journal, name: str, max_shard_size: int | str) -> list[str]:
    """Save, as `save_pretrained` does, the part of the model that its quantizer names. Returns the shards' names."""
    shards: list[str] = []
    with tempfile.TemporaryDirectory(dir=journal.scratch) as folder:
        with writing(journal.checkpoint / name), _quiet():
            model.save_pretrained(folder, max_shard_size=max_shard_size)
        for path in sorted(Path(folder).iterdir()):
            target = path.name
            if path.suffix == ".safetensors":
                target = f"{name}-{len(shards):05d}.safetensors"
                shards.append(target)
            if not target.endswith(".index.json"):  # of this part alone
                sync(path)
                os.replace(path, journal.checkpoint / target)
    sync(journal.checkpoint)
    return shards


def _trim() -> None:
    """Give freed memory back to the system: glibc keeps it in pieces, of which every block leaves more."""
    with contextlib.suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL("libc.so.6").malloc_trim(0)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No progress bar for every file that transformers writes, no warning that blocks are on disk, as they should."""
    shown = transformers_logging.is_progress_bar_enabled()
    accelerate = logging.getLogger("accelerate.big_modeling")
    level = accelerate.level
    transformers_logging.disable_progress_bar()
    accelerate.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Attempting to save a model with offloaded modules")
            yield
    finally:
        accelerate.setLevel(level)
        if shown:
            transformers_logging.enable_progress_bar()
