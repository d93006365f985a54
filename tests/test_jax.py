"""JAX arrays: results, transformations, and the traps of a library that aliases, truncates and traces."""

import contextlib
import pickle
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import bnarray as bn
from bnarray.testing import TOLERANCES, Reference, Tolerance, assert_close, reference
from tests.cases import OPTIONS, SHAPES, Drawn, Options, draw

jax = pytest.importorskip("jax", reason="that JAX arrays are served is not verified without JAX")
import jax.numpy as jnp  # noqa: E402
from jax import export  # noqa: E402
from jax.experimental import serialize_executable  # noqa: E402
from jax.test_util import check_grads  # noqa: E402

from bnarray.backends import _xla  # noqa: E402
from bnarray.backends import jax as backend  # noqa: E402

if hasattr(jax, "enable_x64"):
    enable_x64 = jax.enable_x64
else:  # before JAX 0.8
    from jax.experimental import enable_x64

Array = Any


@pytest.fixture(params=["float32", "float64"])
def x64(request: pytest.FixtureRequest) -> Iterator[bool]:
    """Whether JAX has float64."""
    with enable_x64(request.param == "float64"):
        yield request.param == "float64"


def _table() -> list[Any]:
    """Shapes with every dtype; the options take turns, so that each dtype meets all of them."""
    cases, turn = [], 0
    for shape, kept in SHAPES[-len(OPTIONS) :]:
        for dtype in TOLERANCES:
            options = OPTIONS[turn % len(OPTIONS)]
            name = f"{'x'.join(map(str, shape))}-keep{''.join(map(str, kept))}-{dtype}-{options.name}"
            cases.append(pytest.param(shape, kept, dtype, options, id=name))
            turn += 1
    return cases


def _jax(array: np.ndarray | None) -> Array:
    return None if array is None else jnp.array(array, copy=True)


def _arguments(case: Drawn) -> dict[str, Any]:
    arguments = {name: value if name == "eps" else _jax(value) for name, value in case.call.items()}
    arguments |= {"axis": case.kept, "activation": "relu" if case.relu else None}
    if case.statistics is not None:
        mean, var = case.statistics
        arguments |= {"training": False, "stats": bn.Moments(1, mean, var)}
    return arguments


def _reference(case: Drawn) -> Reference:
    return reference(case.x, case.dy, case.kept, relu=case.relu, statistics=case.statistics, **case.call)


def _check_gradients(case: Drawn, truth: Reference, gradients: dict[str, Array], tolerance: Tolerance) -> None:
    assert_close(np.asarray(gradients["x"]), truth.dx, truth.dx_scale, tolerance, tolerance.dx)
    for name, expected, scale in (
        ("weight", truth.dweight, truth.dweight_scale),
        ("bias", truth.dbias, truth.dbias_scale),
    ):
        if name in gradients:
            found = np.asarray(gradients[name])
            assert found.dtype == case.call[name].dtype
            assert found.shape == case.call[name].shape
            rounding = 2e-7 * abs(expected)  # to float32, which the weight is
            assert (abs(found - expected) <= 1e-12 + tolerance.sums * scale + rounding).all()
    if "residual" in gradients:
        np.testing.assert_array_equal(np.asarray(gradients["residual"]).astype(np.float64), truth.dresidual)


@pytest.mark.parametrize(("shape", "kept", "dtype", "options"), _table())
def test_case_table(shape: tuple[int, ...], kept: tuple[int, ...], dtype: str, options: Options) -> None:
    """Forward, backward by hand and by `jax.vjp`, eagerly and compiled."""
    with enable_x64(True):
        case = draw(shape, kept, "c", dtype, options, seed=len(shape))
        tolerance, truth, arguments = TOLERANCES[dtype], _reference(case), _arguments(case)
        x, dy = _jax(case.x), _jax(case.dy)

        y, saved = bn.batch_norm_forward(x, **arguments)
        assert y.dtype == x.dtype
        assert_close(np.asarray(y), truth.y, truth.y_scale, tolerance, tolerance.y)
        by_hand = bn.batch_norm_backward(dy, saved)
        names = [name for name in ("x", "weight", "bias", "residual") if name in arguments or name == "x"]
        gradients = {name: getattr(by_hand, name) for name in names}
        _check_gradients(case, truth, gradients, tolerance)
        assert saved.moments is None or saved.moments.mean.dtype == jnp.float64

        def y_of(moving: dict[str, Array]) -> Array:
            return bn.batch_norm(**(arguments | moving))

        moving = {"x": x} | {name: arguments[name] for name in names if name != "x"}
        compiled = jax.jit(lambda moving, dy: (y_of(moving), jax.vjp(y_of, moving)[1](dy)[0]))
        y_again, gradients_again = compiled(moving, dy)
        np.testing.assert_array_equal(np.asarray(y_again), np.asarray(y))
        np.testing.assert_array_equal(np.asarray(bn.batch_norm(x, **arguments)), np.asarray(y))
        for name, gradient in gradients.items():
            np.testing.assert_array_equal(np.asarray(gradients_again[name]), np.asarray(gradient), err_msg=name)


