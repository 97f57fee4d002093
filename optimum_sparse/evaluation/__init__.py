"""What pruning cost: measured on the model itself."""

from .perplexity import Perplexity, perplexity


__all__ = ["Perplexity", "perplexity"]
