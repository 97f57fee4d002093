"""A config from a file is data: what is wrong in it is refused at once, in words, and nothing in it becomes code."""

import sys
from pathlib import Path

import pytest
import torch

from optimum_sparse.config import SparsityConfig
from optimum_sparse.core import NM, Unstructured
from optimum_sparse.methods import Magnitude, SparseGPT, Wanda


NAN, INF = float("nan"), float("inf")
WRONG_NAMES = [
    "",
    "SparseGPT",
    "wanda ",
    "os.system",
    "builtins:eval",
    "__class__",
    None,
    1,
    ["wanda"],
    {"a": 1},
    True,
]
WRONG_PATTERNS = [
    "", "2:", ":4", "2:4:8", "2 : 4", "2:4 ", "2:4\n", "-2:4", "2:-4", "2.0:4", "0:4", "4:4", "5:4", "0:0", "1:0",
    "1:99999", "9" * 5000 + ":4", "1e1:4", "0x2:4", "\uff12:\uff14", "Unstructured", "os.system:4", "dense",
    None, 24, 0.5, ["2:4"], {"kept": 2}, True,
]  # fmt: skip
WRONG_INTEGERS = [0, -1, 1.0, 2.5, "8", None, True, NAN, [8]]
WRONG_NAME_LISTS = ["q_proj", ("q_proj",), {"q_proj": 1}, [""], [None], [1], ["q_proj", ["mlp"]], 3, True]
WRONG_EXPRESSIONS = [
    "re:(",
    "re:*",
    "re:[a",
    "re:(?P<n",
    r"re:\g",
    "re:a{99999999999999}",
    "re:" + "(" * 5000 + ")" * 5000,
]

WRONG_SHARES = [-0.01, 1.01, NAN, INF, "0.5", True, [0.5], 10**400]

CASES = [
    *(("method", value) for value in WRONG_NAMES),
    *(("format", value) for value in WRONG_NAMES),
    *(("quant_method", value) for value in ["", "gptq", None, 1, ["sparsity"]]),
    *(("format_version", value) for value in [0, 2, -1, 1.0, True, "1", None, [1], NAN]),
    *(("pattern", value) for value in WRONG_PATTERNS),
    *(("sparsity", value) for value in [0.6, -0.5, 1.5, 0, NAN, INF, "0.5", [0.5], {}, True]),  # beside 2:4
    *(
        (name, value)
        for name in ("num_samples", "sequence_length", "batch_size", "block_size", "reconstruction_passes")
        for value in WRONG_INTEGERS
    ),
    *(("seed", value) for value in [-1, 0.0, "0", None, False, NAN]),
    *(("damping", value) for value in [-0.01, -INF, INF, NAN, 1e9, "0.01", None, True, [0.01], 10**400]),
    *(
        (name, value)
        for name in ("rose_threshold", "reconstruction_learning_rate", "input_shift", "residual_shift")
        for value in WRONG_SHARES
    ),
    *((name, None) for name in ("rose_threshold", "reconstruction_learning_rate")),
    *((name, value) for name in ("staged", "fisher") for value in [0, 1, 0.0, "True", "", [], NAN]),
    *(("reconstruction_samples", value) for value in WRONG_INTEGERS if value is not None),
    *(("refine", value) for value in WRONG_NAMES if value is not None),
    *(("allocation", value) for value in WRONG_NAMES if not isinstance(value, dict)),
    *(("allocation", value) for value in ["owl", "error", {}, {"mlp": 0.5}]),  # beside 2:4
    *(("denser", value) for value in [None, [], "dense", 0.1, True, ["dense"]]),
    *(("denser", {"dense": value}) for value in [*WRONG_SHARES, None]),
    ("denser", {"unstructured": 0.1}),
    ("denser", {"1:4": 0.1}),  # keeps less than 2:4
    ("seed", 2**63),
    ("allocated", {"q_proj": "sparse"}),
    *(("denser", {name: 0.1}) for name in ("", "2", "5:4", "0:4", "4:4", "Dense", None, 3, "1:99999")),
    *(("run_compressed", value) for value in [None, 0, 1, "True", []]),
    *(("block_name", value) for value in [0, True, ["model.layers"], {}]),
    *((name, value) for name in ("targets", "ignore") for value in WRONG_NAME_LISTS),
    *((name, [value]) for name in ("targets", "ignore") for value in WRONG_EXPRESSIONS),
    ("ignore", None),
    *(("layers", value) for value in [None, [], ["mlp"], "mlp", 1, {"": "dense"}, {1: "dense"}, {None: 0.5}]),
    *(("layers", {value: "dense"}) for value in WRONG_EXPRESSIONS),
    *(
        ("layers", {"mlp": value})
        for value in [
            *[value for value in WRONG_PATTERNS if value not in ("dense", 0.5)],
            1,
            1.0,
            -0.1,
            NAN,
            INF,
            "0.5",
        ]
    ),
    *(("dataset", value) for value in [None, "", 0, [], [1], ["text", None], {}, {"input_ids": 1}, b"c4", object]),
    *(
        ("dataset", value)
        for value in [
            torch.zeros(4, dtype=torch.int64),
            torch.zeros(0, 4, dtype=torch.int64),
            torch.zeros(1, 2, 3, dtype=torch.int64),
            torch.zeros(2, 2),
            torch.zeros(2, 2, dtype=torch.bool),
            torch.zeros(2, 2, dtype=torch.complex64),
        ]
    ),
]


@pytest.mark.parametrize(("key", "value"), CASES, ids=lambda part: part if isinstance(part, str) else str(part)[:24])
def test_a_wrong_value_is_refused_by_name(key: str, value):
    for make in (lambda: SparsityConfig(**{key: value}), lambda: SparsityConfig.from_dict({key: value})):
        with pytest.raises(ValueError, match=key):
            make()


