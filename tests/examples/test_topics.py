"""One example per topic: each runs as it is, on a tiny model, and does what it says."""

import json
import shutil

import hub_calls
import pytest
from helpers import load_example
from models import assert_pattern, linears_of
from transformers import AutoModelForCausalLM, AutoTokenizer


def assert_pruned(path) -> None:
    model = AutoModelForCausalLM.from_pretrained(path)
    for linear in linears_of(model.model.layers).values():
        assert_pattern(linear.weight, "2:4")


@pytest.mark.parametrize("name", ["prune_on_load", "larger_than_memory"])
def test_prunes_and_saves(name, tiny_llama, text, tmp_path, capsys):
    load_example(name).main(str(tiny_llama), str(tmp_path / "out"), str(text), samples=4, tokens=32)
    assert_pruned(tmp_path / "out")
    printed = capsys.readouterr().out
    assert "model.layers.*.mlp.down_proj" in printed
    assert ("model-00003-of-00003.safetensors" in printed) == (name == "larger_than_memory")


@pytest.mark.parametrize("pads", [True, False])
def test_own_data_is_calibrated_on_document_by_document(pads, tiny_llama, text, tmp_path):
    shutil.copytree(tiny_llama, tmp_path / "model")
    if not pads:
        path = tmp_path / "model" / "tokenizer_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"pad_token": None}))
        assert AutoTokenizer.from_pretrained(tmp_path / "model").pad_token is None
    words = text.read_text().split()
    (tmp_path / "documents.txt").write_text("\n\n".join(" ".join(words[:size]) for size in range(10, 40)))
    example = load_example("own_data")
    example.main(
        str(tmp_path / "model"), str(tmp_path / "documents.txt"), str(tmp_path / "out"), samples=20, tokens=32
    )
    assert_pruned(tmp_path / "out")
    stored = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert stored["dataset"] == "in memory: DataLoader"


def test_share_uploads_what_it_measured(tiny_llama, text, hub, client):
    client(hub_calls.run_example, "share", str(tiny_llama), "me/shared", str(text), str(text), 4, 32)
    card = hub.files("me/shared")["README.md"].decode()
    assert f"| perplexity, {text} | " in card


def test_serve_writes_and_exports(sparse_checkpoints, tmp_path, tokenizer, capsys):
    checkpoint = tmp_path / "sparse"
    model = AutoModelForCausalLM.from_pretrained(sparse_checkpoints["2:4"])
    model.save_pretrained(checkpoint)
    tokenizer.save_pretrained(checkpoint)
    load_example("serve").main(str(checkpoint), str(tmp_path / "dense"), prompt="w3 w5")
    printed = capsys.readouterr().out
    assert "w3 w5" in printed
    assert f"vllm serve {tmp_path / 'dense'}" in printed
    assert "quantization_config" not in json.loads((tmp_path / "dense" / "config.json").read_text())
    assert_pruned(tmp_path / "dense")


def test_evaluate_and_choose(tiny_llama, text, tmp_path, monkeypatch, capsys):
    example = load_example("evaluate_and_choose")
    arguments = str(tiny_llama), str(text), str(text), str(tmp_path / "out"), 4, 32
    monkeypatch.setattr(example, "ACCEPTED", 0.1)
    with pytest.raises(SystemExit, match="no point stays below"):
        example.main(*arguments)
    measured = (tmp_path / "out" / "sweep.json").read_text()
    monkeypatch.setattr(example, "ACCEPTED", 10.0)
    example.main(*arguments)
    printed = capsys.readouterr()
    assert (tmp_path / "out" / "sweep.json").read_text() == measured, "nothing is measured again"
    assert (tmp_path / "out" / "sweep.png").stat().st_size > 1000
    chosen = printed.out.split("chosen: ")[1].split(", ")[1].split("\n")[0]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "sparse")
    zeros = [float((linear.weight == 0).float().mean()) for linear in linears_of(model.model.layers).values()]
    assert sum(zeros) / len(zeros) == pytest.approx(0.5, abs=0.01), chosen
