"""HIPS autograd: gradients against finite differences and against the formula in autograd.numpy."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import bnarray as bn
from bnarray.layout import along_features
from tests.cases import OPTIONS, Drawn, Options, draw

autograd = pytest.importorskip("autograd", reason="autograd is not installed: gradients by it are not verified")

import autograd.numpy as anp  # noqa: E402  # where it is installed
from autograd.test_util import check_grads  # noqa: E402
from autograd.tracer import getval  # noqa: E402

RNG = np.random.default_rng(0)
X, DY = RNG.normal(2, 3, (2, 8, 3, 2))
WEIGHT, BIAS = RNG.normal(size=(2, 3))


def _formula(
    x: Any,
    weight: Any = None,
    bias: Any = None,
    *,
    axis: tuple[int, ...] = (1,),
    eps: float = 1e-5,
    where: Any = None,
    activation: str | None = None,
    residual: Any = None,
    statistics: tuple[Any, Any] | None = None,
) -> Any:
    """Batch normalization as one would write it in autograd.numpy."""
    reduced = tuple(i for i in range(x.ndim) if i not in axis)
    omega = np.broadcast_to(1.0 if where is None else np.asarray(where, np.float64), x.shape)
    along = along_features(x.shape, axis)
    if statistics is None:
        total = omega.sum(axis=reduced, keepdims=True)
        some = np.where(total > 0, total, 1.0)
        mean = anp.sum(omega * x, axis=reduced, keepdims=True) / some
        var = anp.where(total > 0, anp.sum(omega * (x - mean) ** 2, axis=reduced, keepdims=True) / some, 1.0)
    else:
        mean, var = (anp.reshape(each, along) for each in statistics)
    y = (x - mean) / anp.sqrt(var + eps)
    y = y if weight is None else y * anp.reshape(weight, along)
    y = y if bias is None else y + anp.reshape(bias, along)
    y = y if residual is None else y + residual
    return y if activation is None else anp.where(y > 0, y, 0.0)


def _case(options: Options, kept: tuple[int, ...] = (1,), shape: tuple[int, ...] = (7, 3, 2)) -> Drawn:
    return draw(shape, kept, "transposed", "float64", options, seed=5)


def _calls(case: Drawn) -> tuple[Callable[..., Any], Callable[..., Any], list[Any]]:
    """The same of bnarray and of the formula, as functions of all arrays that have a gradient, and those arrays."""
    names = ["x", *(name for name in ("weight", "bias", "residual") if name in case.call)]
    inputs = [case.x, *(case.call[name].astype(np.float64) for name in names[1:])]
    fixed = {name: case.call[name] for name in ("eps", "where") if name in case.call}
    fixed |= {"axis": case.kept, "activation": "relu" if case.relu else None}
    statistics = [] if case.statistics is None else list(case.statistics)

    def ours(*arrays: Any) -> Any:
        given = dict(zip(names, arrays[: len(names)], strict=True))
        if statistics:
            mean, var = arrays[len(names) :]
            given |= {"training": False, "stats": bn.Moments(3, mean, 3 * var)}
        return bn.batch_norm(**given, **fixed)

    def formula(*arrays: Any) -> Any:
        given = dict(zip(names, arrays[: len(names)], strict=True))
        return _formula(**given, **fixed, statistics=arrays[len(names) :] or None)

    return ours, formula, inputs + statistics


def _weighted(function: Callable[..., Any]) -> Callable[..., Any]:
    """A number of which every element of the result is a part, in its own way."""

    def loss(*arrays: Any) -> Any:
        y = function(*arrays)
        return anp.sum(anp.sin(y) * np.cos(np.arange(y.size)).reshape(y.shape))

    return loss


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: options.name)
def test_against_finite_differences(options: Options) -> None:
    ours, _, inputs = _calls(_case(options))
    check_grads(ours, modes=["rev"], order=2)(*inputs)


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: options.name)
@pytest.mark.parametrize(
    ("shape", "kept"), [((9, 4), (1,)), ((4, 3, 6), (0, 2)), ((4, 3, 6), ()), ((3, 4, 2, 3), (3,))]
)
def test_against_the_formula(shape: tuple[int, ...], kept: tuple[int, ...], options: Options) -> None:
    ours, formula, inputs = _calls(_case(options, kept, shape))
    every = tuple(range(len(inputs)))
    direction = [np.cos(np.arange(array.size)).reshape(array.shape) for array in inputs]

    def along_direction(loss: Callable[..., Any]) -> Callable[..., Any]:
        def slope(*arrays: Any) -> Any:
            gradients = autograd.grad(loss, every)(*arrays)
            return sum(anp.sum(g * d) for g, d in zip(gradients, direction, strict=True))

        return slope

    for of in (lambda loss: loss, along_direction):  # first and second derivatives
        got, expected = (autograd.grad(of(_weighted(each)), every)(*inputs) for each in (ours, formula))
        for ours_of, theirs in zip(got, expected, strict=True):
            np.testing.assert_allclose(ours_of, theirs, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("wanted", ["x", "weight", "bias", "residual"])
@pytest.mark.parametrize("activation", [None, "relu"])
def test_one_box_among_plain_arrays(wanted: str, activation: str | None) -> None:
    """A gradient of one argument alone: the others come as they are."""
    arrays = {"x": X, "weight": WEIGHT, "bias": BIAS, "residual": DY}

    def loss(of: Any) -> Any:
        return anp.sum(bn.batch_norm(**(arrays | {wanted: of}), activation=activation) * DY)

    _, saved = bn.batch_norm_forward(**arrays, activation=activation)
    expected = getattr(bn.batch_norm_backward(DY, saved), wanted)
    np.testing.assert_array_equal(autograd.grad(loss)(arrays[wanted]), expected)


@pytest.mark.parametrize("which", ["mean", "m2", "both"])
def test_statistics_alone(which: str) -> None:
    mean, m2 = RNG.normal(size=3), RNG.uniform(1, 2, 3)

    def ours(mean: Any, m2: Any) -> Any:
        return bn.batch_norm(X, WEIGHT, stats=bn.Moments(4, mean, m2), training=False)

    if which == "mean":
        check_grads(lambda mean: ours(mean, m2), modes=["rev"], order=2)(mean)
    elif which == "m2":
        check_grads(lambda m2: ours(mean, m2), modes=["rev"], order=2)(m2)
    else:
        check_grads(ours, modes=["rev"], order=2)(mean, m2)


def test_one_backward_for_all_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    from bnarray.backends import autograd as ours

    calls = []
    by_kernels = ours._by_kernels
    monkeypatch.setattr(ours, "_by_kernels", lambda *arguments: calls.append(1) or by_kernels(*arguments))
    autograd.grad(lambda *arrays: anp.sum(bn.batch_norm(*arrays) ** 2), (0, 1, 2))(X, WEIGHT, BIAS)
    assert len(calls) == 1


@pytest.mark.parametrize("where", [None, "mask", "weights"])
@pytest.mark.parametrize("axis", [1, (), (0, 2)])
def test_moments(axis: int | tuple[int, ...], where: str | None) -> None:
    omega = {None: None, "mask": RNG.random((8, 1, 2)) < 0.7, "weights": RNG.random((8, 3, 1))}[where]
    m = bn.moments(X, axis=axis, where=omega)

    def box(x: Any) -> bn.Moments:
        return bn.moments(x, axis=axis, where=omega)

    for of in ("mean", "m2"):
        check_grads(lambda x, of=of: getattr(box(x), of), modes=["rev"], order=2)(X)
        autograd.grad(lambda x, of=of: anp.sum(getattr(box(x), of)))(X)
    check_grads(lambda x: (m + box(x)).m2 * (box(x) + m).m2, modes=["rev"], order=2)(X)
    if where is None:
        check_grads(lambda x: box(x).var(1), modes=["rev"], order=2)(X)
    values = []
    autograd.grad(lambda x: values.append(getval(box(x).m2)) or anp.sum(box(x).mean))(X)
    np.testing.assert_array_equal(values[0], m.m2)


def test_moments_that_nothing_counts_in() -> None:
    where = np.array([1.0, 0, 2]).reshape(3, 1)
    for of in ("mean", "m2"):
        gradient = autograd.grad(lambda x, of=of: anp.sum(getattr(bn.moments(x, where=where), of)))(X)
        np.testing.assert_array_equal(gradient[:, 1], 0)
        assert (gradient[:, [0, 2]] != 0).any()


def test_padding_that_the_loss_ignores_disturbs_nothing() -> None:
    x = X.copy()
    x[6:] = np.nan
    where = (np.arange(8) < 6)[:, None, None]

    def slope(x: Any, **where: Any) -> Any:
        return anp.sum(autograd.grad(lambda x: anp.sum(bn.batch_norm(x, WEIGHT, **where)[:6] ** 3))(x)[:6] ** 2)

    for function in (lambda x, **keywords: anp.sum(bn.batch_norm(x, WEIGHT, **keywords)[:6] ** 3), slope):
        gradient = autograd.grad(lambda x, function=function: function(x, where=where))(x)
        np.testing.assert_allclose(gradient[:6], autograd.grad(function)(x[:6]), rtol=1e-9, atol=1e-10)
        np.testing.assert_array_equal(gradient[6:], 0)


def test_a_gradient_of_zero_still_has_a_derivative() -> None:
    """Where dy is 0, the weight's gradient depends on it all the same: by x̂."""

    def of_dy(dy: Any) -> Any:
        return anp.sum(autograd.grad(lambda weight: anp.sum(bn.batch_norm(X, weight) * dy))(WEIGHT))

    np.testing.assert_allclose(autograd.grad(of_dy)(np.zeros(X.shape)), bn.batch_norm(X), rtol=1e-9)


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_dtypes_stay(dtype: Any) -> None:
    x, weight = X.astype(dtype), WEIGHT.astype(np.float32)
    seen = []

    def loss(x: Any, weight: Any, bias: Any) -> Any:
        y = bn.batch_norm(x, weight, bias)
        seen.append(y.dtype)
        return anp.sum(y * DY.astype(dtype))

    gradients = autograd.grad(loss, (0, 1, 2))(x, weight, BIAS)
    assert [*seen, *(array.dtype for array in gradients)] == [dtype, dtype, np.float32, np.float64]
    _, saved = bn.batch_norm_forward(x, weight, BIAS)
    for got, expected in zip(gradients, bn.batch_norm_backward(DY.astype(dtype), saved), strict=True):
        np.testing.assert_array_equal(got, expected)


