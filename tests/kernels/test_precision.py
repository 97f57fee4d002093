"""Faster arithmetic: what it may change, and that it ends where it should."""

import functools
import sys
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager

import accelerate
import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from models import assert_same_weights, logits, make_config, make_model
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM
from transformers.models.cohere import modeling_cohere
from transformers.models.llama import modeling_llama

from optimum_sparse import Pruner
from optimum_sparse.config import PAPER
from optimum_sparse.kernels import precision


@pytest.fixture
def bf16(monkeypatch):
    """As on a CPU with AMX; where there is none, the same is computed slower."""
    monkeypatch.setattr(precision, "_multiplies_bf16", lambda device: True)


def test_fp32_products_stay_fp32():
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(300, 400, generator=generator), torch.randn(400, 200, generator=generator)
    with precision.onednn_fp32():
        product = a @ b
    exact = a.double() @ b.double()
    assert ((product - exact).norm() / exact.norm()).item() < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_only_fp32_is_changed_and_only_inside(bf16, dtype):
    before = torch.backends.mkldnn.matmul.fp32_precision
    x = torch.ones(2, 4, dtype=dtype)
    with precision.fast_forward(x):
        inside = torch.nn.functional.linear(x, torch.ones(3, 4, dtype=dtype)).dtype
    assert inside == (torch.bfloat16 if dtype == torch.float32 else dtype)
    assert torch.nn.functional.linear(x, torch.ones(3, 4, dtype=dtype)).dtype == dtype
    assert torch.backends.mkldnn.matmul.fp32_precision == before


def test_precision_is_given_back_after_an_error():
    before = torch.backends.mkldnn.matmul.fp32_precision
    with pytest.raises(KeyError), precision.onednn_fp32():
        raise KeyError
    assert torch.backends.mkldnn.matmul.fp32_precision == before


def test_pruning_on_cuda_leaves_what_torch_compile_asks_for():
    """PyTorch raises at this question while a precision of oneDNN's alone is set; flex_attention asks it."""
    with FakeTensorMode():
        x = torch.empty(1, device="cuda", dtype=torch.bfloat16)
    with precision.fast_forward(x):
        assert torch.get_float32_matmul_precision() == "highest"


def test_full_fp32_is_full_on_every_device():
    """Also for a caller of PyTorch's older switch, which raises if the two disagree afterwards."""
    backends = (torch.backends.mkldnn.matmul, torch.backends.cuda.matmul)
    set_before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        before = [backend.fp32_precision for backend in backends]
        with torch.autocast("cpu", torch.bfloat16), precision.full_fp32("cpu"):
            assert [backend.fp32_precision for backend in backends] == ["ieee", "ieee"]
            assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32
        assert [backend.fp32_precision for backend in backends] == before == ["bf16", "tf32"]
        assert torch.backends.cuda.matmul.allow_tf32
    finally:
        torch.set_float32_matmul_precision(set_before)


def seen_in_overlapping(first: AbstractContextManager, second: AbstractContextManager, look: Callable) -> list:
    """What `look` sees in the first context, in both, and in the second alone. Each is a thread's own."""
    begun, second_began, ended = threading.Event(), threading.Event(), threading.Event()
    seen = []

    def enter_first() -> None:
        with first:
            seen.append(look())
            begun.set()
            second_began.wait(10)
        ended.set()

    thread = threading.Thread(target=enter_first)
    thread.start()
    begun.wait(10)
    with second:
        seen.append(look())
        second_began.set()
        assert ended.wait(10)
        seen.append(look())
    thread.join()
    return seen


def test_overlapping_uses_leave_nothing_behind():
    """Of two threads, the one that began first ends first; inside, none gets less than it asked for."""
    matmul = torch.backends.mkldnn.matmul
    before = matmul.fp32_precision
    first, second = precision.onednn_fp32("bf16"), precision.onednn_fp32("tf32")
    assert seen_in_overlapping(first, second, lambda: matmul.fp32_precision) == ["bf16", "tf32", "tf32"]
    assert matmul.fp32_precision == before


