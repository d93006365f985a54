"""The way from a kernel to a launch, as far as it goes without a GPU."""

import os
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("numba_cuda", reason="numba-cuda is not installed; launching CUDA kernels is not verified")
if os.environ.get("NUMBA_ENABLE_CUDASIM") == "1":
    pytest.skip("Numba simulates devices here; launching is not verified", allow_module_level=True)

from bnarray.kernels.cuda import compiled, memory, moments
from bnarray.kernels.cuda.compiled import Kernel
from bnarray.kernels.cuda.walk import Shape

SHAPE = Shape(32, 1, 1)


def test_code_is_kept_on_disk_for_each_capability(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BNARRAY_CACHE_DIR", str(tmp_path))
    kernel = moments.merge_kernel(SHAPE)
    codes = {capability: kernel.code(capability) for capability in ((8, 0), (9, 0))}
    assert len(set(codes.values())) == 2
    monkeypatch.setattr(Kernel, "compile", lambda *_: pytest.fail("compiled again"))
    for capability, code in codes.items():
        assert kernel.code(capability) == code


def test_a_launch_passes_as_many_numbers_as_there_are_parameters() -> None:
    kernel = moments.kernel(memory.BFLOAT16, memory.BOOL, SHAPE)
    ptx, _ = compiled.cuda.compile(
        kernel.function, kernel.signature, device=False, abi="numba", cc=(9, 0), output="ptx"
    )
    parameters = re.findall(r"\.param \.([a-z]+)64 ", ptx[: ptx.index("{", ptx.index(".entry"))])
    sizes = (0,) * SHAPE.axes
    arguments = (0, 0, 0, 0, 0, 0, sizes, 0, sizes, 0, sizes, 0)
    assert len(arguments) == len(kernel.signature.args)
    assert len(parameters) == len(compiled.flattened(arguments))


def test_numpy_is_as_it_was_after_compiling(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(np, "row_stack", raising=False)
    with compiled._row_stack():
        assert vars(np)["row_stack"] is np.vstack
    assert "row_stack" not in vars(np)


def test_kernels_compile_without_the_name_that_numpy_dropped(run_python: Callable[..., str]) -> None:
    code = """
import numpy as np
vars(np).pop("row_stack", None)
from bnarray.kernels.cuda import moments
from bnarray.kernels.cuda.walk import Shape
print(len(moments.merge_kernel(Shape(32, 1, 1)).compile((9, 0))[0]) > 0, "row_stack" in vars(np))
"""
    assert run_python(code).split() == ["True", "False"]


def test_a_device_that_is_too_old_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class DeviceDouble:
        def __init__(self, number: int) -> None:
            self.compute_capability = 7, 0

    monkeypatch.setattr("cuda.core.Device", DeviceDouble)
    with pytest.raises(RuntimeError, match=r"device 3 has compute capability 7\.0, and kernels need 7\.5 .*NumPy"):
        moments.merge_kernel(SHAPE).launch(3, 0, 1, 1)


def test_cupy_is_refused_without_what_compiles_kernels(run_python: Callable[..., str]) -> None:
    pytest.importorskip(
        "cupy", reason="CuPy is not installed; what is said where kernels cannot be compiled is not verified"
    )
    code = """
from bnarray import cuda
cuda._is_importable = lambda module: module != "numba_cuda"
from bnarray import dispatch
try:
    dispatch.backend_of("cupy")
except ImportError as error:
    print(error)
"""
    assert run_python(code).strip() == (
        "arrays of cupy cannot be served, because bnarray.backends.cupy fails (ImportError: numba-cuda not installed; "
        "install them by pip install 'bnarray[cuda13]'); repair that installation, or convert the array, for example "
        "by cupy.asnumpy"
    )


def test_cupy_without_a_driver(run_python: Callable[..., str]) -> None:
    """The backend can be imported where there is no driver, and CuPy itself says that no array can be made."""
    cupy = pytest.importorskip("cupy", reason="CuPy is not installed; its backend is verified with a double alone")
    if cupy.is_available():
        pytest.skip("there is a GPU; what is said without one is not verified")
    code = """
from bnarray import cuda, dispatch
from bnarray.info import _declared
print(dispatch.backend_of("cupy").capabilities == _declared("cupy"))
print(cuda.obstacle())
"""
    assert run_python(code).splitlines() == [
        "True",
        "no NVIDIA driver is installed; install the driver, for an NVIDIA GPU",
    ]
