"""The gradient of x::

    dx = scale · (dz − share · (Σ dz + x̂ · Σ dz · x̂))        scale = weight · invstd,  x̂ = (x − mean) · invstd

where share is the element's part in the statistics: 1 / n, or its weight over the sum of weights, or 0 where the
statistics are constants (evaluation). From the paper's chain rule (Ioffe and Szegedy 2015, section 3), collected.
`mean_dz` and `mean_dz_x` below are the sums over the count (the sum of weights).

Traffic: reads x and dy (and `where`; under ReLU the residual), writes dx (and dz, the residual's gradient).
"""

from functools import cache

import numpy as np
from numba import types

from bnarray.kernels.cpu.compiled import Kernel, counter, flag, index, indices, mapping, table, vector
from bnarray.kernels.cpu.gate import (
    OPEN,
    RELU_ONTO,
    gate_columns,
    gate_columns_onto,
    gate_rows,
    gate_rows_onto,
)
from bnarray.kernels.cpu.memory import load, store, target
from bnarray.kernels.cpu.walk import TILE, address_of, steps_of, tiles

#: What the statistics were to the elements: constants; their own mean; their weighted mean.
CONSTANT, BATCH, WEIGHTED = range(3)


@mapping
def _constant_rows(dz, x, weights, dx, rows, columns, mean, invstd, scale, mean_dz, mean_dz_x):
    factor = scale[0]
    for i in range(dz.size):
        dx[i] = factor * dz[i]


@mapping
def _batch_rows(dz, x, weights, dx, rows, columns, mean, invstd, scale, mean_dz, mean_dz_x):
    center, inverse, factor, common, slope = mean[0], invstd[0], scale[0], mean_dz[0], mean_dz_x[0]
    for i in range(dz.size):
        x_hat = (x[i] - center) * inverse
        dx[i] = factor * (dz[i] - common - x_hat * slope)


@mapping
def _weighted_rows(dz, x, weights, dx, rows, columns, mean, invstd, scale, mean_dz, mean_dz_x):
    center, inverse, factor, common, slope = mean[0], invstd[0], scale[0], mean_dz[0], mean_dz_x[0]
    for i in range(dz.size):
        x_hat = (x[i] - center) * inverse if weights[i] != 0 else 0.0
        dx[i] = factor * (dz[i] - weights[i] * (common + x_hat * slope))


@mapping
def _constant_columns(dz, x, weights, dx, rows, columns, mean, invstd, scale, mean_dz, mean_dz_x):
    for row in range(rows):
        line = slice(row * columns, (row + 1) * columns)
        dz_row, dx_row = dz[line], dx[line]
        for j in range(columns):
            dx_row[j] = scale[j] * dz_row[j]


@mapping
def _batch_columns(dz, x, weights, dx, rows, columns, mean, invstd, scale, mean_dz, mean_dz_x):
    for row in range(rows):
        line = slice(row * columns, (row + 1) * columns)
        dz_row, x_row, dx_row = dz[line], x[line], dx[line]
        for j in range(columns):
            x_hat = (x_row[j] - mean[j]) * invstd[j]
            dx_row[j] = scale[j] * (dz_row[j] - mean_dz[j] - x_hat * mean_dz_x[j])


@mapping
def _weighted_columns(dz, x, weights, dx, rows, columns, mean, invstd, scale, mean_dz, mean_dz_x):
    for row in range(rows):
        line = slice(row * columns, (row + 1) * columns)
        dz_row, x_row, w_row, dx_row = dz[line], x[line], weights[line], dx[line]
        for j in range(columns):
            x_hat = (x_row[j] - mean[j]) * invstd[j] if w_row[j] != 0 else 0.0
            dx_row[j] = scale[j] * (dz_row[j] - w_row[j] * (mean_dz[j] + x_hat * mean_dz_x[j]))


_FORMULAS = {
    (CONSTANT, False): _constant_rows,
    (CONSTANT, True): _constant_columns,
    (BATCH, False): _batch_rows,
    (BATCH, True): _batch_columns,
    (WEIGHTED, False): _weighted_rows,
    (WEIGHTED, True): _weighted_columns,
}


@cache
def kernel(dtype, is_columns, gate, statistics):
    """Make the kernel for tiles of one dtype, for one way dz follows from dy and one kind of statistics."""
    formula = _FORMULAS[statistics, is_columns]
    pass_gate = gate_columns if is_columns else gate_rows
    pass_gate_onto = gate_columns_onto if is_columns else gate_rows_onto

    # Operands 1 to 6 of the axes are x, dy, dx, where, the residual and its gradient.
    def grad_input(
        counter, grid, axes, x, dy, dx, where, residual, dresidual, kind, dy_kind, where_kind, in_place,
        mean, invstd, scale, bias, mean_dz, mean_dz_x,
    ):  # fmt: skip
        values, gradients, results = (
            np.empty(grid[TILE], dtype),
            np.empty(grid[TILE], dtype),
            np.empty(grid[TILE], dtype),
        )
        gated = np.empty(0 if gate == OPEN else grid[TILE], dtype)
        added = np.empty(grid[TILE] if gate == RELU_ONTO else 0, dtype)
        weights = np.empty(grid[TILE] if statistics == WEIGHTED else 0, np.float64)
        x_tile, w_tile = values, weights
        for _, rows, columns, first, last, place in tiles(counter, grid, axes):
            dy_at = address_of(dy, axes, 2, place)
            dz_tile = load(dy_at, steps_of(axes, 2), rows, columns, dy_kind, gradients)
            if statistics != CONSTANT or gate != OPEN:
                x_tile = load(address_of(x, axes, 1, place), steps_of(axes, 1), rows, columns, kind, values)
            if statistics == WEIGHTED:
                w_at = address_of(where, axes, 4, place)
                w_tile = load(w_at, steps_of(axes, 4), rows, columns, where_kind, weights)
            if gate != OPEN:
                of_gate = mean[first:last], scale[first:last], bias[first:last]
                if gate == RELU_ONTO:
                    r_at = address_of(residual, axes, 5, place)
                    r_tile = load(r_at, steps_of(axes, 5), rows, columns, kind, added)
                    pass_gate_onto(dz_tile, x_tile, r_tile, gated, rows, columns, *of_gate)
                else:
                    pass_gate(dz_tile, x_tile, gated, rows, columns, *of_gate)
                dz_tile = gated[: rows * columns]
            if gate == RELU_ONTO:
                store(dz_tile, address_of(dresidual, axes, 6, place), steps_of(axes, 6), rows, columns, kind)
            dx_at, dx_steps = address_of(dx, axes, 3, place), steps_of(axes, 3)
            dx_tile = target(dx_at, dx_steps, rows, columns, kind, results, in_place)
            of_features = mean[first:last], invstd[first:last], scale[first:last]
            formula(
                dz_tile, x_tile, w_tile, dx_tile, rows, columns,
                *of_features, mean_dz[first:last], mean_dz_x[first:last],
            )  # fmt: skip
            store(dx_tile, dx_at, dx_steps, rows, columns, kind)

    name = f"grad_input_{gate}_{statistics}_{'columns' if is_columns else 'rows'}_{dtype.__name__}"
    addresses = (index, index, index, index, index, index)
    kinds = (index, index, index)
    vectors = (vector, vector, vector, vector, vector, vector)
    return Kernel(name, types.void(counter, indices, table, *addresses, *kinds, flag, *vectors), grad_input)
