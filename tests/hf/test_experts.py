"""Fused experts are pruned one by one, each with the tokens that are routed to it, and stored one by one."""

import json

import pytest
import torch
import transformers
from accelerate import cpu_offload
from helpers import output_error
from models import (
    EXPERTS,
    TOKENS,
    assert_pattern,
    assert_same_weights,
    files_of,
    logits,
    make_config,
    make_model,
    run_python,
    stored_tensors,
    token_ids,
    weights_of,
)
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from optimum_sparse import Pruner
from optimum_sparse.core import NM, InputStats, Needs
from optimum_sparse.hf.blocks import make_plan, record_calls
from optimum_sparse.hf.checkpoint import export_dense, inspect
from optimum_sparse.methods import SparseGPT, Wanda
from optimum_sparse.nn import Experts, SparseLinear
from optimum_sparse.pipeline import Sensitivity, loop
from optimum_sparse.pipeline.observe import Evidence, collect, find_layout
from optimum_sparse.report import PruningReport


ARCHITECTURES = list(EXPERTS)
MATRICES = ("gate_up_proj", "down_proj")
PAPER = dict(staged=False, input_shift=0.0, residual_shift=0.0, fisher=False)
NAME = "model.layers.0.mlp.experts"


def expert_matrix(model: nn.Module, layer: int, matrix: str, expert: int) -> Tensor:
    """[out, in]."""
    fused = model.model.layers[layer].mlp.experts
    weight = getattr(fused, matrix)[expert].detach()
    return weight.T if fused.is_transposed else weight


@torch.no_grad()
def routed_inputs(model: PreTrainedModel, layer: int, batch: dict[str, Tensor]) -> dict[tuple[str, int], Tensor]:
    """(matrix, expert) -> fp64 [tokens, in] of the tokens that are routed to the expert; ("all", e) of all tokens.

    From what the fused module is called with, by the formulas of the models.
    """
    calls = []
    experts = model.model.layers[layer].mlp.experts
    handle = experts.register_forward_pre_hook(lambda module, args: calls.append(args))
    model(**batch, use_cache=False)
    handle.remove()
    ((hidden, chosen, _),) = calls
    real = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).flatten().bool()
    found = {}
    for expert in range(experts.num_experts):
        mine = (chosen == expert).any(-1) & real
        for key, rows in (("", hidden[mine].double()), ("all ", hidden[real].double())):
            y = rows @ expert_matrix(model, layer, "gate_up_proj", expert).double().T
            if hasattr(experts, "gate_up_proj_bias"):  # gpt-oss: interleaved, clamped, up + 1
                y = y + experts.gate_up_proj_bias[expert].double()
                gate, up = y[:, ::2].clamp(max=experts.limit), y[:, 1::2].clamp(-experts.limit, experts.limit)
                inner = (up + 1) * gate * torch.sigmoid(experts.alpha * gate)
            else:
                gate, up = y.chunk(2, dim=-1)
                inner = torch.nn.functional.silu(gate) * up
            found[f"{key}gate_up_proj", expert] = rows
            found[f"{key}down_proj", expert] = inner
    return found


def evidence_of(model: PreTrainedModel, batches: list[dict[str, Tensor]]) -> dict[str, Evidence]:
    """What each matrix of an expert of the dense model sees, by name."""
    plan = make_plan(model, make_config(targets=["experts"]))
    calls = record_calls(model, [block.module for block in plan.blocks], batches)
    found = {}
    for index, block in enumerate(plan.blocks):
        with torch.no_grad(), plan.onload(block.module):
            layout = find_layout(block, index, calls)
            evidence = collect(layout.groups, layout, block, index, calls, Needs.GRAM)
            calls.hidden = [calls.run(block.module, index, batch) for batch in range(len(batches))]
        for group, part in zip(layout.groups, evidence, strict=True):
            found |= {linear.name: part for linear in group}
    return found


