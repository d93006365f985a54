"""XLA's side of a call: the function that it calls with a frame.

XLA's foreign function interface (`xla/ffi/api/c_api.h`) hands over one structure of integers and addresses. Small calls
in training, which Python would make twice as slow, are made here, of what Python has noted in the *register*; all
others are Python's, where what may go wrong, an interruption included, becomes an error of XLA's here.
"""

from functools import cache

import llvmlite.binding
import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from bnarray.kernels.cpu.compiled import Kernel, index, machinery, results, vector
from bnarray.kernels.cpu.handover import call_at
from bnarray.kernels.cpu.memory import read, view, write
from bnarray.kernels.cpu.pool import REFUSED, WORDS, begin

# Of a frame, in words of eight bytes. The sizes are the smallest that hold all that is read.
_FRAME_WORDS, _FRAME_EXTENSION, _FRAME_API, _ARGUMENTS, _RESULTS, _ATTRIBUTES = 21, 1, 2, 7, 12, 17
_API_WORDS, _API_VERSION, _API_ERROR = 7, 4, 6
_BUFFER_DATA = 3
_METADATA, _METADATA_VERSION = 3, 3
_METADATA_TRAITS = 8  # in halves of words
_MAJOR = 2**32 - 1  # the lower half of a version

#: What a frame is told as: text's address and length, then the addresses of arguments and results.
TOLD = 32

#: What Python answers where nothing went wrong; else it is the address of a message, or 0 if not even that.
DONE = 1

# The version of the interface that this is written for: 0.1, the oldest that is accepted. XLA refuses newer ones than
# its own and then has no CPU at all.
_VERSION = 1 << 32

#: How many notes the register has room for: addresses, found by that of the text in a frame.
NOTES = 1024

#: A note, in words: the text that it is for, what is to be done, then what kernels are called with. Notes are never
#: changed, and never freed.
TEXT, LENGTH, ROUTE, FEATURES, KIND, RELU, EPS, COUNT, WEIGHT, BIAS = range(10)
MEAN, M2, DY_KIND, SUM_KIND, SUM_ITEM, GROUPS, ADD_GROUPS, STEPS = range(10, 18)

#: What is to be done.
FORWARD, BACKWARD = 1, 2

#: A step of a note: the kernel, its scratch memory, its tables.
KERNEL, ROOM, GRID, GRID_SIZE, AXES, AXES_ROWS, AXES_COLUMNS = range(7)
STEP_WORDS = 7
NOTE_WORDS = STEPS + 2 * STEP_WORDS

#: A parameter in a note: its place among the arguments (0, where x or dy is, if there is none), kind and item size.
PLACE_OF, KIND_OF, ITEM_OF = 1 << 16, 1 << 8, 1

_PYTHON, _REGISTER = "bnarray_xla_call", "bnarray_xla_register"
_call_python = types.ExternalFunction(_PYTHON, types.int64(types.int64))
_malloc = types.ExternalFunction("malloc", types.int64(types.int64))
_free = types.ExternalFunction("free", types.void(types.int64))
_memcmp = types.ExternalFunction("memcmp", types.int32(types.int64, types.int64, types.int64))


def _external(module, kind):
    known = module.globals.get(_REGISTER)
    return known if known is not None else ir.GlobalVariable(module, kind, _REGISTER)


@intrinsic
def _register(typingctx):
    """The address of the register."""

    def codegen(context, builder, signature, args):
        word = ir.IntType(64)
        return builder.ptrtoint(_external(builder.module, word), word)

    return types.int64(), codegen


@intrinsic
def _fail(typingctx, function, message):
    """Make an error of XLA's with a message, by the function at an address."""
    word, small = ir.IntType(64), ir.IntType(32)
    arguments = ir.LiteralStructType([word, word, word, small])  # size, extension, message, code

    def codegen(context, builder, signature, args):
        otherwise = context.insert_const_string(builder.module, "bnarray: the call was interrupted")
        given = builder.icmp_signed("!=", args[1], args[1].type(0))
        message = builder.select(given, args[1], builder.ptrtoint(otherwise, word))
        passed = cgutils.alloca_once(builder, arguments)
        for place, value in enumerate((word(28), word(0), message, small(13))):  # 13: internal
            builder.store(value, builder.gep(passed, [small(0), small(place)]))
        create = builder.inttoptr(args[0], ir.FunctionType(word, [arguments.as_pointer()]).as_pointer())
        return builder.call(create, [passed])

    return types.int64(types.int64, types.int64), codegen


