"""SparsityConfig: round trips, and what names and overrides mean."""

import copy
import dataclasses
import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from optimum_sparse.config import SparsityConfig, describe_dataset, matches
from optimum_sparse.core import NM, Unstructured
from optimum_sparse.methods import Admm, Magnitude, Rose, SparseGPT, Wanda


Q0 = "model.layers.0.self_attn.q_proj"
Q1 = "model.layers.1.self_attn.q_proj"
Q10 = "model.layers.10.self_attn.q_proj"
DOWN1 = "model.layers.1.mlp.down_proj"


# ---- copying and comparing


def test_copies_share_no_lists_and_dicts():
    config = SparsityConfig(ignore=["q_proj"], layers={"mlp": "4:8"}, denser={"dense": 0.1}, targets=["mlp"])
    before = copy.deepcopy(config.to_dict())
    for changed in (copy.copy(config), config.resolved(second_order=True)):
        assert changed.ignore == config.ignore
        changed.ignore.append("k_proj")
        changed.targets.append("k_proj")
        changed.layers["k_proj"] = changed.denser["4:8"] = 0.3
        assert config.to_dict() == before
    config.to_dict()["ignore"].append("k_proj")
    assert config.to_dict() == before


def test_configs_are_compared_by_all_that_they_say():
    tokens = torch.arange(12).reshape(3, 4)
    config = SparsityConfig(dataset=tokens, ignore=["q_proj"])
    assert config == SparsityConfig(dataset=tokens.clone(), ignore=["q_proj"])
    assert config == copy.copy(config) == copy.deepcopy(config)
    for other in (
        SparsityConfig(dataset=tokens + 1, ignore=["q_proj"]),
        SparsityConfig(dataset=tokens, ignore=["k_proj"]),
        SparsityConfig(dataset=["a text"], ignore=["q_proj"]),
        SparsityConfig(dataset=tokens, ignore=["q_proj"], run_compressed=True),
        config.to_dict(),
        None,
    ):
        assert config != other


# ---- storing

names = st.sampled_from(["q_proj", "mlp", "model.layers.0", r"re:.*\.(up|gate)_proj", "lm_head"])
patterns = st.one_of(
    st.tuples(st.just("unstructured"), st.one_of(st.none(), st.floats(0, 1, exclude_max=True))),
    st.tuples(st.sampled_from(["2:4", "1:4", "3:5", "16:32"]), st.none()),
)
shares = st.floats(0, 1)


def density(name: str) -> float:
    kept, group = map(int, name.split(":"))
    return kept / group


def build(pattern: tuple, allocation, denser: dict, **rest) -> SparsityConfig:
    given = {"allocation": allocation}
    if pattern[0] != "unstructured":
        kept, group = map(int, pattern[0].split(":"))
        given = {"denser": {name: s for name, s in denser.items() if name == "dense" or kept / group <= density(name)}}
    if rest["refine"] is None and rest["method"] in ("magnitude", "wanda"):
        rest |= dict(staged=None, input_shift=0.0, residual_shift=None, fisher=False)
    return SparsityConfig(pattern=pattern[0], sparsity=pattern[1], **given, **rest)


