"""The drop-in modules beside torch's own, in everything that is done with them."""

import copy
import io
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed: its modules are not verified")

from torch import nn  # noqa: E402  # once it is known to be there

import bnarray.torch as bt  # noqa: E402

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # torch's own tests import much
    expecttest = pytest.importorskip(
        "expecttest", reason="expecttest is not installed: torch's own samples for batch normalization are not verified"
    )
    from torch.testing._internal.common_methods_invocations import op_db
    from torch.testing._internal.common_modules import module_db

import bnarray as bn  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")  # torch's own, when it compiles

Tensor = Any

OURS = {"nn.BatchNorm1d": bt.BatchNorm1d, "nn.BatchNorm2d": bt.BatchNorm2d, "nn.BatchNorm3d": bt.BatchNorm3d}


@pytest.fixture(autouse=True)
def one_seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def _network() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()),
        *(nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8, affine=False), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(8 * 16, 10), nn.BatchNorm1d(10, momentum=None)),
    )


def _pair() -> tuple[nn.Module, nn.Module]:
    theirs = _network()
    ours = bt.convert(copy.deepcopy(theirs))
    assert [type(module).__module__ for module in (ours[1], ours[4], ours[8])] == ["bnarray.torch"] * 3
    return theirs, ours


def _assert_same_state(ours: nn.Module, theirs: nn.Module, **tolerance: float) -> None:
    a, b = ours.state_dict(), theirs.state_dict()
    assert list(a) == list(b)
    for name in a:
        assert a[name].dtype == b[name].dtype
        torch.testing.assert_close(a[name], b[name], msg=name, **(tolerance or {"rtol": 1e-5, "atol": 1e-6}))


# -- torch's own samples -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("info", [info for info in module_db if info.name in OURS], ids=lambda info: info.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_module_samples(info: Any, training: bool, dtype: Any) -> None:
    samples = info.module_inputs_func(info, "cpu", dtype, True, training)
    assert samples
    for sample in samples:
        made, given = sample.constructor_input, sample.forward_input
        outcomes = []
        for kind in (info.module_cls, OURS[info.name]):
            torch.manual_seed(0)
            module = kind(*made.args, **made.kwargs, dtype=dtype).train(training)
            for parameter in module.parameters():
                nn.init.normal_(parameter)
            x = given.args[0].detach().clone().requires_grad_()
            y = module(x)
            y.pow(3).sum().backward()
            outcomes.append((module, y, x.grad, [parameter.grad for parameter in module.parameters()]))
        (theirs, *expected), (ours, *found) = outcomes
        torch.testing.assert_close(found, expected, rtol=1e-4 if dtype == torch.float32 else 1e-9, atol=1e-4)
        if given.args[0].numel():
            _assert_same_state(ours, theirs)
        else:  # torch takes the statistics of an empty batch, NaN, into its buffers
            assert (ours.running_mean == 0).all()
            assert int(ours.num_batches_tracked) == 0


def test_operator_samples() -> None:
    """`torch.nn.functional.batch_norm` as torch tests it, by `bnarray.batch_norm`."""
    info = next(info for info in op_db if info.name == "nn.functional.batch_norm")
    tried = 0
    for sample in info.sample_inputs("cpu", torch.float64, requires_grad=True):
        x, (mean, var, weight, bias), options = sample.input, sample.args, dict(sample.kwargs)
        if x.ndim < 2:
            continue  # torch takes the only axis for the features; here it is axis=0
        training = options.get("training", False)
        stats = None if training else bn.Moments(1, mean.detach(), var.detach())
        theirs = torch.nn.functional.batch_norm(x, mean, var, weight, bias, **options)
        ours = bn.batch_norm(x, weight, bias, stats=stats, training=training, eps=options.get("eps", 1e-5))
        torch.testing.assert_close(ours, theirs)
        wanted = [each for each in (x, weight, bias) if each is not None]
        dy = torch.randn_like(x)
        for a, b in zip(torch.autograd.grad(ours, wanted, dy), torch.autograd.grad(theirs, wanted, dy), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
        tried += 1
    assert tried >= 9


# -- In a network ------------------------------------------------------------------------------------------------------


def _train(model: nn.Module, steps: int, x: Tensor, labels: Tensor) -> list[float]:
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=["first", "last"])
def test_training_gives_the_same_losses(memory_format: Any) -> None:
    theirs, ours = (model.double().to(memory_format=memory_format) for model in _pair())
    x = torch.randn(16, 3, 8, 8, dtype=torch.float64).to(memory_format=memory_format)
    labels = torch.randint(10, (16,))
    expected, found = _train(theirs, 50, x, labels), _train(ours, 50, x, labels)
    assert expected[-1] < expected[0] / 3
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=0)
    _assert_same_state(ours, theirs, rtol=1e-7, atol=1e-8)
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x), rtol=1e-7, atol=1e-8)


