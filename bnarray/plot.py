"""`bnarray plot`: saved statistics as a picture."""

import os
from collections.abc import Mapping

import matplotlib
import numpy as np
import numpy.typing as npt

from bnarray.atomic import beside
from bnarray.stats import RunningStats

_Floats = npt.NDArray[np.float64]


def _drift(now: RunningStats, then: RunningStats) -> tuple[_Floats, _Floats]:
    """How far the means have moved, in the first one's deviations, and the ratio of the deviations."""
    before, after = np.sqrt(then.var).ravel(), np.sqrt(now.var).ravel()
    moved = (now.mean - then.mean).ravel()
    still = np.full(moved.shape, np.nan)
    shift = np.divide(moved, before, out=np.where(moved == 0, 0.0, still), where=before > 0)
    return shift, np.divide(after, before, out=np.where(after == before, 1.0, still), where=before > 0)


def draw(statistics: Mapping[str, RunningStats], path: str) -> None:
    """Draw mean and deviation of every feature and, of several, the drift from the first; write a PNG or SVG.

    Raises
    ------
    ValueError
        If the path ends otherwise, or the statistics have different features.
    OSError
        If the file cannot be written.
    """
    kind = os.path.splitext(path)[1]
    if kind not in (".png", ".svg"):
        raise ValueError(f"{path} should end in .png or .svg")
    (first_name, first), *others = statistics.items()
    for name, stats in others:
        if stats.features_shape != first.features_shape:
            raise ValueError(
                f"{name} has features of shape {stats.features_shape}, but {first_name} of shape "
                f"{first.features_shape}; they should be the same"
            )
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 2 if others else 1, figsize=(12 if others else 8, 7), squeeze=False, sharex=True)
    number = np.arange(first.mean.size)
    style = {"marker": ".", "linestyle": "none"} if number.size < 2000 else {"linewidth": 0.5}
    for name, stats in statistics.items():
        axes[0, 0].plot(number, stats.mean.ravel(), label=name, **style)
        axes[1, 0].plot(number, np.sqrt(stats.var).ravel(), label=name, **style)
    axes[0, 0].set(title="Mean")
    axes[1, 0].set(title="Deviation", xlabel="feature")
    for i, (_, stats) in enumerate(others, start=1):  # in the colours that they have on the left
        shift, ratio = _drift(stats, first)
        axes[0, 1].plot(number, shift, color=f"C{i}", **style)
        axes[1, 1].plot(number, ratio, color=f"C{i}", **style)
    if others:
        axes[0, 1].set(title=f"Mean, moved by so many deviations of {first_name}")
        axes[1, 1].set(title=f"Deviation, over that of {first_name}", xlabel="feature")
    axes[0, 0].legend()
    figure.tight_layout()
    with beside(path) as temporary:
        figure.savefig(temporary, format=kind[1:], dpi=110)
    plt.close(figure)
