"""
How noisy a small batch is
==========================

In training, a feature is normalised by the mean and variance of the few examples beside it. The smaller the batch, the
more these differ from the population's, which evaluation uses: training adds noise, and evaluates a slightly different
network than it trained.
"""

# %%
# Many batches of each size, from one population of mean 0 and deviation 1: how far off are their statistics?

import matplotlib.pyplot as plt
import numpy as np

import bnarray as bn

rng = np.random.default_rng(0)
sizes = [2, 4, 8, 16, 32, 64, 128, 256]
mean_error, deviation_error = [], []
for size in sizes:
    batches = rng.normal(size=(size, 4000))  # 4000 features: as many batches of one
    m = bn.moments(batches)
    mean_error.append(np.sqrt((m.mean**2).mean()))
    deviation_error.append(np.sqrt(((np.sqrt(m.var()) - 1) ** 2).mean()))
for size, of_mean, of_deviation in zip(sizes, mean_error, deviation_error, strict=True):
    print(f"batches of {size:3}: mean off by {of_mean:.2f}, deviation off by {of_deviation:.2f} (root mean square)")

# %%
# Both fall as one over the square root of the size. At batches of 2 every feature comes out as −1 and 1, whatever went
# in: all that is left of an example is whether it was the larger one.

print(bn.batch_norm(np.array([[3.0, 1.0], [3.1, 1000.0]]), eps=0.0))

# %%
figure, axis = plt.subplots(figsize=(5.4, 2.8))
axis.plot(sizes, mean_error, "o-", label="mean")
axis.plot(sizes, deviation_error, "s-", label="deviation")
axis.plot(sizes, 1 / np.sqrt(sizes), ":", color="#888888", label="one over the square root")
axis.set(xscale="log", yscale="log", xlabel="examples in the batch", ylabel="off by (deviations)")
axis.set_xticks(sizes, labels=sizes)
axis.set_yticks([0.05, 0.1, 0.2, 0.5], labels=["0.05", "0.1", "0.2", "0.5"])
axis.minorticks_off()
axis.set_title("Noise of a batch's statistics")
_ = axis.legend()
