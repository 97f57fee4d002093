"""prune_blocks on small modules: whose inputs count, in which order, and what is left alone."""

import copy
from contextlib import contextmanager, nullcontext

import pytest
import torch
from helpers import ar_inputs, output_error, random_weight, stats_of
from modules import (
    NM24,
    WIDTH,
    Attention,
    Conv1D,
    Decoder,
    Spy,
    block_of,
    blocks_of,
    calls_of,
    felt_by,
    normal,
    tokens_of,
)
from torch import Tensor, nn

from optimum_sparse.core import NM, Needs, NotPositiveDefinite, Pattern, Solved, Unstructured
from optimum_sparse.methods import Admm, Magnitude, Polished, Rose, SparseGPT, Wanda
from optimum_sparse.pipeline import Block, Calls, Linear, Objective, Reconstruction, Sensitivity, prune_blocks
from optimum_sparse.pipeline.observe import Layouts, find_layout


# ---- statistics


@pytest.mark.parametrize("method", [SparseGPT(), Rose(), Admm(), Polished(Wanda())], ids=lambda m: type(m).__name__)
@pytest.mark.parametrize("precision", ["autocast", "medium"])
def test_the_callers_precision_is_not_that_of_the_solvers(method, precision):
    """Blocks in float64, which neither changes: what differs could only be what is solved, in fp32."""
    before = torch.get_float32_matmul_precision()
    batches = [x.double() for x in tokens_of(width=64)]
    objective = Objective(staged=True, input_shift=0.5, residual_shift=0.5)
    pruned = []
    for changed in (False, True):
        block = Decoder(64, 640).double()  # wide enough for a factor that is inverted by halves
        if changed and precision == "medium":
            torch.set_float32_matmul_precision("medium")
        try:
            with torch.autocast("cpu", torch.bfloat16, enabled=changed and precision == "autocast"):
                reports = prune_blocks([block_of(block)], calls_of(batches), method, objective=objective)
            set_inside = torch.get_float32_matmul_precision()
        finally:
            torch.set_float32_matmul_precision(before)
        assert set_inside == ("medium" if changed and precision == "medium" else before)
        pruned.append((block.state_dict(), [report.error for report in reports]))
    (weights, errors), (others, other_errors) = pruned
    assert all(torch.equal(weights[name], others[name]) for name in weights)
    assert errors == other_errors


def test_linears_with_the_same_input_share_their_statistics():
    batches, spy = tokens_of(), Spy()
    prune_blocks([block_of(Attention())], calls_of(batches), spy)
    q, k, v, o = spy.stats
    assert q is k is v
    assert o is not q
    assert [stats.tokens for stats in (q, o)] == [120, 120], "counted once, not once per linear"
    assert torch.allclose(q.gram, stats_of(torch.cat(batches).reshape(-1, WIDTH)).gram, rtol=1e-5)


def test_statistics_of_every_linear_are_those_of_its_own_input():
    module, batches, spy = Attention(), tokens_of(), Spy()
    x = torch.cat(batches).reshape(-1, WIDTH)
    inner = (torch.tanh(module.q(x) * module.k(x)) + module.v(x)).detach()
    prune_blocks([block_of(module)], calls_of(batches), spy)
    torch.testing.assert_close(spy.stats[3].gram, stats_of(inner).gram, rtol=1e-4, atol=1e-5)


