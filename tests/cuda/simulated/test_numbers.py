"""Numbers that float32 arithmetic alone would lose, and what must not depend on how work is cut; in a simulator."""

from types import SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import bnarray as bn
from bnarray.backends import _cuda
from bnarray.kernels.cuda import memory, stage
from bnarray.testing import TOLERANCES, assert_close, reference
from tests.cuda.simulated import simulator

F32 = TOLERANCES["float32"]


@pytest.mark.parametrize("layout", ["channels first", "channels last", "four a thread"])
@pytest.mark.parametrize(
    ("mean", "deviation"), [(1e6, 1.0), (-3e4, 1e-2), (0.0, 1e30), (1e36, 1e36), (0.0, 1e-25), (7.0, 0.0)]
)
def test_far_and_large_numbers(simulated: object, mean: float, deviation: float, layout: str) -> None:
    rng = np.random.default_rng(1)
    shape = {"channels first": (5, 3, 40), "channels last": (200, 9), "four a thread": (200, 8)}[layout]
    kept = (1,)
    x, dy = (mean + deviation * rng.normal(size=shape)).astype(np.float32), rng.normal(size=shape).astype(np.float32)
    eps = min(1e-5, deviation**2) or 1e-5
    truth = reference(x, dy, kept, eps=eps)
    y, saved = bn.batch_norm_forward(x, axis=kept, eps=eps)
    assert_close(y, truth.y, truth.y_scale, F32, F32.y)
    assert_close(bn.batch_norm_backward(dy, saved).x, truth.dx, truth.dx_scale, F32, F32.dx)


def test_an_outlier_comes_first(simulated: object) -> None:
    x = np.random.default_rng(2).normal(size=(1, 2, 400)).astype(np.float32)
    x[:, :, ::100] = 1e5
    truth = reference(x, x, (1,))
    y, _ = bn.batch_norm_forward(x, axis=1)
    assert_close(y, truth.y, truth.y_scale, F32, F32.y)


@pytest.mark.parametrize("padding", [np.nan, np.inf])
def test_padding_of_weight_0_is_not_looked_at(simulated: object, padding: float) -> None:
    rng = np.random.default_rng(3)
    x = rng.normal(size=(30, 4)).astype(np.float32)
    mask = rng.random((30, 1)) < 0.7
    padded = np.where(mask, x, np.float32(padding))
    y, saved = bn.batch_norm_forward(padded, axis=1, where=mask)
    clean, _ = bn.batch_norm_forward(x, axis=1, where=mask)
    np.testing.assert_array_equal(y[mask[:, 0]], clean[mask[:, 0]])
    dx = bn.batch_norm_backward(np.where(mask, x, np.float32(0)), saved).x
    assert np.isfinite(dx).all()


def test_a_nan_stays_in_its_feature(simulated: object) -> None:
    x = np.random.default_rng(4).normal(size=(30, 4)).astype(np.float32)
    clean, _ = bn.batch_norm_forward(x, axis=1)
    x[3, 2] = np.nan
    y, _ = bn.batch_norm_forward(x, axis=1)
    assert np.isnan(y[:, 2]).all()
    np.testing.assert_array_equal(np.delete(y, 2, 1), np.delete(clean, 2, 1))


