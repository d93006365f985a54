"""Bad input: which argument, what it is, what it should be; and nothing has changed."""

from typing import Any

import array_api_strict
import numpy as np
import pytest

import bnarray as bn

X = np.random.default_rng(0).normal(size=(6, 3, 2))


def _read_only(shape: tuple[int, ...]) -> np.ndarray:
    array = np.zeros(shape)
    array.flags.writeable = False
    return array


class Subclass(np.ndarray):
    """Something that means more than its elements."""


BAD_X = [
    ([[1.0]], TypeError, "x is a builtins.list"),
    (1.5, TypeError, "x is a builtins.float"),
    (None, TypeError, "x is a builtins.NoneType"),
    (np.ones((3, 2), int), TypeError, "x has dtype int64; it should be float16"),
    (np.ones((3, 2), complex), TypeError, "x has dtype complex128"),
    (np.ones((3, 2), bool), TypeError, "x has dtype bool"),
    (np.ones((3, 2), object), TypeError, "x has dtype object"),
    (np.ones((3, 2), np.longdouble), TypeError, "x has dtype float128"),
    (np.ones((3, 2), ">f8"), ValueError, r"foreign byte order; convert it by x\.astype"),
    (np.ma.ones((3, 2)), TypeError, "masked array.*pass its data as x and where="),
    (np.ones((3, 2)).view(Subclass), TypeError, r"Subclass.*pass numpy\.asarray"),
    (np.ones(3), ValueError, "axis is 1, but x has 1 axes"),
]


@pytest.mark.parametrize(("x", "error", "message"), BAD_X)
@pytest.mark.parametrize("function", [bn.batch_norm, bn.batch_norm_forward, bn.moments])
def test_x(function: Any, x: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        function(x)


BAD_KEYWORDS = [
    ({"weight": np.ones(2)}, ValueError, r"weight has shape \(2,\); it should have the features', \(3,\)"),
    ({"weight": np.ones((3, 1))}, ValueError, "weight has shape"),
    ({"weight": np.ones(3, int)}, TypeError, "weight has dtype int64"),
    ({"weight": [1.0, 1, 1]}, TypeError, "weight is a builtins.list"),
    ({"bias": np.ones(4)}, ValueError, "bias has shape"),
    ({"weight": array_api_strict.ones(3)}, TypeError, "weight is an array of array_api_strict and x one of numpy"),
    ({"axis": 3}, ValueError, "axis is 3, but x has 3 axes: from -3 to 2"),
    ({"axis": -4}, ValueError, "axis is -4"),
    ({"axis": (1, -2)}, ValueError, "names axis 1 twice"),
    ({"axis": 1.0}, TypeError, r"axis is 1\.0"),
    ({"axis": None}, TypeError, "axis is None"),
    ({"eps": -1}, ValueError, "eps is -1"),
    ({"eps": np.nan}, ValueError, "eps is nan"),
    ({"eps": 10**400}, ValueError, "eps is 1000"),
    ({"eps": "small"}, TypeError, "eps is 'small'"),
    ({"eps": None}, TypeError, "eps is None"),
    ({"where": np.ones((6, 3, 2), int)}, TypeError, "where has dtype int64; it should be boolean"),
    ({"where": np.ones((6, 3))}, ValueError, r"where has shape \(6, 3\); it should broadcast"),
    ({"where": np.full((6, 1, 1), -1.0)}, ValueError, "where holds a weight that is negative"),
    ({"where": np.full((6, 1, 1), np.nan)}, ValueError, "where holds a weight"),
    ({"where": np.full((6, 1, 1), np.inf)}, ValueError, "where holds a weight"),
    ({"where": [True]}, TypeError, "where is a builtins.list"),
    ({"activation": np.ones(3)}, ValueError, "activation is array"),
    ({"activation": "gelu"}, ValueError, "activation is 'gelu'; it should be None or 'relu'"),
    ({"residual": np.ones((6, 3, 1))}, ValueError, "residual has shape"),
    ({"residual": X.astype(np.float32)}, TypeError, "residual has dtype float32; it should have x's"),
    ({"stats": {"mean": 0}}, TypeError, "stats is a dict"),
    ({"stats": bn.RunningStats(4)}, ValueError, "stats has features of shape"),
    ({"stats": bn.moments(X)}, TypeError, "stats is a Moments, which cannot be updated"),
    ({"training": False, "stats": None}, TypeError, "stats is None"),
    ({"training": False, "stats": bn.Moments(1, np.ones(2), np.ones(2))}, ValueError, "stats has features"),
    ({"out": np.ones((6, 3))}, ValueError, "out has shape"),
    ({"out": np.ones((6, 3, 2), np.float32)}, TypeError, "out has dtype float32"),
    ({"out": _read_only((6, 3, 2))}, TypeError, "out is read-only"),
    ({"out": np.lib.stride_tricks.as_strided(np.ones(6), (6, 3, 2), (8, 0, 0))}, ValueError, "elements overlap"),
    ({"out": [[0.0]]}, TypeError, "out is a builtins.list"),
    ({"group": object()}, TypeError, "group"),
    ({"momentum": 0.9}, TypeError, r"update_rate=0\.9 for torch's meaning, update_rate=0\.1 for Keras's"),
]


@pytest.mark.parametrize(("keywords", "error", "message"), BAD_KEYWORDS)
@pytest.mark.parametrize("function", [bn.batch_norm, bn.batch_norm_forward])
def test_keywords(function: Any, keywords: dict[str, Any], error: type[Exception], message: str) -> None:
    stats, out = bn.RunningStats(3), np.full(X.shape, 7.0)
    with pytest.raises(error, match=message):
        function(X, **({"stats": stats, "out": out} | keywords))
    assert stats.num_updates == stats.num_skipped == 0
    assert (out == 7).all()


def test_out_that_overlaps() -> None:
    buffer = np.zeros(100)
    x = buffer[:36].reshape(6, 6)
    for name, keywords in {
        "x": {"out": buffer[1:37].reshape(6, 6)},
        "weight": {"weight": buffer[40:46], "out": buffer[40:76].reshape(6, 6)},
        "bias": {"bias": buffer[60:66], "out": buffer[40:76].reshape(6, 6)},
        "where": {"where": buffer[60:66][:, None], "out": buffer[40:76].reshape(6, 6)},
        "residual": {"residual": buffer[39:75].reshape(6, 6), "out": buffer[40:76].reshape(6, 6)},
    }.items():
        with pytest.raises(ValueError, match=f"out overlaps {name}"):
            bn.batch_norm(x, **keywords)
        assert (buffer == 0).all()
    with pytest.raises(ValueError, match="out overlaps x"):
        bn.batch_norm(x, out=x.T)
    halves = np.random.default_rng(0).normal(size=(6, 8))
    expected = bn.batch_norm(halves[:, ::2].copy())
    assert bn.batch_norm(halves[:, ::2], out=halves[:, 1::2]) is not None  # interleaved, but apart
    np.testing.assert_array_equal(halves[:, 1::2], expected)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((X,), TypeError, "saved is a tuple"),
        ((X[:3], "saved"), ValueError, "dy has shape"),
        ((None, "saved"), TypeError, "dy is None"),
        (([1.0], "saved"), TypeError, "dy is a builtins.list"),
        ((X.astype(int), "saved"), TypeError, "dy has dtype int64"),
        ((array_api_strict.asarray(X), "saved"), TypeError, "dy is an array of array_api_strict"),
    ],
)
def test_backward(arguments: tuple[Any, ...], error: type[Exception], message: str) -> None:
    _, saved = bn.batch_norm_forward(X)
    dy, given = (*arguments, (1, 2))[:2]
    with pytest.raises(error, match=message):
        bn.batch_norm_backward(dy, saved if given == "saved" else given)


