"""Gradients against finite differences of the library's own forward pass, in float64."""

import numpy as np
import pytest

import bnarray as bn
from tests.cases import OPTIONS, Options, draw


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: options.name)
@pytest.mark.parametrize(
    ("shape", "kept"), [((6, 3), (1,)), ((3, 2, 4), (0, 2)), ((3, 4, 5), ()), ((2, 3, 2, 2), (3,))]
)
def test_finite_differences(shape: tuple[int, ...], kept: tuple[int, ...], options: Options) -> None:
    case = draw(shape, kept, "c", "float64", options, seed=3)
    keywords = {"axis": kept, "activation": "relu" if case.relu else None}
    if case.statistics is not None:
        keywords |= {"training": False, "stats": bn.Moments(1, *case.statistics)}
    fixed = {name: case.call[name] for name in ("eps", "where") if name in case.call}
    inputs = {"x": case.x, **{name: case.call[name] for name in ("weight", "bias", "residual") if name in case.call}}
    inputs = {name: value.astype(np.float64) for name, value in inputs.items()}

    def loss(changed: dict[str, np.ndarray]) -> float:
        return float((bn.batch_norm(**changed, **keywords, **fixed) * case.dy).sum())

    _, saved = bn.batch_norm_forward(**inputs, **keywords, **fixed)
    gradients = bn.batch_norm_backward(case.dy, saved)
    step = 1e-6
    for name, value in inputs.items():
        numeric = np.zeros(value.shape)
        for at in np.ndindex(value.shape):
            up, down = value.copy(), value.copy()
            up[at] += step
            down[at] -= step
            numeric[at] = (loss(inputs | {name: up}) - loss(inputs | {name: down})) / (2 * step)
        np.testing.assert_allclose(getattr(gradients, name), numeric, rtol=1e-5, atol=1e-6, err_msg=name)


def test_gradients_are_named() -> None:
    x = np.random.default_rng(0).normal(size=(5, 2))
    _, saved = bn.batch_norm_forward(x, np.ones(2), np.zeros(2), residual=x)
    gradients = bn.batch_norm_backward(x, saved)
    assert gradients._fields == ("x", "weight", "bias", "residual")
    _, saved = bn.batch_norm_forward(x, np.ones(2))
    gradients = bn.batch_norm_backward(x, saved)
    assert gradients._fields == ("x", "weight", "bias")
    assert gradients.bias is None


def test_dy_of_another_dtype_and_strides() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(40, 8, 3)).astype(np.float32)
    dy = rng.normal(size=(3, 8, 40)).T
    assert dy.dtype == np.float64
    _, saved = bn.batch_norm_forward(x)
    expected = bn.batch_norm_backward(np.ascontiguousarray(dy.astype(np.float32)), saved).x
    actual = bn.batch_norm_backward(dy, saved).x
    assert actual.dtype == np.float32
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-6)
    _, saved = bn.batch_norm_forward(x, residual=x)
    assert bn.batch_norm_backward(dy, saved)[3].dtype == np.float32


def test_padding_that_the_loss_ignores_disturbs_nothing() -> None:
    """NaN under weight 0 with a zero gradient: every other gradient is as if it were not there."""
    rng = np.random.default_rng(0)
    x, dy = rng.normal(size=(10, 3)), rng.normal(size=(10, 3))
    where = np.arange(10)[:, None] < 7
    x[7:], dy[7:] = np.nan, 0
    y, saved = bn.batch_norm_forward(x, np.ones(3), np.zeros(3), where=where)
    short, saved_short = bn.batch_norm_forward(x[:7], np.ones(3), np.zeros(3))
    np.testing.assert_allclose(y[:7], short, rtol=1e-12)
    assert np.isnan(y[7:]).all()
    gradients, gradients_short = bn.batch_norm_backward(dy, saved), bn.batch_norm_backward(dy[:7], saved_short)
    np.testing.assert_allclose(gradients.weight, gradients_short.weight, rtol=1e-12)
    np.testing.assert_allclose(gradients.x[:7], gradients_short.x, rtol=1e-12, atol=1e-15)
    np.testing.assert_array_equal(gradients.x[7:], 0)