@pytest.fixture
def no_16_bits(monkeypatch):
    """As on a CPU without such products."""
    monkeypatch.setattr(precision, "is_widened", lambda dtype: dtype in (torch.bfloat16, torch.float16))


def test_oneDNN_multiplies_fp32_everywhere():
    assert not precision.is_widened(torch.float32)
    assert not precision.is_widened(torch.float64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["llama", "mixtral", "gpt2"])
def test_products_in_fp32_are_rounded_once_and_end_where_they_should(kind: str, dtype: torch.dtype, no_16_bits):
    model = make_model(kind).to(dtype)
    linears = [module for module in model.modules() if type(module) is nn.Linear]
    wanted, seen = logits(model), []

    def check(module: nn.Module, args: tuple, y: torch.Tensor) -> None:
        seen.append(module)
        parts = (args[0], module.weight, *([] if module.bias is None else [module.bias]))
        assert torch.equal(y, F.linear(*(part.float() for part in parts)).to(dtype))

    handles = [linear.register_forward_hook(check) for linear in linears if dtype != torch.float32]
    with precision.wide_products(model):
        found = logits(model)
    for handle in handles:
        handle.remove()
    assert len(seen) == len(handles)
    torch.testing.assert_close(found, wanted, rtol=0.05, atol=0.05)
    assert not any("forward" in linear.__dict__ for linear in linears)
    assert torch.equal(logits(model), wanted)


def test_products_in_fp32_of_weights_that_are_offloaded_and_of_gradients(no_16_bits):
    linear, x = nn.Linear(64, 8).bfloat16(), torch.randn(5, 64).bfloat16().requires_grad_()
    with precision.wide_products(linear):
        wanted = linear(x)
        wanted.sum().backward()
    torch.testing.assert_close(x.grad, linear.weight.float().sum(0).bfloat16().expand_as(x))
    with precision.wide_products(linear), torch.autocast("cpu", torch.float16):
        assert linear(x).dtype == torch.float16
    accelerate.cpu_offload(linear)
    assert linear.weight.is_meta
    with precision.wide_products(linear):
        torch.testing.assert_close(linear(x), wanted)


def test_pruning_without_16_bits_is_the_same_from_disk_to_disk(no_16_bits, tmp_path):
    make_model("llama").bfloat16().save_pretrained(tmp_path / "dense")
    config = make_config("sparsegpt", fisher=True)
    Pruner.from_pretrained(tmp_path / "dense").prune_to_disk(config, tmp_path / "out")
    wanted = Pruner.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "dense")).prune(config)
    assert_same_weights(AutoModelForCausalLM.from_pretrained(tmp_path / "out"), wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("kind", "count"), [("llama", 2), ("qwen3", 4), ("gemma3", 0), ("opt", 0)])
def test_norms_of_the_usual_kind_are_fused_and_come_back(kind: str, count: int, dtype: torch.dtype):
    """In bf16 once rounded instead of twice. A forward of their own (accelerate's hooks) they have again."""
    model = make_model(kind).to(dtype)
    block = model.model.decoder.layers[0] if kind == "opt" else model.model.layers[0]
    for norm in block.modules():
        if "Norm" in type(norm).__name__ and norm.weight is not None:
            torch.nn.init.uniform_(norm.weight, 0.5, 1.5)
    norms = [module for module in block.modules() if precision._is_rms_norm(module)]
    assert len(norms) == count
    if not norms:
        return
    x = torch.randn(2, 3, len(norms[0].weight), generator=torch.Generator().manual_seed(0)).to(dtype)
    wanted = norms[0](x)
    add_hook_to_module(norms[-1], ModelHook())  # as accelerate's dispatch_model does
    hooked = norms[-1].forward
    with precision.fused_norms(block):
        assert all(isinstance(norm.forward, functools.partial) for norm in norms)
        found = norms[0](x)
        assert torch.equal(norms[0](x.double()), norms[0].forward.args[1](x.double()))  # another type is left alone
    torch.testing.assert_close(found, wanted, rtol=2**-7 if dtype == torch.bfloat16 else 1e-5, atol=1e-6)
    assert torch.equal(norms[0](x), wanted)
    assert "forward" not in vars(norms[0])
    assert vars(norms[-1])["forward"] is hooked


