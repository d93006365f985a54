"""Compilation to machine code on first use, through the disk, and launching on a stream of the caller's.

Numba translates a kernel to LTO-IR, which CUDA's own linker (nvJitLink) turns into machine code for one compute
capability: both work without a device. A launch (`cuda.core`) then passes plain numbers, because arrays as arguments of
Numba's own dispatcher cost tens of microseconds each call, and synchronise.

Where `cuda.core` lacks what a launch needs, or the linker is missing or refuses a kernel, Numba's dispatcher compiles
and launches it: slower by some ten microseconds a call, without the disk, and in two launches a pass, because it fuses
products and sums as it likes. A warning says so, once.

The linker is told not to contract products and sums into fused ones, and so is the assembler: the bits of a result are
those of the formula as it is written, whichever kernel it is part of.
"""

import re
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, lru_cache
from importlib import metadata
from typing import Any

from bnarray.kernels import disk  # isort: skip  # before any other kernel module: it takes the sources' digest
import numpy as np

from bnarray.cuda import too_old

#: Of a block, in every kernel.
THREADS = 256

_compiling = threading.RLock()


@contextmanager
def _row_stack() -> Iterator[None]:
    """Lend NumPy a name that it dropped in 2.5, and that numba-cuda 0.30 asks it for."""
    name = "row_stack"
    is_missing = name not in vars(np)
    if is_missing:
        setattr(np, name, np.vstack)
    try:
        yield
    finally:
        if is_missing:
            delattr(np, name)


with _row_stack():
    from numba import cuda
    from numba.core import config
    from numba.cuda import types

#: Whether functions run in Python, on a pretended device (``NUMBA_ENABLE_CUDASIM=1``).
IS_SIMULATED = bool(config.ENABLE_CUDASIM)

# The types that kernels' arguments are made of.
index = types.int64
number = types.float64


def pointer(to: Any) -> Any:
    return types.CPointer(to)


vector = pointer(number)


def numbers(length: int) -> Any:
    """A tuple of so many sizes or strides."""
    return types.UniTuple(index, length)


def machinery(function: Callable[..., Any]) -> Callable[..., Any]:
    """Make a function one that kernels can call, and that becomes part of them."""
    return function if IS_SIMULATED else cuda.jit(device=True, inline="always")(function)


class LinkError(RuntimeError):
    """There is no linker, or it does not link a kernel."""


@cache
def _versions() -> str:
    """What machine code depends on, besides the sources."""
    try:
        from cuda.bindings import nvjitlink
        from cuda.pathfinder import DynamicLibNotFoundError
    except ImportError as error:
        raise LinkError(f"cuda-bindings lacks nvJitLink ({error})") from None
    try:
        linker = ".".join(map(str, nvjitlink.version()))
    except (DynamicLibNotFoundError, nvjitlink.nvJitLinkError) as error:
        raise LinkError(f"nvJitLink does not load ({error})") from None
    return f"numba-cuda {metadata.version('numba-cuda')} nvJitLink {linker}"


@lru_cache(maxsize=4096)
def _config(blocks: int) -> Any:
    from cuda.core import LaunchConfig

    return LaunchConfig(grid=blocks, block=THREADS)


def _linked(code: bytes, capability: tuple[int, int]) -> tuple[bytes, str]:
    """Return the machine code of LTO-IR, and what the assembler said about it.

    By the binding, because `cuda.core.Linker` (1.2) spells ``-fma=0`` in a way that the linker refuses.
    """
    _versions()  # raises if there is no linker
    from cuda.bindings import nvjitlink

    options = ["-arch=sm_{}{}".format(*capability), "-lto", "-fma=0", "-Xptxas=-fmad=false", "-Xptxas=-v"]
    linker = nvjitlink.create(len(options), options)
    try:
        nvjitlink.add_data(linker, nvjitlink.InputType.LTOIR, code, len(code), "kernel")
        nvjitlink.complete(linker)
        linked = bytearray(nvjitlink.get_linked_cubin_size(linker))
        nvjitlink.get_linked_cubin(linker, linked)
        log = bytearray(nvjitlink.get_info_log_size(linker))
        nvjitlink.get_info_log(linker, log)
    except nvjitlink.nvJitLinkError as error:
        raise LinkError(f"nvJitLink refuses a kernel ({error})") from None
    finally:
        nvjitlink.destroy(linker)
    return bytes(linked), log.decode()


