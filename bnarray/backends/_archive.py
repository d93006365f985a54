"""Saved statistics: plain arrays and a line of JSON, as `.npz` or `.safetensors`, written whole or not at all.

Files come from anywhere. Reading one takes memory and time in proportion to its size, runs nothing that it holds, and
ends with statistics or a `ValueError`. So the members of an archive are not compressed (a few bytes could be told to
become any number), and an array's size is compared with its header's before memory is taken for it.
"""

import io
import json
import os
import zipfile
from collections.abc import Mapping
from hashlib import blake2b
from math import prod
from typing import IO, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from bnarray.atomic import beside

Arrays = dict[str, npt.NDArray[Any]]

_FORMAT, _VERSION = "bnarray.RunningStats", 1
_SETTINGS = {"update_rate", "correction", "nonfinite", "num_updates", "num_skipped"}
_FLOATS = ("f4", "f8")

#: By array, the kinds of numbers that it may hold.
_KINDS = {"mean": _FLOATS, "var": _FLOATS, "m2": _FLOATS, "count": (*_FLOATS, "i8")}


class _Content(NamedTuple):
    """What a file holds: the line that says what it is, and the arrays."""

    about: str
    arrays: Arrays


class _Npz:
    """NumPy's archive; its checksums tell of damage."""

    @staticmethod
    def write(file: IO[bytes], content: _Content) -> None:
        members: dict[str, Any] = {"about": np.array(content.about), **content.arrays}
        np.savez(file, **members)

    @staticmethod
    def read(file: IO[bytes], path: str) -> _Content:
        size = os.fstat(file.fileno()).st_size
        with zipfile.ZipFile(file) as archive:
            _check_names([each.filename for each in archive.infolist()], {"about.npy", *(f"{k}.npy" for k in _KINDS)})
            arrays = {each.filename[:-4]: _member(archive, each, size) for each in archive.infolist()}
        about = arrays.pop("about")
        if about.dtype.kind != "U" or about.shape != ():
            raise ValueError("about is no line of text")
        return _Content(about.item(), arrays)


def _member(archive: zipfile.ZipFile, member: zipfile.ZipInfo, most: int) -> npt.NDArray[Any]:
    name = member.filename
    if member.compress_type != zipfile.ZIP_STORED:
        raise ValueError(f"{name} is compressed, which nothing is that save wrote")
    if not member.file_size == member.compress_size <= most:
        raise ValueError(f"{name} is said to be larger than the file")
    data = archive.read(member)
    header = io.BytesIO(data)
    if np.lib.format.read_magic(header) != (1, 0):
        raise ValueError(f"{name} is of another version of .npy")
    shape, is_fortran, dtype = np.lib.format.read_array_header_1_0(header)
    if dtype.kind not in "fiU" or min(shape, default=0) < 0:
        raise ValueError(f"{name} holds {dtype} of shape {shape}")
    if prod(shape) * dtype.itemsize != len(data) - header.tell():
        raise ValueError(f"{name} has another size than its header says")
    array = np.ndarray(shape, dtype, data, header.tell(), order="F" if is_fortran else "C")
    return array.astype(dtype.newbyteorder("="))


class _Safetensors:
    """The format of the package safetensors, which has no checksums: the metadata has one of all."""

    @staticmethod
    def write(file: IO[bytes], content: _Content) -> None:
        metadata = {"bnarray": content.about, "blake2b": _digest(content)}
        file.write(_safetensors().numpy.save(content.arrays, metadata))

    @staticmethod
    def read(file: IO[bytes], path: str) -> _Content:
        with _safetensors().safe_open(path, "numpy") as archive:
            metadata = archive.metadata() or {}
            names = list(archive.keys())
            _check_names(names, set(_KINDS))
            content = _Content(metadata["bnarray"], {name: archive.get_tensor(name) for name in names})
        if metadata["blake2b"] != _digest(content):
            raise ValueError("its checksum is that of something else")
        return content


def _safetensors() -> Any:
    try:
        import safetensors.numpy
    except ImportError as error:
        raise ImportError("files named .safetensors need a package: pip install 'bnarray[safetensors]'") from error
    return safetensors


def _digest(content: _Content) -> str:
    digest = blake2b(content.about.encode(), digest_size=16)
    for name, array in sorted(content.arrays.items()):
        digest.update(f"{name} {array.dtype.name} {array.shape} ".encode() + array.tobytes())
    return digest.hexdigest()


def _check_names(names: list[str], known: set[str]) -> None:
    if len(names) != len(set(names)):
        raise ValueError("a name comes twice")
    if not known.issuperset(names):
        raise ValueError(f"it holds {', '.join(sorted(set(names) - known))} besides")


def _container(path: str) -> type[_Npz] | type[_Safetensors]:
    """The form of a file, by its name."""
    return _Safetensors if path.lower().endswith(".safetensors") else _Npz


def check_format(path: str | os.PathLike[str]) -> None:
    """Raise ImportError if the package is not installed by which a file of this name is written."""
    if _container(os.fsdecode(path)) is _Safetensors:
        _safetensors()


def write(path: str | os.PathLike[str], arrays: Mapping[str, Any], **settings: Any) -> None:
    """Write arrays and settings beside path, then rename."""
    about = json.dumps({"format": _FORMAT, "version": _VERSION, **settings})
    content = _Content(about, {name: np.array(array, order="C") for name, array in arrays.items()})
    container = _container(os.fsdecode(path))
    with beside(path) as temporary, open(temporary, "wb") as file:
        container.write(file, content)
        file.flush()
        os.fsync(file.fileno())


def read(path: str | os.PathLike[str]) -> tuple[Arrays, dict[str, Any]]:
    """Return the arrays and settings of a file that `write` made."""
    place = os.fsdecode(path)
    with open(place, "rb") as file:
        try:
            return _checked(_container(place).read(file, place))
        except ImportError:
            raise
        except Exception as error:  # what zipfile, NumPy, safetensors and json make of damaged bytes has a dozen types
            raise ValueError(f"{place!r} holds no statistics saved by bnarray: {error}") from error


def _checked(content: _Content) -> tuple[Arrays, dict[str, Any]]:
    about = json.loads(content.about)
    if about.pop("format") != _FORMAT:
        raise ValueError("it holds something else")
    version = about.pop("version")
    if version != _VERSION:
        raise ValueError(f"its version is {version}; this bnarray reads version {_VERSION}")
    if set(about) != _SETTINGS:
        raise ValueError("its settings are not those of this version")
    needed = set(_KINDS) - ({"m2"} if about["update_rate"] is not None else set())
    if set(content.arrays) != needed:
        raise ValueError(f"its arrays are {', '.join(sorted(content.arrays))}, not {', '.join(sorted(needed))}")
    for name, array in content.arrays.items():
        if array.dtype.str[1:] not in _KINDS[name]:
            raise ValueError(f"{name} holds {array.dtype}")
    return content.arrays, about
