"""Budgets are met exactly, and go where least is lost."""

import contextlib
import copy
import itertools
import json

import pytest
import torch
from accelerate import cpu_offload
from helpers import ar_inputs, random_weight, stats_of
from hypothesis import given as given_values
from hypothesis import strategies as st
from models import assert_pattern, assert_same_weights, dense_weight, make_config, make_model, weights_of
from modules import Decoder, block_of, blocks_of, calls_of, tokens_of
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from optimum_sparse import Pruner, SparsityConfig
from optimum_sparse.allocation import (
    ErrorCurves,
    OutlierRatios,
    allocate,
    by_name,
    choose_denser,
    meet_target,
    minimize_loss,
    owl,
)
from optimum_sparse.core import NM, Unstructured
from optimum_sparse.methods import SparseGPT
from optimum_sparse.pipeline import prune_blocks


def removed(sparsities, sizes) -> float:
    return sum(s * size for s, size in zip(sparsities, sizes, strict=True)) / sum(sizes)


# ---- meeting a target

matrices = st.lists(st.tuples(st.floats(0, 1), st.integers(1, 10**7)), min_size=1, max_size=8)


@given_values(wanted=matrices, target=st.floats(0, 0.99))
def test_the_target_is_met_exactly_by_moving_all_alike(wanted: list[tuple[float, int]], target: float):
    sparsities, sizes = zip(*wanted, strict=True)
    found = meet_target(sparsities, sizes, target)
    assert all(0 <= s <= 0.99 for s in found)
    assert removed(found, sizes) == pytest.approx(target, abs=1e-9)
    inside = [s - w for s, w in zip(found, sparsities, strict=True) if 1e-9 < s < 0.99 - 1e-9]
    assert not inside or max(inside) - min(inside) < 1e-9
    for (w, s), (v, t) in itertools.combinations(zip(sparsities, found, strict=True), 2):
        assert (w - v) * (s - t) >= -1e-9, "the order stays"


@pytest.mark.parametrize(("target", "lowest", "highest"), [(0.995, 0, 0.99), (0.2, 0.3, 0.7), (0.8, 0.3, 0.7)])
def test_a_target_outside_of_the_bounds_is_an_error(target: float, lowest: float, highest: float):
    with pytest.raises(ValueError, match=rf"a sparsity of {target:g} .* between {lowest:g} and {highest:g}"):
        meet_target([0.5, 0.5], [1, 2], target, lowest, highest)


# ---- sharing out

FINE = [i / 1000 for i in range(300, 701)]


def curve(height: float, growth: float):
    """Convex in the logarithm, too: what minimize_loss interpolates."""
    return lambda s: height * 2.718281828459045 ** (growth * s)


@pytest.mark.parametrize("scale", [1e-30, 1e-6, 1.0, 1e6, 1e40])
@pytest.mark.parametrize("sizes", [[100, 100], [100, 900], [300, 50, 150]])
@pytest.mark.parametrize("target", [0.35, 0.5, 0.62])
def test_sharing_out_loses_as_little_as_brute_force_finds(sizes: list[int], target: float, scale: float):
    """Over all combinations of a fine grid that remove as much."""
    curves = [curve(1, 4), curve(0.2, 9), curve(3, 6)][: len(sizes)]
    grid = [0.3, 0.4, 0.5, 0.6, 0.7]
    losses = [[scale * size * f(s) for s in grid] for f, size in zip(curves, sizes, strict=True)]
    found = minimize_loss(grid, losses, sizes, target)
    assert removed(found, sizes) == pytest.approx(target, abs=1e-9)
    assert all(0.3 - 1e-9 <= s <= 0.7 + 1e-9 for s in found)

    def loss(choice) -> float:
        return sum(size * f(s) for f, size, s in zip(curves, sizes, choice, strict=True))

    best = float("inf")
    for first in itertools.product(FINE[::8] if len(sizes) > 2 else FINE, repeat=len(sizes) - 1):
        last = (target * sum(sizes) - sum(s * n for s, n in zip(first, sizes, strict=False))) / sizes[-1]
        if 0.3 <= last <= 0.7:
            best = min(best, loss([*first, last]))
    assert loss(found) <= 1.002 * best
    if len(sizes) == 2:
        assert loss(found) < 0.99 * loss([target] * 2)


