"""
Statistics of pieces
====================

Data that comes in pieces (chunks of a file, threads, machines, days) has one mean and one variance. They follow exactly
from each piece's count, mean and sum of squared deviations, and from nothing less.
"""

# %%
# Ten days of measurements. Each day has its own level, and some have many more values than others.

import matplotlib.pyplot as plt
import numpy as np

import bnarray as bn

rng = np.random.default_rng(0)
sizes = rng.integers(5, 500, size=10)
days = [rng.normal(level, 1.0, (size, 1)) for level, size in zip(rng.normal(0, 5, 10), sizes, strict=True)]
whole = np.concatenate(days)

# %%
# **The exact union**: ``+`` of two :class:`~bnarray.Moments`. The order does not matter beyond rounding.

samples = [bn.moments(day) for day in days]
exact = bn.Moments.merge_all(samples)
backwards = bn.Moments.merge_all(reversed(samples))
print(f"all at once {whole.var():.12f}")
print(f"day by day  {exact.var()[0]:.12f}")
print(f"backwards   {backwards.var()[0]:.12f}")

# %%
# **The average of the days' variances** is something else: it never sees how far the days are apart. Neither does an
# exponential average of them, which is what networks keep while they train, and which forgets besides.

average = np.mean([sample.var() for sample in samples])
running = bn.RunningStats(1, correction=0)
cumulative = bn.RunningStats(1, correction=0, update_rate=None)
seen = []
for sample in samples:
    running.update(sample)
    cumulative.update(sample)
    seen.append((running.var[0], cumulative.var[0]))
print(f"average of the days' variances {average:.3f}")

# %%
figure, axis = plt.subplots()
number = np.arange(1, 11)
axis.plot(number, [each[1] for each in seen], "o-", label="update_rate=None: exact")
axis.plot(number, [each[0] for each in seen], "s-", label="update_rate=0.1: exponential average")
axis.plot(number, np.cumsum([s.var()[0] for s in samples]) / number, "^-", label="average of variances")
axis.axhline(whole.var(), color="#888888", linewidth=0.8)
axis.set(xlabel="days seen", ylabel="variance", ylim=(0, None), title="Running variance; the line is the truth")
_ = axis.legend(loc=(0.42, 0.15))
