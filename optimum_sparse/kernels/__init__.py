"""The only room that asks what a device can do. Importing it gives `core.sweep_block` its CUDA kernel."""

from . import sweep


__all__ = ["sweep"]
