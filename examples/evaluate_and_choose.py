"""See what sparsity costs before choosing one: sweep, look, and save the sparsest model that is good enough.

python examples/evaluate_and_choose.py MODEL CALIBRATION_TEXT TEST_TEXT OUTPUT

The model is loaded once and pruned from its dense weights for every point. OUTPUT/sweep.json keeps what was measured:
the same command goes on after an interruption. Pictures need `pip install ".[plots]"`.
"""

import sys
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from optimum_sparse import Pruner, SparsityConfig
from optimum_sparse.evaluation import grid, perplexity, plot_sweep, sweep


ACCEPTED = 1.2  # times the dense perplexity


def main(model: str, text: str, test: str, output: str, samples: int = 128, tokens: int = 2048) -> None:
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype="auto", device_map="auto")
    tokenizer = AutoTokenizer.from_pretrained(model)

    def evaluate(pruned: PreTrainedModel) -> dict[str, float]:
        """What each point is judged by; the first number is what the table and the picture show."""
        return {"perplexity": perplexity(pruned, tokenizer, test, window=tokens, max_windows=20).perplexity}

    data = {"dataset": text, "num_samples": samples, "sequence_length": tokens}
    points = grid(["wanda", "sparsegpt"], sparsities=[0.3, 0.5], patterns=["2:4", "16:32"], **data)
    result = sweep(loaded, points, evaluate, output, tokenizer=tokenizer, settings={"text": test, "window": tokens})
    print(result)
    plot_sweep(result, Path(output) / "sweep.png")

    most = ACCEPTED * result.dense["perplexity"]
    good = [point for point in result.points if point.measured["perplexity"] <= most]
    if not good:
        raise SystemExit(f"no point stays below a perplexity of {most:.4g}: try lower sparsities, or recipe('fast').")
    best = max(good, key=lambda point: (round(point.sparsity, 3), -point.measured["perplexity"]))
    print(f"chosen: {best.label}, {best.pattern}")
    pruned = Pruner.from_pretrained(loaded, tokenizer=tokenizer).prune(SparsityConfig.from_dict(best.recipe))
    pruned.save_pretrained(Path(output) / "sparse")
    tokenizer.save_pretrained(Path(output) / "sparse")


if __name__ == "__main__":
    main(*sys.argv[1:5])
