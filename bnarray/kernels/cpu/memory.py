"""Between the caller's memory and tiles.

A tile is some lines of contiguous elements of one type, small enough for the nearest cache. Where the caller's memory
already is that, the tile is that memory; everything else (strides, another type, unaligned addresses) is copied into
a buffer of one tile, a copy whose cost disappears behind the memory bus.

Half precision comes in tiles of its bits, which loops `widen` and `narrow` as they go: a copy of float32 in between
took as long as the loops.
"""

import numpy as np
from llvmlite import ir
from llvmlite.binding import get_process_triple
from numba import types
from numba.core.registry import cpu_target
from numba.extending import intrinsic, overload
from numba.np.arrayobj import populate_array
from numba.np.numpy_support import from_dtype

from bnarray.kernels.cpu.compiled import PART, machinery, mapping, named

FLOAT16, BFLOAT16, FLOAT32, FLOAT64, BOOL = range(5)

#: What the elements of a tile are. Two types of integers tell the two kinds of halves apart.
ELEMENTS = {FLOAT16: np.int16, BFLOAT16: np.uint16, FLOAT32: np.float32, FLOAT64: np.float64, BOOL: np.uint8}
_KINDS = {from_dtype(np.dtype(element)): kind for kind, element in ELEMENTS.items()}


def arithmetic(element):
    """A 0 of the type in which loops over such elements compute."""
    return np.float64(0) if element is np.float64 else np.float32(0)


_WORD, _LINE = 4, 64  # bytes: the least that can be streamed, and a line of a cache
_LONG = 8 * _LINE  # bytes

NOWHERE = 0  # the address of an operand that a kernel does not read, and of a tile that is not in memory yet


def _array_at(context, builder, kind, address, size):
    """Emit an array of one axis over memory that it does not own."""
    array = context.make_array(kind)(context, builder)
    item = context.get_constant(types.intp, context.get_abi_sizeof(context.get_data_type(kind.dtype)))
    pointer = builder.inttoptr(address, context.get_data_type(kind.dtype).as_pointer())
    populate_array(array, data=pointer, shape=[size], strides=[item], itemsize=item, meminfo=None)
    return array._getvalue()


@intrinsic
def view(typingctx, address, size, like):
    """The contiguous array of like's type at an aligned address."""
    kind = types.Array(like, 1, "C")

    def codegen(context, builder, signature, args):
        return _array_at(context, builder, kind, args[0], args[1])

    return kind(types.int64, types.int64, like), codegen


@intrinsic
def line(typingctx, at, step, row, size, like):
    """A line of a tile: contiguous values of like's type."""
    kind = types.Array(like, 1, "C")

    def codegen(context, builder, signature, args):
        address = builder.add(args[0], builder.mul(args[2], args[1]))
        return _array_at(context, builder, kind, address, args[3])

    return kind(types.int64, types.int64, types.int64, types.int64, like), codegen


@intrinsic
def _peek(typingctx, address, like):
    """The value of like's type at any address, aligned or not."""

    def codegen(context, builder, signature, args):
        pointer = builder.inttoptr(args[0], context.get_value_type(like).as_pointer())
        return builder.load(pointer, align=1)

    return like(types.int64, like), codegen


@intrinsic
def _poke(typingctx, address, value):
    """Write the value at any address, aligned or not."""

    def codegen(context, builder, signature, args):
        pointer = builder.inttoptr(args[0], args[1].type.as_pointer())
        builder.store(args[1], pointer, align=1)
        return context.get_dummy_value()

    return types.void(types.int64, value), codegen


def _streams(words, align):
    """Make the function that copies so many words of 4 bytes past the caches, to an aligned address."""

    def stream(typingctx, source, target):
        def codegen(context, builder, signature, args):
            kind = ir.VectorType(ir.IntType(32), words).as_pointer()
            value = builder.load(builder.inttoptr(args[0], kind), align=1)
            store = builder.store(value, builder.inttoptr(args[1], kind), align=align)
            store.set_metadata("nontemporal", builder.module.add_metadata([ir.IntType(32)(1)]))
            return context.get_dummy_value()

        return types.void(types.int64, types.int64), codegen

    return intrinsic(named(f"stream_{words}", stream))


_stream_word, _stream_line = _streams(1, _WORD), _streams(_LINE // _WORD, _LINE)


@intrinsic
def _prefetch(typingctx, address):
    def codegen(context, builder, signature, args):
        pointer, integer = ir.IntType(8).as_pointer(), ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [pointer, integer, integer, integer])
        function = builder.module.declare_intrinsic("llvm.prefetch", [pointer], kind)
        builder.call(function, [builder.inttoptr(args[0], pointer), *map(integer, (0, 3, 1))])
        return context.get_dummy_value()

    return types.void(types.int64), codegen


