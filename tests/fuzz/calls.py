"""What is called, with what, and what has to come of it.

Every function here draws one call (or a short history of calls) from a source of random numbers and judges it: a right
answer by the reference of `bnarray.testing`, or the exception that was due, with nothing changed. `Random` serves for
long runs and Hypothesis's for short ones; a seed gives the same call again.
"""

import copy
import os
import pickle
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from functools import cache
from itertools import pairwise
from math import prod
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest

import bnarray as bn
from bnarray.testing import TOLERANCES, assert_close, reference
from tests.cases import DTYPES
from tests.fuzz.memory import Memory

#: What was called, and how often; how often it was refused.
tally: Counter[str] = Counter()

REFUSALS = TypeError, ValueError

# -- Values ------------------------------------------------------------------------------------------------------------


def _numpy(r: Random) -> np.random.Generator:
    return np.random.default_rng(r.getrandbits(32))


def _shape(r: Random, least: int = 0, most: int = 6) -> tuple[int, ...]:
    """Mostly small; sometimes longer than tiles and pieces of work; sometimes with an axis of size 0."""
    ndim = r.randint(least, most)
    sizes = [r.choice([1, 2, 3, 4, 5, 7, 8, 9, 17]) for _ in range(ndim)]
    for axis in r.sample(range(ndim), ndim):
        if prod(sizes) > 20_000:
            sizes[axis] = 1
    if ndim and r.random() < 0.1:
        sizes[r.randrange(ndim)] = 0
    elif ndim and r.random() < 0.15:
        axis = r.randrange(ndim)
        sizes[axis] = r.choice([33, 255, 257, 1025, 4097, 16385, 70_000])
        for other in range(ndim):
            if other != axis and prod(sizes) > 150_000:
                sizes[other] = 1
    return tuple(sizes)


@dataclass
class Values:
    """Numbers of one kind, and whether the reference can judge what is made of them, to the last places."""

    array: np.ndarray
    is_tame: bool


def _values(r: Random, shape: tuple[int, ...], dtype: Any, tame: bool = False) -> Values:
    rng, kind = _numpy(r), "normal" if tame else r.choice(["normal"] * 6 + ["far", "equal", "whole", "wild", "bad"])
    plain = rng.normal(rng.normal(0, 3), rng.uniform(0.5, 3), shape)
    with np.errstate(all="ignore"):
        if kind == "normal":
            return Values(plain.astype(dtype), True)
        if kind == "far":
            return Values((plain + r.choice([1e3, -1e5])).astype(dtype), dtype in (np.float32, np.float64))
        if kind == "equal":
            return Values(np.full(shape, rng.normal(0, 3)).astype(dtype), True)
        if kind == "whole":
            return Values(rng.integers(-2, 3, shape).astype(dtype), True)
        if kind == "wild":
            return Values((plain * 10.0 ** rng.integers(-300, 300, shape)).astype(dtype), False)
        bad = rng.choice([np.nan, np.inf, -np.inf, 0.0, -0.0, 65504.0], shape)
        return Values(np.where(rng.random(shape) < 0.1, bad, plain).astype(dtype), False)


# -- A forward call, and backward --------------------------------------------------------------------------------------


@dataclass
class Call:
    """The arguments of a call, and what is wrong with them."""

    memory: Memory
    x: np.ndarray
    kept: tuple[int, ...]
    keywords: dict[str, Any] = field(default_factory=dict)
    wrong: str | None = None
    is_tame: bool = True

    @property
    def features(self) -> tuple[int, ...]:
        return tuple(self.x.shape[i] for i in self.kept)


def _axis(r: Random, kept: tuple[int, ...], ndim: int) -> Any:
    """One of the ways to name axes."""
    named = [i - ndim if r.random() < 0.3 else i for i in kept]
    r.shuffle(named)
    if len(named) == 1 and r.random() < 0.6:
        return r.choice([int, np.int64, np.uint8 if named[0] >= 0 else np.int8])(named[0])
    return tuple(named)


def _where(r: Random, shape: tuple[int, ...]) -> np.ndarray:
    own = tuple(size if r.random() < 0.6 else 1 for size in shape[r.randint(0, len(shape)) :])
    rng = _numpy(r)
    mask = rng.random(own) < r.choice([0.0, 0.3, 0.9, 1.0])
    dtype = r.choice([np.bool, np.bool, np.float16, np.float32, np.float64])
    return np.asarray(mask if dtype is np.bool else (mask * rng.uniform(0.5, 3, own)).astype(dtype))


def _draw(r: Random, least: int = 0) -> Call:
    dtype = DTYPES[r.choice(list(DTYPES))]
    shape = _shape(r, least)
    values = _values(r, shape, dtype)
    memory = Memory(r)
    kept = tuple(sorted(r.sample(range(len(shape)), r.randint(0, len(shape)))))
    call = Call(memory, memory.array(values.array), kept, is_tame=values.is_tame)
    with np.errstate(all="ignore"):
        call.is_tame &= call.x.size == 0 or bool(np.array_equal(call.x, values.array))  # not where windows overlap
    call.keywords["axis"] = _axis(r, kept, len(shape))
    if r.random() < 0.5:
        call.keywords["eps"] = r.choice([0, 1e-5, 1e-2, 1, np.float32(0.5), True])
    for name in ("weight", "bias"):
        if r.random() < 0.5:
            own = _values(r, call.features, DTYPES[r.choice(list(DTYPES))])
            call.is_tame &= own.is_tame
            call.keywords[name] = memory.array(own.array)
    if r.random() < 0.3:
        where = memory.array(_where(r, shape))
        if where.dtype == np.bool or where.size == 0 or (where.min() >= 0 and where.max() < np.inf):
            call.keywords["where"] = where
    if r.random() < 0.3:
        own = _values(r, shape, dtype)
        call.keywords["residual"] = call.x if r.random() < 0.1 else memory.array(own.array)
        call.is_tame &= own.is_tame
    if r.random() < 0.4:
        call.keywords["activation"] = "relu"
    return call


