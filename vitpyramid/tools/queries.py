"""Where the object queries of DETR and of Deformable DETR look: the attention of a layer of the decoder, over an image.

DETR's is a map (the paper's Figure 6), Deformable DETR's is a few places with a weight each (Figure 6 of its paper).
"""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import numpy as np
from PIL import Image, ImageDraw

from vitpyramid.heads import set_prediction
from vitpyramid.heads.deformable_detr import DeformableDETR
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
      weights: `[heads, h, w]`, its attention over the whole canvas; or `[heads, L, P]`, at each of its `places`.
      places: `[heads, L, P, 2]`, x and y in pixels of the canvas, which may lie outside; None: the cells of a map.
    """

    number: int
    label: int
    score: float
    box: np.ndarray
    weights: np.ndarray
    places: np.ndarray | None = None

    def inside(self, canvas: tuple[int, int]) -> float:
        """The share of its attention, mean over heads, at places, or on cells whose centres, lie in its box."""
        places = self.places
        if places is None:
            y, x = ((np.arange(n) + 0.5) * side / n for n, side in zip(self.weights.shape[1:], canvas, strict=True))
            places = np.stack(np.meshgrid(x, y), axis=-1)
        within = ((places >= self.box[:2]) & (places < self.box[2:])).all(-1)
        return float((self.weights * within).sum() / len(self.weights))


def layers(model: DETR | DeformableDETR) -> list[str]:
    """Paths of the decoder's layers."""
    return [f"transformer/decoder/layers_{i}" for i in range(model.decoder_layers)]


def object_queries(task: Task, variables: dict, image: Image.Image, layer: str) -> tuple[dict, list[Query]]:
    """Every query, the most certain first.

    Args:
      task: of `dense.open_task`, of a DETR or Deformable DETR.
      layer: one of `layers`; what the queries say is always the last one's.

    Returns:
      The batch of one image, as `data.dense_pipeline` makes it, and the queries.
    """
    (rows,) = dense.rows_of(task.config, [image], ("",) * task.config.model.num_classes)
    run = _run_deformable if isinstance(task.model, DeformableDETR) else _run
    found = run(task.model, variables, task.prepare_eval(rows), layer)
    scores, boxes, weights, places = (None if of is None else np.asarray(of) for of in found)
    queries = [
        Query(
            number=int(i),
            label=int(scores[i].argmax()),
            score=float(scores[i].max()),
            box=boxes[i],
            weights=weights[i],
            places=None if places is None else places[i],
        )
        for i in np.argsort(-scores.max(-1), kind="stable")
    ]
    return rows, queries


@functools.partial(jax.jit, static_argnums=(0, 3))
def _run(model: DETR, variables: dict, view, layer: str):
    """Of one image: probabilities and boxes of the last layer, a layer's attention `[Q, heads, h, w]`, None."""
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
    weights = found["multihead_attn"]["attention"][0][0].swapaxes(0, 1)
    boxes = set_prediction.in_pixels(boxes[-1], view.sizes)
    return jax.nn.softmax(logits[-1, 0])[:, :-1], boxes[0], weights.reshape(*weights.shape[:2], h, w), None


@functools.partial(jax.jit, static_argnums=(0, 3))
def _run_deformable(model: DeformableDETR, variables: dict, view, layer: str):
    """As `_run`; weights `[Q, heads, L, P]` and where they are, `[Q, heads, L, P, 2]`."""
    predictions, state = model.apply(variables, view.images, view.sizes, method="predict", mutable="intermediates")
    found = state["intermediates"]
    for part in layer.split("/"):
        found = found[part]
    ((weights,), (locations,)) = (found["cross_attn"][name] for name in ("weights", "locations"))
    boxes = set_prediction.in_pixels(predictions.boxes[-1], view.sizes)
    places = locations * np.array(view.images.shape[2:0:-1])
    return jax.nn.sigmoid(predictions.logits[-1, 0]), boxes[0], weights[0], places[0]


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
        seen = _mark(canvas, query) if query.places is not None else chart.overlay(canvas, query.weights.mean(0))
        seen = Image.fromarray(seen)
        tiles.append(draw.objects(seen, query.box, [query.label], [caption]))
    under = ["image", *(f"query {query.number}: {caption}" for query, caption in zip(queries, captions, strict=True))]
    return sheet(title, np.stack([np.asarray(tile)[:height, :width] for tile in tiles]), under, columns=4)


def _mark(canvas: np.ndarray, query: Query) -> np.ndarray:
    """The canvas in grey with the places of a query: the brighter, the more its head looks there; larger if coarser."""
    page = Image.fromarray(canvas).convert("L").convert("RGB")
    drawing, radius = ImageDraw.Draw(page), max(page.size) / 300
    colours = chart.heat(query.weights.reshape(len(query.weights), -1)).reshape(-1, 3)
    levels = np.broadcast_to(np.arange(query.weights.shape[1])[:, None], query.weights.shape).ravel()
    for i in np.argsort(query.weights.ravel()):
        (x, y), reach = query.places.reshape(-1, 2)[i], radius * (1 + levels[i])
        drawing.ellipse((x - reach, y - reach, x + reach, y + reach), tuple(colours[i].tolist()))
    return np.asarray(page)


def as_dict(query: Query, canvas: tuple[int, int], names: Sequence[str]) -> dict:
    """For JSON: boxes in pixels of the image as the network sees it."""
    return {
        "query": query.number,
        "name": names[query.label],
        "score": query.score,
        "box": np.asarray(query.box, float).tolist(),
        "attention_inside": query.inside(canvas),
    }