def test_convert_and_revert_exchange_the_class_alone() -> None:
    model = _network()
    bound, calls = model[1], []
    model[1].register_forward_hook(lambda module, inputs, output: calls.append(type(module)))
    tensors = [id(each) for each in (*model.parameters(), *model.buffers())]
    assert bt.convert(model) is model
    assert model[1] is bound
    assert isinstance(bound, nn.BatchNorm2d)
    model(torch.randn(4, 3, 8, 8))
    assert calls == [bt.BatchNorm2d]
    assert bt.revert(model) is model
    assert [id(each) for each in (*model.parameters(), *model.buffers())] == tensors
    assert [type(model[i]) for i in (1, 4, 8)] == [nn.BatchNorm2d, nn.BatchNorm2d, nn.BatchNorm1d]

    class Own(nn.BatchNorm2d): ...

    assert type(bt.convert(Own(3))) is Own
    assert type(bt.convert(nn.SyncBatchNorm(3))) is nn.SyncBatchNorm
    with pytest.raises(TypeError, match="model is a int"):
        bt.convert(3)


def test_state_dicts_pass_both_ways() -> None:
    theirs, ours = _pair()
    x = torch.randn(16, 3, 8, 8)
    ours(x)
    theirs.load_state_dict(ours.state_dict())
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x))
    theirs.train()(x)
    ours.load_state_dict(theirs.state_dict())
    _assert_same_state(ours, theirs)
    file = io.BytesIO()
    torch.save(ours, file)
    file.seek(0)
    restored = torch.load(file, weights_only=False)
    assert type(restored[1]) is bt.BatchNorm2d
    torch.testing.assert_close(restored(x), ours(x), rtol=0, atol=0)


@pytest.mark.parametrize("change", ["half", "bfloat16", "double"])
def test_dtypes_of_the_module(change: str) -> None:
    theirs, ours = (getattr(module, change)() for module in (nn.BatchNorm2d(3), bt.BatchNorm2d(3)))
    x = getattr(torch.randn(8, 3, 4, 4), change)()
    torch.testing.assert_close(ours(x), theirs(x))
    _assert_same_state(ours, theirs, rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x), rtol=2e-2, atol=2e-2)


def test_half_precision_data_and_float32_parameters() -> None:
    x = torch.randn(8, 3, 4, 4, dtype=torch.bfloat16)
    module = bt.BatchNorm2d(3)
    assert module(x).dtype == torch.bfloat16
    assert module.running_mean.dtype == torch.float32


def test_update_bn() -> None:
    theirs, ours = _pair()
    batches = [torch.randn(size, 3, 8, 8) for size in (16, 16, 16)]
    for model in (theirs, ours):
        model(batches[0] * 3)
        torch.optim.swa_utils.update_bn(batches, model)
    _assert_same_state(ours, theirs)
    assert int(ours[1].num_batches_tracked) == 3


def test_fuse_conv_bn_eval() -> None:
    _, ours = _pair()
    x = torch.randn(16, 3, 8, 8)
    ours(x)
    ours.eval()
    fused = torch.nn.utils.fuse_conv_bn_eval(ours[0], ours[1])
    torch.testing.assert_close(fused(x), ours[1](ours[0](x)), rtol=1e-5, atol=1e-5)


