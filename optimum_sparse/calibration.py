"""Text to token batches: documents packed end to end and cut into full windows, never padded, always seeded."""

import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import ranks
from .config import IN_MEMORY, is_texts, is_token_ids


# name -> (dataset, subset, files of one split or None for the whole split). One file of C4 is more than enough.
HUB_NAMES: dict[str, tuple[str, str | None, dict[str, str] | None]] = {
    "c4": (
        "allenai/c4",
        None,
        {
            "train": "en/c4-train.00000-of-01024.json.gz",
            "test": "en/c4-validation.00000-of-00008.json.gz",  # it has no test split
        },
    ),
    "wikitext2": ("Salesforce/wikitext", "wikitext-2-raw-v1", None),
}
READERS = {".json": "json", ".jsonl": "json", ".parquet": "parquet"}
TEXTS = (".txt", ".raw")
FILES = "a .txt, .jsonl or .parquet file"

Tokenizer = Any  # a transformers tokenizer; this room does not import transformers


def calibration_batches(
    dataset: Any,
    tokenizer: Tokenizer | None,
    *,
    num_samples: int,
    sequence_length: int,
    batch_size: int,
    seed: int,
    sample: Callable[[int, int, int], Tensor] | None = None,
) -> list[dict[str, Tensor]]:
    """Batches of `input_ids` int64 [batch, tokens], ready to be passed to a model.

    Args:
        dataset: what SparsityConfig.dataset allows; besides, any iterable of batches (a DataLoader): dicts with
            `input_ids` and perhaps `attention_mask`, or tensors of token ids. They are taken as they are, until they
            hold `num_samples` rows.
        tokenizer: not needed for token ids and for "self".
        sample: (samples, tokens, seed) -> token ids int64 [samples, tokens], how the model itself samples text.

    Raises:
        ValueError: too few tokens, saying how many there are; unreadable data.
    """
    if isinstance(dataset, Tensor):
        if not is_token_ids(dataset):
            raise ValueError(
                f"token ids must be integers [samples, tokens], got {list(dataset.shape)} {dataset.dtype}."
            )
        ids = dataset[:num_samples, :sequence_length]
        _enough(
            ids.numel(),
            num_samples,
            sequence_length,
            f"the tensor of token ids {list(dataset.shape)}, cut to {list(ids.shape)},",
        )
    elif dataset == "self":
        if sample is None:
            raise ValueError("dataset='self' samples text from a model, and there is none here.")
        ids = sample(num_samples, sequence_length, seed)
    elif isinstance(dataset, str) or is_texts(dataset):
        documents = load_documents(dataset, "train", seed)
        ids = pack(documents, _required(tokenizer), num_samples, sequence_length, called(dataset))
    else:
        return _given_batches(dataset, num_samples)
    return [{"input_ids": batch} for batch in ids.long().split(batch_size)]


def load_documents(dataset: str | list[str], split: str, seed: int | None = None) -> Iterator[str]:
    """The texts of a dataset name, a local file or a list; shuffled if there is a seed, else in order."""
    if isinstance(dataset, list):
        order = list(dataset)
        if seed is not None:
            random.Random(seed).shuffle(order)
        yield from order
        return
    path = Path(dataset)
    if path.suffix in TEXTS:
        if not path.is_file():
            raise FileNotFoundError(f"dataset={dataset!r}: there is no such file.")
        try:
            with path.open(encoding="utf-8", newline=None if path.suffix == ".txt" else "\n") as lines:
                if path.suffix == ".txt":  # one document
                    yield lines.read()
                else:  # WikiText's own files: a row per line; the hub has "" for blank ones
                    yield from (line if line.strip() else "" for line in lines)
        except UnicodeDecodeError as error:
            raise ValueError(f"dataset={dataset!r}: must be text in UTF-8: {error}.") from error
        return
    for row in _open_dataset(dataset, split, seed):
        texts = [value for key, value in row.items() if key == "text"] or [
            v for v in row.values() if isinstance(v, str)
        ]
        if len(texts) != 1 or not isinstance(texts[0], str):
            raise ValueError(
                f"{dataset}: needs a column 'text', or exactly one column of strings; it has {list(row)}."
            )
        if texts[0].strip() or seed is None:
            yield texts[0]


def is_file_name(dataset: str) -> bool:
    """Whether a dataset is a local file by its name, there or not."""
    return Path(dataset).suffix in TEXTS or _kind(dataset) is not None


def _kind(dataset: str) -> str | None:
    """What reads a file that has rows."""
    name = dataset.removesuffix(".gz")
    return next((kind for suffix, kind in READERS.items() if name.endswith(suffix)), None)


