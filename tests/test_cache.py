"""Compiled kernels on disk: kept, found again, never old, never in the way."""

import gc
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numba.core.registry import CPUDispatcher

import bnarray

CODE = """
import numpy as np, bnarray as bn
from bnarray.kernels.cpu import compiled
compiled_now = []
save = compiled._OnDisk.save_overload
compiled._OnDisk.save_overload = lambda self, sig, data: (compiled_now.append(self._name), save(self, sig, data))
x = np.array([[1.0], [3.0]])
y = x.copy()
bn.batch_norm(y, eps=0, out=y)
assert (bn.batch_norm(x, eps=0) == y).all()
print(y.tolist(), len(compiled_now))
"""


def _run(home: Path, package: Path | None = None, **environment: str) -> tuple[str, int]:
    """Run the code in a new process; return the result it printed, and how many kernels it compiled."""
    clean = {name: value for name, value in os.environ.items() if name not in ("BNARRAY_CACHE_DIR", "XDG_CACHE_HOME")}
    path = str(package or Path(bnarray.__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", CODE],
        env=clean | {"HOME": str(home), "PYTHONPATH": path} | environment,
        cwd=home,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    result, number = done.stdout.rsplit(maxsplit=1)
    return result, int(number)


RIGHT = "[[-1.0], [1.0]]"


def test_where_it_is_kept(tmp_path: Path) -> None:
    for environment, folder in [
        ({}, ".cache/bnarray"),
        ({"XDG_CACHE_HOME": str(tmp_path / "xdg")}, "xdg/bnarray"),
        ({"XDG_CACHE_HOME": str(tmp_path / "xdg"), "BNARRAY_CACHE_DIR": str(tmp_path / "mine")}, "mine"),
    ]:
        before = set(tmp_path.rglob("*"))
        result, compiled = _run(tmp_path, **environment)
        assert result == RIGHT
        assert compiled > 0
        new = [path for path in set(tmp_path.rglob("*")) - before if path.is_file()]
        assert len(new) == compiled
        assert all(path.is_relative_to(tmp_path / folder) for path in new)
        assert _run(tmp_path, **environment) == (RIGHT, 0)
    package = Path(bnarray.__file__).parent
    assert not list(package.rglob("*.nb*"))


@pytest.mark.parametrize("file", ["kernels/cpu/normalize.py", "kernels/merge.py", "kernels/cpu/walk.py"])
def test_an_edit_to_a_kernel_or_a_helper_is_seen(file: str, tmp_path: Path) -> None:
    shutil.copytree(
        Path(bnarray.__file__).parent, tmp_path / "lib" / "bnarray", ignore=shutil.ignore_patterns("__pycache__")
    )
    assert _run(tmp_path, tmp_path / "lib")[1] > 0
    assert _run(tmp_path, tmp_path / "lib") == (RIGHT, 0)
    edited = tmp_path / "lib" / "bnarray" / file
    text = edited.read_text()
    wrong = text.replace("* scale + shift\n", "* scale + shift + 1\n")
    assert wrong != text or not file.endswith("normalize.py")
    edited.write_text(wrong if file.endswith("normalize.py") else text + "\n# edited\n")
    result, compiled = _run(tmp_path, tmp_path / "lib")
    assert compiled > 0
    assert result == ("[[0.0], [2.0]]" if file.endswith("normalize.py") else RIGHT)
    edited.write_text(text)
    assert _run(tmp_path, tmp_path / "lib") == (RIGHT, 0)


def test_another_processor_or_setting_is_another_key(tmp_path: Path) -> None:
    assert _run(tmp_path)[1] > 0
    assert _run(tmp_path, NUMBA_CPU_NAME="x86-64", NUMBA_CPU_FEATURES="+sse2")[1] > 0
    assert _run(tmp_path, NUMBA_OPT="1")[1] > 0
    assert _run(tmp_path) == (RIGHT, 0)


def test_damaged_files_are_compiled_again(tmp_path: Path) -> None:
    _, compiled = _run(tmp_path)
    files = [path for path in (tmp_path / ".cache").rglob("*") if path.is_file()]
    files[0].write_bytes(files[0].read_bytes()[:-100])
    files[1].write_bytes(b"")
    files[2].write_bytes(os.urandom(files[2].stat().st_size))
    assert len(files) == compiled
    assert _run(tmp_path) == (RIGHT, 3)
    assert _run(tmp_path) == (RIGHT, 0)


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    """A file in its place stands for a read-only disk, which a test that runs as root cannot make."""
    (tmp_path / "file").write_text("not a folder")
    result, compiled = _run(tmp_path, BNARRAY_CACHE_DIR=str(tmp_path / "file" / "cache"))
    assert result == RIGHT
    assert compiled > 0
    result, compiled = _run(tmp_path, BNARRAY_CACHE_DIR="/proc/bnarray")
    assert (result, compiled > 0) == (RIGHT, True)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full: behaviour on a full disk is not verified")
def test_a_full_disk(tmp_path: Path) -> None:
    """Every write fails with "no space left on device"."""
    code = CODE.replace(
        "from bnarray.kernels.cpu import compiled",
        "from bnarray.kernels.cpu import compiled\nfrom bnarray.kernels import disk\n"
        "disk.Path.write_bytes = lambda self, data: open('/dev/full', 'wb', buffering=0).write(data)",
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"BNARRAY_CACHE_DIR": str(tmp_path / "cache")},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(RIGHT)
    assert done.stderr == ""
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]


def test_every_compiled_function_has_a_name_of_its_own() -> None:
    """Numba's symbols are made of names and types, and know nothing of closures: where two functions share both, a
    process takes one for the other when it loads kernels that different processes compiled."""
    from bnarray.kernels.cpu import backward, forward, grad_input, grad_sums, handover, moments, normalize

    for dtype in (np.float32, np.float64):
        for is_columns in (False, True):
            kernels = [forward.kernel(dtype, is_columns)]
            weights = None, np.uint8, np.float32, np.float64
            kernels += [moments.kernel(dtype, is_columns, each) for each in weights]
            for flag in (False, True):
                kernels += normalize.kernel(dtype, is_columns, flag), backward.kernel(dtype, is_columns, int(flag))
            for gate in range(3):
                kernels.append(grad_sums.kernel(dtype, is_columns, gate))
                kernels += [grad_input.kernel(dtype, is_columns, gate, statistics) for statistics in range(3)]
            for kernel in kernels:
                handover.handover(kernel)
    functions = {
        id(each.py_func): each.py_func
        for each in gc.get_objects()
        if type(each) is CPUDispatcher and each.py_func.__module__.startswith("bnarray.")
    }
    names = [(each.__module__, each.__qualname__) for each in functions.values()]
    assert len(names) > 60
    assert len(set(names)) == len(names)


def test_processes_that_start_together(tmp_path: Path) -> None:
    command = [sys.executable, "-c", CODE]
    environment = os.environ | {"BNARRAY_CACHE_DIR": str(tmp_path / "cache")}
    running = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(4)]
    for process in running:
        output, _ = process.communicate(timeout=300)
        assert process.returncode == 0
        assert output.startswith(RIGHT)
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=300)
    assert done.stdout == f"{RIGHT} 0\n"


