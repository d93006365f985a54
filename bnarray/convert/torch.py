"""torch's `BatchNorm1d`, `2d`, `3d` and `SyncBatchNorm`."""

from collections.abc import Mapping
from typing import Any

from bnarray.convert import _common as common
from bnarray.convert._common import Converted, Settings
from bnarray.dispatch import Array, backend
from bnarray.layer import BatchNorm
from bnarray.stats import explains_momentum

_CORRECTION = 1
_NAMES = ("weight", "bias", "running_mean", "running_var")

#: Whose forward passes are known.
_MAKERS = ("bnarray", "torch")


@explains_momentum
def from_torch(
    module: Any,
    *,
    eps: float | None = None,
    update_rate: float | None = None,
    frozen: bool = False,
    like: Array | None = None,
) -> BatchNorm:
    """Return a `BatchNorm` from one of torch: its arrays (copied), eps, momentum, number of updates, and mode.

    Parameters
    ----------
    module
        A ``torch.nn.BatchNorm1d``, ``2d``, ``3d`` (or bnarray.torch's), or a mapping: its state dict.
    eps, update_rate
        Of a mapping; torch's momentum is the update rate. A module tells its own.
    frozen
        Carry over evaluation only: training does not move the running statistics (update_rate 0), and the layer is
        in evaluation mode.
    like
        An array whose library, device and dtype the layer has (half precision is kept as float32); float64 NumPy by
        default.

    Returns
    -------
    BatchNorm
        With ``correction=1``, torch's, and ``stats.num_updates`` from num_batches_tracked. How many elements those
        batches had torch does not keep: ``stats.count`` is 0.

    Raises
    ------
    TypeError
        If module is neither, or has a forward of its own, or a setting is missing.
    KeyError
        If the mapping lacks an array.
    ValueError
        If the module has no running statistics; if its momentum is None (an average over batches, however large each:
        not the exact statistics that ``update_rate=None`` keeps) or it averages over processes, unless `frozen`.

    Examples
    --------
    >>> import numpy as np
    >>> import bnarray as bn
    >>> state = {"running_mean": np.array([1.0, 2.0]), "running_var": np.array([3.0, 4.0])}
    >>> layer = bn.convert.from_torch(state, eps=1e-5, update_rate=0.1)
    >>> layer.stats.mean, layer.stats.correction
    (array([1., 2.]), 1.0)
    """
    if hasattr(module, "running_mean"):
        common.check_unstated(eps, update_rate)
        return _from_module(module, frozen, like)
    settings = common.stated("module", module, eps, update_rate, axis=1)
    return _layer(module, settings, frozen, like, training=True)


def _from_module(module: Any, frozen: bool, like: Array | None) -> BatchNorm:
    _check_kind(module)
    if module.running_mean is None:
        raise ValueError(
            "module keeps no running statistics (track_running_stats=False), and every BatchNorm does; call "
            "bnarray.batch_norm(x, weight, bias) instead"
        )
    if getattr(module.running_mean, "is_meta", False):
        raise ValueError(
            "module is on the device meta, so that its arrays have no values; call module.to_empty and load"
        )
    rate = module.momentum
    if rate is None and not frozen:
        raise ValueError(
            "module has momentum=None: it averages the batches' statistics, whatever their sizes, which is not what "
            "update_rate=None keeps; set a momentum, or pass frozen=True for evaluation only"
        )
    if type(module).__name__ == "SyncBatchNorm" and not frozen:
        raise ValueError(
            "module normalises over all processes, and a BatchNorm over its own batch; pass frozen=True for evaluation "
            "only"
        )
    names = (*_NAMES, "num_batches_tracked")
    state = {name: getattr(module, name) for name in names if getattr(module, name) is not None}
    return _layer(state, Settings(module.eps, 0.0 if rate is None else rate, 1), frozen, like, module.training)


def _check_kind(module: Any) -> None:
    """Raise if a module only looks like batch normalization: with a formula, or a function after it, of its own."""
    kind = type(module)
    maker = getattr(getattr(kind, "forward", None), "__module__", "")
    if "_BatchNorm" not in [each.__name__ for each in kind.__mro__] or maker.partition(".")[0] not in _MAKERS:
        raise TypeError(
            f"module is a {kind.__module__}.{kind.__qualname__}, with a forward of its own; if it is torch's batch "
            f"normalization, pass module.state_dict(), with eps= and update_rate="
        )
    if "Uninitialized" in type(module.running_mean).__name__:
        raise ValueError("module is lazy and has no arrays yet; call it")


def _layer(state: Mapping[str, Any], settings: Settings, frozen: bool, like: Array | None, training: bool) -> BatchNorm:
    return common.layer_of(
        state,
        _NAMES,
        settings,
        correction=_CORRECTION,
        frozen=frozen,
        like=like,
        num_updates=state.get("num_batches_tracked", 0),
        training=training,
    )


def to_torch(
    layer: BatchNorm, *, count: float | None = None, frozen: bool = False, like: Array | None = None
) -> Converted:
    """Return a layer as torch has it: options of its constructor, and a state dict.

    Parameters
    ----------
    layer
        With its features on axis 1.
    count
        The elements per feature of one batch, by which running variances of another correction are converted.
    frozen
        Carry over evaluation only: the variance as it is, and a momentum of 0.
    like
        An array whose library, device and dtype the arrays have: ``torch.empty(0)`` for what ``load_state_dict``
        takes. By default NumPy, in the layer's dtypes.

    Returns
    -------
    options : dict
        num_features, eps, momentum, affine.
    arrays : dict
        The state dict: weight, bias, running_mean, running_var, num_batches_tracked.

    Raises
    ------
    TypeError
        If layer is no `BatchNorm`.
    ValueError
        If torch has no such layer: another axis, an activation; exact cumulative statistics, or variances of another
        correction without `count`, unless `frozen`.

    Examples
    --------
    >>> import bnarray as bn
    >>> options, arrays = bn.convert.to_torch(bn.BatchNorm(2))
    >>> options
    {'num_features': 2, 'eps': 1e-05, 'momentum': 0.1, 'affine': True}
    """
    common.check_layer(layer, "torch")
    common.check_channels_first(layer, "torch")
    rate = common.rate_of(layer, "torch", frozen)
    mean, var, weight, bias = common.arrays_of(
        layer, "torch", correction=_CORRECTION, count=count, frozen=frozen, like=like
    )
    options = {
        "num_features": layer.stats.num_features,
        "eps": layer.eps,
        "momentum": rate,
        "affine": weight is not None,
    }
    arrays = {} if weight is None else {"weight": weight, "bias": bias}
    number = _number(layer.stats.num_updates, like)
    return Converted(options, arrays | {"running_mean": mean, "running_var": var, "num_batches_tracked": number})


def _number(num_updates: int, like: Array | None) -> Any:
    """A whole number, as a state dict has it."""
    if like is None:
        return num_updates
    number = backend(like).zeros((), like) + num_updates
    return number.long() if hasattr(number, "long") else number
