"""torch's own threads, which share the work on its tensors."""

import ctypes.util
import hashlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

import bnarray as bn
from bnarray.kernels.cpu import openmp, pool

torch = pytest.importorskip("torch", reason="torch is not installed: its threads are not verified")

from bnarray.backends import _torch_tensors as tensors  # noqa: E402  # imports torch

pytestmark = pytest.mark.skipif(
    not isinstance(tensors._TEAM, openmp.Crew),
    reason="torch's threads take no work from others here: that theirs do it is not verified",
)


@pytest.fixture
def two(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Two threads of torch's, whatever the machine, and at least as many of Numba's."""
    monkeypatch.setattr(pool, "threads", lambda: 4)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def shared(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """Who shared calls, and among how many."""
    calls: list[tuple[str, int]] = []

    def spy(team: Any, name: str) -> None:
        share = team.share
        monkeypatch.setattr(team, "share", lambda number, *rest: (calls.append((name, number)), share(number, *rest)))

    spy(tensors._TEAM, "torch")
    spy(pool.helpers, "helpers")
    return calls


def _digest(x: Any) -> str:
    y, saved = bn.batch_norm_forward(x)
    gradients = bn.batch_norm_backward(x, saved)
    return hashlib.sha256(b"".join(np.asarray(each).tobytes() for each in (y, gradients.x))).hexdigest()


X = np.random.default_rng(0).normal(size=(8, 64, 50, 30)).astype(np.float32)


@pytest.mark.usefixtures("two")
def test_tensors_are_shared_by_torch_s_threads_and_arrays_by_ours(shared: list[tuple[str, int]]) -> None:
    expected = _digest(X)
    assert shared
    assert {name for name, _ in shared} == {"helpers"}
    shared.clear()
    assert _digest(torch.from_numpy(X)) == expected
    assert set(shared) == {("torch", 2)}


@pytest.mark.parametrize(("ours", "theirs"), [(1, 4), (4, 1)])
def test_no_more_threads_than_either_has(
    ours: int, theirs: int, shared: list[tuple[str, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool, "threads", lambda: ours)
    monkeypatch.setattr(tensors._TEAM, "_threads", lambda: theirs)
    bn.batch_norm(torch.from_numpy(X))
    with pool.serial():
        bn.batch_norm(torch.from_numpy(X))
    assert not shared


@pytest.mark.parametrize("theirs", [2, 3, 7])
@pytest.mark.parametrize("ours", [2, 5])
def test_same_bits_for_any_number_of_threads(
    ours: int, theirs: int, shared: list[tuple[str, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where torch has more threads than we are to use, some of them find no seat."""
    monkeypatch.setattr(pool, "threads", lambda: 1)
    expected = _digest(torch.from_numpy(X))
    monkeypatch.setattr(pool, "threads", lambda: ours)
    monkeypatch.setattr(tensors._TEAM, "_threads", lambda: theirs)
    assert {_digest(torch.from_numpy(X)) for _ in range(10)} == {expected}
    assert set(shared) == {("torch", min(ours, theirs))}


@pytest.mark.usefixtures("two")
def test_many_threads_of_python_at_once() -> None:
    expected, found = _digest(torch.from_numpy(X)), []

    def work() -> None:
        for _ in range(5):
            found.append(_digest(torch.from_numpy(X)))

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [expected] * 30


def test_no_thread_of_ours_is_started(run_python: Callable[..., str]) -> None:
    code = """
import threading, torch, bnarray as bn
from bnarray.kernels.cpu import pool
torch.set_num_threads(2)
x = torch.ones(400_000, 8, requires_grad=True)
bn.batch_norm(x).sum().backward()
print(pool.helpers.hired, threading.active_count())
"""
    assert run_python(code, NUMBA_NUM_THREADS="2") == "[] 1\n"


def test_forked_child_and_its_parent(run_python: Callable[..., str]) -> None:
    """In a child, torch's threads would be waited for in vain: it has helpers of its own."""
    code = """
import os, warnings
warnings.simplefilter("ignore", DeprecationWarning)  # of a fork in a process with threads
import torch, bnarray as bn
from bnarray.kernels.cpu import pool
torch.set_num_threads(2)
x = torch.randn(400_000, 8)
y = bn.batch_norm(x)
child = os.fork()
if child == 0:
    os._exit(0 if bn.batch_norm(x).numpy().tobytes() == y.numpy().tobytes() and pool.helpers.hired else 1)
assert os.waitpid(child, 0)[1] == 0
assert (bn.batch_norm(x) == y).all() and not pool.helpers.hired
print("both")
"""
    assert run_python(code, NUMBA_NUM_THREADS="2") == "both\n"


def test_a_kernel_that_fails(run_python: Callable[..., str]) -> None:
    code = """
import numpy as np, torch
from numba import types
from bnarray.backends import _torch_tensors as tensors
from bnarray.kernels.cpu import pool
from bnarray.kernels.cpu.compiled import Kernel, counter, index, scratch

def piece_by_piece(counter, scratch, fail_from, seen):
    piece = pool.take(counter)
    scratch[:] = piece
    while piece < 8:
        if piece >= fail_from:
            raise ValueError("as told")
        seen[piece] += 1
        piece = pool.take(counter)
kernel = Kernel("piece_by_piece", types.void(counter, scratch, index, types.Array(types.int64, 1, "C")), piece_by_piece)
torch.set_num_threads(2)
for fail_from in (8, 5, 8):
    seen = np.zeros(8, np.int64)
    try:
        print(pool.run(kernel, 8, 64, fail_from, seen, owners=(), team=tensors._TEAM), seen)
    except RuntimeError as error:
        print(error, seen[:5])
"""
    done = "True [1 1 1 1 1 1 1 1]\n"
    assert run_python(code, NUMBA_NUM_THREADS="2") == f"{done}a kernel failed [1 1 1 1 1]\n{done}"


@pytest.mark.parametrize("path", ["nowhere/libnone.so", None])
def test_a_runtime_that_takes_no_work(path: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where torch is linked with none, or with one of another kind, helpers of ours share the work."""
    libc = ctypes.util.find_library("c")
    monkeypatch.setattr(torch._C, "__file__", path or libc)
    assert tensors._team() is pool.helpers
