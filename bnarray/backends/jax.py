"""JAX arrays: operations that XLA runs by the CPU kernels and JAX can differentiate, map and compile.

There are four, each a JAX primitive on a list of arrays whose parts are named by its `Call`:

- `forward`: x → y, and in training the statistics;
- `backward`: dy → dx, Σ dz · x̂, Σ dz;
- `tangent`: the linear map from tangents of x, weight, … to y's, whose transposition is `backward`;
- `moments`: x → mean, m2.

On the CPU they are one call of XLA's to the kernels. Elsewhere, in forward mode and for second derivatives, the formula
in `jax.numpy` stands for them, which JAX differentiates as it likes. A mapped axis (`vmap`) is one more feature axis.

Statistics go from forward to backward as the bits of float64, two unsigned integers each: without x64 JAX has no
float64, and what float32 leaves of a mean of 10⁶ shows in every output.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from math import prod
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import ShapedArray, Tracer
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from bnarray.backends import _jax_trees as _jax_trees  # makes the statistics known to JAX
from bnarray.backends import _xla, generic
from bnarray.backends._xla import Call
from bnarray.backends.generic import Count
from bnarray.dispatch import Capabilities, Transform, backend
from bnarray.layout import along_features, broadcasts, features_shape, varies_along
from bnarray.stats import is_number

Array: TypeAlias = jax.Array
Named: TypeAlias = dict[str, Array]

CAPABILITIES = Capabilities(
    dtypes=("float16", "bfloat16", "float32", "float64"),
    runs="compiled kernels (CPU), else the formula in jax.numpy",
    out=False,
    gradients="jax.grad, jax.jvp, batch_norm_backward",
    transforms=("jit", "grad", "vjp", "jvp", "hessian", "vmap", "scan", "checkpoint"),
)

# Of the upper half of a float64, or of a float32.
_SIGN = np.uint32(0x80000000)


def _wide() -> Any:
    """The widest floating dtype that there is."""
    return jnp.float64 if jax.config.jax_enable_x64 else jnp.float32


def _is_bits(array: Array) -> bool:
    return bool(array.dtype == jnp.uint32)


def _encoded(values: Array) -> Array:
    """The bits of numbers as float64: two unsigned integers each, the lower one first."""
    if values.dtype == jnp.float64:
        return lax.bitcast_convert_type(values, jnp.uint32)
    bits = lax.bitcast_convert_type(values.astype(jnp.float32), jnp.uint32)
    sign, exponent, fraction = bits & _SIGN, bits >> 23 & 0xFF, bits & 0x7FFFFF
    wide = jnp.where(exponent == 0xFF, 0x7FF00000, exponent + 896 << 20) | fraction >> 3
    is_zero = exponent == 0  # or next to it
    return jnp.stack([jnp.where(is_zero, 0, fraction << 29), sign | jnp.where(is_zero, 0, wide)], axis=-1)


def _decoded(bits: Array) -> Array:
    """The numbers whose bits these are, as exact as there are dtypes for."""
    if _wide() == jnp.float64:
        return lax.bitcast_convert_type(bits, jnp.float64)
    low, high = bits[..., 0], bits[..., 1]
    sign, exponent, fraction = high & _SIGN, high >> 20 & 0x7FF, high & 0xFFFFF
    finite = (exponent - 896 << 23 | fraction << 3 | low >> 29) + (low >> 28 & 1)  # a carry belongs to the exponent
    special = jnp.where((exponent == 0x7FF) & (fraction | low != 0), jnp.uint32(0x7FC00000), jnp.uint32(0x7F800000))
    magnitude = jnp.where(exponent <= 896, jnp.uint32(0), jnp.where(exponent >= 1151, special, finite))
    return lax.bitcast_convert_type(sign | magnitude, jnp.float32)


def _of_bits(bits: Array) -> Any:
    """The same as a NumPy array, exactly; waits for it."""
    return np.ascontiguousarray(bits).view(np.float64)[..., 0]


def _number(of_features: Array) -> Array:
    return _decoded(of_features) if _is_bits(of_features) else of_features


# -- The formula -------------------------------------------------------------------------------------------------------


def _along(x: Array, kept: tuple[int, ...], of_features: Array) -> Array:
    return of_features.reshape(along_features(x.shape, kept))


def _deviations(x: Array, where: Array | None, kept: tuple[int, ...]) -> tuple[Array, Array, Array, Array]:
    """Return x − mean of all elements and each feature's (count, mean, m2), with axes of size 1 for the others.

    The mean is found in two steps, because next to a large one its rounding would show.
    """
    reduced = tuple(i for i in range(x.ndim) if i not in kept)
    total = partial(jnp.sum, axis=reduced, keepdims=True)
    weights = jnp.ones_like(x) if where is None else jnp.broadcast_to(where, x.shape).astype(x.dtype)
    seen = weights != 0
    count = total(weights)
    divisor = jnp.where(count == 0, 1, count)
    center = lax.stop_gradient(total(weights * jnp.where(seen, x, 0)) / divisor)
    distance = x - center
    drift = total(weights * jnp.where(seen, distance, 0)) / divisor
    deviations = distance - drift
    squares = jnp.where(seen, deviations, 0) ** 2
    return deviations, count, center + drift, total(weights * squares)


def _moments_by_formula(*operands: Array, call: Call) -> list[Array]:
    values = call.named(operands)
    x, where = values["x"], values.get("where")
    _, *found = _deviations(x.astype(_wide()), where, call.kept)
    count, mean, m2 = (each.reshape(features_shape(x.shape, call.kept)) for each in found)
    return [mean, m2] if where is None else [mean, m2, count]


def _normalized(values: Named, call: Call) -> tuple[Array, list[Array]]:
    """Return y and, if the batch's own statistics normalise it, (mean, m2, count)."""
    x, kept = values["x"], call.kept
    dtype = _wide()
    wide = x.astype(dtype)
    found: list[Array] = []
    if call.is_training:
        deviations, count, mean, m2 = _deviations(wide, values.get("where"), kept)
        var = jnp.where(count == 0, 1, m2 / jnp.where(count == 0, 1, count))
        found = [each.reshape(features_shape(x.shape, kept)) for each in (mean, m2, count)]
    else:
        deviations = wide - _along(x, kept, _number(values["mean"]).astype(dtype))
        var = _along(x, kept, _number(values["var"]).astype(dtype))
    spread = var + call.eps
    z = deviations * jnp.where(spread == 0, 0, 1 / jnp.sqrt(jnp.where(spread == 0, 1, spread)))
    if "weight" in values:
        z = z * _along(x, kept, values["weight"].astype(dtype))
    if "bias" in values:
        z = z + _along(x, kept, values["bias"].astype(dtype))
    if "residual" in values:
        z = z + values["residual"].astype(dtype)
    return (jnp.where(z <= 0, 0, z) if call.relu else z).astype(x.dtype), found


