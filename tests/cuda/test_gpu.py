"""The kernels on a real device, by CuPy and by torch. Nothing here has ever passed: no machine of ours had a GPU.

``BNARRAY_GPU_EVERY=1`` takes every case of the table (each kind of kernel compiles for a second or two when it is first
met), and the default every seventh. `python -m benchmarks.gpu` runs all of this, and the benchmark.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bnarray.cuda import obstacle

if os.environ.get("NUMBA_ENABLE_CUDASIM") == "1":
    pytest.skip("Numba simulates devices here; nothing is verified on a GPU", allow_module_level=True)
if (_obstacle := obstacle()) is not None:
    pytest.skip(
        f"{_obstacle}: that kernels run on a GPU, with what results and how fast, is not verified",
        allow_module_level=True,
    )
pytest.importorskip("cupy", reason="CuPy is not installed; its arrays on a GPU are not verified")

import cupy

import bnarray as bn
from bnarray.backends import _cuda
from bnarray.kernels.cuda import memory, stage
from bnarray.testing import TOLERANCES, assert_close, check_case, reference
from tests.cases import Options, draw, table

pytestmark = pytest.mark.gpu

_EVERY = int(os.environ.get("BNARRAY_GPU_EVERY", "7"))
_CASES = table()[::_EVERY]

if os.environ.get("BNARRAY_GPU_POOL") == "0":  # a sanitizer sees no ends of arrays within a pool
    cupy.cuda.set_allocator(None)

_PARAMETERS = ("shape", "kept", "layout", "dtype", "options")


def _on_device(x: np.ndarray) -> Any:
    """x on the current device, with its strides and alignment."""
    low, high = np.lib.array_utils.byte_bounds(x)
    host = np.frombuffer((np.ctypeslib.ctypes.c_char * (high - low)).from_address(low), np.uint8)
    buffer = cupy.zeros(high - low + x.itemsize, np.uint8)
    shift = low % x.itemsize
    buffer[shift : shift + high - low] = cupy.asarray(host)
    first = buffer.data + shift + (x.ctypes.data - low)
    return cupy.ndarray(x.shape, x.dtype, memptr=first, strides=x.strides)


def _drawn(*shape: int, seed: int = 0, dtype: Any = np.float32) -> np.ndarray:
    return np.random.default_rng(seed).normal(3, 2, shape).astype(dtype)


# -- CuPy --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(_PARAMETERS, _CASES)
def test_cases_on_cupy(shape: Any, kept: Any, layout: str, dtype: str, options: Options) -> None:
    case = draw(shape, kept, layout, dtype, options, seed=len(shape) + len(layout))
    make = _on_device
    check_case(make, cupy.asnumpy, case.x, case.dy, kept, relu=case.relu, statistics=case.statistics, **case.call)


_MOST = stage.most(memory.FLOAT32, 1) * _cuda.MOST_CHUNKS


@pytest.mark.parametrize("shape", [(32, 64, 56, 56), (1, 1, _MOST), (3, 1, _MOST + 1)])
@pytest.mark.parametrize("channels_last", [False, True])
def test_as_many_chunks_as_there_may_be(shape: tuple[int, ...], channels_last: bool) -> None:
    x, dy = _drawn(*shape), _drawn(*shape, seed=1)
    if channels_last:
        x, dy = (np.moveaxis(np.ascontiguousarray(np.moveaxis(each, 1, -1)), -1, 1) for each in (x, dy))
    truth, tolerance = reference(x, dy, (1,)), TOLERANCES["float32"]
    results = []
    for _ in range(2):
        y, saved = bn.batch_norm_forward(_on_device(x))
        results.append((y.get(), bn.batch_norm_backward(_on_device(dy), saved).x.get()))
    assert_close(results[0][0], truth.y, truth.y_scale, tolerance, tolerance.y)
    assert_close(results[0][1], truth.dx, truth.dx_scale, tolerance, tolerance.dx)
    for first, second in zip(*results, strict=True):
        np.testing.assert_array_equal(first, second)  # the same bits on every run


def test_more_elements_than_32_bits_count() -> None:
    rows, features = 2**16 + 1, 2**15
    if cupy.cuda.runtime.memGetInfo()[0] < 6 * 2 * rows * features:
        pytest.skip("the device has too little memory; arrays of more than 2^31 elements are not verified")
    x = cupy.broadcast_to(cupy.arange(rows, dtype=np.float32)[:, None] % 7, (rows, features)).astype(np.float16)
    y, saved = bn.batch_norm_forward(x)
    one = (np.arange(rows) % 7).astype(np.float64)
    expected = (one - one.mean()) / np.sqrt(one.var() + 1e-5)
    for column in (0, features // 2, features - 1):
        np.testing.assert_allclose(y[:, column].get(), expected, rtol=2e-3, atol=2e-3)
    np.testing.assert_allclose(saved.moments.mean.get(), one.mean(), rtol=1e-12)
    dx = bn.batch_norm_backward(y, saved).x
    assert float(abs(dx[-1]).max()) < 1e-2  # dy is in the span of what the statistics take away
    del x, y, saved, dx
    cupy.get_default_memory_pool().free_all_blocks()


def test_two_streams_at_once() -> None:
    """Calls on two streams disturb nothing of one another, and share a state in the order of the calls."""
    batches = [_drawn(32, 64, 28, 28, seed=seed) for seed in range(2)]
    arrays, alone = (
        [cupy.asarray(each) for each in batches],
        [bn.batch_norm(cupy.asarray(each)).get() for each in batches],
    )
    shared, expected = bn.RunningStats(64, like=arrays[0]), bn.RunningStats(64)
    cupy.cuda.Device().synchronize()
    streams, results = [cupy.cuda.Stream(non_blocking=True) for _ in arrays], []
    for _ in range(20):
        for stream, x, batch in zip(streams, arrays, batches, strict=True):
            with stream:
                results.append(bn.batch_norm(x, stats=shared))
            expected.update(bn.moments(batch))
    cupy.cuda.Device().synchronize()
    for i, y in enumerate(results):
        np.testing.assert_array_equal(y.get(), alone[i % 2])
    np.testing.assert_allclose(shared.mean.get(), expected.mean, rtol=1e-6)
    assert shared.num_updates == 40


# -- One launch, in which blocks wait for one another ------------------------------------------------------------------
#
# Each test is a process of its own, which is stopped in time: a device that hangs shows as a failure, and does not stop
# the others.

_TOGETHER = """
import sys
import cupy, numpy as np, bnarray as bn
from bnarray.backends import cupy as backend
from bnarray.kernels.cuda import memory, stage, together

