"""Every installed library on a slice of the table of cases, by what its backend declares; and libraries that meet."""

from itertools import permutations, product
from typing import Any

import numpy as np
import pytest
from array_api_compat import is_writeable_array

import bnarray as bn
from bnarray import testing
from bnarray.testing import check_backend, check_case
from tests.cases import DTYPES, OPTIONS, SHAPES, Options, draw
from tests.libraries import INSTALLED, NAMES, library, opened

#: Up to a few thousand elements.
SMALL = [each for each in SHAPES if np.prod(each[0]) < 10_000]


def _declared() -> list[Any]:
    """Every option in every dtype that a library declares, each on two shapes; they take turns, so all have theirs."""
    cases = []
    for name in INSTALLED:
        wanted = product(library(name).capabilities.dtypes, OPTIONS, range(2))
        for turn, (dtype, options, _) in enumerate(wanted):
            shape, kept = SMALL[turn % len(SMALL)]
            label = f"{name}-{'x'.join(map(str, shape))}-keep{''.join(map(str, kept))}-{dtype}-{options.name}"
            cases.append(pytest.param(name, shape, kept, dtype, options, id=label))
    return cases


@pytest.mark.parametrize(("name", "shape", "kept", "dtype", "options"), _declared())
def test_table(name: str, shape: tuple[int, ...], kept: tuple[int, ...], dtype: str, options: Options) -> None:
    case = draw(shape, kept, "c", dtype, options, seed=len(shape))
    with opened(name) as (of,):
        check_case(
            of.make,
            of.back,
            case.x,
            case.dy,
            kept,
            relu=case.relu,
            statistics=case.statistics,
            gradients=of.gradients,
            constant=of.constant,
            **case.call,
        )


@pytest.mark.parametrize("name", NAMES)
def test_declared_dtypes(name: str) -> None:
    """What the table above is made from; a library that is not installed is skipped here, saying so."""
    dtypes = library(name).capabilities.dtypes
    assert {"float32", "float64"} <= set(dtypes) <= set(DTYPES)


