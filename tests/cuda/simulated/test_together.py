"""One launch a pass, in which blocks wait for one another: the bits of two launches, and nobody waits forever.

Blocks run side by side here, in an order that is drawn, as many at a time as a test says; that is a simulator's idea of
a device, and shows nothing of one's.
"""

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import bnarray as bn
from bnarray.backends import _cuda
from bnarray.kernels.cuda import together
from tests.cuda.simulated import simulator
from tests.cuda.simulated.simulator import room


@pytest.fixture(autouse=True)
def _afresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in ("blocks", "patience", "order", "waits_in_vain"):
        monkeypatch.setattr(room, name, getattr(room, name))
    simulator.launched.clear()
    yield
    for each in simulator.words:
        assert not each.any()  # counters are left as they were found


def _aligned(x: np.ndarray, elements: int = 0) -> np.ndarray:
    """A copy of x, with its strides, so many elements behind a multiple of 16 bytes."""
    order = sorted(range(x.ndim), key=lambda axis: -abs(x.strides[axis]))
    shape = [x.shape[axis] for axis in order]
    buffer = np.zeros(x.size + 64, x.dtype)
    first = -(buffer.ctypes.data // x.itemsize) % (16 // x.itemsize) + elements
    y = buffer[first : first + x.size].reshape(shape).transpose(np.argsort(order))
    y[...] = x
    return y


def _everything(x: np.ndarray, dy: np.ndarray, relu: bool, residual: np.ndarray | None = None) -> list[Any]:
    """What a training step comes to, and the kernels that it launched."""
    activation = "relu" if relu else None
    weight, bias = np.linspace(0.5, 2, x.shape[1]), np.linspace(-1, 1, x.shape[1])
    y, saved = bn.batch_norm_forward(x, weight, bias, activation=activation, residual=residual)
    gradients = bn.batch_norm_backward(dy, saved)
    return [y, saved.moments.mean, saved.moments.m2, *(each for each in gradients if each is not None)]


def _bits(x: np.ndarray) -> np.ndarray:
    return x.view(f"u{x.itemsize}")


def _both_ways(monkeypatch: pytest.MonkeyPatch, *arguments: Any) -> list[str]:
    """Assert that one launch and two have the same bits; return the names of the first ones."""
    simulator.launched.clear()
    one = _everything(*arguments)
    names = list(simulator.launched)
    simulator.launched.clear()
    with monkeypatch.context() as patch:
        patch.setattr(together, "most_parts", lambda device: 0)
        two = _everything(*arguments)
    assert not any(name.startswith(("forward", "backward")) for name in simulator.launched)
    for a, b in zip(one, two, strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(_bits(a), _bits(b))
    return names


def _laid_out(x: np.ndarray, layout: str) -> np.ndarray:
    return x if layout == "first" else np.moveaxis(np.ascontiguousarray(np.moveaxis(x, 1, -1)), -1, 1)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32])
@pytest.mark.parametrize(
    ("shape", "layout"),
    [
        ((3, 2, 72), "first"),  # in vectors
        ((2, 3, 7, 7), "first"),  # one by one, one chunk
        ((4, 2, 61), "first"),  # one by one, several chunks, and a tail
        ((90, 5), "first"),  # features side by side
        ((2, 37, 9), "last"),  # more than a warp of them
        ((90, 12), "first"),  # four of them a thread
        ((2, 40, 9), "last"),  # more than a tile of such
    ],
)
def test_one_launch_has_the_bits_of_two(
    simulated: object, monkeypatch: pytest.MonkeyPatch, dtype: Any, shape: tuple[int, ...], layout: str
) -> None:
    rng = np.random.default_rng(len(shape))
    x, dy, onto = (_aligned(_laid_out(each.astype(dtype), layout)) for each in rng.normal(3, 2, (3, *shape)))
    assert [name.partition("_")[0] for name in _both_ways(monkeypatch, x, dy, True)] == ["forward", "backward"]
    if dtype == np.float32:
        _both_ways(monkeypatch, x, dy, False)
    names = _both_ways(monkeypatch, x, dy, True, onto)
    assert [name.partition("_")[0] for name in names] == ["moments", "normalize", "backward"]


@pytest.mark.parametrize("layout", ["first", "last"])
@pytest.mark.parametrize(
    ("mean", "deviation"), [(1e6, 1.0), (0.0, 1e30), (1e36, 1e36), (0.0, 1e-25), (7.0, 0.0), (np.nan, 1.0)]
)
def test_what_float32_cannot_hold(
    simulated: object, monkeypatch: pytest.MonkeyPatch, mean: float, deviation: float, layout: str
) -> None:
    rng = np.random.default_rng(1)
    shape = (5, 3, 60) if layout == "first" else (5, 8, 10)
    values, gradients = mean + deviation * rng.normal(size=shape), rng.normal(size=shape)
    x, dy = (_aligned(_laid_out(each.astype(np.float32), layout)) for each in (values, gradients))
    x[0, 1, :7] = 1  # one feature is another case than the others, in some of its chunks
    names = _both_ways(monkeypatch, x, dy, True)
    assert [name.partition("_")[0] for name in names] == ["forward", "backward"]


