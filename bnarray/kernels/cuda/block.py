"""What the threads of a block find together: sums over its lines, for each of its features, in a fixed order.

Halves are added to halves. What is found for a feature, and follows from that, each thread has for one feature of the
tile; `handing` is how threads that work on several learn of all of theirs.
"""

from functools import cache

import numpy as np

from bnarray.kernels.cuda import memory
from bnarray.kernels.cuda.compiled import THREADS, cuda, machinery, types
from bnarray.kernels.cuda.memory import tuple_of
from bnarray.kernels.merge import merge

# All threads of a warp.
_ALL = 0xFFFFFFFF

#: The merge, for scalars inside a kernel.
merge_scalars = machinery(merge)


@cache
def _folding(across, width):
    """Make the function that adds up as many lines' tuples of values, and returns to each line one element of the sum.

    A line keeps one half of its tuple, and gives the other half to the line that keeps that; and so on.
    """
    half, at = width // 2, memory.item

    @machinery
    def last(values, turn):
        return values[0]

    if width == 1:
        return last

    @machinery
    def exchange(halves, keeps_high, k):
        low, high = at(halves[0], k), at(halves[1], k)
        kept, given = (high, low) if keeps_high else (low, high)
        return kept + cuda.shfl_xor_sync(_ALL, given, across * half)

    exchange_all, rest = tuple_of(exchange, half), _folding(across, half)

    @machinery
    def fold(values, turn):
        return rest(exchange_all((values[:half], values[half:]), turn & half != 0), turn)

    return fold


@cache
def summation(shape):
    """Make the function that returns the sum of all lines' values to the threads of a feature; `room` is shared memory.

    Abreast, a thread comes with a tuple of values, and leaves with the sum of one feature.
    """
    tile, across, width = shape.tile, shape.across, shape.width
    fold = _folding(across, width)

    @machinery
    def place_alone(value, room):
        room[cuda.threadIdx.x] = value

    @machinery
    def place_abreast(values, room):
        thread = cuda.threadIdx.x
        turn = thread // across % width
        room[thread - thread % tile + thread % across * width + turn] = fold(values, turn)

    place = place_abreast if shape.abreast else place_alone

    @machinery
    def total(value, room):
        thread = cuda.threadIdx.x
        cuda.syncthreads()
        place(value, room)
        half = THREADS // 2
        while half >= tile:
            cuda.syncthreads()
            if thread < half:
                room[thread] += room[thread + half]
            half //= 2
        cuda.syncthreads()
        return room[thread % tile]

    return total


@cache
def agreeing(shape):
    """Make the function that tells whether something holds for all features of a tile.

    They are computed in one precision, however many of them are a thread's.
    """

    @machinery
    def of_one(holds):
        return holds

    @machinery
    def of_all(holds):
        return not cuda.syncthreads_or(np.int32(not holds))

    return of_one if shape.tile == 1 else of_all


@cache
def handing(shape, number):
    """Make the function from so many numbers for the feature of a thread to those for each one that it works on."""
    tile, across, width, quantity = shape.tile, shape.across, shape.width, number * shape.tile
    item = memory.item

    @machinery
    def keep(values):
        return values

    @machinery
    def tell(told, values, k):
        told[k * tile + cuda.threadIdx.x] = item(values, k)
        return k

    @machinery
    def look(told, feature, k):
        return told[k * tile + feature]

    tell_all, look_for_all = tuple_of(tell, number), tuple_of(look, number)

    @machinery
    def look_for(told, first, k):
        return look_for_all(told, first + k)

    look_for_each = tuple_of(look_for, width)

    @machinery
    def hand(values):
        told = cuda.shared.array(quantity, types.float32)
        thread = cuda.threadIdx.x
        cuda.syncthreads()
        if thread < tile:
            tell_all(told, values)
        cuda.syncthreads()
        return look_for_each(told, thread % across * width)

    return hand if shape.abreast else keep


@cache
def merging(shape):
    """Make the function that merges the chunks' moments of a feature, and returns (count, mean, m2) to each line."""
    tile, lines = shape.tile, shape.alone.lines

    @machinery
    def merge_chunks(partials, chunks, features, c, counts, offsets, squares):
        quantity = chunks * features
        first = np.int64(0)
        while first < chunks - 1 and partials[first * features + c] == 0.0:
            first += 1
        shift = partials[quantity + first * features + c]
        count, offset, m2 = np.float64(0.0), np.float64(0.0), np.float64(0.0)
        thread = cuda.threadIdx.x
        for chunk in range(thread // tile, chunks, lines):
            at = chunk * features + c
            n = partials[at]
            away = partials[2 * quantity + at] + (partials[quantity + at] - shift) if n != 0.0 else 0.0
            count, offset, m2 = merge_scalars(count, offset, m2, n, away, partials[3 * quantity + at])
        counts[thread], offsets[thread], squares[thread] = count, offset, m2
        half = THREADS // 2
        while half >= tile:
            cuda.syncthreads()
            if thread < half:
                other = thread + half
                count, offset, m2 = merge_scalars(count, offset, m2, counts[other], offsets[other], squares[other])
                counts[thread], offsets[thread], squares[thread] = count, offset, m2
            half //= 2
        cuda.syncthreads()
        lane = thread % tile
        return counts[lane], shift + offsets[lane], squares[lane]

    return merge_chunks
