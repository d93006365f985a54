"""Sums over tiles of one feature, in an order that is written down.

Left to the compiler (`reassoc`), the order of a vectorised sum depends on what else it compiled: the same source,
compiled by two processes, gave sums that differed in the last bit. So a tile of one feature is summed like one of many:
lines of equal length are added up element by element into lanes, which vectorises without any licence to reorder, and
then the lanes in eights.
"""

from bnarray.kernels.cpu.compiled import machinery, mapping

# Lines up to the first length are added up as they are; longer ones are cut into lines of the second.
MOST, WIDTH = 256, 64


@machinery
def width_of(columns):
    return columns if columns <= MOST else WIDTH


@machinery
def panels(rows, columns):
    """Yield the parts of a tile that are lines of equal length: (row, where in it, lines, length)."""
    if columns <= MOST:
        yield 0, 0, rows, columns
    else:
        whole, left = divmod(columns, WIDTH)
        for row in range(rows):
            yield row, 0, whole, WIDTH
            if left:
                yield row, whole * WIDTH, 1, left


@machinery
def panel(tile, columns, row, begin, item):
    """The part of a tile, as a tile."""
    at, step, lead = tile
    return at + row * step + begin * item, step if columns <= MOST else WIDTH * item, lead


@mapping
def clear(lanes, columns):
    """Set as many lanes to 0 as `total` adds up."""
    lanes[: (columns + 7) // 8 * 8] = 0


@mapping
def total(lanes, columns):
    """Add up the lanes: eights in order, then the eight by halves."""
    for begin in range(8, columns, 8):
        eight = lanes[begin : begin + 8]
        for j in range(8):
            lanes[j] += eight[j]
    return ((lanes[0] + lanes[4]) + (lanes[2] + lanes[6])) + ((lanes[1] + lanes[5]) + (lanes[3] + lanes[7]))
