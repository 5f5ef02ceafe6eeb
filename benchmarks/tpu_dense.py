"""What the TPU's compiler estimates the parts of detectors that are no convolutions to cost, without a TPU.

    python benchmarks/tpu_dense.py [--parts "roi boxes" "rpn samples"] [--by_operation=5]

Needs `jax[tpu]`. Each part is compiled by itself for one device, at the sizes of the papers: canvases of 800 x 1344,
two images, 100 boxes an image, 256 channels in bfloat16; parts that learn with their backward pass. Loops whose turns
are not known before they run count once. Whole steps: `main.py --config=configs/detect.py:... --mode=preflight`.
"""

import argparse
import functools
import math

import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding

from vitpyramid.heads import masks, set_prediction
from vitpyramid.heads.detector import Targets
from vitpyramid.heads.registry import create_model
from vitpyramid.heads.retinanet import Predictions
from vitpyramid.heads.rpn import Objectness, Proposals
from vitpyramid.models.backbone import Level
from vitpyramid.tools import chips, hlo

CANVAS, IMAGES, SLOTS, CHANNELS = (800, 1344), 2, 100, 256


def array(*shape: int, dtype=jnp.float32) -> jax.ShapeDtypeStruct:
    """Of a batch."""
    return jax.ShapeDtypeStruct((IMAGES, *shape), dtype)


def pyramid(strides: tuple[int, ...]) -> tuple[Level, ...]:
    """Maps of a pyramid with these strides."""
    grids = ([math.ceil(side / stride) for side in CANVAS] for stride in strides)
    return tuple(Level(array(*grid, CHANNELS, dtype=jnp.bfloat16), s) for grid, s in zip(grids, strides, strict=True))


def per_anchor(levels: tuple[Level, ...], per_cell: int, *numbers: int) -> tuple[jax.ShapeDtypeStruct, ...]:
    """What a head says of every anchor."""
    return tuple(array(per_cell * math.prod(level.x.shape[1:3]), *numbers) for level in levels)


TARGETS = Targets(array(SLOTS, 4), array(SLOTS, dtype=jnp.int32), array(SLOTS, dtype=jnp.bool_))
SIZES = array(2, dtype=jnp.int32)
COARSE, FINE = pyramid((8, 16, 32, 64, 128)), pyramid((4, 8, 16, 32, 64))
RETINANET = create_model("retinanet_pvt_small", dtype=jnp.bfloat16)
MASK_RCNN = create_model("mask_rcnn_pvt_small", dtype=jnp.bfloat16)
PREDICTIONS = per_anchor(COARSE, 9, 80), per_anchor(COARSE, 9, 4)
OBJECTNESS = Objectness(per_anchor(FINE, 3), per_anchor(FINE, 3, 4))
KEYS = jax.ShapeDtypeStruct((IMAGES,), jax.eval_shape(lambda: jax.random.key(0)).dtype)


def of_heads(method):
    """A function of a Mask R-CNN without weights."""
    return lambda *args: MASK_RCNN.apply({}, *args, method=lambda network, *args: method(network, *args))


def pooled(bins: int):
    """RoIAlign and its gradient, of the four finest levels."""

    def both(maps, boxes, cotangent):
        def of_maps(maps):
            levels = tuple(Level(x, level.stride) for x, level in zip(maps, FINE, strict=False))
            return of_heads(lambda network, boxes: network.roi_head.pool(levels, boxes, bins))(boxes)

        out, backward = jax.vjp(of_maps, maps)
        return out, backward(cotangent)

    return both


def retinanet_losses(logits, deltas, targets, sizes):
    """Losses of predictions, and their gradients."""
    predictions = Predictions(COARSE, logits, deltas)

    def total(logits, deltas):
        found = RETINANET.losses_of(predictions.replace(logits=logits, deltas=deltas), targets, sizes)
        return sum(value.sum() for value in found.values())

    return jax.value_and_grad(total, argnums=(0, 1))(logits, deltas)


MAPS = tuple(level.x for level in FINE[:4])
# Function and the shapes of its arguments.
PARTS = {
    "roi boxes": (pooled(7), (MAPS, array(512, 4), array(512, 7, 7, CHANNELS, dtype=jnp.bfloat16))),
    "roi masks": (pooled(14), (MAPS, array(128, 4), array(128, 14, 14, CHANNELS, dtype=jnp.bfloat16))),
    "retinanet assignment": (
        lambda targets, sizes: RETINANET.assign(COARSE, targets, sizes),
        (TARGETS, SIZES),
    ),
    "retinanet losses": (retinanet_losses, (*PREDICTIONS, TARGETS, SIZES)),
    "retinanet detections": (
        lambda logits, deltas, sizes: RETINANET.detections_of(Predictions(COARSE, logits, deltas), sizes),
        (*PREDICTIONS, SIZES),
    ),
    "rpn samples": (
        of_heads(lambda network, *args: network.rpn_head.samples_of(FINE, *args)),
        (TARGETS, SIZES, KEYS),
    ),
    "rpn proposals": (
        of_heads(lambda network, *args: network.rpn_head.propose(args[0], FINE, args[1], 2000, 1000)),
        (OBJECTNESS, SIZES),
    ),
    "roi samples": (
        of_heads(lambda network, *args: network.roi_head.regions(*args)),
        (Proposals(array(1000, 4), array(1000), array(1000, dtype=jnp.bool_)), TARGETS, KEYS),
    ),
    "mask targets": (
        jax.vmap(functools.partial(masks.mask_targets, side=28, width=CANVAS[1])),
        (array(SLOTS, CANVAS[0], CANVAS[1] // 8, dtype=jnp.uint8), array(128, 4), array(128, dtype=jnp.int32)),
    ),
    # Six layers of 100 queries.
    "detr matching": (
        lambda cost, valid: set_prediction.match(cost.swapaxes(0, 1), valid),
        (array(6, 100, SLOTS), array(SLOTS, dtype=jnp.bool_)),
    ),
}


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        "tpu_dense.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--parts", nargs="*", choices=list(PARTS), help="which ones; default: all")
    parser.add_argument("--topology", default="v5e:2x2")
    parser.add_argument("--by_operation", type=int, default=0, metavar="N", help="print the N costliest operations")
    args = parser.parse_args()
    chips.use_absent_chips()
    device = chips.absent_devices(args.topology)[0]
    print(f"jax {jax.__version__}, {device.device_kind}, {IMAGES} images of {CANVAS}; the compiler's estimates")
    for name in args.parts or PARTS:
        function, shapes = PARTS[name]
        shapes = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=SingleDeviceSharding(device)), shapes
        )
        compiled = jax.jit(function).lower(*shapes).compile()
        found = hlo.cycles(compiled.as_text())
        unknown = found.pop(None, 0)
        temporary = compiled.memory_analysis().temp_size_in_bytes / 2**20
        note = f", {unknown} operations without an estimate" if unknown else ""
        print(f"{name:22}{found.total() / 1e6:8.2f} M cycles {temporary:8.0f} MiB{note}", flush=True)
        for operation, value in found.most_common(args.by_operation):
            print(f"  {value / 1e6:8.3f}  {operation}")


if __name__ == "__main__":
    main()
