"""SparsityConfig: the recipe of a pruned model, and what its checkpoint holds."""

import difflib
import hashlib
import re
from dataclasses import dataclass, field, fields
from typing import Any, TypeGuard

import torch
from transformers.utils.quantization_config import QuantizationConfigMixin  # what `config.json` stores must extend it

from .core import Pattern, Unstructured, parse_pattern
from .formats import FORMATS
from .methods import METHODS, Method, SparseGPT


QUANT_METHOD = "sparsity"
FORMAT_VERSION = 1
DENSE = "dense"


@dataclass(repr=False)
class SparsityConfig(QuantizationConfigMixin):
    """How to prune a model. Checked as a whole when it is made; unknown keys and wrong values are errors.

    A name in `targets`, `ignore` or `layers` is one of
    - a run of whole dotted parts of a module's name: "q_proj", "mlp", "model.layers.0" or a full name;
      "layers.1" does not match "layers.10";
    - "re:" and a regular expression that must match the module's full name from its beginning to its end.

    Args:
        method: "magnitude", "wanda" or "sparsegpt".
        pattern: "unstructured", or "N:M" for N kept of every M input columns, such as "2:4".
        sparsity: share of the weights to remove, in [0, 1). Only for "unstructured" (0.5 unless given).
        dataset: calibration data: "c4", "wikitext2", the name of a dataset on the hub ("org/name" or
            "org/name:subset"), a local .txt, .jsonl or .parquet file, a list of texts, a tensor of token ids
            [samples, tokens], or "self" for text sampled from the model itself (no data, no network needed).
            Lists and tensors are not stored: the config then records their fingerprint.
        num_samples: calibration sequences.
        sequence_length: tokens per sequence.
        batch_size: sequences per forward pass. Does not change the result but for rounding.
        seed: of everything random: which documents are used, and the sampling of "self".
        damping: SparseGPT: added to the diagonal of the Gram matrix, relative to its mean.
        block_size: SparseGPT: columns per block.
        targets: names; only linear layers of decoder blocks that match one are pruned. None: all of them.
        ignore: names; linear layers that match one stay dense, whatever else matches. Embeddings, norms and lm_head
            are outside the decoder blocks and always stay dense; naming them here is allowed.
        layers: overrides by name: another pattern ("4:8"), an unstructured sparsity (0.3), or "dense". A layer that
            two names give different values to is an error; "dense" always wins.
        block_name: where the decoder blocks are, e.g. "model.layers", for models in which they are not found.
        format: how pruned weights are stored: "bitmask".
        run_compressed: at load time, keep weights compressed in memory (SparseLinear). Not stored.
    """

    method: str = "sparsegpt"
    pattern: str = "2:4"
    sparsity: float | None = None
    dataset: Any = "c4"
    num_samples: int = 128
    sequence_length: int = 2048
    batch_size: int = 8
    seed: int = 0
    damping: float = 0.01
    block_size: int = 128
    targets: list[str] | None = None
    ignore: list[str] = field(default_factory=list)
    layers: dict[str, str | float] = field(default_factory=dict)
    block_name: str | None = None
    format: str = "bitmask"
    run_compressed: bool = False
    quant_method: Any = QUANT_METHOD  # transformers lists its own in an enum
    format_version: int = FORMAT_VERSION

    def __post_init__(self) -> None:
        _one_of("method", self.method, METHODS)
        _one_of("format", self.format, FORMATS)
        _one_of("quant_method", self.quant_method, [QUANT_METHOD])
        _check_version(self.format_version)
        pattern = parse_pattern(self.pattern, self.sparsity)
        self.sparsity = pattern.sparsity if isinstance(pattern, Unstructured) else None  # N:M says it already
        for name in ("num_samples", "sequence_length", "batch_size", "block_size"):
            _integer(name, getattr(self, name), 1)
        _integer("seed", self.seed, 0)
        if isinstance(self.damping, bool) or not isinstance(self.damping, int | float) or not 0 <= self.damping < 1e3:
            raise ValueError(f"damping={self.damping!r}: must be a number from 0 up; the paper uses 0.01.")
        if not isinstance(self.run_compressed, bool):
            raise ValueError(f"run_compressed={self.run_compressed!r}: must be True or False.")
        if self.block_name is not None and not isinstance(self.block_name, str):
            raise ValueError(f"block_name={self.block_name!r}: must be a module name such as 'model.layers', or None.")
        for name in ("targets", "ignore"):
            _names(name, getattr(self, name), optional=name == "targets")
        if not isinstance(self.layers, dict):
            raise ValueError(
                f"layers={self.layers!r}: must be a dict such as {{'down_proj': '4:8', 'model.layers.0': 'dense'}}."
            )
        _names("layers", list(self.layers), optional=False)
        for name, value in self.layers.items():
            try:
                _parse_override(value)
            except ValueError as error:
                raise ValueError(f"layers[{name!r}]: {error}") from error
        _check_dataset(self.dataset)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """The inverse of `to_dict`. Raises ValueError for keys that do not exist."""
        _check_version(config_dict.get("format_version", FORMAT_VERSION))  # first: a newer one may have other keys
        known = [f.name for f in fields(cls)]
        for key in config_dict:
            if key not in known:
                close = difflib.get_close_matches(str(key), known, n=1)
                hint = f"did you mean {close[0]!r}?" if close else f"known keys are {known}."
                raise ValueError(f"unknown key {key!r} in a SparsityConfig: {hint}")
        checked = config_dict | {key: kwargs.pop(key) for key in known if key in kwargs}  # or they go in unchecked
        return super().from_dict(checked, return_unused_kwargs=return_unused_kwargs, **kwargs)

    def to_dict(self) -> dict[str, Any]:
        """JSON-serializable; without `run_compressed`, which belongs to a load and not to a checkpoint."""
        stored = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "run_compressed"}
        stored["dataset"] = describe_dataset(self.dataset)
        return stored

    def get_loading_attributes(self) -> dict[str, Any]:
        """What an argument of `from_pretrained` overrides in the config of a checkpoint."""
        return {"run_compressed": self.run_compressed}

    def build_method(self) -> Method:
        """The method object that this config names."""
        if self.method == "sparsegpt":
            return SparseGPT(damping=self.damping, block_size=self.block_size)
        return METHODS[self.method]()

    def pattern_for(self, name: str) -> Pattern | str:
        """The pattern of the linear layer with this full name, or in words why it stays dense."""
        if self.targets is not None and not any(matches(target, name) for target in self.targets):
            return "not in targets"
        for rule in self.ignore:
            if matches(rule, name):
                return f"ignored by {rule!r}"
        found = {rule: _parse_override(value) for rule, value in self.layers.items() if matches(rule, name)}
        for rule, pattern in found.items():
            if pattern is None:
                return f"dense by layers[{rule!r}]"
        if len(set(found.values())) > 1:
            raise ValueError(
                f"layers gives {name} different patterns, by {sorted(found)}: make one name more specific."
            )
        if found:
            return next(pattern for pattern in found.values() if pattern is not None)
        return parse_pattern(self.pattern, self.sparsity)


