"""The command line as it is used: in a process of its own, killed, cut off, and told what is wrong."""

import contextlib
import json
import os
import pty
import resource
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import bnarray as bn
from bnarray import cli

BNARRAY = str(Path(sys.executable).with_name("bnarray"))


def _bnarray(*arguments: str, cwd: Path, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run([BNARRAY, *arguments], cwd=cwd, capture_output=True, text=True, timeout=300, **options)


def _fails(*arguments: str, cwd: Path, code: int = 1, **options: Any) -> str:
    """Run a command that fails; return the one line it says."""
    done = _bnarray(*arguments, cwd=cwd, **options)
    assert done.returncode == code, done.stderr
    assert done.stdout == ""
    lines = done.stderr.splitlines()
    assert len(lines) == 1, done.stderr
    return lines[0]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    x = np.random.default_rng(0).normal(5, 2, (5000, 8)).astype(np.float32)
    x[:, 3] = 7
    np.save(tmp_path / "x.npy", x)
    np.save(tmp_path / "more.npy", x[:100] + 1)
    return tmp_path


@pytest.fixture
def large(tmp_path: Path) -> Path:
    """A file of half a gigabyte, all zeros, that takes no room on the disk."""
    with open(tmp_path / "large.npy", "wb") as file:
        header = {"descr": "<f4", "fortran_order": False, "shape": (2**21, 64)}
        np.lib.format.write_array_header_1_0(file, header)
        file.truncate(file.tell() + 2**29)
    return tmp_path


def test_normalize_and_what_it_prints(folder: Path) -> None:
    x = np.load(folder / "x.npy")
    done = _bnarray("normalize", "x.npy", "y.npy", "--save-stats", "s.npz", "--eps", "0", cwd=folder)
    assert (done.returncode, done.stderr) == (0, "")  # no progress bar in a pipe
    np.testing.assert_allclose(np.load(folder / "y.npy"), bn.batch_norm(x, eps=0), rtol=0, atol=1e-6)
    lines = done.stdout.splitlines()
    assert lines[0] == "8 features, 40,000 elements counted"
    assert lines[1].split() == ["before", "after"]
    assert lines[3].split()[0] == "deviations"
    assert "GB/s" in lines[-1]
    stats = bn.RunningStats.load(folder / "s.npz")
    np.testing.assert_allclose(stats.mean, x.mean(axis=0, dtype=float), rtol=1e-12)
    np.testing.assert_allclose(stats.var, x.var(axis=0, dtype=float), rtol=1e-9, atol=1e-12)
    _bnarray("normalize", "x.npy", "z.npy", "--stats", "s.npz", "--eps", "0", cwd=folder, check=True)
    assert (folder / "z.npy").read_bytes() == (folder / "y.npy").read_bytes()


def test_progress_bar_on_a_terminal(large: Path) -> None:
    pytest.importorskip("tqdm", reason="tqdm is not installed: the progress bar is not verified")
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 90))
    command = [BNARRAY, "normalize", "large.npy", "y.npy"]
    with subprocess.Popen(command, cwd=large, stdout=subprocess.DEVNULL, stderr=theirs) as process:
        os.close(theirs)
        shown = b""
        with contextlib.suppress(OSError):  # how Linux says that the other end is closed
            while part := os.read(ours, 4096):
                shown += part
    os.close(ours)
    assert process.returncode == 0
    assert b"B/s]" in shown  # the rate
    assert b"<00:0" in shown  # the time left


