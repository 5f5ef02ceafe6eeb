"""Times RetinaNet's neck and head here against torchvision's, eager, on the CPU.

    python benchmarks/dense_torch.py --size=256x384 --batch=2

Both get the same maps, those that PVT-Small would give, and the same weights, and must give the same logits and deltas
before anything is timed. Forward: FPN with P6 and P7, and the head, 80 classes. Step: assignment of anchors to eight
boxes an image, both losses, gradients of weights and of maps; there is no optimiser. torchvision's anchors are rounded
to whole pixels, so that its losses are others, and not compared. Boxes are not decoded or suppressed: torchvision does
that in compiled operators. Both run in float32 on the same `--threads` cores, in one process and in turns. Needs torch
and torchvision.
"""

import argparse
import collections
import functools
import os

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import torch
import turns
from torchvision.models.detection import _utils as matching
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.retinanet import RetinaNetHead, _default_anchorgen
from torchvision.ops import box_iou
from torchvision.ops.feature_pyramid_network import FeaturePyramidNetwork, LastLevelP6P7

from vitpyramid import create_model
from vitpyramid.heads.detector import Targets
from vitpyramid.heads.retinanet import Predictions
from vitpyramid.models.backbone import Level

DIMS, STRIDES, CLASSES, BOXES = (128, 320, 512), (8, 16, 32), 80, 8
# Ours by torchvision's names.
NAMES = {f"neck/lateral_convs_{i}": f"fpn.inner_blocks.{i}.0" for i in range(3)}
NAMES |= {f"neck/fpn_convs_{i}": f"fpn.layer_blocks.{i}.0" for i in range(3)}
NAMES |= {"neck/fpn_convs_3": "fpn.extra_blocks.p6", "neck/fpn_convs_4": "fpn.extra_blocks.p7"}
NAMES |= {f"bbox_head/cls_convs_{i}": f"head.classification_head.conv.{i}.0" for i in range(4)}
NAMES |= {f"bbox_head/reg_convs_{i}": f"head.regression_head.conv.{i}.0" for i in range(4)}
NAMES |= {"bbox_head/retina_cls": "head.classification_head.cls_logits"}
NAMES |= {"bbox_head/retina_reg": "head.regression_head.bbox_reg"}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="256x384", help="of the images that the maps would be of, height x width")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5, help="timed rounds, after one that is not")
    parser.add_argument("--threads", type=int, default=2)
    return parser.parse_args()


def predict(network, maps: list[jax.Array]) -> Predictions:
    """Of a RetinaNet, from the backbone's maps on."""
    levels = network.neck([Level(x, stride) for x, stride in zip(maps, STRIDES, strict=True)])
    logits, deltas = zip(*(network.bbox_head(level.x) for level in levels), strict=True)
    return Predictions(levels, logits, deltas)


def jax_functions(model, params: dict, maps: list[np.ndarray], targets: Targets, sizes: np.ndarray) -> dict:
    """`{"forward": f, "step": f}`: functions without arguments that return when the work is done."""
    maps = list(map(jnp.asarray, maps))

    @jax.jit
    def forward(params, maps):
        found = model.apply({"params": params}, maps, method=predict)
        return jnp.concatenate(found.logits, axis=1), jnp.concatenate(found.deltas, axis=1)

    @jax.jit
    @functools.partial(jax.value_and_grad, argnums=(0, 1))
    def step(params, maps, targets):
        def losses(network, maps):
            return network.losses_of(predict(network, maps), targets, sizes)

        found = model.apply({"params": params}, maps, method=losses)
        return sum(value.sum() for value in found.values())

    return {
        "forward": lambda: jax.block_until_ready(forward(params, maps)),
        "step": lambda: jax.block_until_ready(step(params, maps, targets)),
    }


