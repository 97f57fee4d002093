"""A GPU that really has no room for a whole batch."""

import gc
import re
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from models import REAL_MODEL, REAL_TEXT, make_model, needs_real_model, token_ids

from optimum_sparse import Pruner, SparsityConfig


pytestmark = pytest.mark.gpu
SAMPLES, LENGTH = 32, 512
SIZES = dict(hidden_size=512, intermediate_size=1408, max_position_embeddings=LENGTH)


@contextmanager
def at_most(number: float) -> Iterator[None]:
    """So many bytes of the device are there for this process."""
    torch.cuda.set_per_process_memory_fraction(number / torch.cuda.get_device_properties(0).total_memory)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


@pytest.mark.parametrize("recipe", ["paper", "best"])
@pytest.mark.parametrize("real", [False, pytest.param(True, marks=needs_real_model)])
def test_the_batch_halves_itself_and_the_errors_are_the_same(real, recipe, caplog):
    tokens = REAL_TEXT if real else token_ids(SAMPLES, LENGTH)
    config = SparsityConfig.recipe(
        recipe, "2:4", dataset=tokens, num_samples=SAMPLES, sequence_length=LENGTH, batch_size=SAMPLES
    )

    def load():
        if real:
            pruner = Pruner.from_pretrained(REAL_MODEL, dtype=torch.float32, device_map="cuda")
        else:
            pruner = Pruner(make_model("llama", **SIZES).to("cuda"))
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        return pruner, torch.cuda.memory_allocated()

    roomy, base = load()
    roomy.prune(config)
    needed = torch.cuda.max_memory_allocated() - base
    assert not caplog.records
    full, base = load()
    with at_most(base + 0.5 * needed):
        full.prune(config)
    messages = [record.getMessage() for record in caplog.records]
    halved = [tuple(map(int, re.findall(r"\d+", message))) for message in messages]
    assert all(message.startswith("out of memory with") for message in messages), messages
    assert halved[0][0] <= SAMPLES
    assert all(after == (before + 1) // 2 for before, after in halved)
    # Not the same masks: sums in another order decide near ties, and what follows makes up for what was decided. In a
    # real model there are layers whose error a few tokens make.
    errors: list[tuple[float, float]] = []
    for first, second in zip(roomy.report.pruned, full.report.pruned, strict=True):
        wanted, found = ([layer.error, *(layer.block_error or ())] for layer in (first, second))
        assert second.sparsity == first.sparsity
        assert found == pytest.approx(wanted, rel=0.25 if real else 0.02), first.name
        errors.append((wanted[0], found[0]))
    wanted, found = torch.tensor(errors).mean(0).tolist()
    assert found == pytest.approx(wanted, rel=0.02)
