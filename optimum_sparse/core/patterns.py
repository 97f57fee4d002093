"""Which weights may stay: sparsity patterns, and the one function that turns scores into an exact mask.

A mask is always called `keep` (True = the weight stays). `N:M` means N *kept* of every M consecutive input columns of
one row. A pattern fixes the number of kept weights of a matrix exactly, so that a checkpoint's shapes follow from the
config alone.
"""

import re
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Unstructured:
    """Any weight may go; `sparsity` is the share in [0, 1) that does."""

    sparsity: float

    def __post_init__(self) -> None:
        if isinstance(self.sparsity, bool) or not isinstance(self.sparsity, int | float) or not 0 <= self.sparsity < 1:
            raise ValueError(f"sparsity={self.sparsity!r}: must be a number in [0, 1); use 0.5 to remove half.")

    def __str__(self) -> str:
        return f"unstructured {self.sparsity:g}"

    def kept(self, weights: int) -> int:
        """How many of `weights` weights stay."""
        return weights - round(self.sparsity * weights)


@dataclass(frozen=True)
class NM:
    """`kept` of every `group` consecutive input columns of a row stay: "2:4" is NM(2, 4)."""

    kept: int
    group: int

    def __post_init__(self) -> None:
        if not 0 < self.kept < self.group:
            raise ValueError(f"pattern '{self}': N:M keeps N of every M weights, so 0 < N < M must hold, as in '2:4'.")

    def __str__(self) -> str:
        return f"{self.kept}:{self.group}"

    @property
    def sparsity(self) -> float:
        return 1 - self.kept / self.group

    def check_width(self, in_features: int) -> None:
        """Raise ValueError unless every row of `in_features` columns splits into whole groups."""
        if in_features % self.group:
            raise ValueError(
                f"pattern {self} needs a number of input columns that {self.group} divides, got {in_features}."
            )


Pattern = Unstructured | NM

# Those that are looked for in matrices of unknown origin, sparsest first.
KNOWN = (NM(1, 4), NM(1, 2), NM(2, 4), NM(4, 8), NM(8, 16), NM(16, 32))


def parse_pattern(text: str, sparsity: float | None = None) -> Pattern:
    """`"2:4"` -> NM(2, 4); `"unstructured"` with a sparsity -> Unstructured(sparsity)."""
    if text == "unstructured":
        return Unstructured(0.5 if sparsity is None else sparsity)
    match = re.fullmatch(r"([0-9]{1,4}):([0-9]{1,4})", text) if isinstance(text, str) else None
    if match is None:
        raise ValueError(f"pattern={text!r}: must be 'unstructured' or 'N:M' with N kept of every M, such as '2:4'.")
    pattern = NM(int(match[1]), int(match[2]))
    if sparsity is not None and abs(Unstructured(sparsity).sparsity - pattern.sparsity) > 1e-6:
        raise ValueError(
            f"sparsity={sparsity!r} contradicts pattern='{pattern}', which removes {pattern.sparsity:g}: leave it "
            "out, or choose pattern='unstructured'."
        )
    return pattern


def keep_top(score: Tensor, kept: int | Tensor) -> Tensor:
    """The `kept` highest scores of every row, exactly that many; ties go to the lower index.

    Args:
        score: [..., n], finite.
        kept: one number for all rows, or an integer tensor [..., 1] with a number for each.

    Returns:
        bool [..., n].
    """
    n = score.shape[-1]
    if isinstance(kept, int):
        if kept == 0 or kept == n:
            return torch.full(score.shape, kept == n, dtype=torch.bool, device=score.device)
        if n <= 8 and score.numel() > 2**16:  # of fewer, the calls take longer
            return _keep_top_of_few(score, kept)
        if score.device.type == "cuda" and n <= 32:
            return _keep_top_by_rank(score, kept)
        if score.device.type == "cpu":  # quickselect: ten times faster than a sort here; on CUDA it is 30 times slower
            threshold = score.kthvalue(n - kept + 1, dim=-1, keepdim=True).values
            keep = score >= threshold
            if int(keep.count_nonzero()) * n == kept * score.numel():  # nothing ties with the last that stays
                return keep
            above = score > threshold
            level = keep & ~above
            return above | (level & (level.cumsum(-1) <= kept - above.sum(-1, keepdim=True)))
    best = score.sort(dim=-1, descending=True, stable=True).indices
    if isinstance(kept, int):
        return torch.zeros_like(score, dtype=torch.bool).scatter_(-1, best[..., :kept], True)
    keep = torch.empty(score.shape, dtype=torch.bool, device=score.device)
    return keep.scatter_(-1, best, (torch.arange(n, device=score.device) < kept).expand_as(best))