def test_backward_out() -> None:
    x = X.copy()
    _, saved = bn.batch_norm_forward(x)
    for out, error, message in [
        (x, ValueError, "out overlaps x, which is still needed"),
        (np.ones(3), ValueError, "out has shape"),
        (np.ones(X.shape, np.float32), TypeError, "out has dtype"),
        (_read_only(X.shape), TypeError, "out is read-only"),
    ]:
        with pytest.raises(error, match=message):
            bn.batch_norm_backward(np.ones(X.shape), saved, out=out)
    np.testing.assert_array_equal(x, X)


def test_numpy_scalars_are_arrays_without_axes() -> None:
    y = bn.batch_norm(X, np.float64(2), np.float32(1), axis=(), where=np.bool(True))
    arrays = np.asarray(2.0), np.asarray(np.float32(1))
    np.testing.assert_array_equal(y, bn.batch_norm(X, *arrays, axis=(), where=np.asarray(True)))
    assert bn.batch_norm(np.float64(5), axis=()).shape == ()
    with pytest.raises(TypeError, match="out is read-only"):
        bn.batch_norm(np.float64(5), axis=(), out=np.float64(5))


def test_memmap_is_an_array(tmp_path: Any) -> None:
    x = np.memmap(tmp_path / "x.bin", np.float32, "w+", shape=(50, 3))
    x[:] = np.random.default_rng(0).normal(size=(50, 3))
    y = bn.batch_norm(x)
    assert type(y) is np.ndarray
    np.testing.assert_array_equal(y, bn.batch_norm(np.array(x)))
    read_only = np.memmap(tmp_path / "x.bin", np.float32, "r", shape=(50, 3))
    np.testing.assert_array_equal(bn.batch_norm(read_only), y)
    assert bn.batch_norm(x, out=x) is x
    np.testing.assert_array_equal(x, y)
    with pytest.raises(TypeError, match="read-only"):
        bn.batch_norm(y, out=read_only)
