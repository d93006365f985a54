"""torch tensors on CUDA devices, as the CUDA kernels see them: by pointer, on torch's current stream, in its memory."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from bnarray.backends import _cuda
from bnarray.backends._cuda import Memory
from bnarray.backends._cuda_stats import DeviceStats
from bnarray.kernels.cuda import memory
from bnarray.kernels.cuda.compiled import make_current

Tensor = torch.Tensor

_KINDS = {
    torch.float16: memory.FLOAT16,
    torch.bfloat16: memory.BFLOAT16,
    torch.float32: memory.FLOAT32,
    torch.float64: memory.FLOAT64,
    torch.bool: memory.BOOL,
}

_NOTHING: AbstractContextManager[None] = nullcontext()


class Library:
    """torch, as `_cuda.Adapter` asks for it. What it allocates amid a capture, it keeps for the graph by itself."""

    def memory(self, x: Tensor) -> Memory:
        return Memory(x.data_ptr(), _KINDS[x.dtype], tuple(x.shape), x.stride())

    def empty_like(self, x: Tensor) -> Tensor:
        return torch.empty_like(x)

    def vector(self, shape: tuple[int, ...], like: Tensor) -> Tensor:
        return torch.empty(shape, dtype=torch.float64, device=like.device)

    def words(self, number: int, like: Tensor) -> tuple[Tensor, int]:
        array = torch.zeros(number, dtype=torch.int32, device=like.device)
        return array, array.data_ptr()

    def on_device_of(self, x: Tensor) -> AbstractContextManager[Any]:
        return _NOTHING if torch.cuda.current_device() == x.device.index else torch.cuda.device(x.device)

    def queue(self, x: Tensor) -> tuple[int, int]:
        make_current(x.device.index)
        return x.device.index, torch.cuda.current_stream(x.device).cuda_stream

    def stream(self, x: Tensor) -> Any:
        return torch.cuda.current_stream(x.device)

    def handle(self, stream: Any) -> int:
        return stream.cuda_stream  # type: ignore[no-any-return]

    def is_capturing(self, x: Tensor) -> bool:
        return torch.cuda.is_current_stream_capturing()


library = Library()
kernels = _cuda.Adapter(library)


class Stats(DeviceStats):
    library = library
