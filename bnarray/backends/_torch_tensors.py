"""torch tensors, as long as torch need not follow what is done to them.

On the CPU, and on CUDA devices, kernels work on their memory; elsewhere, and under `torch.func`, it is torch's own
functions.
"""

import ctypes
import mmap
from functools import lru_cache, partial
from math import inf
from typing import Any

import numpy as np
import torch
from torch.autograd import forward_ad
from torch.autograd.graph import increment_version

from bnarray.backends import _again, _strided
from bnarray.backends import numpy as numpy_backend
from bnarray.backends._strided import Memory
from bnarray.backends.generic import plain
from bnarray.cuda import obstacle
from bnarray.dispatch import Transform, backend, load
from bnarray.kernels.cpu import memory, openmp, pool, whole
from bnarray.layout import broadcasts
from bnarray.stats import RunningStats

Tensor = torch.Tensor
Count = Any  # a number or an array

_KINDS = {
    torch.float16: memory.FLOAT16,
    torch.bfloat16: memory.BFLOAT16,
    torch.float32: memory.FLOAT32,
    torch.float64: memory.FLOAT64,
    torch.bool: memory.BOOL,
}
_FLOATS = set(_KINDS) - {torch.bool}

# Where NumPy converts as torch does, but in a third of the time.
_OF_NUMPY = {torch.float32: np.float32, torch.float64: np.float64}

# Types without behaviour of their own.
_PLAIN = {torch.Tensor, torch.nn.Parameter}

# What vectors are like.
_NUMPY = np.empty(0)

# Bytes of new memory from which Linux is asked for large pages, as NumPy asks: else every 4 kB is a page fault. Forward
# and backward of 205 MB took 0.8 of the time.
_LARGE = 2**22
_advise: Any = None
if hasattr(mmap, "MADV_HUGEPAGE"):
    _advise = ctypes.CDLL(None).madvise
    _advise.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int

is_compiling = torch.compiler.is_compiling
_are_transforms_active = torch._C._are_functorch_transforms_active
_number_of_modes = torch._C._len_torch_dispatch_stack
_tracing_state = torch._C._get_tracing_state


# -- Which road --------------------------------------------------------------------------------------------------------


def is_transformed() -> bool:
    """Whether a transformation of `torch.func`, or forward differentiation, watches what torch itself does."""
    return _are_transforms_active() or forward_ad._current_level >= 0


def is_recorded(x: Tensor) -> bool:
    """Whether calls are recorded (compiled, exported, traced) or intercepted.

    They must be operators then: of what a kernel does to memory torch sees nothing.
    """
    return (
        is_compiling()
        or _number_of_modes() > 0
        or _tracing_state() is not None
        or (type(x) not in _PLAIN and type(x).__torch_dispatch__ is not torch._C._disabled_torch_dispatch_impl)
    )


def are_recorded(*arrays: Any) -> bool:
    """Whether calls on these are, of which some may be None, or vectors."""
    return any(isinstance(each, Tensor) and is_recorded(each) for each in arrays)


def is_watched(dy: Tensor) -> bool:
    """Whether torch has to see what is done to a gradient.

    It may also stand for many at once (``is_grads_batched=True``), without memory of its own.
    """
    return is_transformed() or is_recorded(dy) or not torch._C._has_storage(dy)


def _has_memory(x: Tensor) -> bool:
    """Whether kernels can work on a tensor."""
    return x.is_cpu and not is_recorded(x) and not is_transformed()


@lru_cache(maxsize=64)
def _on_device(index: int) -> Any:
    return None if obstacle(index) is not None else load("_torch_cuda")


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _is_served(index: int) -> bool:
    return _on_device(index) is not None


def has_cuda_kernels(x: Tensor) -> bool:
    """Whether there are kernels for x's CUDA device; on others torch's own functions do the work."""
    return x.is_cuda and _is_served(x.device.index)


def _by_cuda(x: Tensor) -> Any:
    """What serves x by CUDA kernels; None where there are none, and where torch has to see what is done to x."""
    return _on_device(x.device.index) if x.is_cuda and not is_recorded(x) and not is_transformed() else None


def _is_captured(x: Tensor) -> bool:
    """Whether x's numbers are not there yet, because what is done to them is captured in a CUDA graph."""
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