def _forward_by_formula(*operands: Array, call: Call) -> list[Array]:
    values = call.named(operands)
    y, found = _normalized(values, call)
    return [y, *map(_encoded, found if "where" in values else found[:2])]


def _fill(x: Array, holes: Array) -> Array:
    """x with numbers in its holes; every element moves with its own."""
    return jnp.where(holes, 0, x)


_filled = jax.custom_jvp(_fill)
_filled.defjvp(lambda primals, tangents: (_filled(*primals), tangents[0]))


def _y_of(values: Named, moving: Sequence[str], call: Call) -> Callable[..., Array]:
    """y as a function of some of the values. What does not count may be NaN, which derivatives of others do not see."""

    def y_of(*moved: Array) -> Array:
        now = values | dict(zip(moving, moved, strict=True))
        if "where" in now:
            x = now["x"]
            now["x"] = _filled(x, ~now["where"].astype(bool) & ~jnp.isfinite(x))
        return _normalized(now, call)[0]

    return y_of


def _tangent_by_formula(*operands: Array, call: Call, moving: tuple[str, ...]) -> list[Array]:
    values = call.named(operands)
    if "residual" in moving and "residual" not in values:
        values["residual"] = jnp.zeros_like(values["x"])  # which only adds to what it is added to
    at = [values[name] for name in moving]
    return [jax.jvp(_y_of(values, moving, call), at, list(operands[len(call.roles) :]))[1]]


