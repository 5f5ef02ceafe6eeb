"""Times a network here against the same in PyTorch, eager, on the CPU.

    python benchmarks/step_torch.py --model=pvt_tiny --batch=16

PVT is transformers' class, PiT and DeiT are timm's; T2T-ViT and ResT are `torch_models.py`. PVT apart, PyTorch gets the
weights of this side, and both must give the same logits before anything is timed. Both run in float32 on the same
`--threads` cores, in one process and in turns, so that a busy machine slows both. A training step is loss and
gradients; there is no optimiser. Dropout, which T2T-ViT has, is on in the steps. Needs torch, transformers and timm.
"""

import argparse
import functools
import os
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import timm
import torch
import torch_models
import transformers
import turns

from vitpyramid import create_model
from vitpyramid.weights.names import flax_to_torch


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="pvt_tiny", help="of list_models()")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=5, help="timed rounds, after one that is not")
    parser.add_argument("--threads", type=int, default=2)
    return parser.parse_args()


def jax_functions(model, variables, images: np.ndarray, labels: np.ndarray) -> dict:
    """`{"forward": f, "step": f}`: functions without arguments that return when the work is done."""
    images, labels = jnp.asarray(images), jnp.asarray(labels)
    key = jax.random.key(0)

    def loss(params, others, images, labels):
        apply = functools.partial(model.apply, train=True, rngs={"dropout": key}, mutable=["batch_stats"])
        logits, _ = apply({"params": params, **others}, images)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    forward, step = jax.jit(model.apply), jax.jit(jax.value_and_grad(loss))
    others = {name: value for name, value in variables.items() if name != "params"}
    return {
        "forward": lambda: jax.block_until_ready(forward(variables, images)),
        "step": lambda: jax.block_until_ready(step(variables["params"], others, images, labels)),
    }


def torch_network(name: str, model) -> torch.nn.Module:
    """The network called `name`, whose fields are those of `model`."""
    if name.startswith("pvt"):
        config = transformers.PvtConfig(
            image_size=model.image_size,
            depths=list(model.depths),
            hidden_sizes=list(model.dims),
            num_attention_heads=list(model.heads),
            mlp_ratios=list(model.mlp_ratios),
            sequence_reduction_ratios=list(model.sr_ratios),
            num_labels=model.num_classes,
        )
        return transformers.PvtForImageClassification(config)
    if name.startswith("t2t"):
        tokens = (model.image_size // 16) ** 2
        return torch_models.T2TViT(
            model.embed_dim, model.depth, model.heads, model.mlp_ratio, model.num_classes, tokens
        )
    if name.startswith("rest"):
        fields = model.depths, model.dims, model.heads, model.mlp_ratios, model.sr_ratios
        return torch_models.ResT(*fields, model.num_classes)
    if name.startswith("pit"):
        return timm.create_model(f"{name}_224")
    return timm.create_model(f"{name}_patch16_224")


def timm_name(name: str) -> str:
    """The authors' name of a weight, as timm has it: PiT's pooling belongs to the stage behind it."""
    return re.sub(r"^pools\.(\d)", lambda match: f"transformers.{int(match[1]) + 1}.pool", name)


def torch_functions(network: torch.nn.Module, images: np.ndarray, labels: np.ndarray) -> dict:
    """The same in PyTorch."""
    images = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()
    labels = torch.from_numpy(labels)

    def logits():
        out = network(images)
        return getattr(out, "logits", out)

    def forward():
        network.eval()
        with torch.inference_mode():
            return logits().numpy()

    def step():
        network.train()
        network.zero_grad()
        torch.nn.functional.cross_entropy(logits(), labels).backward()

    return {"forward": forward, "step": step}


def main():
    args = parse_args()
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: args.threads])  # before jax counts the cores
    torch.set_num_threads(args.threads)
    model = create_model(args.model)
    rng = np.random.default_rng(0)
    images = rng.standard_normal((args.batch, model.image_size, model.image_size, 3)).astype(np.float32)
    labels = rng.integers(0, model.num_classes, args.batch)
    variables = jax.jit(model.init)(jax.random.key(0), images[:1])
    network = torch_network(args.model, model)
    ours, theirs = jax_functions(model, variables, images, labels), torch_functions(network, images, labels)
    if not args.model.startswith("pvt"):
        arrays = flax_to_torch(args.model, variables)
        network.load_state_dict({timm_name(name): torch.from_numpy(array) for name, array in arrays.items()})
        logits, expected = np.asarray(ours["forward"]()), theirs["forward"]()
        # ResT's instance norm enlarges the rounding of float32: to 1e-4 of the largest logit (4e-12 in float64).
        np.testing.assert_allclose(logits, expected, rtol=0, atol=5e-4 * np.abs(expected).max())
    turns.compare(f"{args.model} {model.image_size} batch {args.batch}", {"jax": ours, "torch": theirs}, args.repeats)


if __name__ == "__main__":
    main()
