"""Fisher information: squared gradients as plain autograd gives them, token by token."""

import copy

import pytest
import torch
from accelerate import cpu_offload
from models import make_config, make_model, token_ids
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from optimum_sparse import Pruner
from optimum_sparse.hf import sensitivity
from optimum_sparse.hf.blocks import make_plan
from optimum_sparse.hf.sensitivity import fisher
from optimum_sparse.pipeline import Block, Sensitivity


SEED = 5


def blocks_of(model: PreTrainedModel) -> list[Block]:
    return make_plan(model, make_config(ignore=["experts"] if "Mixtral" in type(model).__name__ else [])).blocks


def batches_of(size: int, padded: str | None = None, samples: int = 4, tokens: int = 9) -> list[dict[str, Tensor]]:
    ids = token_ids(samples, tokens)
    batches = [{"input_ids": part} for part in ids.split(size)]
    if padded:
        mask = torch.ones_like(ids)
        for row, length in enumerate([3, 0, 5, 1]):
            mask[row, slice(0, length) if padded == "left" else slice(tokens - length, tokens)] = 0
        for batch, part in zip(batches, mask.split(size), strict=True):
            batch["attention_mask"] = part
    return batches


def by_hand(model: PreTrainedModel, batches: list[dict[str, Tensor]]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Gradients of one token's log-likelihood after the other, summed, squared: nothing is recomputed."""
    outputs: dict[str, Tensor] = {}
    blocks = blocks_of(model)
    parts = [part for block in blocks for part in (block, *block.linears)]
    linears = [linear.name for block in blocks for linear in block.linears]

    def keep(name: str):
        def hook(module: nn.Module, args: tuple, output) -> None:
            outputs[name] = output[0] if isinstance(output, tuple) else output

        return hook

    handles = [part.module.register_forward_hook(keep(part.name)) for part in parts]
    tokens: dict[str, list[Tensor]] = {part.name: [] for part in parts}
    rows: dict[str, Tensor] = dict.fromkeys(linears, 0)
    sequence, total = 0, 0
    for batch in batches:
        for row in range(len(batch["input_ids"])):
            one = {name: tensor[row : row + 1] for name, tensor in batch.items()}
            logits = model(**one, use_cache=False).logits[0, :-1]
            drawn = torch.Generator().manual_seed(SEED + sequence)
            labels = torch.multinomial(logits.float().softmax(-1), 1, generator=drawn)[:, 0]
            mask = one.get("attention_mask", torch.ones_like(one["input_ids"]))[0]
            names = list(outputs)
            gradients = {name: torch.zeros_like(outputs[name]) for name in names}
            for t, label in enumerate(labels.tolist()):
                if not (mask[t] and mask[t + 1]):
                    continue
                loss = -logits[t].double().log_softmax(-1)[label]
                found = torch.autograd.grad(loss, [outputs[name] for name in names], retain_graph=True)
                for name, gradient in zip(names, found, strict=True):
                    gradients[name] += gradient
            for name, gradient in gradients.items():
                squares = gradient.double().square().flatten(0, -2)
                tokens[name].append(squares.sum(1))
                if name in rows:
                    rows[name] = rows[name] + squares.sum(0)
            sequence, total = sequence + 1, total + len(mask)
    for handle in handles:
        handle.remove()
    return {name: torch.cat(t) for name, t in tokens.items()}, {name: r / total for name, r in rows.items()}


def assert_close(found: Sensitivity, tokens: dict[str, Tensor], rows: dict[str, Tensor]) -> None:
    assert set(found.tokens) == set(tokens)
    assert set(found.rows) == set(rows)
    for name, expected in tokens.items():
        got = torch.cat(found.tokens[name]).double()
        torch.testing.assert_close(got, expected.double(), rtol=1e-3, atol=1e-5 * expected.max().item())
    for name, expected in rows.items():
        got = found.rows[name].double()
        torch.testing.assert_close(got, expected.double(), rtol=1e-3, atol=1e-5 * expected.max().item())
        assert got.dtype == torch.float64
        assert (got > 0).any()


@pytest.mark.parametrize("padded", [None, "left", "right"])
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "phi", "gemma3", "opt", "mixtral"])
def test_squares_are_those_of_plain_autograd(architecture: str, padded: str | None):
    model = make_model(architecture)
    batches = batches_of(2 if padded is None else 1, padded)
    assert_close(fisher(model, blocks_of(model), batches, SEED), *by_hand(model, batches))


@pytest.mark.parametrize("padded", [None, "left", "right"])
def test_the_batch_size_does_not_matter(padded: str | None, monkeypatch: pytest.MonkeyPatch):
    model = make_model("llama")
    results = [fisher(model, blocks_of(model), batches_of(size, padded), SEED) for size in (1, 3, 4)]
    monkeypatch.setitem(sensitivity.LOGITS, "cpu", 2 * 9 * 200)  # two sequences at a time
    parts, forward = [], type(model).forward

    def counted(self, **kwargs):
        parts.append(len(kwargs["input_ids"]))
        return forward(self, **kwargs)

    monkeypatch.setattr(type(model), "forward", counted)
    results.append(fisher(model, blocks_of(model), batches_of(3, padded), SEED))
    assert parts == [2, 1, 1]
    assert [len(t) for t in results[3].tokens["model.layers.0"]] == [27, 9]
    for other in results[1:]:
        tokens = {name: torch.cat(t) for name, t in results[0].tokens.items()}
        assert_close(other, tokens, results[0].rows)


