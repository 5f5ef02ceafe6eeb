"""Size, cost and pyramid of a network at a size of images, without running it or allocating its weights.

    python -m vitpyramid.tools.summary --model=pvt_small --size=384x512
    python -m vitpyramid.tools.summary --model=mask_rcnn_pvt_small
    python -m vitpyramid.tools.summary --all --markdown

Multiply-accumulates are those of convolutions, linear layers and both products of attention, counted in the traced
forward pass of one image: every product that depends on the images and has no constant for an operand. So the resizing
of position tables and the moving of data by constant matrices are not counted, nor are norms, softmax and the like.
PyTorch's `FlopCounterMode`, halved, gives the same numbers for the papers' own code.

Detectors are counted as they detect, with all the regions that they may have, on a canvas of 800 x 1344, which holds an
image of 800 x 1333; segmenters at 512 x 512. What RoIAlign multiplies to resample maps is not counted.

Stored bytes are the arrays that `jax.vjp` of `features` keeps for the backward pass: float32, training mode, per image
(a batch of two, halved), counted in the stage that makes them. Weights and images are not counted, nor what depends on
weights alone, and an array and its reshapes count once. Compiled programs keep fewer of them, since they recompute
element-wise results: read it as an upper bound, to compare stages and sizes with.
"""

import argparse
import collections
import dataclasses
import re
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.extend import core

from vitpyramid.heads.registry import DENSE, FACTS, create_model, list_models
from vitpyramid.heads.semantic_fpn import SemanticFPN
from vitpyramid.models.registry import get_variant
from vitpyramid.tools import macs

# Why published multiply-accumulates differ from ours, by family.
REASONS = {"rest": "the published figure omits part of the attention products"}
OTHER_REASON = "the published figure was counted with another tool"
ROUNDED = "the published figure is rounded"
ALLOWED_DIFFERENCE = 0.03

# Canvases, and the sizes that the papers counted at.
DETECTION, PUBLISHED_DETECTION, SEGMENTATION = (800, 1344), (800, 1280), (512, 512)
RESAMPLING = re.compile(r"(^|/)resample/")  # the scope of what moves data alone

VIEWS = ("reshape", "squeeze", "copy")  # primitives whose result is their operand's memory


@dataclasses.dataclass(frozen=True)
class LevelSummary:
    """One level of the pyramid; `stored` is the bytes that its stage keeps for the backward pass, per image."""

    stride: int
    height: int
    width: int
    channels: int
    stored: int


@dataclasses.dataclass(frozen=True)
class Summary:
    """What a network is at `height x width` images.

    Attributes:
      parameters: trainable ones.
      frozen: numbers in fixed tensors; BatchNorm's statistics are in neither.
      macs: multiply-accumulates of the forward pass of one image.
      published_gmacs: of its authors, in units of 1e9; None where there are none or the size is not 224 x 224.
      top1: published ImageNet top-1 in percent, or None.
      levels: finest first.
    """

    name: str
    height: int
    width: int
    parameters: int
    frozen: int
    macs: int
    published_gmacs: float | None
    top1: float | None
    levels: tuple[LevelSummary, ...]

    @property
    def stored(self) -> int:
        """Bytes kept for the backward pass in all stages, per image."""
        return sum(level.stored for level in self.levels)

    @property
    def reason(self) -> str:
        """Why `macs` and `published_gmacs` differ, if they do by more than 3 %; else empty."""
        published, gmacs = self.published_gmacs, self.macs / 1e9
        if published is None or abs(gmacs - published) <= ALLOWED_DIFFERENCE * published:
            return ""
        decimals = len(str(published).partition(".")[2])
        return ROUNDED if round(gmacs, decimals) == published else REASONS.get(self.name.split("_")[0], OTHER_REASON)


