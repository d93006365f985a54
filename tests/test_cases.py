"""The whole public interface on the table of cases, against the formula in float64 and against the generic backend."""

from typing import Any

import numpy as np
import pytest

import bnarray as bn
from bnarray.backends import generic
from bnarray.testing import TOLERANCES, Reference, assert_close, reference
from tests.cases import Drawn, Options, draw, table

# The Array API has no bfloat16.
IN_THE_STANDARD = [case for case in table()[::5] if case.values[3] != "bfloat16"]


def _reference(case: Drawn) -> Reference:
    return reference(case.x, case.dy, case.kept, relu=case.relu, statistics=case.statistics, **case.call)


def _arguments(case: Drawn) -> dict[str, Any]:
    arguments: dict[str, Any] = dict(case.call, axis=case.kept, activation="relu" if case.relu else None)
    if case.statistics is not None:
        mean, var = case.statistics
        arguments |= {"training": False, "stats": bn.Moments(1, mean, var)}
    return arguments


@pytest.mark.parametrize(("shape", "kept", "layout", "dtype", "options"), table())
def test_forward_and_backward(
    shape: tuple[int, ...], kept: tuple[int, ...], layout: str, dtype: str, options: Options
) -> None:
    case = draw(shape, kept, layout, dtype, options, seed=len(shape) + len(layout))
    tolerance, truth, arguments = TOLERANCES[dtype], _reference(case), _arguments(case)
    inputs = {"x": case.x, "dy": case.dy, **case.call}
    before = {name: np.array(value) for name, value in inputs.items()}

    y, saved = bn.batch_norm_forward(case.x, **arguments)
    assert type(y) is np.ndarray
    assert y.dtype == case.x.dtype
    assert y.strides == np.empty_like(case.x).strides
    assert_close(y, truth.y, truth.y_scale, tolerance, tolerance.y)
    np.testing.assert_array_equal(bn.batch_norm(case.x, **arguments), y)

    gradients = bn.batch_norm_backward(case.dy, saved)
    assert gradients.x.dtype == case.x.dtype
    assert_close(gradients.x, truth.dx, truth.dx_scale, tolerance, tolerance.dx)
    if "weight" in case.call:
        assert gradients.weight.dtype == np.float32
        assert gradients.bias.dtype == np.float64
        assert gradients.weight.shape == gradients.bias.shape == tuple(shape[i] for i in kept)
        room = 1e-12 + tolerance.sums * truth.dweight_scale
        assert (abs(gradients.weight - truth.dweight) <= room + 1e-6 * abs(truth.dweight)).all()
        assert (abs(gradients.bias - truth.dbias) <= 1e-12 + tolerance.sums * truth.dbias_scale).all()
    else:
        assert gradients.weight is None
        assert gradients.bias is None
    if "residual" in case.call:
        np.testing.assert_array_equal(gradients[3].astype(np.float64), truth.dresidual)
    else:
        assert len(gradients) == 3

    for name, value in inputs.items():
        np.testing.assert_array_equal(value, before[name], err_msg=name)


@pytest.mark.parametrize(("shape", "kept", "layout", "dtype", "options"), table()[::2])
def test_moments(shape: tuple[int, ...], kept: tuple[int, ...], layout: str, dtype: str, options: Options) -> None:
    case = draw(shape, kept, layout, dtype, options, seed=len(shape) + len(layout))
    case.statistics = None
    truth, tolerance = _reference(case), TOLERANCES[dtype].moments
    m = bn.moments(case.x, axis=kept, where=case.call.get("where"))
    features = tuple(shape[i] for i in kept)
    mean, var, count = (each.reshape(features) for each in (truth.mean, truth.var, truth.count))
    seen = count > 0
    assert m.mean.shape == m.m2.shape == features
    assert m.mean.dtype == m.m2.dtype == np.float64
    np.testing.assert_allclose(np.broadcast_to(m.count, features), count, rtol=1e-14)
    assert (abs(m.mean - mean)[seen] <= tolerance * (np.sqrt(var) + abs(mean))[seen]).all()
    np.testing.assert_allclose(m.var()[seen], var[seen], rtol=10 * tolerance, atol=1e-24)
    assert (m.mean[~seen] == 0).all()
    assert (m.m2[~seen] == 0).all()


@pytest.mark.parametrize(("shape", "kept", "layout", "dtype", "options"), IN_THE_STANDARD)
def test_generic_agrees(
    shape: tuple[int, ...], kept: tuple[int, ...], layout: str, dtype: str, options: Options
) -> None:
    """The second opinion: the pure Array-API verbs on the same NumPy arrays."""
    case = draw(shape, kept, layout, dtype, options, seed=len(shape) + len(layout))
    y, saved = bn.batch_norm_forward(case.x, **_arguments(case))
    tolerance = TOLERANCES[dtype]
    if case.statistics is None:
        count, _, m2 = generic.moments(case.x, kept, case.call.get("where"))
        np.testing.assert_allclose(saved.transform.count, count, rtol=1e-14)
        np.testing.assert_allclose(saved.transform.m2, m2, rtol=1e-6, atol=1e-24)
    transform = saved.transform._replace(residual=case.call.get("residual"))
    truth = _reference(case)
    theirs = generic.normalize(case.x, transform, None)
    assert_close(y, theirs.astype(np.float64), truth.y_scale, tolerance, tolerance.y)
    sums = generic.grad_sums(case.dy, case.x, transform)
    where, known = case.call.get("where"), saved.moments is not None
    dx, _ = generic.grad_input(case.dy, case.x, transform, where, sums if known else None, None)
    assert_close(
        bn.batch_norm_backward(case.dy, saved).x, dx.astype(np.float64), truth.dx_scale, tolerance, tolerance.dx
    )
