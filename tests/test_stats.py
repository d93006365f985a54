"""Moments and RunningStats: closed forms, merges, bad batches, copies, files."""

import contextvars
import copy
import json
import pickle
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import bnarray as bn


def _batches(count: int, sizes: Any = 10, features: int = 3) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    sizes = [sizes] * count if isinstance(sizes, int) else sizes
    return [rng.normal(rng.normal(0, 5), rng.uniform(0.1, 9), (size, features)) for size in sizes]


@pytest.mark.parametrize("updates", [1, 2, 100])
@pytest.mark.parametrize("rate", [0.1, 0.01, 1.0])
@pytest.mark.parametrize("correction", [0, 1])
def test_exponential_closed_form(updates: int, rate: float, correction: int) -> None:
    batches = _batches(updates)
    stats = bn.RunningStats(3, update_rate=rate, correction=correction)
    for x in batches:
        bn.batch_norm(x, stats=stats)
    left = (1 - rate) ** updates
    powers = rate * (1 - rate) ** np.arange(updates)[::-1, None]
    mean = (powers * [x.mean(axis=0) for x in batches]).sum(axis=0)
    var = left + (powers * [x.var(axis=0, ddof=correction) for x in batches]).sum(axis=0)
    np.testing.assert_allclose(stats.mean, mean, rtol=1e-12)
    np.testing.assert_allclose(stats.var, var, rtol=1e-12)
    assert (stats.count, stats.num_updates, stats.num_skipped) == (10 * updates, updates, 0)


@pytest.mark.parametrize("correction", [0, 1])
def test_cumulative_is_the_population(correction: int) -> None:
    batches = _batches(6, [1, 7, 100, 0, 3, 50])
    stats = bn.RunningStats(3, update_rate=None, correction=correction)
    for x in batches:
        bn.batch_norm(x, stats=stats)
    everything = np.concatenate(batches)
    np.testing.assert_allclose(stats.mean, everything.mean(axis=0), rtol=1e-13)
    np.testing.assert_allclose(stats.var, everything.var(axis=0, ddof=correction), rtol=1e-12)
    assert (stats.count, stats.num_updates) == (161, 5)


def test_cumulative_variance_before_it_exists() -> None:
    stats = bn.RunningStats(2, update_rate=None)
    assert (stats.var == 1).all()
    bn.batch_norm(np.array([[3.0, 4.0]]), stats=stats)
    np.testing.assert_array_equal(stats.mean, [3, 4])
    assert (stats.var == 1).all()
    bn.batch_norm(np.array([[5.0, 4.0]]), stats=stats)
    np.testing.assert_array_equal(stats.var, [2, 0])


@pytest.mark.parametrize("parts", [1, 2, 3, 7, 100])
def test_any_partition_merges_to_the_whole(parts: int) -> None:
    rng = np.random.default_rng(parts)
    x = rng.normal(1e4, 3, (500, 4))
    cuts = np.sort(rng.integers(0, 501, parts - 1))
    pieces = [bn.moments(part) for part in np.split(x, cuts)]
    whole = bn.moments(x)
    for merged in (bn.Moments.merge_all(pieces), bn.Moments.merge_all(pieces[::-1]), sum(pieces[1:], pieces[0])):
        assert merged.count == whole.count == 500
        np.testing.assert_allclose(merged.mean, whole.mean, rtol=1e-14)
        np.testing.assert_allclose(merged.m2, whole.m2, rtol=1e-12)


def test_merge_with_nothing_is_exact() -> None:
    nothing = bn.moments(np.empty((0, 2)))
    huge = bn.Moments(3, np.array([1e300, -1e300]), np.array([0.0, 2.0]))
    for merged in (nothing + huge, huge + nothing):
        np.testing.assert_array_equal(merged.mean, huge.mean)
        np.testing.assert_array_equal(merged.m2, huge.m2)
    assert (nothing + nothing).count == 0
    assert not np.isnan((nothing + nothing).mean).any()


