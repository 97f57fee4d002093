"""2:4 on sparse tensor cores, for many tokens: NVIDIA's cuSPARSELt, called without PyTorch's wrapper.

That wrapper makes a new plan at each call, 400 to 900 us of the CPU's time, and takes the default algorithm, which is
up to twice slower than the best. Here plans are kept, and the best algorithm for a shape is timed once and written
down on disk.

cuSPARSELt's own layout begins with the kept values in the order of `formats.bitmask`; where they belong follows in two
bits each. So both readers share the values: `pack`.
"""

import contextlib
import ctypes
import functools
import json
import logging
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .cuda import aligned


logger = logging.getLogger(__name__)

TYPES = {torch.bfloat16: 14}  # cudaDataType
SIZES, LEAST = 64, 128  # outputs and inputs must be multiples of the one: see `usable`
# What tokens are padded to, up to 128 and beyond. The fastest algorithms take 256 at a time: on an H200 512 tokens
# take as long as 384 or, of 4096 x 4096 and 4096 x 11008, three quarters of that.
FEW, MANY = 64, 256
OLDEST = 800  # the one whose header the numbers below are from
OPAQUE = 2**14  # bytes: all of the library's structures have less, in all of its versions so far
COLUMN, ROW, TRANSPOSE, FP32_SUMS, CONFIG_ID, CONFIG_MAX_ID = 1, 2, 1, 2, 0, 1  # of the library's enumerations


@functools.cache
def unavailable(device: int) -> str | None:
    """Why cuSPARSELt cannot run on a CUDA device, if so."""
    if not torch.backends.cusparselt.is_available() or (torch.backends.cusparselt.version() or 0) < OLDEST:
        return f"PyTorch was built without cuSPARSELt {OLDEST // 1000}.{OLDEST % 1000 // 100} or newer"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return f"{torch.cuda.get_device_name(device)} has no sparse tensor cores"
    try:
        _handle(device)
    except (OSError, RuntimeError, AttributeError) as error:
        logger.warning("2:4 layers run without cuSPARSELt: %s.", error)
        return f"cuSPARSELt could not be loaded: {error}"
    return None


def pack(weight: Tensor, dense_mask: Tensor) -> Tensor:
    """Values [out, in / 2] and the mask [out, in] as cuSPARSELt's buffer, which begins with the values.

    The buffer is made of the mask: made of the values, a kept zero would lose its place.
    """
    packed = torch._cslt_compress(dense_mask.to(weight.dtype)).view(-1)
    packed[: weight.numel()] = weight.reshape(-1)
    return packed


def linear(x: Tensor, packed: Tensor, out_features: int, bias: Tensor | None) -> Tensor:
    """x [..., in] -> [..., out]; `packed`, or the values in it, with the rest behind them."""
    device, sizes = x.get_device(), x.shape[:-1]
    if device != torch.cuda.current_device():
        with torch.cuda.device(device):
            return linear(x, packed, out_features, bias)
    in_features = x.shape[-1]
    tokens = x.numel() // in_features
    more = -tokens % (FEW if tokens <= 128 else MANY)
    if more:  # whatever was in the room: it changes no other token
        padded = x.new_empty(tokens + more, in_features)
        padded[:tokens] = x.reshape(-1, in_features)
        x = padded
    x = aligned(x)
    shape = out_features, in_features, tokens + more
    y = x.new_empty(tokens + more, out_features)
    algorithm = _best_algorithm(x, packed, y, shape)
    try:
        _multiply(algorithm, shape, packed, x, y)
    except RuntimeError:  # the file may name any
        if not algorithm:
            raise
        _multiply(0, shape, packed, x, y)
    y = (y[:tokens] if more else y).view(*sizes, out_features)
    return y if bias is None else y.add_(bias)


