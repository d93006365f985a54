"""What a call costs on a small array, where most of it is the way to the loops: ``python -m benchmarks.calls``.

bnarray on NumPy arrays and on torch tensors, and torch: the contenders in turn, as `benchmarks.compare` has them,
medians of several rounds.
"""

import statistics
from collections.abc import Callable
from typing import Any

from benchmarks.compare import turn

Calls = dict[str, dict[str, Callable[[], Any]]]
SHAPES = [(32, 64), (64, 100)]
ROUNDS = 15
CONTENDERS = ("bnarray, NumPy", "bnarray, torch", "torch")


def _backward(make: Callable[..., Any], inputs: list[Any], dy: Any) -> Callable[[], Any]:
    import torch

    return lambda: torch.autograd.grad(make(*inputs), inputs, dy)


def _both(layer: Any, x: Any, dy: Any) -> Callable[[], Any]:
    def both() -> Any:
        layer.forward(x)
        return layer.backward(dy)

    return both


def calls(shape: tuple[int, int]) -> Calls:
    """Return every step's call by contender."""
    import numpy as np
    import torch

    import bnarray as bn
    from bnarray.torch import BatchNorm1d

    rng = np.random.default_rng(0)
    x, dy = rng.normal(size=(2, *shape)).astype(np.float32)
    weight, bias = rng.normal(size=(2, shape[1])).astype(np.float32)
    mean, var = np.zeros(shape[1], np.float32), np.ones(shape[1], np.float32)
    stats = bn.RunningStats(shape[1])
    tx, tdy, tw, tb, tmean, tvar = (torch.from_numpy(each) for each in (x, dy, weight, bias, mean, var))
    layer = bn.BatchNorm(shape[1])
    followed = [each.clone().requires_grad_() for each in (tx, tw, tb)]
    ours, theirs = BatchNorm1d(shape[1]), torch.nn.BatchNorm1d(shape[1])
    function = torch.nn.functional.batch_norm
    first, second, third = CONTENDERS
    return {
        "training, updating statistics": {
            first: lambda: bn.batch_norm(x, weight, bias, stats=stats),
            second: lambda: bn.batch_norm(tx, tw, tb, stats=stats),
            third: lambda: function(tx, tmean, tvar, tw, tb, training=True),
        },
        "training": {
            first: lambda: bn.batch_norm(x, weight, bias),
            second: lambda: bn.batch_norm(tx, tw, tb),
            third: lambda: function(tx, None, None, tw, tb, training=True),
        },
        "evaluation": {
            first: lambda: bn.batch_norm(x, weight, bias, stats=stats, training=False),
            second: lambda: bn.batch_norm(tx, tw, tb, stats=stats, training=False),
            third: lambda: function(tx, tmean, tvar, tw, tb),
        },
        "forward and backward": {
            first: lambda: bn.batch_norm_backward(dy, bn.batch_norm_forward(x, weight, bias)[1]),
            second: _backward(bn.batch_norm, followed, tdy),
            third: _backward(lambda x, w, b: function(x, None, None, w, b, training=True), followed, tdy),
        },
        "layer, forward and backward": {
            first: _both(layer, x, dy),
            second: _backward(lambda x, *_: ours(x), [followed[0], *ours.parameters()], tdy),
            third: _backward(lambda x, *_: theirs(x), [followed[0], *theirs.parameters()], tdy),
        },
    }


def main() -> None:
    import torch

    torch.set_num_threads(2)
    print("| shape | call | " + " | ".join(f"{name}, µs" for name in CONTENDERS) + " |")
    print("|---" * (2 + len(CONTENDERS)) + "|")
    for shape in SHAPES:
        for step, contenders in calls(shape).items():
            rounds = [{name: turn(call) for name, call in contenders.items()} for _ in range(ROUNDS)]
            us = [1e6 * statistics.median(each[name] for each in rounds) for name in CONTENDERS]
            print(f"| {shape} | {step} | " + " | ".join(f"{each:.1f}" for each in us) + " |", flush=True)


if __name__ == "__main__":
    main()
