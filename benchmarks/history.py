"""Run a part of the suite over the commits that changed speed: ``python -m benchmarks.history --machine NAME``.

Further arguments are asv's (``--quick``, ``--skip-existing``, …). Without --quick it takes about 20 minutes on two
cores: for each commit some 10 s to install it, 15 s to compile its kernels, and the rest to measure. Then
``python -m benchmarks.report`` draws it.
"""

import subprocess
import sys

#: Along `git log --first-parent`; before the first one the project cannot be installed.
COMMITS = {
    "09c8a21": "tiles, moments, normalization and both gradients",
    "598f6bd": "moments and output in one go where a feature stays in cache",
    "dd1d86b": "sums in a written order; lines in place, in float32 where it is as exact",
    "e82fd0e": "training on small arrays in one kernel call",
    "19ce3ce": "memory in its own order where nothing is summed",
    "f1598f7": "tiles of even steps copied as one line",
    "4492059": "kernels that own no memory, float32 tiles centered on their first value",
    "5a71777": "statistics handed to kernels as they are, each verb planned once",
    "3946fb7": "helper threads reached without the interpreter",
    "2dc450d": "float16 by the processor, wide rows shared among threads",
    "3292fde": "short runs read twice in memory's order",
    "d400bf0": "few features that lie together read side by side",
    "3e1f36f": "the order of the steps apart from the public functions",
    "155ab77": "the backward pass in one go",
    "73d3ebe": "the backward pass in one go only where that is faster",
    "f75aeec": "helpers that look out longer for the next call",
    "dc78352": "a call like one before, on small arrays, in one entry into compiled code",
    "main": "now",
}

_LARGE = r"'numpy out=', '(4096x512|32x64x56x56)', '[a-z ]+', 'float32', 2\)"
BENCHMARKS = [
    rf"passes\.(Forward|Evaluation|Backward)\.\w+\({_LARGE}",
    r"overhead\.Overhead\.time_call\('(batch_norm|evaluation|forward and backward)'\)",
    r"accuracy\.Accuracy\.track_y\('float32', 1000000\)",
    r"memory\.Allocated\.track_allocated\('both', 'numpy', '32x256x14x14', 'channels first'\)",
    r"startup\.Startup\.timeraw_(import|first_result)$",
]


def main() -> None:
    chosen = [argument for each in BENCHMARKS for argument in ("--bench", each)]
    command = ["asv", "run", "HASHFILE:-", "--attribute", "rounds=1", *chosen, *sys.argv[1:]]
    raise SystemExit(subprocess.run(command, input="\n".join(COMMITS), text=True).returncode)


if __name__ == "__main__":
    main()