def drawn(*shape, seed=0, dtype=np.float32, last=False):
    x = cupy.asarray(np.random.default_rng(seed).normal(3, 2, shape).astype(dtype))
    return cupy.moveaxis(cupy.ascontiguousarray(cupy.moveaxis(x, 1, -1)), -1, 1) if last else x

def step(x, dy):
    y, saved = bn.batch_norm_forward(x, activation="relu")
    return y, saved.moments.mean, saved.moments.m2, *bn.batch_norm_backward(dy, saved)[:1]

def as_two_launches(x, dy):
    limit, together.most_parts = together.most_parts, lambda device: 0
    try:
        return [each.get() for each in step(x, dy)]
    finally:
        together.most_parts = limit

def assert_same(found, expected):
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_array_equal(a.get(), b)

def assert_counters_are_0():
    cupy.cuda.Device().synchronize()
    for _, _, words, _ in backend._kernels._words.values():
        assert not words.get().any(), "counters are left behind"

limit = together.most_parts(cupy.cuda.Device().id)
if not limit:
    sys.exit("this device has no launches in which blocks wait for one another")
of_chunk = stage.most(memory.FLOAT32, 2)  # backwards; forwards there are half as many chunks
"""


def _together(code: str, seconds: float = 90) -> None:
    try:
        done = subprocess.run(
            [sys.executable, "-c", _TOGETHER + code],
            cwd=Path(__file__).parents[2],
            capture_output=True,
            text=True,
            timeout=seconds,
        )
    except subprocess.TimeoutExpired:
        pytest.fail(
            f"not done after {seconds} s: blocks that wait for one another hang, or nearly so; until that is "
            f"understood, let most_parts in bnarray/kernels/cuda/together.py return 0: every pass is then two launches"
        )
    if "has no launches in which" in done.stderr:
        pytest.skip("the device is too old for launches in which blocks wait for one another; these are not verified")
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_one_launch_has_the_bits_of_two(dtype: str, last: bool) -> None:
    _together(f"""
for shape in ((32, 16, 56, 56), (32, 70, 7, 7), (4, 3, 31, 33), (2, 3, 5)):
    x, dy = (drawn(*shape, seed=seed, dtype="{dtype}", last={last}) for seed in range(2))
    expected = as_two_launches(x, dy)
    for _ in range(5):
        assert_same(step(x, dy), expected)
assert_counters_are_0()
""")


def test_as_many_blocks_wait_as_may() -> None:
    """One chunk fewer than the limit, as many, one more (which takes two launches), and many features of each."""
    _together("""
for chunks in (limit - 1, limit, limit + 1):
    for features in (1, 7, 64):
        x, dy = (drawn(1, features, chunks * of_chunk, seed=seed) for seed in range(2))
        expected = as_two_launches(x, dy)
        for _ in range(3):
            assert_same(step(x, dy), expected)