class Torch(torch.nn.Module):
    """The same of torchvision."""

    def __init__(self):
        super().__init__()
        self.fpn = FeaturePyramidNetwork(list(DIMS), 256, LastLevelP6P7(DIMS[-1], 256))
        self.head = RetinaNetHead(256, 9, CLASSES)
        self.anchors = _default_anchorgen()
        self.matcher = matching.Matcher(0.5, 0.4, allow_low_quality_matches=True)

    def forward(self, maps):
        levels = list(self.fpn(collections.OrderedDict((str(i), x) for i, x in enumerate(maps))).values())
        return levels, self.head(levels)

    def losses(self, maps, targets, images):
        """As `RetinaNet.forward` and its `compute_loss`."""
        levels, found = self(maps)
        anchors = self.anchors(images, levels)
        matched = [self.matcher(box_iou(of["boxes"], mine)) for of, mine in zip(targets, anchors, strict=True)]
        return sum(self.head.compute_loss(targets, found, anchors, matched).values())


def torch_functions(network: Torch, maps: list[np.ndarray], targets: Targets, size: tuple[int, int]) -> dict:
    """The same in PyTorch."""
    maps = [torch.from_numpy(x).permute(0, 3, 1, 2).contiguous().requires_grad_() for x in maps]
    each = zip(np.asarray(targets.boxes), np.asarray(targets.labels, np.int64), strict=True)
    listed = [
        {"boxes": torch.from_numpy(boxes.copy()), "labels": torch.from_numpy(labels.copy())} for boxes, labels in each
    ]
    images = ImageList(torch.zeros(len(listed), 3, *size), [size] * len(listed))

    def forward():
        with torch.inference_mode():
            found = network(maps)[1]
            return found["cls_logits"].numpy(), found["bbox_regression"].numpy()

    def step():
        network.zero_grad()
        network.losses(maps, listed, images).backward()

    return {"forward": forward, "step": step}


def main():
    args = parse_args()
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: args.threads])  # before jax counts the cores
    torch.set_num_threads(args.threads)
    height, width = size = tuple(map(int, args.size.split("x")))
    rng = np.random.default_rng(0)
    maps = [
        rng.standard_normal((args.batch, height // stride, width // stride, dim)).astype(np.float32)
        for dim, stride in zip(DIMS, STRIDES, strict=True)
    ]
    corner = rng.uniform(0, 0.6, (args.batch, BOXES, 2)) * (width, height)
    boxes = np.concatenate([corner, corner + rng.uniform(0.05, 0.4, corner.shape) * (width, height)], -1)
    labels = rng.integers(0, CLASSES, (args.batch, BOXES))
    targets = Targets(jnp.float32(boxes), jnp.int32(labels), jnp.ones(labels.shape, bool))
    sizes = np.tile(np.array(size, np.int32), (args.batch, 1))

    model = create_model("retinanet_pvt_small", num_classes=CLASSES, relu_before_p7=True, images_per_group=1)
    init = functools.partial(nn.Module.init, model, method=predict)
    shapes = jax.eval_shape(init, jax.random.key(0), maps)["params"]
    params = jax.tree.map(lambda leaf: jnp.float32(rng.normal(0, 0.02, leaf.shape)), shapes)
    network = Torch()
    arrays = {}
    for ours, theirs in NAMES.items():
        layer = functools.reduce(dict.__getitem__, ours.split("/"), params)
        arrays[f"{theirs}.weight"] = torch.from_numpy(np.array(layer["kernel"]).transpose(3, 2, 0, 1).copy())
        arrays[f"{theirs}.bias"] = torch.from_numpy(np.array(layer["bias"]))
    network.load_state_dict(arrays)
    sides = {
        "jax": jax_functions(model, params, maps, targets, sizes),
        "torch": torch_functions(network, maps, targets, size),
    }
    for found, expected in zip(sides["jax"]["forward"](), sides["torch"]["forward"](), strict=True):
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4 * np.abs(expected).max())
    turns.compare(f"{args.size} batch {args.batch}", sides, args.repeats)


if __name__ == "__main__":
    main()