def test_functional_call() -> None:
    module, x = bt.BatchNorm1d(3), torch.randn(16, 3)
    parameters = {"weight": torch.full((3,), 2.0), "bias": torch.ones(3)}
    buffers = {name: buffer.clone() for name, buffer in module.named_buffers()}
    y = torch.func.functional_call(module, (parameters, buffers), (x,))
    torch.testing.assert_close(y, bn.batch_norm(x, *parameters.values()))
    assert int(buffers["num_batches_tracked"]) == 1
    assert int(module.num_batches_tracked) == 0

    def loss(parameters: Any, buffers: Any, kind: Any) -> Tensor:
        return torch.func.functional_call(kind(3), (parameters, buffers), (x,)).pow(3).sum()

    gradients = [
        torch.func.grad(loss)(parameters, {name: buffer.clone() for name, buffer in buffers.items()}, kind)
        for kind in (bt.BatchNorm1d, nn.BatchNorm1d)
    ]
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("momentum", [0.1, None])
def test_compiled(momentum: float | None) -> None:
    torch._dynamo.reset()
    eager = bt.BatchNorm2d(3, momentum=momentum)
    compiled = copy.deepcopy(eager)
    function = torch.compile(compiled, fullgraph=True, backend="aot_eager")
    x = torch.randn(8, 3, 4, 4, requires_grad=True)
    for factor in (1, 2, float("nan"), 3):
        batch = (x.detach() * factor).requires_grad_()
        if factor == factor:
            eager(batch)
        function(batch).sum().backward()
        _assert_same_state(compiled, eager)
    torch.testing.assert_close(function(x), eager(x), rtol=1e-6, atol=1e-6)
    compiled.eval()
    torch.testing.assert_close(function(x), eager.eval()(x), rtol=1e-6, atol=1e-6)
    torch._dynamo.reset()


def test_first_call_is_compiled(run_python: Callable[..., str]) -> None:
    code = (
        "import torch; from torch import nn; from bnarray.torch import convert;"
        "model = torch.compile(convert(nn.BatchNorm1d(3)), fullgraph=True, backend='aot_eager');"
        "print(*model(torch.ones(5, 3)).shape)"
    )
    assert run_python(code).split() == ["5", "3"]


def test_symbolic_trace_takes_the_module_whole() -> None:
    _, ours = _pair()
    x = torch.randn(4, 3, 8, 8)
    traced = torch.fx.symbolic_trace(ours.eval())
    assert [node.op for node in traced.graph.nodes].count("call_module") == 9
    torch.testing.assert_close(traced(x), ours(x), rtol=0, atol=0)


