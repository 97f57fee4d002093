"""Zero-shot scores against brute force: one item at a time, no padding, token by token."""

import gzip
import json
import sys
from types import SimpleNamespace

import pytest
import torch
from accelerate import cpu_offload
from models import make_config, make_model
from transformers import Gemma3Config

from optimum_sparse import Pruner
from optimum_sparse.evaluation import score_tasks
from optimum_sparse.evaluation.tasks import Continuation, _scores, _tokens, log_likelihoods
from optimum_sparse.hf.quantizer import compress


def words(first: int, count: int, step: int = 7) -> str:
    return " ".join(f"w{3 + (first + step * i) % 190}" for i in range(count))


def write(path, rows):
    text = "\n".join(map(json.dumps, rows)) + "\n\n"
    if path.suffix == ".gz":
        with gzip.open(path, "wt") as file:
            file.write(text)
    else:
        path.write_text(text)


@torch.no_grad()
def brute_force(model, ids, start):
    """log P(ids[start:] | ids[:start]), and whether a greedy writer would write it: a forward pass per token."""
    total, greedy = 0.0, True
    for place in range(start, len(ids)):
        scores = model(torch.tensor([ids[:place]])).logits[0, -1].double().log_softmax(-1)
        total += scores[ids[place]].item()
        greedy = greedy and int(scores.argmax()) == ids[place]
    return total, greedy


@pytest.fixture(scope="module", params=["llama", "gpt2", "mixtral", "mistral"])
def model(request):
    return make_model(request.param)


def test_batches_equal_one_by_one(model):
    generator = torch.Generator().manual_seed(0)
    continuations = []
    for length in (2, 3, 5, 5, 9, 17, 30):
        ids = torch.randint(3, 200, (length,), generator=generator).tolist()
        continuations += [Continuation(ids, 1), Continuation(ids, length - 1)]
    ids = torch.tensor([[5, 6, 7]])
    for _ in range(3):  # what the model itself writes
        ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], 1)
    continuations.append(Continuation(ids[0].tolist(), 3))
    expected = [brute_force(model, *continuation) for continuation in continuations]
    assert expected[-1][1]
    for batch_size in (1, 4, 100):
        likelihood, greedy = log_likelihoods(model, continuations, batch_size=batch_size)
        torch.testing.assert_close(likelihood, torch.tensor([e[0] for e in expected]).double(), rtol=1e-4, atol=1e-4)
        assert greedy.tolist() == [e[1] for e in expected]


def test_all_kinds_of_items(tokenizer, tmp_path):
    model = make_model("llama")

    def ids(text):
        return tokenizer(text)["input_ids"]

    def best(options):
        scores = [brute_force(model, ids(context + rest), len(ids(context.rstrip())))[0] for context, rest in options]
        return max(range(len(scores)), key=scores.__getitem__)

    right = {}
    rows = [
        {"query": f"Question: {words(i, 5)}\n", "choices": [words(i + c, 1 + c) for c in range(3)], "gold": i % 3}
        for i in range(11)
    ]
    write(tmp_path / "piqa.jsonl", rows)
    right["piqa"] = [
        best([(row["query"].rstrip("\n") + "\nAnswer: ", choice) for choice in row["choices"]]) == row["gold"]
        for row in rows
    ]
    rows = [
        {"query": words(i, 4), "choices": [words(i + c, 2) for c in range(4)], "gold": 3 * i % 4} for i in range(11)
    ]
    write(tmp_path / "hellaswag_val.jsonl.gz", rows)
    right["hellaswag_val"] = [
        best([(row["query"], " " + choice) for choice in row["choices"]]) == row["gold"] for row in rows
    ]
    rows = [
        {"context_options": [words(i, 4), words(i + 3, 2)], "continuation": words(i, 3), "gold": i % 2}
        for i in range(11)
    ]
    write(tmp_path / "winogrande.jsonl", rows)
    right["winogrande"] = [
        best([(option, " " + row["continuation"]) for option in row["context_options"]]) == row["gold"] for row in rows
    ]
    rows = []
    for i in range(11):
        written = model(torch.tensor([ids(words(i, 4))])).logits[0, -1].argmax().item()
        wanted = tokenizer.decode(written) if i % 3 else words(i, 1)
        rows.append({"context": words(i, 4), "continuation": wanted})
    write(tmp_path / "lambada.jsonl", rows)
    right["lambada"] = [brute_force(model, ids(f"{row['context']} {row['continuation']}"), 4)[1] for row in rows]
    assert 0 < sum(right["lambada"]) < 11
    model.train()
    scores = score_tasks(model, tokenizer, [str(tmp_path)], batch_size=3)
    assert model.training
    assert [score.task for score in scores] == ["hellaswag_val", "lambada", "piqa", "winogrande"]
    for score in scores:
        values = torch.tensor(right[score.task]).double()
        assert score.items == 11
        assert score.accuracy == pytest.approx(values.mean().item())
        assert score.standard_error == pytest.approx((values.std() / 11**0.5).item())
    one = score_tasks(model, tokenizer, [str(tmp_path / "piqa.jsonl")], max_items=1)[0]
    assert (one.items, one.accuracy) == (1, float(right["piqa"][0]))
    assert one.standard_error is None


