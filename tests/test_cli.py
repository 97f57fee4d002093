"""The command line as a user runs it, on a tiny model."""

import gc
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile

import pytest
import torch
from models import files_of, run_python
from transformers import AutoModelForCausalLM
from transformers.integrations import accelerate as placing

from optimum_sparse.cli import main
from optimum_sparse.core import NM
from optimum_sparse.evaluation import SweepResult
from optimum_sparse.hf import streaming
from optimum_sparse.kernels.linear import select


@pytest.fixture(scope="module")
def pruned(tiny_llama, text, tmp_path_factory):
    out = tmp_path_factory.mktemp("cli") / "pruned"
    assert main(prune_arguments(tiny_llama, text, out)) == 0
    return out


def prune_arguments(model, text, out, *more):
    data = ["--dataset", str(text), "--num-samples", "4", "--sequence-length", "32"]
    return ["prune", str(model), "--output", str(out), *data, *more]


def test_prune_writes_checkpoint_tokenizer_and_report(pruned):
    names = {path.name for path in pruned.iterdir()}
    assert {"config.json", "tokenizer.json", "sparsity_report.json", "model.safetensors.index.json"} <= names
    assert "model-00001-of-00003.safetensors" in names  # two blocks, and the rest
    stored = json.loads((pruned / "config.json").read_text())["quantization_config"]
    assert (stored["method"], stored["pattern"], stored["num_samples"]) == ("sparsegpt", "2:4", 4)
    layers = json.loads((pruned / "sparsity_report.json").read_text())["layers"]
    assert all(layer["sparsity"] == 0.5 and 0 < layer["error"] < 1 for layer in layers)
    AutoModelForCausalLM.from_pretrained(pruned)


def test_prune_prints_the_report_and_the_sizes(tiny_llama, text, tmp_path, capsys):
    assert main(prune_arguments(tiny_llama, text, tmp_path / "out", "--method", "wanda", "--ignore", "k_proj")) == 0
    printed = capsys.readouterr().out
    assert "down_proj" in printed
    assert "left dense, ignored by 'k_proj'" in printed
    assert "MB on disk" in printed


def test_options_win_over_a_config_file(tiny_llama, text, tmp_path):
    (tmp_path / "recipe.json").write_text(json.dumps({"method": "wanda", "pattern": "unstructured", "sparsity": 0.3}))
    more = ["--config", str(tmp_path / "recipe.json"), "--method", "magnitude", "--layer", "down_proj=4:8"]
    assert main(prune_arguments(tiny_llama, text, tmp_path / "out", *more)) == 0
    stored = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert (stored["method"], stored["sparsity"], stored["layers"]) == ("magnitude", 0.3, {"down_proj": "4:8"})


def test_another_method_drops_what_a_config_file_says_of_its_own_and_nothing_that_is_given(tiny_llama, text, tmp_path):
    (tmp_path / "recipe.json").write_text(json.dumps({"method": "admm", "staged": False, "input_shift": 0.1}))
    more = ["--config", str(tmp_path / "recipe.json"), "--method", "sparsegpt", "--set", "input_shift=0.25"]
    assert main(prune_arguments(tiny_llama, text, tmp_path / "out", *more, "--set", "fisher=false")) == 0
    stored = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    given = ("method", "staged", "input_shift", "fisher")
    assert [stored[name] for name in given] == ["sparsegpt", True, 0.25, False]


def test_a_warning_is_one_line(pruned, text, tmp_path):
    run = run_python(
        "import sys; from optimum_sparse.cli import main; sys.exit(main(sys.argv[1:]))",
        *prune_arguments(pruned, text, tmp_path / "out", "--method", "magnitude"),
    )
    assert run.returncode == 0
    (line,) = [line for line in run.stderr.splitlines() if "sparse already" in line]
    assert line.startswith("warning: the model is sparse already (sparsegpt, 2:4)")


