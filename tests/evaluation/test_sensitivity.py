"""Losses of one matrix at a time: against pruning just that one; and what an allocation makes of them."""

import math

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from models import SAMPLES, TOKENS, assert_same_weights, make_model, token_ids, weights_of

from optimum_sparse import Pruner, SparsityConfig
from optimum_sparse.core import NM, Unstructured
from optimum_sparse.evaluation import LossIncrease, measure_sensitivity, perplexity, plot_sensitivity


DATA = dict(dataset=token_ids(), num_samples=SAMPLES, sequence_length=TOKENS)
PATTERNS = [Unstructured(0.3), Unstructured(0.7), NM(2, 4)]


def config(**changes) -> SparsityConfig:
    return SparsityConfig(**{"method": "sparsegpt", "pattern": "unstructured"} | DATA | changes)


def loss(model) -> float:
    return math.log(perplexity(model, None, token_ids(8, seed=5)).perplexity)


def test_by_perplexity_is_pruning_that_one_alone():
    model = make_model("llama")
    dense = {name: tensor.clone() for name, tensor in weights_of(model).items()}
    found = measure_sensitivity(model, config(), PATTERNS, loss)
    assert_same_weights(model, dense)
    for name in ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"):
        paper = SparsityConfig.recipe("paper", "2:4", method="sparsegpt", targets=[name], **DATA)
        alone = Pruner.from_pretrained(make_model("llama")).prune(paper)
        assert found.layers[name][2] == pytest.approx(loss(alone) - loss(model), abs=1e-5)


def test_a_pattern_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="multiples of M"):
        measure_sensitivity(make_model("llama"), config(), [NM(3, 5)])


@pytest.mark.parametrize("sparsity", [0.2, 0.8])
def test_an_allocation_outside_of_what_was_measured_is_refused(sparsity):
    found = LossIncrease("error", ["unstructured 0.3", "unstructured 0.7"], {"a": [1.0, 2.0]}, {}, {"a": 4})
    with pytest.raises(ValueError, match=rf"an allocation of {sparsity} needs .* there are 0\.3, 0\.7"):
        found.allocation(sparsity)


def test_by_error_is_what_the_likelihood_feels():
    """Rises with sparsity, adds up to blocks, and leaves the model as it was."""
    model = make_model("llama")
    dense = {name: tensor.clone() for name, tensor in weights_of(model).items()}
    found = measure_sensitivity(model, config(), PATTERNS)
    assert_same_weights(model, dense)
    assert len(found.layers) == 14
    assert all(0 < low < high for low, high, _ in found.layers.values())
    for block, values in found.blocks.items():
        parts = [losses for name, losses in found.layers.items() if name.startswith(f"{block}.")]
        assert values == pytest.approx([sum(column) for column in zip(*parts, strict=True)])


def test_a_fused_expert_is_one_matrix():
    by_error = measure_sensitivity(make_model("mixtral"), config(), [NM(2, 4)])
    model = make_model("mixtral")
    dense = {name: tensor.clone() for name, tensor in weights_of(model).items()}
    by_perplexity = measure_sensitivity(model, config(), [NM(2, 4)], loss)
    assert_same_weights(model, dense)
    assert by_error.layers.keys() == by_perplexity.layers.keys()
    for name in ("model.layers.0.mlp.experts.1.gate_up_proj", "model.layers.1.mlp.experts.0.down_proj"):
        paper = SparsityConfig.recipe("paper", "2:4", method="sparsegpt", targets=[name], **DATA)
        alone = Pruner.from_pretrained(make_model("mixtral")).prune(paper)
        assert by_perplexity.layers[name][0] == pytest.approx(loss(alone) - loss(model), abs=1e-5)


@pytest.mark.parametrize("offload", [cpu_offload, disk_offload])
def test_an_offloaded_model_gives_the_same_by_perplexity(offload, tmp_path):
    model = make_model("llama")
    expected = measure_sensitivity(model, config(), PATTERNS, loss)
    before = loss(model)
    offloaded = offload(model, *([tmp_path] if offload is disk_offload else []), execution_device=torch.device("cpu"))
    found = measure_sensitivity(offloaded, config(), PATTERNS, loss)
    assert (found.layers, found.blocks) == (expected.layers, expected.blocks)
    assert loss(offloaded) == before


def test_its_allocation_is_taken_by_a_config(tmp_path):
    found = measure_sensitivity(make_model("llama"), config(), PATTERNS)
    found.save(tmp_path / "sensitivity.json")
    assert LossIncrease.load(tmp_path / "sensitivity.json") == found
    chosen = found.allocation(0.5)
    assert sum(chosen[n] * found.sizes[n] for n in chosen) / sum(found.sizes.values()) == pytest.approx(0.5)
    assert len({round(value, 4) for value in chosen.values()}) > 2
    recipe = config(method="magnitude", sparsity=0.5, allocation=chosen)
    model = Pruner.from_pretrained(make_model("llama")).prune(recipe)
    for name, sparsity in chosen.items():
        assert (model.get_parameter(f"{name}.weight") == 0).float().mean().item() == pytest.approx(sparsity, abs=1e-3)
    with pytest.raises(ValueError, match="two unstructured sparsities"):
        LossIncrease("error", ["2:4"], {"a": [1.0]}, {}, {"a": 4}).allocation(0.5)


def test_gains_are_noise_and_the_table_begins_with_blocks(caplog):
    found = LossIncrease(
        "perplexity",
        ["unstructured 0.3", "unstructured 0.7"],
        {"m.0.a": [-0.1, -0.2], "m.0.b": [0.1, 2.0]},
        {"m.0": [0.0, 1.8]},
        {"m.0.a": 10, "m.0.b": 10},
    )
    assert found.allocation(0.5) == pytest.approx({"m.0.a": 0.7, "m.0.b": 0.3}, abs=5e-3)
    assert "1 of 2 matrices cost nothing at a sparsity of 0.7, or less" in caplog.text
    assert [line.split()[0] for line in str(found).splitlines()] == ["loss", "m.0", "m.0.b", "m.0.a"]


def test_a_picture(tmp_path):
    pytest.importorskip("matplotlib")
    plot_sensitivity(measure_sensitivity(make_model("llama"), config(), PATTERNS), tmp_path / "map.svg")
    assert "self_attn.q_proj" in (tmp_path / "map.svg").read_text()
