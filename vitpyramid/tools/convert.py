"""Turns PyTorch weights into an Orbax checkpoint, and back.

    python -m vitpyramid.tools.convert pvt_small.pth --out=weights/pvt_small
    python -m vitpyramid.tools.convert detector.pth --model=retinanet_pvt_small --out=weights/retinanet
    python -m vitpyramid.tools.convert weights/pvt_small --to-torch --out=pvt_small.safetensors

The first reads .pth, .pth.tar, .bin, .safetensors, gs://, hf://owner/repo and https:// sources; `main.py --mode=eval
--workdir=weights/pvt_small`, `main.py --config.init=weights/pvt_small` and `vitpyramid.load_pretrained` take what it
writes. Of a detector's file it takes the backbone alone, unless --model says what the whole is; keys are then those of
mmdetection, mmsegmentation or detectron2. The last takes such a folder, or a work directory of main.py. --out may be
gs://..., too. Exit codes: 0 done; 1 refused, nothing written.
"""

import argparse
import io
import json
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import jax

import vitpyramid
from vitpyramid.files import as_path, in_bucket, reach, write_atomically
from vitpyramid.heads.registry import DENSE, create_model
from vitpyramid.tools.arguments import at_least
from vitpyramid.weights import flax_to_torch
from vitpyramid.weights.containers import open_contents
from vitpyramid.weights.fetch import fetch, sha256
from vitpyramid.weights.importer import PROBLEMS, import_weights
from vitpyramid.weights.names import LARGEST_SIDE, LISTED, MOST_CLASSES
from vitpyramid.weights.pickles import brief
from vitpyramid.weights.reader import INDEX, parts, read_torch_file
from vitpyramid.weights.store import CONVERTED, read_weights, write_weights


def to_orbax(
    source: str,
    out: Path,
    name: str | None = None,
    weights: str = "auto",
    num_classes: int | None = None,
    image_size: int | None = None,
    allow: tuple[str, ...] = (),
    seed: int = 0,
    backbone: str = "",
) -> None:
    """Converts a file of PyTorch weights into a folder; arguments as in `open_contents` and `import_weights`.

    Beside the checkpoint, `conversion.json` says what was read, from which file, and what became of every key.

    Raises:
      ValueError, OSError: nothing was written.
    """
    if backbone and name not in DENSE:
        raise ValueError(f"--backbone={backbone}: expected beside a --model that has heads on a backbone")
    if name is not None:
        create_model(name, backbone)
    reach(out)
    above = () if in_bucket(out) else out.absolute().parents
    there = next((path for path in (out, *above) if path.exists()), None)
    if there and (not there.is_dir() or (there == out and any(out.iterdir()))):
        raise FileExistsError(f"--out={out}: expected a new or empty folder, {there} is none; nothing is replaced")
    begin = time.perf_counter()
    path = fetch(source)
    if path.is_dir():
        raise ValueError(f"{path}: expected a file of PyTorch weights, this is a folder (--to-torch converts folders)")
    digest = sha256(path)
    print(f"reading {path} ({path.stat().st_size / 1e6:.1f} MB, SHA-256 {digest})")
    try:
        contents = open_contents(read_torch_file(path), weights, name)
        converted = import_weights(contents, name, num_classes, image_size, seed, allow=allow, backbone=backbone)
    except ValueError as error:
        raise ValueError(str(error) if str(path) in str(error) else f"{path}: {error}") from error
    prefix = f" behind '{brief(contents.prefix)}'" if contents.prefix else ""
    print(f"took {contents.container}, {contents.names} names{prefix}")
    params = sum(array.size for array in jax.tree.leaves(converted.variables["params"]))
    network = converted.network
    print(
        f"{'recognised' if name is None else 'is'} {network['name']}{f' on {backbone}' if backbone else ''}, "
        f"{network['num_classes']} classes, "
        f"{network['image_size']} x {network['image_size']} pixels, {params:,} parameters"
    )
    for kind, keys in converted.notes.items():
        listed = ", ".join(map(brief, keys[:LISTED]))
        print(f"{kind} ({len(keys)}): {listed}{', ...' if len(keys) > LISTED else ''}")
    dtypes = sorted({str(array.dtype) for array in contents.state_dict.values()})
    contents.state_dict.clear()  # the file's memory, before writing takes some of its own
    write_weights(out, network, converted.variables)
    report = {
        "source": str(source),
        "file": path.name,
        "bytes": path.stat().st_size,
        "sha256": digest,
        "parts": {part.name: sha256(part) for part in parts(path)} if path.name.endswith(INDEX) else {},
        "container": contents.container,
        "prefix": contents.prefix,
        "names": contents.names,
        "network": network,
        "dtypes": dtypes,
        "keys": contents.origin,
        "vitpyramid": vitpyramid.__version__,
        **converted.notes,
    }
    write_atomically(out / CONVERTED, json.dumps(report, indent=2) + "\n")
    print(f"wrote {out} in {time.perf_counter() - begin:.1f} s")


