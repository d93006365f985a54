"""torch's tensors: the same bits as NumPy's arrays, derivatives, compilation, transformations, and torch's traps."""

import gc
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import bnarray as bn
from bnarray.testing import TOLERANCES
from tests.cases import DTYPES, OPTIONS, Options, draw, table

torch = pytest.importorskip("torch", reason="torch is not installed: torch tensors are not verified")

Tensor = Any

# What torch itself does when it compiles is not for this package to mend.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torch.jit.*is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*torch.jit.*is not supported:DeprecationWarning"),
]


def tensor(array: Any) -> Any:
    """The array's memory as a tensor, where torch can have it; else the same values with its strides' signs turned."""
    if array is None:
        return None
    array = np.asarray(array)
    if any(step < 0 for step in array.strides):
        array = array[tuple(slice(None, None, -1 if step < 0 else 1) for step in array.strides)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that a read-only array could be written to through the tensor
        if array.dtype == DTYPES["bfloat16"]:
            return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
        return torch.from_numpy(array)


def array(x: Any) -> Any:
    x = x.detach()
    return x.view(torch.int16).numpy().view(DTYPES["bfloat16"]) if x.dtype == torch.bfloat16 else x.numpy()


TORCH_CASES = [case for case in table()[::3] if case.values[2] not in ("reversed", "unaligned")]


@pytest.mark.parametrize(("shape", "kept", "layout", "dtype", "options"), TORCH_CASES)
def test_same_bits_as_numpy(
    shape: tuple[int, ...], kept: tuple[int, ...], layout: str, dtype: str, options: Options
) -> None:
    """Through both roads, by hand and by autograd; without a copy, so that memory and strides are the same."""
    case = draw(shape, kept, layout, dtype, options, seed=len(shape) + len(layout))
    keywords: dict[str, Any] = {"axis": kept, "activation": "relu" if case.relu else None}
    arrays = {"x": case.x, **case.call}
    eps = arrays.pop("eps")
    tensors = {name: tensor(each) for name, each in arrays.items()}
    stats = theirs = None
    if case.statistics is not None:
        keywords["training"] = False
        stats = bn.Moments(1, *case.statistics)
        theirs = bn.Moments(1, *(tensor(each) for each in case.statistics))
    y, saved = bn.batch_norm_forward(**arrays, eps=eps, stats=stats, **keywords)
    expected = bn.batch_norm_backward(case.dy, saved)

    out, of_torch = bn.batch_norm_forward(**tensors, eps=eps, stats=theirs, **keywords)
    assert type(out) is torch.Tensor
    assert out.stride() == torch.empty_like(tensors["x"]).stride()
    np.testing.assert_array_equal(array(out), y)
    if saved.moments is not None:
        assert of_torch.moments.mean.dtype == torch.float64
        np.testing.assert_array_equal(of_torch.moments.m2.numpy(), saved.moments.m2)
    for name, gradient in bn.batch_norm_backward(tensor(case.dy), of_torch)._asdict().items():
        if gradient is not None:
            np.testing.assert_array_equal(array(gradient), getattr(expected, name), err_msg=name)

    differentiable = [name for name in tensors if name != "where"]
    for name in differentiable:
        tensors[name] = tensors[name].detach().requires_grad_()
    out = bn.batch_norm(**tensors, eps=eps, stats=theirs, **keywords)
    np.testing.assert_array_equal(array(out), y)
    found = torch.autograd.grad(out, [tensors[name] for name in differentiable], tensor(case.dy))
    for name, gradient in zip(differentiable, found, strict=True):
        assert gradient.dtype == tensors[name].dtype
        np.testing.assert_array_equal(array(gradient), getattr(expected, name), err_msg=name)


def _double(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, dtype=torch.float64, generator=generator).requires_grad_()


def _arguments(options: Options) -> tuple[Callable[..., Tensor], tuple[Tensor, ...]]:
    """A function of all differentiable arguments, and those."""
    x, residual, weight, bias = _double(6, 3, 4), _double(6, 3, 4, seed=1), _double(3, seed=2), _double(3, seed=3)
    where = None
    if options.where:
        kind, which = options.where.split()
        shape = {"sample": (6, 1, 1), "position": (6, 1, 4), "feature": (3, 1), "full": (6, 3, 4)}[which]
        where = torch.rand(shape, generator=torch.Generator().manual_seed(4))
        where = where < 0.7 if kind == "mask" else where * (where < 0.7)
    keywords: dict[str, Any] = {"where": where, "activation": "relu" if options.relu else None, "eps": 1e-3}
    mean, m2 = _double(3, seed=5), (_double(3, seed=6) ** 2 + 1).detach().requires_grad_()

    def call(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor, mean: Tensor, m2: Tensor) -> Tensor:
        given = {"training": False, "stats": bn.Moments(4, mean, m2)} if options.evaluate else {}
        added = residual if options.residual else None
        y = bn.batch_norm(x, weight, bias, residual=added, **keywords, **given)
        unused = [each for each, used in ((residual, options.residual), (mean, options.evaluate)) if not used]
        return y + sum(0 * each.sum() for each in (*unused, m2))

    return call, (x, weight, bias, residual, mean, m2)


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: options.name)
def test_derivatives(options: Options) -> None:
    call, arguments = _arguments(options)
    assert torch.autograd.gradcheck(call, arguments)
    assert torch.autograd.gradgradcheck(call, arguments)


