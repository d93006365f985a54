"""How long a call takes beside every peer, and beside the memory bus: ``python -m benchmarks.compare``.

One process for each number of threads, the contenders in turn in a new order every round, medians. A turn is 15 ms of
calls that are not timed, in which the threads of the one before stop spinning and the caches fill, and then at least
one that is: as in a program that uses one library. Each side allocates its output (but for the column that says
otherwise) and has the same number of threads. Peers get memory in the layout they are best at: torch channels-last
tensors for channels-last rows, JAX arrays with the channels where the row has them. Answers are compared before they
are timed.

`both` is forward and backward as the library differentiates them: by hand for NumPy, autograd for torch, a jitted vjp
for JAX. *bnarray torch* and *bnarray jax* are calls on those libraries' arrays.

`limit` is what the step must move (training 3 passes over x: two reads and a write; evaluation 2; backward 5) at the
speed of the fastest copy of the same array, which moves 2.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from math import prod
from typing import Any

from benchmarks import cuda

SMALL = [(32, 64), (256, 1024), (4096, 512), (8, 16, 8, 8), (1, 256, 3136), (32, 256, 14, 14), (32, 512, 7, 7)]
SHAPES = [
    *SMALL,
    *[(100_000, 64), (32, 64, 56, 56), (64, 256, 56, 56), (64, 3, 224, 224), (8, 32, 16, 64, 64)],
    *[(128, 2048), (2, 8192)],
]
STEPS = {"training": 3, "evaluation": 2, "backward": 5, "both": 8}
EPS = 1e-5
WARM, TIMED = 15e-3, 5e-3  # seconds of a turn
PEERS = ("torch", "torch.compile", "jax", "onnxruntime", "formula")
OURS = ("bnarray", "bnarray out=", "bnarray torch", "bnarray jax")

Call = Callable[[], Any]


class Case:
    """The arrays of one row."""

    def __init__(self, shape: tuple[int, ...], channels_last: bool, dtype: str) -> None:
        import ml_dtypes
        import numpy as np

        rng = np.random.default_rng(0)
        kind = ml_dtypes.bfloat16 if dtype == "bfloat16" else np.dtype(dtype)
        self.shape, self.channels_last, self.dtype = shape, channels_last, dtype
        drawn = (rng.normal(2, 3, shape), rng.normal(size=shape))
        self.x, self.dy = (self._laid(each.astype(np.float32).astype(kind)) for each in drawn)
        self.weight, self.bias = rng.normal(size=(2, shape[1])).astype(np.float32)
        self.mean, self.var = rng.normal(2, 1, shape[1]).astype(np.float32), np.full(shape[1], 9, np.float32)

    def _laid(self, x: Any) -> Any:
        import numpy as np

        return np.moveaxis(np.ascontiguousarray(np.moveaxis(x, 1, -1)), -1, 1) if self.channels_last else x

    @property
    def axes(self) -> tuple[int, ...]:
        return tuple(i for i in range(len(self.shape)) if i != 1)


def ours(case: Case, step: str) -> dict[str, Call]:
    import numpy as np

    import bnarray as bn

    x, dy, weight, bias = case.x, case.dy, case.weight, case.bias
    out = np.empty_like(x)
    if step == "both":

        def both(out: Any = None) -> Any:
            _, saved = bn.batch_norm_forward(x, weight, bias)
            return bn.batch_norm_backward(dy, saved, out=out).x

        return {"bnarray": both, "bnarray out=": lambda: both(out)}
    if step == "backward":
        _, saved = bn.batch_norm_forward(x, weight, bias)
        return {
            "bnarray": lambda: bn.batch_norm_backward(dy, saved).x,
            "bnarray out=": lambda: bn.batch_norm_backward(dy, saved, out=out).x,
        }
    stats, training = _stats(case), step == "training"
    return {
        "bnarray": lambda: bn.batch_norm(x, weight, bias, stats=stats, training=training),
        "bnarray out=": lambda: bn.batch_norm(x, weight, bias, stats=stats, training=training, out=out),
    }


def _stats(case: Case) -> Any:
    import bnarray as bn

    stats = bn.RunningStats(case.shape[1])
    stats.load_state_dict(
        {"running_mean": case.mean, "running_var": case.var, "count": 1, "num_updates": 1, "num_skipped": 0}
    )
    return stats


def takes(library: str, case: Case) -> bool:
    """Whether bnarray's backend for a library declares the dtype of a row."""
    from bnarray.dispatch import backend_of

    return case.dtype in backend_of(library).capabilities.dtypes


