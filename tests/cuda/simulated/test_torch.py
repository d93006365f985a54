"""torch tensors go through the CUDA kernels here: tensors of the CPU, which the backend is told are on a device.

That is a double: torch's streams, devices and allocator have no part in it, and nothing runs on a GPU.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import bnarray as bn
from bnarray.backends import _cuda, _torch_cuda, _torch_tensors
from bnarray.backends._cuda import Memory
from bnarray.kernels.cuda import streams
from bnarray.testing import check_case
from tests.cases import Options, draw, table
from tests.cuda.simulated import simulator

_CASES = [case for case in table() if case.values[2] != "unaligned" and np.prod(case.values[0]) < 2000]


class MarkDouble:
    """There is one stream, and it is never behind."""

    def __init__(self, device: int) -> None: ...

    def set(self, stream: int) -> None: ...

    def await_by(self, stream: int) -> None: ...


class LibraryDouble(_torch_cuda.Library):
    """torch without a device."""

    def memory(self, x: Any) -> Memory:
        seen = super().memory(x)
        return seen._replace(address=simulator.Pointer(_numpy(x), seen.strides))

    def words(self, number: int, like: Any) -> tuple[Any, Any]:
        array = np.zeros(number, np.uint32)
        return array, simulator.Pointer(array, (1,))

    def on_device_of(self, x: Any) -> AbstractContextManager[None]:
        return nullcontext()

    def queue(self, x: Any) -> tuple[int, int]:
        return 0, 0

    def stream(self, x: Any) -> Any:
        return None

    def handle(self, stream: Any) -> int:
        return 0

    def is_capturing(self, x: Any) -> bool:
        return False


@pytest.fixture(autouse=True)
def _pretended(monkeypatch: pytest.MonkeyPatch) -> None:
    library = LibraryDouble()
    monkeypatch.setattr(streams, "Mark", MarkDouble)
    monkeypatch.setattr("bnarray.backends._cuda_stats.Mark", MarkDouble)
    monkeypatch.setattr(_torch_cuda.Stats, "library", library)
    monkeypatch.setattr(_torch_cuda, "kernels", _cuda.Adapter(library))
    monkeypatch.setattr(_torch_tensors, "_has_memory", lambda x: False)
    monkeypatch.setattr(
        _torch_tensors,
        "_by_cuda",
        lambda x: None if _torch_tensors.is_recorded(x) or _torch_tensors.is_transformed() else _torch_cuda,
    )


def _numpy(x: Any) -> np.ndarray:
    x = x.detach()
    return x.view(torch.int16).numpy().view(ml_dtypes.bfloat16) if x.dtype is torch.bfloat16 else x.numpy()


def _tensor(x: np.ndarray) -> Any:
    if x.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(x.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(x)


@pytest.mark.filterwarnings("ignore:The given NumPy array is not writable")
@pytest.mark.parametrize(
    ("shape", "kept", "layout", "dtype", "options"), [case for case in _CASES if case.values[2] != "reversed"][5::29]
)
def test_simulated_cases(
    shape: tuple[int, ...], kept: tuple[int, ...], layout: str, dtype: str, options: Options
) -> None:
    case = draw(shape, kept, layout, dtype, options, seed=len(shape) + len(layout))
    check_case(_tensor, _numpy, case.x, case.dy, kept, relu=case.relu, statistics=case.statistics, **case.call)


def _drawn(*shape: int) -> Any:
    return torch.from_numpy(np.random.default_rng(0).normal(3, 2, shape).astype(np.float32))


def test_autograd_and_its_derivatives() -> None:
    x, weight, bias = (each.double().requires_grad_() for each in (_drawn(6, 3, 4), torch.ones(3), torch.zeros(3)))
    assert torch.autograd.gradcheck(lambda *inputs: bn.batch_norm(*inputs), (x, weight, bias))
    assert torch.autograd.gradgradcheck(lambda *inputs: bn.batch_norm(*inputs), (x, weight, bias))
    assert "_ForwardBackward" in str(bn.batch_norm(x).grad_fn)  # and no formula of torch's functions


def test_states_live_with_the_tensors() -> None:
    x = _drawn(6, 3, 4).requires_grad_()
    stats, theirs = bn.RunningStats(3, like=x), torch.nn.BatchNorm1d(3)
    assert type(stats) is _torch_cuda.Stats
    for _ in range(2):
        bn.batch_norm(x, stats=stats).sum().backward()
        theirs(x)
    torch.testing.assert_close(stats.mean.float(), theirs.running_mean)
    torch.testing.assert_close(stats.var.float(), theirs.running_var)
    assert not stats.mean.requires_grad
    assert (stats.num_updates, stats.count) == (2, 48)
    torch.testing.assert_close(bn.batch_norm(x, stats=stats, training=False), theirs.eval()(x), rtol=1e-5, atol=1e-5)
    stats.load_state_dict(stats.state_dict() | {"running_mean": torch.ones(3, requires_grad=True)})
    assert not stats.mean.requires_grad


def test_modules() -> None:
    from bnarray.torch import BatchNorm1d

    x, ours, theirs = _drawn(6, 3, 4), BatchNorm1d(3), torch.nn.BatchNorm1d(3)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours.running_var, theirs.running_var)


def test_out_is_known_to_autograd() -> None:
    x, dy = _drawn(6, 3), _drawn(6, 3).clone()
    _, saved = bn.batch_norm_forward(x)
    before = dy._version
    assert bn.batch_norm_backward(dy, saved, out=dy).x is dy
    assert dy._version > before
    with pytest.raises(ValueError, match="overlaps x without being it"):
        bn.batch_norm(x[:4], out=x[1:5])


def test_programs_are_made_of_operators(monkeypatch: pytest.MonkeyPatch) -> None:
    """What torch records of a tensor on a device is an operator there, and not torch's own functions."""
    monkeypatch.setattr(_torch_tensors, "_is_served", lambda index: True)
    stats = bn.RunningStats(3)
    with FakeTensorMode(allow_non_fake_inputs=True):
        x = torch.empty(6, 3, device="cuda:0")
        graph = make_fx(lambda x: bn.batch_norm(bn.batch_norm(x, stats=stats), stats=stats, training=False))(x)
    made = {str(node.target): node.meta.get("val") for node in graph.graph.nodes}
    for name in ("forward", "update", "current"):
        assert f"bnarray.{name}.default" in made
    for name in ("forward", "current"):
        assert {each.device.type for each in made[f"bnarray.{name}.default"]} == {"cuda"}