def test_merge_under_masks_that_differ_between_features() -> None:
    rng = np.random.default_rng(0)
    x, where = rng.normal(size=(60, 3)), rng.random((60, 3)) < 0.4
    where[:30, 1] = False
    halves = bn.moments(x[:30], where=where[:30]) + bn.moments(x[30:], where=where[30:])
    whole = bn.moments(x, where=where)
    np.testing.assert_array_equal(halves.count, whole.count)
    np.testing.assert_allclose(halves.mean, whole.mean, rtol=1e-12)
    np.testing.assert_allclose(halves.var(1), whole.var(1), rtol=1e-12)


def test_merged_states_are_the_population() -> None:
    batches = _batches(8, [5, 1, 9, 30, 2, 2, 11, 6])
    workers = [bn.RunningStats(3, update_rate=None) for _ in range(4)]
    for i, x in enumerate(batches):
        bn.batch_norm(x, stats=workers[i % 4])
    total = bn.RunningStats(3, update_rate=None)
    for worker in workers:
        total.merge(worker)
    everything = np.concatenate(batches)
    np.testing.assert_allclose(total.mean, everything.mean(axis=0), rtol=1e-13)
    np.testing.assert_allclose(total.var, everything.var(axis=0, ddof=1), rtol=1e-12)
    assert (total.count, total.num_updates) == (66, 8)
    with pytest.raises(ValueError, match="exponential average"):
        total.merge(bn.RunningStats(3))
    with pytest.raises(ValueError, match="exponential average"):
        bn.RunningStats(3).merge(total)


def test_moments_are_immutable() -> None:
    mean = np.zeros(2)
    m = bn.Moments(3, mean, np.ones(2))
    mean[0] = 9
    assert m.mean[0] == 0
    with pytest.raises(AttributeError, match="cannot be changed"):
        m.count = 4
    with pytest.raises(AttributeError, match="cannot be changed"):
        del m.mean
    with pytest.raises(ValueError, match="read-only"):
        m.mean[0] = 1
    again = pickle.loads(pickle.dumps(m))
    np.testing.assert_array_equal(again.m2, m.m2)
    assert not again.mean.flags.writeable


