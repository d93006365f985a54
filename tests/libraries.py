"""The array libraries, each with its conversions: the only place where tests name what is special about one."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from bnarray.dispatch import Capabilities, backend_of

Make = Callable[[np.ndarray], Any]


@dataclass(frozen=True)
class Library:
    """How to make an array of a library, how to get it back, and what a test must do around that."""

    name: str
    make: Make
    back: Callable[[Any], np.ndarray]
    gradients: Callable[..., dict[str, Any]] | None = None  # as `bnarray.testing.check_case` takes it
    constant: Make | None = None  # where `make` gives what has a gradient
    writable: Make | None = None  # where `make` gives what cannot be written to
    other_device: Make | None = None  # an array elsewhere
    around: Callable[[], AbstractContextManager[Any]] = nullcontext

    @property
    def capabilities(self) -> Capabilities:
        return backend_of(self.name).capabilities

    def __str__(self) -> str:
        return self.name


def _read_only(x: np.ndarray) -> np.ndarray:
    view = x.view()
    view.flags.writeable = False
    return view


def _numpy() -> Library:
    return Library("numpy", _read_only, np.asarray, writable=np.array)


def _array_api_strict() -> Library:
    import array_api_strict as xp

    device = xp.Device("device1")
    return Library(
        "array_api_strict",
        xp.asarray,
        lambda array: np.asarray(array.to_device(xp.Device("CPU_DEVICE"))),
        other_device=lambda x: xp.asarray(x, device=device),
    )


def _torch() -> Library:
    import torch

    def make(x: np.ndarray) -> Any:
        if x.dtype == ml_dtypes.bfloat16:
            return torch.from_numpy(x.view(np.int16)).view(torch.bfloat16)
        return torch.from_numpy(x)

    def back(tensor: Any) -> np.ndarray:
        tensor = tensor.detach()
        if tensor.dtype == torch.bfloat16:
            return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
        return tensor.numpy()

    return Library("torch", make, back, other_device=lambda x: make(x).to("meta"))


def _jax() -> Library:
    import jax

    return Library("jax", jax.numpy.asarray, np.asarray, around=lambda: jax.enable_x64(True))


def _dask() -> Library:
    import dask.array

    def make(x: np.ndarray) -> Any:
        return dask.array.from_array(x, chunks=tuple(max(1, (size + 1) // 2) for size in x.shape))

    return Library("dask", make, np.asarray)


def _autograd() -> Library:
    from autograd.core import VJPNode, make_vjp
    from autograd.tracer import getval, new_box

    def gradients(function: Callable[..., Any], arrays: dict[str, np.ndarray], dy: np.ndarray) -> dict[str, Any]:
        from autograd.builtins import dict as boxed

        pullback, _ = make_vjp(lambda arrays: function(**{name: arrays[name] for name in arrays}), boxed(arrays))
        return dict(pullback(dy))

    return Library("autograd", lambda x: new_box(x, 0, VJPNode.new_root()), getval, gradients, np.asarray)


_MAKERS: dict[str, Callable[[], Library]] = {
    "numpy": _numpy,
    "array_api_strict": _array_api_strict,
    "torch": _torch,
    "jax": _jax,
    "dask": _dask,
    "autograd": _autograd,
}

NAMES = tuple(_MAKERS)
INSTALLED = tuple(name for name in NAMES if find_spec(name) is not None)


def library(name: str) -> Library:
    if name not in INSTALLED:
        pytest.skip(f"{name} is not installed: its arrays are not verified")
    return _MAKERS[name]()


@contextmanager
def opened(*names: str) -> Iterator[list[Library]]:
    """The libraries of some names, with all around them that they need."""
    with ExitStack() as around:
        libraries = [library(name) for name in names]
        for each in libraries:
            around.enter_context(each.around())
        yield libraries
