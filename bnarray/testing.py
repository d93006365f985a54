"""For tests, here and in other people's backends: the formula in float64, and how far from it a result may be.

The reference shares no code with what it judges: plain NumPy, as close to the formula as it can be written. The author
of a backend calls `check_backend`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from bnarray.dispatch import backend
from bnarray.functional import batch_norm, batch_norm_backward, batch_norm_forward
from bnarray.functional import moments as moments_of
from bnarray.stats import Moments, RunningStats

Floats = npt.NDArray[np.float64]
Array = npt.NDArray[Any]


class Tolerance(NamedTuple):
    """How far a result may be from the reference."""

    epsilon: float  # the distance from 1 to the next number of the dtype
    tiny: float  # its smallest normal number
    largest: float  # and its largest
    y: float  # units in the last place of the largest term of y
    dx: float  # likewise of dx
    sums: float  # relative to the sum of magnitudes: gradients of weight and bias
    moments: float  # relative: mean (to the deviation and itself) and variance


#: By dtype name. Half precision is computed from exactly converted values, so its moments are as exact as float32's.
TOLERANCES = {
    "float16": Tolerance(2.0**-10, 2.0**-14, 65504.0, 4, 8, 1e-3, 1e-6),
    "bfloat16": Tolerance(2.0**-7, 2.0**-126, 2.0**128 - 2.0**120, 4, 8, 1e-2, 1e-6),
    "float32": Tolerance(2.0**-23, 2.0**-126, 2.0**128 - 2.0**104, 4, 8, 1e-6, 1e-6),
    "float64": Tolerance(2.0**-52, 2.0**-1022, np.finfo(np.float64).max, 64, 256, 1e-12, 1e-12),
}


@dataclass(frozen=True)
class Reference:
    """A forward and backward pass in float64. Per-feature arrays broadcast against x; `y_scale` and `dx_scale` are the
    magnitudes of the largest term that each element of y and dx is a sum of, or, in a float64 pass, any element of its
    feature, times the mean's size in deviations: the mean itself is a float64, and no better known than that."""

    count: Floats
    mean: Floats
    var: Floats
    y: Floats
    y_scale: Floats
    dx: Floats
    dx_scale: Floats
    dweight: Floats
    dbias: Floats
    dresidual: Floats
    dweight_scale: Floats
    dbias_scale: Floats


def reference(
    x: Array,
    dy: Array,
    kept: tuple[int, ...],
    *,
    weight: Array | None = None,
    bias: Array | None = None,
    eps: float = 1e-5,
    where: Array | None = None,
    relu: bool = False,
    residual: Array | None = None,
    statistics: tuple[Array, Array] | None = None,
) -> Reference:
    """Compute everything from the formula, in float64; `statistics` are (mean, var) for evaluation."""
    reduced = tuple(i for i in range(x.ndim) if i not in kept)
    along = tuple(size if i in kept else 1 for i, size in enumerate(x.shape))

    def total(values: Floats) -> Any:
        # Of contiguous values NumPy adds sums of halves; along other axes it adds one by one, and errors with them.
        lines = np.ascontiguousarray(values.transpose(*kept, *reduced)).reshape(prod(along), -1 if x.size else 0)
        return np.sum(lines, axis=1).reshape(along)

    def mean_of(values: Floats) -> Any:
        return total(np.where(omega > 0, omega * values, 0.0)) / some

    def scale_of(*terms: Floats) -> Floats:
        largest: Floats = np.max(np.broadcast_arrays(*terms), axis=0)
        if x.dtype != np.float64 or x.size == 0:
            return largest
        # A float64 mean is known to its own last place, next to which a small deviation is not to its.
        # (In deviations of x, without eps: with a large eps x̂ is small, and the mean is known no better.)
        distance = abs(mean) / np.sqrt(np.where(var > 0, var, 1.0))
        largest = largest.max(axis=reduced, keepdims=True) * np.maximum(1, distance)
        return np.broadcast_to(largest, x.shape)

    wide = x.astype(np.float64)
    ones = np.ones(x.shape)
    omega = ones if where is None else np.broadcast_to(np.asarray(where, np.float64), x.shape)
    gamma = np.ones(along) if weight is None else weight.astype(np.float64).reshape(along)
    beta = np.zeros(along) if bias is None else bias.astype(np.float64).reshape(along)
    added = np.zeros(x.shape) if residual is None else residual.astype(np.float64)
    count = total(omega)
    some = np.where(count > 0, count, 1.0)
    if statistics is None:
        center = mean_of(wide)
        drift = mean_of(wide - center)
        mean, deviations = center + drift, (wide - center) - drift  # the mean in two parts: next to it x̂ is small
        var = np.where(count > 0, mean_of(deviations**2), 1.0)
    else:
        mean, var = (each.astype(np.float64).reshape(along) for each in statistics)
        deviations = wide - mean
    root = np.sqrt(var + eps)
    invstd = np.where(root > 0, 1 / np.where(root > 0, root, 1.0), 0.0)
    x_hat = deviations * invstd
    z = x_hat * gamma + beta + added
    y = np.where(z < 0, 0.0, z) if relu else z
    # Two float64s hold the mean to some 2⁻¹⁰⁰ of itself: of equal values x̂ may be 0 or that, and is compared as 0.
    unknown = 2.0**-80 * abs(mean * gamma) * invstd
    y_scale = scale_of(abs(x_hat * gamma), abs(beta) * ones, abs(added), unknown)

    gradient = dy.astype(np.float64)
    dz = np.where(z <= 0, 0.0, gradient) if relu else gradient
    products = np.where(dz == 0, 0.0, dz * x_hat)
    dbias, dweight = total(dz), total(products)
    share = np.zeros(x.shape) if statistics is not None else omega / some
    common = np.where(share > 0, share * dbias, 0.0)
    slope = np.where(share > 0, share * x_hat * dweight, 0.0)
    factor = gamma * invstd
    return Reference(
        count,
        mean,
        var,
        y,
        y_scale,
        factor * (dz - common - slope),
        abs(factor) * scale_of(abs(dz), abs(common), abs(slope)),
        dweight.reshape([x.shape[i] for i in kept]),
        dbias.reshape([x.shape[i] for i in kept]),
        dz,
        total(abs(products)).reshape([x.shape[i] for i in kept]),
        total(abs(dz)).reshape([x.shape[i] for i in kept]),
    )


