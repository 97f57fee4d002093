"""Faster arithmetic on a CPU: what it may change, and that it ends where it should."""

import functools
import threading

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from models import make_config, make_model
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM

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


def test_overlapping_uses_leave_nothing_behind():
    """Of two threads, the one that began first ends first; inside, none gets less than it asked for."""
    matmul = torch.backends.mkldnn.matmul
    before = matmul.fp32_precision
    begun, second_began, ended = threading.Event(), threading.Event(), threading.Event()
    seen = []

    def first() -> None:
        with precision.onednn_fp32("bf16"):
            seen.append(matmul.fp32_precision)
            begun.set()
            second_began.wait(10)
        ended.set()

    thread = threading.Thread(target=first)
    thread.start()
    begun.wait(10)
    with precision.onednn_fp32("tf32"):
        seen.append(matmul.fp32_precision)
        second_began.set()
        ended.wait(10)
        seen.append(matmul.fp32_precision)
    thread.join()
    assert seen == ["bf16", "tf32", "tf32"]
    assert matmul.fp32_precision == before


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
