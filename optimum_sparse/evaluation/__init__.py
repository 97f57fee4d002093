"""What pruning cost, and what it brought: measured."""

from .perplexity import Perplexity, perplexity
from .speed import Speed, measure_speed


__all__ = ["Perplexity", "Speed", "measure_speed", "perplexity"]
