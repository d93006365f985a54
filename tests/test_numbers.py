"""Adversarial numbers: large means, extreme scales, NaN and infinity, one value, none."""

import platform
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest

import bnarray as bn
from bnarray.layout import Split, layout, split
from bnarray.testing import TOLERANCES, assert_close, reference
from tests.cases import DTYPES, LAYOUTS

SAME_VALUES = [name for name in LAYOUTS if name != "broadcast"]


@pytest.mark.parametrize("layout", SAME_VALUES)
@pytest.mark.parametrize("shape", [(64, 3, 14, 14), (2000, 12), (3, 5000)])
@pytest.mark.parametrize(("mean", "deviation"), [(1e6, 1.0), (-1e6, 1.0), (1e3, 1e-1)])
def test_float32_far_from_zero(layout: str, shape: tuple[int, ...], mean: float, deviation: float) -> None:
    rng = np.random.default_rng(1)
    x = LAYOUTS[layout](rng.normal(mean, deviation, shape).astype(np.float32))
    dy = LAYOUTS[layout](rng.normal(size=shape).astype(np.float32))
    weight = rng.normal(size=shape[1])
    truth, tolerance = reference(x, dy, (1,), weight=weight), TOLERANCES["float32"]
    y, saved = bn.batch_norm_forward(x, weight)
    np.testing.assert_allclose(saved.moments.var(), truth.var.ravel(), rtol=1e-6)
    assert_close(y, truth.y, truth.y_scale, tolerance, 4)
    assert_close(bn.batch_norm_backward(dy, saved).x, truth.dx, truth.dx_scale, tolerance, 8)


@pytest.mark.parametrize("columns", [False, True])
@pytest.mark.parametrize("scale", [1e30, 1e-30, 1e-39, 3e-43])
def test_float32_scales_at_the_ends(columns: bool, scale: float) -> None:
    """Squares beyond float32, or below it: the variance is right all the same, and y has deviation 1."""
    unit = np.random.default_rng(0).normal(size=(50, 20, 40))
    x = (unit * scale).astype(np.float32)
    if columns:
        x = LAYOUTS["channels_last"](x)
    m = bn.moments(x)
    np.testing.assert_allclose(m.var(), x.astype(np.float64).var(axis=(0, 2)), rtol=1e-6)
    y = bn.batch_norm(x, eps=0)
    np.testing.assert_allclose(y.astype(np.float64).std(axis=(0, 2)), 1, rtol=1e-5)


def test_float32_tile_that_mixes_scales() -> None:
    x = np.random.default_rng(0).normal(size=(4000, 16)).astype(np.float32)
    x[7, 3] = 3e25
    x[:, 4] *= 1e-25
    x[:, 5] = 0
    m = bn.moments(x)
    np.testing.assert_allclose(m.var(), x.astype(np.float64).var(axis=0), rtol=1e-6)


