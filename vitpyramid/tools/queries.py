"""Where DETR's object queries look: the attention of a layer of its decoder, over an image (the paper's Figure 6)."""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import numpy as np
from PIL import Image

from vitpyramid.heads import set_prediction
from vitpyramid.heads.detr import DETR
from vitpyramid.tasks import Task
from vitpyramid.tools import chart, dense, draw
from vitpyramid.tools.preview import sheet

MOST = 11  # queries in a picture


@dataclasses.dataclass(frozen=True)
class Query:
    """What one query of a network says of an image, and where it looked.

    Attributes:
      number: of the query, from 0.
      label, score: of its best class.
      box: `[4]`, x1 y1 x2 y2 in pixels of the canvas.
      weights: `[heads, h, w]`, its attention over the whole canvas.
    """

    number: int
    label: int
    score: float
    box: np.ndarray
    weights: np.ndarray

    def inside(self, canvas: tuple[int, int]) -> float:
        """The share of its attention, mean over heads, on cells whose centres lie in its box."""
        y, x = ((np.arange(n) + 0.5) * side / n for n, side in zip(self.weights.shape[1:], canvas, strict=True))
        x1, y1, x2, y2 = self.box
        return float(self.weights.mean(0)[np.ix_((y1 <= y) & (y < y2), (x1 <= x) & (x < x2))].sum())


def layers(model: DETR) -> list[str]:
    """Paths of the decoder's layers."""
    return [f"transformer/decoder/layers_{i}" for i in range(model.decoder_layers)]


def object_queries(task: Task, variables: dict, image: Image.Image, layer: str) -> tuple[dict, list[Query]]:
    """Every query, the most certain first.

    Args:
      task: of `dense.open_task`, of a DETR.
      layer: one of `layers`; what the queries say is always the last one's.

    Returns:
      The batch of one image, as `data.dense_pipeline` makes it, and the queries.
    """
    (rows,) = dense.rows_of(task.config, [image], ("",) * task.config.model.num_classes)
    (logits, boxes), weights = _run(task.model, variables, task.prepare_eval(rows), layer)
    scores = np.asarray(jax.nn.softmax(logits)[:, :-1])
    queries = [
        Query(int(i), int(scores[i].argmax()), float(scores[i].max()), np.asarray(boxes[i]), np.asarray(weights[:, i]))
        for i in np.argsort(-scores.max(-1), kind="stable")
    ]
    return rows, queries


@functools.partial(jax.jit, static_argnums=(0, 3))
def _run(model: DETR, variables: dict, view, layer: str):
    """Of one image: the last layer's logits and boxes, and a layer's attention `[heads, Q, h, w]`."""
    (logits, boxes), state = model.apply(
        variables,
        view.images,
        view.sizes,
        method="predict",
        mutable="intermediates",
        capture_intermediates=lambda module, _: module.name == "input_proj",  # the map, for its grid
    )
    found = state["intermediates"]
    _, h, w, _ = found["input_proj"]["__call__"][0].shape
    for part in layer.split("/"):
        found = found[part]
    weights = found["multihead_attn"]["attention"][0][0]
    boxes = set_prediction.in_pixels(boxes[-1], view.sizes)
    return (logits[-1, 0], boxes[0]), weights.reshape(*weights.shape[:2], h, w)


def picture(title: str, canvas: np.ndarray, size: Sequence[int], queries: Sequence[Query], names: Sequence[str]):
    """The image with the boxes of the first queries, and under the attention of each, mean over heads.

    Args:
      canvas: uint8 `[H, W, 3]`, of which the image is `size`, its height and width.
    """
    height, width = size
    queries = queries[:MOST]
    boxes, labels = np.stack([query.box for query in queries]), [query.label for query in queries]
    captions = [f"{names[query.label]} {query.score:.2f}" for query in queries]
    tiles = [draw.objects(Image.fromarray(canvas), boxes, labels, captions)]
    for query, caption in zip(queries, captions, strict=True):
        seen = Image.fromarray(chart.overlay(canvas, query.weights.mean(0)))
        tiles.append(draw.objects(seen, query.box, [query.label], [caption]))
    under = ["image", *(f"query {query.number}: {caption}" for query, caption in zip(queries, captions, strict=True))]
    return sheet(title, np.stack([np.asarray(tile)[:height, :width] for tile in tiles]), under, columns=4)


def as_dict(query: Query, canvas: tuple[int, int], names: Sequence[str]) -> dict:
    """For JSON: boxes in pixels of the image as the network sees it."""
    return {
        "query": query.number,
        "name": names[query.label],
        "score": query.score,
        "box": np.asarray(query.box, float).tolist(),
        "attention_inside": query.inside(canvas),
    }
