"""How long a call takes on a CUDA device: ``python -m benchmarks.compare --device cuda``.

Times are CUDA events' around many calls, in turns. Inputs rotate through more memory than the L2 cache holds, so that
every call reads from memory. The limit is what a step must move (training 3 passes over x: two reads and a write;
evaluation 2; backward 5) at the speed of a copy of the same array, which moves 2. *host* is what a call of bnarray
costs the host, µs, measured on an array of 32 × 64 whose kernels take less.
"""

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable
from math import ceil
from typing import Any

EPS = 1e-5
STEPS = {"training": 3, "evaluation": 2, "backward": 5}
SHAPES = [
    *[(32, 64, 112, 112), (32, 256, 56, 56), (32, 512, 28, 28), (32, 1024, 14, 14), (32, 2048, 7, 7)],
    *[(256, 64, 56, 56), (65536, 1024), (100_000, 64), (128, 2048), (2, 8192)],
]
ROTATED = 2**28  # bytes of inputs that calls go through, five times an H100's L2
CALLS, ROUNDS = 20, 7

Call = Callable[[int], Any]


class Case:
    """Inputs of one row: so many that they do not stay in a cache."""

    def __init__(self, torch: Any, shape: tuple[int, ...], channels_last: bool, dtype: str) -> None:
        generator = torch.Generator("cuda").manual_seed(0)
        kind = getattr(torch, dtype)
        one = torch.empty(shape, dtype=kind)
        self.number = max(1, ceil(ROTATED / one.nbytes))

        def draw() -> Any:
            x = torch.randn(shape, device="cuda", generator=generator).mul_(3).add_(2).to(kind)
            return x.contiguous(memory_format=torch.channels_last) if channels_last else x

        self.xs = [draw() for _ in range(self.number)]
        self.dys = [draw() for _ in range(self.number)]
        self.weight, self.bias = (torch.rand(shape[1], device="cuda", generator=generator) for _ in range(2))


def contenders(torch: Any, case: Case, step: str) -> dict[str, Call]:
    """Return what is timed, each a function of the number of its input."""
    import cupy

    import bnarray as bn

    weight, bias, number = case.weight, case.bias, case.number
    norm, training = torch.nn.functional.batch_norm, step != "evaluation"
    mean, var = torch.zeros_like(weight), torch.ones_like(weight)
    compiled = torch.compile(lambda x: norm(x, mean, var, weight, bias, training=training, eps=EPS))
    theirs = [cupy.from_dlpack(each) for each in case.xs]
    gradients = [cupy.from_dlpack(each) for each in case.dys]
    scale, shift = cupy.from_dlpack(weight), cupy.from_dlpack(bias)

    def native(x: Any) -> Any:
        with torch.backends.cudnn.flags(enabled=False):
            return norm(x, mean, var, weight, bias, training=training, eps=EPS)

    def formula(x: Any) -> Any:
        axes = tuple(i for i in range(x.ndim) if i != 1)
        along = tuple(-1 if i == 1 else 1 for i in range(x.ndim))
        wide = x.astype(cupy.float32)
        centered = wide - wide.mean(axes, keepdims=True)
        invstd = 1 / cupy.sqrt((centered * centered).mean(axes, keepdims=True) + EPS)
        return (centered * invstd * scale.reshape(along) + shift.reshape(along)).astype(x.dtype)

    forwards: dict[str, Callable[[Any], Any]] = {
        "torch": lambda x: norm(x, mean, var, weight, bias, training=training, eps=EPS),
        "torch native": native,
        "torch.compile": compiled,
    }
    target = torch.empty_like(case.xs[0])
    timed: dict[str, Call] = {"copy": lambda i: target.copy_(case.xs[i % number])}
    if step == "backward":
        saved = [bn.batch_norm_forward(x, scale, shift)[1] for x in theirs]
        timed["bnarray cupy"] = lambda i: bn.batch_norm_backward(gradients[i % number], saved[i % number])
        forwards["bnarray torch"] = lambda x: bn.batch_norm(x, weight, bias)
        for name, forward in forwards.items():
            leaves = [x.detach().requires_grad_() for x in case.xs]
            results = [forward(x) for x in leaves]

            def pull(i: int, leaves: Any = leaves, results: Any = results) -> Any:
                i %= number
                return torch.autograd.grad(results[i], leaves[i], case.dys[i], retain_graph=True)

            timed[name] = pull
        return timed
    stats = {"bnarray cupy": bn.RunningStats(len(scale), like=scale)}
    stats["bnarray torch"] = bn.RunningStats(len(weight), like=weight)
    timed["bnarray cupy"] = lambda i: bn.batch_norm(
        theirs[i % number], scale, shift, stats=stats["bnarray cupy"], training=training
    )
    forwards["bnarray torch"] = lambda x: bn.batch_norm(
        x, weight, bias, stats=stats["bnarray torch"], training=training
    )
    if training:
        timed["formula"] = lambda i: formula(theirs[i % number])
    for name, forward in forwards.items():
        timed[name] = lambda i, forward=forward: forward(case.xs[i % number])
    return timed


