"""Each point is what pruning alone gives; the model stays dense; nothing is measured twice."""

import pytest
from accelerate import cpu_offload
from models import SAMPLES, TOKENS, assert_same_weights, logits, make_model, token_ids, weights_of

from optimum_sparse import Pruner
from optimum_sparse.evaluation import SweepResult, grid, plot_sweep, sweep
from optimum_sparse.hf import prune


DATA = dict(dataset=token_ids(), num_samples=SAMPLES, sequence_length=TOKENS)


def evaluate(model) -> dict[str, float]:
    return {"size": logits(model).double().square().mean().item()}


@pytest.mark.parametrize("architecture", ["llama", "mixtral"])
def test_points_are_those_of_pruning_a_fresh_model(architecture: str):
    model = make_model(architecture)
    dense = {name: tensor.clone() for name, tensor in weights_of(model).items()}
    points = grid(["magnitude", "sparsegpt", "best"], [0.6], ["2:4"], **DATA)
    result = sweep(model, points, evaluate)
    assert_same_weights(model, dense)
    assert result.dense == evaluate(model)
    for (label, config), point in zip(points, result.points, strict=True):
        alone = evaluate(Pruner.from_pretrained(make_model(architecture)).prune(config))
        assert (point.label, point.measured) == (label, alone)
        assert point.sparsity == pytest.approx(0.6 if config.sparsity else 0.5, abs=1e-3)


@pytest.mark.parametrize("content", ["{", "[]", '{"about": {}}', '{"about": {}, "dense": {}, "points": [{}]}'])
def test_a_file_of_something_else_is_no_result(content: str, tmp_path):
    (tmp_path / "sweep.json").write_text(content)
    with pytest.raises(ValueError, match=r"sweep\.json (is|holds)"):
        sweep(make_model("llama"), grid(["magnitude"], [0.5], **DATA), evaluate, tmp_path)
    assert (tmp_path / "sweep.json").read_text() == content


def test_an_offloaded_model_gives_the_same():
    points = grid(["wanda"], [0.5], ["2:4"], **DATA)
    model = cpu_offload(make_model("llama"))
    found = sweep(model, points, evaluate)
    expected = sweep(make_model("llama"), points, evaluate)
    assert [point.measured for point in found.points] == [point.measured for point in expected.points]
    assert evaluate(model) == expected.dense


def test_tokens_and_sensitivity_are_computed_once(monkeypatch: pytest.MonkeyPatch):
    calls = []
    for name in ("calibration_batches", "fisher"):
        function = getattr(prune, name)
        monkeypatch.setattr(
            prune, name, lambda *a, name=name, function=function, **k: calls.append(name) or function(*a, **k)
        )
    sweep(make_model("llama"), grid(["wanda", "sparsegpt", "rose"], [0.3, 0.5], **DATA), evaluate)
    assert calls == ["calibration_batches", "fisher"]


def test_an_interrupted_sweep_goes_on_and_can_grow(tmp_path):
    points = grid(["magnitude"], [0.3, 0.5], ["2:4"], **DATA)
    calls = []

    def failing(model) -> dict[str, float]:
        calls.append(1)
        if len(calls) == 3:
            raise OSError("interrupted")
        return evaluate(model)

    model = make_model("llama")
    with pytest.raises(OSError, match="interrupted"):
        sweep(model, points, failing, tmp_path)
    assert len(SweepResult.load(tmp_path).points) == 1
    assert evaluate(model) == SweepResult.load(tmp_path).dense
    result = sweep(model, points, failing, tmp_path)
    assert len(calls) == 5
    assert [point.measured for point in result.points] == [p.measured for p in sweep(model, points, evaluate).points]
    assert sweep(model, points, failing, tmp_path) == result
    assert len(sweep(model, grid(["magnitude"], [0.4], **DATA), failing, tmp_path).points) == 4
    assert len(calls) == 6
    assert {path.name for path in tmp_path.iterdir()} == {"sweep.json", "sweep.csv"}


def test_another_model_recipe_or_setting_is_refused_by_name(tmp_path):
    points = grid(["wanda"], [0.5], **DATA)
    before = sweep(make_model("llama"), points, evaluate, tmp_path, settings={"window": 64})
    with pytest.raises(ValueError, match=r"weights was '\w+' and is"):
        sweep(make_model("llama", seed=3), points, evaluate, tmp_path, settings={"window": 64})
    with pytest.raises(ValueError, match=r"settings.window was 64 and is 32"):
        sweep(make_model("llama"), points, evaluate, tmp_path, settings={"window": 32})
    with pytest.raises(ValueError, match=r"wanda at unstructured 0.5 .* num_samples was 6 and is 4"):
        sweep(
            make_model("llama"),
            grid(["wanda"], [0.5], **DATA | {"num_samples": 4}),
            evaluate,
            tmp_path,
            settings={"window": 64},
        )
    assert SweepResult.load(tmp_path) == before


def test_mistakes_are_found_before_any_work():
    with pytest.raises(ValueError, match=r"'wandaa' is no method .*wanda.* and no recipe .*best"):
        grid(["wandaa"], [0.5])
    with pytest.raises(ValueError, match="nothing to measure"):
        grid(["wanda"])
    with pytest.raises(ValueError, match="multiples of M"):
        sweep(make_model("llama"), grid(["magnitude"], [0.5], ["5:7"]), lambda model: pytest.fail("too late"))


def test_table_and_csv_hold_every_point():
    result = sweep(make_model("llama"), grid(["magnitude", "wanda"], [0.5], ["2:4"], **DATA), evaluate)
    rows = result.to_csv().splitlines()
    assert len(rows) == 6
    assert rows[0].startswith("label,pattern,sparsity,size")
    lines = str(result).splitlines()
    assert [line.split()[0] for line in lines] == ["dense:", "size", "magnitude", "wanda"]
    assert lines[1].split()[1:] == ["0.5", "2:4"]


def test_columns_do_not_depend_on_the_order_of_measuring():
    points = grid(["magnitude"], [0.7, 0.125], ["8:16", "1:4", "2:4"]) + grid(["wanda"], [0.3], **DATA)
    table = str(sweep(make_model("llama"), points, evaluate)).splitlines()
    assert table[1].split() == ["size", "0.125", "0.3", "0.7", "2:4", "8:16", "1:4"]


def test_a_picture(tmp_path):
    pytest.importorskip("matplotlib")
    result = sweep(make_model("llama"), grid(["magnitude", "wanda"], [0.3, 0.5], ["2:4"], **DATA), evaluate)
    plot_sweep(result, tmp_path / "sweep.svg")
    text = (tmp_path / "sweep.svg").read_text()
    assert all(word in text for word in ("magnitude", "wanda", "2:4", "dense"))
    with pytest.raises(ValueError, match="'accuracy': was not measured"):
        plot_sweep(result, tmp_path / "other.svg", "accuracy")