def make_unpopular(model: PreTrainedModel, expert: int) -> None:
    """The routers never choose this one of five: of the others, two are ahead of it for every token."""
    for block in model.model.layers:
        router = block.mlp.router if hasattr(block.mlp, "router") else block.mlp.gate
        others = [number for number in range(5) if number != expert]
        with torch.no_grad():
            direction = router.weight[0].clone()
            router.weight[expert] = 0
            for number, factor in zip(others, (1, 2, -1, -2), strict=True):
                router.weight[number] = factor * direction
            if getattr(router, "bias", None) is not None:
                router.bias.zero_()


def five_experts(architecture: str, **changes) -> PreTrainedModel:
    count = "num_experts" if architecture == "qwen3_moe" else "num_local_experts"
    return make_model(architecture, **{count: 5}, **changes)


def pruned(architecture: str, method: str = "wanda", pattern: str = "2:4", **changes) -> tuple:
    model = make_model(architecture)
    pruner = Pruner.from_pretrained(model)
    pruner.prune(make_config(method, pattern, **changes))
    return model, pruner.report


@pytest.fixture
def fp32(monkeypatch):
    """Forward passes in fp32 also where the machine multiplies bf16."""
    monkeypatch.setattr("optimum_sparse.kernels.precision._multiplies_bf16", lambda device: False)


# ---- statistics


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_statistics_are_those_of_exactly_the_routed_tokens(architecture: str, padded: bool):
    model = make_model(architecture)
    batches = [{"input_ids": token_ids(8, seed=seed)} for seed in (1, 2)]
    if padded:
        batches[1]["attention_mask"] = torch.ones_like(batches[1]["input_ids"])
        batches[1]["attention_mask"][:3, 15:] = 0
    evidence = evidence_of(model, batches)
    assert len(evidence) == 2 * 4 * 2
    enough = 0
    for layer in range(2):
        inputs = [routed_inputs(model, layer, batch) for batch in batches]
        for matrix in MATRICES:
            for expert in range(4):
                found = evidence[f"model.layers.{layer}.mlp.experts.{expert}.{matrix}"]
                x = torch.cat([part[matrix, expert] for part in inputs])
                assert found.routed == len(x)
                if len(x) < x.shape[1]:  # the rule for experts with too few tokens
                    x = torch.cat([part[f"all {matrix}", expert] for part in inputs])
                else:
                    enough += 1
                assert found.stats.tokens == len(x)
                torch.testing.assert_close(found.stats.gram.double(), x.T @ x / len(x), rtol=1e-4, atol=1e-5)
    assert enough >= 12