def _tensors(case: Case) -> Any:
    import torch

    kind = getattr(torch, case.dtype)
    tensors = []
    for each in (case.x, case.dy):
        wide = torch.from_numpy(each.astype("float32")).to(kind)
        formats = {4: torch.channels_last, 5: torch.channels_last_3d}
        tensors.append(wide.contiguous(memory_format=formats[wide.dim()]) if case.channels_last else wide.contiguous())
    return tensors


def with_torch(case: Case, step: str, wanted: Sequence[str]) -> dict[str, Call]:
    """The calls that are wanted, no other one being made: with torch.compile that is seconds."""
    import torch
    import torch._functorch.config

    import bnarray as bn

    x, dy = _tensors(case)
    weight, bias = torch.from_numpy(case.weight), torch.from_numpy(case.bias)
    mean, var = torch.from_numpy(case.mean.copy()), torch.from_numpy(case.var.copy())
    norm = torch.nn.functional.batch_norm

    def plain(x: Any, weight: Any, bias: Any) -> Any:
        return norm(x, None, None, weight, bias, training=True, eps=EPS)

    served = [name for name in wanted if name != "bnarray torch" or takes("torch", case)]
    if step in ("backward", "both"):
        torch._functorch.config.donated_buffer = False  # the graph is kept, to go through it again

        def differentiated(forward: Any) -> Call:
            leaves = [each.clone().requires_grad_() for each in (x, weight, bias)]
            if step == "both":
                return lambda: torch.autograd.grad(forward(*leaves), leaves, dy)[0]
            y = forward(*leaves)
            return lambda: torch.autograd.grad(y, leaves, dy, retain_graph=True)[0]

        makers = {
            "torch": lambda: differentiated(plain),
            "torch.compile": lambda: differentiated(torch.compile(plain)),
            "bnarray torch": lambda: differentiated(bn.batch_norm),
        }
        return {name: make() for name, make in makers.items() if name in served}

    stats = _stats(case)

    def through() -> Any:
        with torch.no_grad():
            return bn.batch_norm(x, weight, bias, stats=stats, training=step == "training")

    def eager() -> Any:
        with torch.no_grad():
            return norm(x, mean, var, weight, bias, training=step == "training", eps=EPS)

    def inductor() -> Call:
        compiled = torch.compile(lambda x: norm(x, mean, var, weight, bias, training=step == "training", eps=EPS))

        def call() -> Any:
            with torch.no_grad():
                return compiled(x)

        return call

    makers = {"torch": lambda: eager, "torch.compile": inductor, "bnarray torch": lambda: through}
    return {name: make() for name, make in makers.items() if name in served}


