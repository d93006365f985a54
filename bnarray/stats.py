"""Statistics as values (`Moments`) and as shared state (`RunningStats`)."""

import operator
import os
import sys
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial, reduce, wraps
from itertools import count as count_from
from math import inf, isfinite
from typing import Any, NamedTuple, ParamSpec, TypeVar
from weakref import WeakValueDictionary

from bnarray.dispatch import Array, backend, backend_with, default_backend, load, meet, wrapping

Count = Any  # a number, or an array of the features' shape

_P = ParamSpec("_P")
_R = TypeVar("_R")


def explains_momentum(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Let a function answer the keyword `momentum`, which means opposite things in different libraries."""

    @wraps(function)
    def wrapper(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        if "momentum" in kwargs:
            m = kwargs["momentum"]
            complement = f"{1 - m:.12g}" if isinstance(m, int | float) else f"1 - {m}"
            raise TypeError(
                f"momentum={m} is ambiguous; RunningStats and BatchNorm take update_rate, the weight of the new batch: "
                f"update_rate={m} for torch's meaning, update_rate={complement} for Keras's"
            )
        return function(*args, **kwargs)

    return wrapper


_NUMBERS = int, float  # a union would be made at every call


def is_number(count: Count) -> bool:
    """Whether a count is one for all features, and no array."""
    return isinstance(count, _NUMBERS)


class Moments:
    """Count, mean and sum of squared deviations of each feature: an immutable value.

    Parameters
    ----------
    count
        Elements per feature: a number (a sum of weights need not be whole), or an array of the features' shape.
    mean, m2
        Arrays of the features' shape: the mean, and the sum of squared deviations from it. Kept as float64.

    Raises
    ------
    TypeError
        If mean or m2 is no real floating array.
    ValueError
        If the shapes differ, or a count is negative.

    Examples
    --------
    >>> import numpy as np
    >>> import bnarray as bn
    >>> a = bn.moments(np.array([[1.0], [2.0]]))
    >>> b = bn.moments(np.array([[3.0], [4.0], [5.0]]))
    >>> (a + b).mean, (a + b).var()
    (array([3.]), array([2.]))
    """

    __slots__ = ("count", "m2", "mean")

    count: Count
    mean: Array
    m2: Array

    def __init__(self, count: Count, mean: Array, m2: Array) -> None:
        verbs = backend(mean, "mean")
        verbs.check(mean, "mean")
        verbs = backend_with(verbs, "mean", mean, "m2", m2)
        verbs.check(m2, "m2")
        if tuple(mean.shape) != tuple(m2.shape):
            raise ValueError(f"m2 has shape {tuple(m2.shape)}; it should have mean's, {tuple(mean.shape)}")
        if verbs.lowest(m2) < 0:
            raise ValueError("m2 holds a negative number; it is a sum of squares")
        self._set(_checked_count(count, mean), verbs.freeze(verbs.widen(mean)), verbs.freeze(verbs.widen(m2)))

    def _set(self, count: Count, mean: Array, m2: Array) -> None:
        meet()
        for name, value in (("count", count), ("mean", mean), ("m2", m2)):
            object.__setattr__(self, name, value)

    @classmethod
    def of(cls, count: Count, mean: Array, m2: Array) -> "Moments":
        """Take arrays of float64 as they are, without a copy: for backends' results."""
        verbs = backend(mean, "mean")
        self = cls.__new__(cls)
        self._set(count if is_number(count) else verbs.freeze(count), verbs.freeze(mean), verbs.freeze(m2))
        return self

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"Moments cannot be changed, so {name} cannot be set; make new ones")

    def __delattr__(self, name: str) -> None:
        raise AttributeError(f"Moments cannot be changed, so {name} cannot be deleted")

    def __reduce__(self) -> tuple[Any, ...]:
        return Moments, (self.count, self.mean, self.m2)

    def __repr__(self) -> str:
        return f"Moments(count={self.count!r}, mean={self.mean!r}, m2={self.m2!r})"

    def var(self, correction: float = 0) -> Array:
        """Return ``m2 / (count - correction)``, NaN for a feature whose count is not above the correction."""
        return backend(self.m2).variance(self.count, self.m2, correction)

    def merge(self, other: "Moments") -> "Moments":
        """Return the moments of the union of two samples, exactly (Chan, Golub and LeVeque 1979).

        Raises
        ------
        TypeError
            If other is no `Moments`, or of another library.
        ValueError
            If the features' shapes differ.
        """
        if not isinstance(other, Moments):
            raise TypeError(f"other is a {type(other).__name__}; it should be Moments")
        verbs = backend_with(backend(self.mean), "self.mean", self.mean, "other.mean", other.mean)
        if self.mean.shape != other.mean.shape:
            raise ValueError(
                f"other has features of shape {tuple(other.mean.shape)}; it should be {tuple(self.mean.shape)}"
            )
        return Moments.of(*verbs.merge(self.count, self.mean, self.m2, other.count, other.mean, other.m2))

    def __add__(self, other: "Moments") -> "Moments":
        return self.merge(other) if isinstance(other, Moments) else NotImplemented

    @staticmethod
    def merge_all(moments: Iterable["Moments"]) -> "Moments":
        """Return the moments of the union of all, merged in order.

        Raises
        ------
        ValueError
            If there are none.
        """
        samples = (_checked_moments(each) for each in moments)
        try:
            first = next(samples)
        except StopIteration:
            raise ValueError("moments is empty; merge_all needs at least one") from None
        return reduce(Moments.merge, samples, first)


