"""torch as outside truth: its modules and its function against the same calls on NumPy arrays."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import bnarray as bn
from bnarray.testing import TOLERANCES

torch = pytest.importorskip("torch", reason="torch is not installed: agreement with torch is not verified")

#: Modules with a shape of their input, of five features.
MODULES = {
    "BatchNorm1d": (16, 5),
    "BatchNorm1d with length": (4, 5, 9),
    "BatchNorm2d": (3, 5, 6, 7),
    "BatchNorm3d": (2, 5, 3, 4, 2),
}
FEATURES = 5

#: Relative to the largest magnitude of the feature: torch scales, and keeps its state, in the array's own precision.
CLOSE = {"float32": 1e-6, "float64": 1e-14}

modules = pytest.mark.parametrize("module", MODULES)
dtypes = pytest.mark.parametrize("dtype", CLOSE)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """torch shares out even five features, and its threads wait for each other by spinning: slow on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def _draw(shape: tuple[int, ...], dtype: str, seed: int = 0) -> np.ndarray:
    """Features with means and deviations of their own."""
    rng = np.random.default_rng(seed)
    along = (1, FEATURES, *(1,) * (len(shape) - 2))
    return (rng.normal(0, 2, along) + rng.normal(0, 1, shape) * rng.uniform(0.5, 3, along)).astype(dtype)


def _like(x: np.ndarray, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=x.shape).astype(x.dtype)


def _parameters(dtype: str, seed: int = 7) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.normal(1, 0.5, FEATURES).astype(dtype), rng.normal(0, 1, FEATURES).astype(dtype)


def _running(dtype: str, seed: int = 8) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.normal(0, 2, FEATURES).astype(dtype), rng.uniform(0.2, 5, FEATURES).astype(dtype)


def _stats(mean: np.ndarray, var: np.ndarray, **keywords: Any) -> bn.RunningStats:
    """Running statistics that start from the given ones, as torch's buffers may."""
    stats = bn.RunningStats(len(mean), **keywords)
    fields = {"running_mean": mean, "running_var": var, "count": 0, "num_updates": 0, "num_skipped": 0}
    stats.load_state_dict(fields)
    return stats


def _leaf(array: np.ndarray) -> Any:
    """A tensor of the array's values that records gradients."""
    return torch.from_numpy(array.copy()).requires_grad_()


def _module(name: str, dtype: str, affine: bool = True, **keywords: Any) -> Any:
    kind = getattr(torch.nn, name.partition(" ")[0])
    module = kind(FEATURES, affine=affine, dtype=getattr(torch, dtype), **keywords)
    if affine:
        with torch.no_grad():
            for parameter, values in zip(module.parameters(), _parameters(dtype), strict=True):
                parameter.copy_(torch.from_numpy(values))
    return module


def _numpy(tensor: Any) -> np.ndarray:
    return tensor.detach().numpy()


def _assert_agree(
    ours: np.ndarray, theirs: Any, name: str, dtype: str, room: float = 1, scale: np.ndarray | None = None
) -> None:
    expected = _numpy(theirs)
    assert ours.shape == expected.shape, name
    finite = np.isfinite(expected)
    np.testing.assert_array_equal(np.isfinite(ours), finite, err_msg=name)
    ours, expected = np.where(finite, ours, 0), np.where(finite, expected, 0)
    if scale is None:
        reduced = tuple(i for i in range(expected.ndim) if i != (1 if expected.ndim > 1 else 0))
        scale = np.max(abs(expected), axis=reduced, keepdims=True, initial=0)
    worst = np.max(abs(ours - expected) / (room * CLOSE[dtype] * scale + TOLERANCES[dtype].tiny), initial=0)
    assert worst <= 1, f"{name}: {worst:.3g} times the distance allowed"


