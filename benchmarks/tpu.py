"""What the TPU's compiler estimates a layer or a whole training step to cost, on a machine without a TPU.

    python benchmarks/tpu.py [--layers "pit pool 27" "rest sr 8"]
    python benchmarks/tpu.py --config=configs/pit.py:s --topology=v5e:4x4 --blocks=1

Needs `jax[tpu]`, whose libtpu compiles for a topology that is not there. Prints cycles of one chip, and bytes of
temporary memory: the compiler's estimates, not measurements. A layer is its forward and backward pass on one device, in
bfloat16 with float32 parameters, and chooses its own layouts: confirm it in the step. `--blocks` is the number of
transformer blocks in each stage: one tells most of the story in a fraction of the compile time.
"""

import argparse
import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import SingleDeviceSharding

from vitpyramid.heads.deformable_attention import DeformableAttention
from vitpyramid.models import layers, pit, pvt, rest, t2t_module
from vitpyramid.models.attention import Block, SelfAttention
from vitpyramid.tasks import make_task
from vitpyramid.tools import chips, config_args, hlo
from vitpyramid.train import program
from vitpyramid.train.sharding import make_mesh

BF16 = jnp.bfloat16


# Levels of PiT-S, and the one behind them, of a canvas of 416 x 672.
DEFORMABLE_GRIDS = ((51, 83), (26, 42), (13, 21), (7, 11))


class Deformable(nn.Module):
    """Deformable attention to cells: of themselves, or of as many queries as there are, which are some of them."""

    queries: int | None = None

    @nn.compact
    def __call__(self, x):
        places = [np.mgrid[:h, :w].reshape(2, -1).T[:, ::-1] + 0.5 for h, w in DEFORMABLE_GRIDS]
        places = [place / (w, h) for place, (h, w) in zip(places, DEFORMABLE_GRIDS, strict=True)]
        places = jnp.asarray(np.concatenate(places)[: self.queries, None], jnp.float32)
        reference = jnp.broadcast_to(places, (len(x), len(places), 4, 2))
        attention = DeformableAttention(heads=8, levels=4, points=4, dtype=BF16)
        return attention(x[:, : self.queries], reference, x, DEFORMABLE_GRIDS)


class SplitProjection(nn.Module):
    """Soft split, norm and projection of a performer layer."""

    split: tuple[int, int, int]

    @nn.compact
    def __call__(self, x):
        norm = t2t_module.SplitNorm(self.split[0] ** 2 * x.shape[-1])
        return t2t_module.SplitLinear(192, self.split, dtype=BF16)(x, *norm())


# Module and the shape of an image's input.
LAYERS = {
    "pit pool 27": (pit.PoolConv(288, BF16), (27, 27, 144)),
    "pit pool 14": (pit.PoolConv(576, BF16), (14, 14, 288)),
    "rest stem": (rest.Stem(96, True, BF16), (224, 224, 3)),
    "rest attention 2": (rest.EfficientAttention(2, 4, (28, 28), 0.0, BF16), (784, 192)),
    "rest attention 3": (rest.EfficientAttention(4, 2, (14, 14), 0.0, BF16), (196, 384)),
    "rest attention 4": (rest.EfficientAttention(8, 1, (7, 7), 0.0, BF16), (49, 768)),
    "rest sr 8": (rest.DepthwiseConv(9, 8, BF16), (56, 56, 96)),
    "rest sr 4": (rest.DepthwiseConv(5, 4, BF16), (28, 28, 192)),
    "rest sr 2": (rest.DepthwiseConv(3, 2, BF16), (14, 14, 384)),
    "t2t split 1": (SplitProjection((7, 4, 2)), (224, 224, 3)),
    "t2t split 2": (SplitProjection((3, 2, 1)), (56, 56, 64)),
    "patch 4": (layers.PatchConv(64, 4, BF16), (224, 224, 3)),
    "patch 2": (layers.PatchConv(128, 2, BF16), (56, 56, 64)),
    "patch 16": (layers.PatchConv(384, 16, BF16), (224, 224, 3)),
    "pvt sr 8": (layers.PatchConv(64, 8, BF16), (56, 56, 64)),
    "attention 197": (SelfAttention(6, qkv_bias=True, dtype=BF16), (197, 384)),
    "norm 197": (layers.LayerNorm(1e-6, BF16), (197, 384)),
    "mlp 197": (layers.Mlp(4, dtype=BF16), (197, 384)),
    "deformable": (Deformable(), (5675, 256)),
    "deformable 300": (Deformable(300), (5675, 256)),
    "pvt block 1": (
        Block(
            functools.partial(pvt.SpatialReductionAttention, 1, 8, (56, 56), 0.0, BF16),
            functools.partial(layers.Mlp, 8, dtype=BF16),
            1e-6,
            dtype=BF16,
        ),
        (3136, 64),
    ),
}


