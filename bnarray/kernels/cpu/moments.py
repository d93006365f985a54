"""Mean and sum of squared deviations of every feature, in one read of x.

Each tile is summed, then its squared deviations from that mean while it is still in cache. E[x²] − E[x]² is never
formed. A tile of float32::

    mean = Σ x / n                                 summed in float64
    m2   = Σ (x − center)² − n · (mean − center)²  center is the mean in float32, so the differences are exact

and a tile of float64, where the second sum makes up for the rounding of the first (Chan, Golub and LeVeque, "Algorithms
for computing the sample variance", 1983: the corrected two-pass algorithm)::

    mean = center + Σ (x − center) / n             center = Σ x / n
    m2   = Σ (x − center)² − (Σ (x − center))² / n

A tile of float32 whose squares leave that type's comfortable range is summed as one of float64. Tiles are merged in
float64.

Traffic: reads x once (and `where`), writes nothing of x's size.
"""

from functools import cache

import numpy as np
from numba import types

from bnarray.kernels.cpu.compiled import Kernel, counter, index, indices, machinery, partials, summing, table
from bnarray.kernels.cpu.memory import load
from bnarray.kernels.cpu.walk import TILE, WIDTH, address_of, steps_of, tiles
from bnarray.kernels.merge import merge

_merge = machinery(merge)

# Of a sum of squares in float32. Beyond: overflow is near. Below: squares that matter may have been subnormal.
_LARGEST, _SMALLEST = 1e30, 1e-30


@machinery
def _is_safe(m2):
    return _SMALLEST < m2 < _LARGEST


@summing
def _single(values):
    """Mean and m2 of a tile of float32."""
    mean = 0.0
    for i in range(values.size):
        mean += np.float64(values[i])
    mean /= values.size
    center = np.float32(mean)
    m2 = np.float32(0)
    for i in range(values.size):
        deviation = values[i] - center
        m2 += deviation * deviation
    return mean, np.float64(m2) - values.size * (mean - center) ** 2, m2


@summing
def _double(values):
    """Mean and m2 of a tile, in float64."""
    center = 0.0
    for i in range(values.size):
        center += values[i]
    center /= values.size
    drift = 0.0
    m2 = 0.0
    for i in range(values.size):
        deviation = values[i] - center
        drift += deviation
        m2 += deviation * deviation
    return center + drift / values.size, m2 - drift * drift / values.size


@machinery
def _fold_single(values, rows, columns, count, mean, m2, scratch, squares):
    """Merge a tile of one feature into the feature's moments."""
    tile_mean, tile_m2, square = _single(values)
    if not _is_safe(square):
        tile_mean, tile_m2 = _double(values)
    count[0], mean[0], m2[0] = _merge(count[0], mean[0], m2[0], np.float64(values.size), tile_mean, tile_m2)


@machinery
def _fold_double(values, rows, columns, count, mean, m2, scratch, squares):
    tile_mean, tile_m2 = _double(values)
    count[0], mean[0], m2[0] = _merge(count[0], mean[0], m2[0], np.float64(values.size), tile_mean, tile_m2)


@summing
def _single_columns(values, mean, center, m2):
    """`_single` down every column at once; the correction is left to the caller."""
    rows, columns = values.shape
    mean[:] = 0
    m2[:] = 0
    for i in range(rows):
        for j in range(columns):
            mean[j] += np.float64(values[i, j])
    for j in range(columns):
        mean[j] /= rows
        center[j] = mean[j]
    for i in range(rows):
        for j in range(columns):
            deviation = values[i, j] - center[j]
            m2[j] += deviation * deviation


@summing
def _double_columns(values, center, drift, m2):
    """`_double` down every column at once; the correction is left to the caller."""
    rows, columns = values.shape
    center[:] = 0
    drift[:] = 0
    m2[:] = 0
    for i in range(rows):
        for j in range(columns):
            center[j] += values[i, j]
    for j in range(columns):
        center[j] /= rows
    for i in range(rows):
        for j in range(columns):
            deviation = values[i, j] - center[j]
            drift[j] += deviation
            m2[j] += deviation * deviation


@machinery
def _fold_single_columns(values, rows, columns, count, mean, m2, scratch, squares):
    """Merge a tile of many features into the features' moments."""
    tile = values.reshape(rows, columns)
    tile_mean, center, square = scratch[0, :columns], squares[0, :columns], squares[1, :columns]
    _single_columns(tile, tile_mean, center, square)
    unsafe = 0
    for j in range(columns):
        unsafe += not _is_safe(square[j])
    for j in range(columns):
        shift, n = tile_mean[j] - center[j], np.float64(rows)
        tile_m2 = square[j] - n * shift * shift
        if unsafe and not _is_safe(square[j]):
            tile_mean[j], tile_m2 = _double(tile[:, j])
        count[j], mean[j], m2[j] = _merge(count[j], mean[j], m2[j], n, tile_mean[j], tile_m2)


