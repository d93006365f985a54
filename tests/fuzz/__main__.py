"""``python -m tests.fuzz --minutes 10``: random calls in a process of their own, which may crash or hang.

``--bounds`` has the kernels compiled with Numba's checks of every index. ``--call SEED`` makes one call again.
"""

import argparse
import faulthandler
import json
import os
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path
from random import Random

#: Seconds that one call may take; the first ones compile.
LIMIT = 120


def _child(first: int, last: int, folder: Path) -> None:
    """Make the calls of some seeds; write down where it is, what failed and what was called."""
    from tests.fuzz import calls
    from tests.fuzz.memory import PLANS_LAST, guarded_library, plan_anew

    faulthandler.enable()
    place = os.open(folder / "seed", os.O_CREAT | os.O_WRONLY)
    with guarded_library(), (folder / "failures").open("a") as failures:
        for seed in range(first, last):
            os.pwrite(place, b"%20d" % seed, 0)
            faulthandler.dump_traceback_later(LIMIT, exit=True)
            if seed == first or seed % PLANS_LAST == 0:
                plan_anew(seed)
            try:
                calls.run(Random(seed))
            except Exception:
                print(f"call {seed}\n{traceback.format_exc(limit=-4)}", end="\0", file=failures, flush=True)
            if seed % 100 == 0 or seed == last - 1:
                (folder / "tally").write_text(json.dumps(calls.tally))
    faulthandler.cancel_dump_traceback_later()


def run(first: int, calls: int, seconds: float, bounds: bool) -> tuple[int, dict[str, int], list[str]]:
    """Make calls for so long, or so many; return how many, of what, and what went wrong."""
    end, seed, wrong, counted = time.monotonic() + seconds, first, [], dict[str, int]()
    environment = os.environ | ({"NUMBA_BOUNDSCHECK": "1"} if bounds else {})
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        while seed < first + calls and time.monotonic() < end:
            batch = min(first + calls, seed + 20_000)
            child = subprocess.Popen(
                [sys.executable, "-m", "tests.fuzz", "--child", str(seed), str(batch), name],
                env=environment, stderr=subprocess.PIPE, text=True,
            )  # fmt: skip
            try:
                _, said = child.communicate(timeout=max(1, end - time.monotonic()))
            except subprocess.TimeoutExpired:
                child.kill()
                child.communicate()
            at = int((folder / "seed").read_text()) if (folder / "seed").exists() else seed
            if child.returncode not in (0, -9):
                wrong.append(f"call {at} ended its process ({child.returncode})\n{said}")
            for each, number in json.loads(
                (folder / "tally").read_text() if (folder / "tally").exists() else "{}"
            ).items():
                counted[each] = counted.get(each, 0) + number
            (folder / "tally").unlink(missing_ok=True)
            seed = at + 1
        if (folder / "failures").exists():
            wrong += (folder / "failures").read_text().split("\0")[:-1]
    return seed - first, counted, wrong


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--minutes", type=float, default=1)
    parser.add_argument("--calls", type=int, default=10**9, help="at most")
    parser.add_argument("--first", type=int, default=0, help="the first call's seed")
    parser.add_argument("--bounds", action="store_true", help="check every index in kernels, which compiles them anew")
    parser.add_argument("--call", type=int, metavar="SEED", help="make one call again, in this process")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        first, last, folder = options.child
        _child(int(first), int(last), Path(folder))
        return 0
    if options.call is not None:
        from tests.fuzz import calls
        from tests.fuzz.memory import guarded_library, plan_anew

        with guarded_library():
            plan_anew(options.call)
            calls.run(Random(options.call))
        return 0
    number, counted, wrong = run(options.first, options.calls, 60 * options.minutes, options.bounds)
    for each in wrong:
        print(each)
    refused = sum(times for name, times in counted.items() if name.startswith("refused"))
    for name, times in sorted(counted.items(), key=lambda each: -each[1]):
        print(f"{times:8} {name}")
    print(f"{number} calls, {refused} of them wrong and refused; {len(wrong)} failures")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
