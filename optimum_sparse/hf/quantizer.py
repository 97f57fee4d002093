"""The plug into transformers' loading and saving: prune on load, load dense or compressed, save compressed."""

import contextlib
import copy
import logging
from collections.abc import Callable, Iterable
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import ConversionOps, WeightConverter
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.base import HfQuantizer
from transformers.utils import cached_file

from .. import ranks
from ..config import SparsityConfig
from ..core import Needs
from ..formats import FORMATS, bitmask
from ..nn import Experts, SparseLinear
from ..pipeline import Linear
from ..report import PruningReport
from .blocks import Plan, linears_of, make_plan
from .checkpoint import (
    REPORT_FILE,
    check_stored,
    find_tokenizer,
    names_in_model,
    read_headers,
    read_report,
    stored_matrices,
)
from .placement import offloaded_weight, onload
from .prune import measures_layers, prune_model


logger = logging.getLogger(__name__)

# What the `from_pretrained` that runs was given for the hub (token, local_files_only ...): transformers does not tell
# its quantizers, which look for more files there.
hub_arguments: ContextVar[dict[str, Any]] = ContextVar("hub_arguments")
# Likewise of the `save_pretrained` that runs: the state dict that it was given, as FSDP and DeepSpeed need it.
given_state: ContextVar[dict[str, Tensor] | None] = ContextVar("given_state", default=None)


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
        self._plan = Plan([], [])  # of what is being loaded
        self._decompress = Decompress(self._plan)
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

    @property
    def saves_all(self) -> bool:
        """Whether the model is saved whole, and not one part of it."""
        return self._part is None

    # ---- loading

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        if getattr(model.config, "distributed_config", None) is not None:
            raise ValueError("sparse models cannot be loaded with tensor parallelism yet: use device_map instead.")
        if not self.pre_quantized:
            self.quantization_config.check()
            make_plan(model, self.quantization_config)  # what cannot be pruned shows before weights are loaded
            if needs_tokenizer(self.quantization_config):
                self._tokenizer = load_tokenizer(model.config, **hub_arguments.get({}))
            return
        if not checkpoint_files or not all(file.endswith(".safetensors") for file in checkpoint_files):
            raise ValueError(f"a sparse checkpoint is read from .safetensors files, got {checkpoint_files}.")
        self.report = read_report(Path(checkpoint_files[0]).parent) or _report_on_hub(model.config)
        self._skeleton, self._files = model, checkpoint_files
        self._plan = make_plan(model, self.quantization_config, strict=False)
        self._decompress = Decompress(self._plan)
        if self.quantization_config.run_compressed:
            for name, experts in self._plan.experts.items():
                model.set_submodule(name, experts)
                experts.keep()
            for name, linear in self._plan.linears.items():
                module, (out_features, in_features) = linear.module, linear.shape
                keeps_dense = self.quantization_config.run_compressed == "decode"
                layer = (in_features, out_features, module.bias is not None, linear.pattern, module.weight.dtype)
                sparse = SparseLinear(*layer, "meta", keeps_dense)
                sparse.transposed = linear.transposed
                model.set_submodule(name, sparse)

    def get_weight_conversions(self) -> list[WeightConverter]:
        if not self.pre_quantized or self.quantization_config.run_compressed:
            return []
        fused = {(name.rpartition(".")[2], key) for name, part in self._plan.experts.items() for key in part.matrices}
        of_experts = [
            WeightConverter(
                [*(rf"\.{owner}\.\d+\.{key}\.{suffix}$" for suffix in bitmask.SUFFIXES), rf"\.{owner}\.{key}$"],
                f".{owner}.{key}",
                [self._decompress],
            )
            for owner, key in sorted(fused)
        ]
        of_linears = WeightConverter([rf"\.{suffix}$" for suffix in bitmask.SUFFIXES], ".weight", [self._decompress])
        return [*of_experts, of_linears]

    def update_weight_conversions(self, weight_conversions: list, model: PreTrainedModel | None = None) -> list:
        if self._skeleton is not None and self._files:  # here, since only here all names on disk are known
            stored = stored_matrices(self._skeleton, weight_conversions, read_headers(self._files))
            check_stored(stored, self._plan)
            self._files = []
        # transformers would join experts that have these names.
        ours = [
            f"{name}.{local}.weight" for name, part in self._plan.experts.items() for local, _, _ in linears_of(part)
        ]
        kept = [conversion for conversion in weight_conversions if not _would_join(conversion, ours)]
        return kept + self.get_weight_conversions()

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        config = self.quantization_config
        if not self.pre_quantized:
            run_compressed = config.run_compressed
            if run_compressed:
                _check_in_memory(model, config)
            config, self.report = prune_model(model, config, tokenizer=self._tokenizer)
            self.quantization_config, self.pre_quantized = config, True
            if run_compressed:
                compress(model, config, keeps_dense=run_compressed == "decode")
        elif config.run_compressed:
            for name in ranks.progress(self._plan.linears, desc="Checking compressed layers", leave=False):
                module = model.get_submodule(name)
                offloaded = module.weight_mask.is_meta  # with offload_buffers=True
                try:
                    with onload(module, keep=False) if offloaded else contextlib.nullcontext():
                        module.validate()
                except ValueError as error:
                    raise ValueError(f"{name}: {error}") from error
                module.weight.requires_grad_(False)  # transformers makes all that it loads trainable
                module.pack()
        elif self._decompress.problems:
            raise ValueError("; ".join(self._decompress.problems[:4]))
        # Saving compresses the state dict itself: our converter must not be reversed on top of that.
        model._weight_conversions = [c for c in getattr(model, "_weight_conversions", None) or [] if not _is_ours(c)]
        self._skeleton, self._plan = None, Plan([], [])
        self._decompress = Decompress(self._plan)
        self._mark(model)

    def _mark(self, model: PreTrainedModel) -> None:
        model.config.quantization_config = self.quantization_config
        model.quantization_method = self.quantization_config.quant_method
        # Weights in place are ordinary floats: .half(), .to(dtype) and training work, which transformers forbids to
        # models it takes for quantized.
        model.is_quantized = any(isinstance(module, SparseLinear) for module in model.modules())
        if not model.is_quantized and hasattr(model.config, "_is_quantized"):
            del model.config._is_quantized
        hooks = model._load_state_dict_pre_hooks.values()
        if not any(getattr(hook, "hook", None) is decode_state for hook in hooks):
            model.register_load_state_dict_pre_hook(decode_state)

    def param_element_size(self, model: PreTrainedModel, param_name: str, param: Tensor) -> float:
        """As device_map="auto" should count it: layers take more on a GPU than on disk once they are packed."""
        owner, _, name = param_name.rpartition(".")
        module = model.get_submodule(owner)
        packed = module.growth if isinstance(module, SparseLinear) and name == "weight" else 1.0
        return packed * super().param_element_size(model, param_name, param)

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
        """The state dict as it is stored: every pruned weight compressed, on the CPU.

        Of one that `save_pretrained` was given, what is in it: processes that write nothing have nothing.
        """
        given = given_state.get()
        if getattr(model, "_hf_peft_config_loaded", False):  # only the adapter is saved
            return given, {}
        config = self.quantization_config
        codec = FORMATS[config.format]
        joins = any(isinstance(conversion, WeightConverter) for conversion in _conversions(model))
        # Names on disk depend on the whole model; once they are settled, a part's plan will do.
        plan = make_plan(model, config, strict=False, part=None if joins else self._part)
        linears = plan.linears
        settle_names(model, plan)
        state = _stored_state(model) if given is None else dict(given)
        experts = plan.experts
        if self._part is not None:
            state = {name: tensor for name, tensor in state.items() if self._part(name)}
            linears = {name: linear for name, linear in linears.items() if self._part(f"{name}.weight")}
            experts = {name: part for name, part in experts.items() if self._part(f"{name}.weight")}
        elif given is None:
            self._refuse_changed(model, linears, state)

        def put(name: str, weight: Tensor) -> None:
            """A matrix [out, in], compressed if it was pruned."""
            if name in linears:
                try:
                    tensors = codec.encode(weight, linears[name].pattern)
                except ValueError as error:
                    raise ValueError(f"{name} {error}") from error
            else:
                tensors = {"weight": weight.clone(memory_format=torch.contiguous_format)}
            state.update({f"{name}.{key}": tensor.cpu() for key, tensor in tensors.items()})

        for name, linear in linears.items():
            if linear.expert is None and f"{name}.weight" in state:
                weight = state.pop(f"{name}.weight")
                weight = offloaded_weight(linear.module, "weight") if weight.is_meta else weight
                put(name, weight.T if linear.transposed else weight)
        for name, apart in experts.items():
            for key in apart.matrices:
                if f"{name}.{key}" not in state:
                    continue
                weight = state[f"{name}.{key}"]
                weight = offloaded_weight(apart.fused, key) if weight.is_meta else weight
                state[f"{name}.{key}"] = apart.get_buffer(key)
                for number, part in enumerate(weight):
                    put(f"{name}.{number}.{key}", part.T if apart.fused.is_transposed else part)
        if not hasattr(model, "hf_device_map"):  # transformers brings back only what it offloaded itself
            for name, tensor in state.items():
                if tensor.is_meta:
                    owner, _, key = name.rpartition(".")
                    state[name] = offloaded_weight(model.get_submodule(owner), key)
        return state, {"format": "pt"}

    def _refuse_changed(self, model: PreTrainedModel, linears: dict[str, Linear], state: dict[str, Tensor]) -> None:
        """Raise ValueError for a module that was pruned and has no ordinary weight any more."""
        pruned = [] if self.report is None else [layer.name for layer in self.report.layers if layer.skipped is None]
        modules = dict(model.named_modules())
        for name in pruned:
            module = modules.get(name)  # None: layers may be cut off
            stored = isinstance(module, SparseLinear) or (name in linears and f"{name}.weight" in state)
            if module is not None and not stored:
                raise ValueError(
                    f"{name} was pruned, and as it is now ({type(module).__name__}) it cannot be stored: before "
                    "saving, take off what replaced its weight (torch.nn.utils.parametrize.remove_parametrizations, "
                    "torch.nn.utils.prune.remove), or call model.dequantize() to store it dense."
                )

    def dequantize(self, model: PreTrainedModel, dtype: torch.dtype | None = None) -> PreTrainedModel:
        """Weights of ordinary linears, zeros in place.

        Args:
            dtype: of all parameters. None: they stay in theirs (transformers' own takes that of the config, which is
                another one after `model.half()`).
        """
        self._dequantize(model, dtype)
        self.remove_quantization_config(model)
        return model

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | None = None) -> PreTrainedModel:
        layers = [module for module in model.modules() if isinstance(module, SparseLinear)]
        needed = [module.weight for module in layers] if dtype is None else model.parameters()
        if any(weight.is_meta for weight in needed):
            raise ValueError(
                "weights are offloaded, and only those in memory can be dequantized"
                + (": " if dtype is None else f" or become {dtype}: ")
                + "load the model with dtype=, without run_compressed=True, or with a device_map that offloads none."
            )
        for name, module in list(model.named_modules()):
            if isinstance(module, SparseLinear):
                model.set_submodule(name, _dense_module(module))
        for name, module in list(model.named_modules()):
            if isinstance(module, Experts):
                model.set_submodule(name, module.give_back())
        for parameter in model.parameters() if dtype is not None else ():
            parameter.data = parameter.data.to(dtype)
        return model


