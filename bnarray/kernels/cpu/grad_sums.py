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
from bnarray.kernels.cpu.gate import (
    OPEN,
    RELU_ONTO,
    gate_columns,
    gate_columns_onto,
    gate_rows,
    gate_rows_onto,
)
from bnarray.kernels.cpu.lanes import MOST, clear, panel, panels, total, width_of
from bnarray.kernels.cpu.memory import HALVES, arithmetic, carve, item_of, line, load, room_in, tile_of, widen
from bnarray.kernels.cpu.moments import carve_sums
from bnarray.kernels.cpu.pool import REFUSED
from bnarray.kernels.cpu.walk import TILE, WIDTH, address_of, carve_place, steps_of, tiles

# Down the columns four lines at a time, so that the sums are read and written a quarter as often. In the precision of
# what they are added to. Where dz is 0 and x is not finite NaN comes out: such a feature is summed once more.


@mapping
def _add(dz_tile, x_tile, rows, columns, like, mean, sum_dz, sum_dz_x):
    """sum_dz += Σ dz,  sum_dz_x += Σ dz · (x − mean)"""
    center, plain, product, real = mean[:columns], sum_dz[:columns], sum_dz_x[:columns], mean.dtype.type
    (dz, down), (x, x_down) = dz_tile, x_tile
    for row in range(0, rows - 3, 4):
        a, b = line(dz, down, row, columns, like), line(dz, down, row + 1, columns, like)
        c, d = line(dz, down, row + 2, columns, like), line(dz, down, row + 3, columns, like)
        p, q = line(x, x_down, row, columns, like), line(x, x_down, row + 1, columns, like)
        r, s = line(x, x_down, row + 2, columns, like), line(x, x_down, row + 3, columns, like)
        for j in range(center.size):
            ga, gb, gc, gd = real(widen(a[j])), real(widen(b[j])), real(widen(c[j])), real(widen(d[j]))
            plain[j] += (ga + gb) + (gc + gd)
            # One by one, so that there is one way to fuse products with sums.
            summed = product[j] + ga * (widen(p[j]) - center[j])
            summed += gb * (widen(q[j]) - center[j])
            summed += gc * (widen(r[j]) - center[j])
            product[j] = summed + gd * (widen(s[j]) - center[j])
    for row in range(rows - rows % 4, rows):
        a, p = line(dz, down, row, columns, like), line(x, x_down, row, columns, like)
        for j in range(center.size):
            plain[j] += widen(a[j])
            product[j] += real(widen(a[j])) * (widen(p[j]) - center[j])


@machinery
def _sum_again(dz_tile, x_tile, rows, columns, first, step, like, mean):
    """Return Σ dz and Σ dz · (x − mean) of every step-th column from the first one, in float64."""
    plain, product = 0.0, 0.0
    for row in range(rows):
        dz, x = line(*dz_tile, row, columns, like), line(*x_tile, row, columns, like)
        for j in range(first, columns, step):
            g = np.float64(widen(dz[j]))
            plain += g
            product += g * (widen(x[j]) - mean) if g != 0 else 0.0
    return plain, product


@machinery
def _sum_rows(dz_tile, x_tile, rows, columns, like, mean, sums):
    """Return Σ dz and Σ dz · (x − mean) of a tile of one feature, with the mean as the sums hold it."""
    center, plain, product = sums[0], sums[1], sums[2]
    item, width = item_of(like), width_of(columns)
    clear(plain, width)
    clear(product, width)
    center[:width] = mean
    for row, begin, lines, length in panels(rows, columns):
        dz_part, x_part = panel(dz_tile, columns, row, begin, item), panel(x_tile, columns, row, begin, item)
        _add(dz_part, x_part, lines, length, like, center, plain, product)
    return np.float64(total(plain, width)), np.float64(total(product, width))


@machinery
def _rest(mean, center):
    """What a center leaves of the mean."""
    return mean - np.float64(center) if mean != center else 0.0


@machinery
def _is_held(plain, product):
    """Whether sums are what they would be in float64, term by term."""
    return abs(plain) < LARGE and abs(product) < LARGE


def _add_rows(dz_tile, x_tile, rows, columns, like, mean, sum_dz, sum_dz_x, sums):
    plain, product = _sum_rows(dz_tile, x_tile, rows, columns, like, mean[0], sums[1])
    if not _is_held(plain, product):
        plain, product = _sum_again(dz_tile, x_tile, rows, columns, 0, 1, like, mean[0])
    sum_dz[0] += plain
    sum_dz_x[0] += product


def _add_rows_of_halves(dz_tile, x_tile, rows, columns, like, mean, sum_dz, sum_dz_x, sums):
    plain, product = _sum_rows(dz_tile, x_tile, rows, columns, like, mean[0], sums[0])
    if _is_held(plain, product):
        product -= _rest(mean[0], sums[0][0, 0]) * plain
    else:
        plain, product = _sum_again(dz_tile, x_tile, rows, columns, 0, 1, like, mean[0])
    sum_dz[0] += plain
    sum_dz_x[0] += product


def add_rows(dz_tile, x_tile, rows, columns, like, mean, sum_dz, sum_dz_x, sums):
    """Add a tile of one feature to the feature's sums."""


