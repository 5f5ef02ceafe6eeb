"""How well a network recognises images that are occluded, attacked, corrupted, or from other data sets.

    python -m vitpyramid.tools.robustness --checkpoint=runs/quickstart --data=digits --split=test
    python -m vitpyramid.tools.robustness --checkpoint=weights/pit_s --data=imagenet2012 --split=validation --count=5000
    python -m vitpyramid.tools.robustness --checkpoint=weights/pit_s --data=FOLDER --split=val --tests=corruptions \\
        --frost=robustness/ImageNet-C/create_c
    python -m vitpyramid.tools.robustness --checkpoint=weights/pit_s --data=imagenet-a --tests=clean

`--data` is a folder with class folders, or with `--split` a folder of such folders, or a TFDS data set. ImageNet-A, -R,
-V2 and -Sketch are known by their class names, ReaL needs `--real=real.json`, the Background Challenge
`--groups=in_to_in9.json` (`vitpyramid.evals.imagenet`). What is done to images is in `vitpyramid.evals.occlusion`,
`.attacks` and `.corruptions`: pixels are changed after the evaluation's crop and before normalisation. Accuracies are
top-1 in percent. The chart goes to `--out`, the numbers to the same name with `.json`.
"""

import argparse
import concurrent.futures
import dataclasses
import functools
import itertools
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from PIL import Image
from tqdm import tqdm

from vitpyramid import data
from vitpyramid.data.augment import decode, eval_crop
from vitpyramid.data.folder import FolderRecords
from vitpyramid.evals import attacks, corruptions, imagenet, occlusion
from vitpyramid.tasks.prepare import normalise
from vitpyramid.tools import chart
from vitpyramid.tools.arguments import add_picture, add_weights, at_least, run
from vitpyramid.tools.network import Network, open_network
from vitpyramid.tools.preview import sheet, stack
from vitpyramid.train.config import reference

