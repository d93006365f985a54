"""Compilation on first use, through the disk."""

import os
import pickle
import threading
from collections.abc import Callable
from functools import cached_property
from typing import Any

from bnarray.kernels import disk  # isort: skip  # before any other kernel module: it takes the sources' digest
from numba import config, njit, types
from numba.core.caching import _Cache
from numba.core.codegen import JITCodeLibrary
from numba.core.compiler import Compiler, CompileResult
from numba.core.registry import cpu_target
from numba.core.serialize import dumps
from numba.extending import intrinsic

# The caller's Numba settings that change the machine code; those of the processor are in the codegen's own tuple.
_SETTINGS = ("OPT", "BOUNDSCHECK", "DEBUGINFO_DEFAULT", "LOOP_VECTORIZE", "SLP_VECTORIZE", "ENABLE_AVX")


class _Part(JITCodeLibrary):  # type: ignore[misc]  # Numba is not typed throughout
    """The code of a function that nobody calls but kernels: optimised and turned into machine code with each of them.

    Some hundred such functions, each brought to the end by itself, took a quarter of a first call's time.
    """

    # Numba sets the environment of a function where its machine code is, and there is none.
    @property
    def codegen(self) -> "_Part":
        return self

    def set_env(self, name: str, env: Any) -> None: ...

    def get_pointer_to_function(self, name: str) -> int:
        self._ensure_finalized()
        return 0  # no such function here, as Numba puts it

    def _optimize_final_module(self) -> None: ...

    def _finalize_final_module(self) -> None:
        self._finalize_dynamic_globals()
        self._verify_declare_only_symbols()
        self._finalized = True


class _PartCompiler(Compiler):  # type: ignore[misc]  # Numba is not typed throughout
    def define_pipelines(self) -> Any:
        self.state.library = _Part(self.state.targetctx.codegen(), self.state.func_id.func_qualname)
        return super().define_pipelines()


#: Decorators of the functions that kernels are made of.
# `contract` is all the licence there is: sums are vectorised by the way they are written (lanes.py).
# Kernels own no memory (`memory.carve`), so that nothing counts references: counting, which is atomic, took more than
# half of the time on short rows.
_options = {"error_model": "numpy", "nogil": True, "_nrt": False}
PART = {"no_cpython_wrapper": True, "no_cfunc_wrapper": True, "pipeline_class": _PartCompiler, **_options}
mapping = njit(fastmath={"contract"}, **PART)
machinery = njit(**PART)

# The types that kernels' arguments are made of. Inputs are read-only types, which writable arrays convert to.
index = types.int64
number = types.float64
flag = types.boolean
vector = types.Array(types.float64, 1, "C", readonly=True)
table = types.Array(types.int64, 2, "C", readonly=True)
indices = types.Array(types.int64, 1, "C", readonly=True)
counter = types.Array(types.int64, 1, "C")
scratch = types.Array(types.uint8, 1, "C")
partials = types.Array(types.float64, 2, "C")
results = types.Array(types.float64, 1, "C")


# A fork waits for a compilation under way, so that no child inherits a lock that nobody will release.
_compiling = threading.RLock()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=_compiling.acquire, after_in_parent=_compiling.release, after_in_child=_compiling.release
    )


class _OnDisk(_Cache):  # type: ignore[misc]  # Numba is not typed throughout
    """Numba's interface to a cache, over `disk`.

    Numba's own ``cache=True`` does not see an edit in another file, and lets processes that start together overwrite
    each other's files; here a kernel is one file, under a folder named after everything it was made from.
    """

    def __init__(self, name: str) -> None:
        self._name = name

    @property
    def cache_path(self) -> str:
        return str(disk.folder())

    def _target(self) -> str:
        codegen = cpu_target.target_context.codegen()
        settings = [(name, getattr(config, name, None)) for name in _SETTINGS]
        return f"{codegen.magic_tuple()} {settings}"

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        target_context.refresh()
        payload = disk.load(self._name, self._target())
        return None if payload is None else CompileResult._rebuild(target_context, *pickle.loads(payload))

    def save_overload(self, sig: Any, data: Any) -> None:
        disk.save(self._name, self._target(), dumps(data._reduce()))

    def enable(self) -> None: ...

    def disable(self) -> None: ...

    def flush(self) -> None: ...


def named(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Give a function made inside another one a name of its own, before it is compiled.

    Numba's symbols are made of names and argument types. Two functions that share both, compiled in two processes and
    kept on disk, would be taken for one another in a third.
    """
    function.__name__ = function.__qualname__ = name
    return function


@intrinsic
def in_half_vectors(typingctx, like):
    """Have the loops over float32 of the function that calls this made of vectors of 256 bits, where 512 are slower.

    Where memory does not begin with a line of the cache, every vector of 512 bits lies across two. Normalising columns
    of 17 MB took 0.7 of the time (AMD Zen 5; for many of Intel's processors LLVM chooses 256 by itself).
    """

    def codegen(context, builder, signature, args):
        if like == types.float32:
            attributes = builder.function.attributes
            attributes.add("noinline")
            set.add(attributes, '"prefer-vector-width"="256"')  # whose own `add` knows none of a processor's
        return context.get_dummy_value()

    return types.void(like), codegen


class Kernel:
    """A function with one signature, compiled (or loaded from disk) when it is first called.

    `call` it: an attribute costs less than a method where a call takes half a microsecond.
    """

    call: Callable[..., Any]

    def __init__(self, name: str, signature: Any, function: Callable[..., Any], *, for_c: bool = False) -> None:
        self._signature = signature
        self.kinds = signature.args
        named(name, function)
        self._dispatcher = njit(no_cfunc_wrapper=not for_c, **_options)(function)
        self._dispatcher._cache = _OnDisk(name)
        self.call = self._compile_and_call

    def _compile_and_call(self, *arguments: Any) -> Any:
        self.compile()
        return self.call(*arguments)

    def _find(self, which: str) -> int:
        self.compile()
        (compiled,) = self._dispatcher.overloads.values()
        return int(compiled.library.get_pointer_to_function(getattr(compiled.fndesc, which)))

    @cached_property
    def address(self) -> int:
        """Where the machine code begins, which takes what `kinds` says as Numba's own calls pass it."""
        return self._find("llvm_func_name")

    @cached_property
    def c_address(self) -> int:
        """Where the C function begins that calls it, if it was made `for_c`."""
        return self._find("llvm_cfunc_wrapper_name")

    def compile(self) -> None:
        with _compiling:
            if self.call is not self._dispatcher:
                self._dispatcher.compile(self._signature)
                self._dispatcher.disable_compile()  # other arguments are converted, or refused
                self.call = self._dispatcher