def _backward_by_formula(*operands: Array, call: Call) -> list[Array]:
    values = call.named(operands)
    shape, dtype = features_shape(values["x"].shape, call.kept), _wide()
    values["weight"] = values.get("weight", jnp.ones(shape)).astype(dtype)
    values["bias"] = values.get("bias", jnp.zeros(shape)).astype(dtype)
    moving = ["x", "weight", "bias", *(["residual"] if call.gates_residual else [])]
    _, pull = jax.vjp(_y_of(values, moving, call), *(values[name] for name in moving))
    return list(pull(values["dy"].astype(values["x"].dtype)))


# -- The operations ----------------------------------------------------------------------------------------------------


@lru_cache(maxsize=4096)
def _compiled(primitive: Primitive, parameters: tuple[tuple[str, Any], ...]) -> Callable[..., list[Array]]:
    return jax.jit(partial(primitive.bind, **dict(parameters)))  # type: ignore[no-any-return]


def _statistics_avals(x: Any, call: Call, *, as_bits: bool) -> list[ShapedArray]:
    shape = features_shape(x.shape, call.kept)
    one = ShapedArray((*shape, 2), jnp.uint32) if as_bits else ShapedArray(shape, _wide())
    return [one] * (3 if "where" in call.roles else 2)


def _forward_avals(*operands: Any, call: Call) -> list[ShapedArray]:
    x = operands[0]
    return [ShapedArray(x.shape, x.dtype), *(_statistics_avals(x, call, as_bits=True) if call.is_training else [])]


def _moments_avals(*operands: Any, call: Call) -> list[ShapedArray]:
    return _statistics_avals(operands[0], call, as_bits=False)


def _backward_avals(*operands: Any, call: Call) -> list[ShapedArray]:
    x = call.named(operands)["x"]
    like, sums = ShapedArray(x.shape, x.dtype), ShapedArray(features_shape(x.shape, call.kept), _wide())
    return [like, sums, sums, *([like] if call.gates_residual else [])]


def _tangent_avals(*operands: Any, call: Call, moving: tuple[str, ...]) -> list[ShapedArray]:
    x = operands[0]
    return [ShapedArray(x.shape, x.dtype)]


def _mapped(primitive: Primitive) -> Callable[..., tuple[list[Array], list[int]]]:
    """Make the rule for `vmap`: the mapped axis comes first, and is kept."""

    def rule(operands: Any, axes: Any, *, call: Call, **parameters: Any) -> tuple[list[Array], list[int]]:
        mapped = zip(operands, axes, strict=True)
        size = next(array.shape[axis] for array, axis in mapped if axis is not None)
        ndim = call.named(operands)["x"].ndim - (call.named(axes)["x"] is not None)
        moved = []
        names = (*call.roles, *parameters.get("moving", ()))
        for name, array, axis in zip(names, operands, axes, strict=True):
            if axis is not None:
                array = jnp.moveaxis(array, axis, 0)
                if name == "where":
                    array = array.reshape(size, *(1,) * (ndim + 1 - array.ndim), *array.shape[1:])
            elif name == "where":  # which broadcasts by itself
                array = array.reshape(*(1,) * (ndim + 1 - array.ndim), *array.shape)
            else:
                array = jnp.broadcast_to(array, (size, *array.shape))
            moved.append(array)
        inside = call._replace(kept=(0, *(axis + 1 for axis in call.kept)))
        results = primitive.bind(*moved, call=inside, **parameters)
        return results, [0] * len(results)

    return rule


