"""Keras's `BatchNormalization`."""

from typing import Any

from bnarray.convert import _common as common
from bnarray.convert._common import Converted, Settings
from bnarray.dispatch import Array
from bnarray.layer import BatchNorm
from bnarray.stats import explains_momentum

_CORRECTION = 0
_NAMES = ("gamma", "beta", "moving_mean", "moving_variance")


@explains_momentum
def from_keras(
    layer: Any,
    *,
    eps: float | None = None,
    update_rate: float | None = None,
    axis: int = -1,
    frozen: bool = False,
    like: Array | None = None,
) -> BatchNorm:
    """Return a `BatchNorm` from one of Keras 3: its arrays (copied), axis, epsilon and momentum.

    Parameters
    ----------
    layer
        A ``keras.layers.BatchNormalization`` that is built, or a mapping: gamma, beta, moving_mean, moving_variance.
    eps, update_rate, axis
        Of a mapping; the update rate is 1 - momentum. A layer tells its own.
    frozen
        Carry over evaluation only: training does not move the running statistics (update_rate 0), and the layer is
        in evaluation mode.
    like
        An array whose library, device and dtype the layer has (half precision is kept as float32); float64 NumPy by
        default.

    Returns
    -------
    BatchNorm
        With ``correction=0``, Keras's. Keras counts no updates: ``stats.num_updates`` is 0. The mode is training, but
        evaluation for a layer that is not ``trainable``: Keras evaluates it in training too.

    Raises
    ------
    TypeError
        If layer is neither, or a setting is missing.
    KeyError
        If the mapping lacks an array.
    ValueError
        If the layer is not built, is of Keras 2, has one of gamma and beta only, renormalises, or (unless `frozen`) is
        synchronized.

    Examples
    --------
    >>> import numpy as np
    >>> import bnarray as bn
    >>> arrays = {"moving_mean": np.array([1.0, 2.0]), "moving_variance": np.array([3.0, 4.0])}
    >>> bn.convert.from_keras(arrays, eps=1e-3, update_rate=1 - 0.75)
    BatchNorm(2, axis=-1, eps=0.001, update_rate=0.25, correction=0.0, affine=False, activation=None)
    """
    if hasattr(layer, "moving_variance"):
        common.check_unstated(eps, update_rate)
        _check_layer(layer, frozen)
        settings = Settings(layer.epsilon, common.complement(layer.momentum), layer.axis)
        arrays, training = {name: getattr(layer, name) for name in _NAMES}, layer.trainable
    else:
        settings = common.stated("layer", layer, eps, update_rate, axis)
        arrays, training = layer, True
    return common.layer_of(
        arrays,
        _NAMES,
        settings,
        correction=_CORRECTION,
        frozen=frozen,
        like=like,
        training=training,
    )


def _check_layer(layer: Any, frozen: bool) -> None:
    if layer.moving_variance is None:
        raise ValueError("layer is not built and has no arrays yet; call it, or layer.build(shape)")
    if hasattr(layer, "fused"):
        raise ValueError(
            "layer is of Keras 2, whose running variance is unbiased or not, as it is computed; pass its arrays as a "
            "mapping, with frozen=True"
        )
    if getattr(layer, "renorm", False):
        raise ValueError("layer has renorm=True, batch renormalization, which a BatchNorm cannot do")
    if getattr(layer, "synchronized", False) and not frozen:
        raise ValueError(
            "layer is synchronized: it normalises over all replicas, and a BatchNorm over its own batch; pass "
            "frozen=True for evaluation only"
        )


def to_keras(
    layer: BatchNorm, *, count: float | None = None, frozen: bool = False, like: Array | None = None
) -> Converted:
    """Return a layer as Keras has it: options of its constructor, and its weights.

    Parameters
    ----------
    layer
        With one feature axis.
    count
        The elements per feature of one batch, by which running variances of another correction are converted.
    frozen
        Carry over evaluation only: the variance as it is, and a momentum of 1.
    like
        An array whose library, device and dtype the arrays have; by default NumPy, in the layer's dtypes.

    Returns
    -------
    options : dict
        axis, momentum, epsilon, center, scale.
    arrays : dict
        gamma, beta, moving_mean, moving_variance: in the order of ``set_weights``.

    Raises
    ------
    TypeError
        If layer is no `BatchNorm`.
    ValueError
        If Keras has no such layer: several feature axes, an activation; exact cumulative statistics, or variances of
        another correction without `count`, unless `frozen`.

    Examples
    --------
    >>> import bnarray as bn
    >>> options, arrays = bn.convert.to_keras(bn.BatchNorm(2, axis=-1, correction=0))
    >>> options
    {'axis': -1, 'momentum': 0.9, 'epsilon': 1e-05, 'center': True, 'scale': True}
    >>> list(arrays)
    ['gamma', 'beta', 'moving_mean', 'moving_variance']
    """
    common.check_layer(layer, "Keras")
    axis = common.single_axis(layer, "Keras")
    rate = common.rate_of(layer, "Keras", frozen)
    mean, var, weight, bias = common.arrays_of(
        layer, "Keras", correction=_CORRECTION, count=count, frozen=frozen, like=like
    )
    affine = weight is not None
    options = {
        "axis": axis,
        "momentum": common.complement(rate),
        "epsilon": layer.eps,
        "center": affine,
        "scale": affine,
    }
    arrays = {"gamma": weight, "beta": bias} if affine else {}
    return Converted(options, arrays | {"moving_mean": mean, "moving_variance": var})
