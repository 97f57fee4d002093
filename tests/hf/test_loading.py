"""Ways to prune on load, to load what was pruned, and to save it again."""

import copy
import json
import re
import shutil
from inspect import getattr_static

import pytest
import torch
import transformers
from models import (
    assert_pattern,
    assert_same_logits,
    assert_same_weights,
    files_of,
    logits,
    make_config,
    make_model,
    run_python,
    sha256,
    stored_tensors,
    token_ids,
    weights_of,
)
from safetensors.torch import load_file
from torch.nn.utils.parametrize import register_parametrization
from torch.nn.utils.prune import custom_from_mask
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LlamaForCausalLM,
    PreTrainedModel,
)
from transformers.models.llama import modeling_llama

import optimum_sparse
from optimum_sparse import Pruner, SparseModelForCausalLM, SparsityConfig
from optimum_sparse.hf.checkpoint import export_dense, inspect
from optimum_sparse.nn import SparseLinear
from optimum_sparse.nn import linear as sparse_linear


MODES = [False, True]  # run_compressed
PATTERNS = ["2:4", "unstructured"]


def sparse_layers(model) -> set[str]:
    return {name for name, module in model.named_modules() if isinstance(module, SparseLinear)}


# ---- pruning on load

ON_LOAD = {
    "sparsity_config": lambda path, config: AutoModelForCausalLM.from_pretrained(path, sparsity_config=config),
    "quantization_config": lambda path, config: AutoModelForCausalLM.from_pretrained(path, quantization_config=config),
    "native class": lambda path, config: LlamaForCausalLM.from_pretrained(path, sparsity_config=config),
    "native class, quantization_config": lambda path, config: LlamaForCausalLM.from_pretrained(
        path, quantization_config=config
    ),
    "SparseModelForCausalLM": lambda path, config: SparseModelForCausalLM.from_pretrained(
        path, sparsity_config=config
    ),
    "by position": lambda path, config: SparseModelForCausalLM.from_pretrained(path, config),
    "device_map cpu": lambda path, config: AutoModelForCausalLM.from_pretrained(
        path, sparsity_config=config, device_map="cpu"
    ),
    "device_map auto": lambda path, config: AutoModelForCausalLM.from_pretrained(
        path, sparsity_config=config, device_map="auto"
    ),
    "device_map by module": lambda path, config: AutoModelForCausalLM.from_pretrained(
        path, quantization_config=config, device_map={"": "cpu"}
    ),
    "path object": lambda path, config: AutoModelForCausalLM.from_pretrained(type(path)(path), sparsity_config=config),
}


@pytest.fixture(scope="module")
def pruned_explicitly(tiny_llama):
    return {
        method: Pruner.from_pretrained(tiny_llama).prune(make_config(method)) for method in ("magnitude", "sparsegpt")
    }


@pytest.mark.parametrize("way", ON_LOAD)
@pytest.mark.parametrize("method", ["magnitude", "sparsegpt"])
def test_all_ways_of_pruning_give_the_same_model(method, way, tiny_llama, pruned_explicitly, tmp_path):
    model = ON_LOAD[way](tiny_llama, make_config(method))
    assert type(model) is LlamaForCausalLM
    if torch.cuda.is_available() and "auto" in way:
        pytest.skip("other kernels, other rounding")
    assert_same_weights(model, pruned_explicitly[method])
    assert_pattern(model.model.layers[1].mlp.down_proj.weight, "2:4")
    assert len(model.hf_quantizer.report.pruned) == 14
    model.save_pretrained(tmp_path / "a")
    pruned_explicitly[method].save_pretrained(tmp_path / "b")
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


@pytest.mark.parametrize("argument", ["sparsity_config", "quantization_config"])
def test_config_as_a_dict(argument, tiny_llama):
    config = {"method": "magnitude", "pattern": "2:4", "ignore": ["o_proj"]}
    if argument == "quantization_config":
        config["quant_method"] = "sparsity"
    given = copy.deepcopy(config)
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, **{argument: config})
    wanted = Pruner.from_pretrained(tiny_llama).prune(make_config("magnitude", ignore=["o_proj"]))
    assert_same_weights(model, wanted)
    assert config == given


def test_calibration_text_uses_the_tokenizer_beside_the_model(tiny_llama):
    ids = token_ids(4, 16)
    text = [" ".join(f"w{token}" for token in ids.flatten().tolist())]
    config = make_config("wanda", dataset=text, num_samples=4, sequence_length=16)
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, sparsity_config=config)
    wanted = Pruner.from_pretrained(tiny_llama).prune(
        make_config("wanda", dataset=ids, num_samples=4, sequence_length=16)
    )
    assert_same_weights(model, wanted)