def _assert_gradients_agree(ours: Any, x: Any, weight: Any, bias: Any, dy: np.ndarray) -> None:
    dtype = dy.dtype.name
    assert ours.x.dtype == dy.dtype
    _assert_agree(ours.x, x.grad, "dx", dtype)
    for name, gradient, parameter in (("dweight", ours.weight, weight), ("dbias", ours.bias, bias)):
        if parameter is None:
            assert gradient is None
        else:
            assert gradient.dtype == dy.dtype
            _assert_agree(gradient, parameter.grad, name, dtype, scale=_magnitude(dy))


def _magnitude(dy: np.ndarray) -> np.ndarray:
    """What the exactness of a sum over dy goes by: the sum itself may cancel."""
    return abs(dy).sum(axis=tuple(i for i in range(dy.ndim) if i != 1))


@modules
@dtypes
@pytest.mark.parametrize("affine", [True, False], ids=["affine", "plain"])
def test_module_training(module: str, dtype: str, affine: bool) -> None:
    x = _draw(MODULES[module], dtype)
    dy = _like(x, 1)
    theirs = _module(module, dtype, affine, momentum=0.3, eps=1e-3)
    tensor = _leaf(x)
    expected = theirs(tensor)
    expected.backward(torch.from_numpy(dy))

    weight, bias = _parameters(dtype) if affine else (None, None)
    stats = bn.RunningStats(FEATURES, update_rate=0.3, correction=1)
    y, saved = bn.batch_norm_forward(x, weight, bias, stats=stats, eps=1e-3)
    assert y.dtype == x.dtype
    _assert_agree(y, expected, "y", dtype)
    _assert_gradients_agree(bn.batch_norm_backward(dy, saved), tensor, theirs.weight, theirs.bias, dy)
    _assert_agree(stats.mean, theirs.running_mean, "running mean", dtype)
    _assert_agree(stats.var, theirs.running_var, "running variance", dtype)
    assert stats.num_updates == theirs.num_batches_tracked == 1


@modules
@dtypes
@pytest.mark.parametrize("affine", [True, False], ids=["affine", "plain"])
def test_module_evaluation(module: str, dtype: str, affine: bool) -> None:
    """The statistics are constants, to the output and to the gradients, and stay as they are."""
    x = _draw(MODULES[module], dtype)
    dy, (mean, var) = _like(x, 1), _running(dtype)
    theirs = _module(module, dtype, affine).eval()
    theirs.running_mean.copy_(torch.from_numpy(mean))
    theirs.running_var.copy_(torch.from_numpy(var))
    tensor = _leaf(x)
    expected = theirs(tensor)
    expected.backward(torch.from_numpy(dy))

    weight, bias = _parameters(dtype) if affine else (None, None)
    stats = _stats(mean, var)
    y, saved = bn.batch_norm_forward(x, weight, bias, stats=stats, training=False)
    _assert_agree(y, expected, "y", dtype)
    _assert_gradients_agree(bn.batch_norm_backward(dy, saved), tensor, theirs.weight, theirs.bias, dy)
    np.testing.assert_array_equal(stats.mean, _numpy(theirs.running_mean))
    np.testing.assert_array_equal(stats.var, _numpy(theirs.running_var))
    assert stats.num_updates == theirs.num_batches_tracked == 0


@dtypes
@pytest.mark.parametrize("momentum", [0.1, 0.01, 1.0, 0.0])
@pytest.mark.parametrize("updates", [1, 2, 100])
def test_running_statistics(updates: int, momentum: float, dtype: str) -> None:
    """Batches of different sizes, so that each has its own factor n / (n - 1)."""
    theirs = _module("BatchNorm1d", dtype, momentum=momentum)
    stats = bn.RunningStats(FEATURES, update_rate=momentum, correction=1)
    count = 0
    for step in range(updates):
        x = _draw((2 + step % 7, FEATURES), dtype, seed=step)
        theirs(torch.from_numpy(x))
        bn.batch_norm(x, stats=stats)
        count += len(x)
    # torch rounds its buffers to their dtype at every update.
    _assert_agree(stats.mean, theirs.running_mean, "running mean", dtype, room=10)
    _assert_agree(stats.var, theirs.running_var, "running variance", dtype, room=10)
    assert stats.num_updates == theirs.num_batches_tracked == updates
    assert stats.count == count


