"""Damaged and hostile checkpoints: each is refused with an error that names what is wrong, dense and compressed.

Loading may never go on with weights that are not the ones that were saved.
"""

import json
import re
import shutil

import pytest
import torch
from models import assert_same_weights, make_config, make_model, stored_tensors
from safetensors.torch import save_file
from transformers import AutoModel, AutoModelForCausalLM

from optimum_sparse import Pruner
from optimum_sparse.hf.checkpoint import inspect


LAYER = "model.layers.1.mlp.down_proj"  # pruned
DENSE = "model.layers.0.self_attn.q_proj"  # left dense by the config
PATTERNS = ["2:4", "unstructured"]


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    folders = {}
    for pattern in PATTERNS:
        folders[pattern] = tmp_path_factory.mktemp("good")
        Pruner.from_pretrained(make_model("llama")).prune(
            make_config("magnitude", pattern, ignore=[DENSE])
        ).save_pretrained(folders[pattern])
    return folders


@pytest.fixture
def damaged(good, tmp_path):
    """damaged(pattern, tensors=..., config=...): a copy of the good checkpoint after these functions changed it."""

    def damage(pattern, tensors=None, config=None):
        folder = tmp_path / "damaged"
        shutil.copytree(good[pattern], folder)
        if tensors is not None:
            content = stored_tensors(folder)
            tensors(content)
            save_file(
                {name: t.contiguous() for name, t in content.items()}, folder / "model.safetensors", {"format": "pt"}
            )
        if config is not None:
            content = json.loads((folder / "config.json").read_text())
            config(content["quantization_config"])
            (folder / "config.json").write_text(json.dumps(content))
        return folder

    return damage


def load(folder, run_compressed):
    return AutoModelForCausalLM.from_pretrained(folder, run_compressed=run_compressed or None)


def changed(name, change):
    """Replace one tensor by what `change` makes of it."""

    def apply(tensors):
        tensors[name] = change(tensors[name].clone())

    return apply


def removed(*names):
    def apply(tensors):
        for name in names:
            del tensors[name]

    return apply


def added(name, tensor):
    def apply(tensors):
        assert name not in tensors
        tensors[name] = tensor

    return apply


def written(index, value):
    def change(tensor):
        tensor[index] = value
        return tensor

    return change


def both(*changes):
    def apply(tensors):
        for change in changes:
            change(tensors)

    return apply


MASK, WEIGHT, ROWS = f"{LAYER}.weight_mask", f"{LAYER}.weight", f"{LAYER}.weight_rows"
BITS = torch.zeros(32, 8, dtype=torch.uint8)

