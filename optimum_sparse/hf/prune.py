"""Prune a transformers model, in memory or offloaded: plan, calibrate, record, run the loop."""

import contextlib
import copy
import hashlib
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from torch import Tensor
from transformers import PreTrainedModel

from .. import ranks
from ..allocation import allocate
from ..calibration import calibration_batches
from ..config import DENSE, QUANT_METHOD, SparsityConfig, describe_dataset, is_texts, usual_dataset
from ..core import Needs
from ..methods import Method, Polished
from ..nn import SparseLinear
from ..pipeline import Arguments, Block, Calls, Objective, Reconstruction, Sensitivity, check_finite, prune_blocks
from ..report import LayerReport, PruningReport
from .blocks import full_name, is_linear, make_plan, module_names, record_calls
from .journal import Journal
from .placement import execution_device
from .sensitivity import fisher


@ranks.together()
@torch.inference_mode(False)
def prune_model(
    model: PreTrainedModel,
    config: SparsityConfig,
    *,
    tokenizer: Any = None,
    dataset: Any = None,
    method: Method | None = None,
    kept: Callable[[str, Callable[[], Any]], Any] | None = None,
    journal: Journal | None = None,
    save_block: Callable[[Block, SparsityConfig], list[str]] | None = None,
) -> tuple[SparsityConfig, PruningReport]:
    """Prune `model` in place.

    Several processes (`ranks`) that all call this with the same arguments share the work, and end with the same model.

    Args:
        dataset: in place of config.dataset; may also be a DataLoader.
        method: in place of the one that config.method names.
        kept: (name, compute) -> `compute()`, or what it was before: of the phases before pruning, which are "tokens",
            "sensitivity" and "allocation". They are read only.
        journal: keeps what is done, these included, and knows what an earlier run has done.
        save_block: saves a finished block, which is then dropped, following the config as it is to be stored so far;
            returns the names of the files. Goes with `journal`.

    Returns:
        The config as it is to be stored (layers that could not be pruned are "dense" in it), and the report.

    Raises:
        ValueError: among others: processes with different configs, models or data.
        OtherProcessFailed: an error in another process.
    """
    _check(model)
    check_finite(model)  # before the first block is pruned; offloaded ones when their turn comes
    # As a checkpoint stores it: data that stayed in the model's config would be copied with it, and not all can be.
    data = config.dataset if dataset is None else usual_dataset(dataset)
    described = describe_dataset(data)
    if method is not None:
        _check_method(method)
    # An object of the caller's gets what it asks for, and nothing else by default; so do masks that are polished.
    second_order = method is None and config.build_method().needs is Needs.GRAM
    method = method or config.build_method()
    name = type(method).__name__
    if ranks.world() > 1:
        recipe = {key: value for key, value in config.to_dict().items() if key != "dataset"}
        ranks.check_same(config=recipe, data=described, method=name, model=_digest(model))
    if config.refine is not None:
        method = Polished(method, config.damping)
    asked, config = config, config.resolved(second_order=second_order)
    config.allocated = {}
    has_likelihood = model.get_output_embeddings() is not None  # a base model has none
    if asked.fisher is None and not has_likelihood:
        config.fisher = False
    plan = make_plan(model, config)
    ranks.check_devices(execution_device(linear.module) for block in plan.blocks for linear in block.linears)
    linears = {name for name, module in model.named_modules() if is_linear(module)}

    def as_stored(layers: list[LayerReport]) -> SparsityConfig:
        """The config of a checkpoint: data is described, and linears that could not be pruned are dense by name."""
        stored = copy.copy(config)
        stored.dataset = described
        left_out = [layer.name for layer in layers if layer.skipped is not None and layer.name in linears]
        stored.layers = config.layers | {
            name: DENSE for name in map(full_name(model), left_out) if not isinstance(config.pattern_for(name), str)
        }
        return stored

    report = PruningReport(method=name, base_model=_hub_id(model))
    if kept is None:
        kept = _computed if journal is None else journal.kept
    before = {} if journal is None else journal.seconds

    @contextlib.contextmanager
    def phase(name: str) -> Iterator[None]:
        started = time.perf_counter()
        report.seconds[name] = before.get(name, 0.0)
        yield
        report.seconds[name] += time.perf_counter() - started

    computes = execution_device(model.get_input_embeddings()).type
    with evaluating(model), torch.autocast(computes, enabled=False):  # a caller's would change masks
        calls: Calls | None = None
        batches: list[dict[str, Tensor]] = []
        sensitivity: Sensitivity | None = None
        if method.needs > Needs.NOTHING or measures_layers(config):
            with phase("calibration data"):
                batches = kept("tokens", lambda: token_batches(model, config, data, tokenizer))
                if data == "self":
                    batches = ranks.gathered(batches)[0]  # not every device samples the same
                if method.needs is Needs.GRAM:
                    _check_amount(batches, plan.blocks)
                if ranks.world() > 1:
                    ranks.check_same(data=_digest_of(batches))
                batches, earlier = ranks.share(batches)
                hidden = None if journal is None else journal.hidden()
                calls = record_calls(model, [block.module for block in plan.blocks], batches, hidden)
                calls.record = partial(_arguments, model, plan.blocks, batches)
            _check_calls(calls, asked, config)
            if config.fisher or ((config.allocation == "error" or config.denser) and has_likelihood):
                with phase("sensitivity"):
                    saving = contextlib.nullcontext if journal is None else journal.saving
                    found = kept(
                        "sensitivity",
                        lambda: vars(
                            fisher(model, plan.blocks, batches, config.seed + earlier, plan.taken_apart, saving)
                        ),
                    )
                    sensitivity = Sensitivity(**found)
        if config.allocation != "uniform" or config.denser:
            with phase("allocation"):
                measuring = partial(plan.onload, keep=False)
                config.allocated = kept(
                    "allocation",
                    lambda: allocate(config, plan.blocks, calls, sensitivity, measuring, full_name(model)),
                )
            plan = make_plan(model, config, shared=plan.shared)
        with phase("pruning"):
            started = time.perf_counter()

            def finished(index: int, found: list[LayerReport]) -> None:
                assert journal is not None
                assert save_block is not None
                shards = save_block(plan.blocks[index], as_stored(plan.skipped + found))
                seconds = report.seconds | {"pruning": before.get("pruning", 0.0) + time.perf_counter() - started}
                journal.end_block(found, shards, calls, seconds)

            if journal is not None and calls is not None:
                journal.go_on(calls)
            layers = ([] if journal is None else list(journal.layers)) + prune_blocks(
                plan.blocks,
                calls,
                method,
                partial(plan.onload, keep=journal is None),
                objective=Objective(
                    staged=bool(config.staged),
                    input_shift=config.input_shift or 0.0,
                    residual_shift=config.residual_shift or 0.0,
                    damping=config.damping,
                    sensitivity=sensitivity if config.fisher else None,
                ),
                reconstruction=(
                    _reconstruction(model, config, plan.blocks, batches) if config.refine == "reconstruct" else None
                ),
                start=0 if journal is None else journal.start,
                finished=None if journal is None else finished,
            )
    layers += plan.skipped
    order = {name: number for number, name in enumerate(module_names(model))}
    report.layers = sorted(layers, key=lambda layer: order[layer.name])
    return as_stored(layers), report