assert_counters_are_0()
""")


@pytest.mark.parametrize("streams", [2, 8])
def test_streams_that_all_wait(streams: int) -> None:
    """With two they find room side by side; with eight they need not: then some blocks leave their work to others."""
    _together(f"""
streams = [cupy.cuda.Stream(non_blocking=True) for _ in range({streams})]
arrays = [[drawn(1, 16, limit * of_chunk, seed=2 * i + j) for j in range(2)] for i in range(len(streams))]
expected = [as_two_launches(*each) for each in arrays]
cupy.cuda.Device().synchronize()
for _ in range(3):
    results = [[] for _ in streams]
    for _ in range(4):
        for stream, given, result in zip(streams, arrays, results):
            with stream:
                result.append(step(*given))
    cupy.cuda.Device().synchronize()
    for result, right in zip(results, expected):
        for each in result:
            assert_same(each, right)
assert_counters_are_0()
""")


@pytest.mark.parametrize("patience", [0, 1, 10])
def test_nobody_has_to_wait(patience: int) -> None:
    """Blocks that leave at once, or soon, have their chunks done by the last one of the tile."""
    _together(f"""
for last in (False, True):
    x, dy = (drawn(8, 40, 28, 28, seed=seed, last=last) for seed in range(2))
    expected = as_two_launches(x, dy)
    together.PATIENCE = {patience}
    for _ in range(5):
        assert_same(step(x, dy), expected)
assert_counters_are_0()
""")


def test_a_replay_beside_calls() -> None:
    _together("""
x, dy = (drawn(8, 16, 56, 56, seed=seed) for seed in range(2))
expected = as_two_launches(x, dy)
capturing, other = (cupy.cuda.Stream(non_blocking=True) for _ in range(2))
cupy.cuda.Device().synchronize()
with capturing:
    step(x, dy)
    capturing.begin_capture()
    captured = step(x, dy)
    graph = capturing.end_capture()
for _ in range(10):
    with other:
        graph.launch()
    with capturing:
        found = step(x, dy)
    cupy.cuda.Device().synchronize()
    assert_same(found, expected)
    assert_same(captured, expected)