def _varies(aval: Any) -> bool:
    """Whether `jax.shard_map` keeps track of the axes that an array varies along (two names of one thing)."""
    return bool(getattr(aval, "vma", None) or getattr(getattr(aval, "mat", None), "varying", None))


def _primitive(name: str, avals: Any, formula: Any) -> Primitive:
    primitive = Primitive(f"bnarray_{name}")
    primitive.multiple_results = True

    def apply(*operands: Array, **how: Any) -> list[Array]:
        with jax.disable_jit(False):  # what it is compiled from is the primitive itself
            return _compiled(primitive, tuple(sorted(how.items())))(*operands)

    primitive.def_impl(apply)

    def checked_avals(*operands: Any, **how: Any) -> list[ShapedArray]:
        if any(map(_varies, operands)):
            raise NotImplementedError(
                "jax.shard_map would keep track of which axes bnarray's results vary along, which they do not say; "
                "pass it check_vma=False"
            )
        return avals(*operands, **how)  # type: ignore[no-any-return]

    primitive.def_abstract_eval(checked_avals)
    batching.primitive_batchers[primitive] = _mapped(primitive)
    mlir.register_lowering(primitive, mlir.lower_fun(formula, multiple_results=True))

    def by_kernels(*operands: Array, call: Call) -> list[Array]:
        if call.named(operands)["x"].size == 0 or not _xla.is_usable():  # a mapped axis may be empty
            return formula(*operands, call=call)  # type: ignore[no-any-return]
        return _xla.call(name, call, operands, avals(*operands, call=call))

    if primitive.name != "bnarray_tangent":
        mlir.register_lowering(primitive, mlir.lower_fun(by_kernels, multiple_results=True), platform="cpu")
    return primitive


_forward_p = _primitive("forward", _forward_avals, _forward_by_formula)
_backward_p = _primitive("backward", _backward_avals, _backward_by_formula)
_tangent_p = _primitive("tangent", _tangent_avals, _tangent_by_formula)
_moments_p = _primitive("moments", _moments_avals, _moments_by_formula)


def _is_zero(tangent: Any) -> bool:
    return isinstance(tangent, ad.Zero)


def _check_where_is_constant(call: Call, tangents: Sequence[Any]) -> None:
    if "where" in call.roles and not _is_zero(call.named(tangents)["where"]):
        raise TypeError("where has no gradient; pass jax.lax.stop_gradient(where)")


def _by_formula(formula: Any, primals: Sequence[Array], tangents: Sequence[Any], **parameters: Any) -> list[Array]:
    """The tangents of a formula's results."""
    moving = [i for i, tangent in enumerate(tangents) if not _is_zero(tangent)]

    def results(*moved: Array) -> list[Array]:
        operands = list(primals)
        for i, array in zip(moving, moved, strict=True):
            operands[i] = array
        return formula(*operands, **parameters)  # type: ignore[no-any-return]

    return jax.jvp(results, [primals[i] for i in moving], [tangents[i] for i in moving])[1]  # type: ignore[no-any-return]


def _zeros(arrays: Sequence[Array]) -> list[Any]:
    return [ad.Zero(jax.typeof(array).to_tangent_aval()) for array in arrays]


def _forward_jvp(primals: Any, tangents: Any, *, call: Call) -> tuple[list[Array], list[Any]]:
    y, *bits = _forward_p.bind(*primals, call=call)
    _check_where_is_constant(call, tangents)
    moved = {name: tangent for name, tangent in call.named(tangents).items() if not _is_zero(tangent)}
    inner, operands = _saved(call, call.named(primals), bits)
    if not moved:
        return [y, *bits], _zeros([y, *bits])
    (dy,) = _tangent_p.bind(*operands, *moved.values(), call=inner, moving=tuple(moved))
    return [y, *bits], [dy, *_zeros(bits)]


def _saved(call: Call, values: Named, bits: Sequence[Array]) -> tuple[Call, list[Array]]:
    """What the derivatives of a forward call depend on."""
    needed = {name: array for name, array in values.items() if name != "residual" or call.relu}
    needed |= dict(zip(("mean_bits", "m2_bits", "count_bits"), bits, strict=False))
    return call._replace(roles=tuple(needed)), list(needed.values())


