"""Experts taken apart are the fused module: the same function, the same parameters, one linear per expert."""

import copy
import pickle

import pytest
import torch
from models import EXPERTS, make_model
from torch import Tensor, nn

from optimum_sparse.core import NM, keep_mask
from optimum_sparse.nn import Experts, SparseLinear


TOKENS, HIDDEN, CHOICES = 20, 32, 2


def fused_of(architecture: str) -> nn.Module:
    return make_model(architecture, experts_implementation="eager").model.layers[0].mlp.experts.double()


def routed(experts: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs, choices and weights, in which expert 2 is never chosen."""
    generator = torch.Generator().manual_seed(0)
    order = torch.rand(TOKENS, experts, generator=generator)
    order[:, 2] = -1
    weights = torch.rand(TOKENS, CHOICES, generator=generator, dtype=torch.float64)
    x = torch.randn(TOKENS, HIDDEN, generator=generator, dtype=torch.float64)
    return x, order.topk(CHOICES).indices, weights


@pytest.mark.parametrize("architecture", EXPERTS)
def test_the_same_function(architecture: str):
    fused = fused_of(architecture)
    experts = Experts(fused)
    experts.take()
    torch.testing.assert_close(experts(*routed()), fused(*routed()))


@pytest.mark.parametrize("architecture", EXPERTS)
@pytest.mark.parametrize("sees_all", [False, True])
@pytest.mark.parametrize("compressed", [False, True])
def test_no_tokens(architecture: str, sees_all: bool, compressed: bool):
    fused = fused_of(architecture)
    x, chosen, weights = (part[:0] for part in routed())
    wanted = fused(x, chosen, weights)
    experts = Experts(fused)
    experts.take()
    for expert in experts.members:
        expert.sees_all = sees_all
        for matrix in experts.matrices if compressed else ():
            weight = expert.get_submodule(matrix).weight.detach()
            weight = weight * keep_mask(weight.abs(), NM(2, 4))
            setattr(expert, matrix, SparseLinear.from_dense(weight, None, NM(2, 4)))
    output = experts(x, chosen, weights)
    assert output.shape == wanted.shape == (0, HIDDEN)
    assert output.dtype == wanted.dtype


@pytest.mark.parametrize("architecture", ["mixtral", "qwen3_moe"])  # gpt_oss says that it does, and raises
@pytest.mark.parametrize("left_out", ["some", "all"])
def test_a_choice_of_no_expert_adds_nothing(architecture: str, left_out: str):
    """As transformers' expert parallelism asks for, with whatever weight, for experts of other devices."""
    fused = fused_of(architecture)
    x, chosen, weights = routed()
    none = torch.rand(chosen.shape, generator=torch.Generator().manual_seed(1)) < (0.4 if left_out == "some" else 2)
    chosen, weights = chosen.masked_fill(none, 4), weights.masked_fill(none, torch.nan)
    wanted = fused(x, chosen, weights)
    experts = Experts(fused)
    experts.take()
    torch.testing.assert_close(experts(x, chosen, weights), wanted)
    experts.members[0].sees_all = True
    torch.testing.assert_close(experts(x, chosen, weights), wanted)


@pytest.mark.parametrize("architecture", EXPERTS)
def test_views_until_something_is_written(architecture: str):
    fused = fused_of(architecture)
    experts = Experts(fused)
    before = {name: parameter.clone() for name, parameter in fused.named_parameters()}
    parameters = dict(fused.named_parameters())
    storages = {name: parameter.data_ptr() for name, parameter in parameters.items()}
    experts.take()
    assert experts.members[1].down_proj.weight.untyped_storage().data_ptr() == storages["down_proj"]
    assert experts.give_back() is fused
    assert {name: parameter.data_ptr() for name, parameter in fused.named_parameters()} == storages
    experts.take()
    weight = experts.members[1].down_proj.weight
    weight.data = 2 * weight.data
    experts.give_back()
    assert all(parameter is parameters[name] for name, parameter in fused.named_parameters())
    changed = before["down_proj"].clone()
    changed[1] *= 2
    for name, parameter in fused.named_parameters():
        assert torch.equal(parameter, changed if name == "down_proj" else before[name])
    assert fused.down_proj.is_contiguous()
    assert all(linear.weight.is_meta for linear in experts.modules() if isinstance(linear, nn.Linear))


@pytest.mark.parametrize("architecture", EXPERTS)
def test_an_expert_that_sees_all_changes_no_output(architecture: str):
    experts = Experts(fused_of(architecture))
    experts.take()
    x, chosen, weights = routed()
    wanted = experts(x, chosen, weights)
    seen: dict[str, Tensor] = {}
    for number, expert in enumerate(experts.members):
        expert.sees_all = number in (1, 2)

        def note(module: nn.Module, args: tuple, expert=expert, number=number) -> None:
            assert len(expert.tokens) == len(args[0])
            seen[number] = expert.tokens

        expert.down_proj.register_forward_pre_hook(note)
    torch.testing.assert_close(experts(x, chosen, weights), wanted)
    for number in range(4):
        rows = torch.arange(TOKENS) if number in (1, 2) else (chosen == number).any(1).nonzero()[:, 0]
        assert torch.equal(seen[number], rows)
    assert all(expert.tokens is None for expert in experts.members)


@pytest.mark.parametrize("architecture", EXPERTS)
def test_compressed_experts(architecture: str):
    fused = fused_of(architecture)
    experts = Experts(fused)
    experts.take()
    for expert in experts.members[1:]:
        for matrix in experts.matrices:
            weight = expert.get_submodule(matrix).weight
            weight.data = weight.data * keep_mask(weight.data.abs(), NM(2, 4))
    experts.give_back()
    wanted = fused(*routed())
    experts.take()
    for expert in experts.members[1:]:  # the first stays dense
        for matrix in experts.matrices:
            weight = expert.get_submodule(matrix).weight
            setattr(expert, matrix, SparseLinear.from_dense(weight.detach(), None, NM(2, 4)))
    experts.keep()
    assert fused.down_proj.is_meta
    held = {tensor.untyped_storage().nbytes() for tensor in experts.state_dict().values()}
    assert max(held) <= 8 * 128 * 32, "one dense expert, and not a view into all"
    for copied in (experts, copy.deepcopy(experts), pickle.loads(pickle.dumps(experts))):
        torch.testing.assert_close(copied(*routed()), wanted)
        assert copied.fused.act_fn is copied.act_fn if hasattr(fused, "act_fn") else True
    assert {"0.down_proj.weight", "1.down_proj.weight_mask", "down_proj"} <= experts.state_dict().keys()
    assert torch.equal(experts.state_dict()["down_proj"], torch.arange(4))
