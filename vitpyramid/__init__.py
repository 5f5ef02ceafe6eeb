"""PVT, PiT, T2T-ViT and ResT in JAX, exact to the papers' released PyTorch code."""

__version__ = "0.1.0"

from vitpyramid.heads.registry import create_model, list_models
from vitpyramid.weights import load_pretrained

__all__ = ["__version__", "create_model", "list_models", "load_pretrained"]
