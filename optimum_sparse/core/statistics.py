"""What a method learns of a linear layer's inputs: streaming means of x x^T or of its diagonal, in fp32.

Activations are not kept, but for a bounded sample where no Gram matrix can give a layer's output error. All means are
per token, over non-padding tokens.
"""

from enum import IntEnum

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
        shape = (in_features, in_features) if needs is Needs.GRAM else (in_features,)
        self._sum = torch.zeros(shape, dtype=torch.float32, device=device)
        self._gram: Tensor | None = None
        self._factors: dict[float, Tensor] = {}
        self._sample: list[Tensor] = []

    def update(self, x: Tensor) -> None:
        """Add the tokens x [tokens, in]."""
        if self.needs is not Needs.GRAM and self.tokens < SAMPLE_TOKENS:
            self._sample.append(x[: SAMPLE_TOKENS - self.tokens].clone())
        self.tokens += x.shape[0]
        self._gram = None
        self._factors.clear()
        if self.needs is Needs.GRAM:
            _add_gram_upper(self._sum, x)
        else:
            self._sum += x.float().square().sum(0)

    @property
    def gram(self) -> Tensor:
        """Mean of x x^T: fp32 [in, in]. Only for Needs.GRAM."""
        if self._gram is None:
            self._gram = self._sum.triu().div_(self.tokens)
            self._gram += self._gram.triu(1).T
        return self._gram

    @property
    def mean_square(self) -> Tensor:
        """Mean of x_j^2: fp32 [in]."""
        return (self._sum.diagonal() if self.needs is Needs.GRAM else self._sum) / self.tokens

    def inverse_factor(self, damping: float) -> Tensor:
        """`core.sweep.inverse_factor` of the Gram matrix, computed once for all layers that share this input."""
        if damping not in self._factors:
            self._factors[damping] = inverse_factor(self.gram, damping)
        return self._factors[damping]

    def relative_error(self, weight: Tensor, pruned: Tensor) -> float:
        """mean |(pruned - weight) x|^2 / mean |weight x|^2 for matrices [out, in].

        Over all tokens with Needs.GRAM; with less, over the first SAMPLE_TOKENS, since norms do not tell the outputs.
        """

        def power(matrix: Tensor) -> Tensor:
            if self.needs is Needs.GRAM:
                return ((matrix @ self.gram) * matrix).sum()
            return torch.stack([(x.float() @ matrix.T).square().sum() for x in self._sample]).sum()

        return (power(pruned - weight) / power(weight).clamp(min=torch.finfo(torch.float32).tiny)).item()


def _add_gram_upper(total: Tensor, x: Tensor) -> None:
    """total [in, in] += x^T x for x [tokens, in], tiles on and above the diagonal only: half of the work.

    Products of bf16/fp16 inputs are accumulated in fp32; a result rounded to bf16 would not do (its error does not
    average out over batches).
    """
    n = total.shape[0]
    tile = max(256, n // 8)
    if x.device.type != "cuda":
        x = x.float()
    for start in range(0, n, tile):
        left = x[:, start : start + tile].T
        right = x[:, start:]
        block = total[start : start + tile, start:]
        if x.dtype == torch.float32:
            block.addmm_(left, right)
        else:
            block += torch.mm(left, right, out_dtype=torch.float32)