@pytest.mark.parametrize("sparsity", [1, 1.0, 1.5, -0.1, NAN, INF, -INF, "0.5", [0.5], True, False])
def test_unstructured_sparsity_out_of_range(sparsity):
    with pytest.raises(ValueError, match=r"sparsity=.* must be a number in \[0, 1\)"):
        SparsityConfig(pattern="unstructured", sparsity=sparsity)
    with pytest.raises(ValueError, match=r"sparsity="):
        Unstructured(sparsity)


WRONG_ALLOCATIONS = [
    *({"mlp": value} for value in [-0.1, 0.995, 1, NAN, INF, "0.5", "dense", "2:4", None, True, [0.5]]),
    *({name: 0.5} for name in ["", 1, None, *WRONG_EXPRESSIONS]),
]


@pytest.mark.parametrize("allocation", WRONG_ALLOCATIONS, ids=lambda value: str(value)[:24])
def test_allocations_by_name_that_mean_nothing(allocation):
    with pytest.raises(ValueError, match="allocation"):
        SparsityConfig(pattern="unstructured", allocation=allocation)


def test_denser_is_for_n_of_m_and_allocation_for_unstructured():
    with pytest.raises(ValueError, match=r"denser=.*: for N:M patterns; allocation='error' is for unstructured"):
        SparsityConfig(pattern="unstructured", denser={"dense": 0.1})
    with pytest.raises(ValueError, match=r"allocation='owl': pattern 2:4 has nothing to share out.*denser="):
        SparsityConfig(allocation="owl")


@pytest.mark.parametrize("method", ["magnitude", "wanda"])
@pytest.mark.parametrize("option", [{"staged": True}, {"input_shift": 0.5}, {"residual_shift": 1}, {"fisher": True}])
def test_a_first_order_method_cannot_do_what_was_asked_for(method: str, option: dict):
    (name,) = option
    with pytest.raises(ValueError, match=rf"{name}=.* needs a second-order method, and '{method}' is none"):
        SparsityConfig(method=method, **option)
    SparsityConfig(method=method, refine="pcg", **option)
    SparsityConfig(method=method, **{name: type(option[name])(0)})


@pytest.mark.parametrize("recipe", ["", "Best", None, 1, ["best"], {"best": 1}])
def test_recipes_have_names(recipe):
    with pytest.raises(ValueError, match=r"recipe=.*: must be one of \['best', 'fast', 'paper'\]"):
        SparsityConfig.recipe(recipe)


@pytest.mark.parametrize(("kept", "group"), [(0, 4), (4, 4), (5, 4), (-1, 4), (2, -4)])
def test_nm_out_of_range(kept: int, group: int):
    with pytest.raises(ValueError, match=rf"pattern '{kept}:{group}'.* 0 < N < M"):
        NM(kept, group)


@pytest.mark.parametrize(
    ("key", "hint"),
    [
        ("metod", "did you mean 'method'"),
        ("num_sample", "did you mean 'num_samples'"),
        ("ignored", "did you mean 'ignore'"),
        ("zzz", r"known keys are \['quant_method'.*'method'"),
        ("__class__", "unknown key"),
        ("build_method", "unknown key"),
        (1, "unknown key 1"),
    ],
)
def test_unknown_keys_are_errors(key, hint: str):
    with pytest.raises(ValueError, match=hint):
        SparsityConfig.from_dict({"method": "wanda", key: "magnitude"})


def test_a_newer_version_is_named_before_the_keys_that_only_it_knows():
    with pytest.raises(ValueError, match="format_version=2: this release reads version 1; upgrade"):
        SparsityConfig.from_dict({"format_version": 2, "new_key": 1})


def test_errors_say_what_is_allowed():
    with pytest.raises(
        ValueError, match=r"method='x': must be one of \['admm', 'magnitude', 'rose', 'sparsegpt', 'wanda'\]"
    ):
        SparsityConfig(method="x")
    with pytest.raises(ValueError, match=r"sparsity=0\.6 contradicts pattern='2:4', which removes 0\.5: leave it out"):
        SparsityConfig(sparsity=0.6)
    with pytest.raises(ValueError, match=r"layers\['mlp'\]: pattern '4:2'.* 0 < N < M"):
        SparsityConfig(layers={"mlp": "4:2"})
    with pytest.raises(ValueError, match=r"ignore: 're:\(' is not a regular expression: missing \)"):
        SparsityConfig(ignore=["re:("])
    with pytest.raises(ValueError, match=r"dataset of type dict.*Pruner\.prune\(config, dataset=loader\)"):
        SparsityConfig(dataset={"input_ids": 1})


CODE = [
    "evil",
    "evil:run",
    "evil.run",
    "evil.py",
    "{folder}/evil.py",
    "file://{folder}/evil.py",
    "!!python/name:evil.run",
]


def test_no_value_selects_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A module lies ready to be imported. Whatever key names it: refused, or kept as it is, and never run."""
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\ndef run(*args): pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    for value in (text.format(folder=tmp_path) for text in CODE):
        for key in SparsityConfig().to_dict():
            for content in (value, [value], {value: value}, {"mlp": value}):
                try:
                    config = SparsityConfig.from_dict({key: content})
                except ValueError:
                    continue
                assert isinstance(config.build_method(), Magnitude | Wanda | SparseGPT)
                config.pattern_for("model.layers.0.mlp")
                config.to_dict()
                assert getattr(config, key) == content
    assert "evil" not in sys.modules
    assert not (tmp_path / "ran").exists()