def test_a_recipe_and_any_other_field(tiny_llama, text, tmp_path):
    settings = ["damping=0.02", "input_shift=0.25", "staged=false", 'denser={"dense": 0.1}', "block_name=model.layers"]
    more = ["--recipe", "fast", "--refine", "reconstruct", "--set", "reconstruction_passes=1"]
    more += [word for setting in settings for word in ("--set", setting)]
    assert main(prune_arguments(tiny_llama, text, tmp_path / "out", *more)) == 0
    stored = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    expected = dict(method="admm", refine="reconstruct", damping=0.02, input_shift=0.25, staged=False, fisher=True)
    expected |= dict(residual_shift=0.5, reconstruction_passes=1, denser={"dense": 0.1}, block_name="model.layers")
    assert {name: stored[name] for name in expected} == expected
    assert set(stored["allocated"].values()) == {"dense"}
    layers = json.loads((tmp_path / "out" / "sparsity_report.json").read_text())["layers"]
    assert all(layer["block_error"][1] <= layer["block_error"][0] for layer in layers if not layer["skipped"])
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_allocation_of_unstructured_sparsity(tiny_llama, text, tmp_path):
    more = ["--recipe", "paper", "--pattern", "unstructured", "--sparsity", "0.6", "--allocation", "owl"]
    assert main(prune_arguments(tiny_llama, text, tmp_path / "out", *more)) == 0
    stored = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert (stored["allocation"], stored["method"], stored["input_shift"]) == ("owl", "sparsegpt", 0)
    assert len(set(stored["allocated"].values())) == 2


def test_options_are_checked_together_with_the_recipe(tiny_llama, text, tmp_path):
    more = ["--recipe", "fast", "--method", "wanda", "--set", "input_shift=0.25"]  # refined by pcg
    assert main(prune_arguments(tiny_llama, text, tmp_path / "out", *more)) == 0


def test_processes_of_torchrun_prune_together(tiny_llama, text, tmp_path):
    def run(samples: int) -> subprocess.CompletedProcess:
        options = ["--device-map", "cpu", "--num-samples", str(samples)]
        arguments = prune_arguments(tiny_llama, text, tmp_path / "out", *options)
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        command = [*launch, "-m", "optimum_sparse", *arguments]
        quiet = os.environ | {"TQDM_DISABLE": "1"}
        return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, env=quiet)

    assert "error: 1 calibration sequences for 2 processes" in run(1).stderr
    assert [path.name for path in tmp_path.iterdir()] == []
    done = run(2)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("MB on disk") == 1  # the first process prints, and the other does not
    assert "Pruning:" not in done.stderr  # TQDM_DISABLE
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_eval_of_dense_and_compressed_agree(pruned, text, capsys):
    values = []
    for more in ([], ["--run-compressed"]):
        assert main(["eval", str(pruned), "--dataset", str(text), "--window", "64", "--json", *more]) == 0
        values.append(json.loads(capsys.readouterr().out.splitlines()[-1])["perplexity"])
    assert values[0] == pytest.approx(values[1], rel=1e-4)


def test_eval_of_what_does_not_fit_into_memory(pruned, text, tmp_path, monkeypatch, capsys):
    """Auto puts it on disk, where decoded weights have to be written first; they are gone with the model."""
    asked = ["eval", str(pruned), "--dataset", str(text), "--window", "32", "--max-windows", "2"]
    assert main(asked) == 0
    wanted = capsys.readouterr().out
    monkeypatch.setattr(placing, "get_max_memory", lambda *given: {"cpu": 30_000})
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert main(asked) == 0
    assert capsys.readouterr().out == wanted
    gc.collect()
    assert not list(tmp_path.iterdir())