@pytest.mark.parametrize("method", [Wanda(), SparseGPT()], ids=lambda method: type(method).__name__)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_experts_are_pruned_as_by_hand_with_their_tokens(architecture: str, method, fp32):
    model = make_model(architecture)
    batches = [{"input_ids": token_ids(16, seed=seed)} for seed in (1, 2)]
    inputs = [routed_inputs(model, 0, batch) for batch in batches]
    wanted = {}
    for matrix in MATRICES:
        for expert in range(4):
            x = torch.cat([part[matrix, expert] for part in inputs]).float()
            if len(x) < x.shape[1]:
                x = torch.cat([part[f"all {matrix}", expert] for part in inputs]).float()
            stats = InputStats(x.shape[1], method.needs)
            stats.update(x)
            weight = expert_matrix(model, 0, matrix, expert).float()
            wanted[matrix, expert] = method.solve(weight, stats, NM(2, 4)).weight
    name = type(method).__name__.lower()
    Pruner.from_pretrained(model).prune(
        make_config(name, targets=["experts"], num_samples=32, **PAPER), dataset=batches
    )
    for (matrix, expert), weight in wanted.items():
        got = expert_matrix(model, 0, matrix, expert)
        assert_pattern(got, "2:4")
        assert (got != 0).eq(weight != 0).float().mean() > 0.99
        same = (got != 0).eq(weight != 0).all(1)  # a mask that differs by rounding changes its row
        torch.testing.assert_close(got[same], weight[same], rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_down_is_fitted_to_what_the_pruned_gate_and_up_give(architecture: str, fp32):
    """Routers see what is before the experts, so the routing of the first block stays."""
    seen = {}

    class Noting(SparseGPT):
        def solve(self, weight, stats, pattern):
            seen[len(seen)] = stats.gram
            return super().solve(weight, stats, pattern)

    model = make_model(architecture, num_hidden_layers=1)
    batch = {"input_ids": token_ids(64)}
    Pruner.from_pretrained(model).prune(
        make_config(targets=["experts"], num_samples=64, staged=True), dataset=[batch], method=Noting()
    )
    inputs = routed_inputs(model, 0, batch)
    grams = [x.T @ x / len(x) for (matrix, _), x in inputs.items() if matrix == "down_proj" and len(x) >= x.shape[1]]
    assert len(grams) >= 3
    for gram in grams:
        assert any(
            found.shape == gram.shape and torch.allclose(found.double(), gram, rtol=1e-3, atol=1e-4)
            for found in seen.values()
        )


def test_shifts_towards_the_dense_path_are_those_of_tokens_that_both_paths_route_alike():
    model = make_model("mixtral")
    plan = make_plan(model, make_config(targets=["experts"]))
    calls = record_calls(model, [block.module for block in plan.blocks], [{"input_ids": token_ids(32)}])
    other = calls.hidden[0] + 0.3 * torch.randn(calls.hidden[0].shape, generator=torch.Generator().manual_seed(0))
    block, seen = plan.blocks[0], []
    with torch.no_grad(), plan.onload(block.module):
        layout = find_layout(block, 0, calls)
        dense = [linear.weight.data for linear in block.linears]
        evidence = collect(layout.groups, layout, block, 0, calls, Needs.GRAM, dense=(dense, [other]))
        handle = block.module.mlp.experts.register_forward_pre_hook(lambda module, args: seen.append(args))
        calls.run(block.module, 0, 0)
        calls.run(block.module, 0, 0, other)
        handle.remove()
    (x, chosen, _), (x_d, chosen_d, _) = seen
    different = 0
    for group, found in zip(layout.groups, evidence, strict=True):
        _, expert, matrix = group[0].name.rsplit(".", 2)
        if matrix == "down_proj" or found.routed < 32:
            continue
        mine, also = (chosen == int(expert)).any(1), (chosen_d == int(expert)).any(1)
        different += int((mine & ~also).sum())
        change = torch.where(also[:, None], x_d - x, 0)[mine].double()
        wanted = change.T @ x[mine].double() / mine.sum()
        torch.testing.assert_close(found.shift.mean.double(), wanted, rtol=1e-4, atol=1e-5)
    assert different > 10


def test_tokens_of_an_expert_weigh_what_is_felt_of_them_at_the_output_of_the_block():
    model = make_model("qwen3_moe")
    batch = {"input_ids": token_ids(32)}
    plan = make_plan(model, make_config(targets=["experts"]))
    calls = record_calls(model, [block.module for block in plan.blocks], [batch])
    block, seen = plan.blocks[0], []
    felt = torch.randn(32 * TOKENS, generator=torch.Generator().manual_seed(0)).exp()
    with torch.no_grad(), plan.onload(block.module):
        layout = find_layout(block, 0, calls)
        handle = block.module.mlp.experts.register_forward_pre_hook(lambda module, args: seen.append(args))
        sensitivity = Sensitivity({block.name: [felt]}, {})
        evidence = collect(layout.groups, layout, block, 0, calls, Needs.GRAM, sensitivity=sensitivity)
        handle.remove()
    hidden, chosen, _ = seen[0]
    compared = 0
    for group, found in zip(layout.groups, evidence, strict=True):
        _, expert, matrix = group[0].name.rsplit(".", 2)
        if matrix == "gate_up_proj" and found.routed >= 32:
            mine = (chosen == int(expert)).any(1)
            x, weight = hidden[mine].double(), felt[mine].double().sqrt()
            wanted = (x.T * weight) @ x / weight.sum()
            torch.testing.assert_close(found.stats.gram.double(), wanted, rtol=1e-4, atol=1e-5)
            compared += 1
    assert compared >= 3


@pytest.mark.parametrize("staged", [False, True])
def test_statistics_of_some_experts_at_a_time_change_nothing(staged: bool, monkeypatch):
    config = dict(method="sparsegpt", staged=staged, input_shift=0.5, residual_shift=0.5)
    wanted, _ = pruned("qwen3_moe", **config)
    passes = []
    monkeypatch.setattr(loop, "collect", lambda *args, **kwargs: passes.append(0) or collect(*args, **kwargs))
    pruned("qwen3_moe", **config)
    usual, passes[:] = len(passes), []
    monkeypatch.setattr(loop, "STATISTICS", 4 * 3 * 32 * 32)
    got, _ = pruned("qwen3_moe", **config)
    assert len(passes) > usual
    assert_same_weights(got, wanted)


# ---- experts with too few tokens


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_an_expert_without_tokens_sees_all_of_its_layer_and_is_named(architecture: str):
    model = five_experts(architecture)
    make_unpopular(model, 3)
    batches = [{"input_ids": token_ids(16, seed=seed)} for seed in (1, 2)]
    evidence = evidence_of(model, batches)
    inputs = [routed_inputs(model, 1, batch) for batch in batches]
    for matrix in MATRICES:
        found = evidence[f"model.layers.1.mlp.experts.3.{matrix}"]
        x = torch.cat([part[f"all {matrix}", 3] for part in inputs])
        assert (found.routed, found.stats.tokens) == (0, 2 * 16 * TOKENS)
        torch.testing.assert_close(found.stats.gram.double(), x.T @ x / len(x), rtol=1e-4, atol=1e-5)
    pruner = Pruner.from_pretrained(model)
    pruner.prune(make_config(), dataset=batches)
    report = PruningReport.from_dict(json.loads(pruner.report.to_json()))
    few = [layer.name for layer in report.layers if layer.too_few_routed]
    assert {f"model.layers.{layer}.mlp.experts.3.{matrix}" for layer in range(2) for matrix in MATRICES} <= {*few}
    assert not any(".experts.0." in name for name in few)
    (line,) = [line for line in str(report).splitlines() if line.startswith("fewer routed tokens than inputs")]
    assert f"all tokens of the layer were used: {', '.join(few[:3])}" in line
    assert not [layer for layer in report.skipped if "experts" in layer.name]
    for layer in range(2):
        for matrix in MATRICES:
            assert_pattern(expert_matrix(model, layer, matrix, 3), "2:4")


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_one_sequence_of_few_tokens(method: str):
    model = make_model("mixtral")
    ids = token_ids(1, 8)
    pruner = Pruner.from_pretrained(model)
    pruner.prune(make_config(method, dataset=ids, num_samples=1, sequence_length=8))
    experts = [layer for layer in pruner.report.layers if "experts" in layer.name]
    assert len(experts) == 16
    assert all(layer.too_few_routed and layer.skipped is None for layer in experts)
    for layer in range(2):
        assert sum(part.routed for part in experts if part.name.startswith(f"model.layers.{layer}.")) == 2 * 8 * 2


# ---- every method, pattern and rule


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(
    "changes",
    [
        dict(method="magnitude"),
        dict(method="wanda", pattern="unstructured", allocation="owl"),
        dict(method="sparsegpt", pattern="unstructured", allocation="error"),
        dict(method="rose", pattern="4:8", denser={"dense": 0.1}),
        dict(method="admm", refine="pcg"),
        dict(method="admm", refine="reconstruct", reconstruction_passes=2),
    ],
    ids=lambda changes: changes["method"] + changes.get("refine", ""),
)
def test_every_method(architecture: str, changes: dict):
    model, report = pruned(architecture, **changes)
    assert {layer.skipped for layer in report.skipped} <= {
        f"{kind}TopKRouter, not a linear" for kind in ("Mixtral", "Qwen3Moe", "GptOss")
    } | {"left dense by denser"}
    assert len(report.pruned) + ("denser" in changes) * len(report.skipped) >= 24
    pattern = changes.get("pattern", "2:4")
    for layer in report.pruned:
        if "experts" in layer.name:
            _, _, number, _, _, expert, matrix = layer.name.split(".")
            weight = expert_matrix(model, int(number), matrix, int(expert))
            assert layer.shape == list(weight.shape)
            assert (weight == 0).float().mean().item() == pytest.approx(layer.sparsity)
            if pattern != "unstructured":
                assert_pattern(weight, pattern)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_second_order_methods_lose_less_on_the_tokens_of_each_expert(architecture: str):
    """The output of each matrix on its tokens, in float64: the real measure of what was solved."""
    losses = {}
    for method in ("magnitude", "wanda", "sparsegpt"):
        dense, (model, _) = (
            make_model(architecture),
            pruned(architecture, method, dataset=token_ids(64), num_samples=64),
        )
        inputs = routed_inputs(dense, 0, {"input_ids": token_ids(64)})
        losses[method] = sum(
            output_error(
                expert_matrix(dense, 0, "gate_up_proj", expert),
                expert_matrix(model, 0, "gate_up_proj", expert),
                inputs["gate_up_proj", expert],
            )
            for expert in range(4)
        )
    assert losses["sparsegpt"] < losses["wanda"] < losses["magnitude"]


def test_rules_by_the_name_of_an_expert():
    model, report = pruned(
        "qwen3_moe",
        layers={f"{NAME}.1": "dense", f"{NAME}.2.down_proj": 0.25, "re:.*\\.experts\\.3\\.gate_up_proj": "4:8"},
        ignore=["model.layers.1.mlp"],
        targets=["experts"],
    )
    before = weights_of(make_model("qwen3_moe"))
    found = {layer.name: layer for layer in report.layers}
    assert found[f"{NAME}.0.gate_up_proj"].pattern == "2:4"
    assert found[f"{NAME}.1.down_proj"].skipped == f"dense by layers['{NAME}.1']"
    assert torch.equal(expert_matrix(model, 0, "down_proj", 1), before[f"{NAME}.down_proj"][1])
    assert_pattern(expert_matrix(model, 0, "down_proj", 2), "unstructured", 0.25)
    assert_pattern(expert_matrix(model, 0, "gate_up_proj", 3), "4:8")
    assert found["model.layers.1.mlp.experts"].skipped == "ignored by 'model.layers.1.mlp'"
    assert found["model.layers.0.self_attn.q_proj"].skipped == "not in targets"
    name = "model.layers.1.mlp.experts.gate_up_proj"
    assert torch.equal(model.state_dict()[name], before[name])


def test_names_of_experts_that_do_not_exist_are_refused():
    with pytest.raises(ValueError, match=r"ignore names 'experts\.4', which matches no module"):
        pruned("mixtral", ignore=["experts.4"])


def test_widths_of_experts_that_do_not_divide():
    with pytest.raises(ValueError, match=r"model\.layers\.0\.mlp\.experts\.0\.down_proj has 66, pattern 2:4"):
        Pruner.from_pretrained(make_model("mixtral", intermediate_size=66)).prune(make_config())


def test_a_failure_half_way_puts_the_model_together():
    class Failing:
        needs = Needs.GRAM

        def solve(self, weight, stats, pattern):
            raise ZeroDivisionError

    model = make_model("gpt_oss")
    before, kind = weights_of(model), type(model.model.layers[0].mlp.experts)
    with pytest.raises(ZeroDivisionError):
        Pruner.from_pretrained(model).prune(make_config(), method=Failing())
    assert type(model.model.layers[0].mlp.experts) is kind
    assert_same_weights(model, before)


# ---- on disk


MIXED = dict(layers={f"{NAME}.1": "dense", f"{NAME}.2.down_proj": 0.25, "model.layers.1.mlp": "dense"})


@pytest.mark.skipif(not hasattr(transformers, "LagunaConfig"), reason="an older transformers")
@pytest.mark.parametrize("run_compressed", [False, True])
def test_names_of_modules_that_loading_would_rename(run_compressed: bool, tmp_path):
    """transformers takes "mlp.shared_expert." for a pattern, which fits "mlp.shared_experts" as well."""
    sizes = dict(vocab_size=200, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
    heads = dict(num_key_value_heads=2, head_dim=8, max_position_embeddings=64, sliding_window=8, pad_token_id=2)
    experts = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, shared_expert_intermediate_size=16)
    config = transformers.LagunaConfig(**sizes, **heads, **experts)
    model = Pruner.from_pretrained(AutoModelForCausalLM.from_config(config).eval()).prune(make_config("magnitude"))
    model.save_pretrained(tmp_path / "one")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "one", run_compressed=run_compressed)
    torch.testing.assert_close(logits(again), logits(model))
    again.save_pretrained(tmp_path / "two")
    assert stored_tensors(tmp_path / "two").keys() == stored_tensors(tmp_path / "one").keys()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(
    "changes",
    [{}, dict(pattern="unstructured"), MIXED, dict(targets=["down_proj"])],
    ids=["2:4", "unstructured", "mixed", "down"],
)
def test_round_trips(architecture: str, changes: dict, tmp_path):
    model, report = pruned(architecture, **changes)
    model.save_pretrained(tmp_path / "one")
    tensors = stored_tensors(tmp_path / "one")
    for layer in report.pruned:
        assert f"{layer.name}.weight_mask" in tensors
        assert tensors[f"{layer.name}.weight"].shape != tuple(layer.shape)
    count = sum(1 for layer in report.pruned)
    for run_compressed in (False, True):
        loaded, info = AutoModelForCausalLM.from_pretrained(
            tmp_path / "one", run_compressed=run_compressed, output_loading_info=True
        )
        assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        assert sum(isinstance(module, SparseLinear) for module in loaded.modules()) == run_compressed * count
        assert any(isinstance(module, Experts) for module in loaded.modules()) == run_compressed
        torch.testing.assert_close(logits(loaded), logits(model))
        assert loaded.hf_quantizer.report.to_dict() == report.to_dict()
        if not run_compressed:
            assert_same_weights(loaded, model)
        loaded.save_pretrained(tmp_path / f"again{run_compressed}")
        assert files_of(tmp_path / f"again{run_compressed}") == files_of(tmp_path / "one")
        loaded.dequantize()
        assert_same_weights(loaded, model)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_prune_on_load_in_bfloat16_and_run_compressed(architecture: str, tmp_path):
    make_model(architecture).bfloat16().save_pretrained(tmp_path / "dense")
    config = make_config("sparsegpt", "unstructured")
    load = AutoModelForCausalLM.from_pretrained
    model = load(tmp_path / "dense", sparsity_config=config, dtype="auto")
    small = load(tmp_path / "dense", sparsity_config=config, dtype="auto", run_compressed=True)
    assert isinstance(small.model.layers[0].mlp.experts, Experts)
    for number, (one, folder) in enumerate(((model, "one"), (small, "two"))):
        one.save_pretrained(tmp_path / folder, max_shard_size="20KB")
        again = load(tmp_path / folder, dtype="auto", run_compressed=bool(number))
        assert again.dtype == torch.bfloat16
        torch.testing.assert_close(logits(again), logits(one))
        assert again.generate(token_ids(1, 4), max_new_tokens=4, do_sample=False).shape == (1, 8)
    one, two = stored_tensors(tmp_path / "one"), stored_tensors(tmp_path / "two")
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_other_readers_fail_and_exported_checkpoints_load(tmp_path):
    """Whatever of the experts is pruned: without this package there must be an error, and never random numbers."""
    folders = []
    for architecture in ARCHITECTURES:
        for targets in (["experts"], ["gate_up_proj"]):
            folders.append(tmp_path / f"{architecture}-{targets[0]}")
            model, _ = pruned(architecture, "magnitude", targets=targets)
            model.save_pretrained(folders[-1])
            export_dense(str(folders[-1]), tmp_path / f"{architecture}-{targets[0]}-dense")
            assert_same_weights(AutoModelForCausalLM.from_pretrained(f"{folders[-1]}-dense"), model)
            info = inspect(str(folders[-1]))
            assert len(info.matrices) == len(targets) * 2 * 4 * (2 if targets == ["experts"] else 1)
            on_disk = sum(tensor.nbytes for tensor in stored_tensors(folders[-1]).values())
            assert sum(matrix[2] for matrix in info.matrices.values()) + info.other_bytes == on_disk
    code = """
import sys
from transformers import AutoModelForCausalLM
for folder in sys.argv[1:]:
    AutoModelForCausalLM.from_pretrained(folder + "-dense")
    try:
        AutoModelForCausalLM.from_pretrained(folder)
    except Exception as error:
        print(type(error).__name__)
"""
    result = run_python(code, *map(str, folders))
    assert result.returncode == 0, result.stderr
    assert len(result.stdout.split()) == len(folders)


