"""Models whose weights are offloaded to the CPU or to disk are pruned as if they were in memory, bit by bit."""

import copy

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from models import (
    files_of,
    logits,
    make_config,
    make_model,
    sha256,
    stored_tensors,
)
from transformers import AutoModelForCausalLM

from optimum_sparse import Pruner
from optimum_sparse.hf import quantizer
from optimum_sparse.hf.placement import onload


def layer_map(disk: set[int], layers: int = 3, device: str = "disk") -> dict[str, str]:
    """A device map that puts some of the blocks on disk."""
    return {
        "model.embed_tokens": "cpu",
        "model.norm": "cpu",
        "model.rotary_emb": "cpu",
        "lm_head": "cpu",
        **{f"model.layers.{layer}": device if layer in disk else "cpu" for layer in range(layers)},
    }


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dense")
    make_model("llama", num_hidden_layers=3).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def dense_sharded(tmp_path_factory, dense):
    folder = tmp_path_factory.mktemp("sharded")
    AutoModelForCausalLM.from_pretrained(dense).save_pretrained(folder, max_shard_size="30KB")
    return folder


@pytest.fixture(scope="module")
def wanted(tmp_path_factory, dense):
    """The checkpoints that pruning in memory gives."""
    folders = {}
    for method, pattern in (("magnitude", "2:4"), ("wanda", "unstructured"), ("sparsegpt", "2:4")):
        folders[method, pattern] = tmp_path_factory.mktemp(method)
        Pruner.from_pretrained(dense).prune(make_config(method, pattern)).save_pretrained(folders[method, pattern])
    return folders


CASES = [("magnitude", "2:4"), ("wanda", "unstructured"), ("sparsegpt", "2:4")]


def assert_saved_as(model, wanted, tmp_path) -> None:
    model.save_pretrained(tmp_path / "saved")
    got, expected = stored_tensors(tmp_path / "saved"), stored_tensors(wanted)
    assert set(got) == set(expected)
    assert not [name for name in got if not torch.equal(got[name], expected[name])]
    assert (tmp_path / "saved" / "config.json").read_bytes() == (wanted / "config.json").read_bytes()
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert torch.equal(logits(again), logits(AutoModelForCausalLM.from_pretrained(wanted)))


