"""A picture of what the network receives: training images augmented, mixed and erased, and evaluation images.

    python -m vitpyramid.tools.preview --config=configs/quickstart.py --out=preview.png --count=16
    python -m vitpyramid.tools.preview --config=configs/quickstart.py:mask --count=8

Below each image its class; where images are mixed, each class with its weight. Of detection and segmentation the boxes,
masks or label maps that are learned, as augmented and on the canvas; what the network sees beyond the image has the
colour that is zero to it.
"""

import argparse
import math
from pathlib import Path

import jax
import numpy as np
from ml_collections import ConfigDict
from PIL import Image, ImageDraw

from vitpyramid.models.registry import get_variant
from vitpyramid.tasks import Task, make_task
from vitpyramid.tasks.dense import View, backbone_name
from vitpyramid.tasks.options import channel_statistics
from vitpyramid.tools import config_args, draw
from vitpyramid.tools.classes import saved_names
from vitpyramid.tools.draw import printable
from vitpyramid.train.rng import named_key

PARTS = (("training", "train"), ("evaluation", "eval"))

_CANVAS = 256, 512  # at least the shorter, at most the longer side of a canvas on the sheet
_TILE = 128  # smallest side of an image on the sheet; smaller ones are enlarged by a whole factor
_LINE = 14  # height of a line of text
_GAP = 4


def preview(config: ConfigDict, count: int) -> Image.Image:
    """A sheet of the first `count` training images of a run of `config`, above as many of evaluation.

    They are augmented as in the run, but mixed among themselves.

    Raises:
      ConfigError: the config does not fit the data.
    """
    task = small_task(config, count)
    train, held_out = (f"{part}: {config.data.name}, {config.data[f'{split}_split']}" for part, split in PARTS)
    return stack([sheet(train, *training_images(task)), sheet(held_out, *evaluation_images(task))])


def small_task(config: ConfigDict, count: int) -> Task:
    """The task of a config with batches of `count`, and label weights as they were mixed."""
    config = config.copy_and_resolve_references()
    config.batch_size = config.eval.batch_size = count
    config.data.workers, config.mix.groups = 0, 1
    config.loss.label_smoothing = 0.0
    config.model.dtype = "float32"
    return make_task(config)


def training_images(task: Task) -> tuple[np.ndarray, list[str]]:
    """The first training batch as the first step prepares it, back in pixels (uint8), and captions."""
    batches = task.train_batches(0)
    batch = next(batches)
    batches.close()
    key = jax.random.fold_in(named_key(task.config.seed, "mix"), 0)
    x, targets = jax.device_get(jax.jit(task.prepare)(key, batch, {}))
    names = saved_names({"about": task.about()})
    if task.config.task != "classify":
        return _taught(x, _pixels(x.images, task.config, backbone_name(task.config)), names)
    return _pixels(x, task.config, task.config.model.name), [caption(target, names) for target in targets["mixed"]]


def _pixels(images: np.ndarray, config: ConfigDict, backbone: str) -> np.ndarray:
    """Normalised images back in pixels, uint8 in the order red, green, blue."""
    mean, std = (np.asarray(values) for values in channel_statistics(config, get_variant(backbone)))
    pixels = np.rint(255 * (images * std + mean)).clip(0, 255).astype(np.uint8)
    return pixels[..., ::-1] if config.data.channels == "bgr" else pixels


def _taught(view: View, pixels: np.ndarray, names: list[str]) -> tuple[np.ndarray, list[str]]:
    """Canvases with what is learned of them drawn on, and captions: the names of it."""
    tiles, captions = [], []
    for i, image in enumerate(map(Image.fromarray, pixels)):
        image, factor = draw.scaled(image, *_CANVAS)
        if hasattr(view.targets, "boxes"):
            there = np.flatnonzero(view.targets.valid[i])
            labels, boxes = view.targets.labels[i, there], view.targets.boxes[i, there]
            masks = ()
            if view.targets.masks is not None:
                packed = np.asarray(view.targets.masks[i, there])
                masks = np.unpackbits(packed, axis=-1, count=pixels.shape[2]).astype(bool)
            tiles.append(draw.objects(image, boxes, labels, [names[label] for label in labels], masks, factor))
        else:
            labels = np.setdiff1d(view.targets[i], draw.IGNORED)
            tiles.append(draw.label_map_on(image, view.targets[i].astype(np.uint8)))
        captions.append(", ".join(names[label] for label in labels))
    return np.stack(tiles), captions


