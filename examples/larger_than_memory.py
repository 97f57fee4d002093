"""Prune a model that is larger than the memory: from disk to disk, one decoder block at a time.

python examples/larger_than_memory.py MODEL OUTPUT

Interrupt it whenever you like: the same command goes on where it was, and the result is the same to the bit.
"""

import sys
from pathlib import Path

from optimum_sparse import Pruner, SparsityConfig


def main(model: str, output: str, dataset: str = "c4", samples: int = 128, tokens: int = 2048) -> None:
    config = SparsityConfig(pattern="2:4", dataset=dataset, num_samples=samples, sequence_length=tokens)
    pruner = Pruner.from_pretrained(model, device_map="auto")  # nothing is loaded yet; "auto": a GPU computes, if any
    folder: Path = pruner.prune_to_disk(config, output, max_shard_size="5GB")
    print(pruner.report)
    for path in sorted(folder.iterdir()):
        print(f"{path.stat().st_size:15,} bytes  {path.name}")


if __name__ == "__main__":
    main(*sys.argv[1:3])
