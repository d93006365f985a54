"""`grad_sums` and `grad_input` in one launch, which reads x and dy once: chunks wait on chip for their feature's sums.

A block copies its chunk of both to shared memory, leaves the chunk's sums, and finds dx from there once all chunks of
the feature are added up (`together`). The loops are those of the two launches, in the same order over the same chunks,
and so are the bits.

Traffic: reads x and dy once (and a residual twice, under ReLU), writes dx (and the residual's gradient). What float32
cannot hold, which is rare, is read again from memory.
"""

from functools import cache

import numpy as np

from bnarray.kernels.cuda import stage, together
from bnarray.kernels.cuda.block import agreeing
from bnarray.kernels.cuda.coefficients import (
    PARAMETERS,
    STATISTICS,
    bias_of,
    count_of,
    fits_single,
    invstd_of,
    scale_of,
)
from bnarray.kernels.cuda.compiled import THREADS, Kernel, cuda, index, numbers, types, vector
from bnarray.kernels.cuda.exact import is_middling_or_nan
from bnarray.kernels.cuda.grad_input import BATCH, loop
from bnarray.kernels.cuda.grad_sums import adding, leaving
from bnarray.kernels.cuda.memory import BOOL, NAMES, POINTERS
from bnarray.kernels.cuda.together import TOLD, is_gone, is_last, is_let_go, let_go, ticket
from bnarray.kernels.cuda.walk import grid, own, place, steps_alone, whose


@cache
def kernel(kind, gate, shape):
    """Make the kernel that writes dx (and dresidual), and Σ dz and Σ dz · x̂; x and dy are of one kind."""
    of_block, of_tile, (_, start_of) = whose(shape), own(shape), place(shape)
    copy, landed = stage.staging(kind, shape), stage.landed
    leave_sums, added = leaving(kind, kind, gate, shape, True), adding(shape)
    case, agreed, step_alone = (kind, kind, BOOL, gate, BATCH), agreeing(shape), steps_alone(shape)
    single, double = loop(*case, shape, np.float32, True), loop(*case, shape.alone, np.float64)
    size, slots, slot_type = shape.tile, stage.size(kind, 2, shape.width), stage.TYPES[kind]

    def backward(
        chunk, chunks, positions, features, rows, places, sizes, x, x_steps, dy, dy_steps, dx, dx_steps,
        residual, r_steps, dresidual, dr_steps, partials, sum_dz, sum_dz_x,
        count, has_counts, counts, mean, m2, eps, has_weight, weight, has_bias, bias, words, patience,
    ):  # fmt: skip
        staged = cuda.shared.array(slots, slot_type, alignment=16)
        staged_dy = cuda.shared.array(slots, slot_type, alignment=16)
        room = cuda.shared.array(THREADS, types.float64)
        told = cuda.shared.array(TOLD, types.int64)
        block = ticket(words, chunks, told)
        tile, c, part, writes = of_block(block, chunks, features)
        first, works = of_tile(tile, features)
        x_start, dy_start = start_of(first, sizes, x_steps), start_of(first, sizes, dy_steps)
        copy(staged, x, x_start, part, chunk, positions, rows, places, sizes, x_steps)
        copy(staged_dy, dy, dy_start, part, chunk, positions, rows, places, sizes, dy_steps)
        landed()
        leave_sums(
            (c, first, part, writes), staged, staged_dy, room,
            chunk, chunks, positions, features, rows, places, sizes, x, x_steps, dy, dy_steps, residual, r_steps,
            count, has_counts, counts, mean, m2, eps, has_weight, weight, has_bias, bias, partials,
        )  # fmt: skip
        n = count_of(count, has_counts, counts, c)
        invstd = invstd_of(n, m2[c], eps)
        orders = 1 + (features + (size - 1)) // size + tile * chunks
        others_left = 0
        if is_last(words, tile, chunks, told):
            plain, sloped = added(partials, chunks, features, c, invstd, room)
            if writes and cuda.threadIdx.x < size:
                sum_dz[c], sum_dz_x[c] = plain, sloped
            if chunks > 1:
                others_left = let_go(words, orders, part, chunks, THREADS)
        elif is_let_go(words, orders + part, patience, told):
            plain, sloped = sum_dz[c], sum_dz_x[c]
        else:
            return
        common = plain / n if n != 0.0 else 0.0
        slope = sloped / n * invstd if n != 0.0 else 0.0
        scale, term, middle = scale_of(invstd, has_weight, weight, c), bias_of(has_bias, bias, c), mean[c]
        fits = agreed(fits_single(middle, scale, term) and is_middling_or_nan(common) and is_middling_or_nan(slope))
        rows_alone, places_alone = step_alone(rows, places, sizes)
        following = 0
        while True:
            if fits:
                single(
                    staged, staged_dy, dx, x, residual, dresidual,
                    first, middle, scale, term, common, slope, works, part,
                    chunk, positions, rows, places, sizes, x_steps, dy_steps, dx_steps, x_steps, r_steps, dr_steps,
                )  # fmt: skip
            else:
                double(
                    x, dy, dx, x, residual, dresidual,
                    c, middle, scale, term, common, slope, writes, part,
                    chunk, positions, rows_alone, places_alone, sizes,
                    x_steps, dy_steps, dx_steps, x_steps, r_steps, dr_steps,
                )  # fmt: skip
            if not others_left:
                return
            while following < chunks and not is_gone(words, orders + following):
                following += 1
            if following == chunks:
                return
            part = np.int64(following)
            copy(staged, x, x_start, part, chunk, positions, rows, places, sizes, x_steps)
            copy(staged_dy, dy, dy_start, part, chunk, positions, rows, places, sizes, dy_steps)
            landed()

    operand = POINTERS[kind], numbers(shape.axes)
    signature = (
        *grid(shape), *operand * 5, vector, vector, vector, *STATISTICS, *PARAMETERS, together.words_type, index
    )  # fmt: skip
    return Kernel(f"backward_{gate}_{NAMES[kind]}_{shape}", types.void(*signature), backward, blocks=together.BLOCKS)
