"""From disk to disk: the bits of the run in memory, one block at a time, whatever happens on the way."""

import copy
import cProfile
import json
import os
import pstats
import re
import shutil
import time
from pathlib import Path

import pytest
import torch
from models import (
    TOKENS,
    assert_same_logits,
    assert_same_weights,
    files_of,
    make_config,
    make_model,
    run_python,
    stored_tensors,
)
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from optimum_sparse import Pruner, SparsityConfig
from optimum_sparse.hf import checkpoint, streaming
from optimum_sparse.hf import journal as journal_module
from optimum_sparse.hf.checkpoint import read_report
from optimum_sparse.hf.journal import Journal, Spilled, Stored, lock
from optimum_sparse.pipeline import Calls, loop


@pytest.fixture
def source(tmp_path) -> Path:
    """A dense Llama of 4 blocks."""
    make_model("llama", num_hidden_layers=4).save_pretrained(tmp_path / "source")
    return tmp_path / "source"


def without_seconds(directory: Path) -> list[dict]:
    return [layer | {"seconds": 0} for layer in read_report(directory).to_dict()["layers"]]


def assert_same_checkpoint(streamed: Path, saved: Path) -> None:
    """All that loads, reads and documents them is the same; only how tensors are shared out over files may differ."""
    got, wanted = stored_tensors(streamed), stored_tensors(saved)
    assert set(got) == set(wanted)
    assert not [
        name for name in got if not torch.equal(got[name], wanted[name]) or got[name].dtype != wanted[name].dtype
    ]
    assert without_seconds(streamed) == without_seconds(saved)

    def others(directory: Path) -> dict[str, bytes]:
        return {
            name: content
            for name, content in files_of(directory).items()
            if "safetensors" not in name and name != "sparsity_report.json"
        }

    assert others(streamed) == others(saved)
    index = json.loads((streamed / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in wanted.values())
    assert {file.name for file in streamed.glob("*.safetensors")} == set(index["weight_map"].values())


def in_memory(source: Path, config: SparsityConfig, output: Path) -> Path:
    pruner = Pruner.from_pretrained(source)
    assert pruner.model is not None  # loaded: not streamed
    return pruner.prune_to_disk(config, output)


TRAINED = dict(refine="reconstruct", reconstruction_passes=1)
CASES = {
    "magnitude": ("llama", make_config("magnitude")),
    "tied": ("llama-tied", make_config("wanda", "unstructured", sparsity=0.6)),
    "all that second-order methods do": ("llama", make_config("sparsegpt")),
    "Conv1D": ("gpt2", make_config("rose", "4:8")),
    "masks by layer": ("gemma3", make_config("sparsegpt")),
    "trained, allocated": ("llama", make_config("admm", "unstructured", allocation="error", **TRAINED)),
    "owl": ("qwen3", make_config("wanda", "unstructured", allocation="owl", ignore=["k_proj"])),
    "denser": ("llama", make_config("sparsegpt", denser={"dense": 0.2})),
    "dense experts": ("mixtral", make_config("sparsegpt", ignore=["experts"])),
    "Mixtral": ("mixtral", make_config("sparsegpt")),
    "Qwen3-MoE": ("qwen3_moe", make_config("admm", "unstructured", allocation="error")),
    "gpt-oss": ("gpt_oss", make_config("wanda", layers={"experts.1.down_proj": "dense"})),
}


@pytest.mark.parametrize("spilled", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_the_same_bits_as_in_memory(case, spilled, tmp_path, tokenizer, monkeypatch):
    architecture, config = CASES[case]
    make_model(architecture).save_pretrained(tmp_path / "source")
    tokenizer.save_pretrained(tmp_path / "source")
    before = files_of(tmp_path / "source")
    if spilled:
        monkeypatch.setattr(journal_module, "HIDDEN_LIMIT", 0)
    in_memory(tmp_path / "source", config, tmp_path / "saved")
    pruner = Pruner.from_pretrained(tmp_path / "source")
    assert pruner.prune_to_disk(config, tmp_path / "streamed") == tmp_path / "streamed"
    assert_same_checkpoint(tmp_path / "streamed", tmp_path / "saved")
    assert files_of(tmp_path / "source") == before
    assert {path.name for path in tmp_path.iterdir()} == {"source", "saved", "streamed"}
    for compressed in (False, True):
        first = AutoModelForCausalLM.from_pretrained(tmp_path / "streamed", run_compressed=compressed)
        second = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", run_compressed=compressed)
        assert_same_logits(first, second)
    assert_same_weights(pruner.model, AutoModelForCausalLM.from_pretrained(tmp_path / "saved"))
    assert [layer.name for layer in pruner.report.layers] == [
        row["name"] for row in without_seconds(tmp_path / "saved")
    ]


@pytest.mark.parametrize(
    "config",
    [
        make_config("sparsegpt"),
        make_config("wanda", "unstructured", allocation="owl"),
        make_config("sparsegpt", "unstructured", allocation="error"),
    ],
    ids=lambda config: f"{config.method} {config.allocation}",
)
def test_weights_that_blocks_share_stay_one(config, tmp_path):
    """Though accelerate's hooks give each block its own, once it was brought in."""
    make_model("zamba2").save_pretrained(tmp_path / "source")
    saved = in_memory(tmp_path / "source", config, tmp_path / "saved")
    streamed = Pruner.from_pretrained(tmp_path / "source").prune_to_disk(config, tmp_path / "streamed")
    first, second = (AutoModelForCausalLM.from_pretrained(folder) for folder in (saved, streamed))
    assert_same_weights(first, second)
    assert without_seconds(saved) == without_seconds(streamed)
    shared = [layer.name for layer in read_report(streamed).skipped if "shared with another layer" in layer.skipped]
    first_half, second_half = ({name for name in shared if f"layers.{number}." in name} for number in (1, 3))
    assert {name.replace("layers.1.", "layers.3.") for name in first_half} == second_half != set()


@pytest.mark.parametrize("dtype", ["bfloat16", "auto"])
def test_another_dtype_and_small_shards(dtype, source, tmp_path):
    config = make_config("sparsegpt")
    pruner = Pruner.from_pretrained(source, dtype=dtype)
    pruner.prune_to_disk(config, tmp_path / "streamed", max_shard_size="10KB")
    pruner = Pruner.from_pretrained(source, dtype=dtype)
    pruner.prune(config).save_pretrained(tmp_path / "saved")
    assert_same_checkpoint(tmp_path / "streamed", tmp_path / "saved")
    assert len(list((tmp_path / "streamed").glob("*.safetensors"))) > 5


def test_a_sparse_checkpoint_is_pruned_again(source, tmp_path):
    in_memory(source, make_config("magnitude", "unstructured", sparsity=0.3), tmp_path / "once")
    in_memory(tmp_path / "once", make_config("sparsegpt"), tmp_path / "saved")
    Pruner.from_pretrained(tmp_path / "once").prune_to_disk(make_config("sparsegpt"), tmp_path / "streamed")
    assert_same_checkpoint(tmp_path / "streamed", tmp_path / "saved")


def test_one_block_in_memory(source, tmp_path, monkeypatch):
    """Counted when it is saved, which is when most is there; and the gradients' pass keeps block inputs in files."""
    present, written, loaded = [], [], []
    load, save, write = streaming._load, streaming._save_part, Stored.write.__func__

    def remembering(*args):
        loaded.append(load(*args))
        return loaded[0]

    def counting(model, journal, name, size):
        blocks = enumerate(loaded[0].model.layers)
        present.append([number for number, block in blocks if not block.mlp.up_proj.weight.is_meta])
        return save(model, journal, name, size)

    def noting(cls, x, folder):
        written.append(folder.name)
        return write(cls, x, folder)

    monkeypatch.setattr(streaming, "_load", remembering)
    monkeypatch.setattr(streaming, "_save_part", counting)
    monkeypatch.setattr(Stored, "write", classmethod(noting))
    Pruner.from_pretrained(source).prune_to_disk(make_config("sparsegpt"), tmp_path / "out")
    assert present == [[0], [1], [2], [3], []]
    assert written.count("scratch") >= 2 * 4  # batches x blocks


def test_what_is_loaded_as_a_whole(source, tmp_path, monkeypatch):
    """Text that the model writes itself, places for its parts, and models that are there already."""
    monkeypatch.setattr("optimum_sparse.pruner.stream", None)
    text = make_config("wanda", dataset="self", num_samples=2, sequence_length=8)
    Pruner.from_pretrained(source).prune_to_disk(text, tmp_path / "self")
    Pruner.from_pretrained(source, device_map={"": "cpu"}).prune_to_disk(make_config("wanda"), tmp_path / "map")
    pruner = Pruner.from_pretrained(source)
    pruner.prune(make_config("magnitude"))
    pruner.prune_to_disk(make_config("wanda"), tmp_path / "twice")
    for device in ("cpu", torch.device("cpu")):
        pruner = Pruner.from_pretrained(source, device_map=device)
        with pytest.raises(TypeError):
            pruner.prune_to_disk(make_config("wanda"), tmp_path / "streamed")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is such a device")
@pytest.mark.parametrize("device", [0, 1, torch.device("cuda"), "cuda:0"], ids=str)
def test_a_gpu_that_is_not_there(device, source, tmp_path):
    """Its number may be 0, which is no CPU."""
    with pytest.raises(ValueError, match="there is no device"):
        Pruner.from_pretrained(source, device_map=device).prune_to_disk(make_config("wanda"), tmp_path / "out")


# ---- going on


class Stop(BaseException):
    """As an interrupt from the keyboard."""


def stop_at(block: int, source: Path, config: SparsityConfig, output: Path, monkeypatch) -> None:
    """A run that ends where it would have saved this block."""
    save = streaming._save_part

    def stopping(model, journal, name, size):
        if name == f"model.layers.{block}":
            raise Stop
        return save(model, journal, name, size)

    with monkeypatch.context() as patch:
        patch.setattr(streaming, "_save_part", stopping)
        with pytest.raises(Stop):
            Pruner.from_pretrained(source).prune_to_disk(config, output)


def test_what_ends_for_its_model_does_not_go_on(source, tmp_path, caplog):
    """The same run would end there again, and one with a mended model is another."""
    model = AutoModelForCausalLM.from_pretrained(source)
    model.model.layers[2].mlp.up_proj.weight.data[3, 5] = float("nan")
    model.save_pretrained(tmp_path / "nan")
    with pytest.raises(ValueError, match=r"model\.layers\.2\.mlp\.up_proj"):
        Pruner.from_pretrained(tmp_path / "nan").prune_to_disk(make_config("wanda"), tmp_path / "out")
    assert "2 blocks done, and kept in" in caplog.text
    assert "would end here again: remove that folder" in caplog.text


@pytest.mark.parametrize("case", ["magnitude", "all that second-order methods do", "trained, allocated"])
def test_going_on_redoes_one_block(case, source, tmp_path, monkeypatch, caplog):
    config, output = CASES[case][1], tmp_path / "out"
    in_memory(source, config, tmp_path / "saved")
    stop_at(2, source, config, output, monkeypatch)
    assert not output.exists()
    assert "2 blocks done, and kept in" in caplog.text
    solved = []
    with monkeypatch.context() as patch:
        for phase in ("fisher", "allocate", "token_batches"):
            patch.setattr(f"optimum_sparse.hf.prune.{phase}", None)
        prune = streaming._save_part
        patch.setattr(streaming, "_save_part", lambda *args: solved.append(args[2]) or prune(*args))
        Pruner.from_pretrained(source).prune_to_disk(config, output)
    assert solved == ["model.layers.2", "model.layers.3", "rest"]
    assert "going on from block 2" in caplog.text
    assert_same_checkpoint(output, tmp_path / "saved")
    assert {path.name for path in tmp_path.iterdir()} == {"source", "saved", "out"}


KILLED = """
import os, random, signal, sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import conftest
from models import make_config
from optimum_sparse import Pruner
import torch

source, folder, kind, exists = Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4], sys.argv[5] == "exists"
config = make_config("sparsegpt", refine="reconstruct", reconstruction_passes=1)
random.seed(0)

def child(output, moment):
    left = moment
    def counted(function):
        def call(*args, **kwargs):
            nonlocal left
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)
        return call
    if kind == "files" and moment:
        for name in ("replace", "fsync", "unlink", "rmdir", "mkdir"):
            setattr(os, name, counted(getattr(os, name)))
    try:
        Pruner.from_pretrained(source).prune_to_disk(config, output)
    except BaseException as error:
        print(type(error).__name__, error, file=sys.stderr)
        os._exit(1)
    os._exit(0)

def run(output, moment=0):
    pid = os.fork()
    if pid == 0:
        child(output, moment)
    if kind == "time" and moment:  # some time after that many blocks are done
        done = output.with_name(f".{output.name}.unfinished") / "state" / f"block-{moment - 1:05d}.json"
        for _ in range(30000):  # and no longer, if it has failed
            if done.exists():
                break
            time.sleep(0.001)
        time.sleep(random.uniform(0, 0.1))
        os.kill(pid, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

assert run(folder / "whole") == 0
killed = 0
for attempt in range(int(sys.argv[6])):
    output = folder / f"out{attempt}"
    if exists:
        output.mkdir()
    for blocks in (1, 2, 3):  # killed several times on its way
        code = run(output, blocks if kind == "time" else random.randint(1, 120))
        killed += code == -signal.SIGKILL
        if code == 0:
            break
        assert code == -signal.SIGKILL, code
        assert not (output / "config.json").exists() or kind == "files"
    else:
        assert run(output) == 0
print(killed)
"""


@pytest.mark.parametrize(("kind", "exists"), [("time", "new"), ("files", "new"), ("files", "exists")])
def test_killed_at_random_moments(kind, exists, source, tmp_path):
    """kill -9 at any time, and before any change to the files: the same bytes in the end, and nothing else is left."""
    (tmp_path / "runs").mkdir()
    tests = str(Path(__file__).parents[1])
    done = run_python(KILLED, tests, str(source), str(tmp_path / "runs"), kind, exists, "2")
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout.split()[-1]) >= 2
    whole = files_of(tmp_path / "runs" / "whole")
    outputs = {path.name for path in (tmp_path / "runs").iterdir()}
    assert outputs == {"whole", "out0", "out1"}
    for name in outputs:
        found = files_of(tmp_path / "runs" / name)
        assert set(found) == set(whole)
        assert [file for file in whole if found[file] != whole[file]] in ([], ["sparsity_report.json"])
        assert without_seconds(tmp_path / "runs" / name) == without_seconds(tmp_path / "runs" / "whole")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("recipe", "recipe.damping was 0.01 and is 0.02"),
        ("weights", r"model.files.model.safetensors was '\d+ bytes of .* and is '"),
        ("config", r"model.config.rms_norm_eps was 1e-06 and is 0.1"),
        ("dtype", "settings.dtype was None and is 'bfloat16'"),
        ("data", "recipe.dataset was 'in memory: tokens"),
    ],
)
def test_another_recipe_or_model_does_not_go_on(change, message, source, tmp_path, monkeypatch):
    config, loading = make_config("sparsegpt"), {}
    stop_at(1, source, config, tmp_path / "out", monkeypatch)
    if change == "recipe":
        config = make_config("sparsegpt", damping=0.02)
    elif change == "weights":
        make_model("llama", seed=7, num_hidden_layers=4).save_pretrained(source)
    elif change == "config":
        stored = json.loads((source / "config.json").read_text()) | {"rms_norm_eps": 0.1}
        (source / "config.json").write_text(json.dumps(stored))
    elif change == "dtype":
        loading = {"dtype": "bfloat16"}
    else:
        config = make_config("sparsegpt", dataset=torch.full((6, TOKENS), 5))
    before = files_of(tmp_path)
    with pytest.raises(ValueError, match=message) as caught:
        Pruner.from_pretrained(source, **loading).prune_to_disk(config, tmp_path / "out")
    assert "remove that folder to begin again" in str(caught.value)
    assert files_of(tmp_path) == before


