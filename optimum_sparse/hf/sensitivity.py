"""What the likelihood feels of an error in each linear's output: one backward pass over the calibration data."""

import contextlib
import logging
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop
from transformers import PreTrainedModel

from .. import ranks
from ..kernels.precision import fast_forward, replaced_forwards, wide_products
from ..pipeline import SMALLER, Block, Sensitivity, is_out_of_memory, not_finite
from .placement import execution_device


logger = logging.getLogger(__name__)

SCALE = 256.0  # of gradients on their way back: small ones would vanish in fp16
LOGITS = {"cuda": 2**29, "cpu": 2**27}  # numbers at a time: 2 GB, 0.5 GB, and a few copies


def fisher(
    model: PreTrainedModel,
    blocks: list[Block],
    batches: list[dict[str, Tensor]],
    seed: int,
    onload: Callable[[nn.Module], AbstractContextManager] = contextlib.nullcontext,
    saving: Callable[[], AbstractContextManager] = contextlib.nullcontext,
) -> Sensitivity:
    """Squared gradients of the dense model's own log-likelihood (Fisher information), by linear and by block.

    Labels are sampled from the model, as the definition wants it. Blocks are recomputed in the backward pass, which so
    holds the inputs of all blocks and the activations of one, for a few sequences at a time; the result is one number
    per token for every linear and block.

    Args:
        batches: what the model is called with; `tokens` of the result follows them. Of several processes each has its
            own, and `rows` of the result are means over all.
        seed: of the labels of the first sequence; each further one's is larger by 1.
        onload: context around each forward pass of a block.
        saving: context in which the inputs of a block are saved for the backward pass.

    Raises:
        ValueError: a model without a head; logits or gradients that are not finite.
    """
    if model.get_output_embeddings() is None:
        raise ValueError(
            f"a {type(model).__name__} has no head, and so no likelihood to be sensitive to: load the model as "
            "AutoModelForCausalLM, or leave fisher, allocation='error' and denser out."
        )
    device = execution_device(model.get_input_embeddings())
    sequence = 0
    size = max(len(batch["input_ids"]) for batch in batches)
    tokens: dict[str, list[list[Tensor]]] = defaultdict(lambda: [[] for _ in batches])
    rows: dict[str, Tensor] = {}
    current = 0

    def record(name: str, by_row: bool, gradient: Tensor) -> None:
        squares = gradient.detach().float().square().flatten(0, -2)
        tokens[name][current].append(squares.sum(1) / SCALE**2)
        if by_row:
            rows[name] = rows.get(name, 0) + squares.sum(0) / SCALE**2

    def hook(name: str, by_row: bool) -> Callable:
        def watch(module: nn.Module, args: tuple, output: Any) -> None:
            y = output[0] if isinstance(output, tuple) else output
            if y.requires_grad:
                y.register_hook(partial(record, name, by_row))

        return watch

    def differentiate(part: dict[str, Tensor], seeds: range) -> None:
        with torch.enable_grad(), fast_forward(torch.empty(0, dtype=model.dtype, device=device)), wide_products(model):
            logits = model(**part, use_cache=False).logits[:, :-1].flatten(0, 1)
        mask = part["attention_mask"].bool() if "attention_mask" in part else None
        real = None if mask is None else (mask[:, 1:] & mask[:, :-1]).flatten()
        if not torch.isfinite(logits).all():
            raise ValueError(not_finite(_first_not_finite(model, blocks, part), model.dtype))
        with _determinism_restored():
            _backward(logits, real, seeds)

    with contextlib.ExitStack() as stack:
        stack.enter_context(_only_activations(model))
        stack.enter_context(set_checkpoint_early_stop(False))  # or offloaded weights stay where they were brought
        stack.enter_context(replaced_forwards([block.module for block in blocks], _recomputed(blocks, onload, saving)))
        for block in blocks:
            stack.callback(block.module.register_forward_hook(hook(block.name, False)).remove)
            for linear in block.linears:
                stack.callback(linear.module.register_forward_hook(hook(linear.name, True)).remove)
        for number, batch in enumerate(ranks.progress(batches, desc="Sensitivity", unit="batch", leave=False)):
            current = number
            first = 0
            size = min(size, _sequences(model, batch, device))
            while first < len(batch["input_ids"]):
                part = {name: tensor[first : first + size].to(device) for name, tensor in batch.items()}
                count = len(part["input_ids"])
                done, rows_done = {name: len(parts[current]) for name, parts in tokens.items()}, dict(rows)
                try:
                    differentiate(part, range(seed + sequence, seed + sequence + count))
                except (RuntimeError, MemoryError) as error:
                    if not is_out_of_memory(error):
                        raise
                    failed = error.with_traceback(None)  # its frames hold the tensors that are too many
                else:
                    first, sequence = first + count, sequence + count
                    continue
                if count == 1:
                    raise torch.OutOfMemoryError(
                        f"the backward pass of a single sequence does not fit into memory: {SMALLER} fisher=False "
                        "needs none."
                    ) from failed
                size = (count + 1) // 2
                logger.warning("out of memory with %d sequences at a time: going on with %d.", count, size)
                for name, parts in tokens.items():  # what the failed pass left
                    del parts[current][done.get(name, 0) :]
                rows.clear()
                rows.update(rows_done)
                torch.cuda.empty_cache()
    if not tokens:
        raise ValueError(f"no gradient reached the blocks of {type(model).__name__}: set fisher=False.")
    total = sum(ranks.gathered(sum(batch["input_ids"].numel() for batch in batches)))
    names = [part.name for block in blocks for part in (block, *block.linears)]
    for name in names:
        if not all(torch.isfinite(part).all() for parts in tokens[name] for part in parts):
            raise ValueError(
                f"gradients at {name} leave the range of {model.dtype}: load the model in bfloat16 or float32, or set "
                "fisher=False."
            )
    felt = set().union(*ranks.gathered(set(rows)))
    for linear in (linear for block in blocks for linear in block.linears if linear.name in felt):
        if linear.name not in rows:  # an expert that only other processes' tokens reached
            rows[linear.name] = torch.zeros(linear.shape[0], device=execution_device(linear.module))
        ranks.total(rows[linear.name])
    nothing = torch.zeros(0, device=device)  # for experts that no token reached
    return Sensitivity(
        {name: [torch.cat(parts) if parts else nothing for parts in tokens[name]] for name in names},
        {name: value / total for name, value in rows.items()},
    )


