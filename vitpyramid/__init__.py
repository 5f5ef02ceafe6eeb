"""PVT, PiT, T2T-ViT and ResT in JAX, exact to the papers' released PyTorch code."""

import importlib

__version__ = "0.1.0"

from vitpyramid import train
from vitpyramid.heads.registry import create_model, list_models, model_facts
from vitpyramid.models.registry import register_model
from vitpyramid.weights import load_pretrained

# What needs more than jax and flax is loaded when it is asked for.
_LATER = {
    "class_names": "vitpyramid.tools.classes",
    "load_config": "vitpyramid.train.config",
    "preprocess": "vitpyramid.tools.preprocess",
}

__all__ = [
    "__version__",
    "class_names",
    "create_model",
    "list_models",
    "load_config",
    "load_pretrained",
    "model_facts",
    "preprocess",
    "register_model",
    "train",
]


def __getattr__(name: str):
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_LATER[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_LATER})
