"""How far results are from the formula in float64, in units in the last place: what `bnarray.testing` counts."""

from functools import lru_cache
from typing import Any


@lru_cache(maxsize=1)
def _errors(dtype: str, mean: int) -> dict[str, float]:
    import ml_dtypes
    import numpy as np

    import bnarray as bn
    from bnarray.testing import TOLERANCES, reference, ulps

    kind = ml_dtypes.bfloat16 if dtype == "bfloat16" else np.dtype(dtype)
    rng = np.random.default_rng(0)
    x, dy = rng.normal(mean, 1, (16, 8, 32, 32)).astype(kind), rng.normal(size=(16, 8, 32, 32)).astype(kind)
    weight, bias = rng.normal(size=(2, 8)).astype(np.float32)
    truth = reference(x, dy, (1,), weight=weight, bias=bias)
    y, saved = bn.batch_norm_forward(x, weight, bias)
    dx = bn.batch_norm_backward(dy, saved).x
    tolerance = TOLERANCES[dtype]
    return {
        "y": float(ulps(y, truth.y, truth.y_scale, tolerance).max()),
        "dx": float(ulps(dx, truth.dx, truth.dx_scale, tolerance).max()),
        "var": float(abs(saved.moments.var().ravel() / truth.var.ravel() - 1).max() / TOLERANCES["float64"].epsilon),
    }


class Accuracy:
    """The worst element, in ulps of the largest term; data of deviation 1."""

    params = [["float32", "bfloat16", "float16", "float64"], [0, 1000, 1_000_000]]
    param_names = ["dtype", "mean"]
    unit = "ulp"

    def setup(self, dtype: str, mean: int) -> None:
        if dtype in ("float16", "bfloat16") and mean > 1000:
            raise NotImplementedError(f"{dtype} has no numbers of deviation 1 there")

    def track_y(self, *row: Any) -> float:
        return _errors(*row)["y"]

    def track_dx(self, *row: Any) -> float:
        return _errors(*row)["dx"]

    def track_variance(self, *row: Any) -> float:
        """In ulps of float64, whatever the data."""
        return _errors(*row)["var"]
