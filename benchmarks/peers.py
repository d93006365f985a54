"""bnarray beside its best peer, and beside the memory bus: what `benchmarks.compare` measures, over commits."""

from benchmarks import compare, parameters

_SECONDS = 0.5
_PEERS = ("torch", "jax", "formula")  # torch.compile takes longer to compile than asv waits for


class Peers:
    """Time over the best peer's, or over the limit: lower is better, and 1 is as fast. Two threads."""

    params = [parameters.SHAPES, parameters.LAYOUTS, parameters.DTYPES, list(compare.STEPS)]
    param_names = ["shape", "layout", "dtype", "step"]
    timeout = 180

    def setup(self, shape: str, layout: str, dtype: str, _: str) -> None:
        if dtype == "bfloat16" and shape != "32x64x56x56":
            raise NotImplementedError("not measured")
        parameters.need("torch", "jax")
        import torch  # noqa: F401  # so that it gets its threads

        self.case = parameters.case(shape, layout, dtype)
        parameters.use_threads(2)

    def _measured(self, step: str, wanted: tuple[str, ...]) -> dict[str, float]:
        return compare.measure(self.case, step, 2, wanted, _SECONDS)

    def track_peers(self, _shape: str, _layout: str, _dtype: str, step: str) -> float:
        us = self._measured(step, _PEERS)
        return us["bnarray"] / us[compare.best_peer(us)]

    def track_limit(self, _shape: str, _layout: str, _dtype: str, step: str) -> float:
        us = self._measured(step, ())
        return us["bnarray out="] / compare.limit(us, step)

    track_peers.unit = "time / best peer's"  # type: ignore[attr-defined]
    track_limit.unit = "time / limit"  # type: ignore[attr-defined]
