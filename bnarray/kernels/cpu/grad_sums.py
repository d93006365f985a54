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

from bnarray.kernels.cpu.coefficients import (
    STATISTICS,
    carve_coefficients,
    count_of,
    fill,
    invstd_of,
    of_features,
)
from bnarray.kernels.cpu.compiled import (
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
from bnarray.kernels.cpu.memory import carve, carve_rows, item_of, line, load, room_in, tile_of
from bnarray.kernels.cpu.pool import REFUSED
from bnarray.kernels.cpu.walk import TILE, WIDTH, address_of, carve_place, steps_of, tiles


@machinery
def _product(g, x, center):
    return g * (x - center) if g != 0 else 0.0


# Down the columns two lines at a time, so that the sums are read and written half as often.


@mapping
def _add(dz_tile, x_tile, rows, columns, like, mean, sum_dz, sum_dz_x):
    center, plain, product = mean[:columns], sum_dz[:columns], sum_dz_x[:columns]
    for row in range(0, rows - 1, 2):
        a, b = line(dz_tile[0], dz_tile[1], row, columns, like), line(dz_tile[0], dz_tile[1], row + 1, columns, like)
        x, y = line(x_tile[0], x_tile[1], row, columns, like), line(x_tile[0], x_tile[1], row + 1, columns, like)
        for j in range(center.size):
            ga, gb = np.float64(a[j]), np.float64(b[j])
            plain[j] += ga + gb
            product[j] += _product(ga, x[j], center[j]) + _product(gb, y[j], center[j])
    if rows % 2:
        a = line(dz_tile[0], dz_tile[1], rows - 1, columns, like)
        x = line(x_tile[0], x_tile[1], rows - 1, columns, like)
        for j in range(center.size):
            plain[j] += a[j]
            product[j] += _product(np.float64(a[j]), x[j], center[j])


@machinery
def add_rows(dz_tile, x_tile, rows, columns, like, mean, sum_dz, sum_dz_x, sums):
    center, plain, product = sums[0], sums[1], sums[2]
    item, width = item_of(like), width_of(columns)
    clear(plain, width)
    clear(product, width)
    center[:width] = mean[0]
    for row, begin, lines, length in panels(rows, columns):
        dz_part, x_part = panel(dz_tile, columns, row, begin, item), panel(x_tile, columns, row, begin, item)
        _add(dz_part, x_part, lines, length, like, center, plain, product)
    sum_dz[0] += total(plain, width)
    sum_dz_x[0] += total(product, width)


@machinery
def add_columns(dz_tile, x_tile, rows, columns, like, mean, sum_dz, sum_dz_x, sums):
    # Not in place: at its edges the memory of the partial results is another thread's too.
    plain, product = sums[1, :columns], sums[2, :columns]
    sums[1:3, :columns] = 0
    _add(dz_tile, x_tile, rows, columns, like, mean, plain, product)
    for j in range(columns):
        sum_dz[j] += plain[j]
        sum_dz_x[j] += product[j]


@cache
def kernel(dtype, is_columns, gate):
    """Make the kernel that leaves each group's Σ dz and Σ dz · (x − mean) in a row of its last two arguments."""
    add = add_columns if is_columns else add_rows
    pass_gate = gate_columns if is_columns else gate_rows
    pass_gate_onto = gate_columns_onto if is_columns else gate_rows_onto

    like, single = dtype(0), dtype is np.float32

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
        sums, room = carve_rows(room, 3, max(grid[WIDTH], MOST), 0.0)
        of_all, room = carve_coefficients(room, mean.size, like)
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
