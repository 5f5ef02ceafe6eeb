"""Writes adamp.npz: ten steps of timm's AdamP, as PiT was trained with it, on small tensors, in float64.

Needs PyTorch and timm (made with 2.13 and 1.0.31). tests/test_adamp.py draws the same weights and gradients.
"""

import importlib.util
import pathlib
import re

import numpy as np
import torch

FOLDER = pathlib.Path(__file__).parent
SHAPES = {"fc.weight": (6, 10), "conv.weight": (4, 3, 3, 3), "fc.bias": (6,), "cls_token": (1, 1, 8)}


def draws() -> tuple[dict, list[dict]]:
    """Weights and ten steps' gradients: of each tensor once as drawn, once (`flat.`) orthogonal to it row by row, and
    once (`whole.`) orthogonal to it as a whole but not row by row."""
    rng = np.random.RandomState(0)
    weights = {prefix + n: rng.standard_normal(s) for prefix in ("", "flat.", "whole.") for n, s in SHAPES.items()}
    steps = []
    for _ in range(10):
        grads = {}
        for name, weight in weights.items():
            grad = rng.standard_normal(weight.shape)
            rows, wide = grad.reshape(len(grad), -1), weight.reshape(len(weight), -1)
            if name.startswith("whole."):
                rows, wide = rows.reshape(1, -1), wide.reshape(1, -1)
            if "." in name and name.split(".")[0] in ("flat", "whole"):
                rows = rows - 0.999 * (rows * wide).sum(1, keepdims=True) / (wide**2).sum(1, keepdims=True) * wide
            grads[name] = rows.reshape(weight.shape)
        steps.append(grads)
    return weights, steps


def main() -> None:
    library = torch.library.Library("torchvision", "DEF")  # timm imports torchvision, whose operators this torch lacks
    source = pathlib.Path(importlib.util.find_spec("torchvision").origin).parent.joinpath("_meta_registrations.py")
    for name in {*re.findall(r'register_meta\("(\w+)"', source.read_text()), "nms", "qnms", "roi_align"}:
        library.define(f"{name}(Tensor x) -> Tensor")
    from timm.optim.adamp import AdamP

    weights, steps = draws()
    params = {name: torch.nn.Parameter(torch.tensor(weight)) for name, weight in weights.items()}
    groups = [
        {"params": [p for p in params.values() if p.ndim > 1], "weight_decay": 0.05},
        {"params": [p for p in params.values() if p.ndim == 1], "weight_decay": 0.0},
    ]
    optimizer = AdamP(groups, lr=0.01, betas=(0.9, 0.999), eps=1e-8, delta=0.1, wd_ratio=0.01, nesterov=True)
    found = {}
    for number, grads in enumerate(steps):
        for name, param in params.items():
            param.grad = torch.tensor(grads[name])
        optimizer.step()
        found |= {f"{number}/{name}": param.detach().numpy().copy() for name, param in params.items()}
    np.savez_compressed(FOLDER / "adamp.npz", **found)


if __name__ == "__main__":
    main()
