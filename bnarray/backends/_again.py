"""A call like one before, on arrays in the CPU's memory: small ones in one entry into compiled code.

Checks and plans follow from types, shapes, strides and options (the call's *signature*); the next call with the same
ones needs neither. What is not plain sailing (numbers beyond float32, statistics that are not finite, another thread's
update at the same moment) comes back as None before anything has changed: such a call goes the way of a first one.

On arrays that threads share the work is done kernel by kernel.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from math import prod
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from bnarray.backends._strided import (
    NONE,
    WORTH_SHARING,
    Memory,
    Step,
    backward_step,
    common_kind,
    forward_step,
    grad_input_step,
    grad_sums_step,
    moments_step,
    normalize_step,
)
from bnarray.dispatch import Array, Transform
from bnarray.kernels.cpu import gate, grad_input, grad_sums, memory, moments, whole
from bnarray.layout import features_shape, split
from bnarray.stats import Moments, RunningStats, is_number

Vector: TypeAlias = npt.NDArray[np.float64]
Vectors: TypeAlias = npt.NDArray[np.float64]  # a row each for mean, m2, weight and bias


class Library(NamedTuple):
    """How the arrays of a library are handled."""

    look: Callable[[Array], Memory]
    layout: Callable[[Any], Any]  # what plans follow from; None of what is more, or other, than an array of the library
    is_free: Callable[..., bool]  # whether an array may be written, and shares no memory with those after it
    will_write: Callable[[Array], None]  # to be told of an array of the caller's
    place: Callable[[Array | None], int]  # what compiled code takes for an array: its memory's address, or NumPy's id
    empty_like: Callable[[Array], Array]
    empty: Callable[..., Array]  # of a shape and dtype
    vector: Callable[[Array], Vector]  # a per-feature array's values, together, in float64
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

    #: Whether one thread does the work.
    is_small = False

    def __init__(self, library: Library, call: Any, kinds: tuple[int, int]) -> None:
        self._library, self._kinds = library, kinds
        self._kept, self._eps, self._relu = call.kept, call.eps, call.relu
        self._has_weight, self._has_bias = call.weight is not None, call.bias is not None
        seen = library.look(call.x)
        self._features = features_shape(seen.shape, call.kept)
        self._size = prod(self._features)
        self._count = prod(seen.shape) // self._size
        self._kind = seen.kind
        self._layout = library.layout(library.empty_like(call.x))
        #: Of weight and bias, and so of their gradients.
        self.dtypes = tuple(None if each is None else each.dtype for each in (call.weight, call.bias))

    def writes(self, out: Any, stats: RunningStats | Moments | None, *others: Array | None) -> bool:
        """Whether out can be written at once: laid out as here, apart from other arrays, and no call that may raise."""
        is_like = self._library.layout(out) == self._layout and self._library.is_free(out, *others)
        return is_like and self._is_sure(stats)

    def _is_sure(self, stats: Any) -> bool:
        """Whether no numbers in x can keep the call from ending well."""
        return True

    def _result(self, x: Array, out: Array | None) -> Array:
        if out is None:
            return self._library.empty_like(x)
        self._library.will_write(out)
        return out

    def _sheet(self, kernel: int = memory.NOWHERE, dy_kind: int = whole.NONE) -> npt.NDArray[np.int64]:
        kinds = self._kind, dy_kind, self._relu, *self._kinds
        return np.array((kernel, self._library.is_object, *kinds, self._count), np.int64)

    def _entered(self, step: Step, dy_kind: int = whole.NONE) -> _Entry:
        room = step.room + whole.ROOM + 8 * whole.SUMS * self._size
        return _Entry(room, self._sheet(step.kernel.address, dy_kind), step.grid, step.axes, step)

    def _parameters(self, vectors: Vectors) -> tuple[Vector, Vector]:
        return vectors[2] if self._has_weight else NONE, vectors[3] if self._has_bias else NONE

    def _transform(self, vectors: Vectors, count: int) -> Transform:
        mean, m2, weight, bias = vectors if len(self._features) == 1 else vectors.reshape(4, *self._features)
        return Transform(
            *(self._kept, count, mean, m2, self._eps),
            *(weight if self._has_weight else None, bias if self._has_bias else None),
            *(self._relu, None),
        )


class Training(_Again, ABC):
    """Calls that normalise by the batch's own statistics."""

    def __init__(self, library: Library, call: Any, kinds: tuple[int, int]) -> None:
        super().__init__(library, call, kinds)
        if call.stats is not None:
            self._rate, self._correction = call.stats.update_rate, call.stats.correction

    def _is_sure(self, stats: RunningStats | None) -> bool:
        return stats is None or stats.is_sure(self._count)

    @abstractmethod
    def forward(
        self, x: Array, weight: Any, bias: Any, stats: RunningStats | None, out: Array | None
    ) -> tuple[Array, Vectors] | None:
        """Return y and the vectors, with `stats` updated."""

    @abstractmethod
    def backward(
        self, dy: Array, signature: Any, x: Array, vectors: Vectors, out: Array | None
    ) -> tuple[Array, Any, Any] | None:
        """Return (dx, dweight, dbias), for a gradient that is known to fit; `signature` tells its dtype and strides."""

    def transform(self, vectors: Vectors) -> Transform:
        """What was done to x."""
        return self._transform(vectors, self._count)

    def _empty_gradients(self) -> tuple[Any, Any]:
        """Memory for dweight and dbias."""
        weight_dtype, bias_dtype = self.dtypes
        dweight = None if weight_dtype is None else self._library.empty(self._features, dtype=weight_dtype)
        dbias = None if bias_dtype is None else self._library.empty(self._features, dtype=bias_dtype)
        return dweight, dbias

    def _exchange(self, stats: RunningStats, state: Any, new: Vectors) -> bool:
        new.setflags(write=False)
        mean, var = new if len(self._features) == 1 else new.reshape(2, *self._features)
        return stats.exchange(state, self._count, mean, var)


