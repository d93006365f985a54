"""
Why not x·a + b
===============

Normalising is a subtraction, a product and a sum. It is tempting to fold the mean into the shift, y = x·a + b, and
save the subtraction. Far from zero that throws away what the exact statistics had gained.
"""

# %%
# float32 data of deviation 1 round ever larger means, normalised in three ways by the same exact statistics. The truth
# is computed in float64 from the same float32 numbers.

import matplotlib.pyplot as plt
import numpy as np

import bnarray as bn

rng = np.random.default_rng(0)
deviations = rng.normal(size=100_000)
means = 10.0 ** np.arange(0, 7)
errors = {"x·a + b": [], "(x − mean)·a + b, mean in float32": [], "bnarray": []}
for mean in means:
    x = (mean + deviations).astype(np.float32)
    m = bn.moments(x, axis=())
    invstd = 1 / np.sqrt(m.var() + 1e-5)
    truth = (x.astype(np.float64) - m.mean) * invstd
    ways = (
        x * np.float32(invstd) + np.float32(-m.mean * invstd),
        (x - np.float32(m.mean)) * np.float32(invstd),
        bn.batch_norm(x, axis=()),
    )
    for found, y in zip(errors.values(), ways, strict=True):
        found.append(abs(y - truth).max())

# %%
print(f"{'mean':>6}   " + "   ".join(errors) + "   (largest error of an output)")
for mean, *each in zip(means, *errors.values(), strict=True):
    print(f"{mean:6.0e}   {each[0]:7.0e}   {each[1]:33.0e}   {each[2]:7.0e}")

# %%
# Outputs are about as large as 4. The best that float32 can do for them is an error of some 10⁻⁷, at any mean.

figure, axis = plt.subplots()
for (name, found), style in zip(errors.items(), ("o-", "s-", "^-"), strict=True):
    axis.plot(means, found, style, label=name)
axis.set(xscale="log", yscale="log", xlabel="mean, in deviations", ylabel="largest error", ylim=(1e-8, 1e3))
axis.set_title("Error of a normalised value, by the size of the mean")
_ = axis.legend(loc="upper left")