def _hub_id(model: PreTrainedModel) -> str:
    """Where on the hub the model came from; empty if it came from elsewhere."""
    source = model.config.name_or_path or ""
    with contextlib.suppress(HFValidationError):  # a path
        validate_repo_id(source)
        return "" if Path(source).exists() else source
    return ""


def _computed(name: str, compute: Callable[[], Any]) -> Any:
    """What a journal would keep."""
    return compute()


def _digest(model: PreTrainedModel) -> str:
    """Of names, shapes, dtypes and bits of all parameters that are not offloaded, in any order of summation."""
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    found = [
        (
            name,
            tuple(parameter.shape),
            str(parameter.dtype),
            0 if parameter.is_meta else int(parameter.detach().view(bits[parameter.itemsize]).sum(dtype=torch.int64)),
        )
        for name, parameter in model.named_parameters()
    ]
    return hashlib.sha256(repr(found).encode()).hexdigest()


def _digest_of(batches: list[dict[str, Tensor]]) -> str:
    content = [(name, tensor.tolist()) for batch in batches for name, tensor in sorted(batch.items())]
    return hashlib.sha256(repr(content).encode()).hexdigest()


def measures_layers(config: SparsityConfig) -> bool:
    """Whether the recipe needs calibration data for more than its method."""
    return config.allocation in ("owl", "error") or bool(config.denser) or config.refine is not None


