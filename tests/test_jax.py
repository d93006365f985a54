"""JAX arrays: results, transformations, and the traps of a library that aliases, truncates and traces."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import pytest

import bnarray as bn
from bnarray.testing import TOLERANCES, Reference, Tolerance, assert_close, reference
from tests.cases import OPTIONS, SHAPES, Drawn, Options, draw

jax = pytest.importorskip("jax", reason="that JAX arrays are served is not verified without JAX")
import jax.numpy as jnp  # noqa: E402
from jax.test_util import check_grads  # noqa: E402

from bnarray.backends import _xla  # noqa: E402

Array = Any


@pytest.fixture(params=["float32", "float64"])
def x64(request: pytest.FixtureRequest) -> Iterator[bool]:
    """Whether JAX has float64."""
    with jax.enable_x64(request.param == "float64"):
        yield request.param == "float64"


def _table() -> list[Any]:
    """Every shape with every dtype; the options take turns, so that each dtype meets all of them."""
    cases, turn = [], 0
    for shape, kept in SHAPES:
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
    with jax.enable_x64(True):
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


@pytest.mark.parametrize(("shape", "kept", "dtype", "options"), _table()[::3])
def test_formula(
    shape: tuple[int, ...], kept: tuple[int, ...], dtype: str, options: Options, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What stands for the kernels where XLA cannot call them, and what derivatives are taken of."""
    monkeypatch.setattr(_xla, "is_usable", lambda: False)
    with jax.enable_x64(True):
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
@pytest.mark.parametrize("compile_it", [False, True], ids=["eager", "jit"])
def test_derivatives(options: dict[str, Any], compile_it: bool) -> None:
    """First and second, in both modes and all mixtures, against finite differences."""
    with jax.enable_x64(True):
        call, arguments = _function(options)
        check_grads(jax.jit(call) if compile_it else call, arguments, order=2, modes=["fwd", "rev"], rtol=1e-4)


@pytest.mark.parametrize("options", CALLS[::2], ids=str)
def test_forward_and_reverse_mode_agree(options: dict[str, Any]) -> None:
    with jax.enable_x64(True):
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
    with jax.enable_x64(True):
        arguments = _draw((6, 3), (3,), (3,))

        def total(call: Callable[..., Array], x: Array, weight: Array, bias: Array) -> Array:
            return (call(x, weight, bias) ** 3).sum()

        ours, theirs = (
            jax.jit(jax.hessian(partial(total, call), (0, 1, 2)))(*arguments) for call in (bn.batch_norm, _formula)
        )
        for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-10)


def test_gradient_by_hand_is_differentiable() -> None:
    with jax.enable_x64(True):
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


@pytest.mark.parametrize("options", CALLS, ids=str)
@pytest.mark.parametrize("axes", ["all", "x", "weight"])
def test_vmap(options: dict[str, Any], axes: str) -> None:
    """Calls and their gradients, mapped over some arguments, against a loop."""
    with jax.enable_x64(True):
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
    where_alone = jax.vmap(lambda mask: bn.batch_norm(x[:, 0, :, 0], where=mask[:, None]))(mask)
    np.testing.assert_allclose(where_alone[1], bn.batch_norm(x[:, 0, :, 0], where=mask[1][:, None]), rtol=1e-6)
