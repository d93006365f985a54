"""Which elements a thread works on.

The threads of a block are `across` features × lines. Where memory runs along the features (channels last, (N, C)) they
lie side by side, up to 32 to a line; else all threads of a block share one feature. The positions of a feature (its
elements in the order of memory) are cut into chunks; block b has chunk b % chunks of the b // chunks-th features, of
which each line takes every so-many-th position.

A position is a row, the index over the outer axes, and a place along the inner one. Arguments `sizes` and `steps` (the
elements between neighbours, for each operand) go over the outer axes, the inner one, and the feature axes. Indices have
64 bits. Going on to the next position divides only where there are two outer axes or more.

A position may be a vector of elements, which a thread accesses at once. Along the inner axis sizes and steps are then
those of vectors. Along the features (`abreast`) a thread works on as many of them, a tile has as many features with
fewer threads side by side, and more lines. Where each element is worked on by itself, the bits are the same with and
without. Sums hear of the order: for them strides and dtype alone decide whether positions are vectors, and one that is
not aligned is read element by element (`apart`).

What is done once for each feature of a tile, a thread does for one: its number modulo the tile's features.
"""

from functools import cache
from typing import NamedTuple

import numpy as np

from bnarray.kernels.cuda.compiled import THREADS, cuda, index, machinery, numbers


class Shape(NamedTuple):
    """What of an array's layout is compiled in."""

    across: int
    outer: int  # axes
    features: int  # axes
    width: int = 1  # elements of a position: a thread reads and writes so many at once
    apart: bool = False  # ... or one by one, because they are not aligned
    abreast: bool = False  # elements of a position are of so many features, which lie side by side; else of one

    @property
    def axes(self) -> int:
        return self.outer + 1 + self.features

    @property
    def lines(self) -> int:
        return THREADS // self.across

    @property
    def values(self) -> int:
        """How many elements of a position are of one feature."""
        return 1 if self.abreast else self.width

    @property
    def tile(self) -> int:
        """How many features a block has."""
        return self.across * (self.width // self.values)

    @property
    def alone(self) -> "Shape":
        """The same tile, in which each thread works on one feature, if it has several here."""
        return Shape(self.tile, self.outer, self.features) if self.abreast else self

    def __str__(self) -> str:
        wide = f"_{'abreast' if self.abreast else 'by'}_{self.width}{'_apart' * self.apart}" if self.width > 1 else ""
        return f"{self.across}_{self.outer}_{self.features}{wide}"


#: What every kernel takes first: positions of a chunk, chunks, positions, features; what a step to the next position
#: of a line is, in rows and places; then sizes.
GRID = (index, index, index, index, index, index)


def grid(shape):
    return *GRID, numbers(shape.axes)


@cache
def _offset(first, last):
    """Make the function from an index over some axes to the elements before it."""
    if first == last:

        @machinery
        def offset(i, sizes, steps):
            return i * steps[last]

        return offset

    slower = _offset(first, last - 1)

    @machinery
    def offset_of_many(i, sizes, steps):
        rest = i // sizes[last]
        return slower(rest, sizes, steps) + (i - rest * sizes[last]) * steps[last]

    return offset_of_many


@cache
def whose(shape):
    """Make the function that tells a thread of a block, by the block's number, its tile, feature and chunk.

    Lanes beyond the last feature go along with it, and are told to write nothing.
    """
    size = shape.tile

    @machinery
    def of_block(block, chunks, features):
        tile = block // chunks
        c = tile * size + np.int64(cuda.threadIdx.x) % size
        return tile, min(c, features - 1), block - tile * chunks, c < features

    return of_block


@cache
def own(shape):
    """Make the function that tells a thread the first of the features whose elements it works on, as `whose` does."""
    across, width, size = shape.across, shape.width, shape.tile

    @machinery
    def of_tile(tile, features):
        first = tile * size + np.int64(cuda.threadIdx.x) % across * width
        return min(first, features - width), first < features

    @machinery
    def of_tile_alone(tile, features):
        c = tile * size + np.int64(cuda.threadIdx.x) % size
        return min(c, features - 1), c < features

    return of_tile if shape.abreast else of_tile_alone


@cache
def place(shape):
    """Make the functions that tell a thread its chunk and features, and the elements before a feature's first one."""
    of_block, of_tile = whose(shape), own(shape)
    of_feature = _offset(shape.outer + 1, shape.axes - 1)

    @machinery
    def feature(chunks, features):
        tile, c, part, writes = of_block(np.int64(cuda.blockIdx.x), chunks, features)
        first, works = of_tile(tile, features)
        return c, first, part, writes, works

    @machinery
    def start(c, sizes, steps):
        return of_feature(c, sizes, steps)

    return feature, start


@cache
def walk(shape):
    """Make the functions that lead a thread through its part of a chunk: `begin`, `at` and `onward`.

    `begin` returns the number of its positions, and the row and place of the first; `at` the elements before a row and
    place; `onward` the next row and place, as many positions on as a block has lines.
    """
    across, inner, lines = shape.across, shape.outer, shape.lines
    of_row = _offset(0, shape.outer - 1)

    @machinery
    def begin(part, chunk, positions, sizes):
        first = part * chunk
        line = np.int64(cuda.threadIdx.x) // across
        position = first + line
        row = position // sizes[inner]
        times = (min(chunk, positions - first) - line + (lines - 1)) // lines
        return np.int32(times), row, position - row * sizes[inner]

    @machinery
    def at(row, place, sizes, steps):
        return of_row(row, sizes, steps) + place * steps[inner]

    @machinery
    def onward(row, place, rows, places, sizes):
        row += rows
        place += places
        if place >= sizes[inner]:
            place -= sizes[inner]
            row += 1
        return row, place

    return begin, at, onward


@cache
def steps_alone(shape):
    """Make the function that returns rows and places of a step to the next position of a line, for `shape.alone`."""
    inner, lines = shape.outer, shape.alone.lines

    @machinery
    def as_given(rows, places, sizes):
        return rows, places

    @machinery
    def anew(rows, places, sizes):
        row = lines // sizes[inner]
        return row, lines - row * sizes[inner]

    return anew if shape.abreast else as_given
