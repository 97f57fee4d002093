"""Texts and tokens to batches: packed, full, seeded, and refused when there is too little."""

import json
import random
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader

from optimum_sparse import SparsityConfig
from optimum_sparse.calibration import calibration_batches, load_documents, pack


EOS = 0
TEXTS = [" ".join([f"{number}"] * (number % 4 + 1)) for number in range(1, 60)]  # "1 1", "2 2 2", "3 3 3 3", "4" ...


class Words:
    """A token per word: the number that it is."""

    eos_token_id: int | None = EOS

    def __call__(self, text: str, **options) -> dict[str, list[int]]:
        assert options.get("add_special_tokens") is False, "special tokens would be packed into the middle of the text"
        return {"input_ids": [int(word) for word in text.split()]}


class WordsWithoutEnd(Words):
    eos_token_id = None


def batches_of(dataset, tokenizer=None, *, samples=4, tokens=8, batch_size=3, seed=0, sample=None):
    return calibration_batches(
        dataset,
        tokenizer or Words(),
        num_samples=samples,
        sequence_length=tokens,
        batch_size=batch_size,
        seed=seed,
        sample=sample,
    )


def ids_of(*args, **kwargs) -> torch.Tensor:
    return torch.cat([batch["input_ids"] for batch in batches_of(*args, **kwargs)])


# ---- packing


def test_documents_are_packed_with_an_end_of_text_token_after_each():
    ids = pack(["1 2 3", "4", "5 6"], Words(), num_samples=3, sequence_length=3, source="")
    assert ids.tolist() == [[1, 2, 3], [EOS, 4, EOS], [5, 6, EOS]]
    assert ids.dtype == torch.int64


def test_a_tokenizer_without_end_of_text():
    ids = pack(["1 2 3", "4", "5 6 7"], WordsWithoutEnd(), num_samples=3, sequence_length=2, source="")
    assert ids.tolist() == [[1, 2], [3, 4], [5, 6]]


def test_no_more_documents_are_read_than_needed():
    def endless():
        yield from ["1 2", "3 4"]
        raise AssertionError("read on")

    assert pack(endless(), Words(), num_samples=1, sequence_length=5, source="").tolist() == [[1, 2, EOS, 3, 4]]


def test_windows_are_full_and_batches_have_the_asked_size():
    batches = batches_of(TEXTS, samples=7, tokens=5, batch_size=3)
    assert [batch["input_ids"].shape for batch in batches] == [(3, 5), (3, 5), (1, 5)]
    assert all(set(batch) == {"input_ids"} for batch in batches), "nothing is padded, so there is no mask"


def test_batch_size_does_not_change_the_tokens():
    assert torch.equal(ids_of(TEXTS, batch_size=1), ids_of(TEXTS, batch_size=100))


def test_every_packed_document_is_whole_and_from_the_list():
    packed = ids_of(TEXTS, samples=5, tokens=10).flatten().tolist()
    documents = " ".join(map(str, packed)).split(f" {EOS}")[:-1]
    assert len(documents) > 5
    assert {document.strip() for document in documents} <= set(TEXTS)


# ---- seeds


def test_a_seed_chooses_documents():
    first, again, other = (ids_of(TEXTS, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_choosing_does_not_touch_global_random_numbers_or_the_list():
    texts = list(TEXTS)
    random.seed(5)
    torch.manual_seed(5)
    expected = random.Random(5).random(), torch.Generator().manual_seed(5).get_state()
    ids_of(texts, seed=3)
    assert texts == TEXTS
    assert random.random() == expected[0]
    assert torch.equal(torch.get_rng_state(), expected[1])


# ---- too little


@pytest.mark.parametrize("count", [0, 1, 3])
def test_too_few_tokens_says_how_many_there_are_and_are_needed(count: int):
    texts = ["7 7 7"] * count
    with pytest.raises(
        ValueError, match=rf"list of {count} texts has {4 * count} tokens.* num_samples=4 .*=8 needs 32"
    ):
        batches_of(texts)


@pytest.mark.parametrize("shape", [(3, 8), (4, 7), (100, 7), (3, 100)])
def test_a_tensor_with_too_few_rows_or_columns(shape: tuple[int, int]):
    with pytest.raises(
        ValueError, match=rf"\[{shape[0]}, {shape[1]}\].* has {min(shape[0], 4) * min(shape[1], 8)} tok"
    ):
        batches_of(torch.ones(shape, dtype=torch.int64))


def test_text_without_a_tokenizer():
    with pytest.raises(ValueError, match="needs a tokenizer"):
        calibration_batches(TEXTS, None, num_samples=1, sequence_length=1, batch_size=1, seed=0)


# ---- token ids


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8])
def test_token_ids_are_taken_from_the_beginning(dtype: torch.dtype):
    ids = torch.arange(6 * 10).reshape(6, 10)
    taken = ids_of(ids.to(dtype))
    assert torch.equal(taken, ids[:4, :8])
    assert taken.dtype == torch.int64