def _open_dataset(dataset: str, split: str, seed: int | None) -> Iterable[dict[str, Any]]:
    path = Path(dataset)
    kind = _kind(dataset)
    if kind is not None and not path.is_file():
        raise FileNotFoundError(f"dataset={dataset!r}: there is no such file.")
    if kind is None and dataset not in HUB_NAMES and path.exists():
        raise ValueError(f"dataset={dataset!r}: must be {FILES}.")
    if dataset.startswith(IN_MEMORY):
        raise ValueError(
            f"dataset={dataset!r}: this recipe was made with data that was in memory, of which only this is known: "
            "give the data again, dataset=."
        )
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise ImportError(
            f"reading {dataset!r} needs the package `datasets`: pip install 'optimum-sparse[datasets]'. Without it, "
            "use a .txt file, a list of texts, token ids, or dataset='self'."
        ) from error
    if kind is not None:
        try:
            rows = load_dataset(kind, data_files=str(path), split="train")
        except Exception as error:  # of many kinds, a RuntimeError for an empty file
            reason = f"{type(error.__cause__ or error).__name__}: {error.__cause__ or error}"
            raise ValueError(f"dataset={dataset!r} cannot be read as {kind}, or is empty ({reason}).") from error
        return rows if seed is None else rows.shuffle(seed=seed)
    name, _, subset = dataset.partition(":")
    name, subset_, files = HUB_NAMES.get(name, (name, subset or None, None))
    chosen = {split: files[split]} if files else None
    try:
        rows = load_dataset(name, subset_, data_files=chosen, split=split, streaming=True)
        return rows if seed is None else rows.shuffle(seed=seed, buffer_size=10_000)
    except Exception as error:
        raise ValueError(
            f"dataset={dataset!r} could not be opened on the hub ({type(error).__name__}: {error}). Check the name "
            f"and the network; without one, give {FILES}, or for calibration 'self': text that the model samples."
        ) from error


def pack(
    documents: Iterable[str], tokenizer: Tokenizer, num_samples: int, sequence_length: int, source: str
) -> Tensor:
    """int64 [num_samples, sequence_length]: documents end to end, an end-of-text token after each."""
    needed = num_samples * sequence_length
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    tokens: list[int] = []
    with ranks.progress(total=needed, desc="Tokenizing", unit="token", leave=False) as bar:
        for text in documents:
            ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
            tokens += ids + end
            bar.update(len(ids) + len(end))
            if len(tokens) >= needed:
                break
    _enough(len(tokens), num_samples, sequence_length, source)
    return torch.tensor(tokens[:needed]).view(num_samples, sequence_length)


def _enough(tokens: int, num_samples: int, sequence_length: int, source: str) -> None:
    if tokens < num_samples * sequence_length:
        raise ValueError(
            f"{source} has {tokens:,} tokens; num_samples={num_samples} x sequence_length={sequence_length} needs "
            f"{num_samples * sequence_length:,}: give more text, or lower one of them."
        )


def _given_batches(batches: Iterable[Any], num_samples: int) -> list[dict[str, Tensor]]:
    taken: list[dict[str, Tensor]] = []
    rows = 0
    for batch in [batches] if isinstance(batches, Mapping) else batches:
        content = batch if isinstance(batch, Mapping) else {"input_ids": batch}
        content = {name: content[name] for name in ("input_ids", "attention_mask") if name in content}
        ids, mask = content.get("input_ids"), content.get("attention_mask")
        if not is_token_ids(ids):
            raise ValueError(
                f"a batch must be integer token ids [batch, tokens], or a dict with such `input_ids`, got a "
                f"{type(batch).__name__}; texts must be a list of strings."
            )
        if "attention_mask" in content and (not isinstance(mask, Tensor) or mask.shape != ids.shape):
            raise ValueError(f"attention_mask must be a tensor of the shape of input_ids, {list(ids.shape)}.")
        if mask is not None and not ((mask == 0) | (mask == 1)).all():
            raise ValueError("attention_mask must be 1 for tokens and 0 for padding, and holds other numbers.")
        taken.append({name: tensor[: num_samples - rows] for name, tensor in content.items()})
        rows += len(ids)
        if rows >= num_samples:
            break
    if not taken:
        raise ValueError("the calibration data has no batches.")
    if not any(batch.get("attention_mask", batch["input_ids"].new_ones(1)).any() for batch in taken):
        raise ValueError("the attention_mask of the calibration data is 0 everywhere: no token is left to learn from.")
    return taken


def _required(tokenizer: Tokenizer | None) -> Tokenizer:
    if tokenizer is None:
        raise ValueError(
            "calibration text needs a tokenizer, and none that can be loaded is beside the model: save one there, "
            "pass `tokenizer=` to `Pruner.from_pretrained`, or give token ids or 'self' as the dataset."
        )
    return tokenizer


def called(dataset: str | list[str]) -> str:
    """In an error."""
    return repr(dataset) if isinstance(dataset, str) else f"the list of {len(dataset)} texts"
