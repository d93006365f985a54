"""Elements of any dtype, read as float32 or float64 and written from them."""

from functools import cache

import numpy as np

from bnarray.kernels.cuda.compiled import cuda, machinery, pointer, types

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
def loader(kind, real):
    """Make the function that reads an element as a `real` number."""

    @machinery
    def load(array, i):
        return real(array[i])

    @machinery
    def load_bfloat16(array, i):
        return real(_float_of(np.uint32(np.uint32(array[i]) << np.uint32(16))))

    return load_bfloat16 if kind == BFLOAT16 else load


@cache
def storer(kind):
    """Make the function that rounds a number, to the nearest or the even one, and writes it."""

    @machinery
    def store_float16(array, i, value):
        array[i] = np.float16(np.float32(value))

    @machinery
    def store_bfloat16(array, i, value):
        single = np.float32(value)
        bits = _bits_of(single)
        rounded = np.uint32(bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1)))
        array[i] = np.uint16(np.uint32(rounded >> np.uint32(16)) if single == single else np.uint32(0x7FC0))

    @machinery
    def store_float32(array, i, value):
        array[i] = np.float32(value)

    @machinery
    def store_float64(array, i, value):
        array[i] = np.float64(value)

    return (store_float16, store_bfloat16, store_float32, store_float64)[kind]
