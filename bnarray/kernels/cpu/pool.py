"""Threads. The pieces of a kernel's work are taken from a shared counter by whoever is free.

Not by Numba's own threads: its workqueue layer aborts the process when two Python threads enter it at once, its OpenMP
layer kills a forked child that does and, when another program holds a core, waits for the worker that lost it. Here the
caller works too, and a helper that did not get a core in time is never waited for.
"""

import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any

import numba
import numpy as np
import numpy.typing as npt
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from bnarray.kernels.cpu.compiled import Kernel, machinery

_executor: ThreadPoolExecutor | None = None


@intrinsic
def _fetch_add_one(typingctx, counter):
    """Atomically add one to the first element; return what it was."""

    def codegen(context, builder, signature, args):
        data = context.make_array(signature.args[0])(context, builder, args[0]).data
        return builder.atomic_rmw("add", data, ir.Constant(ir.IntType(64), 1), "monotonic")

    return types.int64(counter), codegen


#: What a counter holds: the next piece, and whether a kernel refused, because float32 does not do for its data.
NEXT, REFUSED = range(2)


@machinery
def take(counter):
    """The number of a piece that nobody has taken yet."""
    return _fetch_add_one(counter)


def threads() -> int:
    """Return Numba's number of threads for the current thread, without starting Numba's own."""
    try:
        numba.threading_layer()
    except ValueError:  # not started, so numba.set_num_threads was never called either
        return int(numba.config.NUMBA_NUM_THREADS)
    return int(numba.get_num_threads())


def _forget() -> None:
    """A forked child has none of its parent's threads."""
    global _executor
    _executor = None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)


def _work(
    compiled: Callable[..., None],
    counter: npt.NDArray[np.int64],
    room: int,
    arguments: tuple[Any, ...],
    owners: tuple[object, ...],
) -> None:
    compiled(counter, np.empty(room, np.uint8), *arguments)


def _helpers(number: int, *task: Any) -> list[Future[None]]:
    global _executor
    if _executor is None:
        most = max(1, int(numba.config.NUMBA_NUM_THREADS) - 1)
        _executor = ThreadPoolExecutor(most, thread_name_prefix="bnarray")
    try:
        return [_executor.submit(_work, *task) for _ in range(number)]
    except RuntimeError:  # the interpreter is shutting down and starts no more threads
        return []


def run(kernel: Kernel, pieces: int, room: int, owners: tuple[object, ...], *arguments: Any) -> bool:
    """Call ``kernel(counter, scratch, *arguments)`` from as many threads as there are pieces for, until all are done.

    Return whether none of them refused.

    Each has `room` bytes of scratch memory. The arguments hold addresses; `owners` are the arrays there. A helper keeps
    them alive, so that an interruption of the caller (Ctrl-C) never leaves it working on memory that is gone.
    """
    counter = np.zeros(2, np.int64)
    helpers = min(threads(), pieces) - 1 if pieces > 1 else 0
    if helpers <= 0:
        kernel.call(counter, np.empty(room, np.uint8), *arguments)
        return not counter[REFUSED]
    kernel.compile()
    task = kernel.call, counter, room, arguments, owners
    futures = _helpers(helpers, *task)
    try:
        _work(*task)
    finally:
        started = [future for future in futures if not future.cancel()]
        wait(started)
    for future in started:
        future.result()
    return not counter[REFUSED]
