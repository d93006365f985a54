"""NumPy arrays go through the CUDA kernels here, on a pretended device, in every public function."""

from collections.abc import Iterator
from types import SimpleNamespace

import numpy as np
import pytest

from bnarray import dispatch
from bnarray.backends import _cuda, generic
from bnarray.kernels.cuda import compiled, stage
from tests.cuda.simulated import simulator

THREADS, SIZE = compiled.THREADS, stage.SIZE


def cut(threads: int, size: int) -> None:
    """Let kernels that are made from now on have so many threads in a block, for chunks of so many bytes."""
    for module in (*simulator.kernel_modules, _cuda):
        module.THREADS = threads  # type: ignore[attr-defined]
        for each in vars(module).values():
            if hasattr(each, "cache_clear"):
                each.cache_clear()
    stage.SIZE = size


# Fewer threads and shorter chunks than on a device: small arrays then have several of each.
cut(64, 400)
simulator.install()

VERBS = ("moments", "forward", "normalize", "backward", "grad_sums", "grad_input")


@pytest.fixture
def simulated() -> Iterator[SimpleNamespace]:
    """Let NumPy arrays go through the CUDA kernels."""
    adapter = _cuda.Adapter(simulator.Library())
    verbs = SimpleNamespace(**vars(dispatch.backend(np.empty(0))))
    for verb in VERBS:
        setattr(verbs, verb, getattr(adapter, verb))
    for name in dispatch.PLANNING:  # repeated calls take no short cut through the CPU's kernels
        setattr(verbs, name, getattr(generic, name))
    of_type = dispatch._verbs_of_type
    before = of_type[np.ndarray]
    of_type[np.ndarray] = verbs
    yield verbs
    of_type[np.ndarray] = before


@pytest.fixture
def cut_as_on_a_device() -> Iterator[None]:
    cut(THREADS, SIZE)
    yield
    cut(64, 400)
