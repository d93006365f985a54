r"""
Why not E[x²] − E[x]²
=====================

One pass, two sums: the textbook's way to a variance is quick, and wrong as soon as the mean is large beside the
deviation. What is left of two large numbers after subtraction is mostly their rounding.
"""

# %%
# Data of deviation 1 round ever larger means, in float32. The truth is the variance of the same float32 numbers, in
# float64 and in two passes.

import matplotlib.pyplot as plt
import numpy as np

import bnarray as bn


def textbook(x):
    """One pass: E[x²] − E[x]², in x's precision."""
    return (x * x).mean() - x.mean() ** 2


def two_passes(x):
    """E[(x − E[x])²], in x's precision."""
    return ((x - x.mean()) ** 2).mean()


def ours(x):
    return bn.moments(x, axis=()).var()


rng = np.random.default_rng(0)
deviations = rng.normal(size=100_000)
means = 10.0 ** np.arange(0, 7.5, 0.5)
errors = {textbook: [], two_passes: [], ours: []}
for mean in means:
    x = (mean + deviations).astype(np.float32)
    wide = x.astype(np.float64)
    truth = ((wide - wide.mean()) ** 2).mean()
    for way, found in errors.items():
        found.append(abs(float(way(x)) - truth) / truth)

# %%
# At mean 10² the textbook's variance has lost half of its digits, at 10⁴ all of them; at some means it is zero or
# negative. Two passes in float32 lose digits where the mean, which is rounded to float32, is off by a good part of a
# deviation.

print(f"{'mean':>8} {'E[x²] − E[x]²':>14} {'two passes':>11} {'bnarray':>9}   relative error of the variance")
for mean, *each in zip(means[::2], *(found[::2] for found in errors.values()), strict=True):
    print(f"{mean:8.0e} {each[0]:14.0e} {each[1]:11.0e} {each[2]:9.0e}")

# %%
figure, axis = plt.subplots()
names = ("E[x²] − E[x]², float32", "two passes, float32", "bnarray, of the same float32 data")
for found, name, style in zip(errors.values(), names, ("o-", "s-", "^-"), strict=True):
    axis.plot(means, np.maximum(found, 1e-17), style, label=name)
axis.axhline(1, color="#888888", linewidth=0.8)
axis.set(xscale="log", yscale="log", xlabel="mean, in deviations", ylabel="relative error", ylim=(1e-17, 1e9))
axis.set_title("Error of a variance, by the size of the mean")
_ = axis.legend(loc="upper left")
