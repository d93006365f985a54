"""Mean and sum of squared deviations of every feature, in one read of x.

Each tile is summed, then its deviations from that mean while it is still in cache, in float64::

    center = Σ x / n
    mean   = center + Σ (x − center) / n
    m2     = Σ (x − center)² − (Σ (x − center))² / n

The second sums make up for the rounding of the first (Chan, Golub and LeVeque, "Algorithms for computing the sample
variance", 1983: the corrected two-pass algorithm); E[x²] − E[x]² is never formed. Tiles are merged in float64, and
instead of their means the distances of those from the first tile's center, the `shift`: where the mean is 10⁶
deviations, its own rounding, merge after merge, would show in the outputs next to 0. It is rounded once, at the end.

Sums in float32 are 1.2 to 1.4 times faster (`benchmarks/arithmetic.py`) but not exact enough: where many values are
equal they add the same rounding again and again.

Traffic: reads x once (and `where`), writes nothing of x's size.
"""

from functools import cache

import numpy as np
from numba import types

from bnarray.kernels.cpu.compiled import Kernel, counter, index, indices, machinery, partials, results, summing, table
from bnarray.kernels.cpu.memory import load
from bnarray.kernels.cpu.walk import TILE, WIDTH, address_of, steps_of, tiles
from bnarray.kernels.merge import merge

#: The merge, for scalars inside a kernel.
merge_scalars = machinery(merge)


@machinery
def _not_below_zero(m2):
    """What rounding takes below zero; NaN stays."""
    return 0.0 if m2 < 0 else m2


@summing
def _deviations(values):
    """Center, mean's distance from it, and m2 of a flat tile."""
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
    return center, drift / values.size, _not_below_zero(m2 - drift * drift / values.size)


@machinery
def _fold(c, n, center, drift, tile_m2, count, shift, offset, m2):
    """Merge a tile's moments into feature c's, whose mean is shift + offset."""
    if count[c] == 0:
        shift[c] = center
    count[c], offset[c], m2[c] = merge_scalars(count[c], offset[c], m2[c], n, center - shift[c] + drift, tile_m2)


@machinery
def fold_rows(values, rows, columns, count, shift, offset, m2, scratch):
    """Merge a tile of one feature into the feature's moments."""
    center, drift, tile_m2 = _deviations(values)
    _fold(0, np.float64(values.size), center, drift, tile_m2, count, shift, offset, m2)


@summing
def _column_deviations(values, center, drift, m2):
    """The sums of `_deviations` down every column at once; the correction is left to the caller."""
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
def _fold_columns(values, rows, columns, count, shift, offset, m2, scratch):
    """Merge a tile of many features into the features' moments."""
    center, drift, square = scratch[0, :columns], scratch[1, :columns], scratch[2, :columns]
    _column_deviations(values.reshape(rows, columns), center, drift, square)
    n = np.float64(rows)
    for j in range(columns):
        tile_m2 = _not_below_zero(square[j] - drift[j] * drift[j] / n)
        _fold(j, n, center[j], drift[j] / n, tile_m2, count, shift, offset, m2)


@summing
def _weighted_deviations(values, weights):
    """Sum of weights, then as `_deviations`; elements of weight 0 are not looked at, be they NaN."""
    total = 0.0
    center = 0.0
    for i in range(values.size):
        total += weights[i]
        center += weights[i] * values[i] if weights[i] != 0 else 0.0
    if total == 0:
        return 0.0, 0.0, 0.0, 0.0
    center /= total
    drift = 0.0
    m2 = 0.0
    for i in range(values.size):
        deviation = values[i] - center if weights[i] != 0 else 0.0
        drift += weights[i] * deviation
        m2 += weights[i] * deviation * deviation
    return total, center, drift / total, _not_below_zero(m2 - drift * drift / total)


@machinery
def _fold_weighted_rows(values, weights, rows, columns, count, shift, offset, m2):
    n, center, drift, tile_m2 = _weighted_deviations(values, weights)
    _fold(0, n, center, drift, tile_m2, count, shift, offset, m2)


@machinery
def _fold_weighted_columns(values, weights, rows, columns, count, shift, offset, m2):
    tile, tile_weights = values.reshape(rows, columns), weights.reshape(rows, columns)
    for j in range(columns):
        n, center, drift, tile_m2 = _weighted_deviations(tile[:, j], tile_weights[:, j])
        _fold(j, n, center, drift, tile_m2, count, shift, offset, m2)


@cache
def kernel(dtype, is_columns, weighted):
    """Make the kernel that leaves (count, shift, offset, m2) of each group of chunks in rows of its last arguments."""
    fold = _fold_columns if is_columns else fold_rows
    fold_weighted = _fold_weighted_columns if is_columns else _fold_weighted_rows

    def moments(counter, grid, axes, x, x_kind, where, where_kind, count, shift, offset, m2):
        values = np.empty(grid[TILE], dtype)
        weights = np.empty(grid[TILE] if weighted else 0, np.float64)
        scratch = np.empty((3, grid[WIDTH]), np.float64)
        for group, rows, columns, first, last, place in tiles(counter, grid, axes):
            into = count[group, first:last], shift[group, first:last], offset[group, first:last], m2[group, first:last]
            x_tile = load(address_of(x, axes, 1, place), steps_of(axes, 1), rows, columns, x_kind, values)
            if weighted:
                w_at = address_of(where, axes, 2, place)
                w_tile = load(w_at, steps_of(axes, 2), rows, columns, where_kind, weights)
                fold_weighted(x_tile, w_tile, rows, columns, *into)
            else:
                fold(x_tile, rows, columns, *into, scratch)

    name = f"{'weighted_' * weighted}moments_{'columns' if is_columns else 'rows'}_{dtype.__name__}"
    addresses = (index, index, index, index)
    return Kernel(
        name, types.void(counter, indices, table, *addresses, partials, partials, partials, partials), moments
    )


@machinery
def merge_into(c, count, shift, offset, m2, n, other_shift, other_offset, other_m2):
    """Merge another group's moments into feature c's; a group in which nothing counted has no shift."""
    if count[c] == 0:
        shift[c] = other_shift
    other_offset += other_shift - shift[c] if n != 0 else 0.0
    count[c], offset[c], m2[c] = merge_scalars(count[c], offset[c], m2[c], n, other_offset, other_m2)


def _merge_groups(count, shift, offset, m2, mean):
    for c in range(mean.size):
        into = count[0], shift[0], offset[0], m2[0]
        for group in range(1, count.shape[0]):
            merge_into(c, *into, count[group, c], shift[group, c], offset[group, c], m2[group, c])
        mean[c] = shift[0, c] + offset[0, c]


#: Merges the groups in order into the first row, and rounds the mean.
merge_groups = Kernel("merge_groups", types.void(partials, partials, partials, partials, results), _merge_groups)