def test_derivatives_of_inputs_made_of_one_another() -> None:
    """Each input's second derivatives are its own, whatever it was computed from."""
    x = _double(5, 3)
    for depth in (torch.autograd.gradcheck, torch.autograd.gradgradcheck):
        assert depth(lambda x: bn.batch_norm(x, x.mean(0), residual=x * 2), (x,))


def test_moments_are_differentiable() -> None:
    x, where = _double(5, 3, 2), torch.rand(5, 1, 2) < 0.7
    for mask in (None, where):

        def moments(x: Tensor, mask: Tensor = mask) -> tuple[Tensor, Tensor]:
            m = bn.moments(x, where=mask)
            return m.mean, m.var()

        assert torch.autograd.gradcheck(moments, (x,))
        assert torch.autograd.gradgradcheck(moments, (x,))
    assert torch.autograd.gradcheck(lambda x: bn.batch_norm(x, stats=bn.moments(x), training=False), (x,))


def test_gradient_of_a_hand_written_backward_is_refused() -> None:
    x = _double(5, 3)
    _, saved = bn.batch_norm_forward(x)
    dx = bn.batch_norm_backward(torch.ones(5, 3, dtype=torch.float64), saved).x
    with pytest.raises(RuntimeError, match="batch_norm_backward cannot be differentiated"):
        dx.sum().backward()


def test_only_what_is_needed() -> None:
    """Without a gradient of x, its memory is not written."""
    x, weight = _double(5, 3).detach(), _double(3)
    y = bn.batch_norm(x, weight)
    (dweight,) = torch.autograd.grad((y * x).sum(), [weight])
    _, saved = bn.batch_norm_forward(x, weight.detach())
    torch.testing.assert_close(dweight, bn.batch_norm_backward(x, saved).weight, rtol=0, atol=0)


def test_state_updates() -> None:
    """From the CPU's tensors, recorded or not; a state that lives with torch gets the same numbers."""
    x = torch.randn(20, 3)
    ours, theirs, recorded = bn.RunningStats(3), bn.RunningStats(3, like=x), bn.RunningStats(3)
    for stats, each in ((ours, x), (theirs, x), (recorded, x.clone().requires_grad_())):
        bn.batch_norm(each, stats=stats)
        bn.batch_norm(each, stats=stats)
    assert type(theirs.mean) is torch.Tensor
    assert type(recorded.mean) is np.ndarray
    np.testing.assert_array_equal(recorded.var, ours.var)
    np.testing.assert_allclose(theirs.var.numpy(), ours.var, rtol=1e-14)
    assert (ours.num_updates, theirs.num_updates, recorded.num_updates) == (2, 2, 2)
    y = [bn.batch_norm(x, stats=stats, training=False) for stats in (ours, theirs)]
    torch.testing.assert_close(*y, rtol=1e-6, atol=1e-6)
    loaded = bn.RunningStats(3, like=x)
    loaded.load_state_dict(ours.state_dict())
    assert type(loaded.mean) is torch.Tensor
    with pytest.warns(RuntimeWarning, match="skip it"):
        bn.batch_norm(x * float("nan"), stats=ours)
    assert (ours.num_updates, ours.num_skipped) == (2, 1)
    with pytest.raises(ValueError, match="too few"):
        bn.batch_norm(x[:1].requires_grad_(), stats=ours)