# name -> (patterns, change, what the message must name)
DAMAGE = {
    "mask missing": (PATTERNS, removed(MASK), LAYER),
    "weight missing": (PATTERNS, removed(WEIGHT), LAYER),
    "rows missing": (["unstructured"], removed(ROWS), LAYER),
    "mask and weight missing": (["2:4"], removed(MASK, WEIGHT), LAYER),
    "all tensors of a layer missing": (["unstructured"], removed(MASK, WEIGHT, ROWS), LAYER),
    "values truncated": (["unstructured"], changed(WEIGHT, lambda t: t[:-1]), LAYER),
    "one value too many": (["unstructured"], changed(WEIGHT, lambda t: torch.cat([t, t[:1]])), LAYER),
    "values of a row missing": (["2:4"], changed(WEIGHT, lambda t: t[:-1]), LAYER),
    "a column of values missing": (["2:4"], changed(WEIGHT, lambda t: t[:, :-1]), LAYER),
    "values reshaped": (["2:4"], changed(WEIGHT, lambda t: t.reshape(-1, 8)), LAYER),
    "values flattened": (["2:4"], changed(WEIGHT, lambda t: t.flatten()), LAYER),
    "values transposed": (["2:4"], changed(WEIGHT, lambda t: torch.cat([t, t]).T), LAYER),
    "values two-dimensional": (["unstructured"], changed(WEIGHT, lambda t: t.reshape(32, -1)), LAYER),
    "values with a dimension of one": (PATTERNS, changed(WEIGHT, lambda t: t[None]), LAYER),
    "values empty": (PATTERNS, changed(WEIGHT, lambda t: t[:0]), LAYER),
    "a single value": (PATTERNS, changed(WEIGHT, lambda t: t.flatten()[:1]), LAYER),
    "values of integers": (PATTERNS, changed(WEIGHT, lambda t: t.to(torch.int32)), LAYER),
    "values of bytes": (PATTERNS, changed(WEIGHT, lambda t: t.to(torch.uint8)), LAYER),
    "the dense weight": (PATTERNS, changed(WEIGHT, lambda t: torch.ones(32, 64)), LAYER),
    "the dense weight without a mask": (
        ["2:4"],
        both(changed(WEIGHT, lambda t: torch.ones(32, 64)), removed(MASK)),
        LAYER,
    ),
    "mask all zero": (PATTERNS, changed(MASK, torch.zeros_like), LAYER),
    "mask all one": (PATTERNS, changed(MASK, lambda t: torch.full_like(t, 255)), LAYER),
    "one bit more in the mask": (PATTERNS, changed(MASK, lambda t: written((0, 0), 0b11111111)(t)), LAYER),
    "one bit less in the mask": (PATTERNS, changed(MASK, written((3, 2), 0)), LAYER),
    "mask rows swapped": (["unstructured"], changed(MASK, lambda t: t.flip(0)), LAYER),
    "mask one column short": (PATTERNS, changed(MASK, lambda t: t[:, :-1]), LAYER),
    "mask one row short": (PATTERNS, changed(MASK, lambda t: t[:-1]), LAYER),
    "mask transposed": (PATTERNS, changed(MASK, lambda t: t.T), LAYER),
    "mask flattened": (PATTERNS, changed(MASK, lambda t: t.flatten()), LAYER),
    "mask empty": (PATTERNS, changed(MASK, lambda t: t[:0]), LAYER),
    "mask of int8": (PATTERNS, changed(MASK, lambda t: t.to(torch.int8)), LAYER),
    "mask of int64": (PATTERNS, changed(MASK, lambda t: t.long()), LAYER),
    "mask of bool": (PATTERNS, changed(MASK, lambda t: t.bool()), LAYER),
    "mask of float": (PATTERNS, changed(MASK, lambda t: t.float()), LAYER),
    "mask as one bool per weight": (["2:4"], changed(MASK, lambda t: torch.ones(32, 64, dtype=torch.bool)), LAYER),
    "rows not increasing": (["unstructured"], changed(ROWS, lambda t: t[torch.arange(33).roll(1)]), LAYER),
    "rows negative": (["unstructured"], changed(ROWS, written(1, -5)), LAYER),
    "rows too large": (["unstructured"], changed(ROWS, written(32, 2**62)), LAYER),
    "rows off by one": (["unstructured"], changed(ROWS, lambda t: t + 1), LAYER),
    "rows of int32": (["unstructured"], changed(ROWS, lambda t: t.int()), LAYER),
    "rows of float": (["unstructured"], changed(ROWS, lambda t: t.float()), LAYER),
    "rows short": (["unstructured"], changed(ROWS, lambda t: t[:-1]), LAYER),
    "rows for 2:4": (["2:4"], added(ROWS, torch.arange(33)), LAYER),
    "mask for a dense layer": (PATTERNS, added(f"{DENSE}.weight_mask", BITS[:, :4]), DENSE),
    "rows for a dense layer": (PATTERNS, added(f"{DENSE}.weight_rows", torch.arange(33)), DENSE),
    "mask for the embedding": (PATTERNS, added("model.embed_tokens.weight_mask", BITS), "model.embed_tokens"),
    "mask for a norm": (PATTERNS, added("model.norm.weight_mask", BITS), "model.norm"),
    "mask for the head": (PATTERNS, added("lm_head.weight_mask", BITS), "lm_head"),
}
CASES = [(name, pattern) for name, (patterns, _, _) in DAMAGE.items() for pattern in patterns]


@pytest.mark.parametrize("run_compressed", [False, True])
@pytest.mark.parametrize(("case", "pattern"), CASES)
def test_damaged_tensors(case, pattern, run_compressed, damaged):
    _, change, named = DAMAGE[case]
    folder = damaged(pattern, tensors=change)
    with pytest.raises(ValueError, match=named.replace(".", r"\.")):
        load(folder, run_compressed)


