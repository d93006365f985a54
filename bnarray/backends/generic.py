"""The verbs in pure Array API, for any library: the fallback, and the truth that tests compare with.

Per-feature arrays (mean, m2, sums) are of the features' shape, in float64 (float32 on a device that has no float64); a
count is a number, or an array of that shape under a mask that differs between features. `kept` are the feature axes,
ascending.
"""

from collections.abc import Callable
from functools import lru_cache
from math import nan, prod
from types import SimpleNamespace
from typing import Any

import array_api_compat
import numpy as np
from array_api_compat import device, is_writeable_array, size
from array_api_compat import is_array_api_obj as is_array  # noqa: F401  # for dispatch

from bnarray import steps
from bnarray.dispatch import VERBS, Array, Capabilities, Transform, backend
from bnarray.kernels.merge import merge as _merge
from bnarray.layout import along_features, broadcasts, features_shape, varies_along
from bnarray.stats import RunningStats

Count = Any  # a number or an array

CAPABILITIES = Capabilities(devices=True)

# NaN and infinity are values here, in the libraries that are NumPy underneath too. What it decorates calls nothing that
# it decorates: `plain` takes it off.
_quiet = np.errstate(all="ignore")


#: By type: a look takes a tenth of the time of the search, and torch can compile it.
namespaces: dict[type, Any] = {}

#: By type, where torch is to compile it: what returns the widest dtype of an array's device.
widest: dict[type, Callable[[Array], Any]] = {}


def array_namespace(x: Array) -> Any:
    """Return the functions of the Array API for x's library."""
    xp = namespaces.get(type(x))
    if xp is None:
        xp = namespaces[type(x)] = array_api_compat.array_namespace(x)
    return xp


@lru_cache(maxsize=64)
def widest_on(xp: Any, device: Any) -> Any:
    """Return the widest real dtype of a device."""
    if not hasattr(xp, "__array_namespace_info__"):
        return xp.float64
    dtypes = xp.__array_namespace_info__().dtypes(device=device, kind="real floating")
    return dtypes.get("float64", xp.float32)


def _widest(x: Array) -> Any:
    """The dtype in which x's device computes most exactly."""
    find = widest.get(type(x))
    return widest_on(array_namespace(x), device(x)) if find is None else find(x)


def _wide(x: Array) -> Array:
    return array_namespace(x).astype(x, _widest(x), copy=False)


