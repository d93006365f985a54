"""Outputs that are there whole or not at all: written beside their place, then renamed."""

import errno
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress


def _remove(path: str) -> None:
    if os.path.isdir(path):
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(FileNotFoundError):
            os.unlink(path)


def check_place(path: str | os.PathLike[str], *, folder: bool = False) -> None:
    """Raise OSError if nothing can be renamed to a place: a device or a pipe would no longer be one."""
    place = os.path.realpath(os.fsdecode(path))
    parent = os.path.dirname(place)
    if not os.path.isdir(parent):
        raise FileNotFoundError(errno.ENOENT, "there is no such folder", parent)
    if os.path.isdir(place):
        if not folder:
            raise IsADirectoryError(errno.EISDIR, "it is a folder; name a file in it", place)
    elif os.path.exists(place) and not os.path.isfile(place):
        raise OSError(errno.EINVAL, "it is no regular file, and would be replaced by one; name another place", place)


@contextmanager
def beside(path: str | os.PathLike[str], *, folder: bool = False) -> Iterator[str]:
    """Give the path of an empty file (or folder) in the place's folder; rename it to the place if nothing is raised.

    A link at the place stays one. A folder that stands there is moved aside first and removed last.
    """
    check_place(path, folder=folder)
    place = os.path.realpath(os.fsdecode(path))
    parent, name = os.path.split(place)
    # By hand, not by tempfile, whose files are private: these get the permissions of any new file.
    hidden = os.path.join(parent, f".{name}.{secrets.token_hex(8)}")
    temporary = f"{hidden}.part"
    if folder:
        os.mkdir(temporary)
    else:
        os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
    try:
        yield temporary
        if folder and os.path.isdir(place):
            old = f"{hidden}.old"
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
