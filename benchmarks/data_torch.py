"""Images a second: the training input here against timm's transforms in a torch DataLoader, on the same JPEGs.

    python benchmarks/data_torch.py --workers=2 --rounds=5

Random resized crop to 224 x 224, flip and RandAugment (rand-m9-mstd0.5-inc1), bicubic, uint8 out. Two comparisons, both
in turns: the transforms alone, in this process, and whole loaders with `--workers` processes each, of which a round
starts a new one and counts after `--skip` batches. Images a second and core are by CPU time, over all processes, so
that a busy machine does not decide. Needs torch, torchvision, timm, scikit-image and psutil. Images come from memory.
"""

import argparse
import io
import time

import numpy as np
import psutil
import skimage.data
import torch
import torchvision_operators
from PIL import Image

from configs import base
from vitpyramid import data
from vitpyramid.data import augment, image_ops, jpeg
from vitpyramid.data.synthetic import SIZES, SyntheticRecords, open_synthetic

POLICY = "rand-m9-mstd0.5-inc1"


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", choices=["photos", "synthetic"], default="photos", help="scikit-image's, or noise")
    parser.add_argument("--quality", type=int, default=92, help="of the photos' JPEGs")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--batches", type=int, default=20, help="counted in a round of a loader")
    parser.add_argument("--skip", type=int, default=6, help="batches of a round that are not counted")
    parser.add_argument("--workers", type=int, default=2, help="processes of each loader")
    parser.add_argument("--rounds", type=int, default=5)
    return parser.parse_args()


def photos(quality: int, count: int = 16) -> tuple[bytes, ...]:
    """Pieces of scikit-image's photos, 500 x 375."""
    originals = [Image.fromarray(make()) for make in (skimage.data.astronaut, skimage.data.coffee, skimage.data.rocket)]
    rng, files = np.random.default_rng(0), []
    for i in range(count):
        photo = originals[i % len(originals)]
        share = rng.uniform(0.75, 1) * min(photo.width / 500, photo.height / 375)
        width, height = int(500 * share), int(375 * share)
        left, upper = rng.integers(photo.width - width + 1), rng.integers(photo.height - height + 1)
        piece = photo.crop((left, upper, left + width, upper + height)).resize((500, 375), Image.Resampling.LANCZOS)
        file = io.BytesIO()
        piece.save(file, "jpeg", quality=quality)
        files.append(file.getvalue())
    return tuple(files)


def timm_transform(policy: str | None):
    """timm's training transform that ends in uint8; Pillow 13 refuses to keep 0 bits, so 1 is kept."""
    torchvision_operators.declare()  # none is needed
    from timm.data import auto_augment, create_transform

    posterize = auto_augment.posterize
    auto_augment.NAME_TO_OP["PosterizeIncreasing"] = lambda image, bits, **rest: posterize(image, max(bits, 1), **rest)
    return create_transform(
        224, is_training=True, use_prefetcher=True, color_jitter=None, auto_augment=policy, interpolation="bicubic"
    )


class TorchImages(torch.utils.data.Dataset):
    """An endless map of the same files."""

    def __init__(self, files, transform):
        self.files, self.transform = files, transform

    def __len__(self):
        return SIZES["train"]

    def __getitem__(self, index):
        image = Image.open(io.BytesIO(self.files[index % len(self.files)])).convert("RGB")
        return self.transform(image), index % 1000


def torch_batches(args, dataset):
    loader = torch.utils.data.DataLoader(dataset, args.batch, shuffle=True, num_workers=args.workers)
    yield from loader


def our_batches(args, config, source):
    batches = data.make_train(config, source)
    try:
        yield from batches
    finally:
        batches.close()


def cpu_seconds() -> float:
    """Used so far by this process and its living children."""
    own = psutil.Process()
    times = [process.cpu_times() for process in (own, *own.children(recursive=True))]
    return sum(t.user + t.system for t in times)