class Evaluation(_Again, ABC):
    """Calls that normalise by running statistics."""

    def transform(self, vectors: Vectors) -> Transform:
        """What was done to x."""
        return self._transform(vectors, 1)

    def _given(self, stats: RunningStats | Moments) -> tuple[Vector, Vector] | None:
        """Mean and variance, if they are at hand. (A count of 1 makes m2 a variance.)"""
        if isinstance(stats, Moments):
            return self._library.vector(stats.mean), self._library.vector(stats.m2)
        mean, var = stats.mean_and_var()
        return (mean, var) if type(mean) is np.ndarray else None

    @abstractmethod
    def forward(
        self, x: Array, weight: Any, bias: Any, stats: RunningStats | Moments, out: Array | None
    ) -> tuple[Array, Vectors] | None:
        """Return y and the vectors."""

    def backward(self, dy: Array, signature: Any, x: Array, vectors: Vectors, out: Array | None) -> None:
        """Where statistics were given there is nothing that is done in one go."""


class SmallTraining(Training):
    """Of arrays that one thread is enough for."""

    is_small = True

    def __init__(self, library: Library, call: Any, kinds: tuple[int, int], step: Step) -> None:
        super().__init__(library, call, kinds)
        self._entry = self._entered(step)
        self._back: dict[Any, _Entry | None] = {}

    def forward(
        self, x: Array, weight: Any, bias: Any, stats: RunningStats | None, out: Array | None
    ) -> tuple[Array, Vectors] | None:
        place, entry = self._library.place, self._entry
        y, vectors = self._result(x, out), np.empty((4, self._size))
        if stats is None:
            ended = whole.train.call(
                np.empty(entry.room, np.uint8), entry.sheet, entry.grid, entry.axes,
                place(x), place(y), place(weight), place(bias), self._eps, vectors,
                memory.NOWHERE, memory.NOWHERE, 0.0, 0.0, vectors,
            )  # fmt: skip
            return None if ended else (y, vectors)
        state = stats.state
        if not _is_plain(stats, state):
            return None
        new = np.empty((2, self._size))
        if whole.train.call(
            np.empty(entry.room, np.uint8), entry.sheet, entry.grid, entry.axes,
            place(x), place(y), place(weight), place(bias), self._eps, vectors,
            id(state.mean), id(state.var), self._rate, self._correction, new,
        ):  # fmt: skip
            return None
        return (y, vectors) if self._exchange(stats, state, new) else None

    def _entered_back(self, dy: Array, x: Array) -> _Entry | None:
        seen, seen_dy, like = (self._library.look(each) for each in (x, dy, self._library.empty_like(x)))
        passed = gate.RELU if self._relu else gate.OPEN
        kind = common_kind(seen.kind, seen_dy.kind)
        step = backward_step(kind, seen.shape, self._kept, passed, seen.strides, seen_dy.strides, like.strides)
        return step and self._entered(step, seen_dy.kind)

    def backward(
        self, dy: Array, signature: Any, x: Array, vectors: Vectors, out: Array | None
    ) -> tuple[Array, Any, Any] | None:
        if signature not in self._back:
            self._back[signature] = self._entered_back(dy, x)
        entry = self._back[signature]
        if entry is None:
            return None
        place, dx, (dweight, dbias) = self._library.place, self._result(x, out), self._empty_gradients()
        if whole.go_back.call(
            np.empty(entry.room, np.uint8), entry.sheet, entry.grid, entry.axes,
            place(dy), place(x), place(dx), self._eps, vectors, place(dweight), place(dbias),
        ):  # fmt: skip
            return None
        return dx, dweight, dbias


