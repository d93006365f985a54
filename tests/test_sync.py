"""Groups of processes: the batch is that of all members together.

`Threads` is a group inside one process, for breadth; the same promises are then held against MPI and gloo.
"""

import ctypes
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import bnarray as bn
from tests.cases import DTYPES, OPTIONS, Options, draw
from tests.libraries import library, opened

ROOT = Path(__file__).parents[1]


class _Room:
    """Where the threads of a group meet."""

    def __init__(self, size: int) -> None:
        self.rows: list[Any] = [None] * size
        self.barrier = threading.Barrier(size, timeout=20)
        self.gathered = 0


@dataclass
class Threads:
    """A member of a group of threads: the protocol, and nothing more."""

    room: _Room
    rank: int

    @property
    def size(self) -> int:
        return len(self.room.rows)

    def allgather(self, array: np.ndarray) -> np.ndarray:
        assert array.dtype == np.float64
        assert array.ndim == 1
        self.room.rows[self.rank] = array.copy()
        self.room.barrier.wait()
        rows = np.stack(self.room.rows)  # raises where lengths differ
        self.room.gathered += self.rank == 0
        self.room.barrier.wait()
        return rows


def together(size: int, member: Callable[[Threads], Any]) -> list[Any]:
    """Run a function for every member at once; return what each returned or raised."""
    room = _Room(size)

    def run(rank: int) -> Any:
        try:
            return member(Threads(room, rank))
        except Exception as error:
            return error

    with ThreadPoolExecutor(size) as pool:
        results = list(pool.map(run, range(size)))
    broken = [each for each in results if isinstance(each, threading.BrokenBarrierError)]
    assert not broken, "a member waited for others that did not come"
    return results


def _returned(results: list[Any]) -> list[Any]:
    for each in results:
        if isinstance(each, Exception):
            raise each
    return results


#: How many rows of the batch each member has: uneven, with empty ones first, last and in between.
SHARDS = [(7,), (5, 2), (0, 7), (7, 0), (1, 0, 4, 2)]


def _cut(array: Any, shape: tuple[int, ...], begin: int, end: int) -> Any:
    """A member's part along axis 0 of what is shaped like x, or broadcasts to it."""
    if not isinstance(array, np.ndarray) or array.ndim < len(shape) or array.shape[0] == 1:
        return array
    return array[begin:end]


def _shards(sizes: tuple[int, ...]) -> list[tuple[int, int]]:
    ends = np.cumsum(sizes)
    return [(int(end - size), int(end)) for size, end in zip(sizes, ends, strict=True)]