def test_equal_curves_share_alike_and_a_matrix_without_loss_gives_most():
    grid = [0.3, 0.5, 0.7]
    assert minimize_loss(grid, [[1, 2, 4], [1, 2, 4]], [5, 5], 0.45) == pytest.approx([0.45, 0.45], abs=5e-3)
    free, dear = minimize_loss(grid, [[0, 0, 0], [1, 2, 4]], [5, 5], 0.5)
    assert (free, dear) == (pytest.approx(0.7, abs=5e-3), pytest.approx(0.3, abs=5e-3))


# ---- OWL


def test_owl_is_the_papers_formula():
    """Layerwise density 1 - S + (D - mean), D scaled to a range of 2 lambda: section 4 of arXiv 2310.05175."""
    ratios, target, spread = [0.01, 0.05, 0.02, 0.03], 0.7, 0.08
    scaled = [(d - 0.01) / 0.04 * 2 * spread for d in ratios]
    expected = [1 - (1 - target + s - sum(scaled) / 4) for s in scaled]
    found = owl(ratios, [10] * 4, target)
    assert found == pytest.approx(expected, abs=1e-9)
    assert max(found) - min(found) == pytest.approx(0.16)
    assert owl(ratios, [10] * 4, target, spread=0.01) != pytest.approx(expected, abs=1e-3)


def test_owl_meets_the_target_whatever_the_sizes_and_without_outliers():
    sizes = [10, 1000, 30]
    found = owl([0.1, 0.2, 0.3], sizes, 0.6)
    assert removed(found, sizes) == pytest.approx(0.6, abs=1e-9)
    assert found[0] - found[2] == pytest.approx(0.16)
    assert owl([0.1, 0.1], [3, 5], 0.6) == pytest.approx([0.6, 0.6])


# ---- names


NAMES, SIZES = ["layers.0.q", "layers.0.up", "layers.1.q", "layers.1.up"], [100, 300, 100, 300]


@pytest.mark.parametrize(
    ("rules", "expected"),
    [
        ({}, [0.5, 0.5, 0.5, 0.5]),
        ({"q": 0.2}, [0.2, 0.6, 0.2, 0.6]),
        ({"layers.0": 0.3}, [0.3, 0.3, 0.7, 0.7]),
        ({"re:.*q": 0.0, "layers.1.up": 0.4}, [0.0, 2.8 / 3, 0.0, 0.4]),
        ({"q": 0.5, "up": 0.5}, [0.5] * 4),
        ({"q": 0.2, "layers.0.q": 0.2}, [0.2, 0.6, 0.2, 0.6]),
    ],
)
def test_what_names_do_not_give_is_shared_out_evenly(rules: dict[str, float], expected: list[float]):
    assert by_name(rules, NAMES, SIZES, 0.5) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ({"q": 0.2, "layers.0": 0.3}, r"gives layers\.0\.q different sparsities, \[0\.2, 0\.3\]"),
        ({"up": 0.9}, "leaves a sparsity of -0.7000 for the other 200 of 800 weights"),
        ({"up": 0.0}, "leaves a sparsity of 2.0000 for the other 200 of 800 weights"),
        ({"q": 0.4, "up": 0.5}, "for the other 0 of 800 weights to reach 0.5"),
    ],
)
def test_names_that_contradict_each_other_or_the_target(rules: dict[str, float], message: str):
    with pytest.raises(ValueError, match=message):
        by_name(rules, NAMES, SIZES, 0.5)


# ---- denser patterns


