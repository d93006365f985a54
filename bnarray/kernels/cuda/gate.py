"""The part of dy that passes ReLU backwards::

    dz = dy where not z + residual <= 0, else 0        z = (x − mean) · scale + bias

z is computed again as `normalize` did, which costs no memory traffic: x is read anyway.
"""

#: How dz follows from dy: it is dy; dy gated by ReLU; dy gated by ReLU onto a residual.
OPEN, RELU, RELU_ONTO = range(3)
