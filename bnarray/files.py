"""Normalise and measure arrays in files larger than memory.

An array is cut into units of a fixed number of elements, in the order of memory. A thread reads a unit, works on it and
writes it while a core's cache holds it; statistics are merged in the units' order, so they do not depend on how many
units are in memory at a time.
"""

import os
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from copy import copy
from math import prod
from queue import SimpleQueue
from shutil import disk_usage
from typing import Any, NamedTuple, TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt

from bnarray.dispatch import backend
from bnarray.formats import Path, Region, Sink, Source, created, cut, is_zarr, kind_of_output, lengths, opened, regions
from bnarray.functional import batch_norm, moments
from bnarray.kernels.cpu.pool import threads
from bnarray.layout import broadcasts, features_shape, kept_axes, varies_along
from bnarray.stats import Moments, RunningStats, checked_number

Progress: TypeAlias = Callable[[int, int], None]
_Array: TypeAlias = npt.NDArray[Any]
_Result = TypeVar("_Result")

# Elements of a unit: small enough that a core keeps it in cache, large enough that what a call costs disappears (4 GB
# of float32 in units of a million elements, a half, a quarter, an eighth: 3.9, 3.7, 5.6, 7.8 s).
UNIT = 2**19

# What a thread needs at most, in units: x as read and as computed with, y as computed and as written.
_BLOCKS = 4

_FLOATS = "float16, float32 or float64"


class Normalized(NamedTuple):
    """The statistics of an array before and after, in float64."""

    before: Moments
    after: Moments


def normalize_file(
    src: Path,
    dst: Path,
    *,
    axis: int | tuple[int, ...] = 1,
    eps: float = 1e-5,
    stats: RunningStats | Moments | None = None,
    where: Path | None = None,
    dtype: npt.DTypeLike | None = None,
    member: str | None = None,
    chunk_mb: float = 64,
    force: bool = False,
    progress: Progress | None = None,
) -> Normalized | dict[str, Normalized]:
    """Do to the arrays in a file what `batch_norm` does to arrays, a block at a time.

    The data are read twice, or once with `stats`. What is written is the same, bit for bit, whatever `chunk_mb`.

    Parameters
    ----------
    src
        A file: `.npy`, `.npz` (of which every floating member is normalised by its own statistics, and the others are
        copied), or a zarr array (with the extra ``bnarray[zarr]``).
    dst
        Where to write, named after what it is to be: `.npy`, `.npz` (if src is one) or `.zarr`. It appears when it is
        complete; until then a hidden file beside it grows.
    axis, eps
        As in `batch_norm`.
    stats
        Statistics that normalise instead of the data's own.
    where
        A file with a mask or weights, as in `batch_norm`; `.npy` or zarr.
    dtype
        What to write: float16, float32 or float64. By default what src holds; needed if that has no fractions.
    member
        The one member of an archive to normalise.
    chunk_mb
        Megabytes (2**20 bytes) of memory for blocks, which limits the threads; one needs up to 16.
    force
        Whether an existing dst is replaced.
    progress
        Called with the bytes done and in all, now and then. What it raises ends the work.

    Returns
    -------
    Normalized or dict of str to Normalized
        Statistics before and after; of an archive without `member`, by member.

    Raises
    ------
    OSError
        If a file cannot be read or written, or does not fit on the disk.
    TypeError, ValueError
        If a file or argument is wrong. An older dst is then as it was.

    Examples
    --------
    >>> import os, tempfile
    >>> import numpy as np
    >>> import bnarray as bn
    >>> folder = tempfile.mkdtemp()
    >>> src, dst = os.path.join(folder, "x.npy"), os.path.join(folder, "y.npy")
    >>> np.save(src, np.array([[1.0, 10.0], [3.0, 30.0]]))
    >>> bn.normalize_file(src, dst, eps=0).before.mean
    array([ 2., 20.])
    >>> np.load(dst)
    array([[-1., -1.],
           [ 1.,  1.]])
    """
    eps = checked_number(eps, "eps")
    _check_place(dst, (src,) if where is None else (src, where), force)
    with opened(src, member) as sources, _mask(where) as mask:
        if not sources:
            raise ValueError(f"{os.fspath(src)} has no floating member; choose one by member")
        jobs = {name: _Job(source, axis, mask, dtype, chunk_mb) for name, source in sources.items()}
        _check_room(dst, sum(prod(job.source.shape) * job.written.itemsize for job in jobs.values()))
        steps = _Steps(progress, sum(job.size for job in jobs.values()) * (1 if stats is not None else 2))
        done = {}
        with created(dst, src) as output:
            for name, job in jobs.items():
                before = _sums(job, steps) if stats is None else None
                constants = job.constants(before if stats is None else stats)
                with output.array(name, job.source, job.written) as sink:
                    done[name] = _write(job, constants, eps, before, sink, steps)
            _check_place(dst, (), force)  # nobody else wrote it meanwhile
        return done if "" not in done and member is None else next(iter(done.values()))


