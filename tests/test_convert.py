"""Layers from other systems and back: what they evaluate to, and what the next batch makes of their statistics."""

import os
import sys
import types
import warnings
from collections.abc import Callable
from importlib import import_module
from typing import Any

import numpy as np
import pytest

import bnarray as bn

FEATURES = 3

#: Relative to the largest magnitude of a feature; the other systems compute in float32.
CLOSE = 2e-6


def _installed(name: str) -> Any:
    # Keras computes with the library that it is told of; JAX is beside it here.
    os.environ.setdefault("KERAS_BACKEND", "jax")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of modules that are imported, not of calls
        try:
            return import_module(name)
        except ImportError:
            pytest.skip(f"{name} is not installed: conversion from and to it is not verified")


def _draw(*shape: int, axis: int = 1, seed: int = 0) -> np.ndarray:
    """Features with means and deviations of their own."""
    rng = np.random.default_rng(seed)
    along = [1] * len(shape)
    along[axis] = shape[axis]
    return (rng.normal(0, 2, along) + rng.normal(0, 1, shape) * rng.uniform(0.5, 3, along)).astype(np.float32)


def _arrays(*shape: int) -> dict[str, np.ndarray]:
    """weight, bias, mean and variance."""
    rng = np.random.default_rng(5)
    drawn = rng.normal(1, 0.5, shape), rng.normal(0, 1, shape), rng.normal(0, 2, shape), rng.uniform(0.5, 5, shape)
    return dict(zip(("weight", "bias", "mean", "var"), (each.astype(np.float32) for each in drawn), strict=True))


def _layer(**keywords: Any) -> bn.BatchNorm:
    """A layer that has been trained."""
    keywords = {"update_rate": 0.25, "eps": 1e-3} | keywords
    layer = bn.BatchNorm(FEATURES, **keywords)
    if layer.weight is not None:
        arrays = _arrays(FEATURES)
        layer.weight, layer.bias = arrays["weight"].astype(float), arrays["bias"].astype(float)
    axis = layer.axis[0] if isinstance(layer.axis, tuple) else layer.axis
    for seed in range(3):
        layer(_draw(*_shape(axis, 4), axis=axis, seed=seed))
    return layer


def _shape(axis: int, ndim: int) -> tuple[int, ...]:
    shape = [5, 4, 6, 2][:ndim]
    shape[axis] = FEATURES
    return tuple(shape)


def _assert_close(ours: Any, theirs: Any, name: str) -> None:
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    assert ours.shape == theirs.shape, name
    worst = np.max(abs(ours - theirs)) / np.max(abs(theirs))
    assert worst <= CLOSE, f"{name}: {worst:.3g}"


class _Theirs:
    """A layer of another system: how it evaluates, trains with a batch, and what its statistics are."""

    evaluate: Callable[[np.ndarray], Any]
    train: Callable[[np.ndarray], Any]
    statistics: Callable[[], tuple[Any, Any]]


def _assert_the_same(layer: bn.BatchNorm, theirs: Any, x: np.ndarray) -> None:
    """Evaluation, the next batch, and evaluation again."""
    _assert_close(layer.eval()(x), theirs.evaluate(x), "evaluation before")
    before = layer.stats.mean.copy()
    _assert_close(layer.train()(x), theirs.train(x), "training")
    assert abs(layer.stats.mean - before).max() > 0.01, "nothing was learned"
    mean, var = theirs.statistics()
    _assert_close(layer.stats.mean, np.ravel(mean), "running mean")
    _assert_close(layer.stats.var, np.ravel(var), "running variance")
    _assert_close(layer.eval()(x), theirs.evaluate(x), "evaluation after")


# -- torch -------------------------------------------------------------------------------------------------------------


class _Torch(_Theirs):
    def __init__(self, module: Any) -> None:
        self.module, self.torch = module, _installed("torch")

    def _call(self, x: np.ndarray) -> Any:
        with self.torch.no_grad():
            return self.module(self.torch.from_numpy(x)).numpy()

    def evaluate(self, x: np.ndarray) -> Any:
        self.module.eval()
        return self._call(x)

    def train(self, x: np.ndarray) -> Any:
        self.module.train()
        return self._call(x)

    def statistics(self) -> tuple[Any, Any]:
        return self.module.running_mean.numpy(), self.module.running_var.numpy()


def _trained_torch(**keywords: Any) -> Any:
    torch = _installed("torch")
    module = torch.nn.BatchNorm2d(FEATURES, **{"eps": 1e-3, "momentum": 0.3} | keywords)
    if module.affine:
        arrays = _arrays(FEATURES)
        with torch.no_grad():
            module.weight.copy_(torch.from_numpy(arrays["weight"]))
            module.bias.copy_(torch.from_numpy(arrays["bias"]))
    for seed in range(3):
        module(torch.from_numpy(_draw(4, FEATURES, 2, 5, seed=seed)))
    return module


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("way", ["module", "mapping", "library"])
def test_from_torch(way: str, affine: bool) -> None:
    module = _trained_torch(affine=affine)
    if way == "module":
        layer = bn.convert.from_torch(module)
    elif way == "mapping":
        layer = bn.convert.from_torch(module.state_dict(), eps=1e-3, update_rate=0.3)
    else:
        tensor = module.running_mean
        layer = bn.convert.from_torch(module, like=tensor)
        assert all(type(each) is type(tensor) and each.dtype == tensor.dtype for each in layer.parameters())
        layer.to(np.zeros(1))
    assert (layer.stats.num_updates, layer.stats.correction, layer.training) == (3, 1, True)
    assert all(each.dtype == np.float64 for each in layer.parameters())
    _assert_the_same(layer, _Torch(module), _draw(3, FEATURES, 4, 4, seed=9))