class Decompress(ConversionOps):
    """The stored tensors of one module to its weight, of all experts of a layer to their fused parameter; what the
    config leaves dense passes through.

    Attributes:
        problems: what was wrong, module by module. transformers turns an error that is raised here into a line of its
            log and an exception that names nothing.
    """

    def __init__(self, plan: Plan):
        self.compressed = plan.linears
        self.experts = plan.experts
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
        owner, _, key = full_layer_name.rpartition(".")
        if owner in self.experts and key in self.experts[owner].matrices:
            return {full_layer_name: self._join(owner, key, input_dict)}
        tensors = {
            pattern[len(r"\.") : -len("$")]: value[0] if isinstance(value, list) else value
            for pattern, value in input_dict.items()
        }
        if owner not in self.compressed:
            if len(tensors) != 1 or not tensors.keys().isdisjoint(bitmask.SUFFIXES[:-1]):
                raise ValueError(
                    f"{owner} is dense by the checkpoint's config, but the file has {sorted(tensors)} for it."
                )
            return {full_layer_name: next(iter(tensors.values()))}
        linear = self.compressed[owner]
        weight = self.decode(owner, tensors)
        weight = weight.T.contiguous() if linear.transposed else weight
        return {full_layer_name: weight.to(linear.module.weight.dtype)}

    def decode(self, name: str, tensors: dict[str, Tensor]) -> Tensor:
        linear = self.compressed[name]
        try:
            return bitmask.decode(tensors, linear.shape, linear.pattern)
        except ValueError as error:
            self.problems.append(f"{name}: {error}")
            return torch.zeros(linear.shape)  # not to be used: loading fails

    def _join(self, owner: str, key: str, input_dict: dict[str, Any]) -> Tensor:
        """[experts, out, in], or [experts, in, out], from lists in the order of the experts."""
        experts = self.experts[owner]
        weights: list[Tensor] = []
        left = {
            suffix: iter(tensors)
            for suffix in bitmask.SUFFIXES
            for pattern, tensors in input_dict.items()
            if pattern.endswith(f"{suffix}$")
        }
        for number in range(len(experts.members)):
            name = f"{owner}.{number}.{key}"
            linear = self.compressed.get(name)
            wanted = ["weight"] if linear is None else list(bitmask.layout(linear.shape, linear.pattern))
            tensors = {suffix: next(left[suffix]) for suffix in wanted}
            weights.append(tensors["weight"] if linear is None else self.decode(name, tensors))
        if any(True for rest in left.values() for _ in rest):
            self.problems.append(f"{owner}: the file has more experts than {len(weights)} for {key}")
        dtype = experts.fused.get_parameter(key).dtype
        return torch.stack([part.T if experts.fused.is_transposed else part for part in weights]).to(dtype)


