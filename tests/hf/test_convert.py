"""Checkpoints that compressed-tensors wrote become ours, or dense, to the bit; CSR; what formats would take."""

import json
import re
import shutil

import pytest
import torch
from helpers import legacy_tensors
from models import make_config, make_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import optimum_sparse  # noqa: F401 - registers
from optimum_sparse import Pruner
from optimum_sparse.core import NM, Unstructured, keep_mask, violation
from optimum_sparse.formats import csr
from optimum_sparse.hf import convert as module
from optimum_sparse.hf.checkpoint import read_report
from optimum_sparse.hf.convert import convert, export_csr, survey


FORMATS = ["sparse-24-bitmask", "sparse-bitmask"]
LINEAR = re.compile(r".*layers\.\d+\..*_proj\.weight")


def write_legacy(
    folder, name, architecture="llama", place="quantization_config", stem="", only=LINEAR, shards=1, pattern=None
):
    """A checkpoint in this legacy format, and its dense weights."""
    make_model(architecture).to(torch.bfloat16).save_pretrained(folder)
    state = load_file(folder / "model.safetensors")
    pattern = pattern or (NM(2, 4) if name == "sparse-24-bitmask" else Unstructured(0.6))
    for key, tensor in state.items():
        if only.fullmatch(key):
            matrix = tensor if tensor.dim() == 2 else tensor[None]
            state[key] = (matrix * keep_mask(matrix.abs(), pattern)).view(tensor.shape)
    stored = {}
    for key, tensor in state.items():
        if only.fullmatch(key):
            parts = legacy_tensors(tensor, name, shape_as_column=not stem)
            stored |= {f"{key.removesuffix('weight')}{stem}{part}": value for part, value in parts.items()}
        else:
            stored[key] = tensor
    (folder / "model.safetensors").unlink()
    names = sorted(stored)
    for number in range(shards):  # parts of a matrix are in different files
        part = {key: stored[key] for key in names[number::shards]}
        save_file(part, folder / f"model-{number + 1:05d}-of-{shards:05d}.safetensors", {"format": "pt"})
    content = json.loads((folder / "config.json").read_text())
    sparsity = {"format": name, "sparsity_structure": str(pattern), "targets": ["Linear"], "ignore": ["lm_head"]}
    content[place] = {"quant_method": "compressed-tensors", "sparsity_config": sparsity}
    (folder / "config.json").write_text(json.dumps(content))
    return state


def assert_loads(folder, state):
    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    loaded = model.state_dict()
    assert set(loaded) >= set(state)
    for name, tensor in state.items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name], tensor), name
    return model


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize(
    "written", [{}, {"place": "compression_config", "stem": "weight."}, {"shards": 3}], ids=["new", "old", "shards"]
)
def test_converted_to_the_bit(name, dense, written, tmp_path):
    state = write_legacy(tmp_path / "legacy", name, **written)
    (tmp_path / "legacy" / "recipe.yaml").write_text("mine")
    report = convert(tmp_path / "legacy", tmp_path / "out", dense)
    model = assert_loads(tmp_path / "out", state)
    assert (tmp_path / "out" / "recipe.yaml").read_text() == "mine"
    content = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "compression_config" not in content
    assert report.method == f"converted from {name}"
    assert len(report.layers) == 14
    if dense:
        assert "quantization_config" not in content
        assert read_report(tmp_path / "out") is None
        return
    assert read_report(tmp_path / "out") == report
    for layer in report.layers:
        assert layer.sparsity == pytest.approx((state[f"{layer.name}.weight"] == 0).float().mean().item())
    assert model.hf_quantizer.quantization_config.pattern == ("2:4" if "24" in name else "unstructured")
    compressed = AutoModelForCausalLM.from_pretrained(tmp_path / "out", run_compressed=True)
    ids = torch.arange(3, 19)[None]
    torch.testing.assert_close(compressed(ids).logits, model(ids).logits)


def test_a_bitmask_that_follows_a_pattern_is_stored_in_it(tmp_path, monkeypatch):
    """Kernels are made for N:M. Matrices that were dense stay so."""
    monkeypatch.setattr(module, "SHARD", 2**12)  # several files
    some = re.compile(r".*(up|down)_proj\.weight")
    state = write_legacy(tmp_path / "a", "sparse-bitmask", only=some, pattern=NM(4, 8))
    report = convert(tmp_path / "a", tmp_path / "out")
    assert {layer.pattern for layer in report.pruned} == {"4:8"}
    assert {layer.skipped for layer in report.skipped} == {"it was dense"}
    config = assert_loads(tmp_path / "out", state).hf_quantizer.quantization_config
    assert (config.pattern, config.allocated) == ("4:8", {})
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 3