OCCLUSIONS = {"patch": occlusion.patches, "centre": occlusion.centre, "box": occlusion.box}
TESTS = ("clean", "occlusion", "fgsm", "pgd", "corruptions")


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is tested.

    Attributes:
      tests: some of `TESTS`; clean accuracy is always measured.
      ratios: shares of the image that are hidden.
      eps: of the attacks, in levels of 255.
      steps: of PGD, of 2.5 eps / steps each, from a random start.
      corruptions: names.
      frost: pictures for it, uint8 RGB.
      batch: images at a time; rounded up to a multiple of the devices.
      seed: of everything that is drawn.
    """

    tests: tuple[str, ...] = TESTS
    ratios: tuple[float, ...] = (0.1, 0.25, 0.5, 0.75)
    eps: tuple[float, ...] = (0.5, 1.0, 2.0, 4.0)
    steps: int = 10
    corruptions: tuple[str, ...] = tuple(name for name in corruptions.CORRUPTIONS if name != "frost")
    frost: tuple[np.ndarray, ...] = ()
    batch: int = 64
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class Labels:
    """What counts as right.

    Attributes:
      accepted: bool `[N, K]`, the classes that are right for each image; images without any do not count.
      subset: bool `[K]`, classes among which the network chooses.
    """

    accepted: np.ndarray
    subset: np.ndarray


def open_data(name: str, split: str, data_dir: str = "") -> data.Source:
    """Images and labels: a TFDS data set, or a folder. Raises `ValueError` as `data.open_source`."""
    config = reference().data
    folder = Path(name).expanduser()
    if folder.is_dir():
        folder = folder if split else folder.resolve()
        config.name, config.data_dir = "folder", str(folder if split else folder.parent)
        config.train_split = config.eval_split = split = split or folder.name
    else:
        config.name, config.data_dir = name, data_dir
    return data.open_source(config, split or "test")


def labels_of(
    source: data.Source, indices: Sequence[int], num_classes: int, groups: Path | None = None, real: Path | None = None
) -> Labels:
    """The classes that are right for each of the images `indices`; see `vitpyramid.evals.imagenet`.

    Raises:
      ValueError: class names, groups or file names that do not fit.
      OSError: a file cannot be read.
    """
    accepted, subset = np.zeros((len(indices), num_classes), bool), np.ones(num_classes, bool)
    in_folder = isinstance(source.records, FolderRecords)  # whose labels are there without the images
    if real:
        classes = imagenet.read_real(real)
        for row, index in zip(accepted, indices, strict=True):
            record = {} if in_folder else source.records[index]
            name = record.get("file_name", source.where(index))
            row[classes[imagenet.real_number(name.decode() if isinstance(name, bytes) else name)]] = True
        return Labels(accepted, subset)
    if in_folder:
        labels = source.records.labels[list(indices)]
    else:
        labels = np.array([source[index]["label"] for index in tqdm(indices, desc="labels", unit=" images")])
    if groups:
        group = imagenet.read_groups(groups, num_classes)
        return Labels(group == labels[:, None], subset)
    classes = imagenet.model_classes(source.class_names, num_classes)
    accepted[np.arange(len(indices)), classes[labels]] = True
    if len(classes) < num_classes:
        subset = np.isin(np.arange(num_classes), classes)
    elif source.name in imagenet.PARTIAL:
        subset = accepted.any(axis=0)
    return Labels(accepted, subset)


def robustness(
    network: Network, read: Callable[[int], np.ndarray], labels: Labels, settings: Settings | None = None
) -> dict:
    """Accuracies, in percent, under everything in `settings`.

    Each image is read once; what is done to it follows from the seed and its place alone.

    Args:
      read: the pixels of image i, uint8 `[H, W, 3]` of the network's size.

    Returns:
      `images`, those that count; `clean`; `occlusion` by kind and ratio; `fgsm` and `pgd` by eps; `corruptions` by
      name, a list of the five severities; `corruption_errors` and `mce` (None unless all 15 are there).

    Raises:
      ValueError: no image counts, or settings that do not go together.
    """
    settings = settings or Settings()
    if not labels.accepted.any():
        raise ValueError("no image has a label that counts")
    attacked = {"fgsm", "pgd"} & set(settings.tests)
    if attacked and (labels.accepted.sum(1) > 1).any():
        raise ValueError(f"{', '.join(sorted(attacked))}: expected images with one label each")
    devices = Mesh(jax.local_devices(), "data")
    size = -(-min(settings.batch, len(labels.accepted)) // devices.size) * devices.size
    split = NamedSharding(devices, PartitionSpec("data"))
    variables = jax.device_put(network.variables, NamedSharding(devices, PartitionSpec()))
    judge = functools.partial(_judge, network.model, network.variant, variables, jnp.asarray(labels.subset))
    right: dict[tuple, list] = {}
    with concurrent.futures.ThreadPoolExecutor() as pool, tqdm(total=len(labels.accepted), unit=" images") as bar:
        for start in range(0, len(labels.accepted), size):
            chunk = range(start, min(start + size, len(labels.accepted)))
            pixels = np.stack(list(pool.map(read, chunk)))
            padding = ((0, size - len(chunk)), (0, 0), (0, 0), (0, 0))  # of one shape: compiled once
            accepted = np.pad(labels.accepted[start : start + size], padding[:2])
            indices = np.pad(np.arange(start, start + len(chunk)), padding[0])
            placed = jax.device_put((np.float32(np.pad(pixels, padding)), accepted, indices), split)
            corrupted = (
                (key, jax.device_put(np.float32(np.pad(images, padding)), split))
                for key, images in _corrupted(pixels, start, settings, pool)
            )
            before: tuple = ()
            for key, images in itertools.chain(_versions(network, settings, variables, *placed), corrupted):
                found = judge(images, placed[1])
                # Fetched one late: the device computes while the host corrupts the next.
                _collect(right, *before)
                before = key, found, len(chunk)
            _collect(right, *before)
            bar.update(len(chunk))
    counted = labels.accepted.any(axis=1)
    return _report(
        {key: 100 * float(np.concatenate(parts)[counted].mean()) for key, parts in right.items()}, int(counted.sum())
    )


def _collect(right: dict[tuple, list], key: tuple = (), found=(), count: int = 0) -> None:
    if key:
        right.setdefault(key, []).append(np.asarray(found)[:count])


@functools.partial(jax.jit, static_argnums=(0, 1))
def _judge(model, variant, variables, subset, images, accepted) -> jax.Array:
    """Whether each prediction is right, `[B]`; images are pixels, float32 of 0 to 255."""
    logits = _logits(model, variant, variables, images)
    predicted = jnp.argmax(jnp.where(subset, logits, -jnp.inf), axis=-1)
    return jnp.take_along_axis(accepted, predicted[:, None], axis=1)[:, 0]


def _logits(model, variant, variables, images):
    return model.apply(variables, normalise(images, variant.mean, variant.std, model.dtype))


def _versions(network: Network, settings: Settings, variables, pixels, accepted, indices) -> Iterator[tuple]:
    """What the device makes of a batch of float32 pixels: `(key, images)`, first the images themselves."""
    yield ("clean",), pixels
    if "occlusion" in settings.tests:
        for kind, ratio in ((kind, ratio) for kind in OCCLUSIONS for ratio in settings.ratios):
            yield ("occlusion", kind, ratio), _occlude(kind, settings.seed, indices, pixels, ratio)
    attack = functools.partial(_attack, network.model, network.variant, settings.steps, variables)
    for kind in ("fgsm", "pgd"):
        for eps in settings.eps if kind in settings.tests else ():
            yield (kind, eps), attack(kind == "pgd", settings.seed, indices, pixels, accepted, eps / 255)


@functools.partial(jax.jit, static_argnums=0)
def _occlude(kind, seed, indices, pixels, ratio):
    return OCCLUSIONS[kind](_keys(seed, indices), pixels, ratio)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 4))
def _attack(model, variant, steps, variables, repeated, seed, indices, pixels, accepted, eps):
    def loss(images):
        logits = _logits(model, variant, variables, images * 255)
        return optax.softmax_cross_entropy(logits, accepted.astype(logits.dtype)).sum()

    images = pixels / 255
    if not repeated:
        return 255 * attacks.fgsm(loss, images, eps)
    return 255 * attacks.pgd(loss, images, eps, 2.5 * eps / steps, steps, _keys(seed, indices))


def _keys(seed, indices):
    return jax.vmap(functools.partial(jax.random.fold_in, jax.random.key(seed)))(indices)


def _corrupted(pixels: np.ndarray, start: int, settings: Settings, pool) -> Iterator[tuple]:
    """What the host makes of a batch: `(key, images)`."""
    for name in settings.corruptions if "corruptions" in settings.tests else ():
        for severity in corruptions.SEVERITIES:
            corrupt = functools.partial(
                corruptions.corrupt, name=name, severity=severity, seed=settings.seed, pictures=settings.frost
            )
            images = pool.map(lambda i, corrupt=corrupt: corrupt(pixels[i], index=start + i), range(len(pixels)))
            yield ("corruptions", name, severity), np.stack(list(images))


def _report(accuracy: Mapping[tuple, float], images: int) -> dict:
    report: dict = {"images": images, "clean": accuracy[("clean",)]}
    for (test, *rest), percent in accuracy.items():
        if test == "occlusion":
            report.setdefault(test, {}).setdefault(rest[0], {})[f"{rest[1]:g}"] = percent
        elif test == "corruptions":
            report.setdefault(test, {}).setdefault(rest[0], []).append(percent)
        elif rest:
            report.setdefault(test, {})[f"{rest[0]:g}"] = percent
    if "corruptions" in report:
        errors = {name: [1 - percent / 100 for percent in found] for name, found in report["corruptions"].items()}
        report |= {"corruption_errors": corruptions.corruption_errors(errors), "mce": corruptions.mce(errors)}
    return report


def robustness_chart(report: dict) -> Image.Image:
    """Accuracy against the ratio hidden, eps and severity, from no change on; those of them that were measured."""

    def curve(found: Mapping[str, float]) -> list[tuple[float, float]]:
        return [(0, report["clean"]), *((float(x), y) for x, y in found.items())]

    charts = []
    if "occlusion" in report:
        series = {kind: curve(found) for kind, found in report["occlusion"].items()}
        charts.append(chart.lines("occlusion: top-1, %", series, "share of the image hidden"))
    if attacked := {kind: curve(report[kind]) for kind in ("fgsm", "pgd") if kind in report}:
        charts.append(chart.lines("attacks: top-1, %", attacked, "eps, of 255 levels"))
    if "corruptions" in report:
        series = {
            name: [(0, report["clean"]), *enumerate(found, start=1)] for name, found in report["corruptions"].items()
        }
        mean = list(enumerate(np.mean([[y for _, y in found] for found in series.values()], axis=0)))
        series = series if len(series) == 1 else {f"mean of {len(series)} corruptions": mean}
        charts.append(chart.lines("corruptions: top-1, %", series, "severity"))
    return chart.beside(charts or [chart.lines("top-1, %", {"clean": [(0, report["clean"])]})])


def corruptions_picture(image: np.ndarray, settings: Settings, severity: int = 3) -> Image.Image:
    """An image, uint8 `[H, W, 3]`, under each corruption."""
    tiles = [
        corruptions.corrupt(image, name, severity, settings.seed, pictures=settings.frost)
        for name in settings.corruptions
    ]
    captions = ["image", *settings.corruptions]
    return sheet(f"corruptions at severity {severity}", np.stack([image, *tiles]), captions, columns=8)


def command(args: argparse.Namespace) -> None:
    """The command, after its arguments were parsed."""
    network = open_network(args.checkpoint, args.model, args.size)
    source = open_data(args.data, args.split, args.data_dir)
    indices = range(min(len(source), args.count or len(source)))
    labels = labels_of(source, indices, network.model.num_classes, args.groups, args.real)
    resample = Image.Resampling[network.variant.interpolation.upper()]

    def read(index: int) -> np.ndarray:
        return np.asarray(eval_crop(decode(source[index]["image"]), network.size, network.variant.crop, resample))

    frost = tuple(np.asarray(Image.open(file).convert("RGB")) for file in _frost_files(args.frost))
    chosen = args.corruptions or tuple(n for n in corruptions.CORRUPTIONS if n != "frost" or frost)
    settings = Settings(args.tests, args.ratios, args.eps, args.steps, chosen, frost, args.batch, args.seed)
    report = robustness(network, read, labels, settings)
    pages = [robustness_chart(report)]
    if "corruptions" in report:
        pages.append(corruptions_picture(read(0), settings))
    page = stack(pages)
    page.save(args.out, "png")
    report = {"model": network.name, "data": args.data, "split": source.split, **report}
    args.out.with_suffix(".json").write_text(json.dumps(report, indent=1))
    print("\n".join(describe(report)))
    print(f"{args.out}: {page.width} x {page.height} pixels; numbers in {args.out.stem}.json")


def describe(report: dict) -> Iterator[str]:
    """A report as lines of text."""
    yield f"{'clean':<28} {report['clean']:6.2f} %  of {report['images']} images"
    rows = {f"{kind} hidden": found for kind, found in report.get("occlusion", {}).items()}
    rows |= {f"{kind}, eps": report[kind] for kind in ("fgsm", "pgd") if kind in report}
    for name, found in rows.items():
        yield f"{name:<28} " + "  ".join(f"{x}: {y:.2f} %" for x, y in found.items())
    for name, found in report.get("corruptions", {}).items():
        error = report["corruption_errors"][name]
        yield f"{name:<28} " + "  ".join(f"{y:6.2f} %" for y in found) + f"  CE {error:.1f}"
    if "corruptions" in report:
        mean = np.mean(list(report["corruption_errors"].values()))
        missing = [name for name in corruptions.CORRUPTIONS if name not in report["corruptions"]]
        yield f"mCE {mean:.1f}" if not missing else f"mean CE {mean:.1f}; no mCE without {', '.join(missing)}"


def _frost_files(folder: Path | None) -> list[Path]:
    if folder is None:
        return []
    files = sorted(file for file in folder.iterdir() if file.suffix.lower() in (".png", ".jpg", ".jpeg"))
    if not files:
        raise ValueError(f"--frost={folder}: expected a folder with frost1.png ... frost5.jpg")
    return files


def some_of(names: Sequence[str]) -> Callable[[str], tuple[str, ...]]:
    """A type for `argparse`: names with commas between them."""

    def parse(text: str) -> tuple[str, ...]:
        found = tuple(text.split(","))
        if unknown := [name for name in found if name not in names]:
            raise argparse.ArgumentTypeError(f"{unknown[0]!r}: expected some of {', '.join(names)}")
        return found

    return parse


def numbers(low: float, high: float) -> Callable[[str], tuple[float, ...]]:
    """A type for `argparse`: numbers above `low` and up to `high` with commas between them, in rising order."""

    def parse(text: str) -> tuple[float, ...]:
        try:
            found = tuple(sorted({float(part) for part in text.split(",")}))
        except ValueError:
            found = ()
        if not found or not all(low < number <= high for number in found):
            raise argparse.ArgumentTypeError(
                f"{text!r}: expected numbers above {low:g} and up to {high:g}, such as 0.5,1"
            )
        return found

    return parse


def main(argv: list[str] | None = None) -> int:
    """The command; returns the exit code."""
    default = Settings()
    parser = argparse.ArgumentParser("python -m vitpyramid.tools.robustness", description=__doc__.splitlines()[0])
    add_weights(parser)
    add_picture(parser, "robustness.png")
    parser.add_argument("--data", required=True, help="folder, or name of a TFDS data set")
    parser.add_argument("--split", default="", help="of the data set, or folder in --data; default: test, or none")
    parser.add_argument("--data-dir", default="", help="where TFDS data sets are, if not in their usual place")
    parser.add_argument("--count", type=at_least(1), help="the first so many images; default: all")
    parser.add_argument("--tests", type=some_of(TESTS), default=TESTS, help=f"default: {','.join(TESTS)}")
    parser.add_argument("--ratios", type=numbers(0, 1), default=default.ratios, help="shares that are hidden")
    parser.add_argument("--eps", type=numbers(0, 255), default=default.eps, help="of attacks, in levels of 255")
    parser.add_argument("--steps", type=at_least(1), default=default.steps, help="of PGD; default: 10")
    parser.add_argument("--corruptions", type=some_of(tuple(corruptions.CORRUPTIONS)), help="default: all")
    parser.add_argument("--frost", type=Path, help="folder with the pictures of frost; without it frost is left out")
    parser.add_argument("--groups", type=Path, help="JSON with the group of each class, for a folder of groups")
    parser.add_argument("--real", type=Path, help="ReaL's real.json, for ImageNet's validation images")
    parser.add_argument("--batch", type=at_least(1), default=default.batch, help="images at a time; default: 64")
    parser.add_argument("--seed", type=at_least(0), default=0)
    return run(parser, argv, command)


if __name__ == "__main__":
    sys.exit(main())