class Kernel:
    """A function with one signature, compiled (or loaded from disk) for each capability when it is first launched.

    The compiler has to make room for so many blocks on a multiprocessor at a time: 64 registers a thread with 4 blocks,
    80 with 3.
    """

    def __init__(self, name: str, signature: Any, function: Callable[..., Any], *, blocks: int = 4) -> None:
        function.__name__ = function.__qualname__ = name
        self.name = name
        self.signature = signature
        self.function = function
        self.blocks = blocks
        self._loaded: dict[int, Any] = {}

    def compile(self, capability: tuple[int, int]) -> tuple[bytes, str]:
        """Return the machine code and what the assembler said about it."""
        with _compiling, _row_stack():
            code, _ = cuda.compile(
                self.function, self.signature, device=False, abi="numba", cc=capability, output="ltoir",
                launch_bounds=(THREADS, self.blocks),
            )  # fmt: skip
        return _linked(code, capability)

    def code(self, capability: tuple[int, int]) -> bytes:
        """Return the machine code, from disk if it is there."""
        target = f"sm_{capability[0]}{capability[1]} {_versions()} {THREADS}"
        code = disk.load(self.name, target)
        if code is None:
            code, _ = self.compile(capability)
            disk.save(self.name, target, code)
        return code

    def launch(self, device: int, stream: int, blocks: int, *arguments: Any) -> None:
        """Run on a device, whose number is that of its current context, on a stream, given by its handle.

        Arguments are the addresses of arrays, integers and floats; tuples of integers count as their integers.
        """
        if device not in self._loaded:
            self._loaded[device] = self._load(device)
        self._loaded[device](stream, blocks, arguments)

    def _load(self, device: int) -> Callable[[int, int, tuple[Any, ...]], None]:
        """Return the function that launches on a device."""
        try:
            from cuda.core import Device, LaunchConfig, ObjectCode, Stream, launch  # noqa: F401
        except ImportError as error:
            return self._dispatched(device, f"cuda-core does not launch kernels ({error})")
        capability = _capability(device, Device(device).compute_capability)
        try:
            code = self.code(capability)
        except LinkError as error:
            return self._dispatched(device, str(error))
        (entry,) = entries(code)
        kernel = ObjectCode.from_cubin(code).get_kernel(entry)
        return lambda stream, blocks, arguments: launch(
            Stream.from_handle(stream), _config(blocks), kernel, *flattened(arguments)
        )

    def _dispatched(self, device: int, why: str) -> Callable[[int, int, tuple[Any, ...]], None]:
        _capability(device, cuda.get_current_device().compute_capability)
        _warn_once(why)
        with _compiling, _row_stack():
            dispatcher = cuda.jit(self.signature, launch_bounds=(THREADS, self.blocks), lto=False)(self.function)

        def launch(stream: int, blocks: int, arguments: tuple[Any, ...]) -> None:
            dispatcher[blocks, THREADS, numba_stream(stream)](*arguments)

        return launch


def numba_stream(handle: int) -> Any:
    return cuda.external_stream(handle) if handle else 0


def _capability(device: int, found: Any) -> tuple[int, int]:
    major, minor = found
    obstacle = too_old(device, (major, minor))
    if obstacle is not None:
        raise RuntimeError(f"{obstacle}; move the arrays to another device, or to NumPy")
    return major, minor


#: Why Numba's dispatcher launches; nothing where it does not.
obstacles: list[str] = []


def _warn_once(why: str) -> None:
    if not obstacles:
        warnings.warn(
            f"CUDA kernels are launched by Numba's dispatcher, which takes longer, because {why}; "
            f"install the packages anew, for example by pip install -U 'bnarray[cuda13]'",
            RuntimeWarning,
            stacklevel=2,
        )
    obstacles.append(why)


class _Contexts(threading.local):
    """The devices whose context a thread was given."""

    def __init__(self) -> None:
        self.devices: set[int] = set()


_contexts = _Contexts()


def make_current(device: int) -> None:
    """Give this thread the context of a device, once: libraries leave that to their own first call that needs it."""
    if device not in _contexts.devices:
        try:
            from cuda.core import Device
        except ImportError:
            cuda.select_device(device)
        else:
            Device(device).set_current()
        _contexts.devices.add(device)


def flattened(arguments: tuple[Any, ...]) -> list[Any]:
    """Return a kernel's parameters: Numba makes one of every number in a tuple."""
    return [each for argument in arguments for each in (argument if isinstance(argument, tuple) else (argument,))]


def entries(code: bytes) -> list[str]:
    """Return the names of the kernels in machine code."""
    return sorted({name.decode() for name in re.findall(rb"\.text\.([\w$]+)", code)})