def _reconstruction(
    model: PreTrainedModel, config: SparsityConfig, blocks: list[Block], batches: list[dict[str, Tensor]]
) -> Reconstruction:
    size = config.reconstruction_batch_size
    return Reconstruction(
        learning_rate=config.reconstruction_learning_rate,
        passes=config.reconstruction_passes,
        samples=config.reconstruction_samples,
        seed=config.seed,
        batch_size=size,
        arguments=_arguments(model, blocks, batches, size),
    )


class _Shapes(list):
    """Of tensors appended, without their data."""

    def append(self, x: Tensor) -> None:
        super().append(x.to("meta"))


def _arguments(model: PreTrainedModel, blocks: list[Block], batches: list[dict[str, Tensor]], size: int) -> Arguments:
    """What the blocks are called with for batches of at most `size` sequences."""
    small = [
        dict(zip(batch, parts, strict=True))
        for batch in batches
        for parts in zip(*(tensor.split(size) for tensor in batch.values()), strict=True)
    ]
    return record_calls(model, [block.module for block in blocks], small, _Shapes()).arguments


def token_batches(
    model: PreTrainedModel, config: SparsityConfig, data: Any, tokenizer: Any
) -> list[dict[str, Tensor]]:
    """Token batches of `data` that fit the model."""
    if isinstance(data, str) or is_texts(data):
        _check_length(model, config.sequence_length, "sequence_length")
    batches = calibration_batches(
        data,
        tokenizer,
        num_samples=config.num_samples,
        sequence_length=config.sequence_length,
        batch_size=config.batch_size,
        seed=config.seed,
        sample=lambda samples, tokens, seed: sample_text(model, samples, tokens, seed),
    )
    check_tokens(model, batches, "sequence_length")
    return batches


