"""Arrays that HIPS autograd follows: its boxes round NumPy arrays, beside plain NumPy arrays in the same call.

The CPU kernels do the work. What autograd records is one operation for y, whose backward pass yields all gradients at
once, and one each for mean and m2. Where a gradient is itself followed (for second derivatives), it is computed by the
formula in autograd.numpy.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import autograd.numpy as anp
import numpy as np
from autograd.core import defvjp_argnums
from autograd.extend import primitive
from autograd.numpy.numpy_boxes import ArrayBox
from autograd.tracer import getval

from bnarray import steps
from bnarray.dispatch import Array, Capabilities, Transform, default_backend
from bnarray.layout import along_features

Count = Any  # a number or an array
Operation = TypeVar("Operation", bound=Callable[..., Any])

CAPABILITIES = Capabilities(
    dtypes=("float16", "float32", "float64"),
    runs="NumPy's compiled kernels",
    layouts=True,
    out=False,
    gradients="autograd.grad, to any order",
)

#: Boxes and plain NumPy arrays go together in a call.
WRAPS = "numpy"


def _is_box(array: Array | None) -> bool:
    return isinstance(array, ArrayBox)


def _values(*arrays: Array | None) -> list[Any]:
    """The NumPy arrays in however many boxes."""
    return [None if array is None else np.asarray(getval(array)) for array in arrays]


# -- Arrays ------------------------------------------------------------------------------------------------------------


def check(x: Array, name: str) -> Array:
    checked = default_backend().check(getval(x), name)
    return x if _is_box(x) else checked


def check_where(x: Array, where: Array) -> Array:
    if _is_box(where):
        raise TypeError(
            "where is followed by autograd, but has no gradient; pass a plain array: autograd.tracer.getval(where)"
        )
    return default_backend().check_where(getval(x), where)


def check_out(out: Array, x: Array, allowed: dict[str, Array], forbidden: dict[str, Array]) -> None:
    if _is_box(out):
        raise TypeError("out is followed by autograd, which cannot follow writing; it should be None")
    raise TypeError("out is given, but autograd follows an argument of this call, and cannot follow writing; omit it")


def cast(x: Array, dtype: Any) -> Array:
    return x.astype(dtype) if _is_box(x) else default_backend().cast(x, dtype)


def widen(x: Array) -> Array:
    return x.astype(np.float64) if _is_box(x) else default_backend().widen(x)


def copy(x: Array) -> Array:
    return anp.array(x)


def freeze(x: Array) -> Array:
    return x if _is_box(x) else default_backend().freeze(x)


def convert(x: Array, like: Array) -> Array:
    return x if _is_box(x) else default_backend().convert(x, getval(like))


traced_statistic = convert


def along(x: Array, kept: tuple[int, ...], of_features: Array) -> Array:
    return anp.reshape(of_features, along_features(x.shape, kept))


def _on_values(verb: str) -> Callable[..., Any]:
    """NumPy's verb, for what has no gradient."""

    def on_values(*arguments: Any) -> Any:
        return getattr(default_backend(), verb)(*map(getval, arguments))

    return on_values


zeros = _on_values("zeros")
empty_like = _on_values("empty_like")
parameter_dtype = _on_values("parameter_dtype")
to_numpy = _on_values("to_numpy")
is_finite = _on_values("is_finite")
lowest = _on_values("lowest")
update_stats = _on_values("update_stats")

# -- Numbers of features -----------------------------------------------------------------------------------------------


def variance(count: Count, m2: Array, correction: float, otherwise: float = np.nan) -> Array:
    divisor = count - correction + np.zeros(m2.shape)
    return anp.where(divisor > 0, m2 / np.where(divisor > 0, divisor, 1.0), otherwise)


def sum_of_squares(count: Count, var: Array, correction: float) -> Array:
    return var * np.maximum(count - correction, 0.0)


def only_above(count: Count, var: Array, correction: float) -> Array:
    return anp.where(count - correction + np.zeros(var.shape) > 0, var, 1.0)


