"""
A network written by hand
=========================

Two hidden layers with ReLU, trained by plain gradient descent in NumPy: forward, backward and running statistics with
:class:`~bnarray.BatchNorm`.
"""

# %%
# The network: a matrix, a batch normalization with ReLU fused, twice; then a matrix. A bias before the former would be
# subtracted again at once, so there is none.

from itertools import pairwise

import matplotlib.pyplot as plt
import numpy as np
from sklearn.datasets import load_digits

import bnarray as bn


class Network:
    def __init__(self, rng):
        sizes = (64, 64, 64, 10)
        self.matrices = [rng.normal(0, 0.1, pair) for pair in pairwise(sizes)]
        self.norms = [bn.BatchNorm(size, activation="relu") for size in sizes[1:-1]]

    def forward(self, x):
        self.inputs = [x]
        for matrix, norm in zip(self.matrices, self.norms, strict=False):
            self.inputs.append(norm(self.inputs[-1] @ matrix))
        return self.inputs[-1] @ self.matrices[-1]

    def backward(self, gradient, rate):
        for i in reversed(range(len(self.matrices))):
            below = gradient @ self.matrices[i].T
            self.matrices[i] -= rate * self.inputs[i].T @ gradient
            if i:
                gradient = self.norms[i - 1].backward(below)
        for norm in self.norms:
            for parameter, slope in zip(norm.parameters(), norm.gradients(), strict=True):
                parameter -= rate * slope
            norm.zero_grad()


# %%
# The loss: cross-entropy of a softmax, and its gradient with respect to the logits.


def cross_entropy(logits, labels):
    p = np.exp(logits - logits.max(axis=1, keepdims=True))
    p /= p.sum(axis=1, keepdims=True)
    own = np.arange(len(labels)), labels
    loss = -np.log(p[own]).mean()
    p[own] -= 1
    return loss, p / len(labels)


# %%
# Training: every batch normalises itself, and each layer's running statistics follow.

digits = load_digits()
rng = np.random.default_rng(0)
order = rng.permutation(len(digits.data))
x, labels = digits.data[order] / 16, digits.target[order]
network, losses = Network(rng), []
for _ in range(400):
    chosen = rng.integers(360, len(x), size=60)
    loss, gradient = cross_entropy(network.forward(x[chosen]), labels[chosen])
    network.backward(gradient, rate=0.3)
    losses.append(loss)

# %%
# Evaluation: the running statistics normalise, so an example's answer depends on nothing but itself.

for norm in network.norms:
    norm.eval()
right = network.forward(x[:360]).argmax(axis=1) == labels[:360]
alone = network.forward(x[:1]).argmax() == network.forward(x[:360])[0].argmax()
print(f"accuracy on 360 images that it was not trained on: {right.mean():.3f}")
print(f"the same answer for an image alone and among others: {alone}")

# %%
figure, axis = plt.subplots(figsize=(5.4, 2.6))
axis.plot(losses)
_ = axis.set(yscale="log", xlabel="step", ylabel="loss of the batch", title="Training")