def test_from_torch_copies_and_keeps_the_mode() -> None:
    module = _trained_torch().eval()
    layer = bn.convert.from_torch(module)
    assert layer.training is False
    before = module.weight.detach().clone()
    layer.weight += 1
    assert bool((module.weight == before).all())


@pytest.mark.parametrize("affine", [True, False])
def test_to_torch(affine: bool) -> None:
    torch = _installed("torch")
    layer = _layer(affine=affine)
    options, state = bn.convert.to_torch(layer, like=torch.empty(0, dtype=torch.float64))
    module = torch.nn.BatchNorm2d(**options)
    module.load_state_dict(state)
    assert int(module.num_batches_tracked) == 3
    assert state["num_batches_tracked"].dtype == torch.int64
    _assert_the_same(layer, _Torch(module), _draw(4, FEATURES, 4, 4, seed=9))


def test_torch_there_and_back() -> None:
    layer = _layer()
    options, state = bn.convert.to_torch(layer)
    again = bn.convert.from_torch(state, eps=options["eps"], update_rate=options["momentum"])
    _assert_equal(again, layer)
    assert again.stats.num_updates == 3


def _assert_equal(again: bn.BatchNorm, layer: bn.BatchNorm) -> None:
    assert repr(again) == repr(layer)
    for ours, theirs in zip(again.parameters(), layer.parameters(), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    np.testing.assert_array_equal(again.stats.mean, layer.stats.mean)
    np.testing.assert_array_equal(again.stats.var, layer.stats.var)


def test_what_torch_means_otherwise() -> None:
    torch = _installed("torch")
    with pytest.raises(ValueError, match=r"track_running_stats=False.*batch_norm"):
        bn.convert.from_torch(torch.nn.BatchNorm1d(2, track_running_stats=False))
    average = _trained_torch(momentum=None)
    with pytest.raises(ValueError, match=r"momentum=None.*frozen=True"):
        bn.convert.from_torch(average)
    layer = bn.convert.from_torch(average, frozen=True)
    x = _draw(3, FEATURES, 4, 4, seed=9)
    assert layer.training is False
    _assert_close(layer(x), _Torch(average).evaluate(x), "evaluation")
    before = layer.stats.mean.copy()
    layer.train()(x)
    np.testing.assert_array_equal(layer.stats.mean, before)
    synchronous = torch.nn.SyncBatchNorm(2)
    with pytest.raises(ValueError, match="all processes"):
        bn.convert.from_torch(synchronous)
    bn.convert.from_torch(synchronous, frozen=True)
    with pytest.raises(TypeError, match="leave them out"):
        bn.convert.from_torch(average, eps=1e-3)


def test_modules_that_only_look_like_it() -> None:
    torch = _installed("torch")

    class WithActivation(torch.nn.BatchNorm2d):
        def forward(self, x: Any) -> Any:
            return super().forward(x).relu()

    class Named(torch.nn.BatchNorm2d):
        pass

    for module in (WithActivation(2), torch.nn.InstanceNorm2d(2, track_running_stats=True)):
        with pytest.raises(TypeError, match=r"forward of its own.*state_dict"):
            bn.convert.from_torch(module)
    with pytest.raises(ValueError, match="lazy"):
        bn.convert.from_torch(torch.nn.LazyBatchNorm2d())
    with pytest.raises(ValueError, match="on the device meta"):
        bn.convert.from_torch(torch.nn.BatchNorm2d(2, device="meta"))
    for module in (Named(2), import_module("bnarray.torch").BatchNorm1d(2)):
        assert bn.convert.from_torch(module).stats.num_features == 2


# -- Keras -------------------------------------------------------------------------------------------------------------


class _Keras(_Theirs):
    def __init__(self, layer: Any) -> None:
        self.layer, self.numpy = layer, _installed("keras").ops.convert_to_numpy

    def evaluate(self, x: np.ndarray) -> Any:
        return self.numpy(self.layer(x, training=False))

    def train(self, x: np.ndarray) -> Any:
        return self.numpy(self.layer(x, training=True))

    def statistics(self) -> tuple[Any, Any]:
        return self.numpy(self.layer.moving_mean.value), self.numpy(self.layer.moving_variance.value)


def _trained_keras(axis: int, **keywords: Any) -> Any:
    keras = _installed("keras")
    layer = keras.layers.BatchNormalization(axis=axis, **{"epsilon": 1e-2, "momentum": 0.7} | keywords)
    layer.build(_shape(axis, 4))
    arrays = _arrays(FEATURES)
    if layer.scale and layer.center:
        layer.gamma.assign(arrays["weight"])
        layer.beta.assign(arrays["bias"])
    for seed in range(3):
        layer(_draw(*_shape(axis, 4), axis=axis, seed=seed), training=True)
    return layer


@pytest.mark.parametrize("axis", [-1, 1])
@pytest.mark.parametrize("affine", [True, False])
def test_from_keras(affine: bool, axis: int) -> None:
    theirs = _trained_keras(axis, center=affine, scale=affine)
    layer = bn.convert.from_keras(theirs)
    assert (layer.stats.correction, layer.stats.update_rate, layer.axis) == (0, 0.3, axis)
    _assert_the_same(layer, _Keras(theirs), _draw(*_shape(axis, 4), axis=axis, seed=9))


@pytest.mark.parametrize("axis", [-1, 1])
@pytest.mark.parametrize("affine", [True, False])
def test_to_keras(affine: bool, axis: int) -> None:
    keras = _installed("keras")
    layer = _layer(axis=axis, affine=affine, correction=0)
    options, arrays = bn.convert.to_keras(layer)
    theirs = keras.layers.BatchNormalization(**options)
    theirs.build(_shape(axis, 4))
    theirs.set_weights([*arrays.values()])
    _assert_the_same(layer, _Keras(theirs), _draw(*_shape(axis, 4), axis=axis, seed=9))


def test_what_keras_means_otherwise() -> None:
    keras = _installed("keras")
    still = _trained_keras(-1)
    still.trainable = False  # which evaluates in training too
    layer, x = bn.convert.from_keras(still), _draw(*_shape(-1, 4), axis=-1, seed=9)
    _assert_close(layer(x), _Keras(still).train(x), "training")
    assert layer.stats.num_updates == 0
    with pytest.raises(ValueError, match="not built"):
        bn.convert.from_keras(keras.layers.BatchNormalization())
    with pytest.raises(ValueError, match=r"no gamma.*with gamma of ones"):
        bn.convert.from_keras(_trained_keras(-1, scale=False))
    with pytest.raises(ValueError, match=r"no beta.*with beta of zeros"):
        bn.convert.from_keras(_trained_keras(-1, center=False))
    layer = _trained_keras(-1)
    layer.synchronized = True  # which Keras itself allows with TensorFlow only
    with pytest.raises(ValueError, match=r"synchronized.*frozen=True"):
        bn.convert.from_keras(layer)
    bn.convert.from_keras(layer, frozen=True)
    layer.fused = False  # as Keras 2 has it
    with pytest.raises(ValueError, match=r"Keras 2.*mapping, with frozen=True"):
        bn.convert.from_keras(layer, frozen=True)
    del layer.fused
    layer.renorm = True
    with pytest.raises(ValueError, match="renorm=True"):
        bn.convert.from_keras(layer, frozen=True)


# -- Flax --------------------------------------------------------------------------------------------------------------


class _Linen(_Theirs):
    def __init__(self, options: dict[str, Any], variables: dict[str, Any]) -> None:
        from flax import linen

        self.linen, self.options, self.variables = linen, options, variables

    def evaluate(self, x: np.ndarray) -> Any:
        return self.linen.BatchNorm(use_running_average=True, **self.options).apply(self.variables, x)

    def train(self, x: np.ndarray) -> Any:
        module = self.linen.BatchNorm(use_running_average=False, **self.options)
        y, updated = module.apply(self.variables, x, mutable=["batch_stats"])
        self.variables = {**self.variables, **updated}
        return y

    def statistics(self) -> tuple[Any, Any]:
        return self.variables["batch_stats"]["mean"], self.variables["batch_stats"]["var"]


class _Nnx(_Theirs):
    def __init__(self, module: Any) -> None:
        self.module = module

    def evaluate(self, x: np.ndarray) -> Any:
        return self.module(x, use_running_average=True)

    def train(self, x: np.ndarray) -> Any:
        return self.module(x, use_running_average=False)

    def statistics(self) -> tuple[Any, Any]:
        return self.module.mean[...], self.module.var[...]


@pytest.mark.parametrize("axis", [-1, 1, (1, 3)])
def test_linen(axis: Any) -> None:
    _installed("flax")
    import jax

    shape = (5, 4, 6, 2)
    options = {"axis": axis, "momentum": 0.7, "epsilon": 1e-2}
    theirs = _Linen(options, {})
    module = theirs.linen.BatchNorm(use_running_average=True, **options)
    theirs.variables = module.init(jax.random.key(0), np.zeros(shape, np.float32))
    for seed in range(3):
        theirs.train(_draw(*shape, seed=seed))
    keywords = {"eps": 1e-2, "update_rate": 1 - 0.7, "axis": axis}
    layer = bn.convert.from_flax(theirs.variables, **keywords)
    flat = {**theirs.variables["params"], **theirs.variables["batch_stats"]}
    _assert_equal(bn.convert.from_flax(flat, **keywords), layer)
    again = _Linen(*bn.convert.to_flax(layer, like=jax.numpy.empty(0)))
    assert again.options["momentum"] == 0.7
    x = _draw(*shape, seed=9)
    for each in (theirs, again):
        if isinstance(axis, int):
            _assert_the_same(bn.convert.from_flax(each.variables, **keywords), each, x)
        else:
            _assert_close(layer.eval()(x), each.evaluate(x), "evaluation")


@pytest.mark.parametrize("affine", [True, False])
def test_nnx(affine: bool) -> None:
    _installed("flax")
    from flax import nnx

    options = {"axis": -1, "momentum": 0.7, "epsilon": 1e-2, "use_bias": affine, "use_scale": affine}
    module = nnx.BatchNorm(FEATURES, rngs=nnx.Rngs(0), **options)
    if affine:
        module.scale[...] = _arrays(FEATURES)["weight"]
        module.bias[...] = _arrays(FEATURES)["bias"]
    for seed in range(3):
        module(_draw(*_shape(-1, 4), axis=-1, seed=seed))
    layer = bn.convert.from_flax(module)
    assert layer.training
    x = _draw(*_shape(-1, 4), axis=-1, seed=9)
    _assert_the_same(layer, _Nnx(module), x)

    options, variables = bn.convert.to_flax(layer)
    module = nnx.BatchNorm(FEATURES, rngs=nnx.Rngs(0), use_running_average=True, **options)
    for name, array in {**variables["params"], **variables["batch_stats"]}.items():
        getattr(module, name)[...] = array
    assert not bn.convert.from_flax(module).training
    _assert_the_same(layer, _Nnx(module), _draw(*_shape(-1, 4), axis=-1, seed=10))


def test_what_flax_means_otherwise() -> None:
    _installed("flax")
    from flax import linen, nnx

    with pytest.raises(TypeError, match="holds no arrays"):
        bn.convert.from_flax(linen.BatchNorm())
    with pytest.raises(ValueError, match="no bias"):
        bn.convert.from_flax(nnx.BatchNorm(2, rngs=nnx.Rngs(0), use_bias=False))
    spread = nnx.BatchNorm(2, rngs=nnx.Rngs(0), axis_name="batch")
    with pytest.raises(ValueError, match=r"axis_name='batch'.*frozen=True"):
        bn.convert.from_flax(spread)
    assert bn.convert.from_flax(spread, frozen=True).stats.update_rate == 0


@pytest.mark.parametrize("variables", [{"batch_stats": None}, {"params": 5, "batch_stats": {}}])
def test_variables_that_flax_never_made(variables: dict[str, Any]) -> None:
    with pytest.raises(TypeError, match="should be a mapping of one layer's arrays"):
        bn.convert.from_flax(variables, eps=1e-5, update_rate=0.1)


# -- Haiku -------------------------------------------------------------------------------------------------------------


class _Haiku(_Theirs):
    def __init__(self, options: dict[str, Any], params: Any, state: Any) -> None:
        import haiku

        def network(x: Any, is_training: bool) -> Any:
            return haiku.BatchNorm(**options)(x, is_training)

        self.network = haiku.transform_with_state(network)
        self.params, self.state = params, state

    def evaluate(self, x: np.ndarray) -> Any:
        return self.network.apply(self.params, self.state, None, x, False)[0]

    def train(self, x: np.ndarray) -> Any:
        y, self.state = self.network.apply(self.params, self.state, None, x, True)
        return y

    def statistics(self) -> tuple[Any, Any]:
        mean, var = (self.state[f"batch_norm/~/{each}_ema"]["average"] for each in ("mean", "var"))
        return np.ravel(mean), np.ravel(var)


@pytest.mark.parametrize("axis", [-1, 1])
@pytest.mark.parametrize("affine", [True, False])
def test_haiku(affine: bool, axis: int) -> None:
    _installed("haiku")
    import jax

    options = {
        "create_scale": affine,
        "create_offset": affine,
        "decay_rate": 0.5,
        "eps": 1e-2,
        "data_format": "channels_last" if axis == -1 else "channels_first",
    }
    theirs = _Haiku(options, {}, {})
    shape = _shape(axis, 4)
    theirs.params, theirs.state = theirs.network.init(jax.random.key(0), np.zeros(shape, np.float32), True)
    for seed in range(24):
        theirs.train(_draw(*shape, axis=axis, seed=seed))
    keywords = {"eps": 1e-2, "update_rate": 0.5, "axis": axis}
    with pytest.raises(ValueError, match=r"counter of 24.*frozen=True"):
        bn.convert.from_haiku(theirs.params, theirs.state, **keywords)
    for seed in range(24, 26):
        theirs.train(_draw(*shape, axis=axis, seed=seed))
    layer = bn.convert.from_haiku(theirs.params, theirs.state, **keywords)
    assert layer.stats.num_updates == 26
    assert (layer.weight is not None) == affine
    again = bn.convert.to_haiku(layer, 4, like=jax.numpy.empty(0))
    assert again[0] == options
    x = _draw(*shape, axis=axis, seed=90)
    _assert_the_same(layer, theirs, x)
    layer = bn.convert.from_haiku(*again[1:], **keywords)
    _assert_the_same(layer, _Haiku(*again), x)


def test_a_young_layer_to_haiku() -> None:
    """Haiku's debiasing must be over from the start."""
    _installed("haiku")
    import jax

    layer = _layer(axis=-1, correction=0)
    options, params, state = bn.convert.to_haiku(layer, 4, like=jax.numpy.empty(0))
    _assert_the_same(layer, _Haiku(options, params, state), _draw(*_shape(-1, 4), axis=-1, seed=9))


def _haiku_state(shape: tuple[int, ...]) -> dict[str, Any]:
    average = {"average": np.ones(shape), "counter": 10_000}
    return {"batch_norm/~/mean_ema": average, "batch_norm/~/var_ema": average}


def test_errors_of_haiku() -> None:
    rates = {"eps": 1e-5, "update_rate": 0.1}
    with pytest.raises(ValueError, match=r"\(1, 2, 1, 1\).*axis -1.*pass axis="):
        bn.convert.from_haiku({}, _haiku_state((1, 2, 1, 1)), **rates)
    with pytest.raises(ValueError, match="no offset"):
        bn.convert.from_haiku({"batch_norm": {"scale": np.ones((1, 2))}}, _haiku_state((1, 2)), **rates)
    with pytest.raises(KeyError, match=r"bn/~/mean_ema; it has batch_norm/~/mean_ema"):
        bn.convert.from_haiku({}, _haiku_state((1, 2)), "bn", **rates)
    with pytest.raises(ValueError, match="axis 0"):
        bn.convert.to_haiku(bn.BatchNorm(2, axis=0), 4)
    with pytest.raises(ValueError, match="update_rate=0"):
        bn.convert.to_haiku(bn.BatchNorm(2, axis=1, update_rate=0, correction=0), 4)


# -- Chainer, which cannot be installed beside a NumPy of today: by its documented formulas ---------------------------


class _Chainer(_Theirs):
    """``avg = decay * avg + (1 - decay) * batch``, with the unbiased variance; features are x's axes from 1."""

    def __init__(self, link: Any) -> None:
        self.link = link

    def _normalized(self, x: np.ndarray, mean: np.ndarray, var: np.ndarray) -> np.ndarray:
        def along(array: np.ndarray) -> np.ndarray:
            return array.reshape(1, *array.shape, *[1] * (x.ndim - 1 - array.ndim))

        scaled = (x - along(mean)) / np.sqrt(along(var) + self.link.eps)
        return scaled * along(self.link.gamma.array) + along(self.link.beta.array)

    def evaluate(self, x: np.ndarray) -> Any:
        return self._normalized(x, self.link.avg_mean, self.link.avg_var)

    def train(self, x: np.ndarray) -> Any:
        axes = (0, *range(1 + self.link.avg_mean.ndim, x.ndim))
        mean, var = x.mean(axes, np.float64), x.var(axes, np.float64)
        m = x.size / mean.size
        decay = self.link.decay
        self.link.avg_mean = decay * self.link.avg_mean + (1 - decay) * mean
        self.link.avg_var = decay * self.link.avg_var + (1 - decay) * var * m / max(m - 1, 1)
        return self._normalized(x, mean, var)

    def statistics(self) -> tuple[Any, Any]:
        return self.link.avg_mean, self.link.avg_var


class _Parameter:
    """As Chainer's, what there is of it."""

    def __init__(self, array: np.ndarray) -> None:
        self.array = array


_Parameter.__module__ = "chainer.variable"


def _link(*shape: int, **keywords: Any) -> Any:
    arrays = _arrays(*shape)
    parameters = {"gamma": _Parameter(arrays["weight"]), "beta": _Parameter(arrays["bias"])}
    state = {"avg_mean": arrays["mean"], "avg_var": arrays["var"], "N": 0}
    return types.SimpleNamespace(**{**parameters, **state, "decay": 0.9, "eps": 2e-5, "axis": None, **keywords})


def test_from_chainer() -> None:
    link = _link(FEATURES)
    layer = bn.convert.from_chainer(link)
    assert (layer.stats.update_rate, layer.stats.correction, layer.eps, layer.axis) == (0.1, 1, 2e-5, 1)
    _assert_the_same(layer, _Chainer(link), _draw(4, FEATURES, 5))


def test_axes_of_chainer() -> None:
    """It names the axes that it reduces."""
    link = _link(4, 6)
    layer = bn.convert.from_chainer(link)
    assert layer.axis == (1, 2)
    x = _draw(5, 4, 6, 2)
    _assert_close(layer.eval()(x), _Chainer(link).evaluate(x), "evaluation")
    assert bn.convert.from_chainer(_link(FEATURES, axis=(0, 1, 2))).axis == 3
    assert bn.convert.from_chainer(_link(4, 6, axis=0)).axis == (1, 2)


def test_to_chainer() -> None:
    layer = _layer()
    options, arrays = bn.convert.to_chainer(layer)
    assert options == {"size": FEATURES, "decay": 0.75, "eps": 1e-3, "use_gamma": True, "use_beta": True}
    parameters = {name: _Parameter(arrays[name]) for name in ("gamma", "beta")}
    link = types.SimpleNamespace(**{**arrays, **parameters, "decay": options["decay"], "eps": options["eps"]})
    _assert_the_same(layer, _Chainer(link), _draw(4, FEATURES, 5, seed=9))
    with pytest.raises(ValueError, match="axis -1"):
        bn.convert.to_chainer(bn.BatchNorm(2, axis=-1))


def test_links_that_cannot_be_had() -> None:
    with pytest.raises(ValueError, match="no arrays yet"):
        bn.convert.from_chainer(_link(FEATURES, avg_var=None))
    with pytest.raises(ValueError, match="no gamma"):
        bn.convert.from_chainer(_link(FEATURES, gamma=None))
    with pytest.raises(ValueError, match="renormalization"):
        bn.convert.from_chainer(_link(FEATURES, rmax=3))
    with pytest.raises(ValueError, match=r"all processes.*frozen=True"):
        bn.convert.from_chainer(_link(FEATURES, comm=None))
    assert bn.convert.from_chainer(_link(FEATURES, comm=None), frozen=True).stats.update_rate == 0


# -- ONNX --------------------------------------------------------------------------------------------------------------


def _model(attributes: dict[str, Any], arrays: dict[str, np.ndarray], x: np.ndarray) -> Any:
    onnx = _installed("onnx")
    outputs = ["y", "mean", "var"] if attributes.get("training_mode") else ["y"]
    shapes = {"y": x.shape, "mean": arrays["scale"].shape, "var": arrays["scale"].shape}
    node = onnx.helper.make_node("BatchNormalization", ["x", *arrays], outputs, **attributes)
    value = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        [node],
        "graph",
        [value("x", onnx.TensorProto.FLOAT, x.shape)],
        [value(each, onnx.TensorProto.FLOAT, shapes[each]) for each in outputs],
        [onnx.numpy_helper.from_array(array, name) for name, array in arrays.items()],
    )
    return onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 15)], ir_version=8)


