"""Small modules in place of decoder blocks, and what the loop calls them with. They treat every token alone."""

import torch
from helpers import ar_inputs
from torch import Tensor, nn

from optimum_sparse.core import NM, InputStats, Needs, Pattern, Solved, keep_mask
from optimum_sparse.pipeline import Block, Calls, Linear, Sensitivity


NM24 = NM(2, 4)
WIDTH = 16


class Attention(nn.Module):
    """Three linears that share their input, one that does not."""

    def __init__(self, width: int = WIDTH, seed: int = 0):
        super().__init__()
        torch.manual_seed(seed)
        self.q, self.k, self.v, self.o = (nn.Linear(width, width, bias=False) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.o(torch.tanh(self.q(x) * self.k(x)) + self.v(x))


class Decoder(nn.Module):
    """Both halves of a decoder block, with norms and biases: o and down write to the residual stream."""

    def __init__(self, width: int = WIDTH, inner: int = 24, seed: int = 0):
        super().__init__()
        torch.manual_seed(seed)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q, self.v, self.o = (nn.Linear(width, width) for _ in range(3))
        self.up, self.down = nn.Linear(width, inner), nn.Linear(inner, width)
        for linear in (self.q, self.v, self.o, self.up, self.down):
            nn.init.normal_(linear.weight, std=1.5 * linear.in_features**-0.5)
        for norm in (self.norm1, self.norm2):
            nn.init.normal_(norm.bias, std=0.1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        x = x + self.o(torch.sigmoid(self.q(y)) * self.v(y))
        return x + self.down(torch.relu(self.up(self.norm2(x))))

    def seen(self, x: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        """By hand: of each linear its input, and (of o and down) what its output is added to."""
        y = self.norm1(x)
        z = torch.sigmoid(self.q(y)) * self.v(y)
        h = x + self.o(z)
        n = self.norm2(h)
        return {"q": (y, x), "v": (y, x), "o": (z, x), "up": (n, h), "down": (torch.relu(self.up(n)), h)}


class Spy:
    """A method that prunes by magnitude and remembers what it was given."""

    def __init__(self, needs: Needs = Needs.GRAM):
        self.needs = needs
        self.weights: list[Tensor] = []
        self.stats: list[InputStats] = []

    def solve(self, weight: Tensor, stats: InputStats, pattern: Pattern) -> Solved:
        self.weights.append(weight.clone())
        self.stats.append(stats)
        keep = keep_mask(weight.abs(), pattern)
        return Solved(weight * keep, keep)


def block_of(module: nn.Module, name: str = "block", pattern: Pattern = NM24) -> Block:
    linears = [
        Linear(f"{name}.{local}", child, pattern)
        for local, child in module.named_modules()
        if isinstance(child, nn.Linear)
    ]
    return Block(name, module, linears)


def blocks_of(modules: list[nn.Module], pattern: Pattern = NM24) -> list[Block]:
    return [block_of(module, f"blocks.{index}", pattern) for index, module in enumerate(modules)]


def calls_of(batches: list[Tensor], blocks: int = 1, keep: list[Tensor | None] | None = None) -> Calls:
    return Calls(list(batches), [[((), {}) for _ in batches] for _ in range(blocks)], keep or [])


def tokens_of(batches: int = 2, sequences: int = 3, tokens: int = 20, width: int = WIDTH) -> list[Tensor]:
    return list(ar_inputs(batches * sequences * tokens, width).reshape(batches, sequences, tokens, width))


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def felt_by(blocks: list[Block], batches: list[Tensor], seed: int = 0) -> Sensitivity:
    """Random, with heavy tails: tokens differ by orders of magnitude, and some go beyond what is allowed to them."""
    parts = [part for block in blocks for part in (block, *block.linears)]
    return Sensitivity(
        {
            part.name: [
                (4 * normal(x[..., 0].numel(), seed=seed + 100 * place + number)).exp()
                for number, x in enumerate(batches)
            ]
            for place, part in enumerate(parts)
        },
        {
            linear.name: (3 * normal(linear.shape[0], seed=seed + place)).exp()
            for place, linear in enumerate(linear for block in blocks for linear in block.linears)
        },
    )


class Conv1D(nn.Module):
    """A linear with its weight [in, out]."""

    def __init__(self, dense: Tensor):
        super().__init__()
        self.weight = nn.Parameter(dense.T.contiguous())

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight
