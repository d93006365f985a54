"""dask arrays: each chunk by the backend of what it is (NumPy's kernels, as a rule), serially inside its task.

What is done to x is lazy, and x's chunks stay as they are. What the later steps need of the whole of x is computed at
the call, in one pass: the statistics of a training step and the sums of a backward one. A graph that held both steps
would hold on to every chunk in between. Tasks may run twice, so none of them changes any state.

Per-feature arrays that are known are NumPy's (running statistics, parameters made ``like=`` a dask array), so that
state never is a graph that grows; those that are not known yet are dask's.
"""

from collections.abc import Iterable
from functools import reduce
from math import isnan, nan, prod
from typing import Any

import dask
import dask.array as da
import numpy as np
import numpy.typing as npt

from bnarray import steps
from bnarray.backends import generic
from bnarray.backends.generic import Count
from bnarray.dispatch import Array, Capabilities, Transform, Verbs, backend, default_backend
from bnarray.kernels.cpu import pool
from bnarray.layout import along_features, broadcasts, features_shape, varies_along
from bnarray.stats import is_number

ndarray = npt.NDArray[Any]

CAPABILITIES = Capabilities(
    dtypes=("float16", "bfloat16", "float32", "float64"),
    runs="the backend of the chunks",
    out=False,
    lazy=True,
    parameters=("numpy",),
)

# What a chunk leaves of a feature. Several arrays of partial results would each read x again.
_MOMENTS: Any = np.dtype([(name, np.float64) for name in ("count", "mean", "m2")])
_SUMS: Any = np.dtype([(name, np.float64) for name in ("sum_dz", "sum_dz_x")])

# Records that one task joins. Not dask's setting, because the order of joining is in the bits.
_JOINED = 8


# -- Arrays ------------------------------------------------------------------------------------------------------------


def _check_sizes(x: da.Array, name: str) -> None:
    if any(isnan(size) for size in x.shape):
        raise ValueError(
            f"{name} has shape {x.shape}, of which not all is known; call {name}.compute_chunk_sizes() first"
        )


def check(x: Array, name: str) -> Array:
    """Return x if its chunks are arrays that their own backend takes; of x itself, reduced axes may be unknown."""
    if isinstance(x, np.ndarray | np.generic):  # a weight or bias
        return default_backend().check(x, name)
    if not isinstance(x, da.Array):
        kind = type(x)
        raise TypeError(
            f"{name} is a {kind.__module__}.{kind.__qualname__}; it should be a dask.array.Array: convert it, for "
            f"example by {name}.to_dask_array(lengths=True), or by dask.array.from_delayed"
        )
    if isinstance(x._meta, np.ma.MaskedArray):
        way_out = "and where=~dask.array.ma.getmaskarray(x)" if name == "x" else "alone"
        raise TypeError(
            f"{name} has masked arrays for chunks, whose mask would be lost; pass dask.array.ma.getdata({name}) "
            f"{way_out}"
        )
    backend(x._meta, f"{name}'s chunk").check(x._meta, name)
    if name != "x":
        _check_sizes(x, name)
    return x


def check_where(x: da.Array, where: da.Array) -> da.Array:
    """Return where if its kind and shape will do; the task that reads a weight checks its value."""
    check_kind = backend(where._meta, "where's chunk").check_where
    _check_sizes(where, "where")
    _check_sizes(x, "x")
    if not broadcasts(where.shape, x.shape):
        raise ValueError(f"where has shape {where.shape}; it should broadcast to x's, {x.shape}")
    check_kind(x._meta, where._meta)
    return where


def check_out(out: Array, x: da.Array, allowed: dict[str, Array], forbidden: dict[str, Array]) -> None:
    raise TypeError("out is given, but a dask array has no memory to write into; leave it out, and store the result")


def empty_like(x: da.Array) -> da.Array:
    return da.empty_like(x)


def zeros(shape: tuple[int, ...], like: Array) -> ndarray:
    """Return what state and parameters are made of: memory, not a graph that grows with each update."""
    return np.zeros(shape)


def copy(x: Array) -> Array:
    return x.copy()


def widen(x: Array) -> Array:
    return x.astype(np.float64)