def _features_last(x: Array, kept: tuple[int, ...]) -> Array:
    """x as (elements, features)."""
    xp = array_namespace(x)
    reduced = tuple(i for i in range(x.ndim) if i not in kept)
    features = prod([x.shape[i] for i in kept])  # a list, which torch can compile
    return xp.reshape(xp.permute_dims(x, (*reduced, *kept)), (size(x) // features, features))


def along(x: Array, kept: tuple[int, ...], of_features: Array) -> Array:
    """Return a per-feature array, shaped to broadcast against x."""
    return array_namespace(x).reshape(of_features, along_features(x.shape, kept))


def _weights(x: Array, where: Array) -> Array:
    xp = array_namespace(x)
    return xp.broadcast_to(_wide(where), x.shape)


# -- Arrays ------------------------------------------------------------------------------------------------------------


def check(x: Array, name: str) -> Array:
    """Return x, as the verbs take it, if it is a real floating array.

    Raises
    ------
    TypeError
        If its dtype is of another kind.
    """
    if not array_namespace(x).isdtype(x.dtype, "real floating"):
        raise TypeError(f"{name} has dtype {x.dtype}; it should be real floating: convert it by astype")
    return x


def check_where(x: Array, where: Array) -> Array:
    """Return where if it is a mask, or weights that are numbers and not negative, and broadcasts to x.

    Raises
    ------
    TypeError
        If its dtype is neither boolean nor real floating.
    ValueError
        If its shape does not broadcast to x's, or a weight is negative, infinite or NaN.
    """
    xp = array_namespace(x)
    if not broadcasts(where.shape, x.shape):
        raise ValueError(f"where has shape {tuple(where.shape)}; it should broadcast to x's, {tuple(x.shape)}")
    if xp.isdtype(where.dtype, "bool"):
        return where
    if not xp.isdtype(where.dtype, "real floating"):
        raise TypeError(f"where has dtype {where.dtype}; it should be boolean (a mask) or real floating (weights)")
    if not bool(xp.all((where >= 0) & xp.isfinite(where))):
        raise ValueError("where holds a weight that is negative, infinite or NaN; weights should be >= 0")
    return where


def check_out(out: Array, x: Array, allowed: dict[str, Array], forbidden: dict[str, Array]) -> None:
    """Raise unless a result like x can be written into out.

    It may be one of `allowed` itself; any other overlap is refused (a library without addresses tells by identity).

    Raises
    ------
    TypeError
        If its dtype is not x's, or it cannot be written to.
    ValueError
        If its shape is not x's, or it overlaps an input.
    """
    if not is_writeable_array(out):
        raise TypeError("out is read-only; it should be an array that can be written to")
    if out.dtype != x.dtype:
        raise TypeError(f"out has dtype {out.dtype}; it should have x's, {x.dtype}")
    if tuple(out.shape) != tuple(x.shape):
        raise ValueError(f"out has shape {tuple(out.shape)}; it should have x's, {tuple(x.shape)}")
    for name, array in forbidden.items():
        if out is array:
            raise ValueError(f"out is {name}, which is still needed; give it memory of its own")


def overlap(a: Array, b: Array) -> bool:
    """Whether writing to a may change b; a library without addresses can only tell by identity."""
    return a is b


def empty_like(x: Array) -> Array:
    """Return an uninitialised array of x's shape, dtype, device and, where the library has one, memory layout."""
    return array_namespace(x).empty_like(x)


def zeros(shape: tuple[int, ...], like: Array) -> Array:
    """Return zeros of float64 (float32 where there is none) on like's device."""
    return array_namespace(like).zeros(shape, dtype=_widest(like), device=device(like))


def copy(x: Array) -> Array:
    """Return x in memory of its own."""
    return array_namespace(x).asarray(x, copy=True)


def guide(*arrays: Array) -> Any:
    """Return what the order of sums depends on besides values, so that sums over copies have the same bits."""
    return None


def widen(x: Array) -> Array:
    """Return a copy of a per-feature array, in float64 (float32 where there is none)."""
    return array_namespace(x).astype(x, _widest(x), copy=True)


def cast(x: Array, dtype: Any) -> Array:
    """Return x in dtype."""
    return array_namespace(x).astype(x, dtype, copy=False)


def parameter_dtype(like: Array) -> Any:
    """Return the dtype in which parameters like an array are kept: its own, but float32 at least."""
    xp = array_namespace(like)
    return xp.float64 if like.dtype == xp.float64 else xp.float32


def freeze(x: Array) -> Array:
    """Make x immutable, where the library can; return it."""
    return x


def cleared(x: Array) -> Array:
    """Return x with zeros in it; a new array where the library has immutable ones."""
    x[...] = 0
    return x


def to_numpy(x: Array) -> Any:
    """Return a copy of x as a NumPy array."""
    return np.array(np.from_dlpack(x) if hasattr(x, "__dlpack__") else np.asarray(x), copy=True)


def convert(x: Array, like: Array) -> Array:
    """Return a per-feature array of any library as one of like's, on its device, in the widest dtype there."""
    xp, widest = array_namespace(like), _widest(like)
    if type(x) is not type(like):
        return xp.asarray(backend(x).to_numpy(x), dtype=widest, device=device(like))
    movable = xp.astype(x, widest, copy=False) if x.dtype == xp.float64 else x  # the other device may have no float64
    return xp.astype(xp.asarray(movable, device=device(like)), widest, copy=False)


def vector(of_features: Array, x: Array, copy: bool = False) -> Array:
    """Return a per-feature array of any library in the form in which these verbs take it beside x.

    That is an array like x here, and for a library on strided memory one of NumPy. With `copy` it is nobody else's.
    """
    array = convert(of_features, x)
    return widen(array) if copy else array


def of_vector(of_features: Array, x: Array, dtype: Any = None) -> Array:
    """Return a vector as an array of x's library, on its device, in a dtype if one is given."""
    return of_features if dtype is None else cast(of_features, dtype)


# -- Calls like one before ---------------------------------------------------------------------------------------------


def signature(x: Array, *of_features: Array | None) -> tuple[Any, ...] | None:
    """Return what of the arrays checks and plans follow from; None if they are to be made every time."""
    return None


def signature_of_gradient(dy: Array, x: Array) -> tuple[Any, ...] | None:
    """Return what of a gradient of x's shape they follow from; None if it is to be looked at."""
    return None


def again(call: Any) -> Any:
    """Return what makes calls with the signature of one that was made, or None.

    It has the methods ``forward(x, weight, bias, stats, out)`` -> (y, vectors), ``transform(vectors)`` -> `Transform`
    and ``backward(dy, signature_of_gradient, x, vectors, out)`` -> (dx, dweight, dbias). None from them means that
    nothing was done, but for what out then holds. Before an out is passed, ``writes(out, stats, ...)`` is asked whether
    it is memory as these calls have it, apart from that of other arrays, and whether no numbers in x can make the call
    raise.
    """
    return None


# -- Arrays that a library follows, to differentiate or compile what is done to them -----------------------------------


def is_traced(*arrays: Array | None) -> bool:
    """Whether the library follows what is done to one of the arrays."""
    return False


def joins(*arrays: Array | None) -> bool:
    """Whether a call with a group, which takes its time and tells values, goes by `traced_forward`.

    That has an `Exchange` as one argument more then, and `traced_backward` too.

    Raises
    ------
    NotImplementedError
        If the library follows what is done to one of the arrays, and could not follow it to other processes.
    """
    verbs = backend(arrays[0])
    if verbs.is_traced(*arrays):
        raise NotImplementedError(
            f"group is for calls that {verbs.library} does not compile, differentiate or put off; pass arrays of NumPy "
            f"and differentiate by batch_norm_backward, or leave out group"
        )
    return False


def is_symbolic(*arrays: Count) -> bool:
    """Whether one of the arrays (or numbers) has no values yet: a program is being made of what is done to it."""
    return False


def traced_statistic(of_features: Array, x: Array) -> Array:
    """Return a per-feature array of any library, by which x is to be normalised, as `traced_forward` takes it."""
    return backend(x).convert(of_features, x)


def traced_forward(*arguments: Any) -> tuple[Array, Transform]:
    """Do what `steps.forward` does with the same arguments, in a form that the library can follow."""
    raise NotImplementedError("arrays of this library are never traced")


def traced_backward(
    dy: Array, x: Array, transform: Transform, where: Array | None, is_constant: bool
) -> tuple[Array, Array, Array, Array | None]:
    """Do what `steps.backward` does with the same arguments, in a form that the library can follow."""
    return steps.backward(backend(x), dy, x, transform, where, is_constant)


def traced_moments(x: Array, kept: tuple[int, ...], where: Array | None) -> tuple[Count, Array, Array]:
    """Do what `moments` does, in a form that the library can follow; return arrays of the library."""
    raise NotImplementedError("arrays of this library are never traced")


# -- Forward -----------------------------------------------------------------------------------------------------------


def _not_below_zero(m2: Array) -> Array:
    """What rounding takes below zero; NaN stays."""
    xp = array_namespace(m2)
    return xp.where(m2 < 0, xp.zeros_like(m2), m2)


@_quiet
def moments(x: Array, kept: tuple[int, ...], where: Array | None) -> tuple[Count, Array, Array]:
    """Return (count, mean, m2) of each feature; elements of weight 0 are not looked at."""
    xp = array_namespace(x)
    shape = features_shape(x.shape, kept)
    values = _features_last(_wide(x), kept)
    if where is None:
        count: Count = values.shape[0]
        center = xp.mean(values, axis=0)
        deviations = values - center
        drift = xp.mean(deviations, axis=0)
        m2 = xp.sum(deviations * deviations, axis=0) - count * drift * drift
        return count, xp.reshape(center + drift, shape), xp.reshape(_not_below_zero(m2), shape)
    weights = _features_last(_weights(x, where), kept)
    zero = xp.zeros_like(values)
    count = xp.sum(weights, axis=0)
    divisor = xp.where(count == 0, xp.ones_like(count), count)
    center = xp.sum(weights * xp.where(weights != 0, values, zero), axis=0) / divisor
    deviations = xp.where(weights != 0, values - center, zero)
    drift = xp.sum(weights * deviations, axis=0) / divisor
    m2 = xp.sum(weights * deviations * deviations, axis=0) - count * drift * drift
    count = xp.reshape(count, shape) if varies_along(where.shape, x.ndim, kept) else backend(x).number(count[0])
    return count, xp.reshape(center + drift, shape), xp.reshape(_not_below_zero(m2), shape)


@_quiet
def variance(count: Count, m2: Array, correction: float, otherwise: float = nan) -> Array:
    """Return m2 / (count − correction), or `otherwise` where the count does not exceed the correction."""
    xp = array_namespace(m2)
    divisor = count - correction + xp.zeros_like(m2)
    return xp.where(divisor > 0, m2 / divisor, xp.full_like(m2, otherwise))


@_quiet
def sum_of_squares(count: Count, var: Array, correction: float) -> Array:
    """Return the m2 of which `variance` made var; 0 where it did not use it."""
    xp = array_namespace(var)
    divisor = count - correction + xp.zeros_like(var)
    return xp.where(divisor > 0, var * divisor, xp.zeros_like(var))


def only_above(count: Count, var: Array, correction: float) -> Array:
    """Return var where the count exceeds the correction, else 1."""
    xp = array_namespace(var)
    return xp.where(count - correction + xp.zeros_like(var) > 0, var, xp.ones_like(var))


def _inverse_deviation(count: Count, m2: Array, eps: float) -> Array:
    """Return 1 / √(m2 / count + eps), 0 where the root is 0; the variance of nothing counts as 1."""
    xp = array_namespace(m2)
    count = count + xp.zeros_like(m2)
    var = xp.where(count == 0, xp.ones_like(m2), m2 / count)
    root = xp.sqrt(var + eps)
    return xp.where(root == 0, xp.zeros_like(root), 1 / root)


invstd = _quiet(_inverse_deviation)


def _invstd(transform: Transform) -> Array:
    return _inverse_deviation(transform.count, transform.m2, transform.eps)


def _scale(transform: Transform) -> Array:
    return _invstd(transform) if transform.weight is None else _invstd(transform) * transform.weight


def _pre_activation(x: Array, transform: Transform) -> Array:
    kept, residual = transform.kept, transform.residual
    z = (_wide(x) - along(x, kept, transform.mean)) * along(x, kept, _scale(transform))
    if transform.bias is not None:
        z = z + along(x, kept, transform.bias)
    return z if residual is None else z + _wide(residual)


@_quiet
def normalize(x: Array, transform: Transform, out: Array | None) -> Array:
    """Return the transform of x, in out if it is given."""
    xp = array_namespace(x)
    z = _pre_activation(x, transform)
    if transform.relu:
        z = xp.where(z <= 0, xp.zeros_like(z), z)  # not below 0 alone: at 0 its derivative is that of a gate
    y = xp.astype(z, x.dtype)
    if out is None:
        return y
    out[...] = y
    return out


def forward(
    x: Array, kept: tuple[int, ...], eps: float, weight: Any, bias: Any, relu: bool, out: Array | None
) -> tuple[Count, Array, Array, Array] | None:
    """Return (count, mean, m2, y) of a training step, or None if one go is no faster. No part of x is in out."""
    return None


# -- Backward ----------------------------------------------------------------------------------------------------------


def _gated(dy: Array, x: Array, transform: Transform) -> Array:
    """What of dy passes ReLU."""
    xp = array_namespace(x)
    dz = _wide(dy)
    return xp.where(_pre_activation(x, transform) <= 0, xp.zeros_like(dz), dz) if transform.relu else dz


@_quiet
def grad_sums(dy: Array, x: Array, transform: Transform) -> tuple[Array, Array]:
    """Return Σ dz and Σ dz · x̂ of each feature: the gradients of bias and weight. Where dz is 0, x does not matter."""
    xp, kept = array_namespace(x), transform.kept
    dz = _gated(dy, x, transform)
    deviation = _wide(x) - along(x, kept, transform.mean)
    product = xp.where(dz == 0, xp.zeros_like(dz), dz * deviation)
    shape = features_shape(x.shape, kept)
    sum_dz = xp.reshape(xp.sum(_features_last(dz, kept), axis=0), shape)
    return sum_dz, xp.reshape(xp.sum(_features_last(product, kept), axis=0), shape) * _invstd(transform)


@_quiet
def grad_input(
    dy: Array,
    x: Array,
    transform: Transform,
    where: Array | None,
    sums: tuple[Array, Array] | None,
    out: Array | None,
) -> tuple[Array, Array | None]:
    """Return the gradient of x (in out if it is given) and, with a residual under ReLU, dz: the residual's.

    `sums` (those of `grad_sums`) are None where the statistics were constants.
    """
    xp, kept = array_namespace(x), transform.kept
    dz = _gated(dy, x, transform)
    dx = dz
    if sums is not None:
        total = transform.count + xp.zeros_like(transform.mean)
        total = xp.where(total == 0, xp.ones_like(total), total)
        x_hat = (_wide(x) - along(x, kept, transform.mean)) * along(x, kept, _invstd(transform))
        weights = xp.ones_like(dz) if where is None else _weights(x, where)
        common = along(x, kept, sums[0] / total) + x_hat * along(x, kept, sums[1] / total)
        dx = dz - xp.where(weights == 0, xp.zeros_like(dz), weights * common)
    dx = xp.astype(dx * along(x, kept, _scale(transform)), x.dtype)
    dresidual = None if transform.residual is None else xp.astype(dz, x.dtype)
    if out is None:
        return dx, dresidual
    out[...] = dx
    return out, dresidual


def backward(
    dy: Array, x: Array, transform: Transform, where: Array | None, is_constant: bool, out: Array | None
) -> tuple[Array, Array, Array, Array | None] | None:
    """Return (dx, dweight, dbias, dz or None) in one go, or None if `grad_sums` and `grad_input` are no slower."""
    return None


# -- Statistics --------------------------------------------------------------------------------------------------------

merge = _quiet(_merge)


def is_finite(array: Array, other: Array | None = None) -> bool:
    """Whether every number of an array, or of both, is finite; True where the values are not known yet."""
    xp = array_namespace(array)
    return bool(xp.all(xp.isfinite(array))) and (other is None or is_finite(other))


def number(array: Array) -> Any:
    """Return the number in an array without axes; the array where the value is not known yet."""
    return float(array)


def lowest(array: Count) -> float:
    """Return the smallest number of an array (or the number) that is neither 0 nor NaN; 0 if there is none; what is
    below nothing (∞, or NaN) where the values are not known yet."""
    if isinstance(array, int | float):
        return array
    xp = array_namespace(array)
    counts = (array != 0) & (array == array)
    if not bool(xp.any(counts)):
        return 0.0
    return float(xp.min(xp.where(counts, array, xp.full_like(array, float("inf")))))


def refusal(
    count: Count, mean: Array, m2: Array, correction: float | None, takes_nonfinite: bool
) -> tuple[Array, Array]:
    """Return whether nothing was counted, and whether an update refuses the batch, as arrays without axes.

    It refuses a count that does not exceed the correction (None if any will do), and numbers that are not finite.
    """
    xp = array_namespace(mean)
    count = count + xp.zeros_like(m2)
    nothing = ~xp.any(count > 0)
    refused = xp.zeros_like(nothing)
    if correction is not None:
        refused = refused | xp.any((count > 0) & (count <= correction))
    if not takes_nonfinite:
        refused = refused | ~xp.all(xp.isfinite(mean) & xp.isfinite(m2))
    return nothing, refused & ~nothing


def choose(condition: Array, yes: Any, no: Any) -> Array:
    """Return one of two arrays or numbers, by an array without axes."""
    return array_namespace(condition).where(condition, yes, no)


def stats_type(like: Array) -> type[RunningStats]:
    """Return the kind of `RunningStats` that lives on an array's library and device."""
    return RunningStats


def prepare(stats: Any, count: Count, mean: Array, m2: Array) -> Any:
    """Decide what an update of a `RunningStats` with a batch does, and return the function that does it."""
    return stats.prepare(count, mean, m2)


def current(stats: Any, x: Array) -> tuple[Array, Array]:
    """Return mean and variance of a `RunningStats`, for a call on x."""
    return stats.mean_and_var()  # type: ignore[no-any-return]  # stats stand above


@_quiet
def update_stats(
    mean: Array, var: Array, batch: tuple[Count, Array, Array], rate: float, correction: float
) -> tuple[Array, Array]:
    """Return the exponential running (mean, var) after a batch of (count, mean, m2), frozen.

    ``running += rate · (batch − running)``, written so that a rate of 1 gives the batch's own; a feature of which
    nothing was counted keeps its values.
    """
    xp = array_namespace(mean)
    count, batch_mean, batch_m2 = batch
    seen = count + xp.zeros_like(mean) > 0
    batch_var = variance(count, batch_m2, correction)
    return (
        xp.where(seen, (1 - rate) * mean + rate * batch_mean, mean),
        xp.where(seen, (1 - rate) * var + rate * batch_var, var),
    )


#: The same verbs without a word about NumPy's warnings: pure functions of the library's own, which it can compile.
plain = SimpleNamespace(**{verb: getattr(globals()[verb], "__wrapped__", globals()[verb]) for verb in VERBS})
