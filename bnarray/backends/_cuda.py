"""The adapter between libraries that hand out memory of CUDA devices and the CUDA kernels.

Arrays come as `Memory`; per-feature vectors are the library's own arrays of float64, contiguous, on the same device.
Planning is cached per combination of shapes, axes and strides; a pass is one launch or two (`_together`), on the
library's current stream, and nothing waits for them.
"""

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import lru_cache, wraps
from math import ceil, prod
from typing import Any, Concatenate, NamedTuple, ParamSpec, Protocol, TypeVar

from bnarray.dispatch import Array, Transform
from bnarray.kernels.cuda import (
    backward,
    forward,
    gate,
    grad_input,
    grad_sums,
    memory,
    moments,
    normalize,
    stage,
    together,
)
from bnarray.kernels.cuda.compiled import Kernel
from bnarray.kernels.cuda.walk import Shape
from bnarray.layout import COLUMNS, Axis, broadcast_strides, features_shape, layout

Strides = tuple[int, ...]

_P = ParamSpec("_P")
_R = TypeVar("_R")

# The most chunks of a feature, which one block merges. Reasoned; no device has judged it yet.
MOST_CHUNKS = 1024

# Features side by side in a block, if memory runs along them: elements that are read together.
WARP = 32

# Features of a thread, if their elements are read at once. More, of half precision, would take more registers for sums
# and coefficients than there are.
ABREAST = 4

#: Where there is no array.
NOWHERE = 0

# The handle by which CUDA means another stream in each thread.
PER_THREAD = 2

# Streams whose counters are kept, and how many of them one has at least.
MOST_STREAMS, FEWEST_WORDS = 64, 4096


class Memory(NamedTuple):
    """An array, as kernels see it: where it begins, one of the kinds of `kernels.cuda.memory`, strides in elements."""

    address: Any
    kind: int
    shape: tuple[int, ...]
    strides: Strides


class Library(Protocol):
    """What the adapter asks of a library."""

    def memory(self, x: Array) -> Memory:
        """Return how kernels see an array; its address and strides are multiples of its elements' size."""

    def empty_like(self, x: Array) -> Array:
        """Return new memory for an array like x."""

    def vector(self, shape: tuple[int, ...], like: Array) -> Array:
        """Return new, contiguous memory for float64 numbers; what is made amid a capture belongs to that."""

    def words(self, number: int, like: Array) -> tuple[Array, Any]:
        """Return new memory for 32-bit integers, which are 0, and its address; as with `vector`, amid a capture."""

    def on_device_of(self, x: Array) -> AbstractContextManager[Any]:
        """Make x's device the one on which memory is made and kernels are launched."""

    def queue(self, x: Array) -> tuple[int, int]:
        """Return the number of x's device, which is the current one, and the handle of its current stream."""

    def stream(self, x: Array) -> Any:
        """Return the current stream of x's device as an object that keeps it alive."""

    def handle(self, stream: Any) -> int:
        """Return a stream's handle."""

    def is_capturing(self, x: Array) -> bool:
        """Whether what the current stream of x's device is given to do is captured, for replays."""


class Plan(NamedTuple):
    """How operands of one shape are cut."""

    shape: Shape
    blocks: int
    tiles: int  # of features
    chunks: int
    features: int
    grid: tuple[Any, ...]  # as all kernels take it
    steps: tuple[Strides, ...]  # of the operands


