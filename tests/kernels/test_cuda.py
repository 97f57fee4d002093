"""cuda.cu without a GPU: its threads are fibers on the CPU (emulator/), against float64."""

import ctypes
import math
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from helpers import random_weight
from torch.nn import functional as F

from optimum_sparse.core import NM, Pattern, Unstructured, keep_mask
from optimum_sparse.formats import bitmask, slots
from optimum_sparse.kernels import cuda
from optimum_sparse.kernels import linear as linear_module
from optimum_sparse.nn import SparseLinear
from optimum_sparse.nn import linear as layer_module


TOLERANCE = {torch.bfloat16: 4e-3, torch.float16: 5e-4}
PATTERNS = [NM(2, 4), NM(1, 2), NM(4, 8), NM(16, 32), NM(1, 8), NM(3, 8), NM(3, 4), NM(3, 6)]
PATTERNS += [Unstructured(0.5), Unstructured(0.6), Unstructured(0.95)]
STREAMED = [
    (pattern, torch.bfloat16) for pattern in (NM(2, 4), NM(16, 32), NM(1, 4), Unstructured(0.5), Unstructured(0.95))
]
STREAMED += [(NM(3, 4), torch.float16)]
KERNELS = Path(cuda.__file__).parent

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    here, built = Path(__file__).parent / "emulator", tmp_path_factory.mktemp("emulator") / "emulator.so"
    flags = ["-O1", "-std=c++20", "-fPIC", "-shared", "-fno-strict-aliasing", f"-I{here}", f"-I{KERNELS}"]
    subprocess.run(["g++", *flags, "-o", str(built), str(here / "emulator.cpp")], check=True)
    found = ctypes.CDLL(str(built))
    found.emulate.restype = ctypes.c_bool
    found.emulate.argtypes = [ctypes.c_char_p, *[ctypes.c_int] * 5, ctypes.c_void_p]
    return found


@pytest.fixture(autouse=True)
def launched(monkeypatch: pytest.MonkeyPatch, library: ctypes.CDLL) -> Iterator[list[cuda.Launch]]:
    """The emulator in place of the GPU: three processors."""
    seen: list[cuda.Launch] = []

    def run(launch: cuda.Launch, call: ctypes.Structure, device: int) -> None:
        seen.append(launch)
        name = launch.kernel.encode()
        sizes = *launch.grid, launch.threads, launch.shared, launch.cluster
        assert library.emulate(name, *sizes, ctypes.addressof(call)), name

    flags = torch.zeros(cuda.GROUPS * 3, dtype=torch.int32)
    monkeypatch.setattr(cuda, "_run", run)
    monkeypatch.setattr(cuda, "_own_flags", lambda device: flags.data_ptr())
    monkeypatch.setattr(cuda, "_limits", lambda device: (3, 227 * 1024))
    monkeypatch.setattr(cuda, "_is_hopper", lambda device: False)
    cuda.plan.cache_clear()
    yield seen
    cuda.plan.cache_clear()
    assert not flags.any()  # the next launch needs them lowered


def compress(weight: torch.Tensor, pattern: Pattern) -> cuda.Matrix:
    found, in_features = bitmask.encode(weight, pattern), weight.shape[1]
    values, mask = found["weight"], found["weight_mask"]
    if slots.even_slots(pattern, in_features):
        count, pairs = slots.even_slots(pattern, in_features), pattern in (NM(2, 4), NM(1, 2))
        layout = cuda.Layout(weight.dtype, len(weight), in_features, count, pairs, False)
        return cuda.Matrix(values, mask, None, None, layout)
    packed = slots.pack(values, mask, in_features)
    count = packed.values.shape[2]
    layout = cuda.Layout(weight.dtype, len(weight), in_features, count, False, True)
    return cuda.Matrix(packed.values, mask, packed.overflow, packed.starts, layout)


def sparse(shape: tuple[int, int], pattern: Pattern, dtype: torch.dtype) -> torch.Tensor:
    weight = random_weight(*shape)
    weight = weight * keep_mask(weight.abs(), pattern)
    if isinstance(pattern, Unstructured) and pattern.sparsity > 0.5:
        weight[::3] = 0
    return weight.to(dtype)


