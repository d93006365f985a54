"""The part of dy that passes ReLU backwards, on one tile::

    dz = dy where not z <= 0, else 0        z = (x − mean) · scale + bias + residual

z is computed again as `normalize` did, which costs no memory traffic: x is read anyway.
"""

from bnarray.kernels.cpu.compiled import mapping

#: How dz follows from dy: it is dy; dy gated by ReLU; dy gated by ReLU onto a residual.
OPEN, RELU, RELU_ONTO = range(3)


@mapping
def gate_rows(dy, x, dz, rows, columns, mean, scale, bias):
    center, factor, shift = mean[0], scale[0], bias[0]
    for i in range(x.size):
        z = (x[i] - center) * factor + shift
        dz[i] = 0.0 if z <= 0.0 else dy[i]


@mapping
def gate_rows_onto(dy, x, residual, dz, rows, columns, mean, scale, bias):
    center, factor, shift = mean[0], scale[0], bias[0]
    for i in range(x.size):
        z = (x[i] - center) * factor + shift + residual[i]
        dz[i] = 0.0 if z <= 0.0 else dy[i]


@mapping
def gate_columns(dy, x, dz, rows, columns, mean, scale, bias):
    for row in range(rows):
        line = slice(row * columns, (row + 1) * columns)
        x_row, dy_row, dz_row = x[line], dy[line], dz[line]
        for j in range(columns):
            z = (x_row[j] - mean[j]) * scale[j] + bias[j]
            dz_row[j] = 0.0 if z <= 0.0 else dy_row[j]


@mapping
def gate_columns_onto(dy, x, residual, dz, rows, columns, mean, scale, bias):
    for row in range(rows):
        line = slice(row * columns, (row + 1) * columns)
        x_row, r_row, dy_row, dz_row = x[line], residual[line], dy[line], dz[line]
        for j in range(columns):
            z = (x_row[j] - mean[j]) * scale[j] + bias[j] + r_row[j]
            dz_row[j] = 0.0 if z <= 0.0 else dy_row[j]