@dtypes
def test_cumulative_where_torch_is_exact(dtype: str) -> None:
    """momentum=None averages the batches' own means and unbiased variances, each with the same weight.

    After one batch that is the sample's variance. After k batches of one size n and one mean, the same squared
    deviations have been divided by k·(n − 1) instead of k·n − 1.
    """
    theirs = _module("BatchNorm1d", dtype, momentum=None)
    stats = bn.RunningStats(FEATURES, update_rate=None, correction=1)
    size, count = 12, 6
    first = _draw((size, FEATURES), "float64")
    for step in range(count):
        # A permutation, then the same deviations times another number about the same mean.
        mixed = np.random.default_rng(step).permutation(first)
        x = (first.mean(axis=0) + (mixed - first.mean(axis=0)) * (1 + step)).astype(dtype)
        theirs(torch.from_numpy(x))
        bn.batch_norm(x, stats=stats)
        factor = (step + 1) * (size - 1) / ((step + 1) * size - 1)
        _assert_agree(stats.mean, theirs.running_mean, "running mean", dtype, room=10)
        _assert_agree(stats.var, theirs.running_var * factor, "running variance", dtype, room=10)
        assert stats.num_updates == theirs.num_batches_tracked == step + 1


@dtypes
def test_cumulative_where_torch_is_not_exact(dtype: str) -> None:
    """Uneven batches with means of their own: torch's is the plain average of the batches, ours the whole sample's."""
    theirs = _module("BatchNorm1d", dtype, momentum=None)
    stats = bn.RunningStats(FEATURES, update_rate=None, correction=1)
    batches = [_draw((size, FEATURES), dtype, seed) for seed, size in enumerate((3, 40, 7))]
    for x in batches:
        theirs(torch.from_numpy(x))
        bn.batch_norm(x, stats=stats)
    each = [bn.moments(x) for x in batches]
    _assert_agree(np.mean([m.mean for m in each], axis=0), theirs.running_mean, "average of means", dtype, room=10)
    _assert_agree(np.mean([m.var(1) for m in each], axis=0), theirs.running_var, "average of variances", dtype, room=10)
    whole = np.concatenate(batches).astype(np.float64)
    np.testing.assert_allclose(stats.mean, whole.mean(axis=0), rtol=1e-6)
    np.testing.assert_allclose(stats.var, whole.var(axis=0, ddof=1), rtol=1e-6)
    assert (abs(stats.var - _numpy(theirs.running_var)) > 0.1 * stats.var).any()


@dtypes
@pytest.mark.parametrize("given", ["weight and bias", "weight", "bias", "neither"])
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_function(training: bool, given: str, dtype: str) -> None:
    """torch.nn.functional.batch_norm from running statistics as they may be after a while."""
    x = _draw((6, FEATURES, 11), dtype)
    dy, (mean, var) = _like(x, 1), _running(dtype)
    parameters = dict(zip(("weight", "bias"), _parameters(dtype), strict=True))
    parameters = {name: value for name, value in parameters.items() if name in given}
    leaves = {name: _leaf(value) for name, value in parameters.items()}
    tensor, buffers = _leaf(x), (torch.from_numpy(mean.copy()), torch.from_numpy(var.copy()))
    expected = torch.nn.functional.batch_norm(tensor, *buffers, **leaves, training=training, momentum=0.2, eps=1e-4)
    expected.backward(torch.from_numpy(dy))

    stats = _stats(mean, var, update_rate=0.2)
    y, saved = bn.batch_norm_forward(x, **parameters, stats=stats, training=training, eps=1e-4)
    _assert_agree(y, expected, "y", dtype)
    gradients = bn.batch_norm_backward(dy, saved)
    _assert_gradients_agree(gradients, tensor, leaves.get("weight"), leaves.get("bias"), dy)
    _assert_agree(stats.mean, buffers[0], "running mean", dtype)
    _assert_agree(stats.var, buffers[1], "running variance", dtype)


