"""A network with its weights as one file of StableHLO, which runs where jax is and this package is not.

    python -m vitpyramid.tools.export runs/quickstart --out=digits.stablehlo
    python -m vitpyramid.tools.export weights/pvt_small --out=pvt_small.stablehlo --batch=8 --platforms=cpu,cuda,tpu

The file is `jax.export`'s: `jax.export.deserialize(bytes).call(images)` gives logits. It is read back and compared with
the network before the command ends. Exit codes: 0 done; 1 refused or not equal, nothing written.
"""

import argparse
import dataclasses
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import export as jax_export

from vitpyramid.data.augment import Size, height_width
from vitpyramid.files import write_atomically
from vitpyramid.heads.registry import create_model
from vitpyramid.models.backbone import Variant
from vitpyramid.tasks.prepare import normalise
from vitpyramid.tools.arguments import add_network, at_least, run
from vitpyramid.tools.preprocess import evaluation_of
from vitpyramid.weights.pretrained import read_pretrained

PLATFORMS = ("cpu", "cuda", "rocm", "tpu")
_COMPARED = 3  # images, where the batch is any
_TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-2}  # of the largest logit: both are compiled, each in its own way


@dataclasses.dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
      bytes: of the file.
      batch: images that it takes at once; None: any number.
      height, width: of the images.
      platforms: where it runs.
      difference: of its logits to the network's, of as many images, as a share of the largest logit; None where it was
        made for other platforms than this one's.
    """

    bytes: int
    batch: int | None
    height: int
    width: int
    platforms: tuple[str, ...]
    difference: float | None


def export(
    model: nn.Module,
    variables: dict,
    out: Path,
    batch: int | None = None,
    size: Size | None = None,
    platforms: tuple[str, ...] = (),
    pixels: Variant | None = None,
) -> Exported:
    """Writes a network with its weights as StableHLO, reads it back and compares.

    Args:
      model, variables: as `load_pretrained` gives them.
      out: the file; it is replaced.
      batch: images at once; None: any number, which the file leaves open.
      size: side, or height and width, of the images; None: the model's own.
      platforms: of `PLATFORMS`; (): this machine's.
      pixels: None: the file takes normalised float32 `[B, H, W, 3]`. A variant: it takes pixels, uint8 `[B, H, W, 3]`,
        resized and cut as that variant says, and normalises them itself.

    Returns:
      What was written. The file gives logits `[B, K]` in float32.

    Raises:
      ValueError: images or platforms that cannot be; what was read back gives other logits.
      OSError: it cannot be written.
    """
    if find_spec("flatbuffers") is None:
        raise ValueError("expected flatbuffers, which jax.export writes files with: pip install flatbuffers")
    here = jax_export.default_export_platform()
    platforms = platforms or (here,)
    if unknown := set(platforms) - set(PLATFORMS):
        raise ValueError(f"platforms: {', '.join(sorted(unknown))}: expected some of {', '.join(PLATFORMS)}")
    height, width = height_width(size or model.image_size)

    def logits(images: jax.Array) -> jax.Array:
        if pixels:
            images = normalise(images, pixels.mean, pixels.std, model.dtype)
        return model.apply(variables, images)

    rows = jax_export.symbolic_shape("batch")[0] if batch is None else batch
    shape = jax.ShapeDtypeStruct((rows, height, width, 3), jnp.uint8 if pixels else jnp.float32)
    function = jax.jit(logits)
    content = bytes(jax_export.export(function, platforms=platforms)(shape).serialize())
    difference = _difference(content, function, shape, batch or _COMPARED) if here in platforms else None
    if difference is not None and not difference <= _TOLERANCE.get(str(jnp.dtype(model.dtype)), 1e-5):
        raise ValueError(f"read back, logits differ by {difference:.2g} of the largest; nothing was written")
    write_atomically(out, content)
    return Exported(len(content), batch, height, width, platforms, difference)


def _difference(content: bytes, function: jax.stages.Wrapped, shape: jax.ShapeDtypeStruct, rows: int) -> float:
    """Largest difference of the logits of random images, as a share of the largest logit."""
    rng, images = np.random.default_rng(0), (rows, *shape.shape[1:])
    images = rng.integers(0, 256, images, np.uint8) if shape.dtype == np.uint8 else rng.normal(size=images)
    images = jnp.asarray(images, shape.dtype)
    expected = np.asarray(function(images))
    found = np.asarray(jax_export.deserialize(bytearray(content)).call(images))
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def _command(args: argparse.Namespace) -> None:
    start = time.perf_counter()
    if not args.out.parent.is_dir():
        raise FileNotFoundError(f"--out={args.out}: there is no folder {args.out.parent}")
    network, variables = read_pretrained(args.checkpoint, args.model)
    name, variant = network["name"], evaluation_of(args.checkpoint, network["name"])
    pixels = variant if args.pixels else None
    model = create_model(**network, dtype=jnp.dtype(args.dtype))
    done = export(model, variables, args.out, args.batch, args.size, args.platforms, pixels)
    rows = "any number of" if done.batch is None else str(done.batch)
    kind, where = "uint8 pixels" if pixels else "normalised float32", ", ".join(done.platforms)
    print(f"wrote {args.out}: {name} for {rows} images of {done.height} x {done.width}, {kind}, on {where}")
    checked = "not run here" if done.difference is None else f"read back, logits differ by {done.difference:.1e}"
    print(f"{done.bytes / 1e6:.1f} MB, {checked}; {time.perf_counter() - start:.1f} s")


def main(argv: list[str] | None = None) -> int:
    """The command; returns the exit code."""
    parser = argparse.ArgumentParser("python -m vitpyramid.tools.export", description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", help="converted folder, work directory, PyTorch file, gs://..., hf://owner/repo")
    parser.add_argument("--out", required=True, type=Path, help="the file")
    parser.add_argument("--batch", type=at_least(1), help="images at once; default: any number")
    parser.add_argument(
        "--platforms",
        type=lambda text: tuple(text.split(",")),
        default=(),
        help=",".join(PLATFORMS) + "; default: here",
    )
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default="float32", help="of activations and products"
    )
    parser.add_argument("--pixels", action="store_true", help="take uint8 pixels, and normalise them in the file")
    add_network(parser)
    return run(parser, argv, _command)


if __name__ == "__main__":
    sys.exit(main())