@machinery
def _text(frame):
    """The address and the length of a frame's text."""
    text = view(view(view(frame, _FRAME_WORDS, 0)[_ATTRIBUTES + 3], 1, 0)[0], 2, 0)
    return text[0], text[1]


@machinery
def _address(frame, side, place):
    """Where an argument or a result is."""
    buffers = view(view(frame, _FRAME_WORDS, 0)[side + 2], place + 1, 0)
    return view(buffers[place], _BUFFER_DATA + 1, 0)[_BUFFER_DATA]


@machinery
def _note(frame):
    """The address of the note for a frame's text, or 0."""
    text, length = _text(frame)
    noted = view(_register(), NOTES, 0)[text // 16 % NOTES]
    if noted != 0:
        note = view(noted, NOTE_WORDS, 0)
        if note[LENGTH] == length and _memcmp(note[TEXT], text, length) == 0:
            return noted
    return 0


@machinery
def _fetch(frame, what, at, size):
    """Read a parameter to an address; return how much there is of it."""
    place, kind, item = what // PLACE_OF, what // KIND_OF % 256, what % KIND_OF
    if place == 0:
        return 0
    read(_address(frame, _ARGUMENTS, place), item, kind, view(at, size, 0.0))
    return size


@machinery
def _step(note, number, at):
    """What every kernel begins with: counter, scratch memory (both at an address), grid and axes; and the kernel."""
    step = note[STEPS + number * STEP_WORDS : STEPS + (number + 1) * STEP_WORDS]
    counter, scratch = view(at, WORDS, 0), view(at + 8 * WORDS, step[ROOM], np.uint8(0))
    begin(counter)
    rows, columns = step[AXES_ROWS], step[AXES_COLUMNS]
    axes = view(step[AXES], rows * columns, 0).reshape((rows, columns))
    return step[KERNEL], (counter, scratch, view(step[GRID], step[GRID_SIZE], 0), axes)


@machinery
def _forward(frame, note, memory):
    """Write y and the statistics; return whether that worked out."""
    features = note[FEATURES]
    number = view(note.ctypes.data, NOTE_WORDS, 0.0)
    weight = view(memory, _fetch(frame, note[WEIGHT], memory, features), 0.0)
    bias_at = memory + 8 * features
    bias = view(bias_at, _fetch(frame, note[BIAS], bias_at, features), 0.0)
    mean = view(_address(frame, _RESULTS, 1), features, 0.0)
    m2 = view(_address(frame, _RESULTS, 2), features, 0.0)
    kernel, step = _step(note, 0, memory + 16 * features)
    x, y = _address(frame, _ARGUMENTS, 0), _address(frame, _RESULTS, 0)
    operands = x, y, note[KIND], note[RELU] != 0
    statistics = number[COUNT], mean[:0], mean, m2, number[EPS], weight, bias
    return call_at(kernel, (*step, *operands, *statistics)) and step[0][REFUSED] == 0


@machinery
def _backward(frame, note, memory):
    """Write dx and the sums; return whether that worked out."""
    features, kind, dy_kind = note[FEATURES], note[KIND], note[DY_KIND]
    number, sums = view(note.ctypes.data, NOTE_WORDS, 0.0), note[GROUPS] * features
    weight = view(memory, _fetch(frame, note[WEIGHT], memory, features), 0.0)
    bias_at, sums_at = memory + 8 * features, memory + 16 * features
    bias = view(bias_at, _fetch(frame, note[BIAS], bias_at, features), 0.0)
    view(sums_at, 2 * sums, 0.0)[:] = 0
    sum_dz = view(sums_at, sums, 0.0).reshape((note[GROUPS], features))
    sum_dz_x = view(sums_at + 8 * sums, sums, 0.0).reshape((note[GROUPS], features))
    mean = view(_address(frame, _ARGUMENTS, note[MEAN]), features, 0.0)
    m2 = view(_address(frame, _ARGUMENTS, note[M2]), features, 0.0)
    counted = number[COUNT], mean[:0]
    statistics = (*counted, mean, m2, number[EPS], weight, bias)
    dy, x, dx = _address(frame, _ARGUMENTS, 0), _address(frame, _ARGUMENTS, 1), _address(frame, _RESULTS, 0)
    kernel, step = _step(note, 0, sums_at + 16 * sums)
    done = call_at(kernel, (*step, x, dy, x, kind, dy_kind, *statistics, sum_dz, sum_dz_x))
    if not done or step[0][REFUSED] != 0:
        return False
    if not call_at(note[ADD_GROUPS], (sum_dz, sum_dz_x, *counted, m2, number[EPS])):
        return False
    write(sum_dz_x[0], _address(frame, _RESULTS, 1), note[SUM_ITEM], note[SUM_KIND])
    write(sum_dz[0], _address(frame, _RESULTS, 2), note[SUM_ITEM], note[SUM_KIND])
    kernel, step = _step(note, 1, sums_at + 16 * sums)
    operands = x, dy, dx, x, x, x, kind, dy_kind, kind, dx == dy
    done = call_at(kernel, (*step, *operands, *statistics, sum_dz[0], sum_dz_x[0]))
    return done and step[0][REFUSED] == 0


@machinery
def _room(note):
    """Bytes of memory that a note's steps take turns in."""
    steps = max(note[STEPS + ROOM], note[STEPS + STEP_WORDS + ROOM])
    return 64 + 16 * note[FEATURES] * (1 + note[GROUPS]) + steps


def _handle(frame):
    words = view(frame, _FRAME_WORDS, 0)
    if words[_FRAME_EXTENSION] != 0:  # XLA asks for which version this was written
        metadata = view(words[_FRAME_EXTENSION], _METADATA + 1, 0)[_METADATA]
        view(metadata, _METADATA_VERSION + 1, 0)[_METADATA_VERSION] = _VERSION
        view(metadata, _METADATA_TRAITS + 1, np.int32(0))[_METADATA_TRAITS] = 0
        return 0
    api = view(words[_FRAME_API], _API_WORDS, 0)
    if words[0] < 8 * _FRAME_WORDS or api[0] < 8 * _API_WORDS or api[_API_VERSION] & _MAJOR != 0:
        return _fail(api[_API_ERROR], 0)
    noted = _note(frame)
    if noted != 0:
        note = view(noted, NOTE_WORDS, 0)
        memory, done = _malloc(_room(note)), False
        if memory != 0 and note[ROUTE] == FORWARD:
            done = _forward(frame, note, memory)
        elif memory != 0:
            done = _backward(frame, note, memory)
        _free(memory)
        if done:
            return 0
    answer = _call_python(frame)
    return 0 if answer == DONE else _fail(api[_API_ERROR], answer)


def _tell(frame, told):
    words = view(frame, _FRAME_WORDS, 0)
    told[0], told[1] = _text(frame)
    place = 2
    for side in (_ARGUMENTS, _RESULTS):
        for i in range(words[side]):
            told[place] = _address(frame, side, i)
            place += 1


#: Fills an array of TOLD integers with what a frame says.
tell = Kernel("xla_tell", types.void(index, types.Array(types.int64, 1, "C")), _tell)


def _read_vector(address, item, kind, values):
    read(address, item, kind, values)


def _write_vector(values, address, item, kind):
    write(values, address, item, kind)


#: Between elements of a kind, `item` bytes each, and a vector.
read_vector = Kernel("read_vector", types.void(index, index, index, results), _read_vector)
write_vector = Kernel("write_vector", types.void(vector, index, index, index), _write_vector)


@cache
def handler(python: int, register: int) -> int:
    """Return the address of XLA's handler.

    It calls the C function `python` with the address of every frame for which there is no note at `register`.
    """
    llvmlite.binding.add_symbol(_PYTHON, python)
    llvmlite.binding.add_symbol(_REGISTER, register)
    return Kernel("xla_handle", types.int64(types.int64), _handle, for_c=True).c_address
