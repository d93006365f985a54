"""A pretended CUDA device: kernels run as Python, in the memory of NumPy arrays.

Numba's own simulator starts a thread of the operating system for each one of the device; here they are greenlets, which
is about a hundred times faster, and blocks run in an order that nothing may depend on.
"""

import sys
from collections import defaultdict
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from types import SimpleNamespace
from typing import Any

import numpy as np
from greenlet import getcurrent, greenlet
from numba.cuda import types

from bnarray.backends._cuda import Memory
from bnarray.kernels.cuda import (
    block,
    compiled,
    exact,
    grad_input,
    grad_sums,
    memory,
    moments,
    normalize,
    running,
    walk,
)

_DTYPES = {types.float64: np.float64, types.float32: np.float32}
_KINDS = {name: kind for kind, name in enumerate(memory.NAMES)}


class Pointer(int):
    """The address of an array's first element: indexed by elements from there, as far as the array reaches."""

    _flat: np.ndarray
    _origin: int

    def __new__(cls, array: np.ndarray, steps: tuple[int, ...]) -> "Pointer":
        self = super().__new__(cls, array.ctypes.data)
        if array.dtype.kind != "f":  # bool, and bfloat16, are bits to kernels
            array = array.view(np.uint8 if array.dtype == np.bool else np.uint16)
        reach = [step * (size - 1) for step, size in zip(steps, array.shape, strict=True)]
        self._origin = -sum(each for each in reach if each < 0)
        lowest = array[(*(slice(-1, None) if each < 0 else slice(1) for each in reach), ...)]
        self._flat = np.lib.stride_tricks.as_strided(lowest, (sum(map(abs, reach)) + 1,), (array.itemsize,))
        return self

    def _at(self, i: int) -> int:
        at = self._origin + int(i)
        if not 0 <= at < self._flat.size:
            raise IndexError(f"element {i} is outside of the array")
        return at

    def assert_aligned(self, i: int) -> None:
        """Raise, as a device does, if a vector does not begin at element i."""
        assert (self + int(i) * self._flat.itemsize) % memory.WIDEST == 0, "misaligned"

    def __getitem__(self, i: int) -> Any:
        return self._flat[self._at(i)]

    def __setitem__(self, i: int, value: Any) -> None:
        self._flat[self._at(i)] = value


class Library:
    """NumPy arrays, as if they were on a device."""

    def memory(self, x: np.ndarray) -> Memory:
        steps = tuple(step // x.itemsize for step in x.strides)
        assert all(step % x.itemsize == 0 for step in x.strides)
        return Memory(Pointer(x, steps), _KINDS[x.dtype.name], x.shape, steps)

    def empty_like(self, x: np.ndarray) -> np.ndarray:
        y = np.empty_like(x)
        y[...] = 7  # what is not written shows
        return y

    def vector(self, shape: tuple[int, ...], like: np.ndarray) -> np.ndarray:
        return np.full(shape, np.nan)

    def on_device_of(self, x: np.ndarray) -> AbstractContextManager[None]:
        return nullcontext()

    def queue(self, x: np.ndarray) -> tuple[int, int]:
        return 0, 0


class _Block:
    def __init__(self, number: int) -> None:
        self.number = number
        self.shared: dict[Any, np.ndarray] = {}
        self.votes: defaultdict[int, list[bool]] = defaultdict(list)  # by how many a thread has taken part in


class _Cuda:
    """What kernels find as `cuda`; attributes follow the thread that is running."""

    threadIdx = property(lambda self: SimpleNamespace(x=getcurrent().number))  # noqa: N815
    blockIdx = property(lambda self: SimpleNamespace(x=getcurrent().block.number))  # noqa: N815
    shared = property(lambda self: self)

    def array(self, size: int, dtype: Any) -> np.ndarray:
        frame = sys._getframe(1)
        place = frame.f_code, frame.f_lineno
        shared = getcurrent().block.shared
        if place not in shared:
            shared[place] = np.full(size, np.nan, _DTYPES[dtype])
        return shared[place]

    def syncthreads(self) -> None:
        getcurrent().parent.switch("sync")

    def syncthreads_or(self, predicate: Any) -> int:
        thread = getcurrent()
        votes = thread.block.votes[thread.votes]
        thread.votes += 1
        votes.append(bool(predicate))
        self.syncthreads()
        return int(any(votes))

    @property
    def libdevice(self) -> "_Cuda":
        return self

    def int_as_float(self, bits: np.int32) -> np.float32:
        return bits.view(np.float32)

    def float_as_int(self, value: np.float32) -> np.int32:
        return value.view(np.int32)

    def fma(self, a: Any, b: Any, c: Any) -> Any:
        if isinstance(a, np.float32):  # the product is exact in float64
            return np.float32(np.float64(a) * np.float64(b) + np.float64(c))
        raise NotImplementedError("fused in float64")


def _run_block(function: Callable[..., None], number: int, arguments: tuple[Any, ...]) -> None:
    block, threads = _Block(number), []
    for i in range(compiled.THREADS):
        thread = greenlet(function)
        thread.number, thread.block, thread.votes = i, block, 0
        threads.append(thread)
    waiting = [thread.switch(*arguments) == "sync" for thread in threads]
    while any(waiting):
        if not all(waiting):
            raise RuntimeError("threads of a block wait for others that have ended")
        waiting = [thread.switch() == "sync" for thread in threads]


def launch(self: Any, device: int, stream: int, blocks: int, *arguments: Any) -> None:
    """Stands in for `Kernel.launch`."""
    wanted = len(self.signature.args)
    if len(arguments) != wanted:
        raise TypeError(f"{self.name} takes {wanted} arguments, not {len(arguments)}")

    def thread(*arguments: Any) -> None:
        with np.errstate(all="ignore"):  # which each greenlet has for itself
            self.function(*arguments)

    def work() -> None:
        for number in np.random.default_rng(blocks).permutation(blocks):
            _run_block(thread, int(number), arguments)

    give(device, stream, work)


def give(device: int, stream: int, work: Callable[[], None]) -> None:
    """Have work done: at once, where no double of a library has streams."""
    work()


def _load_elements(width: int) -> Callable[[Pointer, int], tuple[Any, ...]]:
    def load(array: Pointer, i: int) -> tuple[Any, ...]:
        array.assert_aligned(i)
        return tuple(array[i + k] for k in range(width))

    return load


def _store_elements(width: int) -> Callable[[Pointer, int, tuple[Any, ...]], None]:
    def store(array: Pointer, i: int, elements: tuple[Any, ...]) -> None:
        array.assert_aligned(i)
        for k, element in zip(range(width), elements, strict=True):
            array[i + k] = element

    return store


def install() -> None:
    """Let launches run here."""
    for module in (normalize, grad_input):
        module.load_elements, module.store_elements = _load_elements, _store_elements
    compiled.Kernel.launch = launch
    compiled.make_current = lambda device: None
    for module in (block, compiled, exact, grad_input, grad_sums, memory, moments, normalize, running, walk):
        if hasattr(module, "cuda"):
            module.cuda = _Cuda()
