"""torch tensors: the kernels, differentiable, and as operators where torch compiles."""

from typing import Any

import torch

from bnarray.backends import _torch_operations
from bnarray.backends._torch_tensors import (
    Count,
    Tensor,
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
from bnarray.backends.generic import array_namespace, namespaces, plain
from bnarray.dispatch import Capabilities

CAPABILITIES = Capabilities(
    dtypes=("float16", "bfloat16", "float32", "float64"),
    runs="compiled kernels on the CPU and CUDA devices (those not yet run on a GPU), torch's functions elsewhere",
    layouts=True,
    devices=True,
    gradients="autograd, any order",
    transforms=("torch.compile", "torch.func"),
)

TYPES = torch.Tensor, torch.nn.Parameter
namespaces.update(dict.fromkeys(TYPES, array_namespace(torch.empty(0))))

is_grad_enabled = torch.is_grad_enabled

traced_statistic = convert
traced_forward = _torch_operations.forward
traced_backward = _torch_operations.backward
traced_moments = _torch_operations.moments
variance, merge, invstd = plain.variance, plain.merge, plain.invstd


def is_traced(*arrays: Tensor | None) -> bool:
    x = arrays[0]
    assert x is not None, "x comes first"
    if is_recorded(x):
        return True
    if not is_grad_enabled() or is_transformed() or not (x.is_cpu or has_cuda_kernels(x)):
        return False  # the plain verbs are made of torch's functions, which torch follows by itself
    for each in arrays:  # noqa: SIM110  # a generator costs as much again
        if isinstance(each, Tensor) and each.requires_grad:
            return True
    return False


def joins(*arrays: Tensor | None) -> bool:
    x = arrays[0]
    assert x is not None, "x comes first"
    if is_recorded(x) or is_transformed():
        raise NotImplementedError(
            "group is for eager calls: torch.compile, torch.export and torch.func cannot follow one to other "
            "processes; call it where they do not look, for example under torch.compiler.disable"
        )
    # On any device: of what comes from other processes torch's own functions would know nothing.
    return is_grad_enabled() and any(isinstance(each, Tensor) and each.requires_grad for each in arrays)


def prepare(stats: Any, count: Count, mean: Any, m2: Any) -> Any:
    if isinstance(mean, Tensor) and not values_are_known(mean):
        return _torch_operations.prepare(stats, count, mean, m2)
    return stats.prepare(count, mean, m2)


def current(stats: Any, x: Tensor) -> tuple[Any, Any]:
    if is_recorded(x) and (x.is_cpu or has_cuda_kernels(x)):
        return _torch_operations.current(stats, x)
    return stats.mean_and_var()  # type: ignore[no-any-return]
