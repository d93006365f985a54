"""Drop-in modules for torch networks.

They are torch's own batch normalization modules with another forward pass. Parameters and buffers are torch's and the
only store, so that state dicts, `functional_call`, data-parallel wrappers, `.half()`, `torch.optim.swa_utils.update_bn`
and `torch.nn.utils.fuse_conv_bn_eval` work as they always did, and a model can be converted back at any time.

Two things are better than in torch: statistics are computed in float64 (and kept in the buffers' dtype), and a batch
with a NaN or an infinity does not get into the buffers: it is left out, with a warning where the values are at hand.
"""

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from bnarray.backends import _torch_tensors as tensors
from bnarray.dispatch import meet
from bnarray.functional import batch_norm, batch_norm_forward
from bnarray.stats import Moments

__all__ = ["BatchNorm1d", "BatchNorm2d", "BatchNorm3d", "convert", "revert"]

meet()  # the first call of a module may be one that torch compiles


def _track(module: Any, count: int, mean: Any, m2: Any) -> None:
    """Take a batch's statistics into the buffers."""
    if isinstance(mean, Tensor):
        _track_unseen(module, mean, m2 / (count - 1))
        return
    number, is_mean_of_all = module.num_batches_tracked, module.momentum is None
    rate = _rate(module, int(number) + 1 if is_mean_of_all and number is not None else None)
    if tensors.follow(module.running_mean, module.running_var, count, mean, m2, rate):
        if number is not None:
            number.add_(1)
    else:
        warnings.warn(
            "the batch's statistics hold a NaN or an infinity; the running ones skip it",
            RuntimeWarning,
            stacklevel=5,  # the caller of the module, past torch's two frames
        )


def _track_unseen(module: Any, mean: Tensor, var: Tensor) -> None:
    """Do so without a look at the values, in functions that torch can compile and transform."""
    is_finite = torch.isfinite(mean).all() & torch.isfinite(var).all()
    number = None if module.num_batches_tracked is None else module.num_batches_tracked + is_finite
    rate = _rate(module, None if number is None else number.clamp(min=1).double())
    for running, new in ((module.running_mean, mean), (module.running_var, var)):
        moved = running + rate * (new.detach() - running)
        running.copy_(torch.where(is_finite, moved.to(running.dtype), running))
    if number is not None:
        module.num_batches_tracked.copy_(number)


def _rate(module: Any, number: Any) -> Any:
    """The weight of the latest of so many batches; torch's where nobody counts them."""
    if module.momentum is not None:
        return module.momentum
    return 0.0 if number is None else 1 / number


class _Forward:
    """The forward pass of all three."""

    def forward(self: Any, input: Any) -> Any:  # noqa: A002  # as torch calls it
        """Return input, normalised per feature (axis 1), in its dtype and memory format.

        Parameters
        ----------
        input
            As torch's module of the same name takes it; float16 and bfloat16 too, whatever the parameters' dtype.

        Raises
        ------
        ValueError
            If the number of axes is wrong, or a training batch has one value of each feature.
        """
        if isinstance(input, torch.fx.Proxy):  # a symbolic trace takes the module as a whole, as it does torch's own
            tracer: Any = input.tracer
            return tracer.create_proxy("call_module", tracer.path_of_module(self), (input,), {})
        self._check_input_dim(input)
        options = {"eps": self.eps, "axis": 1}
        if not self.training and self.running_mean is not None:
            stats = Moments.of(1, self.running_mean, self.running_var)
            return batch_norm(input, self.weight, self.bias, stats=stats, training=False, **options)
        features = input.shape[1]
        count = input.numel() // features if features else 0
        if self.training and count == 1:
            raise ValueError(
                f"input has shape {tuple(input.shape)}, one value of each feature: too few to train with; give larger "
                f"batches, or call eval() before"
            )
        y, saved = batch_norm_forward(input, self.weight, self.bias, **options)
        if self.training and self.track_running_stats and self.running_mean is not None and count:
            _track(self, count, saved.transform.mean, saved.transform.m2)
        return y


class BatchNorm1d(_Forward, nn.BatchNorm1d):
    """`torch.nn.BatchNorm1d`, through bnarray's kernels.

    Parameters are torch's: ``(num_features, eps=1e-5, momentum=0.1, affine=True, track_running_stats=True, device=None,
    dtype=None)``.

    Examples
    --------
    >>> import torch
    >>> from bnarray.torch import BatchNorm1d
    >>> layer = BatchNorm1d(2, affine=False)
    >>> layer(torch.tensor([[1.0, 10.0], [3.0, 30.0]])).round()
    tensor([[-1., -1.],
            [ 1.,  1.]])
    >>> layer.running_mean
    tensor([0.2000, 2.0000])
    """


class BatchNorm2d(_Forward, nn.BatchNorm2d):
    """`torch.nn.BatchNorm2d`, through bnarray's kernels; parameters are torch's.

    Examples
    --------
    >>> import torch
    >>> from bnarray.torch import BatchNorm2d
    >>> images = torch.rand(8, 3, 32, 32).to(memory_format=torch.channels_last)
    >>> BatchNorm2d(3)(images).is_contiguous(memory_format=torch.channels_last)
    True
    """


class BatchNorm3d(_Forward, nn.BatchNorm3d):
    """`torch.nn.BatchNorm3d`, through bnarray's kernels; parameters are torch's.

    Examples
    --------
    >>> import torch
    >>> from bnarray.torch import BatchNorm3d
    >>> BatchNorm3d(3)(torch.rand(2, 3, 4, 5, 6)).shape
    torch.Size([2, 3, 4, 5, 6])
    """


_OURS = {nn.BatchNorm1d: BatchNorm1d, nn.BatchNorm2d: BatchNorm2d, nn.BatchNorm3d: BatchNorm3d}


def _exchange(model: nn.Module, classes: dict[Any, Any]) -> nn.Module:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}; it should be a torch.nn.Module")
    for module in model.modules():
        if type(module) in classes:
            module.__class__ = classes[type(module)]
    return model


def convert(model: nn.Module) -> nn.Module:
    """Let every `torch.nn.BatchNorm1d`, `2d` and `3d` of a model compute through bnarray, in place.

    Only the modules' class changes: parameters, buffers, hooks and the modules themselves stay, and so do subclasses of
    torch's modules.

    Parameters
    ----------
    model
        A network, or one module.

    Returns
    -------
    torch.nn.Module
        The model.

    Raises
    ------
    TypeError
        If model is no module.

    Examples
    --------
    >>> import torch
    >>> from bnarray.torch import convert, revert
    >>> model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    >>> type(convert(model)[1]).__module__
    'bnarray.torch'
    >>> type(revert(model)[1]).__module__
    'torch.nn.modules.batchnorm'
    """
    return _exchange(model, _OURS)


def revert(model: nn.Module) -> nn.Module:
    """Undo `convert`: let every module of bnarray in a model compute as torch does, in place; return the model.

    Raises
    ------
    TypeError
        If model is no module.
    """
    return _exchange(model, {ours: theirs for theirs, ours in _OURS.items()})