def test_eval_puts_its_result_into_report_and_card(tiny_llama, pruned, text, tmp_path, capsys):
    out = tmp_path / "out"
    shutil.copytree(pruned, out)
    arguments = ["eval", str(out), "--dataset", str(text), "--window", "64", "--dense", str(tiny_llama), "--json"]
    for more in (["--run-compressed"], []):  # the second in place of the first
        assert main([*arguments, "--save", *more]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    (stored,) = json.loads((out / "sparsity_report.json").read_text())["quality"]
    assert (stored["value"], stored["dense"]) == (found["perplexity"], found["dense"]["perplexity"])
    row = f"| perplexity, {text.name} | {stored['dense']:.4g} | {stored['value']:.4g} ± "
    assert row in (out / "README.md").read_text()
    AutoModelForCausalLM.from_pretrained(out).save_pretrained(tmp_path / "again")
    assert row in (tmp_path / "again" / "README.md").read_text()


def test_eval_saves_nothing_to_a_dense_model_in_the_folder_of_a_sparse_one(pruned, text, tmp_path, capsys):
    shutil.copytree(pruned, tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    model.dequantize()
    model.save_pretrained(tmp_path / "out")  # report and card are still there
    before = files_of(tmp_path)
    assert main(["eval", str(tmp_path / "out"), "--dataset", str(text), "--window", "64", "--save"]) == 1
    assert "is not a sparse checkpoint" in capsys.readouterr().err
    assert files_of(tmp_path) == before


def test_eval_of_a_folder_without_a_tokenizer_says_how_to_get_one(pruned, text, tmp_path, capsys):
    shutil.copytree(pruned, tmp_path / "out", ignore=shutil.ignore_patterns("token*"))
    assert main(["eval", str(tmp_path / "out"), "--dataset", str(text)]) == 1
    assert "has no tokenizer that can be loaded, and text needs one: save that of the dense" in capsys.readouterr().err


def test_a_tokenizer_that_cannot_be_loaded_is_not_left_out_in_silence(pruned, tiny_llama, text, tmp_path, caplog):
    for source in (pruned, tiny_llama):
        shutil.copytree(source, tmp_path / source.name)
        (tmp_path / source.name / "tokenizer.json").write_text("{")
    assert main(["export", str(tmp_path / pruned.name), "--output", str(tmp_path / "dense")]) == 0
    assert "has no tokenizer that can be loaded: " in caplog.text
    caplog.clear()
    more = ["--method", "magnitude"]
    assert main(prune_arguments(tmp_path / tiny_llama.name, text, tmp_path / "out", *more)) == 0
    assert f"{tiny_llama.name} has no tokenizer that can be loaded: " in caplog.text


@pytest.mark.parametrize("change", [{"num_attention_heads": "x"}, {"hidden_size": 33}, {"quantization_config": "no"}])
def test_a_config_that_makes_no_sense_is_one_line(change, tiny_llama, text, tmp_path, capsys):
    shutil.copytree(tiny_llama, tmp_path / "model")
    stored = json.loads((tmp_path / "model" / "config.json").read_text()) | change
    (tmp_path / "model" / "config.json").write_text(json.dumps(stored))
    assert main(prune_arguments(tmp_path / "model", text, tmp_path / "out")) == 1
    assert f"error: the config.json of '{tmp_path / 'model'}' is not valid: " in capsys.readouterr().err


def test_eval_of_local_tasks_beside_the_dense_model(pruned, tiny_llama, tmp_path, capsys):
    rows = [{"context": f"w{i} w{i + 1}", "continuation": f"w{i + 2}"} for i in range(3, 9)]
    (tmp_path / "words.jsonl").write_text("\n".join(map(json.dumps, rows)))
    arguments = ["eval", str(pruned), "--dense", str(tiny_llama), "--tasks", str(tmp_path), "--max-items", "5"]
    assert main(arguments) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].split() == [str(pruned), str(tiny_llama)]
    assert re.fullmatch(r"words +\d\.\d{3} \+- \d\.\d{3} +\d\.\d{3} \+- \d\.\d{3}", printed[1])
    assert main([*arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["tasks"]["words"]["items"] == found["dense"]["tasks"]["words"]["items"] == 5


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_is_read_only_shows_before_any_work(pruned, text, tmp_path, capsys):
    shutil.copytree(pruned, tmp_path / "out")
    (tmp_path / "out").chmod(0o555)
    assert main(["eval", str(tmp_path / "out"), "--dataset", str(text), "--save"]) == 1
    assert capsys.readouterr().err.endswith("out cannot be written to; choose another.\n")


def test_sweep_writes_every_point_and_repeats_none(tiny_llama, text, tmp_path, capsys):
    data = ["--dataset", str(text), "--num-samples", "4", "--sequence-length", "32"]
    command = ["sweep", str(tiny_llama), "--output", str(tmp_path), *data, "--text", str(text), "--window", "64"]
    command += ["--methods", "magnitude", "fast", "--sparsities", "0.5", "--patterns", "2:4", "--set", "fisher=false"]
    item = {"query": "w5 w6 w7", "choices": ["w8", "w9"], "gold": 1}
    (tmp_path / "words.jsonl").write_text("\n".join([json.dumps(item), json.dumps(item | {"gold": 0})]))
    command += ["--tasks", str(tmp_path / "words.jsonl")]
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert all(word in printed for word in ("dense: perplexity", "dense: words 0.5", "magnitude", "fast", "2:4"))
    for point in SweepResult.load(tmp_path).points:
        assert point.measured["words"] == 0.5
    if importlib.util.find_spec("matplotlib"):
        assert {"sweep.png", "sweep-words.png"} <= {path.name for path in tmp_path.iterdir()}
    first = (tmp_path / "sweep.json").read_bytes()
    assert len((tmp_path / "sweep.csv").read_text().splitlines()) == 6
    assert main([*command, "--methods", "magnitude,fast", "--patterns=2:4,", "--sparsities", "0.50"]) == 0
    assert (tmp_path / "sweep.json").read_bytes() == first
    with pytest.raises(SystemExit):
        main([*command, "--sparsities", "0.5,half"])
    assert "--sparsities: could not convert string to float: 'half'" in capsys.readouterr().err
    assert main([*command, "--max-windows", "2"]) == 1
    assert "settings.max_windows was None and is 2" in capsys.readouterr().err


def test_sensitivity_writes_a_recipe_that_prune_takes(tiny_llama, text, tmp_path, capsys):
    data = ["--dataset", str(text), "--num-samples", "4", "--sequence-length", "32"]
    command = ["sensitivity", str(tiny_llama), "--output", str(tmp_path), *data, "--text", str(text), "--window", "64"]
    for more in (["--by", "perplexity", "--max-windows", "1"], []):
        assert main([*command, "--sparsities", "0.3", "0.7", "--allocate", "0.5", *more]) == 0
        assert "model.layers.0.mlp.down_proj" in capsys.readouterr().out
    recipe = ["--config", str(tmp_path / "recipe.json")]
    assert main(["prune", str(tiny_llama), "--output", str(tmp_path / "out"), *recipe]) == 0
    stored = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert stored["allocated"] == pytest.approx(json.loads((tmp_path / "recipe.json").read_text())["allocation"])


def test_info_counts_the_bytes_of_the_file(pruned, capsys):
    assert main(["info", str(pruned), "--layers"]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"model.layers.0.mlp.down_proj +32x64 +0.5000 +2:4 4:8 8:16 16:32 +8,192 ", printed)
    assert re.search(r"model.layers.\*.mlp.down_proj +2 +32x64 +0.5000 +2:4", printed)
    assert re.search(r"\nbitmask +\S+ +0.5312\n", printed)  # fp32: half, and a bit per weight
    contents = [file.read_bytes() for file in pruned.glob("*.safetensors")]
    payload = sum(len(content) - 8 - int.from_bytes(content[:8], "little") for content in contents)
    assert f"in all {payload / 1e6:,.1f} MB" in printed
    assert "run_compressed=True, here (c" in printed
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    assert select(device, torch.float32, NM(2, 4), (64, 64), 64).reason in printed


def test_export_is_an_ordinary_checkpoint(pruned, tmp_path):
    assert main(["export", str(pruned), "--output", str(tmp_path / "dense")]) == 0
    assert "quantization_config" not in json.loads((tmp_path / "dense" / "config.json").read_text())


def test_csr_export_says_that_it_is_larger_than_dense(tiny_llama, text, tmp_path, capsys):
    assert main(prune_arguments(tiny_llama, text, tmp_path / "out", "--dtype", "bfloat16")) == 0
    capsys.readouterr()
    assert main(["export", str(tmp_path / "out"), "--output", str(tmp_path / "csr"), "--format", "csr"]) == 0
    # a block has 9,216 weights in 256 rows of 7 matrices: 6 * 4,608 + 4 * 263 bytes, 18,432 dense, 10,368 as bitmask
    assert "1.56 of dense, 2.77 of bitmask" in capsys.readouterr().out


def test_info_of_a_dense_checkpoint(pruned, tmp_path, capsys):
    assert main(["export", str(pruned), "--output", str(tmp_path / "dense")]) == 0
    assert main(["info", str(tmp_path / "dense")]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"model.layers.\*.mlp.down_proj +2 +32x64 +0.5000 +2:4 4:8 8:16 16:32\n", printed)
    assert "64 tokens, 14 layers: " in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["prune", "MODEL", "--output", "OUT", "--pattern", "5:4"], "0 < N < M"),
        (
            ["prune", "MODEL", "--output", "OUT", "--dataset", "missing.jsonl", "--sequence-length", "9"],
            "no such file",
        ),
        (["prune", "MODEL", "--output", "OUT", "--layer", "down_proj"], "NAME=VALUE"),
        (["prune", "MODEL", "--output", "OUT", "--set", "damping"], "--set 'damping': must be NAME=VALUE"),
        (["prune", "MODEL", "--output", "OUT", "--set", "dampin=0.1"], "did you mean 'damping'"),
        (["prune", "MODEL", "--output", "OUT", "--recipe", "fast", "--set", "name=x"], "unknown key 'name'"),
        (["sweep", "MODEL", "--output", "OUT", "--set", "methods=1"], "did you mean 'method'"),
        (["sweep", "MODEL", "--output", "OUT", "--set", "sparsity=0.4"], "sparsity: differs from point to point"),
        (["prune", "MODEL", "--output", "OUT", "--set", "damping=much"], "damping='much': must be a number"),
        (["prune", "MODEL", "--output", "OUT", "--set", "staged=True"], "staged='True': must be True or False"),
        (["prune", "MODEL", "--output", "OUT", "--allocation", "owl"], "nothing to share out"),
        (["prune", "MODEL", "--output", "OUT", "--method", "wanda", "--set", "fisher=true"], "second-order method"),
        (["prune", "MODEL", "--output", "OUT", "--ignore", "no_such_layer"], "matches no module"),
        (["prune", "MODEL", "--output", "MODEL"], "not an empty folder"),
        (["prune", "MODEL", "--output", "MODEL/config.json/out"], "config.json is a file; choose another"),
        (["prune", "MODEL", "--output", "OUT", "--layer", "=4:8"], "--layer '=4:8': must be NAME=VALUE"),
        (["prune", "MODEL", "--output", "OUT", "--layer", "mlp=half"], "layers['mlp']: 'half' must be N:M such as"),
        (["prune", "MODEL", "--output", "OUT", "--targets", "qproj"], "did you mean 'q_proj'?"),
        (["prune", "MODEL", "--output", "OUT", "--device-map", "gpu"], "there is no device 'gpu' here"),
        (
            ["prune", "MODEL", "--output", "OUT", "--max-shard-size", "5G"],
            "max_shard_size='5G': must be a size such as",
        ),
        (["prune", "MODEL", "--output", "OUT", "--config", "MODEL/tokenizer.json"], "unknown key"),
        (
            ["prune", "MODEL", "--output", "OUT", "--config", "MODEL/model.safetensors"],
            "model.safetensors is not JSON",
        ),
        (["prune", "OUT/no", "--output", "OUT"], "there is no such folder, and it is no id on the hub"),
        (["eval", "OUT/no", "--dataset", "TEXT"], "there is no such folder, and it is no id on the hub"),
        (["eval", "MODEL", "--dense", "OUT/no", "--dataset", "no.txt"], "out/no': there is no such folder"),
        (["eval", "MODEL", "--dataset", "TEXT"], "sequences of 2048 tokens; the model takes 64: window=64 or less"),
        (["eval", "MODEL", "--dataset", "no.txt"], "dataset='no.txt': there is no such file"),
        (["sweep", "MODEL", "--output", "MODEL/config.json", "--text", "TEXT"], "is a file; choose another"),
        (["sensitivity", "MODEL", "--output", "OUT", "--allocate", "0.5"], "such as 0.3 and 0.7; there are 0.5"),
        (["sensitivity", "MODEL", "--output", "OUT", "--patterns", "3:5", "--dataset", "TEXT"], "multiples of M"),
        (["bench", "--device", "gpu"], "there is no device 'gpu' here"),
        (["bench", "--pattern", "3:5"], "needs a number of input columns that 5 divides, got 4096"),
        (["eval", "MODEL", "--save"], "must be the folder of a sparse checkpoint"),
        (["eval", "MODEL", "--tasks", "no_such.jsonl"], "no such file: 'no_such.jsonl'"),
        (["eval", "MODEL", "--tasks", "no_such_task"], "are no local .jsonl or .jsonl.gz files, so lm-eval"),
        (["info", "OUT"], "no folder with a config.json"),
        (["convert", "MODEL", "--output", "OUT"], "in none of the formats that are converted"),
        (["export", "MODEL", "--output", "OUT", "--format", "csr"], "not a sparse checkpoint"),
        (["export", "MODEL", "--output", "OUT"], "not a sparse checkpoint"),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(tiny_llama, text, tmp_path, capsys, arguments, message):
    places = {"MODEL": str(tiny_llama), "OUT": str(tmp_path / "out"), "TEXT": str(text)}
    for name, place in places.items():
        arguments = [re.sub(f"^{name}\\b", place, argument) for argument in arguments]
    assert main(arguments) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ")
    assert message in error
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("option", [["--dtype", "fp16"], ["--sparsity", "half"], ["--patern", "2:4"], []])
def test_what_argparse_refuses_is_no_page_of_options(option, tiny_llama, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["prune", str(tiny_llama), *(["--output", "out"] if option else []), *option])
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) <= 4
    assert "error: " in lines[-1]


def test_a_checkpoints_config_prunes_again_in_the_same_way(pruned, tiny_llama, tmp_path):
    assert (
        main(["prune", str(tiny_llama), "--output", str(tmp_path / "out"), "--config", f"{pruned}/config.json"]) == 0
    )
    names = [file.name for file in pruned.glob("*.safetensors")]
    assert all((tmp_path / "out" / name).read_bytes() == (pruned / name).read_bytes() for name in names)


def test_ctrl_c_is_no_traceback(tiny_llama, text, tmp_path, monkeypatch, capsys):
    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(streaming, "_prune", interrupt)
    assert main(prune_arguments(tiny_llama, text, tmp_path / "out")) == 130
    assert capsys.readouterr().err.splitlines()[-1] == "interrupted"
    assert not any(tmp_path.iterdir())


def test_module_and_optimum_cli_offer_the_same_commands():
    pytest.importorskip("optimum.commands.base")
    for command in (
        [sys.executable, "-m", "optimum_sparse"],
        [sys.executable, "-m", "optimum.commands.optimum_cli", "sparse"],
    ):
        printed = subprocess.run([*command, "--help"], capture_output=True, text=True, timeout=120).stdout
        names = ("prune", "eval", "sweep", "sensitivity", "info", "export", "convert", "bench")
        assert all(name in printed for name in names), printed


def test_an_interrupted_run_goes_on(tiny_llama, text, tmp_path, monkeypatch, caplog):
    wanted = tmp_path / "whole"
    assert main(prune_arguments(tiny_llama, text, wanted)) == 0
    save = streaming._save_part

    def full(model, journal, name, size):
        if name == "model.layers.1":
            raise OSError("the disk is full")
        return save(model, journal, name, size)

    with monkeypatch.context() as patch:
        patch.setattr(streaming, "_save_part", full)
        assert main(prune_arguments(tiny_llama, text, tmp_path / "out")) == 1
    assert "1 block done, and kept in" in caplog.text
    assert main(prune_arguments(tiny_llama, text, tmp_path / "out", "--set", "damping=0.5")) == 1
    assert main(prune_arguments(tiny_llama, text, tmp_path / "out")) == 0
    assert "going on from block 1" in caplog.text
    found, expected = files_of(tmp_path / "out"), files_of(wanted)
    assert [name for name in expected if found[name] != expected[name]] in ([], ["sparsity_report.json"])
    assert {path.name for path in tmp_path.iterdir()} == {"whole", "out"}
