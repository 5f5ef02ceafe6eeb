"""Writes regnety.npz: logits of timm's `regnety_160` and what a small RegNetY's stages give, in float64.

Needs PyTorch and timm (made with 2.13 and 1.0.31). The weights and images are those of tests/golden.py.
"""

import importlib.util
import pathlib
import re
import sys

import numpy as np
import torch

FOLDER = pathlib.Path(__file__).parent
sys.path.append(str(FOLDER.parent))
import golden  # noqa: E402


def run(model, height: int, width: int) -> tuple[np.ndarray, list[np.ndarray]]:
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    weights = {name: torch.from_numpy(golden.weight(name, shape, 0, "standard")) for name, shape in shapes.items()}
    model.load_state_dict(weights)
    model = model.double().eval()
    images = torch.from_numpy(golden.images(1, 2, height, width).transpose(0, 3, 1, 2).copy()).double()
    levels, x = [], model.stem(images)
    with torch.no_grad():
        for stage in (model.s1, model.s2, model.s3, model.s4):
            x = stage(x)
            levels.append(x.numpy())
        return model(images).numpy(), levels


def main() -> None:
    library = torch.library.Library("torchvision", "DEF")  # timm imports torchvision, whose operators this torch lacks
    source = pathlib.Path(importlib.util.find_spec("torchvision").origin).parent.joinpath("_meta_registrations.py")
    for name in {*re.findall(r'register_meta\("(\w+)"', source.read_text()), "nms", "qnms", "roi_align"}:
        library.define(f"{name}(Tensor x) -> Tensor")
    import timm
    from timm.models.regnet import RegNet, RegNetCfg

    large = timm.create_model("regnety_160")
    names = {name: list(value.shape) for name, value in large.state_dict().items()}
    found = {"names": np.array([f"{name} {shape}" for name, shape in names.items()])}
    found["parameters"] = np.array(sum(p.numel() for p in large.parameters()))
    found["logits"] = run(large, 64, 96)[0]
    config = RegNetCfg(depth=6, w0=32, wa=36.0, wm=2.0, group_size=16, se_ratio=0.25, stem_width=16)
    small = RegNet(config, num_classes=10)
    found["small/config"] = np.array(
        [next(stage.children()).conv3.conv.out_channels for stage in (small.s1, small.s2, small.s3, small.s4)]
    )
    found["small/depths"] = np.array(
        [len(list(stage.children())) for stage in (small.s1, small.s2, small.s3, small.s4)]
    )
    found["small/logits"], levels = run(small, 45, 70)
    for number, level in enumerate(levels, start=1):
        found[f"small/{number}/shape"] = np.array(level.shape)
        found[f"small/{number}"] = level.ravel()[np.linspace(0, level.size - 1, 128).astype(int)]
    np.savez_compressed(FOLDER / "regnety.npz", **found)


if __name__ == "__main__":
    main()
