"""Pruner: the facade. `Pruner.from_pretrained(model).prune(config)`."""

import os
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from .config import SparsityConfig
from .hf.checkpoint import new_directory
from .hf.integration import HUB_ARGUMENTS
from .hf.prune import prune_model
from .hf.quantizer import SparsityQuantizer, load_tokenizer
from .methods import Method
from .report import PruningReport


class Pruner:
    """Prunes one causal language model.

    Attributes:
        model: the model; pruned in place.
        tokenizer: for calibration text; None if there is none.
        report: what the last `prune` did, layer by layer.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: Any = None):
        self.model = model
        self.tokenizer = tokenizer
        self.report: PruningReport | None = None

    @classmethod
    def from_pretrained(
        cls, model: str | os.PathLike | PreTrainedModel, tokenizer: Any = None, **kwargs: Any
    ) -> "Pruner":
        """From a model in memory, or from an id or path, which is loaded as AutoModelForCausalLM with `kwargs`.

        Args:
            tokenizer: a tokenizer, or the id or path of one; found beside the model when it is not given.
        """
        if isinstance(model, PreTrainedModel):
            if kwargs:
                raise ValueError(f"{sorted(kwargs)}: only for loading, and this model is loaded already.")
        else:
            model = AutoModelForCausalLM.from_pretrained(model, **kwargs)
        hub = {name: kwargs[name] for name in HUB_ARGUMENTS if name in kwargs}
        if isinstance(tokenizer, str | os.PathLike):
            tokenizer = AutoTokenizer.from_pretrained(tokenizer)
        elif tokenizer is None:
            tokenizer = load_tokenizer(model, **hub)
        return cls(model, tokenizer)

    def prune(self, config: SparsityConfig, *, dataset: Any = None, method: Method | None = None) -> PreTrainedModel:
        """Prune the model in place and return it. `save_pretrained` then writes it compressed.

        Args:
            dataset: calibration data in place of `config.dataset`; here it may also be a DataLoader.
            method: an object of your own in place of the one that `config.method` names.
        """
        if not isinstance(config, SparsityConfig):
            raise TypeError(f"config must be a SparsityConfig, got {type(config).__name__}.")
        stored, self.report = prune_model(self.model, config, tokenizer=self.tokenizer, dataset=dataset, method=method)
        SparsityQuantizer.attach(self.model, stored, self.report)
        return self.model

    def prune_to_disk(self, config: SparsityConfig, output: str | os.PathLike, max_shard_size: str = "50GB") -> Path:
        """Prune, and write checkpoint, tokenizer and report to the new folder `output`: all of it, or nothing."""
        with new_directory(output) as directory:
            self.prune(config)
            self.model.save_pretrained(directory, max_shard_size=max_shard_size)
            if self.tokenizer is not None:
                self.tokenizer.save_pretrained(directory)
        return Path(output)
