"""Deformable DETR: Zhu et al., "Deformable DETR: Deformable Transformers for End-to-End Object Detection", ICLR 2021.

Equal to github.com/fundamentalvision/Deformable-DETR, commit 11169a6. PiT's detector is this one on PiT-S.
"""

import functools
import math
from collections.abc import Callable, Sequence

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp

from vitpyramid.heads import set_prediction
from vitpyramid.heads.deformable_transformer import Cells, Decoder, DecoderLayer, Encoder, EncoderLayer, Transformer
from vitpyramid.heads.detector import Detections, Targets, whole
from vitpyramid.heads.network import DenseNetwork
from vitpyramid.heads.transformer import BoxMLP, padding_mask, sine_positions, wide_dense
from vitpyramid.models.initialisers import gaussian, torch_kernel_init, xavier_uniform
from vitpyramid.models.layers import at_least_float32
from vitpyramid.models.sharding import map_rows

# Costs of a match, and parts of the loss.
WEIGHTS = set_prediction.Weights(2.0, 5.0, 2.0)


@flax.struct.dataclass
class Predictions:
    """What is said of a batch, at least float32; boxes are those of `set_prediction`.

    Attributes:
      logits, boxes: `[L, B, Q, K]` and `[L, B, Q, 4]`, of the queries after each layer of the decoder.
      proposed: `[B, S, K]` and `[B, S, 4]`, of the encoder's cells; with two stages.
    """

    logits: jax.Array
    boxes: jax.Array
    proposed: tuple[jax.Array, jax.Array] | None = None


def inverse_sigmoid(x: jax.Array) -> jax.Array:
    """The logit of what lies in 0 .. 1; at most that of 1e-5 and of 1 - 1e-5."""
    x = jnp.clip(x, 0, 1)
    return jnp.log(jnp.maximum(x, 1e-5) / jnp.maximum(1 - x, 1e-5))


