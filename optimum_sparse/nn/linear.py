"""A linear layer whose weight stays compressed in memory."""

import contextlib
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..core import NM, Pattern
from ..formats import bitmask, slots
from ..kernels import cusparselt
from ..kernels.linear import expand, linear, wanted_layout
from ..kernels.precision import as_multiplied


class SparseLinear(nn.Module):
    """`nn.Linear` that holds the tensors of `formats.bitmask`: its state dict is the disk format.

    The forward pass is `kernels.linear`: a kernel where there is one, else the weight is expanded and let go again.
    Where CUDA kernels want the values in another layout, `pack` moves them, whenever the layer comes to such a device,
    and `unpack` moves them back when it leaves; the state dict stays the same.

    Attributes:
        keeps_dense: `pack` expands the weight, too, and products that are faster with it take it, as long as the
            compressed one is that which was expanded.
    """

    weight: nn.Parameter
    weight_mask: Tensor
    weight_rows: Tensor | None  # unstructured only
    overflow: Tensor | None  # packed only: formats.slots
    starts: Tensor | None
    semi_structured: Tensor | None  # packed only: kernels.cusparselt; it lies behind the values, in one storage
    dense: Tensor | None  # packed only, if `keeps_dense`: [out, in]
    transposed: bool = False  # stands for a Conv1D, whose dense weight is [in, out]; here it is [out, in] all the same

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool,
        pattern: Pattern,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        keeps_dense: bool = False,
    ):
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.pattern = pattern
        self.keeps_dense = keeps_dense
        self.checked = False  # whether the tensors are known to hold a matrix: memory that was never written does not
        for name, (shape, fixed) in bitmask.layout((out_features, in_features), pattern).items():
            tensor = torch.empty(shape, dtype=fixed or dtype, device=device)
            if name == "weight":
                self.weight = nn.Parameter(tensor, requires_grad=False)
            else:
                self.register_buffer(name, tensor)
        if not hasattr(self, "weight_rows"):
            self.register_buffer("weight_rows", None)
        self._lay()
        self._expanded: Any = None  # `_source` of `dense`
        self.register_parameter(
            "bias", nn.Parameter(torch.empty(out_features, dtype=dtype, device=device)) if bias else None
        )

    @classmethod
    def from_dense(
        cls, weight: Tensor, bias: Tensor | None, pattern: Pattern, keeps_dense: bool = False
    ) -> "SparseLinear":
        """Compress weight [out, in]; `bias` is shared, not copied."""
        linear = cls(weight.shape[1], weight.shape[0], bias is not None, pattern, weight.dtype, "meta", keeps_dense)
        tensors = bitmask.encode(weight, pattern)
        linear.weight = nn.Parameter(tensors.pop("weight"), requires_grad=False)
        for name, tensor in tensors.items():
            linear.register_buffer(name, tensor)
        if bias is not None:
            linear.bias = bias if isinstance(bias, nn.Parameter) else nn.Parameter(bias)
        linear.checked = True
        linear.pack()
        return linear

    @property
    def packed(self) -> bool:
        """Whether the values lie elsewhere than on disk."""
        return self.overflow is not None or self.semi_structured is not None

    def pack(self) -> None:
        """Move the values to where the kernels of this device want them, if they do; expand them if `keeps_dense`."""
        if not self.checked or not self.weight.numel():
            return
        weight, shape = self.weight, (self.out_features, self.in_features)
        layout = None if self.packed else wanted_layout(weight.device, weight.dtype, self.pattern, shape)
        if layout == "slots":
            moved = slots.pack(weight.data, self.weight_mask, self.in_features)
            weight.data = moved.values
            self._lay(moved.overflow, moved.starts)
        elif layout == "cusparselt":
            packed = cusparselt.pack(weight.data, bitmask.unpack_bits(self.weight_mask, self.in_features))
            weight.data = packed[: weight.numel()].view(weight.shape)
            self._lay(semi_structured=packed[weight.numel() :])
        if self.keeps_dense and self.dense is None and not weight.is_meta:  # else it is offloaded, to save memory
            self._lay(self.overflow, self.starts, self.semi_structured, self.to_dense())
            self._expanded = _source(self.weight, self.weight_mask)

    def _lay(
        self,
        overflow: Tensor | None = None,
        starts: Tensor | None = None,
        semi_structured: Tensor | None = None,
        dense: Tensor | None = None,
    ) -> None:
        """Set what `pack` adds to the values. It is in no state dict."""
        added = {"overflow": overflow, "starts": starts, "semi_structured": semi_structured, "dense": dense}
        for name, tensor in added.items():
            # accelerate takes all that is called not persistent for tensors.
            self.register_buffer(name, tensor, persistent=tensor is None)
        for name in [name for name, tensor in self._buffers.items() if tensor is None]:
            self._buffers[name] = self._buffers.pop(name)  # after all others: torch.export counts on it

    @property
    def growth(self) -> float:
        """How many times the bytes of the values on disk `pack` makes of them on a GPU, about."""
        shape = (self.out_features, self.in_features)
        whole = math.prod(shape) / max(1, math.prod(bitmask.layout(shape, self.pattern)["weight"][0]))
        growth = 1 + whole if self.keeps_dense else 1.0
        if torch.cuda.is_available():
            layout = wanted_layout(torch.device("cuda"), self.weight.dtype, self.pattern, shape)
            if layout == "slots":  # measured: 0.09 of the dense bytes more from 30 to 70 % sparsity
                growth += 0.09 * whole
            elif layout == "cusparselt":
                growth += 0.125
        return growth

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        if self.dense is not None:  # what it is of may have been changed before it was copied
            self._lay(*self._layout[:3])
        behind, weight = self.semi_structured, self.weight
        if behind is not None:  # a copy of both has copied the values twice: once by themselves, and these count
            together = behind.device == weight.device and behind.dtype == weight.dtype
            if together:
                values = weight.data.new_empty(0)
                values.set_(behind.untyped_storage(), 0, weight.shape, weight.stride())
                together = torch.equal(values, weight.data)
            if together:
                weight.data = values
            else:
                self._lay()
        shape = (self.out_features, self.in_features)
        if self.packed and wanted_layout(weight.device, weight.dtype, self.pattern, shape) is None:
            self.unpack()  # torch.load has brought it to another device
        self.pack()

    def unpack(self) -> None:
        """Undo `pack`."""
        if self.packed:
            self.weight.data = self._values().clone()
        if self.packed or self.dense is not None:
            self._lay()

    def _values(self) -> Tensor:
        """The values as they are on disk."""
        if self.weight.dim() != 3 or self.overflow is None or self.starts is None:
            return self.weight.data
        shape, _ = bitmask.layout((self.out_features, self.in_features), self.pattern)["weight"]
        moved = slots.Slots(self.weight.data, self.overflow, self.starts)
        return slots.unpack(moved, self.weight_mask, self.in_features, math.prod(shape)).view(shape)

    def compressed(self) -> dict[str, Tensor]:
        """The tensors of the disk format."""
        more = {"weight_mask": self.weight_mask, "weight_rows": self.weight_rows}
        return {"weight": self._values(), **{name: tensor for name, tensor in more.items() if tensor is not None}}

    def validate(self) -> None:
        """Raise ValueError unless the tensors hold exactly one matrix of this layer's shape and pattern."""
        bitmask.validate(self.compressed(), (self.out_features, self.in_features), self.pattern)
        self.checked = True

    def to_dense(self) -> Tensor:
        """The weight [out, in], zeros in place."""
        return expand(
            self.weight.detach(), self.weight_mask, self.weight_rows, self.in_features, self._group, *self._layout
        )

    def forward(self, x: Tensor) -> Tensor:
        parameters: dict[str, Any] = self._parameters  # nn.Module's attributes take a microsecond each
        buffers = self._buffers
        if "weight" not in parameters or "bias" not in parameters:  # nn.DataParallel, parametrizations
            parameters = {"weight": self.weight, "bias": self.bias}
        weight, bias, device = parameters["weight"], parameters["bias"], x.device.type
        dense = buffers["dense"]
        if dense is not None and not torch.compiler.is_compiling():  # which follows no pointers
            same = self._expanded is not None and _source(weight, buffers["weight_mask"]) == self._expanded
            dense = dense if same else None
        if torch.is_autocast_enabled(device):
            if weight.dim() == 3 and weight.dtype != torch.get_autocast_dtype(device):  # overflow holds bits of it
                return F.linear(x, self.to_dense() if dense is None else dense, bias)
            x, weight = as_multiplied(x), as_multiplied(weight)
            bias = None if bias is None else as_multiplied(bias)
            dense = None if dense is None else as_multiplied(dense)
        return linear(
            x,
            weight,
            buffers["weight_mask"],
            buffers["weight_rows"],
            self.in_features,
            bias,
            self._group,
            buffers["overflow"],
            buffers["starts"],
            buffers["semi_structured"],
            dense,
        )

    @property
    def _group(self) -> int:
        return self.pattern.group if isinstance(self.pattern, NM) else 0

    @property
    def _layout(self) -> tuple[Tensor | None, ...]:
        return self.overflow, self.starts, self.semi_structured, self.dense

    def _apply(self, fn: Callable, recurse: bool = True) -> "SparseLinear":
        here = self.weight.data.new_empty(0)
        there = fn(here)
        moves = there.device != here.device or there.dtype != here.dtype
        others = here.is_meta or (not moves and there is not here)  # to_empty, say: memory that was never written
        if moves or others:  # else tensors stay where they are: a CUDA graph may read them
            self.unpack()
        super()._apply(fn, recurse)
        if self.dense is not None:  # of the same values, maybe elsewhere: share_memory
            self._expanded = _source(self.weight, self.weight_mask)
        if others:
            self.checked = False
            if not self.weight.is_meta:
                with contextlib.suppress(ValueError):
                    self.validate()
        self.pack()
        return self

    def _save_to_state_dict(self, destination: dict, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.packed:  # a tensor of its own: safetensors refuses views into a larger one
            destination[f"{prefix}weight"] = self._values().clone()

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args: Any) -> None:
        if f"{prefix}weight" not in state_dict or f"{prefix}weight_mask" not in state_dict:  # adapters alone, say
            return super()._load_from_state_dict(state_dict, prefix, *args)
        self.unpack()
        self.checked = False
        errors = args[-1]
        before = len(errors)
        super()._load_from_state_dict(state_dict, prefix, *args)
        if len(errors) == before and not self.weight.is_meta:
            self.validate()
            self.pack()
        return None

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, pattern='{self.pattern}'"


def _source(*tensors: Any) -> tuple | None:
    """What these are, to see whether they are others later: where they lie, and how often they were written to."""
    try:
        return tuple((tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version) for tensor in tensors)
    except RuntimeError:  # inside of a transform
        return None
