"""What a user does with a Hub: called in the process of `hub.Client`, so each takes and gives what can be pickled."""

import contextlib
import io
import logging
import os
from pathlib import Path
from typing import Any
from unittest import mock

import huggingface_hub
from helpers import load_example
from models import assert_same_weights, make_config, make_model
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from optimum_sparse import Pruner
from optimum_sparse.cli import main
from optimum_sparse.hf.checkpoint import inspect
from optimum_sparse.nn import SparseLinear


class Messages(logging.Handler):
    """What the package logged while it is entered."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.found.append(record.getMessage())

    def __enter__(self) -> list[str]:
        logging.getLogger("optimum_sparse").addHandler(self)
        return self.found

    def __exit__(self, *args: Any) -> None:
        logging.getLogger("optimum_sparse").removeHandler(self)


def push(way: str, path: str, repo_id: str, pattern: str = "2:4", **options: Any) -> tuple[str, list[str]]:
    """Prune the model at `path`, and upload it. Returns the commit's id, and what was logged."""
    pruner = Pruner.from_pretrained(path)
    folder = Path(os.environ["HF_HOME"], repo_id)
    with Messages() as found:
        if way == "from disk to disk":
            pruner.prune_to_disk(make_config("magnitude", pattern), folder)
            return pruner.push_to_hub(repo_id, **options).oid, found
        model = pruner.prune(make_config("magnitude", pattern))
        if way == "pruner":
            return pruner.push_to_hub(repo_id, **options).oid, found
        if way == "model":
            return model.push_to_hub(repo_id, **options).oid, found
        folder.mkdir(parents=True)
        (folder / "notes.txt").write_text("not to be uploaded")
        model.save_pretrained(folder, push_to_hub=True, repo_id=repo_id, **options)
        return "", found


def load(path: str, repo_id: str, pattern: str = "2:4") -> dict[str, Any]:
    """Load `repo_id` in all ways, and check that it is the model at `path`, pruned."""
    wanted = Pruner.from_pretrained(path).prune(make_config("magnitude", pattern))
    again = AutoModelForCausalLM.from_pretrained(repo_id)
    assert_same_weights(again, wanted)
    small = AutoModelForCausalLM.from_pretrained(repo_id, run_compressed=True)
    assert any(isinstance(module, SparseLinear) for module in small.modules())
    ids = AutoTokenizer.from_pretrained(repo_id)("w3 w5")["input_ids"]
    report = again.hf_quantizer.report
    return {"ids": ids, "layers": len(report.pruned), "base_model": report.base_model}


def load_with(repo_id: str, pruning: bool, options: dict[str, Any]) -> int:
    """Load with these options and no token in the environment; how many layers its report has.

    pruning: on load, by calibration text, which takes the tokenizer from the Hub.
    """
    text = [" ".join(f"w{3 + (7 * i + j) % 190}" for j in range(64)) for i in range(16)]
    if pruning:
        options["sparsity_config"] = make_config("wanda", dataset=text, sequence_length=16)
    with mock.patch.dict(os.environ, {"HF_TOKEN": ""}):
        report = AutoModelForCausalLM.from_pretrained(repo_id, **options).hf_quantizer.report
    return 0 if report is None else len(report.pruned)


def tokenizer_with(repo_id: str, tokenizer_id: str, options: dict[str, Any]) -> list[int]:
    """Of a Pruner, made with these options and no token in the environment: ids of two words."""
    with mock.patch.dict(os.environ, {"HF_TOKEN": ""}):
        return Pruner.from_pretrained(repo_id, tokenizer_id, **options).tokenizer("w3 w5")["input_ids"]


def push_again(repo_id: str, new_id: str) -> str:
    """Upload what was loaded from the Hub; then load and save that. Returns its card."""
    model = AutoModelForCausalLM.from_pretrained(repo_id)
    model.push_to_hub(new_id)
    folder = Path(os.environ["HF_HOME"], "again", new_id)
    AutoModelForCausalLM.from_pretrained(new_id).save_pretrained(folder)
    inspect(str(folder))
    return (folder / "README.md").read_text()


def prune_from_hub(repo_id: str, new_id: str) -> None:
    """Load a dense model from the Hub by the command line's way, prune it, and upload it."""
    folder = Path(os.environ["HF_HOME"], new_id)
    assert main(["prune", repo_id, "--method", "magnitude", "-o", str(folder), "--push-to-hub", new_id]) == 0


def upload_dense(repo_id: str, path: str) -> None:
    huggingface_hub.create_repo(repo_id)
    huggingface_hub.upload_folder(repo_id=repo_id, folder_path=path)


def push_tokenizer(repo_id: str, path: str) -> None:
    """One with another chat template."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(path)
    tokenizer.chat_template = "mine"
    tokenizer.push_to_hub(repo_id)


def write_file(repo_id: str, name: str, content: str) -> None:
    huggingface_hub.create_repo(repo_id, exist_ok=True)
    huggingface_hub.upload_file(repo_id=repo_id, path_in_repo=name, path_or_fileobj=content.encode())


def refused(repo_id: str, environment: dict[str, str], constants: dict[str, Any], *arguments: str) -> tuple[str, str]:
    """The error of a model's push_to_hub, or of these arguments of the command line, with another environment."""
    model = None if arguments else Pruner.from_pretrained(make_model("llama")).prune(make_config("magnitude"))
    with mock.patch.dict(os.environ, environment), mock.patch.dict(vars(huggingface_hub.constants), constants):
        try:
            if model is None:
                said = io.StringIO()
                with contextlib.redirect_stderr(said):
                    code = main([*arguments, "--push-to-hub", repo_id])
                return str(code), said.getvalue().splitlines()[-1]
            model.push_to_hub(repo_id)
        except Exception as error:
            return type(error).__name__, str(error)
    return "", ""


def run_example(name: str, *arguments: Any) -> Any:
    return load_example(name).main(*arguments)