BITS = """
import hashlib
import numpy as np, bnarray as bn
rng, digest = np.random.default_rng(0), hashlib.sha256()
for draw in range(300):
    shape = tuple(int(size) for size in rng.integers(1, 6, 4))
    x = rng.normal(1, 2, shape).transpose(rng.permutation(4))
    y, saved = bn.batch_norm_forward(x)
    in_place = x.copy(order="K")
    two_kernels = bn.batch_norm_forward(in_place, out=in_place)[0]
    assert (two_kernels == y).all(), (x.shape, x.strides)
    for result in (y, saved.moments.m2, *bn.batch_norm_backward(x, saved)[:1]):
        digest.update(np.ascontiguousarray(result).tobytes())
print(digest.hexdigest())
"""


def test_bits_do_not_depend_on_what_was_compiled_when(tmp_path: Path, run_python: Callable[..., str]) -> None:
    """Kernels of one source, some from disk and some compiled anew, agree: no sum is left to the compiler's choice."""
    home = str(tmp_path / "cache")
    expected = run_python(BITS, BNARRAY_CACHE_DIR=home)
    for name in ("forward_rows_float64", "moments_rows_float64", "backward_0_rows_float64"):
        (kernel,) = (tmp_path / "cache").glob(f"*/{name}")
        kernel.unlink()
        assert run_python(BITS, BNARRAY_CACHE_DIR=home) == expected