def test_upgrades_go_to_those_that_lose_most_per_weight():
    losses = [[8, 0], [9, 0], [1, 0], [30, 0]]  # per weight: .8, .9, .1, .3
    assert choose_denser(losses, [10, 10, 10, 100], [("dense", 20 / 130)]) == {1: "dense", 0: "dense"}
    assert choose_denser(losses, [10, 10, 10, 100], [("dense", 0.1)]) == {1: "dense"}
    assert choose_denser(losses, [10, 10, 10, 100], [("dense", 0.25)]) == {1: "dense", 0: "dense", 2: "dense"}
    assert choose_denser(losses, [10, 10, 10, 100], [("dense", 0.0)]) == {}
    two = [[8, 6, 0], [9, 1, 0], [5, 1, 0]]  # the first budget is filled first, by what it gains
    assert choose_denser(two, [10, 10, 10], [("4:8", 1 / 3), ("dense", 1 / 3)]) == {1: "4:8", 0: "dense"}
    assert choose_denser([[1, 1], [1, 2]], [1, 1], [("4:8", 1.0)]) == {}, "nothing is gained"


@given_values(
    losses=st.lists(st.tuples(*[st.floats(0, 100)] * 3, st.integers(1, 50)), min_size=1, max_size=12),
    shares=st.tuples(st.floats(0, 1), st.floats(0, 1)),
)
def test_upgrades_stay_within_their_budgets_and_leave_out_nothing_that_fits(losses, shares: tuple[float, float]):
    sizes = [row[3] for row in losses]
    budgets = list(zip(("4:8", "dense"), shares, strict=True))
    chosen = choose_denser([row[:3] for row in losses], sizes, budgets)
    before: set[int] = set()
    for number, (pattern, share) in enumerate(budgets, 1):
        taken = {matrix for matrix, name in chosen.items() if name == pattern}
        left = share * sum(sizes) - sum(sizes[matrix] for matrix in taken)
        assert left >= -1e-6
        gain = [(row[0] - row[number]) / row[3] for row in losses]
        assert all(gain[matrix] > 0 for matrix in taken)
        for matrix in set(range(len(sizes))) - taken - before:
            worse = sum(sizes[other] for other in taken if gain[other] < gain[matrix])
            assert gain[matrix] <= 0 or sizes[matrix] > left + worse - 1e-6
        before |= taken


# ---- what is measured


def test_error_curves_are_the_errors_of_sparsegpt_on_the_inputs():
    x, weight = ar_inputs(300, 32), random_weight(12, 32)
    patterns = [Unstructured(0.3), Unstructured(0.6), NM(2, 4)]
    curves = ErrorCurves(patterns, 0.01, 16)
    solved = curves.solve(weight, stats_of(x), Unstructured(0.5))
    assert torch.equal(solved.weight, weight)
    assert solved.keep.all()
    for pattern, loss in zip(patterns, json.loads(solved.note), strict=True):
        pruned = SparseGPT(0.01, 16).solve(weight, stats_of(x), pattern).weight
        error = (x.double() @ (pruned - weight).double().T).square().sum(1).mean()
        assert loss == pytest.approx(error.item(), rel=1e-3)


def test_outlier_ratios_are_those_of_wanda_scores_of_whole_blocks():
    modules, batches = [Decoder(seed=seed) for seed in range(3)], tokens_of()
    blocks = blocks_of(modules)
    blocks[1].linears.clear()
    before = copy.deepcopy(modules)
    method = OutlierRatios(multiple=2.5)

    @contextlib.contextmanager
    def within(module):
        yield
        method.end_block()

    prune_blocks(blocks, calls_of(batches, 3), method, within)
    x, expected = torch.cat(batches).reshape(-1, 16), []
    with torch.no_grad():
        for index, module in enumerate(before):
            seen = module.seen(x)
            scores = torch.cat(
                [
                    (module.get_submodule(name).weight.abs() * inputs.square().mean(0).sqrt()).flatten()
                    for name, (inputs, _) in seen.items()
                ]
            )
            expected.append((scores > 2.5 * scores.mean()).float().mean().item() if index != 1 else 0)
            x = module(x)
    assert method.ratios == pytest.approx(expected, abs=2 / 1500)
    assert expected[0] > 0.01
    for module, dense in zip(modules, before, strict=True):
        assert all(torch.equal(p, q) for p, q in zip(module.parameters(), dense.parameters(), strict=True))