def ulps(actual: Array, expected: Floats, scale: Floats, tolerance: Tolerance) -> Floats:
    """Return the distance in units in the last place of numbers as large as scale (or as the expected one)."""
    magnitude = np.maximum(np.maximum(scale, abs(expected)), tolerance.tiny)
    unit = tolerance.epsilon * 2.0 ** np.floor(np.log2(magnitude))
    return abs(actual.astype(np.float64) - expected) / unit


def assert_close(actual: Array, expected: Floats, scale: Floats, tolerance: Tolerance, most: float) -> None:
    """Assert that finite numbers are within `most` ulps, and that the others (and those too large) agree."""
    with np.errstate(over="ignore"):
        unit = np.float64(tolerance.epsilon * 2.0 ** np.floor(np.log2(tolerance.largest)))
        end, last = (
            tolerance.largest + unit,
            tolerance.largest + most * unit,
        )  # infinity is the number after the largest
    expected = np.where(abs(expected) > last, np.copysign(np.inf, expected), expected)
    finite = np.isfinite(expected)
    actual = actual.astype(np.float64)
    np.testing.assert_array_equal(actual[~finite], expected[~finite])
    actual = np.where(finite, np.clip(actual, -end, end), actual)
    if finite.any():
        worst = ulps(actual, np.where(finite, expected, 0.0), np.where(finite, scale, 1.0), tolerance)[finite].max()
        assert worst <= most, f"{worst:.3g} ulp, more than {most}"


Gradients = dict[str, Any]


