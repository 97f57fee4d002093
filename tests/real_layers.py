"""Layers of a real model with the Gram matrices of their real inputs: what kernel and reference must agree on.

    python tests/real_layers.py MODEL TEXT layers.safetensors      (31 MB)
    REAL_LAYERS=layers.safetensors python -m pytest tests/gpu/test_sweep.py tests/kernels/test_sweep.py

MODEL is a SmolLM2-135M, TEXT what `calibration_batches` takes. Tests that use the layers are skipped without the
variable, and say with `-s` how far the results agree.
"""

import argparse
import os
from collections.abc import Callable, Iterator

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from optimum_sparse.core import InputStats, Needs, Pattern, Solved, column_sweep, inverse_factor
from optimum_sparse.core import sweep as core_sweep
from optimum_sparse.core.sweep import sweep_block_reference


# Of the first, a middle and the last of 30 blocks; wide and tall ones.
NAMES = [
    "0.self_attn.q_proj",
    "0.mlp.down_proj",
    "14.self_attn.k_proj",
    "14.self_attn.o_proj",
    "29.mlp.gate_proj",
    "29.mlp.down_proj",
]
DAMPING = 0.01


def real_layers() -> Iterator[tuple[str, Tensor, Tensor]]:
    """(name, weight fp32 [out, in], Gram matrix fp32 [in, in])."""
    file = os.environ.get("REAL_LAYERS")
    if not file:
        pytest.skip("needs REAL_LAYERS: see tests/real_layers.py")
    tensors = load_file(file)
    assert {name.rpartition(".")[0] for name in tensors} == set(NAMES)
    for name in NAMES:
        yield name, tensors[f"{name}.weight"].float(), tensors[f"{name}.gram"]


def assert_as_the_reference(
    name: str, weight: Tensor, gram: Tensor, pattern: Pattern, kernel: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A layer solved through `kernel` is the one of the reference, in fp32 and in float64, all on one device."""

    def solve(sweep_block: Callable, dtype: torch.dtype = torch.float32) -> Solved:
        with monkeypatch.context() as patch:
            patch.setattr(core_sweep, "sweep_block", sweep_block)
            return column_sweep(weight.to(dtype), inverse_factor(gram.to(dtype), DAMPING), pattern)

    def loss(solved: Solved) -> float:
        change = solved.weight.double() - weight.double()
        return ((change @ gram.double()) * change).sum().item()

    solved = solve(kernel)
    assert solved.weight.isfinite().all()
    assert torch.equal(solved.weight != 0, solved.keep), name
    for dtype in (torch.float32, torch.float64):
        expected = solve(sweep_block_reference, dtype)
        assert solved.keep.sum() == expected.keep.sum()
        same = (solved.keep == expected.keep).float().mean().item()
        more = loss(solved) / loss(expected) - 1
        print(f"{name}, {pattern}, {dtype}: {same:.4%} of the mask, loss {more:+.1e}")
        assert same >= 0.999
        assert abs(more) <= 1e-3


@torch.no_grad()
def main() -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from optimum_sparse.calibration import calibration_batches

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("text")
    parser.add_argument("output")
    args = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    linears = {name: model.model.layers.get_submodule(name) for name in NAMES}
    stats = {name: InputStats(linear.in_features, Needs.GRAM) for name, linear in linears.items()}
    for name, linear in linears.items():
        linear.register_forward_pre_hook(lambda _, inputs, name=name: stats[name].update(inputs[0].flatten(0, 1)))
    for batch in calibration_batches(args.text, tokenizer, num_samples=16, sequence_length=1024, batch_size=4, seed=0):
        model.model(**batch, use_cache=False)
    tensors = {f"{name}.weight": linear.weight.bfloat16() for name, linear in linears.items()}
    save_file(tensors | {f"{name}.gram": stats[name].gram for name in linears}, args.output)


if __name__ == "__main__":
    main()