@pytest.mark.parametrize("run_compressed", [False, True])
@pytest.mark.parametrize(
    "name", ["model.layers.7.mlp.up_proj.weight_mask", "model.nothing.weight_rows", "weight_mask"]
)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_tensors_of_modules_that_do_not_exist_change_nothing(pattern, name, run_compressed, damaged, good):
    """As with any other checkpoint, transformers reports them as unexpected; a model may be loaded in part."""
    folder = damaged(pattern, tensors=added(name, BITS))
    model, info = AutoModelForCausalLM.from_pretrained(
        folder, run_compressed=run_compressed or None, output_loading_info=True
    )
    assert len(info["unexpected_keys"]) == 1
    assert_same_weights(model, load(good[pattern], run_compressed))


@pytest.mark.parametrize("run_compressed", [False, True])
@pytest.mark.parametrize("case", ["weight missing", "mask and weight missing", "all tensors of a layer missing"])
def test_missing_tensors_of_a_model_without_its_head(case, run_compressed, damaged):
    patterns, change, _ = DAMAGE[case]
    folder = damaged(patterns[-1], tensors=change)
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.down_proj"):
        AutoModel.from_pretrained(folder, run_compressed=run_compressed or None)


@pytest.mark.parametrize("run_compressed", [False, True])
@pytest.mark.parametrize("keep", [0.98, 0.5, 0.01, 0.0])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_truncated_file(pattern, keep, run_compressed, good, tmp_path):
    folder = tmp_path / "short"
    shutil.copytree(good[pattern], folder)
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[: int(len(content) * keep)])
    with pytest.raises(Exception, match=r"(?i)safetensor|header|incomplete|invalid|deserializ"):
        load(folder, run_compressed)


@pytest.mark.parametrize("run_compressed", [False, True])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_missing_shard(pattern, run_compressed, good, tmp_path):
    load(good[pattern], False).save_pretrained(tmp_path, max_shard_size="20KB")
    shard = sorted(tmp_path.glob("*.safetensors"))[-1]
    shard.unlink()
    with pytest.raises((OSError, ValueError, RuntimeError), match=shard.name):
        load(tmp_path, run_compressed)


@pytest.mark.parametrize("run_compressed", [False, True])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_layer_missing_from_the_index_of_shards(pattern, run_compressed, good, tmp_path):
    load(good[pattern], False).save_pretrained(tmp_path, max_shard_size="20KB")
    file = tmp_path / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    lost = index["weight_map"][WEIGHT]
    owners = "|".join(name.rpartition(".")[0] for name, shard in index["weight_map"].items() if shard == lost)
    index["weight_map"] = {name: shard for name, shard in index["weight_map"].items() if shard != lost}
    file.write_text(json.dumps(index))
    with pytest.raises(ValueError, match=rf"({owners}) is stored as .*: missing"):
        load(tmp_path, run_compressed)


# ---- config.json


def put(**values):
    return lambda config: config.update(values)


CONFIGS = {
    "1:4 in place of 2:4": ("2:4", put(pattern="1:4", sparsity=0.75), "weight"),
    "4:8 in place of 2:4": ("2:4", put(pattern="4:8"), None),  # same shapes: only where groups differ
    "2:4 in place of unstructured": ("unstructured", put(pattern="2:4"), "weight"),
    "unstructured in place of 2:4": ("2:4", put(pattern="unstructured"), "weight"),
    "another sparsity": ("unstructured", put(sparsity=0.25), "weight"),
    "a little other sparsity": ("unstructured", put(sparsity=0.499), "weight"),
    "a pruned layer dense": ("2:4", put(ignore=[DENSE, LAYER]), LAYER),
    "all layers dense": ("2:4", put(ignore=["model.layers"]), "model.layers"),
    "targets shrunk": ("unstructured", put(targets=["self_attn"]), "mlp"),
    "a dense layer pruned": ("2:4", put(ignore=[]), DENSE),
    "a rule that contradicts another": ("2:4", put(layers={"mlp": "1:4", "down_proj": "2:4"}), "different patterns"),
    "a pattern for one layer": ("2:4", put(layers={LAYER: "1:4"}), LAYER),
    "unknown key": ("2:4", put(sparsety=0.5), "'sparsety'"),
    "unknown key that is code": ("2:4", put(auto_map={"AutoConfig": "evil.Config"}), "'auto_map'"),
    "newer format version": ("2:4", put(format_version=2), "format_version=2"),
    "format version of another type": ("2:4", put(format_version="1"), "format_version='1'"),
    "unknown format": ("2:4", put(format="csr"), "format='csr'"),
    "format that is a module": ("2:4", put(format="os.path"), "format='os.path'"),
    "unknown method": ("2:4", put(method="obs"), "method='obs'"),
    "method of another type": ("2:4", put(method=["wanda"]), "method="),
    "pattern that is none": ("2:4", put(pattern="2-4"), "pattern='2-4'"),
    "pattern 0:4": ("2:4", put(pattern="0:4"), "0:4"),
    "pattern 4:0": ("2:4", put(pattern="4:0"), "4:0"),
    "pattern null": ("2:4", put(pattern=None), "pattern=None"),
    "huge pattern": ("2:4", put(pattern="99999999999:999999999999"), "pattern="),
    "sparsity 1": ("unstructured", put(sparsity=1.0), "sparsity=1.0"),
    "sparsity negative": ("unstructured", put(sparsity=-1), "sparsity=-1"),
    "sparsity NaN": ("unstructured", put(sparsity=float("nan")), "sparsity=nan"),
    "sparsity of text": ("unstructured", put(sparsity="0.5"), "sparsity='0.5'"),
    "ignore of text": ("2:4", put(ignore="lm_head"), "ignore='lm_head'"),
    "layers of a list": ("2:4", put(layers=["mlp"]), "layers="),
    "regular expression that is none": ("2:4", put(ignore=["re:("]), "'re:('"),
    "blocks that do not exist": ("2:4", put(block_name="model.nothing"), "block_name='model.nothing'"),
    "blocks that are none": ("2:4", put(block_name="lm_head"), "block_name='lm_head'"),
}


