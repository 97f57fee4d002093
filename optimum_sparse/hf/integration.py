"""Registers with transformers, and lets `from_pretrained` take `sparsity_config=` and `run_compressed=`."""

import contextlib
import copy
import functools
import inspect
import os
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, cast

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.quantizers import auto

from .. import ranks
from ..config import QUANT_METHOD, SparsityConfig, check_run_compressed
from ..nn import SparseLinear
from .checkpoint import legacy_format, write_report
from .hub import push, push_model, write_card
from .quantizer import SparsityQuantizer, given_state, hub_arguments


_MERGED = "You passed `quantization_config` or equivalent parameters"  # transformers' warning; here it was asked for


class SparseModelForCausalLM:
    """`AutoModelForCausalLM` under the name that users of optimum look for. Returns the model's native class."""

    @classmethod
    def from_pretrained(
        cls,
        model_id: str | os.PathLike,
        sparsity_config: SparsityConfig | dict[str, Any] | None = None,
        run_compressed: bool | Literal["decode"] | None = None,
        **kwargs: Any,
    ) -> PreTrainedModel:
        """Load a model and prune it by `sparsity_config`; without one, load a sparse checkpoint."""
        return AutoModelForCausalLM.from_pretrained(
            model_id, sparsity_config=sparsity_config, run_compressed=run_compressed, **kwargs
        )


def install() -> None:
    """Make transformers know sparse checkpoints, `sparsity_config=` and `run_compressed=`. Can be called again."""
    if QUANT_METHOD in auto.AUTO_QUANTIZATION_CONFIG_MAPPING:
        return
    auto.register_quantization_config(QUANT_METHOD)(SparsityConfig)
    auto.register_quantizer(QUANT_METHOD)(SparsityQuantizer)
    auto.LOADING_ATTRIBUTES_CONFIG_TYPES += (SparsityConfig,)  # run_compressed= wins over the stored config
    wrappers = {  # the Auto classes pass on what they do not know
        "from_pretrained": _taking_sparsity,
        "save_pretrained": _saving_report,
        "push_to_hub": _pushing_sparse,
    }
    for name, wrap in wrappers.items():
        original = inspect.getattr_static(PreTrainedModel, name)
        ours = classmethod(wrap(original.__func__)) if isinstance(original, classmethod) else wrap(original)
        _methods[name] = original, ours
        setattr(PreTrainedModel, name, ours)


_methods: dict[str, tuple[Any, Any]] = {}  # of PreTrainedModel, by name: what `install` found, and what it put there


def uninstall() -> None:
    """Undo `install`.

    Raises:
        RuntimeError: a method that `install` wrapped was replaced since, by another library.
    """
    if QUANT_METHOD not in auto.AUTO_QUANTIZATION_CONFIG_MAPPING:
        return
    for name, (_, ours) in _methods.items():
        if inspect.getattr_static(PreTrainedModel, name) is not ours:
            raise RuntimeError(
                f"PreTrainedModel.{name} was replaced by other code after optimum_sparse.install: undo that first."
            )
    for name, (original, _) in _methods.items():
        setattr(PreTrainedModel, name, original)
    del auto.AUTO_QUANTIZATION_CONFIG_MAPPING[QUANT_METHOD]
    del auto.AUTO_QUANTIZER_MAPPING[QUANT_METHOD]
    auto.LOADING_ATTRIBUTES_CONFIG_TYPES = tuple(
        kind for kind in auto.LOADING_ATTRIBUTES_CONFIG_TYPES if kind is not SparsityConfig
    )


def _taking_sparsity(original: Callable) -> Callable:
    @functools.wraps(original)
    def from_pretrained(cls: type, *args: Any, **kwargs: Any) -> Any:
        config = kwargs.pop("sparsity_config", None)
        run_compressed = kwargs.pop("run_compressed", None)
        hub = {name: kwargs[name] for name in HUB_ARGUMENTS if name in kwargs}
        content = _stored_config(args, kwargs, hub)
        _refuse_legacy(content)
        if config is not None or run_compressed is not None:
            stored = content.get("quantization_config")
            stored = stored.to_dict() if isinstance(stored, SparsityConfig) else stored
            stored = stored if isinstance(stored, dict) else None
            config = _checked(config, run_compressed, stored, kwargs.get("quantization_config"))
        before = hub_arguments.set(hub)
        try:
            if config is None:
                return original(cls, *args, **kwargs)
            # Parameters made in a caller's inference mode could not be differentiated, which pruning may need.
            with warnings.catch_warnings(), torch.inference_mode(False):
                warnings.filterwarnings("ignore", message=_MERGED)
                return original(cls, *args, **(kwargs | {"quantization_config": config}))
        finally:
            hub_arguments.reset(before)

    return from_pretrained


