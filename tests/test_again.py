"""Calls like one before: the same bits, the same errors, the same care of state as in the first one."""

import copy
import pickle
import re
import threading
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import pytest

import bnarray as bn
from bnarray import functional
from bnarray.backends import _strided
from bnarray.backends import numpy as numpy_backend
from bnarray.kernels.cpu import memory, walk
from tests.fuzz.memory import forget_plans

rng = np.random.default_rng(7)


@pytest.fixture(autouse=True)
def _nothing_before() -> Iterator[None]:
    functional._again.clear()
    yield
    functional._again.clear()


@pytest.fixture(params=[(9, 4), (4000, 40)], ids=["small", "shared"])
def shape(request: pytest.FixtureRequest) -> tuple[int, int]:
    """Of an array that is worked on in one go, and of one that threads share."""
    made: tuple[int, int] = request.param
    return made


def _state(stats: bn.RunningStats) -> list[Any]:
    return [np.asarray(each).tolist() for each in stats.state_dict().values()]


def _made_anew(call: Callable[[], Any]) -> Any:
    functional._again.clear()
    return call()


def _as_before(call: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> Any:
    """The result of a call that is made like one before, which is checked."""
    functional._again.clear()
    call()
    made = [each for each in functional._again.values() if each is not None]
    assert made, "nothing was planned"
    with monkeypatch.context() as patch:
        patch.setattr(functional, "_checked", None)
        return call()


SHAPES = [
    ((32, 64), 1),
    ((7, 3), -1),
    ((8, 16, 8, 8), 1),
    ((4, 6, 6, 5), 3),
    ((2, 3, 4), (0, 2)),
    ((5,), ()),
    ((3, 1), 1),
    # Threads share these: in two kernels each way, of columns and of rows; in one.
    ((300, 500), 1),
    ((4, 9, 64, 60), 1),
    ((2, 16, 70, 70), 1),
]


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize(("shape", "axis"), SHAPES)
@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize("kinds", [(None, None), ("float32", "float32"), ("float64", None), (None, "float32")])
def test_the_same_bits(
    dtype: str, shape: tuple[int, ...], axis: Any, activation: str | None, kinds: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, dy = (rng.normal(3, 2, shape).astype(dtype) for _ in range(2))
    kept = (axis,) if isinstance(axis, int) else axis
    features = tuple(shape[each] for each in kept)
    weight, bias = (None if kind is None else np.asarray(rng.normal(size=features), kind) for kind in kinds)

    def forward_and_back() -> Any:
        stats = bn.RunningStats(features, correction=0)
        y, saved = bn.batch_norm_forward(x, weight, bias, stats=stats, axis=axis, activation=activation)
        gradients = bn.batch_norm_backward(dy, saved)
        moments = saved.moments
        return y, *gradients, moments.mean, moments.m2, moments.count, *_state(stats)

    for first, second in zip(_made_anew(forward_and_back), _as_before(forward_and_back, monkeypatch), strict=True):
        np.testing.assert_array_equal(np.asarray(first), np.asarray(second), strict=True)
        assert getattr(first, "strides", None) == getattr(second, "strides", None)
    np.testing.assert_array_equal(
        _made_anew(lambda: bn.batch_norm(x, weight, bias, axis=axis, activation=activation)),
        _as_before(lambda: bn.batch_norm(x, weight, bias, axis=axis, activation=activation), monkeypatch),
    )


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize(("shape", "axis"), SHAPES)
def test_the_same_bits_in_evaluation(
    dtype: str, shape: tuple[int, ...], axis: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, dy = (rng.normal(3, 2, shape).astype(dtype) for _ in range(2))
    kept = (axis,) if isinstance(axis, int) else axis
    features = tuple(shape[each] for each in kept)
    weight, bias = (np.asarray(rng.normal(size=features)) for _ in range(2))
    stats = bn.RunningStats(features, correction=0)
    stats.update(bn.moments(x, axis=axis))
    before = _state(stats)

    def forward_and_back() -> Any:
        y, saved = bn.batch_norm_forward(x, weight, bias, stats=stats, training=False, axis=axis)
        return y, *bn.batch_norm_backward(dy, saved)

    for first, second in zip(_made_anew(forward_and_back), _as_before(forward_and_back, monkeypatch), strict=True):
        np.testing.assert_array_equal(first, second, strict=True)
    assert _state(stats) == before


def test_mean_and_variance_to_evaluate_with(shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """As `Moments` of a count of 1, of any layout; what they hold is read at each call."""
    x, dy = (rng.normal(3, 2, shape).astype(np.float32) for _ in range(2))
    both = [rng.uniform(1, 2, (2, 2 * shape[1]))[:, ::2] for _ in range(2)]

    def forward_and_back(mean: Any, var: Any) -> Any:
        y, saved = bn.batch_norm_forward(x, stats=bn.Moments(1, mean, var), training=False)
        return y, bn.batch_norm_backward(dy, saved).x

    expected = [_made_anew(lambda given=given: forward_and_back(*given)) for given in both]
    monkeypatch.setattr(functional, "_checked", None)
    for given, results in zip(both, expected, strict=True):
        for first, second in zip(results, forward_and_back(*given), strict=True):
            np.testing.assert_array_equal(first, second, strict=True)


def test_moments_of_many_are_divided(shape: tuple[int, int]) -> None:
    x = rng.normal(3, 2, shape)
    m = bn.moments(x)
    bn.batch_norm(x, stats=bn.Moments(1, m.mean, m.var()), training=False)
    np.testing.assert_array_equal(bn.batch_norm(x, stats=m, training=False), bn.batch_norm(x))


@pytest.mark.parametrize("layout", ["F", "reversed", "every other", "read-only", "unaligned", "broadcast"])
def test_any_strides(layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x = rng.normal(size=(6, 5, 4)).astype(np.float32)
    match layout:
        case "F":
            x = np.asfortranarray(x)
        case "reversed":
            x = x[::-1, ::-1]
        case "every other":
            x = x[::2, :, ::2]
        case "read-only":
            x.setflags(write=False)
        case "unaligned":
            x = np.frombuffer(b"?" + x.tobytes(), np.uint8)[1:].view(np.float32).reshape(x.shape)
        case "broadcast":
            x = np.broadcast_to(x[:, :, :1], (6, 5, 4))
    np.testing.assert_array_equal(
        _as_before(lambda: bn.batch_norm(x), monkeypatch), _made_anew(lambda: bn.batch_norm(x)), strict=True
    )


def test_parameters_are_read_at_each_call(shape: tuple[int, int]) -> None:
    x, weight, bias = rng.normal(size=shape), np.ones(shape[1]), np.zeros(shape[1])
    plain = [bn.batch_norm(x, weight, bias) for _ in range(2)][1]
    weight[:], bias[:] = 3, 1
    np.testing.assert_allclose(bn.batch_norm(x, weight, bias), 3 * plain + 1)


def test_parameters_may_change_before_the_way_back(shape: tuple[int, int]) -> None:
    x, weight, bias = rng.normal(size=shape), np.full(shape[1], 2.0), np.zeros(shape[1])
    dy = rng.normal(size=shape)
    _, first = bn.batch_norm_forward(x, weight, bias)
    truth = bn.batch_norm_backward(dy, first)
    _, second = bn.batch_norm_forward(x, weight, bias)
    weight[:] = np.nan
    for a, b in zip(truth, bn.batch_norm_backward(dy, second), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("dy_dtype", ["float16", "float32", "float64"])
def test_gradients_of_another_dtype_and_layout(dy_dtype: str) -> None:
    x = rng.normal(size=(9, 4, 3)).astype(np.float32)
    dy = np.asfortranarray(rng.normal(size=(9, 4, 3)).astype(dy_dtype))
    saved = [bn.batch_norm_forward(x, np.ones(4))[1] for _ in range(2)]
    for a, b in zip(*(bn.batch_norm_backward(dy, each) for each in saved), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_wrong_dy_is_told_of_as_the_first_time(shape: tuple[int, int]) -> None:
    x = rng.normal(size=shape)
    for _ in range(2):
        _, saved = bn.batch_norm_forward(x)
        with pytest.raises(ValueError, match=re.escape(f"dy has shape {x.T.shape}")):
            bn.batch_norm_backward(x.T, saved)
        with pytest.raises(TypeError, match="dy has dtype int64"):
            bn.batch_norm_backward(np.ones(shape, np.int64), saved)
        with pytest.raises(ValueError, match="foreign byte order"):
            bn.batch_norm_backward(x.astype(x.dtype.newbyteorder()), saved)
        with pytest.raises(TypeError, match="dy is None"):
            bn.batch_norm_backward(None, saved)


def test_an_axis_that_is_a_number_only_to_python() -> None:
    x = rng.normal(size=(9, 4))
    bn.batch_norm(x, axis=1, eps=1)
    for wrong in ({"axis": True}, {"axis": 1.0}, {"axis": [1]}, {"eps": True}, {"eps": [1]}, {"activation": ["relu"]}):
        arguments: dict[str, Any] = {"axis": 1, "eps": 1, **wrong}
        functional._again.clear()
        first = second = None
        try:
            bn.batch_norm(x, **arguments)
        except (TypeError, ValueError) as error:
            first = str(error)
        bn.batch_norm(x, axis=1, eps=1)
        try:
            bn.batch_norm(x, **arguments)
        except (TypeError, ValueError) as error:
            second = str(error)
        assert first == second, wrong


@pytest.mark.parametrize("nonfinite", ["skip", "raise", "propagate"])
def test_what_is_not_finite(nonfinite: str, shape: tuple[int, int]) -> None:
    x = rng.normal(size=shape)
    bad = x.copy()
    bad[2, 1] = np.nan
    results = []
    for like_before in (False, True):
        functional._again.clear()
        stats = bn.RunningStats(shape[1], nonfinite=nonfinite)
        bn.batch_norm(x, stats=stats)
        if not like_before:
            functional._again.clear()
        if nonfinite == "raise":
            with pytest.raises(FloatingPointError):
                bn.batch_norm(bad, stats=stats)
        elif nonfinite == "skip":
            with pytest.warns(RuntimeWarning, match="skip it"):
                bn.batch_norm(bad, stats=stats)
        else:
            bn.batch_norm(bad, stats=stats)
        results.append(_state(stats))
    np.testing.assert_equal(*results)


def test_numbers_beyond_float32(shape: tuple[int, int]) -> None:
    x = rng.uniform(-3, 3, size=shape).astype(np.float32)
    far = x * np.float32(1e38)
    truth = bn.batch_norm(far)
    assert np.isfinite(truth).all()
    bn.batch_norm(x)
    np.testing.assert_array_equal(bn.batch_norm(far), truth)
    _, saved = bn.batch_norm_forward(x)
    dy = far.copy()
    functional._again.clear()
    _, anew = bn.batch_norm_forward(x)
    for a, b in zip(bn.batch_norm_backward(dy, saved), bn.batch_norm_backward(dy, anew), strict=True):
        np.testing.assert_array_equal(a, b)


def test_frozen_states_stay(shape: tuple[int, int]) -> None:
    x, stats = rng.normal(size=shape), bn.RunningStats(shape[1])
    bn.batch_norm(x, stats=stats)
    before = _state(stats)
    with stats.frozen():
        bn.batch_norm(x, stats=stats)
    assert _state(stats) == before
    bn.batch_norm(x, stats=stats)
    assert stats.num_updates == 2


def test_states_of_one_shape_and_different_settings() -> None:
    x = rng.normal(size=(2, 4))
    for settings in ({}, {"update_rate": 0.5}, {"correction": 0}, {"update_rate": None}, {"correction": 1.5}):
        expected, stats = (bn.RunningStats(4, **settings) for _ in range(2))
        for _ in range(3):
            expected.update(bn.moments(x))
            bn.batch_norm(x, stats=stats)
        assert _state(stats) == _state(expected)
    for _ in range(2):
        with pytest.raises(ValueError, match="too few for a running variance"):
            bn.batch_norm(x, stats=bn.RunningStats(4, correction=2))


def test_a_count_for_each_feature_goes_on(shape: tuple[int, int]) -> None:
    x, stats = rng.normal(size=shape), bn.RunningStats(shape[1])
    bn.batch_norm(x, stats=stats)
    bn.batch_norm(x, stats=stats, where=rng.random(shape) > 0.3)
    seen = np.array(stats.count)
    bn.batch_norm(x, stats=stats)
    np.testing.assert_array_equal(stats.count, seen + shape[0])


def test_results_of_a_state_stay_read_only(shape: tuple[int, int]) -> None:
    x, stats = rng.normal(size=shape), bn.RunningStats(shape[1])
    for _ in range(2):
        bn.batch_norm(x, stats=stats)
        for array in (stats.mean, stats.var):
            with pytest.raises(ValueError, match="read-only"):
                array[0] = 1
            with pytest.raises(ValueError, match="WRITEABLE"):
                array.setflags(write=True)


def test_no_update_is_lost_among_threads() -> None:
    x, stats = rng.normal(size=(32, 4)), bn.RunningStats(4)

    def train() -> None:
        for _ in range(300):
            bn.batch_norm(x, stats=stats)

    threads = [threading.Thread(target=train) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert stats.num_updates == 2400
    assert stats.count == 2400 * 32


def test_an_update_by_another_thread_in_between_is_not_lost(
    monkeypatch: pytest.MonkeyPatch, shape: tuple[int, int]
) -> None:
    x, stats = rng.normal(size=shape), bn.RunningStats(shape[1], update_rate=0.5)
    bn.batch_norm(x, stats=stats)
    exchange = bn.RunningStats.exchange

    def with_a_rival(self: bn.RunningStats, *arguments: Any) -> bool:
        monkeypatch.setattr(bn.RunningStats, "exchange", exchange)
        self.update(bn.moments(3 * x))
        return exchange(self, *arguments)

    monkeypatch.setattr(bn.RunningStats, "exchange", with_a_rival)
    bn.batch_norm(x, stats=stats)
    expected = bn.RunningStats(shape[1], update_rate=0.5)
    for factor in (1, 3, 1):
        expected.update(bn.moments(factor * x))
    assert _state(stats) == _state(expected)


def test_a_subclass_keeps_what_it_changes(shape: tuple[int, int]) -> None:
    class Loud(bn.RunningStats):
        def prepare(self, *arguments: Any) -> Any:
            heard.append(arguments)
            return super().prepare(*arguments)

    heard: list[Any] = []
    x = rng.normal(size=shape)
    bn.batch_norm(x, stats=bn.RunningStats(shape[1]))
    for _ in range(3):
        bn.batch_norm(x, stats=Loud(shape[1]))
    assert len(heard) == 3


def test_many_shapes_are_not_all_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(functional, "_MOST", 10)
    for size in range(2, 40):
        bn.batch_norm(rng.normal(size=(size, 3)))
    assert 0 < len(functional._again) <= 11


def test_where_arrays_are_made_otherwise_nothing_is_planned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(numpy_backend, "_HAS_HEADERS", False)
    x = rng.normal(size=(9, 4))
    for _ in range(3):
        np.testing.assert_allclose(bn.batch_norm(x), (x - x.mean(0)) / np.sqrt(x.var(0) + 1e-5))
    assert set(functional._again.values()) == {None}


def test_statistics_in_another_order_of_memory() -> None:
    x = rng.normal(size=(9, 2, 3))
    stats = bn.RunningStats((2, 3))
    mean, var = rng.normal(size=(3, 2)).T, rng.random((3, 2)).T + 1
    state = stats.state_dict() | {"running_mean": mean, "running_var": var, "count": 5}
    stats.load_state_dict(state)
    stats = stats.to(np.empty(0))
    expected = (x - mean) / np.sqrt(var + 1e-5)
    for _ in range(2):
        np.testing.assert_allclose(bn.batch_norm(x, stats=stats, training=False, axis=(1, 2)), expected)


@pytest.mark.parametrize("training", [False, True])
def test_out(training: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight, stats = rng.normal(size=(9, 4)).astype(np.float32), rng.normal(size=4), bn.RunningStats(4)
    expected = bn.batch_norm(x, weight, stats=stats.copy(), training=training)
    out = np.asfortranarray(np.full_like(x, np.nan))

    def into(out: Any) -> Any:
        return bn.batch_norm(x.copy() if out is not x else x, weight, stats=stats.copy(), training=training, out=out)

    assert _as_before(lambda: into(out), monkeypatch) is out
    np.testing.assert_array_equal(out, expected)
    assert into(x) is x
    np.testing.assert_array_equal(x, expected)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(("shape", "axis"), SHAPES)
def test_out_is_written_as_a_new_array_would_be(
    shape: tuple[int, ...], axis: Any, training: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, dy = (rng.normal(size=shape).astype(np.float32) for _ in range(2))
    features = tuple(shape[each] for each in ((axis,) if isinstance(axis, int) else axis))
    # (What skips warns, which is an error here, and might change its mind about out.)
    stats = bn.RunningStats(features, correction=0, nonfinite="propagate")
    weight = np.asarray(rng.normal(size=features))
    y, dx = np.full_like(x, np.nan), np.full_like(x, np.nan)

    def call(y: Any, dx: Any) -> Any:
        own = stats.copy()
        made, saved = bn.batch_norm_forward(x, weight, stats=own, training=training, axis=axis, out=y)
        gradients = bn.batch_norm_backward(dy, saved, out=dx)
        assert saved.x is x
        assert y is None or (made is y and gradients.x is dx)
        return made, *gradients[:2], *_state(own)

    expected = _made_anew(lambda: call(None, None))
    for make in (_made_anew, partial(_as_before, monkeypatch=monkeypatch)):
        for each, like in zip(make(lambda: call(y, dx)), expected, strict=True):
            np.testing.assert_array_equal(each, like)
        y[...] = dx[...] = np.nan
    assert bn.batch_norm(x, weight, stats=stats, training=training, axis=axis, out=y) is y
    np.testing.assert_array_equal(y, expected[0])


def test_out_in_place_of_what_is_needed(shape: tuple[int, int]) -> None:
    """Of x, which the backward pass needs; and of dy, which the call itself may need twice."""
    x, dy = (rng.normal(size=shape).astype(np.float32) for _ in range(2))
    y, saved = bn.batch_norm_forward(x)
    dx = bn.batch_norm_backward(dy, saved).x
    for _ in range(2):
        own, own_dy = x.copy(), dy.copy()
        made, saved = bn.batch_norm_forward(own, out=own)
        assert made is own
        assert bn.batch_norm_backward(own_dy, saved, out=own_dy).x is own_dy
        np.testing.assert_array_equal(own, y)
        np.testing.assert_array_equal(own_dy, dx)


@pytest.mark.parametrize("shape", [(9, 4), (4000, 40), (2, 16, 70, 70)])
def test_out_of_numbers_beyond_float32(shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """Which are found out after part of out was written."""
    x = (rng.normal(size=shape) * 1e30).astype(np.float32)
    x.T[0] = 0.5
    expected, saved = _made_anew(lambda: bn.batch_norm_forward(x))
    dx = bn.batch_norm_backward(x, saved).x
    out, out_dx = np.full_like(x, np.nan), np.full_like(x, np.nan)
    for _ in range(2):
        y, saved = bn.batch_norm_forward(x, out=out)
        assert y is out
        assert bn.batch_norm_backward(x, saved, out=out_dx).x is out_dx
        np.testing.assert_array_equal(out, expected)
        np.testing.assert_array_equal(out_dx, dx)
        out[...] = out_dx[...] = np.nan


@pytest.mark.parametrize("shape", [(9, 4), (4000, 40), (2, 16, 70, 70)])
def test_a_refused_update_leaves_out_alone(shape: tuple[int, ...]) -> None:
    x, stats = rng.normal(size=shape).astype(np.float32), bn.RunningStats(shape[1], nonfinite="raise")
    few = np.ones((1, 4), np.float32)
    for _ in range(2):
        bn.batch_norm(x, stats=stats)
    before, wrong, out, few_out = _state(stats), x.copy(), np.full_like(x, 7), np.full_like(few, 7)
    wrong.T[0] = np.inf
    for _ in range(2):
        with pytest.raises(FloatingPointError, match="NaN or an infinity"):
            bn.batch_norm(wrong, stats=stats, out=out)
        with pytest.raises(ValueError, match="too few"):
            bn.batch_norm(few, stats=bn.RunningStats(4), out=few_out)
    assert (out == 7).all()
    assert (few_out == 7).all()
    assert _state(stats) == before


def test_a_warning_that_is_an_error_leaves_out_alone() -> None:
    x, stats = rng.normal(size=(9, 4)), bn.RunningStats(4)
    wrong, out = np.full_like(x, np.nan), np.full_like(x, 7)
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        assert stats.is_sure(9)
        assert not stats.is_sure(1)
        assert bn.RunningStats(4, update_rate=None).is_sure(1)
        for filtered in ({"category": RuntimeWarning}, {"message": "the batch's"}, {"module": "tests"}):
            with warnings.catch_warnings():
                warnings.filterwarnings("error", **filtered)  # type: ignore[arg-type]  # of one of these types
                assert not stats.is_sure(9), filtered
                assert bn.RunningStats(4, nonfinite="propagate").is_sure(9)
        warnings.filterwarnings("error", category=DeprecationWarning)
        assert stats.is_sure(9)
        warnings.filterwarnings("error", category=RuntimeWarning)
        for _ in range(2):
            bn.batch_norm(x, stats=stats)
            with pytest.raises(RuntimeWarning, match="NaN or an infinity"):
                bn.batch_norm(wrong, stats=stats, out=out)
    assert (out == 7).all()
    assert (stats.num_updates, stats.num_skipped) == (2, 0)


@pytest.mark.parametrize("shape", [(9, 4), (4000, 40), (2, 16, 70, 70)])
def test_a_batch_that_is_left_out_is_written_to_out(shape: tuple[int, ...]) -> None:
    x, stats = rng.normal(size=shape).astype(np.float32), bn.RunningStats(shape[1])
    bn.batch_norm(x, stats=stats)
    before, out = stats.mean, np.full_like(x, 7)
    x.T[0] = np.inf
    for skipped in (1, 2):
        with pytest.warns(RuntimeWarning, match="NaN or an infinity"):
            assert bn.batch_norm(x, stats=stats, out=out) is out
        np.testing.assert_array_equal(out, bn.batch_norm(x))
        assert (stats.num_skipped, stats.num_updates) == (skipped, 1)
        np.testing.assert_array_equal(stats.mean, before)
        out[...] = 7


@pytest.fixture
def as_if_large(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], None]]:
    """Has arrays of any size treated, from when it is called, as those that no cache holds."""

    def make_large() -> None:
        forget_plans()
        monkeypatch.setattr(_strided, "LARGE", 1)
        monkeypatch.setattr(_strided, "STREAMED", 1)

    yield make_large
    monkeypatch.undo()
    forget_plans()


OPTIONS: list[dict[str, Any]] = [{}, {"activation": "relu"}, {"where": True}, {"residual": True, "activation": "relu"}]


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize(("shape", "axis"), [((40, 300), 1), ((3, 7, 41, 13), 1), ((2, 16, 70, 70), 1), ((900, 3), 1)])
@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "-".join(options) or "plain")
@pytest.mark.parametrize("layout", ["C", "F", "unaligned", "shifted", "sliced", "reversed", "in place"])
def test_large_arrays_have_the_same_bits(
    dtype: str, shape: tuple[int, ...], axis: int, options: dict[str, Any], layout: str, as_if_large: Callable[[], None]
) -> None:
    x, dy, residual = (rng.normal(3, 2, shape).astype(dtype) for _ in range(3))
    given = options | ({"where": rng.random(shape) < 0.7} if "where" in options else {})
    given |= {"residual": residual} if "residual" in options else {}

    seven = np.frombuffer(b"\7" * 8, dtype)[0]

    def place(values: Any) -> tuple[Any, Any]:
        """Bytes, and an array in the middle of them to write to."""
        around, item = np.full((4 * values.size + 200) * values.itemsize, 7, np.uint8), values.itemsize
        begin = {"shifted": 67 * item, "unaligned": 65}.get(layout, 64 * item)
        array = around[begin : begin + values.size * item].view(dtype).reshape(shape)
        if layout == "F":
            array = array.reshape(shape[::-1]).T
        if layout in ("sliced", "reversed"):
            whole = around.view(dtype)[: 4 * values.size].reshape(2 * shape[0], *shape[1:-1], 2 * shape[-1])
            array = whole[::-2, ..., : shape[-1]] if layout == "reversed" else whole[1::2, ..., 3 : 3 + shape[-1]]
        return around, array

    def call(write: bool) -> list[Any]:
        (around, y), (around_dx, dx) = place(x), place(x)
        own_x, own_dy = x, dy
        if layout == "in place":
            y[...], dx[...] = x, dy
            own_x, own_dy = (y, dx) if write else (x, dy)
        made, saved = bn.batch_norm_forward(own_x, axis=axis, **given, **({"out": y} if write else {}))
        gradients = bn.batch_norm_backward(own_dy, saved, **({"out": dx} if write else {}))
        results = [np.array(each) for each in (made, *gradients) if each is not None]
        y[...] = dx[...] = seven
        assert (around == 7).all(), "bytes beside y have changed"
        assert (around_dx == 7).all(), "bytes beside dx have changed"
        return results

    expected = call(write=False)
    as_if_large()
    for write in (False, True, True):
        for each, like in zip(call(write), expected, strict=True):
            np.testing.assert_array_equal(each, like, strict=True)


def test_only_large_arrays_of_the_callers_go_past_the_caches() -> None:
    step = _strided.normalize_step(memory.FLOAT32, (4096, 4096), (1,), False, *[(16384, 4)] * 3)
    assert step.grid[walk.LEAD] == _strided.AHEAD
    assert not step.into(False).grid[walk.STREAMED]
    assert step.into(True).grid[walk.STREAMED]
    step = _strided.normalize_step(memory.FLOAT32, (64, 4096), (1,), False, *[(16384, 4)] * 3)
    assert not step.into(True).grid[[walk.LEAD, walk.STREAMED]].any()


def test_a_wrong_out_changes_nothing() -> None:
    x, stats = rng.normal(size=(9, 4)), bn.RunningStats(4)
    bn.batch_norm(x, stats=stats)
    before, memory = _state(stats), np.zeros(40)
    read_only = np.zeros((9, 4))
    read_only.setflags(write=False)
    overlapping = np.zeros(44)
    inside = overlapping[:36].reshape(9, 4)
    inside[...] = x
    wrong: list[tuple[Any, Any, type[Exception]]] = [
        (x, np.zeros((4, 9)), ValueError),
        (x, np.zeros((9, 4), np.float32), TypeError),
        (x, read_only, TypeError),
        (x, np.broadcast_to(memory[:4], (9, 4)), TypeError),
        (inside, overlapping[4:40].reshape(9, 4), ValueError),
        (x, [[0.0] * 4] * 9, TypeError),
    ]
    for array, out, error in wrong:
        with pytest.raises(error, match="out"):
            bn.batch_norm(array, stats=stats, out=out)
    assert _state(stats) == before


def test_what_is_saved_can_be_copied() -> None:
    """By a pickle too: another process goes back from it with the same bits."""
    x, dy, weight = rng.normal(size=(6, 3)), rng.normal(size=(6, 3)), rng.normal(size=3)
    for _ in range(2):
        _, saved = bn.batch_norm_forward(x, weight)
        expected = bn.batch_norm_backward(dy, saved)
        for twin in (copy.copy(saved), copy.deepcopy(saved), pickle.loads(pickle.dumps(saved))):
            for ours, theirs in zip(bn.batch_norm_backward(dy, twin)[:2], expected[:2], strict=True):
                np.testing.assert_array_equal(ours, theirs)
    assert saved.again is not None
