"""Perplexity against its definition, on a tiny model."""

import json
import math

import pytest
import torch
from transformers import AutoModelForCausalLM

from optimum_sparse.evaluation import perplexity


@pytest.fixture(scope="module")
def model(tiny_llama):
    return AutoModelForCausalLM.from_pretrained(tiny_llama)


def by_hand(model, ids):
    """float64: exp of the mean of -log p(token | all before it in its window)."""
    losses = []
    for window in ids:
        logits = model(window[None]).logits[0].double()
        losses += [
            -torch.log_softmax(logits[position], -1)[window[position + 1]] for position in range(len(window) - 1)
        ]
    return math.exp(torch.stack(losses).mean().item())


def test_is_the_exponential_of_the_mean_loss(model):
    ids = torch.randint(3, 200, (3, 17), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = by_hand(model, ids)
    assert perplexity(model, None, ids).perplexity == pytest.approx(expected, rel=1e-5)


def test_batches_do_not_change_it(model):
    ids = torch.randint(3, 200, (5, 17), generator=torch.Generator().manual_seed(1))
    one, many = perplexity(model, None, ids, batch_size=1), perplexity(model, None, ids, batch_size=3)
    assert many.perplexity == pytest.approx(one.perplexity, rel=1e-5)
    assert many.standard_error == pytest.approx(one.standard_error, rel=1e-3)


def test_texts_are_joined_by_blank_lines_and_cut_into_full_windows(model, tokenizer):
    texts = ["w3 w4 w5 w6", "w7 w8 w9", "w10 w11 w12"]
    ids = tokenizer("\n\n".join(texts), return_tensors="pt")["input_ids"][0][:8].view(2, 4)
    result = perplexity(model, tokenizer, texts, window=4)
    assert result.perplexity == pytest.approx(perplexity(model, None, ids).perplexity)
    assert (result.windows, result.window) == (2, 4)


def test_wikitext_raw_file_is_read_like_the_hub_rows(model, tokenizer, tmp_path):
    lines = [" \n", " w3 w4 w5 \n", " \n", " w6 w7 w8 w9 \n"]
    (tmp_path / "wiki.test.raw").write_text("".join(lines))
    rows = ["", " w3 w4 w5 \n", "", " w6 w7 w8 w9 \n"]
    from_file = perplexity(model, tokenizer, str(tmp_path / "wiki.test.raw"), window=3)
    from_rows = perplexity(model, tokenizer, rows, window=3)
    assert (from_file.perplexity, from_file.windows) == (from_rows.perplexity, from_rows.windows)


def test_max_windows_takes_the_first(model):
    ids = torch.randint(3, 200, (5, 9), generator=torch.Generator().manual_seed(2))
    assert perplexity(model, None, ids, max_windows=2).perplexity == perplexity(model, None, ids[:2]).perplexity


def test_standard_error_is_of_the_mean_between_windows(model):
    ids = torch.randint(3, 200, (6, 33), generator=torch.Generator().manual_seed(3))
    losses = torch.tensor([math.log(perplexity(model, None, window[None]).perplexity) for window in ids])
    result = perplexity(model, None, ids)
    assert result.standard_error == pytest.approx(result.perplexity * (losses.std() / math.sqrt(6)).item(), rel=1e-3)


def test_one_window_has_no_standard_error(model):
    one = perplexity(model, None, torch.arange(3, 30)[None])
    assert one.standard_error is None
    assert "+-" not in str(one)
    json.loads(json.dumps(one.to_dict(), allow_nan=False))


def test_too_short_a_text_says_how_long_it_is(model, tokenizer):
    with pytest.raises(ValueError, match=r"3 tokens.*window=8"):
        perplexity(model, tokenizer, ["w3 w4 w5"], window=8)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (torch.full((1, 8), 200), "token ids go from 200 to 200; the model has 200"),
        (torch.full((1, 65), 5), "65 tokens; the model takes 64: window=64 or less"),
        (torch.full((4, 1), 5), r"token ids must be integers \[windows, 2 or more\], got \[4, 1\]"),
        (torch.zeros(0, 8, dtype=torch.int64), r"got \[0, 8\]"),
        (torch.zeros(2, 8), "got .* torch.float32"),
        (["w3 w4 w5"], "needs the model's tokenizer"),
    ],
)
def test_what_the_model_cannot_read_is_refused(ids, message, model):
    with pytest.raises(ValueError, match=message):
        perplexity(model, None, ids, window=2)


def test_a_single_window_has_no_error(model):
    assert str(perplexity(model, None, torch.full((1, 8), 5))).endswith(" (1 window of 8 tokens)")


def test_training_mode_is_given_back(model):
    model.train()
    perplexity(model, None, torch.randint(3, 200, (1, 9)))
    assert model.training
    model.eval()