def measure(torch: Any, timed: dict[str, Call]) -> dict[str, float]:
    """Return the median time of each contender on the device, in µs."""
    times: dict[str, list[float]] = {name: [] for name in timed}
    order, shuffled = list(timed.items()), random.Random(0)
    for _, call in order:
        for i in range(3):
            call(i)
    for _ in range(ROUNDS):
        shuffled.shuffle(order)
        for name, call in order:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            call(0)
            begin.record()
            for i in range(CALLS):
                call(i + 1)
            end.record()
            end.synchronize()
            times[name].append(1e3 * begin.elapsed_time(end) / CALLS)
    return {name: statistics.median(each) for name, each in times.items()}


def host(torch: Any) -> dict[str, float]:
    """Return what the host does for a training call, in µs, by library."""
    timed = contenders(torch, Case(torch, (32, 64), False, "float32"), "training")
    found = {}
    for name in ("bnarray cupy", "bnarray torch", "torch"):
        seconds = []
        for i in range(300):
            begin = time.perf_counter()
            timed[name](i)
            seconds.append(time.perf_counter() - begin)
            torch.cuda.synchronize()
        found[name] = 1e6 * statistics.median(seconds[50:])
    return found


def rows(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure all; print a line for each row."""
    import cupy
    import torch

    found = []
    stream = cupy.cuda.ExternalStream(torch.cuda.current_stream().cuda_stream)
    with torch.inference_mode(False), stream:
        for shape in options.shapes:
            for channels_last in [False, True] if len(shape) > 3 else [False]:
                for dtype in options.dtypes:
                    case = Case(torch, shape, channels_last, dtype)
                    for step in options.steps:
                        us = measure(torch, contenders(torch, case, step))
                        layout = "channels last" if channels_last or len(shape) == 2 else "channels first"
                        found.append({"shape": shape, "layout": layout, "dtype": dtype, "step": step, "us": us})
                        found[-1] |= ratios(us, step)
                        print(line(found[-1]), flush=True)
                    del case
                    torch.cuda.empty_cache()
                    cupy.get_default_memory_pool().free_all_blocks()
        print("host µs a training call:", json.dumps({name: round(us, 1) for name, us in host(torch).items()}))
    return found


def ratios(us: dict[str, float], step: str) -> dict[str, Any]:
    ours = min(us["bnarray cupy"], us["bnarray torch"])
    best = min((name for name in us if name.startswith("torch")), key=us.__getitem__)
    limit = us["copy"] * STEPS[step] / 2
    return {"best peer": best, "best peer / bnarray": us[best] / ours, "limit / bnarray": limit / ours}


def line(row: dict[str, Any]) -> str:
    times = ", ".join(f"{name} {us:.0f}" for name, us in sorted(row["us"].items()))
    said = f"{row['best peer / bnarray']:.2f} of {row['best peer']}, {row['limit / bnarray']:.0%} of the limit's speed"
    return f"{tuple(row['shape'])} {row['layout']} {row['dtype']} {row['step']}: {said} (µs: {times})"


def main(options: argparse.Namespace) -> None:
    from bnarray.cuda import obstacle

    found = obstacle()
    if found is not None:
        raise SystemExit(f"no CUDA device can be timed: {found}")
    measured = rows(options)
    if options.json:
        with open(options.json, "w") as file:
            json.dump(measured, file, indent=1)
