"""A whole call on a small array, entered once: each entry into compiled code costs as much as its loops do there.

What is the same in all calls with arguments of the same kinds is on a `sheet`, so that few arguments are left to
convert. Vectors are converted to float64 and back here, and the work is done by the kernels that every other call goes
through. On larger arrays, where threads share the work, the parts of a call are entered one by one (`begin`, `follow`,
`write_sums`).
"""

import numpy as np
from numba import types

from bnarray.kernels.cpu import features, pool
from bnarray.kernels.cpu.compiled import Kernel, index, indices, machinery, number, partials, scratch, table, vector
from bnarray.kernels.cpu.handover import call_at
from bnarray.kernels.cpu.memory import FLOAT32, FLOAT64, NOWHERE, carve, data_of, read, room_in, view, write
from bnarray.kernels.cpu.pool import REFUSED, WORDS

#: What is on a sheet: the kernel's address, whether arrays come as NumPy's objects (or as their memory), the kinds of
#: x's and dy's elements, whether ReLU, the kinds of weight and bias (or NONE), the count.
KERNEL, OBJECTS, KIND, DY_KIND, RELU, WEIGHT, BIAS, COUNT = range(8)
NONE = -1

#: What comes back. All but DONE have changed nothing but memory that nobody has seen.
DONE, BEYOND_FLOAT32, NOT_FINITE, FAILED = range(4)

#: Scratch memory beyond what the kernel takes: bytes, and vectors.
ROOM, SUMS = 256, 2


@machinery
def _at(array, sheet):
    """The address of an array's memory."""
    return data_of(array) if sheet[OBJECTS] else array


@machinery
def _item(kind):
    return 8 if kind == FLOAT64 else 4 if kind == FLOAT32 else 2


@machinery
def _carve_counter(room):
    """A counter for one thread, and the room that is left."""
    counter, room = carve(room, WORDS, 0)
    pool.begin(counter)
    return counter, room


@machinery
def _left(room):
    """The room that is left, as scratch memory (in a tuple: a function does not return an array it made)."""
    at, end = room
    return (view(at, end - at, np.uint8(0)),)


@machinery
def _read_parameters(sheet, weight, bias, vectors):
    if sheet[WEIGHT] != NONE:
        read(_at(weight, sheet), _item(sheet[WEIGHT]), sheet[WEIGHT], vectors[2])
    if sheet[BIAS] != NONE:
        read(_at(bias, sheet), _item(sheet[BIAS]), sheet[BIAS], vectors[3])


@machinery
def _read_statistics(mean, var, vectors):
    read(data_of(mean), 8, FLOAT64, vectors[0])
    read(data_of(var), 8, FLOAT64, vectors[1])


@machinery
def _parameters(sheet, vectors):
    """Rows of weight and bias; where there is none, nothing."""
    size = vectors.shape[1]
    has_weight, has_bias = sheet[WEIGHT] != NONE, sheet[BIAS] != NONE
    return vectors[2, : size if has_weight else 0], vectors[3, : size if has_bias else 0]


@machinery
def _follow(count, vectors, mean, var, rate, correction, new):
    """Write the running statistics after the batch in `vectors` to `new`."""
    found, m2, nothing = vectors[0], vectors[1], vectors[0, :0]
    if not features.all_finite(found, m2):
        return NOT_FINITE
    running_mean, running_var = view(data_of(mean), m2.size, 0.0), view(data_of(var), m2.size, 0.0)
    features.run(running_mean, running_var, count, nothing, found, m2, rate, correction, new)
    return DONE


@machinery
def _write_sums(sheet, sum_dz, sum_dz_x, dweight, dbias):
    if sheet[WEIGHT] != NONE:
        write(sum_dz_x, _at(dweight, sheet), _item(sheet[WEIGHT]), sheet[WEIGHT])
    if sheet[BIAS] != NONE:
        write(sum_dz, _at(dbias, sheet), _item(sheet[BIAS]), sheet[BIAS])


