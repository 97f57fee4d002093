"""Zero-shot tasks: how often the model prefers the right continuation. From local files, or through lm-eval.

A local file has one JSON object per line, and its fields say how an item is scored. P is the sum over tokens.

    query, choices, gold ("Question: ..." )   P(choice | query + "\\nAnswer: ")      ARC, PIQA
    query, choices, gold (other queries)      P(" " + choice | query)               HellaSwag
    context_options, continuation, gold       P(" " + continuation | option)        WinoGrande
    context, continuation                     every token is the model's own first choice: LAMBADA

Context and continuation are tokenized together, and spaces at the end of a context are part of what follows, as in
lm-eval.
"""

import contextlib
import gzip
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from ..hf.placement import execution_device
from ..hf.prune import check_tokens, evaluating
from ..kernels.precision import onednn_fp32, wide_products


SUFFIXES = (".jsonl", ".jsonl.gz")


@dataclass(frozen=True)
class TaskScore:
    """A measurement.

    Attributes:
        accuracy: share of items that are right (of lm-eval: its metric, see `metric`).
        standard_error: of `accuracy`, from the spread between items; None for a single one.
        items: how many.
        metric: "acc", or what lm-eval reports for a task without it.
    """

    task: str
    accuracy: float
    standard_error: float | None
    items: int
    metric: str = "acc"

    def __str__(self) -> str:
        return f"{self.accuracy:.3f}" + ("" if self.standard_error is None else f" +- {self.standard_error:.3f}")

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class Continuation(NamedTuple):
    """Tokens, of which those from `start` on are scored."""

    ids: list[int]
    start: int


def score_tasks(
    model: PreTrainedModel,
    tokenizer: Any,
    tasks: Sequence[str],
    *,
    max_items: int | None = None,
    batch_size: int = 16,
) -> list[TaskScore]:
    """Zero-shot accuracy of a causal language model.

    Args:
        tasks: local files (.jsonl, .jsonl.gz; see above), folders of such, names that lm-eval knows, which fetches
            their data from the hub, or tasks of your own as its YAML files.
        max_items: only the first ones of each task.

    Raises:
        ValueError: a file whose lines are no items, naming the first such line; a name that lm-eval does not know.
        FileNotFoundError: a file that does not exist, or a folder without any.
        ImportError: a name, and lm-eval is not installed.
    """
    for name, number in (("max_items", max_items), ("batch_size", batch_size)):
        if number is not None and number < 1:
            raise ValueError(f"{name}={number}: must be 1 or more.")
    files, names = _files(tasks)
    read = {file: _items(file, max_items) for file in files}  # what is wrong with a file shows before any work
    scores = _through_lm_eval(model, tokenizer, names, max_items, batch_size) if names else []
    for file, items in read.items():
        right = _right(model, tokenizer, items, batch_size, file.name)
        accuracy = sum(right) / len(right)
        error = (accuracy * (1 - accuracy) / (len(right) - 1)) ** 0.5 if len(right) > 1 else None
        scores.append(TaskScore(file.name.partition(".")[0], accuracy, error, len(right)))
    return scores


def _files(tasks: Sequence[str]) -> tuple[list[Path], list[str]]:
    """(local files, names for lm-eval)."""
    files: list[Path] = []
    names: list[str] = []
    for task in tasks:
        path = Path(task)
        if path.is_dir():
            inside = sorted(file for file in path.iterdir() if file.name.endswith(SUFFIXES))
            if not inside:
                raise FileNotFoundError(f"tasks: {task!r} holds no {' or '.join(SUFFIXES)} files.")
            files += inside
        elif path.name.endswith(SUFFIXES):
            if not path.is_file():
                raise FileNotFoundError(f"tasks: no such file: {task!r}.")
            files.append(path)
        else:
            names.append(task)
    return files, names


class Item(NamedTuple):
    """`options`: (context, continuation) each; `gold`: which is right; None: the only one must be the model's own."""

    options: list[tuple[str, str]]
    gold: int | None


def _items(file: Path, max_items: int | None) -> list[Item]:
    items: list[Item] = []
    with gzip.open(file, "rt", encoding="utf-8") if file.suffix == ".gz" else file.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if max_items is not None and len(items) == max_items:
                break
            if not line.strip():
                continue
            try:
                items.append(_item(json.loads(line)))
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise ValueError(
                    f"{file}, line {number} is no item ({error!r}): it must have query, choices and gold; "
                    "context_options, continuation and gold; or context and continuation."
                ) from error
    if not items:
        raise ValueError(f"{file} holds no items.")
    return items


def _item(row: dict[str, Any]) -> Item:
    if "context" in row:
        return Item([(row["context"], f" {row['continuation']}")], None)
    if "context_options" in row:
        options = [(option, f" {row['continuation']}") for option in row["context_options"]]
    elif row["query"].startswith("Question:"):
        query = row["query"].rstrip("\n")
        options = [(f"{query}\nAnswer:", f" {choice}") for choice in row["choices"]]
    else:
        options = [(row["query"], f" {choice}") for choice in row["choices"]]
    if type(row["gold"]) is not int or not 0 <= row["gold"] < len(options):
        raise ValueError(f"gold={row['gold']!r} of {len(options)} choices")
    return Item(options, row["gold"])


