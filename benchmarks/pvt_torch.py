"""Times PVT here against PVT in PyTorch (transformers' `PvtForImageClassification`, eager) on the CPU.

    python benchmarks/pvt_torch.py --model=pvt_tiny --batch=16

Both run in float32 on the same `--threads` cores, in one process and in turns, so that a busy machine slows both. A
training step is loss and gradients; there is no optimiser. Weights are each side's own random ones: shapes alone decide
the time. Needs torch and transformers.
"""

import argparse
import os
import time

import numpy as np


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="pvt_tiny", help="pvt_tiny, pvt_small, pvt_medium or pvt_large")
    parser.add_argument("--size", type=int, default=224, help="side of the images")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=5, help="timed rounds, after one that is not")
    parser.add_argument("--threads", type=int, default=2)
    return parser.parse_args()


def jax_functions(args, images: np.ndarray, labels: np.ndarray) -> dict:
    """`{"forward": f, "step": f}`: functions without arguments that return when the work is done."""
    import jax
    import jax.numpy as jnp

    from vitpyramid import create_model

    model = create_model(args.model, image_size=args.size)
    images, labels = jnp.asarray(images), jnp.asarray(labels)
    variables = jax.jit(model.init)(jax.random.key(0), images[:1])

    def loss(variables, images, labels):
        log_probs = jax.nn.log_softmax(model.apply(variables, images, train=True))
        return -jnp.mean(jnp.take_along_axis(log_probs, labels[:, None], axis=1))

    forward, step = jax.jit(model.apply), jax.jit(jax.value_and_grad(loss))
    return {
        "forward": lambda: jax.block_until_ready(forward(variables, images)),
        "step": lambda: jax.block_until_ready(step(variables, images, labels)),
    }


def torch_functions(args, images: np.ndarray, labels: np.ndarray) -> dict:
    """The same in PyTorch."""
    import torch
    from transformers import PvtConfig, PvtForImageClassification

    from vitpyramid import create_model

    torch.set_num_threads(args.threads)
    ours = create_model(args.model)
    model = PvtForImageClassification(
        PvtConfig(
            image_size=args.size,
            depths=list(ours.depths),
            hidden_sizes=list(ours.dims),
            num_attention_heads=list(ours.heads),
            mlp_ratios=list(ours.mlp_ratios),
            sequence_reduction_ratios=list(ours.sr_ratios),
            num_labels=ours.num_classes,
        )
    )
    images = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()
    labels = torch.from_numpy(labels)

    def forward():
        model.eval()
        with torch.inference_mode():
            model(images)

    def step():
        model.train()
        model.zero_grad()
        torch.nn.functional.cross_entropy(model(images).logits, labels).backward()

    return {"forward": forward, "step": step}


def main():
    args = parse_args()
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: args.threads])  # before jax counts the cores
    rng = np.random.default_rng(0)
    images = rng.standard_normal((args.batch, args.size, args.size, 3)).astype(np.float32)
    labels = rng.integers(0, 1000, args.batch)
    sides = {"jax": jax_functions(args, images, labels), "torch": torch_functions(args, images, labels)}

    for kind in ("forward", "step"):
        seconds = {side: [] for side in sides}
        for _ in range(args.repeats + 1):
            for side, functions in sides.items():
                start = time.perf_counter()
                functions[kind]()
                seconds[side].append(time.perf_counter() - start)
        ours, theirs = (np.array(seconds[side][1:]) for side in sides)
        ratio = np.median(theirs / ours)
        print(
            f"{args.model} {args.size} batch {args.batch} {kind:8s}"
            f" jax {np.median(ours):.3f} s, torch {np.median(theirs):.3f} s, torch / jax {ratio:.2f}"
        )


if __name__ == "__main__":
    main()
