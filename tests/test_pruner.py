"""The facade: what it takes, what it refuses, and that it writes all or nothing."""

import copy
import json
import re
import types
import warnings
from functools import partial

import numpy as np
import pytest
import torch
from models import (
    assert_pattern,
    assert_same_weights,
    files_of,
    linears_of,
    logits,
    make_config,
    make_model,
    stored_tensors,
    token_ids,
    weights_of,
)
from torch import nn
from torch.utils.data import DataLoader
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    BartConfig,
    BertConfig,
    CLIPConfig,
    T5Config,
    ViTConfig,
)

from optimum_sparse import Pruner, SparsityConfig
from optimum_sparse.config import PAPER
from optimum_sparse.core import InputStats, Needs, Solved, keep_mask


# ---- models and tokenizers


@pytest.mark.parametrize("kind", ["str", "Path", "model"])
def test_kinds_of_models(kind, tiny_llama):
    loaded = AutoModelForCausalLM.from_pretrained(tiny_llama)
    given = {"str": str(tiny_llama), "Path": tiny_llama, "model": loaded}[kind]
    pruner = Pruner.from_pretrained(given)
    model = pruner.prune(make_config("wanda"))
    assert model is pruner.model
    assert (model is given) == (kind == "model")
    wanted = Pruner(AutoModelForCausalLM.from_pretrained(tiny_llama)).prune(make_config("wanda"))
    assert_same_weights(model, wanted)
    assert len(pruner.report.pruned) == 14
    assert model.hf_quantizer.report is pruner.report


def test_arguments_for_loading(tiny_llama):
    pruner = Pruner.from_pretrained(tiny_llama, dtype=torch.bfloat16)
    assert pruner.model.dtype == torch.bfloat16
    with pytest.raises(ValueError, match=r"'dtype'.*only for loading"):
        Pruner.from_pretrained(pruner.model, dtype=torch.float16)


def test_the_tokenizer_is_found_beside_the_model(tiny_llama, tokenizer):
    text = "w5 w6 w199"
    wanted = tokenizer(text)["input_ids"]
    assert Pruner.from_pretrained(tiny_llama).tokenizer(text)["input_ids"] == wanted
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    assert Pruner.from_pretrained(model).tokenizer(text)["input_ids"] == wanted
    other = make_model("llama")
    assert Pruner.from_pretrained(other, tokenizer=str(tiny_llama)).tokenizer(text)["input_ids"] == wanted
    assert Pruner.from_pretrained(other, tokenizer=tokenizer).tokenizer is tokenizer
    assert Pruner.from_pretrained(other).tokenizer is None


def test_text_needs_a_tokenizer():
    model = make_model("llama")
    before = weights_of(model)
    with pytest.raises(ValueError, match="needs a tokenizer"):
        Pruner.from_pretrained(model).prune(make_config("wanda", dataset=["w5 w6"]))
    assert_same_weights(model, before)
    Pruner.from_pretrained(model).prune(make_config("magnitude", dataset=["w5 w6"]))  # sees no data
    assert_pattern(model.model.layers[0].mlp.up_proj.weight, "2:4")


@pytest.mark.parametrize("wrong", [None, 3, nn.Linear(4, 4), {"weight": torch.ones(4, 4)}])
def test_other_models_are_refused(wrong):
    with pytest.raises(TypeError):
        Pruner(wrong).prune(make_config("magnitude"))
    with pytest.raises(TypeError, match=f"must be an id, a path or a PreTrainedModel, got {type(wrong).__name__}"):
        Pruner.from_pretrained(wrong)


def test_models_of_other_kinds_are_refused(tmp_path):
    BertConfig().save_pretrained(tmp_path / "bert")
    T5Config().save_pretrained(tmp_path / "t5")
    assert Pruner.from_pretrained(tmp_path / "bert").report is None
    with pytest.raises(ValueError, match=r"t5' has model_type 't5', which is no causal language model"):
        Pruner.from_pretrained(tmp_path / "t5")
    with pytest.raises(FileNotFoundError, match=r"no/such/folder': there is no such folder"):
        Pruner.from_pretrained("no/such/folder")


@pytest.mark.parametrize("masked", [False, True])
def test_training_keeps_zeros_whose_gradients_are_masked(masked, tiny_llama, tmp_path):
    """As the README and the error have it."""
    model = Pruner.from_pretrained(tiny_llama).prune(make_config("magnitude"))
    before = weights_of(model)
    if masked:
        for w in (linear.weight for linear in linears_of(model.model.layers).values()):
            w.register_hook(lambda g, w=w: g * (w != 0))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    for _ in range(3):
        model(token_ids(), labels=token_ids()).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    if not masked:
        with pytest.raises(ValueError, match=r"model\.layers\.0\.self_attn\.q_proj cannot be stored .*register_hook"):
            model.save_pretrained(tmp_path / "out")
        return
    model.save_pretrained(tmp_path / "out")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert_same_weights(again, model)
    name = "model.layers.1.mlp.down_proj.weight"
    assert torch.equal(again.get_parameter(name) == 0, before[name] == 0)
    assert not torch.equal(again.get_parameter(name), before[name])


