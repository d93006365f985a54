"""Flax's `BatchNorm`, of linen and of nnx."""

from collections.abc import Mapping
from typing import Any

from bnarray.convert import _common as common
from bnarray.convert._common import Axis, Converted, Settings
from bnarray.dispatch import Array
from bnarray.layer import BatchNorm
from bnarray.stats import explains_momentum

_CORRECTION = 0
_NAMES = ("scale", "bias", "mean", "var")


@explains_momentum
def from_flax(
    source: Any,
    *,
    eps: float | None = None,
    update_rate: float | None = None,
    axis: Axis = -1,
    frozen: bool = False,
    like: Array | None = None,
) -> BatchNorm:
    """Return a `BatchNorm` from one of Flax: its arrays (copied), and what an nnx module tells besides.

    Parameters
    ----------
    source
        A ``flax.nnx.BatchNorm``; or, of a linen module (which holds no arrays), the layer's own variables:
        ``{"params": {"scale": ..., "bias": ...}, "batch_stats": {"mean": ..., "var": ...}}``, or the four in one
        mapping.
    eps, update_rate, axis
        Of a mapping; the update rate is 1 - momentum. An nnx module tells its own.
    frozen
        Carry over evaluation only: training does not move the running statistics (update_rate 0), and the layer is
        in evaluation mode.
    like
        An array whose library, device and dtype the layer has (half precision is kept as float32); float64 NumPy by
        default.

    Returns
    -------
    BatchNorm
        With ``correction=0``, Flax's. Flax counts no updates: ``stats.num_updates`` is 0. The mode is that of an nnx
        module (use_running_average), else training.

    Raises
    ------
    TypeError
        If source is neither, or a setting is missing.
    KeyError
        If the mapping lacks an array.
    ValueError
        If there is one of scale and bias only, or (unless `frozen`) the module averages over devices (axis_name).

    Examples
    --------
    >>> import numpy as np
    >>> import bnarray as bn
    >>> variables = {"batch_stats": {"mean": np.array([1.0, 2.0]), "var": np.array([3.0, 4.0])}}
    >>> bn.convert.from_flax(variables, eps=1e-5, update_rate=1 - 0.75)
    BatchNorm(2, axis=-1, eps=1e-05, update_rate=0.25, correction=0.0, affine=False, activation=None)
    """
    training = True
    if hasattr(source, "use_running_average"):
        settings, arrays = _of_module(source, eps, update_rate, frozen)
        training = not source.use_running_average
    else:
        settings = common.stated("source", source, eps, update_rate, axis)
        arrays = _flat(source)
    return common.layer_of(
        arrays,
        _NAMES,
        settings,
        correction=_CORRECTION,
        frozen=frozen,
        like=like,
        training=training,
    )


def _of_module(
    module: Any, eps: float | None, update_rate: float | None, frozen: bool
) -> tuple[Settings, dict[str, Any]]:
    common.check_unstated(eps, update_rate)
    if not hasattr(module, "mean"):
        raise TypeError(
            "source is a module of linen, which holds no arrays; pass the layer's variables, with eps= and update_rate="
        )
    if module.axis_name is not None and not frozen:
        raise ValueError(
            f"source normalises over the devices of axis_name={module.axis_name!r}, and a BatchNorm over its own "
            f"batch; pass frozen=True for evaluation only"
        )
    settings = Settings(module.epsilon, common.complement(module.momentum), module.axis)
    return settings, {name: getattr(module, name) for name in _NAMES}


def _flat(source: Mapping[str, Any]) -> dict[str, Any]:
    groups = [each for each in ("params", "batch_stats") if each in source]
    if not groups:
        return dict(source)
    for group in groups:
        if not isinstance(source[group], Mapping):
            raise TypeError(
                f"{group} is a {type(source[group]).__name__}; it should be a mapping of one layer's arrays"
            )
    return {name: array for group in groups for name, array in source[group].items()}


def to_flax(
    layer: BatchNorm, *, count: float | None = None, frozen: bool = False, like: Array | None = None
) -> Converted:
    """Return a layer as Flax has it: options of a module, and its variables.

    Parameters
    ----------
    layer
        Any, but without an activation.
    count
        The elements per feature of one batch, by which running variances of another correction are converted.
    frozen
        Carry over evaluation only: the variance as it is, and a momentum of 1.
    like
        An array whose library, device and dtype the arrays have; by default NumPy, in the layer's dtypes.

    Returns
    -------
    options : dict
        axis, momentum, epsilon, use_bias, use_scale: of ``linen.BatchNorm`` and ``nnx.BatchNorm``.
    arrays : dict
        The variables, as linen's ``apply`` takes them: ``{"params": {...}, "batch_stats": {...}}``.

    Raises
    ------
    TypeError
        If layer is no `BatchNorm`.
    ValueError
        If Flax has no such layer: an activation; exact cumulative statistics, or variances of another correction
        without `count`, unless `frozen`.

    Examples
    --------
    >>> import bnarray as bn
    >>> options, arrays = bn.convert.to_flax(bn.BatchNorm(2, axis=-1, correction=0))
    >>> options
    {'axis': -1, 'momentum': 0.9, 'epsilon': 1e-05, 'use_bias': True, 'use_scale': True}
    >>> list(arrays["batch_stats"])
    ['mean', 'var']
    """
    common.check_layer(layer, "Flax")
    rate = common.rate_of(layer, "Flax", frozen)
    mean, var, weight, bias = common.arrays_of(
        layer, "Flax", correction=_CORRECTION, count=count, frozen=frozen, like=like
    )
    affine = weight is not None
    options = {
        "axis": layer.axis,
        "momentum": common.complement(rate),
        "epsilon": layer.eps,
        "use_bias": affine,
        "use_scale": affine,
    }
    params = {"scale": weight, "bias": bias} if affine else {}
    return Converted(options, {"params": params, "batch_stats": {"mean": mean, "var": var}})
