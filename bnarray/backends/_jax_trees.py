"""Statistics as JAX's trees of arrays, so that they pass in and out of `jax.jit` and all the others.

Loaded with the first JAX array, and whenever statistics are made in a process that has imported JAX: state that is
older than `import jax` needs one or the other before its first `jax.jit`.
"""

from typing import Any

import jax
import numpy as np

from bnarray.dispatch import Array, backend
from bnarray.stats import Count, Moments, RunningStats, _State, is_number


def _spread(count: Count, mean: Array) -> Count:
    """The count of every feature: one number would become an array only after the first masked batch, and a loop's
    state may not change its form."""
    if not hasattr(mean, "shape"):
        return count
    if is_number(count):
        return np.full(mean.shape, count, mean.dtype)  # NumPy's, because one of JAX's takes 50 µs to make
    if getattr(count, "shape", None) == ():
        return backend(mean).zeros(tuple(mean.shape), mean) + count
    return count


def _leaves_of_moments(moments: Moments) -> tuple[tuple[Any, ...], None]:
    return (_spread(moments.count, moments.mean), moments.mean, moments.m2), None


def _moments_of(_: None, leaves: Any) -> Moments:
    moments = Moments.__new__(Moments)
    moments._set(*leaves)
    return moments


def _leaves_of_stats(stats: RunningStats) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    count, mean, *rest = stats.state
    return (_spread(count, mean), mean, *rest), stats.settings


def _stats_of(settings: tuple[Any, ...], leaves: Any) -> RunningStats:
    stats = RunningStats.__new__(RunningStats)
    stats._shape, stats._update_rate, stats._correction, stats._nonfinite = settings
    stats._state = _State(*leaves)
    stats.register()
    return stats


jax.tree_util.register_pytree_node(Moments, _leaves_of_moments, _moments_of)
jax.tree_util.register_pytree_node(RunningStats, _leaves_of_stats, _stats_of)
