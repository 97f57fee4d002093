"""The model card, and what goes to the Hub and comes back."""

import json
import shutil

import hub_calls
import pytest
from huggingface_hub import ModelCard
from models import assert_same_weights, files_of, make_config, make_model, token_ids
from transformers import AutoModelForCausalLM

from optimum_sparse import Pruner, SparsityConfig
from optimum_sparse.hf.checkpoint import REPORT_FILE, inspect
from optimum_sparse.hf.hub import BEGIN, END, make_card, merge
from optimum_sparse.report import LayerReport, Measurement, PruningReport


HERE = "folder-or-id-of-the-dense-model"


def card_of(config: SparsityConfig | None = None, **report) -> str:
    layers = [LayerReport("model.layers.0.q_proj", [8, 16], "2:4", 0.5)]
    found = PruningReport(**{"layers": layers, "method": "SparseGPT", **report})
    stored = (config or SparsityConfig()).resolved(second_order=found.method == "SparseGPT")
    return make_card(stored, found, {})


def code_of(card: str, under: str) -> str:
    """The first block of Python after a heading."""
    return card.split(f"## {under}")[1].split("```python\n")[1].split("```")[0]


# ---- the card


def test_says_what_it_is_and_how_to_load_it(sparse_checkpoints):
    for pattern, folder in sparse_checkpoints.items():
        card = ModelCard.load(folder / "README.md")
        assert card.data.tags == ["sparse", "optimum-sparse", pattern]
        assert card.data.library_name == "transformers"
        assert card.data.get("base_model") is None  # it came from a folder, which is nobody's business
        assert "tiny-llama" not in card.text
        assert "import optimum_sparse  # needed" in card.text
        assert "optimum-cli sparse export" in card.text
        assert "model.layers.*.mlp.down_proj" in card.text
        exec(code_of(card.text, "Load").replace("folder-or-id-of-this-model", str(folder)), {})


def test_sizes_are_those_of_the_files(sparse_checkpoints, tiny_llama):
    for folder in sparse_checkpoints.values():
        info = inspect(str(folder))
        stored, dense = (sum(matrix[i] for matrix in info.matrices.values()) for i in (2, 3))
        text = (folder / "README.md").read_text()
        assert f"| pruned matrices | {dense:,} | {stored:,} |" in text
        assert f"| whole checkpoint | {dense + info.other_bytes:,} | {stored + info.other_bytes:,} |" in text


@pytest.mark.parametrize(
    "config",
    [
        dict(method="sparsegpt", ignore=["q_proj"], layers={"down_proj": "4:8"}, damping=0.02, fisher=False),
        dict(method="wanda", pattern="unstructured", sparsity=0.6, refine="pcg"),
        dict(method="magnitude", pattern="1:4"),
        dict(method="admm", pattern="unstructured", allocation="error"),
    ],
)
def test_the_config_line_gives_the_same_model(config, tmp_path):
    model = Pruner.from_pretrained(make_model("llama")).prune(make_config(**config))
    model.save_pretrained(tmp_path / "first")
    lines = code_of((tmp_path / "first" / "README.md").read_text(), "How it was made").splitlines()
    assert lines[2].startswith("data = ...  # in memory: tokens [6, 24]")
    assert "staged" not in lines[3]  # what every method of its kind does is not said
    assert lines[4] == f'Pruner.from_pretrained({HERE!r}).prune(config, dataset=data).save_pretrained("out")'
    scope = {"data": token_ids(), "model": make_model("llama")}
    exec("\n".join([*lines[:2], *lines[3:]]).replace(repr(HERE), "model").replace('"out"', repr(str(tmp_path))), scope)
    assert_same_weights(scope["model"], model)
    again = scope["model"]
    again.save_pretrained(tmp_path / "second")
    assert (tmp_path / "first" / "README.md").read_bytes() == (tmp_path / "second" / "README.md").read_bytes()


