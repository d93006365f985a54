"""
One bad batch
=============

A sensor fails once, one batch holds a NaN. An exponential average that takes it in is NaN for ever after. Here the
update is left out, counted, and told.
"""

# %%

import warnings

import numpy as np

import bnarray as bn

rng = np.random.default_rng(0)
stats = bn.RunningStats(2)
for step in range(50):
    x = rng.normal(5, 2, (32, 2))
    if step == 20:
        x[7, 0] = np.nan
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        y = bn.batch_norm(x, stats=stats)
    for warning in caught:
        print(f"step {step}: {warning.message}")

print(stats)
print("mean", stats.mean.round(2), " deviation", np.sqrt(stats.var).round(2))

# %%
# ``nonfinite="raise"`` stops instead, with the state as it was.

stats = bn.RunningStats(2, nonfinite="raise")
try:
    bn.batch_norm(np.full((4, 2), np.inf), stats=stats)
except FloatingPointError as error:
    print(error)
print(stats)
