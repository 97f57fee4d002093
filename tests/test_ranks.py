"""Real processes (gloo) that prune one model together, beside one process that does it alone."""

import functools
import os
import shutil
import subprocess
import sys

import pytest
import rank_process
import torch
from models import make_config, make_model
from rank_process import RUNS, prune_case

from optimum_sparse import Pruner, ranks


PRUNED = [(world, case) for world, cases in RUNS.items() for case in cases]
alone = functools.cache(prune_case)
# Summation order decides near ties. Of errors and of kept weights, both relative; the share of masks that may differ.
TOLERANCES = (1e-3, 0.01, 0.005)
# ADMM goes on from its masks: in one process, another batch_size moves errors by 4 %.
LOOSE = {"admm, error": (0.1, 0.2, 0.05)}


@pytest.fixture(scope="module", params=list(RUNS))
def together(request, tmp_path_factory, tiny_llama):
    """(folder, what each process found)"""
    world = request.param
    folder = tmp_path_factory.mktemp(f"ranks-{world}")
    shutil.copytree(tiny_llama, folder / "dense")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, rank_process.__file__]
    processes = [
        subprocess.Popen([*command, str(rank), str(world), str(folder)], env=environment, stdin=subprocess.DEVNULL)
        for rank in range(world)
    ]
    try:
        for process in processes:
            process.wait(timeout=240)
    finally:
        for process in processes:
            process.kill()
    errors = [(folder / f"{rank}.log").read_text() for rank in range(world)]
    assert [process.returncode for process in processes] == [0] * world, errors
    bars = [text.count("Pruning:") for text in errors]
    assert bars[0] > 0, "the first process shows progress"
    assert not any(bars[1:]), "the others do not"
    return folder, [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(world)]


@pytest.mark.parametrize(
    ("together", "case"), [*PRUNED, *((world, "on load") for world in RUNS)], indirect=["together"]
)
def test_all_processes_end_with_the_same_model(case, together):
    first, *others = [found[case] for found in together[1]]
    for other in others:
        assert other["weights"].keys() == first["weights"].keys()
        assert all(torch.equal(other["weights"][name], tensor) for name, tensor in first["weights"].items())
        assert other.get("layers") == first.get("layers")


@pytest.mark.parametrize(("together", "case"), PRUNED, indirect=["together"])
def test_it_is_the_model_of_one_process_up_to_summation_order(case, together):
    found, wanted = together[1][0][case], alone(case)
    of_error, of_weight, of_mask = LOOSE.get(case, TOLERANCES)
    assert list(found["layers"]) == list(wanted["layers"])
    for name, (error, routed, block_error) in wanted["layers"].items():
        own_error, own_routed, own_block_error = found["layers"][name]
        assert own_error == (None if error is None else pytest.approx(error, rel=of_error)), name
        assert own_routed == routed
        assert own_block_error == (None if block_error is None else pytest.approx(block_error, rel=of_error))
    different, total = 0, 0
    for name, weight in wanted["weights"].items():
        keep, own = weight != 0, found["weights"][name] != 0
        different, total = different + int((keep ^ own).sum()), total + keep.numel()
        both = keep & own
        change = (found["weights"][name] - weight)[both].float().norm()
        assert change <= of_weight * weight[both].float().norm(), name
    assert different <= of_mask * total


@pytest.mark.parametrize(
    ("failure", "own", "others"),
    [
        ("solve", "ArithmeticError: no solution here", "OtherProcessFailed: process 1 of "),
        ("forward", "MemoryError: out of memory", "OtherProcessFailed: process "),
        ("config", "have different config: give all of them the same", ""),
        ("model", "have different model: give", ""),
        ("data", "have different data: give", ""),
        ("few", "ValueError: 1 calibration sequences for ", ""),
        ("disk", "ValueError: prune_to_disk runs in one process, and there are ", ""),
    ],
)
def test_a_failure_ends_all_processes_and_is_named(failure, own, others, together):
    """Each of these is followed by further work of the same processes, which so are still in step."""
    messages = [found[failure] for found in together[1]]
    for message in messages:
        assert own in message
    assert sum(bool(others) and message.startswith(others) for message in messages) == (
        len(messages) - 1 if others else 0
    )


def test_only_the_first_process_writes(together):
    folder, found = together
    assert (folder / "saved-0" / "model.safetensors").exists()
    assert not any((folder / f"saved-{rank}").exists() for rank in range(1, len(found)))
    assert not (folder / "refused").exists()


def test_a_group_of_one_process_changes_nothing(tmp_path):
    wanted = Pruner.from_pretrained(make_model("llama")).prune(make_config()).state_dict()
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)
    try:
        found = Pruner.from_pretrained(make_model("llama")).prune(make_config()).state_dict()
    finally:
        torch.distributed.destroy_process_group()
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())


def test_work_is_spread_evenly(monkeypatch):
    monkeypatch.setattr(ranks, "world", lambda: 3)
    assert ranks.spread([1, 9, 5, 4, 4]) == [1, 0, 1, 2, 2]
    assert ranks.spread([]) == []
