"""Calls on torch tensors like one before: what they give, what they record, and when they are not made."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

import bnarray as bn
from bnarray import functional

torch = pytest.importorskip("torch", reason="torch is not installed: its tensors are not verified")


@pytest.fixture(autouse=True)
def _nothing_before() -> Iterator[None]:
    torch.manual_seed(3)
    functional._again.clear()
    yield
    functional._again.clear()


def _first_and_second(call: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> tuple[Any, Any]:
    first = call()
    assert any(each is not None for each in functional._again.values()), "nothing was planned"
    with monkeypatch.context() as patch:
        patch.setattr(functional, "_checked", None)
        return first, call()


def _assert_same(first: Any, second: Any) -> None:
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
        assert a.stride() == b.stride()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("where_grads", [(1, 1, 1), (1, 0, 0), (0, 1, 0)])
def test_gradients(
    dtype: str, activation: str | None, last: bool, where_grads: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    form = torch.channels_last if last else torch.contiguous_format
    x, dy = (torch.randn(5, 4, 3, 2).to(getattr(torch, dtype)).to(memory_format=form) for _ in range(2))
    inputs = [x, torch.randn(4), torch.randn(4, dtype=torch.bfloat16)]
    for tensor, wanted in zip(inputs, where_grads, strict=True):
        tensor.requires_grad_(bool(wanted))
    wanted = [tensor for tensor in inputs if tensor.requires_grad]

    def call() -> list[Any]:
        stats = bn.RunningStats(4)
        y = bn.batch_norm(*inputs, stats=stats, activation=activation)
        assert stats.num_updates == 1
        return [y.detach(), *torch.autograd.grad(y, wanted, dy), torch.tensor(stats.mean), torch.tensor(stats.var)]

    _assert_same(*_first_and_second(call, monkeypatch))


@pytest.mark.parametrize("training", [False, True])
def test_without_gradients(training: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    x, stats = torch.randn(6, 4, requires_grad=True), bn.RunningStats(4)
    stats.update(bn.moments(x.detach()))
    with torch.no_grad():
        _assert_same(*_first_and_second(lambda: [bn.batch_norm(x, stats=stats, training=training)], monkeypatch))
    assert stats.num_updates == (3 if training else 1)


@pytest.mark.parametrize("shape", [(6, 4), (4000, 40), (2, 16, 70, 70)])
@pytest.mark.parametrize("training", [False, True])
def test_out(shape: tuple[int, ...], training: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    x, dy, out, out_dx = (torch.randn(shape) for _ in range(4))
    weight, stats = torch.randn(shape[1], requires_grad=True), bn.RunningStats(shape[1], nonfinite="propagate")

    @torch.no_grad()
    def call(y: Any = None, dx: Any = None) -> list[Any]:
        made, saved = bn.batch_norm_forward(x, weight, stats=stats.copy(), training=training, out=y)
        gradients = bn.batch_norm_backward(dy, saved, out=dx)
        assert y is None or (made is y and gradients.x is dx)
        return [made, *gradients[:2]]

    expected = call()
    for make in (lambda: call(out, out_dx), lambda: _first_and_second(lambda: call(out, out_dx), monkeypatch)[1]):
        versions = out._version, out_dx._version
        _assert_same(make(), expected)
        assert out._version > versions[0], "autograd is not told of what was written"
        assert out_dx._version > versions[1], "autograd is not told of what was written"
        out.fill_(torch.nan), out_dx.fill_(torch.nan)


def test_out_that_is_not_taken() -> None:
    x, out, whole, array = torch.randn(6, 4), torch.empty(6, 4), torch.randn(48), np.ones(48, np.float32)
    parts = torch.from_numpy(array[:24]).reshape(6, 4), torch.from_numpy(array[4:28]).reshape(6, 4)
    wrong: list[tuple[Any, Any, type[Exception], str]] = [
        (x, torch.empty(6, 4, requires_grad=True), TypeError, "out requires grad"),
        (whole[:24].reshape(6, 4), whole[4:28].reshape(6, 4), ValueError, "overlaps x"),
        (*parts, ValueError, "overlaps x"),  # of two storages
        (x, torch.empty(6, 4, dtype=torch.float64), TypeError, "out has dtype"),
        (x.clone().requires_grad_(), out, TypeError, "x requires grad"),
    ]
    for array_like, target, error, match in wrong:
        bn.batch_norm(array_like)
        for _ in range(2):
            with pytest.raises(error, match=match):
                bn.batch_norm(array_like, out=target)
    with torch.inference_mode():
        expected, own = bn.batch_norm(x), torch.empty(6, 4)
        for target in (own, out, own):
            assert bn.batch_norm(x, out=target) is target
            torch.testing.assert_close(target, expected, rtol=0, atol=0)


def test_what_is_recorded_follows_each_call() -> None:
    x, weight = torch.randn(6, 4), torch.ones(4)
    for _ in range(2):
        assert not bn.batch_norm(x, weight).requires_grad
        weight.requires_grad_()
        assert bn.batch_norm(x, weight).requires_grad
        with torch.no_grad():
            assert not bn.batch_norm(x, weight).requires_grad
        with torch.inference_mode():
            assert bn.batch_norm(x, weight).is_inference()
        weight.requires_grad_(False)


def test_evaluation_stays_differentiable() -> None:
    x, stats = torch.randn(6, 4, dtype=torch.float64, requires_grad=True), bn.RunningStats(4)
    stats.update(bn.moments(torch.randn(9, 4)))
    for _ in range(2):
        assert torch.autograd.gradcheck(lambda x: bn.batch_norm(x, stats=stats, training=False), x)


@pytest.mark.parametrize("shape", [(6, 4), (4000, 40)])
def test_mean_and_variance_to_evaluate_with(shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """As `Moments` of a count of 1: autograd follows them where it should."""
    x, mean, var = torch.randn(shape), torch.randn(shape[1]), torch.rand(shape[1]) + 1

    def call(mean: Any, var: Any) -> Any:
        return bn.batch_norm(x, stats=bn.Moments(1, mean, var), training=False)

    _assert_same(*_first_and_second(lambda: [call(mean, var)], monkeypatch))
    torch.testing.assert_close(call(mean, 4 * var), (x - mean) / torch.sqrt(4 * var + 1e-5))
    wanted = mean.requires_grad_()
    for _ in range(2):
        (dmean,) = torch.autograd.grad(call(wanted, var).sum(), wanted)
        torch.testing.assert_close(dmean, -shape[0] / torch.sqrt(var + 1e-5))


def test_derivatives_of_derivatives() -> None:
    inputs = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in ((6, 4), (4,), (4,))]
    for _ in range(2):
        assert torch.autograd.gradcheck(bn.batch_norm, inputs)
        assert torch.autograd.gradgradcheck(bn.batch_norm, inputs)


def test_a_change_between_forward_and_backward_is_told() -> None:
    x, weight = torch.randn(6, 4, requires_grad=True), torch.randn(4, requires_grad=True)
    for _ in range(2):
        y = bn.batch_norm(x, weight)
        with torch.no_grad():
            weight.mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()


def test_a_graph_that_is_kept() -> None:
    x, dy = torch.randn(6, 4, requires_grad=True), torch.randn(3, 6, 4)
    results = []
    for _ in range(2):
        y = bn.batch_norm(x)
        results.append([torch.autograd.grad(y, x, each, retain_graph=True)[0] for each in dy])
    _assert_same(*results)


def test_many_gradients_at_once() -> None:
    x, many = torch.randn(6, 4, requires_grad=True), torch.randn(3, 6, 4)
    for _ in range(2):
        y = bn.batch_norm(x)
        expected = torch.stack([torch.autograd.grad(y, x, each, retain_graph=True)[0] for each in many])
        for _ in range(2):
            (found,) = torch.autograd.grad(y, x, many, retain_graph=True, is_grads_batched=True)
            torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_where_another_device_is_the_default(dtype: Any) -> None:
    """What is made on the way is beside x, wherever the user's new tensors go."""
    x, dy, weight = torch.randn(6, 4), torch.randn(6, 4), torch.randn(4, dtype=dtype)
    results = []
    for device in ("cpu", "meta", "meta"):
        with torch.device(device):
            y, saved = bn.batch_norm_forward(x, weight)
            gradients = bn.batch_norm_backward(dy, saved)[:2]
            by_autograd = torch.autograd.grad(bn.batch_norm(x, weight.requires_grad_()), weight, dy)
            weight.requires_grad_(False)
        results.append([y, *gradients, *by_autograd])
    for each in results[1:]:
        _assert_same(results[0], each)


