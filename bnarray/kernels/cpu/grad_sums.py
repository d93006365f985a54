"""The two sums per feature of the backward pass, which are the gradients of bias and weight::

    Σ dz        Σ dz · x̂ = invstd · Σ dz · (x − mean)

dz is dy, or what of it passes ReLU. Where dz is 0 nothing is added, be x NaN: padding that no loss looks at does not
disturb the gradients. Sums are float64.

Traffic: reads x and dy (and, under ReLU, the residual) once, writes nothing of x's size.
Measured (`benchmarks/kernels.py`, 25 MB of float32, two threads of an Intel Xeon), GB/s of it: channels first 33.6,
short rows 25.3, channels last 32.2; NumPy's copy channels first 31.0, short rows 34.6, channels last 29.0.
"""

from functools import cache

import numpy as np
from numba import types
from numba.extending import overload

from bnarray.kernels.cpu.coefficients import (
    LARGE,
    STATISTICS,
    carve_coefficients,
    count_of,
    fill,
    invstd_of,
    of_features,
    of_line,
)
from bnarray.kernels.cpu.compiled import (
    PART,
    Kernel,
    counter,
    index,
    indices,
    machinery,
    mapping,
    number,
    partials,
    scratch,
    table,
    vector,
)
from bnarray.kernels.cpu.gate import GATES, RELU_ONTO, passing
from bnarray.kernels.cpu.lanes import MOST, clear, panel, panels, total, width_of
from bnarray.kernels.cpu.memory import HALVES, arithmetic, carve, expect, item_of, line, load, room_in, widen
from bnarray.kernels.cpu.moments import carve_sums
from bnarray.kernels.cpu.pool import REFUSED
from bnarray.kernels.cpu.walk import LEAD, TILE, WIDTH, address_of, carve_place, steps_of, tiles

#: Lines that hold the center, scale and shift of a tile's one feature.
LANES = 3

# Down the columns four lines at a time, so that the sums are read and written a quarter as often. In the precision of
# what they are added to. Where dz is 0 and x is not finite NaN comes out: such a feature is summed once more.


@mapping
def _add(gate, dy_tile, x_tile, r_tile, rows, columns, like, of, mean, sum_dz, sum_dz_x):
    """sum_dz += Σ dz,  sum_dz_x += Σ dz · (x − mean)"""
    middle, plain, product, real = mean[:columns], sum_dz[:columns], sum_dz_x[:columns], mean.dtype.type
    center, scale, shift = of
    (dy, down, _), (x, x_down, _), (r, r_down, _) = dy_tile, x_tile, r_tile
    for row in range(0, rows - 3, 4):
        expect(dy_tile, row, columns, like)
        expect(x_tile, row, columns, like)
        a, b = line(dy, down, row, columns, like), line(dy, down, row + 1, columns, like)
        c, d = line(dy, down, row + 2, columns, like), line(dy, down, row + 3, columns, like)
        p, q = line(x, x_down, row, columns, like), line(x, x_down, row + 1, columns, like)
        t, u = line(x, x_down, row + 2, columns, like), line(x, x_down, row + 3, columns, like)
        e, f = line(r, r_down, row, columns, like), line(r, r_down, row + 1, columns, like)
        g, h = line(r, r_down, row + 2, columns, like), line(r, r_down, row + 3, columns, like)
        for j in range(middle.size):
            xa, xb, xc, xd = widen(p[j]), widen(q[j]), widen(t[j]), widen(u[j])
            ga = real(passing(gate, widen(a[j]), xa, widen(e[j]), center[j], scale[j], shift[j]))
            gb = real(passing(gate, widen(b[j]), xb, widen(f[j]), center[j], scale[j], shift[j]))
            gc = real(passing(gate, widen(c[j]), xc, widen(g[j]), center[j], scale[j], shift[j]))
            gd = real(passing(gate, widen(d[j]), xd, widen(h[j]), center[j], scale[j], shift[j]))
            plain[j] += (ga + gb) + (gc + gd)
            # One by one, so that there is one way to fuse products with sums.
            summed = product[j] + ga * (xa - middle[j])
            summed += gb * (xb - middle[j])
            summed += gc * (xc - middle[j])
            product[j] = summed + gd * (xd - middle[j])
    for row in range(rows - rows % 4, rows):
        a, p, e = (
            line(dy, down, row, columns, like),
            line(x, x_down, row, columns, like),
            line(r, r_down, row, columns, like),
        )
        for j in range(middle.size):
            xa = widen(p[j])
            ga = real(passing(gate, widen(a[j]), xa, widen(e[j]), center[j], scale[j], shift[j]))
            plain[j] += ga
            product[j] += ga * (xa - middle[j])


