"""XLA's side of a call: the function that it calls with a frame, and what of the frame Python is told.

XLA's foreign function interface (`xla/ffi/api/c_api.h`) hands over one structure of integers and addresses. What may go
wrong in Python, an interruption included, becomes an error of XLA's here.
"""

from functools import cache

import llvmlite.binding
import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from bnarray.kernels.cpu.compiled import Kernel, index, results, vector
from bnarray.kernels.cpu.memory import read, view, write

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

_PYTHON = "bnarray_xla_call"
_call_python = types.ExternalFunction(_PYTHON, types.int64(types.int64))


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


def _handle(frame):
    words = view(frame, _FRAME_WORDS, 0)
    if words[_FRAME_EXTENSION] != 0:  # XLA asks for which version this was written
        metadata = view(words[_FRAME_EXTENSION], _METADATA + 1, 0)[_METADATA]
        view(metadata, _METADATA_VERSION + 1, 0)[_METADATA_VERSION] = _VERSION
        view(metadata, _METADATA_TRAITS + 1, np.int32(0))[_METADATA_TRAITS] = 0
        return 0
    api = view(words[_FRAME_API], _API_WORDS, 0)
    answer = 0
    if words[0] >= 8 * _FRAME_WORDS and api[0] >= 8 * _API_WORDS and api[_API_VERSION] & _MAJOR == 0:
        answer = _call_python(frame)
    return 0 if answer == DONE else _fail(api[_API_ERROR], answer)


def _tell(frame, told):
    words = view(frame, _FRAME_WORDS, 0)
    text = view(view(words[_ATTRIBUTES + 3], 1, 0)[0], 2, 0)
    told[0], told[1] = text[0], text[1]
    place = 2
    for side in (_ARGUMENTS, _RESULTS):
        buffers = view(words[side + 2], words[side], 0)
        for i in range(words[side]):
            told[place] = view(buffers[i], _BUFFER_DATA + 1, 0)[_BUFFER_DATA]
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
def handler(python: int) -> int:
    """Return the address of XLA's handler, which calls the C function at an address with that of every frame."""
    llvmlite.binding.add_symbol(_PYTHON, python)
    return Kernel("xla_handle", types.int64(types.int64), _handle, for_c=True).c_address
