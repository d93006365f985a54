"""The CuPy backend on a double of CuPy: calls, streams, captures, devices, errors. No GPU has any part in it."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import bnarray as bn
from bnarray.kernels.cuda import streams
from bnarray.testing import check_case
from tests.cases import Options, draw, table
from tests.cuda.simulated import cupy_double, simulator
from tests.cuda.simulated.cupy_double import Device, Stream, machine, ndarray

cupy: Any = cupy_double.install()
streams.Mark = cupy_double.Mark  # type: ignore[misc,assignment]
simulator.give = cupy_double.give

# What is longer takes the simulator too long; chunks are short there, so that these have several.
_CASES = [case for case in table() if np.prod(case.values[0]) < 2000]


@pytest.fixture(autouse=True)
def _afresh() -> Iterator[None]:
    machine.waits = machine.uploads = machine.device = 0
    yield
    machine.current.clear()
    machine.foreign = 2
    assert machine.device == 0


def _back(array: Any) -> np.ndarray:
    assert type(array) is ndarray
    return array.get()


def _drawn(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(3, 2, shape).astype(np.float32)


@pytest.mark.parametrize(("shape", "kept", "layout", "dtype", "options"), _CASES[::11])
def test_simulated_cases(
    shape: tuple[int, ...], kept: tuple[int, ...], layout: str, dtype: str, options: Options
) -> None:
    case = draw(shape, kept, layout, dtype, options, seed=len(shape) + len(layout))
    check_case(ndarray, _back, case.x, case.dy, kept, relu=case.relu, statistics=case.statistics, **case.call)


# -- What a call asks of the host --------------------------------------------------------------------------------------


@pytest.mark.parametrize("nonfinite", ["skip", "propagate"])
@pytest.mark.parametrize("update_rate", [0.1, None])
def test_training_and_evaluation_neither_wait_nor_send(nonfinite: str, update_rate: float | None) -> None:
    x, weight = cupy.asarray(_drawn(6, 5, 4)), cupy.asarray(np.ones(5, np.float32))
    stats = bn.RunningStats(5, like=x, nonfinite=nonfinite, update_rate=update_rate)
    machine.uploads = 0
    y, saved = bn.batch_norm_forward(x, weight, weight, stats=stats, activation="relu", residual=x)
    bn.batch_norm_backward(y, saved, out=y)
    bn.batch_norm(x, weight, stats=stats, out=x)
    bn.batch_norm(x, stats=stats, training=False)
    _ = stats.mean, stats.var, stats.copy(), stats.frozen()
    assert (machine.waits, machine.uploads) == (0, 0)
    assert stats.num_updates == 2
    assert machine.waits == 1


def test_to_raise_is_to_wait() -> None:
    x = cupy.asarray(_drawn(6, 5))
    stats = bn.RunningStats(5, like=x, nonfinite="raise")
    bn.batch_norm(x, stats=stats)
    assert machine.waits > 0
    x[3, 2] = np.nan
    out = cupy.asarray(np.zeros((6, 5), np.float32))
    with pytest.raises(FloatingPointError, match="NaN"):
        bn.batch_norm(x, stats=stats, out=out)
    assert (out.get() == 0).all()
    assert (stats.num_updates, stats.num_skipped) == (1, 0)


# -- Running statistics ------------------------------------------------------------------------------------------------


def _states(make: Callable[[np.ndarray], Any], nonfinite: str, update_rate: float | None, correction: float) -> Any:
    """What a state comes to by batches of every kind."""
    options = {"nonfinite": nonfinite, "update_rate": update_rate, "correction": correction}
    stats = bn.RunningStats(4, like=make(np.zeros(1, np.float32)), **options)
    rng = np.random.default_rng(0)
    for turn in range(6):
        x, where = rng.normal(turn, 2, (9, 4, 3)).astype(np.float32), None
        if turn == 1:
            x[2, 3, 1] = np.nan
        if turn == 2:
            where = np.ones((9, 4, 1), bool)
            where[:, 1] = False
        if turn == 3:
            where = np.zeros((9, 1, 1), np.float32)
        if turn == 4:
            where = rng.uniform(0.5, 2, (9, 1, 1)).astype(np.float32)
        bn.batch_norm(make(x), stats=stats, where=None if where is None else make(where))
    return stats


@pytest.mark.filterwarnings("ignore:the batch's statistics")
@pytest.mark.parametrize("nonfinite", ["skip", "propagate"])
@pytest.mark.parametrize(("update_rate", "correction"), [(0.1, 1), (1.0, 0), (None, 1)])
def test_states_are_those_of_numpy(nonfinite: str, update_rate: float | None, correction: float) -> None:
    theirs, ours = (_states(make, nonfinite, update_rate, correction) for make in (cupy.asarray, np.asarray))
    np.testing.assert_allclose(theirs.mean.get(), ours.mean, rtol=1e-6)
    np.testing.assert_allclose(theirs.var.get(), ours.var, rtol=1e-6)
    np.testing.assert_allclose(theirs.count.get(), ours.count, rtol=1e-12)
    assert (theirs.num_updates, theirs.num_skipped) == (ours.num_updates, ours.num_skipped)
    moved = theirs.to(np.zeros(1))
    assert type(moved) is bn.RunningStats
    np.testing.assert_array_equal(moved.var, theirs.var.get())
    np.testing.assert_array_equal(moved.to(cupy.asarray(np.zeros(1))).mean.get(), moved.mean)


def test_a_count_is_a_number_until_features_differ() -> None:
    x = cupy.asarray(_drawn(6, 5))
    stats = bn.RunningStats(5, like=x, update_rate=None)
    bn.batch_norm(x, stats=stats)
    assert stats.count == 6
    assert type(stats.count) is int
    bn.batch_norm(x, stats=stats, where=cupy.asarray(np.tri(6, 5, dtype=bool)))
    np.testing.assert_array_equal(stats.count.get(), [12, 11, 10, 9, 8])


def test_too_few_values_are_refused() -> None:
    x = cupy.asarray(_drawn(1, 5))
    stats = bn.RunningStats(5, like=x)
    with pytest.raises(ValueError, match="too few for a running variance"):
        bn.batch_norm(x, stats=stats)
    with pytest.raises(ValueError, match="too few for a running variance"):
        bn.batch_norm(cupy.asarray(_drawn(5, 5)), stats=stats, where=cupy.asarray(np.tri(5, dtype=bool)))
    assert (stats.num_updates, stats.num_skipped) == (0, 0)


@pytest.mark.parametrize("update_rate", [0.1, None])
def test_a_state_is_kept_copied_and_moved(update_rate: float | None, tmp_path: Path) -> None:
    x = cupy.asarray(_drawn(6, 5))
    stats = bn.RunningStats(5, like=x, update_rate=update_rate)
    bn.batch_norm(x, stats=stats)
    stats.save(tmp_path / "stats.npz")
    loaded = bn.RunningStats(5, like=x, update_rate=update_rate)
    loaded.load_state_dict(stats.state_dict())
    copies = [stats.copy(), bn.RunningStats.load(tmp_path / "stats.npz").to(x), loaded]
    changed = stats.updated(bn.moments(x))
    assert (stats.num_updates, changed.num_updates) == (1, 2)
    for each in copies:
        assert type(each) is type(stats)
        for mine, its in zip(stats.mean_and_var(), each.mean_and_var(), strict=True):
            np.testing.assert_array_equal(mine.get(), its.get())
        assert (each.count, each.num_updates, each.num_skipped) == (6, 1, 0)
        bn.batch_norm(x, stats=each)
        assert (each.num_updates, stats.num_updates) == (2, 1)
    assert repr(stats).startswith(f"RunningStats(5, update_rate={update_rate}")
    if update_rate is None:
        stats.merge(copies[0])
        assert stats.count == 18
    stats.reset()
    assert (stats.count, stats.mean.get().sum(), stats.var.get().sum()) == (0, 0, 5)
    with stats.frozen():
        bn.batch_norm(x, stats=stats)
    assert stats.num_updates == 0


def test_what_is_read_is_nobody_elses() -> None:
    x = cupy.asarray(_drawn(6, 5))
    stats = bn.RunningStats(5, like=x)
    stats.mean[...] = 7
    assert (stats.mean.get() == 0).all()


def test_a_layer_trains() -> None:
    x = _drawn(6, 5, 4)
    layers = [bn.BatchNorm(5, like=cupy.asarray(x)), bn.BatchNorm(5)]
    for layer, make in zip(layers, (cupy.asarray, np.asarray), strict=True):
        layer.backward(layer(make(x)))
        layer.eval()
    np.testing.assert_allclose(layers[0](cupy.asarray(x)).get(), layers[1](x), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(layers[0].grad_weight.get(), layers[1].grad_weight, rtol=1e-5)


# -- Streams, captures, devices ----------------------------------------------------------------------------------------


def test_updates_by_several_streams_keep_their_order() -> None:
    x, other = cupy.asarray(_drawn(6, 5)), cupy.asarray(_drawn(6, 5, seed=1))
    machine.stream().synchronize()
    stats, alone = bn.RunningStats(5, like=x), bn.RunningStats(5)
    first, second = Stream(), Stream()
    for stream, batch in ((first, x), (second, other), (first, other)):
        with stream:
            bn.batch_norm(batch, stats=stats)
        bn.batch_norm(batch.get(), stats=alone)
    with second:
        np.testing.assert_allclose(stats.mean.get(), alone.mean, rtol=1e-6)
        assert stats.num_updates == 3


def test_a_look_is_not_disturbed_by_later_updates() -> None:
    x = cupy.asarray(_drawn(6, 5))
    machine.stream().synchronize()
    stats, reader, writer = bn.RunningStats(5, like=x), Stream(), Stream()
    with reader:
        mean, _ = stats.mean_and_var()
    with writer:
        bn.batch_norm(x, stats=stats)
        writer.synchronize()
    with reader:
        assert (mean.get() == 0).all()


def test_a_capture_replays_as_eager_calls_would() -> None:
    x = cupy.asarray(_drawn(6, 5))
    stats, alone = bn.RunningStats(5, like=x), bn.RunningStats(5)
    with Stream() as stream:
        bn.batch_norm(x, stats=stats)
        stream.begin_capture()
        machine.uploads = 0
        y, saved = bn.batch_norm_forward(x, stats=stats)
        dx = bn.batch_norm_backward(y, saved).x
        graph = stream.end_capture()
        for seed in range(1, 4):
            x[...] = cupy.asarray(_drawn(6, 5, seed=seed))
            graph.launch()
        bn.batch_norm(x, stats=stats)
        for seed in (0, 1, 2, 3, 3):
            batch = _drawn(6, 5, seed=seed)
            expected, its = bn.batch_norm_forward(batch, stats=alone)
        np.testing.assert_allclose(y.get(), expected, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(dx.get(), bn.batch_norm_backward(expected, its).x, atol=1e-5)
        np.testing.assert_allclose(stats.var.get(), alone.var, rtol=1e-6)
        assert (stats.num_updates, stats.count) == (alone.num_updates, alone.count) == (5, 30)


def test_what_a_capture_works_in_is_not_given_back() -> None:
    from bnarray.backends.cupy import _library

    x = cupy.asarray(_drawn(6, 5))
    with Stream() as stream:
        before = len(_library._captured)
        bn.batch_norm(x)
        assert len(_library._captured) == before
        stream.begin_capture()
        bn.batch_norm(x)
        stream.end_capture()
        assert len(_library._captured) > before


# -- Counters of blocks that wait for one another ----------------------------------------------------------------------


@pytest.fixture
def words(monkeypatch: pytest.MonkeyPatch) -> list[ndarray]:
    """All counters that are made."""
    from bnarray.backends.cupy import _kernels, _library

    made: list[ndarray] = []
    make = _library.words

    def note(number: int, like: ndarray) -> Any:
        array, address = make(number, like)
        made.append(array)
        return array, address

    monkeypatch.setattr(_library, "words", note)
    monkeypatch.setattr(_kernels, "_words", {})
    return made


def _step(x: ndarray) -> tuple[ndarray, ndarray]:
    y, saved = bn.batch_norm_forward(x)
    return y, bn.batch_norm_backward(y, saved).x


def test_a_stream_keeps_its_counters(words: list[ndarray]) -> None:
    x = cupy.asarray(_drawn(2, 1, 61))
    machine.stream().synchronize()
    streams_ = [Stream(), Stream()]
    for _ in range(2):
        for stream in streams_:
            with stream:
                bn.batch_norm(x)
    assert len(words) == 2
    with Device(1):
        bn.batch_norm(cupy.asarray(_drawn(2, 1, 61)))
    assert len(words) == 3
    for stream in (*streams_, *machine.streams.values()):
        stream.run_until(stream.given)
    assert not any(each._array.any() for each in words)


def test_more_blocks_have_more_counters(words: list[ndarray], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bnarray.backends._cuda.FEWEST_WORDS", 4)
    for features in (1, 2, 5, 4, 1):
        bn.batch_norm(cupy.asarray(_drawn(2, features, 61)))
    assert [each.size for each in words] == [4, 8, 16]


def test_only_so_many_streams_are_kept(words: list[ndarray], monkeypatch: pytest.MonkeyPatch) -> None:
    from bnarray.backends.cupy import _kernels

    monkeypatch.setattr("bnarray.backends._cuda.MOST_STREAMS", 3)
    x = cupy.asarray(_drawn(2, 1, 61))
    machine.stream().synchronize()
    for _ in range(5):
        with Stream():
            bn.batch_norm(x)
    assert (len(words), len(_kernels._words)) == (5, 3)


def test_streams_of_one_handle_share_no_counters(words: list[ndarray]) -> None:
    """CUDA means another stream in each thread by handle 2."""
    x = cupy.asarray(_drawn(2, 1, 61))
    machine.stream().synchronize()
    stream = Stream()
    stream.ptr = 2
    machine.streams[2] = stream
    with stream:
        bn.batch_norm(x)
        bn.batch_norm(x)
    assert len(words) == 2


def test_a_capture_has_its_own_counters(words: list[ndarray]) -> None:
    """A replay on one stream runs beside calls on the one that it was captured on."""
    x = cupy.asarray(_drawn(2, 1, 61))
    machine.stream().synchronize()
    with Stream() as stream:
        _step(x)
        assert len(words) == 1
        stream.begin_capture()
        y, dx = _step(x)
        graph = stream.end_capture()
        assert len(words) == 3
        _step(x)
        assert len(words) == 3
        stream.synchronize()
    with Stream() as other:
        for _ in range(2):
            graph.launch()
            other.synchronize()
            expected = _step(x)
            np.testing.assert_array_equal(y.get(), expected[0].get())
            np.testing.assert_array_equal(dx.get(), expected[1].get())
            for each in words[1:3]:
                assert not each._array.any()


def test_refused_amid_a_capture_is_one_more_skipped() -> None:
    x, few_x = cupy.asarray(_drawn(6, 5)), cupy.asarray(_drawn(5, 5))
    x[2, 2] = np.nan
    stats = bn.RunningStats(5, like=x, nonfinite="raise")
    few, empty = bn.RunningStats(5, like=x), bn.RunningStats(5, like=x)
    nothing = cupy.asarray(np.zeros((5, 1), bool))
    where = cupy.asarray(np.tri(5, dtype=np.float32))
    machine.stream().synchronize()  # nothing orders a capture after what is not captured
    with Stream() as stream:
        stream.begin_capture()
        bn.batch_norm(x, stats=stats)
        bn.batch_norm(few_x, stats=few, where=where)
        bn.batch_norm(few_x, stats=empty, where=nothing)
        stream.end_capture().launch()
        assert (stats.num_updates, stats.num_skipped) == (0, 1)
        assert (few.num_updates, few.num_skipped) == (0, 1)
        assert (empty.num_updates, empty.num_skipped) == (0, 0)


def test_results_stay_on_another_device_than_the_current_one() -> None:
    with Device(1):
        x, weight = cupy.asarray(_drawn(6, 5, 4)), cupy.asarray(np.ones(5, np.float32))
    stats = bn.RunningStats(5, like=x, update_rate=None)
    y, saved = bn.batch_norm_forward(x, weight, weight, stats=stats, out=x)
    gradients = bn.batch_norm_backward(y, saved)
    bn.batch_norm(x, stats=stats, training=False)
    m = bn.moments(x)
    stats.merge(stats.copy())
    arrays = y, *gradients, stats.mean, stats.var, m.mean, m.var(), (m + m).m2, stats.state_dict()["running_var"]
    assert {array.device for array in arrays} == {Device(1)}
    here = cupy.asarray(_drawn(6, 5, 4))
    bn.batch_norm(here, stats=stats)
    assert stats.mean.device == Device(1)
    assert stats.to(here).mean.device == Device(0)
    assert stats.num_updates == 3


# -- What is refused ---------------------------------------------------------------------------------------------------


def test_devices_do_not_mix() -> None:
    x = cupy.asarray(_drawn(6, 5))
    with Device(1):
        weight = cupy.asarray(np.ones(5))
    with pytest.raises(TypeError, match=r"weight is on the device .*1> and x on .*0>; move one of them.*weight"):
        bn.batch_norm(x, weight)
    with pytest.raises(TypeError, match=r"weight is an array of numpy and x one of cupy.*cupy\.asarray\(weight\)"):
        bn.batch_norm(x, np.ones(5))
    with pytest.raises(TypeError, match=r"weight is an array of cupy and x one of numpy.*cupy\.asnumpy\(weight\)"):
        bn.batch_norm(_drawn(6, 5), cupy.asarray(np.ones(5)))


@pytest.mark.parametrize("name", ["x", "weight", "where", "out"])
def test_memory_that_is_no_devices(name: str) -> None:
    arrays = {"x": _drawn(6, 5), "weight": np.ones(5), "where": np.ones((6, 5), bool), "out": _drawn(6, 5)}
    given = {
        each: ndarray(array, mem=cupy.cuda.UnownedMemory() if each == name else None) for each, array in arrays.items()
    }
    bn.batch_norm(**given)
    machine.foreign = 0
    with pytest.raises(ValueError, match=rf"{name} lies at 0x[0-9a-f]+, .* freed"):
        bn.batch_norm(**given)


def test_memory_of_another_device_than_the_array_says() -> None:
    with Device(1), pytest.raises(ValueError, match="x says that it is on device 1, and its memory is on device 0"):
        bn.batch_norm(ndarray(_drawn(6, 5), mem=cupy.cuda.UnownedMemory()))


def test_arguments() -> None:
    x = cupy.asarray(_drawn(6, 5))
    with pytest.raises(TypeError, match=r"x has dtype int64.*astype\(cupy.float32\)"):
        bn.batch_norm(cupy.asarray(np.ones((3, 3), int)))
    with pytest.raises(TypeError, match="where has dtype int64"):
        bn.batch_norm(x, where=cupy.asarray(np.ones((6, 5), int)))
    with pytest.raises(ValueError, match="where holds a weight that is negative"):
        bn.batch_norm(x, where=cupy.asarray(-np.ones((6, 5), np.float32)))
    with pytest.raises(ValueError, match="where has shape"):
        bn.batch_norm(x, where=cupy.asarray(np.ones((6, 4), bool)))
    big = cupy.asarray(_drawn(12, 5))
    with pytest.raises(ValueError, match="out overlaps x without being it"):
        bn.batch_norm(big[:6], out=big[1:7])
    with pytest.raises(ValueError, match="elements overlap"):
        bn.batch_norm(x, out=ndarray(np.broadcast_to(_drawn(1, 5), (6, 5))))
    shifted = ndarray(np.zeros(121, np.uint8)[1:].view(np.float32).reshape(6, 5))
    with pytest.raises(ValueError, match="out is not aligned"):
        bn.batch_norm(x, out=shifted)
    assert bn.batch_norm(x[:0]).shape == (0, 5)
    assert bn.batch_norm(big[::2], out=big[1::2]) is not None


def test_state_is_pickled() -> None:
    x = cupy.asarray(_drawn(6, 5))
    stats = bn.RunningStats(5, like=x)
    bn.batch_norm(x, stats=stats)
    state = stats.__getstate__()
    again = type(stats).__new__(type(stats))
    again.__setstate__(state)
    assert (again.num_updates, again.count) == (1, 6)
    np.testing.assert_array_equal(again.var.get(), stats.var.get())
