"""Outputs that are there whole or not at all: written beside their place, then renamed."""

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress


def _like_new(path: str, mode: int) -> None:
    """Give a temporary file or folder, which is private, the permissions of an ordinary new one."""
    mask = os.umask(0)
    os.umask(mask)
    os.chmod(path, mode & ~mask)


def _remove(path: str) -> None:
    if os.path.isdir(path):
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(FileNotFoundError):
            os.unlink(path)


@contextmanager
def beside(path: str | os.PathLike[str], *, folder: bool = False) -> Iterator[str]:
    """Give the path of an empty file (or folder) in the place's folder; rename it to the place if nothing is raised.

    A link at the place stays one. A folder that stands there is moved aside first and removed last.
    """
    place = os.path.realpath(os.fsdecode(path))
    parent, name = os.path.split(place)
    if not os.path.isdir(parent):
        raise FileNotFoundError(errno.ENOENT, "there is no such folder", parent)
    if folder:
        temporary = tempfile.mkdtemp(dir=parent, prefix=f".{name}.", suffix=".part")
    else:
        handle, temporary = tempfile.mkstemp(dir=parent, prefix=f".{name}.", suffix=".part")
        os.close(handle)
    try:
        yield temporary
        _like_new(temporary, 0o777 if folder else 0o666)
        if folder and os.path.isdir(place):
            old = tempfile.mkdtemp(dir=parent, prefix=f".{name}.", suffix=".old")
            os.rename(place, old)
            try:
                os.rename(temporary, place)
            except BaseException:
                os.rename(old, place)
                raise
            shutil.rmtree(old)
        else:
            os.replace(temporary, place)
    except BaseException:
        _remove(temporary)
        raise
