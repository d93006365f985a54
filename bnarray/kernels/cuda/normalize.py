"""Normalise, scale, shift, add the residual, apply ReLU::

    z = (x − mean) · scale + bias        y = relu(z + residual)        scale = weight / √(var + eps)

The mean is subtracted in parts (`coefficients`), so that float32 needs no float64. It is never x · a + b with
b = bias − mean · a: that cancels.

Traffic: reads x (and the residual) once, writes y once.
"""

from functools import cache

import numpy as np

from bnarray.kernels.cuda import memory
from bnarray.kernels.cuda.block import agreeing, handing
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
from bnarray.kernels.cuda.compiled import Kernel, index, machinery, numbers, types
from bnarray.kernels.cuda.memory import FLOAT64, NAMES, POINTERS, is_by_vectors, reader, tuple_of, writer
from bnarray.kernels.cuda.stage import loading_staged, slots
from bnarray.kernels.cuda.walk import grid, place, steps_alone, walk


@cache
def _step(kind, onto, real, shape, is_staged):
    """Make the function that writes what follows from a position of x, and of the residual, to one of y."""
    read, write, width = reader(kind, real), writer(kind), shape.width

    @machinery
    def element(value, added, shared, floor):
        center, low, rest, scale, bias = shared
        z = transformed(read(value), center, low, rest, scale, bias)
        if onto:
            z = z + read(added)
        return write(floor if z < floor else z)

    @machinery
    def by_element(x, i, y, j, residual, k, shared, floor):
        value = x[i]
        y[j] = element(value, residual[k], shared, floor)

    @machinery
    def by_turns(x, i, y, j, residual, k, shared, floor):
        for turn in range(width):
            by_element(x, i + turn, y, j + turn, residual, k + turn, shared, floor)

    if not is_by_vectors(kind, real, width):
        return by_element if width == 1 else by_turns
    load, store = memory.load_elements(width), memory.store_elements(width)
    load_x, pick, put = loading_staged(width) if is_staged else load, memory.pick, memory.put
    item = memory.item

    @machinery
    def by_vector(x, i, y, j, residual, k, shared, floor):
        values = results = load_x(x, i)
        added = load(residual, k) if onto else values
        for turn in range(width):
            results = put(results, turn, element(pick(values, turn), pick(added, turn), shared, floor))
        store(y, j, results)

    @machinery
    def element_of(elements, coefficients, k):
        values, added = elements
        shared, floor = coefficients
        return element(item(values, k), item(added, k), item(shared, k), floor)

    elements_of = tuple_of(element_of, width)

    @machinery
    def by_features(x, i, y, j, residual, k, shared, floor):
        values = load_x(x, i)
        store(y, j, elements_of((values, load(residual, k) if onto else values), (shared, floor)))

    return by_features if shape.abreast else by_vector


@cache
def loop(kind, onto, shape, real, is_staged=False):
    """Make the loop over a thread's part of a chunk."""
    begin, at, onward = walk(shape)
    _, start_of = place(shape)
    slot, step, split = slots(shape.width), _step(kind, onto, real, shape, is_staged), parts(real)
    hand, lowest, zero = handing(shape, 5), real(-np.inf), real(0)

    @machinery
    def write(
        x, y, residual, first, mean, factor, term, relu, works,
        part, chunk, positions, rows, places, sizes, x_steps, y_steps, r_steps,
    ):  # fmt: skip
        center, low, rest = split(mean)
        shared, floor = hand((center, low, rest, real(factor), real(term))), zero if relu else lowest
        x_start, y_start = start_of(first, sizes, x_steps), start_of(first, sizes, y_steps)
        r_start = start_of(first, sizes, r_steps)
        times, row, spot = begin(part, chunk, positions, sizes)
        for turn in range(times if works else 0):
            i = slot(turn) if is_staged else x_start + at(row, spot, sizes, x_steps)
            j = y_start + at(row, spot, sizes, y_steps)
            k = r_start + at(row, spot, sizes, r_steps)  # (of x, where there is no residual)
            step(x, i, y, j, residual, k, shared, floor)
            row, spot = onward(row, spot, rows, places, sizes)

    return write


@cache
def kernel(kind, onto, shape):
    """Make the kernel that writes y; `onto` a residual or not."""
    feature, _ = place(shape)
    agreed, step_alone = agreeing(shape), steps_alone(shape)
    single, double = loop(kind, onto, shape, np.float32), loop(kind, onto, shape.alone, np.float64)
    may_be_single = kind != FLOAT64

    def normalize(
        chunk, chunks, positions, features, rows, places, sizes, x, x_steps, y, y_steps, residual, r_steps, relu,
        count, has_counts, counts, mean, m2, eps, has_weight, weight, has_bias, bias,
    ):  # fmt: skip
        c, first, part, writes, works = feature(chunks, features)
        invstd = invstd_of(count_of(count, has_counts, counts, c), m2[c], eps)
        scale, term, middle = scale_of(invstd, has_weight, weight, c), bias_of(has_bias, bias, c), mean[c]
        if may_be_single and agreed(fits_single(middle, scale, term)):
            single(
                x, y, residual, first, middle, scale, term, relu, works,
                part, chunk, positions, rows, places, sizes, x_steps, y_steps, r_steps,
            )  # fmt: skip
        else:
            rows, places = step_alone(rows, places, sizes)
            double(
                x, y, residual, c, middle, scale, term, relu, writes,
                part, chunk, positions, rows, places, sizes, x_steps, y_steps, r_steps,
            )  # fmt: skip

    name = f"normalize_{NAMES[kind]}_{'onto_' * onto}{shape}"
    operand = POINTERS[kind], numbers(shape.axes)
    signature = (*grid(shape), *operand * 3, index, *STATISTICS, *PARAMETERS)
    return Kernel(name, types.void(*signature), normalize)
