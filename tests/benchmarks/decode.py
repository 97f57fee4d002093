"""Tokens per second of a sparse checkpoint: dense in memory, and compressed. Run by hand; prints a table.

    python tests/benchmarks/decode.py CHECKPOINT --dtype bfloat16 --batch 1 4

Greedy generation with transformers' own `generate`; the two take turns. Prefill is timed by itself and taken off.
"""

import argparse
import statistics
import time

import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedModel

import optimum_sparse


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch", nargs="+", type=int, default=[1])
    parser.add_argument("--prompt", type=int, default=64, help="tokens")
    parser.add_argument("--generate", type=int, default=64, help="tokens")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    models = {
        name: AutoModelForCausalLM.from_pretrained(
            args.checkpoint, dtype=args.dtype, device_map=args.device, run_compressed=name == "compressed"
        )
        for name in ("dense", "compressed")
    }
    on = torch.cuda.get_device_name() if args.device.startswith("cuda") else f"{torch.get_num_threads()} CPU threads"
    print(
        f"{args.checkpoint}, {args.dtype}, {on}, torch {torch.__version__}, transformers {transformers.__version__}, "
        f"optimum-sparse {optimum_sparse.__version__}"
    )
    print("| batch | model | memory, MB | prefill, ms | ms per step | tokens/s | ratio | same greedy tokens |")
    print("|---|---|---|---|---|---|---|---|")
    for batch in args.batch:
        vocabulary = models["dense"].config.vocab_size
        prompt = torch.randint(vocabulary, (batch, args.prompt), generator=torch.Generator().manual_seed(0))
        prompt = prompt.to(args.device)
        times: dict[str, list[tuple[float, float]]] = {name: [] for name in models}
        texts = {}
        for turn in range(args.rounds + 1):
            for name, model in models.items():
                prefill, _ = generate(model, prompt, 1)
                seconds, texts[name] = generate(model, prompt, args.generate + 1)
                if turn:  # the first warms up
                    times[name].append((prefill, (seconds - prefill) / args.generate))
        same = (texts["dense"] == texts["compressed"])[:, args.prompt :].float().cumprod(1).sum(1).mean().item()
        steps = {name: statistics.median(step for _, step in found) for name, found in times.items()}
        for name, model in models.items():
            size = sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers())) / 1e6
            prefill = statistics.median(first for first, _ in times[name])
            print(
                f"| {batch} | {name} | {size:.0f} | {prefill * 1e3:.1f} | {steps[name] * 1e3:.2f} "
                f"| {batch / steps[name]:.1f} | {steps['dense'] / steps[name]:.2f} "
                f"| the first {same:.0f} of {args.generate + 1} |",
                flush=True,
            )


@torch.no_grad()
def generate(model: PreTrainedModel, prompt: torch.Tensor, tokens: int) -> tuple[float, torch.Tensor]:
    """Seconds, and the tokens."""
    started = time.perf_counter()
    text = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        do_sample=False,
        max_new_tokens=tokens,
        min_new_tokens=tokens,
        pad_token_id=0,
    )
    if prompt.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - started, text


if __name__ == "__main__":
    main()