def with_jax(case: Case, step: str, wanted: Sequence[str]) -> dict[str, Call]:
    import jax
    import jax.numpy as jnp
    import numpy as np

    import bnarray as bn

    axis = -1 if case.channels_last else 1
    x, dy = (jnp.asarray(np.moveaxis(each, 1, axis) if case.channels_last else each) for each in (case.x, case.dy))
    along = [1] * x.ndim
    along[axis] = -1
    axes = tuple(i for i in range(x.ndim) if i != axis % x.ndim)
    weight, bias = jnp.asarray(case.weight), jnp.asarray(case.bias)

    def forward(x: Any, weight: Any, bias: Any, mean: Any = None, var: Any = None) -> Any:
        wide = x.astype(jnp.float32)
        mean = wide.mean(axes) if mean is None else mean
        var = ((wide - mean.reshape(along)) ** 2).mean(axes) if var is None else var
        scale = (weight / jnp.sqrt(var + EPS)).reshape(along)
        return ((wide - mean.reshape(along)) * scale + bias.reshape(along)).astype(x.dtype)

    normalized = partial(bn.batch_norm, axis=axis)
    arguments: tuple[Any, ...]
    if step in ("backward", "both"):

        def pull(forward: Any, x: Any, dy: Any) -> Any:
            return jax.vjp(forward, x, weight, bias)[1](dy)

        # A backward pass alone is one whose forward pass XLA has no use for: ours is kept, so its row is left out.
        results = {"jax": jax.jit(partial(pull, forward)), "bnarray jax": jax.jit(partial(pull, normalized))}
        arguments = x, dy
        if step == "backward":
            results = {"jax": jax.jit(lambda dy: jax.vjp(forward, x, weight, bias)[1](dy))}
            arguments = (dy,)
    elif step == "training":

        def train(x: Any, running_mean: Any, running_var: Any) -> Any:
            wide = x.astype(jnp.float32)
            mean, var = wide.mean(axes), wide.var(axes)
            updated = 0.9 * running_mean + 0.1 * mean, 0.9 * running_var + 0.1 * var
            return (forward(x, weight, bias, mean, var), *updated)

        def train_through(x: Any, stats: Any, _: Any) -> Any:
            y, saved = bn.batch_norm_forward(x, weight, bias, axis=axis)
            return y, stats.updated(saved.moments)

        stats = _stats(case).to(x)
        results = {"jax": jax.jit(train), "bnarray jax": jax.jit(train_through)}
        arguments = x, jnp.asarray(case.mean), jnp.asarray(case.var)
    else:
        stats = _stats(case).to(x)
        results = {
            "jax": jax.jit(lambda x, mean, var: (forward(x, weight, bias, mean, var),)),
            "bnarray jax": jax.jit(lambda x, stats, _: (normalized(x, weight, bias, stats=stats, training=False),)),
        }
        arguments = x, jnp.asarray(case.mean), jnp.asarray(case.var)
    calls: dict[str, Call] = {}
    for name, result in results.items():
        if name not in wanted or (name == "bnarray jax" and not takes("jax", case)):
            continue
        given = (x, stats, None) if name == "bnarray jax" and step in ("training", "evaluation") else arguments
        calls[name] = _JaxCall(result, given, axis if case.channels_last else 1)
    return calls


class _JaxCall:
    """A call that waits for its result, and shows it with the channels where the case has them until it is checked."""

    def __init__(self, result: Any, arguments: tuple[Any, ...], axis: int) -> None:
        self.result, self.arguments, self.axis, self.checked = result, arguments, axis, False

    def __call__(self) -> Any:
        import jax

        first = jax.block_until_ready(self.result(*self.arguments))[0]
        return first if self.checked else jax.numpy.moveaxis(first, self.axis, 1)


def with_onnxruntime(case: Case, step: str, threads: int) -> dict[str, Call]:
    if step != "evaluation" or case.channels_last or case.dtype != "float32":
        return {}
    import onnx
    import onnxruntime

    names = ("weight", "bias", "mean", "var")
    node = onnx.helper.make_node("BatchNormalization", ["x", *names], ["y"], epsilon=EPS)
    sizes = list(case.shape)
    inputs = [onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, sizes)]
    outputs = [onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, sizes)]
    held = [onnx.numpy_helper.from_array(getattr(case, name), name) for name in names]
    graph = onnx.helper.make_graph([node], "batch_norm", inputs, outputs, held)
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 15)], ir_version=10)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return {"onnxruntime": lambda: session.run(None, {"x": case.x})[0]}


def formula(case: Case, step: str) -> dict[str, Call]:
    import numpy as np

    if step in ("backward", "both") or case.dtype != "float32":
        return {}
    x = case.x
    along = tuple(-1 if i == 1 else 1 for i in range(x.ndim))
    weight, bias, mean, var = (each.reshape(along) for each in (case.weight, case.bias, case.mean, case.var))

    def train() -> Any:
        m, v = x.mean(case.axes, keepdims=True), x.var(case.axes, keepdims=True)
        return (x - m) / np.sqrt(v + EPS) * weight + bias

    return {"formula": train if step == "training" else lambda: (x - mean) / np.sqrt(var + EPS) * weight + bias}


def copies(case: Case) -> dict[str, Call]:
    """Copies of the array into memory that is there."""
    import numpy as np

    source = _tensors(case)[0]
    target, out = source.clone(), np.empty_like(case.x)
    return {"copy torch": lambda: target.copy_(source), "copy numpy": lambda: np.copyto(out, case.x)}


def as_numpy(result: Any) -> Any:
    import numpy as np

    return np.asarray(result.detach().float() if hasattr(result, "detach") else result, np.float64)


