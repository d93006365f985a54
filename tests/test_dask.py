"""dask arrays: the same numbers in any chunks, lazily where that is promised, and state that no task touches."""

import itertools
import pickle
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import bnarray as bn
from bnarray.backends import generic
from bnarray.kernels.cpu import pool
from bnarray.testing import TOLERANCES, assert_close, reference
from tests.cases import DTYPES, Options, draw, table

dask = pytest.importorskip("dask", reason="dask is not installed: its arrays are not verified")
da = pytest.importorskip("dask.array", reason="dask.array is not installed: its arrays are not verified")


@pytest.fixture(autouse=True)
def _one_thread_by_default() -> Iterator[None]:
    """Faster for small arrays, and errors come from where they are."""
    with dask.config.set(scheduler="synchronous"):
        yield


def _uneven(size: int, seed: int) -> tuple[int, ...]:
    """One to three chunks of different sizes, now and then an empty one."""
    rng = np.random.default_rng(seed)
    cuts = np.sort(rng.integers(0, size + 1, rng.integers(0, 3))).tolist()
    return tuple(b - a for a, b in itertools.pairwise([0, *cuts, size]))


def _chunked(array: np.ndarray, seed: int) -> Any:
    """The array in chunks that fit those of no other seed."""
    return da.from_array(array, chunks=tuple(_uneven(size, seed + axis) for axis, size in enumerate(array.shape)))


class _Source:
    """A dask array of given values that counts how often a chunk of it is computed."""

    def __init__(self, values: np.ndarray, chunks: Any) -> None:
        self._lock = threading.Lock()
        self.reads = 0
        self.x = da.from_array(values, chunks=chunks).map_blocks(self._read, dtype=values.dtype, meta=values[:0])
        self.chunks = self.x.npartitions

    def _read(self, chunk: np.ndarray) -> np.ndarray:
        with self._lock:
            self.reads += 1
        return chunk

    def __dask_tokenize__(self) -> object:
        return id(self)


def _normal(*shape: int, dtype: Any = np.float32) -> np.ndarray:
    return np.random.default_rng(len(shape)).normal(3, 2, shape).astype(dtype)


def _source() -> _Source:
    return _Source(_normal(20, 6, 5), (7, 4, 5))


# -- The same numbers --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("shape", "kept", "layout", "dtype", "options"), table()[::19])
def test_forward_and_backward(
    shape: tuple[int, ...], kept: tuple[int, ...], layout: str, dtype: str, options: Options
) -> None:
    seed = len(shape) + len(layout)
    case = draw(shape, kept, layout, dtype, options, seed=seed)
    tolerance = TOLERANCES[dtype]
    truth = reference(case.x, case.dy, kept, relu=case.relu, statistics=case.statistics, **case.call)
    given = {name: _chunked(each, seed + 7 * i) for i, (name, each) in enumerate(case.call.items()) if name != "eps"}
    given |= {"axis": kept, "activation": "relu" if case.relu else None, "eps": case.call["eps"]}
    if case.statistics is not None:
        lazy = (_chunked(each, seed) for each in case.statistics)
        given |= {"training": False, "stats": bn.Moments(1, *(lazy if seed % 2 else case.statistics))}
    x, dy = _chunked(case.x, seed), _chunked(case.dy, seed + 1)

    y, saved = bn.batch_norm_forward(x, **given)
    assert isinstance(y, da.Array)
    assert (y.chunks, y.dtype, type(y._meta)) == (x.chunks, case.x.dtype, np.ndarray)
    computed = y.compute()
    assert computed.dtype == case.x.dtype
    assert_close(computed, truth.y, truth.y_scale, tolerance, tolerance.y)
    np.testing.assert_array_equal(bn.batch_norm(x, **given).compute(), computed)

    gradients = bn.batch_norm_backward(dy, saved)
    assert isinstance(gradients.x, da.Array)
    assert (gradients.x.chunks, gradients.x.dtype) == (x.chunks, case.x.dtype)
    assert_close(gradients.x.compute(), truth.dx, truth.dx_scale, tolerance, tolerance.dx)
    if "weight" in case.call:
        dweight, dbias = dask.compute(gradients.weight, gradients.bias)
        assert (dweight.dtype, dbias.dtype) == (np.float32, np.float64)
        room = 1e-12 + tolerance.sums * truth.dweight_scale
        assert (abs(dweight - truth.dweight) <= room + 1e-6 * abs(truth.dweight)).all()
        assert (abs(dbias - truth.dbias) <= 1e-12 + tolerance.sums * truth.dbias_scale).all()
    else:
        assert gradients.weight is gradients.bias is None
    if "residual" in case.call:
        np.testing.assert_array_equal(gradients[3].compute().astype(np.float64), truth.dresidual)


