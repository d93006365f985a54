"""What an element is shifted and scaled by, in the precision that its loop computes in.

The mean comes in three parts, so that float32 can subtract it as exactly as it is known.
"""

import math
from functools import cache

import numpy as np

from bnarray.kernels.cuda.compiled import index, machinery, number, vector
from bnarray.kernels.cuda.exact import LARGE, is_middling_or_nan

#: eps; then whether there are weights and biases, and these.
PARAMETERS = (number, index, vector, index, vector)

#: The count of all features; whether there is one of each, and these; then mean and m2.
STATISTICS = (number, index, vector, vector, vector)


@machinery
def invstd_of(count, m2, eps):
    """invstd = 1 / √(m2 / count + eps); 0 where the root is 0; the variance of nothing counts as 1"""
    root = math.sqrt((m2 / count if count != 0.0 else 1.0) + eps)
    return 1.0 / root if root != 0.0 else 0.0


@machinery
def scale_of(invstd, has_weight, weight, c):
    return invstd * weight[c] if has_weight else invstd


@machinery
def bias_of(has_bias, bias, c):
    return bias[c] if has_bias else 0.0


@machinery
def count_of(count, has_counts, counts, c):
    return counts[c] if has_counts else count


@machinery
def fits_single(mean, scale, bias):
    """Whether loops in float32 do: terms not too large, factors not too small either."""
    is_far = abs(mean) > LARGE and abs(mean) < np.inf
    is_large = abs(bias) > LARGE and abs(bias) < np.inf
    return not is_far and not is_large and (is_middling_or_nan(scale) or abs(scale) == np.inf)


@cache
def parts(real):
    """Make the function that splits a mean into (center, low, rest)."""

    @machinery
    def split(mean):
        center = real(mean)
        left = (
            mean - np.float64(center) if mean != np.float64(center) else np.float64(0)
        )  # also where both are infinite
        low = real(left)
        return center, low, real(left - np.float64(low))

    return split


@machinery
def transformed(x, center, low, rest, scale, bias):
    """z = (x − mean) · scale + bias, in the same operations forwards and backwards."""
    return (((x - center) - low) - rest) * scale + bias
