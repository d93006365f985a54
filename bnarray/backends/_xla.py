"""Kernel calls that XLA makes: planned from a text that is part of the program, run on the addresses that come with it.

The text says everything but the addresses (shapes, dtypes, options), so that a compiled program means the same in
whatever process it runs.
"""

import ctypes
import json
import threading
import warnings
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from math import prod
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np
import numpy.typing as npt

from bnarray.backends import _strided
from bnarray.backends._strided import Memory, Vector
from bnarray.dispatch import Transform
from bnarray.kernels.cpu import gate, grad_input, grad_sums, memory, xla
from bnarray.layout import broadcast_strides, split

ndarray = npt.NDArray[Any]
_T = TypeVar("_T")


class Call(NamedTuple):
    """What is asked for, without the arrays; `roles` are what these are, in order."""

    kept: tuple[int, ...]
    eps: float
    relu: bool
    roles: tuple[str, ...]

    @property
    def is_training(self) -> bool:
        return "mean" not in self.roles

    @property
    def gates_residual(self) -> bool:
        """Whether a residual has a gradient of its own: not dy's."""
        return self.relu and "residual" in self.roles

    def named(self, operands: Sequence[_T]) -> dict[str, _T]:
        return dict(zip(self.roles, operands, strict=False))


_TARGET = "bnarray"

_KINDS = {
    "float16": (memory.FLOAT16, 2),
    "bfloat16": (memory.BFLOAT16, 2),
    "float32": (memory.FLOAT32, 4),
    "float64": (memory.FLOAT64, 8),
    "bool": (memory.BOOL, 1),
}


class _Slot(NamedTuple):
    """An operand or a result, but for where it is."""

    kind: int
    item: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    def at(self, address: int) -> Memory:
        return Memory(None, address, self.kind, self.shape, self.strides)

    def read(self, address: int) -> Vector:
        values = np.empty(prod(self.shape))
        xla.read_vector.call(address, self.item, self.kind, values)
        return values

    def write(self, values: Vector, address: int) -> None:
        xla.write_vector.call(values, address, self.item, self.kind)


def _slot(dtype: str, shape: list[int]) -> _Slot:
    if dtype == "uint32":  # pairs of them, the bits of float64
        dtype, shape = "float64", shape[:-1]
    kind, item = _KINDS[dtype]
    strides = [item * prod(shape[axis + 1 :]) for axis in range(len(shape))]
    return _Slot(kind, item, tuple(shape), tuple(strides))


