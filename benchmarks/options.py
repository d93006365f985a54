"""What each option of a call adds to its time, beside the bytes that it adds: ``python -m benchmarks.options``.

`where` as a mask, as a mask of rows that are padded, and as weights; ReLU; a residual. Each as a multiple of the plain
call's time, with `out=`, medians of interleaved rounds; and the bytes that have to move with it over those without.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np

import bnarray as bn
from bnarray.kernels.cpu.pool import threads

SHAPE = (32, 64, 56, 56)
DTYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16}
FORWARD, BACKWARD = 3, 5  # passes over arrays of x's size


def options(array: Callable[[Any], Any], x: Any) -> dict[str, tuple[dict[str, Any], int, int]]:
    """By name: arguments, and the bytes that they add forwards and backwards."""
    rng = np.random.default_rng(1)
    mask, weights = array(rng.random(SHAPE) < 0.7), array(rng.random(SHAPE))
    padded = np.arange(SHAPE[3]) < rng.integers(SHAPE[3] // 2, SHAPE[3], (SHAPE[0], 1, SHAPE[2], 1))
    residual, single = array(rng.normal(size=SHAPE).astype(x.dtype)), weights.astype(np.float32)
    return {
        "where, mask": ({"where": mask}, mask.nbytes, mask.nbytes),
        "where, padded rows": ({"where": padded}, padded.nbytes, padded.nbytes),
        "where, float32 weights": ({"where": single}, single.nbytes, single.nbytes),
        "where, float64 weights": ({"where": weights}, weights.nbytes, weights.nbytes),
        "ReLU": ({"activation": "relu"}, 0, 0),
        "residual": ({"residual": residual}, x.nbytes, 0),
        "residual and ReLU": ({"residual": residual, "activation": "relu"}, x.nbytes, 3 * x.nbytes),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    rounds = range(parser.parse_args().rounds)
    print(f"{SHAPE}, {threads()} threads; time with it / without it (bytes with it / without it)\n")
    print("| layout | dtype | option | forward | backward |\n|---|---|---|---|---|")
    for layout in ("channels first", "channels last"):
        for name, dtype in DTYPES.items():

            def array(values: Any, order: str = layout) -> Any:
                if order == "channels first":
                    return np.ascontiguousarray(values)
                return np.moveaxis(np.ascontiguousarray(np.moveaxis(values, 1, -1)), -1, 1)

            rng = np.random.default_rng(0)
            x, dy = (array(rng.normal(size=SHAPE).astype(dtype)) for _ in range(2))
            y, dx = np.empty_like(x), np.empty_like(x)
            calls: dict[tuple[str, str], Callable[[], Any]] = {}
            table = {"plain": ({}, 0, 0), **options(array, x)}
            for option, (arguments, *_) in table.items():
                _, saved = bn.batch_norm_forward(x, **arguments)
                calls[option, "forward"] = lambda given=arguments, x=x, y=y: bn.batch_norm(x, out=y, **given)
                calls[option, "backward"] = lambda saved=saved, dy=dy, dx=dx: bn.batch_norm_backward(dy, saved, out=dx)
            seconds: dict[tuple[str, str], list[float]] = {key: [] for key in calls}
            for _ in rounds:
                for key, call in calls.items():
                    begin = time.perf_counter()
                    call()
                    seconds[key].append(time.perf_counter() - begin)
            median = {key: statistics.median(each) for key, each in seconds.items()}
            for option, (_, *added) in table.items():
                cells = []
                for step, passes, extra in zip(("forward", "backward"), (FORWARD, BACKWARD), added, strict=True):
                    ratio = median[option, step] / median["plain", step]
                    cells.append(f"{ratio:.2f} ({1 + extra / (passes * x.nbytes):.2f})")
                if option == "plain":
                    cells = [f"{1e3 * median[option, step]:.2f} ms" for step in ("forward", "backward")]
                print(f"| {layout} | {name} | {option} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