def test_no_model_is_pruned_twice_by_mistake(tiny_llama):
    with pytest.raises(ValueError, match="give it to prune or prune_to_disk alone"):
        Pruner.from_pretrained(tiny_llama, sparsity_config=make_config("magnitude"))
    with pytest.raises(ValueError, match="give it to prune or prune_to_disk alone"):
        Pruner.from_pretrained(tiny_llama, quantization_config=make_config("magnitude"))


def test_batches_in_a_list_have_the_length_that_they_have(tiny_llama):
    """Not that of `sequence_length`, which this model would not take."""
    batches = [{"input_ids": ids} for ids in token_ids().split(2)]
    given = Pruner.from_pretrained(tiny_llama).prune(SparsityConfig(method="wanda", num_samples=6), dataset=batches)
    assert_same_weights(given, Pruner.from_pretrained(tiny_llama).prune(make_config("wanda")))


@pytest.mark.parametrize("wrong", [None, "2:4", {"pattern": "2:4"}, SparsityConfig])
def test_other_configs_are_refused(wrong, tiny_llama):
    with pytest.raises(TypeError, match=f"config must be a SparsityConfig, got {type(wrong).__name__}"):
        Pruner.from_pretrained(tiny_llama).prune(wrong)


def test_a_quantized_model_is_refused():
    model = make_model("llama")

    class Other:
        quantization_config = type("Config", (), {"quant_method": "gptq"})()

    model.hf_quantizer = Other()
    with pytest.raises(ValueError, match=r"quantized \(gptq\)"):
        Pruner.from_pretrained(model).prune(make_config("magnitude"))


def test_a_model_with_adapters_is_refused():
    """They would be pruned as well, and stored under names that nothing loads."""
    model = make_model("llama")
    wrapped = nn.ModuleDict({"base_layer": model.model.layers[0].mlp.up_proj, "lora_A": nn.Linear(32, 4)})
    model.model.layers[0].mlp.up_proj = wrapped  # as PEFT has them
    with pytest.raises(ValueError, match="has adapters: merge them"):
        Pruner.from_pretrained(model).prune(make_config("magnitude"))


def test_training_mode_and_gradients_are_left_as_they_were():
    for training in (False, True):
        model = make_model("llama", attention_dropout=0.5).train(training)
        Pruner.from_pretrained(model).prune(make_config("sparsegpt"))
        assert all(module.training == training for module in model.modules())
        assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    first, second = make_model("llama", attention_dropout=0.5), make_model("llama", attention_dropout=0.5).train()
    for model in (first, second):
        Pruner.from_pretrained(model).prune(make_config("sparsegpt"))
    assert_same_weights(first, second)


# ---- calibration data


def padded(side: str) -> tuple[list[dict[str, torch.Tensor]], list[torch.Tensor]]:
    """Batches with padding on one side, and the same sequences one by one without it."""
    batches, sequences = [], []
    for number, lengths in enumerate(([20, 7, 13], [16, 16, 16], [5, 20, 9])):
        ids, mask = torch.zeros(3, 20, dtype=torch.int64), torch.zeros(3, 20, dtype=torch.int64)
        for row, length in enumerate(lengths):
            sequence = token_ids(1, length, seed=10 * number + row)[0]
            place = slice(20 - length, 20) if side == "left" else slice(0, length)
            ids[row, place], mask[row, place] = sequence, 1
            sequences.append(sequence[None])
        batches.append({"input_ids": ids, "attention_mask": mask, "labels": ids})
    return batches, sequences


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("architecture", ["llama", "qwen3"])
def test_padding_does_not_count(architecture, side):
    """A DataLoader of padded batches gives the statistics of the sequences without padding."""
    batches, sequences = padded(side)
    reports = []
    for dataset in (DataLoader(batches, batch_size=None), tuple(sequences)):
        pruner = Pruner.from_pretrained(make_model(architecture))
        pruner.prune(make_config("sparsegpt", fisher=False), dataset=dataset)
        reports.append({layer.name: layer.error for layer in pruner.report.layers})
    assert reports[0].keys() == reports[1].keys()
    for name, error in reports[0].items():
        assert error == pytest.approx(reports[1][name], rel=1e-3), name
    pruner = Pruner.from_pretrained(make_model(architecture))
    pruner.prune(
        make_config("sparsegpt", fisher=False), dataset=({"input_ids": batch["input_ids"]} for batch in batches)
    )
    assert any(layer.error != pytest.approx(reports[1][layer.name], rel=0.02) for layer in pruner.report.layers)


KINDS_OF_BATCHES = {
    "list of tensors": lambda ids: list(ids.split(4)),
    "list of dicts": lambda ids: [{"input_ids": part} for part in ids.split(4)],
    "tuple": lambda ids: ids.split(4),
    "DataLoader": lambda ids: DataLoader(ids, batch_size=4),
    "generator": lambda ids: ({"input_ids": part, "attention_mask": torch.ones_like(part)} for part in ids.split(4)),
    "tensor": lambda ids: ids,
}


