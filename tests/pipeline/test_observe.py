"""What the linears of a block see: who shares an input, who writes to the residual stream, means on both paths."""

import contextlib
import copy
import dataclasses
from collections.abc import Callable

import pytest
import torch
from helpers import ar_inputs, random_weight
from models import ARCHITECTURES, EXPERTS, make_config, make_model, token_ids
from modules import WIDTH, Attention, Decoder, block_of, blocks_of, calls_of, felt_by, normal, tokens_of
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import _get_current_function_mode_stack

from optimum_sparse.core import Needs
from optimum_sparse.hf.blocks import make_plan, record_calls
from optimum_sparse.pipeline import Block, Calls, Linear, Sensitivity, observe
from optimum_sparse.pipeline.observe import Layout, Layouts, Watch, collect, find_layout, token_weights
from optimum_sparse.pipeline.parts import dense_weights


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


class Written(nn.Module):
    """A block whose forward pass is a function; `inner` is as wide as asked for, and the rest as the stream."""

    def __init__(self, forward: Callable, inner: int = 24):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.inner, self.back = nn.Linear(WIDTH, inner), nn.Linear(inner, WIDTH)
        self._written = forward

    def forward(self, x: Tensor) -> Tensor:
        return self._written(self, x)


def layout_of(module: nn.Module, x: Tensor) -> Layout:
    return find_layout(block_of(module), 0, calls_of([x]))


def local(names) -> set[str]:
    return {name.removeprefix("block.") for name in names}


def called(layout: Layout) -> list[set[str]]:
    """Groups of what the block called."""
    return [local(linear.name for linear in group) for group in layout.groups]


# ---- who shares an input


def in_place(m: Written, x: Tensor) -> Tensor:
    x = x.clone()
    return m.a(x) + m.b(x.mul_(2))


def in_place_by_a_view(m: Written, x: Tensor) -> Tensor:
    x = x.clone()
    y = m.a(x)
    x[:, :2].zero_()
    return y + m.b(x)


def changed_when_all_is_seen(m: Written, x: Tensor) -> Tensor:
    x = x.clone()
    y = m.a(x) + m.b(x)
    x.zero_()
    return y


GROUPS = {
    "shared": (lambda m, x: m.a(x) + m.b(x) + m.c(m.a.weight.sum() + x), [{"a", "b"}, {"c"}], set()),
    "far apart": (lambda m, x: m.b(m.a(x)) + m.c(x), [{"a", "c"}, {"b"}], set()),
    "equal, but not the same": (lambda m, x: m.a(x) + m.b(x.clone()), [{"a"}, {"b"}], set()),
    "by keyword": (lambda m, x: m.a(x) + m.b(input=x), [{"a", "b"}], set()),
    "in place": (in_place, [{"a"}, {"b"}], {"a"}),
    "in place, by a view": (in_place_by_a_view, [{"a"}, {"b"}], {"a"}),
    "changed later": (changed_when_all_is_seen, [{"a", "b"}], {"a", "b"}),
}


@pytest.mark.parametrize("case", GROUPS)
def test_linears_with_the_same_input_are_a_group(case: str):
    forward, groups, changed = GROUPS[case]
    layout = layout_of(Written(forward), tokens_of()[0])
    assert called(layout)[: len(groups)] == groups
    assert local(layout.in_place) == changed
    left = {"a", "b", "c", "inner", "back"} - set().union(*groups)
    assert called(layout)[len(groups) :] == [{name} for name in sorted(left, key="abc inner back".index)]
    assert not layout.once, "inner and back were never called"


@pytest.mark.parametrize(
    ("forward", "once"),
    [
        (lambda m, x: m.a(x) + m.b(x) + m.c(x) + m.back(m.inner(x)), True),
        (lambda m, x: m.a(m.a(x)) + m.b(x) + m.c(x) + m.back(m.inner(x)), False),
        (lambda m, x: m.a(x) + m.a(x) + m.b(x) + m.c(x) + m.back(m.inner(x)), False),
        (lambda m, x: m.a(x) + m.b(x) + m.c(x), False),
    ],
)
def test_once_means_that_every_linear_was_called_exactly_once(forward: Callable, once: bool):
    assert layout_of(Written(forward), tokens_of()[0]).once == once


# ---- who writes to the residual stream


