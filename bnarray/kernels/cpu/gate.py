"""What of dy passes ReLU backwards, element by element::

    dz = dy where not z + residual <= 0, else 0        z = (x − mean) · scale + bias

z is computed again as `normalize` did, in the loops that add dz up or write it: x is read there anyway. Those loops are
compiled for each gate, which they know by its type.
"""

import numpy as np
from numba import types
from numba.extending import overload

from bnarray.kernels.cpu.compiled import PART
from bnarray.kernels.cpu.memory import narrow, zero_of

#: How dz follows from dy: it is dy; dy gated by ReLU; dy gated by ReLU onto a residual.
OPEN, RELU, RELU_ONTO = range(3)

#: What stands for a gate inside of kernels. (A function would do, were not the names of compiled functions made of its
#: address, which another one may have in another process.)
GATES = {OPEN: np.int8(0), RELU: np.int16(0), RELU_ONTO: np.int32(0)}


def _open(gate, dy, x, residual, center, scale, shift):
    return dy


def _relu(gate, dy, x, residual, center, scale, shift):
    z = (x - center) * scale + shift
    return zero_of(dy) if z <= 0 else dy


def _relu_onto(gate, dy, x, residual, center, scale, shift):
    z = (x - center) * scale + shift + residual
    return zero_of(dy) if z <= 0 else dy


def passing(gate, dy, x, residual, center, scale, shift):
    """What of dy passes: numbers as loops compute in, with the center, scale and shift of `coefficients`."""


@overload(passing, jit_options={**PART, "fastmath": {"contract"}})
def _passing(gate, dy, x, residual, center, scale, shift):
    return {types.int8: _open, types.int16: _relu, types.int32: _relu_onto}[gate]


def _drop(gate, dz, into, i, like):
    pass


def _keep(gate, dz, into, i, like):
    into[i] = narrow(dz, like)


def keep(gate, dz, into, i, like):
    """Write what passed, which is the residual's gradient too; nothing where there is no residual."""


@overload(keep, jit_options=PART)
def _keeping(gate, dz, into, i, like):
    return _keep if gate == types.int32 else _drop
