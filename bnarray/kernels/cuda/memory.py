"""Elements of any dtype, read as float32 or float64 and written from them."""

from functools import cache, reduce

import numpy as np

from bnarray.kernels.cuda.compiled import IS_SIMULATED, cuda, machinery, pointer, types

#: What an array's elements are.
FLOAT16, BFLOAT16, FLOAT32, FLOAT64, BOOL = range(5)

NAMES = ("float16", "bfloat16", "float32", "float64", "bool")

#: As kernels take them; elements of bfloat16 are their bits, because Numba does arithmetic on none.
POINTERS = tuple(pointer(each) for each in (types.float16, types.uint16, types.float32, types.float64, types.uint8))


@machinery
def _float_of(bits):
    return cuda.libdevice.int_as_float(np.int32(bits))


@machinery
def _bits_of(value):
    return np.uint32(cuda.libdevice.float_as_int(value))


@cache
def reader(kind, real):
    """Make the function from an element to a `real` number."""

    @machinery
    def read(element):
        return real(element)

    @machinery
    def read_bfloat16(element):
        return real(_float_of(np.uint32(np.uint32(element) << np.uint32(16))))

    return read_bfloat16 if kind == BFLOAT16 else read


@cache
def writer(kind):
    """Make the function from a number to an element: the nearest, or the even one of two."""

    @machinery
    def write_float16(value):
        return np.float16(np.float32(value))

    @machinery
    def write_bfloat16(value):
        single = np.float32(value)
        bits = _bits_of(single)
        rounded = np.uint32(bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1)))
        return np.uint16(np.uint32(rounded >> np.uint32(16)) if single == single else np.uint32(0x7FC0))

    @machinery
    def write_float32(value):
        return np.float32(value)

    @machinery
    def write_float64(value):
        return np.float64(value)

    return (write_float16, write_bfloat16, write_float32, write_float64)[kind]


@cache
def loader(kind, real):
    """Make the function that reads the element at an index as a `real` number."""
    read = reader(kind, real)

    @machinery
    def load(array, i):
        return read(array[i])

    return load


# -- Vectors of up to 16 bytes ----------------------------------------------------------------------------------------

#: Bytes of the widest access of a thread, to which its address is aligned.
WIDEST = 16


#: Bytes of an element.
SIZES = (2, 2, 4, 8, 1)


def width_of(kind: int) -> int:
    """How many elements are in the widest access."""
    return WIDEST // SIZES[kind]


if IS_SIMULATED:
    load_elements = store_elements = item = pick = put = None  # the simulator's
