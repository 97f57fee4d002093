"""Seconds from a loaded model to a pruned one, and the memory beside the model. Run by hand; prints a table.

    python tests/benchmarks/prune.py
    python tests/benchmarks/prune.py --layers 2 --hidden 64 --intermediate 172 --heads 4 --samples 4 --tokens 32
    torchrun --nproc-per-node 1 tests/benchmarks/prune.py --compare masks && \
    torchrun --nproc-per-node 2 tests/benchmarks/prune.py --compare masks

A Llama with random weights, by default of LLaMA-2-7B's shape, and random tokens: speed does not depend on either. Each
run starts from a new model. On CUDA each is made once before on a model of one block, to warm up. The first row, two
forward passes of the dense model and nothing else, is what a method that looks at inputs and hands them on comes near.
"""

import argparse
import gc
import time
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from accelerate import PartialState
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

import optimum_sparse
from optimum_sparse import Pruner, SparsityConfig
from optimum_sparse.formats import bitmask


PATTERNS = {"2:4": "2:4", "50%": "unstructured"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", default=["magnitude", "wanda", "sparsegpt"])
    parser.add_argument("--patterns", nargs="+", default=list(PATTERNS), choices=list(PATTERNS))
    parser.add_argument("--layers", type=int, default=32)
    add_sizes(parser)
    parser.add_argument("--compare", type=Path, help="folder: the first run writes its masks there, others compare")
    args = parser.parse_args()
    cuda = args.device == "cuda"
    state = PartialState(cpu=not cuda)
    args.device, args.processes = state.device, state.num_processes
    on = torch.cuda.get_device_name() if cuda else f"{torch.get_num_threads()} CPU threads"
    show = print if state.is_main_process else lambda *args, **kwargs: None
    show(
        f"Llama {args.layers} x {args.hidden} x {args.intermediate}, {args.samples} x {args.tokens} tokens, "
        f"{args.dtype}, {args.processes} x {on}, torch {torch.__version__}, transformers {transformers.__version__}, "
        f"optimum-sparse {optimum_sparse.__version__}"
    )
    show("| method | pattern | seconds | phases, s | peak GPU memory beyond the model, GB | beside the first run |")
    show("|---|---|---|---|---|---|")
    if cuda:  # kernels are compiled and libraries loaded at their first use
        for method in args.methods:
            for pattern in args.patterns:
                prune(random_llama(args, layers=1), args, method, pattern, args.processes)
    model = random_llama(args, args.layers)
    data = random_batches(args, model, args.samples)
    seconds, peak = measured(lambda: forward_twice(model, data), args)
    show(f"| forward pass, twice | - | {seconds:.1f} | - | {gigabytes(peak, args)} | - |", flush=True)
    for method in args.methods:
        for pattern in args.patterns:
            model = random_llama(args, args.layers)
            state.wait_for_everyone()
            row = prune(model, args, method, pattern, args.samples)
            if args.compare and state.is_main_process:
                row += f" {beside_first(model, args.compare / f'{method} {pattern}.pt')} |"
            show(row, flush=True)
            state.wait_for_everyone()
    state.destroy_process_group()


def add_sizes(parser: argparse.ArgumentParser) -> None:
    """Of the model and its data."""
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--intermediate", type=int, default=11008)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=2048, help="of a sample")
    parser.add_argument("--batch", type=int, default=8, help="samples that go through a block together")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cuda", "cpu"])


def random_llama(args: argparse.Namespace, layers: int) -> PreTrainedModel:
    config = LlamaConfig(
        num_hidden_layers=layers,
        hidden_size=args.hidden,
        intermediate_size=args.intermediate,
        num_attention_heads=args.heads,
        max_position_embeddings=max(4096, args.tokens),
    )
    torch.manual_seed(0)
    with torch.device(args.device):
        return AutoModelForCausalLM.from_config(config, dtype=getattr(torch, args.dtype)).eval()


def random_batches(args: argparse.Namespace, model: PreTrainedModel, samples: int, seed: int = 1) -> DataLoader:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(model.config.vocab_size, (samples, args.tokens), generator=generator)
    return DataLoader([{"input_ids": part} for part in ids.split(args.batch)], batch_size=None)


def measured(run: Callable[[], object], args: argparse.Namespace) -> tuple[float, int]:
    """Seconds, and bytes of the device beyond what was taken before at their peak."""
    cuda = args.device.type == "cuda"
    gc.collect()
    before = 0
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
    started = time.perf_counter()
    run()
    if cuda:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - started
    return seconds, torch.cuda.max_memory_allocated() - before if cuda else 0


def gigabytes(peak: int, args: argparse.Namespace) -> str:
    return f"{peak / 1e9:.1f}" if args.device.type == "cuda" else "-"


@torch.no_grad()
def forward_twice(model: PreTrainedModel, data: DataLoader) -> None:
    """The decoder blocks on all samples, of each process all of them."""
    for batch in (*data, *data):
        model.model(batch["input_ids"].to(model.device), use_cache=False)


def prune(model: PreTrainedModel, args: argparse.Namespace, method: str, pattern: str, samples: int) -> str:
    """One row of the table."""
    config = SparsityConfig.recipe("paper", PATTERNS[pattern], method=method)
    data = random_batches(args, model, samples)
    pruner = Pruner(model)
    seconds, peak = measured(lambda: pruner.prune(config, dataset=data), args)
    phases = ", ".join(f"{name} {taken:.1f}" for name, taken in pruner.report.seconds.items())
    return f"| {method} | {pattern} | {seconds:.1f} | {phases} | {gigabytes(peak, args)} |"


def beside_first(model: PreTrainedModel, file: Path) -> str:
    """How far the pruned weights are those of the run that wrote `file`, written if it is not there."""
    pruned = [module.weight.detach() for module in model.model.modules() if isinstance(module, torch.nn.Linear)]
    found = [(bitmask.pack_bits(weight != 0).cpu(), weight.float().norm().item()) for weight in pruned]
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.save(found, file)
        return "it is the first"
    first = torch.load(file)
    different = sum(
        int(bitmask.unpack_bits(mask ^ other, mask.shape[1] * 8).sum())
        for (mask, _), (other, _) in zip(found, first, strict=True)
    )
    norms = max(abs(norm / other - 1) for (_, norm), (_, other) in zip(found, first, strict=True))
    total = sum(weight.numel() for weight in pruned)
    return f"masks agree on {1 - different / total:.4%}, norms to {norms:.1e}"


if __name__ == "__main__":
    main()
