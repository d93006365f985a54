"""The gradient of x::

    dx = scale · (dz − w · (common + (x − mean) · slope))

    scale = weight · invstd        common = Σ dz / n        slope = Σ dz · x̂ / n · invstd

From the paper's chain rule (Ioffe and Szegedy 2015, section 3), collected. n is the count (the sum of weights) and w an
element's weight: 1 where there are none, 0 where the statistics are constants (evaluation).

Traffic: reads x and dy (and `where`; under ReLU the residual), writes dx (and dz, the residual's gradient).
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
from bnarray.kernels.cuda.compiled import Kernel, machinery, numbers, types, vector
from bnarray.kernels.cuda.exact import is_middling_or_nan
from bnarray.kernels.cuda.gate import OPEN, RELU_ONTO
from bnarray.kernels.cuda.memory import BOOL, FLOAT64, NAMES, POINTERS, is_by_vectors, loader, reader, tuple_of, writer
from bnarray.kernels.cuda.stage import loading_staged, slots
from bnarray.kernels.cuda.walk import grid, place, steps_alone, walk

#: What the statistics were to the elements: constants; their own mean; their weighted mean.
CONSTANT, BATCH, WEIGHTED = range(3)


@cache
def _step(kind, dy_kind, where_kind, gate, statistics, real, shape, is_staged):
    """Make the function that writes what follows from a position of x and dy to one of dx (and of dresidual).

    What the formula does not ask for is not read: the compiler leaves that out.
    """
    read, read_dy, write, zero = reader(kind, real), reader(dy_kind, real), writer(kind), real(0)
    load_weight, width = loader(where_kind, real), shape.width

    @machinery
    def find_dz(value, gradient, added, shared):
        center, low, rest, scale, bias, _, _ = shared
        dz = read_dy(gradient)
        if gate != OPEN:
            z = transformed(read(value), center, low, rest, scale, bias)
            if gate == RELU_ONTO:
                z = z + read(added)
            dz = zero if z <= zero else dz
        return dz

    @machinery
    def find_dx(value, dz, w, shared):
        center, low, rest, scale, _, common, slope = shared
        slopes = dz
        if statistics == BATCH:
            slopes = (dz - common) - (((read(value) - center) - low) - rest) * slope
        elif statistics == WEIGHTED and w != zero:
            slopes = dz - w * (common + (((read(value) - center) - low) - rest) * slope)
        return write(scale * slopes)

    @machinery
    def by_element(x, x_at, dy, dy_at, dx, dx_at, where, w_at, residual, r_at, dresidual, dr_at, shared):
        value = x[x_at]
        dz = find_dz(value, dy[dy_at], residual[r_at], shared)
        if gate == RELU_ONTO:
            dresidual[dr_at] = write(dz)
        dx[dx_at] = find_dx(value, dz, load_weight(where, w_at), shared)

    @machinery
    def by_turns(x, x_at, dy, dy_at, dx, dx_at, where, w_at, residual, r_at, dresidual, dr_at, shared):
        for turn in range(width):
            by_element(
                x, x_at + turn, dy, dy_at + turn, dx, dx_at + turn, where, w_at + turn, residual, r_at + turn,
                dresidual, dr_at + turn, shared,
            )  # fmt: skip

    if not is_by_vectors(kind, real, width):
        return by_element if width == 1 else by_turns

    load, store = memory.load_elements(width), memory.store_elements(width)
    load_x, pick, put = loading_staged(width) if is_staged else load, memory.pick, memory.put
    item = memory.item

    @machinery
    def by_vector(x, x_at, dy, dy_at, dx, dx_at, where, w_at, residual, r_at, dresidual, dr_at, shared):
        values = dxs = dzs = load_x(x, x_at)
        gradients = load_x(dy, dy_at)
        added = load(residual, r_at) if gate == RELU_ONTO else values
        for turn in range(width):
            value = pick(values, turn)
            dz = find_dz(value, pick(gradients, turn), pick(added, turn), shared)
            dzs = put(dzs, turn, write(dz))
            dxs = put(dxs, turn, find_dx(value, dz, zero, shared))
        if gate == RELU_ONTO:
            store(dresidual, dr_at, dzs)
        store(dx, dx_at, dxs)

    @machinery
    def dz_of(elements, shared, k):
        values, gradients, added = elements
        return find_dz(item(values, k), item(gradients, k), item(added, k), item(shared, k))

    @machinery
    def dx_of(elements, shared, k):
        values, dzs = elements
        return find_dx(item(values, k), item(dzs, k), zero, item(shared, k))

    @machinery
    def written(dzs, _, k):
        return write(item(dzs, k))

    dzs_of, dxs_of, all_written = tuple_of(dz_of, width), tuple_of(dx_of, width), tuple_of(written, width)

    @machinery
    def by_features(x, x_at, dy, dy_at, dx, dx_at, where, w_at, residual, r_at, dresidual, dr_at, shared):
        values, gradients = load_x(x, x_at), load_x(dy, dy_at)
        dzs = dzs_of((values, gradients, load(residual, r_at) if gate == RELU_ONTO else values), shared)
        if gate == RELU_ONTO:
            store(dresidual, dr_at, all_written(dzs, 0))
        store(dx, dx_at, dxs_of((values, dzs), shared))

    return by_features if shape.abreast else by_vector


@cache
def loop(kind, dy_kind, where_kind, gate, statistics, shape, real, is_staged=False):
    """Make the loop over a thread's part of a chunk."""
    begin, at, onward = walk(shape)
    _, start_of = place(shape)
    slot, split, hand = slots(shape.width), parts(real), handing(shape, 7)
    step = _step(kind, dy_kind, where_kind, gate, statistics, real, shape, is_staged)

    @machinery
    def write(
        x, dy, dx, where, residual, dresidual, first, mean, factor, term, mean_dz, steep, works, part,
        chunk, positions, rows, places, sizes, x_steps, dy_steps, dx_steps, w_steps, r_steps, dr_steps,
    ):  # fmt: skip
        center, low, rest = split(mean)
        shared = hand((center, low, rest, real(factor), real(term), real(mean_dz), real(steep)))
        x_start, dy_start = start_of(first, sizes, x_steps), start_of(first, sizes, dy_steps)
        dx_start, w_start = start_of(first, sizes, dx_steps), start_of(first, sizes, w_steps)
        r_start, dr_start = start_of(first, sizes, r_steps), start_of(first, sizes, dr_steps)
        times, row, spot = begin(part, chunk, positions, sizes)
        for turn in range(times if works else 0):
            step(
                x, slot(turn) if is_staged else x_start + at(row, spot, sizes, x_steps),
                dy, slot(turn) if is_staged else dy_start + at(row, spot, sizes, dy_steps),
                dx, dx_start + at(row, spot, sizes, dx_steps), where, w_start + at(row, spot, sizes, w_steps),
                residual, r_start + at(row, spot, sizes, r_steps),
                dresidual, dr_start + at(row, spot, sizes, dr_steps), shared,
            )  # fmt: skip
            row, spot = onward(row, spot, rows, places, sizes)

    return write