@torch.no_grad()
def decode_state(model: PreTrainedModel, state: dict[str, Tensor], prefix: str, *args: Any) -> None:
    """A hook of load_state_dict, for weights that are dense in memory and compressed in `state`: Trainer reads its
    checkpoints past `from_pretrained`.

    Raises:
        ValueError: a matrix that cannot be decoded, naming it.
    """
    quantizer = getattr(model, "hf_quantizer", None)
    if not isinstance(quantizer, SparsityQuantizer) or not any(name.endswith(".weight_mask") for name in state):
        return
    plan = make_plan(model, quantizer.quantization_config, strict=False)
    decompress = Decompress(plan)

    def weight_of(name: str) -> Tensor | None:
        """[out, in], of a linear or an expert's; None if `state` does not have it."""
        names = {suffix: f"{prefix}{name}.{suffix}" for suffix in bitmask.SUFFIXES}
        tensors = {suffix: state.pop(stored) for suffix, stored in names.items() if stored in state}
        return decompress.decode(name, tensors) if "weight_mask" in tensors else tensors.get("weight")

    for name, linear in plan.linears.items():
        stored = linear.expert is None and f"{prefix}{name}.weight_mask" in state
        if stored and (weight := weight_of(name)) is not None:
            state[f"{prefix}{name}.weight"] = weight.T if linear.transposed else weight
    for owner, experts in plan.experts.items():
        for key in experts.matrices:
            members = [weight_of(f"{owner}.{number}.{key}") for number in range(len(experts.members))]
            found = [weight for weight in members if weight is not None]
            if len(found) == len(members):
                stack = torch.stack(found)
                state[f"{prefix}{owner}.{key}"] = stack.mT if experts.fused.is_transposed else stack
    if decompress.problems:
        raise ValueError("; ".join(decompress.problems[:4]))


