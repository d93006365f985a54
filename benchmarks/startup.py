"""Time from a new interpreter to the import, and to the first result: with kernels to compile, and with none."""

import subprocess
import sys
from functools import lru_cache

_FIRST = """
import numpy as np
import bnarray as bn
y, saved = bn.batch_norm_forward(np.arange(64, dtype=np.float32).reshape(16, 4))
bn.batch_norm_backward(y, saved)
"""
_EMPTY = """
import os, tempfile
folder = tempfile.TemporaryDirectory()
os.environ["BNARRAY_CACHE_DIR"] = folder.name
"""


@lru_cache(maxsize=1)
def _warm() -> None:
    """Let the kernels be compiled and kept, and the result be right."""
    code = f"{_FIRST}\nassert abs(y.mean(0)).max() < 1e-6 and abs(y.var(0) - 1).max() < 1e-6"
    subprocess.run([sys.executable, "-c", code], check=True)


class Startup:
    """Each sample is a process of its own."""

    number, rounds, warmup_time = 1, 1, 0
    repeat = (3, 10, 10.0)
    timeout = 300

    def setup(self) -> None:
        _warm()

    def timeraw_import(self) -> str:
        return "import bnarray"

    def timeraw_import_numpy(self) -> str:
        """What of the others is NumPy's."""
        return "import numpy"

    def timeraw_first_result(self) -> str:
        return _FIRST


class Cold:
    """Likewise, in an empty cache."""

    number, rounds, warmup_time, repeat = 1, 1, 0, 2
    timeout = 300

    def timeraw_first_result(self) -> tuple[str, str]:
        return _FIRST, _EMPTY