def rates(args, batches) -> tuple[float, float]:
    """Images per CPU second and per second, counted after the first batches."""
    for _ in range(args.skip):
        next(batches)
    begin, begin_cpu = time.perf_counter(), cpu_seconds()
    for _ in range(args.batches):
        next(batches)
    images, seconds, seconds_cpu = args.batch * args.batches, time.perf_counter() - begin, cpu_seconds() - begin_cpu
    batches.close()
    return images / seconds_cpu, images / seconds


def cpu_milliseconds(function, files, repeats: int = 20) -> float:
    begin = time.process_time()
    for i in range(repeats):
        for file in files:
            function(file, i)
    return 1000 * (time.process_time() - begin) / repeats / len(files)


def without_extras(function):
    """The function as it is where simplejpeg and numba are not installed."""

    def run(file, i):
        extras = jpeg.simplejpeg, image_ops.kernels
        jpeg.simplejpeg = image_ops.kernels = None
        try:
            return function(file, i)
        finally:
            jpeg.simplejpeg, image_ops.kernels = extras

    return run


def transforms(settings, plain) -> dict:
    with_policy, without = timm_transform(POLICY), timm_transform(None)

    def opened(file):
        return Image.open(io.BytesIO(file)).convert("RGB")

    def augmented(file, i):
        return augment.train_image(file, np.random.default_rng(i), settings)

    return {
        "decode, libjpeg-turbo": lambda file, i: jpeg.decode(file, 375, 375),
        "decode, Pillow": lambda file, i: opened(file),
        "crop, here": lambda file, i: augment.train_image(file, np.random.default_rng(i), plain),
        "crop, timm": lambda file, i: without(opened(file)),
        "augmented, here": augmented,
        "the same by Pillow alone": without_extras(augmented),
        "augmented, timm": lambda file, i: with_policy(opened(file)),
        "evaluation, here": lambda file, i: augment.eval_image(file, settings),
    }


def best_of_rounds(args, measures: dict, better) -> dict:
    results = {name: [] for name in measures}
    for done in range(args.rounds):
        for name, measure in measures.items():
            results[name].append(measure())
        print(f"round {done + 1} of {args.rounds}", flush=True)
    return {name: better(values) for name, values in results.items()}


def main():
    args = parse_args()
    torch.set_num_threads(1)
    files = photos(args.quality) if args.images == "photos" else open_synthetic("train")[0].images
    kernels = "numba" if image_ops.kernels else "Pillow"
    decoder = "simplejpeg" if jpeg.simplejpeg else "Pillow"
    print(f"{args.images}: {np.mean([len(f) for f in files]) / 1000:.0f} kB a file; here {decoder}, {kernels}")

    config = base.get_config()
    config.batch_size, config.data.auto_augment, config.data.interpolation = args.batch, POLICY, "bicubic"
    config.data.workers, config.data.threads = args.workers, 1
    settings = augment.from_config(config.data)
    config.data.auto_augment = ""
    plain = augment.from_config(config.data)
    config.data.auto_augment = POLICY

    alone = {
        name: lambda function=function: cpu_milliseconds(function, files)
        for name, function in transforms(settings, plain).items()
    }
    for name, milliseconds in best_of_rounds(args, alone, min).items():
        print(f"{name:26s}{milliseconds:8.3f} ms of CPU an image, {1000 / milliseconds:6.0f} images/s/core")

    names = tuple(map(str, range(1000)))
    source = data.Source("photos", "train", names, SyntheticRecords(range(SIZES["train"]), files))
    dataset = TorchImages(files, timm_transform(POLICY))
    loaders = {
        "loader, here": lambda: rates(args, our_batches(args, config, source)),
        "loader, torch and timm": lambda: rates(args, torch_batches(args, dataset)),
    }
    for name, (core, wall) in best_of_rounds(args, loaders, max).items():
        print(f"{name:26s}{core:8.0f} images/s/core; {wall:.0f} images/s with {args.workers} workers on this machine")


if __name__ == "__main__":
    main()
