"""NumPy arrays, through the CPU kernels."""

from ctypes import c_void_p
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt

from bnarray.backends import _again, _strided
from bnarray.backends._strided import NONE, Memory, Vector, counted, flat, shaped
from bnarray.backends.generic import Count
from bnarray.dispatch import Capabilities, backend
from bnarray.kernels.cpu import features, memory
from bnarray.layout import broadcasts

ndarray = npt.NDArray[Any]

CAPABILITIES = Capabilities(dtypes=("float16", "bfloat16", "float32", "float64"), runs="compiled kernels", layouts=True)

_KINDS = {
    np.dtype(np.float16): memory.FLOAT16,
    np.dtype(np.float32): memory.FLOAT32,
    np.dtype(np.float64): memory.FLOAT64,
    np.dtype(np.bool): memory.BOOL,
}

_FLOATS = set(_KINDS) - {np.dtype(np.bool)}

# Subclasses whose elements mean what an array's do; the results are plain arrays.
_PLAIN = (np.ndarray, np.memmap)


def _kind(dtype: np.dtype[Any]) -> int | None:
    kind = _KINDS.get(dtype)
    if kind is None and dtype.name == "bfloat16":  # from ml_dtypes, which only its user imports
        kind = _KINDS[dtype] = memory.BFLOAT16
        _FLOATS.add(dtype)
    return kind


_HAS_HEADERS = c_void_p.from_address(id(NONE) + memory.HEADER).value == NONE.ctypes.data


def _address(x: ndarray) -> int:
    """The address of the first element, without the object that NumPy makes when it is asked."""
    return (c_void_p.from_address(id(x) + memory.HEADER).value or 0) if _HAS_HEADERS else x.ctypes.data


def _memory(x: ndarray) -> Memory:
    kind = _KINDS[x.dtype]
    return Memory(x, _address(x), kind, x.shape, x.strides)


def _check_array(x: Any, name: str) -> None:
    if isinstance(x, np.ma.MaskedArray):
        way_out = "and where=~numpy.ma.getmaskarray(x)" if name == "x" else "alone"
        raise TypeError(f"{name} is a masked array, whose mask would be lost; pass its data as {name} {way_out}")
    if not (type(x) in _PLAIN or isinstance(x, np.generic)):  # arithmetic makes scalars of arrays without axes
        kind = type(x)
        raise TypeError(
            f"{name} is a {kind.__module__}.{kind.__qualname__}, whose meaning would be lost; it should be a "
            f"numpy.ndarray: pass numpy.asarray({name})"
        )
    if not x.dtype.isnative:
        raise ValueError(
            f"{name} has dtype {x.dtype} of foreign byte order; convert it by "
            f"{name}.astype({name}.dtype.newbyteorder('='))"
        )


def check(x: ndarray, name: str) -> ndarray:
    if type(x) is np.ndarray and x.dtype in _FLOATS:  # nearly always
        return x
    _check_array(x, name)
    if _kind(x.dtype) in (None, memory.BOOL):
        by = (
            "{}.astype(numpy.float32)"
            if x.dtype.names is None
            else "numpy.lib.recfunctions.structured_to_unstructured({})"
        )
        raise TypeError(
            f"{name} has dtype {x.dtype}; it should be float16, bfloat16, float32 or float64: convert it, for "
            f"example by {by.format(name)}"
        )
    return x if isinstance(x, np.ndarray) else np.asarray(x)


def _are_weights(where: ndarray) -> bool:
    """Whether all are >= 0 and finite: as bits such numbers (but -0) are ordered as they are, below infinity."""
    unsigned = f"u{where.itemsize}"
    infinity = np.array(np.inf, where.dtype).view(unsigned)
    return bool(where.view(unsigned).max() < infinity or (where.min() >= 0 and where.max() < np.inf))


def check_where(x: ndarray, where: ndarray) -> ndarray:
    _check_array(where, "where")
    if _kind(where.dtype) is None:
        raise TypeError(f"where has dtype {where.dtype}; it should be boolean (a mask) or floating (weights)")
    if not broadcasts(where.shape, x.shape):
        raise ValueError(f"where has shape {where.shape}; it should broadcast to x's, {x.shape}")
    if where.dtype != np.bool and where.size and not _are_weights(where):
        raise ValueError("where holds a weight that is negative, infinite or NaN; weights should be >= 0")
    return np.asarray(where)


def _is_same_memory(a: ndarray, b: ndarray) -> bool:
    steps = [(s, t) for size, s, t in zip(a.shape, a.strides, b.strides, strict=True) if size > 1]
    return a.ctypes.data == b.ctypes.data and a.dtype == b.dtype and all(s == t for s, t in steps)


def overlap(a: ndarray, b: ndarray) -> bool:
    if not np.may_share_memory(a, b):
        return False
    try:
        return np.shares_memory(a, b, max_work=100_000)  # type: ignore[arg-type]  # the stub knows 0 and -1 only
    except np.exceptions.TooHardError:
        return True


def _repeats(x: ndarray) -> bool:
    """Whether two elements may have one address."""
    if x.size == 0:
        return False
    axes = sorted((abs(step), size) for size, step in zip(x.shape, x.strides, strict=True) if size > 1)
    extent = x.itemsize
    for step, size in axes:
        if step < extent:
            return True
        extent = step * (size - 1) + extent
    return False


