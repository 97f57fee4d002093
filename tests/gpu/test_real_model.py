"""A real model on a GPU: what it computes and writes when it is compressed, and where it may lie when it is pruned.

PYTHONPATH=examples python -c "import quickstart as q; q.fetch_smollm2(q.Path('.quickstart/dense'))"
REAL_MODEL=.quickstart/dense REAL_TEXT=c4.txt python -m pytest tests/gpu/test_real_model.py tests/gpu/test_memory.py
"""

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from models import REAL_MODEL as MODEL
from models import REAL_TEXT as TEXT
from models import assert_pattern, assert_same_weights, files_of, logits, needs_real_model, sha256, upcycled
from torch import Tensor
from torch.nn.functional import cross_entropy, pad
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from optimum_sparse import Pruner, SparsityConfig
from optimum_sparse.calibration import calibration_batches
from optimum_sparse.nn import SparseLinear


pytestmark = [pytest.mark.gpu, needs_real_model]
SAMPLES, LENGTH = 16, 512
METHODS = {"2:4": "sparsegpt", "16:32": "sparsegpt", "unstructured": "wanda"}
WRITTEN = {torch.bfloat16: 64, torch.float16: 24, torch.float32: 24}  # tokens


def load(folder: str | Path, **how) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, **{"device_map": "cuda", **how})


# ---- where it lies when it is pruned


def in_memory(config: SparsityConfig, folder: Path) -> None:
    Pruner(load(MODEL)).prune(config).save_pretrained(folder)


def spread(config: SparsityConfig, folder: Path) -> None:
    """Blocks in turn on the GPU, in host memory and on disk."""
    blocks = AutoConfig.from_pretrained(MODEL).num_hidden_layers
    places = {f"model.layers.{i}": (0, "cpu", "disk")[i % 3] for i in range(blocks)}
    places |= dict.fromkeys(("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"), 0)
    model = load(MODEL, device_map=places, offload_folder=folder.with_name("offload"))
    assert {str(place) for place in model.hf_device_map.values()} == {"0", "cpu", "disk"}
    Pruner(model).prune(config).save_pretrained(folder)


def from_disk_to_disk(config: SparsityConfig, folder: Path) -> None:
    Pruner.from_pretrained(MODEL, device_map="cuda").prune_to_disk(config, folder)


@pytest.fixture(scope="module")
def tokens() -> Tensor:
    """int64 [SAMPLES + 1, LENGTH] of TEXT: the last row is not for calibration."""
    shape = dict(num_samples=SAMPLES + 1, sequence_length=LENGTH, batch_size=SAMPLES + 1)
    return calibration_batches(TEXT, AutoTokenizer.from_pretrained(MODEL), **shape, seed=0)[0]["input_ids"]


@pytest.fixture(scope="module")
def config(tokens: Tensor) -> Callable[[str], SparsityConfig]:
    given = dict(dataset=tokens[:-1], num_samples=SAMPLES, sequence_length=LENGTH)
    return lambda pattern: SparsityConfig(method=METHODS[pattern], pattern=pattern, **given)


@pytest.fixture(scope="module")
def pruned(config, tmp_path_factory) -> Callable[[str], Path]:
    """Pattern -> a checkpoint, pruned in memory. Read only."""

    @cache
    def prune(pattern: str) -> Path:
        folder = tmp_path_factory.mktemp("pruned")
        in_memory(config(pattern), folder)
        return folder

    return prune


@pytest.mark.parametrize("way", [in_memory, spread, from_disk_to_disk])
@pytest.mark.parametrize("pattern", ["2:4", "unstructured"])
def test_pruned_to_the_same_bits(pattern, way, config, pruned, tmp_path):
    """Also a second time in the same way. The original files are only read."""
    before = {path: sha256(path) for path in Path(MODEL).iterdir()}
    way(config(pattern), tmp_path / "out")
    assert_same_weights(load(tmp_path / "out"), load(pruned(pattern)))
    assert {path: sha256(path) for path in Path(MODEL).iterdir()} == before


def loss(model: PreTrainedModel, text: Tensor) -> float:
    """Nats per token."""
    return cross_entropy(logits(model, text)[0, :-1].float(), text[0, 1:]).item()


