"""Where a transformers model keeps its decoder blocks and linears, and what its blocks are called with."""

import contextlib
import difflib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.pytorch_utils import Conv1D

from .. import ranks
from ..config import SparsityConfig, matches
from ..core import NM
from ..kernels.precision import replaced_forwards
from ..nn import Experts, SparseLinear, matrix_names
from ..pipeline import Block, Calls, Linear
from ..report import LayerReport
from .placement import execution_device, onload


@dataclass(frozen=True)
class Plan:
    """What a config means for a model: which matrices get which pattern, and why the others stay dense.

    Attributes:
        experts: by its name in the model, what stands for a fused module in which something is to be pruned. Linears
            of theirs have no data but where they are taken apart.
        shared: names of linears whose weight is that of another, too.
    """

    blocks: list[Block]
    skipped: list[LayerReport]
    experts: dict[str, Experts] = field(default_factory=dict)
    shared: frozenset[str] = frozenset()

    @property
    def linears(self) -> dict[str, Linear]:
        """By the module's name in the model at hand."""
        return {linear.name: linear for block in self.blocks for linear in block.linears}

    @property
    def dense_experts(self) -> dict[str, nn.Linear]:
        """The linears of `experts` that are not to be pruned, by name."""
        pruned = self.linears
        return {
            f"{name}.{local}": linear
            for name, experts in self.experts.items()
            for local, linear, _ in linears_of(experts)
            if f"{name}.{local}" not in pruned
        }

    @contextlib.contextmanager
    def onload(self, block: nn.Module, keep: bool = True) -> Iterator[None]:
        """`placement.onload`, and inside the fused experts of the block are taken apart."""
        fused = {experts.fused: experts for experts in self.experts.values()}
        with onload(block, keep):
            places = [
                (parent, key, fused[child])
                for parent in block.modules()
                for key, child in parent.named_children()
                if child in fused
            ]
            for parent, key, experts in places:
                experts.take()
                setattr(parent, key, experts)
            try:
                yield
            finally:
                for parent, key, experts in places:
                    setattr(parent, key, experts.give_back())

    def taken_apart(self, block: nn.Module) -> AbstractContextManager:
        """`onload`, for reading, if the block has fused experts; else nothing."""
        fused = {experts.fused for experts in self.experts.values()}
        return (
            self.onload(block, keep=False)
            if any(module in fused for module in block.modules())
            else contextlib.nullcontext()
        )