def test_an_input_that_was_changed_in_place_is_not_shared():
    class InPlace(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            x = x.clone()
            y = self.a(x)
            return y + self.b(x.mul_(2))

    batches, spy = tokens_of(), Spy(Needs.DIAGONAL)
    prune_blocks([block_of(InPlace())], calls_of(batches), spy)
    torch.testing.assert_close(spy.stats[1].mean_square, 4 * spy.stats[0].mean_square)


@pytest.mark.parametrize("method", [Wanda(), SparseGPT()], ids=lambda method: type(method).__name__)
def test_padding_never_enters_the_statistics(method):
    """Padding is huge here: a single padding token would choose every mask."""
    sequences = [x[:length] for x, length in zip(torch.cat(tokens_of()), (20, 3, 11, 20, 1, 7), strict=True)]
    padded, masks = [], []
    for pair in (sequences[:3], sequences[3:]):
        batch, mask = 1e4 * torch.ones(3, 20, WIDTH), torch.zeros(3, 20, dtype=torch.bool)
        for row, (x, left) in enumerate(zip(pair, (True, False, True), strict=True)):
            place = slice(20 - len(x), 20) if left else slice(0, len(x))
            batch[row, place], mask[row, place] = x, True
        padded.append(batch)
        masks.append(mask)

    alone, together = [Attention(seed=i) for i in range(2)], [Attention(seed=i) for i in range(2)]
    prune_blocks(blocks_of(alone), calls_of([x[None] for x in sequences], 2), method)
    reports = prune_blocks(blocks_of(together), calls_of(padded, 2, masks), method)
    for expected, module in zip(alone, together, strict=True):
        for name, parameter in module.named_parameters():
            torch.testing.assert_close(parameter, expected.get_parameter(name), rtol=1e-3, atol=1e-4)
    assert all(report.error < 0.5 for report in reports)


def test_padding_that_cannot_be_told_apart_is_an_error():
    class Half(Attention):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x[:, ::2])

    mask = torch.ones(3, 20, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"block\.q sees 30 tokens of a batch of 60"):
        prune_blocks([block_of(Half())], calls_of(tokens_of(), 1, [mask, mask]), Wanda())


