"""Haiku's `BatchNorm`."""

from collections.abc import Mapping
from math import log, prod
from typing import Any

from bnarray.convert import _common as common
from bnarray.convert._common import Settings
from bnarray.dispatch import Array
from bnarray.layer import BatchNorm
from bnarray.stats import checked_number, explains_momentum

_CORRECTION = 0
_NAMES = ("scale", "offset", "mean_ema", "var_ema")

#: What is left of the start in an average whose debiasing has come to an end: less than float32 can tell.
_FORGOTTEN = 2.0**-25


@explains_momentum
def from_haiku(
    params: Mapping[str, Any],
    state: Mapping[str, Any],
    name: str = "batch_norm",
    *,
    eps: float,
    update_rate: float,
    axis: int = -1,
    frozen: bool = False,
    like: Array | None = None,
) -> BatchNorm:
    """Return a `BatchNorm` from the parameters and the state of a Haiku network.

    Parameters
    ----------
    params, state
        Of the network: ``params[name]`` has scale and offset (or is missing), ``state[name + "/~/mean_ema"]`` and
        ``state[name + "/~/var_ema"]`` have average and counter.
    name
        The module's.
    eps, update_rate
        The module's eps, and 1 - decay_rate: Haiku keeps neither with the arrays.
    axis
        The feature axis: -1 for ``channels_last``, 1 for ``channels_first``.
    frozen
        Carry over evaluation only: training does not move the running statistics (update_rate 0), and the layer is
        in evaluation mode.
    like
        An array whose library, device and dtype the layer has (half precision is kept as float32); float64 NumPy by
        default.

    Returns
    -------
    BatchNorm
        With ``correction=0``, Haiku's, and ``stats.num_updates`` from the counter. The mode is training.

    Raises
    ------
    TypeError
        If an argument is of the wrong kind.
    KeyError
        If an array is missing.
    ValueError
        If there is one of scale and offset only; if the arrays have other than one feature axis; if Haiku's average is
        young (unless `frozen`): its updates still weigh more than 1 - decay_rate, which a BatchNorm's never do.

    Examples
    --------
    >>> import numpy as np
    >>> import bnarray as bn
    >>> state = {
    ...     "batch_norm/~/mean_ema": {"average": np.array([[1.0, 2.0]]), "counter": 100},
    ...     "batch_norm/~/var_ema": {"average": np.array([[3.0, 4.0]]), "counter": 100},
    ... }
    >>> bn.convert.from_haiku({}, state, eps=1e-5, update_rate=1 - 0.75).stats.mean
    array([1., 2.])
    """
    for what, given in (("params", params), ("state", state)):
        if not isinstance(given, Mapping):
            raise TypeError(f"{what} is a {type(given).__name__}; it should be a mapping")
    mean, var = (common.entry(state, f"{name}/~/{average}") for average in ("mean_ema", "var_ema"))
    averages = {"mean_ema": common.entry(mean, "average"), "var_ema": common.entry(var, "average")}
    given = {each: array for each, array in params.get(name, {}).items() if each in _NAMES and array is not None}
    counter = int(common.entry(mean, "counter"))
    update_rate = checked_number(update_rate, "update_rate", most=1)
    if not frozen and not _is_forgotten(update_rate, counter):
        raise ValueError(
            f"state has a counter of {counter}: Haiku's average is still debiased, so that its next update weighs more "
            f"than update_rate={update_rate:g}; train on in Haiku, or pass frozen=True for evaluation only"
        )
    return common.layer_of(
        {each: _along(array, each, axis) for each, array in (averages | given).items()},
        _NAMES,
        Settings(eps, update_rate, axis),
        correction=_CORRECTION,
        frozen=frozen,
        like=like,
        num_updates=counter,
    )


def _is_forgotten(update_rate: float, counter: int) -> bool:
    return counter > 0 and (1 - update_rate) ** counter <= _FORGOTTEN


def _along(value: Any, name: str, axis: int) -> Array:
    """The features of an array that has an axis of size 1 for every other axis of x."""
    array = common.array_of(value, name)
    shape = tuple(array.shape)
    if not -len(shape) <= axis < len(shape) or shape[axis] != prod(shape):
        raise ValueError(f"{name} has shape {shape}, which is not features along axis {axis}; pass axis=")
    return array.reshape(-1)


def to_haiku(
    layer: BatchNorm,
    ndim: int,
    name: str = "batch_norm",
    *,
    count: float | None = None,
    frozen: bool = False,
    like: Array | None = None,
) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Return a layer as Haiku has it: options of the module's constructor, parameters and state.

    Parameters
    ----------
    layer
        With its features on axis 1 or -1.
    ndim
        The axes of x: Haiku's arrays have as many.
    name
        The module's.
    count
        The elements per feature of one batch, by which running variances of another correction are converted.
    frozen
        Carry over evaluation only: the variance as it is, and a decay_rate of 1, by which Haiku's training gives NaN.
    like
        An array whose library, device and dtype the arrays have: ``jax.numpy.empty(0)`` for what ``apply`` takes. By
        default NumPy, in the layer's dtypes.

    Returns
    -------
    options : dict
        create_scale, create_offset, decay_rate, eps, data_format.
    params, state : dict
        By the modules' names. The counter is the layer's number of updates, but so large at least that Haiku's
        debiasing, which a BatchNorm has not, is over.

    Raises
    ------
    TypeError
        If layer is no `BatchNorm`.
    ValueError
        If Haiku has no such layer: another axis, an activation; exact cumulative statistics, variances of another
        correction without `count`, or an update_rate of 0, unless `frozen`.

    Examples
    --------
    >>> import bnarray as bn
    >>> options, params, state = bn.convert.to_haiku(bn.BatchNorm(2, axis=-1, correction=0), 4)
    >>> params["batch_norm"]["scale"].shape
    (1, 1, 1, 2)
    """
    common.check_layer(layer, "Haiku")
    axis = common.single_axis(layer, "Haiku")
    if axis not in (1, -1):
        raise ValueError(f"layer has axis {axis}; Haiku's features are on axis 1 or -1")
    if ndim < 2:
        raise ValueError(f"ndim is {ndim}; it should be the number of x's axes, 2 at least")
    rate = common.rate_of(layer, "Haiku", frozen)
    if rate == 0 and not frozen:
        raise ValueError("layer has update_rate=0, and Haiku's average must move; pass frozen=True for evaluation only")
    arrays = common.arrays_of(layer, "Haiku", correction=_CORRECTION, count=count, frozen=frozen, like=like)
    shape = [1] * ndim
    shape[axis] = -1
    mean, var, weight, bias = (None if array is None else array.reshape(tuple(shape)) for array in arrays)
    options = {
        "create_scale": weight is not None,
        "create_offset": weight is not None,
        "decay_rate": common.complement(rate),
        "eps": layer.eps,
        "data_format": "channels_last" if axis == -1 else "channels_first",
    }
    counter = max(layer.stats.num_updates, _long_enough(rate))
    state = {
        f"{name}/~/{average}": {"average": array, "counter": counter, "hidden": array}
        for average, array in (("mean_ema", mean), ("var_ema", var))
    }
    return options, {} if weight is None else {name: {"scale": weight, "offset": bias}}, state


def _long_enough(update_rate: float) -> int:
    """The number of updates after which Haiku's average weighs them by update_rate."""
    if update_rate in (0, 1):
        return 1
    return int(log(_FORGOTTEN) / log(1 - update_rate)) + 1
