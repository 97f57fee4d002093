"""SparsityConfig: the recipe of a pruned model, and what its checkpoint holds."""

import copy
import difflib
import hashlib
import os
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal, TypeGuard

import numpy as np
import torch
from transformers.utils.quantization_config import QuantizationConfigMixin  # what `config.json` stores must extend it

from .core import NM, Needs, Pattern, Unstructured, parse_pattern
from .formats import FORMATS
from .methods import METHODS, Admm, Method, Rose, SparseGPT


# What second-order methods do unless told otherwise.
SECOND_ORDER: dict[str, Any] = {"staged": True, "input_shift": 0.5, "residual_shift": 0.5, "fisher": True}
PAPER: dict[str, Any] = {"staged": False, "input_shift": 0.0, "residual_shift": 0.0, "fisher": False}
REFINEMENTS = ("pcg", "reconstruct")
ALLOCATIONS = ("uniform", "owl", "error")


def _one_shot(pattern: str) -> dict[str, Any]:
    allocation = {"allocation": "error"} if pattern == "unstructured" else {}
    return {"method": "admm", "refine": "pcg", **allocation}


RECIPES: dict[str, Callable[[str], dict[str, Any]]] = {
    "best": lambda pattern: _one_shot(pattern) | {"refine": "reconstruct"},
    "fast": _one_shot,
    "paper": lambda pattern: PAPER,
}

QUANT_METHOD = "sparsity"
FORMAT_VERSION = 1
DENSE = "dense"
IN_MEMORY = "in memory: "  # what a stored config says of data begins with it