def test_number_of_batches_does_not_change_the_result():
    x = torch.cat(tokens_of())
    results = []
    for size in (1, 4, 6):
        module = Attention()
        prune_blocks([block_of(module)], calls_of(list(x.split(size))), SparseGPT())
        results.append(torch.cat([parameter.detach() for parameter in module.parameters()]))
    torch.testing.assert_close(results[1], results[0], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(results[2], results[0], rtol=1e-3, atol=1e-4)


# ---- order


class Mlp(nn.Module):
    """Gains above one, so that what pruning changes in a block reaches the end of the model."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(32, 64, bias=False), nn.Linear(64, 32, bias=False)
        for linear in (self.up, self.down):
            nn.init.normal_(linear.weight, std=2 * linear.in_features**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(x)))


def test_each_block_sees_the_outputs_of_the_pruned_blocks_before_it():
    modules, batches, spy = [Attention(seed=seed) for seed in range(3)], tokens_of(), Spy(Needs.DIAGONAL)
    prune_blocks(blocks_of(modules), calls_of(batches, 3), spy)
    x = torch.cat(batches).reshape(-1, WIDTH)
    for index, module in enumerate(modules):  # pruned by now
        torch.testing.assert_close(spy.stats[4 * index].mean_square, x.square().mean(0), rtol=1e-4, atol=1e-5)
        x = module(x).detach()


def test_sequential_beats_statistics_of_the_dense_model():
    """On average over models, as a single small one is a matter of luck. Statistics of dense inputs would give 1."""
    ratios = []
    for seed in range(8):
        torch.manual_seed(seed)
        modules = [Mlp() for _ in range(10)]
        x, unseen = ar_inputs(1200, 32, seed).split(600)

        sequential = copy.deepcopy(modules)
        prune_blocks(blocks_of(sequential, NM(1, 4)), calls_of([x[None]], 10), SparseGPT())

        one_shot, inputs = copy.deepcopy(modules), x[None]
        for pruned, dense in zip(one_shot, modules, strict=True):
            prune_blocks([block_of(pruned, pattern=NM(1, 4))], calls_of([inputs]), SparseGPT())
            inputs = dense(inputs).detach()

        target = nn.Sequential(*modules)(unseen)
        errors = [(nn.Sequential(*result)(unseen) - target).square().sum() for result in (sequential, one_shot)]
        ratios.append(errors[0] / errors[1])
    assert torch.stack(ratios).log().mean().exp() < 0.9


def test_blocks_without_linears_to_prune_are_run_all_the_same():
    first, last, batches, spy = Attention(seed=0), Attention(seed=1), tokens_of(), Spy(Needs.DIAGONAL)
    before = copy.deepcopy(first)
    prune_blocks([Block("blocks.0", first, []), block_of(last)], calls_of(batches, 2), spy)
    x = before(torch.cat(batches).reshape(-1, WIDTH))
    torch.testing.assert_close(spy.stats[0].mean_square, x.square().mean(0).detach(), rtol=1e-4, atol=1e-5)
    for name, parameter in first.named_parameters():
        assert torch.equal(parameter, before.get_parameter(name))


def test_blocks_get_their_own_arguments_and_may_return_tuples():
    class Scaled(Attention):
        def forward(self, x: Tensor, scale: float, *, shift: float) -> tuple[Tensor, None]:
            return super().forward(x) * scale + shift, None

    modules, batches, spy = [Scaled(seed=seed) for seed in range(2)], tokens_of(), Spy(Needs.DIAGONAL)
    arguments = [[((2.0 + index,), {"shift": float(batch)}) for batch in range(2)] for index in range(2)]
    prune_blocks(blocks_of(modules), Calls(list(batches), arguments), spy)
    x = torch.cat([modules[0](x, 2.0, shift=float(batch))[0] for batch, x in enumerate(batches)])
    expected = x.detach().reshape(-1, WIDTH).square().mean(0)
    torch.testing.assert_close(spy.stats[4].mean_square, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("objective", [Objective(), Objective(True, 0.5, 0.5)], ids=["plain", "two paths"])
@pytest.mark.parametrize("start", [0, 1])
def test_looking_only_at_new_structures_changes_nothing(objective: Objective, start: int, monkeypatch):
    """Not where a run begins again, either, with other blocks to look at."""

    class Counted(Decoder):
        def forward(self, x: Tensor) -> Tensor:
            passes.append(self)
            return super().forward(x)

    modules = [Counted(seed=1), Attention(seed=2), Counted(seed=3), Counted(seed=4), Attention(seed=5)]
    kinds = [type(module) for module in modules[start:]]
    results, counts = [], []
    for looks_at_all in (False, True):
        passes: list[nn.Module] = []
        pruned = copy.deepcopy(modules)
        calls = calls_of(tokens_of(), 5)
        with monkeypatch.context() as patch:
            if looks_at_all:
                patch.setattr(Layouts, "find", lambda self, *args: find_layout(*args))
            reports = prune_blocks(blocks_of(pruned), calls, SparseGPT(), objective=objective, start=start)
        results.append((nn.ModuleList(pruned).state_dict(), [(report.name, report.error) for report in reports]))
        counts.append(len(passes))
    assert counts[1] - counts[0] == kinds.count(Counted) - 1
    assert results[0][1] == results[1][1]
    assert all(torch.equal(weight, results[1][0][name]) for name, weight in results[0][0].items())


# ---- what is written and reported


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_are_replaced_in_their_dtype_and_reported(dtype: torch.dtype):
    module, batches = Attention().to(dtype), [batch.to(dtype) for batch in tokens_of()]
    before = copy.deepcopy(module)
    parameters = {name: id(parameter) for name, parameter in module.named_parameters()}
    reports = prune_blocks([block_of(module)], calls_of(batches), SparseGPT())
    assert [report.name for report in reports] == ["block.q", "block.k", "block.v", "block.o"]
    x = torch.cat(batches).reshape(-1, WIDTH)
    for report, name in zip(reports, "qkvo", strict=True):
        weight, dense = module.get_submodule(name).weight, before.get_submodule(name).weight
        assert weight.dtype == dtype
        assert id(weight) == parameters[f"{name}.weight"], "tied parameters stay tied"
        assert ((weight.reshape(-1, 4) != 0).sum(1) == 2).all()
        assert not weight[weight == 0].signbit().any(), "zeros are those of a weight that was loaded"
        assert (report.shape, report.pattern, report.sparsity, report.skipped) == ([16, 16], "2:4", 0.5, None)
        if name == "q":
            assert report.error == pytest.approx(output_error(dense, weight, x), rel=0.05)


def test_memory_of_the_old_weight_is_not_written_to():
    """It may be a file that is mapped into memory."""
    module = Attention()
    old = [(parameter.data, parameter.data.clone()) for parameter in module.parameters()]
    prune_blocks([block_of(module)], None, Magnitude())
    assert all(torch.equal(memory, content) for memory, content in old)


def test_a_transposed_linear_is_pruned_along_its_inputs():
    dense, x = random_weight(12, WIDTH), ar_inputs(100, WIDTH)
    for method in (Magnitude(), Wanda(), SparseGPT()):
        module = nn.Sequential(Conv1D(dense))
        block = Block("block", module, [Linear("block.0", module[0], NM24, transposed=True)])
        (report,) = prune_blocks([block], calls_of([x[None]]), method)
        expected = method.solve(dense, stats_of(x), NM24).weight
        assert report.shape == [12, WIDTH]
        assert module[0].weight.shape == (WIDTH, 12)
        assert module[0].weight.is_contiguous()
        torch.testing.assert_close(module[0].weight.data, expected.T, rtol=1e-3, atol=1e-4)
        assert ((module[0].weight.T.reshape(-1, 4) != 0).sum(1) == 2).all()


def test_a_linear_that_no_token_reached_is_skipped_and_left_untouched():
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused, self.empty = (nn.Linear(WIDTH, WIDTH) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            self.empty(x.reshape(-1, WIDTH)[:0])
            return self.used(x)

    module = Experts()
    before = copy.deepcopy(module)
    used, unused, empty = prune_blocks([block_of(module)], calls_of(tokens_of()), Wanda())
    assert used.skipped is None
    for report, name in ((unused, "unused"), (empty, "empty")):
        assert report.skipped == "no calibration token reached it"
        assert (report.pattern, report.sparsity, report.error) == (None, 0, None)
        assert torch.equal(module.get_submodule(name).weight, before.get_submodule(name).weight)


def test_magnitude_needs_no_calls_and_reaches_every_linear():
    modules = [Attention(seed=0), Attention(seed=1)]
    reports = prune_blocks(blocks_of(modules), None, Magnitude())
    assert [report.sparsity for report in reports] == [0.5] * 8
    assert all(report.error is None for report in reports)


def test_hooks_are_gone_afterwards_even_if_the_block_fails():
    class Broken(Attention):
        def forward(self, x: Tensor) -> Tensor:
            self.q(x)
            raise RuntimeError("broken")

    for module in (Attention(), Broken()):
        expected = pytest.raises(RuntimeError, match="broken") if isinstance(module, Broken) else nullcontext()
        with expected:
            prune_blocks([block_of(module)], calls_of(tokens_of()), Wanda())
        assert not any(child._forward_pre_hooks for child in module.modules())


def test_onload_holds_each_block_while_it_is_worked_on():
    events = []
    modules = [Attention(seed=0), Attention(seed=1)]

    @contextmanager
    def onload(module: nn.Module):
        events.append(("in", modules.index(module)))
        yield
        assert all((child.weight == 0).any() for child in module.children())
        events.append(("out", modules.index(module)))

    prune_blocks(blocks_of(modules), calls_of(tokens_of(), 2), Wanda(), onload)
    assert events == [("in", 0), ("out", 0), ("in", 1), ("out", 1)]


# ---- errors name the layer


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("method", [Wanda(), SparseGPT()], ids=lambda method: type(method).__name__)
def test_inputs_that_are_not_finite_are_named_before_anything_is_written(value: float, method):
    module, batches = Attention().half(), [batch.half() for batch in tokens_of()]
    before = copy.deepcopy(module)
    batches[1][2, 7, 3] = value
    text = r"the inputs of block\.q hold NaN or infinity.*\(torch\.float16\).* Load it in bfloat16 or float32"
    with pytest.raises(ValueError, match=text):
        prune_blocks([block_of(module)], calls_of(batches), method)
    assert all(torch.equal(p, before.get_parameter(name)) for name, p in module.named_parameters())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("method", [Magnitude(), Wanda(), SparseGPT()], ids=lambda method: type(method).__name__)
def test_a_weight_that_is_not_finite_is_named(value: float, method):
    module = nn.Sequential(nn.Linear(WIDTH, 4), nn.Linear(4, WIDTH))
    module[0].weight.data[1, 2] = value
    with pytest.raises(ValueError, match=r"block\.0\.weight holds NaN or infinity"):
        prune_blocks([block_of(module)], calls_of(tokens_of()), method)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.complex64, torch.int8, torch.bool])
def test_parameters_of_other_types_are_no_hindrance(dtype: torch.dtype):
    module = nn.Sequential(nn.Linear(WIDTH, 4), nn.Linear(4, WIDTH))
    module.other = nn.Parameter(torch.ones(3, 2).to(dtype), requires_grad=False)
    prune_blocks([block_of(module)], calls_of(tokens_of()), Magnitude())
    if dtype.is_floating_point or dtype.is_complex:
        module.other.data[1, 1] = torch.nan
        with pytest.raises(ValueError, match=r"block\.other holds NaN or infinity"):
            prune_blocks([block_of(module)], calls_of(tokens_of()), Magnitude())


def test_a_gram_matrix_without_a_factor_names_the_layer_and_the_damping():
    with pytest.raises(NotPositiveDefinite, match=r"^block\.q: the Gram matrix .* damping=0: damping=0\.01 works"):
        prune_blocks([block_of(Attention(64))], calls_of([ar_inputs(5, 64)[None]]), SparseGPT(damping=0))


@pytest.mark.parametrize("method", [Wanda(), SparseGPT()], ids=lambda method: type(method).__name__)
def test_a_method_that_needs_inputs_says_so(method):
    with pytest.raises(ValueError, match=f"{type(method).__name__} needs calibration inputs, and there are none"):
        prune_blocks([block_of(Attention())], None, method)


# ---- stages


@pytest.mark.parametrize("staged", [False, True])
def test_with_stages_each_linear_sees_what_the_pruned_ones_before_it_give(staged: bool):
    module, batches, spy = Decoder(), tokens_of(), Spy()
    dense = copy.deepcopy(module)
    prune_blocks([block_of(module)], calls_of(batches), spy, objective=Objective(staged=staged))
    x = torch.cat(batches).reshape(-1, WIDTH)
    with torch.no_grad():
        seen = (module if staged else dense).seen(x)  # the module is pruned by now
    for stats, name in zip(spy.stats, ("q", "v", "o", "up", "down"), strict=True):
        torch.testing.assert_close(stats.gram, stats_of(seen[name][0]).gram, rtol=1e-4, atol=1e-5)


def test_reports_keep_the_order_of_the_linears_in_whatever_order_they_are_solved():
    block = block_of(Decoder())
    block.linears.reverse()
    names = [linear.name for linear in block.linears]
    reports = prune_blocks([block], calls_of(tokens_of()), SparseGPT(), objective=Objective(staged=True))
    assert [report.name for report in reports] == names


# ---- targets towards the dense path


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(("a", "b"), [(0, 0), (1, 0), (0.5, 0), (0, 1), (0, 0.5), (1, 1), (0.5, 0.25)])
def test_targets_are_least_squares_towards_the_dense_path(a: float, b: float, weighted: bool):
    """In the last of three blocks, by lstsq in float64: x (W_t - W)^T is to be a (x_d - x) W^T + b (r_d - r)."""
    modules, batches, spy = [Decoder(seed=seed) for seed in range(3)], tokens_of(4, 5, 30), Spy()
    dense, blocks = copy.deepcopy(modules), blocks_of(modules)
    felt = Sensitivity(felt_by(blocks, batches).tokens, {}) if weighted else None  # rows would come scaled
    objective = Objective(staged=True, input_shift=a, residual_shift=b, damping=0.02, sensitivity=felt)
    prune_blocks(blocks, calls_of(batches, 3), spy, objective=objective)
    x = torch.cat(batches).double().reshape(-1, WIDTH)
    pruned, dense = nn.Sequential(*modules).double(), nn.Sequential(*dense).double()
    with torch.no_grad():
        seen, wanted = pruned[2].seen(pruned[:2](x)), dense[2].seen(dense[:2](x))
    targets = dict(zip(("q", "v", "o", "up", "down"), spy.weights[-5:], strict=True))
    for name in ("o", "up", "down"):
        weight = dense[2].get_submodule(name).weight.detach()
        (inputs, stream), (inputs_d, stream_d) = seen[name], wanted[name]
        asked = a * (inputs_d - inputs) @ weight.T
        if name != "up":
            asked += b * (stream_d - stream)
        share = torch.ones(len(x), 1, dtype=torch.float64)
        if felt is not None:
            of_token = torch.cat(felt.tokens[f"blocks.2.{name}"]).double()
            share = (of_token / of_token.mean()).clamp(1e-4, 50).sqrt()[:, None]
        share = (share / share.sum()).sqrt()
        power = (share * inputs).square().sum(0)
        ridge = 0.02 * power.sum() / (power > 0).sum()
        left = torch.cat([share * inputs, ridge.sqrt() * torch.eye(len(power), dtype=torch.float64)])
        right = torch.cat([share * asked, torch.zeros(len(power), len(weight), dtype=torch.float64)])
        change = torch.linalg.lstsq(left, right).solution.T
        torch.testing.assert_close(targets[name].double() - weight, change, rtol=2e-3, atol=2e-3)
        assert (change.abs().max() > 0.1) == (a > 0 or (b > 0 and name != "up")), "there was something to repair"
        if not change.any():
            assert torch.equal(targets[name], weight.float())


def test_without_damping_the_shifted_weight_gives_the_dense_output_as_well_as_any_weight_can():
    modules = [nn.Sequential(nn.Linear(WIDTH, WIDTH)) for _ in range(2)]
    dense, spy, x = copy.deepcopy(modules), Spy(), normal(1, 400, WIDTH)
    prune_blocks(blocks_of(modules), calls_of([x], 2), spy, objective=Objective(input_shift=1, damping=1e-7))
    x, weight = x[0].double(), dense[1][0].weight.detach().double()
    inputs, inputs_d = modules[0].double()(x).detach(), dense[0].double()(x).detach()
    best = torch.linalg.lstsq(inputs, inputs_d @ weight.T).solution.T
    weights = (best, spy.weights[1].double(), weight)
    errors = [(inputs @ w.T - inputs_d @ weight.T).square().mean().item() for w in weights]
    assert errors[1] == pytest.approx(errors[0], rel=1e-3)
    assert errors[1] < 0.5 * errors[2]


def test_shifts_lower_the_error_of_the_model():
    """Geometric mean over models, on unseen tokens, against the dense model. Measured: 0.49, 0.40, 0.30."""
    shifts = [(0, 0), (0.5, 0), (0, 0.5), (0.5, 0.5)]
    errors = torch.zeros(4, len(shifts))
    for seed in range(4):
        modules = [Decoder(seed=100 * seed + index) for index in range(6)]
        x, unseen = (ar_inputs(1200, WIDTH, seed) / 2).split(600)
        target = nn.Sequential(*modules)(unseen)
        for place, (a, b) in enumerate(shifts):
            pruned = copy.deepcopy(modules)
            objective = Objective(staged=True, input_shift=a, residual_shift=b)
            prune_blocks(blocks_of(pruned), calls_of([x[None]], 6), SparseGPT(), objective=objective)
            errors[seed, place] = (nn.Sequential(*pruned)(unseen) - target).square().sum()
    ratio = (errors / errors[:, :1]).log().mean(0).exp()
    assert ratio[1] < 0.7
    assert ratio[2] < 0.6
    assert ratio[3] < 0.85 * ratio[1:3].min()


@pytest.mark.parametrize("shift", ["input_shift", "residual_shift"])
def test_shifts_need_gram_matrices(shift: str):
    for method in (Wanda(), Spy(Needs.DIAGONAL)):
        with pytest.raises(ValueError, match=f"a method that sees Gram matrices, not {type(method).__name__}"):
            prune_blocks([block_of(Attention())], calls_of(tokens_of()), method, objective=Objective(**{shift: 0.5}))


@pytest.mark.parametrize("method", [SparseGPT(), Rose(), Admm(), Polished(SparseGPT())], ids=str)
def test_a_layer_that_keeps_everything_stays_as_it_is_to_the_bit(method):
    """Its target is another matrix here, and its rows are scaled."""
    modules, batches = [Decoder(seed=seed) for seed in range(2)], tokens_of()
    blocks = blocks_of(modules)
    keep = {"q", "o", "down"}
    for block in blocks:
        patterns = [Unstructured(0.0 if linear.name.split(".")[-1] in keep else 0.5) for linear in block.linears]
        block.linears[:] = [
            Linear(linear.name, linear.module, pattern)
            for linear, pattern in zip(block.linears, patterns, strict=True)
        ]
    before = copy.deepcopy(modules)
    objective = Objective(True, 0.5, 0.5, sensitivity=felt_by(blocks, batches))
    prune_blocks(blocks, calls_of(batches, 2), method, objective=objective)
    for module, dense in zip(modules, before, strict=True):
        for name, child in dense.named_children():
            assert torch.equal(module.get_submodule(name).weight, child.weight) == (name in keep or "norm" in name)


def test_the_dense_path_leaves_pruned_weights_in_place_when_a_block_fails_on_it():
    """Its second pass over the calibration data is the dense one."""

    class Fragile(Decoder):
        def forward(self, x: Tensor) -> Tensor:
            if self.broken:
                raise RuntimeError("broken")
            return super().forward(x)

    class Breaks(Spy):
        def solve(self, *args) -> Solved:
            modules[0].broken = len(self.weights) == 4  # from the last linear of the first block on
            return super().solve(*args)

    modules = [Fragile(seed=seed) for seed in range(2)]
    modules[0].broken = modules[1].broken = False
    with pytest.warns(UserWarning, match="stopped half-way"), pytest.raises(RuntimeError, match="broken"):
        prune_blocks(blocks_of(modules), calls_of(tokens_of(), 2), Breaks(), objective=Objective(input_shift=0.5))
    for linear in block_of(modules[0]).linears:
        assert ((linear.weight.reshape(-1, 4) != 0).sum(1) == 2).all()


# ---- rows that are felt more


HALF = Unstructured(0.5)


def of_rows(rows: Tensor, name: str = "block.0") -> Sensitivity:
    return Sensitivity({name: [torch.ones(120)]}, {name: rows})


def pruned_by_rows(method, rows: Tensor | None, pattern: Pattern = HALF) -> tuple[Tensor, Tensor]:
    module = nn.Sequential(nn.Linear(WIDTH, 12, bias=False))
    dense = module[0].weight.data = random_weight(12, WIDTH)
    objective = Objective(sensitivity=None if rows is None else of_rows(rows))
    prune_blocks([block_of(module, pattern=pattern)], calls_of([normal(1, 120, WIDTH)]), method, objective=objective)
    return dense, module[0].weight.detach()


@pytest.mark.parametrize(
    "method", [Spy(), SparseGPT(), Rose(), Admm(), Polished(SparseGPT())], ids=lambda m: type(m).__name__
)
def test_rows_that_are_felt_more_keep_more_weights_and_the_count_stays(method):
    rows = torch.ones(12)
    rows[::3] = 30
    _, plain = pruned_by_rows(method, None)
    _, weighed = pruned_by_rows(method, rows)
    assert int((plain != 0).sum()) == int((weighed != 0).sum()) == 12 * WIDTH // 2
    counts, before = (weighed != 0).sum(1), (plain != 0).sum(1)
    assert (counts[::3] > before[::3]).all()
    assert counts[::3].float().mean() > 1.5 * counts[rows == 1].float().mean()
    _, alike = pruned_by_rows(method, 7 * torch.ones(12))
    assert torch.equal(alike, plain)


def test_inside_a_row_the_choice_stays_and_weights_keep_their_size():
    dense, weight = pruned_by_rows(Spy(), normal(12, seed=1).mul(2).exp())
    kept = weight != 0
    for row in range(12):
        expected = torch.zeros(WIDTH, dtype=torch.bool)
        expected[dense[row].abs().argsort(descending=True)[: int(kept[row].sum())]] = True
        assert torch.equal(kept[row], expected)
    torch.testing.assert_close(weight[kept], dense[kept])


@pytest.mark.parametrize("method", [SparseGPT(), Admm()], ids=str)
def test_rows_do_not_compete_under_n_of_m(method):
    _, plain = pruned_by_rows(method, None, NM24)
    _, weighed = pruned_by_rows(method, normal(12, seed=1).mul(2).exp(), NM24)
    torch.testing.assert_close(weighed, plain, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rows", [torch.zeros(12), torch.cat([torch.zeros(11), torch.ones(1)])], ids=["all", "most"])
def test_rows_that_are_not_felt_at_all_leave_an_exact_finite_matrix(rows: Tensor):
    _, weight = pruned_by_rows(SparseGPT(), rows)
    assert torch.isfinite(weight).all()
    assert int((weight == 0).sum()) == 12 * WIDTH // 2


# ---- reconstruction


@pytest.mark.parametrize("padded", [False, True])
def test_reconstruction_brings_the_model_closer_to_the_dense_one(padded: bool):
    """Of every block, the last one too; on tokens that are not padding. Masks stay."""
    modules, batches = [Decoder(seed=seed) for seed in range(3)], [x / 2 for x in tokens_of(6, 2, 40)]
    keep = [normal(2, 40, seed=number) > 0 for number in range(6)] if padded else None
    dense, results, errors = copy.deepcopy(modules), [], []
    x = torch.cat(batches)[torch.cat(keep)] if keep else torch.cat(batches).reshape(-1, WIDTH)
    settings = Reconstruction(learning_rate=0.01, passes=20)
    for reconstruction in (None, settings, settings):
        pruned = copy.deepcopy(modules)
        objective = Objective(True, sensitivity=felt_by(blocks_of(pruned), batches) if padded else None)
        reports = prune_blocks(
            blocks_of(pruned),
            calls_of(batches, 3, keep),
            SparseGPT(),
            objective=objective,
            reconstruction=reconstruction,
        )
        assert all((report.block_error is not None) == (reconstruction is not None) for report in reports)
        results.append(pruned)
        with torch.no_grad():
            errors.append((nn.Sequential(*pruned)(x) - nn.Sequential(*dense)(x)).square().sum())
    assert errors[1] < 0.6 * errors[0]
    for one, other, again in zip(*results, strict=True):
        for linear in block_of(other).linears:
            name = linear.name.removeprefix("block.")
            # the first block's masks are those without training; later ones got better inputs
            assert one is not results[0][0] or torch.equal(linear.weight == 0, one.get_submodule(name).weight == 0)
            assert ((linear.weight.reshape(-1, 4) != 0).sum(1) == 2).all()
        assert all(torch.equal(p, q) for p, q in zip(other.parameters(), again.parameters(), strict=True))


def test_reconstruction_needs_calls():
    with pytest.raises(ValueError, match="needs calibration inputs"):
        prune_blocks([block_of(Attention())], None, Magnitude(), reconstruction=Reconstruction())
