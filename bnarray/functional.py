"""The public functions: validation, and the order of the steps."""

from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import wraps
from math import isfinite, prod
from typing import Any, NamedTuple, ParamSpec, TypeVar

from bnarray import steps
from bnarray.dispatch import Array, Transform, Verbs, backend, backend_with, wrapping
from bnarray.layout import features_shape, kept_axes
from bnarray.stats import Moments, RunningStats, checked_number, explains_momentum, is_number

_P = ParamSpec("_P")
_R = TypeVar("_R")


def _public(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Answer the keyword `momentum`, and make an `Exchange` of `group`, before anything can fail that the other members
    should hear of.

    There is none in evaluation, where nothing depends on the others.
    """
    explained = explains_momentum(function)

    @wraps(function)
    def wrapper(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        if kwargs.get("group") is None:
            return explained(*args, **kwargs) if "momentum" in kwargs else function(*args, **kwargs)
        from bnarray import sync  # which needs NumPy

        members = sync.members(kwargs["group"])
        if not kwargs.get("training", True):
            kwargs["group"] = None
            return explained(*args, **kwargs)
        with sync.Exchange(members, function.__name__) as exchange:
            kwargs["group"] = exchange
            return explained(*args, **kwargs)

    return wrapper


class Gradients(NamedTuple):
    """The gradients of a call without a residual; weight and bias are None where none was given."""

    x: Array
    weight: Array | None
    bias: Array | None


class ResidualGradients(NamedTuple):
    """The gradients of a call with a residual."""

    x: Array
    weight: Array | None
    bias: Array | None
    residual: Array


@dataclass(slots=True, eq=False)
class Saved:
    """What the backward pass needs, and no more.

    `x`, `where` and (under ReLU) the transform's `residual` are the caller's arrays, not to be modified until then; all
    else is copies of per-feature vectors in float64.
    """

    x: Array
    transform: Transform
    where: Array | None
    is_constant: bool
    weight_dtype: Any
    bias_dtype: Any
    has_residual: bool = False
    exchange: Any = None  # with the members of a group
    again: Any = None  # what made the call, if one like it had been made before
    vectors: Any = None

    def __getstate__(self) -> tuple[None, dict[str, Any]]:
        """Copies and pickles go back without what made the call, which is this process's."""
        state = {field.name: getattr(self, field.name) for field in fields(self)}
        return None, {**state, "again": None, "vectors": None}

    @property
    def moments(self) -> Moments | None:
        """The batch's `Moments`; None where the statistics were given."""
        if self.is_constant:
            return None
        return _as_moments(backend(self.x), self.x, self.transform.count, self.transform.mean, self.transform.m2)


@_public
def batch_norm(
    x: Array,
    weight: Array | None = None,
    bias: Array | None = None,
    *,
    stats: RunningStats | Moments | None = None,
    training: bool = True,
    axis: int | tuple[int, ...] = 1,
    eps: float = 1e-5,
    where: Array | None = None,
    activation: str | None = None,
    residual: Array | None = None,
    group: Any = None,
    out: Array | None = None,
) -> Array:
    r"""Normalise x per feature over the batch, then scale and shift.

    .. math:: y = \frac{x - \mathrm{mean}}{\sqrt{\mathrm{var} + \mathrm{eps}}} \cdot \mathrm{weight} + \mathrm{bias}

    with the mean and the (biased) variance of each feature over all other axes (Ioffe and Szegedy 2015, algorithm 1).

    Parameters
    ----------
    x
        Array of any supported library: float16, bfloat16, float32 or float64, of any shape and strides.
    weight, bias
        γ and β, of the features' shape, in any floating dtype. None is 1 and 0.
    stats
        A `RunningStats`, or a `Moments`. With ``training=True`` the batch's own moments normalise, and a `RunningStats`
        is updated with them. With ``training=False`` the given statistics normalise and nothing is updated.
    training
        Whether the batch's own statistics normalise.
    axis
        The feature axis, or a tuple of them: the axes that are kept. All others are reduced. The features' shape is x's
        sizes along the kept axes, in x's order; ``()`` is one feature.
    eps
        Added to the variance inside the square root.
    where
        Which elements count: a boolean mask, or floating weights >= 0, broadcastable to x. Elements of weight 0 add
        nothing to the statistics, be they NaN; they are still normalised.
    activation
        None or ``"relu"`` (which lets NaN through), applied last.
    residual
        Array like x, added before the activation.
    group
        The processes whose arrays are one batch: a communicator of mpi4py, torch.distributed or CuPy's NCCL, or an
        object with ``rank``, ``size`` and ``allgather(array)``. All its members make the call, one with an empty array
        too.
    out
        Array to write into, and what is returned. ``out=x`` and ``out=residual`` are allowed.

    Returns
    -------
    array
        Of x's library, shape, dtype, device and memory layout.

    Raises
    ------
    TypeError
        If an argument is of the wrong kind: integers, lists, masked arrays, mixed libraries.
    ValueError
        If a value or shape is wrong, or the members of the group differ in what they should agree in. A call that
        raises has changed nothing.
    RuntimeError
        If another member of the group raised.
    NotImplementedError
        If a library that compiles or differentiates the call cannot follow it to the group.

    See Also
    --------
    batch_norm_forward : the same, keeping what the backward pass needs

    Examples
    --------
    >>> import numpy as np
    >>> import bnarray as bn
    >>> x = np.array([[1.0, 10.0], [3.0, 30.0]])
    >>> bn.batch_norm(x, eps=0.0)
    array([[-1., -1.],
           [ 1.,  1.]])
    """
    is_plain = where is None and residual is None and group is None
    signature, again = _as_before(x, weight, bias, stats, training, axis, eps, activation, is_plain)
    takes = again is not None and (out is None or again.writes(out, stats, x, weight, bias))
    if takes and (done := again.forward(x, weight, bias, stats, out)):
        return done[0]
    if not takes and out is not None and again is not None and again.is_small:
        _checked_out(backend(x), x, weight, bias, None, None, out)
        if done := again.forward(x, weight, bias, stats, None):
            out[...] = done[0]
            return out
    call = _checked(x, weight, bias, stats, training, axis, eps, where, activation, residual, out)
    y, _ = _forward(call, group)
    _remember(signature, call)
    return y


@_public
def batch_norm_forward(
    x: Array,
    weight: Array | None = None,
    bias: Array | None = None,
    *,
    stats: RunningStats | Moments | None = None,
    training: bool = True,
    axis: int | tuple[int, ...] = 1,
    eps: float = 1e-5,
    where: Array | None = None,
    activation: str | None = None,
    residual: Array | None = None,
    group: Any = None,
    out: Array | None = None,
) -> tuple[Array, Saved]:
    """Do what `batch_norm` does, and keep what `batch_norm_backward` needs.

    Returns
    -------
    y : array
        As `batch_norm` returns it.
    saved : Saved
        For `batch_norm_backward`. It refers to x (and where, and the residual under an activation), which should not be
        modified until then; what ``out`` overwrites is copied first. ``saved.moments`` are the batch's `Moments`.

    Raises
    ------
    TypeError, ValueError
        As `batch_norm`.

    Examples
    --------
    >>> import numpy as np
    >>> import bnarray as bn
    >>> y, saved = bn.batch_norm_forward(np.array([[1.0], [3.0]]), eps=0.0)
    >>> saved.moments.mean
    array([2.])
    """
    is_plain = where is None and residual is None and group is None
    signature, again = _as_before(x, weight, bias, stats, training, axis, eps, activation, is_plain)
    takes = again is not None and (out is None or again.writes(out, stats, x, weight, bias))
    if takes and (done := again.forward(x, weight, bias, stats, out)):
        y, vectors = done
        dtypes = again.dtypes
        return y, Saved(
            x, again.transform(vectors), None, not training, dtypes[0], dtypes[1], again=again, vectors=vectors
        )
    call = _checked(x, weight, bias, stats, training, axis, eps, where, activation, residual, out)
    verbs = call.verbs
    # What is overwritten but needed again: x always, the residual for the sign of what ReLU saw.
    kept_x = verbs.copy(call.x) if call.overwrites(call.x) else call.x
    kept_residual = call.residual if call.relu else None
    if kept_residual is not None and call.overwrites(kept_residual):
        kept_residual = kept_x if residual is x else verbs.copy(kept_residual)
    overwritten = kept_x is not call.x or (kept_residual is not None and kept_residual is not call.residual)
    guide = verbs.guide(call.x, call.x if kept_residual is None else call.residual) if overwritten else None
    y, transform = _forward(call, group)
    _remember(signature, call)
    return y, Saved(
        x=kept_x,
        transform=transform._replace(residual=kept_residual, guide=guide),
        where=call.where,
        is_constant=not training,
        weight_dtype=None if weight is None else weight.dtype,
        bias_dtype=None if bias is None else bias.dtype,
        has_residual=residual is not None,
        exchange=group,
    )


def batch_norm_backward(dy: Array, saved: Saved, *, out: Array | None = None) -> Gradients | ResidualGradients:
    r"""Return the gradients of x, weight and bias (and of the residual, if there was one).

    .. math::
        dx = \frac{\mathrm{weight}}{\sqrt{\mathrm{var} + \mathrm{eps}}}
             \left(dy - \frac{1}{n} \sum dy - \hat x \frac{1}{n} \sum dy \, \hat x\right), \quad
        d\mathrm{weight} = \sum dy \, \hat x, \quad d\mathrm{bias} = \sum dy

    The statistics' own dependence on x is in it (Ioffe and Szegedy 2015, section 3); in evaluation they are constants.
    After a forward pass in a group all its members make this call too: the sums in dx are then over all of them, and
    the gradients of weight and bias each member's own part.

    Parameters
    ----------
    dy
        The gradient of y: of x's shape, with any strides, in any floating dtype.
    saved
        What `batch_norm_forward` returned with y.
    out
        Array like x to write dx into; ``out=dy`` is allowed.

    Returns
    -------
    Gradients or ResidualGradients
        Named tuple (x, weight, bias[, residual]). dx is in x's dtype, the others in those of what they belong to; None
        where no weight, or no bias, was given. The residual's gradient may be dy itself.

    Raises
    ------
    TypeError, ValueError
        If dy or out do not fit what was saved. Nothing is written then.
    RuntimeError
        If another member of the group raised.

    Examples
    --------
    >>> import numpy as np
    >>> import bnarray as bn
    >>> x = np.array([[1.0], [2.0], [6.0]])
    >>> y, saved = bn.batch_norm_forward(x, np.ones(1), np.zeros(1))
    >>> dx, dweight, dbias = bn.batch_norm_backward(np.array([[1.0], [0.0], [0.0]]), saved)
    >>> dbias
    array([1.])
    """
    if not isinstance(saved, Saved):
        raise TypeError(f"saved is a {type(saved).__name__}; it should be what batch_norm_forward returned with y")
    if saved.again is not None:
        signature = backend(saved.x).signature_of_gradient(dy, saved.x)
        takes = signature is not None and (out is None or saved.again.writes(out, None, dy, saved.x))
        if takes and (done := saved.again.backward(dy, signature, saved.x, saved.vectors, out)):
            return Gradients(*done)
    if saved.exchange is None:
        return _backward(dy, saved, out, None)
    with saved.exchange.of_backward() as exchange:
        return _backward(dy, saved, out, exchange)


def _backward(
    dy: Array, saved: Saved, out: Array | None, exchange: steps.Exchange | None
) -> Gradients | ResidualGradients:
    x, transform = saved.x, saved.transform
    verbs = wrapping(backend(x), transform.mean, transform.m2, transform.weight, transform.bias)
    verbs = backend_with(verbs, "x", x, "dy", dy)
    verbs = backend_with(verbs, "x", x, "out", out)
    if dy is None:
        raise TypeError("dy is None; it should be the gradient of y")
    dy = verbs.check(dy, "dy")
    if tuple(dy.shape) != tuple(x.shape):
        raise ValueError(f"dy has shape {tuple(dy.shape)}; it should have x's, {tuple(x.shape)}")
    if out is not None:
        needed = {"x": x, "where": saved.where, "residual": transform.residual}
        verbs.check_out(out, x, {"dy": dy}, {name: array for name, array in needed.items() if array is not None})
    dresidual = None
    if saved.has_residual and not transform.relu:
        dresidual = verbs.cast(dy, x.dtype)
        if out is not None and verbs.overlap(out, dresidual):
            dresidual = verbs.copy(dresidual)
    if verbs.is_traced(x, dy, transform.weight, transform.bias, transform.residual, saved.where):
        gradients = verbs.traced_backward(dy, x, transform, saved.where, saved.is_constant, *_if_given(exchange))
    else:
        gradients = steps.backward(verbs, dy, x, transform, saved.where, saved.is_constant, out, exchange)
    dx, dweight, dbias, dz = gradients
    dweight = None if transform.weight is None else verbs.of_vector(dweight, x, saved.weight_dtype)
    dbias = None if transform.bias is None else verbs.of_vector(dbias, x, saved.bias_dtype)
    if not saved.has_residual:
        return Gradients(dx, dweight, dbias)
    return ResidualGradients(dx, dweight, dbias, dz if dresidual is None else dresidual)


@_public
def moments(x: Array, *, axis: int | tuple[int, ...] = 1, where: Array | None = None, group: Any = None) -> Moments:
    """Return count, mean and sum of squared deviations of each feature.

    Parameters
    ----------
    x, axis, where, group
        As in `batch_norm`.

    Returns
    -------
    Moments
        In float64. A feature in which nothing counts has count, mean and m2 of 0.

    Raises
    ------
    TypeError, ValueError
        As `batch_norm`.

    Examples
    --------
    >>> import numpy as np
    >>> import bnarray as bn
    >>> bn.moments(np.array([[1.0, 5.0], [3.0, 5.0]])).var()
    array([1., 0.])
    """
    verbs = backend(x)
    x = verbs.check(x, "x")
    kept = kept_axes(axis, x.ndim)
    if where is not None:
        verbs = backend_with(verbs, "x", x, "where", where)
        where = verbs.check_where(x, where)
    if group is not None:
        if verbs.joins(x, where):
            raise NotImplementedError("moments over a group have no gradient with respect to x; pass x.detach()")
        group.bind(features_shape(x.shape, kept), kept, _name(x.dtype))
    elif verbs.is_traced(x, where):
        return Moments.of(*verbs.traced_moments(x, kept, where))
    count, mean, m2 = steps.moments(verbs, x, kept, where, group)
    _check_count(count, where is not None or group is not None)
    return _as_moments(verbs, x, count, mean, m2)


def _as_moments(verbs: Verbs, x: Array, count: Any, mean: Array, m2: Array) -> Moments:
    if not is_number(count):
        count = verbs.of_vector(count, x)
    return Moments.of(count, verbs.of_vector(mean, x), verbs.of_vector(m2, x))


# What makes calls with nothing but x, weight, bias and statistics once more, by their signatures. Those that are unlike
# all before gain nothing, so that there is no use in remembering many.
_again: dict[Any, Any] = {}
_MOST = 1024


def _as_before(
    x: Array,
    weight: Array | None,
    bias: Array | None,
    stats: RunningStats | Moments | None,
    training: bool,
    axis: int | tuple[int, ...],
    eps: float,
    activation: str | None,
    is_plain: bool,
) -> tuple[Any, Any]:
    """Return the signature of a call, if it has one, and what makes such calls, if there was one before."""
    of_stats: Any = None
    given: tuple[Array, ...] = ()
    if type(stats) is RunningStats:
        of_stats = stats.settings
    elif type(stats) is Moments and not training and is_number(stats.count) and stats.count == 1:
        of_stats, given = Moments, (stats.mean, stats.m2)
    elif stats is not None:
        return None, None
    of_arrays = backend(x).signature(x, weight, bias, *given) if is_plain else None
    if of_arrays is None:
        return None, None
    # Types too, because True is 1.
    signature = of_arrays, of_stats, training, axis, type(axis), eps, type(eps), activation
    try:
        return signature, _again.get(signature)
    except TypeError:  # no hash, so an argument of the wrong kind, of which the checks will tell
        return None, None


def _remember(signature: tuple[Any, ...] | None, call: "_Call") -> None:
    if signature is not None and signature not in _again:
        if len(_again) > _MOST:
            _again.clear()
        _again[signature] = call.verbs.again(call)


class _Call(NamedTuple):
    """A forward call whose arguments fit together."""

    verbs: Verbs
    x: Array
    kept: tuple[int, ...]
    weight: Array | None
    bias: Array | None
    stats: RunningStats | Moments | None
    training: bool
    eps: float
    where: Array | None
    relu: bool
    residual: Array | None
    out: Array | None

    def overwrites(self, array: Array) -> bool:
        return self.out is not None and self.verbs.overlap(self.out, array)

    def is_sure(self) -> bool:
        """Whether no numbers in x can keep the call from ending well; all is still there if it has to begin anew."""
        features = features_shape(self.x.shape, self.kept)
        return not self.overwrites(self.x) and (
            not isinstance(self.stats, RunningStats) or self.stats.is_sure(prod(self.x.shape) // max(1, prod(features)))
        )


def _checked(
    x: Array,
    weight: Array | None,
    bias: Array | None,
    stats: RunningStats | Moments | None,
    training: bool,
    axis: int | tuple[int, ...],
    eps: float,
    where: Array | None,
    activation: str | None,
    residual: Array | None,
    out: Array | None,
) -> _Call:
    verbs = backend(x)
    x = verbs.check(x, "x")
    kept = kept_axes(axis, x.ndim)
    features = features_shape(x.shape, kept)
    if weight is not None:
        verbs, weight = _checked_parameter(verbs, x, "weight", weight, features)
    if bias is not None:
        verbs, bias = _checked_parameter(verbs, x, "bias", bias, features)
    if stats is not None or not training:
        _check_stats(stats, training, features)
        if isinstance(stats, Moments):
            verbs = wrapping(verbs, *_arrays(stats))
    eps = checked_number(eps, "eps")
    if where is not None:
        verbs = backend_with(verbs, "x", x, "where", where)
        where = verbs.check_where(x, where)
    if activation is not None and not (isinstance(activation, str) and activation == "relu"):
        raise ValueError(f"activation is {activation!r}; it should be None or 'relu'")
    if residual is not None:
        verbs = backend_with(verbs, "x", x, "residual", residual)
        residual = verbs.check(residual, "residual")
        if residual.dtype != x.dtype:
            raise TypeError(f"residual has dtype {residual.dtype}; it should have x's, {x.dtype}")
        if tuple(residual.shape) != tuple(x.shape):
            raise ValueError(f"residual has shape {tuple(residual.shape)}; it should have x's, {tuple(x.shape)}")
    if out is not None:
        verbs = _checked_out(verbs, x, weight, bias, where, residual, out)
    relu = activation is not None
    return _Call(verbs, x, kept, weight, bias, stats, training, eps, where, relu, residual, out)


def _checked_out(
    verbs: Verbs, x: Array, weight: Any, bias: Any, where: Array | None, residual: Array | None, out: Array
) -> Verbs:
    verbs = backend_with(verbs, "x", x, "out", out)
    needed = {"weight": weight, "bias": bias, "where": where}
    allowed = {"x": x} if residual is None else {"x": x, "residual": residual}
    verbs.check_out(out, x, allowed, {name: array for name, array in needed.items() if array is not None})
    return verbs


def _checked_parameter(
    verbs: Verbs, x: Array, name: str, parameter: Array, features: tuple[int, ...]
) -> tuple[Verbs, Array]:
    verbs = backend_with(verbs, "x", x, name, parameter, also=verbs.capabilities.parameters)
    parameter = verbs.check(parameter, name)
    if tuple(parameter.shape) != features:
        raise ValueError(f"{name} has shape {tuple(parameter.shape)}; it should have the features', {features}")
    return verbs, parameter


def _check_stats(stats: RunningStats | Moments | None, training: bool, features: tuple[int, ...]) -> None:
    if isinstance(stats, RunningStats):
        shape = stats.features_shape
    elif isinstance(stats, Moments):
        if training:
            raise TypeError("stats is a Moments, which cannot be updated; pass training=False, or a RunningStats")
        shape = tuple(stats.mean.shape)
    elif stats is None:
        raise TypeError("stats is None; with training=False it should be the RunningStats or Moments that normalise")
    else:
        raise TypeError(f"stats is a {type(stats).__name__}; it should be a RunningStats or a Moments")
    if shape != features:
        raise ValueError(f"stats has features of shape {shape}; x's have {features}")


def _name(dtype: Any) -> str:
    """A dtype's name, the same in all libraries."""
    return str(dtype).rpartition(".")[2]


def _if_given(exchange: steps.Exchange | None) -> tuple[steps.Exchange, ...]:
    """An exchange for libraries that know of it; the others are not asked."""
    return () if exchange is None else (exchange,)


def _bind(exchange: Any, call: _Call, is_followed: bool) -> None:
    """Say what the members of a group have to agree in."""
    x, stats = call.x, call.stats
    settings = stats.settings if isinstance(stats, RunningStats) else None
    exchange.bind(
        *(features_shape(x.shape, call.kept), call.kept, _name(x.dtype), call.eps, "relu" if call.relu else None),
        *(call.weight is not None, call.bias is not None, call.residual is not None, is_followed, settings),
    )


def _check_count(count: Any, is_weighted: bool) -> None:
    """Raise if a sum of weights is not finite."""
    if is_weighted and not (isfinite(count) if is_number(count) else backend(count).is_finite(count)):
        raise ValueError("where holds weights whose sum is beyond the largest number; scale them")


def _arrays(stats: RunningStats | Moments | None) -> tuple[Array, ...]:
    """What of the statistics a library may follow."""
    if isinstance(stats, Moments):
        return (stats.mean, stats.m2) if is_number(stats.count) else (stats.mean, stats.m2, stats.count)
    return () if stats is None else stats.followed()


def _given(
    verbs: Verbs, convert: Callable[[Array, Array], Array], x: Array, stats: RunningStats | Moments | None
) -> steps.Statistics:
    """The statistics to evaluate with."""
    if isinstance(stats, Moments):
        count = stats.count if is_number(stats.count) else convert(stats.count, x)
        mean, m2 = stats.mean, stats.m2
    else:
        assert stats is not None, "checked before"
        count = 1
        mean, m2 = verbs.current(stats, x)
    return count, convert(mean, x), convert(m2, x)


def _forward(call: _Call, exchange: Any) -> tuple[Array, Transform]:
    """Return (y, what was done to x): first what can fail, then out, then the update."""
    verbs, x, kept, weight, bias, stats, training, eps, where, relu, residual, out = call
    update = None

    def decide(count: Any, mean: Array, m2: Array) -> None:
        nonlocal update
        _check_count(count, where is not None or exchange is not None)
        if isinstance(stats, RunningStats):
            update = verbs.prepare(stats, count, mean, m2)

    arrays = x, weight, bias, residual, where, *_arrays(stats)
    if exchange is None:
        is_followed = verbs.is_traced(*arrays)
    else:
        is_followed = verbs.joins(*arrays)
        _bind(exchange, call, is_followed)
    if is_followed:
        if training and isinstance(stats, RunningStats):
            stats.check_known(not verbs.is_symbolic(x, weight, bias, residual, where))
        given = None if training else _given(verbs, verbs.traced_statistic, x, stats)
        shared = _if_given(exchange)
        y, transform = verbs.traced_forward(x, weight, bias, residual, where, given, kept, eps, relu, *shared)
        if training:
            decide(transform.count, transform.mean, transform.m2)
    else:
        given = None if training else _given(verbs, verbs.vector, x, stats)
        weight = None if weight is None else verbs.vector(weight, x, copy=True)
        bias = None if bias is None else verbs.vector(bias, x, copy=True)
        y, transform = steps.forward(
            verbs, x, weight, bias, residual, where, given, kept, eps, relu, out, decide, exchange,
            is_sure=call.is_sure(),
        )  # fmt: skip
    if update is not None:
        update()
    return y, transform
