"""The adapter between libraries that hand out memory of CUDA devices and the CUDA kernels.

Arrays come as `Memory`; per-feature vectors are the library's own arrays of float64, contiguous, on the same device.
Planning is cached per combination of shapes, axes and strides; a pass is two launches, on the library's current stream,
and nothing waits for them.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import lru_cache, wraps
from math import ceil, prod
from typing import Any, Concatenate, NamedTuple, ParamSpec, Protocol, TypeVar

from bnarray.dispatch import Array, Transform
from bnarray.kernels.cuda import gate, grad_input, grad_sums, memory, moments, normalize
from bnarray.kernels.cuda.compiled import THREADS, Kernel
from bnarray.kernels.cuda.walk import Shape
from bnarray.layout import COLUMNS, Axis, broadcast_strides, features_shape, layout

Strides = tuple[int, ...]

_P = ParamSpec("_P")
_R = TypeVar("_R")

# Elements that a block works on, at least, where a feature has so many: 64 of each thread. And the most chunks of a
# feature, which every block of the second launch merges. Reasoned; no device has judged them yet.
CHUNK = 16384
MOST_CHUNKS = 1024

# Features side by side in a block: threads that read together, if memory runs along them.
WARP = 32

#: Where there is no array.
NOWHERE = 0


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
    merging_blocks: int  # with one for each of the features' tiles
    chunks: int
    features: int
    grid: tuple[Any, ...]  # as all kernels take it
    steps: tuple[Strides, ...]  # of the operands


@lru_cache(maxsize=4096)
def plan(
    shape: tuple[int, ...], kept: tuple[int, ...], guide: tuple[Strides, ...], *strides: Strides, width: int = 1
) -> Plan:
    """Cut operands of one non-empty shape; `guide` are strides that the order follows before any operand's.

    Positions are of `width` elements, if all operands have so many together everywhere.
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
    if across == 1 and _come_in_vectors(reduced, features, width):
        *slower, inner = reduced
        reduced = *slower, Axis(inner.size // width, tuple(step * width for step in inner.strides))
    else:
        width = 1
    positions, count = (prod(axis.size for axis in axes) for axes in (reduced, features))
    chunk = ceil(positions / min(MOST_CHUNKS, ceil(positions * width * across / CHUNK)))
    chunks, tiles = ceil(positions / chunk), ceil(count / across)
    axes = *reduced, *features
    step = divmod(THREADS // across, reduced[-1].size)
    return Plan(
        Shape(across, len(reduced) - 1, len(features), width),
        tiles * chunks,
        tiles,
        chunks,
        count,
        (chunk, chunks, positions, count, *step, tuple(axis.size for axis in axes)),
        tuple(tuple(axis.strides[i] for axis in axes) for i in range(len(guide), len(still.strides))),
    )


def _come_in_vectors(reduced: tuple[Axis, ...], features: tuple[Axis, ...], width: int) -> bool:
    """Whether so many elements lie together along the inner axis, and begin at multiples of as many."""
    *slower, inner = reduced
    together = inner.size % width == 0 and all(step == 1 for step in inner.strides)
    return together and all(step % width == 0 for axis in (*slower, *features) for step in axis.strides)


def _width(*memories: Memory) -> int:
    """How many elements of arrays of one kind, all aligned to it, are in a device's widest access; else 1."""
    is_aligned = all(each.address % memory.WIDEST == 0 for each in memories)
    return memory.width_of(memories[0].kind) if is_aligned else 1


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

    # -- How arrays become arguments -----------------------------------------------------------------------------------

    def _launch(self, kernel: Kernel, blocks: int, x: Array, *arguments: Any) -> None:
        kernel.launch(*self._library.queue(x), blocks, *arguments)

    def _address(self, vector: Array | None) -> Any:
        return NOWHERE if vector is None else self._library.memory(vector).address

    def _vectors(self, number: int, shape: tuple[int, ...], like: Array) -> list[Array]:
        return [self._library.vector(shape, like) for _ in range(number)]

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

    def _find_chunks(self, x: Array, where: Array | None, way: Plan) -> Array:
        seen = self._library.memory(x)
        weights = seen if where is None else self._where(seen, where)
        kernel = moments.kernel(seen.kind, None if where is None else weights.kind, way.shape)
        partials = self._library.vector((4, way.chunks, way.features), x)
        x_steps, where_steps = way.steps if where is not None else way.steps * 2
        arguments = seen.address, x_steps, weights.address, where_steps, self._address(partials)
        self._launch(kernel, way.blocks, x, *way.grid, *arguments)
        return partials

    @_on_its_device
    def moments(self, x: Array, kept: tuple[int, ...], where: Array | None) -> tuple[Any, Array, Array]:
        seen = self._library.memory(x)
        strides = (seen.strides,) if where is None else (seen.strides, self._where(seen, where).strides)
        way = plan(seen.shape, kept, (), *strides)
        partials = self._find_chunks(x, where, way)
        found = self._vectors(3, features_shape(seen.shape, kept), x)
        addresses = [self._address(each) for each in (partials, *found)]
        self._launch(moments.merge_kernel(way.shape), way.merging_blocks, x, way.chunks, way.features, *addresses)
        count, mean, m2 = found
        return prod(seen.shape) // way.features if where is None else count, mean, m2

    @_on_its_device
    def forward(
        self, x: Array, kept: tuple[int, ...], eps: float, weight: Array | None, bias: Array | None, relu: bool
    ) -> tuple[int, Array, Array, Array]:
        seen = self._library.memory(x)
        sums = plan(seen.shape, kept, (), seen.strides)
        partials = self._find_chunks(x, None, sums)
        counts, mean, m2 = self._vectors(3, features_shape(seen.shape, kept), x)
        transform = Transform(kept, counts, mean, m2, eps, weight, bias, relu, None)
        y = self._library.empty_like(x)
        self._write_normalized(x, transform, y, partials, sums)
        return prod(seen.shape) // sums.features, mean, m2, y

    @_on_its_device
    def normalize(self, x: Array, transform: Transform, out: Array | None) -> Array:
        y = self._library.empty_like(x) if out is None else out
        self._write_normalized(x, transform, y, None, None)
        return y

    def _write_normalized(
        self, x: Array, transform: Transform, y: Array, partials: Array | None, sums: Plan | None
    ) -> None:
        """Write y by the transform's statistics, or by what chunks left, which then become the transform's."""
        onto, merges = transform.residual is not None, sums is not None
        seen, result = self._library.memory(x), self._library.memory(y)
        residual = self._library.memory(transform.residual) if onto else seen
        strides = seen.strides, result.strides, residual.strides
        way = plan(seen.shape, transform.kept, (), *strides, width=_width(seen, result, residual))
        operands = zip((seen, result, residual), way.steps, strict=True)
        self._launch(
            normalize.kernel(seen.kind, onto, merges, way.shape), way.blocks, x,
            *way.grid, *(each for operand, steps in operands for each in (operand.address, steps)),
            int(transform.relu), self._address(partials), 0 if sums is None else sums.chunks,
            *self._statistics(transform), *self._parameters(transform.eps, transform.weight, transform.bias),
        )  # fmt: skip

    # -- Backward ------------------------------------------------------------------------------------------------------

    def _find_grad_chunks(self, dy: Array, x: Array, transform: Transform) -> tuple[Array, Plan]:
        seen, gradient = self._library.memory(x), self._library.memory(dy)
        passes = _gate(transform)
        residual = self._library.memory(transform.residual) if passes == gate.RELU_ONTO else seen
        strides = seen.strides, gradient.strides, residual.strides
        way = plan(seen.shape, transform.kept, transform.guide or (), *strides)
        partials = self._library.vector((2, way.chunks, way.features), x)
        operands = zip((seen, gradient, residual), way.steps, strict=True)
        self._launch(
            grad_sums.kernel(seen.kind, gradient.kind, passes, way.shape), way.blocks, x,
            *way.grid, *(each for operand, steps in operands for each in (operand.address, steps)),
            *self._statistics(transform), *self._parameters(transform.eps, transform.weight, transform.bias),
            self._address(partials),
        )  # fmt: skip
        return partials, way

    @_on_its_device
    def grad_sums(self, dy: Array, x: Array, transform: Transform) -> tuple[Array, Array]:
        partials, way = self._find_grad_chunks(dy, x, transform)
        count, has_counts, counts, _, m2 = self._statistics(transform)
        sum_dz, sum_dz_x = self._vectors(2, transform.mean.shape, x)
        self._launch(
            grad_sums.add_kernel(way.shape), way.merging_blocks, x,
            way.chunks, way.features, self._address(partials), count, has_counts, counts, m2, float(transform.eps),
            self._address(sum_dz), self._address(sum_dz_x),
        )  # fmt: skip
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
        return self._write_grad_input(dy, x, transform, where, sums is None, out, sums or (None, None), None, 0)

    @_on_its_device
    def backward(
        self, dy: Array, x: Array, transform: Transform, where: Array | None, is_constant: bool, out: Array | None
    ) -> tuple[Array, Array, Array, Array | None]:
        partials, way = self._find_grad_chunks(dy, x, transform)
        sum_dz, sum_dz_x = sums = tuple(self._vectors(2, transform.mean.shape, x))
        dx, dz = self._write_grad_input(dy, x, transform, where, is_constant, out, sums, partials, way.chunks)
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
        partials: Array | None,
        chunks: int,
    ) -> tuple[Array, Array | None]:
        """Write the gradient of x, by the sums that are given, or by what chunks left, which then become the sums."""
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
        strides = [each.strides for each in memories]
        way = plan(seen.shape, transform.kept, transform.guide or (), *strides, width=width)
        kernel = grad_input.kernel(
            seen.kind, memories[1].kind, where_kind, _gate(transform), statistics, partials is not None, way.shape
        )
        operands = zip(memories, way.steps, strict=True)
        self._launch(
            kernel, way.blocks, x, *way.grid,
            *(each for operand, steps in operands for each in (operand.address, steps)),
            self._address(partials), chunks, *(self._address(each) for each in sums), *self._statistics(transform),
            *self._parameters(transform.eps, transform.weight, transform.bias),
        )  # fmt: skip
        return dx, dresidual
