"""The two sums per feature of the backward pass, which are the gradients of bias and weight::

    Σ dz        Σ dz · x̂ = invstd · Σ dz · (x − mean)

dz is dy, or what of it passes ReLU. Where dz is 0 nothing is added, be x NaN: padding that no loss looks at does not
disturb the gradients. Each chunk leaves its sums, of which those in float32 keep what they round away (`exact`); where
float32 would overflow or underflow, the chunk is read again in float64.

Traffic: reads x and dy (and, under ReLU, the residual) once, writes nothing of x's size.
"""

from functools import cache

import numpy as np

from bnarray.kernels.cuda.block import handing, summation
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
from bnarray.kernels.cuda.compiled import THREADS, Kernel, cuda, machinery, numbers, types, vector
from bnarray.kernels.cuda.exact import add, is_middling, product, two_sum, whole
from bnarray.kernels.cuda.gate import OPEN, RELU_ONTO
from bnarray.kernels.cuda.memory import FLOAT64, NAMES, POINTERS, all_of, each, loading, reader
from bnarray.kernels.cuda.stage import loading_staged, slots
from bnarray.kernels.cuda.together import TOLD, is_last, words_type
from bnarray.kernels.cuda.walk import grid, place, steps_alone, walk


@cache
def _loop(kind, dy_kind, gate, shape, real, is_staged=False):
    """Make the loop over a thread's part of a chunk: Σ dz and Σ dz · (x − mean)."""
    begin, at, onward = walk(shape)
    _, start_of = place(shape)
    read, read_dy, split = reader(kind, real), reader(dy_kind, real), parts(real)
    zero, is_single, width = real(0), real is np.float32, shape.width
    load = loading_staged(width) if is_staged else loading(shape)
    slot, load_residual, hand = slots(width), loading(shape), handing(shape, 5)

    @machinery
    def add_one(element, gradient, added, so_far, shared):
        plain, plain_low, sloped, sloped_low = so_far
        center, low, rest, scale, shift = shared
        dz, value = read_dy(gradient), read(element)
        if gate != OPEN:
            z = transformed(value, center, low, rest, scale, shift)
            if gate == RELU_ONTO:
                z = z + read(added)
            dz = zero if z <= zero else dz
        if is_single:
            # What subtracting the mean rounds away shows where shares of both signs leave little of the sum.
            deviation, error = two_sum(value, -center)
            deviation, error = (deviation, (error - low) - rest) if dz != zero else (zero, zero)
            plain, plain_low = add(plain, plain_low, dz, zero)
            share, lost = product(dz, deviation)
            sloped, sloped_low = add(sloped, sloped_low, share, lost + dz * error)
        elif dz != zero:
            plain += dz
            sloped += dz * (((value - center) - low) - rest)
        return plain, plain_low, sloped, sloped_low

    @machinery
    def nothing(shared):
        return zero, zero, zero, zero

    @machinery
    def plain_of(so_far):
        return whole(so_far[0], so_far[1])

    @machinery
    def sloped_of(so_far):
        return whole(so_far[2], so_far[3])

    add_all, nothing = all_of(add_one, shape), each(nothing, shape)
    plain_of, sloped_of = each(plain_of, shape), each(sloped_of, shape)

    @machinery
    def add_at_once(x, i, dy, j, residual, k, so_far, shared):
        values = load(x, i)
        return add_all(values, load(dy, j), load_residual(residual, k) if gate == RELU_ONTO else values, so_far, shared)

    @machinery
    def add_by_turns(x, i, dy, j, residual, k, so_far, shared):
        for turn in range(width):
            so_far = add_one(x[i + turn], dy[j + turn], residual[k + turn], so_far, shared)
        return so_far

    # What float32 cannot hold is rare: vectors would double the time to compile.
    add_position = add_at_once if is_single else add_by_turns

    # Loops find their coefficients themselves, so that none are kept for another loop, which is rarely needed.
    @machinery
    def sums(
        c, first, part, chunk, positions, rows, places, sizes, x, x_steps, dy, dy_steps, residual, r_steps,
        staged, staged_dy, count, has_counts, counts, mean, m2, eps, has_weight, weight, has_bias, bias,
    ):  # fmt: skip
        invstd = invstd_of(count_of(count, has_counts, counts, c), m2[c], eps)
        factor, term = scale_of(invstd, has_weight, weight, c), bias_of(has_bias, bias, c)
        fits = fits_single(mean[c], factor, term)
        center, low, rest = split(mean[c])
        shared = hand((center, low, rest, real(factor), real(term)))
        x_start, dy_start = start_of(first, sizes, x_steps), start_of(first, sizes, dy_steps)
        r_start = start_of(first, sizes, r_steps)
        so_far = nothing(shared)
        times, row, spot = begin(part, chunk, positions, sizes)
        for turn in range(times):
            k = r_start + at(row, spot, sizes, r_steps)
            if is_staged:
                so_far = add_position(staged, slot(turn), staged_dy, slot(turn), residual, k, so_far, shared)
            else:
                i, j = x_start + at(row, spot, sizes, x_steps), dy_start + at(row, spot, sizes, dy_steps)
                so_far = add_position(x, i, dy, j, residual, k, so_far, shared)
            row, spot = onward(row, spot, rows, places, sizes)
        return plain_of(so_far), sloped_of(so_far), fits

    return sums