@machinery
def _sum_again(gate, dy_tile, x_tile, r_tile, rows, columns, first, step, like, of, mean):
    """Return Σ dz and Σ dz · (x − mean) of every step-th column from the first one, in float64."""
    plain, product = 0.0, 0.0
    center, scale, shift = of
    for row in range(rows):
        dy, x = line(dy_tile[0], dy_tile[1], row, columns, like), line(x_tile[0], x_tile[1], row, columns, like)
        residual = line(r_tile[0], r_tile[1], row, columns, like)
        for j in range(first, columns, step):
            g = np.float64(passing(gate, widen(dy[j]), widen(x[j]), widen(residual[j]), center, scale, shift))
            plain += g
            product += g * (widen(x[j]) - mean) if g != 0 else 0.0
    return plain, product


@machinery
def _sum_rows(gate, dy_tile, x_tile, r_tile, rows, columns, like, of, lanes, mean, sums):
    """Return Σ dz and Σ dz · (x − mean) of a tile of one feature, with the mean as the sums hold it."""
    middle, plain, product = sums[0], sums[1], sums[2]
    center, scale, shift = lanes
    item, width = item_of(like), width_of(columns)
    clear(plain, width)
    clear(product, width)
    middle[:width] = mean
    center[:width], scale[:width], shift[:width] = of[0][0], of[1][0], of[2][0]
    for row, begin, lines, length in panels(rows, columns):
        dy_part, x_part = panel(dy_tile, columns, row, begin, item), panel(x_tile, columns, row, begin, item)
        r_part = panel(r_tile, columns, row, begin, item)
        _add(gate, dy_part, x_part, r_part, lines, length, like, lanes, middle, plain, product)
    return np.float64(total(plain, width)), np.float64(total(product, width))


@machinery
def _rest(mean, center):
    """What a center leaves of the mean."""
    return mean - np.float64(center) if mean != center else 0.0


@machinery
def _is_held(plain, product):
    """Whether sums are what they would be in float64, term by term."""
    return abs(plain) < LARGE and abs(product) < LARGE


def _add_rows(gate, dy_tile, x_tile, r_tile, rows, columns, like, of, mean, sum_dz, sum_dz_x, room):
    sums, lanes = room
    tiles = dy_tile, x_tile, r_tile
    plain, product = _sum_rows(gate, *tiles, rows, columns, like, of, lanes, mean[0], sums[1])
    if not _is_held(plain, product):
        plain, product = _sum_again(gate, *tiles, rows, columns, 0, 1, like, of_line(of, 0), mean[0])
    sum_dz[0] += plain
    sum_dz_x[0] += product


def _add_rows_of_halves(gate, dy_tile, x_tile, r_tile, rows, columns, like, of, mean, sum_dz, sum_dz_x, room):
    sums, lanes = room
    tiles = dy_tile, x_tile, r_tile
    plain, product = _sum_rows(gate, *tiles, rows, columns, like, of, lanes, mean[0], sums[0])
    if _is_held(plain, product):
        product -= _rest(mean[0], sums[0][0, 0]) * plain
    else:
        plain, product = _sum_again(gate, *tiles, rows, columns, 0, 1, like, of_line(of, 0), mean[0])
    sum_dz[0] += plain
    sum_dz_x[0] += product


def add_rows(gate, dy_tile, x_tile, r_tile, rows, columns, like, of, mean, sum_dz, sum_dz_x, room):
    """Add a tile of one feature to the feature's sums."""


@overload(add_rows, jit_options=PART)
def _add_rows_of(gate, dy_tile, x_tile, r_tile, rows, columns, like, of, mean, sum_dz, sum_dz_x, room):
    return _add_rows_of_halves if like in HALVES else _add_rows


# Not in place: at its edges the memory of the partial results is another thread's too.


@machinery
def _all_held(plain, product):
    held = True
    for j in range(plain.size):
        held &= _is_held(plain[j], product[j])
    return held


@machinery
def _add_to(gate, dy_tile, x_tile, r_tile, rows, columns, like, of, mean, plain, product, sum_dz, sum_dz_x):
    """Add a tile's sums to the features', those that are not held once more in float64."""
    if not _all_held(plain, product):
        for j in range(columns):
            if not _is_held(plain[j], product[j]):
                tiles, of_one = (dy_tile, x_tile, r_tile), (of[0][j], of[1][j], of[2][j])
                plain[j], product[j] = _sum_again(gate, *tiles, rows, columns, j, columns, like, of_one, mean[j])
    for j in range(plain.size):
        sum_dz[j] += plain[j]
        sum_dz_x[j] += product[j]


def _add_columns(gate, dy_tile, x_tile, r_tile, rows, columns, like, of, mean, sum_dz, sum_dz_x, room):
    exact = room[0][1]
    tiled = dy_tile, x_tile, r_tile, rows, columns, like, of
    exact[:2, :columns] = 0
    _add(gate, *tiled, mean, exact[0], exact[1])
    _add_to(gate, *tiled, mean, exact[0, :columns], exact[1, :columns], sum_dz, sum_dz_x)


