"""From the type of an array to the backend that serves it.

A backend is a module of verbs (see `VERBS`) on whole arrays; what it leaves out, `backends/generic.py` does. It is
imported by name when the first array of its library arrives, so that no library is imported which the user did not.

Who serves a library: what `register_backend` was given, else a file of `backends/`, else the entry point of the group
`bnarray.backends` with the library's name, else the generic backend, if the arrays follow the Array API standard.
"""

import sys
from collections.abc import Callable
from contextlib import suppress
from functools import lru_cache
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple, TypeAlias

Array: TypeAlias = Any
Verbs: TypeAlias = Any  # a namespace with a function for each of VERBS

#: What functional, stats and layer ask of a backend; each is documented in `backends/generic.py`.
VERBS = (
    *("check", "check_where", "check_out", "overlap", "device"),
    *("empty_like", "zeros", "copy", "guide", "widen", "cast", "parameter_dtype", "freeze", "to_numpy", "convert"),
    *("cleared", "vector", "of_vector", "is_traced", "is_symbolic", "traced_statistic"),
    *("joins", "traced_forward", "traced_backward", "traced_moments"),
    *("moments", "normalize", "forward", "grad_sums", "grad_input", "backward"),
    *("along", "merge", "variance", "sum_of_squares", "only_above", "invstd"),
    *("stats_type", "prepare", "current", "update_stats", "is_finite", "lowest", "number", "refusal", "choose"),
)


#: What functional asks besides, of a backend that plans calls once: no verbs, because they are about calls.
PLANNING = ("signature", "signature_of_gradient", "again")


class Transform(NamedTuple):
    """What is done to x, as verbs take it: ``relu((x - mean) * invstd * weight + bias + residual)``.

    ``invstd = 1 / sqrt(m2 / count + eps)``. The arrays are the verbs' vectors, of the features' shape; `kept` are the
    feature axes, ascending.
    """

    kept: tuple[int, ...]
    count: Any  # a number or an array
    mean: Array
    m2: Array
    eps: float
    weight: Array | None
    bias: Array | None
    relu: bool
    residual: Array | None
    guide: Any = None  # for a backend whose sums follow memory: how that was before `out` took it


class Capabilities(NamedTuple):
    """What a backend does for its arrays, declared once, as ``CAPABILITIES`` in its module.

    The tests' marks, the table in the documentation and what benchmarks leave out are made from it.
    """

    dtypes: tuple[str, ...] = ("float32", "float64")
    runs: str = "the library's own functions"  # what does the work
    layouts: bool = False  # arrays have strides, and results those of x
    out: bool = True  # results can be written into an array that is given
    lazy: bool = False  # results are computed when they are asked for
    devices: bool = False  # arrays live on one of several, which `device` tells and a call may not mix
    gradients: str = "batch_norm_backward"  # how they are had
    transforms: tuple[str, ...] = ()  # of the library, under which calls work
    parameters: tuple[str, ...] = ()  # other libraries whose arrays are taken as weight and bias


# The part of a type's module before the first dot, where it is not the library's own name.
_LIBRARY_OF_ROOT = {"jaxlib": "jax"}

#: How a distribution declares the backend of a library: ``[project.entry-points."bnarray.backends"]``.
ENTRY_POINTS = "bnarray.backends"

_registered: dict[str, Any] = {}
_verbs_of_library: dict[str, Verbs] = {}
_verbs_of_type: dict[type, Verbs] = {}


def load(name: str) -> ModuleType:
    """Import a module of `bnarray.backends`."""
    return import_module(f"bnarray.backends.{name}")


def register_backend(name: str, module: Any) -> None:
    """Add an array library from outside, or replace how one is served.

    It goes before an entry point of the group ``bnarray.backends`` and before what bnarray has itself.

    Parameters
    ----------
    name
        The library: the first part of the name of the module that defines its array type.
    module
        A module, or any object, with functions named like those of ``bnarray/backends/generic.py`` for what the
        library does better; the others are taken from there.

    Raises
    ------
    TypeError
        If name is no string, or something named like a verb cannot be called.

    Examples
    --------
    >>> from types import SimpleNamespace
    >>> import bnarray as bn
    >>> bn.register_backend("mylibrary", SimpleNamespace())  # everything as the generic backend does it
    """
    if not isinstance(name, str) or not name:
        raise TypeError(f"name is {name!r}; it should be the name of an array library")
    _registered[name] = _checked(module)
    _verbs_of_library.pop(name, None)
    _verbs_of_type.clear()