def check_case(
    make: Callable[[Array], Any],
    back: Callable[[Any], Array],
    x: Array,
    dy: Array,
    kept: tuple[int, ...],
    *,
    relu: bool = False,
    statistics: tuple[Array, Array] | None = None,
    gradients: Callable[[Callable[..., Any], dict[str, Array], Array], Gradients] | None = None,
    constant: Callable[[Array], Any] | None = None,
    eps: float = 1e-5,
    **given: Array,
) -> None:
    """Assert that all public functions do for a library's arrays what the reference says.

    Parameters
    ----------
    make, back
        From a NumPy array to one of the library, and back.
    x, dy, kept, relu, statistics, eps, given
        The case, as `reference` takes it.
    gradients
        How the library itself finds gradients, where `batch_norm_backward` does not: called with a function of named
        arrays, the arrays (of NumPy) and dy, it returns the gradients by name.
    constant
        Makes what has no gradient, if not `make`.
    """
    tolerance = TOLERANCES[x.dtype.name]
    truth = reference(x, dy, kept, relu=relu, statistics=statistics, eps=eps, **given)
    features = tuple(x.shape[i] for i in kept)
    arrays = {"x": x, **{name: array for name, array in given.items() if name != "where"}}
    fixed: dict[str, Any] = {"axis": kept, "eps": eps, "activation": "relu" if relu else None}
    where = (constant or make)(given["where"]) if "where" in given else None
    stats = RunningStats(features, update_rate=None, correction=0, like=make(x))
    if statistics is not None:
        fixed |= {"training": False, "stats": Moments(1, *map(make, statistics))}

    theirs = {name: make(array) for name, array in arrays.items()}
    y, saved = batch_norm_forward(**theirs, **({"stats": stats} | fixed), where=where)
    assert type(y) is type(theirs["x"])
    assert y.dtype == theirs["x"].dtype
    assert_close(back(y), truth.y, truth.y_scale, tolerance, tolerance.y)
    np.testing.assert_array_equal(back(batch_norm(**theirs, **fixed, where=where)), back(y))

    if gradients is None:
        found: Any = batch_norm_backward(make(dy), saved)
        slopes = {name: array for name, array in found._asdict().items() if array is not None}
    else:
        slopes = gradients(lambda **arrays: batch_norm(**arrays, **fixed, where=where), arrays, dy)
    assert set(slopes) == set(arrays)
    assert slopes["x"].dtype == theirs["x"].dtype
    assert_close(back(slopes["x"]), truth.dx, truth.dx_scale, tolerance, tolerance.dx)
    for name, exact, scale in (
        ("weight", truth.dweight, truth.dweight_scale),
        ("bias", truth.dbias, truth.dbias_scale),
    ):
        if name in slopes:
            assert slopes[name].dtype == theirs[name].dtype
            rounding = np.finfo(given[name].dtype).eps * abs(exact)
            assert (abs(back(slopes[name]) - exact) <= 1e-12 + tolerance.sums * scale + rounding).all(), name
    if "residual" in slopes:
        np.testing.assert_array_equal(back(slopes["residual"]).astype(np.float64), truth.dresidual)

    if statistics is None:
        m = moments_of(theirs["x"], axis=kept, where=where)
        mean, var, count = (each.reshape(features) for each in (truth.mean, truth.var, truth.count))
        room = tolerance.moments * (np.sqrt(var) + abs(mean))
        plain = backend(stats.mean).to_numpy
        for got in (back(m.mean), plain(stats.mean)):
            assert (abs(got - np.where(count > 0, mean, 0)) <= room).all()
        np.testing.assert_allclose(back(m.m2), np.where(count > 0, var * count, 0), rtol=10 * tolerance.moments)
        np.testing.assert_allclose(plain(stats.var), np.where(count > 0, var, 1), rtol=10 * tolerance.moments)


#: Shapes and kept axes of `check_backend`, and what its calls are given besides x.
_SHAPES = [
    ((7, 5), (1,)),
    ((1, 9), (1,)),
    ((4, 3, 6), (0, 2)),
    ((4, 3, 6), ()),
    ((2, 3, 4, 5), (1,)),
    ((600, 12), (1,)),
]
_OPTIONS = [
    (),
    ("weight", "bias"),
    ("weight", "bias", "relu"),
    ("weight", "bias", "residual", "relu"),
    ("residual",),
    ("weight", "where"),
    ("mask", "residual", "relu"),
    ("weight", "bias", "statistics"),
]


def check_backend(
    make: Callable[[Array], Any], back: Callable[[Any], Array] = np.asarray, dtypes: tuple[str, ...] | None = None
) -> None:
    """Assert that bnarray serves a library's arrays right: every function and option, on several shapes.

    Parameters
    ----------
    make, back
        From a NumPy array to one of the library, and back.
    dtypes
        By name; those that the backend declares (``CAPABILITIES``) by default.

    Raises
    ------
    AssertionError
        With a note of the case.
    """
    for dtype in dtypes or backend(make(np.zeros((1, 1), np.float32))).capabilities.dtypes:
        for shape, kept in _SHAPES:
            for options in _OPTIONS:
                try:
                    _check(make, back, shape, kept, dtype, options)
                except Exception as error:
                    error.add_note(f"shape {shape}, axis {kept}, {dtype}, with {', '.join(options) or 'x alone'}")
                    raise


def _check(
    make: Callable[[Array], Any],
    back: Callable[[Any], Array],
    shape: tuple[int, ...],
    kept: tuple[int, ...],
    dtype: str,
    options: tuple[str, ...],
) -> None:
    rng = np.random.default_rng(len(options))
    features = tuple(shape[i] for i in kept)
    x, dy, residual = rng.normal(2, 3, (3, *shape)).astype(dtype)
    drawn = {
        "weight": rng.normal(size=features).astype(np.float32),
        "bias": rng.normal(size=features).astype(np.float32),
        "residual": residual,
    }
    given = {name: drawn[name] for name in options if name in drawn}
    if "where" in options:
        given["where"] = rng.choice([0, 0.5, 2], (*shape[:1], *(1,) * (len(shape) - 1))).astype(np.float32)
    if "mask" in options:
        given["where"] = rng.random(shape) < 0.7
    statistics = (rng.normal(size=features), rng.uniform(0.5, 2, features)) if "statistics" in options else None
    check_case(make, back, x, dy, kept, relu="relu" in options, statistics=statistics, **given)
