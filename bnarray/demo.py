"""`bnarray demo`: batch normalization at work on handwritten digits, without a framework.

The network of the paper's first experiment (Ioffe and Szegedy 2015, section 4.1): three hidden layers of 100 sigmoid
units, weights drawn small and Gaussian, batches of 60, plain gradient descent; written by hand in NumPy, with or
without a `BatchNorm` before each sigmoid.
"""

import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import numpy.typing as npt
from sklearn.datasets import load_digits
from tqdm import tqdm

import bnarray as bn

Floats = npt.NDArray[np.float64]
Labels = npt.NDArray[np.int64]

HIDDEN = (100, 100, 100)
BATCH = 60
RATES = (0.1, 1.0, 10.0)
GOAL = 0.95
EVERY = 20  # steps between looks at the test set
PERCENTILES = (15, 50, 85)


@dataclass(frozen=True)
class Data:
    """Digits, features scaled to 0..1, split into training and test."""

    train_x: Floats
    train_t: Labels
    test_x: Floats
    test_t: Labels


def load() -> tuple[Floats, Data]:
    """Return the raw feature matrix, and the split data."""
    digits: Any = load_digits()
    raw = digits.data.astype(np.float64)
    order = np.random.default_rng(0).permutation(len(raw))
    x, t = raw[order] / 16, digits.target[order].astype(np.int64)
    tests = len(raw) // 5
    return raw, Data(x[tests:], t[tests:], x[:tests], t[:tests])


def sigmoid(z: Floats) -> Floats:
    return 1 / (1 + np.exp(-np.clip(z, -500, 500)))


class Network:
    """Fully connected layers with sigmoids and a softmax, and their gradients."""

    def __init__(self, normalized: bool, rng: np.random.Generator) -> None:
        sizes = (64, *HIDDEN, 10)
        self.matrices = [rng.normal(0, 0.1, (n_in, n_out)) for n_in, n_out in pairwise(sizes)]
        self.biases = [np.zeros(n_out) for n_out in sizes[1:]]
        self.norms = [bn.BatchNorm(size) for size in HIDDEN] if normalized else []
        self.inputs: list[Floats] = []

    def forward(self, x: Floats) -> Floats:
        """Return the logits; keep each layer's input for `step` and for a look at it."""
        self.inputs = [x]
        for i in range(len(HIDDEN)):
            z = self.inputs[-1] @ self.matrices[i] + self.biases[i]
            self.inputs.append(sigmoid(self.norms[i](z) if self.norms else z))
        return self.inputs[-1] @ self.matrices[-1] + self.biases[-1]

    def step(self, x: Floats, t: Labels, rate: float) -> None:
        """Take one step of gradient descent on the mean cross-entropy of a batch."""
        logits = self.forward(x)
        p = np.exp(logits - logits.max(axis=1, keepdims=True))
        p /= p.sum(axis=1, keepdims=True)
        p[np.arange(len(t)), t] -= 1
        gradient = p / len(t)
        for i in reversed(range(len(self.matrices))):
            a = self.inputs[i]
            below = gradient @ self.matrices[i].T
            self.matrices[i] -= rate * (a.T @ gradient)
            self.biases[i] -= rate * gradient.sum(axis=0)
            if i:
                gradient = below * a * (1 - a)
                if self.norms:
                    gradient = self.norms[i - 1].backward(gradient)
        for norm in self.norms:
            for parameter, slope in zip(norm.parameters(), norm.gradients(), strict=True):
                parameter -= rate * slope
            norm.zero_grad()

    def predict(self, x: Floats) -> Labels:
        for norm in self.norms:
            norm.eval()
        logits = self.forward(x)
        for norm in self.norms:
            norm.train()
        labels: Labels = np.argmax(logits, axis=1)
        return labels


@dataclass
class Run:
    """One training: accuracy on the test set and a unit's activation there, over the steps."""

    normalized: bool
    rate: float
    seed: int
    steps: list[int] = field(default_factory=list)
    accuracy: list[float] = field(default_factory=list)
    activation: list[Floats] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def steps_to_goal(self) -> int | None:
        return next((step for step, a in zip(self.steps, self.accuracy, strict=True) if a >= GOAL), None)


def train(data: Data, normalized: bool, rate: float, seed: int, steps: int, tick: Any) -> Run:
    """Train one network from scratch."""
    rng = np.random.default_rng(seed)
    network, run = Network(normalized, rng), Run(normalized, rate, seed)
    for step, chosen in zip(range(1, steps + 1), _batches(len(data.train_x), rng), strict=False):
        begin = time.perf_counter()
        network.step(data.train_x[chosen], data.train_t[chosen], rate)
        run.seconds += time.perf_counter() - begin
        if step % EVERY == 0 or step == steps:
            run.steps.append(step)
            run.accuracy.append(float((network.predict(data.test_x) == data.test_t).mean()))
            run.activation.append(np.percentile(network.inputs[-1][:, 0], PERCENTILES))
        tick()
    return run


def _batches(examples: int, rng: np.random.Generator) -> Iterator[npt.NDArray[np.int64]]:
    while True:
        order = rng.permutation(examples)
        for first in range(0, examples - BATCH + 1, BATCH):
            yield order[first : first + BATCH]


