"""Prune, measure what it cost, and share the result on the Hub with a model card that says all of it.

python examples/share.py MODEL ORG/NAME      (after `hf auth login`)
"""

import sys

from transformers import AutoModelForCausalLM

from optimum_sparse import Measurement, Pruner, SparsityConfig
from optimum_sparse.evaluation import perplexity


def main(
    model: str,
    repo_id: str,
    dataset: str = "c4",
    held_out: str = "wikitext2",
    samples: int = 128,
    tokens: int = 2048,
) -> None:
    pruner = Pruner.from_pretrained(model)
    dense = perplexity(pruner.model, pruner.tokenizer, held_out, window=tokens)
    config = SparsityConfig(pattern="2:4", dataset=dataset, num_samples=samples, sequence_length=tokens)
    sparse = perplexity(pruner.prune(config), pruner.tokenizer, held_out, window=tokens)
    pruner.report.measured(
        Measurement("perplexity", held_out, sparse.perplexity, sparse.standard_error, dense.perplexity)
    )
    print(pruner.push_to_hub(repo_id).repo_url)  # weights, tokenizer, report and card, in one commit

    # What anyone can do now. In a process of their own they `import optimum_sparse` first.
    again = AutoModelForCausalLM.from_pretrained(repo_id)
    print(again.hf_quantizer.report)


if __name__ == "__main__":
    main(*sys.argv[1:3])