def test_the_seed_draws_the_labels():
    model = make_model("llama")
    one, same, other = (fisher(model, blocks_of(model), batches_of(4), seed).rows for seed in (0, 0, 1))
    for name, rows in one.items():
        assert torch.equal(rows, same[name])
        assert not torch.allclose(rows, other[name], rtol=1e-2)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_feels_nothing_and_is_in_its_place(side: str):
    model = make_model("llama")
    batches = batches_of(4, side)
    found = fisher(model, blocks_of(model), batches, SEED)
    real = batches[0]["attention_mask"].bool()
    for name, (felt,) in found.tokens.items():
        felt = felt.view(4, 9)
        assert (felt[~real] == 0).all(), name
        predicts = real.clone()  # the last real token's output matters to nothing after it
        for row in range(4):
            first, *_, last = real[row].nonzero()[:, 0].tolist()
            predicts[row, last] = False
            if name.endswith("q_proj"):  # the first attends to itself alone, whatever it asks for
                predicts[row, first] = False
        assert (felt[predicts] > 0).all(), name


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("outer", [torch.enable_grad, torch.no_grad])
def test_the_model_is_left_as_it_was(outer, fails: bool, monkeypatch: pytest.MonkeyPatch):
    model = make_model("llama")
    model.model.layers[0].mlp.up_proj.weight.requires_grad_(False)
    model.model.embed_tokens.weight.requires_grad_(False)
    model.lm_head.weight.grad = torch.ones_like(model.lm_head.weight)
    before = [(id(p), p.requires_grad, p.grad) for p in model.parameters()]
    values = [p.detach().clone() for p in model.parameters()]
    state = torch.get_rng_state()

    def find() -> None:
        with outer():
            fisher(model, blocks_of(model), batches_of(2), SEED)

    if fails:

        def broken(*args, **kwargs):
            raise RuntimeError("broken")

        monkeypatch.setattr(type(model.model.layers[1].mlp), "forward", broken)
        with pytest.raises(RuntimeError, match="broken"):
            find()
    else:
        find()
    assert [(id(p), p.requires_grad, p.grad) for p in model.parameters()] == before
    assert all(torch.equal(p, value) for p, value in zip(model.parameters(), values, strict=True))
    assert torch.equal(torch.get_rng_state(), state)
    for module in model.modules():
        assert not module._forward_hooks
        assert "forward" not in vars(module)


def test_offloaded_models_feel_the_same_and_are_offloaded_again():
    model = make_model("llama")
    wanted = fisher(model, blocks_of(model), batches_of(2), SEED)
    offloaded = copy.deepcopy(model)
    cpu_offload(offloaded, execution_device="cpu")
    found = fisher(offloaded, blocks_of(offloaded), batches_of(2), SEED)
    for name, tokens in wanted.tokens.items():
        assert all(torch.equal(a, b) for a, b in zip(found.tokens[name], tokens, strict=True))
    for name, rows in wanted.rows.items():
        assert torch.equal(found.rows[name], rows)


def test_no_weight_of_an_offloaded_model_stays_loaded():
    model = make_model("llama")
    cpu_offload(model, execution_device="cpu")
    fisher(model, blocks_of(model), batches_of(2), SEED)
    assert not [name for name, parameter in model.named_parameters() if not parameter.is_meta]