# ---- whole models


def uneven(**changes) -> PreTrainedModel:
    """A Llama whose matrices lose quite different shares of what they do."""
    model = make_model("llama", **changes)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "layers" in name and parameter.dim() == 2:
                spread = 2 * torch.rand((), generator=generator)
                parameter.mul_((spread * torch.randn(parameter.shape, generator=generator)).exp())
                parameter.mul_(0.08 / parameter.std())
    return model


def pruned_linears(model: PreTrainedModel) -> dict[str, Tensor]:
    return {
        name: dense_weight(m) for name, m in model.named_modules() if "layers" in name and hasattr(m, "in_features")
    }


def stored_config(model: PreTrainedModel) -> SparsityConfig:
    return model.config.quantization_config


def share_of_zeros(weights) -> float:
    weights = list(weights)
    return sum(int((w == 0).sum()) for w in weights) / sum(w.numel() for w in weights)


ALLOCATIONS = ["uniform", "owl", "error", {"q_proj": 0.3, "model.layers.1.mlp": 0.7}]


@pytest.mark.parametrize("method", ["magnitude", "sparsegpt"])
@pytest.mark.parametrize("allocation", ALLOCATIONS, ids=str)
def test_every_allocation_removes_as_much_as_uniform_and_reloads(allocation, method: str, tmp_path):
    config = make_config(method, "unstructured", sparsity=0.6, allocation=allocation)
    model = Pruner.from_pretrained(uneven()).prune(config)
    weights = pruned_linears(model)
    layers = stored_config(model).allocated
    total = sum(w.numel() for w in weights.values())
    assert abs(share_of_zeros(weights.values()) - 0.6) < max(1e-4, 0.5 * len(weights) / total)
    for name, weight in weights.items():
        assert_pattern(weight, "unstructured", layers.get(name, 0.6))
    if allocation == "uniform":
        assert layers == {}
    else:
        assert set(layers) == set(weights)
        assert removed(layers.values(), [w.numel() for w in weights.values()]) == pytest.approx(0.6, abs=1e-9)
        assert max(layers.values()) - min(layers.values()) > 0.02
    by_block = {name.split(".")[2]: s for name, s in layers.items()}
    if allocation == "owl":
        assert all(by_block[name.split(".")[2]] == s for name, s in layers.items())
    elif allocation == "error":
        assert len(set(layers.values())) > 4
        assert all(0.4 - 1e-6 <= s <= 0.8 + 1e-6 for s in layers.values())
    elif isinstance(allocation, dict):
        assert layers["model.layers.0.self_attn.q_proj"] == 0.3
        assert layers["model.layers.1.mlp.up_proj"] == 0.7
        assert len(set(layers.values())) == 3

    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["quantization_config"]["allocated"] == layers
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert_same_weights(again, model)
    assert stored_config(again).allocated == layers


@pytest.mark.parametrize(
    "changes", [{"allocation": "error"}, {"allocation": "owl"}, {"denser": {"4:8": 0.2}}], ids=str
)
def test_what_was_allocated_gives_the_same_model_by_hand(changes):
    """So measuring left the dense model, and the calibration data, as they were."""
    pattern = "2:4" if "denser" in changes else "unstructured"
    model = Pruner.from_pretrained(uneven()).prune(make_config("sparsegpt", pattern, **changes))
    layers = stored_config(model).allocated
    assert layers
    by_hand = Pruner.from_pretrained(uneven()).prune(make_config("sparsegpt", pattern, layers=layers))
    assert_same_weights(by_hand, model)
    stored = stored_config(model)
    again = Pruner.from_pretrained(uneven()).prune(stored, dataset=make_config().dataset)
    assert_same_weights(again, model)
    if pattern == "unstructured":  # the recipe counts, and not what it once came to
        stored.sparsity = 0.7
        weights = pruned_linears(Pruner.from_pretrained(uneven()).prune(stored, dataset=make_config().dataset))
        assert share_of_zeros(weights.values()) == pytest.approx(0.7, abs=1e-3)


