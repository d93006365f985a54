"""A zarr array larger than the memory of two worker processes, normalised by dask.distributed and written to zarr.

Run as ``python -m benchmarks.distributed [--gb 2] [--memory 400MB] [--workers 2] [--folder .]``; it needs three times
the room on the disk. Says, for `bn.batch_norm` and for the formula ``(x - x.mean(0)) / sqrt(x.var(0) + eps)`` in
dask.array's own functions, each with workers of its own, the seconds (of the rounds' median, with zarr's default
compression), the most memory that each worker's process had and what it had before, and the largest distance from the
formula in float64 with the moments of one pass over the file. Linux only: memory is read from /proc.
"""

import argparse
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import bnarray as bn

FEATURES = 64
EPS = 1e-5


class Outcome(NamedTuple):
    """What a way to normalise took, and how far from the truth it came."""

    seconds: float
    before: list[int]  # bytes of each worker's process
    peaks: list[int]
    distance: float


def make(path: Path, size: int, chunk: int) -> None:
    """Write a float32 array of about `size` bytes, in chunks of about `chunk`, whose rows drift, far from zero."""
    import zarr

    rows = chunk // (4 * FEATURES)
    chunks = max(1, size // chunk)
    array = zarr.create_array(path, shape=(chunks * rows, FEATURES), chunks=(rows, FEATURES), dtype=np.float32)
    block = np.random.default_rng(0).normal(1000, 2, (rows, FEATURES)).astype(np.float32)
    for i in range(chunks):
        array[i * rows : (i + 1) * rows] = block + np.float32(i / chunks)


def chunks_of(path: Path) -> Iterator[np.ndarray]:
    """Read an array chunk by chunk."""
    import zarr

    array = zarr.open_array(path, mode="r")
    for first in range(0, array.shape[0], array.chunks[0]):
        yield np.asarray(array[first : first + array.chunks[0]])


def streamed(path: Path) -> bn.Moments:
    """The moments of an array in a file, in one pass and without dask."""
    return bn.Moments.merge_all(bn.moments(chunk) for chunk in chunks_of(path))


def distance(src: Path, dst: Path, moments: bn.Moments) -> float:
    """Return how far a result is from the formula in float64."""
    invstd = 1 / np.sqrt(moments.var() + EPS)
    pairs = zip(chunks_of(src), chunks_of(dst), strict=True)
    return max(float(abs((x - moments.mean) * invstd - y).max()) for x, y in pairs)


def by_bnarray(x: Any) -> Any:
    return bn.batch_norm(x, eps=EPS)


def by_formula(x: Any) -> Any:
    import dask.array as da

    return (x - x.mean(0)) / da.sqrt(x.var(0) + np.float32(EPS))


def _memory(field: str) -> int:
    """What this process has (VmRSS), or has had at most (VmHWM), in bytes."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith(field)) * 1024


def _prepare() -> int:
    """Import what the work needs, compile the kernels (or load them) and forget what memory that took; return what is
    left."""
    for module in ("dask.array", "zarr"):
        import_module(module)
    x = np.ones((2**12, FEATURES), np.float32)
    bn.batch_norm(x, stats=bn.moments(x), training=False)
    with open("/proc/self/clear_refs", "w") as peak:
        peak.write("5")
    return _memory("VmRSS")


def measure(
    normalize: Callable[[Any], Any],
    src: Path,
    dst: Path,
    moments: bn.Moments,
    *,
    workers: int,
    memory: str,
    rounds: int,
) -> Outcome:
    """Normalise from file to file in new worker processes of one thread each."""
    import dask.array as da
    from distributed import Client, LocalCluster

    cluster = {"n_workers": workers, "threads_per_worker": 1, "memory_limit": memory, "dashboard_address": None}
    seconds = []
    with LocalCluster(processes=True, **cluster) as processes, Client(processes) as client:
        before = list(client.run(_prepare).values())
        for _ in range(rounds):
            shutil.rmtree(dst, ignore_errors=True)
            begin = time.perf_counter()
            normalize(da.from_zarr(src)).to_zarr(dst)
            seconds.append(time.perf_counter() - begin)
        peaks = list(client.run(_memory, "VmHWM").values())
    return Outcome(statistics.median(seconds), before, peaks, distance(src, dst, moments))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gb", type=float, default=2)
    parser.add_argument("--memory", default="400MB", help="limit of each worker (default 400MB)")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--chunk-mb", type=float, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=None, help="where the files go (default: the temporary folder)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bnarray-", dir=options.folder) as folder:
        src, dst = Path(folder) / "source.zarr", Path(folder) / "normalized.zarr"
        make(src, int(options.gb * 2**30), int(options.chunk_mb * 2**20))
        moments = streamed(src)
        print(f"{options.gb:g} GB in chunks of {options.chunk_mb:g} MB, {options.workers} workers of {options.memory}")
        for name, way in (("bnarray", by_bnarray), ("formula", by_formula)):
            how = {"workers": options.workers, "memory": options.memory, "rounds": options.rounds}
            seconds, before, peaks, off = measure(way, src, dst, moments, **how)
            memory = ", ".join(f"{b / 1e6:.0f} -> {p / 1e6:.0f} MB" for b, p in zip(before, peaks, strict=True))
            print(f"{name}: {seconds:.1f} s, {memory}, {off:.2g} from float64", flush=True)


if __name__ == "__main__":
    main()
