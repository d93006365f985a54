"""One batch over several processes: how the members of a group find out that they agree, and what they exchange.

A pass gathers twice. First a header of fixed size, from which every member learns whether all make the same call, or
whether one raised before it came here: then all raise, and nobody waits for numbers that will not come. Then the
numbers of each feature. Every member merges them in the order of ranks, so that all have the same bits.
"""

import operator
from contextlib import suppress
from functools import lru_cache, reduce
from hashlib import blake2b
from typing import Any, NoReturn, Protocol

import numpy as np
import numpy.typing as npt

from bnarray.dispatch import Array, Verbs
from bnarray.kernels.merge import merge
from bnarray.stats import is_number
from bnarray.steps import Statistics

Floats = npt.NDArray[np.float64]

# What members have to agree in, in the header's order.
_TERMS = (
    *("function", "the features' shape", "axis", "dtype", "eps", "activation"),
    *("whether there is a weight", "whether there is a bias", "whether there is a residual"),
    *("whether autograd follows the call", "the settings of stats"),
)

# How a count is known: the greatest of the members' is how the merged one is.
_WHOLE, _NUMBER, _VECTOR = range(3)


class Members(Protocol):
    """What is asked of a communicator."""

    @property
    def rank(self) -> int: ...

    @property
    def size(self) -> int: ...

    def allgather(self, array: Floats) -> Any:
        """Return the arrays of all members, one row each, by rank; all come with arrays of one length."""


class _Mpi:
    """A communicator of mpi4py, by the method that sends memory: the lower-case one pickles."""

    def __init__(self, group: Any) -> None:
        if not group or group.Is_inter():
            raise ValueError("group is a communicator without members, or between two groups; it should be one group's")
        self._group = group
        self.rank, self.size = group.Get_rank(), group.Get_size()

    def allgather(self, array: Floats) -> Floats:
        rows = np.empty((self.size, array.size))
        self._group.Allgather(array, rows)
        return rows


class _Torch:
    """A process group of torch.distributed, over any of its backends."""

    def __init__(self, group: Any) -> None:
        import torch

        self._torch, self._group = torch, group
        self.rank, self.size = torch.distributed.get_rank(group), torch.distributed.get_world_size(group)
        if self.rank < 0:
            raise ValueError("group is one that this process is no member of")

    def _device(self) -> Any:
        """Where the backend takes tensors from: NCCL has no other place than a GPU."""
        names = str(self._torch.distributed.get_backend(self._group))
        return self._torch.device("cuda" if names == "nccl" else "cpu")

    def allgather(self, array: Floats) -> Floats:
        row = self._torch.from_numpy(array).to(self._device())
        rows = row.new_empty((self.size, array.size))
        self._torch.distributed.all_gather(list(rows.unbind()), row, group=self._group)
        return rows.cpu().numpy()


class _Nccl:
    """A communicator of CuPy's, between GPUs."""

    def __init__(self, group: Any) -> None:
        import cupy

        self._cupy, self._group = cupy, group
        self.rank, self.size = group.rank_id(), group.size()

    def allgather(self, array: Floats) -> Floats:
        cuda = self._cupy.cuda
        with cuda.Device(self._group.device_id()):
            row, rows = self._cupy.asarray(array), self._cupy.empty((self.size, array.size))
            places = row.data.ptr, rows.data.ptr
            self._group.allGather(*places, array.size, cuda.nccl.NCCL_FLOAT64, cuda.get_current_stream().ptr)
            gathered: Floats = self._cupy.asnumpy(rows)  # which waits for the stream
        return gathered


class _Own:
    """An object of the user's own."""

    def __init__(self, group: Any) -> None:
        self._group = group
        try:
            self.rank, self.size = operator.index(group.rank), operator.index(group.size)
        except TypeError:
            self.rank = self.size = 0
        if not 0 <= self.rank < self.size:
            raise ValueError(
                f"group has rank {group.rank!r} and size {group.size!r}; they should be integers, the rank from 0 and "
                f"below the size"
            )

    def allgather(self, array: Floats) -> Floats:
        rows = np.array(self._group.allgather(array), np.float64)  # a copy: the group may gather into it again
        if rows.shape != (self.size, array.size):
            raise ValueError(
                f"group.allgather returned an array of shape {rows.shape}; it should be one row a member, "
                f"{(self.size, array.size)}"
            )
        return rows


def members(group: Any) -> Members:
    """Return what `Exchange` needs of a communicator.

    Raises
    ------
    TypeError
        If it is none.
    ValueError
        If this process has no rank in it.
    """
    kinds = type(group).__mro__
    libraries = {kind.__module__.partition(".")[0] for kind in kinds}
    if "mpi4py" in libraries and hasattr(group, "Allgather"):
        return _Mpi(group)
    if "torch" in libraries and any(kind.__name__ == "ProcessGroup" for kind in kinds):
        return _Torch(group)
    if any(kind.__name__ == "NcclCommunicator" for kind in kinds):
        return _Nccl(group)
    if not isinstance(group, type) and all(hasattr(group, name) for name in ("rank", "size", "allgather")):
        return _Own(group)
    raise TypeError(
        f"group is a {kinds[0].__module__}.{kinds[0].__qualname__}; it should be a communicator of mpi4py or of "
        f"CuPy's NCCL, a process group of torch.distributed, or an object with rank, size and allgather(array)"
    )