@contextlib.contextmanager
def evaluating(model: PreTrainedModel) -> Iterator[None]:
    """In evaluation mode; each module gets its own mode back."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@torch.no_grad()
def sample_text(model: PreTrainedModel, samples: int, tokens: int, seed: int, batch_size: int = 32) -> Tensor:
    """int64 [samples, tokens] that the model writes itself at temperature 1, from its beginning-of-text token on.

    Models without one begin with random tokens. The model goes on after an end-of-text token, with a new document.
    """
    if not model.can_generate():
        raise ValueError(
            f"dataset='self' samples text from the model, and a {type(model).__name__} writes none: load the model "
            "with its head, as AutoModelForCausalLM, or give another dataset."
        )
    device = execution_device(model.get_input_embeddings())
    text = model.config.get_text_config(decoder=True)
    begin = text.bos_token_id if isinstance(text.bos_token_id, int) else None
    generator = torch.Generator().manual_seed(seed)
    written = []
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        for start in ranks.progress(range(0, samples, batch_size), desc="Sampling text", unit="batch", leave=False):
            count = min(batch_size, samples - start)
            first = torch.randint(text.vocab_size, (count, 1), generator=generator)
            if begin is not None:
                first = torch.full_like(first, begin)
            if tokens == 1:
                written.append(first)
                continue
            written.append(
                model.generate(
                    first.to(device),
                    attention_mask=torch.ones_like(first).to(device),
                    do_sample=True,
                    temperature=1.0,
                    top_k=0,
                    top_p=1.0,
                    repetition_penalty=1.0,
                    min_new_tokens=None,
                    max_new_tokens=tokens - 1,
                    eos_token_id=-1,  # never ends
                    pad_token_id=0,
                ).cpu()
            )
    return torch.cat(written)


def _check_method(method: Any) -> None:
    if isinstance(method, type) or not callable(getattr(method, "solve", None)):
        raise TypeError(
            f"method={method!r}: must be an object with `needs` and `solve`; a built-in one is named in the config, "
            "SparsityConfig(method='wanda')."
        )
    if not isinstance(getattr(method, "needs", None), Needs):
        raise TypeError(f"{type(method).__name__}.needs must be a member of optimum_sparse.core.Needs.")


def _check_calls(calls: Calls, asked: SparsityConfig, config: SparsityConfig) -> None:
    """Refuse, or turn off what was not asked for, where the blocks cannot be followed on two paths."""
    if config.refine == "reconstruct" and calls.hidden[0].dim() != 3:
        raise ValueError(
            f"this model's blocks work on {calls.hidden[0].dim()}-dimensional hidden states, and are not trained: use "
            "refine='pcg'."
        )
    if not calls.share_state or not (config.input_shift or config.residual_shift or config.refine == "reconstruct"):
        return
    if asked.input_shift or asked.residual_shift or config.refine == "reconstruct":
        raise ValueError(
            "this model's blocks hand state to one another (shared keys and values, say), so that they cannot be "
            "followed on the dense and the pruned path at once: set input_shift=0, residual_shift=0, and refine=None "
            "or 'pcg'."
        )
    warnings.warn(
        "this model's blocks hand state to one another, so input_shift and residual_shift are off.", stacklevel=2
    )
    config.input_shift = config.residual_shift = 0.0


def _check_amount(batches: list[dict[str, Tensor]], blocks: list[Block]) -> None:
    tokens = sum(int(batch.get("attention_mask", torch.ones_like(batch["input_ids"])).sum()) for batch in batches)
    widest = max((linear for block in blocks for linear in block.linears), key=lambda linear: linear.shape[1])
    if tokens < widest.shape[1]:
        warnings.warn(
            f"{tokens:,} calibration tokens for a layer of {widest.shape[1]:,} inputs ({widest.name}): with fewer "
            "tokens than inputs, layers are fitted to these tokens alone. Use more or longer samples; 128 x 2,048 "
            "tokens are usual.",
            stacklevel=2,
        )


def _check(model: PreTrainedModel) -> None:
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"model must be a transformers PreTrainedModel, got {type(model).__name__}.")
    wrapped = any(hasattr(module, "base_layer") for module in model.modules())  # as PEFT calls it
    if wrapped or getattr(model, "_hf_peft_config_loaded", False):
        raise ValueError("the model has adapters: merge them into its weights, or prune before adding them.")
    if any(isinstance(module, SparseLinear) for module in model.modules()):
        raise ValueError("the model holds compressed weights: load it without run_compressed=True to prune it again.")
    quantizer = getattr(model, "hf_quantizer", None)
    stored = None if quantizer is None else quantizer.quantization_config
    method = None if stored is None else stored.quant_method
    if method == QUANT_METHOD and quantizer.pre_quantized:
        warnings.warn(
            f"the model is sparse already ({stored.method}, {stored.pattern}): what is zero stays zero, and errors "
            "are relative to the model as it is. To compare patterns, prune the dense one.",
            stacklevel=2,
        )
    if method not in (None, QUANT_METHOD):
        raise ValueError(
            f"the model is quantized ({getattr(method, 'value', method)}), and transformers holds one quantizer per "
            "model: prune the original weights, or call model.dequantize() first."
        )


def check_tokens(model: PreTrainedModel, batches: list[dict[str, Tensor]], option: str) -> None:
    """Token ids of another tokenizer, or more than there are positions for, fail here, and not as an index error in
    an embedding; or not at all.

    Raises:
        ValueError: naming `option`, which says how many tokens a sequence has.
    """
    vocabulary = next(model.get_input_embeddings().parameters()).shape[0]
    low = min(int(batch["input_ids"].min()) for batch in batches)
    high = max(int(batch["input_ids"].max()) for batch in batches)
    if low < 0 or high >= vocabulary:
        raise ValueError(
            f"token ids go from {low} to {high}; the model has {vocabulary}: use the model's own tokenizer."
        )
    _check_length(model, max(batch["input_ids"].shape[1] for batch in batches), option)


def _check_length(model: PreTrainedModel, tokens: int, option: str) -> None:
    limit = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    if limit is not None and tokens > limit:
        raise ValueError(f"sequences of {tokens} tokens; the model takes {limit}: {option}={limit} or less.")
