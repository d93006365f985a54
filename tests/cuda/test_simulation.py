"""Runs the tests of `simulated` in a process in which Numba simulates devices."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

pytest.importorskip("numba_cuda", reason="numba-cuda is not installed; the CUDA kernels' logic is not verified")
pytest.importorskip("greenlet", reason="greenlet is not installed; the CUDA kernels' logic is not verified")

SIMULATED = Path(__file__).parent / "simulated"


@pytest.mark.parametrize("file", sorted(path.name for path in SIMULATED.glob("test_*.py")))
def test_simulated(file: str) -> None:
    if file == "test_torch.py" and find_spec("torch") is None:
        pytest.skip("torch is not installed; that its tensors reach the CUDA kernels is not verified")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(SIMULATED / file)],
        env=os.environ | {"NUMBA_ENABLE_CUDASIM": "1"},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-10_000:] + done.stderr[-2_000:]
    assert " passed" in done.stdout
    assert "skipped" not in done.stdout
