"""What a network attends to: its attention maps over an image, and their entropy and distance by layer.

    python -m vitpyramid.tools.attention photo.jpg --checkpoint=weights/pvt_small --out=attention.png
    python -m vitpyramid.tools.attention photos/ --checkpoint=weights/pit_s --layer=transformers_2/blocks_3
    python -m vitpyramid.tools.attention photo.jpg --checkpoint=weights/rest_small --point=0.3,0.6
    python -m vitpyramid.tools.attention photo.jpg --checkpoint=runs/detr

The picture has a tile for each layer: where its class token looks, or where there is none the token at `--point`,
averaged over heads; last the rollout of all layers. `--layer` shows the heads of one layer instead. Below, entropy and
distance by layer, means over heads. The picture is of the first image; the numbers are means over all of them, and
are written to the same name with `.json`. `vitpyramid.evals.attention` has the definitions.

Of DETR there is a tile for each of the most certain object queries: where it looks, mean over the heads of the last
layer of the decoder or of `--layer`, with the box that it gives. The numbers are of every query. Of Deformable DETR
these are the places that its heads look at, the more the brighter, larger in coarser levels.
"""

import argparse
import json
import math
import sys
from collections.abc import Sequence

import jax
import numpy as np
from PIL import Image
from tqdm import tqdm

from vitpyramid.evals.attention import AttentionMap, attention_maps, query_map, rollout, statistics
from vitpyramid.heads.deformable_detr import DeformableDETR
from vitpyramid.heads.detr import DETR
from vitpyramid.heads.registry import DENSE
from vitpyramid.tools import chart, dense, queries
from vitpyramid.tools.arguments import add_images, add_picture, add_weights, run
from vitpyramid.tools.classes import names_of
from vitpyramid.tools.network import Network, classifier, read_each, read_images
from vitpyramid.tools.preprocess import open_image
from vitpyramid.tools.preview import sheet, stack
from vitpyramid.weights.pretrained import read_pretrained


def attention(network: Network, images: np.ndarray) -> list[dict]:
    """Every layer's attention in numbers, means over images.

    Args:
      images: uint8 `[N, H, W, 3]`; they are run one by one, for maps are large.

    Returns:
      Of each layer, as they are computed: `path`, `kind`, `stage`, `heads`, `grid`, `key_grid`, `class_tokens`, and a
      number a head: `entropy` (nats), `distance` (sides of the image). `entropy_limit` is that of even attention.

    Raises:
      ValueError: the network has no attention, or refuses the images.
    """
    maps = attention_maps.eval_shape(network.model, network.variables, network.inputs(images[:1]))
    if not maps:
        raise ValueError(f"{network.name} has no attention")
    found = []
    for image in tqdm(images, unit=" images", disable=len(images) == 1):
        numbers = statistics(network.model, network.variables, network.inputs(image[None]))
        found.append(jax.tree.map(lambda value: np.asarray(value[0], np.float64), numbers))
    means = jax.tree.map(lambda *values: np.mean(values, axis=0).tolist(), *found)
    return [
        {
            "path": layer.path,
            "kind": layer.kind,
            "stage": layer.stage,
            "heads": layer.weights.shape[1],
            "grid": list(layer.grid),
            "key_grid": list(layer.key_grid),
            "class_tokens": layer.extra,
            "entropy": entropies,
            "entropy_limit": math.log(math.prod(layer.key_grid)),
            "distance": distances,
        }
        for layer, (entropies, distances) in zip(maps, means, strict=True)
    ]


def maps_picture(
    title: str, image: np.ndarray, maps: Sequence[AttentionMap], point: tuple[float, float] | None = None
) -> Image.Image:
    """The image, uint8 `[H, W, 3]`, under the attention of each layer, means over heads, and under their rollout."""
    tiles = [mark(image, point or (0.5, 0.5)) if point or not all(found.extra for found in maps) else image]
    captions = ["image"]
    for found in maps:
        tiles.append(chart.overlay(image, np.asarray(query_map(found, point)[0].mean(0))))
        captions.append(f"{len(captions)}: {stage_name(found.stage)}, {found.kind}")
    tiles.append(chart.overlay(image, np.asarray(rollout(tuple(maps))[0])))
    return sheet(title, np.stack(tiles), [*captions, "rollout"], columns=6)


def heads_picture(
    title: str, image: np.ndarray, found: AttentionMap, point: tuple[float, float] | None = None
) -> Image.Image:
    """The image, uint8 `[H, W, 3]`, under the attention of each head of a layer."""
    heads = np.asarray(query_map(found, point)[0])
    tiles = [image if found.extra and point is None else mark(image, point or (0.5, 0.5))]
    tiles += [chart.overlay(image, head) for head in heads]
    return sheet(title, np.stack(tiles), ["image", *(f"head {i}" for i in range(len(heads)))])