def _tangent_jvp(primals: Any, tangents: Any, *, call: Call, moving: tuple[str, ...]) -> tuple[list[Array], list[Any]]:
    results = _tangent_p.bind(*primals, call=call, moving=moving)
    number = len(call.roles)
    if not all(map(_is_zero, tangents[:number])):
        _check_where_is_constant(call, tangents[:number])
        return results, _by_formula(_tangent_by_formula, primals, tangents, call=call, moving=moving)
    moved = {name: each for name, each in zip(moving, tangents[number:], strict=True) if not _is_zero(each)}
    if not moved:
        return results, _zeros(results)
    return results, _tangent_p.bind(*primals[:number], *moved.values(), call=call, moving=tuple(moved))


def _tangent_transpose(cotangents: Any, *operands: Any, call: Call, moving: tuple[str, ...]) -> list[Any]:
    (dy,) = cotangents
    constants, linear = operands[: len(call.roles)], operands[len(call.roles) :]
    nothing = [None] * len(constants)
    if _is_zero(dy):
        return nothing + [ad.Zero(each.aval) if ad.is_undefined_primal(each) else None for each in linear]
    gradients = _gradients(dy, call, constants)
    return nothing + [
        gradients[name].astype(each.aval.dtype) if ad.is_undefined_primal(each) else None
        for name, each in zip(moving, linear, strict=True)
    ]


def _gradients(dy: Array, call: Call, operands: Sequence[Array]) -> Named:
    """The gradients of everything that y is differentiated by."""
    values = {"dy": dy, **call.named(operands)}
    dx, sum_dz_x, sum_dz, *dresidual = _backward_p.bind(*values.values(), call=call._replace(roles=tuple(values)))
    gradients = {"x": dx, "weight": sum_dz_x, "bias": sum_dz, "residual": dresidual[0] if dresidual else dy}
    if not call.is_training:
        spread = _number(values["var"]) + call.eps
        invstd = jnp.where(spread == 0, 0, 1 / jnp.sqrt(jnp.where(spread == 0, 1, spread)))
        scale = invstd * values["weight"] if "weight" in values else invstd
        gradients |= {"mean": -scale * sum_dz, "var": -0.5 * scale * invstd * sum_dz_x}
    return gradients


def _backward_jvp(primals: Any, tangents: Any, *, call: Call) -> tuple[list[Array], list[Any]]:
    _check_where_is_constant(call, tangents)
    results = _backward_p.bind(*primals, call=call)
    return results, _by_formula(_backward_by_formula, primals, tangents, call=call)


def _moments_jvp(primals: Any, tangents: Any, *, call: Call) -> tuple[list[Array], list[Any]]:
    _check_where_is_constant(call, tangents)
    results = _moments_p.bind(*primals, call=call)
    return results, _by_formula(_moments_by_formula, primals, tangents, call=call)


ad.primitive_jvps[_forward_p] = _forward_jvp
ad.primitive_jvps[_backward_p] = _backward_jvp
ad.primitive_jvps[_moments_p] = _moments_jvp
ad.primitive_jvps[_tangent_p] = _tangent_jvp
ad.primitive_transposes[_tangent_p] = _tangent_transpose


# -- Verbs: arrays -----------------------------------------------------------------------------------------------------


def check(x: Array, name: str) -> Array:
    if x.dtype.name not in CAPABILITIES.dtypes:
        raise TypeError(
            f"{name} has dtype {x.dtype}; it should be float16, bfloat16, float32 or float64: convert it, for "
            f"example by {name}.astype(jax.numpy.float32)"
        )
    return x


