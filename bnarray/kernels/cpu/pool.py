"""Threads. The pieces of a kernel's work are taken from a shared counter by whoever is free.

Not by Numba's own threads: its workqueue layer aborts the process when two Python threads enter it at once, its OpenMP
layer kills a forked child that does and, when another program holds a core, waits for the worker that lost it. Here the
caller works too, and a helper that did not get a core in time is never waited for.

Helpers are Python threads, but calls reach them without the interpreter (`handover`), and for a while after one they
look out for the next. To take part through the interpreter's lock cost 50 to 150 µs a call.
"""

import os
import threading
import time
from queue import SimpleQueue
from typing import Any

import numba
import numpy as np

from bnarray.kernels.cpu import handover
from bnarray.kernels.cpu.compiled import Kernel, machinery

#: What a counter holds: the next piece, and whether a kernel refused because float32 does not do for its data.
NEXT, REFUSED = range(2)

# Looks (12 ns on an Intel Xeon) after which a helper sleeps (waking it takes the caller 30 µs, and 80 until it works),
# and after which a caller sleeps in between (another program may have the core of the helper that it waits for).
_NEXT_CALL, _LAST_PIECE = 10_000, 4_000


@machinery
def take(counter):
    """The number of a piece that nobody has taken yet."""
    return handover.add(counter.ctypes.data + 8 * NEXT, 1)


def threads() -> int:
    """Return Numba's number of threads for the current thread, without starting Numba's own."""
    try:
        numba.threading_layer()
    except ValueError:  # not started, so numba.set_num_threads was never called either
        return int(numba.config.NUMBA_NUM_THREADS)
    return int(numba.get_num_threads())


class _Helper:
    """A daemon thread with a mailbox."""

    def __init__(self) -> None:
        self.mail = np.zeros(handover.SIZE, np.int64)
        self.address = self.mail.ctypes.data
        self.held: object = None  # what the call in the mailbox works on
        self.is_dismissed = False
        self._is_asleep = False
        self._alarm: SimpleQueue[None] = SimpleQueue()
        threading.Thread(target=self._work, name="bnarray", daemon=True).start()

    def wake(self) -> None:
        """Make sure that what has been posted is seen."""
        if self._is_asleep:
            self._alarm.put(None)

    def _work(self) -> None:
        while not self.is_dismissed:
            handover.serve.call(self.address, _NEXT_CALL)
            self._is_asleep = True  # before the last look into the mailbox; the caller looks here after posting
            if self.mail[handover.STATE] != handover.POSTED:
                self._alarm.get()
            self._is_asleep = False


class _Team:
    """The helpers of a process: as many as Numba has threads, less one, shared by all callers."""

    def __init__(self) -> None:
        self._idle: list[_Helper] = []
        self._size = 0
        self._hiring = threading.Lock()

    def join(self, number: int) -> list[_Helper]:
        """Return up to so many helpers that do nothing else."""
        helpers: list[_Helper] = []
        while len(helpers) < number:
            try:
                helpers.append(self._idle.pop())
            except IndexError:
                if not self._hire():
                    break
        return helpers

    def leave(self, helpers: list[_Helper]) -> None:
        self._idle += helpers

    def dismiss(self, helpers: list[_Helper]) -> None:
        """Let helpers go that nobody waits for any more."""
        for helper in helpers:
            helper.is_dismissed = True
            helper.wake()
        with self._hiring:
            self._size -= len(helpers)

    def _hire(self) -> bool:
        with self._hiring:
            if self._size >= int(numba.config.NUMBA_NUM_THREADS) - 1:
                return False
            try:
                self._idle.append(_Helper())
            except RuntimeError:  # no more threads, or the interpreter is shutting down
                return False
            self._size += 1
            return True


_team = _Team()


def _forget() -> None:
    """A forked child has none of its parent's threads."""
    global _team
    _team = _Team()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)


def run(kernel: Kernel, pieces: int, room: int, *arguments: Any, owners: tuple[object, ...]) -> bool:
    """Call ``kernel(counter, scratch, *arguments)`` from as many threads as there are pieces for, until all are done.

    Return whether none of them refused. Each has `room` bytes of scratch memory. The arguments hold addresses; `owners`
    are the arrays there, which helpers keep: an interruption of the caller (Ctrl-C) never leaves one working on memory
    that is gone.
    """
    counter, scratch = np.zeros(2, np.int64), np.empty(room, np.uint8)
    helpers = _team.join(min(threads(), pieces) - 1) if pieces > 1 else []
    if helpers:
        _share(helpers, kernel, counter, scratch, arguments, owners)
    else:
        kernel.call(counter, scratch, *arguments)
    return not counter[REFUSED]


def _share(
    helpers: list[_Helper], kernel: Kernel, counter: Any, scratch: Any, arguments: tuple[Any, ...], owners: Any
) -> None:
    post, unpack = handover.handover(kernel)
    try:
        for helper in helpers:
            own = np.empty_like(scratch)
            helper.held = counter, own, arguments, owners
            post.call(helper.address, unpack.address, kernel.address, counter, own, *arguments)
            helper.wake()
        kernel.call(counter, scratch, *arguments)
    finally:
        _end(helpers)
    if any(helper.mail[handover.FAILED] for helper in helpers):
        raise RuntimeError("a kernel failed in another thread than the caller's")


def _end(helpers: list[_Helper]) -> None:
    """Take back what helpers have not begun, and wait for what they have; let them go if that is interrupted."""
    try:
        for helper in helpers:
            while not handover.settle.call(helper.address, _LAST_PIECE):
                time.sleep(1e-4)
            helper.held = None
    except BaseException:
        _team.dismiss(helpers)
        raise
    _team.leave(helpers)
