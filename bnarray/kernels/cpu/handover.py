"""A kernel call, left in memory for another thread to make without the interpreter.

The caller writes the arguments into a helper's mailbox, as compiled code takes them, and posts them. The helper takes
the post, unpacks the arguments and calls the kernel by its address. A post that it has not taken is taken back.
"""

import hashlib
from functools import cache
from typing import Any, NamedTuple

from llvmlite import ir
from llvmlite.binding import get_process_triple
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from bnarray.kernels.cpu.compiled import Kernel, flag, index, machinery, named
from bnarray.kernels.cpu.memory import view

#: A mailbox: the state of its post, whose it is, how many threads may make the call, the addresses of a C function that
#: numbers them (or NOBODY), of what unpacks it and of the kernel, whether that raised; then the arguments.
STATE, OWNER, SEATS, NUMBERED, UNPACK, KERNEL, FAILED, ARGUMENTS = range(8)
NOBODY = 0

#: How many integers a mailbox takes: there is room for the arguments of any kernel.
SIZE = 512

#: The states of a post; WRITTEN while it is being written.
NOTHING, WRITTEN, POSTED, TAKEN = range(4)


def _integer_at(builder, address):
    return builder.inttoptr(address, ir.IntType(64).as_pointer())


@intrinsic
def add(typingctx, address, number):
    """Atomically add to an integer; return what it was."""

    def codegen(context, builder, signature, args):
        return builder.atomic_rmw("add", _integer_at(builder, args[0]), args[1], "monotonic")

    return types.int64(types.int64, types.int64), codegen


@intrinsic
def _look(typingctx, address):
    """Atomically read an integer, and with it what was written before; leave a core's other thread a moment first."""

    def codegen(context, builder, signature, args):
        if get_process_triple().startswith(("x86_64", "i686")):
            nothing = ir.FunctionType(ir.VoidType(), [])
            builder.call(builder.module.declare_intrinsic("llvm.x86.sse2.pause", (), nothing), [])
        return builder.load_atomic(_integer_at(builder, args[0]), "acquire", 8)

    return types.int64(types.int64), codegen


@intrinsic
def _exchange(typingctx, address, expected, new):
    """Atomically replace an integer if it is what is expected; return whether it was."""

    def codegen(context, builder, signature, args):
        result = builder.cmpxchg(_integer_at(builder, args[0]), args[1], args[2], "acq_rel", "acquire")
        return builder.extract_value(result, 1)

    return types.boolean(types.int64, types.int64, types.int64), codegen


@intrinsic
def _put(typingctx, address, room, value):
    """Write a value of any type to memory, if there is room; return whether there is."""

    def codegen(context, builder, signature, args):
        size = context.get_constant(types.int64, context.get_abi_sizeof(args[2].type))
        fits = builder.icmp_signed("<=", size, args[1])
        with builder.if_then(fits):
            builder.store(args[2], builder.inttoptr(args[0], args[2].type.as_pointer()), align=1)
        return fits

    return types.boolean(types.int64, types.int64, value), codegen


@intrinsic
def _number_by(typingctx, function):
    """Call the C function without parameters at an address; return its int."""

    def codegen(context, builder, signature, args):
        small, word = ir.IntType(32), ir.IntType(64)
        function = builder.inttoptr(args[0], ir.FunctionType(small, []).as_pointer())
        return builder.sext(builder.call(function, []), word)

    return types.int64(types.int64), codegen


@intrinsic
def call_at(typingctx, function, arguments):
    """Call the compiled function at an address; return whether it raised nothing."""

    def codegen(context, builder, signature, args):
        kinds = tuple(signature.args[1])
        pointer = context.call_conv.get_function_type(types.none, kinds).as_pointer()
        values = cgutils.unpack_tuple(builder, args[1], len(kinds))
        function = builder.inttoptr(args[0], pointer)
        return context.call_conv.call_function(builder, function, types.none, kinds, values)[0].is_ok

    return types.boolean(types.int64, arguments), codegen