def test_float64_far_from_zero() -> None:
    rng = np.random.default_rng(2)
    x = rng.normal(1e8, 1e-3, (100_000, 4))
    exact = x.astype(np.longdouble)
    mean = exact.mean(axis=0)
    m = bn.moments(x)
    np.testing.assert_allclose(m.mean, mean.astype(np.float64), rtol=3e-16)
    np.testing.assert_allclose(m.var(), ((exact - mean) ** 2).mean(axis=0).astype(np.float64), rtol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("layout", ["c", "channels_last"])
def test_one_bad_value_stays_in_its_feature(dtype: str, bad: float, layout: str) -> None:
    x = np.random.default_rng(0).normal(size=(20, 9, 5)).astype(DTYPES[dtype])
    clean = bn.batch_norm(LAYOUTS[layout](x))
    x[3, 4, 2] = bad
    x = LAYOUTS[layout](x)
    y, saved = bn.batch_norm_forward(x)
    others = [c for c in range(9) if c != 4]
    np.testing.assert_array_equal(y[:, others], clean[:, others])
    assert np.isnan(y[:, 4].astype(np.float32)).all()
    dx = bn.batch_norm_backward(np.ones_like(x), saved).x
    assert np.isfinite(dx[:, others].astype(np.float32)).all()
    assert np.isnan(dx[:, 4].astype(np.float32)).all()


def test_one_value_normalises_to_bias() -> None:
    bias = np.array([1.0, -2.0])
    y = bn.batch_norm(np.array([[5.0, 6e5]]), np.array([3.0, 4.0]), bias)
    np.testing.assert_array_equal(y, [bias])
    assert (bn.batch_norm(np.array([[5.0, 6e5]]), eps=0) == 0).all()  # var + eps is 0: invstd is 0


def test_few_features_that_lie_together() -> None:
    """Which arrays are split, and that masked statistics and gradients of the parts come together again."""
    assert split((8, 20, 30, 3), (3,), (7200, 360, 12, 4)) == Split(reduced=2, feature=3, size=30)
    assert split((8, 3, 20, 30), (1,), (7200, 4, 360, 12)) == Split(reduced=3, feature=1, size=30)
    assert split((5003, 3), (1,), (12, 4)) is None  # a prime
    assert split((6000, 3), (1,), (40, 4)) is None  # a slice of more features
    assert split((6000, 12), (1,), (48, 4)) is None
    assert split((60, 3), (1,), (12, 4)) is None
    rng = np.random.default_rng(0)
    x, dy = rng.normal(5, 2, (2, 6000, 3))
    where, weight = rng.random((6000, 3)) < 0.5, rng.normal(size=3)
    y, saved = bn.batch_norm_forward(x, weight, where=where)
    truth = reference(x, dy, (1,), weight=weight, where=where)
    gradients = bn.batch_norm_backward(dy, saved)
    np.testing.assert_array_equal(saved.moments.count, where.sum(axis=0))
    np.testing.assert_allclose(saved.moments.var(), truth.var.ravel(), rtol=1e-13)
    np.testing.assert_allclose(y, truth.y, rtol=0, atol=1e-13)
    np.testing.assert_allclose(gradients.x, truth.dx, rtol=0, atol=1e-13)
    np.testing.assert_allclose(gradients.weight, truth.dweight, rtol=0, atol=1e-10)


@pytest.mark.parametrize(("lines", "features", "times"), [(2000, 64, 16), (1999, 64, 1), (2400, 33, 30), (300, 600, 1)])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "float64"])
def test_lines_of_few_features_side_by_side(lines: int, features: int, times: int, dtype: str) -> None:
    """What is seen as one line has the bits of what is not, because its memory does not lie together."""
    rng = np.random.default_rng(0)
    x, dy, residual = rng.normal(3, 2, (3, lines, features)).astype(DTYPES[dtype])
    assert layout(x.shape, (1,), x.strides, element_wise=True).times == times
    weight, bias = rng.normal(size=(2, features))

    def results(of: Callable[..., npt.NDArray[np.generic]]) -> list[npt.NDArray[np.generic]]:
        keywords = {"stats": bn.Moments(1, bias + 3, weight**2), "training": False}
        y, saved = bn.batch_norm_forward(of(x), weight, bias, activation="relu", residual=of(residual), **keywords)
        found = [y, *bn.batch_norm_backward(of(dy), saved)]
        y, saved = bn.batch_norm_forward(of(x), weight, bias, **keywords, out=of(x).copy())
        return [*found, y, bn.batch_norm_backward(of(dy), saved).x]

    def apart(a: npt.NDArray[np.generic]) -> npt.NDArray[np.generic]:
        wide = np.zeros((lines, features + 3), a.dtype)
        wide[:, :features] = a
        return wide[:, :features]

    for together, other in zip(results(lambda a: a), results(apart), strict=True):
        np.testing.assert_array_equal(together, other)


def test_constant_feature() -> None:
    x = np.full((1000, 3), 0.1, np.float32)
    y, saved = bn.batch_norm_forward(x, eps=0)
    assert (saved.moments.m2 == 0).all()
    np.testing.assert_array_equal(y, 0)
    assert np.isfinite(bn.batch_norm_backward(np.ones_like(x), saved).x).all()