configs = st.builds(
    build,
    pattern=patterns,
    method=st.sampled_from(["magnitude", "wanda", "sparsegpt", "rose", "admm"]),
    staged=st.sampled_from([None, False, True]),
    input_shift=st.one_of(st.none(), shares, st.integers(0, 1)),
    residual_shift=st.one_of(st.none(), shares),
    fisher=st.sampled_from([None, False, True]),
    refine=st.sampled_from([None, "pcg", "reconstruct"]),
    rose_threshold=shares,
    reconstruction_learning_rate=shares,
    reconstruction_passes=st.integers(1, 100),
    reconstruction_samples=st.one_of(st.none(), st.integers(1, 100)),
    allocation=st.one_of(
        st.sampled_from(["uniform", "owl", "error"]), st.dictionaries(names, st.floats(0, 0.99), max_size=3)
    ),
    denser=st.dictionaries(st.sampled_from(["dense", "3:4", "4:8"]), shares),
    dataset=st.sampled_from(["c4", "wikitext2", "self", "org/name:subset", "/a/file.txt"]),
    num_samples=st.integers(1, 10**6),
    sequence_length=st.integers(1, 10**6),
    batch_size=st.integers(1, 64),
    seed=st.integers(0, 2**40),
    damping=st.one_of(st.floats(0, 999), st.integers(0, 9)),
    block_size=st.integers(1, 4096),
    targets=st.one_of(st.none(), st.lists(names)),
    ignore=st.lists(names),
    layers=st.dictionaries(names, st.one_of(st.sampled_from(["dense", "4:8"]), st.floats(0, 1, exclude_max=True))),
    block_name=st.sampled_from([None, "model.layers"]),
    run_compressed=st.booleans(),
)


@given(config=configs)
def test_json_round_trip(config: SparsityConfig):
    stored = json.loads(json.dumps(config.to_dict()))
    again = SparsityConfig.from_dict(stored)
    assert again.to_dict() == config.to_dict() == stored
    assert again.build_method() == config.build_method()
    for name in (Q0, DOWN1, "lm_head"):
        try:
            expected = config.pattern_for(name)
        except ValueError:
            continue
        assert again.pattern_for(name) == expected


@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt", "rose", "admm"])
@pytest.mark.parametrize("pattern", ["2:4", "4:8", "unstructured"])
@pytest.mark.parametrize("name", ["best", "fast", "paper"])
def test_recipes_are_valid_for_every_pattern_and_method(name: str, pattern: str, method: str):
    config = SparsityConfig.recipe(name, pattern, method=method)
    assert config.pattern_for(Q0) == (
        Unstructured(0.5) if pattern == "unstructured" else NM(*map(int, pattern.split(":")))
    )
    assert SparsityConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_recipes_are_what_they_say_and_changes_go_on_top():
    best, fast = SparsityConfig.recipe("best", "unstructured"), SparsityConfig.recipe("fast", "unstructured")
    assert (best.method, best.refine, best.allocation) == ("admm", "reconstruct", "error")
    assert (fast.method, fast.refine, fast.allocation) == ("admm", "pcg", "error")
    assert SparsityConfig.recipe("fast").allocation == "uniform"
    paper = SparsityConfig.recipe("paper", sparsity=None, num_samples=3)
    assert paper.build_method() == SparseGPT(0.01, 128)
    assert (paper.refine, paper.num_samples) == (None, 3)
    assert [paper.staged, paper.input_shift, paper.residual_shift, paper.fisher] == [False, 0, 0, False]
    changed = SparsityConfig.recipe(
        "best", "unstructured", sparsity=0.7, allocation="owl", method="rose", fisher=False
    )
    assert (changed.sparsity, changed.allocation, changed.method, changed.fisher) == (0.7, "owl", "rose", False)
    assert SparsityConfig.recipe("best") == SparsityConfig.recipe("best"), "a recipe is not changed by its use"


def test_what_is_left_open_is_resolved_and_the_rest_stays():
    names = ("staged", "input_shift", "residual_shift", "fisher")
    config = SparsityConfig()
    assert [getattr(config.resolved(True), name) for name in names] == [True, 0.5, 0.5, True]
    assert [getattr(config.resolved(False), name) for name in names] == [False, 0, 0, False]
    assert [getattr(config, name) for name in names] == [None] * 4, "another object"
    chosen = SparsityConfig(staged=False, input_shift=0.25, residual_shift=0, fisher=False)
    assert chosen.resolved(True) == chosen == chosen.resolved(False)
    mixed = SparsityConfig(input_shift=0.25).resolved(True)
    assert [getattr(mixed, name) for name in names] == [True, 0.25, 0.5, True]
    assert mixed.resolved(False) == mixed


