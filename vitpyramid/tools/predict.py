"""The most probable classes of images; of detectors and segmenters, what they find, drawn and written.

    python -m vitpyramid.tools.predict photo.jpg --checkpoint=weights/pvt_small
    python -m vitpyramid.tools.predict photos/ --checkpoint=https://.../pvt_small.pth --json > predictions.jsonl
    python -m vitpyramid.tools.predict photos/ --checkpoint=runs/mask --threshold=0.3 --out=found

Images are turned as their EXIF data say, resized, cut and normalised as the network's authors did for evaluation, or as
the run did whose work directory `--checkpoint` is. Predictions go to stdout; progress, and files that are no readable
images, to stderr. Exit codes: 0 all predicted; 1 none predicted, for the reason printed; 2 some could not be read.

Detectors and segmenters leave files beside each image, or in `--out`: NAME.predicted.png, the image with boxes, masks
or colours of classes on it; NAME.predicted.json, a list of COCO's results with the classes' names (boxes are x, y,
width, height in pixels of the image; ids of categories are those of the run's data, else COCO's, or count from 1); of
segmenters NAME.labels.png, whose levels are the classes, with a palette. Files of such names in folders are passed
over.
"""

import argparse
import concurrent.futures
import dataclasses
import functools
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import flax.linen as nn
import jax
import numpy as np
from tqdm import tqdm

from vitpyramid.data.augment import Size, height_width
from vitpyramid.data.folder import EXTENSIONS
from vitpyramid.heads.registry import DENSE, create_model
from vitpyramid.models.backbone import Variant
from vitpyramid.tasks.prepare import normalise
from vitpyramid.tools import arguments, dense
from vitpyramid.tools.arguments import add_images, add_weights, at_least, fraction
from vitpyramid.tools.classes import categories_of, names_in, names_of, saved_meta
from vitpyramid.tools.preprocess import evaluation_of, read_image
from vitpyramid.weights.pretrained import read_pretrained


@dataclasses.dataclass(frozen=True)
class Prediction:
    """What an image may show.

    Attributes:
      path: of its file.
      classes: indices of classes, the most probable first; none if the file could not be read.
      probabilities: theirs, out of the softmax over all classes.
      error: why the file could not be read, else empty.
    """

    path: Path
    classes: tuple[int, ...]
    probabilities: tuple[float, ...]
    error: str = ""


def predict(
    model: nn.Module,
    variables: dict,
    variant: Variant,
    paths: list[Path],
    size: Size | None = None,
    top: int = 5,
    batch: int = 16,
) -> Iterator[Prediction]:
    """Classifies the images in `paths`; predictions come in their order, those of a batch at once.

    Args:
      model, variables: as `load_pretrained` gives them.
      variant: how images are resized, cut and normalised, from `get_variant`.
      paths: files.
      size: side, or height and width, of the images that the network sees; None: the model's own.
      top: predictions of an image; all, if the model has fewer classes.
      batch: images that are classified together.

    Raises:
      ValueError: the model refuses images of this `size`.
    """
    height, width = height_width(size or model.image_size)
    variables = jax.device_put(variables)
    read = functools.partial(read_image, size=(height, width), variant=variant)
    before: tuple = ()
    with concurrent.futures.ThreadPoolExecutor() as pool:
        for start in range(0, len(paths), batch):
            chunk = paths[start : start + batch]
            images = np.zeros((min(batch, len(paths)), height, width, 3), np.uint8)  # of one shape: compiled once
            errors = [""] * len(chunk)
            for i, image in enumerate(pool.map(read, chunk)):
                if isinstance(image, str):
                    errors[i] = image
                else:
                    images[i] = image
            found = _probabilities(model, variant, variables, images)
            # Handed out after the next batch was read and sent, so that reading and computing overlap.
            yield from _predictions(*before)
            before = chunk, errors, found, top
    yield from _predictions(*before)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _probabilities(model: nn.Module, variant: Variant, variables: dict, images: jax.Array) -> jax.Array:
    """Of the classes, [B, K] in at least float32, for uint8 images [B, H, W, 3]."""
    logits = model.apply(variables, normalise(images, variant.mean, variant.std, model.dtype))
    return jax.nn.softmax(logits)


def _predictions(paths=(), errors=(), found=(), top=0) -> Iterator[Prediction]:
    for path, error, probabilities in zip(paths, errors, np.asarray(found), strict=False):  # fewer paths: padded
        if error:
            yield Prediction(path, (), (), error)
        else:
            classes = np.argsort(-probabilities, kind="stable")[:top]
            yield Prediction(path, tuple(classes.tolist()), tuple(probabilities[classes].tolist()))


def find_images(names: list[str]) -> tuple[list[Path], dict[Path, str]]:
    """Files, and those in folders that have an image's extension, sorted by name, at any depth.

    Names in folders that begin with a dot are left out, and pictures that this module made.

    Returns:
      The files, and why there are none, for each name that has none.
    """
    found, problems = [], {}
    for path in map(Path, names):
        if not path.is_dir():
            found.append(path)
            continue
        images = []
        for folder, folders, files in os.walk(path, onerror=lambda e: problems.update({Path(e.filename): e.strerror})):
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            images += [Path(folder, name) for name in sorted(files) if _is_image(name)]
        if not images:
            problems.setdefault(path, "no images in this folder")
        found += images
    return found, problems


