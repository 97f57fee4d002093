"""Registers with transformers, and lets `from_pretrained` take `sparsity_config=` and `run_compressed=`."""

import copy
import functools
import os
import warnings
from collections.abc import Callable
from typing import Any

from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.quantizers import auto

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
        if kwargs.get("quantization_config") is not None:
            raise ValueError(
                "transformers holds one quantization_config per model: give either quantization_config or "
                "sparsity_config (with run_compressed), not both."
            )
        if config is None:
            config = SparsityConfig()
            config.only_for_loading = True
        elif isinstance(config, dict):
            config = SparsityConfig.from_dict(config)
        elif not isinstance(config, SparsityConfig):
            raise TypeError(f"sparsity_config must be a SparsityConfig or a dict, got {type(config).__name__}.")
        if run_compressed is not None:
            config = copy.copy(config)
            config.run_compressed = run_compressed
        with warnings.catch_warnings():
            if getattr(config, "only_for_loading", False):
                warnings.filterwarnings("ignore", message=_MERGED)
            return original(cls, *args, quantization_config=config, **kwargs)

    return from_pretrained


def _saving_report(original: Callable) -> Callable:
    @functools.wraps(original)
    def save_pretrained(
        self: PreTrainedModel,
        save_directory: str | os.PathLike,
        is_main_process: bool = True,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        result = original(self, save_directory, is_main_process, *args, **kwargs)
        report = getattr(getattr(self, "hf_quantizer", None), "report", None)
        if (
            is_main_process
            and isinstance(getattr(self, "hf_quantizer", None), SparsityQuantizer)
            and report is not None
        ):
            write_report(save_directory, report)
        return result

    return save_pretrained