def _checked(module: Any) -> Any:
    for verb in VERBS:
        if not callable(getattr(module, verb, len)):
            raise TypeError(f"module.{verb} is {getattr(module, verb)!r}; it should be a function")
    capabilities = getattr(module, "CAPABILITIES", None)
    if not isinstance(capabilities, Capabilities | None):
        raise TypeError(f"module.CAPABILITIES is {capabilities!r}; it should be bnarray.dispatch.Capabilities")
    return module


def _verbs(library: str, module: Any) -> Verbs:
    if library not in _verbs_of_library:
        generic = load("generic")
        verbs = {verb: getattr(module, verb, None) or getattr(generic, verb) for verb in (*VERBS, *PLANNING)}
        _verbs_of_library[library] = SimpleNamespace(
            library=library,
            capabilities=getattr(module, "CAPABILITIES", generic.CAPABILITIES),
            # A library whose arrays hold those of another, and may come together with them.
            wraps=getattr(module, "WRAPS", None),
            **verbs,
        )
    return _verbs_of_library[library]


def built_in() -> tuple[str, ...]:
    """Return the names of the libraries that have a file in `bnarray.backends`."""
    from pkgutil import iter_modules  # rarely needed

    names = (module.name for module in iter_modules(import_module("bnarray.backends").__path__))
    return tuple(sorted(name for name in names if _is_built_in(name)))


def _is_built_in(library: str) -> bool:
    return (
        library.isidentifier()
        and library != "generic"
        and not library.startswith("_")
        and find_spec(f"bnarray.backends.{library}") is not None
    )


@lru_cache(maxsize=1)
def _entry_points() -> dict[str, list[Any]]:
    from importlib.metadata import entry_points  # slow to import, and rarely needed

    found: dict[str, list[Any]] = {}
    for point in entry_points(group=ENTRY_POINTS):
        found.setdefault(point.name, []).append(point)
    return found


# How an array becomes one of NumPy's, where NumPy does not know.
_TO_NUMPY = {"cupy": "cupy.asnumpy"}


def _imported(library: str, what: str, load: Callable[[], Any]) -> Any:
    """A backend's module; one that cannot be had disturbs arrays of its own library only."""
    try:
        return _checked(load())
    except Exception as error:
        raise ImportError(
            f"arrays of {library} cannot be served, because {what} fails ({type(error).__name__}: {error}); repair "
            f"that installation, or convert the array, for example by {_TO_NUMPY.get(library, 'numpy.asarray')}"
        ) from error


def _module(library: str) -> Any:
    """The module that serves a library; None if nobody has made one for it."""
    if library in _registered:
        return _registered[library]
    if _is_built_in(library):
        return _imported(library, f"bnarray.backends.{library}", lambda: load(library))
    points = [] if library == "builtins" else _entry_points().get(library, [])
    if len({point.value for point in points}) > 1:
        raise ImportError(
            f"arrays of {library} cannot be served, because several entry points want to: "
            f"{', '.join(sorted(point.value for point in points))}; choose one by bnarray.register_backend"
        )
    return _imported(library, f"the entry point {points[0].value}", points[0].load) if points else None


def _library(kind: type) -> str:
    root = kind.__module__.partition(".")[0]
    return _LIBRARY_OF_ROOT.get(root, root)


def _find(x: Array) -> Verbs | None:
    for base in type(x).__mro__:
        library = _library(base)
        module = _module(library)
        if module is not None:
            return _verbs(library, module)
    generic = load("generic")
    return _verbs(_library(type(x)), generic) if generic.is_array(x) else None


# What to write instead of an object that is no array of a library: by the type's full name, or its module's first part.
_CONVERSIONS = {
    "builtins.bytes": "numpy.frombuffer({0}, dtype=numpy.float32), with the dtype that it holds",
    "builtins.bytearray": "numpy.frombuffer({0}, dtype=numpy.float32), with the dtype that it holds",
    "onnx": "onnx.numpy_helper.to_array({0})",
    "pandas": "{0}.to_numpy()",
    "pint": "{0}.magnitude",
    "polars": "{0}.to_numpy()",
    "pyarrow.lib.RecordBatch": "numpy.column_stack({0}.columns)",
    "pyarrow.lib.Tensor": "{0}.to_numpy()",
    "pyarrow.lib.Table": "numpy.column_stack({0}.columns)",
    "pyarrow": "{0}.to_numpy(zero_copy_only=False) (with nulls also "
    "where={0}.is_valid().to_numpy(zero_copy_only=False))",
    "scipy": "{0}.toarray()",
    "tensorflow": "{0}.numpy()",
    "xarray": "{0}.data",
}


