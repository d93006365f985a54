"""The order of a pass's steps, for arrays that are known to fit together.

The public functions follow it, and so do the operations by which a library differentiates or compiles. Per-feature
vectors come and go in the verbs' own form (`vector`).
"""

from collections.abc import Callable
from typing import Any, TypeAlias

from bnarray.dispatch import Array, Transform, Verbs
from bnarray.layout import features_shape

Statistics: TypeAlias = tuple[Any, Array, Array]  # count, mean, m2


def _decide_nothing(count: Any, mean: Array, m2: Array) -> None: ...


def moments(verbs: Verbs, x: Array, kept: tuple[int, ...], where: Array | None) -> Statistics:
    """Return the batch's statistics; zeros for an empty array."""
    if 0 in x.shape:
        nothing = verbs.vector(verbs.zeros(features_shape(x.shape, kept), x), x)
        return 0, nothing, nothing
    return verbs.moments(x, kept, where)  # type: ignore[no-any-return]  # a verb


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
) -> tuple[Array, Transform]:
    """Return (y, what was done to x), by the batch's own statistics or by given ones.

    `decide` hears of the batch's before anything is written that somebody may see, and raises if they will not do.
    """
    y = None
    if given is None:
        batch = None
        if out is None and residual is None and where is None and 0 not in x.shape:
            # All in one go, because it goes into memory that nobody has seen yet.
            batch = verbs.forward(x, kept, eps, weight, bias, relu)
        count, mean, m2, y = batch or (*moments(verbs, x, kept, where), None)
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
) -> tuple[Array, Array, Array, Array | None]:
    """Return the gradients (dx, dweight, dbias) and, with a residual under ReLU, the residual's.

    `is_constant` tells whether the statistics were given, not the batch's own.
    """
    if 0 in x.shape:
        nothing = verbs.vector(verbs.zeros(features_shape(x.shape, transform.kept), x), x)
        dresidual = None if transform.residual is None else verbs.empty_like(x)
        return (verbs.empty_like(x) if out is None else out), nothing, nothing, dresidual
    gradients = verbs.backward(dy, x, transform, where, is_constant, out)
    if gradients is not None:
        return gradients  # type: ignore[no-any-return]  # a verb
    sum_dz, sum_dz_x = verbs.grad_sums(dy, x, transform)
    dx, dz = verbs.grad_input(dy, x, transform, where, None if is_constant else (sum_dz, sum_dz_x), out)
    return dx, sum_dz_x, sum_dz, dz
