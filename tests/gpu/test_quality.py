"""Targets, Fisher weights, allocation and reconstruction on a device: the whole of it once, on a tiny model."""

import pytest
import torch
from models import TOKENS, assert_same_weights, linears_of, make_model, token_ids
from transformers import AutoModelForCausalLM

from optimum_sparse import Pruner, SparsityConfig


pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("pattern", ["2:4", "16:32", "unstructured"])
@pytest.mark.parametrize("recipe", ["fast", "best"])
def test_recipes(recipe: str, pattern: str, dtype: torch.dtype, tmp_path):
    """Closer to the dense model than the method as published, on tokens that it has not seen; and saved as it is."""
    unseen = token_ids(8, seed=5).cuda()

    @torch.no_grad()
    def outputs(model) -> torch.Tensor:
        return model(unseen, use_cache=False).logits.double()

    dense = outputs(make_model("llama").to("cuda", dtype))
    errors = {}
    for name in ("paper", recipe):
        model = make_model("llama").to("cuda", dtype)
        config = SparsityConfig.recipe(name, pattern, dataset=token_ids(64), num_samples=64, sequence_length=TOKENS)
        Pruner.from_pretrained(model).prune(config)
        assert all(torch.isfinite(parameter).all() for parameter in model.parameters())
        errors[name] = (outputs(model) - dense).square().mean().item()
    assert errors[recipe] < 0.8 * errors["paper"]
    weights = [linear.weight for linear in linears_of(model.model).values()]
    zeros = sum(int((weight == 0).sum()) for weight in weights)
    assert zeros == pytest.approx(sum(weight.numel() for weight in weights) / 2, rel=1e-3)
    model.save_pretrained(tmp_path)
    assert_same_weights(AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype), model.cpu())
