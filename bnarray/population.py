"""Exact statistics for the layers of a trained network."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

from bnarray.layer import BatchNorm
from bnarray.stats import RunningStats, replace_states


def population_stats(
    layers: Sequence[BatchNorm],
    batches: Iterable[Any] | Callable[[], Iterable[Any]],
    forward: Callable[[Any], Any],
) -> None:
    """Give the layers of a trained network the exact statistics of the whole data, in place of running averages.

    Layer by layer: a sweep over all batches takes the exact moments of the layer's input, while the layers before it
    evaluate with the statistics that they have got already. (An average over batches, of one sweep for all layers, is
    neither: it weighs uneven batches alike, leaves out how their means differ, and sees inputs that other statistics
    have made.) That is ``len(layers)`` sweeps, each through the whole network.

    Parameters
    ----------
    layers
        The network's layers, each once, in the order in which `forward` calls them. Layers that are left out are as
        their mode says: put them into evaluation.
    batches
        What can be gone through again and again: a list, an array, a data set; or a function that returns an iterable
        of all batches. Empty batches do not count; their order does not matter, nor do their sizes.
    forward
        Runs the network on a batch, calling every layer once at most, and not from inside a compiled program. Masks
        (``where=``) that it gives to a layer hold.

    Raises
    ------
    TypeError
        If an argument is of the wrong kind; if batches is an iterator, which can be gone through once.
    ValueError
        If a layer is not called, called twice in one go, or called before one that the list has before it; if two share
        their statistics; if there is nothing to count.
    FloatingPointError
        If a number is not finite, and the layer's statistics say ``nonfinite="raise"``. With ``"skip"``, batches are
        left out with a warning, for the layers that see them.

    Notes
    -----
    Whatever is raised, all layers are then as they were, and so are modes and gradients always. The layers are not
    to be used by other threads meanwhile. Afterwards the statistics have the counts of the one sweep, and the variances
    their own `correction`.

    Examples
    --------
    >>> import numpy as np
    >>> import bnarray as bn
    >>> layer = bn.BatchNorm(1)
    >>> bn.population_stats([layer], [np.array([[1.0], [2.0]]), np.array([[6.0]])], layer)
    >>> layer.stats.mean, layer.stats.var, layer.stats.count
    (array([3.]), array([7.]), 3)
    """
    layers = _checked_layers(layers)
    if not callable(forward):
        raise TypeError(f"forward is a {type(forward).__name__}; it should be a function of a batch")
    sweep = _checked_batches(batches)
    own = [layer.stats for layer in layers]
    exact = [_collector(stats) for stats in own]
    with _borrowed(layers) as calls:
        for layer in layers:
            layer.training = False
        for number, layer in enumerate(layers):
            layer.stats, layer.training = exact[number], True
            _measure(number, exact[number], sweep(), forward, calls)
            layer.training = False
    replace_states(zip(own, exact, strict=True))


def _measure(
    number: int, stats: RunningStats, batches: Iterable[Any], forward: Callable[[Any], Any], calls: list[int]
) -> None:
    """Let the layer of this number see all batches."""
    was_called = False
    for batch in batches:
        calls.clear()
        forward(batch)
        _check_calls(calls)
        was_called |= number in calls
    if not was_called:
        raise ValueError(f"forward did not call layers[{number}], or batches gave no batch")
    if stats.num_updates == 0:
        raise ValueError(f"layers[{number}] has seen no values that count ({stats.num_skipped} batches were skipped)")


def _check_calls(calls: list[int]) -> None:
    for before, after in pairwise(calls):
        if before > after:
            raise ValueError(f"forward calls layers[{before}] before layers[{after}]; give them in its order")
    for number in calls:
        if calls.count(number) > 1:
            raise ValueError(
                f"forward calls layers[{number}] {calls.count(number)} times: what it sees would depend on its own "
                f"statistics; give every call a layer of its own"
            )


@contextmanager
def _borrowed(layers: list[BatchNorm]) -> Iterator[list[int]]:
    """Yield a list to which the layers add their numbers when they are called; afterwards they are as before."""
    calls: list[int] = []
    before = [dict(layer.__dict__) for layer in layers]
    try:
        for number, layer in enumerate(layers):
            layer.on_call = lambda number=number: calls.append(number)
        yield calls
    finally:
        for layer, attributes in zip(layers, before, strict=True):
            layer.__dict__.update(attributes)


def _collector(stats: RunningStats) -> RunningStats:
    """Exact statistics of the same kind, of nothing yet."""
    return RunningStats(
        stats.features_shape,
        update_rate=None,
        correction=stats.correction,
        nonfinite=stats.nonfinite,
        like=stats.mean,
    )


def _checked_layers(layers: Sequence[BatchNorm]) -> list[BatchNorm]:
    if isinstance(layers, BatchNorm) or not isinstance(layers, Iterable):
        raise TypeError(f"layers is a {type(layers).__name__}; it should be a list of BatchNorm")
    found = list(layers)
    if not found:
        raise ValueError("layers is empty; it should be the network's layers")
    seen: dict[int, int] = {}
    for number, layer in enumerate(found):
        if not isinstance(layer, BatchNorm):
            raise TypeError(f"layers[{number}] is a {type(layer).__name__}; it should be a BatchNorm")
        first = seen.setdefault(id(layer.stats), number)
        if first != number:
            what = "are the same" if found[first] is layer else "share their stats"
            raise ValueError(
                f"layers[{first}] and layers[{number}] {what}: what one sees would depend on the other's statistics"
            )
    return found


def _checked_batches(batches: Iterable[Any] | Callable[[], Iterable[Any]]) -> Callable[[], Iterable[Any]]:
    if isinstance(batches, Iterator):
        raise TypeError(
            f"batches is a {type(batches).__name__}, which can be gone through only once; give a list, or a function "
            f"that returns a new iterator"
        )
    if isinstance(batches, Iterable):
        return lambda: batches
    if not callable(batches):
        raise TypeError(f"batches is a {type(batches).__name__}; it should be a list of batches, or a function")
    return _of_one_number(batches)


def _of_one_number(batches: Callable[[], Iterable[Any]]) -> Callable[[], Iterable[Any]]:
    """Make sure that every sweep has as many batches: a function may return what is used up."""
    first: int | None = None

    def sweep() -> Iterator[Any]:
        nonlocal first
        number = 0
        for batch in batches():
            yield batch
            number += 1
        if first is not None and number != first:
            raise ValueError(f"batches gave {first} batches, and the next time {number}")
        first = number

    return sweep
