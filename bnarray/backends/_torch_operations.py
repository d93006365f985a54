"""Operations that torch differentiates and compiles.

Two shapes of one thing: an `autograd.Function` for eager calls, and custom operators for calls that are compiled,
exported or traced (which see no Python; an operator costs an eager call some 30 µs more). Derivatives of derivatives
are those of the formula in torch's own functions.
"""

from collections.abc import Callable, Sequence
from functools import partial
from math import prod
from typing import Any, NamedTuple

import torch

from bnarray import steps
from bnarray.backends import _torch_tensors as verbs
from bnarray.backends._again import Training, Vectors
from bnarray.backends.generic import plain
from bnarray.dispatch import Transform, backend
from bnarray.kernels.merge import NOTHING
from bnarray.layout import along_features, features_shape, varies_along
from bnarray.stats import RunningStats, is_number, state_of

Tensor = torch.Tensor


def _vector(of_features: Tensor | None, x: Tensor) -> Any:
    return None if of_features is None else verbs.vector(of_features, x, copy=True)


def _run(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    where: Tensor | None,
    given: steps.Statistics | None,
    kept: tuple[int, ...],
    eps: float,
    relu: bool,
    exchange: steps.Exchange | None = None,
) -> tuple[Tensor, Transform]:
    """`steps.forward`, unrecorded."""
    if given is not None:
        count, mean, m2 = given
        given = count if is_number(count) else _vector(count, x), _vector(mean, x), _vector(m2, x)
    vectors = _vector(weight, x), _vector(bias, x)
    return steps.forward(verbs, x, *vectors, residual, where, given, kept, eps, relu, exchange=exchange)


def _formula(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    where: Tensor | None,
    given: steps.Statistics | None,
    kept: tuple[int, ...],
    eps: float,
    relu: bool,
) -> tuple[Tensor, Transform]:
    """`steps.forward` in torch's functions."""
    weight, bias = (None if each is None else plain.widen(each) for each in (weight, bias))
    return steps.forward(plain, x, weight, bias, residual, where, given, kept, eps, relu)


def _gradients_of_given(sum_dz_x: Any, sum_dz: Any, transform: Transform) -> tuple[Any, Any]:
    """The gradients of given (mean, m2), from ``y = (x − mean) · invstd · weight + …``, as vectors."""
    count, m2 = transform.count, transform.m2
    namespace = backend(m2)
    invstd = namespace.invstd(count, m2, transform.eps)
    scale = invstd if transform.weight is None else invstd * transform.weight
    # The variance of nothing does not depend on m2.
    share = namespace.variance(count, m2 * 0 + 1, 0, 0.0)
    return -sum_dz * scale, -0.5 * share * sum_dz_x * invstd * scale


def _in_tensors(transform: Transform, x: Tensor) -> Transform:
    """A transform whose vectors torch follows."""
    vectors = (None if each is None else verbs.of_vector(each, x) for each in (transform.weight, transform.bias))
    weight, bias = vectors
    mean, m2 = verbs.of_vector(transform.mean, x), verbs.of_vector(transform.m2, x)
    count = transform.count if is_number(transform.count) else verbs.of_vector(transform.count, x)
    return transform._replace(count=count, mean=mean, m2=m2, weight=weight, bias=bias)


# -- Eager -------------------------------------------------------------------------------------------------------------


class _Rest(NamedTuple):
    """What of `steps.forward`'s arguments has no gradient."""

    where: Tensor | None
    count: Any
    kept: tuple[int, ...]
    eps: float
    relu: bool
    exchange: Any


