"""SparseLinear is nn.Linear with the dense weight, and its state dict is the disk format."""

import copy
import pickle

import pytest
import torch
from helpers import random_weight
from torch.autograd import forward_ad
from torch.func import functional_call
from torch.nn import functional as F
from torch.nn.utils import parametrize

from optimum_sparse.core import NM, Pattern, Unstructured, keep_mask
from optimum_sparse.formats import bitmask, slots
from optimum_sparse.kernels import linear as linear_kernels
from optimum_sparse.kernels.linear import CPU_TOKENS, CPU_TOKENS_WIDE
from optimum_sparse.nn import SparseLinear
from optimum_sparse.nn import linear as linear_module


PATTERNS = [NM(2, 4), NM(3, 5), NM(4, 8), Unstructured(0.5), Unstructured(0.3), Unstructured(0)]


def pruned(pattern: Pattern, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    weight = random_weight(7, 40)
    return (weight * keep_mask(weight.abs(), pattern)).to(dtype)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("with_bias", [True, False])
def test_forward_equals_the_dense_layer(pattern: Pattern, dtype: torch.dtype, with_bias: bool):
    weight, bias = pruned(pattern, dtype), random_weight(1, 7)[0].to(dtype) if with_bias else None
    linear = SparseLinear.from_dense(weight, bias, pattern)
    for shape in ((40,), (3, 40), (2, 5, 40)):
        x = random_weight(1, torch.Size(shape).numel()).reshape(shape).to(dtype)
        torch.testing.assert_close(linear(x), F.linear(x, weight, bias))
    assert torch.equal(linear.to_dense(), weight)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_state_dict_is_the_disk_format_and_loads_into_an_empty_layer(pattern: Pattern):
    weight = pruned(pattern, torch.bfloat16)
    state = SparseLinear.from_dense(weight, None, pattern).state_dict()
    assert {name: (tuple(t.shape), t.dtype) for name, t in state.items()} == {
        name: (shape, dtype or torch.bfloat16) for name, (shape, dtype) in bitmask.layout((7, 40), pattern).items()
    }
    for device in ("cpu", "meta"):
        empty = SparseLinear(40, 7, False, pattern, torch.bfloat16, device)
        empty.load_state_dict(state, assign=device == "meta")
        empty.validate()
        assert torch.equal(empty.to_dense(), weight)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_the_dense_weight_beside_it_is_the_same_matrix_wherever_it_goes(pattern: Pattern, monkeypatch):
    weight, bias, other = pruned(pattern), torch.randn(7), pruned(pattern)
    layer = SparseLinear.from_dense(weight, bias, pattern, keeps_dense=True)
    alone = SparseLinear.from_dense(weight, bias, pattern)
    assert layer.state_dict().keys() == alone.state_dict().keys()
    assert layer.growth == pytest.approx(1 + weight.nbytes / max(1, layer.weight.nbytes))
    many = torch.randn(2, CPU_TOKENS, 40)
    copies = copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), copy.deepcopy(layer)._apply(torch.clone)
    for moved in (layer, *copies):
        assert torch.equal(moved.dense, weight)
        assert torch.equal(moved(many), F.linear(many, weight, bias))  # to the bit: that is what multiplies
        torch.testing.assert_close(moved(many[0, :1]), F.linear(many[0, :1], weight, bias))
    half = copy.deepcopy(layer).to(torch.bfloat16)
    assert torch.equal(half.dense, weight.bfloat16())
    half.load_state_dict(SparseLinear.from_dense(other, bias, pattern).state_dict())
    assert torch.equal(half.dense, other.bfloat16())
    assert copy.deepcopy(layer).to("meta").dense is None
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            torch.testing.assert_close(layer(many), alone(many))
    x = many.clone().requires_grad_()
    monkeypatch.setattr(linear_kernels, "expand", None)  # nothing is expanded any more
    layer(x).sum().backward()
    torch.testing.assert_close(x.grad, weight.sum(0).expand_as(x))


