"""Where the blocks are, what they are called with, and what is refused before any work is done."""

import pytest
import torch
import transformers
from models import (
    ARCHITECTURES,
    EXPERTS,
    assert_pattern,
    assert_same_weights,
    files_of,
    logits,
    make_config,
    make_model,
    stored_tensors,
    token_ids,
    weights_of,
)
from torch import nn
from transformers import AutoModelForCausalLM

from optimum_sparse import Pruner
from optimum_sparse.hf.blocks import find_blocks, make_plan, record_calls
from optimum_sparse.nn import SparseLinear


EVERY = list(ARCHITECTURES | EXPERTS)

BLOCKS = {
    "opt": "model.decoder.layers",
    "gpt2": "transformer.h",
    "gptj": "transformer.h",
    "bloom": "transformer.h",
    "falcon": "transformer.h",
    "gpt_neox": "gpt_neox.layers",
}


@pytest.mark.parametrize("architecture", EVERY)
def test_finds_the_blocks(architecture):
    model = make_model(architecture)
    name, blocks = find_blocks(model)
    assert name == BLOCKS.get(architecture, "model.layers")
    assert model.get_submodule(name) is blocks
    assert len(blocks) == model.config.num_hidden_layers


# model types that are found from their class alone, on the meta device
@pytest.mark.parametrize(
    ("config", "arguments"),
    [
        ("GemmaConfig", {}),
        ("Gemma2Config", {}),
        ("Phi3Config", {}),
        ("GraniteConfig", {}),
        ("Starcoder2Config", {}),
        ("GPTBigCodeConfig", {}),
        ("CodeGenConfig", {}),
        ("XGLMConfig", {}),
        ("MptConfig", {}),
        ("NemotronConfig", {"num_key_value_heads": 8}),
        ("SmolLM3Config", {}),
        ("Glm4Config", {}),
        ("OlmoeConfig", {}),
        ("BertConfig", {"is_decoder": True}),
    ],
)
def test_finds_the_blocks_of_other_model_types(config, arguments):
    sizes = {"num_hidden_layers": 2, "vocab_size": 200}
    made = getattr(transformers, config)(**arguments)
    for key, value in sizes.items():
        name = getattr(type(made), "attribute_map", {}).get(key, key)
        if hasattr(made, name):
            setattr(made, name, value)
    made.pad_token_id = None
    if getattr(made, "layer_types", None):
        made.layer_types = made.layer_types[:2]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(made)
    name, blocks = find_blocks(model)
    assert len(blocks) == 2
    inside = [child for child in blocks.modules() if type(child).__name__ in ("Linear", "Conv1D")]
    outside = [child for child in model.modules() if type(child).__name__ in ("Linear", "Conv1D")]
    assert len(inside) >= 4
    assert len(inside) >= len(outside) - 3  # the head, and what may come before it


def test_finds_the_blocks_of_a_model_that_calls_its_head_a_decoder():
    sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
    special = dict(pad_token_id=0, bos_token_id=1, cls_token_id=1, eos_token_id=2, sep_token_id=2)
    config = transformers.ModernBertDecoderConfig(vocab_size=200, **sizes, **special)
    model = AutoModelForCausalLM.from_config(config)
    assert isinstance(model.get_decoder(), nn.Linear)
    assert find_blocks(model) == ("model.layers", model.model.layers)


def test_block_name_finds_blocks_that_are_not_found():
    model = make_model("llama")

    class Unknown(nn.Module):
        def __init__(self, block):
            super().__init__()
            self.block = block

        def forward(self, *args, **kwargs):
            return self.block(*args, **kwargs)

    model.model.layers = nn.ModuleList(Unknown(block) for block in model.model.layers)
    with pytest.raises(ValueError, match=r"no decoder blocks were found in LlamaForCausalLM.*block_name"):
        find_blocks(model)
    name, blocks = find_blocks(model, "model.layers")
    assert (name, blocks) == ("model.layers", model.model.layers)
    Pruner.from_pretrained(model).prune(make_config(block_name="model.layers"))
    for block in model.model.layers:
        assert_pattern(block.block.mlp.down_proj.weight, "2:4")


def test_block_name_of_the_whole_model_is_understood_by_its_base_model():
    base = make_model("llama").model
    assert find_blocks(base, "model.layers") == ("layers", base.layers)
    assert find_blocks(base, "layers") == ("layers", base.layers)


