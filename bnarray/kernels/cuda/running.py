"""One update of running statistics, decided and done on the device::

    exponential:  running += rate · (batch − running)        var = m2 / (n − correction)
    cumulative:   the union of two samples (`kernels.merge`), and the variance of what it holds

It is all or nothing. Nothing happens where nothing was counted; a batch whose numbers are not finite, or of too few
values for its variance, is one more skipped. So nobody waits for the device to find out.

A state lies in one array of float64: count, mean, var and m2 of each feature, then how many updates were taken in, and
how many were skipped. One block does it all, because all features decide together: a state is small.
"""

from functools import cache

import numpy as np

from bnarray.kernels.cuda.block import merge_scalars
from bnarray.kernels.cuda.compiled import THREADS, Kernel, cuda, index, machinery, number, types, vector

#: Vectors in a state, and the numbers behind them.
VECTORS, NUMBERS = 4, 2


@machinery
def _is_finite(value):
    return abs(value) < np.inf


@machinery
def _variance(count, m2, correction, otherwise):
    return m2 / (count - correction) if count > correction else otherwise


@cache
def kernel():
    """Make the kernel that takes a batch of (count, mean, m2) in."""

    def update(
        features, state, count, has_counts, counts, mean, m2, is_cumulative, rate, correction, takes_nonfinite
    ):  # fmt: skip
        thread = np.int64(cuda.threadIdx.x)
        is_something, is_refused = False, False
        for c in range(thread, features, THREADS):
            n = counts[c] if has_counts else count
            is_something = is_something or n > 0.0
            too_few = not is_cumulative and n > 0.0 and n <= correction
            is_wrong = not takes_nonfinite and not (_is_finite(mean[c]) and _is_finite(m2[c]))
            is_refused = is_refused or too_few or is_wrong
        is_something = cuda.syncthreads_or(np.int32(is_something))
        is_refused = cuda.syncthreads_or(np.int32(is_refused))
        if not is_something:
            return
        if thread == 0:
            state[4 * features + (1 if is_refused else 0)] += 1.0
        if is_refused:
            return
        for c in range(thread, features, THREADS):
            n = counts[c] if has_counts else count
            counted, middle, spread, squares = c, features + c, 2 * features + c, 3 * features + c
            if is_cumulative:
                total, state[middle], state[squares] = merge_scalars(
                    state[counted], state[middle], state[squares], n, mean[c], m2[c]
                )
                state[counted] = total
                state[spread] = _variance(total, state[squares], correction, 1.0)
            elif n > 0.0:
                var = _variance(n, m2[c], correction, np.nan)
                state[counted] += n
                state[middle] = (1.0 - rate) * state[middle] + rate * mean[c]
                state[spread] = (1.0 - rate) * state[spread] + rate * var

    signature = types.void(
        index, vector, number, index, vector, vector, vector, index, number, number, index
    )  # fmt: skip
    return Kernel("update_running", signature, update)
