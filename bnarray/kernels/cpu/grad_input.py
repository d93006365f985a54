"""The gradient of x::

    dx = scale · (dz − w · (common + (x − mean) · slope))

    scale = weight · invstd        common = Σ dz / n        slope = Σ dz · x̂ / n · invstd

From the paper's chain rule (Ioffe and Szegedy 2015, section 3), collected. n is the count (the sum of weights) and w an
element's weight: 1 where there are none, 0 where the statistics are constants (evaluation).

Traffic: reads x and dy (and `where`; under ReLU the residual), writes dx (and dz, the residual's gradient).
Measured (`benchmarks/kernels.py`, 25 MB of float32, two threads of an Intel Xeon), GB/s of it: channels first 51.1,
short rows 53.5, channels last 44.8; NumPy's copy channels first 31.0, short rows 34.6, channels last 29.0.
"""

from functools import cache

import numpy as np
from numba import types

from bnarray.kernels.cpu.coefficients import (
    LARGE,
    STATISTICS,
    carve_coefficients,
    count_of,
    fill,
    is_middling,
    of_features,
    of_line,
    quiet,
    repeat,
)
from bnarray.kernels.cpu.compiled import (
    Kernel,
    counter,
    flag,
    index,
    indices,
    machinery,
    mapping,
    scratch,
    table,
    vector,
)
from bnarray.kernels.cpu.gate import GATES, OPEN, RELU_ONTO, keep, passing
from bnarray.kernels.cpu.memory import (
    arithmetic,
    carve,
    line,
    load,
    narrow,
    room_in,
    store,
    target,
    tile_of,
    widen,
)
from bnarray.kernels.cpu.pool import REFUSED
from bnarray.kernels.cpu.walk import STREAMED, TILE, TIMES, address_of, carve_place, steps_of, tiles

#: What the statistics were to the elements: constants; their own mean; their weighted mean.
CONSTANT, BATCH, WEIGHTED = range(3)

#: Weights of a smaller sum may be too small for float32.
LEAST_COUNT = 2.0**-40


@machinery
def _sums_of_line(common, slope, row):
    """As `of_line`: of one feature for all lines of the tile, or of one for each."""
    c = row if common.size > 1 else 0
    return common[c], slope[c]


@mapping
def _constant_rows(gate, dy_tile, x_tile, r_tile, w_tile, dx_tile, dr_tile, rows, columns, like, of, common, slope):
    for row in range(rows):
        center, scale, shift = of_line(of, row)
        dy, dx = line(dy_tile[0], dy_tile[1], row, columns, like), line(dx_tile[0], dx_tile[1], row, columns, like)
        x, r = line(x_tile[0], x_tile[1], row, columns, like), line(r_tile[0], r_tile[1], row, columns, like)
        dr = line(dr_tile[0], dr_tile[1], row, columns, like)
        for i in range(dx.size):
            dz = passing(gate, widen(dy[i]), widen(x[i]), widen(r[i]), center, scale, shift)
            keep(gate, dz, dr, i, like)
            dx[i] = narrow(scale * dz, like)


@mapping
def batch_rows(gate, dy_tile, x_tile, r_tile, w_tile, dx_tile, dr_tile, rows, columns, like, of, common, slope):
    for row in range(rows):
        center, scale, shift = of_line(of, row)
        mean_dz, steep = _sums_of_line(common, slope, row)
        dy, dx = line(dy_tile[0], dy_tile[1], row, columns, like), line(dx_tile[0], dx_tile[1], row, columns, like)
        x, r = line(x_tile[0], x_tile[1], row, columns, like), line(r_tile[0], r_tile[1], row, columns, like)
        dr = line(dr_tile[0], dr_tile[1], row, columns, like)
        for i in range(dx.size):
            dz = passing(gate, widen(dy[i]), widen(x[i]), widen(r[i]), center, scale, shift)
            keep(gate, dz, dr, i, like)
            dx[i] = narrow(scale * ((dz - mean_dz) - (widen(x[i]) - center) * steep), like)


