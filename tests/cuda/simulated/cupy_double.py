"""A double of CuPy: its arrays lie in NumPy's memory, its kernels are the simulator's, and its devices are lazy.

What a stream is given to do is done when somebody waits for it, and of other streams then no more than marks ask for.
So a result shows whether the order of streams was asked for, and nothing else orders them. The double also counts how
often the host waits, and what it sends; a wait amid a capture raises, as CUDA's does.
"""

import itertools
import operator
import sys
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np

from tests.cuda.simulated.simulator import Pointer

# -- Streams -----------------------------------------------------------------------------------------------------------


class Machine:
    """The devices, and what was asked of them."""

    def __init__(self) -> None:
        self.device = 0
        self.waits = 0  # of the host for a device
        self.uploads = 0  # from the host to a device
        self.foreign = 2  # the type of memory that is not CuPy's own
        self.streams: dict[int, Stream] = {}
        self.current: dict[int, Stream] = {}

    def stream(self, device: int | None = None) -> "Stream":
        device = self.device if device is None else device
        return self.current.setdefault(device, Stream(device))

    def wait(self) -> None:
        self.waits += 1
        self.stream().synchronize()


class Stream:
    """Tasks in their order; those of a capture are kept instead."""

    _handles = itertools.count(1000)

    def __init__(self, device: int | None = None, non_blocking: bool = False) -> None:
        self.device = machine.device if device is None else device
        self.ptr = next(self._handles)
        self.given = self.done = 0
        self._tasks: list[Callable[[], None]] = []
        self._captured: list[Callable[[], None]] | None = None
        self._before: list[Stream] = []
        machine.streams[self.ptr] = self

    def give(self, task: Callable[[], None]) -> None:
        if self._captured is not None:
            self._captured.append(task)
            return
        self._tasks.append(task)
        self.given += 1

    def run_until(self, number: int) -> None:
        while self.done < number:
            self._tasks.pop(0)()
            self.done += 1

    def synchronize(self) -> None:
        if self.is_capturing():
            raise RuntimeError("operation not permitted when stream is capturing")
        self.run_until(self.given)

    def is_capturing(self) -> bool:
        return self._captured is not None

    def begin_capture(self) -> None:
        self._captured = []

    def end_capture(self) -> "Graph":
        assert self._captured is not None
        graph, self._captured = Graph(self._captured), None
        return graph

    def __enter__(self) -> "Stream":
        self._before.append(machine.stream(self.device))
        machine.current[self.device] = self
        return self

    def __exit__(self, *_: object) -> None:
        machine.current[self.device] = self._before.pop()


class Graph:
    def __init__(self, tasks: list[Callable[[], None]]) -> None:
        self._tasks = tasks

    def launch(self) -> None:
        for task in self._tasks:
            machine.stream().give(task)


class Mark:
    """Stands in for `kernels.cuda.streams.Mark`."""

    def __init__(self, device: int) -> None:
        assert device == machine.device
        self._stream, self._number = None, 0

    def set(self, stream: int) -> None:
        assert not machine.streams[stream].is_capturing(), "a mark amid a capture"
        self._stream, self._number = machine.streams[stream], machine.streams[stream].given

    def await_by(self, stream: int) -> None:
        assert not machine.streams[stream].is_capturing(), "dependency on uncaptured work"
        marked, number = self._stream, self._number
        if marked is not None:
            machine.streams[stream].give(lambda: marked.run_until(number))


def give(device: int, stream: int, task: Callable[[], None]) -> None:
    """How the simulator hands over a launch; one on stream 0 is for no double."""
    if stream == 0:
        task()
        return
    assert device == machine.device == machine.streams[stream].device
    machine.streams[stream].give(task)


machine = Machine()


class Device:
    def __init__(self, number: int) -> None:
        self.id = number
        self._before: list[int] = []

    def __enter__(self) -> "Device":
        self._before.append(machine.device)
        machine.device = self.id
        return self

    def __exit__(self, *_: object) -> None:
        machine.device = self._before.pop()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Device) and other.id == self.id

    def __hash__(self) -> int:
        return hash(self.id)

    def __repr__(self) -> str:
        return f"<CUDA Device {self.id}>"


# -- Arrays ------------------------------------------------------------------------------------------------------------


class UnownedMemory:
    """Memory that is not from CuPy's pool."""