else:
    from llvmlite import ir
    from numba.core import cgutils
    from numba.cuda.extending import intrinsic

    _LONG, _WORD, _HALF = ir.IntType(64), ir.IntType(32), ir.IntType(16)

    def _words(dtype, width):
        """The type of the words in which so many elements are accessed."""
        return ir.VectorType(_WORD, width * dtype.bitwidth // 32)

    def _words_at(context, builder, pointer, i, words):
        """The address of a vector, in global memory."""
        return builder.addrspacecast(
            builder.bitcast(builder.gep(pointer, [i]), words.as_pointer()), words.as_pointer(1)
        )

    def _elements_of(builder, words, kind, width):
        """The elements in words. Those of 16 bits are cut out of words one by one: the compiler would see through a
        cast of the vector, and access its halves."""
        count = words.type.count
        if width <= count:
            elements = builder.bitcast(words, ir.VectorType(kind, width))
            return [builder.extract_element(elements, _WORD(k)) for k in range(width)]
        singles = [builder.extract_element(words, _WORD(k)) for k in range(count)]
        halves = [builder.trunc(each, _HALF) for word in singles for each in (word, builder.lshr(word, _WORD(16)))]
        return [builder.bitcast(half, kind) for half in halves]

    def _words_of(builder, elements, kind, words):
        """Words of elements."""
        width = len(elements)
        vector = ir.Constant(ir.VectorType(kind, width) if width <= words.count else words, ir.Undefined)
        if width > words.count:
            singles = [builder.zext(builder.bitcast(each, _HALF), _WORD) for each in elements]
            pairs = zip(singles[::2], singles[1::2], strict=True)
            elements = [builder.or_(low, builder.shl(high, _WORD(16))) for low, high in pairs]
        for k, element in enumerate(elements):
            vector = builder.insert_element(vector, element, _WORD(k))
        return builder.bitcast(vector, words)

    @cache
    def load_elements(width):
        """Make the function that reads a vector's elements, from the one at an index on, at once."""

        @intrinsic
        def load(typingctx, array, i):
            words_type = _words(array.dtype, width)

            def generate(context, builder, signature, arguments):
                at = _words_at(context, builder, *arguments, words_type)
                words = builder.load(at, align=4 * words_type.count)
                elements = _elements_of(builder, words, context.get_value_type(array.dtype), width)
                return context.make_tuple(builder, signature.return_type, elements)

            return types.UniTuple(array.dtype, width)(array, types.int64), generate

        return load

    @cache
    def store_elements(width):
        """Make the function that writes a vector's elements at once."""

        @intrinsic
        def store(typingctx, array, i, elements):
            words_type = _words(array.dtype, width)

            def generate(context, builder, signature, arguments):
                pointer, at, given = arguments
                singles = [builder.extract_value(given, k) for k in range(width)]
                words = _words_of(builder, singles, context.get_value_type(array.dtype), words_type)
                place = _words_at(context, builder, pointer, at, words_type)
                builder.store(words, place, align=4 * words_type.count)
                return context.get_dummy_value()

            return types.void(array, types.int64, elements), generate

        return store

    @intrinsic
    def item(typingctx, elements, k):
        """Return the k-th of a tuple's elements, for a k that is known."""
        if not isinstance(k, types.IntegerLiteral):
            return None  # and Numba tells what it knows
        place = k.literal_value

        def generate(context, builder, signature, arguments):
            return builder.extract_value(arguments[0], place)

        return elements[place](elements, k), generate

    @intrinsic
    def pick(typingctx, elements, k):
        """Return the k-th of a vector's elements, by a shift if a loop over k is not unrolled."""
        kind, width = elements.dtype, elements.count

        def generate(context, builder, signature, arguments):
            given, at = arguments
            if width == 1:
                return builder.extract_value(given, 0)
            number = ir.IntType(kind.bitwidth)
            singles = [builder.bitcast(builder.extract_value(given, i), number) for i in range(width)]
            singles = [each if number == _LONG else builder.zext(each, _LONG) for each in singles]
            longs = []
            for half in (singles[: width // 2], singles[width // 2 :]):
                shifted = [builder.shl(each, _LONG(i * kind.bitwidth)) for i, each in enumerate(half)]
                longs.append(reduce(builder.or_, shifted))
            is_low = builder.icmp_unsigned("<", at, _LONG(width // 2))
            place = builder.mul(builder.and_(at, _LONG(width // 2 - 1)), _LONG(kind.bitwidth))
            found = builder.lshr(builder.select(is_low, *longs), place)
            found = found if kind.bitwidth == 64 else builder.trunc(found, number)
            return builder.bitcast(found, context.get_value_type(kind))

        return kind(elements, types.int64), generate

    @intrinsic
    def put(typingctx, elements, k, element):
        """Return the elements, with another one in place of the k-th; loops over k are unrolled."""

        def generate(context, builder, signature, arguments):
            given, at, new = arguments
            room = cgutils.alloca_once_value(builder, given)
            builder.store(new, builder.gep(room, [_WORD(0), at]))
            return builder.load(room)

        return elements(elements, types.int64, elements.dtype), generate


@cache
def loading(shape):
    """Make the function that reads the elements of a position, at once or one by one."""
    return load_elements(shape.width) if shape.width > 1 and not shape.apart else _one_by_one(shape.width)


@cache
def _one_by_one(width):
    @machinery
    def at(array, i, k):
        return array[i + k]

    return tuple_of(at, width)


@cache
def tuple_of(function, width):
    """Make the function that returns (function(a, b, 0), function(a, b, 1), …), in which no loop is to be unrolled."""
    last = width - 1

    @machinery
    def one(a, b):
        return (function(a, b, last),)

    if width == 1:
        return one
    before = tuple_of(function, last)

    @machinery
    def many(a, b):
        return before(a, b) + (function(a, b, last),)  # noqa: RUF005  # Numba unpacks no tuples

    return many


def is_by_vectors(kind, real, width):
    """Whether a loop accesses vectors at once: not the one in float64 for what float32 cannot hold, which is rare, and
    would double the time to compile."""
    return width > 1 and (real is np.float32 or kind == FLOAT64)


@cache
def each(function, shape):
    """Make the function that is applied to each of a thread's features: to a tuple's elements, if they are abreast."""

    at = item

    @machinery
    def of_one(elements, _, k):
        return function(at(elements, k))

    of_all = tuple_of(of_one, shape.width)

    @machinery
    def of_each(elements):
        return of_all(elements, 0)

    return of_each if shape.abreast else function


@cache
def all_of(function, shape):
    """Make the function that adds three tuples' elements, in turn, to what comes of those before.

    Abreast, each feature has its own of all this.
    """
    find, at, width = pick, item, shape.width

    @machinery
    def of_all(a, b, c, so_far, shared):
        for k in range(width):
            so_far = function(find(a, k), find(b, k), find(c, k), so_far, shared)
        return so_far

    @machinery
    def of_one(elements, states, k):
        a, b, c = elements
        so_far, shared = states
        return function(at(a, k), at(b, k), at(c, k), at(so_far, k), at(shared, k))

    one_by_one = tuple_of(of_one, width)

    @machinery
    def of_each(a, b, c, so_far, shared):
        return one_by_one((a, b, c), (so_far, shared))

    return of_each if shape.abreast else of_all
