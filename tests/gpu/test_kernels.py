"""The CUDA kernels on a GPU: every pattern, dtype, number of tokens; and models that run on them."""

import copy
import json
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from models import make_config, make_model
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, StaticCache

from optimum_sparse import Pruner
from optimum_sparse.core import NM, Pattern, Unstructured, keep_mask
from optimum_sparse.kernels import cuda, cusparselt
from optimum_sparse.kernels import linear as linear_module
from optimum_sparse.kernels.linear import linear, reference, select
from optimum_sparse.nn import SparseLinear


pytestmark = pytest.mark.gpu
PATTERNS = [NM(2, 4), NM(1, 2), NM(4, 8), NM(16, 32), NM(3, 4), NM(1, 8), NM(3, 6), NM(1, 16)]
PATTERNS += [Unstructured(0.3), Unstructured(0.5), Unstructured(0.6), Unstructured(0.97)]
TOLERANCE = {torch.bfloat16: 8e-3, torch.float16: 1e-3}  # cuBLAS rounds before it adds the bias


def sparse(shape: tuple[int, int], pattern: Pattern, dtype: torch.dtype) -> torch.Tensor:
    weight = torch.randn(shape, generator=torch.Generator("cuda").manual_seed(0), device="cuda")
    weight = weight * keep_mask(weight.abs(), pattern)
    if isinstance(pattern, Unstructured) and pattern.sparsity > 0.5:
        weight[::3] = 0
    return weight.to(dtype)