def test_data_parallel(tmp_path: Any) -> None:
    """In a wrapper that hands buffers round."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        theirs, ours = (nn.parallel.DistributedDataParallel(model) for model in _pair())
        x, labels = torch.randn(16, 3, 8, 8), torch.randint(10, (16,))
        torch.testing.assert_close(_train(ours, 5, x, labels), _train(theirs, 5, x, labels), rtol=1e-4, atol=1e-5)
        _assert_same_state(ours.module, theirs.module, rtol=1e-3, atol=1e-4)
    finally:
        torch.distributed.destroy_process_group()


# -- What is refused, and what is better -------------------------------------------------------------------------------


def test_errors() -> None:
    module = bt.BatchNorm2d(3)
    before = copy.deepcopy(module.state_dict())
    for x, error, message in [
        (torch.randn(4, 3), ValueError, "expected 4D input"),
        (torch.randn(4, 2, 5, 5), ValueError, "weight has shape"),
        (torch.randn(1, 3, 1, 1), ValueError, "one value of each feature"),
        (torch.ones(4, 3, 5, 5, dtype=torch.int32), TypeError, "x has dtype"),
    ]:
        with pytest.raises(error, match=message):
            module(x)
    for name, buffer in module.state_dict().items():
        assert torch.equal(buffer, before[name])
    module.eval()(torch.randn(1, 3, 1, 1))


def test_bad_batch_stays_out() -> None:
    module, x = bt.BatchNorm1d(3), torch.randn(16, 3)
    module(x)
    before = copy.deepcopy(module.state_dict())
    x[0, 1] = float("nan")
    with pytest.warns(RuntimeWarning, match="skip it") as caught:
        module(x)
    assert caught[0].filename == __file__
    for name, buffer in module.state_dict().items():
        assert torch.equal(buffer, before[name])


def test_without_tracking() -> None:
    for kind in (nn.BatchNorm1d, bt.BatchNorm1d):
        module = kind(3, track_running_stats=False).eval()
        assert module.running_mean is None
        y = module(torch.ones(4, 3))
        assert (y == 0).all()
    stopped, theirs = bt.BatchNorm1d(3), nn.BatchNorm1d(3)
    for module in (stopped, theirs):
        module.track_running_stats = False
        module(torch.arange(12.0).view(4, 3))
    _assert_same_state(stopped, theirs)
    assert (stopped.running_mean == 0).all()


@pytest.mark.parametrize("momentum", [0.3, None])
def test_without_a_number_of_batches(momentum: float | None) -> None:
    """As modules have it whose buffer was taken away."""
    x = torch.randn(6, 3)
    ours, theirs = bt.BatchNorm1d(3, momentum=momentum), torch.nn.BatchNorm1d(3, momentum=momentum)
    for module in (ours, theirs):
        module.num_batches_tracked = None
        module(x)
    torch.testing.assert_close(ours.running_var, theirs.running_var)


def test_statistics_far_from_zero() -> None:
    x = 1e6 + torch.randn(10000, 3)
    ours, theirs = bt.BatchNorm1d(3, momentum=1.0), nn.BatchNorm1d(3, momentum=1.0)
    ours(x), theirs(x)
    exact = x.double().var(0)
    assert (ours.running_var / exact - 1).abs().max() < 1e-6
    assert (theirs.running_var / exact - 1).abs().max() > 1e-6  # why one might want to convert


def test_imports_nothing_else(run_python: Callable[..., str]) -> None:
    code = "import sys, bnarray.torch; print(*sorted({name.partition('.')[0] for name in sys.modules}))"
    assert not set(run_python(code).split()) & {"jax", "cupy", "dask", "autograd"}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_buffers_of_any_dtype_follow_in_place(dtype: Any) -> None:
    """In float64, rounded once; and torch hears of it, as of everything that is done to a tensor in place."""
    layer = bt.BatchNorm1d(3, dtype=dtype)
    x = torch.randn(8, 3, dtype=torch.float64)
    before, versions = layer.running_mean.data_ptr(), [each._version for each in layer.buffers()]
    layer(x)
    assert layer.running_mean.data_ptr() == before
    assert all(new._version > old for new, old in zip(layer.buffers(), versions, strict=True))
    torch.testing.assert_close(layer.running_mean, (0.1 * x.mean(0)).to(dtype), rtol=1e-7, atol=0)
    torch.testing.assert_close(layer.running_var, (0.9 + 0.1 * x.var(0)).to(dtype), rtol=1e-7, atol=0)
    layer.running_mean = torch.zeros(6, dtype=dtype)[::2]  # memory that is not contiguous
    layer(x)
    torch.testing.assert_close(layer.running_mean, (0.1 * x.mean(0)).to(dtype), rtol=1e-2, atol=1e-3)
    with torch.inference_mode():
        bt.BatchNorm1d(3)(x)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_evaluation_follows_the_buffers(dtype: Any) -> None:
    layer, x = bt.BatchNorm1d(3, dtype=dtype).eval(), torch.randn(8, 3, dtype=torch.float64)
    for mean, var in ((0.5, 4.0), (-1.5, 0.25), (2.0, 1.0)):
        layer.running_mean.fill_(mean)
        layer.running_var.fill_(var)
        with torch.no_grad():
            torch.testing.assert_close(layer(x), (x - mean) / (var + 1e-5) ** 0.5)
