"""Prune a model while it loads: one more argument of `from_pretrained`.

python examples/prune_on_load.py MODEL OUTPUT
"""

import sys

from transformers import AutoModelForCausalLM

from optimum_sparse import SparsityConfig  # importing the package teaches from_pretrained this argument


def main(model: str, output: str, dataset: str = "c4", samples: int = 128, tokens: int = 2048) -> None:
    config = SparsityConfig(
        method="wanda", pattern="2:4", dataset=dataset, num_samples=samples, sequence_length=tokens
    )
    sparse = AutoModelForCausalLM.from_pretrained(model, sparsity_config=config, device_map="auto")
    # An ordinary model from here on, with zeros in place: generate and save as with any other. To train it, mask the
    # gradients of the zeros (README, Limits), or they move, and what was pruned cannot be stored as such.
    print(sparse.hf_quantizer.report)
    sparse.save_pretrained(output)  # compressed, with sparsity_report.json and a model card


if __name__ == "__main__":
    main(*sys.argv[1:3])
