"""Arguments that several tools take, their types, and how a tool is run."""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from vitpyramid.tools.summary import image_size


def at_least(least: int, most: int = 2**63 - 1) -> Callable[[str], int]:
    """A type for `argparse`: integers of at least `least` and at most `most`."""

    def integer(text: str) -> int:
        if not text.isdecimal() or len(text) > 19 or not least <= int(text) <= most:
            expected = f"an integer of at least {least}" + (f" and at most {most}" if most < 2**63 - 1 else "")
            raise argparse.ArgumentTypeError(f"{text[:40]!r}: expected {expected}")
        return int(text)

    return integer


def fraction(text: str) -> float:
    """A type for `argparse`: a number from 0 to 1."""
    try:
        if 0 <= (number := float(text)) <= 1:
            return number
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"{text[:40]!r}: expected a number from 0 to 1")


def add_images(parser: argparse.ArgumentParser) -> None:
    """The argument that says which images."""
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="file, or folder with images at any depth")


def add_weights(parser: argparse.ArgumentParser) -> None:
    """Those that say which network, with which weights, and the size of its images."""
    parser.add_argument(
        "--checkpoint",
        required=True,
        help="converted folder, work directory, PyTorch file, gs://..., hf://owner/repo, https://...",
    )
    add_network(parser)


def add_network(parser: argparse.ArgumentParser) -> None:
    """Those of them beside the weights."""
    parser.add_argument("--model", help="name of the network; recognised by the weights if left out")
    parser.add_argument("--size", type=image_size, help="HEIGHTxWIDTH or SIDE of the images; default: the model's own")


def add_picture(parser: argparse.ArgumentParser, out: str) -> None:
    """`--out`, the picture."""
    parser.add_argument("--out", type=picture, default=Path(out), help=f"the picture, beside it .json; default: {out}")


def picture(text: str) -> Path:
    """A type for `argparse`: a `.png` in a folder that exists."""
    path = Path(text)
    if path.suffix != ".png" or not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"{text!r}: expected the name of a .png in a folder that exists")
    return path


def run(
    parser: argparse.ArgumentParser, argv: list[str] | None, command: Callable[[argparse.Namespace], int | None]
) -> int:
    """Parses and runs; returns the exit code: the command's, or 1 for what cannot be done, in a line."""
    try:
        args = parser.parse_args(argv)
    except SystemExit as stop:  # argparse's own code for wrong arguments is 2
        return 1 if stop.code else 0
    try:
        return command(args) or 0
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
