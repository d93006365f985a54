"""A call like one before, on small arrays in the CPU's memory, in one entry into compiled code.

Checks and plans follow from types, shapes, strides and options (the call's *signature*); the next call with the same
ones needs neither. What is not plain sailing (numbers beyond float32, statistics that are not finite, another thread's
update at the same moment) comes back as None before anything has changed: such a call goes the way of a first one.
"""

from collections.abc import Callable
from math import prod
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from bnarray.backends._strided import Memory, Step, backward_step, forward_step, normalize_step
from bnarray.dispatch import Array, Transform
from bnarray.kernels.cpu import gate, memory, whole
from bnarray.layout import features_shape, split
from bnarray.stats import RunningStats, is_number

Vectors: TypeAlias = npt.NDArray[np.float64]  # a row each for mean, m2, weight and bias


class Library(NamedTuple):
    """How the arrays of a library are handled."""

    look: Callable[[Array], Memory]
    place: Callable[[Array | None], int]  # what compiled code takes for an array: its memory's address, or NumPy's id
    empty_like: Callable[[Array], Array]
    empty: Callable[..., Array]  # of a shape and dtype
    is_contiguous: Callable[[Array], bool]
    is_object: bool  # whether `place` is NumPy's id


class _Entry(NamedTuple):
    """How a kernel is entered: bytes of scratch memory, what compiled code takes after it, and the code's owner."""

    room: int
    sheet: npt.NDArray[np.int64]
    grid: npt.NDArray[np.int64]
    axes: npt.NDArray[np.int64]
    step: Step


class _Again:
    """Calls of one signature; `kinds` are those of weight and bias on the sheet."""

    def __init__(self, library: Library, call: Any, kinds: tuple[int, int], step: Step) -> None:
        self._library, self._kinds = library, kinds
        self._kept, self._eps, self._relu = call.kept, call.eps, call.relu
        self._has_weight, self._has_bias = call.weight is not None, call.bias is not None
        seen = library.look(call.x)
        self._features = features_shape(seen.shape, call.kept)
        self._size = prod(self._features)
        self._count = prod(seen.shape) // self._size
        self._kind = seen.kind
        self._entry = self._entered(step)
        #: Of weight and bias, and so of their gradients.
        self.dtypes = tuple(None if each is None else each.dtype for each in (call.weight, call.bias))

    def _entered(self, step: Step, dy_kind: int = whole.NONE) -> _Entry:
        kinds = self._kind, dy_kind, self._relu, *self._kinds
        sheet = np.array((step.kernel.address, self._library.is_object, *kinds, self._count), np.int64)
        return _Entry(step.room + whole.ROOM + 8 * whole.SUMS * self._size, sheet, step.grid, step.axes, step)

    def _transform(self, vectors: Vectors, count: int) -> Transform:
        mean, m2, weight, bias = vectors if len(self._features) == 1 else vectors.reshape(4, *self._features)
        return Transform(
            *(self._kept, count, mean, m2, self._eps),
            *(weight if self._has_weight else None, bias if self._has_bias else None),
            *(self._relu, None),
        )