def _stored_state(model: PreTrainedModel) -> dict[str, Tensor]:
    """The state dict, with the values on the CPU of layers that lie otherwise on their device: a device that a model
    fills has no room for all of them twice. The model itself is only read: others may be using it."""

    def to_cpu(module: nn.Module, state: dict[str, Tensor], prefix: str, local_metadata: object) -> None:
        state[f"{prefix}weight"] = state[f"{prefix}weight"].cpu()

    packed = [module for module in model.modules() if isinstance(module, SparseLinear) and module.packed]
    hooks = [module.register_state_dict_post_hook(to_cpu) for module in packed]
    try:
        return model.state_dict()
    finally:
        for hook in hooks:
            hook.remove()


def settle_names(model: PreTrainedModel, plan: Plan) -> None:
    """Choose the names on disk, by the whole model: all of it is stored under those of its modules if transformers
    would join some of the pruned weights."""
    if _would_be_merged(model, plan):
        renamings = [c for c in _conversions(model) if not isinstance(c, WeightConverter)]
        again = names_in_model(model, renamings, model.state_dict())
        # Where loading would rename modules too, their names on disk have to be those of before.
        renames = any(name != again.get(name) for name in model.state_dict())
        model._weight_conversions = renamings if renames else []


def _would_be_merged(model: PreTrainedModel, plan: Plan) -> bool:
    """Whether transformers joins some of the pruned weights with others on disk, or splits them (gate and up).

    Compressed ones cannot be joined or split: such a model is stored under the names of its modules, which load as
    well.
    """
    names = [f"{name}.weight" for name in plan.linears]
    apart = plan.experts | {name: part for name, part in model.named_modules() if isinstance(part, Experts)}
    names += [f"{name}.{key}" for name, experts in apart.items() for key in experts.matrices]
    reverses = [c.reverse_transform() for c in _conversions(model) if isinstance(c, WeightConverter)]
    return any(_would_join(reverse, names) for reverse in reverses)