@pytest.mark.parametrize(
    "changes", [{"allocation": "error"}, {"allocation": "owl"}, {"denser": {"dense": 0.2, "4:8": 0.3}}], ids=str
)
def test_measuring_leaves_the_dense_model_as_it_was(changes, monkeypatch: pytest.MonkeyPatch):
    model = uneven()
    before = weights_of(model)

    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("optimum_sparse.hf.prune.prune_blocks", stop)  # not the one that measures
    with pytest.raises(KeyboardInterrupt):
        Pruner.from_pretrained(model).prune(
            make_config("sparsegpt", "2:4" if "denser" in changes else "unstructured", **changes)
        )
    assert_same_weights(model, before)


def test_matrices_that_lose_most_keep_most():
    """One block's attention counts for nothing to the likelihood, and a matrix of the other is nearly all zeros."""
    model = make_model("llama")
    with torch.no_grad():
        model.model.layers[0].self_attn.o_proj.weight.mul_(1e-3)
        sparse = model.model.layers[1].mlp.up_proj.weight
        sparse.mul_(torch.where(torch.rand(sparse.shape, generator=torch.Generator().manual_seed(0)) < 0.8, 1e-4, 1))
    Pruner.from_pretrained(model).prune(make_config("sparsegpt", "unstructured", allocation="error"))
    layers = stored_config(model).allocated
    low = ["model.layers.0.self_attn.o_proj", "model.layers.1.mlp.up_proj"]
    assert all(layers[name] > 0.69 for name in low)
    assert min(layers.values()) < 0.31


def test_error_allocation_loses_less_than_uniform():
    """Of the model's output, in the mean over models, on unseen tokens."""
    ratios = []
    ids = torch.randint(3, 200, (16, 24), generator=torch.Generator().manual_seed(77))
    for seed in range(3):
        dense, errors = uneven(seed=seed), []
        with torch.no_grad():
            wanted = dense(ids).logits
            for allocation in ("uniform", "error"):
                config = make_config("sparsegpt", "unstructured", sparsity=0.6, allocation=allocation)
                model = Pruner.from_pretrained(copy.deepcopy(dense)).prune(config)
                errors.append((model(ids).logits - wanted).square().sum())
        ratios.append(errors[1] / errors[0])
    assert torch.stack(ratios).log().mean().exp() < 0.9


@pytest.mark.parametrize("allocation", ["owl", "error", {"up_proj": 0.2}], ids=str)
def test_layers_that_have_a_value_take_no_part(allocation):
    layers = {"q_proj": 0.9, "model.layers.0.mlp.down_proj": "dense", "model.layers.1.mlp.down_proj": "4:8"}
    config = make_config("sparsegpt", "unstructured", allocation=allocation, layers=layers, ignore=["k_proj"])
    model = Pruner.from_pretrained(uneven()).prune(config)
    weights = pruned_linears(model)
    stored = stored_config(model).allocated
    assert stored_config(model).layers == layers
    fixed = {name for name in weights if "q_proj" in name or "k_proj" in name or "down_proj" in name}
    shared = {name: weight for name, weight in weights.items() if name not in fixed}
    assert set(stored) == set(shared)
    assert removed([stored[name] for name in shared], [w.numel() for w in shared.values()]) == pytest.approx(0.5)
    for name, weight in weights.items():
        if "q_proj" in name:
            assert_pattern(weight, "unstructured", 0.9)
        elif "k_proj" in name or name == "model.layers.0.mlp.down_proj":
            assert weight.all()
        elif name == "model.layers.1.mlp.down_proj":
            assert_pattern(weight, "4:8")