@pytest.mark.parametrize("change", ["call", "parameter", "data", "in place", "partial", "parametrized", "tangent"])
@pytest.mark.parametrize("pattern", [NM(2, 4), Unstructured(0.5)], ids=str)
def test_the_dense_weight_of_another_matrix_is_not_taken(pattern: Pattern, change: str):
    first, second = pruned(pattern), pruned(pattern) * 2
    layer = SparseLinear.from_dense(first, None, pattern, keeps_dense=True)
    state = SparseLinear.from_dense(second, None, pattern).state_dict()
    x = torch.randn(CPU_TOKENS_WIDE + 1, 40)
    if change == "tangent":
        with forward_ad.dual_level():
            weight = forward_ad.make_dual(layer.weight, torch.ones_like(layer.weight))
            with pytest.raises(ValueError, match="a compressed weight cannot be trained"):
                functional_call(layer, {"weight": weight}, x)
        return
    if change == "call":
        assert not torch.equal(functional_call(layer, state, x), layer(x))
        torch.testing.assert_close(functional_call(layer, state, x), F.linear(x, second))
        assert torch.equal(layer(x), F.linear(x, first))
        return
    if change == "parameter":
        layer.weight = torch.nn.Parameter(layer.weight.data * 2, requires_grad=False)
    elif change == "data":
        layer.weight.data = layer.weight.data * 2
    elif change == "in place":
        layer.weight.mul_(2)
    elif change == "partial":
        layer.load_state_dict({"weight": layer.weight.data * 2}, strict=False)
    else:
        parametrize.register_parametrization(layer, "weight", Doubled(), unsafe=True)
    torch.testing.assert_close(layer(x), F.linear(x, 2 * first))
    if change != "parametrized":
        torch.testing.assert_close(copy.deepcopy(layer)(x), F.linear(x, 2 * first))