def _conversion(kind: type, name: str) -> str:
    for base in kind.__mro__:
        for key in (f"{base.__module__}.{base.__qualname__}", base.__module__.partition(".")[0]):
            if key in _CONVERSIONS:
                return _CONVERSIONS[key].format(name)
    if hasattr(kind, "__cuda_array_interface__"):
        return f"cupy.asarray({name}), which copies nothing"
    return f"numpy.asarray({name})"


# What a framework's compilers and transformations have to know before they come upon a call, by framework: its backend,
# or what makes statistics known to it.
_unmet = {"torch": "torch", "jax": "_jax_trees"}


def meet() -> None:
    """Get ready for those frameworks that the user has imported and that leave no time for it amid a call."""
    for library in [each for each in _unmet if sys.modules.get(each) is not None]:
        module = _unmet.pop(library)
        with suppress(Exception):  # a broken framework is told of when an array of it arrives
            types = getattr(load(module), "TYPES", ())
            if library not in _registered:
                _verbs_of_type.update((each, backend_of(library)) for each in types)


def backend(x: Array, name: str = "x") -> Verbs:
    """Return the verbs for x's library; `name` is what x is called in errors.

    Raises
    ------
    TypeError
        If x is no array of a library that is served: those of `bnarray.backends`, those that were registered or have
        an entry point, and all that follow the Array API standard.
    ImportError
        If the backend for it cannot be imported.
    """
    kind = type(x)
    verbs = _verbs_of_type.get(kind)
    if verbs is None:
        verbs = _find(x)
        if verbs is None:
            way_out = "" if x is None else f": convert it by {_conversion(kind, name)}"
            raise TypeError(
                f"{name} is a {kind.__module__}.{kind.__qualname__}; it should be an array of NumPy, or of a library "
                f"that follows the Array API standard{way_out}"
            )
        _verbs_of_type[kind] = verbs
    return verbs


def backend_of(library: str) -> Verbs:
    """Return the verbs for a library by its name: the generic ones where nobody has made others."""
    return _verbs(library, _module(library) or load("generic"))


def default_backend() -> Verbs:
    """Return the verbs for NumPy, where state lives unless it is told otherwise."""
    return _verbs_of_library.get("numpy") or backend_of("numpy")


def wrapping(verbs: Verbs, *arrays: Array | None) -> Verbs:
    """Return the verbs of the library that wraps the arrays of the given one, if one of the arrays is such."""
    for array in arrays:
        if array is None or _verbs_of_type.get(type(array)) is verbs:  # nearly always
            continue
        other = backend(array)
        if other.wraps == verbs.library:
            return other
    return verbs


# How an array is made of another library's, given to another, and moved to another device, where not as the standard
# has it.
_FROM_ANOTHER = {
    "autograd": "numpy.asarray({})",
    "cupy": "cupy.asarray({})",
    "dask": "dask.array.from_array(numpy.asarray({}))",
    "jax": "jax.numpy.from_dlpack({})",
    "numpy": "numpy.asarray({})",
    "torch": "torch.tensor(numpy.array({}))",  # its from_dlpack aborts the process at a negative stride of NumPy's
}
_TO_ANOTHER = {"autograd": "autograd.tracer.getval({})", "cupy": "cupy.asnumpy({})", "dask": "{}.compute()"}
_TO_DEVICE = {"cupy": "{}.copy() inside 'with {}.device:'", "torch": "{}.to({}.device)"}


def backend_with(verbs: Verbs, of: str, x: Array, name: str, array: Array | None, also: tuple[str, ...] = ()) -> Verbs:
    """Return the verbs for a call in which the array `name` comes with x, which is called `of`.

    They are the given ones, x's, or those of the library that wraps one of the two. `also` are names of other libraries
    whose array will do.

    Raises
    ------
    TypeError
        If they are of different libraries, or on different devices; it names both, and the conversion.
    """
    if array is None:
        return verbs
    other = _verbs_of_type.get(type(array)) or backend(array, name)
    if other is not verbs:
        if other.wraps == verbs.library:
            return other
        if verbs.wraps != other.library and other.library not in also:
            given = _TO_ANOTHER.get(other.library, "{}").format(name)
            conversion = _FROM_ANOTHER.get(verbs.library, f"{verbs.library}.from_dlpack({{}})").format(given)
            raise TypeError(
                f"{name} is an array of {other.library} and {of} one of {verbs.library}; convert one of them, for "
                f"example by {conversion}"
            )
    elif verbs.capabilities.devices and verbs.device(array) != verbs.device(x):
        move = _TO_DEVICE.get(verbs.library, "{}.to_device({}.device)").format(name, of)
        raise TypeError(
            f"{name} is on the device {verbs.device(array)} and {of} on {verbs.device(x)}; move one of them, for "
            f"example by {move}"
        )
    return verbs