def test_options_of_normalize(folder: Path) -> None:
    x = np.load(folder / "x.npy")
    where = np.arange(len(x))[:, None] % 3 > 0
    np.save(folder / "where.npy", where)
    options = ["--axis=none", "--where", "where.npy", "--dtype", "float64", "--chunk-mb", "9.5", "--force"]
    (folder / "y.npy").write_text("older")
    _bnarray("normalize", "x.npy", "y.npy", *options, cwd=folder, check=True)
    y = np.load(folder / "y.npy")
    assert y.dtype == np.float64
    np.testing.assert_allclose(y, bn.batch_norm(x.astype(np.float64), axis=(), where=where), rtol=0, atol=1e-9)
    _bnarray("normalize", "x.npy", "both.npy", "--axis=0,-1", cwd=folder, check=True)
    assert np.load(folder / "both.npy").any() == np.False_  # every element a feature of its own
    np.savez(folder / "x.npz", a=x, b=x[:, :2], labels=np.arange(3))
    done = _bnarray("normalize", "x.npz", "y.npz", cwd=folder, check=True)
    assert done.stdout.startswith("a: 8 features")
    assert "\nb: 2 features" in done.stdout
    assert "choose a member" in _fails("normalize", "x.npz", "z.npz", "--save-stats", "t.npz", cwd=folder)
    assert not (folder / "z.npz").exists()
    _bnarray("normalize", "x.npz", "b.npy", "--member", "b", "--save-stats", "b.npz", cwd=folder, check=True)
    assert bn.RunningStats.load(folder / "b.npz").features_shape == (2,)


