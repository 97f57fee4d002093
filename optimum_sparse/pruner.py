"""Pruner: the facade. `Pruner.from_pretrained(model).prune(config)`."""

import os
from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub import CommitInfo
from transformers import AutoTokenizer, PreTrainedModel

from . import ranks
from .config import SparsityConfig
from .hf.checkpoint import check_size, load_config, load_model, new_directory, read_report, writing
from .hf.hub import push, push_model
from .hf.integration import HUB_ARGUMENTS
from .hf.prune import prune_model
from .hf.quantizer import SparsityQuantizer, load_tokenizer
from .hf.streaming import stream
from .methods import Method
from .report import PruningReport


SPREAD = ("balanced", "balanced_low_0", "sequential")  # over several devices
KEPT = ("dtype", "device_map", "trust_remote_code")  # arguments for loading the source that suit the output


class Pruner:
    """Prunes one causal language model.

    Attributes:
        tokenizer: for calibration text; None if there is none.
        report: what the last `prune` did, layer by layer.
    """

    def __init__(self, model: PreTrainedModel | None, tokenizer: Any = None):
        self.tokenizer = tokenizer
        self.report: PruningReport | None = None
        self._model = model
        self._source: str | os.PathLike | None = None  # of a model that is not loaded yet
        self._loading: dict[str, Any] = {}

    @classmethod
    def from_pretrained(
        cls, model: str | os.PathLike | PreTrainedModel, tokenizer: Any = None, **kwargs: Any
    ) -> "Pruner":
        """From a model in memory, or from an id or path, which AutoModelForCausalLM loads, with `kwargs`, when needed.

        Args:
            tokenizer: a tokenizer, or the id or path of one; found beside the model when it is not given.

        Raises:
            OSError: neither a folder nor an id on the hub.
            ValueError: no causal language model.
        """
        hub = {name: kwargs[name] for name in HUB_ARGUMENTS if name in kwargs}
        if isinstance(model, PreTrainedModel):
            if kwargs:
                raise ValueError(f"{sorted(kwargs)}: only for loading, and this model is loaded already.")
            pruner, config = cls(model), model.config
        elif not isinstance(model, str | os.PathLike):
            raise TypeError(f"model must be an id, a path or a PreTrainedModel, got {type(model).__name__}.")
        elif "sparsity_config" in kwargs or isinstance(kwargs.get("quantization_config"), SparsityConfig):
            raise ValueError("a SparsityConfig would prune while loading: give it to prune or prune_to_disk alone.")
        else:
            pruner, config = cls(None), load_config(model, **hub)
            pruner._source, pruner._loading = model, kwargs
        if isinstance(tokenizer, str | os.PathLike):
            others = {name: value for name, value in hub.items() if name not in ("revision", "subfolder")}
            tokenizer = AutoTokenizer.from_pretrained(tokenizer, **others)
        elif tokenizer is None:
            tokenizer = load_tokenizer(config, **hub)
        pruner.tokenizer = tokenizer
        return pruner

    @property
    def model(self) -> PreTrainedModel:
        """The model; pruned in place. One that was given by its id or path is loaded when it is first asked for."""
        if self._model is None and self._source is not None:
            self._model = load_model(self._source, **self._loading)
        return cast(PreTrainedModel, self._model)

    def prune(self, config: SparsityConfig, *, dataset: Any = None, method: Method | None = None) -> PreTrainedModel:
        """Prune the model in place and return it. `save_pretrained` then writes it compressed.

        With torch.distributed initialized, all processes call this in the same way, share the work, and end with the
        same model; the first one saves it.

        Args:
            dataset: calibration data in place of `config.dataset`; here it may also be a DataLoader.
            method: an object of your own in place of the one that `config.method` names.
        """
        _check(config)
        stored, self.report = prune_model(self.model, config, tokenizer=self.tokenizer, dataset=dataset, method=method)
        SparsityQuantizer.attach(self.model, stored, self.report)
        return self.model

    def prune_to_disk(
        self, config: SparsityConfig, output: str | os.PathLike, max_shard_size: int | str = "50GB"
    ) -> Path:
        """Prune, and write checkpoint, tokenizer and report to the new folder `output`: all of it, or nothing.

        A model that was given by its id or path, and was not loaded yet, is streamed from disk to disk: no more than
        one block is in memory, and a run that was interrupted goes on when it is called again in the same way. It is
        loaded as a whole for dataset="self", which runs all of it for every token, and for a `device_map` other than
        "auto" and single devices. The weights are the same, to the bit.

        Several processes of torch.distributed that all call this share the work; the first one writes.

        Raises:
            ValueError: among others: several processes and a model that is loaded as a whole; no such size.
        """
        _check(config)
        check_size(max_shard_size)
        device_map = self._loading.get("device_map")
        one_device = device_map is None or (
            isinstance(device_map, str | int | torch.device) and device_map not in SPREAD
        )
        if self._model is None and self._source is not None and one_device and config.dataset != "self":
            kwargs = self._loading | {"tokenizer": self.tokenizer, "max_shard_size": max_shard_size}
            stream(self._source, config, output, **kwargs)
            with ranks.together():
                self.report = ranks.gathered(read_report(Path(output)) if ranks.rank() == 0 else None)[0]
            self._source = output
            self._loading = {name: self._loading[name] for name in KEPT if name in self._loading}
            return Path(output)
        if ranks.world() > 1:
            raise ValueError(
                f"this model is loaded as a whole, and there are {ranks.world()} processes: call prune(config), then "
                "save_pretrained, in all of them; or start one process."
            )
        with new_directory(output) as directory:
            self.prune(config)
            with writing(directory):
                self.model.save_pretrained(directory, max_shard_size=max_shard_size)
            if self.tokenizer is not None:
                self.tokenizer.save_pretrained(directory)
        return Path(output)

    def push_to_hub(self, repo_id: str, **options: Any) -> CommitInfo:
        """Upload what was pruned: weights, tokenizer, report and model card, to a repository that is made if need be.

        Args:
            options: as of transformers' push_to_hub: private, token, revision, create_pr, commit_message,
                commit_description; and max_shard_size and tags, for a model in memory.

        Raises:
            ValueError: nothing was pruned yet; `repo_id` is no valid name; there is no token.
            OSError: the Hub cannot be reached, or refuses.
        """
        if self.report is None:
            raise ValueError("nothing was pruned yet: call prune or prune_to_disk first.")
        if self._model is None:
            return push(cast(str, self._source), repo_id, **options)
        return push_model(self._model, repo_id, tokenizer=self.tokenizer, **options)


def _check(config: Any) -> None:
    if not isinstance(config, SparsityConfig):
        raise TypeError(f"config must be a SparsityConfig, got {type(config).__name__}: SparsityConfig(method=...).")
    config.check()
