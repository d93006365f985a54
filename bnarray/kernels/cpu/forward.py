"""Moments and normalisation back to back: x is read from memory once.

The same tiles, groups and order of merging as in `moments`, and the same arithmetic as in `normalize`, so the results
have the same bits. In the rows family a feature at a time, for features that stay in the cache of one core between the
two; in the columns family all of x at once, for one thread and small arrays. Where float32 turns out not to do, y is to
be written once more.

Traffic: reads x once from memory and once from cache, writes y once.
Measured (`benchmarks/kernels.py`, 25 MB of float32, two threads of an Intel Xeon), GB/s of it: channels first 35.6;
NumPy's copy 31.0. (Short rows and channels last take two kernels.)
"""

from functools import cache

import numpy as np
from numba import types

from bnarray.kernels.cpu.coefficients import carve_coefficients, fill, of_features
from bnarray.kernels.cpu.compiled import (
    Kernel,
    counter,
    flag,
    index,
    indices,
    number,
    results,
    scratch,
    table,
    vector,
)
from bnarray.kernels.cpu.lanes import MOST
from bnarray.kernels.cpu.memory import arithmetic, carve, carve_rows, load, room_in, store, target
from bnarray.kernels.cpu.moments import carve_sums, fold_columns, fold_rows, merge_all, merge_into
from bnarray.kernels.cpu.normalize import normalize_columns, normalize_rows
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

# Operands 1 and 2 of the axes are x and y.


def _rows(dtype):
    like, real, single = dtype(0), arithmetic(dtype), dtype is not np.float64

    def forward(counter, scratch, grid, axes, x, y, kind, relu, count, counts, mean, m2, eps, weight, bias):
        place, room = carve_place(room_in(scratch), axes)
        values, room = carve(room, grid[TILE], like)
        normalized, room = carve(room, grid[TILE], like)
        part, room = carve_rows(room, 4, 1, 0.0)
        whole, room = carve_rows(room, 4, 1, 0.0)
        sums, room = carve_sums(room, MOST, like)
        of, room = carve_coefficients(room, 1, real)
        c = take(counter)
        while c < grid[SPANS]:
            whole[:] = 0
            for first in range(0, grid[CHUNKS], grid[CHUNKS_PER_GROUP]):
                part[:] = 0
                for chunk in range(first, min(first + grid[CHUNKS_PER_GROUP], grid[CHUNKS])):
                    rows, columns = place_chunk(grid, axes, chunk, place), place_span(grid, axes, c, place)[0]
                    x_tile = load(
                        address_of(x, axes, 1, place), steps_of(axes, 1), rows, columns, kind, values, grid[LEAD]
                    )
                    fold_rows(x_tile, rows, columns, like, part[0], part[1], part[2], part[3], sums)
                merge_into(0, whole[0], whole[1], whole[2], whole[3], part[0, 0], part[1, 0], part[2, 0], part[3, 0])
            mean[c], m2[c] = whole[1, 0] + whole[2, 0], whole[3, 0]
            own = slice(c, c + 1)
            if not fill(of, count, counts, mean[own], m2[own], eps, weight[own], bias[own]) and single:
                counter[REFUSED] = 1
            for chunk in range(grid[CHUNKS]):
                rows, columns = place_chunk(grid, axes, chunk, place), place_span(grid, axes, c, place)[0]
                y_at, y_steps = address_of(y, axes, 2, place), steps_of(axes, 2)
                x_tile = load(address_of(x, axes, 1, place), steps_of(axes, 1), rows, columns, kind, values)
                y_tile = target(y_at, y_steps, rows, columns, kind, normalized, grid[STREAMED])
                normalize_rows(x_tile, y_tile, rows, columns, like, of, relu)
                store(y_at, y_steps, rows, columns, kind, normalized, y_tile[0], grid[STREAMED], x_tile, x_tile)
            c = take(counter)

    return forward


def _columns(dtype):
    like, real, single = dtype(0), arithmetic(dtype), dtype is not np.float64

    def forward(counter, scratch, grid, axes, x, y, kind, relu, count, counts, mean, m2, eps, weight, bias):
        place, room = carve_place(room_in(scratch), axes)
        values, room = carve(room, grid[TILE], like)
        normalized, room = carve(room, grid[TILE], like)
        sums, room = carve_sums(room, grid[WIDTH], like)
        of_all, room = carve_coefficients(room, mean.size, real)
        groups = (grid[CHUNKS] + grid[CHUNKS_PER_GROUP] - 1) // grid[CHUNKS_PER_GROUP]
        numbers, room = carve_rows(room, groups, mean.size, 0.0)
        shift, room = carve_rows(room, groups, mean.size, 0.0)
        offset, room = carve_rows(room, groups, mean.size, 0.0)
        squares, room = carve_rows(room, groups, mean.size, 0.0)
        numbers[:], shift[:], offset[:], squares[:] = 0, 0, 0, 0
        for group, rows, columns, first, last in tiles(counter, grid, axes, place):
            x_tile = load(address_of(x, axes, 1, place), steps_of(axes, 1), rows, columns, kind, values)
            into = numbers[group, first:last], shift[group, first:last], offset[group, first:last]
            fold_columns(x_tile, rows, columns, like, *into, squares[group, first:last], sums)
        merge_all(numbers, shift, offset, squares, mean)
        for c in range(mean.size):
            m2[c] = squares[0, c]
        if not fill(of_all, count, counts, mean, m2, eps, weight, bias) and single:
            counter[REFUSED] = 1
            return
        counter[NEXT] = 0
        for _, rows, columns, first, last in tiles(counter, grid, axes, place):
            y_at, y_steps = address_of(y, axes, 2, place), steps_of(axes, 2)
            x_tile = load(address_of(x, axes, 1, place), steps_of(axes, 1), rows, columns, kind, values)
            y_tile = target(y_at, y_steps, rows, columns, kind, normalized, False)
            normalize_columns(x_tile, y_tile, rows, columns, like, of_features(of_all, first, last), relu)
            store(y_at, y_steps, rows, columns, kind, normalized, y_tile[0], False, x_tile, x_tile)

    return forward


@cache
def kernel(dtype, is_columns):
    """Make the kernel for tiles of one dtype."""
    operands = (counter, scratch, indices, table, index, index, index, flag)
    statistics = (number, vector, results, results, number, vector, vector)
    name = f"forward_{'columns' if is_columns else 'rows'}_{dtype.__name__}"
    return Kernel(name, types.void(*operands, *statistics), (_columns if is_columns else _rows)(dtype))