def invstd(count: Count, m2: Array, eps: float) -> Array:
    count = count + np.zeros(m2.shape)
    var = anp.where(count == 0, 1.0, m2 / np.where(count == 0, 1.0, count))
    zero = getval(var) + eps == 0
    return anp.where(zero, 0.0, 1 / anp.sqrt(anp.where(zero, 1.0, var + eps)))


# -- The operations that autograd records ------------------------------------------------------------------------------


def is_traced(*arrays: Array | None) -> bool:
    return any(map(_is_box, arrays))


def traced_forward(
    x: Array,
    weight: Array | None,
    bias: Array | None,
    residual: Array | None,
    where: Array | None,
    given: steps.Statistics | None,
    kept: tuple[int, ...],
    eps: float,
    relu: bool,
) -> tuple[Array, Transform]:
    plain = default_backend()
    count, mean, m2 = given or (None, None, None)
    if _is_box(count):
        raise TypeError("stats has a count that autograd follows, but a count has no gradient; make it a plain array")
    values, *vectors, added = _values(x, weight, bias, mean, m2, residual)
    of_weight, of_bias, of_mean, of_m2 = (
        None if vector is None else plain.vector(vector, values, copy=True) for vector in vectors
    )
    statistics = None if given is None else (count, of_mean, of_m2)
    y, transform = steps.forward(plain, values, of_weight, of_bias, added, where, statistics, kept, eps, relu)
    # What is recorded is constants; the boxes in what is returned keep later steps from taking it for constants too.
    boxed = transform._replace(weight=weight, bias=bias, residual=None)
    if given is not None:
        boxed = boxed._replace(mean=mean, m2=m2)
    recorded = transform._replace(residual=None)
    return batch_norm(x, weight, bias, residual, mean, m2, y, where, recorded), boxed


def traced_moments(x: Array, kept: tuple[int, ...], where: Array | None) -> tuple[Count, Array, Array]:
    (values,) = _values(x)
    found = steps.moments(default_backend(), values, kept, where)
    return found[0], mean(x, where, kept, found), m2(x, where, kept, found)


def _weights(x: Array, where: Array | None) -> Array:
    return np.broadcast_to(np.asarray(1.0 if where is None else where, np.float64), x.shape)


def _some(count: Count) -> Count:
    return np.where(np.equal(count, 0), 1.0, count)


def _recorded(maker: Callable[..., Any]) -> Callable[[Operation], Operation]:
    """Make a function on arrays an operation of autograd, with the maker of its backward pass."""

    def decorate(function: Operation) -> Operation:
        operation: Operation = primitive(function)
        defvjp_argnums(operation, maker)
        return operation

    return decorate