def output_plus_equals(m: Written, x: Tensor) -> Tensor:
    y = m.a(x)
    y += x
    return y


def stream_plus_equals(m: Written, x: Tensor) -> Tensor:
    x = x.clone()
    x += m.a(x)
    return x


def branches_plus_equals(m: Written, x: Tensor) -> Tensor:
    y = m.a(x)
    y += m.b(x)
    return F.dropout(y, 0.1, training=False) + x


def two_halves(m: Written, x: Tensor) -> Tensor:
    h = x + m.a(x)
    return h + m.b(torch.relu(h))


def cubic(m: Written, x: Tensor) -> Tensor:
    y = m.inner(x)
    return x + m.back(y + 0.04 * y**3)


# what the block computes -> {linear: what its output is added to}
STREAMS = {
    "x + a": (lambda m, x: x + m.a(x), lambda m, x: {"a": x}),
    "a + x": (lambda m, x: m.a(x) + x, lambda m, x: {"a": x}),
    "torch.add": (lambda m, x: torch.add(x, m.a(x)), lambda m, x: {"a": x}),
    "x.add": (lambda m, x: x.add(m.a(x)), lambda m, x: {"a": x}),
    "dropout in evaluation": (lambda m, x: x + F.dropout(m.a(x), 0.1, training=False), lambda m, x: {"a": x}),
    "a += x": (output_plus_equals, lambda m, x: {"a": x}),
    "x += a": (stream_plus_equals, lambda m, x: {"a": x}),
    "two halves": (two_halves, lambda m, x: {"a": x, "b": x + m.a(x)}),
    "one after the other": (lambda m, x: x + m.a(x) + m.b(x), lambda m, x: {"a": x, "b": x + m.a(x)}),
    "(a + b) + x": (lambda m, x: m.a(x) + m.b(x) + x, lambda m, x: {"a": x / 2, "b": x / 2}),
    "x + (a + b)": (lambda m, x: x + (m.a(x) + m.b(x)), lambda m, x: {"a": x / 2, "b": x / 2}),
    "(a += b) + x": (branches_plus_equals, lambda m, x: {"a": x / 2, "b": x / 2}),
    "three branches": (lambda m, x: m.a(x) + (m.b(x) + m.c(x)) + x, lambda m, x: dict.fromkeys("abc", x / 3)),
    "scaled": (lambda m, x: x + 0.5 * m.a(x), lambda m, x: {}),
    "scaled by alpha": (lambda m, x: torch.add(x, m.a(x), alpha=0.5), lambda m, x: {}),
    "subtracted": (lambda m, x: x - m.a(x), lambda m, x: {}),
    "normed": (lambda m, x: x + F.layer_norm(m.a(x), [WIDTH]), lambda m, x: {}),
    "activated": (lambda m, x: x + torch.relu(m.a(x)), lambda m, x: {}),
    "a number": (lambda m, x: m.a(x) + 1, lambda m, x: {}),
    "a vector": (lambda m, x: m.a(x) + m.b.bias, lambda m, x: {}),
    "one for all tokens": (lambda m, x: x + m.a(x.mean(1, keepdim=True)), lambda m, x: {}),
    "cubic activation inside": (cubic, lambda m, x: {"back": x}),
}


@pytest.mark.parametrize("case", STREAMS)
def test_a_linear_that_is_added_as_it_is_writes_to_the_stream(case: str):
    forward, expected = STREAMS[case]
    module, x = Written(forward), tokens_of()[0]
    before = x.clone()
    streams = expected(module, x)
    assert local(layout_of(module, x).residual) == set(streams)
    linears = block_of(module).linears
    with Watch(
        linears, [linear for linear in linears if linear.name in {f"block.{name}" for name in streams}]
    ) as watch:
        module(x)
    assert local(watch.residuals) == set(streams)
    for name, stream in streams.items():
        torch.testing.assert_close(watch.residuals[f"block.{name}"], stream)
    assert torch.equal(x, before)


def test_an_activation_as_wide_as_the_stream_is_not_the_stream():
    assert local(layout_of(Written(cubic, inner=WIDTH), tokens_of()[0]).residual) == {"back"}


def passing_tensors(m: Written, x: Tensor) -> Tensor:
    m.b(x)
    for _ in range(20):
        _ = [torch.relu(x), torch.tanh(x), x + 1, x - 1]  # their memory, and ids, are taken again and again
    del _
    h = x * 2
    return h + m.a(h)