def _initializers(model: Any) -> dict[str, np.ndarray]:
    onnx = _installed("onnx")
    return {each.name: onnx.numpy_helper.to_array(each) for each in model.graph.initializer}


def _run(model: Any, x: np.ndarray) -> list[np.ndarray]:
    runtime = _installed("onnxruntime")
    session = runtime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return list(session.run(None, {"x": x}))


@pytest.mark.parametrize("affine", [True, False])
def test_to_onnx_and_back(affine: bool) -> None:
    """In evaluation, which does not ask about the correction."""
    layer = _layer(affine=affine).eval()
    x = _draw(3, FEATURES, 4, 4, seed=9)
    options, arrays = bn.convert.to_onnx(layer, like=x)
    model = _model(options, arrays, x)
    _assert_close(layer(x), _run(model, x)[0], "evaluation")
    again = bn.convert.from_onnx(model.graph.node[0], _initializers(model))
    assert (again.training, again.stats.update_rate, again.stats.correction) == (False, 0.1, 0)
    _assert_close(again(x), layer(x), "there and back")


def test_from_onnx_in_training() -> None:
    """By ONNX's own reference, exact at the operator's last version; the runtime on the CPU has no training."""
    onnx = _installed("onnx")
    given = _arrays(FEATURES)
    arrays = dict(zip(("scale", "B", "m", "v"), given.values(), strict=True))
    x = _draw(3, FEATURES, 4, 4)
    model = _model({"training_mode": 1, "momentum": 0.75, "epsilon": 1e-2}, arrays, x)
    layer = bn.convert.from_onnx(model.graph.node[0], _initializers(model))
    assert layer.training
    assert layer.stats.update_rate == 0.25
    from onnx.reference import ReferenceEvaluator

    y, mean, var = ReferenceEvaluator(model).run(None, {"x": x})
    assert onnx.defs.onnx_opset_version() >= 15
    _assert_close(layer(x), y, "training")
    _assert_close(layer.stats.mean, mean, "running mean")
    _assert_close(layer.stats.var, var, "running variance")


