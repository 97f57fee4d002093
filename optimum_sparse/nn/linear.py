"""A linear layer whose weight stays compressed in memory."""

from typing import Any

import torch
from torch import Tensor, nn

from ..core import Pattern
from ..formats import bitmask
from ..kernels.linear import expand, linear
from ..kernels.precision import as_multiplied


class SparseLinear(nn.Module):
    """`nn.Linear` that holds the tensors of `formats.bitmask` as they are on disk: its state dict is the disk format.

    The forward pass is `kernels.linear`: a kernel where there is one, else the weight is expanded and let go again.
    """

    weight: nn.Parameter
    weight_mask: Tensor
    weight_rows: Tensor | None  # unstructured only
    transposed: bool = False  # stands for a Conv1D, whose dense weight is [in, out]; here it is [out, in] all the same

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool,
        pattern: Pattern,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ):
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.pattern = pattern
        self.register_buffer("weight_rows", None)
        for name, (shape, fixed) in bitmask.layout((out_features, in_features), pattern).items():
            tensor = torch.empty(shape, dtype=fixed or dtype, device=device)
            if name == "weight":
                self.weight = nn.Parameter(tensor, requires_grad=False)
            else:
                self.register_buffer(name, tensor)
        self.bias = nn.Parameter(torch.empty(out_features, dtype=dtype, device=device)) if bias else None
        self.register_load_state_dict_post_hook(_validate_loaded)

    @classmethod
    def from_dense(cls, weight: Tensor, bias: Tensor | None, pattern: Pattern) -> "SparseLinear":
        """Compress weight [out, in]; `bias` is shared, not copied."""
        linear = cls(weight.shape[1], weight.shape[0], bias is not None, pattern, weight.dtype, "meta")
        tensors = bitmask.encode(weight, pattern)
        linear.weight = nn.Parameter(tensors.pop("weight"), requires_grad=False)
        for name, tensor in tensors.items():
            linear.register_buffer(name, tensor)
        if bias is not None:
            linear.bias = bias if isinstance(bias, nn.Parameter) else nn.Parameter(bias)
        return linear

    def compressed(self) -> dict[str, Tensor]:
        """The tensors of the disk format."""
        return {"weight": self.weight.data, **dict(self.named_buffers(recurse=False))}

    def validate(self) -> None:
        """Raise ValueError unless the tensors hold exactly one matrix of this layer's shape and pattern."""
        bitmask.validate(self.compressed(), (self.out_features, self.in_features), self.pattern)

    def to_dense(self) -> Tensor:
        """The weight [out, in], zeros in place."""
        return expand(self.weight.detach(), self.weight_mask, self.weight_rows, self.in_features)

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else as_multiplied(self.bias)
        weight = as_multiplied(self.weight)
        return linear(as_multiplied(x), weight, self.weight_mask, self.weight_rows, self.in_features, bias)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, pattern='{self.pattern}'"


def _validate_loaded(linear: SparseLinear, incompatible: Any) -> None:
    if not incompatible.missing_keys and not linear.weight.is_meta:
        linear.validate()
