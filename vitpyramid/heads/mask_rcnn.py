"""Mask R-CNN with FPN: He et al., ICCV 2017, arXiv 1703.06870.

The defaults are mmdetection's (2.13) with the configuration of PVT's detectors; `DETECTRON2` has what is otherwise in
detectron2, with which ResT's were trained. Equal to both, in float64 and on the same weights, where the same samples
are drawn.
"""

from collections.abc import Callable

import flax.linen as nn
import jax

from vitpyramid.heads.detector import Detections, Targets, whole
from vitpyramid.heads.fpn import FPN
from vitpyramid.heads.network import DenseNetwork
from vitpyramid.heads.roi_head import RoIHead
from vitpyramid.heads.rpn import RPN, Proposals
from vitpyramid.models.backbone import Level
from vitpyramid.models.initialisers import fan_in_uniform, fan_out_normal, gaussian, xavier_uniform

# What detectron2 does otherwise; see the attributes of `MaskRCNN`.
DETECTRON2 = {
    "library": "detectron2",
    "rpn_low_quality": "label",
    "rpn_least": 0.0,
    "roi_low_quality": None,
    "learns_padding": True,
    "clamp_below": False,
    "rpn_normaliser": "batch",
    "truth_first": False,
    "level_rule": (2, 1e-8),
    "fc_init": fan_in_uniform,
    "mask_init": gaussian(0.001),
}


class MaskRCNN(DenseNetwork, kw_only=True):
    """Two stages: proposals on a pyramid with a level behind the backbone's, then class, box and mask of each.

    Attributes:
      channels, fc_channels: of the pyramid and of convolutions; of the box head's layers.
      images_per_group: images whose samples are the divisor of their losses; None: the whole batch.
      rpn_before, rpn_after: boxes of a level before suppression, and of all levels after it: in training, otherwise.
      rpn_iou_threshold: of suppression between proposals of a level.
      rpn_samples: anchors of an image that are learned from, at most half of them positives.
      roi_samples, positive_fraction: regions of an image that are learned from, and the most positives among them.
      random_samples: they are drawn, for which there must be a `dropout` RNG; otherwise the lowest indices are taken.
      finest_side: regions up to twice this, in cells, are read from the finest level; see `roi_align.level_of`.
      score_threshold, iou_threshold, most_detections: of what is kept; detections of a class suppress each other.

    Attributes where the libraries differ:
      library: whose names the weights have in PyTorch.
      rpn_low_quality, rpn_least, roi_low_quality: `matching.assign`, of anchors and of proposals.
      learns_padding: anchors in the canvas beyond the image are background; otherwise they are not learned from.
      clamp_below: `boxes.decode`.
      rpn_normaliser: of losses: the number of "samples", an image's positives and background at least one each; or
        of the whole "batch" as if there were `rpn_samples` in each image.
      truth_first: the ground truth stands before the proposals and is assigned to itself; otherwise behind them.
      level_rule: shift and epsilon of `roi_align.level_of`.
      fc_init, mask_init: of kernels of the FPN and of the box head's layers; of the layer of mask logits.
    """

    channels: int = 256
    fc_channels: int = 1024
    images_per_group: int | None = None
    rpn_before: tuple[int, int] = (2000, 1000)
    rpn_after: tuple[int, int] = (1000, 1000)
    rpn_iou_threshold: float = 0.7
    rpn_samples: int = 256
    roi_samples: int = 512
    positive_fraction: float = 0.25
    random_samples: bool = True
    finest_side: float = 14.0
    score_threshold: float = 0.05
    iou_threshold: float = 0.5
    most_detections: int = 100
    library: str = "mmdetection"
    rpn_low_quality: str = "match"
    rpn_least: float = 0.3
    roi_low_quality: str | None = "match"
    learns_padding: bool = False
    clamp_below: bool = True
    rpn_normaliser: str = "samples"
    truth_first: bool = True
    level_rule: tuple[int, float] = (0, 1e-6)
    fc_init: Callable = xavier_uniform
    mask_init: Callable = fan_out_normal

    after = ("neck", "rpn_head", "roi_head")
    class_layer = "roi_head/bbox_head/fc_cls"

    @nn.nowrap
    def classes_of(self, rows: int) -> int:
        """Of a class layer with `rows` outputs, of which one is background's."""
        return rows - 1

    def setup(self):
        self.neck = FPN(self.channels, extra=1, pool=True, kernel_init=self.fc_init, dtype=self.dtype)
        self.rpn_head = RPN(
            channels=self.channels,
            samples=self.rpn_samples,
            iou_threshold=self.rpn_iou_threshold,
            images_per_group=self.images_per_group,
            low_quality=self.rpn_low_quality,
            least=self.rpn_least,
            learns_padding=self.learns_padding,
            clamp_below=self.clamp_below,
            normaliser=self.rpn_normaliser,
            dtype=self.dtype,
        )
        self.roi_head = RoIHead(
            num_classes=self.num_classes,
            channels=self.channels,
            fc_channels=self.fc_channels,
            samples=self.roi_samples,
            positive_fraction=self.positive_fraction,
            images_per_group=self.images_per_group,
            finest_side=self.finest_side,
            level_rule=self.level_rule,
            truth_first=self.truth_first,
            low_quality=self.roi_low_quality,
            clamp_below=self.clamp_below,
            score_threshold=self.score_threshold,
            iou_threshold=self.iou_threshold,
            most_detections=self.most_detections,
            kernel_init=self.fc_init,
            mask_init=self.mask_init,
            dtype=self.dtype,
        )

    def __call__(self, images: jax.Array, train: bool = False) -> Detections:
        """Detections in images that fill the canvas."""
        return self.detect(images, train=train)

    def losses(
        self, images: jax.Array, targets: Targets, sizes: jax.Array | None = None, train: bool = True
    ) -> dict[str, jax.Array]:
        """Of anchors `[levels]` each, of regions `[]` each, of masks where there are any; the loss is their sum."""
        sizes = whole(images, sizes)
        levels = self.pyramid(images, train)
        of_anchors, of_regions = self._keys(len(images))
        objectness = self.rpn_head(levels)
        first = self.rpn_head.losses(objectness, levels, targets, sizes, of_anchors)
        proposals = self.rpn_head.propose(objectness, levels, sizes, self.rpn_before[0], self.rpn_after[0])
        regions = self.roi_head.regions(proposals, targets, of_regions)
        return first | self.roi_head.losses(self.read(levels), regions, targets, images.shape[2])

    def detect(self, images: jax.Array, sizes: jax.Array | None = None, train: bool = False) -> Detections:
        """What is in the images, with masks of the boxes, `[B, n, 28, 28]`."""
        sizes = whole(images, sizes)
        levels = self.pyramid(images, train)
        return self.roi_head.detect(self.read(levels), self.proposals(levels, sizes), sizes)

    def proposals(self, levels: tuple[Level, ...], sizes: jax.Array) -> Proposals:
        """Of a pyramid, as in evaluation."""
        return self.rpn_head.propose(self.rpn_head(levels), levels, sizes, self.rpn_before[1], self.rpn_after[1])

    def read(self, levels: tuple[Level, ...]) -> tuple[Level, ...]:
        """The levels that regions are read from: not the coarsest."""
        return levels[:-1]

    def _keys(self, batch: int):
        """Keys of anchors' and of regions' samples, `[B]` each."""
        if not self.random_samples:
            return None, None
        return jax.random.split(self.make_rng("dropout"), (2, batch))
