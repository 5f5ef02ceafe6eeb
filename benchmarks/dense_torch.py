"""Times the heads of RetinaNet and of Mask R-CNN here against torchvision's, eager, on the CPU.

    python benchmarks/dense_torch.py --size=256x384 --batch=2
    python benchmarks/dense_torch.py --network=mask_rcnn --batch=2

Both sides get the same inputs and weights, and must give the same outputs before anything is timed. Both run in float32
on the same `--threads` cores, in one process and in turns; there is no optimiser. Needs torch and torchvision.

RetinaNet: on maps that PVT-Small would give. Forward: FPN with P6 and P7, and the head, 80 classes. Step: assignment of
anchors to eight boxes an image, both losses, gradients of weights and of maps. torchvision's anchors are rounded to
whole pixels, so that its losses are others, and not compared. Boxes are not decoded or suppressed: torchvision does
that in compiled operators.

Mask R-CNN: box head and mask head on regions that RoIAlign would give, 128 and 32 an image, a quarter of the papers'.
Forward: logits and deltas of the ones, masks of the others, 80 classes. Step: gradients of weights and of regions of
the sum of the outputs' mean squares. RoIAlign is left out, which torchvision computes in a compiled operator.
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
from torchvision.models.detection.faster_rcnn import TwoMLPHead
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.retinanet import RetinaNetHead, _default_anchorgen
from torchvision.ops import box_iou
from torchvision.ops.feature_pyramid_network import FeaturePyramidNetwork, LastLevelP6P7

from vitpyramid import create_model
from vitpyramid.heads.detector import Targets
from vitpyramid.heads.retinanet import Predictions
from vitpyramid.models.backbone import Level

REGIONS, MASKS = 128, 32  # of an image
DIMS, STRIDES, CLASSES, BOXES = (128, 320, 512), (8, 16, 32), 80, 8
# Ours by torchvision's names.
NAMES = {f"neck/lateral_convs_{i}": f"fpn.inner_blocks.{i}.0" for i in range(3)}
NAMES |= {f"neck/fpn_convs_{i}": f"fpn.layer_blocks.{i}.0" for i in range(3)}
NAMES |= {"neck/fpn_convs_3": "fpn.extra_blocks.p6", "neck/fpn_convs_4": "fpn.extra_blocks.p7"}
NAMES |= {f"bbox_head/cls_convs_{i}": f"head.classification_head.conv.{i}.0" for i in range(4)}
NAMES |= {f"bbox_head/reg_convs_{i}": f"head.regression_head.conv.{i}.0" for i in range(4)}
NAMES |= {"bbox_head/retina_cls": "head.classification_head.cls_logits"}
NAMES |= {"bbox_head/retina_reg": "head.regression_head.bbox_reg"}
ROI_NAMES = {f"bbox_head/shared_fcs_{i}": f"box_head.fc{i + 6}" for i in range(2)}
ROI_NAMES |= {"bbox_head/fc_cls": "cls_score", "bbox_head/fc_reg": "bbox_pred"}
ROI_NAMES |= {f"mask_head/convs_{i}": f"mask_head.{i}.0" for i in range(4)}
ROI_NAMES |= {"mask_head/upsample": "mask_predictor.conv5_mask"}
ROI_NAMES |= {"mask_head/conv_logits": "mask_predictor.mask_fcn_logits"}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", default="retinanet", choices=("retinanet", "mask_rcnn"))
    parser.add_argument("--size", default="256x384", help="of images whose maps RetinaNet's are, height x width")
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


def load(network: torch.nn.Module, params: dict, names: dict[str, str]) -> None:
    """Gives torchvision's network our weights."""
    shapes, arrays = {key: value.shape for key, value in network.state_dict().items()}, {}
    for ours, theirs in names.items():
        layer = functools.reduce(dict.__getitem__, ours.split("/"), params)
        kernel = np.array(layer["kernel"])
        # Their transposed convolution has inputs first; our first layer of a region is a kernel.
        axes = {2: (1, 0), 4: (2, 3, 0, 1) if ours.endswith("upsample") else (3, 2, 0, 1)}[kernel.ndim]
        weight = kernel.transpose(axes).reshape(shapes[f"{theirs}.weight"])
        arrays |= {f"{theirs}.weight": torch.from_numpy(weight.copy())}
        arrays |= {f"{theirs}.bias": torch.from_numpy(np.array(layer["bias"]))}
    network.load_state_dict(arrays)


