"""Faster arithmetic where it does no harm, and full fp32 where it would."""

import contextlib
import functools
import inspect
import sys
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F


class _Precision:
    """PyTorch's precision of fp32 matrix products on one backend, which is one for the whole process.

    Of all that is asked for at a time, nested or in several threads, the strictest holds; what was set before the
    first comes back after the last.
    """

    def __init__(self, backend: Any):
        self._backend = backend
        self._lock = threading.Lock()
        self._asked: list[str] = []
        self._before = ""

    @contextlib.contextmanager
    def at(self, precision: str) -> Iterator[None]:
        """Or stricter: it is 'ieee', 'tf32' or 'bf16'."""
        with self._lock:
            if not self._asked:
                self._before = self._backend.fp32_precision
            self._asked.append(precision)
            self._set()
        try:
            yield
        finally:
            with self._lock:
                self._asked.remove(precision)
                self._set()

    def _set(self) -> None:
        self._backend.fp32_precision = min(self._asked, key=("ieee", "tf32", "bf16").index, default=self._before)


_cpu = _Precision(torch.backends.mkldnn.matmul)  # type: ignore[attr-defined]
_cuda = _Precision(torch.backends.cuda.matmul)


@contextlib.contextmanager
def full_fp32(device: str) -> Iterator[None]:
    """fp32 products on this type of device stay fp32, whatever autocast and precision (TF32, bf16) the caller set."""
    with torch.autocast(device, enabled=False), _cpu.at("ieee"), _cuda.at("ieee"):
        yield


@contextlib.contextmanager
def onednn_fp32(precision: str = "tf32") -> Iterator[None]:
    """fp32 matrix products of the CPU through oneDNN instead of MKL.

    PyTorch takes oneDNN for fp32 only where a lower precision is allowed, and "tf32" allows one that today's CPUs do
    not have: products stay fp32 (error against float64 2.5e-7 in both). On AMD, where MKL leaves AVX-512 unused, they
    are 1.5 to 2 times faster.
    """
    with _cpu.at(precision):
        yield


@contextlib.contextmanager
def fast_forward(x: torch.Tensor, block: nn.Module | None = None) -> Iterator[None]:
    """Forward passes and Gram products for inputs like x as fast as they get without harm to pruning.

    On CUDA: RMSNorms of `block` in one kernel each, rotary embeddings in three unless x is fp32. If x is fp32, and
    the device multiplies bf16 (CUDA; AMX or AVX512-BF16): linears and attention in bf16 between fp32 sums, Gram
    products of bf16 inputs with fp32 sums.
    SmolLM2-135M, SparseGPT 2:4, 64 x 1024 tokens, AMX, 8 threads: 57 s instead of 111 s, perplexity 80.8 instead of
    81.2 (rounding alone moves it by 0.5). On other CPUs: `onednn_fp32`, and `wide_products` in `block`.
    """
    device = x.device.type
    bf16 = x.dtype == torch.float32 and _multiplies_bf16(device)
    # The cache would hold bf16 copies of weights that are replaced in between.
    autocast = torch.autocast(device, torch.bfloat16, cache_enabled=False) if bf16 else contextlib.nullcontext()
    # Elsewhere it does nothing, and while it is set, what torch.compile asks for (in flex_attention, say) raises.
    products = onednn_fp32("bf16" if bf16 else "tf32") if device == "cpu" else contextlib.nullcontext()
    with products, autocast, contextlib.ExitStack() as fused:
        if device == "cuda" and block is not None:
            fused.enter_context(fused_norms(block))
            fused.enter_context(fused_rotary(block))
        if device == "cpu" and block is not None:
            fused.enter_context(wide_products(block))
        yield


@functools.cache
def is_widened(dtype: torch.dtype) -> bool:
    """Whether PyTorch multiplies matrices of this type number by number on this CPU: four times as slow as fp32 ones.

    oneDNN multiplies the others.
    """
    supported = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}.get(dtype)
    return supported is not None and not (
        torch.backends.mkldnn.is_available() and getattr(torch.ops.mkldnn, supported)()
    )