def show_features(raw: Floats) -> None:
    """Normalise the feature matrix directly, and print what that does to some features."""
    before, after = bn.moments(raw), bn.moments(bn.batch_norm(raw))
    spread, spread_after = np.sqrt(before.var()), np.sqrt(after.var())
    varies = spread > 0
    print(f"1. Handwritten digits: {raw.shape[0]} images of {raw.shape[1]} pixels (features)\n", flush=True)
    print(f"   {'':17} | {'mean':^15} | {'deviation':^15}")
    print(f"   {'feature (pixel)':17} | {'before':>7} {'after':>7} | {'before':>7} {'after':>7}")
    by_mean = np.argsort(before.mean)
    for c in by_mean[:: len(by_mean) // 8]:
        print(
            f"   row {c // 8}, column {c % 8:<3} | {before.mean[c]:7.2f} {after.mean[c]:7.2f} "
            f"| {spread[c]:7.2f} {spread_after[c]:7.2f}"
        )
    print(
        f"   Over all features: means from {before.mean.min():.2f} to {before.mean.max():.2f} before, "
        f"{abs(after.mean).max():.0e} at most after;\n"
        f"   deviations from {spread[varies].min():.2f} to {spread.max():.2f} before, "
        f"{spread_after[varies].min():.2f} to {spread_after.max():.2f} after "
        f"(and 0 for the {int((~varies).sum())} pixels that are always blank).\n"
    )


def _spread(values: list[float], digits: int) -> str:
    mean = f"{np.mean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {np.std(values, ddof=1):.{digits}f}"


def show_table(runs: list[Run], seeds: int) -> None:
    """Print how fast and how well each network learned."""
    print(
        f"2. Three hidden layers of 100 sigmoid units, batches of {BATCH}, {seeds} seed(s); accuracy on the test set\n"
    )
    print(f"   {'rate':>5} | {'batch norm':<10} | {'steps to 95 %':>21} | {'final accuracy':>15} | {'seconds':>12}")
    for rate in RATES:
        for normalized in (False, True):
            chosen = [run for run in runs if run.rate == rate and run.normalized == normalized]
            reached = [float(run.steps_to_goal) for run in chosen if run.steps_to_goal is not None]
            goal = _spread(reached, 0) if reached else "never"
            if reached and len(reached) < len(chosen):
                goal += f" ({len(reached)} of {len(chosen)})"
            final = _spread([run.accuracy[-1] for run in chosen], 3)
            seconds = _spread([run.seconds for run in chosen], 1)
            print(
                f"   {rate:>5g} | {'with' if normalized else 'without':<10} | {goal:>21} | {final:>15} | {seconds:>12}"
            )
    print()


def draw(runs: list[Run], path: Path) -> None:
    """Write the picture: accuracy over steps, and a typical activation's percentiles, with and without."""
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(13, 4.4), layout="constrained")
    colors = dict(zip(RATES, ("#0072b2", "#d55e00", "#009e73"), strict=True))
    first = [run for run in runs if run.seed == runs[0].seed]
    for run in first:
        name = f"rate {run.rate:g}, {'with' if run.normalized else 'without'}"
        style = "-" if run.normalized else ":"
        axes[0].plot(run.steps, run.accuracy, style, color=colors[run.rate], label=name)
    axes[0].axhline(GOAL, color="grey", linewidth=0.8)
    axes[0].set(title="Accuracy on the test set", xlabel="step (log)", xscale="log", ylim=(0, 1.02))
    figure.legend(loc="outside lower center", ncols=len(first))
    for axis, normalized in zip(axes[1:], (False, True), strict=True):
        run = next(run for run in first if run.rate == RATES[0] and run.normalized == normalized)
        low, middle, high = np.transpose(run.activation)
        axis.fill_between(run.steps, low, high, alpha=0.3, color=colors[RATES[0]])
        axis.plot(run.steps, middle, color=colors[RATES[0]])
        which = "with" if normalized else "without"
        axis.set(title=f"A unit of the last hidden layer, {which}", xlabel="step", ylim=(0, 1))
        axis.set_ylabel(f"activation: {PERCENTILES[0]}, 50, {PERCENTILES[-1]}th percentile (rate {RATES[0]:g})")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def run(seeds: int = 1, steps: int = 7000, folder: str = "bnarray-demo") -> None:
    """Run the whole demo; see the module."""
    begin = time.perf_counter()
    place = Path(folder)
    place.mkdir(parents=True, exist_ok=True)
    raw, data = load()
    show_features(raw)
    runs = []
    total = seeds * len(RATES) * 2 * steps
    with tqdm(total=total, unit=" steps", disable=not sys.stderr.isatty(), leave=False) as bar:
        for seed in range(seeds):
            for rate in RATES:
                for normalized in (False, True):
                    bar.set_description(f"rate {rate:g}, {'with' if normalized else 'without'} batch norm")
                    runs.append(train(data, normalized, rate, seed, steps, bar.update))
    show_table(runs, seeds)
    picture = place / "demo.png"
    draw(runs, picture)
    print(f"   picture: {picture}   ({time.perf_counter() - begin:.0f} s in all)")