def test_moments_var() -> None:
    m = bn.Moments(np.array([4, 1, 0]), np.zeros(3), np.array([6.0, 0, 0]))
    np.testing.assert_array_equal(m.var(), [1.5, 0, np.nan])
    np.testing.assert_array_equal(m.var(correction=1), [2, np.nan, np.nan])


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((1, [1.0], np.ones(1)), TypeError, "mean is a builtins.list"),
        ((1, np.ones(1, int), np.ones(1)), TypeError, "mean has dtype int"),
        ((1, np.ones(1), np.ones(2)), ValueError, "m2 has shape"),
        ((-1, np.ones(1), np.ones(1)), ValueError, "count is -1"),
        ((np.nan, np.ones(1), np.ones(1)), ValueError, "count is nan"),
        (("three", np.ones(1), np.ones(1)), TypeError, "count is a str"),
        ((np.array([1.0, -1.0]), np.ones(2), np.ones(2)), ValueError, "count holds a negative"),
        ((np.ones(3), np.ones(2), np.ones(2)), ValueError, "count has shape"),
    ],
)
def test_moments_refuse(arguments: tuple[Any, ...], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        bn.Moments(*arguments)


@pytest.mark.parametrize("update_rate", [0.1, None])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_nonfinite(update_rate: float | None, bad: float) -> None:
    x = _batches(1)[0]
    x[4, 1] = bad

    def trained(nonfinite: str) -> bn.RunningStats:
        stats = bn.RunningStats(3, update_rate=update_rate, nonfinite=nonfinite)
        bn.batch_norm(_batches(1)[0], stats=stats)
        return stats

    stats = trained("skip")
    mean, var = stats.mean, stats.var
    with pytest.warns(RuntimeWarning, match="num_skipped") as caught:
        bn.batch_norm(x, stats=stats)
    assert caught[0].filename == __file__
    assert (stats.num_skipped, stats.num_updates, stats.count) == (1, 1, 10)
    assert stats.mean is mean
    assert stats.var is var

    stats, out = trained("raise"), np.zeros_like(x)
    mean = stats.mean
    with pytest.raises(FloatingPointError, match="NaN or an infinity"):
        bn.batch_norm(x, stats=stats, out=out)
    assert (stats.num_skipped, stats.num_updates) == (0, 1)
    assert stats.mean is mean
    np.testing.assert_array_equal(out, 0)

    stats = trained("propagate")
    bn.batch_norm(x, stats=stats)
    assert not np.isfinite(stats.mean[1])
    assert np.isfinite(stats.mean[[0, 2]]).all()
    assert stats.num_updates == 2


def test_warning_as_error_changes_nothing() -> None:
    stats, x, out = bn.RunningStats(1), np.full((3, 1), np.nan), np.zeros((3, 1))
    with pytest.raises(RuntimeWarning, match="num_skipped"):  # pytest is told to make warnings errors
        bn.batch_norm(x, stats=stats, out=out)
    assert stats.num_skipped == 0
    np.testing.assert_array_equal(out, 0)


def test_too_few_values_for_an_exponential_average() -> None:
    x, out = np.array([[5.0, 6.0]]), np.zeros((1, 2))
    stats = bn.RunningStats(2)
    with pytest.raises(ValueError, match=r"1 value\(s\) of a feature"):
        bn.batch_norm(x, stats=stats, out=out)
    assert stats.num_updates == 0
    np.testing.assert_array_equal(out, 0)
    for allowed in (bn.RunningStats(2, correction=0), bn.RunningStats(2, update_rate=None)):
        bn.batch_norm(x, stats=allowed)
        assert allowed.num_updates == 1
    where = np.array([[True, True], [True, False]])
    with pytest.raises(ValueError, match=r"1 value\(s\)"):
        bn.batch_norm(np.ones((2, 2)), stats=stats, where=where)


def test_frozen() -> None:
    x = _batches(1)[0]
    stats, other = bn.RunningStats(3), bn.RunningStats(3)
    with stats.frozen() as same:
        assert same is stats
        with stats.frozen(), other.frozen():
            bn.batch_norm(x, stats=stats)
        bn.batch_norm(x, stats=stats)
        bn.batch_norm(x, stats=other)
        stats.update(bn.moments(x))
        elsewhere = threading.Thread(target=bn.batch_norm, args=(x,), kwargs={"stats": stats})
        elsewhere.start()
        elsewhere.join()
    assert (stats.num_updates, other.num_updates) == (1, 1)
    bn.batch_norm(x, stats=stats)
    assert stats.num_updates == 2


def test_updated_is_pure() -> None:
    m = bn.moments(_batches(1)[0])
    stats = bn.RunningStats(3)
    new = stats.updated(m)
    assert (stats.num_updates, new.num_updates) == (0, 1)
    stats.update(m)
    np.testing.assert_array_equal(stats.mean, new.mean)
    np.testing.assert_array_equal(stats.var, new.var)


@pytest.mark.parametrize("update_rate", [0.1, None])
def test_copies(update_rate: float | None) -> None:
    batches = _batches(3)
    stats = bn.RunningStats(3, update_rate=update_rate, correction=0, nonfinite="raise")
    stats.update(bn.moments(batches[0]))
    for make in (bn.RunningStats.copy, copy.copy, copy.deepcopy, lambda s: pickle.loads(pickle.dumps(s))):
        twin = make(stats)
        assert (twin.update_rate, twin.correction, twin.nonfinite, twin.num_features) == (update_rate, 0, "raise", 3)
        before = stats.mean
        twin.update(bn.moments(batches[1]))
        assert stats.mean is before
        expected = stats.updated(bn.moments(batches[1]))
        np.testing.assert_array_equal(twin.mean, expected.mean)
        np.testing.assert_array_equal(twin.var, expected.var)
        with pytest.raises(ValueError, match="read-only"):
            twin.mean[0] = 1


@pytest.mark.parametrize("update_rate", [0.1, None])
@pytest.mark.parametrize("masked", [False, True])
def test_state_dict_and_files(update_rate: float | None, masked: bool, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    stats = bn.RunningStats((2, 3), update_rate=update_rate)
    for _ in range(3):
        x = rng.normal(3, 2, (9, 2, 3))
        bn.batch_norm(x, stats=stats, axis=(1, 2), where=rng.random((9, 2, 3)) < 0.8 if masked else None)
    state = stats.state_dict()
    assert set(state) == {"running_mean", "running_var", "count", "num_updates", "num_skipped"}
    state["running_mean"][0, 0] += 1  # a copy
    loaded = bn.RunningStats((2, 3), update_rate=update_rate)
    loaded.load_state_dict(stats.state_dict())
    stats.save(tmp_path / "stats.npz")
    read = bn.RunningStats.load(tmp_path / "stats.npz")
    assert (read.update_rate, read.correction, read.nonfinite) == (update_rate, 1, "skip")
    m = bn.moments(rng.normal(size=(4, 2, 3)), axis=(1, 2))
    for twin in (loaded, read):
        np.testing.assert_array_equal(twin.mean, stats.mean)
        np.testing.assert_array_equal(twin.var, stats.var)
        np.testing.assert_array_equal(twin.count, stats.count)
        assert (twin.num_updates, twin.num_skipped) == (3, 0)
        np.testing.assert_allclose(twin.updated(m).var, stats.updated(m).var, rtol=1e-14)
    assert [path.name for path in tmp_path.iterdir()] == ["stats.npz"]


def test_load_state_dict_refuses_and_keeps() -> None:
    stats = bn.RunningStats(2)
    bn.batch_norm(np.random.default_rng(0).normal(size=(9, 2)), stats=stats)
    good, mean = stats.state_dict(), stats.mean
    for change, error in [
        ({"running_mean": np.zeros(3)}, ValueError),
        ({"running_mean": [0.0, 0.0]}, TypeError),
        ({"running_mean": np.array([np.nan, 0])}, ValueError),
        ({"running_var": np.array([-1.0, 1])}, ValueError),
        ({"count": -1}, ValueError),
        ({"num_updates": -1}, ValueError),
        ({"num_updates": "3"}, TypeError),
        ({"num_updates": 2.5}, TypeError),
    ]:
        with pytest.raises(error, match=next(iter(change))):
            stats.load_state_dict(good | change)
        assert stats.mean is mean
    with pytest.raises(KeyError, match="running_var, count"):
        stats.load_state_dict({name: good[name] for name in ("running_mean", "num_updates", "num_skipped")})
    with pytest.raises(TypeError, match="the state is a str"):
        stats.load_state_dict("running_mean")


def test_files_that_are_no_statistics(tmp_path: Path) -> None:
    path = tmp_path / "stats.npz"
    bn.RunningStats(2).save(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="holds no statistics saved by bnarray"):
        bn.RunningStats.load(path)
    np.savez(path, mean=np.zeros(2))
    with pytest.raises(ValueError, match="holds no statistics"):
        bn.RunningStats.load(path)
    np.savez(path, about=np.array(json.dumps({"format": "bnarray.RunningStats", "version": 99})))
    with pytest.raises(ValueError, match="version is 99"):
        bn.RunningStats.load(path)
    np.savez(path, about=np.array([{"pickled": 1}], dtype=object))
    with pytest.raises(ValueError, match="holds no statistics"):
        bn.RunningStats.load(path)
    path.write_text("nonsense")
    with pytest.raises(ValueError, match="holds no statistics"):
        bn.RunningStats.load(path)
    with pytest.raises(FileNotFoundError):
        bn.RunningStats.load(tmp_path / "missing.npz")
    with pytest.raises(FileNotFoundError):
        bn.RunningStats(2).save(tmp_path / "no folder" / "stats.npz")


@pytest.mark.parametrize("make", [bn.RunningStats, bn.BatchNorm])
def test_momentum_is_explained(make: Any) -> None:
    with pytest.raises(TypeError, match=r"update_rate=0\.1 for torch's meaning, update_rate=0\.9 for Keras's"):
        make(3, momentum=0.1)


@pytest.mark.parametrize(
    ("keywords", "error", "message"),
    [
        ({"num_features": -1}, ValueError, "num_features is -1"),
        ({"num_features": 2.5}, TypeError, r"num_features is 2\.5"),
        ({"update_rate": 1.5}, ValueError, r"update_rate is 1\.5"),
        ({"update_rate": "fast"}, TypeError, "update_rate is 'fast'"),
        ({"correction": -1}, ValueError, "correction is -1"),
        ({"nonfinite": "ignore"}, ValueError, "nonfinite is 'ignore'"),
        ({"like": [1.0]}, TypeError, "like is a builtins.list"),
    ],
)
def test_running_stats_refuse(keywords: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        bn.RunningStats(**({"num_features": 3} | keywords))


def test_update_refuses() -> None:
    stats = bn.RunningStats(3)
    with pytest.raises(TypeError, match="should be Moments"):
        stats.update(np.zeros(3))
    with pytest.raises(ValueError, match="moments has features of shape"):
        stats.update(bn.moments(np.ones((5, 2))))


def test_reset() -> None:
    stats = bn.RunningStats(3, update_rate=None)
    bn.batch_norm(_batches(1)[0], stats=stats)
    stats.reset()
    assert (stats.count, stats.num_updates) == (0, 0)
    np.testing.assert_array_equal(stats.mean, 0)
    np.testing.assert_array_equal(stats.var, 1)


def test_one_feature_without_axes() -> None:
    x = np.random.default_rng(0).normal(2, 3, (6, 7))
    stats = bn.RunningStats((), update_rate=None)
    y = bn.batch_norm(x, np.array(2.0), np.array(1.0), axis=(), stats=stats)
    np.testing.assert_allclose(y, (x - x.mean()) / np.sqrt(x.var() + 1e-5) * 2 + 1)
    np.testing.assert_allclose(stats.var, x.var(ddof=1))
    assert stats.mean.shape == ()
    np.testing.assert_allclose(
        bn.batch_norm(x, axis=(), stats=stats, training=False), (x - x.mean()) / np.sqrt(x.var(ddof=1) + 1e-5)
    )


def test_a_rate_of_one_is_the_batch() -> None:
    stats, x = bn.RunningStats(1, update_rate=1), np.array([[0.0], [1e-3]])
    bn.batch_norm(np.array([[0.0], [1e12]]), stats=stats)
    bn.batch_norm(x, stats=stats)
    np.testing.assert_array_equal(stats.mean, bn.moments(x).mean)
    np.testing.assert_array_equal(stats.var, bn.moments(x).var(1))


def test_frozen_is_the_state_and_not_its_address() -> None:
    m = bn.moments(_batches(1)[0])
    stats = bn.RunningStats(3)
    with stats.frozen():
        context = contextvars.copy_context()
    del stats
    others = [bn.RunningStats(3) for _ in range(50)]
    for other in others:
        context.run(other.update, m)
        assert other.num_updates == 1


def test_a_loaded_cumulative_variance_is_one_until_it_exists() -> None:
    stats = bn.RunningStats(1, update_rate=None)
    stats.load_state_dict(stats.state_dict() | {"count": 1, "running_var": np.array([5.0]), "num_updates": 1})
    assert stats.var[0] == 1


def test_a_file_keeps_what_a_small_count_knows(tmp_path: Path) -> None:
    stats = bn.RunningStats(1, update_rate=None)
    stats.update(bn.moments(np.array([[1.0], [2.0]]), where=np.array([[0.4], [0.4]])))
    stats.save(tmp_path / "stats.npz")
    read = bn.RunningStats.load(tmp_path / "stats.npz")
    m = bn.moments(np.array([[3.0], [5.0]]))
    np.testing.assert_array_equal(read.updated(m).var, stats.updated(m).var)


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "stats.npz"
    stats = bn.RunningStats(3, update_rate=None)
    stats.update(bn.moments(_batches(1)[0]))
    stats.save(path)
    whole, rng = path.read_bytes(), np.random.default_rng(0)
    for _ in range(500):
        damaged = bytearray(whole)
        for at in rng.integers(0, len(whole), 3):
            damaged[at] = rng.integers(256)
        path.write_bytes(damaged)
        read, refusal = None, ""
        try:
            read = bn.RunningStats.load(path)
        except ValueError as error:
            refusal = str(error)
        if read is None:
            assert "holds no statistics saved by bnarray" in refusal
        else:
            np.testing.assert_array_equal(read.mean, stats.mean)
            np.testing.assert_array_equal(read.var, stats.var)


def test_state_cannot_be_made_writeable() -> None:
    stats = bn.RunningStats(3)
    with pytest.raises(ValueError, match="WRITEABLE"):
        stats.mean.flags.writeable = True


def test_merge_all_takes_moments_only() -> None:
    with pytest.raises(TypeError, match="moments holds a int"):
        bn.Moments.merge_all([1])
    with pytest.raises(ValueError, match="m2 holds a negative"):
        bn.Moments(2, np.zeros(1), -np.ones(1))