def _cast_chunk(x: Array, dtype: Any) -> Array:
    return backend(x).cast(x, dtype)


def cast(x: Array, dtype: Any) -> Array:
    if x.dtype == dtype:
        return x
    return da.map_blocks(_cast_chunk, x, dtype, dtype=dtype) if _is_lazy(x) else _cast_chunk(x, dtype)


def parameter_dtype(like: da.Array) -> Any:
    return np.dtype(np.float64 if like.dtype == np.float64 else np.float32)


def _is_lazy(x: Any) -> bool:
    return isinstance(x, da.Array)


def _computed(*arrays: Any) -> list[Any]:
    """Arrays as NumPy's and numbers as they are: one pass for all that are lazy."""
    found = dask.compute(*arrays) if any(map(_is_lazy, arrays)) else arrays
    return [each if is_number(each) else np.array(_in_numpy(each), np.float64, order="C") for each in found]


def _in_numpy(of_features: Any) -> Any:
    return of_features if is_number(of_features) else default_backend().convert(of_features, None)


def to_numpy(x: Array) -> ndarray:
    return np.array(_in_numpy(dask.compute(x)[0]))


def convert(x: Array, like: da.Array) -> Array:
    """Return a per-feature array as dask arrays go with it: dask's or NumPy's."""
    return x if _is_lazy(x) else _in_numpy(x)


traced_statistic = convert


def vector(of_features: Array, x: da.Array, copy: bool = False) -> Array:
    array = convert(of_features, x)
    return widen(array).copy() if copy else widen(array)


def of_vector(of_features: Array, x: da.Array, dtype: Any = None) -> Array:
    return of_features if dtype is None else cast(of_features, dtype)


def along(x: da.Array, kept: tuple[int, ...], of_features: Array) -> Array:
    return of_features.reshape(along_features(x.shape, kept))


# -- Tasks -------------------------------------------------------------------------------------------------------------

# What runs on a worker. x, dy, where and the residual are chunks here, and vectors are the parts that belong to them.


def _checked_chunk(x: Array) -> tuple[Verbs, Array]:
    verbs = backend(x, "x's chunk")
    return verbs, verbs.check(x, "x")


def _filled(dtype: Any, shape: tuple[int, ...], fields: Iterable[Any]) -> ndarray:
    records = np.empty(shape, dtype)
    for name, field in zip(dtype.names, fields, strict=True):
        records[name] = field
    return records


def _records(dtype: Any, x: Array, kept: tuple[int, ...], *fields: Any) -> ndarray:
    """What a chunk leaves of its features, with an axis for each of x's."""
    records = _filled(dtype, features_shape(x.shape, kept), map(_in_numpy, fields))
    return records.reshape(along_features(x.shape, kept))


def _transform(
    verbs: Verbs,
    x: Array,
    residual: Array | None,
    vectors: tuple[Any, ...],
    kept: tuple[int, ...],
    eps: float,
    relu: bool,
) -> Transform:
    """The transform of a chunk, by its own backend's vectors."""
    count, mean, m2, weight, bias = (_chunk_vector(verbs, x, each) for each in vectors)
    residual = None if residual is None else verbs.check(residual, "residual")
    return Transform(kept, count, mean, m2, eps, weight, bias, relu, residual)


def _chunk_vector(verbs: Verbs, x: Array, of_features: Any) -> Any:
    known = of_features is None or is_number(of_features)
    return of_features if known else verbs.vector(np.asarray(of_features), x, copy=True)


def _find_moments(x: Array, where: Array | None, kept: tuple[int, ...]) -> ndarray:
    verbs, x = _checked_chunk(x)
    if where is not None:
        where = verbs.check_where(x, where)
    with pool.serial():
        return _records(_MOMENTS, x, kept, *steps.moments(verbs, x, kept, where))


def _normalize(x: Array, residual: Array | None, *vectors: Any, kept: tuple[int, ...], eps: float, relu: bool) -> Array:
    verbs, x = _checked_chunk(x)
    if 0 in x.shape:
        return verbs.empty_like(x)
    with pool.serial():
        return verbs.normalize(x, _transform(verbs, x, residual, vectors, kept, eps, relu), None)