@pytest.mark.parametrize(("shape", "kept", "layout", "dtype", "options"), table()[::37])
def test_moments(shape: tuple[int, ...], kept: tuple[int, ...], layout: str, dtype: str, options: Options) -> None:
    case = draw(shape, kept, layout, dtype, options, seed=len(shape))
    where = case.call.get("where")
    m = bn.moments(_chunked(case.x, 3), axis=kept, where=None if where is None else _chunked(where, 4))
    ours = bn.moments(case.x, axis=kept, where=where)
    for lazy, known in ((m.mean, ours.mean), (m.m2, ours.m2), (m.var(), ours.var())):
        assert isinstance(lazy, da.Array)
        assert (lazy.shape, lazy.dtype, lazy._meta.dtype) == (known.shape, np.float64, np.float64)
        assert lazy._meta.ndim == lazy.ndim
        assert lazy.compute().shape == known.shape
    count = np.broadcast_to(m.count if where is None else m.count.compute(), ours.mean.shape)
    assert isinstance(m.count, int) == (where is None)
    np.testing.assert_allclose(count, np.broadcast_to(ours.count, count.shape), rtol=1e-14)
    tolerance = TOLERANCES[dtype].moments
    mean, var = dask.compute(m.mean, m.var())
    seen = count > 0
    assert (abs(mean - ours.mean)[seen] <= tolerance * (np.sqrt(ours.var()) + abs(ours.mean))[seen]).all()
    np.testing.assert_allclose(var[seen], ours.var()[seen], rtol=10 * tolerance, atol=1e-24)


def test_far_from_zero() -> None:
    """Deviation 1 about a million, in float32: exact to the float64 result on the same data."""
    x = (np.random.default_rng(0).normal(size=(50_000, 3)) + 1e6).astype(np.float32)
    truth = x.astype(np.float64).var(0)
    np.testing.assert_allclose(bn.moments(_chunked(x, 1)).var().compute(), truth, rtol=1e-6)


def test_same_bits_whatever_the_scheduler() -> None:
    x, dy = (da.from_array(_normal(60, 7, 5) * scale, chunks=(11, 3, 4)) for scale in (1, 2))
    results = []
    for scheduler in ("synchronous", "threads"):
        with dask.config.set(scheduler=scheduler, split_every=2 if results else 16):
            y, saved = bn.batch_norm_forward(x, axis=1)
            gradients = bn.batch_norm_backward(dy, saved)
            m = bn.moments(x)
            results.append([saved.moments.mean, saved.moments.m2, *dask.compute(y, gradients.x, m.mean, m.m2)])
    for one, two in zip(*results, strict=True):
        np.testing.assert_array_equal(one, two)
    np.testing.assert_array_equal(results[0][1], results[0][-1])


def test_processes() -> None:
    values = _normal(40, 6)
    x, stats = da.from_array(values, chunks=(15, 4)), bn.RunningStats(6)
    with dask.config.set(scheduler="processes", num_workers=2):
        y, saved = bn.batch_norm_forward(x, da.ones(6), da.zeros(6), stats=stats)
        gradients = bn.batch_norm_backward(x, saved)
        found = dask.compute(y, *gradients, bn.moments(x).mean)
    ours, saved = bn.batch_norm_forward(values, np.ones(6), np.zeros(6))
    expected = (ours, *bn.batch_norm_backward(values, saved), saved.moments.mean)
    for theirs, known in zip(found, expected, strict=True):
        np.testing.assert_allclose(theirs, known, rtol=1e-5, atol=1e-4)
    assert stats.num_updates == 1