@pytest.mark.parametrize("kind", KINDS_OF_BATCHES)
def test_kinds_of_batches_give_the_same_model(kind, tiny_llama, tmp_path):
    wanted = Pruner.from_pretrained(tiny_llama).prune(make_config("wanda"))
    dataset = KINDS_OF_BATCHES[kind](token_ids())
    model = Pruner.from_pretrained(tiny_llama).prune(make_config("wanda", dataset="c4"), dataset=dataset)
    assert_same_weights(model, wanted)
    copy.deepcopy(model).save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert stored["dataset"].startswith("in memory")
    assert_same_weights(AutoModelForCausalLM.from_pretrained(tmp_path), wanted)


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_the_batch_size_only_changes_rounding(method, tiny_llama):
    errors = []
    for batch_size in (1, 4, 6):
        pruner = Pruner.from_pretrained(tiny_llama)
        pruner.prune(make_config(method, batch_size=batch_size))
        errors.append([layer.error for layer in pruner.report.layers])
    for error in errors[1:]:
        assert error == pytest.approx(errors[0], rel=1e-2)


ON_GPU = torch.OutOfMemoryError("CUDA out of memory.")
ON_CPU = RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: ...")


def fitting(model, limit: int, start: int = 0, error: Exception = ON_GPU):
    """Blocks from `start` on run out of memory with more than `limit` sequences."""

    def checked(forward, x, *args, **kwargs):
        if len(x) > limit and x.shape[1] > 4:  # a few tokens show what the block returns
            raise error.with_traceback(None)
        return forward(x, *args, **kwargs)

    for block in model.model.layers[start:]:
        block.forward = partial(checked, block.forward)
    return model