def change(folder, name: str, tensor: Tensor | None) -> None:
    """A tensor of a checkpoint in another form; None: it is not there."""
    file = folder / "model.safetensors"
    tensors = load_file(file) | {name: tensor}
    save_file({key: value for key, value in tensors.items() if value is not None}, file, {"format": "pt"})


@pytest.mark.parametrize("run_compressed", [False, True])
@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        (f"{NAME}.2.gate_up_proj.weight_mask", None, r"experts\.2\.gate_up_proj is stored as"),
        (f"{NAME}.2.gate_up_proj.weight", torch.ones(32, 15), r"experts\.2\.gate_up_proj\.weight has shape"),
        (f"{NAME}.1.down_proj.weight", None, r"experts\.1\.down_proj is stored as"),
        (f"{NAME}.1.down_proj.weight", torch.ones(16, 32), r"experts\.1\.down_proj\.weight has shape"),
        (f"{NAME}.1.down_proj.weight_mask", torch.ones(32, 2, dtype=torch.uint8), r"experts\.1\.down_proj"),
        (
            f"{NAME}.0.down_proj.weight_mask",
            torch.ones(32, 2, dtype=torch.uint8),
            r"experts\.0\.down_proj: weight_mask",
        ),
    ],
)
def test_damaged_checkpoints_are_refused_with_the_name_of_the_expert(name, tensor, message, run_compressed, tmp_path):
    pruned("qwen3_moe", "magnitude", **MIXED)[0].save_pretrained(tmp_path)
    change(tmp_path, name, tensor)
    with pytest.raises(ValueError, match=message):
        AutoModelForCausalLM.from_pretrained(tmp_path, run_compressed=run_compressed)