# -- What is lazy ------------------------------------------------------------------------------------------------------


def test_moments_are_lazy() -> None:
    source, weights = _source(), _Source(np.ones((20, 6, 1)), (9, 2, 1))
    m = bn.moments(source.x, where=weights.x)
    union = bn.Moments.merge_all([m, bn.moments(source.x), m + m])
    lazy = union.mean, union.var(1), bn.Moments(m.count, m.mean, m.m2).var()
    assert "dask.array" in repr(m)
    assert source.reads == weights.reads == 0
    mean, var, again = dask.compute(*lazy)
    assert source.reads == source.chunks
    assert weights.reads == weights.chunks
    values = source.x.compute()
    np.testing.assert_allclose(mean, values.mean((0, 2)), rtol=1e-6)
    np.testing.assert_allclose(var, np.concatenate([values] * 4).astype(np.float64).var((0, 2), ddof=1), rtol=1e-9)
    np.testing.assert_allclose(again, values.astype(np.float64).var((0, 2)), rtol=1e-9)


def test_merged_moments_of_features_in_other_chunks() -> None:
    values = _normal(20, 6)
    a, b = (bn.moments(da.from_array(values, chunks=chunks)) for chunks in ((20, 4), (5, 5)))
    np.testing.assert_allclose((a + b).var().compute(), bn.moments(values).var(), rtol=1e-9)
    assert (a + b).count == 40


