"""The user's process: threads, forks, determinism, memory, interruptions."""

import linecache
import os
import signal
import sys
import threading
import time
import tracemalloc
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numba
import numpy as np
import pytest

import bnarray as bn
from bnarray.backends import _again, _strided, generic
from bnarray.backends import numpy as backend
from bnarray.kernels.cpu import pool
from tests.cases import LAYOUTS, OPTIONS, draw

BIG = [((32, 24, 40, 41), (1,)), ((60_000, 24), (1,)), ((24, 60_000), (0,)), ((1_400_000,), ())]


def _everything(
    shape: tuple[int, ...], kept: tuple[int, ...], layout: str, dtype: str, options: Any
) -> list[np.ndarray]:
    """Forward and backward: every array that a case's calls return."""
    case = draw(shape, kept, layout, dtype, options)
    y, saved = bn.batch_norm_forward(case.x, axis=kept, activation="relu" if case.relu else None, **case.call)
    gradients = bn.batch_norm_backward(case.dy, saved)
    return [y, saved.moments.mean, saved.moments.m2, *(each for each in gradients if each is not None)]


@pytest.mark.parametrize(("shape", "kept"), BIG)
@pytest.mark.parametrize("layout", ["c", "fortran", "sliced"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_same_bits_for_any_number_of_threads(
    shape: tuple[int, ...], kept: tuple[int, ...], layout: str, dtype: str
) -> None:
    if numba.config.NUMBA_NUM_THREADS < 2:
        pytest.skip("one processor: that two threads give the same bits is not verified")
    options = next(o for o in OPTIONS if o.name == "weights_full_relu")
    for chosen in (OPTIONS[1], options):
        results = []
        for threads in (1, 2):
            numba.set_num_threads(threads)
            results.append(_everything(shape, kept, layout, dtype, chosen))
        for one, two in zip(*results, strict=True):
            np.testing.assert_array_equal(one, two)


@pytest.mark.parametrize("layout", ["c", "channels_last"])
def test_same_bits_wherever_the_memory_is(layout: str) -> None:
    """At any address, into any out, in place or not."""
    x = LAYOUTS[layout](np.random.default_rng(0).normal(3, 2, (5, 13, 7, 11)).astype(np.float32))
    expected, m = bn.batch_norm(x), bn.moments(x)
    for offset in (0, 4, 20, 36, 1, 6):
        buffer = np.zeros(x.nbytes + 64, np.uint8)
        order = np.argsort(x.strides)[::-1]
        moved = buffer[offset : offset + x.nbytes].view(np.float32).reshape([x.shape[i] for i in order])
        moved = moved.transpose(np.argsort(order))
        moved[...] = x
        assert moved.strides == x.strides
        np.testing.assert_array_equal(bn.moments(moved).m2, m.m2)
        np.testing.assert_array_equal(bn.batch_norm(x, out=moved.copy(order="K")), expected)
        np.testing.assert_array_equal(bn.batch_norm(moved, out=moved), expected)
    strided = np.zeros((5, 13, 14, 22), np.float32)[:, :, ::2, ::2]
    np.testing.assert_array_equal(bn.batch_norm(x, out=strided), expected)


def test_many_threads_share_a_state() -> None:
    """No update is lost and no read is torn, while large calls share the pool."""
    stats = bn.RunningStats(4, update_rate=None)
    rng = np.random.default_rng(0)
    small = [rng.normal(i, 1, (30, 4)) for i in range(16)]
    large = rng.normal(5, 2, (400_000, 4)).astype(np.float32)
    torn = []

    def work(i: int) -> None:
        for _ in range(40):
            bn.batch_norm(small[i], stats=stats)
            seen = stats.copy()
            if seen.count != 30 * seen.num_updates:
                torn.append(seen.count)
        bn.batch_norm(large)

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(work, range(16)))
    assert stats.num_updates == 16 * 40
    assert stats.count == 16 * 40 * 30
    everything = np.concatenate(small)
    np.testing.assert_allclose(stats.mean, everything.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(stats.var * (stats.count - 1) / stats.count, everything.var(axis=0), rtol=1e-10)
    assert not torn


def test_more_threads_than_cores(run_python: Callable[..., str]) -> None:
    """Helpers that get no core in time are not waited for, and the bits stay the same."""
    code = """
import hashlib, numba, numpy as np, bnarray as bn
digests = set()
x = np.random.default_rng(0).normal(size=(8, 64, 100, 30)).astype(np.float32)
for threads in (1, 2, 7, 12):
    numba.set_num_threads(threads)
    for _ in range(30):
        y, saved = bn.batch_norm_forward(x)
        digests.add(hashlib.sha256(y.tobytes() + bn.batch_norm_backward(x, saved).x.tobytes()).hexdigest())
print(len(digests))
"""
    assert run_python(code, NUMBA_NUM_THREADS="12") == "1\n"


FAILING = """
import gc, weakref, numpy as np
from numba import types
from bnarray.kernels.cpu import handover, pool
from bnarray.kernels.cpu.compiled import Kernel, counter, index, scratch

def sometimes(counter, scratch, fail_from):
    piece = pool.take(counter)
    if piece >= fail_from:
        raise ValueError("as told")
    scratch[0] = 7
kernel = Kernel("sometimes", types.void(counter, scratch, index), sometimes)
"""


def test_a_call_handed_over(run_python: Callable[..., str]) -> None:
    """It is made once, or taken back; a kernel that raises is told of."""
    code = """
post, unpack = handover.handover(kernel)
mail, own = np.zeros(handover.SIZE, np.int64), np.zeros(64, np.uint8)
counter = np.zeros(pool.WORDS, np.int64)
counter[pool.END], counter[pool.SEATS] = 9, 1
at = mail.ctypes.data
for _ in range(2):
    post.call(at, 5, 1, unpack.address, kernel.address, handover.NOBODY, counter, own, 1)
    handover.serve.call(at, 10)
    print(counter[pool.NEXT], own[0], mail[handover.STATE], mail[handover.FAILED])
post.call(at, 5, 1, unpack.address, kernel.address, handover.NOBODY, counter, own, 1)
print(handover.settle.call(at, 10), mail[handover.STATE])
handover.serve.call(at, 10)
mail[handover.STATE] = handover.TAKEN
print(counter[pool.NEXT], handover.settle.call(at, 10))
"""
    assert run_python(FAILING + code) == "1 7 0 0\n2 7 0 1\nTrue 0\n2 False\n"


SHARING = """
import numpy as np
from numba import types
from bnarray.kernels.cpu import pool
from bnarray.kernels.cpu.compiled import Kernel, counter, index, scratch

def in_order(counter, scratch, pieces, order):
    begun = 0
    piece = pool.take(counter)
    while piece < pieces:
        order[counter[pool.SEAT], begun] = piece
        begun += 1
        piece = pool.take(counter)
results = types.Array(types.int64, 2, "C")
kernel = Kernel("in_order", types.void(counter, scratch, index, results), in_order)
"""


def test_threads_have_shares(run_python: Callable[..., str]) -> None:
    """A thread takes its own pieces first and then the others', so that one that never comes is not missed."""
    code = """
order = np.full((3, 11), -1)
counters = pool._shares(3, 10).copy()
kernel.call(counters[1], np.empty(8, np.uint8), 10, order)
kernel.call(counters[2], np.empty(8, np.uint8), 10, order)
print(order[1].tolist(), (order[[0, 2]] == -1).all())
for pieces in (1, 2, 3, 7, 64, 1000):
    order = np.full((4, pieces), -1)
    pool.run(kernel, pieces, 64, pieces, order, owners=())
    print(sorted(order[order >= 0].tolist()) == list(range(pieces)), end=" ")
"""
    expected = "[3, 4, 5, 6, 7, 8, 9, 0, 1, 2, -1] True\n" + "True " * 6
    assert run_python(SHARING + code, NUMBA_NUM_THREADS="4") == expected


def test_a_kernel_that_fails(run_python: Callable[..., str]) -> None:
    """The caller hears of it, whichever thread it was; helpers go on, and nothing that they worked on is kept."""
    code = """
class Owner: pass
heard = set()
for fail_from in [0, 1] * 200:
    owner = Owner()
    alive = weakref.ref(owner)
    try:
        pool.run(kernel, 2, 64, fail_from, owners=(owner,))
    except (ValueError, RuntimeError) as error:
        heard.add(str(error))
    del owner
    gc.collect()
    assert alive() is None
assert heard <= {"as told", "a kernel failed in another thread than the caller's"} and "as told" in heard
import bnarray as bn
print(bn.batch_norm(np.ones((400_000, 8), np.float32)).sum(), len(pool.helpers.hired))
"""
    assert run_python(FAILING + code, NUMBA_NUM_THREADS="2") == "0.0 1\n"


def test_forked_child_and_its_parent(run_python: Callable[..., str]) -> None:
    """A child forked after threaded calls computes with threads of its own."""
    code = """
import os, numpy as np, bnarray as bn
x = np.random.default_rng(0).normal(size=(400_000, 8)).astype(np.float32)
stats = bn.RunningStats(8)
y = bn.batch_norm(x, stats=stats)
child = os.fork()
if child == 0:
    os._exit(0 if (bn.batch_norm(x, stats=stats) == y).all() and stats.num_updates == 2 else 1)
assert os.waitpid(child, 0)[1] == 0
assert (bn.batch_norm(x) == y).all()
print("both")
"""
    # Python 3.12 warns of forking a process with threads; that this one gets away with it is what is tested.
    assert run_python("import warnings; warnings.simplefilter('ignore', DeprecationWarning)\n" + code) == "both\n"


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_multiprocessing(method: str, run_python: Callable[..., str]) -> None:
    code = f"""
import multiprocessing, warnings, numpy as np
warnings.simplefilter("ignore", DeprecationWarning)  # as above
import bnarray as bn
if __name__ == "__main__":
    x = np.ones((400_000, 8), np.float32)
    bn.batch_norm(x)
    with multiprocessing.get_context({method!r}).Pool(2) as pool:
        print(sum(pool.map(bn.moments, [x] * 4), bn.moments(x)).count)
"""
    assert run_python(code) == "2000000\n"


def test_numba_is_left_alone(run_python: Callable[..., str]) -> None:
    """Neither its threading layer is started nor its configuration changed."""
    code = """
import os, numba, numpy as np
before = {name: getattr(numba.config, name) for name in dir(numba.config) if name.isupper()}
environment = dict(os.environ)
import bnarray as bn
x = np.ones((400_000, 8), np.float32)
bn.batch_norm_backward(x, bn.batch_norm_forward(x)[1])
assert before == {name: getattr(numba.config, name) for name in dir(numba.config) if name.isupper()}
assert environment == dict(os.environ)
try:
    numba.threading_layer()
except ValueError:
    print("not started")
"""
    assert run_python(code) == "not started\n"


def _peak(call: Callable[[], Any]) -> int:
    call()  # compiles
    tracemalloc.start()
    try:
        call()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_peak_memory(dtype: Any) -> None:
    """Strided, masked, in-place: beyond the output less than one array like x; in fact less than a tenth."""
    rng = np.random.default_rng(0)
    memory = rng.normal(size=(64, 32, 48, 48)).astype(dtype)
    where = rng.random((64, 1, 48, 48)) < 0.5
    residual, out, stats = memory.copy(), memory.copy(), bn.RunningStats(32)
    for x in (memory, memory[:, ::2, ::-1, ::3], memory.swapaxes(1, 3).copy().swapaxes(1, 3), memory.T.copy().T):
        part, kept = x.nbytes, x.shape[1]
        assert x.shape[1] in (16, 32)
        calls = {
            "moments": (lambda x=x: bn.moments(x), 0),
            "forward": (lambda x=x: bn.batch_norm(x), part),
            "forward saved": (lambda x=x: bn.batch_norm_forward(x), part),
        }
        if kept == 32:
            calls |= {
                "masked": (lambda x=x: bn.batch_norm(x, where=where, stats=stats), part),
                "residual relu": (lambda x=x: bn.batch_norm(x, residual=residual, activation="relu"), part),
                "out": (lambda x=x: bn.batch_norm(x, out=out), 0),
                "in place": (lambda: bn.batch_norm(out, out=out, where=where), 0),
            }
        _, saved = bn.batch_norm_forward(x)
        calls["backward"] = (lambda saved=saved, x=x: bn.batch_norm_backward(x, saved), part)
        for name, (call, output) in calls.items():
            extra = _peak(call) - output
            assert extra < 0.1 * part + 600_000, f"{name}: {extra} bytes beyond the output of {part}"


def test_more_than_two_to_the_31_elements() -> None:
    """Without as much memory: most of the elements are one."""
    size = 2**31 + 1000
    x = np.broadcast_to(np.float32(2.5), (size,))
    m = bn.moments(x, axis=())
    assert (m.count, m.mean, m.m2) == (size, 2.5, 0)
    rows = np.broadcast_to(np.arange(16, dtype=np.float16), (2**27 + 100, 16))
    m = bn.moments(rows)
    assert m.count == 2**27 + 100
    np.testing.assert_array_equal(m.mean, np.arange(16))


def test_indices_beyond_32_bits() -> None:
    """Both ends of an array of more than 2³¹ elements are read and written."""
    size = 2**31 + 4096
    available = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if available < 3 * size * 2:
        pytest.skip(f"{available >> 30} GB of memory: writing more than 2**31 elements is not verified")
    x = np.zeros((size // 4096, 4096), np.float16)
    x[0], x[-1] = 1, -1
    half = bn.Moments(1, np.zeros(()), np.full((), 4.0))
    assert bn.batch_norm(x, stats=half, training=False, axis=(), eps=0, out=x) is x
    np.testing.assert_array_equal(x[0], 0.5)
    np.testing.assert_array_equal(x[-1], -0.5)
    np.testing.assert_array_equal(x[x.shape[0] // 2], 0)


def _train_and_wait(x: np.ndarray, stats: bn.RunningStats) -> None:
    bn.batch_norm(x, stats=stats)
    time.sleep(5)  # for a machine that was faster than the signal


def test_interruption_leaves_the_state() -> None:
    """Ctrl-C inside a long call: KeyboardInterrupt, and no update."""
    if threading.current_thread() is not threading.main_thread():
        pytest.skip("signals arrive in the main thread only: interruption is not verified")
    x = np.random.default_rng(0).normal(size=(3_000_000, 8)).astype(np.float32)
    stats = bn.RunningStats(8)
    bn.batch_norm(x[:1000])
    timer = threading.Timer(0.004, lambda: os.kill(os.getpid(), signal.SIGINT))
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        _train_and_wait(x, stats)
    timer.join()
    assert stats.num_updates in (0, 1)
    assert (stats.num_updates == 0) == (stats.count == 0) == bool((stats.mean == 0).all())
    np.testing.assert_array_equal(bn.batch_norm(x), bn.batch_norm(x))


def _interrupted(call: Callable[[], Any], at: int) -> bool:
    """Make a call, with a KeyboardInterrupt before the line of the library that is executed as number `at`.

    Not on the line of a `with`, which is executed again when its block ends: there no signal is delivered before the
    context is left.
    """
    place, lines = os.path.dirname(bn.__file__), 0

    def trace(frame: Any, event: str, argument: object) -> Any:
        nonlocal lines
        if not frame.f_code.co_filename.startswith(place):
            return None
        if event == "line" and not linecache.getline(frame.f_code.co_filename, frame.f_lineno).lstrip().startswith(
            "with "
        ):
            lines += 1
            if lines == at:
                raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(before)
    return False


@pytest.mark.parametrize("size", [6, 300_000], ids=["alone", "with helpers"])
@pytest.mark.parametrize("update_rate", [0.1, None])
def test_interrupted_at_any_line(update_rate: float | None, size: int) -> None:
    """The state is the one before, or (from the last lines on) the one after; and nothing is left locked."""
    x = np.random.default_rng(0).normal(size=(size, 3))
    stats, m = bn.RunningStats(3, update_rate=update_rate), bn.moments(x)
    y = bn.batch_norm(x, stats=stats)
    before, after, at = stats._state, stats.updated(m), 1
    old = 0
    while _interrupted(lambda: bn.batch_norm(x, stats=stats), at):
        if stats._state is before:
            old += 1
        else:
            assert (stats.count, stats.num_updates) == (after.count, after.num_updates)
            np.testing.assert_array_equal(stats.mean, after.mean)
            np.testing.assert_array_equal(stats.var, after.var)
            stats._state = before
        at += 1
    assert old > at - 12
    assert at > (40 if size == 6 and update_rate is not None else 100)  # a call like one before is short
    elsewhere = threading.Thread(target=stats.update, args=(m,), daemon=True)
    elsewhere.start()
    elsewhere.join(20)
    assert stats.num_updates == 3
    np.testing.assert_array_equal(bn.batch_norm(x), y)


class _OutOfMemory:
    """NumPy, of which one allocation fails."""

    def __init__(self, at: int) -> None:
        self._left = at

    def __getattr__(self, name: str) -> Any:
        found = getattr(np, name)
        if name not in ("empty", "empty_like", "zeros", "array", "ascontiguousarray", "tile"):
            return found
        self._left -= 1
        if self._left == 0:
            raise MemoryError(name)
        return found


@pytest.mark.parametrize("size", [6, 300_000], ids=["alone", "with helpers"])
@pytest.mark.parametrize("update_rate", [0.1, None])
@pytest.mark.parametrize("masked", [False, True])
def test_out_of_memory_anywhere(
    update_rate: float | None, size: int, masked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever allocation fails, statistics are as before and the next call is right."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(size, 3))
    call = {"weight": np.ones(3), "bias": np.ones(3), "where": rng.random((size, 3)) < 0.8 if masked else None}
    stats = bn.RunningStats(3, update_rate=update_rate)
    y, failed = bn.batch_norm(x, stats=stats, **call), 0
    while True:
        before = stats._state
        with monkeypatch.context() as patched:
            for module in (_again, _strided, backend, generic, pool):
                patched.setattr(module, "np", _OutOfMemory(failed + 1))
            # Each module fails at its own allocation of this number; the first to come decides.
            try:
                bn.batch_norm(x, stats=stats, **call)
            except MemoryError:
                assert stats._state is before
                failed += 1
            else:
                break
    assert failed >= 3
    np.testing.assert_array_equal(bn.batch_norm(x, stats=stats, **call), y)
    assert stats.num_updates == 3


def test_many_interruptions(run_python: Callable[..., str]) -> None:
    """Ctrl-C again and again, at any moment: no wrong result, no helper lost, no thread left behind."""
    code = """
import os, random, signal, threading, time, numpy as np, bnarray as bn
from bnarray.kernels.cpu import pool
x = np.random.default_rng(0).normal(size=(1000, 32, 28)).astype(np.float32)
bn.batch_norm(x)  # the second call compiles too, and llvmlite does not survive being interrupted
expected, end = bn.batch_norm(x), time.monotonic() + 3
def raise_inside_of_calls(number, frame):
    if frame.f_code.co_filename != "<string>":  # this program itself is not what is tested
        raise KeyboardInterrupt
signal.signal(signal.SIGINT, raise_inside_of_calls)
started = []
def interrupt():
    while not started:
        time.sleep(0.001)
    while time.monotonic() < end:
        time.sleep(random.random() * 0.004)
        os.kill(os.getpid(), signal.SIGINT)
thread = threading.Thread(target=interrupt)
thread.start()
started.append(True)
interrupted = 0
while time.monotonic() < end + 0.1:
    try:
        while time.monotonic() < end + 0.1:
            assert (bn.batch_norm(x) == expected).all()
    except KeyboardInterrupt:
        interrupted += 1
thread.join()
assert interrupted > 0
(helper,) = pool.helpers.hired
assert (bn.batch_norm(x) == expected).all()
print(threading.active_count(), helper.mail[0], helper.held)
"""
    assert run_python(code, NUMBA_NUM_THREADS="2") == "2 0 None\n"


def test_few_features_whatever_was_overwritten() -> None:
    """As below, where features lie together with their neighbours': not in x, but in the copy that is kept."""
    rng = np.random.default_rng(0)
    memory, dy = rng.normal(size=(9, 40, 96, 3)), rng.normal(size=(9, 40, 48, 3))
    x = memory[:, :, ::2]
    expected = bn.batch_norm_backward(dy, bn.batch_norm_forward(x, axis=3, activation="relu")[1])
    _, saved = bn.batch_norm_forward(x, axis=3, activation="relu", out=x)
    np.testing.assert_array_equal(bn.batch_norm_backward(dy, saved).x, expected.x)


@pytest.mark.parametrize("overwritten", ["x", "residual"])
def test_same_gradients_whatever_was_overwritten(overwritten: str) -> None:
    """The copy that is kept of an overwritten array has other strides; the sums over it have the same bits."""
    rng = np.random.default_rng(0)
    big, dy = rng.normal(size=(2, 64, 9, 33, 40))
    dy = dy[:, :, ::2, ::3].copy()
    x, residual = big[:, :, ::2, ::3], rng.normal(size=big.shape)[:, :, ::2, ::3]
    keywords = {"activation": "relu", "residual": residual} if overwritten == "residual" else {}
    expected = bn.batch_norm_backward(dy, bn.batch_norm_forward(x, np.ones(9), np.zeros(9), **keywords)[1])
    out = residual if overwritten == "residual" else x
    _, saved = bn.batch_norm_forward(x, np.ones(9), np.zeros(9), out=out, **keywords)
    for ours, theirs in zip(bn.batch_norm_backward(dy, saved), expected, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_no_partial_results_are_kept() -> None:
    x = np.ones((1000, 20000), np.float16)
    bn.moments(x)
    tracemalloc.start()
    try:
        m = bn.moments(x)
        kept, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert m.mean.shape == (20000,)
    assert kept < 5 * 20000 * 8
    assert peak < 0.1 * x.nbytes


def test_fork_during_an_update(run_python: Callable[..., str]) -> None:
    """A fork while another thread updates and compiles waits for it; neither hangs."""
    code = """
import os, threading, time, warnings
warnings.simplefilter("ignore", DeprecationWarning)  # as above
import numpy as np, bnarray as bn
from bnarray.kernels.cpu import compiled, features
kernel = type(features.running)
compile = kernel.compile
def slowly(self):
    with compiled._compiling:
        time.sleep(0.05)
        compile(self)
kernel.compile = slowly
x, stats = np.random.default_rng(0).normal(size=(30, 2)), bn.RunningStats(2)
thread = threading.Thread(target=lambda: [bn.batch_norm(x, stats=stats) for _ in range(5)])
thread.start()
for _ in range(20):
    time.sleep(0.03)
    child = os.fork()
    if child == 0:
        bn.batch_norm(x, stats=stats)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
thread.join()
print(stats.num_updates)
"""
    assert run_python(code) == "5\n"


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("shape", [(32, 64, 56, 56), (300, 17, 40), (4, 20, 5000), (3, 2, 11), (5000, 3)])
def test_same_bits_in_one_go_and_in_two(shape: tuple[int, ...], dtype: str) -> None:
    """Other memory may be written in one go with the statistics, x itself is not; nobody can tell."""
    x = np.random.default_rng(0).normal(3, 2, shape).astype(dtype)
    weight, bias = np.random.default_rng(1).normal(size=(2, shape[1]))
    for layout in (LAYOUTS["c"], LAYOUTS["transposed"]):
        laid = layout(x)
        one, two = (bn.RunningStats(shape[1]) for _ in range(2))
        y = bn.batch_norm(laid, weight, bias, stats=one, activation="relu")
        options: dict[str, Any] = {"stats": two, "activation": "relu"}
        out = laid.copy(order="K")
        bn.batch_norm_forward(out, weight, bias, **options, out=out)
        np.testing.assert_array_equal(y, out)
        np.testing.assert_array_equal(one.mean, two.mean)
        np.testing.assert_array_equal(one.var, two.var)
        np.testing.assert_array_equal(one.mean, 0.1 * bn.moments(laid).mean)
