"""Real processes (gloo) that prune one model together, beside one process that does it alone."""

import shutil
import signal

import pytest
import torch
from models import make_config, make_model, stored_tensors
from rank_process import CASES, WORLD, alone, assert_close, assert_same, start, start_killed

from optimum_sparse import Pruner, ranks


@pytest.fixture(scope="module")
def together(tmp_path_factory, tiny_llama):
    """(folder, what each process found)"""
    folder = tmp_path_factory.mktemp("ranks")
    shutil.copytree(tiny_llama, folder / "dense")
    return folder, start(folder, "gloo")


@pytest.mark.parametrize("case", [*CASES, "on load", "to disk"])
def test_all_processes_end_with_the_same_model(case, together):
    assert_same([found[case] for found in together[1]])


@pytest.mark.parametrize("case", CASES)
def test_it_is_the_model_of_one_process_up_to_summation_order(case, together):
    assert_close(together[1][0][case], alone(case))


def test_from_disk_to_disk_it_is_the_model_in_memory_to_the_bit(together):
    folder, (found, _) = together
    assert found["to disk"]["weights"].keys() == found["in memory"]["weights"].keys()
    assert all(torch.equal(found["to disk"]["weights"][name], x) for name, x in found["in memory"]["weights"].items())
    assert not list(folder.glob(".*.unfinished"))


@pytest.mark.parametrize(("dies", "when"), [(0, "after"), (1, "before"), (1, "after")])
def test_a_killed_process_ends_all_and_the_same_run_goes_on(dies, when, tmp_path):
    """Killed before or after it has noted its second block, of which the others may have noted it, too, or not."""
    make_model("llama", num_hidden_layers=3).save_pretrained(tmp_path / "dense")
    ended = start_killed(tmp_path, dies, when)
    assert ended[dies] == -signal.SIGKILL
    assert ended[1 - dies] == 1
    assert not (tmp_path / "out").exists()

    def blocks() -> list[int]:
        return [len((tmp_path / f"{rank}.blocks").read_text().split()) for rank in range(WORLD)]

    assert start_killed(tmp_path) == [0, 0]
    assert blocks() in ([[2, 2]] if when == "before" else [[2, 2], [1, 1]])
    weights = stored_tensors(tmp_path / "out")
    assert not list(tmp_path.glob(".*.unfinished"))
    shutil.rmtree(tmp_path / "out")
    assert start_killed(tmp_path) == [0, 0]
    assert blocks() == [3, 3]
    wanted = stored_tensors(tmp_path / "out")
    assert weights.keys() == wanted.keys()
    assert all(torch.equal(weights[name], tensor) for name, tensor in wanted.items())


def test_without_sums_it_is_that_model_to_the_bit(together):
    assert_same([together[1][0]["magnitude"], alone("magnitude")])


@pytest.mark.parametrize(
    ("failure", "own", "others"),
    [
        ("refused", "ValueError: not this matrix", "OtherProcessRefused: process 1 of 2 failed"),
        ("solve", "ArithmeticError: no solution here", "OtherProcessFailed: process 1 of 2 failed"),
        ("forward", "FloatingPointError: a broken block", "OtherProcessFailed: process 1 of 2 failed"),
        ("memory", "one of 2 processes cannot go on with fewer by itself: set batch_size=1", "OtherProcessFailed: "),
        ("config", "have different config: give all of them the same", ""),
        ("model", "have different model: give", ""),
        ("data", "have different data: give", ""),
        ("few", "ValueError: 1 calibration sequences for ", ""),
        ("whole", "ValueError: this model is loaded as a whole, and there are ", ""),
        ("output", "dense' exists and is not an empty folder", "OtherProcessFailed: process 0 of 2 failed"),
        ("other recipe", "have different recipe: give all of them the same", ""),
    ],
)
def test_a_failure_ends_all_processes_and_is_named(failure, own, others, together):
    """Each of these is followed by further work of the same processes, which so are still in step."""
    messages = [found[failure] for found in together[1]]
    assert all(own in message for message in messages)
    assert [message.startswith(others or "Other") for message in messages].count(True) == bool(others)


def test_only_the_first_process_writes_and_shows_progress(together):
    folder, _ = together
    assert (folder / "saved-0" / "model.safetensors").exists()
    assert not (folder / "saved-1").exists()
    assert not (folder / "refused").exists()
    assert ["Pruning:" in (folder / f"{rank}.log").read_text() for rank in range(WORLD)] == [True, False]


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


def test_a_model_on_another_gpu_is_refused(monkeypatch):
    monkeypatch.setattr(ranks, "world", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    ranks.check_devices([torch.device("cuda", 1), torch.device("cpu")])
    for gpus in ([0], [0, 1]):
        with pytest.raises(ValueError, match=r"process 0 of 2 has a model on GPU 0.*its own is 1: load"):
            ranks.check_devices(torch.device("cuda", gpu) for gpu in gpus)
