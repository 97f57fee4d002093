"""Tokens per second of a sparse model: dense in memory, and compressed. Run by hand; prints a table.

    python tests/benchmarks/decode.py CHECKPOINT --dtype bfloat16 --batch 1 4
    python tests/benchmarks/decode.py random-7b --pattern 16:32 --prompt 512 --generate 128

`random-7b` is a Llama of LLaMA-2-7B's shape with random weights: its speed is the real one's, its text is not. Greedy
decoding, the two models take turns, prefill is timed by itself. On CUDA a static cache, and one CUDA graph per step,
for both; on the CPU transformers' own `generate`.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import transformers
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel, StaticCache

import optimum_sparse
from optimum_sparse.core import keep_mask, parse_pattern
from optimum_sparse.nn import SparseLinear


Generate = Callable[[Tensor, int], tuple[float, float, Tensor]]  # prompt, tokens -> prefill s, s per step, new tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="a sparse checkpoint, or random-7b")
    parser.add_argument("--pattern", default="2:4", help="of random-7b")
    parser.add_argument("--sparsity", type=float, help="of random-7b, if unstructured")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch", nargs="+", type=int, default=[1])
    parser.add_argument("--prompt", type=int, default=64, help="tokens")
    parser.add_argument("--generate", type=int, default=64, help="tokens")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--beside-dense", action="store_true", help='run_compressed="decode"')
    parser.add_argument("--compile", action="store_true", help="CUDA: torch.compile the step of both before its graph")
    args = parser.parse_args()
    if args.checkpoint == "random-7b":
        models = random_7b(args)
    else:
        models = {
            name: AutoModelForCausalLM.from_pretrained(
                args.checkpoint, dtype=args.dtype, device_map=args.device, run_compressed=run_compressed
            )
            for name, run_compressed in (("dense", False), ("compressed", "decode" if args.beside_dense else True))
        }
    cuda = args.device.startswith("cuda")
    on = torch.cuda.get_device_name() if cuda else f"{torch.get_num_threads()} CPU threads"
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
        runs = {name: (graphed(model, args.compile) if cuda else plain(model)) for name, model in models.items()}
        times: dict[str, list[tuple[float, float]]] = {name: [] for name in models}
        texts = {}
        for turn in range(args.rounds + 1):
            for name, run in runs.items():
                prefill, step, texts[name] = run(prompt, args.generate)
                if turn:  # the first warms up
                    times[name].append((prefill, step))
        same = (texts["dense"] == texts["compressed"]).float().cumprod(1).sum(1).mean().item()
        steps = {name: statistics.median(step for _, step in found) for name, found in times.items()}
        for name, model in models.items():
            storages = (tensor.untyped_storage() for tensor in (*model.parameters(), *model.buffers()))
            size = sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values()) / 1e6
            prefill = statistics.median(first for first, _ in times[name])
            print(
                f"| {batch} | {name} | {size:.0f} | {prefill * 1e3:.1f} | {steps[name] * 1e3:.2f} "
                f"| {batch / steps[name]:.0f} | {steps['dense'] / steps[name]:.2f} | {same:.0f} of {args.generate} |",
                flush=True,
            )


@torch.no_grad()
def random_7b(args: argparse.Namespace) -> dict[str, PreTrainedModel]:
    pattern = parse_pattern(args.pattern, args.sparsity)
    config = LlamaConfig(max_position_embeddings=4096)  # its other defaults are LLaMA-7B's
    dtype = getattr(torch, args.dtype)
    models = {}
    with torch.device(args.device):
        for name in ("dense", "compressed"):
            torch.manual_seed(0)
            models[name] = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    linears = [name for name, module in models["dense"].model.layers.named_modules() if isinstance(module, nn.Linear)]
    for name in tqdm(linears, desc="Compressing"):
        dense = models["dense"].model.layers.get_submodule(name)
        dense.weight.mul_(keep_mask(dense.weight.abs().float(), pattern))
        sparse = SparseLinear.from_dense(dense.weight, None, pattern, args.beside_dense)
        models["compressed"].model.layers.set_submodule(name, sparse)
    return models


@torch.no_grad()
def plain(model: PreTrainedModel) -> Generate:
    def generate(prompt: Tensor, count: int) -> tuple[float, float, Tensor]:
        taken = []
        for tokens in (1, count + 1):
            started = time.perf_counter()
            ids = model.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                min_new_tokens=tokens,
                max_new_tokens=tokens,
                do_sample=False,
                pad_token_id=0,
            )
            taken.append(time.perf_counter() - started)
        return taken[0], (taken[1] - taken[0]) / count, ids[:, prompt.shape[1] :][:, :count]

    return generate


def graphed(model: PreTrainedModel, compiled: bool) -> Generate:
    """A static cache, and one CUDA graph for a step, captured at the first call for a batch size and lengths."""
    state: dict = {}
    forward = torch.compile(model, dynamic=False) if compiled else model

    @torch.no_grad()
    def step(token: Tensor, cache: StaticCache) -> None:
        token.copy_(forward(token, past_key_values=cache).logits[:, -1:].argmax(-1))

    @torch.no_grad()
    def generate(prompt: Tensor, count: int) -> tuple[float, float, Tensor]:
        key = (*prompt.shape, count)
        if state.get("key") != key:
            cache = StaticCache(model.config, max_cache_len=prompt.shape[1] + count + 8)
            state.update(key=key, cache=cache, token=prompt[:, :1].clone(), graph=None)
        cache, token = state["cache"], state["token"]
        cache.reset()
        torch.cuda.synchronize()
        started = time.perf_counter()
        token.copy_(model(prompt, past_key_values=cache, logits_to_keep=1).logits[:, -1:].argmax(-1))
        torch.cuda.synchronize()
        prefill = time.perf_counter() - started
        if state["graph"] is None:
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(2):
                    step(token, cache)
            torch.cuda.current_stream().wait_stream(side)
            state["graph"] = torch.cuda.CUDAGraph()
            with torch.cuda.graph(state["graph"]):
                step(token, cache)
            return generate(prompt, count)
        texts = [token.clone()]
        torch.cuda.synchronize()
        started = time.perf_counter()
        for _ in range(count):
            state["graph"].replay()
            texts.append(token.clone())
        torch.cuda.synchronize()
        return prefill, (time.perf_counter() - started) / count, torch.cat(texts[:-1], 1)

    return generate


if __name__ == "__main__":
    main()