def _find_grad_sums(
    x: Array, dy: Array, residual: Array | None, *vectors: Any, kept: tuple[int, ...], eps: float, relu: bool
) -> ndarray:
    verbs, x = _checked_chunk(x)
    if 0 in x.shape:
        return _records(_SUMS, x, kept, 0, 0)
    with pool.serial():
        transform = _transform(verbs, x, residual, vectors, kept, eps, relu)
        return _records(_SUMS, x, kept, *verbs.grad_sums(verbs.check(dy, "dy"), x, transform))


def _find_grad_input(
    x: Array,
    dy: Array,
    where: Array | None,
    residual: Array | None,
    sum_dz: Any,
    sum_dz_x: Any,
    *vectors: Any,
    kept: tuple[int, ...],
    eps: float,
    relu: bool,
    of_residual: bool = False,
) -> Array:
    """The gradient of a chunk of x, or of the residual."""
    verbs, x = _checked_chunk(x)
    if 0 in x.shape:
        return verbs.empty_like(x)
    with pool.serial():
        transform = _transform(verbs, x, residual, vectors, kept, eps, relu)
        where = None if where is None else verbs.check_where(x, where)
        sums = None if sum_dz is None else (_chunk_vector(verbs, x, sum_dz), _chunk_vector(verbs, x, sum_dz_x))
        return verbs.grad_input(verbs.check(dy, "dy"), x, transform, where, sums, None)[of_residual]


@np.errstate(all="ignore")
def _add(dz_a: ndarray, dz_x_a: ndarray, dz_b: ndarray, dz_x_b: ndarray) -> tuple[ndarray, ndarray]:
    return dz_a + dz_b, dz_x_a + dz_x_b


def _merge_fields(records: ndarray, axis: tuple[int, ...], keepdims: bool) -> ndarray:
    return _joined(records, axis, generic.merge)


def _add_fields(records: ndarray, axis: tuple[int, ...], keepdims: bool) -> ndarray:
    return _joined(records, axis, _add)


def _as_it_is(records: ndarray, axis: tuple[int, ...], keepdims: bool) -> ndarray:
    return records


def _joined(records: ndarray, axis: tuple[int, ...], join: Any) -> ndarray:
    """Join the records along some axes, in order; those axes stay."""
    lines = np.moveaxis(records, axis, range(len(axis)))
    number, shape = prod(lines.shape[: len(axis)]), lines.shape[len(axis) :]
    names: Any = records.dtype.names
    fields = ([line[name] for name in names] for line in lines.reshape(number, *shape))
    joined = _filled(records.dtype, shape, reduce(lambda a, b: join(*a, *b), fields))
    return np.expand_dims(joined, axis)


# -- Graphs ------------------------------------------------------------------------------------------------------------


def _in_chunks_of(x: da.Array, array: da.Array | None) -> tuple[Any, ...]:
    """An array that broadcasts to x, in x's chunks, and its axes: two arguments of blockwise."""
    if array is None:
        return None, None
    axes = range(x.ndim - array.ndim, x.ndim)
    chunks = tuple((1,) if size == 1 else x.chunks[axis] for size, axis in zip(array.shape, axes, strict=True))
    return (array if array.chunks == chunks else array.rechunk(chunks)), tuple(axes)


def _in_features_of(x: da.Array, kept: tuple[int, ...], of_features: Any) -> tuple[Any, ...]:
    """Likewise a per-feature array; None and numbers go to every task."""
    if of_features is None or is_number(of_features):
        return of_features, None
    chunks = tuple(x.chunks[axis] for axis in kept)
    if not _is_lazy(of_features):
        return da.from_array(of_features, chunks=chunks), kept
    return (of_features if of_features.chunks == chunks else of_features.rechunk(chunks)), kept


def _chunkwise(
    task: Any, x: da.Array, like_x: tuple[Any, ...], of_features: tuple[Any, ...], kept: tuple[int, ...], **options: Any
) -> da.Array:
    """``task(chunk of x, *chunks of arrays like x, *chunks of per-feature arrays, kept=kept, **options)``."""
    axes = tuple(range(x.ndim))
    pairs = [x, axes]
    for array in like_x:
        pairs += _in_chunks_of(x, array)
    for array in of_features:
        pairs += _in_features_of(x, kept, array)
    return da.blockwise(task, axes, *pairs, kept=kept, align_arrays=False, **options)