def test_defaults_are_the_papers():
    config = SparsityConfig()
    assert config.pattern_for(Q0) == NM(2, 4)
    assert config.build_method() == SparseGPT(damping=0.01, block_size=128)
    assert (config.dataset, config.num_samples, config.sequence_length, config.sparsity) == ("c4", 128, 2048, None)


def test_a_config_can_be_replaced_by_one_with_another_pattern():
    assert dataclasses.replace(SparsityConfig(), pattern="1:4").pattern_for(Q0) == NM(1, 4)
    assert dataclasses.replace(SparsityConfig(), pattern="unstructured").sparsity == 0.5
    assert SparsityConfig(pattern="2:4", sparsity=0.5) == SparsityConfig(pattern="2:4")


def test_run_compressed_belongs_to_a_load_and_is_not_stored():
    config = SparsityConfig(run_compressed=True)
    assert "run_compressed" not in config.to_dict()
    assert config.get_loading_attributes() == {"run_compressed": True}
    assert SparsityConfig.from_dict(config.to_dict()).run_compressed is False


def test_a_stored_config_says_how_to_read_it():
    stored = SparsityConfig().to_dict()
    assert (
        stored["quant_method"],
        stored["format"],
        stored["format_version"],
        stored["pattern"],
        stored["sparsity"],
    ) == (
        "sparsity",
        "bitmask",
        1,
        "2:4",
        None,
    )


def test_from_dict_does_not_modify_what_it_reads():
    stored = SparsityConfig(layers={"mlp": "dense"}).to_dict()
    before = copy.deepcopy(stored)
    SparsityConfig.from_dict(stored, run_compressed=True)
    assert stored == before


def test_arguments_of_from_dict_override_and_are_checked():
    assert SparsityConfig.from_dict({"method": "wanda"}, run_compressed=True).run_compressed is True
    config, unused = SparsityConfig.from_dict({}, return_unused_kwargs=True, damping=0.5, revision="main")
    assert (config.damping, unused) == (0.5, {"revision": "main"})
    with pytest.raises(ValueError, match="run_compressed='yes'"):
        SparsityConfig.from_dict({}, run_compressed="yes")


def test_build_method_passes_on_the_parameters():
    assert SparsityConfig(damping=0.3, block_size=64).build_method() == SparseGPT(0.3, 64)
    assert SparsityConfig(method="wanda").build_method() == Wanda()
    assert SparsityConfig(method="magnitude").build_method() == Magnitude()
    assert SparsityConfig(method="admm", damping=0.3).build_method() == Admm(0.3)
    config = SparsityConfig(method="rose", damping=0.3, block_size=64, rose_threshold=0.25)
    assert config.build_method() == Rose(0.3, 64, 0.25)


# ---- datasets


@pytest.mark.parametrize(
    ("dataset", "other", "described"),
    [
        (torch.tensor([[1, 2], [3, 4]]), torch.tensor([[1, 2], [3, 5]]), "tokens [2, 2]"),
        (["one text", "two"], ["one text", "three"], "2 texts"),
        (["one text", "two"], ["one", "text two"], "2 texts"),
    ],
)
def test_data_in_memory_is_stored_by_its_fingerprint(dataset, other, described: str):
    stored = SparsityConfig(dataset=dataset).to_dict()["dataset"]
    assert json.loads(json.dumps(stored)) == stored
    assert described in stored
    assert "sha256" in stored
    assert stored == describe_dataset(copy.deepcopy(dataset))
    assert stored != describe_dataset(other)
    assert SparsityConfig.from_dict({"dataset": stored}).to_dict()["dataset"] == stored


def test_fingerprint_of_tokens_does_not_depend_on_dtype_or_strides():
    ids = torch.arange(12).reshape(3, 4)
    assert describe_dataset(ids) == describe_dataset(ids.int()) == describe_dataset(ids.T.contiguous().T)