def mark(image: np.ndarray, point: tuple[float, float]) -> np.ndarray:
    """The image with a square at `(y, x)`, in sides of the image."""
    marked = image.copy()
    radius = max(1, min(image.shape[:2]) // 40)
    y, x = (min(int(p * side), side - 1) for p, side in zip(point, image.shape, strict=False))
    for reach, colour in ((radius + 1, (255, 255, 255)), (radius, (220, 30, 30))):
        marked[max(y - reach, 0) : y + reach + 1, max(x - reach, 0) : x + reach + 1] = colour
    return marked


def layers_chart(name: str, layers: list[dict]) -> Image.Image:
    """Entropy and distance by layer: the mean over heads, and where another stage begins a line of its own.

    Args:
      name: of the network, in the titles.
      layers: as `attention` gives them.
    """
    charts = []
    for key, unit in (("entropy", "nats"), ("distance", "image sides")):
        series: dict[str, list] = {}
        for number, layer in enumerate(layers, start=1):
            series.setdefault(stage_name(layer["stage"]), []).append((number, float(np.mean(layer[key]))))
        charts.append(chart.lines(f"{name}: {key} of attention, {unit}", series, "layer"))
    return chart.beside(charts)


def stage_name(stage: int) -> str:
    """As pictures have it."""
    return f"stage {stage}" if stage else "tokens-to-token"


def queries_command(args: argparse.Namespace, described: dict, variables: dict) -> None:
    """The command for DETR and Deformable DETR, whose object queries are drawn."""
    task = dense.open_task(args.checkpoint, described, args.size)
    if not isinstance(task.model, DETR | DeformableDETR):
        raise ValueError(f"{described['name']}: expected a classifier or a DETR")
    known = queries.layers(task.model)
    layer = args.layer or known[-1]
    if layer not in known or args.point:
        raise ValueError(f"--layer={layer}, --point={args.point}: expected one of {', '.join(known)}, and no point")
    names = names_of(args.checkpoint, described["num_classes"], described["name"])
    report = []
    for path, image in read_each(args.images, open_image).items():
        rows, found = queries.object_queries(task, variables, image, layer)
        canvas = rows["image"].shape[1:3]
        if not report:
            title = f"{described['name']}, {path.name}, {layer}"
            page = queries.picture(title, rows["image"][0], rows["size"][0], found, names)
        listed = [queries.as_dict(query, canvas, names) for query in found]
        report.append({"image": str(path), "size": rows["size"][0].tolist(), "queries": listed})
    page.save(args.out, "png")
    whole = {"model": described["name"], "layer": layer, "images": report}
    args.out.with_suffix(".json").write_text(json.dumps(whole, indent=1))
    print(f"{args.out}: {page.width} x {page.height} pixels; queries of {len(report)} images in {args.out.stem}.json")


def command(args: argparse.Namespace) -> None:
    """The command, after its arguments were parsed."""
    described, variables = read_pretrained(args.checkpoint, args.model)
    if described["name"] in DENSE:
        return queries_command(args, described, variables)
    network = classifier(args.checkpoint, described, variables, args.size)
    paths, images = read_images(network, args.images)
    layers = attention(network, images)
    maps = attention_maps(network.model, network.variables, network.inputs(images[:1]))
    title = f"{network.name}, {paths[0].name}"
    if args.layer:
        known = {found.path.removesuffix("/attn"): found for found in maps}
        if args.layer not in known:
            raise ValueError(f"--layer={args.layer}: expected one of {', '.join(known)}")
        page = heads_picture(f"{title}, {args.layer}", images[0], known[args.layer], args.point)
    else:
        page = maps_picture(title, images[0], maps, args.point)
    page = stack([page, layers_chart(network.name, layers)])
    page.save(args.out, "png")
    report = {"model": network.name, "images": [str(path) for path in paths], "layers": layers}
    args.out.with_suffix(".json").write_text(json.dumps(report, indent=1))
    for layer in layers:
        entropy, distance = np.mean(layer["entropy"]), np.mean(layer["distance"])
        print(f"{layer['path']:<32} {layer['kind']:<8} entropy {entropy:.3f} of {layer['entropy_limit']:.3f}", end="  ")
        print(f"distance {distance:.3f}")
    print(f"{args.out}: {page.width} x {page.height} pixels; numbers of {len(images)} images in {args.out.stem}.json")


def place(text: str) -> tuple[float, float]:
    """A type for `argparse`: `Y,X` in sides of the image."""
    try:
        y, x = (float(part) for part in text.split(","))
        if not (0 <= y <= 1 and 0 <= x <= 1):
            raise ValueError
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r}: expected Y,X between 0 and 1, such as 0.5,0.5") from error
    return y, x


def main(argv: list[str] | None = None) -> int:
    """The command; returns the exit code."""
    parser = argparse.ArgumentParser("python -m vitpyramid.tools.attention", description=__doc__.splitlines()[0])
    add_images(parser)
    add_weights(parser)
    add_picture(parser, "attention.png")
    parser.add_argument("--point", type=place, help="Y,X of the token whose attention is shown, between 0 and 1")
    parser.add_argument("--layer", help="show the heads of this one")
    return run(parser, argv, command)


if __name__ == "__main__":
    sys.exit(main())