def measure(case: Case, step: str, threads: int, wanted: Sequence[str], seconds: float) -> dict[str, float]:
    """Return the median time of bnarray, of copies and of who else is wanted in µs, after checking that all agree.

    Loosely: torch's float32 sums leave errors of 1e-2 in a feature of three million values (channels last).
    """
    import numpy as np

    timed = ours(case, step) | copies(case)
    if any("torch" in name for name in wanted):
        timed |= with_torch(case, step, wanted)
    if any("jax" in name for name in wanted):
        timed |= with_jax(case, step, wanted)
    if "onnxruntime" in wanted:
        timed |= with_onnxruntime(case, step, threads)
    if "formula" in wanted:
        timed |= formula(case, step)
    right = as_numpy(timed["bnarray"]())
    loose = 5e-2 if case.dtype == "bfloat16" else 2e-2
    for name, call in timed.items():
        if not name.startswith("copy"):
            np.testing.assert_allclose(as_numpy(call()), right, rtol=loose, atol=loose, err_msg=name)
        if hasattr(call, "checked"):
            call.checked = True
    times: dict[str, list[float]] = {name: [] for name in timed}
    end = time.perf_counter() + seconds
    order, shuffled = list(timed.items()), random.Random(0)
    while time.perf_counter() < end or len(times["bnarray"]) < 5:
        shuffled.shuffle(order)
        for name, call in order:
            times[name].append(turn(call))
    return {name: 1e6 * statistics.median(each) for name, each in times.items()}


def turn(call: Call) -> float:
    """Return the median time in seconds of calls after some that are not timed."""
    seconds: list[float] = []
    start = now = time.perf_counter()
    while now < start + WARM + TIMED or not seconds:
        call()
        begin, now = now, time.perf_counter()
        if begin >= start + WARM:
            seconds.append(now - begin)
    return statistics.median(seconds)


def limit(us: dict[str, float], step: str) -> float:
    """What a step must move at the speed of the fastest copy, in µs."""
    return min(us[name] for name in us if name.startswith("copy")) * STEPS[step] / 2


def best_peer(us: dict[str, float]) -> str:
    return min((name for name in PEERS if name in us), key=us.__getitem__)


def row_of(us: dict[str, float], step: str) -> dict[str, Any]:
    """The ratios of a row."""
    best = best_peer(us)
    return {
        "us": us,
        "best peer": best,
        "best peer / bnarray": us[best] / us["bnarray"],
        "bnarray out= / limit": us["bnarray out="] / limit(us, step),
    }


def run(options: argparse.Namespace, threads: int) -> None:
    """Measure in this process; print a line of JSON for each row."""
    # bnarray on a library's arrays where the library is a peer
    wanted = (*options.peers, *(name for name in OURS if name.split()[-1] in options.peers))
    if "torch" in options.peers:
        import torch

        torch.set_num_threads(threads)
    for shape in options.shapes:
        for channels_last in [False, True] if len(shape) > 3 else [False]:
            for dtype in options.dtypes:
                case = Case(shape, channels_last, dtype)
                for step in options.steps:
                    seconds = options.seconds * (1 if prod(shape) < 2**24 else 4)
                    us = measure(case, step, threads, wanted, seconds)
                    layout = "channels last" if channels_last or len(shape) == 2 else "channels first"
                    row = {"shape": shape, "layout": layout, "dtype": dtype, "step": step, "threads": threads}
                    print(json.dumps(row | row_of(us, step)), flush=True)


