"""What must also hold on a CUDA device. Tolerances are those of fp32 sums in another order."""

import pytest
import torch
from accelerate import dispatch_model
from models import make_config, make_model
from transformers import AutoModelForCausalLM

from optimum_sparse import Pruner
from optimum_sparse.core import NM, InputStats, Needs, Unstructured, keep_top
from optimum_sparse.formats import bitmask
from optimum_sparse.hf.blocks import make_plan
from optimum_sparse.hf.sensitivity import fisher
from optimum_sparse.methods import METHODS
from optimum_sparse.nn import SparseLinear


pytestmark = pytest.mark.gpu
PATTERNS = [Unstructured(0.5), Unstructured(0.7), NM(2, 4), NM(16, 32)]


def ar_inputs(tokens, width, dtype=torch.float32):
    """Correlated inputs: each column is mostly the one before."""
    generator = torch.Generator().manual_seed(0)
    columns = [torch.randn(tokens, generator=generator)]
    for _ in range(width - 1):
        columns.append(0.8 * columns[-1] + 0.6 * torch.randn(tokens, generator=generator))
    return torch.stack(columns, 1).to(dtype)


@pytest.mark.parametrize(("n", "kept"), [(64, 0), (64, 1), (64, 7), (64, 64), (2, 1), (4, 2), (32, 16), (6, 5)])
def test_keep_top_breaks_ties_as_on_the_cpu(n, kept):
    score = torch.randint(0, 5, (33, n), generator=torch.Generator().manual_seed(0)).float()
    assert torch.equal(keep_top(score.cuda(), kept).cpu(), keep_top(score, kept))


@pytest.mark.parametrize("width", [384, 1001])  # tiles are views of the sum; those of an odd width are not aligned
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gram_accumulates_in_fp32(dtype, width):
    x = ar_inputs(5000, width, dtype)
    stats = InputStats(width, Needs.GRAM, "cuda")
    for part in x.cuda().split(777):
        stats.update(part)
    exact = x.double().T @ x.double() / len(x)
    assert ((stats.gram.cpu() - exact).norm() / exact.norm()).item() < 1e-5


@pytest.mark.parametrize("needs", [Needs.DIAGONAL, Needs.GRAM], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_norms_and_reported_errors_are_those_of_float64(dtype, needs):
    x, weight = ar_inputs(2000, 384, dtype), torch.randn(96, 384, generator=torch.Generator().manual_seed(1))
    stats = InputStats(384, needs, "cuda")
    for part in x.cuda().split(777):
        stats.update(part)
    torch.testing.assert_close(
        stats.mean_square.cpu().double(),
        x.double().square().mean(0),
        rtol=1e-5 if dtype == torch.float32 else 1e-4,
        atol=0,
    )
    for change in (1.0, 1e-2, 1e-4):  # small errors are where rounding would show
        pruned = weight + change * torch.randn(96, 384, generator=torch.Generator().manual_seed(2))
        powers = [(x.double() @ matrix.double().T).square().sum() for matrix in (pruned - weight, weight)]
        assert stats.relative_error(weight.cuda(), pruned.cuda()) == pytest.approx(
            (powers[0] / powers[1]).item(), rel=1e-4
        )


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_methods_agree_with_the_cpu(method, pattern):
    x, weight = ar_inputs(4096, 320), torch.randn(96, 320, generator=torch.Generator().manual_seed(1))
    solved = {}
    for device in ("cpu", "cuda"):
        stats = InputStats(320, Needs.GRAM, device)
        stats.update(x.to(device))
        solved[device] = METHODS[method]().solve(weight.to(device), stats, pattern)
    cpu, cuda = solved["cpu"], solved["cuda"]
    assert int(cuda.keep.sum()) == int(cpu.keep.sum())
    agreement = (cuda.keep.cpu() == cpu.keep).float().mean()
    assert agreement > (0.98 if method == "admm" else 0.999)  # iterations of ADMM carry rounding on
    assert stats.relative_error(weight.cuda(), cuda.weight) == pytest.approx(
        stats.relative_error(weight.cuda(), cpu.weight.cuda()), rel=1e-2
    )


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_bitmask_and_sparse_linear_on_the_device(pattern):
    keep = METHODS["magnitude"]().solve(torch.randn(65, 128), None, pattern)
    weight = keep.weight.to("cuda", torch.bfloat16)
    tensors = bitmask.encode(weight, pattern)
    assert torch.equal(bitmask.decode(tensors, (65, 128), pattern), weight)
    cpu = bitmask.encode(weight.cpu(), pattern)
    assert all(torch.equal(cpu[name], tensor.cpu()) for name, tensor in tensors.items())
    linear, x = (
        SparseLinear.from_dense(weight, None, pattern),
        torch.randn(3, 128, device="cuda", dtype=torch.bfloat16),
    )
    torch.testing.assert_close(linear(x), torch.nn.functional.linear(x, weight))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("method", METHODS)
def test_prune_on_load_save_and_load_compressed(method, dtype, tiny_llama, tmp_path):
    config = make_config(method, "2:4")
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, sparsity_config=config, device_map="auto", dtype=dtype)
    assert model.device.type == "cuda"
    for layer in model.hf_quantizer.report.pruned:
        weight = model.get_submodule(layer.name).weight
        assert ((weight.reshape(-1, 4) != 0).sum(1) <= 2).all()
    model.save_pretrained(tmp_path)
    ids = torch.randint(3, 199, (2, 9), device="cuda")
    dense = AutoModelForCausalLM.from_pretrained(tmp_path, device_map="cuda")
    small = AutoModelForCausalLM.from_pretrained(tmp_path, device_map="cuda", run_compressed=True)
    assert torch.equal(dense(ids).logits, model(ids).logits)
    close = {} if dtype == torch.float32 else {"rtol": 5e-2, "atol": 5e-2}
    torch.testing.assert_close(small(ids).logits, dense(ids).logits, **close)
    assert small.generate(ids, max_new_tokens=4, do_sample=False).shape == (2, 13)