def test_what_came_and_went_before_does_not_hide_the_stream():
    """Many times, since memory is not handed out in the same way each time."""
    module, x = Written(passing_tensors), tokens_of()[0]
    assert all(local(layout_of(module, x).residual) == {"a"} for _ in range(100))


# ---- stages


def named(names: str) -> list[list[Linear]]:
    """Groups: 'q k v | o'."""
    return [
        [Linear(f"model.layers.3.{name}", None, None) for name in group.split()]  # type: ignore[arg-type]
        for group in names.split("|")
    ]


@pytest.mark.parametrize(
    ("groups", "stages"),
    [
        ("q k v | o | gate up | down", [["q k v"], ["o"], ["gate up"], ["down"]]),
        ("q | fc1 | fc2", [["q"], ["fc1"], ["fc2"]]),
        ("q | w1 w3 | w2", [["q"], ["w1 w3"], ["w2"]]),
        (
            "o | e.0.up | e.0.down | e.1.up | e.1.down | e.12.up | e.12.down",
            [["o"], ["e.0.up", "e.1.up", "e.12.up"], ["e.0.down", "e.1.down", "e.12.down"]],
        ),
        (
            "e.0.gate e.0.up | e.0.down | e.2.up | e.2.gate | e.2.down",  # expert 2 was not reached
            [["e.0.gate e.0.up", "e.2.up", "e.2.gate"], ["e.0.down", "e.2.down"]],
        ),
        ("r s.up | e.0.up | s.down | e.0.down", [["r s.up"], ["e.0.up"], ["s.down"], ["e.0.down"]]),
    ],
)  # fmt: skip
def test_stages_are_groups_but_for_numbered_siblings(groups: str, stages: list[list[str]]):
    found = Layout(named(groups), frozenset(), frozenset(), True).stages()
    short = [[" ".join(linear.name.removeprefix("model.layers.3.") for linear in group) for group in s] for s in found]
    assert short == stages


QKV, GATED = "q_proj k_proj v_proj | o_proj", "gate_proj up_proj | down_proj"
BIG_SMALL = "query_key_value | dense | dense_h_to_4h | dense_4h_to_h"
# stages; who writes to the stream; how many branches share what there is to repair
EXPECTED = {
    **dict.fromkeys(
        ["llama", "llama-tied", "mistral", "qwen2", "qwen3", "stablelm"],
        (f"{QKV} | {GATED}", "o_proj down_proj", 1),
    ),
    **dict.fromkeys(["gemma3", "olmo2"], (f"{QKV} | {GATED}", "", 1)),  # norms after both halves
    **dict.fromkeys(["mixtral", "qwen3_moe", "gpt_oss"], (QKV, "o_proj", 1)),  # experts are ignored
    "opt": ("q_proj k_proj v_proj | out_proj | fc1 | fc2", "out_proj fc2", 1),
    "gpt2": ("c_attn | c_proj | c_fc | c_proj", "c_proj c_proj", 1),
    "bloom": (BIG_SMALL, "dense dense_4h_to_h", 1),
    "gpt_neox": (BIG_SMALL, "dense dense_4h_to_h", 2),
    "falcon": (BIG_SMALL, "dense dense_4h_to_h", 2),
    "phi": ("q_proj k_proj v_proj fc1 | dense | fc2", "dense fc2", 2),
    "gptj": ("q_proj k_proj v_proj fc_in | out_proj | fc_out", "out_proj fc_out", 2),
    # parallel, but added one after the other: the second sees what the first has repaired
    "cohere": ("q_proj k_proj v_proj gate_proj up_proj | o_proj | down_proj", "o_proj down_proj", 1),
}