@dtypes
@pytest.mark.parametrize("mode", [True, False], ids=["train", "eval"])
def test_without_running_statistics(mode: bool, dtype: str) -> None:
    """A module that tracks none normalises by the batch in either mode: training=True without stats."""
    x = _draw(MODULES["BatchNorm2d"], dtype)
    dy, tensor = _like(x, 1), _leaf(x)
    theirs = _module("BatchNorm2d", dtype, track_running_stats=False).train(mode)
    expected = theirs(tensor)
    expected.backward(torch.from_numpy(dy))
    y, saved = bn.batch_norm_forward(x, *_parameters(dtype))
    _assert_agree(y, expected, "y", dtype)
    _assert_gradients_agree(bn.batch_norm_backward(dy, saved), tensor, theirs.weight, theirs.bias, dy)


@dtypes
@pytest.mark.parametrize("dy_too", [True, False], ids=["dy channels last", "dy contiguous"])
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize(
    ("module", "memory_format"), [("BatchNorm2d", "channels_last"), ("BatchNorm3d", "channels_last_3d")]
)
def test_channels_last(module: str, memory_format: str, training: bool, dy_too: bool, dtype: str) -> None:
    """torch's memory format, seen by NumPy as strides: the same values, and y laid out as torch lays it out."""
    form = getattr(torch, memory_format)
    tensor = torch.from_numpy(_draw(MODULES[module], dtype)).contiguous(memory_format=form).requires_grad_()
    x = _numpy(tensor)
    assert not x.flags.c_contiguous
    gradient = torch.from_numpy(_like(x, 1))
    gradient = gradient.contiguous(memory_format=form if dy_too else torch.contiguous_format)
    theirs = _module(module, dtype).train(training)
    expected = theirs(tensor)
    expected.backward(gradient)

    stats = bn.RunningStats(FEATURES)
    y, saved = bn.batch_norm_forward(x, *_parameters(dtype), stats=stats, training=training)
    assert expected.is_contiguous(memory_format=form)
    assert y.strides == _numpy(expected).strides
    _assert_agree(y, expected, "y", dtype)
    gradients = bn.batch_norm_backward(gradient.numpy(), saved)
    _assert_gradients_agree(gradients, tensor, theirs.weight, theirs.bias, gradient.numpy())
    _assert_agree(stats.mean, theirs.running_mean, "running mean", dtype)
    _assert_agree(stats.var, theirs.running_var, "running variance", dtype)


@dtypes
def test_layer_trains_as_module_does(dtype: str) -> None:
    """Steps of gradient descent, with gradients of two batches a step, then evaluation."""
    theirs = _module("BatchNorm2d", dtype, momentum=0.2)
    layer = bn.BatchNorm(FEATURES, update_rate=0.2, like=np.zeros(0, dtype))
    layer.weight[...], layer.bias[...] = _parameters(dtype)
    optimizer = torch.optim.SGD(theirs.parameters(), lr=1e-3)
    for step in range(4):
        optimizer.zero_grad()
        layer.zero_grad()
        magnitude = np.zeros(FEATURES, dtype)
        for seed in (2 * step, 2 * step + 1):
            x = _draw(MODULES["BatchNorm2d"], dtype, seed)
            dy = _like(x, seed + 100)
            theirs(torch.from_numpy(x)).backward(torch.from_numpy(dy))
            layer(x)
            layer.backward(dy)
            magnitude += _magnitude(dy)
        _assert_agree(layer.grad_weight, theirs.weight.grad, "dweight", dtype, scale=magnitude)
        _assert_agree(layer.grad_bias, theirs.bias.grad, "dbias", dtype, scale=magnitude)
        optimizer.step()
        for parameter, gradient in zip(layer.parameters(), layer.gradients(), strict=True):
            parameter -= 1e-3 * gradient
    x = _draw(MODULES["BatchNorm2d"], dtype, 99)
    _assert_agree(layer.eval()(x), theirs.eval()(torch.from_numpy(x)), "y", dtype, room=10)
    assert layer.stats.num_updates == theirs.num_batches_tracked == 8