def _checked_moments(moments: object) -> Moments:
    if not isinstance(moments, Moments):
        raise TypeError(f"moments holds a {type(moments).__name__}; it should hold Moments only")
    return moments


def _checked_count(count: Count, like: Array) -> Count:
    if is_number(count):
        if not count >= 0 or not isfinite(count):
            raise ValueError(f"count is {count}; it should be a number >= 0")
        return count
    if not hasattr(count, "shape"):
        try:
            return _checked_count(operator.index(count), like)
        except TypeError:
            raise TypeError(f"count is a {type(count).__name__}; it should be a number or an array") from None
    verbs = wrapping(backend(like), count)
    array = verbs.widen(verbs.convert(count, like))
    if tuple(array.shape) == ():
        return array if verbs.is_symbolic(array) else _checked_count(float(array), like)
    if tuple(array.shape) != tuple(like.shape):
        raise ValueError(f"count has shape {tuple(array.shape)}; it should have the features', {tuple(like.shape)}")
    if not verbs.is_finite(array) or verbs.lowest(array) < 0:
        raise ValueError("count holds a negative number, an infinity or NaN; it should hold numbers >= 0")
    return verbs.freeze(array)


class _State(NamedTuple):
    """One consistent set of running statistics. Never changed, only replaced: a reader needs no lock."""

    count: Count
    mean: Array
    var: Array
    m2: Array | None  # of a cumulative state: what var is computed from
    num_updates: int
    num_skipped: int


# States are exchanged under one lock for all. Nothing is computed under it, and a fork waits for it, so that no child
# inherits a lock that nobody will release.
_replacing = threading.RLock()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=_replacing.acquire, after_in_parent=_replacing.release, after_in_child=_replacing.release
    )

# Compiled code knows a state by its number.
_keys = count_from(1)
_by_key: WeakValueDictionary[int, "RunningStats"] = WeakValueDictionary()


def state_of(key: int) -> "RunningStats":
    """Return the `RunningStats` with a key.

    Raises
    ------
    RuntimeError
        If it is gone.
    """
    stats = _by_key.get(key)
    if stats is None:
        raise RuntimeError("compiled code asks for a RunningStats that exists no longer; compile it anew")
    return stats


# The states that calls in this context do not update.
_frozen: ContextVar[tuple["RunningStats", ...]] = ContextVar("bnarray_frozen", default=())

_PACKAGE = os.path.dirname(__file__)
_FIELDS = ("running_mean", "running_var", "count", "num_updates", "num_skipped")


def _warn(message: str) -> None:
    """Warn at the line outside this package that led here."""
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_PACKAGE):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, RuntimeWarning, stacklevel=level)


def _may_warning_raise() -> bool:
    """Whether the process's filters may make an error of a RuntimeWarning."""
    for action, message, category, module, line in warnings.filters:
        if issubclass(RuntimeWarning, category):
            if action == "error":
                return True
            if message is None and module is None and line == 0:
                return False
    return False


def _nothing() -> None: ...


