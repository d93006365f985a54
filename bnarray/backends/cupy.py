"""CuPy arrays, through the CUDA kernels: on their device, on CuPy's current stream, in memory from CuPy's pool."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import wraps
from math import inf
from typing import Any

import cupy
import numpy as np
from array_api_compat import cupy as array_api

from bnarray.cuda import missing

if (_obstacle := missing()) is not None:
    raise ImportError(str(_obstacle))

from bnarray.backends import _cuda
from bnarray.backends import numpy as numpy_backend
from bnarray.backends._cuda import Memory
from bnarray.backends._cuda_stats import DeviceStats
from bnarray.backends.generic import Count, namespaces, plain
from bnarray.dispatch import Capabilities, backend
from bnarray.kernels.cuda import memory
from bnarray.kernels.cuda.compiled import make_current
from bnarray.layout import broadcasts
from bnarray.stats import RunningStats

ndarray = Any  # cupy.ndarray, of which there are no types

CAPABILITIES = Capabilities(
    dtypes=("float16", "bfloat16", "float32", "float64"),
    runs="compiled CUDA kernels (not yet run on a GPU)",
    layouts=True,
    devices=True,
)

namespaces[cupy.ndarray] = array_api

_KINDS = {name: kind for kind, name in enumerate(memory.NAMES)}

#: An array's memory type, as CUDA tells it, if a device can work on it.
_OF_DEVICES = (2, 3)  # device memory, managed memory

_NOTHING: AbstractContextManager[None] = nullcontext()


# -- How the adapter sees CuPy -----------------------------------------------------------------------------------------


class Library:
    """CuPy, as `_cuda.Adapter` asks for it."""

    def __init__(self) -> None:
        self._captured: list[ndarray] = []

    def memory(self, x: ndarray) -> Memory:
        size = x.itemsize
        return Memory(x.data.ptr, _KINDS[x.dtype.name], x.shape, tuple([step // size for step in x.strides]))

    def empty_like(self, x: ndarray) -> ndarray:
        return cupy.empty_like(x)

    def vector(self, shape: tuple[int, ...], like: ndarray) -> ndarray:
        array = cupy.empty(shape, np.float64)
        if self.is_capturing(like):
            self._captured.append(
                array
            )  # for good: nobody tells how long a graph writes there, nor the pool that it does
        return array

    def words(self, number: int, like: ndarray) -> tuple[ndarray, int]:
        array = cupy.zeros(number, np.uint32)
        if self.is_capturing(like):
            self._captured.append(array)
        return array, array.data.ptr

    def on_device_of(self, x: ndarray) -> AbstractContextManager[Any]:
        return _NOTHING if x.data.device_id == cupy.cuda.runtime.getDevice() else x.device

    def queue(self, x: ndarray) -> tuple[int, int]:
        make_current(x.data.device_id)
        return x.data.device_id, cupy.cuda.get_current_stream().ptr

    def stream(self, x: ndarray) -> Any:
        return cupy.cuda.get_current_stream()

    def handle(self, stream: Any) -> int:
        return stream.ptr  # type: ignore[no-any-return]

    def is_capturing(self, x: ndarray) -> bool:
        return cupy.cuda.get_current_stream(x.data.device_id).is_capturing()  # type: ignore[no-any-return]


_library = Library()


class Stats(DeviceStats):
    library = _library


def stats_type(like: ndarray) -> type[RunningStats]:
    return Stats


# -- Arrays ------------------------------------------------------------------------------------------------------------


def _checked_memory(x: ndarray, name: str) -> ndarray:
    """x, if it lies in memory of a device; a copy of it if that is not aligned to its elements."""
    if isinstance(x.data.mem, cupy.cuda.UnownedMemory) and x.size:
        about = cupy.cuda.runtime.pointerGetAttributes(x.data.ptr)
        if about.type not in _OF_DEVICES:
            raise ValueError(
                f"{name} lies at {int(x.data.ptr):#x}, which CUDA does not know as memory of a device: it was freed, "
                f"or is the host's; pass a copy made while it was valid, or cupy.asarray of the host's array"
            )
        if about.device != x.data.device_id:
            raise ValueError(
                f"{name} says that it is on device {x.data.device_id}, and its memory is on device {about.device}; "
                f"make the array inside 'with cupy.cuda.Device({about.device}):'"
            )
    size = x.itemsize
    is_aligned = x.data.ptr % size == 0 and all(step % size == 0 for step in x.strides)
    return x if is_aligned else x.copy()


def check(x: ndarray, name: str) -> ndarray:
    if _KINDS.get(x.dtype.name, memory.BOOL) == memory.BOOL:
        raise TypeError(
            f"{name} has dtype {x.dtype}; it should be float16, bfloat16, float32 or float64: convert it, for example "
            f"by {name}.astype(cupy.float32)"
        )
    return _checked_memory(x, name)


def check_where(x: ndarray, where: ndarray) -> ndarray:
    if where.dtype.name not in _KINDS:
        raise TypeError(f"where has dtype {where.dtype}; it should be boolean (a mask) or floating (weights)")
    if not broadcasts(where.shape, x.shape):
        raise ValueError(f"where has shape {where.shape}; it should broadcast to x's, {x.shape}")
    if where.dtype.name != "bool" and values_are_known(where):
        with _library.on_device_of(where):
            if not bool(cupy.all((where >= 0) & cupy.isfinite(where))):
                raise ValueError("where holds a weight that is negative, infinite or NaN; weights should be >= 0")
    return _checked_memory(where, "where")


def values_are_known(x: ndarray) -> bool:
    """Whether a number may be asked for: not amid a capture, where nothing has been computed yet."""
    return not _library.is_capturing(x)


def _addresses(x: ndarray) -> Any:
    return numpy_backend.at_addresses(int(x.data.ptr), x.shape, x.strides, x.itemsize)


def check_out(out: ndarray, x: ndarray, allowed: dict[str, ndarray], forbidden: dict[str, ndarray]) -> None:
    plain.check_out(out, x, {}, {})
    if _checked_memory(out, "out") is not out:
        raise ValueError("out is not aligned to its elements; it should be memory that they can be written to")
    views = [{name: _addresses(each) for name, each in arrays.items()} for arrays in (allowed, forbidden)]
    numpy_backend.check_memory(_addresses(out), *views)


def overlap(a: ndarray, b: ndarray) -> bool:
    return a is b or numpy_backend.overlap(_addresses(a), _addresses(b))


def device(x: ndarray) -> Any:
    return x.device


def empty_like(x: ndarray) -> ndarray:
    with _library.on_device_of(x):
        return _library.empty_like(x)


def zeros(shape: tuple[int, ...], like: ndarray) -> ndarray:
    with _library.on_device_of(like):
        return cupy.zeros(shape, np.float64)


def copy(x: ndarray) -> ndarray:
    with _library.on_device_of(x):
        return x.copy()


def guide(*arrays: ndarray) -> Any:
    return tuple(_library.memory(array).strides for array in arrays)


def widen(x: ndarray) -> ndarray:
    with _library.on_device_of(x):
        return x.astype(np.float64, order="C")


def cast(x: ndarray, dtype: Any) -> ndarray:
    with _library.on_device_of(x):
        return x.astype(dtype, copy=False)


def to_numpy(x: ndarray) -> Any:
    with _library.on_device_of(x):
        return x.get()


def convert(x: Any, like: ndarray) -> ndarray:
    if isinstance(x, cupy.ndarray) and x.data.device_id == like.data.device_id:
        return cast(x, np.float64)
    # By way of the host, which so knows that what the other device, or library, was given to do is done.
    array = backend(x).to_numpy(x)
    with _library.on_device_of(like):
        return cupy.asarray(array, np.float64)


def vector(of_features: Any, x: ndarray, copy: bool = False) -> ndarray:
    array = convert(of_features, x)
    with _library.on_device_of(x):
        return widen(array) if copy else cupy.ascontiguousarray(array)


def of_vector(of_features: ndarray, x: ndarray, dtype: Any = None) -> ndarray:
    return of_features if dtype is None else cast(of_features, dtype)


# -- Verbs -------------------------------------------------------------------------------------------------------------


def _there(verb: Callable[..., Any]) -> Callable[..., Any]:
    """Let CuPy's own functions run where the first array is: CuPy asks for that to be the current device."""

    @wraps(verb)
    def on_device(*args: Any) -> Any:
        with _library.on_device_of(next(each for each in args if isinstance(each, cupy.ndarray))):
            return verb(*args)

    return on_device


variance, sum_of_squares, only_above = _there(plain.variance), _there(plain.sum_of_squares), _there(plain.only_above)
merge, invstd, along, cleared, number = (
    _there(each) for each in (plain.merge, plain.invstd, plain.along, plain.cleared, plain.number)
)

_are_finite, _lowest = _there(plain.is_finite), _there(plain.lowest)

_kernels = _cuda.Adapter(_library)
moments = _kernels.moments
forward = _kernels.forward
normalize = _kernels.normalize
backward = _kernels.backward
grad_sums = _kernels.grad_sums
grad_input = _kernels.grad_input


def is_finite(array: ndarray, other: ndarray | None = None) -> bool:
    return not values_are_known(array) or bool(_are_finite(array, other))


def lowest(array: Count) -> float:
    if isinstance(array, int | float):
        return array
    return float(_lowest(array)) if values_are_known(array) else inf