def test_stats_over_files(folder: Path) -> None:
    more = np.load(folder / "more.npy")
    more[3, 5] = np.nan
    np.save(folder / "more.npy", more)
    done = _bnarray("stats", "x.npy", "more.npy", "--out", "s.npz", cwd=folder)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("8 features, 5,100 elements in each")
    for line in ("widest", "narrowest", "constant: 0", "with NaN or infinity: 1: 5"):
        assert line in done.stdout
    stats = bn.RunningStats.load(folder / "s.npz")
    both = np.concatenate([np.load(folder / "x.npy"), more]).astype(float)
    np.testing.assert_allclose(stats.mean, both.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(stats.var, both.var(axis=0), rtol=1e-9)
    assert "constant: 1: 3" in _bnarray("stats", "x.npy", cwd=folder).stdout


def test_plot(folder: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed: plots are not verified")
    _bnarray("stats", "x.npy", "--out", "a.npz", cwd=folder, check=True)
    _bnarray("stats", "more.npy", "--out", "b.npz", cwd=folder, check=True)
    assert _bnarray("plot", "a.npz", cwd=folder).stdout == "statistics.png\n"
    assert (folder / "statistics.png").read_bytes().startswith(b"\x89PNG")
    done = _bnarray("plot", "a.npz", "b.npz", "--out", "drift.svg", cwd=folder)
    assert (done.returncode, done.stderr) == (0, "")
    assert "<svg" in (folder / "drift.svg").read_text()
    assert "exists" in _fails("plot", "a.npz", "--out", "drift.svg", cwd=folder)
    assert ".png or .svg" in _fails("plot", "a.npz", "--out", "drift.txt", cwd=folder)
    assert "holds no statistics" in _fails("plot", "x.npy", "--out", "c.png", cwd=folder)
    np.save(folder / "narrow.npy", np.ones((5, 2)))
    _bnarray("stats", "narrow.npy", "--out", "narrow.npz", cwd=folder, check=True)
    assert "features of shape" in _fails("plot", "a.npz", "narrow.npz", "--out", "c.png", cwd=folder)
    assert not (folder / "c.png").exists()


def test_info(folder: Path) -> None:
    cache = folder / "cache"
    environment = os.environ | {"BNARRAY_CACHE_DIR": str(cache)}
    _bnarray("stats", "x.npy", cwd=folder, env=environment, check=True)
    (cache / "notes.txt").write_text("not ours")
    (cache / "notes").mkdir()
    facts = json.loads(_bnarray("info", "--json", cwd=folder, env=environment, check=True).stdout)
    assert facts["bnarray"] == bn.__version__
    assert facts["packages"]["numpy"] == np.__version__
    assert facts["cache"]["folder"] == str(cache)
    assert facts["cache"]["kernels"] > 0
    assert facts["cache"]["bytes"] == sum(path.stat().st_size for path in cache.glob("*/*"))
    assert facts["threads"] >= 1
    assert facts["cuda"]["usable"] or facts["cuda"]["why"]
    text = _bnarray("info", "--clear-cache", cwd=folder, env=environment, check=True).stdout
    assert "cached kernels 0, 0.0 MB" in " ".join(text.split())
    assert sorted(path.name for path in cache.iterdir()) == ["notes", "notes.txt"]


def test_help() -> None:
    assert "exit codes" in _bnarray("--help", cwd=Path.cwd()).stdout
    for command in ("normalize", "stats", "plot", "info", "demo"):
        assert "example" in _bnarray(command, "--help", cwd=Path.cwd()).stdout


def test_mistakes_are_one_line(folder: Path) -> None:
    before = sorted(path.name for path in folder.iterdir())
    np.save(folder / "objects.npy", np.array([[None]]), allow_pickle=True)
    np.save(folder / "whole.npy", np.ones((3, 3), int))
    (folder / "cut.npy").write_bytes((folder / "x.npy").read_bytes()[:-1])
    (folder / "y.npy").write_text("older")
    (folder / "folder").mkdir()
    os.mkfifo(folder / "pipe.npy")
    for arguments, said in (
        (["none.npy", "new.npy"], "none.npy: No such file or directory"),
        (["x.npy", "new.npy", "--axis", "2"], "axis is (2,), but it has 2 axes"),
        (["objects.npy", "new.npy"], "Python objects"),
        (["cut.npy", "new.npy"], "truncated"),
        (["whole.npy", "new.npy"], "no fractions"),
        (["x.npy", "x.npy", "--force"], "input too"),
        (["x.npy", "y.npy"], "y.npy exists"),
        (["x.npy", "new.txt"], "named .npy, .npz or .zarr"),
        (["x.npy", "no/new.npy"], "there is no such folder"),
        (["folder", "new.npy"], "holds no zarr array"),
        (["pipe.npy", "new.npy"], "no regular file"),
        (["x.npy", "new.npy", "--stats", "none.npz"], "none.npz: No such file"),
        (["x.npy", "new.npy", "--stats", "x.npy"], "holds no statistics"),
        (["x.npy", "new.npy", "--save-stats", "new.npy"], "named twice"),
        (["x.npy", "new.npy", "--save-stats", "y.npy"], "y.npy exists"),
        (["x.npy", "new.npy", "--save-stats", "no/s.npz"], "there is no such folder"),
        (["x.npy", "new.npy", "--save-stats", "folder", "--force"], "it is a folder"),
        (["x.npy", "new.npy", "--save-stats", "pipe.npy", "--force"], "would be replaced by one"),
        (["x.npy", "new.npy", "--dtype", "int8"], "dtype is int8"),
        (["x.npy", "new.npy", "--where", "more.npy"], "does not broadcast"),
    ):
        line = _fails("normalize", *arguments, cwd=folder)
        assert line.startswith("bnarray normalize: ")
        assert said in line
        assert not (folder / "new.npy").exists()
    assert (folder / "y.npy").read_text() == "older"
    assert (folder / "pipe.npy").is_fifo()
    assert "x.npy is named twice" in _fails("stats", "x.npy", "--out", "x.npy", "--force", cwd=folder)
    for wrong in (["--axis", "a"], ["--chunk-mb", "0"], ["--chunk-mb", "nan"], ["--eps", "x"]):
        done = _bnarray("normalize", "x.npy", "new.npy", *wrong, cwd=folder)
        assert (done.returncode, done.stdout) == (2, "")
        assert "Traceback" not in done.stderr
    for path in folder.iterdir():
        if path.name in ("objects.npy", "whole.npy", "cut.npy", "y.npy", "pipe.npy"):
            path.unlink()
    (folder / "folder").rmdir()
    assert sorted(path.name for path in folder.iterdir()) == before


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -9)])
def test_killed_in_the_middle(large: Path, number: signal.Signals, code: int) -> None:
    (large / "y.npy").write_text("older")
    command = [BNARRAY, "normalize", "large.npy", "y.npy", "--force"]
    with subprocess.Popen(command, cwd=large, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        while not any(path.stat().st_size > 2**20 for path in large.glob(".y.npy.*")):
            assert process.poll() is None, "it ended before anybody saw it write"
            time.sleep(0.001)
        process.send_signal(number)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == code
    assert (large / "y.npy").read_text() == "older"
    assert errors == ("interrupted\n" if code == 130 else "")
    left = list(large.glob(".y.npy.*"))
    assert len(left) == (1 if code == -9 else 0)


def test_full_disk(large: Path) -> None:
    """Stood in for by a limit on the size of files, which a write meets in the same way."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**26, 2**26))

    (large / "y.npy").write_text("older")
    line = _fails("normalize", "large.npy", "y.npy", "--force", cwd=large, preexec_fn=limit)
    assert line == "bnarray normalize: File too large"
    assert sorted(path.name for path in large.iterdir()) == ["large.npy", "y.npy"]
    assert (large / "y.npy").read_text() == "older"


def test_full_disk_is_said_before_anything_is_written(large: Path) -> None:
    code = """
import resource, signal, numpy as np, bnarray as bn
resource.setrlimit(resource.RLIMIT_FSIZE, (2**26, 2**26))
known, called = bn.Moments(1, np.zeros(64), np.ones(64)), []
try:
    bn.normalize_file("large.npy", "y.npy", axis=-1, stats=known, progress=lambda *done: called.append(done))
except OSError as error:
    print(error.strerror, len(called))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=large, capture_output=True, text=True, timeout=300)
    assert done.stdout == "File too large 0\n", done.stderr