@pytest.mark.parametrize(
    ("changes", "start", "padded", "error"),
    [
        (PAPER, 0, True, ON_GPU),
        ({}, 0, False, ON_GPU),
        ({}, 1, True, ON_CPU),
        ({"refine": "reconstruct"}, 1, False, ON_GPU),
        ({"method": "wanda"}, 0, True, MemoryError()),
    ],
    ids=str,
)
def test_out_of_memory_halves_the_batch_and_says_so(changes, start, padded, error, caplog):
    ids = torch.randint(3, 200, (7, 24), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[2, 15:] = mask[6, 5:] = 0
    models = []
    for size, limit in ((2, 7), (7, 3)):
        batches = [
            {"input_ids": part} | ({"attention_mask": of_part} if padded else {})
            for part, of_part in zip(ids.split(size), mask.split(size), strict=True)
        ]
        model = fitting(make_model("llama"), limit, start, error)
        Pruner(model).prune(
            SparsityConfig(**{"method": "sparsegpt", "damping": 0.1, **changes}),
            dataset=DataLoader(batches, batch_size=None),
        )
        models.append(model)
    messages = [record.getMessage() for record in caplog.records if "out of memory" in record.getMessage()]
    once = ["out of memory with 7 sequences at a time: going on with 4.", messages[-1]]
    assert messages[:2] == once
    assert once[1] == "out of memory with 4 sequences at a time: going on with 2."
    assert len(messages) in (2, 4), "once for the backward pass and once for the blocks"
    for name, parameter in models[1].named_parameters():
        torch.testing.assert_close(parameter, models[0].get_parameter(name), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("fisher", [False, True])
def test_a_single_sequence_that_does_not_fit_is_an_error_with_advice(fisher):
    with pytest.raises(torch.OutOfMemoryError, match=r"a single sequence .*batch_size=.*sequence_length=.*device_map"):
        Pruner(fitting(make_model("llama"), 0)).prune(
            SparsityConfig(fisher=fisher, sequence_length=24, num_samples=4), dataset=torch.randint(3, 200, (4, 24))
        )


@pytest.mark.parametrize("ids", [torch.tensor([[1, 200]]), torch.tensor([[-1, 3]])])
def test_token_ids_that_the_model_does_not_have(ids, tiny_llama):
    pruner = Pruner.from_pretrained(tiny_llama)
    before = weights_of(pruner.model)
    with pytest.raises(ValueError, match="use the model's own tokenizer"):
        pruner.prune(make_config("wanda"), dataset=(ids,))
    assert_same_weights(pruner.model, before)


def test_sequences_that_are_too_long(tiny_llama):
    config = make_config("wanda", dataset=token_ids(1, 65), num_samples=1, sequence_length=65)
    with pytest.raises(ValueError, match="sequences of 65 tokens; the model takes 64"):
        Pruner.from_pretrained(tiny_llama).prune(config)


def test_self_sampled_data_depends_on_the_seed_alone(tiny_llama):
    def prune(seed, **changes):
        config = make_config("wanda", dataset="self", num_samples=3, sequence_length=10, seed=seed, **changes)
        return Pruner.from_pretrained(tiny_llama).prune(config)

    state = torch.get_rng_state()
    first = prune(0)
    assert torch.equal(torch.get_rng_state(), state)  # the caller's random numbers go on as if nothing had happened
    torch.manual_seed(123)
    torch.rand(7)
    assert_same_weights(prune(0), first)
    weights, others = first.state_dict(), prune(1).state_dict()
    assert any(not torch.equal(weights[name], others[name]) for name in weights)


def test_self_sampling_ignores_the_models_generation_config(tiny_llama):
    config = make_config("wanda", dataset="self", num_samples=3, sequence_length=10)
    wanted = Pruner.from_pretrained(tiny_llama).prune(config)
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    model.generation_config.update(temperature=0.01, top_k=1, top_p=0.1, repetition_penalty=3.0, min_new_tokens=50)
    before = model.generation_config.to_dict()
    assert_same_weights(Pruner.from_pretrained(model).prune(config), wanted)
    assert model.generation_config.to_dict() == before


def test_self_sampling_of_one_token_is_where_text_begins(tiny_llama):
    config = make_config("wanda", dataset="self", num_samples=3, sequence_length=1)
    assert Pruner.from_pretrained(tiny_llama).prune(config).hf_quantizer.report.pruned


def test_self_sampling_needs_a_head(tiny_llama):
    model = AutoModel.from_pretrained(tiny_llama)
    with pytest.raises(ValueError, match=r"dataset='self'.*LlamaModel"):
        Pruner.from_pretrained(model).prune(make_config("wanda", dataset="self"))


# ---- a method of one's own


class SmallestInput:
    """Keeps what multiplies the weakest inputs: nobody's method, and so nobody's result by accident."""

    def __init__(self, needs: Needs):
        self.needs = needs
        self.seen: list[tuple] = []

    def solve(self, weight: torch.Tensor, stats: InputStats | None, pattern) -> Solved:
        self.seen.append((tuple(weight.shape), stats, pattern))
        score = -stats.mean_square.expand_as(weight) if stats is not None else -weight.abs()
        keep = keep_mask(score, pattern)
        return Solved(weight * keep, keep)


@pytest.mark.parametrize("needs", list(Needs))
def test_a_method_object(needs, tmp_path):
    model = make_model("llama")
    before = weights_of(model)
    method = SmallestInput(needs)
    pruner = Pruner.from_pretrained(model)
    pruner.prune(make_config("magnitude"), method=method)
    assert len(method.seen) == len(pruner.report.pruned) == 14
    for name, module in model.model.layers[0].named_modules():
        if isinstance(module, nn.Linear):
            assert_pattern(module.weight, "2:4")
            kept = module.weight != 0
            assert torch.equal(module.weight[kept], before[f"model.layers.0.{name}.weight"][kept])
            if needs > Needs.NOTHING:  # the same columns in every row
                assert (kept == kept[0]).all()
    if needs is Needs.NOTHING:
        assert all(stats is None for _, stats, _ in method.seen)
    else:
        assert all(stats.mean_square.shape == (shape[1],) for shape, stats, _ in method.seen)
    if needs is Needs.GRAM:
        assert all(stats.gram.shape == (shape[1], shape[1]) for shape, stats, _ in method.seen)
    model.save_pretrained(tmp_path)
    assert_same_weights(AutoModelForCausalLM.from_pretrained(tmp_path), model)


def test_a_method_that_breaks_the_pattern_cannot_be_saved(tmp_path):
    class Careless:
        needs = Needs.NOTHING

        def solve(self, weight, stats, pattern):
            return Solved(weight, torch.ones_like(weight, dtype=torch.bool))

    pruner = Pruner.from_pretrained(make_model("llama"))
    with pytest.raises(ValueError, match=r"model\.layers\.0\.self_attn\.q_proj cannot be stored as 2:4"):
        pruner.prune(make_config("magnitude"), method=Careless()).save_pretrained(tmp_path)
    assert not list(tmp_path.glob("*.safetensors"))


# ---- layers that cannot be pruned


@pytest.mark.parametrize("run_compressed", [False, True])
@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_a_layer_that_no_token_reaches_stays_dense(method, run_compressed, tmp_path):
    """As an expert that the router never chose. What is stored says so, and the checkpoint loads again."""
    model = make_model("llama")
    up = model.model.layers[1].mlp.up_proj
    weight = up.weight.detach().clone()

    class ByHand(nn.Module):  # computes without calling the linear's forward
        def __init__(self, mlp):
            super().__init__()
            self.gate_proj, self.up_proj, self.down_proj = mlp.gate_proj, mlp.up_proj, mlp.down_proj

        def forward(self, x):
            return self.down_proj(nn.functional.silu(self.gate_proj(x)) * (x @ self.up_proj.weight.T))

    whole = model.model.layers[1].mlp
    model.model.layers[1].mlp = ByHand(whole)
    pruner = Pruner.from_pretrained(model)
    pruner.prune(make_config(method))
    model.model.layers[1].mlp = whole
    name = "model.layers.1.mlp.up_proj"
    assert {layer.name: layer.skipped for layer in pruner.report.skipped} == {name: "no calibration token reached it"}
    assert torch.equal(up.weight, weight)
    assert_pattern(whole.down_proj.weight, "2:4")
    assert name in str(pruner.report)
    model.save_pretrained(tmp_path / "one")
    stored = json.loads((tmp_path / "one" / "config.json").read_text())["quantization_config"]
    assert stored["layers"] == {name: "dense"}
    assert torch.equal(stored_tensors(tmp_path / "one")[f"{name}.weight"], weight)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "one", run_compressed=run_compressed)
    torch.testing.assert_close(logits(again), logits(model))
    assert torch.equal(again.get_submodule(name).weight, weight)
    again.save_pretrained(tmp_path / "two")
    assert files_of(tmp_path / "one") == files_of(tmp_path / "two")


@pytest.mark.parametrize("method", ["magnitude", "wanda"])
@pytest.mark.parametrize(
    "name",
    [
        "model.embed_tokens.weight",
        "model.layers.1.input_layernorm.weight",
        "model.layers.1.mlp.up_proj.weight",
        "model.norm.weight",
        "lm_head.weight",
    ],
)
def test_weights_that_are_not_finite_are_named_whatever_reads_them(name, method, tmp_path):
    model = make_model("llama")
    with torch.no_grad():
        model.get_parameter(name)[3] = torch.inf
    model.save_pretrained(tmp_path / "damaged")
    before = weights_of(model)
    message = re.escape(f"{name} holds NaN or infinity: the checkpoint is damaged")
    with pytest.raises(ValueError, match=message):
        Pruner.from_pretrained(model).prune(make_config(method))
    assert_same_weights(model, before)
    with pytest.raises(ValueError, match=message):
        Pruner.from_pretrained(tmp_path / "damaged").prune_to_disk(make_config(method), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_inputs_that_are_not_finite_are_refused_with_the_layers_name(tiny_llama):
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    model.model.layers[1].input_layernorm.register_forward_hook(lambda module, args, output: output * torch.nan)
    with pytest.raises(ValueError, match=r"the inputs of model\.layers\.1\.self_attn\.q_proj hold NaN"):
        Pruner.from_pretrained(model).prune(make_config("wanda"))


def test_pruning_twice_is_pruning_what_is_left(tiny_llama):
    pruner = Pruner.from_pretrained(tiny_llama)
    pruner.prune(make_config("magnitude", "unstructured", sparsity=0.3))
    once = copy.deepcopy(pruner.model.model.layers[0].mlp.up_proj.weight.detach())
    with pytest.warns(UserWarning, match=r"sparse already \(magnitude, unstructured\): what is zero stays zero"):
        pruner.prune(make_config("magnitude", "unstructured", sparsity=0.6))
    twice = pruner.model.model.layers[0].mlp.up_proj.weight.detach()
    assert_pattern(twice, "unstructured", 0.6)
    assert ((twice == 0) >= (once == 0)).all()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing of the kind where it is not so
        wanted = Pruner.from_pretrained(tiny_llama).prune(make_config("magnitude", "unstructured", sparsity=0.6))
        AutoModelForCausalLM.from_pretrained(tiny_llama, sparsity_config=make_config("magnitude"))
    assert_same_weights(pruner.model, wanted)


# ---- second-order methods and what comes after them


@pytest.mark.parametrize("pattern", ["2:4", "unstructured"])
@pytest.mark.parametrize("refine", [None, "pcg", "reconstruct"])
@pytest.mark.parametrize("method", ["sparsegpt", "rose", "admm"])
def test_methods_and_refinements(method, refine, pattern, tiny_llama, tmp_path):
    sparsity = 0.6 if pattern == "unstructured" else None
    training = dict(reconstruction_passes=1, reconstruction_learning_rate=0.002)
    config = make_config(method, pattern, sparsity=sparsity, refine=refine, **training)
    pruner = Pruner.from_pretrained(tiny_llama)
    before = weights_of(pruner.model)
    model = pruner.prune(config)
    assert len(pruner.report.pruned) == 14
    for layer in pruner.report.pruned:
        assert_pattern(model.get_submodule(layer.name).weight, pattern, sparsity or 0.5)
        assert 0 < layer.error < 1
    assert torch.isfinite(logits(model)).all()
    changed = {name for name, tensor in weights_of(model).items() if not torch.equal(tensor, before[name])}
    inside = {name for name in before if "layers" in name}
    matrices = {name for name in inside if before[name].dim() == 2}
    if refine == "reconstruct":
        assert matrices < changed <= inside, "norms and biases are trained, too"
    else:
        assert changed == matrices
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert_same_weights(again, model)
    assert torch.equal(logits(again), logits(model))


@pytest.mark.parametrize(
    ("changes", "own", "resolved"),
    [
        ({}, False, [True, 0.5, 0.5, True]),
        ({"input_shift": 0.25, "fisher": False}, False, [True, 0.25, 0.5, False]),
        ({"method": "wanda"}, False, [False, 0, 0, False]),
        ({"method": "wanda", "refine": "pcg"}, False, [False, 0, 0, False]),
        ({}, True, [False, 0, 0, False]),
        ({"staged": True}, True, [True, 0, 0, False]),
    ],
)
def test_the_stored_config_says_what_was_done(changes, own, resolved, tiny_llama, tmp_path):
    """Also where the config left it open; and it is a valid config, which does the same."""
    config = make_config(**changes)
    method = SmallestInput(Needs.GRAM) if own else None
    model = Pruner.from_pretrained(tiny_llama).prune(config, method=method)
    model.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    names = ("staged", "input_shift", "residual_shift", "fisher")
    assert [stored[name] for name in names] == resolved
    assert [getattr(config, name) for name in names] == [changes.get(name) for name in names], "the caller's is left"
    if not own:
        again = SparsityConfig.from_dict(stored | {"dataset": "c4"})
        assert_same_weights(Pruner.from_pretrained(tiny_llama).prune(again, dataset=config.dataset), model)


# ---- to disk


def test_prune_to_disk(tiny_llama, tmp_path):
    pruner = Pruner.from_pretrained(tiny_llama)
    output = pruner.prune_to_disk(make_config("wanda"), tmp_path / "deep" / "output", max_shard_size="20KB")
    assert output == tmp_path / "deep" / "output"
    names = set(files_of(output))
    assert {"config.json", "sparsity_report.json", "tokenizer.json", "model.safetensors.index.json"} <= names
    assert [path.name for path in output.parent.iterdir()] == ["output"]
    assert_same_weights(AutoModelForCausalLM.from_pretrained(output), pruner.model)
    assert Pruner.from_pretrained(output).tokenizer is not None


def test_prune_to_an_empty_folder(tiny_llama, tmp_path):
    Pruner.from_pretrained(str(tiny_llama)).prune_to_disk(make_config("magnitude"), str(tmp_path))
    names = {"config.json", "model.safetensors.index.json", "model-00003-of-00003.safetensors"}
    assert names <= set(files_of(tmp_path))
    assert not (tmp_path / ".unfinished").exists()


@pytest.mark.parametrize("kind", ["full folder", "file"])
def test_existing_output_is_refused_before_any_work(kind, tiny_llama, tmp_path):
    output = tmp_path / "output"
    if kind == "file":
        output.write_text("mine")
    else:
        output.mkdir()
        (output / "mine.txt").write_text("mine")
    pruner = Pruner.from_pretrained(tiny_llama)
    before, files = weights_of(pruner.model), files_of(tmp_path)
    with pytest.raises(FileExistsError, match="not an empty folder"):
        pruner.prune_to_disk(make_config("magnitude"), output)
    assert_same_weights(pruner.model, before)
    assert pruner.report is None
    assert files_of(tmp_path) == files


@pytest.mark.parametrize("failing", ["model", "tokenizer", "report"])
def test_a_failure_while_writing_leaves_nothing(failing, tiny_llama, tmp_path, monkeypatch):
    """Of a model in memory; tests/hf/test_streaming.py has the others, which are gone on with."""
    pruner = Pruner(AutoModelForCausalLM.from_pretrained(tiny_llama), Pruner.from_pretrained(tiny_llama).tokenizer)

    def fail(*args, **kwargs):
        raise OSError("the disk is full")

    if failing == "model":
        saving = type(pruner.model).save_pretrained

        def half(self, directory, **kwargs):
            saving(self, directory, **kwargs)
            fail()

        monkeypatch.setattr(type(pruner.model), "save_pretrained", half)
    elif failing == "tokenizer":
        monkeypatch.setattr(pruner.tokenizer, "save_pretrained", fail)
    else:
        monkeypatch.setattr("optimum_sparse.hf.integration.write_report", fail)
    with pytest.raises(OSError, match="the disk is full"):
        pruner.prune_to_disk(make_config("magnitude"), tmp_path / "deep" / "output")
    assert not any(path.is_file() for path in tmp_path.rglob("*"))
    assert not (tmp_path / "deep" / "output").exists()


def test_a_failure_while_pruning_leaves_nothing(tiny_llama, tmp_path):
    pruner = Pruner.from_pretrained(tiny_llama)
    with pytest.raises(ValueError, match="token ids go from"):
        pruner.prune_to_disk(make_config("wanda", dataset=torch.full((6, 24), 900)), tmp_path / "output")
    assert not list(tmp_path.iterdir())
    some = dict(dataset=torch.zeros(2, 8, dtype=torch.int64), num_samples=2, sequence_length=8)
    with pytest.raises(ValueError, match=r"damping=0\.01 works"):  # after sensitivities, which are kept otherwise
        pruner.prune_to_disk(make_config(fisher=True, damping=0, **some), tmp_path / "output")
    assert not list(tmp_path.iterdir())
    pruner.prune_to_disk(make_config(fisher=True, damping=0.01, **some), tmp_path / "output")


# ---- what cannot be done is refused, or turned off and said


class Cheats:
    """Says that it pruned."""

    needs = Needs.NOTHING

    def solve(self, weight, stats, pattern) -> Solved:
        return Solved(weight, keep_mask(weight.abs(), pattern))


def test_a_method_that_breaks_the_pattern_is_named_before_it_is_written():
    model = make_model("llama")
    before = weights_of(model)
    with pytest.raises(ValueError, match=r"Cheats did not keep to 2:4 in model\.layers\.0\.self_attn\.q_proj"):
        Pruner.from_pretrained(model).prune(make_config("magnitude"), method=Cheats())
    assert_same_weights(model, before)


@pytest.mark.parametrize("method", ["wanda", Cheats, object(), type("NoNeeds", (), {"solve": print})()])
def test_what_is_no_method_is_refused(method):
    with pytest.raises(TypeError, match="needs"):
        Pruner.from_pretrained(make_model("llama")).prune(make_config("magnitude"), method=method)


def test_a_method_without_needs_gets_no_statistics_when_it_is_polished():
    method = SmallestInput(Needs.NOTHING)
    pruner = Pruner.from_pretrained(make_model("llama"))
    pruner.prune(make_config("magnitude", refine="pcg"), method=method)
    assert all(stats is None for _, stats, _ in method.seen)
    assert all(layer.error is not None for layer in pruner.report.pruned)


def sharing_model(make=types.SimpleNamespace):
    """All its blocks get one object that they could write to, as those of models that share keys and values do."""
    model = make_model("llama")
    forwards = [layer.forward for layer in model.model.layers]

    def passing(forward):
        def wrapped(hidden_states, *args, shared=None, **kwargs):
            return forward(hidden_states, *args, **kwargs)

        return wrapped

    for layer, forward in zip(model.model.layers, forwards, strict=True):
        layer.forward = passing(forward)
    inner = model.model.forward

    def outer(*args, **kwargs):
        return inner(*args, shared=make(), **kwargs)

    model.model.forward = outer
    return model


def test_blocks_that_hand_state_to_one_another_are_not_followed_on_two_paths():
    with pytest.warns(UserWarning, match="input_shift and residual_shift are off"):
        model = Pruner.from_pretrained(sharing_model()).prune(make_config("sparsegpt"))
    config = model.hf_quantizer.quantization_config
    assert (config.staged, config.input_shift, config.residual_shift) == (True, 0, 0)
    for changes in ({"input_shift": 0.5}, {"refine": "reconstruct"}):
        with pytest.raises(ValueError, match="blocks hand state to one another"):
            Pruner.from_pretrained(sharing_model()).prune(make_config("sparsegpt", **changes))


def test_blocks_may_hand_a_dict_to_one_another():
    model = sharing_model(dict)
    seen = []

    def counting(forward):
        def wrapped(hidden_states, *args, shared, **kwargs):
            shared["blocks"] = shared.get("blocks", 0) + 1
            seen.append(shared["blocks"])
            return forward(hidden_states, *args, **kwargs)

        return wrapped

    for layer in model.model.layers:
        layer.forward = counting(layer.forward)
    with pytest.warns(UserWarning, match="input_shift and residual_shift are off"):
        Pruner.from_pretrained(model).prune(make_config("sparsegpt"))
    assert max(seen) >= len(model.model.layers)


def test_reconstruction_leaves_alone_what_is_not_pruned():
    """Its weights and its bias; norms are trained."""
    model = make_model("llama-tied")
    before = weights_of(model)
    config = make_config(
        "sparsegpt",
        refine="reconstruct",
        reconstruction_passes=1,
        ignore=["q_proj"],
        layers={"model.layers.0.self_attn.k_proj": 0.0},
    )
    Pruner.from_pretrained(model).prune(config)
    after = weights_of(model)
    still = [name for name in before if "q_proj" in name or "layers.0.self_attn.k_proj" in name]
    assert len(still) == 6
    assert all(torch.equal(after[name], before[name]) for name in still)
    moved = ["model.layers.0.self_attn.v_proj.bias", "model.layers.1.post_attention_layernorm.weight"]
    assert not any(torch.equal(after[name], before[name]) for name in moved)


@pytest.mark.parametrize("method", ["sparsegpt", "wanda"])
def test_fewer_tokens_than_inputs_are_warned_about(method, recwarn):
    for samples in (1, 8):
        recwarn.clear()
        Pruner(make_model("llama")).prune(
            make_config(method, dataset=token_ids(samples, 16), num_samples=samples, sequence_length=16)
        )
        found = [str(warning.message) for warning in recwarn if "calibration tokens" in str(warning.message)]
        if samples == 1 and method == "sparsegpt":
            assert len(found) == 1
            assert found[0].startswith("16 calibration tokens for a layer of ")
        else:
            assert not found


def test_padding_is_no_token(recwarn):
    mask = torch.zeros(8, 40, dtype=torch.int64)
    mask[:, :2] = 1
    batch = {"input_ids": token_ids(8, 40), "attention_mask": mask}
    Pruner(make_model("llama")).prune(make_config("sparsegpt", num_samples=8), dataset=[batch])
    assert any(str(warning.message).startswith("16 calibration tokens") for warning in recwarn)


# ---- what is around a model


def test_models_with_one_config_are_each_saved_with_their_own(tmp_path):
    first, second = make_model("llama"), make_model("llama", seed=1)
    second.config = first.config
    Pruner.from_pretrained(first).prune(make_config("magnitude"))
    Pruner.from_pretrained(second).prune(make_config("wanda", "1:4"))
    second.save_pretrained(tmp_path / "second")
    first.save_pretrained(tmp_path / "first")
    second.dequantize()
    first.save_pretrained(tmp_path / "again")
    second.save_pretrained(tmp_path / "dense")
    for name, method, pattern in (
        ("first", "magnitude", "2:4"),
        ("again", "magnitude", "2:4"),
        ("second", "wanda", "1:4"),
    ):
        stored = json.loads((tmp_path / name / "config.json").read_text())["quantization_config"]
        assert (stored["method"], stored["pattern"]) == (method, pattern)
        assert_same_weights(
            AutoModelForCausalLM.from_pretrained(tmp_path / name), second if name == "second" else first
        )
    assert "quantization_config" not in json.loads((tmp_path / "dense" / "config.json").read_text())


def test_fields_that_were_set_later_are_checked(tiny_llama, tmp_path):
    for name, value in (("num_samples", -3), ("num_samples", np.int64(4)), ("seed", None), ("ignore", "up_proj")):
        config = make_config("wanda")
        setattr(config, name, value)
        for call in (
            lambda config=config: Pruner.from_pretrained(tiny_llama).prune(config),
            lambda config=config: Pruner.from_pretrained(tiny_llama).prune_to_disk(config, tmp_path / "out"),
            lambda config=config: AutoModelForCausalLM.from_pretrained(tiny_llama, sparsity_config=config),
        ):
            with pytest.raises(ValueError, match=name):
                call()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("shared", ["an mlp of two blocks", "a linear of one block"])
def test_a_module_in_two_places_stays_dense(shared):
    model = make_model("llama")
    first, second = model.model.layers[0], model.model.layers[1]
    if shared == "an mlp of two blocks":
        second.mlp, left = first.mlp, {"gate_proj", "up_proj", "down_proj"}
    else:
        first.self_attn.k_proj, left = first.self_attn.v_proj, {"k_proj", "v_proj"}
    before = weights_of(model)
    pruner = Pruner.from_pretrained(model)
    pruner.prune(make_config("wanda"))
    skipped = [layer for layer in pruner.report.skipped if "shared with another layer" in layer.skipped]
    assert {layer.name.rpartition(".")[2] for layer in skipped} <= left
    assert skipped
    for layer in skipped:
        assert torch.equal(model.get_submodule(layer.name).weight, before[f"{layer.name}.weight"])


@pytest.mark.parametrize("method", ["magnitude", "wanda"])
def test_what_is_no_causal_language_model_is_refused(method):
    sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
    bart = BartConfig(
        d_model=32, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=64, decoder_ffn_dim=64, vocab_size=99
    )
    clip = CLIPConfig(
        text_config=sizes | {"vocab_size": 99}, vision_config=sizes | {"image_size": 32, "patch_size": 16}
    )
    for model in (
        AutoModel.from_config(bart),
        AutoModelForSeq2SeqLM.from_config(bart),
        AutoModel.from_config(ViTConfig(**sizes, image_size=32)),
        AutoModel.from_config(clip),
    ):
        before = weights_of(model)
        with pytest.raises(ValueError, match=f"{type(model).__name__} is no causal language model"):
            Pruner.from_pretrained(model).prune(make_config(method))
        assert_same_weights(model, before)


def test_data_of_the_usual_types(tiny_llama, tmp_path):
    ids = token_ids()
    (tmp_path / "a.txt").write_text(" ".join(f"w{i % 90}" for i in range(2000)))
    texts = [f"w{i} w{i + 1} w{i + 2} w4" * 20 for i in range(40)]
    pairs = [
        (ids, ids.numpy()),
        ([{"input_ids": ids}], {"input_ids": ids}),
        (str(tmp_path / "a.txt"), tmp_path / "a.txt"),
        (texts, tuple(texts)),
        (texts, np.array(texts)),
    ]
    for usual, other in pairs:
        config = make_config("wanda", num_samples=2, sequence_length=16)
        wanted, found = (Pruner.from_pretrained(tiny_llama).prune(config, dataset=data) for data in (usual, other))
        assert_same_weights(found, wanted)
        stored, said = (model.hf_quantizer.quantization_config.dataset for model in (found, wanted))
        assert stored == said or isinstance(other, dict)
    assert make_config(dataset=tmp_path / "a.txt").dataset == str(tmp_path / "a.txt")
    with pytest.raises(ValueError, match="texts must be a list of strings"):
        Pruner.from_pretrained(tiny_llama).prune(config, dataset=iter(texts))
    with pytest.raises(ValueError, match="is empty"):
        make_config(dataset=[])


def test_a_callers_autocast_changes_no_mask(tiny_llama):
    config = make_config("sparsegpt")
    wanted = Pruner.from_pretrained(tiny_llama).prune(config)
    with torch.autocast("cpu", torch.bfloat16):
        assert_same_weights(Pruner.from_pretrained(tiny_llama).prune(config), wanted)
