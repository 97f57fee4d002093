"""One of several processes that prune together, for tests/test_ranks.py."""

import contextlib
import datetime
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from models import SAMPLES, make_config, make_model, token_ids, weights_of

from optimum_sparse import Pruner, SparseModelForCausalLM
from optimum_sparse.core import Needs, Solved, keep_mask
from optimum_sparse.kernels import precision


def padded() -> list[dict[str, torch.Tensor]]:
    mask = torch.ones(2, 24, dtype=torch.int64)
    mask[1, :9] = 0
    return [{"input_ids": token_ids(2, 24, seed), "attention_mask": mask} for seed in range(3)]


# name -> (architecture, arguments of make_config, arguments of prune)
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "sparsegpt 2:4": ("llama", dict(batch_size=1), {}),
    "sparsegpt 60 %": ("llama-tied", dict(pattern="unstructured", sparsity=0.6, batch_size=1), {}),
    "sparsegpt, 5 batches": ("llama", dict(batch_size=1, num_samples=5), {}),
    "sparsegpt, 1 batch": ("llama", dict(batch_size=SAMPLES), {}),
    "sparsegpt, padding": ("llama", {}, dict(dataset=padded())),
    "wanda": ("llama", dict(method="wanda", batch_size=2), {}),
    "wanda, owl": ("llama", dict(method="wanda", pattern="unstructured", sparsity=0.5, allocation="owl"), {}),
    "magnitude": ("llama", dict(method="magnitude"), {}),
    "admm, error": (
        "llama",
        dict(method="admm", pattern="unstructured", sparsity=0.5, allocation="error", refine="pcg", batch_size=1),
        {},
    ),
    "reconstruct": ("llama", dict(refine="reconstruct", reconstruction_passes=2, batch_size=2), {}),
    "experts": ("mixtral", dict(batch_size=1), {}),
    "conv1d": ("gpt2", dict(batch_size=1), {}),
}

# How many processes run which of them. Others, and three processes, by hand: they take minutes on two cores.
RUNS = {
    2: [
        "sparsegpt 2:4",
        "sparsegpt, 5 batches",
        "sparsegpt, 1 batch",
        "wanda, owl",
        "magnitude",
        "reconstruct",
        "experts",
    ]
}


def prune_case(name: str) -> dict[str, Any]:
    architecture, changes, arguments = CASES[name]
    pruner = Pruner.from_pretrained(make_model(architecture))
    model = pruner.prune(make_config(**changes), **arguments)
    layers = {layer.name: (layer.error, layer.routed, layer.block_error) for layer in pruner.report.layers}
    return {"weights": weights_of(model), "layers": layers}


class FailsOnOne:
    needs = Needs.GRAM

    def solve(self, weight, stats, pattern) -> Solved:
        if dist.get_rank() == 1:
            raise ArithmeticError("no solution here")
        return Solved(weight * keep_mask(weight.abs(), pattern), keep_mask(weight.abs(), pattern))


def failures(rank: int, world: int, folder: Path) -> dict[str, Any]:
    """name -> a call that must fail on every process."""

    def prune(seed: int = 0, method: Any = None, **changes: Any) -> None:
        Pruner.from_pretrained(make_model("llama", seed)).prune(make_config(**changes), method=method)

    def unreadable() -> None:
        prune(dataset=str(folder / f"missing-{rank}.txt") if rank == 0 else token_ids())

    def damaged() -> None:  # inputs of the second block, on one process only
        model = make_model("llama")
        if rank == world - 1:
            model.model.layers[1].register_forward_pre_hook(_fail)
        Pruner.from_pretrained(model).prune(make_config("wanda"))

    return {
        "solve": lambda: prune(method=FailsOnOne()),
        "forward": damaged,
        "config": lambda: prune(damping=0.01 * (1 + rank)),
        "model": lambda: prune(seed=rank),
        "data": lambda: prune(dataset=token_ids(seed=1 + rank)),
        "few": lambda: prune(num_samples=1),
        "disk": lambda: Pruner.from_pretrained(make_model("llama")).prune_to_disk(make_config(), folder / "refused"),
    }


def _fail(module: Any, args: Any) -> None:
    raise MemoryError("out of memory")


def main(rank: int, world: int, folder: Path) -> None:
    """Run all cases, and write what came out of each to the folder, and what would be printed."""
    with open(folder / f"{rank}.log", "w") as log, contextlib.redirect_stderr(log):
        _main(rank, world, folder)


def _main(rank: int, world: int, folder: Path) -> None:
    os.environ["HF_HUB_OFFLINE"] = "1"
    torch.set_num_threads(1)
    precision._multiplies_bf16 = lambda device: False
    group = dict(init_method=f"file://{folder}/meeting", rank=rank, world_size=world)
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=60), **group)
    found: dict[str, Any] = {name: prune_case(name) for name in RUNS[world]}
    for name, call in failures(rank, world, folder).items():
        try:
            call()
            found[name] = None
        except Exception as error:
            found[name] = f"{type(error).__name__}: {error}"
    model = SparseModelForCausalLM.from_pretrained(folder / "dense", sparsity_config=make_config())
    model.save_pretrained(folder / f"saved-{rank}")
    found["on load"] = {"weights": weights_of(model)}
    torch.save(found, folder / f"{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