class SmallEvaluation(Evaluation):
    """Of arrays that one thread is enough for."""

    is_small = True

    def __init__(self, library: Library, call: Any, kinds: tuple[int, int], step: Step) -> None:
        super().__init__(library, call, kinds)
        self._entry = self._entered(step)

    def forward(
        self, x: Array, weight: Any, bias: Any, stats: RunningStats | Moments, out: Array | None
    ) -> tuple[Array, Vectors] | None:
        given = self._given(stats)
        if given is None:
            return None
        mean, var = given
        place, entry = self._library.place, self._entry
        y, vectors = self._result(x, out), np.empty((4, self._size))
        if whole.evaluate.call(
            np.empty(entry.room, np.uint8), entry.sheet, entry.grid, entry.axes,
            place(x), place(y), place(weight), place(bias), self._eps, vectors, id(mean), id(var),
        ):  # fmt: skip
            return None
        return y, vectors


class _Back(NamedTuple):
    """How a gradient is found: both in one go, or sums and then the gradient."""

    sheet: npt.NDArray[np.int64]
    joint: Step | None
    sums: Step
    gradient: Step


class SharedTraining(Training):
    """Of arrays that threads share."""

    def __init__(
        self, library: Library, call: Any, kinds: tuple[int, int], joint: Step | None, sums: Step, normal: Step
    ) -> None:
        super().__init__(library, call, kinds)
        self._joint, self._sums, self._normal = joint, sums, normal
        self._on_sheet = self._sheet()
        self._ways_back: dict[Any, _Back] = {}

    def _write(self, x: Memory, y: Memory, vectors: Vectors, is_given: bool) -> bool:
        """Find mean and m2, and write y; return whether float32 does."""
        mean, m2, parameters = vectors[0], vectors[1], self._parameters(vectors)
        statistics = float(self._count), NONE, mean, m2, self._eps, *parameters
        if self._joint is not None:
            return self._joint.into(is_given).attempt(x, (y,), x.address, y.address, x.kind, self._relu, *statistics)
        found = np.zeros((4, self._sums.groups, self._size))
        if not self._sums.attempt(x, (), x.address, x.kind, memory.NOWHERE, memory.BOOL, *found):
            return False
        moments.merge_groups.call(*found, mean)
        vectors[1] = found[3, 0]
        operands = x.address, y.address, x.address, x.kind, False, self._relu
        return self._normal.into(is_given).attempt(x, (y,), *operands, *statistics)

    def forward(
        self, x: Array, weight: Any, bias: Any, stats: RunningStats | None, out: Array | None
    ) -> tuple[Array, Vectors] | None:
        library = self._library
        y, vectors = self._result(x, out), np.empty((4, self._size))
        whole.begin.call(
            self._on_sheet, library.place(weight), library.place(bias), vectors, memory.NOWHERE, memory.NOWHERE
        )
        if stats is not None and not _is_plain(stats, stats.state):
            return None
        if not self._write(library.look(x), library.look(y), vectors, out is not None):
            return None
        if stats is None:
            return y, vectors
        while _is_plain(stats, state := stats.state):
            new = np.empty((2, self._size))
            statistics = float(self._count), vectors, id(state.mean), id(state.var)
            if whole.follow.call(*statistics, self._rate, self._correction, new):
                return None
            if self._exchange(stats, state, new):
                return y, vectors
        return None

    def _way_back(self, dy: Array, x: Array) -> _Back:
        seen, seen_dy, like = (self._library.look(each) for each in (x, dy, self._library.empty_like(x)))
        passed = gate.RELU if self._relu else gate.OPEN
        plan = common_kind(seen.kind, seen_dy.kind), seen.shape, self._kept, passed
        strides = seen.strides, seen_dy.strides
        others = seen_dy.strides, like.strides, seen.strides, seen.strides, seen.strides
        return _Back(
            self._sheet(dy_kind=seen_dy.kind),
            backward_step(*plan, *strides, like.strides),
            grad_sums_step(*plan, (), *strides, seen.strides),
            grad_input_step(*plan, grad_input.BATCH, seen.strides, *others),
        )

    def backward(
        self, dy: Array, signature: Any, x: Array, vectors: Vectors, out: Array | None
    ) -> tuple[Array, Any, Any] | None:
        library = self._library
        if signature not in self._ways_back:
            self._ways_back[signature] = self._way_back(dy, x)
        way = self._ways_back[signature]
        dx, (dweight, dbias) = self._result(x, out), self._empty_gradients()
        seen, seen_dy, seen_dx = (library.look(each) for each in (x, dy, dx))
        others, kinds, count = (seen_dy, seen_dx), (seen.kind, seen_dy.kind), float(self._count)
        statistics = count, NONE, vectors[0], vectors[1], self._eps, *self._parameters(vectors)
        at, dy_at, dx_at = seen.address, seen_dy.address, seen_dx.address
        if way.joint is not None:
            sums = np.empty((2, self._size))
            if not way.joint.into(out is not None).attempt(seen, others, at, dy_at, dx_at, *kinds, *statistics, *sums):
                return None
        else:
            parts = np.zeros((2, way.sums.groups, self._size))
            if not way.sums.attempt(seen, others, at, dy_at, at, *kinds, *statistics, *parts):
                return None
            grad_sums.add_groups.call(*parts, count, NONE, vectors[1], self._eps)
            sums = parts[:, 0]
            operands = at, dy_at, dx_at, at, at, at, *kinds, seen.kind, False
            if not way.gradient.into(out is not None).attempt(seen, others, *operands, *statistics, *sums):
                return None
        whole.write_sums.call(way.sheet, sums[0], sums[1], library.place(dweight), library.place(dbias))
        return dx, dweight, dbias


