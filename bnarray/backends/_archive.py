"""Saved statistics: an `.npz` file of plain arrays and a line of JSON, written whole or not at all."""

import io
import json
import os
from typing import Any

import numpy as np
import numpy.typing as npt

from bnarray.atomic import beside

_FORMAT, _VERSION = "bnarray.RunningStats", 1
_SETTINGS = {"update_rate", "correction", "nonfinite", "num_updates", "num_skipped"}


def write(path: str | os.PathLike[str], arrays: dict[str, Any], **settings: Any) -> None:
    """Write arrays and settings beside path, then rename."""
    about = json.dumps({"format": _FORMAT, "version": _VERSION, **settings})
    with beside(path) as temporary, open(temporary, "wb") as file:
        np.savez(file, about=np.array(about), **arrays)
        file.flush()
        os.fsync(file.fileno())


def read(path: str | os.PathLike[str]) -> tuple[dict[str, npt.NDArray[Any]], dict[str, Any]]:
    """Return the arrays and settings of a file that `write` made."""
    with open(path, "rb") as file:
        content = io.BytesIO(file.read())
    try:
        with np.load(content, allow_pickle=False) as archive:
            if not isinstance(archive, np.lib.npyio.NpzFile):
                raise ValueError("it holds one array")
            about = json.loads(str(archive["about"]))
            if about.pop("format") != _FORMAT:
                raise ValueError("it holds something else")
            version = about.pop("version")
            if version != _VERSION:
                raise ValueError(f"its version is {version}; this bnarray reads version {_VERSION}")
            if set(about) != _SETTINGS:
                raise ValueError("its settings are not those of this version")
            arrays = {name: archive[name] for name in archive.files if name != "about"}
            if not {"mean", "var", "count"} <= arrays.keys():
                raise ValueError("an array is missing")
            return arrays, about
    except Exception as error:  # what zipfile, zlib, NumPy and json make of damaged bytes is of a dozen types
        raise ValueError(f"{os.fspath(path)!r} holds no statistics saved by bnarray: {error}") from error
