"""The two sums per feature of the backward pass, which are the gradients of bias and weight::

    Σ dz        Σ dz · x̂ = invstd · Σ dz · (x − mean)

dz is dy, or what of it passes ReLU. Where dz is 0 nothing is added, be x NaN: padding that no loss looks at does not
disturb the gradients. Sums are float64.

Traffic: reads x and dy (and, under ReLU, the residual) once, writes nothing of x's size.
"""

from functools import cache

import numpy as np
from numba import types

from bnarray.kernels.cpu.compiled import Kernel, counter, index, indices, partials, summing, table, vector
from bnarray.kernels.cpu.gate import (
    OPEN,
    RELU_ONTO,
    gate_columns,
    gate_columns_onto,
    gate_rows,
    gate_rows_onto,
)
from bnarray.kernels.cpu.memory import load
from bnarray.kernels.cpu.walk import TILE, address_of, steps_of, tiles


@summing
def _sum_rows(dz, x, rows, columns, mean, sum_dz, sum_dz_x):
    center = mean[0]
    plain = 0.0
    product = 0.0
    for i in range(x.size):
        g = np.float64(dz[i])
        plain += g
        product += g * (x[i] - center) if g != 0 else 0.0
    sum_dz[0] += plain
    sum_dz_x[0] += product


@summing
def _sum_columns(dz, x, rows, columns, mean, sum_dz, sum_dz_x):
    for row in range(rows):
        dz_row, x_row = dz[row * columns : (row + 1) * columns], x[row * columns : (row + 1) * columns]
        for j in range(columns):
            g = np.float64(dz_row[j])
            sum_dz[j] += g
            sum_dz_x[j] += g * (x_row[j] - mean[j]) if g != 0 else 0.0


@cache
def kernel(dtype, is_columns, gate):
    """Make the kernel that leaves each group's Σ dz and Σ dz · (x − mean) in a row of its last two arguments."""
    add = _sum_columns if is_columns else _sum_rows
    pass_gate = gate_columns if is_columns else gate_rows
    pass_gate_onto = gate_columns_onto if is_columns else gate_rows_onto

    # Operands 1, 2, 3 of the axes are x, dy and the residual.
    def grad_sums(counter, grid, axes, x, dy, residual, kind, dy_kind, mean, scale, bias, sum_dz, sum_dz_x):
        values, gradients = np.empty(grid[TILE], dtype), np.empty(grid[TILE], dtype)
        gated = np.empty(0 if gate == OPEN else grid[TILE], dtype)
        added = np.empty(grid[TILE] if gate == RELU_ONTO else 0, dtype)
        for group, rows, columns, first, last, place in tiles(counter, grid, axes):
            of_features = mean[first:last], scale[first:last], bias[first:last]
            x_tile = load(address_of(x, axes, 1, place), steps_of(axes, 1), rows, columns, kind, values)
            dy_at = address_of(dy, axes, 2, place)
            dz_tile = load(dy_at, steps_of(axes, 2), rows, columns, dy_kind, gradients)
            if gate == RELU_ONTO:
                r_at = address_of(residual, axes, 3, place)
                r_tile = load(r_at, steps_of(axes, 3), rows, columns, kind, added)
                pass_gate_onto(dz_tile, x_tile, r_tile, gated, rows, columns, *of_features)
                dz_tile = gated[: rows * columns]
            elif gate != OPEN:
                pass_gate(dz_tile, x_tile, gated, rows, columns, *of_features)
                dz_tile = gated[: rows * columns]
            add(
                dz_tile, x_tile, rows, columns, mean[first:last], sum_dz[group, first:last], sum_dz_x[group, first:last]
            )

    name = f"grad_sums_{gate}_{'columns' if is_columns else 'rows'}_{dtype.__name__}"
    addresses = (index, index, index)
    vectors = (vector, vector, vector)
    return Kernel(
        name, types.void(counter, indices, table, *addresses, index, index, *vectors, partials, partials), grad_sums
    )


def _add_groups(sum_dz, sum_dz_x, invstd):
    for c in range(invstd.size):
        for group in range(1, sum_dz.shape[0]):
            sum_dz[0, c] += sum_dz[group, c]
            sum_dz_x[0, c] += sum_dz_x[group, c]
        sum_dz_x[0, c] *= invstd[c]


#: Adds the groups in order into the first row, and makes Σ dz · (x − mean) Σ dz · x̂.
add_groups = Kernel("add_groups", types.void(partials, partials, vector), _add_groups)