@pytest.mark.parametrize("architecture", [*ARCHITECTURES, *EXPERTS])
def test_layouts_of_architectures(architecture: str):
    stages, residual, branches = EXPECTED[architecture]
    model = make_model(architecture)
    plan = make_plan(model, make_config(ignore=["experts"] if architecture in EXPERTS else []))
    calls = record_calls(model, [block.module for block in plan.blocks], [{"input_ids": token_ids()}])
    x = calls.hidden[0]
    for index, block in enumerate(plan.blocks):
        layout = find_layout(block, index, calls)
        assert layout.once
        assert not layout.in_place
        found = [[linear.name.split(".")[-1] for group in stage for linear in group] for stage in layout.stages()]
        assert " | ".join(" ".join(stage) for stage in found) == stages
        writers = [linear.name for linear in block.linears if linear.name in layout.residual]
        assert sorted(name.split(".")[-1] for name in writers) == sorted(residual.split())
        with Watch(block.linears, [linear for linear in block.linears if linear.name in layout.residual]) as watch:
            calls.run(block.module, index, 0, x)
        attention = [name for name in writers if "att" in name]
        for name in writers if branches > 1 else attention:
            torch.testing.assert_close(watch.residuals[name].reshape(x.shape), x / branches)
        for name in set(writers) - set(attention) if branches == 1 else ():
            assert not torch.allclose(watch.residuals[name].reshape(x.shape), x)


# ---- one pass for all blocks of the same structure


