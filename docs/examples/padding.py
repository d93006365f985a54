"""
Sequences with padding
======================

Sequences of different lengths lie in one array, filled up with zeros. The zeros are no data: ``where`` leaves them out
of the statistics.
"""

# %%

import matplotlib.pyplot as plt
import numpy as np

import bnarray as bn

rng = np.random.default_rng(0)
lengths = rng.integers(3, 40, size=32)
where = np.arange(40) < lengths[:, None]  # (sequence, time)
x = np.where(where[..., None], rng.normal(5, 2, (32, 40, 3)), 0)  # (sequence, time, feature)

# %%
# Without the mask, the mean is drawn towards the padding, and what counts is not normalised.

plain = bn.batch_norm(x, axis=-1)
masked = bn.batch_norm(x, axis=-1, where=where[..., None])
for name, y in (("without", plain), ("with", masked)):
    print(f"{name:8} where: mean {y[where].mean():6.3f}, deviation {y[where].std():.3f} of the elements that count")

# %%
# Elements that do not count may be anything, NaN too. They are not in the statistics, so nothing flows back to them
# from the other outputs.

x[~where] = np.nan
_, saved = bn.batch_norm_forward(x, axis=-1, where=where[..., None])
dx = bn.batch_norm_backward(np.where(where[..., None], 1.0, 0.0) * rng.normal(size=x.shape), saved).x
print("gradients are finite:", bool(np.isfinite(dx).all()), " and zero at the padding:", bool((dx[~where] == 0).all()))

# %%
# Floating weights ``>= 0`` are possible as well: a value of weight 2 counts as if it were there twice.

twice = bn.moments(np.array([[1.0], [4.0]]), where=np.array([[1.0], [2.0]]))
print(twice.mean, bn.moments(np.array([[1.0], [4.0], [4.0]])).mean)

# %%
figure, axis = plt.subplots(figsize=(5.4, 2.8))
bins = np.linspace(-3, 3, 40)
axis.hist(plain[where].ravel(), bins, alpha=0.6, label="without where")
axis.hist(masked[where].ravel(), bins, alpha=0.6, label="with where")
axis.set(xlabel="normalised value", ylabel="elements", title="The elements that count")
_ = axis.legend()