def usable(device: int, dtype: torch.dtype, out_features: int, in_features: int) -> bool:
    """Whether cuSPARSELt takes a weight of this dtype and size.

    It claims to take fp16 too; there (0.8, H100) one of its algorithms ends in an illegal instruction, whatever the
    size, which no program survives. It claims to take multiples of 16, and of 8 tokens, of which fewer were tried.
    """
    fits = out_features % SIZES == 0 and in_features % SIZES == 0 and min(out_features, in_features) >= LEAST
    return dtype in TYPES and fits and unavailable(device) is None


def _multiply(algorithm: int, shape: tuple[int, int, int], packed: Tensor, x: Tensor, y: Tensor) -> None:
    device = x.get_device()
    plan, workspace = _plan(device, x.dtype, shape, algorithm)
    scratch = x.new_empty(workspace, dtype=torch.uint8) if workspace else None
    stream = ctypes.c_void_p(torch._C._cuda_getCurrentRawStream(device))
    output, scratch_at = y.data_ptr(), None if scratch is None else scratch.data_ptr()
    streams = ctypes.addressof(stream), 1
    operands = _ONE, packed.data_ptr(), x.data_ptr(), _ZERO, output, output
    _call("Matmul", _handle(device), plan.address, *operands, scratch_at, *streams)


_NUMBERS = (ctypes.c_float * 2)(1, 0)
_ONE, _ZERO = ctypes.addressof(_NUMBERS), ctypes.addressof(_NUMBERS) + 4


# ---- algorithms


def _best_algorithm(x: Tensor, packed: Tensor, y: Tensor, shape: tuple[int, int, int]) -> int:
    """The fastest for a shape, tokens included: timed once, in tenths of a second, and known from then on."""
    key, known = _key(x.get_device(), x.dtype, shape), _known_algorithms()
    if key not in known:
        if torch.cuda.is_current_stream_capturing():
            return 0  # nothing can be timed now
        best = _time_algorithms(x, packed, y, shape)
        known[key] = best or 0
        if best is not None:
            _remember(known)
    return known[key]


@functools.lru_cache(maxsize=4096)
def _key(device: int, dtype: torch.dtype, shape: tuple[int, int, int]) -> str:
    out_features, in_features, tokens = shape
    name, version = torch.cuda.get_device_name(device), torch.backends.cusparselt.version()
    return f"{name}, {version}, {dtype}, {out_features}x{in_features}, {tokens} tokens"


def _time_algorithms(x: Tensor, packed: Tensor, y: Tensor, shape: tuple[int, int, int]) -> int | None:
    best, least, stream = None, float("inf"), torch.cuda.Stream(x.device)
    for algorithm in range(_algorithms(x.device.index, x.dtype, shape)):
        try:
            _multiply(algorithm, shape, packed, x, y)
            torch.cuda.synchronize(x.device)
            graph = torch.cuda.CUDAGraph()  # without it, launches are what is timed
            with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
                for _ in range(8):
                    _multiply(algorithm, shape, packed, x, y)
        except RuntimeError:  # not every algorithm takes every shape
            continue
        for _ in range(4):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            graph.replay()
            end.record()
            end.synchronize()
            if begin.elapsed_time(end) < least:
                best, least = algorithm, begin.elapsed_time(end)
    return best


def _cache_file() -> Path:
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "optimum_sparse" / "cusparselt.json"


@functools.cache
def _known_algorithms() -> dict[str, int]:
    return _read_known()


def _read_known() -> dict[str, int]:
    with contextlib.suppress(OSError, ValueError, RuntimeError):
        found = json.loads(_cache_file().read_text())
        if isinstance(found, dict) and all(isinstance(value, int) for value in found.values()):
            return found
    return {}


def _remember(known: dict[str, int]) -> None:
    """Write what is known, all at once; without a place to write to it is timed again next time."""
    with contextlib.suppress(OSError, RuntimeError):
        file = _cache_file()
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=file.parent) as part:
            written = Path(part) / file.name
            written.write_text(json.dumps(_read_known() | known, indent=1))  # others may have written meanwhile
            os.replace(written, file)