def test_layer() -> None:
    x = torch.randn(20, 3)
    layer, expected = bn.BatchNorm(3, like=x), bn.BatchNorm(3, like=x.numpy())
    y, dx = layer(x), layer.backward(x)
    np.testing.assert_array_equal(y.numpy(), expected(x.numpy()))
    np.testing.assert_array_equal(dx.numpy(), expected.backward(x.numpy()))
    np.testing.assert_array_equal(layer.grad_weight.numpy(), expected.grad_weight)
    layer.zero_grad()
    assert not layer.grad_weight.any()
    assert layer.weight.dtype == torch.float32
    kernel, _ = bn.fold(torch.eye(3), None, layer)
    assert type(kernel) is torch.Tensor


# -- Without autograd --------------------------------------------------------------------------------------------------


def test_no_grad_and_inference_mode() -> None:
    x = torch.randn(20, 3, requires_grad=True)
    expected = bn.batch_norm(x).detach()
    with torch.no_grad():
        y = bn.batch_norm(x)
        assert not y.requires_grad
        torch.testing.assert_close(y, expected, rtol=0, atol=0)
    with torch.inference_mode():
        y = bn.batch_norm(x.detach())
        assert y.is_inference()
        torch.testing.assert_close(y, expected, rtol=0, atol=0)


def test_out() -> None:
    x = torch.randn(20, 3)
    expected = bn.batch_norm(x)
    out = torch.empty_like(x)
    assert bn.batch_norm(x, out=out) is out
    torch.testing.assert_close(out, expected, rtol=0, atol=0)
    memory = torch.zeros(20 * 3)
    for name, needed in {"weight": memory[:3], "where": memory.view(20, 3)}.items():
        with pytest.raises(ValueError, match=f"out overlaps {name}"):
            bn.batch_norm(x, **{name: needed}, out=memory.view(20, 3))
    with pytest.raises(ValueError, match="out overlaps x without being it"):
        bn.batch_norm(x[:-1], out=x[1:])
    with pytest.raises(TypeError, match="out has dtype"):
        bn.batch_norm(x, out=out.double())
    with pytest.raises(ValueError, match="elements overlap"):
        bn.batch_norm(x, out=torch.empty(3).expand(20, 3))
    half = x.bfloat16()
    with pytest.raises(ValueError, match="out overlaps x"):
        bn.batch_norm(half[:-1], out=half[1:])
    assert bn.batch_norm(x, out=x) is x
    torch.testing.assert_close(x, expected, rtol=0, atol=0)


def test_out_under_autograd() -> None:
    x = torch.randn(20, 3)
    recorded = x.clone().requires_grad_()
    for arguments in ({"x": x, "out": recorded}, {"x": recorded, "out": x}, {"x": x, "weight": recorded[0], "out": x}):
        with pytest.raises(TypeError, match="requires grad"):
            bn.batch_norm(**arguments)
    with torch.no_grad():
        bn.batch_norm(recorded, out=x)


def test_autograd_notices_what_is_overwritten() -> None:
    """torch counts the versions of a tensor; a kernel that writes behind its back has to count too."""
    x = torch.randn(20, 3, requires_grad=True)
    factor = torch.randn(20, 3)
    product = (x * factor).sum()
    bn.batch_norm(factor, out=factor)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()
    y = bn.batch_norm(x, torch.ones(3, requires_grad=True))
    with torch.no_grad():
        bn.batch_norm(x, out=x)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def _pair(x: Tensor) -> Tensor:
    """A tensor that wraps others, so that it has no memory itself."""
    two_tensor = pytest.importorskip("torch.testing._internal.two_tensor", reason="wrapping subclasses: not verified")
    return two_tensor.TwoTensor(x, x.clone())


def test_wrapped_beside_plain() -> None:
    """Whichever argument it is that wraps others, kernels do not look for its memory."""
    x, each, mask = torch.randn(20, 3), torch.rand(20, 3), torch.rand(20, 3) < 0.7
    for options in ({"weight": each[0]}, {"bias": each[0]}, {"residual": each}, {"where": mask}):
        ((name, given),) = options.items()
        for _ in range(2):
            y = bn.batch_norm(x, **{name: _pair(given)})
            torch.testing.assert_close(y.b, bn.batch_norm(x, **options), rtol=0, atol=0)
    torch.testing.assert_close(bn.moments(x, where=_pair(mask)).m2.a, bn.moments(x, where=mask).m2, rtol=0, atol=0)


def test_wrapped_gradient_of_plain() -> None:
    x, dy, residual = torch.randn(20, 3, requires_grad=True), torch.randn(20, 3), torch.randn(20, 3)
    for options in ({}, {"residual": residual, "activation": "relu"}):
        for _ in range(2):
            y = bn.batch_norm(x, **options)
            (expected,) = torch.autograd.grad(y, x, dy, retain_graph=True)
            (found,) = torch.autograd.grad(y, x, _pair(dy))
            torch.testing.assert_close(found.b, expected)
            _, saved = bn.batch_norm_forward(x.detach(), **options)
            torch.testing.assert_close(bn.batch_norm_backward(_pair(dy), saved).x.b, expected)


