"""The adapter between libraries that hand out strided memory and the CPU kernels.

Arrays come as `Memory`, per-feature vectors as flat NumPy arrays of float64. Planning (which tiles, in which order) is
cached per combination of shapes, axes and strides; execution is one kernel call a verb.
"""

from functools import lru_cache
from math import prod
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from bnarray.kernels.cpu import coefficients, forward, gate, grad_input, grad_sums, memory, moments, normalize, pool
from bnarray.kernels.cpu.lanes import MOST
from bnarray.kernels.cpu.memory import NOWHERE
from bnarray.layout import COLUMNS, features_shape, layout

Vector: TypeAlias = npt.NDArray[np.float64]


class Memory(NamedTuple):
    """An array, as kernels see it: an address, one of the kinds of `kernels.cpu.memory`, sizes and strides in bytes."""

    owner: object
    address: int
    kind: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


# Elements. On fewer, a helper that wakes up finds too little left: handing out costs about 100 µs.
WORTH_SHARING = 2**20

# Bytes of a feature's tiles that stay in the cache of one core between two reads.
CACHED = 2**20

# In a kernel's scratch memory: lines of sums, and bytes lost between its arrays.
_SUMS, _BETWEEN = 4, 2048

# Features that give every thread some, whichever finishes last.
MANY = 16


class Flat(NamedTuple):
    """A `dispatch.Transform` with flat vectors; scale is invstd · weight."""

    kept: tuple[int, ...]
    mean: Vector
    invstd: Vector
    scale: Vector
    bias: Vector
    relu: bool
    residual: Memory | None
    guide: tuple[tuple[int, ...], ...]  # strides that planning follows before any operand's

    @property
    def gate(self) -> int:
        return gate.OPEN if not self.relu else gate.RELU if self.residual is None else gate.RELU_ONTO


class _Plan(NamedTuple):
    family: int
    groups: int
    pieces: int  # for threads to share; 1 where that is not worth it
    tile: int
    width: int
    grid: npt.NDArray[np.int64]
    axes: npt.NDArray[np.int64]

    @property
    def is_columns(self) -> bool:
        return self.family == COLUMNS

    def room(self, tiles: int, numbers: int = 0) -> int:
        """Bytes for a kernel's own use: tiles, lines of sums, and numbers of float64."""
        return 8 * (tiles * self.tile + _SUMS * max(self.width, MOST) + self.axes.size + numbers) + _BETWEEN


@lru_cache(maxsize=4096)
def _plan(
    shape: tuple[int, ...],
    kept: tuple[int, ...],
    *strides: tuple[int, ...],
    guide: tuple[tuple[int, ...], ...] = (),
    element_wise: bool = False,
) -> _Plan:
    seen = layout(shape, kept, *guide, *strides, element_wise=element_wise)
    tiling = seen.tiling()
    columns = (seen.down, seen.inner, *seen.outer[:-1], *seen.features)
    steps = zip(*(axis.strides[len(guide) :] for axis in columns), strict=True)
    axes = np.array([[axis.size for axis in columns], *steps], np.int64)
    depth, width = tiling.depth, tiling.width
    features_at = 1 + len(seen.outer)
    grid = np.array(
        [
            *(tiling.family, depth, width, depth * width),
            *(tiling.chunks, tiling.spans, tiling.chunks_per_group, tiling.spans_per_block),
            *(tiling.blocks, tiling.pieces, features_at),
        ],
        np.int64,
    )
    pieces = tiling.pieces if prod(shape) >= WORTH_SHARING else 1
    return _Plan(tiling.family, tiling.groups, pieces, depth * width, width, grid, axes)


def _tile_type(x: Memory) -> Any:
    return np.float64 if x.kind == memory.FLOAT64 else np.float32


def _tile_type_for(x: Memory, flat: Flat, common: Vector, slope: Vector) -> Any:
    """float64 also where a feature's numbers are too large or too small for loops in float32."""
    if x.kind == memory.FLOAT64 or not coefficients.fit_single(flat.mean, flat.bias, flat.scale, common, slope):
        return np.float64
    return np.float32


def find_moments(
    x: Memory, kept: tuple[int, ...], features: int, where: Memory | None
) -> tuple[Vector, Vector, Vector]:
    """Return (count, mean, m2) of every feature."""
    if where is None:
        plan, where_at, where_kind = _plan(x.shape, kept, x.strides), NOWHERE, memory.BOOL
    else:
        plan, where_at, where_kind = _plan(x.shape, kept, x.strides, where.strides), where.address, where.kind
    count, shift, offset, m2 = np.zeros((4, plan.groups, features))
    mean = np.empty(features)
    kernel = moments.kernel(_tile_type(x), plan.is_columns, where is not None)
    owners = x.owner, where and where.owner
    operands, sums = (x.address, x.kind, where_at, where_kind), (count, shift, offset, m2)
    room = plan.room(1 if where is None else 2)
    pool.run(kernel, plan.pieces, room, owners, plan.grid, plan.axes, *operands, *sums)
    moments.merge_groups(count, shift, offset, m2, mean)
    return count[0].copy(), mean, m2[0].copy()  # the other groups' rows are not kept alive