@pytest.mark.parametrize("run_compressed", [False, True])
@pytest.mark.parametrize("case", [case for case, (_, _, named) in CONFIGS.items() if named])
def test_changed_config(case, run_compressed, damaged):
    pattern, change, named = CONFIGS[case]
    folder = damaged(pattern, config=change)
    with pytest.raises(ValueError, match=re.escape(named)):
        load(folder, run_compressed)


@pytest.mark.parametrize("run_compressed", [False, True])
def test_a_wider_pattern_with_the_same_shapes_reads_the_same_values(run_compressed, damaged, good):
    """2:4 is a special case of 4:8, stored in the same way: nothing is wrong with the weights then."""
    model = load(damaged("2:4", config=CONFIGS["4:8 in place of 2:4"][1]), run_compressed)
    wanted = load(good["2:4"], run_compressed)
    assert_same_weights(model, wanted)


@pytest.mark.parametrize("value", ["gptq", "bitsandbytes", "compressed-tensors", "nothing", "", None, 7])
def test_another_quant_method(value, damaged):
    """Not ours to read: transformers then goes by that method, or ignores it and fails on the shapes."""
    folder = damaged("2:4", config=put(quant_method=value))
    for run_compressed in (False, True):
        with pytest.raises(Exception) as caught:  # noqa: PT011
            load(folder, run_compressed)
        assert str(caught.value)


def test_config_without_quantization_config(damaged):
    """The values have another shape than the dense weight on purpose."""
    folder = damaged("2:4")
    content = json.loads((folder / "config.json").read_text())
    del content["quantization_config"]
    (folder / "config.json").write_text(json.dumps(content))
    with pytest.raises(RuntimeError, match="mismatch"):
        load(folder, False)
    with pytest.raises(ValueError, match="this one is dense"):
        load(folder, True)


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        '{"layers": 1, "seconds": {}}',
        '{"layers": [{"name": 1}], "seconds": {}}',
        '{"layers": [{"evil": 1}]}',
        "null",
        "\x00",
    ],
)
def test_a_broken_report_is_no_reason_not_to_load(content, good, tmp_path):
    """It is for reading, and holds nothing that loading depends on."""
    folder = tmp_path / "copy"
    shutil.copytree(good["2:4"], folder)
    (folder / "sparsity_report.json").write_text(content)
    model = load(folder, False)
    assert_same_weights(model, load(good["2:4"], False))
    model.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()


@pytest.mark.parametrize("case", ["mask missing", "weight missing", "values of a row missing", "mask one row short"])
def test_inspect_names_what_is_missing(case, damaged):
    folder = damaged("2:4", tensors=DAMAGE[case][1])
    with pytest.raises(ValueError, match=LAYER.replace(".", r"\.")):
        inspect(str(folder))