@pytest.mark.parametrize("name", ["model.nothing", "model.layers.0", "lm_head", "model.model.layers", "layers"])
def test_wrong_block_name(name):
    model = make_model("llama")
    before = weights_of(model)
    with pytest.raises(ValueError, match=f"block_name='{name}'.*not a ModuleList.*, which has model.layers"):
        Pruner.from_pretrained(model).prune(make_config(block_name=name))
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


# ---- recording


def padded_batches() -> list[dict[str, torch.Tensor]]:
    """A full batch, one with padding on the left, one with padding on the right and another length."""
    left, right = torch.ones(3, 20, dtype=torch.int64), torch.ones(2, 17, dtype=torch.int64)
    left[0, :5], left[2, :11] = 0, 0
    right[1, 9:] = 0
    return [
        {"input_ids": token_ids(2, 20, seed=3)},
        {"input_ids": token_ids(3, 20, seed=4), "attention_mask": left},
        {"input_ids": token_ids(2, 17, seed=5), "attention_mask": right},
        {"input_ids": token_ids(2, 20, seed=6)},
    ]


def last_block_output(model, blocks, batch) -> torch.Tensor:
    """What the model's own forward pass leaves the last block with."""
    seen = []
    handle = blocks[-1].register_forward_hook(
        lambda module, args, output: seen.append(output[0] if isinstance(output, tuple) else output)
    )
    with torch.no_grad():
        model(**batch, use_cache=False)
    handle.remove()
    return seen[0]


@pytest.mark.parametrize("architecture", EVERY)
def test_running_recorded_blocks_one_by_one_is_the_model(architecture):
    model = make_model(architecture, **({"num_hidden_layers": 3} if architecture != "gemma3" else {}))
    _, blocks = find_blocks(model)
    batches = padded_batches()
    wanted = [last_block_output(model, blocks, batch) for batch in batches]
    before = weights_of(model)
    calls = record_calls(model, blocks, batches)
    with torch.no_grad():
        for index, block in enumerate(blocks):
            for number in range(len(batches)):
                calls.hidden[number] = calls.run(block, index, number)
    for hidden, expected in zip(calls.hidden, wanted, strict=True):
        assert torch.equal(hidden, expected)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    masks = [batch.get("attention_mask") for batch in batches]
    for keep, mask in zip(calls.keep, masks, strict=True):
        assert (keep is None) == (mask is None)
        assert keep is None or torch.equal(keep, mask.bool())


def test_layers_get_their_own_masks_and_position_embeddings():
    """Gemma-3 mixes sliding and full attention: with the first layer's arguments for all, the result is another."""
    model = make_model("gemma3")
    _, blocks = find_blocks(model)
    batch = padded_batches()[0]
    wanted = last_block_output(model, blocks, batch)
    calls = record_calls(model, blocks, [batch])
    calls.arguments = [calls.arguments[0]] * len(blocks)
    with torch.no_grad():
        for index, block in enumerate(blocks):
            calls.hidden[0] = calls.run(block, index, 0)
    assert not torch.allclose(calls.hidden[0], wanted, rtol=1e-2)


def test_a_mask_without_padding_counts_as_none():
    model = make_model("llama")
    batch = {"input_ids": token_ids(2, 8), "attention_mask": torch.ones(2, 8, dtype=torch.int64)}
    assert record_calls(model, find_blocks(model)[1], [batch]).keep == [None]


def test_arguments_that_are_equal_are_kept_once():
    model = make_model("llama", num_hidden_layers=3)
    batches = [{"input_ids": token_ids(2, 20, seed=seed)} for seed in range(4)]
    calls = record_calls(model, find_blocks(model)[1], batches)
    kept = {id(kwargs["position_embeddings"][0]) for block in calls.arguments for _, kwargs in block}
    assert len(kept) == 1


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma3"])
def test_forwards_come_back(architecture):
    model = make_model(architecture)
    _, blocks = find_blocks(model)

    def of_its_own(*args, **kwargs):
        return type(blocks[0]).forward(blocks[0], *args, **kwargs)

    blocks[0].forward = of_its_own  # as accelerate's hooks do
    wanted = logits(model)
    record_calls(model, blocks, padded_batches())
    assert blocks[0].forward is of_its_own
    assert all("forward" not in block.__dict__ for block in blocks[1:])
    assert not any(block._forward_hooks or block._forward_pre_hooks for block in blocks)
    assert torch.equal(logits(model), wanted)