def _spoil(r: Random, call: Call) -> None:
    """Make one argument wrong."""
    x, ndim = call.x, call.x.ndim
    other = r.choice([each for each in DTYPES.values() if each != x.dtype])

    def replaced(name: str, *candidates: Any) -> None:
        call.keywords[name] = r.choice(candidates)

    longer = (*call.features, 2)
    objects: list[Any] = ["x", 3, [1.0], {}, object(), np.ma.ones(longer), b"", type, np.ones(longer, np.int32)]
    kinds: dict[str, Callable[[], None]] = {
        "x": lambda: setattr(
            call, "x", r.choice([None, *objects, np.ones(x.shape, complex), np.ones(x.shape, object), x.tolist()])
        ),
        "weight": lambda: replaced("weight", *objects, np.ones(longer), np.ones(call.features, ">f4")),
        "bias": lambda: replaced("bias", *objects, np.ones(longer), np.ones(call.features, np.complex64)),
        "where": lambda: replaced("where", *objects, np.ones((*x.shape, 2)), np.ones((2, *x.shape), bool)),
        "residual": lambda: replaced("residual", *objects, np.ones((*x.shape, 1), x.dtype), np.ones(x.shape, other)),
        "out": lambda: replaced("out", *objects, np.ones((*x.shape, 1), x.dtype), np.ones(x.shape, other)),
        "axis": lambda: replaced("axis", ndim, -ndim - 1, 10**30, -(2**63), 1.0, None, "1", (0, 0) * 2, [0], (0.5,)),
        "eps": lambda: replaced("eps", -1, -1e-300, np.nan, np.inf, 10**400, "1", None, 1j, [1], np.ones(2), object()),
        "activation": lambda: replaced("activation", "gelu", "RELU", b"relu", 1, True, ["relu"], np.ones(2), len),
        "stats": lambda: replaced("stats", "s", 1, {}, bn.RunningStats(longer), bn.RunningStats, np.ones(longer)),
        "group": lambda: replaced("group", 1, "world", object(), type, []),
        "keyword": lambda: replaced(r.choice(["momentum", "training_", "epsilon"]), 0.1, None),
    }
    if x.size:
        kinds["weights"] = lambda: replaced(
            "where", *(np.full((1,) * ndim, bad) for bad in (-1.0, np.nan, np.inf, -np.inf))
        )
        kinds["read-only"] = lambda: replaced("out", _read_only(np.zeros(x.shape, x.dtype)))
    if max(x.shape, default=0) > 1 and x.size:
        kinds["repeats"] = lambda: replaced("out", np.lib.stride_tricks.as_strided(x.copy(), x.shape, (0,) * ndim))
    call.wrong = r.choice(list(kinds))
    kinds[call.wrong]()


def _read_only(array: np.ndarray) -> np.ndarray:
    array.flags.writeable = False
    return array


def _is_same(a: np.ndarray, b: np.ndarray) -> bool:
    steps = zip(a.shape, a.strides, b.strides, strict=True)
    return a.ctypes.data == b.ctypes.data and a.dtype == b.dtype and all(s == t for size, s, t in steps if size > 1)


def _choose_out(r: Random, call: Call, inputs: dict[str, np.ndarray], allowed: tuple[str, ...]) -> None:
    """Memory for the result: new, an input's own (which may be refused), or across an input's."""
    like = call.x
    kind = r.choice(["new", "same", "across"])
    if kind == "new" or like.size == 0:
        call.keywords["out"] = call.memory.array(np.zeros(like.shape, like.dtype), repeats=False)
        return
    array = inputs[r.choice(list(inputs))]
    if kind == "same":
        out = array
    else:  # a view of the memory under an input, with other strides, or shifted
        whole: Any = array
        while isinstance(whole.base, np.ndarray):
            whole = whole.base
        most = array.ctypes.data - whole.ctypes.data + array.itemsize
        strides = r.choice([array.strides, like.strides, np.empty(like.shape, like.dtype).strides])
        if len(strides) != like.ndim:
            return
        low = sum(min(0, step * (size - 1)) for step, size in zip(strides, like.shape, strict=True))
        high = sum(max(0, step * (size - 1)) for step, size in zip(strides, like.shape, strict=True))
        begin = most - array.itemsize + r.choice([0, like.itemsize, -like.itemsize, 2 * like.itemsize])
        if begin + low < 4096 or begin + high + like.itemsize > whole.size - 4096:
            return
        out = np.ndarray(like.shape, like.dtype, whole, begin, strides)
    if out.shape != like.shape or out.dtype != like.dtype or not out.flags.writeable:
        return
    call.keywords["out"] = out
    spans = sorted((abs(step), size) for step, size in zip(out.strides, out.shape, strict=True) if size > 1)
    extent = out.itemsize
    for step, size in spans:
        if step < extent:
            call.wrong = "out overlaps itself"  # (or might: the library's rule, which no useful memory breaks)
            return
        extent += step * (size - 1)
    for name, each in inputs.items():
        if np.shares_memory(out, each) and not (name in allowed and _is_same(out, each)):
            call.wrong = f"out overlaps {name}"


@contextmanager
def _watched(call: Call, *states: bn.RunningStats) -> Iterator[list[warnings.WarningMessage]]:
    """Warnings are collected; when something is raised, nothing has changed."""
    before = [state._state for state in states]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            yield caught
        except BaseException:
            assert not call.memory.changed(), "a call that raised has written to memory"
            for state, old in zip(states, before, strict=True):
                assert state._state is old, "a call that raised has changed the statistics"
            raise


def _expect_refusal(
    call: Call, run: Callable[[], Any], *states: bn.RunningStats, kinds: tuple[type[Exception], ...] = REFUSALS
) -> None:
    tally[f"refused: {call.wrong}"] += 1
    said = ""
    try:
        with _watched(call, *states):
            run()
    except kinds as error:
        said = str(error)
    assert said, f"{call.wrong} was not refused, or without a word"


def _stats(r: Random, features: tuple[int, ...]) -> bn.RunningStats:
    stats = bn.RunningStats(
        features,
        update_rate=r.choice([None, 0, 0.1, 0.5, 1]),
        correction=r.choice([0, 0.5, 1, 3]),
        nonfinite=r.choice(["skip", "raise", "propagate"]),
    )
    if r.random() < 0.7:
        rng = _numpy(r)
        stats.load_state_dict(
            {
                "running_mean": rng.normal(size=features),
                "running_var": rng.uniform(0.5, 3, features),
                "count": r.choice([7, 2.5, rng.integers(4, 9, features).astype(float)]),
                "num_updates": 3,
                "num_skipped": 1,
            }
        )
    return stats