HYBRID = dict(vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)
HYBRID |= dict(num_key_value_heads=2, pad_token_id=0, bos_token_id=1, eos_token_id=2)
MAMBA = dict(mamba_n_heads=8, mamba_d_head=16, mamba_d_state=16, mamba_n_groups=1)


@pytest.mark.parametrize(
    ("kind", "arguments"),
    [
        ("bamba", HYBRID | MAMBA | dict(attn_layer_indices=[1])),
        ("falcon_h1", HYBRID | MAMBA | dict(mamba_d_ssm=128, mamba_rms_norm=True)),
        ("kimi_linear", HYBRID),
    ],
)
def test_norms_that_take_more_than_x_are_left_alone(kind: str, arguments: dict):
    """A gate, which some can do without and others cannot."""
    if kind not in CONFIG_MAPPING:
        pytest.skip(f"this transformers has no {kind}")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **arguments)).eval()
    gated = [module for module in model.modules() if "Gated" in type(module).__name__]
    assert gated
    assert not any(map(precision._is_rms_norm, gated))
    ids = torch.arange(32)[None]
    with torch.no_grad():
        wanted = model(ids, use_cache=False).logits
        with precision.fused_norms(model):
            found = model(ids, use_cache=False).logits
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_weights_that_tell_nothing_do_not_decide():
    """Of zeros, every norm makes the same."""
    block = make_model("cohere").model.layers[0]
    norm = block.input_layernorm
    assert isinstance(norm.variance_epsilon, float)
    for weight in (torch.zeros_like(norm.weight), torch.full_like(norm.weight, torch.nan), norm.weight.data.clone()):
        norm.weight.data = weight
        assert not precision._is_rms_norm(norm)
    block = make_model("llama").model.layers[0]
    weight, block.input_layernorm.weight.data = block.input_layernorm.weight.data, torch.zeros(32)
    assert not precision._is_rms_norm(block.input_layernorm)
    block.input_layernorm.weight.data = weight
    assert precision._is_rms_norm(block.input_layernorm)
    block.post_attention_layernorm.forward = lambda x: x  # somebody's own
    assert not precision._is_rms_norm(block.post_attention_layernorm)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("kind", "fused", "count"),
    [
        ("llama", True, 4),
        ("qwen3", True, 4),
        ("mistral", True, 4),
        ("gemma3", True, 8),
        ("phi", True, 4),
        ("gpt_neox", True, 0),  # a part of each head, which the function itself takes
        ("gptj", False, 0),
        ("cohere", False, 0),
    ],
)
def test_rotary_embeddings_of_the_usual_kind_are_fused(monkeypatch, kind: str, fused: bool, count: int, dtype):
    """Each attention rotates q and k, which are transposed or sliced. In bf16 the same but for rounding."""
    model = make_model(kind).to(dtype)
    attentions = [module for module in model.modules() if type(module).__name__.endswith("Attention")]
    file = sys.modules[type(attentions[0]).__module__]
    rotary, rotated, seen, calls = file.apply_rotary_pos_emb, precision._rotated, [], []
    attentions[0].register_forward_hook(lambda module, given, output: seen.append(output[0]))
    monkeypatch.setattr(precision, "_rotated", lambda *given: calls.append(given) or rotated(*given))
    logits(model)
    with precision.fused_rotary(model):
        assert (file.apply_rotary_pos_emb is not rotary) == fused
        calls.clear()
        logits(model)
    assert len(calls) == count
    assert file.apply_rotary_pos_emb is rotary
    wanted, found = seen
    assert found.dtype == wanted.dtype == dtype
    # within a rounding of q and k, which attention passes on
    scale = wanted.float().abs().max().item()
    torch.testing.assert_close(found, wanted, rtol=0, atol=scale * (2**-5 if dtype == torch.bfloat16 else 1e-5))