@pytest.mark.parametrize("held", ["running", "moments", "lazy"])
def test_evaluation_is_lazy(held: str) -> None:
    source, known = _source(), bn.moments(_source().x.compute())
    stats: Any = bn.RunningStats(6, update_rate=None, correction=0)
    stats.update(known)
    if held != "running":
        stats = known if held == "moments" else bn.moments(source.x)
    y, saved = bn.batch_norm_forward(source.x, stats=stats, training=False)
    assert saved.moments is None
    assert source.reads == 0
    expected = bn.batch_norm(source.x.compute())
    np.testing.assert_allclose(y.compute(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("mask_shape", [(20, 6, 1), (20, 1, 1)])
def test_evaluation_with_lazy_counts(mask_shape: tuple[int, ...]) -> None:
    source, mask = _source(), np.random.default_rng(0).random(mask_shape) < 0.7
    m = bn.moments(source.x, where=da.from_array(mask, chunks=(8, 5, 1)))
    y = bn.batch_norm(source.x, stats=m, training=False)
    assert source.reads == 0
    np.testing.assert_allclose(y.compute(), bn.batch_norm(source.x.compute(), where=mask), atol=1e-5)


def test_numbers_that_are_not_finite() -> None:
    """They pass through without warnings, in tasks too, as in an array of NumPy's."""
    values = _normal(20, 6, 5)
    values[3, 1], values[11, 1, 2], values[17, 4, 4] = np.inf, -np.inf, np.nan
    x = da.from_array(values, chunks=(7, 4, 5))
    for scheduler in ("synchronous", "threads"):
        with dask.config.set(scheduler=scheduler):
            m = bn.moments(x)
            np.testing.assert_array_equal(np.isnan((m + m).var(10).compute()), [False, True, False, False, True, False])
            y, saved = bn.batch_norm_forward(x)
            np.testing.assert_allclose(y.compute(), bn.batch_norm(values), atol=1e-5)
            assert np.isnan(bn.batch_norm_backward(x, saved).x.compute()).any()
    half = da.from_array(values.astype(np.float16), chunks=7)
    _, saved = bn.batch_norm_forward(half, residual=half)
    assert bn.batch_norm_backward(x.astype(np.float64) * 1e6, saved)[3].compute().dtype == np.float16


def test_training_reads_x_once_and_then_is_lazy() -> None:
    source, residual = _source(), _source()
    y, saved = bn.batch_norm_forward(source.x, residual=residual.x, activation="relu")
    assert (source.reads, residual.reads) == (source.chunks, 0)
    assert isinstance(saved.moments.mean, np.ndarray)
    y.compute()
    assert (source.reads, residual.reads) == (2 * source.chunks, residual.chunks)
    dy = _source()
    gradients = bn.batch_norm_backward(dy.x, saved)
    assert (source.reads, dy.reads) == (3 * source.chunks, dy.chunks)
    dask.compute(*gradients)
    assert (source.reads, dy.reads) == (4 * source.chunks, 2 * dy.chunks)


def test_output_holds_what_the_call_saw() -> None:
    """Parameters that change before the output is computed do not change it."""
    values = _normal(20, 3)
    for convert in (np.array, lambda array: da.from_array(array.copy(), chunks=2)):
        weight, bias = convert(np.full(3, 2.0)), convert(np.ones(3))
        stats = bn.RunningStats(3)
        x = da.from_array(values, chunks=(6, 2))
        evaluated = bn.batch_norm(x, weight, bias, stats=stats, training=False)
        y, saved = bn.batch_norm_forward(x, weight, bias, stats=stats)
        weight[:], bias[:] = 5.0, 7.0
        np.testing.assert_allclose(y.compute(), bn.batch_norm(values, np.full(3, 2.0), np.ones(3)), atol=1e-5)
        np.testing.assert_allclose(evaluated.compute(), 2 * values / np.sqrt(1 + 1e-5) + 1, rtol=1e-5)
        _, expected = bn.batch_norm_forward(values, np.full(3, 2.0))
        dx = bn.batch_norm_backward(x**2, saved).x.compute()
        np.testing.assert_allclose(dx, bn.batch_norm_backward(values**2, expected).x, rtol=1e-4, atol=1e-4)


# -- State -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheduler", ["synchronous", "threads"])
def test_state_is_updated_once(scheduler: str) -> None:
    source, stats = _source(), bn.RunningStats(6)
    with dask.config.set(scheduler=scheduler):
        y = bn.batch_norm(source.x, stats=stats)
        assert stats.num_updates == 1
        for _ in range(2):
            y.compute()
    assert stats.num_updates == 1
    expected = bn.RunningStats(6)
    bn.batch_norm(source.x.compute(), stats=expected)
    np.testing.assert_allclose(stats.mean, expected.mean, rtol=1e-12)
    np.testing.assert_allclose(stats.var, expected.var, rtol=1e-9)
    assert stats.count == expected.count


@pytest.mark.parametrize("update_rate", [0.1, None])
@pytest.mark.parametrize("where", [None, "features", "samples"])
def test_update_with_lazy_moments_reads_once(update_rate: float | None, where: str | None) -> None:
    source = _Source(_normal(20, 6, 5), (7, 6 if where is None else 4, 5))
    stats, expected = (bn.RunningStats(6, update_rate=update_rate) for _ in range(2))
    values, shape = source.x.compute(), {"features": (20, 6, 1), "samples": (20, 1, 1)}
    mask = None if where is None else np.random.default_rng(0).random(shape[where]) < 0.7
    source.reads = 0
    stats.update(bn.moments(source.x, where=None if mask is None else da.from_array(mask, chunks=(6, 1, 1))))
    assert source.reads == source.chunks
    expected.update(bn.moments(values, where=mask))
    np.testing.assert_allclose(stats.mean, expected.mean, rtol=1e-12)
    np.testing.assert_allclose(stats.var, expected.var, rtol=1e-9)
    np.testing.assert_array_equal(stats.count, np.broadcast_to(expected.count, np.shape(stats.count)))


def test_update_with_lazy_moments_is_judged() -> None:
    bad = da.from_array(np.array([[1.0, np.nan], [2.0, 3.0]]), chunks=1)
    stats = bn.RunningStats(2, nonfinite="raise")
    with pytest.raises(FloatingPointError, match="NaN"):
        stats.update(bn.moments(bad))
    with pytest.raises(FloatingPointError, match="NaN"):
        bn.batch_norm(bad, stats=stats)
    with pytest.raises(ValueError, match="too few"):
        stats.update(bn.moments(bad[:1]))
    assert (stats.num_updates, stats.num_skipped) == (0, 0)


def test_state_like_a_dask_array_is_memory() -> None:
    x = da.from_array(_normal(20, 6), chunks=(7, 4))
    for stats in (bn.RunningStats(6, like=x), bn.RunningStats(6).to(x), bn.RunningStats(6, like=x).copy()):
        bn.batch_norm(x, stats=stats)
        stats.reset()
        bn.batch_norm(x, stats=stats)
        assert type(stats.mean) is type(stats.var) is np.ndarray
    clone = bn.RunningStats(6)
    clone.load_state_dict(stats.state_dict() | {"running_mean": x[0]})
    np.testing.assert_array_equal(clone.mean, x[0].compute())


@pytest.mark.parametrize("like", [None, np.float32, np.float64])
def test_layer(like: Any) -> None:
    values, dy = _normal(20, 6, dtype=like or np.float32), _normal(20, 6, dtype=np.float64)
    x = da.from_array(values, chunks=(7, 4))
    layer, expected = bn.BatchNorm(6, like=None if like is None else x), bn.BatchNorm(6)
    assert layer.weight.dtype == (like or np.float64)
    for _ in range(2):
        y, ours = layer(x), expected(values)
        np.testing.assert_allclose(y.compute(), ours, atol=1e-5)
        dx = layer.backward(da.from_array(dy, chunks=(5, 6)))
        np.testing.assert_allclose(dx.compute(), expected.backward(dy), atol=1e-5)
    np.testing.assert_allclose(layer.grad_weight, expected.grad_weight, rtol=1e-5, atol=1e-5)
    for array in (layer.weight, layer.bias, layer.grad_weight, layer.grad_bias, layer.stats.mean):
        assert type(array) is np.ndarray
    layer.zero_grad()
    layer.weight[...] = 3
    assert layer.to(x).eval()(x).dtype == x.dtype
    kernel, bias = bn.fold(da.from_array(np.ones((6, 2)), chunks=(4, 1)), None, layer)
    theirs, their_bias = bn.fold(np.ones((6, 2)), None, layer)
    assert isinstance(kernel, da.Array)
    np.testing.assert_allclose(kernel.compute(), theirs)
    np.testing.assert_allclose(bias, their_bias)


def test_gradients_are_of_the_parameters_library() -> None:
    x = da.from_array(_normal(20, 6), chunks=(7, 4))
    _, saved = bn.batch_norm_forward(x, np.ones(6, np.float16), da.ones(6, chunks=5, dtype=np.float32))
    gradients = bn.batch_norm_backward(x, saved)
    assert type(gradients.weight) is np.ndarray
    assert isinstance(gradients.bias, da.Array)
    assert (gradients.weight.dtype, gradients.bias.dtype) == (np.float16, np.float32)
    assert gradients.bias.chunks == ((5, 1),)


def test_evaluating_numpy_arrays_with_lazy_moments() -> None:
    values = _normal(20, 6)
    m = bn.moments(da.from_array(values, chunks=(7, 4)))
    np.testing.assert_allclose(bn.batch_norm(values, stats=m, training=False), bn.batch_norm(values), atol=1e-5)


# -- Tasks -------------------------------------------------------------------------------------------------------------


def test_tasks_start_no_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    values = _normal(2048, 16, 16)
    assert values.size > 2**18
    shared: list[int] = []
    original = pool.helpers.share
    monkeypatch.setattr(pool.helpers, "share", lambda number, *rest: (shared.append(number), original(number, *rest)))
    monkeypatch.setattr(pool.numba, "get_num_threads", lambda: 2)
    monkeypatch.setattr(pool.numba.config, "NUMBA_NUM_THREADS", 2)
    x = da.from_array(values, chunks=(2048, 16, 16))
    for scheduler in ("synchronous", "threads"):
        with dask.config.set(scheduler=scheduler):
            y, saved = bn.batch_norm_forward(x, where=da.ones((2048, 1, 1)))
            dask.compute(y, bn.batch_norm_backward(x, saved).x, bn.moments(x).mean)
    assert not shared
    bn.batch_norm(values)
    assert shared, "the array is too small for this test"


def test_graphs_travel_and_have_names_that_hold() -> None:
    """Equal calls are equal tasks; a graph is found again after a pickle."""
    x = da.from_array(_normal(20, 6), chunks=(7, 4))
    m, y = bn.moments(x), bn.batch_norm(x, np.ones(6))
    assert m.mean.name == bn.moments(x).mean.name
    assert y.name == bn.batch_norm(x, np.ones(6)).name != bn.batch_norm(x, np.zeros(6)).name
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(y)).compute(), y.compute())
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(m)).mean.compute(), m.mean.compute())


