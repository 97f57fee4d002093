"""The CPU kernel, cpu.cpp, where it was built with the package."""

import ctypes
import functools
import importlib.util
import warnings

import torch
from torch import Tensor


TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
LEVELS = ("portable C++", "AVX2", "AVX-512", "AVX-512 with bf16")  # by the number that the library gives


@functools.cache
def library() -> ctypes.CDLL | None:
    """The library; None, after one warning, where there is none: no C++ compiler when this package was installed."""
    spec = importlib.util.find_spec("optimum_sparse.kernels._cpu")
    try:
        if spec is None or spec.origin is None:
            raise OSError("it was not built, for want of a C++20 compiler when optimum-sparse was installed")
        # It was linked without OpenMP, and finds the one that `import torch` has loaded for all: threads of a second
        # one would compete with PyTorch's.
        found = ctypes.CDLL(spec.origin)
    except OSError as error:
        warnings.warn(
            f"compressed layers run without a kernel on the CPU, slower than dense ones: {error}.", stacklevel=2
        )
        return None
    pointer, integer, number = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
    matrix: list = [number, pointer, integer, pointer, pointer, integer, integer]
    found.optimum_sparse_cpu_linear.restype = found.optimum_sparse_cpu_expand.restype = None
    found.optimum_sparse_cpu_linear.argtypes = [*matrix, number, pointer, integer, pointer, pointer]
    found.optimum_sparse_cpu_expand.argtypes = [*matrix, number, pointer]
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
    """x [tokens, in] -> [tokens, out]. All contiguous, on the CPU, of one dtype in TYPES; the matrix is valid."""
    found = library()
    assert found is not None
    y = x.new_empty(len(x), len(weight_mask))
    matrix = _matrix(weight, weight_mask, weight_rows, x.shape[1])
    offset = None if bias is None else bias.data_ptr()
    found.optimum_sparse_cpu_linear(*matrix, level, x.data_ptr(), len(x), offset, y.data_ptr())
    return y


def expand(weight: Tensor, weight_mask: Tensor, weight_rows: Tensor | None, in_features: int, level: int) -> Tensor:
    """The dense matrix [out, in]."""
    found = library()
    assert found is not None
    dense = weight.new_empty(len(weight_mask), in_features)
    found.optimum_sparse_cpu_expand(*_matrix(weight, weight_mask, weight_rows, in_features), level, dense.data_ptr())
    return dense


def _matrix(weight: Tensor, weight_mask: Tensor, weight_rows: Tensor | None, in_features: int) -> tuple:
    rows = None if weight_rows is None else weight_rows.data_ptr()
    mask = weight_mask.data_ptr()
    return TYPES[weight.dtype], weight.data_ptr(), weight.numel(), mask, rows, len(weight_mask), in_features
