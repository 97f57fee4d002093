"""What a method learns of a linear layer's inputs: streaming means of x x^T or of its diagonal, in fp32.

Activations are not kept, but for a bounded sample where no Gram matrix can give a layer's output error. All means are
per token, over non-padding tokens.
"""

from collections.abc import Callable, Hashable
from enum import IntEnum
from typing import Any

import torch
from torch import Tensor

from .sweep import inverse_factor


SAMPLE_TOKENS = 2048


class Needs(IntEnum):
    """How much of the inputs a method must see; each level includes the one before."""

    NOTHING = 0
    DIAGONAL = 1  # mean of x_j^2 for every input column
    GRAM = 2  # mean of x x^T


class InputStats:
    """Streaming statistics of the inputs of one linear layer (or of several that share their input).

    Attributes:
        tokens: how many rows were seen.
    """

    def __init__(self, in_features: int, needs: Needs, device: torch.device | str = "cpu"):
        self.needs = needs
        self.tokens = 0
        self._weight: float | Tensor = 0.0
        shape = (in_features, in_features) if needs is Needs.GRAM else (in_features,)
        self._sum = torch.zeros(shape, dtype=torch.float32, device=device)
        self._cache: dict[Hashable, Any] = {}
        self._sample: list[Tensor] = []

    def update(self, x: Tensor, token_weight: Tensor | None = None) -> None:
        """Add the tokens x [tokens, in], each with its weight >= 0 (fp32 [tokens]; all 1 unless given)."""
        x = _at_most_fp32(x)
        if self.needs is not Needs.GRAM and self.tokens < SAMPLE_TOKENS:
            self._sample.append(x[: SAMPLE_TOKENS - self.tokens].clone())
        self.tokens += x.shape[0]
        self._weight += x.shape[0] if token_weight is None else token_weight.sum()
        self._cache.clear()
        if token_weight is not None:
            x = _scaled(x, token_weight.sqrt())
        if self.needs is Needs.GRAM:
            _add_gram_upper(self._sum, x)
        else:
            self._sum += _square_sums(x)

    def reduce(self, total: Callable[..., object], before: int) -> None:
        """Become the statistics of the tokens of several processes, which all call this.

        Args:
            total: adds up tensors over the processes, in place.
            before: how many tokens the processes before this one have seen, for the sample to be of the first.
        """
        tokens = torch.tensor(self.tokens, device=self._sum.device)
        weight = torch.as_tensor(self._weight, dtype=torch.float32, device=self._sum.device).clone()
        total(self._sum, tokens, weight)
        if self.needs is not Needs.GRAM:
            sample = self._sum.new_zeros(SAMPLE_TOKENS, len(self._sum))  # where nothing was seen, 0 adds no error
            own = torch.cat([sample[:0], *self._sample])[: max(SAMPLE_TOKENS - before, 0)]
            sample[before : before + len(own)] = own
            total(sample)
            self._sample = [sample]
        self.tokens, self._weight = int(tokens), weight
        self._cache.clear()

    def cached(self, key: Hashable, compute: Callable[[], Any]) -> Any:
        """`compute()`, once for all layers that share this input; forgotten at the next update."""
        if key not in self._cache:
            self._cache[key] = compute()
        return self._cache[key]

    @property
    def gram(self) -> Tensor:
        """Mean of x x^T: fp32 [in, in]. Only for Needs.GRAM."""

        def mirrored() -> Tensor:
            gram = self._sum.triu().div_(self._weight)
            return gram.add_(gram.triu(1).T)

        return self.cached("gram", mirrored)

    @property
    def mean_square(self) -> Tensor:
        """Mean of x_j^2: fp32 [in]."""
        return (self._sum.diagonal() if self.needs is Needs.GRAM else self._sum) / self._weight

    def inverse_factor(self, damping: float) -> Tensor:
        """`core.sweep.inverse_factor` of the Gram matrix, computed once for all layers that share this input."""
        return self.cached(("factor", damping), lambda: inverse_factor(self.gram, damping))

    def relative_error(self, weight: Tensor, pruned: Tensor) -> float:
        """mean |(pruned - weight) x|^2 / mean |weight x|^2 for matrices [out, in].

        Over all tokens with Needs.GRAM; with less, over the first SAMPLE_TOKENS, since norms do not tell the outputs.
        """

        def power(matrix: Tensor) -> Tensor:
            if self.needs is Needs.GRAM:
                return (_product(matrix, self.gram) * matrix).sum()
            return torch.stack([_product(x, matrix.T).square().sum() for x in self._sample]).sum()

        return (power(pruned - weight) / power(weight).clamp(min=torch.finfo(torch.float32).tiny)).item()