def _checked(
    config: Any, run_compressed: Any, stored: dict[str, Any] | None, quantization_config: Any
) -> SparsityConfig | None:
    """What to pass as quantization_config for these arguments and this checkpoint; None if nothing is to be passed."""
    if run_compressed is not None:
        check_run_compressed(run_compressed)
    sparse = stored is not None and stored.get("quant_method") == QUANT_METHOD
    if config is None and not sparse:
        if run_compressed:
            raise ValueError(
                f"run_compressed={run_compressed!r} loads a sparse checkpoint; this one is dense: prune it, with "
                "sparsity_config=."
            )
        return None
    if quantization_config is not None:
        raise ValueError(
            "transformers holds one quantization_config per model: give either quantization_config or "
            "sparsity_config (with run_compressed), not both."
        )
    if config is None:
        return SparsityConfig(run_compressed=run_compressed or False)
    if stored is not None and sparse:
        raise ValueError(
            f"this checkpoint is sparse already ({stored.get('method')}, {stored.get('pattern')}): load it without "
            "sparsity_config. To prune it again: Pruner.from_pretrained(model).prune(config)."
        )
    if isinstance(config, dict):
        config = SparsityConfig.from_dict(config)
    elif not isinstance(config, SparsityConfig):
        raise TypeError(f"sparsity_config must be a SparsityConfig or a dict, got {type(config).__name__}.")
    if run_compressed is not None:
        config = copy.copy(config)  # the caller's stays as it is
        config.run_compressed = run_compressed
    return config


HUB_ARGUMENTS = (
    "cache_dir",
    "force_download",
    "local_files_only",
    "proxies",
    "revision",
    "subfolder",
    "token",
    "trust_remote_code",
)


def _stored_config(args: tuple, kwargs: dict[str, Any], hub: dict[str, Any]) -> dict[str, Any]:
    """The config.json of the checkpoint that is being loaded; empty if there is none that can be read."""
    config = kwargs.get("config")
    if isinstance(config, PreTrainedConfig):
        return config.to_dict()
    source = args[0] if args else kwargs.get("pretrained_model_name_or_path")
    if source is None:
        return {}
    try:
        return PreTrainedConfig.get_config_dict(source, **hub)[0]
    except (OSError, ValueError):  # the load itself will say what is wrong
        return {}


def _refuse_legacy(content: dict[str, Any]) -> None:
    """transformers would go on with random numbers for every compressed weight."""
    name = legacy_format(content)
    if name is not None:
        raise ValueError(
            f"this checkpoint is stored as {name!r} of compressed-tensors, which its current releases do not read. "
            "Convert it once: optimum-cli sparse convert FOLDER --output OUT (--dense for an ordinary checkpoint)."
        )


def _is_sparse(model: PreTrainedModel) -> bool:
    """Whether all of this model is saved by our quantizer: not an adapter on top of it, not one part."""
    quantizer = getattr(model, "hf_quantizer", None)
    adapter = getattr(model, "_hf_peft_config_loaded", False)
    return isinstance(quantizer, SparsityQuantizer) and quantizer.saves_all and not adapter


@contextlib.contextmanager
def _own_config(model: PreTrainedModel) -> Iterator[None]:
    """While it is saved, a model's config says what its weights are: models share their config with their parts, and
    with what else is made from it, and each may be sparse in another way, or dense."""
    held, own = vars(model.config), "quantization_config"
    before = {own: held[own]} if own in held else {}
    if isinstance(quantizer := getattr(model, "hf_quantizer", None), SparsityQuantizer):
        held[own] = quantizer.quantization_config
    elif not any(isinstance(module, SparseLinear) for module in model.modules()):
        config = held.get(own)
        method = config.get("quant_method") if isinstance(config, dict) else getattr(config, "quant_method", None)
        if method == QUANT_METHOD:
            del held[own]
    try:
        yield
    finally:
        held.pop(own, None)
        held.update(before)


def _saving_report(original: Callable) -> Callable:
    """With report and model card; and, for push_to_hub=True, with them in the upload, and no card of transformers'."""
    signature = inspect.signature(original)

    @functools.wraps(original)
    def save_pretrained(self: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
        given = signature.bind(self, *args, **kwargs).arguments
        before = given_state.set(given.get("state_dict"))
        try:
            with _own_config(self):
                return save(self, given) if _is_sparse(self) else original(self, *args, **kwargs)
        finally:
            given_state.reset(before)

    def save(self: PreTrainedModel, given: dict[str, Any]) -> Any:
        if ranks.rank() > 0:  # all processes have the same model, and the first one writes it
            return None
        directory = Path(given["save_directory"])
        uploading = given.pop("push_to_hub", False)
        more = given.pop("kwargs", {})
        options = {name: more.pop(name) for name in PUSH_ARGUMENTS if name in more} if uploading else {}
        before = _ages(directory)
        result = original(**given, **more)
        if given.get("is_main_process", True):
            report = cast(SparsityQuantizer, self.hf_quantizer).report
            if report is not None:
                write_report(directory, report)
                write_card(directory, self, report)
            if uploading:
                changed = [name for name, age in _ages(directory).items() if before.get(name) != age]
                repo_id = options.pop("repo_id", directory.name)
                push(directory, repo_id, files=changed, token=given.get("token"), **options)
        return result

    return save_pretrained


PUSH_ARGUMENTS = ("repo_id", "private", "revision", "create_pr", "commit_message", "commit_description")


def _ages(directory: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in directory.glob("*") if path.is_file()}


def _pushing_sparse(original: Callable) -> Callable:
    """transformers' own would put a card without content in place of ours, and leave out the tokenizer."""

    @functools.wraps(original)
    def push_to_hub(self: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
        return (push_model if _is_sparse(self) else original)(self, *args, **kwargs)

    return push_to_hub
