"""The seam: y = x W^T + b for a compressed W as one op, `optimum_sparse::linear`, and the choice of what runs it.

The op has a reference in plain PyTorch, which expands W and multiplies, for every device and dtype; kernels where
`select` names one; a fake implementation for torch.compile; gradients for x and the bias, not for W. PyTorch goes
through Python once more for these, at every call: `linear_without_gradients` is the same op for where none are wanted.
`expand`, the dense W, is an op as well.

W comes as it is on disk (formats.bitmask), or in slots with `overflow` and `starts`, as CUDA kernels need it
(formats.slots), or 2:4 with `semi_structured`, what cuSPARSELt wants behind the values. Which of these it is, the
weight itself says: it may have been replaced by one from elsewhere. `group` is M of N:M, 0 if there is none or it is
not known. `dense` is the same W once more, uncompressed, where there is room for both.
"""

import functools
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter
from torch.nn import functional as F

from ..core import NM, Pattern
from ..formats import bitmask, slots
from . import cpu, cuda, cusparselt
from .precision import is_widened


PAIRS_TOKENS = 128  # 2:4 on CUDA: beyond, sparse tensor cores
# On CUDA, where the dense W is there, too: up to so many tokens what reads the compressed one wins, and cuSPARSELt
# from so many on. By the tables in tests/benchmarks/README.md.
DENSE_AFTER = {"pairs": 64, "even": 32, "uneven": 4}
SEMI_STRUCTURED_FROM = 512
# Up to here reading less memory wins on a CPU, beyond it dense products do: sooner with AMX, which is their best, and
# later where a CPU has none of 16 bits.
CPU_TOKENS = 8 if torch.cpu.get_capabilities().get("amx_bf16", False) else 16
CPU_TOKENS_WIDE = 64
SLAB = 2**22  # weights that are expanded at a time on the CPU: they stay in its cache


class Choice(NamedTuple):
    """What runs a layer on a number of tokens, and why."""

    backend: str
    reason: str


_DENSE = Choice("dense", "the dense weight is there, and nothing that reads the compressed one is faster")


def select(
    device: torch.device,
    dtype: torch.dtype,
    pattern: Pattern,
    shape: tuple[int, int],
    tokens: int,
    beside_dense: bool = False,
) -> Choice:
    """What multiplies x [tokens, in] by a compressed weight (out, in) of this dtype and pattern on this device.

    Args:
        beside_dense: the dense weight is in memory, too.
    """
    out_features, in_features = shape
    if device.type == "cuda":
        problem = cuda.refuses(device, dtype, in_features)
        even = slots.even_slots(pattern, in_features)
        if not problem and not even and in_features > slots.MOST_COLUMNS:
            problem = f"more than {slots.MOST_COLUMNS} inputs"
        if problem:
            return _DENSE if beside_dense else Choice("reference", problem)
        pairs = _are_pairs(pattern, even)
        layout = cuda.Layout(dtype, out_features, in_features, even or 16, pairs, not even)
        semi_structured = pairs and cusparselt.usable(_index(device), dtype, *shape)
        chosen = _choose(layout, tokens, _index(device), semi_structured, beside_dense)
        if chosen == "dense":
            return _DENSE
        if chosen == "cusparselt":
            return Choice(chosen, "2:4 and many tokens: sparse tensor cores")
        if chosen == "expand":
            return Choice(chosen, "the weight is expanded, then cuBLAS: nothing that reads it compressed is faster")
        return Choice(chosen.kernel.split("<")[0], "reads the compressed weight alone")
    if device.type == "cpu":
        return _select_cpu(dtype, tokens, beside_dense)
    return _DENSE if beside_dense else Choice("reference", f"there is no kernel for {device.type} yet")


