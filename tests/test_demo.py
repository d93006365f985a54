"""The demo, end to end, as a user runs it."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("sklearn", reason="the demo extra is not installed: the demo is not verified")


def _bnarray(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [str(Path(sys.executable).with_name("bnarray")), *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300)


def test_demo(tmp_path: Path) -> None:
    done = _bnarray("demo", "--steps", "200", "--seeds", "2", "--out", "results", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""  # no progress bar in a pipe
    assert "1797 images of 64 pixels" in done.stdout
    rows = [line.split("|") for line in done.stdout.splitlines() if "| with" in line]
    assert len(rows) == 6
    without, normalized = rows[:2]
    assert without[2].strip() == "never"  # not in 200 steps
    steps = float(normalized[2].split()[0])
    assert 0 < steps <= 200
    assert float(normalized[3].split()[0]) > 0.9 > float(without[3].split()[0])
    assert "±" in normalized[3]
    assert (tmp_path / "results" / "demo.png").read_bytes().startswith(b"\x89PNG")


def test_help_and_mistakes(tmp_path: Path) -> None:
    assert "example:\n  bnarray demo" in _bnarray("demo", "--help", cwd=tmp_path).stdout
    assert _bnarray("--version", cwd=tmp_path).stdout.startswith("bnarray ")
    for arguments in (["demo", "--seeds", "0"], ["demo", "--steps", "many"], [], ["dmeo"]):
        done = _bnarray(*arguments, cwd=tmp_path)
        assert done.returncode == 2
        assert "Traceback" not in done.stderr
    (tmp_path / "file").write_text("")
    done = _bnarray("demo", "--steps", "1", "--out", "file/folder", cwd=tmp_path)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "file/folder" in done.stderr


def test_ctrl_c(tmp_path: Path) -> None:
    command = [str(Path(sys.executable).with_name("bnarray")), "demo", "--steps", "100000"]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline().startswith("1. Handwritten digits")  # it is under way
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors == "interrupted\n"
    assert not list((tmp_path / "bnarray-demo").iterdir())


def test_closed_pipe(tmp_path: Path) -> None:
    command = f"{Path(sys.executable).with_name('bnarray')} demo --steps 20 | true"
    done = subprocess.run(["bash", "-c", command], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.stderr == ""
