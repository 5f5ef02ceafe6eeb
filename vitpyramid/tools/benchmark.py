"""How many images a second the host makes out of a data set, step by step, and how many cores a machine needs.

    python -m vitpyramid.tools.benchmark data --config=configs/pvt.py:small --chips=32 --images_per_second_per_chip=1500

Rates are per core: images for each second of CPU time, so another busy program hardly changes them. Everything runs in
this process, with `data.threads` threads where batches are made and `data.workers` left out; what workers add on top,
handing over finished images, is not counted. `--config.data.name=synthetic` needs no data set.
"""

import argparse
import dataclasses
import itertools
import math
import sys
import time
from collections.abc import Callable, Iterator

import jax
import numpy as np
from ml_collections import ConfigDict

from vitpyramid import data
from vitpyramid.data import augment, image_ops, jpeg
from vitpyramid.tools import config_args
from vitpyramid.train.sharding import batch_sharding, make_mesh, to_devices

_LEAST = 8  # images or batches in a measurement, however long they take
_LARGEST_BATCH = 256


@dataclasses.dataclass(frozen=True)
class Rate:
    """Images a second in one step of the host's work: per core (CPU time), and as it went (`threads` included)."""

    name: str
    per_core: float
    wall: float


def data_rates(config: ConfigDict, seconds: float) -> Iterator[Rate]:
    """Measures each step for about `seconds`: one image after the other first, then whole batches.

    Decoding, cropping and augmenting each include the ones before, on files that are in memory; batches include reading
    as well. Batches are of at most 256 images.

    Raises:
      ValueError: as `data.open_source`, `augment.from_config` and `data.make_train`.
    """
    settings = augment.from_config(config.data)
    source = data.open_source(config.data, config.data.train_split)
    rng = np.random.default_rng(config.seed)
    indices = rng.integers(len(source), size=256)
    yield _rate("read", lambda i: source[int(rng.integers(len(source)))], seconds)
    files = [source[int(index)]["image"] for index in indices]
    plain = dataclasses.replace(settings, flip=0.0, policy=None, color_jitter=0.0)
    steps = {
        "decode": augment.decode,
        "decode, crop": lambda file: augment.train_image(file, rng, plain),
        "decode, crop, augment": lambda file: augment.train_image(file, rng, settings),
    }
    for name, step in steps.items():
        yield _rate(name, lambda i, step=step: step(files[i % len(files)]), seconds)

    config = config.copy_and_resolve_references()
    config.data.workers, config.batch_size = 0, min(config.batch_size, _LARGEST_BATCH)
    yield _batch_rate("batches", config, source, seconds, lambda batches: batches)
    sharding = batch_sharding(make_mesh(1, jax.local_devices()))
    yield _batch_rate("batches on the devices", config, source, seconds, lambda batches: to_devices(batches, sharding))


def _rate(name: str, work: Callable[[int], object], seconds: float, images: int = 1) -> Rate:
    """`work(i)` for i = 0, 1 ...; `images` are made by each call."""
    work(0)  # what is compiled or opened on first use
    begin, begin_cpu = time.perf_counter(), time.process_time()
    for i in itertools.count(1):
        work(i)
        wall = time.perf_counter() - begin
        if i >= _LEAST and wall >= seconds:
            return Rate(name, i * images / (time.process_time() - begin_cpu), i * images / wall)


def _batch_rate(name: str, config: ConfigDict, source: data.Source, seconds: float, transfer: Callable) -> Rate:
    stream = data.make_train(config, source)
    try:
        batches = transfer(stream)
        return _rate(name, lambda i: jax.block_until_ready(next(batches)), seconds, config.batch_size)
    finally:
        stream.close()


def cores_needed(rate: Rate, chips: int, images_per_second_per_chip: float) -> int:
    """Cores, over all hosts, that keep `chips` busy."""
    return math.ceil(chips * images_per_second_per_chip / rate.per_core)


def describe_software() -> str:
    """Which of the optional libraries do the work."""
    decoder = "simplejpeg" if jpeg.simplejpeg else "Pillow (simplejpeg is not installed)"
    resizer = "numba" if image_ops.kernels else "Pillow (numba is not installed)"
    return f"JPEG by {decoder}; resizing, shear and translation by {resizer}"


def main(argv: list[str] | None = None) -> None:
    """The command. Prints a table to stdout, progress to stderr; exits with 2 where the arguments make no sense."""
    parser = argparse.ArgumentParser(
        "vitpyramid.tools.benchmark",
        description=__doc__.splitlines()[0],
        usage=f"%(prog)s data {config_args.USAGE} [--seconds=S] [--chips=N --images_per_second_per_chip=R]",
        allow_abbrev=False,
    )
    parser.add_argument("what", choices=["data"], help="what is measured")
    parser.add_argument("--seconds", type=float, default=5.0, help="for each step")
    parser.add_argument("--chips", type=int, default=8, help="to be kept busy")
    parser.add_argument("--images_per_second_per_chip", type=float, help="that training takes")
    args, config = config_args.parse(parser, argv)
    try:
        for done, rate in enumerate(data_rates(config, args.seconds), start=1):
            if done == 1:
                print(f"{config.data.name}: {describe_software()}")
                print(f"{'step':24}{'images/s/core':>14}{'ms/image':>10}{'images/s here':>15}")
            print(f"{rate.name:24}{rate.per_core:14.0f}{1000 / rate.per_core:10.3f}{rate.wall:15.0f}", flush=True)
            print(f"{done} of 6 steps measured", file=sys.stderr)
    except ValueError as error:
        parser.error(str(error))
    if args.images_per_second_per_chip:
        cores = cores_needed(rate, args.chips, args.images_per_second_per_chip)
        print(f"{args.chips} chips x {args.images_per_second_per_chip:g} images/s need {cores} cores")


if __name__ == "__main__":
    main()