@pytest.mark.parametrize("name", NAMES)
def test_layouts(name: str) -> None:
    """Where arrays have strides, results have those of x."""
    x = np.random.default_rng(0).normal(size=(4, 3, 5)).astype(np.float32)
    with opened(name) as (of,):
        if not of.capabilities.layouts:
            assert not hasattr(of.make(x), "strides")
            return
        for order in ((0, 1, 2), (2, 1, 0), (0, 2, 1)):
            strided = np.ascontiguousarray(x.transpose(order)).transpose(np.argsort(order))
            y = of.back(bn.batch_norm(of.make(strided)))
            assert y.strides == strided.strides
            np.testing.assert_allclose(y, bn.batch_norm(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_out(name: str) -> None:
    """Results go into `out` where that is declared; elsewhere it is refused, and nothing has changed."""
    x, dy = np.random.default_rng(0).normal(size=(2, 6, 3)).astype(np.float32)
    with opened(name) as (of,):
        writable, stats = of.writable or of.make, bn.RunningStats(3)
        out = writable(np.full((6, 3), 7, np.float32))
        if not (of.capabilities.out and is_writeable_array(out)):
            with pytest.raises(TypeError, match="out"):
                bn.batch_norm(of.make(x), stats=stats, out=out)
            np.testing.assert_array_equal(of.back(out), 7)
            assert stats.num_updates == 0
            return
        expected, saved = bn.batch_norm_forward(of.make(x))
        slopes = bn.batch_norm_backward(of.make(dy), saved)
        assert bn.batch_norm(of.make(x), out=out) is out
        np.testing.assert_array_equal(of.back(out), of.back(expected))
        for array, result in ((x.copy(), expected), (dy.copy(), slopes.x)):
            mine = writable(array)
            if result is expected:
                assert bn.batch_norm(mine, out=mine) is mine
            else:
                assert bn.batch_norm_backward(mine, saved, out=mine).x is mine
            np.testing.assert_array_equal(of.back(mine), of.back(result))


@pytest.mark.parametrize("name", NAMES)
def test_state(name: str) -> None:
    """Statistics of a library, of NumPy, and from one to the other."""
    batches = np.random.default_rng(0).normal(2, 3, (3, 8, 4)).astype(np.float32)
    expected = bn.RunningStats(4)
    with opened(name) as (of,):
        theirs, numpys = bn.RunningStats(4, like=of.make(batches[0])), bn.RunningStats(4)
        for batch in batches:
            bn.batch_norm(batch, stats=expected)
            for stats in (theirs, numpys):
                bn.batch_norm(of.make(batch), stats=stats)
        assert type(numpys.mean) is np.ndarray
        assert theirs.num_updates == numpys.num_updates == 3
        copied = bn.RunningStats(4)
        copied.load_state_dict(theirs.state_dict())
        for stats in (theirs.to(batches), numpys, numpys.to(of.make(batches[0])).to(batches), copied):
            np.testing.assert_allclose(stats.mean, expected.mean, rtol=1e-6)
            np.testing.assert_allclose(stats.var, expected.var, rtol=1e-6)
        y = bn.batch_norm(batches[0], stats=expected, training=False)
        for stats in (expected, theirs):
            evaluated = of.back(bn.batch_norm(of.make(batches[0]), stats=stats, training=False))
            np.testing.assert_allclose(evaluated, y, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("home", ["its own", "numpy"])
@pytest.mark.parametrize("name", NAMES)
def test_nonfinite(name: str, home: str) -> None:
    """A bad batch is skipped with a warning, refused, or taken in; wherever the statistics live."""
    good = np.random.default_rng(0).normal(2, 3, (8, 4)).astype(np.float32)
    bad = good.copy()
    bad[3, 1] = np.inf
    with opened(name) as (of,):
        for nonfinite in ("skip", "raise", "propagate"):
            like = of.make(good) if home == "its own" else good
            stats = bn.RunningStats(4, nonfinite=nonfinite, like=like)
            bn.batch_norm(of.make(good), stats=stats)
            before = stats._state
            if nonfinite == "skip":
                with pytest.warns(RuntimeWarning, match="num_skipped"):
                    bn.batch_norm(of.make(bad), stats=stats)
                assert stats._state == before._replace(num_skipped=1)
            elif nonfinite == "raise":
                with pytest.raises(FloatingPointError, match="NaN or an infinity"):
                    bn.batch_norm(of.make(bad), stats=stats)
                assert stats._state is before
            else:
                bn.batch_norm(of.make(bad), stats=stats)
                finite = np.isfinite(stats.to(good).mean)
                np.testing.assert_array_equal(finite, [True, False, True, True])
                assert (stats.num_updates, stats.num_skipped) == (2, 0)


@pytest.mark.parametrize("name", NAMES)
def test_bad_arguments(name: str) -> None:
    x = np.ones((4, 3), np.float32)
    with opened(name) as (of,):
        for array, message in ((x.astype(np.int32), "x has dtype"), (x.astype(np.complex64), "x has dtype")):
            with pytest.raises(TypeError, match=message):
                bn.batch_norm(of.make(array))
        with pytest.raises(ValueError, match="weight has shape"):
            bn.batch_norm(of.make(x), of.make(np.ones(4, np.float32)))
        for where, error in ((np.ones((5, 3), bool), ValueError), (np.ones((4, 3), np.int32), TypeError)):
            with pytest.raises(error, match="where has"):
                bn.batch_norm(of.make(x), where=(of.constant or of.make)(where))


# -- Libraries and devices that meet in a call -------------------------------------------------------------------------

#: All that may not meet: autograd's boxes and NumPy's arrays may.
PAIRS = [pair for pair in permutations(NAMES, 2) if set(pair) != {"autograd", "numpy"}]
ARGUMENTS = ("weight", "bias", "where", "residual", "out", "dy", "backward's out", "moments' where", "m2", "other")


def _meet(argument: str, x: Any, other: Any, features: Any) -> None:
    """A call on x in which one argument is of another library or device; `features` is a vector of it."""
    if argument == "dy":
        bn.batch_norm_backward(other, bn.batch_norm_forward(x)[1])
    elif argument == "backward's out":
        bn.batch_norm_backward(x, bn.batch_norm_forward(x)[1], out=other)
    elif argument == "moments' where":
        bn.moments(x, where=other)
    elif argument == "m2":
        bn.Moments(2, x, other)
    elif argument == "other":
        bn.Moments(2, x, x).merge(bn.Moments(2, other, other))
    else:
        bn.batch_norm(x, **{argument: features if argument in ("weight", "bias") else other})


@pytest.mark.parametrize(("ours", "theirs"), PAIRS, ids=lambda name: name)
@pytest.mark.parametrize("argument", ARGUMENTS)
def test_mixed_libraries(ours: str, theirs: str, argument: str) -> None:
    values = np.ones((4, 3), np.float32)
    with opened(ours, theirs) as (mine, other):
        arguments = argument, mine.make(values), other.make(values), other.make(values[0])
        if argument in ("weight", "bias") and theirs in mine.capabilities.parameters:
            _meet(*arguments)
            return
        with pytest.raises(TypeError) as caught:
            _meet(*arguments)
    message = str(caught.value)
    assert f"an array of {theirs}" in message
    assert f"one of {ours}" in message
    assert "convert one of them, for example by" in message


@pytest.mark.parametrize(("ours", "theirs"), PAIRS, ids=lambda name: name)
def test_the_conversion_that_is_named_works(ours: str, theirs: str) -> None:
    values = np.random.default_rng(0).normal(size=(2, 3)).astype(np.float32)
    with opened(ours, theirs) as (mine, other):
        x, residual = mine.make(values), (other.writable or other.make)(values)
        with pytest.raises(TypeError, match="for example by") as caught:
            bn.batch_norm(x, residual=residual)
        modules = {name: __import__(name) for name in {ours, theirs, "numpy"}}
        if ours == "dask":
            import dask.array  # noqa: F401
        converted = eval(str(caught.value).partition("for example by ")[2], {**modules, "residual": residual})
        np.testing.assert_allclose(
            mine.back(bn.batch_norm(x, residual=converted)),
            bn.batch_norm(values, residual=values),
            rtol=1e-5,
            atol=1e-6,
        )


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("numpy", "autograd")])
def test_statistics_of_another_library_are_converted(name: str) -> None:
    """A few numbers per feature, in both directions."""
    values = np.random.default_rng(0).normal(2, 3, (6, 3)).astype(np.float32)
    moments = bn.moments(values)
    expected = bn.batch_norm(values, stats=moments, training=False)
    with opened(name) as (of,):
        theirs = bn.Moments(moments.count, of.make(moments.mean.copy()), of.make(moments.m2.copy()))
        np.testing.assert_allclose(bn.batch_norm(values, stats=theirs, training=False), expected, rtol=1e-6)
        y = of.back(bn.batch_norm(of.make(values), stats=moments, training=False))
        np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-6)


