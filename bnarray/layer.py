"""BatchNorm, a layer for networks written by hand."""

from collections.abc import Callable, Mapping
from typing import Any

from bnarray.dispatch import Array, backend, default_backend
from bnarray.functional import Saved, batch_norm_backward, batch_norm_forward
from bnarray.layout import kept_axes
from bnarray.stats import RunningStats, check_mapping, checked_number, explains_momentum


class BatchNorm:
    """Batch normalization with learned weight and bias and running statistics.

    Parameters
    ----------
    num_features
        The features' number, or shape.
    axis, eps
        As in `batch_norm`.
    update_rate, correction
        Of the running statistics; see `RunningStats`.
    affine
        Whether there are a weight (ones at first) and a bias (zeros).
    activation
        None or ``"relu"``, fused.
    stats
        A `RunningStats` to share with other layers and calls; a new one by default.
    like
        An array whose library, device and dtype the parameters have (half precision is kept as float32); float64 NumPy
        by default.

    Attributes
    ----------
    weight, bias
        The parameters, to be updated by the user; None unless `affine`.
    grad_weight, grad_bias
        Their gradients, which `backward` adds to and `zero_grad` clears.
    grad_residual
        The residual's gradient after a `backward` of a `forward` with one.
    stats
        The `RunningStats`.
    training
        Whether batches normalise themselves and update `stats`.

    Raises
    ------
    TypeError, ValueError
        If an argument is of the wrong kind, or out of range; for ``momentum=``, with the value to pass instead.

    Examples
    --------
    >>> import numpy as np
    >>> import bnarray as bn
    >>> layer = bn.BatchNorm(2)
    >>> y = layer(np.array([[1.0, 2.0], [3.0, 6.0]]))
    >>> dx = layer.backward(np.array([[1.0, 1.0], [1.0, 1.0]]))
    >>> layer.grad_bias
    array([2., 2.])
    """

    weight: Any
    bias: Any
    grad_weight: Any
    grad_bias: Any
    grad_residual: Any

    @explains_momentum
    def __init__(
        self,
        num_features: int | tuple[int, ...],
        *,
        axis: int | tuple[int, ...] = 1,
        eps: float = 1e-5,
        update_rate: float | None = 0.1,
        correction: float = 1,
        affine: bool = True,
        activation: str | None = None,
        stats: RunningStats | None = None,
        like: Array | None = None,
    ) -> None:
        if activation not in (None, "relu"):
            raise ValueError(f"activation is {activation!r}; it should be None or 'relu'")
        own = RunningStats(num_features, update_rate=update_rate, correction=correction, like=like)
        if stats is not None:
            if not isinstance(stats, RunningStats):
                raise TypeError(f"stats is a {type(stats).__name__}; it should be a RunningStats")
            if stats.features_shape != own.features_shape:
                raise ValueError(
                    f"stats has features of shape {stats.features_shape}; it should be {own.features_shape}"
                )
            if (update_rate, correction) not in ((0.1, 1), (stats.update_rate, stats.correction)):
                raise ValueError("stats has an update_rate and a correction of its own; leave out those of the layer")
        kept_axes(axis, ndim=64)
        self.axis = axis
        self.eps = checked_number(eps, "eps")
        self.activation = activation
        self.stats = own if stats is None else stats
        self.training = True
        self.weight = self.bias = self.grad_weight = self.grad_bias = self.grad_residual = None
        self._saved: Saved | None = None
        self.on_call: Callable[[], object] | None = None  # for who measures a network
        if affine:
            verbs = default_backend() if like is None else backend(like, "like")
            zeros = verbs.zeros(own.features_shape, like)
            dtype = zeros.dtype if like is None else verbs.parameter_dtype(like)
            self.weight, self.bias = verbs.cast(zeros + 1, dtype), verbs.cast(zeros, dtype)
            self.grad_weight, self.grad_bias = verbs.copy(self.bias), verbs.copy(self.bias)

    def forward(self, x: Array, residual: Array | None = None, where: Array | None = None) -> Array:
        """Normalise x: by the batch's statistics when training (updating `stats`), else by `stats`.

        Parameters
        ----------
        x, residual, where
            As in `batch_norm`. They should not be modified before `backward`.

        Returns
        -------
        array
            Like x.

        Raises
        ------
        TypeError, ValueError
            As `batch_norm`; nothing has changed then.
        """
        if self.on_call is not None:
            self.on_call()
        y, self._saved = batch_norm_forward(
            x,
            self.weight,
            self.bias,
            stats=self.stats,
            training=self.training,
            axis=self.axis,
            eps=self.eps,
            where=where,
            activation=self.activation,
            residual=residual,
        )
        return y

    __call__ = forward

    def backward(self, dy: Array) -> Array:
        """Return the gradient of the last forward's x; add to `grad_weight` and `grad_bias`.

        Raises
        ------
        RuntimeError
            If there was no forward.
        TypeError, ValueError
            As `batch_norm_backward`; nothing has changed then.
        """
        if self._saved is None:
            raise RuntimeError("backward needs a forward before it: call the layer on x first")
        gradients = batch_norm_backward(dy, self._saved)
        if self.weight is not None:
            self.grad_weight += gradients.weight
            self.grad_bias += gradients.bias
        self.grad_residual = gradients[3] if len(gradients) == 4 else None
        return gradients.x

    def train(self, mode: bool = True) -> "BatchNorm":
        """Switch to training (or, with False, evaluation); return the layer."""
        self.training = bool(mode)
        return self

    def eval(self) -> "BatchNorm":
        """Switch to evaluation; return the layer."""
        return self.train(False)

    def zero_grad(self) -> None:
        """Set the gradients to zero, in place where the library's arrays can be changed."""
        if self.weight is not None:
            clear = backend(self.weight).cleared
            self.grad_weight, self.grad_bias = clear(self.grad_weight), clear(self.grad_bias)

    def parameters(self) -> list[Array]:
        """Return [weight, bias], or nothing where there are none."""
        return [] if self.weight is None else [self.weight, self.bias]

    def gradients(self) -> list[Array]:
        """Return [grad_weight, grad_bias], in the order of `parameters`."""
        return [] if self.weight is None else [self.grad_weight, self.grad_bias]

    def to(self, like: Array) -> "BatchNorm":
        """Move parameters, gradients and statistics to like's library and device; return the layer."""
        verbs = backend(like, "like")
        stats = self.stats.to(like)
        moved = {}
        for name in ("weight", "bias", "grad_weight", "grad_bias"):
            array = getattr(self, name)
            moved[name] = None if array is None else verbs.cast(verbs.convert(array, like), verbs.parameter_dtype(like))
        self.__dict__.update(moved, stats=stats, _saved=None, grad_residual=None)
        return self

    def state_dict(self) -> dict[str, Any]:
        """Return a snapshot: weight, bias, running_mean, running_var, count, num_updates, num_skipped."""
        state = self.stats.state_dict()
        if self.weight is None:
            return state
        copy = backend(self.weight).copy
        return {"weight": copy(self.weight), "bias": copy(self.bias), **state}

    def load_state_dict(self, d: Mapping[str, Any]) -> None:
        """Take over a snapshot; library, device and dtype stay the layer's.

        Raises
        ------
        KeyError
            If a field is missing.
        TypeError, ValueError
            If a field has another kind or shape, or holds parameters that the layer has not. The layer is then as it
            was.
        """
        check_mapping(d)
        if self.weight is None and (extra := [name for name in ("weight", "bias") if d.get(name) is not None]):
            raise ValueError(f"the state has {' and '.join(extra)}, and the layer neither; make it with affine=True")
        parameters = {}
        for name in ("weight", "bias") if self.weight is not None else ():
            if name not in d:
                raise KeyError(f"the state lacks {name}")
            backend(d[name], name).check(d[name], name)
            if tuple(d[name].shape) != tuple(self.weight.shape):
                raise ValueError(f"{name} has shape {tuple(d[name].shape)}; it should be {tuple(self.weight.shape)}")
            verbs = backend(self.weight)
            parameters[name] = verbs.copy(verbs.cast(verbs.convert(d[name], self.weight), self.weight.dtype))
        self.stats.load_state_dict(d)
        self.__dict__.update(parameters)

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles have no forward to go back from, and no batch in them."""
        return self.__dict__ | {"_saved": None, "grad_residual": None, "on_call": None}

    def __repr__(self) -> str:
        return (
            f"BatchNorm({self.stats.num_features}, axis={self.axis}, eps={self.eps}, "
            f"update_rate={self.stats.update_rate}, correction={self.stats.correction}, "
            f"affine={self.weight is not None}, activation={self.activation!r})"
        )
