"""Normalise, scale, shift, add the residual, apply ReLU::

    y = relu((x − mean) · scale + bias + residual)        scale = weight / √(var + eps)

In float64 registers whatever x is: x − mean is then exact where it matters (mean 1e6, deviation 1), the result is right
to half an ulp, and the loop still waits for memory (from 1 MB to 128 MB within 1.1 of the same loop in float32, within
1.2 of a copy: `benchmarks/arithmetic.py`). It is never x · a + b with b = bias − mean · a: that cancels.

Traffic: reads x (and the residual) once, writes y once.
"""

from functools import cache

import numpy as np
from numba import types

from bnarray.kernels.cpu.compiled import Kernel, counter, flag, index, indices, mapping, table, vector
from bnarray.kernels.cpu.memory import load, store, target
from bnarray.kernels.cpu.walk import TILE, address_of, steps_of, tiles


@mapping
def normalize_rows(x, y, rows, columns, mean, scale, bias, lowest):
    center, factor, shift = mean[0], scale[0], bias[0]
    for i in range(x.size):
        z = (x[i] - center) * factor + shift
        y[i] = lowest if z < lowest else z


@mapping
def _rows_onto(x, residual, y, rows, columns, mean, scale, bias, lowest):
    center, factor, shift = mean[0], scale[0], bias[0]
    for i in range(x.size):
        z = (x[i] - center) * factor + shift + residual[i]
        y[i] = lowest if z < lowest else z


@mapping
def _columns(x, y, rows, columns, mean, scale, bias, lowest):
    for row in range(rows):
        x_row, y_row = x[row * columns : (row + 1) * columns], y[row * columns : (row + 1) * columns]
        for j in range(columns):
            z = (x_row[j] - mean[j]) * scale[j] + bias[j]
            y_row[j] = lowest if z < lowest else z


@mapping
def _columns_onto(x, residual, y, rows, columns, mean, scale, bias, lowest):
    for row in range(rows):
        x_row, y_row = x[row * columns : (row + 1) * columns], y[row * columns : (row + 1) * columns]
        r_row = residual[row * columns : (row + 1) * columns]
        for j in range(columns):
            z = (x_row[j] - mean[j]) * scale[j] + bias[j] + r_row[j]
            y_row[j] = lowest if z < lowest else z


@cache
def kernel(dtype, is_columns, onto):
    """Make the kernel for tiles of one dtype; `onto` a residual or not."""
    apply = _columns if is_columns else normalize_rows
    apply_onto = _columns_onto if is_columns else _rows_onto

    # Operands 1, 2, 3 of the axes are x, y and the residual.
    def normalize(counter, grid, axes, x, y, residual, kind, in_place, mean, scale, bias, relu):
        values, results = np.empty(grid[TILE], dtype), np.empty(grid[TILE], dtype)
        added = np.empty(grid[TILE] if onto else 0, dtype)
        lowest = 0.0 if relu else -np.inf
        for _, rows, columns, first, last, place in tiles(counter, grid, axes):
            of_features = mean[first:last], scale[first:last], bias[first:last], lowest
            y_at, y_steps = address_of(y, axes, 2, place), steps_of(axes, 2)
            x_tile = load(address_of(x, axes, 1, place), steps_of(axes, 1), rows, columns, kind, values)
            y_tile = target(y_at, y_steps, rows, columns, kind, results, in_place)
            if onto:
                r_at = address_of(residual, axes, 3, place)
                r_tile = load(r_at, steps_of(axes, 3), rows, columns, kind, added)
                apply_onto(x_tile, r_tile, y_tile, rows, columns, *of_features)
            else:
                apply(x_tile, y_tile, rows, columns, *of_features)
            store(y_tile, y_at, y_steps, rows, columns, kind)

    name = f"normalize_{'onto_' * onto}{'columns' if is_columns else 'rows'}_{dtype.__name__}"
    addresses = (index, index, index)
    return Kernel(
        name, types.void(counter, indices, table, *addresses, index, flag, vector, vector, vector, flag), normalize
    )
