"""The command line."""

import argparse
import os
import sys
from collections.abc import Sequence

from bnarray import __version__


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="bnarray", description="Batch normalization for arrays, without a framework.")
    parser.add_argument("--version", action="version", version=f"bnarray {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    demo = commands.add_parser(
        "demo",
        help="see batch normalization at work on real data",
        description="Normalise scikit-learn's handwritten digits, then train the network of the paper on them, with "
        "and without batch normalization, at several learning rates. Prints tables and writes a picture.",
        epilog="example: bnarray demo --seeds 3 --out results",
    )
    demo.add_argument("--seeds", type=_positive, default=1, metavar="K", help="train K times, for the spread")
    demo.add_argument(
        "--steps", type=_positive, default=7000, metavar="N", help="steps of each training (default 7000)"
    )
    demo.add_argument(
        "--out", default="bnarray-demo", metavar="FOLDER", help="where the picture goes (default bnarray-demo)"
    )
    return parser


def _demo(options: argparse.Namespace) -> int:
    try:
        from bnarray import demo
    except ModuleNotFoundError as error:
        print(f"bnarray demo needs {error.name}; install it by: pip install 'bnarray[demo]'", file=sys.stderr)
        return 1
    demo.run(seeds=options.seeds, steps=options.steps, folder=options.out)
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code: 0, 1 for a failure, 2 for wrong arguments, 130 for Ctrl-C."""
    options = _parser().parse_args(arguments)
    try:
        code = _demo(options)
        sys.stdout.flush()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nobody reads: not what is left to flush either
        return 141
    except OSError as error:
        print(f"bnarray {options.command}: {error}", file=sys.stderr)
        return 1
    return code
