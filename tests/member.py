"""What one process of a group checks: ``mpiexec -n 2 python -m tests.member mpi``, or started by a test for gloo."""

import gc
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import numpy as np
import pytest

import bnarray as bn
from bnarray import sync


@contextmanager
def opened(transport: str, place: str = "", rank: str = "0", size: str = "1", seconds: str = "60") -> Iterator[Any]:
    if transport == "mpi":
        from mpi4py import MPI

        yield MPI.COMM_WORLD
    else:
        import torch.distributed as dist

        limit = timedelta(seconds=int(seconds))
        dist.init_process_group("gloo", f"file://{place}", limit, int(size), int(rank))
        try:
            yield dist.group.WORLD
        finally:
            dist.destroy_process_group()


def check_numbers(group: Any, dtype: type, uneven: bool, masked: bool) -> None:
    """Like one process on the concatenated batch, and the same bits on every rank."""
    members = sync.members(group)
    rng = np.random.default_rng(0)  # the same on every rank
    x, dy, residual = rng.normal(3, 2, (3, 21, 5, 4)).astype(dtype)
    weight, bias = rng.normal(size=(2, 5))
    where = rng.random((21, 5, 4)) < 0.7 if masked else None
    ends = [0, *([1] * (members.size - 1)), 21] if uneven else np.linspace(0, 21, members.size + 1).astype(int)
    own = slice(ends[members.rank], ends[members.rank + 1])
    options: dict[str, Any] = {"activation": "relu"}
    stats, own_stats = bn.RunningStats(5), bn.RunningStats(5)
    y, saved = bn.batch_norm_forward(x, weight, bias, stats=stats, where=where, residual=residual, **options)
    expected = bn.batch_norm_backward(dy, saved)
    own_where = None if where is None else where[own]
    own_y, own_saved = bn.batch_norm_forward(
        x[own], weight, bias, stats=own_stats, where=own_where, residual=residual[own], group=group, **options
    )
    found = bn.batch_norm_backward(dy[own], own_saved)
    close = {"rtol": 1e-12, "atol": 1e-12} if dtype is np.float64 else {"rtol": 1e-6, "atol": 2e-6}
    np.testing.assert_allclose(own_y, y[own], **close)
    np.testing.assert_allclose(found.x, expected.x[own], **close)
    np.testing.assert_allclose(found.residual, expected.residual[own], **close)
    gradients = members.allgather(np.concatenate([found.weight, found.bias]))
    summed = np.concatenate([expected.weight, expected.bias])
    np.testing.assert_allclose(gradients.sum(axis=0), summed, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(own_stats.var, stats.var, rtol=1e-12 if dtype is np.float64 else 1e-6)
    m = bn.moments(x[own], where=own_where, group=group)
    np.testing.assert_array_equal(m.m2, own_saved.moments.m2)
    same = members.allgather(np.concatenate([m.mean, m.m2, own_stats.mean, own_stats.var]))
    np.testing.assert_array_equal(same, np.broadcast_to(same[0], same.shape))


def check_errors(group: Any) -> None:
    """A disagreement, and an error of one, are errors of all; then the group works as before."""
    members = sync.members(group)
    last = members.rank == members.size - 1
    x = np.ones((4, 3))
    with pytest.raises(ValueError, match=r"the features' shape .* eps "):
        bn.batch_norm(x[:, :2] if last else x, eps=1e-3 if last else 1e-5, group=group)
    error, message = (ValueError, "where holds") if last else (RuntimeError, f"rank {members.size - 1} of the group")
    with pytest.raises(error, match=message):
        bn.batch_norm(x, where=-x if last else None, group=group)
    assert bn.moments(x, group=group).count == 4 * members.size


def check_torch(group: Any) -> None:
    """torch's autograd, forward and backward, and a second time through the same graph."""
    import torch

    members = sync.members(group)
    values = torch.from_numpy(np.random.default_rng(0).normal(size=(9, 4)))
    x, weight = values.clone().requires_grad_(), torch.linspace(0.5, 2, 4, requires_grad=True)
    (bn.batch_norm(x, weight, activation="relu") ** 3).sum().backward()
    own = slice(0, 3) if members.rank == 0 else slice(3, 9) if members.rank == 1 else slice(9, 9)
    own_x, own_weight = values[own].clone().requires_grad_(), weight.detach().clone().requires_grad_()
    loss = (bn.batch_norm(own_x, own_weight, activation="relu", group=group) ** 3).sum()
    loss.backward(retain_graph=True)
    np.testing.assert_allclose(own_x.grad, x.grad[own], rtol=1e-11, atol=1e-11)
    summed = members.allgather(own_weight.grad.numpy().astype(np.float64)).sum(axis=0)
    np.testing.assert_allclose(summed, weight.grad, rtol=1e-5)
    loss.backward()
    np.testing.assert_allclose(own_x.grad, 2 * x.grad[own], rtol=1e-11, atol=1e-11)


def main() -> None:
    what, *where = sys.argv[1:]
    with opened(*where) as group:
        if what == "all":
            for dtype in (np.float64, np.float32):
                for uneven in (False, True):
                    for masked in (False, True):
                        check_numbers(group, dtype, uneven, masked)
            check_errors(group)
        elif what == "torch":
            check_torch(group)
        elif what == "dies" and sync.members(group).rank == 1:
            raise SystemExit(1)
        elif what == "sleeps" and sync.members(group).rank == 1:
            time.sleep(8)
        elif what in ("dies", "sleeps"):
            bn.moments(np.ones((4, 3)), group=group)
        print(f"{what} {sync.members(group).rank}", flush=True)
    # torch aborts one process in ten, of its own too, where the group lives until the interpreter ends: in a cycle of
    # what autograd kept, for one.
    del group
    gc.collect()


if __name__ == "__main__":
    main()