def check(y: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
    wanted = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    size = F.linear(x.double().abs(), weight.double().abs(), None if bias is None else bias.double().abs())
    assert ((y.double() - wanted).abs() / size.clamp(min=1e-30)).max() < TOLERANCE[weight.dtype]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_against_float64(pattern: Pattern, dtype: torch.dtype):
    for shape in ((37, 96), (257, 1536), (1000, 4128)):
        weight = sparse(shape, pattern, dtype)
        layer = SparseLinear.from_dense(weight, torch.randn(shape[0], device="cuda", dtype=dtype), pattern)
        assert torch.equal(layer.to_dense(), weight)
        for tokens in (1, 2, 3, 4, 5, 8, 9, 16, 17, 33, 64, 65, 300):
            x = torch.randn(tokens, shape[1], device="cuda", dtype=dtype)
            poison = torch.full((tokens, shape[0]), float("nan"), device="cuda", dtype=dtype)
            del poison
            check(layer(x), x, weight, layer.bias)
            assert select(weight.device, dtype, pattern, shape, tokens).backend != "reference"


@pytest.mark.parametrize("pattern", [NM(2, 4), NM(16, 32), NM(1, 8), Unstructured(0.5), Unstructured(0.7)], ids=str)
def test_a_matrix_whose_steps_are_shared_out(pattern: Pattern):
    """By `stream` from 9 tokens on, or 5 with overflow. Blocks wait for what others leave, so: again and again."""
    weight = sparse((8200, 4128), pattern, torch.bfloat16)
    layer = SparseLinear.from_dense(weight, None, pattern)
    for tokens in (5, 8, 9, 16, 32, 64, 128, 300, 512):
        x = torch.randn(tokens, 4128, device="cuda").bfloat16()
        first = layer(x)
        check(first, x, weight, None)
        for _ in range(20):
            assert torch.equal(layer(x), first)
        assert torch.equal(replayed(layer, x), first)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("pattern", [NM(2, 4), NM(16, 32), NM(1, 8), Unstructured(0.5), Unstructured(0.7)], ids=str)
def test_a_matrix_whose_columns_clusters_share_out(pattern: Pattern, dtype: torch.dtype):
    """By `stream` on Hopper, where rows are few. Blocks read one another's shared memory, so: again and again."""
    weight = sparse((4001, 4352), pattern, dtype)
    layer = SparseLinear.from_dense(weight, torch.randn(4001, device="cuda").to(dtype), pattern)
    for tokens in (33, 50, 64, 100, 128):
        x = torch.randn(tokens, 4352, device="cuda").to(dtype)
        first = layer(x)
        check(first, x, weight, layer.bias)
        for _ in range(20):
            assert torch.equal(layer(x), first)
        assert torch.equal(replayed(layer, x), first)


@pytest.mark.parametrize("pattern", [NM(2, 4), NM(16, 32), Unstructured(0.5)], ids=str)
def test_rows_too_wide_for_shared_memory(pattern: Pattern):
    weight = sparse((19, 65536), pattern, torch.bfloat16)
    layer = SparseLinear.from_dense(weight, None, pattern)
    for tokens in (1, 4, 8):
        x = torch.randn(tokens, 65536, device="cuda").bfloat16()
        check(layer(x), x, weight, None)


@pytest.mark.parametrize("pattern", [NM(2, 4), NM(16, 32), Unstructured(0.5)], ids=str)
def test_what_the_kernels_do_not_take_runs_through_the_reference(pattern: Pattern):
    for shape, dtype in (((12, 64), torch.float32), ((12, 64), torch.float64), ((12, 72), torch.bfloat16)):
        if isinstance(pattern, NM) and shape[1] % pattern.group:
            continue
        weight = sparse(shape, pattern, dtype)
        layer = SparseLinear.from_dense(weight, None, pattern)
        x = torch.randn(3, shape[1], device="cuda", dtype=dtype)
        torch.testing.assert_close(layer(x), F.linear(x, weight))
        assert select(weight.device, dtype, pattern, shape, 3).backend == "reference"


@pytest.mark.parametrize("pattern", [NM(2, 4), NM(16, 32), Unstructured(0.5)], ids=str)
def test_a_layer_that_moves(pattern: Pattern):
    weight = sparse((128, 192), pattern, torch.bfloat16)
    layer = SparseLinear.from_dense(weight, None, pattern)
    assert layer.packed == (pattern != NM(16, 32))
    state = {name: tensor.cpu() for name, tensor in layer.state_dict().items()}
    x = torch.randn(2, 192, device="cuda").bfloat16()
    y = layer(x)
    for other in (copy.deepcopy(layer), layer.cpu().cuda(), layer.half().bfloat16()):
        assert other.packed == (pattern != NM(16, 32))
        assert all(torch.equal(state[name], tensor.cpu()) for name, tensor in other.state_dict().items())
        if other.weight.dtype == weight.dtype and torch.equal(other.to_dense(), weight):
            assert torch.equal(other(x), y)


@pytest.mark.parametrize("pattern", [NM(2, 4), NM(16, 32), Unstructured(0.5)], ids=str)
def test_gradients_and_tracers(pattern: Pattern):
    weight = sparse((40, 192), pattern, torch.bfloat16)
    layer = SparseLinear.from_dense(weight, torch.randn(40, device="cuda").bfloat16(), pattern)
    for tokens in (1, 8, 80):
        x = torch.randn(tokens, 192, device="cuda").bfloat16().requires_grad_()
        y = layer(x)
        y.float().square().sum().backward()
        wanted = (2 * y.detach().float()).bfloat16() @ weight  # of this y: another rounding of it is another gradient
        torch.testing.assert_close(x.grad, wanted, rtol=2e-2, atol=2e-1)
    arguments = (
        layer.weight,
        layer.weight_mask,
        layer.weight_rows,
        192,
        layer.bias.detach(),
        layer._group,
        *layer._layout,
    )
    torch.library.opcheck(torch.ops.optimum_sparse.linear.default, (x.detach(), *arguments))
    torch.testing.assert_close(reference(x, *arguments), linear(x, *arguments), rtol=2e-2, atol=2e-2)


def test_wrong_devices_are_named():
    layer = SparseLinear.from_dense(sparse((40, 192), NM(2, 4), torch.bfloat16), None, NM(2, 4))
    with pytest.raises(ValueError, match=r"x is on cpu, the compressed weight on cuda:0: move one"):
        layer(torch.zeros(1, 192).bfloat16())
    with pytest.raises(ValueError, match=r"x is torch.float16, the compressed weight torch.bfloat16"):
        layer(torch.zeros(1, 192, device="cuda").half())


def replayed(layer: SparseLinear, x: torch.Tensor) -> torch.Tensor:
    """The result of a CUDA graph that was captured with other numbers in x."""
    graph, held = torch.cuda.CUDAGraph(), torch.zeros_like(x)
    with torch.cuda.graph(graph):
        y = layer(held)
    held.copy_(x)
    graph.replay()
    return y


def test_a_side_stream_and_a_cuda_graph():
    weight = sparse((512, 1024), Unstructured(0.5), torch.bfloat16)
    layer = SparseLinear.from_dense(weight, None, Unstructured(0.5))
    x = torch.randn(2, 1024, device="cuda").bfloat16()
    wanted = layer(x)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        y = layer(x)
    side.synchronize()
    assert torch.equal(y, wanted)
    assert torch.equal(replayed(layer, x), wanted)


@pytest.mark.parametrize("left", ["as many as there are", "none"])
@pytest.mark.parametrize("pattern", [NM(2, 4), Unstructured(0.5)], ids=str)
def test_streams_and_graphs_at_the_same_time(pattern: Pattern, left: str, monkeypatch: pytest.MonkeyPatch):
    """One layer on two streams and in two graphs of one capture stream: no launch takes another's flags."""
    weight = sparse((4096, 2080), pattern, torch.bfloat16)
    layer = SparseLinear.from_dense(weight, None, pattern)
    inputs = [torch.randn(tokens, 2080, device="cuda").bfloat16() for tokens in (16, 30, 50, 12)]
    wanted = [layer(x) for x in inputs]
    if left == "none":
        monkeypatch.setattr(cuda, "_new_flags", lambda device, stream: [])
        monkeypatch.setattr(cuda, "_flags", {})
        monkeypatch.setattr(cuda, "_free_flags", {})
    streams = [torch.cuda.Stream() for _ in inputs]
    graphs = [torch.cuda.CUDAGraph() for _ in inputs]
    captured = []
    for graph, x in zip(graphs, inputs, strict=True):
        with torch.cuda.graph(graph):
            captured.append([layer(x) for _ in range(30)])
    for run in range(3):
        found = {}
        for i, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                if (i + run) % 2:
                    graphs[i].replay()
                    found[i] = captured[i]
                else:
                    found[i] = [layer(inputs[i]) for _ in range(30)]
        torch.cuda.synchronize()
        for i, several in found.items():
            assert all(torch.equal(y, wanted[i]) for y in several)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("pattern", [NM(2, 4), NM(16, 32), Unstructured(0.5)], ids=str)
def test_a_layer_on_another_gpu_than_the_current_one(pattern: Pattern):
    weight = sparse((192, 576), pattern, torch.bfloat16).to("cuda:1")
    layer = SparseLinear.from_dense(weight, None, pattern)
    assert torch.cuda.current_device() == 0
    for tokens in (1, 8, 100):
        x = torch.randn(tokens, 576, device="cuda:1").bfloat16()
        check(layer(x), x, weight, None)
    assert torch.cuda.current_device() == 0


def test_in_a_new_thread():
    """It has no CUDA context before it calls CUDA, and a kernel's launch is the first that it calls."""
    weight = sparse((192, 576), NM(16, 32), torch.bfloat16)
    layer = SparseLinear.from_dense(weight, None, NM(16, 32))
    x = torch.randn(2, 576, device="cuda").bfloat16()
    wanted = layer(x)
    with ThreadPoolExecutor(1) as pool, torch.no_grad():
        assert torch.equal(pool.submit(layer, x).result(), wanted)


def test_the_first_call_of_a_kernel_is_not_captured():
    weight = sparse((40, 160), NM(3, 4), torch.float16)
    layer, x = SparseLinear.from_dense(weight, None, NM(3, 4)), torch.randn(1, 160, device="cuda").half()
    cuda._function.cache_clear()
    refused = pytest.raises(RuntimeError, match="cannot hold the first call of a compressed layer")
    with refused, torch.cuda.graph(torch.cuda.CUDAGraph()):
        layer(x)
    check(layer(x), x, weight, None)


LATE = """
extern "C" __global__ void late(unsigned short* to, const unsigned short* from, int count) {
  asm volatile("griddepcontrol.launch_dependents;");
  for (int i = 0; i < 200; i++) __nanosleep(1000);
  for (int i = threadIdx.x; i < count; i += blockDim.x) to[i] = from[i];
}
"""


@pytest.mark.parametrize("pattern", [NM(2, 4), NM(16, 32), Unstructured(0.5)], ids=str)
def test_what_the_kernel_before_writes_is_waited_for(pattern: Pattern):
    """A kernel that lets ours begin long before it writes x, or the weight."""
    if torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("kernels begin early from Hopper on")
    late = torch.cuda._compile_kernel(LATE, "late")

    def write(to: torch.Tensor, values: torch.Tensor) -> None:
        late(grid=(1, 1, 1), block=(1024, 1, 1), args=(to, values, to.numel()))

    weight = sparse((1000, 4128), pattern, torch.bfloat16)
    layer = SparseLinear.from_dense(weight, None, pattern)
    values = layer.weight.data.clone()
    for tokens in (1, 2, 4, 8, 20, 100):
        x = torch.randn(tokens, 4128, device="cuda").bfloat16()
        check(layer(x), x, weight, None)  # compiled
        late_x = torch.zeros_like(x)
        write(late_x, x)
        check(layer(late_x), x, weight, None)
        layer.weight.data.zero_()
        torch.cuda.synchronize()
        write(layer.weight.data, values)
        check(layer(x), x, weight, None)


def test_without_the_cuda_bindings_the_reference_runs(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    def missing(kernel: str, device: int) -> None:
        raise ImportError("no module named cuda")

    for cached in (cuda.unavailable, linear_module._cuda_layout):
        cached.cache_clear()
    monkeypatch.setattr(cuda, "_function", missing)
    try:
        weight = sparse((40, 192), Unstructured(0.5), torch.bfloat16)
        layer = SparseLinear.from_dense(weight, None, Unstructured(0.5))
        assert not layer.packed
        x = torch.randn(2, 192, device="cuda").bfloat16()
        for _ in range(3):
            torch.testing.assert_close(layer(x), F.linear(x, weight))
        assert len([record for record in caplog.records if "without a kernel" in record.message]) == 1
    finally:
        for cached in (cuda.unavailable, linear_module._cuda_layout):
            cached.cache_clear()


@pytest.mark.parametrize("pattern", [NM(2, 4), NM(16, 32), Unstructured(0.5)], ids=str)
def test_the_dense_weight_beside_it(pattern: Pattern):
    weight, bias = sparse((256, 192), pattern, torch.bfloat16), torch.randn(256, device="cuda").bfloat16()
    layer = SparseLinear.from_dense(weight.cpu(), bias.cpu(), pattern, keeps_dense=True)
    assert layer.dense is not None
    layer.cuda()
    assert torch.equal(layer.dense, weight)
    backends = set()
    for tokens in (1, 4, 5, 32, 33, 64, 65, 300, 511, 1000):
        x = torch.randn(tokens, 192, device="cuda").bfloat16()
        with torch.no_grad():
            y = layer(x)
            assert torch.equal(replayed(layer, x), y)
        check(y, x, weight, bias)
        backend = select(weight.device, torch.bfloat16, pattern, (256, 192), tokens, beside_dense=True).backend
        assert (backend == "dense") == torch.equal(y, F.linear(x, weight, bias)) or tokens < 300
        backends.add(backend)
    assert "dense" in backends
    assert ("cusparselt" in backends) == (pattern == NM(2, 4))


def test_2of4_shares_its_values_with_cusparselt():
    """Groups with fewer than two values too: kept zeros have a place on disk, and the buffer keeps it."""
    weight = sparse((128, 192), NM(2, 4), torch.bfloat16)
    weight[::2, ::3] = 0
    weight[5] = 0
    layer = SparseLinear.from_dense(weight, torch.randn(128, device="cuda").bfloat16(), NM(2, 4))
    assert layer.semi_structured is not None
    assert layer.weight.untyped_storage().data_ptr() == layer.semi_structured.untyped_storage().data_ptr()
    size = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in (layer.weight, *layer.buffers())}
    assert sum(size.values()) <= 0.625 * weight.numel() * 2
    for tokens in (1, 8, 33, 40, 64, 301, 1024):  # with and without a multiple of 8
        x = torch.randn(tokens, 192, device="cuda").bfloat16()
        for size in (tokens, 256, 512):  # memory that is taken again, by what tokens are padded to
            torch.full((size, 192), float("nan"), device="cuda", dtype=torch.bfloat16)
        check(layer(x), x, weight, layer.bias)
    x = torch.randn(2, 50, 192, device="cuda").bfloat16()
    wanted = layer(x)
    assert torch.equal(replayed(layer, x), wanted)
    layer.weight.data = 2 * layer.weight.data  # by somebody who does not know of the buffer
    check(layer(x), x, 2 * weight, layer.bias)


EVERY_ALGORITHM = """
    import sys, torch
    from optimum_sparse.core import NM, keep_mask
    from optimum_sparse.kernels import cusparselt

    *shape, dtype = int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), getattr(torch, sys.argv[4])
    out_features, in_features, tokens = shape
    weight = torch.randn(out_features, in_features, device="cuda")
    keep = keep_mask(weight.abs(), NM(2, 4))
    values = weight[keep].view(out_features, -1).to(dtype)
    packed, x = cusparselt.pack(values, keep), torch.randn(tokens, in_features, device="cuda").to(dtype)
    exact = x.double() @ (weight.to(dtype) * keep).double().T
    ran = 0
    for algorithm in range(cusparselt._algorithms(0, dtype, tuple(shape))):
        y = torch.full((tokens, out_features), float("nan"), device="cuda", dtype=dtype)
        print("algorithm", algorithm, flush=True)
        try:
            cusparselt._multiply(algorithm, tuple(shape), packed, x, y)
        except RuntimeError as error:
            print(error, flush=True)
            continue
        torch.cuda.synchronize()
        assert ((y.double() - exact).norm() / exact.norm()).item() < 4e-3, algorithm
        ran += 1
    print("done", ran, flush=True)
"""


@pytest.mark.parametrize(
    "shape", [(128, 320, 128), (128, 128, 64), (192, 576, 64), (1088, 4160, 256), (128, 11008, 64), (4096, 4096, 512)]
)
def test_no_algorithm_of_cusparselt_fails_at_sizes_that_are_let_through(shape):
    """In a process of its own: an illegal instruction would end it, as in fp16. All are timed, so all of them run."""
    assert cusparselt.usable(0, torch.bfloat16, *shape[:2])
    assert not cusparselt.usable(0, torch.float16, *shape[:2])
    code = [sys.executable, "-c", textwrap.dedent(EVERY_ALGORITHM), *map(str, shape), "bfloat16"]
    run = subprocess.run(code, capture_output=True, text=True, check=False)
    last = run.stdout.splitlines()[-1].split()
    assert last[0] == "done", run.stdout + run.stderr
    assert int(last[1]) > 0


def test_algorithms_are_timed_once_and_known_from_then_on(tmp_path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    cusparselt._known_algorithms.cache_clear()
    weight = sparse((192, 576), NM(2, 4), torch.bfloat16)
    layer, x = SparseLinear.from_dense(weight, None, NM(2, 4)), torch.randn(200, 576, device="cuda").bfloat16()
    wanted = layer(x)
    assert len(json.loads((tmp_path / "optimum_sparse" / "cusparselt.json").read_text())) == 1
    cusparselt._known_algorithms.cache_clear()
    monkeypatch.setattr(cusparselt, "_time_algorithms", None)
    assert torch.equal(layer(x), wanted)
    (tmp_path / "optimum_sparse" / "cusparselt.json").write_text("damaged")
    cusparselt._known_algorithms.cache_clear()
    with pytest.raises(TypeError):  # it wants to time them again
        layer(x)
    cusparselt._known_algorithms.cache_clear()


# ---- models


@pytest.fixture(params=["2:4", "16:32", "unstructured", "3:4"])
def checkpoint(request: pytest.FixtureRequest, tmp_path):
    """A pruned model on disk, and its greedy text."""
    model = make_model("llama", hidden_size=128, intermediate_size=192).cuda().bfloat16()
    Pruner(model).prune(make_config("magnitude", request.param))
    model.save_pretrained(tmp_path / "sparse")
    return tmp_path / "sparse"


@pytest.mark.parametrize("run_compressed", [True, "decode"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_generate(checkpoint, dtype, run_compressed, tmp_path):
    dense = AutoModelForCausalLM.from_pretrained(checkpoint, device_map="cuda", dtype=dtype)
    model = AutoModelForCausalLM.from_pretrained(
        checkpoint, device_map="cuda", dtype=dtype, run_compressed=run_compressed
    )
    layers = [module for module in model.modules() if isinstance(module, SparseLinear)]
    assert layers
    assert all((layer.dense is not None) == (run_compressed == "decode") for layer in layers)
    if dtype == torch.bfloat16:
        model.save_pretrained(tmp_path / "again")
        for name in ("model.safetensors",):
            assert (tmp_path / "again" / name).read_bytes() == (checkpoint / name).read_bytes()
    ids = torch.randint(0, 60, (3, 7), device="cuda")
    for more in (ids, ids[:1], ids[:1, :1], ids.repeat(30, 1)):
        torch.testing.assert_close(model(more).logits, dense(more).logits, rtol=5e-2, atol=5e-2)
    arguments = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    wanted = model.generate(ids, **arguments)
    assert torch.equal(model.generate(ids, cache_implementation="static", disable_compile=True, **arguments), wanted)
    model.dequantize()
    assert not any(isinstance(module, SparseLinear) for module in model.modules())
    torch.testing.assert_close(model(ids).logits, dense(ids).logits)


@pytest.mark.parametrize("tokens", [16, 50])
def test_the_first_launch_in_the_warm_up_of_a_graph(tokens: int, monkeypatch: pytest.MonkeyPatch):
    """What PyTorch allocates in inductor's warm-up has to be free before the graph is captured: it looks."""
    monkeypatch.setattr(cuda, "_flags", {})
    monkeypatch.setattr(cuda, "_free_flags", {})
    weight = sparse((4096, 1056), NM(2, 4), torch.bfloat16)
    layer = SparseLinear.from_dense(weight, None, NM(2, 4))
    replays = torch.compile(layer, mode="reduce-overhead", dynamic=False)
    x = torch.randn(tokens, 1056, device="cuda").bfloat16()
    with torch.no_grad():
        for _ in range(4):
            check(replays(x).clone(), x, weight, None)


@pytest.mark.parametrize("run_compressed", [True, "decode"])
def test_compiled_and_in_a_cuda_graph(checkpoint, run_compressed):
    model = AutoModelForCausalLM.from_pretrained(
        checkpoint, device_map="cuda", dtype=torch.bfloat16, run_compressed=run_compressed
    )
    ids = torch.randint(0, 60, (1, 1), device="cuda")
    torch._dynamo.reset()  # what other tests compiled in this process counts towards its limit
    with torch.no_grad():
        wanted = model(ids, use_cache=False).logits
        compiled = torch.compile(model, fullgraph=True)
        torch.testing.assert_close(compiled(ids, use_cache=False).logits, wanted, rtol=5e-2, atol=5e-2)
        for many in (ids, ids.repeat(1, 20), ids.repeat(1, 50)):
            wanted = model(many, use_cache=False).logits
            replays = torch.compile(model, mode="reduce-overhead", dynamic=False)
            for _ in range(4):  # it records the second, and checks what is left in its memory
                found = replays(many, use_cache=False).logits.clone()
                torch.testing.assert_close(found, wanted, rtol=5e-2, atol=5e-2)

        cache = StaticCache(model.config, max_cache_len=16)
        position = torch.tensor([0], device="cuda")

        def step() -> torch.Tensor:
            cache.reset()
            return model(ids, past_key_values=cache, position_ids=position[None]).logits

        for _ in range(2):
            eager = step()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = step()
        graph.replay()
        torch.testing.assert_close(y, eager, rtol=0, atol=0)