@pytest.mark.parametrize(("shape", "axis"), [((0, 3), 1), ((5, 0), 1), ((0,), ()), ((2, 3, 0), 1), ((0, 0), (0, 1))])
@pytest.mark.parametrize("dtype", DTYPES)
def test_empty(shape: tuple[int, ...], axis: int | tuple[int, ...], dtype: str) -> None:
    kept = (axis,) if isinstance(axis, int) else axis
    features = tuple(shape[i] for i in kept)
    x = np.empty(shape, DTYPES[dtype])
    stats = bn.RunningStats(features)
    weight = np.ones(features, np.float32)
    y, saved = bn.batch_norm_forward(x, weight, weight, stats=stats, axis=axis)
    assert y.shape == shape
    assert y.dtype == x.dtype
    assert saved.moments.count == 0
    assert (stats.num_updates, stats.num_skipped, stats.count) == (0, 0, 0)
    gradients = bn.batch_norm_backward(x, saved)
    assert gradients.x.shape == shape
    np.testing.assert_array_equal(gradients.weight, np.zeros(features))
    np.testing.assert_array_equal(gradients.bias, np.zeros(features))
    assert bn.moments(x, axis=axis).mean.shape == features
    out = np.empty(shape, DTYPES[dtype])
    assert bn.batch_norm(x, out=out, axis=axis, stats=stats, training=False) is out


def test_feature_in_which_nothing_counts() -> None:
    """It keeps its running values, and is normalised with mean 0 and variance 1."""
    x = np.random.default_rng(0).normal(3, 2, (50, 3))
    where = np.ones((1, 3), bool)
    where[0, 1] = False
    stats = bn.RunningStats(3)
    y, saved = bn.batch_norm_forward(x, where=where, stats=stats, eps=0)
    np.testing.assert_array_equal(y[:, 1], x[:, 1])
    np.testing.assert_array_equal(saved.moments.count, [50, 0, 50])
    np.testing.assert_array_equal(stats.count, [50, 0, 50])
    assert (stats.mean[1], stats.var[1]) == (0, 1)
    assert stats.mean[0] != 0
    dy = np.random.default_rng(1).normal(size=x.shape)
    np.testing.assert_array_equal(bn.batch_norm_backward(dy, saved).x[:, 1], dy[:, 1])


def test_nothing_counts_at_all() -> None:
    x = np.random.default_rng(0).normal(3, 2, (50, 3))
    stats = bn.RunningStats(3)
    y = bn.batch_norm(x, where=np.zeros((50, 1)), stats=stats, eps=0)
    np.testing.assert_array_equal(y, x)
    assert stats.num_updates == 0