def test_a_context_longer_than_the_model_loses_its_beginning(tokenizer, tmp_path):
    model = make_model("gpt2")  # 64 positions
    write(tmp_path / "a.jsonl", [{"context": words(0, 100), "continuation": "w5"}])
    ids = tokenizer(words(0, 100) + " w5")["input_ids"][-64:]
    expected = brute_force(model, ids, 63)[1]
    assert score_tasks(model, tokenizer, [str(tmp_path / "a.jsonl")])[0].accuracy == expected
    nested = SimpleNamespace(config=Gemma3Config(text_config={"max_position_embeddings": 64}))  # text and images
    assert _tokens(nested, tokenizer, words(0, 100), " w5").ids == ids
    write(tmp_path / "a.jsonl", [{"context": "w5", "continuation": words(0, 100)}])
    with pytest.raises(
        ValueError, match=r"a\.jsonl: the continuation .* has 100 tokens, its context 'w5' 1: .*the last 64"
    ):
        score_tasks(model, tokenizer, [str(tmp_path / "a.jsonl")])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2 is no item"),
        ("[]", "line 2 is no item"),
        ('{"query": "w5", "choices": ["w6"]}', "KeyError.'gold'"),
        ('{"query": "w5", "choices": ["w6"], "gold": 1}', "gold=1 of 1 choices"),
        ('{"query": "w5", "choices": ["w6"], "gold": "0"}', "gold='0' of 1"),
        ('{"query": 5, "choices": ["w6"], "gold": 0}', "line 2 is no item"),
        ('{"context": "w5", "continuation": ""}', "continuation ' ?' has 0 tokens"),
    ],
)
def test_malformed_items(line, message, tokenizer, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"context": "w5", "continuation": "w6"}\n' + line)
    with pytest.raises(ValueError, match=message):
        score_tasks(make_model("llama"), tokenizer, [str(tmp_path / "a.jsonl")])


def test_empty_and_missing_files(tokenizer, tmp_path):
    model = make_model("llama")
    (tmp_path / "a.jsonl").write_text("\n")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no items"):
        score_tasks(model, tokenizer, [str(tmp_path / "a.jsonl")])
    with pytest.raises(FileNotFoundError, match=r"holds no .jsonl"):
        score_tasks(model, tokenizer, [str(tmp_path / "empty")])
    with pytest.raises(ValueError, match="max_items=0: must be 1 or more"):
        score_tasks(model, tokenizer, [str(tmp_path / "a.jsonl")], max_items=0)