def test_chunks_of_another_library() -> None:
    """What a chunk is decides which backend works on it."""

    class Celsius(np.ndarray):
        pass

    Celsius.__module__ = "thermometer.arrays"
    seen = []

    class Verbs:
        @staticmethod
        def moments(x: Any, kept: Any, where: Any) -> Any:
            seen.append(type(x))
            return generic.moments(x, kept, where)

        @staticmethod
        def convert(x: Any, like: Any) -> Any:
            return np.asarray(x).view(Celsius)

        to_numpy = staticmethod(np.array)

    values = _normal(20, 6)
    bn.register_backend("thermometer", Verbs)
    try:
        x = da.from_array(values.view(Celsius), chunks=(7, 4), asarray=False)
        y = bn.batch_norm(x)
        assert seen == [Celsius] * 6
        assert type(y._meta) is Celsius
        assert type(y.blocks[0, 0].compute()) is Celsius
        np.testing.assert_allclose(np.asarray(y), bn.batch_norm(values), atol=1e-5)
    finally:
        bn.dispatch._registered.pop("thermometer")
        bn.dispatch._verbs_of_type.clear()


def test_sizes_that_are_not_known() -> None:
    values = _normal(40, 6)
    x = da.from_array(values, chunks=(15, 4))
    some = x[da.from_array(values[:, 0] > 3, chunks=15)]
    expected = values[values[:, 0] > 3]
    assert np.isnan(some.shape[0])
    stats = bn.RunningStats(6)
    y = bn.batch_norm(some, da.ones(6), np.zeros(6), stats=stats)
    np.testing.assert_allclose(y.compute(), bn.batch_norm(expected), atol=1e-5)
    assert stats.count == len(expected)
    m = bn.moments(some)
    np.testing.assert_allclose((m + m).var().compute(), bn.moments(expected).var(), rtol=1e-9)
    np.testing.assert_array_equal(m.count.compute(), np.full(6, len(expected)))
    bn.batch_norm(some, stats=stats, training=False).compute()
    for call in (
        lambda: bn.moments(some, axis=0),
        lambda: bn.batch_norm(some, axis=0),
        lambda: bn.moments(some, where=some > 0),
        lambda: bn.batch_norm(some, residual=some),
        lambda: bn.batch_norm_backward(some, bn.batch_norm_forward(some)[1]),
    ):
        with pytest.raises(ValueError, match=r"call (x|where|residual|dy)\.compute_chunk_sizes\(\)"):
            call()