def test_chunks_merge_to_the_same_statistics(simulated: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    x = (np.random.default_rng(5).normal(size=(7, 3, 90)) + 1e4).astype(np.float32)
    found = []
    for size in (200, 40_000):
        _cuda.plan.cache_clear()
        monkeypatch.setattr(stage, "SIZE", size)
        found.append(simulated.moments(x, (1,), None))
        way = _cuda.plan(x.shape, (1,), (), tuple(s // 4 for s in x.strides), most=stage.most(memory.FLOAT32, 1))
        assert (way.chunks > 1) == (size == 200)
    _cuda.plan.cache_clear()
    (_, mean, m2), (_, other_mean, other_m2) = found
    np.testing.assert_allclose(mean, other_mean, rtol=1e-14)
    np.testing.assert_allclose(m2, other_m2, rtol=1e-11)


def test_both_ways_forward_give_the_same_bits(simulated: SimpleNamespace) -> None:
    x = np.random.default_rng(6).normal(3, 2, (6, 11, 50)).astype(np.float32)
    count, mean, m2, _ = simulated.forward(x, (1,), 1e-5, None, None, False, None)
    again = simulated.moments(x, (1,), None)
    assert again[0] == count
    np.testing.assert_array_equal(again[1], mean)
    np.testing.assert_array_equal(again[2], m2)


def _laid(x: np.ndarray, elements: int) -> np.ndarray:
    """x in memory that begins so many elements behind a multiple of 16 bytes."""
    buffer = np.zeros(x.size + 64, x.dtype)
    first = -(buffer.ctypes.data // x.itemsize) % (16 // x.itemsize) + elements
    y = buffer[first : first + x.size].reshape(x.shape)
    y[...] = x
    assert y.ctypes.data % 16 == elements * x.itemsize
    return y


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32, np.float64])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("layout", ["first", "last"])
def test_vectors_and_elements_give_the_same_bits(
    simulated: SimpleNamespace, dtype: Any, residual: bool, layout: str
) -> None:
    """Accesses of 16 bytes or 8, where memory allows them, change nothing but their number."""
    rng, names = np.random.default_rng(9), simulator.launched
    x, onto, dy = rng.normal(3, 2, (3, 5, 3, 48) if layout == "first" else (3, 50, 40)).astype(dtype)
    ending = f"_by_{16 // x.itemsize}" if layout == "first" else "_abreast_4"
    if layout == "last" and dtype != np.float16:
        x[:, 5] *= x.dtype.type(1e30)  # of this tile float32 holds some features, and not this one
    results = []
    for shift in (0, 1):
        names.clear()
        laid = [_laid(each, shift) for each in (x, onto, dy)]
        y, saved = bn.batch_norm_forward(
            laid[0], residual=laid[1] if residual else None, activation="relu", out=_laid(x, shift)
        )
        gradients = bn.batch_norm_backward(laid[2], saved, out=_laid(x, shift))
        results.append((y, *(each for each in gradients if each is not None)))
        assert any(name.endswith(ending) for name in names) == (not shift and (layout, dtype) != ("last", np.float64))
        assert any(name.endswith("_apart") for name in names) == (shift and dtype != np.float64)
    for aligned, shifted in zip(*results, strict=True):
        np.testing.assert_array_equal(aligned.view(np.uint8), shifted.view(np.uint8))


def test_rows_that_begin_anywhere_are_no_vectors(simulated: SimpleNamespace) -> None:
    """The first is aligned, and those after it are not: a vector would raise."""
    x = _laid(np.random.default_rng(10).normal(size=(3, 5, 49)).astype(np.float32), 0)[:, :, :48]
    y, saved = bn.batch_norm_forward(x, axis=1)
    expected, again = bn.batch_norm_forward(x.copy(), axis=1)
    np.testing.assert_array_equal(y, expected)
    np.testing.assert_allclose(bn.batch_norm_backward(y, saved).x, bn.batch_norm_backward(y, again).x, atol=1e-7)


def test_in_place(simulated: object) -> None:
    rng = np.random.default_rng(7)
    x, dy = rng.normal(size=(2, 6, 3, 20)).astype(np.float32)
    y, saved = bn.batch_norm_forward(x, axis=1, activation="relu")
    dx = bn.batch_norm_backward(dy, saved).x
    overwritten = dy.copy()
    assert bn.batch_norm_backward(overwritten, saved, out=overwritten).x is overwritten
    np.testing.assert_array_equal(overwritten, dx)
    result = bn.batch_norm(x, axis=1, activation="relu", out=x)
    assert result is x
    np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize(("shape", "kept"), [((2, 1, 100, 91), (1,)), ((1100, 33), (1,)), ((1100, 36), (1,))])
def test_cut_as_on_a_device(
    simulated: object, cut_as_on_a_device: None, shape: tuple[int, ...], kept: tuple[int, ...]
) -> None:
    rng = np.random.default_rng(8)
    x, dy = rng.normal(5, 2, (2, *shape)).astype(np.float32)
    most = stage.most(memory.FLOAT32, 1)
    assert _cuda.plan(x.shape, kept, (), tuple(step // 4 for step in x.strides), most=most).chunks > 1
    truth = reference(x, dy, kept, relu=True)
    y, saved = bn.batch_norm_forward(x, axis=kept, activation="relu")
    assert_close(y, truth.y, truth.y_scale, F32, F32.y)
    assert_close(bn.batch_norm_backward(dy, saved).x, truth.dx, truth.dx_scale, F32, F32.dx)