@pytest.mark.parametrize("layout", ["first", "last", "four a thread"])
@pytest.mark.parametrize(
    ("blocks", "patience"),
    [(1, 0), (1, 20), (2, 20), (3, 20), (7, 20), (8, 10**9), (9, 10**9), (1000, 0), (1000, 7), (1000, 10**9)],
)
def test_nobody_waits_forever(simulated: object, blocks: int, patience: int, layout: str) -> None:
    """However few blocks a device holds at a time: where siblings cannot begin, those that wait make room for them."""
    rng, shape = np.random.default_rng(2), {"first": (3, 2, 122), "last": (2, 3, 50)}.get(layout, (2, 4, 50))
    x, dy = (_aligned(_laid_out(each.astype(np.float32), layout)) for each in rng.normal(3, 2, (2, *shape)))
    expected = _everything(x, dy, True)
    assert room.waits_in_vain == 0
    room.blocks, room.patience = blocks, patience
    for room.order in range(1, 3):
        for a, b in zip(_everything(x, dy, True), expected, strict=True):
            np.testing.assert_array_equal(a, b)
    if blocks < 8:  # the chunks of a tile, backwards
        assert room.waits_in_vain > 0
    elif patience == 10**9:  # tickets: as many blocks as a tile has are enough
        assert room.waits_in_vain == 0


def test_a_device_holds_so_many_blocks_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """By what a double of cuda.core says of devices: multiprocessors, their threads and KB of shared memory."""
    devices = {
        "H100": ((9, 0), 132, 2048, 228),
        "A100": ((8, 0), 108, 2048, 164),
        "a seventh of an A100": ((8, 0), 14, 2048, 164),
        "RTX 3090": ((8, 6), 82, 1536, 100),
        "Orin Nano": ((8, 7), 8, 1536, 164),
        "T4": ((7, 5), 40, 1024, 64),
    }

    class DeviceDouble:
        def __init__(self, name: str) -> None:
            self.compute_capability, processors, threads, shared = devices[name]
            self.properties = SimpleNamespace(
                multiprocessor_count=processors,
                max_threads_per_multiprocessor=threads,
                max_shared_memory_per_multiprocessor=shared * 1024,
                reserved_shared_memory_per_block=1024,
            )

    monkeypatch.setattr("cuda.core.Device", DeviceDouble)
    monkeypatch.setattr(together, "THREADS", 256)
    found = {name: simulator.most_parts(name) for name in devices}
    assert found == {
        "H100": 99, "A100": 81, "a seventh of an A100": 10, "RTX 3090": 41, "Orin Nano": 6, "T4": 0,
    }  # fmt: skip


def test_gradients_over_dy(simulated: object, monkeypatch: pytest.MonkeyPatch) -> None:
    """dx is written over dy, which blocks that left have not read to the end."""
    rng = np.random.default_rng(3)
    x, dy = (_aligned(each.astype(np.float32)) for each in rng.normal(3, 2, (2, 6, 3, 64)))
    _, saved = bn.batch_norm_forward(x, activation="relu")
    expected = bn.batch_norm_backward(dy, saved).x
    monkeypatch.setattr(room, "patience", 1)
    overwritten = _aligned(dy)
    assert bn.batch_norm_backward(overwritten, saved, out=overwritten).x is overwritten
    np.testing.assert_array_equal(overwritten, expected)
    assert room.waits_in_vain > 0


def _launched(call: Callable[[], Any]) -> list[str]:
    simulator.launched.clear()
    call()
    return [name.partition("_")[0] for name in simulator.launched]


def test_which_road_a_pass_takes(simulated: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    """docs/cuda.md has the table."""
    x = _aligned(np.random.default_rng(4).normal(3, 2, (6, 3, 64)).astype(np.float32))
    one, two = ["forward"], ["moments", "normalize"]

    def chunks() -> int:
        strides = tuple(step // 4 for step in x.strides)
        return _cuda.plan(x.shape, (1,), (), strides, most=100, width=4).chunks

    assert _launched(lambda: bn.batch_norm(x)) == one
    for most, expected in ((chunks(), one), (chunks() - 1, two), (0, two)):
        with monkeypatch.context() as patch:
            patch.setattr(together, "most_parts", lambda device, most=most: most)
            assert _launched(lambda: bn.batch_norm(x)) == expected
    assert _launched(lambda: bn.batch_norm(x, out=_aligned(x))) == one
    in_place = _aligned(x)
    assert _launched(lambda: bn.batch_norm(in_place, out=in_place)) == two
    assert _launched(lambda: bn.batch_norm(x, residual=x)) == two
    assert _launched(lambda: bn.batch_norm(x, where=x > 3)) == two
    assert _launched(lambda: bn.batch_norm(x.astype(np.float64))) == two
    assert _launched(lambda: bn.batch_norm(_aligned(x, 1))) == two  # vectors that are not aligned
    assert _launched(lambda: bn.batch_norm(_aligned(x[:, :, :63], 1))) == one  # no vectors
    last = _laid_out(np.repeat(x, 4, axis=1), "last")
    assert _launched(lambda: bn.batch_norm(_aligned(last))) == one
    assert _launched(lambda: bn.batch_norm(_aligned(last, 1))) == two
    assert _launched(lambda: bn.batch_norm(_aligned(last[:, :11], 1))) == one
    assert _launched(lambda: bn.moments(x)) == ["moments"]
    y, saved = bn.batch_norm_forward(x, activation="relu", residual=x)
    assert _launched(lambda: bn.batch_norm_backward(y, saved)) == ["backward"]
    assert _launched(lambda: bn.batch_norm_backward(y.astype(np.float64), saved)) == ["grad", "grad"]
    assert _launched(lambda: bn.batch_norm_backward(_aligned(y, 1), saved)) == ["grad", "grad"]
    _, saved = bn.batch_norm_forward(x, stats=bn.moments(x), training=False)
    assert _launched(lambda: bn.batch_norm_backward(y, saved)) == ["grad", "grad"]
    _, saved = bn.batch_norm_forward(x, where=x > 3)
    assert _launched(lambda: bn.batch_norm_backward(y, saved)) == ["grad", "grad"]
