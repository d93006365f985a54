"""Whether CUDA devices can be used and, if not, why not and what to do: known without importing any library."""

import ctypes
import sys
from functools import lru_cache
from importlib import util
from typing import Any, NamedTuple

#: The least compute capability that kernels are compiled for.
CAPABILITY = 7, 5

# The distributions that kernels are compiled, linked and launched by, and their modules.
_PACKAGES = {"numba-cuda": "numba_cuda", "cuda-core": "cuda.core"}

# Of CUDA's driver interface: attributes of a device, and the oldest version that the packages above work with.
_MAJOR, _MINOR = 75, 76
_OLDEST = 12000


class Obstacle(NamedTuple):
    """What stands between this machine and kernels on its devices."""

    why: str
    install: str | None  # what to install, where that would help

    def __str__(self) -> str:
        return self.why if self.install is None else f"{self.why}; install {self.install}"


def _is_importable(module: str) -> bool:
    try:
        return util.find_spec(module) is not None
    except ModuleNotFoundError:  # not even the package around it
        return False


@lru_cache(maxsize=1)
def _driver() -> Any:
    """The driver's library, initialised; or the obstacle."""
    try:
        driver = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return Obstacle("no NVIDIA driver is installed", "the driver, for an NVIDIA GPU")
    count = ctypes.c_int(0)
    code = driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count))
    if code or not count.value:
        return Obstacle(f"the NVIDIA driver finds no GPU (code {code})", None)
    return driver


def _version() -> int:
    """The newest CUDA that the driver serves, as 13020; 0 without a driver."""
    driver, version = _driver(), ctypes.c_int(0)
    if not isinstance(driver, Obstacle):
        driver.cuDriverGetVersion(ctypes.byref(version))
    return version.value


def missing() -> Obstacle | None:
    """Return what has to be installed before kernels can be compiled."""
    names = [name for name, module in _PACKAGES.items() if not _is_importable(module)]
    if not names:
        return None
    extra = "cuda12" if 0 < _version() < 13000 else "cuda13"
    return Obstacle(f"{' and '.join(names)} not installed", f"them by pip install 'bnarray[{extra}]'")


def capabilities() -> list[tuple[int, int]]:
    """Return the compute capability of each device."""
    driver = _driver()
    if isinstance(driver, Obstacle):
        return []
    count = ctypes.c_int(0)
    driver.cuDeviceGetCount(ctypes.byref(count))
    found = []
    for device in range(count.value):
        numbers = []
        for attribute in (_MAJOR, _MINOR):
            number = ctypes.c_int(0)
            driver.cuDeviceGetAttribute(ctypes.byref(number), attribute, device)
            numbers.append(number.value)
        found.append((numbers[0], numbers[1]))
    return found


def too_old(device: int, capability: tuple[int, int]) -> Obstacle | None:
    """Return why a device of such a capability cannot be used."""
    if capability >= CAPABILITY:
        return None
    needed, has = (".".join(map(str, each)) for each in (CAPABILITY, capability))
    return Obstacle(f"CUDA device {device} has compute capability {has}, and kernels need {needed} or above", None)


def obstacle(device: int | None = None) -> Obstacle | None:
    """Return what stands in the way of kernels on a device; on any device, if none is named."""
    driver = _driver()
    if isinstance(driver, Obstacle):
        return driver
    if _version() < _OLDEST:
        return Obstacle("the NVIDIA driver is too old for CUDA 12", "a newer driver")
    found = dict(enumerate(capabilities()))
    if device is not None:
        found = {device: found[device]}
    reasons = [too_old(each, capability) for each, capability in found.items()]
    return missing() or (reasons[0] if all(reasons) else None)