def _train(scratch, sheet, grid, axes, x, y, weight, bias, eps, vectors, mean, var, rate, correction, new):
    """Write y, (mean, m2, weight, bias) to `vectors` and, unless `mean` is NOWHERE, the running ones to `new`."""
    counter, room = _carve_counter(room_in(scratch))
    _read_parameters(sheet, weight, bias, vectors)
    found, m2, nothing, count = vectors[0], vectors[1], vectors[0, :0], float(sheet[COUNT])
    operands = counter, *_left(room), grid, axes, _at(x, sheet), _at(y, sheet), sheet[KIND], sheet[RELU] != 0
    if not call_at(sheet[KERNEL], (*operands, count, nothing, found, m2, eps, *_parameters(sheet, vectors))):
        return FAILED
    if counter[REFUSED]:
        return BEYOND_FLOAT32
    return DONE if mean == NOWHERE else _follow(count, vectors, mean, var, rate, correction, new)


def _evaluate(scratch, sheet, grid, axes, x, y, weight, bias, eps, vectors, mean, var):
    """Write y, and (mean, var, weight, bias) to `vectors`."""
    counter, room = _carve_counter(room_in(scratch))
    _read_statistics(mean, var, vectors)
    _read_parameters(sheet, weight, bias, vectors)
    at, kind, relu = _at(x, sheet), sheet[KIND], sheet[RELU] != 0
    operands = counter, *_left(room), grid, axes, at, _at(y, sheet), at, kind, False, relu
    statistics = 1.0, vectors[0, :0], vectors[0], vectors[1], eps
    if not call_at(sheet[KERNEL], (*operands, *statistics, *_parameters(sheet, vectors))):
        return FAILED
    return BEYOND_FLOAT32 if counter[REFUSED] else DONE


def _go_back(scratch, sheet, grid, axes, dy, x, dx, eps, vectors, dweight, dbias):
    """Write dx, dweight and dbias, after `train` wrote the vectors."""
    counter, room = _carve_counter(room_in(scratch))
    sum_dz, room = carve(room, vectors.shape[1], 0.0)
    sum_dz_x, room = carve(room, vectors.shape[1], 0.0)
    kinds = sheet[KIND], sheet[DY_KIND]
    operands = counter, *_left(room), grid, axes, _at(x, sheet), _at(dy, sheet), _at(dx, sheet), *kinds
    statistics = float(sheet[COUNT]), vectors[0, :0], vectors[0], vectors[1], eps, *_parameters(sheet, vectors)
    if not call_at(sheet[KERNEL], (*operands, *statistics, sum_dz, sum_dz_x)):
        return FAILED
    if counter[REFUSED]:
        return BEYOND_FLOAT32
    _write_sums(sheet, sum_dz, sum_dz_x, dweight, dbias)
    return DONE


def _track(count, mean, m2, rate, running_mean, running_var, kind, room):
    """Take a batch's statistics into running ones in memory; return whether they are finite, else nothing is done."""
    if not features.all_finite(mean, m2):
        return False
    old, new = room[:2], room[2:]
    read(running_mean, _item(kind), kind, old[0])
    read(running_var, _item(kind), kind, old[1])
    features.run(old[0], old[1], count, mean[:0], mean, m2, rate, 1.0, new)
    write(new[0], running_mean, _item(kind), kind)
    write(new[1], running_var, _item(kind), kind)
    return True


def _begin(sheet, weight, bias, vectors, mean, var):
    if mean != NOWHERE:
        _read_statistics(mean, var, vectors)
    _read_parameters(sheet, weight, bias, vectors)


_entry = scratch, indices, indices, table
train = Kernel(
    "train",
    types.int64(*_entry, index, index, index, index, number, partials, index, index, number, number, partials),
    _train,
)
evaluate = Kernel(
    "evaluate", types.int64(*_entry, index, index, index, index, number, partials, index, index), _evaluate
)
go_back = Kernel("go_back", types.int64(*_entry, index, index, index, number, partials, index, index), _go_back)

#: Reads weight and bias, and statistics to evaluate with unless they are NOWHERE, into vectors.
begin = Kernel("begin", types.void(indices, index, index, partials, index, index), _begin)
follow = Kernel("follow", types.int64(number, partials, index, index, number, number, partials), _follow.py_func)
write_sums = Kernel("write_sums", types.void(indices, vector, vector, index, index), _write_sums.py_func)

#: Follows a batch in memory that others own: vectors of one kind, contiguous. Takes room for four vectors.
track = Kernel("track", types.boolean(number, vector, vector, number, index, index, index, partials), _track)
