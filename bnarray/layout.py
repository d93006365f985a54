"""Axes and strides, without arrays: how any memory is seen as (outer, C, inner), and cut into tiles.

The axes of x are kept (features) or reduced. Axes of size one are dropped, the reduced ones are sorted as x's memory
has them, and neighbours that memory does not tell apart are joined. What remains is walked in two-dimensional tiles
small enough for the nearest cache, in one of three families:

- *rows*: the fastest axis is a reduced one (channels-first, Fortran order): a tile holds values of one feature;
- *columns*: the fastest axis is a kept one (channels-last, (N, C)): a tile holds rows of many features;
- *lines*: as rows, but each line of a tile is of another feature. For element-wise work, which does not need a
  feature's values together, so that memory is walked in its own order.

A tile goes `across` the fastest axis and `down` another one: the last outer one, or (lines) the last feature axis. All
other axes only locate tiles. Few features that lie together are first put side by side (`split`). Every decision
depends on shapes, axes and strides alone, never on threads or addresses: a result's bits do not either.
"""

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import ceil, prod
from typing import NamedTuple

# Elements. Reasoned from the sizes of caches (32 kB nearest, 1 MB or more next). A sweep of TILE from 4096 to 32768, of
# WIDEST from 128 to 1024 and of ROW_TILE from 2048 to 65536 (Intel Xeon, AVX-512, one thread) changed little.
TILE = 16384  # the most that a tile holds: 64 kB of float32
ROW_TILE = 8192  # what a tile of the rows family aims at: 32 kB of float32
FEW_FEATURES = 8  # fewer features than this are read one by one, as rows with a stride
WIDEST = 1024  # features side by side in a tile
WIDEST_SUMMED = 256  # and in one that is summed: its threads share the features, where there are few values of each
WORTH_SPLITTING = 4096  # elements of an array with fewer features, which lie together
WORTH_LENGTHENING = 65536  # elements of an array whose short lines are seen as fewer long ones
PIECE = 32768  # elements handed to a thread at a time, at least
PIECES = 256  # and not many more pieces than this
GROUP = 256  # values of a feature merged in order, at least: partial results stay small beside x

ROWS, COLUMNS, LINES = range(3)


