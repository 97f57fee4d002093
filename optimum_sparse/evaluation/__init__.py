"""What pruning cost, and what it brought: measured."""

from .perplexity import Perplexity, perplexity
from .speed import Speed, measure_speed
from .tasks import TaskScore, score_tasks


__all__ = ["Perplexity", "Speed", "TaskScore", "measure_speed", "perplexity", "score_tasks"]
