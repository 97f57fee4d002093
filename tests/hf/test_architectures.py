"""Every architecture x method x pattern: pruned to the exact pattern, nothing else touched, round trips bit-equal."""

import pytest
import torch
from models import (
    ARCHITECTURES,
    assert_pattern,
    dense_weight,
    files_of,
    linears_of,
    logits,
    make_config,
    make_model,
    weights_of,
)
from safetensors import safe_open
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from optimum_sparse import Pruner
from optimum_sparse.hf.blocks import find_blocks
from optimum_sparse.nn import SparseLinear


METHODS = ["magnitude", "wanda", "sparsegpt"]
PATTERNS = ["2:4", "unstructured"]


def shared_with(model) -> dict[str, set[str]]:
    """{name: all names of the same parameter} of the parameters that have several."""
    places: dict[int, set[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        places.setdefault(parameter.data_ptr(), set()).add(name)
    return {name: names for names in places.values() if len(names) > 1 for name in names}


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_prune_save_load(architecture, method, pattern, tmp_path):
    model = make_model(architecture)
    before, tied = weights_of(model), shared_with(model)
    pruner = Pruner.from_pretrained(model)
    assert pruner.prune(make_config(method, pattern)) is model

    # exactly the pattern, on every linear of every block
    prefix, blocks = find_blocks(model)
    inside = {f"{prefix}.{name}": module for name, module in linears_of(blocks).items()}
    assert inside
    skipped = {layer.name: layer.skipped for layer in pruner.report.skipped}
    pruned = {layer.name for layer in pruner.report.pruned}
    for name, module in inside.items():
        assert (name in pruned) != (name in skipped), name
        if name in skipped:
            assert skipped[name]
            assert torch.equal(module.weight, before[f"{name}.weight"])
            continue
        weight = dense_weight(module)
        assert_pattern(weight, pattern)
        original = before[f"{name}.weight"].T if isinstance(module, Conv1D) else before[f"{name}.weight"]
        if method != "sparsegpt":  # these choose, and change nothing that stays
            assert torch.equal(weight[weight != 0], original[weight != 0])
    assert pruned <= set(inside)
    assert len(pruned) == len(inside), skipped  # these architectures hold no linear that is left out

    # nothing else
    changed = {name for name, tensor in weights_of(model).items() if not torch.equal(tensor, before[name])}
    assert changed == {f"{name}.weight" for name in pruned}
    assert shared_with(model) == tied
    if model.config.tie_word_embeddings:
        assert model.get_output_embeddings().weight.data_ptr() == model.get_input_embeddings().weight.data_ptr()

    # round trips
    wanted = logits(model)
    model.save_pretrained(tmp_path / "one")
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "one")
    assert torch.equal(logits(dense), wanted)
    compressed = AutoModelForCausalLM.from_pretrained(tmp_path / "one", run_compressed=True)
    sparse = {name for name, module in compressed.named_modules() if isinstance(module, SparseLinear)}
    assert sparse == pruned
    assert not sparse & {name for name, module in dense.named_modules() if isinstance(module, SparseLinear)}
    torch.testing.assert_close(logits(compressed), wanted)
    for number, again in enumerate((dense, compressed)):
        again.save_pretrained(tmp_path / f"again{number}")
        assert files_of(tmp_path / f"again{number}") == files_of(tmp_path / "one")


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize(("pattern", "share"), [("1:4", 0.25), ("4:8", 0.5), ("unstructured", 0.3)])
def test_stored_size_is_what_the_format_promises(architecture, pattern, share, tmp_path):
    model = make_model(architecture)
    pruner = Pruner.from_pretrained(model)
    pruner.prune(make_config("magnitude", pattern, sparsity=1 - share if pattern == "unstructured" else None))
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as stored:
        for layer in pruner.report.pruned:
            out_features, in_features = layer.shape
            weights = out_features * in_features
            assert stored.get_tensor(f"{layer.name}.weight").numel() == weights - round((1 - share) * weights)
            assert stored.get_tensor(f"{layer.name}.weight_mask").shape == (out_features, -(-in_features // 8))


def test_dead_inputs_lose_all_their_weights_with_sparsegpt(tmp_path):
    """OPT with relu: inputs of fc2 that are never active have no say, and a row may then hold fewer than it could."""
    model = make_model("opt", activation_function="relu")
    with torch.no_grad():
        for layer in model.model.decoder.layers:
            layer.fc1.bias[::4] = -1e4
    pruner = Pruner.from_pretrained(model)
    pruner.prune(make_config("sparsegpt"))
    for layer in model.model.decoder.layers:
        assert (layer.fc2.weight[:, ::4] == 0).all()
        assert (layer.fc2.weight.reshape(-1, 4) != 0).sum(1).max() <= 2
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(model))
    compressed = AutoModelForCausalLM.from_pretrained(tmp_path, run_compressed=True)
    torch.testing.assert_close(logits(compressed), logits(model))
