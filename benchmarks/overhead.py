"""What a call costs beside its work: an array of 8×4."""

from collections.abc import Callable
from functools import lru_cache
from typing import Any


@lru_cache(maxsize=1)
def _calls() -> dict[str, Callable[[], Any]]:
    import numpy as np

    import bnarray as bn
    from bnarray.testing import reference

    rng = np.random.default_rng(0)
    x, dy = rng.normal(2, 3, (2, 8, 4)).astype(np.float32)
    weight, bias = rng.normal(size=(2, 4)).astype(np.float32)
    stats, out, (y, saved) = bn.RunningStats(4), np.empty_like(x), bn.batch_norm_forward(x, weight, bias)
    truth = reference(x, dy, (1,), weight=weight, bias=bias)
    np.testing.assert_allclose(y, truth.y, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(bn.batch_norm_backward(dy, saved).x, truth.dx, rtol=1e-5, atol=1e-5)
    layer, moments = bn.BatchNorm(4), bn.moments(x)

    def both() -> Any:
        _, saved = bn.batch_norm_forward(x, weight, bias)
        return bn.batch_norm_backward(dy, saved)

    def layer_both() -> Any:
        layer(x)
        return layer.backward(dy)

    calls = {
        "batch_norm": lambda: bn.batch_norm(x, weight, bias),
        "batch_norm out=": lambda: bn.batch_norm(x, weight, bias, out=out),
        "batch_norm stats=": lambda: bn.batch_norm(x, weight, bias, stats=stats),
        "evaluation": lambda: bn.batch_norm(x, weight, bias, stats=stats, training=False),
        "forward and backward": both,
        "layer, forward and backward": layer_both,
        "moments": lambda: bn.moments(x),
        "update": lambda: stats.update(moments),
    }
    for call in calls.values():
        call()  # compiled, or loaded
    return calls


class Overhead:
    params = [
        "batch_norm",
        "batch_norm out=",
        "batch_norm stats=",
        "evaluation",
        "forward and backward",
        "layer, forward and backward",
        "moments",
        "update",
    ]
    param_names = ["call"]
    repeat = (50, 2000, 0.5)

    def setup(self, name: str) -> None:
        self.call = _calls()[name]

    def time_call(self, _: str) -> None:
        self.call()
