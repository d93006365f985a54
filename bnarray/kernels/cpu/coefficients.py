"""What an element is shifted and scaled by, in the precision that its loop computes in.

The mean comes in three parts, so that loops over float32 data can subtract it in float32: x − center is exact next to
the mean, what is left of the mean then too, and `rest` makes the difference as exact as the float64 mean is. (Two parts
hold a mean of 10⁶ to 10⁻⁹, which is 30 ulp of a result of 4·10⁻⁴.) In float64 the other parts are 0.
"""

import math

import numpy as np

from bnarray.kernels.cpu.compiled import machinery, number, vector
from bnarray.kernels.cpu.memory import carve

#: From here to the ends of float32 there is room for differences and products. Beyond it tiles of float64 are used.
LARGE = 2.0**100

#: How many numbers a feature has: center, low, rest, scale, bias.
VECTORS = 5

#: What `fill` takes after the first: the count of all features, the counts of each, mean, m2, eps, weight and bias.
#: What there is none of (counts, weight, bias) is empty.
STATISTICS = (number, vector, vector, vector, number, vector, vector)


@machinery
def is_middling(value):
    """Whether float32 holds a factor with room on both sides."""
    size = abs(value)
    return size == 0 or size == np.inf or not (size > LARGE or size < 1 / LARGE)


@machinery
def count_of(c, count, counts):
    return counts[c] if counts.size else count


@machinery
def invstd_of(count, m2, eps):
    """invstd = 1 / √(m2 / count + eps); 0 where the root is 0; the variance of nothing counts as 1"""
    root = math.sqrt((m2 / count if count != 0 else 1.0) + eps)
    return 1 / root if root != 0 else 0.0


@machinery
def carve_coefficients(room, features, like):
    """Vectors for `fill`, and the room that is left."""
    center, room = carve(room, features, like)
    low, room = carve(room, features, like)
    rest, room = carve(room, features, like)
    scale, room = carve(room, features, like)
    shift, room = carve(room, features, like)
    return (center, low, rest, scale, shift), room


@machinery
def fill(vectors, count, counts, mean, m2, eps, weight, bias):
    """Write every feature's (center, low, rest, scale, bias); return whether tiles of float32 do for all of them:
    terms not too large, factors not too small either."""
    center, low, rest, scale, shift = vectors
    fit = True
    for c in range(mean.size):
        factor = invstd_of(count_of(c, count, counts), m2[c], eps)
        if weight.size:
            factor *= weight[c]
        term = bias[c] if bias.size else 0.0
        center[c] = mean[c]
        left = mean[c] - np.float64(center[c]) if mean[c] != center[c] else 0.0  # also where both are infinite
        low[c] = left
        rest[c] = left - np.float64(low[c])
        scale[c], shift[c] = factor, term
        fit &= not (LARGE < abs(mean[c]) < np.inf or LARGE < abs(term) < np.inf) and is_middling(factor)
    return fit


@machinery
def of_features(vectors, first, last):
    """The part of the coefficients that belongs to some features."""
    center, low, rest, scale, shift = vectors
    return center[first:last], low[first:last], rest[first:last], scale[first:last], shift[first:last]


@machinery
def of_line(vectors, row):
    """The numbers of the feature that a line belongs to: one for all lines of the tile, or one for each."""
    center, low, rest, scale, shift = vectors
    c = row if center.size > 1 else 0
    return center[c], low[c], rest[c], scale[c], shift[c]
