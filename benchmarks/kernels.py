"""Each CPU kernel by itself: time, and bytes per second of the traffic that its file counts.

Run as ``python -m benchmarks.kernels``. Arrays of 25 MB (float32), larger than the nearer caches; the copy of one in
the same rounds is the yardstick. Medians. What it needs is imported late: asv imports this file under old commits.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np

LAYOUTS = {
    "channels first": ((32, 64, 56, 56), (1,)),
    "many channels first": ((8, 256, 56, 56), (1,)),  # x and dy of a feature stay in cache
    "short rows": ((32, 1024, 14, 14), (1,)),
    "channels last": ((32, 56, 56, 64), (3,)),
}


def kernels(shape: tuple[int, ...], kept: tuple[int, ...], dtype: Any) -> dict[str, tuple[int, Callable[[], Any]]]:
    """By file name, the passes over x that it counts, and a call of it."""
    from bnarray.backends import _strided
    from bnarray.backends import numpy as verbs
    from bnarray.dispatch import Transform

    rng = np.random.default_rng(0)
    x, dy = (rng.normal(size=shape).astype(np.float32).astype(dtype) for _ in range(2))
    y = np.empty_like(verbs.check(x, "x"))
    features = shape[kept[0]]
    count = x.size // features
    mean, m2 = np.zeros(features), np.full(features, float(count))
    transform = Transform(kept, count, mean, m2, 0.0, None, None, False, None)
    sums = verbs.grad_sums(dy, x, transform)
    of_x, of_y = verbs._memory(x), verbs._memory(y)
    return {
        "copy": (2, lambda: np.copyto(y, x)),
        "moments": (1, lambda: verbs.moments(x, kept, None)),
        "normalize": (2, lambda: verbs.normalize(x, transform, y)),
        "forward": (2, lambda: _strided.find_and_write(of_x, kept, 0.0, None, None, False, of_y)),
        "grad_sums": (2, lambda: verbs.grad_sums(dy, x, transform)),
        "grad_input": (3, lambda: verbs.grad_input(dy, x, transform, None, sums, y)),
        "backward": (3, lambda: _strided.find_and_write_gradient(verbs._memory(dy), of_x, transform, of_y)),
    }


def main() -> None:
    import ml_dtypes

    from bnarray.kernels.cpu.pool import threads

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    print(f"{threads()} threads\n\n| layout | dtype | kernel | ms | GB/s |\n|---|---|---|---|---|")
    for layout, (shape, kept) in LAYOUTS.items():
        for dtype in (np.float32, ml_dtypes.bfloat16):
            timed = kernels(shape, kept, dtype)
            size = np.prod(shape) * np.dtype(dtype).itemsize
            seconds: dict[str, list[float]] = {name: [] for name in timed}
            timed = {name: each for name, each in timed.items() if name == "copy" or each[1]() is not None}
            for _ in range(options.rounds):
                for name, (_, call) in timed.items():
                    begin = time.perf_counter()
                    call()
                    seconds[name].append(time.perf_counter() - begin)
            for name, (passes, _) in timed.items():
                median = statistics.median(seconds[name])
                speed = passes * size / median / 1e9
                print(f"| {layout} | {np.dtype(dtype)} | {name} | {1e3 * median:.2f} | {speed:.1f} |", flush=True)


if __name__ == "__main__":
    main()
