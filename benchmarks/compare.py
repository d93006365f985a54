"""How long a call takes beside torch, the NumPy formula and a plain copy: ``python -m benchmarks.compare``.

One process, the contenders in turn round by round, medians; each side allocates its output, and has the same number of
threads. Answers are compared before they are timed.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import numba
import numpy as np
import torch

import bnarray as bn

SHAPES = [(32, 64), (256, 1024), (4096, 512), (8, 16, 8, 8), (32, 64, 56, 56), (32, 256, 14, 14), (64, 3, 224, 224)]
EPS = 1e-5


def formula(x: np.ndarray, axes: tuple[int, ...]) -> np.ndarray:
    """The textbook in NumPy, in x's dtype."""
    mean = x.mean(axis=axes, keepdims=True)
    return (x - mean) / np.sqrt(x.var(axis=axes, keepdims=True) + EPS)


def contenders(shape: tuple[int, ...], channels_last: bool, step: str) -> dict[str, Callable[[], Any]]:
    """Return a function for each contender, which returns what it computed."""
    rng = np.random.default_rng(0)
    x = rng.normal(2, 3, shape).astype(np.float32)
    dy = rng.normal(size=shape).astype(np.float32)
    if channels_last:
        x, dy = (np.moveaxis(np.ascontiguousarray(np.moveaxis(each, 1, -1)), -1, 1) for each in (x, dy))
    weight, bias = rng.normal(size=(2, shape[1])).astype(np.float32)
    axes = tuple(i for i in range(len(shape)) if i != 1)
    tx, tdy, tw, tb = (torch.from_numpy(each) for each in (x, dy, weight, bias))
    stats = bn.RunningStats(shape[1])
    mean, var = torch.zeros(shape[1]), torch.ones(shape[1])
    if step == "backward":
        _, saved = bn.batch_norm_forward(x, weight, bias)
        leaves = [each.clone().requires_grad_() for each in (tx, tw, tb)]
        ty = torch.nn.functional.batch_norm(leaves[0], None, None, leaves[1], leaves[2], training=True)
        return {
            "bnarray": lambda: bn.batch_norm_backward(dy, saved)[0],
            "torch": lambda: torch.autograd.grad(ty, leaves, tdy, retain_graph=True)[0].numpy(),
            "copy": lambda: x.copy(order="K"),
        }
    training = step == "training"

    def ours() -> np.ndarray:
        return bn.batch_norm(x, weight, bias, stats=stats, training=training)

    def theirs() -> np.ndarray:
        return torch.nn.functional.batch_norm(tx, mean, var, tw, tb, training=training).numpy()

    timed: dict[str, Callable[[], Any]] = {"bnarray": ours, "torch": theirs}
    if training:
        timed["formula"] = lambda: formula(x, axes)
    return timed | {"copy": lambda: x.copy(order="K")}


def measure(timed: dict[str, Callable[[], Any]], seconds: float) -> dict[str, float]:
    """Return the median time of each contender in µs, after checking that ours and torch's answers agree.

    Loosely: torch's float32 sums leave errors of 1e-2 in a feature of three million values (channels last).
    """
    np.testing.assert_allclose(timed["bnarray"](), timed["torch"](), rtol=2e-2, atol=2e-2)
    times: dict[str, list[float]] = {name: [] for name in timed}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times["bnarray"]) < 5:
        for name, call in timed.items():
            begin = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - begin)
    return {name: 1e6 * statistics.median(each) for name, each in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=1.0, help="for each row (default 1)")
    parser.add_argument("--threads", type=int, nargs="*", default=[1, 2])
    parser.add_argument("--json", metavar="FILE", help="write the rows there too")
    options = parser.parse_args()
    rows = []
    print("| shape | layout | step | threads | bnarray µs | torch µs | formula µs | copy µs | torch / bnarray |")
    print("|---|---|---|---|---|---|---|---|---|")
    for shape in SHAPES:
        for channels_last in [False, True] if len(shape) > 2 else [False]:
            for step in ("training", "evaluation", "backward"):
                for threads in options.threads:
                    numba.set_num_threads(threads)
                    torch.set_num_threads(threads)
                    us = measure(contenders(shape, channels_last, step), options.seconds)
                    layout = "channels last" if channels_last or len(shape) == 2 else "channels first"
                    rows.append({"shape": shape, "layout": layout, "step": step, "threads": threads, **us})
                    formula_us = f"{us['formula']:.0f}" if "formula" in us else ""
                    print(
                        f"| {shape} | {layout} | {step} | {threads} | {us['bnarray']:.0f} | {us['torch']:.0f} | "
                        f"{formula_us} | {us['copy']:.0f} | {us['torch'] / us['bnarray']:.2f} |",
                        flush=True,
                    )
    if options.json:
        with open(options.json, "w") as file:
            json.dump(rows, file, indent=1)


if __name__ == "__main__":
    main()
