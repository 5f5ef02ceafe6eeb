"""How fast a network classifies on the device that is here: images a second, latency and memory by size of the batch.

    python -m vitpyramid.tools.throughput pvt_small pit_s
    python -m vitpyramid.tools.throughput 'pvt_*' --batches=1,32,256 --dtype=bfloat16 --json

One device, images that are there already, any weights. Images a second are of batches sent one after another; latency
is of one batch alone, from the call to the result, the median. Memory is what the compiled program needs: weights,
images, results and what lies between. How fast a host makes batches is measured by `vitpyramid.tools.benchmark`.
"""

import argparse
import dataclasses
import functools
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator

import jax
import jax.numpy as jnp
import numpy as np

from vitpyramid.data.augment import Size, height_width
from vitpyramid.models.registry import create_model, get_variant, list_models
from vitpyramid.tools.summary import image_size

BATCHES = (1, 8, 64)
_LEAST = 3  # batches in a measurement, however long they take


@dataclasses.dataclass(frozen=True)
class Rate:
    """One measurement.

    Attributes:
      model, batch: what was measured.
      height, width: of the images.
      dtype: of activations and matrix products.
      images_per_second: of batches one after another; None: a batch does not fit into the device's memory.
      latency: seconds of one batch; None likewise.
      memory: bytes; None likewise.
      top1: published ImageNet top-1 in percent, or None.
    """

    model: str
    batch: int
    height: int
    width: int
    dtype: str
    images_per_second: float | None
    latency: float | None
    memory: int | None
    top1: float | None


def throughput(
    name: str, batches: Iterable[int] = BATCHES, size: Size | None = None, dtype: str = "", seconds: float = 3.0
) -> Iterator[Rate]:
    """Measures a network at each batch, the smallest first; a batch that does not fit is the last.

    Args:
      name: one of `list_models()`.
      batches: images at once.
      size: side, or height and width, of the images; None: the model's own.
      dtype: "float32" or "bfloat16"; "": float32 on CPUs, bfloat16 on others.
      seconds: about as long is measured for each batch, compilation not counted.

    Raises:
      ValueError: unknown `name`; images that the model refuses.
    """
    dtype = dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16")
    model = create_model(name, dtype=jnp.dtype(dtype))
    height, width = height_width(size or model.image_size)
    device = jax.devices()[0]
    images = jax.ShapeDtypeStruct((1, height, width, 3), jnp.float32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), images)
    rng = np.random.default_rng(0)
    # Small positive numbers: nothing becomes infinite, and running variances are no negative ones.
    variables = jax.tree.map(lambda leaf: rng.uniform(0.01, 0.05, leaf.shape).astype(leaf.dtype), shapes)
    variables = jax.device_put(variables, device)
    for batch in sorted(set(batches)):
        images = jax.device_put(rng.normal(size=(batch, height, width, 3)).astype(np.float32), device)
        facts = (name, batch, height, width, dtype)
        try:
            run = functools.partial(jax.jit(model.apply).lower(variables, images).compile(), variables, images)
            rate, latency = _measure(run, batch, seconds)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            yield Rate(*facts, None, None, None, get_variant(name).top1)
            return
        stats = run.func.memory_analysis()
        memory = stats.argument_size_in_bytes + stats.output_size_in_bytes + stats.temp_size_in_bytes
        yield Rate(*facts, rate, latency, memory, get_variant(name).top1)


def _measure(run: Callable[[], jax.Array], batch: int, seconds: float) -> tuple[float, float]:
    """Images a second, and the latency in seconds."""
    jax.block_until_ready(run())
    latencies, begin = [], time.perf_counter()
    while len(latencies) < _LEAST or time.perf_counter() - begin < seconds / 2:
        start = time.perf_counter()
        jax.block_until_ready(run())
        latencies.append(time.perf_counter() - start)
    latency = statistics.median(latencies)
    count = max(_LEAST, round(seconds / 2 / latency))
    begin, results = time.perf_counter(), []
    for _ in range(count):
        results.append(run())
        if len(results) > 2:  # the device is never waited for, nor far ahead
            jax.block_until_ready(results.pop(0))
    jax.block_until_ready(results)
    return count * batch / (time.perf_counter() - begin), latency


def describe(rate: Rate) -> str:
    """A measurement as a row of the table."""
    top1 = "-" if rate.top1 is None else f"{rate.top1:g}"
    start = f"{rate.model:24}{rate.height}x{rate.width}".ljust(34) + f"{rate.dtype:9}{top1:>6}{rate.batch:>7}"
    if rate.images_per_second is None:
        return f"{start}  does not fit into the device's memory"
    return f"{start}{rate.images_per_second:>11.1f}{1000 * rate.latency:>13.2f}{rate.memory / 2**20:>12.1f}"


HEADER = f"{'model':24}{'image':10}{'dtype':9}{'top-1':>6}{'batch':>7}{'images/s':>11}{'ms a batch':>13}{'MiB':>12}"


def _batches(text: str) -> tuple[int, ...]:
    if not all(part.isdecimal() and 0 < int(part) <= 2**20 for part in text.split(",")):
        raise argparse.ArgumentTypeError(f"{text!r}: expected numbers of images, such as 1,8,64")
    return tuple(map(int, text.split(",")))


def main(argv: list[str] | None = None) -> None:
    """The command. Prints to stdout, progress to stderr; exits with 2 where the arguments make no sense."""
    parser = argparse.ArgumentParser("python -m vitpyramid.tools.throughput", description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="+", metavar="MODEL", help="name, or pattern of names such as 'pvt_*'")
    parser.add_argument("--batches", type=_batches, default=BATCHES, help="images at once; default: 1,8,64")
    parser.add_argument("--size", type=image_size, help="HEIGHTxWIDTH or SIDE of the images; default: each model's own")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default="", help="default: bfloat16, on CPUs float32"
    )
    parser.add_argument("--seconds", type=float, default=3.0, help="for each batch; default: 3")
    parser.add_argument("--json", action="store_true", help="one line of JSON a measurement")
    args = parser.parse_args(argv)
    try:
        names = [name for text in args.models for name in ([text] if text in list_models() else list_models(text))]
        print(f"jax {jax.__version__}, one of {jax.device_count()} x {jax.devices()[0].device_kind}", file=sys.stderr)
        for place, name in enumerate(dict.fromkeys(names)):
            print(f"{place + 1}/{len(names)} {name}", file=sys.stderr)
            if place == 0 and not args.json:
                print(HEADER)
            for rate in throughput(name, args.batches, args.size, args.dtype, args.seconds):
                print(json.dumps(dataclasses.asdict(rate)) if args.json else describe(rate), flush=True)
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
