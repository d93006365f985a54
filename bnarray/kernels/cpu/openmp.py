"""The threads of an OpenMP runtime that another library computes with.

For some milliseconds after its last parallel region such a runtime's threads look out for the next one, on all cores.
Helpers of ours that want the cores meanwhile get them late, and when those of the runtime are wanted again it is their
turn to wait. So between the library's own operations kernels run where these do.
"""

import ctypes
import os
from collections.abc import Callable
from typing import Any

import numpy as np

from bnarray.kernels.cpu import handover, pool
from bnarray.kernels.cpu.compiled import Kernel


class Crew:
    """The threads of one runtime: at most as many as Numba has, and as the library has.

    Parameters
    ----------
    path
        Of a shared library that is linked with the runtime.
    threads
        How many threads the library computes with.

    Raises
    ------
    OSError
        If there is no such library.
    AttributeError
        If the runtime has no function that starts a parallel region, or none that numbers its threads.
    """

    def __init__(self, path: str, threads: Callable[[], int]) -> None:
        # By this name GCC enters a parallel region; the runtimes of LLVM and Intel have it too, but for Windows' and
        # Apple's.
        library = ctypes.CDLL(path)
        self._parallel: Any = library.GOMP_parallel
        self._parallel.argtypes = ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint
        self._parallel.restype = None
        self._numbered = ctypes.cast(library.omp_get_thread_num, ctypes.c_void_p).value
        self._threads = threads
        self._is_forked = False
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self._forget)

    def _forget(self) -> None:
        """In a forked child a runtime waits for the threads of its parent."""
        self._is_forked = True

    def size(self) -> int:
        return min(pool.threads(), self._threads())

    def share(
        self, number: int, kernel: Kernel, counters: Any, room: int, arguments: tuple[Any, ...], owners: object
    ) -> None:
        if self._is_forked:
            pool.helpers.share(number, kernel, counters, room, arguments, owners)
            return
        mail, scratch = np.zeros(handover.SIZE, np.int64), np.empty(number * room, np.uint8)
        at, (post, unpack) = mail.ctypes.data, handover.handover(kernel)
        together = counters.reshape(-1), scratch
        post.call(at, 0, number, unpack.address, kernel.address, self._numbered, *together, *arguments)
        # All of the library's threads, of which some find no seat: for fewer the runtime would end the others.
        self._parallel(handover.join.c_address, at, self._threads(), 0)
        if mail[handover.FAILED]:
            raise RuntimeError("a kernel failed")
