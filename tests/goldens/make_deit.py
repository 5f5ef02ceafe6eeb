"""Makes the golden files of DeiT, and its lines of `manifest.json`, with timm. Tests do not run this.

    python tests/goldens/make_deit.py

Needs torch, torchvision (timm imports it) and timm; these files are of torch 2.13.0 and timm 1.0.31, on CPU. timm's
`deit_*_patch16_224` have the parameters and names of facebookresearch/deit's. Weights and images are those of
`tests/golden.py` (its position table is the sinusoid, as for every table `[1, N, C]`); arrays are as README.md tells.
Attention is timm's plain form, not PyTorch's fused one. Taps: `stage1`, NCHW patch tokens after the last block, before
the final norm; `pooled`, `(2, tokens, C)`, class and distillation token after it. Loss of the distilled form: the mean
of both heads'.
"""

import json
import pathlib
import sys

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

FOLDER = pathlib.Path(__file__).parent
sys.path[:0] = [str(FOLDER.parent), str(FOLDER.parents[1] / "benchmarks")]

import torchvision_operators  # noqa: E402

import golden  # noqa: E402

FILES = [("deit_tiny", "standard"), ("deit_tiny", "small"), ("deit_tiny_distilled", "standard")]
SIZES = ("tiny", "small", "base")
VARIANTS = [f"deit_{size}{form}" for form in ("", "_distilled") for size in SIZES]
SEED, LABELS = 0, [3, 7]


def import_timm():
    """timm, also where torchvision has none of its compiled operators (none is needed here)."""
    torchvision_operators.declare()
    import timm

    timm.layers.set_fused_attn(False)
    return timm


def make_model(timm, name: str) -> torch.nn.Module:
    return timm.create_model(f"{name}_patch16_224", pretrained=False)


def run(model: torch.nn.Module, images: torch.Tensor) -> dict[str, np.ndarray]:
    """Results in the precision of `images`, by golden key without `_f64`."""
    distilled = hasattr(model, "head_dist")
    extra = 2 if distilled else 1
    caught = {}

    def catch(module, inputs, output):
        caught["stage1"] = inputs[0][:, extra:].transpose(1, 2).unflatten(2, (14, 14))
        caught["pooled"] = output[:, :extra]

    hook = model.norm.register_forward_hook(catch)
    with torch.no_grad():
        results = {"logits": model.eval()(images).numpy()}
    hook.remove()
    for tap, array in caught.items():
        array = array.contiguous().numpy()
        results[f"{tap}/shape"] = np.array(array.shape)
        results[f"{tap}/mean"] = array.mean(dtype=np.float64)
        results[f"{tap}/std"] = array.std(dtype=np.float64)
        results[f"{tap}/values"] = array.ravel()[np.linspace(0, array.size - 1, 256).astype(int)]

    model.train()
    if distilled:
        model.set_distilled_training(True)
    outputs = model(images)
    heads = dict(zip(("train/logits", "train/logits_dist"), outputs if distilled else (outputs,), strict=False))
    loss = sum(F.cross_entropy(head, torch.tensor(LABELS)) for head in heads.values()) / len(heads)
    names, weights = zip(*model.named_parameters(), strict=True)
    grads = torch.autograd.grad(loss, weights)
    results |= {key: head.detach().numpy() for key, head in heads.items()}
    results["train/loss"] = np.float64(loss.item())
    results["grad/names"] = np.array(names)
    results["grad/norms"] = np.array([grad.double().norm().item() for grad in grads])
    results["grad/dots"] = np.array(
        [(grad.double() * weight.double()).sum().item() for grad, weight in zip(grads, weights, strict=True)]
    )
    results["grad/total"] = np.linalg.norm(results["grad/norms"])
    return results


def make_golden(timm, name: str, recipe: str) -> None:
    model = make_model(timm, name)
    weights = {
        key: torch.from_numpy(golden.weight(key, tuple(value.shape), SEED, recipe))
        for key, value in model.state_dict().items()
    }
    model.load_state_dict(weights, strict=True)
    images = torch.from_numpy(golden.images(SEED, 2, 224, 224, recipe).transpose(0, 3, 1, 2).copy())
    narrow, wide = run(model, images), run(model.double(), images.double())
    data = {}
    for key, value in narrow.items():
        if key == "grad/names" or key.endswith("/shape"):
            data[key] = value
        else:
            data |= {key: value, f"{key}_f64": wide[key]}
    del data["grad/total"]
    data["grad/is_null"] = wide["grad/norms"] < 1e-12 * wide["grad/total"]
    one = "mean cross-entropy"
    both = f"0.5 * ({one} of train_logits + {one} of train_logits_dist)"
    meta = {
        "variant": name,
        "height": 224,
        "width": 224,
        "seed": SEED,
        "batch": 2,
        "labels": LABELS,
        "recipe": recipe,
        "constructor": {},
        "source": source(timm),
        "torch": torch.__version__,
        "taps": ["stage1", "pooled"],
        "loss": both if "distilled" in name else one,
    }
    stem = f"{name}_224x224" + ("" if recipe == "standard" else f"_{recipe}")
    np.savez_compressed(FOLDER / f"{stem}.npz", meta=json.dumps(meta), **data)


def source(timm) -> str:
    return f"timm {timm.__version__} vision_transformer"


def entry(timm, name: str) -> dict:
    """Line of the manifest."""
    model = make_model(timm, name).eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, 3, 224, 224))
    return {
        "source": source(timm),
        "parameters": sum(weight.numel() for weight in model.parameters()),
        "macs": counter.get_total_flops() // 2,
        "state_dict": {key: list(value.shape) for key, value in model.state_dict().items()},
    }


def main() -> None:
    timm = import_timm()
    entries = golden.manifest() | {name: entry(timm, name) for name in VARIANTS}
    lines = [f"{json.dumps(name)}: {json.dumps(value, separators=(',', ':'))}" for name, value in entries.items()]
    (FOLDER / "manifest.json").write_text("{\n" + ",\n".join(lines) + "\n}\n")
    for name, recipe in FILES:
        make_golden(timm, name, recipe)


if __name__ == "__main__":
    main()