@cache
def leaving(kind, dy_kind, gate, shape, is_staged=False):
    """Make the function that leaves a chunk's sums; `staged` and `staged_dy` may hold the chunk's elements.

    What float32 cannot hold is summed by threads with one feature each.
    """
    total, total_alone, step_alone = summation(shape), summation(shape.alone), steps_alone(shape)
    single = _loop(kind, dy_kind, gate, shape, np.float32, is_staged)
    double = _loop(kind, dy_kind, gate, shape.alone, np.float64)
    may_be_single, tile = kind != FLOAT64 and dy_kind != FLOAT64, shape.tile

    @machinery
    def leave_sums(
        mine, staged, staged_dy, room,
        chunk, chunks, positions, features, rows, places, sizes, x, x_steps, dy, dy_steps, residual, r_steps,
        count, has_counts, counts, mean, m2, eps, has_weight, weight, has_bias, bias, partials,
    ):  # fmt: skip
        c, first, part, writes = mine
        is_exact = False
        if may_be_single:
            plain, sloped, fits = single(
                c, first, part, chunk, positions, rows, places, sizes, x, x_steps, dy, dy_steps, residual, r_steps,
                staged, staged_dy, count, has_counts, counts, mean, m2, eps, has_weight, weight, has_bias, bias,
            )  # fmt: skip
            sum_dz, sum_dz_x = total(plain, room), total(sloped, room)
            is_exact = fits and is_middling(sum_dz) and is_middling(sum_dz_x)
            is_exact = not cuda.syncthreads_or(np.int32(not is_exact))
        if not is_exact:
            rows, places = step_alone(rows, places, sizes)
            sum_dz, sum_dz_x, _ = double(
                c, c, part, chunk, positions, rows, places, sizes, x, x_steps, dy, dy_steps, residual, r_steps,
                x, dy, count, has_counts, counts, mean, m2, eps, has_weight, weight, has_bias, bias,
            )  # fmt: skip
            sum_dz, sum_dz_x = total_alone(sum_dz, room), total_alone(sum_dz_x, room)
        if writes and cuda.threadIdx.x < tile:
            partials[part * features + c] = sum_dz
            partials[(chunks + part) * features + c] = sum_dz_x

    return leave_sums


@cache
def adding(shape):
    """Make the function that adds up the chunks of a feature in a fixed order, and returns (Σ dz, Σ dz · x̂)."""
    tile, lines, total = shape.tile, shape.alone.lines, summation(shape.alone)

    @machinery
    def add_chunks(partials, chunks, features, c, invstd, room):
        sum_dz, sum_dz_x = np.float64(0), np.float64(0)
        for chunk in range(cuda.threadIdx.x // tile, chunks, lines):
            sum_dz += partials[chunk * features + c]
            sum_dz_x += partials[(chunks + chunk) * features + c]
        sum_dz, sum_dz_x = total(sum_dz, room), total(sum_dz_x, room)
        return sum_dz, sum_dz_x * invstd

    return add_chunks


@cache
def kernel(kind, dy_kind, gate, shape):
    """Make the kernel that writes Σ dz and Σ dz · x̂: sums of chunks, which the last block of a tile adds up."""
    feature, _ = place(shape)
    leave_sums, added, tile = leaving(kind, dy_kind, gate, shape), adding(shape), shape.tile

    def grad_sums(
        chunk, chunks, positions, features, rows, places, sizes, x, x_steps, dy, dy_steps, residual, r_steps,
        count, has_counts, counts, mean, m2, eps, has_weight, weight, has_bias, bias, partials,
        sum_dz, sum_dz_x, words,
    ):  # fmt: skip
        room = cuda.shared.array(THREADS, types.float64)
        told = cuda.shared.array(TOLD, types.int64)
        c, first, part, writes, _ = feature(chunks, features)
        leave_sums(
            (c, first, part, writes), x, dy, room,
            chunk, chunks, positions, features, rows, places, sizes, x, x_steps, dy, dy_steps, residual, r_steps,
            count, has_counts, counts, mean, m2, eps, has_weight, weight, has_bias, bias, partials,
        )  # fmt: skip
        if is_last(words, np.int64(cuda.blockIdx.x) // chunks, chunks, told):
            invstd = invstd_of(count_of(count, has_counts, counts, c), m2[c], eps)
            plain, sloped = added(partials, chunks, features, c, invstd, room)
            if writes and cuda.threadIdx.x < tile:
                sum_dz[c], sum_dz_x[c] = plain, sloped

    name = f"grad_sums_{gate}_{NAMES[kind]}_{NAMES[dy_kind]}_{shape}"
    steps = numbers(shape.axes)
    operands = POINTERS[kind], steps, POINTERS[dy_kind], steps, POINTERS[kind], steps
    sums = vector, vector, vector, words_type
    return Kernel(name, types.void(*grid(shape), *operands, *STATISTICS, *PARAMETERS, *sums), grad_sums, blocks=3)