def random_params(model, method, rng: np.random.Generator, *inputs) -> dict:
    shapes = jax.eval_shape(functools.partial(nn.Module.init, model, method=method), jax.random.key(0), *inputs)
    return jax.tree.map(lambda leaf: jnp.float32(rng.normal(0, 0.02, leaf.shape)), shapes["params"])


def of_regions(network, regions: jax.Array, masks: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Of a Mask R-CNN: logits and deltas of regions `[N, 7, 7, C]`, mask logits of regions `[N, 14, 14, C]`."""
    logits, deltas = network.roi_head.bbox_head(regions)
    return logits, deltas.reshape(len(deltas), -1), network.roi_head.mask_head(masks)


class TorchRegions(torch.nn.Module):
    """The same of torchvision, but for the layer of boxes: its own has a box of the background too."""

    def __init__(self):
        super().__init__()
        self.box_head = TwoMLPHead(256 * 7 * 7, 1024)
        self.cls_score, self.bbox_pred = torch.nn.Linear(1024, CLASSES + 1), torch.nn.Linear(1024, CLASSES * 4)
        self.mask_head, self.mask_predictor = MaskRCNNHeads(256, (256,) * 4, 1), MaskRCNNPredictor(256, 256, CLASSES)

    def forward(self, regions, masks):
        x = self.box_head(regions)
        return self.cls_score(x), self.bbox_pred(x), self.mask_predictor(self.mask_head(masks))


def mask_rcnn(args: argparse.Namespace, rng: np.random.Generator) -> dict:
    """Both sides' functions without arguments, whose "forward" gives outputs in our layout."""
    inputs = [
        rng.standard_normal((args.batch * count, side, side, 256)).astype(np.float32)
        for count, side in ((REGIONS, 7), (MASKS, 14))
    ]
    model = create_model("mask_rcnn_pvt_small", num_classes=CLASSES)
    params = random_params(model, of_regions, rng, *inputs)
    network = TorchRegions()
    load(network, params["roi_head"], ROI_NAMES)

    @jax.jit
    def forward(params, inputs):
        return model.apply({"params": params}, *inputs, method=of_regions)

    @jax.jit
    @functools.partial(jax.grad, argnums=(0, 1))
    def step(params, inputs):
        return sum(jnp.square(out).mean() for out in forward(params, inputs))

    theirs = [torch.from_numpy(x).permute(0, 3, 1, 2).contiguous().requires_grad_() for x in inputs]
    inputs = list(map(jnp.asarray, inputs))

    def torch_forward():
        with torch.inference_mode():
            logits, deltas, masks = network(*theirs)
            return logits.numpy(), deltas.numpy(), masks.permute(0, 2, 3, 1).numpy()

    def torch_step():
        network.zero_grad()
        sum(out.square().mean() for out in network(*theirs)).backward()

    ours = {
        "forward": lambda: jax.block_until_ready(forward(params, inputs)),
        "step": lambda: jax.block_until_ready(step(params, inputs)),
    }
    return {"jax": ours, "torch": {"forward": torch_forward, "step": torch_step}}


def retinanet(args: argparse.Namespace, rng: np.random.Generator) -> dict:
    """Likewise."""
    height, width = size = tuple(map(int, args.size.split("x")))
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
    params = random_params(model, predict, rng, maps)
    network = Torch()
    load(network, params, NAMES)
    return {
        "jax": jax_functions(model, params, maps, targets, sizes),
        "torch": torch_functions(network, maps, targets, size),
    }


def main():
    args = parse_args()
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: args.threads])  # before jax counts the cores
    torch.set_num_threads(args.threads)
    sides = {"retinanet": retinanet, "mask_rcnn": mask_rcnn}[args.network](args, np.random.default_rng(0))
    for found, expected in zip(sides["jax"]["forward"](), sides["torch"]["forward"](), strict=True):
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4 * np.abs(expected).max())
    turns.compare(f"{args.network} batch {args.batch}", sides, args.repeats)


if __name__ == "__main__":
    main()
