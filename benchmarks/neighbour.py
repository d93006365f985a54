"""What a call takes while another program keeps one core busy: ``python -m benchmarks.neighbour``.

A call with two threads should not wait for one that has lost its core. Linux only: the neighbour is tied to one core.
"""

import argparse
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import numba
import numpy as np

import bnarray as bn

NEIGHBOUR = "import os; os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})\nwhile True: pass"


def calls_on(x: Any, libraries: list[str]) -> dict[str, Callable[[], Any]]:
    """Return training calls on x as an array of each library, and torch's own."""
    out = np.empty_like(x)
    calls: dict[str, Callable[[], Any]] = {"numpy": lambda: bn.batch_norm(x, out=out)}
    if "torch" in libraries:
        import torch

        tensor, result = torch.from_numpy(x), torch.from_numpy(out)
        calls["torch"] = lambda: bn.batch_norm(tensor, out=result)
        calls["torch itself"] = lambda: torch.nn.functional.batch_norm(tensor, None, None, training=True)
    return calls


def set_threads(threads: int, libraries: list[str]) -> None:
    numba.set_num_threads(threads)
    if "torch" in libraries:
        import torch

        torch.set_num_threads(threads)


def measure(call: Callable[[], Any], calls: int) -> tuple[float, float]:
    """Return the median and the 99th percentile in ms."""
    call()
    seconds = []
    for _ in range(calls):
        begin = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - begin)
    return 1e3 * float(np.median(seconds)), 1e3 * float(np.percentile(seconds, 99))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--calls", type=int, default=500)
    parser.add_argument("--libraries", nargs="+", default=["numpy"], choices=["numpy", "torch"])
    options = parser.parse_args()
    print("| arrays of | MB | neighbour | threads | median | 99th percentile |\n|---|---|---|---|---|---|")
    for batch in (8, 32):
        x = np.random.default_rng(0).normal(3, 2, (batch, 64, 56, 56)).astype(np.float32)
        for busy in (False, True):
            neighbour = subprocess.Popen([sys.executable, "-c", NEIGHBOUR]) if busy else None
            try:
                time.sleep(0.5)
                for library, call in calls_on(x, options.libraries).items():
                    for threads in (1, 2):
                        set_threads(threads, options.libraries)
                        median, late = measure(call, options.calls)
                        name = "busy" if busy else "none"
                        row = f"{library} | {x.nbytes >> 20} | {name} | {threads} | {median:.2f} | {late:.2f}"
                        print(f"| {row} |", flush=True)
            finally:
                if neighbour is not None:
                    neighbour.kill()


if __name__ == "__main__":
    main()
