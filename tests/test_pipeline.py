"""prune_blocks on small modules: whose inputs count, in which order, and what is left alone."""

import copy
from contextlib import contextmanager, nullcontext

import pytest
import torch
from helpers import ar_inputs, output_error, random_weight, stats_of
from torch import Tensor, nn

from optimum_sparse.core import NM, InputStats, Needs, NotPositiveDefinite, Pattern, Solved, keep_mask
from optimum_sparse.methods import Magnitude, SparseGPT, Wanda
from optimum_sparse.pipeline import Block, Calls, Linear, prune_blocks


NM24 = NM(2, 4)
WIDTH = 16


class Attention(nn.Module):
    """Three linears that share their input, one that does not; treats every token alone."""

    def __init__(self, width: int = WIDTH, seed: int = 0):
        super().__init__()
        torch.manual_seed(seed)
        self.q, self.k, self.v, self.o = (nn.Linear(width, width, bias=False) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.o(torch.tanh(self.q(x) * self.k(x)) + self.v(x))


class Spy:
    """A method that prunes by magnitude and remembers what it was given."""

    def __init__(self, needs: Needs = Needs.GRAM):
        self.needs = needs
        self.weights: list[Tensor] = []
        self.stats: list[InputStats] = []

    def solve(self, weight: Tensor, stats: InputStats, pattern: Pattern) -> Solved:
        self.weights.append(weight.clone())
        self.stats.append(stats)
        keep = keep_mask(weight.abs(), pattern)
        return Solved(weight * keep, keep)


def block_of(module: nn.Module, name: str = "block", pattern: Pattern = NM24) -> Block:
    linears = [
        Linear(f"{name}.{local}", child, pattern)
        for local, child in module.named_modules()
        if isinstance(child, nn.Linear)
    ]
    return Block(name, module, linears)


def blocks_of(modules: list[nn.Module], pattern: Pattern = NM24) -> list[Block]:
    return [block_of(module, f"blocks.{index}", pattern) for index, module in enumerate(modules)]


def calls_of(batches: list[Tensor], blocks: int = 1, keep: list[Tensor | None] | None = None) -> Calls:
    return Calls(list(batches), [[((), {}) for _ in batches] for _ in range(blocks)], keep or [])


def tokens_of(batches: int = 2, sequences: int = 3, tokens: int = 20, width: int = WIDTH) -> list[Tensor]:
    return list(ar_inputs(batches * sequences * tokens, width).reshape(batches, sequences, tokens, width))


# ---- statistics


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
    class Conv1D(nn.Module):
        def __init__(self, dense: Tensor):
            super().__init__()
            self.weight = nn.Parameter(dense.T.contiguous())  # [in, out]

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.weight

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
    with pytest.raises(ValueError, match=r"the weight of block\.0 holds NaN or infinity"):
        prune_blocks([block_of(module)], calls_of(tokens_of()), method)


def test_a_gram_matrix_without_a_factor_names_the_layer_and_the_damping():
    with pytest.raises(NotPositiveDefinite, match=r"^block\.q: the Gram matrix .* damping=0"):
        prune_blocks([block_of(Attention(64))], calls_of([ar_inputs(5, 64)[None]]), SparseGPT(damping=0))


@pytest.mark.parametrize("method", [Wanda(), SparseGPT()], ids=lambda method: type(method).__name__)
def test_a_method_that_needs_inputs_says_so(method):
    with pytest.raises(ValueError, match=f"{type(method).__name__} needs calibration inputs, and there are none"):
        prune_blocks([block_of(Attention())], None, method)