def test_relu_lets_nan_through() -> None:
    x = np.array([[1.0], [np.nan], [-1.0]])
    y = bn.batch_norm(x, stats=bn.Moments(1, np.zeros(1), np.ones(1)), training=False, activation="relu")
    np.testing.assert_array_equal(np.isnan(y[:, 0]), [False, True, False])
    assert y[2, 0] == 0


def test_saved_survives_what_out_overwrites() -> None:
    rng = np.random.default_rng(0)
    x, residual, dy = rng.normal(size=(3, 50, 4, 6)).astype(np.float32)
    weight, bias = rng.normal(size=4), rng.normal(size=4)
    for activation in (None, "relu"):
        for overwritten in ("x", "residual", "both"):
            _, saved = bn.batch_norm_forward(x, weight, bias, activation=activation, residual=residual)
            if overwritten == "both":
                mine = {"x": x.copy()}
                mine["residual"] = mine["x"]
                _, saved = bn.batch_norm_forward(x, weight, bias, activation=activation, residual=x)
                overwritten_by = "x"
            else:
                mine, overwritten_by = {"x": x.copy(), "residual": residual.copy()}, overwritten
            expected = bn.batch_norm_backward(dy, saved)
            y, again = bn.batch_norm_forward(
                **mine, weight=weight, bias=bias, activation=activation, out=mine[overwritten_by]
            )
            assert y is mine[overwritten_by]
            weight_before = weight.copy()
            weight *= 2  # copies were taken
            for ours, theirs in zip(bn.batch_norm_backward(dy, again), expected, strict=True):
                np.testing.assert_array_equal(ours, theirs)
            weight[:] = weight_before


def test_backward_in_place() -> None:
    rng = np.random.default_rng(0)
    x, dy, residual = rng.normal(size=(3, 6, 5, 7)).astype(np.float32)
    for keywords in ({}, {"residual": residual}, {"residual": residual, "activation": "relu"}):
        _, saved = bn.batch_norm_forward(x, np.ones(5), **keywords)
        expected, mine = bn.batch_norm_backward(dy, saved), dy.copy()
        actual = bn.batch_norm_backward(mine, saved, out=mine)
        assert actual.x is mine
        for ours, theirs in zip(actual, expected, strict=True):
            np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize(
    ("shape", "axis"), [((32, 64), 1), ((8, 16, 8, 8), 1), ((300, 5), 1), ((20, 33, 40, 40), 1), ((3, 40, 40, 64), -1)]
)
def test_one_go_has_the_bits_of_two(shape: tuple[int, ...], axis: int, activation: str | None, dtype: str) -> None:
    """Sums and gradient are done together, but not in place of dy."""
    rng = np.random.default_rng(0)
    x, dy = rng.normal(3, 2, shape).astype(dtype), rng.normal(size=shape).astype(dtype)
    weight = rng.normal(size=shape[axis]).astype(dtype)
    _, saved = bn.batch_norm_forward(x, weight, weight, axis=axis, activation=activation)
    together, mine = bn.batch_norm_backward(dy, saved), dy.copy()
    for ours, theirs in zip(together, bn.batch_norm_backward(mine, saved, out=mine), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_one_go_with_numbers_that_float32_has_no_room_for() -> None:
    x = np.random.default_rng(0).normal(size=(50, 3)).astype(np.float32)
    weight = np.array([1e-30, 1, 1e30])
    _, saved = bn.batch_norm_forward(x, weight)
    together, mine = bn.batch_norm_backward(x, saved), x.copy()
    for ours, theirs in zip(together[:2], bn.batch_norm_backward(mine, saved, out=mine)[:2], strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert np.isfinite(together.x).all()
    assert (together.x != 0).any()
