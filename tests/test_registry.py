"""Backends from outside, broken ones, and the promise that nobody else's framework is imported."""

import os
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import bnarray as bn
from bnarray import dispatch, info
from bnarray.backends import generic
from bnarray.backends import numpy as numpy_backend
from bnarray.dispatch import Capabilities

FRAMEWORKS = ("torch", "jax", "dask", "autograd", "array_api_strict")

#: Everything that touches dispatch, on NumPy arrays alone.
EVERYTHING = """
import numpy as np
import bnarray as bn
x, stats = np.ones((4, 3), np.float32), bn.RunningStats(3)
y, saved = bn.batch_norm_forward(x, np.ones(3), np.zeros(3), stats=stats, where=x > 0, residual=x)
bn.batch_norm_backward(y, saved)
bn.batch_norm(x, stats=stats, training=False, out=y)
layer = bn.BatchNorm(3, like=x)
layer.load_state_dict(layer.state_dict())
bn.fold(np.ones((3, 2)), None, layer)
(bn.moments(x) + bn.moments(x)).var()
stats.to(x)
for bad in ([1.0], None, np.ma.ones((2, 2)), object()):
    try:
        bn.batch_norm(bad)
    except TypeError:
        continue
    raise AssertionError(bad)
"""


def _path(folder: Path) -> str:
    return os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    yield
    for kept in (dispatch._registered, dispatch._verbs_of_library, dispatch._verbs_of_type):
        kept.clear()
    dispatch._entry_points.cache_clear()


def _stranger(library: str, **attributes: Any) -> Any:
    """An object whose type says that it comes from some library."""
    return type("Stranger", (), {"__module__": f"{library}.arrays", **attributes})()


def _point(library: str, value: str, load: Callable[[], Any]) -> SimpleNamespace:
    return SimpleNamespace(name=library, value=value, load=load)


# -- Who serves a library ----------------------------------------------------------------------------------------------


def test_who_goes_before_whom(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is registered, then bnarray's own file, then an entry point, then the generic backend."""

    def named(name: str) -> SimpleNamespace:
        return SimpleNamespace(check=lambda x, argument: name)

    points = [_point(library, f"{library}_bn", lambda: named("entry point")) for library in ("numpy", "stranger")]
    monkeypatch.setattr(dispatch, "_entry_points", lambda: {point.name: [point] for point in points})
    monkeypatch.setattr(dispatch._entry_points, "cache_clear", lambda: None, raising=False)

    def check(library: str, **attributes: Any) -> Any:
        dispatch._verbs_of_library.clear()
        dispatch._verbs_of_type.clear()
        return dispatch.backend(_stranger(library, **attributes)).check

    follows = {"__array_namespace__": lambda self: None}
    assert check("other", **follows) is generic.check
    assert check("stranger", **follows)(None, "x") == "entry point"
    assert check("numpy") is numpy_backend.check
    for library in ("numpy", "stranger"):
        bn.register_backend(library, named("registered"))
        assert check(library)(None, "x") == "registered"
    assert dispatch.default_backend().check(None, "x") == "registered"


@pytest.mark.parametrize("library", ["generic", "_strided", "_archive", "builtins", "no.identifier"])
def test_not_every_file_is_a_library(library: str) -> None:
    with pytest.raises(TypeError, match=r"x is a .*Stranger"):
        bn.batch_norm(_stranger(library))


def test_built_in() -> None:
    names = dispatch.built_in()
    assert {"numpy", "autograd"} <= set(names)
    assert not {"generic", "_strided", "_archive"} & set(names)


def test_register_backend_refuses() -> None:
    with pytest.raises(TypeError, match=r"module\.CAPABILITIES is \{'dtypes'"):
        bn.register_backend("stranger", SimpleNamespace(CAPABILITIES={"dtypes": ()}))
    with pytest.raises(TypeError, match=r"module\.moments is 3"):
        bn.register_backend("stranger", SimpleNamespace(moments=3))
    with pytest.raises(TypeError, match="name is ''"):
        bn.register_backend("", SimpleNamespace())
    assert "stranger" not in dispatch._registered
    bn.register_backend("stranger", SimpleNamespace(CAPABILITIES=Capabilities(("float32",))))
    assert dispatch.backend(_stranger("stranger")).capabilities.dtypes == ("float32",)


# -- Entry points ------------------------------------------------------------------------------------------------------

LIBRARY = """
class Array:
    def __init__(self, values):
        self.values = values
    shape = property(lambda self: self.values.shape)
    ndim = property(lambda self: self.values.ndim)
    dtype = property(lambda self: self.values.dtype)
"""

BACKEND = """
from bnarray.backends import generic

def check(x, name):
    return x

def moments(x, kept, where):
    return generic.moments(x.values, kept, where)
"""


def _distribution(folder: Path, name: str, entry_points: str) -> None:
    info = folder / f"{name}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[bnarray.backends]\n{entry_points}\n")


def test_entry_point_of_a_distribution(run_python: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "mylibrary.py").write_text(LIBRARY)
    (tmp_path / "mybackend.py").write_text(BACKEND)
    _distribution(tmp_path, "mydistribution", "mylibrary = mybackend")
    code = (
        "import sys, numpy, bnarray, mylibrary\n"
        "bnarray.moments(numpy.ones((3, 2)))\n"
        "assert 'mybackend' not in sys.modules\n"
        "print(bnarray.moments(mylibrary.Array(numpy.array([[1.0], [3.0]]))).mean)"
    )
    assert run_python(code, PYTHONPATH=_path(tmp_path)).strip() == "[2.]"