def _snapshot(stats: bn.RunningStats) -> list[np.ndarray]:
    """What there is to know of the statistics; last what an exact variance is made of."""
    state = stats._state
    m2 = np.zeros_like(state.var) if state.m2 is None else state.m2
    return [np.array(each) for each in (state.mean, state.var, state.count, state.num_updates, state.num_skipped, m2)]


def _assert_updated(stats: bn.RunningStats, before: list[np.ndarray], m: bn.Moments) -> None:
    """What an update with a batch that is not refused makes of the statistics."""
    mean, var, count, updates, skipped, squares = before
    n, correction = np.broadcast_to(np.asarray(m.count, np.float64), mean.shape), stats.correction
    nothing = m.count == 0 if isinstance(m.count, int | float) else not (n > 0).any()
    finite = bool(np.isfinite(m.mean).all() and np.isfinite(m.m2).all())
    if nothing:
        expected = before
    elif not finite and stats.nonfinite == "skip":
        expected = [mean, var, count, updates, skipped + 1, squares]
    else:
        with np.errstate(all="ignore"):
            own = m.m2 / (n - correction)
            if stats.update_rate is None:
                total = count + n
                some = np.where(total == 0, 1, total)
                delta = m.mean - mean
                new = np.where(n == 0, mean, np.where(count == 0, m.mean, mean + delta * (n / some)))
                between = delta**2 * count * n / some
                m2 = np.where(n == 0, squares, np.where(count == 0, m.m2, squares + m.m2 + between))
                new_var = np.where(total > correction, m2 / (total - correction), 1)
            else:
                rate, m2 = stats.update_rate, squares
                new = np.where(n > 0, (1 - rate) * mean + rate * m.mean, mean)
                new_var = np.where(n > 0, (1 - rate) * var + rate * own, var)
        expected = [new, new_var, count + n if np.ndim(m.count) else count + m.count, updates + 1, skipped, m2]
    if all(np.isfinite(each).all() and (abs(each) < 1e140).all() for each in expected):
        for ours, theirs in zip(_snapshot(stats), expected, strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-9, atol=1e-12)
    else:
        assert stats.num_updates == expected[3]
        assert stats.num_skipped == expected[4]


def _refuses_update(stats: bn.RunningStats, m: bn.Moments) -> type[Exception] | None:
    n = np.atleast_1d(np.asarray(m.count, np.float64))
    counted = n[n > 0]
    if counted.size == 0:
        return None
    if stats.update_rate is not None and counted.min() <= stats.correction:
        return ValueError
    finite = bool(np.isfinite(m.mean).all() and np.isfinite(m.m2).all())
    return FloatingPointError if not finite and stats.nonfinite == "raise" else None


def _is_known(truth: Any, call: Call, eps: float) -> bool:
    """Whether the reference knows the answer to the last places: variances that are more than rounding."""
    with np.errstate(all="ignore"):
        spread = truth.var + float(eps)
        small = (spread < 1e-7 * (1 + truth.mean**2)) & (truth.count > 0)
    return call.is_tame and not bool(small.any())


def _scale(of: np.ndarray, truth: Any, kept: tuple[int, ...], eps: float) -> np.ndarray:
    """The scale of the reference; not 0 where values happen to be their feature's mean, which is itself rounded."""
    if of.size == 0:
        return of
    reduced = tuple(i for i in range(of.ndim) if i not in kept)
    with np.errstate(all="ignore"):
        deviations = np.nan_to_num(abs(truth.mean) / np.sqrt(truth.var + eps))
    return np.maximum(of, 1e-9 * of.max(axis=reduced, keepdims=True) * np.maximum(1, deviations))


def _rehearse(call: Call, stats: Any) -> None:
    """Make a call that is like the one to come, which is then made as one before."""
    keywords = call.keywords | ({"stats": copy.copy(stats)} if stats is not None else {})
    with warnings.catch_warnings(), suppress(*REFUSALS, FloatingPointError):
        warnings.simplefilter("ignore")
        bn.batch_norm(call.x, **keywords)


def forward_and_backward(r: Random) -> None:
    call = _draw(r)
    features, evaluate = call.features, r.random() < 0.25
    stats: Any = None
    if evaluate or r.random() < 0.4:
        stats = _stats(r, features)
        if evaluate and r.random() < 0.4:
            rng = _numpy(r)
            stats = bn.Moments(r.choice([0, 1, 5, 2.5]), rng.normal(size=features), rng.uniform(0.5, 9, features))
        call.keywords["stats"] = stats
    if evaluate:
        call.keywords["training"] = False
    inputs = {"x": call.x, **{k: v for k, v in call.keywords.items() if isinstance(v, np.ndarray) and k != "eps"}}
    if r.random() < 0.5:
        _rehearse(call, stats)
    if r.random() < 0.4:
        _choose_out(r, call, inputs, ("x", "residual"))
    if call.wrong is None and r.random() < 0.25:
        _spoil(r, call)
    function = r.choice([bn.batch_norm, bn.batch_norm_forward])
    states = [stats] if isinstance(stats, bn.RunningStats) else []
    if call.wrong:
        _expect_refusal(call, lambda: function(call.x, **call.keywords), *states)
        return
    _judge_forward(r, call, function, stats, evaluate, states)