def file_moments(
    paths: Path | Iterable[Path],
    *,
    axis: int | tuple[int, ...] = 1,
    where: Path | None = None,
    member: str | None = None,
    chunk_mb: float = 64,
    progress: Progress | None = None,
) -> Moments:
    """Return the exact moments of the arrays in files, all together, as `moments` does of arrays.

    Parameters
    ----------
    paths
        A file, or several: of any sizes, but of the same features.
    where
        A file with a mask or weights, if there is one file.
    axis, member, chunk_mb, progress
        As in `normalize_file`.

    Returns
    -------
    Moments
        In float64; the same, bit for bit, whatever `chunk_mb`.

    Raises
    ------
    OSError
        If a file cannot be read.
    TypeError, ValueError
        If a file or argument is wrong.

    Examples
    --------
    >>> import os, tempfile
    >>> import numpy as np
    >>> import bnarray as bn
    >>> folder = tempfile.mkdtemp()
    >>> paths = [os.path.join(folder, name) for name in ("a.npy", "b.npy")]
    >>> for path, values in zip(paths, ([[1.0], [2.0]], [[3.0], [4.0], [5.0]])):
    ...     np.save(path, np.array(values))
    >>> bn.file_moments(paths).mean
    array([3.])
    """
    paths = [paths] if isinstance(paths, str | os.PathLike) else list(paths)
    if not paths:
        raise ValueError("paths is empty; it should name at least one file")
    if where is not None and len(paths) > 1:
        raise ValueError("where belongs to one file; give it with one path, and merge the moments")
    with ExitStack() as stack:
        mask = stack.enter_context(_mask(where))
        jobs = []
        for path in paths:
            sources = stack.enter_context(opened(path, member))
            _check_one(path, sources)
            jobs.append(_Job(next(iter(sources.values())), axis, mask, None, chunk_mb, any_dtype=True))
            if jobs[-1].features != jobs[0].features:
                raise ValueError(
                    f"{os.fspath(path)} has features of shape {jobs[-1].features}, but {os.fspath(paths[0])} of shape "
                    f"{jobs[0].features}; they should be the same"
                )
        steps = _Steps(progress, sum(job.size for job in jobs))
        return Moments.merge_all([_sums(job, steps) for job in jobs])


def check_one_array(src: Path, member: str | None) -> None:
    """Raise ValueError if a file holds several floating arrays, or none."""
    with opened(src, member) as sources:
        _check_one(src, sources)


def _check_one(path: Path, sources: dict[str, Source]) -> None:
    if len(sources) != 1:
        names = ", ".join(sources) or "none"
        raise ValueError(f"{os.fspath(path)} should hold one floating array; choose a member (there: {names})")


def _check_place(dst: Path, inputs: tuple[Path, ...], force: bool) -> None:
    kind, place = kind_of_output(dst), os.fspath(dst)
    if not os.path.lexists(dst):
        return
    for each in inputs:
        if os.path.exists(each) and os.path.exists(dst) and os.path.samefile(each, dst):
            raise ValueError(f"{place} is an input too; write to another place")
    if os.path.isdir(dst) and kind != "zarr":
        raise IsADirectoryError(f"{place} is a folder; name a file in it")
    if os.path.isdir(dst) and os.listdir(dst) and not is_zarr(dst):
        raise FileExistsError(f"{place} is a folder that holds no zarr array; it is left alone")
    if not force:
        raise FileExistsError(f"{place} exists; name another place, or replace it by force")


def _check_room(dst: Path, size: int) -> None:
    folder = os.path.dirname(os.path.realpath(dst))
    if kind_of_output(dst) == "npy" and os.path.isdir(folder) and (free := disk_usage(folder).free) < size:
        raise OSError(f"{os.fspath(dst)} needs {size:,} bytes, but its disk has {free:,} left")


@contextmanager
def _mask(where: Path | None) -> Iterator[Source | None]:
    if where is None:
        yield None
        return
    with opened(where) as sources:
        if list(sources) != [""]:
            raise ValueError(f"{os.fspath(where)} is an archive; where should be a .npy file or a zarr array")
        yield sources[""]


class _Steps:
    """Bytes done, told to who wants to know."""

    def __init__(self, progress: Progress | None, total: int) -> None:
        self._progress, self._total, self._done = progress, total, 0

    def add(self, size: int) -> None:
        self._done += size
        if self._progress is not None:
            self._progress(self._done, self._total)


