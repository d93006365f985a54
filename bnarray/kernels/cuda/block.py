"""Sums over the lines of a block, for each of its features, in a fixed order: halves are added to halves."""

from functools import cache

import numpy as np

from bnarray.kernels.cuda.compiled import THREADS, cuda, machinery
from bnarray.kernels.merge import merge

#: The merge, for scalars inside a kernel.
merge_scalars = machinery(merge)


@cache
def summation(across):
    """Make the function that returns the sum of all lines' values to each of them; `room` is shared memory."""

    @machinery
    def total(value, room):
        thread = cuda.threadIdx.x
        cuda.syncthreads()
        room[thread] = value
        half = THREADS // 2
        while half >= across:
            cuda.syncthreads()
            if thread < half:
                room[thread] += room[thread + half]
            half //= 2
        cuda.syncthreads()
        return room[thread % across]

    return total


@cache
def merging(shape):
    """Make the function that merges the chunks' moments of a feature, and returns (count, mean, m2) to each line."""
    across, lines = shape.across, shape.lines

    @machinery
    def merge_chunks(partials, chunks, features, c, counts, offsets, squares):
        quantity = chunks * features
        first = np.int64(0)
        while first < chunks - 1 and partials[first * features + c] == 0.0:
            first += 1
        shift = partials[quantity + first * features + c]
        count, offset, m2 = np.float64(0.0), np.float64(0.0), np.float64(0.0)
        thread = cuda.threadIdx.x
        for chunk in range(thread // across, chunks, lines):
            at = chunk * features + c
            n = partials[at]
            away = partials[2 * quantity + at] + (partials[quantity + at] - shift) if n != 0.0 else 0.0
            count, offset, m2 = merge_scalars(count, offset, m2, n, away, partials[3 * quantity + at])
        counts[thread], offsets[thread], squares[thread] = count, offset, m2
        half = THREADS // 2
        while half >= across:
            cuda.syncthreads()
            if thread < half:
                other = thread + half
                count, offset, m2 = merge_scalars(count, offset, m2, counts[other], offsets[other], squares[other])
                counts[thread], offsets[thread], squares[thread] = count, offset, m2
            half //= 2
        cuda.syncthreads()
        lane = thread % across
        return counts[lane], shift + offsets[lane], squares[lane]

    return merge_chunks