def test_the_same_file_by_another_name_is_the_same_data(tiny_llama, text, tmp_path, monkeypatch):
    def config(path) -> SparsityConfig:
        return make_config("wanda", dataset=str(path), num_samples=2, sequence_length=8)

    stop_at(1, tiny_llama, config(text), tmp_path / "out", monkeypatch)
    monkeypatch.chdir(text.parent)
    Pruner.from_pretrained(tiny_llama).prune_to_disk(config(text.name), tmp_path / "out")
    assert (tmp_path / "out" / "config.json").exists()


def test_a_full_disk_is_named_with_the_file():
    with (
        pytest.raises(OSError, match=r"No space left on device, [\d,]+ bytes are free: '/dev/full'"),
        checkpoint.writing(Path("/dev/full")),
    ):
        Path("/dev/full").write_text("x")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("tokenizer", r"tokenizer was '\w{16}' and is '\w{16}'"),
        ("data", r"data was '\d+ bytes of .*' and is '\d+ bytes"),
        ("weights", r"model\.files\.model\.safetensors was '(\d+ bytes of .*), \w+' and is '\1, \w+'"),
        ("commit", r"model\.commit was 'one' and is 'two'"),
    ],
)
def test_what_names_sizes_and_times_do_not_show_is_seen(change, message, tiny_llama, text, tmp_path, monkeypatch):
    source, data, commits = tmp_path / "source", tmp_path / "data.txt", ["one", "two"]
    shutil.copytree(tiny_llama, source)
    shutil.copy(text, data)

    def load_config(*args, **kwargs):
        config = checkpoint.load_config(*args, **kwargs)
        config._commit_hash = commits[0]
        return config

    monkeypatch.setattr(streaming, "load_config", load_config)
    config = make_config("wanda", dataset=str(data), num_samples=4, sequence_length=16)
    stop_at(1, source, config, tmp_path / "out", monkeypatch)
    if change == "tokenizer":
        file = source / "tokenizer.json"
        content = json.loads(file.read_text())
        words = content["model"]["vocab"]
        words["w5"], words["w6"] = words["w6"], words["w5"]
        file.write_text(json.dumps(content))
    elif change == "data":
        data.write_text(data.read_text().replace("w5", "w6"))
    elif change == "weights":
        file = source / "model.safetensors"
        times = file.stat().st_atime_ns, file.stat().st_mtime_ns
        save_file({name: tensor + 1 for name, tensor in load_file(file).items()}, file, {"format": "pt"})
        os.utime(file, ns=times)
    else:
        commits.pop(0)
    with pytest.raises(ValueError, match=message):
        Pruner.from_pretrained(source).prune_to_disk(config, tmp_path / "out")


