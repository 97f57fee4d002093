"""The only loop over decoder blocks, and what it does in each."""

from .loop import Objective, prune_blocks
from .parts import Block, Calls, Linear, Sensitivity, Tensors
from .reconstruct import Reconstruction


__all__ = ["Block", "Calls", "Linear", "Objective", "Reconstruction", "Sensitivity", "Tensors", "prune_blocks"]
