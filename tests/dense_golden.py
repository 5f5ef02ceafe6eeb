"""Golden files of dense prediction: weights and inputs from seeds and names, and distances to the stored results.

`tests/goldens/dense/README.md` says what is in them. Arrays are in PyTorch's layout.
"""

import json
import pathlib
import zlib

import numpy as np

FOLDER = pathlib.Path(__file__).parent / "goldens" / "dense"

# Final layers: gain of the weights, shift of the biases.
FINAL = {
    "retina_cls": (0.7, -2.0),
    "retina_reg": (0.3, 0.0),
    "cls_score": (0.7, -2.0),
    "bbox_pred": (0.3, 0.0),
    "rpn_cls": (0.7, 0.0),
    "rpn_reg": (0.3, 0.0),
    "objectness_logits": (0.7, 0.0),
    "anchor_deltas": (0.3, 0.0),
    "fc_cls": (2.0, 0.0),
    "fc_reg": (0.5, 0.0),
    "class_embed": (2.0, 0.0),
    "bbox_embed": (1.0, 0.0),
    "conv_logits": (1.5, 0.0),
    "predictor": (1.5, 0.0),
    "conv_seg": (1.5, 0.0),
}
# Parts of names and the gain of their weights; the first match counts.
GAIN = (
    ("fpn_", 1.0),
    ("in_proj_weight", 1.3),
    (".q.weight", 1.3),
    (".kv.weight", 1.3),
    (".attn.proj.weight", 0.3),
    (".mlp.fc2.weight", 0.5),
    ("attention_weights.weight", 1.3),
    ("sampling_offsets.weight", 0.5),
    ("shared_fcs", 1.4),
    ("box_head.fc", 1.4),
    ("upsample.weight", 1.4),
    ("deconv.weight", 1.4),
)


def generator(seed: int, name: str) -> np.random.RandomState:
    return np.random.RandomState(zlib.crc32(f"{seed}:{name}".encode()))


def tensor(seed: int, name: str, shape) -> np.ndarray:
    """Standard normal float32 input called `name`."""
    return generator(seed, name).standard_normal(tuple(shape)).astype(np.float32)


def weight(seed: int, name: str, shape) -> np.ndarray:
    """The value of one entry of a PyTorch state dict, float32."""
    *layers, leaf = name.split(".")
    if leaf == "num_batches_tracked":
        return np.zeros(shape, np.int64)
    draw = generator(seed, name).standard_normal(tuple(shape))
    final = next((FINAL[layer] for layer in layers if layer in FINAL), None)
    if leaf == "running_mean":
        value = 0.1 * draw
    elif leaf == "running_var":
        value = 1.0 + 0.1 * np.abs(draw)
    elif any(part in name for part in ("pos_embed", "cls_token", "level_embed", "query_embed")):
        value = draw
    elif name.endswith("sampling_offsets.bias"):
        value = 2.0 * draw
    elif name.endswith("reference_points.bias"):
        value = draw
    elif leaf in ("bias", "in_proj_bias"):
        value = (final[1] if final else 0.0) + 0.1 * draw
    elif len(shape) == 1:
        value = 1.0 + 0.1 * draw
    else:
        gain = final[0] if final else next((gain for part, gain in GAIN if part in name), None)
        if name.endswith(".attn.proj.weight") and any(f"stage{s}." in name for s in (2, 3, 4)):
            gain = 0.05
        if gain is None:
            gain = 1.4 if tuple(shape[2:]) == (3, 3) else 1.0
        value = gain * draw / np.sqrt(float(np.prod(shape[1:])))
    return value.astype(np.float32)


class DenseGolden:
    """One file: `meta` describes the run, `data` has its arrays."""

    def __init__(self, stem: str):
        with np.load(FOLDER / f"{stem}.npz") as archive:
            self.data = dict(archive)
        self.meta = json.loads(str(self.data.pop("meta")))

    def state_dict(self) -> dict[str, np.ndarray]:
        """Weights of the reference run by PyTorch name, float32."""
        return {name: weight(self.meta["seed"], name, shape) for name, shape in self.meta["spec"]}

    def input(self, name: str) -> np.ndarray:
        """An input of the reference run, float32."""
        return tensor(self.meta["seed"], name, self.meta["inputs"][name])

    def array(self, key: str) -> np.ndarray:
        """An array that is stored whole."""
        if f"{key}/packed" not in self.data:
            return self.data[key]
        shape = self.data[f"{key}/shape"]
        return np.unpackbits(self.data[f"{key}/packed"])[: np.prod(shape)].reshape(shape).astype(bool)

    def error(self, key: str, value) -> float:
        """`max |value - reference| / max |reference|`; of sampled arrays that of mean and std over the std as well."""
        value = np.asarray(value, np.float64)
        if key in self.data:
            reference = self.data[key]
            assert value.shape == reference.shape, f"{key}: shape {value.shape}, expected {reference.shape}"
            return float(np.abs(value - reference).max() / np.abs(reference).max())
        shape = tuple(self.data[f"{key}/shape"])
        assert value.shape == shape, f"{key}: shape {value.shape}, expected {shape}"
        reference, std = self.data[f"{key}/values"], float(self.data[f"{key}/std"])
        sample = value.ravel()[np.linspace(0, value.size - 1, 512).astype(int)]
        worst = np.abs(sample - reference).max() / np.abs(reference).max()
        moments = abs(value.mean() - float(self.data[f"{key}/mean"])), abs(value.std() - std)
        return float(max(worst, max(moments) / std))

    def gradient_errors(self, gradients: dict, weights: dict) -> dict[str, float]:
        """Worst errors of norms and of inner products with the weights, each over the largest; by PyTorch name."""
        names = self.data["grad/names"].tolist()
        flat = [(np.ravel(gradients[n]).astype(np.float64), np.ravel(weights[n]).astype(np.float64)) for n in names]
        found = {"norms": [np.linalg.norm(g) for g, _ in flat], "dots": [g @ w for g, w in flat]}
        reference = {key: self.data[f"grad/{key}"] for key in found}
        return {key: float(np.abs(found[key] - reference[key]).max() / np.abs(reference[key]).max()) for key in found}
