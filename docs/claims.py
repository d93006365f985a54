"""What the paper claims, tried on handwritten digits: ``python docs/claims.py --seeds 5``.

Prints tables of docs/claims.md and draws its pictures, docs/figures/claims-*.svg: accuracy on the test set after a
number of steps, with and without batch normalization, over learning rates, scales of the first weights, and sizes of
batches; and one seed's training as `bnarray demo` does it. The network is the demo's: three hidden layers of 100
sigmoid units (Ioffe and Szegedy 2015, section 4.1).
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

import draw
import matplotlib.pyplot as plt
import numpy as np

from bnarray.demo import GOAL, PERCENTILES, Data, Network, load, train
from bnarray.demo import RATES as DEMO_RATES

RATES = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)
SCALES = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
BATCHES = (2, 3, 4, 8, 16, 60, 240)
RATE, SCALE, BATCH = 0.3, 0.1, 60  # where they are not what varies
WIDE = 0.3  # the scale for batches: one from which the network learns without, too

Setting = tuple[float, float, int]  # rate, scale, batch


def batches(examples: int, size: int, rng: np.random.Generator) -> Iterator[np.ndarray]:
    while True:
        order = rng.permutation(examples)
        for first in range(0, examples - size + 1, size):
            yield order[first : first + size]


def accuracy(data: Data, normalized: bool, setting: Setting, seed: int, steps: int) -> float:
    """Train a network, and return its accuracy on the test set, evaluated by running statistics."""
    rate, scale, size = setting
    rng = np.random.default_rng(seed)
    network = Network(normalized, rng)
    network.matrices = [matrix * (scale / 0.1) for matrix in network.matrices]  # which it draws with deviation 0.1
    for _, chosen in zip(range(steps), batches(len(data.train_x), size, rng), strict=False):
        network.step(data.train_x[chosen], data.train_t[chosen], rate)
    return float((network.predict(data.test_x) == data.test_t).mean())


def sweep(data: Data, settings: list[Setting], seeds: int, steps: int) -> np.ndarray:
    """Return accuracies: without and with, by setting, by seed."""
    return np.array(
        [
            [[accuracy(data, normalized, setting, seed, steps) for seed in range(seeds)] for setting in settings]
            for normalized in (False, True)
        ]
    )


def show(what: str, values: tuple[float, ...], found: np.ndarray) -> None:
    print(f"\n| {what} | without | with |\n|---|---|---|", flush=True)
    for value, without, normalized in zip(values, *found, strict=True):
        cells = (
            f"{each.mean():.3f} ± {each.std(ddof=1) if each.size > 1 else 0:.3f}" for each in (without, normalized)
        )
        print(f"| {value:g} | {' | '.join(cells)} |", flush=True)


def draw_sweeps(data: Data, seeds: int, steps: int, path: Path) -> None:
    """Print and draw accuracies over what is varied."""
    figure, axes = plt.subplots(3, 1, figsize=(5.4, 7.5), sharey=True)
    figure.suptitle(f"Accuracy on the test set after {steps} steps")
    for axis, (what, values, settings) in zip(
        axes,
        (
            ("learning rate", RATES, [(rate, SCALE, BATCH) for rate in RATES]),
            ("deviation of the first weights", SCALES, [(RATE, scale, BATCH) for scale in SCALES]),
            ("examples in a batch", BATCHES, [(RATE, WIDE, size) for size in BATCHES]),
        ),
        strict=True,
    ):
        found = sweep(data, settings, seeds, steps)
        show(what, values, found)
        for each, label, style in zip(found, ("without", "with batch normalization"), ("o:", "o-"), strict=True):
            axis.plot(values, each.mean(axis=1), style, label=label)
            axis.fill_between(values, each.min(axis=1), each.max(axis=1), alpha=0.2)
        axis.set(xscale="log", xlabel=what, ylim=(0, 1.02))
    axes[1].legend(loc="center left")
    draw.save(figure, path)


def draw_training(data: Data, steps: int, path: Path) -> None:
    """Draw what the demo draws: accuracy over the steps, and a unit's activation with and without."""
    figure, axes = plt.subplots(3, 1, figsize=(5.4, 7.5))
    for color, rate in zip(draw.COLORS, DEMO_RATES, strict=False):
        for normalized, style in ((False, ":"), (True, "-")):
            run = train(data, normalized, rate, 0, steps, lambda: None)
            axes[0].plot(run.steps, run.accuracy, style, color=color, label="" if not normalized else f"rate {rate:g}")
            if rate == DEMO_RATES[0]:
                low, middle, high = np.transpose(run.activation)
                axes[1 + normalized].fill_between(run.steps, low, high, alpha=0.3)
                axes[1 + normalized].plot(run.steps, middle)
    axes[0].axhline(GOAL, color="#888888", linewidth=0.8)
    axes[0].set(
        title="Accuracy on the test set, without (dotted) and with", xlabel="step", xscale="log", ylim=(0, 1.02)
    )
    axes[0].legend(loc=(0.22, 0.35))
    for axis, which in zip(axes[1:], ("without", "with"), strict=True):
        axis.set(title=f"A unit of the last hidden layer, {which} (rate {DEMO_RATES[0]:g})", xlabel="step", ylim=(0, 1))
        axis.set_ylabel(f"{PERCENTILES[0]}, 50, {PERCENTILES[-1]}th percentile")
    draw.save(figure, path)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--demo-steps", type=int, default=7000)
    parser.add_argument("--out", type=Path, default=draw.DOCS / "figures", metavar="FOLDER")
    options = parser.parse_args()
    _, data = load()
    draw.use_style()
    draw_sweeps(data, options.seeds, options.steps, options.out / "claims-sweeps.svg")
    draw_training(data, options.demo_steps, options.out / "claims-training.svg")


if __name__ == "__main__":
    main()
