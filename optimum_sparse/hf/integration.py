"""Registers with transformers, and lets `from_pretrained` take `sparsity_config=` and `run_compressed=`."""

import copy
import functools
import os
import warnings
from collections.abc import Callable
from typing import Any

from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.quantizers import auto

from .. import ranks
from ..config import QUANT_METHOD, SparsityConfig
from .checkpoint import write_report
from .quantizer import SparsityQuantizer


_MERGED = "You passed `quantization_config` or equivalent parameters"  # transformers' warning; here it was asked for


class SparseModelForCausalLM:
    """`AutoModelForCausalLM` under the name that users of optimum look for. Returns the model's native class."""

    @classmethod
    def from_pretrained(
        cls,
        model_id: str | os.PathLike,
        sparsity_config: SparsityConfig | dict[str, Any] | None = None,
        run_compressed: bool | None = None,
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
    # The Auto classes pass on what they do not know.
    PreTrainedModel.from_pretrained = classmethod(_taking_sparsity(PreTrainedModel.from_pretrained.__func__))
    PreTrainedModel.save_pretrained = _saving_report(PreTrainedModel.save_pretrained)


def uninstall() -> None:
    """Undo `install`."""
    if auto.AUTO_QUANTIZATION_CONFIG_MAPPING.pop(QUANT_METHOD, None) is None:
        return
    auto.AUTO_QUANTIZER_MAPPING.pop(QUANT_METHOD)
    auto.LOADING_ATTRIBUTES_CONFIG_TYPES = tuple(
        kind for kind in auto.LOADING_ATTRIBUTES_CONFIG_TYPES if kind is not SparsityConfig
    )
    PreTrainedModel.from_pretrained = classmethod(PreTrainedModel.from_pretrained.__func__.__wrapped__)
    PreTrainedModel.save_pretrained = PreTrainedModel.save_pretrained.__wrapped__


def _taking_sparsity(original: Callable) -> Callable:
    @functools.wraps(original)
    def from_pretrained(cls: type, *args: Any, **kwargs: Any) -> Any:
        config = kwargs.pop("sparsity_config", None)
        run_compressed = kwargs.pop("run_compressed", None)
        if config is None and run_compressed is None:
            return original(cls, *args, **kwargs)
        config = _checked(config, run_compressed, _stored_config(args, kwargs), kwargs.get("quantization_config"))
        if config is None:
            return original(cls, *args, **kwargs)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=_MERGED)
            return original(cls, *args, **(kwargs | {"quantization_config": config}))

    return from_pretrained


def _checked(
    config: Any, run_compressed: Any, stored: dict[str, Any] | None, quantization_config: Any
) -> SparsityConfig | None:
    """What to pass as quantization_config for these arguments and this checkpoint; None if nothing is to be passed."""
    if run_compressed is not None and not isinstance(run_compressed, bool):
        raise ValueError(f"run_compressed={run_compressed!r}: must be True or False.")
    sparse = stored is not None and stored.get("quant_method") == QUANT_METHOD
    if config is None and not sparse:
        if run_compressed:
            raise ValueError(
                "run_compressed=True loads a sparse checkpoint; this one is dense: prune it, with sparsity_config=."
            )
        return None
    if quantization_config is not None:
        raise ValueError(
            "transformers holds one quantization_config per model: give either quantization_config or "
            "sparsity_config (with run_compressed), not both."
        )
    if config is None:
        return SparsityConfig(run_compressed=bool(run_compressed))
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


def _stored_config(args: tuple, kwargs: dict[str, Any]) -> dict[str, Any] | None:
    """The quantization_config in the config.json of the checkpoint that is being loaded, if it has one."""
    config = kwargs.get("config")
    if not isinstance(config, PreTrainedConfig):
        source = args[0] if args else kwargs.get("pretrained_model_name_or_path")
        if source is None:
            return None
        chosen = {name: kwargs[name] for name in HUB_ARGUMENTS if name in kwargs}
        try:
            content, _ = PreTrainedConfig.get_config_dict(source, **chosen)
        except (OSError, ValueError):  # the load itself will say what is wrong
            return None
    else:
        content = config.to_dict()
    stored = content.get("quantization_config")
    stored = stored.to_dict() if isinstance(stored, SparsityConfig) else stored
    return stored if isinstance(stored, dict) else None


def _saving_report(original: Callable) -> Callable:
    @functools.wraps(original)
    def save_pretrained(
        self: PreTrainedModel,
        save_directory: str | os.PathLike,
        is_main_process: bool = True,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        ours = isinstance(getattr(self, "hf_quantizer", None), SparsityQuantizer)
        if ours and ranks.rank() > 0:  # all processes have the same model, and the first one writes it
            return None
        result = original(self, save_directory, is_main_process, *args, **kwargs)
        report = getattr(getattr(self, "hf_quantizer", None), "report", None)
        if is_main_process and ours and report is not None:
            write_report(save_directory, report)
        return result

    return save_pretrained