class _Forward(torch.autograd.Function):
    """The kernels, forward and backward."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        mean: Tensor | None,
        m2: Tensor | None,
        rest: _Rest,
    ) -> tuple[Tensor, Transform]:
        where, count, kept, eps, relu, exchange = rest
        given = None if mean is None else (count, mean, m2)
        y, transform = _run(x, weight, bias, residual, where, given, kept, eps, relu, exchange)
        ctx.save_for_backward(x, weight, bias, residual if relu else None, mean, m2, where)
        ctx.transform = transform._replace(residual=None)
        ctx.rest = rest._replace(where=None)
        return y, transform

    @staticmethod
    def backward(ctx: Any, dy: Tensor, _: None) -> tuple[Any, ...]:
        *inputs, where = ctx.saved_tensors
        needs = ctx.needs_input_grad
        if ctx.rest.exchange is not None:
            with ctx.rest.exchange.of_backward() as exchange:
                gradients = _by_kernels(dy, inputs, needs, where, ctx.transform, exchange)
        elif torch.is_grad_enabled():  # somebody wants the derivative of what is computed here
            gradients = _by_formula(dy, inputs, needs, ctx.rest._replace(where=where))
        else:
            gradients = _by_kernels(dy, inputs, needs, where, ctx.transform)
        if needs[3] and gradients[3] is None:
            gradients[3] = dy
        return *gradients, None


# Without the look for transformations of `torch.func`, which took 6 µs: there are none where this is called.
_apply = super(torch.autograd.Function, _Forward).apply


def _by_kernels(
    dy: Tensor,
    inputs: Sequence[Any],
    needs: Sequence[bool],
    where: Tensor | None,
    transform: Transform,
    exchange: steps.Exchange | None = None,
) -> list[Any]:
    if exchange is not None and torch.is_grad_enabled():
        raise NotImplementedError("group: there are no derivatives of derivatives; leave out create_graph")
    x, weight, bias, residual, mean, m2 = inputs
    dy = verbs.check(dy, "dy")
    transform = transform._replace(residual=residual)
    by: Any = verbs
    if verbs.is_watched(dy):
        by, transform = plain, _in_tensors(transform, x)
    gradients: list[Any] = [None] * 6
    if 0 in x.shape or needs[0] or (residual is not None and needs[3]) or exchange is not None:
        rest = transform, where, mean is not None, None, exchange
        dx, sum_dz_x, sum_dz, dz = steps.backward(by, dy, x, *rest)
        gradients[0], gradients[3] = dx, dz
    else:
        sum_dz, sum_dz_x = by.grad_sums(dy, x, transform)
    if weight is not None and needs[1]:
        gradients[1] = verbs.of_vector(sum_dz_x, x, weight.dtype)
    if bias is not None and needs[2]:
        gradients[2] = verbs.of_vector(sum_dz, x, bias.dtype)
    if mean is not None and (needs[4] or needs[5]):
        of_given = _gradients_of_given(sum_dz_x, sum_dz, transform)
        gradients[4:] = [verbs.of_vector(each, x, like.dtype) for each, like in zip(of_given, (mean, m2), strict=True)]
    return gradients


def _by_formula(dy: Tensor, inputs: Sequence[Tensor | None], needs: Sequence[bool], rest: _Rest) -> list[Any]:
    """The gradients as torch's functions of everything they depend on."""
    where, count, kept, eps, relu, _ = rest
    # Views: of inputs that were computed from one another, each is to be given its own part.
    own: list[Any] = [None if each is None else each.view_as(each) for each in inputs]
    x, weight, bias, residual, mean, m2 = own
    given = None if mean is None else (count, mean, m2)
    y, _ = _formula(x, weight, bias, residual, where, given, kept, eps, relu)
    wanted = [i for i, each in enumerate(own) if each is not None and needs[i]]
    found = torch.autograd.grad(y, [own[i] for i in wanted], dy, create_graph=True, allow_unused=True)
    gradients: list[Any] = [None] * 6
    for i, gradient in zip(wanted, found, strict=True):
        gradients[i] = gradient
    return gradients


