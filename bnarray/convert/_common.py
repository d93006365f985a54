"""What the converters share: settings, arrays, and what must not be lost without a word."""

from collections.abc import Mapping
from math import isfinite
from typing import Any, NamedTuple

from bnarray.dispatch import Array, backend
from bnarray.layer import BatchNorm

Axis = int | tuple[int, ...]

#: What a system calls weight, bias, mean and variance.
Names = tuple[str, str, str, str]


class Converted(NamedTuple):
    """A layer for another system: the options of its constructor there, and its arrays by their names there."""

    options: dict[str, Any]
    arrays: dict[str, Any]


class Settings(NamedTuple):
    """What a layer of another system is told besides its arrays."""

    eps: float
    update_rate: float
    axis: Axis


def complement(rate: float) -> float:
    """Return 1 - rate, without the noise in its last digit: 0.01 for 0.99."""
    return float(f"{1 - rate:.15g}")


def stated(system: str, source: object, eps: float | None, update_rate: float | None, axis: Axis) -> Settings:
    """Return the settings of a mapping, which does not tell them itself.

    Raises
    ------
    TypeError
        If source is no mapping, or a setting is missing.
    """
    if not isinstance(source, Mapping):
        raise TypeError(f"{system} is a {type(source).__name__}; it should be a layer, or a mapping of its arrays")
    missing = [f"{name}=" for name, value in (("eps", eps), ("update_rate", update_rate)) if value is None]
    if eps is None or update_rate is None:
        raise TypeError(
            f"a mapping of arrays does not tell its settings; pass {' and '.join(missing)} (update_rate is the weight "
            f"of the new batch)"
        )
    return Settings(eps, update_rate, axis)


def check_unstated(eps: float | None, update_rate: float | None) -> None:
    """Raise if settings are given that the layer tells itself."""
    if eps is not None or update_rate is not None:
        raise TypeError("the layer tells its eps and update_rate itself; leave them out")


def entry(source: Mapping[str, Any], name: str) -> Any:
    """Return an entry of a mapping.

    Raises
    ------
    KeyError
        If it lacks it.
    """
    if name not in source:
        raise KeyError(f"the mapping lacks {name}; it has {', '.join(map(str, source)) or 'nothing'}")
    return source[name]


def array_of(value: Any, name: str) -> Array:
    """Return the array that another system's variable holds, apart from any graph."""
    library = type(value).__module__.partition(".")[0]
    if library == "keras":
        value = value.value
    elif library == "chainer":
        value = value.array
    elif hasattr(type(value), "get_raw_value"):  # of Flax, or a kind of the user's
        value = value[...]
    if hasattr(type(value), "detach"):  # torch
        value = value.detach()
    elif hasattr(type(value), "numpy"):  # TensorFlow
        value = value.numpy()
    return backend(value, name).check(value, name)


def _has_parameters(source: Mapping[str, Any], weight: str, bias: str) -> bool:
    """Whether there are weight and bias; one alone would become two that training changes."""
    missing = [name for name in (weight, bias) if source.get(name) is None]
    if len(missing) == 1:
        neutral = "ones" if missing[0] == weight else "zeros"
        raise ValueError(
            f"the layer has no {missing[0]}, and a BatchNorm has both weight and bias, or neither; pass a mapping with "
            f"{missing[0]} of {neutral}, which training will change too"
        )
    return not missing


def layer_of(
    source: Mapping[str, Any],
    names: Names,
    settings: Settings,
    *,
    correction: float,
    frozen: bool,
    like: Array | None,
    num_updates: Any = 0,
    training: bool = True,
) -> BatchNorm:
    """Return the layer with the arrays of a mapping."""
    weight, bias, mean, var = names
    own = {"running_mean": mean, "running_var": var}
    if affine := _has_parameters(source, weight, bias):
        own |= {"weight": weight, "bias": bias}
    arrays = {field: array_of(entry(source, name), name) for field, name in own.items()}
    shape = tuple(arrays["running_mean"].shape)
    for field, array in arrays.items():
        if tuple(array.shape) != shape:
            raise ValueError(f"{own[field]} has shape {tuple(array.shape)}; it should have that of {mean}, {shape}")
    layer = BatchNorm(
        shape,
        axis=settings.axis,
        eps=settings.eps,
        update_rate=0.0 if frozen else settings.update_rate,
        correction=correction,
        affine=affine,
        like=like,
    )
    layer.load_state_dict({**arrays, "count": 0, "num_updates": num_updates, "num_skipped": 0})
    return layer.train(training and not frozen)


def check_layer(layer: object, system: str) -> BatchNorm:
    """Return layer if it is one that another system can have."""
    if not isinstance(layer, BatchNorm):
        raise TypeError(f"layer is a {type(layer).__name__}; it should be a BatchNorm")
    if layer.activation is not None:
        raise ValueError(
            f"layer has the activation {layer.activation!r}, which {system}'s has not; set layer.activation = None and "
            f"apply it there"
        )
    return layer


def single_axis(layer: BatchNorm, system: str) -> int:
    """Return the layer's only feature axis.

    Raises
    ------
    ValueError
        If it has several, or none.
    """
    axes = layer.axis if isinstance(layer.axis, tuple) else (layer.axis,)
    if len(axes) != 1:
        raise ValueError(f"layer has the feature axes {axes}; {system}'s has one")
    return int(axes[0])


def check_channels_first(layer: BatchNorm, system: str) -> None:
    """Raise unless the features are on axis 1."""
    axis = single_axis(layer, system)
    if axis != 1:
        raise ValueError(f"layer has axis {axis}; {system}'s features are on axis 1")


def rate_of(layer: BatchNorm, system: str, frozen: bool) -> float:
    """Return the weight of the new batch.

    Raises
    ------
    ValueError
        If there is none: the layer keeps the statistics of everything.
    """
    if frozen:
        return 0.0
    rate = layer.stats.update_rate
    if rate is None:
        raise ValueError(
            f"layer keeps the exact statistics of everything seen (update_rate=None), which {system} cannot continue; "
            f"pass frozen=True for evaluation only"
        )
    return rate


def arrays_of(
    layer: BatchNorm, system: str, *, correction: float, count: float | None, frozen: bool, like: Array | None
) -> tuple[Array, Array, Array | None, Array | None]:
    """Return (mean, variance with the system's correction, weight, bias), copied."""
    mean, var = layer.stats.mean_and_var()
    own = layer.stats.correction
    if not frozen and own != correction:
        var = var * _factor(own, correction, count, system)

    def copied(array: Array | None) -> Array | None:
        if array is None:
            return None
        if like is None:
            return backend(array).to_numpy(array)
        verbs = backend(like, "like")
        return verbs.copy(verbs.cast(verbs.convert(array, like), like.dtype))

    return copied(mean), copied(var), copied(layer.weight), copied(layer.bias)


def _factor(own: float, other: float, count: float | None, system: str) -> float:
    """What a variance of `count` elements with the correction `own` is multiplied by to have the `other`."""
    if count is None:
        raise ValueError(
            f"layer keeps variances with correction {own:g} and {system} with {other:g}; pass count=, the elements per "
            f"feature of one batch, to convert them, or frozen=True for evaluation only"
        )
    if not (isfinite(count) and count > max(own, other)):
        raise ValueError(f"count is {count!r}; it should be a number above the correction, {max(own, other):g}")
    return (count - own) / (count - other)