@lru_cache(maxsize=4096)
def _fused_plan(
    shape: tuple[int, ...], kept: tuple[int, ...], x_strides: tuple[int, ...], y_strides: tuple[int, ...], item: int
) -> _Plan | None:
    """The plan for moments and output in one go, or None where two kernels are no slower.

    One go wants features that stay in a core's cache and so many that all threads have some, or a small array; and
    tiles that moments alone would have, because bits follow tiles.
    """
    alone = _plan(shape, kept, x_strides)
    joint = _plan(shape, kept, x_strides, y_strides)
    features = prod(features_shape(shape, kept))
    small = prod(shape) < WORTH_SHARING
    stays = prod(shape) // features * item <= CACHED and features >= MANY and not alone.is_columns
    same_tiles = (joint.grid == alone.grid).all() and joint.axes[0].tolist() == alone.axes[0].tolist()
    if not (small or stays) or not same_tiles:
        return None
    return joint._replace(pieces=1 if small else features)


def find_and_write(x: Memory, flat: Flat, eps: float, y: Memory) -> tuple[Vector, Vector, Vector, Vector] | None:
    """Write the transform of x by its own moments to y; return count, mean, m2, invstd; None if that is no faster.

    Of `flat` the mean and invstd are not read, and scale is the weight. Where float32 turns out not to do, y is written
    once more.
    """
    tile_type = _tile_type(x)
    plan = _fused_plan(x.shape, flat.kept, x.strides, y.strides, np.dtype(tile_type).itemsize)
    if plan is None:
        return None
    count, mean, m2, invstd, scale = np.empty((5, flat.bias.size))
    vectors = flat.scale, flat.bias, eps, flat.relu, count, mean, m2, invstd, scale
    kernel = forward.kernel(tile_type, plan.is_columns)
    owners, addresses = (x.owner, y.owner), (x.address, y.address)
    room = plan.room(2, (coefficients.VECTORS + 4 * plan.groups) * (flat.bias.size if plan.is_columns else 1))
    pool.run(kernel, plan.pieces, room, owners, plan.grid, plan.axes, *addresses, x.kind, *vectors)
    found = flat._replace(mean=mean, scale=scale)
    if _tile_type_for(x, found, scale, scale) is not tile_type:
        write_normalized(x, found, y)
    return count, mean, m2, invstd


def write_normalized(x: Memory, flat: Flat, y: Memory) -> None:
    """Write the transform of x to y."""
    added = flat.residual or x
    plan = _plan(x.shape, flat.kept, x.strides, y.strides, added.strides, element_wise=True)
    in_place = y.address in (x.address, added.address)
    kernel = normalize.kernel(
        _tile_type_for(x, flat, flat.scale, flat.scale), plan.is_columns, flat.residual is not None
    )
    owners, addresses = (x.owner, y.owner, added.owner), (x.address, y.address, added.address)
    vectors = flat.mean, flat.scale, flat.bias
    room = plan.room(2 if flat.residual is None else 3, coefficients.VECTORS * flat.mean.size)
    pool.run(kernel, plan.pieces, room, owners, plan.grid, plan.axes, *addresses, x.kind, in_place, *vectors, flat.relu)


def find_grad_sums(dy: Memory, x: Memory, flat: Flat) -> tuple[Vector, Vector]:
    """Return Σ dz and Σ dz · x̂ of every feature; dz is dy, or what of it passes ReLU."""
    added = flat.residual or x
    plan = _plan(x.shape, flat.kept, x.strides, dy.strides, added.strides, guide=flat.guide)
    sum_dz, sum_dz_x = np.zeros((2, plan.groups, flat.mean.size))
    kernel = grad_sums.kernel(_tile_type_for(x, flat, flat.scale, flat.scale), plan.is_columns, flat.gate)
    owners, addresses = (x.owner, dy.owner, added.owner), (x.address, dy.address, added.address)
    vectors = flat.mean, flat.scale, flat.bias, sum_dz, sum_dz_x
    room = plan.room(2 + flat.gate, coefficients.VECTORS * flat.mean.size)
    pool.run(kernel, plan.pieces, room, owners, plan.grid, plan.axes, *addresses, x.kind, dy.kind, *vectors)
    grad_sums.add_groups(sum_dz, sum_dz_x, flat.invstd)
    return sum_dz[0].copy(), sum_dz_x[0].copy()


def write_grad_input(
    dy: Memory,
    x: Memory,
    flat: Flat,
    where: Memory | None,
    slopes: npt.NDArray[np.float64] | None,
    dx: Memory,
    dresidual: Memory | None,
) -> None:
    """Write the gradient of x to dx and, under ReLU, the residual's to dresidual.

    `slopes` are what `kernels.cpu.features.slopes` makes of the sums; None where the statistics were constants.
    """
    statistics = grad_input.CONSTANT if slopes is None else grad_input.BATCH if where is None else grad_input.WEIGHTED
    operands = [each or x for each in (dy, dx, where, flat.residual, dresidual)]
    plan = _plan(x.shape, flat.kept, x.strides, *(each.strides for each in operands), element_wise=True)
    common, slope = (flat.scale, flat.scale) if slopes is None else slopes
    tile_type = np.float64 if statistics == grad_input.WEIGHTED else _tile_type_for(x, flat, common, slope)
    kernel = grad_input.kernel(tile_type, plan.is_columns, flat.gate, statistics)
    owners = x.owner, *(each.owner for each in operands)
    addresses = x.address, *(each.address for each in operands)
    kinds = x.kind, dy.kind, x.kind if where is None else where.kind
    vectors = flat.mean, flat.scale, flat.bias, common, slope
    in_place = dx.address == dy.address
    room = plan.room(3 + flat.gate + (where is not None), (coefficients.VECTORS + 2) * flat.mean.size)
    pool.run(kernel, plan.pieces, room, owners, plan.grid, plan.axes, *addresses, *kinds, in_place, *vectors)