@lru_cache(maxsize=4096)
def plan(
    shape: tuple[int, ...],
    kept: tuple[int, ...],
    guide: tuple[Strides, ...],
    *strides: Strides,
    most: int,
    width: int = 1,
) -> Plan:
    """Cut operands of one non-empty shape; `guide` are strides that the order follows before any operand's.

    A chunk has at most so many elements, as long as there are not more than `MOST_CHUNKS`. Positions are of `width`
    elements, if all operands have so many together everywhere; of `ABREAST`, if these are of as many features.
    """
    seen = layout(shape, kept, *guide, *strides)
    still = Axis(1, (0,) * (len(guide) + len(strides)))
    reduced, features = seen.outer, seen.features
    if seen.family == COLUMNS:
        features = *features, seen.inner
    else:
        reduced = *reduced, seen.inner
        features = features or (still,)
    if len(reduced) == 1:
        reduced = still, *reduced
    across = 1
    if 0 < abs(features[-1].strides[0]) < (abs(reduced[-1].strides[0]) or float("inf")):
        across = min(WARP, 1 << (features[-1].size - 1).bit_length())
    abreast = across > 1 and width >= ABREAST and _come_in_vectors(features[-1], (*reduced, *features[:-1]), ABREAST)
    if abreast:
        width, across = ABREAST, across // ABREAST
    elif across == 1 and _come_in_vectors(reduced[-1], (*reduced[:-1], *features), width):
        *slower, inner = reduced
        reduced = *slower, Axis(inner.size // width, tuple(step * width for step in inner.strides))
    else:
        width = 1
    positions, count = (prod(axis.size for axis in axes) for axes in (reduced, features))
    chunk = ceil(positions / min(MOST_CHUNKS, ceil(positions * width * across / most)))
    cut = Shape(across, len(reduced) - 1, len(features), width, abreast=abreast)
    chunks, tiles = ceil(positions / chunk), ceil(count / cut.tile)
    axes = *reduced, *features
    step = divmod(cut.lines, reduced[-1].size)
    return Plan(
        cut,
        tiles * chunks,
        tiles,
        chunks,
        count,
        (chunk, chunks, positions, count, *step, tuple(axis.size for axis in axes)),
        tuple(tuple(axis.strides[i] for axis in axes) for i in range(len(guide), len(still.strides))),
    )


def _come_in_vectors(fastest: Axis, others: tuple[Axis, ...], width: int) -> bool:
    """Whether so many elements lie together along the fastest axis, and begin at multiples of as many."""
    together = fastest.size % width == 0 and all(step == 1 for step in fastest.strides)
    return together and all(step % width == 0 for axis in others for step in axis.strides)


def _width(*memories: Memory) -> int:
    """How many elements of arrays of one kind, all aligned to it, are in a device's widest access; else 1."""
    is_aligned = all(each.address % memory.WIDEST == 0 for each in memories)
    return memory.width_of(memories[0].kind) if is_aligned else 1


def _sums_width(kind: int) -> int:
    """How many elements are together in sums. (Float64 is added up one by one.)"""
    return 1 if kind == memory.FLOAT64 else memory.width_of(kind)


def _sums_way(way: Plan, *memories: Memory) -> Plan:
    """The plan for sums, whose order strides and dtype alone decide, with how elements of a position are read."""
    is_apart = way.shape.width > 1 and any(each.address % memory.WIDEST for each in memories)
    return way._replace(shape=way.shape._replace(apart=True)) if is_apart else way


def _together(way: Plan, other: Plan, kind: int, device: int) -> bool:
    """Whether a pass is one launch, in which chunks wait on chip; else it is two. Both have the same bits.

    It is where sums and elements go the same way over memory, elements are at most of 32 bits, vectors are aligned, and
    the blocks of a tile are at most a quarter of those that the device holds at a time: others wait on other streams.
    A chunk that is alone in its tile waits for none. Nothing hangs if there are more (`kernels.cuda.together`), but
    then a block may do the work of many, and no device has told yet where that begins.
    """
    is_same = way._replace(steps=()) == other._replace(steps=()) and way.steps[0] == other.steps[0]
    return is_same and kind != memory.FLOAT64 and not way.shape.apart and way.chunks <= together.most_parts(device)


def _gate(transform: Transform) -> int:
    return gate.OPEN if not transform.relu else gate.RELU if transform.residual is None else gate.RELU_ONTO


def _on_its_device(verb: Callable[Concatenate[Any, Array, _P], _R]) -> Callable[Concatenate[Any, Array, _P], _R]:
    """Let a verb make its memory and launch its kernels where its first array is."""

    @wraps(verb)
    def there(self: Any, x: Array, /, *args: _P.args, **kwargs: _P.kwargs) -> _R:
        with self._library.on_device_of(x):
            return verb(self, x, *args, **kwargs)

    return there


class Adapter:
    """The verbs over the arrays of one library."""

    def __init__(self, library: Library) -> None:
        self._library = library
        self._words: dict[tuple[int, int], tuple[int, Any, Array, Any]] = {}
        self._making = threading.Lock()

    # -- How arrays become arguments -----------------------------------------------------------------------------------

    def _launch(self, kernel: Kernel, blocks: int, x: Array, *arguments: Any) -> None:
        kernel.launch(*self._library.queue(x), blocks, *arguments)

    def _address(self, vector: Array | None) -> Any:
        return NOWHERE if vector is None else self._library.memory(vector).address

    def _vectors(self, number: int, shape: tuple[int, ...], like: Array) -> list[Array]:
        return [self._library.vector(shape, like) for _ in range(number)]

    def _counters(self, way: Plan, x: Array) -> tuple[Array | None, Any]:
        """Return counters for a launch in which blocks report to one another, and their address.

        They are 0, and a launch leaves them so: those of a stream, where launches follow one another, are kept, and
        with them the stream, lest another one has its handle. Captures have their own, and so have the streams that go
        by one handle in all threads.
        """
        if way.chunks == 1:
            return None, NOWHERE
        number = together.needed(way.tiles, way.blocks)
        key = self._library.queue(x)
        if key[1] == PER_THREAD or self._library.is_capturing(x):
            return self._library.words(number, x)
        kept = self._words.get(key)
        if kept is None or kept[0] < number:
            number = max(FEWEST_WORDS, 1 << (number - 1).bit_length())
            words, address = self._library.words(number, x)
            kept = number, address, words, self._library.stream(x)
            with self._making:
                self._words.pop(key, None)
                while len(self._words) >= MOST_STREAMS:
                    del self._words[next(iter(self._words))]
                self._words[key] = kept
        return kept[2], kept[1]

    def _where(self, x: Memory, where: Array) -> Memory:
        seen = self._library.memory(where)
        return seen._replace(shape=x.shape, strides=broadcast_strides(seen.shape, seen.strides, x.shape))

    def _statistics(self, transform: Transform) -> tuple[Any, ...]:
        count = transform.count
        is_number = isinstance(count, int | float)
        return (
            float(count) if is_number else 0.0,
            int(not is_number),
            NOWHERE if is_number else self._address(count),
            self._address(transform.mean),
            self._address(transform.m2),
        )

    def _parameters(self, eps: float, weight: Array | None, bias: Array | None) -> tuple[Any, ...]:
        return float(eps), int(weight is not None), self._address(weight), int(bias is not None), self._address(bias)

    # -- Forward -------------------------------------------------------------------------------------------------------

    def _find_moments(self, x: Array, where: Array | None, way: Plan, found: list[Array]) -> None:
        seen = self._library.memory(x)
        weights = seen if where is None else self._where(seen, where)
        way = _sums_way(way, seen)
        partials = self._library.vector((4, way.chunks, way.features), x)
        _, words = self._counters(way, x)
        x_steps, where_steps = way.steps if where is not None else way.steps * 2
        self._launch(
            moments.kernel(seen.kind, None if where is None else weights.kind, way.shape), way.blocks, x,
            *way.grid, seen.address, x_steps, weights.address, where_steps,
            *(self._address(each) for each in (partials, *found)), words,
        )  # fmt: skip

    @_on_its_device
    def moments(self, x: Array, kept: tuple[int, ...], where: Array | None) -> tuple[Any, Array, Array]:
        seen = self._library.memory(x)
        strides = (seen.strides,) if where is None else (seen.strides, self._where(seen, where).strides)
        most, width = stage.most(seen.kind, 1), _sums_width(seen.kind) if where is None else 1
        way = plan(seen.shape, kept, (), *strides, most=most, width=width)
        found = count, mean, m2 = self._vectors(3, features_shape(seen.shape, kept), x)
        self._find_moments(x, where, way, found)
        return prod(seen.shape) // way.features if where is None else count, mean, m2

    @_on_its_device
    def forward(
        self,
        x: Array,
        kept: tuple[int, ...],
        eps: float,
        weight: Array | None,
        bias: Array | None,
        relu: bool,
        out: Array | None,
    ) -> tuple[int, Array, Array, Array]:
        y = self._library.empty_like(x) if out is None else out
        seen, result = self._library.memory(x), self._library.memory(y)
        most = stage.most(seen.kind, 1)
        sums = plan(seen.shape, kept, (), seen.strides, most=most, width=_sums_width(seen.kind))
        way = plan(seen.shape, kept, (), seen.strides, result.strides, most=most, width=_width(seen, result))
        found = _, mean, m2 = self._vectors(3, features_shape(seen.shape, kept), x)
        if _together(way, sums, seen.kind, self._library.queue(x)[0]):
            partials = self._library.vector((4, way.chunks, way.features), x)
            _, words = self._counters(way, x)
            self._launch(
                forward.kernel(seen.kind, way.shape), way.blocks, x,
                *way.grid, seen.address, way.steps[0], result.address, way.steps[1], int(relu),
                *(self._address(each) for each in (partials, *found)), *self._parameters(eps, weight, bias),
                words, together.PATIENCE,
            )  # fmt: skip
        else:
            self._find_moments(x, None, sums, found)
            transform = Transform(kept, prod(seen.shape) // sums.features, mean, m2, eps, weight, bias, relu, None)
            self._write_normalized(x, transform, y)
        return prod(seen.shape) // sums.features, mean, m2, y

    @_on_its_device
    def normalize(self, x: Array, transform: Transform, out: Array | None) -> Array:
        y = self._library.empty_like(x) if out is None else out
        self._write_normalized(x, transform, y)
        return y

    def _write_normalized(self, x: Array, transform: Transform, y: Array) -> None:
        onto = transform.residual is not None
        seen, result = self._library.memory(x), self._library.memory(y)
        residual = self._library.memory(transform.residual) if onto else seen
        strides = seen.strides, result.strides, residual.strides
        most, width = stage.most(seen.kind, 1), _width(seen, result, residual)
        way = plan(seen.shape, transform.kept, (), *strides, most=most, width=width)
        operands = zip((seen, result, residual), way.steps, strict=True)
        self._launch(
            normalize.kernel(seen.kind, onto, way.shape), way.blocks, x,
            *way.grid, *(each for operand, steps in operands for each in (operand.address, steps)),
            int(transform.relu), *self._statistics(transform),
            *self._parameters(transform.eps, transform.weight, transform.bias),
        )  # fmt: skip

    # -- Backward ------------------------------------------------------------------------------------------------------

    def _grad_way(self, dy: Array, x: Array, transform: Transform) -> Plan:
        seen, gradient = self._library.memory(x), self._library.memory(dy)
        residual = self._library.memory(transform.residual) if _gate(transform) == gate.RELU_ONTO else seen
        strides = seen.strides, gradient.strides, residual.strides
        width = _sums_width(seen.kind) if gradient.kind == seen.kind else 1
        most = stage.most(seen.kind, 2)
        return plan(seen.shape, transform.kept, transform.guide or (), *strides, most=most, width=width)

    def _find_grad_sums(self, dy: Array, x: Array, transform: Transform, way: Plan, sums: tuple[Array, ...]) -> None:
        seen, gradient = self._library.memory(x), self._library.memory(dy)
        passes = _gate(transform)
        residual = self._library.memory(transform.residual) if passes == gate.RELU_ONTO else seen
        way = _sums_way(way, seen, gradient, residual)
        partials = self._library.vector((2, way.chunks, way.features), x)
        _, words = self._counters(way, x)
        operands = zip((seen, gradient, residual), way.steps, strict=True)
        self._launch(
            grad_sums.kernel(seen.kind, gradient.kind, passes, way.shape), way.blocks, x,
            *way.grid, *(each for operand, steps in operands for each in (operand.address, steps)),
            *self._statistics(transform), *self._parameters(transform.eps, transform.weight, transform.bias),
            *(self._address(each) for each in (partials, *sums)), words,
        )  # fmt: skip

    @_on_its_device
    def grad_sums(self, dy: Array, x: Array, transform: Transform) -> tuple[Array, Array]:
        way = self._grad_way(dy, x, transform)
        sums = sum_dz, sum_dz_x = tuple(self._vectors(2, transform.mean.shape, x))
        self._find_grad_sums(dy, x, transform, way, sums)
        return sum_dz, sum_dz_x

    @_on_its_device
    def grad_input(
        self,
        dy: Array,
        x: Array,
        transform: Transform,
        where: Array | None,
        sums: tuple[Array, Array] | None,
        out: Array | None,
    ) -> tuple[Array, Array | None]:
        return self._write_grad_input(dy, x, transform, where, sums is None, out, sums or (None, None), None)

    @_on_its_device
    def backward(
        self, dy: Array, x: Array, transform: Transform, where: Array | None, is_constant: bool, out: Array | None
    ) -> tuple[Array, Array, Array, Array | None]:
        sums_way = self._grad_way(dy, x, transform)
        sum_dz, sum_dz_x = sums = tuple(self._vectors(2, transform.mean.shape, x))
        dx, dz = self._write_grad_input(dy, x, transform, where, is_constant, out, sums, sums_way)
        return dx, sum_dz_x, sum_dz, dz

    def _write_grad_input(
        self,
        dy: Array,
        x: Array,
        transform: Transform,
        where: Array | None,
        is_constant: bool,
        out: Array | None,
        sums: tuple[Any, ...],
        sums_way: Plan | None,
    ) -> tuple[Array, Array | None]:
        """Write the gradient of x, by the sums that are given, or by those found on the way that there is for them."""
        dx = self._library.empty_like(x) if out is None else out
        dresidual = None if transform.residual is None else self._library.empty_like(x)
        seen = self._library.memory(x)
        residual, dr = (
            seen if each is None else self._library.memory(each) for each in (transform.residual, dresidual)
        )
        weights = seen if where is None else self._where(seen, where)
        memories = seen, self._library.memory(dy), self._library.memory(dx), weights, residual, dr
        statistics = grad_input.CONSTANT if is_constant else grad_input.BATCH
        where_kind, width = None, 1
        if where is not None and not is_constant:
            statistics, where_kind = grad_input.WEIGHTED, weights.kind
        elif memories[1].kind == seen.kind and where is None:
            width = _width(*memories)
        strides, most = [each.strides for each in memories], stage.most(seen.kind, 2)
        way = plan(seen.shape, transform.kept, transform.guide or (), *strides, most=most, width=width)
        operands = zip(memories, way.steps, strict=True)
        arrays = [each for operand, steps in operands for each in (operand.address, steps)]
        coefficients = *self._statistics(transform), *self._parameters(transform.eps, transform.weight, transform.bias)
        found = [self._address(each) for each in sums]
        may_be_one = statistics == grad_input.BATCH and memories[1].kind == seen.kind
        if sums_way and may_be_one and _together(way, sums_way, seen.kind, self._library.queue(x)[0]):
            partials = self._library.vector((2, way.chunks, way.features), x)
            _, words = self._counters(way, x)
            del arrays[6:8]  # there are no weights
            self._launch(
                backward.kernel(seen.kind, _gate(transform), way.shape), way.blocks, x, *way.grid, *arrays,
                self._address(partials), *found, *coefficients, words, together.PATIENCE,
            )  # fmt: skip
            return dx, dresidual
        if sums_way:
            self._find_grad_sums(dy, x, transform, sums_way, sums)
        kernel = grad_input.kernel(seen.kind, memories[1].kind, where_kind, _gate(transform), statistics, way.shape)
        self._launch(kernel, way.blocks, x, *way.grid, *arrays, *found, *coefficients)
        return dx, dresidual