def _judge_forward(
    r: Random, call: Call, function: Callable[..., Any], stats: Any, evaluate: bool, states: list[bn.RunningStats]
) -> None:
    x, keywords, kept = call.x, call.keywords, call.kept
    out, where = keywords.get("out"), keywords.get("where")
    eps, relu = keywords.get("eps", 1e-5), "activation" in keywords
    inputs = {name: np.array(keywords[name]) for name in ("weight", "bias", "residual") if name in keywords}
    original, full = np.array(x), None if where is None else np.array(where)
    m = bn.moments(x, axis=keywords["axis"], where=where)
    before = [_snapshot(each) for each in states]
    due = None if evaluate or not states else _refuses_update(stats, m)
    tally[f"{function.__name__}{' in evaluation' * evaluate}"] += 1
    if due is not None:
        with pytest.raises(due), _watched(call, *states):
            function(x, **keywords)
        return
    with _watched(call, *states) as caught:
        result = function(x, **keywords)
    y, saved = (result, None) if function is bn.batch_norm else result
    said = [each for each in caught if "num_skipped" not in str(each.message)]
    assert not said, said[0]
    assert not call.memory.changed(out), "memory outside of out has changed"
    assert (y is out) if out is not None else (y.shape, y.dtype, type(y)) == (x.shape, x.dtype, np.ndarray)
    if out is None and x.size:
        assert y.strides == np.empty_like(original if x.flags.forc else x, subok=False).strides or y.flags.forc
    if evaluate:
        for state, old in zip(states, before, strict=True):
            _assert_untouched(state, old)
    elif states:
        _assert_updated(stats, before[0], m)
    dy = _values(r, x.shape, x.dtype if r.random() < 0.8 else DTYPES[r.choice(list(DTYPES))])
    statistics = None
    if evaluate:
        statistics = (before[0][0], before[0][1]) if states else (stats.mean, _variance(stats))
    with np.errstate(all="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        truth = reference(
            original, dy.array, kept, relu=relu, statistics=statistics, eps=float(eps), where=full, **inputs
        )
    known, tolerance = _is_known(truth, call, eps), TOLERANCES[x.dtype.name]
    if known:
        # Weights are added one by one: of some thousand equal ones the sum is wrong by 100 units in the last place.
        most = 512 if where is not None and x.dtype == np.float64 else tolerance.y
        assert_close(y, truth.y, _scale(truth.y_scale, truth, kept, float(eps)), tolerance, most)
        if not evaluate:
            _assert_moments(m, truth, call.features, tolerance.moments)
    if saved is None:
        return
    if not evaluate:
        for ours, theirs in ((saved.moments.mean, m.mean), (saved.moments.m2, m.m2), (saved.moments.count, m.count)):
            np.testing.assert_array_equal(ours, theirs)
    _judge_backward(r, call, saved, dy, truth, known, relu)


def _variance(m: bn.Moments) -> np.ndarray:
    return np.ones_like(m.m2) if m.count == 0 else m.m2 / m.count


