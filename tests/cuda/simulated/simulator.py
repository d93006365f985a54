"""A pretended CUDA device: kernels run as Python, in the memory of NumPy arrays.

Numba's own simulator starts a thread of the operating system for each one of the device; here they are greenlets, which
is about a hundred times faster. Blocks run in an order that nothing may depend on; those of kernels in which they wait
for one another run side by side, in turns as long as from one barrier to the next, as many as there is room for.
"""

import sys
from collections import defaultdict
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from types import SimpleNamespace
from typing import Any

import numpy as np
from greenlet import getcurrent, greenlet
from numba.cuda import types

from bnarray.backends._cuda import Memory
from bnarray.kernels.cuda import (
    backward,
    block,
    compiled,
    exact,
    forward,
    grad_input,
    grad_sums,
    memory,
    moments,
    normalize,
    running,
    stage,
    together,
    walk,
)

#: In the order in which they import one another's constants.
kernel_modules = (
    compiled, walk, exact, memory, stage, together, block, moments, normalize, grad_sums, grad_input, forward, backward,
    running,
)  # fmt: skip

_DTYPES = {
    types.float64: np.float64,
    types.float32: np.float32,
    types.float16: np.float16,
    types.uint16: np.uint16,
    types.int64: np.int64,
}
_KINDS = {name: kind for kind, name in enumerate(memory.NAMES)}


class Pointer(int):
    """The address of an array's first element: indexed by elements from there, as far as the array reaches."""

    _flat: np.ndarray
    _origin: int

    def __new__(cls, array: np.ndarray, steps: tuple[int, ...]) -> "Pointer":
        self = super().__new__(cls, array.ctypes.data)
        if array.dtype.kind not in "fu":  # bool, and bfloat16, are bits to kernels
            array = array.view(np.uint8 if array.dtype == np.bool else np.uint16)
        reach = [step * (size - 1) for step, size in zip(steps, array.shape, strict=True)]
        self._origin = -sum(each for each in reach if each < 0)
        lowest = array[(*(slice(-1, None) if each < 0 else slice(1) for each in reach), ...)]
        self._flat = np.lib.stride_tricks.as_strided(lowest, (sum(map(abs, reach)) + 1,), (array.itemsize,))
        return self

    def _at(self, i: int) -> int:
        at = self._origin + int(i)
        if not 0 <= at < self._flat.size:
            raise IndexError(f"element {i} is outside of the array")
        return at

    def assert_aligned(self, i: int, width: int) -> None:
        """Raise, as a device does, if so many elements do not begin at a multiple of their size."""
        size = self._flat.itemsize
        assert (self + int(i) * size) % (width * size) == 0, "misaligned"

    def __getitem__(self, i: int) -> Any:
        return self._flat[self._at(i)]

    def __setitem__(self, i: int, value: Any) -> None:
        self._flat[self._at(i)] = value


