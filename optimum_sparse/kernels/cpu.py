"""The CPU kernels, cpu.cpp, where they were built with the package. `formats.bitmask` gets some of them as well."""

import ctypes
import functools
import importlib.util
import math
import warnings

import numpy as np
import torch
from torch import Tensor

from ..formats import bitmask


TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
LEVELS = ("portable C++", "AVX2", "AVX-512", "AVX-512 with bf16")  # by the number that the library gives


@functools.cache
def library() -> ctypes.CDLL | None:
    """The library; None, after one warning, where there is none: no C++ compiler when this package was installed."""
    spec = importlib.util.find_spec("optimum_sparse.kernels._cpu")
    try:
        if spec is None or spec.origin is None:
            raise OSError("without a C++20 compiler it was not built; with one, install optimum-sparse again")
        # It was linked without OpenMP, and finds the one that `import torch` has loaded for all: threads of a second
        # one would compete with PyTorch's.
        found = ctypes.CDLL(spec.origin)
    except OSError as error:
        warnings.warn(
            f"the CPU kernels are missing, compressed layers run slower than dense ones: {error}.", stacklevel=2
        )
        return None
    pointer, integer, number = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
    matrix: list = [number, pointer, integer, pointer, pointer, integer, integer]
    found.optimum_sparse_cpu_linear.restype = found.optimum_sparse_cpu_expand.restype = None
    found.optimum_sparse_cpu_linear.argtypes = [*matrix, number, pointer, integer, pointer, pointer]
    found.optimum_sparse_cpu_expand.argtypes = [*matrix, number, pointer]
    found.optimum_sparse_cpu_nonzeros.restype, found.optimum_sparse_cpu_take_kept.restype = ctypes.c_bool, None
    found.optimum_sparse_cpu_nonzeros.argtypes = [number, pointer, *[integer] * 3, number, pointer, pointer]
    found.optimum_sparse_cpu_take_kept.argtypes = [number, pointer, pointer, pointer, *[integer] * 2, number, pointer]
    return found


@functools.cache
def best_level() -> int:
    """Index into LEVELS: what this machine's processor can do. The library must be there."""
    found = library()
    assert found is not None
    return found.optimum_sparse_cpu_level()


def linear(
    x: Tensor, weight: Tensor, weight_mask: Tensor, weight_rows: Tensor | None, bias: Tensor | None, level: int
) -> Tensor:
    """x [..., in] -> [..., out], all on the CPU and of one dtype in TYPES."""
    x = x.contiguous()
    *sizes, in_features = x.shape
    y = x.new_empty(*sizes, weight_mask.shape[0])
    bias = None if bias is None else bias.contiguous()
    more = level, x.data_ptr(), math.prod(sizes), None if bias is None else bias.data_ptr(), y.data_ptr()
    _call("linear", weight, weight_mask, weight_rows, in_features, *more)
    return y


def expand(
    weight: Tensor,
    weight_mask: Tensor,
    weight_rows: Tensor | None,
    in_features: int,
    level: int,
    room: Tensor | None = None,
) -> Tensor:
    """The dense matrix [out, in], in the first rows of `room` [out or more, in] if that is given."""
    rows = weight_mask.shape[0]
    dense = _large_pages(rows * in_features, weight).view(rows, in_features) if room is None else room[:rows]
    _call("expand", weight, weight_mask, weight_rows, in_features, level, dense.data_ptr())
    return dense


def _call(name: str, weight: Tensor, mask: Tensor, rows: Tensor | None, in_features: int, *more: int | None) -> None:
    """Whatever the matrix holds, nothing outside of its tensors is read or written."""
    found = library()
    assert found is not None
    weight, mask, rows = weight.contiguous(), mask.contiguous(), None if rows is None else rows.contiguous()
    matrix = TYPES[weight.dtype], weight.data_ptr(), weight.numel(), mask.data_ptr()
    starts = None if rows is None else rows.data_ptr()
    torch.get_num_threads()  # a new thread of Python's learns of torch.set_num_threads only when it asks
    # Not len(mask): that takes as long as three other methods of a tensor, and a token of a small model waits for all.
    getattr(found, f"optimum_sparse_cpu_{name}")(*matrix, starts, mask.shape[0], in_features, *more)


@bitmask.nonzeros.register_kernel("cpu")
def _nonzeros(weight: Tensor, kept: int) -> tuple[Tensor, Tensor]:
    found = library()
    if found is None:
        return bitmask.nonzeros_reference(weight, kept)
    weight = weight.contiguous()
    mask = torch.empty(len(weight), -(-weight.shape[1] // 8), dtype=torch.uint8)
    values = _large_pages(len(weight) * kept, weight)
    torch.get_num_threads()  # as in `_call`
    matrix = weight.element_size(), weight.data_ptr(), *weight.shape
    all_kept = found.optimum_sparse_cpu_nonzeros(*matrix, kept, best_level(), mask.data_ptr(), values.data_ptr())
    return mask, values if all_kept else values[:0].clone()


@bitmask.take_kept.register_kernel("cpu")
def _take_kept(weight: Tensor, mask: Tensor, starts: Tensor) -> Tensor:
    found = library()
    if found is None:
        return bitmask.take_kept_reference(weight, mask, starts)
    weight, mask, starts = weight.contiguous(), mask.contiguous(), starts.contiguous()
    values = _large_pages(int(starts[-1]), weight)
    torch.get_num_threads()
    matrix = weight.element_size(), weight.data_ptr(), mask.data_ptr(), starts.data_ptr(), *weight.shape
    found.optimum_sparse_cpu_take_kept(*matrix, best_level(), values.data_ptr())
    return values


def _large_pages(count: int, like: Tensor) -> Tensor:
    """Memory for so many values. numpy asks for large pages, PyTorch does not: to touch new small ones takes longer
    than to encode, or to decode."""
    return torch.from_numpy(np.empty(count, f"i{like.element_size()}")).view(like.dtype)


@bitmask.put_kept.register_kernel("cpu")
def _put_kept(values: Tensor, mask: Tensor, in_features: int) -> Tensor:
    if values.dtype not in TYPES or library() is None:
        return bitmask.put_kept_reference(values, mask, in_features)
    rows = bitmask.row_starts(mask) if values.dim() == 1 else None  # N:M: all have the same number
    return expand(values, mask, rows, in_features, best_level())