def test_a_method_of_ones_own_and_data_by_name_are_named():
    card = card_of(method="Saliency", base_model="org/model")
    assert "Pruner.from_pretrained('org/model').prune(config, method=method).save_pretrained(\"out\")" in card
    assert "method = ...  # an object of its author's own, Saliency" in card
    assert "config = SparsityConfig(pattern='2:4')" in card
    assert ModelCard(card).data.base_model == "org/model"
    files = [(f"/home/me/a{kind}", f"a{kind}") for kind in (".jsonl", ".json", ".json.gz", ".txt", ".raw", ".parquet")]
    for dataset, said in (("wikitext2", "wikitext2"), ("org/name:en", "org/name:en"), *files):
        assert f"dataset={said!r}" in card_of(SparsityConfig(dataset=dataset))


def test_measured_quality_is_in_the_report_and_in_the_card():
    report = PruningReport([LayerReport("model.layers.0.q_proj", [8, 16], "2:4", 0.5)], method="Wanda")
    for value in (21.0, 20.5):  # the second in place of the first
        report.measured(Measurement("perplexity", "wikitext2", value, 0.25, 13.35, "8 windows"))
    report.measured(Measurement("accuracy", "lambada", 0.31))
    assert PruningReport.from_dict(json.loads(report.to_json())) == report
    card = make_card(SparsityConfig(), report, {})
    assert "| perplexity, wikitext2 | 13.35 | 20.5 ± 0.25 | 8 windows |" in card
    assert "| accuracy, lambada | - | 0.31 |  |" in card
    assert "21" not in card.split("## Quality")[1].split("## ")[0]
    assert "## Quality" not in card_of()


def test_reports_of_before_can_be_read():
    assert PruningReport.from_dict({"layers": [], "seconds": {}, "method": "Wanda"}).quality == []


MINE = f"""---
license: mit
# a remark
tags: [mine, "4:8", optimum-sparse]
base_model: me/other
---
# My model

Before.

{BEGIN}
old
{END}

After, with \\1 and 2:4.\r
"""


def test_text_outside_of_the_marks_is_kept():
    merged = merge(MINE, card_of(base_model="org/model"))
    before, after = (text.split("---\n", 2)[-1] for text in (MINE, merged))
    assert after.split(BEGIN)[0] == before.split(BEGIN)[0]
    assert after.split(END)[1] == before.split(END)[1]
    assert "## Load" in after
    assert "\nold\n" not in after
    data = ModelCard(merged).data
    assert data.tags == ["mine", "optimum-sparse", "sparse", "2:4"]  # 4:8 is what it was before
    assert (data.license, data.base_model, data.library_name) == ("mit", "me/other", "transformers")
    assert merge(merged, card_of(base_model="org/model")) == merged


def test_metadata_that_lacks_nothing_is_kept_to_the_byte():
    complete = MINE.replace('"4:8", optimum-sparse]', 'sparse, "2:4", optimum-sparse]\nlibrary_name: other')
    merged = merge(complete, card_of())
    assert merged.split(BEGIN)[0] == complete.split(BEGIN)[0]


@pytest.mark.parametrize("broken", ["---\na: [\n---\n", "---\n- a\n---\n"])
def test_metadata_that_cannot_be_read_is_kept(broken, caplog):
    text = MINE.replace(MINE.split("# My model")[0], broken)
    assert merge(text, card_of()).split(BEGIN)[0] == text.split(BEGIN)[0]
    assert "cannot be read" in caplog.text


def test_a_card_without_marks_is_left_alone(tmp_path, caplog):
    model = Pruner.from_pretrained(make_model("llama")).prune(make_config("magnitude"))
    for text in ("# Mine\r\n", f"{END} {BEGIN}"):
        caplog.clear()
        (tmp_path / "README.md").write_bytes(text.encode())
        model.save_pretrained(tmp_path)
        assert (tmp_path / "README.md").read_bytes() == text.encode()
        assert len([record for record in caplog.records if "left as it is" in record.getMessage()]) == 1


