"""`bnarray normalize` of a large file, in turn with what its bytes cost: one `cp` and one more read of the file.

Run as ``python -m benchmarks.files [--gb 4] [--folder .]``; it needs three times the room on the disk. Says the median
of the rounds, the cache's state, the most memory that the command took, and how far the result is from the whole
array's (which has to fit into memory for that).
"""

import argparse
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

import bnarray as bn

_FEATURES = 64
_BLOCK = 2**16  # rows


def make(path: Path, size: int) -> None:
    """Write a float32 array of about `size` bytes whose rows drift."""
    block = np.random.default_rng(0).normal(3, 2, (_BLOCK, _FEATURES)).astype(np.float32)
    blocks = max(1, size // block.nbytes)
    with open(path, "wb") as file:
        header = {"descr": "<f4", "fortran_order": False, "shape": (blocks * _BLOCK, _FEATURES)}
        np.lib.format.write_array_header_1_0(file, header)
        for i in range(blocks):
            file.write((block + np.float32(i / 100)).tobytes())


def read(path: Path) -> None:
    buffer = bytearray(2**24)
    with open(path, "rb", buffering=0) as file:
        while file.readinto(buffer):
            pass


def seconds(work: Callable[[], None], settle: float) -> float:
    """Time a call after a pause in which a virtual machine gives freed memory back: else whoever comes second, or uses
    memory later, pays for pages that the other one found there (10 s for 4 GB where 1 s is usual)."""
    os.sync()
    time.sleep(settle)
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gb", type=float, default=4)
    parser.add_argument("--folder", type=Path, default=Path())
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--settle", type=float, default=6, help="seconds of rest before each timing (default 6)")
    options = parser.parse_args()
    src, copy, dst = (options.folder / f"bnarray-{name}.npy" for name in ("source", "copy", "normalized"))
    command = [str(Path(sys.executable).with_name("bnarray")), "normalize", str(src), str(dst), "--chunk-mb", "64"]
    try:
        make(src, int(options.gb * 2**30))

        def yardstick() -> None:
            read(src)
            subprocess.run(["cp", src, copy], check=True)

        def normalize() -> None:
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)

        ours, theirs = [], []
        for turn in range(options.rounds + 1):
            theirs.append(seconds(yardstick, options.settle))
            copy.unlink()
            ours.append(seconds(normalize, options.settle))
            print(f"round {turn}: cp and a read {theirs[-1]:.2f} s, normalize {ours[-1]:.2f} s", flush=True)
            if turn < options.rounds:
                dst.unlink()
        a, b = statistics.median(ours[1:]), statistics.median(theirs[1:])
        print(f"medians without the first round: {b:.2f} s and {a:.2f} s, ratio {a / b:.2f}")
        print("(source in the page cache; outputs go to it, and nothing waits for the disk)")
        print(f"most memory: {resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024:.0f} MB")
        x, y = np.load(src), np.load(dst, mmap_mode="r")
        bn.batch_norm(x, out=x)
        worst = max(float(abs(x[i : i + _BLOCK] - y[i : i + _BLOCK]).max()) for i in range(0, len(x), _BLOCK))
        print(f"largest difference from the whole array's result: {worst:.2g}")
    finally:
        for path in (src, copy, dst):
            path.unlink(missing_ok=True)


if __name__ == "__main__":
    main()