@lru_cache(maxsize=1024)
def _digest(term: str) -> float:
    """A number by which members compare what one of them may not be able to say in a few bytes."""
    return float(int.from_bytes(blake2b(term.encode(), digest_size=6).digest()))


class Exchange:
    """What the members of a group have to tell each other in one pass.

    Entered before anything can fail: an error inside that comes before the exchange is told to the others.
    """

    def __init__(self, group: Members, function: str, terms: tuple[str, ...] = ()) -> None:
        self._group = group
        self._terms = function, *terms
        self._has_met = False

    def bind(self, *terms: Any) -> None:
        """Say what the call is, in the order of `_TERMS` after the function."""
        self._terms = self._terms[0], *map(str, terms)

    def of_backward(self) -> "Exchange":
        """Return the exchange of a backward pass to this."""
        return Exchange(self._group, "batch_norm_backward", self._terms[1:])

    def __enter__(self) -> "Exchange":
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if isinstance(error, Exception) and not self._has_met:
            with suppress(Exception):  # the error that is under way says more
                self._gather_headers(has_failed=True, count=_WHOLE)

    def _gather_headers(self, has_failed: bool, count: int) -> Floats:
        self._has_met = True
        terms = [*map(_digest, self._terms), *[0.0] * (len(_TERMS) - len(self._terms))]
        return np.asarray(self._group.allgather(np.array([has_failed, count, *terms], np.float64)))

    def _agree(self, count: int = _WHOLE) -> int:
        """Return how the merged count is known, if all members make the same call."""
        headers = self._gather_headers(has_failed=False, count=count)
        failed = np.flatnonzero(headers[:, 0])
        if failed.size:
            raise RuntimeError(
                f"{_ranks(failed)} of the group raised an error before the exchange, so there is no batch of all "
                f"(this is rank {self._group.rank})"
            )
        terms = headers[:, 2:]
        if (terms != terms[0]).any():
            self._refuse(terms != terms[0])
        return int(headers[:, 1].max())

    def _refuse(self, differs: npt.NDArray[np.bool]) -> NoReturn:
        names = np.flatnonzero(differs.any(axis=0))
        if names[0] == 0:  # of different functions nothing else is to be compared
            names = names[:1]
        said = (
            f"{_TERMS[i]} at {_ranks(np.flatnonzero(differs[:, i]))} is not that of rank 0 (here, at rank "
            f"{self._group.rank}: {self._terms[i]})"
            for i in names
        )
        raise ValueError(f"the members of the group do not make the same call: {'; '.join(said)}")

    def merge(self, verbs: Verbs, x: Array, statistics: Statistics) -> Statistics:
        """Return the statistics of all members' batches together, as the verbs' vectors."""
        count, mean, m2 = statistics
        shape = tuple(mean.shape)
        mean, m2 = (_flat(verbs, x, each) for each in (mean, m2))
        known = self._agree(_VECTOR if not is_number(count) else _WHOLE if isinstance(count, int) else _NUMBER)
        counts = np.asarray([count], np.float64) if is_number(count) else _flat(verbs, x, count)
        if known == _VECTOR:
            counts = np.broadcast_to(counts, mean.shape)
        rows = self._group.allgather(np.concatenate([counts, mean, m2]))
        ends = counts.size, counts.size + mean.size
        with np.errstate(all="ignore"):  # infinities and NaN are numbers here
            counts, mean, m2 = reduce(_merge, (np.split(row, ends) for row in rows))
        if known == _VECTOR:
            count = verbs.vector(counts.reshape(shape), x)
        else:
            count = int(counts[0]) if known == _WHOLE else float(counts[0])
        return count, verbs.vector(mean.reshape(shape), x), verbs.vector(m2.reshape(shape), x)

    def add(self, verbs: Verbs, x: Array, sums: tuple[Array, Array]) -> tuple[Array, Array]:
        """Return the sums of all members' vectors, as the verbs' vectors."""
        shape = tuple(sums[0].shape)
        row = np.concatenate([_flat(verbs, x, each) for each in sums])
        self._agree()
        rows = self._group.allgather(row)
        with np.errstate(all="ignore"):
            total = reduce(np.add, rows)
        first, second = (verbs.vector(each.reshape(shape), x) for each in np.split(total, 2))
        return first, second


def _merge(a: Any, b: Any) -> Any:
    return merge(*a, *b)  # type: ignore[no-untyped-call]  # of scalars, too


def _flat(verbs: Verbs, x: Array, vector: Array) -> Floats:
    return np.asarray(verbs.to_numpy(verbs.of_vector(vector, x)), np.float64).reshape(-1)


def _ranks(ranks: npt.NDArray[np.intp]) -> str:
    return f"rank{'s' * (ranks.size > 1)} {', '.join(map(str, ranks))}"