@overload(add_rows, jit_options=PART)
def _add_rows_of(dz_tile, x_tile, rows, columns, like, mean, sum_dz, sum_dz_x, sums):
    return _add_rows_of_halves if like in HALVES else _add_rows


# Not in place: at its edges the memory of the partial results is another thread's too.


def _add_columns(dz_tile, x_tile, rows, columns, like, mean, sum_dz, sum_dz_x, sums):
    exact = sums[1]
    exact[:2, :columns] = 0
    _add(dz_tile, x_tile, rows, columns, like, mean, exact[0], exact[1])
    for j in range(columns):
        plain, product = exact[0, j], exact[1, j]
        if not _is_held(plain, product):
            plain, product = _sum_again(dz_tile, x_tile, rows, columns, j, columns, like, mean[j])
        sum_dz[j] += plain
        sum_dz_x[j] += product


def _add_columns_of_halves(dz_tile, x_tile, rows, columns, like, mean, sum_dz, sum_dz_x, sums):
    quick = sums[0]
    quick[:2, :columns] = 0
    for j in range(columns):
        quick[2, j] = mean[j]
    _add(dz_tile, x_tile, rows, columns, like, quick[2], quick[0], quick[1])
    for j in range(columns):
        plain, product = np.float64(quick[0, j]), np.float64(quick[1, j])
        if _is_held(plain, product):
            product -= _rest(mean[j], quick[2, j]) * plain
        else:
            plain, product = _sum_again(dz_tile, x_tile, rows, columns, j, columns, like, mean[j])
        sum_dz[j] += plain
        sum_dz_x[j] += product


def add_columns(dz_tile, x_tile, rows, columns, like, mean, sum_dz, sum_dz_x, sums):
    """Add a tile of many features to the features' sums."""


@overload(add_columns, jit_options=PART)
def _add_columns_of(dz_tile, x_tile, rows, columns, like, mean, sum_dz, sum_dz_x, sums):
    return _add_columns_of_halves if like in HALVES else _add_columns


@cache
def kernel(dtype, is_columns, gate):
    """Make the kernel that leaves each group's Σ dz and Σ dz · (x − mean) in a row of its last two arguments."""
    add = add_columns if is_columns else add_rows
    pass_gate = gate_columns if is_columns else gate_rows
    pass_gate_onto = gate_columns_onto if is_columns else gate_rows_onto

    like, real, single = dtype(0), arithmetic(dtype), dtype is not np.float64

    # Operands 1, 2, 3 of the axes are x, dy and the residual.
    def grad_sums(
        counter, scratch, grid, axes, x, dy, residual, kind, dy_kind,
        count, counts, mean, m2, eps, weight, bias, sum_dz, sum_dz_x,
    ):  # fmt: skip
        place, room = carve_place(room_in(scratch), axes)
        values, room = carve(room, grid[TILE], like)
        gradients, room = carve(room, grid[TILE], like)
        gated, room = carve(room, 0 if gate == OPEN else grid[TILE], like)
        added, room = carve(room, grid[TILE] if gate == RELU_ONTO else 0, like)
        sums, room = carve_sums(room, max(grid[WIDTH], MOST), like)
        of_all, room = carve_coefficients(room, mean.size, real)
        if not fill(of_all, count, counts, mean, m2, eps, weight, bias) and single:
            counter[REFUSED] = 1
            return
        for group, rows, columns, first, last in tiles(counter, grid, axes, place):
            x_tile = load(address_of(x, axes, 1, place), steps_of(axes, 1), rows, columns, kind, values)
            dy_at = address_of(dy, axes, 2, place)
            dz_tile = load(dy_at, steps_of(axes, 2), rows, columns, dy_kind, gradients)
            if gate == RELU_ONTO:
                r_at = address_of(residual, axes, 3, place)
                r_tile = load(r_at, steps_of(axes, 3), rows, columns, kind, added)
                pass_gate_onto(dz_tile, x_tile, r_tile, gated, rows, columns, like, of_features(of_all, first, last))
                dz_tile = tile_of(gated, columns)
            elif gate != OPEN:
                pass_gate(dz_tile, x_tile, gated, rows, columns, like, of_features(of_all, first, last))
                dz_tile = tile_of(gated, columns)
            into = sum_dz[group, first:last], sum_dz_x[group, first:last]
            add(dz_tile, x_tile, rows, columns, like, mean[first:last], *into, sums)

    name = f"grad_sums_{gate}_{'columns' if is_columns else 'rows'}_{dtype.__name__}"
    operands, sums = (index, index, index, index, index), (partials, partials)
    return Kernel(name, types.void(counter, scratch, indices, table, *operands, *STATISTICS, *sums), grad_sums)


def _add_groups(sum_dz, sum_dz_x, count, counts, m2, eps):
    for c in range(m2.size):
        for group in range(1, sum_dz.shape[0]):
            sum_dz[0, c] += sum_dz[group, c]
            sum_dz_x[0, c] += sum_dz_x[group, c]
        sum_dz_x[0, c] *= invstd_of(count_of(c, count, counts), m2[c], eps)


#: Adds the groups in order into the first row, and makes Σ dz · (x − mean) Σ dz · x̂.
add_groups = Kernel("add_groups", types.void(partials, partials, number, vector, vector, number), _add_groups)