def test_each_expert_by_its_own_tokens(config, pruned, tokens, tmp_path):
    text = tokens[-1:].cuda()
    dense = load(MODEL, dtype=torch.float32)
    model = upcycled(dense)
    assert loss(model, text) == pytest.approx(loss(dense, text), abs=1e-3)
    pruner = Pruner(model)
    pruner.prune(config("2:4")).save_pretrained(tmp_path)
    routed = {layer.name: layer.routed for layer in pruner.report.pruned if layer.routed is not None}
    for number, block in enumerate(model.model.layers):
        experts, name = block.mlp.experts, f"model.layers.{number}.mlp.experts"
        for kind, weight in (("gate_up_proj", experts.gate_up_proj), ("down_proj", experts.down_proj)):
            assert_pattern(weight.flatten(0, 1), "2:4")
            counts = [routed[f"{name}.{i}.{kind}"] for i in range(len(weight))]
            assert sum(counts) == 2 * SAMPLES * LENGTH
            if kind == "down_proj":
                continue
            # They began with the same weights, and all of them that saw fewer tokens than inputs have the layer's.
            for i, mask in enumerate(weight[:-1] == 0):
                enough = max(counts[i : i + 2]) >= weight.shape[2]
                assert torch.equal(mask, weight[i + 1] == 0) != enough
    assert any(layer.too_few_routed for layer in pruner.report.pruned)
    assert "fewer routed tokens than inputs, so all tokens of the layer were used: model.layers." in str(pruner.report)
    assert loss(model, text) == pytest.approx(loss(load(pruned("2:4"), dtype=torch.float32), text), abs=0.1)
    small, back = load(tmp_path, run_compressed=True), load(tmp_path)
    assert_same_weights(back, model)
    assert (logits(small, text) - logits(back, text)).norm() <= 2e-5 * logits(back, text).norm()


# ---- what it computes and writes when it is compressed


@pytest.mark.parametrize("run_compressed", [True, "decode"])
@pytest.mark.parametrize("pattern", METHODS)
def test_saved_from_compressed_as_it_was(pattern, run_compressed, pruned, tmp_path):
    load(pruned(pattern), run_compressed=run_compressed).save_pretrained(tmp_path)
    assert files_of(tmp_path) == files_of(pruned(pattern))


@pytest.mark.parametrize("dtype", WRITTEN, ids=str)
@pytest.mark.parametrize("pattern", METHODS)
def test_logits(pattern, dtype, pruned, tokens):
    """About as far from those in fp32 as the decompressed model's, by norms; in fp32 they are those."""
    texts = tokens[-8:, None, :200].cuda()
    model = load(pruned(pattern), dtype=torch.float32)
    exact = [logits(model, text).double() for text in texts]

    def error(**how) -> Tensor:
        """The geometric mean over several numbers of tokens and texts, of which each varies by a factor of up to
        seven: of 64 it was 0.96 to 1.16 times that of the decompressed model. NaN if one is."""
        model = load(pruned(pattern), dtype=dtype, **how)
        assert how == {} or any(isinstance(module, SparseLinear) for module in model.modules())
        errors = [
            (logits(model, text[:, :n]) - wanted[:, :n]).norm() / wanted[:, :n].norm()
            for text, wanted in zip(texts, exact, strict=True)
            for n in (1, 4, 9, 200)
        ]
        return torch.stack(errors).log().mean().exp()

    for run_compressed in (True, "decode"):
        assert error(run_compressed=run_compressed) <= (2e-5 if dtype == torch.float32 else 1.5 * error())


@pytest.mark.parametrize("dtype", WRITTEN, ids=str)
@pytest.mark.parametrize("pattern", METHODS)
@torch.no_grad()
def test_greedy_text(pattern, dtype, pruned, tokens):
    """What the decompressed model would write: alone and in a left-padded batch, with a growing and a static cache.

    It is asked, without a cache, for the token after each beginning of the text. Another one is allowed where it has
    the two closer than twice the rounding: the most that any of its logits there is off from fp32. In fp32 none is.
    """
    count = WRITTEN[dtype]
    small = load(pruned(pattern), dtype=dtype, run_compressed=True)
    dense, exact = (load(pruned(pattern), dtype=kind) for kind in (dtype, torch.float32))
    for size in (1, 9):
        prompts = [tokens[-1, 30 * i : 30 * i + 12 + 5 * i].cuda() for i in range(size)]
        ids = pad_sequence(prompts, batch_first=True, padding_side="left")
        mask = pad_sequence([torch.ones_like(row) for row in prompts], batch_first=True, padding_side="left")
        for kind in (None, "static"):
            options = dict(do_sample=False, eos_token_id=None, cache_implementation=kind, disable_compile=True)
            text = small.generate(ids, attention_mask=mask, max_new_tokens=count, **options)
            seen = pad(mask, (0, count), value=1)
            given = dict(attention_mask=seen, position_ids=(seen.cumsum(1) - 1).clamp(min=0), use_cache=False)
            wanted, in_fp32 = (model(text, **given).logits[:, -count - 1 : -1].float() for model in (dense, exact))
            behind = wanted.amax(-1) - wanted.gather(-1, text[:, -count:, None])[..., 0]
            assert (behind <= 2 * (wanted - in_fp32).abs().amax(-1)).all()
