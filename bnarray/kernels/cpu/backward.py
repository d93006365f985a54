"""Both sums and the gradient of x back to back, for batch statistics without weights: memory is read once.

The same tiles, groups and order of adding as in `grad_sums`, and the same arithmetic as in `grad_input`, so the results
have the same bits. In the rows family a feature at a time, for features that stay in the cache of one core between the
two; in the columns family all of x at once, for one thread and small arrays. Where float32 turns out not to do, both
are to be done once more.

Traffic: reads x and dy once from memory and once from cache, writes dx once.
Measured (`benchmarks/kernels.py`, many channels first, 25 MB of float32, two threads of an Intel Xeon): 2.78 ms, 27.7
GB/s of it, where the two kernels take 1.91 and 1.68; NumPy's copy 30.6.
"""

from functools import cache

import numpy as np
from numba import types

from bnarray.kernels.cpu.coefficients import (
    STATISTICS,
    carve_coefficients,
    fill,
    of_features,
)
from bnarray.kernels.cpu.compiled import Kernel, counter, index, indices, machinery, results, scratch, table
from bnarray.kernels.cpu.gate import GATES
from bnarray.kernels.cpu.grad_input import batch_columns, batch_rows, fill_slopes
from bnarray.kernels.cpu.grad_sums import add_all, add_columns, add_rows, carve_sums_and_lanes
from bnarray.kernels.cpu.lanes import MOST
from bnarray.kernels.cpu.memory import arithmetic, carve, carve_rows, load, room_in, store, target
from bnarray.kernels.cpu.pool import NEXT, REFUSED, take
from bnarray.kernels.cpu.walk import (
    CHUNKS,
    CHUNKS_PER_GROUP,
    LEAD,
    SPANS,
    STREAMED,
    TILE,
    WIDTH,
    address_of,
    carve_place,
    place_chunk,
    place_span,
    steps_of,
    tiles,
)

# Operands 1, 2, 3 of the axes are x, dy and dx.


@machinery
def _load_both(x, dy, kind, dy_kind, axes, place, rows, columns, values, gradients, lead=0):
    x_tile = load(address_of(x, axes, 1, place), steps_of(axes, 1), rows, columns, kind, values, lead)
    dy_at, dy_steps = address_of(dy, axes, 2, place), steps_of(axes, 2)
    return x_tile, load(dy_at, dy_steps, rows, columns, dy_kind, gradients, lead)


def _rows(dtype, gate):
    like, real, single = dtype(0), arithmetic(dtype), dtype is not np.float64
    mark = GATES[gate]

    def backward(
        counter, scratch, grid, axes, x, dy, dx, kind, dy_kind,
        count, counts, mean, m2, eps, weight, bias, sum_dz, sum_dz_x,
    ):  # fmt: skip
        place, room = carve_place(room_in(scratch), axes)
        values, room = carve(room, grid[TILE], like)
        gradients, room = carve(room, grid[TILE], like)
        written, room = carve(room, grid[TILE], like)
        work, room = carve_sums_and_lanes(room, MOST, like, real)
        part, room = carve_rows(room, 2, 1, 0.0)
        common, room = carve(room, 1, real)
        slope, room = carve(room, 1, real)
        of, room = carve_coefficients(room, 1, real)
        c = take(counter)
        while c < grid[SPANS]:
            own = slice(c, c + 1)
            own_counts = counts[own] if counts.size else counts
            fit = fill(of, count, own_counts, mean[own], m2[own], eps, weight[own], bias[own])
            sum_dz[c], sum_dz_x[c] = 0, 0
            for first in range(0, grid[CHUNKS], grid[CHUNKS_PER_GROUP]):
                part[:] = 0
                for chunk in range(first, min(first + grid[CHUNKS_PER_GROUP], grid[CHUNKS])):
                    rows, columns = place_chunk(grid, axes, chunk, place), place_span(grid, axes, c, place)[0]
                    x_tile, dy_tile = _load_both(
                        x, dy, kind, dy_kind, axes, place, rows, columns, values, gradients, grid[LEAD]
                    )
                    tiled = dy_tile, x_tile, x_tile, rows, columns
                    add_rows(mark, *tiled, like, of_features(of, 0, 1), mean[own], part[0], part[1], work)
                sum_dz[c] += part[0, 0]
                sum_dz_x[c] += part[1, 0]
            sum_dz_x[c] *= of[3][0]
            of_sums = sum_dz[own], sum_dz_x[own]
            fit &= fill_slopes(common, slope, of, count, own_counts, mean[own], *of_sums)
            if single and not fit:
                counter[REFUSED] = 1
            for chunk in range(grid[CHUNKS]):
                rows, columns = place_chunk(grid, axes, chunk, place), place_span(grid, axes, c, place)[0]
                x_tile, dy_tile = _load_both(x, dy, kind, dy_kind, axes, place, rows, columns, values, gradients)
                dx_at, dx_steps = address_of(dx, axes, 3, place), steps_of(axes, 3)
                dx_tile = target(dx_at, dx_steps, rows, columns, kind, written, grid[STREAMED])
                tiled = dy_tile, x_tile, x_tile, x_tile, dx_tile, dx_tile, rows, columns
                batch_rows(mark, *tiled, like, of_features(of, 0, 1), common, slope)
                store(dx_at, dx_steps, rows, columns, kind, written, dx_tile[0], grid[STREAMED], x_tile, dy_tile)
            c = take(counter)

    return backward


