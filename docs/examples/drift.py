"""
Files, and whether the data has moved
=====================================

Files of any size are normalised a block at a time. The statistics of the training data are kept; months later they tell
by how much new data differs.
"""

# %%
# Training data in a file. It is read twice and written once, never as a whole in memory.

import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

import bnarray as bn

folder = Path(tempfile.mkdtemp())
rng = np.random.default_rng(0)
np.save(folder / "train.npy", rng.normal(np.linspace(-3, 3, 30), 1.5, (20_000, 30)).astype(np.float32))
before, after = bn.normalize_file(folder / "train.npy", folder / "train-n.npy")
print(f"means {before.mean.min():.2f} to {before.mean.max():.2f} before, at most {abs(after.mean).max():.0e} after")

# %%
# The statistics, kept: everything seen so far, exact.

stats = bn.RunningStats(30, update_rate=None, correction=0)
stats.update(before)
stats.save(folder / "train-stats.npz")

# %%
# New data, in two files. Two sensors have changed.

new = rng.normal(np.linspace(-3, 3, 30), 1.5, (5_000, 30)).astype(np.float32)
new[:, 7] += 2
new[:, 21] *= 1.5
np.save(folder / "monday.npy", new[:3000])
np.save(folder / "tuesday.npy", new[3000:])
then = bn.RunningStats.load(folder / "train-stats.npz")
now = bn.file_moments([folder / "monday.npy", folder / "tuesday.npy"])

moved = (now.mean - then.mean) / np.sqrt(then.var)
wider = np.sqrt(now.var() / then.var)
print("moved by more than half a deviation:", np.flatnonzero(abs(moved) > 0.5))
print("deviation changed by more than a quarter:", np.flatnonzero(abs(wider - 1) > 0.25))

# %%
figure, axes = plt.subplots(2, 1, figsize=(5.4, 4.2), sharex=True)
axes[0].plot(moved, "o")
axes[0].set(title="Mean, moved by so many deviations")
axes[1].plot(wider, "o", color="C1")
_ = axes[1].set(title="Deviation, over that in training", xlabel="feature")

# %%
# From the shell the same is ``bnarray stats monday.npy tuesday.npy --out new-stats.npz`` and ``bnarray plot
# train-stats.npz new-stats.npz --out drift.svg``.
