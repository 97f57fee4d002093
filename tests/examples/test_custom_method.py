"""The example of a method of one's own: it runs, and its result is a checkpoint like any other."""

import torch
from helpers import ar_inputs, load_example, output_error, random_weight, stats_of
from models import assert_pattern, linears_of
from transformers import AutoModelForCausalLM

from optimum_sparse.core import NM
from optimum_sparse.methods import Magnitude, Polished


def test_prunes_and_saves(tiny_llama, tmp_path, capsys):
    load_example("custom_method").main(str(tiny_llama), str(tmp_path), samples=4, tokens=24)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    for linear in linears_of(model.model.layers).values():
        assert_pattern(linear.weight, "2:4")
    printed = capsys.readouterr().out
    assert "Saliency: calibration data" in printed


def test_its_masks_are_better_than_those_of_magnitude():
    x, weight = ar_inputs(2000, 64), random_weight(32, 64)
    errors = [
        output_error(weight, Polished(method).solve(weight, stats_of(x), NM(2, 4)).weight, x)
        for method in (load_example("custom_method").Saliency(), Magnitude())
    ]
    assert errors[0] < 0.8 * errors[1]
    assert torch.isfinite(torch.tensor(errors)).all()
