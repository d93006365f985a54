"""The adapter between libraries that hand out strided memory and the CPU kernels.

Arrays come as `Memory`, per-feature vectors as flat NumPy arrays of float64. Planning (which kernel, which tiles, in
which order) is cached per combination of shapes, axes and strides; execution is one kernel call a verb.
"""

from collections.abc import Callable
from functools import lru_cache, partial
from math import prod
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
from llvmlite.binding import get_host_cpu_name

from bnarray.dispatch import Array, Transform
from bnarray.kernels.cpu import (
    backward,
    coefficients,
    forward,
    gate,
    grad_input,
    grad_sums,
    memory,
    moments,
    normalize,
    pool,
    walk,
)
from bnarray.kernels.cpu.compiled import Kernel
from bnarray.kernels.cpu.gate import RELU_ONTO
from bnarray.kernels.cpu.lanes import MOST
from bnarray.kernels.cpu.memory import NOWHERE
from bnarray.kernels.cpu.walk import FAMILY, WIDTH
from bnarray.layout import COLUMNS, Split, broadcast_strides, features_shape, layout, split, varies_along

Vector: TypeAlias = npt.NDArray[np.float64]
Strides: TypeAlias = tuple[int, ...]


class Memory(NamedTuple):
    """An array, as kernels see it: an address, one of the kinds of `kernels.cpu.memory`, sizes and strides in bytes.

    And whose threads share the work on it.
    """

    owner: object
    address: int
    kind: int
    shape: tuple[int, ...]
    strides: Strides
    team: pool.Team = pool.helpers

    def split(self, how: Split) -> "Memory":
        return self._replace(shape=how.shape(self.shape), strides=how.strides(self.strides))


# Elements. Below, two threads took as long as one or longer; at twice as many, two thirds of the time (two hardware
# threads of one Intel Xeon core).
WORTH_SHARING = 2**17

# Bytes of a feature's tiles that stay in the cache of one core between two reads (of 2 MB). Backwards, where x and dy
# are read, one go took 0.65 to 0.85 of the time of two for features of 0.1 to 0.4 MB, 0.9 of it for 0.8, 1.07 for 1.6.
CACHED = 2**20

# Elements that lie together. In shorter runs a feature is read more slowly than everything in the order of memory:
# twice in that order took 0.7 of the time of once and again from cache at 14 × 14, 1.05 to 1.3 of it from 40 × 40 on.
LONG = 1024

# Features that give every thread some, whichever finishes last.
MANY = 16

# Bytes of x from which on sums ask for lines so many bytes before they need them. Four lines at a time, they keep the
# processor from seeing for itself what comes next: of 205 MB moments took 0.52 (channels last) and 0.69 (first) of the
# time without (Intel Xeon), sums of the gradient 0.7 and 0.8, of 25 MB 0.9; what is in a cache took up to 1.06. On an
# AMD Zen 5 twice as far took 0.84 to 1.0 of the time (training, 25 to 205 MB), four times as far 0.87 to 1.09.
LARGE, AHEAD = 2**24, 4096 if get_host_cpu_name().startswith("znver") else 2048

# Bytes from which on what is written goes past the caches, which would read every line first: normalising 205 MB took
# 0.64 to 0.7 of the time, 52 MB 0.57, 39 MB 0.96, 25 MB 1.1. New memory has just been cleared, and is in a cache: 1.5.
STREAMED = 2**25

# In a kernel's scratch memory: lines of sums, and bytes lost between its arrays.
_SUMS, _BETWEEN = 6, 2048

#: Where there is no weight, bias or count of each feature.
NONE = np.empty(0)