def test_a_time_zone_is_no_difference(source, monkeypatch):
    found = []
    for zone in ("UTC", "Asia/Tokyo"):
        monkeypatch.setenv("TZ", zone)
        time.tzset()
        found.append(streaming._files(source, {}))
    monkeypatch.undo()
    time.tzset()
    assert found[0] == found[1]


def test_halved_batches_stay_halved_when_a_run_goes_on(source, tmp_path, monkeypatch):
    collect = loop.collect

    def collect_within(groups, layout, block, index, calls, *rest, **more):
        if index == 1 and max(map(len, calls.hidden)) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return collect(groups, layout, block, index, calls, *rest, **more)

    monkeypatch.setattr(loop, "collect", collect_within)
    Pruner.from_pretrained(source).prune_to_disk(make_config(), tmp_path / "straight")
    stop_at(3, source, make_config(), tmp_path / "stopped", monkeypatch)
    Pruner.from_pretrained(source).prune_to_disk(make_config(), tmp_path / "stopped")
    assert_same_checkpoint(tmp_path / "stopped", tmp_path / "straight")


def test_an_output_taken_away_before_all_was_tidied_up_is_made_again(source, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(journal_module.shutil, "rmtree", lambda *path, **options: None)
        patch.setattr(Path, "rmdir", lambda path: None)
        patch.setattr(Path, "unlink", lambda path, **options: None)
        Pruner.from_pretrained(source).prune_to_disk(make_config(), tmp_path / "out")
    (tmp_path / "out").rename(tmp_path / "elsewhere")
    Pruner.from_pretrained(source).prune_to_disk(make_config(), tmp_path / "out")
    assert_same_checkpoint(tmp_path / "out", tmp_path / "elsewhere")
    assert not list(tmp_path.glob(".*.unfinished"))


def test_blocks_that_hand_on_state_begin_again(tmp_path):
    journal = Journal(tmp_path / "out", {})
    calls = Calls([torch.ones(1, 2, 3)], [[]], share_state=True)
    for _ in range(2):
        journal.end_block([], [], calls, {})
    journal.close()
    journal = Journal(tmp_path / "out", {})
    assert journal.start == 2
    journal.go_on(calls)
    assert journal.start == 0
    journal.close()
    assert Journal(tmp_path / "out", {}).start == 0


def test_two_processes_do_not_write_to_one_output(source, tmp_path, monkeypatch):
    stop_at(1, source, make_config(), tmp_path / "out", monkeypatch)
    before = files_of(tmp_path)
    with (
        lock(tmp_path / ".out.unfinished" / "lock"),
        pytest.raises(OSError, match=r"another process is writing to .*\.out\.unfinished: wait"),
    ):
        Pruner.from_pretrained(source).prune_to_disk(make_config(), tmp_path / "out")
    assert files_of(tmp_path) == before
    Pruner.from_pretrained(source).prune_to_disk(make_config(), tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"source", "out"}


def test_to_the_folder_that_one_is_in(source, tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    monkeypatch.chdir(tmp_path / "out")
    Pruner.from_pretrained(source).prune_to_disk(make_config("magnitude"), ".")
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")


@pytest.mark.parametrize("missing", ["model.layers.2.mlp.up_proj.weight", "lm_head.weight", "model.norm.weight"])
def test_a_checkpoint_that_lacks_weights_is_refused(missing, source, tmp_path):
    tensors = load_file(source / "model.safetensors")
    del tensors[missing]
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    with pytest.raises(OSError, match=rf"lacks 1 weights, and random numbers would take their place: {missing}\."):
        Pruner.from_pretrained(source).prune_to_disk(make_config("magnitude"), tmp_path / "out")
    with pytest.raises(OSError, match="lacks 1 weights"):
        Pruner.from_pretrained(source).prune(make_config("magnitude"))
    assert {path.name for path in tmp_path.iterdir()} == {"source"}


def test_weights_of_another_shape_are_refused(source):
    stored = json.loads((source / "config.json").read_text()) | {"intermediate_size": 96}
    (source / "config.json").write_text(json.dumps(stored))
    with pytest.raises(ValueError, match=r"the weights of '.*source' do not fit its config\.json"):
        Pruner.from_pretrained(source).prune(make_config("magnitude"))


def test_what_a_device_raises_is_not_the_checkpoints_fault(source):
    with pytest.raises(NotImplementedError, match="Vulkan"):  # a RuntimeError, as those of CUDA are
        Pruner.from_pretrained(source, device_map="vulkan").prune(make_config("magnitude"))


@pytest.mark.parametrize("size", ["big", "5G", "GB", 0, -1, None, 1.5])
def test_what_is_no_size_is_refused_before_any_work(size, source, tmp_path):
    for model in (source, make_model("llama")):
        pruner = Pruner.from_pretrained(model)
        with pytest.raises(ValueError, match=rf"max_shard_size={size!r}: must be a size such as '5GB'"):
            pruner.prune_to_disk(make_config("magnitude"), tmp_path / "out", max_shard_size=size)
        assert pruner.report is None


def test_hidden_states_in_files(tmp_path, monkeypatch):
    monkeypatch.setattr(journal_module, "HIDDEN_LIMIT", 100)
    first = Spilled(tmp_path)
    wanted = [torch.randn(2, 3, 2, dtype=torch.bfloat16).transpose(0, 1) for _ in range(6)]
    for x in wanted:
        first.append(x)
    assert len(first._memory) == 4  # of 24 bytes
    other = copy.copy(first)
    other[0] = torch.zeros(2)
    assert all(torch.equal(x, y) for x, y in zip(first, wanted, strict=True))
    assert torch.equal(other[0], torch.zeros(2))
    assert len(list(tmp_path.iterdir())) == 7
    del other
    assert len(list(tmp_path.iterdir())) == 6
    first.keep()
    del first
    assert len(list(tmp_path.iterdir())) == 6


# ---- what goes wrong


FULL = """
import resource, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import conftest
from models import make_config
from optimum_sparse import Pruner
from optimum_sparse.hf import streaming

save = streaming._save_part
def full(model, journal, name, size):
    if name == "model.layers.2":
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[4]), int(sys.argv[4])))
    return save(model, journal, name, size)
streaming._save_part = full
try:
    Pruner.from_pretrained(sys.argv[2]).prune_to_disk(make_config("sparsegpt"), sys.argv[3])
except OSError as error:
    print(error)
"""


@pytest.mark.parametrize("limit", [0, 1000, 9000])
def test_a_full_disk(limit, source, tmp_path):
    """In the middle of a shard, as the system refuses to write more of it: finished blocks stay, half ones do not."""
    pytest.importorskip("resource")
    output = tmp_path / "out"
    done = run_python(FULL, str(Path(__file__).parents[1]), str(source), str(output), str(limit))
    assert done.returncode == 0, done.stderr[-2000:]
    assert "could not be written" in done.stdout or "File too large" in done.stdout
    assert not output.exists()
    shards = tmp_path / ".out.unfinished" / "checkpoint"
    assert [file.name for file in sorted(shards.glob("*.safetensors"))] == [
        f"model.layers.{block}-00000.safetensors" for block in range(2)
    ]
    Pruner.from_pretrained(source).prune_to_disk(make_config("sparsegpt"), output)
    in_memory(source, make_config("sparsegpt"), tmp_path / "saved")
    assert_same_checkpoint(output, tmp_path / "saved")
    assert {path.name for path in tmp_path.iterdir()} == {"source", "saved", "out"}


FULL_IN_MEMORY = """
import resource, sys
sys.path.insert(0, sys.argv[1])
import conftest
from models import make_config
from optimum_sparse import Pruner

pruner = Pruner.from_pretrained(sys.argv[2])
pruner.model
resource.setrlimit(resource.RLIMIT_FSIZE, (9000, 9000))
try:
    pruner.prune_to_disk(make_config("magnitude"), sys.argv[3])
except OSError as error:
    print(error)
"""


def test_a_full_disk_under_a_model_in_memory(source, tmp_path):
    pytest.importorskip("resource")
    done = run_python(FULL_IN_MEMORY, str(Path(__file__).parents[1]), str(source), str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr[-2000:]
    assert re.search(r"\.out\..* could not be written, where [\d,]+ bytes are free: ", done.stdout)
    assert {path.name for path in tmp_path.iterdir()} == {"source"}


@pytest.mark.parametrize("damage", ["cut", "gone", "noise", "folder"])
def test_an_unreadable_shard(damage, source, tmp_path):
    AutoModelForCausalLM.from_pretrained(source).save_pretrained(tmp_path / "parts", max_shard_size="60KB")
    shard = sorted((tmp_path / "parts").glob("*.safetensors"))[1]
    content = shard.read_bytes()
    if damage in ("gone", "folder"):
        shard.unlink()
    if damage == "folder":
        shard.mkdir()
    elif damage != "gone":
        shard.write_bytes(content[: len(content) // 2] if damage == "cut" else b"\xff" * len(content))
    with pytest.raises(OSError, match=shard.name):
        Pruner.from_pretrained(tmp_path / "parts").prune_to_disk(make_config("sparsegpt"), tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"source", "parts"}


@pytest.mark.parametrize("place", ["/proc/out", "/dev/null/out"])
def test_an_output_that_cannot_be_written(place, source):
    before = files_of(source)
    with pytest.raises(OSError, match=r"/proc|/dev/null"):
        Pruner.from_pretrained(source).prune_to_disk(make_config("sparsegpt"), place)
    assert files_of(source) == before


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{no", "is not JSON"),
        ('{"metadata": {}, "weight_map": {}}', "is damaged: must hold metadata, and in weight_map"),
        ('{"metadata": {}}', "is damaged"),
        ('{"weight_map": {"a": "model.safetensors"}}', "is damaged"),
        ('{"metadata": {}, "weight_map": {"a": 3}}', "is damaged"),
    ],
)
def test_a_damaged_index_is_named(content, message, source, tmp_path):
    AutoModelForCausalLM.from_pretrained(source).save_pretrained(tmp_path / "parts", max_shard_size="60KB")
    (tmp_path / "parts" / "model.safetensors.index.json").write_text(content)
    with pytest.raises((ValueError, OSError), match=rf"model\.safetensors\.index\.json {message}"):
        Pruner.from_pretrained(tmp_path / "parts").prune_to_disk(make_config("sparsegpt"), tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"source", "parts"}


def test_the_output_is_refused_before_any_work(source, tmp_path, monkeypatch):
    monkeypatch.setattr(streaming, "_load", None)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="not an empty folder"):
        Pruner.from_pretrained(source).prune_to_disk(make_config("sparsegpt"), tmp_path / "out")
    assert files_of(tmp_path / "out") == {"mine.txt": b"mine"}


def test_a_link_to_nothing_is_refused_before_any_work(source, tmp_path, monkeypatch):
    monkeypatch.setattr(streaming, "_load", None)
    (tmp_path / "out").symlink_to(tmp_path / "nowhere" / "else")
    with pytest.raises(FileExistsError, match="is a link to nothing"):
        Pruner.from_pretrained(source).prune_to_disk(make_config("sparsegpt"), tmp_path / "out")


def test_a_block_costs_as_many_calls_in_a_deep_model(tmp_path):
    """transformers walks a whole model to save it: that must not be once for each block."""
    calls = {}
    for blocks in (2, 4, 8, 24):  # the first has calls of its own: imports, say
        dense, output = tmp_path / f"{blocks}", tmp_path / f"{blocks}-out"
        make_model("llama", num_hidden_layers=blocks).save_pretrained(dense)
        with cProfile.Profile() as profile:
            Pruner.from_pretrained(dense).prune_to_disk(make_config("magnitude"), output)
        calls[blocks] = pstats.Stats(profile).total_calls
    assert (calls[24] - calls[8]) / 16 < 1.1 * (calls[8] - calls[4]) / 4


def test_names_are_those_of_the_whole_model(tmp_path):
    """Of blocks with experts and others, in a model whose names transformers changes on disk."""
    model = make_model("nemotron_h")
    assert len({type(block.mixer) for block in model.model.layers}) > 2
    model.save_pretrained(tmp_path / "dense")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    Pruner.from_pretrained(loaded).prune(make_config("magnitude")).save_pretrained(tmp_path / "saved")
    Pruner.from_pretrained(tmp_path / "dense").prune_to_disk(make_config("magnitude"), tmp_path / "out")
    wanted, found = stored_tensors(tmp_path / "saved"), stored_tensors(tmp_path / "out")
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())
