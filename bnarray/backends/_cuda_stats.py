"""Running statistics in a device's memory.

They are changed in place, by one kernel an update, so that a captured update (CUDA graphs) goes on from where the last
replay left them. What other streams do with them is ordered by marks in the streams: the host waits for nothing, except
where it is asked for a number.
"""

import threading
from collections.abc import Callable
from contextlib import suppress
from math import prod
from typing import Any, TypeVar

from bnarray.backends._cuda import NOWHERE, Library
from bnarray.dispatch import Array, backend
from bnarray.kernels.cuda import running
from bnarray.kernels.cuda.streams import Mark
from bnarray.stats import Count, RunningStats, _State, is_number

_T = TypeVar("_T")


class Cell:
    """A state's numbers on a device, as `kernels.cuda.running` has them; streams take turns at them."""

    def __init__(self, library: Library, numbers: Array, has_counts: bool) -> None:
        self.numbers = numbers
        self.has_counts = has_counts  # whether features may differ in theirs
        self._library = library
        self._turn = threading.RLock()
        with library.on_device_of(numbers):
            # The stream that made the numbers' memory, and will be given it again.
            self._home = library.stream(numbers)
            device, stream = library.queue(numbers)
            self._mark = Mark(device)
            if not library.is_capturing(numbers):
                self._mark.set(stream)

    def in_turn(self, work: Callable[[], _T]) -> _T:
        """Let the current stream do something after all that streams were given to do with the numbers before.

        Amid a capture nothing is marked: there is no order between that and what is not captured.
        """
        library, numbers = self._library, self.numbers
        with self._turn, library.on_device_of(numbers):
            if library.is_capturing(numbers):
                return work()
            _, stream = library.queue(numbers)
            self._mark.await_by(stream)
            try:
                return work()
            finally:
                self._mark.set(stream)

    def read(self) -> Array:
        """Return a copy of the numbers, made by the current stream."""
        return self.in_turn(lambda: backend(self.numbers).copy(self.numbers))

    def __del__(self) -> None:
        with suppress(Exception), self._library.on_device_of(self.numbers):
            if not self._library.is_capturing(self.numbers):
                self._mark.await_by(self._library.handle(self._home))


class DeviceStats(RunningStats):
    """`RunningStats` whose state is a `Cell`; each backend says in whose memory."""

    library: Library

    _asks_host = ("raise",)

    @property
    def _cell(self) -> Cell:
        return self.__dict__["_state"]  # type: ignore[no-any-return]

    def _initial(self, zeros: Array) -> _State:
        with self.library.on_device_of(zeros):
            return super()._initial(zeros)

    def _vectors(self, numbers: Array) -> list[Array]:
        """Count, mean, var and m2, in the features' shape."""
        size = prod(self._shape)
        return [numbers[i * size : (i + 1) * size].reshape(self._shape) for i in range(running.VECTORS)]

    @property
    def _state(self) -> _State:
        """The state with its counts as numbers: this waits for the device."""
        has_counts, numbers = self._cell.has_counts, self._cell.read()
        seen = backend(numbers).to_numpy(numbers)
        count, mean, var, m2 = self._vectors(numbers)
        num_updates, num_skipped = (int(each) for each in seen[-running.NUMBERS :])
        if not has_counts:
            number = float(seen[0]) if prod(self._shape) else 0.0
            count = int(number) if number.is_integer() else number
        return _State(count, mean, var, None if self._update_rate is not None else m2, num_updates, num_skipped)

    @_state.setter
    def _state(self, state: _State) -> None:
        with self.library.on_device_of(state.mean):
            numbers = self._written(state)
        if "_state" not in self.__dict__:
            self.__dict__["_state"] = Cell(self.library, numbers, not is_number(state.count))
            return
        self._cell.has_counts = not is_number(state.count)
        self._cell.in_turn(lambda: self._cell.numbers.__setitem__(..., numbers))

    def _written(self, state: _State) -> Array:
        """The numbers of a state, in new memory."""
        size = prod(self._shape)
        numbers = self.library.vector((running.VECTORS * size + running.NUMBERS,), state.mean)
        vector = backend(numbers).vector
        for i, each in enumerate((state.count, state.mean, state.var, 0.0 if state.m2 is None else state.m2)):
            numbers[i * size : (i + 1) * size] = each if is_number(each) else vector(each, numbers).reshape(-1)
        numbers[running.VECTORS * size] = state.num_updates
        numbers[running.VECTORS * size + 1] = state.num_skipped
        return numbers

    def _replace(self, change: Callable[[_State], _State]) -> None:
        def exchange() -> None:
            self._state = change(self._state)

        self._cell.in_turn(exchange)

    def _take_in(self, count: Count, mean: Array, m2: Array) -> None:
        cell, like = self._cell, self._cell.numbers
        verbs, library = backend(like), self.library
        counts = None if is_number(count) else verbs.vector(count, like)
        batch = [verbs.vector(each, like) for each in (mean, m2)]
        cell.has_counts = cell.has_counts or counts is not None

        def update() -> None:
            arguments = (
                prod(self._shape), library.memory(like).address,
                float(count) if counts is None else 0.0, int(counts is not None),
                NOWHERE if counts is None else library.memory(counts).address,
                *(library.memory(each).address for each in batch),
                int(self._update_rate is None), self._update_rate or 0.0, self._correction,
                int(self._nonfinite == "propagate"),
            )  # fmt: skip
            running.kernel().launch(*library.queue(like), 1, *arguments)

        cell.in_turn(update)

    # -- What is read --------------------------------------------------------------------------------------------------

    def mean_and_var(self) -> tuple[Array, Array]:
        _, mean, var, _ = self._vectors(self._cell.read())
        return mean, var

    @property
    def mean(self) -> Array:
        return self.mean_and_var()[0]

    @property
    def var(self) -> Array:
        return self.mean_and_var()[1]

    def followed(self) -> tuple[Array, ...]:
        return ()

    # -- Copies --------------------------------------------------------------------------------------------------------

    def copy(self) -> RunningStats:
        state = Cell(self.library, self._cell.read(), self._cell.has_counts)
        return self._like_this(type(self), {**self.__dict__, "_state": state})

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_state": self._state}

    def __setstate__(self, attributes: dict[str, Any]) -> None:
        state = attributes.pop("_state")
        self.__dict__.update(attributes)
        self.register()
        self._state = state