def test_a_wrong_call_is_told_of_as_the_first_time() -> None:
    x = torch.randn(6, 4)
    bn.batch_norm(x, torch.ones(4))
    with pytest.raises(TypeError, match="convert one of them"):
        bn.batch_norm(x, np.ones(4))
    with pytest.raises(ValueError, match="weight has shape"):
        bn.batch_norm(x, torch.ones(5))
    with pytest.raises(TypeError, match="on the device meta"):
        bn.batch_norm(x, torch.ones(4, device="meta"))
    _, saved = bn.batch_norm_forward(x)
    _, saved = bn.batch_norm_forward(x)
    with pytest.raises(ValueError, match="dy has shape"):
        bn.batch_norm_backward(torch.ones(4, 6), saved)
    with pytest.raises(TypeError, match="dy is an array of numpy"):
        bn.batch_norm_backward(np.ones((6, 4)), saved)


def test_signs_that_are_still_to_be_turned() -> None:
    z = torch.randn(6, 4, dtype=torch.complex128)
    negative = z.conj().imag
    assert negative.is_neg()
    expected = bn.batch_norm(negative.clone())
    for _ in range(2):
        torch.testing.assert_close(bn.batch_norm(negative), expected)


def test_a_state_of_torch_stays_with_torch() -> None:
    x = torch.randn(6, 4)
    states = bn.RunningStats(4, like=x), bn.RunningStats(4)
    for _ in range(3):
        for stats in states:
            bn.batch_norm(x, stats=stats)
    assert isinstance(states[0].mean, torch.Tensor)
    np.testing.assert_allclose(states[0].mean.numpy(), states[1].mean, rtol=1e-14)
    assert states[0].num_updates == 3