@pytest.mark.parametrize(
    "ids", [torch.ones(40), torch.ones(40, dtype=torch.int64), torch.ones(4, 8), torch.ones(4, 8) > 0]
)
def test_tensors_that_are_no_token_ids(ids: torch.Tensor):
    with pytest.raises(ValueError, match=r"token ids must be integers \[samples, tokens\]"):
        batches_of(ids)


# ---- files


def test_a_txt_file_is_one_document(tmp_path: Path):
    path = tmp_path / "text.txt"
    path.write_text("1 2\n\n3 4\n" * 10)
    assert list(load_documents(str(path), "train", 0)) == ["1 2\n\n3 4\n" * 10]
    assert ids_of(str(path), samples=2, tokens=3).tolist() == [[1, 2, 3], [4, 1, 2]]


@pytest.fixture
def no_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def jsonl(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.usefixtures("no_cache")
def test_a_parquet_file_is_read_like_a_jsonl_file(tmp_path: Path):
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_list([{"text": text} for text in TEXTS]).to_parquet(tmp_path / "rows.parquet")
    rows = jsonl(tmp_path / "rows.jsonl", [{"text": text} for text in TEXTS])
    assert torch.equal(ids_of(str(tmp_path / "rows.parquet")), ids_of(rows))


@pytest.mark.usefixtures("no_cache")
def test_a_jsonl_file_has_a_document_per_row(tmp_path: Path):
    path = jsonl(tmp_path / "rows.jsonl", [{"text": text, "source": "web"} for text in TEXTS])
    assert list(load_documents(path, "train")) == TEXTS
    assert sorted(load_documents(path, "train", 1)) == sorted(TEXTS)
    assert torch.equal(ids_of(path, seed=1), ids_of(path, seed=1))
    assert not torch.equal(ids_of(path, seed=1), ids_of(path, seed=2))
    with pytest.raises(ValueError, match=r"rows\.jsonl' has \d+ tokens.* needs 8,000"):
        batches_of(path, samples=1000)


@pytest.mark.usefixtures("no_cache")
def test_the_only_column_of_strings_is_the_text_and_two_are_a_question(tmp_path: Path):
    path = jsonl(tmp_path / "one.jsonl", [{"content": "1 2", "id": 3}])
    assert list(load_documents(path, "train")) == ["1 2"]
    path = jsonl(tmp_path / "two.jsonl", [{"question": "1", "answer": "2"}])
    with pytest.raises(ValueError, match=r"two\.jsonl: needs a column 'text'.* it has \['question', 'answer'\]"):
        list(load_documents(path, "train"))
    path = jsonl(tmp_path / "none.jsonl", [{"id": 3}])
    with pytest.raises(ValueError, match=r"none\.jsonl: needs a column 'text'"):
        list(load_documents(path, "train"))


def test_files_that_are_missing_or_of_another_kind(tmp_path: Path):
    pytest.importorskip("datasets")
    with pytest.raises(FileNotFoundError, match="there is no such file"):
        batches_of(str(tmp_path / "missing.jsonl"))
    other = tmp_path / "weights.safetensors"
    other.write_bytes(b"")
    for path in (other, tmp_path):
        with pytest.raises(ValueError, match=r"must be a \.txt, \.jsonl or \.parquet file"):
            batches_of(str(path))


@pytest.mark.parametrize("name", ["missing.txt", "missing.raw"])
def test_a_text_file_that_is_missing_is_not_looked_for_on_the_hub(name: str, tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=rf"{name}': there is no such file"):
        batches_of(str(tmp_path / name))


@pytest.mark.usefixtures("no_cache")
@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"\xff\xfe", "must be text in UTF-8"),
        ("a.jsonl", b"no json", "cannot be read as json, or is empty"),
        ("a.jsonl", b"", "cannot be read as json, or is empty"),
        ("a.parquet", b"x", "cannot be read as parquet, or is empty"),
    ],
)
def test_damaged_files_are_named(name: str, content: bytes, message: str, tmp_path: Path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"{name}'.* {message}|{name}': {message}"):
        batches_of(str(tmp_path / name))