@pytest.mark.parametrize(
    ("backend", "message"),
    [
        ("import something_missing", "ModuleNotFoundError: No module named 'something_missing'"),
        ("moments = 3", "TypeError: module.moments is 3"),
        ("raise OSError('libstranger.so is missing')", "OSError: libstranger.so is missing"),
    ],
)
def test_broken_entry_point(run_python: Callable[..., str], tmp_path: Path, backend: str, message: str) -> None:
    """An error for arrays of its library, each time; for nobody else's."""
    (tmp_path / "mylibrary.py").write_text(LIBRARY)
    (tmp_path / "mybackend.py").write_text(backend)
    _distribution(tmp_path, "mydistribution", "mylibrary = mybackend")
    code = (
        "import numpy, bnarray, mylibrary\n"
        "for _ in range(2):\n"
        "    try:\n"
        "        bnarray.batch_norm(mylibrary.Array(numpy.ones((3, 2))))\n"
        "    except ImportError as error:\n"
        "        print(error)\n"
    )
    first, second = run_python(code + EVERYTHING, PYTHONPATH=_path(tmp_path)).splitlines()
    assert first == second
    assert first.startswith("arrays of mylibrary cannot be served, because the entry point mybackend fails")
    assert message in first


def test_two_entry_points(run_python: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "mylibrary.py").write_text(LIBRARY)
    (tmp_path / "mybackend.py").write_text(BACKEND)
    _distribution(tmp_path, "one", "mylibrary = mybackend")
    _distribution(tmp_path, "two", "mylibrary = another")
    code = (
        "import numpy, bnarray, mylibrary, mybackend\n"
        "x = mylibrary.Array(numpy.ones((3, 2)))\n"
        "try:\n"
        "    bnarray.moments(x)\n"
        "except ImportError as error:\n"
        "    print(error)\n"
        "bnarray.register_backend('mylibrary', mybackend)\n"
        "print(bnarray.moments(x).mean)"
    )
    refused, chosen = run_python(code, PYTHONPATH=_path(tmp_path)).splitlines()
    assert "several entry points want to: another, mybackend; choose one by bnarray.register_backend" in refused
    assert chosen == "[1. 1.]"


def test_entry_points_cost_numpy_nothing(run_python: Callable[..., str]) -> None:
    assert run_python("import sys, bnarray; print('importlib.metadata' in sys.modules)").strip() == "False"
    forbidden = (
        "import importlib.metadata\n"
        "def forbidden(**group):\n"
        "    assert group.get('group') != 'bnarray.backends'\n"
        "    return old(**group)\n"
        "old, importlib.metadata.entry_points = importlib.metadata.entry_points, forbidden\n"
    )
    run_python(forbidden + EVERYTHING.replace(", object()", ""))


# -- The page of supported libraries -----------------------------------------------------------------------------------


def test_support_page_is_what_backends_declare() -> None:
    """To make it anew: bnarray info --libraries > docs/support.md."""
    page = Path(__file__).parents[1] / "docs" / "support.md"
    assert page.read_text(encoding="utf-8") == info.support()


# (What needs packages for CUDA is in tests/cuda.)
@pytest.mark.parametrize("name", ["generic", *(name for name in dispatch.built_in() if name != "cupy")])
def test_support_page_reads_what_a_backend_has(name: str) -> None:
    """Reading a backend's file and importing it give the same declaration."""
    module = pytest.importorskip(
        f"bnarray.backends.{name}",
        reason=f"{name} is not installed: that its declaration is read right is not verified",
    )
    assert info._declared(name) == module.CAPABILITIES


def test_support_page_imports_no_framework(run_python: Callable[..., str]) -> None:
    code = "import sys; from bnarray.cli import main; main(['info', '--libraries']); print(*sys.modules)"
    *page, modules = run_python(code).splitlines()
    assert "| numpy | float16, bfloat16, float32, float64 | yes |" in "\n".join(page)
    assert not set(modules.split()) & set(FRAMEWORKS)


# -- Other people's frameworks -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_numpy_arrays_import_no_framework(run_python: Callable[..., str], framework: str) -> None:
    if find_spec(framework) is None:
        pytest.skip(f"{framework} is not installed: that NumPy arrays do not import it is not verified")
    assert run_python(f"{EVERYTHING}\nimport sys; print({framework!r} in sys.modules)").strip() == "False"


@pytest.mark.parametrize("framework", [*FRAMEWORKS, "cupy"])
def test_broken_framework(run_python: Callable[..., str], tmp_path: Path, framework: str) -> None:
    """An installation whose import raises disturbs nobody, and arrays that say they are its own get a clear error."""
    (tmp_path / framework).mkdir()
    (tmp_path / framework / "__init__.py").write_text("raise RuntimeError('broken on purpose')")
    code = EVERYTHING + (
        f"\nkind = type('Stranger', (), {{'__module__': '{framework}.arrays'}})\n"
        "try:\n"
        "    bn.batch_norm(kind())\n"
        "except Exception as error:\n"
        "    print(type(error).__name__, error)\n"
    )
    seen = run_python(code, PYTHONPATH=_path(tmp_path))
    if framework in dispatch.built_in():
        assert seen.startswith(f"ImportError arrays of {framework} cannot be served")
        assert "RuntimeError: broken on purpose" in seen
    else:
        assert seen.startswith(f"TypeError x is a {framework}.arrays.Stranger")
