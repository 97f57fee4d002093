"""For every test: no network, one thread, quiet. Fixtures with models that several test files use."""

import os


os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.pop("TQDM_DISABLE", None)  # progress is tested, too

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import transformers
from hub import Client, Hub
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from optimum_sparse.kernels import precision


transformers.utils.logging.disable_progress_bar()
precision._multiplies_bf16 = lambda device: (
    False
)  # the same arithmetic on every device; tests/kernels asks for the other one
torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs CUDA"))


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """One token per word, of the words w3, w4 ... w199."""
    words = {"<s>": 0, "</s>": 1, "<pad>": 2} | {f"w{index}": index for index in range(3, 200)}
    backend = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<pad>"
    )


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    """A dense Llama with tied embeddings and its tokenizer, on disk. Read only."""
    from models import make_model

    folder = tmp_path_factory.mktemp("tiny-llama")
    make_model("llama-tied").save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A .txt file of a few thousand words that the tiny tokenizer knows."""
    path = tmp_path_factory.mktemp("text") / "words.txt"
    path.write_text(" ".join(f"w{3 + 7 * i % 190}" for i in range(3000)))
    return path


@pytest.fixture(scope="session")
def sparse_checkpoints(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> dict[str, Path]:
    """The same model pruned by magnitude, one checkpoint per pattern. Read only."""
    from models import make_config

    from optimum_sparse import Pruner

    folders = {}
    for pattern in ("2:4", "unstructured"):
        folders[pattern] = tmp_path_factory.mktemp(f"sparse-{pattern.replace(':', '-')}")
        Pruner.from_pretrained(tiny_llama).prune(make_config("magnitude", pattern)).save_pretrained(folders[pattern])
    return folders


@pytest.fixture(scope="session")
def hub() -> Iterator[Hub]:
    """A Hub on loopback; every test uses repositories of its own."""
    server = Hub()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="session")
def client(hub: Hub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    """Calls functions of `hub_calls` in a process that knows this Hub."""
    client = Client(hub, tmp_path_factory.mktemp("hf-home"))
    yield client
    client.close()