assert_counters_are_0()
""")


def test_a_captured_step_replays() -> None:
    x = cupy.asarray(_drawn(32, 16, 14, 14))
    stats, alone = bn.RunningStats(16, like=x), bn.RunningStats(16)
    stream = cupy.cuda.Stream(non_blocking=True)
    cupy.cuda.Device().synchronize()

    def step() -> Any:
        y, saved = bn.batch_norm_forward(x, stats=stats)
        return y, bn.batch_norm_backward(y, saved).x

    with stream:
        step()  # compiles, and fills the pool
        stream.begin_capture()
        y, dx = step()
        graph = stream.end_capture()
        for seed in range(1, 4):
            x.set(_drawn(32, 16, 14, 14, seed=seed))
            graph.launch()
    stream.synchronize()
    for seed in range(4):
        expected, saved = bn.batch_norm_forward(_drawn(32, 16, 14, 14, seed=seed), stats=alone)
    np.testing.assert_allclose(y.get(), expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(dx.get(), bn.batch_norm_backward(expected, saved).x, atol=1e-5)
    np.testing.assert_allclose(stats.var.get(), alone.var, rtol=1e-6)
    assert stats.num_updates == 4


@pytest.mark.parametrize("nonfinite", ["skip", "raise", "propagate"])
def test_what_is_not_finite(nonfinite: str) -> None:
    x = cupy.asarray(_drawn(8, 4))
    stats = bn.RunningStats(4, like=x, nonfinite=nonfinite)
    x[3, 2] = np.nan
    if nonfinite == "raise":
        with pytest.raises(FloatingPointError):
            bn.batch_norm(x, stats=stats)
    else:
        bn.batch_norm(x, stats=stats)
    assert (stats.num_updates, stats.num_skipped) == {"skip": (0, 1), "raise": (0, 0), "propagate": (1, 0)}[nonfinite]


def test_memory_that_was_freed() -> None:
    host = np.ones((6, 5), np.float32)
    memory = cupy.cuda.UnownedMemory(host.ctypes.data, host.nbytes, host, device_id=0)
    x = cupy.ndarray(host.shape, host.dtype, memptr=cupy.cuda.MemoryPointer(memory, 0))
    with pytest.raises(ValueError, match="x lies at 0x"):
        bn.batch_norm(x)


def test_several_devices() -> None:
    if cupy.cuda.runtime.getDeviceCount() < 2:
        pytest.skip("there is one GPU; several in one process are not verified")
    with cupy.cuda.Device(1):
        x = cupy.asarray(_drawn(6, 5))
    stats = bn.RunningStats(5, like=x)
    y = bn.batch_norm(x, stats=stats)
    assert y.device == stats.mean.device == x.device
    np.testing.assert_array_equal(y.get(), bn.batch_norm(cupy.asarray(_drawn(6, 5))).get())


@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_sanitizer(tool: str) -> None:
    """A reduced table under compute-sanitizer."""
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        pytest.skip(f"compute-sanitizer is not installed; {tool} is not verified")
    tests = [f"{__file__}::{name}" for name in ("test_cases_on_cupy", "test_what_is_not_finite")]
    done = subprocess.run(
        [sanitizer, "--tool", tool, "--error-exitcode", "9", sys.executable, "-m", "pytest", "-q", "-x", *tests],
        env=os.environ | {"BNARRAY_GPU_EVERY": "151", "BNARRAY_GPU_POOL": "0"},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-10_000:] + done.stderr[-2_000:]


# -- torch -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def torch() -> Any:
    module = pytest.importorskip("torch", reason="torch is not installed; its tensors on a GPU are not verified")
    if not module.cuda.is_available():
        pytest.skip("this torch has no CUDA; its tensors on a GPU are not verified")
    return module


@pytest.mark.parametrize(_PARAMETERS, [case for case in _CASES if case.values[2] not in ("unaligned", "reversed")])
def test_cases_on_torch(torch: Any, shape: Any, kept: Any, layout: str, dtype: str, options: Options) -> None:
    def make(x: np.ndarray) -> Any:
        steps = [step // x.itemsize for step in x.strides]
        buffer = torch.zeros(1 + sum((size - 1) * step for size, step in zip(x.shape, steps, strict=True)))
        tensor = buffer.to("cuda", getattr(torch, x.dtype.name)).as_strided(x.shape, steps)
        tensor.copy_(torch.from_numpy(np.ascontiguousarray(x).astype(np.float64)))
        return tensor

    def back(tensor: Any) -> np.ndarray:
        wide = tensor.detach().cpu().to(torch.float64).numpy()
        return wide.astype(str(tensor.dtype).rpartition(".")[2]) if tensor.dtype != torch.bfloat16 else wide

    if layout == "broadcast":
        pytest.skip("torch copies nothing into memory that elements share; that layout is verified on CuPy")
    case = draw(shape, kept, layout, dtype, options, seed=len(shape) + len(layout))
    check_case(make, back, case.x, case.dy, kept, relu=case.relu, statistics=case.statistics, **case.call)


def test_autograd_compile_and_graphs(torch: Any) -> None:
    x = torch.randn(6, 3, 4, dtype=torch.float64, device="cuda", requires_grad=True)
    weight = torch.rand(3, dtype=torch.float64, device="cuda", requires_grad=True)
    assert torch.autograd.gradcheck(bn.batch_norm, (x, weight))
    assert torch.autograd.gradgradcheck(bn.batch_norm, (x, weight))
    stats, eager = bn.RunningStats(3, like=x), bn.RunningStats(3, like=x)
    compiled = torch.compile(lambda x: bn.batch_norm(x, weight, stats=stats), fullgraph=True)
    for _ in range(3):
        torch.testing.assert_close(compiled(x), bn.batch_norm(x, weight, stats=eager))
    torch.testing.assert_close(stats.var, eager.var)
    batch, graph = x.detach(), torch.cuda.CUDAGraph()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        bn.batch_norm(batch, stats=eager)
    torch.cuda.current_stream().wait_stream(stream)
    with torch.cuda.graph(graph):
        y = bn.batch_norm(batch, stats=eager)
    before = eager.num_updates
    for _ in range(3):
        graph.replay()
    assert eager.num_updates == before + 3
    torch.testing.assert_close(y, bn.batch_norm(batch))


def test_a_training_step_does_not_wait(torch: Any) -> None:
    x, weight = (
        torch.randn(8, 4, 9, device="cuda", requires_grad=True),
        torch.ones(4, device="cuda", requires_grad=True),
    )
    stats = bn.RunningStats(4, like=x)
    bn.batch_norm(x, weight, stats=stats).sum().backward()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        bn.batch_norm(x, weight, stats=stats, activation="relu").sum().backward()
        bn.batch_norm(x, weight, stats=stats, training=False)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert stats.num_updates == 2


def test_modules_are_those_of_torch(torch: Any) -> None:
    from bnarray.torch import BatchNorm2d

    x = torch.randn(8, 16, 7, 7, device="cuda").to(memory_format=torch.channels_last)
    ours, theirs = BatchNorm2d(16).cuda(), torch.nn.BatchNorm2d(16).cuda()
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours.running_var, theirs.running_var, rtol=1e-4, atol=1e-5)
