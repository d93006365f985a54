"""Any shape, strides, axes and masks."""

from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

import bnarray as bn
from bnarray.testing import TOLERANCES, assert_close, reference
from tests.cases import DTYPES


@st.composite
def arrays(draw: st.DrawFn) -> tuple[np.ndarray, tuple[int, ...]]:
    """Draw an array with any order of axes in memory, steps (negative and zero too) and gaps; and its kept axes."""
    ndim = draw(st.integers(1, 6))
    shape = tuple(draw(st.lists(st.integers(1, 7), min_size=ndim, max_size=ndim)))
    steps = draw(st.lists(st.sampled_from([1, 1, 1, 2, 3, -1, -2, 0]), min_size=ndim, max_size=ndim))
    order = draw(st.permutations(range(ndim)))
    dtype = draw(st.sampled_from(list(DTYPES)))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    held = [max(1, abs(step)) * size if step else 1 for step, size in zip(steps, shape, strict=True)]
    memory = rng.normal(rng.normal(0, 10), rng.uniform(0.1, 5), [held[i] for i in order]).astype(DTYPES[dtype])
    x = memory.transpose(np.argsort(order))
    x = x[tuple(slice(None, None, step or None) for step in steps)]
    x = np.broadcast_to(x, shape)
    kept = tuple(sorted(draw(st.sets(st.integers(0, ndim - 1)))))
    return x, kept


@st.composite
def weights(draw: st.DrawFn, shape: tuple[int, ...]) -> np.ndarray | None:
    """Draw a `where` that broadcasts to a shape, or none."""
    if draw(st.booleans()):
        return None
    missing = draw(st.integers(0, len(shape)))
    own = tuple(size if draw(st.booleans()) else 1 for size in shape[missing:])
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    mask = rng.random(own) < draw(st.sampled_from([0.0, 0.5, 0.9, 1.0]))
    dtype: Any = draw(st.sampled_from([np.bool, np.float16, np.float32, np.float64]))
    return mask if dtype is np.bool else (mask * rng.uniform(0.5, 3, own)).astype(dtype)


@settings(max_examples=400, deadline=None)
@given(st.data())
def test_forward_and_backward(data: st.DataObject) -> None:
    x, kept = data.draw(arrays())
    where = data.draw(weights(x.shape))
    relu, affine = data.draw(st.booleans()), data.draw(st.booleans())
    rng = np.random.default_rng(x.size)
    features = tuple(x.shape[i] for i in kept)
    call: dict[str, Any] = {"where": where, "eps": 1e-2}
    if affine:
        call |= {"weight": np.asarray(rng.normal(size=features)), "bias": np.asarray(rng.normal(size=features))}
    dy = rng.normal(size=x.shape).astype(x.dtype)
    truth, tolerance = reference(x, dy, kept, relu=relu, **call), TOLERANCES[x.dtype.name]
    y, saved = bn.batch_norm_forward(x, axis=kept, activation="relu" if relu else None, **call)
    assert_close(y, truth.y, truth.y_scale, tolerance, tolerance.y)
    gradients = bn.batch_norm_backward(dy, saved)
    clear_of_the_kink = (abs(truth.y) > 1e-6 * truth.y_scale) | (truth.y == 0) if relu else np.ones(x.shape, bool)
    if clear_of_the_kink.all():
        assert_close(gradients.x, truth.dx, truth.dx_scale, tolerance, tolerance.dx)
    np.testing.assert_allclose(
        np.broadcast_to(saved.moments.count, features), truth.count.reshape(features), rtol=1e-12
    )


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_in_place_and_into_any_memory(data: st.DataObject) -> None:
    x, kept = data.draw(arrays())
    expected = bn.batch_norm(x, axis=kept)
    if all(step for step, size in zip(x.strides, x.shape, strict=True) if size > 1):
        mine = np.lib.stride_tricks.as_strided  # keeps x's strides in memory of its own
        low = sum(min(0, step * (size - 1)) for step, size in zip(x.strides, x.shape, strict=True))
        high = sum(max(0, step * (size - 1)) for step, size in zip(x.strides, x.shape, strict=True))
        buffer = np.zeros((high - low) // x.itemsize + 1, x.dtype)
        copied = mine(buffer[-low // x.itemsize :], x.shape, x.strides)
        copied[...] = x
        assert bn.batch_norm(copied, axis=kept, out=copied) is copied
        np.testing.assert_array_equal(copied, expected)
    out = np.zeros([2 * size for size in x.shape], x.dtype)[tuple(slice(None, None, 2) for _ in x.shape)].T.copy().T
    bn.batch_norm(x, axis=kept, out=out)
    np.testing.assert_array_equal(out, expected)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_any_partition_merges_to_the_whole(data: st.DataObject) -> None:
    x, kept = data.draw(arrays())
    where = data.draw(weights(x.shape))
    free = [i for i in range(x.ndim) if i not in kept]
    if not free:
        return
    axis = data.draw(st.sampled_from(free))
    cuts = sorted(data.draw(st.lists(st.integers(0, x.shape[axis]), max_size=4)))
    full = None if where is None else np.broadcast_to(where, x.shape)
    parts = [
        bn.moments(part, axis=kept, where=None if full is None else mask)
        for part, mask in zip(
            np.split(x, cuts, axis=axis),
            np.split(x if full is None else full, cuts, axis=axis),
            strict=True,
        )
    ]
    merged, whole = bn.Moments.merge_all(parts), bn.moments(x, axis=kept, where=full)
    scale = np.abs(x.astype(np.float64)).max()
    np.testing.assert_allclose(np.broadcast_to(merged.count, whole.mean.shape), whole.count, rtol=1e-12)
    near = 1e-7 if x.dtype.itemsize == 2 else 1e-13  # halves are summed in float32, tile by tile
    np.testing.assert_allclose(merged.mean, whole.mean, rtol=1e-12, atol=near * scale)
    np.testing.assert_allclose(merged.m2, whole.m2, rtol=1e-5, atol=1e-10 * scale**2)


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_any_order_of_batches_is_the_population(data: st.DataObject) -> None:
    """In batches of any sizes, empty ones too, by one state or by several that are merged."""
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    x = rng.normal(rng.normal(0, 100, 3), rng.uniform(0.1, 9, 3), (data.draw(st.integers(2, 300)), 3))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(x)), max_size=12)))
    batches = data.draw(st.permutations(np.split(x, cuts)))
    workers = [bn.RunningStats(3, update_rate=None) for _ in range(data.draw(st.integers(1, 4)))]
    for batch in batches:
        bn.batch_norm(batch, stats=data.draw(st.sampled_from(workers)))
    first, *others = data.draw(st.permutations(workers))
    for other in others:
        first.merge(other)
    np.testing.assert_allclose(first.mean, x.mean(axis=0), rtol=1e-12, atol=1e-12 * abs(x).max())
    np.testing.assert_allclose(first.var, x.var(axis=0, ddof=1), rtol=1e-12)
    assert first.count == len(x)
    assert first.num_updates == sum(len(batch) > 0 for batch in batches)