@pytest.mark.parametrize(
    ("attributes", "outputs", "message"),
    [
        ({"spatial": 0}, 1, "spatial=0"),
        ({"is_test": 0}, 1, "operator sets before 14"),
        ({}, 5, "operator sets before 14"),
        ({"consumed_inputs": 1}, 1, "consumed_inputs"),
    ],
)
def test_nodes_that_cannot_be_had(attributes: dict[str, Any], outputs: int, message: str) -> None:
    node = types.SimpleNamespace(
        op_type="BatchNormalization",
        attribute=[types.SimpleNamespace(name=name, i=value, f=0.0) for name, value in attributes.items()],
        input=["x", "a", "b", "c", "d"],
        output=[str(each) for each in range(outputs)],
    )
    with pytest.raises(ValueError, match=message):
        bn.convert.from_onnx(node, {})
    node.domain = "com.example"
    with pytest.raises(ValueError, match=r"com\.example\.BatchNormalization"):
        bn.convert.from_onnx(node, {})
    node.domain, node.op_type = "", "LayerNormalization"
    with pytest.raises(ValueError, match="LayerNormalization"):
        bn.convert.from_onnx(node, {})


def test_a_node_inside_a_function() -> None:
    """Its attributes are the function's, and look like zeros in the node."""
    onnx = _installed("onnx")
    node = onnx.helper.make_node("BatchNormalization", ["x", "a", "b", "c", "d"], ["y"])
    kind = onnx.AttributeProto.FLOAT
    node.attribute.append(onnx.AttributeProto(name="epsilon", ref_attr_name="eps", type=kind))
    with pytest.raises(ValueError, match="node has epsilon from the function"):
        bn.convert.from_onnx(node, {})