def test_running_statistics_hold_numbers() -> None:
    stats, expected = bn.RunningStats(3), bn.RunningStats(3)

    def loss(x: Any, weight: Any) -> Any:
        return anp.sum(bn.batch_norm(x, weight, stats=stats) ** 2)

    for times in (1, 2):
        autograd.grad(loss, (0, 1))(X, WEIGHT)
        bn.batch_norm(X, stats=expected)
        assert stats.num_updates == times
    for name in ("mean", "var"):
        assert type(getattr(stats, name)) is np.ndarray
        np.testing.assert_array_equal(getattr(stats, name), getattr(expected, name))
    seen = []
    autograd.grad(lambda x: seen.append(bn.batch_norm_forward(x)[1].moments) or anp.sum(x))(X)
    assert type(seen[0].mean) is np.ndarray
    autograd.grad(lambda x: stats.update(bn.moments(x)) or anp.sum(x))(X)
    assert type(stats.mean) is np.ndarray
    assert stats.num_updates == 3


def test_evaluation_with_running_statistics() -> None:
    stats = bn.RunningStats(3)
    bn.batch_norm(X, stats=stats)
    check_grads(lambda *arrays: bn.batch_norm(*arrays, stats=stats, training=False), modes=["rev"], order=2)(
        X, WEIGHT, BIAS
    )
    assert stats.num_updates == 1