def check_out(out: ndarray, x: ndarray, allowed: dict[str, ndarray], forbidden: dict[str, ndarray]) -> None:
    _check_array(out, "out")
    if out.dtype != x.dtype:
        raise TypeError(f"out has dtype {out.dtype}; it should have x's, {x.dtype}")
    if out.shape != x.shape:
        raise ValueError(f"out has shape {out.shape}; it should have x's, {x.shape}")
    if not out.flags.writeable:
        raise TypeError("out is read-only; it should be an array that can be written to")
    check_memory(out, allowed, forbidden)


def check_memory(out: ndarray, allowed: dict[str, ndarray], forbidden: dict[str, ndarray]) -> None:
    """Raise if out's elements share memory with one another, with part of an allowed array, or with a forbidden one."""
    if _repeats(out):
        raise ValueError(
            f"out has strides {out.strides}, by which elements overlap; it should have memory for each element"
        )
    for name, array in allowed.items():
        if overlap(out, array) and not _is_same_memory(out, array):
            raise ValueError(f"out overlaps {name} without being it; pass {name} itself, or memory of its own")
    for name, array in forbidden.items():
        if overlap(out, array):
            raise ValueError(f"out overlaps {name}, which is still needed; give it memory of its own")


def at_addresses(first: int, shape: tuple[int, ...], strides: tuple[int, ...], size: int) -> ndarray:
    """Return an array for questions about addresses alone (`overlap`, `check_memory`): it must not be read."""
    interface = {"data": (first, False), "shape": shape, "strides": strides, "typestr": f"|V{size}", "version": 3}
    return np.asarray(SimpleNamespace(__array_interface__=interface))


def empty_like(x: ndarray) -> ndarray:
    return np.empty_like(x, subok=False)


def zeros(shape: tuple[int, ...], like: ndarray) -> ndarray:
    return np.zeros(shape)


def copy(x: ndarray) -> ndarray:
    return np.array(x, copy=True)


def guide(*arrays: ndarray) -> tuple[tuple[int, ...], ...]:
    return tuple(array.strides for array in arrays)


def widen(x: ndarray) -> ndarray:
    return np.array(x, np.float64, order="C")


def cast(x: ndarray, dtype: np.dtype[Any]) -> ndarray:
    with np.errstate(all="ignore"):  # beyond float16 is infinity, as in every array of it
        return x.astype(dtype, copy=False)


def freeze(x: ndarray) -> ndarray:
    array = np.asarray(x, order="C")  # as compiled code reads vectors
    array.setflags(write=False)
    return array.view()  # which cannot be made writeable again


def convert(x: Any, like: ndarray) -> ndarray:
    return x if isinstance(x, np.ndarray) else np.asarray(backend(x).to_numpy(x), np.float64)


def vector(of_features: Any, x: ndarray, copy: bool = False) -> ndarray:
    array = convert(of_features, x)
    return np.array(array, np.float64, order="C") if copy else array


def of_vector(of_features: ndarray, x: ndarray, dtype: np.dtype[Any] | None = None) -> ndarray:
    return of_features if dtype is None else cast(of_features, dtype)


def to_numpy(x: ndarray) -> ndarray:
    return np.array(x)


def _contiguous(of_features: ndarray) -> Vector:
    return flat(np.ascontiguousarray(of_features, np.float64))


def is_finite(array: ndarray, other: ndarray | None = None) -> bool:
    return bool(features.are_finite.call(_contiguous(array), NONE if other is None else _contiguous(other)))


def update_stats(
    mean: ndarray, var: ndarray, batch: tuple[Count, ndarray, ndarray], rate: float, correction: float
) -> tuple[ndarray, ndarray]:
    count, batch_mean, batch_m2 = batch
    new = np.empty((2, mean.size))
    vectors = flat(mean), flat(var), *counted(count), flat(batch_mean), flat(batch_m2)
    features.running.call(*vectors, rate, correction, new)
    new.setflags(write=False)
    return shaped(new[0], mean.shape), shaped(new[1], mean.shape)


def signature(x: ndarray, *of_features: Any) -> tuple[Any, ...] | None:
    if type(x) is not np.ndarray or x.size == 0:
        return None
    found: list[Any] = [x.dtype, x.shape, x.strides]
    for each in of_features:
        if each is None:
            found.append(None)
        elif type(each) is np.ndarray:
            found += each.dtype, each.shape, each.strides
        else:
            return None
    return tuple(found)


def _layout(x: Any) -> tuple[Any, ...] | None:
    return (x.dtype, x.shape, x.strides) if type(x) is np.ndarray else None


def _is_free(out: ndarray, *others: ndarray | None) -> bool:
    return out.flags.writeable and not any(each is not None and np.may_share_memory(out, each) for each in others)


_arrays = _again.Library(
    look=_memory,
    layout=_layout,
    is_free=_is_free,
    will_write=lambda out: None,
    place=id,
    empty_like=np.empty_like,
    empty=np.empty,
    vector=_contiguous,
    is_contiguous=lambda array: array.flags.c_contiguous,
    is_object=True,
)


def again(call: Any) -> _again.Training | _again.Evaluation | None:
    return _again.plan(_arrays, call) if _HAS_HEADERS else None


def signature_of_gradient(dy: Any, x: ndarray) -> tuple[Any, ...] | None:
    if type(dy) is np.ndarray and dy.dtype in _FLOATS and dy.shape == x.shape:
        return dy.dtype, dy.strides
    return None


_strided_verbs = _strided.Adapter(_memory, empty_like)
moments = _strided_verbs.moments
forward = _strided_verbs.forward
backward = _strided_verbs.backward
normalize = _strided_verbs.normalize
grad_sums = _strided_verbs.grad_sums
grad_input = _strided_verbs.grad_input
