"""CSR as torch.sparse_csr has it, and its honest size."""

import pytest
import torch
from helpers import random_weight

from optimum_sparse.core import Unstructured, keep_mask
from optimum_sparse.formats import bitmask, csr


@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_round_trip_and_size(sparsity: float, dtype: torch.dtype):
    weight = random_weight(6, 40)
    weight = (weight * keep_mask(weight.abs(), Unstructured(sparsity))).to(dtype)
    tensors = csr.encode(weight)
    assert {name: tensor.dtype for name, tensor in tensors.items()} == {
        "weight": dtype,
        "weight_crow_indices": torch.int32,
        "weight_col_indices": torch.int32,
    }
    kept = int(weight.count_nonzero())
    assert sum(tensor.nbytes for tensor in tensors.values()) == csr.nbytes((6, 40), kept, dtype.itemsize)
    assert torch.equal(csr.decode(tensors, (6, 40)).to_dense(), weight)
    x = random_weight(40, 3, seed=1)
    if dtype == torch.float32:
        torch.testing.assert_close(csr.decode(tensors, (6, 40)) @ x, weight @ x)


def test_each_value_and_index():
    tensors = csr.encode(torch.tensor([[0.0, 3, 0, 1], [0, 0, 0, 0], [5, 0, 0, 2]]))
    assert tensors["weight"].tolist() == [3, 1, 5, 2]
    assert tensors["weight_crow_indices"].tolist() == [0, 2, 2, 4]
    assert tensors["weight_col_indices"].tolist() == [1, 3, 0, 3]


def test_at_half_it_is_larger_than_dense():
    rows, columns = shape = (512, 4096)
    half = rows * columns // 2
    assert csr.nbytes(shape, half, 2) == pytest.approx(1.5 * 2 * rows * columns, rel=1e-3)
    for beyond, other in ((2 / 3, 2 * rows * columns), (31 / 32, None)):
        for step, smaller in ((-0.01, False), (0.01, True)):
            pattern = Unstructured(beyond + step)
            size = other or bitmask.nbytes(shape, pattern, 2)
            assert (csr.nbytes(shape, pattern.kept(rows * columns), 2) < size) is smaller


def test_damaged_indices_are_refused():
    tensors = csr.encode(random_weight(3, 4))
    with pytest.raises(RuntimeError, match="col_indices"):
        csr.decode(tensors | {"weight_col_indices": tensors["weight_col_indices"] + 1}, (3, 4))