def test_fold_is_followed() -> None:
    layer = bn.BatchNorm(3, like=X)
    layer(X)
    kernel = RNG.normal(size=(3, 4))
    check_grads(lambda kernel: bn.fold(kernel, BIAS, layer)[0] ** 2, modes=["rev"])(kernel)
    check_grads(lambda bias: bn.fold(kernel, bias, layer)[1] ** 2, modes=["rev"])(BIAS)

    def of_weight(weight: Any) -> Any:
        layer.weight = weight
        return bn.fold(kernel, BIAS, layer)[0] ** 2

    check_grads(of_weight, modes=["rev"])(WEIGHT)


def test_empty() -> None:
    gradients = autograd.grad(lambda *arrays: anp.sum(bn.batch_norm(*arrays)), (0, 1, 2))(X[:0], WEIGHT, BIAS)
    assert [array.shape for array in gradients] == [(0, 3, 2), (3,), (3,)]
    np.testing.assert_array_equal(gradients[1], 0)
    assert autograd.grad(lambda x: anp.sum(bn.moments(x).m2))(X[:0]).shape == (0, 3, 2)


def _raises(error: type[Exception], message: str, call: Callable[..., Any]) -> None:
    with pytest.raises(error, match=message):
        autograd.grad(lambda box: anp.sum(call(box)))(X)


