"""Batch normalization for arrays, without a framework.

Names are loaded on first use: importing bnarray imports no array framework and not Numba.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bnarray import convert as convert
    from bnarray.convert import fold as fold
    from bnarray.dispatch import register_backend as register_backend
    from bnarray.files import Normalized as Normalized
    from bnarray.files import file_moments as file_moments
    from bnarray.files import normalize_file as normalize_file
    from bnarray.functional import Gradients as Gradients
    from bnarray.functional import ResidualGradients as ResidualGradients
    from bnarray.functional import Saved as Saved
    from bnarray.functional import batch_norm as batch_norm
    from bnarray.functional import batch_norm_backward as batch_norm_backward
    from bnarray.functional import batch_norm_forward as batch_norm_forward
    from bnarray.functional import moments as moments
    from bnarray.layer import BatchNorm as BatchNorm
    from bnarray.population import population_stats as population_stats
    from bnarray.stats import Moments as Moments
    from bnarray.stats import RunningStats as RunningStats

__version__ = "0.1.0"

_ROOMS = {
    "BatchNorm": "layer",
    "Gradients": "functional",
    "Moments": "stats",
    "Normalized": "files",
    "ResidualGradients": "functional",
    "RunningStats": "stats",
    "Saved": "functional",
    "batch_norm": "functional",
    "batch_norm_backward": "functional",
    "batch_norm_forward": "functional",
    "file_moments": "files",
    "fold": "convert",
    "moments": "functional",
    "normalize_file": "files",
    "population_stats": "population",
    "register_backend": "dispatch",
}

#: Rooms with names of their own.
_MODULES = ("convert",)

__all__ = ["__version__", *_ROOMS, *_MODULES]  # noqa: PLE0604  # strings, from the tables


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return import_module(f"bnarray.{name}")
    if name not in _ROOMS:
        raise AttributeError(f"module 'bnarray' has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f"bnarray.{_ROOMS[name]}"), name)
    import_module("bnarray.dispatch").meet()
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
