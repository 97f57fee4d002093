"""Every snippet of Python in the README runs, one after the other, on a tiny model and little data."""

import re
from pathlib import Path

import pytest


README = Path(__file__).parents[2] / "README.md"
TEXT = README.read_text(encoding="utf-8")
SNIPPETS = re.findall(r"^```python\n(.*?)^```", TEXT, re.DOTALL | re.MULTILINE)
LINKS = sorted(set(re.findall(r"\]\(([\w./]+)\)", TEXT)))


def test_snippets_run(tiny_llama, text, tmp_path, monkeypatch):
    smaller = {
        '"org/model"': repr(str(tiny_llama)),
        'dataset="c4"': f"dataset={str(text)!r}",
        "num_samples=128": "num_samples=4",
        "sequence_length=2048": "sequence_length=32",
    }
    assert len(SNIPPETS) >= 3
    scope: dict = {}
    for number, snippet in enumerate(SNIPPETS):
        for name, value in smaller.items():
            snippet = snippet.replace(name, value)
        (tmp_path / str(number)).mkdir()
        monkeypatch.chdir(tmp_path / str(number))  # each may write a folder "out"
        exec(compile(snippet, f"README.md, snippet {number + 1}", "exec"), scope)
    assert scope["small"].hf_quantizer.report.pruned


@pytest.mark.parametrize("name", LINKS)
def test_files_that_it_links_to_exist(name):
    assert (README.parent / name).exists()