# ---- the library


class _Opaque:
    """Room for one of the library's structures, which want 16-byte alignment."""

    def __init__(self) -> None:
        self._memory = ctypes.create_string_buffer(OPAQUE + 16)
        self.address = -(-ctypes.addressof(self._memory) // 16) * 16
        self.parts: tuple[Any, ...] = ()  # what it points to


@functools.cache
def _library() -> ctypes.CDLL:
    return ctypes.CDLL("libcusparseLt.so.0")  # the one that PyTorch has loaded


@functools.cache
def _function(name: str, arguments: int) -> Any:
    found = getattr(_library(), f"cusparseLt{name}")
    found.argtypes = [ctypes.c_void_p] * arguments  # as wide as a register, and None is null
    return found


def _call(name: str, *arguments: int | None) -> None:
    """All arguments are pointers, 64-bit or small numbers: ctypes passes each as 64 bits, which the ABI allows."""
    if status := _function(name, len(arguments))(*arguments):
        raise RuntimeError(f"cusparseLt{name} returned {status}")


@functools.cache
def _handle(device: int) -> int:
    handle = _Opaque()
    with torch.cuda.device(device):
        torch.cuda.current_stream().query()  # now there is a context
        _call("Init", handle.address)
    _alive.append(handle)
    return handle.address


_alive: list[_Opaque] = []


@functools.lru_cache(maxsize=64)
def _description(device: int, dtype: torch.dtype, shape: tuple[int, int, int]) -> _Opaque:
    """y^T [out, tokens] = W [out, in] x^T, where x is [tokens, in] and the columns of y^T are the rows of y."""
    rows, inner, tokens = shape
    handle, kind = _handle(device), TYPES[dtype]
    w, x, y, product = (_Opaque() for _ in range(4))
    _call("StructuredDescriptorInit", handle, w.address, rows, inner, inner, 16, kind, ROW, 0)
    _call("DenseDescriptorInit", handle, x.address, tokens, inner, inner, 16, kind, ROW)
    _call("DenseDescriptorInit", handle, y.address, rows, tokens, rows, 16, kind, COLUMN)
    parts = w.address, x.address, y.address, y.address
    _call("MatmulDescriptorInit", handle, product.address, 0, TRANSPOSE, *parts, FP32_SUMS)
    product.parts = w, x, y
    return product


@functools.lru_cache(maxsize=256)
def _plan(device: int, dtype: torch.dtype, shape: tuple[int, int, int], algorithm: int) -> tuple[_Opaque, int]:
    """A plan, and the bytes of workspace that it wants."""
    with torch.cuda.device(device):
        selection = _selection(device, dtype, shape)
        number = ctypes.c_int(algorithm)
        _call("MatmulAlgSetAttribute", _handle(device), selection.address, CONFIG_ID, ctypes.addressof(number), 4)
        plan, size = _Opaque(), ctypes.c_size_t()
        _call("MatmulPlanInit", _handle(device), plan.address, selection.parts[0].address, selection.address)
        _call("MatmulGetWorkspace", _handle(device), plan.address, ctypes.addressof(size))
    plan.parts = (selection,)
    return plan, size.value


def _algorithms(device: int, dtype: torch.dtype, shape: tuple[int, int, int]) -> int:
    number = ctypes.c_int()
    selection = _selection(device, dtype, shape)
    _call("MatmulAlgGetAttribute", _handle(device), selection.address, CONFIG_MAX_ID, ctypes.addressof(number), 4)
    return number.value


def _selection(device: int, dtype: torch.dtype, shape: tuple[int, int, int]) -> _Opaque:
    product, selection = _description(device, dtype, shape), _Opaque()
    _call("MatmulAlgSelectionInit", _handle(device), selection.address, product.address, 0)
    selection.parts = (product,)
    return selection
