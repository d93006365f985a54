"""What the paper claims, tried on handwritten digits: ``python docs/claims.py --seeds 5``.

Prints the tables of docs/claims.md and draws docs/figures/claims.svg: accuracy on the test set after a number of steps,
with and without batch normalization, over learning rates, scales of the first weights, and sizes of batches. The
network is the demo's: three hidden layers of 100 sigmoid units (Ioffe and Szegedy 2015, section 4.1).
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

import draw
import matplotlib.pyplot as plt
import numpy as np

from bnarray.demo import Data, Network, load

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


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--picture", type=Path, default=draw.DOCS / "figures" / "claims.svg")
    options = parser.parse_args()
    _, data = load()
    draw.use_style()
    figure, axes = plt.subplots(3, 1, figsize=(5.4, 7.5), sharey=True)
    figure.suptitle(f"Accuracy on the test set after {options.steps} steps")
    for axis, (what, values, settings) in zip(
        axes,
        (
            ("learning rate", RATES, [(rate, SCALE, BATCH) for rate in RATES]),
            ("deviation of the first weights", SCALES, [(RATE, scale, BATCH) for scale in SCALES]),
            ("examples in a batch", BATCHES, [(RATE, WIDE, size) for size in BATCHES]),
        ),
        strict=True,
    ):
        found = sweep(data, settings, options.seeds, options.steps)
        show(what, values, found)
        for each, label, style in zip(found, ("without", "with batch normalization"), ("o:", "o-"), strict=True):
            axis.plot(values, each.mean(axis=1), style, label=label)
            axis.fill_between(values, each.min(axis=1), each.max(axis=1), alpha=0.2)
        axis.set(xscale="log", xlabel=what, ylim=(0, 1.02))
    axes[0].legend(loc="lower left")
    draw.save(figure, options.picture)


if __name__ == "__main__":
    main()