def test_everything_was_compressed(tmp_path):
    """Early releases did so to embeddings, norms and the head, which this package keeps dense, and says so."""
    state = write_legacy(tmp_path / "a", "sparse-bitmask", only=re.compile(r".*\.weight"), stem="weight.")
    report = convert(tmp_path / "a", tmp_path / "out")
    assert_loads(tmp_path / "out", state)
    named = {layer.name: layer.skipped for layer in report.skipped}
    assert named["lm_head"] == named["model.norm"] == "not a linear of a decoder block"


def test_a_model_with_transposed_linears(tmp_path):
    linear = re.compile(r".*\.h\.\d+\..*(c_\w+)\.weight")
    state = write_legacy(tmp_path / "a", "sparse-bitmask", "gpt2", only=linear)
    for dense in (False, True):
        convert(tmp_path / "a", tmp_path / f"out-{dense}", dense)
        assert_loads(tmp_path / f"out-{dense}", state)


def test_experts_that_transformers_joins_are_stored_dense_and_named(tmp_path):
    """They lie under other names on disk, gate and up apart."""
    linear = re.compile(r".*(_proj|w[123])\.weight")
    state = write_legacy(tmp_path / "a", "sparse-24-bitmask", "mixtral", only=linear)
    make_model("mixtral").to(torch.bfloat16).save_pretrained(tmp_path / "dense")
    save_file(state, tmp_path / "dense" / "model.safetensors", {"format": "pt"})
    expected = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype="auto").state_dict()
    report = convert(tmp_path / "a", tmp_path / "out")
    assert_loads(tmp_path / "out", expected)
    assert len(report.pruned) == 8
    experts = [layer for layer in report.skipped if ".experts." in layer.name]
    assert len(experts) == 24
    assert {layer.skipped for layer in experts} == {"not a linear of a decoder block"}


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("place", ["quantization_config", "compression_config"])
def test_loading_one_is_refused(name, place, tmp_path):
    """transformers would put random numbers in place of all its compressed weights."""
    write_legacy(tmp_path / "a", name, place=place)
    for cls in (AutoModelForCausalLM, type(make_model("llama"))):
        with pytest.raises(ValueError, match=f"'{name}' of compressed-tensors.*sparse convert"):
            cls.from_pretrained(tmp_path / "a")


def no_config(folder):
    (folder / "config.json").unlink()


def rename_all(folder):
    path = next(folder.glob("*.safetensors"))
    save_file({"model.norm.weight": load_file(path)["model.norm.weight"]}, path)


def quantized(folder):
    content = json.loads((folder / "config.json").read_text())
    content["quantization_config"]["config_groups"] = {"group_0": {"weights": {"num_bits": 8}}}
    (folder / "config.json").write_text(json.dumps(content))


def change(key, new):
    def apply(folder):
        path = next(folder.glob("*.safetensors"))
        tensors = load_file(path)
        name = f"model.layers.1.mlp.up_proj.{key}"
        tensors[name] = new(tensors[name])
        save_file({k: v for k, v in tensors.items() if v is not None}, path)

    return apply


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (no_config, FileNotFoundError, "no folder with a config.json.*hf download"),
        (rename_all, ValueError, "no tensor whose name ends in .compressed"),
        (quantized, ValueError, "quantized on top of its sparsity"),
        (change("compressed", lambda t: t.to(torch.float8_e4m3fn)), ValueError, r"up_proj: .*float8.*quantized"),
        (change("compressed", lambda t: None), ValueError, r"up_proj: .*missing \['compressed'\]"),
        (change("shape", lambda t: t * 2), ValueError, "up_proj: bitmask is"),
        (change("shape", lambda t: t.flip(0)), ValueError, r"up_proj: shape is \[32, 64\], the model's .*\[64, 32\]"),
        (lambda folder: next(folder.glob("*.safetensors")).write_bytes(b"x" * 99), OSError, "cannot be read"),
        (lambda folder: next(folder.glob("*.safetensors")).unlink(), FileNotFoundError, "no .safetensors files"),
    ],
)
def test_refused_and_nothing_left(damage, error, message, tmp_path):
    write_legacy(tmp_path / "a", "sparse-24-bitmask")
    damage(tmp_path / "a")
    for dense in (False, True):
        with pytest.raises(error, match=message):
            convert(tmp_path / "a", tmp_path / "out", dense)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_existing_output_and_other_checkpoints_are_refused(tiny_llama, sparse_checkpoints, tmp_path):
    write_legacy(tmp_path / "a", "sparse-bitmask")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("precious")
    with pytest.raises(FileExistsError, match="not an empty folder"):
        convert(tmp_path / "a", tmp_path / "out")
    for source in (tiny_llama, sparse_checkpoints["2:4"]):
        with pytest.raises(ValueError, match="in none of the formats that are converted"):
            convert(source, tmp_path / "other")
    with pytest.raises(ValueError, match="not a sparse checkpoint"):
        export_csr(tiny_llama, tmp_path / "other")