class Split(NamedTuple):
    """A reduced axis seen as two, of which the faster counts as features, slower than the feature axis itself.

    Few features that lie together (images with three channels) would be read one by one, with a stride. With their
    neighbours they make lines as long as vectors need: (…, c), (…, c), … side by side. Sums of those columns are merged
    as those of groups are.
    """

    reduced: int
    feature: int
    size: int  # of the faster axis

    def _around(self, each: tuple[int, ...], slow: int, fast: int) -> tuple[int, ...]:
        changed = [slow if i == self.reduced else value for i, value in enumerate(each)]
        return *changed[: self.feature], fast, *changed[self.feature :]

    def shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return self._around(shape, shape[self.reduced] // self.size, self.size)

    def strides(self, strides: tuple[int, ...]) -> tuple[int, ...]:
        return self._around(strides, strides[self.reduced] * self.size, strides[self.reduced])

    @property
    def kept(self) -> tuple[int, int]:
        return self.feature, self.feature + 1


class Axis(NamedTuple):
    """A joined axis: its size, and the bytes between its elements in each operand."""

    size: int
    strides: tuple[int, ...]


class Tiling(NamedTuple):
    """How a layout is cut: `chunks` of the reduced axes × `spans` of features, grouped into pieces for threads."""

    family: int
    depth: int  # of a tile, down
    width: int  # of a tile, across
    chunks: int
    spans: int
    chunks_per_group: int  # a group is merged in order, then the groups are
    spans_per_block: int

    @property
    def groups(self) -> int:
        return ceil(self.chunks / self.chunks_per_group)

    @property
    def blocks(self) -> int:
        return ceil(self.spans / self.spans_per_block)

    @property
    def pieces(self) -> int:
        return self.groups * self.blocks


@dataclass(frozen=True, slots=True)
class Layout:
    """Some operands of one shape, seen alike: outer axes and `inner` are reduced, `features` are kept.

    In the columns family `inner` is the fastest kept axis instead, and `features` are the other ones; in the lines
    family `outer` ends with the last kept axis.
    """

    family: int
    outer: tuple[Axis, ...]
    features: tuple[Axis, ...]
    inner: Axis
    element_wise: bool
    times: int = 1  # how often all features stand side by side in `inner`

    @property
    def down(self) -> Axis:
        return self.outer[-1]

    def tiling(self) -> Tiling:
        """Cut into tiles; depends on sizes alone."""
        chunks = prod(axis.size for axis in self.outer[:-1])
        spans = prod(axis.size for axis in self.features)
        if self.family == COLUMNS:
            width = _even(self.inner.size, WIDEST if self.element_wise else WIDEST_SUMMED)
            depth = _even(self.down.size, max(8, min(256, TILE // width)))
            spans *= ceil(self.inner.size / width)
        else:
            width = _even(self.inner.size, ROW_TILE)
            depth = _even(self.down.size, max(1, ROW_TILE // width))
            chunks *= ceil(self.inner.size / width)
        if self.family == LINES:
            spans *= ceil(self.down.size / depth)
        else:
            chunks *= ceil(self.down.size / depth)
        piece = max(1, max(PIECE, chunks * spans * depth * width // PIECES) // (depth * width))
        spans_per_block = min(spans, piece)
        values = depth if self.family == COLUMNS else depth * width
        least = 1 if self.element_wise else ceil(GROUP / values)
        chunks_per_group = min(chunks, max(least, piece // spans_per_block))
        return Tiling(self.family, depth, width, chunks, spans, chunks_per_group, spans_per_block)


def _even(size: int, most: int) -> int:
    """The smallest step that covers size in as few steps as `most` does, so that the last is not much shorter."""
    return ceil(size / ceil(size / most))


def _join(axes: Sequence[Axis]) -> list[Axis]:
    """Join neighbours that every operand steps through as if they were one axis."""
    joined: list[Axis] = []
    for axis in axes:
        if joined:
            slow = joined[-1]
            if all(step == fast * axis.size for step, fast in zip(slow.strides, axis.strides, strict=True)):
                joined[-1] = Axis(slow.size * axis.size, axis.strides)
                continue
        joined.append(axis)
    return joined


def _side_by_side(slow: Axis, fast: Axis) -> tuple[int, Axis, Axis]:
    """Lengthen the lines of features: see as many of them as one, where they lie together.

    Of (100000, 64) seen as 16 lines in one, evaluation took 0.73 of the time (AMD Zen 5).
    """
    together = all(step == each * fast.size for step, each in zip(slow.strides, fast.strides, strict=True))
    if not together or slow.size * fast.size < WORTH_LENGTHENING:
        return 1, slow, fast
    times = max(k for k in range(1, max(1, WIDEST // fast.size) + 1) if slow.size % k == 0)
    lines = Axis(slow.size // times, tuple(times * step for step in slow.strides))
    return times, lines, Axis(times * fast.size, fast.strides)


@lru_cache(maxsize=4096)
def layout(
    shape: tuple[int, ...], kept: tuple[int, ...], *strides: tuple[int, ...], element_wise: bool = False
) -> Layout:
    """Lay out operands of one non-empty shape; the first operand's strides decide the order.

    Parameters
    ----------
    shape
        Of all operands.
    kept
        The feature axes, ascending.
    strides
        For each operand the bytes between elements along each axis.
    element_wise
        Whether nothing is summed.
    """
    still = Axis(1, (0,) * len(strides))
    axes = [Axis(size, tuple(each[i] for each in strides)) for i, size in enumerate(shape)]
    features = _join([axes[i] for i in kept if axes[i].size > 1])
    reduced = [axis for i, axis in enumerate(axes) if i not in kept and axis.size > 1]
    # Broadcast axes (stride 0) are the slowest: what they repeat stays in cache only if it is walked inside them.
    reduced.sort(key=lambda axis: abs(axis.strides[0]) or float("inf"), reverse=True)
    reduced = _join(reduced)
    if features and features[-1].size >= FEW_FEATURES:
        fastest = abs(features[-1].strides[0])
        if not reduced or 0 < fastest < (abs(reduced[-1].strides[0]) or float("inf")):
            if element_wise and len(features) == 1 and reduced:
                times, slow, fast = _side_by_side(reduced[-1], features[0])
                return Layout(COLUMNS, (*reduced[:-1], slow), (), fast, element_wise, times)
            return Layout(COLUMNS, tuple(reduced) or (still,), tuple(features[:-1]), features[-1], element_wise)
    inner = reduced.pop() if reduced else still
    if element_wise:
        last = features.pop() if features else still
        return Layout(LINES, (*reduced, last), tuple(features), inner, element_wise)
    return Layout(ROWS, tuple(reduced) or (still,), tuple(features), inner, element_wise)


@lru_cache(maxsize=4096)
def split(shape: tuple[int, ...], kept: tuple[int, ...], strides: tuple[int, ...]) -> Split | None:
    """Return how to split an axis of an array whose few features lie together; None where that does not help."""
    if len(kept) != 1 or not 1 < shape[kept[0]] < FEW_FEATURES or prod(shape) < WORTH_SPLITTING:
        return None
    features, step = shape[kept[0]], strides[kept[0]]
    for i, size in enumerate(shape):
        if i != kept[0] and size > 1 and strides[i] == features * step:
            most = max(k for k in range(1, WIDEST_SUMMED // features + 1) if size % k == 0)
            return Split(i, kept[0], most) if most >= FEW_FEATURES else None
    return None


def kept_axes(axis: object, ndim: int) -> tuple[int, ...]:
    """Return the feature axes, ascending and counted from the start.

    Raises
    ------
    TypeError
        If axis is neither an integer nor a tuple of them.
    ValueError
        If an axis is out of range, or named twice.
    """
    if type(axis) is int and -ndim <= axis < ndim:  # nearly always
        return (axis % ndim,)
    given = axis if isinstance(axis, tuple) else (axis,)
    kept = set()
    for each in given:
        try:
            number = operator.index(each)
        except TypeError:
            raise TypeError(f"axis is {axis!r}; it should be an integer or a tuple of integers") from None
        if not -ndim <= number < ndim:
            way_out = " (axis=() treats the whole array as one feature)" if ndim < 2 else ""
            raise ValueError(f"axis is {axis!r}, but x has {ndim} axes: from {-ndim} to {ndim - 1}{way_out}")
        if number % ndim in kept:
            raise ValueError(f"axis is {axis!r}, which names axis {number % ndim} twice")
        kept.add(number % ndim)
    return tuple(sorted(kept))


def features_shape(shape: Sequence[int], kept: tuple[int, ...]) -> tuple[int, ...]:
    """Return x's sizes along the kept axes."""
    return tuple([shape[i] for i in kept])  # a list is built faster than a generator runs


def along_features(shape: Sequence[int], kept: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape with which an array of the features' shape broadcasts against x."""
    return tuple(size if i in kept else 1 for i, size in enumerate(shape))


def broadcasts(shape: Sequence[int], onto: Sequence[int]) -> bool:
    """Whether an array of the first shape broadcasts to the second."""
    return len(shape) <= len(onto) and all(
        size in (1, other) for size, other in zip(reversed(shape), reversed(onto), strict=False)
    )


def broadcast_strides(shape: tuple[int, ...], strides: tuple[int, ...], onto: tuple[int, ...]) -> tuple[int, ...]:
    """Return the strides with which an array of the first shape is read as one of the second."""
    missing = (0,) * (len(onto) - len(shape))
    return missing + tuple(0 if size == 1 else step for size, step in zip(shape, strides, strict=True))


def varies_along(shape: Sequence[int], ndim: int, kept: tuple[int, ...]) -> bool:
    """Whether an array that broadcasts to `ndim` axes has different values for different features."""
    missing = ndim - len(shape)
    return any(i >= missing and shape[i - missing] != 1 for i in kept)
