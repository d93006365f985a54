"""One state under many hands: threads, layers, libraries, processes, and a kill amid saving."""

import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import bnarray as bn


def test_train_evaluate_save_and_copy_at_once(tmp_path: Path) -> None:
    """All batches are one and the same, so every look at the state has to fit its count."""
    threads, rounds, size = 16, 15, 30
    x = np.random.default_rng(0).normal(3, 2, (size, 4))
    mean, m2 = x.mean(axis=0), ((x - x.mean(axis=0)) ** 2).sum(axis=0)
    stats = bn.RunningStats(4, update_rate=None)
    bn.batch_norm(x, stats=stats)

    def check(seen: bn.RunningStats) -> None:
        assert seen.count == size * seen.num_updates
        np.testing.assert_allclose(seen.mean, mean, rtol=1e-12)
        np.testing.assert_allclose(seen.var, m2 * seen.num_updates / (seen.count - 1), rtol=1e-10)

    def work(i: int) -> None:
        path = tmp_path / f"{i % 4}.npz"  # four write to one file
        for _ in range(rounds):
            bn.batch_norm(x, stats=stats)
            y = bn.batch_norm(x, stats=stats, training=False)
            assert abs(y.mean(axis=0)).max() < 1e-10
            assert abs(y.var(axis=0) - 1).max() < 0.04
            stats.save(path)
            check(bn.RunningStats.load(path))
            check(stats.copy())
            seen = bn.RunningStats(4, update_rate=None)
            seen.load_state_dict(stats.state_dict())
            check(seen)

    with ThreadPoolExecutor(threads) as pool:
        running = [pool.submit(work, i) for i in range(threads)]
        for each in running:
            each.result(timeout=120)
    assert stats.num_updates == threads * rounds + 1
    check(stats)