@pytest.mark.parametrize("pattern", ["2:4", "unstructured"])
def test_csr_export(pattern, sparse_checkpoints, tmp_path):
    found = export_csr(sparse_checkpoints[pattern], tmp_path / "out")
    dense = AutoModelForCausalLM.from_pretrained(sparse_checkpoints[pattern]).state_dict()
    stored, shapes = {}, {}
    for path in (tmp_path / "out").glob("*.safetensors"):
        stored |= load_file(path)
        with safe_open(path, "pt") as opened:
            shapes |= {k.removesuffix("_shape"): json.loads(v) for k, v in opened.metadata().items() if k != "format"}
    assert len(shapes) == len(found.matrices) == 14
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    sizes = 0
    for name, tensor in dense.items():
        if name in shapes:
            keys = ("weight", "weight_crow_indices", "weight_col_indices")
            parts = {key: stored[f"{name.removesuffix('weight')}{key}"] for key in keys}
            sizes += sum(part.nbytes for part in parts.values())
            tensor_again = csr.decode(parts, tuple(shapes[name])).to_dense()
            assert torch.equal(tensor_again, tensor)
        elif name in stored:
            assert torch.equal(stored[name], tensor)
    assert found.nbytes["csr"] == sizes
    with pytest.raises(RuntimeError, match=r"shape|size"):  # not random numbers
        AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    with pytest.raises(ValueError, match=r"proj: shape is \[\d+\], the model's weight has \[\d+, \d+\]"):
        survey(tmp_path / "out")


def test_survey_of_dense_and_sparse_forms_of_one_model_agree(sparse_checkpoints, tmp_path):
    """Zeros are counted, patterns checked and bytes added up by hand."""
    for pattern, folder in sparse_checkpoints.items():
        model = AutoModelForCausalLM.from_pretrained(folder)
        model.dequantize()
        model.save_pretrained(tmp_path / pattern)
        forms = [survey(folder), survey(tmp_path / pattern)]
        state = model.state_dict()
        for found in forms:
            assert len(found.matrices) == 14
            total = dict.fromkeys(("dense", "csr", "int8", "int4"), 0)
            for matrix in found.matrices:
                weight = state[f"{matrix.name}.weight"]
                zeros = int((weight == 0).sum())
                rows, columns = weight.shape
                assert matrix.sparsity == pytest.approx(zeros / weight.numel())
                assert (NM(2, 4) in matrix.patterns) == (violation(weight, NM(2, 4)) is None) == (pattern == "2:4")
                total["dense"] += 4 * weight.numel()
                total["csr"] += 8 * (weight.numel() - zeros) + 4 * (rows + 1)
                total["int8"] += weight.numel() + 2 * rows
                total["int4"] += weight.numel() // 2 + 2 * rows * -(-columns // 128)
            assert {name: found.nbytes[name] for name in total} == total
        stored = sum(
            tensor.nbytes
            for name, tensor in load_file(folder / "model.safetensors").items()
            if re.search(r"_proj\.weight", name)
        )
        assert forms[0].nbytes == forms[1].nbytes
        assert forms[0].nbytes["bitmask"] == stored
        assert forms[0].other_bytes == forms[1].other_bytes


@pytest.mark.parametrize("architecture", ["mixtral", "gpt_oss", "gpt2"])
def test_survey_finds_experts_and_transposed_matrices(architecture, tmp_path):
    Pruner.from_pretrained(make_model(architecture)).prune(make_config("magnitude", "2:4")).save_pretrained(
        tmp_path / "sparse"
    )
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "sparse")
    model.dequantize()
    model.save_pretrained(tmp_path / "dense")
    sparse, dense = survey(tmp_path / "sparse"), survey(tmp_path / "dense")
    for found in (sparse, dense):
        assert all(NM(2, 4) in matrix.patterns for matrix in found.matrices)
    assert sparse.nbytes["dense"] == dense.nbytes["dense"]
    assert sparse.nbytes["bitmask"] == dense.nbytes["bitmask"]


def test_survey_of_a_legacy_checkpoint(tmp_path):
    write_legacy(tmp_path / "a", "sparse-24-bitmask")
    found = survey(tmp_path / "a")
    assert found.source.legacy == "sparse-24-bitmask"
    assert found.nbytes["bitmask"] / found.nbytes["dense"] == 0.5625
    convert(tmp_path / "a", tmp_path / "out")
    assert survey(tmp_path / "out").nbytes == found.nbytes
    shutil.rmtree(tmp_path / "out")