@mapping
def _weighted_rows(gate, dy_tile, x_tile, r_tile, w_tile, dx_tile, dr_tile, rows, columns, like, of, common, slope):
    for row in range(rows):
        center, scale, shift = of_line(of, row)
        mean_dz, steep = _sums_of_line(common, slope, row)
        dy, dx = line(dy_tile[0], dy_tile[1], row, columns, like), line(dx_tile[0], dx_tile[1], row, columns, like)
        x, r = line(x_tile[0], x_tile[1], row, columns, like), line(r_tile[0], r_tile[1], row, columns, like)
        dr = line(dr_tile[0], dr_tile[1], row, columns, like)
        w = line(w_tile[0], w_tile[1], row, columns, scale)
        for i in range(dx.size):
            dz = passing(gate, widen(dy[i]), widen(x[i]), widen(r[i]), center, scale, shift)
            keep(gate, dz, dr, i, like)
            share = w[i] * (mean_dz + (widen(x[i]) - center) * steep)
            dx[i] = narrow(scale * (dz - share if w[i] != 0 else dz), like)


@mapping
def _constant_columns(gate, dy_tile, x_tile, r_tile, w_tile, dx_tile, dr_tile, rows, columns, like, of, common, slope):
    center, scale, shift = of
    for row in range(rows):
        dy, dx = line(dy_tile[0], dy_tile[1], row, columns, like), line(dx_tile[0], dx_tile[1], row, columns, like)
        x, r = line(x_tile[0], x_tile[1], row, columns, like), line(r_tile[0], r_tile[1], row, columns, like)
        dr = line(dr_tile[0], dr_tile[1], row, columns, like)
        for j in range(dx.size):
            dz = passing(gate, widen(dy[j]), widen(x[j]), widen(r[j]), center[j], scale[j], shift[j])
            keep(gate, dz, dr, j, like)
            dx[j] = narrow(scale[j] * dz, like)


@mapping
def batch_columns(gate, dy_tile, x_tile, r_tile, w_tile, dx_tile, dr_tile, rows, columns, like, of, common, slope):
    center, scale, shift = of
    for row in range(rows):
        dy, dx = line(dy_tile[0], dy_tile[1], row, columns, like), line(dx_tile[0], dx_tile[1], row, columns, like)
        x, r = line(x_tile[0], x_tile[1], row, columns, like), line(r_tile[0], r_tile[1], row, columns, like)
        dr = line(dr_tile[0], dr_tile[1], row, columns, like)
        for j in range(dx.size):
            dz = passing(gate, widen(dy[j]), widen(x[j]), widen(r[j]), center[j], scale[j], shift[j])
            keep(gate, dz, dr, j, like)
            dx[j] = narrow(scale[j] * ((dz - common[j]) - (widen(x[j]) - center[j]) * slope[j]), like)


@mapping
def _weighted_columns(gate, dy_tile, x_tile, r_tile, w_tile, dx_tile, dr_tile, rows, columns, like, of, common, slope):
    center, scale, shift = of
    for row in range(rows):
        dy, dx = line(dy_tile[0], dy_tile[1], row, columns, like), line(dx_tile[0], dx_tile[1], row, columns, like)
        x, r = line(x_tile[0], x_tile[1], row, columns, like), line(r_tile[0], r_tile[1], row, columns, like)
        dr = line(dr_tile[0], dr_tile[1], row, columns, like)
        w = line(w_tile[0], w_tile[1], row, columns, scale[0])
        for j in range(dx.size):
            dz = passing(gate, widen(dy[j]), widen(x[j]), widen(r[j]), center[j], scale[j], shift[j])
            keep(gate, dz, dr, j, like)
            share = w[j] * (common[j] + (widen(x[j]) - center[j]) * slope[j])
            dx[j] = narrow(scale[j] * (dz - share if w[j] != 0 else dz), like)


@machinery
def fill_slopes(commons, slopes, vectors, count, counts, mean, sum_dz, sum_dz_x):
    """Write every feature's (common, slope), where common has what the center leaves of the mean (as the shift does in
    `coefficients`); nothing over nothing is 0. Return whether they fit float32, and weights of such a sum do."""
    center, invstd = vectors[0], vectors[3]
    fit = True
    for c in range(mean.size):
        n = count_of(c, count, counts)
        common = sum_dz[c] / n if n != 0 else 0.0
        slope = sum_dz_x[c] / n * invstd[c] if n != 0 else 0.0
        if mean[c] != center[c]:
            common -= (mean[c] - center[c]) * slope
        commons[c], slopes[c] = quiet(common), quiet(slope)
        fit &= is_middling(common) and is_middling(slope) and (n == 0 or LEAST_COUNT < n < LARGE)
    return fit


