"""To and from other forms of a layer: other systems' batch normalization, and the kernel before it.

What `from_…` makes evaluates as the original does and takes the next batch into its running statistics as the original
would; likewise backwards, what `to_…` makes. Where that is impossible they raise, and say what would be lost. With
``frozen=True`` only evaluation is carried over, and training leaves the running statistics alone.

No framework is imported: objects are read through their attributes, and what is made is options and arrays.
"""

from bnarray.convert._common import Converted
from bnarray.convert.chainer import from_chainer, to_chainer
from bnarray.convert.flax import from_flax, to_flax
from bnarray.convert.folding import fold
from bnarray.convert.haiku import from_haiku, to_haiku
from bnarray.convert.keras import from_keras, to_keras
from bnarray.convert.onnx import from_onnx, to_onnx
from bnarray.convert.torch import from_torch, to_torch

__all__ = [
    "Converted",
    "fold",
    "from_chainer",
    "from_flax",
    "from_haiku",
    "from_keras",
    "from_onnx",
    "from_torch",
    "to_chainer",
    "to_flax",
    "to_haiku",
    "to_keras",
    "to_onnx",
    "to_torch",
]
