"""The CUDA kernels, cuda.cu: compiled for the GPU at hand when first used, in tenths of a second, and launched."""

import ctypes
import functools
import logging
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..formats import slots


logger = logging.getLogger(__name__)

TYPES = {torch.bfloat16: "true", torch.float16: "false"}
CAPABILITY = (8, 0)  # Ampere: tensor cores that take bf16
HOPPER = (9, 0)
TILE = 2048  # bytes of 8 rows of 128 columns, as in cuda.cu
TILES = (16, 32, 64, 128, 256)  # tokens that `stream` takes at a time
DIRECT = 32  # as in cuda.cu
GROUPS = 5  # of 64 rows that `stream` has on a processor, at most
PER_THREAD = 2  # the handle of the default stream of each thread: not one stream
RESERVED = 1024  # bytes of shared memory that a processor takes for each block beside the block's own


class Launch(NamedTuple):
    """A kernel by its name in cuda.cu, and the blocks that run it and share out `work`; `shared` is in bytes."""

    kernel: str
    grid: tuple[int, int]
    threads: int
    shared: int
    work: int = 0  # times 8 rows of `multiply`, steps of `stream`
    tile: int = 0  # `stream` only: how many tokens it takes at a time, and times 64 rows
    groups: int = 0
    cluster: int = 1  # how many blocks share out columns


class Layout(NamedTuple):
    """What decides how a compressed W [rows, in] is multiplied."""

    dtype: torch.dtype
    rows: int
    in_features: int
    slots: int  # per word, as in formats.slots
    pairs: bool  # 2:4: two of every four columns
    overflow: bool  # some words have more values than slots

    @property
    def template(self) -> str:
        return f"{self.slots},{str(self.overflow).lower()}"

    @property
    def windows(self) -> bool:
        """`WINDOWS` of cuda.cu."""
        return not self.overflow and self.slots <= 16


class Matrix(NamedTuple):
    """A compressed W on a GPU, as formats.slots has it."""

    values: Tensor
    mask: Tensor
    overflow: Tensor | None
    starts: Tensor | None
    layout: Layout


@functools.cache
def unavailable(device: int) -> str | None:
    """Why the kernels cannot run on a CUDA device, if so; logged once."""
    reason = None
    if torch.version.hip is not None:
        reason = "the kernels are CUDA, this is ROCm"
    elif torch.cuda.get_device_capability(device) < CAPABILITY:
        reason = (
            f"{torch.cuda.get_device_name(device)} is older than compute capability {CAPABILITY[0]}.{CAPABILITY[1]}"
        )
    else:
        _refuse_capture()
        try:
            _function("expand<16,false>", device)
        except (ImportError, RuntimeError, OSError) as error:
            reason = f"the kernels could not be compiled: {error}"
    if reason:
        logger.warning("compressed layers run without a kernel, slower than dense ones: %s.", reason)
    return reason


def refuses(device: torch.device, dtype: torch.dtype, in_features: int) -> str | None:
    """Why the kernels do not take such a weight, or None."""
    if dtype not in TYPES:
        return f"the CUDA kernels do not take {dtype}"
    if in_features % 32:
        return f"the CUDA kernels need a number of inputs that 32 divides, not {in_features}"
    return unavailable(torch.cuda.current_device() if device.index is None else device.index)


@functools.lru_cache(maxsize=4096)
def plan(layout: Layout, tokens: int, device: int) -> Launch | None:
    """What multiplies x [tokens, in] straight from the compressed weight; None where that does not fit or pay."""
    processors, most_shared = _limits(device)
    # As measured on an H200: tests/benchmarks/launches.py.
    hopper = _is_hopper(device)
    most = 64 if not hopper else 128 if layout.overflow else 512 if layout.rows * layout.in_features >= 2**25 else 256
    if not 0 < tokens <= most:
        return None  # to expand the weight is faster
    several = layout.rows >= 64 * processors  # groups of 8 rows for each, which two blocks share out more evenly
    launches: list[Launch] = []
    if tokens <= (4 if layout.overflow else 0 if layout.pairs and _is_large(layout) else 2):
        launches.append(gather(layout, tokens, (processors, most_shared)))
    elif hopper and tokens > (8 if layout.pairs else 4):
        launches += streams(layout, tokens, (processors, most_shared))
    if hopper and not several:
        launches.append(multiply(layout, tokens, processors, 16, 2))
    for warps in (16, 12, 8, 6, 4, 2):
        if warps <= (8 if several else 16):
            launches.append(multiply(layout, tokens, processors * (2 if several else 1), warps))
    return next((launch for launch in launches if launch.shared <= most_shared), None)