def replace_states(pairs: Iterable[tuple["RunningStats", "RunningStats"]]) -> None:
    """Let each first one's state become the second's, which is cumulative and of the same correction: all or none."""
    changes = [(stats, stats._state, stats.taken_from(exact)) for stats, exact in pairs]
    with _replacing:
        try:
            for stats, _, after in changes:
                stats._state = after
        except BaseException:
            for stats, before, _ in changes:
                stats._state = before
            raise


class RunningStats:
    """Running mean and variance of each feature: mutable, thread-safe, shared freely.

    Every update replaces the whole state at once: a reader sees mean and variance of one and the same update, and an
    update that raises, or is interrupted, changes nothing.

    Parameters
    ----------
    num_features
        The features' number, or shape.
    update_rate
        The weight of the *new* batch, from 0 to 1: ``running += update_rate * (batch - running)``. None keeps the exact
        statistics of everything seen, however uneven the batches.
    correction
        Subtracted from the count in the running variance: 1 (torch, TensorFlow's fused op) or 0 (Keras, Flax, ONNX).
    nonfinite
        What an update with a NaN or an infinity in any feature does: ``"skip"`` leaves the state, counts the batch in
        `num_skipped` and warns; ``"raise"`` raises `FloatingPointError`; ``"propagate"`` takes it in.
    like
        An array whose library and device the state lives on; NumPy by default.

    Attributes
    ----------
    mean, var
        Arrays of the features' shape, float64, read-only: 0 and 1 before the first update. A cumulative variance is 1
        until its count exceeds `correction`.
    count
        Elements per feature counted so far: a number, or an array after masks that differ between features.
    num_updates, num_skipped
        Batches taken in, and left out as not finite.

    Raises
    ------
    TypeError
        If an argument is of the wrong kind; for ``momentum=``, with the value to pass instead.
    ValueError
        If an argument is out of range.

    Examples
    --------
    >>> import numpy as np
    >>> import bnarray as bn
    >>> stats = bn.RunningStats(1, update_rate=None)
    >>> stats.update(bn.moments(np.array([[1.0], [2.0], [6.0]])))
    >>> stats.mean, stats.var, stats.count
    (array([3.]), array([7.]), 3)
    """

    # What `nonfinite` may be for an update to find out, when it is called, whether numbers are finite.
    _asks_host: tuple[str, ...] = ("skip", "raise")

    def __new__(cls, *args: Any, like: Array | None = None, **kwargs: Any) -> "RunningStats":
        kind: type[RunningStats] = cls
        if like is not None and cls is RunningStats:
            kind = backend(like, "like").stats_type(like)
        return super().__new__(kind)

    @explains_momentum
    def __init__(
        self,
        num_features: int | tuple[int, ...],
        *,
        update_rate: float | None = 0.1,
        correction: float = 1,
        nonfinite: str = "skip",
        like: Array | None = None,
    ) -> None:
        meet()
        self._shape = _checked_shape(num_features)
        self._update_rate = None if update_rate is None else checked_number(update_rate, "update_rate", most=1)
        self._correction = checked_number(correction, "correction")
        if nonfinite not in ("skip", "raise", "propagate"):
            raise ValueError(f"nonfinite is {nonfinite!r}; it should be 'skip', 'raise' or 'propagate'")
        self._nonfinite = nonfinite
        verbs = default_backend() if like is None else backend(like, "like")
        self._state = self._initial(verbs.zeros(self._shape, like))
        self.register()

    def register(self) -> None:
        """Take a key of its own."""
        self.settings = self._shape, self._update_rate, self._correction, self._nonfinite
        self.key = next(_keys)
        _by_key[self.key] = self

    def _initial(self, zeros: Array) -> _State:
        freeze = backend(zeros).freeze
        return _State(0, freeze(zeros), freeze(zeros + 1), None if self._update_rate is not None else zeros, 0, 0)

    # -- What it is ----------------------------------------------------------------------------------------------------

    @property
    def num_features(self) -> int | tuple[int, ...]:
        return self._shape[0] if len(self._shape) == 1 else self._shape

    @property
    def features_shape(self) -> tuple[int, ...]:
        return self._shape

    @property
    def update_rate(self) -> float | None:
        return self._update_rate

    @property
    def correction(self) -> float:
        return self._correction

    @property
    def nonfinite(self) -> str:
        return self._nonfinite

    @property
    def mean(self) -> Array:
        return self._state.mean

    @property
    def var(self) -> Array:
        return self._state.var

    @property
    def count(self) -> Count:
        return self._state.count

    @property
    def num_updates(self) -> int:
        return self._state.num_updates

    @property
    def num_skipped(self) -> int:
        return self._state.num_skipped

    @property
    def state(self) -> _State:
        """Everything, of one and the same update."""
        return self._state

    def mean_and_var(self) -> tuple[Array, Array]:
        """Return mean and variance of one and the same update."""
        state = self._state
        return state.mean, state.var

    def followed(self) -> tuple[Array, ...]:
        """Return what of the state a library may follow through a call."""
        state = self._state
        return state.mean, state.var

    def __repr__(self) -> str:
        state = self._state
        return (
            f"RunningStats({self.num_features}, update_rate={self._update_rate}, correction={self._correction}, "
            f"nonfinite={self._nonfinite!r}) <num_updates={state.num_updates}, num_skipped={state.num_skipped}>"
        )

    # -- Updates -------------------------------------------------------------------------------------------------------

    def update(self, moments: Moments) -> None:
        """Take in a batch's moments, all or nothing.

        Raises
        ------
        TypeError
            If moments is no `Moments`.
        ValueError
            If the features' shapes differ; for an exponential state, if the count does not exceed the correction.
        FloatingPointError
            If a number is not finite and ``nonfinite="raise"``.
        """
        self._check_batch(moments)
        backend(moments.mean).prepare(self, moments.count, moments.mean, moments.m2)()

    def _check_batch(self, moments: Moments) -> None:
        if not isinstance(moments, Moments):
            raise TypeError(f"moments is a {type(moments).__name__}; it should be Moments: see bnarray.moments")
        if tuple(moments.mean.shape) != self._shape:
            raise ValueError(f"moments has features of shape {tuple(moments.mean.shape)}; it should be {self._shape}")

    def check_known(self, known: bool) -> None:
        """Raise if an update would follow from what is not known when the call is made, but when its program runs."""
        if not known and not self.is_frozen():
            raise TypeError(
                "stats would have to change while a program is being made of the call (jit, grad, vmap); take "
                "m = bnarray.moments(x) and return stats.updated(m)"
            )

    def is_sure(self, count: int) -> bool:
        """Whether `prepare` raises for no batch with so many values of a feature, whatever they are."""
        if self._nonfinite in self._asks_host and (self._nonfinite == "raise" or _may_warning_raise()):
            return False
        return self._update_rate is None or count > self._correction

    def prepare(self, count: Count, mean: Array, m2: Array) -> Callable[[], None]:
        """Decide what an update with a batch does, raise or warn if it must, and return the function that does it."""
        if self.is_frozen():
            return _nothing
        verbs = backend(mean)
        self.check_known(not verbs.is_symbolic(count, mean, m2))
        lowest = count if is_number(count) else verbs.lowest(count)
        if lowest == 0:
            return _nothing
        if self._update_rate is not None and lowest <= self._correction:
            raise ValueError(
                f"the batch has {lowest:g} value(s) of a feature, too few for a running variance with correction "
                f"{self._correction:g}; give larger batches, or correction=0, or update_rate=None"
            )
        if self._nonfinite in self._asks_host and not verbs.is_finite(mean, m2):
            if self._nonfinite == "raise":
                raise FloatingPointError(
                    "the batch's statistics hold a NaN or an infinity; the running ones are unchanged"
                )
            _warn("the batch's statistics hold a NaN or an infinity; the running ones skip it (see num_skipped)")
            return self.skip
        return partial(self._take_in, count, mean, m2)

    def _replace(self, change: Callable[[_State], _State]) -> None:
        """Exchange the state for a changed one; begin again if another thread was faster."""
        while not self._exchange(before := self._state, change(before)):
            pass

    def _exchange(self, before: _State, after: _State) -> bool:
        with _replacing:
            is_current = self._state is before
            if is_current:
                self._state = after
        return is_current

    def is_frozen(self) -> bool:
        """Whether calls in this context leave the state alone."""
        return self in _frozen.get()

    def exchange(self, before: _State, count: int, mean: Array, var: Array) -> bool:
        """Take in what a batch makes of an exponential state, unless that has changed meanwhile; return whether."""
        total, _, _, _, num_updates, num_skipped = before
        return self._exchange(before, _State(total + count, mean, var, None, num_updates + 1, num_skipped))

    def skip(self) -> None:
        """Count a batch that is left out."""
        self._replace(lambda state: state._replace(num_skipped=state.num_skipped + 1))

    def _take_in(self, count: Count, mean: Array, m2: Array) -> None:
        like = self._state.mean
        verbs = backend(like)
        count = count if is_number(count) else verbs.convert(count, like)
        batch = count, verbs.convert(mean, like), verbs.convert(m2, like)
        self._replace(lambda state: self._after(state, batch, num_updates=1))

    def _after(self, state: _State, batch: tuple[Count, Array, Array], num_updates: int) -> _State:
        verbs = backend(state.mean)
        num_updates += state.num_updates
        if self._update_rate is None:
            count, mean, m2 = verbs.merge(state.count, state.mean, state.m2, *batch)
            var = verbs.variance(count, m2, self._correction, 1.0)
            return self._held(_State(count, mean, var, m2, num_updates, state.num_skipped))
        mean, var = verbs.update_stats(state.mean, state.var, batch, self._update_rate, self._correction)
        count = state.count + batch[0]
        if not is_number(count):
            count = verbs.freeze(count)
        return _State(count, mean, var, None, num_updates, state.num_skipped)

    def _held(self, state: _State) -> _State:
        """The state with arrays that nobody can change."""
        freeze = backend(state.mean).freeze
        count = state.count if is_number(state.count) else freeze(state.count)
        m2 = None if state.m2 is None else freeze(state.m2)
        return state._replace(count=count, mean=freeze(state.mean), var=freeze(state.var), m2=m2)

    def updated(self, moments: Moments) -> "RunningStats":
        """Return what `update` would make of this, leaving it as it is: for functional code.

        While a program is being made of the call (``jax.jit``), no value can be looked at: a batch that `update` would
        refuse is then one more skipped, without a word.
        """
        self._check_batch(moments)
        batch = moments.count, moments.mean, moments.m2
        if backend(moments.mean).is_symbolic(*batch):
            return self.to(moments.mean)._updated_unseen(*batch)
        if backend(self._state.mean).is_symbolic(*self._state):
            verbs, like = backend(self._state.mean), self._state.mean
            return self._updated_unseen(
                moments.count, verbs.convert(moments.mean, like), verbs.convert(moments.m2, like)
            )
        new = self.copy()
        new.update(moments)
        return new

    def _updated_unseen(self, count: Count, mean: Array, m2: Array) -> "RunningStats":
        """What an update makes of this, whatever the values will be."""
        verbs, new, before = backend(self._state.mean), self.copy(), self._state
        correction = None if self._update_rate is None else self._correction
        nothing, refused = verbs.refusal(count, mean, m2, correction, self._nonfinite == "propagate")
        after = self._after(before, (count, mean, m2), num_updates=1)
        kept = before._replace(num_skipped=before.num_skipped + verbs.choose(refused, 1, 0))
        chosen: list[Any] = [
            None if old is None else verbs.choose(nothing | refused, old, now)
            for old, now in zip(kept, after, strict=True)
        ]
        new._state = _State(*chosen)
        return new

    def merge(self, other: "RunningStats") -> None:
        """Take in everything that another cumulative state has seen, exactly.

        Raises
        ------
        TypeError
            If other is no `RunningStats`.
        ValueError
            If either is an exponential average, or the features' shapes differ.
        """
        if not isinstance(other, RunningStats):
            raise TypeError(f"other is a {type(other).__name__}; it should be a RunningStats")
        if self._update_rate is not None or other._update_rate is not None:
            raise ValueError(
                "an exponential average does not hold what it has forgotten, so two of them have no exact merge; "
                "make both with update_rate=None"
            )
        if other._shape != self._shape:
            raise ValueError(f"other has features of shape {other._shape}; it should be {self._shape}")
        theirs = other.to(self._state.mean)._state

        def joined(state: _State) -> _State:
            merged = self._after(state, (theirs.count, theirs.mean, theirs.m2), theirs.num_updates)
            return merged._replace(num_skipped=merged.num_skipped + theirs.num_skipped)

        self._replace(joined)

    def taken_from(self, exact: "RunningStats") -> _State:
        """Return the state that a cumulative one is for this."""
        state = exact.to(self._state.mean)._state
        return state if self._update_rate is None else state._replace(m2=None)

    def reset(self) -> None:
        """Forget everything: mean 0, variance 1, counts 0."""
        fresh = self._initial(backend(self._state.mean).zeros(self._shape, self._state.mean))
        self._replace(lambda state: fresh)

    @contextmanager
    def frozen(self) -> Iterator["RunningStats"]:
        """Make calls inside, in this thread (context) only, leave the state alone: for recomputation and probing."""
        token = _frozen.set((*_frozen.get(), self))
        try:
            yield self
        finally:
            _frozen.reset(token)

    # -- Copies --------------------------------------------------------------------------------------------------------

    def copy(self) -> "RunningStats":
        """Return an independent copy: one consistent snapshot."""
        return self._like_this(RunningStats, self.__dict__)

    @staticmethod
    def _like_this(kind: type["RunningStats"], attributes: Mapping[str, Any]) -> "RunningStats":
        new = RunningStats.__new__(kind)
        new.__dict__.update(attributes)
        new.register()
        return new

    def to(self, like: Array) -> "RunningStats":
        """Return a copy that lives on like's library and device."""
        verbs, state = backend(like, "like"), self._state
        settings = {name: value for name, value in self.__dict__.items() if name != "_state"}
        new = self._like_this(verbs.stats_type(like), settings)
        count = state.count if is_number(state.count) else verbs.convert(state.count, like)
        m2 = None if state.m2 is None else verbs.convert(state.m2, like)
        mean, var = verbs.convert(state.mean, like), verbs.convert(state.var, like)
        new._state = new._held(state._replace(count=count, mean=mean, var=var, m2=m2))
        return new

    def __deepcopy__(self, memo: dict[int, Any]) -> "RunningStats":
        return self.copy()

    def __setstate__(self, attributes: dict[str, Any]) -> None:
        self.__dict__.update(attributes)
        self.register()
        self._state = self._held(self._state)

    def state_dict(self) -> dict[str, Any]:
        """Return a consistent snapshot: running_mean, running_var, count, num_updates, num_skipped."""
        state = self._state
        copy = backend(state.mean).copy
        count = state.count if is_number(state.count) else copy(state.count)
        return dict(
            zip(_FIELDS, (copy(state.mean), copy(state.var), count, state.num_updates, state.num_skipped), strict=True)
        )

    def load_state_dict(self, d: Mapping[str, Any]) -> None:
        """Take over a snapshot; the library and device stay this state's.

        A cumulative state whose count does not exceed the correction has no variance yet, and a snapshot no room for
        what it knows instead (`save` has): it goes on as if its values so far were equal.

        Raises
        ------
        KeyError
            If a field is missing.
        TypeError, ValueError
            If a field has another kind or shape, or a value that no statistics have. The state is then as it was.
        """
        check_mapping(d)
        missing = [field for field in _FIELDS if field not in d]
        if missing:
            raise KeyError(f"the state lacks {', '.join(missing)}")
        mean, var = (self._loaded(d[field], field) for field in _FIELDS[:2])
        verbs = backend(mean)
        if not verbs.is_finite(mean, var) and self._nonfinite != "propagate":
            raise ValueError("running_mean or running_var holds a NaN or an infinity")
        if verbs.lowest(var) < 0:
            raise ValueError("running_var holds a negative number")
        count = _checked_count(d["count"], mean)
        num_updates, num_skipped = (_checked_whole(d[field], field) for field in _FIELDS[3:])
        m2 = None
        if self._update_rate is None:
            # Of the squares below a count that does not exceed the correction, var tells nothing.
            m2 = verbs.sum_of_squares(count, var, self._correction)
            var = verbs.only_above(count, var, self._correction)
        loaded = self._held(_State(count, mean, var, m2, num_updates, num_skipped))
        self._replace(lambda state: loaded)

    def _loaded(self, array: Array, name: str) -> Array:
        verbs = backend(array, name)
        verbs.check(array, name)
        if tuple(array.shape) != self._shape:
            raise ValueError(f"{name} has shape {tuple(array.shape)}; it should be {self._shape}")
        like = self._state.mean
        return backend(like).widen(backend(like).convert(array, like))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write everything to a file, beside its place and then renamed: at any moment it is the old one or the new.

        Parameters
        ----------
        path
            A name that ends in ``.safetensors`` chooses that format (``pip install 'bnarray[safetensors]'``); under any
            other name the file is an ``.npz``, without pickles.

        Raises
        ------
        OSError
            If the file cannot be written; an older one is then as it was.
        ImportError
            If the format's package is not installed.
        """
        state = self._state
        verbs = backend(state.mean)
        arrays = {"mean": state.mean, "var": state.var, **({} if state.m2 is None else {"m2": state.m2})}
        plain = is_number(state.count)
        load("_archive").write(
            path,
            {name: verbs.to_numpy(array) for name, array in arrays.items()}
            | {"count": state.count if plain else verbs.to_numpy(state.count)},
            update_rate=self._update_rate,
            correction=self._correction,
            nonfinite=self._nonfinite,
            num_updates=state.num_updates,
            num_skipped=state.num_skipped,
        )

    @staticmethod
    def load(path: str | os.PathLike[str]) -> "RunningStats":
        """Read what `save` wrote, into NumPy (see `to`).

        A file may come from anywhere: nothing in it is run, and the memory taken is a small multiple of its size.

        Raises
        ------
        OSError
            If the file cannot be read.
        ImportError
            If the package of its format is not installed.
        ValueError
            If it is damaged, of an unknown version, no saved statistics, or holds what no statistics are.
        """
        arrays, settings = load("_archive").read(path)
        try:
            return RunningStats._restored(arrays, settings)
        except (TypeError, ValueError, KeyError) as error:
            raise ValueError(f"{os.fspath(path)!r} holds no statistics saved by bnarray: {error}") from error

    @staticmethod
    def _restored(arrays: dict[str, Any], settings: dict[str, Any]) -> "RunningStats":
        updates, skipped = settings.pop("num_updates"), settings.pop("num_skipped")
        stats = RunningStats(arrays["mean"].shape, **settings)
        count = arrays["count"].item() if arrays["count"].shape == () else arrays["count"]
        saved = arrays["mean"], arrays["var"], count, updates, skipped
        stats.load_state_dict(dict(zip(_FIELDS, saved, strict=True)))
        if stats._update_rate is None:
            moments = Moments(count, arrays["mean"], stats._loaded(arrays["m2"], "m2"))
            if stats._nonfinite != "propagate" and not backend(moments.m2).is_finite(moments.m2):
                raise ValueError("m2 holds a NaN or an infinity")
            stats._state = stats._held(stats._state._replace(m2=moments.m2))
        return stats


def checked_number(value: object, name: str, *, most: float | None = None) -> float:
    """Return value if it is a number from 0 (to `most`)."""
    if type(value) is float and 0 <= value < inf and most is None:  # nearly always
        return value
    try:
        if isinstance(value, str | bytes):
            raise TypeError
        number = float(value)  # type: ignore[arg-type]  # whatever it is, it says itself
    except OverflowError:
        number = inf
    except (TypeError, ValueError):
        raise TypeError(f"{name} is {value!r}; it should be a number") from None
    if not number >= 0 or not isfinite(number) or (most is not None and number > most):
        span = "a finite number >= 0" if most is None else f"from 0 to {most:g}"
        raise ValueError(f"{name} is {value!r}; it should be {span}")
    return number


def check_mapping(d: object) -> None:
    """Raise if what is to be loaded is no mapping."""
    if not isinstance(d, Mapping):
        raise TypeError(f"the state is a {type(d).__name__}; it should be a mapping, as state_dict returns it")


def _checked_whole(value: object, name: str) -> int:
    try:
        number = operator.index(value)  # type: ignore[arg-type]  # whatever it is, it says itself
    except TypeError:
        raise TypeError(f"{name} is {value!r}; it should be an integer") from None
    if number < 0:
        raise ValueError(f"{name} is {number}; it should be >= 0")
    return number


def _checked_shape(num_features: object) -> tuple[int, ...]:
    given = num_features if isinstance(num_features, tuple) else (num_features,)
    try:
        shape = tuple(operator.index(size) for size in given)
    except TypeError:
        raise TypeError(f"num_features is {num_features!r}; it should be an integer or a tuple of integers") from None
    if any(size < 0 for size in shape):
        raise ValueError(f"num_features is {num_features!r}; it should not be negative")
    return shape