def check_where(x: Array, where: Array) -> Array:
    if not broadcasts(where.shape, x.shape):
        raise ValueError(f"where has shape {where.shape}; it should broadcast to x's, {x.shape}")
    if where.dtype == jnp.bool:
        return where
    if where.dtype.name not in CAPABILITIES.dtypes:
        raise TypeError(f"where has dtype {where.dtype}; it should be boolean (a mask) or floating (weights)")
    if where.size and not is_symbolic(where):
        weights = np.asarray(where)
        if not (weights.min() >= 0 and weights.max() < np.inf):
            raise ValueError("where holds a weight that is negative, infinite or NaN; weights should be >= 0")
    return where


def check_out(out: Array, x: Array, allowed: Named, forbidden: Named) -> None:
    raise TypeError("out is an array of JAX, which cannot be written to; leave it out, and take what is returned")


def overlap(a: Array, b: Array) -> bool:
    return False  # nothing is ever written to


def zeros(shape: tuple[int, ...], like: Array) -> Array:
    return jnp.zeros(shape, _wide())


def copy(x: Array) -> Array:
    return jnp.array(x, copy=True)


def widen(x: Array) -> Array:
    return jnp.array(x, _wide(), copy=True)


def parameter_dtype(like: Array) -> Any:
    return jnp.promote_types(like.dtype, jnp.float32)


def cleared(x: Array) -> Array:
    return jnp.zeros_like(x)


def to_numpy(x: Array) -> Any:
    return np.array(x)


def convert(x: Any, like: Array) -> Array:
    # Copied: a JAX array may look at the memory of a NumPy array, which somebody may change.
    return x if isinstance(x, jax.Array) else jnp.array(backend(x).to_numpy(x), _wide(), copy=True)


def vector(of_features: Any, x: Array, copy: bool = False) -> Array:
    return convert(of_features, x)


def of_vector(of_features: Array, x: Array, dtype: Any = None) -> Array:
    numbers = _number(of_features)
    return numbers if dtype is None else numbers.astype(dtype)


# -- Verbs: passes -----------------------------------------------------------------------------------------------------


def is_traced(*arrays: Array | None) -> bool:
    return True


def is_symbolic(*arrays: Count) -> bool:
    return any(isinstance(array, Tracer) for array in arrays)


def traced_statistic(of_features: Any, x: Array) -> Array:
    if isinstance(of_features, jax.Array) or _wide() == jnp.float64:
        return convert(of_features, x)
    numbers = np.array(backend(of_features).to_numpy(of_features), np.float64, order="C")
    return jnp.array(numbers[..., None].view(np.uint32), copy=True)


def _variance(count: Count, m2: Array) -> Array:
    """m2 / count; the variance of nothing is 1."""
    if is_number(count) and count == 1:
        return m2
    if _is_bits(m2) and not is_symbolic(count, m2):
        numbers = count if is_number(count) else _of_bits(count) if _is_bits(count) else np.asarray(count, np.float64)
        squares = _of_bits(m2)
        var = np.divide(squares, numbers, out=np.ones_like(squares), where=np.not_equal(numbers, 0))
        return jnp.array(var[..., None].view(np.uint32), copy=True)
    m2 = _number(m2)
    count = (count if is_number(count) else _number(count)) + jnp.zeros_like(m2)
    return jnp.where(count == 0, 1, m2 / jnp.where(count == 0, 1, count))


def _without_nones(**arrays: Array | None) -> Named:
    return {name: array for name, array in arrays.items() if array is not None}


def _count(x: Array, where: Array, kept: tuple[int, ...], of_features: Array) -> Count:
    """The count as a number, if it is one and known."""
    if is_symbolic(of_features):
        return of_features
    if not is_finite(of_features):
        raise ValueError("where holds weights whose sum is beyond the largest number; scale them")
    if varies_along(where.shape, x.ndim, kept):
        return of_features
    return float((_of_bits(of_features) if _is_bits(of_features) else np.asarray(of_features)).flat[0])


