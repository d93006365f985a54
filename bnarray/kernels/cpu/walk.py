"""Where a tile lies. A plan is two tables of integers, made once per combination of shapes, axes and strides.

`grid` holds the numbers below; `axes` has a column for every joined axis (down, across, the outer ones, the features)
and a row for their sizes, then one for each operand's strides in bytes. `place` is a tile's index along each axis.
"""

from bnarray.kernels.cpu.compiled import machinery
from bnarray.kernels.cpu.memory import carve
from bnarray.kernels.cpu.pool import take

# fmt: off
(FAMILY, DEPTH, WIDTH, TILE, CHUNKS, SPANS, CHUNKS_PER_GROUP, SPANS_PER_BLOCK, BLOCKS, PIECES, FEATURES_AT) = range(11)
# fmt: on
#: Bytes ahead at which sums ask for lines, or 0; whether what is written goes past the caches.
LEAD, STREAMED = 11, 12
#: How often all features stand side by side in the lines of a tile.
TIMES = 13
DOWN, ACROSS, OUTER_AT = range(3)

#: How tiles lie to features, as in `layout`.
ROWS, COLUMNS, LINES = range(3)


@machinery
def carve_place(room, axes):
    """A tile's index along each axis, 0 so far, and the room that is left."""
    place, room = carve(room, axes.shape[1], 0)
    place[:] = 0
    return place, room


@machinery
def _place_along(axes, first, last, number, place):
    for axis in range(last - 1, first - 1, -1):
        size = axes[0, axis]
        place[axis] = number % size
        number //= size


@machinery
def place_chunk(grid, axes, chunk, place):
    """Place the chunk along the reduced axes; return the tile's rows (of the lines family the span knows them)."""
    if grid[FAMILY] != COLUMNS:
        parts = (axes[0, ACROSS] + grid[WIDTH] - 1) // grid[WIDTH]
        chunk, part = divmod(chunk, parts)
        place[ACROSS] = part * grid[WIDTH]
    if grid[FAMILY] != LINES:
        steps = (axes[0, DOWN] + grid[DEPTH] - 1) // grid[DEPTH]
        chunk, step = divmod(chunk, steps)
        place[DOWN] = step * grid[DEPTH]
    _place_along(axes, OUTER_AT, grid[FEATURES_AT], chunk, place)
    return min(grid[DEPTH], axes[0, DOWN] - place[DOWN])


@machinery
def place_span(grid, axes, span, place):
    """Place the span along the kept axes; return the tile's columns and its features from first to last."""
    if grid[FAMILY] == ROWS:
        _place_along(axes, grid[FEATURES_AT], axes.shape[1], span, place)
        return min(grid[WIDTH], axes[0, ACROSS] - place[ACROSS]), span, span + 1
    if grid[FAMILY] == LINES:
        steps = (axes[0, DOWN] + grid[DEPTH] - 1) // grid[DEPTH]
        lead, step = divmod(span, steps)
        place[DOWN] = step * grid[DEPTH]
        _place_along(axes, grid[FEATURES_AT], axes.shape[1], lead, place)
        first = lead * axes[0, DOWN] + place[DOWN]
        rows = min(grid[DEPTH], axes[0, DOWN] - place[DOWN])
        return min(grid[WIDTH], axes[0, ACROSS] - place[ACROSS]), first, first + rows
    parts = (axes[0, ACROSS] + grid[WIDTH] - 1) // grid[WIDTH]
    lead, part = divmod(span, parts)
    place[ACROSS] = part * grid[WIDTH]
    _place_along(axes, grid[FEATURES_AT], axes.shape[1], lead, place)
    columns = min(grid[WIDTH], axes[0, ACROSS] - place[ACROSS])
    first = lead * axes[0, ACROSS] + place[ACROSS]
    return columns, first, first + columns


@machinery
def address_of(base, axes, operand, place):
    """Where the placed tile of an operand begins."""
    address = base
    for axis in range(place.size):
        address += place[axis] * axes[operand, axis]
    return address


@machinery
def steps_of(axes, operand):
    """The bytes to the next row and to the next column of an operand's tiles."""
    return axes[operand, DOWN], axes[operand, ACROSS]


@machinery
def tiles(counter, grid, axes, place):
    """Yield the tiles of every piece that this thread takes: (group, rows, columns, first, last feature); set place."""
    piece = take(counter)
    while piece < grid[PIECES]:
        group, block = divmod(piece, grid[BLOCKS])
        first_chunk, first_span = group * grid[CHUNKS_PER_GROUP], block * grid[SPANS_PER_BLOCK]
        for chunk in range(first_chunk, min(first_chunk + grid[CHUNKS_PER_GROUP], grid[CHUNKS])):
            rows = place_chunk(grid, axes, chunk, place)
            for span in range(first_span, min(first_span + grid[SPANS_PER_BLOCK], grid[SPANS])):
                columns, first, last = place_span(grid, axes, span, place)
                if grid[FAMILY] == LINES:
                    rows = last - first
                yield group, rows, columns, first, last
        piece = take(counter)