def _is_image(name: str) -> bool:
    hidden = name.startswith(".") or name.endswith((dense.PICTURE, dense.LABELS))
    return not hidden and os.fsencode(os.path.splitext(name)[1].lower()) in EXTENSIONS


def describe(prediction: Prediction, names: list[str]) -> str:
    """A prediction as lines of text."""
    pairs = zip(prediction.classes, prediction.probabilities, strict=True)
    return "\n".join([str(prediction.path), *(f"{probability:8.2%}  {names[k]}" for k, probability in pairs)])


def as_json(prediction: Prediction, names: list[str]) -> str:
    """A prediction as a line: `{"path": "a.png", "top": [{"class": 0, "name": "tench", "probability": 0.9}, ...]}`."""
    pairs = zip(prediction.classes, prediction.probabilities, strict=True)
    top = [{"class": k, "name": names[k], "probability": probability} for k, probability in pairs]
    return json.dumps({"path": str(prediction.path), "top": top})


def run(args: argparse.Namespace) -> int:
    """The command, after its arguments were parsed; returns the exit code.

    Raises:
      ValueError, OSError: weights, names of classes, size or folder that cannot be used.
    """
    sys.stdout.reconfigure(errors="backslashreplace")  # names of files need not be UTF-8
    paths, problems = find_images(args.images)
    for path, problem in problems.items():
        print(f"skipped {path}: {problem}", file=sys.stderr)
    if not paths:
        return 1
    network, variables = read_pretrained(args.checkpoint, args.model, backbone=args.backbone)
    name, count = network["name"], network["num_classes"]
    names = names_in(args.classes, count) if args.classes else names_of(args.checkpoint, count, name)
    act = _find if name in DENSE else _classify
    skipped = 0
    with tqdm(total=len(paths), unit=" images", disable=len(paths) == 1) as bar:
        # bar.write() draws the bar anew each time, which only a terminal that shows both needs.
        show = functools.partial(bar.write, file=sys.stdout) if sys.stdout.isatty() else print
        for path, error, text in act(args, network, variables, paths, names):
            if error:
                skipped += 1
                bar.write(f"skipped {path}: {error}", file=sys.stderr)
            else:
                show(text)
            bar.update()
    if skipped == len(paths):
        return 1
    return 2 if skipped or problems else 0


# Of each image its path, why it cannot be read if so, and what to print.
Lines = Iterator[tuple[Path, str, str]]


def _classify(args: argparse.Namespace, network: dict, variables: dict, paths: list[Path], names: list[str]) -> Lines:
    if args.out or args.threshold is not None:
        raise ValueError(f"--out, --threshold: expected with detectors and segmenters, {network['name']} is none")
    model, variant = create_model(**network), evaluation_of(args.checkpoint, network["name"])
    size = height_width(args.size or model.image_size)
    facts = f"{model.num_classes} classes, images of {size[0]} x {size[1]}, crop {variant.crop:g}"
    print(f"{network['name']}, {facts}, {variant.interpolation}", file=sys.stderr)
    text = as_json if args.json else describe
    for found in predict(model, variables, variant, paths, size, args.top, args.batch or 16):
        yield found.path, found.error, "" if found.error else text(found, names)


def _find(args: argparse.Namespace, network: dict, variables: dict, paths: list[Path], names: list[str]) -> Lines:
    task = dense.open_task(args.checkpoint, network, args.size)
    dense.make_room(paths, args.out)
    data = task.config.data
    facts = f"{len(names)} classes, images of up to {data.eval_short_side} x {data.long_side}, {data.interpolation}"
    print(f"{network['name']}, {facts}", file=sys.stderr)
    threshold = 0.5 if args.threshold is None else args.threshold
    categories = categories_of(names, saved_meta(args.checkpoint))
    for seen in dense.look(task, variables, paths, categories, threshold, args.batch or 1):
        if not seen.error:
            dense.write(seen, names, args.out)
        text = json.dumps(dense.as_dict(seen, names)) if args.json else dense.describe(seen, names)
        yield seen.path, seen.error, text


def main(argv: list[str] | None = None) -> int:
    """The command; returns the exit code."""
    parser = argparse.ArgumentParser("python -m vitpyramid.tools.predict", description=__doc__.splitlines()[0])
    add_images(parser)
    add_weights(parser)
    parser.add_argument("--backbone", help="under the heads of --model, if another than their own")
    parser.add_argument("--top", type=at_least(1), default=5, help="classes of an image; default: 5")
    parser.add_argument("--threshold", type=fraction, help="least score of what a detector finds; default: 0.5")
    parser.add_argument("--out", type=Path, help="folder of what is found; default: beside the images")
    parser.add_argument(
        "--batch", type=at_least(1), help="images at a time; default: 16, of what finds boxes or maps 1"
    )
    parser.add_argument(
        "--classes",
        type=Path,
        help="file with the names of the classes, one a line; default: as the run's data have them",
    )
    parser.add_argument("--json", action="store_true", help="one line of JSON an image")
    return arguments.run(parser, argv, run)


if __name__ == "__main__":
    sys.exit(main())
