"""ONNX's operator BatchNormalization."""

from collections.abc import Mapping
from typing import Any

from bnarray.convert import _common as common
from bnarray.convert._common import Converted, Settings
from bnarray.dispatch import Array, backend
from bnarray.layer import BatchNorm
from bnarray.stats import explains_momentum

_CORRECTION = 0
_NAMES = ("scale", "B", "input_mean", "input_var")


@explains_momentum
def from_onnx(
    node: Any,
    initializers: Mapping[str, Any] | None = None,
    *,
    eps: float | None = None,
    update_rate: float | None = None,
    frozen: bool = False,
    like: Array | None = None,
) -> BatchNorm:
    """Return a `BatchNorm` from a node of an ONNX graph.

    Parameters
    ----------
    node
        A node BatchNormalization (of operator set 7 or later, or with is_test=1), or a mapping of its inputs: scale, B,
        input_mean, input_var.
    initializers
        With a node: arrays by the names of its inputs, such as
        ``{each.name: onnx.numpy_helper.to_array(each) for each in model.graph.initializer}``.
    eps, update_rate
        Of a mapping; the update rate is 1 - momentum. A node tells its own.
    frozen
        Carry over evaluation only: training does not move the running statistics (update_rate 0), and the layer is
        in evaluation mode.
    like
        An array whose library, device and dtype the layer has (half precision is kept as float32); float64 NumPy by
        default.

    Returns
    -------
    BatchNorm
        With ``correction=0``, ONNX's, in the mode of the node (training_mode); a mapping's is evaluation. ONNX counts
        no updates: ``stats.num_updates`` is 0.

    Raises
    ------
    TypeError
        If node is neither, or a setting is missing.
    KeyError
        If an array is missing.
    ValueError
        If the node is another operator, normalises every element by itself (spatial=0), has an attribute that is not
        known, or is of an older operator set and in training.

    Examples
    --------
    >>> import numpy as np
    >>> import bnarray as bn
    >>> names = "scale", "B", "input_mean", "input_var"
    >>> bn.convert.from_onnx({name: np.ones(2) for name in names}, eps=1e-5, update_rate=1 - 0.75)
    BatchNorm(2, axis=1, eps=1e-05, update_rate=0.25, correction=0.0, affine=True, activation=None)
    """
    if hasattr(node, "op_type"):
        common.check_unstated(eps, update_rate)
        settings, training = _settings(node)
        arrays = _inputs(node, initializers)
    else:
        settings, training = common.stated("node", node, eps, update_rate, axis=1), False
        arrays = {name: common.entry(node, name) for name in _NAMES}
    return common.layer_of(
        arrays,
        _NAMES,
        settings,
        correction=_CORRECTION,
        frozen=frozen,
        like=like,
        training=training,
    )


def _settings(node: Any) -> tuple[Settings, bool]:
    domain = getattr(node, "domain", "")
    if node.op_type != "BatchNormalization" or domain not in ("", "ai.onnx"):
        name = f"{domain}.{node.op_type}".lstrip(".")
        raise ValueError(f"node is a {name}; it should be a BatchNormalization of ONNX's own")
    referring = [each.name for each in node.attribute if getattr(each, "ref_attr_name", "")]
    if referring:
        raise ValueError(f"node has {', '.join(referring)} from the function that it is part of; inline that first")
    # An attribute holds its value as a float or as an integer.
    given = {each.name: each.f if each.name in ("epsilon", "momentum") else each.i for each in node.attribute}
    training = bool(given.pop("training_mode", 0))
    eps, momentum = given.pop("epsilon", 1e-5), given.pop("momentum", 0.9)
    if not given.pop("spatial", 1):
        raise ValueError("node has spatial=0, features for every place, which the operator has no more")
    if not given.pop("is_test", 1) or (len(node.output) > 1 and not training):
        raise ValueError(
            "node is in training, as operator sets before 14 have it, with other running statistics; convert the model "
            "by onnx.version_converter, or export it in evaluation"
        )
    if given:
        raise ValueError(f"node has the attributes {', '.join(given)}, which are not known")
    return Settings(eps, common.complement(momentum), 1), training


def _inputs(node: Any, initializers: Mapping[str, Any] | None) -> dict[str, Any]:
    if initializers is None:
        raise TypeError("initializers is None; with a node it should be a mapping of arrays by name")
    if len(node.input) != 1 + len(_NAMES):
        raise ValueError(f"node has {len(node.input)} inputs; it should have {1 + len(_NAMES)}")
    return {name: common.entry(initializers, given) for name, given in zip(_NAMES, node.input[1:], strict=True)}


def to_onnx(layer: BatchNorm, *, like: Array | None = None) -> Converted:
    """Return a layer as ONNX has it, in evaluation: attributes of a node, and its inputs after x.

    Parameters
    ----------
    layer
        With its features on axis 1.
    like
        An array whose library, device and dtype the arrays have: usually of x's dtype, which runtimes ask for. By
        default NumPy, in the layer's dtypes.

    Returns
    -------
    options : dict
        epsilon, the attribute of ``onnx.helper.make_node("BatchNormalization", ...)``.
    arrays : dict
        scale, B, input_mean, input_var: in the order of the node's inputs. Without a weight and a bias, they are 1
        and 0.

    Raises
    ------
    TypeError
        If layer is no `BatchNorm`.
    ValueError
        If ONNX has no such node: another axis, an activation.

    Examples
    --------
    >>> import bnarray as bn
    >>> options, arrays = bn.convert.to_onnx(bn.BatchNorm(2))
    >>> options
    {'epsilon': 1e-05}
    >>> list(arrays)
    ['scale', 'B', 'input_mean', 'input_var']
    """
    common.check_layer(layer, "ONNX")
    common.check_channels_first(layer, "ONNX")
    mean, var, weight, bias = common.arrays_of(
        layer, "ONNX", correction=_CORRECTION, count=None, frozen=True, like=like
    )
    if weight is None:
        verbs = backend(mean)
        bias = verbs.cast(verbs.zeros(layer.stats.features_shape, mean), mean.dtype)
        weight = bias + 1
    return Converted({"epsilon": layer.eps}, dict(zip(_NAMES, (weight, bias, mean, var), strict=True)))