def matches(rule: str, name: str) -> bool:
    """Whether a name of `targets`, `ignore` or `layers` matches the module called `name` (see SparsityConfig)."""
    if rule.startswith("re:"):
        return re.fullmatch(rule[3:], name) is not None
    return f".{rule}." in f".{name}."


def describe_dataset(dataset: Any) -> str:
    """How a config is stored with this dataset: by name, or by a fingerprint of data that was given in memory."""
    if isinstance(dataset, str):
        return dataset
    if isinstance(dataset, torch.Tensor):
        digest = hashlib.sha256(dataset.to("cpu", torch.int64).contiguous().numpy().tobytes()).hexdigest()
        return f"in memory: tokens {list(dataset.shape)}, sha256 {digest[:16]}"
    if isinstance(dataset, list) and all(isinstance(text, str) for text in dataset):
        digest = hashlib.sha256("\0".join(dataset).encode()).hexdigest()
        return f"in memory: {len(dataset)} texts, sha256 {digest[:16]}"
    return f"in memory: {type(dataset).__name__}"


def is_token_ids(value: Any) -> TypeGuard[torch.Tensor]:
    """Whether this is an integer tensor [samples, tokens] with something in it."""
    if not isinstance(value, torch.Tensor) or value.dim() != 2 or not value.numel():
        return False
    return not (value.is_floating_point() or value.is_complex() or value.dtype == torch.bool)


def _check_dataset(dataset: Any) -> None:
    allowed = (
        "a name ('c4', 'wikitext2', 'org/name'), a .txt, .jsonl or .parquet file, a list of texts, a tensor of token "
        "ids [samples, tokens], or 'self'"
    )
    if isinstance(dataset, str) and dataset:
        return
    if isinstance(dataset, list) and dataset and all(isinstance(text, str) for text in dataset):
        return
    if isinstance(dataset, torch.Tensor):
        if is_token_ids(dataset):
            return
        raise ValueError(
            f"dataset: token ids must be integers [samples, tokens], got {list(dataset.shape)} {dataset.dtype}."
        )
    raise ValueError(
        f"dataset of type {type(dataset).__name__}: must be {allowed}. A DataLoader or other iterable of batches goes "
        "to `Pruner.prune(config, dataset=loader)`, since a config is copied and stored."
    )


def _parse_override(value: Any) -> Pattern | None:
    """None: dense."""
    if value == DENSE:
        return None
    if value == "unstructured":
        raise ValueError("give its sparsity instead, such as 0.5.")
    if isinstance(value, str):
        return parse_pattern(value)
    return Unstructured(value)


def _check_version(version: Any) -> None:
    if type(version) is not int or version != FORMAT_VERSION:
        raise ValueError(
            f"format_version={version!r}: this release reads version {FORMAT_VERSION}; upgrade optimum-sparse to read "
            "a newer one."
        )


def _one_of(name: str, value: Any, allowed: Any) -> None:
    if not isinstance(value, str) or value not in allowed:
        raise ValueError(f"{name}={value!r}: must be one of {sorted(allowed)}.")


def _integer(name: str, value: Any, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name}={value!r}: must be an integer from {least} up.")


def _names(field_name: str, rules: Any, optional: bool) -> None:
    if rules is None and optional:
        return
    if not isinstance(rules, list) or not all(isinstance(rule, str) and rule for rule in rules):
        raise ValueError(f"{field_name}={rules!r}: must be a list of module names or 're:' patterns.")
    for rule in rules:
        if rule.startswith("re:"):
            try:
                re.compile(rule[3:])
            except (re.error, OverflowError, RecursionError) as error:
                raise ValueError(f"{field_name}: {rule!r} is not a regular expression: {error}.") from error
