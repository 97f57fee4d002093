"""Serve a sparse checkpoint: by transformers from compressed weights, by anything else from a dense export.

python examples/serve.py CHECKPOINT OUTPUT
"""

import sys

from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

from optimum_sparse.hf.checkpoint import export_dense


def main(checkpoint: str, output: str, prompt: str = "The capital of France is") -> None:
    # transformers: weights stay compressed in memory, and are multiplied as they are. Fast at few tokens at a time.
    model = AutoModelForCausalLM.from_pretrained(checkpoint, run_compressed=True, device_map="auto")
    generate = pipeline("text-generation", model=model, tokenizer=AutoTokenizer.from_pretrained(checkpoint))
    print(generate(prompt, max_new_tokens=24, do_sample=False)[0]["generated_text"])

    # vLLM and others: an ordinary checkpoint, zeros in place. They load it, but neither save memory nor time by it.
    export_dense(checkpoint, output)
    print(f"vllm serve {output}")


if __name__ == "__main__":
    main(*sys.argv[1:3])
