"""What methods, patterns and recipes cost on a real model. Run by hand; prints a table.

    python tests/benchmarks/quality.py MODEL --c4 c4_train_1000.jsonl --text wiki.test.raw --lambada lambada.jsonl

MODEL is an id or folder. Every fourth document of the C4 file is held out, the others calibrate, shuffled by the
seed; --calibration takes token ids instead (`input_ids` [samples, tokens] in safetensors). LAMBADA is a file of
`context` and `continuation`: the share of last words that are the model's own greedy choice. The dense model comes
first; log-gap is ln(perplexity / dense perplexity) on --text. Evaluation multiplies as calibration does (bf16 where
the device can).

A row is one of ROWS, or NAME=JSON with fields of SparsityConfig: --rows sparsegpt 'mine={"method": "admm", ...}'.
"""

import argparse
import json
import math
import time
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import optimum_sparse
from optimum_sparse import Pruner, SparsityConfig
from optimum_sparse.evaluation import perplexity, score_tasks
from optimum_sparse.kernels.precision import fast_forward


ROWS = {
    "magnitude": ("paper", {"method": "magnitude"}),
    "wanda": ("paper", {"method": "wanda"}),
    "sparsegpt": ("paper", {"method": "sparsegpt"}),
    "rose": ("paper", {"method": "rose"}),
    "admm": ("paper", {"method": "admm"}),
    "fast": ("fast", {}),
    "best": ("best", {}),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--c4", help="documents: a .jsonl file with `text`")
    parser.add_argument("--calibration", help="token ids, in place of documents of --c4")
    parser.add_argument("--text", default="wikitext2")
    parser.add_argument("--lambada")
    parser.add_argument("--lambada-items", type=int, default=1000)
    parser.add_argument("--rows", nargs="+", default=list(ROWS))
    parser.add_argument("--patterns", nargs="+", default=["2:4", "4:8", "8:16", "16:32", "0.5", "0.6", "0.7"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--windows", type=int, help="only the first windows of 2048 tokens of each text")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    documents = [row["text"] for row in _rows(args.c4)]
    held_out = documents[::4]
    data = [text for number, text in enumerate(documents) if number % 4]
    if args.calibration:
        data = load_file(args.calibration)["input_ids"]

    def load() -> PreTrainedModel:
        return AutoModelForCausalLM.from_pretrained(args.model, dtype=args.dtype, device_map=args.device)

    def measure(model: PreTrainedModel) -> dict[str, float]:
        with fast_forward(torch.empty(0, dtype=model.dtype, device=args.device)):
            found = {
                "text": perplexity(model, tokenizer, args.text, max_windows=args.windows, batch_size=4).perplexity
            }
            if held_out:
                found["c4"] = perplexity(model, tokenizer, held_out, max_windows=args.windows, batch_size=4).perplexity
            if args.lambada:
                words = score_tasks(model, tokenizer, [args.lambada], max_items=args.lambada_items, batch_size=64)
                found["lambada"] = words[0].accuracy
        return found

    on = torch.cuda.get_device_name() if args.device.startswith("cuda") else f"{torch.get_num_threads()} CPU threads"
    print(
        f"{args.model}, {args.dtype}, {args.samples} x {args.tokens} tokens, {on}, torch {torch.__version__}, "
        f"transformers {transformers.__version__}, optimum-sparse {optimum_sparse.__version__}"
    )
    print("| row | pattern | seed | WikiText-2 | log-gap | C4 | LAMBADA | layer error | seconds | of which |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    dense = measure(load())
    print(f"| dense | | | {dense['text']:.2f} | 0 | {_cell(dense, 'c4', 2)} | {_cell(dense, 'lambada', 3)} | | | |")
    for pattern in args.patterns:
        what = {"pattern": pattern} if ":" in pattern else {"pattern": "unstructured", "sparsity": float(pattern)}
        for row in args.rows:
            name, _, given = row.partition("=")
            recipe, changes = ("paper", json.loads(given)) if given else ROWS[name]
            recipe = changes.pop("recipe", recipe)
            for seed in args.seeds:
                options = {
                    "num_samples": args.samples,
                    "sequence_length": args.tokens,
                    "seed": seed,
                    **what,
                    **changes,
                }
                pruner = Pruner.from_pretrained(load(), tokenizer)
                started = time.perf_counter()
                model = pruner.prune(SparsityConfig.recipe(recipe, dataset=data, **options))
                if args.device.startswith("cuda"):
                    torch.cuda.synchronize()
                taken = time.perf_counter() - started
                found = measure(model)
                pruned = pruner.report.pruned
                errors = [layer.error for layer in pruned if layer.error is not None]
                error = f"{sum(errors) / len(errors):.4f}" if errors else "-"
                fired = sum(layer.note.startswith("reordered") for layer in pruned)
                phases = ", ".join(f"{phase} {seconds:.1f}" for phase, seconds in pruner.report.seconds.items())
                gap = math.log(found["text"] / dense["text"])
                more = f"; {fired} layers reordered" if fired else ""
                cells = [name, pattern, seed, f"{found['text']:.2f}", f"{gap:.3f}", _cell(found, "c4", 2)]
                cells += [_cell(found, "lambada", 3), error, f"{taken:.1f}", phases + more]
                print("| " + " | ".join(map(str, cells)) + " |", flush=True)
                del model, pruner


def _rows(path: str | None) -> list[dict[str, str]]:
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()] if path else []


def _cell(found: dict[str, float], name: str, digits: int) -> str:
    return f"{found[name]:.{digits}f}" if name in found else ""


if __name__ == "__main__":
    main()