def evaluation_images(task: Task) -> tuple[np.ndarray, list[str]]:
    """The first evaluation batch, without padding, and captions."""
    batches = iter(task.eval_batches())
    batch = next(batches)
    batches.close()
    batch = {name: rows[batch["mask"]] for name, rows in batch.items()}
    if task.config.task != "classify":
        pixels = _pixels(jax.device_get(task.prepare_eval(batch).images), task.config, backbone_name(task.config))
        tiles = [np.asarray(draw.scaled(Image.fromarray(image), *_CANVAS)[0]) for image in pixels]
        sides = np.concatenate([batch["size"], batch["original_size"]], axis=1).tolist()
        return np.stack(tiles), ["{} x {} of {} x {}".format(*row) for row in sides]
    names = saved_names({"about": task.about()})
    return batch["image"], [names[label] for label in batch["label"]]


def caption(target: np.ndarray, names: list[str]) -> str:
    """The classes of a distribution [K], the heaviest first: "cat", or "cat 0.61, dog 0.39"."""
    labels = [label for label in np.argsort(-target, kind="stable")[:2] if target[label] > 0]
    return names[labels[0]] if len(labels) == 1 else ", ".join(f"{names[k]} {target[k]:.2f}" for k in labels)


def sheet(title: str, images: np.ndarray, captions: list[str], columns: int = 0) -> Image.Image:
    """Images, uint8 [N, H, W, 3], in rows below a title, each above its caption; 0 columns: about a square."""
    height, width = images.shape[1:3]
    factor = max(1, math.ceil(_TILE / min(height, width)))
    tile_width, tile_height = width * factor + _GAP, height * factor + _LINE + _GAP
    columns = min(len(images), columns or math.ceil(math.sqrt(len(images) * tile_height / tile_width)))
    rows = math.ceil(len(images) / columns)
    page = Image.new("RGB", (columns * tile_width + _GAP, rows * tile_height + _LINE + 2 * _GAP), "white")
    draw = ImageDraw.Draw(page)
    draw.text((_GAP, _GAP), title, "black")
    for i, (image, caption) in enumerate(zip(images, captions, strict=True)):
        left, top = _GAP + i % columns * tile_width, _LINE + 2 * _GAP + i // columns * tile_height
        enlarged = Image.fromarray(image).resize((width * factor, height * factor), Image.Resampling.NEAREST)
        page.paste(enlarged, (left, top))
        draw.text((left, top + height * factor), _fitting(caption, width * factor, draw), "black")
    return page


def _fitting(text: str, width: int, draw: ImageDraw.ImageDraw) -> str:
    """As much of a text's beginning as has room."""
    text = printable(text)
    while text and draw.textlength(text) > width:
        text = text[:-1]
    return text


def stack(pages: list[Image.Image]) -> Image.Image:
    """Pages below one another."""
    whole = Image.new("RGB", (max(page.width for page in pages), sum(page.height for page in pages)), "white")
    top = 0
    for page in pages:
        whole.paste(page, (0, top))
        top += page.height
    return whole


def main(argv: list[str] | None = None) -> None:
    """The command. Exits with 2 where the arguments make no sense."""
    parser = argparse.ArgumentParser(
        "vitpyramid.tools.preview",
        description=__doc__.splitlines()[0],
        usage=f"%(prog)s {config_args.USAGE} [--out=FILE.png] [--count=N]",
        allow_abbrev=False,
    )
    parser.add_argument("--out", type=Path, default=Path("preview.png"), help="the picture, a PNG")
    parser.add_argument("--count", type=int, default=16, help="images of each half")
    args, config = config_args.parse(parser, argv)
    if args.count < 1:
        parser.error(f"--count={args.count}: expected 1 or more")
    if not args.out.parent.is_dir():
        parser.error(f"--out={args.out}: there is no folder {args.out.parent}")
    try:
        page = preview(config, args.count)
    except ValueError as error:
        parser.error(str(error))
    page.save(args.out, "png")
    print(f"{args.out}: {page.width} x {page.height} pixels, {args.count} images of training and of evaluation")


if __name__ == "__main__":
    main()