@machinery
def expect(tile, row, columns, like):
    """Ask the processor for four lines, as far after a row as the tile says, or for the next four."""
    at, down, lead = tile
    if lead == 0:
        return
    lead = lead if down == columns * item_of(like) else 4 * down
    for each in range(row, row + 4):
        begin = at + each * down + lead
        for address in range(begin, begin + columns * item_of(like), _LINE):
            _prefetch(address)


@intrinsic
def _single_of_bits(typingctx, bits):
    def codegen(context, builder, signature, args):
        return builder.bitcast(args[0], ir.FloatType())

    return types.float32(types.uint32), codegen


@intrinsic
def _bits_of_single(typingctx, value):
    def codegen(context, builder, signature, args):
        return builder.bitcast(args[0], ir.IntType(32))

    return types.uint32(types.float32), codegen


@machinery
def item_of(like):
    """The bytes of a value of like's type."""
    return view(0, 0, like).itemsize


@machinery
def room_in(scratch):
    """Memory that `carve` takes from: its address and its end."""
    return (scratch.ctypes.data + 63) // 64 * 64, scratch.ctypes.data + scratch.size


@machinery
def carve(room, size, like):
    """An array of like's type for the kernel's own use, and the room that is left."""
    at, end = room
    after = at + (size * item_of(like) + 63) // 64 * 64
    if after > end:
        raise MemoryError("a kernel's scratch memory is too small")
    return view(at, size, like), (after, end)


@machinery
def carve_rows(room, rows, size, like):
    """As `carve`, an array of two axes."""
    flat, room = carve(room, rows * size, like)
    return flat.reshape(rows, size), room


#: Where NumPy's C structure of an array (PyArrayObject_fields) has the address of the first element: right after what
#: every Python object begins with.
HEADER = object.__basicsize__


@machinery
def data_of(array):
    """The address of an array's first element, by that of the array's object."""
    return view(array + HEADER, 1, 0)[0]


# Conversions, vectorised by the compiler. float16: 1 sign, 5 exponent, 10 fraction bits; bfloat16: the upper half of a
# float32. To the nearest, ties to even.


@machinery
def _same(value):
    return value


@machinery
def _of_bool(value):
    return np.float32(value != 0)


@machinery
def _of_bfloat(half):
    return _single_of_bits(np.uint32(half) << np.uint32(16))


@machinery
def _round_to_bfloat(value):
    """As `_to_bfloat`, of what is no NaN or one whose lower half is 0: as is every NaN that a processor makes, or that
    it finds in a bfloat16."""
    bits = _bits_of_single(np.float32(value))
    odd = (bits >> np.uint32(16)) & np.uint32(1)
    return np.uint16(np.uint32(bits + np.uint32(0x7FFF) + odd) >> np.uint32(16))


@machinery
def _to_bfloat(value):
    return _round_to_bfloat(value) if value == value else np.uint16(0x7FC0)  # what is not itself is NaN


_SCALE_OF_HALF = np.float32(2.0**112)  # moves a float16's exponent, read as a float32's, to its place
_SMALLEST_NORMAL_HALF = np.uint32(113 << 23)
_BEYOND_HALF = np.uint32(143 << 23)  # 2¹⁶
_ROUNDS_SUBNORMALS = np.uint32(126 << 23)  # 0.5: added, it leaves a float16 subnormal's bits at the bottom


@machinery
def _of_half_by_integers(half):
    magnitude = np.uint32(half & np.uint16(0x7FFF)) << np.uint32(13)
    sign = np.uint32(half & np.uint16(0x8000)) << np.uint32(16)
    finite = _bits_of_single(_single_of_bits(magnitude) * _SCALE_OF_HALF)
    special = magnitude | np.uint32(0x7F800000)
    return _single_of_bits(sign | (special if magnitude >= np.uint32(0x0F800000) else finite))


@machinery
def _to_half_by_integers(value):
    bits = _bits_of_single(np.float32(value))
    sign = (bits >> np.uint32(16)) & np.uint32(0x8000)
    magnitude = bits & np.uint32(0x7FFFFFFF)
    odd = (magnitude >> np.uint32(13)) & np.uint32(1)
    normal = np.uint32(magnitude - np.uint32(112 << 23) + np.uint32(0xFFF) + odd) >> np.uint32(13)
    shifted = _single_of_bits(magnitude) + _single_of_bits(_ROUNDS_SUBNORMALS)
    subnormal = np.uint32(_bits_of_single(shifted) - _ROUNDS_SUBNORMALS)
    special = np.uint32(0x7E00) if magnitude > np.uint32(0x7F800000) else np.uint32(0x7C00)
    finite = subnormal if magnitude < _SMALLEST_NORMAL_HALF else normal
    return np.uint16(sign | (special if magnitude >= _BEYOND_HALF else finite))


