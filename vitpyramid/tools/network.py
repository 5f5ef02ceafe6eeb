"""A network with its weights, and the images that it is looked at with: what several tools begin with."""

import dataclasses
import functools
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

import jax
import numpy as np

from vitpyramid.data.augment import Size, height_width
from vitpyramid.heads.registry import create_model
from vitpyramid.models.backbone import Backbone, Variant
from vitpyramid.tasks.prepare import normalise
from vitpyramid.tools.predict import find_images
from vitpyramid.tools.preprocess import evaluation_of, read_image
from vitpyramid.weights.pretrained import read_pretrained

Image = TypeVar("Image")


@dataclasses.dataclass(frozen=True)
class Network:
    """A network as it is evaluated.

    Attributes:
      name: as `create_model` has it.
      model, variables: as `load_pretrained` gives them.
      variant: how images are cut, resized and normalised.
      size: (height, width) of the images that it sees.
    """

    name: str
    model: Backbone
    variables: dict
    variant: Variant
    size: tuple[int, int]

    def inputs(self, pixels: np.ndarray) -> jax.Array:
        """Normalised `[B, H, W, 3]` in the model's dtype of pixels 0..255."""
        return normalise(pixels, self.variant.mean, self.variant.std, self.model.dtype)


def open_network(checkpoint: str, name: str | None = None, size: Size | None = None) -> Network:
    """Reads weights from wherever `load_pretrained` does, and how the run they are of cut its images.

    Args:
      name: of the network; None: recognised by the weights.
      size: side, or height and width, of the images; None: the model's own.

    Raises:
      ValueError, OSError: as `load_pretrained`; no classifier.
    """
    return classifier(checkpoint, *read_pretrained(checkpoint, name), size)


def classifier(checkpoint: str, network: Mapping, variables: dict, size: Size | None = None) -> Network:
    """As `open_network`, of what was read from `checkpoint`."""
    name, model = network["name"], create_model(**network)
    variant = evaluation_of(checkpoint, name)
    return Network(name, model, jax.device_put(variables), variant, height_width(size or model.image_size))


def read_images(network: Network, names: list[str]) -> tuple[list[Path], np.ndarray]:
    """The images of files and folders that can be read, uint8 `[N, H, W, 3]`; others are named on stderr.

    Raises:
      ValueError: none can be read.
    """
    images = read_each(names, functools.partial(read_image, size=network.size, variant=network.variant))
    return list(images), np.stack(list(images.values()))


def read_each(names: list[str], read: Callable[[Path], Image | str]) -> dict[Path, Image]:
    """What `read` makes of the images of files and folders, by path; those of which it says why not go to stderr.

    Raises:
      ValueError: none can be read.
    """
    paths, problems = find_images(names)
    images = {path: read(path) for path in paths}
    problems |= {path: found for path, found in images.items() if isinstance(found, str)}
    for path, problem in problems.items():
        print(f"skipped {path}: {problem}", file=sys.stderr)
    readable = {path: image for path, image in images.items() if path not in problems}
    if not readable:
        raise ValueError(f"{', '.join(names)}: no image could be read")
    return readable