def table(rows: list[dict[str, Any]], peers: tuple[str, ...]) -> str:
    """Return the rows in Markdown."""
    columns = [*(name for name in OURS if any(name in row["us"] for row in rows)), *peers, "copy"]
    head = ["shape", "layout", "dtype", "step", "threads", *columns, "best peer / bnarray", "out= / limit"]
    lines = [head, ["---"] * len(head)]
    for row in rows:
        us = row["us"] | {"copy": min(row["us"][name] for name in row["us"] if name.startswith("copy"))}
        lines.append(
            [
                str(tuple(row["shape"])),
                *(str(row[name]) for name in ("layout", "dtype", "step", "threads")),
                *(f"{us[name]:.0f}" if name in us else "" for name in columns),
                f"{row['best peer / bnarray']:.2f} ({row['best peer']})",
                f"{row['bnarray out= / limit']:.2f}",
            ]
        )
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def picture(rows: list[dict[str, Any]], path: str) -> None:
    """Draw each contender's time as a multiple of the limit: a panel for each step, bars for each shape."""
    import matplotlib
    import matplotlib.pyplot as plt

    matplotlib.use("Agg")
    peers = [name for name in PEERS if name != "formula"]  # far to the right of all
    names = [name for name in ("bnarray out=", "bnarray", *peers) if any(name in row["us"] for row in rows)]
    steps = [step for step in STEPS if any(row["step"] == step for row in rows)]
    labels = list(dict.fromkeys((tuple(row["shape"]), row["layout"]) for row in rows))
    figure, panels = plt.subplots(1, len(steps), sharey=True, squeeze=False, layout="constrained")
    figure.set_size_inches(4.2 * len(steps), 0.8 + 0.13 * len(labels) * (len(names) + 1))
    colours = dict(zip(names, plt.get_cmap("tab10").colors, strict=False))
    for panel, step in zip(panels[0], steps, strict=True):
        for row in (row for row in rows if row["step"] == step):
            at = labels.index((tuple(row["shape"]), row["layout"])) * (len(names) + 1)
            least = limit(row["us"], step)
            for i, name in enumerate(names):
                if name in row["us"]:
                    panel.barh(at + i, row["us"][name] / least, height=1, color=colours[name])
        panel.margins(y=0.005)
        panel.axvline(1, color="black", linewidth=1)
        panel.set(title=step, xscale="log", xlabel="time / limit of the memory bus")
        panel.set_xticks([1, 2, 5, 10, 20, 50, 100], minor=False)
        panel.set_xticks([], minor=True)
        panel.xaxis.set_major_formatter("{x:g}")
    middle = (len(names) - 1) / 2
    panels[0, 0].set_yticks([i * (len(names) + 1) + middle for i in range(len(labels))])
    panels[0, 0].set_yticklabels([f"{'×'.join(map(str, shape))}\n{layout}" for shape, layout in labels], fontsize=8)
    panels[0, 0].invert_yaxis()
    handles = [plt.Rectangle((0, 0), 1, 1, color=colours[name], label=name) for name in names]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(names), frameon=False)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=1.0, help="for each row (default 1; 4 times that for large)")
    parser.add_argument("--threads", type=int, nargs="*", default=[1, 2])
    parser.add_argument("--shapes", type=lambda text: tuple(map(int, text.split(","))), nargs="*")
    parser.add_argument("--steps", nargs="*", default=list(STEPS), choices=list(STEPS))
    parser.add_argument("--dtypes", nargs="*", default=["float32", "bfloat16"])
    parser.add_argument("--peers", nargs="*", default=list(PEERS), choices=PEERS)
    parser.add_argument("--json", metavar="FILE", help="write the rows there too")
    parser.add_argument("--picture", metavar="FILE", help="draw the float32 rows of the most threads there")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="cuda: see benchmarks/cuda.py")
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.device == "cuda":
        options.shapes = options.shapes or cuda.SHAPES
        options.steps = [step for step in options.steps if step in cuda.STEPS]
        cuda.main(options)
        return
    options.shapes = options.shapes or SHAPES
    if options.worker is not None:
        run(options, options.worker)
        return
    rows = []
    for threads in options.threads:
        limits = {name: str(threads) for name in ("NUMBA_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS")}
        one = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1" if threads == 1 else ""
        command = [sys.executable, "-m", "benchmarks.compare", *sys.argv[1:], "--worker", str(threads)]
        with subprocess.Popen(
            command, env=os.environ | limits | {"XLA_FLAGS": one}, stdout=subprocess.PIPE, text=True
        ) as worker:
            assert worker.stdout is not None
            for line in worker.stdout:
                rows.append(json.loads(line))
                print(table(rows[-1:], options.peers).splitlines()[-1], flush=True)
        if worker.returncode:
            raise SystemExit(worker.returncode)
    print()
    print(table(rows, options.peers))
    if options.picture:
        drawn = [row for row in rows if row["dtype"] == "float32" and row["threads"] == max(options.threads)]
        picture(drawn, options.picture)
    if options.json:
        with open(options.json, "w") as file:
            file.write("[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n")


if __name__ == "__main__":
    main()
