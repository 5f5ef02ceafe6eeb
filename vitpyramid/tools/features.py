"""The pyramid of a network as a picture: what each level keeps of an image.

    python -m vitpyramid.tools.features photo.jpg --checkpoint=weights/pvt_small --out=features.png

A row for each level. First its principal components as colours: cells of one colour hold about the same features. Then
the channels that vary most over the image. The numbers, means over all images, are written to the same name with
`.json`; the picture is of the first image.
"""

import argparse
import functools
import json
import sys
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image
from tqdm import tqdm

from vitpyramid.models.backbone import Backbone, Level
from vitpyramid.tools import chart
from vitpyramid.tools.arguments import add_images, add_picture, add_weights, at_least, run
from vitpyramid.tools.network import Network, open_network, read_images
from vitpyramid.tools.preview import sheet


@functools.partial(jax.jit, static_argnums=0)
def pyramid(model: Backbone, variables: dict, images: jax.Array) -> tuple[Level, ...]:
    """The levels of normalised images `[B, H, W, 3]`, finest first, at least float32."""
    levels = model.apply(variables, images, method="features")
    return tuple(Level(level.x.astype(jnp.promote_types(level.x.dtype, jnp.float32)), level.stride) for level in levels)


def features(network: Network, images: np.ndarray) -> list[dict]:
    """Every level in numbers.

    Args:
      images: uint8 `[N, H, W, 3]`, run one by one.

    Returns:
      Of each level, finest first: `stride`, `height`, `width`, `channels`; `mean` and `std` over all numbers; `silent`,
      channels that are zero everywhere; `largest`, the root mean square of the largest channel in those of the median
      one. The T2T-ViT paper (figure 2) finds both kinds of channel in ViT: zero, and far too large.
    """
    sums: list[list[np.ndarray]] = []
    levels: tuple[Level, ...] = ()
    for image in tqdm(images, unit=" images", disable=len(images) == 1):
        levels = pyramid(network.model, network.variables, network.inputs(image[None]))
        values = [np.asarray(level.x[0], np.float64) for level in levels]
        sums.append([np.stack([x.mean((0, 1)), np.square(x).mean((0, 1))]) for x in values])
    found = []
    for level, moments in zip(levels, zip(*sums, strict=True), strict=True):
        mean, square = np.mean(moments, axis=0)  # [C] each
        typical = np.sqrt(np.median(square))
        found.append(
            {
                "stride": level.stride,
                "height": level.x.shape[1],
                "width": level.x.shape[2],
                "channels": len(mean),
                "mean": mean.mean(),
                "std": np.sqrt(square.mean() - mean.mean() ** 2),
                "silent": int((square == 0).sum()),
                "largest": np.sqrt(square.max()) / typical if typical else None,
            }
        )
    return found


def colours(x: np.ndarray) -> np.ndarray:
    """The first three principal components of a map `[h, w, C]`, C >= 3, as red, green and blue: uint8 `[h, w, 3]`.

    Each is stretched to its own range. A component's sign is chosen so that its largest entry is positive; without that
    the same features might come in other colours.
    """
    tokens = np.float64(x).reshape(-1, x.shape[-1])
    tokens = tokens - tokens.mean(0)
    _, directions = np.linalg.eigh(tokens.T @ tokens)  # in rising order of variance
    directions = directions[:, :-4:-1]
    directions = directions * np.sign(directions[np.abs(directions).argmax(0), range(3)])
    parts = tokens @ directions
    parts = (parts - parts.min(0)) / np.maximum(np.ptp(parts, axis=0), 1e-30)
    return np.rint(255 * parts).astype(np.uint8).reshape(*x.shape[:2], 3)


def pyramid_picture(title: str, image: np.ndarray, levels: Sequence[Level], channels: int = 4) -> Image.Image:
    """The image, uint8 `[H, W, 3]`, and for each level of a batch's first image components and `channels` channels."""
    height, width = image.shape[:2]

    def enlarged(tile: np.ndarray) -> np.ndarray:
        return np.asarray(Image.fromarray(tile).resize((width, height), Image.Resampling.NEAREST))

    tiles, captions = [], []
    for level in levels:
        x = np.asarray(level.x[0], np.float64)
        tiles += [image, enlarged(colours(x))]
        captions += ["image", f"stride {level.stride}: {x.shape[0]} x {x.shape[1]} x {x.shape[2]}"]
        for channel in np.argsort(-x.var((0, 1)), kind="stable")[:channels]:
            tiles.append(enlarged(chart.heat(x[..., channel])))
            captions.append(f"channel {channel}")
    return sheet(title, np.stack(tiles), captions, columns=2 + channels)


def command(args: argparse.Namespace) -> None:
    """The command, after its arguments were parsed."""
    network = open_network(args.checkpoint, args.model, args.size)
    paths, images = read_images(network, args.images)
    found = features(network, images)
    levels = pyramid(network.model, network.variables, network.inputs(images[:1]))
    page = pyramid_picture(f"{network.name}, {paths[0].name}", images[0], levels, args.channels)
    page.save(args.out, "png")
    report = {"model": network.name, "images": [str(path) for path in paths], "levels": found}
    args.out.with_suffix(".json").write_text(json.dumps(report, indent=1))
    for level in found:
        grid = f"{level['height']} x {level['width']} x {level['channels']}"
        print(
            f"stride {level['stride']:<3} {grid:<16} std {level['std']:.3g}, {level['silent']} silent channels", end=""
        )
        print(f", the largest {level['largest']:.3g} times the median" if level["largest"] else "")
    print(f"{args.out}: {page.width} x {page.height} pixels; numbers of {len(images)} images in {args.out.stem}.json")


def main(argv: list[str] | None = None) -> int:
    """The command; returns the exit code."""
    parser = argparse.ArgumentParser("python -m vitpyramid.tools.features", description=__doc__.splitlines()[0])
    add_images(parser)
    add_weights(parser)
    add_picture(parser, "features.png")
    parser.add_argument("--channels", type=at_least(1), default=4, help="channels of each level shown; default: 4")
    return run(parser, argv, command)


if __name__ == "__main__":
    sys.exit(main())