@pytest.mark.parametrize("update_rate", [0.5, None])
def test_an_update_amid_another(update_rate: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever comes between a look at the state and its replacement, nothing is lost."""
    x, y, z = np.random.default_rng(0).normal(size=(3, 8, 2))
    stats, expected = (bn.RunningStats(2, update_rate=update_rate) for _ in range(2))
    others = [bn.moments(y), bn.moments(z)]
    after = bn.RunningStats._after

    def interrupted(self: bn.RunningStats, *arguments: Any, **keywords: Any) -> Any:
        if others:
            self.update(others.pop(0))
        return after(self, *arguments, **keywords)

    monkeypatch.setattr(bn.RunningStats, "_after", interrupted)
    stats.update(bn.moments(x))
    monkeypatch.undo()
    for each in (z, y, x):
        expected.update(bn.moments(each))
    assert (stats.num_updates, stats.count) == (3, 24)
    np.testing.assert_allclose(stats.mean, expected.mean, rtol=1e-12)
    np.testing.assert_allclose(stats.var, expected.var, rtol=1e-12)


class _Restless(bn.RunningStats):
    """Between any two looks at its state, somebody has replaced it."""

    @property
    def _state(self) -> Any:
        state = self.__dict__["_state"]
        self.__dict__["_state"] = self._next[state.num_updates % 2]
        return state

    @_state.setter
    def _state(self, state: Any) -> None:
        self.__dict__["_state"] = state


@pytest.mark.parametrize("update_rate", [0.5, None])
def test_every_reader_looks_once(update_rate: float | None, tmp_path: Path) -> None:
    """Mean, variance and counts are those of one and the same update, wherever they are read together."""
    states = []
    for number, scale in ((4, 1.0), (5, 10.0)):
        each = bn.RunningStats(2, update_rate=update_rate, correction=0)
        m = bn.Moments(number, np.full(2, scale), np.full(2, scale**2 * number))
        each.load_state_dict(each.updated(m).state_dict() | {"num_updates": number})
        each._state = each._state._replace(mean=m.mean, var=m.var())
        states.append(each._state)
    stats = _Restless(2, update_rate=update_rate, correction=0)
    stats._next = [states[1], states[0]]  # by the parity of num_updates

    def check(mean: Any, var: Any, count: Any, num_updates: int) -> None:
        assert count == num_updates
        np.testing.assert_array_equal(mean, {4: 1.0, 5: 10.0}[count])
        np.testing.assert_allclose(var, mean**2)

    def check_all(other: bn.RunningStats) -> None:
        check(*other.mean_and_var(), other.count, other.num_updates)

    x = np.array([[11.0, 2.0]])
    for path in (tmp_path / "stats.npz", tmp_path / "again.npz"):
        stats._state = states[path.name == "again.npz"]
        for _ in range(2):
            mean, var = stats.mean_and_var()
            np.testing.assert_allclose(var, mean**2)
            d = stats.state_dict()
            check(d["running_mean"], d["running_var"], d["count"], d["num_updates"])
            check_all(stats.to(x))
            stats.save(path)
            check_all(bn.RunningStats.load(path))
            y = bn.batch_norm(x, stats=stats, training=False, eps=0)
            assert min(abs(y - (x - mean) / mean).max() for mean in (1.0, 10.0)) < 1e-12
            check_all(stats.copy())
    stats.__class__ = bn.RunningStats


def test_a_fork_amid_an_update(run_python: Callable[..., str]) -> None:
    """It waits until no thread is exchanging a state, so that the child finds nothing locked."""
    code = """
import os, signal, threading, time, warnings
warnings.simplefilter("ignore", DeprecationWarning)  # a fork of a process with threads
import numpy as np, bnarray as bn
from bnarray import stats as module
stats, m = bn.RunningStats(2), bn.moments(np.ones((3, 2)))
stats.update(m)
held, slow = threading.Event(), 0.3
def update():
    with module._replacing:
        held.set()
        time.sleep(slow)
thread = threading.Thread(target=update)
thread.start()
held.wait()
child = os.fork()
if child == 0:
    signal.alarm(20)
    stats.update(m)
    os._exit(stats.num_updates)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    assert run_python(code) == "2\n"


def test_two_layers_share_a_state() -> None:
    stats = bn.RunningStats(3, update_rate=None)
    layers = [bn.BatchNorm(3, stats=stats) for _ in range(2)]
    batches = np.random.default_rng(0).normal(size=(2, 50, 8, 3))

    def train(layer: bn.BatchNorm, own: np.ndarray) -> None:
        for x in own:
            layer(x)

    workers = [threading.Thread(target=train, args=each) for each in zip(layers, batches, strict=True)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert layers[0].stats is layers[1].stats is stats
    assert (stats.num_updates, stats.count) == (100, 800)
    np.testing.assert_allclose(stats.mean, batches.reshape(-1, 3).mean(axis=0), rtol=1e-12, atol=1e-14)


@pytest.fixture(scope="module")
def torch() -> Any:
    return pytest.importorskip("torch", reason="torch is not installed: states that it shares are not verified")


@pytest.mark.parametrize("home", ["numpy", "torch"])
def test_libraries_in_turn(home: str, torch: Any) -> None:
    """The same numbers as from NumPy alone, wherever the state lives."""
    batches = np.random.default_rng(0).normal(2, 3, (10, 8, 3))
    alone = bn.RunningStats(3)
    stats = bn.RunningStats(3, like=batches if home == "numpy" else torch.empty(0))
    for i, x in enumerate(batches):
        expected = bn.batch_norm(x, stats=alone)
        y = bn.batch_norm(torch.from_numpy(x) if i % 2 else x, stats=stats)
        np.testing.assert_array_equal(np.asarray(y), expected)
    assert stats.num_updates == 10
    np.testing.assert_allclose(np.asarray(stats.mean), alone.mean, rtol=1e-12)
    np.testing.assert_allclose(np.asarray(stats.var), alone.var, rtol=1e-12)


@pytest.mark.parametrize("suffix", ["npz", "safetensors"])
def test_a_file_of_state_on_another_library(suffix: str, tmp_path: Path, torch: Any) -> None:
    """It is read into NumPy."""
    if suffix == "safetensors":
        pytest.importorskip(
            "safetensors", reason="safetensors is not installed: files of torch's state are not verified"
        )
    stats = bn.RunningStats(3, like=torch.empty(0))
    bn.batch_norm(np.arange(12.0).reshape(4, 3), stats=stats)
    stats.save(tmp_path / f"stats.{suffix}")
    read = bn.RunningStats.load(tmp_path / f"stats.{suffix}")
    assert type(read.mean) is np.ndarray
    np.testing.assert_array_equal(read.mean, stats.mean.numpy())
    np.testing.assert_array_equal(read.var, stats.var.numpy())


@pytest.mark.parametrize("frozen", [True, False])
def test_recomputation(frozen: bool, torch: Any) -> None:
    """A forward pass that is done again for its gradients updates once, if the second time is frozen."""
    from torch.utils.checkpoint import checkpoint

    stats = bn.RunningStats(3)
    x = torch.arange(12.0).reshape(4, 3).requires_grad_()
    y = checkpoint(
        lambda x: bn.batch_norm(x, stats=stats) ** 3,
        x,
        use_reentrant=False,
        context_fn=lambda: (nullcontext(), stats.frozen() if frozen else nullcontext()),
    )
    y.sum().backward()
    assert stats.num_updates == (1 if frozen else 2)
    expected = torch.arange(12.0).reshape(4, 3).requires_grad_()
    (bn.batch_norm(expected) ** 3).sum().backward()
    torch.testing.assert_close(x.grad, expected.grad)


class _Normalized:
    """A data set that normalises what it hands out."""

    def __init__(self, x: np.ndarray, stats: bn.RunningStats) -> None:
        self._x, self._stats = x, stats

    def __len__(self) -> int:
        return len(self._x)

    def __getitem__(self, i: int) -> np.ndarray:
        return bn.batch_norm(self._x[i : i + 1], stats=self._stats, training=False)[0]


@pytest.mark.parametrize("method", ["fork", "spawn"])
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
# Of every fork, once other tests have loaded it; the workers use none of it.
@pytest.mark.filterwarnings("ignore:os.fork.* was called:RuntimeWarning")
def test_workers_of_a_data_loader(method: str, torch: Any) -> None:
    x = np.random.default_rng(0).normal(3, 2, (24, 4)).astype(np.float32)
    stats = bn.RunningStats(4, update_rate=None)
    bn.batch_norm(x, stats=stats)
    loader = torch.utils.data.DataLoader(
        _Normalized(x, stats), batch_size=5, num_workers=2, multiprocessing_context=method, timeout=60
    )
    y = torch.cat(list(loader)).numpy()
    np.testing.assert_array_equal(y, bn.batch_norm(x, stats=stats, training=False))


def _seen_by_a_worker(x: np.ndarray, stats: bn.RunningStats) -> bn.RunningStats:
    bn.batch_norm(x, stats=stats)
    return stats


def test_joblib() -> None:
    """Each process has a state of its own; merged they are the population's."""
    joblib = pytest.importorskip("joblib", reason="joblib is not installed: its processes are not verified")
    parts = np.random.default_rng(0).normal(3, 2, (6, 20, 4))
    start = bn.RunningStats(4, update_rate=None)
    states = joblib.Parallel(n_jobs=2)(joblib.delayed(_seen_by_a_worker)(part, start) for part in parts)
    assert start.num_updates == 0
    for state in states:
        start.merge(state)
    assert (start.num_updates, start.count) == (6, 120)
    np.testing.assert_allclose(start.var, parts.reshape(-1, 4).var(axis=0, ddof=1), rtol=1e-12)


def test_killed_while_saving(tmp_path: Path) -> None:
    """The file holds one of the states that were being saved, and is never damaged."""
    path = tmp_path / "stats.npz"
    code = (
        "import sys, numpy as np, bnarray as bn\n"
        "states = []\n"
        "for value in (1.0, 2.0):\n"
        "    states.append(bn.RunningStats(20_000, update_rate=1, correction=0))\n"
        "    bn.batch_norm(np.full((2, 20_000), value), stats=states[-1])\n"
        "states[0].save(sys.argv[1])\n"
        "print('ready', flush=True)\n"
        "while True:\n"
        "    for state in states:\n"
        "        state.save(sys.argv[1])\n"
    )
    rng, found = np.random.default_rng(0), set()
    for _ in range(8):
        with subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            process.stdout.readline()
            time.sleep(rng.uniform(0, 0.05))
            process.kill()
        saved = bn.RunningStats.load(path)
        values = np.unique(saved.mean)
        assert values.size == 1
        found.add(float(values[0]))
    assert found <= {1.0, 2.0}


def test_states_of_forked_children_are_their_own(run_python: Callable[..., str]) -> None:
    """A child goes on from its copy; the parent's state hears nothing of it."""
    code = """
import multiprocessing, warnings
import numpy as np
warnings.simplefilter("ignore", DeprecationWarning)  # a fork of a process with threads
import bnarray as bn
stats = bn.RunningStats(4, update_rate=None)
x = np.arange(12.0).reshape(3, 4)
bn.batch_norm(x, stats=stats)
def child(queue):
    bn.batch_norm(x, stats=stats)
    queue.put((stats.num_updates, stats.count))
context = multiprocessing.get_context("fork")
queue = context.Queue()
process = context.Process(target=child, args=(queue,))
process.start()
print(queue.get(timeout=60), (stats.num_updates, stats.count))
process.join()
"""
    assert run_python(code) == "(2, 6) (1, 3)\n"
