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
from bnarray.kernels.cpu.gate import (
    OPEN,
    RELU_ONTO,
    gate_columns,
    gate_columns_onto,
    gate_rows,
    gate_rows_onto,
)
from bnarray.kernels.cpu.memory import (
    NOWHERE,
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
from bnarray.kernels.cpu.walk import TILE, address_of, carve_place, steps_of, tiles

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
def _constant_rows(dz_tile, x_tile, w_tile, dx_tile, rows, columns, like, of, common, slope):
    for row in range(rows):
        scale = of_line(of, row)[1]
        dz, dx = line(dz_tile[0], dz_tile[1], row, columns, like), line(dx_tile[0], dx_tile[1], row, columns, like)
        for i in range(dz.size):
            dx[i] = narrow(scale * widen(dz[i]), like)


@mapping
def batch_rows(dz_tile, x_tile, w_tile, dx_tile, rows, columns, like, of, common, slope):
    for row in range(rows):
        center, scale, _ = of_line(of, row)
        mean_dz, steep = _sums_of_line(common, slope, row)
        dz, dx = line(dz_tile[0], dz_tile[1], row, columns, like), line(dx_tile[0], dx_tile[1], row, columns, like)
        x = line(x_tile[0], x_tile[1], row, columns, like)
        for i in range(dz.size):
            dx[i] = narrow(scale * ((widen(dz[i]) - mean_dz) - (widen(x[i]) - center) * steep), like)


@mapping
def _weighted_rows(dz_tile, x_tile, w_tile, dx_tile, rows, columns, like, of, common, slope):
    for row in range(rows):
        center, scale, _ = of_line(of, row)
        mean_dz, steep = _sums_of_line(common, slope, row)
        dz, dx = line(dz_tile[0], dz_tile[1], row, columns, like), line(dx_tile[0], dx_tile[1], row, columns, like)
        x, w = line(x_tile[0], x_tile[1], row, columns, like), line(w_tile[0], w_tile[1], row, columns, scale)
        for i in range(dz.size):
            share = w[i] * (mean_dz + (widen(x[i]) - center) * steep)
            dx[i] = narrow(scale * (widen(dz[i]) - share if w[i] != 0 else widen(dz[i])), like)


@mapping
def _constant_columns(dz_tile, x_tile, w_tile, dx_tile, rows, columns, like, of, common, slope):
    scale = of[1]
    for row in range(rows):
        dz, dx = line(dz_tile[0], dz_tile[1], row, columns, like), line(dx_tile[0], dx_tile[1], row, columns, like)
        for j in range(dz.size):
            dx[j] = narrow(scale[j] * widen(dz[j]), like)


@mapping
def batch_columns(dz_tile, x_tile, w_tile, dx_tile, rows, columns, like, of, common, slope):
    center, scale, _ = of
    for row in range(rows):
        dz, dx = line(dz_tile[0], dz_tile[1], row, columns, like), line(dx_tile[0], dx_tile[1], row, columns, like)
        x = line(x_tile[0], x_tile[1], row, columns, like)
        for j in range(dz.size):
            dx[j] = narrow(scale[j] * ((widen(dz[j]) - common[j]) - (widen(x[j]) - center[j]) * slope[j]), like)


@mapping
def _weighted_columns(dz_tile, x_tile, w_tile, dx_tile, rows, columns, like, of, common, slope):
    center, scale, _ = of
    for row in range(rows):
        dz, dx = line(dz_tile[0], dz_tile[1], row, columns, like), line(dx_tile[0], dx_tile[1], row, columns, like)
        x, w = line(x_tile[0], x_tile[1], row, columns, like), line(w_tile[0], w_tile[1], row, columns, scale[0])
        for j in range(dz.size):
            share = w[j] * (common[j] + (widen(x[j]) - center[j]) * slope[j])
            dx[j] = narrow(scale[j] * (widen(dz[j]) - share if w[j] != 0 else widen(dz[j])), like)


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
    pass_gate = gate_columns if is_columns else gate_rows
    pass_gate_onto = gate_columns_onto if is_columns else gate_rows_onto

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
        gated, room = carve(room, 0 if gate == OPEN else grid[TILE], like)
        added, room = carve(room, grid[TILE] if gate == RELU_ONTO else 0, like)
        weights, room = carve(room, grid[TILE] if statistics == WEIGHTED else 0, real)
        commons, room = carve(room, mean.size, real)
        slopes, room = carve(room, mean.size, real)
        of_all, room = carve_coefficients(room, mean.size, real)
        fit = fill(of_all, count, counts, mean, m2, eps, weight, bias)
        if statistics != CONSTANT:
            fit &= fill_slopes(commons, slopes, of_all, count, counts, mean, sum_dz, sum_dz_x)
        if single and not fit:
            counter[REFUSED] = 1
            return
        x_tile, w_tile = tile_of(values, 0), tile_of(weights, 0)
        for _, rows, columns, first, last in tiles(counter, grid, axes, place):
            dy_at = address_of(dy, axes, 2, place)
            dz_tile = load(dy_at, steps_of(axes, 2), rows, columns, dy_kind, gradients)
            if statistics != CONSTANT or gate != OPEN:
                x_tile = load(address_of(x, axes, 1, place), steps_of(axes, 1), rows, columns, kind, values)
            if statistics == WEIGHTED:
                w_at = address_of(where, axes, 4, place)
                w_tile = load(w_at, steps_of(axes, 4), rows, columns, where_kind, weights)
            of = of_features(of_all, first, last)
            if gate != OPEN:
                if gate == RELU_ONTO:
                    r_at = address_of(residual, axes, 5, place)
                    r_tile = load(r_at, steps_of(axes, 5), rows, columns, kind, added)
                    pass_gate_onto(dz_tile, x_tile, r_tile, gated, rows, columns, like, of)
                    dresidual_at = address_of(dresidual, axes, 6, place)
                    store(dresidual_at, steps_of(axes, 6), rows, columns, kind, gated, NOWHERE)
                else:
                    pass_gate(dz_tile, x_tile, gated, rows, columns, like, of)
                dz_tile = tile_of(gated, columns)
            dx_at, dx_steps = address_of(dx, axes, 3, place), steps_of(axes, 3)
            dx_tile = target(dx_at, dx_steps, rows, columns, kind, results, in_place)
            of_sums = commons[first:last], slopes[first:last]
            formula(dz_tile, x_tile, w_tile, dx_tile, rows, columns, like, of, *of_sums)
            store(dx_at, dx_steps, rows, columns, kind, results, dx_tile[0])

    name = f"grad_input_{gate}_{statistics}_{'columns' if is_columns else 'rows'}_{dtype.__name__}"
    operands, sums = (index, index, index, index, index, index, index, index, index, flag), (vector, vector)
    return Kernel(name, types.void(counter, scratch, indices, table, *operands, *STATISTICS, *sums), grad_input)
