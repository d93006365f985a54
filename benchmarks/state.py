"""Time of statistics and of the layer."""

from collections.abc import Callable
from functools import lru_cache
from typing import Any

from benchmarks import compare, parameters


@lru_cache(maxsize=1)
def _moments(shape: str, layout: str, dtype: str) -> Callable[[], Any]:
    import numpy as np

    import bnarray as bn

    case = parameters.case(shape, layout, dtype)
    some, found = case.x[:, :3].astype(np.float64), bn.moments(case.x)
    np.testing.assert_allclose(found.mean[:3], some.mean(case.axes), rtol=1e-6)
    np.testing.assert_allclose(found.var()[:3], some.var(case.axes), rtol=1e-6)
    return lambda: bn.moments(case.x)


class Moments:
    params = [parameters.SHAPES, parameters.LAYOUTS, parameters.DTYPES]
    param_names = ["shape", "layout", "dtype"]
    repeat = (5, 50, 0.5)

    def setup(self, shape: str, layout: str, dtype: str) -> None:
        self.call = _moments(shape, layout, dtype)

    def time_moments(self, *_: Any) -> None:
        self.call()


@lru_cache(maxsize=1)
def _merge(features: int, members: int) -> Callable[[], Any]:
    import numpy as np

    import bnarray as bn

    batches = np.random.default_rng(0).normal(2, 3, (members, 32, features))
    each = [bn.moments(batch) for batch in batches]
    merged, whole = bn.Moments.merge_all(each), batches.reshape(-1, features)
    np.testing.assert_allclose(merged.mean, whole.mean(0), rtol=1e-9)
    np.testing.assert_allclose(merged.var(), whole.var(0), rtol=1e-9)
    return lambda: bn.Moments.merge_all(each)


class Merge:
    """The union of several samples' statistics."""

    params = [[64, 4096], [2, 100]]
    param_names = ["features", "members"]
    repeat = (5, 200, 0.5)

    def setup(self, features: int, members: int) -> None:
        self.call = _merge(features, members)

    def time_merge(self, *_: Any) -> None:
        self.call()


@lru_cache(maxsize=1)
def _layer(shape: str, layout: str) -> Callable[[], Any]:
    import bnarray as bn

    case = parameters.case(shape, layout, "float32")
    layer = bn.BatchNorm(case.shape[1], eps=compare.EPS)
    layer.weight[...], layer.bias[...] = case.weight, case.bias

    def step() -> Any:
        layer.zero_grad()
        layer(case.x)
        return layer.backward(case.dy)

    parameters.check(case, "both", step())
    return step


class Layer:
    """Forward and backward through a `BatchNorm`."""

    params = [parameters.SHAPES, parameters.LAYOUTS]
    param_names = ["shape", "layout"]
    repeat = (5, 50, 0.5)

    def setup(self, shape: str, layout: str) -> None:
        self.call = _layer(shape, layout)

    def time_step(self, *_: Any) -> None:
        self.call()