def summarise(name: str, height: int | None = None, width: int | None = None) -> Summary:
    """Summary of the model called `name` for images of `height x width`, by default the variant's own size.

    Raises `ValueError` for an unknown name and for images that the model refuses.
    """
    variant = get_variant(name)
    model = variant.model
    native = model.height_width
    height, width = height or native[0], width or native[1]
    variables = jax.eval_shape(model.init, jax.random.key(0), _images(1, *native))
    levels = jax.eval_shape(lambda v, x: model.apply(v, x, method="features"), variables, _images(1, height, width))
    stored = stored_bytes(model, variables, height, width)
    return Summary(
        name,
        height,
        width,
        parameters=_size(variables["params"]),
        frozen=_size(variables.get("constants", {})),
        macs=count_macs(model, variables, height, width),
        published_gmacs=variant.gmacs if (height, width) == (224, 224) else None,
        top1=variant.top1,
        levels=tuple(LevelSummary(x.stride, *x.x.shape[1:], kept) for x, kept in zip(levels, stored, strict=True)),
    )


@dataclasses.dataclass(frozen=True)
class Part:
    """The backbone of a network for dense prediction, or a module that stands on it; of trainable parameters."""

    name: str
    parameters: int
    macs: int


@dataclasses.dataclass(frozen=True)
class DenseSummary:
    """What a network for dense prediction is at `height x width` images.

    Attributes:
      parts: its backbone, neck and heads.
      published: parameters in millions; None where there are none.
      published_gmacs: as of `Summary`, at `PUBLISHED_DETECTION` or `SEGMENTATION`.
      strides: of the backbone's levels that are read.
    """

    name: str
    height: int
    width: int
    parts: tuple[Part, ...]
    published: float | None
    published_gmacs: float | None
    strides: tuple[int, ...]

    @property
    def parameters(self) -> int:
        """Trainable ones."""
        return sum(part.parameters for part in self.parts)

    @property
    def macs(self) -> int:
        """Multiply-accumulates of one image."""
        return sum(part.macs for part in self.parts)


def summarise_dense(name: str, height: int | None = None, width: int | None = None) -> DenseSummary:
    """Summary of the network for dense prediction called `name` for images of `height x width`.

    By default those are 800 x 1344, of segmenters 512 x 512. Raises as `summarise`.
    """
    model, facts = create_model(name), FACTS.get(name)
    own = SEGMENTATION if isinstance(model, SemanticFPN) else DETECTION
    height, width = height or own[0], width or own[1]
    variables = jax.eval_shape(model.init, jax.random.key(0), _images(1, *model.height_width))
    params, modules = variables["params"], ("backbone", *model.after)
    part_of = {module: re.sub(r"(_\d+)+$", "", module) for module in modules}
    # A method of the network may call what is inside of a module.
    inside = {name: part_of[module] for module in modules for name in params.get(module, ())}
    sizes, counts = collections.Counter(), collections.Counter()
    for module, part in part_of.items():
        sizes[part] += _size(params.get(module, ()))
    for path, count in macs_by_path(model, variables, height, width).items():
        parts = ((inside | part_of).get(name) for name in re.split(r"[/.]", path))
        counts[next(filter(None, parts), "others")] += count
    parts = tuple(Part(part, sizes[part], counts[part]) for part in {**sizes, **counts})
    published = (facts.published, facts.gmacs) if facts else (None, None)
    return DenseSummary(name, height, width, parts, *published, tuple(model.backbone.strides[i] for i in model.levels))


def count_macs(model, variables, height: int, width: int) -> int:
    """Multiply-accumulates of `model` for one image; `variables` may be shapes."""
    return macs_by_path(model, variables, height, width).total()


def macs_by_path(model, variables, height: int, width: int) -> collections.Counter:
    """`count_macs`, by the methods, scopes and operation that an operation is in."""
    with nn.intercept_methods(_show_sums):
        jaxpr = jax.make_jaxpr(model.apply)(variables, _images(1, height, width)).jaxpr
    found = macs.walk(jaxpr, _input_sources(jaxpr))[0]
    return collections.Counter({path: count for path, count in found.items() if not RESAMPLING.search(path)})


def _show_sums(call, args, kwargs, context):
    """Puts into the traced program, as a product of vectors, what a layer multiplies and adds element by element."""
    out, module = call(*args, **kwargs), context.module
    if context.method_name == "__call__" and hasattr(module, "elementwise_macs"):
        vector = jnp.broadcast_to(out.ravel()[0], module.elementwise_macs(out))
        jnp.vdot(vector, vector)
    return out


