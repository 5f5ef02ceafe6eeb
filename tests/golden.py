"""Reads the golden files: weights, images and reference results of the papers' own PyTorch code (goldens/README.md).

    golden = read("pvt_tiny_224x224")
    variables = torch_to_flax(golden.meta["variant"], golden.state_dict())
    errors = golden.forward_errors(logits, {"stage1": ..., "pooled": ...})

The files hold results of a float64 run and no weights: those follow from a seed and the parameter's name.
"""

import dataclasses
import json
import pathlib
import re
import zlib

import numpy as np

FOLDER = pathlib.Path(__file__).parent / "goldens"

# Largest error of a run in each precision against the float64 reference. Float64 runs here come to about 1e-14; the
# float32 figures are 5 to 20 times what PyTorch's own float32 run shows.
TOLERANCES = {
    "float64": {"forward": 1e-9, "loss": 1e-9, "norms": 1e-9, "dots": 1e-9, "null": 1e-9},
    "float32": {"forward": 1e-5, "loss": 1e-6, "norms": 2e-5, "dots": 1e-5, "null": 1e-5},
    # ResT's instance norm over attention maps about doubles rounding error in each block.
    "float32 rest": {"forward": 1e-4, "loss": 2e-5, "norms": 1e-3, "running": 1e-4},
}

# Spread of matrices, as a multiple of 1 / sqrt(fan_in); the first match counts, 1 without one.
GAINS = (
    (r"\.kqv\.weight$", 0.3),
    (r"\.(q|k|v|kv|qkv)\.weight$", 1.3),
    (r"^stage[234]\..*\.attn\.proj\.weight$", 0.05),
    (r"\.attn\.proj\.weight$", 0.3),
    (r"\.mlp\.fc2\.weight$", 0.5),
)


def manifest() -> dict:
    """Facts of each variant of the official code: `source`, `parameters`, `macs`, `state_dict` {name: shape}."""
    return json.loads((FOLDER / "manifest.json").read_text())


def sinusoid(tokens: int, dim: int) -> np.ndarray:
    """T2T-ViT's fixed position table, `[1, tokens, dim]` float32."""
    channel = np.arange(dim)
    angle = np.arange(tokens)[:, None] / np.power(10000.0, 2.0 * (channel // 2) / dim)
    return np.where(channel % 2, np.cos(angle), np.sin(angle))[None].astype(np.float32)


def weight(name: str, shape: tuple[int, ...], seed: int, recipe: str) -> np.ndarray:
    """The value of one entry of a PyTorch state dict, float32.

    Recipe `standard` keeps activations near unit scale; `small` scales vectors by 0.05: the norms' epsilons show.
    """
    scale = 0.05 if recipe == "small" else 1.0
    leaf = name.split(".")[-1]
    if leaf == "num_batches_tracked":
        return np.zeros(shape, np.int64)
    if name == "pos_embed" and len(shape) == 3:
        return sinusoid(*shape[1:])
    draw = np.random.RandomState(zlib.crc32(f"{seed}:{name}".encode())).standard_normal(shape)
    if leaf == "running_var":
        value = scale**2 * (1.0 + 0.1 * np.abs(draw))
    elif leaf == "running_mean":
        value = scale * 0.1 * draw
    elif leaf == "bias":
        value = scale * (0.5 if name.endswith(".q.bias") else 0.1) * draw
    elif leaf == "weight" and len(shape) == 1:
        value = scale * (1.0 + 0.1 * draw)
    elif leaf == "weight":
        gain = next((gain for pattern, gain in GAINS if re.search(pattern, name)), 1.0)
        value = gain * (draw / np.sqrt(np.prod(shape[1:], dtype=np.float64)))
    elif leaf == "w":
        value = draw
    else:  # class tokens and learned position tables
        value = scale * draw
    return value.astype(np.float32)


def images(seed: int, batch: int, height: int, width: int, recipe: str = "standard") -> np.ndarray:
    """The input, `[batch, height, width, 3]` float32."""
    draw = np.random.RandomState(seed).standard_normal((batch, 3, height, width))
    return ((0.05 if recipe == "small" else 1.0) * draw).astype(np.float32).transpose(0, 2, 3, 1)


def relative_error(value, reference) -> float:
    """`max |value - reference| / max |reference|`, without the division where that is 0; shapes must agree."""
    value, reference = np.asarray(value, np.float64), np.asarray(reference, np.float64)
    assert value.shape == reference.shape, f"shape {value.shape}, expected {reference.shape}"
    return float(np.abs(value - reference).max() / (np.abs(reference).max() or 1))


@dataclasses.dataclass(frozen=True)
class Golden:
    """One file: `meta` describes the run, `data` has its arrays, `shapes` the state dict's."""

    meta: dict
    data: dict
    shapes: dict

    def state_dict(self) -> dict[str, np.ndarray]:
        """Weights of the reference run by PyTorch name, float32, PyTorch layout."""
        return {n: weight(n, tuple(s), self.meta["seed"], self.meta["recipe"]) for n, s in self.shapes.items()}

    def images(self) -> np.ndarray:
        """Input of the reference run, `[2, H, W, 3]` float32."""
        return images(*(self.meta[key] for key in ("seed", "batch", "height", "width", "recipe")))

    def forward_errors(self, logits, taps: dict) -> dict[str, float]:
        """Errors of evaluation logits and of intermediate arrays, the latter in PyTorch's layout."""
        errors = {"logits": relative_error(logits, self.data["logits_f64"])}
        for name, array in taps.items():
            array = np.asarray(array, np.float64)
            assert array.shape == tuple(self.data[f"{name}/shape"]), (name, array.shape)
            sample = array.ravel()[np.linspace(0, array.size - 1, 256).astype(int)]
            errors[name] = relative_error(sample, self.data[f"{name}/values_f64"])
            for moment in ("mean", "std"):
                difference = getattr(array, moment)() - self.data[f"{name}/{moment}_f64"]
                errors[f"{name}/{moment}"] = float(abs(difference) / self.data[f"{name}/std_f64"])
        return errors

    def train_errors(self, loss, grads: dict, weights: dict) -> dict[str, float]:
        """Errors of the loss and of its gradients, by PyTorch name and in PyTorch's layout as `weights` are.

        Norms are relative, over tensors whose gradient is not zero in exact arithmetic; `null` is the largest norm of
        those whose gradient is, and `dots` the worst inner product of gradient and weight, both over the whole norm.
        """
        names = self.data["grad/names"].tolist()
        assert sorted(names) == sorted(grads), sorted(set(names) ^ set(grads))
        null, total = self.data["grad/is_null"], self.data["grad/total_f64"]
        flat = [np.asarray(grads[name], np.float64).ravel() for name in names]
        norms = np.array([np.linalg.norm(grad) for grad in flat])
        dots = np.array(
            [grad @ np.asarray(weights[n], np.float64).ravel() for grad, n in zip(flat, names, strict=True)]
        )
        return {
            "loss": float(abs(float(loss) / self.data["train/loss_f64"] - 1)),
            "norms": float(np.abs(norms / self.data["grad/norms_f64"] - 1)[~null].max()),
            "null": float(norms[null].max(initial=0.0) / total),
            "dots": float(np.abs(dots - self.data["grad/dots_f64"]).max() / total),
        }


def read(stem: str) -> Golden:
    """The golden file called `stem`."""
    with np.load(FOLDER / f"{stem}.npz") as archive:
        data = dict(archive)
    meta = json.loads(str(data.pop("meta")))
    return Golden(meta, data, manifest()[meta["variant"]]["state_dict"])
