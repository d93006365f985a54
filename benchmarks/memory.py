"""Memory of a call: the process's peak, and what is allocated. (The same calls are checked where they are timed.)"""

import tracemalloc
from typing import Any

from benchmarks import parameters


def _make(call: str, x: Any, dy: Any) -> None:
    import bnarray as bn

    if call == "moments":
        bn.moments(x)
    elif call == "merge":
        bn.Moments.merge_all(bn.moments(part) for part in (x[::2], x[1::2]))
    elif call == "forward":
        bn.batch_norm(x)
    elif call == "forward out=":
        bn.batch_norm(x, out=x)
    elif call == "evaluation":
        bn.batch_norm(x, stats=bn.RunningStats(x.shape[1]), training=False)
    elif call == "both":
        _, saved = bn.batch_norm_forward(x)
        bn.batch_norm_backward(dy, saved)
    elif call == "layer":
        layer = bn.BatchNorm(x.shape[1])
        layer.forward(x)
        layer.backward(dy)


class Peak:
    """The most memory that the process had, with x and dy of 103 MB each. `nothing` has made the arrays, and a call on
    small ones: what is above it is the call's, y included. 190 MB of it are Python with Numba and the kernels."""

    params = [["nothing", "moments", "forward", "forward out=", "evaluation", "both", "layer", "merge"]]
    param_names = ["call"]
    shape = (64, 128, 56, 56)

    def setup_cache(self) -> None:
        """Compile, which takes more memory than a call, in a process of its own."""
        import numpy as np

        for call in self.params[0]:
            _make("layer" if call == "nothing" else call, *np.zeros((2, 2, *self.shape[1:]), np.float32))

    def setup(self, call: str) -> None:
        import numpy as np

        # Drawn as float32 at once: asv counts this too.
        self.x, self.dy = np.random.default_rng(0).standard_normal((2, *self.shape), np.float32)
        some = slice(2)
        _make("layer" if call == "nothing" else call, self.x[some].copy(), self.dy[some].copy())  # kernels loaded

    def peakmem_call(self, call: str) -> None:
        _make(call, self.x, self.dy)


class Allocated:
    """The most bytes that a second call has allocated at a time, as tracemalloc counts them: Python's objects and
    NumPy's arrays, y included; not what compiled code takes from the system by itself."""

    params = [
        ["training", "evaluation", "backward", "both"],
        ["numpy", "numpy out="],
        ["32x256x14x14"],
        parameters.LAYOUTS,
    ]
    param_names = ["step", "library", "shape", "layout"]
    unit = "bytes"

    def setup(self, step: str, library: str, shape: str, layout: str) -> None:
        self.call = parameters.checked_call(step, library, shape, layout, "float32", 2)

    def track_allocated(self, *_: Any) -> int:
        tracemalloc.start()
        try:
            self.call()
            tracemalloc.reset_peak()
            before, _peak = tracemalloc.get_traced_memory()
            self.call()
            return tracemalloc.get_traced_memory()[1] - before
        finally:
            tracemalloc.stop()