def find_blocks(model: PreTrainedModel, block_name: str | None = None) -> tuple[str, nn.ModuleList]:
    """(name, decoder blocks) of a model: the longest ModuleList of blocks under its decoder.

    Raises:
        ValueError: none is found, or `block_name` is not a ModuleList.
    """
    full = full_name(model)
    lists = {name: module for name, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    names = _some([full(name) for name in lists]) or "none"
    if block_name is not None:
        for name, module in lists.items():
            if block_name in (name, full(name)):
                return name, module
        raise ValueError(
            f"block_name={block_name!r} is not a ModuleList of {type(model).__name__}, which has {names}."
        )
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else None
    decoder = model if decoder is None else decoder
    unsplit = set(model._no_split_modules or [])

    def is_block(module: nn.Module) -> bool:
        return isinstance(module, GradientCheckpointingLayer) or type(module).__name__ in unsplit

    candidates = {name: module for name, module in lists.items() if len(module) and all(map(is_block, module))}
    inside = set(decoder.modules())  # of no block where a model calls part of its head a decoder
    candidates = {name: module for name, module in candidates.items() if module in inside} or candidates
    if not candidates:
        raise ValueError(
            f"no decoder blocks were found in {type(model).__name__}: name their ModuleList, such as "
            f"SparsityConfig(block_name='model.layers'); it has {names}."
        )
    return max(candidates.items(), key=lambda named: len(named[1]))


def _check_kind(model: PreTrainedModel) -> None:
    """Refuse what only has a causal language model in it, or none: the rest of it would stay dense."""
    text = type(model.config.get_text_config(decoder=True))
    other = text not in MODEL_FOR_CAUSAL_LM_MAPPING and model.get_output_embeddings() is None
    if getattr(model.config, "is_encoder_decoder", False) or (other and text.__module__.startswith("transformers.")):
        raise ValueError(
            f"a {type(model).__name__} is no causal language model: only what AutoModelForCausalLM loads is pruned."
        )


def make_plan(
    model: PreTrainedModel,
    config: SparsityConfig,
    strict: bool = True,
    part: Callable[[str], bool] | None = None,
    shared: frozenset[str] | None = None,
) -> Plan:
    """Decide for every matrix in the decoder blocks, before any work is done. Weights are not read (meta is fine).

    Args:
        strict: also refuse names in the config that match nothing, and matrices that cannot be pruned yet. Off when
            an existing checkpoint is loaded.
        part: of names in the model, those that matter: blocks with others are left out.
        shared: of a plan from before: once an offloaded block was brought in, its weights are no others' any more.
            None: it is looked up.

    Raises:
        ValueError: naming the modules, and the option that leaves them dense.
    """
    if strict:
        _check_kind(model)
    prefix, modules = find_blocks(model, config.block_name)
    full = full_name(model)
    if strict:
        _check_rules(model, config, full(prefix))
    if shared is None:
        owners: dict[int, list[str]] = {}
        for number, module in modules._modules.items():
            for local, child in module.named_modules(remove_duplicate=False):
                if is_linear(child):
                    owners.setdefault(id(child.weight), []).append(f"{prefix}.{number}.{local}")
        shared = frozenset(name for names in owners.values() if len(names) > 1 for name in names)
    blocks: list[Block] = []
    skipped: list[LayerReport] = []
    apart: dict[str, Experts] = {}
    unknown: list[str] = []
    widths: list[str] = []

    def choose(block: Block, name: str, child: Any, expert: nn.Module | None = None) -> str | None:
        """The linear goes into the block, or here is why not."""
        pattern = config.pattern_for(full(name))
        if isinstance(pattern, str):
            return pattern
        if name in shared:
            return "its weight is shared with another layer"
        linear = Linear(name, child, pattern, isinstance(child, Conv1D), expert)
        if isinstance(pattern, NM) and linear.shape[1] % pattern.group:
            widths.append(f"{name} has {linear.shape[1]}, pattern {pattern}")
            return f"{linear.shape[1]} inputs, pattern {pattern}"
        block.linears.append(linear)
        return None

    for number, module in modules._modules.items():
        block = Block(f"{prefix}.{number}", module, [])
        if part is not None and not part(f"{block.name}."):
            continue
        blocks.append(block)
        for local, child in module.named_modules():
            name = f"{block.name}.{local}" if local else block.name
            if is_fused(child):
                experts = Experts(child)
                left = [
                    LayerReport(f"{name}.{local}", _shape(linear), skipped=reason)
                    for local, linear, expert in linears_of(experts)
                    if (reason := choose(block, f"{name}.{local}", linear, expert)) is not None
                ]
                if len(left) < len(experts.matrices) * len(experts.members):
                    apart[name] = experts
                elif len({report.skipped for report in left}) == 1:
                    left = [LayerReport(name, _shape(child), skipped=left[0].skipped)]
                skipped += left
                continue
            reason = _not_a_linear(child)
            if reason == "":
                continue
            if reason is None:
                reason = choose(block, name, child)
                if reason is None:
                    continue
            elif _holds_experts(child, module):
                pattern = config.pattern_for(full(name))
                if isinstance(pattern, str):
                    reason = pattern
                else:
                    unknown.append(name)
            skipped.append(LayerReport(name, _shape(child), skipped=reason))
    if strict and widths:
        raise ValueError(
            "N:M patterns need input widths that are multiples of M: "
            + _some(widths)
            + ". Choose another pattern for these layers, SparsityConfig(layers={name: ...}), or leave them dense, "
            "ignore=[name]."
        )
    if strict and unknown:
        raise ValueError(
            f"{len(unknown)} modules hold fused experts of a kind that cannot be taken apart: {_some(unknown)}. To "
            "prune the rest and leave them dense, name them: "
            f"SparsityConfig(ignore=[{unknown[0].rpartition('.')[2]!r}])."
        )
    if strict and not any(block.linears for block in blocks):
        raise ValueError("nothing to prune: targets, ignore and layers leave every linear of every block dense.")
    return Plan(blocks, skipped, apart, shared)


def full_name(model: PreTrainedModel) -> Callable[[str], str]:
    """How a config calls a module of this model: a base model's "layers.0" is the full one's "model.layers.0"."""
    root = f"{model.base_model_prefix}." if model.base_model is model and model.base_model_prefix else ""
    return lambda name: root + name


def is_linear(module: nn.Module) -> bool:
    """Whether this is a linear layer that can be pruned. Subclasses (routers, adapters) have rules of their own.

    Falcon's has none: it only multiplies and adds in two steps.
    """
    return type(module) in (nn.Linear, Conv1D) or type(module).__name__ == "FalconLinear"


def is_fused(module: nn.Module) -> bool:
    """Whether this holds the experts of a layer in 3-D parameters, as transformers' `use_experts_implementation` has
    them, which says what is transposed and what has a bias."""
    return all(hasattr(module, name) for name in ("has_gate", "has_bias", "is_transposed", "down_proj"))


def module_names(model: nn.Module) -> Iterator[str]:
    """The names of all modules, and of the linears of fused experts taken apart."""
    for name, module in model.named_modules(remove_duplicate=False):
        yield name
        if is_fused(module):
            for number in range(len(module.down_proj)):
                yield from (f"{name}.{number}.{matrix}" for matrix in matrix_names(module))


def linears_of(experts: Experts) -> Iterator[tuple[str, Any, nn.Module]]:
    """(name in it, linear, expert)."""
    for number, expert in enumerate(experts.members):
        for matrix in experts.matrices:
            yield f"{number}.{matrix}", expert.get_submodule(matrix), expert


def _not_a_linear(module: nn.Module) -> str | None:
    """None for a linear that can be pruned; "" for modules without matrices; else why it cannot."""
    if is_linear(module):
        return None
    if not any(parameter.dim() > 1 for parameter in module.parameters(recurse=False)):
        return ""
    kind = type(module).__name__
    if isinstance(module, SparseLinear):
        return "already compressed"
    if isinstance(module, nn.Linear):
        return f"{kind}, a subclass of Linear with its own rules"
    return f"{kind}, not a linear"


def _holds_experts(module: nn.Module, block: nn.Module) -> bool:
    """Whether much of the block is in matrices of this module that are no linears: fused experts, mostly."""
    if isinstance(module, nn.modules.conv._ConvNd | nn.Embedding | nn.Linear):
        return False
    own = sum(parameter.numel() for parameter in module.parameters(recurse=False) if parameter.dim() > 1)
    return own > 0.1 * sum(parameter.numel() for parameter in block.parameters())


def _shape(module: nn.Module) -> list[int]:
    """[out, in] of a linear; the largest matrix of anything else."""
    shape = max((parameter.shape for parameter in module.parameters(recurse=False)), key=lambda s: (len(s), s.numel()))
    return list(reversed(shape)) if isinstance(module, Conv1D) else list(shape)


def _check_rules(model: PreTrainedModel, config: SparsityConfig, blocks: str) -> None:
    """Raise ValueError for a rule that names nothing, or that would prune what is not in `blocks`."""
    names = ["lm_head"]  # always allowed: it stays dense, and a base model has none
    names += [full_name(model)(name) for name in module_names(model) if name]
    inside = [name for name in names if name.startswith(f"{blocks}.")]
    allocated = list(config.allocation) if isinstance(config.allocation, dict) else []
    rules = [("targets", rule, True) for rule in config.targets or []]
    rules += [("ignore", rule, False) for rule in config.ignore]
    rules += [("layers", rule, pattern != "dense") for rule, pattern in config.layers.items()]
    rules += [("allocation", rule, True) for rule in allocated]
    for kind, rule, prunes in rules:
        if not any(matches(rule, name) for name in names):
            parts = dict.fromkeys(part for name in reversed(names) for part in (name, name.rpartition(".")[2]))
            close = difflib.get_close_matches(rule, parts, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"they are called like {names[len(names) // 2]!r}."
            raise ValueError(f"{kind} names {rule!r}, which matches no module of {type(model).__name__}: {hint}")
        if prunes and not any(matches(rule, name) for name in inside):
            raise ValueError(f"{kind} names {rule!r}, which is outside of {blocks}: only what is in it is pruned.")


def _some(names: list[str], limit: int = 4) -> str:
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")


class _Recorded(Exception):
    """All blocks were called: the rest of the model is not needed."""


@torch.no_grad()
def record_calls(
    model: PreTrainedModel,
    blocks: Sequence[nn.Module],
    batches: list[dict[str, Tensor]],
    hidden: Any = None,
) -> Calls:
    """What the model calls each of its blocks with on each batch, without running them.

    Every block gets its own arguments: some models give each layer its own mask and position embeddings. Arguments
    that are equal for two batches are kept once.

    Args:
        hidden: empty `Tensors` with `append`, in place of a list, for the inputs of the first block.
    """
    problem = (
        f"{type(model).__name__} did not call each of its {len(blocks)} blocks once per batch: its blocks cannot be "
        "run one at a time."
    )
    if len(set(blocks)) != len(blocks):
        raise ValueError(problem)
    returns_tuple = _returns_tuple(model, blocks, batches[0])
    hidden = [] if hidden is None else hidden
    arguments: list[list[tuple[tuple, dict[str, Any]]]] = [[] for _ in blocks]
    keep: list[Tensor | None] = []
    device = execution_device(model.get_input_embeddings())

    def recorder(index: int) -> Callable:
        def forward(*args: Any, **kwargs: Any) -> Any:
            x = args[0] if args else kwargs.pop("hidden_states")
            if index == 0:
                hidden.append(x)
            previous = arguments[index][-1] if arguments[index] else None
            other = arguments[index - 1][-1] if index and arguments[index - 1] else None
            known = [before for before in (previous, other) if before is not None]
            named = {
                name: _shared(value, [options[name] for _, options in known if name in options])
                for name, value in kwargs.items()
            }
            arguments[index].append((_shared(args[1:], [values for values, _ in known]), named))
            if index == len(blocks) - 1:
                raise _Recorded
            return (x,) + (None,) * (returns_tuple - 1) if returns_tuple else x

        return forward

    with replaced_forwards(blocks, recorder):
        for batch in ranks.progress(batches, desc="Recording", unit="batch", leave=False):
            with contextlib.suppress(_Recorded):
                model(**{name: tensor.to(device) for name, tensor in batch.items()}, use_cache=False)
            mask = batch.get("attention_mask")
            keep.append(None if mask is None or bool(mask.all()) else mask.bool())
    if len(hidden) != len(batches) or any(len(seen) != len(batches) for seen in arguments):
        raise ValueError(problem)
    holders = Counter(
        id(value)
        for of_block in arguments
        for value in (*of_block[0][0], *of_block[0][1].values())
        if _is_mutable(value)
    )
    return Calls(hidden, arguments, keep, share_state=any(count > 1 for count in holders.values()))


def _is_mutable(value: Any) -> bool:
    """Whether blocks could leave something in it for one another."""
    return isinstance(value, dict | list) or (hasattr(value, "__dict__") and not isinstance(value, Tensor | type))


def _returns_tuple(model: PreTrainedModel, blocks: Sequence[nn.Module], batch: dict[str, Tensor]) -> int:
    """The length of the tuple that block 0 returns, 0 if it returns a tensor: found by running it on a few tokens."""
    seen: list[Any] = []

    def stop(module: nn.Module, args: tuple, output: Any) -> None:
        seen.append(output)
        raise _Recorded

    handle = blocks[0].register_forward_hook(stop)
    try:
        ids = batch["input_ids"][:1, :4].to(execution_device(model.get_input_embeddings()))
        with contextlib.suppress(_Recorded):
            model(input_ids=ids, use_cache=False)
    finally:
        handle.remove()
    if not seen:
        raise ValueError(f"{type(model).__name__} never called the first of its blocks.")
    return len(seen[0]) if isinstance(seen[0], tuple) else 0


def _shared(value: Any, known: list[Any]) -> Any:
    """`value`, with every tensor that equals the one at the same place of a `known` value replaced by it.

    What blocks could write to stays the object that it is.
    """
    if isinstance(value, Tensor):
        for other in known:
            if other is value:
                return value
            if (
                isinstance(other, Tensor)
                and (other.shape, other.dtype, other.device) == (value.shape, value.dtype, value.device)
                and torch.equal(other, value)
            ):
                return other
        return value
    if isinstance(value, tuple) and type(value) is tuple:
        inner = [other for other in known if isinstance(other, tuple) and len(other) == len(value)]
        return tuple(_shared(item, [other[i] for other in inner]) for i, item in enumerate(value))
    return value