def test_only_the_backward_pass_is_intercepted() -> None:
    """A mode that counts what torch does, for example, round nothing but the backward pass."""
    flop_counter = pytest.importorskip("torch.utils.flop_counter", reason="modes are not verified")
    x, dy = torch.randn(20, 3, requires_grad=True), torch.randn(20, 3)
    for _ in range(2):
        y, (_, saved) = bn.batch_norm(x), bn.batch_norm_forward(x.detach())
        (expected,) = torch.autograd.grad(y, x, dy, retain_graph=True)
        with flop_counter.FlopCounterMode(display=False):
            (found,) = torch.autograd.grad(y, x, dy)
            by_hand = bn.batch_norm_backward(dy, saved).x
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(by_hand, expected)


def test_second_derivatives_of_operators_are_refused() -> None:
    flop_counter = pytest.importorskip("torch.utils.flop_counter", reason="modes are not verified")
    x = torch.randn(20, 3, requires_grad=True)
    with flop_counter.FlopCounterMode(display=False):
        (dx,) = torch.autograd.grad((bn.batch_norm(x) ** 3).sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="cannot be differentiated again"):
            dx.sum().backward()
        hessian = torch.func.hessian(lambda x: (bn.batch_norm(x) ** 3).sum())(x.detach())
    torch.testing.assert_close(
        hessian, torch.func.hessian(lambda x: (bn.batch_norm(x) ** 3).sum())(x.detach()), rtol=1e-5, atol=1e-5
    )


# -- Compilation -------------------------------------------------------------------------------------------------------


@pytest.fixture
def compiled() -> Any:
    """Compile without a graph break, through everything but Inductor, which another test has."""
    torch._dynamo.reset()
    yield lambda function, **keywords: torch.compile(function, fullgraph=True, backend="aot_eager", **keywords)
    torch._dynamo.reset()


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: options.name)
def test_compiled(options: Options, compiled: Any) -> None:
    call, arguments = _arguments(options)
    outcomes = []
    for function in (call, compiled(call)):
        y = function(*arguments)
        outcomes.append((y, *torch.autograd.grad((y**3).sum(), arguments)))
    for theirs, ours in zip(*outcomes, strict=True):
        torch.testing.assert_close(theirs, ours, rtol=1e-12, atol=1e-12)


def test_compiled_by_inductor() -> None:
    torch._dynamo.reset()
    x, weight = torch.randn(8, 3, 5, 5, requires_grad=True), torch.rand(3, requires_grad=True)

    def loss(x: Tensor, weight: Tensor) -> Tensor:
        return (bn.batch_norm(x.sin(), weight, activation="relu") ** 2).sum()

    ours, theirs = loss(x, weight), torch.compile(loss, fullgraph=True)(x, weight)
    torch.testing.assert_close(ours, theirs)
    for a, b in zip(torch.autograd.grad(ours, [x, weight]), torch.autograd.grad(theirs, [x, weight]), strict=True):
        torch.testing.assert_close(a, b)