class Library:
    """NumPy arrays, as if they were on a device."""

    def memory(self, x: np.ndarray) -> Memory:
        steps = tuple(step // x.itemsize for step in x.strides)
        assert all(step % x.itemsize == 0 for step in x.strides)
        return Memory(Pointer(x, steps), _KINDS[x.dtype.name], x.shape, steps)

    def empty_like(self, x: np.ndarray) -> np.ndarray:
        y = np.empty_like(x)
        y[...] = 7  # what is not written shows
        return y

    def vector(self, shape: tuple[int, ...], like: np.ndarray) -> np.ndarray:
        return np.full(shape, np.nan)

    def words(self, number: int, like: np.ndarray) -> tuple[np.ndarray, Pointer]:
        array = np.zeros(number, np.uint32)
        words.append(array)
        return array, Pointer(array, (1,))

    def on_device_of(self, x: np.ndarray) -> AbstractContextManager[None]:
        return nullcontext()

    def queue(self, x: np.ndarray) -> tuple[int, int]:
        return 0, 0

    def stream(self, x: np.ndarray) -> None:
        return None

    def is_capturing(self, x: np.ndarray) -> bool:
        return False


class Room(SimpleNamespace):
    """How many blocks there is room for at a time, how often one of them looks for its order, and their order."""

    blocks = 1000
    patience = 10**9
    order = 0
    waits_in_vain = 0  # so far


room = Room()

#: All counters that were made, and the names of the kernels that were launched.
words: list[np.ndarray] = []
launched: list[str] = []


class _Block:
    def __init__(self, number: int) -> None:
        self.number = number
        self.running: list[Any] = []
        self.waiting: list[Any] = []
        self.shared: dict[Any, np.ndarray] = {}
        self.given: defaultdict[int, dict[int, Any]] = defaultdict(dict)  # by how many a thread has taken part in
        self.votes: defaultdict[int, list[bool]] = defaultdict(list)  # by how many a thread has taken part in


class _Cuda:
    """What kernels find as `cuda`; attributes follow the thread that is running."""

    threadIdx = property(lambda self: SimpleNamespace(x=getcurrent().number))  # noqa: N815
    blockIdx = property(lambda self: SimpleNamespace(x=getcurrent().block.number))  # noqa: N815
    gridDim = property(lambda self: SimpleNamespace(x=device_double.blocks))  # noqa: N815
    shared = property(lambda self: self)
    blocks = 0  # of the launch

    def array(self, size: int, dtype: Any, alignment: int | None = None) -> np.ndarray:
        frame = sys._getframe(1)
        place = frame.f_code, frame.f_lineno, size
        shared = getcurrent().block.shared
        if place not in shared:
            shared[place] = np.full(size, 7 if dtype in types.integer_domain else np.nan, _DTYPES[dtype])
        return shared[place]

    def syncthreads(self) -> None:
        getcurrent().parent.switch("sync")

    def nanosleep(self, nanoseconds: int) -> None:
        getcurrent().parent.switch("sleep")

    def shfl_xor_sync(self, mask: int, value: Any, other: int) -> Any:
        """A warp's threads exchange values, when all of the block have come."""
        assert mask == 0xFFFFFFFF
        thread = getcurrent()
        values = thread.block.given[thread.exchanges]
        thread.exchanges += 1
        values[thread.number] = value
        self.syncthreads()
        assert thread.number // 32 == (thread.number ^ other) // 32, "of another warp"
        return values[thread.number ^ other]

    def syncthreads_or(self, predicate: Any) -> int:
        thread = getcurrent()
        votes = thread.block.votes[thread.votes]
        thread.votes += 1
        votes.append(bool(predicate))
        self.syncthreads()
        return int(any(votes))

    @property
    def libdevice(self) -> "_Cuda":
        return self

    def int_as_float(self, bits: np.int32) -> np.float32:
        return bits.view(np.float32)

    def float_as_int(self, value: np.float32) -> np.int32:
        return value.view(np.int32)

    def fma(self, a: Any, b: Any, c: Any) -> Any:
        if isinstance(a, np.float32):  # the product is exact in float64
            return np.float32(np.float64(a) * np.float64(b) + np.float64(c))
        raise NotImplementedError("fused in float64")


def _begin(function: Callable[..., None], number: int, arguments: tuple[Any, ...]) -> _Block:
    block = _Block(number)
    for i in range(compiled.THREADS):
        thread = greenlet(function)
        thread.number, thread.block, thread.given, thread.coming = i, block, arguments, []
        thread.votes = thread.exchanges = 0
        block.running.append(thread)
    return block


def _go_on(block: _Block) -> str:
    """Let a block's threads run until all of them are at a barrier, or those that are not sleep; return which."""
    sleeping = []
    for thread in block.running:
        given, thread.given = thread.given, ()
        stops = thread.switch(*given)
        if stops == "sleep":
            sleeping.append(thread)
        elif stops == "sync":
            block.waiting.append(thread)
    if sleeping:
        block.running = sleeping
        return "sleep"
    if block.waiting and len(block.waiting) != compiled.THREADS:
        raise RuntimeError("threads of a block wait for others that have ended")
    block.waiting.sort(key=lambda thread: thread.number)
    block.running, block.waiting = block.waiting, []
    return "sync" if block.running else "end"


def _run(function: Callable[..., None], blocks: int, arguments: tuple[Any, ...], places: int) -> None:
    """Run blocks, so many at a time; whoever's turn it is is drawn."""
    draw = np.random.default_rng(blocks + room.order)
    to_come, running, asleep = [int(number) for number in draw.permutation(blocks)], [], 0
    while to_come or running:
        while to_come and len(running) < places:
            running.append(_begin(function, to_come.pop(), arguments))
        turn = int(draw.integers(len(running)))
        state = _go_on(running[turn])
        asleep = asleep + 1 if state == "sleep" else 0
        if asleep > 100_000:
            raise RuntimeError("blocks wait for one another, and none goes on")
        if state == "end":
            del running[turn]


def launch(self: Any, device: int, stream: int, blocks: int, *arguments: Any) -> None:
    """Stands in for `Kernel.launch`."""
    wanted = len(self.signature.args)
    if len(arguments) != wanted:
        raise TypeError(f"{self.name} takes {wanted} arguments, not {len(arguments)}")

    def thread(*arguments: Any) -> None:
        with np.errstate(all="ignore"):  # which each greenlet has for itself
            self.function(*arguments)

    launched.append(self.name)
    places = 1
    if together.words_type in self.signature.args:
        places = room.blocks
        if self.signature.args[-1] != together.words_type:  # but how often a block looks for its order
            arguments = *arguments[:-1], room.patience

    def work() -> None:
        device_double.blocks = blocks
        _run(thread, blocks, arguments, places)

    give(device, stream, work)


def give(device: int, stream: int, work: Callable[[], None]) -> None:
    """Have work done: at once, where no double of a library has streams."""
    work()


def _load_elements(width: int) -> Callable[[Pointer, int], tuple[Any, ...]]:
    def load(array: Pointer, i: int) -> tuple[Any, ...]:
        array.assert_aligned(i, width)
        return tuple(array[i + k] for k in range(width))

    return load


def _store_elements(width: int) -> Callable[[Pointer, int, tuple[Any, ...]], None]:
    def store(array: Pointer, i: int, elements: tuple[Any, ...]) -> None:
        array.assert_aligned(i, width)
        for k, element in zip(range(width), elements, strict=True):
            array[i + k] = element

    return store


def _pick(elements: tuple[Any, ...], k: int) -> Any:
    return elements[k]


def _put(elements: tuple[Any, ...], k: int, element: Any) -> tuple[Any, ...]:
    return (*elements[:k], element, *elements[k + 1 :])


# -- What waits on chip ------------------------------------------------------------------------------------------------


def _copy_at_once(width: int) -> Callable[[np.ndarray, int, Pointer, int], None]:
    def copy(staged: np.ndarray, slot: int, array: Pointer, i: int) -> None:
        if width > 1:
            array.assert_aligned(i, width)
            assert slot % width == 0
        thread = getcurrent()
        for k in range(width):
            thread.coming.append((staged, slot + k, array[i + k]))

    return copy


def _landed() -> None:
    thread = getcurrent()
    for staged, slot, element in thread.coming:
        staged[slot] = element
    thread.coming = []


def _load_staged(width: int) -> Callable[[np.ndarray, int], tuple[Any, ...]]:
    return lambda staged, slot: tuple(staged[slot + k] for k in range(width))


# -- What blocks tell one another --------------------------------------------------------------------------------------


def _count_up(words: Pointer, at: int, last: int) -> int:
    found = int(words[at])
    words[at] = 0 if found >= last else found + 1
    return found


def _put_first(words: Pointer, at: int, order: int) -> int:
    found = int(words[at])
    if found == together.NONE:
        words[at] = order
        room.waits_in_vain += order == together.GONE
    return found


def _look(words: Pointer, at: int) -> int:
    return int(words[at])


device_double = _Cuda()

#: What asks a device, before `install`.
most_parts = together.most_parts


def install() -> None:
    """Let launches run here."""
    memory.load_elements, memory.store_elements = _load_elements, _store_elements
    memory.item, memory.pick, memory.put = _pick, _pick, _put
    stage.copy_at_once, stage.landed, stage.load_staged = _copy_at_once, _landed, _load_staged
    together.count_up, together.put_first, together.look = _count_up, _put_first, _look
    together.most_parts = lambda device: 1000
    compiled.Kernel.launch = launch
    compiled.make_current = lambda device: None
    for module in (*kernel_modules, together):
        if hasattr(module, "cuda"):
            module.cuda = device_double
