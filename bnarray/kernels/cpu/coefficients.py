"""What an element is shifted and scaled by, in the precision that its loop computes in.

The mean comes in three parts, so that loops over float32 data can subtract it in float32: x − center is exact next to
the mean, what is left of the mean then too, and `rest` makes the difference as exact as the float64 mean is. (Two parts
hold a mean of 10⁶ to 10⁻⁹, which is 30 ulp of a result of 4·10⁻⁴.) In float64 the other parts are 0.
"""

import numpy as np

from bnarray.kernels.cpu.compiled import Kernel, flag, machinery, vector
from bnarray.kernels.cpu.memory import carve

#: From here to the ends of float32 there is room for differences and products. Beyond it tiles of float64 are used.
LARGE = 2.0**100

#: How many numbers a feature has: center, low, rest, scale, bias.
VECTORS = 5


@machinery
def _is_middling(number):
    size = abs(number)
    return size == 0 or size == np.inf or not (size > LARGE or size < 1 / LARGE)


@machinery
def carve_coefficients(room, features, like):
    """Vectors for `fill`, and the room that is left."""
    center, room = carve(room, features, like)
    low, room = carve(room, features, like)
    rest, room = carve(room, features, like)
    scale, room = carve(room, features, like)
    bias, room = carve(room, features, like)
    return (center, low, rest, scale, bias), room


@machinery
def fill(vectors, means, scales, biases):
    """Write every feature's (center, low, rest, scale, bias)."""
    center, low, rest, scale, bias = vectors
    for c in range(means.size):
        mean = means[c]
        center[c] = mean
        left = mean - np.float64(center[c]) if mean != center[c] else 0.0  # also where both are infinite
        low[c] = left
        rest[c] = left - np.float64(low[c])
        scale[c], bias[c] = scales[c], biases[c]


@machinery
def of_features(vectors, first, last):
    """The part of the coefficients that belongs to some features."""
    center, low, rest, scale, bias = vectors
    return center[first:last], low[first:last], rest[first:last], scale[first:last], bias[first:last]


@machinery
def of_line(vectors, row):
    """The numbers of the feature that a line belongs to: one for all lines of the tile, or one for each."""
    center, low, rest, scale, bias = vectors
    c = row if center.size > 1 else 0
    return center[c], low[c], rest[c], scale[c], bias[c]


def _fit_single(mean, bias, scale, common, slope):
    """Whether tiles of float32 do for all features: terms not too large, factors not too small either."""
    fit = True
    for c in range(mean.size):
        fit &= not (LARGE < abs(mean[c]) < np.inf or LARGE < abs(bias[c]) < np.inf)
        fit &= _is_middling(scale[c]) and _is_middling(common[c]) and _is_middling(slope[c])
    return fit


fit_single = Kernel("fit_single", flag(vector, vector, vector, vector, vector), _fit_single)
