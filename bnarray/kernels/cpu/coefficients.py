"""What an element is shifted and scaled by, in the precision that its loop computes in::

    z = (x − mean) · scale + bias = (x − center) · scale + shift        shift = bias − (mean − center) · scale

The center is the mean, rounded to the loop's precision: x − center is exact next to it. What that leaves of the mean is
part of the shift, which is computed in float64 and rounded once. The two terms do not cancel: x − center is either 0 or
at least twice what is left of the mean, which is at most half of the distance from the center to the next number.
"""

import math

import numpy as np

from bnarray.kernels.cpu.compiled import machinery, number, vector
from bnarray.kernels.cpu.memory import carve

#: From here to the ends of float32 there is room for differences and products. Beyond it tiles of float64 are used.
LARGE = 2.0**100

#: How many numbers a feature has: center, scale, shift, and (float64 always) invstd, which takes longest to find.
VECTORS = 4

#: What `fill` takes after the first: the count of all features, the counts of each, mean, m2, eps, weight and bias.
#: What there is none of (counts, weight, bias) is empty.
STATISTICS = (number, vector, vector, vector, number, vector, vector)


@machinery
def is_small(term):
    """Whether float32 holds a term with room above; it holds infinity and NaN."""
    return not LARGE < abs(term) < np.inf


@machinery
def is_middling(factor):
    """Whether float32 holds a factor with room on both sides; NaN is held."""
    size = abs(factor)
    return size == 0 or not (size > LARGE or size < 1 / LARGE)


@machinery
def quiet(value):
    """The value; instead of any NaN the usual one, whose lower half is 0 (as `narrow` wants it)."""
    return value if value == value else np.nan


@machinery
def count_of(c, count, counts):
    return counts[c] if counts.size else count


@machinery
def invstd_of(count, m2, eps):
    """invstd = 1 / √(m2 / count + eps) = √(count / (m2 + count · eps)); 0 where the root is 0; the variance of nothing
    counts as 1. (Of two divisions and a root, which are most of the work where features have few values, one less.)"""
    if count == 0:
        count, m2 = 1.0, 1.0
    spread = m2 + count * eps
    return math.sqrt(count / spread) if spread != 0 else 0.0


@machinery
def carve_coefficients(room, features, like):
    """Vectors for `fill`, and the room that is left."""
    center, room = carve(room, features, like)
    scale, room = carve(room, features, like)
    shift, room = carve(room, features, like)
    invstd, room = carve(room, features, 0.0)
    return (center, scale, shift, invstd), room


@machinery
def fill(vectors, count, counts, mean, m2, eps, weight, bias):
    """Write every feature's (center, scale, shift, invstd). Return whether tiles of float32 do for all of them: terms
    not too large (a bad value of one feature is not to change the others' bits), factors not too small either."""
    center, scale, shift, invstd = vectors
    fit = True
    for c in range(mean.size):
        invstd[c] = factor = invstd_of(count_of(c, count, counts), m2[c], eps)
        if weight.size:
            factor *= weight[c]
        term = bias[c] if bias.size else 0.0
        center[c] = quiet(mean[c])
        if mean[c] != center[c]:
            term -= (mean[c] - center[c]) * factor
        scale[c], shift[c] = quiet(factor), quiet(term)
        fit &= is_small(mean[c]) and is_small(term) and is_middling(factor)
    return fit


@machinery
def repeat(vectors, features):
    """Write what vectors begin with, of all features, again and again up to their ends."""
    for numbers in vectors:
        for c in range(features, numbers.size):
            numbers[c] = numbers[c - features]


@machinery
def of_features(vectors, first, last):
    """The center, scale and shift of some features."""
    center, scale, shift, _ = vectors
    return center[first:last], scale[first:last], shift[first:last]


@machinery
def of_line(vectors, row):
    """The numbers of the feature that a line belongs to: one for all lines of the tile, or one for each."""
    center, scale, shift = vectors[0], vectors[1], vectors[2]
    c = row if center.size > 1 else 0
    return center[c], scale[c], shift[c]