#: torch's second device, meta, holds no numbers to make Moments of.
DEVICES = [("array_api_strict", argument) for argument in ARGUMENTS] + [
    ("torch", argument) for argument in ARGUMENTS[:-1]
]


@pytest.mark.parametrize(("name", "argument"), DEVICES)
def test_mixed_devices(name: str, argument: str) -> None:
    values = np.ones((4, 3), np.float32)
    with opened(name) as (of,):
        assert of.other_device is not None
        x, other = of.make(values), of.other_device(values)
        with pytest.raises(TypeError) as caught:
            _meet(argument, x, other, of.other_device(values[0]))
    message = str(caught.value)
    assert f"is on the device {other.device}" in message
    assert f"on {x.device}" in message
    assert "move one of them, for example by" in message


# -- For authors of backends -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in NAMES if name != "autograd"])
def test_check_backend(name: str) -> None:
    with opened(name) as (of,):
        check_backend(of.make, of.back)


def test_check_backend_finds_what_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    right = bn.batch_norm_backward

    def wrong(dy: Any, saved: Any) -> Any:
        gradients = right(dy, saved)
        return gradients._replace(x=(gradients.x * 1.01).astype(gradients.x.dtype))

    monkeypatch.setattr(testing, "batch_norm_backward", wrong)
    with pytest.raises(AssertionError, match="ulp") as caught:
        check_backend(np.asarray)
    assert caught.value.__notes__ == ["shape (7, 5), axis (1,), float16, with x alone"]