def _conversions(model: PreTrainedModel) -> list[Any]:
    """What transformers does to the names and weights of this model's files."""
    conversions = getattr(model, "_weight_conversions", None)
    return get_model_conversion_mapping(model, add_legacy=False) if conversions is None else conversions


def _would_join(conversion: Any, names: Iterable[str]) -> bool:
    """Whether this conversion does more than rename one of these tensors."""
    conversion = copy.deepcopy(conversion)  # it notes its use
    return isinstance(conversion, WeightConverter) and any(conversion.rename_source_key(name)[1] for name in names)


def _is_ours(conversion: Any) -> bool:
    return any(isinstance(operation, Decompress) for operation in getattr(conversion, "operations", ()))


def _check_in_memory(model: PreTrainedModel, config: SparsityConfig) -> None:
    """Raise ValueError if `compress` would meet weights that are offloaded."""
    offloaded = [
        block.name
        for block in make_plan(model, config).blocks
        if block.linears and any(parameter.is_meta for parameter in block.module.parameters())
    ]
    if offloaded:
        raise ValueError(
            f"run_compressed= compresses weights in memory, and those of {', '.join(offloaded[:4])} are "
            "offloaded: prune without run_compressed=True and save the model; what was saved can be loaded compressed "
            "and offloaded."
        )


def compress(model: PreTrainedModel, config: SparsityConfig, keeps_dense: bool = False) -> None:
    """Replace every pruned linear by a SparseLinear, one at a time."""
    plan = make_plan(model, config, strict=False)
    for name, experts in plan.experts.items():
        experts.take()
        model.set_submodule(name, experts)
    for name, linear in plan.linears.items():
        weight, bias = linear.module.weight.detach(), linear.module.bias
        weight = weight.T if linear.transposed else weight
        sparse = SparseLinear.from_dense(weight, bias, linear.pattern, keeps_dense)
        sparse.transposed = linear.transposed
        model.set_submodule(name, sparse)
    for experts in plan.experts.values():
        experts.keep()


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
    return find_tokenizer(source, **({"revision": revision} if revision else {}) | kwargs)


def _report_on_hub(config: PreTrainedConfig) -> PruningReport | None:
    """The report in the repository that a model came from: transformers itself fetches only weights."""
    if not config.name_or_path or Path(config.name_or_path).is_dir():
        return None
    options = hub_arguments.get({}) | {"revision": getattr(config, "_commit_hash", None)}
    try:
        path = cached_file(config.name_or_path, REPORT_FILE, **options)
    except (OSError, ValueError):
        return None
    return None if path is None else read_report(Path(path).parent)


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
