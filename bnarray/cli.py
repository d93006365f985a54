"""The command line: what each command takes, and how every failure ends in one line.

argparse, because it is enough and costs nothing to install or import.
"""

import argparse
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any

from bnarray import __version__
from bnarray.atomic import check_place

_EXIT_CODES = (
    "exit codes: 0 done, 1 failed (one line on stderr says why), 2 wrong arguments, 130 interrupted, 141 nobody reads "
    "the output, 143 terminated. A command that fails leaves no half-written file."
)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def _above_zero(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return number


def _axes(text: str) -> tuple[int, ...]:
    try:
        return () if text == "none" else tuple(int(each) for each in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number, nor numbers with commas, nor none") from None


def _add_reading(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--axis",
        type=_axes,
        default=(1,),
        metavar="AXES",
        help="the feature axis (default 1), several as 1,2 (from the end: --axis=-1), or none: one feature",
    )
    command.add_argument("--member", metavar="NAME", help="the member of an .npz archive")
    command.add_argument(
        "--chunk-mb",
        type=_above_zero,
        default=64,
        metavar="MB",
        help="memory for blocks (default 64; 8 to 16 are needed)",
    )
    command.add_argument("--force", action="store_true", help="replace files that exist")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="bnarray", description="Batch normalization for arrays, without a framework.", epilog=_EXIT_CODES
    )
    parser.add_argument("--version", action="version", version=f"bnarray {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, run: Callable[[argparse.Namespace], None], **texts: Any) -> argparse.ArgumentParser:
        made = commands.add_parser(name, formatter_class=argparse.RawDescriptionHelpFormatter, **texts)
        made.set_defaults(run=run)
        return made

    demo = command(
        "demo",
        _demo,
        help="see batch normalization at work on real data",
        description="Normalise scikit-learn's handwritten digits, then train the network of the paper on them, with\n"
        "and without batch normalization, at several learning rates. Prints tables and writes a picture.",
        epilog="example:\n  bnarray demo --seeds 3 --out results",
    )
    demo.add_argument("--seeds", type=_positive, default=1, metavar="K", help="train K times, for the spread")
    demo.add_argument(
        "--steps", type=_positive, default=7000, metavar="N", help="steps of each training (default 7000)"
    )
    demo.add_argument(
        "--out", default="bnarray-demo", metavar="FOLDER", help="where the picture goes (default bnarray-demo)"
    )

    normalize = command(
        "normalize",
        _normalize,
        help="normalise an array in a file",
        description="Give every feature of an array mean 0 and deviation 1. Files of any size: blocks are read,\n"
        "worked on and written in turn. The input is read twice (once with --stats).",
        epilog="examples:\n"
        "  bnarray normalize train.npy train-n.npy --save-stats train-stats.npz\n"
        "  bnarray normalize test.npy test-n.npy --stats train-stats.npz\n"
        "  bnarray normalize images.npy out.npy --axis=-1 --dtype float32\n"
        "  bnarray normalize data.npz out.npz --member x --where mask.npy",
    )
    normalize.add_argument("src", metavar="IN", help=".npy, .npz (every floating member) or a zarr array")
    normalize.add_argument("dst", metavar="OUT", help="named .npy, .npz or .zarr")
    normalize.add_argument("--eps", type=float, default=1e-5, metavar="E", help="added to the variance (default 1e-5)")
    normalize.add_argument("--stats", metavar="FILE", help="saved statistics, instead of the data's own")
    normalize.add_argument("--save-stats", metavar="FILE", help="save the data's own statistics")
    normalize.add_argument("--where", metavar="FILE", help="a mask or weights: what counts in the statistics")
    normalize.add_argument("--dtype", metavar="NAME", help="what to write: float16, float32, float64 (default: as IN)")
    _add_reading(normalize)

    stats = command(
        "stats",
        _stats,
        help="exact statistics of the arrays in many files together",
        description="Mean and deviation of every feature over all files together, as if they were one array.",
        epilog="example:\n  bnarray stats day1.npy day2.npy day3.npy --out days.npz",
    )
    stats.add_argument("src", nargs="+", metavar="IN", help=".npy, .npz or a zarr array")
    stats.add_argument("--out", metavar="FILE", help="where to save them, for --stats, plot and RunningStats.load")
    _add_reading(stats)

    plot = command(
        "plot",
        _plot,
        help="draw saved statistics, and how they differ",
        description="Draw mean and deviation of every feature. Of two or more files also the drift from the first:\n"
        "how many of its deviations a mean has moved, and by what factor a deviation has changed.",
        epilog="example:\n  bnarray plot train-stats.npz new-stats.npz --out drift.svg",
    )
    plot.add_argument("stats", nargs="+", metavar="STATS", help="what `stats --out` or `--save-stats` wrote")
    plot.add_argument("--out", default="statistics.png", metavar="FILE", help=".png or .svg (default statistics.png)")
    plot.add_argument("--force", action="store_true", help="replace a file that exists")

    info = command(
        "info",
        _info,
        help="versions, threads, the cache of compiled kernels, CUDA",
        description="Say what this installation is made of and what it can use.",
        epilog="examples:\n  bnarray info --json\n  bnarray info --libraries\n  bnarray info --clear-cache",
    )
    info.add_argument("--json", action="store_true", help="for programs")
    info.add_argument(
        "--libraries", action="store_true", help="instead: which array libraries are served and how, as Markdown"
    )
    info.add_argument("--clear-cache", action="store_true", help="delete the compiled kernels; they are made again")
    return parser


@contextmanager
def _extra(command: str, extra: str) -> Iterator[None]:
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("bnarray"):
            raise
        raise OSError(f"it needs {error.name}; install it by: pip install 'bnarray[{extra}]'") from None


def _demo(options: argparse.Namespace) -> None:
    with _extra("demo", "demo"):
        from bnarray import demo
    demo.run(seeds=options.seeds, steps=options.steps, folder=options.out)


@contextmanager
def _bar() -> Iterator[Callable[[int, int], None] | None]:
    """A progress bar on a terminal, if the package for it is installed."""
    if sys.stderr is None or not sys.stderr.isatty():  # None is closed
        yield None
        return
    try:
        from tqdm import tqdm
    except ModuleNotFoundError:
        yield None
        return
    with tqdm(unit="B", unit_scale=True, leave=False) as bar:

        def show(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield show


def _check_once(path: str, *others: str | None) -> None:
    for other in others:
        if other is not None and os.path.realpath(path) == os.path.realpath(other):
            raise ValueError(f"{path} is named twice; write to another place")


def _check_new(path: str | None, force: bool, *others: str | None) -> None:
    """Raise, before the work is done, if its result cannot have this place."""
    if path is None:
        return
    _check_once(path, *others)
    if os.path.lexists(path) and not force:
        raise FileExistsError(f"{path} exists; name another place, or replace it by force")
    check_place(path)


def _check_new_stats(path: str | None, force: bool, *others: str | None) -> None:
    from bnarray.backends import _archive

    _check_new(path, force, *others)
    if path is not None:
        _archive.check_format(path)


def _normalize(options: argparse.Namespace) -> None:
    from bnarray import files, report
    from bnarray.stats import RunningStats

    _check_new_stats(options.save_stats, options.force, options.src, options.dst, options.where, options.stats)
    _check_once(options.dst, options.stats)
    if options.save_stats is not None:
        files.check_one_array(options.src, options.member)
    given = None if options.stats is None else RunningStats.load(options.stats)
    begin = time.perf_counter()
    with _bar() as progress, _extra("normalize", "zarr"):
        done = files.normalize_file(
            options.src,
            options.dst,
            axis=options.axis,
            eps=options.eps,
            stats=given,
            where=options.where,
            dtype=options.dtype,
            member=options.member,
            chunk_mb=options.chunk_mb,
            force=options.force,
            progress=progress,
        )
    seconds = time.perf_counter() - begin
    if options.save_stats is not None:
        assert isinstance(done, files.Normalized), "there is one array, as checked"
        report.as_stats(done.before).save(options.save_stats)
    print(report.of_normalized(done, seconds, os.path.getsize(options.src)))


def _stats(options: argparse.Namespace) -> None:
    from bnarray import files, report

    _check_new_stats(options.out, options.force, *options.src)
    with _bar() as progress, _extra("stats", "zarr"):
        found = files.file_moments(
            options.src, axis=options.axis, member=options.member, chunk_mb=options.chunk_mb, progress=progress
        )
    if options.out is not None:
        report.as_stats(found).save(options.out)
    print(report.of_moments(found))


def _plot(options: argparse.Namespace) -> None:
    from bnarray.stats import RunningStats

    for path in options.stats:
        _check_new(options.out, options.force, path)
    statistics = {path: RunningStats.load(path) for path in options.stats}
    with _extra("plot", "plot"):
        from bnarray import plot
    plot.draw(statistics, options.out)
    print(options.out)


def _info(options: argparse.Namespace) -> None:
    from bnarray import info

    if options.clear_cache:
        info.clear_cache()
    if options.libraries:
        print(info.support(), end="")
        return
    facts = info.facts()
    print(json.dumps(facts, indent=2) if options.json else info.table(facts))


def _terminated(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)  # so that what is half done is cleaned up


@contextmanager
def _cleaning_up() -> Iterator[None]:
    try:
        before: Any = signal.signal(signal.SIGTERM, _terminated)
    except ValueError:  # not the main thread, where signals arrive
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _told(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror is not None:
        return f"{error.filename}: {error.strerror}" if error.filename is not None else error.strerror
    if isinstance(error, MemoryError):
        return f"too little memory: {error}"
    return str(error)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    options = _parser().parse_args(arguments)
    try:
        with _cleaning_up():
            options.run(options)
            if sys.stdout is not None:  # closed
                sys.stdout.flush()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nobody reads: not what is left to flush either
        return 141
    except (OSError, ValueError, TypeError, MemoryError, ImportError) as error:
        print(f"bnarray {options.command}: {_told(error)}", file=sys.stderr)
        return 1
    return 0