@intrinsic
def _of_half_by_processor(typingctx, half):
    def codegen(context, builder, signature, args):
        return builder.fpext(builder.bitcast(args[0], ir.HalfType()), ir.FloatType())

    return types.float32(types.uint16), codegen


@intrinsic
def _to_half_by_processor(typingctx, value):
    def codegen(context, builder, signature, args):
        single = context.cast(builder, args[0], signature.args[0], types.float32)
        return builder.bitcast(builder.fptrunc(single, ir.HalfType()), ir.IntType(16))

    return types.uint16(value), codegen


# Most processors convert float16 themselves, six to eight times as fast. For others LLVM would call a function that
# nobody provides.
_FEATURES = cpu_target.target_context.codegen().magic_tuple()[2]
_CONVERTS_HALVES = "+f16c" in _FEATURES or get_process_triple().startswith(("aarch64", "arm64"))
_of_half = _of_half_by_processor if _CONVERTS_HALVES else _of_half_by_integers
_to_half = _to_half_by_processor if _CONVERTS_HALVES else _to_half_by_integers


HALVES = (types.int16, types.uint16)


def _widen_half(bits):
    return _of_half(bits)


def _widen_bfloat(bits):
    return _of_bfloat(bits)


def _narrow_half(value):
    return _to_half(value)


def _narrow_bfloat(value):
    return _round_to_bfloat(value)


@intrinsic
def widen(typingctx, element):
    """The number that an element of a tile is: of halves a float32."""
    convert = _widen_half if element == types.int16 else _widen_bfloat
    number = types.float32 if element in HALVES else element

    def codegen(context, builder, signature, args):
        if element not in HALVES:
            return args[0]
        return context.compile_internal(builder, convert, number(types.uint16), args)

    return number(element), codegen


@intrinsic
def narrow(typingctx, value, like):
    """A number as an element of a tile of like's type; of NaN the lower half should be 0."""
    convert = _narrow_half if like == types.int16 else _narrow_bfloat

    def codegen(context, builder, signature, args):
        if like not in HALVES:
            return args[0]
        return context.compile_internal(builder, convert, types.uint16(value), args[:1])

    return (like if like in HALVES else value)(value, like), codegen


@intrinsic
def zero_of(typingctx, number):
    """A 0 of the number's type."""

    def codegen(context, builder, signature, args):
        return context.get_constant(number, 0.0)

    return number(number), codegen


def _reader(name, like, convert):
    """Make the function that reads `line.size` elements of like's type, `step` bytes apart, into a line of a tile."""
    item = like.itemsize

    def read(address, step, line):
        if step == item and address % item == 0:
            source = view(address, line.size, like)
            for i in range(line.size):
                line[i] = convert(source[i])
        elif step == 0:
            value = convert(_peek(address, like))
            for i in range(line.size):
                line[i] = value
        else:
            for i in range(line.size):
                line[i] = convert(_peek(address + i * step, like))

    return mapping(named(f"read_{name}", read))


def _writer(name, like, convert):
    """Make the function that writes a line of a tile to elements of like's type, `step` bytes apart."""
    item = like.itemsize
    kind = type(like)

    def write(line, address, step):
        if step == item and address % item == 0:
            target = view(address, line.size, like)
            for i in range(line.size):
                target[i] = convert(line[i])
        else:
            for i in range(line.size):
                _poke(address + i * step, kind(convert(line[i])))

    return mapping(named(f"write_{name}", write))


_read_half, _write_half = _reader("half", np.uint16(0), _of_half), _writer("half", np.uint16(0), _to_half)
_read_bfloat, _write_bfloat = _reader("bfloat", np.uint16(0), _of_bfloat), _writer("bfloat", np.uint16(0), _to_bfloat)
_read_single, _write_single = _reader("single", np.float32(0), _same), _writer("single", np.float32(0), _same)
_read_double, _write_double = _reader("double", np.float64(0), _same), _writer("double", np.float64(0), _same)
_read_bool, _read_byte = _reader("bool", np.uint8(0), _of_bool), _reader("byte", np.uint8(0), _same)
_read_bits, _write_bits = _reader("bits", np.uint16(0), _same), _writer("bits", np.uint16(0), _same)


def _read_numbers(address, step, kind, line):
    if kind == FLOAT32:
        _read_single(address, step, line)
    elif kind == FLOAT64:
        _read_double(address, step, line)
    elif kind == FLOAT16:
        _read_half(address, step, line)
    elif kind == BFLOAT16:
        _read_bfloat(address, step, line)
    else:
        _read_bool(address, step, line)


def _read_halves(address, step, kind, line):
    _read_bits(address, step, line)