@cache
def kernel(kind, dy_kind, where_kind, gate, statistics, shape):
    """Make the kernel that writes dx (and dresidual)."""
    feature, _ = place(shape)
    agreed, step_alone = agreeing(shape), steps_alone(shape)
    case = kind, dy_kind, BOOL if where_kind is None else where_kind, gate, statistics
    single, double = loop(*case, shape, np.float32), loop(*case, shape.alone, np.float64)
    may_be_single = kind != FLOAT64 and dy_kind != FLOAT64 and statistics != WEIGHTED
    uses_sums = statistics != CONSTANT

    def grad_input(
        chunk, chunks, positions, features, rows, places, sizes, x, x_steps, dy, dy_steps, dx, dx_steps, where, w_steps,
        residual, r_steps, dresidual, dr_steps, sum_dz, sum_dz_x,
        count, has_counts, counts, mean, m2, eps, has_weight, weight, has_bias, bias,
    ):  # fmt: skip
        c, first, part, writes, works = feature(chunks, features)
        n = count_of(count, has_counts, counts, c)
        invstd = invstd_of(n, m2[c], eps)
        common = sum_dz[c] / n if uses_sums and n != 0.0 else 0.0
        slope = sum_dz_x[c] / n * invstd if uses_sums and n != 0.0 else 0.0
        scale, term, middle = scale_of(invstd, has_weight, weight, c), bias_of(has_bias, bias, c), mean[c]
        fits = fits_single(middle, scale, term) and is_middling_or_nan(common) and is_middling_or_nan(slope)
        if may_be_single and agreed(fits):
            single(
                x, dy, dx, where, residual, dresidual, first, middle, scale, term, common, slope, works, part,
                chunk, positions, rows, places, sizes, x_steps, dy_steps, dx_steps, w_steps, r_steps, dr_steps,
            )  # fmt: skip
        else:
            rows, places = step_alone(rows, places, sizes)
            double(
                x, dy, dx, where, residual, dresidual, c, middle, scale, term, common, slope, writes, part,
                chunk, positions, rows, places, sizes, x_steps, dy_steps, dx_steps, w_steps, r_steps, dr_steps,
            )  # fmt: skip

    weights = "" if where_kind is None else NAMES[where_kind]
    name = f"grad_input_{gate}_{statistics}_{NAMES[kind]}_{NAMES[dy_kind]}_{weights}_{shape}"
    kinds = kind, dy_kind, kind, BOOL if where_kind is None else where_kind, kind, kind
    operands = [each for k in kinds for each in (POINTERS[k], numbers(shape.axes))]
    signature = types.void(*grid(shape), *operands, vector, vector, *STATISTICS, *PARAMETERS)
    return Kernel(name, signature, grad_input, blocks=3 if shape.abreast or gate == RELU_ONTO else 4)