def _assert_untouched(stats: bn.RunningStats, before: list[np.ndarray]) -> None:
    for ours, theirs in zip(_snapshot(stats), before, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def _assert_moments(m: bn.Moments, truth: Any, features: tuple[int, ...], tolerance: float) -> None:
    count, mean, var = (each.reshape(features) for each in (truth.count, truth.mean, truth.var))
    np.testing.assert_allclose(np.broadcast_to(m.count, features), count, rtol=1e-6)
    assert (abs(m.mean - np.where(count > 0, mean, 0)) <= tolerance * (np.sqrt(var) + abs(mean))).all()
    np.testing.assert_allclose(m.m2, np.where(count > 0, var * count, 0), rtol=10 * tolerance, atol=1e-12)


def _judge_backward(r: Random, call: Call, saved: Any, dy: Values, truth: Any, known: bool, relu: bool) -> None:
    x = call.x
    given = call.memory.array(dy.array)
    with np.errstate(all="ignore"):
        known = known and dy.is_tame and bool(np.array_equal(given, dy.array))
    back = Call(Memory(r), x, call.kept)
    back.memory._blocks = [(inside, inside.copy()) for inside, _ in call.memory._blocks]
    if r.random() < 0.4:
        needed = {"x": saved.x, "where": saved.where, "residual": saved.transform.residual}
        inputs = {"dy": given, **{name: each for name, each in needed.items() if each is not None}}
        _choose_out(r, back, inputs, ("dy",))
    if back.wrong is None and r.random() < 0.1:
        back.wrong = "dy"
        given = r.choice([None, "dy", [1.0], np.ones((*x.shape, 2), x.dtype), np.ones(x.shape, int), 3, np.ma.ones(2)])
    if back.wrong:
        _expect_refusal(back, lambda: bn.batch_norm_backward(given, saved, **back.keywords))
        return
    tally["batch_norm_backward"] += 1
    out = back.keywords.get("out")
    with _watched(back) as caught:
        found = bn.batch_norm_backward(given, saved, **back.keywords)
    assert not caught, caught[0]
    assert not back.memory.changed(out), "memory outside of out has changed"
    assert (found.x is out) if out is not None else (found.x.shape, found.x.dtype) == (x.shape, x.dtype)
    for name in ("weight", "bias"):
        given_parameter = call.keywords.get(name)
        assert (getattr(found, name) is None) == (given_parameter is None)
        if given_parameter is not None:
            assert getattr(found, name).dtype == given_parameter.dtype
            assert getattr(found, name).shape == call.features
    clear = (abs(truth.y) > 1e-6 * truth.y_scale) | (truth.y == 0) if relu else np.ones(x.shape, bool)
    if not known or not clear.all() or (relu and bool(((truth.y == 0) & (truth.y_scale == 0)).any())):
        return
    if relu and not _is_clear_of_the_kink(call, truth):
        return
    tolerance = TOLERANCES[x.dtype.name]
    scale = _scale(truth.dx_scale, truth, call.kept, float(call.keywords.get("eps", 1e-5)))
    assert_close(found.x, truth.dx, scale, tolerance, tolerance.dx)
    for name, exact, scale in (
        ("weight", truth.dweight, truth.dweight_scale),
        ("bias", truth.dbias, truth.dbias_scale),
    ):
        ours = getattr(found, name)
        if ours is not None:
            largest = TOLERANCES[ours.dtype.name].largest
            rounding = TOLERANCES[ours.dtype.name].epsilon * abs(exact) + TOLERANCES[ours.dtype.name].tiny
            with np.errstate(all="ignore"):
                near = abs(ours.astype(np.float64) - exact) <= 1e-12 + tolerance.sums * scale + rounding
            assert (near | (abs(exact) > largest)).all(), f"gradient of {name}"


def _is_clear_of_the_kink(call: Call, truth: Any) -> bool:
    """Whether every z is clearly on one side of 0. (Where y is 0, z has no trace in y.)"""
    keywords = dict(call.keywords, activation=None, training=True)
    if "training" in call.keywords or "out" in call.keywords:
        return not bool((truth.y == 0).any())
    z = bn.batch_norm(call.x, **{k: v for k, v in keywords.items() if k not in ("stats", "out")})
    return bool((abs(z.astype(np.float64)) > 1e-5 * truth.y_scale).all())


# -- Moments -----------------------------------------------------------------------------------------------------------


def moments_of_parts(r: Random) -> None:
    """Any partition merges to the whole, and huge arrays of repeated values are what they repeat."""
    call = _draw(r, least=1)
    x, where = call.x, call.keywords.get("where")
    tally["moments of parts"] += 1
    full = None if where is None else np.broadcast_to(where, x.shape)
    whole = bn.moments(x, axis=call.kept, where=full)
    free = [i for i in range(x.ndim) if i not in call.kept]
    if not free or not call.is_tame:
        return
    axis = r.choice(free)
    cuts = sorted(r.randint(0, x.shape[axis]) for _ in range(r.randint(0, 5)))
    masks = np.split(x if full is None else full, cuts, axis=axis)
    parts = [
        bn.moments(part, axis=call.kept, where=None if full is None else mask)
        for part, mask in zip(np.split(x, cuts, axis=axis), masks, strict=True)
    ]
    r.shuffle(parts)
    merged = bn.Moments.merge_all(parts)
    if x.size == 0:
        assert merged.count == whole.count == 0
        return
    scale = np.abs(x.astype(np.float64)).max()
    np.testing.assert_allclose(np.broadcast_to(merged.count, whole.mean.shape), whole.count, rtol=1e-12)
    near = 1e-7 if x.dtype.itemsize == 2 else 1e-13  # halves are summed in float32, tile by tile
    np.testing.assert_allclose(merged.mean, whole.mean, rtol=1e-12, atol=near * scale)
    np.testing.assert_allclose(merged.m2, whole.m2, rtol=1e-5, atol=1e-9 * scale**2)
    for correction in (0, 1, 2.5):
        with np.errstate(all="ignore"):
            n = np.asarray(whole.count, np.float64) - correction
            expected = np.where(n > 0, whole.m2 / n, np.nan)
        np.testing.assert_allclose(whole.var(correction), expected, rtol=1e-12)
    assert not call.memory.changed()


def moments_made_by_hand(r: Random) -> None:
    """`Moments` takes what may be moments, and nothing else."""
    features = _shape(r, 0, 3)
    rng = _numpy(r)
    count: Any = r.choice([0, 3, 2.5, np.float32(4), np.int64(5), rng.integers(0, 5, features).astype(float)])
    mean, m2 = rng.normal(size=features), rng.uniform(0, 3, features)
    wrong = r.choice([None, None, "count", "mean", "m2", "shape"])
    if wrong == "count":
        count = r.choice(
            [-1, np.nan, np.inf, "3", None, 1j, [3], -np.ones(features), np.ones((*features, 2)), object()]
        )
    elif wrong == "mean":
        mean = r.choice([None, "m", 1.0, [0.0], mean.astype(int), mean.astype(complex), np.ma.array(mean)])
    elif wrong == "m2":
        m2 = r.choice([None, "m", 1.0, [0.0], m2.astype(int), np.ma.array(m2), -1 - m2])
    elif wrong == "shape":
        m2 = np.ones((*features, 2))
    empty = wrong in ("count", "m2") and prod(features) == 0
    if wrong is None or empty:
        try:
            bn.Moments(count, mean, m2)
        except REFUSALS:
            assert wrong is not None
        return
    _expect_refusal(Call(Memory(r), mean, (), wrong=f"Moments, {wrong}"), lambda: bn.Moments(count, mean, m2))


def huge_arrays(r: Random) -> None:
    """Arrays of more elements than there is memory for, without memory of their own."""
    tally["huge arrays"] += 1
    dtype = DTYPES[r.choice(list(DTYPES))]
    size = r.choice([2**40, 2**50, 2**58])
    shape = r.choice([(size, 3), (3, size), (size // 4, 1, 3), (2, 3, size // 2)])
    features = (shape[1],) if r.random() < 0.5 else ()
    axis: Any = 1 if features else ()
    small = np.ones((1,) * len(shape), dtype)
    call = Call(Memory(r), np.broadcast_to(small, shape), ())
    stats = bn.RunningStats(features if prod(features) < 100 else ())
    keywords: dict[str, Any] = {"axis": axis}
    if r.random() < 0.5 and features in ((), (1,), (3,)):
        keywords["stats"] = stats
        keywords["training"] = r.random() < 0.5
    try:
        with _watched(call, stats):
            bn.batch_norm(call.x, **keywords)
    except (MemoryError, *REFUSALS):
        return
    raise AssertionError("there was memory for a huge array")


def repeated_values(r: Random) -> None:
    """Millions of elements that are few in memory: moments are exact."""
    tally["repeated values"] += 1
    rng = _numpy(r)
    few = rng.integers(-3, 4, (1, r.randint(1, 4), r.randint(1, 5))).astype(DTYPES[r.choice(list(DTYPES))])
    times = r.choice([2**12, 2**16 + 1, 2**19])
    x = np.broadcast_to(few, (times, *few.shape[1:]))
    m, expected = bn.moments(x, axis=1), few.astype(np.float64)
    assert m.count == times * few.shape[2]
    np.testing.assert_allclose(m.mean, expected.mean(axis=(0, 2)), rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(m.m2, times * few.shape[2] * expected.var(axis=(0, 2)), rtol=1e-6, atol=1e-9)


# -- Statistics --------------------------------------------------------------------------------------------------------


@cache
def _temporary() -> tempfile.TemporaryDirectory[str]:
    """A folder that goes when the process ends."""
    return tempfile.TemporaryDirectory(prefix="bnarray-fuzz-")


def _folder() -> Path:
    return Path(_temporary().name)


def _moments(r: Random, features: tuple[int, ...]) -> bn.Moments:
    rng = _numpy(r)
    count: Any = r.choice([0, 1, 2, 5, 1.5, 40, rng.integers(0, 4, features).astype(float)])
    mean, m2 = np.where(count > 0, [rng.normal(0, 3, features), rng.uniform(0, 30, features)], 0.0)
    at = r.randrange(mean.size) if mean.size else 0
    if r.random() < 0.15 and np.broadcast_to(count, features).ravel()[at : at + 1].any():
        (mean if r.random() < 0.5 else m2).flat[at] = r.choice([np.nan, np.inf])
    return bn.Moments(count, mean, m2)


def running_stats(r: Random) -> None:
    """A history of one `RunningStats`, each step judged."""
    features = _shape(r, 0, 3)
    stats = _stats(r, features)
    call = Call(Memory(r), np.zeros(0), ())
    for _ in range(r.randint(1, 6)):
        step = r.choice(
            ["update", "update", "updated", "copies", "file", "merge", "damage", "wrong", "reset", "frozen"]
        )
        tally[f"RunningStats: {step}"] += 1
        before = _snapshot(stats)
        if step in ("update", "updated", "frozen"):
            _judge_update(r, call, stats, step, before)
        elif step == "copies":
            make = r.choice([bn.RunningStats.copy, copy.deepcopy, lambda each: pickle.loads(pickle.dumps(each))])
            twin = make(stats)
            _assert_untouched(twin, before)
            twin.reset()
            _assert_untouched(stats, before)
        elif step == "file":
            path = _folder() / r.choice(["stats.npz", "stats", "stats.safetensors"])
            stats.save(r.choice([path, str(path), os.fsencode(path)]))
            stats = bn.RunningStats.load(path)
            _assert_untouched(stats, before)
        elif step == "merge":
            _judge_merge(r, call, stats, before)
        elif step == "damage":
            _judge_damage(r, stats, before)
        elif step == "wrong":
            _judge_wrong(r, call, stats)
        else:
            stats.reset()
            _assert_untouched(
                stats, [np.zeros(features), np.ones(features), *map(np.array, (0, 0, 0)), np.zeros(features)]
            )


def _judge_update(r: Random, call: Call, stats: bn.RunningStats, step: str, before: list[np.ndarray]) -> None:
    m = _moments(r, stats.features_shape)
    due = _refuses_update(stats, m) if step != "frozen" else None
    target = stats
    with nullcontext() if due is None else pytest.raises(due), _watched(call, stats):
        if step == "update":
            stats.update(m)
        elif step == "updated":
            target = stats.updated(m)
        else:
            with stats.frozen():
                stats.update(m)
    if due is not None:
        return
    if step != "update":
        _assert_untouched(stats, before)
    if step != "frozen":
        _assert_updated(target, before, m)


def _judge_merge(r: Random, call: Call, stats: bn.RunningStats, before: list[np.ndarray]) -> None:
    other = _stats(r, stats.features_shape)
    if stats.update_rate is not None or other.update_rate is not None:
        call.wrong = "merge of an average"
        _expect_refusal(call, lambda: stats.merge(other), stats, other)
        return
    theirs = _snapshot(other)
    m = bn.Moments(other.count, other.mean, other._state.m2)
    stats.merge(other)
    _assert_untouched(other, theirs)
    assert stats.num_updates == before[3] + theirs[3]
    assert stats.num_skipped == before[4] + theirs[4]
    if np.any(np.asarray(other.count) > 0) and np.isfinite(stats.mean).all():
        expected = [*before[:3], before[3] + theirs[3] - 1, before[4] + theirs[4], before[5]]
        _assert_updated(stats, expected, m)


def _judge_damage(r: Random, stats: bn.RunningStats, before: list[np.ndarray]) -> None:
    path = _folder() / r.choice(["damaged.npz", "damaged.safetensors"])
    stats.save(path)
    data = bytearray(path.read_bytes())
    for _ in range(r.randint(1, 4)):
        at, size = r.randrange(len(data)), r.choice([1, 1, 2, 4, 8, 50])
        kind = r.choice(["flip", "set", "cut", "insert", "copy", "end"])
        if kind == "flip":
            data[at] ^= 1 << r.randrange(8)
        elif kind == "set":
            data[at : at + size] = r.choice([b"\0", b"\xff", b"9", b"\x7f"]) * len(data[at : at + size])
        elif kind == "cut":
            del data[at : at + size]
        elif kind == "insert":
            data[at:at] = r.randbytes(size)
        elif kind == "copy":
            start = r.randrange(len(data))
            data[at:at] = data[start : start + size]
        else:
            del data[max(1, at) :]
    path.write_bytes(data)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            _assert_untouched(bn.RunningStats.load(path), before)
        except ValueError as error:
            if "holds no statistics saved by bnarray" not in str(error):
                raise


def _judge_wrong(r: Random, call: Call, stats: bn.RunningStats) -> None:
    features, good = stats.features_shape, stats.state_dict()
    rng, longer = _numpy(r), np.ones((*stats.features_shape, 2))
    arrays: list[Any] = [None, "m", 3.0, [1.0], longer, longer.astype(complex), np.ma.ones(features)]
    bad = rng.normal(size=features)
    if bad.size:
        bad.flat[0] = r.choice([np.nan, np.inf])
    states: list[tuple[str, list[Any]]] = [
        ("running_mean", arrays + ([bad] if bad.size and stats.nonfinite != "propagate" else [])),
        ("running_var", arrays + ([-1 - abs(rng.normal(size=features))] if bad.size else [])),
        ("count", [-1, np.nan, np.inf, "3", None, [1], longer]),
        ("num_updates", [-1, 1.5, None, "1", [1]]),
        ("num_skipped", [-1, 1.5, None, "1", np.ones(2)]),
    ]
    name, values = r.choice(states)
    runs: list[tuple[str, Callable[[], Any]]] = [
        (f"load_state_dict, {name}", lambda: stats.load_state_dict(good | {name: r.choice(values)})),
        (
            "update",
            lambda: stats.update(r.choice([None, 1, stats, bn.moments(np.ones((2, 3, 5, 7)), axis=(0, 1, 2, 3))])),
        ),
        ("merge", lambda: stats.merge(r.choice([None, 1, {}, bn.RunningStats((9, 9), update_rate=None)]))),
        ("to", lambda: stats.to(r.choice([None, 1, "numpy", [1.0]]))),
        ("constructor", lambda: bn.RunningStats(*_wrong_settings(r))),
        ("keywords", lambda: bn.RunningStats(3, **_wrong_keywords(r))),
        ("layer", lambda: bn.BatchNorm(3, **_wrong_keywords(r))),
    ]
    call.wrong, run = r.choice(runs)
    _expect_refusal(call, run, stats)


def _wrong_settings(r: Random) -> tuple[Any]:
    return (r.choice([-1, 2.5, "3", None, (2, -1), (1.5,), [3], 1j, np.ones(2), (None,)]),)


def _wrong_keywords(r: Random) -> dict[str, Any]:
    return r.choice(
        [
            {"update_rate": r.choice([-0.1, 1.1, np.nan, "0.1", 1j, [0.1], np.ones(2)])},
            {"correction": r.choice([-1, np.nan, np.inf, "1", None, [1], 10**400])},
            {"like": r.choice([1, "numpy", [1.0], object()])},
            {"momentum": r.choice([0.1, None, "a"])},
        ]
    )


# -- Layers ------------------------------------------------------------------------------------------------------------


def layers(r: Random) -> None:
    """A history of a `BatchNorm`, beside the functions that it is made of."""
    features, dtype = r.randint(1, 5), DTYPES[r.choice(["float32", "float64"])]
    layer = bn.BatchNorm(features, update_rate=r.choice([None, 0.1, 1]), correction=r.choice([0, 1]),
                         affine=r.random() < 0.8, activation=r.choice([None, "relu"]))  # fmt: skip
    rng = _numpy(r)
    tally["BatchNorm"] += 1
    for _ in range(r.randint(1, 5)):
        layer.train(r.random() < 0.7)
        memory = Memory(r)
        shape = (r.randint(2, 6), features, r.randint(1, 6))
        x, residual = (memory.array(_values(r, shape, dtype, tame=True).array) for _ in range(2))
        given = residual if r.random() < 0.3 else None
        twin = copy.deepcopy(layer)
        y = layer(x, residual=given)
        expected, saved = bn.batch_norm_forward(
            x,
            twin.weight,
            twin.bias,
            stats=twin.stats,
            training=twin.training,
            activation=twin.activation,
            residual=given,
        )
        np.testing.assert_array_equal(y, expected)
        _assert_untouched(layer.stats, _snapshot(twin.stats))
        dy = memory.array(rng.normal(size=shape).astype(dtype))
        dx, found = layer.backward(dy), bn.batch_norm_backward(dy, saved)
        np.testing.assert_array_equal(dx, found.x)
        if layer.weight is not None:
            np.testing.assert_array_equal(layer.grad_weight, twin.grad_weight + found.weight)
        assert not memory.changed()
        again = bn.BatchNorm(features, affine=layer.weight is not None, update_rate=layer.stats.update_rate,
                             correction=layer.stats.correction)  # fmt: skip
        again.load_state_dict(layer.state_dict())
        for ours, theirs in zip(again.parameters(), layer.parameters(), strict=True):
            np.testing.assert_array_equal(ours, theirs)
        if r.random() < 0.3:
            layer.zero_grad()


def folded(r: Random) -> None:
    tally["fold"] += 1
    outputs, inputs = r.randint(1, 6), r.randint(1, 6)
    rng, memory = _numpy(r), Memory(r)
    layer = bn.BatchNorm(outputs, axis=-1, affine=r.random() < 0.7)
    for _ in range(r.randint(0, 3)):
        layer(rng.normal(rng.normal(0, 3), 2, (9, outputs)))
    axis = r.choice([0, -1])
    kernel = memory.array(rng.normal(size=(outputs, inputs) if axis == 0 else (inputs, outputs)))
    bias = memory.array(rng.normal(size=outputs)) if r.random() < 0.5 else None
    call = Call(memory, kernel, ())
    if r.random() < 0.3:
        wrong: dict[str, Any] = r.choice(
            [{"axis": 2}, {"axis": None}, {"axis": "0"}, {"layer": None}, {"kernel": [1.0]},
             {"bias": np.ones(outputs + 1)}, {"bias": [1.0]}, {"kernel": np.ones((outputs + 1, outputs + 1))},
             {"kernel": np.ones((outputs, outputs), int)}, {"bias": np.ones(outputs, int)}, {"kernel": np.float64(3)}]
        )  # fmt: skip
        call.wrong = f"fold, {next(iter(wrong))}"
        arguments = {"kernel": kernel, "bias": bias, "layer": layer, "axis": axis} | wrong
        _expect_refusal(call, lambda: bn.fold(**arguments), layer.stats)
        return
    new, shift = bn.fold(kernel, bias, layer, axis=axis)
    x = rng.normal(size=(5, inputs))
    matrix = (lambda k: k.T) if axis == 0 else (lambda k: k)
    expected = layer.eval()(x @ matrix(kernel) + (0 if bias is None else bias))
    np.testing.assert_allclose(x @ matrix(new) + shift, expected, rtol=1e-9, atol=1e-9 * (1 + abs(expected).max()))
    assert not memory.changed()


_SYSTEMS = {
    "torch": ("weight", "bias", "running_mean", "running_var"),
    "keras": ("gamma", "beta", "moving_mean", "moving_variance"),
    "flax": ("scale", "bias", "mean", "var"),
    "chainer": ("gamma", "beta", "avg_mean", "avg_var"),
    "onnx": ("scale", "B", "input_mean", "input_var"),
}


def conversions(r: Random) -> None:
    """Mappings of other systems' arrays: layers that evaluate as the formula says, and back; or one thing wrong."""
    system, rng, features = r.choice(list(_SYSTEMS)), _numpy(r), r.randint(1, 5)
    names = _SYSTEMS[system]
    drawn = (
        rng.normal(size=features),
        rng.normal(size=features),
        rng.normal(0, 3, features),
        rng.uniform(0.1, 4, features),
    )
    source: Any = {
        name: array.astype(r.choice([np.float32, np.float64])) for name, array in zip(names, drawn, strict=True)
    }
    weight, bias, mean, var = (source[name].astype(np.float64) for name in names)
    keywords: dict[str, Any] = {"eps": r.choice([0.1, 1e-3]), "update_rate": r.choice([0.0, 0.3, 1.0])}
    convert = getattr(bn.convert, f"from_{system}")
    if r.random() < 0.5:
        name = r.choice(names)
        bad = [
            None,
            "a",
            [1.0],
            1.0,
            np.ones(features + 1),
            np.ones((features, 2)),
            np.ones(features, int),
            np.ma.ones(3),
        ]
        wrong = r.choice(["missing", "array", "variance", "eps", "rate", "no eps", "momentum", "kind", "like"])
        if wrong == "missing":
            del source[name]
        elif wrong == "array":
            source[name] = r.choice(bad)
        elif wrong == "variance":
            source[names[3]] = r.choice([-source[names[3]], np.full(features, np.nan), np.full(features, np.inf)])
        elif wrong == "kind":
            source = r.choice([None, 1, [], "model", list(source.items()), object()])
        elif wrong == "no eps":
            keywords["eps"] = None
        else:
            key, values = {
                "eps": ("eps", [-1, np.nan, "1", [1]]),
                "rate": ("update_rate", [-0.1, 1.1, np.nan, "1", [1]]),
                "momentum": ("momentum", [0.1, 0.9, "a"]),
                "like": ("like", [1, "numpy", [1.0]]),
            }[wrong]
            keywords[key] = r.choice(values)
        call = Call(Memory(r), np.zeros(0), (), wrong=f"from_{system}, {wrong}")
        _expect_refusal(call, lambda: convert(source, **keywords), kinds=(*REFUSALS, KeyError))
        return
    tally[f"from_{system}, to_{system}"] += 1
    layer = convert(source, **keywords)
    x = rng.normal(size=(6, features))
    expected = (x - mean) / np.sqrt(var + keywords["eps"]) * weight + bias
    np.testing.assert_allclose(layer.eval()(x), expected, rtol=1e-9, atol=1e-9)
    made = getattr(bn.convert, f"to_{system}")(layer).arrays
    flat = made["params"] | made["batch_stats"] if system == "flax" else made
    for name, array in source.items():
        np.testing.assert_array_equal(flat[name], array)


def population(r: Random) -> None:
    """The statistics of the whole data, in any partition and order, with empty batches."""
    tally["population_stats"] += 1
    rng = _numpy(r)
    data = rng.normal(rng.normal(0, 3), 2, (r.randint(3, 40), 4))
    batches = np.split(data, sorted(r.randint(0, len(data)) for _ in range(r.randint(0, 6))))
    r.shuffle(batches)
    widths = [4, *(r.randint(1, 4) for _ in range(r.randint(1, 3)))]
    matrices = [rng.normal(size=each) for each in pairwise(widths)]
    layers = [
        bn.BatchNorm(width, update_rate=r.choice([None, 0.1]), correction=r.choice([0, 1])) for width in widths[1:]
    ]

    def forward(x: np.ndarray) -> None:
        for matrix, layer in zip(matrices, layers, strict=True):
            x = layer(x @ matrix)

    bn.population_stats(layers, batches, forward)
    x = data
    for matrix, layer in zip(matrices, layers, strict=True):
        x = x @ matrix
        mean, var = x.mean(axis=0), x.var(axis=0, ddof=layer.stats.correction)
        np.testing.assert_allclose(layer.stats.mean, mean, rtol=0, atol=1e-12 * abs(x).max())
        np.testing.assert_allclose(layer.stats.var, var, rtol=1e-10)
        assert layer.stats.count == len(data)
        x = (x - mean) / np.sqrt(var + layer.eps)


# -- Files -------------------------------------------------------------------------------------------------------------


def files(r: Random) -> None:
    """The functions of files, beside those of arrays; and files that are damaged."""
    dtype = r.choice(["float16", "float32", "float64", ">f4"])
    shape = _shape(r, 0, 4)
    x = np.asarray(_values(r, shape, np.dtype(dtype), tame=True).array, order=r.choice(["C", "F"]))
    kept = tuple(sorted(r.sample(range(x.ndim), r.randint(0, x.ndim))))
    src, dst = _folder() / "x.npy", _folder() / "y.npy"
    np.save(src, x)
    if r.random() < 0.4:
        if r.random() < 0.5:
            src, dst = _folder() / "x.npz", _folder() / r.choice(["y.npz", "y.npy"])
            r.choice([np.savez, np.savez_compressed])(src, x=x, other=np.arange(3))
        _judge_damaged_array(r, src, dst)
        return
    tally["files"] += 1
    found = bn.file_moments(src, axis=kept)
    native = x.astype(x.dtype.newbyteorder("="))
    expected = bn.moments(native, axis=kept)
    near = 1e-7 if x.dtype.itemsize == 2 else 1e-9  # as above
    np.testing.assert_allclose(found.mean, expected.mean, rtol=near, atol=near)
    np.testing.assert_allclose(found.m2, expected.m2, rtol=1e-6, atol=1e-6)
    done = bn.normalize_file(src, dst, axis=kept, eps=0.1, force=True, chunk_mb=r.choice([1, 16, 64]))
    y = np.load(dst)
    np.testing.assert_allclose(
        y.astype(np.float64), bn.batch_norm(native, axis=kept, eps=0.1).astype(np.float64), rtol=2e-3, atol=2e-3
    )
    np.testing.assert_array_equal(done.before.mean, found.mean)


def _judge_damaged_array(r: Random, src: Path, dst: Path) -> None:
    tally["damaged arrays"] += 1
    member = "x" if (src.suffix, dst.suffix) == (".npz", ".npy") else None
    data = bytearray(src.read_bytes())
    for _ in range(r.randint(1, 3)):
        at = r.randrange(min(len(data), 130) if src.suffix == ".npy" else len(data))
        if r.random() < 0.3:
            del data[at:]
        elif r.random() < 0.5 and len(data) > at:
            data[at] = r.choice(b"0123456789-(),'<>fibOUV \n\xff\0")
        data = data or bytearray(b"\x93")
    src.write_bytes(data)
    dst.write_bytes(b"before")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            bn.normalize_file(src, dst, axis=(), force=True, member=member)
    except (*REFUSALS, OSError, MemoryError):
        assert dst.read_bytes() == b"before", "a file was replaced by a call that raised"
        assert {each.name for each in _folder().iterdir() if each.name.startswith(".")} == set()


#: By name; the first comes as often as all others together.
CALLS: dict[str, Callable[[Random], None]] = {
    each.__name__: each
    for each in (
        *(forward_and_backward, moments_of_parts, moments_made_by_hand, huge_arrays, repeated_values),
        *(running_stats, layers, folded, conversions, population, files),
    )
}


def run(r: Random, name: str | None = None) -> None:
    """Draw one call and judge it."""
    if name is None:
        name = "forward_and_backward" if r.random() < 0.5 else r.choice(list(CALLS))
    CALLS[name](r)