def test_packed_layers_are_saved_as_they_were_loaded(tiny_llama, tmp_path, monkeypatch):
    """What CUDA devices do to unstructured layers, here: packed on load, in order on disk, packed again."""
    config = make_config("magnitude", "unstructured")
    AutoModelForCausalLM.from_pretrained(tiny_llama, sparsity_config=config, dtype=torch.bfloat16).save_pretrained(
        tmp_path / "one"
    )
    monkeypatch.setattr(sparse_linear, "wanted_layout", lambda device, dtype, pattern, shape: "slots")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "one", run_compressed=True)
    layers = [module for module in model.modules() if isinstance(module, SparseLinear)]
    assert layers
    assert all(layer.packed for layer in layers)
    before = logits(model)
    model.save_pretrained(tmp_path / "two")
    assert files_of(tmp_path / "one") == files_of(tmp_path / "two")
    assert all(layer.packed for layer in layers)
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_dense_weights_beside_compressed_ones(pattern, tiny_llama, sparse_checkpoints, tmp_path):
    """run_compressed="decode": loaded or pruned on load; what is saved is what True saves."""
    dense = AutoModelForCausalLM.from_pretrained(sparse_checkpoints[pattern])
    config = make_config("magnitude", pattern)
    many = token_ids(2, 24)
    for path, how in ((sparse_checkpoints[pattern], {}), (tiny_llama, {"sparsity_config": config})):
        model = AutoModelForCausalLM.from_pretrained(path, run_compressed="decode", **how)
        layers = {name: module for name, module in model.named_modules() if isinstance(module, SparseLinear)}
        assert len(layers) == 14
        assert all(torch.equal(layer.dense, dense.get_submodule(name).weight) for name, layer in layers.items())
        assert torch.equal(model(many).logits, dense(many).logits)
        model.save_pretrained(tmp_path / "saved")
        written = (tmp_path / "saved" / "model.safetensors").read_bytes()
        assert written == (sparse_checkpoints[pattern] / "model.safetensors").read_bytes()
        assert not any("dense" in name for name in model.state_dict())


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_compressed_model_runs_outside_of_no_grad(pattern, tiny_llama, sparse_checkpoints):
    """transformers makes every parameter that it loads trainable; compressed ones are not."""
    config = make_config("magnitude", pattern)
    for model in (
        AutoModelForCausalLM.from_pretrained(sparse_checkpoints[pattern], run_compressed=True),
        AutoModelForCausalLM.from_pretrained(tiny_llama, sparsity_config=config, run_compressed=True),
    ):
        layers = [module for module in model.modules() if isinstance(module, SparseLinear)]
        assert layers
        assert not any(layer.weight.requires_grad for layer in layers)
        model(torch.arange(9)[None]).logits.sum().backward()
        assert model.get_input_embeddings().weight.grad.any()


def test_the_callers_config_is_not_changed(tiny_llama, sparse_checkpoints):
    config = make_config("magnitude")
    before = copy.deepcopy(config.to_dict())
    AutoModelForCausalLM.from_pretrained(tiny_llama, sparsity_config=config, run_compressed=True)
    assert config.to_dict() == before
    assert config.run_compressed is False
    model = Pruner.from_pretrained(tiny_llama).prune(config)
    assert config.to_dict() == before
    config.ignore.append("q_proj")  # for the next model
    config.layers["mlp"] = "dense"
    assert model.config.quantization_config.ignore == before["ignore"]
    assert model.config.quantization_config.layers == before["layers"]


@pytest.mark.parametrize("owner", [AutoModelForCausalLM, LlamaForCausalLM, SparseModelForCausalLM])
def test_two_configs_are_refused(owner, tiny_llama):
    config = make_config("magnitude")
    with pytest.raises(ValueError, match="either quantization_config or sparsity_config"):
        owner.from_pretrained(tiny_llama, sparsity_config=config, quantization_config=config)


@pytest.mark.parametrize("wrong", ["2:4", 0.5, ["magnitude"]])
def test_configs_of_another_type_are_refused(wrong, tiny_llama):
    with pytest.raises(TypeError, match=f"SparsityConfig or a dict, got {type(wrong).__name__}"):
        AutoModelForCausalLM.from_pretrained(tiny_llama, sparsity_config=wrong)


@pytest.mark.parametrize("argument", ["sparsity_config", "quantization_config"])
def test_unknown_keys_of_a_dict_are_refused(argument, tiny_llama):
    config = {"method": "magnitude", "patern": "2:4", "quant_method": "sparsity"}
    with pytest.raises(ValueError, match=r"unknown key 'patern'.*did you mean 'pattern'"):
        AutoModelForCausalLM.from_pretrained(tiny_llama, **{argument: config})


@pytest.mark.parametrize("owner", [AutoModelForCausalLM, LlamaForCausalLM, SparseModelForCausalLM, AutoModel])
def test_run_compressed_of_a_dense_checkpoint_is_an_error(owner, tiny_llama):
    with pytest.raises(ValueError, match="run_compressed=True loads a sparse checkpoint; this one is dense"):
        owner.from_pretrained(tiny_llama, run_compressed=True)


def test_run_compressed_false_of_a_dense_checkpoint_changes_nothing(tiny_llama):
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, run_compressed=False)
    assert not hasattr(model, "hf_quantizer")
    with pytest.raises(ValueError, match="run_compressed='no': must be True or False, or 'decode'"):
        AutoModelForCausalLM.from_pretrained(tiny_llama, run_compressed="no")


@pytest.mark.parametrize("change", [dict(targets=["nothing"]), dict(pattern="5:7"), dict(ignore=["model.layers"])])
def test_what_cannot_be_pruned_is_refused_before_weights_are_loaded(change, tiny_llama, tmp_path):
    shutil.copytree(tiny_llama, tmp_path, dirs_exist_ok=True)
    (tmp_path / "model.safetensors").write_bytes(b"never read")
    with pytest.raises(ValueError, match=r"matches no module|multiples of M|nothing to prune"):
        AutoModelForCausalLM.from_pretrained(tmp_path, sparsity_config=SparsityConfig(dataset="self", **change))


