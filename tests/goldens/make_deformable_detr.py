"""Writes tests/goldens/dense/deformable_detr_huggingface.npz: outputs of transformers' Deformable DETR, in two stages.

    python tests/goldens/make_deformable_detr.py

As `make_detr.py`, whose needs it has. Losses are the last layer's and the proposals', without their weights; `grad/` is
of their sum with weights 2, 5, 2. `spec` has the names of a saved file, each array once; `memory` those of the modules.
"""

import json
import pathlib
import sys
import tempfile

import numpy as np
import torch

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

from make_detr import import_transformers

import dense_golden

META = {
    "kind": "deformable_detr",
    "seed": 471,
    "canvas": [96, 128],
    "img_shapes": [[96, 128], [80, 110]],
    "num_classes": 3,
    "feature_channels": [8, 12],
    "feature_maps": [[8, 11], [4, 6]],
    "hidden": 32,
    "heads": 4,
    "ffn": 24,
    "enc_layers": 1,
    "dec_layers": 2,
    "num_queries": 9,
    "num_feature_levels": 3,
    "points": 2,
    "gt_boxes_cxcywh": [[[0.3, 0.4, 0.2, 0.5], [0.7, 0.55, 0.3, 0.25]], [[0.52, 0.38, 0.44, 0.31]]],
    "gt_labels": [[1, 0], [2]],
    "inputs": {"features0": [2, 8, 8, 11], "features1": [2, 12, 4, 6]},
}


def main():
    transformers = import_transformers()
    from safetensors.numpy import load_file, save_file
    from transformers.loss import loss_deformable_detr as losses

    resnet = transformers.ResNetConfig(
        embedding_size=8,
        hidden_sizes=[8, 8, *META["feature_channels"]],
        depths=[1, 1, 1, 1],
        out_features=["stage3", "stage4"],
        layer_type="basic",
    )
    config = transformers.DeformableDetrConfig(
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
        encoder_n_points=META["points"],
        decoder_n_points=META["points"],
        num_feature_levels=META["num_feature_levels"],
        num_queries=META["num_queries"],
        two_stage_num_proposals=META["num_queries"],
        num_labels=META["num_classes"],
        with_box_refine=True,
        two_stage=True,
        disable_custom_kernels=True,
    )
    model = transformers.DeformableDetrForObjectDetection(config).eval()
    with tempfile.TemporaryDirectory() as folder:
        file = f"{folder}/model.safetensors"
        model.save_pretrained(folder)
        arrays = load_file(file)
        spec = [[name, list(array.shape)] for name, array in sorted(arrays.items()) if "backbone" not in name]
        save_file(arrays | weights_of(spec), file, {"format": "pt"})
        model = transformers.DeformableDetrForObjectDetection.from_pretrained(folder).eval().double()
    memory = [name for name in model.state_dict() if "backbone" not in name]
    assert {in_file(name) for name in memory} == {name for name, _ in spec}

    features = [dense_golden.tensor(META["seed"], name, shape) for name, shape in META["inputs"].items()]
    maps = tuple(torch.tensor(x).double().requires_grad_() for x in features)
    given = transformers.modeling_outputs.BackboneOutput(feature_maps=maps)
    model.model.backbone.model.forward = lambda pixels: given
    pixel_mask = torch.zeros(2, *META["canvas"], dtype=torch.long)
    for mask, (height, width) in zip(pixel_mask, META["img_shapes"], strict=True):
        mask[:height, :width] = 1
    labels = [
        {"class_labels": torch.tensor(of_labels), "boxes": torch.tensor(of_boxes, dtype=torch.float64)}
        for of_labels, of_boxes in zip(META["gt_labels"], META["gt_boxes_cxcywh"], strict=True)
    ]
    torch.float32 = torch.float64  # casts in the code would round
    out = model(torch.zeros(2, 3, *META["canvas"]).double(), pixel_mask=pixel_mask, labels=labels)
    scores = out.enc_outputs_class[..., 0].sort(descending=True).values[:, : META["num_queries"] + 1]
    assert (scores[:, :-1] - scores[:, 1:]).min() > 1e-4, "which candidates are best is a matter of rounding"

    matcher = losses.DeformableDetrHungarianMatcher(class_cost=2, bbox_cost=5, giou_cost=2)
    criterion = losses.DeformableDetrImageLoss(matcher, META["num_classes"], 0.25, ["labels", "boxes"])
    boxes = out.enc_outputs_coord_logits.sigmoid()
    found = criterion({"logits": out.logits, "pred_boxes": out.pred_boxes}, labels)
    one_class = [of | {"class_labels": torch.zeros_like(of["class_labels"])} for of in labels]
    proposed = criterion({"logits": out.enc_outputs_class, "pred_boxes": boxes}, one_class)
    found |= {f"{name}_enc": value for name, value in proposed.items()}
    total = sum(value * (5 if "bbox" in name else 2) for name, value in found.items())
    total.backward()
    parameters = {name: value for name, value in model.named_parameters() if value.grad is not None}
    names = [name for name in parameters if "backbone" not in name]
    gradients = [(parameters[name].grad.numpy().ravel(), parameters[name].detach().numpy().ravel()) for name in names]
    arrays = {
        "logits": out.logits,
        "boxes": out.pred_boxes,
        "proposed/logits": out.enc_outputs_class,
        "proposed/boxes": boxes,
        **{f"loss/{name}": value[None] for name, value in found.items()},
        **{f"grad_features{i}": x.grad for i, x in enumerate(maps)},
    }
    arrays = {name: value.detach().numpy() for name, value in arrays.items()} | {
        "grad/names": np.array([in_file(name) for name in names]),
        "grad/norms": np.array([np.linalg.norm(g) for g, _ in gradients]),
        "grad/dots": np.array([g @ w for g, w in gradients]),
    }
    source = {"transformers": transformers.__version__, "torch": torch.__version__}
    meta = META | {"spec": spec, "memory": memory, "source": source}
    path = dense_golden.FOLDER / "deformable_detr_huggingface.npz"
    np.savez_compressed(path, meta=json.dumps(meta), **arrays)
    print({key: (value.shape, value.dtype) for key, value in arrays.items()}, path.stat().st_size)


def in_file(name):
    """The name in a file of what a module in memory calls so."""
    name = name.replace(".o_proj.", ".out_proj.").replace(".mlp.", ".")
    return f"model.decoder.{name}" if name.startswith(("class_embed.", "bbox_embed.")) else name


def weights_of(spec):
    return {name: dense_golden.weight(META["seed"], name, shape) for name, shape in spec}


if __name__ == "__main__":
    main()
