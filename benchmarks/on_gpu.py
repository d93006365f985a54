"""Calls on arrays of a CUDA device, timed by its events; n/a where there is no device.

Run with ``asv run --launch-method spawn``: a device cannot be used on both sides of a fork.
"""

import ctypes
import statistics
from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

from benchmarks import compare, parameters

_ROUNDS = 30


class _Device(NamedTuple):
    """A library's arrays on its first CUDA device."""

    of_host: Callable[[Any], Any]
    to_host: Callable[[Any], Any]
    event: Callable[[], Any]  # with record and synchronize
    elapsed: Callable[[Any, Any], float]  # ms
    copy: Callable[[Any, Any], Any]  # from, to


def _torch() -> _Device:
    parameters.need("torch")
    import torch

    if not torch.cuda.is_available():
        raise NotImplementedError("torch has no CUDA device")
    return _Device(
        lambda array: torch.from_numpy(array).cuda(),
        lambda tensor: tensor.cpu().numpy(),
        lambda: torch.cuda.Event(enable_timing=True),
        lambda start, end: start.elapsed_time(end),
        lambda source, target: target.copy_(source),
    )


def _cupy() -> _Device:
    parameters.need("cupy", "bnarray.backends.cupy")
    import cupy
    import numpy as np

    if not cupy.is_available():
        raise NotImplementedError("CuPy has no CUDA device")

    def of_host(array: np.ndarray) -> Any:
        strided = cupy.empty_like(array)  # laid out likewise
        strided[...] = cupy.asarray(array)
        return strided

    return _Device(of_host, cupy.asnumpy, cupy.cuda.Event, cupy.cuda.get_elapsed_time, lambda x, y: cupy.copyto(y, x))


_DEVICES = {"torch": _torch, "cupy": _cupy}


def _milliseconds(device: _Device, call: Callable[[], Any]) -> float:
    """The median time between two events that only the call is between."""
    times = []
    for _ in range(_ROUNDS):
        start, end = device.event(), device.event()
        start.record()
        call()
        end.record()
        end.synchronize()
        times.append(device.elapsed(start, end))
    return statistics.median(times)


@lru_cache(maxsize=1)
def _calls(library: str, shape: str, layout: str, step: str) -> tuple[_Device, dict[str, Callable[[], Any]]]:
    """The device, and the calls that are timed there: bnarray's, a copy of x, and torch's own."""
    import bnarray as bn

    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:  # told at once, before a library is imported
        raise NotImplementedError("CUDA's driver is not there") from None
    device = _DEVICES[library]()
    case = parameters.case(shape, layout, "float32")
    x, dy, weight, bias = (device.of_host(each) for each in (case.x, case.dy, case.weight, case.bias))
    y, saved = bn.batch_norm_forward(x, weight, bias)
    stats = bn.Moments(1, device.of_host(case.mean), device.of_host(case.var))
    ours = {
        "training": lambda: bn.batch_norm(x, weight, bias),
        "evaluation": lambda: bn.batch_norm(x, weight, bias, stats=stats, training=False),
        "backward": lambda: bn.batch_norm_backward(dy, saved).x,
    }
    calls = {"bnarray": ours[step], "copy": lambda: device.copy(x, y)}
    if library == "torch" and step != "backward":
        import torch

        mean, var = (device.of_host(each) for each in (case.mean, case.var))
        calls["peer"] = lambda: torch.nn.functional.batch_norm(
            x, mean, var, weight, bias, training=step == "training", momentum=0.0, eps=compare.EPS
        )
    for name in calls.keys() - {"copy"}:
        parameters.check(case, step, device.to_host(calls[name]()))
    return device, calls


class Cuda:
    params = [list(_DEVICES), [*parameters.SHAPES, "64x256x56x56"], parameters.LAYOUTS, list(compare.STEPS)[:3]]
    param_names = ["library", "shape", "layout", "step"]
    timeout = 180

    def setup(self, *row: str) -> None:
        self.device, self.calls = _calls(*row)

    def _milliseconds(self, name: str) -> float:
        return _milliseconds(self.device, self.calls[name])

    def track_time(self, *_: Any) -> float:
        return self._milliseconds("bnarray")

    def track_limit(self, *row: str) -> float:
        return self._milliseconds("bnarray") / (self._milliseconds("copy") * compare.STEPS[row[-1]] / 2)

    def track_peer(self, *_: Any) -> float:
        if "peer" not in self.calls:
            raise NotImplementedError("no peer")
        return self._milliseconds("bnarray") / self._milliseconds("peer")

    track_time.unit = "ms"  # type: ignore[attr-defined]
    track_limit.unit = "time / limit"  # type: ignore[attr-defined]
    track_peer.unit = "time / torch's"  # type: ignore[attr-defined]