def _halves() -> dict[str, npt.NDArray[np.float64]]:
    """Columns of 20 000 numbers that sums in float32 could get wrong."""
    normal = np.random.default_rng(0).normal(size=20_000)
    outlier, step, late = normal.copy(), normal * 0.1 + 10, normal.copy()
    outlier[0] = 3e4
    step[: len(step) // 4] = 0
    late[-1] = 3e4
    return {
        "normal": normal,
        "far": 100 + 30 * normal,
        "very far": 1000 + normal,
        "an outlier that comes first": outlier,
        "an outlier that comes last": late,
        "first nothing, then far": step,
        "two values": np.where(normal > 0, 1.0, 1.0078125),
        "nearly always one value": np.where(normal > 3, 2.0, 1.0),
        "one value": np.full(normal.shape, 0.3),
        "nothing": np.zeros(normal.shape),
        "both zeros": np.where(normal > 0, 0.0, -0.0),
    }


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_has_statistics_of_float32(dtype: str, axis: int) -> None:
    """Halves are summed in float32 within a tile, from a center of its own: neither cancels nor drifts."""
    columns = _halves()
    if dtype == "bfloat16":  # whose range is float32's: squares are beyond it
        columns |= {"tiny": 1e-25 * columns["normal"], "large": 1e25 * columns["normal"]}
        columns |= {"tiny and of two values": np.copysign(1e-25, columns["normal"])}
    x = np.stack(list(columns.values()), axis).astype(DTYPES[dtype])
    m = bn.moments(x, axis=axis)
    exact = x.astype(np.longdouble)
    mean = exact.mean(axis=1 - axis, keepdims=True)
    var = ((exact - mean) ** 2).mean(axis=1 - axis)
    mean = mean.reshape(-1)
    for i, name in enumerate(columns):
        assert abs(m.mean[i] - mean[i]) <= 1e-8 * np.sqrt(var[i]) + 1e-15 * abs(mean[i]), name
        assert abs(m.var()[i] - var[i]) <= 1e-6 * var[i], name


@pytest.mark.parametrize("axis", [0, 1])
def test_halves_beyond_float32_do_not_change_their_neighbours(axis: int) -> None:
    rng = np.random.default_rng(0)
    x, dy = (rng.normal(size=(3000, 4)).astype(DTYPES["bfloat16"]) for _ in range(2))
    far, far_dy = x.copy(), dy.copy()
    far[:, 1], far_dy[:, 2], far[7, 3] = (
        x[:, 1] * DTYPES["bfloat16"].type(1e-30),
        dy[:, 2] * DTYPES["bfloat16"].type(1e30),
        np.nan,
    )
    if axis == 0:
        x, dy, far, far_dy = (np.ascontiguousarray(each.T) for each in (x, dy, far, far_dy))
    results = []
    for each, gradient in ((x, dy), (far, far_dy)):
        y, saved = bn.batch_norm_forward(each, np.ones(4), np.zeros(4), axis=axis)
        results.append((y, *bn.batch_norm_backward(gradient, saved)[:3], saved.moments.m2))
    first = np.s_[:1] if axis == 0 else np.s_[:, :1]
    for ordinary, beyond in zip(*results, strict=True):
        part = first if ordinary.ndim == 2 else np.s_[:1]
        np.testing.assert_array_equal(ordinary[part], beyond[part])
    scaled = results[1][2][2]
    np.testing.assert_allclose(scaled, float(DTYPES["bfloat16"].type(1e30)) * results[0][2][2], rtol=2e-2)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_every_half_is_read_and_written(dtype: str) -> None:
    """All 65,536 bit patterns pass through unchanged; what lies between two rounds to the nearest, ties to even."""
    x = np.arange(65536, dtype=np.uint16).view(DTYPES[dtype]).reshape(-1, 1)
    unit = bn.Moments(1, np.zeros(1), np.ones(1))
    with np.errstate(all="ignore"):  # NumPy's own conversions of NaN patterns
        y = bn.batch_norm(x, stats=unit, training=False, eps=0)
        nan = np.isnan(x.astype(np.float32))
        np.testing.assert_array_equal(y[~nan], x[~nan])
        assert np.isnan(y[nan].astype(np.float32)).all()
        wide = x[~nan].astype(np.float64)
        for scale in (1.1, 1 / 3, 1e-4, 3e4, -0.7):
            y = bn.batch_norm(x[~nan][:, None], np.array([scale]), stats=unit, training=False, eps=0)[:, 0]
            np.testing.assert_array_equal(y, (wide * scale).astype(np.float32).astype(DTYPES[dtype]))


@pytest.mark.skipif(platform.machine() != "x86_64", reason="not x86: processors without float16 are not verified")
def test_halves_where_the_processor_has_none(run_python: Callable[..., str]) -> None:
    """The same for compiled code that does without conversions of float16 in hardware."""
    code = f"""
import pytest
from bnarray.kernels.cpu import memory
assert not memory._CONVERTS_HALVES
raise SystemExit(pytest.main(["-q", {__file__!r}, "-k", "every_half", "-p", "no:cacheprovider"]))
"""
    assert "2 passed" in run_python(code, NUMBA_CPU_NAME="x86-64", NUMBA_CPU_FEATURES="+sse2")


@pytest.mark.parametrize("layout", ["c", "channels_last"])
@pytest.mark.parametrize("values", [(1.4536341, -1.4536341), (0.0, 2.2), (1e-18, 2e-15)])
def test_few_distinct_values(layout: str, values: tuple[float, float]) -> None:
    """The same rounding again and again, which float32 sums would add up."""
    rng = np.random.default_rng(0)
    x = LAYOUTS[layout](rng.choice(np.float32(values), (64, 16, 8, 8)))
    dy = rng.normal(size=x.shape).astype(np.float32)
    truth, tolerance = reference(x, dy, (1,), eps=1e-40), TOLERANCES["float32"]
    y, saved = bn.batch_norm_forward(x, eps=1e-40)
    np.testing.assert_allclose(saved.moments.var(), truth.var.ravel(), rtol=1e-12)
    assert_close(y, truth.y, truth.y_scale, tolerance, 2)
    assert_close(bn.batch_norm_backward(dy, saved).x, truth.dx, truth.dx_scale, tolerance, 8)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("shape", [(100, 12), (100, 3), (5, 3, 50)])
def test_constant_under_weights(dtype: type, shape: tuple[int, ...]) -> None:
    """Rounding never makes a sum of squares negative."""
    for value in (0.1, 1e6 + 0.1, -7.7):
        x = np.full(shape, value, dtype)
        for where in (None, np.full(shape[:1] + (1,) * (len(shape) - 1), 0.3), np.random.default_rng(0).random(shape)):
            m = bn.moments(x, where=where)
            assert (m.m2 >= 0).all()
            assert np.isfinite(bn.batch_norm(x, where=where, eps=0)).all()


@pytest.mark.parametrize("weight", [1e-280, 1e-100, 1e-38, 1e-36, 1e30, 1e300])
def test_weights_of_any_size(weight: float) -> None:
    m = bn.moments(np.array([[1.0], [3.0]]), where=np.full((2, 1), weight))
    np.testing.assert_allclose(m.mean, 2, rtol=1e-12)
    np.testing.assert_allclose(m.var(), 1, rtol=1e-12)
    m = m + m
    np.testing.assert_allclose(m.mean, 2, rtol=1e-12)
    with pytest.raises(ValueError, match="where holds weights whose sum"):
        bn.moments(np.array([[1.0], [3.0]]), where=np.full((2, 1), 1.5e308))


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("shape", [(300, 2), (300, 40), (5, 3, 4000)])
def test_what_comes_first_weighs_next_to_nothing(dtype: type, shape: tuple[int, ...]) -> None:
    """An outlier, but for its weight: deviations from it say little of the others'."""
    rng = np.random.default_rng(5)
    x, weights = rng.normal(size=shape).astype(dtype), rng.random(shape)
    x[0, :2], weights[0, :2] = 5e4, 1e-14
    m = bn.moments(x, where=weights)
    axes = (0, *range(2, x.ndim))
    exact, n = x.astype(np.longdouble), weights.sum(axes, np.longdouble)
    mean = (weights * exact).sum(axes) / n
    deviations = exact - mean.reshape(-1, *[1] * (x.ndim - 2))
    np.testing.assert_allclose(m.mean, mean.astype(float), rtol=0, atol=1e-14)
    np.testing.assert_allclose(m.m2, (weights * deviations**2).sum(axes).astype(float), rtol=1e-12)


@pytest.mark.parametrize("shape", [(6, 3, 50), (90, 12)])
@pytest.mark.parametrize("scale", [1e-300, 1e-60, 1e-30, 1e30, 1e60, 1e290])
def test_gradients_under_weights_of_any_size(shape: tuple[int, ...], scale: float) -> None:
    rng = np.random.default_rng(6)
    x, dy = rng.normal(size=(2, *shape)).astype(np.float32)
    weights = rng.random(shape)
    _, saved = bn.batch_norm_forward(x, where=weights)
    _, scaled = bn.batch_norm_forward(x, where=weights * scale)
    np.testing.assert_allclose(
        bn.batch_norm_backward(dy, scaled).x, bn.batch_norm_backward(dy, saved).x, rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_negative_zero_is_a_weight(dtype: type) -> None:
    x = np.array([[1.0], [np.nan], [3.0]])
    assert bn.moments(x, where=np.array([[1], [-0.0], [1]], dtype)).mean == 2
    for bad in (-1e-7, -np.inf, np.inf, np.nan, -np.nan):
        with pytest.raises(ValueError, match="negative, infinite or NaN"):
            bn.moments(x, where=np.array([[1], [bad], [1]], dtype))


@pytest.mark.parametrize("layout", ["c", "channels_last"])
def test_float32_far_from_zero_in_a_large_batch(layout: str) -> None:
    """The mean is the nearest float64. Half of its last place is 2 ulp of 2⁻¹² deviations: outputs closer to 0 are
    judged as those."""
    rng = np.random.default_rng(1)
    x = LAYOUTS[layout](rng.normal(1e6, 1, (32, 64, 28, 28)).astype(np.float32))
    truth, tolerance = reference(x, np.ones_like(x), (1,)), TOLERANCES["float32"]
    y, saved = bn.batch_norm_forward(x)
    exact = x.astype(np.longdouble).mean(axis=(0, 2, 3))
    assert (abs(saved.moments.mean - exact) <= 0.51 * np.spacing(1e6)).all()
    np.testing.assert_allclose(saved.moments.var(), truth.var.ravel(), rtol=1e-10)
    assert_close(y, truth.y, np.maximum(truth.y_scale, 2.0**-12), tolerance, tolerance.y)


def test_gradients_too_small_for_their_dtype_are_zero() -> None:
    """Also where NumPy is told to raise: nothing is written by a call that raises, and this one does not."""
    x = np.random.default_rng(0).normal(size=(50, 3))
    _, saved = bn.batch_norm_forward(x, np.ones(3, np.float16))
    with np.errstate(all="raise"):
        gradients = bn.batch_norm_backward(np.full(x.shape, 1e-12), saved)
    np.testing.assert_allclose(gradients.weight.astype(float), 0, atol=1e-7)


@pytest.mark.parametrize(
    ("actual", "expected", "is_close"),
    [
        *((65504.0, 65516.0, True), (np.inf, 65516.0, True), (np.inf, 65530.0, True), (65504.0, 65530.0, True)),
        *((np.inf, 65000.0, False), (65504.0, 1e6, False), (np.inf, 1e6, True), (-np.inf, 1e6, False)),
        *((-np.inf, 65530.0, False), (np.nan, 3.0, False), (np.nan, np.nan, True), (3.0, np.nan, False)),
    ],
)
def test_what_is_close_where_numbers_end(actual: float, expected: float, is_close: bool) -> None:
    """Beyond half of the last place is infinity; the reference is as far from there as the result may be."""
    values = np.array([actual], np.float16), np.array([expected]), np.array([1.0])
    if is_close:
        assert_close(*values, TOLERANCES["float16"], 4)
    else:
        with pytest.raises(AssertionError):
            assert_close(*values, TOLERANCES["float16"], 4)


@pytest.mark.parametrize("order", ["C", "F"])
def test_the_reference_adds_exactly(order: str) -> None:
    """In any order of memory: one by one, 8194 values would be wrong in the 13th digit."""
    x = np.asarray(np.random.default_rng(0).integers(-2, 3, (4097, 5, 2)).astype(np.float64), order=order)
    exact = x.astype(np.longdouble)
    mean = exact.mean(axis=(0, 2), keepdims=True)
    truth = reference(x, x, (1,))
    np.testing.assert_allclose(truth.mean, mean.astype(np.float64), rtol=1e-14)
    np.testing.assert_allclose(
        truth.var.ravel(), ((exact - mean) ** 2).mean(axis=(0, 2)).astype(np.float64), rtol=1e-15
    )