def _keep_top_by_rank(score: Tensor, kept: int, chunk: int = 2**27) -> Tensor:
    """`keep_top` for short rows, by comparing all pairs: on CUDA ten times faster than sorting each row."""
    n = score.shape[-1]
    rows = score.reshape(-1, n)
    earlier = torch.ones(n, n, dtype=torch.bool, device=score.device).tril(-1)  # [mine, other]
    parts = []
    for part in rows.split(max(1, chunk // n**2)):
        mine, other = part[:, :, None], part[:, None, :]
        parts.append(((other > mine) | ((other == mine) & earlier)).sum(-1) < kept)
    return torch.cat(parts).view(score.shape)


def _keep_top_of_few(score: Tensor, kept: int) -> Tensor:
    """`keep_top` for very many rows of a few scores, by comparing pair after pair of columns: on a CPU five times
    faster than quickselect, on CUDA three times faster than all pairs at once."""
    chunk = 2**16 if score.device.type == "cpu" else 2**27  # that a cache holds, or that memory does
    rows = score.reshape(-1, score.shape[-1])
    keep = torch.empty_like(rows, dtype=torch.bool)
    for part, found in zip(rows.split(chunk), keep.split(chunk), strict=True):
        elements = [element.contiguous() for element in part.unbind(-1)]
        for place, mine in enumerate(elements):
            rank = torch.zeros_like(mine, dtype=torch.int8)
            for other_place, other in enumerate(elements):
                if other_place != place:
                    above = other >= mine if other_place < place else other > mine
                    rank += above.view(torch.int8)  # a sum of two types takes three times as long
            found[:, place] = rank < kept
    return keep.view(score.shape)


def keep_mask(score: Tensor, pattern: Pattern) -> Tensor:
    """The mask that keeps the best scores under a pattern: compared over the whole matrix when unstructured.

    Args:
        score: [out, in], higher is better.

    Returns:
        bool [out, in].
    """
    if isinstance(pattern, NM):
        pattern.check_width(score.shape[1])
        return keep_top(score.reshape(-1, pattern.group), pattern.kept).reshape(score.shape)
    return keep_top(score.reshape(1, -1), pattern.kept(score.numel())).reshape(score.shape)


def violation(weight: Tensor, pattern: Pattern) -> str | None:
    """What is wrong with `weight` [out, in] under `pattern`, or None: it may hold fewer non-zeros, never more."""
    nonzero = weight != 0
    if isinstance(pattern, NM):
        pattern.check_width(weight.shape[1])
        most = int(nonzero.reshape(-1, pattern.group).sum(-1, dtype=torch.int16).max())
        problem = None if most <= pattern.kept else f"a group of {pattern.group} weights has {most} non-zeros"
    else:
        count, kept = int(nonzero.count_nonzero()), pattern.kept(weight.numel())
        problem = None if count <= kept else f"{count} of its {weight.numel()} weights are not zero, {kept} may be"
    return "it holds NaN" if problem is not None and bool(weight.isnan().any()) else problem


def patterns_of(weight: Tensor) -> list[NM]:
    """Those of `KNOWN` that a matrix [out, in] follows."""
    share = int(weight.count_nonzero()) / weight.numel()
    found: list[NM] = []
    for pattern in KNOWN:
        if weight.shape[1] % pattern.group or share > pattern.kept / pattern.group:
            continue
        implied = any(
            pattern.group % f.group == 0 and pattern.group // f.group * f.kept <= pattern.kept for f in found
        )
        # Most matrices that do not follow it show that in the first row.
        if implied or (violation(weight[:1], pattern) is None and violation(weight, pattern) is None):
            found.append(pattern)
    return found


def exactly(weight: Tensor) -> Unstructured:
    """The unstructured sparsity of a matrix [out, in] with no room for more non-zeros than it has (or one)."""
    return Unstructured(min(1 - int(weight.count_nonzero()) / weight.numel(), 1 - 1 / weight.numel()))
