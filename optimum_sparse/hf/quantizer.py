"""The plug into transformers' loading and saving: prune on load, load dense or compressed, save compressed."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import ConversionOps, WeightConverter
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.base import HfQuantizer

from ..config import SparsityConfig
from ..core import Needs
from ..formats import FORMATS, bitmask
from ..nn import SparseLinear
from ..pipeline import Linear
from ..report import PruningReport
from .blocks import make_plan
from .checkpoint import check_stored, read_headers, read_report, stored_matrices
from .placement import offloaded_weight
from .prune import measures_layers, prune_model


class SparsityQuantizer(HfQuantizer):
    """What transformers calls a quantizer: owns a model's sparsity config and report.

    `pre_quantized` (transformers' word) means that the checkpoint is already sparse; otherwise it is pruned as soon as
    its weights are loaded.
    """

    quantization_config: SparsityConfig

    def __init__(self, quantization_config: SparsityConfig, **kwargs: Any):
        super().__init__(quantization_config, **kwargs)
        self.report: PruningReport | None = None
        self._skeleton: PreTrainedModel | None = None  # what is being loaded
        self._files: list[str] = []
        self._tokenizer: Any = None
        self._compressed: dict[str, Linear] = {}
        self._decompress = Decompress(self._compressed)
        self._part: Callable[[str], bool] | None = None

    @classmethod
    def attach(
        cls,
        model: PreTrainedModel,
        config: SparsityConfig,
        report: PruningReport | None,
        part: Callable[[str], bool] | None = None,
    ) -> None:
        """Make `model`, which follows `config`, save itself compressed.

        Args:
            part: of the state dict's names, those to save; None: all.
        """
        quantizer = cls(config)
        quantizer.report = report
        quantizer._part = part
        model.hf_quantizer = quantizer
        quantizer._mark(model)

    # ---- loading

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        if getattr(model.config, "distributed_config", None) is not None:
            raise ValueError("sparse models cannot be loaded with tensor parallelism yet: use device_map instead.")
        if not self.pre_quantized:
            make_plan(model, self.quantization_config)  # what cannot be pruned shows before weights are loaded
            self._tokenizer = load_tokenizer(model.config) if needs_tokenizer(self.quantization_config) else None
            return
        if not checkpoint_files or not all(file.endswith(".safetensors") for file in checkpoint_files):
            raise ValueError(f"a sparse checkpoint is read from .safetensors files, got {checkpoint_files}.")
        self.report = read_report(Path(checkpoint_files[0]).parent)
        self._skeleton, self._files = model, checkpoint_files
        self._compressed = make_plan(model, self.quantization_config, strict=False).linears
        self._decompress = Decompress(self._compressed)
        if self.quantization_config.run_compressed:
            for name, linear in self._compressed.items():
                module, (out_features, in_features) = linear.module, linear.shape
                sparse = SparseLinear(
                    in_features, out_features, module.bias is not None, linear.pattern, module.weight.dtype, "meta"
                )
                sparse.transposed = linear.transposed
                model.set_submodule(name, sparse)

    def get_weight_conversions(self) -> list[WeightConverter]:
        if not self.pre_quantized or self.quantization_config.run_compressed:
            return []
        return [WeightConverter(list(bitmask.SUFFIXES), "weight", [self._decompress])]

    def update_weight_conversions(self, weight_conversions: list, model: PreTrainedModel | None = None) -> list:
        if self._skeleton is not None and self._files:  # here, since only here all names on disk are known
            stored = stored_matrices(self._skeleton, weight_conversions, read_headers(self._files))
            check_stored(stored, self._compressed)
            self._files = []
        return weight_conversions + self.get_weight_conversions()

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        config = self.quantization_config
        if not self.pre_quantized:
            run_compressed = config.run_compressed
            config, self.report = prune_model(model, config, tokenizer=self._tokenizer)
            self.quantization_config, self.pre_quantized = config, True
            if run_compressed:
                compress(model, config)
        elif config.run_compressed:
            for name in tqdm(self._compressed, desc="Checking compressed layers", leave=False):
                module = model.get_submodule(name)
                try:
                    module.validate()
                except ValueError as error:
                    raise ValueError(f"{name}: {error}") from error
                module.weight.requires_grad_(False)  # transformers makes all that it loads trainable
                module.pack()
        elif self._decompress.problems:
            raise ValueError("; ".join(self._decompress.problems[:4]))
        # Saving compresses the state dict itself: our converter must not be reversed on top of that.
        model._weight_conversions = [c for c in getattr(model, "_weight_conversions", None) or [] if not _is_ours(c)]
        self._skeleton, self._compressed, self._decompress = None, {}, Decompress({})
        self._mark(model)

    def _mark(self, model: PreTrainedModel) -> None:
        model.config.quantization_config = self.quantization_config
        model.quantization_method = self.quantization_config.quant_method
        # Weights in place are ordinary floats: .half(), .to(dtype) and training work, which transformers forbids to
        # models it takes for quantized.
        model.is_quantized = any(isinstance(module, SparseLinear) for module in model.modules())
        if not model.is_quantized and hasattr(model.config, "_is_quantized"):
            del model.config._is_quantized

    # ---- saving

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True

    @property
    def is_compileable(self) -> bool:
        return True

    def get_state_dict_and_metadata(
        self, model: PreTrainedModel, *args: Any
    ) -> tuple[dict[str, Tensor] | None, dict[str, str]]:
        """The state dict as it is stored: every pruned weight compressed, on the CPU."""
        if getattr(model, "_hf_peft_config_loaded", False):  # only the adapter is saved
            return None, {}
        config = self.quantization_config
        codec = FORMATS[config.format]
        linears = make_plan(model, config, strict=False).linears
        if _would_be_merged(model, linears):
            model._weight_conversions = []
        state = _stored_state(model)
        if self._part is not None:
            state = {name: tensor for name, tensor in state.items() if self._part(name)}
            linears = {name: linear for name, linear in linears.items() if self._part(f"{name}.weight")}
        for name, linear in linears.items():
            weight = state.pop(f"{name}.weight")
            weight = offloaded_weight(linear.module, "weight") if weight.is_meta else weight
            try:
                tensors = codec.encode(weight.T if linear.transposed else weight, linear.pattern)
            except ValueError as error:
                raise ValueError(f"{name} {error}") from error
            state.update({f"{name}.{key}": tensor.cpu() for key, tensor in tensors.items()})
        if not hasattr(model, "hf_device_map"):  # transformers brings back only what it offloaded itself
            for name, tensor in state.items():
                if tensor.is_meta:
                    owner, _, key = name.rpartition(".")
                    state[name] = offloaded_weight(model.get_submodule(owner), key)
        return state, {"format": "pt"}

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | None = None) -> PreTrainedModel:
        """Weights of ordinary linears, zeros in place."""
        for name, module in list(model.named_modules()):
            if isinstance(module, SparseLinear):
                model.set_submodule(name, _dense_module(module))
        return model


class Decompress(ConversionOps):
    """The stored tensors of one module to its weight; weights that the config leaves dense pass through.

    Attributes:
        problems: what was wrong, module by module. transformers turns an error that is raised here into a line of its
            log and an exception that names nothing.
    """

    def __init__(self, compressed: dict[str, Linear]):
        self.compressed = compressed
        self.problems: list[str] = []

    def __deepcopy__(self, memo: dict) -> "Decompress":
        return self  # transformers copies converters for each parameter

    @torch.no_grad()
    def convert(
        self,
        input_dict: dict[str, Any],
        source_patterns: list[str] | None = None,
        target_patterns: list[str] | None = None,
        full_layer_name: str = "",
        model: PreTrainedModel | None = None,
        **kwargs: Any,
    ) -> dict[str, Tensor]:
        tensors = {name: value[0] if isinstance(value, list) else value for name, value in input_dict.items()}
        name = full_layer_name.removesuffix(".weight")
        linear = self.compressed.get(name)
        if linear is None:
            if set(tensors) != {"weight"}:
                raise ValueError(
                    f"{name} is dense by the checkpoint's config, but the file has {sorted(tensors)} for it."
                )
            return tensors
        try:
            weight = bitmask.decode(tensors, linear.shape, linear.pattern)
        except ValueError as error:
            self.problems.append(f"{name}: {error}")
            weight = torch.zeros(linear.shape)  # not to be used: loading fails
        weight = weight.T.contiguous() if linear.transposed else weight
        return {"weight": weight.to(linear.module.weight.dtype)}


def _stored_state(model: PreTrainedModel) -> dict[str, Tensor]:
    """The state dict, with the values on the CPU of layers that lie otherwise on their device: a device that a model
    fills has no room for all of them twice."""
    layers = {name: module for name, module in model.named_modules() if isinstance(module, SparseLinear)}
    packed = {name: module for name, module in layers.items() if module.packed}
    for module in packed.values():
        module.unpack()
    try:
        state = model.state_dict()
        for name in packed:
            state[f"{name}.weight"] = state[f"{name}.weight"].cpu()
    finally:
        for module in packed.values():
            module.pack()
    return state


def _would_be_merged(model: PreTrainedModel, names: Iterable[str]) -> bool:
    """Whether transformers joins some of these weights with others on disk (gate and up in one matrix, say).

    Compressed ones cannot be joined: such a model is stored under the names of its modules, which load as well.
    """
    conversions = getattr(model, "_weight_conversions", None)
    if conversions is None:
        conversions = get_model_conversion_mapping(model, add_legacy=False)
    reverses = [c.reverse_transform() for c in conversions if isinstance(c, WeightConverter)]
    return any(reverse.rename_source_key(f"{name}.weight")[1] for reverse in reverses for name in names)


def _is_ours(conversion: Any) -> bool:
    return any(isinstance(operation, Decompress) for operation in getattr(conversion, "operations", ()))


def compress(model: PreTrainedModel, config: SparsityConfig) -> None:
    """Replace every pruned linear by a SparseLinear, one at a time."""
    for name, linear in make_plan(model, config, strict=False).linears.items():
        weight = linear.module.weight.detach()
        sparse = SparseLinear.from_dense(weight.T if linear.transposed else weight, linear.module.bias, linear.pattern)
        sparse.transposed = linear.transposed
        model.set_submodule(name, sparse)


def needs_tokenizer(config: SparsityConfig) -> bool:
    """Whether this recipe reads calibration text."""
    reads_text = isinstance(config.dataset, str | list) and config.dataset != "self"
    return reads_text and (config.build_method().needs > Needs.NOTHING or measures_layers(config))


def load_tokenizer(config: PreTrainedConfig, **kwargs: Any) -> Any:
    """The tokenizer beside the weights of the model with this config, or None if there is none.

    `kwargs`: what the model was loaded with that concerns the hub.
    """
    source = config.name_or_path
    if not source:
        return None
    revision = getattr(config, "_commit_hash", None)
    try:
        return AutoTokenizer.from_pretrained(source, **({"revision": revision} if revision else {}) | kwargs)
    except (OSError, ValueError):
        return None


def _dense_module(sparse: SparseLinear) -> nn.Module:
    """nn.Linear, or the Conv1D that was there, with the expanded weight."""
    weight = sparse.to_dense()
    if sparse.transposed:
        module: nn.Module = Conv1D(sparse.out_features, sparse.in_features)
        module.weight = nn.Parameter(weight.T.contiguous())
    else:
        module = nn.Linear(sparse.in_features, sparse.out_features, sparse.bias is not None, device="meta")
        module.weight = nn.Parameter(weight)
    module.bias = sparse.bias
    return module
