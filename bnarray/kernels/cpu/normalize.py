"""Normalise, scale, shift, add the residual, apply ReLU::

    z = (x − mean) · scale + bias        y = relu(z + residual)        scale = weight / √(var + eps)

The mean is subtracted as (x − center) · scale + shift (`coefficients`), so that tiles of float32 need no float64. It is
never x · a + b with b = bias − mean · a: that cancels.

Traffic: reads x (and the residual) once, writes y once.
Measured (`benchmarks/kernels.py`, 25 MB of float32, two threads of an Intel Xeon), GB/s of it: channels first 53.6,
short rows 51.5, channels last 46.8; NumPy's copy channels first 31.0, short rows 34.6, channels last 29.0.
"""

from functools import cache

import numpy as np
from numba import types

from bnarray.kernels.cpu.coefficients import STATISTICS, carve_coefficients, fill, of_features, of_line, repeat
from bnarray.kernels.cpu.compiled import Kernel, counter, flag, in_half_vectors, index, indices, mapping, scratch, table
from bnarray.kernels.cpu.memory import arithmetic, carve, line, load, narrow, room_in, store, target, widen
from bnarray.kernels.cpu.pool import REFUSED
from bnarray.kernels.cpu.walk import STREAMED, TILE, TIMES, address_of, carve_place, steps_of, tiles


@mapping
def normalize_rows(x_tile, y_tile, rows, columns, like, of, relu):
    lowest = of[0].dtype.type(0.0 if relu else -np.inf)
    for row in range(rows):
        center, scale, shift = of_line(of, row)
        x, y = line(x_tile[0], x_tile[1], row, columns, like), line(y_tile[0], y_tile[1], row, columns, like)
        for i in range(x.size):
            z = (widen(x[i]) - center) * scale + shift
            y[i] = narrow(lowest if z < lowest else z, like)


@mapping
def _rows_onto(x_tile, r_tile, y_tile, rows, columns, like, of, relu):
    lowest = of[0].dtype.type(0.0 if relu else -np.inf)
    for row in range(rows):
        center, scale, shift = of_line(of, row)
        x, y = line(x_tile[0], x_tile[1], row, columns, like), line(y_tile[0], y_tile[1], row, columns, like)
        residual = line(r_tile[0], r_tile[1], row, columns, like)
        for i in range(x.size):
            z = (widen(x[i]) - center) * scale + shift + widen(residual[i])
            y[i] = narrow(lowest if z < lowest else z, like)


@mapping
def normalize_columns(x_tile, y_tile, rows, columns, like, of, relu):
    in_half_vectors(like)
    center, scale, shift = of
    lowest = of[0].dtype.type(0.0 if relu else -np.inf)
    for row in range(rows):
        x, y = line(x_tile[0], x_tile[1], row, columns, like), line(y_tile[0], y_tile[1], row, columns, like)
        for j in range(x.size):
            z = (widen(x[j]) - center[j]) * scale[j] + shift[j]
            y[j] = narrow(lowest if z < lowest else z, like)


@mapping
def _columns_onto(x_tile, r_tile, y_tile, rows, columns, like, of, relu):
    in_half_vectors(like)
    center, scale, shift = of
    lowest = of[0].dtype.type(0.0 if relu else -np.inf)
    for row in range(rows):
        x, y = line(x_tile[0], x_tile[1], row, columns, like), line(y_tile[0], y_tile[1], row, columns, like)
        residual = line(r_tile[0], r_tile[1], row, columns, like)
        for j in range(x.size):
            z = (widen(x[j]) - center[j]) * scale[j] + shift[j] + widen(residual[j])
            y[j] = narrow(lowest if z < lowest else z, like)


@cache
def kernel(dtype, is_columns, onto):
    """Make the kernel for tiles of one dtype; `onto` a residual or not."""
    apply = normalize_columns if is_columns else normalize_rows
    apply_onto = _columns_onto if is_columns else _rows_onto
    like, real, single = dtype(0), arithmetic(dtype), dtype is not np.float64

    # Operands 1, 2, 3 of the axes are x, y and the residual.
    def normalize(
        counter, scratch, grid, axes, x, y, residual, kind, in_place, relu,
        count, counts, mean, m2, eps, weight, bias,
    ):  # fmt: skip
        place, room = carve_place(room_in(scratch), axes)
        values, room = carve(room, grid[TILE], like)
        results, room = carve(room, grid[TILE], like)
        added, room = carve(room, grid[TILE] if onto else 0, like)
        of_all, room = carve_coefficients(room, grid[TIMES] * mean.size, real)
        if not fill(of_all, count, counts, mean, m2, eps, weight, bias) and single:
            counter[REFUSED] = 1
            return
        repeat(of_all[:3], mean.size)
        for _, rows, columns, first, last in tiles(counter, grid, axes, place):
            y_at, y_steps = address_of(y, axes, 2, place), steps_of(axes, 2)
            x_tile = load(address_of(x, axes, 1, place), steps_of(axes, 1), rows, columns, kind, values)
            y_tile = target(y_at, y_steps, rows, columns, kind, results, in_place or grid[STREAMED])
            r_tile = x_tile
            if onto:
                r_at = address_of(residual, axes, 3, place)
                r_tile = load(r_at, steps_of(axes, 3), rows, columns, kind, added)
                apply_onto(x_tile, r_tile, y_tile, rows, columns, like, of_features(of_all, first, last), relu)
            else:
                apply(x_tile, y_tile, rows, columns, like, of_features(of_all, first, last), relu)
            store(y_at, y_steps, rows, columns, kind, results, y_tile[0], grid[STREAMED], x_tile, r_tile)

    name = f"normalize_{'onto_' * onto}{'columns' if is_columns else 'rows'}_{dtype.__name__}"
    operands = (index, index, index, index, flag, flag)
    return Kernel(name, types.void(counter, scratch, indices, table, *operands, *STATISTICS), normalize)
