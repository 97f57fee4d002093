"""The report: what it keeps and what it says."""

import json

from optimum_sparse.report import LayerReport, PruningReport


def make_report() -> PruningReport:
    layers = [
        LayerReport(f"model.layers.{i}.q_proj", [8, 16], "2:4", 0.5, error, 1.0)
        for i, error in enumerate([0.25, 0.125, 0.0])
    ]
    layers += [LayerReport("model.layers.0.up", [32, 8], "unstructured 0.3", 0.3, None, 0.5)]
    layers += [LayerReport(f"model.layers.{i}.gate", [4, 8], skipped="Router, not a linear") for i in range(5)]
    layers += [LayerReport("model.layers.0.o", [4, 8], skipped="ignored by 'o'")]
    return PruningReport(layers, {"pruning": 3.25}, "Wanda")


def test_json_round_trip():
    report = make_report()
    text = report.to_json()
    assert text.endswith("\n")
    assert PruningReport.from_dict(json.loads(text)) == report
    assert PruningReport.from_dict(json.loads(PruningReport().to_json())) == PruningReport()


def test_every_layer_is_either_pruned_or_skipped():
    report = make_report()
    assert [layer.name for layer in report.pruned] == [f"model.layers.{i}.q_proj" for i in range(3)] + [
        "model.layers.0.up"
    ]
    assert len(report.pruned) + len(report.skipped) == len(report.layers)
    assert all(layer.skipped for layer in report.skipped)


def test_text_groups_layers_of_a_kind_with_mean_and_worst_error():
    header, q_proj, up, *_ = [line.split() for line in str(make_report()).splitlines()]
    assert header[:5] == ["layers", "count", "shape", "pattern", "sparsity"]
    assert q_proj == ["model.layers.*.q_proj", "3", "8x16", "2:4", "0.5000", "0.1250", "0.2500", "3.0"]
    assert up == ["model.layers.*.up", "1", "32x8", "unstructured", "0.3", "0.3000", "-", "-", "0.5"]


def test_text_names_what_stayed_dense_by_reason():
    lines = str(make_report()).splitlines()
    gates = ", ".join(f"model.layers.{i}.gate" for i in range(3))
    assert f"left dense, Router, not a linear: {gates} and 2 more" in lines
    assert "left dense, ignored by 'o': model.layers.0.o" in lines
    assert lines[-1] == "Wanda: pruning 3.2 s"


def test_layers_of_another_shape_or_pattern_are_not_mixed():
    report = PruningReport(
        [
            LayerReport("layers.0.up", [8, 4], "2:4", 0.5),
            LayerReport("layers.1.up", [8, 8], "2:4", 0.5),
            LayerReport("layers.2.up", [8, 4], "4:8", 0.5),
        ]
    )
    assert [line.split()[1] for line in str(report).splitlines()[1:]] == ["1", "1", "1"]


def test_text_of_an_empty_report_has_a_header_only():
    assert len(str(PruningReport()).splitlines()) == 1