def _add_columns_of_halves(gate, dy_tile, x_tile, r_tile, rows, columns, like, of, mean, sum_dz, sum_dz_x, room):
    quick, exact = room[0]
    tiled = dy_tile, x_tile, r_tile, rows, columns, like, of
    quick[:2, :columns] = 0
    for j in range(columns):
        quick[2, j] = mean[j]
    _add(gate, *tiled, quick[2], quick[0], quick[1])
    for j in range(columns):
        plain = np.float64(quick[0, j])
        exact[0, j], exact[1, j] = plain, np.float64(quick[1, j]) - _rest(mean[j], quick[2, j]) * plain
    _add_to(gate, *tiled, mean, exact[0, :columns], exact[1, :columns], sum_dz, sum_dz_x)


def add_columns(gate, dy_tile, x_tile, r_tile, rows, columns, like, of, mean, sum_dz, sum_dz_x, room):
    """Add a tile of many features to the features' sums."""


@overload(add_columns, jit_options=PART)
def _add_columns_of(gate, dy_tile, x_tile, r_tile, rows, columns, like, of, mean, sum_dz, sum_dz_x, room):
    return _add_columns_of_halves if like in HALVES else _add_columns


@machinery
def carve_sums_and_lanes(room, width, like, real):
    """What `add_rows` and `add_columns` work in, and the room that is left."""
    sums, room = carve_sums(room, width, like)
    center, room = carve(room, MOST, real)
    scale, room = carve(room, MOST, real)
    shift, room = carve(room, MOST, real)
    return (sums, (center, scale, shift)), room


@cache
def kernel(dtype, is_columns, gate):
    """Make the kernel that leaves each group's Σ dz and Σ dz · (x − mean) in a row of its last two arguments."""
    add = add_columns if is_columns else add_rows
    mark = GATES[gate]

    like, real, single = dtype(0), arithmetic(dtype), dtype is not np.float64

    # Operands 1, 2, 3 of the axes are x, dy and the residual.
    def grad_sums(
        counter, scratch, grid, axes, x, dy, residual, kind, dy_kind,
        count, counts, mean, m2, eps, weight, bias, sum_dz, sum_dz_x,
    ):  # fmt: skip
        place, room = carve_place(room_in(scratch), axes)
        values, room = carve(room, grid[TILE], like)
        gradients, room = carve(room, grid[TILE], like)
        added, room = carve(room, grid[TILE] if gate == RELU_ONTO else 0, like)
        work, room = carve_sums_and_lanes(room, max(grid[WIDTH], MOST), like, real)
        of_all, room = carve_coefficients(room, mean.size, real)
        if not fill(of_all, count, counts, mean, m2, eps, weight, bias) and single:
            counter[REFUSED] = 1
            return
        for group, rows, columns, first, last in tiles(counter, grid, axes, place):
            x_tile = load(address_of(x, axes, 1, place), steps_of(axes, 1), rows, columns, kind, values, grid[LEAD])
            dy_at = address_of(dy, axes, 2, place)
            dy_tile = load(dy_at, steps_of(axes, 2), rows, columns, dy_kind, gradients, grid[LEAD])
            r_tile = x_tile
            if gate == RELU_ONTO:
                r_at = address_of(residual, axes, 3, place)
                r_tile = load(r_at, steps_of(axes, 3), rows, columns, kind, added, grid[LEAD])
            of, into = of_features(of_all, first, last), (sum_dz[group, first:last], sum_dz_x[group, first:last])
            add(mark, dy_tile, x_tile, r_tile, rows, columns, like, of, mean[first:last], *into, work)

    name = f"grad_sums_{gate}_{'columns' if is_columns else 'rows'}_{dtype.__name__}"
    operands, sums = (index, index, index, index, index), (partials, partials)
    return Kernel(name, types.void(counter, scratch, indices, table, *operands, *STATISTICS, *sums), grad_sums)


@machinery
def add_all(sum_dz, sum_dz_x):
    """Add the groups in order into the first row."""
    for group in range(1, sum_dz.shape[0]):
        plain, product = sum_dz[group], sum_dz_x[group]
        for c in range(plain.size):
            sum_dz[0, c] += plain[c]
            sum_dz_x[0, c] += product[c]


def _add_groups(sum_dz, sum_dz_x, count, counts, m2, eps):
    add_all(sum_dz, sum_dz_x)
    for c in range(m2.size):
        sum_dz_x[0, c] *= invstd_of(count_of(c, count, counts), m2[c], eps)


#: Adds the groups in order into the first row, and makes Σ dz · (x − mean) Σ dz · x̂.
add_groups = Kernel("add_groups", types.void(partials, partials, number, vector, vector, number), _add_groups)