def _is_large(layout: Layout) -> bool:
    return layout.rows * layout.in_features >= 2**26


def gather(layout: Layout, tokens: int, limits: tuple[int, int]) -> Launch:
    """`gather` by up to 32 warps on a processor: in two blocks, where x fits into shared memory twice."""
    (processors, most_shared), rows = limits, layout.rows
    staged = 1 if tokens == 1 else 2 if tokens == 2 else 4
    shared = 34 * 128 * staged * -(-layout.in_features // 1024)
    blocks = 2 if 2 * (shared + RESERVED) <= most_shared + RESERVED else 1
    rounds = -(-rows // (32 * processors))  # of a row for each warp
    warps = -(-rows // (rounds * blocks * processors))  # that have a row in the last round as well
    # Too much for one block more on a processor: else the first that is free would take what is meant for the last.
    shared = max(shared, (most_shared + RESERVED) // (blocks + 1) - RESERVED + 16)
    grid = min(-(-rows // warps), blocks * processors)
    return Launch(f"gather<{TYPES[layout.dtype]},{staged},{layout.template}>", (grid, 1), 32 * warps, shared)


def multiply(layout: Layout, tokens: int, blocks: int, warps: int = 16, cluster: int = 1) -> Launch:
    """`multiply` with so many blocks for all rows, and warps in each; clusters from Hopper on."""
    token_tiles, groups = 1 if tokens <= 8 else 2, -(-layout.rows // 8)
    table, tiles = (128, 0) if layout.pairs else (0, 2 * TILE)
    shared = TILE + table + warps * (max(tiles, 2048 * token_tiles) + 4 * _room(layout))
    kernel = f"multiply<{TYPES[layout.dtype]},{layout.template},{str(layout.pairs).lower()},{token_tiles}>"
    grid = cluster * min(groups, blocks // cluster), -(-tokens // (8 * token_tiles))
    return Launch(kernel, grid, 32 * warps, shared, groups, cluster=cluster)


def _room(layout: Layout) -> int:
    """Bytes of a tile on its way: `Words::ROOM`."""
    return 64 * layout.slots + 128 + (640 if layout.overflow else 0)


def stream(
    layout: Layout, tokens: int, tile: int, processors: int, groups: int = 2, blocks: int = 1, cluster: int = 1
) -> Launch:
    """`stream` of `tile` tokens and 64 * groups rows at a time, with so many blocks for each processor; with clusters
    of 64 rows, whose spans a cluster's warpgroups share out."""
    across, warps, side = cluster > 1, 4 * groups, groups if cluster > 1 else 1
    assert not across or _can_share_out(layout, groups, cluster), (layout, groups, cluster)
    template = f"{TYPES[layout.dtype]},{layout.template},{str(layout.pairs).lower()},{groups},{tile}"
    tiles = -(-layout.rows * side // (64 * groups)) * -(-tokens // tile)
    spans = _spans(layout) // side
    steps = spans * tiles
    grid = max(1, min(steps // 2, processors * blocks))
    # Of a tile, with as many steps as a block has at most.
    pieces = cluster if across else -(-spans // -(-steps // grid))
    grid = tiles * pieces if across or tiles * pieces <= grid else grid  # then no block has pieces of two tiles
    ahead = 1 if layout.overflow and tile == 16 else 2
    own = max(2 * ahead * _room(layout), 64 * tile * across) + (0 if layout.pairs else 2 * TILE)  # of a warp
    stages = 2 if tile * side >= 256 else 4
    shared = TILE + stages * (TILE // 8 * tile * side + 16) + 128 + warps * own
    name = f"stream<{template},{str(across).lower()}>"
    return Launch(name, (grid, 1), 128 * (groups + (tile <= DIRECT)), shared, steps, tile, groups, cluster)


def _spans(layout: Layout) -> int:
    return -(-layout.in_features // slots.SPAN)


def _can_share_out(layout: Layout, groups: int, cluster: int) -> bool:
    """Whether the warpgroups of each block of a cluster have equally many spans, and some."""
    return _spans(layout) % groups == 0 and _spans(layout) // groups >= cluster


def streams(layout: Layout, tokens: int, limits: tuple[int, int]) -> Iterator[Launch]:
    """Those that fit, the best first: rather more tokens at a time than come, and unused, than fewer."""
    processors, most_shared = limits
    for tile in sorted(TILES, key=lambda tile: (tile < tokens, abs(tile - tokens))):
        # Times 64 rows of a block, blocks of a processor, blocks that share out columns. As measured on an H200:
        # tests/benchmarks/launches.py.
        sizes = [(2, 1, 1)]
        if tile <= 32:
            sizes = [(4, 1, 1), (1, 2, 1)]
            if not layout.overflow and layout.rows * layout.in_features <= 2**24:
                sizes.reverse()  # more blocks for the few rows
            elif tile == 16 and not layout.pairs and _is_large(layout):
                sizes.insert(0, (5, 1, 1))
        elif tile <= 64:
            sizes = [(1, 2, 1), (2, 1, 1)] if layout.pairs else [(2, 1, 1), (1, 2, 1)]
            if _is_large(layout):  # what blocks leave to one another matters less
                sizes.insert(0, (4, 1, 1))
        clusters = -(-layout.rows // 64) * -(-tokens // tile)
        fill = 2 / 3 <= 2 * clusters / processors <= 1
        if fill and _can_share_out(layout, 2, 2) and (tile == 64 or (tile == 128 and layout.pairs)):
            sizes.insert(0, (2, 1, 2))
        for groups, blocks, cluster in sizes:
            launch = stream(layout, tokens, tile, processors, groups, blocks, cluster)
            if cluster == 1 and tokens <= 64:
                pieces = -(-_spans(layout) * launch.grid[0] // launch.work)
                if (pieces - 1) * tile > 16 * _spans(layout):
                    continue  # to add up what so many blocks leave takes longer than more tiles
            if blocks * (launch.shared + RESERVED) <= most_shared + RESERVED:
                yield launch


def linear(launch: Launch, x: Tensor, matrix: Matrix, bias: Tensor | None) -> Tensor:
    """x [..., in] -> [..., out] by what `plan` says."""
    y = x.new_empty(*x.shape[:-1], matrix.layout.rows)
    _launch(launch, matrix, x, bias, y)
    return y


def expand(matrix: Matrix) -> Tensor:
    """The dense W [out, in]."""
    rows, in_features = matrix.layout.rows, matrix.layout.in_features
    dense = matrix.values.new_empty(rows, in_features)
    processors, _ = _limits(dense.get_device())
    tiles = (rows + 7) // 8 * -(-in_features // slots.SPAN)
    blocks = min(-(-tiles // 8), 8 * processors)
    shared = TILE + 8 * (TILE + _room(matrix.layout))
    _launch(Launch(f"expand<{matrix.layout.template}>", (blocks, 1), 256, shared), matrix, None, None, dense)
    return dense


class _Call(ctypes.Structure):
    """`Call` of cuda.cu."""

    _fields_ = (
        ("values", ctypes.c_void_p),
        ("mask", ctypes.c_void_p),
        ("overflow", ctypes.c_void_p),
        ("starts", ctypes.c_void_p),
        ("rows", ctypes.c_int32),
        ("columns", ctypes.c_int32),
        ("x", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("y", ctypes.c_void_p),
        ("tokens", ctypes.c_int32),
        ("each", ctypes.c_int32),
        ("rest", ctypes.c_int32),
        ("steps", ctypes.c_uint32),
        ("flags", ctypes.c_void_p),
        ("partial", ctypes.c_void_p),
    )


def _launch(launch: Launch, matrix: Matrix, x: Tensor | None, bias: Tensor | None, y: Tensor) -> None:
    values, mask, overflow, starts, layout = matrix
    # What had to be copied stays alive, by its name, until the launch.
    values, mask = aligned(values), aligned(mask)
    call = _Call(values.data_ptr(), mask.data_ptr())
    call.rows, call.columns, call.y = layout.rows, layout.in_features, y.data_ptr()
    columns, tokens = layout.in_features, 0
    if overflow is not None and starts is not None:
        overflow, starts = aligned(overflow), aligned(starts)
        call.overflow, call.starts = overflow.data_ptr(), starts.data_ptr()
    if x is not None:
        x = aligned(x)
        tokens = x.numel() // columns
        call.x, call.tokens = x.data_ptr(), tokens
    if bias is not None:
        bias = aligned(bias)
        call.bias = bias.data_ptr()
    device = y.get_device()
    if not launch.tile:
        call.each, call.rest = divmod(launch.work, launch.grid[0] // launch.cluster)
    call.steps = launch.work
    if launch.tile and launch.cluster == 1:
        parts = launch.grid[0] * launch.groups
        sums = y.new_empty(parts * 64 * launch.tile, dtype=torch.float32)
        call.flags, call.partial = _own_flags(device), sums.data_ptr()
        if not call.flags:
            flags = y.new_zeros(parts, dtype=torch.int32)
            call.flags = flags.data_ptr()
    if launch.tile > DIRECT:
        spans, tiles = -(-columns // slots.SPAN), -(-tokens // launch.tile)
        arranged = y.new_empty(tiles * launch.tile * spans * slots.SPAN)
        call.y = arranged.data_ptr()
        grid = -(-spans // 4), tiles * launch.tile // 8
        _run(Launch(f"arrange<{launch.tile},{str(layout.windows).lower()}>", grid, 128, 0), call, device)
        call.x, call.y = call.y, y.data_ptr()
    _run(launch, call, device)


_flags: dict[tuple[int, int, int | None], int] = {}  # addresses, by device, stream and capture
_free_flags: dict[int, list[int]] = {}  # of a device


def _own_flags(device: int) -> int | None:
    """The address of flags, all 0, which `stream` leaves at 0. Launches that may run together never get the same.

    So each CUDA stream has its own, and so has each capture: a graph may run beside any other. They are never given
    back. None if there are none left.
    """
    if device != torch.cuda.current_device():
        with torch.cuda.device(device):
            return _own_flags(device)
    stream, capture = torch._C._cuda_getCurrentRawStream(device), None
    if stream == PER_THREAD:
        return None
    if torch.cuda.is_current_stream_capturing():
        info = _driver().cuStreamGetCaptureInfo(stream)
        _check(info)
        capture = int(info[2])
    key = (device, stream, capture)
    if key not in _flags:
        free = _free_flags.setdefault(device, [])
        if capture is None and len(free) < 512:  # captures only take
            free += _new_flags(device, stream)
        try:
            _flags[key] = free.pop()
        except IndexError:
            return None
    return _flags[key]


def _new_flags(device: int, stream: int) -> Iterable[int]:
    """Addresses of flags for 1,024 launches. Not from PyTorch: in the warm-up of a graph its allocator takes from the
    graph's pool, which has to be free again before the capture."""
    driver, count, size = _driver(), 1024, 4 * GROUPS * _limits(device)[0]
    _make_current(device)
    mode = _check(driver.cuThreadExchangeStreamCaptureMode(driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_RELAXED))
    try:  # also while another thread captures
        status, memory = driver.cuMemAlloc(count * size)
        if status == driver.CUresult.CUDA_ERROR_OUT_OF_MEMORY:
            return []
        _check((status,))
        _check(driver.cuMemsetD8Async(memory, 0, count * size, stream))
        _check(driver.cuStreamSynchronize(stream))  # other streams will use them
    finally:
        _check(driver.cuThreadExchangeStreamCaptureMode(mode))
    return range(int(memory), int(memory) + count * size, size)


def aligned(tensor: Tensor) -> Tensor:
    """`tensor`, contiguous, from an address that loads of 16 bytes can take."""
    if tensor.is_contiguous() and tensor.data_ptr() % 16 == 0:
        return tensor
    return tensor.clone(memory_format=torch.contiguous_format)


def _run(launch: Launch, call: _Call, device: int) -> None:
    if device != torch.cuda.current_device():
        with torch.cuda.device(device):
            return _run(launch, call, device)
    function = _function(launch.kernel, device)
    stream = torch._C._cuda_getCurrentRawStream(device)  # current_stream makes an object of it
    config = _config(launch, device, stream)
    arguments = (ctypes.c_void_p * 1)(ctypes.addressof(call))
    result = _driver().cuLaunchKernelEx(config, function, ctypes.addressof(arguments), 0)
    if result[0] == _driver().CUresult.CUDA_ERROR_INVALID_CONTEXT:  # a thread that has not called CUDA before
        _make_current(device)
        result = _driver().cuLaunchKernelEx(config, function, ctypes.addressof(arguments), 0)
    _check(result)
    return None


@functools.lru_cache(maxsize=4096)
def _config(launch: Launch, device: int, stream: int) -> Any:
    """How a kernel is launched: from Hopper on before the one before it has ended, for which it waits itself."""
    driver = _driver()
    config = driver.CUlaunchConfig()
    config.gridDimX, config.gridDimY, config.gridDimZ = *launch.grid, 1
    config.blockDimX, config.blockDimY, config.blockDimZ = launch.threads, 1, 1
    config.sharedMemBytes, config.hStream = launch.shared, stream
    if torch.cuda.get_device_capability(device) >= HOPPER:
        early, cluster = driver.CUlaunchAttribute(), driver.CUlaunchAttribute()
        early.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
        cluster.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
        value = driver.CUlaunchAttributeValue()
        value.programmaticStreamSerializationAllowed = 1
        early.value = value
        value = driver.CUlaunchAttributeValue()
        value.clusterDim.x, value.clusterDim.y, value.clusterDim.z = launch.cluster, 1, 1
        cluster.value = value
        attributes = [early, cluster] if launch.cluster > 1 else [early]
        config.attrs, config.numAttrs = attributes, len(attributes)
    return config


def _make_current(device: int) -> None:
    """Give this thread the context that PyTorch has for a device."""
    driver = _driver()
    _check(driver.cuCtxSetCurrent(_check(driver.cuDevicePrimaryCtxRetain(device))))


def _refuse_capture() -> None:
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError("a CUDA graph cannot hold the first call of a compressed layer: call it once before.")


@functools.cache
def _driver() -> Any:
    from cuda.bindings import driver

    return driver


@functools.cache
def _limits(device: int) -> tuple[int, int]:
    """Processors, and bytes of shared memory that a block can have."""
    properties = torch.cuda.get_device_properties(device)
    shared = properties.shared_memory_per_block_optin  # type: ignore[attr-defined]
    return properties.multi_processor_count, shared


@functools.cache
def _is_hopper(device: int) -> bool:
    return torch.cuda.get_device_capability(device) == HOPPER


@functools.cache
def _function(kernel: str, device: int) -> Any:
    """The kernel as a CUfunction of a device, allowed all shared memory that there is."""
    driver = _driver()
    _refuse_capture()
    with torch.cuda.device(device):
        _make_current(device)
        code, name = _compile(kernel, *torch.cuda.get_device_capability(device))
        library = _check(driver.cuLibraryLoadData(code, [], [], 0, [], [], 0))
        function = _check(driver.cuKernelGetFunction(_check(driver.cuLibraryGetKernel(library, name))))
        attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        _check(driver.cuFuncSetAttribute(function, attribute, _limits(device)[1]))
    return function


@functools.cache
def _compile(kernel: str, major: int, minor: int) -> tuple[bytes, bytes]:
    """Machine code for a compute capability, and the kernel's name in it."""
    from cuda.bindings import nvrtc

    here = Path(__file__).parent
    source, header = (here / "cuda.cu").read_bytes(), (here / "device.cuh").read_bytes()
    program = _check(nvrtc.nvrtcCreateProgram(source, b"cuda.cu", 1, [header], [b"device.cuh"]))
    try:
        _check(nvrtc.nvrtcAddNameExpression(program, kernel.encode()))
        hopper = "a" if (major, minor) == HOPPER else ""  # with the instructions that are Hopper's alone
        options = [f"--gpu-architecture=sm_{major}{minor}{hopper}".encode(), b"--std=c++17"]
        try:
            _check(nvrtc.nvrtcCompileProgram(program, len(options), options))
        except RuntimeError as error:
            log = b" " * _check(nvrtc.nvrtcGetProgramLogSize(program))
            _check(nvrtc.nvrtcGetProgramLog(program, log))
            raise RuntimeError(f"{error}: {log.decode(errors='replace')}") from error
        code = b" " * _check(nvrtc.nvrtcGetCUBINSize(program))
        _check(nvrtc.nvrtcGetCUBIN(program, code))
        return code, _check(nvrtc.nvrtcGetLoweredName(program, kernel.encode()))
    finally:
        nvrtc.nvrtcDestroyProgram(program)


def _check(result: tuple) -> Any:
    """What a call of the CUDA bindings returned beside its status."""
    status, *values = result
    if status.value:
        raise RuntimeError(status.name)
    return values[0] if values else None
