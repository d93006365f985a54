"""Which backend serves which array, and what importing costs."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import array_api_strict as xp
import numpy as np
import pytest

import bnarray as bn
from bnarray import dispatch
from bnarray.backends import generic


@pytest.mark.parametrize("dtype", [xp.float32, xp.float64])
@pytest.mark.parametrize("axis", [1, (0, 2), ()])
@pytest.mark.parametrize("where", [None, "mask", "weights"])
def test_array_api_strict(dtype: Any, axis: int | tuple[int, ...], where: str | None) -> None:
    """Arrays of the standard, and nothing more, through the generic backend: all of the public functions."""
    rng = np.random.default_rng(0)
    x, dy, residual = rng.normal(2, 3, (3, 6, 4, 5)).astype(np.float32)
    kept = (axis,) if isinstance(axis, int) else axis
    features = tuple(x.shape[i] for i in kept)
    weight, bias = (np.asarray(rng.normal(size=features), np.float32) for _ in range(2))
    weights = {None: None, "mask": rng.random((6, 1, 5)) < 0.7, "weights": rng.random((6, 4, 1))}[where]

    def strict(array: Any) -> Any:
        return None if array is None else xp.asarray(array)

    def run(convert: Callable[[Any], Any]) -> list[Any]:
        stats = bn.RunningStats(features, like=convert(x))
        given = {"axis": axis, "where": convert(weights), "activation": "relu", "residual": convert(residual)}
        y, saved = bn.batch_norm_forward(convert(x), convert(weight), convert(bias), stats=stats, **given)
        gradients = bn.batch_norm_backward(convert(dy), saved)
        in_place = convert(x.copy())
        assert bn.batch_norm(in_place, out=in_place, **given) is in_place
        evaluated = bn.batch_norm(convert(x), stats=stats, training=False, axis=axis)
        m = bn.moments(convert(x), axis=axis, where=convert(weights))
        merged = m + m
        return [y, *gradients, in_place, evaluated, m.mean, m.m2, merged.m2, stats.mean, stats.var]

    for theirs, ours in zip(run(strict), run(lambda array: array), strict=True):
        assert type(theirs) is type(xp.ones(1))
        np.testing.assert_allclose(np.asarray(theirs), ours, rtol=2e-6, atol=2e-6)


def test_strict_refuses_what_numpy_refuses() -> None:
    for x in (xp.ones((3, 2), dtype=xp.int32), xp.ones((3, 2), dtype=xp.complex64)):
        with pytest.raises(TypeError, match="x has dtype"):
            bn.batch_norm(x)
    x = xp.ones((3, 2))
    for keywords, error in [
        ({"where": xp.ones((3, 2), dtype=xp.int32)}, TypeError),
        ({"where": xp.ones((4, 2))}, ValueError),
        ({"where": -xp.ones((3, 2))}, ValueError),
        ({"out": xp.ones((3, 3))}, ValueError),
        ({"out": xp.ones((3, 2), dtype=xp.float32)}, TypeError),
        ({"where": np.ones((3, 2), bool)}, TypeError),
    ]:
        with pytest.raises(error, match=next(iter(keywords))):
            bn.batch_norm(x, **keywords)
    vector = xp.ones(2)
    with pytest.raises(ValueError, match="out is weight"):
        bn.batch_norm(vector, vector, axis=0, out=vector)


def test_state_of_another_library() -> None:
    """A call from another library converts the few numbers per feature."""
    x = np.random.default_rng(0).normal(size=(20, 3))
    stats, strict_stats = bn.RunningStats(3), bn.RunningStats(3, like=xp.ones(1))
    bn.batch_norm(xp.asarray(x), stats=stats)
    bn.batch_norm(x, stats=strict_stats)
    assert type(stats.mean) is np.ndarray
    assert type(strict_stats.mean) is type(xp.ones(1))
    np.testing.assert_allclose(stats.var, np.asarray(strict_stats.var), rtol=1e-12)
    np.testing.assert_allclose(
        np.asarray(bn.batch_norm(xp.asarray(x), stats=stats, training=False)),
        bn.batch_norm(x, stats=strict_stats, training=False),
        rtol=1e-12,
    )
    assert type(strict_stats.to(x).mean) is np.ndarray


def test_fold_in_another_library() -> None:
    layer = bn.BatchNorm(3)
    layer(np.random.default_rng(0).normal(2, 3, (20, 3)))
    kernel = np.random.default_rng(1).normal(size=(3, 4, 2))
    folded, bias = bn.fold(xp.asarray(kernel), None, layer)
    ours, our_bias = bn.fold(kernel, None, layer)
    np.testing.assert_allclose(np.asarray(folded), ours, rtol=1e-12)
    np.testing.assert_allclose(np.asarray(bias), our_bias, rtol=1e-12)
    with pytest.raises(TypeError, match="bias is an array of numpy and kernel one of array_api_strict"):
        bn.fold(xp.asarray(kernel), np.ones(3), layer)


def test_register_backend() -> None:
    """An outsider's library: the verbs it has are used, the generic ones stand in for the others."""

    class Celsius:
        def __init__(self, array: np.ndarray) -> None:
            self.array = array
            self.shape, self.ndim, self.dtype = array.shape, array.ndim, array.dtype

    Celsius.__module__ = "thermometer.arrays"
    called = []
    backend = SimpleNamespace(
        check=lambda x, name: called.append(name) or x,
        moments=lambda x, kept, where: generic.moments(x.array, kept, where),
    )
    with pytest.raises(TypeError, match=r"x is a thermometer\.arrays\..*Celsius"):
        bn.moments(Celsius(np.ones((3, 2))))
    bn.register_backend("thermometer", backend)
    try:
        m = bn.moments(Celsius(np.array([[1.0, 2.0], [3.0, 2.0]])))
        np.testing.assert_array_equal(m.mean, [2, 2])
        assert called == ["x"]
        assert dispatch.backend(Celsius(np.ones(1))).normalize is generic.normalize
    finally:
        del dispatch._registered["thermometer"]
        dispatch._verbs_of_type.clear()
    with pytest.raises(TypeError, match=r"module\.moments is 3"):
        bn.register_backend("thermometer", SimpleNamespace(moments=3))
    with pytest.raises(TypeError, match="name is 3"):
        bn.register_backend(3, backend)


def test_import_brings_neither_numba_nor_a_framework(run_python: Callable[..., str]) -> None:
    code = (
        "import sys; before = set(sys.modules); import bnarray; bnarray.RunningStats; dir(bnarray);"
        "print(*sorted({name.partition('.')[0] for name in set(sys.modules) - before}))"
    )
    imported = set(run_python(code).split())
    assert "bnarray" in imported
    assert not imported & {"numba", "llvmlite", "numpy", "array_api_compat", "torch", "jax", "cupy", "dask"}


def test_a_call_brings_no_framework(run_python: Callable[..., str]) -> None:
    code = (
        "import sys, numpy; before = set(sys.modules); import bnarray; bnarray.batch_norm(numpy.ones((3, 2)));"
        "print(*sorted({name.partition('.')[0] for name in set(sys.modules) - before}))"
    )
    # Not SciPy: Numba itself imports it where it is installed.
    assert not set(run_python(code).split()) & {"torch", "jax", "cupy", "dask", "matplotlib", "sklearn"}


def test_every_public_name_loads() -> None:
    for name in bn.__all__:
        assert getattr(bn, name) is not None
    assert set(bn.__all__) <= set(dir(bn))
    with pytest.raises(AttributeError, match="no attribute 'batch_norm_2'"):
        bn.batch_norm_2  # noqa: B018  # the look-up is what is tested