class Step(NamedTuple):
    """A kernel, and where its tiles lie."""

    kernel: Kernel
    wide: Callable[[], Kernel]  # the same for tiles of float64, for when the data is beyond float32
    features: int
    groups: int
    pieces: int  # for threads to share; 1 where that is not worth it
    room: int  # bytes of scratch memory
    grid: npt.NDArray[np.int64]
    axes: npt.NDArray[np.int64]
    size: int  # bytes of what is written

    def into(self, is_given: bool) -> "Step":
        """The same onto memory that is given, not new: past the caches, where that is too much for them."""
        if not is_given or self.size < STREAMED:
            return self
        grid = self.grid.copy()
        grid[walk.STREAMED] = True
        return self._replace(grid=grid)

    def attempt(self, x: Memory, others: tuple[Memory | None, ...], *arguments: Any) -> bool:
        """Call the kernel, with the addresses of x and others among the arguments; return whether it did not refuse."""
        return self._call(self.kernel, x, others, arguments)

    def run(self, x: Memory, others: tuple[Memory | None, ...], *arguments: Any) -> None:
        """Call the kernel; where it refuses, the one for float64."""
        if not self._call(self.kernel, x, others, arguments):
            self._call(self.wide(), x, others, arguments)

    def _call(self, kernel: Kernel, x: Memory, others: object, arguments: tuple[Any, ...]) -> bool:
        tables = self.grid, self.axes
        return pool.run(kernel, self.pieces, self.room, *tables, *arguments, owners=(x, others), team=x.team)


def common_kind(x_kind: int, dy_kind: int) -> int:
    """The kind of the elements of tiles for two arrays; where they differ, half precision comes as float32."""
    return x_kind if x_kind in (dy_kind, memory.FLOAT64) else memory.FLOAT32


def _item(kind: int) -> int:
    """Bytes of an element in a tile."""
    return np.dtype(memory.ELEMENTS[kind]).itemsize


def _step(
    kernel: Callable[..., Kernel],
    options: tuple[Any, ...],
    tile_type: Any,
    shape: tuple[int, ...],
    kept: tuple[int, ...],
    strides: tuple[Strides, ...],
    *,
    tiles: int,
    vectors: int = coefficients.VECTORS,
    lines: int = 0,
    guide: tuple[Strides, ...] = (),
    element_wise: bool = False,
) -> Step:
    """Plan a kernel that holds so many tiles, vectors of a number for each feature, and lines, at a time.

    `guide` are strides that the order follows before any operand's.
    """
    seen = layout(shape, kept, *guide, *strides, element_wise=element_wise)
    tiling = seen.tiling()
    columns = (seen.down, seen.inner, *seen.outer[:-1], *seen.features)
    steps = zip(*(axis.strides[len(guide) :] for axis in columns), strict=True)
    axes = np.array([[axis.size for axis in columns], *steps], np.int64)
    depth, width = tiling.depth, tiling.width
    size = prod(shape) * np.dtype(tile_type).itemsize
    features_at = 1 + len(seen.outer)
    grid = np.array(
        [
            *(tiling.family, depth, width, depth * width),
            *(tiling.chunks, tiling.spans, tiling.chunks_per_group, tiling.spans_per_block),
            *(tiling.blocks, tiling.pieces, features_at),
            *(AHEAD if size >= LARGE else 0, False, seen.times),
        ],
        np.int64,
    )
    is_columns = tiling.family == COLUMNS
    features = prod(features_shape(shape, kept))
    numbers = tiles * depth * width + vectors * seen.times * features + (_SUMS + lines) * max(width, MOST) + axes.size
    return Step(
        kernel(tile_type, is_columns, *options),
        partial(kernel, np.float64, is_columns, *options),
        features,
        tiling.groups,
        tiling.pieces if prod(shape) >= WORTH_SHARING else 1,
        8 * numbers + _BETWEEN,
        grid,
        axes,
        size,
    )


def _statistics(transform: Transform) -> tuple[Any, ...]:
    """As `coefficients.fill` takes them."""
    _, count, mean, m2, eps, weight, bias, *_ = transform
    return *counted(count), flat(mean), flat(m2), eps, *_parameters(weight, bias)


