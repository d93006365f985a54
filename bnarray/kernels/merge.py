"""The union of two samples, written once: for threads, tiles, chunks, processes and running statistics."""

# The smallest normal number: absorbed by every sum of weights that is not itself next to it, it turns 0/0 into 0.
NOTHING = 2.0**-1022


def merge(count_a, mean_a, m2_a, count_b, mean_b, m2_b):
    """Return (count, mean, m2) of the union of two samples.

    In operators only, so that it serves scalars inside a kernel as well as arrays of any library. Chan, Golub and
    LeVeque, "Updating formulae and a pairwise algorithm for computing sample variances" (1979):
    ``m2 = m2_a + m2_b + (mean_b - mean_a)² · count_a · count_b / count``. The factors of the last term are ordered so
    that an empty sample adds exactly nothing, however large the other's mean.
    """
    count = count_a + count_b
    share = count_b / (count + NOTHING)
    delta = mean_b - mean_a
    return count, mean_a + delta * share, m2_a + m2_b + (delta * count_a) * (delta * share)