class CrossStats:
    """Streaming mean of y x^T over tokens, fp32 [outputs, inputs]."""

    def __init__(self, outputs: int, inputs: int, device: torch.device | str = "cpu"):
        self._sum = torch.zeros(outputs, inputs, dtype=torch.float32, device=device)
        self._weight: float | Tensor = 0.0

    def update(self, y: Tensor, x: Tensor, token_weight: Tensor | None = None) -> None:
        """Add the tokens y [tokens, outputs] and x [tokens, inputs], each with its weight as in InputStats."""
        x = _at_most_fp32(x)
        self._weight += x.shape[0] if token_weight is None else token_weight.sum()
        if token_weight is not None:
            y = _scaled(y, token_weight)
        _add_product(self._sum, y.to(x.dtype).T, x)

    def reduce(self, total: Callable[..., object]) -> None:
        """As InputStats.reduce."""
        self._weight = torch.as_tensor(self._weight, dtype=torch.float32, device=self._sum.device).clone()
        total(self._sum, self._weight)

    @property
    def mean(self) -> Tensor:
        return self._sum / self._weight


def _at_most_fp32(x: Tensor) -> Tensor:
    """CUDA has no products of float64 with sums in fp32."""
    return x.float() if x.dtype == torch.float64 else x


def _square_sums(x: Tensor) -> Tensor:
    """Sum of x_j^2 over the rows of x [tokens, in]: fp32 [in]."""
    if x.device.type == "cuda":  # reads x once, as it is; on the CPU it is slower than what follows, and less exact
        return torch.linalg.vector_norm(x, dim=0, dtype=torch.float32).square_()
    return x.float().square().sum(0)


def _product(left: Tensor, right: Tensor) -> Tensor:
    """left @ right to about five digits, fp32: of matrices in fp32, or the left one in less.

    On CUDA in bf16 with fp32 sums, ten times as fast: of each matrix a bf16 part and the bf16 part of what is left,
    and of the four products all but that of the small parts. Of a matrix that bf16 holds nothing is left.
    """
    if left.device.type != "cuda":
        return left.float() @ right
    rough_left, rough_right = left.bfloat16(), right.bfloat16()
    total = torch.mm(rough_left, rough_right, out_dtype=torch.float32)
    rest = right - rough_right
    if rest.any():
        _add_product(total, rough_left, rest.bfloat16())
    if left.dtype != torch.bfloat16:
        rest = left - rough_left
        if rest.any():
            _add_product(total, rest.bfloat16(), rough_right)
    return total


def _scaled(x: Tensor, factor: Tensor) -> Tensor:
    """Every row of x [tokens, n] times its factor [tokens], in x's dtype."""
    return (x * factor[:, None]).to(x.dtype)


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total [m, n] += left [m, k] @ right [k, n]; sums in fp32, whatever the inputs are.

    A result rounded to bf16 would not do: its error does not average out over batches.
    """
    if left.dtype == torch.float32:
        total.addmm_(left, right)
    elif total.device.type == "cuda":
        torch.addmm(total, left, right, out_dtype=torch.float32, out=total)  # addmm_ has no out_dtype
    else:
        total.addmm_(left.float(), right.float())


def _add_gram_upper(total: Tensor, x: Tensor) -> None:
    """total [in, in] += x^T x for x [tokens, in], tiles on and above the diagonal only: half of the work."""
    n = total.shape[0]
    tile = max(256, n // 8)
    if x.device.type != "cuda":
        x = x.float()
    for start in range(0, n, tile):
        _add_product(total[start : start + tile, start:], x[:, start : start + tile].T, x[:, start:])