def looked_at(blocks: list[Block], calls: Calls, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The numbers of the blocks that a pass was run for; the layouts of all are those of such a pass."""
    numbers = []
    monkeypatch.setattr(observe, "find_layout", lambda *args: (numbers.append(args[1]), find_layout(*args))[1])
    layouts = Layouts()
    for index, block in enumerate(blocks):
        assert layouts.find(block, index, calls) == find_layout(block, index, calls)
    return numbers


def in_order(m: Written, x: Tensor) -> Tensor:
    return m.a(x) + m.b(x) + m.back(m.inner(m.c(x)))


def out_of_order(m: Written, x: Tensor) -> Tensor:
    return x + m.back(m.inner(m.b(m.c(m.a(x)))))


def branching(m: Written, x: Tensor) -> Tensor:
    return in_order(m, x) if m.switch in (True, "one") else out_of_order(m, x)


def switched(switch: object, **attributes: object) -> Written:
    module = Written(branching)
    module.switch = switch
    for name, value in attributes.items():
        setattr(module, name, value)
    return module


CASES = {
    "equal": ([Decoder(seed=seed) for seed in range(3)], [0]),
    "mixed": ([Decoder(), Attention(), Decoder(), Decoder(inner=32), Attention(), Decoder(inner=32)], [0, 1, 3]),
    "one inside another": ([Attention(), nn.Sequential(Attention()), Attention()], [0, 1]),
    "a function": ([Written(in_order), Written(out_of_order), Written(in_order), Written(out_of_order)], [0, 1]),
    "a boolean of another name": ([switched(True, is_hybrid=hybrid) for hybrid in (True, False, True)], [0, 1]),
    "a boolean": ([switched(True), switched(False), switched(True), switched(False)], [0, 1]),
    "a string": ([switched("one"), switched("other"), switched("one"), switched("other")], [0, 1]),
    "a number": ([switched(True, number=number) for number in (1, 2, 1, 2.5)], [0, 1, 3]),
    "its own number": ([switched(True, layer_idx=number) for number in range(3)], [0]),
    "numbers": ([switched(True, kinds=kinds) for kinds in ((0, 1), [0, 1], (1, 0))], [0, 2]),
    "a method": (
        [switched(True, way=way) for way in (Decoder().forward, Decoder().forward, Attention().forward)],
        [0, 2],
    ),
    "a parameter": ([switched(True, scale=scale) for scale in (None, nn.Parameter(torch.ones(1)), None)], [0, 1]),
    "not all called": ([Written(lambda m, x: m.a(x))] * 3, [0, 1, 2]),
    "one called twice": ([Written(lambda m, x: in_order(m, m.a(x)))] * 3, [0, 1, 2]),
    "numbered": ([nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH))] * 3, [0]),
    "experts, perhaps": ([nn.Sequential(*(nn.Sequential(nn.Linear(WIDTH, WIDTH)) for _ in "ab"))] * 3, [0, 1, 2]),
}


@pytest.mark.parametrize("case", CASES)
def test_blocks_of_the_same_structure_are_looked_at_once(case: str, monkeypatch):
    modules, expected = CASES[case]
    assert looked_at(blocks_of(modules), calls_of(tokens_of(), len(modules)), monkeypatch) == expected


def test_blocks_must_be_called_alike(monkeypatch):
    """The first is given its own input a second time, so that two linears share it."""

    class Injected(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.inject, self.b = (nn.Linear(WIDTH, WIDTH) for _ in range(3))

        def forward(self, x: Tensor, first: Tensor, gate: bool | None = None) -> Tensor:
            return x + self.b(torch.tanh(self.a(x if gate is None else x + 1) + self.inject(first)))

    batches = tokens_of()
    calls = calls_of(batches, 5)
    other = [torch.ones_like(x) for x in batches]
    for index, (given, gate) in enumerate(
        [(batches, None), (other, None), (other, None), (other, True), (other, True)]
    ):
        calls.arguments[index] = [((x,), {"gate": gate}) for x in given]
    assert looked_at(blocks_of([Injected() for _ in range(5)]), calls, monkeypatch) == [0, 1, 3]


def test_the_same_linears_must_be_pruned(monkeypatch):
    blocks = blocks_of([Decoder() for _ in range(4)])
    del blocks[1].linears[0]
    blocks[2].linears.reverse()
    assert looked_at(blocks, calls_of(tokens_of(), 4), monkeypatch) == [0, 1, 2]


@pytest.mark.parametrize("architecture", [*ARCHITECTURES, *EXPERTS])
@pytest.mark.parametrize("experts", [True, False])
def test_blocks_of_architectures_that_are_looked_at(architecture: str, experts: bool, monkeypatch):
    """Two kinds of attention are told apart, though their layouts are the same."""
    model = make_model(architecture)
    plan = make_plan(model, make_config(ignore=[] if experts or architecture in ARCHITECTURES else ["experts"]))
    calls = record_calls(model, [block.module for block in plan.blocks], [{"input_ids": token_ids()}])
    with contextlib.ExitStack() as present:
        for block in plan.blocks:
            present.enter_context(plan.onload(block.module))
        numbers = looked_at(plan.blocks, calls, monkeypatch)
    if architecture in EXPERTS and experts:
        assert numbers == list(range(len(plan.blocks)))
    else:
        assert numbers == ([0, 1] if architecture in ("gemma3", "gpt_oss") else [0])


# ---- statistics on both paths


def pruned_decoder() -> tuple[Decoder, Decoder, list[Tensor]]:
    """(pruned, dense, the dense weights) of one block."""
    dense = Decoder()
    module = copy.deepcopy(dense)
    weights = [linear.weight.data for linear in block_of(module).linears]
    for linear in block_of(module).linears:
        w = linear.module.weight
        w.data = w.data * (w.abs() > w.abs().median())
    return module, dense, weights


def expected_weights(group: list[Linear], sensitivity: Sensitivity, real: Tensor) -> Tensor:
    """Of the real tokens of all batches, float64: the definition of the design notes with power 1/2."""
    felt = sum(torch.cat(sensitivity.tokens[linear.name]).double() for linear in group)[real]
    weight = (felt / felt.mean()).clamp(1e-4, 50).sqrt()
    return weight / weight.mean()


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("staged", [False, True])
def test_means_on_both_paths_are_those_of_two_separate_runs(padded: bool, weighted: bool, staged: bool):
    """By hand in float64 from the pruned and the dense module. Padding is NaN (felt: huge), and would show."""
    module, dense, weights = pruned_decoder()
    batches = tokens_of()
    others = [x + 0.3 * normal(*x.shape, seed=number) for number, x in enumerate(batches)]
    real = [torch.ones(x.shape[:2], dtype=torch.bool) for x in batches]
    block = block_of(module)
    sensitivity = felt_by([block], batches)
    if padded:
        real = [normal(*x.shape[:2], seed=7 + number) < 0.5 for number, x in enumerate(batches)]
        for number, mask in enumerate(real):
            batches[number] = batches[number].masked_fill(~mask[..., None], torch.nan)
            others[number] = others[number].masked_fill(~mask[..., None], torch.nan)
            for felt in sensitivity.tokens.values():
                felt[number][~mask.flatten()] = 1e9
    calls = calls_of(batches, keep=list(real) if padded else None)
    layout = find_layout(block, 0, calls)
    assert called(layout) == [{"q", "v"}, {"o"}, {"up"}, {"down"}]
    assert local(layout.residual) == {"o", "down"}

    evidence = []
    for groups in layout.stages() if staged else [layout.groups]:
        options = dict(dense=(weights, others), sensitivity=sensitivity if weighted else None)
        evidence += collect(groups, layout, block, 0, calls, Needs.GRAM, **options)

    mask = torch.cat([part.flatten() for part in real])
    pruned_run, dense_run = (
        copy.deepcopy(run).double().seen(torch.cat(inputs).double().reshape(-1, WIDTH)[mask])
        for run, inputs in ((module, batches), (dense, others))
    )
    for group, found in zip(layout.groups, evidence, strict=True):
        name = group[0].name.removeprefix("block.")
        weight = torch.ones(int(mask.sum()), dtype=torch.float64)
        if weighted:
            weight = expected_weights(group, sensitivity, mask)
        (x, r), (x_d, r_d) = pruned_run[name], dense_run[name]
        close = dict(rtol=1e-3, atol=2e-4, check_dtype=False)
        assert found.stats.tokens == int(mask.sum())
        torch.testing.assert_close(found.stats.gram, (x.T * weight) @ x / len(x), **close)
        torch.testing.assert_close(found.shift.mean, ((x_d - x).T * weight) @ x / len(x), **close)
        assert local(found.residual) == ({name} if name in ("o", "down") else set())
        for change in found.residual.values():
            torch.testing.assert_close(change.mean, ((r_d - r).T * weight) @ x / len(x), **close)
    for linear, weight in zip(block.linears, weights, strict=True):
        assert linear.weight.data is not weight, "the pruned weights are back"


def test_parallel_branches_are_each_to_repair_their_share():
    module = Written(lambda m, x: m.a(x) + m.b(torch.relu(x)) + x)
    x, other = normal(1, 50, WIDTH), normal(1, 50, WIDTH, seed=1)
    block, calls = block_of(module), calls_of([x])
    layout = dataclasses.replace(find_layout(block, 0, calls), once=True)
    groups = [group for group in layout.groups if group[0].name in layout.residual]
    weights = [linear.weight.data for linear in block.linears]
    a, b = collect(groups, layout, block, 0, calls, Needs.GRAM, dense=(weights, [other]))
    change = (other - x)[0].T / 2
    torch.testing.assert_close(a.residual["block.a"].mean, change @ x[0] / 50)
    torch.testing.assert_close(b.residual["block.b"].mean, change @ torch.relu(x[0]) / 50)


@pytest.mark.parametrize("needs", [Needs.DIAGONAL, Needs.GRAM])
def test_ending_a_pass_early_changes_no_statistic(needs: Needs):
    module, _, _ = pruned_decoder()
    block, calls = block_of(module), calls_of(tokens_of())
    layout = find_layout(block, 0, calls)
    whole = dataclasses.replace(layout, once=False)
    for groups in (layout.groups, layout.groups[:1], layout.groups[1:3]):
        early, late = (collect(groups, seen, block, 0, calls, needs) for seen in (layout, whole))
        for one, other in zip(early, late, strict=True):
            assert one.stats.tokens == other.stats.tokens == 120
            assert torch.equal(one.stats.mean_square, other.stats.mean_square)
            if needs is Needs.GRAM:
                assert torch.equal(one.stats.gram, other.stats.gram)


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize(("stage", "never"), [(0, {"o", "up", "down"}), (1, {"up", "down"}), (2, {"down"})])
def test_a_pass_ends_when_all_is_seen(stage: int, never: set[str], dense: bool):
    module, _, weights = pruned_decoder()
    block, calls = block_of(module), calls_of(tokens_of())
    layout = find_layout(block, 0, calls)
    ran = set()
    for name, child in module.named_children():
        child.register_forward_hook(lambda *_, name=name: ran.add(name))
    options = dict(dense=(weights, tokens_of())) if dense else {}
    collect(layout.stages()[stage], layout, block, 0, calls, Needs.GRAM, **options)
    assert not ran & never


def test_a_linear_that_is_called_twice_counts_both_inputs_and_has_no_dense_path():
    module = Written(lambda m, x: m.b(m.a(m.a(x))) + x)
    batches = tokens_of()
    x = torch.cat(batches).reshape(-1, WIDTH)
    block, calls = block_of(module), calls_of(batches)
    layout = find_layout(block, 0, calls)
    weights = [linear.weight.data for linear in block.linears]
    a, b, *unreached = collect(layout.groups, layout, block, 0, calls, Needs.GRAM, dense=(weights, batches))
    both = torch.cat([x, module.a(x)]).double()
    assert (a.stats.tokens, b.stats.tokens) == (240, 120)
    torch.testing.assert_close(a.stats.gram.double(), both.T @ both / 240, rtol=1e-4, atol=1e-5)
    assert all(found.shift is None and not found.residual for found in (a, b, *unreached))
    assert all(found.stats.tokens == 0 for found in unreached)


def test_a_linear_that_is_called_twice_may_have_padding_and_sensitivity():
    """Without sensitivity this works, and without padding its tokens simply are not weighed."""
    module = Written(lambda m, x: m.a(m.a(x)) + x)
    batches = tokens_of()
    block = block_of(module)
    block.linears[1:] = []
    mask = torch.ones(3, 20, dtype=torch.bool)
    mask[:, :5] = False
    felt = Sensitivity({"block.a": [torch.ones(120) for _ in batches]}, {})
    results = []
    for calls, sensitivity in ((calls_of(batches, keep=[mask, mask]), None), (calls_of(batches), felt)):
        layout = find_layout(block, 0, calls)
        results += collect(layout.groups, layout, block, 0, calls, Needs.GRAM, sensitivity=sensitivity)
    assert [found.stats.tokens for found in results] == [180, 240]
    calls = calls_of(batches, keep=[mask, mask])
    collect(layout.groups, layout, block, 0, calls, Needs.GRAM, sensitivity=felt)


@pytest.mark.parametrize("fits", [True, False])
def test_tokens_that_a_router_chose_are_weighed_if_they_are_the_same(fits: bool):
    """The dense model, whose gradients these are, may have routed other tokens to an expert: then all count alike."""
    x = normal(1, 60, WIDTH)
    chosen = x[0, :, 0] > 0
    module = Written(lambda m, x: m.a(x[x[..., 0] > 0]))
    block, calls = block_of(module), calls_of([x])
    felt = Sensitivity({"block.a": [normal(int(chosen.sum()) + (not fits), seed=3).exp()]}, {})
    groups = [[block.linears[0]]]
    (found,) = collect(groups, find_layout(block, 0, calls), block, 0, calls, Needs.GRAM, sensitivity=felt)
    rows = x[0][chosen].double()
    weight = felt.tokens["block.a"][0].double().sqrt() if fits else torch.ones(len(rows), dtype=torch.float64)
    torch.testing.assert_close(
        found.stats.gram.double(), (rows.T * weight) @ rows / weight.sum(), rtol=1e-5, atol=1e-6
    )


# ---- weights of tokens


def test_token_weights_have_a_mean_of_one_a_bounded_range_and_the_order_of_what_is_felt():
    block, batches = block_of(Attention()), tokens_of()
    sensitivity = felt_by([block], batches)
    for part in (*block.linears, block):
        weights = torch.cat(token_weights([part], sensitivity, calls_of(batches)))
        felt = torch.cat(sensitivity.tokens[part.name])
        assert weights.mean().item() == pytest.approx(1)
        assert weights.max() / weights.min() <= (50 / 1e-4) ** 0.5 * 1.0001
        assert (weights[felt.argsort()].diff() >= 0).all()
        inside = (felt / felt.mean() > 1e-4) & (felt / felt.mean() < 50)
        assert 0 < inside.sum() < len(felt), "some are cut off, some are not"
        ratio = (weights.square() / felt)[inside]
        torch.testing.assert_close(ratio, ratio[0].expand_as(ratio))


@pytest.mark.parametrize("value", [0.0, 1e-30, 1e30])
def test_tokens_that_are_felt_alike_weigh_one(value: float):
    block, batches = block_of(Attention()), tokens_of()
    alike = Sensitivity({"block.q": [torch.full((60,), value)] * 2}, {})
    weights = torch.cat(token_weights([block.linears[0]], alike, calls_of(batches)))
    torch.testing.assert_close(weights, torch.ones(120))


def test_a_linear_that_no_gradient_reached_does_not_count():
    """An indexer that only chooses tokens, say; it may share its input with others."""
    block, batches = block_of(Attention()), tokens_of()
    q, k = block.linears[:2]
    felt = [torch.rand(60) for _ in range(2)]
    sensitivity = Sensitivity({q.name: felt, k.name: [torch.zeros(0)] * 2}, {})
    for group, wanted in (([q, k], [q]), ([k, q], [q])):
        weights = token_weights(group, sensitivity, calls_of(batches))
        torch.testing.assert_close(weights, token_weights(wanted, sensitivity, calls_of(batches)))
    torch.testing.assert_close(torch.cat(token_weights([k], sensitivity, calls_of(batches))), torch.ones(120))


# ---- nothing is left behind


class Fails(Decoder):
    """Fails in its second half, on the call with this number."""

    def __init__(self, call: int):
        super().__init__()
        self.calls_left = call

    def forward(self, x: Tensor) -> Tensor:
        self.calls_left -= 1
        if self.calls_left < 0:
            self.q(x)
            raise RuntimeError("broken")
        return super().forward(x)


@pytest.mark.parametrize("call", range(5))
def test_hooks_modes_and_dense_weights_are_gone_after_an_error(call: int):
    """Calls in turn: layout; then pruned and dense path of both batches."""
    module = Fails(call)
    block, batches = block_of(module), tokens_of()
    dense = [linear.weight.data for linear in block.linears]
    for linear in block.linears:
        linear.write(torch.zeros(linear.shape))
    pruned = [linear.weight.data for linear in block.linears]

    def observe() -> None:
        layout = find_layout(block, 0, calls_of(batches))
        collect(layout.groups, layout, block, 0, calls_of(batches), Needs.GRAM, dense=(dense, batches))

    with pytest.raises(RuntimeError, match="broken"):
        observe()
    assert not any(child._forward_pre_hooks or child._forward_hooks for child in module.modules())
    assert not _get_current_function_mode_stack()
    assert all(linear.weight.data_ptr() == p.data_ptr() for linear, p in zip(block.linears, pruned, strict=True))


def test_dense_weights_are_in_place_inside_only():
    module, dense, weights = pruned_decoder()
    before, x = copy.deepcopy(module), ar_inputs(20, WIDTH)
    parameters = [id(parameter) for parameter in module.parameters()]
    for error in (None, KeyError):
        try:
            with dense_weights(block_of(module).linears, weights):
                assert torch.equal(module(x), dense(x))
                if error:
                    raise error
        except KeyError:
            assert error
        assert torch.equal(module(x), before(x))
    assert not torch.equal(module(x), dense(x))
    assert [id(parameter) for parameter in module.parameters()] == parameters


def test_a_transposed_linear_is_watched_as_any_other():
    """Conv1D holds [in, out]."""

    class Conv(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(random_weight(WIDTH, WIDTH))

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.weight

    module = nn.Module()
    module.conv = Conv()
    module.forward = lambda x: x + module.conv(x)
    block = Block("block", module, [Linear("block.conv", module.conv, None, transposed=True)])  # type: ignore[arg-type]
    x, other = normal(1, 50, WIDTH), normal(1, 50, WIDTH, seed=1)
    calls = calls_of([x])
    layout = find_layout(block, 0, calls)
    weights = [module.conv.weight.data]
    (found,) = collect(layout.groups, layout, block, 0, calls, Needs.GRAM, dense=(weights, [other]))
    torch.testing.assert_close(found.shift.mean, (other - x)[0].T @ x[0] / 50)
    torch.testing.assert_close(found.residual["block.conv"].mean, (other - x)[0].T @ x[0] / 50)


@pytest.mark.parametrize("staged", [False, True])
def test_parallel_branches_repair_half_of_the_stream_each_in_stages_too(staged: bool):
    """A pass that watches one branch must not take the other one's output for the stream."""

    class Parallel(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.o, self.down = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            attention = self.o(torch.tanh(x))
            return attention + self.down(torch.sigmoid(x)) + x

    module = Parallel()
    block, x, x_d = block_of(module), tokens_of()[0], tokens_of()[1]
    calls = calls_of([x])
    dense = ([linear.weight.data for linear in block.linears], [x_d])
    layout = find_layout(block, 0, calls)
    stages = layout.stages() if staged else [layout.groups]
    assert len(stages) == (2 if staged else 1)
    change = (x_d - x).double().reshape(-1, WIDTH) / 2
    for groups in stages:
        for group, found in zip(
            groups, collect(groups, layout, block, 0, calls, Needs.GRAM, dense=dense), strict=True
        ):
            (linear,) = group
            seen = (torch.tanh(x) if linear.name.endswith("o") else torch.sigmoid(x)).double().reshape(-1, WIDTH)
            expected = change.T @ seen / len(seen)
            torch.testing.assert_close(found.residual[linear.name].mean.double(), expected, rtol=1e-4, atol=1e-5)
