"""The Background Challenge: accuracy where each foreground meets the background that is worst for the network.

    python -m vitpyramid.tools.backgrounds bg_challenge --groups=in_to_in9.json --checkpoint=weights/pit_s

`bg_challenge` is the folder that its authors publish (github.com/MadryLab/backgrounds_challenge):
`fg_mask/val/GROUP/NAME.npy` cuts a foreground out of `original/val/GROUP/NAME.JPEG`, and every image of `only_bg_t/val`
is a background, those of its own group too. A foreground counts as right if the network names its group on all of them.
Images are not resized. The numbers go to `--out`.
"""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from vitpyramid.data.augment import decode
from vitpyramid.evals import imagenet
from vitpyramid.tools.arguments import at_least, run
from vitpyramid.tools.network import open_network


def open_challenge(folder: Path) -> tuple[list[tuple[Path, Path, int]], list[Path]]:
    """Files of the challenge: of each foreground its mask, its image and its group; and the backgrounds.

    Raises:
      ValueError: one of the three folders, or an image of a mask, is not there.
      OSError: a folder cannot be read.
    """
    masks, originals, behind = (folder / part / "val" for part in ("fg_mask", "original", "only_bg_t"))
    if missing := [str(part) for part in (masks, originals, behind) if not part.is_dir()]:
        raise ValueError(
            f"{', '.join(missing)}: not there; expected the folder of the Background Challenge in {folder}"
        )
    groups = sorted(group.name for group in masks.iterdir() if group.is_dir())
    foregrounds = [
        (mask, originals / name / f"{mask.stem}.JPEG", number)
        for number, name in enumerate(groups)
        for mask in sorted((masks / name).glob("*.npy"))
    ]
    backgrounds = sorted(file for file in behind.rglob("*") if file.suffix.lower() in (".jpeg", ".jpg", ".png"))
    if not foregrounds or not backgrounds:
        raise ValueError(f"{folder}: expected masks in fg_mask/val and images in only_bg_t/val")
    if missing := [str(image) for _, image, _ in foregrounds if not image.is_file()]:
        raise ValueError(f"{', '.join(missing[:3])}: not there, of {len(missing)} masks")
    return foregrounds, backgrounds


def worst_backgrounds(
    predict: Callable[[np.ndarray], jax.Array],
    foregrounds: Sequence[tuple[Callable[[], tuple[np.ndarray, np.ndarray]], int]],
    backgrounds: np.ndarray,
    batch: int = 64,
) -> np.ndarray:
    """Whether each foreground is recognised on every background, bool `[N]`.

    Backgrounds that deceived before are tried first, which changes how long it takes and nothing else.

    Args:
      predict: of uint8 images `[batch, H, W, 3]`, the group of each.
      foregrounds: of each what reads its pixels, uint8 `[H, W, 3]`, and its mask, bool `[H, W]`; and its group.
      backgrounds: uint8 `[M, H, W, 3]`.
    """
    size = min(batch, len(backgrounds))
    starts = [min(start, len(backgrounds) - size) for start in range(0, len(backgrounds), size)]
    right = np.ones(len(foregrounds), bool)
    for number, (read, group) in enumerate(tqdm(foregrounds, unit=" foregrounds")):
        pixels, mask = read()
        for place, start in enumerate(starts):
            images = np.where(mask[..., None], pixels, backgrounds[start : start + size])
            if (np.asarray(predict(images)) != group).any():
                right[number] = False
                starts.insert(0, starts.pop(place))
                break
    return right


def read_mask(path: Path, shape: tuple[int, int]) -> np.ndarray:
    """A foreground's mask, bool `[H, W]`. Raises `ValueError` if it is none of that shape."""
    mask = np.load(path, allow_pickle=False)
    if mask.shape != shape:
        raise ValueError(f"{path}: a mask of {mask.shape}, expected {shape} as its image has")
    return mask != 0


def command(args: argparse.Namespace) -> None:
    """The command, after its arguments were parsed."""
    foregrounds, behind = open_challenge(args.folder)
    width, height = decode(behind[0].read_bytes()).size

    def pixels(file: Path) -> np.ndarray:
        image = decode(file.read_bytes())
        if image.size != (width, height):
            raise ValueError(f"{file}: expected {height} x {width} pixels, as {behind[0]} has")
        return np.asarray(image)

    backgrounds = np.stack([pixels(file) for file in tqdm(behind, unit=" backgrounds")])
    network = open_network(args.checkpoint, args.model, (height, width))
    classes = network.model.num_classes
    groups = imagenet.read_groups(args.groups, classes) if args.groups else np.arange(classes)

    @jax.jit
    def predict(variables: dict, images: jax.Array) -> jax.Array:
        logits = network.model.apply(variables, network.inputs(images))
        return jnp.asarray(groups)[jnp.argmax(logits, axis=-1)]

    cut = [
        (lambda mask=mask, image=image: (pixels(image), read_mask(mask, (height, width))), group)
        for mask, image, group in foregrounds
    ]
    right = worst_backgrounds(lambda images: predict(network.variables, images), cut, backgrounds, args.batch)
    wrong = [str(image) for (_, image, _), good in zip(foregrounds, right, strict=True) if not good]
    report = {
        "model": network.name,
        "accuracy": 100 * float(right.mean()),
        "foregrounds": len(foregrounds),
        "backgrounds": len(behind),
        "deceived": wrong,
    }
    args.out.write_text(json.dumps(report, indent=1))
    print(
        f"{report['accuracy']:.2f} % of {len(foregrounds)} foregrounds are recognised on all {len(behind)} backgrounds"
    )


def main(argv: list[str] | None = None) -> int:
    """The command; returns the exit code."""
    parser = argparse.ArgumentParser("python -m vitpyramid.tools.backgrounds", description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="the challenge's folder, with fg_mask, original and only_bg_t")
    parser.add_argument("--checkpoint", required=True, help="of the network, wherever weights are read from")
    parser.add_argument("--model", help="name of the network; recognised by the weights if left out")
    parser.add_argument(
        "--groups", type=Path, help="in_to_in9.json: the group of each class; without it classes are groups"
    )
    parser.add_argument("--batch", type=at_least(1), default=64, help="images at a time; default: 64")
    parser.add_argument("--out", type=Path, default=Path("backgrounds.json"), help="default: backgrounds.json")
    return run(parser, argv, command)


if __name__ == "__main__":
    sys.exit(main())
