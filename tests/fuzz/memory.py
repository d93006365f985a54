"""Arrays at the edges of pages that nobody may touch, among bytes that nobody may change.

A read or a write past the end of such an array ends the process by SIGSEGV, compiled code's too. Where there is room
between an array and the pages, and between its elements, it is filled with bytes that are NaN in every dtype: reading
them shows in results, and writing to them is seen afterwards.
"""

import ctypes
import mmap
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from math import prod
from random import Random
from typing import Any

import numpy as np

from bnarray.backends._strided import LARGE, STREAMED, WORTH_SHARING

PAGE = mmap.PAGESIZE
_PROT_NONE = 0
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


def block(size: int, *, at_end: bool = True) -> np.ndarray:
    """Return so many bytes that end where a protected page begins, or begin where one ends."""
    pages = max(1, -(-size // PAGE))
    whole = np.frombuffer(mmap.mmap(-1, (pages + 2) * PAGE), np.uint8)
    if sys.platform != "win32":
        for guard in (whole.ctypes.data, whole.ctypes.data + (pages + 1) * PAGE):
            if _libc.mprotect(guard, PAGE, _PROT_NONE):
                raise OSError(ctypes.get_errno(), "mprotect")
    inside = whole[PAGE : (pages + 1) * PAGE]
    inside[:] = 0xFF
    return inside[inside.size - size :] if at_end else inside[:size]


def strided(shape: tuple[int, ...], strides: tuple[int, ...], dtype: Any, *, at_end: bool = True) -> np.ndarray:
    """Return an array with these strides whose memory is a block of its own."""
    dtype = np.dtype(dtype)
    if 0 in shape:
        return np.empty(shape, dtype)
    spans = [step * (size - 1) for size, step in zip(shape, strides, strict=True)]
    low, high = sum(min(0, span) for span in spans), sum(max(0, span) for span in spans)
    memory = block(high - low + dtype.itemsize, at_end=at_end)
    return np.ndarray(shape, dtype, memory, -low, strides)


def in_order(shape: tuple[int, ...], order: list[int], steps: list[int], item: int) -> tuple[int, ...]:
    """Return strides by which axes follow one another in memory in some order, each with a step (0: repeated)."""
    strides, size = [0] * len(shape), item
    for axis in reversed(order):
        strides[axis] = steps[axis] * size
        size *= max(1, abs(steps[axis]) * shape[axis])
    return tuple(strides)


class Memory:
    """The arrays that a call is given; afterwards it tells whether any other byte has changed."""

    def __init__(self, random: Random) -> None:
        self._random = random
        self._blocks: list[tuple[np.ndarray, np.ndarray]] = []

    def array(self, values: np.ndarray, *, repeats: bool = True) -> np.ndarray:
        """Return the values in any layout; where elements share memory, some of them."""
        r, shape, item = self._random, values.shape, values.itemsize
        order = r.sample(range(values.ndim), values.ndim)
        steps = [r.choice([1, 1, 1, 1, 2, 3, -1, -2, *([0] if repeats else [])]) for _ in shape]
        if r.random() < 0.6:
            steps, order = [1] * values.ndim, r.choice([sorted(order), order])
        strides = in_order(shape, order, steps, item)
        if repeats and r.random() < 0.05:  # windows that overlap
            strides = tuple(item * r.randint(-3, 3) for _ in shape)
        elif r.random() < 0.1:  # fields of a record: unaligned
            strides = tuple(step // item * (item + 1) for step in strides)
        array = strided(shape, strides, values.dtype, at_end=r.random() < 0.7)
        array[...] = values
        self.remember(array)
        if repeats and r.random() < 0.1:
            array.flags.writeable = False
        return array

    def remember(self, array: np.ndarray) -> None:
        if array.size:
            whole: Any = array
            while isinstance(whole.base, np.ndarray):
                whole = whole.base
            inside = whole[PAGE:-PAGE]
            self._blocks.append((inside, inside.copy()))

    def changed(self, written: np.ndarray | None = None) -> bool:
        """Whether a byte has changed that is not of an element of this array."""
        for memory, before in self._blocks:
            if written is not None and written.size and np.may_share_memory(memory, written):
                same = before.copy()
                offset = written.ctypes.data - memory.ctypes.data
                np.ndarray(written.shape, written.dtype, same, offset, written.strides)[...] = written
                before = same
            if not np.array_equal(memory, before):
                return True
        return False


class _GuardedNumpy:
    """NumPy, but its new arrays end at protected pages."""

    def __getattr__(self, name: str) -> Any:
        return getattr(np, name)

    @staticmethod
    def _moved(array: np.ndarray) -> np.ndarray:
        if array.size == 0 or prod(array.shape) * array.itemsize > 2**28:
            return array
        moved = strided(array.shape, array.strides, array.dtype)
        moved[...] = array
        return moved

    def empty(self, *arguments: Any, **keywords: Any) -> np.ndarray:
        made = np.empty(*arguments, **keywords)
        if made.size == 0 or made.nbytes > 2**28:
            return made
        return strided(made.shape, made.strides, made.dtype)

    def empty_like(self, *arguments: Any, **keywords: Any) -> np.ndarray:
        made = np.empty_like(*arguments, **keywords)
        if made.size == 0 or made.nbytes > 2**28:
            return made
        return strided(made.shape, made.strides, made.dtype)

    def zeros(self, *arguments: Any, **keywords: Any) -> np.ndarray:
        return self._moved(np.zeros(*arguments, **keywords))

    def array(self, *arguments: Any, **keywords: Any) -> np.ndarray:
        return self._moved(np.array(*arguments, **keywords))

    def tile(self, *arguments: Any, **keywords: Any) -> np.ndarray:
        return self._moved(np.tile(*arguments, **keywords))


@contextmanager
def guarded_library() -> Iterator[None]:
    """Let results, vectors, partial sums and scratch memory of the kernels lie at protected pages too."""
    from bnarray.backends import _again, _strided
    from bnarray.backends import numpy as backend
    from bnarray.kernels.cpu import pool

    modules, arrays = (_again, _strided, backend, pool), backend._arrays
    guarded: Any = _GuardedNumpy()
    forget_plans()
    try:
        for module in modules:
            module.np = guarded
        backend._arrays = arrays._replace(empty_like=guarded.empty_like, empty=guarded.empty)
        yield
    finally:
        for module in modules:
            module.np = np
        backend._arrays = arrays
        plan_anew(0)


#: Calls between two times that plans are made anew.
PLANS_LAST = 250


def plan_anew(seed: int) -> None:
    """Give up plans, and make those that follow as for arrays of any size that threads share, or that no cache holds.

    In turns: neither, the first, the second, both.
    """
    from bnarray.backends import _again, _strided

    forget_plans()
    is_large = seed // PLANS_LAST % 4 > 1
    _strided.LARGE, _strided.STREAMED = (1, 1) if is_large else (LARGE, STREAMED)
    for module in (_strided, _again):
        module.WORTH_SHARING = 1 if seed // PLANS_LAST % 2 else WORTH_SHARING  # type: ignore[attr-defined]


def forget_plans() -> None:
    """Give up the kept plans' tables, each of which takes three of the mappings that a process may have."""
    from bnarray import functional
    from bnarray.backends import _strided

    functional._again.clear()
    for each in vars(_strided).values():
        if hasattr(each, "cache_clear"):
            each.cache_clear()