class _Plan:
    """A call, ready but for the addresses."""

    def __init__(self, text: str) -> None:
        said = json.loads(text)
        self.kept, self.eps, self.relu = tuple(said["kept"]), said["eps"], said["relu"]
        self.slots = {role: _slot(*each) for role, each in zip(said["roles"], said["operands"], strict=True)}
        self.results = [_slot(*each) for each in said["results"]]
        self.name = said["name"]
        self.run: Callable[[list[int]], None] = getattr(self, f"_{said['name']}")
        x = self.slots["x"]
        self.features = prod(x.shape[axis] for axis in self.kept)
        self.values = prod(x.shape) // self.features
        if where := self.slots.get("where"):
            strides = broadcast_strides(where.shape, where.strides, x.shape)
            self.slots["where"] = where._replace(shape=x.shape, strides=strides)
        self.noted: ndarray | None = None
        self.places = {role: place for place, role in enumerate(self.slots)}

    def _parameter(self, role: str) -> int:
        """A parameter as notes have it."""
        place = self.places.get(role, 0)
        slot = self.slots[role] if place else self.slots["x"]
        return place * xla.PLACE_OF + slot.kind * xla.KIND_OF + slot.item

    def _small_steps(self) -> list[Any] | None:
        """The steps of a plain call in training on an array that one thread is enough for; None of any other."""
        x = self.slots["x"]
        dy = self.slots.get("dy", x)
        at = _strided.common_kind(x.kind, dy.kind), x.shape, self.kept
        if not {"dy", "x", "weight", "bias", "mean_bits", "m2_bits"}.issuperset(self.slots) or self.name == "moments":
            return None
        if self.name == "forward":
            steps: list[Any] = [_strided.forward_step(*at, x.strides, x.strides)]
        elif split(x.shape, self.kept, x.strides):
            return None
        else:
            passes = gate.RELU if self.relu else gate.OPEN
            steps = [
                _strided.grad_sums_step(*at, passes, (), x.strides, dy.strides, x.strides),
                _strided.grad_input_step(*at, passes, grad_input.BATCH, x.strides, dy.strides, *[x.strides] * 4),
            ]
        return steps if all(step is not None and step.pieces == 1 for step in steps) else None

    def note(self, text: ndarray) -> ndarray | None:
        """What compiled code needs to make this call; None if Python should."""
        steps = self._small_steps()
        if steps is None:
            return None
        note, x = np.zeros(xla.NOTE_WORDS, np.int64), self.slots["x"]
        numbers = note.view(np.float64)
        note[xla.TEXT], note[xla.LENGTH] = text.ctypes.data, text.size
        note[xla.ROUTE] = xla.FORWARD if self.name == "forward" else xla.BACKWARD
        note[xla.FEATURES], note[xla.KIND], note[xla.RELU] = self.features, x.kind, self.relu
        numbers[xla.EPS], numbers[xla.COUNT] = self.eps, self.values
        note[xla.WEIGHT], note[xla.BIAS] = self._parameter("weight"), self._parameter("bias")
        if self.name == "backward":
            note[xla.MEAN], note[xla.M2] = self.places["mean_bits"], self.places["m2_bits"]
            note[xla.DY_KIND], note[xla.GROUPS] = self.slots["dy"].kind, steps[0].groups
            note[xla.SUM_KIND], note[xla.SUM_ITEM] = self.results[1][:2]
            note[xla.ADD_GROUPS] = grad_sums.add_groups.address
        for number, step in enumerate(steps):
            begin = xla.STEPS + number * xla.STEP_WORDS
            note[begin : begin + xla.STEP_WORDS] = _noted(step)
        return note

    def memory(self, role: str, addresses: list[int]) -> Memory | None:
        place = self.places.get(role)
        return None if place is None else self.slots[role].at(addresses[place])

    def vector(self, role: str, addresses: list[int]) -> Vector | None:
        place = self.places.get(role)
        return None if place is None else self.slots[role].read(addresses[place])

    def write(self, addresses: list[int], first: int, *vectors: Vector) -> None:
        """Write vectors to results, from the first on."""
        begin = len(self.slots)
        for number, values in enumerate(vectors, first):
            self.results[number].write(values, addresses[begin + number])

    def result(self, number: int, addresses: list[int]) -> Memory:
        return self.results[number].at(addresses[len(self.slots) + number])

    def _moments(self, addresses: list[int]) -> None:
        x, where = self.slots["x"].at(addresses[0]), self.memory("where", addresses)
        count, mean, m2 = _strided.find_moments(x, self.kept, where)
        self.write(addresses, 0, mean, m2, *(() if where is None else (count,)))

    def _forward(self, addresses: list[int]) -> None:
        x, y = self.slots["x"].at(addresses[0]), self.result(0, addresses)
        weight, bias = self.vector("weight", addresses), self.vector("bias", addresses)
        residual, where = self.memory("residual", addresses), self.memory("where", addresses)
        transform = partial(
            Transform, self.kept, eps=self.eps, weight=weight, bias=bias, relu=self.relu, residual=residual
        )
        if "mean" in self.slots:
            mean, var = self.vector("mean", addresses), self.vector("var", addresses)
            _strided.write_normalized(x, transform(count=1, mean=mean, m2=var), residual, y, False)
            return
        if residual is None and where is None:
            found = _strided.find_and_write(x, self.kept, self.eps, weight, bias, self.relu, y, False)
            if found is not None:
                self.write(addresses, 1, *found[1:])
                return
        count, mean, m2 = _strided.find_moments(x, self.kept, where)
        self.write(addresses, 1, mean, m2, *(() if where is None else (count,)))
        counted = self.values if where is None else count
        _strided.write_normalized(x, transform(count=counted, mean=mean, m2=m2), residual, y, False)

    def _backward(self, addresses: list[int]) -> None:
        dy, x = (self.slots[role].at(addresses[self.places[role]]) for role in ("dy", "x"))
        where = self.memory("where", addresses)
        residual = self.memory("residual", addresses) if self.relu else None
        weight, bias = self.vector("weight", addresses), self.vector("bias", addresses)
        is_constant = "mean" in self.slots
        count: Any = 1 if is_constant else self.values if where is None else self.vector("count_bits", addresses)
        mean = self.vector("mean" if is_constant else "mean_bits", addresses)
        m2 = self.vector("var" if is_constant else "m2_bits", addresses)
        transform = Transform(self.kept, count, mean, m2, self.eps, weight, bias, self.relu, residual)
        sum_dz, sum_dz_x = _strided.find_grad_sums(dy, x, transform, residual)
        self.write(addresses, 1, sum_dz_x, sum_dz)
        dresidual = None if residual is None else self.result(3, addresses)
        sums = None if is_constant else (sum_dz, sum_dz_x)
        _strided.write_grad_input(dy, x, transform, residual, where, sums, self.result(0, addresses), dresidual, False)