class DeformableDETR(DenseNetwork, kw_only=True):
    """A transformer that looks at a few places of several levels turns queries into a set of objects.

    Attributes:
      channels: width of the transformer; half of it is for positions along each axis.
      heads, points, ffn_channels, encoder_layers, decoder_layers: of the transformer.
      feature_levels: the backbone's, and coarser ones by convolutions until there are so many.
      queries: objects that are looked for, of which most are none.
      refine: each layer of the decoder has a head of its own, and looks around the boxes of the one before it
        (iterative bounding box refinement, appendix A.4).
      two_stage: the decoder begins with the boxes that the encoder finds best, not with learned queries: as many as
        there are `queries`, or cells. It needs `refine`.
      head_drop_rate: dropout in the transformer.
      most_detections: returned at most; a query can be several.
      clip: detected boxes are cut at the image's border, which the authors do not do.
      remat: recompute each layer, and each block of the backbone, in the backward pass.
      library: whose names the weights have in PyTorch: "fundamentalvision" or "huggingface".
    """

    channels: int = 256
    heads: int = 8
    points: int = 4
    ffn_channels: int = 1024
    encoder_layers: int = 6
    decoder_layers: int = 6
    feature_levels: int = 4
    queries: int = 300
    refine: bool = False
    two_stage: bool = False
    head_drop_rate: float = 0.1
    most_detections: int = 100
    clip: bool = False
    remat: bool = False
    library: str = "fundamentalvision"

    class_layer = "class_embed_0"
    libraries = ("fundamentalvision", "huggingface")

    @property
    def after(self) -> tuple[str, ...]:
        """Projections of levels, and heads, are numbered."""
        projections = (f"input_proj_{level}_{part}" for level in range(self.feature_levels) for part in (0, 1))
        heads = (f"{kind}_embed_{i}" for kind in ("class", "bbox") for i in range(self._heads))
        return (*projections, *(() if self.two_stage else ("query_embed",)), "transformer", *heads)

    @staticmethod
    def levels_of(strides: Sequence[int]) -> tuple[int, ...]:
        """Those coarser than 4, as far as there are any."""
        return tuple(i for i, stride in enumerate(strides) if stride > 4) or (len(strides) - 1,)

    def setup(self):
        if self.two_stage and not self.refine:
            raise ValueError("two_stage = True: expected refine = True, which it is defined with")

        def layer(kind: type[nn.Module]) -> Callable[..., nn.Module]:
            kind = nn.remat(kind) if self.remat else kind
            fields = self.heads, self.feature_levels, self.points, self.ffn_channels, self.head_drop_rate, self.dtype
            return functools.partial(kind, *fields)

        def projection(level: int) -> list[nn.Module]:
            extra = level >= len(self._read)
            conv = functools.partial(nn.Conv, self.channels, dtype=self.dtype, kernel_init=xavier_uniform)
            norm = nn.GroupNorm(32, epsilon=1e-5, dtype=self.dtype, use_fast_variance=False)
            return [conv((3, 3), 2, padding=1) if extra else conv((1, 1)), norm]

        def box_head(index: int) -> BoxMLP:
            # Without a first guess of theirs, boxes begin with an eighth of the image's sides.
            sides = -2.0 if index == 0 and not self.two_stage else 0.0

            def bias_init(key, shape, dtype=jnp.float32):
                return jnp.asarray([0, 0, sides, sides], dtype)

            return BoxMLP(self.dtype, (("kernel_init", nn.initializers.zeros), ("bias_init", bias_init)))

        self.input_proj = [projection(level) for level in range(self.feature_levels)]
        self.transformer = Transformer(
            Encoder(layer(EncoderLayer), self.encoder_layers),
            Decoder(layer(DecoderLayer), self.decoder_layers),
            self.feature_levels,
            self.channels,
            self.two_stage,
            self.dtype,
        )
        if not self.two_stage:
            self.query_embed = nn.Embed(self.queries, 2 * self.channels, embedding_init=gaussian(1.0))
        # At the start every query is of each class with probability .01.
        prior = nn.initializers.constant(-math.log(99))
        self.class_embed = [
            wide_dense(self.num_classes, self.channels, self.dtype, None, torch_kernel_init, prior)
            for _ in range(self._heads)
        ]
        self.bbox_embed = [box_head(i) for i in range(self._heads)]

    @property
    def _heads(self) -> int:
        return self.decoder_layers + self.two_stage if self.refine else 1

    @property
    def _read(self) -> tuple[int, ...]:
        """Which levels of the backbone are read: the coarsest, if there are more than `feature_levels`."""
        return self.levels[-self.feature_levels :]

    def __call__(self, images: jax.Array, train: bool = False) -> Detections:
        """Detections in images that fill the canvas."""
        return self.detect(images, train=train)

    def predict(self, images: jax.Array, sizes: jax.Array | None = None, train: bool = False) -> Predictions:
        """What every layer of the decoder says of a canvas `[B, H, W, 3]`."""
        levels = self.backbone.features(images, train)
        return self.decode([levels[i].x for i in self._read], whole(images, sizes), images.shape[1:3], train)

    def decode(
        self, maps: Sequence[jax.Array], sizes: jax.Array, canvas: tuple[int, int], train: bool = False
    ) -> Predictions:
        """What every layer of the decoder says of the backbone's maps, `[B, h, w, C]` each, finest first.

        Args:
          sizes: `[B, 2]`, height and width of the images in the canvas.
          canvas: its height and width.
        """
        cells, positions = self.cells(maps, sizes, canvas)
        memory = self.transformer.encode(cells, positions, train)
        if self.two_stage:
            proposed = self._propose(memory)
            begin = self.transformer.begin_at(jax.lax.stop_gradient(map_rows(self._best, *proposed)))
        else:
            proposed = None
            embedding = self.query_embed.embedding.astype(self.dtype)
            begin = self.transformer.begin(jnp.broadcast_to(embedding, (len(memory.x), *embedding.shape)))
        found = self.transformer.decoder(*begin, memory, self._read_objects, train)
        return Predictions(*(jnp.stack(of) for of in zip(*found, strict=True)), proposed)

    def cells(self, maps: Sequence[jax.Array], sizes: jax.Array, canvas: tuple[int, int]) -> tuple[Cells, jax.Array]:
        """What the transformer reads of the backbone's maps, and positions `[B, S, C]`; arguments as of `decode`."""
        wide = at_least_float32(self.dtype)
        levels, inside, ratios, positions = [], [], [], []
        for level, (conv, norm) in enumerate(self.input_proj):
            # Coarser levels begin with the backbone's own map, not with what its projection made of it.
            source = maps[level] if level < len(maps) else maps[-1] if level == len(maps) else levels[-1]
            levels.append(norm(conv(source)))
            padding = padding_mask(sizes, canvas, levels[-1].shape[1:3])
            inside.append(~padding)
            ratios.append(jnp.stack([(~padding[:, 0]).mean(1, wide), (~padding[:, :, 0]).mean(1, wide)], axis=-1))
            positions.append(sine_positions(padding, self.channels, wide, offset=-0.5).astype(self.dtype))
        x, inside, positions = (
            jnp.concatenate([a.reshape(len(a), -1, *a.shape[3:]) for a in of], axis=1)
            for of in (levels, inside, positions)
        )
        return Cells(x, inside, jnp.stack(ratios, axis=1), tuple(a.shape[1:3] for a in levels)), positions

    def _read_objects(self, layer: int, x: jax.Array, reference: jax.Array):
        """Logits and boxes of objects, and the reference of the next layer."""
        head = layer if self.refine else 0
        logits, boxes = self.class_embed[head](x), self.bbox_embed[head](x)
        center = inverse_sigmoid(reference)
        center = jnp.pad(center, ((0, 0), (0, 0), (0, 4 - center.shape[-1])))
        boxes = jax.nn.sigmoid(boxes + center)
        return (logits, boxes), jax.lax.stop_gradient(boxes) if self.refine else reference

    def _propose(self, memory: Cells) -> tuple[jax.Array, jax.Array]:
        """`Predictions.proposed`."""
        x, boxes = self.transformer.candidates(memory)
        return self.class_embed[-1](x), jax.nn.sigmoid(self.bbox_embed[-1](x) + boxes)

    def _best(self, logits: jax.Array, boxes: jax.Array) -> jax.Array:
        """Boxes of the cells that are most likely to be of class 0, `[Q, 4]`, of `[S, K]` and `[S, 4]`."""
        _, best = jax.lax.top_k(logits[:, 0], min(self.queries, len(logits)))
        return boxes[best]

    def losses(
        self, images: jax.Array, targets: Targets, sizes: jax.Array | None = None, train: bool = True
    ) -> dict[str, jax.Array]:
        """Of classes, boxes and their overlaps, `[decoder_layers]` each; the loss is the sum of all.

        With two stages those of the proposals too, `[1]` each, `loss_cls_enc` and so on: there is one class, 0.
        """
        sizes = whole(images, sizes)
        return self.losses_of(self.predict(images, sizes, train), targets, sizes)

    @nn.nowrap
    def losses_of(self, predictions: Predictions, targets: Targets, sizes: jax.Array) -> dict[str, jax.Array]:
        """As `losses`, of predictions."""
        of = functools.partial(set_prediction.set_losses, sizes=sizes, focal=True, weights=WEIGHTS)
        losses = of(predictions.logits, predictions.boxes, targets)
        if self.two_stage:
            proposed = (x[None] for x in predictions.proposed)
            found = of(*proposed, targets.replace(labels=jnp.zeros_like(targets.labels)))
            losses |= {f"{name}_enc": value for name, value in found.items()}
        return losses

    def detect(self, images: jax.Array, sizes: jax.Array | None = None, train: bool = False) -> Detections:
        """What the last layer's queries have found."""
        sizes = whole(images, sizes)
        return self.detections_of(self.predict(images, sizes, train), sizes)

    @nn.nowrap
    def detections_of(self, predictions: Predictions, sizes: jax.Array) -> Detections:
        """As `detect`, of predictions."""
        logits, boxes = predictions.logits[-1], predictions.boxes[-1]
        return set_prediction.detections(logits, boxes, sizes, focal=True, most=self.most_detections, clip=self.clip)
