"""Block reconstruction: what is trained, towards what, and what stays as it was."""

import copy
import dataclasses

import pytest
import torch
from helpers import ar_inputs, random_weight
from modules import WIDTH, Conv1D, Decoder, block_of, calls_of, felt_by, normal
from torch import Tensor, nn

from optimum_sparse.core import NM, Pattern, keep_mask
from optimum_sparse.pipeline import Block, Calls, Linear, Reconstruction
from optimum_sparse.pipeline.observe import token_weights
from optimum_sparse.pipeline.reconstruct import reconstruct


SETTINGS = Reconstruction(learning_rate=0.02, passes=8)


def inputs(batches: int = 4, sequences: int = 2, tokens: int = 30, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    x = ar_inputs(batches * sequences * tokens, WIDTH) / 2
    return list(x.reshape(batches, sequences, tokens, WIDTH).to(dtype))


def prune(block: Block, pattern: Pattern = NM(2, 4), names: tuple[str, ...] | None = None) -> dict[str, Tensor]:  # noqa: B008
    """By magnitude, in place; the masks."""
    keeps = {}
    for linear in block.linears:
        if names is None or linear.name.split(".")[-1] in names:
            keeps[linear.name] = keep_mask(linear.read().abs(), pattern)
            linear.write(linear.read() * keeps[linear.name])
    return keeps


class Case:
    """A pruned block, and what its dense form gives for inputs that differ a little from the pruned ones."""

    def __init__(self, module: nn.Module | None = None, names=None, dtype=torch.float32, batches=None, keep=None):
        self.module = (module or Decoder()).to(dtype)
        self.block = block_of(self.module)
        self.calls = calls_of(batches or inputs(dtype=dtype), keep=keep)
        with torch.no_grad():
            self.targets = [
                self.calls.run(self.module, 0, batch, x + 0.1 * normal(*x.shape, seed=batch).to(dtype))
                for batch, x in enumerate(self.calls.hidden)
            ]
        self.keeps = prune(self.block, names=names)
        self.before = copy.deepcopy(self.module)

    def train(self, settings: Reconstruction = SETTINGS, weights: list[Tensor] | None = None) -> tuple[float, float]:
        if weights is None:
            weights = token_weights([self.block], None, self.calls)
        return reconstruct(self.block, 0, self.calls, self.targets, self.keeps, weights, settings)

    def loss(self, module: nn.Module, weights: list[Tensor] | None = None) -> float:
        """By definition, in float64, over real tokens."""
        keep = self.calls.keep or [torch.ones(x.shape[:2], dtype=torch.bool) for x in self.calls.hidden]
        module, error, change = copy.deepcopy(module).double(), [], []
        for batch, (x, y, real) in enumerate(zip(self.calls.hidden, self.targets, keep, strict=True)):
            with torch.no_grad():
                squares = (self.calls.run(module, 0, batch, x.double()) - y.double()).square().mean(-1)
            weight = 1 if weights is None else weights[batch].view(squares.shape)[real]
            error.append((squares[real] * weight).sum())
            change.append(((y.double() - x.double()).square().mean(-1)[real] * weight).sum())
        return (torch.stack(error).sum() / torch.stack(change).sum()).item()

    def changed(self) -> set[str]:
        after = dict(self.module.named_parameters())
        return {name for name, p in self.before.named_parameters() if not torch.equal(after[name], p)}


# ---- what is trained


@pytest.mark.parametrize("pattern", ["2:4", "1:8"])
def test_masks_and_zeros_stay_and_everything_else_is_trained(pattern: str):
    case = Case()
    if pattern == "1:8":
        case.keeps = prune(case.block, NM(1, 8))
        case.before = copy.deepcopy(case.module)
    case.train()
    for linear in case.block.linears:
        assert torch.equal(linear.weight != 0, case.keeps[linear.name])
    assert case.changed() == {name for name, _ in case.module.named_parameters()}, "norms and biases, too"
    for name, p in case.before.named_parameters():
        if p.dim() == 2:
            moved = (case.module.get_parameter(name) != p)[p != 0].float().mean()
            assert moved > 0.8, name  # not those of hidden units that are never active


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_loss_falls_and_is_what_it_is_by_definition(dtype: torch.dtype):
    case = Case(dtype=dtype)
    before, after = case.train()
    tolerance = dict(rel=1e-4 if dtype == torch.float32 else 0.03)
    assert before == pytest.approx(case.loss(case.before), **tolerance)
    assert after == pytest.approx(case.loss(case.module), **tolerance)
    assert after < 0.4 * before


def test_linears_that_are_not_pruned_stay_as_they_are():
    case = Case(names=("q", "down"))
    case.train()
    assert {f"{name}.weight" for name in ("v", "o", "up")}.isdisjoint(case.changed())
    assert {"q.weight", "down.weight", "norm1.weight"} <= case.changed()


def test_a_model_in_bf16_is_trained_in_fp32():
    """Steps are a 50th of what bf16 can tell apart at most: on bf16 weights they would all be lost."""
    settings = Reconstruction(learning_rate=1e-4, passes=100)
    case = Case(dtype=torch.bfloat16)
    before, after = case.train(settings)
    assert all(p.dtype == torch.bfloat16 for p in case.module.parameters())
    kept = case.keeps["block.down"]
    moved = (case.module.down.weight != case.before.down.weight)[kept].float().mean()
    assert moved > 0.3
    assert after < 0.95 * before


def test_a_transposed_linear_has_a_transposed_mask():
    results = []
    for transposed in (False, True):
        first, second = random_weight(24, WIDTH) / 4, random_weight(WIDTH, 24, 1) / 5
        if transposed:
            module = nn.Sequential(Conv1D(first), nn.Tanh(), Conv1D(second))
        else:
            module = nn.Sequential(nn.Linear(WIDTH, 24, False), nn.Tanh(), nn.Linear(24, WIDTH, False))
            module[0].weight.data, module[2].weight.data = first, second
        case = Case(module)
        case.block.linears[:] = [
            Linear(f"block.{place}", module[place], NM(2, 4), transposed=transposed) for place in (0, 2)
        ]
        case.keeps = prune(case.block)
        case.train(dataclasses.replace(SETTINGS, passes=3))
        for linear in case.block.linears:
            assert torch.equal(linear.read() != 0, case.keeps[linear.name])
        results.append([linear.read() for linear in case.block.linears])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


def test_the_tokens_of_a_block_that_returns_a_tuple_and_takes_arguments():
    class Returns(Decoder):
        def forward(self, x: Tensor, shift: float, *, scale: Tensor) -> tuple[Tensor, None]:
            return super().forward(x) * scale + shift, None

    plain, case = Case(), Case()
    case.module.__class__ = Returns
    case.calls.arguments = [[((1.5,), {"scale": torch.tensor(2.0)}) for _ in case.targets]]
    case.targets = [2 * target + 1.5 for target in case.targets]
    case.train()
    plain.train()
    for one, other in zip(case.module.parameters(), plain.module.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


# ---- random order


def test_the_same_seed_gives_the_same_bits_and_another_seed_others():
    results = []
    for seed in (0, 0, 1):
        case = Case()
        case.train(dataclasses.replace(SETTINGS, seed=seed))
        results.append(torch.cat([p.detach().flatten() for p in case.module.parameters()]))
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


def test_the_callers_random_numbers_go_on_as_if_nothing_had_happened():
    case = Case()
    state = torch.get_rng_state()
    case.train()
    assert torch.equal(torch.get_rng_state(), state)


# ---- which tokens count


def some_real(batches: list[Tensor]) -> list[Tensor]:
    masks = [normal(*x.shape[:2], seed=50 + number) > -0.3 for number, x in enumerate(batches)]
    masks[0][1] = False  # a whole sequence
    return masks


def test_what_is_in_padding_does_not_matter():
    results = []
    for size in (0, 10, -1000):
        batches = inputs()
        masks = some_real(batches)
        case = Case(batches=batches, keep=list(masks))
        for group in (case.calls.hidden, case.targets):
            group[:] = [x.masked_fill(~mask[..., None], size) for x, mask in zip(group, masks, strict=True)]
        case.train()
        results.append(case)
    for case in results[1:]:
        for one, other in zip(case.module.parameters(), results[0].module.parameters(), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


def test_errors_are_those_of_tokens_that_are_not_padding():
    """Half of all tokens, in every batch."""
    batches = inputs()
    masks = [torch.arange(30).expand(2, 30) < 15 for _ in batches]
    case = Case(batches=batches, keep=list(masks))
    for x, mask in zip(case.calls.hidden, masks, strict=True):
        x[~mask] = 100.0
    before, after = case.train()
    assert before == pytest.approx(case.loss(case.before), rel=1e-3)
    assert after == pytest.approx(case.loss(case.module), rel=1e-3)


def test_tokens_count_by_their_weights():
    """A weight of 0 for some tokens is as if they were not there."""
    case, half, cut = Case(), Case(), Case()
    weights = [torch.ones(2, 30) for _ in case.targets]
    for part in weights:
        part[:, :15] = 0
    half.train(weights=[2 * part.flatten() for part in weights])
    cut.calls.hidden = [x[:, 15:] for x in cut.calls.hidden]
    cut.targets = [y[:, 15:] for y in cut.targets]
    cut.train()
    case.train()
    for (name, one), other, plain in zip(
        half.module.named_parameters(), cut.module.parameters(), case.module.parameters(), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=2e-2, atol=2e-3)
        assert (one - plain).abs().mean() > 5 * (one - other).abs().mean(), name


def test_the_weighted_loss_falls_more_if_it_is_what_is_trained():
    losses = []
    for weighted in (True, False):
        case = Case()
        weights = token_weights([case.block], felt_by([case.block], case.calls.hidden), case.calls)
        before, after = case.train(weights=weights if weighted else None)
        losses.append(case.loss(case.module, weights))
        if weighted:
            assert before == pytest.approx(case.loss(case.before, weights), rel=1e-4)
            assert after == pytest.approx(losses[0], rel=1e-4)
    assert losses[0] < 0.97 * losses[1]


@pytest.mark.parametrize(("samples", "used"), [(None, 4), (8, 4), (4, 2), (3, 2), (1, 1)])
def test_samples_says_on_how_many_sequences_to_train(samples: int | None, used: int):
    """Batches hold two each."""

    class Remembers(Decoder):
        def forward(self, x: Tensor, batch: int) -> Tensor:
            if torch.is_grad_enabled():
                trained.append(batch)
            return super().forward(x)

    case, trained = Case(), []
    case.module.__class__ = Remembers
    case.calls.arguments = [[((batch,), {}) for batch in range(4)]]
    case.train(dataclasses.replace(SETTINGS, samples=samples, passes=3))
    assert sorted(trained) == sorted([*range(used)] * 3)


# ---- what is refused, and what changes nothing


def test_a_learning_rate_that_ends_in_infinity_names_the_block():
    case = Case()
    with pytest.raises(ValueError, match=r"reconstruction of block went .* reconstruction_learning_rate=1e\+30"):
        case.train(dataclasses.replace(SETTINGS, learning_rate=1e30))
    assert not case.changed()


def test_a_target_that_is_not_finite_names_the_block():
    case = Case()
    case.targets[2][0, 3] = torch.nan
    with pytest.raises(ValueError, match="reconstruction of block went from a loss of nan"):
        case.train()
    assert not case.changed()


@pytest.mark.parametrize("why", ["learning rate 0", "learning rate 3", "already perfect"])
def test_nothing_changes_if_the_loss_does_not_fall(why: str):
    case = Case()
    if why == "already perfect":
        with torch.no_grad():
            case.targets = [case.module(x) for x in case.calls.hidden]
    rate = {"learning rate 0": 0.0, "learning rate 3": 3.0}.get(why, 0.02)
    before, after = case.train(dataclasses.replace(SETTINGS, learning_rate=rate))
    assert before == after == pytest.approx(case.loss(case.before), rel=1e-4, abs=1e-8)
    assert not case.changed()


def test_a_block_that_changes_nothing_has_no_scale_and_fails_no_division():
    """Targets equal to inputs: errors are relative to their difference."""
    case = Case()
    case.targets = list(case.calls.hidden)
    with pytest.raises(ValueError, match="reconstruction of block went from a loss of inf"):
        case.train()


# ---- what the caller sees of it


@pytest.mark.parametrize("outer", [torch.enable_grad, torch.no_grad])
def test_parameters_stay_what_they_were_but_for_their_values(outer):
    case = Case()
    case.module.q.weight.requires_grad_(False)
    case.module.norm1.bias.requires_grad_(False)
    case.module.up.weight.grad = torch.ones_like(case.module.up.weight)
    parameters = [(id(p), p.requires_grad, p.grad) for p in case.module.parameters()]
    memory = [(p.data, p.detach().clone()) for p in case.module.parameters()]
    with outer():
        before, after = case.train()
        assert torch.is_grad_enabled() == (outer is torch.enable_grad)
    assert after < before
    assert "q.weight" in case.changed()
    for p, (identity, requires, grad) in zip(case.module.parameters(), parameters, strict=True):
        assert (id(p), p.requires_grad) == (identity, requires)
        assert p.grad is grad
        assert p.grad_fn is None
        assert not p.data.requires_grad
    assert torch.equal(case.module.up.weight.grad, torch.ones_like(case.module.up.weight))
    assert all(torch.equal(old, content) for old, content in memory), "it may be a file that is mapped into memory"
    assert not any(x.requires_grad for x in (*case.calls.hidden, *case.targets))


def test_arguments_are_not_changed():
    case = Case()
    x, targets = [t.clone() for t in case.calls.hidden], [t.clone() for t in case.targets]
    keeps = {name: keep.clone() for name, keep in case.keeps.items()}
    case.train()
    assert all(torch.equal(a, b) for a, b in zip(case.calls.hidden, x, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(case.targets, targets, strict=True))
    assert all(torch.equal(case.keeps[name], keep) for name, keep in keeps.items())


def test_steps_of_another_size_than_the_batches():
    """Batches of 2 in steps of 1 are the same data in batches of 1, token weights and arguments included."""

    class Shifted(Decoder):
        def forward(self, x: Tensor, shift: Tensor) -> Tensor:
            return super().forward(x) + shift

    shifts = [normal(2, 1, WIDTH, seed=number) for number in range(4)]
    weights = [normal(2, 30, seed=number).exp() for number in range(4)]
    results = []
    for small in (False, True):
        case = Case()
        case.module.__class__ = Shifted
        case.calls.arguments = [[((shift,), {}) for shift in shifts]]
        single = [[((row,), {}) for shift in shifts for row in shift.split(1)]]
        settings = dataclasses.replace(SETTINGS, passes=2)
        if small:
            settings = dataclasses.replace(settings, batch_size=1, arguments=single)
            case.train(settings, [weight.flatten() for weight in weights])
        else:
            case.calls = Calls([x for batch in case.calls.hidden for x in batch.split(1)], single)
            case.targets = [y for batch in case.targets for y in batch.split(1)]
            case.train(settings, [row.flatten() for weight in weights for row in weight.split(1)])
        results.append(torch.cat([p.detach().flatten() for p in case.module.parameters()]))
    assert torch.equal(*results)
