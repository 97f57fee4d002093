"""The only room that asks what a device can do. Importing it gives `core.sweep_block` its CUDA kernel."""

from . import linear, sweep


__all__ = ["linear", "sweep"]
