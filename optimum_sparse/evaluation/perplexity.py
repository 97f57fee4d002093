"""Perplexity: exp of the mean negative log-likelihood per token, over non-overlapping windows of a text."""

import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from ..calibration import called, load_documents
from ..config import is_token_ids
from ..hf.placement import execution_device
from ..hf.prune import check_tokens, evaluating
from ..kernels.precision import onednn_fp32, wide_products


@dataclass(frozen=True)
class Perplexity:
    """A measurement.

    Attributes:
        perplexity: exp(mean negative log-likelihood per predicted token).
        standard_error: of `perplexity`, from the spread between windows; None for a single one.
        windows, window: how many windows of how many tokens. The first token of a window is not predicted.
        seconds: for the forward passes.
    """

    perplexity: float
    standard_error: float | None
    windows: int
    window: int
    seconds: float

    def __str__(self) -> str:
        error = "" if self.standard_error is None else f" +- {self.standard_error:.2f}"
        windows = "window" if self.windows == 1 else "windows"
        return f"{self.perplexity:.2f}{error} ({self.windows} {windows} of {self.window} tokens)"

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@torch.no_grad()
def perplexity(
    model: PreTrainedModel,
    tokenizer: Any,
    dataset: str | list[str] | Tensor = "wikitext2",
    *,
    window: int = 2048,
    max_windows: int | None = None,
    batch_size: int = 1,
) -> Perplexity:
    """Perplexity of a causal language model on a text, as the pruning literature measures it.

    Args:
        dataset: "wikitext2" (its test split, from the hub), another hub name, a local .txt or .jsonl file, WikiText's
            own wiki.test.raw, a list of texts, or token ids [windows, tokens]. Texts are joined by blank lines.
        window: tokens per window; what is left at the end is not used. Ignored for token ids.
        max_windows: only the first ones.

    Raises:
        ValueError: the text is shorter than one window, saying how long it is; a window that predicts nothing, or is
            longer than the model takes; token ids that it does not have.
    """
    for name, number, least in (("window", window, 2), ("max_windows", max_windows, 1), ("batch_size", batch_size, 1)):
        if number is not None and number < least:
            raise ValueError(f"{name}={number}: must be {least} or more.")
    ids = dataset if isinstance(dataset, Tensor) else _windows(dataset, tokenizer, window, max_windows)
    if not is_token_ids(ids) or ids.shape[1] < 2:
        raise ValueError(f"token ids must be integers [windows, 2 or more], got {list(ids.shape)} {ids.dtype}.")
    ids = ids[:max_windows].long()
    check_tokens(model, [{"input_ids": ids}], "window")
    device = execution_device(model.get_input_embeddings())
    started = time.perf_counter()
    losses = []
    with evaluating(model), onednn_fp32(), wide_products(model):
        for batch in tqdm(ids.split(batch_size), desc="Perplexity", unit="batch"):
            losses.append(_window_losses(model, batch.to(device)).double().cpu())
    loss = torch.cat(losses)
    value = math.exp(loss.mean().item())
    error = value * (loss.std() / len(loss) ** 0.5).item() if len(loss) > 1 else None
    return Perplexity(value, error, len(loss), ids.shape[1], time.perf_counter() - started)


def _windows(dataset: str | list[str], tokenizer: Any, window: int, max_windows: int | None) -> Tensor:
    """The text's tokens as int64 [windows, window]; no more of it is read than `max_windows` need."""
    if tokenizer is None:
        raise ValueError("a text needs the model's tokenizer: give it, or token ids [windows, tokens].")
    documents = load_documents(dataset, "test")
    enough = math.inf if max_windows is None else window * max_windows
    pieces: list[str] = []
    tokens = torch.empty(0, dtype=torch.int64)
    for piece in _chunks(documents, 8 * enough):
        pieces.append(piece)
        tokens = tokenizer("\n\n".join(pieces), return_tensors="pt", verbose=False)["input_ids"][0]
        if len(tokens) > enough:  # one token beyond, since the last one may go on in the text that was not read
            break
    if len(tokens) < window:
        raise ValueError(
            f"{called(dataset)} has {len(tokens)} tokens, less than one window={window}: give more text, or lower it."
        )
    return tokens[: len(tokens) // window * window].view(-1, window)


def _chunks(documents: Iterator[str], characters: float) -> Iterator[str]:
    """The documents, joined by blank lines to pieces of at least `characters`."""
    piece: list[str] = []
    size = 0
    for document in documents:
        piece.append(document)
        size += len(document)
        if size >= characters:
            yield "\n\n".join(piece)
            piece, size = [], 0
    if piece:
        yield "\n\n".join(piece)


def _window_losses(model: PreTrainedModel, ids: Tensor, chunk: int = 1024) -> Tensor:
    """Mean negative log-likelihood of each window of ids [windows, tokens]: fp32 [windows].

    They are made fp32 in chunks of tokens: all at once would be the largest tensor of the run.
    """
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    targets = ids[:, 1:].to(logits.device)
    total = torch.zeros(len(ids), device=logits.device)
    for start in range(0, targets.shape[1], chunk):
        part, target = logits[:, start : start + chunk].float(), targets[:, start : start + chunk]
        total += F.cross_entropy(part.flatten(0, 1), target.flatten(), reduction="none").view_as(target).sum(1)
    return total / targets.shape[1]