_FORMULAS = {
    (CONSTANT, False): _constant_rows,
    (CONSTANT, True): _constant_columns,
    (BATCH, False): batch_rows,
    (BATCH, True): batch_columns,
    (WEIGHTED, False): _weighted_rows,
    (WEIGHTED, True): _weighted_columns,
}


@cache
def kernel(dtype, is_columns, gate, statistics):
    """Make the kernel for tiles of one dtype, for one way dz follows from dy and one kind of statistics."""
    formula = _FORMULAS[statistics, is_columns]
    mark = GATES[gate]

    like, real, single = dtype(0), arithmetic(dtype), dtype is not np.float64

    # Operands 1 to 6 of the axes are x, dy, dx, where, the residual and its gradient.
    def grad_input(
        counter, scratch, grid, axes, x, dy, dx, where, residual, dresidual, kind, dy_kind, where_kind, in_place,
        count, counts, mean, m2, eps, weight, bias, sum_dz, sum_dz_x,
    ):  # fmt: skip
        place, room = carve_place(room_in(scratch), axes)
        values, room = carve(room, grid[TILE], like)
        gradients, room = carve(room, grid[TILE], like)
        results, room = carve(room, grid[TILE], like)
        added, room = carve(room, grid[TILE] if gate == RELU_ONTO else 0, like)
        kept, room = carve(room, grid[TILE] if gate == RELU_ONTO else 0, like)
        weights, room = carve(room, grid[TILE] if statistics == WEIGHTED else 0, real)
        commons, room = carve(room, grid[TIMES] * mean.size, real)
        slopes, room = carve(room, grid[TIMES] * mean.size, real)
        of_all, room = carve_coefficients(room, grid[TIMES] * mean.size, real)
        fit = fill(of_all, count, counts, mean, m2, eps, weight, bias)
        if statistics != CONSTANT:
            fit &= fill_slopes(commons, slopes, of_all, count, counts, mean, sum_dz, sum_dz_x)
        if single and not fit:
            counter[REFUSED] = 1
            return
        repeat((*of_all[:3], commons, slopes), mean.size)
        x_tile, w_tile = tile_of(values, 0), tile_of(weights, 0)
        for _, rows, columns, first, last in tiles(counter, grid, axes, place):
            dy_at, dy_steps = address_of(dy, axes, 2, place), steps_of(axes, 2)
            dx_at, dx_steps = address_of(dx, axes, 3, place), steps_of(axes, 3)
            dr_at, dr_steps = address_of(dresidual, axes, 6, place), steps_of(axes, 6)
            dy_tile = load(dy_at, dy_steps, rows, columns, dy_kind, gradients)
            if statistics != CONSTANT or gate != OPEN:
                x_tile = load(address_of(x, axes, 1, place), steps_of(axes, 1), rows, columns, kind, values)
            r_tile = x_tile
            if gate == RELU_ONTO:
                r_tile = load(address_of(residual, axes, 5, place), steps_of(axes, 5), rows, columns, kind, added)
            if statistics == WEIGHTED:
                w_at = address_of(where, axes, 4, place)
                w_tile = load(w_at, steps_of(axes, 4), rows, columns, where_kind, weights)
            dx_tile = target(dx_at, dx_steps, rows, columns, kind, results, in_place or grid[STREAMED])
            dr_tile = target(dr_at, dr_steps, rows, columns, kind, kept, gate != RELU_ONTO)
            arrays = dy_tile, x_tile, r_tile, w_tile, dx_tile, dr_tile
            of_sums = commons[first:last], slopes[first:last]
            formula(mark, *arrays, rows, columns, like, of_features(of_all, first, last), *of_sums)
            store(dx_at, dx_steps, rows, columns, kind, results, dx_tile[0], grid[STREAMED], x_tile, dy_tile)
            if gate == RELU_ONTO:
                store(dr_at, dr_steps, rows, columns, kind, kept, dr_tile[0], False, x_tile, dy_tile)

    name = f"grad_input_{gate}_{statistics}_{'columns' if is_columns else 'rows'}_{dtype.__name__}"
    operands, sums = (index, index, index, index, index, index, index, index, index, flag), (vector, vector)
    return Kernel(name, types.void(counter, scratch, indices, table, *operands, *STATISTICS, *sums), grad_input)