def _gradient_of_x(slope: Callable[..., Array]) -> Callable[..., Any]:
    """The maker of the backward pass of a vector, by the vector's slope along x for an element of weight 1."""

    def maker(argnums: tuple[int, ...], ans: Array, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
        x, where, kept, found = arguments

        def gradients(g: Array) -> tuple[Array, ...]:
            per_element = along(x, kept, g) * slope(x, where, kept, found)
            weights = _weights(x, where)
            return (cast(anp.where(weights == 0, 0.0, weights * per_element), x.dtype),)

        return gradients

    return maker


@_recorded(_gradient_of_x(lambda x, where, kept, found: 1 / along(x, kept, _some(found[0]) + np.zeros(found[1].shape))))
def mean(x: Array, where: Array | None, kept: tuple[int, ...], found: steps.Statistics) -> Array:
    return found[1]


@_recorded(_gradient_of_x(lambda x, where, kept, found: 2 * (widen(x) - along(x, kept, mean(x, where, kept, found)))))
def m2(x: Array, where: Array | None, kept: tuple[int, ...], found: steps.Statistics) -> Array:
    return found[2]


def _backward(argnums: tuple[int, ...], y: Array, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
    """The backward pass of `batch_norm`: one for all gradients that are wanted."""
    *inputs, _, where, transform = arguments
    dtypes = [None if array is None else array.dtype for array in inputs]

    def gradients(dy: Array) -> tuple[Array, ...]:
        find: Callable[..., Any] = _by_formula if is_traced(dy, *inputs) else _by_kernels
        found = find(dy, *inputs, where, transform)
        return tuple(cast(found[i], dtypes[i]) for i in argnums)

    return gradients


@_recorded(_backward)
def batch_norm(
    x: Array,
    weight: Array | None,
    bias: Array | None,
    residual: Array | None,
    given_mean: Array | None,
    given_m2: Array | None,
    y: Array,
    where: Array | None,
    transform: Transform,
) -> Array:
    """Return y, which is already computed by the transform."""
    return y


def _of_statistics(
    sum_dz: Array, sum_dz_x: Array, count: Count, invstd: Array, weight: Array | None
) -> tuple[Array, Array]:
    """The gradients of given mean and m2."""
    scale = invstd if weight is None else weight * invstd
    of_m2 = -0.5 * scale * invstd * sum_dz_x / _some(count)
    return -scale * sum_dz, anp.where(np.equal(count, 0), 0.0, of_m2)


def _by_kernels(
    dy: Array,
    x: Array,
    weight: Array | None,
    bias: Array | None,
    residual: Array | None,
    given_mean: Array | None,
    given_m2: Array | None,
    where: Array | None,
    transform: Transform,
) -> tuple[Array | None, ...]:
    plain, is_constant = default_backend(), given_mean is not None
    x, dy = np.asarray(x), np.asarray(dy)
    transform = transform._replace(residual=residual if transform.relu else None)
    dx, dweight, dbias, dz = steps.backward(plain, dy, x, transform, where, is_constant)
    dresidual = dz if transform.relu else dy
    if not is_constant:
        return dx, dweight, dbias, dresidual, None, None
    scale = plain.invstd(transform.count, transform.m2, transform.eps)
    return dx, dweight, dbias, dresidual, *_of_statistics(dbias, dweight, transform.count, scale, transform.weight)


def _by_formula(
    dy: Array,
    x: Array,
    weight: Array | None,
    bias: Array | None,
    residual: Array | None,
    given_mean: Array | None,
    given_m2: Array | None,
    where: Array | None,
    transform: Transform,
) -> tuple[Array | None, ...]:
    """What `_by_kernels` does, in operations that autograd follows in turn."""
    kept, count = transform.kept, transform.count
    reduced = tuple(i for i in range(x.ndim) if i not in kept)
    found = count, transform.mean, transform.m2
    is_constant = given_mean is not None
    center = given_mean if is_constant else mean(x, where, kept, found)
    scale = invstd(count, given_m2 if is_constant else m2(x, where, kept, found), transform.eps)
    deviation = widen(x) - along(x, kept, center)
    gamma = 1.0 if weight is None else along(x, kept, weight)
    dz = widen(dy)
    if transform.relu:
        added = 0.0 if bias is None else along(x, kept, bias), 0.0 if residual is None else residual
        z = sum(map(getval, added), getval(deviation * along(x, kept, scale) * gamma))
        dz = anp.where(z <= 0, 0.0, dz)
    # Padding that the loss ignores may be anything.
    ignored = (getval(dz) == 0) & ~np.isfinite(getval(deviation))
    x_hat = anp.where(ignored, 0.0, deviation) * along(x, kept, scale)
    dweight, dbias = anp.sum(dz * x_hat, axis=reduced), anp.sum(dz, axis=reduced)
    dx = dz
    if not is_constant:
        weights, total = _weights(x, where), _some(count) + np.zeros(transform.mean.shape)
        counted = anp.where(weights == 0, 0.0, deviation) * along(x, kept, scale)
        common = along(x, kept, dbias / total) + counted * along(x, kept, dweight / total)
        dx = dz - anp.where(weights == 0, 0.0, weights * common)
    dx = dx * along(x, kept, scale) * gamma
    if not is_constant:
        return dx, dweight, dbias, dz, None, None
    return dx, dweight, dbias, dz, *_of_statistics(dbias, dweight, count, scale, weight)


# -- What autograd would not see ---------------------------------------------------------------------------------------


def _refuse(*arguments: Any) -> Any:
    raise TypeError(
        "autograd follows an argument of this call, and would not see what batch_norm_backward does; differentiate y "
        "itself (autograd.grad), or pass plain arrays: autograd.tracer.getval(x)"
    )


moments = normalize = forward = grad_sums = grad_input = traced_backward = _refuse