def test_a_recipe_of_data_that_was_in_memory_says_so():
    stored = SparsityConfig(dataset=TEXTS).to_dict()["dataset"]
    with pytest.raises(ValueError, match=r"59 texts.* made with data that was in memory.* give the data again"):
        batches_of(stored)


# ---- batches that are given


def test_a_loader_gives_its_batches_as_they_are():
    rows = [{"input_ids": torch.arange(5) + i, "attention_mask": torch.tensor([1, 1, 1, 1, i % 2])} for i in range(4)]
    batches = batches_of(DataLoader([row | {"labels": torch.zeros(5)} for row in rows], batch_size=3), samples=4)
    assert [set(batch) for batch in batches] == [{"input_ids", "attention_mask"}] * 2
    for name in ("input_ids", "attention_mask"):
        assert torch.equal(torch.cat([batch[name] for batch in batches]), torch.stack([row[name] for row in rows]))


def test_tensors_as_batches():
    ids = torch.arange(12).reshape(4, 3)
    assert torch.equal(ids_of(DataLoader(ids, batch_size=2)), ids)
    assert torch.equal(ids_of(iter([ids[:1], ids[1:]])), ids)


IDS = torch.ones(2, 3, dtype=torch.int64)


@pytest.mark.parametrize(
    ("batch", "text"),
    [
        (IDS[0], r"integer token ids \[batch, tokens\]"),
        (IDS.float(), "integer token ids"),
        (IDS[:0], "integer token ids"),
        ([IDS], "integer token ids"),
        (IDS.tolist(), "integer token ids"),
        ("text", "integer token ids"),
        (3, "integer token ids"),
        ({}, "integer token ids"),
        ({"attention_mask": IDS}, "integer token ids"),
        ({"input_ids": IDS.tolist()}, "integer token ids"),
        ({"input_ids": IDS.float()}, "integer token ids"),
        ({"input_ids": IDS, "attention_mask": IDS[:, 1:]}, r"attention_mask must .* \[2, 3\]"),
        ({"input_ids": IDS, "attention_mask": IDS[:, None]}, "attention_mask must"),
        ({"input_ids": IDS, "attention_mask": None}, "attention_mask must"),
        ({"input_ids": IDS, "attention_mask": IDS * 2}, "attention_mask must be 1 for tokens and 0 for padding"),
        ({"input_ids": IDS, "attention_mask": IDS * -torch.inf}, "attention_mask must be 1 for tokens"),
    ],
    ids=str,
)
def test_bad_batches_are_refused(batch, text: str):
    with pytest.raises(ValueError, match=text):
        batches_of([{"input_ids": IDS}, batch])


def test_a_mask_that_leaves_no_token_is_refused():
    batches = [{"input_ids": IDS, "attention_mask": IDS * 0}] * 2
    with pytest.raises(ValueError, match="0 everywhere: no token is left"):
        batches_of(batches)
    assert len(batches_of([*batches[:1], {"input_ids": IDS}])) == 2


def test_a_dict_of_tensors_is_one_batch():
    (batch,) = batches_of({"input_ids": IDS})
    assert torch.equal(batch["input_ids"], IDS)


def test_a_loader_without_batches():
    with pytest.raises(ValueError, match="has no batches"):
        batches_of(DataLoader(IDS[:0]))


# ---- self


def test_self_asks_the_model_for_its_own_text():
    asked = []

    def sample(samples: int, tokens: int, seed: int) -> torch.Tensor:
        asked.append((samples, tokens, seed))
        return torch.arange(samples * tokens).reshape(samples, tokens)

    ids = torch.cat(
        [
            batch["input_ids"]
            for batch in calibration_batches(
                "self", None, num_samples=4, sequence_length=8, batch_size=3, seed=11, sample=sample
            )
        ]
    )
    assert asked == [(4, 8, 11)]
    assert torch.equal(ids, torch.arange(32).reshape(4, 8))
    with pytest.raises(ValueError, match="there is none here"):
        batches_of("self")
