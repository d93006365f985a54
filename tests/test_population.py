"""population_stats: exact, layer after layer, all or nothing."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

import bnarray as bn

WIDTHS = (4, 5, 3)


class _Network:
    """Three times matrix, layer, ReLU."""

    def __init__(self, **keywords: Any) -> None:
        rng = np.random.default_rng(0)
        sizes = zip((6, *WIDTHS[:-1]), WIDTHS, strict=True)
        self.matrices = [rng.normal(size=size) for size in sizes]
        self.layers = [bn.BatchNorm(width, activation="relu", **keywords) for width in WIDTHS]
        for layer in self.layers:
            layer.weight += rng.normal(size=layer.weight.shape)
            layer.bias += rng.normal(size=layer.bias.shape)

    def __call__(self, x: np.ndarray) -> np.ndarray:
        for matrix, layer in zip(self.matrices, self.layers, strict=True):
            x = layer(x @ matrix)
        return x


def _batches() -> list[np.ndarray]:
    """Of uneven sizes, with means that shift: averages over batches are far from the truth."""
    rng = np.random.default_rng(1)
    return [rng.normal(3 * shift, 1 + shift, (size, 6)) for shift, size in enumerate((7, 1, 0, 12, 3))]


def _state(layer: bn.BatchNorm) -> list[Any]:
    stats = layer.stats
    return [layer.training, stats, *stats.mean_and_var(), stats.count, stats.num_updates, stats.num_skipped]


def _assert_unchanged(layers: list[bn.BatchNorm], before: list[list[Any]]) -> None:
    for layer, old in zip(layers, before, strict=True):
        assert layer.on_call is None
        for ours, theirs in zip(_state(layer), old, strict=True):
            assert ours is theirs or ours == theirs


@pytest.mark.parametrize("correction", [0, 1])
@pytest.mark.parametrize("update_rate", [0.1, None])
def test_whole_data_at_once(update_rate: float | None, correction: float) -> None:
    network = _Network(update_rate=update_rate, correction=correction)
    network(_batches()[0])  # running averages of something else
    own = [layer.stats for layer in network.layers]
    bn.population_stats(network.layers, _batches(), network)

    x = np.concatenate(_batches())
    for matrix, layer in zip(network.matrices, network.layers, strict=True):
        x = x @ matrix
        mean, var = x.mean(0), x.var(0, ddof=correction)
        np.testing.assert_allclose(layer.stats.mean, mean, rtol=0, atol=1e-12 * abs(x).max())
        np.testing.assert_allclose(layer.stats.var, var, rtol=1e-12)
        x = np.maximum((x - mean) / np.sqrt(var + layer.eps) * layer.weight + layer.bias, 0)
    for layer, stats in zip(network.layers, own, strict=True):
        assert layer.stats is stats
        assert (stats.update_rate, stats.correction) == (update_rate, correction)
        assert (stats.count, stats.num_updates, stats.num_skipped) == (23, 4, 0)
        assert layer.training


def test_one_huge_batch() -> None:
    many, one = _Network(), _Network()
    bn.population_stats(many.layers, _batches(), many)
    bn.population_stats(one.layers, [np.concatenate(_batches())], one)
    for ours, theirs in zip(many.layers, one.layers, strict=True):
        np.testing.assert_allclose(ours.stats.mean, theirs.stats.mean, rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(ours.stats.var, theirs.stats.var, rtol=1e-12)


def test_it_goes_on_from_there() -> None:
    """A cumulative state has all that it needs to take in more."""
    layer, other = bn.BatchNorm(6, update_rate=None), bn.BatchNorm(6, update_rate=None)
    first, more = _batches()[0], _batches()[3]
    bn.population_stats([layer], [first], layer)
    layer(more)
    other(np.concatenate([first, more]))
    np.testing.assert_allclose(layer.stats.var, other.stats.var, rtol=1e-12)
    rated = bn.BatchNorm(6, update_rate=0.5)
    bn.population_stats([rated], [first], rated)
    before = rated.stats.mean
    rated(more)
    np.testing.assert_allclose(rated.stats.mean, (before + more.mean(0)) / 2, rtol=1e-12)


def test_masks_count() -> None:
    layer = bn.BatchNorm(6)
    where = [np.random.default_rng(2).random(each.shape) < 0.6 for each in _batches()]
    data = list(zip(_batches(), where, strict=True))
    bn.population_stats([layer], data, lambda batch: layer(batch[0], where=batch[1]))
    x, mask = np.concatenate(_batches()), np.concatenate(where)
    kept = [x[mask[:, i], i] for i in range(6)]
    np.testing.assert_array_equal(layer.stats.count, [len(each) for each in kept])
    np.testing.assert_allclose(layer.stats.mean, [each.mean() for each in kept], rtol=1e-12)
    np.testing.assert_allclose(layer.stats.var, [each.var(ddof=1) for each in kept], rtol=1e-12)


@pytest.mark.parametrize("batches", [lambda: iter(_batches()), _batches, tuple(_batches())])
def test_what_batches_may_be(batches: Any) -> None:
    network, other = _Network(), _Network()
    bn.population_stats(network.layers, batches, network)
    bn.population_stats(other.layers, _batches(), other)
    np.testing.assert_array_equal(network.layers[-1].stats.var, other.layers[-1].stats.var)


def test_modes_and_gradients_stay() -> None:
    network = _Network()
    network.layers[1].eval()
    x = np.random.default_rng(3).normal(size=(8, 6))
    network(x)
    dy = np.ones((8, 3))
    bn.population_stats(network.layers, _batches(), network)
    assert [layer.training for layer in network.layers] == [True, False, True]
    assert network.layers[2].backward(dy).shape == dy.shape  # of the forward before
    assert not any(gradient.any() for layer in network.layers[:2] for gradient in layer.gradients())


class _Interrupt(BaseException):
    pass


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, _Interrupt])
@pytest.mark.parametrize("when", [0, 7, 14])
def test_all_or_nothing(when: int, error: type[BaseException]) -> None:
    network = _Network()
    network(_batches()[0])
    before = [_state(layer) for layer in network.layers]
    calls = 0

    def forward(x: np.ndarray) -> None:
        nonlocal calls
        network(x)
        if calls == when:
            raise error("on purpose")
        calls += 1

    with pytest.raises(error, match="on purpose"):
        bn.population_stats(network.layers, _batches(), forward)
    assert calls == when
    _assert_unchanged(network.layers, before)


def test_an_interrupt_among_the_last_assignments() -> None:
    class Interrupted(bn.RunningStats):
        armed = False

        def __setattr__(self, name: str, value: object) -> None:
            if Interrupted.armed and name == "_state":
                Interrupted.armed = False
                raise KeyboardInterrupt
            super().__setattr__(name, value)

    network = _Network()
    network.layers[1].stats = Interrupted(WIDTHS[1])
    before = [_state(layer) for layer in network.layers]

    def batches() -> Iterator[np.ndarray]:
        yield from _batches()
        Interrupted.armed = True

    with pytest.raises(KeyboardInterrupt):
        bn.population_stats(network.layers, batches, network)
    assert not Interrupted.armed
    _assert_unchanged(network.layers, before)


def test_numbers_that_are_not_finite() -> None:
    bad = [*_batches(), np.full((2, 6), np.nan)]
    network, clean = _Network(), _Network()
    with pytest.warns(RuntimeWarning, match="NaN"):
        bn.population_stats(network.layers, bad, network)
    bn.population_stats(clean.layers, _batches(), clean)
    for ours, theirs in zip(network.layers, clean.layers, strict=True):
        np.testing.assert_array_equal(ours.stats.var, theirs.stats.var)
        assert (ours.stats.num_updates, ours.stats.num_skipped) == (4, 1)
    strict = bn.BatchNorm(6, stats=bn.RunningStats(6, nonfinite="raise"))
    before = [_state(strict)]
    with pytest.raises(FloatingPointError):
        bn.population_stats([strict], bad, strict)
    _assert_unchanged([strict], before)


def _twice(network: _Network) -> Callable[[np.ndarray], Any]:
    return lambda x: (network(x), network(x))


def test_what_cannot_be_measured() -> None:
    network = _Network()
    first, second, third = network.layers
    before = [_state(layer) for layer in network.layers]

    def fails(kind: type[Exception], message: str, layers: Any, batches: Any, forward: Any) -> None:
        with pytest.raises(kind, match=message):
            bn.population_stats(layers, batches, forward)
        _assert_unchanged(network.layers, before)

    data = _batches()
    fails(ValueError, r"calls layers\[1\] before layers\[0\]", [second, first, third], data, network)
    fails(ValueError, r"did not call layers\[3\]", [*network.layers, bn.BatchNorm(2)], data, network)
    fails(ValueError, r"layers\[0\] and layers\[3\] are the same", [*network.layers, first], data, network)
    sharing = bn.BatchNorm(4, stats=first.stats)
    fails(ValueError, r"layers\[0\] and layers\[1\] share their stats", [first, sharing], data, network)
    fails(ValueError, r"calls layers\[0\] 2 times", [first], data, lambda x: (first(x[:, :4]), first(x[:, :4])))
    fails(ValueError, r"layers\[2\] before layers\[0\]", network.layers, data, _twice(network))
    fails(ValueError, "no batch", network.layers, [], network)
    fails(ValueError, "no values that count", network.layers, [np.zeros((0, 6))], network)
    fails(ValueError, "layers is empty", [], data, network)
    fails(TypeError, "layers is a BatchNorm", first, data, network)
    fails(TypeError, r"layers\[0\] is a str", ["layer"], data, network)
    fails(TypeError, "only once", network.layers, iter(data), network)
    fails(TypeError, "batches is a int", network.layers, 3, network)
    fails(TypeError, "forward is a NoneType", network.layers, data, None)


def test_a_function_that_returns_what_is_used_up() -> None:
    network = _Network()
    batches: Iterator[np.ndarray] = iter(_batches())
    with pytest.raises(ValueError, match=r"layers\[1\], or batches gave no batch|gave 5 batches"):
        bn.population_stats(network.layers, lambda: batches, network)


def test_torch_tensors() -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed: statistics in its tensors are not verified")
    like = torch.empty(0, dtype=torch.float64)
    layer, other = bn.BatchNorm(6, like=like), bn.BatchNorm(6)
    bn.population_stats([layer], [torch.from_numpy(each) for each in _batches()], layer)
    bn.population_stats([other], _batches(), other)
    assert type(layer.stats.mean) is type(like)
    np.testing.assert_allclose(layer.stats.var.numpy(), other.stats.var, rtol=1e-14)
