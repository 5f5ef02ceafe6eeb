"""Writes tests/goldens/dense/detr_huggingface.npz: outputs of transformers' DETR on a map that it is given.

    python tests/goldens/make_detr.py

Needs torch and transformers; the file is of torch 2.13.0 and transformers 5.23.0, on CPU. Weights and the map follow
from the rule in `tests/dense_golden.py`. In the meta `spec` has the names of the modules in memory, `files` those of a
saved file.
"""

import json
import pathlib
import sys
import tempfile

import numpy as np
import torch

TESTS = pathlib.Path(__file__).parent.parent
sys.path[:0] = [str(TESTS), str(TESTS.parent / "benchmarks")]

import torchvision_operators  # noqa: E402

import dense_golden  # noqa: E402

META = {
    "kind": "detr",
    "seed": 371,
    "canvas": [128, 192],
    "img_shapes": [[128, 170], [110, 192]],
    "num_classes": 7,
    "feature_channels": 20,
    "hidden": 32,
    "heads": 4,
    "ffn": 48,
    "enc_layers": 2,
    "dec_layers": 2,
    "num_queries": 12,
    "inputs": {"features": [2, 20, 4, 6]},
}


def import_transformers():
    """transformers, also where torchvision has none of its compiled operators (none is needed here)."""
    torchvision_operators.declare()
    import transformers

    return transformers


def main():
    transformers = import_transformers()
    from safetensors.numpy import load_file

    dims = [8, 8, 8, META["feature_channels"]]
    resnet = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=dims, depths=[1, 1, 1, 1], out_features=["stage4"], layer_type="basic"
    )
    config = transformers.DetrConfig(
        use_timm_backbone=False,
        use_pretrained_backbone=False,
        backbone=None,
        backbone_config=resnet,
        d_model=META["hidden"],
        encoder_layers=META["enc_layers"],
        decoder_layers=META["dec_layers"],
        encoder_attention_heads=META["heads"],
        decoder_attention_heads=META["heads"],
        encoder_ffn_dim=META["ffn"],
        decoder_ffn_dim=META["ffn"],
        num_queries=META["num_queries"],
        num_labels=META["num_classes"],
    )
    model = transformers.DetrForObjectDetection(config).eval()
    shapes = {name: list(value.shape) for name, value in model.state_dict().items()}
    spec = [[name, shape] for name, shape in shapes.items() if "backbone" not in name]
    weights = {name: torch.tensor(dense_golden.weight(META["seed"], name, shape)) for name, shape in spec}
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert not unexpected and all("backbone" in name for name in missing)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        saved = load_file(f"{folder}/model.safetensors")
    files = [name for name in saved if "backbone" not in name]
    assert len(files) == len(spec)

    model = model.double()
    features = dense_golden.tensor(META["seed"], "features", META["inputs"]["features"])
    given = transformers.modeling_outputs.BackboneOutput(feature_maps=(torch.tensor(features).double(),))
    model.model.backbone.model.forward = lambda pixels: given
    pixel_mask = torch.zeros(2, *META["canvas"], dtype=torch.long)
    for mask, (height, width) in zip(pixel_mask, META["img_shapes"], strict=True):
        mask[:height, :width] = 1
    with torch.no_grad():
        out = model(pixel_values=torch.zeros(2, 3, *META["canvas"]).double(), pixel_mask=pixel_mask)
    source = {"transformers": transformers.__version__, "torch": torch.__version__}
    meta = META | {"spec": spec, "files": sorted(files), "source": source}
    arrays = {"logits": out.logits.numpy(), "boxes": out.pred_boxes.numpy()}
    path = dense_golden.FOLDER / "detr_huggingface.npz"
    np.savez_compressed(path, meta=json.dumps(meta), **arrays)
    print({key: (value.shape, value.dtype) for key, value in arrays.items()}, path.stat().st_size)


if __name__ == "__main__":
    main()
