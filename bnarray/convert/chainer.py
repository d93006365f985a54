"""Chainer's `BatchNormalization` link."""

from typing import Any

from bnarray.convert import _common as common
from bnarray.convert._common import Axis, Converted, Settings
from bnarray.dispatch import Array
from bnarray.layer import BatchNorm
from bnarray.stats import explains_momentum

_CORRECTION = 1
_NAMES = ("gamma", "beta", "avg_mean", "avg_var")


@explains_momentum
def from_chainer(
    link: Any,
    *,
    eps: float | None = None,
    update_rate: float | None = None,
    axis: Axis = 1,
    frozen: bool = False,
    like: Array | None = None,
) -> BatchNorm:
    """Return a `BatchNorm` from one of Chainer: its arrays (copied), axes, eps and decay.

    Parameters
    ----------
    link
        A ``chainer.links.BatchNormalization`` that has its arrays, or a mapping: gamma, beta, avg_mean, avg_var.
    eps, update_rate, axis
        Of a mapping; the update rate is 1 - decay, and the axis that of the features (Chainer's are the others). A link
        tells its own.
    frozen
        Carry over evaluation only: training does not move the running statistics (update_rate 0), and the layer is
        in evaluation mode.
    like
        An array whose library, device and dtype the layer has (half precision is kept as float32); float64 NumPy by
        default.

    Returns
    -------
    BatchNorm
        With ``correction=1``, Chainer's. Chainer counts updates of its fine-tuning only (N), which is not carried over:
        ``stats.num_updates`` is 0. The mode is training.

    Raises
    ------
    TypeError
        If link is neither, or a setting is missing.
    KeyError
        If the mapping lacks an array.
    ValueError
        If the link has no arrays yet, or one of gamma and beta only; if it renormalises; if it normalises over several
        processes, unless `frozen`.

    Examples
    --------
    >>> import numpy as np
    >>> import bnarray as bn
    >>> arrays = {"avg_mean": np.array([1.0, 2.0]), "avg_var": np.array([3.0, 4.0])}
    >>> bn.convert.from_chainer(arrays, eps=2e-5, update_rate=1 - 0.75)
    BatchNorm(2, axis=1, eps=2e-05, update_rate=0.25, correction=1.0, affine=False, activation=None)
    """
    if hasattr(link, "avg_var"):
        common.check_unstated(eps, update_rate)
        _check_link(link, frozen)
        settings = Settings(link.eps, common.complement(link.decay), _kept(link.axis, len(link.avg_var.shape)))
        arrays = {name: getattr(link, name, None) for name in _NAMES}
    else:
        settings = common.stated("link", link, eps, update_rate, axis)
        arrays = link
    return common.layer_of(
        arrays,
        _NAMES,
        settings,
        correction=_CORRECTION,
        frozen=frozen,
        like=like,
    )


def _check_link(link: Any, frozen: bool) -> None:
    if link.avg_var is None:
        raise ValueError("link has no arrays yet; give it a size, or call it")
    if hasattr(link, "rmax"):
        raise ValueError("link does batch renormalization, which a BatchNorm cannot do")
    if hasattr(link, "comm") and not frozen:
        raise ValueError(
            "link normalises over all processes, and a BatchNorm over its own batch; pass frozen=True for evaluation "
            "only"
        )


def _kept(reduced: Axis | None, features: int) -> Axis:
    """The axes of the features, where Chainer names those that it reduces; by default they follow the first."""
    if reduced is None:
        kept = tuple(range(1, 1 + features))
    else:
        axes = reduced if isinstance(reduced, tuple) else (reduced,)
        kept = tuple(each for each in range(features + len(axes)) if each not in axes)
    return kept[0] if len(kept) == 1 else kept


def to_chainer(
    layer: BatchNorm, *, count: float | None = None, frozen: bool = False, like: Array | None = None
) -> Converted:
    """Return a layer as Chainer has it: options of the link's constructor, and its arrays.

    Parameters
    ----------
    layer
        With its features on the axes after the first, in order: ``axis=1``, ``(1, 2)``, and so on.
    count
        The elements per feature of one batch, by which running variances of another correction are converted.
    frozen
        Carry over evaluation only: the variance as it is, and a decay of 1.
    like
        An array whose library, device and dtype the arrays have; by default NumPy, in the layer's dtypes.

    Returns
    -------
    options : dict
        size, decay, eps, use_gamma, use_beta.
    arrays : dict
        gamma, beta, avg_mean, avg_var, and N (the updates of a fine-tuning), 0.

    Raises
    ------
    TypeError
        If layer is no `BatchNorm`.
    ValueError
        If Chainer has no such layer: other axes, an activation; exact cumulative statistics, or variances of another
        correction without `count`, unless `frozen`.

    Examples
    --------
    >>> import bnarray as bn
    >>> options, arrays = bn.convert.to_chainer(bn.BatchNorm(2))
    >>> options
    {'size': 2, 'decay': 0.9, 'eps': 1e-05, 'use_gamma': True, 'use_beta': True}
    """
    common.check_layer(layer, "Chainer")
    axes = layer.axis if isinstance(layer.axis, tuple) else (layer.axis,)
    if axes != tuple(range(1, 1 + len(axes))):
        raise ValueError(f"layer has axis {layer.axis}; Chainer's features are on axis 1, or on those from 1")
    rate = common.rate_of(layer, "Chainer", frozen)
    mean, var, weight, bias = common.arrays_of(
        layer, "Chainer", correction=_CORRECTION, count=count, frozen=frozen, like=like
    )
    affine = weight is not None
    options = {
        "size": layer.stats.num_features,
        "decay": common.complement(rate),
        "eps": layer.eps,
        "use_gamma": affine,
        "use_beta": affine,
    }
    arrays = {"gamma": weight, "beta": bias} if affine else {}
    return Converted(options, arrays | {"avg_mean": mean, "avg_var": var, "N": 0})