def _working_dtype(source: Source, dtype: npt.DTypeLike | None, any_dtype: bool) -> tuple[np.dtype[Any], np.dtype[Any]]:
    """The dtypes to compute in and to write."""
    held = source.dtype.newbyteorder("=")
    if held.kind not in "fiub" or held.itemsize > 8:
        raise TypeError(f"{source.name} has dtype {source.dtype}; it should hold {_FLOATS}")
    if dtype is None:
        if held.kind == "f":
            return held, held
        if not any_dtype:
            raise TypeError(
                f"{source.name} has dtype {source.dtype}, which has no fractions; say which to write by dtype, for "
                "example float32"
            )
        return np.result_type(held, np.float16), np.dtype(np.float64)
    try:
        written = np.dtype(dtype)
    except TypeError:
        raise TypeError(f"dtype is {dtype!r}; it should be {_FLOATS}") from None
    if written.kind != "f" or written.itemsize > 8:
        raise TypeError(f"dtype is {written}; it should be {_FLOATS}")
    return np.result_type(held, written), written.newbyteorder("=")


class _Job:
    """An array of a file, its features, and how it is cut. Axes and shapes are in the order of memory."""

    def __init__(
        self,
        source: Source,
        axis: int | tuple[int, ...],
        mask: Source | None,
        dtype: npt.DTypeLike | None,
        chunk_mb: float,
        any_dtype: bool = False,
    ) -> None:
        self.source = source
        ndim = len(source.shape)
        try:
            kept = kept_axes(axis, ndim)
        except ValueError as error:
            raise ValueError(f"{source.name}: {error}".replace("but x has", "but it has")) from None
        self.kept = tuple(sorted(ndim - 1 - i for i in kept)) if source.is_fortran else kept
        self.computed, self.written = _working_dtype(source, dtype, any_dtype)
        self.size = prod(source.shape) * source.dtype.itemsize
        self.mask = None if mask is None else self._checked_mask(mask)
        widest = max(source.dtype.itemsize, self.computed.itemsize, self.written.itemsize)
        self.unit = cut(source.shape, UNIT)
        self.most_threads = int(checked_number(chunk_mb, "chunk_mb") * 2**20) // (_BLOCKS * widest * UNIT)

    def _checked_mask(self, mask: Source) -> Source:
        """The mask with its axes in the source's order."""
        shape, several = self.source.shape, sum(size > 1 for size in mask.shape) > 1
        if several and mask.is_fortran != self.source.is_fortran:
            raise ValueError(
                f"{mask.name} and {self.source.name} are stored in opposite orders; store them in the same"
            )
        if len(mask.shape) < len(shape) and self.source.is_fortran:
            raise ValueError(f"{mask.name} has shape {mask.shape}; give it {len(shape)} axes, some of size 1")
        if not mask.is_fortran and self.source.is_fortran:  # one axis at most is longer than 1: any order will do
            mask = copy(mask)
            mask.shape = mask.shape[::-1]
        if not broadcasts(mask.shape, shape):
            raise ValueError(f"{mask.name} has shape {mask.shape}, which does not broadcast to {shape}")
        if mask.dtype.kind not in "bf" or mask.dtype.itemsize > 8:
            raise TypeError(f"{mask.name} has dtype {mask.dtype}; it should be boolean (a mask) or floating (weights)")
        return mask

    @property
    def largest(self) -> int:
        """Elements of a whole unit."""
        axis, step = self.unit
        return min([step, *self.source.shape[axis : axis + 1]]) * prod(self.source.shape[axis + 1 :])

    @property
    def features(self) -> tuple[int, ...]:
        """The features' shape, in the order of axes."""
        shape = features_shape(self.source.shape, self.kept)
        return shape[::-1] if self.source.is_fortran else shape

    def in_memory_order(self, of_features: _Array) -> _Array:
        return of_features.T if self.source.is_fortran else of_features

    def constants(self, stats: RunningStats | Moments | None) -> tuple[_Array, _Array]:
        """The mean and variance that normalise, in the order of memory."""
        if isinstance(stats, Moments):
            mean, var = stats.mean, stats.var()
            if not isinstance(stats.count, int | float) or stats.count == 0:
                var = np.where(np.asarray(stats.count) == 0, 1.0, var)
        elif isinstance(stats, RunningStats):
            mean, var = stats.mean_and_var()
        else:
            raise TypeError(f"stats is a {type(stats).__name__}; it should be a RunningStats or Moments")
        if tuple(mean.shape) != self.features:
            raise ValueError(
                f"stats has features of shape {tuple(mean.shape)}; those of {self.source.name} have {self.features}"
            )
        verbs = backend(mean)
        return self.in_memory_order(verbs.to_numpy(mean)), self.in_memory_order(verbs.to_numpy(var))

    def of_features(self, region: Region) -> Region:
        return tuple(region[i] for i in self.kept)

    def read(self, region: Region, buffer: _Array) -> tuple[_Array, _Array | None]:
        """The unit as it is computed with, and its part of the mask."""
        x = self.source.read(region, buffer).astype(self.computed, copy=False)
        if self.mask is None:
            return x, None
        shape = self.mask.shape
        own = region[len(region) - len(shape) :]
        own = tuple(slice(0, 1) if size == 1 else each for size, each in zip(shape, own, strict=True))
        mask = self.mask.read(own, np.empty(prod(lengths(own)), self.mask.dtype))
        return x, mask.astype(self.mask.dtype.newbyteorder("="), copy=False)

    def moments(self, x: _Array, mask: _Array | None) -> Moments:
        return moments(x, axis=self.kept, where=mask)


