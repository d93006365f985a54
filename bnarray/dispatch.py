"""From the type of an array to the backend that serves it.

A backend is a module of verbs (see `VERBS`) on whole arrays; what it leaves out, `backends/generic.py` does. It is
imported by name when the first array of its library arrives, so that no library is imported which the user did not.
"""

from importlib import import_module
from importlib.util import find_spec
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple, TypeAlias

Array: TypeAlias = Any
Verbs: TypeAlias = Any  # a namespace with a function for each of VERBS

#: What functional, stats and layer ask of a backend; each is documented in `backends/generic.py`.
VERBS = (
    *("check", "check_where", "check_out", "overlap"),
    *("empty_like", "zeros", "copy", "guide", "widen", "cast", "parameter_dtype", "freeze", "to_numpy", "convert"),
    *("cleared", "vector", "of_vector"),
    *("is_traced", "is_symbolic", "traced_statistic", "traced_forward", "traced_moments"),
    *("moments", "normalize", "forward", "grad_sums", "grad_input", "backward"),
    *(
        "along",
        "merge",
        "variance",
        "sum_of_squares",
        "only_above",
        "invstd",
        "prepare",
        "update_stats",
        "is_finite",
        "lowest",
        "refusal",
        "choose",
    ),
)


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
    gradients: str = "batch_norm_backward"  # how they are had
    transforms: tuple[str, ...] = ()  # of the library, under which calls work


# The part of a type's module before the first dot, where it is not the library's own name.
_LIBRARY_OF_ROOT = {"jaxlib": "jax"}

_registered: dict[str, ModuleType] = {}
_verbs_of_library: dict[str, Verbs] = {}
_verbs_of_type: dict[type, Verbs] = {}


def load(name: str) -> ModuleType:
    """Import a module of `bnarray.backends`."""
    return import_module(f"bnarray.backends.{name}")


def register_backend(name: str, module: ModuleType) -> None:
    """Add an array library from outside, or replace how one is served.

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
    for verb in VERBS:
        if not callable(getattr(module, verb, len)):
            raise TypeError(f"module.{verb} is {getattr(module, verb)!r}; it should be a function")
    _registered[name] = module
    _verbs_of_library.pop(name, None)
    _verbs_of_type.clear()


def _verbs(library: str, module: Any) -> Verbs:
    if library not in _verbs_of_library:
        generic = load("generic")
        verbs = {verb: getattr(module, verb, None) or getattr(generic, verb) for verb in VERBS}
        _verbs_of_library[library] = SimpleNamespace(library=library, **verbs)
    return _verbs_of_library[library]


def _find(kind: type) -> Verbs | None:
    for base in kind.__mro__:
        root = base.__module__.partition(".")[0]
        library = _LIBRARY_OF_ROOT.get(root, root)
        if library in _registered:
            return _verbs(library, _registered[library])
        if library.isidentifier() and find_spec(f"bnarray.backends.{library}") is not None:
            return _verbs(library, load(library))
    if hasattr(kind, "__array_namespace__"):
        return _verbs(kind.__module__.partition(".")[0], load("generic"))
    return None


def backend(x: Array, name: str = "x") -> Verbs:
    """Return the verbs for x's library; `name` is what x is called in errors.

    Raises
    ------
    TypeError
        If x is no array of a library that follows the Array API standard.
    """
    kind = type(x)
    verbs = _verbs_of_type.get(kind)
    if verbs is None:
        verbs = _find(kind)
        if verbs is None:
            raise TypeError(
                f"{name} is a {kind.__module__}.{kind.__qualname__}; it should be an array of NumPy, or of a library "
                f"that follows the Array API standard: convert it, for example by numpy.asarray"
            )
        _verbs_of_type[kind] = verbs
    return verbs


def default_backend() -> Verbs:
    """Return the verbs for NumPy, where state lives unless it is told otherwise."""
    return _verbs("numpy", load("numpy"))


def same_backend(verbs: Verbs, of: str, name: str, array: Array) -> None:
    """Check that an array, if it is not None, belongs to the library whose verbs are given, that of the argument `of`.

    Raises
    ------
    TypeError
        Naming both libraries and the conversion.
    """
    if array is None or _verbs_of_type.get(type(array)) is verbs:
        return
    other = backend(array, name)
    if other is not verbs:
        raise TypeError(
            f"{name} is an array of {other.library} and {of} one of {verbs.library}; convert one of them, for "
            f"example by {verbs.library}'s from_dlpack({name})"
        )
