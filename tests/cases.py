"""The table of cases: shape × axis × layout × dtype × options."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import ml_dtypes
import numpy as np
import pytest

DTYPES = {
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float32": np.dtype(np.float32),
    "float64": np.dtype(np.float64),
}


def _unaligned(x: np.ndarray) -> np.ndarray:
    buffer = np.zeros(x.nbytes + 1, np.uint8)
    y = buffer[1:].view(x.dtype).reshape(x.shape)
    y[...] = x
    return y


def _sliced(x: np.ndarray) -> np.ndarray:
    big = np.zeros([2 * size + 1 for size in x.shape], x.dtype)
    y = big[tuple(slice(1, None, 2) for _ in x.shape)]
    y[...] = x
    return y


def _channels_last(x: np.ndarray) -> np.ndarray:
    """The same axes, with axis 1 the fastest in memory."""
    return (
        np.ascontiguousarray(np.moveaxis(x, 1, -1)).swapaxes(-1, 1)
        if x.ndim == 2
        else (np.moveaxis(np.ascontiguousarray(np.moveaxis(x, 1, -1)), -1, 1))
    )


def _read_only(x: np.ndarray) -> np.ndarray:
    y = x.copy()
    y.flags.writeable = False
    return y


def _broadcast(x: np.ndarray) -> np.ndarray:
    """Axis 0 repeats its first element (stride 0)."""
    return np.broadcast_to(x[:1], x.shape)


def _transposed(x: np.ndarray) -> np.ndarray:
    """Axes in some other order in memory."""
    order = np.random.default_rng(x.ndim).permutation(x.ndim)
    return np.ascontiguousarray(x.transpose(order)).transpose(np.argsort(order))


#: Each makes an array of the same values (but `broadcast`) in another memory layout.
LAYOUTS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "c": np.ascontiguousarray,
    "fortran": np.asfortranarray,
    "channels_last": _channels_last,
    "sliced": _sliced,
    "reversed": lambda x: np.ascontiguousarray(np.flip(x))[tuple(slice(None, None, -1) for _ in x.shape)],
    "transposed": _transposed,
    "read_only": _read_only,
    "unaligned": _unaligned,
    "broadcast": _broadcast,
}

#: Shape and kept axes, odd on purpose; the last ones are longer than a tile, or than a piece of work.
SHAPES: list[tuple[tuple[int, ...], tuple[int, ...]]] = [
    ((7, 5), (1,)),
    ((7, 5), (0,)),
    ((33, 70), (1,)),
    ((1, 9), (1,)),
    ((9, 1), (1,)),
    ((4, 3, 6), (1,)),
    ((4, 3, 6), (2,)),
    ((4, 3, 6), (0, 2)),
    ((4, 3, 6), ()),
    ((2, 3, 4, 5), (1,)),
    ((2, 3, 4, 5), (3,)),
    ((2, 3, 4, 5), (1, 3)),
    ((2, 3, 4, 5), (0, 1, 2, 3)),
    ((3, 17, 1, 11), (1, 2)),
    ((2, 2, 3, 2, 3), (1,)),
    ((2, 4, 1, 2, 2, 3), (1, 4)),
    ((2, 3, 70, 71), (1,)),
    ((700, 12), (1,)),
    ((3, 1500), (1,)),
    ((300, 2, 40), (1,)),
]


@dataclass(frozen=True)
class Options:
    """What a call is given besides x; arrays are drawn for the case."""

    name: str
    affine: bool = False
    where: str | None = None  # "mask" or "weights", then which axes it has: sample, position, feature, full
    relu: bool = False
    residual: bool = False
    evaluate: bool = False
    eps: float = 1e-5


OPTIONS = [
    Options("plain"),
    Options("affine", affine=True),
    Options("relu", affine=True, relu=True),
    Options("residual", affine=True, residual=True),
    Options("residual_relu", affine=True, residual=True, relu=True),
    Options("evaluate", affine=True, evaluate=True),
    Options("evaluate_residual_relu", affine=True, evaluate=True, residual=True, relu=True),
    Options("mask_sample", affine=True, where="mask sample"),
    Options("mask_position", where="mask position"),
    Options("mask_full", affine=True, where="mask full"),
    Options("weights_sample", where="weights sample"),
    Options("weights_feature", affine=True, where="weights feature"),
    Options("weights_full_relu", affine=True, where="weights full", relu=True, residual=True),
]


@dataclass
class Drawn:
    """A case with its arrays."""

    x: np.ndarray
    dy: np.ndarray
    kept: tuple[int, ...]
    call: dict[str, Any] = field(default_factory=dict)  # weight, bias, where, residual, eps
    relu: bool = False
    statistics: tuple[np.ndarray, np.ndarray] | None = None  # mean and var for evaluation


def draw(
    shape: tuple[int, ...], kept: tuple[int, ...], layout: str, dtype: str, options: Options, seed: int = 0
) -> Drawn:
    """Draw the arrays of a case; x, dy and the residual have different strides where the layout allows."""
    rng = np.random.default_rng(seed)
    features = tuple(shape[i] for i in kept)
    along = tuple(size if i in kept else 1 for i, size in enumerate(shape))
    spread = rng.uniform(0.5, 3, along)
    x = LAYOUTS[layout]((rng.normal(0, 1, shape) * spread + rng.normal(0, 3, along)).astype(DTYPES[dtype]))
    dy = rng.normal(0, 1, shape).astype(DTYPES[dtype])
    case = Drawn(x, dy if seed % 2 else LAYOUTS[layout](dy), kept, {"eps": options.eps}, options.relu)
    if options.affine:
        case.call["weight"] = rng.normal(0, 1, features).astype(np.float32)
        case.call["bias"] = rng.normal(0, 1, features)
    if options.residual:
        case.call["residual"] = np.asfortranarray(rng.normal(0, 1, shape).astype(DTYPES[dtype]))
    if options.evaluate:
        case.statistics = rng.normal(0, 3, features), rng.uniform(0.2, 5, features)
    if options.where:
        kind, which = options.where.split()
        axes = {
            "sample": [0],
            "position": [i for i in range(len(shape)) if i not in kept],
            "feature": list(kept),
            "full": list(range(len(shape))),
        }[which]
        of = tuple(size if i in axes else 1 for i, size in enumerate(shape))
        mask = rng.random(of) < 0.7
        case.call["where"] = mask if kind == "mask" else (mask * rng.uniform(0.1, 2, of)).astype(np.float32)
    return case


def table() -> list[Any]:
    """Every shape in every layout and dtype; the options take turns, so that each meets all of them."""
    cases, turn = [], 0
    for shape, kept in SHAPES:
        for layout in LAYOUTS:
            for dtype in DTYPES:
                for options in OPTIONS[turn % 3 :: 3]:
                    name = f"{'x'.join(map(str, shape))}-keep{''.join(map(str, kept))}-{layout}-{dtype}-{options.name}"
                    cases.append(pytest.param(shape, kept, layout, dtype, options, id=name))
                turn += 1
    return cases