class _Again(torch.autograd.Function):
    """A training call like one before (see `_again`)."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, plan: Training, stats: RunningStats | None
    ) -> Any:
        done = plan.forward(x, weight, bias, stats, None)
        if done is not None:
            ctx.plan, ctx.vectors = plan, done[1]
            ctx.save_for_backward(x, weight, bias)
        return done

    @staticmethod
    def backward(ctx: Any, dy: Tensor, _: None) -> tuple[Any, ...]:
        x, weight, bias = ctx.saved_tensors
        inputs, needs = (x, weight, bias, None, None, None), (*ctx.needs_input_grad[:3], False, False, False)
        transform = ctx.plan.transform(ctx.vectors)
        if torch.is_grad_enabled():
            rest = _Rest(None, None, transform.kept, transform.eps, transform.relu, None)
            gradients = _by_formula(dy, inputs, needs, rest)
        else:
            signature = verbs.signature_of_gradient(dy, x)
            done = None if signature is None else ctx.plan.backward(dy, signature, x, ctx.vectors, None)
            gradients = done or _by_kernels(dy, inputs, needs, None, transform)
        return *gradients[:3], None, None


_apply_again = super(torch.autograd.Function, _Again).apply


class Followed:
    """Training calls of one signature that autograd records."""

    def __init__(self, plan: Training) -> None:
        self._plan = plan
        self.dtypes, self.transform, self.backward = plan.dtypes, plan.transform, plan.backward

    is_small = False

    def writes(self, out: Any, stats: RunningStats | None, *others: Tensor | None) -> bool:
        """Whether out can be written at once: autograd follows none, and the checks of a first call refuse it."""
        return False

    def forward(
        self, x: Tensor, weight: Any, bias: Any, stats: RunningStats | None, out: None
    ) -> tuple[Tensor, Vectors] | None:
        """Return y and the vectors, with `stats` updated."""
        return _apply_again(x, weight, bias, self._plan, stats)  # type: ignore[no-any-return, no-untyped-call]


class _Moments(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, where: Tensor | None, kept: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
        count, mean, m2 = (verbs.of_vector(each, x) for each in steps.moments(verbs, x, kept, where))
        ctx.kept = kept
        ctx.mark_non_differentiable(count)
        ctx.save_for_backward(x, where, count, mean)
        return count, mean, m2

    @staticmethod
    def backward(ctx: Any, _: Tensor, dmean: Tensor, dm2: Tensor) -> tuple[Any, ...]:
        return _through_moments(ctx.kept, dmean, dm2, *ctx.saved_tensors), None, None


def _through_moments(
    kept: tuple[int, ...],
    dmean: Tensor,
    dm2: Tensor,
    x: Tensor,
    where: Tensor | None,
    count: Tensor,
    mean: Tensor,
) -> Tensor:
    """The gradient of x from those of its mean and m2: ``where · (dmean / count + 2 · dm2 · (x − mean))``."""
    along = along_features(x.shape, kept)
    count = count.expand(mean.shape).reshape(along).clamp(min=NOTHING)
    dx = dmean.reshape(along) / count + 2 * dm2.reshape(along) * (x - mean.reshape(along))
    if where is not None:
        dx = torch.where(where == 0, 0, where * dx)
    return dx.to(x.dtype)


class _Backward(torch.autograd.Function):
    """Gradients of a backward pass that was written by hand; their own derivatives are not known."""

    @staticmethod
    def forward(ctx: Any, dy: Tensor, x: Tensor, *rest: Any) -> tuple[Any, ...]:
        dx, sum_dz_x, sum_dz, dz = steps.backward(verbs, dy, x, *rest)
        return dx, verbs.of_vector(sum_dz_x, x), verbs.of_vector(sum_dz, x), dz

    @staticmethod
    def backward(ctx: Any, *_: Any) -> tuple[Any, ...]:
        raise RuntimeError(
            "batch_norm_backward cannot be differentiated: leave the gradients of batch_norm to autograd, with "
            "create_graph=True for derivatives of derivatives"
        )


# -- Operators ---------------------------------------------------------------------------------------------------------


# Those that have kernels; arrays on others are left to torch's own functions before it comes to an operator.
_DEVICES = "cpu", "cuda"


@torch.library.custom_op("bnarray::forward", mutates_args=(), device_types=_DEVICES)
def _forward_operator(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    where: Tensor | None,
    count: Tensor | None,
    mean: Tensor | None,
    m2: Tensor | None,
    kept: Sequence[int],
    eps: float,
    relu: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    given = None if mean is None else (count, mean, m2)
    y, transform = _run(x, weight, bias, residual, where, given, tuple(kept), eps, relu)
    count, mean, m2 = (verbs.of_vector(each, x) for each in (transform.count, transform.mean, transform.m2))
    assert count is not None
    return y, count.expand(mean.shape).clone(), mean, m2


@_forward_operator.register_fake
def _(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    where: Tensor | None,
    count: Tensor | None,
    mean: Tensor | None,
    m2: Tensor | None,
    kept: Sequence[int],
    eps: float,
    relu: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    shape = features_shape(x.shape, tuple(kept))
    vectors = (x.new_empty(shape, dtype=torch.float64) for _ in range(3))
    return torch.empty_like(x), *vectors  # type: ignore[return-value]  # of three


@torch.library.custom_op("bnarray::backward", mutates_args=(), device_types=_DEVICES)
def _backward_operator(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    where: Tensor | None,
    count: Tensor,
    mean: Tensor,
    m2: Tensor,
    kept: Sequence[int],
    eps: float,
    relu: bool,
    is_constant: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return (dx, dweight, dbias, dresidual); the last is empty where it is dy."""
    given = _vector(count, x), _vector(mean, x), _vector(m2, x)
    transform = Transform(tuple(kept), *given, eps, _vector(weight, x), _vector(bias, x), relu, residual)
    dx, sum_dz_x, sum_dz, dz = steps.backward(verbs, verbs.check(dy, "dy"), x, transform, where, is_constant)
    return dx, verbs.of_vector(sum_dz_x, x), verbs.of_vector(sum_dz, x), x.new_empty(0) if dz is None else dz


