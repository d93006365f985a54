"""`moments` and `normalize` in one launch, which reads x once: a chunk waits on chip for its feature's statistics.

A block copies its chunk to shared memory, leaves the chunk's moments, and normalises from there what it has once all
chunks of the feature are merged (`together`). The loops are those of the two launches, in the same order over the same
chunks, and so are the bits.

Traffic: reads x once, writes y once. What float32 cannot hold, which is rare, is read again from memory.
"""

from functools import cache

import numpy as np

from bnarray.kernels.cuda import stage, together
from bnarray.kernels.cuda.block import agreeing, merging
from bnarray.kernels.cuda.coefficients import PARAMETERS, bias_of, fits_single, invstd_of, scale_of
from bnarray.kernels.cuda.compiled import THREADS, Kernel, cuda, index, numbers, types, vector
from bnarray.kernels.cuda.memory import NAMES, POINTERS
from bnarray.kernels.cuda.moments import leaving
from bnarray.kernels.cuda.normalize import loop
from bnarray.kernels.cuda.together import TOLD, is_gone, is_last, is_let_go, let_go, ticket
from bnarray.kernels.cuda.walk import grid, own, place, steps_alone, whose


@cache
def kernel(kind, shape):
    """Make the kernel that writes y, and count, mean and m2."""
    of_block, of_tile, (_, start_of) = whose(shape), own(shape), place(shape)
    copy, landed = stage.staging(kind, shape), stage.landed
    leave_moments, merged = leaving(kind, None, shape, True), merging(shape)
    single, double = loop(kind, False, shape, np.float32, True), loop(kind, False, shape.alone, np.float64)
    agreed, step_alone = agreeing(shape), steps_alone(shape)
    size, slots, slot_type = shape.tile, stage.size(kind, 1, shape.width), stage.TYPES[kind]

    def forward(
        chunk, chunks, positions, features, rows, places, sizes, x, x_steps, y, y_steps, relu,
        partials, counts, mean, m2, eps, has_weight, weight, has_bias, bias, words, patience,
    ):  # fmt: skip
        staged = cuda.shared.array(slots, slot_type, alignment=16)
        ns = cuda.shared.array(THREADS, types.float64)
        offsets = cuda.shared.array(THREADS, types.float64)
        squares = cuda.shared.array(THREADS, types.float64)
        told = cuda.shared.array(TOLD, types.int64)
        block = ticket(words, chunks, told)
        tile, c, part, writes = of_block(block, chunks, features)
        first, works = of_tile(tile, features)
        x_start = start_of(first, sizes, x_steps)
        copy(staged, x, x_start, part, chunk, positions, rows, places, sizes, x_steps)
        landed()
        leave_moments(
            (c, first, part, writes), staged, ns,
            chunk, chunks, positions, features, rows, places, sizes, x, x_steps, x, x_steps, partials,
        )  # fmt: skip
        orders = 1 + (features + (size - 1)) // size + tile * chunks
        others_left = 0
        if is_last(words, tile, chunks, told):
            n, middle, spread = merged(partials, chunks, features, c, ns, offsets, squares)
            if writes and cuda.threadIdx.x < size:
                counts[c], mean[c], m2[c] = n, middle, spread
            if chunks > 1:
                others_left = let_go(words, orders, part, chunks, THREADS)
        elif is_let_go(words, orders + part, patience, told):
            n, middle, spread = counts[c], mean[c], m2[c]
        else:
            return
        scale = scale_of(invstd_of(n, spread, eps), has_weight, weight, c)
        term = bias_of(has_bias, bias, c)
        fits = agreed(fits_single(middle, scale, term))
        rows_alone, places_alone = step_alone(rows, places, sizes)
        following = 0
        while True:
            if fits:
                single(
                    staged, y, x, first, middle, scale, term, relu, works,
                    part, chunk, positions, rows, places, sizes, x_steps, y_steps, x_steps,
                )  # fmt: skip
            else:
                double(
                    x, y, x, c, middle, scale, term, relu, writes,
                    part, chunk, positions, rows_alone, places_alone, sizes, x_steps, y_steps, x_steps,
                )  # fmt: skip
            if not others_left:
                return
            while following < chunks and not is_gone(words, orders + following):
                following += 1
            if following == chunks:
                return
            part = np.int64(following)
            copy(staged, x, x_start, part, chunk, positions, rows, places, sizes, x_steps)
            landed()

    operand = POINTERS[kind], numbers(shape.axes)
    signature = (
        *grid(shape), *operand * 2, index, vector, vector, vector, vector, *PARAMETERS, together.words_type, index
    )  # fmt: skip
    return Kernel(f"forward_{NAMES[kind]}_{shape}", types.void(*signature), forward, blocks=together.BLOCKS)