def test_a_device_map_with_blocks_on_the_cpu_offload_feels_the_same(tiny_llama, tmp_path):
    wanted = fisher(*with_blocks(AutoModelForCausalLM.from_pretrained(tiny_llama)), batches_of(2), SEED)
    model = AutoModelForCausalLM.from_pretrained(
        tiny_llama,
        device_map={"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
        | {"model.layers.0": "disk", "model.layers.1": "cpu"},
        offload_folder=tmp_path,
    )
    assert model.model.layers[0].mlp.up_proj.weight.is_meta
    found = fisher(*with_blocks(model), batches_of(2), SEED)
    assert all(torch.equal(found.rows[name], rows) for name, rows in wanted.rows.items())


def with_blocks(model: PreTrainedModel) -> tuple[PreTrainedModel, list[Block]]:
    return model, blocks_of(model)


def test_names_are_those_of_blocks_and_linears():
    model = make_model("llama")
    plan = make_plan(model, make_config(targets=["layers.1.mlp"]))
    found = fisher(model, plan.blocks, batches_of(4), SEED)
    mlp = [f"model.layers.1.mlp.{name}_proj" for name in ("gate", "up", "down")]
    assert set(found.rows) == set(mlp)
    assert set(found.tokens) == {"model.layers.0", "model.layers.1", *mlp}
    assert found.rows["model.layers.1.mlp.down_proj"].shape == (32,)


def test_a_model_without_a_head_is_pruned_by_default_as_before():
    """Or refused in words: it has no likelihood."""
    Pruner(make_model("llama").model).prune(make_config("sparsegpt"))


def test_offloaded_parameters_require_gradients_again():
    model = cpu_offload(make_model("llama"), execution_device="cpu")
    Pruner.from_pretrained(model).prune(make_config("sparsegpt"))
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize(
    ("damaged", "named"),
    [
        ("model.layers.1.post_attention_layernorm", r"the inputs of model\.layers\.1\.mlp\.(gate|up)_proj"),
        ("model.layers.0.mlp.up_proj", r"the outputs of model\.layers\.0\.mlp\.up_proj"),
        ("model.embed_tokens", r"the inputs of model\.layers\.0\.self_attn\.q_proj"),
        ("lm_head", "the logits"),
    ],
)
def test_what_is_not_finite_first_is_named(damaged: str, named: str):
    model = make_model("llama")
    model.get_submodule(damaged).register_forward_hook(lambda module, args, output: output * float("nan"))
    batch = torch.arange(3, 27).repeat(6, 1)
    with pytest.raises(ValueError, match=rf"^{named} hold NaN or infinity: .* \(torch\.float32\) on this data\.$"):
        Pruner.from_pretrained(model).prune(make_config("sparsegpt", dataset=batch, sequence_length=24))


@pytest.mark.parametrize("bf16", [False, True])
def test_the_second_pass_has_the_arithmetic_of_the_first(bf16: bool, monkeypatch):
    """A router that chose other experts then would give tensors of other shapes."""
    monkeypatch.setattr("optimum_sparse.kernels.precision._multiplies_bf16", lambda device: bf16)
    model = make_model("mixtral")
    seen = []

    def note(module: nn.Module, args: tuple) -> None:
        seen.append((torch.is_autocast_enabled("cpu"), torch.backends.mkldnn.matmul.fp32_precision))

    for block in model.model.layers:
        block.mlp.register_forward_pre_hook(note)
    fisher(model, blocks_of(model), batches_of(4), SEED)
    assert len(seen) == 4
    assert set(seen) == {(bf16, "bf16" if bf16 else "tf32")}


@pytest.mark.parametrize("before", [(False, False), (True, True)])
def test_attention_alone_is_asked_to_be_repeatable(before: tuple[bool, bool]):
    """PyTorch's switch is on in the steps of attention's backward pass, and in no other."""
    asked: dict[bool, list[str]] = {True: [], False: []}
    try:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        model, ids = make_model("llama"), token_ids(2, 9)
        expected = torch.autograd.grad(model(ids).logits.square().sum(), list(model.parameters()))
        with sensitivity._RepeatableAttention():
            loss = model(ids).logits.square().sum()
        todo, seen = [loss.grad_fn], set()
        while todo:
            step = todo.pop()
            if step is None or step in seen:
                continue
            seen.add(step)
            todo += [further for further, _ in step.next_functions]

            def note(*_: object, name: str = step.name()) -> None:
                asked[torch.are_deterministic_algorithms_enabled() and not before[0]].append(name)

            step.register_prehook(note)
        found = torch.autograd.grad(loss, list(model.parameters()))
        left = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
    assert left == before
    assert all(torch.equal(gradient, other) for gradient, other in zip(found, expected, strict=True))
    if not before[0]:
        assert len(asked[True]) == len(model.model.layers)
        assert all(name.startswith("ScaledDotProduct") for name in asked[True])
        assert len(asked[False]) > 20


@pytest.mark.parametrize("architecture", ["mixtral", "qwen3_moe", "gpt_oss"])
def test_rows_of_experts(architecture: str, monkeypatch):
    """Against a plain backward pass through the experts taken apart; one sequence per batch."""
    monkeypatch.setattr("optimum_sparse.kernels.precision._multiplies_bf16", lambda device: False)
    model = make_model(architecture)
    plan = make_plan(model, make_config(targets=["experts"]))
    batches = batches_of(1)
    found = fisher(model, plan.blocks, batches, SEED, plan.taken_apart)
    outputs: list[tuple[str, Tensor]] = []
    for name, experts in plan.experts.items():
        experts.take()
        model.set_submodule(name, experts)

    def keep(name: str):
        def hook(module: nn.Module, args: tuple, output: Tensor) -> None:
            output.retain_grad()
            outputs.append((name, output))

        return hook

    for linear in plan.linears.values():
        linear.module.register_forward_hook(keep(linear.name))
    for number, batch in enumerate(batches):
        logits = model(**batch, use_cache=False).logits[0, :-1]
        drawn = torch.Generator().manual_seed(SEED + number)
        labels = torch.multinomial(logits.float().softmax(-1), 1, generator=drawn)[:, 0]
        nn.functional.cross_entropy(logits, labels, reduction="sum").backward()
    rows: dict[str, Tensor] = {}
    for name, output in outputs:
        rows[name] = rows.get(name, 0) + output.grad.double().square().sum(0) / (4 * 9)
    assert found.rows.keys() == rows.keys()
    assert len(rows) >= 12
    for name, row in rows.items():
        torch.testing.assert_close(found.rows[name].double(), row, rtol=1e-3, atol=1e-9)