@_backward_operator.register_fake
def _(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    where: Tensor | None,
    count: Tensor,
    mean: Tensor,
    m2: Tensor,
    kept: Sequence[int],
    eps: float,
    relu: bool,
    is_constant: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dresidual = x.new_empty(0) if residual is None else torch.empty_like(x)
    return torch.empty_like(x), torch.empty_like(mean), torch.empty_like(mean), dresidual


def _refuse(ctx: Any, *_: Any) -> tuple[Any, ...]:
    raise RuntimeError(
        "the gradient of a call that torch compiles, traces or intercepts cannot be differentiated again; make calls "
        "whose second derivatives are needed outside, or inside torch.func"
    )


_backward_operator.register_autograd(_refuse)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, bias, residual, where, _, mean, _, *ctx.settings = inputs
    ctx.is_constant = mean is not None
    relu = ctx.settings[-1]
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(x, weight, bias, residual if relu else None, where, *output[1:])


def _differentiate(ctx: Any, dy: Tensor, *_: Any) -> tuple[Any, ...]:
    x, weight, bias, residual, where, count, mean, m2 = ctx.saved_tensors
    rest = weight, bias, residual, where, count, mean, m2, *ctx.settings
    dx, sum_dz_x, sum_dz, dz = _backward_operator(dy, x, *rest, ctx.is_constant)
    dmean = dm2 = None
    if ctx.is_constant:
        weight_vector = None if weight is None else plain.widen(weight)
        kept, eps, relu = ctx.settings
        transform = Transform(kept, count, mean, m2, eps, weight_vector, None, relu, None)
        dmean, dm2 = _gradients_of_given(sum_dz_x, sum_dz, transform)
    dweight = None if weight is None else sum_dz_x.to(weight.dtype)
    dbias = None if bias is None else sum_dz.to(bias.dtype)
    dresidual = None if not ctx.needs_input_grad[3] else dy if residual is None else dz
    return dx, dweight, dbias, dresidual, None, None, dmean, dm2, None, None, None


_forward_operator.register_autograd(_differentiate, setup_context=_save)


@torch.library.custom_op("bnarray::moments", mutates_args=(), device_types=_DEVICES)
def _moments_operator(x: Tensor, where: Tensor | None, kept: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
    count, mean, m2 = (verbs.of_vector(each, x) for each in steps.moments(verbs, x, tuple(kept), where))
    return count.expand(mean.shape).clone(), mean, m2


@_moments_operator.register_fake
def _(x: Tensor, where: Tensor | None, kept: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
    shape = features_shape(x.shape, tuple(kept))
    return tuple(x.new_empty(shape, dtype=torch.float64) for _ in range(3))  # type: ignore[return-value]  # three


def _save_moments(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, where, ctx.kept = inputs
    count, mean, _ = output
    ctx.mark_non_differentiable(count)
    ctx.save_for_backward(x, where, count, mean)


def _differentiate_moments(ctx: Any, _: Tensor, dmean: Tensor, dm2: Tensor) -> tuple[Any, ...]:
    return _through_moments(tuple(ctx.kept), dmean, dm2, *ctx.saved_tensors), None, None


_moments_operator.register_autograd(_differentiate_moments, setup_context=_save_moments)


# Written to by every update and read by every look at a state, so that compiled code keeps their order.
_order = torch.zeros(1, dtype=torch.int64, device="cpu")


@torch.library.custom_op("bnarray::update", mutates_args={"order"}, device_types=_DEVICES)
def _update_operator(key: int, order: Tensor, count: Tensor, mean: Tensor, m2: Tensor) -> None:
    """Update the `RunningStats` of a key."""
    order += 1
    stats = state_of(key)
    try:
        update = stats.prepare(float(count) if count.ndim == 0 else count, mean, m2)
    except (ValueError, FloatingPointError):  # too late to refuse
        update = stats.skip
    update()


@_update_operator.register_fake
def _(key: int, order: Tensor, count: Tensor, mean: Tensor, m2: Tensor) -> None: ...


@torch.library.custom_op("bnarray::current", mutates_args=(), device_types=_DEVICES)
def _current_operator(key: int, order: Tensor, shape: Sequence[int], device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the mean and variance of the `RunningStats` of a key."""
    like = order.new_empty(0, device=device)
    mean, var = (verbs.convert(each, like) for each in state_of(key).mean_and_var())
    return mean.clone(), var.clone()


@_current_operator.register_fake
def _(key: int, order: Tensor, shape: Sequence[int], device: torch.device) -> tuple[Tensor, Tensor]:
    mean, var = (order.new_empty(shape, dtype=torch.float64, device=device) for _ in range(2))
    return mean, var


# -- What the backend calls --------------------------------------------------------------------------------------------


def _has_operators(x: Tensor) -> bool:
    """Whether a call that is recorded is to be an operator: one with kernels, which no transformation need see into."""
    return (x.is_cpu or verbs.has_cuda_kernels(x)) and not verbs.is_transformed()


def forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    where: Tensor | None,
    given: steps.Statistics | None,
    kept: tuple[int, ...],
    eps: float,
    relu: bool,
    exchange: steps.Exchange | None = None,
) -> tuple[Tensor, Transform]:
    count, mean, m2 = given or (None, None, None)
    if not verbs.are_recorded(x, weight, bias, residual, where, mean, m2):
        return _apply(x, weight, bias, residual, mean, m2, _Rest(where, count, kept, eps, relu, exchange))  # type: ignore[no-any-return, no-untyped-call]
    if not _has_operators(x):
        return _formula(x, weight, bias, residual, where, given, kept, eps, relu)
    if given is not None and is_number(given[0]):
        count = torch.full_like(given[1], given[0])
    y, count, mean, m2 = _forward_operator(x, weight, bias, residual, where, count, mean, m2, list(kept), eps, relu)
    if given is None:
        count = _as_one(count, x, kept, where)
    return y, Transform(kept, count, mean, m2, eps, weight, bias, relu, residual)


def _as_one(count: Tensor, x: Tensor, kept: tuple[int, ...], where: Tensor | None) -> Any:
    """The count of each feature as one, where that is known to be enough."""
    if where is None:
        return 0 if 0 in x.shape else prod(x.shape) // prod(count.shape)
    if varies_along(where.shape, x.ndim, kept):
        return count
    return verbs.number(count.flatten()[0])


def moments(x: Tensor, kept: tuple[int, ...], where: Tensor | None) -> tuple[Any, Tensor, Tensor]:
    if not _has_operators(x):
        return plain.moments(x, kept, where)  # type: ignore[no-any-return]
    if verbs.are_recorded(x, where):
        count, mean, m2 = _moments_operator(x, where, list(kept))
    else:
        count, mean, m2 = _Moments.apply(x, where, kept)  # type: ignore[no-untyped-call]
    return _as_one(count.expand(mean.shape), x, kept, where), mean, m2


def backward(
    dy: Tensor,
    x: Tensor,
    transform: Transform,
    where: Tensor | None,
    is_constant: bool,
    exchange: steps.Exchange | None = None,
) -> tuple[Tensor, Any, Any, Tensor | None]:
    if not verbs.are_recorded(dy, x, transform.residual, where):
        return _Backward.apply(dy, x, transform, where, is_constant, None, exchange)  # type: ignore[no-any-return, no-untyped-call]
    transform = _in_tensors(transform, x)
    if not _has_operators(x):
        return steps.backward(plain, dy, x, transform, where, is_constant)
    kept, count, mean, m2, eps, weight, bias, relu, residual, _ = transform
    count = torch.full_like(mean, count) if is_number(count) else count.expand(mean.shape)
    rest = weight, bias, residual, where, count, mean, m2, list(kept), eps, relu, is_constant
    dx, dweight, dbias, dz = _backward_operator(dy, x, *rest)
    return dx, dweight, dbias, None if residual is None else dz


def prepare(stats: RunningStats, count: Any, mean: Tensor, m2: Tensor) -> Callable[[], None]:
    """Return the function that updates a state when the compiled code runs."""
    if not verbs.is_recorded(mean):
        raise TypeError(
            "stats would be updated under a transformation of torch.func, which takes no part in it; leave it out, and "
            "call stats.update(bnarray.moments(x)) outside"
        )
    # A number stays with the host, which asks for it.
    count = torch.full((), count, dtype=torch.float64, device="cpu") if is_number(count) else count
    return partial(_update_operator, stats.key, _order, count, mean, m2)


def current(stats: RunningStats, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and variance, beside x, as they will be when the compiled code runs."""
    return _current_operator(stats.key, _order, list(stats.features_shape), x.device)  # type: ignore[no-any-return]
