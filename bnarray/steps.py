"""The order of a pass's steps, for arrays that are known to fit together.

The public functions follow it, and so do the operations by which a library differentiates or compiles. Per-feature
vectors come and go in the verbs' own form (`vector`).
"""

from collections.abc import Callable
from typing import Any, Protocol, TypeAlias

from bnarray.dispatch import Array, Transform, Verbs
from bnarray.layout import features_shape

Statistics: TypeAlias = tuple[Any, Array, Array]  # count, mean, m2


class Exchange(Protocol):
    """How the members of a group make one batch of theirs: between the verbs, in vectors."""

    def merge(self, verbs: Verbs, x: Array, statistics: Statistics) -> Statistics: ...

    def add(self, verbs: Verbs, x: Array, sums: tuple[Array, Array]) -> tuple[Array, Array]: ...


def _decide_nothing(count: Any, mean: Array, m2: Array) -> None: ...


def _nothing(verbs: Verbs, x: Array, kept: tuple[int, ...]) -> Array:
    return verbs.vector(verbs.zeros(features_shape(x.shape, kept), x), x)


def moments(
    verbs: Verbs, x: Array, kept: tuple[int, ...], where: Array | None, exchange: Exchange | None = None
) -> Statistics:
    """Return the batch's statistics, a group's if there is one; zeros for an empty array."""
    if 0 in x.shape:
        nothing = _nothing(verbs, x, kept)
        statistics = 0, nothing, nothing
    else:
        statistics = verbs.moments(x, kept, where)
    return statistics if exchange is None else exchange.merge(verbs, x, statistics)


def forward(
    verbs: Verbs,
    x: Array,
    weight: Array | None,
    bias: Array | None,
    residual: Array | None,
    where: Array | None,
    given: Statistics | None,
    kept: tuple[int, ...],
    eps: float,
    relu: bool,
    out: Array | None = None,
    decide: Callable[[Any, Array, Array], None] = _decide_nothing,
    exchange: Exchange | None = None,
    *,
    is_sure: bool = False,
) -> tuple[Array, Transform]:
    """Return (y, what was done to x), by the batch's own statistics or by given ones.

    `decide` hears of the batch's before anything is written that somebody may see, and raises if they will not do;
    unless it `is_sure` that they will, whatever they are, and that out is no part of x.
    """
    y = None
    if given is None:
        batch = None
        is_plain = residual is None and where is None and exchange is None and 0 not in x.shape
        if is_plain and (out is None or is_sure):
            batch = verbs.forward(x, kept, eps, weight, bias, relu, out)
        count, mean, m2, y = batch or (*moments(verbs, x, kept, where, exchange), None)
        given = count, mean, m2
        decide(count, mean, m2)
    transform = Transform(kept, *given, eps, weight, bias, relu, residual)
    if 0 in x.shape:
        y = verbs.empty_like(x) if out is None else out
    elif y is None:
        y = verbs.normalize(x, transform, out)
    return y, transform


def backward(
    verbs: Verbs,
    dy: Array,
    x: Array,
    transform: Transform,
    where: Array | None,
    is_constant: bool,
    out: Array | None = None,
    exchange: Exchange | None = None,
) -> tuple[Array, Array, Array, Array | None]:
    """Return the gradients (dx, dweight, dbias) and, with a residual under ReLU, the residual's.

    `is_constant` tells whether the statistics were given, not the batch's own.
    """
    is_empty = 0 in x.shape
    if exchange is None and not is_empty:
        gradients = verbs.backward(dy, x, transform, where, is_constant, out)
        if gradients is not None:
            return gradients  # type: ignore[no-any-return]  # a verb
    own = (_nothing(verbs, x, transform.kept),) * 2 if is_empty else verbs.grad_sums(dy, x, transform)
    sums = own if exchange is None else exchange.add(verbs, x, own)
    if is_empty:
        dx, dz = (
            verbs.empty_like(x) if out is None else out,
            None if transform.residual is None else verbs.empty_like(x),
        )
    else:
        dx, dz = verbs.grad_input(dy, x, transform, where, None if is_constant else sums, out)
    return dx, own[1], own[0], dz
