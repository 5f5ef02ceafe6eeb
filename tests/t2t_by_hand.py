"""T2T-ViT once more: in numpy, float64, on PyTorch's names and layouts, written from the official code's description.

For the variants and image sizes that have no golden file. Windows are cut out one by one, exponentials are as they are.
"""

import numpy as np
from flax import traverse_util
from scipy.special import erf

import golden


def linear(weights, name, x):
    return x @ weights[f"{name}.weight"].T + weights.get(f"{name}.bias", 0)


def norm(weights, name, x):
    x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def gelu(x):
    return x * (1 + erf(x / np.sqrt(2))) / 2


def softmax(x):
    x = np.exp(x - x.max(-1, keepdims=True))
    return x / x.sum(-1, keepdims=True)


def unfold(x, window, stride, padding):
    """`[C, H, W]` -> `[h, w, C * window * window]`: the windows one by one."""
    x = np.pad(x, ((0, 0), (padding, padding), (padding, padding)))
    h, w = ((side - window) // stride + 1 for side in x.shape[1:])
    windows = [
        x[:, i * stride : i * stride + window, j * stride : j * stride + window].ravel()
        for i in range(h)
        for j in range(w)
    ]
    return np.stack(windows).reshape(h, w, -1)


def performer(query, key, value, w):
    """The official formula, exponentials as they are; `[N, e]`."""
    phi_query, phi_key = (np.exp(u @ w.T - (u**2).sum(-1, keepdims=True) / 2) / len(w) ** 0.5 for u in (query, key))
    return phi_query @ (phi_key.T @ value) / (phi_query @ phi_key.sum(0)[:, None] + 1e-8)


def token_layer(weights, name, x):
    normed = norm(weights, f"{name}.norm1", x)
    if f"{name}.w" in weights:
        key, query, value = np.split(linear(weights, f"{name}.kqv", normed), 3, axis=-1)
        attended = performer(query, key, value, weights[f"{name}.w"])
        x = value + linear(weights, f"{name}.proj", attended)
        first, second = f"{name}.mlp.0", f"{name}.mlp.2"
    else:
        query, key, value = np.split(linear(weights, f"{name}.attn.qkv", normed), 3, axis=-1)
        attended = softmax(query @ key.T * normed.shape[-1] ** -0.5) @ value
        x = value + linear(weights, f"{name}.attn.proj", attended)
        first, second = f"{name}.mlp.fc1", f"{name}.mlp.fc2"
    hidden = gelu(linear(weights, first, norm(weights, f"{name}.norm2", x)))
    return x + linear(weights, second, hidden)


def tokens(weights, image):
    """Tokens-to-token module, `[3, H, W]` -> `[N, C]`."""
    x = image
    for i, split in enumerate([(7, 4, 2), (3, 2, 1)]):
        windows = unfold(x, *split)  # [h, w, D]
        h, w, depth = windows.shape
        windows = windows.reshape(h * w, depth)
        layer_name, convolution = f"tokens_to_token.attention{i + 1}", f"tokens_to_token.soft_split{i}"
        if f"{convolution}.weight" in weights:
            kernel = weights[f"{convolution}.weight"]
            x = windows @ kernel.reshape(len(kernel), -1).T + weights[f"{convolution}.bias"]
        else:
            x = token_layer(weights, layer_name, windows)
        x = x.T.reshape(-1, h, w)
    windows = unfold(x, 3, 2, 1)
    windows = windows.reshape(-1, windows.shape[-1])
    kernel = weights["tokens_to_token.project.weight"]
    return windows @ kernel.reshape(len(kernel), -1).T + weights["tokens_to_token.project.bias"]


def attention(weights, name, x, heads, qk_scale):
    n, dim = x.shape
    scale = (dim // heads) ** -0.5 if qk_scale is None else qk_scale
    if f"{name}.qkv.weight" in weights:
        packed = np.split(linear(weights, f"{name}.qkv", x), 3, axis=-1)
    else:
        halves = [linear(weights, f"{name}.{part}", x) for part in "qkv"]
        factors = [weights[f"{name}.cheap_operation_{part}.weight"].ravel() for part in "qkv"]
        packed = [np.concatenate([half, half * f], axis=-1) for half, f in zip(halves, factors, strict=True)]
    query, key, value = (part.reshape(n, heads, -1) for part in packed)
    parts = [softmax(query[:, i] @ key[:, i].T * scale) @ value[:, i] for i in range(heads)]
    x = linear(weights, f"{name}.proj", np.concatenate(parts, axis=-1))
    if f"{name}.se_layer.fc.0.weight" in weights:
        squeezed = np.maximum(x.mean(0) @ weights[f"{name}.se_layer.fc.0.weight"].T, 0)
        x = x / (1 + np.exp(-squeezed @ weights[f"{name}.se_layer.fc.2.weight"].T))
    return x


def mlp(weights, name, x):
    x = gelu(linear(weights, f"{name}.fc1", x))
    if f"{name}.cheap_operation2.weight" in weights:
        factors = [weights[f"{name}.cheap_operation{i}.weight"].ravel() for i in (2, 3)]
        x = np.concatenate([x, *(gelu(x * factor) for factor in factors)], axis=-1)
    return linear(weights, f"{name}.fc2", x)


def layer(weights, name, x, heads, qk_scale):
    """A block or a transition."""
    if f"{name}.linear.weight" in weights:
        return gelu(linear(weights, f"{name}.linear", x))
    y = x + attention(weights, f"{name}.attn", norm(weights, f"{name}.norm1", x), heads, qk_scale)
    y = y + mlp(weights, f"{name}.mlp", norm(weights, f"{name}.norm2", y))
    if f"{name}.dense_linear.weight" in weights:
        return np.concatenate([x, linear(weights, f"{name}.dense_linear", y)], axis=-1)
    return y


def logits(weights, images, heads, qk_scale=None):
    """Logits of `[B, H, W, 3]`, float64. What a layer is, its weights' names say."""
    weights = {name: np.asarray(weight, np.float64) for name, weight in weights.items()}
    layers = sorted({int(name.split(".")[1]) for name in weights if name.startswith("blocks.")})
    rows = []
    for image in np.asarray(images, np.float64):
        x = np.concatenate([weights["cls_token"][0], tokens(weights, image.transpose(2, 0, 1))])
        x = x + golden.sinusoid(*x.shape)[0]
        for i in layers:
            x = layer(weights, f"blocks.{i}", x, heads, qk_scale)
        rows.append(linear(weights, "head", norm(weights, "norm", x[0])))
    return np.stack(rows)


def torch_names(variables) -> dict[str, np.ndarray]:
    """Variables of a network that is no variant, by PyTorch name and in PyTorch layout."""
    state_dict = {}
    for path, array in traverse_util.flatten_dict(variables, sep="/").items():
        name = path.split("/", 1)[1].replace("/kernel", "/weight").replace("/scale", "/weight").replace("/", ".")
        for part in ("blocks", "mlp", "fc"):
            name = name.replace(f"{part}_", f"{part}.")
        if path.endswith("kernel"):
            array = array.transpose(3, 2, 0, 1) if array.ndim == 4 else array.T
        state_dict[name] = array
    return state_dict