def _right(model: PreTrainedModel, tokenizer: Any, items: list[Item], batch_size: int, name: str) -> list[bool]:
    """Whether the model gets each item right."""
    try:
        continuations = [_tokens(model, tokenizer, *option) for item in items for option in item.options]
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    check_tokens(model, [{"input_ids": torch.tensor([part.ids])} for part in continuations], "tokens")
    likelihood, greedy = log_likelihoods(model, continuations, batch_size=batch_size, description=name)
    right = []
    first = 0
    for item in items:
        here = slice(first, first + len(item.options))
        right.append(bool(greedy[first]) if item.gold is None else int(likelihood[here].argmax()) == item.gold)
        first = here.stop
    return right


def _tokens(model: PreTrainedModel, tokenizer: Any, context: str, continuation: str) -> Continuation:
    """The last tokens of both that the model has positions for."""
    bare = context.rstrip(" ")
    start = len(tokenizer(bare)["input_ids"])
    ids = tokenizer(context + continuation)["input_ids"]
    most = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None) or len(ids)
    cut = max(0, len(ids) - most)
    if not cut < start < len(ids):
        raise ValueError(
            f"the continuation {continuation[:40]!r} has {len(ids) - start} tokens, its context {bare[-40:]!r} "
            f"{start}: both must have at least one among the last {most}, which are all that the model can see."
        )
    return Continuation(ids[cut:], start - cut)


@torch.no_grad()
def log_likelihoods(
    model: PreTrainedModel,
    continuations: Sequence[Continuation],
    *,
    batch_size: int = 16,
    description: str = "Scoring",
) -> tuple[Tensor, Tensor]:
    """What the model gives to each continuation: (float64 [n] log-probability in nats, bool [n]: every token of it is
    the most likely one). Batches are padded on the right, which a causal model does not see."""
    likelihood = torch.zeros(len(continuations), dtype=torch.float64)
    greedy = torch.zeros(len(continuations), dtype=torch.bool)
    order = sorted(range(len(continuations)), key=lambda index: len(continuations[index].ids), reverse=True)
    device = execution_device(model.get_input_embeddings())
    with evaluating(model), onednn_fp32(), wide_products(model):
        for first in tqdm(range(0, len(order), batch_size), desc=description, unit="batch", leave=False):
            chosen = order[first : first + batch_size]
            width = len(continuations[chosen[0]].ids)
            ids = torch.tensor([continuations[i].ids + [0] * (width - len(continuations[i].ids)) for i in chosen])
            logits = model(input_ids=ids.to(device), use_cache=False).logits
            for row, index in enumerate(chosen):
                tokens, start = continuations[index]
                scores = logits[row, start - 1 : len(tokens) - 1].float().log_softmax(-1)
                wanted = torch.tensor(tokens[start:], device=scores.device)
                likelihood[index] = scores.gather(1, wanted[:, None]).double().sum()
                greedy[index] = bool((scores.argmax(-1) == wanted).all())
    return likelihood, greedy


def _through_lm_eval(
    model: PreTrainedModel, tokenizer: Any, names: list[str], max_items: int | None, batch_size: int
) -> list[TaskScore]:
    try:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise ImportError(
            f"tasks {names} are no local {' or '.join(SUFFIXES)} files, so lm-eval has to know them, which is not "
            f'installed: pip install "optimum-sparse[lm-eval]" ({error}).'
        ) from error
    manager = TaskManager()
    unknown = [name for name in names if name not in manager.all_tasks and not Path(name).is_file()]
    if unknown:
        raise ValueError(
            f"tasks {unknown}: must be local {' or '.join(SUFFIXES)} files, YAML files of lm-eval, or names that it "
            "knows, which `lm-eval ls tasks` lists."
        )
    with evaluating(model), onednn_fp32(), contextlib.redirect_stdout(sys.stderr):  # it reports on what it does
        wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
        wrapped._device = execution_device(model.get_input_embeddings())  # it took "meta" if weights are offloaded
        found = simple_evaluate(model=wrapped, tasks=names, limit=max_items, log_samples=False, task_manager=manager)
    return _scores(found)


def _scores(found: dict[str, Any]) -> list[TaskScore]:
    """Of what lm-eval's `simple_evaluate` returns: of each task one metric."""
    scores = []
    for task, metrics in found["results"].items():
        numbers = {name: value for name, value in metrics.items() if "," in name and isinstance(value, int | float)}
        values = [name for name in numbers if "_stderr," not in name]
        if not values:  # a group of tasks that reports nothing of its own
            continue
        name = "acc,none" if "acc,none" in values else values[0]
        error = numbers.get(name.replace(",", "_stderr,", 1), math.nan)
        items = found.get("n-samples", {}).get(task, {}).get("effective", 0)
        error_of = None if math.isnan(error) else float(error)
        scores.append(TaskScore(task, float(numbers[name]), error_of, int(items), name.partition(",")[0]))
    return scores
