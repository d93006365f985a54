"""What batch normalization takes within a network of torch's: ``python -m benchmarks.network``.

A small convolutional network trains and predicts with torch's modules, with bnarray's, and with none; they take turns.
Alone a call finds its array in the cache and all cores free. Here convolutions come before it, and their threads look
out for the next.
"""

import argparse
import copy
import statistics
import time
from collections.abc import Callable
from typing import Any

import numba

CHANNELS = ((3, 32, 1), (32, 64, 2), (64, 64, 1), (64, 128, 2), (128, 128, 1))  # in, out, stride
MODULES = ("none", "torch", "bnarray")


def network(normalized: bool) -> Any:
    from torch import nn

    layers: list[nn.Module] = []
    for before, after, stride in CHANNELS:
        layers.append(nn.Conv2d(before, after, 3, stride, 1, bias=False))
        layers += [nn.BatchNorm2d(after)] if normalized else []
        layers.append(nn.ReLU())
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(CHANNELS[-1][1], 10))


def steps(memory_format: Any, training: bool) -> dict[str, Callable[[], None]]:
    """Return a step of the network with each kind of module."""
    import torch

    from bnarray.torch import convert

    x = torch.randn(32, 3, 64, 64).contiguous(memory_format=memory_format)
    labels = torch.arange(32) % 10
    by_torch = network(True)
    networks = dict(zip(MODULES, (network(False), by_torch, convert(copy.deepcopy(by_torch))), strict=True))

    def step(model: torch.nn.Module) -> Callable[[], None]:
        model.to(memory_format=memory_format).train(training)

        def train() -> None:
            model.zero_grad(set_to_none=True)
            torch.nn.functional.cross_entropy(model(x), labels).backward()

        return train if training else torch.no_grad()(lambda: model(x))

    return {name: step(model) for name, model in networks.items()}


def measure(turns: dict[str, Callable[[], None]], rounds: int) -> dict[str, float]:
    """Return the median of each in ms."""
    seconds: dict[str, list[float]] = {name: [] for name in turns}
    for _ in range(rounds):
        for name, call in turns.items():
            call()
            for _ in range(4):
                begin = time.perf_counter()
                call()
                seconds[name].append(time.perf_counter() - begin)
    return {name: 1e3 * statistics.median(each) for name, each in seconds.items()}


def main() -> None:
    import torch

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=30)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    numba.set_num_threads(options.threads)
    print("| memory format | step | without | torch's modules | bnarray's | normalization: ours / torch's |")
    print("|---|---|---|---|---|---|")
    for name, memory_format in (("channels first", torch.contiguous_format), ("channels last", torch.channels_last)):
        for step, training in (("training", True), ("evaluation", False)):
            ms = measure(steps(memory_format, training), options.rounds)
            ratio = (ms["bnarray"] - ms["none"]) / (ms["torch"] - ms["none"])
            cells = " | ".join(f"{ms[kind]:.1f}" for kind in MODULES)
            print(f"| {name} | {step} | {cells} | {ratio:.2f} |", flush=True)


if __name__ == "__main__":
    main()
