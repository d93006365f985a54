"""The way from a kernel to a launch, as far as it goes without a GPU."""

import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("numba_cuda", reason="numba-cuda is not installed; launching CUDA kernels is not verified")
if os.environ.get("NUMBA_ENABLE_CUDASIM") == "1":
    pytest.skip("Numba simulates devices here; launching is not verified", allow_module_level=True)

from cuda import pathfinder
from cuda.bindings import nvjitlink

from bnarray.kernels.cuda import compiled, memory, moments, running, streams, together
from bnarray.kernels.cuda.compiled import Kernel
from bnarray.kernels.cuda.walk import Shape

SHAPE = Shape(32, 1, 1)


def test_code_is_kept_on_disk_for_each_capability(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BNARRAY_CACHE_DIR", str(tmp_path))
    kernel = running.kernel()
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
    arguments = (0, 0, 0, 0, 0, 0, sizes, 0, sizes, 0, sizes, 0, 0, 0, 0, 0)
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
from bnarray.kernels.cuda import running
print(len(running.kernel().compile((9, 0))[0]) > 0, "row_stack" in vars(np))
"""
    assert run_python(code).split() == ["True", "False"]


def test_a_device_that_is_too_old_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class DeviceDouble:
        def __init__(self, number: int) -> None:
            self.compute_capability = 7, 0

    monkeypatch.setattr("cuda.core.Device", DeviceDouble)
    with pytest.raises(RuntimeError, match=r"device 3 has compute capability 7\.0, and kernels need 7\.5 .*NumPy"):
        running.kernel().launch(3, 0, 1, 1)


# -- Where something is missing: Numba's dispatcher --------------------------------------------------------------------


class NumbaDouble:
    """What of numba.cuda a launch takes; it notes what it is asked for. No GPU has any part in it."""

    def __init__(self) -> None:
        self.compiled: list[Any] = []
        self.launched: list[Any] = []

    def get_current_device(self) -> Any:
        return SimpleNamespace(compute_capability=(9, 0))

    def jit(self, signature: Any, **options: Any) -> Callable[..., Any]:
        self.compiled.append((signature, options))
        return lambda function: DispatcherDouble(self.launched, function)

    def external_stream(self, handle: int) -> str:
        return f"stream {handle}"


class DispatcherDouble:
    def __init__(self, launched: list[Any], function: Any) -> None:
        self._launched, self._function = launched, function

    def __getitem__(self, configuration: Any) -> Callable[..., None]:
        return lambda *arguments: self._launched.append((configuration, self._function, arguments))


class DeviceDouble:
    def __init__(self, number: int) -> None:
        self.compute_capability = 9, 0


@pytest.fixture
def numba(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[NumbaDouble]:
    double = NumbaDouble()
    compiled._versions.cache_clear()
    monkeypatch.setenv("BNARRAY_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(compiled, "cuda", double)
    monkeypatch.setattr(compiled, "obstacles", [])
    monkeypatch.setattr("cuda.core.Device", DeviceDouble)
    yield double
    compiled._versions.cache_clear()


def _lack_core(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("cuda.core.launch")


def _lack_linker(monkeypatch: pytest.MonkeyPatch) -> None:
    def version() -> None:
        raise pathfinder.DynamicLibNotFoundError("libnvJitLink.so")

    monkeypatch.setattr(nvjitlink, "version", version)


def _refuse(monkeypatch: pytest.MonkeyPatch) -> None:
    def complete(linker: int) -> None:
        raise nvjitlink.nvJitLinkError(nvjitlink.Result.ERROR_INVALID_INPUT)

    monkeypatch.setattr(nvjitlink, "complete", complete)
    monkeypatch.setattr(NumbaDouble, "compile", staticmethod(compiled.cuda.compile), raising=False)


@pytest.mark.parametrize(
    ("lack", "why"),
    [
        (_lack_core, "cuda-core does not launch kernels"),
        (_lack_linker, "nvJitLink does not load"),
        (_refuse, "nvJitLink refuses a kernel"),
    ],
)
def test_numbas_dispatcher_stands_in(
    lack: Callable[[pytest.MonkeyPatch], None],
    why: str,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lack(monkeypatch)  # before there is a double for what compiles
    numba = request.getfixturevalue("numba")
    running.kernel.cache_clear()
    kernel = running.kernel()
    with pytest.warns(RuntimeWarning, match=f"launched by Numba's dispatcher, .* because {why}.*pip install"):
        kernel.launch(0, 17, 5, 1, 2, (3, 4), 0x100)
    kernel.launch(0, 0, 6, 1, 2, (3, 4), 0x100)  # says nothing more, and compiles nothing
    running.kernel.cache_clear()
    assert numba.compiled == [(kernel.signature, {"launch_bounds": (compiled.THREADS, 4), "lto": False})]
    assert numba.launched == [
        ((5, compiled.THREADS, "stream 17"), kernel.function, (1, 2, (3, 4), 0x100)),
        ((6, compiled.THREADS, 0), kernel.function, (1, 2, (3, 4), 0x100)),
    ]
    assert together.most_parts(0) == 0  # two launches a pass from now on


def test_streams_wait_by_numbas_events(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    class EventDouble:
        def record(self, stream: Any) -> None:
            asked.append(("record", stream))

        def wait(self, stream: Any) -> None:
            asked.append(("wait", stream))

    double = SimpleNamespace(event=lambda timing: EventDouble(), external_stream=lambda handle: f"stream {handle}")
    for module in (streams, compiled):
        monkeypatch.setattr(module, "cuda", double)
    monkeypatch.delattr("cuda.core.Stream")
    mark = streams.Mark(0)
    mark.set(17)
    mark.await_by(0)
    assert asked == [("record", "stream 17"), ("wait", 0)]


def test_contexts_are_numbas_where_cuda_core_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[int] = []
    monkeypatch.setattr(compiled, "_contexts", compiled._Contexts())
    monkeypatch.setattr(compiled, "cuda", SimpleNamespace(select_device=chosen.append))
    monkeypatch.delattr("cuda.core.Device")
    compiled.make_current(1)
    compiled.make_current(1)
    assert chosen == [1]


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