def _choose(
    layout: cuda.Layout, tokens: int, device: int, semi_structured: bool, beside_dense: bool
) -> cuda.Launch | Literal["cusparselt", "expand", "dense"]:
    """What multiplies on a GPU by a weight, which cuSPARSELt can read or not, and which is there dense or not."""
    few = DENSE_AFTER["uneven" if layout.overflow else "pairs" if layout.pairs else "even"]
    if beside_dense and tokens > few and not (semi_structured and tokens >= SEMI_STRUCTURED_FROM):
        return "dense"
    launch = None if semi_structured and tokens > PAIRS_TOKENS else cuda.plan(layout, tokens, device)
    return launch or ("cusparselt" if semi_structured and tokens else "dense" if beside_dense else "expand")


def _select_cpu(dtype: torch.dtype, tokens: int, beside_dense: bool) -> Choice:
    if dtype not in cpu.TYPES:
        return _DENSE if beside_dense else Choice("reference", f"the CPU kernel does not take {dtype}")
    if cpu.library() is None:
        return _DENSE if beside_dense else Choice("reference", "the CPU kernel was not built")
    wide = is_widened(dtype)
    most = CPU_TOKENS_WIDE if wide else CPU_TOKENS
    if tokens <= most:
        return Choice("cpu", f"{cpu.LEVELS[cpu.best_level()]}, up to {most} tokens: reads the compressed weight alone")
    if beside_dense and not wide:
        return _DENSE
    products = f"fp32 products, since PyTorch has none of {dtype} for this CPU," if wide else "dense products,"
    return Choice("expand", f"more than {most} tokens: {products} of some expanded rows at a time")


def wanted_layout(device: torch.device, dtype: torch.dtype, pattern: Pattern, shape: tuple[int, int]) -> str | None:
    """How the kernels of a device want a weight (out, in): in "slots", for "cusparselt", or None: as on disk."""
    in_features = shape[1]
    if device.type != "cuda" or cuda.refuses(device, dtype, in_features):
        return None
    even = slots.even_slots(pattern, in_features)
    if not even:
        return "slots" if in_features <= slots.MOST_COLUMNS else None
    pairs = _are_pairs(pattern, even)
    return "cusparselt" if pairs and cusparselt.usable(_index(device), dtype, *shape) else None


