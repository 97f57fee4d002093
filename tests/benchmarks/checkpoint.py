"""From disk to disk: peak memory by depth, and seconds to save and load, compressed beside dense. Run by hand.

    python tests/benchmarks/checkpoint.py FOLDER
    python tests/benchmarks/checkpoint.py FOLDER --hidden 64 --intermediate 128 --blocks 2 4 --samples 2 --tokens 32

Writes Llamas of LLaMA-2-7B's blocks with random bf16 weights (the same in every block) to FOLDER, which needs 1.6
times the bytes of the largest (22 GB for 32 blocks), and prunes each in a process of its own by `python -m
optimum_sparse prune`; what it has written it removes. The peak is what the kernel counts for that process, pages of
mapped files included. Save and load are of the first depth. "cold" is after the files were dropped from the page
cache, "warm" after they were read; "to the disk" includes fsync. "and read" adds one look at every weight, since a
dense load that maps the file may have read nothing yet.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel, PreTrainedTokenizerFast

import optimum_sparse


WORDS = [f"w{number}" for number in range(1000)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--blocks", type=int, nargs="+", default=[8, 16, 32])
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--intermediate", type=int, default=11008)
    parser.add_argument("--methods", nargs="+", default=["magnitude", "sparsegpt"])
    parser.add_argument("--pattern", default="2:4")
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--device-map", default="cpu")
    parser.add_argument(
        "--peak-only", action="store_true", help="do not save and load, which needs the model in memory"
    )
    args = parser.parse_args()
    print(
        f"Llama N x {args.hidden} x {args.intermediate}, bf16, {args.pattern}, {args.samples} x {args.tokens} tokens, "
        f"{args.device_map}, {torch.get_num_threads()} CPU threads, torch {torch.__version__}, transformers "
        f"{transformers.__version__}, optimum-sparse {optimum_sparse.__version__}"
    )
    print("| method | blocks | checkpoint, GB | seconds | peak memory, GB |")
    print("|---|---|---|---|---|")
    table = []
    args.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        dense, sparse, text = (Path(folder, name) for name in ("dense", "sparse", "text.txt"))
        text.write_text(" ".join(WORDS * (1 + args.samples * args.tokens // len(WORDS))))
        for depth in args.blocks:
            write_llama(dense, depth, args)
            for method in args.methods:
                taken, peak = prune(dense, sparse, text, method, args)
                print(f"| {method} | {depth} | {size(dense) / 1e9:.1f} | {taken:.0f} | {peak / 1e9:.2f} |", flush=True)
                if not table and not args.peak_only:
                    table = save_and_load(dense, sparse, Path(folder, "saved"))
                shutil.rmtree(sparse)
            shutil.rmtree(dense)
    print("", *table, sep="\n")


def write_llama(folder: Path, depth: int, args: argparse.Namespace) -> None:
    """One shard for each block, one for the rest; never more than one in memory."""
    config = LlamaConfig(
        num_hidden_layers=depth,
        hidden_size=args.hidden,
        intermediate_size=args.intermediate,
        num_attention_heads=args.hidden // min(128, args.hidden // 4),
        dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    )
    with torch.device("meta"):
        names = AutoModelForCausalLM.from_config(config).state_dict()
    shards: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in names.items():
        part = ".".join(name.split(".")[:3]) if ".layers." in name else "rest"
        shards.setdefault(part, {})[name] = tensor
    generator = torch.Generator().manual_seed(0)
    first = {
        name.partition(".layers.0.")[2]: torch.empty(tensor.shape, dtype=torch.bfloat16).normal_(
            std=0.02, generator=generator
        )
        for name, tensor in shards["model.layers.0"].items()
    }
    folder.mkdir()
    index = {}
    for number, (part, tensors) in enumerate(shards.items(), 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        index |= dict.fromkeys(tensors, file)
        if part == "rest":
            values = {
                name: torch.empty(t.shape, dtype=torch.bfloat16).normal_(std=0.02) for name, t in tensors.items()
            }
        else:
            values = {name: first[name.partition(f"{part}.")[2]] for name in tensors}
        values = {name: torch.ones_like(value) if "norm" in name else value for name, value in values.items()}
        save_file(values, folder / file, {"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    config.save_pretrained(folder)
    words = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w1").save_pretrained(folder)


def prune(dense: Path, sparse: Path, text: Path, method: str, args: argparse.Namespace) -> tuple[float, int]:
    """Seconds and peak bytes of memory of the command."""
    command = [sys.executable, "-m", "optimum_sparse", "prune", dense, "--output", sparse, "--recipe", "paper"]
    command += ["--method", method, "--pattern", args.pattern, "--dataset", text, "--device-map", args.device_map]
    command += ["--num-samples", str(args.samples), "--sequence-length", str(args.tokens)]
    log, peak = sparse.with_suffix(".log"), 0
    started = time.perf_counter()
    with log.open("w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file)
        while process.poll() is None:  # the peak in the status that wait4 gives has this process's in it
            found = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{process.pid}/status").read_text())
            peak = int(found[1]) * 1024 if found else peak
            time.sleep(0.02)
    if process.returncode:
        raise SystemExit(log.read_text())
    log.unlink()
    return time.perf_counter() - started, peak


def save_and_load(dense: Path, sparse: Path, target: Path) -> list[str]:
    """The lines of a table."""
    rows = ["| | MB | save, s | to the disk, s | load cold, s | and read, s | load warm, s | and read, s |"]
    rows += ["|---" * 8 + "|"]
    for name, source, options in (
        ("dense", dense, {}),
        ("compressed", sparse, {}),
        ("compressed, in memory as well", sparse, {"run_compressed": True}),
    ):
        cells = []
        for cold in (True, False):
            model = None  # not two at a time
            if cold:
                drop(source)
            model, seconds = timed(AutoModelForCausalLM.from_pretrained, source, dtype="auto", **options)
            _, more = timed(read, model)
            cells += [seconds, seconds + more]
        _, saved = timed(model.save_pretrained, target)
        _, synced = timed(flush, target)
        cells = [saved, saved + synced, *cells]
        rows.append(f"| {name} | {size(target) / 1e6:,.0f} | " + " | ".join(f"{cell:.2f}" for cell in cells) + " |")
        shutil.rmtree(target)
        del model
    return rows


def read(model: PreTrainedModel) -> None:
    for tensor in model.state_dict().values():
        tensor.view(-1).view(torch.uint8)[::64].max()


def timed(work: Callable, *args: Any, **kwargs: Any) -> tuple[Any, float]:
    started = time.perf_counter()
    result = work(*args, **kwargs)
    return result, time.perf_counter() - started


def size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def flush(folder: Path) -> None:
    for path in folder.iterdir():
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)


def drop(folder: Path) -> None:
    """The files are read from the disk the next time."""
    flush(folder)
    for path in folder.iterdir():
        handle = os.open(path, os.O_RDONLY)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)


if __name__ == "__main__":
    main()