@contextlib.contextmanager
def wide_products(module: nn.Module) -> Iterator[None]:
    """Linears in `module`, of a type that `is_widened`, multiply in fp32 on the CPU and round once, as ever."""
    found = (part for part in module.modules() if type(part) is nn.Linear)
    linears: list[Any] = [linear for linear in found if is_widened(linear.weight.dtype)]
    with replaced_forwards(
        linears, lambda index: functools.partial(_wide_linear, linears[index], linears[index].forward)
    ):
        yield


def _wide_linear(linear: nn.Linear, otherwise: Callable, x: torch.Tensor) -> torch.Tensor:
    weight, bias = linear.weight, linear.bias
    if x.device.type != "cpu" or weight.is_meta or x.dtype != weight.dtype or torch.is_autocast_enabled("cpu"):
        return otherwise(x)
    return F.linear(x.float(), weight.float(), None if bias is None else bias.float()).to(x.dtype)


@contextlib.contextmanager
def fused_norms(block: nn.Module) -> Iterator[None]:
    """RMSNorms of transformers' usual kind in `block` are computed by `F.rms_norm`: a kernel instead of six or seven.

    They are known by what they have and by what they give: see `_is_rms_norm`.
    """
    norms: list[Any] = [module for module in block.modules() if _is_rms_norm(module)]
    with replaced_forwards(norms, lambda index: functools.partial(_rms_norm, norms[index], norms[index].forward)):
        yield


@contextlib.contextmanager
def replaced_forwards(modules: Sequence[nn.Module], make: Callable[[int], Callable]) -> Iterator[None]:
    """Each module's forward is make(index); what was set on the instance before (accelerate's hooks) comes back."""
    before = [module.__dict__.get("forward") for module in modules]
    try:
        for index, module in enumerate(modules):
            module.forward = make(index)
        yield
    finally:
        for module, forward in zip(modules, before, strict=True):
            module.__dict__.pop("forward", None)
            if forward is not None:
                module.forward = forward


def _rms_norm(norm: Any, otherwise: Callable, x: torch.Tensor) -> torch.Tensor:
    if x.dtype != norm.weight.dtype or x.device != norm.weight.device:
        return otherwise(x)
    with torch.autocast(x.device.type, enabled=False):  # which would make fp32 of it, where the module does not
        return F.rms_norm(x, norm.weight.shape, norm.weight, norm.variance_epsilon)


_rms_norms: weakref.WeakKeyDictionary[nn.Module, bool] = weakref.WeakKeyDictionary()


def _is_rms_norm(module: Any) -> bool:
    """Whether a module takes x alone, and gives for some numbers what `F.rms_norm` does.

    Others have the same weights and more to do: they add 1 to them, subtract the mean, or take a gate or groups.
    """
    weight, epsilon = getattr(module, "weight", None), getattr(module, "variance_epsilon", None)
    if not isinstance(weight, torch.Tensor) or weight.is_meta or weight.dim() != 1 or not isinstance(epsilon, float):
        return False
    if "forward" in module.__dict__ and not hasattr(module, "_hf_hook"):  # not the class's, nor accelerate's around it
        return False
    forward = type(module).forward  # without hooks
    if len(inspect.signature(forward).parameters) != 2:
        return False
    if module not in _rms_norms:
        x = torch.linspace(-2, 3, 4 * len(weight), device=weight.device).view(4, -1).to(weight.dtype)
        try:
            wanted = forward(module, x)
        except Exception:
            return False
        if not wanted.any() or not wanted.isfinite().all():  # weights that tell nothing
            return False
        found = _rms_norm(module, module, x)
        same = wanted.dtype == found.dtype and wanted.shape == found.shape
        _rms_norms[module] = same and torch.allclose(wanted.float(), found.float(), rtol=2**-6, atol=1e-6)
    return _rms_norms[module]


_rotary_lock = threading.Lock()
_rotary_found: dict[Any, list[Callable]] = {}  # by file: what was there, then the fused one for each further use