def test_offloaded_model_computed_on_the_device_equals_one_in_memory():
    config = make_config("sparsegpt", "2:4")
    whole = Pruner(make_model("llama").cuda()).prune(config)
    model = make_model("llama")
    names = [name for name, module in model.named_modules() if not list(module.children())]
    device_map = {name: "cpu" if ".layers." in name else 0 for name in names}
    model = dispatch_model(model, device_map, main_device=0)
    model = Pruner(model).prune(config)
    expected = whole.state_dict()
    state, _ = model.hf_quantizer.get_state_dict_and_metadata(model)
    reference, _ = whole.hf_quantizer.get_state_dict_and_metadata(whole)
    assert expected
    for name, tensor in reference.items():
        if ".layers." in name and "proj" in name:
            assert torch.equal(state[name].cpu(), tensor.cpu()), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("padded", [False, True])
def test_sensitivities_are_the_same_every_time(dtype, padded):
    """By default attention's backward pass adds up in any order."""
    model = make_model("llama", hidden_size=256, num_attention_heads=4, num_key_value_heads=2).to("cuda", dtype)
    blocks = make_plan(model, make_config("sparsegpt", "2:4")).blocks
    ids = torch.randint(3, 199, (4, 1024), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if padded:
        batch["attention_mask"][:, :100] = 0
    first, *others = (fisher(model, blocks, [batch], 0) for _ in range(6))
    for other in others:
        for name, parts in first.tokens.items():
            assert torch.equal(parts[0], other.tokens[name][0]), name
        for name, rows in first.rows.items():
            assert torch.equal(rows, other.rows[name]), name


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("method", METHODS)
def test_a_model_spread_over_two_gpus_equals_one_on_a_single_gpu(method, tiny_llama, tmp_path):
    config = make_config(method, "2:4")
    spread = {"model.embed_tokens": 0, "model.layers.0": 0, "model.layers.1": 1}
    spread |= {"model.norm": 1, "model.rotary_emb": 0, "lm_head": 0}
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, sparsity_config=config, device_map=spread)
    assert {parameter.device.index for parameter in model.parameters()} == {0, 1}
    whole = AutoModelForCausalLM.from_pretrained(tiny_llama, sparsity_config=config, device_map="cuda:0")
    for (name, parameter), other in zip(model.named_parameters(), whole.parameters(), strict=True):
        assert torch.equal(parameter.cpu(), other.cpu()), name
    model.save_pretrained(tmp_path)
    small = AutoModelForCausalLM.from_pretrained(tmp_path, device_map=spread, run_compressed=True)
    ids = torch.randint(3, 199, (2, 9), device="cuda:0")
    torch.testing.assert_close(small(ids).logits.cpu(), whole(ids).logits.cpu())
    assert small.generate(ids, max_new_tokens=4, do_sample=False).shape == (2, 13)