def _per_feature(task: Any, like: da.Array, *arguments: Any, **options: Any) -> da.Array:
    """``task(*arguments)`` of numbers and per-feature arrays, chunk by chunk as one of those is."""
    axes = tuple(range(like.ndim))
    pairs = [each for argument in arguments for each in _in_features_of(like, axes, argument)]
    return da.blockwise(task, axes, *pairs, align_arrays=False, **options)


def _transformed(
    task: Any, x: da.Array, transform: Transform, like_x: tuple[Any, ...], of_features: tuple[Any, ...], **options: Any
) -> da.Array:
    """Likewise, for a task that takes a transform."""
    kept, count, mean, m2, eps, weight, bias, relu, residual, _ = transform
    vectors = *of_features, count, mean, m2, weight, bias
    return _chunkwise(task, x, (*like_x, residual), vectors, kept, eps=eps, relu=relu, **options)


def _like(x: da.Array) -> dict[str, Any]:
    return {"dtype": x.dtype, "meta": x._meta}


def _records_of_chunks(x: da.Array, kept: tuple[int, ...], dtype: Any) -> dict[str, Any]:
    """How blockwise makes one record a chunk and feature."""
    reduced = {axis: 1 for axis in range(x.ndim) if axis not in kept}
    return {"dtype": dtype, "meta": np.empty((0,) * x.ndim, dtype), "adjust_chunks": reduced}


def _reduced(records: da.Array, kept: tuple[int, ...], join: Any) -> da.Array:
    """The records of all chunks joined, in a tree; the reduced axes stay (older dask adds records up to drop axes)."""
    reduced = tuple(axis for axis in range(records.ndim) if axis not in kept)
    if not reduced:
        return records
    return da.reduction(
        records,
        chunk=_as_it_is,
        aggregate=join,
        combine=join,
        axis=reduced,
        keepdims=True,
        dtype=records.dtype,
        split_every=_JOINED,
        meta=records._meta,
    )


def _known_fields(records: da.Array, kept: tuple[int, ...]) -> list[ndarray]:
    """Compute joined records, now, and return their fields in the features' shape."""
    (known,) = dask.compute(records)
    shape = features_shape(known.shape, kept)
    return [np.array(known[name], order="C").reshape(shape) for name in known.dtype.names]


# -- Verbs -------------------------------------------------------------------------------------------------------------


def is_traced(*arrays: Array | None) -> bool:
    """Say that dask follows everything: a call becomes a graph."""
    return True


def _moment_records(x: da.Array, kept: tuple[int, ...], where: da.Array | None) -> da.Array:
    """The records of x's features."""
    if any(isnan(x.shape[axis]) for axis in kept):
        raise ValueError(
            f"x has shape {x.shape}, where the features' number is not known; call x.compute_chunk_sizes() first"
        )
    found = _chunkwise(_find_moments, x, (where,), (), kept, **_records_of_chunks(x, kept, _MOMENTS))
    return _reduced(found, kept, _merge_fields)


def moments(x: da.Array, kept: tuple[int, ...], where: da.Array | None) -> tuple[Count, da.Array, da.Array]:
    """Return lazy (count, mean, m2); the count is a number where the shape tells it."""
    if 0 in x.shape:
        nothing = da.zeros(features_shape(x.shape, kept))
        return 0, nothing, nothing
    records, drop = _moment_records(x, kept, where), tuple(slice(None) if axis in kept else 0 for axis in range(x.ndim))
    lazy_count, mean, m2 = (records[name][drop] for name in _MOMENTS.names)
    count = prod(size for axis, size in enumerate(x.shape) if axis not in kept)
    return (count if where is None and not isnan(count) else lazy_count), mean, m2


traced_moments = moments


