"""
The five steps, one at a time
=============================

The whole algorithm in five lines of NumPy, and the one call that does the same.
"""

# %%
# **1. A batch comes in**: 200 examples of two features, far from zero, of different spread, and correlated.

import matplotlib.pyplot as plt
import numpy as np

import bnarray as bn

rng = np.random.default_rng(0)
x = rng.normal(size=(200, 2)) @ [[3.0, 0.5], [0.0, 0.5]] + [10.0, 4.0]

# %%
# **2. Mean and variance** of each feature, over the batch.

mean = x.mean(axis=0)
var = ((x - mean) ** 2).mean(axis=0)
print("mean", mean.round(2), " deviation", np.sqrt(var).round(2))

# %%
# **3. Normalise.** ``eps`` keeps the division defined where a feature does not vary.

eps = 1e-5
x_hat = (x - mean) / np.sqrt(var + eps)

# %%
# **4. Scale and shift** by the learned weight γ and bias β. **5.** Hand on to the next layer.

weight, bias = np.array([2.0, 0.5]), np.array([1.0, -1.0])
y = x_hat * weight + bias

# %%
# The same by one call. (To rounding: the library computes the mean in a better order.)

print(abs(bn.batch_norm(x, weight, bias) - y).max() < 1e-14)

# %%
# Normalising moves and stretches the cloud along the axes. It does not turn it: the two features are as correlated
# afterwards as they were before.

figure, axes = plt.subplots(figsize=(5.4, 3.4))
for name, cloud in (("x: as it comes in", x), ("normalised: mean 0, deviation 1", x_hat), ("y: scaled, shifted", y)):
    correlation = np.corrcoef(cloud.T)[0, 1]
    axes.plot(*cloud.T, ".", alpha=0.7, label=f"{name} (correlation {correlation:.2f})")
axes.axhline(0, color="#888888", linewidth=0.6)
axes.axvline(0, color="#888888", linewidth=0.6)
axes.set(xlabel="first feature", ylabel="second feature", title="A batch before and after", ylim=(-4, 13))
_ = axes.legend(loc="upper left")