def _split(transform: Transform, how: Split) -> Transform:
    """The transform of an array that is split: every vector as often as the split has features side by side."""
    vectors: dict[str, Any] = {}
    for name in ("count", "mean", "m2", "weight", "bias"):
        vector = getattr(transform, name)
        vectors[name] = np.tile(vector, how.size) if isinstance(vector, np.ndarray) else vector
    guide = None if transform.guide is None else tuple(how.strides(strides) for strides in transform.guide)
    return transform._replace(kept=how.kept, guide=guide, **vectors)


def _parameters(weight: Array | None, bias: Array | None) -> tuple[Vector, Vector]:
    return NONE if weight is None else flat(weight), NONE if bias is None else flat(bias)


def flat(of_features: Vector) -> Vector:
    """A per-feature array with one axis."""
    return of_features if of_features.ndim == 1 else of_features.reshape(-1)


def shaped(vector: Vector, shape: tuple[int, ...]) -> npt.NDArray[np.float64]:
    """A flat per-feature array with the features' axes."""
    return vector if len(shape) == 1 else vector.reshape(shape)


def counted(count: Any) -> tuple[float, Vector]:
    """A count as a number for all features, or a vector with one for each."""
    return (float(count), NONE) if isinstance(count, int | float) else (0.0, flat(count))


def _gate(transform: Transform) -> int:
    return gate.OPEN if not transform.relu else gate.RELU if transform.residual is None else gate.RELU_ONTO


# -- Moments -----------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=4096)
def moments_step(
    kind: int, shape: tuple[int, ...], kept: tuple[int, ...], *strides: Strides, weight_type: Any = None
) -> Step:
    tiles, lines = (1, 0) if weight_type is None else (2, 1 + moments.STRIP)
    return _step(
        moments.kernel, (weight_type,), memory.ELEMENTS[kind], shape, kept, strides,
        tiles=tiles, vectors=0, lines=lines,
    )  # fmt: skip