def test_experts_that_the_model_does_not_have_are_refused(tmp_path):
    pruned("qwen3_moe", "magnitude")[0].save_pretrained(tmp_path)
    change(tmp_path, f"{NAME}.4.down_proj.weight", torch.ones(32, 8))
    with pytest.raises(ValueError, match=r"model\.layers\.0\.mlp\.experts: the file has more experts than 4 for down"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


# ---- offloaded


@pytest.mark.parametrize("where", ["cpu", "disk"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_offloaded_models_give_the_same_checkpoint(architecture: str, where: str, tmp_path):
    config = make_config("sparsegpt")
    make_model(architecture).save_pretrained(tmp_path / "dense")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    Pruner.from_pretrained(model).prune(config)
    model.save_pretrained(tmp_path / "wanted")
    if where == "cpu":
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
        cpu_offload(model, "cpu", state_dict={name: t.clone() for name, t in model.state_dict().items()})
    else:
        inside = ["model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head", "model.layers.1"]
        device_map = dict.fromkeys(inside, "cpu") | {"model.layers.0": "disk"}
        model = AutoModelForCausalLM.from_pretrained(
            tmp_path / "dense", device_map=device_map, offload_folder=tmp_path / "offload"
        )
    Pruner.from_pretrained(model).prune(config)
    assert model.model.layers[0].mlp.experts.down_proj.is_meta
    model.save_pretrained(tmp_path / "got")
    got, wanted = stored_tensors(tmp_path / "got"), stored_tensors(tmp_path / "wanted")
    assert set(got) == set(wanted)
    assert not [name for name in got if not torch.equal(got[name], wanted[name])]
    for run_compressed in (False, True):
        torch.testing.assert_close(
            logits(AutoModelForCausalLM.from_pretrained(tmp_path / "got", run_compressed=run_compressed)),
            logits(model),
        )


def test_from_disk_to_disk_no_block_is_planned_again_for_every_other(tmp_path, monkeypatch):
    """Or deep models of many experts would wait for it."""
    made = []
    original = Experts.__init__
    monkeypatch.setattr(Experts, "__init__", lambda self, *args: (made.append(self), original(self, *args))[1])
    make_model("mixtral", num_hidden_layers=5).save_pretrained(tmp_path / "dense")
    Pruner.from_pretrained(tmp_path / "dense").prune_to_disk(make_config("magnitude"), tmp_path / "sparse")
    assert len(made) <= 2 * 5
