"""A layer, folded into what comes before it."""

import operator

from bnarray.dispatch import Array, backend, backend_with, wrapping
from bnarray.layer import BatchNorm


def fold(kernel: Array, bias: Array | None, layer: BatchNorm, *, axis: int = 0) -> tuple[Array, Array]:
    r"""Fold an evaluated layer into the convolution or matrix before it.

    .. math:: W' = W \cdot s, \quad b' = (b - \mathrm{mean}) \cdot s + \mathrm{layer.bias}, \quad
              s = \frac{\mathrm{layer.weight}}{\sqrt{\mathrm{running\_var} + \mathrm{eps}}}

    Parameters
    ----------
    kernel
        The weights: torch's convolutions and matrices have their outputs on axis 0, Keras's and Flax's on axis -1.
    bias
        The bias before the layer, of shape (outputs,); None is 0.
    layer
        The layer, with as many features as the kernel has outputs. It is folded as it evaluates, whatever its mode.
    axis
        The kernel's output axis.

    Returns
    -------
    kernel, bias : array
        New ones, in the kernel's dtype. The activation, if the layer has one, is still to be applied.

    Raises
    ------
    TypeError
        If an argument is of the wrong kind, or of another library than the kernel.
    ValueError
        If the shapes do not fit.

    Examples
    --------
    >>> import numpy as np
    >>> import bnarray as bn
    >>> layer = bn.BatchNorm(2, eps=0.0)
    >>> layer.bias += 3
    >>> kernel, bias = bn.fold(np.eye(2), None, layer)
    >>> bias
    array([3., 3.])
    """
    if not isinstance(layer, BatchNorm):
        raise TypeError(f"layer is a {type(layer).__name__}; it should be a BatchNorm")
    verbs = backend(kernel, "kernel")
    verbs.check(kernel, "kernel")
    verbs = wrapping(backend_with(verbs, "kernel", kernel, "bias", bias), layer.weight, layer.bias)
    shape = layer.stats.features_shape
    try:
        axis = operator.index(axis)
    except TypeError:
        raise TypeError(f"axis is {axis!r}; it should be an integer") from None
    if not -kernel.ndim <= axis < kernel.ndim:
        raise ValueError(f"axis is {axis}, but kernel has {kernel.ndim} axes")
    outputs = (kernel.shape[axis],)
    if shape != outputs:
        raise ValueError(f"layer has features of shape {shape}; the kernel's outputs along axis {axis} are {outputs}")
    if bias is not None:
        verbs.check(bias, "bias")
        if tuple(bias.shape) != outputs:
            raise ValueError(f"bias has shape {tuple(bias.shape)}; it should have the kernel's outputs, {outputs}")
    mean, var = (verbs.convert(array, kernel) for array in layer.stats.mean_and_var())
    scale, shift = verbs.invstd(1, var, layer.eps), verbs.zeros(shape, kernel)
    if layer.weight is not None:
        scale = scale * verbs.widen(verbs.convert(layer.weight, kernel))
        shift = verbs.widen(verbs.convert(layer.bias, kernel))
    before = -mean if bias is None else verbs.widen(bias) - mean
    folded = verbs.widen(kernel) * verbs.along(kernel, (axis % kernel.ndim,), scale)
    return verbs.cast(folded, kernel.dtype), verbs.cast(before * scale + shift, kernel.dtype)
