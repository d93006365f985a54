"""Mean and sum of squared deviations of every feature, in one read of x.

Each chunk leaves its count, the `shift` from which its deviations were taken, and how its moments look from there::

    offset = Σ (x − shift) / n        m2 = Σ (x − shift)² − (Σ (x − shift))² / n

The mean is shift + offset; E[x²] − E[x]² (a shift of 0) is never formed. In float32 the shift is the chunk's first
value, and what deviations, squares and sums round away is kept (`exact`), so that of their 48 bits no more than
log₂ n cancel, where the first value is an outlier. In float64, under weights, and where float32 would overflow or
underflow, the shift is the chunk's mean, found by reading it once before.

The last block of a tile to leave a chunk merges them all (`together`): in float64, in their order, and instead of their
means the distances of those from the first one's shift: where the mean is 10⁶ deviations, its own rounding, merge after
merge, would show in the outputs next to 0.

Traffic: reads x once (and `where`; twice in float64 or under weights, from the cache if it has room), writes nothing
of x's size.
"""

from functools import cache

import numpy as np

from bnarray.kernels.cuda.block import merging, summation
from bnarray.kernels.cuda.compiled import THREADS, Kernel, cuda, machinery, numbers, types, vector
from bnarray.kernels.cuda.exact import LARGE, add, is_middling, product, two_sum, whole
from bnarray.kernels.cuda.memory import BOOL, FLOAT64, NAMES, POINTERS, all_of, each, loader, loading, reader
from bnarray.kernels.cuda.stage import loading_staged, slots
from bnarray.kernels.cuda.together import TOLD, is_last, words_type
from bnarray.kernels.cuda.walk import grid, place, steps_alone, walk


@machinery
def leave(partials, chunks, features, chunk, c, count, shift, offset, m2):
    quantity = chunks * features
    at = chunk * features + c
    partials[at] = count
    partials[quantity + at] = shift
    partials[2 * quantity + at] = offset
    partials[3 * quantity + at] = m2 if not m2 < 0.0 else 0.0  # what rounding takes below zero; NaN stays


@cache
def single(kind, shape, is_staged=False):
    """Make the loop in float32, over a thread's part of a chunk: Σ (x − shift), and that of squares.

    Abreast, these are tuples, one element for each feature, as is the shift.
    """
    begin, at, onward = walk(shape)
    slot, read = slots(shape.width), reader(kind, np.float32)
    load = loading_staged(shape.width) if is_staged else loading(shape)

    @machinery
    def add_one(element, same, again, so_far, shift):
        drift, drift_low, square, square_low = so_far
        deviation, error = two_sum(read(element), -shift)
        drift, drift_low = add(drift, drift_low, deviation, error)
        squared, rest = product(deviation, deviation)
        square, square_low = add(square, square_low, squared, cuda.fma(deviation + deviation, error, rest))
        return drift, drift_low, square, square_low

    @machinery
    def nothing(shift):
        return np.float32(0), np.float32(0), np.float32(0), np.float32(0)

    @machinery
    def drift_of(so_far):
        return whole(so_far[0], so_far[1])

    @machinery
    def square_of(so_far):
        return whole(so_far[2], so_far[3])

    add_all, nothing = all_of(add_one, shape), each(nothing, shape)
    drift_of, square_of = each(drift_of, shape), each(square_of, shape)

    @machinery
    def sums(x, start, shift, part, chunk, positions, rows, places, sizes, steps):
        so_far = nothing(shift)
        times, row, spot = begin(part, chunk, positions, sizes)
        for i in range(times):
            elements = load(x, slot(i) if is_staged else start + at(row, spot, sizes, steps))
            so_far = add_all(elements, elements, elements, so_far, shift)
            row, spot = onward(row, spot, rows, places, sizes)
        return drift_of(so_far), square_of(so_far)

    return sums


@cache
def double(kind, where_kind, shape):
    """Make the loops in float64: Σ w and Σ w · x; then, about a center, Σ w · (x − center) and that of squares.

    Elements of weight 0 are not looked at, be they NaN.
    """
    begin, at, onward = walk(shape)
    load, weighted, width = loader(kind, np.float64), where_kind is not None, shape.width
    load_weight = loader(where_kind, np.float64)

    @machinery
    def means(x, where, start, where_start, part, chunk, positions, rows, places, sizes, steps, where_steps):
        count, total = np.float64(0), np.float64(0)
        times, row, spot = begin(part, chunk, positions, sizes)
        for _ in range(times):
            i, k = start + at(row, spot, sizes, steps), where_start + at(row, spot, sizes, where_steps)
            for turn in range(width):
                w = load_weight(where, k + turn) if weighted else np.float64(1)
                if w != 0:
                    count += w
                    total += w * load(x, i + turn)
            row, spot = onward(row, spot, rows, places, sizes)
        return count, total

    @machinery
    def deviations(
        x, where, start, where_start, center, part, chunk, positions, rows, places, sizes, steps, where_steps
    ):
        drift, square = np.float64(0), np.float64(0)
        times, row, spot = begin(part, chunk, positions, sizes)
        for _ in range(times):
            i, k = start + at(row, spot, sizes, steps), where_start + at(row, spot, sizes, where_steps)
            for turn in range(width):
                w = load_weight(where, k + turn) if weighted else np.float64(1)
                if w != 0:
                    deviation = load(x, i + turn) - center
                    drift += w * deviation
                    square += w * deviation * deviation
            row, spot = onward(row, spot, rows, places, sizes)
        return drift, square

    return means, deviations