def to_torch(source: Path, out: Path, weights: str = "auto") -> None:
    """Converts the weights of a folder into a .safetensors file; where PyTorch is installed, into a .pth file too.

    The official class of the network loads either with `strict=True`.

    Raises:
      ValueError, OSError: nothing was written.
    """
    from safetensors.numpy import save

    for path in (source, out):
        reach(path)
    if out.suffix != ".safetensors":
        raise ValueError(f"--out={out}: expected a name that ends in .safetensors")
    files = [out, out.with_suffix(".pth")] if find_spec("torch") else [out]
    for file in files:
        if file.exists():
            raise FileExistsError(f"{file}: expected no such file; nothing is replaced")
    stored = read_weights(source, weights)
    state_dict = flax_to_torch(
        stored.network["name"],
        stored.variables,
        stored.network.get("library"),
        stored.network.get("backbone", ""),
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    for file in files:
        if file is out:
            content = save(state_dict, metadata={"format": "pt"})
        else:
            import torch

            pickled = io.BytesIO()
            torch.save({key: torch.from_numpy(array) for key, array in state_dict.items()}, pickled)
            content = pickled.getvalue()
        write_atomically(file, content)
        print(f"wrote {file}: {stored.network['name']}, {stored.weights} weights of step {stored.step}")


def _allow(text: str) -> tuple[str, ...]:
    kinds = tuple(kind.replace("_", " ") for kind in text.split(","))
    if not set(kinds) <= set(PROBLEMS):
        known = ",".join(kind.replace(" ", "_") for kind in PROBLEMS)
        raise argparse.ArgumentTypeError(f"{text!r}: expected some of {known}")
    return kinds


def main() -> int:
    parser = argparse.ArgumentParser("python -m vitpyramid.tools.convert", description=__doc__.split("\n\n")[0])
    parser.add_argument("input", help="file, gs://..., hf://owner/repo[/file] or https://...; with --to-torch a folder")
    parser.add_argument("--out", required=True, help="new folder; with --to-torch a .safetensors file")
    parser.add_argument("--model", help="name of the network; recognised by keys and shapes if left out")
    parser.add_argument("--backbone", default="", help="under the heads of --model, if another than their own")
    parser.add_argument(
        "--weights", choices=("auto", "ema", "raw"), default="auto", help="moving average or raw weights"
    )
    parser.add_argument("--num-classes", type=at_least(1, MOST_CLASSES), help="of a new head, if not the file's number")
    parser.add_argument(
        "--size", type=at_least(32, LARGEST_SIDE), help="side of the images that position tables are resized for"
    )
    parser.add_argument("--seed", type=at_least(0), default=0, help="of parameters that are not in the file")
    parser.add_argument(
        "--allow", type=_allow, default=(), help="missing,unexpected,wrong_shape,nonfinite: no errors then"
    )
    parser.add_argument("--to-torch", action="store_true", help="from a folder to PyTorch")
    args = parser.parse_args()
    try:
        if args.to_torch:
            to_torch(as_path(args.input), as_path(args.out), args.weights)
        else:
            out, network = as_path(args.out), (args.num_classes, args.size)
            to_orbax(args.input, out, args.model, args.weights, *network, args.allow, args.seed, args.backbone)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