def _index(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index


_LIBRARY = torch.library.Library("optimum_sparse", "FRAGMENT")
_MORE = "int group=0, Tensor? overflow=None, Tensor? starts=None, Tensor? semi_structured=None, Tensor? dense=None"
_MATRIX = "Tensor weight, Tensor weight_mask, Tensor? weight_rows, int in_features"
_LIBRARY.define(f"expand({_MATRIX}, {_MORE}) -> Tensor")
_LIBRARY.define(f"linear(Tensor x, {_MATRIX}, Tensor? bias, {_MORE}) -> Tensor")
_LIBRARY.define(f"linear_without_gradients(Tensor x, {_MATRIX}, Tensor? bias, {_MORE}) -> Tensor")
expand = torch.ops.optimum_sparse.expand.default
_linear = torch.ops.optimum_sparse.linear.default
_linear_without_gradients = torch.ops.optimum_sparse.linear_without_gradients.default


class _Matrix(NamedTuple):
    """The arguments of both ops that make up W."""

    weight: Tensor
    weight_mask: Tensor
    weight_rows: Tensor | None
    in_features: int
    group: int = 0
    overflow: Tensor | None = None
    starts: Tensor | None = None
    semi_structured: Tensor | None = None
    dense: Tensor | None = None

    def for_cuda(self) -> cuda.Matrix | None:
        """As the CUDA kernels take it; None if they do not."""
        weight = self.weight
        layout = _cuda_layout(weight.device, weight.dtype, weight.shape, self.in_features, self.group)
        return None if layout is None else cuda.Matrix(weight, self.weight_mask, self.overflow, self.starts, layout)


@functools.lru_cache(maxsize=1024)
def _cuda_layout(
    device: torch.device, dtype: torch.dtype, stored: torch.Size, in_features: int, group: int
) -> cuda.Layout | None:
    """Of values of a shape; None if the CUDA kernels do not take them."""
    if cuda.refuses(device, dtype, in_features) or not all(stored):
        return None
    if len(stored) == 3:
        return cuda.Layout(dtype, stored[0], in_features, stored[2], False, True)
    if not group or len(stored) != 2:
        return None
    pattern = NM(stored[1] * group // in_features, group)
    even = slots.even_slots(pattern, in_features)
    if even and even * in_features != stored[1] * 32:
        raise ValueError(f"weight has {stored[1]} values a row: {pattern} of {in_features} inputs has another number.")
    return cuda.Layout(dtype, stored[0], in_features, even, _are_pairs(pattern, even), False) if even else None


def _are_pairs(pattern: Pattern, even: int) -> bool:
    """Whether two of every four columns are kept."""
    return isinstance(pattern, NM) and pattern.group in (2, 4) and even == 16


def _expand_reference(*args: Any) -> Tensor:
    matrix = _Matrix(*args)
    weight, mask, in_features = matrix.weight, matrix.weight_mask, matrix.in_features
    if weight.dim() == 3 and matrix.overflow is not None and matrix.starts is not None:
        count = int(bitmask.unpack_bits(mask, in_features).sum())
        weight = slots.unpack(slots.Slots(weight, matrix.overflow, matrix.starts), mask, in_features, count)
    return bitmask.put_kept(weight, mask, in_features)


def _expand_cpu(*args: Any) -> Tensor:
    matrix = _Matrix(*args)
    if matrix.weight.dtype not in cpu.TYPES or cpu.library() is None or matrix.weight.dim() == 3:
        return _expand_reference(*args)
    return cpu.expand(*matrix[:4], cpu.best_level())


def _expand_cuda(*args: Any) -> Tensor:
    matrix = _Matrix(*args).for_cuda()
    return _expand_reference(*args) if matrix is None else cuda.expand(matrix)


def _expand_fake(*args: Any) -> Tensor:
    matrix = _Matrix(*args)
    return matrix.weight.new_empty(matrix.weight_mask.shape[0], matrix.in_features)


def reference(x: Tensor, *args: Any) -> Tensor:
    """`linear` on any device: x [..., in] -> [..., out]."""
    matrix, bias = _split(args)
    _check(x, matrix, bias)
    return F.linear(x, _dense(matrix), bias)


def _dense(matrix: _Matrix) -> Tensor:
    return expand(*matrix) if matrix.dense is None else matrix.dense


def _linear_cpu(x: Tensor, *args: Any) -> Tensor:
    matrix, bias = _split(args)
    _check(x, matrix, bias)
    weight, weight_mask, weight_rows, in_features = matrix[:4]
    if not weight_mask.numel() or weight.dim() == 3:
        return reference(x, *args)
    backend = _select_cpu(weight.dtype, x.numel() // in_features, matrix.dense is not None).backend
    if backend in ("reference", "dense"):
        return reference(x, *args)
    if backend == "cpu":
        return cpu.linear(x, weight, weight_mask, weight_rows, bias, cpu.best_level())
    slab = min(max(1, SLAB // in_features), len(weight_mask))
    dtype, wide = x.dtype, is_widened(x.dtype)
    # One room for all: new memory takes longer to get than to fill. Where gradients are wanted, products keep theirs.
    keeps = torch.is_grad_enabled() and x.requires_grad
    room = None if keeps or matrix.dense is not None else x.new_empty(slab, in_features)
    wide_room = torch.empty(slab if wide and not keeps else 0, in_features)
    if wide:
        x, bias = x.float(), None if bias is None else bias.float()
    parts = []
    for first in range(0, len(weight_mask), slab):
        here = slice(first, first + slab)
        starts = None if weight_rows is None else weight_rows[first : first + slab + 1]  # counted from the very first
        values = weight[here] if starts is None else weight
        dense = (
            cpu.expand(values, weight_mask[here], starts, in_features, cpu.best_level(), room)
            if matrix.dense is None
            else matrix.dense[here]
        )
        if wide:
            dense = dense.float() if keeps else wide_room[: len(dense)].copy_(dense)
        parts.append(F.linear(x, dense, None if bias is None else bias[here]).to(dtype))
    return parts[0] if len(parts) == 1 else torch.cat(parts, -1)


def _linear_cuda(x: Tensor, *args: Any) -> Tensor:
    compressed, bias = _split(args)
    _check(x, compressed, bias)
    matrix = compressed.for_cuda()
    if matrix is None:
        return reference(x, *args)
    layout, weight, behind = matrix.layout, matrix.values, compressed.semi_structured
    together = behind is not None and behind.data_ptr() == weight.data_ptr() + weight.nbytes
    tokens, dense = x.numel() // layout.in_features, compressed.dense
    chosen = _choose(layout, tokens, x.get_device(), together, dense is not None)
    if chosen == "dense":
        return F.linear(x, _dense(compressed), bias)
    if chosen == "cusparselt":
        return cusparselt.linear(x, weight, layout.rows, bias)
    if chosen == "expand":
        return F.linear(x, cuda.expand(matrix), bias)
    return cuda.linear(chosen, x, matrix, bias)


def _linear_fake(x: Tensor, *args: Any) -> Tensor:
    matrix, bias = _split(args)
    _check(x, matrix, bias)
    return x.new_empty(*x.shape[:-1], matrix.weight_mask.shape[0])


def _split(args: tuple) -> tuple[_Matrix, Tensor | None]:
    """The arguments of `linear` after x."""
    return _Matrix(*args[:4], *args[5:]), args[4]


def _check(x: Tensor, matrix: _Matrix, bias: Tensor | None) -> None:
    """Shapes and types. What the tensors hold is checked once, when they are loaded: bitmask.validate."""
    weight, weight_mask, weight_rows, in_features, _, overflow, starts, behind, dense = matrix
    device, dtype = weight.device, weight.dtype
    for tensor in (weight_mask, weight_rows, overflow, starts, behind, dense, bias, x):
        if tensor is not None and tensor.device != device:
            name = _name_of(tensor, x, matrix, bias)
            raise ValueError(f"{name} is on {tensor.device}, the compressed weight on {device}: move one.")
    for tensor in (dense, bias, x):
        if tensor is not None and tensor.dtype != dtype:
            name = _name_of(tensor, x, matrix, bias)
            raise ValueError(f"{name} is {tensor.dtype}, the compressed weight {dtype}: convert one.")
    if not x.dim() or x.shape[-1] != in_features:
        raise ValueError(f"x has shape {list(x.shape)}: its last dimension must be {in_features}, the layer's inputs.")
    rows = weight_mask.shape[0]
    if weight_mask.dtype != torch.uint8 or weight_mask.dim() != 2 or weight_mask.shape[1] != -(-in_features // 8):
        raise ValueError(f"weight_mask is {_describe(weight_mask)}: must be uint8 [out, {-(-in_features // 8)}].")
    if weight.dim() > 1 and weight.shape[0] != rows:
        raise ValueError(f"weight is {_describe(weight)}: weight_mask has {rows} rows.")
    if weight_rows is not None and (weight_rows.dtype != torch.int64 or weight_rows.shape != (rows + 1,)):
        raise ValueError(f"weight_rows is {_describe(weight_rows)}: must be int64 [{rows + 1}].")
    if weight.dim() > 2:
        if overflow is None or starts is None:
            raise ValueError(f"weight is {_describe(weight)}, in slots: overflow and starts belong to it.")
        shape = slots.starts_shape(rows, in_features)
        if weight.dim() != 3 or in_features % 32 or weight.shape[1] != in_features // 32 or weight.shape[2] % 4:
            raise ValueError(f"weight is {_describe(weight)}: must be [{rows}, {in_features / 32:g}, 4 n].")
        if overflow.dtype != torch.int32 or starts.dtype != torch.int32 or starts.shape != shape:
            raise ValueError(
                f"overflow is {_describe(overflow)}, starts {_describe(starts)}: must be int32, starts {list(shape)}."
            )
    size = rows * in_features // 16  # and what the library pads it with
    if behind is not None and behind.nbytes < 2 * size:
        raise ValueError(f"semi_structured is {_describe(behind)}: must be {size} of 16 bits, or more.")
    if dense is not None and dense.shape != (rows, in_features):
        raise ValueError(f"dense is {_describe(dense)}: must be [{rows}, {in_features}], as the compressed weight.")
    if bias is not None and bias.shape != (rows,):
        raise ValueError(f"bias has shape {list(bias.shape)}: must be [{rows}], the layer's outputs.")


def _name_of(tensor: Tensor, x: Tensor, matrix: _Matrix, bias: Tensor | None) -> str:
    return next(name for name, other in (*matrix._asdict().items(), ("bias", bias), ("x", x)) if other is tensor)


def _describe(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


_FROZEN = (
    "a compressed weight cannot be trained: load the model without run_compressed=, or freeze it "
    "(weight.requires_grad_(False)) and train the rest."
)


def _save(ctx: Any, inputs: tuple, output: Tensor) -> None:
    matrix, _ = _split(inputs[1:])
    if matrix.weight.requires_grad:
        raise ValueError(_FROZEN)
    weight, weight_mask, weight_rows, ctx.in_features, ctx.group, *layout = matrix
    ctx.save_for_backward(weight, weight_mask, weight_rows, *layout)
    ctx.inputs = len(inputs)


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    weight, weight_mask, weight_rows, *layout = ctx.saved_tensors
    matrix = _Matrix(weight, weight_mask, weight_rows, ctx.in_features, ctx.group, *layout)
    gradients: list[Tensor | None] = [None] * ctx.inputs
    if ctx.needs_input_grad[0]:
        gradients[0] = gradient @ _dense(matrix)
    if ctx.needs_input_grad[5]:
        gradients[5] = gradient.sum_to_size(gradient.shape[-1:])
    return tuple(gradients)


def linear(x: Tensor, *args: Any) -> Tensor:
    """x [..., in] -> [..., out]; gradients for x and the bias where gradients are enabled.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, or the compressed weight itself wants a gradient.
    """
    # Derivatives forwards, and transforms of torch.func: PyTorch has no place for them in an op like this.
    transformed = not torch.compiler.is_compiling() and torch._C._functorch.peek_interpreter_stack() is not None
    if transformed or forward_ad._current_level >= 0:
        tracked = transformed and torch._C._functorch.is_gradtrackingtensor(args[0])
        if tracked or forward_ad.unpack_dual(args[0]).tangent is not None:
            raise ValueError(_FROZEN)
        return reference(x, *args)
    if torch.is_grad_enabled() or torch.jit.is_tracing():  # traces are checked without gradients
        return _linear(x, *args)
    if _needs_no_dispatcher(x, args[0]):
        return _linear_cuda(x, *args) if x.is_cuda else _linear_cpu(x, *args)
    return _linear_without_gradients(x, *args)


def _needs_no_dispatcher(x: Tensor, weight: Tensor) -> bool:
    """Whether none of what a dispatcher is for is there: torch.compile, modes, transforms, subclasses, profilers. A
    token of a small model waits for the CPU, for which the dispatcher is as much work as all else of a call."""
    return (
        not torch.compiler.is_compiling()  # first: torch.compile follows none of what asks for more
        and type(x) is Tensor
        and type(weight) in (Tensor, Parameter)
        and (x.is_cuda or x.is_cpu)
        and not x.is_neg()
        and not x._is_zerotensor()
        and not torch._C._len_torch_function_stack()
        and not torch._C._len_torch_dispatch_stack()
        and not torch.autograd._profiler_enabled()
    )


_LIBRARY.impl("expand", _expand_reference, "CompositeExplicitAutograd")
_LIBRARY.impl("expand", _expand_cpu, "CPU")
_LIBRARY.impl("expand", _expand_cuda, "CUDA")
torch.library.register_fake("optimum_sparse::expand", _expand_fake, lib=_LIBRARY)
for _name in ("linear", "linear_without_gradients"):
    _LIBRARY.impl(_name, reference, "CompositeExplicitAutograd")
    _LIBRARY.impl(_name, _linear_cpu, "CPU")
    _LIBRARY.impl(_name, _linear_cuda, "CUDA")
    torch.library.register_fake(f"optimum_sparse::{_name}", _linear_fake, lib=_LIBRARY)
torch.library.register_autograd("optimum_sparse::linear", _backward, setup_context=_save, lib=_LIBRARY)