def _known_moments(x: da.Array, kept: tuple[int, ...], where: da.Array | None) -> tuple[Count, ndarray, ndarray]:
    """The statistics as NumPy arrays: one pass over x, now."""
    if 0 in x.shape:
        return 0, *np.zeros((2, *features_shape(x.shape, kept)))
    count, mean, m2 = _known_fields(_moment_records(x, kept, where), kept)
    if where is None:
        return int(count.flat[0]), mean, m2
    return (count if varies_along(where.shape, x.ndim, kept) else float(count.flat[0])), mean, m2


def traced_forward(
    x: da.Array,
    weight: Array | None,
    bias: Array | None,
    residual: da.Array | None,
    where: da.Array | None,
    given: steps.Statistics | None,
    kept: tuple[int, ...],
    eps: float,
    relu: bool,
) -> tuple[da.Array, Transform]:
    count, mean, m2 = given or _known_moments(x, kept, where)
    # Of memory that changes before y is computed, y would see the change.
    weight, bias = (None if each is None else vector(each, x, copy=True) for each in (weight, bias))
    transform = Transform(kept, count, mean, m2, eps, weight, bias, relu, residual)
    return (empty_like(x) if 0 in x.shape else normalize(x, transform, None)), transform


def normalize(x: da.Array, transform: Transform, out: None) -> da.Array:
    return _transformed(_normalize, x, transform, (), (), **_like(x))


def grad_sums(dy: da.Array, x: da.Array, transform: Transform) -> tuple[Array, Array]:
    """Return the sums, computed now; each as an array of the parameter's library, whose gradient it is."""
    kept = transform.kept
    found = _transformed(_find_grad_sums, x, transform, (dy,), (), **_records_of_chunks(x, kept, _SUMS))
    sum_dz, sum_dz_x = _known_fields(_reduced(found, kept, _add_fields), kept)
    return _as_array_like(transform.bias, sum_dz), _as_array_like(transform.weight, sum_dz_x)


def _as_array_like(parameter: Array | None, of_features: ndarray) -> Array:
    return da.from_array(of_features, chunks=parameter.chunks) if isinstance(parameter, da.Array) else of_features


def grad_input(
    dy: da.Array,
    x: da.Array,
    transform: Transform,
    where: da.Array | None,
    sums: tuple[Array, Array] | None,
    out: None,
) -> tuple[da.Array, da.Array | None]:
    arguments = _find_grad_input, x, transform, (dy, where), sums or (None, None)
    dx = _transformed(*arguments, **_like(x))
    return dx, None if transform.residual is None else _transformed(*arguments, of_residual=True, **_like(x))


# -- Statistics --------------------------------------------------------------------------------------------------------


def variance(count: Count, m2: da.Array, correction: float, otherwise: float = nan) -> da.Array:
    return _per_feature(generic.variance, m2, count, m2, correction, otherwise, **_like(m2))


def _merge(*samples: Any) -> ndarray:
    merged = generic.merge(*samples)  # type: ignore[no-untyped-call]  # operators only, for any type
    return _filled(_MOMENTS, np.shape(merged[1]), merged)


def merge(
    count_a: Count, mean_a: da.Array, m2_a: da.Array, count_b: Count, mean_b: da.Array, m2_b: da.Array
) -> tuple[Count, da.Array, da.Array]:
    samples = count_a, mean_a, m2_a, count_b, mean_b, m2_b
    meta = np.empty((0,) * mean_a.ndim, _MOMENTS)
    records = _per_feature(_merge, mean_a, *samples, dtype=_MOMENTS, meta=meta)
    is_known = is_number(count_a) and is_number(count_b)
    return (count_a + count_b if is_known else records["count"]), records["mean"], records["m2"]


def prepare(stats: Any, count: Count, mean: Array, m2: Array) -> Any:
    """Decide as for NumPy arrays: what is lazy is computed first, in one pass, and never inside a task."""
    return stats.prepare(*_computed(count, mean, m2))


def is_finite(array: Array, other: Array | None = None) -> bool:
    """Whether every number that is known is finite."""
    known = [each for each in (array, other) if each is not None and not _is_lazy(each)]
    return all(map(generic.is_finite, known))


def lowest(array: Count) -> float:
    """Return the smallest number that is not 0; of a lazy array NaN, which is below nothing."""
    return nan if _is_lazy(array) else generic.lowest(array)
