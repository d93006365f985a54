"""Small loops over per-feature vectors, where a dozen array operations would cost more than the batch itself."""

import math

from numba import types

from bnarray.kernels.cpu.coefficients import count_of
from bnarray.kernels.cpu.compiled import Kernel, flag, machinery, number, partials, vector


@machinery
def run(mean, var, count, counts, batch_mean, batch_m2, rate, correction, new):
    """running += rate · (batch − running), where anything was counted; written so that a rate of 1 is the batch."""
    for c in range(mean.size):
        n = count_of(c, count, counts)
        new[0, c], new[1, c] = mean[c], var[c]
        if n > 0:
            batch_var = batch_m2[c] / (n - correction) if n > correction else math.nan
            new[0, c] = (1 - rate) * mean[c] + rate * batch_mean[c]
            new[1, c] = (1 - rate) * var[c] + rate * batch_var


@machinery
def all_finite(a, b):
    finite = True
    for c in range(a.size):
        finite &= math.isfinite(a[c])
    for c in range(b.size):
        finite &= math.isfinite(b[c])
    return finite


running = Kernel(
    "running", types.void(vector, vector, number, vector, vector, vector, number, number, partials), run.py_func
)
are_finite = Kernel("are_finite", flag(vector, vector), all_finite.py_func)