def test_forwards_come_back_after_an_error():
    model = make_model("llama")
    _, blocks = find_blocks(model)
    wanted = logits(model)
    good, bad = {"input_ids": token_ids(1, 8)}, {"input_ids": torch.full((1, 8), 10**6)}
    with pytest.raises(IndexError):
        record_calls(model, blocks, [good, bad])
    assert all("forward" not in block.__dict__ and not block._forward_hooks for block in blocks)
    assert torch.equal(logits(model), wanted)


@pytest.mark.parametrize("order", [[0, 0, 1], [0, 1, 0], [0, 2], [1, 2], [0, 1, 1, 2]])
def test_models_that_do_not_run_each_block_once_are_refused(order):
    model = make_model("llama", num_hidden_layers=3)
    blocks = model.model.layers
    del model.model.layers
    object.__setattr__(model.model, "layers", [blocks[index] for index in order])  # what the forward pass goes through
    model.config.num_hidden_layers = len(order)
    message = "LlamaForCausalLM (did not call each of its 3 blocks once per batch|never called the first of its)"
    with pytest.raises(ValueError, match=message):
        record_calls(model, blocks, [{"input_ids": token_ids(1, 8)}])
    assert all("forward" not in block.__dict__ and not block._forward_hooks for block in blocks)


def test_a_block_that_stands_in_two_places_is_refused():
    model = make_model("llama", num_hidden_layers=3)
    model.model.layers[1] = model.model.layers[0]
    with pytest.raises(ValueError, match="LlamaForCausalLM did not call each of its 3 blocks once per batch"):
        Pruner.from_pretrained(model).prune(make_config())


# ---- what is refused, and what is left out


def test_fused_experts_that_cannot_be_taken_apart_are_refused_before_any_work():
    """As those of Llama 4, which run all experts on all tokens."""
    model = make_model("mixtral")
    for block in model.model.layers:
        del block.mlp.experts.has_gate
    before = weights_of(model)

    class NotToBeRead(torch.utils.data.Dataset):
        def __len__(self):
            return 1

        def __getitem__(self, index):
            raise AssertionError("calibration data was read")

    with pytest.raises(ValueError, match=r"fused experts") as caught:
        Pruner.from_pretrained(model).prune(make_config(), dataset=torch.utils.data.DataLoader(NotToBeRead()))
    message = str(caught.value)
    assert "ignore=['experts']" in message
    for layer in range(2):
        assert f"model.layers.{layer}.mlp.experts" in message
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert getattr(model, "hf_quantizer", None) is None


@pytest.mark.parametrize("pattern", ["2:4", "unstructured"])
@pytest.mark.parametrize("architecture", EXPERTS)
def test_ignored_experts_stay_dense_and_are_named(architecture, pattern, tmp_path):
    """On disk Mixtral's experts have names of their own (block_sparse_moe.experts.0.w1)."""
    model = make_model(architecture)
    before = weights_of(model)
    dense_names = set()
    model.save_pretrained(tmp_path / "dense")
    dense_names = set(stored_tensors(tmp_path / "dense"))
    pruner = Pruner.from_pretrained(model)
    pruner.prune(make_config("wanda", pattern, ignore=["experts"]))
    skipped = {layer.name: layer.skipped for layer in pruner.report.skipped}
    pruned = {layer.name for layer in pruner.report.pruned}
    for index, block in enumerate(model.model.layers):
        name = f"model.layers.{index}"
        assert skipped[f"{name}.mlp.experts"] == "ignored by 'experts'"
        assert "not a linear" in skipped[f"{name}.mlp.{'router' if architecture == 'gpt_oss' else 'gate'}"]
        for linear in ("q_proj", "k_proj", "v_proj", "o_proj"):
            assert f"{name}.self_attn.{linear}" in pruned
            assert_pattern(getattr(block.self_attn, linear).weight, pattern)
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {f"{name}.weight" for name in pruned}

    wanted = logits(model)
    model.save_pretrained(tmp_path / "one")
    assert {name for name in stored_tensors(tmp_path / "one") if "_mask" not in name and "_rows" not in name} == (
        dense_names
    )
    for run_compressed in (False, True):
        loaded, info = AutoModelForCausalLM.from_pretrained(
            tmp_path / "one", run_compressed=run_compressed, output_loading_info=True
        )
        assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        assert sum(isinstance(module, SparseLinear) for module in loaded.modules()) == len(pruned) * run_compressed
        torch.testing.assert_close(logits(loaded), wanted)
        if not run_compressed:
            assert_same_weights(loaded, model)
        loaded.save_pretrained(tmp_path / f"again{run_compressed}")
        assert files_of(tmp_path / f"again{run_compressed}") == files_of(tmp_path / "one")