def _of(x: Tensor) -> Any:
    if _has_memory(x):
        return _kernels
    there = _by_cuda(x)
    return plain if there is None else there.kernels


# -- Arrays ------------------------------------------------------------------------------------------------------------


def check(x: Tensor, name: str) -> Tensor:
    if x.dtype not in _FLOATS:
        raise TypeError(
            f"{name} has dtype {x.dtype}; it should be float16, bfloat16, float32 or float64: convert it, for example "
            f"by {name}.to(torch.float32)"
        )
    return _plain(x, name)


def _plain(x: Tensor, name: str) -> Tensor:
    """x as its memory has it."""
    if x.is_nested:
        raise TypeError(f"{name} is a nested tensor; it should be one array: pad it, and say by where what counts")
    if isinstance(x, torch.masked.MaskedTensor):
        raise TypeError(
            f"{name} is a masked tensor, whose mask would be lost; pass {name}.get_data(), and of x the mask by "
            f"where=x.get_mask()"
        )
    if x.layout is not torch.strided:
        raise TypeError(f"{name} has layout {x.layout}; it should be dense: convert it by {name}.to_dense()")
    if type(x) not in _PLAIN and type(x).__torch_dispatch__ is torch._C._disabled_torch_dispatch_impl:
        x = x.as_subclass(Tensor)
    if is_compiling():
        return x
    # Signs that are still to be turned, and zeros that have no memory yet.
    return x.clone() if x.is_neg() or x._is_zerotensor() else x


def _are_weights(where: Tensor) -> bool:
    if where.numel() == 0:
        return True
    least, most = torch.aminmax(where)  # both are NaN where anything is
    return bool((least >= 0) & torch.isfinite(most))


def check_where(x: Tensor, where: Tensor) -> Tensor:
    if not broadcasts(where.shape, x.shape):
        raise ValueError(f"where has shape {tuple(where.shape)}; it should broadcast to x's, {tuple(x.shape)}")
    if where.requires_grad:
        raise TypeError("where requires grad, and has no gradient; pass where.detach()")
    if where.dtype is not torch.bool:
        if where.dtype not in _FLOATS:
            raise TypeError(f"where has dtype {where.dtype}; it should be boolean (a mask) or floating (weights)")
        if _may_be_asked(where) and not _are_weights(where):
            raise ValueError("where holds a weight that is negative, infinite or NaN; weights should be >= 0")
    return _plain(where, "where")


def values_are_known(x: Tensor) -> bool:
    """Whether x has values, and is not a part of some program that will have them."""
    return not _are_transforms_active() and not is_recorded(x)


def _may_be_asked(x: Tensor) -> bool:
    """Whether a number may be asked for."""
    return values_are_known(x) and not _is_captured(x)


def check_out(out: Tensor, x: Tensor, allowed: dict[str, Tensor], forbidden: dict[str, Tensor]) -> None:
    plain.check_out(out, x, {}, {})
    if torch.is_grad_enabled():
        for name, tensor in {"out": out, **allowed, **forbidden}.items():
            if tensor.requires_grad:
                raise TypeError(
                    f"{name} requires grad, and autograd records no writing into out; leave out=, or call under "
                    f"torch.no_grad()"
                )
    if not _has_addresses(out):
        raise TypeError("out is a tensor without memory that can be written to here; leave out=")
    _plain(out, "out")
    views = [{name: _addresses(each) for name, each in arrays.items()} for arrays in (allowed, forbidden)]
    numpy_backend.check_memory(_addresses(out), *views)


def _addresses(x: Tensor) -> Any:
    return numpy_backend.at_addresses(x.data_ptr(), tuple(x.shape), _strides(x), x.itemsize)


def _has_addresses(x: Tensor) -> bool:
    return _has_memory(x) or _by_cuda(x) is not None


def overlap(a: Tensor, b: Tensor) -> bool:
    if a is b:
        return True
    return _has_addresses(a) and _has_addresses(b) and numpy_backend.overlap(_addresses(a), _addresses(b))


def device(x: Tensor) -> Any:
    return x.device