def rotary_inputs(dtype: torch.dtype, positions: int = 5, size: int = 16) -> list[torch.Tensor]:
    """q, k, cos, sin; q and k are transposed, as an attention has them."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, positions, 4, size), (2, positions, 1, size), (2, positions, size), (2, positions, size))
    q, k, cos, sin = (torch.randn(shape, generator=generator).to(dtype) for shape in shapes)
    return [q.transpose(1, 2), k.transpose(1, 2), cos, sin]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dim", [1, 2])
def test_fused_rotary_embeddings_are_at_least_as_exact(dtype: torch.dtype, dim: int):
    """Against float64; with the strides of before, and inputs as they were."""
    rotary = modeling_llama.apply_rotary_pos_emb
    q, k, cos, sin = rotary_inputs(dtype, positions=64)
    if dim == 2:
        q, k = q.transpose(1, 2), k.transpose(1, 2)
    q_before, k_before = q.clone(), k.clone()
    found = precision._fused_rotary(rotary)(q, k, cos, sin, unsqueeze_dim=dim)
    before, exact = (rotary(*(x.to(to) for x in (q, k, cos, sin)), dim) for to in (dtype, torch.float64))
    for one, other, true in zip(found, before, exact, strict=True):
        assert one.dtype == other.dtype
        assert one.stride() == other.stride()
        assert (one - true).norm() <= (other - true).norm() < torch.finfo(dtype).eps * true.norm()
    assert torch.equal(q, q_before)
    assert torch.equal(k, k_before)


def test_rotary_itself_computes_what_is_not_alike_or_has_a_gradient():
    calls = []

    def rotary(q, k, cos, sin, unsqueeze_dim=1):
        calls.append(unsqueeze_dim)
        if cos.shape[-1] == 4:  # of 5, or of a head that the function turns a part of
            return q, k
        if unsqueeze_dim == 1 and q.shape[2] < cos.shape[1]:  # the last positions
            return modeling_llama.apply_rotary_pos_emb(q, q, cos[:, -q.shape[2] :], sin[:, -q.shape[2] :])[0], k
        return modeling_llama.apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim)

    fused = precision._fused_rotary(rotary)
    assert fused is not rotary
    q, k, cos, sin = rotary_inputs(torch.bfloat16)
    trained = q.detach().clone().requires_grad_()
    calls.clear()
    fused(q, k, cos, sin)
    with torch.no_grad():
        fused(trained, k, cos, sin)
    assert not calls

    for given in (
        (trained, k, cos, sin),
        (q, k, cos.float(), sin.float()),
        (q, k.float(), cos, sin),
        (q, k, cos[..., :4], sin[..., :4]),
        (q, k, cos, sin[:1]),
        (q[:, :, -3:], k, cos, sin),  # which rotary refuses, or takes the last positions for
        (q[:, :, -1:], k, cos, sin),
        rotary_inputs(torch.bfloat16, size=5),
    ):
        wanted = rotary(*given)
        calls.clear()
        found = fused(*given)
        assert calls == [1]
        assert all(map(torch.equal, found, wanted))
    wanted, found = (
        torch.autograd.grad(function(trained, k, cos, sin)[0].square().sum(), trained)[0]
        for function in (modeling_llama.apply_rotary_pos_emb, fused)
    )
    assert torch.equal(found, wanted)


class RotaryModule(torch.nn.Module):
    """As the package `kernels` makes of the function."""

    def forward(self, q, k, cos, sin, unsqueeze_dim=1):
        return modeling_llama.apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim)


def test_rotary_functions_are_known_by_what_they_take_and_give():
    usual = modeling_llama.apply_rotary_pos_emb

    def rounded_once(q, k, cos, sin, unsqueeze_dim=1):
        rotated = usual(q.float(), k.float(), cos.float(), sin.float(), unsqueeze_dim)
        return tuple(x.to(q.dtype) for x in rotated)

    def not_rounded(q, k, cos, sin, unsqueeze_dim=1):
        return usual(q.float(), k.float(), cos.float(), sin.float(), unsqueeze_dim)

    def other_way(q, k, cos, sin, unsqueeze_dim=1):
        return usual(q, k, cos, -sin, unsqueeze_dim)

    def first_half_for_both(q, k, cos, sin, unsqueeze_dim=1):  # the same where cos and sin are two equal halves
        return usual(q, k, *(x[..., : x.shape[-1] // 2].repeat(1, 1, 2) for x in (cos, sin)), unsqueeze_dim)

    def one_dim(q, k, cos, sin, unsqueeze_dim=1):
        return usual(q, k, cos, sin, 1)

    def queries_alone(q, k, cos, sin, unsqueeze_dim=1):
        return usual(q, k, cos, sin, unsqueeze_dim)[0], k

    def positions(q, k, cos, sin, position_ids=None, unsqueeze_dim=1):
        return usual(q, k, cos, sin, unsqueeze_dim)

    @functools.wraps(rounded_once)
    def compiled(*args, **kwargs):  # by torch.compile, say
        return usual(*args, **kwargs)

    for rotary in (usual, rounded_once, RotaryModule()):
        assert precision._fused_rotary(rotary) is not rotary
    others = [not_rounded, other_way, first_half_for_both, one_dim, queries_alone, positions, compiled]
    for rotary in (*others, modeling_cohere.apply_rotary_pos_emb):
        assert precision._fused_rotary(rotary) is rotary


def test_pruning_on_cuda_fuses_rotary_embeddings():
    """Of the block, also where its attention inherits from another file's; on a CPU nothing is replaced."""
    rotary = modeling_llama.apply_rotary_pos_emb
    block = make_model("llama").model.layers[0]
    block.self_attn.__class__ = type("Inherits", (modeling_llama.LlamaAttention,), {"__module__": __name__})
    block = torch.nn.ModuleList([block.self_attn])
    with FakeTensorMode():
        x = torch.empty(1, device="cuda", dtype=torch.bfloat16)
    with precision.fast_forward(x, block):
        assert modeling_llama.apply_rotary_pos_emb is precision._fused_rotary(rotary) is not rotary
    with precision.fast_forward(torch.empty(1), block):
        assert modeling_llama.apply_rotary_pos_emb is rotary


