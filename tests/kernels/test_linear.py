"""y = x W^T + b for a compressed W: every way to compute it against float64, and what the op promises PyTorch."""

import subprocess
import sys
import textwrap

import pytest
import torch
from helpers import random_weight
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from optimum_sparse.core import NM, Pattern, Unstructured, keep_mask
from optimum_sparse.formats import bitmask
from optimum_sparse.kernels import cpu
from optimum_sparse.kernels import linear as linear_module
from optimum_sparse.kernels.linear import CPU_TOKENS, CPU_TOKENS_WIDE, expand, linear, reference, select


PATTERNS = [NM(2, 4), NM(16, 32), NM(3, 5), NM(1, 8), Unstructured(0.5), Unstructured(0.9), Unstructured(0)]
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}
BUILT = cpu.library() is not None
LEVELS = range(cpu.best_level() + 1) if BUILT else []
needs_kernel = pytest.mark.skipif(not BUILT, reason="installed without a C++ compiler")


def matrix(pattern: Pattern, shape: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
    weight = random_weight(*shape)
    weight = weight * keep_mask(weight.abs(), pattern)
    if isinstance(pattern, Unstructured) and pattern.sparsity > 0.5:
        weight[1::3] = 0  # rows without a value of their own size: zeros are stored for them, or nothing
    return weight.to(dtype)


def tensors(weight: torch.Tensor, pattern: Pattern) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    found = bitmask.encode(weight, pattern)
    return found["weight"], found["weight_mask"], found.get("weight_rows")


def error(y: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> float:
    """The largest, relative to the largest sum that products of these sizes could have."""
    wanted = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    size = F.linear(x.double().abs(), weight.double().abs(), None if bias is None else bias.double().abs())
    return ((y.double() - wanted).abs() / size.clamp(min=1e-30)).max().item()


@needs_kernel
@pytest.mark.parametrize("level", LEVELS, ids=lambda level: cpu.LEVELS[level])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_kernel_against_float64(pattern: Pattern, dtype: torch.dtype, level: int):
    for shape in ((7, 160), (33, 960), (1, 320)) if isinstance(pattern, NM) else ((7, 41), (33, 999), (3, 5)):
        weight = matrix(pattern, shape, dtype)
        for tokens in (1, 2, 3, 4, 5, 6, 7, 8, 9, 19):
            x = random_weight(tokens, shape[1], seed=tokens).to(dtype)
            for bias in (None, random_weight(1, shape[0])[0].to(dtype)):
                y = cpu.linear(x, *tensors(weight, pattern), bias, level)
                assert y.shape == (tokens, shape[0])
                assert error(y, x, weight, bias) < TOLERANCE[dtype]


@needs_kernel
@pytest.mark.parametrize("level", LEVELS, ids=lambda level: cpu.LEVELS[level])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_a_matrix_without_values_and_rows_without_values(dtype: torch.dtype, level: int):
    mask = torch.zeros(6, 9, dtype=torch.uint8)
    rows = torch.zeros(7, dtype=torch.int64)
    x, bias = torch.randn(2, 70).to(dtype), torch.randn(6).to(dtype)
    assert torch.equal(cpu.linear(x, torch.empty(0, dtype=dtype), mask, rows, bias, level), bias.expand(2, 6))
    mask[3, 8] = 0b100000  # the last column
    rows[4:] = 1
    y = cpu.linear(x, torch.ones(1, dtype=dtype), mask, rows, None, level)
    assert torch.equal(y[:, 3], x[:, 69])
    assert y.count_nonzero() == 2


@needs_kernel
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_expand_is_exact(pattern: Pattern, dtype: torch.dtype):
    weight = matrix(pattern, (33, 960), dtype)
    assert torch.equal(expand(*tensors(weight, pattern), 960), weight)


@needs_kernel
def test_every_number_of_the_16_bit_types():
    """Conversions in C++ are PyTorch's: subnormals, infinities and rounding to even included."""
    bits = torch.arange(2**16, dtype=torch.int32).to(torch.int16)
    mask = torch.full((2**16, 1), 1, dtype=torch.uint8)
    for dtype in (torch.bfloat16, torch.float16):
        values = bits.view(dtype)
        values = values[~values.isnan()]
        for level in LEVELS:
            one = torch.ones(1, 1, dtype=dtype)
            y = cpu.linear(one, values, mask[: len(values)], torch.arange(len(values) + 1), None, level)[0]
            normal = values.abs() >= torch.finfo(dtype).tiny  # bf16 pairs flush subnormals to zero
            assert torch.equal(y[normal], values[normal])
            assert ((y == values) | (y == 0))[~normal].all()
    numbers = torch.randint(-(2**31), 2**31 - 1, (20000,), dtype=torch.int32).view(torch.float32)
    half = torch.tensor([1.0, 2.0**-24, 2.0**-25, 3 * 2.0**-25, 2.0**-14, 65504, 65519.9, 65520, 1 + 2.0**-11])
    numbers = torch.cat([numbers[numbers.isfinite()], half, -half])
    for dtype in (torch.bfloat16, torch.float16):  # rounding happens on the way out: bias alone gives no rounding
        pairs = torch.stack([numbers.to(dtype), (numbers - numbers.to(dtype).float()).to(dtype)], 1)
        pairs = pairs[pairs.isfinite().all(1)]
        mask = torch.full((len(pairs), 1), 3, dtype=torch.uint8)
        y = cpu.linear(torch.ones(1, 2, dtype=dtype), pairs, mask, None, None, 0)[0]
        assert torch.equal(y, pairs.float().sum(1).to(dtype))


GUARDED = """
    import ctypes, mmap, torch
    from optimum_sparse.kernels import cpu

    page = mmap.PAGESIZE
    memory = mmap.mmap(-1, 2 * page)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(start + page), page, 0) == 0  # beyond: no access

    def at_the_end(tensor):
        size = tensor.numel() * tensor.element_size()
        raw = (ctypes.c_char * size).from_address(start + page - size)
        kept = torch.frombuffer(raw, dtype=tensor.dtype).view(tensor.shape)
        return kept.copy_(tensor)

    for level in range(cpu.best_level() + 1):
        for dtype in cpu.TYPES:
            for in_features in (8, 40, 64, 136):
                mask = torch.full((3, in_features // 8), 0b01010101, dtype=torch.uint8)
                values = torch.ones(3, in_features // 2, dtype=dtype)
                x = torch.ones(2, in_features, dtype=dtype)
                for guarded in ("values", "mask", "x"):
                    given = {"values": values, "mask": mask, "x": x}
                    given[guarded] = at_the_end(given[guarded])
                    y = cpu.linear(given["x"], given["values"], given["mask"], None, None, level)
                    assert (y == in_features // 2).all()
                    dense = cpu.expand(given["values"], given["mask"], None, in_features, level)
                    assert torch.equal(dense[:, ::2], values) and not dense[:, 1::2].any()
                rows = torch.arange(4) * (in_features // 2)
                flat = at_the_end(values.flatten())
                assert (cpu.linear(x, flat, mask, rows, None, level) == in_features // 2).all()
                for wrong in (rows + 2**40, rows - 2**40, -rows, rows.flip(0), torch.full_like(rows, 2**62)):
                    for full in (mask, torch.full_like(mask, 255)):  # a damaged file: any number, but no other memory
                        cpu.linear(x, flat, full, wrong, None, level)
                        cpu.expand(flat, full, wrong, in_features, level)
            for in_features in (5, 37, 69, 101):  # and masks with bits past the last column
                mask = torch.full((3, -(-in_features // 8)), 255, dtype=torch.uint8)
                values, x = torch.ones(3 * in_features, dtype=dtype), torch.ones(2, in_features, dtype=dtype)
                rows = torch.arange(4) * in_features
                cpu.linear(x, at_the_end(values), mask, rows, None, level)
                room = at_the_end(torch.zeros(3, in_features, dtype=dtype))
                assert (cpu.expand(values, mask, rows, in_features, level, room) == 1).all()
    print("nothing was read beyond the end")
"""


@needs_kernel
@pytest.mark.skipif(sys.platform != "linux", reason="mprotect")
def test_nothing_is_read_beyond_the_end_of_a_tensor():
    """In a process of its own: such a read is a segmentation fault."""
    run = subprocess.run([sys.executable, "-c", textwrap.dedent(GUARDED)], capture_output=True, text=True, check=False)
    assert "nothing was read beyond the end" in run.stdout, run.stderr


# ---- the op


def layer(pattern: Pattern = PATTERNS[0]) -> tuple:
    weight = matrix(pattern, (12, 40), torch.float32)
    return weight, tensors(weight, pattern), random_weight(1, 12)[0]


@pytest.mark.parametrize("shape", [(40,), (1, 40), (3, 40), (2, 1, 40), (2, 9, 40), (0, 40), (2, 0, 40)])
@pytest.mark.parametrize("pattern", [NM(2, 4), Unstructured(0.6)], ids=str)
def test_any_shape(pattern: Pattern, shape: tuple[int, ...]):
    weight, packed, bias = layer(pattern)
    x = torch.randn(shape)
    y = linear(x, *packed, 40, bias)
    torch.testing.assert_close(y, F.linear(x, weight, bias))
    torch.testing.assert_close(reference(x, *packed, 40, bias), F.linear(x, weight, bias))


@needs_kernel
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_many_tokens_by_some_rows_at_a_time(
    pattern: Pattern, dtype: torch.dtype, wide: bool, biased: bool, monkeypatch: pytest.MonkeyPatch
):
    """Each in the memory of those before; the last are fewer. In fp32 where PyTorch has no products of 16 bits."""
    monkeypatch.setattr(linear_module, "SLAB", 8 * 160)
    monkeypatch.setattr(linear_module, "is_widened", lambda dtype: wide and dtype != torch.float32)
    weight, bias = matrix(pattern, (37, 160), dtype), random_weight(1, 37)[0].to(dtype) if biased else None
    for requires_grad in (False, True):
        x = random_weight(CPU_TOKENS_WIDE + 5, 160).to(dtype).requires_grad_(requires_grad)
        y = linear(x, *tensors(weight, pattern), 160, bias)
        assert y.dtype == dtype
        torch.testing.assert_close(y, F.linear(x, weight, bias))
        if requires_grad:
            y.sum().backward()
            torch.testing.assert_close(x.grad, weight.sum(0).expand_as(x))


@needs_kernel
@pytest.mark.filterwarnings("ignore:.*autograd kernel was not registered")
def test_gradients_through_the_op_that_was_exported_without(monkeypatch: pytest.MonkeyPatch):
    """It runs above PyTorch's autograd then: what the first products keep must not become the next one's."""
    monkeypatch.setattr(linear_module, "SLAB", 8 * 160)
    weight = matrix(NM(2, 4), (37, 160), torch.float32)
    packed, x = tensors(weight, NM(2, 4)), random_weight(CPU_TOKENS + 5, 160).requires_grad_()
    torch.ops.optimum_sparse.linear_without_gradients(x, *packed, 160, None, 4).sum().backward()
    torch.testing.assert_close(x.grad, weight.sum(0).expand_as(x))


def test_inputs_with_gaps():
    weight, packed, bias = layer()
    x = torch.randn(40, 3).T
    torch.testing.assert_close(linear(x, *packed, 40, bias), F.linear(x, weight, bias))


@pytest.mark.parametrize("tokens", [1, CPU_TOKENS + 1])
@pytest.mark.parametrize("pattern", [NM(2, 4), Unstructured(0.6)], ids=str)
def test_opcheck(pattern: Pattern, tokens: int):
    """PyTorch's own test of an op: schema, fake implementation, autograd registration."""
    _, packed, bias = layer(pattern)
    for requires_grad in (False, True):
        x = torch.randn(tokens, 40, requires_grad=requires_grad)
        torch.library.opcheck(torch.ops.optimum_sparse.linear.default, (x, *packed, 40, bias))
    torch.library.opcheck(torch.ops.optimum_sparse.linear_without_gradients.default, (x.detach(), *packed, 40, bias))


@pytest.mark.parametrize("tokens", [1, CPU_TOKENS + 1])
def test_tensors_with_gaps(tokens: int):
    """Whatever strides a checkpoint's loader gives them."""
    weight, packed, bias = layer()
    x = torch.randn(tokens, 40)
    wanted = F.linear(x, weight, bias)
    strided = [part.t().contiguous().t() for part in packed[:2]]
    assert not any(part.is_contiguous() for part in strided)
    torch.testing.assert_close(linear(x, *strided, None, 40, torch.stack([bias, bias], 1)[:, 0]), wanted)
    torch.testing.assert_close(linear(x, *packed, 40, bias[:1].expand(12)), F.linear(x, weight, bias[:1].expand(12)))
    assert torch.equal(expand(*strided, None, 40), weight)


class Seen(TorchDispatchMode):
    """The ops that were called."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: list = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.ops.append(op)
        return op(*args, **(kwargs or {}))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("tokens", [1, CPU_TOKENS + 1])
def test_under_tracers_and_transforms(tokens: int):
    weight, packed, bias = layer()
    x, other = torch.randn(tokens, 40), torch.randn(tokens, 40)

    def call(x: torch.Tensor) -> torch.Tensor:
        return linear(x, *packed, 40, bias)

    wanted = F.linear(other, weight, bias)
    torch.testing.assert_close(torch.jit.trace(call, (x,))(other), wanted)
    torch.testing.assert_close(torch.fx.experimental.proxy_tensor.make_fx(call)(x)(other), wanted)
    torch.testing.assert_close(torch.func.functionalize(call)(other), wanted)
    torch.testing.assert_close(torch.vmap(call)(other), wanted)
    with torch.no_grad():  # where calls go past PyTorch's dispatcher if nothing of this is there
        torch.testing.assert_close(torch.vmap(call)(other), wanted)
        torch.testing.assert_close(torch.fx.experimental.proxy_tensor.make_fx(call)(x)(other), wanted)
        torch.testing.assert_close(torch.jit.trace(call, (x,))(other), wanted)
        torch.testing.assert_close(torch.func.functionalize(call)(other), wanted)
        torch.testing.assert_close(call(torch._neg_view(other)), F.linear(-other, weight, bias))
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            torch.testing.assert_close(call(other), wanted)
        assert "optimum_sparse::linear_without_gradients" in {event.key for event in profile.key_averages()}
        with Seen() as mode:
            torch.testing.assert_close(call(other), wanted)
        assert torch.ops.optimum_sparse.linear_without_gradients.default in mode.ops
    batch = other.clone().requires_grad_()
    torch.vmap(call)(batch).sum().backward()
    torch.testing.assert_close(batch.grad, weight.sum(0).expand(tokens, 40))
    torch.testing.assert_close(call(torch._neg_view(other)), F.linear(-other, weight, bias))


@pytest.mark.parametrize("tokens", [1, CPU_TOKENS + 1])
def test_derivatives_by_torch_func(tokens: int):
    weight, packed, bias = layer()
    x = torch.randn(3, tokens, 40)

    def loss(x: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return linear(x, *packed, 40, bias).square().sum()

    def dense(x: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return F.linear(x, weight, bias).square().sum()

    for transform in (
        lambda f: torch.func.grad(f, argnums=(0, 1))(x, bias),
        lambda f: torch.func.jacrev(f, argnums=(0, 1))(x, bias),
        lambda f: torch.vmap(torch.func.grad(f), in_dims=(0, None))(x, bias),
        lambda f: torch.func.jvp(f, (x, bias), (x, bias))[1],
        lambda f: torch.func.hessian(f, argnums=1)(x, bias),
    ):
        torch.testing.assert_close(transform(loss), transform(dense), rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="a compressed weight cannot be trained"):
        torch.func.grad(lambda w: linear(x, w, *packed[1:], 40, bias).sum())(packed[0])


def test_compiled_for_cuda_without_a_break_where_there_is_none():
    """With tensors that only say that they are on a GPU: what torch.compile follows there is other code."""

    def multiply(x: torch.Tensor, weight: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return linear(x, weight, mask, None, 64, None, 4)

    compiled = torch.compile(multiply, fullgraph=True, backend="eager")
    with FakeTensorMode(), torch.device("cuda"):
        x, weight = torch.empty(3, 64).bfloat16(), torch.empty(8, 32).bfloat16()
        mask = torch.empty(8, 8, dtype=torch.uint8)
        for gradients in (False, True):
            with torch.set_grad_enabled(gradients):
                assert compiled(x, weight, mask).shape == (3, 8)


@pytest.mark.parametrize("tokens", [1, CPU_TOKENS + 1])
def test_layers_without_rows(tokens: int):
    mask = torch.zeros(0, 5, dtype=torch.uint8)
    assert linear(torch.randn(tokens, 40), torch.empty(0, 20), mask, None, 40, None).shape == (tokens, 0)


@pytest.mark.parametrize("tokens", [1, CPU_TOKENS + 1])
def test_gradients_of_inputs_and_bias(tokens: int):
    weight, packed, bias = layer()
    x = torch.randn(2, tokens, 40)
    results = []
    for call in (lambda x, b: linear(x, *packed, 40, b), lambda x, b: F.linear(x, weight, b)):
        inputs = x.clone().requires_grad_(), bias.clone().requires_grad_()
        call(inputs[0][0, 0], inputs[1]).sum().backward()  # one vector
        call(*inputs).square().sum().backward()
        results.append([tensor.grad for tensor in inputs])
    torch.testing.assert_close(*results, rtol=3e-5, atol=3e-5)


def test_a_compressed_weight_is_not_trained():
    _, packed, bias = layer()
    values = packed[0].requires_grad_()
    with pytest.raises(ValueError, match="cannot be trained: load the model without run_compressed"):
        linear(torch.randn(1, 40), values, *packed[1:], 40, bias)
    with torch.no_grad():
        linear(torch.randn(1, 40), values, *packed[1:], 40, bias)


def test_double_backward():
    weight, packed, bias = layer()
    results = []
    for call in (lambda x: linear(x, *packed, 40, bias), lambda x: F.linear(x, weight, bias)):
        x = torch.linspace(-1, 1, 80).view(2, 40).requires_grad_()
        (first,) = torch.autograd.grad(call(x).pow(3).sum(), x, create_graph=True)
        results.append(torch.autograd.grad(first.square().sum(), x)[0])
    torch.testing.assert_close(*results, rtol=3e-5, atol=1e-5)  # sums in another order, cubed, on whatever CPU


def test_a_weight_of_another_shape_than_its_mask_is_named():
    _, packed, bias = layer()
    with pytest.raises(ValueError, match=r"weight is float32 \[5, 20\]: weight_mask has 12 rows"):
        linear(torch.randn(2, 40), packed[0][:5], packed[1], None, 40, bias)


def test_bad_inputs_are_named():
    _, packed, bias = layer()
    with pytest.raises(ValueError, match=r"shape \[2, 39\]: its last dimension must be 40"):
        linear(torch.randn(2, 39), *packed, 40, bias)
    with pytest.raises(ValueError, match=r"shape \[\]: its last dimension"):
        linear(torch.tensor(1.0), *packed, 40, bias)
    with pytest.raises(ValueError, match=r"x is torch.float16, the compressed weight torch.float32"):
        linear(torch.randn(2, 40).half(), *packed, 40, bias)
    more = (0, None, None, None)
    for wrong, message in (
        ((*packed, 40, bias.double()), "bias is torch.float64, the compressed weight torch.float32"),
        ((*packed, 40, bias[:3]), r"bias has shape \[3\]: must be \[12\]"),
        (
            (packed[0], packed[1].float(), None, 40, None),
            r"weight_mask is float32 \[12, 5\]: must be uint8",
        ),
        ((packed[0], packed[1][:, :4], None, 40, None), r"weight_mask is uint8 \[12, 4\]"),
        ((packed[0], packed[1], torch.zeros(13).int(), 40, None), r"weight_rows is int32 \[13\]: must be int64"),
        (
            (packed[0], packed[1], torch.zeros(12).long(), 40, None),
            r"weight_rows is int64 \[12\]: must be int64",
        ),
        ((packed[0], packed[1].to("meta"), None, 40, None), "weight_mask is on meta, the compressed weight on cpu"),
        (
            (*packed, 40, None, *more, torch.zeros(40, 12)),
            r"dense is float32 \[40, 12\]: must be \[12, 40\]",
        ),
        (
            (*packed, 40, None, *more, torch.zeros(12, 40).half()),
            "dense is torch.float16, the compressed weight",
        ),
    ):
        for call in (reference, torch.ops.optimum_sparse.linear):
            with pytest.raises(ValueError, match=message):
                call(torch.randn(2, 40), *wrong)
    with pytest.raises(ValueError, match="x is on meta, the compressed weight on cpu"):
        reference(torch.randn(2, 40, device="meta"), *packed, 40, bias)


@pytest.mark.parametrize("wide", [False, True])
def test_select_says_what_runs_and_why(wide: bool, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(linear_module, "is_widened", lambda dtype: wide)
    most = CPU_TOKENS_WIDE if wide else CPU_TOKENS
    for tokens in (1, most, most + 1):
        choice = select(torch.device("cpu"), torch.bfloat16, NM(2, 4), (64, 64), tokens)
        if not BUILT:
            assert choice == ("reference", "the CPU kernel was not built")
        else:
            assert choice.backend == ("cpu" if tokens <= most else "expand")
            assert str(most) in choice.reason
            assert ("fp32" in choice.reason) == (wide and tokens > most)
    assert select(torch.device("cpu"), torch.float64, NM(2, 4), (64, 64), 1).backend == "reference"
    assert (
        select(torch.device("meta"), torch.float32, NM(2, 4), (64, 64), 1).reason == "there is no kernel for meta yet"
    )
    for tokens in (1, most, most + 1):
        alone, beside = (
            select(torch.device("cpu"), torch.bfloat16, NM(2, 4), (64, 64), tokens, beside_dense)
            for beside_dense in (False, True)
        )
        assert beside == alone if alone.backend == "cpu" or (wide and BUILT) else beside.backend == "dense"


def test_without_the_library_the_reference_runs_after_one_warning(monkeypatch: pytest.MonkeyPatch):
    weight, packed, bias = layer()
    cpu.library.cache_clear()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    try:
        with pytest.warns(UserWarning, match="the CPU kernels are missing.*C\\+\\+20 compiler") as caught:
            ys = [linear(torch.ones(1, 40), *packed, 40, bias) for _ in range(3)]
        assert len(caught) == 1
        torch.testing.assert_close(ys[2], F.linear(torch.ones(1, 40), weight, bias))
    finally:
        cpu.library.cache_clear()