@pytest.mark.parametrize("method", ["magnitude", "sparsegpt"])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_prune_on_load_and_run_compressed(method, pattern, tiny_llama, tmp_path):
    config = make_config(method, pattern)
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, sparsity_config=config, run_compressed=True)
    dense = AutoModelForCausalLM.from_pretrained(tiny_llama, sparsity_config=config)
    assert len(sparse_layers(model)) == 14
    torch.testing.assert_close(logits(model), logits(dense))
    model.save_pretrained(tmp_path / "a")
    dense.save_pretrained(tmp_path / "b")
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_a_config_that_asks_for_run_compressed(tiny_llama, tmp_path):
    config = make_config("magnitude", run_compressed=True)
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, quantization_config=config)
    assert len(sparse_layers(model)) == 14
    model.save_pretrained(tmp_path)
    assert "run_compressed" not in json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert not sparse_layers(AutoModelForCausalLM.from_pretrained(tmp_path))


def test_a_sparse_checkpoint_can_be_pruned_further(sparse_checkpoints, tmp_path):
    model = Pruner.from_pretrained(sparse_checkpoints["2:4"]).prune(make_config("magnitude", "1:4"))
    assert_pattern(model.model.layers[0].mlp.up_proj.weight, "1:4")
    model.save_pretrained(tmp_path)
    assert_same_weights(AutoModelForCausalLM.from_pretrained(tmp_path), model)


def test_a_sparse_checkpoint_is_not_pruned_on_load(sparse_checkpoints):
    """transformers lets the checkpoint's own config win, and says so; our own argument is refused."""
    path, config = sparse_checkpoints["2:4"], make_config("magnitude", "1:4")
    with pytest.raises(ValueError, match=r"sparse already \(magnitude, 2:4\).*prune it again"):
        AutoModelForCausalLM.from_pretrained(path, sparsity_config=config)
    with pytest.warns(UserWarning, match="quantization_config` from the model will be used"):
        model = AutoModelForCausalLM.from_pretrained(path, quantization_config=config)
    assert_same_weights(model, AutoModelForCausalLM.from_pretrained(path))
    assert model.hf_quantizer.quantization_config.pattern == "2:4"


def test_pruning_a_compressed_model_is_refused(sparse_checkpoints):
    model = AutoModelForCausalLM.from_pretrained(sparse_checkpoints["2:4"], run_compressed=True)
    with pytest.raises(ValueError, match="compressed weights: load it without run_compressed=True"):
        Pruner.from_pretrained(model).prune(make_config("magnitude"))


# ---- loading sparse checkpoints

RULES = {
    "plain": {},
    "ignore": {"ignore": ["model.layers.0"]},
    "dense": {"layers": {"model.layers.1.mlp": "dense"}},
    "mixed": {"layers": {"model.layers.1.mlp": "1:4", "model.layers.0.self_attn.o_proj": 0.7}},
    "regex": {"targets": [r"re:model\.layers\.\d+\.mlp\..*"]},
    "block_name": {"block_name": "model.layers", "ignore": ["model.layers.0.mlp"]},
}


@pytest.mark.parametrize("run_compressed", MODES)
@pytest.mark.parametrize("rules", RULES)
def test_models_without_the_head_get_the_pruned_weights(rules, run_compressed, tiny_llama, tmp_path):
    pruned = Pruner.from_pretrained(tiny_llama).prune(make_config("magnitude", **RULES[rules]))
    pruned.save_pretrained(tmp_path)
    with torch.no_grad():
        wanted = pruned.model(token_ids(2, 10)).last_hidden_state

    base, info = AutoModel.from_pretrained(tmp_path, run_compressed=run_compressed, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["mismatched_keys"]
    with torch.no_grad():
        torch.testing.assert_close(base(token_ids(2, 10)).last_hidden_state, wanted)
    if not run_compressed:
        assert_same_weights(base, pruned.model)

    classifier = AutoModelForSequenceClassification.from_pretrained(
        tmp_path, run_compressed=run_compressed, num_labels=3
    )
    with torch.no_grad():
        torch.testing.assert_close(classifier.model(token_ids(2, 10)).last_hidden_state, wanted)
    if not run_compressed:
        assert_same_weights(classifier.model, pruned.model)

    names = {layer.name.removeprefix("model.") for layer in pruned.hf_quantizer.report.pruned}
    assert sparse_layers(base) == (names if run_compressed else set())
    assert sparse_layers(classifier) == ({f"model.{name}" for name in names} if run_compressed else set())

    # a base model that is saved loads again, with and without the head's prefix
    base.save_pretrained(tmp_path / "base")
    again = AutoModel.from_pretrained(tmp_path / "base")
    assert_same_weights(again, pruned.model)
    assert_same_weights(AutoModelForCausalLM.from_pretrained(tmp_path / "base").model, pruned.model)


@pytest.mark.parametrize("rules", [rules for rules in RULES if rules != "plain"])
def test_a_base_model_is_pruned_by_the_names_of_the_whole_model(rules, tiny_llama):
    config = make_config("magnitude", **RULES[rules])
    base = AutoModel.from_pretrained(tiny_llama, sparsity_config=config)
    assert_same_weights(base, Pruner.from_pretrained(tiny_llama).prune(config).model)


@pytest.mark.parametrize("run_compressed", MODES)
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_loading_in_another_dtype(dtype, pattern, run_compressed, sparse_checkpoints):
    path = sparse_checkpoints[pattern]
    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, run_compressed=run_compressed)
    wanted = AutoModelForCausalLM.from_pretrained(path)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    weight = model.model.layers[0].mlp.up_proj
    weight = weight.to_dense() if run_compressed else weight.weight
    assert torch.equal(weight, wanted.model.layers[0].mlp.up_proj.weight.to(dtype))
    assert logits(model).dtype == dtype


