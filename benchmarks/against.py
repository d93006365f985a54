"""This working tree beside an earlier commit: ``python -m benchmarks.against [REVISION] [--factor 2]``.

The revision is HEAD^ if none is named. Its package lies in a folder beside; two processes, one of each, make the calls
of the suite in turns, and the best turn of each counts: what else the machine does can only add to it. Prints the ratio
of the times for each call. Exits with 1 if one takes more than so many times as long as before, and again when it is
measured a second time.

asv does the same with ``asv continuous``, in environments of its own: minutes, where this takes seconds.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks import parameters
from benchmarks.compare import turn

_ROOT = Path(__file__).parent.parent
_TURNS = 15
#: step, then what `parameters.NAMES` name.
ROWS = [
    ("training", "numpy", "32x64", "channels last", "float32", 2),
    ("evaluation", "numpy", "32x64", "channels last", "float32", 2),
    ("backward", "numpy", "32x64", "channels last", "float32", 2),
    ("training", "numpy out=", "4096x512", "channels last", "float32", 1),
    ("backward", "numpy out=", "4096x512", "channels last", "float32", 1),
    ("training", "numpy out=", "32x256x14x14", "channels first", "float32", 1),
    ("evaluation", "numpy out=", "32x256x14x14", "channels first", "float32", 1),
    ("backward", "numpy out=", "32x256x14x14", "channels first", "float32", 1),
    ("both", "numpy out=", "32x256x14x14", "channels first", "float32", 2),
]


def work() -> None:
    """In a process of one side: for the number of each row, take a turn and say how long a call took."""
    for line in sys.stdin:
        print(turn(parameters.checked_call(*ROWS[int(line)])), flush=True)


class _Side:
    """A process that makes the calls by the package in a folder."""

    def __init__(self, package: Path) -> None:
        environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(package), str(_ROOT)])}
        command = [sys.executable, "-P", "-c", "from benchmarks.against import work; work()"]
        self._process = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def seconds(self, row: int) -> float:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(row, file=self._process.stdin, flush=True)
        answer = self._process.stdout.readline()
        if not answer:
            raise SystemExit(f"the process that was to make {ROWS[row]} has ended with {self._process.wait()}")
        return float(answer)

    def end(self) -> None:
        self._process.kill()
        self._process.communicate()


@contextmanager
def _sides(revision: str) -> Iterator[tuple[_Side, _Side]]:
    with tempfile.TemporaryDirectory() as folder:
        archive = subprocess.run(["git", "archive", revision, "bnarray"], cwd=_ROOT, check=True, capture_output=True)
        subprocess.run(["tar", "-x", "-C", folder], input=archive.stdout, check=True)
        now, before = _Side(_ROOT), _Side(Path(folder))
        try:
            yield now, before
        finally:
            now.end()
            before.end()


def best(now: _Side, before: _Side, row: int) -> tuple[float, float]:
    """Return the best turns of the earlier package and of this one, in seconds a call."""
    for side in (now, before):
        side.seconds(row)  # compiled, or loaded, and checked
    turns = [(before.seconds(row), now.seconds(row)) for _ in range(_TURNS)]
    earlier, later = (min(each) for each in zip(*turns, strict=True))
    return earlier, later


def is_slower(now: _Side, before: _Side, row: int, factor: float) -> bool:
    earlier, later = best(now, before, row)
    print(f"| {', '.join(map(str, ROWS[row]))} | {1e6 * earlier:.1f} | {1e6 * later:.1f} | {later / earlier:.2f} |")
    sys.stdout.flush()
    return later > factor * earlier


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("revision", nargs="?", default="HEAD^")
    parser.add_argument("--factor", type=float, default=2.0)
    options = parser.parse_args()
    verify = ["git", "rev-parse", "--verify", "--quiet", f"{options.revision}^{{commit}}"]
    if subprocess.run(verify, cwd=_ROOT, stdout=subprocess.DEVNULL).returncode:
        raise SystemExit(f"{options.revision} is no commit that is here; in a shallow clone, fetch it")
    slower = []
    with _sides(options.revision) as (now, before):
        print(f"| call | {options.revision}, µs | now, µs | now / before |\n|---|---|---|---|")
        for row, names in enumerate(ROWS):
            if all(is_slower(now, before, row, options.factor) for _ in range(2)):
                slower.append(names)
    if slower:
        raise SystemExit(f"more than {options.factor:g} times as long as before, twice: {slower}")


if __name__ == "__main__":
    main()