class Doubled(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * x


def test_names_of_the_state_dict():
    names = {"weight", "weight_mask", "bias"}
    assert set(SparseLinear(8, 2, True, NM(2, 4)).state_dict()) == names
    assert set(SparseLinear(8, 2, True, Unstructured(0.5)).state_dict()) == names | {"weight_rows"}
    assert set(SparseLinear(8, 2, False, NM(2, 4)).state_dict()) == names - {"bias"}


def test_a_dense_weight_does_not_load_into_it():
    """A wrong reader must fail on the shape; the same holds in the other direction."""
    linear = SparseLinear(8, 2, False, NM(2, 4))
    with pytest.raises(RuntimeError, match="size mismatch for weight"):
        linear.load_state_dict({"weight": torch.zeros(2, 8)}, strict=False)
    with pytest.raises(RuntimeError, match="size mismatch for weight"):
        torch.nn.Linear(8, 2, bias=False).load_state_dict(linear.state_dict(), strict=False)


def test_moving_to_another_dtype_changes_values_and_not_the_mask():
    linear = SparseLinear.from_dense(pruned(Unstructured(0.5)), torch.zeros(7), Unstructured(0.5)).to(torch.bfloat16)
    assert {name: tensor.dtype for name, tensor in linear.state_dict().items()} == {
        "weight": torch.bfloat16,
        "bias": torch.bfloat16,
        "weight_mask": torch.uint8,
        "weight_rows": torch.int64,
    }
    linear.validate()
    assert linear(torch.zeros(1, 40, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_bias_is_shared_and_gradients_reach_inputs_but_not_values():
    dense = torch.nn.Linear(40, 7)
    dense.weight.data = pruned(NM(2, 4))
    linear = SparseLinear.from_dense(dense.weight, dense.bias, NM(2, 4))
    assert linear.bias is dense.bias
    x = torch.zeros(1, 40, requires_grad=True)
    linear(x).sum().backward()
    torch.testing.assert_close(x.grad[0], dense.weight.sum(0).detach())
    assert linear.weight.grad is None


def test_validate_finds_a_damaged_layer():
    linear = SparseLinear.from_dense(pruned(NM(2, 4)), None, NM(2, 4))
    linear.validate()
    linear.weight_mask[0, 0] ^= 1
    with pytest.raises(ValueError, match="the file is damaged"):
        linear.validate()


def test_text_says_sizes_and_pattern():
    assert str(SparseLinear(8, 2, False, NM(2, 4))) == "SparseLinear(8, 2, bias=False, pattern='2:4')"


@pytest.mark.parametrize("tokens", [1, CPU_TOKENS + 1])
def test_autocast_is_that_of_a_dense_layer(tokens: int):
    weight, bias, x = pruned(NM(2, 4)), torch.randn(7), torch.randn(tokens, 40)
    linear = SparseLinear.from_dense(weight, bias, NM(2, 4))
    with torch.autocast("cpu", torch.bfloat16):
        y, wanted = linear(x), F.linear(x, weight, bias)
        again = linear(x.bfloat16())
    assert y.dtype == wanted.dtype == torch.bfloat16
    torch.testing.assert_close(y, wanted)
    assert torch.equal(y, again)


@pytest.mark.parametrize("keeps_dense", [False, True])
@pytest.mark.parametrize("pattern", [NM(2, 4), Unstructured(0.5)], ids=str)
def test_compiled_without_a_break_for_any_number_of_tokens(pattern: Pattern, keeps_dense: bool):
    weight, bias = pruned(pattern), torch.randn(7)
    linear = SparseLinear.from_dense(weight, bias, pattern, keeps_dense)
    torch._dynamo.reset()  # what other cases compiled counts towards its limit
    compiled = torch.compile(linear, fullgraph=True, dynamic=True, backend="aot_eager")
    for tokens in (1, 3, 20):
        x = torch.randn(2, tokens, 40)
        torch.testing.assert_close(compiled(x), F.linear(x, weight, bias))
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), F.linear(x, weight, bias))


@pytest.mark.parametrize("name", ["weight_mask", "weight_rows"])
def test_a_damaged_state_dict_does_not_load(name: str):
    state = SparseLinear.from_dense(pruned(Unstructured(0.5)), None, Unstructured(0.5)).state_dict()
    state[name] = state[name] + 1
    state = {f"0.{key}": part for key, part in state.items()}
    for assign in (False, True):
        linear = SparseLinear(40, 7, False, Unstructured(0.5))
        with pytest.raises(ValueError, match="the file is damaged"):
            torch.nn.Sequential(linear).load_state_dict(state, assign=assign)


def test_copies_and_pickles():
    linear = SparseLinear.from_dense(pruned(NM(2, 4)), torch.randn(7), NM(2, 4))
    x = torch.randn(2, 40)
    for other in (copy.deepcopy(linear), pickle.loads(pickle.dumps(linear))):
        assert torch.equal(other(x), linear(x))


# ---- packed, which only CUDA devices ask for: the reference reads it everywhere


@pytest.fixture
def packing(monkeypatch: pytest.MonkeyPatch):
    def uneven(device: torch.device, dtype: torch.dtype, pattern: Pattern, shape: tuple[int, int]) -> str | None:
        if device.type == "meta" or dtype.itemsize != 2 or slots.even_slots(pattern, shape[1]):
            return None
        return "slots"

    monkeypatch.setattr(linear_module, "wanted_layout", uneven)


@pytest.mark.usefixtures("packing")
@pytest.mark.parametrize("pattern", [Unstructured(0.5), NM(3, 6), NM(2, 4)], ids=str)
def test_a_packed_layer_is_the_same_layer(pattern):
    weight = random_weight(24, 192)
    weight = (weight * keep_mask(weight.abs(), pattern)).bfloat16()
    stored = bitmask.encode(weight, pattern)
    layer = SparseLinear.from_dense(weight, torch.ones(24).bfloat16(), pattern)
    assert layer.packed == (pattern != NM(2, 4))

    def check(layer: SparseLinear) -> None:
        assert torch.equal(layer.to_dense(), weight)
        x = random_weight(3, 192).bfloat16()
        assert torch.equal(layer(x), torch.nn.functional.linear(x, weight, layer.bias))
        layer.validate()
        state = layer.state_dict()
        assert set(state) == {*stored, "bias"}
        for name, tensor in stored.items():
            assert torch.equal(state[name], tensor)
            assert torch.equal(layer.compressed()[name], tensor)

    check(layer)
    check(copy.deepcopy(layer))
    layer.to(torch.float32)  # no kernel takes it: the values move back
    assert not layer.packed
    layer.to(torch.bfloat16)
    assert layer.packed == (pattern != NM(2, 4))
    check(layer)
    other = SparseLinear.from_dense(torch.zeros_like(weight), torch.zeros(24).bfloat16(), pattern)
    other.load_state_dict(layer.state_dict())
    assert other.packed == layer.packed
    check(other)
    layer.unpack()
    layer.unpack()
    check(layer)
    layer.pack()
    layer.pack()
    check(layer)


@pytest.mark.usefixtures("packing")
def test_gradients_through_a_packed_layer():
    weight = random_weight(24, 192)
    weight = (weight * keep_mask(weight.abs(), Unstructured(0.5))).bfloat16()
    layer = SparseLinear.from_dense(weight, None, Unstructured(0.5))
    assert layer.packed
    x = random_weight(3, 192).bfloat16().requires_grad_()
    layer(x).sum().backward()
    torch.testing.assert_close(x.grad, weight.float().sum(0).expand(3, 192).bfloat16())


@pytest.mark.usefixtures("packing")
@pytest.mark.parametrize("pattern", [NM(32, 64), NM(3, 6), Unstructured(0.5), NM(2, 4)], ids=str)
def test_a_weight_from_elsewhere_is_taken_as_what_it_is(pattern: Pattern):
    """functional_call and accelerate's offloading put values in the order of the disk where packed ones were."""
    dense = [random_weight(24, 192, seed=seed) for seed in (0, 1)]
    first, second = [(weight * keep_mask(dense[0].abs(), pattern)).bfloat16() for weight in dense]
    layer, x = SparseLinear.from_dense(first, None, pattern), random_weight(3, 192).bfloat16()
    assert layer.packed == (pattern != NM(2, 4))
    other = bitmask.encode(second, pattern)["weight"] if torch.equal(second != 0, first != 0) else None
    assert other is not None
    assert torch.equal(functional_call(layer, {"weight": other}, (x,)), F.linear(x, second))
    assert torch.equal(layer(x), F.linear(x, first))


@pytest.mark.usefixtures("packing")
@pytest.mark.parametrize("name", ["weight", "bias"])
def test_parameters_that_are_attributes(name: str):
    weight = pruned(NM(2, 4))
    layer, x = SparseLinear.from_dense(weight, torch.ones(7), NM(2, 4)), random_weight(3, 40)
    wanted = layer(x)
    layer.weight.requires_grad_(False)
    parametrize.register_parametrization(layer, name, torch.nn.Identity(), unsafe=True)
    assert torch.equal(layer(x), wanted)


@pytest.mark.usefixtures("packing")
@pytest.mark.parametrize("pattern", [Unstructured(0.5), NM(2, 4)], ids=str)
@pytest.mark.parametrize("inside", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_autocast(dtype: torch.dtype, inside: torch.dtype, pattern: Pattern):
    weight = random_weight(24, 192)
    weight = (weight * keep_mask(weight.abs(), pattern)).to(dtype)
    layer, bias = SparseLinear.from_dense(weight, torch.ones(24, dtype=dtype), pattern), torch.ones(24, dtype=dtype)
    for x in (random_weight(3, 192), random_weight(3, 192).to(dtype)):
        with torch.autocast("cpu", inside):
            wanted, y = F.linear(x, weight, bias), layer(x)
        assert y.dtype == wanted.dtype == inside
        torch.testing.assert_close(y, wanted)


@pytest.mark.parametrize("enabled", [True, False])
def test_derivatives_forwards(enabled: bool):
    weight, x, direction = pruned(NM(2, 4)), random_weight(3, 40), random_weight(3, 40, seed=1)
    layer = SparseLinear.from_dense(weight, torch.ones(7), NM(2, 4)).requires_grad_(False)
    with torch.set_grad_enabled(enabled):
        y, tangent = torch.func.jvp(layer, (x,), (direction,))
        torch.testing.assert_close(y, F.linear(x, weight, layer.bias))
        torch.testing.assert_close(tangent, F.linear(direction, weight))
        with forward_ad.dual_level():
            tangent = forward_ad.unpack_dual(layer(forward_ad.make_dual(x, direction))).tangent
        torch.testing.assert_close(tangent, F.linear(direction, weight))


# ---- what moves and loads layers


@pytest.mark.usefixtures("packing")
@pytest.mark.parametrize("pattern", [Unstructured(0.5), NM(2, 4)], ids=str)
def test_a_layer_that_need_not_move_stays_where_it_is(pattern: Pattern):
    """A CUDA graph may read it."""
    weight = random_weight(24, 192)
    weight = (weight * keep_mask(weight.abs(), pattern)).bfloat16()
    layer = SparseLinear.from_dense(weight, None, pattern)
    before = layer.weight.data_ptr(), layer.weight.shape
    layer.to("cpu").bfloat16().state_dict()
    assert (layer.weight.data_ptr(), layer.weight.shape) == before
    assert torch.equal(layer.to_dense(), weight)
    assert torch.equal(layer.half().to_dense(), weight.half())


@pytest.mark.usefixtures("packing")
def test_a_state_dict_without_this_layer_leaves_it_packed():
    """PEFT and Trainer load adapters alone, with strict=False."""
    weight = random_weight(24, 192)
    weight = (weight * keep_mask(weight.abs(), Unstructured(0.5))).bfloat16()
    model = torch.nn.Sequential(SparseLinear.from_dense(weight, None, Unstructured(0.5)), torch.nn.Linear(24, 2))
    assert model[0].packed
    model.load_state_dict({"1.weight": torch.zeros(2, 24)}, strict=False)
    assert model[0].packed
    incomplete = {name: tensor for name, tensor in model.state_dict().items() if name != "1.bias"}
    model.load_state_dict(incomplete, strict=False)
    assert model[0].packed
    assert torch.equal(model[0].to_dense(), weight)


@pytest.mark.usefixtures("packing")
def test_a_layer_that_was_never_filled_can_move():
    layer = SparseLinear(192, 24, False, Unstructured(0.5), torch.bfloat16)
    layer.weight_mask.random_()
    layer.to(torch.float16).to(torch.bfloat16)
    assert not layer.packed
    weight = random_weight(24, 192)
    weight = (weight * keep_mask(weight.abs(), Unstructured(0.5))).bfloat16()
    layer.load_state_dict(SparseLinear.from_dense(weight, None, Unstructured(0.5)).state_dict())
    assert layer.packed
    assert torch.equal(layer.to_dense(), weight)


@pytest.fixture
def packing_as_on_a_gpu(packing, monkeypatch: pytest.MonkeyPatch):
    """2:4 as well: something behind the values, as cuSPARSELt has it."""

    def pack(values: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
        return torch.cat([values.flatten(), torch.zeros(values.numel() // 8).to(values)])

    def wanted(device: torch.device, dtype: torch.dtype, pattern: Pattern, shape: tuple[int, int]) -> str | None:
        pairs = device.type != "meta" and dtype.itemsize == 2 and pattern == NM(2, 4)
        return "cusparselt" if pairs else uneven(device, dtype, pattern, shape)

    uneven = linear_module.wanted_layout
    monkeypatch.setattr(linear_module.cusparselt, "pack", pack)
    monkeypatch.setattr(linear_module, "wanted_layout", wanted)


def packed_layer(pattern: Pattern) -> tuple[SparseLinear, torch.Tensor]:
    weight = random_weight(24, 192)
    weight = (weight * keep_mask(weight.abs(), pattern)).bfloat16()
    layer = SparseLinear.from_dense(weight, None, pattern)
    assert layer.packed
    return layer, weight


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("pattern", [NM(2, 4), Unstructured(0.5)], ids=str)
def test_export(pattern: Pattern, packed: bool, request: pytest.FixtureRequest):
    if packed:
        request.getfixturevalue("packing_as_on_a_gpu")
    weight = random_weight(24, 192)
    weight = (weight * keep_mask(weight.abs(), pattern)).bfloat16()
    layer, x = SparseLinear.from_dense(weight, None, pattern), random_weight(3, 192).bfloat16()
    assert layer.packed == packed
    exported = torch.export.export(layer, (x,)).module()
    torch.testing.assert_close(exported(x), layer(x))


COPIES = [copy.deepcopy, copy.copy, lambda layer: pickle.loads(pickle.dumps(layer))]


@pytest.mark.usefixtures("packing_as_on_a_gpu")
@pytest.mark.parametrize("copied", COPIES)
def test_a_copy_shares_what_the_layer_shares(copied):
    """As cuSPARSELt's buffer: the values are its first part, the rest is behind them, also in a copy."""
    layer, weight = packed_layer(NM(2, 4))
    other = copied(layer)
    assert other.semi_structured.data_ptr() == other.weight.data_ptr() + other.weight.nbytes
    assert other.weight.untyped_storage().data_ptr() == other.semi_structured.untyped_storage().data_ptr()
    assert (other.weight.data_ptr() == layer.weight.data_ptr()) == (copied is copy.copy)
    assert torch.equal(other.to_dense(), weight)


@pytest.mark.usefixtures("packing_as_on_a_gpu")
@pytest.mark.parametrize("copied", COPIES)
@pytest.mark.parametrize("pattern", [Unstructured(0.5), NM(2, 4)], ids=str)
def test_a_copy_has_values_that_replaced_those_of_before(pattern: Pattern, copied):
    layer, weight = packed_layer(pattern)
    if pattern == NM(2, 4):
        layer.weight.data = 2 * layer.weight.data  # by somebody who does not know of the buffer
        weight = 2 * weight
    other = copied(layer)
    assert other.packed
    assert torch.equal(other.to_dense(), weight)


@pytest.mark.usefixtures("packing_as_on_a_gpu")
@pytest.mark.parametrize("pattern", [Unstructured(0.5), NM(2, 4)], ids=str)
def test_a_layer_that_comes_to_another_device_in_a_file(pattern: Pattern, monkeypatch: pytest.MonkeyPatch):
    """As torch.load does with map_location: no method of the layer moves it."""
    layer, weight = packed_layer(pattern)
    file = pickle.dumps(layer)
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr(linear_module, "wanted_layout", lambda *layer: None)
        other = pickle.loads(file)
        assert not other.packed
        assert torch.equal(other.to_dense(), weight)
        file = pickle.dumps(other)
    other = pickle.loads(file)
    assert other.packed
    assert torch.equal(other.to_dense(), weight)


@pytest.mark.usefixtures("packing_as_on_a_gpu")
@pytest.mark.parametrize("first", ["cpu", "meta"])
@pytest.mark.parametrize("pattern", [Unstructured(0.5), NM(2, 4)], ids=str)
def test_memory_that_was_not_written_yet(pattern: Pattern, first: str):
    """to_empty, then the weights: as FSDP and models on the meta device are filled."""
    layer, weight = packed_layer(pattern)
    state = layer.state_dict()
    layer.to(first).to_empty(device="cpu")
    layer.weight_mask.random_()
    layer.load_state_dict(state)
    assert layer.packed
    assert torch.equal(layer.to_dense(), weight)
    layer._apply(torch.clone)
    assert layer.packed
    assert torch.equal(layer.to_dense(), weight)


@pytest.mark.usefixtures("packing_as_on_a_gpu")
@pytest.mark.parametrize("pattern", [NM(2, 4), NM(16, 32), Unstructured(0.5)], ids=str)
def test_the_dense_weight_beside_packed_values_stays_when_they_are_copied_or_moved(pattern: Pattern):
    weight = random_weight(256, 256)
    weight = (weight * keep_mask(weight.abs(), pattern)).bfloat16()
    layer = SparseLinear.from_dense(weight, None, pattern, keeps_dense=True)
    for other in (
        layer,
        copy.deepcopy(layer),
        pickle.loads(pickle.dumps(layer)),
        copy.deepcopy(layer).float().bfloat16(),
    ):
        assert other.packed == layer.packed
        assert torch.equal(other.dense, weight)
        assert other._expanded is not None
        assert torch.equal(other.to_dense(), weight)


@pytest.mark.usefixtures("packing_as_on_a_gpu")
@pytest.mark.parametrize("pattern", [NM(2, 4), NM(16, 32), *map(Unstructured, (0.3, 0.5, 0.7))], ids=str)
def test_growth_is_what_packing_adds(pattern: Pattern, monkeypatch: pytest.MonkeyPatch):
    """device_map="auto" plans with it."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    weight = random_weight(256, 2048)
    weight = (weight * keep_mask(weight.abs(), pattern)).bfloat16()
    layer = SparseLinear.from_dense(weight, None, pattern)
    parts = (layer.weight, layer.overflow, layer.starts, layer.semi_structured)
    packed = sum(part.nbytes for part in parts if part is not None)
    assert packed / bitmask.encode(weight, pattern)["weight"].nbytes == pytest.approx(layer.growth, rel=0.03)