class Handover(NamedTuple):
    """What posts calls of a kernel (and tells whether the mailbox was free), and what a thread unpacks them with.

    Threads that make one call together have a part of its counters and scratch memory each.
    """

    post: Kernel
    unpack: Kernel


@cache
def _handover(kinds: tuple[Any, ...]) -> Handover:
    packed = types.Tuple(kinds)

    @intrinsic
    def get(typingctx, address):
        def codegen(context, builder, signature, args):
            pointer = context.get_value_type(packed).as_pointer()
            return builder.load(builder.inttoptr(args[0], pointer), align=1)

        return packed(types.int64), codegen

    def unpack(at):
        mail = view(at, SIZE, 0)
        seat, seats = 0, mail[SEATS]
        if mail[NUMBERED] != NOBODY:
            seat = _number_by(mail[NUMBERED])
        if seat < seats:
            arguments = get(at + 8 * ARGUMENTS)
            counters, scratch = arguments[0], arguments[1]
            words, room = counters.size // seats, scratch.size // seats
            own = counters[seat * words : (seat + 1) * words], scratch[seat * room : (seat + 1) * room]
            if not call_at(mail[KERNEL], (*own, *arguments[2:])):
                mail[FAILED] = 1

    @machinery
    def put(at, owner, seats, unpack, kernel, numbered, arguments):
        if not _exchange(at + 8 * STATE, NOTHING, WRITTEN):
            return False
        mail = view(at, SIZE, 0)
        mail[OWNER], mail[SEATS], mail[NUMBERED] = owner, seats, numbered
        mail[UNPACK], mail[KERNEL], mail[FAILED] = unpack, kernel, 0
        if not _put(at + 8 * ARGUMENTS, 8 * (SIZE - ARGUMENTS), arguments):
            raise MemoryError("a kernel has more arguments than a mailbox has room for")
        return _exchange(at + 8 * STATE, WRITTEN, POSTED)

    # A function with as many parameters as the kernel: Numba would find out a tuple's type at every call, in 40 µs.
    names = ", ".join(f"argument{i}" for i in range(len(kinds)))
    written: dict[str, Any] = {"put": put, "__name__": __name__}
    exec(
        f"def post(at, owner, seats, unpack, kernel, numbered, {names}):\n"
        f"    return put(at, owner, seats, unpack, kernel, numbered, ({names}))",
        written,
    )

    digest = hashlib.sha256(str(kinds).encode()).hexdigest()[:16]
    named(f"put_{digest}", put.py_func)
    return Handover(
        Kernel(f"post_{digest}", flag(index, index, index, index, index, index, *kinds), written["post"]),
        Kernel(f"unpack_{digest}", types.void(index), unpack),
    )


@cache
def handover(kernel: Kernel) -> Handover:
    """Return the handover that all kernels with such arguments share."""
    return _handover(kernel.kinds)


@machinery
def _make(mail):
    call_at(view(mail, SIZE, 0)[UNPACK], (mail,))


def _serve(mail, looks):
    quiet = 0
    while quiet < looks:
        quiet += 1
        if _look(mail + 8 * STATE) == POSTED and _exchange(mail + 8 * STATE, POSTED, TAKEN):
            _make(mail)
            _exchange(mail + 8 * STATE, TAKEN, NOTHING)
            quiet = 0


def _join(mail):
    _make(mail)


def _settle(mail, looks):
    _exchange(mail + 8 * STATE, POSTED, NOTHING)
    while looks > 0 and _look(mail + 8 * STATE) != NOTHING:
        looks -= 1
    return looks > 0


#: Makes the calls that come into a mailbox, until so many looks in a row found none.
serve = Kernel("serve", types.void(index, index), _serve)

#: For threads that are told of a mailbox: the function, for C, that makes the call there.
join = Kernel("join", types.void(index), _join, for_c=True)

#: Takes back a post, or waits for the end of its call; returns whether that came within so many looks.
settle = Kernel("settle", flag(index, index), _settle)
