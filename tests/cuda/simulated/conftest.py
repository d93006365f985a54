"""NumPy arrays go through the CUDA kernels here, on a pretended device, in every public function."""

from collections.abc import Iterator
from types import SimpleNamespace

import numpy as np
import pytest

from bnarray import dispatch
from bnarray.backends import _cuda
from bnarray.kernels.cuda import block, compiled, grad_input, grad_sums, moments, normalize, running, walk
from tests.cuda.simulated import simulator

_MODULES = (block, compiled, grad_input, grad_sums, moments, normalize, running, walk, _cuda)
THREADS, CHUNK = compiled.THREADS, _cuda.CHUNK


def cut(threads: int, chunk: int) -> None:
    """Let kernels that are made from now on have so many threads in a block, for so many elements."""
    for module in _MODULES:
        module.THREADS = threads  # type: ignore[attr-defined]
        for each in vars(module).values():
            if hasattr(each, "cache_clear"):
                each.cache_clear()
    _cuda.CHUNK = chunk


# Fewer threads and shorter chunks than on a device: small arrays then have several of each.
cut(64, 100)
simulator.install()

VERBS = ("moments", "forward", "normalize", "backward", "grad_sums", "grad_input")


@pytest.fixture
def simulated() -> Iterator[SimpleNamespace]:
    """Let NumPy arrays go through the CUDA kernels."""
    adapter = _cuda.Adapter(simulator.Library())
    verbs = SimpleNamespace(**vars(dispatch.backend(np.empty(0))))
    for verb in VERBS:
        setattr(verbs, verb, getattr(adapter, verb))
    of_type = dispatch._verbs_of_type
    before = of_type[np.ndarray]
    of_type[np.ndarray] = verbs
    yield verbs
    of_type[np.ndarray] = before


@pytest.fixture
def cut_as_on_a_device() -> Iterator[None]:
    cut(THREADS, CHUNK)
    yield
    cut(64, 100)
