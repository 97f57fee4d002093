"""Every snippet and every command in the README runs, one after the other, on a tiny model and little data.

Commands beside the measured numbers are parsed.
"""

import argparse
import re
import shlex
from pathlib import Path

import pytest

from optimum_sparse.cli import add_commands, main


README = Path(__file__).parents[2] / "README.md"
MEASURED = README.parent / "tests/benchmarks/README.md"
TEXT = README.read_text(encoding="utf-8")
SNIPPETS = re.findall(r"^```python\n(.*?)^```", TEXT, re.DOTALL | re.MULTILINE)


def commands(text: str) -> list[list[str]]:
    words = [" ".join(span.split()) for span in re.findall(r"(?<!`)`([^`]+)`(?!`)", text)]
    blocks = "".join(re.findall(r"^```bash\n(.*?)^```", text, re.DOTALL | re.MULTILINE)).splitlines()
    found = (
        re.match(r"(?:optimum-cli sparse|python -m optimum_sparse) (?!\.\.\.)(.+)", line) for line in (*blocks, *words)
    )
    return [shlex.split(command[1], comments=True) for command in found if command]


COMMANDS = commands(TEXT)
LINKS = [
    page.parent / link
    for page in (README, MEASURED)
    for link in sorted(set(re.findall(r"\]\(([\w./]+)(?:#[\w-]+)?\)", page.read_text(encoding="utf-8"))))
]


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


def test_commands_have_the_options_that_they_name():
    assert len(COMMANDS) >= 12
    measured = commands(MEASURED.read_text(encoding="utf-8"))
    assert len(measured) >= 2
    for command in (*COMMANDS, *measured):
        parser = argparse.ArgumentParser()
        add_commands(parser)
        assert parser.parse_args(command).run_sparse is not None


def test_commands_run(tiny_llama, text, tmp_path, monkeypatch):
    """But those that need the Hub, a checkpoint of another package, or minutes."""
    monkeypatch.chdir(tmp_path)
    Path("tasks.jsonl").write_text('{"context": "w3", "continuation": "w4"}\n')
    smaller = {"org/model": str(tiny_llama), "c4": str(text), "wikitext2": str(text), "piqa": "tasks.jsonl"}
    data = ["--dataset", str(text), "--num-samples", "4", "--sequence-length", "32"]
    windows = ["--window", "64"]
    more = {"prune": data, "eval": windows, "sweep": [*data, "--text", str(text), *windows]}
    more["sensitivity"] = more["sweep"]
    for command in COMMANDS:
        if command[0] in ("bench", "convert") or "--push-to-hub" in command:
            continue
        words = [smaller.get(word, word) for word in command if word != "lambada_openai"]
        words += ["--dataset", str(text)] if command[0] == "eval" and "--dataset" not in words else []
        assert main([*words, *more.get(command[0], [])]) == 0
    assert {"out", "dense", "results"} <= {path.name for path in tmp_path.iterdir()}


@pytest.mark.parametrize("path", LINKS, ids=lambda path: path.name)
def test_files_that_they_link_to_exist(path):
    assert path.exists()