def _read_bools(address, step, kind, line):
    _read_byte(address, step, line)


def _write_numbers(line, address, step, kind):
    if kind == FLOAT32:
        _write_single(line, address, step)
    elif kind == FLOAT64:
        _write_double(line, address, step)
    elif kind == FLOAT16:
        _write_half(line, address, step)
    else:
        _write_bfloat(line, address, step)


def _write_halves(line, address, step, kind):
    _write_bits(line, address, step)


def read(address, step, kind, line):
    """Fill a line with elements of a kind, `step` bytes apart; a line of halves or bools with such halves or bools."""


@overload(read, jit_options=PART)
def _read(address, step, kind, line):
    return _read_halves if line.dtype in HALVES else _read_bools if line.dtype == types.uint8 else _read_numbers


def write(line, address, step, kind):
    """Write a line to elements of a kind, `step` bytes apart; a line of halves to such halves."""


@overload(write, jit_options=PART)
def _write(line, address, step, kind):
    return _write_halves if line.dtype in HALVES else _write_numbers


@intrinsic
def _native_kind(typingctx, buffer):
    """The kind of the elements of a buffer."""
    kind = _KINDS[buffer.dtype]

    def codegen(context, builder, signature, args):
        return context.get_constant(types.int64, kind)

    return types.int64(buffer), codegen


@machinery
def _is_tile(address, steps, columns, kind, buffer):
    """Whether the memory already is a tile: lines of the buffer's type, aligned, each contiguous."""
    item = buffer.itemsize
    down, across = steps
    return (
        kind == _native_kind(buffer) and address % item == 0 and down % item == 0 and (columns == 1 or across == item)
    )


@machinery
def tile_of(buffer, columns):
    """A buffer as a tile: (address, bytes from line to line, bytes ahead at which to `expect` lines, or 0)."""
    return np.int64(buffer.ctypes.data), columns * buffer.itemsize, 0


@machinery
def from_row(tile, row, offset=0):
    """The part of a tile from a row on, and from some bytes to the right."""
    at, down, lead = tile
    return at + row * down + offset, down, lead


@machinery
def _evenly(down, across, rows, columns):
    """Lines, and their length, to copy; one line if all steps are the same."""
    return (1, rows * columns) if down == columns * across else (rows, columns)


@machinery
def load(address, steps, rows, columns, kind, buffer, lead=0):
    """The tile of rows × columns elements at the address, `steps` = (down, across) bytes apart.

    As `tile_of` gives it: the memory itself where it can be, else the buffer.
    """
    down, across = steps
    if _is_tile(address, steps, columns, kind, buffer):
        return address, down, lead
    lines, size = _evenly(down, across, rows, columns)
    for row in range(lines):
        read(address + row * down, across, kind, buffer[row * size : (row + 1) * size])
    return tile_of(buffer, columns)


@machinery
def target(address, steps, rows, columns, kind, buffer, is_apart):
    """The tile to write before `store`: the memory itself where it can be, unless it `is_apart`.

    In place it has to be: reading and writing one address would keep the loops from being vectorised.
    """
    if not is_apart and _is_tile(address, steps, columns, kind, buffer):
        return address, steps[0], 0
    return tile_of(buffer, columns)


@machinery
def _stream(source, target, size, ahead, also_ahead):
    """Copy bytes past the caches, and meanwhile ask for as many at two other addresses."""
    head = min(size, -target % _LINE)
    for at in range(0, head, _WORD):
        _stream_word(source + at, target + at)
    whole = head + (size - head) // _LINE * _LINE
    for at in range(head, whole, _LINE):
        _prefetch(ahead + at)
        _prefetch(also_ahead + at)
        _stream_line(source + at, target + at)
    for at in range(whole, size, _WORD):
        _stream_word(source + at, target + at)


@machinery
def store(address, steps, rows, columns, kind, buffer, at, streamed, read_tile, other_tile):
    """Bring the buffer's tile to its memory, unless the tile is `at` that address.

    `streamed` past the caches, while what comes after the tiles that were read is on its way. Other threads see it
    after the next atomic operation of this one, which takes another piece or finds that there is none.
    """
    down, across = steps
    if at == address:
        return
    lines, size = _evenly(down, across, rows, columns)
    length = size * buffer.itemsize
    is_line = across == buffer.itemsize and _is_tile(address, steps, columns, kind, buffer)
    streamed = streamed and is_line and length >= _LONG and (address | down | length) % _WORD == 0
    for row in range(lines):
        line = buffer[row * size : (row + 1) * size]
        if streamed:
            ahead, also_ahead = from_row(read_tile, rows + row)[0], from_row(other_tile, rows + row)[0]
            _stream(line.ctypes.data, address + row * down, length, ahead, also_ahead)
        else:
            write(line, address + row * down, across, kind)