@pytest.mark.parametrize(("method", "pattern"), CASES)
def test_offloaded_to_cpu(method, pattern, dense, wanted, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(dense)
    reference = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    cpu_offload(model, execution_device="cpu", state_dict={name: t.clone() for name, t in reference.items()})
    assert model.model.layers[0].mlp.up_proj.weight.is_meta
    Pruner.from_pretrained(model).prune(make_config(method, pattern))
    assert model.model.layers[0].mlp.up_proj.weight.is_meta  # back where it was
    pruned = AutoModelForCausalLM.from_pretrained(wanted[method, pattern])
    assert torch.equal(logits(model), logits(pruned))
    assert_saved_as(model, wanted[method, pattern], tmp_path)
    assert torch.equal(logits(model), logits(pruned))


@pytest.mark.parametrize(("method", "pattern"), CASES)
def test_offloaded_to_disk_by_accelerate(method, pattern, dense, wanted, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(dense)
    disk_offload(model, tmp_path / "offload", execution_device="cpu")
    assert model.model.layers[0].mlp.up_proj.weight.is_meta
    Pruner.from_pretrained(model).prune(make_config(method, pattern))
    assert model.model.layers[0].mlp.up_proj.weight.is_meta
    assert torch.equal(logits(model), logits(AutoModelForCausalLM.from_pretrained(wanted[method, pattern])))
    assert_saved_as(model, wanted[method, pattern], tmp_path)


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("disk", [{1}, {0, 1, 2}, {2}])
@pytest.mark.parametrize(("method", "pattern"), CASES)
def test_offloaded_to_disk_by_from_pretrained(method, pattern, disk, sharded, dense, dense_sharded, wanted, tmp_path):
    """transformers' index of offloaded weights points into the user's own files: these must not be written."""
    source = dense_sharded if sharded else dense
    before = files_of(source)
    offload = dict(device_map=layer_map(disk), offload_folder=tmp_path / "offload")
    model = AutoModelForCausalLM.from_pretrained(source, **offload)
    for layer in range(3):
        assert model.model.layers[layer].mlp.up_proj.weight.is_meta == (layer in disk)
    Pruner.from_pretrained(model).prune(make_config(method, pattern))
    for layer in range(3):
        assert model.model.layers[layer].mlp.up_proj.weight.is_meta == (layer in disk)
    assert files_of(source) == before
    assert torch.equal(logits(model), logits(AutoModelForCausalLM.from_pretrained(wanted[method, pattern])))
    assert_saved_as(model, wanted[method, pattern], tmp_path)
    assert files_of(source) == before


@pytest.mark.parametrize(("method", "pattern"), CASES)
def test_pruned_while_loaded_to_disk(method, pattern, dense, wanted, tmp_path):
    before = sha256(dense / "model.safetensors")
    model = AutoModelForCausalLM.from_pretrained(
        dense,
        sparsity_config=make_config(method, pattern),
        device_map=layer_map({0, 2}),
        offload_folder=tmp_path / "offload",
    )
    assert torch.equal(logits(model), logits(AutoModelForCausalLM.from_pretrained(wanted[method, pattern])))
    assert_saved_as(model, wanted[method, pattern], tmp_path)
    assert sha256(dense / "model.safetensors") == before


def test_pruned_to_compressed_on_disk_is_refused_before_pruning(dense, tmp_path, monkeypatch):
    monkeypatch.setattr(quantizer, "prune_model", lambda *args, **kwargs: pytest.fail("pruning began"))
    with pytest.raises(ValueError, match=r"run_compressed= .* model\.layers\.0, model\.layers\.2 are offloaded"):
        AutoModelForCausalLM.from_pretrained(
            dense,
            sparsity_config=make_config("magnitude"),
            run_compressed=True,
            device_map=layer_map({0, 2}),
            offload_folder=tmp_path / "offload",
        )


def test_pruned_to_compressed_with_only_dense_weights_on_disk(dense, wanted, tmp_path):
    """What is not compressed may be offloaded."""
    model = AutoModelForCausalLM.from_pretrained(
        dense,
        sparsity_config=make_config("magnitude"),
        run_compressed=True,
        device_map=layer_map(set()) | {"lm_head": "disk"},
        offload_folder=tmp_path / "offload",
    )
    assert model.lm_head.weight.is_meta
    pruned = AutoModelForCausalLM.from_pretrained(wanted["magnitude", "2:4"])
    torch.testing.assert_close(logits(model), logits(pruned))
    assert_saved_as(model, wanted["magnitude", "2:4"], tmp_path)


@pytest.mark.parametrize(("run_compressed", "offload_buffers"), [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize(("method", "pattern"), CASES)
def test_sparse_checkpoint_loaded_to_disk(method, pattern, run_compressed, offload_buffers, wanted, tmp_path):
    source = wanted[method, pattern]
    before = files_of(source)
    model = AutoModelForCausalLM.from_pretrained(
        source,
        device_map=layer_map({0, 2}),
        offload_folder=tmp_path / "offload",
        offload_buffers=offload_buffers,
        run_compressed=run_compressed,
    )
    expected = logits(AutoModelForCausalLM.from_pretrained(source))
    torch.testing.assert_close(logits(model), expected)
    assert_saved_as(model, source, tmp_path)
    assert files_of(source) == before


def test_dequantize_refuses_what_is_not_in_memory(wanted, tmp_path):
    """Weights on the meta device would become zeros, or whatever lies in memory."""
    offload = dict(device_map=layer_map({0, 2}), offload_folder=tmp_path / "offload")
    model = AutoModelForCausalLM.from_pretrained(wanted["magnitude", "2:4"], run_compressed=True, **offload)
    before = logits(model)
    with pytest.raises(ValueError, match=r"offloaded, and only those in memory .*without run_compressed=True"):
        model.dequantize()
    assert torch.equal(logits(model), before)  # nothing has begun
    model = AutoModelForCausalLM.from_pretrained(wanted["magnitude", "2:4"], **offload)
    with pytest.raises(ValueError, match=r"offloaded.* or become torch\.float16"):
        model.dequantize(dtype=torch.float16)
    model.dequantize()
    torch.testing.assert_close(logits(model), before)


def test_weights_that_nothing_changed_are_not_written(dense, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(dense, device_map=layer_map({1}), offload_folder=tmp_path / "offload")
    before = set(files_of(tmp_path))
    with onload(model.model.layers[1]):
        assert not model.model.layers[1].mlp.up_proj.weight.is_meta
    assert model.model.layers[1].mlp.up_proj.weight.is_meta
    assert set(files_of(tmp_path)) == before


@pytest.mark.parametrize("where", ["memory", "cpu", "disk"])
def test_onload_keeps_what_is_written_and_comes_back_after_an_error(where, dense, tmp_path):
    if where == "disk":
        model = AutoModelForCausalLM.from_pretrained(dense, device_map=layer_map({1}), offload_folder=tmp_path)
    else:
        model = AutoModelForCausalLM.from_pretrained(dense)
    if where == "cpu":
        cpu_offload(model, execution_device="cpu")
    other = AutoModelForCausalLM.from_pretrained(dense)
    other.model.layers[1].mlp.up_proj.weight.data = torch.ones_like(other.model.layers[1].mlp.up_proj.weight)
    block = model.model.layers[1]
    with onload(block):
        block.mlp.up_proj.weight.data = torch.ones_like(block.mlp.up_proj.weight)
    assert torch.equal(logits(model), logits(other))
    with pytest.raises(KeyError), onload(block):
        raise KeyError
    assert block.mlp.up_proj.weight.is_meta == (where != "memory")
    assert torch.equal(logits(model), logits(other))


def test_tied_embeddings_of_offloaded_models_stay_tied(tiny_llama, tmp_path):
    wanted = Pruner.from_pretrained(tiny_llama).prune(make_config("sparsegpt"))
    model = AutoModelForCausalLM.from_pretrained(
        tiny_llama, device_map=layer_map({0, 1}, layers=2), offload_folder=tmp_path / "offload"
    )
    Pruner.from_pretrained(model).prune(make_config("sparsegpt"))
    assert torch.equal(logits(model), logits(wanted))
    model.save_pretrained(tmp_path / "a")
    wanted.save_pretrained(tmp_path / "b")
    first, second = stored_tensors(tmp_path / "a"), stored_tensors(tmp_path / "b")
    assert set(first) == set(second)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_conv1d_offloaded(tmp_path):
    model = make_model("gpt2")
    wanted = Pruner.from_pretrained(copy.deepcopy(model)).prune(make_config("sparsegpt"))
    cpu_offload(model, execution_device="cpu")
    Pruner.from_pretrained(model).prune(make_config("sparsegpt"))
    assert torch.equal(logits(model), logits(wanted))
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(wanted))


def test_text_of_an_offloaded_model(dense):
    config = make_config("wanda", dataset="self", num_samples=4, sequence_length=12)
    wanted = Pruner.from_pretrained(dense).prune(config)
    model = AutoModelForCausalLM.from_pretrained(dense)
    cpu_offload(model, execution_device="cpu")
    Pruner.from_pretrained(model).prune(config)
    assert torch.equal(logits(model), logits(wanted))


@pytest.mark.gpu
@pytest.mark.parametrize(("method", "pattern"), CASES)
def test_offloaded_from_cuda(method, pattern, dense, tmp_path):
    """Blocks computed on the GPU and kept on the CPU: as with the model on the GPU."""
    model = AutoModelForCausalLM.from_pretrained(dense)
    whole = copy.deepcopy(model).to("cuda")
    devices = {name: 0 if device == "cpu" else "cpu" for name, device in layer_map({0, 2}).items()}
    model = dispatch_model(model, devices, main_device=0)
    Pruner.from_pretrained(model).prune(make_config(method, pattern))
    Pruner.from_pretrained(whole).prune(make_config(method, pattern))
    model.save_pretrained(tmp_path / "a")
    whole.save_pretrained(tmp_path / "b")
    first, second = stored_tensors(tmp_path / "a"), stored_tensors(tmp_path / "b")
    assert set(first) == set(second)
    assert all(torch.equal(first[name], second[name]) for name in first)
