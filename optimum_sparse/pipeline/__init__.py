"""The only loop over decoder blocks, and what it does in each."""

from .loop import Objective, prune_blocks
from .parts import (
    SMALLER,
    Arguments,
    Block,
    Calls,
    Linear,
    Sensitivity,
    Tensors,
    check_finite,
    is_out_of_memory,
    not_finite,
)
from .reconstruct import Reconstruction


__all__ = [
    "SMALLER",
    "Arguments",
    "Block",
    "Calls",
    "Linear",
    "Objective",
    "Reconstruction",
    "Sensitivity",
    "Tensors",
    "check_finite",
    "is_out_of_memory",
    "not_finite",
    "prune_blocks",
]