def test_saved_again_it_is_the_same_and_another_pattern_replaces_it(tmp_path, tiny_llama):
    for pattern in ("2:4", "4:8"):
        Pruner.from_pretrained(tiny_llama).prune(make_config("magnitude", pattern)).save_pretrained(tmp_path)
        for run_compressed in (False, True):
            before = files_of(tmp_path)
            AutoModelForCausalLM.from_pretrained(tmp_path, run_compressed=run_compressed).save_pretrained(tmp_path)
            assert files_of(tmp_path) == before
        assert ModelCard.load(tmp_path / "README.md").data.tags == ["sparse", "optimum-sparse", pattern]


def test_from_disk_to_disk_gives_the_same_card(tmp_path, tiny_llama):
    pruner = Pruner.from_pretrained(tiny_llama)
    pruner.prune_to_disk(make_config("sparsegpt"), tmp_path / "streamed")
    model = Pruner.from_pretrained(tiny_llama).prune(make_config("sparsegpt"))
    model.save_pretrained(tmp_path / "saved")
    assert (tmp_path / "streamed" / "README.md").read_bytes() == (tmp_path / "saved" / "README.md").read_bytes()


@pytest.mark.parametrize("architecture", ["gpt2", "mixtral", "gpt_oss"])
def test_sizes_of_other_architectures(architecture, tmp_path):
    Pruner.from_pretrained(make_model(architecture)).prune(make_config("magnitude")).save_pretrained(tmp_path)
    info = inspect(str(tmp_path))
    dense = sum(matrix[3] for matrix in info.matrices.values())
    assert f"| pruned matrices | {dense:,} |" in (tmp_path / "README.md").read_text()


def test_files_of_another_model_beside_it_are_no_error(tmp_path, sparse_checkpoints, caplog):
    model = Pruner.from_pretrained(make_model("llama", num_hidden_layers=1)).prune(make_config("magnitude"))
    for name in ("another", "model-copy"):
        shutil.copy(sparse_checkpoints["2:4"] / "model.safetensors", tmp_path / f"{name}.safetensors")
        model.save_pretrained(tmp_path)
        assert ("## Size" in (tmp_path / "README.md").read_text()) == (name == "another")
    assert "says nothing of sizes: 14 matrices in the files, 7 in the report" in caplog.text
    (tmp_path / "model-copy.safetensors").write_bytes(b"damaged")
    model.save_pretrained(tmp_path)
    assert "model-copy.safetensors cannot be read" in caplog.text


def test_a_report_from_anywhere_does_not_write_outside_of_its_part():
    evil = f"x')\nimport os\n```\n{END} | `"
    layer = LayerReport(evil, [8, 16], "2:4", 0.5)
    report = PruningReport([layer], method=evil, base_model=evil, quality=[Measurement(evil, evil, 1.0, note=evil)])
    config = SparsityConfig(dataset=f"in memory: {evil}", ignore=[evil])
    card = make_card(config, report, {})
    assert card.count(END) == card.count(BEGIN) == 1
    assert ModelCard(card).data.base_model is None
    for block in (code_of(card, "Load"), code_of(card, "How it was made")):
        assert not [line for line in block.splitlines() if line.startswith("import os")]
    assert len([line for line in card.splitlines() if line.startswith("```")]) == 8


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content["layers"][0].update(shape="abc"),
        lambda content: content["layers"][0].update(sparsity="much"),
        lambda content: content.update(quality=[{"metric": "perplexity", "data": "x", "value": "low"}]),
        lambda content: content.update(method=7),
        lambda content: content.update(base_model=["x"]),
    ],
)
def test_a_damaged_report_is_none(damage, sparse_checkpoints, tmp_path):
    folder = shutil.copytree(sparse_checkpoints["2:4"], tmp_path / "sparse")
    content = json.loads((folder / REPORT_FILE).read_text())
    damage(content)
    (folder / REPORT_FILE).write_text(json.dumps(content))
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.hf_quantizer.report is None
    model.save_pretrained(tmp_path / "again")
    assert not (tmp_path / "again" / "README.md").exists()


def test_a_measurement_is_a_number(tiny_llama):
    with pytest.raises(ValueError, match=r"value=.*must be a number"):
        Measurement("perplexity", "wikitext2", object())