def test_names_and_loaders_are_described():
    assert describe_dataset("wikitext2") == "wikitext2"
    assert describe_dataset(torch.utils.data.DataLoader([1])) == "in memory: DataLoader"


# ---- names


@pytest.mark.parametrize(
    ("rule", "name", "expected"),
    [
        ("q_proj", Q0, True),
        ("self_attn", Q0, True),
        ("self_attn.q_proj", Q0, True),
        ("model.layers.0", Q0, True),
        (Q0, Q0, True),
        ("layers.1", Q1, True),
        ("layers.1", Q10, False),
        ("1", Q10, False),
        ("proj", Q0, False),
        ("q_pro", Q0, False),
        ("ayers.0", Q0, False),
        ("model.self_attn", Q0, False),
        (Q0 + ".weight", Q0, False),
        ("lm_head", "lm_head", True),
        ("lm_head", "model.lm_head.0", True),
        ("lm_head", "old_lm_head", False),
        ("layersX0", "layersX0", True),
        ("layers.0", "layersX0", False),
        ("q.proj", Q0, False),
        ("re:.*q_proj", Q0, True),
        ("re:q_proj", Q0, False),
        ("re:model", Q0, False),
        (r"re:model\.layers\.\d\..*", Q0, True),
        (r"re:model\.layers\.\d\..*", Q10, False),
        ("re:a|.*q_proj", Q0, True),
        ("re:.*q_proj|a", Q0 + "x", False),
    ],
)
def test_matches(rule: str, name: str, expected: bool):
    assert matches(rule, name) is expected


# ---- which pattern a layer gets


def test_targets_choose_and_ignore_takes_out_again():
    config = SparsityConfig(targets=["layers.1"], ignore=["down_proj", "lm_head"])
    assert config.pattern_for(Q1) == NM(2, 4)
    assert config.pattern_for(Q10) == config.pattern_for(Q0) == "not in targets"
    assert config.pattern_for(DOWN1) == "ignored by 'down_proj'"


def test_no_target_is_not_every_target():
    assert SparsityConfig(targets=[]).pattern_for(Q0) == "not in targets"
    assert SparsityConfig(targets=None).pattern_for(Q0) == NM(2, 4)


def test_layers_give_another_pattern_a_sparsity_or_none():
    config = SparsityConfig(layers={"layers.0": "4:8", "layers.1.mlp": 0.3, "layers.10": "dense", "zero": 0})
    assert config.pattern_for(Q0) == NM(4, 8)
    assert config.pattern_for(DOWN1) == Unstructured(0.3)
    assert config.pattern_for(Q10) == "dense by layers['layers.10']"
    assert config.pattern_for(Q1) == NM(2, 4)
    assert config.pattern_for("zero") == Unstructured(0)


@pytest.mark.parametrize("order", [1, -1])
def test_dense_wins(order: int):
    layers = [("layers.0", "4:8"), ("q_proj", "dense"), ("self_attn", 0.7)][::order]
    assert SparsityConfig(layers=dict(layers)).pattern_for(Q0) == "dense by layers['q_proj']"


def test_ignore_wins_over_layers():
    assert SparsityConfig(ignore=["q_proj"], layers={"q_proj": "4:8"}).pattern_for(Q0) == "ignored by 'q_proj'"


def test_layers_that_disagree_are_an_error_and_those_that_agree_are_not():
    config = SparsityConfig(layers={"layers.0": "4:8", "q_proj": 0.5})
    with pytest.raises(
        ValueError, match=rf"{Q0} different patterns, by \['layers\.0', 'q_proj'\]: make one name more"
    ):
        config.pattern_for(Q0)
    assert config.pattern_for(Q1) == Unstructured(0.5)
    assert SparsityConfig(layers={"layers.0": "4:8", "q_proj": "4:8"}).pattern_for(Q0) == NM(4, 8)