@torch.no_grad()
def _first_not_finite(model: PreTrainedModel, blocks: list[Block], part: dict[str, Tensor]) -> str:
    """What holds NaN or infinity first as the model runs, in words."""
    found: list[str] = []

    def watch(name: str, module: nn.Module, args: tuple, output: Any) -> None:
        for kind, x in (("inputs", args[0] if args else None), ("outputs", output)):
            if isinstance(x, Tensor) and not torch.isfinite(x).all():
                found.append(f"the {kind} of {name}")

    with contextlib.ExitStack() as stack:
        for linear in (linear for block in blocks for linear in block.linears):
            stack.callback(linear.module.register_forward_hook(partial(watch, linear.name)).remove)
        model(**part, use_cache=False)
    return found[0] if found else "the logits"


def _backward(logits: Tensor, real: Tensor | None, seeds: range) -> None:
    """Of the log-likelihood of labels that the model itself draws for logits [sequences * tokens, vocabulary].

    Each sequence has a seed of its own, so that batches do not matter.
    """
    with torch.no_grad():
        probabilities = torch.softmax(logits.float(), -1)
        draws = [
            torch.multinomial(part, 1, generator=torch.Generator(part.device).manual_seed(number))[:, 0]
            for part, number in zip(probabilities.chunk(len(seeds)), seeds, strict=True)
        ]
        labels = torch.cat(draws)
        probabilities.scatter_add_(1, labels[:, None], -torch.ones_like(labels[:, None], dtype=torch.float32))
        if real is not None:
            probabilities *= real.to(probabilities.device)[:, None]
    logits.backward((SCALE * probabilities).to(logits.dtype))  # the gradient of cross entropy is p - onehot(label)


def _sequences(model: PreTrainedModel, batch: dict[str, Tensor], device: torch.device) -> int:
    """How many sequences of the batch have logits that fit into memory, at least 1."""
    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    return max(1, LOGITS.get(device.type, LOGITS["cpu"]) // (batch["input_ids"].shape[1] * vocabulary))


def _recomputed(blocks: list[Block], onload: Callable, saving: Callable) -> Callable[[int], Callable]:
    """Forward passes that keep nothing for the backward pass but their inputs."""
    forwards = [block.module.forward for block in blocks]

    def make(index: int) -> Callable:
        def onloaded(*args: Any, **kwargs: Any) -> Any:
            hidden = args[0] if args else kwargs["hidden_states"]
            # The second pass needs the first one's arithmetic, to the bit: a router may choose by the last of them.
            block = blocks[index].module
            with onload(block), fast_forward(hidden), wide_products(block), _RepeatableAttention():
                return forwards[index](*args, **kwargs)

        def forward(*args: Any, **kwargs: Any) -> Any:
            with saving():
                return checkpoint(onloaded, *args, use_reentrant=False, **kwargs)

        return forward

    return make


class _RepeatableAttention(TorchFunctionMode):
    """Inside, `scaled_dot_product_attention` on CUDA has a backward pass that gives the same bits every time.

    By default it adds up in any order, and pruning carries a difference in the last bits of a gradient on to one mask
    bit in ten. PyTorch's switch for this is on during that one step only: it refuses others, every linear layer among
    them. cuDNN's attention does not know it, and is not taken.
    """

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        if func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs or {})
        with _without_cudnn():
            output = func(*args, **kwargs or {})
        step = output.grad_fn
        while step is not None and step.name().startswith(("Slice", "Alias")):  # what was padded is cut off again
            step = step.next_functions[0][0]
        if step is not None and step.name().startswith(("ScaledDotProductFlash", "ScaledDotProductEfficient")):
            mode = torch.get_deterministic_debug_mode()
            step.register_prehook(lambda *_: torch.set_deterministic_debug_mode("error"))
            step.register_hook(lambda *_: torch.set_deterministic_debug_mode(mode))
        return output


@contextlib.contextmanager
def _without_cudnn() -> Iterator[None]:
    """Attention by another of the kernels that are enabled, if one is."""
    of = torch.backends.cuda
    enabled = of.cudnn_sdp_enabled()
    of.enable_cudnn_sdp(
        enabled and not (of.flash_sdp_enabled() or of.mem_efficient_sdp_enabled() or of.math_sdp_enabled())
    )
    try:
        yield
    finally:
        of.enable_cudnn_sdp(enabled)


@contextlib.contextmanager
def _determinism_restored() -> Iterator[None]:
    """Should a backward pass end inside attention, PyTorch's switch is left as it was before."""
    mode = torch.get_deterministic_debug_mode()
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode(mode)


@contextlib.contextmanager
def _only_activations(model: PreTrainedModel) -> Iterator[None]:
    """Gradients reach activations from the embedding on, and no parameter."""
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    hook = model.get_input_embeddings().register_forward_hook(lambda module, args, output: output.requires_grad_())
    try:
        for name in trained:
            model.get_parameter(name).requires_grad_(False)
        yield
    finally:
        hook.remove()
        for name in trained:  # by name: offloading replaces parameters
            model.get_parameter(name).requires_grad_(True)
