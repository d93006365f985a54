"""What the command line says of statistics."""

from collections.abc import Sequence
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt

from bnarray.files import Normalized
from bnarray.stats import Moments, RunningStats

_Floats = npt.NDArray[np.float64]

# Features named in a table.
_MOST = 5


def as_stats(moments: Moments) -> RunningStats:
    """Return the population's statistics in the form that is saved: the variance has correction 0."""
    finite = bool(np.isfinite(moments.mean).all() and np.isfinite(moments.m2).all())
    stats = RunningStats(
        moments.mean.shape, update_rate=None, correction=0, nonfinite="skip" if finite else "propagate"
    )
    stats.update(moments)
    return stats


def _table(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def _deviation(moments: Moments) -> _Floats:
    with np.errstate(invalid="ignore"):
        return np.sqrt(np.atleast_1d(np.asarray(moments.var(), np.float64)).ravel())


def _span(values: _Floats) -> str:
    finite = values[np.isfinite(values)]
    return f"{finite.min():.6g} to {finite.max():.6g}" if finite.size else "none"


def of_normalized(done: Normalized | dict[str, Normalized], seconds: float, size: int) -> str:
    """Return a table: features, elements, range of means and deviations before and after, seconds and GB/s."""
    arrays = {"": done} if isinstance(done, Normalized) else done
    lines = []
    for name, (before, after) in arrays.items():
        features = prod(before.mean.shape)
        counted = float(np.sum(before.count)) * (1 if np.ndim(before.count) else features)
        rows = [
            ("", "before", "after"),
            ("means", _span(np.ravel(before.mean)), _span(np.ravel(after.mean))),
            ("deviations", _span(_deviation(before)), _span(_deviation(after))),
        ]
        unfit = int((~np.isfinite(_deviation(before))).sum())
        title = f"{name}: " if name else ""
        note = f", {unfit:,} of them not finite" if unfit else ""
        lines += [f"{title}{features:,} features{note}, {counted:,.12g} elements counted", _table(rows), ""]
    return "\n".join([*lines, f"{seconds:.2f} s, {size / seconds / 1e9:.2f} GB/s of input"])


def _named(index: int, shape: tuple[int, ...]) -> str:
    return ",".join(str(int(i)) for i in np.unravel_index(index, shape)) if shape else "-"


def of_moments(moments: Moments) -> str:
    """Return a table of the widest and narrowest features, and lists of the constant ones and of those with NaN."""
    mean, deviation = np.ravel(np.atleast_1d(moments.mean)), _deviation(moments)
    shape: tuple[int, ...] = tuple(moments.mean.shape)
    count: Any = moments.count
    finite = np.isfinite(deviation)
    order = np.argsort(deviation, kind="stable")
    order = order[finite[order]]
    varied = order[deviation[order] > 0]
    rows = [("", "feature", "mean", "deviation")]
    narrow, wide = varied[:_MOST], varied[max(_MOST, varied.size - _MOST) :][::-1]
    for what, chosen in (("widest", wide), ("narrowest", narrow)):
        rows += [(what, _named(i, shape), f"{mean[i]:.6g}", f"{deviation[i]:.6g}") for i in chosen]

    def listed(indices: npt.NDArray[Any]) -> str:
        some = " ".join(_named(i, shape) for i in indices[: 2 * _MOST])
        return f"{indices.size:,}" + (f": {some}{' ...' if indices.size > 2 * _MOST else ''}" if indices.size else "")

    counted = f"{count:,.12g}" if np.ndim(count) == 0 else f"{np.min(count):,.12g} to {np.max(count):,.12g}"
    return "\n".join(
        [
            f"{mean.size:,} features, {counted} elements in each",
            _table(rows),
            f"constant: {listed(np.flatnonzero(deviation == 0))}",
            f"with NaN or infinity: {listed(np.flatnonzero(~finite))}",
        ]
    )
