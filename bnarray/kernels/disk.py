"""Compiled code kept on disk between processes: which folder, under which key, written and read safely."""

import hashlib
import os
import sys
from contextlib import suppress
from functools import cache
from importlib import metadata
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path

from bnarray.atomic import beside

_CHECKSUM_BYTES = 32
_KEY_DIGITS = 32


def _sources(folder: Traversable) -> list[tuple[str, bytes]]:
    found = []
    for entry in sorted(folder.iterdir(), key=lambda entry: entry.name):
        if entry.is_dir() and entry.name != "__pycache__":
            found += [(f"{entry.name}/{name}", text) for name, text in _sources(entry)]
        elif entry.name.endswith(".py"):
            found.append((entry.name, entry.read_bytes()))
    return found


def _source_digest() -> str:
    """Hash every kernel's source with every helper's: an edit to any of them makes all compiled code stale."""
    digest = hashlib.sha256()
    for name, text in _sources(files("bnarray.kernels")):
        digest.update(f"{name}:{len(text)}:".encode() + text)
    return digest.hexdigest()


# Taken before any kernel module is imported (compiled.py imports this first), and compared again whenever the disk is
# used: code that was imported before an edit must not be stored under the digest of the edited files.
_IMPORTED = _source_digest()


@cache
def _versions() -> str:
    packages = [f"{name} {metadata.version(name)}" for name in ("numba", "llvmlite", "numpy")]
    return " ".join([sys.implementation.cache_tag or sys.version, *packages])


def folder() -> Path | None:
    """Return ``$BNARRAY_CACHE_DIR``, else ``bnarray`` in the user's cache folder; None where there is no such place."""
    chosen = os.environ.get("BNARRAY_CACHE_DIR")
    if chosen:
        return Path(chosen)
    base = os.environ.get("XDG_CACHE_HOME")
    if base and os.path.isabs(base):  # the specification says to ignore relative paths
        return Path(base) / "bnarray"
    try:
        return Path.home() / ".cache" / "bnarray"
    except RuntimeError:  # no home folder can be found
        return None


def _path(name: str, target: str) -> Path | None:
    base = folder()
    if base is None or _source_digest() != _IMPORTED:
        return None
    key = hashlib.sha256(f"{_IMPORTED} {_versions()} {target}".encode()).hexdigest()
    return base / key[:_KEY_DIGITS] / name


def is_key(name: str) -> bool:
    """Whether a folder is named as those of compiled kernels are."""
    return len(name) == _KEY_DIGITS and set(name) <= set("0123456789abcdef")


def load(name: str, target: str) -> bytes | None:
    """Return what ``save`` kept for this kernel and target, or None. Damaged files count as absent."""
    path = _path(name, target)
    if path is None:
        return None
    try:
        content = path.read_bytes()
    except OSError:
        return None
    checksum, payload = content[:_CHECKSUM_BYTES], content[_CHECKSUM_BYTES:]
    return payload if hashlib.sha256(payload).digest() == checksum else None


def save(name: str, target: str, payload: bytes) -> None:
    """Keep the payload for later processes; a disk that is full or read-only means that nothing is kept.

    Written beside its place and renamed, so that processes that start together each see a whole file or none.
    """
    path = _path(name, target)
    if path is None:
        return
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with beside(path) as temporary:
            Path(temporary).write_bytes(hashlib.sha256(payload).digest() + payload)