def _on_units(
    job: _Job, work: Callable[[Region, _Array, _Array], _Result], in_parallel: bool
) -> Generator[tuple[Region, _Result]]:
    """Do the work on every unit, several at a time, each with buffers for x and y; yield results in order."""
    number = threads() if in_parallel and job.source.in_parallel and (not job.mask or job.mask.in_parallel) else 1
    number = max(1, min(number, job.most_threads))
    buffers: SimpleQueue[tuple[_Array, _Array]] = SimpleQueue()
    for _ in range(number):
        buffers.put((np.empty(job.largest, job.source.dtype), np.empty(job.largest, job.computed)))

    def task(region: Region) -> _Result:
        own = buffers.get()
        try:
            return work(region, *own)
        finally:
            buffers.put(own)

    waiting: deque[tuple[Region, Future[_Result]]] = deque()
    with ThreadPoolExecutor(number, thread_name_prefix="bnarray-files") as workers:
        try:
            for region in regions(job.source.shape, job.unit):
                waiting.append((region, workers.submit(task, region)))
                if len(waiting) > 2 * number:
                    first, coming = waiting.popleft()
                    yield first, coming.result()
            for first, coming in waiting:
                yield first, coming.result()
        finally:
            for _, coming in waiting:
                coming.cancel()


def _sums(job: _Job, steps: _Steps) -> Moments:
    """The moments of the whole array, in the order of axes."""
    sums = _Sums(job)
    with closing(_on_units(job, lambda region, of_x, of_y: job.moments(*job.read(region, of_x)), True)) as found:
        for region, each in found:
            sums.add(job.of_features(region), each)
            steps.add(prod(lengths(region)) * job.source.dtype.itemsize)
    return sums.moments()


class _Sums:
    """Moments of units, merged into those of the features that they hold."""

    def __init__(self, job: _Job) -> None:
        self._job = job
        shape = features_shape(job.source.shape, job.kept)
        self._count, self._mean, self._m2 = np.zeros(shape), np.zeros(shape), np.zeros(shape)
        self._merge = backend(self._mean).merge

    def add(self, features: Region, found: Moments) -> None:
        own = (self._count[features], self._mean[features], self._m2[features])
        merged = self._merge(*own, found.count, found.mean, found.m2)
        self._count[features], self._mean[features], self._m2[features] = merged

    def moments(self) -> Moments:
        job = self._job
        count, mean, m2 = (job.in_memory_order(each) for each in (self._count, self._mean, self._m2))
        if job.mask is None:
            return Moments(prod(job.source.shape) // max(1, mean.size), mean, m2)
        if varies_along(job.mask.shape, len(job.source.shape), job.kept):
            return Moments(count, mean, m2)
        return Moments(float(count.flat[0]) if count.size else 0, mean, m2)


def _write(
    job: _Job, constants: tuple[_Array, _Array], eps: float, before: Moments | None, sink: Sink, steps: _Steps
) -> Normalized:
    """Normalise and write every unit; return the statistics, of x unless they are known."""
    mean, var = constants

    def work(region: Region, of_x: _Array, of_y: _Array) -> tuple[Moments | None, Moments]:
        x, mask = job.read(region, of_x)
        features = job.of_features(region)
        given = Moments(1, mean[features], var[features])
        y = of_y[: x.size].reshape(x.shape)
        batch_norm(x, stats=given, training=False, axis=job.kept, eps=eps, out=y)
        with np.errstate(over="ignore"):  # beyond float16 is infinity
            y = y.astype(job.written, copy=False)
        sink.write(region, y)
        return None if before else job.moments(x, mask), job.moments(y, mask)

    sums, new_sums = _Sums(job), _Sums(job)
    with closing(_on_units(job, work, sink.in_parallel)) as found:
        for region, (old, new) in found:
            if old is not None:
                sums.add(job.of_features(region), old)
            new_sums.add(job.of_features(region), new)
            steps.add(prod(lengths(region)) * job.source.dtype.itemsize)
    return Normalized(before or sums.moments(), new_sums.moments())