def find_moments(x: Memory, kept: tuple[int, ...], where: Memory | None) -> tuple[Vector, Vector, Vector]:
    """Return (count, mean, m2) of every feature."""
    times = 1
    if how := split(x.shape, kept, x.strides):
        x, kept, where, times = x.split(how), how.kept, where and where.split(how), how.size
    if where is None:
        step, where_at, where_kind = moments_step(x.kind, x.shape, kept, x.strides), NOWHERE, memory.BOOL
    else:
        weight_type = memory.ELEMENTS[where.kind] if where.kind in (memory.BOOL, memory.FLOAT64) else np.float32
        step = moments_step(x.kind, x.shape, kept, x.strides, where.strides, weight_type=weight_type)
        where_at, where_kind = where.address, where.kind
    sums = np.zeros((4, step.groups, step.features))
    step.run(x, (where,), x.address, x.kind, where_at, where_kind, *sums)
    count, shift, offset, m2 = sums.reshape(4, step.groups * times, -1)
    mean = np.empty(step.features // times)
    moments.merge_groups.call(count, shift, offset, m2, mean)
    return count[0].copy(), mean, m2[0].copy()  # the other groups' rows are not kept alive


# -- Forward -----------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=4096)
def forward_step(
    kind: int, shape: tuple[int, ...], kept: tuple[int, ...], x_strides: Strides, y_strides: Strides
) -> Step | None:
    """The plan for moments and output in one go, or None where two kernels are no slower.

    One go wants features that stay in a core's cache and so many that all threads have some, or a small array; and
    tiles that moments alone would have, because bits follow tiles.
    """
    if split(shape, kept, x_strides):
        return None
    alone = moments_step(kind, shape, kept, x_strides)
    is_columns = alone.grid[FAMILY] == COLUMNS
    joint = _step(
        forward.kernel, (), memory.ELEMENTS[kind], shape, kept, (x_strides, y_strides),
        tiles=2, vectors=coefficients.VECTORS + 4 * alone.groups if is_columns else 1,
    )  # fmt: skip
    return _joint(alone, shape, joint, prod(shape) // joint.features * _item(kind) <= CACHED)


def _joint(alone: Step, shape: tuple[int, ...], joint: Step, stays: bool) -> Step | None:
    """The plan for two passes in one go, if that is worth it and has the tiles of the first pass alone.

    `stays` tells whether a feature would stay in cache between the two.
    """
    small = prod(shape) < WORTH_SHARING
    in_runs = alone.grid[WIDTH] >= LONG and alone.grid[FAMILY] != COLUMNS
    same_tiles = (joint.grid == alone.grid).all() and joint.axes[0].tolist() == alone.axes[0].tolist()
    if not (small or (stays and in_runs and joint.features >= MANY)) or not same_tiles:
        return None
    return joint._replace(pieces=1 if small else joint.features)


def find_and_write(
    x: Memory,
    kept: tuple[int, ...],
    eps: float,
    weight: Array | None,
    bias: Array | None,
    relu: bool,
    y: Memory,
    is_given: bool,
) -> tuple[int, Vector, Vector] | None:
    """Write the transform of x by its own moments to y; return (count, mean, m2), or None if one go is no faster."""
    step = forward_step(x.kind, x.shape, kept, x.strides, y.strides)
    if step is None:
        return None
    mean, m2 = np.empty((2, step.features))
    count, parameters = prod(x.shape) // step.features, _parameters(weight, bias)
    arguments = x.address, y.address, x.kind, relu, float(count), NONE, mean, m2, eps, *parameters
    if not step.into(is_given).attempt(x, (y,), *arguments):
        write_normalized(x, Transform(kept, count, mean, m2, eps, weight, bias, relu, None), None, y, is_given)
    return count, mean, m2


@lru_cache(maxsize=4096)
def normalize_step(kind: int, shape: tuple[int, ...], kept: tuple[int, ...], onto: bool, *strides: Strides) -> Step:
    return _step(
        normalize.kernel,
        (onto,),
        memory.ELEMENTS[kind],
        shape,
        kept,
        strides,
        tiles=3 if onto else 2,
        element_wise=True,
    )


def write_normalized(x: Memory, transform: Transform, residual: Memory | None, y: Memory, is_given: bool) -> None:
    """Write the transform of x to y, which is new or given."""
    if how := split(x.shape, transform.kept, x.strides):
        x, y, residual = x.split(how), y.split(how), residual and residual.split(how)
        transform = _split(transform, how)
    added = residual or x
    onto = residual is not None
    step = normalize_step(x.kind, x.shape, transform.kept, onto, x.strides, y.strides, added.strides)
    in_place = y.address in (x.address, added.address)
    operands = x.address, y.address, added.address, x.kind, in_place, transform.relu
    step.into(is_given).run(x, (y, added), *operands, *_statistics(transform))


# -- Backward ----------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=4096)
def grad_sums_step(
    kind: int,
    shape: tuple[int, ...],
    kept: tuple[int, ...],
    gate: int,
    guide: tuple[Strides, ...],
    *strides: Strides,
) -> Step:
    return _step(
        grad_sums.kernel, (gate,), memory.ELEMENTS[kind], shape, kept, strides,
        tiles=3 if gate == RELU_ONTO else 2, lines=grad_sums.LANES, guide=guide,
    )  # fmt: skip


def find_grad_sums(dy: Memory, x: Memory, transform: Transform, residual: Memory | None) -> tuple[Vector, Vector]:
    """Return Σ dz and Σ dz · x̂ of every feature; dz is dy, or what of it passes ReLU."""
    whole, times = transform, 1
    if how := split(x.shape, transform.kept, transform.guide[0] if transform.guide else x.strides):
        x, dy, residual, times = x.split(how), dy.split(how), residual and residual.split(how), how.size
        transform = _split(transform, how)
    added = residual or x
    gate, guide = _gate(transform), transform.guide or ()
    kind = common_kind(x.kind, dy.kind)
    step = grad_sums_step(kind, x.shape, transform.kept, gate, guide, x.strides, dy.strides, added.strides)
    sums = np.zeros((2, step.groups, step.features))
    operands = x.address, dy.address, added.address, x.kind, dy.kind
    step.run(x, (dy, added), *operands, *_statistics(transform), *sums)
    sum_dz, sum_dz_x = sums.reshape(2, step.groups * times, -1)
    grad_sums.add_groups.call(sum_dz, sum_dz_x, *counted(whole.count), flat(whole.m2), whole.eps)
    return sum_dz[0].copy(), sum_dz_x[0].copy()


@lru_cache(maxsize=4096)
def backward_step(
    kind: int, shape: tuple[int, ...], kept: tuple[int, ...], gate: int, *strides: Strides
) -> Step | None:
    """The plan for sums and gradient in one go (see `forward_step`), or None where two kernels are no slower."""
    x_strides, dy_strides, _ = strides
    if split(shape, kept, x_strides):
        return None
    alone = grad_sums_step(kind, shape, kept, gate, (), x_strides, dy_strides, x_strides)
    joint = _step(
        backward.kernel, (gate,), memory.ELEMENTS[kind], shape, kept, strides, tiles=3, lines=grad_sums.LANES,
        vectors=coefficients.VECTORS + 2 + 2 * alone.groups if alone.grid[FAMILY] == COLUMNS else 1,
    )  # fmt: skip
    return _joint(alone, shape, joint, 2 * prod(shape) // joint.features * _item(kind) <= CACHED)


def find_and_write_gradient(
    dy: Memory, x: Memory, transform: Transform, dx: Memory, is_given: bool
) -> tuple[Vector, Vector] | None:
    """Write the gradient of x to dx; return Σ dz and Σ dz · x̂. None if one go is no faster, or float32 does not do."""
    gate = _gate(transform)
    step = backward_step(common_kind(x.kind, dy.kind), x.shape, transform.kept, gate, x.strides, dy.strides, dx.strides)
    if step is None:
        return None
    sum_dz, sum_dz_x = np.empty((2, step.features))
    operands = x.address, dy.address, dx.address, x.kind, dy.kind
    arguments = *operands, *_statistics(transform), sum_dz, sum_dz_x
    if not step.into(is_given).attempt(x, (dy, dx), *arguments):
        return None
    return sum_dz, sum_dz_x


@lru_cache(maxsize=4096)
def grad_input_step(
    kind: int, shape: tuple[int, ...], kept: tuple[int, ...], gate: int, statistics: int, *strides: Strides
) -> Step:
    return _step(
        grad_input.kernel, (gate, statistics), memory.ELEMENTS[kind], shape, kept, strides,
        tiles=(5 if gate == RELU_ONTO else 3) + (statistics == grad_input.WEIGHTED),
        vectors=coefficients.VECTORS + 2, element_wise=True,
    )  # fmt: skip


def write_grad_input(
    dy: Memory,
    x: Memory,
    transform: Transform,
    residual: Memory | None,
    where: Memory | None,
    sums: tuple[Vector, Vector] | None,
    dx: Memory,
    dresidual: Memory | None,
    is_given: bool,
) -> None:
    """Write the gradient of x to dx and, under ReLU, the residual's to dresidual.

    `sums` are those of `find_grad_sums`; None where the statistics were constants.
    """
    if how := split(x.shape, transform.kept, x.strides):
        x, dy, dx = x.split(how), dy.split(how), dx.split(how)
        residual, where, dresidual = (each and each.split(how) for each in (residual, where, dresidual))
        transform = _split(transform, how)
        sums = sums and (np.tile(sums[0], how.size), np.tile(sums[1], how.size))
    statistics = grad_input.CONSTANT if sums is None else grad_input.BATCH if where is None else grad_input.WEIGHTED
    others = tuple(each or x for each in (dy, dx, where, residual, dresidual))
    strides = x.strides, *(each.strides for each in others)
    step = grad_input_step(
        common_kind(x.kind, dy.kind), x.shape, transform.kept, _gate(transform), statistics, *strides
    )
    addresses = x.address, *(each.address for each in others)
    kinds = x.kind, dy.kind, x.kind if where is None else where.kind
    in_place = dx.address == dy.address
    arguments = *addresses, *kinds, in_place, *_statistics(transform), *((NONE, NONE) if sums is None else sums)
    step.into(is_given).run(x, others, *arguments)


# -- Verbs -------------------------------------------------------------------------------------------------------------


class Adapter:
    """The verbs over the arrays of one library, by how it is looked at and how it allocates.

    Vectors are NumPy arrays of float64, and counts numbers or such arrays.
    """

    def __init__(self, memory: Callable[[Array], Memory], empty_like: Callable[[Array], Array]) -> None:
        self._memory = memory
        self._empty_like = empty_like

    def _optional(self, x: Array | None) -> Memory | None:
        return None if x is None else self._memory(x)

    def _where(self, x: Memory, where: Array | None) -> Memory | None:
        if where is None:
            return None
        seen = self._memory(where)
        return seen._replace(shape=x.shape, strides=broadcast_strides(seen.shape, seen.strides, x.shape))

    def moments(self, x: Array, kept: tuple[int, ...], where: Array | None) -> tuple[Any, Vector, Vector]:
        seen = self._memory(x)
        shape = features_shape(seen.shape, kept)
        count, mean, m2 = find_moments(seen, kept, self._where(seen, where))
        number: Any = prod(seen.shape) // mean.size
        if where is not None:
            number = count.reshape(shape) if varies_along(where.shape, len(seen.shape), kept) else float(count[0])
        return number, shaped(mean, shape), shaped(m2, shape)

    def forward(
        self,
        x: Array,
        kept: tuple[int, ...],
        eps: float,
        weight: Vector | None,
        bias: Vector | None,
        relu: bool,
        out: Array | None,
    ) -> tuple[Any, Vector, Vector, Array] | None:
        y, seen = self._empty_like(x) if out is None else out, self._memory(x)
        found = find_and_write(seen, kept, eps, weight, bias, relu, self._memory(y), out is not None)
        if found is None:
            return None
        count, mean, m2 = found
        shape = features_shape(seen.shape, kept)
        return count, shaped(mean, shape), shaped(m2, shape), y

    def normalize(self, x: Array, transform: Transform, out: Array | None) -> Array:
        y = self._empty_like(x) if out is None else out
        write_normalized(
            self._memory(x), transform, self._optional(transform.residual), self._memory(y), out is not None
        )
        return y

    def backward(
        self, dy: Array, x: Array, transform: Transform, where: Array | None, is_constant: bool, out: Array | None
    ) -> tuple[Array, Vector, Vector, None] | None:
        if is_constant or where is not None or transform.residual is not None:
            return None
        seen_dy, dx = self._memory(dy), self._empty_like(x) if out is None else out
        result = self._memory(dx)
        if result.address == seen_dy.address:
            return None  # what is not done in one go could not be begun again
        sums = find_and_write_gradient(seen_dy, self._memory(x), transform, result, out is not None)
        if sums is None:
            return None
        shape = transform.mean.shape
        return dx, shaped(sums[1], shape), shaped(sums[0], shape), None

    def grad_sums(self, dy: Array, x: Array, transform: Transform) -> tuple[Vector, Vector]:
        sums = find_grad_sums(self._memory(dy), self._memory(x), transform, self._optional(transform.residual))
        sum_dz, sum_dz_x = (each.reshape(transform.mean.shape) for each in sums)
        return sum_dz, sum_dz_x

    def grad_input(
        self,
        dy: Array,
        x: Array,
        transform: Transform,
        where: Array | None,
        sums: tuple[Vector, Vector] | None,
        out: Array | None,
    ) -> tuple[Array, Array | None]:
        dx = self._empty_like(x) if out is None else out
        dresidual = None if transform.residual is None else self._empty_like(x)
        seen = self._memory(x)
        write_grad_input(
            self._memory(dy),
            seen,
            transform,
            self._optional(transform.residual),
            self._where(seen, where),
            None if sums is None else (flat(sums[0]), flat(sums[1])),
            self._memory(dx),
            self._optional(dresidual),
            out is not None,
        )
        return dx, dresidual