def test_what_lm_eval_returns():
    """Of accuracy and other metrics accuracy; a group without numbers of its own is left out. As 0.4.13 has it."""
    found = {
        "results": {
            "lambada_openai": {
                "name": "lambada_openai",
                "alias": "lambada_openai",
                "sample_len": 20,
                "perplexity,none": 9.0,
                "perplexity_stderr,none": 0.3,
                "acc,none": 0.5,
                "acc_stderr,none": 0.1,
            },
            "gsm8k": {"exact_match,strict-match": 0.25, "exact_match_stderr,strict-match": "N/A"},
            "group": {"alias": "a group", " ": " "},
        },
        "n-samples": {"lambada_openai": {"original": 100, "effective": 20}},
    }
    scores = _scores(found)
    assert [(s.task, s.accuracy, s.items, s.metric) for s in scores] == [
        ("lambada_openai", 0.5, 20, "acc"),
        ("gsm8k", 0.25, 0, "exact_match"),
    ]
    assert scores[0].standard_error == 0.1
    assert scores[1].standard_error is None


CHOICE = """
task: choice
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
test_split: test
output_type: multiple_choice
doc_to_text: query
doc_to_target: gold
doc_to_choice: choices
metric_list: [{metric: acc_norm}, {metric: acc}]
"""
LAST_WORD = """
task: last_word
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
test_split: test
output_type: loglikelihood
doc_to_text: context
doc_to_target: "{{' ' + continuation}}"
metric_list: [{metric: perplexity, aggregation: perplexity, higher_is_better: false}, {metric: acc}]
"""


@pytest.fixture
def lm_eval_tasks(tokenizer, tmp_path, monkeypatch):
    """The same items as local files and, over these files, as tasks in lm-eval's YAML."""
    pytest.importorskip("lm_eval")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    model = make_model("llama")
    choices = [{"query": words(i, 4), "choices": [words(i + c, 2) for c in range(4)], "gold": i % 4} for i in range(9)]
    last_words = []
    for i in range(9):
        written = model(torch.tensor([tokenizer(words(i, 4))["input_ids"]])).logits[0, -1].argmax().item()
        wanted = tokenizer.decode(written) if i % 3 else words(i, 1)
        last_words.append({"context": words(i, 4), "continuation": wanted})
    for name, rows, yaml in (("choice", choices, CHOICE), ("last_word", last_words, LAST_WORD)):
        write(tmp_path / f"{name}.jsonl", rows)
        (tmp_path / f"{name}.yaml").write_text(yaml.replace("FILE", str(tmp_path / f"{name}.jsonl")))
    return [str(tmp_path / name) for name in ("choice", "last_word")]


@pytest.mark.parametrize("held", ["dense", "compressed", "offloaded"])
def test_lm_eval_gives_the_scores_of_the_same_files(held, lm_eval_tasks, tokenizer, capsys):
    model = Pruner.from_pretrained(make_model("llama")).prune(make_config("magnitude"))
    if held == "compressed":
        compress(model, model.hf_quantizer.quantization_config)
    if held == "offloaded":
        cpu_offload(model, execution_device=torch.device("cpu"))
    model.train()
    ours = score_tasks(model, tokenizer, [f"{task}.jsonl" for task in lm_eval_tasks], max_items=7)
    theirs = score_tasks(model, tokenizer, [f"{task}.yaml" for task in lm_eval_tasks], max_items=7, batch_size=3)
    assert model.training
    assert [score.to_dict() for score in theirs] == [
        score.to_dict() | {"standard_error": pytest.approx(score.standard_error)} for score in ours
    ]
    assert ours[1].accuracy > 0
    assert not capsys.readouterr().out  # which is for results, as JSON


def test_a_name_that_lm_eval_does_not_know(tokenizer):
    pytest.importorskip("lm_eval")
    with pytest.raises(
        ValueError, match=r"tasks \['nonsense', 'none.yaml'\]: must be local .*`lm-eval ls tasks` lists"
    ):
        score_tasks(make_model("llama"), tokenizer, ["piqa", "nonsense", "none.yaml"])


def test_without_lm_eval(tokenizer, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ImportError, match=r"\['piqa'\] are no local .*optimum-sparse\[lm-eval\]"):
        score_tasks(make_model("llama"), tokenizer, ["piqa"])