@contextlib.contextmanager
def fused_rotary(block: nn.Module) -> Iterator[None]:
    """Rotary embeddings of transformers' usual kind in `block` take three kernels instead of five, half of the bytes.

    `apply_rotary_pos_emb` is a global of the file that an attention is in, which is one for the whole process: what
    was there before the first of several uses, nested or in several threads, comes back after the last.
    H200, bf16, 16 x 2048 tokens, 32 + 8 heads of 128: 1.22 ms instead of 2.34.
    """
    names = {base.__module__ for module in block.modules() for base in type(module).__mro__}
    files: list[Any] = [sys.modules[name] for name in names if hasattr(sys.modules.get(name), "apply_rotary_pos_emb")]
    replaced: list[Any] = []
    try:
        with _rotary_lock:
            for file in files:
                found = _rotary_found.setdefault(file, [])
                fused = _fused_rotary(found[0] if found else file.apply_rotary_pos_emb)
                found.append(file.apply_rotary_pos_emb)
                replaced.append(file)
                file.apply_rotary_pos_emb = fused
        yield
    finally:
        with _rotary_lock:
            for file in replaced:
                file.apply_rotary_pos_emb = _rotary_found[file].pop()  # the last to end gets what was there


@functools.cache
def _fused_rotary(rotary: Callable) -> Callable:
    """What does the same faster, or rotary itself where it takes something else or gives something else.

    Others interleave the halves, or take positions. The fused one leaves to rotary what has a gradient, and what is
    not alike: cos and sin shorter than a head, in fp32 for a single rounding, or of more positions than q.
    """

    def fused(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, unsqueeze_dim: int = 1) -> Any:
        tensors = (q, k, cos, sin)
        alike = len({(x.dtype, x.device, x.shape[-1]) for x in tensors}) == 1 and cos.shape == sin.shape
        if not alike or q.shape[-1] % 2 or (torch.is_grad_enabled() and any(x.requires_grad for x in tensors)):
            return rotary(q, k, cos, sin, unsqueeze_dim)
        each_cos, each_sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
        sizes = [pair for x in (q, k) for pair in zip(each_cos.shape, x.shape, strict=False)]
        if not q.dim() == k.dim() == each_cos.dim() or any(size not in (1, wanted) for size, wanted in sizes):
            return rotary(q, k, cos, sin, unsqueeze_dim)
        return _rotated(q, each_cos, each_sin), _rotated(k, each_cos, each_sin)

    generator = torch.Generator("cpu").manual_seed(0)
    shapes = [(2, 2, 3, 8), (2, 1, 3, 8), (2, 3, 8), (2, 3, 8)]
    try:
        forward = getattr(rotary, "forward", rotary)  # where the package `kernels` is installed, it is a module
        if str(inspect.signature(forward, follow_wrapped=False)) != "(q, k, cos, sin, unsqueeze_dim=1)":
            return rotary
        for dtype in (torch.float32, torch.bfloat16):
            q, k, cos, sin = (torch.randn(shape, generator=generator, device="cpu", dtype=dtype) for shape in shapes)
            for dim in (1, 2):
                wanted, found = rotary(q, k, cos, sin, dim), fused(q, k, cos, sin, dim)
                torch.testing.assert_close(found, wanted, rtol=0, atol=8 * torch.finfo(dtype).eps)
                q, k = q.transpose(1, 2), k.transpose(1, 2)
    except Exception:
        return rotary
    return fused


def _rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """x * cos + rotate_half(x) * sin. In bf16 it is rounded twice, not three times: addcmul is fp32 inside."""
    half = x.shape[-1] // 2
    out = x * cos
    out[..., :half].addcmul_(x[..., half:], sin[..., :half], value=-1)
    out[..., half:].addcmul_(x[..., :half], sin[..., half:])
    return out


def as_multiplied(x: torch.Tensor) -> torch.Tensor:
    """x as a linear layer multiplies it here and now: autocast casts all floats but float64."""
    if x.is_floating_point() and x.dtype != torch.float64 and torch.is_autocast_enabled(x.device.type):
        return x.to(torch.get_autocast_dtype(x.device.type))
    return x


@functools.cache
def _multiplies_bf16(device: str) -> bool:
    if device == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities = torch.cpu.get_capabilities() if device == "cpu" else {}
    return any(capabilities.get(name, False) for name in ("amx_bf16", "avx512_bf16"))
