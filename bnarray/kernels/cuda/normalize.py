"""Normalise, scale, shift, add the residual, apply ReLU::

    z = (x − mean) · scale + bias        y = relu(z + residual)        scale = weight / √(var + eps)

The mean is subtracted in parts (`coefficients`), so that float32 needs no float64. It is never x · a + b with
b = bias − mean · a: that cancels. Behind `moments` in the same pass every block first merges the chunks of its
features, and the first chunk's blocks keep what comes out.

Traffic: reads x (and the residual) once, writes y once.
"""

from functools import cache

import numpy as np

from bnarray.kernels.cuda import memory
from bnarray.kernels.cuda.block import merging
from bnarray.kernels.cuda.coefficients import (
    PARAMETERS,
    STATISTICS,
    bias_of,
    count_of,
    fits_single,
    invstd_of,
    parts,
    scale_of,
    transformed,
)
from bnarray.kernels.cuda.compiled import THREADS, Kernel, cuda, index, machinery, numbers, types, vector
from bnarray.kernels.cuda.memory import FLOAT64, NAMES, POINTERS, is_by_vectors, reader, writer
from bnarray.kernels.cuda.stage import loading_staged, slots
from bnarray.kernels.cuda.walk import grid, place, walk


@cache
def _step(kind, onto, real, width, is_staged):
    """Make the function that writes what follows from a position of x, and of the residual, to one of y."""
    read, write = reader(kind, real), writer(kind)

    @machinery
    def element(value, added, shared):
        center, low, rest, scale, bias, floor = shared
        z = transformed(read(value), center, low, rest, scale, bias)
        if onto:
            z = z + read(added)
        return write(floor if z < floor else z)

    @machinery
    def by_element(x, i, y, j, residual, k, shared):
        value = x[i]
        y[j] = element(value, residual[k], shared)

    @machinery
    def by_turns(x, i, y, j, residual, k, shared):
        for turn in range(width):
            by_element(x, i + turn, y, j + turn, residual, k + turn, shared)

    if not is_by_vectors(kind, real, width):
        return by_element if width == 1 else by_turns
    load, store = memory.load_elements(width), memory.store_elements(width)
    load_x, pick, put = loading_staged(width) if is_staged else load, memory.pick, memory.put

    @machinery
    def by_vector(x, i, y, j, residual, k, shared):
        values = results = load_x(x, i)
        added = load(residual, k) if onto else values
        for turn in range(width):
            results = put(results, turn, element(pick(values, turn), pick(added, turn), shared))
        store(y, j, results)

    return by_vector


@cache
def loop(kind, onto, shape, real, is_staged=False):
    """Make the loop over a thread's part of a chunk."""
    begin, at, onward = walk(shape)
    slot, step, split = slots(shape.width), _step(kind, onto, real, shape.width, is_staged), parts(real)
    lowest, zero = real(-np.inf), real(0)

    @machinery
    def write(
        x, y, residual, x_start, y_start, r_start, mean, factor, term, relu,
        part, chunk, positions, rows, places, sizes, x_steps, y_steps, r_steps,
    ):  # fmt: skip
        center, low, rest = split(mean)
        shared = center, low, rest, real(factor), real(term), zero if relu else lowest
        times, row, spot = begin(part, chunk, positions, sizes)
        for turn in range(times):
            i = slot(turn) if is_staged else x_start + at(row, spot, sizes, x_steps)
            j = y_start + at(row, spot, sizes, y_steps)
            k = r_start + at(row, spot, sizes, r_steps)  # (of x, where there is no residual)
            step(x, i, y, j, residual, k, shared)
            row, spot = onward(row, spot, rows, places, sizes)

    return write


@cache
def kernel(kind, onto, merges, shape):
    """Make the kernel that writes y; `onto` a residual or not; `merges` chunks' moments, or is given (count, mean, m2).

    If it merges, it writes count, mean and m2.
    """
    feature, start_of = place(shape)
    merged = merging(shape)
    single, double = loop(kind, onto, shape, np.float32), loop(kind, onto, shape, np.float64)
    may_be_single, across = kind != FLOAT64, shape.across

    def normalize(
        chunk, chunks, positions, features, rows, places, sizes, x, x_steps, y, y_steps, residual, r_steps, relu,
        partials, partial_chunks, count, has_counts, counts, mean, m2, eps, has_weight, weight, has_bias, bias,
    ):  # fmt: skip
        c, part, writes = feature(chunks, features)
        if merges:
            ns = cuda.shared.array(THREADS, types.float64)
            offsets = cuda.shared.array(THREADS, types.float64)
            squares = cuda.shared.array(THREADS, types.float64)
            n, middle, spread = merged(partials, partial_chunks, features, c, ns, offsets, squares)
            if writes and part == 0 and cuda.threadIdx.x < across:
                counts[c], mean[c], m2[c] = n, middle, spread
        else:
            n, middle, spread = count_of(count, has_counts, counts, c), mean[c], m2[c]
        if not writes:
            return
        scale = scale_of(invstd_of(n, spread, eps), has_weight, weight, c)
        term = bias_of(has_bias, bias, c)
        x_start, y_start = start_of(c, sizes, x_steps), start_of(c, sizes, y_steps)
        r_start = start_of(c, sizes, r_steps)
        if may_be_single and fits_single(middle, scale, term):
            single(
                x, y, residual, x_start, y_start, r_start, middle, scale, term, relu,
                part, chunk, positions, rows, places, sizes, x_steps, y_steps, r_steps,
            )  # fmt: skip
        else:
            double(
                x, y, residual, x_start, y_start, r_start, middle, scale, term, relu,
                part, chunk, positions, rows, places, sizes, x_steps, y_steps, r_steps,
            )  # fmt: skip

    name = f"normalize_{NAMES[kind]}_{'onto_' * onto}{'merging_' * merges}{shape}"
    operand = POINTERS[kind], numbers(shape.axes)
    signature = (*grid(shape), *operand * 3, index, vector, index, *STATISTICS, *PARAMETERS)
    return Kernel(name, types.void(*signature), normalize)