class SharedEvaluation(Evaluation):
    """Of arrays that threads share."""

    def __init__(self, library: Library, call: Any, kinds: tuple[int, int], step: Step) -> None:
        super().__init__(library, call, kinds)
        self._step, self._on_sheet = step, self._sheet()

    def forward(
        self, x: Array, weight: Any, bias: Any, stats: RunningStats | Moments, out: Array | None
    ) -> tuple[Array, Vectors] | None:
        given = self._given(stats)
        if given is None:
            return None
        mean, var = given
        library = self._library
        y, vectors = self._result(x, out), np.empty((4, self._size))
        whole.begin.call(self._on_sheet, library.place(weight), library.place(bias), vectors, id(mean), id(var))
        seen, seen_y = library.look(x), library.look(y)
        operands = seen.address, seen_y.address, seen.address, seen.kind, False, self._relu
        statistics = 1.0, NONE, vectors[0], vectors[1], self._eps, *self._parameters(vectors)
        return (
            (y, vectors) if self._step.into(out is not None).attempt(seen, (seen_y,), *operands, *statistics) else None
        )


def _is_plain(stats: RunningStats, state: Any) -> bool:
    """Whether compiled code can follow the batch in a state."""
    return type(state.mean) is np.ndarray and is_number(state.count) and not stats.is_frozen()


def plan(library: Library, call: Any) -> Training | Evaluation | None:
    """Return what makes calls like one that has been made; None if they go that way again."""
    parameters = [each for each in (call.weight, call.bias) if each is not None]
    if not all(library.is_contiguous(each) for each in parameters):
        return None
    weight, bias = (whole.NONE if each is None else library.look(each).kind for each in (call.weight, call.bias))
    x, y = library.look(call.x), library.look(library.empty_like(call.x))
    is_small = prod(x.shape) < WORTH_SHARING
    if split(x.shape, call.kept, x.strides):
        return None
    if not call.training:
        step = normalize_step(x.kind, x.shape, call.kept, False, x.strides, y.strides, x.strides)
        return (SmallEvaluation if is_small else SharedEvaluation)(library, call, (weight, bias), step)
    if call.stats is not None and call.stats.update_rate is None:
        return None
    joint = forward_step(x.kind, x.shape, call.kept, x.strides, y.strides)
    if is_small:
        return joint and SmallTraining(library, call, (weight, bias), joint)
    sums = moments_step(x.kind, x.shape, call.kept, x.strides)
    normal = normalize_step(x.kind, x.shape, call.kept, False, x.strides, y.strides, x.strides)
    return SharedTraining(library, call, (weight, bias), joint, sums, normal)