def check(
    weight: torch.Tensor,
    matrix: cuda.Matrix,
    tokens: int,
    bias: torch.Tensor | None,
    launch: cuda.Launch | None = None,
) -> None:
    x = random_weight(tokens, weight.shape[1], seed=tokens).to(weight.dtype)
    launch = launch or cuda.plan(matrix.layout, tokens, 0)
    assert launch is not None
    y = cuda.linear(launch, x, matrix, bias)
    wanted = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    size = F.linear(x.double().abs(), weight.double().abs(), None if bias is None else bias.double().abs())
    assert ((y.double() - wanted).abs() / size.clamp(min=1e-30)).max() < TOLERANCE[weight.dtype]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_against_float64(pattern: Pattern, dtype: torch.dtype, launched: list):
    for shape in ((37, 96), (20, 1248)):  # odd numbers of rows, parts of a warp's columns, more than one step
        weight = sparse(shape, pattern, dtype)
        matrix = compress(weight, pattern)
        for tokens in (1, 2, 3, 4, 7, 8, 9, 17, 33, 64):
            bias = random_weight(1, shape[0])[0].to(dtype) if tokens % 2 else None
            check(weight, matrix, tokens, bias)
    names = {launch.kernel.split("<")[0] for launch in launched}
    assert names == {"gather", "multiply"}
    assert cuda.plan(matrix.layout, 65, 0) is None


@pytest.mark.parametrize(
    "pattern", [*map(Unstructured, (0.03, 0.5, 0.95)), NM(2, 4), NM(16, 32), NM(3, 4), NM(1, 4)], ids=str
)
def test_what_is_not_finite_stays_where_it_is(pattern: Pattern):
    """Not in what W does not keep beside it, which shared memory has no zeros for. (`gather` multiplies by zero.)"""
    weight = sparse((37, 224), pattern, torch.bfloat16) + 0.0  # no negative zeros
    kept = weight.nonzero()
    for number, value in enumerate((torch.inf, -torch.inf, torch.nan)):
        rows, columns = kept[number::97].T
        weight[rows, columns] = value
    weight[::2] = weight[::2].nan_to_num(1.0, 2.0, 3.0)
    matrix = compress(weight, pattern)
    assert torch.equal(cuda.expand(matrix).view(torch.int16), weight.view(torch.int16))
    launches = [cuda.multiply(matrix.layout, 8, 3, 8)]
    if matrix.layout.slots == 16:
        launches.append(cuda.stream(matrix.layout, 16, 16, 3))
    for launch in launches:
        x = 1 + random_weight(launch.tile or 8, 224).abs().bfloat16()
        y = cuda.linear(launch, x, matrix, None)
        assert torch.equal(y.isfinite(), F.linear(x.double(), weight.double()).isfinite())
        assert y[:, ::2].isfinite().all()


@pytest.mark.parametrize("pattern", [NM(2, 4), NM(16, 32), NM(3, 6), Unstructured(0.5)], ids=str)
def test_a_layer_from_the_op_to_the_kernel(
    pattern: Pattern, monkeypatch: pytest.MonkeyPatch, launched: list[cuda.Launch]
):
    def layout(device: torch.device, dtype: torch.dtype, pattern: Pattern, shape: tuple[int, int]) -> str | None:
        return None if slots.even_slots(pattern, shape[1]) else "slots"

    monkeypatch.setattr(cuda, "refuses", lambda device, dtype, in_features: None)
    monkeypatch.setattr(layer_module, "wanted_layout", layout)
    linear_module._cuda_layout.cache_clear()
    weight, bias = sparse((36, 192), pattern, torch.bfloat16), random_weight(1, 36)[0].bfloat16()
    layer = SparseLinear.from_dense(weight, bias, pattern)
    for shape in ((192,), (2, 3, 192), (3, 4, 192), (4, 200, 192)):
        x = random_weight(1, math.prod(shape)).view(shape).bfloat16()
        for given in (x, torch.stack([x, x], -1)[..., 0]):  # its second form is not contiguous
            y = linear_module._linear_cuda(
                given, layer.weight, layer.weight_mask, layer.weight_rows, 192, bias, layer._group, *layer._layout
            )
            torch.testing.assert_close(y, F.linear(x, weight, bias), rtol=2e-2, atol=2e-2)
    names = {launch.kernel.split("<")[0] for launch in launched}
    assert names - {"gather"} == {"multiply", "expand"}
    linear_module._cuda_layout.cache_clear()


