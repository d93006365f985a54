"""Threads. Each has a share of the pieces of a kernel's work, neighbours in memory; who is done helps the others.

Not by Numba's own threads: its workqueue layer aborts the process when two Python threads enter it at once, its OpenMP
layer kills a forked child that does and, when another program holds a core, waits for the worker that lost it. Here the
caller works too, and a helper that did not get a core in time is never waited for.

Helpers are Python threads, but calls reach them without the interpreter (`handover`), and for a while after one they
look out for the next. To take part through the interpreter's lock cost 50 to 150 µs a call.
"""

import itertools
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache
from queue import SimpleQueue
from typing import Any, Protocol

import numba
import numpy as np

from bnarray.kernels.cpu import handover
from bnarray.kernels.cpu.compiled import Kernel, machinery
from bnarray.kernels.cpu.handover import NOBODY
from bnarray.kernels.cpu.memory import view

#: What a thread's counter holds: the next piece of its share and where that ends, whether a kernel refused because
#: float32 does not do for its data, the thread's number and how many there are. Counters lie side by side, in a line of
#: the cache each.
NEXT, END, REFUSED, SEAT, SEATS = range(5)
WORDS = 8

_ENDLESS = 2**62

# Looks (12 ns on an Intel Xeon) after which a helper sleeps (waking it takes the caller 30 µs, and 80 until it works),
# and after which a caller sleeps in between (another program may have the core of the helper that it waits for). With
# 10000 helpers slept between the two passes of a torch step on (256, 1024), whose backward then took 430 µs, not 280.
_NEXT_CALL, _LAST_PIECE = 40_000, 4_000


@machinery
def take(counter):
    """The number of a piece that nobody has taken yet: of the thread's share first, then of the others'."""
    seat, seats = counter[SEAT], counter[SEATS]
    for other in range(seats):
        at = counter.ctypes.data + 8 * WORDS * ((seat + other) % seats - seat)
        piece = handover.add(at + 8 * NEXT, 1)
        if piece < view(at, WORDS, 0)[END]:
            return piece
    return _ENDLESS


@machinery
def begin(counter):
    """Let one thread have all pieces."""
    counter[NEXT], counter[END], counter[REFUSED], counter[SEAT], counter[SEATS] = 0, _ENDLESS, 0, 0, 1


@lru_cache(maxsize=256)
def _shares(number: int, pieces: int) -> Any:
    """The counters of so many threads at the outset.

    Shares are the same in every kernel and call, so that a thread finds in its caches what it had in hand before, and
    seldom writes to lines that another one reads: 0.55 to 0.85 of the time of pieces taken in turn (two threads of an
    AMD Zen 5; (32, 64, 56, 56) 0.57 to 0.68).
    """
    counters = np.zeros((number, WORDS), np.int64)
    ends = [pieces * (seat + 1) // number for seat in range(number)] if number > 1 else [_ENDLESS]
    counters[:, NEXT], counters[:, END] = [0, *ends[:-1]], ends
    counters[:, SEAT], counters[:, SEATS] = range(number), number
    return counters


_is_serial: ContextVar[bool] = ContextVar("bnarray_serial", default=False)


@contextmanager
def serial() -> Iterator[None]:
    """Let calls inside, in this thread (context) only, do without helpers: for tasks that run side by side already."""
    token = _is_serial.set(True)
    try:
        yield
    finally:
        _is_serial.reset(token)


def threads() -> int:
    """Return Numba's number of threads for the current thread, without starting Numba's own; 1 where `serial`."""
    if _is_serial.get():
        return 1
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
        self._is_asleep = False
        self._alarm: SimpleQueue[None] = SimpleQueue()

    def start(self) -> None:
        threading.Thread(target=self._work, name="bnarray", daemon=True).start()

    def wake(self) -> None:
        """Make sure that what has been posted is seen."""
        if self._is_asleep:
            self._alarm.put(None)

    def _work(self) -> None:
        while True:
            handover.serve.call(self.address, _NEXT_CALL)
            self._is_asleep = True  # before the last look into the mailbox: a caller posts before it looks here
            if self.mail[handover.STATE] != handover.POSTED:
                self._alarm.get()
            self._is_asleep = False


class Team(Protocol):
    """Threads that share a call, the caller among them."""

    def size(self) -> int:
        """Return how many may take part."""

    def share(
        self, number: int, kernel: Kernel, counters: Any, room: int, arguments: tuple[Any, ...], owners: object
    ) -> None:
        """Call the kernel from so many threads; `room` and `owners` are as in `run`."""


class Helpers:
    """The caller, and helpers of ours: as many threads as Numba has. They are a process's, for all callers."""

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """Begin anew, in a forked child, which has none of its parent's threads."""
        self.hired: list[_Helper] = []
        self._calls = itertools.count(1)
        self._hiring = threading.Lock()

    def _grow(self, number: int) -> None:
        """Start helpers until there are so many."""
        with self._hiring:
            while len(self.hired) < min(number, int(numba.config.NUMBA_NUM_THREADS) - 1):
                helper = _Helper()
                try:
                    helper.start()
                except RuntimeError:  # no more threads, or the interpreter is shutting down
                    return
                self.hired.append(helper)

    def size(self) -> int:
        return threads()

    def share(
        self, number: int, kernel: Kernel, counters: Any, room: int, arguments: tuple[Any, ...], owners: object
    ) -> None:
        wanted = number - 1
        if len(self.hired) < wanted:
            self._grow(wanted)
        post, unpack = handover.handover(kernel)
        call, found = next(self._calls), 1  # the caller is the first
        scratches = [np.empty(room, np.uint8) for _ in range(number)]
        work = counters, scratches, arguments, owners
        try:
            for helper in self.hired:
                own = counters[found], scratches[found]
                if post.call(helper.address, call, 1, unpack.address, kernel.address, NOBODY, *own, *arguments):
                    helper.held = work
                    helper.wake()
                    found += 1
                    if found == number:
                        break
            kernel.call(counters[0], scratches[0], *arguments)
        finally:
            failed = self._end(call, work)
        if failed:
            raise RuntimeError("a kernel failed in another thread than the caller's")

    def _end(self, call: int, work: object) -> bool:
        """Take back what helpers have not begun of a call, and wait for what they have; return whether that failed.

        While a helper works it holds the arrays, so that another interruption (Ctrl-C) never leaves it with memory that
        is gone.
        """
        failed = False
        for helper in [helper for helper in self.hired if helper.mail[handover.OWNER] == call]:
            helper.held = work
            while not handover.settle.call(helper.address, _LAST_PIECE):
                time.sleep(1e-4)
            failed |= bool(helper.mail[handover.FAILED])
            helper.held = None
        return failed


helpers = Helpers()

if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=helpers.forget)


def run(kernel: Kernel, pieces: int, room: int, *arguments: Any, owners: object, team: Team = helpers) -> bool:
    """Call ``kernel(counter, scratch, *arguments)`` from as many threads as there are pieces for, until all are done.

    Return whether none of them refused. Each has `room` bytes of scratch memory. The arguments hold addresses; `owners`
    keep alive what is there.
    """
    number = min(team.size(), pieces) if pieces > 1 else 1
    counters = _shares(number, pieces).copy()
    if number > 1:
        team.share(number, kernel, counters, room, arguments, owners)
    else:
        kernel.call(counters[0], np.empty(room, np.uint8), *arguments)
    return 1 not in counters[:, REFUSED].tolist()  # (`any` took 0.8 µs, this 0.1)