@pytest.mark.parametrize("shape", [(0, 3), (4, 0), (0, 0, 5)])
def test_empty(shape: tuple[int, ...]) -> None:
    x, stats = da.zeros(shape, chunks=2, dtype=np.float32), bn.RunningStats(shape[1])
    y, saved = bn.batch_norm_forward(x, np.ones(shape[1]), stats=stats)
    assert (y.shape, y.chunks, y.dtype) == (shape, x.chunks, np.float32)
    assert y.compute().shape == shape
    gradients = bn.batch_norm_backward(x, saved)
    assert gradients.x.compute().shape == shape
    np.testing.assert_array_equal(gradients.weight, np.zeros(shape[1]))
    m = bn.moments(x)
    assert m.count == stats.num_updates == 0
    np.testing.assert_array_equal(m.mean.compute(), np.zeros(shape[1]))


def test_no_axes() -> None:
    x = da.from_array(np.array(3.0), chunks=())
    assert bn.batch_norm(x, axis=()).compute() == 0
    assert bn.moments(x, axis=()).mean.compute() == 3


# -- Errors ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"x": da.ones((4, 3), dtype=int)}, TypeError, "x has dtype int64"),
        ({"x": da.ones((4, 3), dtype=complex)}, TypeError, "x has dtype complex128"),
        ({"x": da.ones((4, 3), dtype=">f4")}, ValueError, "foreign byte order"),
        (
            {"x": da.ma.masked_array(da.ones((4, 3)), da.zeros((4, 3)))},
            TypeError,
            r"dask\.array\.ma\.getmaskarray\(x\)",
        ),
        ({"x": dask.delayed(3)}, TypeError, r"x is a dask\.delayed"),
        ({"out": da.ones((4, 3))}, TypeError, "out is given, but a dask array has no memory"),
        ({"out": np.ones((4, 3))}, TypeError, r"out is an array of numpy .* dask\.array\.from_array"),
        (
            {"where": np.ones((4, 3), bool)},
            TypeError,
            r"where is an array of numpy .* dask\.array\.from_array",
        ),
        ({"residual": np.ones((4, 3))}, TypeError, "residual is an array of numpy and x one of dask"),
        ({"residual": da.ones((4, 2))}, ValueError, "residual has shape"),
        ({"residual": da.ones((4, 3), dtype="f4")}, TypeError, "residual has dtype"),
        ({"where": da.ones((4, 2))}, ValueError, "where has shape"),
        ({"where": da.ones((1, 4, 3))}, ValueError, "where has shape"),
        ({"where": da.ones((4, 3), dtype=int)}, TypeError, "where has dtype int64"),
        ({"where": -da.ones((4, 3))}, ValueError, "where holds a weight that is negative"),
        ({"where": da.full((4, 3), 1e308)}, ValueError, "where holds weights whose sum"),
        ({"weight": da.ones(2)}, ValueError, "weight has shape"),
        ({"weight": np.ones(3, int)}, TypeError, "weight has dtype int64"),
        ({"bias": da.ones(3, dtype=bool)}, TypeError, "bias has dtype bool"),
        ({"weight": [1.0, 1.0, 1.0]}, TypeError, "weight is a builtins.list"),
    ],
)
def test_errors(given: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments = {"x": da.from_array(_normal(4, 3, dtype=np.float64), chunks=2), **given}
    stats = bn.RunningStats(3)
    with pytest.raises(error, match=message):
        bn.batch_norm(**arguments, stats=stats)
    assert stats.num_updates == stats.num_skipped == 0


def test_dask_arrays_for_a_numpy_x() -> None:
    with pytest.raises(TypeError, match=r"weight is an array of dask and x one of numpy; .*weight\.compute\(\)"):
        bn.batch_norm(np.ones((4, 3)), da.ones(3))
    x = da.ones((4, 3))
    with pytest.raises(TypeError, match="out is given"):
        bn.batch_norm_backward(x, bn.batch_norm_forward(x)[1], out=x)


def test_errors_that_only_the_data_can_tell() -> None:
    """A lazy call judges no value: what computes it does."""
    m = bn.moments(da.ones((4, 3)), where=-da.ones((4, 3)))
    with pytest.raises(ValueError, match="where holds a weight that is negative"):
        m.mean.compute()
    lies = da.from_array(np.ones((4, 3), int), chunks=2).map_blocks(
        lambda chunk: chunk, dtype=np.float64, meta=np.ones(1)
    )
    with pytest.raises(TypeError, match="x has dtype int64"):
        bn.batch_norm(lies)


def test_what_is_declared() -> None:
    from bnarray.backends.dask import CAPABILITIES

    for dtype in CAPABILITIES.dtypes:
        x = da.from_array(_normal(6, 3).astype(DTYPES[dtype]), chunks=4)
        assert bn.batch_norm(x).dtype == DTYPES[dtype]
    assert CAPABILITIES.lazy
    assert not CAPABILITIES.out
    assert bn.batch_norm(x, *(np.ones(3) for _ in CAPABILITIES.parameters)).shape == x.shape