@pytest.mark.parametrize("method", ["magnitude", "sparsegpt"])
@pytest.mark.parametrize("denser", [{"dense": 0.15}, {"4:8": 0.3, "dense": 0.1}, {"3:4": 1.0}], ids=str)
def test_denser_patterns_stay_within_their_budgets_and_reload(denser: dict[str, float], method: str, tmp_path):
    layers = {"model.layers.0.mlp.up_proj": "1:4"}
    model = Pruner.from_pretrained(uneven()).prune(make_config(method, "2:4", denser=denser, layers=layers))
    weights = pruned_linears(model)
    stored = stored_config(model).allocated
    assert stored_config(model).layers == layers
    total = sum(w.numel() for name, w in weights.items() if name not in layers)
    for pattern, share in denser.items():
        taken = sum(weights[name].numel() for name, value in stored.items() if value == pattern)
        assert 0 < taken <= share * total
        if share == 1.0:
            assert taken == total
    for name, weight in weights.items():
        if stored.get(name) == "dense":
            assert weight.all()
        else:
            assert_pattern(weight, (stored | layers).get(name, "2:4"))
    model.save_pretrained(tmp_path)
    assert_same_weights(AutoModelForCausalLM.from_pretrained(tmp_path), model)


def test_a_name_that_matches_nothing_is_an_error():
    with pytest.raises(ValueError, match="allocation names 'no_such'"):
        Pruner.from_pretrained(make_model("llama")).prune(
            make_config("magnitude", "unstructured", allocation={"no_such": 0.3})
        )


def test_a_pattern_means_the_same_however_it_is_written():
    chosen = []
    for name in ("4:8", "04:8"):
        model = Pruner.from_pretrained(uneven()).prune(make_config("sparsegpt", denser={name: 0.3}))
        chosen.append(list(stored_config(model).allocated))
    assert chosen[0] == chosen[1]


def test_an_offloaded_model_gets_the_same_allocation():
    config = make_config("sparsegpt", "unstructured", allocation="error")
    model = uneven()
    wanted = stored_config(Pruner.from_pretrained(copy.deepcopy(model)).prune(config)).allocated
    cpu_offload(model, execution_device="cpu")
    assert stored_config(Pruner.from_pretrained(model).prune(config)).allocated == wanted


def test_the_order_of_denser_does_not_matter():
    """config.json sorts its keys. The densest pattern goes to the layers that lose most."""
    chosen = []
    for denser in ({"4:8": 0.3, "dense": 0.1}, {"dense": 0.1, "4:8": 0.3}):
        model = Pruner.from_pretrained(uneven()).prune(make_config("sparsegpt", denser=denser))
        chosen.append(stored_config(model).allocated)
    assert chosen[0] == chosen[1]


def test_losses_belong_to_their_matrices_whatever_the_order_of_calls():
    """A block that calls its linears in another order than it holds them, and one that is never reached."""

    class Backwards(Decoder):
        def __init__(self):
            super().__init__()
            self.never = nn.Linear(16, 16)
            linears = {name: self._modules.pop(name) for name in ("q", "v", "o", "up", "down")}
            self._modules |= dict(reversed(linears.items()))

    block = block_of(Backwards(), "b")
    config = SparsityConfig(pattern="unstructured", sparsity=0.5, allocation="error", dataset=torch.ones(1, 1).long())
    found = allocate(config, [block], calls_of(tokens_of()), None, lambda module: contextlib.nullcontext(), str)
    assert set(found) == {"b.q", "b.v", "b.o", "b.up", "b.down"}
    reports = prune_blocks([block], calls_of(tokens_of()), ErrorCurves([Unstructured(0.5)], 0.01, 128))
    losses = {report.name: json.loads(report.note)[0] for report in reports if report.skipped is None}
    x = torch.cat(tokens_of()).reshape(-1, 16)
    with torch.no_grad():
        for name, (inputs, _) in block.module.seen(x).items():
            weight = block.module.get_submodule(name).weight
            pruned = SparseGPT().solve(weight, stats_of(inputs), Unstructured(0.5)).weight
            expected = (inputs @ (pruned - weight).T).square().sum(1).mean().item()
            assert losses[f"b.{name}"] == pytest.approx(expected, rel=1e-2)
