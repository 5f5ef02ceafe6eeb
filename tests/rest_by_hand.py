"""ResT's evaluation pass in plain numpy, to compare with at sizes for which the official code has no results."""

import numpy as np
import scipy.special
from flax import traverse_util

from vitpyramid.models.rest import ResT


def torch_weights(variables) -> dict:
    """A `little` network's variables by PyTorch name."""
    flat = traverse_util.flatten_dict(variables, sep=".")
    names = {".kernel": ".weight", ".scale": ".weight", ".mean": ".running_mean", ".var": ".running_var"}
    weights = {}
    for path, array in flat.items():
        name = path.partition(".")[2].replace("patch_embedding_", "patch_embed_")
        for stage in (1, 2, 3, 4):
            name = name.replace(f"stage{stage}_", f"stage{stage}.")
        stem, dot, leaf = name.rpartition(".")
        axes = {2: (1, 0), 4: (3, 2, 0, 1)}.get(array.ndim, (0,))
        weights[stem + names.get(dot + leaf, dot + leaf)] = array.transpose(axes)
    return weights


class Numpy:
    """The evaluation pass in numpy, channels first, from a PyTorch state dict; written from the paper's formulas."""

    def __init__(self, weights: dict, model: ResT):
        self.weights, self.model = {name: np.float64(array) for name, array in weights.items()}, model
        self.attention = {}

    def features(self, images) -> list[np.ndarray]:
        levels, x = [], np.float64(images).transpose(0, 3, 1, 2)
        for s, depth in enumerate(self.model.depths, start=1):
            x = self.stem(x) if s == 1 else self.embed(f"patch_embed_{s}", x)
            for j in range(depth):
                x = self.block(f"stage{s}.{j}", x, self.model.heads[s - 1], self.model.sr_ratios[s - 1])
            levels.append(x)
        return levels

    def stem(self, x):
        x = np.maximum(self.batch_norm("stem.norm1", self.conv("stem.conv1", x, 2)), 0)
        x = np.maximum(self.batch_norm("stem.norm2", self.conv("stem.conv2", x, 1)), 0)
        return self.gate("stem.pos", self.conv("stem.conv3", x, 2))

    def embed(self, name, x):
        return self.gate(f"{name}.pos", self.batch_norm(f"{name}.norm", self.conv(f"{name}.conv", x, 2)))

    def gate(self, name, x):
        return x * scipy.special.expit(self.conv(f"{name}.pa_conv", x, 1))

    def block(self, name, x, heads, sr_ratio):
        b, c, h, w = x.shape
        tokens = x.reshape(b, c, -1).swapaxes(1, 2)
        tokens = tokens + self.attend(f"{name}.attn", self.layer_norm(f"{name}.norm1", tokens), (h, w), heads, sr_ratio)
        hidden = self.linear(f"{name}.mlp.fc1", self.layer_norm(f"{name}.norm2", tokens))
        hidden = hidden * (1 + scipy.special.erf(hidden / 2**0.5)) / 2
        return (tokens + self.linear(f"{name}.mlp.fc2", hidden)).swapaxes(1, 2).reshape(x.shape)

    def attend(self, name, x, grid, heads, sr_ratio):
        b, n, c = x.shape
        source = x
        if sr_ratio > 1:
            source = self.conv(f"{name}.sr", x.swapaxes(1, 2).reshape(b, c, *grid), sr_ratio)
            source = self.layer_norm(f"{name}.sr_norm", source.reshape(b, c, -1).swapaxes(1, 2))
        split = lambda x: x.reshape(b, -1, heads, c // heads).swapaxes(1, 2)  # noqa: E731
        query = split(self.linear(f"{name}.q", x))
        key, value = map(split, np.split(self.linear(f"{name}.kv", source), 2, axis=-1))
        weights = query @ key.swapaxes(2, 3) / (c // heads) ** 0.5
        if heads > 1:
            weights = self.conv(f"{name}.transform_conv", weights, 1)
        weights = scipy.special.softmax(weights, axis=-1)
        if heads > 1:
            mean, var = weights.mean((2, 3), keepdims=True), weights.var((2, 3), keepdims=True)
            weights = (weights - mean) / np.sqrt(var + 1e-5)
        self.attention[name] = weights
        return self.linear(f"{name}.proj", (weights @ value).swapaxes(1, 2).reshape(b, n, c))

    def conv(self, name, x, stride):
        kernel = self.weights[f"{name}.weight"]
        size = kernel.shape[-1]
        pad = (size - 1) // 2
        h, w = ((side + 2 * pad - size) // stride + 1 for side in x.shape[2:])
        x = np.pad(x, ((0, 0), (0, 0), (pad, pad), (pad, pad)))
        subscripts = "oc,bchw->bohw" if kernel.shape[1] == x.shape[1] else "oz,bohw->bohw"
        out = sum(
            np.einsum(subscripts, kernel[:, :, i, j], x[:, :, i:, j:][:, :, ::stride, ::stride][:, :, :h, :w])
            for i, j in np.ndindex(size, size)
        )
        return out + self.weights.get(f"{name}.bias", np.zeros(len(kernel)))[:, None, None]

    def linear(self, name, x):
        return x @ self.weights[f"{name}.weight"].T + self.weights[f"{name}.bias"]

    def layer_norm(self, name, x):
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
        return x * self.weights[f"{name}.weight"] + self.weights[f"{name}.bias"]

    def batch_norm(self, name, x):
        entries = ("running_mean", "running_var", "weight", "bias")
        mean, var, weight, bias = (self.weights[f"{name}.{entry}"][:, None, None] for entry in entries)
        return (x - mean) / np.sqrt(var + 1e-5) * weight + bias