@pytest.mark.parametrize("pattern", PATTERNS)
def test_checkpoints_in_bfloat16_stay_so(pattern, tiny_llama, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(
        tiny_llama, dtype=torch.bfloat16, sparsity_config=make_config("sparsegpt", pattern)
    )
    model.save_pretrained(tmp_path / "one")
    assert {tensor.dtype for name, tensor in stored_tensors(tmp_path / "one").items() if name.endswith("weight")} == {
        torch.bfloat16
    }
    for run_compressed in MODES:
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "one", run_compressed=run_compressed)
        assert again.dtype == torch.bfloat16
        assert torch.equal(logits(again), logits(model))
        again.save_pretrained(tmp_path / "again")
        assert files_of(tmp_path / "again") == files_of(tmp_path / "one")


@pytest.mark.parametrize("convert", [lambda model: model.half(), lambda model: model.to(torch.bfloat16)])
def test_converting_the_dtype_of_a_dense_model(convert, sparse_checkpoints, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(sparse_checkpoints["2:4"])
    before = weights_of(model)
    convert(model)
    dtype = model.dtype
    assert dtype != torch.float32
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.dtype == dtype
    assert all(torch.equal(tensor, before[name].to(tensor.dtype)) for name, tensor in again.state_dict().items())


def test_training_a_dense_model(sparse_checkpoints, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(sparse_checkpoints["2:4"])
    model.train()
    weight = model.model.layers[0].mlp.up_proj.weight
    keep = weight.detach() != 0
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ids = token_ids(2, 12)
    first = model(ids, labels=ids).loss
    first.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert (weight.grad != 0).any()
    optimizer.step()
    assert model(ids, labels=ids).loss < first
    with pytest.raises(ValueError, match=r"model\.layers\.0\.\S+ cannot be stored as 2:4"):
        model.save_pretrained(tmp_path / "unmasked")
    with torch.no_grad():
        for layer in model.model.layers:
            for module in layer.modules():
                if isinstance(module, torch.nn.Linear):
                    groups = module.weight.reshape(-1, 4)
                    groups[groups.abs() < groups.abs().sort(1).values[:, 2:3]] = 0
    assert keep.shape == weight.shape
    model.save_pretrained(tmp_path / "masked")
    assert_same_weights(AutoModelForCausalLM.from_pretrained(tmp_path / "masked"), model)


@pytest.mark.parametrize("run_compressed", MODES)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_saving_again_gives_the_same_files(pattern, run_compressed, sparse_checkpoints, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(sparse_checkpoints[pattern], run_compressed=run_compressed)
    model.save_pretrained(tmp_path)
    assert {"model.safetensors", "config.json", "sparsity_report.json"} <= set(files_of(tmp_path))
    assert files_of(tmp_path) == files_of(sparse_checkpoints[pattern])
    assert str(model.hf_quantizer.report) == str(AutoModelForCausalLM.from_pretrained(tmp_path).hf_quantizer.report)


@pytest.mark.parametrize("run_compressed", MODES)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_shards(pattern, run_compressed, sparse_checkpoints, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(sparse_checkpoints[pattern])
    model.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "shards", run_compressed=run_compressed)
    torch.testing.assert_close(logits(again), logits(model))
    again.save_pretrained(tmp_path / "whole")
    assert files_of(tmp_path / "whole") == files_of(sparse_checkpoints[pattern])
    again.save_pretrained(tmp_path / "again", max_shard_size="20KB")
    first, second = files_of(tmp_path / "shards"), files_of(tmp_path / "again")
    index = "model.safetensors.index.json"
    assert json.loads(first.pop(index))["weight_map"] == json.loads(second.pop(index))["weight_map"]
    assert second == first
    assert inspect(str(tmp_path / "shards")).matrices == inspect(str(sparse_checkpoints[pattern])).matrices


def test_generate(tiny_llama, sparse_checkpoints):
    ids = token_ids(2, 6)
    texts = []
    for model in (
        Pruner.from_pretrained(tiny_llama).prune(make_config("magnitude")),
        AutoModelForCausalLM.from_pretrained(tiny_llama, sparsity_config=make_config("magnitude")),
        AutoModelForCausalLM.from_pretrained(sparse_checkpoints["2:4"]),
        AutoModelForCausalLM.from_pretrained(sparse_checkpoints["2:4"], run_compressed=True),
        SparseModelForCausalLM.from_pretrained(sparse_checkpoints["2:4"], run_compressed=True),
    ):
        options = dict(max_new_tokens=6, min_new_tokens=6, do_sample=False, attention_mask=torch.ones_like(ids))
        texts.append(model.generate(ids, **options))
        assert torch.equal(texts[-1], model.generate(ids, num_beams=1, use_cache=False, **options))
    assert texts[0].shape == (2, 12)
    assert all(torch.equal(text, texts[0]) for text in texts)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_dequantize(pattern, architecture, tmp_path):
    pruned = Pruner.from_pretrained(make_model(architecture)).prune(make_config("magnitude", pattern))
    wanted, weights = logits(pruned), weights_of(pruned)
    pruned.save_pretrained(tmp_path / "sparse")
    for model in (
        pruned,
        AutoModelForCausalLM.from_pretrained(tmp_path / "sparse"),
        AutoModelForCausalLM.from_pretrained(tmp_path / "sparse", run_compressed=True),
    ):
        model.dequantize()
        assert not sparse_layers(model)
        assert_same_weights(model, weights)
        assert torch.equal(logits(model), wanted)
        assert getattr(model.config, "quantization_config", None) is None
        model.save_pretrained(tmp_path / "dense")
        assert set(stored_tensors(tmp_path / "dense")) == set(stored_tensors(tmp_path / "dense")) & set(weights)
        assert_same_weights(AutoModelForCausalLM.from_pretrained(tmp_path / "dense"), weights)


@pytest.mark.parametrize("run_compressed", MODES)
def test_dequantize_in_another_dtype(run_compressed, sparse_checkpoints):
    model = AutoModelForCausalLM.from_pretrained(sparse_checkpoints["2:4"], run_compressed=run_compressed)
    model.dequantize(dtype=torch.bfloat16)
    wanted = AutoModelForCausalLM.from_pretrained(sparse_checkpoints["2:4"], dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert_same_weights(model, wanted)
    assert_same_logits(model, wanted)
    wanted.to(torch.float16).dequantize()
    assert {parameter.dtype for parameter in wanted.parameters()} == {torch.float16}


def test_moving_and_copying_a_compressed_model(sparse_checkpoints, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(sparse_checkpoints["unstructured"], run_compressed=True)
    wanted = logits(model)
    other = copy.deepcopy(model).to("cpu")
    del model
    assert torch.equal(logits(other), wanted)
    state = other.state_dict()
    fresh = AutoModelForCausalLM.from_pretrained(sparse_checkpoints["unstructured"], run_compressed=True)
    fresh.load_state_dict(state)
    assert torch.equal(logits(fresh), wanted)


# ---- without this package

LOAD_ALL = """
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

root = Path(sys.argv[1])
ids = torch.load(root / "ids.pt")
for folder in sorted(path for path in root.iterdir() if path.is_dir()):
    try:
        model = AutoModelForCausalLM.from_pretrained(folder)
    except RuntimeError as error:
        print(folder.name, "failed", "mismatch" in str(error))
        continue
    torch.save(model(ids, use_cache=False).logits.detach(), root / f"{folder.name}.pt")
    print(folder.name, "loaded")
assert "optimum_sparse" not in sys.modules
"""


def test_without_this_package_sparse_files_fail_and_exported_ones_load(tmp_path):
    """Not with random weights, as transformers would do if values were stored under a name of their own."""
    ids = token_ids(2, 12, seed=9)
    torch.save(ids, tmp_path / "ids.pt")
    wanted = {}
    for architecture, pattern in (("llama", "2:4"), ("llama", "unstructured"), ("gpt2", "2:4"), ("qwen3", "4:8")):
        name = f"{architecture}-{pattern.replace(':', '-')}"
        model = Pruner.from_pretrained(make_model(architecture)).prune(make_config("sparsegpt", pattern))
        model.save_pretrained(tmp_path / f"{name}-sparse")
        export_dense(str(tmp_path / f"{name}-sparse"), tmp_path / f"{name}-dense")
        wanted[name] = logits(model, ids)
    done = run_python(LOAD_ALL, str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.splitlines()) == sorted(
        line for name in wanted for line in (f"{name}-sparse failed True", f"{name}-dense loaded")
    )
    for name, expected in wanted.items():
        assert torch.equal(torch.load(tmp_path / f"{name}-dense.pt"), expected)


def test_export_keeps_weights_dtype_and_tokenizer(tiny_llama, tmp_path):
    pruner = Pruner.from_pretrained(tiny_llama, dtype=torch.bfloat16)
    pruner.prune_to_disk(make_config("magnitude"), tmp_path / "sparse")
    export_dense(str(tmp_path / "sparse"), tmp_path / "dense")
    config = json.loads((tmp_path / "dense" / "config.json").read_text())
    assert "quantization_config" not in config
    assert "sparsity_report.json" not in files_of(tmp_path / "dense")
    assert set(stored_tensors(tmp_path / "dense")) == set(stored_tensors(tiny_llama))
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    assert exported.dtype == torch.bfloat16
    assert_same_weights(exported, pruner.model)
    assert (tmp_path / "dense" / "tokenizer.json").read_bytes() == (tiny_llama / "tokenizer.json").read_bytes()
    assert exported.model.embed_tokens.weight.data_ptr() == exported.lm_head.weight.data_ptr()


def test_export_refuses(tiny_llama, sparse_checkpoints, tmp_path):
    with pytest.raises(ValueError, match="is not a sparse checkpoint"):
        export_dense(str(tiny_llama), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("mine")
    with pytest.raises(FileExistsError, match="not an empty folder"):
        export_dense(str(sparse_checkpoints["2:4"]), tmp_path / "full")
    assert files_of(tmp_path / "full") == {"file": b"mine"}


# ---- saving what is not sparse any more


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_changed_weight_is_not_saved(pattern, sparse_checkpoints, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(sparse_checkpoints[pattern])
    model.save_pretrained(tmp_path)
    before = files_of(tmp_path)
    with torch.no_grad():
        model.model.layers[1].mlp.gate_proj.weight.fill_(1)
    with pytest.raises(ValueError, match=rf"model\.layers\.1\.mlp\.gate_proj cannot be stored as {pattern}"):
        model.save_pretrained(tmp_path)
    after = files_of(tmp_path)
    assert after == before


def test_a_sparser_weight_can_be_saved(sparse_checkpoints, tmp_path):
    for pattern, path in sparse_checkpoints.items():
        model = AutoModelForCausalLM.from_pretrained(path)
        with torch.no_grad():
            model.model.layers[1].mlp.gate_proj.weight[3:] = 0
            model.model.layers[1].mlp.up_proj.weight.zero_()
        folder = tmp_path / pattern.replace(":", "-")
        model.save_pretrained(folder)
        assert_same_weights(AutoModelForCausalLM.from_pretrained(folder), model)
        compressed = AutoModelForCausalLM.from_pretrained(folder, run_compressed=True)
        torch.testing.assert_close(logits(compressed), logits(model))


class Kept(torch.nn.Module):
    def __init__(self, weight: torch.Tensor):
        super().__init__()
        self.keep = weight != 0

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight * self.keep


class OwnLinear(torch.nn.Linear):
    pass


CHANGES = {
    "parametrization": lambda mlp: register_parametrization(mlp.down_proj, "weight", Kept(mlp.down_proj.weight)),
    "mask": lambda mlp: custom_from_mask(mlp.down_proj, "weight", (mlp.down_proj.weight != 0).float()),
    "class": lambda mlp: setattr(mlp, "down_proj", OwnLinear(64, 32, bias=False)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_pruned_linear_that_became_something_else_is_not_saved(change, sparse_checkpoints, tmp_path):
    """What was saved could not be loaded again."""
    model = AutoModelForCausalLM.from_pretrained(sparse_checkpoints["2:4"])
    CHANGES[change](model.model.layers[1].mlp)
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.down_proj was pruned, .* cannot be stored: before"):
        model.save_pretrained(tmp_path / "changed")
    model.dequantize().save_pretrained(tmp_path / "dense")


@pytest.mark.parametrize("run_compressed", MODES)
def test_a_linear_whose_name_ends_in_weight(run_compressed, tmp_path, monkeypatch):
    class MLP(modeling_llama.LlamaMLP):
        def __init__(self, config):
            super().__init__(config)
            self.down_weight = self.down_proj
            del self.down_proj

        def forward(self, x):
            return self.down_weight(self.act_fn(self.gate_proj(x)) * self.up_proj(x))

    monkeypatch.setattr(modeling_llama, "LlamaMLP", MLP)
    model = Pruner.from_pretrained(make_model("llama")).prune(make_config("magnitude"))
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, run_compressed=run_compressed)
    assert_same_logits(again, model)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "mixtral", "gpt_oss"])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_stored_state_dict_loads_into_a_dense_model(pattern, architecture, tmp_path):
    """As Trainer resumes, and loads the best of its checkpoints."""
    model = Pruner.from_pretrained(make_model(architecture)).prune(make_config("magnitude", pattern))
    model.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    again = copy.deepcopy(model)
    for parameter in again.parameters():
        parameter.data.zero_()
    again.load_state_dict(dict(state), strict=not again._tied_weights_keys)
    assert_same_weights(again, model)
    dense = make_model(architecture).state_dict()
    again.load_state_dict(dense)
    assert all(torch.equal(dense[name], tensor) for name, tensor in again.state_dict().items())
    name = next(name for name in state if name.endswith(".weight_mask"))
    with pytest.raises(ValueError, match=re.escape(name.removesuffix(".weight_mask"))):
        again.load_state_dict(state | {name: state[name][1:]})


def test_prune_on_load_in_a_callers_inference_mode(tiny_llama, pruned_explicitly):
    with torch.inference_mode():
        model = AutoModelForCausalLM.from_pretrained(tiny_llama, sparsity_config=make_config("sparsegpt"))
    assert_same_weights(model, pruned_explicitly["sparsegpt"])


@pytest.mark.parametrize("error", [ImportError("needs sacremoses"), TypeError("no vocabulary"), OSError("no file")])
def test_a_tokenizer_that_cannot_be_loaded_stops_no_one_who_needs_none(error, tiny_llama, tmp_path, monkeypatch):
    def failing(*args, **kwargs):
        raise error

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", failing)
    Pruner.from_pretrained(tiny_llama).prune(make_config("magnitude")).save_pretrained(tmp_path / "sparse")
    export_dense(str(tmp_path / "sparse"), str(tmp_path / "dense"))


def test_inspect_misses_a_shard(sparse_checkpoints, tmp_path):
    AutoModelForCausalLM.from_pretrained(sparse_checkpoints["2:4"]).save_pretrained(tmp_path, max_shard_size="5KB")
    first = sorted(tmp_path.glob("*.safetensors"))[0]
    inspect(str(tmp_path))
    first.unlink()
    with pytest.raises(FileNotFoundError, match=f"lacks {first.name}, which model.safetensors.index.json names"):
        inspect(str(tmp_path))


@pytest.mark.parametrize("run_compressed", MODES)
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "mixtral"])
def test_a_state_dict_that_is_given_is_what_is_saved(architecture, run_compressed, tmp_path):
    """What a Trainer saves under FSDP and DeepSpeed, where the model itself holds parts of its weights, or none."""
    config = make_config("magnitude", layers={"o_proj": "1:4"} if architecture == "llama" else {})
    Pruner(make_model(architecture)).prune(config).save_pretrained(tmp_path / "before")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "before", run_compressed=run_compressed)
    wanted = AutoModelForCausalLM.from_pretrained(tmp_path / "before")
    wanted.load_state_dict(
        {name: 2 * x if x.is_floating_point() else x for name, x in wanted.state_dict().items()}, strict=True
    )
    state = {name: 2 * x if x.is_floating_point() else x for name, x in model.state_dict().items()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    names = set(state)
    model.save_pretrained(tmp_path / "after", state_dict=state)
    assert set(state) == names
    assert_same_weights(AutoModelForCausalLM.from_pretrained(tmp_path / "after"), wanted)
    assert set(stored_tensors(tmp_path / "after")) >= set(stored_tensors(tmp_path / "before"))  # and tied ones, untied
    model.save_pretrained(tmp_path / "nothing", False, {})  # a process that does not write has nothing
    assert not any(name.endswith(".safetensors") for name in files_of(tmp_path / "nothing"))


@pytest.mark.parametrize("run_compressed", MODES)
def test_what_shares_a_sparse_models_config_can_be_saved(run_compressed, sparse_checkpoints, tmp_path):
    """Its body, and a new model of the same config: whose weights are dense has a config that says so."""
    model = AutoModelForCausalLM.from_pretrained(sparse_checkpoints["2:4"], run_compressed=run_compressed)
    stored = model.config.quantization_config
    model.model.save_pretrained(tmp_path / "body")
    fresh = LlamaForCausalLM(model.config)
    fresh.save_pretrained(tmp_path / "fresh")
    other = LlamaForCausalLM(AutoConfig.from_pretrained(sparse_checkpoints["2:4"]))
    other.save_pretrained(tmp_path / "other")
    assert model.config.quantization_config is stored
    assert_same_weights(LlamaForCausalLM.from_pretrained(tmp_path / "fresh"), fresh)
    assert_same_weights(LlamaForCausalLM.from_pretrained(tmp_path / "other"), other)
    body = AutoModel.from_pretrained(tmp_path / "body")
    assert_same_weights(body, AutoModel.from_pretrained(sparse_checkpoints["2:4"]))
    for name in ("body", "fresh", "other"):
        content = json.loads((tmp_path / name / "config.json").read_text())
        assert ("quantization_config" in content) == (name == "body" and run_compressed)
    model.save_pretrained(tmp_path / "model")
    assert files_of(tmp_path / "model") == files_of(sparse_checkpoints["2:4"])


# ---- the plug itself


def test_install_and_uninstall_can_be_repeated(tiny_llama, sparse_checkpoints):
    from transformers.quantizers import auto

    def state():
        return (
            PreTrainedModel.from_pretrained.__func__,
            PreTrainedModel.save_pretrained,
            auto.LOADING_ATTRIBUTES_CONFIG_TYPES,
            dict(auto.AUTO_QUANTIZER_MAPPING),
            dict(auto.AUTO_QUANTIZATION_CONFIG_MAPPING),
        )

    installed = state()
    optimum_sparse.install()
    assert state() == installed
    try:
        optimum_sparse.uninstall()
        bare = state()
        assert not any(first is second for first, second in zip(bare[:3], installed[:3], strict=True))
        assert "sparsity" not in bare[3]
        assert "sparsity" not in bare[4]
        assert SparsityConfig not in bare[2]
        assert not any("optimum_sparse" in function.__code__.co_filename for function in bare[:2])
        optimum_sparse.uninstall()
        assert state() == bare
        with pytest.raises(TypeError, match="sparsity_config"):
            AutoModelForCausalLM.from_pretrained(tiny_llama, sparsity_config=make_config("magnitude"))
        assert_same_weights(
            AutoModelForCausalLM.from_pretrained(tiny_llama), LlamaForCausalLM.from_pretrained(tiny_llama)
        )
    finally:
        optimum_sparse.install()
    model = AutoModelForCausalLM.from_pretrained(sparse_checkpoints["2:4"])
    assert_pattern(model.model.layers[0].mlp.up_proj.weight, "2:4")
    once = state()
    optimum_sparse.uninstall()
    assert state() == bare
    optimum_sparse.install()
    assert [type(part) for part in state()] == [type(part) for part in once]
    assert state()[2:] == once[2:]


@pytest.mark.parametrize("name", ["from_pretrained", "save_pretrained", "push_to_hub"])
def test_uninstall_leaves_the_wrappers_of_others(name, tiny_llama, monkeypatch):
    ours = getattr_static(PreTrainedModel, name)

    def wrapped(self, *args, **kwargs):
        return getattr(ours, "__func__", ours)(self, *args, **kwargs)

    theirs = classmethod(wrapped) if isinstance(ours, classmethod) else wrapped
    with monkeypatch.context() as patch:
        patch.setattr(PreTrainedModel, name, theirs)
        with pytest.raises(RuntimeError, match=rf"PreTrainedModel\.{name} was replaced by other code"):
            optimum_sparse.uninstall()
        assert getattr_static(PreTrainedModel, name) is theirs
        config = make_config("magnitude")
        model = AutoModelForCausalLM.from_pretrained(tiny_llama, sparsity_config=config)  # nothing was undone
        assert_pattern(model.model.layers[0].mlp.up_proj.weight, "2:4")
    optimum_sparse.uninstall()
    assert getattr_static(PreTrainedModel, name) is not ours
    optimum_sparse.install()


def test_dense_models_load_and_save_as_before(tiny_llama, tmp_path):
    with_us = AutoModelForCausalLM.from_pretrained(tiny_llama)
    with_us.save_pretrained(tmp_path / "with")
    optimum_sparse.uninstall()
    try:
        without = AutoModelForCausalLM.from_pretrained(tiny_llama)
        without.save_pretrained(tmp_path / "without")
    finally:
        optimum_sparse.install()
    assert_same_weights(with_us, without)
    assert set(vars(with_us)) == set(vars(without))
    assert getattr(with_us, "hf_quantizer", None) is None
    assert files_of(tmp_path / "with") == files_of(tmp_path / "without")
    assert "sparsity_report.json" not in files_of(tmp_path / "with")
    model, info = AutoModelForCausalLM.from_pretrained(tiny_llama, output_loading_info=True)
    assert not info["missing_keys"]
    assert_same_logits(model, without)
    with pytest.raises(TypeError, match="not_an_argument"):
        AutoModelForCausalLM.from_pretrained(tiny_llama, not_an_argument=1)


def test_other_quantization_configs_still_reach_transformers(tiny_llama):
    with pytest.raises(Exception) as caught:  # noqa: PT011 - bitsandbytes is not installed: whatever transformers says
        AutoModelForCausalLM.from_pretrained(
            tiny_llama, quantization_config=transformers.BitsAndBytesConfig(load_in_8bit=True)
        )
    assert "bitsandbytes" in str(caught.value)


def test_loading_does_not_write(sparse_checkpoints, tiny_llama):
    for path in (tiny_llama, *sparse_checkpoints.values()):
        before = sha256(path / "model.safetensors")
        names = set(files_of(path))
        for run_compressed in MODES if path != tiny_llama else [None]:
            AutoModelForCausalLM.from_pretrained(path, run_compressed=run_compressed)
        AutoConfig.from_pretrained(path)
        assert sha256(path / "model.safetensors") == before
        assert set(files_of(path)) == names


@pytest.mark.parametrize("kind", ["whole", "without its head", "mixtral"])
def test_inspect_counts_every_byte(kind, tiny_llama, tmp_path):
    """Also where modules have other names on disk than in the model."""
    config = make_config("magnitude", "unstructured", ignore=["experts"] if kind == "mixtral" else [])
    model = make_model("mixtral") if kind == "mixtral" else AutoModelForCausalLM.from_pretrained(tiny_llama)
    model = Pruner.from_pretrained(model).prune(config)
    model.save_pretrained(tmp_path / "whole")
    if kind == "without its head":
        AutoModel.from_pretrained(tmp_path / "whole").save_pretrained(tmp_path / "base")
    folder = tmp_path / ("base" if kind == "without its head" else "whole")
    info = inspect(str(folder))
    assert set(info.matrices) == {layer.name for layer in model.hf_quantizer.report.pruned}
    for name, (pattern, shape, _, dense) in info.matrices.items():
        assert pattern == "unstructured 0.5"
        assert shape == list(model.get_submodule(name).weight.shape)
        assert dense == 4 * shape[0] * shape[1]
    total = sum(tensor.numel() * tensor.element_size() for tensor in stored_tensors(folder).values())
    assert sum(stored for _, _, stored, _ in info.matrices.values()) + info.other_bytes == total


def test_weights_that_transformers_would_merge_on_disk_stay_apart(tmp_path):
    """HRM keeps gate and up in one matrix on disk; two compressed matrices cannot be joined into one."""
    config = transformers.HrmTextConfig(
        vocab_size=200, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, head_dim=8
    )
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    Pruner(model).prune(SparsityConfig(method="magnitude"))
    model.save_pretrained(tmp_path)
    wanted = model.state_dict()
    for more in ({}, {"run_compressed": True}):
        again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, **more)
        if more:
            again.dequantize()
        state = again.state_dict()
        assert wanted.keys() == state.keys()
        assert all(torch.equal(wanted[name], state[name]) for name in wanted)


def test_a_line_for_all_unstructured_sparsities(tmp_path):
    """With an allocation every matrix has its own."""
    layers = {"q_proj": 0.3, "mlp": 0.7, "o_proj": "2:4", "k_proj": "dense"}
    model = Pruner.from_pretrained(make_model("llama")).prune(make_config("magnitude", "unstructured", layers=layers))
    model.save_pretrained(tmp_path)
    lines = str(inspect(str(tmp_path))).splitlines()
    assert [line.split(":")[0] for line in lines if "matrices" in line] == [
        "10 matrices at unstructured 0.30-0.70",
        "2 matrices at 2",
    ]
