"""Networks, images and ground truth of the golden files of dense prediction."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np

from dense_golden import DenseGolden
from vitpyramid.heads.detector import Targets
from vitpyramid.models.backbone import Backbone
from vitpyramid.models.pvt import PVT
from vitpyramid.models.rest import ResT
from vitpyramid.train.sharding import batch_sharding, make_mesh


def backbone(meta: dict) -> Backbone:
    """The narrow network of a golden file."""
    family = PVT if "img_size" in meta else ResT
    fields = {"dims": "embed_dims", "heads": "num_heads", "mlp_ratios": "mlp_ratios", "sr_ratios": "sr_ratios"}
    arguments = {key: tuple(meta[name]) for key, name in fields.items()}
    return family(tuple(meta["depths"]), image_size=meta.get("img_size", 224), **arguments)


def canvas(golden: DenseGolden) -> jnp.ndarray:
    """Images `[B, H, W, 3]` float64 as the network gets them."""
    images = golden.input("image").astype(np.float64).transpose(0, 2, 3, 1)
    images = (images - golden.meta.get("pixel_mean", 0.0)) / golden.meta.get("pixel_std", 1.0)
    for image, (height, width) in zip(images, golden.meta["img_shapes"], strict=True):
        image[height:] = 0
        image[:, width:] = 0
    return jnp.asarray(images)


def padded_targets(golden: DenseGolden, slots: int, masks: bool = False) -> Targets:
    """Ground truth in more slots than there are boxes; what the others hold must not matter."""
    meta = golden.meta
    batch = len(meta["gt_boxes"])
    boxes = np.tile(np.array([3.0, 5.0, 90.0, 80.0]), (batch, slots, 1))
    labels, valid = np.ones((batch, slots), np.int32), np.zeros((batch, slots), bool)
    for i, (of_boxes, of_labels) in enumerate(zip(meta["gt_boxes"], meta["gt_labels"], strict=True)):
        boxes[i, : len(of_boxes)], labels[i, : len(of_labels)], valid[i, : len(of_boxes)] = of_boxes, of_labels, True
    ellipses = [[ellipse(box, meta["canvas"]) for box in of_image] for of_image in boxes]
    return Targets(*map(jnp.asarray, (boxes, labels, valid)), np.packbits(ellipses, axis=-1) if masks else None)


def ellipse(box, size) -> np.ndarray:
    """bool `[H, W]`: the pixels whose centres are in the ellipse inscribed in a box."""
    x1, y1, x2, y2 = box
    y, x = np.mgrid[: size[0], : size[1]] + 0.5
    return ((x - (x1 + x2) / 2) / ((x2 - x1) / 2 + 0.01)) ** 2 + ((y - (y1 + y2) / 2) / ((y2 - y1) / 2 + 0.01)) ** 2 < 1


def nchw(x) -> np.ndarray:
    """`[B, h, w, C]` in PyTorch's layout."""
    return np.asarray(x).transpose(0, 3, 1, 2)


@contextlib.contextmanager
def two_devices():
    """Sets a mesh of two and gives a function that splits batches of two images over them."""
    mesh = make_mesh(1, jax.devices()[:2])
    with jax.set_mesh(mesh):
        yield functools.partial(jax.device_put, device=batch_sharding(mesh))
