"""Devices within a library, on those that array-api-strict pretends to have: two of them have no float64."""

from collections.abc import Iterator
from typing import Any

import array_api_strict as xp
import numpy as np
import pytest

import bnarray as bn

DEVICES = [device for device in xp.__array_namespace_info__().devices() if device != xp.Device("CPU_DEVICE")]
SHAPE, FEATURES = (6, 3, 4), (3,)


@pytest.fixture(params=DEVICES, ids=str)
def device(request: pytest.FixtureRequest) -> Any:
    return request.param


def _widest(device: Any) -> Any:
    return xp.__array_namespace_info__().dtypes(device=device, kind="real floating").get("float64", xp.float32)


def _numpy(array: Any) -> np.ndarray:
    return np.from_dlpack(array) if hasattr(array, "device") and type(array) is not np.ndarray else np.asarray(array)


def _arrays(result: Any) -> Iterator[Any]:
    """Every array in what a call returned; numbers are on no device."""
    if isinstance(result, bn.Moments):
        yield from _arrays((result.count, result.mean, result.m2, result.var(0)))
    elif isinstance(result, bn.RunningStats):
        yield from _arrays(tuple(result.state_dict().values()))
    elif isinstance(result, tuple | list):
        for each in result:
            yield from _arrays(each)
    elif not isinstance(result, int | float | None):
        yield result


def _everything(make: Any, where: np.ndarray | None) -> list[Any]:
    """The results of all functions that return arrays."""
    rng = np.random.default_rng(0)
    x, dy, residual = (make(array) for array in rng.normal(2, 3, (3, *SHAPE)).astype(np.float32))
    weight, bias = (make(array) for array in rng.normal(size=(2, *FEATURES)).astype(np.float32))
    where = None if where is None else make(where)
    exponential = bn.RunningStats(3, like=x)
    cumulative = bn.RunningStats(3, like=x, update_rate=None)
    results: list[Any] = []
    for stats in (exponential, cumulative, None):
        y, saved = bn.batch_norm_forward(
            x, weight, bias, stats=stats, where=where, activation="relu", residual=residual
        )
        out, dx = make(np.zeros(SHAPE, np.float32)), make(np.zeros(SHAPE, np.float32))
        results += [y, *bn.batch_norm_backward(dy, saved), saved.moments]
        results += [bn.batch_norm(x, weight, out=out, where=where), bn.batch_norm_backward(dy, saved, out=dx)[0]]
        assert results[-2] is out
        assert results[-1] is dx
    m = bn.moments(x, where=where)
    cumulative.merge(cumulative.copy())
    loaded = bn.RunningStats(3, like=x)
    loaded.load_state_dict(exponential.state_dict())
    layer = bn.BatchNorm(3, like=x)
    results += [m, m + m, bn.Moments(2, weight, bias * bias), exponential, cumulative, loaded]
    results += [exponential.updated(m), layer(x), layer.backward(dy), layer.weight, layer.grad_weight, layer.stats]
    results += [bn.batch_norm(x, stats=each, training=False) for each in (exponential, bn.RunningStats(3), m)]
    results += bn.fold(weight, bias, bn.BatchNorm(3))
    results += [bn.batch_norm(x[:0, ...], weight, stats=loaded), bn.moments(x[:0, ...])]
    return list(_arrays(results))


@pytest.mark.parametrize("where", [None, "mask", "weights", "features"])
def test_results_stay_where_x_is(device: Any, where: str | None) -> None:
    rng = np.random.default_rng(1)
    omega = {
        None: None,
        "mask": rng.random((6, 1, 4)) < 0.7,
        "weights": rng.random((6, 1, 1)).astype(np.float32),
        "features": rng.random(SHAPE) < 0.7,
    }[where]
    theirs, ours = (
        _everything(make, omega)
        for make in (lambda array: xp.asarray(array, device=device), lambda array: array.copy())
    )
    for got, expected in zip(theirs, ours, strict=True):
        assert got.device == device
        np.testing.assert_allclose(_numpy(got), expected, rtol=1e-4, atol=1e-5)


def test_state_is_as_wide_as_the_device_allows(device: Any) -> None:
    x = xp.asarray(np.ones((4, 3), np.float32), device=device)
    stats = bn.RunningStats(3, like=x)
    bn.batch_norm(x, stats=stats)
    for array in (stats.mean, stats.var, bn.moments(x).mean, bn.moments(x).m2):
        assert array.dtype == _widest(device)


def test_from_device_to_device(device: Any, tmp_path: Any) -> None:
    """State and layers are moved, saved, loaded and merged across devices and libraries."""
    rng = np.random.default_rng(0)
    batch = rng.normal(2, 3, (8, 3)).astype(np.float32)
    here, there = xp.asarray(batch), xp.asarray(batch, device=device)
    for update_rate in (0.1, None):
        states = [bn.RunningStats(3, like=like, update_rate=update_rate) for like in (here, there, batch)]
        for stats, x in zip(states, (there, here, there), strict=True):
            bn.batch_norm(x, stats=stats)
            for like in (here, there):
                moved = stats.to(like)
                assert moved.mean.device == moved.var.device == like.device
                assert moved.mean.dtype == _widest(like.device)
            np.testing.assert_allclose(_numpy(stats.mean), _numpy(states[0].mean), rtol=1e-6)
            stats.save(tmp_path / "stats.npz")
            np.testing.assert_allclose(bn.RunningStats.load(tmp_path / "stats.npz").var, _numpy(stats.var), rtol=1e-6)
        if update_rate is None:
            for stats, other in zip(states, reversed(states), strict=True):
                stats.merge(other)
            assert states[1].mean.device == device
    layer = bn.BatchNorm(3, like=here)
    layer.to(there)
    assert layer.weight.device == layer.grad_bias.device == layer.stats.mean.device == device
    assert layer.weight.dtype == xp.float32
    layer.load_state_dict(bn.BatchNorm(3).state_dict())
    assert layer(there).device == layer.weight.device == device
