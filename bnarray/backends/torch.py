"""torch tensors: the kernels, differentiable, and as operators where torch compiles."""

from typing import Any

import torch

from bnarray.backends import _torch_operations, _torch_tensors
from bnarray.backends._again import Training
from bnarray.backends._torch_tensors import (
    Count,
    Tensor,
    are_recorded,
    backward,
    cast,
    check,
    check_out,
    check_where,
    convert,
    copy,
    device,
    empty_like,
    forward,
    grad_input,
    grad_sums,
    guide,
    has_cuda_kernels,
    is_finite,
    is_recorded,
    is_transformed,
    lowest,
    moments,
    normalize,
    number,
    of_vector,
    overlap,
    parameter_dtype,
    stats_type,
    to_numpy,
    values_are_known,
    vector,
    widen,
    zeros,
)
from bnarray.backends.generic import array_namespace, namespaces, plain, widest, widest_on
from bnarray.dispatch import Capabilities
from bnarray.stats import Moments

CAPABILITIES = Capabilities(
    dtypes=("float16", "bfloat16", "float32", "float64"),
    runs="compiled kernels on the CPU and CUDA devices (those not yet run on a GPU), torch's functions elsewhere",
    layouts=True,
    devices=True,
    gradients="autograd, any order",
    transforms=("torch.compile", "torch.func"),
)

TYPES = torch.Tensor, torch.nn.Parameter
_namespace = array_namespace(torch.empty(0))
namespaces.update(dict.fromkeys(TYPES, _namespace))


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _widest_on(kind: str) -> torch.dtype:
    return widest_on(_namespace, torch.device(kind))  # type: ignore[no-any-return]


widest.update(dict.fromkeys(TYPES, lambda x: _widest_on(x.device.type)))

is_grad_enabled = torch.is_grad_enabled

traced_statistic = convert
traced_forward = _torch_operations.forward
traced_backward = _torch_operations.backward
traced_moments = _torch_operations.moments
variance, merge, invstd = plain.variance, plain.merge, plain.invstd


def is_traced(*arrays: Tensor | None) -> bool:
    x = arrays[0]
    assert x is not None, "x comes first"
    if are_recorded(*arrays):
        return True
    # Elsewhere, and under a transformation, verbs are made of torch's functions, which torch follows by itself.
    return _is_followed(*arrays) and (x.is_cpu or has_cuda_kernels(x)) and not is_transformed()


def _is_followed(*tensors: Any) -> bool:
    if is_grad_enabled():
        for each in tensors:
            if isinstance(each, Tensor) and each.requires_grad:
                return True
    return False


def signature(x: Tensor, *of_features: Any) -> tuple[Any, ...] | None:
    of_tensors = _torch_tensors.signature(x, *of_features)
    return of_tensors and (_is_followed(x, *of_features), of_tensors)


def again(call: Any) -> Any:
    plan = _torch_tensors.again(call)
    given = (call.stats.mean, call.stats.m2) if isinstance(call.stats, Moments) else ()
    if not _is_followed(call.x, call.weight, call.bias, *given):
        return plan
    return _torch_operations.Followed(plan) if isinstance(plan, Training) else None


def signature_of_gradient(dy: Any, x: Tensor) -> tuple[Any, ...] | None:
    return None if _is_followed(dy, x) else _torch_tensors.signature_of_gradient(dy, x)


def joins(*arrays: Tensor | None) -> bool:
    x = arrays[0]
    assert x is not None, "x comes first"
    if are_recorded(*arrays) or is_transformed():
        raise NotImplementedError(
            "group is for eager calls: torch.compile, torch.export and torch.func cannot follow one to other "
            "processes; call it where they do not look, for example under torch.compiler.disable"
        )
    # On any device: of what comes from other processes torch's own functions would know nothing.
    return _is_followed(*arrays)


def prepare(stats: Any, count: Count, mean: Any, m2: Any) -> Any:
    if isinstance(mean, Tensor) and mean.is_meta:
        raise TypeError("x is on the device meta, so that it has no values to update stats with; leave stats out")
    if isinstance(mean, Tensor) and not values_are_known(mean):
        return _torch_operations.prepare(stats, count, mean, m2)
    return stats.prepare(count, mean, m2)


def current(stats: Any, x: Tensor) -> tuple[Any, Any]:
    if is_recorded(x) and (x.is_cpu or has_cuda_kernels(x)):
        return _torch_operations.current(stats, x)
    return stats.mean_and_var()  # type: ignore[no-any-return]