def test_inputs_of_a_node() -> None:
    node = types.SimpleNamespace(
        op_type="BatchNormalization", attribute=[], input=["x", "a", "b", "c", "d"], output=["y"]
    )
    with pytest.raises(TypeError, match="initializers is None"):
        bn.convert.from_onnx(node)
    with pytest.raises(KeyError, match="lacks a"):
        bn.convert.from_onnx(node, {"b": np.ones(2)})
    tensors = {name: _installed("onnx").TensorProto() for name in "abcd"}
    with pytest.raises(TypeError, match=r"TensorProto.*onnx.numpy_helper.to_array"):
        bn.convert.from_onnx(node, tensors)


# -- What all have in common -------------------------------------------------------------------------------------------

FROM = {
    "torch": ("from_torch", ("weight", "bias", "running_mean", "running_var")),
    "Keras": ("from_keras", ("gamma", "beta", "moving_mean", "moving_variance")),
    "Flax": ("from_flax", ("scale", "bias", "mean", "var")),
    "Chainer": ("from_chainer", ("gamma", "beta", "avg_mean", "avg_var")),
    "ONNX": ("from_onnx", ("scale", "B", "input_mean", "input_var")),
}
systems = pytest.mark.parametrize("system", FROM)


def _mapping(system: str) -> tuple[Callable[..., bn.BatchNorm], dict[str, np.ndarray]]:
    name, keys = FROM[system]
    return getattr(bn.convert, name), dict(zip(keys, _arrays(FEATURES).values(), strict=True))


