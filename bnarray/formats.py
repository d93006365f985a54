"""Arrays in files, read and written region by region: `.npy`, the members of `.npz`, zarr.

A region is a tuple of slices: single indices along the leading axes, some along one axis, all along the others. In the
order of memory that is one run of bytes. Shapes here are in the order of memory: a Fortran-ordered array's is reversed.
"""

import io
import os
import shutil
import stat
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from math import ceil, prod
from typing import IO, Any, NamedTuple, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from bnarray.atomic import beside

ndarray: TypeAlias = npt.NDArray[Any]
Region: TypeAlias = tuple[slice, ...]
Path: TypeAlias = str | os.PathLike[str]


class Cut(NamedTuple):
    """How a shape is cut into regions: `step` indices along one axis, one along those before it."""

    axis: int
    step: int


def cut(shape: tuple[int, ...], most: int) -> Cut:
    """Cut into regions of at most so many elements, evenly."""
    for axis, size in enumerate(shape):
        inner = prod(shape[axis + 1 :])
        if inner <= most or axis == len(shape) - 1:
            return Cut(axis, ceil(size / ceil(size / max(1, most // max(1, inner)))) if size else 1)
    return Cut(0, 1)


def regions(shape: tuple[int, ...], cut: Cut) -> Iterator[Region]:
    """Yield the regions in the order of memory."""
    if 0 in shape:
        return
    if not shape:
        yield ()
        return
    size, whole = shape[cut.axis], tuple(slice(0, size) for size in shape[cut.axis + 1 :])
    for lead in np.ndindex(shape[: cut.axis]):
        for first in range(0, size, cut.step):
            yield (*(slice(i, i + 1) for i in lead), slice(first, min(first + cut.step, size)), *whole)


def lengths(region: Region) -> tuple[int, ...]:
    """Return the shape of a region."""
    return tuple(each.stop - each.start for each in region)


def at(values: ndarray, region: Region) -> ndarray:
    """Return the region of an array, as a view even if there are no axes."""
    index: Any = (*region, ...)
    view: ndarray = values[index]
    return view


def first_of(shape: tuple[int, ...], region: Region) -> int:
    """Return the place of a region's first element in memory."""
    first = 0
    for start, size in zip(region, shape, strict=True):
        first = first * size + start.start
    return first


class Source(Protocol):
    """An array in a file; `in_parallel` if several threads may read it at once and in any order."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    is_fortran: bool

    @property
    def in_parallel(self) -> bool: ...

    def read(self, region: Region, buffer: ndarray) -> ndarray:
        """Return the region's elements, in the flat buffer if that saves a copy."""


class Sink(Protocol):
    """An array that is written to a file, in order, or `in_parallel`."""

    @property
    def in_parallel(self) -> bool: ...

    def write(self, region: Region, values: ndarray) -> None: ...


class Output(Protocol):
    """A file that arrays are written to."""

    def array(self, name: str, like: Source, dtype: np.dtype[Any]) -> AbstractContextManager[Sink]:
        """Begin an array of like's shape and order; it is complete when the context is left."""


def _bytes(flat: ndarray) -> memoryview:
    return flat.view(np.uint8).data


def _has_places(file: IO[bytes]) -> bool:
    """Whether threads can read and write at places of their own: files on a disk, but not the members of archives."""
    return isinstance(file, io.FileIO) and hasattr(os, "preadv")


class _Npy:
    """An open `.npy` file, or a member of an archive."""

    def __init__(self, file: IO[bytes], name: str, size: int) -> None:
        self.name = name
        self._file = file
        try:
            version = np.lib.format.read_magic(file)
            readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
            if version not in readers:
                raise ValueError(f"version {version} of the format is for arrays with named fields")
            shape, self.is_fortran, self.dtype = readers[version](file)
        except OSError:
            raise
        except Exception as error:  # NumPy has a parser read the header, whose errors are of its own kinds
            raise ValueError(f"{name} is no .npy file, or a damaged one: {error}") from error
        if self.dtype.hasobject:
            raise TypeError(f"{name} holds Python objects; it should hold real floating numbers")
        self.shape = tuple(reversed(shape)) if self.is_fortran else shape
        self._begin = file.tell()
        expected, there = prod(shape) * self.dtype.itemsize, size - self._begin
        if there < expected:
            raise ValueError(f"{name} is truncated: it should hold {expected} bytes of numbers, and holds {there}")

    @property
    def in_parallel(self) -> bool:
        return _has_places(self._file)

    def _read_at(self, place: int, into: memoryview) -> int:
        if self.in_parallel:
            return os.preadv(self._file.fileno(), [into], place)
        self._file.seek(place)
        return self._file.readinto(into)  # type: ignore[attr-defined, no-any-return]  # of every binary file

    def read(self, region: Region, buffer: ndarray) -> ndarray:
        shape = lengths(region)
        values = buffer[: prod(shape)]
        left, place = _bytes(values), self._begin + first_of(self.shape, region) * self.dtype.itemsize
        while left:
            got = self._read_at(place, left)
            if not got:
                raise ValueError(f"{self.name} is truncated: {len(left)} bytes of a block are missing")
            left, place = left[got:], place + got
        return values.reshape(shape)


class _Zarr:
    """A zarr array, open for reading."""

    is_fortran = False
    in_parallel = False  # regions share chunks, which would be decoded twice

    def __init__(self, array: Any, name: str) -> None:
        self.name, self.shape, self.dtype = name, tuple(array.shape), np.dtype(array.dtype)
        self.chunks = array.chunks
        self._array = array

    def read(self, region: Region, buffer: ndarray) -> ndarray:
        return np.ascontiguousarray(self._array[region])


def _zarr() -> Any:
    import zarr

    return zarr


def is_zarr(path: Path) -> bool:
    """Whether a folder looks like a zarr array or group."""
    return any(os.path.isfile(os.path.join(path, name)) for name in ("zarr.json", ".zarray", ".zgroup"))


def _size_of_regular(path: Path) -> int:
    """The size; a pipe, which opening would wait for, is no file."""
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):
        raise ValueError(f"{os.fspath(path)} is no regular file; it is read more than once, so it should be one")
    return status.st_size


class _Archive(zipfile.ZipFile):
    """A `.npz` file, whose members go without their suffix."""

    def members(self) -> list[str]:
        return [each.removesuffix(".npy") for each in self.namelist()]

    def info(self, member: str) -> zipfile.ZipInfo:
        for name in (f"{member}.npy", member):
            if name in self.namelist():
                return self.getinfo(name)
        raise ValueError(f"{self.filename} has no member {member!r}; it has {', '.join(self.members()) or 'none'}")


@contextmanager
def _damage_told(path: Path) -> Iterator[None]:
    try:
        yield
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError) as error:
        raise ValueError(f"{os.fspath(path)} is a damaged archive: {error}") from error


@contextmanager
def opened(path: Path, member: str | None = None) -> Iterator[dict[str, Source]]:
    """Open the arrays of a file by name: the floating or chosen members of an archive, else one without a name.

    Raises
    ------
    OSError
        If there is no such file, or it cannot be read.
    TypeError, ValueError
        If it is of no known format, damaged, or has no such member.
    """
    place = os.fspath(path)
    with ExitStack() as stack:
        stack.enter_context(_damage_told(path))
        if os.path.isdir(path):
            if not is_zarr(path):
                raise ValueError(f"{place} is a folder that holds no zarr array")
            if member is not None:
                raise ValueError(f"{place} is no archive, so it has no member {member!r}")
            array = _zarr().open(place, mode="r")
            if not hasattr(array, "shape"):
                raise ValueError(f"{place} is a group of zarr arrays; name one of them, as a path inside it")
            yield {"": _Zarr(array, place)}
            return
        size = _size_of_regular(path)
        file = stack.enter_context(open(path, "rb", buffering=0))
        magic = file.read(6)
        file.seek(0)
        if magic.startswith(b"PK"):
            archive = stack.enter_context(_Archive(path))
            if encrypted := [each.filename for each in archive.infolist() if each.flag_bits & 1]:
                raise ValueError(f"{place} has members that are encrypted: {', '.join(encrypted)}")
            sources: dict[str, Source] = {}
            for name in archive.members() if member is None else [member]:
                info = archive.info(name)
                try:
                    stream = stack.enter_context(archive.open(info))
                except OSError as error:  # of a place before the file's beginning
                    raise ValueError(f"{place} is a damaged archive: {name} cannot be read ({error})") from error
                if member is not None or stream.read(6) == np.lib.format.MAGIC_PREFIX:
                    stream.seek(0)
                    source = _Npy(stream, f"{place}:{name}", info.file_size)
                    if member is not None or source.dtype.kind == "f":
                        sources[name] = source
            yield sources
        elif member is not None:
            raise ValueError(f"{place} is no archive, so it has no member {member!r}")
        elif magic == np.lib.format.MAGIC_PREFIX:
            yield {"": _Npy(file, place, size)}
        else:
            raise ValueError(f"{place} is neither .npy, .npz nor zarr")


def _reserve(file: IO[bytes], size: int) -> None:
    """Take the room that the rest of a file needs at once: a full disk says so before a write, and writing is faster.

    4 GB on ext4: 1.6 s instead of 2.7 to 4.8.
    """
    if size and hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file.fileno(), file.tell(), size)


class _NpySink:
    def __init__(self, file: IO[bytes], like: Source, dtype: np.dtype[Any]) -> None:
        self._file, self._shape = file, like.shape
        header = {
            "descr": np.lib.format.dtype_to_descr(dtype),
            "fortran_order": like.is_fortran,
            "shape": like.shape[:: -1 if like.is_fortran else 1],
        }
        np.lib.format.write_array_header_1_0(file, header)
        self._begin = file.tell() if self.in_parallel else 0

    @property
    def in_parallel(self) -> bool:
        return _has_places(self._file)

    def write(self, region: Region, values: ndarray) -> None:
        left = _bytes(values.reshape(-1))
        place = self._begin + first_of(self._shape, region) * values.itemsize
        while left:
            written = os.pwrite(self._file.fileno(), left, place) if self.in_parallel else self._file.write(left)
            left, place = left[written:], place + written


class _ZarrSink:
    in_parallel = False  # regions share chunks, of which one writer's part would be lost

    def __init__(self, array: Any, is_fortran: bool) -> None:
        self._array = array
        self._order = -1 if is_fortran else 1

    def write(self, region: Region, values: ndarray) -> None:
        self._array[region[:: self._order]] = values if self._order == 1 else values.T


class _NpyOutput:
    def __init__(self, path: str) -> None:
        self._path = path

    @contextmanager
    def array(self, name: str, like: Source, dtype: np.dtype[Any]) -> Iterator[Sink]:
        with open(self._path, "wb", buffering=0) as file:
            sink = _NpySink(file, like, dtype)
            _reserve(file, prod(like.shape) * dtype.itemsize)
            yield sink


class _NpzOutput:
    """An archive like another one: its arrays keep their names and compression, its other members are copied."""

    def __init__(self, archive: zipfile.ZipFile, original: _Archive) -> None:
        self._zip = archive
        self._original = original
        self._done: set[str] = set()

    @contextmanager
    def _member(self, info: zipfile.ZipInfo) -> Iterator[IO[bytes]]:
        new = zipfile.ZipInfo(info.filename, info.date_time)
        new.compress_type, new.external_attr = info.compress_type, info.external_attr
        with self._zip.open(new, "w", force_zip64=True) as file:
            yield file
        self._done.add(info.filename)

    @contextmanager
    def array(self, name: str, like: Source, dtype: np.dtype[Any]) -> Iterator[Sink]:
        with self._member(self._original.info(name)) as file:
            yield _NpySink(file, like, dtype)

    def copy_others(self) -> None:
        for info in self._original.infolist():
            if info.filename not in self._done:
                with self._original.open(info) as old, self._member(info) as new:
                    shutil.copyfileobj(old, new)


class _ZarrOutput:
    def __init__(self, folder: str) -> None:
        self._folder = folder

    @contextmanager
    def array(self, name: str, like: Source, dtype: np.dtype[Any]) -> Iterator[Sink]:
        shape = like.shape[:: -1 if like.is_fortran else 1]
        chunks = like.chunks if isinstance(like, _Zarr) else "auto"
        yield _ZarrSink(_zarr().create_array(self._folder, shape=shape, dtype=dtype, chunks=chunks), like.is_fortran)


def kind_of_output(path: Path) -> str:
    """Return npy, npz or zarr, by the name."""
    kind = os.path.splitext(os.fspath(path).rstrip(os.sep))[1].lstrip(".")
    if kind not in ("npy", "npz", "zarr"):
        raise ValueError(f"{os.fspath(path)} should be named .npy, .npz or .zarr, after what it is to be")
    return kind


@contextmanager
def created(path: Path, src: Path) -> Iterator[Output]:
    """Make a file for what is made of src's arrays; it takes its place when the context is left without an error."""
    kind = kind_of_output(path)
    with beside(path, folder=kind == "zarr") as temporary:
        if kind == "npy":
            yield _NpyOutput(temporary)
        elif kind == "zarr":
            yield _ZarrOutput(temporary)
        else:
            if not zipfile.is_zipfile(src):
                raise ValueError(f"{os.fspath(path)} is to be an archive, but {os.fspath(src)} is none; name it .npy")
            with _damage_told(src), _Archive(src) as original, zipfile.ZipFile(temporary, "w") as archive:
                output = _NpzOutput(archive, original)
                yield output
                output.copy_others()