def test_refused() -> None:
    mask, stats, layer = abs(X), bn.RunningStats(3), bn.BatchNorm(3, like=X)
    _raises(TypeError, "where is followed by autograd", lambda box: bn.batch_norm(X, where=box**2))
    _raises(TypeError, "where is followed by autograd", lambda box: bn.moments(X, where=box**2))
    _raises(TypeError, "out is followed by autograd", lambda box: bn.batch_norm(X, out=box))
    _raises(TypeError, "out is given, but autograd", lambda box: bn.batch_norm(box, out=mask))
    _raises(TypeError, "out is given, but autograd", lambda box: bn.batch_norm(X, residual=box, out=mask, stats=stats))
    _raises(TypeError, "a count has no gradient", lambda box: bn.batch_norm(
        X, stats=bn.Moments(box[0, :, 0] ** 2, BIAS, BIAS**2), training=False))  # fmt: skip
    _raises(TypeError, "x has dtype complex128", lambda box: bn.batch_norm(box + 1j))
    _raises(TypeError, r"x is a builtins\.tuple", lambda box: bn.batch_norm(
        autograd.builtins.tuple((box, box))))  # fmt: skip
    _raises(TypeError, "x is a builtins.list", lambda box: bn.batch_norm([box]))
    _raises(ValueError, "weight has shape", lambda box: bn.batch_norm(X, box))
    for forward in (
        lambda box: bn.batch_norm_forward(box, WEIGHT),
        lambda box: bn.batch_norm_forward(X, box[0, :, 0]),
        lambda box: bn.batch_norm_forward(X, stats=bn.Moments(2, box[0, :, 0], BIAS**2), training=False),
        lambda box: bn.batch_norm_forward(X, stats=bn.Moments(2, BIAS, box[0, :, 0] ** 2), training=False),
    ):
        _raises(TypeError, "differentiate y itself", lambda box, of=forward: bn.batch_norm_backward(DY, of(box)[1]).x)
    _, saved = bn.batch_norm_forward(X)
    _raises(TypeError, "differentiate y itself", lambda box: bn.batch_norm_backward(box, saved).x)
    _raises(TypeError, "differentiate y itself", lambda box: layer(box) * 0 + layer.backward(DY))
    assert stats.num_updates == 0
    np.testing.assert_array_equal(mask, abs(X))


def test_forward_mode_is_an_error() -> None:
    with pytest.raises(NotImplementedError, match="batch_norm"):
        autograd.make_jvp(bn.batch_norm)(X)(DY)


def test_training_loop() -> None:
    """A network of two layers: the same losses as with the formula in autograd.numpy."""
    x, target = RNG.normal(3, 2, (60, 5)), RNG.normal(size=(60, 2))
    first, second = RNG.normal(size=(5, 16)), RNG.normal(size=(16, 2))

    def losses(normalized: Callable[..., Any]) -> list[float]:
        parameters = [first, np.ones(16), np.zeros(16), second]

        def loss(parameters: list[Any], batch: slice) -> Any:
            hidden = normalized(x[batch] @ parameters[0], parameters[1], parameters[2], activation="relu")
            return anp.mean((hidden @ parameters[3] - target[batch]) ** 2)

        seen = []
        for step in range(60):
            batch = slice(20 * (step % 3), 20 * (step % 3) + 20)
            number, gradients = autograd.value_and_grad(loss)(parameters, batch)
            parameters = [p - 0.05 * g for p, g in zip(parameters, gradients, strict=True)]
            seen.append(float(number))
        return seen

    ours = losses(bn.batch_norm)
    np.testing.assert_allclose(ours, losses(_formula), rtol=1e-9)
    assert ours[-1] < 0.8 * ours[0]