class ndarray:  # noqa: N801
    """An array on a device; whoever wants its numbers has to wait for them."""

    __module__ = "cupy"
    __array_ufunc__ = None

    def __init__(self, array: np.ndarray, device: int | None = None, mem: Any = None) -> None:
        self._array = array
        self.device = Device(machine.device if device is None else device)
        self._mem = mem

    def __array__(self, *_: object, **__: object) -> np.ndarray:
        raise TypeError("Implicit conversion to a NumPy array is not allowed. Please use `.get()`")

    shape = property(lambda self: self._array.shape)
    ndim = property(lambda self: self._array.ndim)
    size = property(lambda self: self._array.size)
    dtype = property(lambda self: self._array.dtype)
    itemsize = property(lambda self: self._array.itemsize)
    nbytes = property(lambda self: self._array.nbytes)
    strides = property(lambda self: self._array.strides)
    T = property(lambda self: ndarray(self._array.T, self.device.id, self._mem))

    @property
    def data(self) -> Any:
        steps = tuple(step // self.itemsize for step in self.strides)
        return SimpleNamespace(ptr=Pointer(self._array, steps), device_id=self.device.id, mem=self._mem)

    def get(self) -> np.ndarray:
        machine.wait()
        return self._array.copy()

    def item(self) -> Any:
        return self.get().item()

    __bool__ = lambda self: bool(self.get())  # noqa: E731
    __float__ = lambda self: float(self.get())  # noqa: E731
    __int__ = lambda self: int(self.get())  # noqa: E731

    def __getitem__(self, key: Any) -> "ndarray":
        return _do(operator.getitem, self, key)

    def __setitem__(self, key: Any, value: Any) -> None:
        source = value._array if isinstance(value, ndarray) else value
        assert not isinstance(source, np.ndarray) or isinstance(value, ndarray)
        assert self.device.id == machine.device, "on another device"
        machine.stream().give(lambda: self._array.__setitem__(key, source))

    def astype(self, dtype: Any, order: str = "K", copy: bool = True) -> "ndarray":
        if not copy and self.dtype == dtype:
            return self
        return _do(lambda array: np.array(array, dtype, order=order, copy=True), self)

    def copy(self, order: str = "K") -> "ndarray":
        return _do(lambda array: array.copy(order), self)

    def reshape(self, *shape: Any) -> "ndarray":
        return _do(lambda array: array.reshape(*shape), self)

    def view(self, dtype: Any) -> "ndarray":
        return ndarray(self._array.view(dtype), self.device.id, self._mem)


def _plain(value: Any) -> Any:
    return value._array if isinstance(value, ndarray) else value


def _do(function: Callable[..., Any], *arguments: Any, **keywords: Any) -> Any:
    """Let the current stream do something; a view needs nothing to be done."""
    given = [_plain(each) for each in arguments]

    def run() -> np.ndarray:
        with np.errstate(all="ignore"):
            return np.asarray(function(*given, **keywords))

    result = run()
    if any(isinstance(each, np.ndarray) and np.shares_memory(result, each) for each in given):
        mem = next(each._mem for each in arguments if isinstance(each, ndarray))
        device = next(each.device.id for each in arguments if isinstance(each, ndarray))
        return ndarray(result, device, mem)
    for each in arguments:
        assert not isinstance(each, ndarray) or each.device.id == machine.device, "on another device"
    done = np.full_like(result, 7)  # what was not waited for shows
    machine.stream().give(lambda: done.__setitem__(..., run()))
    return ndarray(done)


def _wrapped(function: Callable[..., Any]) -> Callable[..., Any]:
    def wrapper(*arguments: Any, **keywords: Any) -> Any:
        return _do(function, *arguments, **keywords)

    wrapper.__name__ = wrapper.__qualname__ = getattr(function, "__name__", "function")
    return wrapper


def _empty(shape: Any, dtype: Any = float) -> ndarray:
    return ndarray(np.full(shape, 7, dtype))


def _empty_like(x: ndarray) -> ndarray:
    y = np.empty_like(x._array)
    y[...] = 7
    return ndarray(y)


def asarray(x: Any, dtype: Any = None, **_: Any) -> ndarray:
    """An array of NumPy's is sent."""
    if isinstance(x, ndarray):
        return x if dtype is None else x.astype(dtype, copy=False)
    machine.uploads += 1
    return ndarray(np.array(x, dtype))


def _operate(name: str) -> None:
    operation, plain_name = getattr(operator, name), name.rstrip("_")
    setattr(ndarray, f"__{plain_name}__", lambda *operands: _do(operation, *operands))
    setattr(ndarray, f"__r{plain_name}__", lambda self, other: _do(operation, other, self))


for _name in (
    "add",
    "sub",
    "mul",
    "truediv",
    "pow",
    "lt",
    "le",
    "gt",
    "ge",
    "eq",
    "ne",
    "and_",
    "or_",
    "neg",
    "invert",
):
    _operate(_name)


def install() -> ModuleType:
    """Let `import cupy` find the double."""
    cupy, cuda = ModuleType("cupy"), ModuleType("cupy.cuda")
    for name, value in vars(np).items():
        if not name.startswith("_") and not isinstance(value, ModuleType):
            is_function = callable(value) and not isinstance(value, type)
            setattr(cupy, name, _wrapped(value) if is_function else value)
    cupy.ndarray, cupy.empty, cupy.empty_like, cupy.asarray = ndarray, _empty, _empty_like, asarray  # type: ignore[attr-defined]
    cupy.generic = type("generic", (), {})  # type: ignore[attr-defined]
    cupy.cuda = cuda  # type: ignore[attr-defined]
    cuda.Device, cuda.Stream, cuda.UnownedMemory = Device, Stream, UnownedMemory  # type: ignore[attr-defined]
    cuda.get_current_stream = machine.stream  # type: ignore[attr-defined]
    cuda.runtime = SimpleNamespace(  # type: ignore[attr-defined]
        getDevice=lambda: machine.device,
        pointerGetAttributes=lambda pointer: SimpleNamespace(type=machine.foreign, device=0),
    )
    cuda.device = ModuleType("cupy.cuda.device")  # type: ignore[attr-defined]
    cuda.device.Device = Device
    sys.modules.update({"cupy": cupy, "cupy.cuda": cuda, "cupy.cuda.device": cuda.device})
    for part in (np.linalg, np.fft):  # which array_api_compat looks into
        name = part.__name__.replace("numpy", "cupy")
        sys.modules[name] = ModuleType(name)
        setattr(cupy, name.rpartition(".")[2], sys.modules[name])
        vars(sys.modules[name]).update({each: value for each, value in vars(part).items() if not each.startswith("__")})
    return cupy