@systems
def test_mappings(system: str) -> None:
    convert, arrays = _mapping(system)
    given = list(arrays.values())
    layer = convert(arrays, eps=1e-2, update_rate=0.25)
    for ours, theirs in zip([*layer.parameters(), *layer.stats.mean_and_var()], given, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert (layer.eps, layer.stats.update_rate, layer.stats.num_updates) == (1e-2, 0.25, 0)
    frozen = convert(arrays, eps=1e-2, update_rate=0.25, frozen=True)
    assert (frozen.training, frozen.stats.update_rate) == (False, 0)
    assert convert(arrays, eps=1e-2, update_rate=0.25, like=np.zeros(1, np.float32)).weight.dtype == np.float32


@systems
def test_errors_of_mappings(system: str) -> None:
    convert, arrays = _mapping(system)
    weight, bias, mean, var = arrays
    with pytest.raises(TypeError, match="pass eps= and update_rate="):
        convert(arrays)
    with pytest.raises(TypeError, match="pass eps= "):
        convert(arrays, update_rate=0.1)
    with pytest.raises(TypeError, match=r"momentum=0.9 is ambiguous.*update_rate=0.1 for Keras"):
        convert(arrays, eps=1e-5, momentum=0.9)
    rates = {"eps": 1e-5, "update_rate": 0.1}
    with pytest.raises(TypeError, match="is a list; it should be a layer"):
        convert([], **rates)
    with pytest.raises(KeyError, match=f"lacks {mean}"):
        convert({name: arrays[name] for name in (weight, bias, var)}, **rates)
    with pytest.raises(ValueError, match=rf"{var} has shape \(2,\); it should have that of {mean}"):
        convert(arrays | {var: np.ones(2)}, **rates)
    with pytest.raises(TypeError, match=f"{mean} is a builtins.list"):
        convert(arrays | {mean: [1.0]}, **rates)
    with pytest.raises(TypeError, match=f"{bias} has dtype int64"):
        convert(arrays | {bias: np.ones(FEATURES, np.int64)}, **rates)
    with pytest.raises(ValueError, match="negative"):
        convert(arrays | {var: -np.ones(FEATURES)}, **rates)


TO: dict[str, Callable[..., Any]] = {
    "torch": bn.convert.to_torch,
    "Keras": bn.convert.to_keras,
    "Flax": bn.convert.to_flax,
    "Haiku": lambda layer, **keywords: bn.convert.to_haiku(layer, 4, **keywords),
    "Chainer": bn.convert.to_chainer,
}
UNBIASED = ("torch", "Chainer")


def _variance(converted: Any) -> np.ndarray:
    """The array of running variances, wherever it is."""
    if not isinstance(converted, np.ndarray):
        (found,) = [
            each if isinstance(each, np.ndarray) else _variance(each)
            for name, each in converted.items()
            if name
            in ("running_var", "moving_variance", "batch_stats", "var", "avg_var", "batch_norm/~/var_ema", "average")
        ]
        return found
    return converted


@pytest.mark.parametrize("system", TO)
def test_corrections(system: str) -> None:
    own = 1 if system in UNBIASED else 0
    other = _layer(correction=1 - own)
    with pytest.raises(ValueError, match=r"pass count=.*or frozen=True"):
        TO[system](other)
    n = 40
    factor = n / (n - 1) if own else (n - 1) / n
    np.testing.assert_allclose(_variance(TO[system](other, count=n)[-1]).ravel(), other.stats.var * factor, rtol=1e-15)
    np.testing.assert_array_equal(_variance(TO[system](other, frozen=True)[-1]).ravel(), other.stats.var)
    for count in (1, 0, -5, float("inf"), float("nan")):
        with pytest.raises(ValueError, match=f"count is {count}; it should be a number above"):
            TO[system](other, count=count)
    kept = _layer(correction=own)
    np.testing.assert_array_equal(_variance(TO[system](kept, count=n)[-1]).ravel(), kept.stats.var)


@pytest.mark.parametrize("system", TO)
def test_layers_that_cannot_be_had(system: str) -> None:
    with pytest.raises(TypeError, match="layer is a dict"):
        TO[system]({})
    with pytest.raises(ValueError, match=r"activation 'relu'.*layer.activation = None"):
        TO[system](bn.BatchNorm(2, activation="relu"))
    exact = _layer(update_rate=None, correction=1 if system in UNBIASED else 0)
    with pytest.raises(ValueError, match=rf"update_rate=None.*{system}.*frozen=True"):
        TO[system](exact)
    np.testing.assert_array_equal(_variance(TO[system](exact, frozen=True)[-1]).ravel(), exact.stats.var)
    if system != "Flax":
        with pytest.raises(ValueError, match=r"axis|axes"):
            TO[system](bn.BatchNorm((2, 2), axis=(0, 2)))


def test_what_is_made_is_a_copy() -> None:
    layer = _layer()
    before = layer.stats.mean.copy()
    state = bn.convert.to_torch(layer).arrays
    state["running_mean"] += 1
    state["weight"] += 1
    np.testing.assert_array_equal(layer.stats.mean, before)
    np.testing.assert_array_equal(layer.weight, _arrays(FEATURES)["weight"].astype(float))


def test_no_framework_is_imported(run_python: Callable[..., str]) -> None:
    code = "import sys, bnarray as bn; bn.convert.to_torch(bn.BatchNorm(2)); print(*sys.modules)"
    loaded = {each.partition(".")[0] for each in run_python(code).split()}
    assert not loaded & {"torch", "keras", "flax", "haiku", "jax", "onnx", "chainer", "tensorflow"}
    assert "bnarray" in sys.modules


# -- Folding -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("affine", [True, False])
def test_fold_as_torch_convolves(affine: bool, with_bias: bool) -> None:
    torch = _installed("torch")
    torch.manual_seed(0)
    convolution = torch.nn.Conv2d(4, FEATURES, 3, bias=with_bias)
    module = _trained_torch(affine=affine).eval()
    x = torch.from_numpy(_draw(2, 4, 8, 8))
    with torch.no_grad():
        expected = module(convolution(x)).numpy()
        bias = convolution.bias.numpy() if with_bias else None
        layer = bn.convert.from_torch(module)
        kernel, shift = bn.fold(convolution.weight.numpy(), bias, layer)
        y = torch.nn.functional.conv2d(x, torch.from_numpy(kernel), torch.from_numpy(shift)).numpy()
        fused = torch.nn.utils.fusion.fuse_conv_bn_eval(convolution.eval(), module)
    assert kernel.dtype == shift.dtype == np.float32
    assert abs(y - expected).max() <= 1e-6 * abs(expected).max()
    _assert_close(kernel, fused.weight.detach().numpy(), "kernel")
    _assert_close(shift, fused.bias.detach().numpy(), "bias")


@pytest.mark.parametrize("matrix", [True, False], ids=["matrix", "convolution"])
def test_fold_as_keras_convolves(matrix: bool) -> None:
    keras = _installed("keras")
    before = keras.layers.Dense(FEATURES) if matrix else keras.layers.Conv2D(FEATURES, 3)
    theirs = _trained_keras(-1)
    x = _draw(2, 8, 8, 4, axis=-1)
    numpy = keras.ops.convert_to_numpy
    expected = numpy(theirs(before(x), training=False))
    kernel, bias = numpy(before.kernel.value), numpy(before.bias.value)
    before.set_weights(bn.fold(kernel, bias, bn.convert.from_keras(theirs), axis=-1))
    assert abs(numpy(before(x)) - expected).max() <= 1e-6 * abs(expected).max()


@pytest.mark.parametrize("matrix", [True, False], ids=["matrix", "convolution"])
def test_fold_as_flax_convolves(matrix: bool) -> None:
    _installed("flax")
    import jax
    from flax import linen

    before = linen.Dense(FEATURES) if matrix else linen.Conv(FEATURES, (3, 3))
    x = _draw(2, 8, 8, 4, axis=-1)
    params = before.init(jax.random.key(0), x)["params"]
    layer = _layer(axis=-1, correction=0).eval()
    theirs = _Linen(*bn.convert.to_flax(layer))
    expected = theirs.evaluate(before.apply({"params": params}, x))
    kernel, bias = bn.fold(params["kernel"], params["bias"], layer, axis=-1)
    y = before.apply({"params": {"kernel": kernel, "bias": bias}}, x)
    assert float(abs(y - expected).max()) <= 1e-6 * float(abs(expected).max())


def test_errors_of_fold() -> None:
    layer = bn.BatchNorm(FEATURES)
    kernel = np.ones((FEATURES, 2))
    with pytest.raises(TypeError, match="layer is a dict"):
        bn.fold(kernel, None, {})
    with pytest.raises(TypeError, match="axis is 'out'"):
        bn.fold(kernel, None, layer, axis="out")
    with pytest.raises(ValueError, match="axis is 2, but kernel has 2 axes"):
        bn.fold(kernel, None, layer, axis=2)
    with pytest.raises(ValueError, match=r"outputs along axis 1 are \(2,\)"):
        bn.fold(kernel, None, layer, axis=1)
    with pytest.raises(ValueError, match=r"bias has shape \(2,\)"):
        bn.fold(kernel, np.ones(2), layer)
