"""What is said where CUDA devices cannot be used, with a double of the driver."""

import ctypes
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest

import bnarray as bn
from bnarray import cuda, info


class DriverDouble:
    """Answers as a driver with devices of some capabilities would."""

    def __init__(self, *capabilities: tuple[int, int], version: int = 13000, code: int = 0) -> None:
        self._capabilities, self._version, self._code = capabilities, version, code

    def cuInit(self, flags: int) -> int:  # noqa: N802
        return self._code

    def cuDeviceGetCount(self, count: Any) -> int:  # noqa: N802
        count._obj.value = len(self._capabilities)
        return 0

    def cuDriverGetVersion(self, version: Any) -> int:  # noqa: N802
        version._obj.value = self._version
        return 0

    def cuDeviceGetAttribute(self, number: Any, attribute: int, device: int) -> int:  # noqa: N802
        number._obj.value = self._capabilities[device][attribute - cuda._MAJOR]
        return 0


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Let there be a driver (or none, which is an error), and packages that lack."""

    def make(driver: Any, *lacking: str) -> None:
        def load(name: str) -> Any:
            if driver is None:
                raise OSError(name)
            return driver

        monkeypatch.setattr(cuda, "ctypes", SimpleNamespace(CDLL=load, c_int=ctypes.c_int, byref=ctypes.byref))
        monkeypatch.setattr(cuda, "_is_importable", lambda module: module not in lacking)
        cuda._driver.cache_clear()

    yield make
    monkeypatch.undo()
    cuda._driver.cache_clear()


@pytest.mark.parametrize(
    ("driver", "lacking", "why", "install"),
    [
        (None, (), "no NVIDIA driver is installed", "the driver, for an NVIDIA GPU"),
        (DriverDouble(code=100), (), "the NVIDIA driver finds no GPU (code 100)", None),
        (DriverDouble(), (), "the NVIDIA driver finds no GPU (code 0)", None),
        (DriverDouble((9, 0), version=11080), (), "the NVIDIA driver is too old for CUDA 12", "a newer driver"),
        (
            DriverDouble((9, 0), version=12080),
            ("numba_cuda", "cuda.core"),
            "numba-cuda and cuda-core not installed",
            "them by pip install 'bnarray[cuda12]'",
        ),
        (DriverDouble((9, 0)), ("cuda.core",), "cuda-core not installed", "them by pip install 'bnarray[cuda13]'"),
        (DriverDouble((7, 0)), (), "CUDA device 0 has compute capability 7.0, and kernels need 7.5 or above", None),
    ],
)
def test_obstacles(machine: Callable[..., None], driver: Any, lacking: Any, why: str, install: str | None) -> None:
    machine(driver, *lacking)
    assert cuda.obstacle() == (why, install)
    assert info._cuda() == {"usable": False, "why": why, "install": install}


def test_one_device_that_will_do_is_enough(machine: Callable[..., None]) -> None:
    machine(DriverDouble((7, 0), (7, 5)))
    assert cuda.obstacle() is None
    assert cuda.obstacle(1) is None
    assert cuda.obstacle(0) is not None
    facts = info.facts()
    assert facts["cuda"] == {"usable": True, "capabilities": ["7.0", "7.5"]}
    assert "usable (compute capability 7.0, 7.5); not verified on a GPU" in info.table(facts)


def test_other_arrays_on_a_device_are_told_of_cupy() -> None:
    class DeviceArrayDouble:
        @property
        def __cuda_array_interface__(self) -> Any:
            raise AssertionError("nobody looks at its memory")

    with pytest.raises(TypeError, match=r"convert it by cupy.asarray\(x\), which copies nothing"):
        bn.batch_norm(DeviceArrayDouble())