def empty_like(x: Tensor) -> Tensor:
    y = torch.empty_like(x)
    if y.nbytes >= _LARGE and _advise is not None and _has_memory(y):
        begin = -(-y.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
        _advise(begin, y.data_ptr() + y.nbytes - begin, mmap.MADV_HUGEPAGE)
    return y


def zeros(shape: tuple[int, ...], like: Tensor) -> Tensor:
    return torch.zeros(shape, dtype=torch.float64, device=like.device)


def copy(x: Tensor) -> Tensor:
    return x.detach().clone()


def guide(*arrays: Tensor) -> Any:
    return tuple(_strides(array) for array in arrays)


def widen(x: Tensor) -> Tensor:
    return x.to(torch.float64, copy=True)


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.to(dtype)


def parameter_dtype(like: Tensor) -> torch.dtype:
    return torch.float64 if like.dtype is torch.float64 else torch.float32


def to_numpy(x: Tensor) -> Any:
    return x.detach().to("cpu", torch.float64, copy=True).numpy()


def convert(x: Any, like: Tensor) -> Tensor:
    if isinstance(x, Tensor):
        return x.to(like.device)
    array = backend(x).to_numpy(x) if not isinstance(x, np.ndarray) else x
    return torch.tensor(array, dtype=torch.float64, device=like.device)


def vector(of_features: Any, x: Tensor, copy: bool = False) -> Any:
    if not _has_memory(x):
        array = convert(of_features, x).to(torch.float64, copy=copy)
        return array if _by_cuda(x) is None else array.detach().contiguous()
    if not isinstance(of_features, Tensor):
        return numpy_backend.vector(of_features, _NUMPY, copy)
    if of_features.dtype is torch.bfloat16:
        of_features = of_features.to(torch.float32)
    array = of_features.detach().numpy()
    return np.array(array, np.float64)


def of_vector(of_features: Any, x: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
    if isinstance(of_features, Tensor):
        return of_features.to(dtype)
    if not x.is_cpu:
        return torch.full((), of_features, dtype=dtype, device=x.device)
    if dtype not in _OF_NUMPY:
        return torch.tensor(of_features, dtype=dtype, device="cpu")  # whatever the default
    with np.errstate(all="ignore"):  # beyond a dtype is infinity, or zero
        return torch.from_numpy(np.array(of_features, _OF_NUMPY[dtype]))


def follow(running_mean: Tensor, running_var: Tensor, count: int, mean: Any, m2: Any, rate: float) -> bool:
    """Take a batch's statistics (vectors) into running ones, unless they are not finite; return whether they are."""
    running = running_mean, running_var
    of_mean, of_var = (_of_memory(each) for each in running)
    if of_mean is None or of_mean != of_var or running_mean.dtype not in _KINDS or not running_mean.is_contiguous():
        if not numpy_backend.is_finite(mean, m2):
            return False
        for old, new in zip(running, (mean, m2 / (count - 1)), strict=True):
            old.lerp_(of_vector(new, old, old.dtype), rate)
        return True
    at = running_mean.data_ptr(), running_var.data_ptr(), _KINDS[running_mean.dtype]
    is_finite: bool = whole.track.call(float(count), mean, m2, rate, *at, np.empty((4, mean.size)))
    if is_finite and not running_mean.is_inference():
        increment_version(running)
    return is_finite


# -- Verbs -------------------------------------------------------------------------------------------------------------


def _strides(x: Tensor) -> tuple[int, ...]:
    size = x.itemsize
    return tuple([size * step for step in x.stride()])


def _team() -> pool.Team:
    """torch's own threads, where they are an OpenMP runtime's that takes work from others."""
    try:
        # (The documentation is built with a stand-in for torch, whose path is none of a library.)
        return openmp.Crew(str(torch._C.__file__), torch.get_num_threads)
    except (OSError, AttributeError):
        return pool.helpers


_TEAM = _team()


def _memory(x: Tensor) -> Memory:
    return Memory(x, x.data_ptr(), _KINDS[x.dtype], tuple(x.shape), _strides(x), _TEAM)


_kernels = _strided.Adapter(_memory, empty_like)


def _of_memory(x: Any) -> tuple[Any, ...] | None:
    """What plans follow from, of a tensor that is no more than memory."""
    if type(x) not in _PLAIN or not x.is_cpu or x.layout is not torch.strided or x.is_neg() or x._is_zerotensor():
        return None
    return x.dtype, x.shape, x.stride()


_NOTHING = (None,)


def signature(x: Tensor, *of_features: Tensor | None) -> tuple[Any, ...] | None:
    """As a verb has it, of tensors that torch need not follow."""
    if x.is_nested or not _has_memory(x) or x.numel() == 0:
        return None
    found = [_of_memory(x)]
    for each in of_features:
        found.append(_NOTHING if each is None else _of_memory(each))
    return None if None in found else tuple(found)


def signature_of_gradient(dy: Tensor, x: Tensor) -> tuple[Any, ...] | None:
    if type(dy) not in _PLAIN or not _has_memory(dy) or dy.dtype not in _FLOATS or dy.shape != x.shape:
        return None
    return _of_memory(dy) if torch._C._has_storage(dy) else None


def _ends(x: Tensor) -> tuple[int, int]:
    begin, last = x.data_ptr(), sum(step * (size - 1) for step, size in zip(x.stride(), x.shape, strict=True))
    return begin, begin + x.itemsize * (1 + last)


def _is_free(out: Tensor, *others: Tensor | None) -> bool:
    if out.requires_grad and torch.is_grad_enabled():
        return False
    begin, end = _ends(out)
    for each in others:
        if each is not None:
            first, last = _ends(each)
            if first < end and begin < last:
                return False
    return True


def _wrote(out: Tensor | None) -> None:
    if out is not None:
        increment_version(out)  # which tells autograd that what it may have saved has changed


_arrays = _again.Library(
    look=_memory,
    layout=_of_memory,
    is_free=_is_free,
    will_write=_wrote,
    place=lambda x: memory.NOWHERE if x is None else x.data_ptr(),
    empty_like=empty_like,
    empty=partial(torch.empty, device="cpu"),
    vector=lambda of_features: vector(of_features, of_features),
    is_contiguous=Tensor.is_contiguous,
    is_object=False,
)
again = partial(_again.plan, _arrays)


def moments(x: Tensor, kept: tuple[int, ...], where: Tensor | None) -> tuple[Count, Any, Any]:
    return _of(x).moments(x, kept, where)  # type: ignore[no-any-return]  # a verb


def forward(
    x: Tensor, kept: tuple[int, ...], eps: float, weight: Any, bias: Any, relu: bool, out: Tensor | None
) -> tuple[Count, Any, Any, Tensor] | None:
    done: tuple[Count, Any, Any, Tensor] | None = _of(x).forward(x, kept, eps, weight, bias, relu, out)
    _wrote(out)
    return done


def normalize(x: Tensor, transform: Transform, out: Tensor | None) -> Tensor:
    y: Tensor = _of(x).normalize(x, transform, out)
    _wrote(out)
    return y


def backward(
    dy: Tensor, x: Tensor, transform: Transform, where: Tensor | None, is_constant: bool, out: Tensor | None
) -> tuple[Tensor, Any, Any, Tensor | None] | None:
    gradients = _of(x).backward(dy, x, transform, where, is_constant, out)
    _wrote(out)
    return gradients  # type: ignore[no-any-return]  # a verb


def stats_type(like: Tensor) -> type[RunningStats]:
    there = _by_cuda(like)
    return RunningStats if there is None else there.Stats


def grad_sums(dy: Tensor, x: Tensor, transform: Transform) -> tuple[Any, Any]:
    sums: tuple[Any, Any] = _of(x).grad_sums(dy, x, transform)
    return sums


def grad_input(
    dy: Tensor,
    x: Tensor,
    transform: Transform,
    where: Tensor | None,
    sums: tuple[Any, Any] | None,
    out: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    dx, dresidual = _of(x).grad_input(dy, x, transform, where, sums, out)
    _wrote(out)
    return dx, dresidual


def is_finite(array: Tensor, other: Tensor | None = None) -> bool:
    return not _may_be_asked(array) or plain.is_finite(array, other)


def lowest(array: Any) -> float:
    if not isinstance(array, Tensor):
        return inf if not isinstance(array, int | float) else array
    return float(plain.lowest(array.detach())) if _may_be_asked(array) else inf


def number(array: Tensor) -> Any:
    return float(array.detach()) if _may_be_asked(array) else array