def test_tags_of_the_model_are_kept(tmp_path):
    model = Pruner.from_pretrained(make_model("llama")).prune(make_config("magnitude"))
    model.add_model_tags(["mine", "sparse"])
    model.save_pretrained(tmp_path)
    assert ModelCard.load(tmp_path / "README.md").data.tags == ["sparse", "optimum-sparse", "2:4", "mine"]


def test_dense_models_get_no_card(tmp_path):
    make_model("llama").save_pretrained(tmp_path)
    assert not (tmp_path / "README.md").exists()


# ---- the Hub


WAYS = ["model", "pruner", "from disk to disk", "save_pretrained"]


@pytest.mark.parametrize("way", WAYS)
def test_there_and_back(way, hub, client, tiny_llama):
    repo = f"me/{way.replace(' ', '-')}"
    _, messages = client(hub_calls.push, way, str(tiny_llama), repo)
    files = hub.files(repo)
    expected = {"config.json", REPORT_FILE, "README.md", "generation_config.json", ".gitattributes"}
    tokenizer = {"tokenizer.json", "tokenizer_config.json"} if way != "save_pretrained" else set()
    assert {name for name in files if "safetensors" not in name} == expected | tokenizer
    assert len(hub.repos[repo]) == 2  # one commit beside the first
    assert not messages
    card = files["README.md"].decode()
    assert f'from_pretrained("{repo}")' in card
    assert "folder-or-id-of-this-model" not in card
    assert ModelCard(card).data.tags == ["sparse", "optimum-sparse", "2:4"]
    if tokenizer:
        found = client(hub_calls.load, str(tiny_llama), repo)
        assert found == {"ids": [3, 5], "layers": 14, "base_model": ""}


def test_of_a_model_of_the_hub_the_card_names_it(hub, client, tiny_llama, tmp_path):
    client(hub_calls.upload_dense, "me/dense", str(tiny_llama))
    client(hub_calls.prune_from_hub, "me/dense", "me/pruned")
    card = ModelCard(hub.files("me/pruned")["README.md"].decode())
    assert card.data.base_model == "me/dense"
    assert "Pruner.from_pretrained('me/dense').prune_to_disk(config, \"out\")" in card.text
    assert client(hub_calls.load, str(tiny_llama), "me/pruned")["base_model"] == "me/dense"
    again = client(hub_calls.push_again, "me/pruned", "me/again")
    assert ModelCard(again).data.base_model == "me/dense"  # and not me/again
    assert hub.files("me/again")["README.md"].decode().count('"me/again"') == 2


