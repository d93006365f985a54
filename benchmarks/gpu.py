"""All that needs a GPU, in one go and under 8 minutes: ``python -m benchmarks.gpu``.

Runs the tests marked `gpu` (with compute-sanitizer, where it is installed) and the benchmark, and writes a report to be
kept in ``benchmarks/results/``. A part that takes too long is stopped, and the report says so.
"""

import argparse
import os
import platform
import subprocess
import sys
from datetime import date
from pathlib import Path

RESULTS = Path(__file__).parent / "results"

#: What is run, and seconds that it may take. Compiling is most of the tests, and kept for the next time.
PARTS = {
    "tests": (["-m", "pytest", "-o", "testpaths=", "-q", "-ra", "-m", "gpu", "tests/cuda/test_gpu.py"], 270),
    "benchmark": (["-m", "benchmarks.compare", "--device", "cuda", "--dtypes", "float32", "bfloat16"], 190),
    "installation": (["-c", "from bnarray.cli import main; main(['info'])"], 15),
}


def run(command: list[str], seconds: float) -> str:
    """Return what a command printed, and how it ended."""
    try:
        done = subprocess.run(
            [sys.executable, *command],
            env=os.environ | {"PYTHONUNBUFFERED": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=seconds,
        )
    except subprocess.TimeoutExpired as stopped:
        return f"{(stopped.stdout or b'').decode(errors='replace')}\n(stopped after {seconds} s)"
    return f"{done.stdout.decode(errors='replace')}\n(exit code {done.returncode})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS / f"gpu-{date.today()}.md", metavar="FILE")
    options = parser.parse_args()
    options.out.parent.mkdir(parents=True, exist_ok=True)
    report = [f"# On a GPU, {date.today()}, {platform.platform()}\n"]
    for name, (command, seconds) in PARTS.items():
        print(f"== {name} (up to {seconds} s)", flush=True)
        said = run(command, seconds)
        report.append(f"## {name}\n\n`python {' '.join(command)}`\n\n```\n{said}\n```\n")
        options.out.write_text("\n".join(report), encoding="utf-8")
        print(said[-2000:], flush=True)
    print(f"written to {options.out}")


if __name__ == "__main__":
    main()