def _columns(dtype, gate):
    like, real, single = dtype(0), arithmetic(dtype), dtype is not np.float64
    mark = GATES[gate]

    def backward(
        counter, scratch, grid, axes, x, dy, dx, kind, dy_kind,
        count, counts, mean, m2, eps, weight, bias, sum_dz, sum_dz_x,
    ):  # fmt: skip
        place, room = carve_place(room_in(scratch), axes)
        values, room = carve(room, grid[TILE], like)
        gradients, room = carve(room, grid[TILE], like)
        written, room = carve(room, grid[TILE], like)
        work, room = carve_sums_and_lanes(room, max(grid[WIDTH], MOST), like, real)
        groups = (grid[CHUNKS] + grid[CHUNKS_PER_GROUP] - 1) // grid[CHUNKS_PER_GROUP]
        plain, room = carve_rows(room, groups, mean.size, 0.0)
        product, room = carve_rows(room, groups, mean.size, 0.0)
        common, room = carve(room, mean.size, real)
        slope, room = carve(room, mean.size, real)
        of_all, room = carve_coefficients(room, mean.size, real)
        fit = fill(of_all, count, counts, mean, m2, eps, weight, bias)
        plain[:], product[:] = 0, 0
        for group, rows, columns, first, last in tiles(counter, grid, axes, place):
            of = of_features(of_all, first, last)
            x_tile, dy_tile = _load_both(x, dy, kind, dy_kind, axes, place, rows, columns, values, gradients)
            into = plain[group, first:last], product[group, first:last]
            tiled = dy_tile, x_tile, x_tile, rows, columns
            add_columns(mark, *tiled, like, of, mean[first:last], *into, work)
        add_all(plain, product)
        for c in range(mean.size):
            sum_dz[c], sum_dz_x[c] = plain[0, c], product[0, c] * of_all[3][c]
        fit &= fill_slopes(common, slope, of_all, count, counts, mean, sum_dz, sum_dz_x)
        if single and not fit:
            counter[REFUSED] = 1
            return
        counter[NEXT] = 0
        for _, rows, columns, first, last in tiles(counter, grid, axes, place):
            of = of_features(of_all, first, last)
            x_tile, dy_tile = _load_both(x, dy, kind, dy_kind, axes, place, rows, columns, values, gradients)
            dx_at, dx_steps = address_of(dx, axes, 3, place), steps_of(axes, 3)
            dx_tile = target(dx_at, dx_steps, rows, columns, kind, written, False)
            of_sums = common[first:last], slope[first:last]
            tiled = dy_tile, x_tile, x_tile, x_tile, dx_tile, dx_tile, rows, columns
            batch_columns(mark, *tiled, like, of, *of_sums)
            store(dx_at, dx_steps, rows, columns, kind, written, dx_tile[0], False, x_tile, dy_tile)

    return backward


@cache
def kernel(dtype, is_columns, gate):
    """Make the kernel for tiles of one dtype, open or gated by ReLU, that also writes Σ dz and Σ dz · x̂."""
    name = f"backward_{gate}_{'columns' if is_columns else 'rows'}_{dtype.__name__}"
    operands = (counter, scratch, indices, table, index, index, index, index, index)
    make = _columns if is_columns else _rows
    return Kernel(name, types.void(*operands, *STATISTICS, results, results), make(dtype, gate))