@cache
def leaving(kind, where_kind, shape, is_staged=False):
    """Make the function that leaves a chunk's (count, shift, offset, m2); `staged` may hold the chunk's elements.

    What float32 cannot hold is summed by threads with one feature each.
    """
    _, at, _ = walk(shape)
    _, start_of = place(shape)
    total, total_alone, step_alone = summation(shape), summation(shape.alone), steps_alone(shape)
    sums = single(kind, shape, is_staged)
    means, deviations = double(kind, where_kind, shape.alone)
    load, load_all, read_all = loader(kind, np.float32), loading(shape), each(reader(kind, np.float32), shape)
    in_single = kind != FLOAT64 and where_kind is None
    tile, inner, values = shape.tile, shape.outer, shape.values

    @machinery
    def load_abreast(x, i):
        return read_all(load_all(x, i))

    load_shift = load_abreast if shape.abreast else load

    @machinery
    def leave_moments(
        mine, staged, room,
        chunk, chunks, positions, features, rows, places, sizes, x, steps, where, where_steps, partials,
    ):  # fmt: skip
        c, first, part, writes = mine
        writes = writes and cuda.threadIdx.x < tile
        start, where_start = start_of(c, sizes, steps), start_of(c, sizes, where_steps)
        is_exact = False
        if in_single:
            begins, own = part * chunk, start_of(first, sizes, steps)
            row = begins // sizes[inner]
            before = at(row, begins - row * sizes[inner], sizes, steps)
            drifts, squares = sums(
                staged, own, load_shift(x, own + before), part, chunk, positions, rows, places, sizes, steps
            )
            drift, square = total(drifts, room), total(squares, room)
            shift, count = load(x, start + before), np.float64(min(chunk, positions - begins) * values)
            is_exact = is_middling(square) and abs(drift) < LARGE and (square != 0 or drift == 0)
            is_exact = not cuda.syncthreads_or(np.int32(not is_exact))
            if is_exact and writes:
                m2 = square - drift * drift / count
                leave(partials, chunks, features, part, c, count, np.float64(shift), drift / count, m2)
        if not is_exact:
            rows, places = step_alone(rows, places, sizes)
            count, center = means(
                x, where, start, where_start, part, chunk, positions, rows, places, sizes, steps, where_steps
            )
            count, center = total_alone(count, room), total_alone(center, room)
            center = center / count if count != 0 else 0.0
            drift, square = deviations(
                x, where, start, where_start, center, part, chunk, positions, rows, places, sizes, steps, where_steps
            )
            drift, square = total_alone(drift, room), total_alone(square, room)
            if writes:
                offset, m2 = (drift / count, square - drift * drift / count) if count != 0 else (0.0, 0.0)
                leave(partials, chunks, features, part, c, count, center, offset, m2)

    return leave_moments


@cache
def kernel(kind, where_kind, shape):
    """Make the kernel that writes (count, mean, m2); `where_kind` is None without weights.

    It leaves every chunk's (count, shift, offset, m2), which the last block of a tile merges.
    """
    feature, _ = place(shape)
    leave_moments, merged, tile = leaving(kind, where_kind, shape), merging(shape), shape.tile

    def moments(
        chunk, chunks, positions, features, rows, places, sizes, x, steps, where, where_steps, partials,
        counts, mean, m2, words,
    ):  # fmt: skip
        ns = cuda.shared.array(THREADS, types.float64)
        offsets = cuda.shared.array(THREADS, types.float64)
        squares = cuda.shared.array(THREADS, types.float64)
        told = cuda.shared.array(TOLD, types.int64)
        c, first, part, writes, _ = feature(chunks, features)
        leave_moments(
            (c, first, part, writes), x, ns,
            chunk, chunks, positions, features, rows, places, sizes, x, steps, where, where_steps, partials,
        )  # fmt: skip
        if is_last(words, np.int64(cuda.blockIdx.x) // chunks, chunks, told):
            n, middle, spread = merged(partials, chunks, features, c, ns, offsets, squares)
            if writes and cuda.threadIdx.x < tile:
                counts[c], mean[c], m2[c] = n, middle, spread

    name = f"moments_{NAMES[kind]}_{'' if where_kind is None else NAMES[where_kind]}_{shape}"
    x, where, steps = POINTERS[kind], POINTERS[BOOL if where_kind is None else where_kind], numbers(shape.axes)
    signature = types.void(*grid(shape), x, steps, where, steps, vector, vector, vector, vector, words_type)
    return Kernel(name, signature, moments, blocks=4 if where_kind is None and not shape.abreast else 3)