def test_a_card_and_a_tokenizer_of_the_user_are_kept(hub, client, tiny_llama):
    client(hub_calls.push_tokenizer, "me/mine", str(tiny_llama))
    client(hub_calls.write_file, "me/mine", "README.md", "# Mine\n")
    before = hub.files("me/mine")
    _, messages = client(hub_calls.push, "model", str(tiny_llama), "me/mine")
    after = hub.files("me/mine")
    kept = {"README.md", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"} & set(before)
    assert len(kept) >= 3
    assert all(after[name] == before[name] for name in kept)
    assert [message.split(",")[0] for message in messages if "left as it is" in message] == [
        "me/mine has a tokenizer",
        "the model card of me/mine is left as it is: it has no part between marks.",
    ]
    client(hub_calls.write_file, "me/mine", "README.md", f"# Mine\n\n{BEGIN}{END}\nand more\n")
    client(hub_calls.push, "model", str(tiny_llama), "me/mine")
    text = hub.files("me/mine")["README.md"].decode()
    assert "# Mine\n" in text
    assert text.endswith("and more\n")
    assert "## Load" in text


def test_weights_of_before_do_not_stay(hub, client, tiny_llama):
    client(hub_calls.push, "from disk to disk", str(tiny_llama), "me/shards")
    assert "model.safetensors.index.json" in hub.files("me/shards")
    client(hub_calls.write_file, "me/shards", "adapter/model.safetensors", "another")
    client(hub_calls.push, "pruner", str(tiny_llama), "me/shards", "4:8")
    names = {name for name in hub.files("me/shards") if "safetensors" in name}
    assert names == {"model.safetensors", "adapter/model.safetensors"}
    client(hub_calls.load, str(tiny_llama), "me/shards", "4:8")


def test_what_from_pretrained_is_given_holds_for_report_and_tokenizer(hub, client, tiny_llama):
    client(hub_calls.push, "model", str(tiny_llama), "me/secret")
    client(hub_calls.upload_dense, "me/secret-dense", str(tiny_llama))
    hub.private |= {"me/secret", "me/secret-dense"}
    assert client(hub_calls.load_with, "me/secret", False, {"token": "hf_write"}) == 14
    assert client(hub_calls.load_with, "me/secret-dense", True, {"token": "hf_write"}) == 14
    first = {"token": "hf_write", "revision": "main"}
    assert client(hub_calls.tokenizer_with, "me/secret-dense", "me/secret", first) == [3, 5]
    hub.requests.clear()
    offline = {"token": "hf_write", "local_files_only": True}
    assert client(hub_calls.load_with, "me/secret", False, offline) == 14
    assert client(hub_calls.load_with, "me/secret-dense", True, offline) == 14
    assert not hub.requests


# ---- what cannot be uploaded


def test_a_missing_token_is_said_before_any_request(client, hub):
    hub.requests.clear()
    kind, message = client(hub_calls.refused, "me/x", {"HF_TOKEN": ""}, {})
    assert kind == "ValueError"
    assert "without a token of the Hub" in message
    assert "hf auth login" in message
    assert not hub.requests


@pytest.mark.parametrize(
    ("repo", "token", "message"),
    [
        ("me/x", "hf_nonsense", "the Hub answers 401: the token is not valid: `hf auth login` stores another"),
        ("me/x", "hf_read", "the Hub answers 403: the token may not write to 'me/x': use one with write access"),
        ("other/x", "hf_write", "the Hub answers 403: the token may not write to 'other/x'"),
    ],
)
def test_a_token_that_does_not_do_is_explained(client, hub, repo, token, message):
    kind, found = client(hub_calls.refused, repo, {"HF_TOKEN": token}, {})
    assert (kind, found[: len(found.split(": ")[0])]) == ("OSError", f"nothing was uploaded to {repo!r}")
    assert message in found
    assert repo not in hub.repos


def test_no_network_is_explained(client):
    kind, message = client(hub_calls.refused, "me/x", {}, {"ENDPOINT": "http://127.0.0.1:9"})
    assert kind == "OSError"
    assert "http://127.0.0.1:9 cannot be reached" in message
    kind, message = client(hub_calls.refused, "me/x", {}, {"HF_HUB_OFFLINE": True})
    assert kind == "OSError"
    assert "HF_HUB_OFFLINE is set" in message


def test_the_command_line_asks_before_it_prunes(client, tiny_llama, tmp_path):
    arguments = ["prune", str(tiny_llama), "--method", "magnitude", "-o", str(tmp_path / "out")]
    unreachable = {"ENDPOINT": "http://127.0.0.1:9"}
    for repo, environment, constants, message in (
        ("me/x", {"HF_TOKEN": ""}, {}, "without a token"),
        ("me/x", {}, unreachable, "cannot be reached"),
        ("not a name", {}, {}, "'not a name'"),
    ):
        code, error = client(hub_calls.refused, repo, environment, constants, *arguments)
        assert code == "1"
        assert error.startswith("error: ")
        assert message in error
    assert not list(tmp_path.iterdir())


def test_after_a_failed_upload_the_checkpoint_is_there(client, tiny_llama, tmp_path):
    arguments = ["prune", str(tiny_llama), "--method", "magnitude", "-o", str(tmp_path / "out")]
    code, error = client(hub_calls.refused, "other/x", {}, {}, *arguments)
    assert code == "1"
    assert f"The checkpoint is complete: `hf upload other/x {tmp_path / 'out'}` uploads it." in error
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_nothing_pruned_is_nothing_to_upload(tiny_llama):
    with pytest.raises(ValueError, match="nothing was pruned yet"):
        Pruner.from_pretrained(tiny_llama).push_to_hub("me/x")
