"""Small loops over per-feature vectors, where a dozen array operations would cost more than the batch itself.

A `count` vector has one element for all features, or one for each.
"""

import math

from numba import types

from bnarray.kernels.cpu.compiled import Kernel, flag, number, results, vector


def _invstd(count, m2, eps, invstd):
    """invstd = 1 / √(m2 / count + eps); 0 where the root is 0; the variance of nothing counts as 1."""
    for c in range(m2.size):
        n = count[c if count.size > 1 else 0]
        root = math.sqrt((m2[c] / n if n != 0 else 1.0) + eps)
        invstd[c] = 1 / root if root != 0 else 0.0


def _product(a, b, result):
    """result = a · b; in NumPy it would warn where one is infinite."""
    for c in range(a.size):
        result[c] = a[c] * b[c]


def _running(mean, var, count, batch_mean, batch_m2, rate, correction, new_mean, new_var):
    """running += rate · (batch − running), where anything was counted; written so that a rate of 1 is the batch."""
    for c in range(mean.size):
        n = count[c if count.size > 1 else 0]
        new_mean[c], new_var[c] = mean[c], var[c]
        if n > 0:
            batch_var = batch_m2[c] / (n - correction) if n > correction else math.nan
            new_mean[c] = (1 - rate) * mean[c] + rate * batch_mean[c]
            new_var[c] = (1 - rate) * var[c] + rate * batch_var


def _is_finite(values):
    finite = True
    for c in range(values.size):
        finite &= math.isfinite(values[c])
    return finite


def _slopes(count, sum_dz, sum_dz_x, invstd, common, slope):
    """common = Σ dz / n,  slope = Σ dz · x̂ / n · invstd; nothing over nothing is 0."""
    for c in range(sum_dz.size):
        n = count[c if count.size > 1 else 0]
        common[c] = sum_dz[c] / n if n != 0 else 0.0
        slope[c] = sum_dz_x[c] / n * invstd[c] if n != 0 else 0.0


invstd = Kernel("invstd", types.void(vector, vector, number, results), _invstd)
product = Kernel("product", types.void(vector, vector, results), _product)
running = Kernel(
    "running", types.void(vector, vector, vector, vector, vector, number, number, results, results), _running
)
is_finite = Kernel("is_finite", flag(vector), _is_finite)
slopes = Kernel("slopes", types.void(vector, vector, vector, vector, results, results), _slopes)