def test_widths_that_do_not_divide_are_refused_with_their_names():
    model = make_model("llama", intermediate_size=66)
    before = weights_of(model)
    with pytest.raises(ValueError, match=r"multiples of M: model\.layers\.0\.mlp\.down_proj has 66, pattern 2:4"):
        Pruner.from_pretrained(model).prune(make_config())
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    pruner = Pruner.from_pretrained(model)
    pruner.prune(make_config("magnitude", layers={"down_proj": 0.25}))
    assert_pattern(model.model.layers[0].mlp.down_proj.weight, "unstructured", 0.25)
    assert_pattern(model.model.layers[0].mlp.up_proj.weight, "2:4")


@pytest.mark.parametrize(
    "rules", [dict(targets=["q_prj"]), dict(ignore=["lm_haed"]), dict(layers={"layers.7": "dense"})]
)
def test_names_that_match_nothing_are_refused(rules):
    rule = next(iter(next(iter(rules.values()))))
    with pytest.raises(ValueError, match=f"'{rule}', which matches no module of LlamaForCausalLM"):
        make_plan(make_model("llama"), make_config(**rules))


@pytest.mark.parametrize(
    "rules",
    [dict(targets=["q_proj", "lm_head"]), dict(layers={"embed_tokens": 0.5}), dict(allocation={"model.norm": 0.5})],
)
def test_names_outside_of_the_blocks_are_not_pruned_and_not_ignored(rules):
    pattern = {"pattern": "unstructured"} if "allocation" in rules else {}
    with pytest.raises(
        ValueError, match=r"names '.*', which is outside of model\.layers: only what is in it is pruned"
    ):
        make_plan(make_model("llama"), make_config(**pattern, **rules))
    make_plan(make_model("llama"), make_config(layers={"lm_head": "dense", "embed_tokens": "dense"}))


@pytest.mark.parametrize(("rule", "meant"), [("qproj", "q_proj"), ("layers.0.mpl", "model.layers.0.mlp")])
def test_a_mistyped_name_is_guessed(rule, meant):
    with pytest.raises(ValueError, match=rf"{rule}.*: did you mean '{meant}'\?"):
        make_plan(make_model("llama"), make_config(ignore=[rule]))


def test_nothing_to_prune_is_an_error():
    with pytest.raises(ValueError, match="nothing to prune"):
        make_plan(make_model("llama"), make_config(ignore=["model.layers"]))


def test_a_weight_that_two_linears_share_stays_dense():
    model = make_model("llama")
    first, second = model.model.layers[0].mlp, model.model.layers[1].mlp
    second.up_proj.weight = first.up_proj.weight
    before = first.up_proj.weight.detach().clone()
    pruner = Pruner.from_pretrained(model)
    pruner.prune(make_config("magnitude"))
    skipped = {layer.name for layer in pruner.report.skipped if "shared" in layer.skipped}
    assert skipped == {"model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj"}
    assert second.up_proj.weight is first.up_proj.weight
    assert torch.equal(first.up_proj.weight, before)


def test_subclasses_of_linear_are_left_alone_and_named():
    class Adapter(nn.Linear):
        pass

    model = make_model("llama")
    old = model.model.layers[0].mlp.up_proj
    model.model.layers[0].mlp.up_proj = Adapter(old.in_features, old.out_features, bias=False)
    weight = model.model.layers[0].mlp.up_proj.weight.detach().clone()
    pruner = Pruner.from_pretrained(model)
    pruner.prune(make_config("wanda"))
    assert {layer.name: layer.skipped for layer in pruner.report.skipped} == {
        "model.layers.0.mlp.up_proj": "Adapter, a subclass of Linear with its own rules"
    }
    assert torch.equal(model.model.layers[0].mlp.up_proj.weight, weight)