def test_rotary_embeddings_come_back():
    """After an error; nested; of two threads after the second, though the first began before it and ends first."""
    block = make_model("llama").model.layers[0]
    rotary = modeling_llama.apply_rotary_pos_emb
    fused = precision._fused_rotary(rotary)
    with pytest.raises(KeyError), precision.fused_rotary(block):
        raise KeyError
    assert modeling_llama.apply_rotary_pos_emb is rotary
    with precision.fused_rotary(block):
        with precision.fused_rotary(block):
            pass
        assert modeling_llama.apply_rotary_pos_emb is fused
    assert modeling_llama.apply_rotary_pos_emb is rotary

    first, second = precision.fused_rotary(block), precision.fused_rotary(block)
    assert seen_in_overlapping(first, second, lambda: modeling_llama.apply_rotary_pos_emb) == [fused] * 3
    assert modeling_llama.apply_rotary_pos_emb is rotary


def test_bf16_forward_prunes_nearly_as_well(bf16, monkeypatch):
    """Same weights in, nearly the same layer errors out; also inside an autocast of the caller's own."""
    fast = Pruner(make_model("llama"))
    with torch.autocast("cpu", torch.bfloat16):
        fast.prune(make_config("sparsegpt", **PAPER))
    monkeypatch.setattr(precision, "_multiplies_bf16", lambda device: False)
    exact = Pruner(make_model("llama"))
    exact.prune(make_config("sparsegpt", **PAPER))
    for one, other in zip(fast.report.pruned, exact.report.pruned, strict=True):
        assert one.sparsity == other.sparsity == 0.5
        assert one.error == pytest.approx(other.error, rel=0.05)
