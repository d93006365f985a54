"""The part of dy that passes ReLU backwards, on one tile::

    dz = dy where not z + residual <= 0, else 0        z = (x − mean) · scale + bias

z is computed again as `normalize` did, which costs no memory traffic: x is read anyway. dz is a flat tile. (`like` is a
0 of the elements' type.)
"""

from bnarray.kernels.cpu.coefficients import of_line
from bnarray.kernels.cpu.compiled import mapping
from bnarray.kernels.cpu.memory import line, widen

#: How dz follows from dy: it is dy; dy gated by ReLU; dy gated by ReLU onto a residual.
OPEN, RELU, RELU_ONTO = range(3)


@mapping
def gate_rows(dy_tile, x_tile, dz, rows, columns, like, of):
    for row in range(rows):
        center, scale, shift = of_line(of, row)
        x, dy = line(x_tile[0], x_tile[1], row, columns, like), line(dy_tile[0], dy_tile[1], row, columns, like)
        passed = dz[row * columns : (row + 1) * columns]
        for i in range(x.size):
            z = (widen(x[i]) - center) * scale + shift
            passed[i] = like if z <= 0 else dy[i]


@mapping
def gate_rows_onto(dy_tile, x_tile, r_tile, dz, rows, columns, like, of):
    for row in range(rows):
        center, scale, shift = of_line(of, row)
        x, dy = line(x_tile[0], x_tile[1], row, columns, like), line(dy_tile[0], dy_tile[1], row, columns, like)
        residual, passed = line(r_tile[0], r_tile[1], row, columns, like), dz[row * columns : (row + 1) * columns]
        for i in range(x.size):
            z = (widen(x[i]) - center) * scale + shift + widen(residual[i])
            passed[i] = like if z <= 0 else dy[i]


@mapping
def gate_columns(dy_tile, x_tile, dz, rows, columns, like, of):
    center, scale, shift = of
    for row in range(rows):
        x, dy = line(x_tile[0], x_tile[1], row, columns, like), line(dy_tile[0], dy_tile[1], row, columns, like)
        passed = dz[row * columns : (row + 1) * columns]
        for j in range(x.size):
            z = (widen(x[j]) - center[j]) * scale[j] + shift[j]
            passed[j] = like if z <= 0 else dy[j]


@mapping
def gate_columns_onto(dy_tile, x_tile, r_tile, dz, rows, columns, like, of):
    center, scale, shift = of
    for row in range(rows):
        x, dy = line(x_tile[0], x_tile[1], row, columns, like), line(dy_tile[0], dy_tile[1], row, columns, like)
        residual, passed = line(r_tile[0], r_tile[1], row, columns, like), dz[row * columns : (row + 1) * columns]
        for j in range(x.size):
            z = (widen(x[j]) - center[j]) * scale[j] + shift[j] + widen(residual[j])
            passed[j] = like if z <= 0 else dy[j]
