"""What methods and patterns cost on a real model: perplexity, layer error, seconds. Run by hand; prints a table.

    python tests/benchmarks/quality.py MODEL --calibration FILE --text wiki.test.raw --windows 20

MODEL is an id or folder. FILE holds token ids (`input_ids` [samples, tokens] in safetensors) or is anything that
SparsityConfig.dataset takes. The dense value comes first; log-gap is ln(perplexity / dense perplexity).
"""

import argparse
import math
import resource
import time

import torch
import transformers
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import optimum_sparse
from optimum_sparse import Pruner, SparsityConfig
from optimum_sparse.evaluation import perplexity


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--text", default="wikitext2")
    parser.add_argument("--methods", nargs="+", default=["magnitude", "wanda", "sparsegpt"])
    parser.add_argument("--patterns", nargs="+", default=["2:4", "4:8", "16:32", "0.5"], help="N:M, or a sparsity")
    parser.add_argument("--windows", type=int, help="only the first windows of 2048 tokens")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    data = load_file(args.calibration)["input_ids"] if args.calibration.endswith(".safetensors") else args.calibration
    text = load_file(args.text)["input_ids"] if args.text.endswith(".safetensors") else args.text
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    where = (
        torch.cuda.get_device_name() if args.device.startswith("cuda") else f"{torch.get_num_threads()} CPU threads"
    )
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    print(f"{args.model}, {args.dtype}, {args.samples} x {args.tokens} tokens, {where}, {versions}, "
          f"optimum-sparse {optimum_sparse.__version__}")  # fmt: skip

    def load() -> transformers.PreTrainedModel:
        return AutoModelForCausalLM.from_pretrained(args.model, dtype=args.dtype, device_map=args.device)

    def measure(model: transformers.PreTrainedModel) -> float:
        return perplexity(model, tokenizer, text, max_windows=args.windows).perplexity

    dense = measure(load())
    print("| method | pattern | perplexity | log-gap | mean layer error | pruning seconds | peak MB of the process |")
    print("|---|---|---|---|---|---|---|")
    print(f"| dense | | {dense:.2f} | 0 | | | |", flush=True)
    for pattern in args.patterns:
        what = {"pattern": pattern} if ":" in pattern else {"pattern": "unstructured", "sparsity": float(pattern)}
        for method in args.methods:
            config = SparsityConfig(
                method=method,
                dataset=data,
                num_samples=args.samples,
                sequence_length=args.tokens,
                batch_size=args.batch_size,
                **what,
            )
            pruner = Pruner.from_pretrained(load(), tokenizer)
            started = time.perf_counter()
            model = pruner.prune(config)
            taken = time.perf_counter() - started
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
            errors = [layer.error for layer in pruner.report.pruned if layer.error is not None]
            error = f"{sum(errors) / len(errors):.4f}" if errors else "-"
            value = measure(model)
            print(
                f"| {method} | {pattern} | {value:.2f} | {math.log(value / dense):.2f} | {error} | {taken:.1f} "
                f"| {peak:,} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