class Training(_Again):
    """Calls that normalise by the batch's own statistics."""

    def __init__(self, library: Library, call: Any, kinds: tuple[int, int], step: Step) -> None:
        super().__init__(library, call, kinds, step)
        if call.stats is not None:
            self._rate, self._correction = call.stats.update_rate, call.stats.correction
        self._back: dict[Any, _Entry | None] = {}

    def forward(self, x: Array, weight: Any, bias: Any, stats: RunningStats | None) -> tuple[Array, Vectors] | None:
        """Return y and the vectors, with `stats` updated."""
        place, entry = self._library.place, self._entry
        y, vectors = self._library.empty_like(x), np.empty((4, self._size))
        if stats is None:
            ended = whole.train.call(
                np.empty(entry.room, np.uint8), entry.sheet, entry.grid, entry.axes,
                place(x), place(y), place(weight), place(bias), self._eps, vectors,
                memory.NOWHERE, memory.NOWHERE, 0.0, 0.0, vectors,
            )  # fmt: skip
            return None if ended else (y, vectors)
        state = stats.state
        if type(state.mean) is not np.ndarray or not is_number(state.count) or stats.is_frozen():
            return None
        new = np.empty((2, self._size))
        if whole.train.call(
            np.empty(entry.room, np.uint8), entry.sheet, entry.grid, entry.axes,
            place(x), place(y), place(weight), place(bias), self._eps, vectors,
            id(state.mean), id(state.var), self._rate, self._correction, new,
        ):  # fmt: skip
            return None
        new.setflags(write=False)
        mean, var = new if len(self._features) == 1 else new.reshape(2, *self._features)
        return (y, vectors) if stats.exchange(state, self._count, mean, var) else None

    def transform(self, vectors: Vectors) -> Transform:
        """What was done to x."""
        return self._transform(vectors, self._count)

    def _entered_back(self, dy: Array, x: Array) -> _Entry | None:
        seen, seen_dy, like = (self._library.look(each) for each in (x, dy, self._library.empty_like(x)))
        passed = gate.RELU if self._relu else gate.OPEN
        step = backward_step(seen.kind, seen.shape, self._kept, passed, seen.strides, seen_dy.strides, like.strides)
        return step and self._entered(step, seen_dy.kind)

    def backward(self, dy: Array, signature: Any, x: Array, vectors: Vectors) -> tuple[Array, Any, Any] | None:
        """Return (dx, dweight, dbias), for a gradient that is known to fit; `signature` tells its dtype and strides."""
        if signature not in self._back:
            self._back[signature] = self._entered_back(dy, x)
        entry = self._back[signature]
        if entry is None:
            return None
        library, (weight_dtype, bias_dtype) = self._library, self.dtypes
        place, dx = library.place, library.empty_like(x)
        dweight = None if weight_dtype is None else library.empty(self._features, dtype=weight_dtype)
        dbias = None if bias_dtype is None else library.empty(self._features, dtype=bias_dtype)
        if whole.go_back.call(
            np.empty(entry.room, np.uint8), entry.sheet, entry.grid, entry.axes,
            place(dy), place(x), place(dx), self._eps, vectors, place(dweight), place(dbias),
        ):  # fmt: skip
            return None
        return dx, dweight, dbias


class Evaluation(_Again):
    """Calls that normalise by running statistics."""

    def forward(self, x: Array, weight: Any, bias: Any, stats: RunningStats) -> tuple[Array, Vectors] | None:
        """Return y and the vectors."""
        mean, var = stats.mean_and_var()
        if type(mean) is not np.ndarray:
            return None
        place, entry = self._library.place, self._entry
        y, vectors = self._library.empty_like(x), np.empty((4, self._size))
        if whole.evaluate.call(
            np.empty(entry.room, np.uint8), entry.sheet, entry.grid, entry.axes,
            place(x), place(y), place(weight), place(bias), self._eps, vectors, id(mean), id(var),
        ):  # fmt: skip
            return None
        return y, vectors

    def transform(self, vectors: Vectors) -> Transform:
        """What was done to x."""
        return self._transform(vectors, 1)

    def backward(self, dy: Array, signature: Any, x: Array, vectors: Vectors) -> None:
        """Where statistics were given there is nothing that is done in one go."""


def plan(library: Library, call: Any) -> Training | Evaluation | None:
    """Return what makes calls like one that has been made; None if they go that way again."""
    parameters = [each for each in (call.weight, call.bias) if each is not None]
    if not all(library.is_contiguous(each) for each in parameters):
        return None
    weight, bias = (whole.NONE if each is None else library.look(each).kind for each in (call.weight, call.bias))
    x, y = library.look(call.x), library.look(library.empty_like(call.x))
    if not call.training:
        if split(x.shape, call.kept, x.strides):
            return None
        step = normalize_step(x.kind, x.shape, call.kept, False, x.strides, y.strides, x.strides)
        return Evaluation(library, call, (weight, bias), step)
    if call.stats is not None and call.stats.update_rate is None:
        return None
    joint = forward_step(x.kind, x.shape, call.kept, x.strides, y.strides)
    return joint and Training(library, call, (weight, bias), joint)
