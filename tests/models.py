"""Tiny random models of many architectures, and what the tests of whole models share.

Every model here has hidden width 32, 2 to 4 blocks and 200 tokens, so that a prune + save + load takes about 0.2 s.
"""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from optimum_sparse import SparsityConfig


# A folder with a dense SmolLM2-135M, and a .txt, .jsonl or .parquet file of 20,000 tokens or more.
REAL_MODEL, REAL_TEXT = os.environ.get("REAL_MODEL", ""), os.environ.get("REAL_TEXT", "")
needs_real_model = pytest.mark.skipif(
    not (REAL_MODEL and REAL_TEXT), reason="needs REAL_MODEL and REAL_TEXT: see tests/gpu/test_real_model.py"
)

VOCABULARY = 200
TOKENS = 24
SAMPLES = 6

_COMMON = dict(
    vocab_size=VOCABULARY,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    max_position_embeddings=64,
    bos_token_id=0,
    eos_token_id=1,
    pad_token_id=2,
)

_ROPE = dict(rope_type="default", rope_theta=10000.0)

# name -> (config class, arguments beside _COMMON)
ARCHITECTURES = {
    "llama": ("LlamaConfig", dict(num_key_value_heads=2)),
    "llama-tied": ("LlamaConfig", dict(num_key_value_heads=2, tie_word_embeddings=True, attention_bias=True)),
    "mistral": ("MistralConfig", dict(num_key_value_heads=2, sliding_window=8)),
    "qwen2": ("Qwen2Config", dict(num_key_value_heads=2)),
    "qwen3": ("Qwen3Config", dict(num_key_value_heads=2, head_dim=8)),
    "gemma3": (
        "Gemma3TextConfig",
        dict(
            num_hidden_layers=4,
            num_key_value_heads=2,
            head_dim=8,
            sliding_window=8,
            layer_types=["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
        ),
    ),
    # relu, as in the real OPT, leaves some inputs of fc2 dead, and their weights are zero beyond the pattern
    "opt": ("OPTConfig", dict(ffn_dim=64, word_embed_proj_dim=32, activation_function="gelu")),
    "gpt2": ("GPT2Config", dict(n_embd=32, n_layer=2, n_head=4, n_positions=64, n_inner=64)),
    "gpt_neox": ("GPTNeoXConfig", {}),
    "phi": ("PhiConfig", {}),
    "falcon": ("FalconConfig", dict(new_decoder_architecture=True, num_kv_heads=2, ffn_hidden_size=64)),
    "bloom": ("BloomConfig", dict(n_layer=2, n_head=4)),
    "stablelm": ("StableLmConfig", dict(num_key_value_heads=4)),
    "cohere": ("CohereConfig", dict(num_key_value_heads=2)),
    "olmo2": ("Olmo2Config", dict(num_key_value_heads=2)),
    "gptj": ("GPTJConfig", dict(n_embd=32, n_layer=2, n_head=4, n_positions=64, n_inner=64, rotary_dim=4)),
}
# Blocks of two kinds; those with attention share its weights.
SHARED = {
    "zamba2": (
        "Zamba2Config",
        dict(
            num_hidden_layers=4,
            layers_block_type=["mamba", "hybrid", "mamba", "hybrid"],
            hybrid_layer_ids=[1, 3],
            num_mem_blocks=1,
            mamba_d_state=8,
            n_mamba_heads=4,
            mamba_headdim=16,
            use_mem_rope=False,
        ),
    )
}
# Some blocks with experts and some without; transformers changes names on disk.
MIXED = {"nemotron_h": ("NemotronHConfig", dict(mamba_num_heads=4, mamba_head_dim=16))}
EXPERTS = {
    "mixtral": ("MixtralConfig", dict(num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2)),
    "qwen3_moe": (
        "Qwen3MoeConfig",
        dict(num_key_value_heads=2, head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16),
    ),
    # [experts, in, out], gate and up interleaved, biases
    "gpt_oss": (
        "GptOssConfig",
        dict(num_key_value_heads=2, head_dim=8, num_local_experts=4, num_experts_per_tok=2, rope_parameters=_ROPE),
    ),
}


def make_model(architecture: str, seed: int = 0, **changes) -> PreTrainedModel:
    """A random model in eval mode. Biases and norms are random too: zeros and ones would hide mistakes."""
    kind, arguments = (ARCHITECTURES | EXPERTS | SHARED | MIXED)[architecture]
    config = getattr(transformers, kind)(**{**_COMMON, **arguments, **changes})
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
            else:
                parameter.mul_(4)  # initialized at 0.02: attention would be flat, and position would not matter
    return model.eval()


def upcycled(model: PreTrainedModel, experts: int = 8, seed: int = 0) -> PreTrainedModel:
    """A Mixtral that computes what a Llama does: each expert is the MLP of that, and the router is random.

    For the weights of a token's experts add up to 1 (sparse upcycling, Komatsuzaki et al. 2023, section 2).
    """
    options = dict(model.config.to_dict(), num_local_experts=experts, num_experts_per_tok=2, sliding_window=None)
    for key in ("model_type", "architectures"):
        del options[key]
    torch.manual_seed(seed)
    with torch.device(model.device):
        mixtral = AutoModelForCausalLM.from_config(transformers.MixtralConfig(**options), dtype=model.dtype)
    weights = model.state_dict()
    for name, weight in mixtral.state_dict().items():
        mlp = name.partition("mlp.")[0] + "mlp."
        if name.endswith("gate_up_proj"):
            weight.copy_(torch.cat([weights[f"{mlp}gate_proj.weight"], weights[f"{mlp}up_proj.weight"]]))
        elif name.endswith("experts.down_proj"):
            weight.copy_(weights[f"{mlp}down_proj.weight"])
        elif not name.endswith("mlp.gate.weight"):
            weight.copy_(weights[name])
    return mixtral.eval()


def token_ids(samples: int = SAMPLES, tokens: int = TOKENS, seed: int = 1) -> Tensor:
    """int64 [samples, tokens] without the special tokens."""
    return torch.randint(3, VOCABULARY, (samples, tokens), generator=torch.Generator().manual_seed(seed))


def make_config(method: str = "sparsegpt", pattern: str = "2:4", **changes) -> SparsityConfig:
    """A config with calibration tokens that fit the tiny models."""
    given = dict(dataset=token_ids(), num_samples=SAMPLES, sequence_length=TOKENS, batch_size=4)
    return SparsityConfig(**{**given, "method": method, "pattern": pattern, **changes})


@torch.no_grad()
def logits(model: nn.Module, ids: Tensor | None = None) -> Tensor:
    return model(token_ids(2, 12, seed=9) if ids is None else ids, use_cache=False).logits


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """A copy of every parameter and buffer."""
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def assert_same_weights(model: nn.Module, other: nn.Module | dict[str, Tensor]) -> None:
    """All of both, bit by bit."""
    first, second = model.state_dict(), other if isinstance(other, dict) else other.state_dict()
    assert set(first) == set(second)
    different = [name for name in first if not torch.equal(first[name], second[name])]
    assert not different


def assert_same_logits(model: nn.Module, other: nn.Module) -> None:
    """All bits."""
    assert torch.equal(logits(model), logits(other))


def dense_weight(module: nn.Module) -> Tensor:
    """[out, in] of a linear of any kind."""
    if isinstance(module, Conv1D):
        return module.weight.detach().T
    return module.weight.detach()


def linears_of(module: nn.Module) -> dict[str, nn.Module]:
    """Every Linear (or subclass of it) and Conv1D under a module, by name."""
    return {name: child for name, child in module.named_modules() if isinstance(child, nn.Linear | Conv1D)}


def assert_pattern(weight: Tensor, pattern: str, sparsity: float = 0.5) -> None:
    """weight [out, in] has exactly the zeros that the pattern asks for. For weights without zeros of their own."""
    zeros = weight == 0
    if pattern == "unstructured":
        assert int(zeros.sum()) == round(sparsity * weight.numel())
        return
    kept, group = map(int, pattern.split(":"))
    assert (zeros.reshape(-1, group).sum(1) == group - kept).all()


def files_of(directory: Path) -> dict[str, bytes]:
    """Every file of a folder, by its name in it."""
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def stored_tensors(directory: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint, of all shards."""
    tensors: dict[str, Tensor] = {}
    for file in directory.glob("*.safetensors"):
        tensors |= load_file(file)
    return tensors


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def run_python(code: str, *arguments: str) -> subprocess.CompletedProcess:
    """Run code in a new interpreter, in which nothing of this package is imported yet."""
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=120, check=False
    )