@pytest.mark.parametrize(("shape", "kept", "dtype", "options"), _table()[::5])
def test_formula(
    shape: tuple[int, ...], kept: tuple[int, ...], dtype: str, options: Options, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What stands for the kernels where XLA cannot call them, and what derivatives are taken of."""
    monkeypatch.setattr(_xla, "is_usable", lambda: False)
    with enable_x64(True):
        case = draw(shape, kept, "c", dtype, options, seed=len(shape))
        tolerance, truth, arguments = TOLERANCES[dtype], _reference(case), _arguments(case)
        y_of = jax.jit(lambda x: bn.batch_norm_forward(x, **arguments)[0])
        assert_close(np.asarray(y_of(_jax(case.x))), truth.y, truth.y_scale, tolerance, 16)
        dx_of = jax.jit(lambda x, dy: bn.batch_norm_backward(dy, bn.batch_norm_forward(x, **arguments)[1]))
        found = dx_of(_jax(case.x), _jax(case.dy))
        assert_close(np.asarray(found.x), truth.dx, truth.dx_scale, tolerance, 32)


# -- Derivatives -------------------------------------------------------------------------------------------------------


def _formula(x: Array, weight: Array, bias: Array, eps: float = 1e-5) -> Array:
    """Batch normalization of axis 1, as people write it."""
    axes = tuple(i for i in range(x.ndim) if i != 1)
    along = [size if i == 1 else 1 for i, size in enumerate(x.shape)]
    mean, var = x.mean(axes, keepdims=True), x.var(axes, keepdims=True)
    return (x - mean) / jnp.sqrt(var + eps) * weight.reshape(along) + bias.reshape(along)


def _draw(*shapes: tuple[int, ...], seed: int = 0, dtype: Any = np.float64) -> list[Array]:
    rng = np.random.default_rng(seed)
    return [jnp.array(rng.normal(0.3, 1, shape).astype(dtype), copy=True) for shape in shapes]


CALLS = [
    {},
    {"activation": "relu"},
    {"residual": True},
    {"activation": "relu", "residual": True},
    {"where": "mask"},
    {"where": "weights", "activation": "relu", "residual": True},
    {"evaluate": True},
    {"evaluate": True, "activation": "relu", "residual": True},
]


def _function(options: dict[str, Any]) -> tuple[Callable[..., Array], list[Array]]:
    """A call as a function of everything that it has derivatives by, and arguments for it."""
    x, weight, bias, residual, mean, draws = _draw((5, 3, 2), (3,), (3,), (5, 3, 2), (3,), (5, 1, 2))
    where = {"mask": draws > 0, "weights": abs(draws) * (draws > -0.5), None: None}[options.get("where")]
    arguments = [x, weight, bias]
    if "residual" in options:
        arguments.append(residual)
    if "evaluate" in options:
        arguments += [mean, 2 + mean**2]

    def call(*moving: Array) -> Array:
        x, weight, bias, *more = map(jnp.asarray, moving)  # `check_grads` gives NumPy arrays
        given: dict[str, Any] = {"activation": options.get("activation"), "where": where}
        if "residual" in options:
            given["residual"] = more.pop(0)
        if "evaluate" in options:
            given |= {"training": False, "stats": bn.Moments.of(4, *more)}
        return jnp.sin(bn.batch_norm(jnp.cos(x), weight, bias, **given))

    return call, arguments


@pytest.mark.parametrize("options", CALLS, ids=str)
def test_derivatives(options: dict[str, Any]) -> None:
    """First and second, in both modes and all mixtures, against finite differences."""
    with enable_x64(True):
        call, arguments = _function(options)
        check_grads(jax.jit(call), arguments, order=2, modes=["fwd", "rev"], rtol=1e-4)


def test_derivatives_without_jit() -> None:
    with enable_x64(True):
        call, arguments = _function({"residual": True})
        check_grads(call, arguments, order=1, modes=["fwd", "rev"], rtol=1e-4)


@pytest.mark.parametrize("options", CALLS[::2], ids=str)
def test_forward_and_reverse_mode_agree(options: dict[str, Any]) -> None:
    with enable_x64(True):
        call, arguments = _function(options)
        every = tuple(range(len(arguments)))
        for forward, reverse in zip(
            jax.jit(jax.jacfwd(call, every))(*arguments), jax.jit(jax.jacrev(call, every))(*arguments), strict=True
        ):
            np.testing.assert_allclose(forward, reverse, atol=1e-11)
        total = lambda *arguments: (call(*arguments) ** 3).sum()  # noqa: E731
        hessians = [outer(inner(total)) for outer in (jax.jacfwd, jax.jacrev) for inner in (jax.jacfwd, jax.jacrev)]
        first, *others = [jax.jit(hessian)(*arguments) for hessian in hessians]
        assert abs(first).max() > 1e-3
        for other in others:
            np.testing.assert_allclose(other, first, atol=1e-10)


def test_second_derivatives_by_weights() -> None:
    with enable_x64(True):
        arguments = _draw((6, 3), (3,), (3,))

        def total(call: Callable[..., Array], x: Array, weight: Array, bias: Array) -> Array:
            return (call(x, weight, bias) ** 3).sum()

        ours, theirs = (
            jax.jit(jax.hessian(partial(total, call), (0, 1, 2)))(*arguments) for call in (bn.batch_norm, _formula)
        )
        for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-10)


def test_gradient_by_hand_is_differentiable() -> None:
    with enable_x64(True):
        x, weight, bias, dy = _draw((6, 3), (3,), (3,), (6, 3))

        def by_hand(x: Array, weight: Array, bias: Array, dy: Array) -> tuple[Array, ...]:
            return tuple(bn.batch_norm_backward(dy, bn.batch_norm_forward(x, weight, bias)[1]))

        def by_jax(x: Array, weight: Array, bias: Array, dy: Array) -> tuple[Array, ...]:
            return jax.vjp(_formula, x, weight, bias)[1](dy)

        for a, b in zip(by_hand(x, weight, bias, dy), by_jax(x, weight, bias, dy), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-12)
        every = (0, 1, 2, 3)
        ours, theirs = (jax.jit(jax.jacrev(call, every))(x, weight, bias, dy) for call in (by_hand, by_jax))
        for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-10)


def test_moments_are_differentiable(x64: bool) -> None:
    (x,) = _draw((7, 3), dtype=np.float64 if x64 else np.float32)

    def total(x: Array) -> Array:
        m = bn.moments(x)
        return (m.mean**2 + m.var(1)).sum()

    expected = jax.grad(lambda x: (x.mean(0) ** 2 + x.var(0, ddof=1)).sum())(x)
    np.testing.assert_allclose(jax.grad(total)(x), expected, rtol=1e-5)
    np.testing.assert_allclose(jax.jit(jax.grad(total))(x), expected, rtol=1e-5)
    m = bn.moments(x)
    gradient = jax.grad(lambda m: bn.batch_norm(x, stats=m, training=False).sum())(m)
    assert abs(gradient.mean).min() > 0
    assert abs(gradient.count).max() > 0


def test_where_has_no_gradient() -> None:
    x, w = _draw((6, 3), (6, 1), dtype=np.float32)
    with pytest.raises(TypeError, match="where has no gradient"):
        jax.grad(lambda w: bn.batch_norm(x, where=w).sum())(abs(w))
    with pytest.raises(TypeError, match="where has no gradient"):
        jax.grad(lambda w: bn.moments(x, where=w).mean.sum())(abs(w))
    stopped = jax.grad(lambda w: bn.batch_norm(x, where=jax.lax.stop_gradient(w)).sum())(abs(w))
    assert (stopped == 0).all()


def test_derivatives_beside_nan_that_does_not_count() -> None:
    """Elements of weight 0 may be NaN: no derivative of the others sees them."""
    x, dy = _draw((6, 3), (6, 3), dtype=np.float32)
    mask = jnp.arange(6)[:, None] < 4
    holed = jnp.where(mask, x, jnp.nan)

    def loss(x: Array) -> Array:
        return jnp.where(mask, bn.batch_norm(x, where=mask), 0).ravel() @ dy.ravel()

    np.testing.assert_allclose(
        jax.grad(loss)(holed)[:4], jax.grad(lambda x: loss(jnp.pad(x, ((0, 2), (0, 0)))))(x[:4]), rtol=1e-5
    )
    np.testing.assert_allclose(jax.jvp(loss, (holed,), (dy,))[1], jax.jvp(loss, (x,), (dy,))[1], rtol=1e-5)
    hessian = jax.jit(jax.hessian(loss))
    np.testing.assert_allclose(hessian(holed), hessian(x), atol=1e-5)


# -- vmap --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", CALLS[1::2], ids=str)
@pytest.mark.parametrize("axes", ["all", "x", "weight"])
def test_vmap(options: dict[str, Any], axes: str) -> None:
    """Calls and their gradients, mapped over some arguments, against a loop."""
    with enable_x64(True):
        call, arguments = _function(options)
        names = ["x", "weight", "bias", *(["residual"] if "residual" in options else [])]
        names += [f"stats{i}" for i in range(len(arguments) - len(names))]
        mapped = [0 if axes in ("all", name) else None for name in names]
        stacked = [
            jnp.stack([each, each + 0.1, 2 * each]) if axis == 0 else each
            for each, axis in zip(arguments, mapped, strict=True)
        ]

        def grads(*arguments: Array) -> Any:
            return jax.value_and_grad(lambda *a: (call(*a) ** 3).sum(), tuple(range(len(arguments))))(*arguments)

        for function in (call, jax.jit(grads), lambda *a: jax.jvp(call, a, a)):
            loop = [
                function(*(each[i] if axis == 0 else each for each, axis in zip(stacked, mapped, strict=True)))
                for i in range(3)
            ]
            found = jax.vmap(function, mapped)(*stacked)
            for a, *bs in zip(jax.tree.leaves(found), *map(jax.tree.leaves, loop), strict=True):
                np.testing.assert_allclose(a, jnp.stack(bs), atol=1e-11)


def test_vmap_over_other_axes_twice_and_over_masks() -> None:
    x, draws = _draw((4, 3, 2, 5), (3, 4), dtype=np.float32)
    mask = draws > -0.5
    mapped = jax.vmap(lambda x, mask: bn.batch_norm(x, where=mask[:, None]), (1, 0), 2)(x[..., 0], mask)
    for i in range(3):
        np.testing.assert_allclose(mapped[:, :, i], bn.batch_norm(x[:, i, :, 0], where=mask[i][:, None]), rtol=1e-6)
    moments = jax.vmap(jax.vmap(bn.moments, 3), 1)(jnp.moveaxis(x, 2, 0)[:, :, None])
    assert moments.mean.shape == moments.m2.shape == moments.count.shape
    twice = jax.vmap(jax.vmap(bn.batch_norm, 2, 2), 1, 1)(x)
    for i in range(3):
        for j in range(2):
            np.testing.assert_allclose(twice[:, i, j], bn.batch_norm(x[:, i, j]), rtol=1e-6)
    assert jax.vmap(jax.grad(lambda x: bn.batch_norm(x).sum()))(jnp.ones((0, 4, 3))).shape == (0, 4, 3)
    where_alone = jax.vmap(lambda mask: bn.batch_norm(x[:, 0, :, 0], where=mask[:, None]))(mask)
    np.testing.assert_allclose(where_alone[1], bn.batch_norm(x[:, 0, :, 0], where=mask[1][:, None]), rtol=1e-6)


# -- Precision and traps -----------------------------------------------------------------------------------------------


def test_far_from_zero_without_float64(x64: bool) -> None:
    """Mean 10⁶, deviation 1: nothing between forward and backward is rounded to float32, even where that is all."""
    rng = np.random.default_rng(3)
    x = rng.normal(1e6, 1, (64, 5)).astype(np.float32)
    dy, weight, bias = (rng.normal(size=shape).astype(np.float32) for shape in ((64, 5), (5,), (5,)))
    truth, tolerance = reference(x, dy, (1,), weight=weight, bias=bias), TOLERANCES["float32"]
    y, pull = jax.vjp(jax.jit(bn.batch_norm), *map(_jax, (x, weight, bias)))
    dx, dweight, _ = pull(_jax(dy))
    assert_close(np.asarray(y), truth.y, truth.y_scale, tolerance, tolerance.y)
    assert_close(np.asarray(dx), truth.dx, truth.dx_scale, tolerance, tolerance.dx)
    np.testing.assert_allclose(dweight, truth.dweight, rtol=1e-5)
    y, saved = bn.batch_norm_forward(_jax(x), _jax(weight), _jax(bias))
    assert_close(
        np.asarray(bn.batch_norm_backward(_jax(dy), saved).x), truth.dx, truth.dx_scale, tolerance, tolerance.dx
    )
    for m in (saved.moments, bn.moments(_jax(x)), jax.jit(bn.moments)(_jax(x))):
        assert m.mean.dtype == m.m2.dtype == (jnp.float64 if x64 else jnp.float32)
        np.testing.assert_allclose(m.mean, truth.mean[0], rtol=1e-7)
        np.testing.assert_allclose(m.var(), truth.var[0], rtol=1e-6)
    stats = bn.RunningStats(5, update_rate=None)  # of NumPy: exact, and evaluated with as it is
    bn.batch_norm(_jax(x), stats=stats)
    np.testing.assert_allclose(stats.mean, truth.mean[0], rtol=1e-14)
    np.testing.assert_allclose(stats.var, truth.var[0] * 64 / 63, rtol=1e-10)
    known = reference(x, dy, (1,), statistics=(stats.mean, stats.var))
    for given in (stats, bn.Moments(3, stats.mean, 3 * stats.var)):
        y = jax.jit(lambda x, given=given: bn.batch_norm(x, stats=given, training=False))(_jax(x))
        assert_close(np.asarray(y), known.y, known.y_scale, tolerance, tolerance.y)


@pytest.mark.parametrize("value", [0.0, 1.0, -1.5, 1e6 + 1 / 3, 1e-30, -1e30, 3e-39, 1e39, np.inf, -np.inf, np.nan])
def test_bits_of_float64(value: float, x64: bool) -> None:
    bits = jnp.array(np.array([value])[:, None].view(np.uint32), copy=True)
    with np.errstate(over="ignore"):
        expected = value if x64 else 0.0 if abs(value) < 1e-38 else np.float32(value)  # next to 0 is 0
    np.testing.assert_array_equal(backend._decoded(bits), [expected])
    if x64 or abs(value) < 1e38 or not np.isfinite(value):
        again = backend._encoded(backend._decoded(bits))
        np.testing.assert_array_equal(backend._decoded(again), [expected])
        np.testing.assert_array_equal(backend._of_bits(again), [expected])


def test_results_never_alias_what_may_change() -> None:
    buffer = np.zeros(64 * 16 + 64, np.float32)
    start = -buffer.ctypes.data % 64 // 4  # aligned, so that JAX takes the memory itself
    source = buffer[start : start + 64 * 16].reshape(64, 16)
    source[:] = np.random.default_rng(0).normal(size=source.shape)
    x = jnp.asarray(source)
    vector = buffer[start : start + 16]
    results = {
        "y": bn.batch_norm(x, jnp.asarray(vector), jnp.asarray(vector)),
        "moments": bn.moments(x).mean,
        "state": bn.RunningStats(16, like=x).to(x).mean,
        "empty": bn.batch_norm(x[:0]),
    }
    stats = bn.RunningStats(16)
    bn.batch_norm(x, stats=stats)
    moved = stats.to(x)
    results |= {"moved": moved.mean, "converted": bn.Moments(3, jnp.asarray(vector), abs(jnp.asarray(vector))).mean}
    state = np.array(stats.mean)
    before = {name: np.array(result) for name, result in results.items()}
    jax.block_until_ready(results)
    source[:] = 7
    for name, result in results.items():
        np.testing.assert_array_equal(np.asarray(result), before[name], err_msg=name)
    np.testing.assert_array_equal(stats.mean, state)


def test_donated_arrays() -> None:
    (x,) = _draw((64, 16), dtype=np.float32)
    expected = np.array(bn.batch_norm(x))
    np.testing.assert_array_equal(jax.jit(bn.batch_norm, donate_argnums=0)(jnp.array(x, copy=True)), expected)


def test_refusals() -> None:
    x = jnp.ones((4, 3))
    for keywords, message in [
        ({"out": x}, "out is an array of JAX, which cannot be written to"),
        ({"weight": np.ones(3)}, "weight is an array of numpy and x one of jax"),
        ({"where": np.ones((4, 1), bool)}, "where is an array of numpy"),
        ({"where": jnp.ones((4, 1), int)}, "where has dtype int32"),
        ({"stats": bn.Moments(1, jnp.zeros(3), jnp.ones(3))}, "stats is a Moments"),
        ({"training": False}, "stats is None"),
        ({"residual": x.astype(jnp.bfloat16)}, "residual has dtype bfloat16"),
    ]:
        with pytest.raises(TypeError, match=message):
            bn.batch_norm(x, **keywords)
        with pytest.raises(TypeError, match=message):
            jax.jit(lambda x, keywords=keywords: bn.batch_norm(x, **keywords))(x)
    for wrong in (jnp.ones((4, 3), int), jnp.ones((4, 3), jnp.float8_e5m2), jnp.ones((4, 3), jnp.complex64)):
        with pytest.raises(TypeError, match="x has dtype"):
            bn.batch_norm(wrong)
    with pytest.raises(TypeError, match="dy is an array of jax"):
        bn.batch_norm_backward(x, bn.batch_norm_forward(np.ones((4, 3)))[1])
    with pytest.raises(ValueError, match="where holds a weight"):
        bn.batch_norm(x, where=-x)
    with pytest.raises(ValueError, match="whose sum is beyond"), enable_x64(True):
        bn.batch_norm(jnp.ones((4, 3)), where=jnp.full((4, 1), 1e308))
    with pytest.raises(ValueError, match="whose sum is beyond"):
        bn.moments(x, where=jnp.full((4, 3), 2e38))


def test_without_jit_at_all() -> None:
    x = jnp.asarray(np.random.default_rng(3).normal(size=(6, 3)), jnp.float32)
    compiled = jax.grad(lambda x: (bn.batch_norm(x) ** 3).sum())
    expected = bn.batch_norm(x), compiled(x), bn.moments(x).m2
    with jax.disable_jit():
        for found, wanted in zip((bn.batch_norm(x), compiled(x), bn.moments(x).m2), expected, strict=True):
            np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mask", ["none", "bool", "weights"])
def test_strict_promotion(mask: str) -> None:
    """Where JAX is told to convert no dtype and no rank unasked."""
    x, weight = jnp.asarray(np.random.default_rng(4).normal(size=(5, 2)), jnp.float32), jnp.ones(2)
    where = {"none": None, "bool": x > 0, "weights": (x > 0) * x}[mask]

    def loss(x: Any, weight: Any) -> Any:
        return (bn.batch_norm(x, weight, where=where, residual=x, activation="relu") ** 2).sum()

    expected = jax.hessian(loss)(x, weight)
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        np.testing.assert_array_equal(jax.hessian(loss)(x, weight), expected)
        jax.jvp(loss, (x, weight), (x, weight))
        jax.jit(lambda x, stats: stats.updated(bn.moments(x, where=where)))(x, bn.RunningStats(2, like=x))


def test_a_failure_in_a_call_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    x = jnp.ones((4, 3)) * 17
    for error in (ValueError("so wrong"), KeyboardInterrupt()):

        def fail(plan: Any, addresses: list[int], error: BaseException = error) -> None:
            raise error

        with monkeypatch.context() as patched:
            patched.setattr(_xla._Plan, "_forward", fail)
            patched.setattr(_xla, "_plans", {})
            with pytest.raises(jax.errors.JaxRuntimeError, match=f"bnarray: {type(error).__name__}"):
                jax.block_until_ready(jax.jit(lambda x: bn.batch_norm(x, eps=0.25))(x))
    assert (jax.jit(lambda x: bn.batch_norm(x, eps=0.25))(x) == 0).all()


def test_formula_stands_in_where_kernels_cannot_be_called(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> None:
        raise RuntimeError("an interface from the future")

    monkeypatch.setattr(_xla, "_register_target", refuse)
    _xla._try_out.cache_clear()
    (x,) = _draw((5, 3), dtype=np.float32)
    try:
        with pytest.warns(RuntimeWarning, match="the formula in jax.numpy takes their place: an interface from the"):
            y, saved = jax.jit(lambda x: (lambda y, saved: (y, saved.moments))(*bn.batch_norm_forward(x, eps=0.125)))(x)
    finally:
        _xla._try_out.cache_clear()
    np.testing.assert_allclose(y, bn.batch_norm(np.asarray(x), eps=0.125), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(saved.m2, bn.moments(np.asarray(x)).m2, rtol=1e-5)


@pytest.mark.parametrize("shape", [(0, 3), (4, 0), (0, 0), (3, 2, 0)])
def test_empty(shape: tuple[int, ...], x64: bool) -> None:
    x, weight = jnp.ones(shape), jnp.ones(shape[1])
    stats = bn.RunningStats(shape[1], like=x)
    y, saved = bn.batch_norm_forward(x, weight, stats=stats, where=jnp.ones(shape, bool))
    assert y.shape == shape
    assert stats.num_updates == stats.num_skipped == saved.moments.count == 0
    gradients = bn.batch_norm_backward(y, saved)
    assert gradients.x.shape == shape
    assert (gradients.weight == 0).all()
    loss = jax.jit(jax.grad(lambda x, weight: bn.batch_norm(x, weight).sum(), (0, 1)))
    assert (loss(x, weight)[1] == 0).all()
    assert bn.batch_norm(x, stats=stats, training=False).shape == shape
    updated = jax.jit(lambda stats, x: stats.updated(bn.moments(x)))(stats, x)
    assert updated.num_updates == updated.num_skipped == 0


@pytest.mark.parametrize("shape", [(16, 8, 64, 64), (64, 100)], ids=str)
def test_threads(shape: tuple[int, ...]) -> None:
    """Calls from several threads at once, large enough to share their work, and so small that they need no Python."""
    (x,) = _draw(shape, dtype=np.float32)
    function = jax.jit(jax.value_and_grad(lambda x: (bn.batch_norm(x) ** 3).sum()))
    expected = jax.tree.map(np.array, function(x))
    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(lambda _: jax.block_until_ready(function(x)), range(60)):
            np.testing.assert_array_equal(found[0], expected[0])
            np.testing.assert_array_equal(found[1], expected[1])


def test_inside_a_loop_and_a_branch() -> None:
    (x,) = _draw((6, 3), dtype=np.float32)

    def step(x: Array, _: None) -> tuple[Array, Array]:
        y = jax.lax.cond(x.sum() > 0, bn.batch_norm, lambda x: bn.batch_norm(-x), x) + 0.1
        return y, y.sum()

    def loss(x: Array) -> Array:
        return jax.lax.scan(jax.checkpoint(step), x, length=5)[1].sum() + (bn.batch_norm(x) ** 3).sum()

    np.testing.assert_allclose(jax.jit(loss)(x), loss(x), rtol=1e-5)
    np.testing.assert_allclose(jax.jit(jax.grad(loss))(x), jax.grad(loss)(x), rtol=1e-4, atol=1e-5)


# -- State -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("update_rate", [0.1, None])
@pytest.mark.parametrize("of_numpy", [False, True])
def test_state_in_compiled_code(update_rate: float | None, of_numpy: bool) -> None:
    """The same batches, one of them not finite and one too small, in a compiled step, in a scan and one by one."""
    rng = np.random.default_rng(0)
    batches = rng.normal(3, 2, (6, 8, 3)).astype(np.float32)
    batches[2, 1, 1] = np.nan
    masks = np.ones((6, 8, 1), bool)
    masks[4, 1:] = False  # one value a feature, which an exponential average with correction 1 refuses
    masks[5] = False  # nothing counts
    stats = bn.RunningStats(3, update_rate=update_rate, like=None if of_numpy else jnp.ones(1))
    by_hand = bn.RunningStats(3, update_rate=update_rate)
    for x, mask in zip(batches, masks, strict=True):
        with contextlib.suppress(ValueError), warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            bn.batch_norm(jnp.asarray(x), where=jnp.asarray(mask), stats=by_hand)

    traces = []

    @jax.jit
    def step(stats: bn.RunningStats, x: Array, mask: Array) -> bn.RunningStats:
        traces.append(x)
        return stats.updated(bn.moments(x, where=mask))

    compiled = stats
    for x, mask in zip(batches, masks, strict=True):
        compiled = step(compiled, x, mask)
    assert len(traces) == 1
    scanned, _ = jax.lax.scan(lambda s, xm: (s.updated(bn.moments(xm[0], where=xm[1])), None), stats, (batches, masks))
    for found in (compiled, scanned):
        assert found.num_updates == by_hand.num_updates
        assert found.num_skipped == (2 if update_rate else 1)
        np.testing.assert_allclose(found.count, np.broadcast_to(by_hand.count, 3))
        np.testing.assert_allclose(found.mean, by_hand.mean, rtol=1e-6)
        np.testing.assert_allclose(found.var, by_hand.var, rtol=1e-5)
    assert stats.num_updates == 0
    x = jnp.asarray(batches[0])
    evaluated = jax.jit(lambda stats, x: bn.batch_norm(x, stats=stats, training=False))(compiled, x)
    np.testing.assert_allclose(evaluated, bn.batch_norm(x, stats=by_hand, training=False), atol=1e-5)


def test_state_that_a_program_would_have_to_change() -> None:
    x, stats = jnp.ones((4, 3)), bn.RunningStats(3)
    for transform in (jax.jit, jax.vmap, lambda f: jax.grad(lambda x: f(x).sum())):
        with pytest.raises(TypeError, match=r"return stats\.updated\(m\)"):
            transform(lambda x: bn.batch_norm(x, axis=-1, stats=stats))(x)
    with pytest.raises(TypeError, match=r"stats\.updated"):
        jax.jit(lambda x: stats.update(bn.moments(x)))(x)
    assert stats.num_updates == 0
    with stats.frozen():
        jax.jit(lambda x: bn.batch_norm(x, stats=stats))(x)
    bn.batch_norm(x, stats=stats)
    assert stats.num_updates == 1
    assert stats.count == 4


def test_trees() -> None:
    (x,) = _draw((6, 3), dtype=np.float32)
    for each in (bn.moments(x), bn.RunningStats(3, update_rate=None, nonfinite="raise"), bn.moments(np.ones((4, 3)))):
        leaves, form = jax.tree.flatten(each)
        again = jax.tree.unflatten(form, leaves)
        assert type(again) is type(each)
        assert jax.tree.structure(again) == form
        np.testing.assert_array_equal(again.mean, each.mean)
        np.testing.assert_array_equal(np.broadcast_to(again.count, 3), np.broadcast_to(each.count, 3))
        axes = jax.tree.map(lambda _: 0, each)
        stacked = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), each)
        assert jax.vmap(lambda each: each.mean.sum(), in_axes=(axes,))(stacked).shape == (2,)
    assert again.mean.dtype == np.float64
    assert bn.RunningStats(3, nonfinite="raise").updated(bn.moments(x)).nonfinite == "raise"
    assert jax.tree.structure(bn.RunningStats(3)) != jax.tree.structure(bn.RunningStats(3, correction=0))
    merged = jax.jit(lambda a, b: a + b)(bn.moments(x), bn.moments(2 * x))
    expected = bn.moments(jnp.concatenate([x, 2 * x]))
    np.testing.assert_allclose(merged.m2, expected.m2, rtol=1e-5)
    nothing = bn.Moments(jnp.zeros(3), jnp.zeros(3), jnp.zeros(3))
    assert ((nothing + nothing).mean == 0).all()


def test_layer() -> None:
    x, dy = _draw((6, 3), (6, 3), dtype=np.float32)
    layer, ours = bn.BatchNorm(3, like=x, activation="relu"), bn.BatchNorm(3, activation="relu")
    for _ in range(2):
        np.testing.assert_allclose(layer(x), ours(np.asarray(x)), rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(layer.backward(dy), ours.backward(np.asarray(dy)), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(layer.grad_weight, ours.grad_weight, rtol=1e-5)
    np.testing.assert_allclose(layer.stats.var, ours.stats.var, rtol=1e-6)
    layer.zero_grad()
    assert (layer.grad_weight == 0).all()
    assert layer.stats.mean.dtype == jnp.float32
    np.testing.assert_allclose(jax.jit(layer.eval())(x), ours.eval()(np.asarray(x)), rtol=1e-5, atol=1e-6)
    moved = bn.BatchNorm(3, activation="relu").to(x)
    assert isinstance(moved.weight, jax.Array)
    moved.load_state_dict(layer.state_dict())
    np.testing.assert_array_equal(moved(x), layer.train()(x))


def test_training() -> None:
    """A small network with running statistics, trained in a compiled step: the losses are those of the formula."""
    x, target, w1, w2 = _draw((32, 8), (32, 1), (8, 16), (16, 1), dtype=np.float32)
    parameters = {"w1": w1 / 3, "weight": jnp.ones(16), "bias": jnp.zeros(16), "w2": w2 / 4}

    def ours(h: Array, p: dict[str, Array], stats: bn.RunningStats) -> tuple[Array, bn.RunningStats]:
        return bn.batch_norm(h, p["weight"], p["bias"], activation="relu"), stats.updated(bn.moments(h))

    def theirs(h: Array, p: dict[str, Array], stats: dict[str, Array]) -> tuple[Array, dict[str, Array]]:
        new = {"mean": h.mean(0), "var": h.var(0, ddof=1)}
        return jax.nn.relu(_formula(h, p["weight"], p["bias"])), jax.tree.map(
            lambda a, b: 0.9 * a + 0.1 * b, stats, new
        )

    def train(norm: Callable[..., Any], stats: Any) -> tuple[list[float], Any]:
        def loss(p: dict[str, Array], stats: Any) -> tuple[Array, Any]:
            h, new = norm(x @ p["w1"], p, stats)
            return ((h @ p["w2"] - target) ** 2).mean(), new

        @jax.jit
        def step(p: dict[str, Array], stats: Any) -> tuple[dict[str, Array], Any, Array]:
            (value, new), gradients = jax.value_and_grad(loss, has_aux=True)(p, stats)
            return jax.tree.map(lambda a, g: a - 0.05 * g, p, gradients), jax.lax.stop_gradient(new), value

        p, losses = parameters, []
        for _ in range(30):
            p, stats, value = step(p, stats)
            losses.append(float(value))
        return losses, stats

    losses, stats = train(ours, bn.RunningStats(16))
    expected, running = train(theirs, {"mean": jnp.zeros(16), "var": jnp.ones(16)})
    assert losses[-1] < 0.5 * losses[0]
    np.testing.assert_allclose(losses, expected, rtol=1e-3)
    np.testing.assert_allclose(stats.mean, running["mean"], rtol=1e-2, atol=1e-4)
    np.testing.assert_allclose(stats.var, running["var"], rtol=1e-2)
    assert stats.num_updates == 30


# -- Processes ---------------------------------------------------------------------------------------------------------


def test_in_a_process_of_its_own(run_python: Callable[..., str]) -> None:
    """With x64 from the environment, under a transformation from the first call on, and left without waiting."""
    code = (
        "import jax, jax.numpy as jnp, numpy as np, bnarray as bn\n"
        "stats = bn.RunningStats(3)\n"
        "stats = jax.jit(lambda s: s)(stats)\n"
        "assert type(stats) is bn.RunningStats\n"
        "x = jnp.arange(12.0).reshape(4, 3)\n"
        "assert x.dtype == jnp.float64\n"
        "dx = jax.jit(jax.grad(lambda x: (bn.batch_norm(x) ** 3)[0].sum()))(x)\n"
        "assert dx.dtype == bn.moments(x).mean.dtype == jnp.float64\n"
        "assert type(jax.jit(bn.moments)(x)) is bn.Moments\n"
        "big = jnp.ones((32, 64, 56, 56), jnp.float32)\n"
        "for _ in range(3): big = jax.jit(bn.batch_norm)(big)\n"
        "print('left')"
    )
    assert run_python(code, JAX_ENABLE_X64="1") == "left\n"


def test_programs_of_another_process(tmp_path: Path, run_python: Callable[..., str]) -> None:
    """As docs/libraries.md has it: one call, then what was compiled or exported elsewhere has kernels to call."""
    x = jnp.arange(12.0, dtype=jnp.float32).reshape(4, 3) ** 2
    function = jax.jit(jax.grad(lambda x: (bn.batch_norm(x) ** 3)[0].sum()))
    serialized = serialize_executable.serialize(function.lower(x).compile())
    (tmp_path / "compiled").write_bytes(pickle.dumps(serialized))
    allowed = [export.DisabledSafetyCheck.custom_call("bnarray")]
    (tmp_path / "exported").write_bytes(export.export(function, disabled_checks=allowed)(x).serialize())
    code = (
        "import os, pickle, jax, jax.export, jax.numpy as jnp, numpy as np, bnarray as bn\n"
        "from jax.experimental import serialize_executable\n"
        "bn.moments(jnp.ones((2, 1)))\n"
        "read = lambda name: open(os.path.join(os.environ['FOLDER'], name), 'rb').read()\n"
        "compiled = serialize_executable.deserialize_and_load(*pickle.loads(read('compiled')))\n"
        "exported = jax.export.deserialize(bytearray(read('exported'))).call\n"
        "x = jnp.arange(12.0, dtype=jnp.float32).reshape(4, 3) ** 2\n"
        "print(*(np.asarray(call(x)).tobytes().hex() for call in (compiled, exported)))"
    )
    expected = np.asarray(function(x)).tobytes().hex()
    assert run_python(code, FOLDER=str(tmp_path)).split() == [expected, expected]


def test_a_fork_is_left_in_peace(run_python: Callable[..., str]) -> None:
    """A forked child may use NumPy arrays and exit, whatever the parent did with JAX."""
    code = (
        "import os, warnings, jax, jax.numpy as jnp, numpy as np, bnarray as bn\n"
        "warnings.simplefilter('ignore')\n"  # JAX warns of every fork
        "x = np.random.default_rng(0).normal(size=(16, 8, 64, 64)).astype(np.float32)\n"
        "y = np.asarray(jax.jit(bn.batch_norm)(jnp.asarray(x)))\n"
        "child = os.fork()\n"
        "if child == 0: os._exit(0 if (bn.batch_norm(x) == y).all() else 1)\n"
        "assert os.waitpid(child, 0)[1] == 0\n"
        "print('peace')"
    )
    assert run_python(code) == "peace\n"


def test_sharded_over_devices(run_python: Callable[..., str]) -> None:
    """Over two devices the batch is that of both, whatever XLA copies for it."""
    code = (
        "import jax, jax.numpy as jnp, numpy as np, bnarray as bn\n"
        "from jax.sharding import Mesh, NamedSharding, PartitionSpec\n"
        "assert len(jax.devices()) == 2\n"
        "x = np.random.default_rng(0).normal(size=(16, 8)).astype(np.float32)\n"
        "mesh = Mesh(np.array(jax.devices()), ('batch',))\n"
        "sharded = jax.device_put(x, NamedSharding(mesh, PartitionSpec('batch')))\n"
        "loss = jax.jit(jax.value_and_grad(lambda x: (bn.batch_norm(x) ** 3).sum()))\n"
        "for a, b in zip(loss(sharded), loss(jnp.asarray(x))): np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)\n"
        "np.testing.assert_allclose(bn.batch_norm(sharded), bn.batch_norm(x), rtol=1e-6)\n"
        "spec = PartitionSpec('batch')\n"
        "def mapped(**how): return jax.shard_map(bn.batch_norm, mesh=mesh, in_specs=spec, out_specs=spec, **how)\n"
        "halves = np.concatenate([bn.batch_norm(x[:8]), bn.batch_norm(x[8:])])\n"
        "np.testing.assert_allclose(mapped(check_vma=False)(x), halves, rtol=1e-6)\n"
        "dx = jax.jit(jax.grad(lambda x: (mapped(check_vma=False)(x) ** 3).sum()))(x)\n"
        "half = jax.grad(lambda x: (bn.batch_norm(x) ** 3).sum())(jnp.asarray(x[8:]))\n"
        "np.testing.assert_allclose(dx[8:], half, rtol=1e-4, atol=1e-5)\n"
        "try: mapped()(x)\n"
        "except NotImplementedError as error: assert 'check_vma=False' in str(error)\n"
        "else: raise AssertionError('not refused')\n"
        "print('both')"
    )
    assert run_python(code, XLA_FLAGS="--xla_force_host_platform_device_count=2") == "both\n"


@pytest.mark.parametrize("dtype", list(TOLERANCES))
def test_without_python_the_bits_are_the_same(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A small call is made by Python once, then by compiled code, unless that refuses."""
    with enable_x64(True):
        made = []
        monkeypatch.setattr(_xla._Plan, "memory", lambda *a, real=_xla._Plan.memory: made.append(a) or real(*a))
        x, dy, weight, bias = _draw((64, 10), (64, 10), (10,), (10,))
        function = jax.jit(
            lambda x, dy, weight, bias: jax.vjp(partial(bn.batch_norm, eps=0.75, activation="relu"), x, weight, bias)[
                1
            ](dy)
        )
        arguments = x.astype(dtype), dy.astype(dtype), weight.astype(jnp.float16), bias
        by_python = function(*arguments)
        jax.block_until_ready(by_python)
        assert made
        made.clear()
        by_itself = function(*arguments)
        jax.block_until_ready(by_itself)
        assert not made
        for a, b in zip(by_itself, by_python, strict=True):
            np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
        if dtype == "float32":
            large = x.astype(dtype) * 1e34, *arguments[1:]
            dx = function(*large)[0]
            jax.block_until_ready(dx)
            assert made
            assert np.isfinite(dx).all()