@pytest.mark.parametrize("sizes", SHARDS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", [each for each in OPTIONS if not each.evaluate], ids=lambda each: each.name)
@pytest.mark.parametrize(("shape", "kept"), [((7, 5), (1,)), ((7, 3, 4), (1, 2)), ((7, 2, 3, 5), (3,)), ((7, 4), ())])
def test_like_one_process(
    sizes: tuple[int, ...], dtype: str, options: Options, shape: tuple[int, ...], kept: tuple[int, ...]
) -> None:
    """Forward, backward, moments and running statistics are those of the concatenated batch."""
    case = draw(shape, kept, "c", dtype, options)
    features = tuple(shape[i] for i in kept)
    call = {**case.call, "axis": kept, "activation": "relu" if case.relu else None}
    stats = bn.RunningStats(features)
    y, saved = bn.batch_norm_forward(case.x, stats=stats, **call)
    expected = bn.batch_norm_backward(case.dy, saved)
    shards = _shards(sizes)

    def member(group: Threads) -> Any:
        cut = shards[group.rank]
        own = {name: value if name in ("weight", "bias") else _cut(value, shape, *cut) for name, value in call.items()}
        own_stats = bn.RunningStats(features)
        x, dy = case.x[slice(*cut)], case.dy[slice(*cut)]
        own_y, own_saved = bn.batch_norm_forward(x, stats=own_stats, group=group, **own)
        gradients = bn.batch_norm_backward(dy, own_saved)
        m = bn.moments(x, axis=kept, where=own.get("where"), group=group)
        also = bn.batch_norm(x, group=group, **own)
        in_place = x.copy()
        np.testing.assert_array_equal(bn.batch_norm(in_place, group=group, out=in_place, **own), own_y)
        np.testing.assert_array_equal(also, own_y)
        for one, other in ((m.mean, own_saved.moments.mean), (m.m2, own_saved.moments.m2)):
            np.testing.assert_array_equal(one, other)
        return own_y, gradients, own_saved.moments, own_stats

    results = _returned(together(len(sizes), member))
    close = {"rtol": 1e-12, "atol": 1e-12}
    if dtype != "float64":
        epsilon = {"float16": 2.0**-10, "bfloat16": 2.0**-7, "float32": 2.0**-23}[dtype]
        close = {"rtol": 4 * epsilon, "atol": 16 * epsilon}

    def compare(one: Any, other: Any, **how: float) -> None:
        np.testing.assert_allclose(np.asarray(one, np.float64), np.asarray(other, np.float64), **(how or close))

    compare(np.concatenate([each[0] for each in results]), y)
    compare(np.concatenate([each[1].x for each in results]), expected.x)
    if case.call.get("residual") is not None:
        compare(np.concatenate([each[1].residual for each in results]), expected.residual)
    for name in ("weight", "bias"):
        if name in case.call:
            compare(sum(np.asarray(getattr(each[1], name), np.float64) for each in results), getattr(expected, name),
                    rtol=1e-5, atol=1e-5)  # fmt: skip
    _, _, moments, first = results[0]
    exact = {"rtol": 1e-12, "atol": 1e-12} if dtype == "float64" else {"rtol": 1e-5, "atol": 1e-5}
    compare(moments.mean, saved.moments.mean, **exact)
    compare(moments.m2, saved.moments.m2, **exact)
    assert type(moments.count) is type(saved.moments.count)
    compare(moments.count, saved.moments.count, rtol=1e-6)
    compare(first.var, stats.var, **exact)
    for _, _, other, own_stats in results[1:]:  # the same bits on every rank
        for one, two in ((moments.mean, other.mean), (moments.m2, other.m2), (first.var, own_stats.var)):
            np.testing.assert_array_equal(one, two)
        assert own_stats.num_updates == 1


def test_empty_only_if_all_are() -> None:
    def member(group: Threads) -> Any:
        stats = bn.RunningStats(3)
        y, saved = bn.batch_norm_forward(np.empty((0, 3)), np.ones(3), np.ones(3), stats=stats, group=group)
        gradients = bn.batch_norm_backward(np.empty((0, 3)), saved)
        return y, saved.moments, gradients, stats

    for y, moments, gradients, stats in _returned(together(3, member)):
        assert y.shape == gradients.x.shape == (0, 3)
        assert moments.count == 0
        assert stats.num_updates == stats.num_skipped == 0
        np.testing.assert_array_equal(gradients.weight, np.zeros(3))


def test_a_mask_on_one_member_alone() -> None:
    x = np.random.default_rng(0).normal(size=(6, 3))
    mask = np.array([[True, False, True], [True, True, False], [False, False, True]])
    expected = bn.moments(x, where=np.concatenate([mask, np.ones((3, 3), bool)]))

    def member(group: Threads) -> Any:
        part = slice(0, 3) if group.rank == 0 else slice(3, 6)
        return bn.moments(x[part], where=mask if group.rank == 0 else None, group=group)

    for found in _returned(together(2, member)):
        np.testing.assert_array_equal(found.count, expected.count)
        np.testing.assert_allclose(found.m2, expected.m2, rtol=1e-12)


def test_evaluation_does_not_communicate() -> None:
    def member(group: Threads) -> Any:
        x = np.random.default_rng(group.rank).normal(size=(4, 3))
        if group.rank == 0:
            y, saved = bn.batch_norm_forward(x, stats=bn.RunningStats(3), training=False, group=group)
            np.testing.assert_array_equal(bn.batch_norm(x, stats=bn.RunningStats(3), training=False), y)
            bn.batch_norm_backward(x, saved)
        return group.room.gathered

    assert _returned(together(2, member)) == [0, 0]


def test_two_exchanges_a_pass() -> None:
    def member(group: Threads) -> Any:
        _, saved = bn.batch_norm_forward(np.ones((4, 3)), group=group)
        forward = group.room.gathered
        bn.batch_norm_backward(np.ones((4, 3)), saved)
        return forward, group.room.gathered

    assert _returned(together(2, member))[0] == (2, 4)


#: What the last of three members does otherwise, and what all of them then read.
DISAGREEMENTS: list[tuple[dict[str, Any], str]] = [
    ({"x": np.ones((4, 5))}, "the features' shape"),
    ({"x": np.ones((4, 3), np.float32)}, "dtype"),
    ({"x": np.ones((3, 4)), "axis": 0}, "axis"),
    ({"eps": 1e-3}, "eps"),
    ({"activation": "relu"}, "activation"),
    ({"weight": np.ones(3)}, "whether there is a weight"),
    ({"bias": np.ones(3)}, "whether there is a bias"),
    ({"residual": np.ones((4, 3))}, "whether there is a residual"),
    ({"stats": bn.RunningStats(3, nonfinite="raise")}, "the settings of stats"),
]


@pytest.mark.parametrize(("otherwise", "what"), DISAGREEMENTS, ids=[what for _, what in DISAGREEMENTS])
def test_disagreement_raises_on_every_rank(otherwise: dict[str, Any], what: str) -> None:
    def member(group: Threads) -> Any:
        call = {"x": np.ones((4, 3)), **(otherwise if group.rank == 2 else {})}
        return bn.batch_norm(group=group, **call)

    for rank, error in enumerate(together(3, member)):
        assert isinstance(error, ValueError), error
        assert f"{what} at rank 2 is not that of rank 0 (here, at rank {rank}" in str(error)


def test_different_functions() -> None:
    x = np.ones((4, 3))

    def member(group: Threads) -> Any:
        return bn.moments(x, group=group) if group.rank else bn.batch_norm(x, group=group)

    for error in together(2, member):
        assert isinstance(error, ValueError)
        assert "function at rank 1 is not that of rank 0" in str(error)


@pytest.mark.parametrize(
    "wrong",
    [{"x": [1.0]}, {"axis": 7}, {"eps": "a"}, {"where": np.ones((9, 9), bool)}, {"momentum": 0.1}, {"unknown": 1}],
    ids=str,
)
def test_an_error_of_one_member_reaches_all(wrong: dict[str, Any]) -> None:
    """The member raises its own; nobody waits for it, and no state has changed."""
    stats = [bn.RunningStats(3) for _ in range(3)]

    def member(group: Threads) -> Any:
        call = {"x": np.ones((4, 3)), **(wrong if group.rank == 1 else {})}
        return bn.batch_norm(group=group, stats=stats[group.rank], **call)

    first, own, last = together(3, member)
    assert type(own) in (TypeError, ValueError)
    for error in (first, last):
        assert isinstance(error, RuntimeError)
        assert "rank 1 of the group raised an error" in str(error)
    assert [each.num_updates for each in stats] == [0, 0, 0]


def test_an_error_in_backward_reaches_all() -> None:
    def member(group: Threads) -> Any:
        _, saved = bn.batch_norm_forward(np.ones((4, 3)), group=group)
        return bn.batch_norm_backward(np.ones((4, 3 + group.rank)), saved)

    first, own = together(2, member)
    assert isinstance(own, ValueError)
    assert isinstance(first, RuntimeError)


@pytest.mark.parametrize("nonfinite", ["skip", "raise", "propagate"])
@pytest.mark.filterwarnings("ignore:the batch's statistics hold")
def test_nonfinite_is_decided_alike(nonfinite: str) -> None:
    """One member's NaN is every member's."""
    stats = [bn.RunningStats(2, nonfinite=nonfinite) for _ in range(3)]

    def member(group: Threads) -> Any:
        x = np.random.default_rng(group.rank).normal(size=(4, 2))
        if group.rank == 1:
            x[0, 0] = np.nan
        return bn.batch_norm(x, stats=stats[group.rank], group=group)

    results = together(3, member)
    assert all(isinstance(each, FloatingPointError) == (nonfinite == "raise") for each in results)
    expected = {"skip": (0, 1), "raise": (0, 0), "propagate": (1, 0)}[nonfinite]
    assert [(each.num_updates, each.num_skipped) for each in stats] == [expected] * 3


def test_weights_beyond_the_largest_number_raise_everywhere() -> None:
    def member(group: Threads) -> Any:
        return bn.moments(np.ones((4, 2)), where=np.full((4, 2), 1e308) if group.rank else None, group=group)

    for error in together(2, member):
        assert isinstance(error, ValueError)
        assert "where holds weights" in str(error)


def test_one_member() -> None:
    x = np.random.default_rng(0).normal(size=(9, 4))
    (y,) = _returned(together(1, lambda group: bn.batch_norm(x, group=group)))
    np.testing.assert_array_equal(y, bn.batch_norm(x))


class _OneBuffer:
    """A group of one that gathers into the same memory again and again; its numbers are NumPy's."""

    rank, size = np.int64(0), np.int32(1)

    def __init__(self) -> None:
        self._rows = np.empty((1, 100))

    def allgather(self, array: np.ndarray) -> np.ndarray:
        self._rows[0, : array.size] = array
        return self._rows[:, : array.size]


def test_a_group_that_gathers_into_its_own_memory() -> None:
    x, other = np.random.default_rng(0).normal(size=(2, 9, 4))
    group, stats = _OneBuffer(), bn.RunningStats(4, update_rate=None)
    m = bn.moments(x, group=group)
    _, saved = bn.batch_norm_forward(x, stats=stats, group=group)
    bn.moments(other, group=group)
    for found in (m.mean, saved.moments.mean, stats.mean):
        np.testing.assert_array_equal(found, bn.moments(x).mean)
    expected = bn.batch_norm_backward(x, bn.batch_norm_forward(x)[1])
    np.testing.assert_allclose(bn.batch_norm_backward(x, saved).x, expected.x, rtol=1e-12, atol=1e-14)


class _Wrong:
    rank, size = 0, 2

    def allgather(self, array: np.ndarray) -> Any:
        return array


@pytest.mark.parametrize("training", [True, False])
def test_what_is_no_group(training: bool) -> None:
    x, stats = np.ones((4, 3)), bn.RunningStats(3)
    for group, message in (
        (object(), "group is a builtins.object"),
        (1, "group is a builtins.int"),
        (Threads, "group is a builtins.type"),
    ):
        with pytest.raises(TypeError, match=message):
            bn.batch_norm(x, stats=stats, training=training, group=group)
    unsaid = _Wrong()
    unsaid.size = lambda: 2
    with pytest.raises(ValueError, match="group has rank 0 and size <function"):
        bn.batch_norm(x, stats=stats, training=training, group=unsaid)
    outside = _Wrong()
    outside.rank = 2
    with pytest.raises(ValueError, match="group has rank 2 and size 2"):
        bn.batch_norm(x, stats=stats, training=training, group=outside)


def test_what_a_group_must_return() -> None:
    with pytest.raises(ValueError, match=r"group.allgather returned an array of shape .* one row a member"):
        bn.batch_norm(np.ones((4, 3)), group=_Wrong())


@pytest.mark.parametrize("name", ["array_api_strict", "torch"])
def test_libraries(name: str) -> None:
    x, dy = np.random.default_rng(0).normal(size=(2, 9, 4))
    weight = np.linspace(0.5, 2, 4)
    expected_y, saved = bn.batch_norm_forward(x, weight)
    expected = bn.batch_norm_backward(dy, saved)
    make, back = library(name).make, library(name).back

    def member(group: Threads) -> Any:
        part = slice(0, 3) if group.rank == 0 else slice(3, 9)
        own = make(x[part]), make(weight)
        y, own_saved = bn.batch_norm_forward(*own, group=group)
        gradients = bn.batch_norm_backward(make(dy[part]), own_saved)
        assert type(own_saved.moments.mean) is type(own[0])
        return back(y), back(gradients.x), back(gradients.weight)

    ys, dxs, dweights = zip(*_returned(together(2, member)), strict=True)
    np.testing.assert_allclose(np.concatenate(ys), expected_y, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(np.concatenate(dxs), expected.x, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(sum(dweights), expected.weight, rtol=1e-12, atol=1e-12)


@pytest.fixture(scope="module")
def torch() -> Any:
    return pytest.importorskip("torch", reason="torch is not installed: autograd through a group is not verified")


def test_autograd(torch: Any) -> None:
    """Eager calls on every member, with the same gradients as one process."""
    values, residual = torch.from_numpy(np.random.default_rng(0).normal(size=(2, 9, 4)))

    def gradients(rows: slice, **keywords: Any) -> list[Any]:
        x, added = (each[rows].clone().requires_grad_() for each in (values, residual))
        weight, bias = torch.linspace(0.5, 2, 4, requires_grad=True), torch.zeros(4, requires_grad=True)
        y = bn.batch_norm(x, weight, bias, residual=added, activation="relu", **keywords)
        return [y, *torch.autograd.grad((y**3).sum(), (x, added, weight, bias))]

    shards = [slice(0, 3), slice(3, 3), slice(3, 9)]
    results = _returned(together(3, lambda group: gradients(shards[group.rank], group=group)))
    for i, expected in enumerate(gradients(slice(None))):
        parts = [each[i] for each in results]
        found = torch.cat(parts) if i < 3 else sum(parts)
        torch.testing.assert_close(found, expected, rtol=1e-11 if i < 3 else 1e-5, atol=1e-11 if i < 3 else 1e-5)


def test_a_parameter_alone_requires_grad(torch: Any) -> None:
    """The first layer's x has no gradient; nobody waits for the sums of its backward pass."""
    values = torch.from_numpy(np.random.default_rng(0).normal(size=(8, 2)))

    def member(group: Threads) -> Any:
        weight = torch.ones(2, requires_grad=True)
        own = values[:3] if group.rank == 0 else values[3:]
        (bn.batch_norm(own, weight, group=group) ** 3).sum().backward()
        return weight.grad

    weight = torch.ones(2, requires_grad=True)
    (bn.batch_norm(values, weight) ** 3).sum().backward()
    torch.testing.assert_close(sum(_returned(together(2, member))), weight.grad)


def test_autograd_follows_all_or_none(torch: Any) -> None:
    def member(group: Threads) -> Any:
        return bn.batch_norm(torch.ones(4, 3, requires_grad=group.rank == 0), group=group)

    for error in together(2, member):
        assert isinstance(error, ValueError)
        assert "whether autograd follows the call" in str(error)


def test_what_torch_cannot_follow(torch: Any) -> None:
    def second_order(group: Threads) -> Any:
        x = torch.arange(6.0).reshape(3, 2).requires_grad_()
        return torch.autograd.grad((bn.batch_norm(x, group=group) ** 3).sum(), x, create_graph=True)

    def mapped(group: Threads) -> Any:
        return torch.func.vmap(lambda x: bn.batch_norm(x, group=group))(torch.ones(2, 4, 3))

    def moments(group: Threads) -> Any:
        return bn.moments(torch.ones(4, 3, requires_grad=True), group=group)

    for function, message in (
        (second_order, "create_graph"),
        (mapped, "torch.compiler.disable"),
        (moments, r"x.detach\(\)"),
    ):
        for error in together(2, function):
            assert isinstance(error, NotImplementedError)
            assert re.search(message, str(error))


@pytest.mark.parametrize("name", ["jax", "dask", "autograd"])
def test_libraries_that_are_refused(name: str) -> None:
    """On every member, and with a word about the way out; statistics alone likewise."""
    with opened(name) as (each,):
        x = each.make(np.ones((4, 3)))
        for call in (bn.batch_norm, bn.moments):
            for error in together(2, lambda group, call=call: call(x, group=group)):
                assert isinstance(error, NotImplementedError)
                assert "pass arrays of NumPy" in str(error)


# -- Processes ---------------------------------------------------------------------------------------------------------

_MPIEXEC = Path(sys.executable).with_name("mpiexec")


def _run_all(commands: list[list[str]]) -> list[tuple[int, str]]:
    """Run commands at once; return how each ended and what it said."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONFAULTHANDLER": "1"}
    processes = [
        subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            env=environment, cwd=ROOT,
        )
        for command in commands
    ]  # fmt: skip
    try:
        said = [process.communicate(timeout=120)[0] for process in processes]
    finally:
        for process in processes:
            process.terminate()
    return [(process.returncode, each) for process, each in zip(processes, said, strict=True)]


def _mpi(size: int, *arguments: str) -> tuple[int, str]:
    pytest.importorskip("mpi4py", reason="mpi4py is not installed: groups over MPI are not verified")
    if not _MPIEXEC.exists():
        pytest.skip("there is no mpiexec beside this Python: groups over MPI are not verified")
    command = [str(_MPIEXEC), "-n", str(size), sys.executable, "-W", "error", "-m", "mpi4py", *arguments]
    (result,) = _run_all([command])
    return result


def _gloo(size: int, what: str, place: Path, seconds: int = 60) -> list[tuple[int, str]]:
    pytest.importorskip("torch.distributed", reason="torch is not installed: groups over gloo are not verified")
    member = [sys.executable, "-W", "error", "-m", "tests.member", what, "gloo", str(place / "store")]
    return _run_all([[*member, str(rank), str(size), str(seconds)] for rank in range(size)])


@pytest.mark.parametrize("size", [2, 4])
def test_mpi(size: int) -> None:
    code, said = _mpi(size, "-m", "tests.member", "all", "mpi")
    assert code == 0, said
    assert all(f"all {rank}" in said for rank in range(size))


def test_autograd_over_mpi(torch: Any) -> None:
    code, said = _mpi(2, "-m", "tests.member", "torch", "mpi")
    assert code == 0, said


def test_mpi_ends_when_a_member_does() -> None:
    code, said = _mpi(2, "-m", "tests.member", "dies", "mpi")
    assert code != 0
    assert "dies" not in said.split()


@pytest.mark.parametrize("what", ["all", "torch"])
def test_gloo(what: str, tmp_path: Path) -> None:
    for rank, (code, said) in enumerate(_gloo(2, what, tmp_path)):
        assert code == 0, (code, said)
        assert f"{what} {rank}" in said


@pytest.mark.parametrize("what", ["dies", "sleeps"])
def test_gloo_raises_when_a_member_does_not_come(what: str, tmp_path: Path) -> None:
    """At once where it is dead, else after the group's timeout."""
    (code, said), _ = _gloo(2, what, tmp_path, seconds=3)
    assert code != 0
    assert "Error" in said


def test_the_training_loop_of_the_documentation(tmp_path: Path) -> None:
    """Two processes reach the losses of one."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs/processes.md").read_text(encoding="utf-8"), re.DOTALL)
    loop = tmp_path / "loop.py"
    loop.write_text(blocks[-1], encoding="utf-8")
    losses = []
    for size in (1, 2):
        code, said = _mpi(size, str(loop))
        assert code == 0, said
        losses.append([float(line) for line in said.split()])
    assert len(losses[0]) == 3
    assert losses[0][2] < losses[0][0] / 50
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-6)


class _Cupy:
    """A double of what is asked of CuPy: arrays are NumPy's, device pointers their addresses."""

    class _Array(np.ndarray):
        @property
        def data(self) -> Any:  # type: ignore[override]  # as CuPy has it
            return SimpleNamespace(ptr=self.ctypes.data)

    def __init__(self) -> None:
        self.devices: list[int] = []
        self.cuda = SimpleNamespace(
            Device=self._device,
            get_current_stream=lambda: SimpleNamespace(ptr=7),
            nccl=SimpleNamespace(NCCL_FLOAT64=8),
        )

    @contextmanager
    def _device(self, number: int) -> Iterator[None]:
        self.devices.append(number)
        yield

    def asarray(self, array: np.ndarray) -> np.ndarray:
        return array.copy().view(self._Array)

    def empty(self, shape: tuple[int, ...]) -> np.ndarray:
        return np.full(shape, np.nan).view(self._Array)

    def asnumpy(self, array: np.ndarray) -> np.ndarray:
        return np.array(array.view(np.ndarray))


@dataclass
class NcclCommunicator:
    """A double of CuPy's, between threads."""

    member: Threads

    def rank_id(self) -> int:
        return self.member.rank

    def size(self) -> int:
        return self.member.size

    def device_id(self) -> int:
        return 3

    def allGather(self, send: int, receive: int, count: int, kind: int, stream: int) -> None:  # noqa: N802  # its name
        assert (kind, stream) == (8, 7)
        item = ctypes.c_double * count
        rows = self.member.allgather(np.array(item.from_address(send)))
        ctypes.memmove(receive, rows.ctypes.data, rows.nbytes)


def test_nccl_of_cupy_by_a_double(monkeypatch: pytest.MonkeyPatch) -> None:
    cupy = _Cupy()
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    x = np.random.default_rng(0).normal(3, 2, (9, 4))
    parts = x[:2], x[2:]
    found = together(2, lambda member: bn.batch_norm(parts[member.rank], group=NcclCommunicator(member)))
    np.testing.assert_allclose(np.concatenate(found), bn.batch_norm(x), rtol=1e-12, atol=1e-12)
    assert set(cupy.devices) == {3}
