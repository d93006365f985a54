"""The layer, and folding it away."""

import copy
import pickle
from typing import Any

import numpy as np
import pytest

import bnarray as bn


def test_forward_and_backward_are_the_functions() -> None:
    rng = np.random.default_rng(0)
    x, residual, dy = rng.normal(size=(3, 12, 4, 5)).astype(np.float32)
    where = rng.random((12, 1, 5)) < 0.8
    layer = bn.BatchNorm(4, activation="relu", eps=1e-3, update_rate=0.3, correction=0)
    layer.weight[:] = rng.normal(size=4)
    layer.bias[:] = rng.normal(size=4)
    stats = bn.RunningStats(4, update_rate=0.3, correction=0)
    keywords = {"eps": 1e-3, "activation": "relu", "residual": residual, "where": where}
    for step in (1, 2):
        y, saved = bn.batch_norm_forward(x, layer.weight, layer.bias, stats=stats, **keywords)
        np.testing.assert_array_equal(layer(x, residual, where), y)
        gradients = bn.batch_norm_backward(dy, saved)
        np.testing.assert_array_equal(layer.backward(dy), gradients.x)
        np.testing.assert_allclose(layer.grad_weight, step * gradients.weight)
        np.testing.assert_allclose(layer.grad_bias, step * gradients.bias)
        np.testing.assert_array_equal(layer.grad_residual, gradients.residual)
    np.testing.assert_array_equal(layer.stats.mean, stats.mean)
    np.testing.assert_array_equal(layer.stats.var, stats.var)
    assert layer.eval() is layer
    y, saved = bn.batch_norm_forward(x, layer.weight, layer.bias, stats=stats, training=False, **keywords)
    np.testing.assert_array_equal(layer.forward(x, residual, where), y)
    np.testing.assert_array_equal(layer.backward(dy), bn.batch_norm_backward(dy, saved).x)
    assert layer.stats.num_updates == 2
    assert layer.train() is layer
    layer(x)
    assert layer.stats.num_updates == 3
    held = layer.grad_weight
    held[0] = np.nan
    layer.zero_grad()
    assert layer.grad_weight is held
    np.testing.assert_array_equal(held, 0)


def test_parameters() -> None:
    layer = bn.BatchNorm(3)
    assert [p is q for p, q in zip(layer.parameters(), (layer.weight, layer.bias), strict=True)] == [True, True]
    assert [p is q for p, q in zip(layer.gradients(), (layer.grad_weight, layer.grad_bias), strict=True)] == [True] * 2
    plain = bn.BatchNorm(3, affine=False)
    assert plain.parameters() == plain.gradients() == []
    assert plain.weight is None
    x = np.random.default_rng(0).normal(size=(5, 3))
    np.testing.assert_array_equal(plain(x), bn.batch_norm(x))
    plain.backward(x)
    plain.zero_grad()


@pytest.mark.parametrize(
    ("dtype", "kept"), [(np.float16, np.float32), (np.float32, np.float32), (np.float64, np.float64)]
)
def test_like(dtype: Any, kept: Any) -> None:
    layer = bn.BatchNorm(3, like=np.ones(1, dtype))
    assert layer.weight.dtype == layer.grad_bias.dtype == kept
    assert layer.stats.mean.dtype == np.float64


def test_shared_statistics() -> None:
    stats = bn.RunningStats((2, 3))
    layers = [bn.BatchNorm((2, 3), axis=(1, 2), stats=stats) for _ in range(2)]
    x = np.random.default_rng(0).normal(size=(7, 2, 3))
    for layer in layers:
        layer(x)
    assert stats.num_updates == 2
    assert layers[0].stats is layers[1].stats is stats