def test_too_large_for_the_disk_is_said_before_anything_is_read(tmp_path: Path) -> None:
    with open(tmp_path / "huge.npy", "wb") as file:
        header = {"descr": "<f4", "fortran_order": False, "shape": (2**40, 1)}
        np.lib.format.write_array_header_1_0(file, header)
        file.truncate(file.tell() + 2**42)
    assert "bytes, but its disk has" in _fails("normalize", "huge.npy", "y.npy", cwd=tmp_path)
    assert not (tmp_path / "y.npy").exists()


def test_closed_pipe(folder: Path) -> None:
    command = f"set -o pipefail; {BNARRAY} stats x.npy | true"
    done = subprocess.run(["bash", "-c", command], cwd=folder, capture_output=True, text=True, timeout=300)
    assert done.stderr == ""
    assert done.returncode in (0, 141)  # 0 if all fitted into the pipe before its reader was gone


def test_memory_is_bounded(large: Path) -> None:
    """Half a gigabyte, three times what the blocks may take beside the interpreter and the compiler."""
    code = (
        "import resource, bnarray as bn\n"
        "bn.moments(__import__('numpy').ones((9, 64), 'f4'))\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "bn.normalize_file('large.npy', 'y.npy', chunk_mb=32)\n"
        "print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=large, capture_output=True, text=True, check=True)
    assert int(done.stdout) < 150


def test_as_a_module(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-m", "bnarray", "--version"], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"bnarray {bn.__version__}\n", "")


@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_streams(closed: str, folder: Path) -> None:
    """The work is done all the same."""
    command = f"{BNARRAY} stats x.npy --out s.npz {closed}"
    done = subprocess.run(["sh", "-c", command], cwd=folder, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stderr) == (0, "")
    assert bn.RunningStats.load(folder / "s.npz").count == 5000


@pytest.mark.parametrize(
    "arguments", [("stats", "--out", "s.safetensors"), ("normalize", "y.npy", "--save-stats", "s.safetensors")]
)
def test_a_missing_package_is_told_before_the_work(
    arguments: tuple[str, ...], folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setitem(sys.modules, "safetensors", None)
    assert cli.main([arguments[0], "x.npy", *arguments[1:]]) == 1
    said = capsys.readouterr()
    assert (said.out, said.err.count("\n")) == ("", 1)
    assert "pip install 'bnarray[safetensors]'" in said.err
    assert not (folder / "y.npy").exists()