def compile_layer(module: nn.Module, shape: tuple[int, ...], images: int, device: jax.Device) -> jax.stages.Compiled:
    """A layer with its gradients: of parameters and, unless that is an image, of the input."""
    x = jax.ShapeDtypeStruct((images, *shape), BF16)
    variables = jax.eval_shape(module.init, jax.random.key(0), x)
    apply = functools.partial(module.apply, mutable=["batch_stats"])
    out = jax.eval_shape(apply, variables, x)

    def both(variables, x, cotangent):
        if shape[-1] == 3:
            out, backward = jax.vjp(lambda variables: apply(variables, x), variables)
        else:
            out, backward = jax.vjp(apply, variables, x)
        return out, backward(cotangent)

    sharding = SingleDeviceSharding(device)
    shapes = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), (variables, x, out)
    )
    return jax.jit(both).lower(*shapes).compile()


def compile_step(config, devices: list[jax.Device], blocks: int | None) -> jax.stages.Compiled:
    """The training step that a config describes."""
    task = make_task(config)
    if blocks:
        task = dataclasses.replace(task, model=with_blocks(task.model, blocks))
    mesh = make_mesh(config.mesh.fsdp, devices)
    with jax.set_mesh(mesh):
        return program.compile_train_step(task, program.build(task, mesh), mesh)


def with_blocks(model: nn.Module, blocks: int) -> nn.Module:
    """The model with so many blocks in each stage."""
    field = "depths" if hasattr(model, "depths") else "depth"
    depths = getattr(model, field)
    return model.clone(**{field: blocks if field == "depth" else (blocks,) * len(depths)})


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        "tpu.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--layers", nargs="*", choices=list(LAYERS), help="which ones; default: all")
    parser.add_argument("--topology", default="v5e:2x2")
    parser.add_argument("--images", type=int, default=64, help="a chip")
    parser.add_argument("--blocks", type=int, help="transformer blocks in each stage; default: all")
    parser.add_argument("--by_operation", type=int, default=0, metavar="N", help="print the N costliest operations")
    args, rest = parser.parse_known_args()
    try:
        chips.use_absent_chips()
        devices = chips.absent_devices(args.topology)
    except ValueError as error:
        parser.error(str(error))
    print(f"jax {jax.__version__}, {devices[0].device_kind}, {args.images} images a chip; the compiler's estimates")
    if not rest:
        for name in args.layers or LAYERS:
            report(name, compile_layer(*LAYERS[name], args.images, devices[0]), args.by_operation)
        return
    _, config = config_args.parse(argparse.ArgumentParser(allow_abbrev=False), rest)
    config = config.copy_and_resolve_references().unlock()
    config.batch_size = config.eval.batch_size = args.images * len(devices)
    config.data.name = "synthetic"  # its images are never made
    report(config.model.name, compile_step(config, devices, args.blocks), args.by_operation)


def report(name: str, compiled: jax.stages.Compiled, operations: int) -> None:
    """Prints a line for a program, and its costliest operations."""
    found = hlo.cycles(compiled.as_text())
    unknown = found.pop(None, 0)
    temporary = compiled.memory_analysis().temp_size_in_bytes / 2**20
    note = f", {unknown} operations without an estimate" if unknown else ""
    print(f"{name:16}{found.total() / 1e6:8.2f} M cycles {temporary:8.0f} MiB{note}", flush=True)
    for operation, value in found.most_common(operations):
        print(f"  {value / 1e6:8.3f}  {operation}")


if __name__ == "__main__":
    main()