@dataclass(repr=False)
class SparsityConfig(QuantizationConfigMixin):
    """How to prune a model. Checked as a whole when it is made; unknown keys and wrong values are errors.

    A name in `targets`, `ignore` or `layers` is one of
    - a run of whole dotted parts of a module's name: "q_proj", "mlp", "model.layers.0" or a full name;
      "layers.1" does not match "layers.10";
    - "re:" and a regular expression that must match the module's full name from its beginning to its end.
    Each matrix of a fused expert has a name of its own, such as "model.layers.0.mlp.experts.3.gate_up_proj".

    Args:
        method: "magnitude", "wanda", "sparsegpt", "rose" or "admm".
        pattern: "unstructured", or "N:M" for N kept of every M input columns, such as "2:4".
        sparsity: share of the weights to remove, in [0, 1). Only for "unstructured" (0.5 unless given).
        dataset: calibration data: "c4", "wikitext2", the name of a dataset on the hub ("org/name" or
            "org/name:subset"), a local .txt, .jsonl or .parquet file, a list of texts, a tensor of token ids
            [samples, tokens], or "self" for text sampled from the model itself (no data, no network needed).
            Lists and tensors are not stored: the config then records their fingerprint.
        num_samples: calibration sequences.
        sequence_length: tokens per sequence.
        batch_size: sequences per forward pass. Does not change the result but for rounding (and for the steps of
            "reconstruct", if reconstruction_batch_size does not divide it).
        seed: of everything random: which documents are used, and the sampling of "self".
        damping: added to the diagonal of Gram matrices, relative to its mean.
        block_size: SparseGPT, ROSE: columns per block.
        rose_threshold: ROSE: a layer is reordered if the relative range of its block losses is above this.
        staged: collect statistics again after each group of linears with the same input, inside each block.
        input_shift: in [0, 1]: how far each layer's target moves towards what the dense model would give there.
        residual_shift: in [0, 1]: how much layers that write to the residual stream repair of what it has lost.
        fisher: weigh tokens, and rows of unstructured layers, by what the model's likelihood feels of an error in
            them; takes one backward pass over the calibration data. These four are for second-order methods (those
            that see Gram matrices). None: on, as True, 0.5, 0.5, True; off for a method object of your own, and for
            the masks of magnitude and Wanda under "pcg". allocation="error" and denser use it whatever `fisher` says.
        refine: what to do when the masks are chosen. "pcg": solve for the kept weights of each layer again, together;
            after any method. "reconstruct": that, and then train the kept weights of each block, and its norms and
            biases, one block at a time, towards the dense block's output.
        reconstruction_learning_rate: relative to the root mean square of each matrix.
        reconstruction_passes: over the calibration data.
        reconstruction_batch_size: sequences per step.
        reconstruction_samples: train on the first ones only; None: on all.
        allocation: how unstructured sparsity is shared out: "uniform"; "owl", by outliers of a block's scores;
            "error", by measured loss of every matrix at several sparsities; or {name: sparsity}, with the rest shared
            out evenly. The whole always has `sparsity`. Layers named in `layers` take no part.
        denser: for N:M: {"4:8": 0.2, "dense": 0.05}: patterns for those layers that lose most without them, densest
            first, and the share that may take each, of the weights of all layers that `layers` does not name.
        allocated: what the last two chose, by full name; written by pruning, and written anew by the next.
        targets: names; only linear layers of decoder blocks that match one are pruned. None: all of them.
        ignore: names; linear layers that match one stay dense, whatever else matches. Embeddings, norms and lm_head
            are outside the decoder blocks and always stay dense; naming them here is allowed.
        layers: overrides by name: another pattern ("4:8"), an unstructured sparsity (0.3), or "dense". A layer that
            two names give different values to is an error; "dense" always wins.
        block_name: where the decoder blocks are, e.g. "model.layers", for models in which they are not found.
        format: how pruned weights are stored: "bitmask".
        run_compressed: at load time, keep weights compressed in memory (SparseLinear). "decode": and dense ones beside
            them, which takes about 1.6 times the memory of a dense model; few tokens, as in decoding, read the
            compressed weight, many the dense one where that is faster. Not stored.
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
    rose_threshold: float = 0.5
    staged: bool | None = None
    input_shift: float | None = None
    residual_shift: float | None = None
    fisher: bool | None = None
    refine: str | None = None
    reconstruction_learning_rate: float = 0.01
    reconstruction_passes: int = 8
    reconstruction_batch_size: int = 2
    reconstruction_samples: int | None = None
    allocation: str | dict[str, float] = "uniform"
    denser: dict[str, float] = field(default_factory=dict)
    allocated: dict[str, str | float] = field(default_factory=dict)
    targets: list[str] | None = None
    ignore: list[str] = field(default_factory=list)
    layers: dict[str, str | float] = field(default_factory=dict)
    block_name: str | None = None
    format: str = "bitmask"
    run_compressed: bool | Literal["decode"] = False
    quant_method: Any = QUANT_METHOD  # transformers lists its own in an enum
    format_version: int = FORMAT_VERSION

    def __post_init__(self) -> None:
        self.dataset = usual_dataset(self.dataset)
        self.check()

    def check(self) -> None:
        """Raise ValueError unless all fields are valid: they can be set later, too."""
        _one_of("method", self.method, METHODS)
        _one_of("format", self.format, FORMATS)
        _one_of("quant_method", self.quant_method, [QUANT_METHOD])
        _check_version(self.format_version)
        pattern = parse_pattern(self.pattern, self.sparsity)
        self.sparsity = pattern.sparsity if isinstance(pattern, Unstructured) else None  # N:M says it already
        counts = ("num_samples", "sequence_length", "batch_size", "block_size")
        for name in (*counts, "reconstruction_passes", "reconstruction_batch_size"):
            _integer(name, getattr(self, name), 1)
        if self.reconstruction_samples is not None:
            _integer("reconstruction_samples", self.reconstruction_samples, 1)
        _integer("seed", self.seed, 0)
        if self.seed >= 2**63:
            raise ValueError(f"seed={self.seed}: must be below 2**63.")
        _number("damping", self.damping, 0, 1e3, "0.01")
        _number("rose_threshold", self.rose_threshold, 0, 1, "0.5")
        _number("reconstruction_learning_rate", self.reconstruction_learning_rate, 0, 1, "0.01")
        for name in ("input_shift", "residual_shift"):
            if getattr(self, name) is not None:
                _number(name, getattr(self, name), 0, 1, "0.5")
        for name in ("staged", "fisher"):
            if getattr(self, name) is not None and not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name}={getattr(self, name)!r}: must be True or False.")
        check_run_compressed(self.run_compressed)
        if self.refine is not None:
            _one_of("refine", self.refine, REFINEMENTS)
        self._check_allocation(pattern)
        self._check_second_order()
        if self.block_name is not None and not isinstance(self.block_name, str):
            raise ValueError(f"block_name={self.block_name!r}: must be a module name such as 'model.layers', or None.")
        for name in ("targets", "ignore"):
            _names(name, getattr(self, name), optional=name == "targets")
        for field_name in ("layers", "allocated"):
            overrides = getattr(self, field_name)
            if not isinstance(overrides, dict):
                example = {"down_proj": "4:8", "model.layers.0": "dense"}
                raise ValueError(f"{field_name}={overrides!r}: must be a dict such as {example}.")
            _names(field_name, list(overrides), optional=False)
            for name, value in overrides.items():
                try:
                    _parse_override(value)
                except ValueError as error:
                    raise ValueError(f"{field_name}[{name!r}]: {error}") from error
        _check_dataset(self.dataset)

    def __copy__(self) -> "SparsityConfig":
        """With lists and dicts of its own: what is done to one of the two is not done to the other."""
        new = object.__new__(type(self))
        for name, value in vars(self).items():
            setattr(new, name, copy.copy(value) if isinstance(value, list | dict) else value)
        return new

    def __eq__(self, other: object) -> bool:
        """Data in memory is compared by its fingerprint."""
        if not isinstance(other, SparsityConfig):
            return NotImplemented
        return (self.to_dict(), self.run_compressed) == (other.to_dict(), other.run_compressed)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """The inverse of `to_dict`. Raises ValueError for keys that do not exist."""
        _check_version(config_dict.get("format_version", FORMAT_VERSION))  # first: a newer one may have other keys
        known = check_keys(config_dict)
        checked = config_dict | {key: kwargs.pop(key) for key in known if key in kwargs}  # or they go in unchecked
        return super().from_dict(checked, return_unused_kwargs=return_unused_kwargs, **kwargs)

    def to_dict(self) -> dict[str, Any]:
        """JSON-serializable; without `run_compressed`, which belongs to a load and not to a checkpoint."""
        own = copy.copy(self)
        stored = {f.name: getattr(own, f.name) for f in fields(self) if f.name != "run_compressed"}
        stored["dataset"] = describe_dataset(self.dataset)
        return stored

    def get_loading_attributes(self) -> dict[str, Any]:
        """What an argument of `from_pretrained` overrides in the config of a checkpoint."""
        return {"run_compressed": self.run_compressed}

    @classmethod
    def recipe(cls, name: str, pattern: str = "2:4", **changes: Any) -> "SparsityConfig":
        """A config that was chosen by measurement (see the README); `changes` go on top.

        - "best": the least loss that this package reaches, with training of each block (minutes).
        - "fast": the least loss without any training (seconds on a GPU).
        - "paper": the method as published, without this package's additions; SparseGPT unless `method` is given.
        """
        _one_of("recipe", name, RECIPES)
        return cls.from_dict({"pattern": pattern, **RECIPES[name](pattern), **changes})

    def build_method(self) -> Method:
        """The method object that this config names, refinement not included."""
        if self.method == "sparsegpt":
            return SparseGPT(self.damping, self.block_size)
        if self.method == "rose":
            return Rose(self.damping, self.block_size, self.rose_threshold)
        if self.method == "admm":
            return Admm(self.damping)
        return METHODS[self.method]()

    def resolved(self, second_order: bool) -> "SparsityConfig":
        """With a value in place of each None that stands for "on for second-order methods"."""
        chosen = copy.copy(self)
        for name, value in (SECOND_ORDER if second_order else PAPER).items():
            if getattr(self, name) is None:
                setattr(chosen, name, value)
        return chosen

    def overrides(self, name: str) -> bool:
        """Whether `layers` names the linear layer with this full name."""
        return any(matches(rule, name) for rule in self.layers)

    def _check_allocation(self, pattern: Pattern) -> None:
        if isinstance(self.allocation, dict):
            _names("allocation", list(self.allocation), optional=False)
            for name, sparsity in self.allocation.items():
                _number(f"allocation[{name!r}]", sparsity, 0, 0.99, "0.5")
        else:
            _one_of("allocation", self.allocation, ALLOCATIONS)
        if self.allocation != "uniform" and not isinstance(pattern, Unstructured):
            raise ValueError(
                f"allocation={self.allocation!r}: pattern {pattern} has nothing to share out, only 'unstructured' "
                "has; denser={'dense': 0.1} leaves some layers at a denser pattern."
            )
        if not isinstance(self.denser, dict):
            raise ValueError(f"denser={self.denser!r}: must be a dict such as {{'4:8': 0.2, 'dense': 0.05}}.")
        for name, share in self.denser.items():
            try:
                valid = name == DENSE or isinstance(parse_pattern(name), NM)
            except ValueError:
                valid = False
            if not valid:
                raise ValueError(f"denser[{name!r}]: must be 'dense', or N:M such as '4:8'.")
            _number(f"denser[{name!r}]", share, 0, 1, "0.1")
        if self.denser and not isinstance(pattern, NM):
            raise ValueError(f"denser={self.denser!r}: for N:M patterns; allocation='error' is for unstructured.")
        for name in self.denser:
            other = None if name == DENSE else parse_pattern(name)
            if isinstance(other, NM) and isinstance(pattern, NM) and other.sparsity > pattern.sparsity:
                raise ValueError(f"denser[{name!r}]: keeps less than pattern {pattern}.")

    def _check_second_order(self) -> None:
        """A built-in method that sees no Gram matrix cannot do what was asked for explicitly."""
        if self.refine is None and self.build_method().needs < Needs.GRAM:
            for name in SECOND_ORDER:
                if getattr(self, name):
                    raise ValueError(
                        f"{name}={getattr(self, name)!r} needs a second-order method, and {self.method!r} is none: "
                        "use 'sparsegpt', 'rose', 'admm', or refine='pcg'."
                    )

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
        if name in self.allocated:
            pattern = _parse_override(self.allocated[name])
            return "left dense by denser" if pattern is None else pattern
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
        return f"{IN_MEMORY}tokens {list(dataset.shape)}, sha256 {digest[:16]}"
    if is_texts(dataset):
        digest = hashlib.sha256("\0".join(dataset).encode()).hexdigest()
        return f"{IN_MEMORY}{len(dataset)} texts, sha256 {digest[:16]}"
    return f"{IN_MEMORY}{type(dataset).__name__}"


def is_token_ids(value: Any) -> TypeGuard[torch.Tensor]:
    """Whether this is an integer tensor [samples, tokens] with something in it."""
    if not isinstance(value, torch.Tensor) or value.dim() != 2 or not value.numel():
        return False
    return not (value.is_floating_point() or value.is_complex() or value.dtype == torch.bool)


def is_texts(value: Any) -> TypeGuard[list[str]]:
    """Whether this is a list of texts."""
    return isinstance(value, list) and all(isinstance(text, str) for text in value)


def usual_dataset(dataset: Any) -> Any:
    """A path as a string, numbers of NumPy as a tensor, texts as a list. Others are as they were."""
    if isinstance(dataset, os.PathLike):
        return os.fspath(dataset)
    if isinstance(dataset, np.ndarray):
        return torch.as_tensor(dataset) if dataset.dtype.kind in "biuf" else dataset.tolist()
    if isinstance(dataset, Sequence) and not isinstance(dataset, str | list):  # a column of `datasets`, say
        return list(dataset) if len(dataset) and isinstance(dataset[0], str) else dataset
    return dataset


def _check_dataset(dataset: Any) -> None:
    allowed = (
        "a name ('c4', 'wikitext2', 'org/name'), a .txt, .jsonl or .parquet file, a list of texts, a tensor of token "
        "ids [samples, tokens], or 'self'"
    )
    if (isinstance(dataset, str) or is_texts(dataset)) and dataset:
        return
    if isinstance(dataset, torch.Tensor):
        if is_token_ids(dataset):
            return
        raise ValueError(
            f"dataset: token ids must be integers [samples, tokens], got {list(dataset.shape)} {dataset.dtype}."
        )
    if isinstance(dataset, str | list) and not dataset:
        raise ValueError(f"dataset={dataset!r} is empty: must be {allowed}.")
    raise ValueError(
        f"dataset of type {type(dataset).__name__}: must be {allowed}. A DataLoader or other iterable of batches goes "
        "to `Pruner.prune(config, dataset=loader)`, since a config is copied and stored."
    )


def _parse_override(value: Any) -> Pattern | None:
    """None: dense."""
    if value == DENSE:
        return None
    if isinstance(value, str) and ":" not in value:
        raise ValueError(f"{value!r} must be N:M such as '4:8', a sparsity such as 0.5, or 'dense'.")
    return parse_pattern(value) if isinstance(value, str) else Unstructured(value)


def check_keys(keys: Iterable[str]) -> list[str]:
    """The names of all fields of SparsityConfig. Raises ValueError for a key that is none of them."""
    known = [f.name for f in fields(SparsityConfig)]
    for key in keys:
        if key not in known:
            close = difflib.get_close_matches(str(key), known, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"known keys are {known}."
            raise ValueError(f"unknown key {key!r} in a SparsityConfig: {hint}")
    return known


def _check_version(version: Any) -> None:
    if type(version) is not int or version != FORMAT_VERSION:
        raise ValueError(
            f"format_version={version!r}: this release reads version {FORMAT_VERSION}; upgrade optimum-sparse to read "
            "a newer one."
        )


def check_run_compressed(value: Any) -> None:
    """Raise ValueError unless this is a value of `run_compressed`."""
    if not isinstance(value, bool) and value != "decode":
        raise ValueError(f"run_compressed={value!r}: must be True or False, or 'decode' to keep dense weights, too.")


def _one_of(name: str, value: Any, allowed: Any) -> None:
    if not isinstance(value, str) or value not in allowed:
        raise ValueError(f"{name}={value!r}: must be one of {sorted(allowed)}.")


def _integer(name: str, value: Any, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name}={value!r}: must be an integer from {least} up.")


def _number(name: str, value: Any, least: float, most: float, example: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= most:
        raise ValueError(f"{name}={value!r}: must be a number from {least:g} to {most:g}, such as {example}.")


def _names(field_name: str, rules: Any, optional: bool) -> None:
    if rules is None and optional:
        return
    if not isinstance(rules, list) or not all(isinstance(rule, str) and rule for rule in rules):
        raise ValueError(
            f"{field_name}={rules!r}: must be a list of module names such as 'down_proj', or of 're:' patterns."
        )
    for rule in rules:
        if rule.startswith("re:"):
            try:
                re.compile(rule[3:])
            except (re.error, OverflowError, RecursionError) as error:
                raise ValueError(f"{field_name}: {rule!r} is not a regular expression: {error}.") from error