@pytest.mark.parametrize(
    ("module", "shape"), [("BatchNorm1d", (1, 5)), ("BatchNorm2d", (1, 5, 1, 1)), ("BatchNorm3d", (1, 5, 1, 1, 1))]
)
def test_one_value_per_feature(module: str, shape: tuple[int, ...]) -> None:
    """No unbiased variance: both refuse to update, as they were; both evaluate."""
    x = _draw(shape, "float64")
    theirs, stats = _module(module, "float64"), bn.RunningStats(FEATURES)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        theirs(torch.from_numpy(x))
    with pytest.raises(ValueError, match="too few for a running variance"):
        bn.batch_norm(x, *_parameters("float64"), stats=stats)
    # torch has counted the batch that it refused.
    assert theirs.num_batches_tracked == 1
    assert (stats.num_updates, stats.num_skipped, stats.count) == (0, 0, 0)
    np.testing.assert_array_equal(stats.mean, _numpy(theirs.running_mean))
    np.testing.assert_array_equal(stats.var, _numpy(theirs.running_var))
    y = bn.batch_norm(x, *_parameters("float64"), stats=stats, training=False)
    _assert_agree(y, theirs.eval()(torch.from_numpy(x)), "y", "float64")


def test_empty_batch() -> None:
    """An empty array and zero gradients; the running values stay. torch counts the batch, and we do not."""
    x = np.empty((0, FEATURES, 3))
    theirs, stats, tensor = _module("BatchNorm1d", "float64"), bn.RunningStats(FEATURES), _leaf(x)
    expected = theirs(tensor)
    expected.backward(torch.from_numpy(x))
    y, saved = bn.batch_norm_forward(x, *_parameters("float64"), stats=stats)
    _assert_agree(y, expected, "y", "float64")
    _assert_gradients_agree(bn.batch_norm_backward(x, saved), tensor, theirs.weight, theirs.bias, x)
    np.testing.assert_array_equal(stats.mean, _numpy(theirs.running_mean))
    np.testing.assert_array_equal(stats.var, _numpy(theirs.running_var))
    assert (stats.num_updates, theirs.num_batches_tracked) == (0, 1)


@dtypes
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_not_finite(bad: float, dtype: str) -> None:
    """One bad element spoils its feature and no other, in the batch and, where told to propagate, in the state."""
    x = _draw((8, FEATURES), dtype)
    x[3, 2] = bad
    theirs, stats = _module("BatchNorm1d", dtype), bn.RunningStats(FEATURES, nonfinite="propagate")
    y, expected = bn.batch_norm(x, *_parameters(dtype), stats=stats), theirs(torch.from_numpy(x))
    _assert_agree(y, expected, "y", dtype)
    np.testing.assert_array_equal(np.isnan(y), np.isnan(_numpy(expected)))
    np.testing.assert_array_equal(np.isnan(y).all(axis=0), np.arange(FEATURES) == 2)
    _assert_agree(stats.mean, theirs.running_mean, "running mean", dtype)
    _assert_agree(stats.var, theirs.running_var, "running variance", dtype)
    assert stats.num_updates == theirs.num_batches_tracked == 1


@dtypes
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_not_finite_in_evaluation(bad: float, dtype: str) -> None:
    """Nothing but the element itself is spoilt, and an infinity keeps the sign that the weight gives it."""
    x = _draw((8, FEATURES), dtype)
    x[3] = bad
    theirs, stats = _module("BatchNorm1d", dtype).eval(), _stats(*_running(dtype))
    theirs.running_mean.copy_(torch.from_numpy(stats.mean.copy()))
    theirs.running_var.copy_(torch.from_numpy(stats.var.copy()))
    y = bn.batch_norm(x, *_parameters(dtype), stats=stats, training=False)
    expected = theirs(torch.from_numpy(x))
    _assert_agree(y, expected, "y", dtype)
    np.testing.assert_array_equal(y[3], _numpy(expected)[3])
