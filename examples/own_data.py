"""Calibrate on data of your own: what the model will be used for is what it should stay good at.

python examples/own_data.py MODEL DOCUMENTS OUTPUT

DOCUMENTS is a text file with blank lines between documents. Whatever goes through `dataset=` as a list of texts, or as
the name of a .txt, .jsonl or .parquet file, is packed into sequences without gaps, as pretraining data is. Here each
document stays by itself and is padded, as conversations are; padding is masked, and counts for nothing.
"""

import sys
from pathlib import Path

from torch.utils.data import DataLoader

from optimum_sparse import Pruner, SparsityConfig


def main(model: str, documents: str, output: str, samples: int = 128, tokens: int = 2048) -> None:
    pruner = Pruner.from_pretrained(model)
    if pruner.tokenizer.pad_token is None:  # Llama and GPT-2 have none; what it is does not matter, since it is masked
        pruner.tokenizer.pad_token = pruner.tokenizer.eos_token
    texts = Path(documents).read_text(encoding="utf-8").split("\n\n")  # or: tokenizer.apply_chat_template(...)

    def padded(batch: list[str]) -> dict:
        """input_ids and attention_mask, both [documents, tokens]."""
        return pruner.tokenizer(batch, padding=True, truncation=True, max_length=tokens, return_tensors="pt")

    loader = DataLoader(texts[:samples], batch_size=8, collate_fn=padded)
    sparse = pruner.prune(SparsityConfig(pattern="2:4"), dataset=loader)
    sparse.save_pretrained(output)
    pruner.tokenizer.save_pretrained(output)
    print(pruner.report)


if __name__ == "__main__":
    main(*sys.argv[1:4])
