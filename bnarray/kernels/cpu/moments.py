"""Mean and sum of squared deviations of every feature, in one read of x.

The deviations of each tile from a center are summed, in float64::

    mean = center + Σ (x − center) / n
    m2   = Σ (x − center)² − (Σ (x − center))² / n

E[x²] − E[x]² (a center of 0) is never formed. In tiles of float32 the center is the tile's first value. Deviations of
float32 values are exact in float64 (but for scales 2²⁹ apart), and because the center is one of the n values, at most
log₂ n ≤ 14 of the 53 bits of m2 cancel: where it is the one outlier; else a few. In tiles of float64 the center is the
mean, found first (Chan, Golub and LeVeque, "Algorithms for computing the sample variance", 1983: the corrected two-pass
algorithm), which takes 1.5 times as long.

With weights w the sums are Σ w · (x − center) and so on, n is Σ w, and the center is the first value whose weight is
not 0. That weight may be small; where more than 8 bits of m2 would cancel, the sums are made again around the mean.

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
from bnarray.kernels.cpu.memory import (
    HALVES,
    carve,
    carve_rows,
    expect,
    from_row,
    item_of,
    line,
    load,
    narrow,
    room_in,
    tile_of,
    widen,
)
from bnarray.kernels.cpu.walk import LEAD, TILE, WIDTH, address_of, carve_place, steps_of, tiles
from bnarray.kernels.merge import merge

#: The merge, for scalars inside a kernel.
merge_scalars = machinery(merge)


# Between these a sum of squares in float32 has lost nothing below or above.
_SMALL, _LARGE = 2.0**-80, 2.0**100


# Lines of halves that are summed in float32 before the next ones are in float64. Where values repeat, each of the 16
# additions may round the same way: 5e-7 in all. (64 of them were off by 6e-6.)
LINES = 64

#: Lines of a masked tile that are copied before they are summed, in the nearest cache.
STRIP = 16


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
        expect(tile, row, columns, like)
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
def _add_products(tile, weights, rows, columns, like, heavy, center, count, drift, m2):
    """count += Σ w,  drift += Σ w · (x − center),  m2 += Σ w · (x − center)²

    Elements of weight 0 are not looked at, be they NaN.
    """
    middle, counts, drifts, squares = center[:columns], count[:columns], drift[:columns], m2[:columns]
    (x, down, _), (w, w_down, _) = tile, weights
    for row in range(0, rows - 3, 4):
        expect(tile, row, columns, like)
        expect(weights, row, columns, heavy)
        a, b = line(x, down, row, columns, like), line(x, down, row + 1, columns, like)
        c, d = line(x, down, row + 2, columns, like), line(x, down, row + 3, columns, like)
        p, q = line(w, w_down, row, columns, heavy), line(w, w_down, row + 1, columns, heavy)
        r, s = line(w, w_down, row + 2, columns, heavy), line(w, w_down, row + 3, columns, heavy)
        for j in range(middle.size):
            wa, wb, wc, wd = np.float64(p[j]), np.float64(q[j]), np.float64(r[j]), np.float64(s[j])
            da, db = widen(a[j]) - middle[j], widen(b[j]) - middle[j]
            dc, dd = widen(c[j]) - middle[j], widen(d[j]) - middle[j]
            da, db = da if wa != 0 else 0.0, db if wb != 0 else 0.0
            dc, dd = dc if wc != 0 else 0.0, dd if wd != 0 else 0.0
            ga, gb, gc, gd = wa * da, wb * db, wc * dc, wd * dd
            counts[j] += (wa + wb) + (wc + wd)
            drifts[j] += (ga + gb) + (gc + gd)
            squares[j] += (ga * da + gb * db) + (gc * dc + gd * dd)
    for row in range(rows - rows % 4, rows):
        a, p = line(x, down, row, columns, like), line(w, w_down, row, columns, heavy)
        for j in range(middle.size):
            weight = np.float64(p[j])
            deviation = widen(a[j]) - middle[j]
            deviation = deviation if weight != 0 else 0.0
            counts[j] += weight
            drifts[j] += weight * deviation
            squares[j] += weight * deviation * deviation


@mapping
def _choose(tile, mask, rows, columns, like, filler, count, chosen):
    """Copy x where it counts, and elsewhere the filler;  count += Σ mask"""
    counts, filling = count[:columns], filler[:columns]
    for row in range(rows):
        x, m = line(tile[0], tile[1], row, columns, like), line(mask[0], mask[1], row, columns, np.uint8(0))
        copy = chosen[row * columns : (row + 1) * columns]
        for j in range(filling.size):
            value, other, counting = x[j], filling[j], m[j] != 0
            copy[j] = value if counting else other
            counts[j] += np.int32(counting)


def _add_masked(tile, weights, rows, columns, like, heavy, center, count, drift, m2, room):
    filler, chosen, counts = room
    for j in range(columns):
        filler[j] = narrow(center[j], like)
        counts[j] = 0
    for row in range(0, rows, STRIP):
        lines = min(STRIP, rows - row)
        x, mask = from_row(tile, row), from_row(weights, row)
        _choose(x, mask, lines, columns, like, filler, counts, chosen)
        _add_deviations(tile_of(chosen, columns), lines, columns, like, center, drift, m2)
    for j in range(columns):
        count[j] += counts[j]


def _add_weighted(tile, weights, rows, columns, like, heavy, center, count, drift, m2, room):
    _add_products(tile, weights, rows, columns, like, heavy, center, count, drift, m2)


def add_counted(tile, weights, rows, columns, like, heavy, center, count, drift, m2, room):
    """Add Σ w, Σ w · (x − center) and Σ w · (x − center)² of a tile.

    Where w is a mask, what does not count is replaced by the center, and the rest is as without one: faster than
    products (`benchmarks/options.py`).
    """


@overload(add_counted, jit_options=PART)
def _add_counted(tile, weights, rows, columns, like, heavy, center, count, drift, m2, room):
    return _add_masked if heavy == types.uint8 else _add_weighted


@machinery
def carve_choice(room, width, like, heavy):
    """What `add_counted` needs besides sums, and the room that is left."""
    is_mask = item_of(heavy) == 1
    filler, room = carve(room, width if is_mask else 0, like)
    chosen, room = carve(room, STRIP * width if is_mask else 0, like)
    counts, room = carve(room, width if is_mask else 0, np.int32(0))
    return (filler, chosen, counts), room


@machinery
def _fold(c, n, center, drift, square, count, shift, offset, m2):
    """Merge a tile's sums into feature c's moments, whose mean is shift + offset."""
    if count[c] == 0:
        shift[c] = center
    tile_m2 = square - drift * (drift / n)  # its square may be beyond float64
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
    found = _sum_rows(tile, rows, columns, like, sums[1], _is_corrected(like))
    _fold(0, np.float64(rows * columns), *found, count, shift, offset, m2)


def _fold_rows_of_halves(tile, rows, columns, like, count, shift, offset, m2, sums):
    depth = LINES if columns <= MOST else max(1, LINES * lanes.WIDTH // columns)
    width = min(columns, LINES * lanes.WIDTH)
    for row in range(0, rows, depth):
        for begin in range(0, columns, width):
            part = from_row(tile, row, begin * item_of(like))
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
def _first_that_counts(tile, weights, rows, columns, like, heavy):
    for row in range(rows):
        x, w = line(tile[0], tile[1], row, columns, like), line(weights[0], weights[1], row, columns, heavy)
        for j in range(columns):
            if w[j] != 0:
                return np.float64(widen(x[j]))
    return 0.0


@machinery
def _is_corrected(like):
    """Whether the center has to be the mean."""
    return item_of(like) == 8


@machinery
def _is_weighted(heavy):
    return item_of(heavy) != 1


@machinery
def _is_far(n, drift, square):
    """Whether more than 8 bits of m2 cancel, because the center is far from the mean."""
    return drift * (drift / n) > square * (1 - 2.0**-8)


@machinery
def _sum_weighted_rows(tile, weights, rows, columns, like, heavy, sums, choice, middle):
    """Return (Σ w, Σ w · (x − center), Σ w · (x − center)²) of a tile of one feature."""
    center, drift, square, counts = sums[0], sums[1], sums[2], sums[3]
    item, heavy_item, width = item_of(like), item_of(heavy), width_of(columns)
    center[:width] = middle
    clear(drift, width)
    clear(square, width)
    clear(counts, width)
    for row, begin, lines, length in panels(rows, columns):
        part, part_weights = panel(tile, columns, row, begin, item), panel(weights, columns, row, begin, heavy_item)
        add_counted(part, part_weights, lines, length, like, heavy, center, counts, drift, square, choice)
    return total(counts, width), total(drift, width), total(square, width)


@machinery
def _fold_weighted_rows(tile, weights, rows, columns, like, heavy, count, shift, offset, m2, sums, choice):
    center = _first_that_counts(tile, weights, rows, columns, like, heavy)
    n, drift, square = _sum_weighted_rows(tile, weights, rows, columns, like, heavy, sums, choice, center)
    if n == 0:
        return
    if _is_corrected(like) or (_is_weighted(heavy) and _is_far(n, drift, square)):
        center += drift / n
        n, drift, square = _sum_weighted_rows(tile, weights, rows, columns, like, heavy, sums, choice, center)
    _fold(0, n, center, drift, square, count, shift, offset, m2)


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
    _sum_columns(tile, rows, columns, like, exact, _is_corrected(like))
    found = exact[0, :columns], exact[1, :columns], exact[2, :columns]
    _fold_all(np.float64(rows), *found, count, shift, offset, m2)


def _fold_columns_of_halves(tile, rows, columns, like, count, shift, offset, m2, sums):
    quick, exact = sums
    center, drift, square = exact[0, :columns], exact[1, :columns], exact[2, :columns]
    for row in range(0, rows, LINES):
        part, lines = from_row(tile, row), min(LINES, rows - row)
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
def _firsts_that_count(tile, weights, rows, columns, like, heavy, center, found):
    center[:], found[:] = 0, 0
    missing, row = columns, 0
    while missing > 0 and row < rows:
        x, w = line(tile[0], tile[1], row, columns, like), line(weights[0], weights[1], row, columns, heavy)
        for j in range(columns):
            is_first = w[j] != 0 and found[j] == 0
            center[j] = widen(x[j]) if is_first else center[j]
            found[j] = 1 if is_first else found[j]
            missing -= 1 if is_first else 0
        row += 1


@machinery
def _center_again(counts, center, drift, square, every):
    """Move centers that are far from the mean (or every one) to it. Return whether there were any."""
    moved = False
    for j in range(center.size):
        if counts[j] != 0 and (every or _is_far(counts[j], drift[j], square[j])):
            center[j] += drift[j] / counts[j]
            moved = True
    return moved


@machinery
def _finish_weighted(counts, center, drift, square, shift):
    for j in range(drift.size):
        mean_drift = drift[j] / counts[j] if counts[j] != 0 else 0.0
        m2 = square[j] - drift[j] * mean_drift
        square[j] = 0.0 if m2 < 0 else m2
        drift[j] = center[j] - shift[j] + mean_drift if counts[j] != 0 else 0.0


@machinery
def _merge_weighted(count, offset, m2, counts, other_offset, other_m2):
    for j in range(m2.size):
        count[j], offset[j], m2[j] = merge_scalars(count[j], offset[j], m2[j], counts[j], other_offset[j], other_m2[j])


@machinery
def _fold_weighted_columns(tile, weights, rows, columns, like, heavy, count, shift, offset, m2, sums, choice):
    center, drift, square, counts = sums[0, :columns], sums[1, :columns], sums[2, :columns], sums[3, :columns]
    _firsts_that_count(tile, weights, rows, columns, like, heavy, center, counts)
    drift[:], square[:], counts[:] = 0, 0, 0
    add_counted(tile, weights, rows, columns, like, heavy, center, counts, drift, square, choice)
    every = _is_corrected(like)
    if (every or _is_weighted(heavy)) and _center_again(counts, center, drift, square, every):
        drift[:], square[:], counts[:] = 0, 0, 0
        add_counted(tile, weights, rows, columns, like, heavy, center, counts, drift, square, choice)
    for j in range(columns):
        shift[j] = center[j] if count[j] == 0 else shift[j]
    _finish_weighted(counts, center, drift, square, shift)
    _merge_weighted(count, offset, m2, counts, drift, square)


@cache
def kernel(dtype, is_columns, weight_type):
    """Make the kernel that leaves (count, shift, offset, m2) of each group of chunks in rows of its last arguments.

    Weights, if any, come in tiles of a type of their own.
    """
    fold = fold_columns if is_columns else fold_rows
    fold_weighted = _fold_weighted_columns if is_columns else _fold_weighted_rows

    like, weighted = dtype(0), weight_type is not None
    heavy = weight_type(0) if weighted else 0.0

    def moments(counter, scratch, grid, axes, x, x_kind, where, where_kind, count, shift, offset, m2):
        place, room = carve_place(room_in(scratch), axes)
        values, room = carve(room, grid[TILE], like)
        weights, room = carve(room, grid[TILE] if weighted else 0, heavy)
        sums, room = carve_sums(room, max(grid[WIDTH], MOST), like)
        choice, room = carve_choice(room, max(grid[WIDTH], MOST), like, heavy)
        for group, rows, columns, first, last in tiles(counter, grid, axes, place):
            into = count[group, first:last], shift[group, first:last], offset[group, first:last], m2[group, first:last]
            x_tile = load(address_of(x, axes, 1, place), steps_of(axes, 1), rows, columns, x_kind, values, grid[LEAD])
            if weighted:
                w_at = address_of(where, axes, 2, place)
                w_tile = load(w_at, steps_of(axes, 2), rows, columns, where_kind, weights, grid[LEAD])
                fold_weighted(x_tile, w_tile, rows, columns, like, heavy, *into, sums[1], choice)
            else:
                fold(x_tile, rows, columns, like, *into, sums)

    weights_name = f"weighted_{weight_type.__name__}_" if weighted else ""
    name = f"{weights_name}moments_{'columns' if is_columns else 'rows'}_{dtype.__name__}"
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


# Group after group, in loops over few enough arrays to be vectorised. Feature after feature, each division waits for
# the one before: that took 95 µs of 330 on (4096, 512), this takes 13.


@machinery
def _align(count, shift, n, other_shift, other_offset):
    """Have another group's offsets be from the shifts of those before; a group in which nothing counted has none."""
    for c in range(shift.size):
        shift[c] = other_shift[c] if count[c] == 0 else shift[c]
        other_offset[c] += other_shift[c] - shift[c] if n[c] != 0 else 0.0


@machinery
def _merge_m2(count, offset, m2, n, other_offset, other_m2):
    for c in range(m2.size):
        m2[c] = merge_scalars(count[c], offset[c], m2[c], n[c], other_offset[c], other_m2[c])[2]


@machinery
def _merge_offsets(count, offset, n, other_offset):
    for c in range(offset.size):
        count[c], offset[c], _ = merge_scalars(count[c], offset[c], 0.0, n[c], other_offset[c], 0.0)


@machinery
def merge_all(count, shift, offset, m2, mean):
    """Merge the groups in order into the first row, and round the mean."""
    for group in range(1, count.shape[0]):
        _align(count[0], shift[0], count[group], shift[group], offset[group])
        _merge_m2(count[0], offset[0], m2[0], count[group], offset[group], m2[group])
        _merge_offsets(count[0], offset[0], count[group], offset[group])
    for c in range(mean.size):
        mean[c] = shift[0, c] + offset[0, c]


def _merge_groups(count, shift, offset, m2, mean):
    merge_all(count, shift, offset, m2, mean)


merge_groups = Kernel("merge_groups", types.void(partials, partials, partials, partials, results), _merge_groups)
