"""What the benchmarks of the suite are run over, and the calls that they time, checked.

The tables are only ever appended to: asv knows a result by its parameters, so a changed one is a history lost. Old
commits of the project run through here too: nothing but public names is used, and what a commit lacks is n/a.
"""

from collections.abc import Callable
from functools import lru_cache
from importlib.util import find_spec
from typing import Any

from benchmarks import compare

LIBRARIES = ["numpy out=", "numpy", "torch", "jax"]
SHAPES = ["32x64", "4096x512", "32x256x14x14", "32x64x56x56"]
LAYOUTS = ["channels first", "channels last"]
DTYPES = ["float32", "bfloat16"]
THREADS = [2, 1]
NAMES = ["library", "shape", "layout", "dtype", "threads"]

#: By library, what `compare` calls bnarray's call on its arrays.
_NAMES_THERE = {"numpy out=": "bnarray out=", "numpy": "bnarray", "torch": "bnarray torch", "jax": "bnarray jax"}
_CHECKED = 3  # features: each one's result depends on its own values alone
_TOLERANCES = {"float32": 1e-4, "bfloat16": 5e-2}


def sizes(shape: str) -> tuple[int, ...]:
    return tuple(int(size) for size in shape.split("x"))


def case(shape: str, layout: str, dtype: str) -> compare.Case:
    """Return the arrays of a row; n/a where one layout is the other."""
    plane = len(sizes(shape)) == 2
    if plane and layout == "channels first":
        raise NotImplementedError("the same memory as channels last")
    return compare.Case(sizes(shape), layout == "channels last" and not plane, dtype)


def need(*modules: str) -> None:
    """Make the benchmark n/a where a module is not there."""
    for module in modules:
        if find_spec(module) is None:
            raise NotImplementedError(f"{module} is not there")


def use_threads(threads: int) -> None:
    """Let bnarray, and torch where it is in use, have so many threads; n/a where the process has fewer."""
    import sys

    import numba

    if threads > numba.config.NUMBA_NUM_THREADS:
        raise NotImplementedError(f"{threads} threads are more than NUMBA_NUM_THREADS")
    numba.set_num_threads(threads)
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(threads)


def _is_measured(library: str, dtype: str, threads: int) -> bool:
    """Of all combinations: every library in float32 with two threads, and the others where memory is given."""
    return (dtype, threads) == ("float32", 2) or (library == "numpy out=" and (dtype == "float32" or threads == 2))


@lru_cache(maxsize=1)  # asv sets up again before every call that it times
def checked_call(step: str, library: str, shape: str, layout: str, dtype: str, threads: int) -> Callable[[], Any]:
    """Return the call of a step of `compare` on drawn arrays, found to agree with the formula in float64.

    Raises
    ------
    NotImplementedError
        If the combination is not measured, or something is not there that it needs.
    """
    if not _is_measured(library, dtype, threads):
        raise NotImplementedError("not measured")
    if library in ("torch", "jax"):
        need(library, f"bnarray.backends.{library}")
    arrays = case(shape, layout, dtype)
    name = _NAMES_THERE[library]
    calls = {
        "torch": lambda: compare.with_torch(arrays, step, (name,)),
        "jax": lambda: compare.with_jax(arrays, step, (name,)),
    }.get(library, lambda: compare.ours(arrays, step))()
    if name not in calls:
        raise NotImplementedError(f"{library} has no {step} of its own, or not for {dtype}")
    use_threads(threads)
    call = calls[name]
    check(arrays, step, call())
    if hasattr(call, "checked"):
        call.checked = True
    return call


def check(arrays: compare.Case, step: str, result: Any) -> None:
    """Compare the first features with the formula in float64."""
    import numpy as np

    from bnarray.testing import reference

    some = slice(_CHECKED)
    truth = reference(
        arrays.x[:, some],
        arrays.dy[:, some],
        (1,),
        weight=arrays.weight[some],
        bias=arrays.bias[some],
        eps=compare.EPS,
        statistics=(arrays.mean[some], arrays.var[some]) if step == "evaluation" else None,
    )
    expected = truth.dx if step in ("backward", "both") else truth.y
    tolerance = _TOLERANCES[arrays.dtype]
    np.testing.assert_allclose(compare.as_numpy(result)[:, some], expected, rtol=tolerance, atol=tolerance)
