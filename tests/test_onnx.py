"""ONNX's own test data for the operator BatchNormalization, run as its nodes say."""

import os
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest

import bnarray as bn

onnx = pytest.importorskip("onnx", reason="onnx is not installed: conformance with ONNX's test data is not verified")

#: Models and outputs that torch exported, at operator set 6.
CONVERTED = [
    "test_BatchNorm1d_3d_input_eval",
    "test_BatchNorm2d_eval",
    "test_BatchNorm2d_momentum_eval",
    "test_BatchNorm3d_eval",
    "test_BatchNorm3d_momentum_eval",
]

#: What onnx.backend.test allows; these files bring no other.
RTOL, ATOL = 1e-3, 1e-7

DEFAULTS = {"epsilon": 1e-5, "momentum": 0.9}

roads = pytest.mark.parametrize("road", ["function", "layer"])


def _opset(model: Any) -> int:
    (opset,) = [each.version for each in model.opset_import if each.domain in ("", "ai.onnx")]
    return int(opset)


def _attributes(node: Any) -> dict[str, Any]:
    return DEFAULTS | {each.name: onnx.helper.get_attribute_value(each) for each in node.attribute}


def _is_training(node: Any, opset: int) -> bool:
    attributes = _attributes(node)
    if opset >= 14:
        return bool(attributes.get("training_mode", 0))
    assert opset <= 6, "from 7 to 13 the number of outputs decides, and no data is of those"
    return not attributes.get("is_test", 0)


def _run(node: Any, opset: int, inputs: Sequence[np.ndarray], road: str) -> list[np.ndarray]:
    """Return what the node's outputs should be: y and, in training, the running mean and variance."""
    x, scale, bias, mean, var = inputs
    attributes, training = _attributes(node), _is_training(node, opset)
    eps, rate = attributes["epsilon"], 1 - attributes["momentum"]
    state = {"running_mean": mean, "running_var": var, "count": 0, "num_updates": 0, "num_skipped": 0}
    if road == "function":
        stats = bn.RunningStats(mean.shape, update_rate=rate, correction=0)
        stats.load_state_dict(state)
        y = bn.batch_norm(x, scale, bias, stats=stats, training=training, eps=eps)
    else:
        layer = bn.BatchNorm(mean.shape, eps=eps, update_rate=rate, correction=0, like=x)
        layer.load_state_dict({"weight": scale, "bias": bias, **state})
        y, stats = layer.train(training)(x), layer.stats
    assert y.dtype == x.dtype
    assert stats.num_updates == int(training)
    return [y, stats.mean, stats.var] if training else [y]


@pytest.fixture(scope="module")
def node_cases() -> list[Any]:
    """The operator's cases. To find them onnx computes those of all operators, in seconds: too long for collection."""
    from onnx.backend.test.case import node

    with warnings.catch_warnings():
        # Other operators' cases overflow, divide by zero and take logarithms of it as they are imported.
        warnings.simplefilter("ignore", RuntimeWarning)
        cases = node.collect_testcases("BatchNormalization")
    # The list is one for the process, so that it may hold what others collected.
    return [case for case in cases if [each.op_type for each in case.model.graph.node] == ["BatchNormalization"]]


@roads
@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
def test_node_cases(node_cases: list[Any], training: bool, road: str) -> None:
    count = 0
    for case in node_cases:
        (node,), opset = case.model.graph.node, _opset(case.model)
        if _is_training(node, opset) is not training:
            continue
        for inputs, expected in case.data_sets:
            outputs = _run(node, opset, inputs, road)
            assert len(outputs) == len(expected) == len(node.output), case.name
            for name, ours, theirs in zip(node.output, outputs, expected, strict=True):
                message = f"{case.name}: {name}"
                np.testing.assert_allclose(ours, theirs, case.rtol, case.atol, err_msg=message)
                # Far less than ONNX allows, which a running variance of the other correction could be.
                assert (abs(ours - theirs) <= 2e-6 * abs(theirs).max()).all(), message
            count += 1
    assert count >= 2, f"onnx {onnx.__version__} holds {count} such cases"


def _tensors(folder: str, kind: str) -> Iterator[np.ndarray]:
    count = sum(name.startswith(kind) for name in os.listdir(folder))
    for number in range(count):
        with open(os.path.join(folder, f"{kind}_{number}.pb"), "rb") as file:
            yield onnx.numpy_helper.to_array(onnx.TensorProto.FromString(file.read()))


@roads
@pytest.mark.parametrize("name", CONVERTED)
def test_converted_from_torch(name: str, road: str) -> None:
    folder = os.path.join(os.path.dirname(onnx.__file__), "backend", "test", "data", "pytorch-converted", name)
    if not os.path.isdir(folder):
        pytest.skip(f"onnx {onnx.__version__} does not hold {name}: it is not verified")
    model = onnx.load(os.path.join(folder, "model.onnx"))
    (node,) = model.graph.node
    constants = {each.name: onnx.numpy_helper.to_array(each) for each in model.graph.initializer}
    sets = [each for each in os.listdir(folder) if each.startswith("test_data_set_")]
    assert sets
    for each in sets:
        x, *others = _tensors(os.path.join(folder, each), "input")
        assert not others
        inputs = [constants.get(operand, x) for operand in node.input]
        (expected,) = _tensors(os.path.join(folder, each), "output")
        (y,) = _run(node, _opset(model), inputs, road)
        np.testing.assert_allclose(y, expected, RTOL, ATOL)
        assert (abs(y - expected) <= 2e-6 * abs(expected).max()).all()
