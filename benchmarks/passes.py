"""Time of the passes over large arrays: library × shape × layout × dtype × threads."""

from typing import Any

from benchmarks import parameters


class _Pass:
    """A step of `benchmarks.compare`, through bnarray alone."""

    params = [parameters.LIBRARIES, parameters.SHAPES, parameters.LAYOUTS, parameters.DTYPES, parameters.THREADS]
    param_names = parameters.NAMES
    repeat = (5, 50, 0.5)
    step = ""

    def setup(self, *row: Any) -> None:
        self.call = parameters.checked_call(self.step, *row)


class Forward(_Pass):
    """A training step's forward pass, with running statistics."""

    step = "training"

    def time_forward(self, *_: Any) -> None:
        self.call()


class Evaluation(_Pass):
    step = "evaluation"

    def time_evaluation(self, *_: Any) -> None:
        self.call()


class Backward(_Pass):
    step = "backward"

    def time_backward(self, *_: Any) -> None:
        self.call()


class Both(_Pass):
    """Forward and backward, as the library differentiates them."""

    step = "both"

    def time_both(self, *_: Any) -> None:
        self.call()
