"""Mean and sum of squared deviations of every feature, in one read of x.

The deviations of each tile from a center are summed, in float64::

    mean = center + Σ (x − center) / n
    m2   = Σ (x − center)² − (Σ (x − center))² / n

E[x²] − E[x]² (a center of 0) is never formed. In tiles of float32 the center is the tile's first value. Deviations of
float32 values are exact in float64 (but for scales 2²⁹ apart), and because the center is one of the n values, at most
log₂ n ≤ 14 of the 53 bits of m2 cancel: where it is the one outlier; else a few. In tiles of float64, and under
weights, the center is the mean, found first (Chan, Golub and LeVeque, "Algorithms for computing the sample variance",
1983: the corrected two-pass algorithm), which takes 1.5 times as long.

Tiles of half precision are summed in float32, with two of its 24 bits to spare: from the nearest half to the mean of a
quarter of the tile's values, which costs m2 two bits at the most (Σ over a part ≤ √(part · m2)). Where a sum of squares
may have left float32's range, the feature is summed once more in float64.

Tiles are merged in float64, and instead of their means the distances of those from the first tile's center, the
`shift`: where the mean is 10⁶ deviations, its own rounding, merge after merge, would show in the outputs next to 0. It
is rounded once, at the end.

For float32 data sums in float32 are 1.2 to 1.4 times faster (`benchmarks/arithmetic.py`) but not exact enough: where
many values are equal they add the same rounding again and again.

Traffic: reads x once (and `where`), writes nothing of x's size.
Measured (`benchmarks/kernels.py`, 25 MB of float32, two threads of an Intel Xeon), GB/s of it: channels first 30.5,
short rows 28.2, channels last 27.4; NumPy's copy channels first 31.0, short rows 34.6, channels last 29.0.
"""

from functools import cache

import numpy as np
from numba import types
from numba.extending import overload

from bnarray.kernels.cpu import lanes
from bnarray.kernels.cpu.compiled import (
    PART,
    Kernel,
    counter,
    index,
    indices,
    machinery,
    mapping,
    partials,
    results,
    scratch,
    table,
)
from bnarray.kernels.cpu.lanes import MOST, clear, panel, panels, total, width_of
from bnarray.kernels.cpu.memory import HALVES, carve, carve_rows, item_of, line, load, narrow, room_in, widen
from bnarray.kernels.cpu.walk import TILE, WIDTH, address_of, carve_place, steps_of, tiles
from bnarray.kernels.merge import merge

#: The merge, for scalars inside a kernel.
merge_scalars = machinery(merge)


# Between these a sum of squares in float32 has lost nothing below or above.
_SMALL, _LARGE = 2.0**-80, 2.0**100


# Lines of halves that are summed in float32 before the next ones are in float64. Where values repeat, each of the 16
# additions may round the same way: 5e-7 in all. (64 of them were off by 6e-6.)
LINES = 64


@machinery
def is_beyond(square):
    """Whether a sum of squares may not be what it would be in float64; as is 0, the sum of nothing or of too little."""
    return not _SMALL <= square <= _LARGE


@machinery
def carve_sums(room, width, like):
    """Rows for sums of a tile, in float32 (for halves only) and in float64, and the room that is left."""
    quick, room = carve_rows(room, 3, width if item_of(like) == 2 else 0, np.float32(0))
    exact, room = carve_rows(room, 4, width, 0.0)
    return (quick, exact), room


