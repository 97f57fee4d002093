"""Side by side with llm-compressor: seconds, memory and layer errors on the same model, tokens and settings.

    python tests/benchmarks/peer.py
    python tests/benchmarks/peer.py --blocks 2 --hidden 64 --intermediate 172 --heads 4 --samples 8 --tokens 32

Run by hand where llmcompressor is installed; prints two tables. A Llama with random weights, of the shape of
LLaMA-2-7B's blocks, and random tokens: speed does not depend on either. Each run is timed from a model on the device
to a pruned model, with one block and with --blocks; seconds per block are the difference. llm-compressor gets the same
batches, and leaves activations on the device between blocks, as we do (its default takes them to host memory).

Layer error is |(W' - W) x|^2 / |W x|^2 of a pruned W' for the dense model's inputs x on other tokens, averaged over
blocks: the same measure for both, on ground that neither was fitted to.
"""

import argparse
import importlib.metadata
import os
import tempfile
from collections.abc import Callable
from types import SimpleNamespace

import torch
import transformers
from prune import add_sizes, measured, random_batches, random_llama
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel

import optimum_sparse
from optimum_sparse import Pruner, SparsityConfig


DAMPING, COLUMNS = 0.01, 128  # of SparseGPT
Run = Callable[[PreTrainedModel, str, DataLoader, argparse.Namespace], None]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=3, help="two or more")
    parser.add_argument("--methods", nargs="+", default=["sparsegpt", "wanda"], choices=["sparsegpt", "wanda"])
    parser.add_argument("--pattern", default="2:4", help="N:M with half of the weights, or unstructured")
    add_sizes(parser)
    args = parser.parse_args()
    if args.blocks < 2:
        parser.error(f"--blocks {args.blocks}: must be 2 or more, to tell the time of a block from the rest.")
    try:
        peer = f"llm-compressor {importlib.metadata.version('llmcompressor')}"
    except importlib.metadata.PackageNotFoundError:
        raise SystemExit("llmcompressor is not installed here: pip install llmcompressor==0.14.0.1") from None
    args.device = torch.device(args.device)
    on = torch.cuda.get_device_name() if args.device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    print(
        f"Llama {args.blocks} x {args.hidden} x {args.intermediate}, {args.samples} x {args.tokens} tokens in batches "
        f"of {args.batch}, {args.pattern}, {args.dtype}, {on}, torch {torch.__version__}, transformers "
        f"{transformers.__version__}, optimum-sparse {optimum_sparse.__version__}, {peer}"
    )
    print("| | seconds, 1 block | seconds, all blocks | per block | ratio | peak GPU memory beyond the model, GB |")
    print("|---|---|---|---|---|---|")
    errors = {}
    for method in args.methods:
        per_block = 0.0
        for name, run in {"ours": ours, peer: theirs}.items():
            timed(run, random_llama(args, 1), method, args, args.batch)  # kernels compiled, libraries loaded
            one, _ = timed(run, random_llama(args, 1), method, args, args.samples)
            model = random_llama(args, args.blocks)
            whole, memory = timed(run, model, method, args, args.samples)
            before, per_block = per_block, (whole - one) / (args.blocks - 1)
            ratio = f"{per_block / before:.1f}" if before else "1"
            gigabytes = f"{memory / 1e9:.1f}" if args.device.type == "cuda" else "-"
            print(
                f"| {method}, {name} | {one:.2f} | {whole:.2f} | {per_block:.2f} | {ratio} | {gigabytes} |", flush=True
            )
            errors[f"{method}, {name}"] = layer_errors(model, args)
            del model
    kinds = list(next(iter(errors.values())))
    print(f"\n| layer error | {' | '.join(kinds)} |")
    print("|---" * (len(kinds) + 1) + "|")
    for name, found in errors.items():
        print(f"| {name} | {' | '.join(f'{found[kind]:.4f}' for kind in kinds)} |")


def ours(model: PreTrainedModel, method: str, data: DataLoader, args: argparse.Namespace) -> None:
    options = {"damping": DAMPING, "block_size": COLUMNS} if method == "sparsegpt" else {}
    Pruner(model).prune(SparsityConfig.recipe("paper", args.pattern, method=method, **options), dataset=data)


def theirs(model: PreTrainedModel, method: str, data: DataLoader, args: argparse.Namespace) -> None:
    os.environ.setdefault("LLM_COMPRESSOR_LOG_LEVEL", "ERROR")  # or its log is between the rows
    from llmcompressor import oneshot
    from llmcompressor.modifiers.pruning import SparseGPTModifier, WandaPruningModifier

    options = {
        "sparsity": 0.5,
        "mask_structure": "0:0" if args.pattern == "unstructured" else args.pattern,
        "ignore": ["re:.*lm_head"],
    }
    if method == "sparsegpt":
        modifier = SparseGPTModifier(block_size=COLUMNS, dampening_frac=DAMPING, **options)
    else:
        modifier = WandaPruningModifier(**options)
    with tempfile.TemporaryDirectory() as folder:  # it reads the model's config again
        model.config.save_pretrained(folder)
        model.config.name_or_path = folder
        oneshot(
            model=model,
            recipe=[modifier],
            dataset=data,
            num_calibration_samples=len(data),
            processor=SimpleNamespace(),  # without one it would look for a tokenizer beside the config
            sequential_offload_device=str(args.device),
        )


def timed(run: Run, model: PreTrainedModel, method: str, args: argparse.Namespace, samples: int) -> tuple[float, int]:
    data = random_batches(args, model, samples)
    return measured(lambda: run(model, method, data, args), args)


@torch.no_grad()
def layer_errors(pruned: PreTrainedModel, args: argparse.Namespace) -> dict[str, float]:
    """By the kind of linear ("q_proj"), its error, averaged over blocks."""
    dense = random_llama(args, args.blocks)
    errors: dict[str, list[float]] = {}

    def measure(name: str, module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        weight = pruned.get_submodule(name).weight
        assert abs((weight == 0).float().mean() - 0.5) < 0.01, f"{name} is not pruned to {args.pattern}"
        x = inputs[0].float().flatten(0, 1)
        change = x @ (weight.float() - module.weight.float()).T
        error = change.square().sum() / (x @ module.weight.float().T).square().sum()
        errors.setdefault(name.rpartition(".")[2], []).append(error.item())

    for name, module in dense.named_modules():
        if isinstance(module, nn.Linear) and module is not dense.get_output_embeddings():
            module.register_forward_hook(lambda *call, name=name: measure(name, *call))
    batch = next(iter(random_batches(args, dense, args.batch, seed=2)))
    dense(batch["input_ids"].to(args.device), use_cache=False)
    return {kind: sum(found) / len(found) for kind, found in errors.items()}


if __name__ == "__main__":
    main()
