"""Every benchmark of the suite runs once, as asv would find and run it, with the smallest of its parameters."""

import importlib
import itertools
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import against, on_gpu

discovery = pytest.importorskip("asv_runner.discovery", reason="asv_runner is missing: benchmarks are not verified")

_FOLDER = Path(__file__).parent.parent / "benchmarks"
_ONCE = {"number": 1, "repeat": 1, "warmup_time": 0, "rounds": 1}
#: Where the first parameters are not the ones to run.
_CHOSEN = {"Peak": ("'layer'",), "Peers": ("'32x64'", "'channels last'", "'float32'", "'evaluation'")}


def _number(benchmark: Any) -> int | None:
    """The place of the first combination of parameters that is not n/a for want of a difference between layouts."""
    if not benchmark.params:
        return None
    wanted = _CHOSEN.get(benchmark.name.split(".")[1])
    rows = list(itertools.product(*benchmark.params))
    if wanted is not None:
        return rows.index(wanted)
    return next(i for i, row in enumerate(rows) if not {"'32x64'", "'channels first'"} <= set(row))


@pytest.mark.parametrize("name", [each.name for each in discovery.disc_benchmarks(str(_FOLDER))])
def test_once(name: str) -> None:
    benchmark = discovery.get_benchmark_from_name(str(_FOLDER), name, _ONCE)
    number = _number(benchmark)
    if number is not None:
        benchmark.set_param_idx(number)
    if benchmark.do_setup():
        pytest.skip("n/a here: it is not verified")
    try:
        assert benchmark.do_run() is not None
    finally:
        benchmark.do_teardown()


class _Event:
    """What a device's event does, by the host's clock."""

    def record(self) -> None:
        self.time = time.perf_counter()

    def synchronize(self) -> None: ...


@pytest.mark.parametrize("step", ["training", "evaluation", "backward"])
def test_cuda_benchmarks_on_a_pretended_device(step: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What does not need a device: the calls, their check, the ratios. Not: that they run on one."""

    def elapsed(start: _Event, end: _Event) -> float:
        return 1e3 * (end.time - start.time)

    def copy(source: np.ndarray, target: np.ndarray) -> None:
        np.copyto(target, source)

    def pretended() -> on_gpu._Device:
        return on_gpu._Device(np.asarray, np.asarray, _Event, elapsed, copy)

    monkeypatch.setattr(on_gpu.ctypes, "CDLL", lambda name: None)
    monkeypatch.setitem(on_gpu._DEVICES, "cupy", pretended)
    benchmark = on_gpu.Cuda()
    row = ("cupy", "32x256x14x14", "channels last", step)
    benchmark.setup(*row)
    assert benchmark.track_time(*row) > 0
    assert benchmark.track_limit(*row) > 0
    with pytest.raises(NotImplementedError):
        benchmark.track_peer(*row)


class _Turns:
    """A side whose calls take these times, again and again."""

    def __init__(self, *seconds: float) -> None:
        self._seconds = itertools.cycle(seconds)

    def seconds(self, row: int) -> float:
        return next(self._seconds)


@pytest.mark.parametrize(
    ("now", "slower"), [((1.9,), False), ((2.1,), True), ((100.0, 1.0), False), ((100.0, 2.1), True)]
)
def test_against_judges_the_best_turns(now: tuple[float, ...], slower: bool) -> None:
    assert against.is_slower(_Turns(*now), _Turns(3.0, 1.0), 0, 2.0) is slower


def test_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("asv.results", reason="asv is missing: the report is not verified")
    report = importlib.import_module("benchmarks.report")
    machine = tmp_path / "results" / "some"
    machine.mkdir(parents=True)
    (machine / "machine.json").write_text('{"machine": "some", "cpu": "two cores", "version": 1}')
    params = [["'numpy out='"], ["'8x4'", "'8x4x2'"], ["'channels first'"], ["'float32'"], ["2"]]
    for day, (commit, times) in enumerate({"b" * 40: [0.25, None], "a" * 40: [0.125, 0.5]}.items()):
        columns = ["result", "params", "version"]
        benchmarks = {
            "passes.Forward.time_forward": [times, params, "1"],
            "startup.Startup.timeraw_import": [[0.02], [], "1"],
        }
        result = {"commit_hash": commit, "date": day, "env_name": "e", "python": "3", "requirements": {}}
        result |= {"result_columns": columns, "results": benchmarks, "durations": {}, "env_vars": {}}
        result |= {"params": {"machine": "some"}, "version": 2}
        (machine / f"{commit[:8]}-e.json").write_text(json.dumps(result))
    monkeypatch.setattr(report, "_RESULTS", tmp_path / "results")
    monkeypatch.setattr(report, "_COMPARED", tmp_path / "compared")
    monkeypatch.setattr(report, "_PAGE", tmp_path / "performance.md")
    report.main()
    picture, page = tmp_path / "performance" / "some-passes.svg", tmp_path / "performance.md"
    drawn, written = picture.read_bytes(), page.read_text()
    assert [commit.name for commit in report.read(machine)] == ["b" * 7, "a" * 7]  # by date
    assert "| import | 20 |" in written
    assert "(performance/some-passes.svg)" in written
    assert b"8\xc3\x974" in drawn
    assert b"8\xc3\x974\xc3\x972" not in drawn  # one point is no line
    report.main()
    assert (picture.read_bytes(), page.read_text()) == (drawn, written)