@machinery
def _fold_double_columns(values, rows, columns, count, mean, m2, scratch, squares):
    tile = values.reshape(rows, columns)
    center, drift, square = scratch[0, :columns], scratch[1, :columns], scratch[2, :columns]
    _double_columns(tile, center, drift, square)
    for j in range(columns):
        shift, n = drift[j] / rows, np.float64(rows)
        tile_m2 = square[j] - n * shift * shift
        count[j], mean[j], m2[j] = _merge(count[j], mean[j], m2[j], n, center[j] + shift, tile_m2)


@summing
def _weighted_deviations(values, weights):
    """Sum of weights, weighted mean and m2; elements of weight 0 are not looked at, be they NaN."""
    total = 0.0
    center = 0.0
    for i in range(values.size):
        total += weights[i]
        center += weights[i] * values[i] if weights[i] != 0 else 0.0
    if total == 0:
        return 0.0, 0.0, 0.0
    center /= total
    drift = 0.0
    m2 = 0.0
    for i in range(values.size):
        deviation = values[i] - center if weights[i] != 0 else 0.0
        drift += weights[i] * deviation
        m2 += weights[i] * deviation * deviation
    return total, center + drift / total, m2 - drift * drift / total


@machinery
def _fold_weighted_rows(values, weights, rows, columns, count, mean, m2):
    tile_count, tile_mean, tile_m2 = _weighted_deviations(values, weights)
    count[0], mean[0], m2[0] = _merge(count[0], mean[0], m2[0], tile_count, tile_mean, tile_m2)


@machinery
def _fold_weighted_columns(values, weights, rows, columns, count, mean, m2):
    tile, tile_weights = values.reshape(rows, columns), weights.reshape(rows, columns)
    for j in range(columns):
        tile_count, tile_mean, tile_m2 = _weighted_deviations(tile[:, j], tile_weights[:, j])
        count[j], mean[j], m2[j] = _merge(count[j], mean[j], m2[j], tile_count, tile_mean, tile_m2)


_FOLDS = {
    (np.float32, False): _fold_single,
    (np.float32, True): _fold_single_columns,
    (np.float64, False): _fold_double,
    (np.float64, True): _fold_double_columns,
}


@cache
def kernel(dtype, is_columns, weighted):
    """Make the kernel that leaves (count, mean, m2) of each group of chunks in a row of its last three arguments."""
    fold = _FOLDS[dtype, is_columns]
    fold_weighted = _fold_weighted_columns if is_columns else _fold_weighted_rows

    def moments(counter, grid, axes, x, x_kind, where, where_kind, count, mean, m2):
        values = np.empty(grid[TILE], dtype)
        weights = np.empty(grid[TILE] if weighted else 0, np.float64)
        scratch, squares = np.empty((3, grid[WIDTH]), np.float64), np.empty((2, grid[WIDTH]), np.float32)
        for group, rows, columns, first, last, place in tiles(counter, grid, axes):
            into = count[group, first:last], mean[group, first:last], m2[group, first:last]
            x_tile = load(address_of(x, axes, 1, place), steps_of(axes, 1), rows, columns, x_kind, values)
            if weighted:
                w_at = address_of(where, axes, 2, place)
                w_tile = load(w_at, steps_of(axes, 2), rows, columns, where_kind, weights)
                fold_weighted(x_tile, w_tile, rows, columns, *into)
            else:
                fold(x_tile, rows, columns, *into, scratch, squares)

    name = f"{'weighted_' * weighted}moments_{'columns' if is_columns else 'rows'}_{dtype.__name__}"
    return Kernel(
        name, types.void(counter, indices, table, index, index, index, index, partials, partials, partials), moments
    )


def _merge_groups(count, mean, m2):
    for group in range(1, count.shape[0]):
        for c in range(count.shape[1]):
            count[0, c], mean[0, c], m2[0, c] = _merge(
                count[0, c], mean[0, c], m2[0, c], count[group, c], mean[group, c], m2[group, c]
            )


#: Merges the groups in order into the first row.
merge_groups = Kernel("merge_groups", types.void(partials, partials, partials), _merge_groups)