def test_compiled_by_hand(compiled: Any) -> None:
    """Forward and backward in one graph, and moments."""
    x, dy, weight = torch.randn(20, 3, 4), torch.randn(20, 3, 4), torch.rand(3)
    where = torch.rand(20, 1, 4) < 0.7

    def step(x: Tensor, dy: Tensor) -> tuple[Tensor, ...]:
        y, saved = bn.batch_norm_forward(x, weight, residual=dy, activation="relu", where=where)
        dx, dweight, _, dresidual = bn.batch_norm_backward(dy, saved)
        m = bn.moments(x, where=where) + bn.moments(x)
        return y, dx, dweight, dresidual, m.mean, m.var(1), saved.moments.m2

    for ours, theirs in zip(step(x, dy), compiled(step)(x, dy), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


def test_compiled_with_state(compiled: Any) -> None:
    """States of NumPy and of torch, several through one compiled function, and evaluation after it."""
    x = torch.randn(20, 3, requires_grad=True)
    where = torch.rand(20, 1) < 0.7

    def train(x: Tensor, stats: Any, mask: Any = None) -> Tensor:
        return bn.batch_norm(x, stats=stats, where=mask) * 2

    def evaluate(x: Tensor, stats: Any) -> Tensor:
        return bn.batch_norm(x, stats=stats, training=False)

    fast, faster = compiled(train), compiled(evaluate)
    for make in (
        lambda: bn.RunningStats(3),
        lambda: bn.RunningStats(3, like=x),
        lambda: bn.RunningStats(3, update_rate=None),
    ):
        ours, theirs, third = make(), make(), make()
        for step in range(3):
            batch = (x.detach() * (step + 1)).requires_grad_()
            train(batch, ours)
            fast(batch, theirs)
            torch.testing.assert_close(faster(x, theirs), evaluate(x, ours), rtol=1e-6, atol=1e-6)
        train(x, ours, where)
        fast(x, theirs, where)
        fast(x, third)
        assert (theirs.num_updates, third.num_updates) == (4, 1)
        assert float(theirs.count) == float(ours.count)
        np.testing.assert_allclose(np.asarray(theirs.var), np.asarray(ours.var), rtol=1e-12)


def test_compiled_with_state_where_another_device_is_the_default(run_python: Callable[..., str]) -> None:
    code = (
        "import torch, bnarray as bn; x, stats = torch.randn(9, 3), bn.RunningStats(3);"
        "torch.set_default_device('meta');"
        "torch.compile(lambda x: bn.batch_norm(x, stats=stats), fullgraph=True, backend='aot_eager')(x);"
        "print(stats.num_updates)"
    )
    assert run_python(code).split() == ["1"]


def test_compiled_code_skips_what_it_cannot_refuse(compiled: Any) -> None:
    x, stats = torch.randn(20, 3), bn.RunningStats(3, nonfinite="raise")
    train = compiled(lambda x: bn.batch_norm(x, stats=stats))
    train(x)
    before = stats.mean
    assert train(x * float("nan")).isnan().all()
    assert (stats.num_updates, stats.num_skipped) == (1, 1)
    assert stats.mean is before
    train(x[:1])
    assert (stats.num_updates, stats.num_skipped) == (1, 2)
    with stats.frozen():
        train(x)
    assert stats.num_updates == 1


def test_the_key_of_a_state_that_is_gone() -> None:
    """Compiled code knows states by their keys."""
    stats = bn.RunningStats(3)
    assert bn.stats.state_of(stats.key) is stats
    key = stats.key
    assert stats.copy().key != key
    del stats
    gc.collect()
    with pytest.raises(RuntimeError, match="exists no longer"):
        bn.stats.state_of(key)


def test_compiled_for_any_size(compiled: Any) -> None:
    function = compiled(lambda x: bn.batch_norm(x.sin()).cos(), dynamic=True)
    for size in (5, 17, 300):
        x = torch.randn(size, 3, 2, requires_grad=True)
        torch.testing.assert_close(function(x), bn.batch_norm(x.sin()).cos(), rtol=0, atol=0)
        function(x).sum().backward()


def test_first_call_is_compiled(run_python: Callable[..., str]) -> None:
    code = (
        "import torch, bnarray as bn; x = torch.arange(6.0).view(3, 2);"
        "f = torch.compile(lambda x: bn.batch_norm(x), fullgraph=True, backend='aot_eager');"
        "print(torch.equal(f(x), bn.batch_norm(x)))"
    )
    assert run_python(code).split() == ["True"]


def test_exported() -> None:
    class Model(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return bn.batch_norm(x)

    x = torch.randn(20, 3)
    program = torch.export.export(Model(), (x,))
    torch.testing.assert_close(program.module()(x), bn.batch_norm(x), rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch.jit's own end is near
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")  # shapes are looked at
def test_traced() -> None:
    """A trace of what is seen by torch must not hold uninitialised memory that a kernel filled unseen."""
    traced = torch.jit.trace(lambda x: bn.batch_norm(x), (torch.randn(20, 3),), check_trace=False)
    x = torch.randn(20, 3)
    torch.testing.assert_close(traced(x), bn.batch_norm(x), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_operators(dtype: Any) -> None:
    """torch's own checks of an operator: its schema, what it says of shapes, its derivative, compilation."""
    from bnarray.backends import _torch_operations as operations

    x = torch.randn(6, 3, 4).to(dtype).to(memory_format=torch.contiguous_format).requires_grad_()
    residual = torch.randn(6, 3, 4).to(dtype).requires_grad_()
    weight, bias = torch.rand(3, requires_grad=True), torch.rand(3, requires_grad=True)
    ones, mask = torch.ones(3, dtype=torch.float64), torch.rand(6, 1, 4) < 0.7
    settings = [1], 1e-5, True
    for arguments in [
        (x, weight, bias, residual, mask, None, None, None, *settings),
        (x.detach().mT, None, None, None, None, None, None, None, [2], 1e-5, False),
        (x, None, bias, None, None, ones, ones, ones, *settings),
    ]:
        torch.library.opcheck(operations._forward_operator, arguments)
    x, residual, weight, bias = (each.detach() for each in (x, residual, weight, bias))
    for constant in (True, False):
        arguments = (x, x, weight, bias, residual, mask, ones, ones, ones, *settings, constant)
        torch.library.opcheck(operations._backward_operator, arguments)
    torch.library.opcheck(operations._moments_operator, (x.requires_grad_(), mask, [1]))
    stats = bn.RunningStats(3, correction=0)
    torch.library.opcheck(operations._update_operator, (stats.key, torch.zeros(1, dtype=torch.int64), ones, ones, ones))
    assert stats.num_updates > 0
    order = torch.zeros(1, dtype=torch.int64)
    torch.library.opcheck(operations._current_operator, (stats.key, order, [3], torch.device("cpu")))


_GIVEN = torch.randn(20, 3)

TRANSFORMED = {
    "grad": lambda x: torch.func.grad(lambda x: (bn.batch_norm(x) ** 3).sum())(x),
    "hessian": lambda x: torch.func.hessian(lambda x: (bn.batch_norm(x) ** 3).sum())(x),
    "jvp": lambda x: torch.func.jvp(lambda x: bn.batch_norm(x, activation="relu"), (x,), (x.sin(),))[1],
    "moments": lambda x: torch.func.grad(lambda x: bn.moments(x).m2.sum())(x),
    "vmap": lambda x: torch.func.vmap(lambda s: bn.batch_norm(x * s, where=_GIVEN[:, :1] > 0))(_GIVEN[0]),
    "by hand": lambda x: torch.func.vmap(
        lambda s: bn.batch_norm_backward(x.cos(), bn.batch_norm_forward(x * s)[1]).x,
    )(_GIVEN[0]),
}


@pytest.mark.parametrize("name", TRANSFORMED)
def test_compiled_transformations(name: str, compiled: Any) -> None:
    x, function = torch.randn(20, 3), TRANSFORMED[name]
    torch.testing.assert_close(compiled(function)(x), function(x), rtol=1e-5, atol=1e-5)
    traced = torch.fx.experimental.proxy_tensor.make_fx(function)(x)
    torch.testing.assert_close(traced(x), function(x), rtol=1e-5, atol=1e-5)


def test_compiled_where_there_are_no_kernels(compiled: Any) -> None:
    x = torch.empty(20, 3, device="meta", requires_grad=True)

    def step(x: Tensor) -> tuple[Tensor, ...]:
        y, saved = bn.batch_norm_forward(x.detach())
        return bn.batch_norm(x), bn.batch_norm_backward(y, saved).x, bn.moments(x).mean

    y, dx, mean = compiled(step)(x)
    y.sum().backward()
    assert (y.shape, dx.shape, mean.shape, x.grad.shape) == ((20, 3), (20, 3), (3,), (20, 3))


# -- Transformations ---------------------------------------------------------------------------------------------------


def test_vmap() -> None:
    xs, weights = torch.randn(5, 20, 3), torch.rand(5, 3)
    where = torch.rand(20, 1) < 0.7

    def call(x: Tensor, weight: Tensor) -> Tensor:
        return bn.batch_norm(x, weight, where=where, activation="relu")

    expected = torch.stack([call(x, weight) for x, weight in zip(xs, weights, strict=True)])
    torch.testing.assert_close(torch.func.vmap(call)(xs, weights), expected, rtol=1e-5, atol=1e-6)
    means = torch.func.vmap(lambda x: bn.moments(x).mean)(xs)
    torch.testing.assert_close(means, xs.double().mean(1), rtol=1e-12, atol=1e-12)
    per_sample = torch.func.vmap(torch.func.grad(lambda x, w: call(x, w).pow(2).sum(), argnums=1))(xs, weights)
    weight = weights[0].clone().requires_grad_()
    call(xs[0], weight).pow(2).sum().backward()
    torch.testing.assert_close(per_sample[0], weight.grad, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: options.name)
def test_many_gradients_at_once(options: Options) -> None:
    """A graph that eager calls made, gone back through once for a stack of gradients: in both of torch's ways."""
    call, arguments = _arguments(options)
    y, many = call(*arguments), _double(4, 6, 3, 4, seed=7).detach()

    def back(dy: Tensor, **keywords: Any) -> tuple[Tensor, ...]:
        return torch.autograd.grad(y, arguments, dy, retain_graph=True, **keywords)

    expected = [torch.stack(each) for each in zip(*(back(dy) for dy in many), strict=True)]
    for found in (
        back(many, is_grads_batched=True),
        back(many, is_grads_batched=True, create_graph=True),
        torch.func.vmap(back)(many),
    ):
        torch.testing.assert_close(found, tuple(expected), rtol=1e-10, atol=1e-10)


def test_state_under_a_transformation_is_refused() -> None:
    stats, xs = bn.RunningStats(3), torch.randn(5, 20, 3)
    for transformed in (torch.func.vmap, torch.func.grad):
        with pytest.raises(TypeError, match=r"transformation of torch\.func"):
            transformed(lambda x: bn.batch_norm(x, stats=stats).sum())(xs[0] if transformed is torch.func.grad else xs)
    assert stats.num_updates == 0
    y = torch.func.vmap(lambda x: bn.batch_norm(x, stats=stats, training=False))(xs)
    torch.testing.assert_close(y, xs / (1 + 1e-5) ** 0.5)


def test_forward_mode_and_higher_orders() -> None:
    x, tangent = _double(5, 3).detach(), _double(5, 3, seed=1).detach()

    def formula(x: Tensor) -> Tensor:
        return (x - x.mean(0)) / (x.var(0, correction=0) + 1e-5).sqrt()

    ours, theirs = (torch.func.jvp(f, (x,), (tangent,))[1] for f in (bn.batch_norm, formula))
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, tangent)
        torch.testing.assert_close(torch.autograd.forward_ad.unpack_dual(bn.batch_norm(dual)).tangent, theirs)
    hessians = [torch.func.hessian(lambda x, f=f: f(x).pow(3).sum())(x) for f in (bn.batch_norm, formula)]
    torch.testing.assert_close(*hessians, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype: Any) -> None:
    """Half-precision data from a matrix product meets float32 parameters, whose gradients stay float32."""
    x, weight, matrix = torch.randn(20, 3), torch.rand(3, requires_grad=True), torch.randn(3, 3, requires_grad=True)
    with torch.autocast("cpu", dtype=dtype):
        product = x @ matrix
        assert product.dtype == dtype
        y = bn.batch_norm(product, weight)
        assert y.dtype == dtype
        y.float().pow(2).sum().backward()
    assert weight.grad.dtype == matrix.grad.dtype == torch.float32


# -- Traps -------------------------------------------------------------------------------------------------------------


def test_signs_still_to_be_turned() -> None:
    """The imaginary part of a conjugate is negative by a flag, not in memory."""
    x = torch.randn(20, 3, dtype=torch.complex64)
    part = x.conj().imag
    assert part.is_neg()
    expected = bn.batch_norm(part.resolve_neg())
    torch.testing.assert_close(bn.batch_norm(part), expected, rtol=0, atol=0)
    y = bn.batch_norm(x.real.clone().requires_grad_(), part[0])
    y.backward(part)
    zeros = torch._efficientzerotensor((20, 3))
    assert (bn.batch_norm(zeros) == 0).all()


def test_gradients_without_strides() -> None:
    """`sum().backward()` hands out one number, expanded."""
    x = torch.randn(20, 3, 4, requires_grad=True)
    bn.batch_norm(x, activation="relu").sum().backward()
    expected = bn.batch_norm_backward(
        np.ones((20, 3, 4), np.float32), bn.batch_norm_forward(array(x), activation="relu")[1]
    )
    np.testing.assert_array_equal(x.grad.numpy(), expected.x)


def test_channels_last() -> None:
    for shape, memory_format in (((2, 3, 4, 5), torch.channels_last), ((2, 3, 4, 5, 6), torch.channels_last_3d)):
        x = torch.randn(shape).to(memory_format=memory_format).requires_grad_()
        y = bn.batch_norm(x)
        assert y.is_contiguous(memory_format=memory_format)
        y.sum().backward()
        assert x.grad.is_contiguous(memory_format=memory_format)


def test_refused() -> None:
    x = torch.randn(20, 3)
    for wrong, message in [
        (x.int(), "x has dtype torch.int32"),
        (x.to(torch.complex64), "x has dtype torch.complex64"),
        (x.to_sparse(), "x has layout torch.sparse_coo"),
        (x.to_mkldnn(), "x has layout torch._mkldnn"),
        (torch.nested.nested_tensor([x, x[:2]], layout=torch.jagged), "x is a nested tensor"),
    ]:
        with pytest.raises(TypeError, match=message):
            bn.batch_norm(wrong)
    for keywords, error, message in [
        ({"weight": np.ones(3)}, TypeError, "weight is an array of numpy and x one of torch"),
        ({"where": torch.ones(20, 3, requires_grad=True)}, TypeError, "where requires grad"),
        ({"where": torch.ones(20, 3, dtype=torch.int32)}, TypeError, "where has dtype torch.int32"),
        ({"where": -torch.ones(20, 3)}, ValueError, "negative"),
        ({"where": torch.ones(4, 3)}, ValueError, "where has shape"),
        ({"residual": torch.ones(20, 3).double()}, TypeError, "residual has dtype torch.float64"),
        ({"bias": torch.ones(4)}, ValueError, "bias has shape"),
    ]:
        with pytest.raises(error, match=message):
            bn.batch_norm(x, **keywords)
    with pytest.raises(TypeError, match="dy is an array of numpy and x one of torch"):
        bn.batch_norm_backward(np.ones((20, 3)), bn.batch_norm_forward(x)[1])


def test_negative_strides_on_the_way_to_torch() -> None:
    """torch's from_dlpack would abort the process; the conversion that the error names must not."""
    weight = np.arange(3.0, dtype=np.float32)[::-1]
    x = torch.randn(20, 3)
    with pytest.raises(TypeError, match="for example by") as caught:
        bn.batch_norm(x, weight)
    converted = eval(str(caught.value).partition("for example by ")[2], {"torch": torch, "numpy": np, "weight": weight})
    np.testing.assert_array_equal(bn.batch_norm(x, converted).numpy(), bn.batch_norm(x.numpy(), weight))


def test_subclass_without_behaviour() -> None:
    class Picture(torch.Tensor):
        pass

    x = torch.randn(20, 3)
    torch.testing.assert_close(bn.batch_norm(x.as_subclass(Picture)), bn.batch_norm(x), rtol=0, atol=0)
    parameter = torch.nn.Parameter(x)
    assert bn.batch_norm(parameter).requires_grad


def test_meta_tensors() -> None:
    """Shapes and layouts without data."""
    x = torch.empty(2, 3, 4, 5, device="meta").to(memory_format=torch.channels_last)
    y = bn.batch_norm(x, torch.empty(3, device="meta"))
    assert (y.device.type, y.shape, y.dtype) == ("meta", x.shape, x.dtype)
    for stats in bn.RunningStats(3), bn.RunningStats(3, like=x):
        with pytest.raises(TypeError, match="no values to update stats with"):
            bn.batch_norm(x, stats=stats)
        assert (bn.batch_norm(x, stats=stats, training=False).shape, stats.num_updates) == (x.shape, 0)


@pytest.mark.filterwarnings("ignore:The PyTorch API of MaskedTensors:UserWarning")
def test_masked_tensors_are_refused() -> None:
    x = torch.randn(20, 3)
    masked = torch.masked.masked_tensor(x, x > 0)
    for arguments, name in [(((masked,), {}), "x"), (((x,), {"residual": masked}), "residual")]:
        with pytest.raises(TypeError, match=f"{name} is a masked tensor, whose mask would be lost"):
            bn.batch_norm(*arguments[0], **arguments[1])
    bn.batch_norm(masked.get_data(), where=masked.get_mask())


@pytest.mark.parametrize("shape", [(0, 3), (4, 0), (0, 0, 2)])
def test_empty(shape: tuple[int, ...]) -> None:
    x = torch.empty(shape, requires_grad=True)
    weight = torch.ones(shape[1], requires_grad=True)
    stats = bn.RunningStats(shape[1])
    y = bn.batch_norm(x, weight, stats=stats)
    y.sum().backward()
    assert y.shape == x.grad.shape == shape
    assert (weight.grad == 0).all()
    assert stats.num_updates == 0


def test_exact_where_float32_is_not() -> None:
    x = (1e6 + torch.randn(1000, 3)).requires_grad_()
    dy = torch.randn(1000, 3)
    y = bn.batch_norm(x)
    y.backward(dy)
    wide = x.detach().double().requires_grad_()
    expected = bn.batch_norm(wide)
    expected.backward(dy.double())
    ulp = TOLERANCES["float32"].epsilon
    assert (y - expected).abs().max() <= 4 * 4 * ulp
    assert (x.grad - wide.grad).abs().max() <= 8 * 4 * ulp
