"""What a call takes while another program keeps one core busy: ``python -m benchmarks.neighbour``.

A call with two threads should not wait for one that has lost its core. Linux only: the neighbour is tied to one core.
"""

import argparse
import subprocess
import sys
import time
from typing import Any

import numba
import numpy as np

import bnarray as bn

NEIGHBOUR = "import os; os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})\nwhile True: pass"


def measure(x: Any, calls: int) -> tuple[float, float]:
    """Return the median and the 99th percentile of training calls, in ms."""
    out = np.empty_like(x)
    bn.batch_norm(x, out=out)
    seconds = []
    for _ in range(calls):
        begin = time.perf_counter()
        bn.batch_norm(x, out=out)
        seconds.append(time.perf_counter() - begin)
    return 1e3 * float(np.median(seconds)), 1e3 * float(np.percentile(seconds, 99))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--calls", type=int, default=500)
    options = parser.parse_args()
    print("| MB | neighbour | threads | median | 99th percentile |\n|---|---|---|---|---|")
    for batch in (8, 32):
        x = np.random.default_rng(0).normal(3, 2, (batch, 64, 56, 56)).astype(np.float32)
        for busy in (False, True):
            neighbour = subprocess.Popen([sys.executable, "-c", NEIGHBOUR]) if busy else None
            try:
                time.sleep(0.5)
                for threads in (1, 2):
                    numba.set_num_threads(threads)
                    median, late = measure(x, options.calls)
                    name = "busy" if busy else "none"
                    print(f"| {x.nbytes >> 20} | {name} | {threads} | {median:.2f} | {late:.2f} |", flush=True)
            finally:
                if neighbour is not None:
                    neighbour.kill()


if __name__ == "__main__":
    main()
