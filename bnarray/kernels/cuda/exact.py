"""Sums of float32 numbers, exact but for their last of 48 bits.

A sum is kept in two parts, of which the low one takes what the high one rounds away (Knuth, "The Art of Computer
Programming", volume 2: the error of a sum is itself a float). A thread adds some dozens or hundreds of numbers so; what
threads have found is added in float64. Float64 throughout would be as good, and is as fast where a device does half as
many operations of it as of float32; most do a 32nd or a 64th.
"""

import numpy as np

from bnarray.kernels.cuda.compiled import cuda, machinery

#: From here to the ends of float32 there is room for differences and products. What goes beyond is done in float64.
LARGE = 2.0**100


@machinery
def two_sum(a, b):
    """Return the rounded sum, and its error."""
    total = a + b
    share = total - a
    return total, (a - (total - share)) + (b - share)


@machinery
def add(high, low, value, error):
    """Add a number, and what is known of its own error."""
    total, rest = two_sum(high, value)
    return total, low + (rest + error)


@machinery
def product(a, b):
    """Return the rounded product, and its error."""
    rounded = a * b
    return rounded, cuda.fma(a, b, -rounded)


@machinery
def whole(high, low):
    return np.float64(high) + np.float64(low)


@machinery
def is_middling(value):
    """Whether a factor, or a sum of products, is one that float32 holds with room on both sides."""
    size = abs(value)
    return size == 0.0 or (size > 1 / LARGE and size < LARGE)


@machinery
def is_middling_or_nan(value):
    """... or one that is NaN in any precision, and no reason for other features to be computed in another one."""
    return is_middling(value) or value != value