def traced_forward(
    x: Array,
    weight: Array | None,
    bias: Array | None,
    residual: Array | None,
    where: Array | None,
    given: tuple[Count, Array, Array] | None,
    kept: tuple[int, ...],
    eps: float,
    relu: bool,
) -> tuple[Array, Transform]:
    shape = features_shape(x.shape, kept)
    values = _without_nones(x=x, weight=weight, bias=bias, residual=residual, where=where)
    if given is not None:
        values = {name: array for name, array in values.items() if name != "where"}  # it decides nothing here
        values |= {"mean": given[1], "var": _variance(given[0], given[2])}
    if x.size == 0:
        mean, var = (values["mean"], values["var"]) if given else [jnp.zeros((*shape, 2), jnp.uint32)] * 2
        return x, Transform(kept, 1 if given else 0, mean, var, eps, weight, bias, relu, residual)
    y, *found = _forward_p.bind(*values.values(), call=Call(kept, eps, relu, tuple(values)))
    if given is not None:
        return y, Transform(kept, 1, values["mean"], values["var"], eps, weight, bias, relu, residual)
    mean, m2 = found[:2]
    count = x.size // prod(shape) if where is None else _count(x, where, kept, found[2])
    return y, Transform(kept, count, mean, m2, eps, weight, bias, relu, residual)


def traced_moments(x: Array, kept: tuple[int, ...], where: Array | None) -> tuple[Count, Array, Array]:
    shape = features_shape(x.shape, kept)
    if x.size == 0:
        return 0, zeros(shape, x), zeros(shape, x)
    values = _without_nones(x=x, where=where)
    mean, m2, *count = _moments_p.bind(*values.values(), call=Call(kept, 0.0, False, tuple(values)))
    return x.size // prod(shape) if where is None else _count(x, where, kept, count[0]), mean, m2


def backward(
    dy: Array, x: Array, transform: Transform, where: Array | None, is_constant: bool, out: Array | None
) -> tuple[Array, Array, Array, Array | None]:
    kept, count, mean, m2, eps, weight, bias, relu, residual, _ = transform
    values = _without_nones(dy=dy, x=x, weight=weight, bias=bias, residual=residual)
    if is_constant:
        values |= {"mean": mean, "var": m2}
    else:
        values |= {"mean_bits": mean, "m2_bits": m2}
        if where is not None:
            every = np.full((*features_shape(x.shape, kept), 1), count).view(np.uint32) if is_number(count) else count
            values |= {"where": where, "count_bits": jnp.asarray(every)}
    results = _backward_p.bind(*values.values(), call=Call(kept, eps, relu, tuple(values)))
    dx, dweight, dbias, *dz = results
    return dx, dweight, dbias, dz[0] if dz else None


# -- Verbs: statistics -------------------------------------------------------------------------------------------------


def merge(count_a: Count, mean_a: Array, m2_a: Array, count_b: Count, mean_b: Array, m2_b: Array) -> Any:
    if is_number(count_a) and is_number(count_b):
        return generic.merge(count_a, mean_a, m2_a, count_b, mean_b, m2_b)  # type: ignore[no-untyped-call]
    # The merge's smallest number is nothing in float32, so that there the sum would be.
    nothing = (count_a + count_b) == 0
    count, mean, m2 = generic.merge(jnp.where(nothing, 1, count_a), mean_a, m2_a, count_b, mean_b, m2_b)  # type: ignore[no-untyped-call]
    return jnp.where(nothing, 0, count), mean, m2


def is_finite(array: Array, other: Array | None = None) -> bool:
    """Of bits too; what has no values yet is not looked at."""
    if other is not None and not is_finite(other):
        return False
    return is_symbolic(array) or bool(np.isfinite(_of_bits(array) if _is_bits(array) else np.asarray(array)).all())


def lowest(array: Count) -> float:
    """NaN, which no comparison holds for, where there are no values yet."""
    return float("nan") if is_symbolic(array) else generic.lowest(array)


def prepare(stats: Any, count: Count, mean: Array, m2: Array) -> Any:
    if not is_symbolic(count, mean, m2):
        count, mean, m2 = (
            _of_bits(each) if not is_number(each) and _is_bits(each) else each for each in (count, mean, m2)
        )
    return stats.prepare(count, mean, m2)