@pytest.mark.parametrize("processors", [1, 3])
@pytest.mark.parametrize(
    ("tile", "groups"), [(16, 1), (16, 2), (16, 4), (16, 5), (32, 1), (32, 4), (64, 1), (64, 4), (128, 2), (256, 2)]
)
@pytest.mark.parametrize(("pattern", "dtype"), STREAMED, ids=str)
def test_stream(pattern: Pattern, dtype: torch.dtype, tile: int, groups: int, processors: int):
    for shape in ((70, 96), (137, 1248)) if tile <= 32 else ((70, 1248),):
        weight = sparse(shape, pattern, dtype)
        matrix = compress(weight, pattern)
        for tokens in (1, tile + 3) if tile <= 32 else (tile - 5,):
            launch = cuda.stream(matrix.layout, tokens, tile, processors, groups)
            check(weight, matrix, tokens, random_weight(1, shape[0])[0].to(dtype), launch)


@pytest.mark.parametrize("cluster", [2, 3])
@pytest.mark.parametrize(("tile", "groups"), [(64, 2), (64, 4), (128, 2)])
@pytest.mark.parametrize(("pattern", "dtype"), STREAMED, ids=str)
def test_stream_across_the_columns(pattern: Pattern, dtype: torch.dtype, tile: int, groups: int, cluster: int):
    for shape, tokens in (
        ((70, 128 * groups * cluster), tile + 3),
        ((137, 1504), tile - 5),
    ):  # one step each, and some
        weight = sparse(shape, pattern, dtype)
        matrix = compress(weight, pattern)
        launch = cuda.stream(matrix.layout, tokens, tile, 3, groups, 1, cluster)
        check(weight, matrix, tokens, random_weight(1, shape[0])[0].to(dtype), launch)


@pytest.mark.parametrize("cluster", [2, 3])
@pytest.mark.parametrize("pattern", [NM(2, 4), NM(16, 32), NM(3, 4), Unstructured(0.5)], ids=str)
def test_a_cluster_shares_out_columns(pattern: Pattern, cluster: int):
    for shape in ((37, 96), (137, 1248)):
        weight = sparse(shape, pattern, torch.bfloat16)
        matrix = compress(weight, pattern)
        for tokens in (5, 12, 20):
            launch = cuda.multiply(matrix.layout, tokens, 6, 4, cluster)
            check(weight, matrix, tokens, random_weight(1, shape[0])[0].bfloat16(), launch)