@pytest.mark.parametrize("affine", [True, False])
def test_state_dict(affine: bool) -> None:
    rng = np.random.default_rng(0)
    layer = bn.BatchNorm(3, affine=affine)
    for _ in range(3):
        layer(rng.normal(1, 2, (8, 3)))
    if affine:
        layer.weight[:] = rng.normal(size=3)
    state = layer.state_dict()
    names = {"running_mean", "running_var", "count", "num_updates", "num_skipped"}
    assert set(state) == names | ({"weight", "bias"} if affine else set())
    other = bn.BatchNorm(3, affine=affine)
    other.load_state_dict(state)
    x = rng.normal(size=(8, 3))
    np.testing.assert_array_equal(other.eval()(x), layer.eval()(x))
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        np.testing.assert_array_equal(twin(x), layer(x))
        assert twin.stats is not layer.stats
    assert len(pickle.dumps(layer)) < 4000  # without the last batch
    if affine:
        before = other.weight.copy()
        for change, error in [
            ({"weight": np.ones(4)}, ValueError),
            ({"bias": [0.0]}, TypeError),
            ({"count": -1}, ValueError),
        ]:
            with pytest.raises(error, match=next(iter(change))):
                other.load_state_dict(state | {"weight": np.zeros(3)} | change)
            np.testing.assert_array_equal(other.weight, before)
        with pytest.raises(KeyError, match="weight"):
            other.load_state_dict({name: state[name] for name in names})
        without = bn.BatchNorm(3, affine=False)
        with pytest.raises(ValueError, match="weight and bias, and the layer neither"):
            without.load_state_dict(state)
        assert without.stats.num_updates == 0
    with pytest.raises(TypeError, match="the state is a NoneType"):
        other.load_state_dict(None)


def test_refuses() -> None:
    layer = bn.BatchNorm(3)
    with pytest.raises(RuntimeError, match="needs a forward"):
        layer.backward(np.ones((2, 3)))
    with pytest.raises(ValueError, match="weight has shape"):
        layer(np.ones((2, 4)))
    for keywords, error in [
        ({"activation": "tanh"}, ValueError),
        ({"stats": bn.RunningStats(4)}, ValueError),
        ({"stats": "shared"}, TypeError),
        ({"stats": bn.RunningStats(3, update_rate=0.5), "update_rate": 0.2}, ValueError),
        ({"axis": "a"}, TypeError),
        ({"eps": -1}, ValueError),
    ]:
        with pytest.raises(error, match=next(iter(keywords))):
            bn.BatchNorm(3, **keywords)
    assert "BatchNorm(3, axis=1" in repr(layer)


def test_a_failed_forward_keeps_the_last_one() -> None:
    layer, x = bn.BatchNorm(3), np.random.default_rng(0).normal(size=(5, 3))
    layer(x)
    expected = layer.backward(x)
    with pytest.raises(TypeError, match="x has dtype"):
        layer(np.ones((5, 3), int))
    np.testing.assert_array_equal(layer.backward(x), expected)


@pytest.mark.parametrize("axis", [0, -1, 1])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("affine", [True, False])
def test_fold(axis: int, dtype: Any, affine: bool) -> None:
    rng = np.random.default_rng(0)
    layer = bn.BatchNorm(5, affine=affine, eps=1e-3)
    for _ in range(3):
        layer(rng.normal(2, 3, (20, 5)))
    if affine:
        layer.weight[:], layer.bias[:] = rng.normal(size=(2, 5))
    shape = [3, 4, 6]
    shape[axis] = 5
    kernel, bias, x = rng.normal(size=shape).astype(dtype), rng.normal(size=5).astype(dtype), rng.normal(size=(7, 4))
    matrix = np.moveaxis(kernel, axis, -1).reshape(-1, 5)
    x = rng.normal(size=(7, matrix.shape[0])).astype(dtype)
    expected = layer.eval()(x @ matrix + bias)
    folded, shift = bn.fold(kernel, bias, layer, axis=axis)
    assert folded.dtype == shift.dtype == dtype
    tolerance = 1e-12 if dtype == np.float64 else 1e-5
    np.testing.assert_allclose(
        x @ np.moveaxis(folded, axis, -1).reshape(-1, 5) + shift, expected, rtol=tolerance, atol=tolerance
    )
    _, without = bn.fold(kernel, None, layer, axis=axis)
    _, with_zero = bn.fold(kernel, np.zeros(5, dtype), layer, axis=axis)
    np.testing.assert_array_equal(without, with_zero)


def test_fold_refuses() -> None:
    layer = bn.BatchNorm(5)
    for arguments, keywords, error, message in [
        ((np.ones((4, 3)), None, layer), {}, ValueError, "layer has features of shape"),
        ((np.ones((5, 3)), np.ones(3), layer), {}, ValueError, "bias has shape"),
        ((np.ones((5, 3)), None, layer), {"axis": 2}, ValueError, "axis is 2"),
        ((np.ones((5, 3)), None, layer), {"axis": "a"}, TypeError, "axis is 'a'"),
        ((np.ones((5, 3), int), None, layer), {}, TypeError, "kernel has dtype"),
        ((np.ones((5, 3)), None, bn.RunningStats(5)), {}, TypeError, "layer is a RunningStats"),
    ]:
        with pytest.raises(error, match=message):
            bn.fold(*arguments, **keywords)