def stored_bytes(model, variables, height: int, width: int) -> list[int]:
    """Bytes that each stage of `model` keeps for the backward pass, per image; `variables` may be shapes."""
    batch = 2  # one image may leave BatchNorm a single value
    others = {key: value for key, value in variables.items() if key != "params"}

    def maps_and_residuals(params, others, images):
        def maps(params):
            options = {"train": True, "mutable": list(others), "rngs": {"dropout": jax.random.key(0)}}
            levels, _ = model.apply({"params": params, **others}, images, method="features", **options)
            return [level.x for level in levels]

        levels, backward = jax.vjp(maps, params)
        return levels, jax.tree.leaves(backward)

    images = _images(batch, height, width)
    traced, (levels, _) = jax.make_jaxpr(maps_and_residuals, return_shape=True)(variables["params"], others, images)
    jaxpr, count = macs.without_platforms(traced.jaxpr), len(levels)
    _, sources = macs.walk(jaxpr, _input_sources(jaxpr))
    made = {var: step for step, equation in enumerate(jaxpr.eqns) for var in equation.outvars}
    ends = [made[var] for var in jaxpr.outvars[:count]]  # the step that ends each stage
    stored = [0] * count
    kept = [var for var in jaxpr.outvars[count:] if isinstance(var, core.Var)]
    for var in {_origin(var, jaxpr.eqns, made) for var in kept}:
        if var in made and "images" in sources[var]:
            stage = min(sum(made[var] > end for end in ends), count - 1)
            stored[stage] += var.aval.size * var.aval.dtype.itemsize
    return [total // batch for total in stored]


def _images(batch: int, height: int, width: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((batch, height, width, 3), jnp.float32)


def _size(tree) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def _origin(var, equations, made):
    """The variable whose memory `var` is a view of."""
    while var in made and (equation := equations[made[var]]).primitive.name in VIEWS:
        var = equation.invars[0]
    return var


def _input_sources(jaxpr) -> list[frozenset]:
    """Sources of the inputs of a program of weights, then images. A value's sources are empty if it is a constant."""
    return [frozenset({"weights"})] * (len(jaxpr.invars) - 1) + [frozenset({"images"})]


def describe(summary: Summary) -> str:
    """A summary as lines of text."""
    published = f" (published {summary.published_gmacs:g})" if summary.published_gmacs else ""
    frozen = f" ({summary.frozen:,} frozen beside)" if summary.frozen else ""
    lines = [
        f"{summary.name} for images of {summary.height} x {summary.width}",
        f"parameters  {summary.parameters:,}{frozen}",
        f"GMACs       {summary.macs / 1e9:.4g}{published}",
        f"stored      {summary.stored / 2**20:.1f} MiB for the backward pass of an image in float32",
        *([f"note        {summary.reason}"] if summary.reason else []),
        "",
        f"{'stride':>6}  {'grid':>11}  {'channels':>8}  {'stored MiB':>10}",
    ]
    for level in summary.levels:
        grid = f"{level.height} x {level.width}"
        lines.append(f"{level.stride:>6}  {grid:>11}  {level.channels:>8}  {level.stored / 2**20:>10.1f}")
    return "\n".join(lines)


def describe_dense(summary: DenseSummary) -> str:
    """A summary as lines of text."""
    millions = f" (published {summary.published:.1f} M)" if summary.published else ""
    gmacs = f" (published {summary.published_gmacs:g}{_counted_at(summary)})" if summary.published_gmacs else ""
    lines = [
        f"{summary.name} for images of {summary.height} x {summary.width}",
        f"parameters  {summary.parameters:,}{millions}",
        f"GMACs       {summary.macs / 1e9:.4g}{gmacs}",
        f"strides     {'/'.join(map(str, summary.strides))}",
        "",
        f"{'part':<12}  {'parameters':>12}  {'GMACs':>7}",
    ]
    lines += [f"{part.name:<12}  {part.parameters:>12,}  {part.macs / 1e9:>7.4g}" for part in summary.parts]
    return "\n".join(lines)


def _counted_at(summary: DenseSummary) -> str:
    """At which other size the published figure was counted, in words."""
    theirs = SEGMENTATION if issubclass(DENSE[summary.name].network, SemanticFPN) else PUBLISHED_DETECTION
    return "" if (summary.height, summary.width) == theirs else f" at {theirs[0]}x{theirs[1]}"


DENSE_COLUMNS = ("model", "image", "parameters", "published, M", "GMACs", "published", "strides")


def dense_table(summaries: list[DenseSummary], markdown: bool = False) -> str:
    """One row a network."""
    rows = [
        (
            summary.name,
            f"{summary.height}x{summary.width}",
            f"{summary.parameters:,}",
            "-" if summary.published is None else f"{summary.published:.1f}",
            f"{summary.macs / 1e9:.4g}",
            "-" if summary.published_gmacs is None else f"{summary.published_gmacs:g}{_counted_at(summary)}",
            "/".join(map(str, summary.strides)),
        )
        for summary in summaries
    ]
    return "\n".join(_lines([DENSE_COLUMNS, *rows], markdown))


COLUMNS = ("model", "image", "parameters", "frozen", "GMACs", "published", "top-1", "strides", "channels", "stored MiB")


def table(summaries: list[Summary], markdown: bool = False) -> str:
    """One row a network, reasons for differences below; plain text or Markdown."""
    reasons = list(dict.fromkeys(summary.reason for summary in summaries if summary.reason))
    lines = _lines([COLUMNS, *(_row(summary, reasons) for summary in summaries)], markdown)
    notes = [f"{mark}. {reason}" if markdown else f"[{mark}] {reason}" for mark, reason in enumerate(reasons, start=1)]
    return "\n".join([*lines, *([""] if notes else []), *notes])


def _lines(rows: list[tuple[str, ...]], markdown: bool) -> list[str]:
    """Rows, the first with the names of the columns, as text or Markdown."""
    if markdown:
        rows = [rows[0], ("---",) + ("---:",) * (len(rows[0]) - 1), *rows[1:]]
        return [f"| {' | '.join(row)} |" for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows]


def _row(summary: Summary, reasons: list[str]) -> tuple[str, ...]:
    published = "-" if summary.published_gmacs is None else f"{summary.published_gmacs:g}"
    return (
        summary.name,
        f"{summary.height}x{summary.width}",
        f"{summary.parameters:,}",
        f"{summary.frozen:,}",
        f"{summary.macs / 1e9:.4g}",
        published + (f" [{reasons.index(summary.reason) + 1}]" if summary.reason else ""),
        "-" if summary.top1 is None else f"{summary.top1:g}",
        "/".join(str(level.stride) for level in summary.levels),
        "/".join(str(level.channels) for level in summary.levels),
        f"{summary.stored / 2**20:.1f}",
    )


def image_size(text: str) -> tuple[int, int]:
    """`384x512` (height x width) or `384`."""
    if not re.fullmatch(r"[1-9][0-9]*(x[1-9][0-9]*)?", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a size, expected HEIGHTxWIDTH or SIDE: 384x512, 384")
    sides = [int(side) for side in text.split("x")]
    return sides[0], sides[-1]


def main(argv: list[str] | None = None) -> None:
    """The command. Prints to stdout, progress to stderr; exits with 2 where the arguments make no sense."""
    parser = argparse.ArgumentParser("vitpyramid.tools.summary", description=__doc__.splitlines()[0])
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--model", help="name of the network")
    which.add_argument("--all", action="store_true", help="tables of all networks")
    parser.add_argument("--size", type=image_size, default=(None, None), help="HEIGHTxWIDTH or SIDE; default: its own")
    parser.add_argument("--markdown", action="store_true", help="with --all: tables as Markdown")
    args = parser.parse_args(argv)
    if args.markdown and not args.all:
        parser.error("--markdown is for tables, expected --all beside it")
    try:
        if args.model:
            dense = args.model in DENSE
            act, show = (summarise_dense, describe_dense) if dense else (summarise, describe)
            print(show(act(args.model, *args.size)))
            return
        names, summaries, on_top = list_models(), [], []
        for i, name in enumerate(names, start=1):
            print(f"{i}/{len(names)} {name}", file=sys.stderr)
            if name in DENSE:
                on_top.append(summarise_dense(name, *args.size))
            else:
                summaries.append(summarise(name, *args.size))
        print("\n\n".join([table(summaries, args.markdown), *([dense_table(on_top, args.markdown)] if on_top else [])]))
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