def _noted(step: Any) -> list[int]:
    """A step as notes have it."""
    grid, axes = step.grid, step.axes
    return [step.kernel.address, step.room, grid.ctypes.data, grid.size, axes.ctypes.data, *axes.shape]


_plans: dict[bytes, _Plan] = {}

# Where compiled code looks for notes, and everything that it may find there: calls may be under way at any time.
_register = np.zeros(xla.NOTES, np.int64)
_notes: list[ndarray | None] = []
_texts: list[ndarray] = []


def _prepared(text: bytes) -> _Plan:
    """Make the plan of a text."""
    plan = _plans[text] = _Plan(text.decode())
    _texts.append(np.frombuffer(text, np.uint8))
    plan.noted = plan.note(_texts[-1])
    _notes.append(plan.noted)
    return plan


# What XLA was told went wrong, for as long as it takes to read it.
_messages: deque[Any] = deque(maxlen=64)


def _answer(frame: int) -> int:
    """Do what a frame asks for; an exception that escapes, as an interruption can, is answered with 0."""
    try:
        told = np.empty(xla.TOLD, np.int64)
        xla.tell.call(frame, told)
        at, size, *addresses = told.tolist()
        text = ctypes.string_at(at, size)
        plan = _plans.get(text)
        if plan is None:
            plan = _prepared(text)
        plan.run(addresses)
        if plan.noted is not None:  # the next call is made without Python, unless another text has the place
            _register[at // 16 % xla.NOTES] = plan.noted.ctypes.data
    except BaseException as error:
        message = ctypes.create_string_buffer(f"bnarray: {type(error).__name__}: {error}".encode())
        _messages.append(message)
        return ctypes.addressof(message)
    return xla.DONE


# Kept, as XLA keeps its address.
_c_answer = ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_int64)(_answer)


def call(name: str, what: Call, operands: Sequence[Any], avals: Sequence[Any]) -> list[Any]:
    """Return the results of a call, as part of the program that is being made."""
    text = json.dumps(
        {
            "name": name,
            **what._asdict(),
            "operands": [(each.dtype.name, each.shape) for each in operands],
            "results": [(each.dtype.name, each.shape) for each in avals],
        }
    )
    results = [jax.ShapeDtypeStruct(each.shape, each.dtype) for each in avals]
    return list(jax.ffi.ffi_call(_TARGET, results)(*operands, plan=text))


_registering = threading.Lock()


@cache
def _register_target() -> None:
    python = ctypes.cast(_c_answer, ctypes.c_void_p).value
    assert python is not None
    capsule = jax.ffi.pycapsule(ctypes.c_void_p(xla.handler(python, _register.ctypes.data)))
    jax.ffi.register_ffi_target(_TARGET, capsule, platform="cpu")


def _moments_of_two() -> list[float]:
    _register_target()
    x = np.array([[1.0], [3.0]], np.float32)
    like = jax.ShapeDtypeStruct((1,), np.float32)
    made = jax.jit(lambda x: call("moments", Call((1,), 0.0, False, ("x",)), [x], [like, like]))
    return [float(each[0]) for each in made(jax.device_put(x, jax.local_devices(backend="cpu")[0]))]


@cache
def _try_out() -> bool:
    try:
        with ThreadPoolExecutor(1) as elsewhere:  # where no transformation is under way
            found = elsewhere.submit(_moments_of_two).result()
        if found == [2.0, 2.0]:
            return True
        reason: object = "it gave wrong numbers"
    except Exception as error:
        reason = error
    warnings.warn(
        f"this JAX ({jax.__version__}) cannot call bnarray's kernels, so the formula in jax.numpy takes their place: "
        f"{reason}",
        RuntimeWarning,
        stacklevel=2,
    )
    return False


def is_usable() -> bool:
    """Whether XLA can call the kernels; tried out once."""
    with _registering:
        return _try_out()
