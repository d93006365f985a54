"""What float64 arithmetic costs on float32 data, on one core: ``python -m benchmarks.arithmetic``.

The loops of a tile's sums and of normalisation in either precision, in turn, medians; and how far off a float32 sum of
equal squares is. It is why the CPU kernels sum in float64.
"""

import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from numba import njit

TILE = 4096
_sums = njit(fastmath={"reassoc", "nsz", "contract"}, error_model="numpy", nogil=True)
_maps = njit(fastmath={"contract"}, error_model="numpy", nogil=True)


@_sums
def squares(x, zero):  # type: ignore[no-untyped-def]
    """Σ (x − mean)², tile by tile, in the precision of zero."""
    kind, total = type(zero), 0.0
    for first in range(0, x.size, TILE):
        tile = x[first : first + TILE]
        center, m2 = zero, zero
        for i in range(tile.size):
            center += kind(tile[i])
        center /= kind(tile.size)
        for i in range(tile.size):
            deviation = kind(tile[i]) - center
            m2 += deviation * deviation
        total += m2
    return total


@_maps
def affine(x, y, mean, scale, bias):  # type: ignore[no-untyped-def]
    """y = (x − mean) · scale + bias, in the precision of the factors."""
    for i in range(x.size):
        y[i] = (x[i] - mean) * scale + bias


def medians(calls: dict[str, Callable[[], Any]], seconds: float = 0.5) -> dict[str, float]:
    """Return the median time of each call in µs, in turn."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    end = time.perf_counter() + seconds * len(calls)
    while time.perf_counter() < end:
        for name, call in calls.items():
            begin = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - begin)
    return {name: 1e6 * statistics.median(each) for name, each in times.items()}


def main() -> None:
    single, double = np.float32, np.float64
    print("| elements | sums, float32 µs | sums, float64 µs | affine, float32 µs | affine, float64 µs | copy µs |")
    print("|---|---|---|---|---|---|")
    for size in (1 << 18, 1 << 22, 1 << 25):
        x = np.random.default_rng(0).normal(size=size).astype(single)
        y = np.empty_like(x)
        us = medians(
            {
                "s": lambda x=x: squares(x, single(0)),
                "d": lambda x=x: squares(x, double(0)),
                "as": lambda x=x, y=y: affine(x, y, single(1), single(2), single(0.3)),
                "ad": lambda x=x, y=y: affine(x, y, double(1), double(2), double(0.3)),
                "copy": lambda x=x, y=y: np.copyto(y, x),
            }
        )
        print(f"| {size} | " + " | ".join(f"{each:.0f}" for each in us.values()) + " |", flush=True)
    square = single(1.4536341) ** 2
    for kind in (single, double):
        error = np.cumsum(np.full(1024, square), dtype=kind)[-1] / (1024 * double(square)) - 1
        print(f"1024 equal squares added in order, as down a column, {kind.__name__}: off by {abs(error):.1e}")


if __name__ == "__main__":
    main()