@pytest.mark.parametrize("pattern", [NM(2, 4), NM(16, 32), Unstructured(0.5)], ids=str)
def test_on_hopper_more_tokens_are_streamed(pattern: Pattern, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(cuda, "_is_hopper", lambda device: True)
    weight = sparse((70, 96), pattern, torch.bfloat16)
    matrix = compress(weight, pattern)
    for tokens in (4, 8, 9, 20, 33, 100):
        launch = cuda.plan(matrix.layout, tokens, 0)
        assert launch is not None
        streamed = tokens > (8 if matrix.layout.pairs else 4)
        assert (launch.tile >= tokens) == streamed == launch.kernel.startswith("stream<")
        check(weight, matrix, tokens, None)
    large = matrix.layout._replace(rows=2**14, in_features=2**12)
    numbers = (2, 8, 9, 128, 129, 512, 513)
    names = [getattr(cuda.plan(large, tokens, 0), "kernel", "").split("<")[0] for tokens in numbers]
    more, eight = "" if matrix.layout.overflow else "stream", "multiply" if matrix.layout.pairs else "stream"
    few = "multiply" if matrix.layout.pairs else "gather"
    assert names == [few, eight, "stream", "stream", more, more, ""]


def test_few_rows_are_not_cut_into_many_sums(monkeypatch: pytest.MonkeyPatch):
    """At 64 tokens: a cluster has the columns of 64 rows where that fills the GPU; else fewer tokens at a time."""
    monkeypatch.setattr(cuda, "_is_hopper", lambda device: True)
    monkeypatch.setattr(cuda, "_limits", lambda device: (132, 227 * 1024))
    pairs, even, overflow = [
        cuda.Layout(torch.bfloat16, 4096, 4096, 16, *which) for which in ((True, False), (False, False), (False, True))
    ]

    def chosen(layout: cuda.Layout, tokens: int, rows: int = 4096, in_features: int = 4096) -> tuple[int, int]:
        launch = cuda.plan(layout._replace(rows=rows, in_features=in_features), tokens, 0)
        assert launch is not None
        return launch.tile, launch.cluster

    for layout in (pairs, even, overflow):
        for in_features in (512, 4096, 11008):
            assert chosen(layout, 64, in_features=in_features) == (64, 2)
        for in_features in (96, 256, 384, 4224):  # the warpgroups of two blocks cannot share that out evenly
            assert chosen(layout, 64, in_features=in_features)[1] == 1
        assert chosen(layout, 64, rows=11008) == (64, 1)
        assert chosen(layout, 64, rows=1024) == (32, 1)
        assert chosen(layout, 64, rows=2048) == (64, 1)
    assert [chosen(layout, 128) for layout in (pairs, even, overflow)] == [(128, 2), (128, 1), (128, 1)]


@pytest.mark.parametrize("hopper", [True, False])
def test_cusparselt_takes_many_tokens_and_those_that_no_kernel_takes(hopper: bool, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(cuda, "_is_hopper", lambda device: hopper)
    layout = cuda.Layout(torch.bfloat16, 4096, 4096, 16, True, False)
    for tokens in (0, 1, 64, 65, 128, 129, 4096):
        chosen = linear_module._choose(layout, tokens, 0, True, False)
        assert (chosen == "cusparselt") == (tokens > (128 if hopper else 64))
        assert (chosen == "expand") == (tokens == 0)
        assert linear_module._choose(layout, tokens, 0, False, False) != "cusparselt"


@pytest.mark.parametrize("hopper", [True, False])
def test_the_dense_weight_takes_those_tokens_for_which_nothing_else_is_faster(
    hopper: bool, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(cuda, "_is_hopper", lambda device: hopper)
    pairs = cuda.Layout(torch.bfloat16, 4096, 4096, 16, True, False)
    even = pairs._replace(pairs=False)
    for layout, few in ((pairs, 64), (even, 32), (even._replace(overflow=True), 4)):
        for tokens in (1, few, few + 1, 511, 512, 4096):
            for semi_structured in {False, layout.pairs}:
                chosen = linear_module._choose(layout, tokens, 0, semi_structured, True)
                assert (chosen == "dense") == (few < tokens and not (semi_structured and tokens > 511))
                if chosen != "dense":
                    assert chosen == linear_module._choose(layout, tokens, 0, semi_structured, False)
        assert linear_module._choose(layout, 0, 0, layout.pairs, True) == "dense"  # which no kernel takes


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_expand_is_exact(pattern: Pattern, dtype: torch.dtype):
    for shape in ((37, 96), (9, 2112)):
        weight = sparse(shape, pattern, dtype)
        assert torch.equal(cuda.expand(compress(weight, pattern)), weight)


def test_rows_that_keep_all_and_rows_that_keep_nothing():
    """More than 64 values too many in a step: the loop past those that a lane has ready."""
    weight = torch.zeros(24, 1056).bfloat16()
    weight[::2] = random_weight(12, 1056).bfloat16()
    matrix = compress(weight, Unstructured(0.5))
    assert torch.equal(cuda.expand(matrix), weight)
    for tokens in (1, 4, 8, 20):
        check(weight, matrix, tokens, None)


@pytest.mark.parametrize("count", [8, 24])
def test_numbers_of_slots_that_the_patterns_above_do_not_have(count: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(slots, "PACKED", (count,))
    for sparsity in (0.2, 0.6):
        weight = sparse((21, 1120), Unstructured(sparsity), torch.bfloat16)
        matrix = compress(weight, Unstructured(sparsity))
        assert matrix.layout.slots == count
        assert torch.equal(cuda.expand(matrix), weight)
        for tokens in (1, 2, 4, 8, 20):
            check(weight, matrix, tokens, None)


def test_tensors_at_odd_addresses():
    """Views into larger tensors, as a checkpoint's loader may give them: loads of 16 bytes need better."""
    weight = sparse((20, 96), NM(16, 32), torch.bfloat16)
    matrix = compress(weight, NM(16, 32))

    def shifted(tensor: torch.Tensor) -> torch.Tensor:
        padded = torch.cat([tensor.new_zeros(1), tensor.flatten()])[1:].view(tensor.shape)
        assert padded.data_ptr() % 16
        return padded

    moved = matrix._replace(values=shifted(matrix.values), mask=shifted(matrix.mask))
    check(weight, moved, 1, shifted(random_weight(1, 20)[0].bfloat16()))
    check(weight, moved, 8, None)


@pytest.mark.parametrize("pattern", [NM(2, 4), NM(16, 32), Unstructured(0.5)], ids=str)
def test_a_damaged_mask_touches_no_foreign_memory(pattern: Pattern):
    """The emulator ends the process at an access beyond shared memory."""
    matrix = compress(sparse((20, 1248), pattern, torch.bfloat16), pattern)

    def run_all(damaged: cuda.Matrix) -> None:
        cuda.expand(damaged)
        launches = [cuda.plan(damaged.layout, tokens, 0) for tokens in (1, 4, 8, 16, 20)]
        for tokens, launch in zip(
            (1, 4, 8, 16, 20, 16), [*launches, cuda.stream(damaged.layout, 16, 16, 3)], strict=True
        ):
            assert launch is not None
            cuda.linear(launch, torch.ones(tokens, 1248).bfloat16(), damaged, None)

    for damage in (0, 255):
        run_all(matrix._replace(mask=torch.full_like(matrix.mask, damage)))
    if matrix.overflow is not None:
        run_all(matrix._replace(overflow=torch.full_like(matrix.overflow, -1)))  # column 65,535


def test_the_call_is_laid_out_as_in_c():
    """ctypes and C++ agree on every offset: else pointers would be read from the wrong place."""
    assert ctypes.sizeof(cuda._Call) == 96
    offsets = [getattr(cuda._Call, name).offset for name, _ in cuda._Call._fields_]
    assert offsets == [0, 8, 16, 24, 32, 36, 40, 48, 56, 64, 68, 72, 76, 80, 88]


def test_no_load_is_one_of_constants():
    """Which ptxas would move before the wait for the kernel that writes them: the emulator cannot see it."""
    for file in ("cuda.cu", "device.cuh"):
        source = (KERNELS / file).read_text()
        assert "global.nc" not in source
        assert "__ldg(" not in source
        assert "__restrict__" not in source


@pytest.mark.parametrize("columns", [4096, 11008])
@pytest.mark.parametrize("rows", [1, 37, 1024, 4096, 11008, 14336, 28672])
def test_gather_is_shared_out_evenly(rows: int, columns: int):
    """No more blocks fit on a processor than it is meant to have, and no round is more than an eighth idle."""
    layout = cuda.Layout(torch.bfloat16, rows, columns, 16, True, False)
    for tokens in (1, 2, 4):
        launch = cuda.gather(layout, tokens, (132, 227 * 1024))
        blocks = 228 * 1024 // (launch.shared + 1024)
        assert blocks == (1 if tokens == 4 and columns == 11008 else 2)
        warps, most = launch.grid[0] * (launch.threads // 32), 32 * 132
        assert warps <= most
        assert -(-rows // warps) == -(-rows // most)
        assert rows < most / 2 or rows / (-(-rows // warps) * warps) > 7 / 8


@pytest.mark.parametrize("hopper", [True, False])
@pytest.mark.parametrize("kilobytes", [16, 48, 99, 163, 227])
def test_no_launch_needs_more_shared_memory_or_flags_than_there_are(
    kilobytes: int, hopper: bool, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(cuda, "_limits", lambda device: (132, kilobytes * 1024))
    monkeypatch.setattr(cuda, "_is_hopper", lambda device: hopper)
    cuda.plan.cache_clear()
    for count in slots.SLOTS:
        for pairs, overflow in ((False, False), (False, True), (True, False)):
            for rows, columns in ((64, 96), (4096, 4096), (11008, 4096), (4096, 28672)):
                layout = cuda.Layout(torch.bfloat16, rows, columns, count, pairs, overflow)
                for tokens in (1, 2, 3, 4, 5, 8, 16, 17, 33, 64, 65, 128, 200, 512):
                    launch = cuda.plan(layout, tokens, 0)
                    assert launch is None or launch.shared <= kilobytes * 1024
                    assert launch is not None or tokens > 64 or kilobytes < 99
                    assert launch is None or launch.grid[0] * launch.groups <= cuda.GROUPS * 132  # flags
    cuda.plan.cache_clear()
