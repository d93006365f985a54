"""Elements that wait on chip, in the memory that a block's threads share, to be read twice there and once elsewhere.

Each thread has its own slots, which nobody else looks at, so that no thread waits for another: its i-th position lies
beside those of its neighbours. Copies run on their own (`cp.async`), all of a chunk at a time, wherever elements come
in 4, 8 or 16 bytes.
"""

from functools import cache
from math import ceil

import numpy as np

from bnarray.kernels.cuda.compiled import IS_SIMULATED, THREADS, cuda, machinery, types
from bnarray.kernels.cuda.memory import SIZES, WIDEST
from bnarray.kernels.cuda.walk import walk

#: Bytes for elements. With room to merge in, a block has 48 KB, which no kernel has to ask for: from compute capability
#: 8.0 on, a multiprocessor has room for two such blocks at least. It is a multiple of what 256 threads take at a time,
#: of two arrays too.
SIZE = 40960

#: As they lie there; elements of bfloat16 are their bits.
TYPES = (types.float16, types.uint16, types.float32)


def most(kind: int, arrays: int) -> int:
    """How many elements there may be in a chunk, of each of so many arrays."""
    return SIZE // (arrays * SIZES[kind])


def size(kind, arrays, width):
    """How many elements there are slots for, of each of so many arrays: for whole turns of all threads."""
    return ceil(most(kind, arrays) / (THREADS * width)) * THREADS * width


if IS_SIMULATED:
    copy_at_once = landed = load_staged = None  # the simulator's
else:
    from llvmlite import ir
    from numba.cuda.extending import intrinsic

    from bnarray.kernels.cuda.memory import _elements_of, _words

    _BYTE, _VOID = ir.IntType(8), ir.VoidType()

    def _shared_at(context, builder, array, value, i):
        """The address of an element in shared memory."""
        data = context.make_array(array)(context, builder, value).data
        return builder.addrspacecast(builder.bitcast(builder.gep(data, [i]), _BYTE.as_pointer()), _BYTE.as_pointer(3))

    @cache
    def copy_at_once(width):
        """Make the function that begins to copy so many elements into slots: 16 bytes, 8, or 4."""

        @intrinsic
        def copy(typingctx, staged, slot, array, i):
            size = width * array.dtype.bitwidth // 8

            def generate(context, builder, signature, arguments):
                there, to, here, at = arguments
                target = builder.ptrtoint(_shared_at(context, builder, staged, there, to), ir.IntType(32))
                source = builder.gep(here, [at])
                source = builder.addrspacecast(source, source.type.pointee.as_pointer(1))
                source = builder.ptrtoint(source, ir.IntType(64))
                way = "cg" if size == WIDEST else "ca"
                code = ir.InlineAsm(
                    ir.FunctionType(_VOID, [target.type, source.type]),
                    f"cp.async.{way}.shared.global [$0], [$1], {size};", "r,l,~{memory}", side_effect=True,
                )  # fmt: skip
                builder.call(code, [target, source])
                return context.get_dummy_value()

            return types.void(staged, types.int64, array, types.int64), generate

        return copy

    @intrinsic
    def landed(typingctx):
        """Wait until all that this thread began to copy is there."""

        def generate(context, builder, signature, arguments):
            code = ir.InlineAsm(ir.FunctionType(_VOID, []), "cp.async.wait_all;", "~{memory}", side_effect=True)
            builder.call(code, [])
            return context.get_dummy_value()

        return types.void(), generate

    @cache
    def load_staged(width):
        """Make the function that reads a vector's elements, from the slot at an index on, at once."""

        @intrinsic
        def load(typingctx, staged, slot):
            def generate(context, builder, signature, arguments):
                words_type = _words(staged.dtype, width)
                at = builder.bitcast(_shared_at(context, builder, staged, *arguments), words_type.as_pointer(3))
                words = builder.load(at, align=4 * words_type.count)
                elements = _elements_of(builder, words, context.get_value_type(staged.dtype), width)
                return context.make_tuple(builder, signature.return_type, elements)

            return types.UniTuple(staged.dtype, width)(staged, types.int64), generate

        return load


@cache
def slots(width):
    """Make the function from the number of a thread's position to its first slot."""

    @machinery
    def slot(i):
        return (np.int64(i) * THREADS + np.int64(cuda.threadIdx.x)) * width

    return slot


@cache
def loading_staged(width):
    """Make the function that reads the elements of a position from its slots."""

    @machinery
    def one(staged, slot):
        return (staged[slot],)

    return one if width == 1 else load_staged(width)


@cache
def staging(kind, shape):
    """Make the function that begins to copy a thread's part of a chunk to its slots."""
    begin, at, onward = walk(shape)
    slot, width = slots(shape.width), shape.width
    copy = copy_at_once(width) if width * SIZES[kind] >= 4 else None

    @machinery
    def copy_one(staged, to, x, i):
        staged[to] = x[i]

    copy = copy or copy_one

    @machinery
    def stage(staged, x, start, part, chunk, positions, rows, places, sizes, steps):
        times, row, spot = begin(part, chunk, positions, sizes)
        for i in range(times):
            copy(staged, slot(i), x, start + at(row, spot, sizes, steps))
            row, spot = onward(row, spot, rows, places, sizes)

    return stage