@machinery
def part_for_center(rows, columns, like):
    """The part of a tile (or of its columns) whose mean is the center: all of float64's, a quarter of halves."""
    if item_of(like) == 8:
        return rows, columns
    return ((rows + 3) // 4, columns) if rows >= 4 else (rows, (columns + 3) // 4)


@machinery
def _rounded(center, like):
    """A center near the mean. The nearest half, from which deviations of halves are mostly exact in float32, and so few
    of them that their sum is, too."""
    return widen(narrow(center, like)) if item_of(like) == 2 else center


# Sums down the columns of a tile, four lines at a time, so that they are read and written a quarter as often. In the
# precision of what they are added to.


@mapping
def _add(tile, rows, columns, like, center):
    """center += Σ x"""
    sums, real = center[:columns], center.dtype.type
    for row in range(0, rows - 3, 4):
        a, b = line(tile[0], tile[1], row, columns, like), line(tile[0], tile[1], row + 1, columns, like)
        c, d = line(tile[0], tile[1], row + 2, columns, like), line(tile[0], tile[1], row + 3, columns, like)
        for j in range(sums.size):
            sums[j] += (real(widen(a[j])) + real(widen(b[j]))) + (real(widen(c[j])) + real(widen(d[j])))
    for row in range(rows - rows % 4, rows):
        a = line(tile[0], tile[1], row, columns, like)
        for j in range(sums.size):
            sums[j] += widen(a[j])


@mapping
def _add_deviations(tile, rows, columns, like, center, drift, m2):
    """drift += Σ (x − center),  m2 += Σ (x − center)²"""
    middle, drifts, squares = center[:columns], drift[:columns], m2[:columns]
    for row in range(0, rows - 3, 4):
        a, b = line(tile[0], tile[1], row, columns, like), line(tile[0], tile[1], row + 1, columns, like)
        c, d = line(tile[0], tile[1], row + 2, columns, like), line(tile[0], tile[1], row + 3, columns, like)
        for j in range(middle.size):
            da, db = widen(a[j]) - middle[j], widen(b[j]) - middle[j]
            dc, dd = widen(c[j]) - middle[j], widen(d[j]) - middle[j]
            drifts[j] += (da + db) + (dc + dd)
            squares[j] += (da * da + db * db) + (dc * dc + dd * dd)
    for row in range(rows - rows % 4, rows):
        a = line(tile[0], tile[1], row, columns, like)
        for j in range(middle.size):
            deviation = widen(a[j]) - middle[j]
            drifts[j] += deviation
            squares[j] += deviation * deviation


@mapping
def _add_weighted(tile, weights, rows, columns, like, count, center):
    """count += Σ w,  center += Σ w · x; elements of weight 0 are not looked at, be they NaN."""
    counts, sums = count[:columns], center[:columns]
    for row in range(rows):
        x, w = line(tile[0], tile[1], row, columns, like), line(weights[0], weights[1], row, columns, 0.0)
        for j in range(sums.size):
            counts[j] += w[j]
            sums[j] += w[j] * widen(x[j]) if w[j] != 0 else 0.0


@mapping
def _add_weighted_deviations(tile, weights, rows, columns, like, center, drift, m2):
    """drift += Σ w · (x − center),  m2 += Σ w · (x − center)²"""
    middle, drifts, squares = center[:columns], drift[:columns], m2[:columns]
    for row in range(rows):
        x, w = line(tile[0], tile[1], row, columns, like), line(weights[0], weights[1], row, columns, 0.0)
        for j in range(middle.size):
            deviation = widen(x[j]) - middle[j] if w[j] != 0 else 0.0
            drifts[j] += w[j] * deviation
            squares[j] += w[j] * deviation * deviation


@machinery
def _fold(c, n, center, drift, square, count, shift, offset, m2):
    """Merge a tile's sums into feature c's moments, whose mean is shift + offset."""
    if count[c] == 0:
        shift[c] = center
    tile_m2 = square - drift * drift / n
    tile_m2 = 0.0 if tile_m2 < 0 else tile_m2  # what rounding takes below zero; NaN stays
    tile_offset = center - shift[c] + drift / n
    count[c], offset[c], m2[c] = merge_scalars(count[c], offset[c], m2[c], n, tile_offset, tile_m2)


@machinery
def _sum_rows(tile, rows, columns, like, sums, is_corrected):
    """Return (center, Σ (x − center), Σ (x − center)²) of a tile of one feature."""
    center, drift, square = sums[0], sums[1], sums[2]
    item, width = item_of(like), width_of(columns)
    middle = sums.dtype.type(widen(line(tile[0], tile[1], 0, 1, like)[0]))
    if is_corrected:
        some_rows, some_columns = part_for_center(rows, columns, like)
        own_width = width_of(some_columns)
        clear(center, own_width)
        for row, begin, lines, length in panels(some_rows, some_columns):
            _add(panel(tile, some_columns, row, begin, item), lines, length, like, center)
        middle = _rounded(sums.dtype.type(total(center, own_width) / (some_rows * some_columns)), like)
    center[:width] = middle
    clear(drift, width)
    clear(square, width)
    for row, begin, lines, length in panels(rows, columns):
        _add_deviations(panel(tile, columns, row, begin, item), lines, length, like, center, drift, square)
    return np.float64(middle), total(drift, width), total(square, width)


def _fold_rows(tile, rows, columns, like, count, shift, offset, m2, sums):
    found = _sum_rows(tile, rows, columns, like, sums[1], item_of(like) == 8)
    _fold(0, np.float64(rows * columns), *found, count, shift, offset, m2)


def _fold_rows_of_halves(tile, rows, columns, like, count, shift, offset, m2, sums):
    at, step = tile
    depth = LINES if columns <= MOST else max(1, LINES * lanes.WIDTH // columns)
    width = min(columns, LINES * lanes.WIDTH)
    for row in range(0, rows, depth):
        for begin in range(0, columns, width):
            part = at + row * step + begin * item_of(like), step
            lines, length = min(depth, rows - row), min(width, columns - begin)
            found = _sum_rows(part, lines, length, like, sums[0], True)
            if is_beyond(found[2]):
                found = _sum_rows(part, lines, length, like, sums[1], False)
            _fold(0, np.float64(lines * length), *found, count, shift, offset, m2)


def fold_rows(tile, rows, columns, like, count, shift, offset, m2, sums):
    """Merge a tile of one feature into the feature's moments."""


@overload(fold_rows, jit_options=PART)
def _fold_rows_of(tile, rows, columns, like, count, shift, offset, m2, sums):
    return _fold_rows_of_halves if like in HALVES else _fold_rows


@machinery
def _fold_weighted_rows(tile, weights, rows, columns, like, count, shift, offset, m2, sums):
    center, drift, square, counts = sums[0], sums[1], sums[2], sums[3]
    item, width = item_of(like), width_of(columns)
    clear(center, width)
    clear(drift, width)
    clear(square, width)
    clear(counts, width)
    for row, begin, lines, length in panels(rows, columns):
        part, part_weights = panel(tile, columns, row, begin, item), panel(weights, columns, row, begin, 8)
        _add_weighted(part, part_weights, lines, length, like, counts, center)
    n = total(counts, width)
    if n == 0:
        return
    middle = total(center, width) / n
    center[:width] = middle
    for row, begin, lines, length in panels(rows, columns):
        part, part_weights = panel(tile, columns, row, begin, item), panel(weights, columns, row, begin, 8)
        _add_weighted_deviations(part, part_weights, lines, length, like, center, drift, square)
    _fold(0, n, middle, total(drift, width), total(square, width), count, shift, offset, m2)


@machinery
def _sum_columns(tile, rows, columns, like, sums, is_corrected):
    """Leave center, Σ (x − center) and Σ (x − center)² of each feature of a tile in rows of sums."""
    center, drift, square = sums[0, :columns], sums[1, :columns], sums[2, :columns]
    sums[:3, :columns] = 0
    if is_corrected:
        some, _ = part_for_center(rows, 1, like)
        _add(tile, some, columns, like, center)
        for j in range(columns):
            center[j] = _rounded(center[j] / some, like)
    else:
        _add(tile, 1, columns, like, center)
    _add_deviations(tile, rows, columns, like, center, drift, square)


@machinery
def _sum_one_column(tile, rows, columns, j, like):
    """As `_sum_columns` in float64, for one feature."""
    center, drift, square = np.float64(widen(line(tile[0], tile[1], 0, columns, like)[j])), 0.0, 0.0
    for row in range(rows):
        deviation = widen(line(tile[0], tile[1], row, columns, like)[j]) - center
        drift += deviation
        square += deviation * deviation
    return center, drift, square


# As `_fold`, for many features of one count; in two loops, because one over more arrays is not vectorised. (Not
# `mapping`: which product is fused with a sum would depend on the kernel around.)


@machinery
def _finish(n, center, drift, square, shift):
    """Turn sums of deviations from the center into (offset, m2)."""
    for j in range(drift.size):
        mean_drift = drift[j] / n
        m2 = square[j] - drift[j] * mean_drift
        square[j] = 0.0 if m2 < 0 else m2
        drift[j] = center[j] - shift[j] + mean_drift


@machinery
def _merge_alike(count, offset, m2, n, other_offset, other_m2):
    for j in range(m2.size):
        _, offset[j], m2[j] = merge_scalars(count, offset[j], m2[j], n, other_offset[j], other_m2[j])


@machinery
def _fold_all(n, center, drift, square, count, shift, offset, m2):
    if count[0] == 0:
        for j in range(shift.size):
            shift[j] = center[j]
    _finish(n, center, drift, square, shift)
    _merge_alike(count[0], offset, m2, n, drift, square)
    count += n


def _fold_columns(tile, rows, columns, like, count, shift, offset, m2, sums):
    exact = sums[1]
    _sum_columns(tile, rows, columns, like, exact, item_of(like) == 8)
    found = exact[0, :columns], exact[1, :columns], exact[2, :columns]
    _fold_all(np.float64(rows), *found, count, shift, offset, m2)


def _fold_columns_of_halves(tile, rows, columns, like, count, shift, offset, m2, sums):
    quick, exact = sums
    center, drift, square = exact[0, :columns], exact[1, :columns], exact[2, :columns]
    for row in range(0, rows, LINES):
        part, lines = (tile[0] + row * tile[1], tile[1]), min(LINES, rows - row)
        _sum_columns(part, lines, columns, like, quick, True)
        for j in range(columns):
            center[j], drift[j], square[j] = quick[0, j], quick[1, j], quick[2, j]
        for j in range(columns):
            if is_beyond(square[j]):
                center[j], drift[j], square[j] = _sum_one_column(part, lines, columns, j, like)
        _fold_all(np.float64(lines), center, drift, square, count, shift, offset, m2)


def fold_columns(tile, rows, columns, like, count, shift, offset, m2, sums):
    """Merge a tile of many features into the features' moments."""


@overload(fold_columns, jit_options=PART)
def _fold_columns_of(tile, rows, columns, like, count, shift, offset, m2, sums):
    return _fold_columns_of_halves if like in HALVES else _fold_columns


@machinery
def _fold_weighted_columns(tile, weights, rows, columns, like, count, shift, offset, m2, sums):
    center, drift, square, counts = sums[0, :columns], sums[1, :columns], sums[2, :columns], sums[3, :columns]
    sums[:, :columns] = 0
    _add_weighted(tile, weights, rows, columns, like, counts, center)
    for j in range(columns):
        center[j] = center[j] / counts[j] if counts[j] != 0 else 0.0
    _add_weighted_deviations(tile, weights, rows, columns, like, center, drift, square)
    for j in range(columns):
        if counts[j] != 0:
            _fold(j, counts[j], center[j], drift[j], square[j], count, shift, offset, m2)


@cache
def kernel(dtype, is_columns, weighted):
    """Make the kernel that leaves (count, shift, offset, m2) of each group of chunks in rows of its last arguments."""
    fold = fold_columns if is_columns else fold_rows
    fold_weighted = _fold_weighted_columns if is_columns else _fold_weighted_rows

    like = dtype(0)

    def moments(counter, scratch, grid, axes, x, x_kind, where, where_kind, count, shift, offset, m2):
        place, room = carve_place(room_in(scratch), axes)
        values, room = carve(room, grid[TILE], like)
        weights, room = carve(room, grid[TILE] if weighted else 0, 0.0)
        sums, room = carve_sums(room, max(grid[WIDTH], MOST), like)
        for group, rows, columns, first, last in tiles(counter, grid, axes, place):
            into = count[group, first:last], shift[group, first:last], offset[group, first:last], m2[group, first:last]
            x_tile = load(address_of(x, axes, 1, place), steps_of(axes, 1), rows, columns, x_kind, values)
            if weighted:
                w_at = address_of(where, axes, 2, place)
                w_tile = load(w_at, steps_of(axes, 2), rows, columns, where_kind, weights)
                fold_weighted(x_tile, w_tile, rows, columns, like, *into, sums[1])
            else:
                fold(x_tile, rows, columns, like, *into, sums)

    name = f"{'weighted_' * weighted}moments_{'columns' if is_columns else 'rows'}_{dtype.__name__}"
    addresses = (index, index, index, index)
    return Kernel(
        name, types.void(counter, scratch, indices, table, *addresses, partials, partials, partials, partials), moments
    )


@machinery
def merge_into(c, count, shift, offset, m2, n, other_shift, other_offset, other_m2):
    """Merge another group's moments into feature c's; a group in which nothing counted has no shift."""
    if count[c] == 0:
        shift[c] = other_shift
    other_offset += other_shift - shift[c] if n != 0 else 0.0
    count[c], offset[c], m2[c] = merge_scalars(count[c], offset[c], m2[c], n, other_offset, other_m2)


@machinery
def merge_all(count, shift, offset, m2, mean):
    """Merge the groups in order into the first row, and round the mean."""
    for c in range(mean.size):
        into = count[0], shift[0], offset[0], m2[0]
        for group in range(1, count.shape[0]):
            merge_into(c, *into, count[group, c], shift[group, c], offset[group, c], m2[group, c])
        mean[c] = shift[0, c] + offset[0, c]


def _merge_groups(count, shift, offset, m2, mean):
    merge_all(count, shift, offset, m2, mean)


merge_groups = Kernel("merge_groups", types.void(partials, partials, partials, partials, results), _merge_groups)
