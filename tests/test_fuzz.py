"""Random calls of all public functions (`tests/fuzz`): a short part of what ``python -m tests.fuzz`` does for long."""

import subprocess
import sys
from collections.abc import Callable
from random import Random

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import bnarray as bn
from tests.fuzz import calls
from tests.fuzz.__main__ import run
from tests.fuzz.memory import Memory, block, guarded_library, strided


@pytest.mark.parametrize("name", calls.CALLS)
def test_calls(name: str) -> None:
    """Drawn by Hypothesis, which looks for the simplest call that fails."""
    if name == "running_stats":
        pytest.importorskip(
            "safetensors", reason="safetensors is not installed: histories with its files are not verified"
        )

    @settings(max_examples=200 if name == "forward_and_backward" else 40, deadline=None,
              suppress_health_check=list(HealthCheck))  # fmt: skip
    @given(st.randoms(use_true_random=False))
    def judged(random: Random) -> None:
        calls.CALLS[name](random)

    with guarded_library():
        judged()


def test_a_process_of_its_own() -> None:
    pytest.importorskip("safetensors", reason="safetensors is not installed: histories with its files are not verified")
    number, counted, wrong = run(first=0, calls=600, seconds=300, bounds=False)
    assert wrong == []
    assert number == 600
    assert sum(times for name, times in counted.items() if name.startswith("refused")) > 100
    assert {"batch_norm", "batch_norm_forward", "batch_norm_backward", "fold", "population_stats"} <= set(counted)


# -- That it would find something --------------------------------------------------------------------------------------


@pytest.mark.parametrize("at_end", [True, False])
def test_memory_beyond_an_array_ends_the_process(at_end: bool) -> None:
    """By one element, read by a kernel."""
    code = f"""
import numpy as np
from tests.fuzz.memory import block
import bnarray as bn
x = block(4 * 6, at_end={at_end}).view(np.float32)
x[:] = 1
print(bn.moments(x, axis=()).mean)
wrong = np.lib.stride_tricks.as_strided(x if {at_end} else x[::-1], (7,))
bn.moments(wrong, axis=())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout == "1.0\n"
    assert done.returncode == -11


def test_checked_kernels_find_an_index_that_is_out_of_bounds(run_python: Callable[..., str]) -> None:
    """In scratch memory, whose arrays lie next to one another: no page tells them apart, but ``--bounds`` does."""
    code = """
import numpy as np
from numba import types
from bnarray.kernels.cpu.compiled import Kernel, scratch
from bnarray.kernels.cpu.memory import carve, room_in
def beyond(scratch):
    array, room = carve(room_in(scratch), 5, 0.0)
    array[array.size] = 1
try:
    Kernel("beyond", types.void(scratch), beyond).call(np.zeros(4096, np.uint8))
except IndexError as error:
    print(error)
"""
    assert run_python(code, NUMBA_BOUNDSCHECK="1") == "index is out of bounds\n"
    assert run_python(code, NUMBA_BOUNDSCHECK="0") == ""


@pytest.mark.parametrize("seed", range(5))
def test_bytes_between_elements_are_watched(seed: int) -> None:
    memory = Memory(Random(seed))
    x, out = (memory.array(np.ones((4, 5), np.float32), repeats=False) for _ in range(2))
    out[...] = bn.batch_norm(x)
    assert not memory.changed(out)
    assert memory.changed()
    out[...] = 1
    assert not memory.changed()
    x[3, 4] = 2
    assert memory.changed(out)
    x[3, 4] = 1
    memory._blocks[0][0][0] ^= 1  # may be an element's, or not
    assert memory.changed(out)


def test_gaps_are_nan() -> None:
    x = strided((3, 4), (64, 8), np.float32)
    x[...] = 1
    assert np.isnan(np.lib.stride_tricks.as_strided(x, (3, 8), (64, 4))[:2, 1::2]).all()
    assert np.isnan(block(8).view(np.float16)).all()


def test_wrong_answers_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """In y, in gradients, in statistics; writing where it is not asked for; and what is not refused."""

    def found(name: str) -> bool:
        for seed in range(300):
            try:
                calls.CALLS[name](Random(seed))
            except Exception:
                return True
        return False

    assert not found("forward_and_backward")
    right = bn.batch_norm

    def slightly_off(x: np.ndarray, *arguments: object, **keywords: object) -> np.ndarray:
        y = right(x, *arguments, **keywords)
        if y.size:
            y[(0,) * y.ndim] *= 1.1
        return y

    for name, wrong in (
        ("batch_norm", slightly_off),
        ("batch_norm", lambda x, **keywords: right(x, **keywords | {"eps": 0.1, "where": None})),
        ("batch_norm_backward", lambda dy, saved, **keywords: bn.Gradients(dy, None, None)),
    ):
        with monkeypatch.context() as patched:
            patched.setattr(bn, name, wrong)
            assert found("forward_and_backward"), name
